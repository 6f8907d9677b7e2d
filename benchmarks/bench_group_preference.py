"""The group-preference loss: scores, objective and backward, and with velocity_errors the whole loss of a micro-batch.

    python -m benchmarks.bench_group_preference [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

The group operators work on some numbers a sample, so that a call is what they cost; their bytes are those of M samples
of s bytes (policy, old and reference error, advantage, group; clipping written). The whole loss, forward and backward
of velocity_errors and of group_preference with the KL term, moves 2 n (4 v + 4) bytes for n elements of velocities of v
bytes, as in bench_velocity_errors: "kernels" are the four calls in a row, "through autograd" what a training step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.operator_table import Case, Shape, dimensions, main
from dgpo_fast import ops
from dgpo_fast.ops import group_preference, velocity_errors
from dgpo_fast.ops.group_preference import reference as eager_preference
from dgpo_fast.ops.group_preference import reference_backward as eager_backward
from dgpo_fast.ops.group_preference import reference_scores as eager_scores

SHAPES = {
    "cpu": ((1, 16, 16, 16), (16, 16, 16, 16), (16, 16, 64, 64)),
    "cuda": ((16, 16, 64, 64), (128, 16, 64, 64)),
    "odd": ((3, 1, 5, 7),),
}
GROUP_SIZE = 8
BETA, CLIP, KL_COEF = 100.0, 1e-2, 0.02


def cases(shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        num_samples = shape[0]
        error_M, reference_error_M, old_error_M = (0.3 + 0.01 * torch.randn(num_samples, device=device) for _ in "123")
        group_M = torch.arange(num_samples, device=device) // GROUP_SIZE
        size_G = torch.bincount(group_M).float()
        groups = (torch.randn(num_samples, device=device), group_M, size_G)
        if dtype == torch.float32:
            yield from of_numbers(error_M, reference_error_M, old_error_M, groups)
        x0, noise = torch.randn(2, *shape, device=device)
        target = noise[group_M] - x0
        velocity, old, reference = ((target + 0.5 * torch.randn_like(target)).to(dtype) for _ in range(3))
        yield Case(
            operator="loss + backward",
            label=dimensions(shape),
            dtype=dtype,
            arguments=(velocity, old, reference, x0, noise, *groups),
            num_bytes=2 * velocity.numel() * (4 * dtype.itemsize + 4),
            reference=in_eager_torch,
            implementations={**kernels_in_turn(device.type), "through autograd": through_autograd},
            baselines={"torch.compile": with_gradient(torch.compile(written_loss, dynamic=False))},
        )


def of_numbers(error_M: Tensor, reference_error_M: Tensor, old_error_M: Tensor, groups: Any) -> Iterator[Case]:
    advantage_M, group_M, size_G = groups
    label, dtype = f"M={len(error_M)} G={len(size_G)}", torch.float32
    yield Case(
        operator="group_scores",
        label=label,
        dtype=dtype,
        arguments=(error_M, reference_error_M, *groups, BETA),
        num_bytes=3 * error_M.nbytes + group_M.nbytes,
        reference=eager_scores,
    )
    yield Case(
        operator="group_preference",
        label=label,
        dtype=dtype,
        arguments=(error_M, reference_error_M, *groups, None, old_error_M, BETA, CLIP),
        num_bytes=4 * error_M.nbytes + group_M.nbytes + len(error_M),
        reference=eager_preference,
    )
    yield Case(
        operator="group_preference_backward",
        label=label,
        dtype=dtype,
        arguments=(error_M.new_tensor(0.5), size_G / size_G.max(), *groups, advantage_M > 0),
        num_bytes=2 * error_M.nbytes + group_M.nbytes + len(error_M),
        reference=eager_backward,
    )


def written_loss(
    velocity: Tensor,
    old: Tensor,
    reference: Tensor,
    x0: Tensor,
    noise: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
) -> Tensor:
    """The loss as a user would write it."""

    def error(velocity: Tensor, target: Tensor) -> Tensor:
        return (velocity.to(x0.dtype) - target).square().flatten(1).mean(1)

    target = noise[group_M] - x0
    error_M, old_error_M, reference_error_M = (error(v, target) for v in (velocity, old, reference))
    ratio_M = torch.exp(old_error_M - error_M.detach())
    clipped_M = torch.where(advantage_M > 0, ratio_M > 1 + CLIP, ratio_M < 1 - CLIP)
    held_M = torch.where(clipped_M, error_M.detach(), error_M)
    terms_M = advantage_M * (held_M - reference_error_M)
    score_G = BETA * torch.zeros_like(size_G).index_add(0, group_M, terms_M) / size_G
    kl = error(velocity, reference.to(x0.dtype)).sum()
    return torch.nn.functional.softplus(score_G).sum() / BETA + KL_COEF * kl


def with_gradient(loss_of: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loss, and the gradient of the policy's velocity, as autograd finds it."""

    def both(velocity: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        leaf = velocity.detach().requires_grad_()
        loss = loss_of(leaf, *rest)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return both


in_eager_torch = with_gradient(written_loss)


@with_gradient
def through_autograd(
    velocity: Tensor,
    old: Tensor,
    reference: Tensor,
    x0: Tensor,
    noise: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
) -> Tensor:
    errors = velocity_errors(velocity, x0=x0, noise=noise, group_M=group_M, old=old, reference=reference)
    assert errors.reference_M is not None and errors.distance_M is not None
    preference = group_preference(
        errors.policy_M, errors.reference_M, advantage_M=advantage_M, group_M=group_M, size_G=size_G, beta=BETA,
        old_error_M=errors.old_M, clip=CLIP,
    )  # fmt: skip
    return preference.objective + KL_COEF * errors.distance_M.sum()


def kernels_in_turn(device: str) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """The four kernels of each implementation, one after the other."""
    names = ("velocity_errors", "group_preference", "group_preference_backward", "velocity_errors_backward")
    found = [ops.implementations(name, device) for name in names]  # type: ignore[arg-type]

    def in_turn(errors_of: Any, preference_of: Any, preference_backward: Any, errors_backward: Any) -> Any:
        def both(
            velocity: Tensor, old: Tensor, reference: Tensor, x0: Tensor, noise: Tensor, *groups: Tensor
        ) -> tuple[Tensor, Tensor]:
            advantage_M, group_M, size_G = groups
            error_M, old_M, reference_M, distance_M = errors_of(
                velocity, x0, noise, None, group_M, old, reference, None, 1.0
            )
            objective, _, weight_G, clipped_M = preference_of(error_M, reference_M, *groups, None, old_M, BETA, CLIP)
            one, of_distance = torch.ones_like(objective), torch.full_like(distance_M, KL_COEF)
            of_error = preference_backward(one, weight_G, advantage_M, group_M, size_G, clipped_M)
            gradient = errors_backward(of_error, of_distance, velocity, x0, noise, None, group_M, reference, None, 1.0)
            return objective + KL_COEF * distance_M.sum(), gradient

        return both

    return {f"{name} kernels": in_turn(*(each[name] for each in found)) for name in found[0] if name != "reference"}


if __name__ == "__main__":
    main("group_preference", __doc__, cases, SHAPES)
