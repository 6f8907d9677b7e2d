"""Launches every operator's Triton and native implementation: for compute-sanitizer, ncu and their like to look at.

    python -m benchmarks.launches [SCRIPT ...] [--device cpu|cuda] [--shapes odd|cpu|cuda] [--few]

The arguments are those of the benchmark scripts, all or the ones named, by default at their small odd shapes. What
fails is named and does not stop the rest, unless the device is lost. Ends with status 1 where something failed or where
an operator was not launched by any implementation.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.operator_table import Call, Case, implementations
from dgpo_fast import ops

# Of bench_engines nothing is launched alone: it runs whole engines.
SCRIPTS = sorted({path.stem for path in Path(__file__).parent.glob("bench_*.py")} - {"bench_engines", "bench_ranges"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="such as bench_sde_step (all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=("odd", "cpu", "cuda"), default="odd")
    parser.add_argument("--few", action="store_true", help="the first shape alone, in bfloat16 where that is a case")
    options = parser.parse_args()
    if unknown := {*options.scripts} - {*SCRIPTS}:
        parser.error(f"expected of {', '.join(SCRIPTS)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    launched: dict[str, Counter[str]] = {}
    if not options.scripts:
        launched = {serving.operator: Counter() for serving in ops.serving()}
    failed = False
    for script in options.scripts or SCRIPTS:
        module = importlib.import_module(f"benchmarks.{script}")
        shapes = module.SHAPES[options.shapes]
        cases = module.cases(shapes[:1] if options.few else shapes, torch.device(options.device))
        for case in _few(cases) if options.few else cases:
            counts = launched.setdefault(case.operator, Counter())
            for name, call in implementations(case, options.device).items():
                if _launch(case, name, call, options.device):
                    counts[name] += 1
                else:
                    failed = True
    for operator, counts in launched.items():
        print(f"{operator}: {', '.join(f'{name} {count} x' for name, count in counts.items()) or 'not launched'}")
    sys.exit(int(failed or any(not counts for counts in launched.values())))


def _few(cases: Iterable[Case]) -> Iterator[Case]:
    """Those in bfloat16, and those of operators that have none."""
    drawn = list(cases)
    in_bfloat16 = {case.operator for case in drawn if case.dtype == torch.bfloat16}
    return (case for case in drawn if case.dtype == torch.bfloat16 or case.operator not in in_bfloat16)


def _launch(case: Case, name: str, call: Call, device: str) -> bool:
    """Whether the call came to its end, on the device as well."""
    try:
        call(*case.arguments)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as raised:  # of a compiler or of CUDA: the other kernels are to be looked at as well
        what = f"{case.operator}, {name}, {case.label}, {str(case.dtype)[6:]}"
        print(f"FAILED: {what}: {type(raised).__name__}: {raised}", file=sys.stderr, flush=True)
        if device == "cuda" and _is_lost():
            sys.exit("the device is lost to this process, and with it what would have followed")
        return False
    return True


def _is_lost() -> bool:
    """Whether nothing can be launched any more, as behind an illegal access."""
    try:
        torch.zeros(1, device="cuda").cpu()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
