"""GELU of a biased input in Triton. Equations, arguments and checks: dgpo_fast/ops/bias_gelu.py.

Shape letters: R rows (samples and tokens), D width, P blocks of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.numbers import reciprocal

# 512 divides the width of the MLPs of SD3.5-M (6144) and SD3.5-L (9728). Four warps with 16 elements a thread: two
# 16-byte loads of bfloat16 per thread and operand. Chosen from the machine code; not timed on a GPU yet.
BLOCK_R = 4
BLOCK_D = 512
NUM_WARPS = 4

# Blocks of rows that a program adds up for the bias, which it writes in float32: 32 rows in bfloat16 are read and
# written in 48 times the bytes of their sum.
STEPS = 8


@triton.jit
def logistic_parts(u):
    """s and s (1 - s) of s = 1 / (1 + exp(-z)), and dz / du: nothing overflows or cancels while |u| <= 32."""
    LINEAR: tl.constexpr = 1.5957691216057307  # 2 sqrt(2 / pi)
    CUBIC: tl.constexpr = 0.044715 * 1.5957691216057307
    square = u * u
    e = tl.exp(-tl.abs(u * (LINEAR + CUBIC * square)))
    larger = reciprocal(1 + e)
    return tl.where(u < 0, e * larger, larger), e * larger * larger, LINEAR + 3 * CUBIC * square


@triton.jit
def bias_gelu_kernel(
    p_x,  # [R, D]
    p_bias,  # [D]
    p_y,  # [R, D]
    x_stride_r,
    num_blocks,  # of columns
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One grid axis: the others end at 65535. 64-bit before it meets a stride.
    i_program = tl.program_id(0).to(tl.int64)
    o_r = (i_program // num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_d = (i_program % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    m = (o_r < R) & m_d
    stored = p_y.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    b_bias = tl.load(p_bias + o_d, mask=m_d).to(dtype)
    u = tl.load(p_x + o_r * x_stride_r + o_d, mask=m).to(dtype) + b_bias
    # Not further down, where u^3 overflows: minus infinity times zero would be no number.
    u = tl.where(u < -32, -32, u)
    s, _, _ = logistic_parts(u)
    tl.store(p_y + o_r * D + o_d, (u * s).to(stored), mask=m)


@triton.jit
def bias_gelu_backward_kernel(
    p_grad,  # [R, D]
    p_x,  # [R, D]
    p_bias,  # [D]
    p_grad_x,  # [R, D]
    p_sums,  # [P, D], not written unless WITH_BIAS
    grad_stride_r,
    x_stride_r,
    num_blocks,  # of columns
    R,
    D,
    WITH_BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_p = i_program // num_blocks
    o_d = (i_program % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    stored = p_grad_x.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    b_bias = tl.load(p_bias + o_d, mask=m_d).to(dtype)
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], dtype)
    for step in range(STEPS):
        o_r = (i_p * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        m = (o_r < R) & m_d
        u = tl.load(p_x + o_r * x_stride_r + o_d, mask=m, other=0).to(dtype) + b_bias
        u = tl.where(u < -32, -32, tl.where(u > 32, 32, u))
        s, s_rest, slope = logistic_parts(u)
        b_grad = tl.load(p_grad + o_r * grad_stride_r + o_d, mask=m, other=0).to(dtype) * (s + u * slope * s_rest)
        tl.store(p_grad_x + o_r * D + o_d, b_grad.to(stored), mask=m)
        b_sum += b_grad
    if WITH_BIAS:
        tl.store(p_sums + i_p * D + o_d, tl.sum(b_sum, 0, keep_dims=True), mask=m_d)


def bias_gelu(x: Tensor, bias_D: Tensor) -> Tensor:
    """gelu(x + bias); the arguments are checked by the caller."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    rows = flat_rows(x)
    num_rows, width = rows.shape
    num_blocks = triton.cdiv(width, BLOCK_D)
    with torch.cuda.device_of(x):
        bias_gelu_kernel[(num_blocks * triton.cdiv(num_rows, BLOCK_R),)](
            rows, bias_D.contiguous(), y, rows.stride(0), num_blocks, num_rows, width,
            BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def bias_gelu_backward(grad: Tensor, x: Tensor, bias_D: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and, where asked for, of the bias; the arguments are checked by the caller."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return grad_x, x.new_zeros(bias_D.shape if with_bias else 0)
    rows, grads = flat_rows(x), flat_rows(grad)
    num_rows, width = rows.shape
    steps = STEPS if with_bias else 1
    num_blocks, num_sums = triton.cdiv(width, BLOCK_D), triton.cdiv(num_rows, steps * BLOCK_R)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty(num_sums if with_bias else 0, width, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        bias_gelu_backward_kernel[(num_blocks * num_sums,)](
            grads, rows, bias_D.contiguous(), grad_x, sums,
            grads.stride(0), rows.stride(0), num_blocks, num_rows, width,
            WITH_BIAS=with_bias, STEPS=steps, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_x, sums.sum(0).to(x.dtype) if with_bias else x.new_empty(0)


def flat_rows(x: Tensor) -> Tensor:
    """`x` as [R, D] with rows of unit stride; a view if it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
