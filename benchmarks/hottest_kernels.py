"""The kernels that take most of the time, from what Nsight Compute measured of each launch.

    python -m benchmarks.hottest_kernels NCU.csv OUT.csv [--number N]

NCU.csv is `ncu --csv --page raw --print-units base` with at least gpu__time_duration.sum, as `benchmarks/gpu_suite.sh`
writes it; what ncu says between its rows is skipped. Launches of one name are one row: bytes and time are sums,
percentages means weighted by time. A metric that was not measured is left empty.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.tables import write_rows

TIME = "gpu__time_duration.sum"
BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
MEANS = {
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
"""Of the table: of which metric."""
COLUMNS = ("kernel", "launches", "ms", "share", "gb", "gbps", *MEANS)
SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1, "second": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, metavar="NCU.csv", help="what ncu wrote")
    parser.add_argument("out", type=Path, metavar="OUT.csv", help="the table to write")
    parser.add_argument("--number", type=int, default=5, metavar="N", help="how many kernels (5)")
    options = parser.parse_args()
    rows = summary(options.measured.read_text(encoding="utf-8").splitlines(), number=options.number)
    write_rows(options.out, ({column: row.get(column, "") for column in COLUMNS} for row in rows))
    for row in rows:
        print(f"{row['share']:>6} {row['ms']:>10} ms {row['launches']:>6} launches  {row['kernel']}")


def summary(lines: Sequence[str], *, number: int) -> list[dict[str, str]]:
    """The rows of the table, longest first; shares are of all kernels in `lines`."""
    said = [line for line in lines if line.startswith("==")]  # ncu's own, before, between and behind the rows
    table = [line for line in lines if not line.startswith("==")]
    header = next((i for i, line in enumerate(table) if '"Kernel Name"' in line and TIME in line), None)
    if header is None or len(table) < header + 3:
        reasons = "\n".join(line for line in said if "ERROR" in line or "WARNING" in line)
        raise SystemExit(f"hottest_kernels: expected a table with {TIME}; did ncu find the kernels?\n{reasons}")
    units, *launches = csv.DictReader(table[header:])
    of_kernel = defaultdict(list)
    for launch in launches:
        of_kernel[launch["Kernel Name"]].append(launch)
    second = SECONDS[units[TIME]]
    seconds = {name: second * _sum(each[TIME] for each in rows) for name, rows in of_kernel.items()}
    hottest = sorted(seconds, key=lambda name: -seconds[name])[:number]
    return [_row(name, of_kernel[name], seconds[name], units, whole=sum(seconds.values())) for name in hottest]


def _row(
    name: str, launches: Sequence[Mapping[str, str]], seconds: float, units: Mapping[str, str], *, whole: float
) -> dict[str, str]:
    row = {
        "kernel": name, "launches": str(len(launches)), "ms": f"{1e3 * seconds:.3f}", "share": f"{seconds / whole:.4f}",
    }  # fmt: skip
    if all(units.get(metric) == "byte" for metric in BYTES):
        moved = sum(_sum(each[metric] for each in launches) for metric in BYTES)
        row |= {"gb": f"{1e-9 * moved:.3f}", "gbps": f"{1e-9 * moved / seconds:.0f}"}
    weights = [_number(each[TIME]) for each in launches]
    for column, metric in MEANS.items():
        values = [_number(each.get(metric, "")) for each in launches]
        mean = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
        row[column] = "" if math.isnan(mean) else f"{mean:.1f}"
    return row


def _sum(values: Iterable[str]) -> float:
    return math.fsum(_number(value) for value in values)


def _number(text: str) -> float:
    """A number as ncu writes it, with commas between thousands; not a number where it could not be measured."""
    text = text.replace(",", "")
    return float(text) if text and text != "n/a" else math.nan


if __name__ == "__main__":
    main()
