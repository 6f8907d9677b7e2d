"""The rules on evaluations: the held-out reward against the base's, and against the training reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from dgpo_fast.guard.findings import Breach
from dgpo_fast.guard_config import GuardConfig
from dgpo_fast.reward_config import RewardsConfig


class Evaluated(NamedTuple):
    """An evaluation, in what the recipe trains on."""

    step: int
    base: float
    tuned: float
    training: float | None
    """The mean reward of the window of steps before it; None where there is none yet."""
    num_images: int


HeldOutRule = Callable[[Sequence[Evaluated], float, GuardConfig], Breach | None]
"""Takes evaluations, oldest first, and the standard deviation of the images' rewards at the beginning."""


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


def below_base(evaluations: Sequence[Evaluated], std: float, guard: GuardConfig) -> Breach | None:
    """The held-out reward is below the base's, beyond its noise: from the same noise for the same prompts."""
    last = evaluations[-1]
    if last.base - last.tuned <= _noise(last, std, guard):
        return None
    what = f"the held-out reward fell to {last.tuned:.3g}, below the base's {last.base:.3g}"
    before = [each.step for each in evaluations if each.tuned >= each.base]
    return Breach(what, before[-1] + 1 if before else last.step)


def overfit(evaluations: Sequence[Evaluated], std: float, guard: GuardConfig) -> Breach | None:
    """Twice in a row the held-out reward fell, altogether beyond its noise, and the training reward rose."""
    three = evaluations[-3:]
    training = [each.training for each in three if each.training is not None]
    if len(training) < 3:
        return None
    first, last = three[0], three[-1]
    falls = all(before.tuned > after.tuned for before, after in pairwise(three))
    rises = all(before < after for before, after in pairwise(training))
    if not falls or not rises or first.tuned - last.tuned <= _noise(last, std, guard):
        return None
    return Breach(
        f"the held-out reward fell from {first.tuned:.3g} to {last.tuned:.3g} while the training reward rose from "
        f"{training[0]:.3g} to {training[-1]:.3g}",
        first.step + 1,
    )


HELD_OUT_RULES: Mapping[str, HeldOutRule] = {"below_base": below_base, "overfit": overfit}
"""By name."""


def _noise(last: Evaluated, std: float, guard: GuardConfig) -> float:
    """Standard errors of a difference of two means over images of the same prompts."""
    return guard.noise * std * math.sqrt(2 / last.num_images)
