"""Gated residual and modulated layer norm in one: forward, backward, and both through autograd.

    python -m benchmarks.bench_gate_residual_norm_modulate [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n = B N D elements of s bytes, and modulations of m = B D. Forward reads x, y and three modulations and writes
hidden and normed; backward reads two gradients, hidden, gate and scale and writes the gradients of x and y, and, where
the modulation learns, reads y and writes three sums:

    s (4 n + 3 m) forward,    s (6 n + 5 m) backward,    s (5 n + 2 m) backward, frozen,    s (10 n + 8 m) both

"eager" is what a user writes, each step rounded; of the backward alone it is the equations in float32. "two
operators" are `gate_residual` and `layer_norm_modulate` in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from benchmarks import operator_table
from dgpo_fast.ops.gate_residual_norm_modulate import reference_backward

SHAPES = operator_table.TOKENS_OF_BLOCKS
EPS = 1e-6


def cases(shapes: Sequence[operator_table.Shape], device: torch.device) -> Iterator[operator_table.Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        x, y, grad_hidden, grad_normed = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
        num_samples, _, width = shape
        gate, shift, scale, *_ = torch.randn(num_samples, 6 * width, device=device).to(dtype).chunk(6, dim=1)
        forward, label = (x, y, gate, shift, scale, EPS), operator_table.dimensions(shape)
        n, m = x.nbytes, num_samples * width * dtype.itemsize
        yield operator_table.Case(
            operator="gate_residual_norm_modulate",
            label=label,
            dtype=dtype,
            arguments=forward,
            num_bytes=4 * n + 3 * m,
            reference=plain,
            baselines={"two operators": two_operators},
        )
        for modulation_learns in (True, False):
            yield operator_table.Case(
                operator="gate_residual_norm_modulate_backward",
                label=label if modulation_learns else f"{label} frozen",
                dtype=dtype,
                arguments=(grad_hidden, grad_normed, x, y if modulation_learns else None, gate, scale, EPS),
                num_bytes=6 * n + 5 * m if modulation_learns else 5 * n + 2 * m,
                reference=reference_backward,
            )
        fused = torch.ops.dgpo_fast.gate_residual_norm_modulate.default
        yield operator_table.Case(
            operator="gate_residual_norm_modulate + backward",
            label=label,
            dtype=dtype,
            arguments=(grad_hidden, grad_normed, *forward),
            num_bytes=10 * n + 8 * m,
            reference=through_autograd(plain),
            implementations={"through autograd": through_autograd(fused)},
            baselines={
                "torch.compile": through_autograd(torch.compile(plain, dynamic=False)),
                "two operators": through_autograd(two_operators),
            },
        )


def plain(
    x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = x_BND + gate_BD[:, None] * y_BND
    return hidden, layer_norm(hidden, hidden.shape[2:], eps=eps) * (1 + scale_BD[:, None]) + shift_BD[:, None]


def two_operators(
    x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = torch.ops.dgpo_fast.gate_residual.default(x_BND, y_BND, gate_BD)
    return hidden, torch.ops.dgpo_fast.layer_norm_modulate.default(hidden, shift_BD, scale_BD, eps)


def through_autograd(residual_and_norm: operator_table.Call) -> operator_table.Call:
    """Both results, and the gradients of the five tensors, as autograd finds them."""

    def step(grad_hidden: Tensor, grad_normed: Tensor, *arguments: Tensor | float) -> tuple[Tensor, ...]:
        *tensors, eps = arguments
        leaves = [tensor.detach().requires_grad_() for tensor in tensors if isinstance(tensor, Tensor)]
        results = residual_and_norm(*leaves, eps)
        gradients = torch.autograd.grad(results, leaves, (grad_hidden, grad_normed))
        return *(result.detach() for result in results), *gradients

    return step


if __name__ == "__main__":
    operator_table.main("gate_residual_norm_modulate", __doc__, cases, SHAPES)
