"""One step of Flow-GRPO's samplers, an SDE with the flow's marginals or CPS, and the density of what it drew.

Shape letters: B samples, G groups that share a noise, T steps of a schedule, ... the latent dimensions.
"""

from __future__ import annotations

import math
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
from dgpo_fast.ops.flow_interpolate import per_sample
from dgpo_fast.ops.registry import define, differentiate

OF_X, OF_VELOCITY, STD = range(3)
"""Columns of the coefficients."""


class SDEStep(NamedTuple):
    """A step from one noise level to the next."""

    x_next: Tensor  # [B, ...], dtype of x: drawn, without a gradient, or the one that was given
    mean: Tensor  # [B, ...], dtype of x: of x_next; no element where it was not asked for
    log_prob_B: Tensor  # [B], dtype of x: mean over the elements of log N(x_next; mean, std^2); 0 where std is 0


def sde_coefficients(
    sigma_T: Tensor, sigma_next_T: Tensor, *, noise_level: float | Tensor, sigma_max_next: float
) -> Tensor:
    """What `sde_step` multiplies with, for each step of a schedule: of x, of the velocity, and the noise's std.

        dt = sigma_next - sigma < 0,    s = noise_level sqrt(sigma / (1 - sigma'))
        1 + s^2 dt / (2 sigma),    (1 + s^2 (1 - sigma) / (2 sigma)) dt,    s sqrt(-dt)

    sigma' is sigma, except at sigma = 1, where the square root would be infinite: there it is sigma_max_next.

    Args:
        sigma_T: [T], in (0, 1].
        sigma_next_T: [T], in [0, sigma).
        noise_level: not negative; 0 makes an ODE step of it, Euler's. As a tensor, [T], one for each step.
        sigma_max_next: in [0, 1): the second sigma of the schedule.

    Returns:
        [T, 3], float64, on the device of sigma_T.

    Raises:
        ValueError: naming the argument of a wrong shape or range. Ranges are looked at, which waits for a device.

    Source: Flow-GRPO, arXiv 2505.05470, eq. 9, and at sigma = 1 the code its authors published.
    """
    sigma, sigma_next = _checked_steps(sigma_T, sigma_next_T)
    level = torch.as_tensor(noise_level, dtype=torch.float64, device=sigma.device).expand_as(sigma)
    if not (level >= 0).all() or not level.isfinite().all():
        raise ValueError(f"noise_level: expected finite numbers that are not negative, got {noise_level}")
    if not 0 <= sigma_max_next < 1:
        raise ValueError(f"sigma_max_next: expected a number in [0, 1), got {sigma_max_next}")
    dt = sigma_next - sigma
    variance_rate = level.square() * sigma / (1 - torch.where(sigma == 1, sigma_max_next, sigma))
    of_x = 1 + variance_rate * dt / (2 * sigma)
    of_velocity = (1 + variance_rate * (1 - sigma) / (2 * sigma)) * dt
    return torch.stack([of_x, of_velocity, (variance_rate * -dt).sqrt()], dim=1)


def cps_coefficients(sigma_T: Tensor, sigma_next_T: Tensor, *, noise_level: float) -> Tensor:
    """The same of Coefficients-Preserving Sampling: to the data and the noise that a velocity predicts it gives the
    weights that they have at the next noise level, and fresh noise the place of a part of the old.

        s = sigma_next sin(noise_level pi / 2),    x_0 = x - sigma v,    x_1 = x + (1 - sigma) v
        mean = (1 - sigma_next) x_0 + sqrt(sigma_next^2 - s^2) x_1,    std = s

    Args:
        sigma_T: [T], in (0, 1].
        sigma_next_T: [T], in [0, sigma).
        noise_level: in 0..1; 0 makes an ODE step of it, Euler's, 1 leaves nothing of the old noise.

    Returns:
        [T, 3], float64, on the device of sigma_T: of x, of the velocity, and std.

    Raises:
        ValueError: naming the argument of a wrong shape or range. Ranges are looked at, which waits for a device.

    Source: arXiv 2509.05952.
    """
    sigma, sigma_next = _checked_steps(sigma_T, sigma_next_T)
    if not 0 <= noise_level <= 1:
        raise ValueError(f"noise_level: expected a number in 0..1, got {noise_level}")
    of_data, of_noise = 1 - sigma_next, sigma_next * math.cos(noise_level * math.pi / 2)
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    return torch.stack([of_data + of_noise, (1 - sigma) * of_noise - sigma * of_data, std], dim=1)


def _checked_steps(sigma_T: Tensor, sigma_next_T: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64."""
    sigma, sigma_next = sigma_T.double(), sigma_next_T.double()
    if sigma.dim() != 1:
        raise ValueError(f"sigma_T: expected [T], got {list(sigma.shape)}")
    check_shape("sigma_next_T", sigma_next, sigma.shape, meaning="one for each step")
    if not ((sigma > 0) & (sigma <= 1)).all():
        raise ValueError(f"sigma_T: expected numbers in (0, 1], got {sigma.tolist()}")
    if not ((sigma_next >= 0) & (sigma_next < sigma)).all():
        raise ValueError(f"sigma_next_T: expected numbers in [0, sigma), got {sigma_next.tolist()}")
    return sigma, sigma_next


def sde_step(
    x: Tensor,
    velocity: Tensor,
    *,
    coefficients_B3: Tensor,
    noise: Tensor | None = None,
    streams: Sequence[rng.Stream] | Tensor | None = None,
    group_B: Tensor | None = None,
    x_next: Tensor | None = None,
    with_mean: bool = True,
) -> SDEStep:
    """A step of the rollout, drawn, or the density of one that was drawn, for training; with its mean.

        mean = of_x x + of_velocity velocity,    x_next = mean + std z
        log_prob = mean over elements of -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2

    Args:
        x: [B, ...], float32 or float64. The arithmetic runs in this dtype.
        velocity: [B, ...], any floating-point dtype.
        coefficients_B3: [B, 3], float32 or float64: of_x, of_velocity and std of each sample's step, rows of
            `sde_coefficients` or `cps_coefficients`. Where std is 0 the step is one of an ODE: x_next is the mean, and
            log_prob 0.
        noise: [G, ...], dtype of x: z, given.
        streams: z drawn where it is used: a stream for each group, or their words, as in `flow_interpolate`.
        group_B: [B], int64 in 0..G-1, where z is given or drawn. None stands for 0, 1, 2, ...: a noise for each sample.
        x_next: [B, ...], dtype of x: what was drawn.
        with_mean: False spares the memory of the mean.

    Gradients flow to `velocity`, from the mean and from log_prob, to which x_next is a constant, drawn or given. The
    same arguments give the same log_prob to the bit where x_next is drawn and where it is given back: the ratio of a
    policy that has not changed is exactly 1. Sums are made in a fixed order. Triton has two: one where all samples of
    x, velocity, noise and x_next begin at multiples of 16 bytes and have a multiple of 16 elements, as contiguous
    latents have, and one for any others; there the promise is for two calls of one kind.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype, device or range; not exactly one of noise, streams and
            x_next; no group for a sample; group_B with x_next; an argument besides velocity that requires a gradient.
            On CUDA ranges are not looked at, since that would wait for the device; a group outside 0..G-1 gives NaN
            there.

    Source: Flow-GRPO, arXiv 2505.05470, eqs. 9 and 10; a mean over the elements, as in the code its authors published.
    """
    constants = {"x": x, "coefficients_B3": coefficients_B3, "noise": noise, "x_next": x_next}
    for name, tensor in constants.items():
        check_no_gradient(name, tensor, reason="gradients flow to velocity only")
    words = None if streams is None else words_of(streams, device=x.device)
    if group_B is None and x_next is None:
        group_B = torch.arange(batch_size(x, "x"), device=x.device)
    drawn, mean, log_prob_B = _sde_step(x, velocity, coefficients_B3, noise, words, group_B, x_next, with_mean)
    return SDEStep(drawn if x_next is None else x_next, mean, log_prob_B)


def _check_metadata(
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_B: Tensor | None,
    x_next: Tensor | None,
    with_mean: bool,
) -> None:
    _check_step(x, velocity, coefficients_B3)
    sources = {"noise": noise, "streams": streams, "x_next": x_next}
    given = [name for name, tensor in sources.items() if tensor is not None]
    if len(given) != 1:
        raise ValueError(f"noise: expected one of noise, streams and x_next, got {' and '.join(given) or 'none'}")
    if (group_B is None) != (x_next is not None):
        raise ValueError("group_B: expected where noise is given or drawn, and only there")
    check_noise(noise, streams, x, meaning="x")
    if group_B is not None:
        check_dtype("group_B", group_B, torch.int64)
        check_shape("group_B", group_B, x.shape[:1], meaning="one number for each sample")
    if x_next is not None:
        check_dtype("x_next", x_next, x.dtype)
        check_shape("x_next", x_next, x.shape, meaning="the shape of x")
    for name, tensor in {**sources, "group_B": group_B}.items():
        if tensor is not None:
            check_device(name, tensor, x, meaning="x")


def _check_step(x: Tensor, velocity: Tensor, coefficients_B3: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError("x: expected [B, ...], got a scalar")
    check_dtype("x", x, torch.float32, torch.float64)
    check_dtype("velocity", velocity, *FLOATING)
    check_shape("velocity", velocity, x.shape, meaning="the shape of x")
    check_dtype("coefficients_B3", coefficients_B3, torch.float32, torch.float64)
    check_shape("coefficients_B3", coefficients_B3, [x.shape[0], 3], meaning="three numbers for each sample")
    for name, tensor in (("velocity", velocity), ("coefficients_B3", coefficients_B3)):
        check_device(name, tensor, x, meaning="x")


def _check(
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_B: Tensor | None,
    x_next: Tensor | None,
    with_mean: bool,
) -> None:
    _check_metadata(x, velocity, coefficients_B3, noise, streams, group_B, x_next, with_mean)
    _check_std(coefficients_B3)
    if group_B is not None:
        check_groups("group_B", group_B, noise, streams)


def _check_std(coefficients_B3: Tensor) -> None:
    std_B = coefficients_B3[:, STD]
    if std_B.device.type == "cpu" and not bool((std_B >= 0).all()):
        raise ValueError(f"coefficients_B3: expected standard deviations that are not negative, got {std_B.tolist()}")


def _columns(coefficients_B3: Tensor, x: Tensor) -> list[Tensor]:
    return [per_sample(column_B, x) for column_B in coefficients_B3.to(x.dtype).unbind(1)]


def _log_prob(mean_square_B: Tensor, coefficients_B3: Tensor) -> Tensor:
    """The log-density of samples whose mean square distance from their mean is given; 0 where std is 0.

    In float64: these are a few numbers, and a ratio of densities is the exponential of their difference.
    """
    std_B = coefficients_B3[:, STD].double()
    log_prob_B = -mean_square_B / (2 * std_B.square()) - std_B.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std_B == 0, 0, log_prob_B)


def reference(
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_B: Tensor | None,
    x_next: Tensor | None,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of `sde_step` in eager torch; x_next has no element where it was given."""
    of_x, of_velocity, std = _columns(coefficients_B3, x)
    mean = of_x * x + of_velocity * velocity.to(x.dtype)
    drawn = x.new_empty(0)
    if x_next is None:
        z = noise if streams is None else rng.normal(streams, x.shape[1:], device=x.device).to(x.dtype)
        assert z is not None and group_B is not None
        x_next = drawn = (mean + std * z[group_B]).contiguous()
    mean_square_B = (x_next - mean).square().unsqueeze(-1).flatten(1).mean(1, dtype=torch.float64)
    log_prob_B = _log_prob(mean_square_B, coefficients_B3).to(x.dtype)
    return drawn, mean.contiguous() if with_mean else x.new_empty(0), log_prob_B


def _fake(
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_B: Tensor | None,
    x_next: Tensor | None,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_metadata(x, velocity, coefficients_B3, noise, streams, group_B, x_next, with_mean)
    drawn = x.new_empty(x.shape if x_next is None else (0,))
    return drawn, x.new_empty(x.shape if with_mean else (0,)), x.new_empty(x.shape[:1])


def _check_backward_metadata(
    grad_mean: Tensor | None,
    grad_log_prob_B: Tensor | None,
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    x_next: Tensor,
) -> None:
    _check_step(x, velocity, coefficients_B3)
    shapes = {"grad_mean": (grad_mean, x.shape), "grad_log_prob_B": (grad_log_prob_B, x.shape[:1])}
    for name, (tensor, shape) in {**shapes, "x_next": (x_next, x.shape)}.items():
        if tensor is not None:
            check_dtype(name, tensor, x.dtype)
            check_shape(name, tensor, shape, meaning="as x has samples")
            check_device(name, tensor, x, meaning="x")


def _check_backward(
    grad_mean: Tensor | None,
    grad_log_prob_B: Tensor | None,
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    x_next: Tensor,
) -> None:
    _check_backward_metadata(grad_mean, grad_log_prob_B, x, velocity, coefficients_B3, x_next)
    _check_std(coefficients_B3)


def reference_backward(
    grad_mean: Tensor | None,
    grad_log_prob_B: Tensor | None,
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    x_next: Tensor,
) -> Tensor:
    """grad_velocity = of_velocity (grad_mean + grad_log_prob (x_next - mean) / (N std^2)), N elements of a sample.

    The second term is 0 where std is 0.
    """
    of_x, of_velocity, std = _columns(coefficients_B3, x)
    mean = of_x * x + of_velocity * velocity.to(x.dtype)
    grad = torch.zeros_like(mean) if grad_mean is None else grad_mean
    if grad_log_prob_B is not None:
        numel = max(1, x.shape[1:].numel())
        scale = torch.where(std == 0, 0, per_sample(grad_log_prob_B, x) / (numel * std.square()))
        grad = grad + scale * (x_next - mean)
    return (of_velocity * grad).to(velocity.dtype).contiguous()


def _fake_backward(
    grad_mean: Tensor | None,
    grad_log_prob_B: Tensor | None,
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    x_next: Tensor,
) -> Tensor:
    _check_backward_metadata(grad_mean, grad_log_prob_B, x, velocity, coefficients_B3, x_next)
    return velocity.new_empty(velocity.shape)


define(
    "sde_step(Tensor x, Tensor velocity, Tensor coefficients_B3, Tensor? noise, Tensor? streams, Tensor? group_B,"
    " Tensor? x_next, bool with_mean) -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=reference,
    fake=_fake,
)
_sde_step_backward = define(
    "sde_step_backward(Tensor? grad_mean, Tensor? grad_log_prob_B, Tensor x, Tensor velocity, Tensor coefficients_B3,"
    " Tensor x_next) -> Tensor",
    check=_check_backward,
    reference=reference_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, velocity, coefficients_B3, _, _, _, x_next, ctx.with_mean = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(x, velocity, coefficients_B3, output[0] if x_next is None else x_next)


def _backward(ctx: Any, _: Tensor, grad_mean: Tensor, grad_log_prob_B: Tensor) -> tuple[Tensor | None, ...]:
    grad_velocity = _sde_step_backward(grad_mean if ctx.with_mean else None, grad_log_prob_B, *ctx.saved_tensors)
    return None, grad_velocity, *(None for _ in range(6))


_sde_step = differentiate("sde_step", setup_context=_save, backward=_backward)
