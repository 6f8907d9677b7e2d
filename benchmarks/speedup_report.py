"""What the runs of benchmarks/speedup.py say: tables of docs/benchmarks.md and README.md, and pictures.

    python -m benchmarks.speedup_report [--write]

Nothing is extrapolated: a run that did not reach a target within its budget is "> budget", and what is divided by it is
a bound. Numbers are of evaluations, so a time is that of the first at or above the target that the next one confirms.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median

from benchmarks.pages import filled
from benchmarks.speedup_chart import Curve, draw
from benchmarks.speedup_results import RESULTS, Point, Result, ablated, best, queue, results
from benchmarks.speedup_runs import ABLATIONS, METHODS, OURS, SWEEP_S

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, README = DOCS / "benchmarks.md", DOCS.parent / "README.md"
TARGETS = (0.65, 0.70, 0.75, 0.80, 0.85)
COMPARED = 0.80
"""The target at which methods are compared, decided before any run."""


def seconds_to(target: float, of_seeds: Sequence[Result]) -> str:
    """The median of the seeds and their range, or that it took longer than the budget."""
    found = sorted(point.core_s if (point := result.first(target)) else math.inf for result in of_seeds)
    middle = median(found)
    budget = f"> {of_seeds[0].run.budget_s:.0f}"
    shown = [budget if math.isinf(value) else f"{value:.0f}" for value in (middle, found[0], found[-1])]
    return shown[0] if len(found) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def table_of_targets(chosen: Mapping[str, Sequence[Result]]) -> str:
    heads = " | ".join(f"{target:.0%}" for target in TARGETS)
    lines = [f"| | runs | {heads} | at the end |", "|---|---|" + "---|" * (len(TARGETS) + 1)]
    for name, of_seeds in chosen.items():
        if of_seeds:
            cells = " | ".join(seconds_to(target, of_seeds) for target in TARGETS)
            end = median(result.points[-1].strict for result in of_seeds)
            lines.append(f"| {METHODS[name].title} | {len(of_seeds)} | {cells} | {end:.1%} |")
    return "\n".join(lines)


def table_of_factors(chosen: Mapping[str, Sequence[Result]], target: float) -> str:
    """How much longer than DGPO a method takes to the target: iterations x work of one x seconds of the work."""
    lines = [
        f"| to {target:.0%}, times DGPO's | time | iterations | FLOPs of an iteration | seconds of a FLOP |",
        "|---|---|---|---|---|",
    ]
    ours = _typical(chosen.get(OURS, ()), target)
    for name, of_seeds in chosen.items():
        if name == OURS or ours is None:
            continue
        theirs = _typical(of_seeds, target)
        reached = theirs or min((result.points[-1] for result in of_seeds), key=lambda point: point.core_s)
        more = "" if theirs else "> "
        time, iterations = reached.core_s / ours.core_s, reached.iteration / ours.iteration
        work = (reached.flops / reached.iteration) / (ours.flops / ours.iteration)
        engine = (reached.core_s / reached.flops) / (ours.core_s / ours.flops)
        lines.append(
            f"| {METHODS[name].title} | {more}{time:.1f} | {more}{iterations:.1f} | {work:.2f} | {engine:.2f} |"
        )
    return "\n".join(lines)


def _typical(of_seeds: Sequence[Result], target: float) -> Point | None:
    """Where the median seed reached the target; None where it did not."""
    reached = sorted((point for result in of_seeds if (point := result.first(target))), key=lambda point: point.core_s)
    middle = (len(of_seeds) - 1) // 2
    return reached[middle] if 0 <= middle < len(reached) else None


def table_of_quality(chosen: Mapping[str, Sequence[Result]], target: float) -> str:
    """What else has changed where the target is reached."""
    lines = ["| | strict | soft | distance to rendered images | diversity of a group |", "|---|---|---|---|---|"]
    rows = [("base", result.points[0]) for of_seeds in chosen.values() for result in of_seeds][:1]
    rows += [
        (METHODS[name].title, point) for name, seeds in chosen.items() if seeds and (point := _typical(seeds, target))
    ]
    for title, point in rows:
        lines.append(
            f"| {title} | {point.strict:.1%} | {point.soft:.3f} | {point.distance:.5f} | {point.diversity:.4f} |"
        )
    return "\n".join(lines)


def table_of_sweep(swept: Mapping[str, Sequence[Result]]) -> str:
    lines = ["| | settings tried | best | strict, mean over the run | the worst's |", "|---|---|---|---|---|"]
    for name, found in swept.items():
        if found:
            chosen, worst = best(found), min(result.mean_strict for result in found)
            setting = ", ".join(f"`{item.rpartition('.')[2]}`" for item in chosen.run.setting)
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
    """What README shows: seconds to the target, and how many times DGPO's they are."""
    lines = [f"| to {target:.0%} exact images | runs | seconds of one core | times DGPO's |", "|---|---|---|---|"]
    ours = _typical(chosen.get(OURS, ()), target)
    for name, of_seeds in chosen.items():
        if of_seeds:
            theirs = _typical(of_seeds, target)
            reached = theirs or min((result.points[-1] for result in of_seeds), key=lambda point: point.core_s)
            more = "" if theirs else "> "
            times = "1" if name == OURS else f"{more}{reached.core_s / ours.core_s:.1f}" if ours else "?"
            lines.append(f"| {METHODS[name].title} | {len(of_seeds)} | {seconds_to(target, of_seeds)} | {times} |")
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
            | {f"{METHODS[PAIRWISE].title}, as chosen: pairs, not groups": begun[PAIRWISE]}
        ),
        "targets": table_of_targets(chosen),
        "factors": table_of_factors(chosen, COMPARED),
        "quality": table_of_quality(chosen, COMPARED),
        "sweep": table_of_sweep(swept),
    }


def _chosen(directory: Path) -> dict[str, list[Result]]:
    """The runs that a method is shown by: its best setting's from every seed, or, until there are any, the sweep's."""
    runs = queue(directory)
    swept, seeds = results(runs.sweep, directory), results(runs.finals, directory)
    return {name: seeds[name] or [best(found)] for name, found in swept.items() if found}


AXES = {"core_s": "seconds of training, one core", "images": "images", "flops": "FLOPs"}
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
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    if parser.parse_args().write:
        for page, found in ((PAGE, tables()), (README, readme_tables())):
            page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        for against, picture in pictures().items():
            (DOCS / f"speedup-{against}.svg").write_text(picture, encoding="utf-8")
        return
    for name, table in tables().items():
        print(f"{name}\n{table}\n")


if __name__ == "__main__":
    main()
