"""Line charts and histograms as SVG that fills whatever width it is given, its text staying the size of the page's.

Places are percentages of the plot, which stylesheets give a height and margins for the labels. Only paths cannot be in
percent: they lie in an inner SVG of `UNITS` x `UNITS` that stretches without regard to its aspect ratio, while the
strokes keep their width. Colours and strokes are the stylesheet's too, by the classes given here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Floats = npt.NDArray[np.float64]

UNITS = 1000
MAX_PATH_POINTS = 800
"""Points of a path; a wide screen shows about as many columns."""
BARS_PER_TICK = 4
"""Of a histogram."""
MAX_READOUTS = 250
"""Points of a series that can be pointed at for their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values over steps, and how they are drawn. Values that are not finite leave a gap."""

    label: str
    x: Floats
    y: Floats
    color: str
    """A class of the stylesheet."""
    mark: Literal["line", "thin", "points"] = "line"
    spread: Floats | None = None
    """Half the height of a band around the line, such as a standard deviation."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The values that an axis spans, and where its labels stand."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def percent(self, value: float) -> float:
        """How far along the axis a value lies."""
        return round(100.0 * (value - self.low) / (self.high - self.low), 3)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_end: float,
    zero: bool = False,
    level: float | None = None,
    marks: Sequence[float] = (),
) -> Markup:
    """An SVG of `series` over steps 0 to `x_end`.

    Args:
        series: drawn in this order, the last on top.
        title: what a screen reader says.
        x_end: last step of the x axis.
        zero: whether the y axis always holds zero.
        level: a value that a line marks, and that the y axis holds.
        marks: steps that a line marks.
    """
    x_axis = step_axis(x_end)
    low, high = _extent(series, zero=zero)
    y_axis = value_axis(low, high) if level is None else value_axis(min(low, level), max(high, level))
    paths = Markup().join(_path(one, x_axis, y_axis) for one in series if one.mark != "points")
    points = Markup().join(_points(one, x_axis, y_axis) for one in series if one.mark == "points")
    return Markup(
        '<svg class="plot" role="img" aria-label="{title}" data-readout="{readout}">{grid}'
        '<svg width="100%" height="100%" viewBox="0 0 {units} {units}" preserveAspectRatio="none">{paths}</svg>'
        '{lines}{points}<line class="cursor" y1="0" y2="100%"/></svg>'
    ).format(
        title=title,
        readout=_readout(series, x_end),
        grid=_grid(x_axis, y_axis),
        units=UNITS,
        paths=paths,
        lines=_marked([] if level is None else [level], marks, x_axis, y_axis),
        points=points,
    )


def histogram(values: Floats, *, title: str, color: str, mean: float, band: tuple[float, float]) -> Markup:
    """An SVG of how many of `values` lie where: bars of equal width, the middle one around zero.

    Args:
        values: finite, at least one.
        title: what a screen reader says.
        color: a class of the stylesheet.
        mean: where a line stands.
        band: ends of a band around it, such as its interval; NaN for none.
    """
    ticks = value_axis(min(0.0, float(values.min())), max(0.0, float(values.max())))
    width = (ticks.ticks[1] - ticks.ticks[0]) / BARS_PER_TICK
    # Half a bar to each side, so that zero, and what lies on a tick, is in the middle of one and on no edge.
    first, last = (round(end / width) for end in (ticks.low, ticks.high))
    edges = (np.arange(first, last + 2) - 0.5) * width
    counts, _ = np.histogram(values, edges)
    x_axis, y_axis = Axis(float(edges[0]), float(edges[-1]), ticks.ticks), step_axis(float(counts.max()))
    return Markup('<svg class="plot" role="img" aria-label="{title}">{grid}{bars}{marks}</svg>').format(
        title=title,
        grid=_grid(x_axis, y_axis),
        bars=Markup().join(
            _bar(x_axis, y_axis, left=left, width=width, count=count, color=color)
            for left, count in zip(edges, counts.tolist(), strict=False)
            if count
        ),
        marks=_marks(x_axis, mean=mean, band=band, color=color),
    )


def value_axis(low: float, high: float, *, max_ticks: int = 6) -> Axis:
    """An axis from a round value at or below `low` to one at or above `high`, with at most `max_ticks` round ticks.

    Equal ends are moved apart; zero stays at the bottom.
    """
    if low == high:
        low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1.0)
    for step in _round_steps((high - low) / max_ticks):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < max_ticks:
            break
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def step_axis(end: float, *, max_ticks: int = 6) -> Axis:
    """An axis from 0 to exactly `end`, with ticks at round whole numbers."""
    step = next(step for step in _round_steps(end / max_ticks) if step >= 1 and step == int(step))
    return Axis(0.0, end, tuple(float(tick) for tick in range(0, int(end) + 1, int(step))))


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ascending ticks of an axis as text: no more decimals than they need, powers of ten where they are tiny."""
    largest = max(abs(tick) for tick in ticks)
    if 0 < largest < 1e-3:
        exponent = math.floor(math.log10(largest))
        mantissas = tick_labels([tick / 10.0**exponent for tick in ticks])
        return [
            f"{mantissa}·{power_of_ten(exponent)}" if tick else "0"
            for tick, mantissa in zip(ticks, mantissas, strict=True)
        ]
    tolerance = 1e-3 * min(after - before for before, after in itertools.pairwise(ticks))
    decimals = next(d for d in range(12) if all(abs(tick - round(tick, d)) < tolerance for tick in ticks))
    return [f"{tick + 0.0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]


def power_of_ten(exponent: int) -> str:
    """10 with its exponent raised."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def smooth(values: Floats, width: int) -> Floats:
    """The mean over the `width` values around each (fewer at the ends), leaving out what is not finite."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
    covered = count[stop] - count[start]
    return np.where(covered > 0, (total[stop] - total[start]) / np.maximum(covered, 1), np.nan)


def thin(length: int, limit: int) -> npt.NDArray[np.intp]:
    """At most `limit` indices of a series of `length`, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, limit)).round().astype(np.intp))


def extremes(values: Floats, limit: int) -> npt.NDArray[np.intp]:
    """At most `limit` indices that keep the look of a ragged series: the least and greatest of each stretch."""
    if len(values) <= limit:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), limit // 2)
    lowest = [s[np.argmin(np.where(np.isfinite(values[s]), values[s], np.inf))] for s in stretches]
    highest = [s[np.argmax(np.where(np.isfinite(values[s]), values[s], -np.inf))] for s in stretches]
    return np.unique([*lowest, *highest]).astype(np.intp)


def _round_steps(least: float) -> Iterator[float]:
    """1, 2 and 5 times powers of ten, from `least` upwards."""
    exponent = math.floor(math.log10(least))
    while True:
        # A negative power divides: 3 / 10 is the nearest float to 0.3, and 3 * 0.1 is not.
        scale = 10 ** abs(exponent)
        for factor in (1, 2, 5):
            step = factor * scale if exponent >= 0 else factor / scale
            if step >= least:
                yield float(step)
        exponent += 1


def _extent(series: Sequence[Series], *, zero: bool) -> tuple[float, float]:
    """The least and greatest finite value drawn."""
    drawn = [
        edge for one in series for edge in ([one.y] if one.spread is None else [one.y - one.spread, one.y + one.spread])
    ]
    values = np.concatenate([*drawn, np.zeros(1 if zero else 0)])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _grid(x_axis: Axis, y_axis: Axis) -> Markup:
    rows = Markup().join(
        Markup(
            '<line class="grid" x2="100%" y1="{y}%" y2="{y}%"/>'
            '<text class="tick y" x="-8" y="{y}%" dy=".32em">{label}</text>'
        ).format(y=100.0 - y_axis.percent(tick), label=label)
        for tick, label in zip(y_axis.ticks, tick_labels(y_axis.ticks), strict=True)
    )
    columns = Markup().join(
        Markup('<text class="tick x" x="{x}%" y="100%" dy="1.6em">{label}</text>').format(
            x=x_axis.percent(tick), label=label
        )
        for tick, label in zip(x_axis.ticks, tick_labels(x_axis.ticks), strict=True)
    )
    return rows + columns


def _bar(x_axis: Axis, y_axis: Axis, *, left: float, width: float, count: int, color: str) -> Markup:
    start, end, height = x_axis.percent(left), x_axis.percent(left + width), y_axis.percent(count)
    return Markup('<rect class="bar {}" x="{}%" y="{}%" width="{}%" height="{}%"/>').format(
        color, start, round(100.0 - height, 3), round(end - start, 3), height
    )


def _marks(x_axis: Axis, *, mean: float, band: tuple[float, float], color: str) -> Markup:
    """A line at zero and one at the mean, and the band around that, as far as the axis goes."""
    zero, middle = x_axis.percent(0.0), x_axis.percent(mean)
    lines = Markup(
        '<line class="zero" x1="{0}%" x2="{0}%" y2="100%"/><line class="mean {2}" x1="{1}%" x2="{1}%" y2="100%"/>'
    ).format(zero, middle, color)
    if not all(map(math.isfinite, band)):
        return lines
    start, end = (min(max(x_axis.percent(value), 0.0), 100.0) for value in band)
    return (
        Markup('<rect class="band {}" x="{}%" width="{}%" height="100%"/>').format(color, start, round(end - start, 3))
        + lines
    )


def _marked(levels: Sequence[float], steps: Sequence[float], x_axis: Axis, y_axis: Axis) -> Markup:
    """Lines across the plot, and from its top to its bottom."""
    across = [
        Markup('<line class="level" x2="100%" y1="{y}%" y2="{y}%"/>').format(y=100.0 - y_axis.percent(level))
        for level in levels
    ]
    down = [
        Markup('<line class="mark" x1="{x}%" x2="{x}%" y2="100%"/>').format(x=x_axis.percent(step)) for step in steps
    ]
    return Markup().join([*across, *down])


def _path(series: Series, x_axis: Axis, y_axis: Axis) -> Markup:
    kept = (extremes if series.mark == "thin" else _thin_values)(series.y, MAX_PATH_POINTS)
    x, y = series.x[kept], series.y[kept]
    line = Markup('<path class="{} {}" d="{}"/>').format(series.mark, series.color, _trace(x, y, x_axis, y_axis))
    if series.spread is None:
        return line
    spread = series.spread[kept]
    solid = np.isfinite(y) & np.isfinite(spread)
    around_x = np.concatenate([x[solid], x[solid][::-1]])
    around_y = np.concatenate([(y + spread)[solid], (y - spread)[solid][::-1]])
    return (
        Markup('<path class="band {}" d="{}"/>').format(series.color, _trace(around_x, around_y, x_axis, y_axis)) + line
    )


def _thin_values(values: Floats, limit: int) -> npt.NDArray[np.intp]:
    return thin(len(values), limit)


def _trace(x: Floats, y: Floats, x_axis: Axis, y_axis: Axis) -> str:
    """The commands of a path through the finite points; a lone point becomes a line of no length, which is a dot."""
    commands = []
    drawing = False
    for x_value, y_value in zip(x, y, strict=True):
        if not math.isfinite(y_value):
            drawing = False
            continue
        place = f"{x_axis.percent(x_value) * UNITS / 100:.1f} {UNITS - y_axis.percent(y_value) * UNITS / 100:.1f}"
        commands.append(f"L{place}" if drawing else f"M{place}h0")
        drawing = True
    return "".join(commands)


def _points(series: Series, x_axis: Axis, y_axis: Axis) -> Markup:
    """Points joined by straight lines."""
    pairs = [(float(x), float(y)) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    places = [(x_axis.percent(x), 100.0 - y_axis.percent(y)) for x, y in pairs]
    lines = Markup().join(
        Markup('<line class="join {}" x1="{}%" y1="{}%" x2="{}%" y2="{}%"/>').format(series.color, *start, *end)
        for start, end in itertools.pairwise(places)
    )
    dots = Markup().join(
        Markup('<circle class="point {}" cx="{}%" cy="{}%" r="4.5"/>').format(series.color, *place) for place in places
    )
    return lines + dots


def _readout(series: Sequence[Series], x_end: float) -> str:
    """What the page shows of the values under the pointer, as JSON."""
    shown = []
    for one in series:
        kept = [i for i in thin(len(one.x), MAX_READOUTS) if math.isfinite(one.y[i])]
        values = [float(f"{one.y[i]:.4g}") for i in kept]
        steps = [float(one.x[i]) for i in kept]
        shown.append({"label": one.label, "color": one.color, "mark": one.mark, "x": steps, "y": values})
    return json.dumps({"end": x_end, "series": shown}, separators=(",", ":"))
