"""What this repository has said, and when, of how much sooner DGPO is there than others: the claim by day.

`python -m benchmarks.speedup_report --write` adds the times that it puts into docs/benchmarks.md, where they differ
from the last day's, and draws docs/claims.svg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from benchmarks.speedup_chart import Curve, draw
from benchmarks.speedup_tables import Row, seconds_of, times, way_to
from benchmarks.tables import read_rows, write_rows

CLAIMS = Path(__file__).parent / "results" / "claims.csv"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "claims.svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a day's end said of a method at one of its settings."""

    date: str
    commit: str
    """Of the working tree: the one before that which brought it."""
    title: str
    runs: str
    seconds: str
    times: str
    """DGPO's: of medians, which may be a bound, and in parentheses those of any two runs."""

    @property
    def says(self) -> tuple[str, ...]:
        return self.title, self.runs, self.seconds, self.times


def claims(rows: Sequence[Row], target: float, *, date: str, commit: str) -> list[Claim]:
    """What is said of each row, DGPO's first."""
    return [
        Claim(
            date=date, commit=commit, title=row.title, runs=row.those_that_reach(target),
            seconds=way_to(target, row.of_seeds, seconds_of),
            times="1" if row is rows[0] else times(row.of_seeds, rows[0].of_seeds, target, seconds_of),
        )
        for row in rows
    ]  # fmt: skip


def newest(history: Sequence[Claim]) -> list[Claim]:
    """Those of the last day."""
    return [claim for claim in history if claim.date == history[-1].date]


def added(history: Sequence[Claim], found: Sequence[Claim]) -> list[Claim]:
    """The history with `found` in it, all of a day: in place of what that day said before, unless that is the same."""
    if [claim.says for claim in newest(history)] == [claim.says for claim in found]:
        return [*history]
    return [*(claim for claim in history if claim.date != found[0].date), *found]


def read(path: Path = CLAIMS) -> list[Claim]:
    """The history, oldest first."""
    return [Claim(**row) for row in read_rows(path)]


def write(history: Sequence[Claim], path: Path = CLAIMS) -> None:
    write_rows(path, map(asdict, history))


def picture(history: Sequence[Claim]) -> str:
    """How many times DGPO's time others take, by day; bounds are no point of a curve."""
    first = date.fromisoformat(history[0].date)
    curves = []
    for title in dict.fromkeys(claim.title for claim in history):
        known = [claim for claim in history if claim.title == title and claim.times[0].isdigit()]
        curves.append(
            Curve(
                title=title,
                places=tuple(float((date.fromisoformat(claim.date) - first).days) for claim in known),
                values=tuple(float(claim.times.split()[0]) for claim in known),
            )
        )
    return draw(curves, across=f"days since {first}", up="times DGPO's seconds to 80 %", value="{:.1f}")
