"""What the runs of benchmarks/speedup.py say: tables of docs/benchmarks.md and README.md, and pictures.

    python -m benchmarks.speedup_report [DIR | --write]

A target is reached where the straight line to the first evaluation at or above it, which the next one confirms, crosses
it. Nothing is extrapolated: of a run that has not, it is known up to its last evaluation but one, of one that had by
its first evaluation no more than that, and what is made of these is a bound. Methods are compared by as many runs of
each, at the settings with which they are soonest, and at those that keep the highest scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from benchmarks import claim_history, judge_noise
from benchmarks.pages import filled
from benchmarks.speedup_chart import Curve, draw
from benchmarks.speedup_costs import AGAIN, Cost, Kind, kind_of, read_costs, read_engines
from benchmarks.speedup_results import (
    RESULTS,
    Arrival,
    Point,
    Result,
    ablated,
    by_arrival,
    queue,
    results,
    soonest,
    steadiest,
)
from benchmarks.speedup_runs import ABLATIONS, COMPARED, HORIZON_S, METHODS, OURS, SWEEP_S, TARGETS, short
from benchmarks.tables import stamp

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, README = DOCS / "benchmarks.md", DOCS.parent / "README.md"


def arrivals(of_seeds: Sequence[Result], target: float) -> list[Arrival]:
    """Of every seed, the earliest first, and those that never arrived last."""
    found = [result.arrival(target) for result in of_seeds]
    return sorted(found, key=lambda arrival: (not arrival.is_reached, arrival.point.seconds))


def _middle(found: Sequence[Arrival]) -> Arrival:
    """The median, of two the lower."""
    return found[(len(found) - 1) // 2]


def way_to(target: float, of_seeds: Sequence[Result], of: Callable[[Point], float]) -> str:
    """The median of the seeds and their range, or what is known of them."""
    found = arrivals(of_seeds, target)
    shown = [f"{arrival.bound} {of(arrival.point):.0f}".lstrip() for arrival in (_middle(found), found[0], found[-1])]
    return shown[0] if len({*shown}) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def seconds_of(point: Point) -> float:
    return point.seconds


def times(theirs: Sequence[Result], ours: Sequence[Result], target: float, of: Callable[[Point], float]) -> str:
    """How many times ours theirs is to the target: of the medians, and the least and the most of any two runs."""
    their, our = arrivals(theirs, target), arrivals(ours, target)
    middle = ratio(_middle(their), _middle(our), of)
    if len(their) == len(our) == 1:
        return middle
    return f"{middle} ({ratio(their[0], our[-1], of)} to {ratio(their[-1], our[0], of)})"


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


def compared(soon: Mapping[str, Sequence[Result]], steady: Mapping[str, Sequence[Result]]) -> list[Row]:
    """Each method at the setting that was soonest in the sweep, DGPO first, and at its steadiest where that is another.

    Which of the two is sooner, one run of each could not tell.
    """
    rows = []
    for name, of_seeds in soon.items():
        rows.append(Row(_titled(METHODS[name].title, of_seeds), of_seeds))
        if steady[name][0].run.setting != of_seeds[0].run.setting:
            rows.append(Row(_titled(f"{METHODS[name].title} at its steadiest setting", steady[name]), steady[name]))
    return rows


def _titled(title: str, of_seeds: Sequence[Result]) -> str:
    """With a word where it is no final run that is shown."""
    return title if of_seeds[0].run.is_final else f"{title} (of the sweep)"


def table_of_targets(rows: Sequence[Row]) -> str:
    heads = " | ".join(f"{target:.0%}" for target in TARGETS)
    lines = [f"| | setting | runs | {heads} |", "|---|---|---|" + "---|" * len(TARGETS)]
    for row in rows:
        cells = " | ".join(way_to(target, row.of_seeds, seconds_of) for target in TARGETS)
        setting = _setting(row.of_seeds[0])
        lines.append(f"| {METHODS[row.method].title} | {setting} | {len(row.of_seeds)} | {cells} |")
    return "\n".join(lines)


def table_of_what_is_kept(
    soon: Mapping[str, Sequence[Result]], steady: Mapping[str, Sequence[Result]], target: float
) -> str:
    """Scores over the beginning that all runs have, of a method's two settings."""
    lines = [
        f"| | setting | runs | seconds to {target:.0%} | mean over the run | best | at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in soon:
        # Where both are of one setting, those of the soonest, which are measured first.
        of_settings = {found[0].run.setting: found for found in (steady[name], soon[name]) if found}
        for of_seeds in reversed(of_settings.values()):
            begun = [result.until(HORIZON_S) for result in of_seeds]
            scores = (
                [result.mean_strict for result in begun],
                [max(point.strict for point in result.points) for result in begun],
                [result.points[-1].strict for result in begun],
            )
            cells = " | ".join(
                [way_to(target, of_seeds, seconds_of), *(_mean_and_range(values, "{:.1%}") for values in scores)]
            )
            runs = str(len(of_seeds)) if of_seeds[0].run.is_final else f"{len(of_seeds)}, of the sweep"
            lines.append(f"| {METHODS[name].title} | {_setting(of_seeds[0])} | {runs} | {cells} |")
    return "\n".join(lines)


def _setting(result: Result) -> str:
    return ", ".join(f"`{short(item)}`" for item in result.run.setting)


def table_of_factors(rows: Sequence[Row], target: float, directory: Path = RESULTS) -> str:
    """How much longer than DGPO a method takes to the target: iterations x work of one x seconds of the work.

    Args:
        directory: has the costs of iterations that were measured again.
    """
    known, again = read_costs(directory), read_costs(directory, AGAIN)
    lines = [
        f"| to {target:.0%}, times DGPO's | time | iterations | FLOPs of an iteration | seconds of a FLOP "
        "| time, by costs measured again |",
        "|---|---|---|---|---|---|",
    ]
    for title, of_seeds in rows[1:]:
        both = (of_seeds, rows[0].of_seeds)
        time = times(*both, target, seconds_of)
        theirs, ours = (_middle(arrivals(found, target)) for found in both)
        iterations = ratio(theirs, ours, lambda point: point.iteration)
        one, other = (found[0].points[1] for found in both)
        work = (one.flops / one.iteration) / (other.flops / other.iteration)
        engine = (one.seconds / one.flops) / (other.seconds / other.flops)
        other_time = "?"
        if all(kind_of(found[0].run) in again for found in both):
            theirs_then, ours_then = ([_on_clock(result, known, again) for result in found] for found in both)
            other_time = times(theirs_then, ours_then, target, seconds_of)
        lines.append(f"| {title} | {time} | {iterations} | {work:.2f} | {engine:.2f} | {other_time} |")
    return "\n".join(lines)


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
        factor = median(one / other for one, other in zip(eager, fused, strict=True))
        theirs, ours = (_middle(arrivals(found, target)) for found in (row.of_seeds, rows[0].of_seeds))
        product = ratio(theirs, ours, seconds_of, factor=factor)
        lines.append(f"| {row.title} | {median(eager):.2f} | {median(fused):.2f} | {factor:.2f} | {product} |")
    return "\n".join(lines)


def headline(rows: Sequence[Row], target: float) -> str:
    """The answer, in a sentence."""
    if len(rows) < 2:
        return "To come."
    ours, flow_grpo = rows[0], next(row for row in rows if row.method == "flow-grpo")
    their, our = (_middle(arrivals(row.of_seeds, target)) for row in (flow_grpo, ours))
    theirs_s, ours_s = (f"{arrival.bound} {arrival.point.seconds:.0f}".lstrip() for arrival in (their, our))
    time, work = ratio(their, our, seconds_of), ratio(their, our, lambda point: point.flops)
    return (
        f"**{ours.title} is at {target:.0%} exact images after {ours_s} seconds of one core, {flow_grpo.title} after "
        f"{theirs_s}: {time} times as long, for {work} times the FLOPs.**"
    )


def others(rows: Sequence[Row], target: float) -> str:
    """What the answer is of the other methods and settings, in a sentence; to come where there are none."""
    if len(rows) < 2:
        return "To come."
    ours, *rest = rows
    middles = [_middle(arrivals(row.of_seeds, target)) for row in rest]
    our = _middle(arrivals(ours.of_seeds, target))
    told = [f"{row.title} {ratio(middle, our, seconds_of)}" for row, middle in zip(rest, middles, strict=True)]
    return f"Times {ours.title}'s seconds: {'; '.join(told)}."


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
            cells = " | ".join(_mean_and_range(values, form) for values, form in columns)
            lines.append(f"| {title} | {runs} | {cells} |")
    return "\n".join(lines)


def table_of_sweep(swept: Mapping[str, Sequence[Result]]) -> str:
    """Every run, of each method the soonest first."""
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


PAIRWISE = "diffusion-dpo"


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
            cells = " | ".join(_mean_and_range(values, form) for values, form in columns)
            lines.append(f"| {title} | {len(of_seeds)} | {way} | {cells} |")
    return "\n".join(lines)


def _mean_and_range(values: Sequence[float], form: str) -> str:
    shown = [form.format(value) for value in (mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def table_of_speed(rows: Sequence[Row], target: float) -> str:
    """What README shows: seconds to the target, how many times DGPO's they are, and of that what is no engine's."""
    lines = [
        f"| to {target:.0%} exact images | runs that come there | seconds of one core | times DGPO's "
        "| FLOPs, times DGPO's |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        time = work = "1"
        if row is not rows[0]:
            both = (row.of_seeds, rows[0].of_seeds)
            time, work = times(*both, target, seconds_of), times(*both, target, lambda point: point.flops)
        cells = f"{way_to(target, row.of_seeds, seconds_of)} | {time} | {work}"
        lines.append(f"| {row.title} | {row.those_that_reach(target)} | {cells} |")
    return "\n".join(lines)


def readme_tables(directory: Path = RESULTS) -> dict[str, str]:
    """The tables of README.md, by name."""
    rows = compared(*shown(directory))
    return {"speed": table_of_speed(rows, COMPARED), "headline": headline(rows, COMPARED)}


def tables(directory: Path = RESULTS) -> dict[str, str]:
    """The tables of the page, by name."""
    runs, chosen = queue(directory), shown(directory)
    rows = compared(*chosen)
    seeds = results(runs.finals, directory)
    begun = {name: [result.until(SWEEP_S) for result in of_seeds] for name, of_seeds in seeds.items()}
    changed = ablated(runs.ablations, directory)
    return {
        "ablations": table_of_ablations(
            {"DGPO, as chosen": begun[OURS]}
            | {ablation.title: changed[name] for name, ablation in ABLATIONS.items()}
            | {f"{METHODS[PAIRWISE].title}, as chosen": begun[PAIRWISE]}
        ),
        "headline": headline(rows, COMPARED),
        "others": others(rows, COMPARED),
        "targets": table_of_targets(rows),
        "factors": table_of_factors(rows, COMPARED, directory),
        "engine": table_of_engine(rows, COMPARED, read_engines(directory)),
        "kept": table_of_what_is_kept(chosen.soon, chosen.steady, COMPARED),
        "quality": table_of_quality(rows, COMPARED),
        "noise": judge_noise.sentence(judge_noise.read(directory)),
        "sweep": table_of_sweep(results(runs.sweep, directory)),
    }


class Shown(NamedTuple):
    """The runs that methods are shown by, from every seed, or, until there are any, the sweep's."""

    soon: dict[str, list[Result]]
    steady: dict[str, list[Result]]


def shown(directory: Path) -> Shown:
    """Of each method those of the setting that is soonest, and those of the steadiest."""
    runs = queue(directory)
    swept = {name: found for name, found in _alike(results(runs.sweep, directory)).items() if found}
    soon, steady = (_seeds(results(of_setting, directory)) for of_setting in (runs.finals, runs.steady))
    return Shown(
        soon={name: soon[name] or [soonest(found)] for name, found in swept.items()},
        steady={name: steady[name] or [steadiest(found)] for name, found in swept.items()},
    )


def _alike(found: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """As many runs of each method as of the one that has fewest: while some are to come, nobody has had more tries."""
    fewest = min(len(of_method) for of_method in found.values())
    return {name: [*of_method[:fewest]] for name, of_method in found.items()}


def _seeds(found: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """As many of each method, and an odd number, which has a median."""
    return {name: of_method[: len(of_method) - 1 + len(of_method) % 2] for name, of_method in _alike(found).items()}


AXES = {"seconds": "seconds of training, one core", "images": "images", "flops": "FLOPs"}
"""What scores are drawn over."""


def pictures(directory: Path = RESULTS) -> dict[str, str]:
    """Strict scores of the runs that methods are shown by, over each of `AXES`, as long as all of them last."""
    chosen = {
        name: [result.until(HORIZON_S) for result in of_seeds] for name, of_seeds in shown(directory).soon.items()
    }
    return {
        against: draw(
            [
                Curve(
                    title=METHODS[name].title,
                    places=tuple(float(getattr(point, against)) for point in result.points),
                    values=tuple(point.strict for point in result.points),
                )
                for name, of_seeds in chosen.items()
                for result in of_seeds
            ],
            across=across,
            up="exact images of held-out prompts",
        )
        for against, across in AXES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="?", type=Path, default=RESULTS, metavar="DIR", help="results to show tables of"
    )
    parser.add_argument("--write", action="store_true", help="put tables and pictures of the CPU's into docs/")
    options = parser.parse_args()
    if options.write:
        for page, found in ((PAGE, tables()), (README, readme_tables())):
            page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        for against, picture in pictures().items():
            (DOCS / f"speedup-{against}.svg").write_text(picture, encoding="utf-8")
        said = claim_history.claims(readme_tables()["speed"], **stamp())
        history = claim_history.added(claim_history.read(), said)
        claim_history.write(history)
        claim_history.PICTURE.write_text(claim_history.picture(history), encoding="utf-8")
        return
    for name, table in tables(options.results).items():
        print(f"{name}\n{table}\n")


if __name__ == "__main__":
    main()
