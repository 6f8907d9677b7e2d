"""Gated residual and modulated norm in one: against float64, gradcheck and the two operators that it replaces."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from dgpo_fast import ops

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "gate_residual_norm_modulate"
BACKWARD = "gate_residual_norm_modulate_backward"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x_BND: Tensor
    y_BND: Tensor
    gate_BD: Tensor
    shift_BD: Tensor
    scale_BD: Tensor
    eps: float = 1e-6

    def to(self, dtype: torch.dtype) -> "Arguments":
        return Arguments(*(tensor.to(dtype) for tensor in self[:5]), self.eps)


class BackwardArguments(NamedTuple):
    """Those of its backward."""

    grad_hidden_BND: Tensor | None
    grad_normed_BND: Tensor
    hidden_BND: Tensor
    y_BND: Tensor | None
    gate_BD: Tensor
    scale_BD: Tensor
    eps: float = 1e-6


def arguments(*, shape: tuple[int, int, int] = (2, 19, 37), dtype: torch.dtype = torch.float32) -> Arguments:
    """Tokens of various scales; a modulation of chunks of one tensor, as a block's linear layer makes them."""
    generator = torch.Generator().manual_seed(4)
    num_samples, num_rows, width = shape
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    spread = torch.linspace(0.3, 3, num_rows, dtype=torch.float64)[:, None]
    modulation = torch.randn(num_samples, 6 * width, generator=generator, dtype=torch.float64).to(dtype)
    _, _, gate, shift, scale, _ = modulation.chunk(6, 1)
    return Arguments((spread * x + 0.5).to(dtype), (spread * y).to(dtype), gate, shift, scale)


def backward_arguments(given: Arguments) -> BackwardArguments:
    generator = torch.Generator().manual_seed(8)
    grad_hidden, grad_normed = (
        torch.randn(given.x_BND.shape, generator=generator, dtype=torch.float64).to(given.x_BND.dtype) for _ in range(2)
    )
    hidden = gated_residual(given)
    return BackwardArguments(grad_hidden, grad_normed, hidden, given.y_BND, given.gate_BD, given.scale_BD, given.eps)


def gated_residual(given: Arguments) -> Tensor:
    return given.x_BND + given.gate_BD[:, None] * given.y_BND


def modulated_norm(hidden_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    return layer_norm(hidden_BND, hidden_BND.shape[2:], eps=eps) * (1 + scale_BD[:, None]) + shift_BD[:, None]


def gradients(given: BackwardArguments, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of x, y, gate, shift and scale, at the given `hidden`, by automatic differentiation in `dtype`."""
    grad_hidden, grad_normed, hidden, y, gate, scale = (
        None if tensor is None else tensor.detach().to(dtype).clone() for tensor in given[:6]
    )
    assert y is not None and gate is not None and scale is not None
    shift = torch.zeros_like(scale)
    leaves = [tensor.requires_grad_() for tensor in (torch.zeros_like(hidden), y, gate, shift, scale)]
    residual = leaves[0] + gate[:, None] * y
    residual = residual + (hidden - residual).detach()
    results = [modulated_norm(residual, shift, scale, given.eps), *([] if grad_hidden is None else [residual])]
    return torch.autograd.grad(results, leaves, [grad_normed, *([] if grad_hidden is None else [grad_hidden])])


def assert_forward(
    name: str, implementation: Implementation, given: Arguments, assert_as_exact_as_torch: AssertExact
) -> None:
    """Against float64: the residual, and the norm of the residual that came out, which is rounded."""
    hidden, normed = implementation(name)(*given)
    assert hidden.is_contiguous() and normed.is_contiguous()
    exact = gated_residual(given.to(torch.float64))
    assert_as_exact_as_torch(hidden, exact=exact, plain=gated_residual(given), implementation=name)
    exact = modulated_norm(hidden.double(), given.shift_BD.double(), given.scale_BD.double(), given.eps)
    plain = modulated_norm(hidden, *given[3:])
    assert_as_exact_as_torch(normed, exact=exact, plain=plain, implementation=name)


def assert_backward(
    name: str, implementation: Implementation, given: BackwardArguments, assert_as_exact_as_torch: AssertExact
) -> None:
    results = implementation(name, BACKWARD)(*given)
    exact_gradients = gradients(given, dtype=torch.float64)
    plain_gradients = gradients(given, dtype=given.hidden_BND.dtype)
    for result, exact, plain in zip(results, exact_gradients, plain_gradients, strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=plain, implementation=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str, implementation: Implementation, dtype: torch.dtype, assert_as_exact_as_torch: AssertExact
) -> None:
    assert_forward(name, implementation, arguments(dtype=dtype), assert_as_exact_as_torch)


@pytest.mark.parametrize("shape", [(16, 3, 5), (4, 5, 31), (2, 2, 1025), (1, 2, 1536), (1, 2, 2432)], ids=str)
def test_any_width(
    name: str, implementation: Implementation, shape: tuple[int, int, int], assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(shape=shape)
    assert_forward(name, implementation, given, assert_as_exact_as_torch)
    assert_backward(name, implementation, backward_arguments(given), assert_as_exact_as_torch)


@pytest.mark.parametrize("width", [37, 1536])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_two_operators_in_a_row_to_the_bit(
    name: str, implementation: Implementation, dtype: torch.dtype, width: int
) -> None:
    given = arguments(shape=(2, 3, width), dtype=dtype)
    hidden, normed = implementation(name)(*given)
    assert torch.equal(hidden, implementation(name, "gate_residual")(given.x_BND, given.y_BND, given.gate_BD))
    in_a_row = implementation(name, "layer_norm_modulate")(hidden, given.shift_BD, given.scale_BD, given.eps)
    assert torch.equal(normed, in_a_row)


@pytest.mark.parametrize("with_modulation", [True, False], ids=["modulation", "frozen modulation"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=["no sample", "no token", "no width"])
def test_an_empty_batch_stays_empty(
    name: str, implementation: Implementation, shape: tuple[int, int, int], with_modulation: bool
) -> None:
    given = arguments(shape=shape)
    assert [result.shape for result in implementation(name)(*given)] == [shape, shape]
    call = backward_arguments(given)
    results = implementation(name, BACKWARD)(*call._replace(y_BND=given.y_BND if with_modulation else None))
    summed = given.gate_BD.shape if with_modulation else (0,)
    assert [result.shape for result in results] == [shape, shape, summed, summed, summed]
    assert not any(result.any() for result in results), "a sum over no token is zero"


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    x, y, gate, shift, scale, eps = given
    yield "contiguous modulation", Arguments(x, y, gate.contiguous(), shift.contiguous(), scale.contiguous(), eps)
    yield "inner slice", given._replace(x_BND=torch.nn.functional.pad(x, (1, 2))[..., 1:-2])
    yield "tokens among others", given._replace(y_BND=torch.cat([y, y[:, :5]], dim=1)[:, : y.shape[1]])
    yield "columns apart", given._replace(x_BND=x.mT.contiguous().mT, gate_BD=gate.mT.contiguous().mT)


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    laid_out = dict(strided(given))[layout]
    assert all(map(torch.equal, implementation(name)(*laid_out), implementation(name)(*given)))
    one, other = (
        implementation(name, BACKWARD)(a.x_BND, a.y_BND, a.x_BND, a.y_BND, a.gate_BD, a.scale_BD, a.eps)
        for a in (laid_out, given)
    )
    for result, expected in zip(one, other, strict=True):
        assert result.is_contiguous() and torch.equal(result, expected)


def test_expanded_arguments_are_read_in_place(
    name: str, implementation: Implementation, assert_as_exact_as_torch: AssertExact
) -> None:
    """One sample and one modulation for all, and the gradients of plain sums: strides of zero."""
    given = arguments(shape=(2, 3, 331))
    one = Arguments(*(tensor[:1].expand_as(tensor) for tensor in given[:5]))
    assert_forward(name, implementation, one, assert_as_exact_as_torch)
    ones = torch.ones(()).expand_as(one.x_BND)
    call = backward_arguments(one)._replace(grad_hidden_BND=ones, grad_normed_BND=ones)
    assert_backward(name, implementation, call, assert_as_exact_as_torch)


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments(shape=(2, 3, 48))
    apart = Arguments(*map(far_apart, given[:5]))
    assert all(map(torch.equal, implementation(name)(*apart), implementation(name)(*given)))
    call = backward_arguments(given)
    call_apart = BackwardArguments(*map(far_apart, call[:6]))
    assert all(map(torch.equal, implementation(name, BACKWARD)(*call_apart), implementation(name, BACKWARD)(*call)))


def test_every_element_is_written(name: str, implementation: Implementation, poisoned_memory: None) -> None:
    given = arguments(shape=(2, 17, 33))
    call = backward_arguments(given)
    frozen = call._replace(grad_hidden_BND=None, y_BND=None)
    results = [implementation(name)(*given), *(implementation(name, BACKWARD)(*c) for c in (call, frozen))]
    assert all(result.isfinite().all() for several in results for result in several)


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "no tokens": ("x_BND", lambda a: a._replace(x_BND=a.x_BND[0])),
    "integer tokens": ("x_BND", lambda a: a._replace(x_BND=a.x_BND.int())),
    "output of another dtype": ("y_BND", lambda a: a._replace(y_BND=a.y_BND.double())),
    "an output too few": ("y_BND", lambda a: a._replace(y_BND=a.y_BND[:, 1:])),
    "gate for each token": ("gate_BD", lambda a: a._replace(gate_BD=a.x_BND)),
    "shift of another width": ("shift_BD", lambda a: a._replace(shift_BD=a.shift_BD[:, :-1])),
    "scale of another dtype": ("scale_BD", lambda a: a._replace(scale_BD=a.scale_BD.double())),
    "scale on another device": ("scale_BD", lambda a: a._replace(scale_BD=a.scale_BD.to("meta"))),
    "negative eps": ("eps", lambda a: a._replace(eps=-1e-6)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    spoiled = spoil(arguments())
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoiled)


MISTAKES_OF_BACKWARD: dict[str, tuple[str, Callable[[BackwardArguments], BackwardArguments]]] = {
    "no tokens": ("hidden_BND", lambda a: a._replace(hidden_BND=a.hidden_BND[0])),
    "another dtype": ("grad_hidden_BND", lambda a: a._replace(grad_hidden_BND=a.hidden_BND.double())),
    "another shape": ("grad_normed_BND", lambda a: a._replace(grad_normed_BND=a.grad_normed_BND[:, 1:])),
    "another device": ("y_BND", lambda a: a._replace(y_BND=a.hidden_BND.to("meta"))),
    "a gate too few": ("gate_BD", lambda a: a._replace(gate_BD=a.gate_BD[:1])),
    "scale of another dtype": ("scale_BD", lambda a: a._replace(scale_BD=a.scale_BD.double())),
    "eps of zero": ("eps", lambda a: a._replace(eps=0.0)),
}


@pytest.mark.parametrize("mistake", MISTAKES_OF_BACKWARD)
def test_a_bad_argument_of_the_backward_is_named(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, spoil = MISTAKES_OF_BACKWARD[mistake]
    spoiled = spoil(backward_arguments(arguments()))
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name, BACKWARD)(*spoiled)


def fused(x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> ops.NormedResidual:
    return ops.gate_residual_norm_modulate(x_BND, y_BND, gate_BD=gate_BD, shift_BD=shift_BD, scale_BD=scale_BD)


@pytest.mark.parametrize("results", [slice(0, 2), slice(0, 1), slice(1, 2)], ids=["both", "hidden", "normed"])
def test_gradcheck(results: slice) -> None:
    """Also where the loss sees one of the results only."""
    given = arguments(shape=(2, 2, 3), dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in given[:5]]
    assert torch.autograd.gradcheck(lambda *tensors: tuple(fused(*tensors)[results]), leaves)


@pytest.mark.parametrize("with_grad_hidden", [True, False], ids=["both gradients", "of normed only"])
@pytest.mark.parametrize("shape", [(2, 19, 301), (1, 67, 301)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    with_grad_hidden: bool,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    """67 tokens make several chunks, the last of them short; of 301 sums the worst is no matter of luck."""
    call = backward_arguments(arguments(shape=shape, dtype=dtype))
    if not with_grad_hidden:
        call = call._replace(grad_hidden_BND=None)
    assert_backward(name, implementation, call, assert_as_exact_as_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_modulation_changes_no_bit_of_the_other_gradients(
    name: str, implementation: Implementation, dtype: torch.dtype
) -> None:
    call = backward_arguments(arguments(shape=(2, 17, 37), dtype=dtype))
    grad_x, grad_y, *modulation = implementation(name, BACKWARD)(*call._replace(y_BND=None))
    assert all(map(torch.equal, (grad_x, grad_y), implementation(name, BACKWARD)(*call)[:2]))
    assert [gradient.shape for gradient in modulation] == [(0,), (0,), (0,)]


def test_sums_do_not_depend_on_threads(name: str, implementation: Implementation) -> None:
    call = backward_arguments(arguments(shape=(1, 67, 5)))
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(implementation(name, BACKWARD)(*call))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("learning", ["nothing", "gate_BD", "shift_BD", "scale_BD"])
def test_only_what_the_backward_needs_is_kept(learning: str, on_device: OnDevice) -> None:
    """Never x; y only where the modulation learns."""
    given = on_device(arguments(shape=(2, 3, 5)))
    leaves = Arguments(*(tensor.clone() for tensor in given[:5]))
    asked = [leaves.x_BND, leaves.y_BND, *([] if learning == "nothing" else [getattr(leaves, learning)])]
    for leaf in asked:
        leaf.requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        hidden, normed = fused(*leaves[:5])
    needed = [hidden, leaves.gate_BD, leaves.scale_BD, *([] if learning == "nothing" else [leaves.y_BND])]
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in needed)
    grads = torch.autograd.grad(hidden.sum() + normed.square().sum(), asked)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in asked]


def test_opcheck(on_device: OnDevice) -> None:
    given = on_device(arguments(shape=(2, 2, 3)))
    torch.library.opcheck(torch.ops.dgpo_fast.gate_residual_norm_modulate.default, given)
    learning = given._replace(y_BND=given.y_BND.clone().requires_grad_())
    torch.library.opcheck(torch.ops.dgpo_fast.gate_residual_norm_modulate.default, learning)
    everything = Arguments(*(tensor.clone().requires_grad_() for tensor in given[:5]))
    torch.library.opcheck(torch.ops.dgpo_fast.gate_residual_norm_modulate.default, everything)
    call = on_device(backward_arguments(arguments(shape=(2, 2, 3))))
    for each in (call, call._replace(grad_hidden_BND=None, y_BND=None)):
        torch.library.opcheck(torch.ops.dgpo_fast.gate_residual_norm_modulate_backward.default, each)


@pytest.mark.parametrize("modulation_learns", [True, False])
def test_compiles_into_one_graph(modulation_learns: bool, on_device: OnDevice) -> None:
    given = on_device(arguments(shape=(2, 3, 5)))
    inputs = [tensor.clone() for tensor in given[:5]]
    leaves = inputs if modulation_learns else inputs[:2]
    for leaf in leaves:
        leaf.requires_grad_()

    def block(x_BND: Tensor, y_BND: Tensor, *modulation_BD: Tensor) -> Tensor:
        hidden, normed = fused(x_BND, y_BND * 2, *modulation_BD)
        return hidden.sum() + normed.square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), block(*inputs))
    grads, expected = (torch.autograd.grad(function(*inputs), leaves) for function in (compiled, block))
    assert all(map(torch.equal, grads, expected))
