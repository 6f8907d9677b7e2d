"""The guard of a run: takes what every rank logs alike, and says what is wrong, once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dgpo_fast.config import Config
from dgpo_fast.guard.advice import advice
from dgpo_fast.guard.findings import Breach, Finding
from dgpo_fast.guard.held_out import HELD_OUT_RULES, Evaluated
from dgpo_fast.guard.rules import RULES, Changes, History, Level, Reading, values
from dgpo_fast.held_out import held_out_reward

if TYPE_CHECKING:
    from dgpo_fast.records import StepReport

STOPPED = 1
"""Exit status of a run that the guard ends."""
KEPT_EVALUATIONS = 3


class Guard:
    """Watches a run for its collapse. Its decisions are a function of reports, which are equal on every rank.

    A finding begins once, and may begin again when it was not seen for two windows: one sound step puts it out of sight
    for one. A checkpoint keeps the guard's state: a resumed run decides as the uninterrupted one, whatever became of
    its logs.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, config.guard
        self.lr_factor = 1.0
        """Of the recipe's learning rate."""
        self._first: list[Reading] = []
        self._is_first_whole = False
        """The run's first window is then what it is, though `guard.window` may change on resume."""
        self._recent: deque[Reading] = deque(maxlen=2 * self.settings.window)
        self._best: Level | None = None
        self._changes = Changes()
        self._evaluations: list[Evaluated] = []
        self._evaluated_step = -1
        self._last_seen: dict[str, int] = {}  # findings that go on: the last step of each

    @property
    def stops(self) -> bool:
        """Whether the run is to end here: also when it is resumed as it was."""
        return self.settings.action == "stop" and bool(self._last_seen)

    @property
    def way_on(self) -> str:
        """How a run that it stopped goes on, and why it was stopped."""
        return f"the guard found: {', '.join(self._last_seen)}; --resume --set guard.action=warn goes on"

    def observe(self, report: StepReport) -> list[Finding]:
        """Takes a step's report; what is wrong for the first time."""
        reading, window = Reading.of(report, num_groups=self.config.groups.per_iteration), self.settings.window
        if not self._is_first_whole:
            self._first.append(reading)
            self._is_first_whole = len(self._first) >= window
        if self._recent and (report.step - 1) % self.config.optimizer.steps_per_iteration == 0:
            self._changes = self._changes.and_from(self._recent[-1].reward, reading.reward)
        self._recent.append(reading)
        if self.settings.action == "off" or report.step <= window or len(self._recent) < window:
            return []
        history = self._history()
        self._best = history.best
        broken = {name: breach for name, rule in RULES.items() if (breach := rule(history, self.settings))}
        findings = self._new(report.step, broken)
        for name in [
            name for name, seen in self._last_seen.items() if name in RULES and seen <= report.step - 2 * window
        ]:
            del self._last_seen[name]
        if findings and self.settings.action == "lower_lr":
            self.lr_factor /= 2
        return findings

    def observe_evaluation(
        self, step: int, *, num_images: int, base: Mapping[str, float], tuned: Mapping[str, float]
    ) -> list[Finding]:
        """Takes an evaluation; what is wrong for the first time. One that it has seen already says nothing."""
        held_out = [held_out_reward(metrics, self.config.rewards) for metrics in (base, tuned)]
        if step <= self._evaluated_step or held_out[0] is None or held_out[1] is None:
            return []
        self._evaluated_step = step
        rewards = values([*self._recent][-self.settings.window :], "reward")
        training = None if rewards is None else fmean(rewards)
        evaluated = Evaluated(step, held_out[0], held_out[1], training, num_images)
        self._evaluations = [*self._evaluations, evaluated][-KEPT_EVALUATIONS:]
        std = next((reading.reward_std for reading in self._first if reading.reward_std is not None), None)
        if self.settings.action == "off" or std is None:
            return []
        broken = {
            name: breach
            for name, rule in HELD_OUT_RULES.items()
            if (breach := rule(self._evaluations, std, self.settings))
        }
        findings = self._new(step, broken)
        for name in HELD_OUT_RULES.keys() & self._last_seen.keys() - broken.keys():
            del self._last_seen[name]
        return findings

    def state(self) -> dict[str, Any]:
        """All that later decisions depend on, as JSON has it."""
        return {
            "lr_factor": self.lr_factor,
            "first": self._first,
            "is_first_whole": self._is_first_whole,
            "recent": [*self._recent],
            "best": self._best,
            "changes": self._changes,
            "evaluations": self._evaluations,
            "evaluated_step": self._evaluated_step,
            "last_seen": self._last_seen,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint's `state`; None of one that had no guard."""
        if state is None:
            return
        self.lr_factor, self._evaluated_step = state["lr_factor"], state["evaluated_step"]
        self._first = [Reading(*each) for each in state["first"]]
        # A checkpoint that does not say it is of a version whose first window grew with `guard.window`.
        self._is_first_whole = state.get("is_first_whole", len(self._first) >= self.settings.window)
        self._recent.extend(Reading(*each) for each in state["recent"])
        self._best = Level(*state["best"]) if state["best"] else None
        self._changes = Changes(*state["changes"])
        self._evaluations = [Evaluated(*each) for each in state["evaluations"]]
        self._last_seen = dict(state["last_seen"])

    def _history(self) -> History:
        window, config, recent = self.settings.window, self.config, [*self._recent]
        before = recent[:-window]
        best, candidate = self._best, Level.of(before) if len(before) == window else None
        if candidate is not None and (best is None or candidate.mean > best.mean):
            best = candidate
        return History(
            first=self._first, before=before, last=recent[-window:], best=best, variance=self._changes.variance,
            num_groups=config.groups.per_iteration, updates=config.optimizer.steps_per_iteration,
            warmup=config.optimizer.warmup_steps,
        )  # fmt: skip

    def _new(self, step: int, broken: Mapping[str, Breach]) -> list[Finding]:
        """Findings of the rules that were not broken before."""
        findings = [
            Finding(step, name, breach.since, breach.what, advice(name, self.config), self._action(name))
            for name, breach in broken.items()
            if name not in self._last_seen
        ]
        self._last_seen |= dict.fromkeys(broken, step)
        return findings

    def _action(self, name: str) -> str:
        is_spared = self.settings.action == "lower_lr" and name in HELD_OUT_RULES
        return "warn" if is_spared else self.settings.action
