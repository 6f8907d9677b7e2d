"""Flow-GRPO's step: drawn in a rollout, weighed in training, and its backward.

    python -m benchmarks.bench_sde_step [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n elements: x and the velocity read, x_next drawn and written, or read, the mean written where training wants
it, and for the gradient x, the velocity, x_next and the mean's gradient read and the velocity's written:

    n (2 sizeof(x) + sizeof(v))    rollout, drawn      n (3 sizeof(x) + sizeof(v))      rollout, given; training
                                                       n (3 sizeof(x) + 2 sizeof(v))    backward

Drawing costs arithmetic besides: ten rounds of Philox and a Box-Muller transform. Eager PyTorch draws in float64
(dgpo_fast/rng.py); given a noise, as in "rollout, given", it does what Flow-GRPO's own code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from benchmarks.operator_table import Case, Shape, dimensions, main
from dgpo_fast import rng
from dgpo_fast.ops.sde_step import reference, reference_backward, sde_coefficients

SHAPES = {
    "cpu": ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64)),
    "cuda": ((16, 16, 64, 64), (128, 16, 64, 64)),
    "odd": ((3, 1, 5, 7), (2, 16, 4, 8)),
}


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        x, noise, x_next, grad = torch.randn(4, *shape, device=device)
        velocity, group_B = torch.randn(shape, device=device).to(dtype), torch.arange(shape[0], device=device)
        row = sde_coefficients(torch.tensor([0.9]), torch.tensor([0.8]), noise_level=0.7, sigma_max_next=0.9)
        step = (x, velocity, row.repeat(shape[0], 1).to(device))
        names = [rng.stream(0, stage="benchmark", sample=sample) for sample in range(shape[0])]
        streams = torch.tensor(names, device=device)
        for label, num_bytes, arguments in (
            ("rollout, drawn", 2 * x.nbytes + velocity.nbytes, (None, streams, group_B, None, False)),
            ("rollout, given", 3 * x.nbytes + velocity.nbytes, (noise, None, group_B, None, False)),
            ("training", 3 * x.nbytes + velocity.nbytes, (None, None, None, x_next, True)),
        ):
            yield Case(
                operator="sde_step",
                label=f"{dimensions(shape)} {label}",
                dtype=dtype,
                arguments=(*step, *arguments),
                num_bytes=num_bytes,
                reference=reference,
            )
        yield Case(
            operator="sde_step_backward",
            label=dimensions(shape),
            dtype=dtype,
            arguments=(grad, grad.flatten(1)[:, 0].contiguous(), *step, x_next),
            num_bytes=3 * x.nbytes + 2 * velocity.nbytes,
            reference=reference_backward,
        )


if __name__ == "__main__":
    main("sde_step", __doc__, cases, SHAPES)
