"""One SDE step in Triton. Equations, arguments and checks: dgpo_fast/ops/sde_step.py.

Shape letters: B samples, G groups, N elements of one sample, P blocks of one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.alignment import jit_told_alignment, row_at, rows_are_aligned
from dgpo_fast.kernels.samples import flat_samples, load_noise, noise_source

# Four warps with eight elements a thread: two 16-byte loads of float32, or one of bfloat16, per thread and operand.
# Chosen from the machine code; not timed on a GPU yet.
BLOCK = 1024
NUM_WARPS = 4
# One warp adds up a sample's blocks.
SUM_BLOCK = 32

HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def load_mean(p_x_row, p_velocity_row, p_of_x, o_n, m_n, dtype: tl.constexpr):
    """of_x x + of_velocity velocity: explicitly fused, to be the same bits in every kernel; and of_velocity."""
    of_x, of_velocity = tl.load(p_of_x).to(dtype), tl.load(p_of_x + 1).to(dtype)
    b_x = tl.load(p_x_row + o_n, mask=m_n, other=0)
    b_velocity = tl.load(p_velocity_row + o_n, mask=m_n, other=0).to(dtype)
    return tl.fma(of_velocity + tl.zeros_like(b_x), b_velocity, of_x * b_x), of_velocity


@jit_told_alignment
def sde_step_kernel(
    p_x,  # [B, N]
    p_velocity,  # [B, N]
    p_coefficients,  # [B, 3], contiguous
    p_noise,  # [G, N] of the dtype of x, or, where DRAWN, the words of the streams, [G, 4] of int64
    p_group,  # [B]
    p_x_next,  # [B, N], read where GIVEN, else written
    p_mean,  # [B, N], not written unless WITH_MEAN
    p_sums,  # [B, P]
    x_stride_b,
    velocity_stride_b,
    noise_stride_g,
    group_stride_b,
    x_next_stride_b,
    num_groups,
    num_blocks,  # P
    N,
    GIVEN: tl.constexpr,
    DRAWN: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One grid axis: the others end at 65535. 64-bit before it meets a stride.
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_blocks
    i_block = i_program % num_blocks
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    dtype = p_sums.dtype.element_ty

    p_of_x = p_coefficients + i_b * 3
    p_x_row = row_at(p_x, i_b * x_stride_b, ALIGNED)
    p_velocity_row = row_at(p_velocity, i_b * velocity_stride_b, ALIGNED)
    b_mean, _ = load_mean(p_x_row, p_velocity_row, p_of_x, o_n, m_n, dtype)
    if WITH_MEAN:
        tl.store(row_at(p_mean, i_b * N, ALIGNED) + o_n, b_mean, mask=m_n)
    p_next = row_at(p_x_next, i_b * x_next_stride_b, ALIGNED) + o_n
    if GIVEN:
        b_next = tl.load(p_next, mask=m_n, other=0)
    else:
        i_g = tl.load(p_group + i_b * group_stride_b)
        # A group that does not exist: to raise would wait for the device.
        valid = (i_g >= 0) & (i_g < num_groups)
        i_g = tl.where(valid, i_g, 0)
        b_z = load_noise(p_noise, noise_stride_g, i_g, i_block, o_n, m_n, DRAWN, BLOCK, ALIGNED).to(dtype)
        std = tl.where(valid, tl.load(p_of_x + 2).to(dtype), float("nan"))
        b_next = b_mean + std * b_z
        tl.store(p_next, b_next, mask=m_n)
    b_distance = tl.where(m_n, b_next - b_mean, 0)
    tl.store(p_sums + i_program, tl.sum(b_distance * b_distance, 0))


@triton.jit
def sde_log_prob_kernel(
    p_sums,  # [B, P]
    p_coefficients,  # [B, 3], contiguous
    p_log_prob,  # [B]
    num_blocks,  # P
    N,
    BLOCK: tl.constexpr,
):
    # In float64: these are a few numbers, and a ratio of densities is the exponential of their difference.
    i_b = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i_first in range(0, num_blocks, BLOCK):
        o_p = i_first + tl.arange(0, BLOCK)
        b_sum += tl.load(p_sums + i_b * num_blocks + o_p, mask=o_p < num_blocks, other=0).to(tl.float64)
    stored = p_log_prob.dtype.element_ty
    std = tl.load(p_coefficients + i_b * 3 + 2).to(tl.float64)
    log_prob = -tl.sum(b_sum, 0) / N / (2 * std * std) - tl.log(std) - HALF_LOG_TWO_PI
    tl.store(p_log_prob + i_b, tl.where(std == 0, 0, log_prob).to(stored))


@triton.jit
def sde_step_backward_kernel(
    p_grad_mean,  # [B, N], not read unless OF_MEAN
    p_grad_log_prob,  # [B], not read unless OF_LOG_PROB
    p_x,  # [B, N]
    p_velocity,  # [B, N]
    p_coefficients,  # [B, 3], contiguous
    p_x_next,  # [B, N]
    p_grad_velocity,  # [B, N]
    grad_mean_stride_b,
    grad_log_prob_stride_b,
    x_stride_b,
    velocity_stride_b,
    x_next_stride_b,
    num_blocks,
    N,
    OF_MEAN: tl.constexpr,
    OF_LOG_PROB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_blocks
    o_n = (i_program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    dtype = p_x.dtype.element_ty

    p_of_x = p_coefficients + i_b * 3
    p_x_row, p_velocity_row = p_x + i_b * x_stride_b, p_velocity + i_b * velocity_stride_b
    b_mean, of_velocity = load_mean(p_x_row, p_velocity_row, p_of_x, o_n, m_n, dtype)
    b_grad = tl.zeros([BLOCK], dtype)
    if OF_MEAN:
        b_grad += tl.load(p_grad_mean + i_b * grad_mean_stride_b + o_n, mask=m_n)
    if OF_LOG_PROB:
        std = tl.load(p_of_x + 2).to(dtype)
        of_distance = tl.load(p_grad_log_prob + i_b * grad_log_prob_stride_b) / (N * std * std)
        b_next = tl.load(p_x_next + i_b * x_next_stride_b + o_n, mask=m_n)
        b_grad += tl.where(std == 0, 0, of_distance) * (b_next - b_mean)
    b_grad = (of_velocity * b_grad).to(p_grad_velocity.dtype.element_ty)
    tl.store(p_grad_velocity + i_b * N + o_n, b_grad, mask=m_n)


def sde_step(
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    group_B: Tensor | None,
    x_next: Tensor | None,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, unless it is given, mean and log_prob; the arguments are checked by the caller."""
    drawn = x.new_empty(x.shape if x_next is None else (0,))
    mean = x.new_empty(x.shape if with_mean else (0,))
    log_prob_B = x.new_empty(len(x))
    coefficients = coefficients_B3.contiguous()
    if x.numel() == 0:  # the mean over no element is no number
        return drawn, mean, log_prob_B.copy_(torch.where(coefficients[:, 2] == 0, 0, float("nan")))
    samples, v = flat_samples(x), flat_samples(velocity)
    following = flat_samples(drawn if x_next is None else x_next)
    source, is_drawn = noise_source(noise, streams) if x_next is None else (following, False)
    group = samples if group_B is None else group_B
    num_samples, numel = samples.shape
    num_blocks = triton.cdiv(numel, BLOCK)
    sums = x.new_empty(num_samples, num_blocks)
    rows = [samples, v, following] if noise is None else [samples, v, following, source]
    with torch.cuda.device_of(x):
        sde_step_kernel[(num_blocks * num_samples,)](
            samples, v, coefficients, source, group, following, mean, sums,
            samples.stride(0), v.stride(0), source.stride(0), group.stride(0), following.stride(0),
            len(source), num_blocks, numel,
            GIVEN=x_next is not None, DRAWN=is_drawn, WITH_MEAN=with_mean, ALIGNED=rows_are_aligned(*rows),
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        sde_log_prob_kernel[(num_samples,)](
            sums, coefficients, log_prob_B, num_blocks, numel, BLOCK=SUM_BLOCK, num_warps=1, enable_fp_fusion=True
        )
    return drawn, mean, log_prob_B


def sde_step_backward(
    grad_mean: Tensor | None,
    grad_log_prob_B: Tensor | None,
    x: Tensor,
    velocity: Tensor,
    coefficients_B3: Tensor,
    x_next: Tensor,
) -> Tensor:
    """The gradient of velocity; the arguments are checked by the caller."""
    grad_velocity = torch.empty_like(velocity, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return grad_velocity
    samples, v, following = flat_samples(x), flat_samples(velocity), flat_samples(x_next)
    of_mean = samples if grad_mean is None else flat_samples(grad_mean)
    of_log_prob = samples if grad_log_prob_B is None else grad_log_prob_B
    num_samples, numel = samples.shape
    num_blocks = triton.cdiv(numel, BLOCK)
    with torch.cuda.device_of(x):
        sde_step_backward_kernel[(num_blocks * num_samples,)](
            of_mean, of_log_prob, samples, v, coefficients_B3.contiguous(), following, grad_velocity,
            of_mean.stride(0), of_log_prob.stride(0), samples.stride(0), v.stride(0), following.stride(0),
            num_blocks, numel,
            OF_MEAN=grad_mean is not None, OF_LOG_PROB=grad_log_prob_B is not None,
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_velocity
