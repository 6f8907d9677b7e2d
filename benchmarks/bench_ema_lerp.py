"""Moving averages of an adapter's tensors, all in one call.

    python -m benchmarks.bench_ema_lerp [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n elements in all, float32 averages read and written, values of v bytes read:

    n (8 + v)

An update in place can beat the copy, which moves as many bytes but works in n (8 + v) of memory and not in n (4 + v).
With small tensors the calls cost more than the bytes. "eager" is one torch.lerp for each tensor. torch.compile is left
out: it unrolls the lists, and takes most of a minute for 62 tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.operator_table import Case, Shape, main
from dgpo_fast.ops.ema_lerp import reference_

# Tensors, rank and width of adapters: the embedded model's, as many of its size as SD3.5-M has, SD3.5-M's, SD3.5-L's.
SHAPES = {
    "cpu": ((62, 32, 128), (382, 32, 128), (382, 64, 1536)),
    "cuda": ((62, 32, 128), (382, 32, 128), (382, 64, 1536), (606, 64, 2432)),
    "odd": ((5, 3, 37), (2, 1, 8)),
}
DECAY = 0.9


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for (num_tensors, rank, width), dtype in product(shapes, (torch.float32, torch.bfloat16)):
        matrices = [(width, rank) if i % 2 else (rank, width) for i in range(num_tensors)]
        averages = [torch.randn(shape, device=device) for shape in matrices]
        values = [torch.randn(shape, device=device).to(dtype) for shape in matrices]
        yield Case(
            operator="ema_lerp_",
            label=f"{num_tensors} of {rank}x{width}, {str(dtype).removeprefix('torch.')} values",
            dtype=torch.float32,
            arguments=(averages, values, DECAY),
            num_bytes=num_tensors * rank * width * (8 + dtype.itemsize),
            reference=reference_,
            baselines={"torch._foreach": foreach},
            compiled=False,
        )


def foreach(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    torch._foreach_lerp_(averages, [value.to(averages[0].dtype) for value in values], 1 - decay)


if __name__ == "__main__":
    main("ema_lerp", __doc__, cases, SHAPES)
