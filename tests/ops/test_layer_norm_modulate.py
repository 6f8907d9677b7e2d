"""The modulated layer norm: against float64, gradcheck and diffusers, every implementation, forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo_fast import ops

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "layer_norm_modulate"
BACKWARD = "layer_norm_modulate_backward"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x_BND: Tensor
    shift_BD: Tensor
    scale_BD: Tensor
    eps: float = 1e-6

    def to(self, dtype: torch.dtype) -> "Arguments":
        return Arguments(self.x_BND.to(dtype), self.shift_BD.to(dtype), self.scale_BD.to(dtype), self.eps)


def arguments(
    *, shape: tuple[int, int, int] = (2, 19, 37), dtype: torch.dtype = torch.float32, mean: float = 0.5
) -> Arguments:
    """Tokens of various scales; shift and scale chunks of one tensor, as a block's linear layer makes them."""
    generator = torch.Generator().manual_seed(4)
    num_samples, num_rows, width = shape
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = torch.linspace(0.3, 3, num_rows, dtype=torch.float64)[:, None]
    _, shift, scale = (
        torch.randn(num_samples, 3 * width, generator=generator, dtype=torch.float64).to(dtype).chunk(3, 1)
    )
    return Arguments(x_BND=(spread * x + mean).to(dtype), shift_BD=shift, scale_BD=scale)


def gradient_of_result(given: Arguments) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(given.x_BND.shape, generator=generator, dtype=torch.float64).to(given.x_BND.dtype)


def closed_form(given: Arguments) -> Tensor:
    """y in float64, written out token by token."""
    x_BND, shift_BD, scale_BD, eps = given.to(torch.float64)
    normed = torch.empty_like(x_BND)
    for b, n in torch.cartesian_prod(*map(torch.arange, x_BND.shape[:2])).tolist():
        token = x_BND[b, n]
        variance = (token - token.mean()).square().mean()
        normed[b, n] = (token - token.mean()) / (variance + eps).sqrt() * (1 + scale_BD[b]) + shift_BD[b]
    return normed


def plain(given: Arguments) -> Tensor:
    """What a user would write, in the dtype of x."""
    normed = layer_norm(given.x_BND, given.x_BND.shape[2:], eps=given.eps)
    return normed * (1 + given.scale_BD[:, None]) + given.shift_BD[:, None]


def gradients(equation: Callable[[Arguments], Tensor], given: Arguments, grad: Tensor) -> tuple[Tensor, ...]:
    """Of x, shift and scale, by automatic differentiation of an equation."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given[:3]]
    return torch.autograd.grad(equation(Arguments(*leaves, given.eps)), leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str, implementation: Implementation, dtype: torch.dtype, assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(dtype=dtype)
    result = implementation(name)(*given)
    assert result.is_contiguous()
    assert_as_exact_as_torch(result, exact=closed_form(given), plain=plain(given), implementation=name)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (16, 3, 5), (4, 5, 31), (2, 2, 1025), (1, 2, 1536), (1, 2, 2432)], ids=str
)
def test_any_width(
    name: str, implementation: Implementation, shape: tuple[int, int, int], assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(shape=shape)
    exact = closed_form(given)
    assert_as_exact_as_torch(implementation(name)(*given), exact=exact, plain=plain(given), implementation=name)
    grad = gradient_of_result(given)
    results = implementation(name, BACKWARD)(grad, given.x_BND, given.scale_BD, given.eps, True)
    exact_gradients = gradients(plain, given.to(torch.float64), grad.double())
    for result, exact, of_torch in zip(results, exact_gradients, gradients(plain, given, grad), strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


def test_a_large_mean_costs_no_variance(
    name: str, implementation: Implementation, assert_as_exact_as_torch: AssertExact
) -> None:
    """The difference of two means of squares would keep no digit of it in float32."""
    given = arguments(mean=3e4)
    assert_as_exact_as_torch(
        implementation(name)(*given), exact=closed_form(given), plain=plain(given), implementation=name
    )


def test_equal_numbers_leave_the_shift(name: str, implementation: Implementation) -> None:
    given = arguments()
    given = given._replace(x_BND=torch.full_like(given.x_BND, 0.75))
    assert torch.equal(implementation(name)(*given), given.shift_BD[:, None].expand_as(given.x_BND))


def test_a_token_does_not_see_the_others(name: str, implementation: Implementation) -> None:
    given = arguments()
    grad = gradient_of_result(given)
    alone = Arguments(given.x_BND[1:, 3:4], given.shift_BD[1:], given.scale_BD[1:], given.eps)
    assert torch.equal(implementation(name)(*alone), implementation(name)(*given)[1:, 3:4])
    grad_x, *_ = implementation(name, BACKWARD)(grad, given.x_BND, given.scale_BD, given.eps, False)
    of_alone, *_ = implementation(name, BACKWARD)(grad[1:, 3:4], alone.x_BND, alone.scale_BD, given.eps, False)
    assert torch.equal(of_alone, grad_x[1:, 3:4])


@pytest.mark.parametrize("with_modulation", [True, False], ids=["modulation", "frozen modulation"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=["no sample", "no token", "no width"])
def test_an_empty_batch_stays_empty(
    name: str, implementation: Implementation, shape: tuple[int, int, int], with_modulation: bool
) -> None:
    given = arguments(shape=shape)
    assert implementation(name)(*given).shape == shape
    results = implementation(name, BACKWARD)(given.x_BND, given.x_BND, given.scale_BD, given.eps, with_modulation)
    summed = given.scale_BD.shape if with_modulation else (0,)
    assert [result.shape for result in results] == [shape, summed, summed]
    assert not any(result.any() for result in results), "a sum over no token is zero"


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    x, shift, scale, eps = given
    yield "contiguous modulation", Arguments(x, shift.contiguous(), scale.contiguous(), eps)
    yield "inner slice", given._replace(x_BND=torch.nn.functional.pad(x, (1, 2))[..., 1:-2])
    yield "tokens among others", given._replace(x_BND=torch.cat([x, x[:, :5]], dim=1)[:, : x.shape[1]])
    yield "transposed", given._replace(x_BND=x.transpose(0, 1).contiguous().transpose(0, 1))
    yield "columns apart", given._replace(x_BND=x.mT.contiguous().mT, scale_BD=scale.mT.contiguous().mT)


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    laid_out = dict(strided(given))[layout]
    assert torch.equal(implementation(name)(*laid_out), implementation(name)(*given))
    one, other = (
        implementation(name, BACKWARD)(gradient_of_result(a).mul(a.x_BND), a.x_BND, a.scale_BD, a.eps, True)
        for a in (laid_out, given)
    )
    for result, expected in zip(one, other, strict=True):
        assert result.is_contiguous() and torch.equal(result, expected)


def test_expanded_arguments_are_read_in_place(
    name: str, implementation: Implementation, assert_as_exact_as_torch: AssertExact
) -> None:
    """One sample and one modulation for all, and the gradient of a plain sum: strides of zero."""
    given = arguments()
    one = Arguments(*(tensor[:1].expand_as(tensor) for tensor in given[:3]))
    assert_as_exact_as_torch(implementation(name)(*one), exact=closed_form(one), plain=plain(one), implementation=name)
    grad = torch.ones(()).expand_as(one.x_BND)
    results = implementation(name, BACKWARD)(grad, one.x_BND, one.scale_BD, one.eps, True)
    exact_gradients = gradients(plain, one.to(torch.float64), grad.double())
    for result, exact, of_torch in zip(results, exact_gradients, gradients(plain, one, grad), strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments(shape=(2, 19, 48))
    apart = Arguments(*map(far_apart, given[:3]))
    assert torch.equal(implementation(name)(*apart), implementation(name)(*given))
    one, other = (
        implementation(name, BACKWARD)(grad, a.x_BND, a.scale_BD, a.eps, True)
        for grad, a in ((far_apart(given.x_BND), apart), (given.x_BND, given))
    )
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("with_modulation", [True, False], ids=["modulation", "frozen modulation"])
def test_every_element_is_written(
    name: str, implementation: Implementation, with_modulation: bool, poisoned_memory: None
) -> None:
    given = arguments(shape=(2, 17, 33))
    assert implementation(name)(*given).isfinite().all()
    results = implementation(name, BACKWARD)(given.x_BND, given.x_BND, given.scale_BD, given.eps, with_modulation)
    assert all(result.isfinite().all() for result in results)


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "no tokens": ("x_BND", lambda a: a._replace(x_BND=a.x_BND[0])),
    "integer tokens": ("x_BND", lambda a: a._replace(x_BND=a.x_BND.int())),
    "shift of another dtype": ("shift_BD", lambda a: a._replace(shift_BD=a.shift_BD.double())),
    "shift of another width": ("shift_BD", lambda a: a._replace(shift_BD=a.shift_BD[:, :-1])),
    "scale for each token": ("scale_BD", lambda a: a._replace(scale_BD=a.x_BND)),
    "a scale too few": ("scale_BD", lambda a: a._replace(scale_BD=a.scale_BD[:1])),
    "scale on another device": ("scale_BD", lambda a: a._replace(scale_BD=a.scale_BD.to("meta"))),
    "eps of zero": ("eps", lambda a: a._replace(eps=0.0)),
    "eps that is no number": ("eps", lambda a: a._replace(eps=float("nan"))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    spoiled = spoil(arguments())
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoiled)
    if culprit in ("scale_BD", "eps"):
        with pytest.raises(ValueError, match=f"^{culprit}: "):
            implementation(name, BACKWARD)(spoiled.x_BND, spoiled.x_BND, spoiled.scale_BD, spoiled.eps, True)


@pytest.mark.parametrize("spoil", [Tensor.double, lambda g: g[:, 1:], lambda g: g.to("meta")], ids=["f64", "N", "meta"])
def test_a_bad_gradient_is_named(name: str, implementation: Implementation, spoil: Callable[[Tensor], Tensor]) -> None:
    given = arguments()
    with pytest.raises(ValueError, match=r"^grad_BND: "):
        implementation(name, BACKWARD)(spoil(given.x_BND), given.x_BND, given.scale_BD, given.eps, True)


def test_is_what_diffusers_computes(name: str, implementation: Implementation) -> None:
    given = arguments(shape=(2, 5, 16), dtype=torch.float64)
    torch.manual_seed(3)
    block_norm = pytest.importorskip("diffusers.models.normalization").AdaLayerNormZero(16).double()
    time = torch.randn(2, 16, dtype=torch.float64)
    with torch.no_grad():
        normed, *_ = block_norm(given.x_BND, emb=time)
        shift_BD, scale_BD, *_ = block_norm.linear(block_norm.silu(time)).chunk(6, dim=1)
        result = implementation(name)(given.x_BND, shift_BD, scale_BD, block_norm.norm.eps)
    torch.testing.assert_close(result, normed, rtol=0, atol=1e-14)


def test_gradcheck() -> None:
    given = arguments(shape=(2, 2, 3), dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in given[:3]]
    assert torch.autograd.gradcheck(lambda x, shift, scale: ops.layer_norm_modulate(x, shift, scale_BD=scale), leaves)


@pytest.mark.parametrize("shape", [(2, 19, 301), (1, 67, 301)], ids=str)
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
    results = implementation(name, BACKWARD)(grad, given.x_BND, given.scale_BD, given.eps, True)
    exact_gradients = gradients(closed_form_in_one, given.to(torch.float64), grad.double())
    for result, exact, of_torch in zip(results, exact_gradients, gradients(plain, given, grad), strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


def closed_form_in_one(given: Arguments) -> Tensor:
    """`closed_form` for all tokens at once, which can be differentiated."""
    centred = given.x_BND - given.x_BND.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + given.eps).sqrt()
    return normed * (1 + given.scale_BD[:, None]) + given.shift_BD[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_modulation_changes_no_bit_of_the_other_gradient(
    name: str, implementation: Implementation, dtype: torch.dtype
) -> None:
    given = arguments(dtype=dtype)
    call = (gradient_of_result(given), given.x_BND, given.scale_BD, given.eps)
    grad_x, grad_shift, grad_scale = implementation(name, BACKWARD)(*call, False)
    assert torch.equal(grad_x, implementation(name, BACKWARD)(*call, True)[0])
    assert grad_shift.shape == grad_scale.shape == (0,)


def test_sums_do_not_depend_on_threads(name: str, implementation: Implementation) -> None:
    given = arguments(shape=(1, 67, 5))
    call = (gradient_of_result(given), given.x_BND, given.scale_BD, given.eps, True)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(implementation(name, BACKWARD)(*call))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


class Calls(TorchDispatchMode):
    """The arguments with which an operator is called."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = getattr(torch.ops.dgpo_fast, operator).default
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.operator:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learning", ["none", "shift_BD", "scale_BD"])
def test_sums_are_made_only_where_the_modulation_learns(learning: str, on_device: OnDevice) -> None:
    given = on_device(arguments(shape=(2, 3, 5)))
    leaves = {field: getattr(given, field).clone() for field in ("x_BND", "shift_BD", "scale_BD")}
    asked = [leaves[field].requires_grad_() for field in leaves if field in ("x_BND", learning)]
    with Calls(BACKWARD) as calls:
        result = ops.layer_norm_modulate(leaves["x_BND"], leaves["shift_BD"], scale_BD=leaves["scale_BD"])
        grads = torch.autograd.grad(result.sum(), asked)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in asked]
    assert [call[-1] for call in calls.seen] == [learning != "none"]


def test_opcheck(on_device: OnDevice) -> None:
    given = on_device(arguments(shape=(2, 3, 5)))
    torch.library.opcheck(torch.ops.dgpo_fast.layer_norm_modulate.default, given)
    for learning in (("x_BND",), ("x_BND", "shift_BD", "scale_BD")):
        leaves = {field: getattr(given, field).clone().requires_grad_() for field in learning}
        torch.library.opcheck(torch.ops.dgpo_fast.layer_norm_modulate.default, given._replace(**leaves))
    for with_modulation in (True, False):
        call = (given.x_BND.flip(0), given.x_BND, given.scale_BD, given.eps, with_modulation)
        torch.library.opcheck(torch.ops.dgpo_fast.layer_norm_modulate_backward.default, call)


def test_compiles_into_one_graph(on_device: OnDevice) -> None:
    given = on_device(arguments(shape=(2, 3, 5)))
    inputs = [tensor.clone().requires_grad_() for tensor in given[:3]]

    def block(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
        return ops.layer_norm_modulate(x_BND * 2, shift_BD, scale_BD=scale_BD).square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), block(*inputs))
    grads, expected = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, block))
    assert all(map(torch.equal, grads, expected))
