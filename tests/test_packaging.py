"""The wheel and the source archive, built from a copy of the tree without build isolation, as users build them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
SCRATCH = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")


class Archives(NamedTuple):
    wheel: Path
    sdist: Path


def build(tree: Path, *hooks: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs build hooks of setuptools ("wheel", "sdist") in `tree`; the archives end up in its dist/."""
    calls = "; ".join(f"build_meta.build_{hook}('dist')" for hook in hooks)
    return subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; {calls}"],
        cwd=tree,
        env={"CMAKE_BUILD_TYPE": "Debug", **os.environ, **environ},  # as good for what is asked here, in half the time
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("packaging") / "tree", symlinks=True, ignore=SCRATCH)


@pytest.fixture(scope="session")
def archives(tree: Path) -> Archives:
    run = build(tree, "sdist", "wheel", DGPO_FAST_REQUIRE_NATIVE="1" if HAS_COMPILER else "0")
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    return Archives(wheel=wheel, sdist=sdist)


@pytest.fixture(scope="session")
def installed(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked: what lies in site-packages after an installation."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(archives.wheel) as wheel:
        wheel.extractall(site)
    return site


def run_python(program: str, *, path: list[Path], cwd: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    run = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_wheel_holds_every_file_of_the_package(archives: Archives, tree: Path) -> None:
    package = {
        path for path in (tree / "dgpo_fast").rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    expected = {str(path.relative_to(tree)) for path in package}
    expected |= {f"dgpo_fast/kernels/{path.name}" for path in (tree / "kernels").glob("*.py")}
    assert {"dgpo_fast/kernels/solver_step.py", "dgpo_fast/ops/solver_step.py"} <= expected
    assert expected - {*zipfile.ZipFile(archives.wheel).namelist()} == set()


def test_the_wheel_takes_no_other_name(archives: Archives) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(archives.wheel).namelist()}
    assert tops == {"dgpo_fast", "dgpo_fast-0.1.0.dist-info"}


def test_the_wheel_serves_any_python_of_its_platform(archives: Archives) -> None:
    assert "-cp311-abi3-" in archives.wheel.name


def test_the_source_archive_can_be_built(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py", "kernels/solver_step.py"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert needed - names == set()


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler, and none is required")
def test_the_installed_operators_run_in_cpp(installed: Path, tmp_path: Path) -> None:
    program = "from dgpo_fast import ops; print(ops.__file__, ops.serving('solver_step')[0].implementation)"
    assert run_python(program, path=[installed], cwd=tmp_path) == f"{installed}/dgpo_fast/ops/__init__.py native"


@pytest.mark.parametrize("where", ["installed", "in the clone"])
def test_the_name_kernels_is_left_to_its_owner(where: str, installed: Path, tmp_path: Path) -> None:
    owner = tmp_path / "kernels"
    owner.mkdir()
    (owner / "__init__.py").write_text("")
    clone = where == "in the clone"  # whose root, with kernels/ in it, is then first on the path
    program = "import kernels; from dgpo_fast.kernels import solver_step; print(kernels.__file__)"
    found = run_python(program, path=[ROOT if clone else installed, tmp_path], cwd=ROOT if clone else tmp_path)
    assert found == str(owner / "__init__.py")


def test_without_a_compiler_the_package_builds_and_one_line_says_so(tree: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tree, tmp_path / "tree", symlinks=True, ignore=SCRATCH)
    run = build(copy, "wheel", CXX="/nowhere/c++", DGPO_FAST_REQUIRE_NATIVE="0")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (run.stdout + run.stderr).count("native library not built") == 1
    (wheel,) = (copy / "dist").glob("*.whl")
    assert "dgpo_fast/_cpu.so" not in zipfile.ZipFile(wheel).namelist()

    required = build(copy, "wheel", CXX="/nowhere/c++", DGPO_FAST_REQUIRE_NATIVE="1")
    assert required.returncode != 0
    assert "CMAKE_CXX_COMPILER" in required.stderr, "the log, which pip removes with its directory"


def test_setup_keeps_the_active_environments_torch(tmp_path: Path) -> None:
    """By the version of its package: PyPI has a CUDA build as 2.11.0 that calls itself 2.11.0+cu130, and pip finds no
    such torch. And it is named, so that nothing is installed that it does not go with."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt", *(p.name for p in ROOT.glob("con*.txt"))):
        shutil.copy(ROOT / name, tmp_path)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text("__version__ = '2.11.0+cu130'\n")

    def setup() -> subprocess.CompletedProcess[str]:
        command = ["make", "setup", "VENV=", f"PYTHON={environment}/bin/python", "PIP_INSTALL=echo pip"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    without = setup()
    assert without.returncode != 0 and "the active environment has no torch; install one" in without.stdout
    (packages / "torch-2.11.0.dist-info").mkdir()
    (packages / "torch-2.11.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n"
    )
    run = setup()
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "build" / "torch.txt").read_text() == "torch==2.11.0\n"
    installs = [line for line in run.stdout.splitlines() if line.startswith("pip")]
    assert len(installs) == 3 and all("-c build/torch.txt" in line for line in installs)
    assert " torch setuptools>=77 " in installs[0]
