"""Advantages in Triton. Equation, arguments and checks: dgpo_fast/ops/group_advantages.py.

Shape letters: B samples ordered by group, G groups, S samples of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.numbers import two_parts, whole

# Samples at a time: a group of 32 in one go.
BLOCK = 128
NUM_WARPS = 1


@triton.jit
def moments(p_reward, p_valid, first, n, BLOCK: tl.constexpr):
    """Population mean and deviation of the valid ones of n rewards, float64; equal ones deviate by exactly 0."""
    b_sum, b_count = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    b_lowest = tl.full([BLOCK], float("inf"), tl.float64)
    b_highest = -b_lowest
    for o_block in range(0, n, BLOCK):
        o_b = o_block + tl.arange(0, BLOCK)
        m_b = (o_b < n) & (tl.load(p_valid + first + o_b, mask=o_b < n, other=0) != 0)
        b_reward = tl.load(p_reward + first + o_b, mask=m_b, other=0).to(tl.float64)
        b_sum += b_reward
        b_count += m_b.to(tl.float64)
        b_lowest = tl.where(m_b, tl.minimum(b_lowest, b_reward), b_lowest)
        b_highest = tl.where(m_b, tl.maximum(b_highest, b_reward), b_highest)
    count, lowest, highest = tl.sum(b_count, 0), tl.min(b_lowest, 0), tl.max(b_highest, 0)
    mean = tl.sum(b_sum, 0) / tl.maximum(count, 1)
    b_squares = tl.zeros([BLOCK], tl.float64)
    for o_block in range(0, n, BLOCK):
        o_b = o_block + tl.arange(0, BLOCK)
        m_b = (o_b < n) & (tl.load(p_valid + first + o_b, mask=o_b < n, other=0) != 0)
        b_gap = tl.load(p_reward + first + o_b, mask=m_b, other=0).to(tl.float64) - mean
        b_squares += tl.where(m_b, b_gap * b_gap, 0)
    deviation = tl.sqrt(tl.sum(b_squares, 0) / tl.maximum(count, 1))
    # A sum that is no number is equal to nothing, though minimum and maximum may not see why.
    equal = (count == 0) | ((lowest == highest) & (tl.abs(mean) < float("inf")))
    return tl.where(equal, highest, mean), tl.where(equal, 0.0, deviation)


@triton.jit
def group_advantages_kernel(
    p_reward,  # [B]
    p_valid,  # [B]
    p_advantage,  # [B]
    p_std,  # [G]
    p_clamped,  # [B]
    epsilon,
    epsilon_rest,
    clamp,
    clamp_rest,
    num_samples,  # B
    group_size,  # S
    GLOBAL_STD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program for each group. With GLOBAL_STD each looks at all rewards: they are few, and a second launch costs more.
    i_g = tl.program_id(0).to(tl.int64)
    first = i_g * group_size
    mean, deviation = moments(p_reward, p_valid, first, group_size, BLOCK)
    tl.store(p_std + i_g, deviation)
    spread = deviation
    if GLOBAL_STD:
        _, spread = moments(p_reward, p_valid, first * 0, num_samples, BLOCK)
    spread += whole(epsilon, epsilon_rest)
    limit = whole(clamp, clamp_rest)
    for o_block in range(0, group_size, BLOCK):
        o_s = o_block + tl.arange(0, BLOCK)
        m_s = o_s < group_size
        b_valid = tl.load(p_valid + first + o_s, mask=m_s, other=0) != 0
        b_reward = tl.load(p_reward + first + o_s, mask=m_s & b_valid, other=0).to(tl.float64)
        b_raw = tl.where(b_valid, (b_reward - mean) / spread, 0.0)
        b_advantage = tl.where(b_raw > limit, limit, tl.where(b_raw < -limit, -limit, b_raw))
        tl.store(p_advantage + first + o_s, b_advantage, mask=m_s)
        tl.store(p_clamped + first + o_s, b_advantage != b_raw, mask=m_s)


def group_advantages(
    reward_B: Tensor, valid_B: Tensor, group_size: int, global_std: bool, epsilon: float, clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, deviations and what was clamped; the arguments are checked by the caller."""
    reward, valid = reward_B.contiguous(), valid_B.contiguous()
    advantage_B, clamped_B = torch.empty_like(reward), torch.empty_like(valid)
    num_groups = len(reward) // group_size
    std_G = reward.new_empty(num_groups)
    if num_groups:
        with torch.cuda.device_of(reward):
            group_advantages_kernel[(num_groups,)](
                reward, valid, advantage_B, std_G, clamped_B,
                *two_parts(epsilon), *two_parts(clamp), len(reward), group_size,
                GLOBAL_STD=global_std, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return advantage_B, std_G, clamped_B
