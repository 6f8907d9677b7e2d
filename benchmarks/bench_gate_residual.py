"""The gated residual: forward, backward with a gate that learns or is frozen, and both through autograd.

    python -m benchmarks.bench_gate_residual [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n = B N D elements of s bytes, and a gate of m = B D. Forward reads x, y and the gate and writes hidden;
backward reads the gradient and the gate and writes the gradient of y, and, where the gate learns, reads y and writes
the gradient of the gate; that of x is the incoming one and moves nothing:

    s (3 n + m) forward,    s (3 n + 2 m) backward,    s (2 n + m) backward, frozen,    s (6 n + 3 m) both

"eager" is what a user writes, each step rounded; of the backward alone it is the equations in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks import operator_table
from dgpo_fast.ops.gate_residual import reference_backward

SHAPES = operator_table.TOKENS_OF_BLOCKS


def cases(shapes: Sequence[operator_table.Shape], device: torch.device) -> Iterator[operator_table.Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        x, y, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        num_samples, _, width = shape
        gate, *_ = torch.randn(num_samples, 6 * width, device=device).to(dtype).chunk(6, dim=1)
        label = operator_table.dimensions(shape)
        n, m = x.nbytes, num_samples * width * dtype.itemsize
        yield operator_table.Case(
            operator="gate_residual",
            label=label,
            dtype=dtype,
            arguments=(x, y, gate),
            num_bytes=3 * n + m,
            reference=plain,
        )
        for gate_learns in (True, False):
            yield operator_table.Case(
                operator="gate_residual_backward",
                label=label if gate_learns else f"{label} frozen",
                dtype=dtype,
                arguments=(grad, y if gate_learns else None, gate),
                num_bytes=3 * n + 2 * m if gate_learns else 2 * n + m,
                reference=reference_backward,
            )
        yield operator_table.Case(
            operator="gate_residual + backward",
            label=label,
            dtype=dtype,
            arguments=(grad, x, y, gate),
            num_bytes=6 * n + 3 * m,
            reference=through_autograd(plain),
            implementations={"through autograd": through_autograd(torch.ops.dgpo_fast.gate_residual.default)},
            baselines={"torch.compile": through_autograd(torch.compile(plain, dynamic=False))},
        )


def plain(x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor) -> Tensor:
    return x_BND + gate_BD[:, None] * y_BND


def through_autograd(residual: operator_table.Call) -> operator_table.Call:
    """The sum, and the gradients of x, y and the gate, as autograd finds them."""

    def step(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        result = residual(*leaves)
        return result.detach(), *torch.autograd.grad(result, leaves, grad)

    return step


if __name__ == "__main__":
    operator_table.main("gate_residual", __doc__, cases, SHAPES)
