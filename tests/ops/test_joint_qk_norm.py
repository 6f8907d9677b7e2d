"""Normalised queries and keys in SD3's joint layout: against float64, diffusers' attention and gradcheck."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgpo_fast import ops

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "joint_qk_norm"
BACKWARD = "joint_qk_norm_backward"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    q_image: Tensor
    k_image: Tensor
    v_image: Tensor
    q_text: Tensor | None
    k_text: Tensor | None
    v_text: Tensor | None
    w_q_image: Tensor
    w_k_image: Tensor
    w_q_text: Tensor | None
    w_k_text: Tensor | None
    num_heads: int
    eps: float = EPS

    def for_backward(self) -> tuple[Any, ...]:
        """What the backward operator takes after the gradients: all but the values."""
        return self.q_image, self.k_image, self.q_text, self.k_text, *self[6:]


def arguments(
    *,
    num_samples: int = 2,
    num_image: int = 7,
    num_text: int | None = 5,
    num_heads: int = 3,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    image = [normal(num_samples, num_image, num_heads * size) for _ in range(3)]
    text = [None if num_text is None else 3 * normal(num_samples, num_text, num_heads * size) for _ in range(3)]
    w_image = [1 + normal(size) / 4 for _ in range(2)]
    w_text = [None if num_text is None else 1 + normal(size) / 4 for _ in range(2)]
    return Arguments(*image, *text, *w_image, *w_text, num_heads)


def gradients_for(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    num_samples, num_image, width = given.q_image.shape
    num_tokens = num_image + (0 if given.q_text is None else given.q_text.shape[1])
    shape = (3, num_samples, num_tokens, given.num_heads, width // given.num_heads)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(given.q_image.dtype)
    return q, k, v


def backward(name: str, implementation: Implementation) -> Callable[..., tuple[Tensor, ...]]:
    """The backward operator, its results as those of ten tensors: it gives q, k and v of a stream as one."""
    call = implementation(name, BACKWARD)

    def separate(*arguments: Any) -> tuple[Tensor, ...]:
        results = call(*arguments)
        assert all(result.is_contiguous() for result in results)
        image, text, *of_weights = results
        return *image.chunk(3, -1), *(text.chunk(3, -1) if text.dim() == 3 else (text,) * 3), *of_weights

    return separate


def in_float64(given: Arguments) -> Arguments:
    return Arguments(*(x.double() if isinstance(x, Tensor) else x for x in given))


def equation(given: Arguments) -> tuple[Tensor, ...]:
    """As a user would write it, in the dtype of the arguments: diffusers' RMSNorm, whose sum it has in float32."""

    def normalised(x: Tensor, weight: Tensor) -> Tensor:
        heads = x.unflatten(-1, (given.num_heads, -1))
        sums = heads if heads.dtype == torch.float64 else heads.float()
        scale = torch.rsqrt(sums.pow(2).mean(-1, keepdim=True) + given.eps)
        return (heads * scale).to(weight.dtype) * weight

    q, k = normalised(given.q_image, given.w_q_image), normalised(given.k_image, given.w_k_image)
    v = given.v_image.unflatten(-1, (given.num_heads, -1))
    if given.q_text is None:
        return q, k, v
    q = torch.cat([q, normalised(given.q_text, given.w_q_text)], dim=1)
    k = torch.cat([k, normalised(given.k_text, given.w_k_text)], dim=1)
    return q, k, torch.cat([v, given.v_text.unflatten(-1, (given.num_heads, -1))], dim=1)


def gradients(given: Arguments) -> list[Tensor]:
    """Of all tensors, from `gradients_for`, by autograd in the dtype of the arguments; no element for what is None."""
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for x in given]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    found = iter(torch.autograd.grad(equation(Arguments(*leaves)), tensors, gradients_for(given)))
    nothing = torch.empty(0, dtype=given.q_image.dtype)
    return [next(found) if isinstance(leaf, Tensor) else nothing for leaf in leaves[:10]]


def closed_form_gradients(given: Arguments) -> list[Tensor]:
    """The same by the derivative written out, in long double: a sum in float64 depends on its order."""
    num_image = given.q_image.shape[1]

    def of_rms(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if x is None or weight is None:
            return torch.empty(0), torch.empty(0)
        g, heads, w = (t.double().numpy().astype(np.longdouble) for t in (grad, x.reshape(grad.shape), weight))
        scale = 1 / np.sqrt((heads**2).mean(-1, keepdims=True) + given.eps)
        n = heads * scale
        of_x = scale * (g * w - n * (g * w * n).mean(-1, keepdims=True))
        of_weight = (g * n).sum((0, 1, 2))
        return torch.from_numpy(of_x.astype(np.float64)).flatten(2), torch.from_numpy(of_weight.astype(np.float64))

    grad_q, grad_k, grad_v = gradients_for(given)
    q_image, w_q_image = of_rms(grad_q[:, :num_image], given.q_image, given.w_q_image)
    k_image, w_k_image = of_rms(grad_k[:, :num_image], given.k_image, given.w_k_image)
    q_text, w_q_text = of_rms(grad_q[:, num_image:], given.q_text, given.w_q_text)
    k_text, w_k_text = of_rms(grad_k[:, num_image:], given.k_text, given.w_k_text)
    v_image, v_text = grad_v[:, :num_image].double().flatten(2), grad_v[:, num_image:].double().flatten(2)
    return [
        *(q_image, k_image, v_image, q_text, k_text, v_text if given.q_text is not None else torch.empty(0)),
        *(w_q_image, w_k_image, w_q_text, w_k_text),
    ]


@pytest.mark.parametrize("num_text", [5, None], ids=["joint", "image only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    dtype: torch.dtype,
    num_text: int | None,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    given = arguments(dtype=dtype, num_text=num_text, num_image=41)
    results = implementation(name)(*given)
    for result, exact, of_torch in zip(results, equation(in_float64(given)), equation(given), strict=True):
        assert result.is_contiguous()
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


@pytest.mark.parametrize("num_text", [5, None], ids=["joint", "image only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    dtype: torch.dtype,
    num_text: int | None,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    given = arguments(dtype=dtype, num_text=num_text, num_image=41)
    upstream = gradients_for(given)
    results = backward(name, implementation)(*upstream, *given.for_backward(), True)
    for result, exact, of_torch in zip(results, closed_form_gradients(given), gradients(given), strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


@pytest.fixture(scope="module")
def attention() -> Any:
    """diffusers' attention of an SD3.5 block, small, with weights of the normalisation that are not 1."""
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(2)
    module = processors.Attention(
        query_dim=48, added_kv_proj_dim=48, dim_head=16, heads=3, out_dim=48, context_pre_only=False, bias=True,
        qk_norm="rms_norm", eps=EPS, processor=processors.JointAttnProcessor2_0(),
    )  # fmt: skip
    for norm in (module.norm_q, module.norm_k, module.norm_added_q, module.norm_added_k):
        assert type(norm).__name__ == "RMSNorm"
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    return module


@pytest.mark.parametrize("with_text", [True, False], ids=["joint", "image only"])
def test_attention_on_it_is_that_of_diffusers(
    name: str, implementation: Implementation, attention: Any, with_text: bool
) -> None:
    generator = torch.Generator().manual_seed(4)
    image, text = (torch.randn(2, n, 48, generator=generator) for n in (9, 5))
    with torch.no_grad():
        text_projections = (attention.add_q_proj(text), attention.add_k_proj(text), attention.add_v_proj(text))
        text_weights = (attention.norm_added_q.weight, attention.norm_added_k.weight)
        q, k, v = implementation(name)(
            attention.to_q(image), attention.to_k(image), attention.to_v(image),
            *(text_projections if with_text else (None, None, None)),
            attention.norm_q.weight, attention.norm_k.weight, *(text_weights if with_text else (None, None)),
            attention.heads, EPS,
        )  # fmt: skip
        attended = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        tokens = attended.transpose(1, 2).flatten(2)
        expected = attention(image, encoder_hidden_states=text if with_text else None)
        results = (attention.to_out[0](tokens[:, :9]), attention.to_add_out(tokens[:, 9:]))
    for result, of_diffusers in zip(results, expected if with_text else (expected,), strict=False):
        torch.testing.assert_close(result, of_diffusers)


def test_every_tensor_has_its_own_place(name: str, implementation: Implementation) -> None:
    """Twelve sources of constant values, all different: where each went, and what weighed it."""
    given = Arguments(
        *(torch.full((2, 3, 8), x) for x in (1.0, 2.0, 3.0)), *(torch.full((2, 5, 8), x) for x in (4.0, 5.0, 6.0)),
        *(torch.full((4,), w) for w in (7.0, 8.0, 9.0, 10.0)), num_heads=2, eps=1e-12,
    )  # fmt: skip
    for joint, of_image, of_text in zip(implementation(name)(*given), (7.0, 8.0, 3.0), (9.0, 10.0, 6.0), strict=True):
        assert torch.equal(joint, torch.cat([torch.full((2, 3, 2, 4), of_image), torch.full((2, 5, 2, 4), of_text)], 1))


SIZES = {
    "one head of one element": {"num_heads": 1, "size": 1},
    "odd sizes": {"num_heads": 5, "size": 7, "num_samples": 3},
    "SD3.5": {"num_heads": 4, "size": 64, "num_samples": 1, "num_image": 19},
    "one token": {"num_image": 1, "num_text": 1, "num_samples": 1},
    "no image": {"num_image": 0},
    "no text": {"num_text": 0},
    "large heads": {"num_heads": 2, "size": 2080, "num_samples": 1, "num_image": 2, "num_text": 1},
}


@pytest.mark.parametrize("case", SIZES)
def test_any_size(name: str, implementation: Implementation, case: str) -> None:
    given = arguments(dtype=torch.float64, **SIZES[case])  # type: ignore[arg-type]
    results = (
        *implementation(name)(*given),
        *backward(name, implementation)(*gradients_for(given), *given.for_backward(), True),
    )
    for result, exact in zip(results, (*equation(given), *gradients(given)), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-13)


def test_an_empty_batch_stays_empty(name: str, implementation: Implementation) -> None:
    given = arguments(num_samples=0)
    for result, expected in zip(implementation(name)(*given), equation(given), strict=True):
        assert result.shape == expected.shape
    results = backward(name, implementation)(*gradients_for(given), *given.for_backward(), True)
    for result, expected in zip(results, gradients(given), strict=True):
        assert torch.equal(result, torch.zeros_like(expected))


def test_tokens_of_zeros_stay_zeros(name: str, implementation: Implementation) -> None:
    """Padding: eps keeps their root from zero."""
    given = arguments()
    zeros = given._replace(q_text=torch.zeros_like(given.q_text), k_text=torch.zeros_like(given.k_text))
    q, k, _ = implementation(name)(*zeros)
    assert not q[:, 7:].any() and not k[:, 7:].any()
    for gradient in backward(name, implementation)(*gradients_for(zeros), *zeros.for_backward(), True):
        assert gradient.isfinite().all()


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    image, text = (torch.cat([*projections], dim=-1) for projections in (given[:3], given[3:6]))
    yield "slices of one product", Arguments(*image.chunk(3, dim=-1), *text.chunk(3, dim=-1), *given[6:])
    both = [torch.cat(pair, dim=1) for pair in zip(given[:3], given[3:6], strict=True)]
    yield "slices of all tokens", Arguments(*(x[:, :7] for x in both), *(x[:, 7:] for x in both), *given[6:])
    yield "tokens innermost", Arguments(*(x.mT.contiguous().mT for x in given[:6]), *given[6:])
    yield "tokens first", Arguments(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in given[:6]), *given[6:])
    yield "weights apart", given._replace(w_q_text=given.w_q_text.repeat_interleave(2)[::2])


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    laid_out = dict(strided(given))[layout]
    for one, other in zip(implementation(name)(*laid_out), implementation(name)(*given), strict=True):
        assert torch.equal(one, other)
    upstream = gradients_for(given)
    by_head = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in upstream]
    for one, other in zip(
        backward(name, implementation)(*by_head, *laid_out.for_backward(), True),
        backward(name, implementation)(*upstream, *given.for_backward(), True),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_expanded_arguments_are_read_in_place(name: str, implementation: Implementation) -> None:
    """One prompt for all samples: a stride of zero."""
    given = arguments()
    one = Arguments(*given[:3], *(x[:1].expand_as(x) for x in given[3:6]), *given[6:])
    dense = Arguments(*(x.contiguous() if isinstance(x, Tensor) else x for x in one))
    upstream = gradients_for(given)
    for result, expected in zip(
        (*implementation(name)(*one), *backward(name, implementation)(*upstream, *one.for_backward(), True)),
        (*implementation(name)(*dense), *backward(name, implementation)(*upstream, *dense.for_backward(), True)),
        strict=True,
    ):
        assert torch.equal(result, expected)


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments()
    apart = Arguments(*(far_apart(x) for x in given[:6]), *given[6:])
    upstream = gradients_for(given)
    for result, expected in zip(
        (*implementation(name)(*apart), *backward(name, implementation)(*upstream, *apart.for_backward(), True)),
        (*implementation(name)(*given), *backward(name, implementation)(*upstream, *given.for_backward(), True)),
        strict=True,
    ):
        assert torch.equal(result, expected)


def test_every_element_is_written(name: str, implementation: Implementation, poisoned_memory: None) -> None:
    given = arguments(num_image=51, size=24)
    upstream = gradients_for(given)
    for result in (
        *implementation(name)(*given),
        *backward(name, implementation)(*upstream, *given.for_backward(), True),
    ):
        assert result.isfinite().all()


def test_a_sample_does_not_see_its_batch(name: str, implementation: Implementation) -> None:
    given = arguments()
    alone = Arguments(*(x[1:] for x in given[:6]), *given[6:])
    for one, whole in zip(implementation(name)(*alone), implementation(name)(*given), strict=True):
        assert torch.equal(one, whole[1:])


def test_the_gradients_of_frozen_weights_are_left_out(name: str, implementation: Implementation) -> None:
    given = arguments()
    upstream = gradients_for(given)
    frozen, learning = (
        backward(name, implementation)(*upstream, *given.for_backward(), with_weights) for with_weights in (False, True)
    )
    assert [tuple(gradient.shape) for gradient in frozen[6:]] == [(0,)] * 4
    for one, other in zip(frozen[:6], learning[:6], strict=True):
        assert torch.equal(one, other)


def test_sums_do_not_depend_on_the_number_of_threads(name: str, implementation: Implementation) -> None:
    if name != "native":
        pytest.skip("its threads are torch's own, or those of a GPU")
    given = arguments(num_image=801, size=64)
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(backward(name, implementation)(*gradients_for(given), *given.for_backward(), True)[6])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "one sample without its dimension": ("q_image", lambda a: a._replace(q_image=a.q_image[0])),
    "integer queries": ("q_image", lambda a: a._replace(q_image=a.q_image.int())),
    "heads that do not divide": ("num_heads", lambda a: a._replace(num_heads=5)),
    "no heads": ("num_heads", lambda a: a._replace(num_heads=0)),
    "keys of fewer tokens": ("k_image", lambda a: a._replace(k_image=a.k_image[:, :-1])),
    "keys of another dtype": ("k_image", lambda a: a._replace(k_image=a.k_image.double())),
    "a token of text too few": ("k_text", lambda a: a._replace(k_text=a.k_text[:, 1:])),  # type: ignore[index]
    "text of another width": ("q_text", lambda a: a._replace(q_text=a.q_text[..., :-1])),  # type: ignore[index]
    "text of fewer samples": ("q_text", lambda a: a._replace(q_text=a.q_text[1:])),  # type: ignore[index]
    "text of another dtype": ("q_text", lambda a: a._replace(q_text=a.q_text.half())),  # type: ignore[union-attr]
    "keys of the text missing": ("k_text", lambda a: a._replace(k_text=None)),
    "weights without text": ("w_q_text", lambda a: a._replace(q_text=None, k_text=None, v_text=None)),
    "text without a weight": ("w_k_text", lambda a: a._replace(w_k_text=None)),
    "a weight for all heads": ("w_q_image", lambda a: a._replace(w_q_image=a.w_q_image.repeat(3))),
    "weight of another dtype": ("w_k_image", lambda a: a._replace(w_k_image=a.w_k_image.double())),
    "weight on another device": ("w_q_text", lambda a: a._replace(w_q_text=a.w_q_text.to("meta"))),  # type: ignore[union-attr]
    "eps of zero": ("eps", lambda a: a._replace(eps=0.0)),
    "eps that is not a number": ("eps", lambda a: a._replace(eps=float("nan"))),
}
OF_VALUES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "values of fewer tokens": ("v_image", lambda a: a._replace(v_image=a.v_image[:, :-1])),
    "values of another dtype": ("v_image", lambda a: a._replace(v_image=a.v_image.half())),
    "values of the text missing": ("v_text", lambda a: a._replace(v_text=None)),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, *OF_VALUES])
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, spoil = {**MISTAKES, **OF_VALUES}[mistake]
    spoiled, upstream = spoil(arguments()), gradients_for(arguments())
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoiled)
    if mistake in MISTAKES:  # the backward operator takes no values
        with pytest.raises(ValueError, match=f"^{culprit}: "):
            backward(name, implementation)(*upstream, *spoiled.for_backward(), True)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad_q", "grad_k", "grad_v"])
def test_a_bad_gradient_is_named(name: str, implementation: Implementation, which: int) -> None:
    given = arguments()
    for spoil in (lambda grad: grad[:, 1:], lambda grad: grad.flatten(2), Tensor.double):
        upstream = list(gradients_for(given))
        upstream[which] = spoil(upstream[which])
        with pytest.raises(ValueError, match=f"^grad_{'qkv'[which]}: "):
            backward(name, implementation)(*upstream, *given.for_backward(), True)


def call(*given: Any) -> tuple[Tensor, ...]:
    """The public function on the operator's arguments."""
    arguments = Arguments(*given)
    without_text = arguments.q_text is None
    return tuple(
        ops.joint_qk_norm(
            ops.QKV(*arguments[:3]),
            None if without_text else ops.QKV(*arguments[3:6]),
            image_weights=ops.QKWeights(*arguments[6:8]),
            text_weights=None if without_text else ops.QKWeights(*arguments[8:10]),
            num_heads=arguments.num_heads,
            eps=arguments.eps,
        )
    )


@pytest.mark.parametrize("num_text", [1, None], ids=["joint", "image only"])
def test_gradcheck(num_text: int | None) -> None:
    given = arguments(num_samples=1, num_image=1, num_text=num_text, num_heads=2, size=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(call, [x.requires_grad_() if isinstance(x, Tensor) else x for x in given])


@pytest.mark.parametrize("learning", ["q_image", "v_text", "w_k_text", "projections"])
def test_gradients_flow_to_what_requires_them(learning: str) -> None:
    given = arguments()
    wanted = Arguments._fields[:6] if learning == "projections" else (learning,)
    leaves = given._replace(**{field: getattr(given, field).requires_grad_() for field in wanted})
    sum(x.square().sum() for x in call(*leaves)).backward()
    assert tuple(field for field in Arguments._fields[:10] if getattr(leaves, field).grad is not None) == wanted


@pytest.mark.parametrize("num_text", [5, None], ids=["joint", "image only"])
def test_opcheck(num_text: int | None, on_device: OnDevice) -> None:
    given = on_device(arguments(num_text=num_text))
    forward, backward = (getattr(torch.ops.dgpo_fast, name).default for name in (OPERATOR, BACKWARD))
    torch.library.opcheck(forward, tuple(given))
    for frozen in (0, 4):
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in given[: 10 - frozen]]
        torch.library.opcheck(forward, (*leaves, *given[10 - frozen :]))
        torch.library.opcheck(backward, (*on_device(gradients_for(given)), *given.for_backward(), not frozen))


@pytest.mark.parametrize("num_text", [5, None], ids=["joint", "image only"])
def test_compiles_into_one_graph(num_text: int | None, on_device: OnDevice) -> None:
    given = on_device(arguments(num_text=num_text))
    leaves = [x.requires_grad_() if isinstance(x, Tensor) else x for x in given]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def loss(*given: Any) -> Tensor:
        q, k, v = call(*given)
        return (q * k + v).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves), wanted), torch.autograd.grad(loss(*leaves), wanted), strict=True
    ):
        assert torch.equal(one, other)
