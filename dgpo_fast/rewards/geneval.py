"""GenEval: does the image show the objects that its prompt asks for, in their number, colours and places?

A detector finds the objects (`geneval_detector`), CLIP names colours where a prompt asks for some (`geneval_colors`),
and rules judge what was found (`geneval_rules`). Source: arXiv 2310.11513, djghosh13/geneval; soft scores as in
Flow-GRPO's reward server, yifan123/reward-server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dgpo_fast.prompts.geneval import CLASSES
from dgpo_fast.reward_config import GenEvalConfig
from dgpo_fast.rewards import geneval_colors, geneval_detector
from dgpo_fast.rewards.geneval_colors import ColorReader, Crop, name_colors
from dgpo_fast.rewards.geneval_detector import Detections, Detector
from dgpo_fast.rewards.geneval_rules import Asked, Found, Thing, asked_of, judge, kept, to_be_colored
from dgpo_fast.rewards.preprocessing import levels_of
from dgpo_fast.rewards.pretrained import Pretrained


class GenEvalReward:
    """Metrics `soft`, at most 1, which published runs train on; `strict`, and `correct`, the benchmark's own, 0 or 1.

    Flow-GRPO and DGPO give the mean of each clause's worth to the advantages, and watch the two verdicts (their
    "accuracy" is `correct`). GenEval's published score is the mean of `correct` over six tasks' means.
    """

    def __init__(self, settings: GenEvalConfig, *, device: torch.device) -> None:
        # Both are looked for before either is loaded.
        detector, clip = (weights.find(path) for weights, path in self.weights(settings))
        self._detector = Detector.from_directory(detector, device=device)
        self._reader = ColorReader.from_directory(clip, device=device)

    @staticmethod
    def weights(settings: GenEvalConfig) -> list[tuple[Pretrained, str | None]]:
        """What it needs, and where the recipe says that it is."""
        return [(geneval_detector.WEIGHTS, settings.path), (geneval_colors.WEIGHTS, settings.clip_path)]

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, list[float]]:
        """A score for each image and metric.

        Raises:
            UserError: a prompt does not come with what to look for, in GenEval's form.
        """
        asked = [asked_of(prompt) for prompt in prompts]
        detections = self._detector(images_BCHW, confidence=[each.confidence for each in asked])
        found = [
            kept(_things(of_image), confidence=each.confidence)
            for of_image, each in zip(detections, asked, strict=True)
        ]
        colors = self._colors(images_BCHW, detections, asked, found)
        verdicts = [judge(*each) for each in zip(asked, found, colors, strict=True)]
        return {
            "soft": [verdict.soft for verdict in verdicts],
            "strict": [float(verdict.strict) for verdict in verdicts],
            "correct": [float(verdict.correct) for verdict in verdicts],
        }

    def _colors(
        self,
        images_BCHW: Tensor,
        detections: Sequence[Detections],
        asked: Sequence[Asked],
        found: Sequence[Found],
    ) -> list[dict[int, list[str]]]:
        """The colours that `judge` wants to know of each image, all read at once."""
        wanted = [
            (image, clause, things)
            for image, (each, of_image) in enumerate(zip(asked, found, strict=True))
            for clause, things in to_be_colored(each, of_image).items()
        ]
        levels_BCHW = levels_of(images_BCHW.float())
        crops = [
            [_crop(levels_BCHW[image], detections[image], thing) for thing in things] for image, _, things in wanted
        ]
        colors: list[dict[int, list[str]]] = [{} for _ in asked]
        for (image, clause, _), names in zip(wanted, name_colors(self._reader, crops), strict=True):
            colors[image][clause] = names
        return colors


def _things(detections: Detections) -> list[Thing]:
    found = zip(detections.label_K.tolist(), detections.score_K.tolist(), detections.box_K4.tolist(), strict=True)
    return [Thing(CLASSES[label], score, tuple(box), place) for place, (label, score, box) in enumerate(found)]


def _crop(levels_CHW: Tensor, detections: Detections, thing: Thing) -> Crop:
    mask_HW = detections.mask_KHW[thing.place]
    left, top, right, bottom = (int(side) for side in thing.box)
    return Crop(thing.name, levels_CHW.to(mask_HW.device), mask_HW, (left, top, right, bottom))
