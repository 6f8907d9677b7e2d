"""The denoising errors of the loss: forward, backward, and both as a training step runs them.

    python -m benchmarks.bench_velocity_errors [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

Bytes for n elements of float32 samples in M samples of G groups, and velocities of v bytes each. Forward reads four
velocities and the samples; backward reads three, the samples, and writes the gradient; a noise that is given is read by
both; what has M elements is left out:

    n (4 v + 4) + noise    forward,        n (4 v + 4) + noise    backward,        noise = 4 n G / M given, 0 drawn

The loss is the sum of the two. "through autograd" is what `dgpo_fast.ops.velocity_errors` costs its caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.operator_table import Call, Case, Shape, dimensions, main
from dgpo_fast import ops, rng
from dgpo_fast.ops.velocity_errors import _velocity_errors as as_trained
from dgpo_fast.ops.velocity_errors import reference_backward, reference_errors

SHAPES = {
    "cpu": ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64)),
    "cuda": ((16, 16, 64, 64), (128, 16, 64, 64), (16, 16, 128, 128)),
    "odd": ((3, 1, 5, 7), (2, 16, 4, 8)),
}
GROUP_SIZE = 16


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for shape, dtype, source in product(shapes, (torch.float32, torch.bfloat16), ("given", "drawn")):
        num_groups = 1 + (shape[0] - 1) // GROUP_SIZE
        x0 = torch.randn(shape, device=device)
        velocity, old, reference, unconditional = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
        noise = torch.randn(num_groups, *shape[1:], device=device) if source == "given" else None
        streams = [rng.stream(0, stage="benchmark", group=group) for group in range(num_groups)]
        words = torch.tensor(streams, device=device) if source == "drawn" else None
        target = (x0, noise, words, torch.arange(shape[0], device=device) // GROUP_SIZE)
        gradients = tuple(torch.randn(2, shape[0], device=device))
        num_bytes = 4 * velocity.nbytes + x0.nbytes + (0 if noise is None else noise.nbytes)
        label = f"{dimensions(shape)} {source}"
        forward = (velocity, *target, old, reference, unconditional, 4.5)
        yield Case(
            operator="velocity_errors",
            label=label,
            dtype=dtype,
            arguments=forward,
            num_bytes=num_bytes,
            reference=reference_errors,
        )
        yield Case(
            operator="velocity_errors_backward",
            label=label,
            dtype=dtype,
            arguments=(*gradients, velocity, *target, reference, unconditional, 4.5),
            num_bytes=num_bytes,
            reference=reference_backward,
        )
        yield Case(
            operator="velocity_errors + backward",
            label=label,
            dtype=dtype,
            arguments=(*gradients, *forward),
            num_bytes=2 * num_bytes,
            reference=through_autograd(reference_errors),
            implementations={
                **kernels_in_turn(device.type),
                "through autograd": through_autograd(as_trained),
            },
            baselines={"torch.compile": through_autograd(torch.compile(reference_errors, dynamic=False))},
        )


def through_autograd(errors_of: Call) -> Call:
    """Errors, and the gradient of the policy's velocity, as autograd finds it."""

    def loss(of_policy_M: Tensor, of_distance_M: Tensor, velocity: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        leaf = velocity.detach().requires_grad_()
        policy_M, old_M, reference_M, distance_M = errors_of(leaf, *rest)
        (gradient,) = torch.autograd.grad((policy_M, distance_M), leaf, (of_policy_M, of_distance_M))
        return policy_M.detach(), old_M, reference_M, distance_M.detach(), gradient

    return loss


def kernels_in_turn(device: str) -> dict[str, Call]:
    """Each implementation's two kernels, one after the other."""
    forwards, backwards = (
        ops.implementations(name, device)  # type: ignore[arg-type]
        for name in ("velocity_errors", "velocity_errors_backward")
    )

    def both(forward: Call, backward: Call) -> Call:
        def loss(of_policy_M: Tensor, of_distance_M: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
            without_old = arguments[:5] + arguments[6:]
            return *forward(*arguments), backward(of_policy_M, of_distance_M, *without_old)

        return loss

    return {name: both(forwards[name], backwards[name]) for name in forwards if name != "reference"}


if __name__ == "__main__":
    main("velocity_errors", __doc__, cases, SHAPES)
