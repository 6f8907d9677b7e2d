"""GELU of a biased input: forward, backward with a bias that learns or is frozen, and both through autograd.

    python -m benchmarks.bench_bias_gelu [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n = B N D elements of s bytes, and a bias of D. Forward reads x and the bias and writes y; backward reads the
gradient, x and the bias and writes the gradient of x, and that of the bias where it learns:

    s (2 n + D) forward,    s (3 n + 2 D) backward,    s (3 n + D) backward, frozen
    s (5 n + 3 D) both,     s (5 n + 2 D) both, frozen

"eager" is what a user writes, the sum and torch.nn.functional.gelu, each step rounded; of the backward alone it is what
autograd runs, after the sum again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.operator_table import Call, Case, Shape, dimensions, main
from dgpo_fast import ops

# Tokens and width of the MLP, [B, N, D]: in cache; SD3.5's text and image, medium and large.
SHAPES = {
    "cpu": ((1, 256, 512), (1, 1024, 6144), (1, 1024, 9728)),
    "cuda": ((16, 333, 6144), (16, 1024, 6144), (16, 1024, 9728)),
    "odd": ((2, 19, 37), (1, 3, 8)),
}


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        bias = torch.randn(shape[-1:], device=device).to(dtype)
        label = dimensions(shape)
        n, d = x.nbytes, bias.nbytes
        yield Case(
            operator="bias_gelu",
            label=label,
            dtype=dtype,
            arguments=(x, bias),
            num_bytes=2 * n + d,
            reference=plain,
        )
        for bias_learns in (True, False):
            as_learnt = label if bias_learns else f"{label} frozen"
            yield Case(
                operator="bias_gelu_backward",
                label=as_learnt,
                dtype=dtype,
                arguments=(grad, x, bias, bias_learns),
                num_bytes=3 * n + (2 if bias_learns else 1) * d,
                reference=plain_backward,
            )
            yield Case(
                operator="bias_gelu + backward",
                label=as_learnt,
                dtype=dtype,
                arguments=(grad, x, bias, bias_learns),
                num_bytes=5 * n + (3 if bias_learns else 2) * d,
                reference=through_autograd(plain),
                implementations={"through autograd": through_autograd(ops.bias_gelu)},
                baselines={"torch.compile": through_autograd(torch.compile(plain, dynamic=False))},
            )


def plain(x: Tensor, bias_D: Tensor) -> Tensor:
    return gelu(x + bias_D, approximate="tanh")


def plain_backward(grad: Tensor, x: Tensor, bias_D: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    grad_x = torch.ops.aten.gelu_backward(grad, x + bias_D, approximate="tanh")
    return grad_x, grad_x.flatten(0, -2).sum(0) if with_bias else grad_x.new_empty(0)


def through_autograd(biased_gelu: Call) -> Call:
    """y, and the gradients of x and of a bias that learns, as autograd finds them."""

    def step(grad: Tensor, x: Tensor, bias_D: Tensor, bias_learns: bool) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(), bias_D.detach().requires_grad_(bias_learns)]
        result = biased_gelu(*leaves)
        return result.detach(), *torch.autograd.grad(result, leaves[: 1 + bias_learns], grad)

    return step


if __name__ == "__main__":
    main("bias_gelu", __doc__, cases, SHAPES)
