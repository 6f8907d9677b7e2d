"""Gated residual, layer norm and modulation in Triton. Equations, arguments and checks:
dgpo_fast/ops/gate_residual_norm_modulate.py.

Shape letters: B samples, N tokens, D width, C chunks of tokens.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.alignment import jit_told_alignment, row_at, rows_are_aligned
from dgpo_fast.kernels.layer_norm import (
    add_up,
    chunks_of_rows,
    load_row,
    partial_sums,
    row_block,
    standardise,
    standardise_backward,
    with_rows,
)


@jit_told_alignment
def gate_residual_norm_modulate_kernel(
    p_x,  # [B, N, D]
    p_y,  # [B, N, D]
    p_gate,  # [B, D]
    p_shift,  # [B, D]
    p_scale,  # [B, D]
    p_hidden,  # [B, N, D], contiguous
    p_normed,  # [B, N, D], contiguous
    x_stride_b,
    x_stride_n,
    y_stride_b,
    y_stride_n,
    gate_stride_b,
    shift_stride_b,
    scale_stride_b,
    N,
    D,
    EPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One grid axis: the others end at 65535. 64-bit before it meets a stride.
    i_row = tl.program_id(0).to(tl.int64)
    i_b = i_row // N
    i_n = i_row % N
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    stored = p_hidden.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    b_x = load_row(p_x, i_b * x_stride_b + i_n * x_stride_n, o_d, m_d, dtype, ALIGNED)
    b_y = load_row(p_y, i_b * y_stride_b + i_n * y_stride_n, o_d, m_d, dtype, ALIGNED)
    b_gate = load_row(p_gate, i_b * gate_stride_b, o_d, m_d, dtype, ALIGNED)
    b_scale = load_row(p_scale, i_b * scale_stride_b, o_d, m_d, dtype, ALIGNED)
    b_shift = load_row(p_shift, i_b * shift_stride_b, o_d, m_d, dtype, ALIGNED)
    b_hidden = (b_x + b_gate * b_y).to(stored)
    tl.store(row_at(p_hidden, i_row * D, ALIGNED) + o_d, b_hidden, mask=m_d)
    # Of what is stored: the backward sees nothing else.
    b_standard, _ = standardise(b_hidden.to(dtype), m_d, D, EPS)
    tl.store(row_at(p_normed, i_row * D, ALIGNED) + o_d, (b_standard * (1 + b_scale) + b_shift).to(stored), mask=m_d)


@jit_told_alignment
def gate_residual_norm_modulate_backward_kernel(
    p_grad_hidden,  # [B, N, D], not read unless WITH_GRAD_HIDDEN
    p_grad_normed,  # [B, N, D]
    p_hidden,  # [B, N, D]
    p_y,  # [B, N, D], not read unless SUMMED
    p_gate,  # [B, D]
    p_scale,  # [B, D]
    p_grad_x,  # [B, N, D], contiguous
    p_grad_y,  # [B, N, D], contiguous
    p_sums,  # [3, B, C, D], of the gradients of gate, shift and scale; not written unless SUMMED
    grad_hidden_stride_b,
    grad_hidden_stride_n,
    grad_normed_stride_b,
    grad_normed_stride_n,
    hidden_stride_b,
    hidden_stride_n,
    y_stride_b,
    y_stride_n,
    gate_stride_b,
    scale_stride_b,
    sums_stride_row,
    num_chunks,  # C
    N,
    D,
    WITH_GRAD_HIDDEN: tl.constexpr,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_chunks
    first = (i_program % num_chunks) * ROWS
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    stored = p_grad_x.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    b_gate = load_row(p_gate, i_b * gate_stride_b, o_d, m_d, dtype, ALIGNED)
    b_scale = load_row(p_scale, i_b * scale_stride_b, o_d, m_d, dtype, ALIGNED)
    b_gate_sum = tl.zeros([BLOCK_D], dtype)
    b_shift_sum = tl.zeros([BLOCK_D], dtype)
    b_scale_sum = tl.zeros([BLOCK_D], dtype)
    for i_n in range(first, tl.minimum(first + ROWS, N)):
        b_hidden = load_row(p_hidden, i_b * hidden_stride_b + i_n * hidden_stride_n, o_d, m_d, dtype, ALIGNED)
        o_grad_normed = i_b * grad_normed_stride_b + i_n * grad_normed_stride_n
        b_grad_normed = load_row(p_grad_normed, o_grad_normed, o_d, m_d, dtype, ALIGNED)
        b_standard, rstd = standardise(b_hidden, m_d, D, EPS)
        b_grad_x = standardise_backward(b_grad_normed * (1 + b_scale), b_standard, rstd, D)
        if WITH_GRAD_HIDDEN:
            o_grad_hidden = i_b * grad_hidden_stride_b + i_n * grad_hidden_stride_n
            b_grad_x += load_row(p_grad_hidden, o_grad_hidden, o_d, m_d, dtype, ALIGNED)
        o_out = (i_b * N + i_n) * D
        tl.store(row_at(p_grad_x, o_out, ALIGNED) + o_d, b_grad_x.to(stored), mask=m_d)
        tl.store(row_at(p_grad_y, o_out, ALIGNED) + o_d, (b_gate * b_grad_x).to(stored), mask=m_d)
        if SUMMED:
            b_gate_sum += b_grad_x * load_row(p_y, i_b * y_stride_b + i_n * y_stride_n, o_d, m_d, dtype, ALIGNED)
            b_shift_sum += b_grad_normed
            b_scale_sum += b_grad_normed * b_standard
    if SUMMED:
        o_sum, row = i_program * D, tl.cast(sums_stride_row, tl.int64)
        tl.store(row_at(p_sums, o_sum, ALIGNED) + o_d, b_gate_sum, mask=m_d)
        tl.store(row_at(p_sums, o_sum + row, ALIGNED) + o_d, b_shift_sum, mask=m_d)
        tl.store(row_at(p_sums, o_sum + 2 * row, ALIGNED) + o_d, b_scale_sum, mask=m_d)


def gate_residual_norm_modulate(
    x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The stream and its modulated norm; the arguments are checked by the caller."""
    hidden = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    normed = torch.empty_like(hidden)
    if hidden.numel() == 0:
        return hidden, normed
    x, y, gate, shift, scale = (with_rows(tensor) for tensor in (x_BND, y_BND, gate_BD, shift_BD, scale_BD))
    num_samples, num_rows, width = x.shape
    with torch.cuda.device_of(x):
        gate_residual_norm_modulate_kernel[(num_samples * num_rows,)](
            x, y, gate, shift, scale, hidden, normed,
            *x.stride()[:2], *y.stride()[:2], gate.stride(0), shift.stride(0), scale.stride(0), num_rows, width,
            EPS=eps, ALIGNED=rows_are_aligned(x, y, gate, shift, scale), **row_block(width), enable_fp_fusion=True,
        )  # fmt: skip
    return hidden, normed


def gate_residual_norm_modulate_backward(
    grad_hidden_BND: Tensor | None,
    grad_normed_BND: Tensor,
    hidden_BND: Tensor,
    y_BND: Tensor | None,
    gate_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, y, gate, shift and scale; the arguments are checked by the caller."""
    grad_x = torch.empty_like(hidden_BND, memory_format=torch.contiguous_format)
    grad_y = torch.empty_like(grad_x)
    summed = y_BND is not None
    sums = partial_sums(3, hidden_BND, wanted=summed)
    if grad_x.numel():
        grad_normed, hidden, gate, scale = (
            with_rows(tensor) for tensor in (grad_normed_BND, hidden_BND, gate_BD, scale_BD)
        )
        grad_hidden, y = (hidden if given is None else with_rows(given) for given in (grad_hidden_BND, y_BND))
        num_samples, num_rows, width = hidden.shape
        rows, num_chunks = chunks_of_rows(hidden, summed=summed)
        with torch.cuda.device_of(hidden):
            gate_residual_norm_modulate_backward_kernel[(num_samples * num_chunks,)](
                grad_hidden, grad_normed, hidden, y, gate, scale, grad_x, grad_y, sums,
                *grad_hidden.stride()[:2], *grad_normed.stride()[:2], *hidden.stride()[:2], *y.stride()[:2],
                gate.stride(0), scale.stride(0), sums.stride(0), num_chunks, num_rows, width,
                WITH_GRAD_HIDDEN=grad_hidden_BND is not None, SUMMED=summed, ROWS=rows, EPS=eps,
                ALIGNED=rows_are_aligned(grad_normed, hidden, gate, scale, grad_hidden, y),
                **row_block(width), enable_fp_fusion=True,
            )  # fmt: skip
    grad_gate, grad_shift, grad_scale = (add_up(partial, hidden_BND.dtype) for partial in sums)
    return grad_x, grad_y, grad_gate, grad_shift, grad_scale
