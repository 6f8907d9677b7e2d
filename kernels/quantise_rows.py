"""Rows in fp8 in Triton. Equation, arguments and checks: dgpo_fast/ops/quantise_rows.py.

Shape letters: B samples, N tokens, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.layer_norm import load_row, with_rows

# Sixteen elements a thread: 16 bytes of fp8, the narrowest of what moves. Chosen from the machine code; not timed on a
# GPU yet.
ELEMENTS_PER_THREAD = 16
MAX_WARPS = 16

READ_AT_ONCE = 256
"""Scales that a product of CUTLASS reads for a tile, also behind the last token's: pytorch/pytorch#133334, of sm_90
before CUDA 12.9, and of sm_89."""


@triton.jit
def round_to_e4m3(x):
    """The e4m3 number nearest to `x`, |x| <= 448, ties to even, float32: so that the cast has nothing left to round.

    Triton's interpreter casts to fp8 with errors of a step, and more where a carry reaches the exponent.
    """
    magnitude = x.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(magnitude.to(tl.float32, bitcast=True), 0.015625)  # 2^-6: subnormal numbers share its step
    beside = power * 1572864  # 1.5 2^20: there the step of float32 is the 2^-3 of `power` that e4m3 has
    return (x + beside) - beside


@triton.jit
def quantise_rows_kernel(
    p_x,  # [B, N, D]
    p_values,  # [B, N, D], contiguous
    p_scale,  # [B, N]
    x_stride_b,
    x_stride_n,
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

    b_x = load_row(p_x, i_b * x_stride_b + i_n * x_stride_n, o_d, m_d, tl.float32)
    # The order of magnitudes is that of their bits, with NaN above all others: so it is not lost.
    largest = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    scale = largest * 0.002232142857142857  # 1 / 448
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    scale = tl.where(scale > 7.595588094610019e35, 7.595588094610019e35, scale)
    tl.store(p_scale + i_row, scale)
    scaled = b_x * tl.div_rn(1.0, scale)
    scaled = tl.where(scaled > 448, 448, tl.where(scaled < -448, -448, scaled))
    tl.store(p_values + i_row * D + o_d, round_to_e4m3(scaled).to(tl.float8e4nv), mask=m_d)


def quantise_rows(x_BND: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in fp8 and their scales; the argument is checked by the caller."""
    values = torch.empty_like(x_BND, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    num_scales = x_BND.shape[0] * x_BND.shape[1]
    room = -(-num_scales // READ_AT_ONCE) * READ_AT_ONCE
    scale = x_BND.new_empty(room, dtype=torch.float32)[:num_scales].view(*x_BND.shape[:2], 1)
    if values.numel():
        x = with_rows(x_BND)
        num_samples, num_rows, width = x.shape
        with torch.cuda.device_of(x):
            quantise_rows_kernel[(num_samples * num_rows,)](
                x, values, scale, *x.stride()[:2], num_rows, width,
                # A sum fused with the product before it would round once where the equation rounds twice.
                **row_block(width), enable_fp_fusion=False,
            )  # fmt: skip
    return values, scale


def row_block(width: int) -> dict[str, int]:
    """The block that holds a row, and the warps for it."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(MAX_WARPS, max(1, block // (32 * ELEMENTS_PER_THREAD)))}
