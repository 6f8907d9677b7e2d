"""The group-preference loss of DGPO: denoising errors, group scores, their weights and the objective.

Shape letters: M samples of a micro-batch, G groups, ... the latent dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupPreference(NamedTuple):
    """Sums over the groups of a micro-batch (means are the caller's, who knows how many groups there are)."""

    objective: Tensor  # scalar; the true loss, its gradient is DGPO's
    surrogate: Tensor  # scalar, detached; the published code's loss: another value, the same gradient
    weight_G: Tensor  # sigmoid(s_G), detached
    clipped_M: Tensor  # bool, samples that give no gradient


def velocity_errors(velocity: Tensor, target: Tensor) -> Tensor:
    """Denoising error of each sample, float32 [M]: the mean over latent elements of (target - velocity)^2.

    Args:
        velocity: [M, ...], the model's prediction, any floating-point dtype; read as float32.
        target: [M, ...], float32, v* = noise - x_0.

    Gradients flow to `velocity`. Source: DGPO, eq. 17; a mean instead of the paper's sum, and the error of the velocity
    instead of x_0 (they differ by sigma^2), as in the code its authors published.
    """
    return (target - velocity.to(target.dtype)).square().flatten(1).mean(1)


def clipped_samples(error_M: Tensor, old_error_M: Tensor, advantage_M: Tensor, clip: float) -> Tensor:
    """Which samples give no gradient, bool [M]: those the policy has already moved further than `clip` the right way.

    ratio = exp(old_error - error); clipped are A > 0 with ratio > 1 + clip, and A <= 0 with ratio < 1 - clip. When
    policy and old policy run through the same kernels with the same weights the ratio is exactly 1.

    Source: added to DGPO's published code after review, after PPO (arXiv 1707.06347).
    """
    ratio_M = torch.exp(old_error_M - error_M.detach())
    return torch.where(advantage_M > 0, ratio_M > 1 + clip, ratio_M < 1 - clip)


def group_scores(
    error_M: Tensor, reference_error_M: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, *, beta: float
) -> Tensor:
    """Scores [G], s_G = (beta / |G|) sum over the group of A (d - d_ref): positive where the bad half is preferred.

    Args:
        error_M: [M], float; the policy's errors.
        reference_error_M: [M], float; the reference's errors at the same inputs.
        advantage_M: [M], float; zero for samples that do not count.
        group_M: [M], int64 in 0..G-1.
        size_G: [G], float; samples that count, over all micro-batches that the group is cut into.
        beta: strength of the preference.

    Gradients flow to `error_M`. The scores of a cut group's pieces add up. Source: DGPO, eq. 17.
    """
    terms_M = advantage_M * (error_M - reference_error_M)
    return beta * error_M.new_zeros(len(size_G)).index_add(0, group_M, terms_M) / size_G


def group_preference(
    error_M: Tensor,
    reference_error_M: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    *,
    beta: float,
    clipped_M: Tensor | None = None,
) -> GroupPreference:
    """The loss of whole groups: sum over groups of softplus(s_G) / beta, as a true objective.

        grad = sum over groups of sigmoid(s_G) (1 / |G|) sum over the unclipped of A_i grad d_i

    Arguments are those of `group_scores`; `clipped_M` marks samples that count in s_G but give no gradient. Departure
    from the paper: divided by beta, as in the published code.
    """
    clipped_M = torch.zeros_like(group_M, dtype=torch.bool) if clipped_M is None else clipped_M
    held_M = torch.where(clipped_M, error_M.detach(), error_M)
    score_G = group_scores(held_M, reference_error_M, advantage_M, group_M, size_G, beta=beta)
    weight_G = torch.sigmoid(score_G).detach()
    surrogate = weighted_errors(error_M, advantage_M, group_M, size_G, weight_G, clipped_M=clipped_M).detach()
    return GroupPreference(F.softplus(score_G).sum() / beta, surrogate, weight_G, clipped_M)


def weighted_errors(
    error_M: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, weight_G: Tensor, *, clipped_M: Tensor
) -> Tensor:
    """The published surrogate, a scalar: sum over samples of sigmoid(s_G) A d / |G|, with the group weights given.

    Its gradient with respect to the errors is that of `group_preference`, also where a group is cut over micro-batches:
    the weights then come from a first pass over all of it. Clipped samples keep their value and give no gradient.
    """
    held_M = torch.where(clipped_M, error_M.detach(), error_M)
    return ((weight_G / size_G)[group_M] * advantage_M * held_M).sum()
