"""Sample grids: images with their prompts, as one PNG that people look at and `read_grid` takes apart again.

Shapes: B images, C = 3 channels, H W pixels.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from dgpo_fast.errors import UserError
from dgpo_fast.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

MIN_TILE = 192
"""Smaller images are enlarged by a whole number until their side reaches this many pixels."""
MAX_CAPTION_LINES = 3
BACKGROUND = (255, 255, 255)
INK = (60, 60, 66)

METADATA_KEY = "dgpo_fast.tiles"


class Tile(NamedTuple):
    """One image of a grid, with its prompt."""

    prompt: str
    image: Image.Image


def save_grid(images_BCHW: Tensor, prompts: Sequence[str], path: Path, *, columns: int | None = None) -> None:
    """Writes images and their prompts to `path` as a PNG grid, completely or not at all.

    The PNG carries the prompts and the place of each image as text, for `read_grid`.

    Args:
        images_BCHW: float in [0, 1], on any device; values outside are clamped.
        prompts: one per image.
        columns: images in a row; None for a grid wider than high.
    """
    enlargement = max(1, math.ceil(MIN_TILE / images_BCHW.shape[-1]))
    images = [_enlarge(picture, enlargement) for picture in to_pictures(images_BCHW)]
    side = images[0].width
    gap, font_size = side // 12, side // 14
    font = ImageFont.load_default(size=font_size)
    captions = [_wrap(prompt, font, side) for prompt in prompts]
    line_height = math.ceil(font_size * 1.3)
    caption_height = line_height * max(caption.count("\n") + 1 for caption in captions)
    columns = columns or _columns(len(images))
    rows = math.ceil(len(images) / columns)
    step_x, step_y = side + gap, images[0].height + gap // 3 + caption_height + gap
    grid = Image.new("RGB", (gap + columns * step_x, gap + rows * step_y), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    tiles = []
    for index, (image, prompt, caption) in enumerate(zip(images, prompts, captions, strict=True)):
        x, y = gap + index % columns * step_x, gap + index // columns * step_y
        grid.paste(image, (x, y))
        draw.text((x, y + image.height + gap // 3), caption, INK, font, spacing=line_height - font_size)
        tiles.append({"prompt": prompt, "box": [x, y, x + image.width, y + image.height]})
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(METADATA_KEY, json.dumps(tiles))
    buffer = io.BytesIO()
    grid.save(buffer, "PNG", pnginfo=metadata, optimize=True)
    write_atomically(path, buffer.getvalue())


def to_pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """Images, float in [0, 1] on any device, as pictures of as many pixels; values outside are clamped."""
    from dgpo_fast.rewards.preprocessing import to_bytes

    return [Image.fromarray(pixels_HWC.numpy()) for pixels_HWC in to_bytes(images_BCHW)]


def read_grid(path: Path) -> list[Tile]:
    """The prompts and images that `save_grid` wrote, in their order; small images come back enlarged.

    Raises:
        UserError: `path` is no PNG, or none of `save_grid`.
    """
    try:
        with Image.open(path) as grid:
            tiles = json.loads(grid.info[METADATA_KEY])
            return [Tile(tile["prompt"], grid.crop(tile["box"])) for tile in tiles]
    except (KeyError, OSError, UnidentifiedImageError):
        raise UserError(f"{path}: not a sample grid of dgpo-fast") from None


def _enlarge(image: Image.Image, enlargement: int) -> Image.Image:
    size = (image.width * enlargement, image.height * enlargement)
    return image.resize(size, Image.Resampling.LANCZOS)


def _columns(num_images: int) -> int:
    """Columns of a grid that is wider than high, and whose last row has the fewest gaps."""
    square = math.ceil(math.sqrt(num_images))
    widest = min(num_images, 2 * square)
    return min(range(square, widest + 1), key=lambda columns: (-num_images % columns, columns))


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """`text` in lines no longer than `width` pixels, `MAX_CAPTION_LINES` at most."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width or not lines[-1]:
            lines[-1] = candidate
        else:
            lines.append(word)
    shown = [_shorten(line, font, width) for line in lines[:MAX_CAPTION_LINES]]
    if len(lines) > MAX_CAPTION_LINES:
        shown[-1] = _shorten(f"{shown[-1]} …", font, width)
    return "\n".join(shown)


def _shorten(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """`line`, its end replaced by an ellipsis where it would be wider than `width` pixels."""
    if font.getlength(line) <= width:
        return line
    kept = line
    while kept and font.getlength(f"{kept}…") > width:
        kept = kept[:-1]
    return f"{kept.rstrip(' …')}…"
