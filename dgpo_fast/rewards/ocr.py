"""The reward `ocr`: whether the text that a prompt asks for can be read in the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import rapidocr
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidocr.utils.output import RapidOCROutput
from torch import Tensor

from dgpo_fast.environment import share_of_cores
from dgpo_fast.reward_config import OcrConfig
from dgpo_fast.rewards.ocr_target import normalised, target_text
from dgpo_fast.rewards.preprocessing import to_bytes

_MODELS = Path(rapidocr.__file__).parent / "models"

# Models by the path of the wheel's own files: rapidocr downloads what it is asked for by name and does not find. The
# rest is as PaddleOCR 2.9 has it by default, which the published runs read with; rapidocr's own settings enlarge 512 px
# to 736 first, and take twice as long.
_ENGINE = {
    "Global.use_cls": False,
    "Global.text_score": 0.5,
    "Global.log_level": "error",  # else a line for each image without text
    "Det.model_path": str(_MODELS / "PP-OCRv6_det_small.onnx"),
    "Det.limit_type": "max",
    "Det.limit_side_len": 960,
    "Det.thresh": 0.3,
    "Det.box_thresh": 0.6,
    "Det.unclip_ratio": 1.5,
    "Det.use_dilation": False,
    "Rec.model_path": str(_MODELS / "PP-OCRv6_rec_small.onnx"),
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}


class OcrReward:
    """Metrics `ocr` in [0, 1] and `exact`, 0 or 1: how much of the text that was asked for is in the image?

    With t the target and r all that is recognised, joined from top to bottom and left to right, both in lower case and
    without spaces,

        ocr   = 1 - d / len(t),    d = 0 if t is part of r, else min(Levenshtein distance of r and t, len(t)),
        exact = 1 if r = t, else 0.

    The target is the prompt's metadata "text" if it has it, else what stands between its first two double quotes.

    Source of the rule: flow_grpo/ocr.py of yifan123/flow_grpo, and the same of Luo-Yihong/DGPO, whose reward is `ocr`.
    Departures:
        They read with PaddleOCR 2.9.1 (PP-OCR v3 and v4, for English), this with the PP-OCRv6 models, small, that come
        in rapidocr's wheel, on onnxruntime: scores of the same image may differ by letters. Pixels reach the models in
        the order that they were trained on, blue first; there, red comes first.
        An image that cannot be read raises, where there it scores 0, and a prompt without a target is an error, where
        there a single quote begins one that ends with the prompt.

    Images are read one by one, several at a time by a thread each: a score does not depend on the batch. Finding text
    takes five sixths of an image's time and recognising it one, and lines recognised six at a time, as rapidocr does
    within an image, are no faster than one by one: there is nothing to gain from those of several images together.

    Args:
        device: ignored: onnxruntime's CPU build reads on the CPU.
    """

    def __init__(self, settings: OcrConfig, *, device: torch.device) -> None:
        self._engine = rapidocr.RapidOCR(params=_ENGINE)
        self._num_threads = settings.threads or share_of_cores()

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        """Both metrics.

        Raises:
            UserError: a prompt names no text to look for.
        """
        targets = [normalised(target_text(prompt)) for prompt in prompts]
        found = [normalised(text) for text in self.read(images_BCHW)]
        return {
            "ocr": [similarity(text, target) for text, target in zip(found, targets, strict=True)],
            "exact": [float(text == target) for text, target in zip(found, targets, strict=True)],
        }

    def read(self, images_BCHW: Tensor) -> list[str]:
        """All text of each image, from top to bottom and left to right, lines joined without anything between.

        Args:
            images_BCHW: float in [0, 1], RGB.
        """
        pixels_BHWC = to_bytes(images_BCHW).numpy()
        # Threads, not processes: an image of 512 px takes 0.34 s on a core, and 95 % of them pass in onnxruntime, which
        # lets other threads run.
        with ThreadPool(self._num_threads) as pool:
            return pool.map(self._read_one, pixels_BHWC, chunksize=1)

    def _read_one(self, pixels_HWC: NDArray[np.uint8]) -> str:
        blue_first_HWC = np.ascontiguousarray(pixels_HWC[:, :, ::-1])
        result = self._engine(blue_first_HWC)
        assert isinstance(result, RapidOCROutput)  # as it is where text is both found and recognised
        return "".join(result.txts or ())


def similarity(found: str, target: str) -> float:
    """1 - d / len(target), as `OcrReward` defines it, of texts in lower case and without spaces."""
    if target in found:
        return 1.0
    return 1 - min(Levenshtein.distance(found, target), len(target)) / len(target)
