"""The gated residual: against float64 and gradcheck, every implementation, forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "gate_residual"
BACKWARD = "gate_residual_backward"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EMPTY = [(0, 3, 5), (2, 0, 5), (2, 3, 0)]


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x_BND: Tensor
    y_BND: Tensor
    gate_BD: Tensor

    def to(self, dtype: torch.dtype) -> "Arguments":
        return Arguments(*(tensor.to(dtype) for tensor in self))


def arguments(*, shape: tuple[int, int, int] = (2, 19, 37), dtype: torch.dtype = torch.float32) -> Arguments:
    """A gate that is a chunk of a larger tensor, as a block's linear layer makes it."""
    generator = torch.Generator().manual_seed(4)
    num_samples, _, width = shape
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    modulation = torch.randn(num_samples, 3 * width, generator=generator, dtype=torch.float64).to(dtype)
    return Arguments(x_BND=x, y_BND=y, gate_BD=modulation.chunk(3, 1)[2])


def gradient_of_result(given: Arguments) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(given.x_BND.shape, generator=generator, dtype=torch.float64).to(given.x_BND.dtype)


def equation(given: Arguments) -> Tensor:
    """What a user would write, in the dtype of x."""
    return given.x_BND + given.gate_BD[:, None] * given.y_BND


def gradients(given: Arguments, grad: Tensor) -> tuple[Tensor, ...]:
    """Of y and the gate, by automatic differentiation of the equation."""
    y_BND, gate_BD = (tensor.detach().clone().requires_grad_() for tensor in given[1:])
    return torch.autograd.grad(equation(Arguments(given.x_BND, y_BND, gate_BD)), (y_BND, gate_BD), grad)


@pytest.mark.parametrize("shape", [(2, 19, 37), (1, 1, 1), (3, 1, 2), (2, 2, 1025), (1, 2, 2432)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    assert_as_exact_as_torch: AssertExact,
) -> None:
    given = arguments(shape=shape, dtype=dtype)
    result = implementation(name)(*given)
    assert result.is_contiguous()
    exact = equation(given.to(torch.float64))
    assert_as_exact_as_torch(result, exact=exact, plain=equation(given), implementation=name)


def test_a_closed_gate_leaves_the_stream(name: str, implementation: Implementation) -> None:
    given = arguments()
    assert torch.equal(implementation(name)(*given._replace(gate_BD=torch.zeros_like(given.gate_BD))), given.x_BND)


@pytest.mark.parametrize("with_gate", [True, False], ids=["gate", "frozen gate"])
@pytest.mark.parametrize("shape", EMPTY, ids=["no sample", "no token", "no width"])
def test_an_empty_batch_stays_empty(
    name: str, implementation: Implementation, shape: tuple[int, int, int], with_gate: bool
) -> None:
    given = arguments(shape=shape)
    assert implementation(name)(*given).shape == shape
    grad_y, grad_gate = implementation(name, BACKWARD)(given.x_BND, given.y_BND if with_gate else None, given.gate_BD)
    assert grad_y.shape == shape
    assert grad_gate.shape == (given.gate_BD.shape if with_gate else (0,))
    assert not grad_gate.any(), "a sum over no token is zero"


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    x, y, gate = given
    yield "contiguous gate", given._replace(gate_BD=gate.contiguous())
    yield "inner slice", given._replace(x_BND=torch.nn.functional.pad(x, (1, 2))[..., 1:-2])
    yield "tokens among others", given._replace(y_BND=torch.cat([y, y[:, :5]], dim=1)[:, : y.shape[1]])
    yield "transposed", given._replace(x_BND=x.transpose(0, 1).contiguous().transpose(0, 1))
    yield "columns apart", Arguments(x.mT.contiguous().mT, y.mT.contiguous().mT, gate.mT.contiguous().mT)


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    laid_out = dict(strided(given))[layout]
    assert torch.equal(implementation(name)(*laid_out), implementation(name)(*given))
    one, other = (implementation(name, BACKWARD)(*a) for a in (laid_out, given))
    for result, expected in zip(one, other, strict=True):
        assert result.is_contiguous() and torch.equal(result, expected)


def test_expanded_arguments_are_read_in_place(
    name: str, implementation: Implementation, assert_as_exact_as_torch: AssertExact
) -> None:
    """One stream, one output and one gate for all, and the gradient of a plain sum: strides of zero."""
    one = Arguments(*(tensor[:1].expand_as(tensor) for tensor in arguments()))
    exact = equation(one.to(torch.float64))
    assert_as_exact_as_torch(implementation(name)(*one), exact=exact, plain=equation(one), implementation=name)
    grad = torch.ones(()).expand_as(one.x_BND)
    results = implementation(name, BACKWARD)(grad, one.y_BND, one.gate_BD)
    exact_gradients = gradients(one.to(torch.float64), grad.double())
    for result, exact, of_torch in zip(results, exact_gradients, gradients(one, grad), strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments()
    apart = Arguments(*map(far_apart, given))
    assert torch.equal(implementation(name)(*apart), implementation(name)(*given))
    assert all(map(torch.equal, implementation(name, BACKWARD)(*apart), implementation(name, BACKWARD)(*given)))


def test_every_element_is_written(name: str, implementation: Implementation, poisoned_memory: None) -> None:
    given = arguments(shape=(2, 17, 33))
    assert implementation(name)(*given).isfinite().all()
    for y_BND in (given.y_BND, None):
        results = implementation(name, BACKWARD)(given.x_BND, y_BND, given.gate_BD)
        assert all(result.isfinite().all() for result in results)


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "no tokens": ("x_BND", lambda a: a._replace(x_BND=a.x_BND[0])),
    "integer tokens": ("x_BND", lambda a: a._replace(x_BND=a.x_BND.int())),
    "output of another dtype": ("y_BND", lambda a: a._replace(y_BND=a.y_BND.double())),
    "an output too few": ("y_BND", lambda a: a._replace(y_BND=a.y_BND[:, 1:])),
    "output on another device": ("y_BND", lambda a: a._replace(y_BND=a.y_BND.to("meta"))),
    "gate of another dtype": ("gate_BD", lambda a: a._replace(gate_BD=a.gate_BD.double())),
    "gate for each token": ("gate_BD", lambda a: a._replace(gate_BD=a.x_BND)),
    "a gate too few": ("gate_BD", lambda a: a._replace(gate_BD=a.gate_BD[:1])),
    "gate on another device": ("gate_BD", lambda a: a._replace(gate_BD=a.gate_BD.to("meta"))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    spoiled = spoil(arguments())
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoiled)
    with pytest.raises(ValueError, match=f"^{culprit.replace('x_BND', 'grad_BND')}: "):
        implementation(name, BACKWARD)(*spoiled)


def test_gradcheck() -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in arguments(shape=(2, 2, 3), dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda x, y, gate: ops.gate_residual(x, y, gate_BD=gate), leaves)


@pytest.mark.parametrize("shape", [(2, 19, 301), (1, 67, 301), (1, 1, 1), (1, 2, 1536)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    assert_as_exact_as_torch: AssertExact,
) -> None:
    """67 tokens make several chunks, the last of them short; of 301 sums the worst is no matter of luck."""
    given = arguments(shape=shape, dtype=dtype)
    grad = gradient_of_result(given)
    results = implementation(name, BACKWARD)(grad, given.y_BND, given.gate_BD)
    exact_gradients = gradients(given.to(torch.float64), grad.double())
    for result, exact, of_torch in zip(results, exact_gradients, gradients(given, grad), strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)
    frozen, no_gradient = implementation(name, BACKWARD)(grad, None, given.gate_BD)
    assert torch.equal(frozen, results[0]) and no_gradient.shape == (0,)


def test_sums_do_not_depend_on_threads(name: str, implementation: Implementation) -> None:
    given = arguments(shape=(1, 67, 5))
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(implementation(name, BACKWARD)(*given))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("gate_learns", [True, False])
def test_the_output_is_kept_only_where_the_gate_learns(gate_learns: bool, on_device: OnDevice) -> None:
    x, y, gate = (tensor.clone() for tensor in on_device(arguments(shape=(2, 3, 5))))
    leaves = [x.requires_grad_(), y.requires_grad_(), *([gate.requires_grad_()] if gate_learns else [])]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        result = ops.gate_residual(x, y, gate_BD=gate)
    assert set(kept) == {gate.data_ptr(), *([y.data_ptr()] if gate_learns else [])}
    grad = torch.rand_like(x)
    assert torch.equal(torch.autograd.grad(result, leaves, grad)[0], grad)


def test_opcheck(on_device: OnDevice) -> None:
    given = on_device(arguments(shape=(2, 3, 5)))
    torch.library.opcheck(torch.ops.dgpo_fast.gate_residual.default, given)
    learning = given._replace(y_BND=given.y_BND.clone().requires_grad_())
    torch.library.opcheck(torch.ops.dgpo_fast.gate_residual.default, learning)
    everything = Arguments(*(tensor.clone().requires_grad_() for tensor in given))
    torch.library.opcheck(torch.ops.dgpo_fast.gate_residual.default, everything)
    for y_BND in (given.y_BND, None):
        torch.library.opcheck(torch.ops.dgpo_fast.gate_residual_backward.default, (given.x_BND, y_BND, given.gate_BD))


@pytest.mark.parametrize("gate_learns", [True, False])
def test_compiles_into_one_graph(gate_learns: bool, on_device: OnDevice) -> None:
    given = on_device(arguments(shape=(2, 3, 5)))
    x, y, gate = (tensor.clone().requires_grad_() for tensor in given)
    inputs = (x, y, gate if gate_learns else gate.detach())
    leaves = inputs if gate_learns else inputs[:2]

    def block(x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor) -> Tensor:
        return ops.gate_residual(x_BND, y_BND * 2, gate_BD=gate_BD).square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), block(*inputs))
    grads, expected = (torch.autograd.grad(function(*inputs), leaves) for function in (compiled, block))
    assert all(map(torch.equal, grads, expected))
