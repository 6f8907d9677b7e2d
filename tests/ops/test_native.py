"""The C++ tests of csrc/, built and run by CMake alone, with warnings as errors."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler, and none is required")
def test_the_cpp_tests_pass(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"],
        ["cmake", "--build", str(tmp_path), "--target", "tests"],
        ["ctest", "--test-dir", str(tmp_path), "--no-tests=error", "--output-on-failure"],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
