"""The forward process of a rectified flow: x_t between sample and noise, and the velocity that leads there.

Shape letters: B samples, G groups that share a noise, ... the latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.ops.arguments import (
    FLOATING,
    arithmetic_dtype,
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


class NoisySamples(NamedTuple):
    """Samples on their way to noise."""

    x_t: Tensor  # [B, ...], dtype of x0
    target: Tensor  # [B, ...], dtype of x0: v*; no element where it was not asked for


def flow_interpolate(
    x0: Tensor,
    sigma_B: Tensor,
    *,
    noise: Tensor | None = None,
    streams: Sequence[rng.Stream] | Tensor | None = None,
    group_B: Tensor | None = None,
    with_target: bool = True,
) -> NoisySamples:
    """Samples at noise level sigma, and their velocity targets, with a noise that each group shares.

        x_t[b] = (1 - sigma[b]) x0[b] + sigma[b] eps[group[b]],      v*[b] = eps[group[b]] - x0[b]

    Args:
        x0: [B, ...], any floating-point dtype. The arithmetic runs in float64 for float64, else in float32.
        sigma_B: [B], float32 or float64, not negative.
        noise: [G, ...], dtype of x0: eps, given.
        streams: eps drawn where it is used, and never stored: a `dgpo_fast.rng` stream for each of G groups, or their
            words, int64 [G, 4] in 0..2^32-1. The numbers are those of `rng.normal`, to 4 ulp of float32.
        group_B: [B], int64 in 0..G-1. None stands for 0, 1, 2, ...: a noise for each sample.
        with_target: False spares the memory of v*.

    Gradients flow to `x0`.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype, device or range; not exactly one of noise and streams;
            no group for a sample; noise or sigma that require a gradient. On CUDA ranges are not looked at, since that
            would wait for the device; a group outside 0..G-1 or a negative sigma gives NaN there.

    Source: SD3's rectified flow, arXiv 2403.03206, eq. 13; shared noise: DGPO, arXiv 2510.08425, eq. 17.
    """
    if (noise is None) == (streams is None):
        raise ValueError("noise: expected either noise or streams, got " + ("both" if streams is not None else "none"))
    for name, tensor in (("noise", noise), ("sigma_B", sigma_B)):
        check_no_gradient(name, tensor, reason="gradients flow to x0 only")
    words = None if streams is None else words_of(streams, device=x0.device)
    group_B = torch.arange(batch_size(x0, "x0"), device=x0.device) if group_B is None else group_B
    return NoisySamples(*_flow_interpolate(x0, sigma_B, noise, words, group_B, with_target))


def _check(
    x0: Tensor, sigma_B: Tensor, noise: Tensor | None, streams: Tensor | None, group_B: Tensor, with_target: bool
) -> None:
    _check_metadata(x0, sigma_B, noise, streams, group_B, with_target)
    if sigma_B.device.type == "cpu" and not bool((sigma_B >= 0).all()):
        raise ValueError(f"sigma_B: expected numbers that are not negative, got {sigma_B.tolist()}")
    check_groups("group_B", group_B, noise, streams)


def _check_metadata(
    x0: Tensor, sigma_B: Tensor, noise: Tensor | None, streams: Tensor | None, group_B: Tensor, with_target: bool
) -> None:
    if x0.dim() < 1:
        raise ValueError("x0: expected [B, ...], got a scalar")
    check_dtype("x0", x0, *FLOATING)
    check_dtype("sigma_B", sigma_B, torch.float32, torch.float64)
    check_dtype("group_B", group_B, torch.int64)
    for name, tensor in (("sigma_B", sigma_B), ("group_B", group_B)):
        check_shape(name, tensor, x0.shape[:1], meaning="one number for each sample")
    check_noise(noise, streams, x0, meaning="x0")
    for name, tensor_or_none in (("sigma_B", sigma_B), ("group_B", group_B), ("noise", noise), ("streams", streams)):
        if tensor_or_none is not None:
            check_device(name, tensor_or_none, x0, meaning="x0")


def reference(
    x0: Tensor, sigma_B: Tensor, noise: Tensor | None, streams: Tensor | None, group_B: Tensor, with_target: bool
) -> tuple[Tensor, Tensor]:
    """The equations of `flow_interpolate` in eager torch."""
    dtype = arithmetic_dtype(x0)
    if noise is None:
        assert streams is not None
        noise = rng.normal(streams, x0.shape[1:], device=x0.device)
    x0_B, eps_B, sigma = x0.to(dtype), noise.to(dtype)[group_B], per_sample(sigma_B, x0).to(dtype)
    x_t = (1 - sigma) * x0_B + sigma * eps_B
    target = eps_B - x0_B if with_target else x0_B.new_empty(0)
    return x_t.to(x0.dtype).contiguous(), target.to(x0.dtype).contiguous()


def per_sample(number_B: Tensor, like: Tensor) -> Tensor:
    """`number_B` with dimensions of size one behind it, to go with `like`, [B, ...]."""
    return number_B.view(-1, *(1 for _ in like.shape[1:]))


def _fake(
    x0: Tensor, sigma_B: Tensor, noise: Tensor | None, streams: Tensor | None, group_B: Tensor, with_target: bool
) -> tuple[Tensor, Tensor]:
    _check_metadata(x0, sigma_B, noise, streams, group_B, with_target)
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape if with_target else (0,))


def _check_backward(grad_x_t: Tensor, grad_target: Tensor | None, sigma_B: Tensor) -> None:
    check_dtype("grad_x_t", grad_x_t, *FLOATING)
    check_dtype("sigma_B", sigma_B, torch.float32, torch.float64)
    check_shape("sigma_B", sigma_B, grad_x_t.shape[:1], meaning="one number for each sample")
    check_device("sigma_B", sigma_B, grad_x_t, meaning="grad_x_t")
    if grad_target is not None:
        check_dtype("grad_target", grad_target, grad_x_t.dtype)
        check_shape("grad_target", grad_target, grad_x_t.shape, meaning="the shape of grad_x_t")
        check_device("grad_target", grad_target, grad_x_t, meaning="grad_x_t")


def reference_backward(grad_x_t: Tensor, grad_target: Tensor | None, sigma_B: Tensor) -> Tensor:
    """grad_x0[b] = (1 - sigma[b]) grad_x_t[b] - grad_target[b]."""
    dtype = arithmetic_dtype(grad_x_t)
    grad_x0 = (1 - per_sample(sigma_B, grad_x_t).to(dtype)) * grad_x_t.to(dtype)
    if grad_target is not None:
        grad_x0 = grad_x0 - grad_target.to(dtype)
    return grad_x0.to(grad_x_t.dtype).contiguous()


def _fake_backward(grad_x_t: Tensor, grad_target: Tensor | None, sigma_B: Tensor) -> Tensor:
    _check_backward(grad_x_t, grad_target, sigma_B)
    return grad_x_t.new_empty(grad_x_t.shape)


define(
    "flow_interpolate(Tensor x0, Tensor sigma_B, Tensor? noise, Tensor? streams, Tensor group_B, bool with_target)"
    " -> (Tensor, Tensor)",
    check=_check,
    reference=reference,
    fake=_fake,
)
_flow_interpolate_backward = define(
    "flow_interpolate_backward(Tensor grad_x_t, Tensor? grad_target, Tensor sigma_B) -> Tensor",
    check=_check_backward,
    reference=reference_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, sigma_B, _, _, _, ctx.with_target = inputs
    ctx.save_for_backward(sigma_B)


def _backward(ctx: Any, grad_x_t: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    (sigma_B,) = ctx.saved_tensors
    grad_x0 = _flow_interpolate_backward(grad_x_t, grad_target if ctx.with_target else None, sigma_B)
    return grad_x0, None, None, None, None, None


_flow_interpolate = differentiate("flow_interpolate", setup_context=_save, backward=_backward)
