"""Sentences of pages in docs/ and of README.md whose numbers come from the runs of benchmarks/speedup.py.

Each is written for what the runs say now: that it still reads true is for who writes the page to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median

from benchmarks.speedup_results import Result
from benchmarks.speedup_runs import BASELINE, COMPARED, HORIZON_S, METHODS, OURS, TARGETS
from benchmarks.speedup_tables import (
    Row,
    arrivals,
    engine_factor,
    mean_and_range,
    middle,
    ratio,
    seconds_of,
    seconds_of_work,
    times,
    way_to,
    work_of,
)

TO_COME = "To come."

Engines = Mapping[str, Mapping[str, Sequence[float]]]
"""Seconds of iterations, by method and engine, the same round in the same place."""


def headline(rows: Sequence[Row], target: float) -> str:
    """The answer."""
    if len(rows) < 2:
        return TO_COME
    ours, theirs = rows[0], _baseline(rows)
    our, their = (middle(arrivals(row.of_seeds, target)) for row in (ours, theirs))
    ours_s, theirs_s = (f"{arrival.bound} {arrival.point.seconds:.0f}".lstrip() for arrival in (our, their))
    time = times(theirs.of_seeds, ours.of_seeds, target, seconds_of)
    work = ratio(their, our, lambda point: point.flops)
    sooner = TARGETS[TARGETS.index(target) - 1]
    time_before = times(theirs.of_seeds, ours.of_seeds, sooner, seconds_of)
    return (
        f"**On the embedded model {ours.title} reaches {target:.0%} exact images in {ours_s} s of one core, "
        f"{theirs.title} in {theirs_s} s: {time} times as long, for {work} times the FLOPs. To {sooner:.0%} the latter "
        f"takes {time_before} times as long.**"
    )


def product(rows: Sequence[Row], target: float, measured: Engines) -> str:
    """What the answer is made of."""
    if len(rows) < 2 or not measured:
        return TO_COME
    ours, theirs = rows[0], _baseline(rows)
    both = (theirs.of_seeds, ours.of_seeds)
    their, our = (middle(arrivals(found, target)) for found in both)
    factor = engine_factor(measured[BASELINE])
    eager = [
        one / other / work_of(*both)
        for one, other in zip(measured[BASELINE]["eager"], measured[OURS]["eager"], strict=True)
    ]
    return (
        f"{theirs.title}: **{ratio(their, our, seconds_of)} = {ratio(their, our, lambda point: point.iteration)} "
        f"(iterations) x {work_of(*both):.2f} (FLOPs of an iteration) x {seconds_of_work(*both):.2f} (seconds of a "
        "FLOP)**. "
        f"Where both draw in float32, as on diffusers' code, the last is {median(eager):.2f}. There an iteration of "
        f"{theirs.title} takes {factor:.2f} times as long as on the fused engine, which makes "
        f"**{ratio(their, our, seconds_of, factor=factor)}** beside DGPO on the fused engine."
    )


def lead_by_target(rows: Sequence[Row]) -> str:
    """Whether the answer is another at another target."""
    if len(rows) < 2:
        return TO_COME
    both = (_baseline(rows).of_seeds, rows[0].of_seeds)
    told = ", ".join(f"{times(*both, target, seconds_of)} at {target:.0%}" for target in TARGETS[1:])
    return f"{METHODS[BASELINE].title} takes, times DGPO's seconds: {told}."


def plateau(rows: Sequence[Row]) -> str:
    """Where the baseline's runs come to, over all of their budget."""
    if len(rows) < 2:
        return TO_COME
    of_seeds = [result for result in _baseline(rows).of_seeds if result.run.takes_its_budget]
    if not of_seeds:
        return TO_COME
    peaks = mean_and_range([max(point.strict for point in result.points) for result in of_seeds], "{:.0%}")
    ends = mean_and_range([result.points[-1].strict for result in of_seeds], "{:.0%}")
    minutes = min(result.points[-1].seconds for result in of_seeds) / 60
    return (
        f"{len(of_seeds)} of {METHODS[BASELINE].title}'s runs took all of their {minutes:.0f} minutes. They peak at "
        f"{peaks}, end at {ends}, and are about 80 % for most of that time: when they pass it is a matter of how "
        "evaluations scatter, more than of any other method."
    )


def constants(rows: Sequence[Row], ablated: Mapping[str, Sequence[Result]], target: float) -> str:
    """What DGPO takes with constants as they were published for large latents."""
    if len(rows) < 2 or not all(ablated[name] for name in ("beta-100", "published")):
        return TO_COME
    theirs = _baseline(rows)
    beta, published = (ablated[name] for name in ("beta-100", "published"))
    lead = times(theirs.of_seeds, beta, target, seconds_of)
    return (
        f"With its published beta of 100, and the rest as chosen, DGPO takes {way_to(target, beta, seconds_of)} s, and "
        f"{theirs.title} {lead} times as long. With its published beta, range, timestep clip and noise levels it takes "
        f"{way_to(target, published, seconds_of)} s, {theirs.title} {way_to(target, theirs.of_seeds, seconds_of)}: no "
        "lead. Neither was tuned anew, nor tried at another learning rate."
    )


def clock(rows: Sequence[Row], target: float) -> str:
    """What the core worked, beside what the clock of iterations says."""
    if len(rows) < 2:
        return TO_COME
    told = [
        f"{row.title} {way_to(target, row.of_seeds, lambda point: point.core_s)}" for row in (rows[0], _baseline(rows))
    ]
    lead = times(_baseline(rows).of_seeds, rows[0].of_seeds, target, lambda point: point.core_s)
    return f"In seconds that the core really worked: {', '.join(told)}, {lead} times as long."


def load(of_finals: Iterable[Result], of_sweep: Iterable[Result], of_ablations: Iterable[Result]) -> str:
    """How far the two clocks are apart, run by run."""

    def apart(found: Iterable[Result]) -> str:
        shares = [result.points[-1].core_s / result.points[-1].seconds - 1 for result in found]
        return f"{min(shares):+.0%} to {max(shares):+.0%}" if shares else "to come"

    return (
        "What the core worked during a run (`core_s` of its result; `wall_s` is what passed) differs from this clock "
        f"by {apart(of_finals)} in final runs, {apart(of_sweep)} in the sweep, {apart(of_ablations)} in the ablations."
    )


def kept(steady: Mapping[str, Sequence[Result]]) -> str:
    """Where runs end at the settings that keep most, the best first."""
    ends = {name: [result.until(HORIZON_S).points[-1].strict for result in found] for name, found in steady.items()}
    if not ends:
        return TO_COME
    order = sorted(ends, key=lambda name: -mean(ends[name]))

    def told(name: str) -> str:
        low, high = (f"{share:.0%}" for share in (min(ends[name]), max(ends[name])))
        return f"{METHODS[name].title} at {mean(ends[name]):.0%}" + (f" ({low} to {high})" if low != high else "")

    return f"After fifteen minutes, each at its steadiest setting: {', '.join(map(told, order))}."


def _baseline(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.method == BASELINE)


def sentences(
    rows: Sequence[Row],
    steady: Mapping[str, Sequence[Result]],
    ablated: Mapping[str, Sequence[Result]],
    measured: Engines,
) -> dict[str, str]:
    """Those of docs/benchmarks.md, by name."""
    return {
        "headline": headline(rows, COMPARED),
        "product": product(rows, COMPARED, measured),
        "lead": lead_by_target(rows),
        "plateau": plateau(rows),
        "constants": constants(rows, ablated, COMPARED),
        "clock": clock(rows, COMPARED),
        "ends": kept(steady),
    }
