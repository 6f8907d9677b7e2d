"""What the Triton kernels become on sm_90, read from machine code that is compiled here, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "ahead_of_time.py")],
        env={**environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


@pytest.mark.parametrize(("num_states", "velocity"), [(1, "fp32"), (2, "bf16"), (4, "bf16")])
def test_the_solver_step_moves_16_bytes_a_thread(
    machine_code: dict[str, dict[str, Any]], num_states: int, velocity: str
) -> None:
    case = machine_code[f"solver_step K={num_states} {velocity}"]
    # 1024 elements over 128 threads: 8 each, so two 16-byte accesses for a float32 operand and one for a bfloat16.
    accesses_per_velocity = 2 if velocity == "fp32" else 1
    assert case["accesses"]["LDG.E.128"] == 2 * num_states + 2 * accesses_per_velocity
    assert case["accesses"]["STG.E.128"] == 2 * num_states
    # What remains is 8 bytes wide and uniform: the row and the coefficients.
    assert case["accesses"]["LDG.E.64"] == 1 + num_states * (num_states + 2)
    assert set(case["accesses"]) == {"LDG.E.128", "LDG.E.64", "STG.E.128"}


def test_nothing_spills(machine_code: dict[str, dict[str, Any]]) -> None:
    assert {name: case["local_bytes"] for name, case in machine_code.items()} == dict.fromkeys(machine_code, 0)
