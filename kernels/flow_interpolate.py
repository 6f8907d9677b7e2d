"""The forward process in Triton. Equations, arguments and checks: dgpo_fast/ops/flow_interpolate.py.

Shape letters: B samples, G groups, N elements of one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.samples import flat_samples, load_noise, noise_source

# Four warps with eight elements a thread: two 16-byte loads of float32, or one of bfloat16, per thread and operand.
# Chosen from the machine code; not timed on a GPU yet.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def flow_interpolate_kernel(
    p_x0,  # [B, N]
    p_sigma,  # [B]
    p_noise,  # [G, N] of the dtype of x0, or, where DRAWN, the words of the streams, [G, 4] of int64
    p_group,  # [B]
    p_x_t,  # [B, N]
    p_target,  # [B, N], not written unless WITH_TARGET
    x0_stride_b,
    sigma_stride_b,
    noise_stride_g,
    group_stride_b,
    num_groups,
    num_blocks,  # blocks of one sample
    N,
    DRAWN: tl.constexpr,
    WITH_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One grid axis: the others end at 65535. 64-bit before it meets a stride.
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_blocks
    i_block = i_program % num_blocks
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    stored = p_x_t.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    i_g = tl.load(p_group + i_b * group_stride_b)
    sigma = tl.load(p_sigma + i_b * sigma_stride_b)
    # What cannot be interpolated becomes NaN: to raise would wait for the device.
    valid = (i_g >= 0) & (i_g < num_groups) & (sigma >= 0)
    sigma = tl.where(valid, sigma, float("nan")).to(dtype)
    i_g = tl.where(valid, i_g, 0)

    b_x0 = tl.load(p_x0 + i_b * x0_stride_b + o_n, mask=m_n).to(dtype)
    b_noise = load_noise(p_noise, noise_stride_g, i_g, i_block, o_n, m_n, DRAWN, BLOCK).to(dtype)
    o_out = i_b * N + o_n
    tl.store(p_x_t + o_out, ((1 - sigma) * b_x0 + sigma * b_noise).to(stored), mask=m_n)
    if WITH_TARGET:
        b_target = tl.where(valid, b_noise - b_x0, float("nan"))
        tl.store(p_target + o_out, b_target.to(stored), mask=m_n)


@triton.jit
def flow_interpolate_backward_kernel(
    p_grad_x_t,  # [B, N]
    p_grad_target,  # [B, N], not read unless WITH_TARGET
    p_sigma,  # [B]
    p_grad_x0,  # [B, N]
    grad_x_t_stride_b,
    grad_target_stride_b,
    sigma_stride_b,
    num_blocks,
    N,
    WITH_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_blocks
    o_n = (i_program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    stored = p_grad_x0.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    sigma = tl.load(p_sigma + i_b * sigma_stride_b).to(dtype)
    b_grad = (1 - sigma) * tl.load(p_grad_x_t + i_b * grad_x_t_stride_b + o_n, mask=m_n).to(dtype)
    if WITH_TARGET:
        b_grad -= tl.load(p_grad_target + i_b * grad_target_stride_b + o_n, mask=m_n).to(dtype)
    tl.store(p_grad_x0 + i_b * N + o_n, b_grad.to(stored), mask=m_n)


def flow_interpolate(
    x0: Tensor, sigma_B: Tensor, noise: Tensor | None, streams: Tensor | None, group_B: Tensor, with_target: bool
) -> tuple[Tensor, Tensor]:
    """x_t and v*; the arguments are checked by the caller."""
    x_t = torch.empty_like(x0, memory_format=torch.contiguous_format)
    target = torch.empty_like(x_t) if with_target else x_t.new_empty(0)
    samples = flat_samples(x0)
    source, drawn = noise_source(noise, streams)
    num_samples, numel = samples.shape
    if x_t.numel() == 0:
        return x_t, target
    num_blocks = triton.cdiv(numel, BLOCK)
    with torch.cuda.device_of(x0):
        flow_interpolate_kernel[(num_blocks * num_samples,)](
            samples, sigma_B, source, group_B, x_t, target,
            samples.stride(0), sigma_B.stride(0), source.stride(0), group_B.stride(0),
            len(source), num_blocks, numel,
            DRAWN=drawn, WITH_TARGET=with_target, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return x_t, target


def flow_interpolate_backward(grad_x_t: Tensor, grad_target: Tensor | None, sigma_B: Tensor) -> Tensor:
    """The gradient of x0; the arguments are checked by the caller."""
    grad_x0 = torch.empty_like(grad_x_t, memory_format=torch.contiguous_format)
    of_x_t = flat_samples(grad_x_t)
    of_target = of_x_t if grad_target is None else flat_samples(grad_target)
    num_samples, numel = of_x_t.shape
    if grad_x0.numel() == 0:
        return grad_x0
    num_blocks = triton.cdiv(numel, BLOCK)
    with torch.cuda.device_of(grad_x_t):
        flow_interpolate_backward_kernel[(num_blocks * num_samples,)](
            of_x_t, of_target, sigma_B, grad_x0,
            of_x_t.stride(0), of_target.stride(0), sigma_B.stride(0), num_blocks, numel,
            WITH_TARGET=grad_target is not None, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_x0
