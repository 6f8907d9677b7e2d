"""How good a policy's images of held-out prompts are, and how far they have moved: what rewards do not ask.

Shape letters: P prompts, G images of each, C H W pixels, N patches, D values of a patch, K directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import unfold

from dgpo_fast.shapes.captions import Caption, parse_caption
from dgpo_fast.shapes.render import render
from dgpo_fast.shapes.verifier import Verdict, verify

PATCH, STRIDE = 9, 3
"""Sides of a patch, and of the grid that patches begin at, in pixels: an object is about 18 across."""
DIRECTIONS = 128
"""Onto which patches are projected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Scores of images and how far they are from those that they should resemble."""

    strict: float
    """Share of images that show exactly what is asked."""
    soft: float
    """How nearly, in [0, 1]."""
    distance: float
    """Sliced Wasserstein distance between patches of the images and of rendered ones of the same prompts, in RGB."""
    diversity: float
    """Mean distance of two images of a prompt: root of the mean square difference of their values."""


def held_out(images_BCHW: Tensor, prompts: Sequence[str], *, per_prompt: int) -> HeldOut:
    """Of images in [0, 1], `per_prompt` of each prompt, one after the other."""
    captions = captions_of(prompts, per_prompt=per_prompt)
    found = verdicts(images_BCHW, captions)
    drawn_by = np.random.default_rng(0)
    rendered = torch.from_numpy(np.stack([render(caption, drawn_by) for caption in captions]))
    return HeldOut(
        strict=sum(verdict.strict for verdict in found) / len(found),
        soft=sum(verdict.soft for verdict in found) / len(found),
        distance=patch_distance(images_BCHW.cpu(), rendered),
        diversity=diversity(images_BCHW.unflatten(0, (-1, per_prompt))),
    )


def captions_of(prompts: Sequence[str], *, per_prompt: int) -> list[Caption]:
    """What each image should show."""
    return [caption for caption in map(parse_caption, prompts) for _ in range(per_prompt)]


def verdicts(images_BCHW: Tensor, captions: Sequence[Caption]) -> list[Verdict]:
    """Whether each image shows what is asked, and how nearly."""
    return [verify(image, caption) for image, caption in zip(images_BCHW.cpu().numpy(), captions, strict=True)]


def patch_distance(one_BCHW: Tensor, other_BCHW: Tensor) -> float:
    """The sliced Wasserstein distance of order 1 between the patches of two equally large sets of images.

    Source: Rabin et al., "Wasserstein barycenter and its application to texture mixing" (SSVM 2011); of patches, as a
    measure of images: Karras et al., arXiv 1710.10196.
    """
    one_DN, other_DN = (_patches(images) for images in (one_BCHW, other_BCHW))
    generator = torch.Generator().manual_seed(0)
    directions_DK = torch.randn(len(one_DN), DIRECTIONS, generator=generator)
    directions_KD = (directions_DK / directions_DK.norm(dim=0)).T
    # NumPy sorts rows ten times as fast as PyTorch columns.
    one_KN, other_KN = (np.sort((directions_KD @ patches).numpy()) for patches in (one_DN, other_DN))
    return float(np.abs(one_KN - other_KN).mean(dtype=np.float64))


def _patches(images_BCHW: Tensor) -> Tensor:
    return unfold(images_BCHW, PATCH, stride=STRIDE).transpose(0, 1).flatten(1)


def diversity(images_PGCHW: Tensor) -> float:
    """The mean over prompts and over pairs of their images of the root mean square difference."""
    values_PGD = images_PGCHW.flatten(2)
    distances_PGG = torch.cdist(values_PGD, values_PGD) / values_PGD.shape[2] ** 0.5
    num_images = images_PGCHW.shape[1]
    return float(distances_PGG.sum((1, 2)).mean() / (num_images * (num_images - 1)))
