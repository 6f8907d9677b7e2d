"""How large images are as JPEG files: rewards that need no model.

Source: Black et al., arXiv 2305.13301, section 5.1; github.com/kvablack/ddpo-pytorch, ddpo_pytorch/rewards.py.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from dgpo_fast.rewards.preprocessing import levels_of

QUALITY = 95
BYTES_PER_KILOBYTE = 1000


class JpegIncompressibility:
    """Kilobytes (1000 bytes) of the image as a JPEG of quality 95 with Pillow's other settings; prompts are not read.

    NaN for an image that is not finite. One image after another: Pillow (src/encode.c) keeps Python's lock while it
    encodes to memory, so that threads would wait for each other. Made into levels one by one, too: memory for a whole
    batch comes anew from the system each time, which takes longer than the encoding.
    """

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        return [_kilobytes(image_CHW) if image_CHW.isfinite().all() else math.nan for image_CHW in images_BCHW]


class JpegCompressibility:
    """Minus those kilobytes, as in DDPO. Flow-GRPO's code divides by 500, which only a sum of rewards feels."""

    def __init__(self) -> None:
        self._incompressibility = JpegIncompressibility()

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        return [-kilobytes for kilobytes in self._incompressibility(images_BCHW, prompts)]


def _kilobytes(image_CHW: Tensor) -> float:
    levels_HWC = levels_of(image_CHW).byte().permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(levels_HWC.cpu().numpy()).save(file, format="JPEG", quality=QUALITY)
    return file.tell() / BYTES_PER_KILOBYTE
