"""Where benchmarks speak to people: stderr, since stdout may be their table."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH = 220
"""In a file, where nothing is as wide as it is: a table that is cropped there is lost."""


def people() -> Console:
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)
