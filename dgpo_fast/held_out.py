"""What a held-out evaluation says of a recipe: the sum of what that trains on, which checkpoint is best. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from dgpo_fast.reward_config import RewardsConfig

STRICT = "strict"
"""The metric that counts an image as right or wrong, of rewards that have one."""


def headline(metrics: Mapping[str, float], rewards: RewardsConfig) -> float:
    """The number that decides which checkpoint is the best: of `deciding_metric`, or of none the weighted sum."""
    decides = deciding_metric(metrics, rewards)
    if decides == STRICT:
        return metrics[STRICT]
    if untold_terms(metrics, rewards):
        return rewards.terms[0].weight * (math.nan if decides is None else metrics[decides])
    total = held_out_reward(metrics, rewards)
    return math.nan if total is None else total


def deciding_metric(metrics: Collection[str], rewards: RewardsConfig) -> str | None:
    """The one metric by which the best checkpoint is chosen; None where it is the weighted sum of several.

    `strict` of the only reward, where it has one; else that of the only term or, where names do not tell what others
    are of, of the first.
    """
    if STRICT in metrics and len({term.name for term in rewards.terms}) == 1:
        return STRICT
    if untold_terms(metrics, rewards):
        first = rewards.terms[0].metric or next(iter(metrics))
        return first if first in metrics else None
    names = _names(metrics, rewards)
    return names[0] if len(names) == 1 else None


def held_out_reward(metrics: Mapping[str, float], rewards: RewardsConfig) -> float | None:
    """The recipe's weighted sum of an evaluation's metrics; None where one of them cannot be told by its name.

    A term without `metric` is of the reward's first one: its only one, or the first of all where there is one reward.
    """
    total = 0.0
    for term, name in zip(rewards.terms, _names(metrics, rewards), strict=True):
        if name is None or not math.isfinite(metrics[name]):
            return None
        total += term.weight * metrics[name]
    return total


def untold_terms(metrics: Collection[str], rewards: RewardsConfig) -> list[str]:
    """Rewards of which an evaluation's names do not tell what the recipe trains on."""
    named = zip(rewards.terms, _names(metrics, rewards), strict=True)
    return [term.name for term, name in named if name is None]


def _names(metrics: Collection[str], rewards: RewardsConfig) -> list[str | None]:
    """The metric that each term is of; None where names do not tell."""
    is_alone = len({term.name for term in rewards.terms}) == 1
    found: list[str | None] = []
    for term in rewards.terms:
        names = [f"{term.name}.{term.metric}", term.metric] if term.metric else [term.name]
        if term.metric is None and is_alone:
            names.append(next(iter(metrics)))
        found.append(next((name for name in names if name in metrics), None))
    return found
