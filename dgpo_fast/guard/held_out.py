"""The rules on evaluations: the held-out reward against the base's, and against the training reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from dgpo_fast.guard.findings import Breach
from dgpo_fast.guard_config import GuardConfig


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
