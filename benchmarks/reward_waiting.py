"""How much of an iteration waits for rewards, if they are scored while images are sampled or only afterwards.

The embedded pipeline trains with a reward of known duration that takes nothing from the cores: it sleeps, as one on
another device or behind a server would look from here. Its duration is a fraction f of what the rollout takes for an
image. In rounds, each fraction has an iteration of either way, each way with a trainer of its own, on one thread:
several wait for each other where other processes want the cores too.

Of a rollout of N forwards, r seconds each, the scores of a forward take f r. Scored while others are sampled, they are
there f r behind the rollout if f <= 1: only the last forward's are waited for. Else the thread is never idle once it
has images, and N (f - 1) r + r are waited for. Scored afterwards it is N f r.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Literal, NamedTuple
from unittest.mock import patch

from torch import Tensor

from benchmarks.timing import num_threads
from dgpo_fast import Trainer, load_recipe
from dgpo_fast.profiling import stage, use_clock
from dgpo_fast.rewards import OverlappedScoring

FRACTIONS = (0.0, 0.5, 0.9, 1.5)
SMALL = (
    "groups.size=8", "groups.per_iteration=8", "rollout.images_per_forward=8", "rollout.images_per_decode=8",
    "rewards.terms=[{name: 'benchmarks.reward_waiting:Sleeping'}]", "evaluation.every=0", "logging.tensorboard=false",
    "device=cpu",
)  # fmt: skip
"""64 images in eight forwards: as many as SD3.5's recipe of GenEval has on one GPU."""
MIN_ROUNDS = 3

Way = Literal["overlapped", "afterwards"]
WAYS: tuple[Way, ...] = ("overlapped", "afterwards")


class Sleeping:
    """The images' brightness, after so many seconds for each in which the cores are free."""

    seconds_per_image = 0.0  # of all

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(self.seconds_per_image * len(prompts))
        return images_BCHW.mean((1, 2, 3))


class ScoringAfterwards(OverlappedScoring):
    """Scores once all images are there, with the thread that sampled them."""

    def __enter__(self) -> ScoringAfterwards:
        self._waiting: list[tuple[Tensor, Sequence[str]]] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with stage("reward"):
                self._measured = [self._scorer.measure(*batch) for batch in self._waiting]

    def add(self, x0_BCHW: Tensor, prompts: Sequence[str]) -> None:
        self._waiting.append((self._decode(x0_BCHW), prompts))


SCORING: Mapping[Way, type[OverlappedScoring]] = {"overlapped": OverlappedScoring, "afterwards": ScoringAfterwards}


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Of the iterations of one fraction and way: medians, and the range of what is waited."""

    fraction: float
    """That was asked for: the reward's seconds, of the rollout's before it."""
    measured_fraction: float
    """Of the same iteration's rollout, which varies."""
    way: Way
    images: int
    forwards: int
    iterations: int
    iteration_s: float
    rollout_s: float
    reward_s: float
    waiting: float
    """Share of the iteration."""
    waiting_low: float
    waiting_high: float
    foreseen: float
    """The same, as the module says, from the measured fraction and times."""


class Iteration(NamedTuple):
    seconds: float
    rollout_s: float
    reward_s: float
    fraction: float


def measure_waiting(
    *, seconds: float, fractions: Sequence[float] = FRACTIONS, overrides: Sequence[str] = ()
) -> list[Waiting]:
    """A row for each fraction and way, of rounds until `seconds` have passed and three are over."""
    config = load_recipe("tiny-dgpo", [*SMALL, *overrides])
    images = config.images_per_iteration
    forwards = images // config.rollout.images_per_forward
    found: dict[tuple[float, Way], list[Iteration]] = {(fraction, way): [] for fraction in fractions for way in WAYS}
    with tempfile.TemporaryDirectory() as out, num_threads(1):
        trainers = {way: Trainer(config, Path(out, way)) for way in WAYS}
        for way, trainer in trainers.items():
            _iterate(trainer, way, 0.0)  # in which kernels are chosen and memory is taken
        rollout_s = _iterate(trainers["overlapped"], "overlapped", 0.0).rollout_s
        end = time.perf_counter() + seconds
        while min(len(rows) for rows in found.values()) < MIN_ROUNDS or time.perf_counter() < end:
            for (fraction, way), iterations in found.items():
                iterations.append(_iterate(trainers[way], way, fraction * rollout_s / images))
                rollout_s = iterations[-1].rollout_s
    return [_row(fraction, way, rows, images, forwards) for (fraction, way), rows in found.items()]


def _iterate(trainer: Trainer, way: Way, seconds_per_image: float) -> Iteration:
    Sleeping.seconds_per_image = seconds_per_image
    use_clock(trainer.clock)  # the process has one in use, and the trainer that was made last brought it
    start = time.perf_counter()
    with patch("dgpo_fast.trainer.OverlappedScoring", SCORING[way]):
        reports = trainer.run_iteration()
    seconds = time.perf_counter() - start
    rollout_s, reward_s = (sum(getattr(report, name) for report in reports) for name in ("rollout_s", "reward_s"))
    fraction = seconds_per_image * trainer.config.images_per_iteration / rollout_s
    return Iteration(seconds=seconds, rollout_s=rollout_s, reward_s=reward_s, fraction=fraction)


def _row(fraction: float, way: Way, iterations: Sequence[Iteration], images: int, forwards: int) -> Waiting:
    shares = [each.reward_s / each.seconds for each in iterations]
    foreseen = [foreseen_s(each, way, forwards) / each.seconds for each in iterations]
    return Waiting(
        fraction=fraction, measured_fraction=median(each.fraction for each in iterations), way=way, images=images,
        forwards=forwards, iterations=len(iterations), iteration_s=median(each.seconds for each in iterations),
        rollout_s=median(each.rollout_s for each in iterations), reward_s=median(each.reward_s for each in iterations),
        waiting=median(shares), waiting_low=min(shares), waiting_high=max(shares), foreseen=median(foreseen),
    )  # fmt: skip


def foreseen_s(iteration: Iteration, way: Way, forwards: int) -> float:
    """What is waited for, in seconds."""
    fraction, forward_s = iteration.fraction, iteration.rollout_s / forwards
    if way == "afterwards":
        return forwards * fraction * forward_s
    return max(fraction, forwards * (fraction - 1) + 1) * forward_s


def table_of_waiting(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each fraction: the share of an iteration that waits, and the iteration's length, in either way."""
    lines = [
        "| reward / rollout, an image | waiting, overlapped | foreseen | waiting, scored afterwards | "
        "iteration, overlapped | scored afterwards |",
        "|---|---|---|---|---|---|",
    ]
    fractions = dict.fromkeys(row["fraction"] for row in rows)
    for fraction in fractions:
        ours, theirs = (next(row for row in rows if (row["fraction"], row["way"]) == (fraction, way)) for way in WAYS)
        cells = (
            f"{float(fraction):.1f}", _share(ours), f"{float(ours['foreseen']):.1%}", _share(theirs),
            f"{float(ours['iteration_s']):.2f} s", f"{float(theirs['iteration_s']):.2f} s",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(row: Mapping[str, str]) -> str:
    middle, low, high = (f"{float(row[name]):.1%}" for name in ("waiting", "waiting_low", "waiting_high"))
    return f"{middle} ({low} to {high})"
