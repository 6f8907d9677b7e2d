"""The forward process, its noise given or drawn in the kernel, and its gradient.

    python -m benchmarks.bench_flow_interpolate [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n elements in B samples of G groups. Forward: samples read, x_t and v* written, and the noise read where it is
given; backward: both gradients read, that of the samples written:

    n sizeof(x) (3 + G / B)    given,        3 n sizeof(x)    drawn,        3 n sizeof(x)    backward

Drawing costs arithmetic besides: ten rounds of Philox and a Box-Muller transform for each element of a group. Eager
PyTorch draws it in float64 (dgpo_fast/rng.py) and stores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch

from benchmarks.operator_table import Case, Shape, dimensions, main
from dgpo_fast import rng
from dgpo_fast.ops.flow_interpolate import reference, reference_backward

SHAPES = {
    "cpu": ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64)),
    "cuda": ((16, 16, 64, 64), (128, 16, 64, 64), (128, 16, 128, 128)),
    "odd": ((3, 1, 5, 7), (2, 16, 4, 8)),
}
GROUP_SIZE = 16


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        group_B = torch.arange(shape[0], device=device) // GROUP_SIZE
        num_groups = 1 + (shape[0] - 1) // GROUP_SIZE
        x0, grad_x_t, grad_target = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        sigma_B = torch.full(shape[:1], 0.9639, device=device)
        noise = torch.randn(num_groups, *shape[1:], device=device).to(dtype)
        streams = [rng.stream(0, stage="benchmark", group=group) for group in range(num_groups)]
        for source, noise_or_none, streams_or_none in (
            ("given", noise, None),
            ("drawn", None, torch.tensor(streams, device=device)),
        ):
            yield Case(
                operator="flow_interpolate",
                label=f"{dimensions(shape)} {source}",
                dtype=dtype,
                arguments=(x0, sigma_B, noise_or_none, streams_or_none, group_B, True),
                num_bytes=3 * x0.nbytes + (0 if noise_or_none is None else noise.nbytes),
                reference=reference,
            )
        yield Case(
            operator="flow_interpolate_backward",
            label=dimensions(shape),
            dtype=dtype,
            arguments=(grad_x_t, grad_target, sigma_B),
            num_bytes=3 * prod(shape) * dtype.itemsize,
            reference=reference_backward,
        )


if __name__ == "__main__":
    main("flow_interpolate", __doc__, cases, SHAPES)
