"""The floors of CONTRIBUTING.md: imports only go down, and importing the package loads next to nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dgpo_fast"

FLOORS = (
    (
        *("config", "algorithm_config", "evaluation_config", "guard_config", "reward_config", "sections"),
        *("environment", "errors", "files", "launcher", "plugins", "records", "rng", "profiling"),
    ),
    ("kernels",),
    ("ops",),
    ("flow", "models", "rewards", "prompts", "parallel", "shapes"),
    ("algorithms",),
    (
        *(
            "trainer",
            "learner",
            "checkpoint",
            "comparison",
            "evaluate",
            "gallery",
            "guard",
            "held_out",
            "interruption",
            "metrics",
            "progress",
            "report",
            "run_directory",
            "statistics",
        ),
        *("charts", "export", "memory", "model_card", "planning", "profile_run", "samples", "sampling"),
        "step_metrics",
        "throughput",
    ),
    ("cli", "doctor", "recipes", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The front door: it names what it exports and imports a room only when somebody asks for it.
FRONT_DOOR = PACKAGE / "__init__.py"

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != FRONT_DOOR)
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name under which a file of dgpo_fast/ or kernels/ is imported."""
    inside = path.relative_to(PACKAGE) if PACKAGE in path.parents else Path("kernels", path.name)
    parts = ("dgpo_fast", *inside.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it. `from a import b` gives a.b too, since b may be a module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ancestors = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*ancestors, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """The room of a dotted name: `flow` for dgpo_fast.flow.solvers, None outside the package."""
    match module.split("."):
        case ["dgpo_fast", name, *_] if name in FLOOR_OF:
            return name
    return None


def upward(path: Path) -> list[str]:
    own_floor = FLOOR_OF[module_name(path).split(".")[1]]
    return [name for name in imported_modules(path) if (other := room(name)) and FLOOR_OF[other] > own_floor]


def speaks_to_other_processes(path: Path) -> bool:
    """Whether a file imports torch.distributed or DeepSpeed, or writes `torch.distributed` after importing torch."""
    imports = any(name.startswith(("torch.distributed", "deepspeed")) for name in imported_modules(path))
    return imports or "torch.distributed" in map(ast.unparse, ast.walk(ast.parse(path.read_text())))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=label)
def test_every_module_lives_on_a_floor_and_imports_downwards(path: Path) -> None:
    assert room(module_name(path)), f"{label(path)} is on no floor: name its room in FLOORS and in CONTRIBUTING.md"
    assert upward(path) == []


def test_an_upward_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "flow" / "rollout.py"
    path.parent.mkdir()
    path.write_text(
        "import dgpo_fast.trainer\n"
        "from dgpo_fast import algorithms, ops\n"
        "def late():\n    from ..evaluate import evaluate_run\n    from . import solvers\n"
    )
    seen = set(upward(path))
    assert {"dgpo_fast.trainer", "dgpo_fast.algorithms", "dgpo_fast.evaluate"} <= seen
    assert not any(name.startswith(("dgpo_fast.ops", "dgpo_fast.flow")) for name in seen)


@pytest.mark.parametrize("path", [path for path in MODULES if PACKAGE / "parallel" not in path.parents], ids=label)
def test_only_parallel_speaks_to_other_processes(path: Path) -> None:
    assert not speaks_to_other_processes(path)


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "import deepspeed",
        "torch.distributed.barrier()",
    ],
)
def test_speaking_to_other_processes_is_seen(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "metrics.py"
    path.write_text(f"import torch\n{line}\n")
    assert speaks_to_other_processes(path)


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_importing_the_package_loads_neither_torch_nor_diffusers() -> None:
    run = run_python(
        "import sys, dgpo_fast\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'triton', 'deepspeed'} & {*sys.modules}))"
    )
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stdout + run.stderr


def test_using_the_operators_loads_no_triton_and_no_cuda() -> None:
    run = run_python(
        "import sys, torch\n"
        "before = {*sys.modules}\n"
        "import dgpo_fast.ops\n"
        "print('triton' in {*sys.modules} - before, torch.cuda.is_initialized())"
    )
    assert (run.returncode, run.stdout.strip()) == (0, "False False"), run.stdout + run.stderr


def test_every_exported_name_exists_and_initialises_no_cuda() -> None:
    run = run_python(
        "import dgpo_fast\n"
        "assert all(getattr(dgpo_fast, name) is not None for name in dgpo_fast.__all__)\n"
        "import torch\n"
        "print(len(dgpo_fast.__all__) > 0, torch.cuda.is_initialized())"
    )
    assert (run.returncode, run.stdout.strip()) == (0, "True False"), run.stdout + run.stderr
