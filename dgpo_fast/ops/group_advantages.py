"""Advantages: rewards normalised within their groups.

Shape letters: B samples ordered by group, G groups, S samples of a group.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class GroupAdvantages(NamedTuple):
    """Advantages and what is worth counting of them."""

    advantage_B: Tensor  # float32; 0 where not valid
    std_G: Tensor  # float32, population standard deviation of each group's valid rewards
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
        reward_B: [B], float32; anything where not valid.
        valid_B: [B], bool; samples that count.
        group_size: S, a divisor of B.
        std: population standard deviation of the "group", or of all valid rewards ("global"), about their own mean.
        epsilon: added to the standard deviation; 1e-4 in the published code.
        clamp: 5 in the published code. Where it bites, the advantages of a group no longer add up to zero.

    A group with no or one valid sample has advantage 0. Source: DGPO, arXiv 2510.08425, section 3, and its code.
    """
    valid_GS = valid_B.view(-1, group_size)
    reward_GS = reward_B.view(-1, group_size).where(valid_GS, 0.0)
    mean_G1, std_G1 = _moments(reward_GS, valid_GS, dim=1)
    spread = std_G1 if std == "group" else _moments(reward_GS.flatten(), valid_B, dim=0)[1]
    raw_GS = torch.where(valid_GS, (reward_GS - mean_G1) / (spread + epsilon), 0.0)
    advantage_GS = raw_GS.clamp(-clamp, clamp)
    return GroupAdvantages(advantage_GS.flatten(), std_G1.squeeze(1), (advantage_GS != raw_GS).flatten())


def _moments(values: Tensor, valid: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    count = valid.sum(dim, keepdim=True).clamp(min=1)
    mean = values.sum(dim, keepdim=True) / count
    # Equal rewards must have a deviation of exactly 0, but their mean rounds.
    equal = _extreme(values, valid, dim, "amax") == _extreme(values, valid, dim, "amin")
    variance = torch.where(valid, values - mean, 0.0).square().sum(dim, keepdim=True) / count
    return torch.where(equal, _extreme(values, valid, dim, "amax"), mean), torch.where(equal, 0.0, variance.sqrt())


def _extreme(values: Tensor, valid: Tensor, dim: int, which: Literal["amax", "amin"]) -> Tensor:
    filler = -torch.inf if which == "amax" else torch.inf
    return getattr(values.masked_fill(~valid, filler), which)(dim, keepdim=True)  # type: ignore[no-any-return]
