"""Builds csrc/ with CMake and maps kernels/ into the package; everything else stands in pyproject.toml.

Without a compiler, or when the build fails, the package installs all the same and one line says so: every operator has
a PyTorch reference. DGPO_FAST_REQUIRE_NATIVE=1 makes it an error. The CUDA operators are built where the installed
torch has CUDA and there is an nvcc.
"""

import os
import runpy
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class NativeBuildError(Exception):
    """Why there is no native library: a line, and where it helps the end of the build's log."""


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # A plain library for torch.ops.load_library: no Python ABI in its name, since it has none.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            build_with_cmake(build_dir=Path(self.build_temp).resolve(), output_dir=library.parent)
        except NativeBuildError as error:
            if os.environ.get("DGPO_FAST_REQUIRE_NATIVE") == "1":
                raise
            reason = str(error).partition("\n")[0]
            print(f"dgpo-fast: native library not built, operators use PyTorch instead: {reason}", file=sys.stderr)


def build_with_cmake(*, build_dir: Path, output_dir: Path) -> None:
    torch = find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        raise NativeBuildError(
            "no torch in the build environment (install torch, then build with --no-build-isolation)"
        )
    torch_dir = Path(torch.submodule_search_locations[0])
    # pip runs the build without activating the environment that holds cmake and ninja.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    configure = [
        "cmake",
        *("-S", str(ROOT), "-B", str(build_dir)),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
        f"-DDGPO_FAST_TORCH_DIR={torch_dir}",
        f"-DDGPO_FAST_CUDA={'ON' if builds_cuda(torch_dir, path) else 'OFF'}",
        "-DDGPO_FAST_BUILD_TESTS=OFF",
        *(["-G", "Ninja"] if which("ninja", path=path) else []),
    ]
    build_dir.mkdir(parents=True, exist_ok=True)
    log = build_dir / "build.log"
    with log.open("w") as output:
        for command in (configure, ["cmake", "--build", str(build_dir)]):
            try:
                subprocess.run(command, check=True, stdout=output, stderr=output, env={**os.environ, "PATH": path})
            except FileNotFoundError:
                raise NativeBuildError("cmake not found") from None
            except subprocess.CalledProcessError:
                end = "\n".join(log.read_text().splitlines()[-30:])
                raise NativeBuildError(f"{' '.join(command[:2])} failed\n{end}") from None


def builds_cuda(torch_dir: Path, path: str) -> bool:
    """Whether this torch has CUDA and an nvcc is there; a torch with CUDA and no nvcc gets a line."""
    cuda = runpy.run_path(str(torch_dir / "version.py"))["cuda"]  # without importing torch
    if cuda is not None and which("nvcc", path=path) is None:
        print("dgpo-fast: no nvcc, so the CUDA operators use Triton only", file=sys.stderr)
        return False
    return cuda is not None


setup(
    packages=[*find_packages(include=["dgpo_fast", "dgpo_fast.*"]), "dgpo_fast.kernels"],
    package_dir={"dgpo_fast.kernels": "kernels"},
    package_data={"dgpo_fast": ["recipes/**/*.yaml", "assets/**", "**/*.html", "**/*.css", "**/*.js"]},
    # Optional: an editable install would otherwise insist on copying a library that was not built.
    ext_modules=[Extension("dgpo_fast._cpu", sources=[], optional=True)],  # and _cuda beside it
    cmdclass={"build_ext": CMakeBuild},
    # The library needs no particular Python, so one wheel serves 3.11 and newer.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
