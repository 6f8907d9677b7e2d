"""GELU of a biased input: the kernels against eager PyTorch and torch.compile.

    python -m benchmarks.bench_bias_gelu [--device cuda] [--out DIR]

Bytes for n elements, read and written once each; the bias and the sums for it are small beside them:

    2 n sizeof(x)    forward,        3 n sizeof(x)    backward

and the roof is the bandwidth of a copy that moves as many. Eager PyTorch adds the bias in a pass of its own and keeps
x + bias for its backward pass; there it sums what it has rounded, in another pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gate import assert_as_exact
from benchmarks.timing import copy_gbps, interleaved, report
from dgpo_fast import ops
from dgpo_fast.ops.bias_gelu import reference, reference_backward

# Tokens and width of the MLP: in cache, and one image of 512 x 512 in SD3.5-M.
SHAPES = ((256, 512), (1024, 6144))

Variants = Mapping[str, Callable[[], object]]


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias, approximate="tanh")


def plain_backward(grad: Tensor, u: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """What autograd runs; u = x + bias is kept from the forward pass."""
    grad_x = torch.ops.aten.gelu_backward(grad, u, approximate="tanh")
    return grad_x, grad_x.sum(0) if with_bias else grad_x.new_empty(0)


def forward_variants(x: Tensor, bias: Tensor) -> Variants:
    calls = {name: partial(call, x, bias) for name, call in kernels("bias_gelu", x).items()}
    exact = reference(x.double(), bias.double())
    for name, call in calls.items():
        assert_as_exact(name, [call()], exact=[exact], plain=[plain(x, bias)])
    return {**calls, "eager": partial(plain, x, bias), "torch.compile": partial(torch.compile(plain), x, bias)}


def backward_variants(x: Tensor, bias: Tensor, *, with_bias: bool) -> Variants:
    grad, u = torch.randn_like(x), x + bias
    calls = {name: partial(call, grad, x, bias, with_bias) for name, call in kernels("bias_gelu_backward", x).items()}
    eager = partial(plain_backward, grad, u, with_bias)
    exact = reference_backward(grad.double(), x.double(), bias.double(), True)
    asked = slice(1 + with_bias)
    for name, call in calls.items():
        assert_as_exact(name, call()[asked], exact=exact[asked], plain=eager()[asked])
    return {**calls, "eager": eager, "torch.compile": partial(torch.compile(plain_backward), grad, u, with_bias)}


def kernels(operator: str, x: Tensor) -> dict[str, Callable[..., Any]]:
    """What the operator has here; on the CPU, Triton would be its interpreter."""
    calls = ops.implementations(operator, x.device.type)  # type: ignore[arg-type]
    return {name: call for name, call in calls.items() if name != "triton" or x.is_cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write bias_gelu.csv there")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for shape, dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        torch.compiler.reset()  # each case gets a graph of its own, with its sizes known
        x, bias = (torch.randn(size, device=options.device).to(dtype) for size in (shape, shape[1:]))
        passes = {
            "forward": (2, forward_variants(x, bias)),
            "backward": (3, backward_variants(x, bias, with_bias=False)),
            "backward with bias": (3, backward_variants(x, bias, with_bias=True)),
        }
        for direction, (num_operands, variants) in passes.items():
            num_bytes = num_operands * x.nbytes
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
    report(rows, name="bias_gelu", out=options.out)


if __name__ == "__main__":
    main()
