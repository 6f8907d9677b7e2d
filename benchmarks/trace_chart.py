"""A picture of the ranges of an iteration, from the trace that `dgpo-fast profile` writes.

python -m benchmarks.trace_chart TRACE.json FILE.svg [--zoom RANGE ...]

Time runs to the right, what a range holds lies under it. Above the whole iteration, below it a closer look at each
`--zoom`: a range's name, the first of which is shown, or two as FIRST..LAST, from the beginning of the one to the end
of the next other.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

COLORS = {
    "rollout": "#2c4f82", "train": "#6b3413", "transformer": "#3b6fb6", "solver": "#5d9a6b", "vae": "#7aa6d8",
    "text": "#5d9a6b", "reward": "#5d9a6b", "reference": "#c4622d", "old": "#e08b57", "policy": "#f0b48c",
    "backward": "#8f3f17", "step": "#c9d9ee", "block dual": "#7d6aa8", "block joint": "#a597c6",
    "block last": "#d2cae4",
}  # fmt: skip
"""Of a range, by its name or the beginning of it."""
OTHER = "#a8a8a8"
DARK = ("rollout", "train", "transformer", "reference", "backward", "block dual", "solver", "text", "reward")
"""Those whose names are written in white."""
WIDTH, MARGIN, LANE, TITLE, AXIS, GAP = 900, 12, 21, 24, 24, 16
CHARACTER = 6.4
"""Width of a letter, on average: a name that does not fit its range is cut to its kind, or left out."""
LEGEND = ("step", "transformer", "block dual", "block joint", "block last", "reward")
"""What is often too narrow for its name."""
ZOOMS = ("step 3", "reference..backward")


class Range(NamedTuple):
    """A range of the trace; milliseconds from the beginning of the first."""

    name: str
    start: float
    end: float
    depth: int


class Panel(NamedTuple):
    """A stretch of the trace, and what to call it."""

    title: str
    start: float
    end: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE.json", help="of `dgpo-fast profile`")
    parser.add_argument("file", type=Path, metavar="FILE.svg", help="the picture to write")
    parser.add_argument("--zoom", nargs="*", default=ZOOMS, metavar="RANGE", help=f"({' '.join(map(repr, ZOOMS))})")
    options = parser.parse_args()
    ranges = read(json.loads(options.trace.read_text(encoding="utf-8")))
    options.file.write_text(draw(ranges, options.zoom), encoding="utf-8")


def read(trace: dict[str, Any]) -> list[Range]:
    """The ranges of the thread that has most of them, outer ones first."""
    of_threads = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "user_annotation" and "#" not in event["name"]:  # torch's own have one
            of_threads[event["tid"]].append(event)
    if not of_threads:
        raise SystemExit("trace_chart: the trace has no ranges; was it written by dgpo-fast profile?")
    most = max(of_threads.values(), key=lambda events: len(events))
    events = sorted(most, key=lambda event: (event["ts"], -event["dur"]))
    ranges: list[Range] = []
    open_ends: list[float] = []
    for event in events:
        start = 1e-3 * (event["ts"] - events[0]["ts"])
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        end = start + 1e-3 * event["dur"]
        ranges.append(Range(event["name"], start, end, len(open_ends)))
        open_ends.append(end)
    return ranges


def draw(ranges: Sequence[Range], zooms: Sequence[str] = ZOOMS) -> str:
    """An SVG of all ranges, and of each zoom."""
    whole = Panel("", 0.0, max(each.end for each in ranges))
    parts = [find(ranges, zoom) for zoom in zooms]
    panels = [whole._replace(title=f"An iteration, {whole.end:.0f} ms")]
    for letter, part in zip("abcdefgh", parts, strict=False):
        panels.append(part._replace(title=f"{letter}: {part.title}, {part.end - part.start:.1f} ms"))
    drawn, top = Markup().join(_legend()), 6.0
    for number, panel in enumerate(panels):
        inside = [each for each in ranges if each.end > panel.start and each.start < panel.end]
        if number:
            least = min(each.depth for each in inside if each.start >= panel.start and each.end <= panel.end)
            inside = [each._replace(depth=each.depth - least) for each in inside if each.depth >= least]
        drawn += Markup().join(_panel(panel, inside, top=top, marked=[] if number else parts))
        top += TITLE + LANE * (1 + max(each.depth for each in inside)) + AXIS + (0 if number else 14) + GAP
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" font-family="sans-serif" '
        'font-size="12" fill="#222"><rect width="100%" height="100%" fill="#fff"/>{drawn}</svg>\n'
    ).format(width=WIDTH, height=top - GAP + 4, drawn=drawn)


def find(ranges: Sequence[Range], zoom: str) -> Panel:
    """The stretch that `zoom` names."""
    first, _, last = zoom.partition("..")
    begin = next((each for each in ranges if each.name == first), None)
    end = next((each for each in ranges if begin and each.name == (last or first) and each.start >= begin.start), None)
    if begin is None or end is None:
        raise SystemExit(
            f"trace_chart: --zoom: the trace has no {zoom!r}, but {sorted({each.name for each in ranges})}"
        )
    return Panel(f"from {first} to {last}" if last else first, begin.start, end.end)


def _panel(panel: Panel, ranges: Sequence[Range], *, top: float, marked: Sequence[Panel]) -> Iterator[Markup]:
    scale = (WIDTH - 2 * MARGIN) / (panel.end - panel.start)

    def place(ms: float) -> float:
        return MARGIN + scale * (min(max(ms, panel.start), panel.end) - panel.start)

    yield Markup('<text x="{x}" y="{y:.1f}" font-size="13" font-weight="bold">{title}</text>').format(
        x=MARGIN, y=top + 14, title=panel.title
    )
    lanes = top + TITLE
    for each in ranges:
        yield _range(each, x=place(each.start), end=place(each.end), y=lanes + LANE * each.depth)
    y = lanes + LANE * (1 + max(each.depth for each in ranges))
    for letter, part in zip("abcdefgh", marked, strict=False):
        x, end = place(part.start), place(part.end)
        yield Markup(
            '<path d="M{x:.1f} {y:.1f}v5H{end:.1f}v-5" fill="none" stroke="#222"/>'
            '<text x="{middle:.1f}" y="{text:.1f}" text-anchor="middle" font-weight="bold">{letter}</text>'
        ).format(x=x, end=max(end, x + 2), y=y + 2, middle=(x + end) / 2, text=y + 18, letter=letter)
    yield from _axis(panel, scale, y=y + (20 if marked else 4))


def _legend() -> Iterator[Markup]:
    for index, name in enumerate(LEGEND):
        x = WIDTH - MARGIN - 100 * (len(LEGEND) - index)
        yield Markup('<rect x="{x}" y="9" width="11" height="11" fill="{color}"/>').format(x=x, color=COLORS[name])
        yield Markup('<text x="{x}" y="19">{name}</text>').format(x=x + 16, name=name)


def _range(each: Range, *, x: float, end: float, y: float) -> Markup:
    name = next((known for known in sorted(COLORS, key=len, reverse=True) if each.name.startswith(known)), "")
    box = Markup(
        '<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height}" fill="{color}">'
        "<title>{name}: {ms:.2f} ms</title></rect>"
    ).format(
        x=x, y=y, width=max(end - x - 0.4, 0.4), height=LANE - 2, color=COLORS.get(name, OTHER), name=each.name,
        ms=each.end - each.start,
    )  # fmt: skip
    shorter = (each.name, each.name.removeprefix("block ").removesuffix(" backward"))
    said = next((each for each in shorter if CHARACTER * len(each) + 8 <= end - x), "")
    return box + Markup('<text x="{x:.1f}" y="{y:.1f}" font-size="11.5" fill="{ink}">{name}</text>').format(
        x=x + 4, y=y + 14, ink="#fff" if name in DARK else "#222", name=said
    )


def _axis(panel: Panel, scale: float, *, y: float) -> Iterator[Markup]:
    """A line with some eight ticks, milliseconds from the beginning of the panel."""
    length = panel.end - panel.start
    step = next(
        each * 10**power for power in range(-3, 6) for each in (1, 2, 5) if length / (each * 10**power) <= 9
    )  # fmt: skip
    yield Markup('<path d="M{x} {y:.1f}H{end}" stroke="#888"/>').format(x=MARGIN, y=y, end=WIDTH - MARGIN)
    for tick in range(int(length / step) + 1):
        x = MARGIN + scale * tick * step
        anchor = "start" if tick == 0 else "end" if x > WIDTH - 30 else "middle"
        unit = " ms" if tick == 0 else ""
        yield Markup(
            '<path d="M{x:.1f} {y:.1f}v4" stroke="#888"/>'
            '<text x="{x:.1f}" y="{text:.1f}" font-size="11" fill="#666" text-anchor="{anchor}">{ms:g}{unit}</text>'
        ).format(x=x, y=y, text=y + 15, anchor=anchor, ms=tick * step, unit=unit)


if __name__ == "__main__":
    main()
