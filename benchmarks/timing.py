"""Times of competing implementations, taken in turn so that a change of clock or load meets all of them."""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Microseconds of one call: the median and the 20 % and 80 % quantiles of the rounds."""

    median_us: float
    low_us: float
    high_us: float


def interleaved(variants: Mapping[str, Callable[[], object]], *, rounds: int = 30) -> dict[str, Duration]:
    """The duration of each variant, from `rounds` rounds in which every variant runs for about two milliseconds."""
    calls = {name: _calls_in(0.002, call) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(_seconds_per_call(call, calls[name]) * 1e6)
    return {name: _duration(times) for name, times in samples.items()}


def copy_gbps(num_bytes: int, device: str = "cpu") -> float:
    """Bandwidth of torch's copy of a buffer, reads and writes together moving `num_bytes`: the roof for that size."""
    source = torch.ones(max(num_bytes // 8, 1), device=device)
    target = torch.empty_like(source)
    duration = interleaved({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / duration.median_us * 1e-3


def report(rows: Sequence[Mapping[str, object]], *, name: str, out: Path | None) -> None:
    """Prints the rows as CSV and, where `out` is a directory to be, writes them to <out>/<name>.csv."""
    files = [sys.stdout]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.append((out / f"{name}.csv").open("w"))
    for file in files:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for file in files[1:]:
        file.close()


def _calls_in(seconds: float, call: Callable[[], object]) -> int:
    call()
    return max(1, int(seconds / _seconds_per_call(call, 3)))


def _seconds_per_call(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _duration(times: Sequence[float]) -> Duration:
    fifths = statistics.quantiles(times, n=5)
    return Duration(median_us=statistics.median(times), low_us=fifths[0], high_us=fifths[-1])
