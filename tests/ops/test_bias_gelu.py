"""GELU of a biased input: the reference against float64 and gradcheck, every implementation against that."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgpo_fast import ops

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "bias_gelu"
BACKWARD = "bias_gelu_backward"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (7,), (1, 1), (3, 513), (5, 1, 3), (2, 3, 1030), (67, 5)]


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x: Tensor
    bias_D: Tensor


def arguments(*, shape: tuple[int, ...] = (3, 13, 67), dtype: torch.dtype = torch.float32) -> Arguments:
    """Inputs of a few units, on either side of the bend."""
    generator = torch.Generator().manual_seed(3)
    x, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:]))
    return Arguments(x=(1.5 * x).to(dtype), bias_D=bias.to(dtype))


def gradient_of(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)


def closed_form(given: Arguments) -> Tensor:
    """The equation by tanh, in float64."""
    u = given.x.double() + given.bias_D.double()
    return u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def closed_form_backward(grad: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    """Its derivative, in float64: 1 / cosh does not cancel where 1 - tanh^2 does."""
    u = given.x.double() + given.bias_D.double()
    w, slope = (math.sqrt(2 / math.pi) * factor for factor in (u + 0.044715 * u**3, 1 + 3 * 0.044715 * u**2))
    grad_x = grad.double() * ((1 + torch.tanh(w)) / 2 + u / 2 * slope / torch.cosh(w) ** 2)
    return grad_x, grad_x.reshape(-1, given.x.shape[-1]).sum(0)


def plain(given: Arguments) -> Tensor:
    """What a user would write, in the dtype of x."""
    return functional.gelu(given.x + given.bias_D, approximate="tanh")


def plain_backward(grad: Tensor, given: Arguments) -> tuple[Tensor, ...]:
    leaves = Arguments(*(tensor.clone().requires_grad_() for tensor in given))
    return torch.autograd.grad(plain(leaves), leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str, implementation: Implementation, dtype: torch.dtype, assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(dtype=dtype)
    result = implementation(name)(*given)
    assert result.is_contiguous()
    assert_as_exact_as_torch(result, exact=closed_form(given), plain=plain(given), implementation=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_the_closed_form(
    name: str, implementation: Implementation, dtype: torch.dtype, assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(dtype=dtype)
    grad = gradient_of(given.x)
    for result, exact, of_torch in zip(
        implementation(name, BACKWARD)(grad, *given, True),
        closed_form_backward(grad, given),
        plain_backward(grad, given),
        strict=True,
    ):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero_nothing_overflows(name: str, implementation: Implementation, dtype: torch.dtype) -> None:
    """There gelu(u) is u or 0, its derivative 1 or 0, and what is no number stays so."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([33, 1e3, largest, torch.inf, -33, -1e3, -largest, -torch.inf, torch.nan], dtype=dtype)
    zero = torch.zeros_like(x)
    value = implementation(name)(x, zero)
    derivative, _ = implementation(name, BACKWARD)(torch.ones_like(x), x, zero, False)
    assert torch.equal(value[:8], x[:8].clamp(min=0))
    assert torch.equal(derivative[:8], (x[:8] > 0).to(dtype))
    assert value[8].isnan() and derivative[8].isnan()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_size(
    name: str, implementation: Implementation, shape: tuple[int, ...], assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(shape=shape, dtype=torch.float64)
    grad = gradient_of(given.x)
    results = (implementation(name)(*given), *implementation(name, BACKWARD)(grad, *given, True))
    expected = (closed_form(given), *closed_form_backward(grad, given))
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0,)], ids=str)
def test_an_empty_batch_stays_empty(name: str, implementation: Implementation, shape: tuple[int, ...]) -> None:
    x, bias = torch.zeros(shape), torch.ones(shape[-1:])
    grad_x, grad_bias = implementation(name, BACKWARD)(x, x, bias, True)
    assert implementation(name)(x, bias).shape == grad_x.shape == shape
    assert torch.equal(grad_bias, torch.zeros_like(bias))


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    yield "inner slice", given._replace(x=functional.pad(given.x, (1, 2))[..., 1:-2])
    yield "slice of the tokens", given._replace(x=functional.pad(given.x, (0, 0, 3, 1))[:, 3:-1])
    yield "transposed", given._replace(x=given.x.mT.contiguous().mT)
    yield "every second", given._replace(bias_D=given.bias_D.repeat_interleave(2)[::2])


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    laid_out = dict(strided(given))[layout]
    assert torch.equal(implementation(name)(*laid_out), implementation(name)(*given))
    grad = gradient_of(given.x)
    for one, other in zip(
        implementation(name, BACKWARD)(grad.mT.contiguous().mT, *laid_out, True),
        implementation(name, BACKWARD)(grad, *given, True),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_expanded_arguments_are_read_in_place(name: str, implementation: Implementation) -> None:
    """The gradient of a sum, one row for all, one number for the whole bias: strides of zero."""
    given = arguments()
    one = Arguments(x=given.x[:1, :1].expand_as(given.x), bias_D=given.bias_D[:1].expand_as(given.bias_D))
    dense = Arguments(*(tensor.contiguous() for tensor in one))
    assert torch.equal(implementation(name)(*one), implementation(name)(*dense))
    for result, expected in zip(
        implementation(name, BACKWARD)(torch.ones(()).expand_as(one.x), *one, True),
        implementation(name, BACKWARD)(torch.ones_like(one.x), *dense, True),
        strict=True,
    ):
        assert torch.equal(result, expected)


def test_rows_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments(shape=(5, 64))
    apart = given._replace(x=far_apart(given.x))
    assert torch.equal(implementation(name)(*apart), implementation(name)(*given))
    grad = gradient_of(given.x)
    for one, other in zip(
        implementation(name, BACKWARD)(far_apart(grad), *apart, True),
        implementation(name, BACKWARD)(grad, *given, True),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_every_element_is_written(name: str, implementation: Implementation, poisoned_memory: None) -> None:
    given = arguments(shape=(67, 515))
    for result in (implementation(name)(*given), *implementation(name, BACKWARD)(given.x, *given, True)):
        assert result.isfinite().all()


def test_a_row_does_not_see_its_batch(name: str, implementation: Implementation) -> None:
    given = arguments(shape=(67, 5))
    alone = given._replace(x=given.x[40:41])
    assert torch.equal(implementation(name)(*alone), implementation(name)(*given)[40:41])


def test_the_gradient_of_a_frozen_bias_is_left_out(name: str, implementation: Implementation) -> None:
    given = arguments()
    grad = gradient_of(given.x)
    frozen, learning = (implementation(name, BACKWARD)(grad, *given, with_bias) for with_bias in (False, True))
    assert frozen[1].shape == (0,)
    assert torch.equal(frozen[0], learning[0])


def test_sums_do_not_depend_on_the_number_of_threads(name: str, implementation: Implementation) -> None:
    if name != "native":
        pytest.skip("its threads are torch's own, or those of a GPU")
    given = arguments(shape=(641, 515))
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(implementation(name, BACKWARD)(gradient_of(given.x), *given, True)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "scalar": ("x", lambda a: a._replace(x=a.x[0, 0, 0])),
    "integer input": ("x", lambda a: a._replace(x=a.x.int())),
    "bias of another dtype": ("bias_D", lambda a: a._replace(bias_D=a.bias_D.double())),
    "bias of another width": ("bias_D", lambda a: a._replace(bias_D=a.bias_D[:-1])),
    "one number for all": ("bias_D", lambda a: a._replace(bias_D=a.bias_D[0])),
    "a bias for each row": ("bias_D", lambda a: a._replace(bias_D=a.x[0])),
    "bias on another device": ("bias_D", lambda a: a._replace(bias_D=a.bias_D.to("meta"))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    spoiled = spoil(arguments())
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoiled)
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name, BACKWARD)(spoiled.x, *spoiled, True)


@pytest.mark.parametrize(
    "grad", [torch.ones(3, 13, 66), torch.ones(13, 67), torch.ones(3, 13, 67).double()], ids=["width", "rows", "f64"]
)
def test_a_bad_gradient_is_named(name: str, implementation: Implementation, grad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^grad: "):
        implementation(name, BACKWARD)(grad, *arguments(), True)


def test_gradcheck() -> None:
    given = arguments(shape=(4, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.bias_gelu, tuple(tensor.requires_grad_() for tensor in given))


@pytest.mark.parametrize("learning", [(True, False), (False, True), (True, True)], ids=["x", "bias", "both"])
def test_gradients_flow_to_what_requires_them(learning: tuple[bool, bool]) -> None:
    given = arguments()
    leaves = Arguments(*(x.requires_grad_(learns) for x, learns in zip(given, learning, strict=True)))
    ops.bias_gelu(*leaves).sum().backward()
    assert tuple(leaf.grad is not None for leaf in leaves) == learning


def test_opcheck(on_device: OnDevice) -> None:
    given = on_device(arguments())
    torch.library.opcheck(torch.ops.dgpo_fast.bias_gelu.default, given)
    for learning in ({"x"}, {"x", "bias_D"}):
        leaves = {field: getattr(given, field).clone().requires_grad_() for field in learning}
        torch.library.opcheck(torch.ops.dgpo_fast.bias_gelu.default, given._replace(**leaves))
    for with_bias in (False, True):
        torch.library.opcheck(torch.ops.dgpo_fast.bias_gelu_backward.default, (given.x.flip(0), *given, with_bias))


@pytest.mark.parametrize("learning", [False, True], ids=["frozen", "learning"])
def test_compiles_into_one_graph(learning: bool, on_device: OnDevice) -> None:
    given = on_device(arguments())

    def mlp(x: Tensor, bias: Tensor) -> Tensor:
        return ops.bias_gelu(x * 2, bias).square().sum()

    leaves = (given.x.requires_grad_(), given.bias_D.requires_grad_(learning))
    wanted = leaves if learning else leaves[:1]
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves), wanted), torch.autograd.grad(mlp(*leaves), wanted), strict=True
    ):
        assert torch.equal(one, other)
