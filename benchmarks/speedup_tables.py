"""Tables of pages in docs/ and of README.md, from the runs of benchmarks/speedup.py.

A target is reached where the straight line to the first evaluation at or above it, which the next one confirms, crosses
it. Nothing is extrapolated: of a run that has not, it is known up to its last evaluation but one, of one that had by
its first evaluation no more than that, and what is made of these is a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import NamedTuple

from benchmarks.speedup_costs import Cost, Kind, kind_of
from benchmarks.speedup_results import Arrival, Point, Result, by_arrival
from benchmarks.speedup_runs import COMPARED, HORIZON_S, METHODS, OURS, TARGETS, short


def seconds_of(point: Point) -> float:
    return point.seconds


def arrivals(of_seeds: Sequence[Result], target: float, of: Callable[[Point], float] = seconds_of) -> list[Arrival]:
    """Of every seed, the earliest first, and those that never arrived last."""
    found = [result.arrival(target) for result in of_seeds]
    return sorted(found, key=lambda arrival: (not arrival.is_reached, of(arrival.point)))


def middle(found: Sequence[Arrival]) -> Arrival:
    """The median, of two the lower."""
    return found[(len(found) - 1) // 2]


def way_to(target: float, of_seeds: Sequence[Result], of: Callable[[Point], float]) -> str:
    """The median of the seeds and their range, or what is known of them."""
    found = arrivals(of_seeds, target, of)
    shown = [f"{arrival.bound} {of(arrival.point):.0f}".lstrip() for arrival in (middle(found), found[0], found[-1])]
    return shown[0] if len({*shown}) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def times(theirs: Sequence[Result], ours: Sequence[Result], target: float, of: Callable[[Point], float]) -> str:
    """How many times ours theirs is to the target: of the medians, and the least and the most of any two runs."""
    their, our = arrivals(theirs, target, of), arrivals(ours, target, of)
    of_medians = ratio(middle(their), middle(our), of)
    if len(their) == len(our) == 1:
        return of_medians
    return f"{of_medians} ({ratio(their[0], our[-1], of)} to {ratio(their[-1], our[0], of)})"


def ratio(theirs: Arrival, ours: Arrival, of: Callable[[Point], float], *, factor: float = 1.0) -> str:
    """How many times ours theirs is, times a factor, or a bound of it; "?" where two bounds say nothing of it."""
    opposite = {"<": ">", ">": "<", "": ""}[ours.bound]
    signs = {theirs.bound, opposite} - {""}
    if len(signs) > 1:
        return "?"
    return f"{''.join(signs)} {factor * of(theirs.point) / of(ours.point):.1f}".lstrip()


class Row(NamedTuple):
    """A method's runs at one setting, and what a table calls them."""

    title: str
    of_seeds: Sequence[Result]

    @property
    def method(self) -> str:
        return self.of_seeds[0].run.method

    def those_that_reach(self, target: float) -> str:
        """How many do: "3", or "1 of 3"."""
        reached = sum(result.arrival(target).is_reached for result in self.of_seeds)
        return str(reached) if reached == len(self.of_seeds) else f"{reached} of {len(self.of_seeds)}"


def compared(fast: Mapping[str, Sequence[Result]], steady: Mapping[str, Sequence[Result]]) -> list[Row]:
    """Each method at the setting that was fastest in the sweep, DGPO first, and at its steadiest where that is another.

    Which of the two is faster, one run of each could not tell.
    """
    rows = []
    for name, of_seeds in fast.items():
        rows.append(Row(_titled(METHODS[name].title, of_seeds), of_seeds))
        if steady[name][0].run.setting != of_seeds[0].run.setting:
            rows.append(Row(_titled(f"{METHODS[name].title} at its steadiest setting", steady[name]), steady[name]))
    return rows


def _titled(title: str, of_seeds: Sequence[Result]) -> str:
    """With a word where it is no final run that is shown."""
    return title if of_seeds[0].run.is_final else f"{title} (of the sweep)"


def table_of_answers(
    fast: Mapping[str, Sequence[Result]], steady: Mapping[str, Sequence[Result]], target: float
) -> str:
    """A row of each method: how long it takes at its fastest setting and at its steadiest, and where that ends."""
    lines = [
        f"| reaches {target:.0%} exact images | at its fastest setting, s | times DGPO's | at its steadiest, s "
        f"| times DGPO's at its fastest | exact after {HORIZON_S / 60:.0f} minutes, at the steadiest |",
        "|---|---|---|---|---|---|",
    ]
    for name in fast:
        quickly = _answer(fast[name], fast[OURS], target)
        is_same = fast[name][0].run.setting == steady[name][0].run.setting
        steadily = ("the same", "") if is_same else _answer(steady[name], fast[OURS], target)
        ends = [result.until(HORIZON_S).points[-1].strict for result in steady[name]]
        cells = " | ".join((*quickly, *steadily, mean_and_range(ends, "{:.0%}")))
        lines.append(f"| {METHODS[name].title} | {cells} |")
    return "\n".join(lines)


def _answer(theirs: Sequence[Result], ours: Sequence[Result], target: float) -> tuple[str, str]:
    """Seconds, and how many times DGPO's they are; where some runs arrive and others do not, how many do, and when."""
    reached = [arrival for arrival in arrivals(theirs, target) if arrival.is_reached]
    if 0 < len(reached) < len(theirs):
        when = ", ".join(f"{arrival.point.seconds:.0f}" for arrival in reached)
        return f"{len(reached)} of {len(theirs)} runs, after {when}", ""
    return way_to(target, theirs, seconds_of), "1" if theirs is ours else times(theirs, ours, target, seconds_of)


def table_of_targets(rows: Sequence[Row]) -> str:
    heads = " | ".join(f"{target:.0%}" for target in TARGETS)
    lines = [f"| | setting | runs | {heads} |", "|---|---|---|" + "---|" * len(TARGETS)]
    for row in rows:
        cells = " | ".join(way_to(target, row.of_seeds, seconds_of) for target in TARGETS)
        setting = _setting(row.of_seeds[0])
        lines.append(f"| {METHODS[row.method].title} | {setting} | {len(row.of_seeds)} | {cells} |")
    return "\n".join(lines)


def table_of_what_is_kept(fast: Mapping[str, Sequence[Result]], steady: Mapping[str, Sequence[Result]]) -> str:
    """Scores over the beginning that all runs have, of a method's two settings, and what images are like behind it."""
    lines = [
        "| | setting | runs | exact, mean over the run | best | at the end | distance to rendered images "
        "| diversity of a group |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in fast:
        # Where both are of one setting, those of the fastest, which are measured first.
        of_settings = {found[0].run.setting: found for found in (steady[name], fast[name]) if found}
        for of_seeds in reversed(of_settings.values()):
            begun = [result.until(HORIZON_S) for result in of_seeds]
            columns = (
                ([result.mean_strict for result in begun], "{:.1%}"),
                ([max(point.strict for point in result.points) for result in begun], "{:.1%}"),
                ([result.points[-1].strict for result in begun], "{:.1%}"),
                ([result.points[-1].distance for result in begun], "{:.4f}"),
                ([result.points[-1].diversity for result in begun], "{:.3f}"),
            )
            cells = " | ".join(mean_and_range(values, form) for values, form in columns)
            runs = str(len(of_seeds)) if of_seeds[0].run.is_final else f"{len(of_seeds)}, of the sweep"
            lines.append(f"| {METHODS[name].title} | {_setting(of_seeds[0])} | {runs} | {cells} |")
    return "\n".join(lines)


def _setting(result: Result) -> str:
    return ", ".join(f"`{short(item)}`" for item in result.run.setting)


def table_of_factors(
    rows: Sequence[Row], target: float, *, known: Mapping[Kind, Cost], again: Mapping[Kind, Cost]
) -> str:
    """How much longer than DGPO a method takes to the target: iterations x work of one x seconds of the work.

    Args:
        known: what iterations cost, by which runs are timed.
        again: the same, measured once more.
    """
    lines = [
        f"| to {target:.0%}, times DGPO's | time | iterations | FLOPs of an iteration | seconds of a FLOP "
        "| time, by costs measured again | time, by what the core worked |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, of_seeds in rows[1:]:
        both = (of_seeds, rows[0].of_seeds)
        time = times(*both, target, seconds_of)
        iterations = times(*both, target, lambda point: point.iteration)
        work, engine = work_of(*both), seconds_of_work(*both)
        other_time = "?"
        if all(kind_of(found[0].run) in again for found in both):
            theirs_then, ours_then = ([_on_clock(result, known, again) for result in found] for found in both)
            other_time = times(theirs_then, ours_then, target, seconds_of)
        worked = times(*both, target, lambda point: point.core_s)
        lines.append(f"| {title} | {time} | {iterations} | {work:.2f} | {engine:.2f} | {other_time} | {worked} |")
    return "\n".join(lines)


def work_of(theirs: Sequence[Result], ours: Sequence[Result]) -> float:
    """How many times the FLOPs of an iteration of ours one of theirs takes."""
    one, other = (found[0].points[1] for found in (theirs, ours))
    return (one.flops / one.iteration) / (other.flops / other.iteration)


def seconds_of_work(theirs: Sequence[Result], ours: Sequence[Result]) -> float:
    """How many times as long a FLOP of theirs takes, in whatever precision it is."""
    one, other = (found[0].points[1] for found in (theirs, ours))
    return (one.seconds / one.flops) / (other.seconds / other.flops)


def _on_clock(result: Result, known: Mapping[Kind, Cost], other: Mapping[Kind, Cost]) -> Result:
    """The run where iterations cost what `other` says."""
    kind = kind_of(result.run)
    factor = other[kind].seconds / known[kind].seconds
    return replace(result, points=[replace(point, seconds=factor * point.seconds) for point in result.points])


def table_of_engine(rows: Sequence[Row], target: float, measured: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """What the engine adds: the same iterations on diffusers' code, and how long a method takes to the target with it.

    Args:
        measured: seconds of iterations, by method and engine, the same round in the same place.
    """
    lines = [
        "| | an iteration on diffusers' code, s | on the fused engine, s | engine "
        f"| to {target:.0%} on diffusers' code, times DGPO's on the fused engine |",
        "|---|---|---|---|---|",
    ]
    # The first of a method's rows: its other setting is not timed apart.
    first = {row.method: row for row in reversed(rows)}
    for method in (name for name in METHODS if name in first and name in measured):
        row = first[method]
        eager, fused = (measured[method][engine] for engine in ("eager", "fused"))
        factor = engine_factor(measured[method])
        theirs, ours = (middle(arrivals(found, target)) for found in (row.of_seeds, rows[0].of_seeds))
        product = ratio(theirs, ours, seconds_of, factor=factor)
        lines.append(f"| {row.title} | {median(eager):.2f} | {median(fused):.2f} | {factor:.2f} | {product} |")
    return "\n".join(lines)


def engine_factor(measured: Mapping[str, Sequence[float]]) -> float:
    """How many times as long an iteration takes on diffusers' code: the median of rounds in which both were timed."""
    return median(one / other for one, other in zip(measured["eager"], measured["fused"], strict=True))


def table_of_quality(rows: Sequence[Row], target: float) -> str:
    """What else has changed where the target is reached: of the seeds that do, their mean and range.

    Without those that were above it when they were first evaluated: at the target nothing of them is known.
    """
    lines = ["| | runs | soft | distance to rendered images | diversity of a group |", "|---|---|---|---|---|"]
    found = {"base": ("", [result.points[0] for row in rows for result in row.of_seeds][:1])}
    for title, of_seeds in rows:
        points = [arrival.point for arrival in arrivals(of_seeds, target) if not arrival.bound]
        found[title] = (f"{len(points)} of {len(of_seeds)}", points)
    for title, (runs, points) in found.items():
        if points:
            columns = (
                ([point.soft for point in points], "{:.3f}"),
                ([point.distance for point in points], "{:.5f}"),
                ([point.diversity for point in points], "{:.4f}"),
            )
            cells = " | ".join(mean_and_range(values, form) for values, form in columns)
            lines.append(f"| {title} | {runs} | {cells} |")
    return "\n".join(lines)


def table_of_sweep(swept: Mapping[str, Sequence[Result]]) -> str:
    """Every run, of each method the fastest first."""
    lines = [
        f"| | setting | seconds to {COMPARED:.0%} | mean over the run | best | at the end |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in swept.items():
        for result in by_arrival(found):
            best = max(point.strict for point in result.points)
            scores = " | ".join(f"{score:.1%}" for score in (result.mean_strict, best, result.points[-1].strict))
            seconds = way_to(COMPARED, [result], seconds_of)
            lines.append(f"| {METHODS[name].title} | {_setting(result)} | {seconds} | {scores} |")
    return "\n".join(lines)


def table_of_ablations(found: Mapping[str, Sequence[Result]]) -> str:
    """What a run of ten minutes comes to, by title: the mean of the seeds and their range."""
    lines = [
        f"| | runs | iterations to {COMPARED:.0%} | exact, mean over the run | exact at the end "
        "| distance to rendered images | diversity of a group |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, of_seeds in found.items():
        if of_seeds:
            way = way_to(COMPARED, of_seeds, lambda point: point.iteration)
            columns = (
                ([result.mean_strict for result in of_seeds], "{:.1%}"),
                ([result.points[-1].strict for result in of_seeds], "{:.1%}"),
                ([result.points[-1].distance for result in of_seeds], "{:.5f}"),
                ([result.points[-1].diversity for result in of_seeds], "{:.4f}"),
            )
            cells = " | ".join(mean_and_range(values, form) for values, form in columns)
            lines.append(f"| {title} | {len(of_seeds)} | {way} | {cells} |")
    return "\n".join(lines)


def mean_and_range(values: Sequence[float], form: str) -> str:
    shown = [form.format(value) for value in (mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"
