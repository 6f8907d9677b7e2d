"""Denoising errors of policy, old policy and reference, and the policy's distance to the reference, in one read.

Shape letters: M samples of a micro-batch, G groups that share a noise, ... the latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.ops.arguments import (
    FLOATING,
    batch_size,
    check_device,
    check_dtype,
    check_groups,
    check_no_gradient,
    check_noise,
    check_shape,
    words_of,
)
from dgpo_fast.ops.registry import define, differentiate


class VelocityErrors(NamedTuple):
    """Means over the latent elements, [M] each, in the dtype of x0; None where no velocity was given.

    Gradients flow through policy_M and distance_M.
    """

    policy_M: Tensor
    old_M: Tensor | None
    reference_M: Tensor | None
    distance_M: Tensor | None  # of the policy's velocity to the reference's: the KL term


def velocity_errors(
    velocity: Tensor,
    *,
    x0: Tensor,
    noise: Tensor | None = None,
    streams: Sequence[rng.Stream] | Tensor | None = None,
    group_M: Tensor | None = None,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
) -> VelocityErrors:
    """How far velocities are from their target v* = eps[group] - x0, which is made here again and never stored.

        policy = mean |v - v*|^2,    old = mean |v_old - v*|^2,    reference = mean |v_ref - v*|^2,
        distance = mean |v - v_ref|^2,    v_ref = unconditional + guidance (reference - unconditional)

    Args:
        velocity: [M, ...], the policy's prediction, any floating-point dtype.
        x0: [M, ...], float32 or float64: the samples. The arithmetic runs in this dtype.
        noise: [G, ...], dtype of x0: eps, given.
        streams: eps drawn where it is used: a stream for each group, or their words, as in `flow_interpolate`.
        group_M: [M], int64 in 0..G-1. None stands for 0, 1, 2, ...: a noise for each sample.
        old, reference, unconditional: [M, ...], dtype of velocity; what is absent is not computed.
        guidance: scale of the reference's guidance; unused without `unconditional`.

    Gradients flow to `velocity`. The sums are made in a fixed order: the same bits on every run, and equal velocities
    have equal errors, so that the ratio of policy and old policy is exactly 1 where their weights are equal.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype, device or range; not exactly one of noise and streams;
            no group for a sample; unconditional without reference; an argument besides velocity that requires a
            gradient. On CUDA a group outside 0..G-1 gives NaN for its sample.

    Source: DGPO, arXiv 2510.08425, eq. 17; a mean instead of the paper's sum, and the error of the velocity instead of
    x_0 (they differ by sigma^2), as in the code its authors published.
    """
    if (noise is None) == (streams is None):
        raise ValueError("noise: expected either noise or streams, got " + ("both" if streams is not None else "none"))
    others = {"x0": x0, "noise": noise, "old": old, "reference": reference, "unconditional": unconditional}
    for name, tensor in others.items():
        check_no_gradient(name, tensor, reason="gradients flow to velocity only")
    words = None if streams is None else words_of(streams, device=x0.device)
    group_M = torch.arange(batch_size(x0, "x0"), device=x0.device) if group_M is None else group_M
    policy_M, old_M, reference_M, distance_M = _velocity_errors(
        velocity, x0, noise, words, group_M, old, reference, unconditional, guidance
    )
    return VelocityErrors(
        policy_M=policy_M,
        old_M=None if old is None else old_M,
        reference_M=None if reference is None else reference_M,
        distance_M=None if reference is None else distance_M,
    )


def _check_metadata(
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_M: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> None:
    if velocity.dim() < 1:
        raise ValueError("velocity: expected [M, ...], got a scalar")
    check_dtype("velocity", velocity, *FLOATING)
    check_dtype("x0", x0, torch.float32, torch.float64)
    check_shape("x0", x0, velocity.shape, meaning="the shape of velocity")
    check_dtype("group_M", group_M, torch.int64)
    check_shape("group_M", group_M, x0.shape[:1], meaning="one number for each sample")
    check_noise(noise, streams, x0, meaning="x0")
    if unconditional is not None and reference is None:
        raise ValueError("unconditional: expected None without reference")
    velocities = {"old": old, "reference": reference, "unconditional": unconditional}
    for name, tensor in velocities.items():
        if tensor is not None:
            check_dtype(name, tensor, velocity.dtype)
            check_shape(name, tensor, velocity.shape, meaning="the shape of velocity")
    for name, tensor in {"x0": x0, "noise": noise, "streams": streams, "group_M": group_M, **velocities}.items():
        if tensor is not None:
            check_device(name, tensor, velocity, meaning="velocity")


def _check(
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_M: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> None:
    _check_metadata(velocity, x0, noise, streams, group_M, old, reference, unconditional, guidance)
    check_groups("group_M", group_M, noise, streams)


def _target(x0: Tensor, noise: Tensor | None, streams: Tensor | None, group_M: Tensor) -> Tensor:
    if noise is None:
        assert streams is not None
        noise = rng.normal(streams, x0.shape[1:], device=x0.device).to(x0.dtype)
    return noise[group_M] - x0


def _guided(reference: Tensor, unconditional: Tensor | None, guidance: float, dtype: torch.dtype) -> Tensor:
    if unconditional is None:
        return reference.to(dtype)
    return unconditional.to(dtype) + guidance * (reference.to(dtype) - unconditional.to(dtype))


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1) if difference.dim() > 1 else difference.square()


def reference_errors(
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_M: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The equations of `velocity_errors` in eager torch; no element where no velocity was given."""
    dtype = x0.dtype
    target, v = _target(x0, noise, streams, group_M), velocity.to(dtype)
    old_M, reference_M, distance_M = (x0.new_empty(0) for _ in range(3))
    if old is not None:
        old_M = _mean_square(old.to(dtype) - target)
    if reference is not None:
        v_ref = _guided(reference, unconditional, guidance, dtype)
        reference_M, distance_M = _mean_square(v_ref - target), _mean_square(v - v_ref)
    return _mean_square(v - target), old_M, reference_M, distance_M


def reference_backward(
    grad_policy_M: Tensor,
    grad_distance_M: Tensor | None,
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_M: Tensor,
    reference: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> Tensor:
    """grad_velocity = 2 / N (grad_policy (v - v*) + grad_distance (v - v_ref)), N elements of a sample."""
    dtype = x0.dtype
    v = velocity.to(dtype)
    scale = 2 / max(1, x0[0].numel() if len(x0) else 1)
    per_sample = (-1, *(1 for _ in x0.shape[1:]))
    grad = (scale * grad_policy_M).view(per_sample) * (v - _target(x0, noise, streams, group_M))
    if reference is not None and grad_distance_M is not None:
        v_ref = _guided(reference, unconditional, guidance, dtype)
        grad = grad + (scale * grad_distance_M).view(per_sample) * (v - v_ref)
    return grad.to(velocity.dtype).contiguous()


def _fake(
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_M: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_metadata(velocity, x0, noise, streams, group_M, old, reference, unconditional, guidance)
    num_samples = x0.shape[0]  # len would make a constant of it
    num_old, num_reference = (0 if given is None else num_samples for given in (old, reference))
    policy_M, *others = (x0.new_empty(count) for count in (num_samples, num_old, num_reference, num_reference))
    return policy_M, *others  # type: ignore[return-value]


def _check_backward(
    grad_policy_M: Tensor,
    grad_distance_M: Tensor | None,
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_M: Tensor,
    reference: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> None:
    _check(velocity, x0, noise, streams, group_M, None, reference, unconditional, guidance)
    _check_gradients(grad_policy_M, grad_distance_M, x0, reference)


def _check_gradients(
    grad_policy_M: Tensor, grad_distance_M: Tensor | None, x0: Tensor, reference: Tensor | None
) -> None:
    if grad_distance_M is not None and reference is None:
        raise ValueError("grad_distance_M: expected None without reference")
    for name, gradient in {"grad_policy_M": grad_policy_M, "grad_distance_M": grad_distance_M}.items():
        if gradient is not None:
            check_dtype(name, gradient, x0.dtype)
            check_shape(name, gradient, x0.shape[:1], meaning="a number for each sample")
            check_device(name, gradient, x0, meaning="x0")


def _fake_backward(
    grad_policy_M: Tensor,
    grad_distance_M: Tensor | None,
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_M: Tensor,
    reference: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> Tensor:
    _check_metadata(velocity, x0, noise, streams, group_M, None, reference, unconditional, guidance)
    _check_gradients(grad_policy_M, grad_distance_M, x0, reference)
    return velocity.new_empty(velocity.shape)


define(
    "velocity_errors(Tensor velocity, Tensor x0, Tensor? noise, Tensor? streams, Tensor group_M, Tensor? old,"
    " Tensor? reference, Tensor? unconditional, float guidance)"
    " -> (Tensor policy_M, Tensor old_M, Tensor reference_M, Tensor distance_M)",
    check=_check,
    reference=reference_errors,
    fake=_fake,
)
_velocity_errors_backward = define(
    "velocity_errors_backward(Tensor grad_policy_M, Tensor? grad_distance_M, Tensor velocity, Tensor x0,"
    " Tensor? noise, Tensor? streams, Tensor group_M, Tensor? reference, Tensor? unconditional, float guidance)"
    " -> Tensor",
    check=_check_backward,
    reference=reference_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    velocity, x0, noise, streams, group_M, _, reference, unconditional, ctx.guidance = inputs
    _, old_M, reference_M, _ = output
    ctx.mark_non_differentiable(old_M, reference_M)
    ctx.save_for_backward(velocity, x0, noise, streams, group_M, reference, unconditional)


def _backward(
    ctx: Any, grad_policy_M: Tensor, _: Tensor | None, __: Tensor | None, grad_distance_M: Tensor
) -> tuple[Tensor | None, ...]:
    *_inputs, reference, _unconditional = ctx.saved_tensors
    of_distance = None if reference is None else grad_distance_M
    grad_velocity = _velocity_errors_backward(grad_policy_M, of_distance, *ctx.saved_tensors, ctx.guidance)
    return grad_velocity, *(None for _ in range(8))


_velocity_errors = differentiate("velocity_errors", setup_context=_save, backward=_backward)
