"""The group-preference loss in Triton. Equations, arguments and checks: dgpo_fast/ops/group_preference.py.

Shape letters: M samples, G groups. One program does it all, sums in float64: a micro-batch has tens of samples, and a
launch costs more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.numbers import two_parts, whole

# Samples at a time: more than a micro-batch has.
BLOCK = 128
NUM_WARPS = 1


@triton.jit
def load_of_group(p_numbers, p_group, i_g, o_m, M):
    """The numbers of the samples of group `i_g` among `o_m`, float64, and 0 of the others."""
    m_m = o_m < M
    m_mine = m_m & (tl.load(p_group + o_m, mask=m_m, other=-1) == i_g)
    return tl.load(p_numbers + o_m, mask=m_mine, other=0).to(tl.float64)


@triton.jit
def score_of_group(p_error, p_reference, p_advantage, p_group, p_size, i_g, beta, M, BLOCK: tl.constexpr):
    """s_G of group `i_g`, float64."""
    b_sum = tl.zeros([BLOCK], tl.float64)
    for o_block in range(0, M, BLOCK):
        o_m = o_block + tl.arange(0, BLOCK)
        b_gap = load_of_group(p_error, p_group, i_g, o_m, M) - load_of_group(p_reference, p_group, i_g, o_m, M)
        b_sum += load_of_group(p_advantage, p_group, i_g, o_m, M) * b_gap
    return beta * tl.sum(b_sum, 0) / tl.load(p_size + i_g).to(tl.float64)


@triton.jit
def softplus(s):
    """log(1 + exp(s)) without overflow."""
    z = tl.exp(-tl.abs(s))
    u = 1 + z
    # log(1 + z) to the last digits of a small z: what u lost in rounding, the quotient gives back.
    log1p = tl.where(u == 1, z, tl.log(u) * (z / tl.where(u == 1, 1, u - 1)))
    return tl.maximum(s, 0) + log1p


@triton.jit
def sigmoid(s):
    """1 / (1 + exp(-s)) without overflow."""
    z = tl.exp(-tl.abs(s))
    return tl.where(s >= 0, 1, z) / (1 + z)


@triton.jit
def group_scores_kernel(
    p_error,  # [M]
    p_reference,  # [M]
    p_advantage,  # [M]
    p_group,  # [M]
    p_size,  # [G]
    p_score,  # [G]
    beta,
    beta_rest,
    M,
    BLOCK: tl.constexpr,
):
    i_g = tl.program_id(0).to(tl.int64)
    scale = whole(beta, beta_rest)
    score = score_of_group(p_error, p_reference, p_advantage, p_group, p_size, i_g, scale, M, BLOCK)
    tl.store(p_score + i_g, score)


@triton.jit
def group_preference_kernel(
    p_error,  # [M]
    p_reference,  # [M]
    p_advantage,  # [M]
    p_group,  # [M]
    p_size,  # [G]
    p_score,  # [G], not read unless SCORED
    p_old,  # [M], not read unless CLIPPED
    p_objective,
    p_surrogate,
    p_weight,  # [G]
    p_clipped,  # [M]
    beta,
    beta_rest,
    highest_ratio,  # 1 + clip
    highest_rest,
    lowest_ratio,  # 1 - clip
    lowest_rest,
    num_groups,
    M,
    SCORED: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # In the dtype of the errors, as the ratio is exactly 1 there for equal ones.
    dtype = p_error.dtype.element_ty
    highest, lowest = whole(highest_ratio, highest_rest).to(dtype), whole(lowest_ratio, lowest_rest).to(dtype)
    num_lost = tl.zeros([BLOCK], tl.int32)
    for o_block in range(0, M, BLOCK):
        o_m = o_block + tl.arange(0, BLOCK)
        m_m = o_m < M
        b_group = tl.load(p_group + o_m, mask=m_m, other=0)
        num_lost += tl.where(m_m & ((b_group < 0) | (b_group >= num_groups)), 1, 0)
        b_clipped = tl.zeros([BLOCK], tl.int1)
        if CLIPPED:
            b_ratio = tl.exp(tl.load(p_old + o_m, mask=m_m, other=0) - tl.load(p_error + o_m, mask=m_m, other=0))
            b_advantage = tl.load(p_advantage + o_m, mask=m_m, other=0)
            b_clipped = tl.where(b_advantage > 0, b_ratio > highest, b_ratio < lowest)
        tl.store(p_clipped + o_m, b_clipped, mask=m_m)

    scale = whole(beta, beta_rest)
    objective = tl.zeros([], tl.float64)
    b_surrogate = tl.zeros([BLOCK], tl.float64)
    for i_g in range(num_groups):
        if SCORED:
            score = tl.load(p_score + i_g).to(tl.float64)
        else:
            score = score_of_group(p_error, p_reference, p_advantage, p_group, p_size, i_g, scale, M, BLOCK)
        weight = sigmoid(score)
        tl.store(p_weight + i_g, weight)
        objective += softplus(score)
        share = weight / tl.load(p_size + i_g).to(tl.float64)
        for o_block in range(0, M, BLOCK):
            o_m = o_block + tl.arange(0, BLOCK)
            b_error = load_of_group(p_error, p_group, i_g, o_m, M)
            b_surrogate += share * load_of_group(p_advantage, p_group, i_g, o_m, M) * b_error
    # A group that does not exist: to raise would wait for the device.
    lost = tl.sum(num_lost, 0) > 0
    tl.store(p_objective, tl.where(lost, float("nan"), objective / scale))
    tl.store(p_surrogate, tl.where(lost, float("nan"), tl.sum(b_surrogate, 0)))


@triton.jit
def group_preference_backward_kernel(
    p_grad,
    p_weight,  # [G]
    p_advantage,  # [M]
    p_group,  # [M]
    p_size,  # [G]
    p_clipped,  # [M]
    p_grad_error,  # [M]
    num_groups,
    M,
    BLOCK: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < M
    b_group = tl.load(p_group + o_m, mask=m_m, other=0)
    m_there = m_m & (b_group >= 0) & (b_group < num_groups)
    b_weight = tl.load(p_weight + b_group, mask=m_there, other=float("nan"))
    b_weight = b_weight / tl.load(p_size + b_group, mask=m_there, other=1)
    b_grad = tl.load(p_grad) * b_weight * tl.load(p_advantage + o_m, mask=m_m, other=0)
    b_clipped = tl.load(p_clipped + o_m, mask=m_m, other=0)
    tl.store(p_grad_error + o_m, tl.where(b_clipped != 0, 0, b_grad), mask=m_m)


def group_scores(
    error_M: Tensor, reference_error_M: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, beta: float
) -> Tensor:
    """The scores, [G]; the arguments are checked by the caller."""
    score_G = torch.empty_like(size_G, memory_format=torch.contiguous_format)
    inputs = (each.contiguous() for each in (error_M, reference_error_M, advantage_M, group_M, size_G))
    if score_G.numel():
        with torch.cuda.device_of(error_M):
            group_scores_kernel[(len(size_G),)](
                *inputs, score_G, *two_parts(beta), len(error_M), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return score_G


def group_preference(
    error_M: Tensor,
    reference_error_M: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    score_G: Tensor | None,
    old_error_M: Tensor | None,
    beta: float,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Objective, surrogate, weights and clipped samples; the arguments are checked by the caller."""
    error, reference, advantage, group, size = (
        each.contiguous() for each in (error_M, reference_error_M, advantage_M, group_M, size_G)
    )
    objective, surrogate = error.new_empty(()), error.new_empty(())
    weight_G, clipped_M = torch.empty_like(size), torch.empty_like(group, dtype=torch.bool)
    with torch.cuda.device_of(error):
        group_preference_kernel[(1,)](
            error, reference, advantage, group, size,
            size if score_G is None else score_G.contiguous(),
            error if old_error_M is None else old_error_M.contiguous(),
            objective, surrogate, weight_G, clipped_M,
            *two_parts(beta), *two_parts(1 + clip), *two_parts(1 - clip), len(size), len(error),
            SCORED=score_G is not None, CLIPPED=old_error_M is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return objective, surrogate, weight_G, clipped_M


def group_preference_backward(
    grad: Tensor, weight_G: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, clipped_M: Tensor
) -> Tensor:
    """The gradient of the errors; the arguments are checked by the caller."""
    grad_error_M = torch.empty_like(advantage_M, memory_format=torch.contiguous_format)
    inputs = (each.contiguous() for each in (grad, weight_G, advantage_M, group_M, size_G, clipped_M))
    if grad_error_M.numel():
        with torch.cuda.device_of(grad):
            group_preference_backward_kernel[(triton.cdiv(len(advantage_M), BLOCK),)](
                *inputs, grad_error_M, len(size_G), len(advantage_M), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return grad_error_M
