"""Whole parameters from the pieces that ranks hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgpo_fast.parallel.weights import Held, Piece
from dgpo_fast.parallel.world import World

BUCKET = 2**28
"""Elements that each rank receives at once: what bounds the memory of it, on however many ranks."""


class _Run(NamedTuple):
    """A piece of some rank, and where it lies in all that this rank holds."""

    name: str
    start: int
    first: int
    stop: int


class Assembly:
    """Writes whole parameters, on every rank, from pieces that lie as those of `held` do; ranks make it together."""

    def __init__(self, held: Held, world: World) -> None:
        self._world, self._is_sharded = world, held.is_sharded and world.size > 1
        runs, first = [], 0
        for name, start, values in held.pieces:
            runs.append(_Run(name, start, first, first := first + len(values)))
        self._runs_of_ranks = world.gather_objects(runs) if self._is_sharded else [runs]

    @torch.no_grad()
    def write(self, pieces: Sequence[Piece], parameters: Mapping[str, Tensor]) -> None:
        """Fills `parameters`, in their dtype and on their device. All ranks call it; sharded pieces are exchanged."""
        if not self._is_sharded:
            for name, start, values in pieces:
                parameters[name].view(-1)[start : start + len(values)].copy_(values)
            return
        like = next(iter(parameters.values()))
        longest = max(runs[-1].stop if runs else 0 for runs in self._runs_of_ranks)
        mine = torch.cat([values.to(like) for _, _, values in pieces]) if pieces else like.new_empty(0)
        at_once = BUCKET // self._world.size
        for first in range(0, longest, at_once):
            length = min(at_once, longest - first)
            sent = like.new_zeros(length)
            part = mine[first : first + length]
            sent[: len(part)] = part
            received = self._world.gather(sent).view(-1, length)
            for runs, values in zip(self._runs_of_ranks, received, strict=True):
                for run, low, high in _overlaps(runs, first, first + length):
                    target = parameters[run.name].view(-1)[run.start + low - run.first :]
                    target[: high - low].copy_(values[low - first : high - first])


def _overlaps(runs: Sequence[_Run], first: int, stop: int) -> Iterator[tuple[_Run, int, int]]:
    """The runs that reach into [first, stop), and the bounds of what lies there."""
    for run in runs:
        low, high = max(run.first, first), min(run.stop, stop)
        if low < high:
            yield run, low, high
