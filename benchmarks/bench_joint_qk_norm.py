"""Normalised queries and keys in SD3's joint layout: the kernels against eager PyTorch and torch.compile.

    python -m benchmarks.bench_joint_qk_norm [--device cuda] [--out DIR]

Bytes for B samples of N_image + N_text tokens of width H D: three projections read and written going forward; going
back, three gradients and two projections read, three gradients written. The weights are small beside them:

    6 B (N_image + N_text) H D sizeof(x)    forward,        8 B (N_image + N_text) H D sizeof(x)    backward

and the roof is the bandwidth of a copy that moves as many. The projections are slices of one fused product for each
kind of token. Eager PyTorch runs the steps of diffusers' JointAttnProcessor2_0; on CUDA, Liger-Kernel's RMSNorm takes
its place in them where it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.gate import assert_as_exact
from benchmarks.timing import copy_gbps, interleaved, report
from dgpo_fast import ops

# Samples, tokens of image and text, heads of 64: in cache; one image of 512 x 512 in SD3.5-M.
SHAPES = ((1, 64, 77, 6), (1, 1024, 205, 24))
HEAD_SIZE = 64
EPS = 1e-6

Variants = Mapping[str, Callable[[], object]]
Normalisation = Callable[[Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm: statistics in float32, rounded before the weight."""
    statistics = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(statistics.pow(2).mean(-1, keepdim=True) + EPS)
    return (x * scale).to(weight.dtype) * weight


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x.contiguous(), weight, EPS, in_place=False)  # type: ignore[no-any-return]


def plain(
    q_i: Tensor, k_i: Tensor, v_i: Tensor, q_t: Tensor, k_t: Tensor, v_t: Tensor,
    w_q_i: Tensor, w_k_i: Tensor, w_q_t: Tensor, w_k_t: Tensor, num_heads: int, eps: float,
    *, norm: Normalisation = rms_norm,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """diffusers' steps; like those, it leaves transposed views to attention."""
    q_i, k_i, v_i, q_t, k_t, v_t = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_i, k_i, v_i, q_t, k_t, v_t)
    )
    q = torch.cat([norm(q_i, w_q_i), norm(q_t, w_q_t)], dim=2)
    k = torch.cat([norm(k_i, w_k_i), norm(k_t, w_k_t)], dim=2)
    v = torch.cat([v_i, v_t], dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    num_samples, num_image, num_text, num_heads = shape
    products = (
        torch.randn(num_samples, n, 3 * num_heads * HEAD_SIZE, device=device).to(dtype) for n in (num_image, num_text)
    )
    weights = (1 + torch.randn(4, HEAD_SIZE, device=device) / 4).to(dtype)
    return *(x for fused in products for x in fused.chunk(3, dim=-1)), *weights, num_heads, EPS


def kernels(operator: str, device: str) -> dict[str, Callable[..., Any]]:
    """What the operator has here; on the CPU, Triton would be its interpreter."""
    calls = ops.implementations(operator, device)  # type: ignore[arg-type]
    return {name: call for name, call in calls.items() if name != "triton" or device == "cuda"}


def rivals(device: str) -> dict[str, Callable[..., Any]]:
    liger = {"liger": partial(plain, norm=liger_rms_norm)} if device == "cuda" and find_spec("liger_kernel") else {}
    return {"eager": plain, "torch.compile": torch.compile(plain), **liger}


def forward_variants(given: tuple[Any, ...], device: str) -> Variants:
    exact = plain(*(x.double() if isinstance(x, Tensor) else x for x in given))  # type: ignore[arg-type]
    calls = {name: partial(call, *given) for name, call in kernels("joint_qk_norm", device).items()}
    for name, call in calls.items():
        assert_as_exact(name, call(), exact=exact, plain=plain(*given))
    return {**calls, **{name: partial(call, *given) for name, call in rivals(device).items()}}


def backward_variants(given: tuple[Any, ...], device: str) -> Variants:
    """With the weights frozen, as LoRA has them. PyTorch's passes run on a graph that is kept."""
    upstream = [torch.randn_like(x, memory_format=torch.contiguous_format) for x in plain(*given)]

    def gradients(call: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [x.detach().requires_grad_() for x in given[:6]]
        results = call(*leaves, *given[6:])
        grads = [grad.to(result.dtype) for grad, result in zip(upstream, results, strict=True)]
        return partial(torch.autograd.grad, results, leaves, grads, retain_graph=True)

    q_i, k_i, _, q_t, k_t, _, *rest = given
    operands = (*upstream, q_i, k_i, q_t, k_t, *rest, False)
    calls = {name: partial(call, *operands) for name, call in kernels("joint_qk_norm_backward", device).items()}
    eager = gradients(plain, given)()
    exact = gradients(plain, tuple(x.double() if isinstance(x, Tensor) else x for x in given))()
    for name, call in calls.items():
        assert_as_exact(name, call()[:6], exact=exact, plain=eager)
    return {**calls, **{name: gradients(call, given) for name, call in rivals(device).items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write joint_qk_norm.csv there")
    options = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # or compiled graphs could not be kept
    torch.manual_seed(0)
    rows = []
    for shape, dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        torch.compiler.reset()  # each case gets a graph of its own, with its sizes known
        given = arguments(shape, dtype, options.device)
        projection_bytes = given[0].nbytes + given[3].nbytes
        passes = {
            "forward": (6, forward_variants(given, options.device)),
            "backward": (8, backward_variants(given, options.device)),
        }
        for direction, (num_operands, variants) in passes.items():
            num_bytes = num_operands * projection_bytes
            roof_gbps = copy_gbps(num_bytes, options.device)
            for name, duration in interleaved(variants).items():
                gbps = num_bytes / duration.median_us * 1e-3
                rows.append(
                    {
                        "implementation": name,
                        "pass": direction,
                        "shape": "x".join(map(str, shape)),
                        "dtype": str(dtype).removeprefix("torch."),
                        "bytes": num_bytes,
                        "median_us": f"{duration.median_us:.1f}",
                        "low_us": f"{duration.low_us:.1f}",
                        "high_us": f"{duration.high_us:.1f}",
                        "gbps": f"{gbps:.1f}",
                        "share_of_copy": f"{gbps / roof_gbps:.2f}",
                        "threads": torch.get_num_threads(),
                    }
                )
    report(rows, name="joint_qk_norm", out=options.out)


if __name__ == "__main__":
    main()
