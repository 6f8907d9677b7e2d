"""A picture of where an iteration's time goes in each engine, from the tables of bench_engines.

python -m benchmarks.engine_chart DIR FILE.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from benchmarks.tables import read_rows

PARTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "sampling": (("transformer", "solver"), "#3b6fb6"),
    "VAE": (("vae",), "#7aa6d8"),
    "reference": (("reference",), "#c4622d"),
    "old policy": (("old",), "#e08b57"),
    "policy": (("weights", "policy"), "#f0b48c"),
    "backward": (("backward",), "#8f3f17"),
    "text": (("text",), "#5d9a6b"),
    "reward, rest": (("reward", "optimizer", "rest"), "#a8a8a8"),
}
"""What a bar is made of: stages, and their colour."""
WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 900, 130, 170, 62, 30, 14
LEGEND_COLUMN = 104


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where engines.csv and engines_stages.csv are")
    parser.add_argument("file", type=Path, metavar="FILE.svg", help="the picture to write")
    options = parser.parse_args()
    picture = draw(*(read_rows(options.directory / f"{stem}.csv") for stem in ("engines", "engines_stages")))
    options.file.write_text(picture, encoding="utf-8")


def draw(rows: Sequence[Mapping[str, str]], stages: Sequence[Mapping[str, str]]) -> str:
    """An SVG: for each engine a bar of its stages, which are those of the faster rounds, and its medians beside it."""
    iterations = [row for row in rows if row["work"] == "iteration"]
    ms = {(row["variant"], row["stage"]): float(row["ms"]) for row in stages}
    longest = max(float(row["median_ms"]) for row in iterations)
    first = iterations[0]
    bars = Markup().join(
        _bar(row, ms, top=TOP + index * (BAR + GAP), scale=(WIDTH - LEFT - RIGHT) / longest)
        for index, row in enumerate(iterations)
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" fill="#222">'
        '<rect width="100%" height="100%" fill="#fff"/>'
        '<text x="{left}" y="20" font-weight="bold">{model}: an iteration of {images} images on {device}</text>'
        "{legend}{bars}</svg>\n"
    ).format(
        width=WIDTH,
        height=TOP + len(iterations) * (BAR + GAP) + 4,
        left=LEFT,
        model=first["model"],
        images=first["images"],
        device=first["device"],
        legend=Markup().join(_legend()),
        bars=bars,
    )


def _legend() -> Iterator[Markup]:
    for index, (part, (_, color)) in enumerate(PARTS.items()):
        x = 8 + index * LEGEND_COLUMN
        yield Markup('<rect x="{x}" y="34" width="11" height="11" fill="{color}"/>').format(x=x, color=color)
        yield Markup('<text x="{x}" y="44" font-size="12">{part}</text>').format(x=x + 16, part=part)


def _bar(row: Mapping[str, str], ms: Mapping[tuple[str, str], float], *, top: float, scale: float) -> Markup:
    middle, x, pieces = top + BAR / 2 + 5, float(LEFT), []
    for part, (names, color) in PARTS.items():
        spent = sum(ms[row["variant"], name] for name in names)
        pieces.append(
            Markup(
                '<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{bar}" fill="{color}">'
                "<title>{part}: {spent:.0f} ms</title></rect>"
            ).format(x=x, top=top, width=spent * scale, bar=BAR, color=color, part=part, spent=spent)
        )
        x += spent * scale
    speed = f"{float(row['images_per_s']):.3g} images/s"
    speedup = f", {float(row['speedup']):.2f} x" if row["speedup"] else ""
    return Markup(
        '<text x="{left}" y="{middle}" text-anchor="end">{name}</text>{pieces}<text x="{x:.1f}" y="{middle}">{said}'
        "</text>"
    ).format(
        left=LEFT - 8, middle=middle, name=row["variant"], pieces=Markup().join(pieces), x=x + 8, said=speed + speedup
    )


if __name__ == "__main__":
    main()
