"""Images as the vision models of rewards expect them: resized, cropped and normalised in batches, where they lie.

Published scores are of images that Pillow has resized. What it computes is integer arithmetic, so it can be repeated to
the bit on any device: what a reward sees is what the authors of its model saw.

Shapes: B images, H W their size; an axis of `size` pixels becomes one of `new_size`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, which LAION's and BLIP have kept."""

PILLOW_ONE = float(1 << 22)
"""The whole number that stands for a weight of 1 (PRECISION_BITS in Pillow's src/libImaging/Resample.c)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """The shorter side to `size` by bicubic interpolation, the middle square of that, CLIP's mean and deviation."""

    size: int
    resampling: Literal["pillow", "torch"] = "pillow"
    """Pillow's 8-bit resampling, or torchvision's of a tensor, which neither rounds nor clips what it gives."""
    odd_margin: Literal["down", "even"] = "down"
    """Where the middle begins if the margins m cannot be equal: at floor(m / 2), as transformers has it, or at m / 2
    rounded to even, as torchvision has it. They differ for one m in four, by one pixel, and never for a square."""

    def __call__(self, images_BCHW: Tensor, *, dtype: torch.dtype) -> Tensor:
        """The model's input, [B, 3, size, size] of `dtype`, on the device of `images_BCHW`.

        Args:
            images_BCHW: float32 in [0, 1]; rounded to 8 bits first, and what is outside clipped, as in an image file.
        """
        levels_BCHW = levels_of(images_BCHW.double())
        height, width = images_BCHW.shape[-2:]
        short = min(height, width)
        new_size = (self.size * height // short, self.size * width // short)
        resize = resize_like_pillow if self.resampling == "pillow" else _resize_like_torchvision
        cropped = resize(levels_BCHW, new_size, (self._middle(new_size[0]), self._middle(new_size[1]))).float()
        mean, std = (cropped.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        return ((cropped / 255 - mean) / std).to(dtype)

    def _middle(self, side: int) -> range:
        margin = side - self.size
        first = margin // 2 if self.odd_margin == "down" else round(margin / 2)
        return range(first, first + self.size)


def levels_of(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8 bits have them, in their dtype: whole numbers from 0 to 255; what is outside is clipped."""
    return (images * 255).round().clamp(0, 255)


def to_bytes(images_BCHW: Tensor) -> Tensor:
    """What an image file has of images in [0, 1]: uint8 [B, H, W, C] on the CPU; what is outside is clipped."""
    return images_BCHW.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()


def resize_like_pillow(levels_BCHW: Tensor, new_size: tuple[int, int], seen: tuple[range, range]) -> Tensor:
    """Of what `Image.resize(..., BICUBIC)` gives of 8-bit images a part, to the bit: float64, from 0 to 255.

    Pillow makes rows of the new width, rounds to 8 bits, then makes columns of the new height and rounds again; its
    weights are whole multiples of 2**-22. Sums of such products are whole numbers below 2**53, so float64 has them
    exactly, in whatever order. (Pillow 13 makes the columns of tall images first, which moves a few of their levels.)

    Args:
        levels_BCHW: float64, whole numbers from 0 to 255.
        new_size: height and width.
        seen: the rows and columns of these that are wanted; no others are made.
    """
    height, width = levels_BCHW.shape[-2:]
    device = levels_BCHW.device
    rows = _to_8_bits(levels_BCHW @ pillow_weights(width, new_size[1], seen[1], device=device).T)
    return _to_8_bits(pillow_weights(height, new_size[0], seen[0], device=device) @ rows)


def pillow_weights(size: int, new_size: int, seen: range, *, device: torch.device) -> Tensor:
    """Pillow's bicubic weights times 2**22 of those pixels of `new_size` that are seen: float64 [seen, size].

    The cubic kernel of Keys with a = -1/2, as wide as the pixels that it makes where these are larger than the given
    ones; rounded half away from zero. Source: Pillow, src/libImaging/Resample.c.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    pixel = torch.arange(size, dtype=torch.float64, device=device)
    centre = ((torch.arange(seen.start, seen.stop, dtype=torch.float64, device=device) + 0.5) * scale)[:, None]
    first, last = (centre - 2 * stretch + 0.5).floor(), (centre + 2 * stretch + 0.5).floor()
    distance = ((pixel - centre + 0.5) / stretch).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    kernel = torch.where(distance < 1, near, far) * ((distance < 2) & (pixel >= first) & (pixel < last))
    weights = PILLOW_ONE * kernel / kernel.sum(1, keepdim=True)
    return weights.sign() * (weights.abs() + 0.5).floor()


def _to_8_bits(sums: Tensor) -> Tensor:
    return (sums / PILLOW_ONE + 0.5).floor().clamp(0, 255)


def _resize_like_torchvision(levels_BCHW: Tensor, new_size: tuple[int, int], seen: tuple[range, range]) -> Tensor:
    whole = torch.nn.functional.interpolate(levels_BCHW.float(), size=new_size, mode="bicubic", antialias=True)
    return whole[..., seen[0].start : seen[0].stop, seen[1].start : seen[1].stop]
