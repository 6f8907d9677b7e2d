"""What the ranges of one iteration of `tiny-dgpo` cost where no profiler is attached.

python -m benchmarks.bench_ranges [--rounds N] [--out DIR]

Two ways. *Counted*: how many stages and spans an iteration has, times what one takes, from a loop over nothing else;
that resolves nanoseconds. *With and without*: the same iteration again and again, by turns as it is and with spans and
stages replaced by nothing; that would show what a loop cannot, but resolves no better than iterations repeat, which a
third turn shows, that is as the first.

Times are the process's own (time.process_time), since the machine may be shared. A stage is more than its range: its
clock existed before spans did, and is what the progress display and the report read.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.tables import stamp, write_rows
from dgpo_fast import Trainer, load_recipe, profiling
from dgpo_fast.environment import num_cores, processor_name
from dgpo_fast.profiling import Category, span, stage, watched_by

NOTHING = nullcontext()
KINDS = ("with", "without", "with again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of each kind of iteration (20)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where ranges.csv goes")
    options = parser.parse_args()
    if profiling.is_watched():
        sys.exit("bench_ranges: a profiler is attached to this process; run it without")
    rows = measure(options.rounds)
    for row in rows:
        print(f"{row['what']:<44} {row['value']:>12} {row['unit']}")
    if options.out is not None:
        about = provenance()
        write_rows(options.out / "ranges.csv", ({**row, **about} for row in rows))


def measure(rounds: int) -> list[dict[str, str]]:
    """The rows of the table."""
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(load_recipe("tiny-dgpo"), Path(out))
        trainer.run_iteration()
        counts = count(trainer)
        seconds = by_turns(trainer, rounds)
    span_ns, stage_ns = per_call_ns(lambda: span("step 0", "solver step")), per_call_ns(lambda: stage("solver"))
    num_stages = counts["stage"]
    num_spans = counts.total() - num_stages
    iteration_ns = 1e9 * statistics.median(seconds["with"])
    spans_ns, ranges_ns = num_spans * span_ns, counts.total() * span_ns
    all_ns = spans_ns + num_stages * stage_ns
    plain = seconds["with"]
    differences = {kind: [a / b - 1 for a, b in zip(plain, seconds[kind], strict=True)] for kind in KINDS[1:]}
    return [
        {"what": what, "value": value, "unit": unit}
        for what, value, unit in (
            *((f"ranges of an iteration: {category}", str(number), "") for category, number in sorted(counts.items())),
            ("a span that nobody watches", f"{span_ns:.0f}", "ns"),
            ("a stage, with its clock", f"{stage_ns:.0f}", "ns"),
            ("iteration, median", f"{1e-6 * iteration_ns:.1f}", "ms of processor time"),
            ("ranges of an iteration, counted", f"{100 * ranges_ns / iteration_ns:.5f}", "% of it"),
            ("the same and the stages' clock, counted", f"{100 * all_ns / iteration_ns:.5f}", "% of it"),
            *(
                row
                for kind, found in differences.items()
                for row in (
                    (f"with less {kind}, mean", f"{100 * statistics.mean(found):.2f}", "% of it"),
                    ("its standard error", f"{100 * statistics.stdev(found) / rounds**0.5:.2f}", "% of it"),
                )
            ),
            ("rounds", str(rounds), ""),
        )
    ]


def count(trainer: Trainer) -> Counter[Category]:
    """The ranges of one iteration."""
    counts: Counter[Category] = Counter()

    @contextmanager
    def watch(name: str, category: Category) -> Iterator[None]:
        counts[category] += 1
        yield

    with watched_by(watch):
        trainer.run_iteration()
    return counts


def by_turns(trainer: Trainer, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of iteration: always the same one, so that its prompts and its noise are."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    step = trainer.step
    for i in range(rounds):
        for turn in range(len(KINDS)):
            kind = KINDS[(turn + i) % len(KINDS)]
            trainer.step = step
            with without_ranges() if kind == "without" else NOTHING:
                start = time.process_time()
                trainer.run_iteration()
                seconds[kind].append(time.process_time() - start)
    return seconds


@contextmanager
def without_ranges() -> Iterator[None]:
    """Replaces `span` and `stage` by nothing in every module that has them."""
    modules = [module for name, module in sys.modules.items() if name.startswith("dgpo_fast")]
    patches = [
        patch.object(module, function.__name__, lambda *_: NOTHING)
        for module in modules
        for function in (span, stage)
        if getattr(module, function.__name__, None) is function
    ]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def per_call_ns(make: Callable[[], AbstractContextManager[object]], *, calls: int = 100_000, rounds: int = 9) -> float:
    """Median nanoseconds of entering and leaving what `make` makes, the call of `make` included."""

    def seconds(work: Callable[[], None]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def ranges() -> None:
        for _ in range(calls):
            with make():
                pass

    return statistics.median(1e9 * seconds(ranges) / calls for _ in range(rounds))


def provenance() -> dict[str, str]:
    return {
        "device": f"{processor_name()}, {num_cores()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "nvtx": importlib.metadata.version("nvtx"),
        **stamp(),
    }


if __name__ == "__main__":
    main()
