"""Whether the engines are as fast as they were: `make bench-check`.

    python -m benchmarks.speed_check [--seconds N] [--from engines.csv] [--record] [--accept]

Runs bench_engines, whose variants take turns in one process, and compares how many times as fast as the published loop
each is with the best record of the same device in benchmarks/results/history.csv since a loss was last accepted. The
published loop stands in benchmarks/published.py and does not change with the package, so that a slower or busier
machine moves both alike. Ends with status 1 where an engine has lost more than what its rounds scatter by, or had too
few to tell, or nothing is recorded of the device. `--record` adds what was found to the history, and draws
docs/history.svg anew; a loss only with `--accept`, or one after the other would be forgotten.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

from benchmarks.engine_variants import BASELINE
from benchmarks.speedup_chart import Curve, draw
from benchmarks.tables import read_rows, write_rows

HISTORY = Path(__file__).parent / "results" / "history.csv"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "history.svg"
ALLOWED = 0.03
"""Of a speedup, beside the noise: builds of torch and neighbours of the machine are not the engine's doing."""
ERRORS = 3.0
"""How many standard errors are noise."""
MIN_ROUNDS = 8
"""Of fewer, nobody knows what they scatter by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """How many times as fast as the published loop an engine did a piece of work."""

    date: str
    commit: str
    device: str
    torch: str
    model: str
    variant: str
    work: str
    speedup: float
    error: float
    """Its relative standard error."""

    @property
    def subject(self) -> tuple[str, ...]:
        return self.device, self.model, self.variant, self.work


def records(rows: Sequence[Mapping[str, str]]) -> Iterator[Record]:
    """Those of a table of bench_engines that are of enough rounds."""
    for row in rows:
        if row["speedup"] and row["variant"] != BASELINE and int(row["rounds"]) >= MIN_ROUNDS:
            yield Record(
                **{key: row[key] for key in ("date", "commit", "device", "torch", "model", "variant", "work")},
                speedup=float(row["speedup"]),
                error=float(row["speedup_error"]),
            )


def too_few(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for each piece of work that had too few rounds."""
    rounds = {row["work"]: int(row["rounds"]) for row in rows if row["variant"] == BASELINE}
    return [
        f"{work}: {number} rounds are too few to tell, of {MIN_ROUNDS}: give a longer --seconds"
        for work, number in rounds.items()
        if number < MIN_ROUNDS
    ]


def noise(now: Record, before: Record) -> float:
    """By which share the speedup may have fallen and be the same."""
    return ERRORS * math.hypot(now.error, before.error) + ALLOWED


def has_lost(now: Record, before: Record) -> bool:
    """Whether the speedup has fallen beyond noise."""
    return 1 - now.speedup / before.speedup > noise(now, before)


def measures(history: Sequence[Record]) -> dict[tuple[str, ...], Record]:
    """What the next record of each subject is measured by: the best since one that had lost was recorded nevertheless.

    By the newest alone, losses within noise would add up unseen.
    """
    best: dict[tuple[str, ...], Record] = {}
    for record in history:
        before = best.get(record.subject)
        if before is None or record.speedup >= before.speedup or has_lost(record, before):
            best[record.subject] = record
    return best


class Comparison(NamedTuple):
    lines: list[str]
    has_lost: bool
    is_known: bool
    """Whether everything was recorded before."""


def compare(found: Sequence[Record], history: Sequence[Record]) -> Comparison:
    """A line for each record, and what they come to."""
    measured_by, lines, lost = measures(history), list[str](), False
    for now in found:
        what, before = f"{now.variant}, {now.work}: {now.speedup:.2f} x", measured_by.get(now.subject)
        if before is None:
            lines.append(f"{what}, NOT COMPARED: nothing is recorded on {now.device}; --record does")
            continue
        is_slower = has_lost(now, before)
        lost |= is_slower
        verdict = "SLOWER" if is_slower else "as fast"
        seen = f"a loss of {noise(now, before):.0%} would be seen"
        lines.append(f"{what}, {before.speedup:.2f} x on {before.date} ({before.commit}): {verdict} ({seen})")
    return Comparison(lines, lost, is_known=all(now.subject in measured_by for now in found))


def read(path: Path) -> list[Record]:
    """The history, oldest first; empty where there is none."""
    if not path.exists():
        return []
    return [
        Record(**{**row, "speedup": float(row["speedup"]), "error": float(row["error"])})  # type: ignore[arg-type]
        for row in read_rows(path)
    ]


def write(path: Path, history: Sequence[Record]) -> None:
    write_rows(path, ({**asdict(record), "error": f"{record.error:.4f}"} for record in history))


def picture(history: Sequence[Record]) -> str:
    """Speedups of whole iterations by day, a curve for each engine, model and device."""
    first = min(date.fromisoformat(record.date) for record in history)
    subjects = sorted({record.subject for record in history if record.subject[-1] == "iteration"})
    curves = []
    for subject in subjects:
        of_subject = [record for record in history if record.subject == subject]
        days = tuple(float((date.fromisoformat(record.date) - first).days) for record in of_subject)
        speedups = tuple(record.speedup for record in of_subject)
        device, model, variant, _ = subject
        curves.append(Curve(title=f"{variant}, {model} on {device}", places=days, values=speedups))
    return draw(curves, across=f"days since {first}", up="times as fast as the published loop", value="{:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="for the measurement")
    parser.add_argument("--from", dest="table", type=Path, metavar="engines.csv", help="a table instead of measuring")
    parser.add_argument("--record", action="store_true", help="add what was found to the history")
    parser.add_argument(
        "--accept", action="store_true", help="with --record, also what is slower: it is the new measure"
    )
    options = parser.parse_args()
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        table = options.table or Path(scratch) / "engines.csv"
        if options.table is None:
            bench = [sys.executable, "-m", "benchmarks.bench_engines"]
            command = [*bench, "--out", scratch, f"--seconds={options.seconds}"]
            # What is wrong or fails has no row, and the others are compared nevertheless.
            status = subprocess.run(command).returncode
            if not table.exists():
                sys.exit(f"speed_check: bench_engines measured nothing (status {status})")
        rows = read_rows(table)
    found, history, short = list(records(rows)), read(HISTORY), too_few(rows)
    compared = compare(found, history)
    print("\n".join([*compared.lines, *short]))
    is_recorded = options.record and (options.accept or not compared.has_lost)
    if is_recorded:
        write(HISTORY, [*history, *found])
        PICTURE.write_text(picture(read(HISTORY)), encoding="utf-8")
    elif options.record:
        print("nothing is recorded: --accept records what is slower, too")
    sys.exit(status or compared.has_lost or bool(short) or not (compared.is_known or is_recorded))


if __name__ == "__main__":
    main()
