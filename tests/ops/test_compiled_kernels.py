"""What the Triton kernels become on sm_90, read from machine code that is compiled here, without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.own_process

HERE = Path(__file__).parent
# What moves little: one number for a whole block or row.
NARROW_LOADS = {"LDG.E", "LDG.E.64", "LDG.E.U16"}
NARROW_STORES = {"STG.E", "STG.E.U16"}

Cases = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(HERE / "compiled")],
        env={**environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def test_every_kernel_has_a_case(cases: Cases) -> None:
    kernels = {
        line.removeprefix("def ").partition("(")[0]
        for path in (HERE.parents[1] / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    without = {k for k in kernels if not any(name.startswith(k.removesuffix("_kernel")) for name in cases)}
    assert kernels and not without


def test_bulk_tensors_move_16_bytes_a_thread(cases: Cases) -> None:
    for name, case in cases.items():
        accesses, expected = case["accesses"], case["expected"]
        if expected is None:
            continue
        assert {width: accesses.get(width, 0) for width in expected} == expected, name
        assert set(accesses) - set(expected) <= NARROW_LOADS | NARROW_STORES, name


def test_nothing_spills(cases: Cases) -> None:
    assert {name: case["local_bytes"] for name, case in cases.items()} == dict.fromkeys(cases, 0)


def test_offsets_have_64_bits(cases: Cases) -> None:
    """A program's number meets strides: in 32 bits their product would overflow at 2^31 elements."""
    assert {name: case["narrow_offsets"] for name, case in cases.items()} == {name: [] for name in cases}


def test_drawn_noise_is_rounded_before_it_is_added_to(cases: Cases) -> None:
    """As noise in memory is: a thread that draws what it subtracts from would fuse the noise's last product with it."""
    drawn, anywhere = (cases[f"flow_interpolate drawn fp32{where}"]["additions"] for where in ("", " anywhere"))
    assert drawn == anywhere > 0


@pytest.mark.parametrize("rows", ["aligned", "anywhere"])
@pytest.mark.parametrize("kernel", ["sde_step", "velocity_errors", r"\w*norm_modulate\w*( summed)? D=1536 bf16"])
def test_sums_have_one_order(cases: Cases, kernel: str, rows: str) -> None:
    """What was drawn has the same density when given back, and an error is the same whatever others are asked for."""
    layouts = [case["layouts_of_sums"] for name, case in cases.items() if re.fullmatch(f"{kernel} (.* )?{rows}", name)]
    assert len(layouts) > 1 and all(len(each) == 1 and each == layouts[0] for each in layouts), layouts
