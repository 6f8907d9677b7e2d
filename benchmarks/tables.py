"""Tables of measurements: CSV files, and what each of their rows says of the code it was measured with."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from shutil import which
from typing import TextIO


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a table, by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def write_rows(path: Path | None, rows: Iterable[Mapping[str, object]]) -> None:
    """A line for each row as soon as there is one, under the columns of the first; to stdout where no path is given."""
    writer = None
    with ExitStack() as stack:
        file: TextIO = sys.stdout
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w", newline="", encoding="utf-8"))
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, [*row])
                writer.writeheader()
            writer.writerow(row)
            file.flush()


def stamp() -> dict[str, str]:
    """The last columns of every table: of which commit it is, and of which day."""
    return {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}


def commit() -> str:
    """The commit of this checkout; DGPO_FAST_COMMIT names that of a copy that is none."""
    if "DGPO_FAST_COMMIT" in os.environ:
        return os.environ["DGPO_FAST_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    if which(command[0]) is None:
        return "unknown commit"
    described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return described.stdout.strip() or "unknown commit"
