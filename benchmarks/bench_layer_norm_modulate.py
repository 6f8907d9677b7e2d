"""The modulated layer norm: forward, backward with a modulation that learns or is frozen, and both through autograd.

    python -m benchmarks.bench_layer_norm_modulate [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n = B N D elements of s bytes, and modulations of m = B D. Forward reads x, shift and scale and writes y;
backward reads the gradient, x and scale and writes the gradient of x, and those of shift and scale where they are asked
for:

    s (2 n + 2 m) forward,    s (3 n + 3 m) backward,    s (3 n + m) backward, frozen,    s (5 n + 5 m) both

"eager" is what a user writes, torch.nn.functional.layer_norm and the modulation, each step rounded; of the backward
alone it is the equations in float32. The norm without modulation is compared with Liger-Kernel's on CUDA only, where it
is installed: its kernels are Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from benchmarks import operator_table
from dgpo_fast.ops.layer_norm_modulate import reference_backward

SHAPES = operator_table.TOKENS_OF_BLOCKS
EPS = 1e-6


def cases(shapes: Sequence[operator_table.Shape], device: torch.device) -> Iterator[operator_table.Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        num_samples, _, width = shape
        shift, scale, *_ = torch.randn(num_samples, 6 * width, device=device).to(dtype).chunk(6, dim=1)
        forward, label = (x, shift, scale, EPS), operator_table.dimensions(shape)
        n, m = x.nbytes, num_samples * width * dtype.itemsize
        yield operator_table.Case(
            operator="layer_norm_modulate",
            label=label,
            dtype=dtype,
            arguments=forward,
            num_bytes=2 * n + 2 * m,
            reference=plain,
        )
        if device.type == "cuda":
            nothing = torch.zeros(num_samples, width, dtype=dtype, device=device)
            yield operator_table.Case(
                operator="layer_norm_modulate",
                label=f"{label} no modulation",
                dtype=dtype,
                arguments=(x, nothing, nothing, EPS),
                num_bytes=2 * n,
                reference=plain_norm,
                baselines={"Liger-Kernel": liger_norm(width, dtype)},
            )
        for with_modulation in (True, False):
            yield operator_table.Case(
                operator="layer_norm_modulate_backward",
                label=label if with_modulation else f"{label} frozen",
                dtype=dtype,
                arguments=(grad, x, scale, EPS, with_modulation),
                num_bytes=3 * n + (3 if with_modulation else 1) * m,
                reference=reference_backward,
            )
        yield operator_table.Case(
            operator="layer_norm_modulate + backward",
            label=label,
            dtype=dtype,
            arguments=(grad, *forward),
            num_bytes=5 * n + 5 * m,
            reference=through_autograd(plain),
            implementations={"through autograd": through_autograd(torch.ops.dgpo_fast.layer_norm_modulate.default)},
            baselines={"torch.compile": through_autograd(torch.compile(plain, dynamic=False))},
        )


def plain(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    return layer_norm(x_BND, x_BND.shape[2:], eps=eps) * (1 + scale_BD[:, None]) + shift_BD[:, None]


def plain_norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    return layer_norm(x_BND, x_BND.shape[2:], eps=eps)


def liger_norm(width: int, dtype: torch.dtype) -> operator_table.Call | None:
    function = operator_table.library("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
    if function is None:
        return None
    ones = torch.ones(width, dtype=dtype, device="cuda")
    zeros = torch.zeros_like(ones)
    return lambda x_BND, shift_BD, scale_BD, eps: function.apply(x_BND, ones, zeros, eps)


def through_autograd(norm: operator_table.Call) -> operator_table.Call:
    """y, and the gradients of x, shift and scale, as autograd finds them."""

    def step(grad: Tensor, *arguments: Tensor | float) -> tuple[Tensor, ...]:
        *tensors, eps = arguments
        leaves = [tensor.detach().requires_grad_() for tensor in tensors if isinstance(tensor, Tensor)]
        result = norm(*leaves, eps)
        return result.detach(), *torch.autograd.grad(result, leaves, grad)

    return step


if __name__ == "__main__":
    operator_table.main("layer_norm_modulate", __doc__, cases, SHAPES)
