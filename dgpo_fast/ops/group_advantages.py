"""Advantages: rewards normalised within their groups, on the device that has the rewards.

Shape letters: B samples ordered by group, G groups, S samples of a group.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgpo_fast.ops.arguments import check_device, check_dtype, check_no_gradient, check_positive, check_shape
from dgpo_fast.ops.registry import define


class GroupAdvantages(NamedTuple):
    """Advantages and what is worth counting of them."""

    advantage_B: Tensor  # dtype of the rewards; 0 where not valid
    std_G: Tensor  # dtype of the rewards, population standard deviation of each group's valid rewards
    clamped_B: Tensor  # bool


def group_advantages(
    reward_B: Tensor,
    valid_B: Tensor,
    *,
    group_size: int,
    std: Literal["group", "global"],
    epsilon: float,
    clamp: float,
) -> GroupAdvantages:
    """A = (r - mean of the group) / (std + epsilon), clamped to [-clamp, clamp], over the valid samples.

    Args:
        reward_B: [B], float32 or float64; anything where not valid.
        valid_B: [B], bool; samples that count.
        group_size: S, a divisor of B.
        std: population standard deviation of the "group", or of all valid rewards ("global"), about their own mean.
        epsilon: positive, added to the standard deviation; 1e-4 in the published code.
        clamp: positive; 5 in the published code. Where it bites, the advantages of a group no longer add up to zero.

    A group with no or one valid sample has advantage 0, and so has one of equal rewards: exactly. A valid reward that
    is not finite makes its group NaN, with "global" all of them. No gradient.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype, device or range.

    Source: DGPO, arXiv 2510.08425, section 3, and its code.
    """
    if std not in ("group", "global"):
        raise ValueError(f"std: expected 'group' or 'global', got {std!r}")
    check_no_gradient("reward_B", reward_B, reason="advantages have none")
    with torch.no_grad():
        return GroupAdvantages(*_group_advantages(reward_B, valid_B, group_size, std == "global", epsilon, clamp))


def _check(reward_B: Tensor, valid_B: Tensor, group_size: int, global_std: bool, epsilon: float, clamp: float) -> None:
    if reward_B.dim() != 1:
        raise ValueError(f"reward_B: expected [B], got {list(reward_B.shape)}")
    check_dtype("reward_B", reward_B, torch.float32, torch.float64)
    check_dtype("valid_B", valid_B, torch.bool)
    check_shape("valid_B", valid_B, reward_B.shape, meaning="one truth for each sample")
    check_device("valid_B", valid_B, reward_B, meaning="reward_B")
    count = reward_B.shape[0]
    if group_size < 1 or count % group_size:
        raise ValueError(f"group_size: expected a divisor of {count}, the number of rewards, got {group_size}")
    check_positive("epsilon", epsilon)
    check_positive("clamp", clamp)


def reference(
    reward_B: Tensor, valid_B: Tensor, group_size: int, global_std: bool, epsilon: float, clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The equation of `group_advantages` in eager torch."""
    if reward_B.numel() == 0:
        return torch.empty_like(reward_B), reward_B.new_empty(0), torch.empty_like(valid_B)
    valid_GS = valid_B.view(-1, group_size)
    reward_GS = reward_B.view(-1, group_size).where(valid_GS, 0.0)
    mean_G1, std_G1 = _moments(reward_GS, valid_GS, dim=1)
    spread = _moments(reward_GS.flatten(), valid_B, dim=0)[1] if global_std else std_G1
    raw_GS = torch.where(valid_GS, (reward_GS - mean_G1) / (spread + epsilon), 0.0)
    advantage_GS = raw_GS.clamp(-clamp, clamp)
    return advantage_GS.flatten(), std_G1.flatten(), (advantage_GS != raw_GS).flatten()


def _moments(values: Tensor, valid: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    count = valid.sum(dim, keepdim=True).clamp(min=1)
    mean = values.sum(dim, keepdim=True) / count
    # Equal rewards must have a deviation of exactly 0, but their mean rounds.
    none = valid.sum(dim, keepdim=True) == 0
    equal = none | (_extreme(values, valid, dim, "amax") == _extreme(values, valid, dim, "amin")) & mean.isfinite()
    variance = torch.where(valid, values - mean, 0.0).square().sum(dim, keepdim=True) / count
    return torch.where(equal, _extreme(values, valid, dim, "amax"), mean), torch.where(equal, 0.0, variance.sqrt())


def _extreme(values: Tensor, valid: Tensor, dim: int, which: Literal["amax", "amin"]) -> Tensor:
    filler = -torch.inf if which == "amax" else torch.inf
    return getattr(values.masked_fill(~valid, filler), which)(dim, keepdim=True)  # type: ignore[no-any-return]


def _fake(
    reward_B: Tensor, valid_B: Tensor, group_size: int, global_std: bool, epsilon: float, clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(reward_B, valid_B, group_size, global_std, epsilon, clamp)
    std_G = reward_B.new_empty(reward_B.shape[0] // group_size)
    return reward_B.new_empty(reward_B.shape), std_G, valid_B.new_empty(valid_B.shape)


_group_advantages = define(
    "group_advantages(Tensor reward_B, Tensor valid_B, int group_size, bool global_std, float epsilon, float clamp)"
    " -> (Tensor advantage_B, Tensor std_G, Tensor clamped_B)",
    check=_check,
    reference=reference,
    fake=_fake,
)
