"""The solver step on the CPU: the C++ kernel against eager PyTorch and torch.compile.

    python -m benchmarks.bench_solver_step [--out DIR]

Bytes of one step, reading the states and both velocities once and writing the states once, for n elements a state:

    n (2 K sizeof(state) + 2 sizeof(velocity))

and the roof is the bandwidth of a copy that moves as many. Small shapes live in the cache, and a call costs some 6 us.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import copy_gbps, interleaved, report
from dgpo_fast import ops
from dgpo_fast.ops.solver_step import reference

SHAPES = ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64))
NUM_STATES = (2, 4)  # DPM-Solver++ 2M and UniPC
NUM_EVALUATIONS = 10


def arguments(num_states: int, shape: tuple[int, ...], velocity_dtype: torch.dtype) -> tuple[Tensor, ...]:
    table = torch.randn(NUM_EVALUATIONS, num_states, num_states + 2, dtype=torch.float64)
    velocities = (torch.randn(shape).to(velocity_dtype) for _ in range(2))
    return torch.randn(num_states, *shape), *velocities, table, torch.full(shape[:1], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write solver_step.csv there")
    out = parser.parse_args().out
    torch.manual_seed(0)
    rows = []
    for shape, num_states, velocity_dtype in product(SHAPES, NUM_STATES, (torch.float32, torch.bfloat16)):
        given = arguments(num_states, shape, velocity_dtype)
        torch.compiler.reset()  # each case gets a graph of its own, with its sizes known
        variants = {**ops.implementations("solver_step"), "torch.compile": torch.compile(reference, fullgraph=True)}
        variants.pop("triton", None)  # it would be its interpreter
        for name, call in variants.items():  # no time for a wrong result
            torch.testing.assert_close(call(*given), reference(*given), msg=lambda text, name=name: f"{name}: {text}")
        num_bytes = given[1].numel() * (2 * num_states * 4 + 2 * velocity_dtype.itemsize)
        roof_gbps = copy_gbps(num_bytes)
        durations = interleaved({name: lambda call=call, given=given: call(*given) for name, call in variants.items()})
        for name, duration in durations.items():
            gbps = num_bytes / duration.median_us * 1e-3
            rows.append(
                {
                    "implementation": name,
                    "K": num_states,
                    "shape": "x".join(map(str, shape)),
                    "velocity": str(velocity_dtype).removeprefix("torch."),
                    "bytes": num_bytes,
                    "median_us": f"{duration.median_us:.1f}",
                    "low_us": f"{duration.low_us:.1f}",
                    "high_us": f"{duration.high_us:.1f}",
                    "gbps": f"{gbps:.1f}",
                    "share_of_copy": f"{gbps / roof_gbps:.2f}",
                    "threads": torch.get_num_threads(),
                }
            )
    report(rows, name="solver_step", out=out)


if __name__ == "__main__":
    main()
