"""Objects in images, by Mask2Former: what GenEval's rules judge.

The benchmark runs mmdetection's Mask2Former Swin-S of COCO (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco); here it is
transformers' model of that architecture and training, facebook/mask2former-swin-small-coco-instance. What is around the
network follows mmdetection 2.x (configs/mask2former, models/seg_heads/panoptic_fusion_heads/maskformer_fusion_head.py):
images enlarged to 800 pixels at the shorter side, or 1333 at the longer, masks enlarged as logits, scores that are the
class's probability times the mean probability within the mask.

Differences that remain:
- The weights, which are of another training by the same plan: mmdetection's reach an average precision of 46.1 on
  COCO's masks, Meta's, which these are, 46.3 (arXiv 2112.01527).
- transformers' own processor would have the network see 384 x 384 pixels and measure masks there; neither is done.
- Flow-GRPO and DGPO hand mmdetection arrays of red, green, blue, which it takes for blue, green, red: there the
  detector sees red and blue exchanged. The benchmark hands it files, and so does not; nor does this.
- The detector computes in float32; on CUDA its convolutions are TF32, as PyTorch has them unless told otherwise.

Shapes: B images, Q queries, C classes, K detections of one image, H W an image's size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import Mask2FormerForUniversalSegmentation

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.loading import load_model
from dgpo_fast.rewards.preprocessing import levels_of
from dgpo_fast.rewards.pretrained import Pretrained

WEIGHTS = Pretrained(
    repo="facebook/mask2former-swin-small-coco-instance", key="rewards.geneval.path",
    files=("config.json", "model.safetensors"), gigabytes=0.28, licence="'other' on the hub; its code's is MIT",
)  # fmt: skip

NUM_CLASSES = 80
SHORT_SIDE, LONG_SIDE = 800, 1333
SIZE_DIVISOR = 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DETECTIONS_PER_IMAGE = 100
IMAGES_PER_FORWARD = 8
"""Of 800 x 800 pixels; one takes 1.6 GB of a CPU with all else (28 s on a core), on a GPU it has not been measured."""
MASKS_AT_ONCE = 32
"""Of 800 x 800 float32 logits, 82 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """The objects of one image, in no order."""

    label_K: Tensor  # int64, COCO's class
    score_K: Tensor  # float32
    box_K4: Tensor  # int64: left, top, right, bottom, the latter two behind the last pixel
    mask_KHW: Tensor  # bool


class _Sizes(NamedTuple):
    """Height and width of the network's input, of that without what was put below and to the right, of the image."""

    padded: tuple[int, ...]
    resized: tuple[int, int]
    original: tuple[int, ...]


class Detector:
    """Mask2Former and what mmdetection does before and after it."""

    def __init__(
        self, model: Mask2FormerForUniversalSegmentation, *, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE
    ) -> None:
        self._model, self._short_side, self._long_side = model, short_side, long_side

    @classmethod
    def from_directory(cls, directory: Path, *, device: torch.device) -> Detector:
        """The model in a directory in transformers' format.

        Raises:
            UserError: it cannot be read, or detects other than COCO's 80 classes.
        """
        model = load_model(Mask2FormerForUniversalSegmentation, directory, key=WEIGHTS.key)
        if model.config.num_labels != NUM_CLASSES:
            raise UserError(
                f"{WEIGHTS.key}: {directory} knows {model.config.num_labels} classes; expected COCO's {NUM_CLASSES}, "
                f"as {WEIGHTS.repo} does"
            )
        return cls(model.to(device))

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, *, confidence: Sequence[float]) -> list[Detections]:
        """The objects of each image whose score exceeds its `confidence`, on the model's device.

        Args:
            images_BCHW: float32 in [0, 1]; rounded to 8 bits first, as in an image file.
        """
        confidence_B = torch.tensor(confidence, device=self._model.device)
        found: list[Detections] = []
        for images, thresholds in zip(
            images_BCHW.split(IMAGES_PER_FORWARD), confidence_B.split(IMAGES_PER_FORWARD), strict=True
        ):
            found += self._detect(images.to(self._model.device), thresholds)
        return found

    def prepare(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The network's input, and its height and width before zeros were put below and to the right."""
        levels = levels_of(images_BCHW.float())
        height, width = images_BCHW.shape[-2:]
        scale = min(self._long_side / max(height, width), self._short_side / min(height, width))
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        # OpenCV's, which gives 8 bits too and does not smooth where it makes smaller.
        resized = interpolate(levels, size, mode="bilinear", align_corners=False).round()
        mean, std = (resized.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        below, right = (-side % SIZE_DIVISOR for side in size)
        return pad((resized - mean) / std, (0, right, 0, below)), size

    def _detect(self, images_BCHW: Tensor, confidence_B: Tensor) -> list[Detections]:
        pixels, size = self.prepare(images_BCHW)
        output = self._model(pixel_values=pixels)
        probability_BQC = output.class_queries_logits.float().softmax(-1)[..., :-1]
        sizes = _Sizes(tuple(pixels.shape[-2:]), size, tuple(images_BCHW.shape[-2:]))
        of_images = zip(probability_BQC, output.masks_queries_logits.float(), confidence_B, strict=True)
        return [_detections(*of_image, sizes) for of_image in of_images]


def _detections(probability_QC: Tensor, logit_Qhw: Tensor, confidence: Tensor, sizes: _Sizes) -> Detections:
    """Those of one image, from the probability of each class and the mask that each query has."""
    flat = probability_QC.flatten()
    score_K, place_K = flat.topk(min(DETECTIONS_PER_IMAGE, len(flat)))
    candidate_K = score_K > confidence  # the mask's part of a score is at most 1, so that no other can exceed it
    score_K, place_K = score_K[candidate_K], place_K[candidate_K]
    query_K, label_K = place_K // probability_QC.shape[1], place_K % probability_QC.shape[1]
    measured = [_measure_masks(logit_Qhw[some], sizes) for some in query_K.split(MASKS_AT_ONCE)]
    mask_KHW, certainty_K = (torch.cat(parts) for parts in zip(*measured, strict=True))
    score_K = score_K * certainty_K
    kept_K = score_K > confidence
    mask_KHW = mask_KHW[kept_K]
    return Detections(label_K=label_K[kept_K], score_K=score_K[kept_K], box_K4=boxes_of(mask_KHW), mask_KHW=mask_KHW)


def _measure_masks(logit_Khw: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """Masks at the image's own size, and the mean probability within each: bool [K, H, W], float32 [K]."""
    if not len(logit_Khw):  # of which `interpolate` makes nothing
        return logit_Khw.new_zeros(0, *sizes.original, dtype=torch.bool), logit_Khw.new_zeros(0)
    height, width = sizes.resized
    logit = interpolate(logit_Khw[:, None], sizes.padded, mode="bilinear", align_corners=False)[..., :height, :width]
    logit_KHW = interpolate(logit, sizes.original, mode="bilinear", align_corners=False)[:, 0]
    mask_KHW = logit_KHW > 0
    total_K = (logit_KHW.sigmoid() * mask_KHW).sum((1, 2))
    return mask_KHW, total_K / (mask_KHW.sum((1, 2)) + 1e-6)


def boxes_of(mask_KHW: Tensor) -> Tensor:
    """The smallest box around each mask, int64 [K, 4]; masks are not empty."""
    ends = []
    for axis in (1, 2):  # over the rows, which leaves columns; over the columns, which leaves rows
        is_there = mask_KHW.any(axis).to(torch.uint8)
        length = is_there.shape[1]
        ends.append((is_there.argmax(1), length - is_there.flip(1).argmax(1)))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], dim=1)
