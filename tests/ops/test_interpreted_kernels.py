"""The tests of this folder again, with Triton's interpreter serving the CPU.

A process of its own: the interpreter must be chosen before Triton is imported, and cannot share it with compilation.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_kernels_pass_the_tests_of_their_operators() -> None:
    own_process = [f"--ignore={HERE / name}" for name in (Path(__file__).name, "test_compiled_kernels.py")]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(HERE),
            *own_process,
            "-k",
            "not reference",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "DGPO_FAST_OPS": "triton"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "triton" in run.stdout or " passed" in run.stdout, run.stdout
