"""The gated residual in Triton. Equation, arguments and checks: dgpo_fast/ops/gate_residual.py.

Shape letters: B samples, N tokens, D width, C chunks of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.layer_norm import add_up, chunks_of_rows, load_row, partial_sums, row_block, with_rows


@triton.jit
def gate_residual_kernel(
    p_x,  # [B, N, D]
    p_y,  # [B, N, D]
    p_gate,  # [B, D]
    p_hidden,  # [B, N, D], contiguous
    x_stride_b,
    x_stride_n,
    y_stride_b,
    y_stride_n,
    gate_stride_b,
    N,
    D,
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

    b_x = load_row(p_x, i_b * x_stride_b + i_n * x_stride_n, o_d, m_d, dtype)
    b_y = load_row(p_y, i_b * y_stride_b + i_n * y_stride_n, o_d, m_d, dtype)
    b_gate = load_row(p_gate, i_b * gate_stride_b, o_d, m_d, dtype)
    tl.store(p_hidden + i_row * D + o_d, (b_x + b_gate * b_y).to(stored), mask=m_d)


@triton.jit
def gate_residual_backward_kernel(
    p_grad,  # [B, N, D]
    p_y,  # [B, N, D], not read unless SUMMED
    p_gate,  # [B, D]
    p_grad_y,  # [B, N, D], contiguous
    p_sums,  # [1, B, C, D], of the gradient of the gate; not written unless SUMMED
    grad_stride_b,
    grad_stride_n,
    y_stride_b,
    y_stride_n,
    gate_stride_b,
    num_chunks,  # C
    N,
    D,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_chunks
    first = (i_program % num_chunks) * ROWS
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    stored = p_grad_y.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    b_gate = load_row(p_gate, i_b * gate_stride_b, o_d, m_d, dtype)
    b_gate_sum = tl.zeros([BLOCK_D], dtype)
    for i_n in range(first, tl.minimum(first + ROWS, N)):
        b_grad = load_row(p_grad, i_b * grad_stride_b + i_n * grad_stride_n, o_d, m_d, dtype)
        tl.store(p_grad_y + (i_b * N + i_n) * D + o_d, (b_gate * b_grad).to(stored), mask=m_d)
        if SUMMED:
            b_gate_sum += b_grad * load_row(p_y, i_b * y_stride_b + i_n * y_stride_n, o_d, m_d, dtype)
    if SUMMED:
        tl.store(p_sums + i_program * D + o_d, b_gate_sum, mask=m_d)


def gate_residual(x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate y; the arguments are checked by the caller."""
    hidden = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    if hidden.numel() == 0:
        return hidden
    x, y, gate = with_rows(x_BND), with_rows(y_BND), with_rows(gate_BD)
    num_samples, num_rows, width = x.shape
    with torch.cuda.device_of(x):
        gate_residual_kernel[(num_samples * num_rows,)](
            x, y, gate, hidden,
            *x.stride()[:2], *y.stride()[:2], gate.stride(0), num_rows, width,
            **row_block(width), enable_fp_fusion=True,
        )  # fmt: skip
    return hidden


def gate_residual_backward(grad_BND: Tensor, y_BND: Tensor | None, gate_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and of the gate; the arguments are checked by the caller."""
    grad_y = torch.empty_like(grad_BND, memory_format=torch.contiguous_format)
    summed = y_BND is not None
    sums = partial_sums(1, grad_BND, wanted=summed)
    if grad_y.numel():
        grad, gate = with_rows(grad_BND), with_rows(gate_BD)
        y = grad if y_BND is None else with_rows(y_BND)
        num_samples, num_rows, width = grad.shape
        rows, num_chunks = chunks_of_rows(grad, summed=summed)
        with torch.cuda.device_of(grad):
            gate_residual_backward_kernel[(num_samples * num_chunks,)](
                grad, y, gate, grad_y, sums,
                *grad.stride()[:2], *y.stride()[:2], gate.stride(0), num_chunks, num_rows, width,
                SUMMED=summed, ROWS=rows, **row_block(width), enable_fp_fusion=True,
            )  # fmt: skip
    return grad_y, add_up(sums[0], grad_BND.dtype)
