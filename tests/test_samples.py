"""Sample grids: images and prompts come back, captions stay below their tiles, a crash leaves the old file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.samples import BACKGROUND, read_grid, save_grid

SIZE = 192
"""From here on images are not enlarged."""


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def images(num: int, size: int = SIZE) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num", [1, 2, 5, 7, 8, 16])
def test_images_and_prompts_come_back(tmp_path: Path, num: int) -> None:
    prompts = [f'{index}: "ein Bär", 三つの円\n& <b>' for index in range(num)]
    save_grid(images(num), prompts, tmp_path / "grid.png")
    tiles = read_grid(tmp_path / "grid.png")
    assert [tile.prompt for tile in tiles] == prompts
    for tile, image in zip(tiles, images(num), strict=True):
        assert torch.equal(pixels(tile.image), (image * 255).round().byte())


@pytest.mark.parametrize(("size", "shown"), [(16, 192), (64, 192), (100, 200), (192, 192), (512, 512)])
def test_small_images_are_enlarged_by_a_whole_number(tmp_path: Path, size: int, shown: int) -> None:
    save_grid(images(2, size), ["a", "b"], tmp_path / "grid.png")
    for tile, image in zip(read_grid(tmp_path / "grid.png"), images(2, size), strict=True):
        assert tile.image.size == (shown, shown)
        # Every block of the enlarged image averages to about the pixel it comes from; neighbours share some of it.
        means = torch.nn.functional.avg_pool2d(pixels(tile.image).float() / 255, shown // size)
        assert torch.nn.functional.cosine_similarity((means - 0.5).flatten(), (image - 0.5).flatten(), dim=0) > 0.9


def test_values_outside_the_unit_interval_are_clamped(tmp_path: Path) -> None:
    image = torch.tensor([-0.5, 0.5, 1.5])[None, :, None, None].expand(1, 3, SIZE, SIZE)
    save_grid(image, ["a"], tmp_path / "grid.png")
    assert pixels(read_grid(tmp_path / "grid.png")[0].image)[:, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("prompt", ["a word " * 100, "unbreakable" * 30], ids=["long", "unbreakable"])
def test_a_caption_stays_below_its_tile(tmp_path: Path, prompt: str) -> None:
    save_grid(images(1), [prompt], tmp_path / "grid.png")
    grid = np.array(Image.open(tmp_path / "grid.png"))
    left = int(np.flatnonzero((grid != BACKGROUND).any(axis=(0, 2)))[0])
    ink = (grid != BACKGROUND).any(axis=2)
    assert not ink[:, :left].any() and not ink[:, left + SIZE :].any()
    below = ink[left + SIZE :].any(axis=1)
    assert below.any() and not below[-left // 2 :].any()
    assert read_grid(tmp_path / "grid.png")[0].prompt == prompt


def test_a_crash_while_saving_leaves_the_old_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_grid(images(1), ["old"], path)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_grid(images(1), ["new"], path)
    assert read_grid(path)[0].prompt == "old"


def test_a_prompt_for_each_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        save_grid(images(2), ["only one"], tmp_path / "grid.png")


@pytest.mark.parametrize("content", ["nothing", "text", "picture", "half"])
def test_what_is_no_sample_grid_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "grid.png"
    if content == "text":
        path.write_text("no picture")
    elif content == "picture":
        Image.new("RGB", (4, 4)).save(path)
    elif content == "half":
        save_grid(images(1), ["a"], path)
        path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"grid\.png: not a sample grid"):
        read_grid(path)
