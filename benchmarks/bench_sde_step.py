"""Flow-GRPO's step on the CPU: the C++ kernel against eager PyTorch and torch.compile, in rollout and in training.

    python -m benchmarks.bench_sde_step [--out DIR]

Bytes for n elements: x and the velocity read, x_next drawn and written, or read, the mean written where training wants
it, and for the gradient x, the velocity, x_next and the mean's gradient read and the velocity's written:

    n (2 sizeof(x) + sizeof(v))    rollout, drawn
    n (3 sizeof(x) + sizeof(v))    rollout, noise given, and training
    n (3 sizeof(x) + 2 sizeof(v))  backward

and the roof is the bandwidth of a copy that moves as many. Drawing costs arithmetic besides, and eager PyTorch draws in
float64 (dgpo_fast/rng.py); it reads a given noise, as the rollout of Flow-GRPO does, in "rollout, noise given".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import copy_gbps, interleaved, report
from dgpo_fast import ops, rng
from dgpo_fast.ops.sde_step import reference, reference_backward

SHAPES = ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64))


class Case(NamedTuple):
    """A call of an operator, and the bytes that it moves."""

    operator: str
    eager: Callable[..., Any]
    num_bytes: int
    arguments: tuple[Any, ...]


def cases(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Case]:
    x, noise, x_next, grad = (torch.randn(shape) for _ in range(4))
    velocity, group_B = torch.randn(shape).to(dtype), torch.arange(shape[0])
    row = ops.sde_coefficients(torch.tensor([0.9]), torch.tensor([0.8]), noise_level=0.7, sigma_max_next=0.9)
    step = (x, velocity, row.repeat(shape[0], 1))
    streams = torch.tensor([rng.stream(0, stage="benchmark", sample=sample) for sample in range(shape[0])])
    n, v = x.nbytes, velocity.nbytes
    return {
        "rollout, drawn": Case("sde_step", reference, 2 * n + v, (*step, None, streams, group_B, None, False)),
        "rollout, noise given": Case("sde_step", reference, 3 * n + v, (*step, noise, None, group_B, None, False)),
        "training": Case("sde_step", reference, 3 * n + v, (*step, None, None, None, x_next, True)),
        "backward": Case(
            "sde_step_backward", reference_backward, 3 * n + 2 * v, (grad, grad[:, 0, 0, 0], *step, x_next)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write sde_step.csv there")
    out = parser.parse_args().out
    torch.manual_seed(0)
    rows = []
    for shape, dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        for what, (operator, eager, num_bytes, given) in cases(shape, dtype).items():
            torch.compiler.reset()  # each case gets a graph of its own, with its sizes known
            variants = {**ops.implementations(operator), "torch.compile": torch.compile(eager)}
            variants.pop("triton", None)  # it would be its interpreter
            for name, call in variants.items():  # no time for a wrong result
                torch.testing.assert_close(call(*given), eager(*given), msg=lambda text, name=name: f"{name}: {text}")
            roof_gbps = copy_gbps(num_bytes)
            durations = interleaved({n: lambda call=call, given=given: call(*given) for n, call in variants.items()})
            for name, duration in durations.items():
                gbps = num_bytes / duration.median_us * 1e-3
                rows.append(
                    {
                        "implementation": name,
                        "case": what,
                        "shape": "x".join(map(str, shape)),
                        "velocity": str(dtype).removeprefix("torch."),
                        "bytes": num_bytes,
                        "median_us": f"{duration.median_us:.1f}",
                        "low_us": f"{duration.low_us:.1f}",
                        "high_us": f"{duration.high_us:.1f}",
                        "gbps": f"{gbps:.1f}",
                        "share_of_copy": f"{gbps / roof_gbps:.2f}",
                        "threads": torch.get_num_threads(),
                    }
                )
    report(rows, name="sde_step", out=out)


if __name__ == "__main__":
    main()
