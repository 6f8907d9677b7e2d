"""Launches every operator's Triton and native implementation: for compute-sanitizer, ncu and their like to look at.

    python -m benchmarks.launches [--device cpu|cuda] [--shapes odd|cpu|cuda]

The arguments are those of the benchmark scripts, by default at their small odd shapes. Ends with status 1 where an
operator was not launched by any implementation, and names it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from pathlib import Path

import torch

from benchmarks.operator_table import implementations
from dgpo_fast import ops

# Of bench_engines nothing is launched alone: it runs whole engines.
SCRIPTS = sorted({path.stem for path in Path(__file__).parent.glob("bench_*.py")} - {"bench_engines", "bench_ranges"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=("odd", "cpu", "cuda"), default="odd")
    options = parser.parse_args()
    torch.manual_seed(0)
    launched: dict[str, Counter[str]] = {serving.operator: Counter() for serving in ops.serving()}
    for script in SCRIPTS:
        module = importlib.import_module(f"benchmarks.{script}")
        for case in module.cases(module.SHAPES[options.shapes], torch.device(options.device)):
            for name, call in implementations(case, options.device).items():
                call(*case.arguments)
                launched.setdefault(case.operator, Counter())[name] += 1
    if options.device == "cuda":
        torch.cuda.synchronize()
    for operator, counts in launched.items():
        print(f"{operator}: {', '.join(f'{name} {count} x' for name, count in counts.items()) or 'not launched'}")
    sys.exit(int(any(not counts for counts in launched.values())))


if __name__ == "__main__":
    main()
