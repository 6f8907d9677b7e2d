"""Groups with rewards and advantages, from the scores of all ranks, which decide alike what counts."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.ops.group_advantages import GroupAdvantages, group_advantages
from dgpo_fast.parallel.world import World
from dgpo_fast.records import Rollout, ScoredGroups
from dgpo_fast.rewards.scoring import Scores, describe_failures, describe_retries, refuse_failures, total_failures

UNCLAMPED = 1e9
"""Advantages of N samples are below the root of N."""


class Grouped(NamedTuple):
    """An iteration's groups, and what is to be said of them."""

    scored: ScoredGroups
    metrics: dict[str, Any]
    warning: str | None
    """A line for the person who watches, where samples failed, or did at first."""


def scored_groups(
    rollout: Rollout, scores: Scores, config: Config, *, world: World, samples_of_ranks: list[tuple[int, ...]]
) -> Grouped:
    """Rewards and advantages; those of all ranks are normalised together, since the deviation may be global.

    A group of which fewer than `rewards.min_group_size` samples have a reward does not count: none of its samples is
    valid, and the others are learnt from as if they were the whole iteration. All keep their places. An optimizer step
    may thus be left with none: `num_groups` says so, on every rank alike.

    Raises:
        UserError: on every rank, where too many samples failed, or no group counts.
    """
    of_ranks = world.gather(torch.cat([scores.reward_B[:, None], scores.term_BT], dim=1).to(world.device))
    # From the order of ranks to that of groups, and back.
    place_B = torch.tensor(samples_of_ranks, device=of_ranks.device)
    ordered = torch.empty_like(of_ranks).index_copy(0, place_B.flatten(), of_ranks)
    reward_B, term_BT = ordered[:, 0].contiguous(), ordered[:, 1:]
    has_reward_B, size = reward_B.isfinite(), rollout.prompts.group_size
    num_failed, warning = int((~has_reward_B).sum()), None
    has_reward_GS = has_reward_B.view(-1, size)
    counts_G = has_reward_GS.sum(1) >= config.rewards.min_group_size
    num_dropped = int((~counts_G).sum())
    if num_failed:
        failed = total_failures(world.gather_objects(scores.failed))
        refuse_failures(failed, num_failed, total=len(reward_B), config=config.rewards)
        warning = describe_failures(failed, total=len(reward_B))
        warning += f"; {num_dropped} of {len(counts_G)} groups were left out" if num_dropped else ""
    elif scores.retried:  # of this rank: others need not agree on what only takes time
        warning = describe_retries(scores.retried)
    if not counts_G.any():
        raise UserError(f"{warning}: none has rewards.min_group_size={config.rewards.min_group_size} samples left")
    valid_B = (has_reward_GS & counts_G[:, None]).flatten()
    advantages = _advantages(reward_B, term_BT, valid_B, config)
    counted, mine, updates = reward_B[valid_B], place_B[world.rank], config.optimizer.steps_per_iteration
    scored = ScoredGroups(
        rollout=rollout,
        reward_B=reward_B.masked_fill(~valid_B, torch.nan)[mine],
        valid_B=valid_B[mine],
        num_valid=_of_steps(valid_B, updates),
        num_advantaged=_of_steps(advantages.advantage_B != 0, updates),
        num_groups=_of_steps(counts_G, updates),
        group_size_G=valid_B.view(-1, size).sum(1).float(),
        advantage_B=advantages.advantage_B[mine],
    )
    metrics = {
        "reward_mean": counted.mean().item(),
        "reward_std": counted.std(correction=0).item(),
        "zero_std_groups": int(((advantages.std_G == 0) & counts_G).sum()),
        "clamped_advantages": int(advantages.clamped_B.sum()),
        "failed_samples": num_failed,
        "dropped_groups": num_dropped,
        "rewards": {
            term.title: mean for term, mean in zip(config.rewards.terms, term_BT[valid_B].mean(0).tolist(), strict=True)
        },
    }
    return Grouped(scored, metrics, warning)


def _advantages(reward_B: Tensor, term_BT: Tensor, valid_B: Tensor, config: Config) -> GroupAdvantages:
    rule = config.advantages
    normalised = partial(group_advantages, valid_B=valid_B, group_size=config.groups.size, epsilon=rule.epsilon)
    if rule.aggregation == "sum":
        return normalised(reward_B, std=rule.std, clamp=rule.clamp)
    of_terms = [
        term.weight * normalised(term_BT[:, number].contiguous(), std=rule.std, clamp=UNCLAMPED).advantage_B
        for number, term in enumerate(config.rewards.terms)
    ]
    # Their means are zero in each group, and so over all: to divide by the deviation of all is to normalise over all.
    return normalised(torch.stack(of_terms).sum(0), std="global", clamp=rule.clamp)


def _of_steps(counted: Tensor, updates: int) -> tuple[int, ...]:
    """How many count in each optimizer step."""
    return tuple(counted.view(updates, -1).sum(1).tolist())
