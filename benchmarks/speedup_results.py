"""Results of the speedup benchmark: what was measured of a run, which settings are best, and which runs are to come."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from benchmarks.speedup_runs import (
    ABLATIONS,
    COMPARED,
    HORIZON_S,
    LEARNING_RATES,
    METHODS,
    OURS,
    Run,
    ablations,
    changes,
    finals,
    fourth_rates,
    learning_rates,
)
from benchmarks.tables import read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "speedup-cpu"
"""Those of CPUs, of which the pages are made."""
MARGIN = 1.02
"""An evaluation comes behind the iteration in which it is due: some seconds later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A moment of a run."""

    seconds: float
    """Of training on one core of a quiet machine: iterations, times what one costs there."""
    core_s: float
    """That the core worked for the process, whoever it shared its caches with."""
    wall_s: float
    """That passed."""
    step: float
    """Whole, as iterations and images are, but between two evaluations."""
    iteration: float
    images: float
    flops: float
    reward: float
    """Mean training reward since the point before; NaN at the first."""
    strict: float
    soft: float
    distance: float
    diversity: float


NAMES = tuple(field.name for field in fields(Point))


def results_here() -> Path:
    """Where results of this machine go: those of each kind of GPU apart."""
    import torch

    from dgpo_fast.environment import device_name

    if not torch.cuda.is_available():
        return RESULTS
    return RESULTS.with_name(
        "speedup-" + re.sub("[^a-z0-9]+", "-", device_name(torch.device("cuda")).lower()).strip("-")
    )


def read(path: Path) -> list[Point]:
    """The points of a result."""
    return [Point(**{name: float(row[name]) for name in NAMES}) for row in read_rows(path)]


def write(path: Path, points: Iterable[Point], origin: Mapping[str, str]) -> None:
    """Points, and beside each where they come from."""
    rows = ({name: f"{value:.6g}" for name, value in asdict(point).items()} | dict(origin) for point in points)
    write_rows(path, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Where a run reached a target, or what is known of it: sooner than `point`, or later."""

    point: Point
    bound: Literal["", "<", ">"] = ""

    @property
    def is_reached(self) -> bool:
        return self.bound != ">"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    run: Run
    points: Sequence[Point]

    def arrival(self, target: float) -> Arrival:
        """On the straight line to the first evaluation at or above the target that the next one confirms. Sooner than
        the first evaluation of a trained model, where it is that one: between the base and it nothing is known. Later
        than the last evaluation that another could have confirmed, where there is none.

        One evaluation alone would reward a scattered curve: of 256 images near 85 % a standard error is 2.2 points.
        """
        points = self.points
        for number, (point, after) in enumerate(pairwise(points)):
            if min(point.strict, after.strict) >= target:
                before = points[max(number - 1, 0)]
                if before.strict >= target:
                    return Arrival(point=point)
                return Arrival(point=point, bound="<") if number == 1 else Arrival(point=between(before, point, target))
        return Arrival(point=points[max(len(points) - 2, 0)], bound=">")

    @property
    def mean_strict(self) -> float:
        """Over the seconds of the run, by trapezoids."""
        area = sum(
            (after.seconds - before.seconds) * (after.strict + before.strict) / 2
            for before, after in pairwise(self.points)
        )
        return area / self.points[-1].seconds

    @property
    def is_enough(self) -> bool:
        """Whether a final run has shown what it is for: how long the score takes, and what is kept of it."""
        return self.run.is_final and self.arrival(COMPARED).is_reached and self.points[-1].seconds >= HORIZON_S

    def until(self, seconds: float) -> Result:
        """Its beginning: what a run of that budget would have been."""
        budget_s = min(seconds, self.run.budget_s)
        begun = tuple(point for point in self.points if point.seconds <= seconds * MARGIN)
        return Result(run=replace(self.run, budget_s=budget_s), points=_carried_on(begun, budget_s))


def finished(run: Run, points: Sequence[Point]) -> Result:
    """A run that is over. Where its gradients were no numbers any longer before its budget was spent, the model stays
    what it was: the last evaluation is that of the budget's end, too, and confirms itself.
    """
    measured = Result(run=run, points=points)
    return measured if measured.is_enough else Result(run=run, points=_carried_on(points, run.budget_s))


def _carried_on(points: Sequence[Point], budget_s: float) -> Sequence[Point]:
    last = points[-1]
    return points if last.seconds >= budget_s else (*points, *2 * [replace(last, seconds=budget_s)])


def between(before: Point, after: Point, strict: float) -> Point:
    """The point on the straight line between two at which the score is `strict`."""
    share = (strict - before.strict) / (after.strict - before.strict)
    values = {name: (1 - share) * getattr(before, name) + share * getattr(after, name) for name in NAMES}
    return Point(**values | {"strict": strict})


def results(runs: Sequence[Run], directory: Path) -> dict[str, list[Result]]:
    """What is there of the runs, by method."""
    found: dict[str, list[Result]] = {name: [] for name in METHODS}
    for run in runs:
        if (path := directory / f"{run.name}.csv").exists():
            found[run.method].append(finished(run, read(path)))
    return found


def ablated(runs: Sequence[Run], directory: Path) -> dict[str, list[Result]]:
    """What is there of the runs, by ablation."""
    found: dict[str, list[Result]] = {name: [] for name in ABLATIONS}
    for run in runs:
        if run.ablation is not None and (path := directory / f"{run.name}.csv").exists():
            found[run.ablation].append(finished(run, read(path)))
    return found


def by_arrival(swept: Sequence[Result]) -> list[Result]:
    """The fastest at `COMPARED` first; behind them, by their means over time, those that never are."""

    def rank(result: Result) -> tuple[bool, float, float]:
        arrival = result.arrival(COMPARED)
        return not arrival.is_reached, arrival.point.seconds if arrival.is_reached else 0.0, -result.mean_strict

    return sorted(swept, key=rank)


def fastest(swept: Sequence[Result]) -> Result:
    """Of the setting that answers how long a score takes, whatever it does later."""
    return by_arrival(swept)[0]


def steadiest(swept: Sequence[Result]) -> Result:
    """Of the setting that has the highest score over the whole run."""
    return max(swept, key=lambda result: result.mean_strict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The runs as far as they are known: changes wait for learning rates, final runs and ablations for changes.

    The fourth learning rate waits for the first three.
    """

    sweep: list[Run]
    finals: list[Run]
    """Of the fastest settings."""
    steady: list[Run]
    """Of the steadiest: often the same runs."""
    ablations: list[Run]

    @property
    def runs(self) -> list[Run]:
        return [*self.sweep, *self.finals, *(run for run in self.steady if run not in self.finals), *self.ablations]


def queue(directory: Path) -> Queue:
    """The runs that follow from the results in `directory`."""
    tried = learning_rates()
    found = results(tried, directory)
    ordered = {
        method: [_rate(result) for result in by_arrival(swept)]
        for method, swept in found.items()
        if len(swept) == len(LEARNING_RATES)
    }
    rates = [*tried, *fourth_rates(ordered)]
    chosen = {method: fastest(swept).run.setting for method, swept in _whole(rates, directory, of=ordered).items()}
    sweep = [*rates, *changes(chosen)]
    settled = _whole(sweep, directory, of=chosen)
    return Queue(
        sweep=sweep,
        finals=finals({method: fastest(swept).run.setting for method, swept in settled.items()}),
        steady=finals({method: steadiest(swept).run.setting for method, swept in settled.items()}),
        ablations=ablations(fastest(settled[OURS]).run.setting) if OURS in settled else [],
    )


def _rate(result: Result) -> str:
    return result.run.setting[0].partition("=")[2]


def _whole(runs: Sequence[Run], directory: Path, *, of: Iterable[str]) -> dict[str, list[Result]]:
    """The results of those `of` the methods all of whose runs have one."""
    found = results(runs, directory)
    return {method: found[method] for method in of if len(found[method]) == sum(run.method == method for run in runs)}
