"""Denoising errors in Triton. Equations, arguments and checks: dgpo_fast/ops/velocity_errors.py.

Shape letters: M samples, G groups, N elements of one sample, P blocks of one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.alignment import jit_told_alignment, row_at, rows_are_aligned
from dgpo_fast.kernels.numbers import quotient, two_parts, whole
from dgpo_fast.kernels.samples import flat_samples, load_noise, noise_source

# Four warps with eight elements a thread: two 16-byte loads of float32, or one of bfloat16, per thread and operand.
# Chosen from the machine code; not timed on a GPU yet.
BLOCK = 1024
NUM_WARPS = 4
# Sums of blocks at a time: a latent of 512 x 512 pixels has 64.
SUMS_BLOCK = 64


@triton.jit
def load_guided(
    p_reference_row,
    p_unconditional_row,
    o_n,
    m_n,
    guidance,
    guidance_rest,
    GUIDED: tl.constexpr,
    dtype: tl.constexpr,
):
    """The reference's velocity, guided where GUIDED."""
    b_reference = tl.load(p_reference_row + o_n, mask=m_n, other=0).to(dtype)
    if GUIDED:
        scale = whole(guidance, guidance_rest).to(dtype)
        b_unconditional = tl.load(p_unconditional_row + o_n, mask=m_n, other=0).to(dtype)
        b_reference = b_unconditional + scale * (b_reference - b_unconditional)
    return b_reference


@jit_told_alignment
def velocity_errors_kernel(
    p_velocity,  # [M, N]
    p_x0,  # [M, N]
    p_noise,  # [G, N] of the dtype of x0, or, where DRAWN, the words of the streams, [G, 4] of int64
    p_group,  # [M]
    p_old,  # [M, N], not read unless OLD
    p_reference,  # [M, N], not read unless REFERENCE
    p_unconditional,  # [M, N], not read unless GUIDED
    p_sums,  # [4, M, P]
    velocity_stride_m,
    x0_stride_m,
    noise_stride_g,
    group_stride_m,
    old_stride_m,
    reference_stride_m,
    unconditional_stride_m,
    sums_stride_row,
    guidance,
    guidance_rest,
    num_groups,
    num_blocks,  # P
    N,
    DRAWN: tl.constexpr,
    OLD: tl.constexpr,
    REFERENCE: tl.constexpr,
    GUIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One grid axis: the others end at 65535. 64-bit before it meets a stride.
    i_program = tl.program_id(0).to(tl.int64)
    i_m = i_program // num_blocks
    i_block = i_program % num_blocks
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    dtype = p_sums.dtype.element_ty

    i_g = tl.load(p_group + i_m * group_stride_m)
    valid = (i_g >= 0) & (i_g < num_groups)
    i_g = tl.where(valid, i_g, 0)
    b_noise = load_noise(p_noise, noise_stride_g, i_g, i_block, o_n, m_n, DRAWN, BLOCK, ALIGNED).to(dtype)
    b_target = b_noise - tl.load(row_at(p_x0, i_m * x0_stride_m, ALIGNED) + o_n, mask=m_n, other=0)
    # A group that does not exist: to raise would wait for the device.
    b_target = tl.where(m_n, tl.where(valid, b_target, float("nan")), 0)
    p_velocity_row = row_at(p_velocity, i_m * velocity_stride_m, ALIGNED)
    b_velocity = tl.load(p_velocity_row + o_n, mask=m_n, other=0).to(dtype)

    p_sum, row = p_sums + i_m * num_blocks + i_block, tl.cast(sums_stride_row, tl.int64)
    b_policy = b_velocity - b_target
    tl.store(p_sum, tl.sum(b_policy * b_policy, 0))
    if OLD:
        p_old_row = row_at(p_old, i_m * old_stride_m, ALIGNED)
        b_old = tl.load(p_old_row + o_n, mask=m_n, other=0).to(dtype) - b_target
        tl.store(p_sum + row, tl.sum(b_old * b_old, 0))
    if REFERENCE:
        p_reference_row = row_at(p_reference, i_m * reference_stride_m, ALIGNED)
        p_unconditional_row = row_at(p_unconditional, i_m * unconditional_stride_m, ALIGNED)
        b_guided = load_guided(p_reference_row, p_unconditional_row, o_n, m_n, guidance, guidance_rest, GUIDED, dtype)
        b_reference, b_distance = b_guided - b_target, b_velocity - b_guided
        tl.store(p_sum + 2 * row, tl.sum(b_reference * b_reference, 0))
        tl.store(p_sum + 3 * row, tl.sum(b_distance * b_distance, 0))


@triton.jit
def velocity_errors_mean_kernel(
    p_sums,  # [4, M, P]
    p_policy,  # [M]
    p_old,  # [M], not written unless OLD
    p_reference,  # [M], not written unless REFERENCE
    p_distance,  # [M], not written unless REFERENCE
    sums_stride_row,
    num_blocks,  # P
    N,
    OLD: tl.constexpr,
    REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    p_row, row = p_sums + i_m * num_blocks, tl.cast(sums_stride_row, tl.int64)
    tl.store(p_policy + i_m, quotient(sum_of_row(p_row, num_blocks, BLOCK), N))
    if OLD:
        tl.store(p_old + i_m, quotient(sum_of_row(p_row + row, num_blocks, BLOCK), N))
    if REFERENCE:
        tl.store(p_reference + i_m, quotient(sum_of_row(p_row + 2 * row, num_blocks, BLOCK), N))
        tl.store(p_distance + i_m, quotient(sum_of_row(p_row + 3 * row, num_blocks, BLOCK), N))


@triton.jit
def sum_of_row(p_row, num_numbers, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], p_row.dtype.element_ty)
    for o_block in range(0, num_numbers, BLOCK):
        o_n = o_block + tl.arange(0, BLOCK)
        b_sum += tl.load(p_row + o_n, mask=o_n < num_numbers, other=0)
    return tl.sum(b_sum, 0)


@triton.jit
def velocity_errors_backward_kernel(
    p_grad_policy,  # [M]
    p_grad_distance,  # [M], not read unless REFERENCE
    p_velocity,  # [M, N]
    p_x0,  # [M, N]
    p_noise,  # [G, N] of the dtype of x0, or, where DRAWN, the words of the streams, [G, 4] of int64
    p_group,  # [M]
    p_reference,  # [M, N], not read unless REFERENCE
    p_unconditional,  # [M, N], not read unless GUIDED
    p_grad_velocity,  # [M, N]
    velocity_stride_m,
    x0_stride_m,
    noise_stride_g,
    group_stride_m,
    reference_stride_m,
    unconditional_stride_m,
    guidance,
    guidance_rest,
    num_groups,
    num_blocks,
    N,
    DRAWN: tl.constexpr,
    REFERENCE: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_m = i_program // num_blocks
    i_block = i_program % num_blocks
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    dtype = p_grad_policy.dtype.element_ty

    i_g = tl.load(p_group + i_m * group_stride_m)
    valid = (i_g >= 0) & (i_g < num_groups)
    b_noise = load_noise(p_noise, noise_stride_g, tl.where(valid, i_g, 0), i_block, o_n, m_n, DRAWN, BLOCK).to(dtype)
    b_target = b_noise - tl.load(p_x0 + i_m * x0_stride_m + o_n, mask=m_n)
    b_target = tl.where(valid, b_target, float("nan"))
    b_velocity = tl.load(p_velocity + i_m * velocity_stride_m + o_n, mask=m_n).to(dtype)
    b_grad = 2 * quotient(tl.load(p_grad_policy + i_m), N) * (b_velocity - b_target)
    if REFERENCE:
        p_reference_row = p_reference + i_m * reference_stride_m
        p_unconditional_row = p_unconditional + i_m * unconditional_stride_m
        b_guided = load_guided(p_reference_row, p_unconditional_row, o_n, m_n, guidance, guidance_rest, GUIDED, dtype)
        b_grad += 2 * quotient(tl.load(p_grad_distance + i_m), N) * (b_velocity - b_guided)
    tl.store(p_grad_velocity + i_m * N + o_n, b_grad.to(p_grad_velocity.dtype.element_ty), mask=m_n)


def velocity_errors(
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
    """The errors, [M] each or [0]; the arguments are checked by the caller."""
    num_samples = len(x0)
    counts = [num_samples, *(0 if given is None else num_samples for given in (old, reference, reference))]
    policy_M, old_M, reference_M, distance_M = errors = [x0.new_empty(count) for count in counts]
    if x0.numel() == 0:
        policy_M, old_M, reference_M, distance_M = (error.fill_(float("nan")) for error in errors)
        return policy_M, old_M, reference_M, distance_M
    numel = x0.numel() // num_samples
    num_blocks = triton.cdiv(numel, BLOCK)
    sums = x0.new_empty(4, num_samples, num_blocks)
    v, samples = flat_samples(velocity), flat_samples(x0)
    source, drawn = noise_source(noise, streams)
    v_old, v_ref, v_uncond = (v if given is None else flat_samples(given) for given in (old, reference, unconditional))
    rows = [v, samples, v_old, v_ref, v_uncond] if drawn else [v, samples, v_old, v_ref, v_uncond, source]
    with torch.cuda.device_of(x0):
        velocity_errors_kernel[(num_blocks * num_samples,)](
            v, samples, source, group_M, v_old, v_ref, v_uncond, sums,
            v.stride(0), samples.stride(0), source.stride(0), group_M.stride(0),
            v_old.stride(0), v_ref.stride(0), v_uncond.stride(0),
            sums.stride(0), *two_parts(guidance), len(source), num_blocks, numel,
            DRAWN=drawn, OLD=old is not None, REFERENCE=reference is not None, GUIDED=unconditional is not None,
            ALIGNED=rows_are_aligned(*rows), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        velocity_errors_mean_kernel[(num_samples,)](
            sums, *errors, sums.stride(0), num_blocks, numel,
            OLD=old is not None, REFERENCE=reference is not None, BLOCK=SUMS_BLOCK, num_warps=1,
        )  # fmt: skip
    return policy_M, old_M, reference_M, distance_M


def velocity_errors_backward(
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
    """The gradient of velocity; the arguments are checked by the caller."""
    grad_velocity = torch.empty_like(velocity, memory_format=torch.contiguous_format)
    if x0.numel() == 0:
        return grad_velocity
    num_samples, numel = len(x0), x0[0].numel()
    num_blocks = triton.cdiv(numel, BLOCK)
    v, samples = flat_samples(velocity), flat_samples(x0)
    source, drawn = noise_source(noise, streams)
    v_ref, v_uncond = (v if given is None else flat_samples(given) for given in (reference, unconditional))
    grads = grad_policy_M.contiguous()
    distance_grads = grads if grad_distance_M is None else grad_distance_M.contiguous()
    with torch.cuda.device_of(x0):
        velocity_errors_backward_kernel[(num_blocks * num_samples,)](
            grads, distance_grads, v, samples, source, group_M, v_ref, v_uncond, grad_velocity,
            v.stride(0), samples.stride(0), source.stride(0), group_M.stride(0), v_ref.stride(0), v_uncond.stride(0),
            *two_parts(guidance), len(source), num_blocks, numel,
            DRAWN=drawn, REFERENCE=grad_distance_M is not None, GUIDED=unconditional is not None,
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_velocity
