"""Denoising errors: the reference against float64 and gradcheck, every implementation against that, and bits."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops, rng

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "velocity_errors"
POLICY, OLD, REFERENCE, DISTANCE = range(4)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STREAMS = torch.tensor([rng.stream(7, stage="training noise", group=group) for group in range(4)])


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    velocity: Tensor
    x0: Tensor
    noise: Tensor | None
    streams: Tensor | None
    group_M: Tensor
    old: Tensor | None
    reference: Tensor | None
    unconditional: Tensor | None
    guidance: float = 3.3


def arguments(
    *,
    sample_shape: tuple[int, ...] = (3, 5, 7),
    velocity_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    drawn: bool = False,
) -> Arguments:
    """Five samples of four groups, one of which has none; velocities near their target, as trained ones are."""
    generator = torch.Generator().manual_seed(4)

    def normal(count: int) -> Tensor:
        return torch.randn(count, *sample_shape, generator=generator, dtype=torch.float64)

    x0, noise, group_M = normal(5), normal(4), torch.tensor([2, 2, 0, 3, 0])
    target = noise[group_M] - x0
    velocity, old, reference, unconditional = ((target + 0.3 * normal(5)).to(velocity_dtype) for _ in range(4))
    return Arguments(
        velocity=velocity, x0=x0.to(dtype), noise=None if drawn else noise.to(dtype),
        streams=STREAMS if drawn else None, group_M=group_M, old=old, reference=reference, unconditional=unconditional,
    )  # fmt: skip


def equation(given: Arguments) -> Tensor:
    """The errors in the dtype of x0, as a user would write them."""
    assert given.noise is not None and given.old is not None
    assert given.reference is not None and given.unconditional is not None
    dtype = given.x0.dtype
    target = given.noise[given.group_M] - given.x0
    v, old, reference, unconditional = (
        each.to(dtype) for each in (given.velocity, given.old, given.reference, given.unconditional)
    )
    guided = unconditional + given.guidance * (reference - unconditional)
    differences = torch.stack([v - target, old - target, guided - target, v - guided])
    return differences.square().flatten(2).mean(2)


def in_float64(given: Arguments) -> Arguments:
    return Arguments(*(x.double() if is_number(x) else x for x in given))


def is_number(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("velocity_dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    velocity_dtype: torch.dtype,
    dtype: torch.dtype,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    given = arguments(velocity_dtype=velocity_dtype, dtype=dtype, sample_shape=(3, 11, 67))
    result = torch.stack(implementation(name)(*given))
    assert_as_exact_as_torch(result, exact=equation(in_float64(given)), plain=equation(given), implementation=name)


@pytest.mark.parametrize("sample_shape", [(), (1,), (2, 1, 1), (1025,), (3, 1, 1366)], ids=str)
def test_any_size_of_sample(name: str, implementation: Implementation, sample_shape: tuple[int, ...]) -> None:
    given = arguments(sample_shape=sample_shape)
    rows = given if sample_shape else Arguments(*(x.view(-1, 1) if is_number(x) else x for x in given))
    exact = equation(in_float64(rows))
    result = torch.stack(implementation(name)(*given))
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


def test_equal_velocities_have_equal_errors(name: str, implementation: Implementation) -> None:
    """To the bit: the ratio of policy and old policy must be exactly 1 where their weights are equal."""
    given = arguments(sample_shape=(1023,), velocity_dtype=torch.bfloat16)
    errors = implementation(name)(*given._replace(old=given.velocity, reference=given.velocity, unconditional=None))
    assert torch.equal(errors[OLD], errors[POLICY])
    assert torch.equal(errors[REFERENCE], errors[POLICY])
    assert not errors[DISTANCE].any()


def test_equal_velocities_have_equal_errors_wherever_they_lie(name: str, implementation: Implementation) -> None:
    """To the bit, though only one of them begins at a multiple of 16 bytes."""
    given = arguments(sample_shape=(16, 8, 8))
    errors = implementation(name)(*given._replace(old=beside(given.velocity), reference=None, unconditional=None))
    assert torch.equal(errors[OLD], errors[POLICY])


def beside(tensor: Tensor) -> Tensor:
    """The same values, contiguous, an element behind where memory begins."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("sample_shape", [(16, 8, 8), (2, 2056)], ids=str)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_where_a_tensor_lies_changes_no_bit(
    name: str, implementation: Implementation, drawn: bool, sample_shape: tuple[int, ...], device: str
) -> None:
    if name == "triton" and device == "cuda":
        pytest.skip("two orders of sums: one for rows that are all aligned, one for others")
    given = arguments(sample_shape=sample_shape, drawn=drawn)
    elsewhere = given._replace(x0=beside(given.x0))
    assert torch.equal(*(torch.stack(implementation(name)(*each)) for each in (elsewhere, given)))


def test_what_is_absent_changes_nothing_else(name: str, implementation: Implementation) -> None:
    given = arguments()
    everything = implementation(name)(*given)
    policy_only = implementation(name)(*given._replace(old=None, reference=None, unconditional=None))
    assert torch.equal(policy_only[POLICY], everything[POLICY])
    assert [tuple(each.shape) for each in policy_only[1:]] == [(0,)] * 3
    without_old = implementation(name)(*given._replace(old=None))
    assert without_old[OLD].shape == (0,)
    for each in (POLICY, REFERENCE, DISTANCE):
        assert torch.equal(without_old[each], everything[each])


def test_a_sample_does_not_see_its_batch(name: str, implementation: Implementation) -> None:
    given = arguments(sample_shape=(2, 1031), drawn=True)
    whole = torch.stack(implementation(name)(*given))
    alone = given._replace(
        **{field: getattr(given, field)[3:4] for field in ("velocity", "x0", "group_M", "old", "reference")},
        unconditional=given.unconditional[3:4],
    )
    assert torch.equal(torch.stack(implementation(name)(*alone)), whole[:, 3:4])


def test_drawn_noise_is_that_of_the_forward_process(name: str, implementation: Implementation) -> None:
    """A velocity that equals the target which flow_interpolate made has no error at all."""
    given = arguments(drawn=True)
    _, target = implementation(name, "flow_interpolate")(given.x0, torch.ones(5), None, STREAMS, given.group_M, True)
    assert not implementation(name)(*given._replace(velocity=target))[POLICY].any()
    assert not implementation(name, "velocity_errors_backward")(
        torch.ones(5), None, target, given.x0, None, STREAMS, given.group_M, None, None, 1.0
    ).any()


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=["no sample", "empty samples"])
def test_an_empty_batch(
    name: str, implementation: Implementation, shape: tuple[int, int, int], drawn: bool, poisoned_memory: None
) -> None:
    """No sample, no error; the mean over no element is no number."""
    noise = None if drawn else torch.zeros(4, *shape[1:])
    source = (noise, STREAMS if drawn else None, torch.arange(shape[0]))
    errors = implementation(name)(torch.zeros(shape), torch.zeros(shape), *source, None, None, None, 1.0)
    assert [len(each) for each in errors] == [shape[0], 0, 0, 0]
    assert errors[POLICY].isnan().all()
    everything = implementation(name)(*(torch.zeros(shape),) * 2, *source, *(torch.zeros(shape),) * 3, 1.0)
    assert torch.stack(everything).shape == (4, shape[0]) and torch.stack(everything).isnan().all()
    grad = implementation(name, "velocity_errors_backward")(
        torch.ones(shape[0]), None, torch.zeros(shape), torch.zeros(shape), *source, None, None, 1.0
    )
    assert grad.shape == shape


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    assert given.noise is not None and given.reference is not None and given.unconditional is not None
    yield "inner slice", given._replace(velocity=torch.nn.functional.pad(given.velocity, (1, 2))[..., 1:-2])
    yield "transposed", given._replace(x0=given.x0.mT.contiguous().mT, noise=given.noise.mT.contiguous().mT)
    both = torch.cat([given.reference, given.unconditional]).chunk(2)
    yield "two halves of one model output", given._replace(reference=both[0], unconditional=both[1])
    yield "every second", given._replace(group_M=given.group_M.repeat_interleave(2)[::2])


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    laid_out = dict(strided(given))[layout]
    assert torch.equal(*(torch.stack(implementation(name)(*each)) for each in (laid_out, given)))
    ones = torch.ones(5)
    one, other = (
        implementation(name, "velocity_errors_backward")(
            ones, ones, a.velocity, a.x0, a.noise, a.streams, a.group_M, a.reference, a.unconditional, a.guidance
        )
        for a in (laid_out, given)
    )
    assert torch.equal(one, other)


def test_every_number_is_written(name: str, implementation: Implementation, poisoned_memory: None) -> None:
    given = arguments(sample_shape=(1027,))
    assert all(result.isfinite().all() for result in implementation(name)(*given))
    ones = torch.ones(5)
    gradient = implementation(name, "velocity_errors_backward")(
        ones, ones, given.velocity, given.x0, given.noise, None, given.group_M, given.reference, None, 1.0
    )
    assert gradient.isfinite().all()


def test_the_number_of_threads_changes_no_bit(name: str, implementation: Implementation) -> None:
    if name == "reference":
        pytest.skip("torch's own sums are cut by threads")
    given = arguments(sample_shape=(3, 20_011 if name == "native" else 345))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.stack(implementation(name)(*given)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments(sample_shape=(3, 4, 8))
    apart = given._replace(velocity=far_apart(given.velocity), reference=far_apart(given.reference))
    assert torch.equal(*(torch.stack(implementation(name)(*each)) for each in (apart, given)))


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "scalar": ("velocity", lambda a: a._replace(velocity=a.velocity[0, 0, 0, 0])),
    "integer velocity": ("velocity", lambda a: a._replace(velocity=a.velocity.int())),
    "bfloat16 samples": ("x0", lambda a: a._replace(x0=a.x0.bfloat16())),
    "samples of another shape": ("x0", lambda a: a._replace(x0=a.x0[..., :-1])),
    "noise of another dtype": ("noise", lambda a: a._replace(noise=a.noise.double())),  # type: ignore[union-attr]
    "no noise": ("noise", lambda a: a._replace(noise=a.noise[:0])),  # type: ignore[index]
    "no stream": ("streams", lambda a: a._replace(noise=None, streams=STREAMS[:0])),
    "three words": ("streams", lambda a: a._replace(noise=None, streams=STREAMS[:, :3])),
    "words of 33 bits": ("streams", lambda a: a._replace(noise=None, streams=STREAMS + 2**32)),
    "a group too few": ("group_M", lambda a: a._replace(group_M=a.group_M[:-1])),
    "group after the last": ("group_M", lambda a: a._replace(group_M=a.group_M + 1)),
    "old of another shape": ("old", lambda a: a._replace(old=a.velocity[:-1])),
    "old of another dtype": ("old", lambda a: a._replace(old=a.velocity.half())),
    "old that is a scalar": ("old", lambda a: a._replace(old=a.velocity[0, 0, 0, 0])),
    "reference on another device": ("reference", lambda a: a._replace(reference=a.velocity.to("meta"))),
    "guidance of nothing": ("unconditional", lambda a: a._replace(reference=None)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str, device: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    spoiled = spoil(arguments())
    if device == "cuda" and mistake in ("group after the last", "words of 33 bits"):
        pytest.skip("to look would wait for the device")
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoiled)


def test_a_group_that_does_not_exist_gives_nan_on_cuda(name: str, implementation: Implementation, device: str) -> None:
    if device == "cpu" or name == "reference":
        pytest.skip("raises: ValueError on the CPU, torch's own error in eager torch on CUDA")
    given = arguments()
    errors = implementation(name)(*given._replace(group_M=given.group_M + 1))
    assert torch.equal(errors[POLICY].isnan(), given.group_M == 3)


@pytest.mark.parametrize("grad", [torch.ones(1, 5), torch.ones(4), torch.ones(5).double()], ids=["1M", "M", "f64"])
def test_a_bad_gradient_is_named(name: str, implementation: Implementation, grad: Tensor) -> None:
    given, ones = arguments(), torch.ones(5)
    for culprit, policy, distance, reference in (
        ("grad_policy_M", grad, None, None),
        ("grad_distance_M", ones, grad, given.reference),
        ("grad_distance_M", ones, ones, None),
    ):
        with pytest.raises(ValueError, match=f"^{culprit}: "):
            implementation(name, "velocity_errors_backward")(
                policy, distance, given.velocity, given.x0, given.noise, None, given.group_M, reference, None, 1.0
            )


@pytest.mark.parametrize("culprit", ["x0", "noise", "old", "reference", "unconditional"])
def test_gradients_flow_to_the_velocity_only(culprit: str) -> None:
    keywords = {name: torch.ones(5, 3) for name in ("x0", "noise", "old", "reference", "unconditional")}
    keywords[culprit].requires_grad_()
    with pytest.raises(ValueError, match=f"^{culprit}: requires a gradient"):
        ops.velocity_errors(torch.ones(5, 3), **keywords)


@pytest.mark.parametrize("with_reference", [True, False])
def test_gradcheck(with_reference: bool) -> None:
    given = arguments(sample_shape=(4,), velocity_dtype=torch.float64, dtype=torch.float64)

    def errors(velocity: Tensor) -> tuple[Tensor, ...]:
        result = ops.velocity_errors(
            velocity, x0=given.x0, noise=given.noise, group_M=given.group_M, old=given.old,
            reference=given.reference if with_reference else None,
            unconditional=given.unconditional if with_reference else None, guidance=given.guidance,
        )  # fmt: skip
        return (result.policy_M, result.distance_M) if with_reference else (result.policy_M,)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(errors, given.velocity.requires_grad_())


@pytest.mark.parametrize("velocity_dtype", DTYPES, ids=str)
def test_backward_equals_the_closed_form(
    name: str, implementation: Implementation, velocity_dtype: torch.dtype, assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(velocity_dtype=velocity_dtype, sample_shape=(3, 345))
    of_policy, of_distance = torch.randn(2, 5, generator=torch.Generator().manual_seed(8))

    def gradient(given: Arguments) -> Tensor:
        velocity = given.velocity.detach().clone().requires_grad_()
        errors = equation(given._replace(velocity=velocity))
        weights = torch.stack([of_policy, of_distance]).to(errors.dtype)
        (errors[[POLICY, DISTANCE]] * weights).sum().backward()
        assert velocity.grad is not None
        return velocity.grad

    result = implementation(name, "velocity_errors_backward")(
        of_policy, of_distance, given.velocity, given.x0, given.noise, None, given.group_M, given.reference,
        given.unconditional, given.guidance,
    )  # fmt: skip
    exact = gradient(in_float64(given))
    assert_as_exact_as_torch(result, exact=exact, plain=gradient(given), implementation=name)


def test_old_and_reference_errors_have_no_gradient() -> None:
    velocity = torch.ones(5, 3, requires_grad=True)
    errors = ops.velocity_errors(
        velocity, x0=torch.ones(5, 3), noise=torch.ones(5, 3), old=velocity.detach(), reference=velocity.detach()
    )
    assert [each.requires_grad for each in errors] == [True, False, False, True]


def test_a_graph_serves_any_number_of_samples() -> None:
    compiled = torch.compile(ops.velocity_errors, fullgraph=True, backend="aot_eager")
    for count in (5, 7):
        velocity, x0, noise = torch.randn(3, count, 4, generator=torch.Generator().manual_seed(count))
        for tensor in (velocity, x0, noise):
            torch._dynamo.mark_dynamic(tensor, 0)
        errors = compiled(velocity, x0=x0, noise=noise, old=x0)
        assert torch.equal(errors.policy_M, ops.velocity_errors(velocity, x0=x0, noise=noise).policy_M)


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_opcheck(drawn: bool, on_device: OnDevice) -> None:
    given = on_device(arguments(drawn=drawn))
    torch.library.opcheck(torch.ops.dgpo_fast.velocity_errors.default, given)
    learning = given._replace(velocity=given.velocity.clone().requires_grad_(), old=None)
    torch.library.opcheck(torch.ops.dgpo_fast.velocity_errors.default, learning)
    backward = (
        on_device(torch.ones(5)),
        None,
        given.velocity,
        given.x0,
        given.noise,
        given.streams,
        given.group_M,
        None,
        None,
        1.0,
    )
    torch.library.opcheck(torch.ops.dgpo_fast.velocity_errors_backward.default, backward)


def test_compiles_into_one_graph(on_device: OnDevice) -> None:
    given = on_device(arguments())

    def loss(velocity: Tensor, x0: Tensor, reference: Tensor) -> Tensor:
        errors = ops.velocity_errors(velocity * 2, x0=x0, noise=given.noise, group_M=given.group_M, reference=reference)
        assert errors.distance_M is not None
        return errors.policy_M.sum() + errors.distance_M.sum()

    inputs = (given.velocity.clone().requires_grad_(), given.x0, given.reference)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(*inputs), inputs[:1])
    assert torch.equal(torch.autograd.grad(compiled(*inputs), inputs[:1])[0], expected)
