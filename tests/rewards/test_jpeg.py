"""The size of images as JPEG files, against files that Pillow writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dgpo_fast.rewards import load_reward


@pytest.fixture
def images() -> Tensor:
    """Black, a slope, and noise, whose levels float32 has between two whole numbers: [3, 3, 48, 64] in [0, 1]."""
    noise = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.zeros(3, 48, 64), torch.linspace(0, 1, 64).expand(3, 48, 64), noise])


def test_kilobytes_of_the_file_at_quality_95(images: Tensor, tmp_path: Path) -> None:
    sizes = []
    for image in images:
        levels = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(levels.numpy()).save(tmp_path / "image.jpg", quality=95)
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    assert load_reward("jpeg_incompressibility")(images, [""] * 3) == sizes
    assert load_reward("jpeg_compressibility")(images, [""] * 3) == [-size for size in sizes]
    assert sizes[0] < sizes[1] < sizes[2]


def test_what_is_outside_is_clipped(images: Tensor) -> None:
    reward = load_reward("jpeg_incompressibility")
    wide = images * 3 - 1
    assert reward(wide, [""] * 3) == reward(wide.clamp(0, 1), [""] * 3)


def test_an_image_that_is_not_finite_has_no_size(images: Tensor) -> None:
    """Not that of the black pixels that NaN becomes when it is made a whole number."""
    images[1, 0, 5, 5] = torch.nan
    for name in ("jpeg_compressibility", "jpeg_incompressibility"):
        scores = torch.tensor(load_reward(name)(images, [""] * 3))
        assert scores.isnan().tolist() == [False, True, False]
