"""The rules on the steps of a run: each takes the recent past and the run's own beginning, and says what is broken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

from dgpo_fast.guard.findings import Breach
from dgpo_fast.guard_config import GuardConfig

if TYPE_CHECKING:
    from dgpo_fast.records import StepReport


class Reading(NamedTuple):
    """What is watched of a step; None where it was not measured, or is not finite."""

    step: int
    reward: float | None
    reward_std: float | None
    zero_std: float | None
    clip: float | None
    saturation: float | None
    diversity: float | None
    kl: float | None
    adapter_norm: float | None

    @classmethod
    def of(cls, report: StepReport, *, num_groups: int) -> Reading:
        """Of an iteration of so many groups, of which those that were left out have no spread to be judged."""
        counted = num_groups - report.dropped_groups
        signals = (
            report.reward_mean, report.reward_std, report.zero_std_groups / counted, report.clip_fraction,
            report.group_weight_saturation, report.diversity, report.kl, report.adapter_norm,
        )  # fmt: skip
        return cls(report.step, *map(_finite, signals))


class Level(NamedTuple):
    """A mean reward, and the standard deviation of the images around it."""

    step: int
    """The last that is in it."""
    mean: float
    std: float

    @classmethod
    def of(cls, window: Sequence[Reading]) -> Level | None:
        """Of the steps that have a reward; None where they are less than half."""
        rewards, spreads = values(window, "reward"), values(window, "reward_std")
        return None if rewards is None or spreads is None else cls(window[-1].step, fmean(rewards), fmean(spreads))


class Changes(NamedTuple):
    """How much the mean reward changes from one iteration to the next: what noise it has."""

    number: int = 0
    square: float = 0.0
    """The sum of the squares of so many changes."""

    def and_from(self, before: float | None, after: float | None) -> Changes:
        """These, and one more where there is one."""
        if before is None or after is None:
            return self
        return Changes(self.number + 1, self.square + (after - before) ** 2)

    @property
    def variance(self) -> float:
        """Of an iteration's mean reward around its trend; the changes of the whole run say it better than a window."""
        return self.square / (2 * max(self.number, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What rules look at. Windows are of `guard.window` steps, but for `before`, which may be of fewer or none.

    Where steps lack a signal, rules judge by the others, if these are at least half of a window.
    """

    first: Sequence[Reading]
    """The run's first window, of as many steps as `guard.window` then was."""
    before: Sequence[Reading]
    """The window before the last."""
    last: Sequence[Reading]
    best: Level | None
    """The best window's of those that share no step with the last."""
    variance: float
    """Of an iteration's mean reward."""
    num_groups: int
    """Of an iteration."""
    updates: int
    """Optimizer steps of an iteration, which share its rewards."""
    warmup: int
    """Steps over which the learning rate rises."""

    @property
    def error2(self) -> float:
        """The square of the standard error of the last window's mean reward."""
        return self.error2_of(self.last)

    def error2_of(self, window: Sequence[Reading]) -> float:
        """The square of the standard error of a window's mean reward, by the steps that have one."""
        return self.variance * self.updates / max(1, sum(reading.reward is not None for reading in window))


Rule = Callable[[History, GuardConfig], Breach | None]


def diversity(history: History, guard: GuardConfig) -> Breach | None:
    """Groups have become alike: the median is below a share of the first step's diversity or the first window's."""
    found = _median(history.last, "diversity")
    start = diversity_at_first([reading.diversity for reading in history.first])
    if guard.diversity is None or found is None or start is None or found >= guard.diversity * start:
        return None
    return _breach(history, f"the diversity within groups fell to {found:.3g}, from {start:.3g} at the beginning")


def zero_std(history: History, guard: GuardConfig) -> Breach | None:
    """Next to no group has unequal rewards."""
    found = _mean(history.last, "zero_std")
    if guard.zero_std is None or found is None or found < guard.zero_std:
        return None
    return _breach(history, f"in {found:.0%} of the groups all rewards are equal, so that they teach nothing")


def clip(history: History, guard: GuardConfig) -> Breach | None:
    """Next to no sample is inside the trust range."""
    found = _mean(history.last, "clip")
    if guard.clip is None or found is None or found < guard.clip:
        return None
    return _breach(history, f"{found:.0%} of the samples are clipped, so that they teach nothing")


def saturation(history: History, guard: GuardConfig) -> Breach | None:
    """Group weights are at an end, and the reward has not risen by twice its standard error since the first window."""
    found = _mean(history.last, "saturation")
    now, then = Level.of(history.last), Level.of(history.first)
    if guard.saturation is None or found is None or found < guard.saturation or now is None or then is None:
        return None
    if now.mean > then.mean + 2 * math.sqrt(history.error2 + history.error2_of(history.first)):
        return None
    return _breach(
        history,
        f"{found:.0%} of the group weights are saturated while the reward, {now.mean:.3g}, has not risen from "
        f"{then.mean:.3g}",
    )


def kl(history: History, guard: GuardConfig) -> Breach | None:
    """The distance to the reference explodes."""
    return _growth(history, guard, "kl", "the distance to the reference")


def adapter_norm(history: History, guard: GuardConfig) -> Breach | None:
    """The change of the weights explodes."""
    return _growth(history, guard, "adapter_norm", "the norm of what was added to the weights")


def reward(history: History, guard: GuardConfig) -> Breach | None:
    """The mean reward is well below what it was in the first step that has one, or in the best window, beyond noise."""
    now, start = Level.of(history.last), _first_level(history.first)
    if guard.reward_drop is None or now is None or start is None:
        return None
    # The groups' means of a step differ no more than the images do; a fall that is under way counts as noise, too.
    levels = [(start, min(history.variance, start.std**2 / history.num_groups), "in step")]
    if history.best is not None:
        levels.insert(0, (history.best, history.error2, "in its best window, which ended with step"))
    for level, error2, where in levels:
        std = max(level.std, start.std)
        needed = max(guard.reward_drop * std, guard.noise * math.sqrt(history.error2 + error2))
        if level.mean - now.mean > needed:
            return _breach(history, f"the reward fell to {now.mean:.3g}, from {level.mean:.3g} {where} {level.step}")
    return None


RULES: Mapping[str, Rule] = {
    "diversity": diversity,
    "zero_std": zero_std,
    "clip": clip,
    "saturation": saturation,
    "kl": kl,
    "adapter_norm": adapter_norm,
    "reward": reward,
}
"""By name."""


def values(window: Sequence[Reading], key: str) -> list[float] | None:
    """One signal's values, as `known` has them."""
    return known([getattr(reading, key) for reading in window])


def known(window: Sequence[float | None]) -> list[float] | None:
    """What of a window was measured and is finite; None where that is less than half of it, or there is none."""
    found = [value for value in map(_finite, window) if value is not None]
    return found if found and 2 * len(found) >= len(window) else None


def diversity_at_first(first: Sequence[float | None]) -> float | None:
    """What a run's diversity is compared with: the first step's, or the first window's median where that is more.

    None where less than half of the first window was measured.
    """
    found = known(first)
    return None if found is None else max(median(found), _finite(first[0]) or 0.0)


def _first_level(first: Sequence[Reading]) -> Level | None:
    """Of the first step that has a reward."""
    levels = (Level.of([reading]) for reading in first)
    return next((level for level in levels if level is not None), None)


def _growth(history: History, guard: GuardConfig, key: str, name: str) -> Breach | None:
    """Both begin at zero, and at first they grow as fast as the learning rate lets them: then nothing is judged."""
    last, before = _median(history.last, key), _median(history.before, key)
    is_early = not history.before or history.before[0].step <= max(len(history.last), history.warmup)
    if guard.growth is None or last is None or before is None or is_early or last <= guard.growth * before:
        return None
    return _breach(history, f"{name} grew to {last:.3g}, from {before:.3g} one window ago")


def _breach(history: History, what: str) -> Breach:
    return Breach(what, history.last[0].step)


def _mean(window: Sequence[Reading], key: str) -> float | None:
    found = values(window, key)
    return None if found is None else fmean(found)


def _median(window: Sequence[Reading], key: str) -> float | None:
    found = values(window, key)
    return None if found is None else median(found)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
