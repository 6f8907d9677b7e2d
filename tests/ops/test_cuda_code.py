"""What the CUDA C++ of csrc/cuda/ becomes on sm_80 and sm_90a, read from machine code, without a GPU."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import triton.backends.nvidia

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
CMAKE = Path(sys.executable).with_name("cmake")
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"

pytestmark = [
    pytest.mark.own_process,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc, and none is required"),
]


class Kernel(NamedTuple):
    """Machine code of one kernel."""

    architecture: str
    name: str
    local_bytes: int
    accesses: Counter[str]

    @property
    def is_vectorised(self) -> bool:
        return "Li8E" in self.name


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library _cuda, built as an installation builds it, for the two architectures."""
    build = tmp_path_factory.mktemp("cuda")
    configure = [
        CMAKE, "-S", ROOT, "-B", build, "-DDGPO_FAST_CUDA=ON", "-DDGPO_FAST_BUILD_TESTS=OFF",
        "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real", f"-DPython3_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, [CMAKE, "--build", build, "--target", "_cuda", "--parallel", "2"]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return build / "_cuda.so"


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[Kernel]:
    """All kernels of the library, for each architecture."""
    usage, assembly = (
        subprocess.run([CUOBJDUMP, option, library], check=True, capture_output=True, text=True).stdout
        for option in ("-res-usage", "-sass")
    )
    local_bytes: dict[tuple[str, str], int] = {}
    for architecture, section in sections(usage):
        for name, count in re.findall(r"Function (\w+):\n.*? LOCAL:(\d+)", section):
            local_bytes[architecture, name] = int(count)
    found = []
    for architecture, section in sections(assembly):
        for name, body in re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", section, re.DOTALL):
            accesses = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)\.E?[.\w]*", body))
            found.append(Kernel(architecture, name, local_bytes[architecture, name], accesses))
    return found


def sections(dump: str) -> list[tuple[str, str]]:
    """The dump's parts, one for each embedded piece of machine code, with its architecture."""
    parts = re.split(r"^arch = (sm_\w+)$", dump, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_every_source_is_there_for_both_architectures(kernels: list[Kernel]) -> None:
    assert {kernel.architecture for kernel in kernels} == {"sm_80", "sm_90a"}
    for stem in SOURCES:
        assert any(f"{stem}_kernel" in kernel.name for kernel in kernels), stem


def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert {kernel.name: kernel.local_bytes for kernel in kernels if kernel.local_bytes} == {}
    # Spilt registers lie on the stack, which is not counted there.
    assert [k.name for k in kernels if any(a.startswith(("LDL", "STL")) for a in k.accesses)] == []


def test_bulk_tensors_move_16_bytes_a_thread(kernels: list[Kernel]) -> None:
    """What remains is the same for a whole block: rows, coefficients, sigmas, groups; words of a stream; sums."""
    vectorised = [kernel for kernel in kernels if kernel.is_vectorised]
    assert vectorised
    for kernel in vectorised:
        narrow = {access: count for access, count in kernel.accesses.items() if not access.endswith((".128", ".64"))}
        words = 4 * ("ELb1E" in kernel.name)
        gradients = 2 * ("velocity_errors_backward" in kernel.name) + ("sde_step_backward" in kernel.name)
        sums = "velocity_errors_kernel" in kernel.name or "sde_step_kernel" in kernel.name
        assert narrow.pop("LDG.E", 0) <= words + gradients, kernel.name
        assert narrow.pop("STG.E", 0) <= sums, kernel.name
        assert not narrow, kernel.name
        assert any(access.startswith("LDG") and access.endswith(".128") for access in kernel.accesses), kernel.name


def test_the_solver_step_reads_and_writes_everything_once(kernels: list[Kernel]) -> None:
    (kernel,) = (k for k in kernels if k.architecture == "sm_90a" and "ILi2ELb1ELi8EfN3c108BFloat16E" in k.name)
    wide = {access.split(".")[0]: 0 for access in kernel.accesses}
    for access, count in kernel.accesses.items():
        wide[access.split(".")[0]] += count if access.endswith(".128") else 0
    # Eight elements a thread: two accesses for each float32 state, one for each bfloat16 velocity.
    assert wide == {"LDG": 2 * 2 + 2, "STG": 2 * 2}


def test_moving_averages_read_and_write_everything_once(kernels: list[Kernel]) -> None:
    (kernel,) = (
        k for k in kernels if k.architecture == "sm_90a" and "ema_lerp_kernelILi1024EfN3c108BFloat16E" in k.name
    )
    # Eight elements a thread: two accesses for a float32 average, one for a bfloat16 value; and one for each element
    # that is left over, with either formula.
    assert {name: kernel.accesses[name] for name in ("LDG.E.128", "STG.E.128")} == {"LDG.E.128": 3, "STG.E.128": 2}
    assert {name: kernel.accesses[name] for name in ("LDG.E", "STG.E")} == {"LDG.E": 2, "STG.E": 2}


def test_only_the_stable_abi_is_asked_of_torch(library: Path) -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout.split("\n")
    names = {line.split()[-1].partition("@")[0] for line in symbols if line.strip()}
    of_torch = {name for name in names if re.search("torch|c10|at6Tensor", name)}
    assert "aoti_torch_get_current_cuda_stream" in of_torch
    assert {name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))} == set()
    assert not {name for name in names if name.startswith("cuda")}, "the CUDA runtime is linked in"
