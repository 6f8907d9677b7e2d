"""Weights in one flat tensor, and the pieces of weights that ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

Shapes = Mapping[str, torch.Size]
"""Of parameters by name, in their order."""


class Piece(NamedTuple):
    """A run of a parameter's elements, or of what an optimizer or an average keeps beside them."""

    name: str
    """The parameter's."""
    start: int
    """Of the run, in the flattened parameter."""
    values: Tensor
    """Float32, one-dimensional; a view of the memory that is trained, or averaged, itself."""


class Held(NamedTuple):
    """What a rank holds of a kind of tensors that has one for each parameter."""

    pieces: Sequence[Piece]
    is_sharded: bool
    """Whether ranks hold different pieces; else each holds all."""


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that tells weights from others: a sum of their bits, the same on every device."""
    sums = [
        tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors
    ]
    return int(torch.stack(sums).sum().item())


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def cut(run: Tensor, start: int, shapes: Shapes) -> list[Piece]:
    """The pieces of a one-dimensional `run`, which lies at `start` in all parameters end to end.

    What of it lies behind their end is padding, and in no piece.
    """
    pieces, stop = [], start + len(run)
    ends = [*accumulate((shape.numel() for shape in shapes.values()), initial=0)]
    for name, first, end in zip(shapes, ends, ends[1:], strict=False):
        low, high = max(first, start), min(end, stop)
        if low < high:
            pieces.append(Piece(name, low - first, run[low - start : high - start]))
    return pieces


class FlatWeights:
    """Float32 masters end to end, and the copy in the modules' dtype, of which their parameters become slices.

    In a float32 model the two are one tensor. An average of it is one lerp, and ranks add up one gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.shapes: dict[str, torch.Size] = {name: parameter.shape for name, parameter in parameters.items()}
        self.compute = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        self.master = self.compute if self.compute.dtype == torch.float32 else self.compute.float()
        for parameter, piece in zip(parameters.values(), self.slices(self.compute).values(), strict=True):
            parameter.data = piece

    def slices(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` cut into the parameters' shapes, by name; views, not copies."""
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def refresh(self) -> None:
        """Rounds the masters into the compute copy: once per update."""
        if self.compute is not self.master:
            self.compute.copy_(self.master)


class TrainedWeights(FlatWeights):
    """Flat weights with gradients: the layers' go to the compute copy's, and from there to the masters', in float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.trainable = nn.Parameter(self.master)
        """The masters: what the optimizer steps. Its gradient is `collect_gradient`'s."""
        self.gradient = torch.zeros_like(self.master)
        self.trainable.grad = self.gradient
        is_one = self.compute is self.master
        self.compute_gradient = self.gradient if is_one else torch.zeros_like(self.compute)
        for parameter, piece in zip(parameters.values(), self.slices(self.compute_gradient).values(), strict=True):
            parameter.grad = piece
        self.leaf = self.trainable if is_one else nn.Parameter(self.compute)
        """The compute copy as one leaf, for what differentiates with respect to all of it at once."""
        self.leaf.grad = self.compute_gradient

    def collect_gradient(self) -> None:
        """Adds what the last backward pass left in the compute copy to the float32 gradient of `trainable`."""
        if self.compute_gradient is not self.gradient:
            self.gradient += self.compute_gradient
            self.compute_gradient.zero_()
