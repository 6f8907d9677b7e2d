"""The forward process on the CPU: the C++ kernel against eager PyTorch and torch.compile, noise given and drawn.

    python -m benchmarks.bench_flow_interpolate [--out DIR]

Bytes for n elements in B samples of G groups: samples read, x_t and v* written, and the noise read where it is given:

    n sizeof(x) (3 + G / B)    given,        3 n sizeof(x)    drawn

and the roof is the bandwidth of a copy that moves as many. Drawing costs arithmetic besides: ten rounds of Philox and a
Box-Muller transform for each element of a group. Eager PyTorch draws it in float64 (dgpo_fast/rng.py) and stores it.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import copy_gbps, interleaved, report
from dgpo_fast import ops, rng
from dgpo_fast.ops.flow_interpolate import reference

SHAPES = ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64))
GROUP_SIZE = 16


def arguments(shape: tuple[int, ...], dtype: torch.dtype, *, drawn: bool) -> tuple[Tensor | bool | None, ...]:
    group_B = torch.arange(shape[0]) // GROUP_SIZE
    num_groups = int(group_B.max()) + 1
    streams = torch.tensor([rng.stream(0, stage="benchmark", group=group) for group in range(num_groups)])
    noise = None if drawn else torch.randn(num_groups, *shape[1:]).to(dtype)
    sigma_B = torch.full(shape[:1], 0.9639)
    return torch.randn(shape).to(dtype), sigma_B, noise, streams if drawn else None, group_B, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write flow_interpolate.csv there")
    out = parser.parse_args().out
    torch.manual_seed(0)
    rows = []
    for shape, dtype, drawn in product(SHAPES, (torch.float32, torch.bfloat16), (False, True)):
        given = arguments(shape, dtype, drawn=drawn)
        torch.compiler.reset()  # each case gets a graph of its own, with its sizes known
        variants = {**ops.implementations("flow_interpolate"), "torch.compile": torch.compile(reference)}
        variants.pop("triton", None)  # it would be its interpreter
        for name, call in variants.items():  # no time for a wrong result
            torch.testing.assert_close(call(*given), reference(*given), msg=lambda text, name=name: f"{name}: {text}")
        num_groups = -(-shape[0] // GROUP_SIZE)
        num_bytes = given[0].nbytes * 3 + (0 if drawn else given[0].nbytes * num_groups // shape[0])
        roof_gbps = copy_gbps(num_bytes)
        durations = interleaved({name: lambda call=call, given=given: call(*given) for name, call in variants.items()})
        for name, duration in durations.items():
            gbps = num_bytes / duration.median_us * 1e-3
            rows.append(
                {
                    "implementation": name,
                    "noise": "drawn" if drawn else "given",
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
    report(rows, name="flow_interpolate", out=out)


if __name__ == "__main__":
    main()
