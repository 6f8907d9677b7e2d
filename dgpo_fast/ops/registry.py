"""The operators' registry: one schema each, several implementations, one choice per device.

The torch dispatcher holds the registrations, so that a caller never asks what the machine has. The reference (eager
torch) serves every device; the C++ library `_cpu` registers its kernels for CPU when it is loaded. For CUDA there are
two candidates, of which one is registered: Triton, and the CUDA C++ library `_cuda`, whose kernels bear the same names
in a namespace of their own, `dgpo_fast_cuda`. An operator `name` is defined in `dgpo_fast/ops/<stem>.py`, and its
Triton launcher is `dgpo_fast.kernels.<stem>.<name>`: by that convention alone it is found.

Two environment variables are read once, when this module is imported: DGPO_FAST_OPS forces one implementation, and
DGPO_FAST_NATIVE_DIR names another directory that holds the libraries, such as a build with sanitizers.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgpo_fast.errors import UserError, suggest

Choice = Literal["auto", "reference", "triton", "native"]

Device = Literal["cpu", "cuda"]

_NATIVE_DIR = Path(os.environ.get("DGPO_FAST_NATIVE_DIR", Path(__file__).parents[1])).resolve()
NATIVE_LIBRARIES: dict[Device, Path] = {"cpu": _NATIVE_DIR / "_cpu.so", "cuda": _NATIVE_DIR / "_cuda.so"}

_FUSED = "one pass over memory"

NATIVE_WINS_ON_CUDA: dict[str, str] = {
    "ema_lerp_": "the addresses of its tensors are arguments; Triton would copy a table of them at each call",
}
"""Operators that CUDA C++ serves rather than Triton, and why: a file in benchmarks/results/, or a limit of Triton."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Which implementation of an operator serves a device type ("cpu" or "cuda"), and why.

    An operator's gradient and its in-place form are operators of the same stem, that of the file they are defined in.
    """

    operator: str
    stem: str
    device: str
    implementation: str
    reason: str

    @property
    def language(self) -> str:
        """What the implementation is written in."""
        native = "C++" if self.device == "cpu" else "CUDA C++"
        return {"reference": "PyTorch", "triton": "Triton", "native": native}[self.implementation]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operator:
    reference: Callable[..., Any]
    triton: Callable[..., Any]
    native_cuda: Callable[..., Any]
    servings: tuple[Serving, ...]


def requested_implementation(environ: Mapping[str, str]) -> Choice:
    """The implementation that DGPO_FAST_OPS forces, "auto" where it is unset.

    Raises:
        UserError: DGPO_FAST_OPS names no implementation, or triton on a machine where no Triton kernel can run.
    """
    choice = environ.get("DGPO_FAST_OPS", "auto")
    if choice not in get_args(Choice):
        known = get_args(Choice)
        raise UserError(f"DGPO_FAST_OPS: expected one of {', '.join(known)}, got {choice!r}{suggest(choice, known)}")
    if choice == "triton" and not _triton_can_run():
        raise UserError("DGPO_FAST_OPS=triton: Triton needs CUDA, or its interpreter: set TRITON_INTERPRET=1 as well")
    return cast(Choice, choice)


def load_native_library(path: Path, *, choice: Choice) -> str | None:
    """Why the C++ kernels of `path` are absent; None once they are registered.

    Raises:
        UserError: they are absent although `choice` is "native".
    """
    if choice in ("reference", "triton"):
        return f"not loaded: DGPO_FAST_OPS={choice}"
    problem: str | None = None
    if not path.exists():
        problem = "the native library is not built"
    else:
        try:
            torch.ops.load_library(path)
        except OSError as error:  # built for another machine, or against another torch
            problem = f"the native library does not load: {error}"
    if problem is not None and choice == "native":
        raise UserError(f"DGPO_FAST_OPS=native: {problem}")
    return problem


def define(
    schema: str, *, check: Callable[..., None], reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """The torch operator of a schema such as "name(Tensor x) -> Tensor", as `dgpo_fast::name`, on every device.

    Args:
        schema: name and signature, in the dispatcher's language; the name is that of the Triton launcher as well.
        check: takes the operator's arguments and raises ValueError for a bad one; runs before the reference and on CUDA
            (the C++ kernels of the CPU check for themselves: on a small model the Python of it would cost more).
        reference: eager torch, any device.
        fake: shapes and dtypes of the result, for tracing.
    """
    name = schema.partition("(")[0]
    stem = reference.__module__.rpartition(".")[2]
    _LIBRARY.define(schema)
    _CUDA_KERNELS.define(schema)
    checked_reference = _checked(check, reference)
    triton = _checked(check, partial(_launch_triton, stem, name))
    native_cuda = _checked(check, getattr(torch.ops.dgpo_fast_cuda, name).default)
    _LIBRARY.impl(name, checked_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dgpo_fast::{name}", fake, lib=_LIBRARY)

    servings = tuple(_serving(name, stem, device) for device in ("cpu", *(("cuda",) if torch.version.cuda else ())))
    for serving in servings:
        if serving.implementation == "triton":
            _LIBRARY.impl(name, triton, serving.device.upper())
        elif serving.implementation == "native" and serving.device == "cuda":
            _LIBRARY.impl(name, native_cuda, "CUDA")
    _OPERATORS[name] = _Operator(reference=checked_reference, triton=triton, native_cuda=native_cuda, servings=servings)
    return getattr(torch.ops.dgpo_fast, name).default  # type: ignore[no-any-return]


def differentiate(name: str, *, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with its gradient, on every device; `backward` calls an operator of its own, and has no gradient.

    The gradient is registered with the dispatcher, for who traces or calls torch.ops.dgpo_fast. What comes back is the
    same by a shorter way: an autograd function around the kernel, which costs 15 us a call where the dispatcher's
    takes 40 (velocity_errors of 4,096 elements, one Zen 4 core, 2026-11).
    """
    # To differentiate twice is an error, never a silent zero.
    once = once_differentiable(backward)
    torch.library.register_autograd(f"dgpo_fast::{name}", once, setup_context=setup_context, lib=_LIBRARY)
    operator = getattr(torch.ops.dgpo_fast, name).default

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*arguments)
        setup_context(ctx, arguments, output)
        return output

    # A class of its own name, which profilers and errors show.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(once)}
    function = type(name, (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Any:
        learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if learns and any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments):
            return function.apply(*arguments)  # type: ignore[attr-defined]
        return operator(*arguments)

    return call


def implementations(name: str, device: Device = "cpu") -> dict[str, Callable[..., Any]]:
    """The implementations of an operator that can run on a device of this machine, by name.

    Called with the arguments of its schema, in their order.
    """
    operator = _operator(name)
    callables = {"reference": operator.reference}
    if _triton_is_interpreted() if device == "cpu" else _triton_can_run():
        callables["triton"] = operator.triton
    if device == "cpu" and _has_native_cpu_kernel(name):
        kernel = torch.library.get_kernel(f"dgpo_fast::{name}", "CPU")
        callables["native"] = partial(kernel.call_boxed, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))
    if device == "cuda" and _has_native_cuda_kernel(name):
        callables["native"] = operator.native_cuda
    return callables


def serving(name: str | None = None) -> tuple[Serving, ...]:
    """What serves an operator on each device type of this torch, or, without a name, what serves every operator."""
    operators = _OPERATORS.values() if name is None else (_operator(name),)
    return tuple(serving for operator in operators for serving in operator.servings)


def describe_serving(device: str) -> str:
    """One line to start a run with: "operators on cpu: C++ for 20 of 22 (one pass over memory), PyTorch for ..."."""
    return f"operators on {device}: {', '.join(serving_by_reason(device))}"


def serving_by_reason(device: str) -> list[str]:
    """What serves the operators of a device and why, a phrase for each reason: the commonest counts, others name."""
    here = [choice for choice in serving() if choice.device == device]
    groups: dict[tuple[str, str], list[Serving]] = {}
    for choice in here:
        groups.setdefault((choice.language, choice.reason), []).append(choice)
    phrases: list[str] = []
    for (language, reason), group in sorted(groups.items(), key=lambda item: len(item[1]), reverse=True):
        count = f"all {len(here)}" if len(group) == len(here) else f"{len(group)} of {len(here)}"
        phrases.append(f"{language} for {', '.join(_names(group, here)) if phrases else count} ({reason})")
    return phrases


def _names(group: list[Serving], everything: list[Serving]) -> list[str]:
    """The operators of a group, or their stem where all operators of the stem are in it."""
    whole = {choice.stem for choice in group} - {choice.stem for choice in everything if choice not in group}
    return list(dict.fromkeys(choice.stem if choice.stem in whole else choice.operator for choice in group))


def _operator(name: str) -> _Operator:
    if name not in _OPERATORS:
        raise ValueError(f"name: expected one of {', '.join(_OPERATORS)}, got {name!r}{suggest(name, _OPERATORS)}")
    return _OPERATORS[name]


def _checked(check: Callable[..., None], implementation: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        return implementation(*arguments)

    return checked


def _launch_triton(stem: str, name: str, *arguments: Any) -> Any:
    # Imported at the first launch: a machine without CUDA has no use for Triton, and may not have it.
    return getattr(importlib.import_module(f"dgpo_fast.kernels.{stem}"), name)(*arguments)


def _triton_is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


def _triton_can_run() -> bool:
    return _triton_is_interpreted() or (_missing_for_triton() is None and torch.cuda.is_available())


def _missing_for_triton() -> str | None:
    """Why Triton launches nothing on CUDA: the first launch compiles a little C."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not ("CC" in os.environ or which("gcc") or which("clang")):
        return "triton finds no C compiler: install gcc, or set CC"
    # Where Triton looks for it.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"])
    return None if (headers / "Python.h").exists() else f"triton finds no Python.h in {headers}: install python3-dev"


def _has_native_cpu_kernel(name: str) -> bool:
    # Without the library, a Triton kernel that DGPO_FAST_OPS put on the CPU may hold this place.
    return _MISSING["cpu"] is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"dgpo_fast::{name}", "CPU")


def _has_native_cuda_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dgpo_fast_cuda::{name}", "CUDA")


def _serving(name: str, stem: str, device: str) -> Serving:
    implementation, reason = _choice_for_cpu(name) if device == "cpu" else _choice_for_cuda(name)
    return Serving(operator=name, stem=stem, device=device, implementation=implementation, reason=reason)


def _choice_for_cpu(name: str) -> tuple[str, str]:
    forced = f"forced by DGPO_FAST_OPS={_CHOICE}"
    if _CHOICE == "triton" and _triton_is_interpreted():
        return "triton", f"{forced}, in Triton's interpreter"
    if _CHOICE == "triton":
        return "reference", "Triton compiles for CUDA only"
    if _CHOICE == "reference":
        return "reference", forced
    if (missing := _MISSING["cpu"]) is not None:
        return "reference", missing
    if not _has_native_cpu_kernel(name):
        return "reference", "no kernel in the native library"
    return "native", _FUSED if _CHOICE == "auto" else forced


def _choice_for_cuda(name: str) -> tuple[str, str]:
    forced = f"forced by DGPO_FAST_OPS={_CHOICE}"
    if _CHOICE in ("reference", "triton"):
        return _CHOICE, forced
    has_native = _has_native_cuda_kernel(name)
    without_native = _MISSING["cuda"] or "no kernel in the native library"
    if _CHOICE == "native":
        return ("native", forced) if has_native else ("reference", without_native)
    if has_native and name in NATIVE_WINS_ON_CUDA:
        return "native", NATIVE_WINS_ON_CUDA[name]
    if (missing := _missing_for_triton()) is not None:
        return ("native", missing) if has_native else ("reference", f"{missing}; {without_native}")
    return "triton", "not timed against CUDA C++ yet" if has_native else _FUSED


def _load_native_libraries() -> dict[Device, str | None]:
    """Why each library is absent, None where it is loaded. `_cuda` can be so in any case: nvcc is no requirement."""
    without_cuda: str | None
    if torch.version.cuda is None:
        without_cuda = "this torch has no CUDA"
    else:
        wanted: Choice = "auto" if _CHOICE == "native" else _CHOICE
        without_cuda = load_native_library(NATIVE_LIBRARIES["cuda"], choice=wanted)
    return {"cpu": load_native_library(NATIVE_LIBRARIES["cpu"], choice=_CHOICE), "cuda": without_cuda}


_LIBRARY = torch.library.Library("dgpo_fast", "DEF")
_CUDA_KERNELS = torch.library.Library("dgpo_fast_cuda", "DEF")
_OPERATORS: dict[str, _Operator] = {}
_CHOICE = requested_implementation(os.environ)
_MISSING = _load_native_libraries()
