"""The tests of every operator that has a Triton kernel again, with Triton's interpreter serving the CPU.

A process of its own: the interpreter must be chosen before Triton is imported, and cannot share it with compilation.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.own_process

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# A kernel file without an operator is a part of some.
KERNELS = [
    path for path in sorted((ROOT / "kernels").glob("*.py")) if (ROOT / "dgpo_fast" / "ops" / path.name).exists()
]


def test_kernels_pass_the_tests_of_their_operators(interpreter_environ: dict[str, str]) -> None:
    files = [str(HERE / f"test_{kernel.stem}.py") for kernel in KERNELS]
    # The interpreter is slow and runs on one core: a worker for each.
    workers = ["-n", str(min(4, os.cpu_count() or 1))]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *workers,
            *files,
            "--implementation",
            "triton",
        ],
        env=interpreter_environ,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
