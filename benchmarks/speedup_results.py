"""Results of the speedup benchmark: what was measured of a run, which setting is best, and which runs are to come."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.speedup_runs import (
    ABLATIONS,
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
    step: int
    iteration: int
    images: int
    flops: float
    reward: float
    """Mean training reward since the point before; NaN at the first."""
    strict: float
    soft: float
    distance: float
    diversity: float


KINDS: dict[str, Any] = {field.name: {"int": int, "float": float}[str(field.type)] for field in fields(Point)}


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
    with path.open(encoding="utf-8") as file:
        return [Point(**{name: kind(row[name]) for name, kind in KINDS.items()}) for row in csv.DictReader(file)]


def write(path: Path, points: Iterable[Point], origin: Mapping[str, str]) -> None:
    """Points, and beside each where they come from."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*KINDS, *origin])
        writer.writeheader()
        for point in points:
            writer.writerow({name: f"{value:.6g}" for name, value in asdict(point).items()} | dict(origin))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    run: Run
    points: Sequence[Point]

    def first(self, target: float) -> Point | None:
        """Where the target was reached: on the straight line to the first evaluation at or above it that the next one
        confirms; None where there is none.

        One evaluation alone would reward a scattered curve: of 256 images near 85 % a standard error is 2.2 points.
        """
        points = self.points
        for number, (point, after) in enumerate(pairwise(points)):
            if min(point.strict, after.strict) >= target:
                before = points[max(number - 1, 0)]
                return between(before, point, target) if before.strict < target else point
        return None

    @property
    def last_confirmable(self) -> Point:
        """Up to here a target that was reached would be known to be."""
        return self.points[max(len(self.points) - 2, 0)]

    @property
    def mean_strict(self) -> float:
        """Over the seconds of the budget, by trapezoids: by this settings are compared. A run that ended before, since
        its gradients were no numbers any longer, stays as it was."""
        points = [*self.points, replace(self.points[-1], seconds=max(self.run.budget_s, self.points[-1].seconds))]
        area = sum(
            (after.seconds - before.seconds) * (after.strict + before.strict) / 2 for before, after in pairwise(points)
        )
        return area / points[-1].seconds

    def until(self, seconds: float) -> Result:
        """Its beginning: what a run of that budget would have been."""
        begun = tuple(point for point in self.points if point.seconds <= seconds * MARGIN)
        return Result(run=replace(self.run, budget_s=seconds), points=begun)


def between(before: Point, after: Point, strict: float) -> Point:
    """The point on the straight line between two at which the score is `strict`."""
    share = (strict - before.strict) / (after.strict - before.strict)
    values = {name: (1 - share) * getattr(before, name) + share * getattr(after, name) for name in KINDS}
    return Point(**{name: kind(values[name]) for name, kind in KINDS.items()} | {"strict": strict})


def results(runs: Sequence[Run], directory: Path) -> dict[str, list[Result]]:
    """What is there of the runs, by method."""
    found: dict[str, list[Result]] = {name: [] for name in METHODS}
    for run in runs:
        if (path := directory / f"{run.name}.csv").exists():
            found[run.method].append(Result(run=run, points=read(path)))
    return found


def ablated(runs: Sequence[Run], directory: Path) -> dict[str, list[Result]]:
    """What is there of the runs, by ablation."""
    found: dict[str, list[Result]] = {name: [] for name in ABLATIONS}
    for run in runs:
        if run.ablation is not None and (path := directory / f"{run.name}.csv").exists():
            found[run.ablation].append(Result(run=run, points=read(path)))
    return found


def best(swept: Sequence[Result]) -> Result:
    return max(swept, key=lambda result: result.mean_strict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The runs as far as they are known: changes wait for learning rates, final runs and ablations for changes.

    The fourth learning rate waits for the first three.
    """

    sweep: list[Run]
    finals: list[Run]
    ablations: list[Run]

    @property
    def runs(self) -> list[Run]:
        return [*self.sweep, *self.finals, *self.ablations]


def queue(directory: Path) -> Queue:
    """The runs that follow from the results in `directory`."""
    tried = learning_rates()
    found = results(tried, directory)
    ordered = {
        method: [_rate(result) for result in sorted(swept, key=lambda result: result.mean_strict, reverse=True)]
        for method, swept in found.items()
        if len(swept) == len(LEARNING_RATES)
    }
    rates = [*tried, *fourth_rates(ordered)]
    chosen = {method: setting for method, setting in _chosen(rates, directory).items() if method in ordered}
    sweep = [*rates, *changes(chosen)]
    settled = _chosen(sweep, directory, of=chosen)
    return Queue(sweep=sweep, finals=finals(settled), ablations=ablations(settled[OURS]) if OURS in settled else [])


def _rate(result: Result) -> str:
    return result.run.setting[0].partition("=")[2]


def _chosen(
    runs: Sequence[Run], directory: Path, *, of: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, tuple[str, ...]]:
    """The best setting of each method all of whose runs have a result; `of` these alone."""
    found = results(runs, directory)
    return {
        method: best(swept).run.setting
        for method, swept in found.items()
        if (of is None or method in of) and len(swept) == sum(run.method == method for run in runs)
    }
