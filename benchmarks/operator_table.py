"""The table of one operator: every implementation and baseline of each case, checked first, then timed in turn.

A script names its cases and calls `main`, which gives it its command line:

    python -m benchmarks.bench_<stem> [--device cpu|cuda] [--out DIR] [--rounds N] [--check]

The table goes to stderr; the rows go, case by case, as CSV to DIR/<stem>.csv, or to stdout where no DIR is named. The
roof of a case is a copy that moves as many bytes, timed among its variants. What fails its check gets no time, and the
script ends with status 1; a library that is not installed has a row that says so.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from math import floor, log10
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.console import people
from benchmarks.tables import stamp
from benchmarks.timing import Duration, copy_of, interleaved
from dgpo_fast import ops
from dgpo_fast.environment import device_name, package_versions

Call = Callable[..., Any]
Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[Shape]]
"""Shapes to time on "cpu" and on "cuda", and small "odd" ones to launch under a sanitizer (see launches.py)."""

TOKENS_OF_BLOCKS: Shapes = {
    "cpu": ((1, 333, 1536), (2, 1024, 1536), (2, 1024, 2432)),
    "cuda": ((16, 333, 1536), (16, 1024, 1536), (16, 4096, 1536), (16, 1024, 2432)),
    "odd": ((2, 19, 37), (1, 3, 8)),
}
"""Tokens of SD3.5's blocks, [B, N, D]: image and text; widths of the medium and the large model."""

COLUMNS = (
    "operator", "implementation", "case", "dtype", "bytes", "median_us", "low_us", "high_us", "gbps", "share_of_copy",
    "device", "torch", "triton", "commit", "date",
)  # fmt: skip
COPY = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One computation, and everything that competes to do it.

    Attributes:
        operator: its name in `dgpo_fast.ops`, or, with `implementations`, what it is called in the table.
        label: what tells the case from others of the operator.
        dtype: that of the tensors that make up the most of the bytes.
        arguments: in the order of the operator's schema, on the device.
        num_bytes: read and written at least, each tensor once; the formula stands in the script's docstring.
        reference: the computation in eager torch: the baseline "eager", what "torch.compile" compiles, and, given
            float64, the truth.
        implementations: what takes the operator's place where the case is not simply a call of it.
        baselines: libraries to beat, None for one that is not installed; may replace "torch.compile".
        compiled: whether "torch.compile" competes; not where compiling takes longer than the benchmark.
    """

    operator: str
    label: str
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    num_bytes: int
    reference: Call
    implementations: Mapping[str, Call] | None = None
    baselines: Mapping[str, Call | None] = field(default_factory=dict)
    compiled: bool = True


Cases = Callable[[Sequence[Shape], torch.device], Iterable[Case]]


def main(stem: str, description: str | None, cases: Cases, shapes: Shapes) -> None:
    """The command line of a benchmark script; ends the process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"where to run ({default})")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {stem}.csv there; to stdout without it")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="turns of each variant, 2 or more (30)")
    parser.add_argument("--check", action="store_true", help="check every variant, and time none")
    options = parser.parse_args()
    given = cases(shapes[options.device], torch.device(options.device))
    sys.exit(run(stem, given, device=options.device, out=options.out, rounds=0 if options.check else options.rounds))


def run(stem: str, cases: Iterable[Case], *, device: str, out: Path | None, rounds: int) -> int:
    """Checks and times the cases; `rounds` 0 only checks. The exit status: 1 where a variant failed its check.

    Cases are drawn as they are asked for, by `torch.manual_seed(0)`: whoever checks them checks the same numbers.
    """
    torch.manual_seed(0)
    console = people()
    origin = provenance(device)
    console.print(f"[bold]{stem}[/] on {origin['device']}, torch {origin['torch']}, {origin['commit']}")
    status = 0
    with ExitStack() as stack:
        file: TextIO = sys.stdout
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((out / f"{stem}.csv").open("w", buffering=1))
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in cases:
            torch.compiler.reset()  # a graph of its own for each case, with its sizes known
            variants = _variants(case, device)
            problems = _problems(case, variants)
            sound = {name: call for name, call in variants.items() if problems[name] is None}
            durations = _durations(case, sound, device=device, rounds=rounds) if rounds else {}
            missing = [name for name, problem in problems.items() if problem == _NOT_INSTALLED] if rounds else []
            writer.writerows({**row, **origin} for row in _rows(case, durations, missing=missing))
            _show(console, case, durations, problems)
            status |= any(problem not in (None, _NOT_INSTALLED) for problem in problems.values())
    return status


def implementations(case: Case, device: str) -> Mapping[str, Call]:
    """The project's own implementations of a case, by name."""
    if case.implementations is not None:
        return case.implementations
    found = ops.implementations(case.operator, device)  # type: ignore[arg-type]
    return {name: call for name, call in found.items() if name != "reference"}


def library(module: str, name: str) -> Any | None:
    """`name` of a library's module; None where the library is not installed."""
    return getattr(importlib.import_module(module), name) if find_spec(module.partition(".")[0]) else None


def dimensions(shape: Shape) -> str:
    """A shape as a label: "16x16x64x64"."""
    return "x".join(map(str, shape))


_NOT_INSTALLED = "not installed"


def _variants(case: Case, device: str) -> dict[str, Call | None]:
    own = implementations(case, device)
    # On the CPU Triton is its interpreter.
    own = {name: call for name, call in own.items() if (name, device) != ("triton", "cpu")}
    return {
        "eager": case.reference,
        **({"torch.compile": torch.compile(case.reference, dynamic=False)} if case.compiled else {}),
        **case.baselines,
        **own,
    }


def _problems(case: Case, variants: Mapping[str, Call | None]) -> dict[str, str | None]:
    """What keeps each variant from being timed; None where nothing does."""
    truth, baselines = _Truth(case), {"eager", "torch.compile", *case.baselines}
    return {
        name: _NOT_INSTALLED if call is None else truth.problem_of(call, is_baseline=name in baselines)
        for name, call in variants.items()
    }


class _Truth:
    """What a case's results are in float64, and how near eager torch comes to it in the case's own dtypes."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._exact = self._results(case.reference, in_float64=True)
        self._plain = self._results(case.reference)

    def problem_of(self, call: Call, *, is_baseline: bool) -> str | None:
        """What is wrong with a variant's results. Ours err at most twice as far as eager torch does.

        A baseline may round between its steps.
        """
        try:
            results = self._results(call)
        except Exception as raised:  # whatever a compiler or a library raises: reported, and the status is 1
            return f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        if [(x.shape, x.dtype) for x in results] != [(x.shape, x.dtype) for x in self._plain]:
            return "results of another shape or dtype"
        for result, plain, exact in zip(results, self._plain, self._exact, strict=True):
            if not result.numel():
                continue
            error, allowed = ((tensor.double() - exact.double()).abs().max() for tensor in (result, plain))
            bound = 2 * allowed + _rounding(result.dtype, is_baseline=is_baseline) * exact.double().abs().max()
            if not error <= bound:
                return f"{error:.3g} from float64, where {bound:.3g} is allowed"
        return None

    def _results(self, call: Call, *, in_float64: bool = False) -> list[Tensor]:
        """The tensors that a call returns, and those that it writes into its arguments."""
        arguments = tree_map_only(Tensor, Tensor.clone, self._case.arguments)
        if in_float64:
            arguments = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)
        returned = call(*arguments)
        written = [arguments[i] for i in _written_arguments(self._case.operator)]
        return [x for x in tree_leaves((returned, written)) if isinstance(x, Tensor)]


def _rounding(dtype: torch.dtype, *, is_baseline: bool) -> float:
    """What a result may err by in any case, relative to the largest: a few units of the arithmetic, or of `dtype`."""
    if not dtype.is_floating_point:
        return 0.0
    if is_baseline:
        return 32 * torch.finfo(dtype).eps
    return 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _written_arguments(operator: str) -> list[int]:
    """Positions of the arguments that an operator updates in place; none for what is no operator."""
    packet = getattr(torch.ops.dgpo_fast, operator, None)
    arguments = [] if packet is None else packet.default._schema.arguments
    return [i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]


def _durations(case: Case, variants: Mapping[str, Call | None], *, device: str, rounds: int) -> dict[str, Duration]:
    calls = {name: partial(call, *case.arguments) for name, call in variants.items() if call is not None}
    return interleaved({**calls, COPY: copy_of(case.num_bytes, device=device)}, rounds=rounds, device=device)


def _rows(case: Case, durations: Mapping[str, Duration], *, missing: Iterable[str]) -> list[dict[str, object]]:
    about: dict[str, object] = {
        "operator": case.operator, "case": case.label, "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.num_bytes,
    }  # fmt: skip
    timed = [
        {
            **about,
            "implementation": name,
            "median_us": f"{duration.median_us:.2f}",
            "low_us": f"{duration.low_us:.2f}",
            "high_us": f"{duration.high_us:.2f}",
            "gbps": f"{case.num_bytes / duration.median_us * 1e-3:.1f}",
            "share_of_copy": f"{durations[COPY].median_us / duration.median_us:.3f}",
        }
        for name, duration in durations.items()
    ]
    return [
        *timed,
        *({**about, "implementation": name, "median_us": f"not measured: {_NOT_INSTALLED}"} for name in missing),
    ]


def _show(console: Console, case: Case, durations: Mapping[str, Duration], problems: Mapping[str, str | None]) -> None:
    dtype = str(case.dtype).removeprefix("torch.")
    console.print(f"\n[bold]{case.operator}[/]  {case.label}  {dtype}  {case.num_bytes / 1e6:.3g} MB")
    if durations:
        console.print(_table(case, durations))
    else:
        console.print(f"[green]correct:[/] {', '.join(name for name in problems if problems[name] is None)}")
    for name, problem in problems.items():
        if problem is not None:
            console.print(f"{name}: {problem}", style="dim" if problem == _NOT_INSTALLED else "bold red", markup=False)


def _table(case: Case, durations: Mapping[str, Duration]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(width=16)
    for column, width in (("us", 8), ("20 % - 80 %", 17), ("over eager", 10), ("GB/s", 6), ("of the roof", 11)):
        table.add_column(column, width=width, justify="right", no_wrap=True)
    competing = {*durations} - {COPY}
    fastest = min(competing, key=lambda name: durations[name].median_us, default="")
    for name, duration in durations.items():
        median_us, low_us, high_us = duration.median_us, duration.low_us, duration.high_us
        table.add_row(
            name,
            _three_digits(median_us),
            f"{_three_digits(low_us)} - {_three_digits(high_us)}",
            f"{_three_digits(durations['eager'].median_us / median_us)} x" if {name, "eager"} <= competing else "",
            _three_digits(case.num_bytes / median_us * 1e-3),
            f"{durations[COPY].median_us / median_us:.0%}",
            style="bold green" if name == fastest else "dim" if name == COPY else "",
        )
    return table


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 2 - floor(log10(number)))}f}"


def provenance(device: str, *, packages: Sequence[str] = ("triton",)) -> dict[str, str]:
    """What stands in every row of a table: the device, torch, other packages, the commit and the day."""
    versions, name = package_versions(), device_name(torch.device(device))
    return {
        "device": name if device == "cuda" else f"{name}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **{package: versions.get(package, "") for package in packages},
        **stamp(),
    }
