"""The modulated layer norm in Triton. Equation, arguments and checks: dgpo_fast/ops/layer_norm_modulate.py.

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
def layer_norm_modulate_kernel(
    p_x,  # [B, N, D]
    p_shift,  # [B, D]
    p_scale,  # [B, D]
    p_y,  # [B, N, D], contiguous
    x_stride_b,
    x_stride_n,
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
    stored = p_y.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    b_x = load_row(p_x, i_b * x_stride_b + i_n * x_stride_n, o_d, m_d, dtype, ALIGNED)
    b_scale = load_row(p_scale, i_b * scale_stride_b, o_d, m_d, dtype, ALIGNED)
    b_shift = load_row(p_shift, i_b * shift_stride_b, o_d, m_d, dtype, ALIGNED)
    b_standard, _ = standardise(b_x, m_d, D, EPS)
    tl.store(row_at(p_y, i_row * D, ALIGNED) + o_d, (b_standard * (1 + b_scale) + b_shift).to(stored), mask=m_d)


@jit_told_alignment
def layer_norm_modulate_backward_kernel(
    p_grad,  # [B, N, D]
    p_x,  # [B, N, D]
    p_scale,  # [B, D]
    p_grad_x,  # [B, N, D], contiguous
    p_sums,  # [2, B, C, D], of the gradients of shift and scale; not written unless SUMMED
    grad_stride_b,
    grad_stride_n,
    x_stride_b,
    x_stride_n,
    scale_stride_b,
    sums_stride_row,
    num_chunks,  # C
    N,
    D,
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

    b_scale = load_row(p_scale, i_b * scale_stride_b, o_d, m_d, dtype, ALIGNED)
    b_shift_sum = tl.zeros([BLOCK_D], dtype)
    b_scale_sum = tl.zeros([BLOCK_D], dtype)
    for i_n in range(first, tl.minimum(first + ROWS, N)):
        b_x = load_row(p_x, i_b * x_stride_b + i_n * x_stride_n, o_d, m_d, dtype, ALIGNED)
        b_grad = load_row(p_grad, i_b * grad_stride_b + i_n * grad_stride_n, o_d, m_d, dtype, ALIGNED)
        b_standard, rstd = standardise(b_x, m_d, D, EPS)
        b_grad_x = standardise_backward(b_grad * (1 + b_scale), b_standard, rstd, D)
        tl.store(row_at(p_grad_x, (i_b * N + i_n) * D, ALIGNED) + o_d, b_grad_x.to(stored), mask=m_d)
        if SUMMED:
            b_shift_sum += b_grad
            b_scale_sum += b_grad * b_standard
    if SUMMED:
        o_sum, row = i_program * D, tl.cast(sums_stride_row, tl.int64)
        tl.store(row_at(p_sums, o_sum, ALIGNED) + o_d, b_shift_sum, mask=m_d)
        tl.store(row_at(p_sums, o_sum + row, ALIGNED) + o_d, b_scale_sum, mask=m_d)


def layer_norm_modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """The modulated norm; the arguments are checked by the caller."""
    y = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    x, shift, scale = with_rows(x_BND), with_rows(shift_BD), with_rows(scale_BD)
    num_samples, num_rows, width = x.shape
    with torch.cuda.device_of(x):
        layer_norm_modulate_kernel[(num_samples * num_rows,)](
            x, shift, scale, y,
            *x.stride()[:2], shift.stride(0), scale.stride(0), num_rows, width,
            EPS=eps, ALIGNED=rows_are_aligned(x, shift, scale), **row_block(width), enable_fp_fusion=True,
        )  # fmt: skip
    return y


def layer_norm_modulate_backward(
    grad_BND: Tensor, x_BND: Tensor, scale_BD: Tensor, eps: float, with_modulation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, shift and scale; the arguments are checked by the caller."""
    grad_x = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    sums = partial_sums(2, x_BND, wanted=with_modulation)
    if grad_x.numel():
        grad, x, scale = with_rows(grad_BND), with_rows(x_BND), with_rows(scale_BD)
        num_samples, num_rows, width = x.shape
        rows, num_chunks = chunks_of_rows(x, summed=with_modulation)
        with torch.cuda.device_of(x):
            layer_norm_modulate_backward_kernel[(num_samples * num_chunks,)](
                grad, x, scale, grad_x, sums,
                *grad.stride()[:2], *x.stride()[:2], scale.stride(0), sums.stride(0), num_chunks, num_rows, width,
                SUMMED=with_modulation, ROWS=rows, EPS=eps, ALIGNED=rows_are_aligned(grad, x, scale),
                **row_block(width), enable_fp_fusion=True,
            )  # fmt: skip
    grad_shift, grad_scale = (add_up(partial, x_BND.dtype) for partial in sums)
    return grad_x, grad_shift, grad_scale
