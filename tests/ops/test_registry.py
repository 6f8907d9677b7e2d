"""Which implementation serves an operator, and how DGPO_FAST_OPS forces one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops
from dgpo_fast.errors import UserError
from dgpo_fast.ops import registry

# On a GPU these are Triton's alone.
BLOCK_OPERATORS = {
    "layer_norm_modulate",
    "gate_residual",
    "gate_residual_norm_modulate",
    "joint_qk_norm",
    "bias_gelu",
    "quantise_rows",
}


def test_the_cpu_is_served_by_what_was_asked_for() -> None:
    (serving,) = (serving for serving in ops.serving("solver_step") if serving.device == "cpu")
    forced = os.environ.get("DGPO_FAST_OPS")
    fastest = "native" if "native" in ops.implementations("solver_step") else "reference"
    assert serving.implementation == (forced or fastest)
    assert serving.reason


def test_every_operator_is_listed() -> None:
    listed = {serving.operator for serving in ops.serving()}
    assert {"solver_step", "solver_step_"} <= listed
    for name in listed:
        assert "reference" in ops.implementations(name)


@pytest.mark.parametrize("stem", sorted({serving.stem for serving in ops.serving()}))
def test_an_operator_has_a_file_of_its_stem_in_every_language(stem: str) -> None:
    root = Path(__file__).resolve().parents[2]
    belongs_to_the_algorithm = (root / f"csrc/cuda/{stem}.cu").exists()
    assert belongs_to_the_algorithm == (stem not in BLOCK_OPERATORS)
    for path in (
        f"csrc/cpu/{stem}.cpp",
        f"kernels/{stem}.py",
        f"benchmarks/bench_{stem}.py",
        f"tests/ops/test_{stem}.py",
        f"tests/ops/compiled/{stem}.py",
    ):
        assert (root / path).exists(), path


def test_a_run_says_in_one_line_what_serves_the_operators_of_its_device() -> None:
    line = ops.describe_serving("cpu")
    assert line.startswith("operators on cpu: ") and "\n" not in line
    for serving in (serving for serving in ops.serving() if serving.device == "cpu"):
        assert f"{serving.language} for " in line and f"({serving.reason})" in line


def test_the_line_names_what_the_commonest_implementation_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    servings = [
        *(served("norm", form, "native", "one pass over memory") for form in ("", "_backward")),
        *(served("gate", form, "native", "one pass over memory") for form in ("", "_backward")),
        *(served("step", form, "reference", "not built") for form in ("", "_")),
        served("gelu", "", "native", "one pass over memory"),
        served("gelu", "_backward", "reference", "not built"),
        served("adam", "_", "triton", "forced"),
        served("adam", "_", "native", "forced", device="cuda"),
    ]
    monkeypatch.setattr(registry, "serving", lambda: servings)
    assert ops.describe_serving("cpu") == (
        "operators on cpu: C++ for 5 of 9 (one pass over memory), "
        "PyTorch for step, gelu_backward (not built), Triton for adam (forced)"
    )
    assert ops.describe_serving("cuda") == "operators on cuda: CUDA C++ for all 1 (forced)"


def served(stem: str, form: str, implementation: str, reason: str, *, device: str = "cpu") -> ops.Serving:
    return ops.Serving(operator=f"{stem}{form}", stem=stem, device=device, implementation=implementation, reason=reason)


def test_an_operator_and_its_other_forms_share_a_stem() -> None:
    stems = {serving.operator: serving.stem for serving in ops.serving()}
    assert stems["solver_step"] == stems["solver_step_"] == "solver_step"
    assert stems["velocity_errors_backward"] == "velocity_errors"
    assert stems["group_scores"] == "group_preference"


@pytest.mark.parametrize(
    ("choice", "native", "triton", "wins", "expected"),
    [
        ("auto", True, True, False, ("triton", "not timed against CUDA C++ yet")),
        ("auto", True, True, True, ("native", "results/step.csv")),
        ("auto", False, True, False, ("triton", "one pass over memory")),
        ("auto", True, False, False, ("native", "triton is not installed")),
        ("auto", False, False, False, ("reference", "triton is not installed; not built")),
        ("triton", True, True, True, ("triton", "forced by DGPO_FAST_OPS=triton")),
        ("native", True, True, False, ("native", "forced by DGPO_FAST_OPS=native")),
        ("native", False, True, False, ("reference", "not built")),
        ("reference", True, True, True, ("reference", "forced by DGPO_FAST_OPS=reference")),
    ],
)
def test_what_serves_cuda_and_why(
    monkeypatch: pytest.MonkeyPatch, choice: str, native: bool, triton: bool, wins: bool, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(registry, "_CHOICE", choice)
    monkeypatch.setattr(registry, "_MISSING", {"cpu": None, "cuda": "not built"})
    monkeypatch.setattr(registry, "_has_native_cuda_kernel", lambda name: native)
    monkeypatch.setattr(registry, "_missing_for_triton", lambda: None if triton else "triton is not installed")
    monkeypatch.setattr(registry, "NATIVE_WINS_ON_CUDA", {"step": "results/step.csv"} if wins else {})
    assert registry._choice_for_cuda("step") == expected


def test_triton_wants_a_compiler_and_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(registry.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    compilers = {"clang"}
    monkeypatch.setattr(registry, "which", lambda name: name if name in compilers else None)
    assert registry._missing_for_triton() is None
    compilers.clear()
    assert registry._missing_for_triton() == "triton finds no C compiler: install gcc, or set CC"
    monkeypatch.setenv("CC", "cc")
    assert registry._missing_for_triton() is None
    (tmp_path / "Python.h").unlink()
    assert registry._missing_for_triton() == f"triton finds no Python.h in {tmp_path}: install python3-dev"
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert registry._missing_for_triton() == "triton is not installed"


@pytest.mark.parametrize("gelu", [ops.bias_gelu, torch.ops.dgpo_fast.bias_gelu.default], ids=["short", "dispatcher"])
def test_to_differentiate_twice_is_an_error(gelu: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(gelu(x, torch.zeros(3)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_gradient_bears_the_name_of_its_operator() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert "bias_gelu" in str(ops.bias_gelu(x, torch.zeros(3)).grad_fn)


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*solver_step.*got 'solver'"):
        ops.implementations("solver")


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(UserError, match=r"DGPO_FAST_OPS: expected one of auto, reference, triton, native, got 'cuda'"):
        registry.requested_implementation({"DGPO_FAST_OPS": "cuda"})


def test_triton_without_cuda_asks_for_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        registry.requested_implementation({"DGPO_FAST_OPS": "triton"})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registry.requested_implementation({"DGPO_FAST_OPS": "triton"}) == "triton"


def test_an_absent_library_is_a_reason_and_an_error_only_where_forced(tmp_path: Path) -> None:
    absent = tmp_path / "_cpu.so"
    assert registry.load_native_library(absent, choice="auto") == "the native library is not built"
    with pytest.raises(UserError, match=r"DGPO_FAST_OPS=native: the native library is not built"):
        registry.load_native_library(absent, choice="native")


def test_a_broken_library_is_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "_cpu.so"
    broken.write_text("not a library")
    assert "does not load" in str(registry.load_native_library(broken, choice="auto"))


def test_the_libraries_are_looked_for_where_the_environment_says(tmp_path: Path) -> None:
    program = "from dgpo_fast.ops.registry import NATIVE_LIBRARIES as there; print(there['cpu'], there['cuda'])"
    environ = {name: value for name, value in os.environ.items() if name != "DGPO_FAST_OPS"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**environ, "DGPO_FAST_NATIVE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [f"{tmp_path}/_cpu.so", f"{tmp_path}/_cuda.so"], run.stderr


def test_the_reference_serves_where_forced() -> None:
    program = """
import torch
from dgpo_fast import ops
assert [serving.implementation for serving in ops.serving()] == ["reference"] * len(ops.serving())
assert set(ops.implementations("solver_step")) == {"reference"}
euler = torch.tensor([[[1.0, -0.25, 0.0]]])
state = ops.solver_step(torch.ones(1, 2, 3), torch.ones(2, 3), v_uncond=None, table=euler, row_B=torch.tensor([0, 0]))
assert torch.equal(state, torch.full((1, 2, 3), 0.75))
"""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], env={**environ, "DGPO_FAST_OPS": "reference"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
