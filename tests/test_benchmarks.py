"""The frame of the benchmarks: what is wrong gets no time, what is missing is named, and every operator has its script.

Times themselves are not looked at: they are the machine's.
"""

from __future__ import annotations

import csv
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops
from dgpo_fast.ops.ema_lerp import reference_ as averages_in_place
from dgpo_fast.ops.solver_step import reference, reference_

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted({path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} - {"bench_engines", "bench_ranges"})
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"

Run = Callable[..., tuple[int, list[dict[str, str]], str]]


@pytest.fixture(autouse=True)
def from_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/ is no part of the package. Nothing is compiled: that takes seconds a case."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def make_case() -> Callable[..., Any]:
    """`make_case(**changes)`: one step of the solver, of 2 x 3 numbers."""
    from benchmarks.operator_table import Case

    def make(operator: str = "solver_step", **changes: Any) -> Case:
        table = torch.tensor([[[0.5, 0.25, 0.125]]], dtype=torch.float64)
        arguments = (torch.ones(1, 2, 3), torch.ones(2, 3), torch.ones(2, 3), table, torch.tensor([0, 0]))
        default = reference_ if operator.endswith("_") else reference
        given = {"reference": default, "label": "2x3", "dtype": torch.float32, "num_bytes": 96, "arguments": arguments}
        return Case(operator=operator, **{**given, **changes})

    return make


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(case, rounds=2)`: the exit status, the rows of the CSV file, and what people see."""
    from benchmarks.operator_table import run as run_cases

    def run_one(case: Any, *, rounds: int = 2) -> tuple[int, list[dict[str, str]], str]:
        status = run_cases("steps", [case], device="cpu", out=tmp_path, rounds=rounds)
        with (tmp_path / "steps.csv").open() as file:
            return status, list(csv.DictReader(file)), capsys.readouterr().err

    return run_one


def test_rows_say_what_was_measured_and_on_what(run: Run, make_case: Callable[..., Any]) -> None:
    from benchmarks.operator_table import COLUMNS

    status, rows, _ = run(make_case())
    assert status == 0
    own = {*ops.implementations("solver_step")} - {"reference", "triton"}
    assert {row["implementation"] for row in rows} == {"eager", "torch.compile", "copy"} | own
    for row in rows:
        assert tuple(row) == COLUMNS
        assert (row["operator"], row["case"], row["dtype"], row["bytes"]) == ("solver_step", "2x3", "float32", "96")
        assert float(row["low_us"]) <= float(row["median_us"]) <= float(row["high_us"])
        assert float(row["gbps"]) == pytest.approx(96 / float(row["median_us"]) * 1e-3, abs=0.051)
        assert all(row[column] for column in ("device", "torch", "commit", "date"))
    assert [row["share_of_copy"] for row in rows if row["implementation"] == "copy"] == ["1.000"]


def slightly_wrong(*arguments: Any) -> Tensor:
    return reference(*arguments) * (1 + 1e-5)


def of_another_dtype(*arguments: Any) -> Tensor:
    return reference(*arguments).double()


def not_a_number(*arguments: Any) -> Tensor:
    return reference(*arguments) * torch.nan


def with_a_count(*arguments: Any, count: int = 3) -> tuple[Tensor, Tensor]:
    return reference(*arguments), torch.tensor(count)


def test_whole_numbers_are_compared_as_well(run: Run, make_case: Callable[..., Any]) -> None:
    variants = {"right": with_a_count, "wrong": partial(with_a_count, count=4)}
    status, _, shown = run(make_case(reference=with_a_count, implementations=variants), rounds=0)
    assert status == 1
    assert "correct: eager, torch.compile, right" in shown.splitlines()


def broken(*arguments: Any) -> Tensor:
    raise RuntimeError("no such kernel\nand a long story")


@pytest.mark.parametrize("wrong", [slightly_wrong, of_another_dtype, not_a_number, broken])
def test_what_is_wrong_gets_no_time_and_fails_the_script(
    run: Run, make_case: Callable[..., Any], wrong: Callable[..., Tensor]
) -> None:
    status, rows, shown = run(make_case(implementations={"right": reference, "wrong": wrong}))
    assert status == 1
    assert {row["implementation"] for row in rows} == {"eager", "torch.compile", "right", "copy"}
    (line,) = (line for line in shown.splitlines() if line.startswith("wrong: "))
    if wrong is broken:
        assert line == "wrong: RuntimeError: no such kernel"


def test_a_wrong_baseline_fails_the_script_as_well(run: Run, make_case: Callable[..., Any]) -> None:
    rough = run(make_case(baselines={"library": slightly_wrong}))
    assert rough[0] == 1
    rounded = run(make_case(baselines={"library": lambda *arguments: reference(*arguments) * (1 + 1e-6)}))
    assert rounded[0] == 0, "a baseline may round between its steps"


def test_a_library_that_is_missing_is_named(run: Run, make_case: Callable[..., Any]) -> None:
    from benchmarks.operator_table import library

    assert library("no_such_package.norms", "norm") is None
    assert library("torch.nn", "Linear") is torch.nn.Linear
    status, rows, shown = run(make_case(baselines={"library": None}))
    assert status == 0
    assert "library: not installed" in shown.splitlines()
    (row,) = (row for row in rows if row["implementation"] == "library")
    assert (row["median_us"], row["gbps"]) == ("not measured: not installed", "")


def test_an_update_in_place_is_judged_by_what_it_writes(run: Run, make_case: Callable[..., Any]) -> None:
    lazy = make_case("solver_step_", implementations={"right": reference_, "lazy": lambda *arguments: None})
    before = lazy.arguments[0].clone()
    status, rows, shown = run(lazy, rounds=0)
    assert (status, rows) == (1, [])
    assert "correct: eager, torch.compile, right" in shown.splitlines()
    assert any(line.startswith("lazy: ") for line in shown.splitlines())
    assert torch.equal(lazy.arguments[0], before), "a check works on copies"


def one_short(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    averages_in_place(averages[:-1], values[:-1], decay)


def test_of_a_list_in_place_every_tensor_is_judged(run: Run, make_case: Callable[..., Any]) -> None:
    averages = [torch.ones(2, 3), torch.ones(4)]
    lists = make_case(
        "ema_lerp_",
        arguments=(averages, [torch.zeros(2, 3), torch.zeros(4)], 0.5),
        reference=averages_in_place,
        implementations={"right": averages_in_place, "one short": one_short},
    )
    status, _, shown = run(lists, rounds=0)
    assert status == 1
    assert "correct: eager, torch.compile, right" in shown.splitlines()
    assert all(torch.equal(average, torch.ones_like(average)) for average in averages), "a check works on copies"


def test_torch_compile_can_be_left_out(run: Run, make_case: Callable[..., Any]) -> None:
    status, rows, _ = run(make_case(compiled=False, implementations={"right": reference}))
    assert status == 0
    assert {row["implementation"] for row in rows} == {"eager", "right", "copy"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_variant_of_every_script_is_correct(script: str, tmp_path: Path) -> None:
    from benchmarks.operator_table import run as run_cases

    module = importlib.import_module(f"benchmarks.{script}")
    cases = module.cases(module.SHAPES["odd"], torch.device("cpu"))
    assert run_cases(script, cases, device="cpu", out=tmp_path, rounds=0) == 0


@pytest.mark.skipif(ops.serving()[0].implementation == "reference", reason="there is nothing but the reference")
def test_every_operator_is_launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import launches

    monkeypatch.setattr("sys.argv", ["launches", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        launches.main()
    assert ended.value.code == 0, capsys.readouterr().out


def test_an_operator_without_a_launch_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import launches

    monkeypatch.setattr("sys.argv", ["launches", "--device", "cpu"])
    monkeypatch.setattr(launches, "SCRIPTS", ["bench_flow_interpolate"])
    with pytest.raises(SystemExit) as ended:
        launches.main()
    assert ended.value.code == 1
    assert "velocity_errors_backward: not launched" in capsys.readouterr().out


def test_a_launch_that_fails_is_named_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_case: Callable[..., Any]
) -> None:
    from benchmarks import bench_solver_step, launches

    cases = [
        make_case(implementations={"broken": broken, "right": reference}, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    monkeypatch.setattr(bench_solver_step, "cases", lambda shapes, device: cases)
    monkeypatch.setattr("sys.argv", ["launches", "bench_solver_step", "--device", "cpu", "--few"])
    with pytest.raises(SystemExit) as ended:
        launches.main()
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.startswith("FAILED: solver_step, broken, 2x3, bfloat16: RuntimeError: no such kernel")
    assert captured.err.count("FAILED") == 1, "few are those in bfloat16"
    assert captured.out == "solver_step: right 1 x\n"


def test_an_unknown_script_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import launches

    monkeypatch.setattr("sys.argv", ["launches", "bench_engines"])
    with pytest.raises(SystemExit) as ended:
        launches.main()
    assert ended.value.code == 2
    assert "got bench_engines" in capsys.readouterr().err


def test_the_suite_for_a_gpu_runs_every_script(tmp_path: Path) -> None:
    suite = ["bash", SUITE]
    environ = {**os.environ, "PYTHON": sys.executable}
    plan = subprocess.run([*suite, "--out", tmp_path / "new", "--dry-run"], env=environ, capture_output=True, text=True)
    assert (plan.returncode, plan.stderr) == (0, "")
    parts = {line.partition(",")[0] for line in plan.stdout.splitlines() if " s at most: " in line}
    always = {"machine", "build", "launches", "tests", "trains", "memcheck", "racecheck", "check", *SCRIPTS}
    assert parts - {"ncu"} == always
    assert not (tmp_path / "new").exists()

    unknown = subprocess.run([*suite, "--fast"], env=environ, capture_output=True, text=True)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "got '--fast'" in unknown.stderr


def test_the_suite_for_a_gpu_goes_on_after_a_failure(tmp_path: Path) -> None:
    """Two parts whose program is `false`: both are tried, named and counted, and the status is 1."""
    run = subprocess.run(
        ["bash", SUITE, "--out", tmp_path / "out", "--only", "launches|tests"],
        env={**os.environ, "PYTHON": shutil.which("false") or "false"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout.splitlines()[-1] == "failed: launches tests"
    assert len((tmp_path / "out" / "summary.txt").read_text().splitlines()) == 2


def test_the_suite_for_a_gpu_leaves_out_what_there_is_no_time_for(tmp_path: Path) -> None:
    suite = ["bash", SUITE, "--out", tmp_path, "--seconds", "5"]
    run = subprocess.run([*suite, "--only", "launches|engines"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == "failed: launches engines"
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split("  ")[-1] for line in summary] == ["left out: no time is left"] * 2


def test_a_part_of_the_suite_sees_the_clone_and_what_its_caller_carried(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" >>"$SEEN"\nexit 1\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "PYTHONPATH": "/carried", "SEEN": str(tmp_path / "seen")}
    suite = ["bash", SUITE, "--out", tmp_path / "out", "--only", "memcheck|tests"]
    subprocess.run(suite, env={**os.environ, **given}, capture_output=True)
    assert (tmp_path / "seen").read_text().splitlines()[-1] == f"{ROOT}:/carried"
