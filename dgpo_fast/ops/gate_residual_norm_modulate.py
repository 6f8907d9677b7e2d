"""The end of one branch and the start of the next: gated residual, layer norm and modulation in one pass.

Shape letters: B samples, N tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgpo_fast.ops.arguments import (
    arithmetic_dtype,
    check_alike,
    check_modulation,
    check_positive,
    check_tokens,
)
from dgpo_fast.ops.gate_residual import gate_gradients
from dgpo_fast.ops.gate_residual import reference as gated_residual
from dgpo_fast.ops.layer_norm_modulate import modulation_gradients, standardise, standardise_backward
from dgpo_fast.ops.layer_norm_modulate import reference as modulated_norm
from dgpo_fast.ops.registry import define, differentiate


class NormedResidual(NamedTuple):
    """The stream after a branch, and what the next branch reads."""

    hidden: Tensor  # [B, N, D], dtype of x
    normed: Tensor  # [B, N, D], dtype of x


def gate_residual_norm_modulate(
    x_BND: Tensor, y_BND: Tensor, *, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6
) -> NormedResidual:
    """The stream after a branch and its modulated layer norm: two reads and two writes.

        hidden[b, n] = x[b, n] + gate[b] y[b, n],      normed = LN(hidden) (1 + scale[b]) + shift[b]

    The norm is that of the rounded `hidden`: the results are those of `gate_residual` and `layer_norm_modulate` in a
    row, to the bit; in Triton if the rows of x, y and gate begin at multiples of 16 bytes, or D is no multiple of 16.
    Their gradients differ from these in that here the gradient of the stream, the sum of its two branches, is rounded
    once.

    Args:
        x_BND: [B, N, D], any floating-point dtype: the stream. The arithmetic runs in float64 for float64, else in
            float32.
        y_BND: [B, N, D], dtype of x_BND: the branch's output.
        gate_BD, shift_BD, scale_BD: [B, D], dtype of x_BND. Chunks of one tensor are read where they lie.
        eps: positive.

    Returns:
        hidden and normed, [B, N, D] each, contiguous, dtype of x_BND.

    Gradients flow to all five; the three of the modulation, sums over the tokens in a fixed order, are computed only
    where one of them is asked for. For the backward `hidden`, gate_BD and scale_BD are kept, y_BND where the modulation
    requires a gradient, and x_BND never.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype, device or range.

    Source: `gate_residual` and `layer_norm_modulate`.
    """
    return NormedResidual(*_gate_residual_norm_modulate(x_BND, y_BND, gate_BD, shift_BD, scale_BD, eps))


def _check(x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> None:
    check_tokens("x_BND", x_BND)
    check_alike("y_BND", y_BND, x_BND, meaning="x_BND")
    for name, tensor in (("gate_BD", gate_BD), ("shift_BD", shift_BD), ("scale_BD", scale_BD)):
        check_modulation(name, tensor, x_BND, meaning="x_BND")
    check_positive("eps", eps)


def reference(
    x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The equations of `gate_residual_norm_modulate` in eager torch: the two operators' references in a row."""
    hidden = gated_residual(x_BND, y_BND, gate_BD)
    return hidden, modulated_norm(hidden, shift_BD, scale_BD, eps)


def _fake(
    x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check(x_BND, y_BND, gate_BD, shift_BD, scale_BD, eps)
    return x_BND.new_empty(x_BND.shape), x_BND.new_empty(x_BND.shape)


def _check_backward(
    grad_hidden_BND: Tensor | None,
    grad_normed_BND: Tensor,
    hidden_BND: Tensor,
    y_BND: Tensor | None,
    gate_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> None:
    check_tokens("hidden_BND", hidden_BND)
    for name, tensor in (
        ("grad_hidden_BND", grad_hidden_BND), ("grad_normed_BND", grad_normed_BND), ("y_BND", y_BND)
    ):  # fmt: skip
        if tensor is not None:
            check_alike(name, tensor, hidden_BND, meaning="hidden_BND")
    check_modulation("gate_BD", gate_BD, hidden_BND, meaning="hidden_BND")
    check_modulation("scale_BD", scale_BD, hidden_BND, meaning="hidden_BND")
    check_positive("eps", eps)


def reference_backward(
    grad_hidden_BND: Tensor | None,
    grad_normed_BND: Tensor,
    hidden_BND: Tensor,
    y_BND: Tensor | None,
    gate_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, shift and scale; the last three have no element without y_BND.

        grad_x = grad_hidden + LN'(grad_normed (1 + scale)),      grad_y[b, n] = gate[b] grad_x[b, n]

    and the sums over n: of grad_x y for the gate, and for shift and scale as in `layer_norm_modulate`.
    """
    dtype = arithmetic_dtype(hidden_BND)
    grad_normed = grad_normed_BND.to(dtype).contiguous()
    standard, rstd = standardise(hidden_BND.to(dtype), eps)
    grad_x = standardise_backward(grad_normed * (1 + scale_BD.to(dtype)[:, None]), standard, rstd)
    if grad_hidden_BND is not None:
        grad_x = grad_x + grad_hidden_BND.to(dtype)
    grad_y, grad_gate = gate_gradients(grad_x, None if y_BND is None else y_BND.to(dtype), gate_BD.to(dtype))
    grad_shift, grad_scale = modulation_gradients(grad_normed, standard, y_BND is not None)
    gradients = (grad_x, grad_y, grad_gate, grad_shift, grad_scale)
    grad_x, grad_y, grad_gate, grad_shift, grad_scale = (gradient.to(hidden_BND.dtype) for gradient in gradients)
    return grad_x, grad_y, grad_gate, grad_shift, grad_scale


def _fake_backward(
    grad_hidden_BND: Tensor | None,
    grad_normed_BND: Tensor,
    hidden_BND: Tensor,
    y_BND: Tensor | None,
    gate_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_hidden_BND, grad_normed_BND, hidden_BND, y_BND, gate_BD, scale_BD, eps)
    like, summed = hidden_BND.shape, (0,) if y_BND is None else gate_BD.shape
    grad_x, grad_y, *modulation = (hidden_BND.new_empty(shape) for shape in (like, like, summed, summed, summed))
    return grad_x, grad_y, *modulation  # type: ignore[return-value]


define(
    "gate_residual_norm_modulate(Tensor x_BND, Tensor y_BND, Tensor gate_BD, Tensor shift_BD, Tensor scale_BD,"
    " float eps) -> (Tensor, Tensor)",
    check=_check,
    reference=reference,
    fake=_fake,
)
gate_residual_norm_modulate_backward = define(
    "gate_residual_norm_modulate_backward(Tensor? grad_hidden_BND, Tensor grad_normed_BND, Tensor hidden_BND,"
    " Tensor? y_BND, Tensor gate_BD, Tensor scale_BD, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    reference=reference_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y_BND, gate_BD, _, scale_BD, ctx.eps = inputs
    ctx.save_for_backward(output[0], y_BND if any(ctx.needs_input_grad[2:5]) else None, gate_BD, scale_BD)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_hidden: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, y_BND, *_ = ctx.saved_tensors
    grad_normed = torch.zeros_like(hidden) if grad_normed is None else grad_normed
    grad_x, grad_y, *modulation = gate_residual_norm_modulate_backward(
        grad_hidden, grad_normed, *ctx.saved_tensors, ctx.eps
    )
    return grad_x, grad_y, *((None, None, None) if y_BND is None else modulation), None


_gate_residual_norm_modulate = differentiate("gate_residual_norm_modulate", setup_context=_save, backward=_backward)
