"""The C++ tests of csrc/, built and run by CMake alone, with warnings as errors."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.own_process

ROOT = Path(__file__).resolve().parents[2]
# Beside this Python, whose environment need not be the active one.
CMAKE = Path(sys.executable).with_name("cmake")


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler, and none is required")
def test_the_cpp_tests_pass(tmp_path: Path) -> None:
    for command in (
        [
            CMAKE,
            "-S",
            ROOT,
            "-B",
            tmp_path,
            "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ],
        [CMAKE, "--build", tmp_path, "--target", "tests"],
        [CMAKE.with_name("ctest"), "--test-dir", tmp_path, "--no-tests=error", "--output-on-failure"],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
