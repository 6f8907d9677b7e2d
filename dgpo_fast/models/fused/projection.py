"""Frozen linear layers with low-rank adapters beside them (LoRA, arXiv 2106.09685), forward and backward.

Layers that read the same input are one product. Their adapters never touch the frozen weights, where bfloat16 would
lose them, and need no pass of their own over the output: a skinny product accumulates each into it.

Shape letters: T tokens, I inputs, O outputs of all layers, R rank, n adapted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dgpo_fast.models.fp8 import Fp8Weight, fp8_linear, quantise


class LowRank(NamedTuple):
    """The adapters of a projection: views of one flat tensor, in this order."""

    a: Tensor  # [n R, I]: the A of all adapted layers, one product
    b: tuple[Tensor, ...]  # [O_j, R] each


Adapters = Mapping[str, LowRank]
"""The adapters of projections by name; a projection without one is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """y = x W^T + b with W stacked from one or several layers, and y_j += scaling (x A_j^T) B_j^T for the adapted ones.

    With B = 0 that is the frozen layers' output to the bit.
    """

    name: str
    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]; None where the next operator adds it
    adapted: tuple[slice, ...]  # the outputs of each adapted layer
    rank: int
    scaling: float
    fp8: Fp8Weight | None = None
    """A copy of the weight to multiply with where no gradient is asked for."""

    @classmethod
    def over(
        cls, name: str, modules: Sequence[nn.Module], *, rank: int, scaling: float, with_bias: bool = True
    ) -> Projection:
        """The projection over linear layers, peft's or plain, that read the same input.

        Several weights are stacked, and the layers' own become slices of the stack: there is no second copy.
        """
        layers: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        weight, bias = (_stacked([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        ends = accumulate(layer.out_features for layer in layers)
        adapted = tuple(
            slice(end - layer.out_features, end)
            for end, layer, module in zip(ends, layers, modules, strict=True)
            if layer is not module
        )
        return cls(
            name=name, weight=weight, bias=bias if with_bias else None, adapted=adapted, rank=rank, scaling=scaling
        )

    def quantised(self) -> Projection:
        """The same, multiplying with a copy of the weight in fp8; the adapters stay as they are. It has no gradient."""
        return replace(self, fp8=quantise(self.weight))

    def merged(self, adapters: Adapters) -> Projection:
        """The same with a copy of the weight into which its adapters are added."""
        low = adapters.get(self.name)
        if low is None:
            return self
        weight = self.weight.clone()
        for rows, a, b in zip(self.adapted, low.a.split(self.rank), low.b, strict=True):
            weight[rows].addmm_(b, a, alpha=self.scaling)
        return replace(self, weight=weight)

    def to(self, dtype: torch.dtype) -> Projection:
        """The same with weight and bias in `dtype`."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    @property
    def adapter_sizes(self) -> list[int]:
        """How many numbers the A of all adapted layers have, and each of their B: the order in a flat tensor."""
        if not self.adapted:
            return []
        inputs = self.weight.shape[1]
        return [
            len(self.adapted) * self.rank * inputs,
            *(self.rank * (rows.stop - rows.start) for rows in self.adapted),
        ]

    def cut(self, flat: Tensor) -> LowRank:
        """The adapters in `flat`, their numbers end to end."""
        a, *b = flat.split(self.adapter_sizes)
        return LowRank(a.view(-1, self.weight.shape[1]), tuple(piece.view(-1, self.rank) for piece in b))

    def forward(self, x: Tensor, adapters: Adapters) -> tuple[Tensor, Tensor | None]:
        """y [..., O] of x [..., I], and x A^T [T, n R], which the backward pass needs."""
        low = adapters.get(self.name)
        x_TI = x.reshape(-1, x.shape[-1])
        if self.fp8 is not None:
            y_TO = fp8_linear(x, self.fp8, self.bias).view(len(x_TI), -1)
        elif self.bias is None:
            y_TO = x_TI @ self.weight.mT
        else:
            y_TO = torch.addmm(self.bias, x_TI, self.weight.mT)
        inner = None
        if low is not None:
            inner = x_TI @ low.a.mT
            for rows, inner_j, b in zip(self.adapted, inner.split(self.rank, dim=1), low.b, strict=True):
                y_TO[:, rows].addmm_(inner_j, b.mT, alpha=self.scaling)
        return y_TO.view(*x.shape[:-1], -1), inner

    def backward(
        self,
        grad: Tensor,
        x: Callable[[], Tensor],
        inner: Tensor | None,
        adapters: Adapters,
        grad_adapters: Adapters,
        *,
        with_input: bool = True,
    ) -> Tensor | None:
        """The gradient of x where `with_input`, given that of y; that of the adapters is written into `grad_adapters`.

        `x` gives what went in, and is asked only for the sake of the adapters.
        """
        low, grad_low = adapters.get(self.name), grad_adapters.get(self.name)
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_TI = grad_TO @ self.weight if with_input else None
        if low is not None:
            assert inner is not None
            grad_inner = torch.empty_like(inner)
            pieces = zip(self.adapted, grad_inner.split(self.rank, dim=1), low.b, strict=True)
            for rows, piece, b in pieces:
                torch.addmm(piece, grad_TO[:, rows], b, beta=0, alpha=self.scaling, out=piece)
            if grad_low is not None:
                torch.mm(grad_inner.mT, x().reshape(-1, self.weight.shape[1]), out=grad_low.a)
                for rows, inner_j, grad_b in zip(self.adapted, inner.split(self.rank, dim=1), grad_low.b, strict=True):
                    torch.addmm(grad_b, grad_TO[:, rows].mT, inner_j, beta=0, alpha=self.scaling, out=grad_b)
            if grad_TI is not None:
                grad_TI.addmm_(grad_inner, low.a)
        return None if grad_TI is None else grad_TI.view(*grad.shape[:-1], -1)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`tensors` end to end along dimension 0, after which each is a slice of the result."""
    if len(tensors) == 1:
        return tensors[0].detach()
    stack = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, piece in zip(tensors, stack.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = piece
    return stack
