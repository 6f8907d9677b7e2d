"""Images for vision models: what Pillow, transformers and torchvision would have made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dgpo_fast.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, resize_like_pillow

NORMALISING = 2 * 6 * 2**-24
"""Two computations, each of which rounds two numbers below 1, by 2**-25, which the deviation then enlarges four times,
and a quotient below 4, by 2**-23."""
SIZES = [(512, 512), (224, 224), (96, 96), (150, 151), (300, 227), (333, 500)]


def pictures(height: int, width: int) -> Tensor:
    """8-bit images [2, 3, H, W] as float32 in [0, 1]: noise, and slopes, of whose sums many end on exactly one half."""
    generator = torch.Generator().manual_seed(height * width)
    noise = torch.rand(1, 3, height, width, generator=generator)
    slopes = torch.nn.functional.interpolate(
        torch.rand(1, 3, 7, 7, generator=generator), size=(height, width), mode="bicubic"
    )
    return (torch.cat([noise, slopes]) * 255).round().clamp(0, 255) / 255


def in_pillow(images_BCHW: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images_BCHW]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("new_size", [(224, 224), (37, 300)])
def test_resizing_is_pillows_to_the_bit(height: int, width: int, new_size: tuple[int, int]) -> None:
    """Larger, smaller, and one of either: also where a sum is exactly between two levels.

    Pillow is called for rows and for columns, since its versions differ in what they begin with.
    """
    images_BCHW = pictures(height, width)
    found = resize_like_pillow((images_BCHW.double() * 255).round(), new_size, (range(new_size[0]), range(new_size[1])))
    rows = [image.resize((new_size[1], height), Image.Resampling.BICUBIC) for image in in_pillow(images_BCHW)]
    resized = [image.resize(new_size[::-1], Image.Resampling.BICUBIC) for image in rows]
    expected = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
    assert torch.equal(found, expected.double())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_same_as_transformers_processor_of_clip(height: int, width: int) -> None:
    """Levels are the same to the bit, so that only what normalises them may round otherwise."""
    images_BCHW = pictures(height, width)
    found = Preprocessing(size=224)(images_BCHW, dtype=torch.float32)
    expected = CLIPImageProcessorPil()(images=in_pillow(images_BCHW), return_tensors="pt").pixel_values
    torch.testing.assert_close(found, expected, rtol=0, atol=NORMALISING)


def test_the_same_as_transformers_processor_of_blip() -> None:
    """Which has no crop and makes any image a square: the same for one that is."""
    images_BCHW = pictures(512, 512)
    found = Preprocessing(size=224, odd_margin="even")(images_BCHW, dtype=torch.float32)
    processor = BlipImageProcessorPil(size={"height": 224, "width": 224})
    expected = processor(images=in_pillow(images_BCHW), return_tensors="pt").pixel_values
    torch.testing.assert_close(found, expected, rtol=0, atol=NORMALISING)


@pytest.mark.parametrize(("side", "down", "even"), [(24, 4, 4), (25, 4, 4), (26, 5, 5), (27, 5, 6), (28, 6, 6)])
def test_where_the_middle_begins(side: int, down: int, even: int) -> None:
    """Margins of 8 to 12 pixels: torchvision's `int(round(margin / 2.0))` against transformers' `margin // 2`."""
    columns = torch.arange(side).expand(1, 3, 16, side) / 255
    for odd_margin, first in (("down", down), ("even", even)):
        pixels = Preprocessing(size=16, odd_margin=odd_margin)(columns, dtype=torch.float32)
        assert round((pixels[0, 0, 0, 0].item() * CLIP_STD[0] + CLIP_MEAN[0]) * 255) == first


def test_resizing_as_torchvision_resizes_tensors() -> None:
    """By its definition, in float64: a kernel as wide as the new pixels, and neither rounded nor clipped.

    Weights and sums of some tens of float32 numbers near 1 round a few times.
    """
    images_BCHW = pictures(96, 60)
    found = Preprocessing(size=24, resampling="torch", odd_margin="even")(images_BCHW, dtype=torch.float32)
    resized = cubic(96, 38) @ images_BCHW.double() @ cubic(60, 24).T
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    assert resized.min() < 0 and resized.max() > 1
    torch.testing.assert_close(found.double(), (resized[..., 7:31, :] - mean) / std, rtol=0, atol=32 * 4 * 2**-24)


def cubic(size: int, new_size: int) -> Tensor:
    """Weights of the cubic convolution with a = -1/2, stretched by size / new_size: float64 [new_size, size]."""
    scale, rows = size / new_size, torch.zeros(new_size, size, dtype=torch.float64)
    for row in range(new_size):
        for column in range(size):
            x = abs(column + 0.5 - (row + 0.5) * scale) / scale
            if x < 1:
                rows[row, column] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                rows[row, column] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return rows / rows.sum(1, keepdim=True)


@pytest.mark.parametrize("resampling", ["pillow", "torch"])
def test_a_batch_is_its_images(resampling: str) -> None:
    images_BCHW = pictures(100, 130)
    prepare = Preprocessing(size=32, resampling=resampling)  # type: ignore[arg-type]
    together = prepare(images_BCHW, dtype=torch.float32)
    assert torch.equal(together, torch.cat([prepare(image[None], dtype=torch.float32) for image in images_BCHW]))
    assert together.shape == (2, 3, 32, 32)


def test_what_is_between_levels_or_outside_is_rounded_and_clipped_first() -> None:
    image = torch.tensor([-0.2, 0.1, 0.4, 1.3]).expand(1, 3, 4, 4)
    written = torch.tensor([0, 26, 102, 255]).expand(1, 3, 4, 4) / 255
    prepare = Preprocessing(size=4)
    assert torch.equal(prepare(image, dtype=torch.float32), prepare(written, dtype=torch.float32))


def test_the_models_dtype_is_rounded_to_once() -> None:
    images_BCHW = pictures(64, 64)
    prepare = Preprocessing(size=16)
    exact = prepare(images_BCHW, dtype=torch.float32)
    assert torch.equal(prepare(images_BCHW, dtype=torch.float16), exact.half())


def test_what_is_not_a_number_stays_so() -> None:
    """The score becomes NaN too, which the recipe decides about."""
    images_BCHW = pictures(64, 64)
    images_BCHW[0, 0, 3, 3] = torch.nan
    nan_B = Preprocessing(size=16)(images_BCHW, dtype=torch.float32).isnan().flatten(1).any(1)
    assert nan_B.tolist() == [True, False]
