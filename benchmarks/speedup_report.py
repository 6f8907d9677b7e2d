"""What the runs of benchmarks/speedup.py say: tables of docs/benchmarks.md and README.md, and pictures.

    python -m benchmarks.speedup_report [DIR | --write]

A target is reached where the straight line to the first evaluation at or above it, which the next one confirms, crosses
it. Nothing is extrapolated: of a run that has not, it is known up to its last evaluation but one, and what is made of
that is a bound. Methods are compared by as many runs of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.pages import filled
from benchmarks.speedup_chart import Curve, draw
from benchmarks.speedup_results import RESULTS, Point, Result, ablated, best, queue, results
from benchmarks.speedup_runs import ABLATIONS, METHODS, OURS, SWEEP_S, TARGETS, short

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, README = DOCS / "benchmarks.md", DOCS.parent / "README.md"
COMPARED = 0.80
"""The target at which methods are compared, decided before any run of this protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Where the median seed of a method reached a target, or the last point at which it is known not to have."""

    point: Point
    is_reached: bool


def arrivals(of_seeds: Sequence[Result], target: float) -> list[Arrival]:
    """Of every seed, the earliest first, and those that never arrived last."""
    found = [
        Arrival(point=point or result.last_confirmable, is_reached=point is not None)
        for result in of_seeds
        for point in (result.first(target),)
    ]
    return sorted(found, key=lambda arrival: (not arrival.is_reached, arrival.point.seconds))


def typical(of_seeds: Sequence[Result], target: float) -> Arrival | None:
    """The median, or the lower of the two; None of nobody."""
    found = arrivals(of_seeds, target)
    return found[(len(found) - 1) // 2] if found else None


def seconds_to(target: float, of_seeds: Sequence[Result]) -> str:
    """The median of the seeds and their range, or up to when none had reached it."""
    found, middle = arrivals(of_seeds, target), typical(of_seeds, target)
    assert middle is not None
    shown = [
        f"{'' if arrival.is_reached else '> '}{arrival.point.seconds:.0f}" for arrival in (middle, found[0], found[-1])
    ]
    return shown[0] if len(found) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def ratio(theirs: Arrival, ours: Arrival, of: Callable[[Point], float]) -> str:
    """How many times ours theirs is, or a bound of it."""
    if not theirs.is_reached and not ours.is_reached:
        return "?"
    sign = "" if theirs.is_reached and ours.is_reached else "< " if theirs.is_reached else "> "
    return f"{sign}{of(theirs.point) / of(ours.point):.1f}"


def table_of_targets(chosen: Mapping[str, Sequence[Result]]) -> str:
    heads = " | ".join(f"{target:.0%}" for target in TARGETS)
    lines = [f"| | runs | {heads} | best | at the end |", "|---|---|" + "---|" * (len(TARGETS) + 2)]
    for name, of_seeds in chosen.items():
        if of_seeds:
            cells = " | ".join(seconds_to(target, of_seeds) for target in TARGETS)
            best_score = median(max(point.strict for point in result.points) for result in of_seeds)
            end = median(result.points[-1].strict for result in of_seeds)
            lines.append(f"| {METHODS[name].title} | {len(of_seeds)} | {cells} | {best_score:.1%} | {end:.1%} |")
    return "\n".join(lines)


def table_of_factors(chosen: Mapping[str, Sequence[Result]], target: float) -> str:
    """How much longer than DGPO a method takes to the target: iterations x work of one x seconds of the work."""
    lines = [
        f"| to {target:.0%}, times DGPO's | time | iterations | FLOPs of an iteration | seconds of a FLOP |",
        "|---|---|---|---|---|",
    ]
    ours = typical(chosen.get(OURS, ()), target)
    for name, of_seeds in chosen.items():
        theirs = typical(of_seeds, target)
        if name == OURS or ours is None or theirs is None:
            continue
        time = ratio(theirs, ours, lambda point: point.seconds)
        iterations = ratio(theirs, ours, lambda point: point.iteration)
        one, other = of_seeds[0].points[-1], chosen[OURS][0].points[-1]
        work = (one.flops / one.iteration) / (other.flops / other.iteration)
        engine = (one.seconds / one.flops) / (other.seconds / other.flops)
        lines.append(f"| {METHODS[name].title} | {time} | {iterations} | {work:.2f} | {engine:.2f} |")
    return "\n".join(lines)


def table_of_quality(chosen: Mapping[str, Sequence[Result]], target: float) -> str:
    """What else has changed where the target is reached: of the seeds that do, their mean and range."""
    lines = ["| | soft | distance to rendered images | diversity of a group |", "|---|---|---|---|"]
    found = {"base": [result.points[0] for of_seeds in chosen.values() for result in of_seeds][:1]}
    for name, of_seeds in chosen.items():
        found[METHODS[name].title] = [arrival.point for arrival in arrivals(of_seeds, target) if arrival.is_reached]
    for title, points in found.items():
        if points:
            columns = (
                ([point.soft for point in points], "{:.3f}"),
                ([point.distance for point in points], "{:.5f}"),
                ([point.diversity for point in points], "{:.4f}"),
            )
            cells = " | ".join(_mean_and_range(values, form) for values, form in columns)
            lines.append(f"| {title} | {cells} |")
    return "\n".join(lines)


def table_of_sweep(swept: Mapping[str, Sequence[Result]]) -> str:
    lines = ["| | settings tried | best | strict, mean over the run | the worst's |", "|---|---|---|---|---|"]
    for name, found in swept.items():
        if found:
            chosen, worst = best(found), min(result.mean_strict for result in found)
            setting = ", ".join(f"`{short(item)}`" for item in chosen.run.setting)
            number = f"{len(found)} of 8"
            lines.append(f"| {METHODS[name].title} | {number} | {setting} | {chosen.mean_strict:.1%} | {worst:.1%} |")
    return "\n".join(lines)


PAIRWISE = "diffusion-dpo"


def table_of_ablations(found: Mapping[str, Sequence[Result]]) -> str:
    """What a run of ten minutes comes to, by title: the mean of the seeds and their range."""
    lines = [
        "| | runs | exact, mean over the run | exact at the end | distance to rendered images | diversity of a group |",
        "|---|---|---|---|---|---|",
    ]
    for title, of_seeds in found.items():
        if of_seeds:
            columns = (
                ([result.mean_strict for result in of_seeds], "{:.1%}"),
                ([result.points[-1].strict for result in of_seeds], "{:.1%}"),
                ([result.points[-1].distance for result in of_seeds], "{:.5f}"),
                ([result.points[-1].diversity for result in of_seeds], "{:.4f}"),
            )
            cells = " | ".join(_mean_and_range(values, form) for values, form in columns)
            lines.append(f"| {title} | {len(of_seeds)} | {cells} |")
    return "\n".join(lines)


def _mean_and_range(values: Sequence[float], form: str) -> str:
    shown = [form.format(value) for value in (mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def table_of_speed(chosen: Mapping[str, Sequence[Result]], target: float) -> str:
    """What README shows: seconds to the target, how many times DGPO's they are, and of that what is no engine's."""
    lines = [
        f"| to {target:.0%} exact images | runs | seconds of one core | times DGPO's | FLOPs, times DGPO's |",
        "|---|---|---|---|---|",
    ]
    ours = typical(chosen.get(OURS, ()), target)
    for name, of_seeds in chosen.items():
        if of_seeds:
            theirs = typical(of_seeds, target)
            time = work = "1" if name == OURS else "?"
            if name != OURS and ours is not None and theirs is not None:
                time = ratio(theirs, ours, lambda point: point.seconds)
                work = ratio(theirs, ours, lambda point: point.flops)
            cells = f"{seconds_to(target, of_seeds)} | {time} | {work}"
            lines.append(f"| {METHODS[name].title} | {len(of_seeds)} | {cells} |")
    return "\n".join(lines)


def readme_tables(directory: Path = RESULTS) -> dict[str, str]:
    """The tables of README.md, by name."""
    return {"speed": table_of_speed(_chosen(directory), COMPARED)}


def tables(directory: Path = RESULTS) -> dict[str, str]:
    """The tables of the page, by name."""
    runs = queue(directory)
    swept, chosen, seeds = results(runs.sweep, directory), _chosen(directory), results(runs.finals, directory)
    begun = {name: [result.until(SWEEP_S) for result in of_seeds] for name, of_seeds in seeds.items()}
    changed = ablated(runs.ablations, directory)
    return {
        "ablations": table_of_ablations(
            {"DGPO, as chosen": begun[OURS]}
            | {ablation.title: changed[name] for name, ablation in ABLATIONS.items()}
            | {f"{METHODS[PAIRWISE].title}, as chosen": begun[PAIRWISE]}
        ),
        "targets": table_of_targets(chosen),
        "factors": table_of_factors(chosen, COMPARED),
        "quality": table_of_quality(chosen, COMPARED),
        "sweep": table_of_sweep(swept),
    }


def _chosen(directory: Path) -> dict[str, list[Result]]:
    """The runs that a method is shown by: its best setting's from every seed, or, until there are any, the sweep's."""
    runs = queue(directory)
    swept, seeds = _alike(results(runs.sweep, directory)), _alike(results(runs.finals, directory))
    return {name: seeds[name] or [best(found)] for name, found in swept.items() if found}


def _alike(found: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """As many runs of each method as of the one that has fewest: while some are to come, nobody has had more tries."""
    fewest = min(len(of_method) for of_method in found.values())
    return {name: [*of_method[:fewest]] for name, of_method in found.items()}


AXES = {"seconds": "seconds of training, one core", "images": "images", "flops": "FLOPs"}
"""What scores are drawn over."""


def pictures(directory: Path = RESULTS) -> dict[str, str]:
    """Strict scores of the runs that methods are shown by, over each of `AXES`."""
    chosen = _chosen(directory)
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
        return
    for name, table in tables(options.results).items():
        print(f"{name}\n{table}\n")


if __name__ == "__main__":
    main()
