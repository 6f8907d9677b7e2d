"""Normalised queries and keys in the joint layout: forward, backward with weights that learn or are frozen, and both.

    python -m benchmarks.bench_joint_qk_norm [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for projections of n = B (N_image + N_text) H D elements of s bytes, and weights of w elements in all. Forward
reads three projections and the weights and writes q, k and v; backward reads three gradients, two projections and the
weights and writes the gradients of three projections, and those of the weights where they learn:

    s (6 n + w) forward,      s (8 n + 2 w) backward,     s (8 n + w) backward, frozen
    s (14 n + 3 w) both,      s (14 n + 2 w) both, frozen

The projections are slices of one product for each kind of token. "eager" runs the steps of diffusers'
JointAttnProcessor2_0, each rounded; of the backward alone it is the equations in float32. On CUDA, where Liger-Kernel
is installed, its RMSNorm takes its place in those steps: its kernels are Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.operator_table import Call, Case, Shape, library, main
from dgpo_fast.ops.joint_qk_norm import _joint_qk_norm as as_trained
from dgpo_fast.ops.joint_qk_norm import reference_backward

# Samples, tokens of image and of text, heads, size of a head: in cache; the joint attention of SD3.5-M, its second
# attention, which sees the image alone, and the attention of SD3.5-L.
SHAPES = {
    "cpu": ((1, 64, 77, 6, 64), (1, 1024, 333, 24, 64), (1, 1024, 0, 24, 64)),
    "cuda": ((16, 1024, 333, 24, 64), (16, 1024, 0, 24, 64), (16, 1024, 333, 38, 64)),
    "odd": ((2, 19, 5, 3, 37), (1, 3, 0, 2, 8)),
}
EPS = 1e-6
NUM_PROJECTIONS = 6

Norm = Callable[[Tensor, Tensor, float], Tensor]


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        num_samples, num_image, num_text, num_heads, head_size = shape
        image, text = (projections(num_samples, n, num_heads * head_size, dtype, device) for n in (num_image, num_text))
        weights = [(1 + torch.randn(head_size, device=device) / 4).to(dtype) for _ in range(4 if num_text else 2)]
        forward = (*image, *text, *weights, *[None] * (4 - len(weights)), num_heads, EPS)
        q_image, k_image, _, q_text, k_text, _, *rest = forward
        grads = [
            torch.randn(num_samples, num_image + num_text, num_heads, head_size, device=device).to(dtype)
            for _ in range(3)
        ]
        label = f"{num_samples}x({num_image}+{num_text})x{num_heads}x{head_size}"
        n, w = grads[0].nbytes, sum(weight.nbytes for weight in weights)
        rivals = {"Liger-Kernel": liger_steps()} if device.type == "cuda" else {}
        yield Case(
            operator="joint_qk_norm",
            label=label,
            dtype=dtype,
            arguments=forward,
            num_bytes=6 * n + w,
            reference=plain,
            baselines=rivals,
        )
        for weights_learn in (True, False):
            as_learnt = label if weights_learn else f"{label} frozen"
            yield Case(
                operator="joint_qk_norm_backward",
                label=as_learnt,
                dtype=dtype,
                arguments=(*grads, q_image, k_image, q_text, k_text, *rest, weights_learn),
                num_bytes=8 * n + (2 if weights_learn else 1) * w,
                reference=reference_backward,
            )
            both = partial(through_autograd, weights_learn=weights_learn)
            yield Case(
                operator="joint_qk_norm + backward",
                label=as_learnt,
                dtype=dtype,
                arguments=(*grads, *forward),
                num_bytes=14 * n + (3 if weights_learn else 2) * w,
                reference=both(plain),
                implementations={"through autograd": both(as_trained)},
                baselines={
                    "torch.compile": both(torch.compile(plain, dynamic=False)),
                    **{name: None if steps is None else both(steps) for name, steps in rivals.items()},
                },
            )


def projections(
    num_samples: int, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> Sequence[Tensor | None]:
    """Queries, keys and values; None where there are no tokens."""
    if not num_tokens:
        return None, None, None
    return torch.randn(num_samples, num_tokens, 3 * width, device=device).to(dtype).chunk(3, dim=-1)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """diffusers' RMSNorm: statistics in float32, rounded before the weight."""
    statistics = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(statistics.square().mean(-1, keepdim=True) + eps)
    return (x * scale).to(weight_D.dtype) * weight_D


def plain(
    q_i: Tensor, k_i: Tensor, v_i: Tensor, q_t: Tensor | None, k_t: Tensor | None, v_t: Tensor | None,
    w_q_i: Tensor, w_k_i: Tensor, w_q_t: Tensor | None, w_k_t: Tensor | None, num_heads: int, eps: float,
    *, norm: Norm = rms_norm,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """diffusers' steps; like those, it leaves transposed views to attention."""

    def joint(*streams: tuple[Tensor | None, Tensor | None]) -> Tensor:
        heads = [(x.unflatten(-1, (num_heads, -1)).transpose(1, 2), weight) for x, weight in streams if x is not None]
        normed = [x if weight is None else norm(x, weight, eps) for x, weight in heads]
        return (torch.cat(normed, dim=2) if len(normed) > 1 else normed[0]).transpose(1, 2)

    return joint((q_i, w_q_i), (q_t, w_q_t)), joint((k_i, w_k_i), (k_t, w_k_t)), joint((v_i, None), (v_t, None))


def liger_steps() -> Call | None:
    function = library("liger_kernel.transformers.functional", "liger_rms_norm")
    if function is None:
        return None

    def liger_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return function(x.contiguous(), weight_D, eps, in_place=False)  # type: ignore[no-any-return]

    return partial(plain, norm=liger_norm)


def through_autograd(steps: Call, *, weights_learn: bool) -> Call:
    """q, k and v, and the gradients of the projections and of weights that learn, as autograd finds them."""

    def step(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, num_heads, eps = arguments
        given = [
            None if x is None else x.detach().requires_grad_(weights_learn or i < NUM_PROJECTIONS)
            for i, x in enumerate(tensors)
        ]
        results = steps(*given, num_heads, eps)
        leaves = [x for x in given if x is not None and x.requires_grad]
        gradients = torch.autograd.grad(results, leaves, (grad_q, grad_k, grad_v))
        return *(result.detach() for result in results), *gradients

    return step


if __name__ == "__main__":
    main("joint_qk_norm", __doc__, cases, SHAPES)
