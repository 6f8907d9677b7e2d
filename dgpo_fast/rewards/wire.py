"""What a reward behind HTTP is sent and answers. No pickle: nothing that arrives is ever run.

    GET  /health  ->  {"name", "metrics": [...] | null, "limits": {"images", "bytes"}, "versions": {...}}
    POST /score   ->  {"metrics": {name: [number or null, one for each image]}}, null where it is not finite
    else a status of 400 or more, and {"error": "a line"}

A request's body is the length of its header (4 bytes, little-endian), the header (JSON), and the images:

    {"prompts": [{"text": "...", "metadata": {...}}, ...], "images": "safetensors"}
        a safetensors file with one tensor `images`, [B, 3, H, W], float32 in [0, 1] or uint8 in 0..255
    {"prompts": [...], "images": "png", "bytes": [of each file]}
        PNG files of one size, one after the other

`metadata` may be left out. safetensors keeps every bit of float32; PNG rounds to 8 bits, and is for clients of others'.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.records import Prompt
from dgpo_fast.rewards.calling import Metrics

TOKEN = "DGPO_FAST_REWARD_TOKEN"
"""The environment variable with the password of servers and their clients."""
CONTENT_TYPE = "application/vnd.dgpo-fast.images"
"""Of a request. No form and no script of a web page sends it unasked, so none reaches a server without a token."""
PREFIX_BYTES = 4


class Malformed(ValueError):
    """What came is not what this file says; the message says where."""


def pack(images_BCHW: Tensor, prompts: Sequence[str]) -> list[bytes | memoryview]:
    """The body of a request for float32 images on the CPU, in parts: the last is the images' own memory.

    Raises:
        UserError: a prompt's metadata are nothing that JSON can hold.
    """
    named = ", ".join(map(_packed, prompts))
    header = f'{{"prompts": [{named}], "images": "safetensors"}}'.encode()
    data = images_BCHW.float().contiguous().numpy().data.cast("B")
    # By hand, since the library's own writer copies the images twice.
    entry = {"dtype": "F32", "shape": list(images_BCHW.shape), "data_offsets": [0, len(data)]}
    own = json.dumps({"images": entry}).encode()
    own += b" " * (-len(own) % 8)  # as the format has it, that the numbers are aligned
    return [len(header).to_bytes(PREFIX_BYTES, "little") + header + len(own).to_bytes(8, "little") + own, data]


def unpack(body: bytes | bytearray, *, max_images: int, max_bytes: int) -> tuple[Tensor, list[Prompt]]:
    """Images, float32 [B, 3, H, W], and their prompts.

    Args:
        max_bytes: of the images once they are float32: a PNG may be a thousand times smaller.

    Raises:
        Malformed: the body is not what is expected.
        TooMuch: it has too many images, or too large ones.
    """
    start = PREFIX_BYTES + int.from_bytes(body[:PREFIX_BYTES], "little")
    if len(body) < start:
        raise Malformed(f"expected a header of {start - PREFIX_BYTES} bytes, got {max(0, len(body) - PREFIX_BYTES)}")
    header = _json(bytes(body[PREFIX_BYTES:start]))
    prompts = _prompts(header)
    if len(prompts) > max_images:
        raise TooMuch(f"{len(prompts)} images at once; this server takes {max_images}")
    rest = memoryview(body)[start:]
    match header.get("images"):
        case "safetensors":
            images_BCHW = _safetensors(bytes(rest), max_bytes=max_bytes)
        case "png":
            images_BCHW = _pngs(rest, header.get("bytes"), count=len(prompts), max_bytes=max_bytes)
        case other:
            raise Malformed(f"images: expected safetensors or png, got {other!r}"[:200])
    if len(images_BCHW) != len(prompts):
        raise Malformed(f"{len(images_BCHW)} images for {len(prompts)} prompts")
    return images_BCHW, prompts


def are_pixels(images_BCHW: Tensor) -> Tensor:
    """Whether all of an image is in [0, 1], bool [B]."""
    least_B, most_B = images_BCHW.flatten(1).aminmax(dim=1)  # NaN where one is
    return (least_B >= 0) & (most_B <= 1)


class TooMuch(ValueError):
    """More than the server takes at once."""


def pack_metrics(metrics: Sequence[Metrics]) -> bytes:
    """The answer for images with these metrics."""
    columns = {name: [_finite(row[name]) for row in metrics] for name in metrics[0]}
    return json.dumps({"metrics": columns}, allow_nan=False).encode()


def unpack_metrics(body: bytes) -> dict[str, Tensor]:
    """Metrics by name, float32, NaN where they were not finite.

    Raises:
        Malformed: the answer is not what is expected.
    """
    columns = _json(body).get("metrics")
    if not isinstance(columns, dict):
        raise Malformed("expected metrics by name")
    for name, column in columns.items():
        if not isinstance(column, list) or not all(value is None or _is_number(value) for value in column):
            raise Malformed(f"expected numbers or null in the metric {name!r}")
    try:
        return {
            name: torch.tensor([torch.nan if value is None else float(value) for value in column], dtype=torch.float32)
            for name, column in columns.items()
        }
    except OverflowError:
        raise Malformed("expected numbers, got an integer beyond all floats") from None


def unpack_object(body: bytes) -> Mapping[str, Any]:
    """Any answer that is an object.

    Raises:
        Malformed: it is none.
    """
    return _json(body)


def _packed(prompt: str) -> str:
    """A prompt in JSON."""
    try:
        return json.dumps({"text": str(prompt), "metadata": dict(getattr(prompt, "metadata", {}))})
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"rewards: the metadata of the prompt {str(prompt)!r} cannot be sent to a server as JSON: {error}"
        ) from None


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Malformed(f"expected an object, got {type(found).__name__}")
    return found


def _prompts(header: Mapping[str, Any]) -> list[Prompt]:
    given = header.get("prompts")
    if not isinstance(given, list) or not given:
        raise Malformed("prompts: expected a list of one or more")
    prompts = []
    for number, prompt in enumerate(given):
        if not isinstance(prompt, dict) or not isinstance(prompt.get("text"), str):
            raise Malformed(f"prompts: expected an object with a text at place {number}")
        metadata = prompt.get("metadata", {})
        if not isinstance(metadata, dict):
            raise Malformed(f"prompts: expected an object for the metadata at place {number}")
        prompts.append(Prompt(prompt["text"], metadata))
    return prompts


def _safetensors(data: bytes, *, max_bytes: int) -> Tensor:
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise Malformed(f"not safetensors: {error}"[:200]) from None
    images = tensors.get("images")
    if images is None or len(tensors) != 1 or images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise Malformed("expected one tensor, images, of shape [B, 3, H, W]")
    if images.numel() * 4 > max_bytes:
        raise TooMuch(f"images of {images.numel() * 4} bytes in float32; this server takes {max_bytes}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if images.dtype != torch.float32:
        raise Malformed(f"images: expected float32 or uint8, got {images.dtype}")
    if not are_pixels(images).all():
        raise Malformed("images: expected float32 in [0, 1]")
    return images


def _pngs(data: memoryview, lengths: object, *, count: int, max_bytes: int) -> Tensor:
    if not isinstance(lengths, list) or not all(type(length) is int and length > 0 for length in lengths):
        raise Malformed("bytes: expected the length of each PNG file")
    if len(lengths) != count:
        raise Malformed(f"{len(lengths)} images for {count} prompts")
    if sum(lengths) != len(data):
        raise Malformed(f"bytes: {sum(lengths)} of PNG files, got {len(data)}")
    images: list[Tensor] = []
    start = 0
    for length in lengths:
        images.append(_png(bytes(data[start : start + length]), max_bytes=max_bytes // len(lengths)))
        start += length
        if images[-1].shape != images[0].shape:
            raise Malformed("expected PNG files of one size")
    return torch.stack(images)


def _png(data: bytes, *, max_bytes: int) -> Tensor:
    """One image, float32 [3, H, W]."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if width * height * 3 * 4 > max_bytes:  # before anything of it is decoded
                raise TooMuch(f"a PNG file of {width} x {height} pixels is more than this server takes at once")
            pixels = np.asarray(image.convert("RGB"))
    except TooMuch:
        raise
    except Exception as error:  # a damaged file makes Pillow raise whatever it meets
        raise Malformed(f"not PNG: {error}"[:200]) from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
