"""Advantages: rewards normalised within their groups.

    python -m benchmarks.bench_group_advantages [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for B rewards of 4 bytes: 4 read, 4 written, a byte each read and written for valid and clamped: 10 B. A call is
what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.operator_table import Case, Shape, main
from dgpo_fast.ops.group_advantages import reference

# Groups and their size.
SHAPES = {
    "cpu": ((8, 16), (24, 24), (48, 24)),
    "cuda": ((8, 16), (24, 24), (48, 24)),
    "odd": ((3, 5), (1, 1)),
}


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for num_groups, size in shapes:
        reward_B = torch.randn(num_groups * size, device=device)
        valid_B = torch.rand(num_groups * size, device=device) < 0.95
        for global_std in (False, True):
            yield Case(
                operator="group_advantages",
                label=f"G={num_groups} S={size} {'global' if global_std else 'group'}",
                dtype=torch.float32,
                arguments=(reward_B, valid_B, size, global_std, 1e-4, 5.0),
                num_bytes=10 * num_groups * size,
                reference=reference,
            )


if __name__ == "__main__":
    main("group_advantages", __doc__, cases, SHAPES)
