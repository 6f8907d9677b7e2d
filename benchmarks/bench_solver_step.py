"""The solver step, with guidance, into new memory and in place.

    python -m benchmarks.bench_solver_step [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes of one step, reading the K states and both velocities once and writing the states once, for n elements a state:

    n (2 K sizeof(state) + 2 sizeof(velocity))

Small shapes live in a cache of the CPU, and a call costs some 6 us there. A library's scheduler is no baseline: none
does guidance and the update of all states in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch

from benchmarks.operator_table import Case, Shape, dimensions, main
from dgpo_fast.ops.solver_step import reference, reference_

SHAPES = {
    "cpu": ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64)),
    "cuda": ((16, 16, 64, 64), (128, 16, 64, 64), (128, 16, 128, 128)),
    "odd": ((3, 1, 5, 7), (2, 16, 4, 8)),
}
NUM_STATES = (2, 4)  # DPM-Solver++ 2M and UniPC
NUM_EVALUATIONS = 10


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for shape, num_states, dtype in product(shapes, NUM_STATES, (torch.float32, torch.bfloat16)):
        state_KBN = torch.randn(num_states, *shape, device=device)
        velocities = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        # Rows that sum to less than 1, so that a state updated in place thousands of times stays a number.
        table = torch.rand(NUM_EVALUATIONS, num_states, num_states + 2, dtype=torch.float64, device=device)
        row_B = torch.full(shape[:1], 3, device=device)
        arguments = (state_KBN, *velocities, table / (num_states + 2), row_B)
        for operator, in_eager_torch in (("solver_step", reference), ("solver_step_", reference_)):
            yield Case(
                operator=operator,
                label=f"{dimensions(shape)} K={num_states}",
                dtype=dtype,
                arguments=arguments,
                num_bytes=prod(shape) * (2 * num_states * state_KBN.itemsize + 2 * dtype.itemsize),
                reference=in_eager_torch,
            )


if __name__ == "__main__":
    main("solver_step", __doc__, cases, SHAPES)
