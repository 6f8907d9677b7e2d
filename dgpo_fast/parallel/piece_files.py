"""Safetensors files of whole float32 parameters, written and read in pieces, by as many processes as hold them.

Where each parameter lies in the file follows from the names and shapes alone, so ranks write at their own places and
need no exchange; and whoever reads needs no more memory than the pieces it wants.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from dgpo_fast.parallel.weights import Piece, Shapes

_LENGTH_BYTES, _VALUE_BYTES = 8, 4


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    first_byte: int
    """In the file."""


def create_file(path: Path, shapes: Shapes) -> None:
    """A file in its final size, whose values are still to be written."""
    header = _header(shapes)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + _VALUE_BYTES * sum(shape.numel() for shape in shapes.values()))


def write_pieces(path: Path, pieces: Iterable[Piece], shapes: Shapes) -> None:
    """Writes `pieces` where they belong in a file of `create_file`, and nothing between them.

    What lies between is of other ranks, and must not be read either: a buffer, or the pages that another machine has of
    a file on a network's disk, would be written back with what they held then.
    """
    entries = _read_header(BytesIO(_header(shapes)))
    with os.fdopen(os.open(path, os.O_WRONLY), "wb", buffering=0) as file:
        for name, start, values in pieces:
            file.seek(entries[name].first_byte + _VALUE_BYTES * start)
            rest = values.detach().cpu().contiguous().numpy().view(np.uint8).data
            while len(rest):
                rest = rest[file.write(rest) :]  # at most 2 GiB at once


def read_pieces(path: Path, pieces: Sequence[Piece], shapes: Shapes, *, besides: Collection[str] = ()) -> None:
    """Fills the values of `pieces` from a file of parameters of these `shapes`.

    Args:
        besides: what else the file has, which is left alone.

    Raises:
        KeyError: the file's are others; the first that differs.
    """
    with path.open("rb") as file:
        entries = _read_header(file)
        for name in sorted({*shapes, *entries}.difference(besides)):
            if name not in shapes or name not in entries or entries[name].shape != tuple(shapes[name]):
                raise KeyError(name)
        for name, start, values in pieces:
            read = torch.empty(len(values), dtype=torch.float32)
            file.seek(entries[name].first_byte + _VALUE_BYTES * start)
            file.readinto(read.numpy().data)
            values.detach().copy_(read)


def _header(shapes: Shapes) -> bytes:
    """What a file of these parameters begins with."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _VALUE_BYTES * shape.numel()
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # so that values are aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _read_header(file: BinaryIO) -> dict[str, _Entry]:
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    header = json.loads(file.read(length))
    return {
        name: _Entry(tuple(entry["shape"]), _LENGTH_BYTES + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
