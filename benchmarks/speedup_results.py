"""Results of the speedup benchmark: what was measured of a run, which setting is best, and which runs are to come."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.speedup_runs import ABLATIONS, METHODS, OURS, Run, ablations, changes, finals, learning_rates

RESULTS = Path(__file__).parent / "results" / "speedup-cpu"
MARGIN = 1.02
"""A run ends with the iteration in which its budget does: a few seconds later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A moment of a run."""

    core_s: float
    """Seconds of training on one core."""
    wall_s: float
    """That they took on this machine, whatever else it did."""
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
        """The first evaluation at or above the target that the next one confirms; None where there is none.

        Of 256 images near 85 % a standard error is 2.2 points: one evaluation alone would reward a scattered curve.
        """
        pairs = zip(self.points, self.points[1:], strict=False)
        return next((point for point, after in pairs if min(point.strict, after.strict) >= target), None)

    @property
    def mean_strict(self) -> float:
        """Over the seconds of the budget, by trapezoids: by this settings are compared."""
        area = sum(
            (after.core_s - before.core_s) * (after.strict + before.strict) / 2
            for before, after in zip(self.points, self.points[1:], strict=False)
        )
        return area / (self.points[-1].core_s - self.points[0].core_s)

    def until(self, seconds: float) -> Result:
        """Its beginning: what a run of that budget would have been."""
        return Result(run=self.run, points=tuple(point for point in self.points if point.core_s <= seconds * MARGIN))


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
    """The runs as far as they are known: changes wait for learning rates, final runs and ablations for changes."""

    sweep: list[Run]
    finals: list[Run]
    ablations: list[Run]

    @property
    def runs(self) -> list[Run]:
        return [*self.sweep, *self.finals, *self.ablations]


def queue(directory: Path) -> Queue:
    """The runs that follow from the results in `directory`."""
    rates = learning_rates()
    chosen = _chosen(rates, directory)
    sweep = [*rates, *changes(chosen)]
    settled = _chosen(sweep, directory, of=chosen)
    return Queue(sweep=sweep, finals=finals(settled), ablations=ablations(settled[OURS]) if OURS in settled else [])


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
