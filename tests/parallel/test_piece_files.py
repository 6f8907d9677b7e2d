"""Files of whole parameters that several ranks write at once, each its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from dgpo_fast.parallel.piece_files import create_file, write_pieces
from dgpo_fast.parallel.weights import Piece

SHAPES = {f"layer {number}": torch.Size([2, 3]) for number in range(4)}


def piece(name: str) -> Piece:
    return Piece(name, 0, torch.full((6,), 1.0 + list(SHAPES).index(name)))


def test_what_others_write_meanwhile_stays(tmp_path: Path) -> None:
    """One rank opens the file and writes its first piece; another writes its own, all of them, before it goes on."""
    path = tmp_path / "policy.safetensors"
    create_file(path, SHAPES)

    def even() -> Iterator[Piece]:
        yield piece("layer 0")
        write_pieces(path, [piece("layer 1"), piece("layer 3")], SHAPES)
        yield piece("layer 2")

    write_pieces(path, even(), SHAPES)
    found = load_file(path)
    assert {name: tensor.unique().tolist() for name, tensor in found.items()} == {
        name: [1.0 + number] for number, name in enumerate(SHAPES)
    }


def test_a_piece_may_be_empty_or_a_part(tmp_path: Path) -> None:
    path, shapes = tmp_path / "ema.safetensors", {"layer": torch.Size([2, 3])}
    create_file(path, shapes)
    write_pieces(path, [Piece("layer", 6, torch.empty(0)), Piece("layer", 4, torch.ones(2))], shapes)
    assert load_file(path)["layer"].tolist() == [[0, 0, 0], [0, 1, 1]]
