"""Curves as an SVG that stands alone, in a colour for each title: scores over seconds, speedups over days."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from markupsafe import Markup

from dgpo_fast.charts import value_axis

COLORS = ("#1f5fa8", "#c4622d", "#4f8f5b", "#8c6bb1", "#d9a22b", "#5fb3b3", "#8a8a8a", "#b03a5b", "#3b3b3b")
PLOT, HEIGHT, LEFT, TOP, BOTTOM = 614, 420, 56, 28, 48
LEGEND, LETTER = 52, 7
"""Pixels of the legend beside its titles, and of a letter of these, generously."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    title: str
    places: tuple[float, ...]
    values: tuple[float, ...]


def draw(curves: Sequence[Curve], *, across: str, up: str, value: str = "{:.0%}", target: float | None = None) -> str:
    """An SVG.

    Args:
        across, up: what the axes are.
        value: how the vertical one's are written.
        target: a value to which a dashed line is drawn.
    """
    places = [place for curve in curves for place in curve.places] or [0.0]
    values = [value for curve in curves for value in curve.values] or [0.0]
    x_axis, y_axis = value_axis(0.0, max(places) or 1.0), value_axis(min(values), max(values))
    titles = list(dict.fromkeys(curve.title for curve in curves))
    color_of = dict(zip(titles, cycle(COLORS), strict=False))
    right = LEFT + PLOT
    width = right + LEGEND + LETTER * max(map(len, titles), default=0)

    def x(value: float) -> float:
        return LEFT + x_axis.percent(value) / 100 * PLOT

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - y_axis.percent(value) / 100 * (HEIGHT - TOP - BOTTOM)

    rows = Markup().join(
        Markup(
            '<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            '<text x="{label}" y="{below:.1f}" text-anchor="end">{value}</text>'
        ).format(left=LEFT, right=right, y=y(tick), label=LEFT - 8, below=y(tick) + 4, value=value.format(tick))
        for tick in y_axis.ticks
    )
    columns = Markup().join(
        Markup('<text x="{x:.1f}" y="{y}" text-anchor="middle">{value}</text>').format(
            x=x(tick), y=HEIGHT - BOTTOM + 20, value=_written(tick)
        )
        for tick in x_axis.ticks
    )
    if target is not None:
        rows += Markup(
            '<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888" stroke-dasharray="6 4"/>'
        ).format(left=LEFT, right=right, y=y(target))
    lines = Markup().join(
        Markup('<polyline fill="none" stroke="{color}" stroke-width="2" points="{points}"/>').format(
            color=color_of[curve.title],
            points=" ".join(
                f"{x(place):.1f},{y(value):.1f}" for place, value in zip(curve.places, curve.values, strict=True)
            ),
        )
        for curve in curves
    )
    dots = Markup().join(
        Markup('<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>').format(
            x=x(place), y=y(value), color=color_of[curve.title]
        )
        for curve in curves
        for place, value in zip(curve.places, curve.values, strict=True)
    )
    side = right + 16
    legend = Markup().join(
        Markup('<rect x="{x}" y="{y}" width="18" height="4" fill="{color}"/>').format(
            x=side, y=TOP + 20 * place + 5, color=color_of[title]
        )
        + Markup('<text x="{x}" y="{y}">{title}</text>').format(x=side + 26, y=TOP + 20 * place + 11, title=title)
        for place, title in enumerate(titles)
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" fill="#222"><rect width="100%" height="100%" fill="#fff"/>{rows}{columns}{lines}{dots}{legend}'
        '<text x="{middle}" y="{bottom}" text-anchor="middle">{across}</text>'
        '<text x="{left}" y="{top}">{up}</text></svg>\n'
    ).format(
        width=width, height=HEIGHT, rows=rows, columns=columns, lines=lines, dots=dots, legend=legend,
        middle=LEFT + PLOT / 2, bottom=HEIGHT - 8, across=across,
        left=LEFT, top=TOP - 8, up=up,
    )  # fmt: skip


def _written(number: float) -> str:
    """As a person writes it: 20,000 or 1.5e13."""
    return f"{number:,.10g}" if abs(number) < 1e6 else f"{number:.3g}".replace("e+", "e")
