"""What the tests of every operator share: the implementations under test, their device, the error rule, hard memory.

`pytest tests/ops --device cuda` runs them all on a GPU: arguments are moved there, layouts kept, and results back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dgpo_fast import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `name` runs for each implementation of its file's OPERATOR that can run on the device.

    On a GPU but for the reference, unless it is asked for: that is PyTorch's own doing.
    """
    if "name" in metafunc.fixturenames:
        device, only = (metafunc.config.getoption(option) for option in ("--device", "--implementation"))
        names = sorted(ops.implementations(metafunc.module.OPERATOR, device))
        of_all = [name for name in names if (device, name) != ("cuda", "reference")]
        metafunc.parametrize("name", of_all if only is None else [name for name in names if name == only])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs memory that a CPU only promises, and a GPU must have."""
    for item in items:
        if "far_apart" in getattr(item, "fixturenames", ()):
            item.add_marker("far")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As a user's process has; those that share the suite have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device under test: "cpu", or "cuda" with `--device cuda`."""
    return str(request.config.getoption("--device"))


@pytest.fixture
def implementation(request: pytest.FixtureRequest, device: str) -> Callable[..., Callable[..., Any]]:
    """`implementation(name, operator=OPERATOR)`: takes tensors of the CPU, works on the device, returns them there."""

    def named(name: str, operator: str = request.module.OPERATOR) -> Callable[..., Any]:
        call = ops.implementations(operator, device)[name]  # type: ignore[arg-type]
        return call if device == "cpu" else _through(device, call, in_place=operator.endswith("_"))

    return named


@pytest.fixture
def on_device(device: str) -> Callable[[Any], Any]:
    """`on_device(arguments)`: the tensors among them on the device under test, in the layout they have."""
    return lambda arguments: tree_map_only(Tensor, lambda tensor: _moved(tensor, device), arguments)


@pytest.fixture
def moved() -> Callable[[Tensor, str], Tensor]:
    """`moved(tensor, device)`: what the tests on another device work on."""
    return _moved


def _through(device: str, call: Callable[..., Any], *, in_place: bool) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        moved = tree_map_only(Tensor, lambda tensor: _moved(tensor, device), arguments)
        result = call(*moved)
        if in_place:
            for here, there in zip(_tensors(arguments[0]), _tensors(moved[0]), strict=True):
                here.copy_(there)
        return tree_map_only(Tensor, Tensor.cpu, result)

    return run


def _tensors(one_or_many: Any) -> list[Tensor]:
    return [one_or_many] if isinstance(one_or_many, Tensor) else list(one_or_many)


def _moved(tensor: Tensor, device: str) -> Tensor:
    """`tensor` on `device`, strides and shared elements kept; one that is not on the CPU stays where it is."""
    if tensor.device.type != "cpu" or device == "cpu":
        return tensor
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).to(device)  # type: ignore[call-overload]
    there = torch.empty(0, dtype=tensor.dtype, device=device)
    there = there.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
    return there.requires_grad_(tensor.requires_grad)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty and its like return with NaN, in C++ as in Python."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="session")
def far_apart() -> Callable[[Tensor], Tensor]:
    """`far_apart(tensor)`: the same values, the last sample of dimension 0 more than 2^31 elements behind the first.

    A 32-bit offset would miss it. Between samples lies memory that nobody touches, so on a CPU it costs addresses only.
    Samples lie a multiple of 64 elements apart: those of a multiple of 16 elements are aligned as the given ones are.
    """

    def spread(tensor: Tensor) -> Tensor:
        last, numel = len(tensor) - 1, tensor[0].numel()
        stride = 64 * max(2**31 // (64 * last) + 1, -(-numel // 64))
        memory = torch.empty(stride * last + numel, dtype=tensor.dtype)
        inner = torch.empty(tensor.shape[1:], device="meta").stride()
        return memory.as_strided(tensor.shape, (stride, *inner)).copy_(tensor)

    return spread


@pytest.fixture(scope="session")
def assert_as_exact_as_torch() -> Callable[..., None]:
    """`assert_as_exact_as_torch(result, exact=..., plain=..., implementation=...)`, see there."""
    return _assert_as_exact_as_torch


def _assert_as_exact_as_torch(result: Tensor, *, exact: Tensor, plain: Tensor, implementation: str) -> None:
    """`result` is no further from `exact`, float64, than twice as far as `plain`, which PyTorch computed.

    Triton's interpreter truncates what it stores as bfloat16, where torch and a GPU round: there `exact` truncated is
    the truth, up to a step where the two lie across a boundary, or to the roundings of float32 where large terms cancel
    and leave a number whose steps are smaller.
    """
    assert result.dtype == plain.dtype and result.shape == plain.shape
    if implementation == "triton" and INTERPRETED and result.dtype == torch.bfloat16:
        steps = (_truncated(exact).view(torch.int16).int() - result.view(torch.int16).int()).abs()
        roundings = 4 * torch.finfo(torch.float32).eps * exact.abs().max() if result.numel() else 0
        assert ((steps <= 1) | ((result - exact).abs() <= roundings)).all(), f"{steps.max()} steps of bfloat16"
        return
    error, bound = ((tensor.double() - exact).abs() for tensor in (result, plain))
    assert error.isfinite().all()
    if result.numel():
        rounding_of_the_truth = 4 * torch.finfo(torch.float64).eps * exact.abs().max()
        assert error.max() <= 2 * bound.max() + rounding_of_the_truth, f"{error.max():.3g}, torch {bound.max():.3g}"


def _truncated(exact: Tensor) -> Tensor:
    """`exact` cut to bfloat16 by way of float32."""
    return (exact.float().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
