"""The tests of every operator that has a Triton kernel again, with Triton's interpreter serving the CPU.

A process of its own: the interpreter must be chosen before Triton is imported, and cannot share it with compilation.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What is not an operator is a part of some.
PARTS = {"layer_norm", "random_normal", "samples"}
KERNELS = [path for path in sorted((HERE.parents[1] / "kernels").glob("*.py")) if path.stem not in PARTS]


def test_kernels_pass_the_tests_of_their_operators() -> None:
    files = [str(HERE / f"test_{kernel.stem}.py") for kernel in KERNELS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "not reference"],
        env={**os.environ, "TRITON_INTERPRET": "1", "DGPO_FAST_OPS": "triton"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
