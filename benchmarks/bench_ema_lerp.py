"""Moving averages on the CPU: the C++ kernel against one torch.lerp for each tensor, and torch._foreach_lerp_.

    python -m benchmarks.bench_ema_lerp [--out DIR]

The lists are those of adapters: two matrices for each adapted layer. Bytes for n elements, averages read and written,
values read:

    n (2 sizeof(average) + sizeof(value))

and the roof is the bandwidth of a copy that moves as many. With small tensors the calls cost more than the bytes.
torch.compile is left out: it unrolls the list, and takes minutes for hundreds of tensors.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import copy_gbps, interleaved, report
from dgpo_fast import ops

# Number of tensors, rank, width: the embedded model's adapters, as many small ones as SD3.5-M has, and SD3.5-M's own.
LISTS = ((62, 32, 128), (382, 32, 128), (382, 64, 1536))
DECAY = 0.9


def tensors(count: int, rank: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*((rank, width) if i % 2 else (width, rank))).to(dtype) for i in range(count)]


def loop(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value.to(average.dtype), 1 - decay)


def foreach(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    torch._foreach_lerp_(averages, [value.to(averages[0].dtype) for value in values], 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write ema_lerp.csv there")
    out = parser.parse_args().out
    torch.manual_seed(0)
    rows = []
    for (count, rank, width), value_dtype in product(LISTS, (torch.float32, torch.bfloat16)):
        averages = tensors(count, rank, width, torch.float32)
        values = tensors(count, rank, width, value_dtype)
        variants = {**ops.implementations("ema_lerp_"), "loop": loop, "torch._foreach_lerp_": foreach}
        variants.pop("triton", None)  # it would be its interpreter
        expected = [average.lerp(value.float(), 1 - DECAY) for average, value in zip(averages, values, strict=True)]
        for name, call in variants.items():  # no time for a wrong result
            result = [average.clone() for average in averages]
            call(result, values, DECAY)
            assert all(map(torch.equal, result, expected)), name
        num_bytes = sum(8 * average.numel() + value.nbytes for average, value in zip(averages, values, strict=True))
        roof_gbps = copy_gbps(num_bytes)
        durations = interleaved(
            {
                name: lambda call=call, averages=averages, values=values: call(averages, values, DECAY)
                for name, call in variants.items()
            }
        )
        for name, duration in durations.items():
            gbps = num_bytes / duration.median_us * 1e-3
            rows.append(
                {
                    "implementation": name,
                    "tensors": count,
                    "shape": f"{rank}x{width}",
                    "values": str(value_dtype).removeprefix("torch."),
                    "bytes": num_bytes,
                    "median_us": f"{duration.median_us:.1f}",
                    "low_us": f"{duration.low_us:.1f}",
                    "high_us": f"{duration.high_us:.1f}",
                    "gbps": f"{gbps:.1f}",
                    "share_of_copy": f"{gbps / roof_gbps:.2f}",
                    "threads": torch.get_num_threads(),
                }
            )
    report(rows, name="ema_lerp", out=out)


if __name__ == "__main__":
    main()
