"""The SDE step: coefficients against the process they discretise, densities against torch.distributions, and bits."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops, rng
from dgpo_fast.ops.sde_step import STD

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "sde_step"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STREAMS = torch.tensor([rng.stream(7, stage="rollout", group=2, sample=sample) for sample in range(4)])
# The first step, from pure noise; one of an ODE; two in the middle; the last.
SIGMA = torch.tensor([1.0, 0.9639, 0.9227, 0.6663, 0.2498], dtype=torch.float64)
SIGMA_NEXT = torch.tensor([0.9639, 0.9227, 0.8746, 0.5621, 0.0], dtype=torch.float64)
ODE = 1
LEVELS = torch.tensor([0.7, 0.0, 0.7, 0.7, 0.7], dtype=torch.float64)
COEFFICIENTS = ops.sde_coefficients(SIGMA, SIGMA_NEXT, noise_level=LEVELS, sigma_max_next=0.9639)


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x: Tensor
    velocity: Tensor
    coefficients_B3: Tensor
    noise: Tensor | None
    streams: Tensor | None
    group_B: Tensor | None
    x_next: Tensor | None
    with_mean: bool = True


def arguments(
    source: str = "noise",
    *,
    sample_shape: tuple[int, ...] = (3, 5, 7),
    dtype: torch.dtype = torch.float32,
    velocity_dtype: torch.dtype = torch.float32,
    samples_per_step: int = 1,
) -> Arguments:
    """A sample or more for each of five steps, four groups, one of which has none; `source` gives x_next."""
    generator = torch.Generator().manual_seed(4)

    def normal(count: int) -> Tensor:
        return torch.randn(count, *sample_shape, generator=generator, dtype=torch.float64)

    num_samples = 5 * samples_per_step
    x, velocity, noise = normal(num_samples), normal(num_samples), normal(4)
    x_next = x + 0.3 * normal(num_samples)
    return Arguments(
        x=x.to(dtype), velocity=velocity.to(velocity_dtype), coefficients_B3=COEFFICIENTS.repeat(samples_per_step, 1),
        noise=noise.to(dtype) if source == "noise" else None,
        streams=STREAMS if source == "streams" else None,
        group_B=None if source == "x_next" else torch.tensor([2, 2, 0, 3, 0]).repeat(samples_per_step),
        x_next=x_next.to(dtype) if source == "x_next" else None,
    )  # fmt: skip


def equation(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, mean and log_prob in the dtype of x, as a user would write them."""
    coefficients = given.coefficients_B3.to(given.x.dtype)
    of_x, of_velocity, std = (c.view(-1, *(1 for _ in given.x.shape[1:])) for c in coefficients.unbind(1))
    mean = of_x * given.x + of_velocity * given.velocity.to(given.x.dtype)
    x_next = given.x_next
    if x_next is None:
        assert given.noise is not None
        x_next = mean + std * given.noise[given.group_B]
    log_prob = -((x_next.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    log_prob_B = torch.where(coefficients[:, STD] == 0, 0, log_prob.flatten(1).mean(1))
    return x_next, mean, log_prob_B


def in_float64(given: Arguments) -> Arguments:
    return Arguments(*(x.double() if is_number(x) else x for x in given))


def is_number(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def backward_arguments(given: Arguments, *, seed: int = 8) -> tuple[Tensor | None, ...]:
    """Those of the backward operator, with gradients of every output; `given` has its x_next."""
    generator = torch.Generator().manual_seed(seed)
    grad_mean = torch.randn(given.x.shape, generator=generator, dtype=torch.float64).to(given.x.dtype)
    grad_log_prob_B = torch.randn(5, generator=generator, dtype=torch.float64).to(given.x.dtype)
    return grad_mean, grad_log_prob_B, given.x, given.velocity, given.coefficients_B3, given.x_next


def test_coefficients_are_those_of_the_paper() -> None:
    for sigma, sigma_next, level, row in zip(SIGMA, SIGMA_NEXT, LEVELS, COEFFICIENTS, strict=True):
        dt = float(sigma_next - sigma)
        s = float(level) * math.sqrt(sigma / (1 - (sigma if sigma < 1 else 0.9639)))
        of_x = 1 + s**2 * dt / (2 * float(sigma))
        of_velocity = (1 + s**2 * (1 - float(sigma)) / (2 * float(sigma))) * dt
        assert row.tolist() == pytest.approx([of_x, of_velocity, s * math.sqrt(-dt)], rel=1e-14)


def test_without_noise_a_step_is_that_of_euler() -> None:
    rows = ops.sde_coefficients(SIGMA, SIGMA_NEXT, noise_level=0.0, sigma_max_next=0.9)
    assert torch.equal(rows, torch.stack([torch.ones(5), SIGMA_NEXT - SIGMA, torch.zeros(5)], dim=1))


def test_preserving_steps_are_those_of_the_paper() -> None:
    """The mean is of the data and the noise that the velocity predicts; what is drawn lies on the flow's marginal."""
    x, velocity = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for level in (0.0, 0.3, 0.8, 1.0):
        rows = ops.cps_coefficients(SIGMA, SIGMA_NEXT, noise_level=level)
        of_x, of_velocity, std = (column[:, None] for column in rows.unbind(1))
        sigma, sigma_next = SIGMA[:, None].double(), SIGMA_NEXT[:, None].double()
        s = sigma_next * math.sin(level * math.pi / 2)
        data, noise = x - sigma * velocity, x + (1 - sigma) * velocity
        mean = (1 - sigma_next) * data + (sigma_next.square() - s.square()).clamp(min=0).sqrt() * noise
        torch.testing.assert_close(of_x * x + of_velocity * velocity, mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(std, s, rtol=0, atol=1e-15)
        # Of an exact velocity, noise - data, the mean has 1 - sigma_next of the data; both noises make sigma_next.
        of_data = of_x * (1 - sigma) - of_velocity
        of_noise = of_x * sigma + of_velocity
        torch.testing.assert_close(of_data, 1 - sigma_next, rtol=0, atol=1e-12)
        torch.testing.assert_close((of_noise.square() + std.square()).sqrt(), sigma_next, rtol=0, atol=1e-12)
    euler = torch.stack([torch.ones(5), SIGMA_NEXT - SIGMA, torch.zeros(5)], dim=1).double()
    torch.testing.assert_close(ops.cps_coefficients(SIGMA, SIGMA_NEXT, noise_level=0), euler, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.95, 0.6, 0.2])
def test_steps_keep_the_marginals_of_the_flow(sigma: float) -> None:
    """For data N(0, c^2) all is Gaussian: variances follow the forward process up to an error of dt^2."""
    c = 1.7

    def variance(sigma: float) -> float:
        return (1 - sigma) ** 2 * c**2 + sigma**2

    def error(dt: float) -> float:
        steps = (torch.tensor([s], dtype=torch.float64) for s in (sigma, sigma - dt))
        ((of_x, of_velocity, std),) = ops.sde_coefficients(*steps, noise_level=0.7, sigma_max_next=0.9).tolist()
        velocity_of_x = (sigma - (1 - sigma) * c**2) / variance(sigma)  # E[eps - x0 | x] = velocity_of_x x
        return (of_x + of_velocity * velocity_of_x) ** 2 * variance(sigma) + std**2 - variance(sigma - dt)

    assert error(1e-4) / error(5e-5) == pytest.approx(4, rel=1e-2)


WRONG_SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "no dimension": ("sigma_T", {"sigma_T": SIGMA[0]}),
    "sigma of zero": ("sigma_T", {"sigma_T": SIGMA * 0}),
    "sigma above one": ("sigma_T", {"sigma_T": SIGMA + 0.01}),
    "another number of steps": ("sigma_next_T", {"sigma_next_T": SIGMA_NEXT[1:]}),
    "upwards": ("sigma_next_T", {"sigma_next_T": SIGMA}),
    "negative": ("sigma_next_T", {"sigma_next_T": SIGMA_NEXT - 0.1}),
    "negative noise": ("noise_level", {"noise_level": -0.1}),
    "noise that is no number": ("noise_level", {"noise_level": float("nan")}),
    "a second sigma of one": ("sigma_max_next", {"sigma_max_next": 1.0}),
}


@pytest.mark.parametrize("mistake", WRONG_SCHEDULES)
def test_a_wrong_schedule_is_named(mistake: str) -> None:
    culprit, wrong = WRONG_SCHEDULES[mistake]
    given = {"sigma_T": SIGMA, "sigma_next_T": SIGMA_NEXT, "noise_level": 0.7, "sigma_max_next": 0.9639, **wrong}
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        ops.sde_coefficients(given.pop("sigma_T"), given.pop("sigma_next_T"), **given)


@pytest.mark.parametrize("mistake", sorted(WRONG_SCHEDULES.keys() - {"a second sigma of one"} | {"noise above one"}))
def test_a_wrong_preserving_schedule_is_named(mistake: str) -> None:
    culprit, wrong = WRONG_SCHEDULES.get(mistake, ("noise_level", {"noise_level": 1.1}))
    given = {"sigma_T": SIGMA, "sigma_next_T": SIGMA_NEXT, "noise_level": 0.7, **wrong}
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        ops.cps_coefficients(given.pop("sigma_T"), given.pop("sigma_next_T"), **given)


@pytest.mark.parametrize("source", ["noise", "x_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("velocity_dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    velocity_dtype: torch.dtype,
    dtype: torch.dtype,
    source: str,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    # Many samples, since the densities' errors are a few roundings of single numbers.
    given = arguments(source, velocity_dtype=velocity_dtype, dtype=dtype, sample_shape=(3, 11, 29), samples_per_step=8)
    results, exacts, plains = implementation(name)(*given), equation(in_float64(given)), equation(given)
    for result, exact, plain in list(zip(results, exacts, plains, strict=True))[source == "x_next" :]:
        assert result.is_contiguous()
        assert_as_exact_as_torch(result, exact=exact, plain=plain, implementation=name)


def test_the_density_is_that_of_torch(name: str, implementation: Implementation) -> None:
    given = arguments("x_next", dtype=torch.float64, velocity_dtype=torch.float64)
    assert given.x_next is not None
    _, mean, log_prob_B = implementation(name)(*given)
    for b in set(range(5)) - {ODE}:
        normal = torch.distributions.Normal(mean[b], COEFFICIENTS[b, STD])
        torch.testing.assert_close(log_prob_B[b], normal.log_prob(given.x_next[b]).mean(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("source", ["noise", "streams"])
@pytest.mark.parametrize("velocity_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample_shape", [(), (3, 5, 7), (2, 2053), (16, 8, 8)], ids=str)
def test_what_was_drawn_has_the_same_density_when_given_back(
    name: str, implementation: Implementation, sample_shape: tuple[int, ...], velocity_dtype: torch.dtype, source: str
) -> None:
    """To the bit: on the policy, the ratio of densities is exactly 1. A rollout does not keep the mean."""
    rollout = arguments(source, sample_shape=sample_shape, velocity_dtype=velocity_dtype)
    drawn, no_mean, old_log_prob_B = implementation(name)(*rollout._replace(with_mean=False))
    assert no_mean.shape == (0,)
    training = rollout._replace(noise=None, streams=None, group_B=None, x_next=drawn)
    nothing, mean, log_prob_B = implementation(name)(*training)
    assert nothing.shape == (0,)
    assert torch.equal(log_prob_B, old_log_prob_B)
    assert torch.equal(mean, implementation(name)(*rollout)[1])


@pytest.mark.parametrize("argument", ["velocity", "x_next"])
def test_where_a_tensor_lies_changes_no_density(
    name: str, implementation: Implementation, argument: str, device: str
) -> None:
    if name == "triton" and device == "cuda":
        pytest.skip("two orders of sums: one for rows that are all aligned, one for others")
    given = arguments("x_next", sample_shape=(16, 8, 8))
    tensor = getattr(given, argument)
    elsewhere = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    results = (implementation(name)(*each) for each in (given._replace(**{argument: elsewhere}), given))
    assert all(map(torch.equal, *results))


def test_drawn_steps_have_the_mean_and_variance_that_they_name(name: str, implementation: Implementation) -> None:
    numel = 8192
    given = arguments("streams", sample_shape=(numel,))._replace(group_B=torch.tensor([0, 1, 2, 3, 0]))
    drawn, mean, log_prob_B = implementation(name)(*given)
    for b in set(range(5)) - {ODE}:
        z = ((drawn - mean)[b] / COEFFICIENTS[b, STD]).double()
        # Five standard errors of a mean, of a variance, and of a density's mean.
        assert abs(z.mean()) < 5 / numel**0.5
        assert abs(z.var() - 1) < 5 * (2 / numel) ** 0.5
        entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(COEFFICIENTS[b, STD])
        assert abs(log_prob_B[b] + entropy) < 5 * (0.5 / numel) ** 0.5


def test_a_step_of_the_ode_draws_nothing(name: str, implementation: Implementation) -> None:
    drawn, mean, log_prob_B = implementation(name)(*arguments())
    assert torch.equal(drawn[ODE], mean[ODE])
    assert log_prob_B[ODE] == 0
    assert not (drawn == mean)[[0, 2, 3, 4]].all()
    given = arguments("x_next")
    assert implementation(name)(*given)[2][ODE] == 0
    _, *rest = backward_arguments(given)
    grad = implementation(name, "sde_step_backward")(None, *rest)
    assert not grad[ODE].any()
    assert grad[[0, 2, 3, 4]].all()


def test_noise_is_that_of_the_forward_process(name: str, implementation: Implementation) -> None:
    """With nothing but noise of std 1, x_next is what flow_interpolate draws at sigma 1."""
    nothing, only_noise = torch.zeros(4, 3, 700), torch.tensor([[0.0, 0.0, 1.0]]).expand(4, 3)
    streams = (None, STREAMS, torch.arange(4))
    drawn, _, _ = implementation(name)(nothing, nothing, only_noise, *streams, None, False)
    expected, _ = implementation(name, "flow_interpolate")(nothing, torch.ones(4), *streams, False)
    assert torch.equal(drawn, expected)


def test_a_sample_does_not_see_its_batch(name: str, implementation: Implementation) -> None:
    given = arguments("streams", sample_shape=(2, 1031))
    whole = implementation(name)(*given)

    def rows(index: Tensor) -> Arguments:
        taken = {field: getattr(given, field)[index] for field in ("x", "velocity", "coefficients_B3", "group_B")}
        return given._replace(**taken)

    for index in (torch.tensor([3, 0, 4, 1, 2]), torch.tensor([3]), torch.tensor([4, 0])):
        for result, of_whole in zip(implementation(name)(*rows(index)), whole, strict=True):
            assert torch.equal(result, of_whole[index])


@pytest.mark.parametrize("source", ["noise", "x_next"])
@pytest.mark.parametrize("sample_shape", [(), (1,), (2, 1, 1), (1025,), (3, 1, 1366)], ids=str)
def test_any_size_of_sample(
    name: str, implementation: Implementation, sample_shape: tuple[int, ...], source: str, poisoned_memory: None
) -> None:
    given = arguments(source, sample_shape=sample_shape)
    rows = given if sample_shape else Arguments(*(as_rows(field) for field in given))
    for result, exact in list(zip(implementation(name)(*given), equation(in_float64(rows)), strict=True))[
        source == "x_next" :
    ]:
        torch.testing.assert_close(result.double(), exact.view(result.shape), rtol=1e-5, atol=1e-5)


def as_rows(field: Any) -> Any:
    """Samples of one element in the shape [B, 1]."""
    return field.view(-1, 1) if is_number(field) and field.dim() == 1 else field


@pytest.mark.parametrize("source", ["noise", "streams", "x_next"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=["no sample", "empty samples"])
def test_an_empty_batch(name: str, implementation: Implementation, shape: tuple[int, int, int], source: str) -> None:
    """No sample, no density; the mean over no element is no number, but of an ODE step."""
    given = Arguments(
        x=torch.zeros(shape), velocity=torch.zeros(shape), coefficients_B3=COEFFICIENTS[: shape[0]],
        noise=torch.zeros(4, *shape[1:]) if source == "noise" else None,
        streams=STREAMS if source == "streams" else None,
        group_B=None if source == "x_next" else torch.arange(shape[0]),
        x_next=torch.zeros(shape) if source == "x_next" else None,
    )  # fmt: skip
    drawn, mean, log_prob_B = implementation(name)(*given)
    assert drawn.shape == ((0,) if source == "x_next" else shape)
    assert mean.shape == shape
    assert log_prob_B.isnan().tolist() == [True, False][: shape[0]]
    x_next = torch.zeros(shape)
    grads = (torch.zeros(shape), torch.zeros(shape[0]))
    grad = implementation(name, "sde_step_backward")(*grads, given.x, given.velocity, given.coefficients_B3, x_next)
    assert grad.shape == shape


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    yield "inner slice", given._replace(velocity=torch.nn.functional.pad(given.velocity, (1, 2))[..., 1:-2])
    yield "transposed", given._replace(x=given.x.mT.contiguous().mT)
    yield (
        "transposed source",
        given._replace(
            noise=None if given.noise is None else given.noise.mT.contiguous().mT,
            x_next=None if given.x_next is None else given.x_next.mT.contiguous().mT,
        ),
    )
    yield "half of a model's output", given._replace(velocity=torch.cat([given.velocity, given.velocity]).chunk(2)[1])
    yield "columns", given._replace(coefficients_B3=given.coefficients_B3.mT.contiguous().mT)
    if given.group_B is not None:
        yield "every second", given._replace(group_B=given.group_B.repeat_interleave(2)[::2])


@pytest.mark.parametrize("source", ["noise", "x_next"])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, source: str) -> None:
    given = arguments(source)
    expected = implementation(name)(*given)
    known = given if given.x_next is not None else given._replace(x_next=given.x + 0.1)
    expected_grad = implementation(name, "sde_step_backward")(*backward_arguments(known))
    for layout, laid_out in strided(given):
        assert all(map(torch.equal, implementation(name)(*laid_out), expected)), layout
        known = laid_out if laid_out.x_next is not None else laid_out._replace(x_next=given.x + 0.1)
        grad_mean, *rest = backward_arguments(known)
        assert grad_mean is not None
        grad = implementation(name, "sde_step_backward")(grad_mean.mT.contiguous().mT, *rest)
        assert torch.equal(grad, expected_grad), layout


def test_expanded_arguments(name: str, implementation: Implementation) -> None:
    """One sample, and one step, for all: strides of zero."""
    given = arguments("streams")
    one = given._replace(x=given.x[:1].expand_as(given.x), coefficients_B3=COEFFICIENTS[2:3].expand(5, 3))
    dense = one._replace(x=one.x.contiguous(), coefficients_B3=one.coefficients_B3.contiguous())
    assert all(map(torch.equal, implementation(name)(*one), implementation(name)(*dense)))


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments("x_next", sample_shape=(3, 4, 8))
    assert given.x_next is not None
    apart = given._replace(x=far_apart(given.x), velocity=far_apart(given.velocity), x_next=far_apart(given.x_next))
    assert all(map(torch.equal, implementation(name)(*apart), implementation(name)(*given)))
    backward = implementation(name, "sde_step_backward")
    assert torch.equal(backward(*backward_arguments(apart)), backward(*backward_arguments(given)))
    noisy = arguments(sample_shape=(3, 4, 8))
    assert noisy.noise is not None
    far = noisy._replace(noise=far_apart(noisy.noise))
    assert all(map(torch.equal, implementation(name)(*far), implementation(name)(*noisy)))


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "scalar": ("x", lambda a: a._replace(x=a.x[0, 0, 0, 0])),
    "bfloat16 samples": ("x", lambda a: a._replace(x=a.x.bfloat16())),
    "integer velocity": ("velocity", lambda a: a._replace(velocity=a.velocity.int())),
    "velocity of another shape": ("velocity", lambda a: a._replace(velocity=a.velocity[..., :-1])),
    "velocity on another device": ("velocity", lambda a: a._replace(velocity=a.velocity.to("meta"))),
    "two coefficients": ("coefficients_B3", lambda a: a._replace(coefficients_B3=COEFFICIENTS[:, :2])),
    "half-precision coefficients": ("coefficients_B3", lambda a: a._replace(coefficients_B3=COEFFICIENTS.half())),
    "negative std": ("coefficients_B3", lambda a: a._replace(coefficients_B3=-COEFFICIENTS)),
    "std that is no number": ("coefficients_B3", lambda a: a._replace(coefficients_B3=COEFFICIENTS * math.nan)),
    "noise of another dtype": ("noise", lambda a: a._replace(noise=a.noise.double())),  # type: ignore[union-attr]
    "noise of another shape": ("noise", lambda a: a._replace(noise=a.noise[..., :-1])),  # type: ignore[index]
    "no source": ("noise", lambda a: a._replace(noise=None)),
    "two sources": ("noise", lambda a: a._replace(streams=STREAMS)),
    "noise for what was drawn": ("noise", lambda a: a._replace(x_next=a.x)),
    "no noise": ("noise", lambda a: a._replace(noise=a.noise[:0])),  # type: ignore[index]
    "no stream": ("streams", lambda a: a._replace(noise=None, streams=STREAMS[:0])),
    "three words": ("streams", lambda a: a._replace(noise=None, streams=STREAMS[:, :3])),
    "words of 33 bits": ("streams", lambda a: a._replace(noise=None, streams=STREAMS + 2**32)),
    "no group": ("group_B", lambda a: a._replace(group_B=None)),
    "group of what was drawn": ("group_B", lambda a: a._replace(noise=None, x_next=a.x)),
    "a group too few": ("group_B", lambda a: a._replace(group_B=a.group_B[:-1])),  # type: ignore[index]
    "group after the last": ("group_B", lambda a: a._replace(group_B=a.group_B + 1)),  # type: ignore[operator]
    "x_next of another dtype": ("x_next", lambda a: a._replace(noise=None, group_B=None, x_next=a.x.double())),
    "x_next of another shape": ("x_next", lambda a: a._replace(noise=None, group_B=None, x_next=a.x[:-1])),
}


VALUES = ("negative std", "std that is no number", "words of 33 bits", "group after the last")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str, device: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    if device == "cuda" and mistake in VALUES:
        pytest.skip("to look would wait for the device")
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoil(arguments()))


@pytest.mark.parametrize(
    ("culprit", "position", "wrong"),
    [
        ("grad_mean", 0, torch.ones(5, 3)),
        ("grad_mean", 0, torch.ones(5, 3, 5, 7).double()),
        ("grad_log_prob_B", 1, torch.ones(4)),
        ("grad_log_prob_B", 1, torch.ones(5).double()),
        ("x_next", 5, torch.ones(5, 3)),
    ],
)
def test_a_bad_gradient_is_named(
    name: str, implementation: Implementation, culprit: str, position: int, wrong: Tensor
) -> None:
    spoiled = list(backward_arguments(arguments("x_next")))
    spoiled[position] = wrong
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name, "sde_step_backward")(*spoiled)


@pytest.mark.parametrize("culprit", ["x", "coefficients_B3", "noise", "x_next"])
def test_gradients_flow_to_the_velocity_only(culprit: str) -> None:
    given = {"x": torch.ones(5, 3), "coefficients_B3": COEFFICIENTS.clone()}
    given["x_next" if culprit == "x_next" else "noise"] = torch.ones(5, 3)
    given[culprit].requires_grad_()
    with pytest.raises(ValueError, match=f"^{culprit}: requires a gradient"):
        ops.sde_step(velocity=torch.ones(5, 3), **given)


def test_what_is_drawn_is_a_constant() -> None:
    """It has no gradient, and log_prob's is that of its given value."""
    given = arguments(dtype=torch.float64, velocity_dtype=torch.float64)
    velocity = given.velocity.requires_grad_()
    step = ops.sde_step(given.x, velocity, coefficients_B3=COEFFICIENTS, noise=given.noise, group_B=given.group_B)
    assert not step.x_next.requires_grad
    known = ops.sde_step(given.x, velocity, coefficients_B3=COEFFICIENTS, x_next=step.x_next)
    assert known.x_next is step.x_next
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad((weights * step.log_prob_B).sum(), velocity)
    (expected,) = torch.autograd.grad((weights * known.log_prob_B).sum(), velocity)
    assert grad.any()
    assert torch.equal(grad, expected)


def test_gradcheck() -> None:
    given = arguments("x_next", sample_shape=(4,), dtype=torch.float64, velocity_dtype=torch.float64)

    def of_velocity(velocity: Tensor) -> tuple[Tensor, Tensor]:
        step = ops.sde_step(given.x, velocity, coefficients_B3=COEFFICIENTS, x_next=given.x_next)
        return step.mean, step.log_prob_B

    def of_density(velocity: Tensor) -> Tensor:
        step = ops.sde_step(given.x, velocity, coefficients_B3=COEFFICIENTS, x_next=given.x_next, with_mean=False)
        return step.log_prob_B

    assert torch.autograd.gradcheck(of_velocity, given.velocity.requires_grad_())
    assert torch.autograd.gradcheck(of_density, given.velocity)


@pytest.mark.parametrize("parts", ["both", "mean", "log_prob"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("velocity_dtype", DTYPES, ids=str)
def test_backward_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    velocity_dtype: torch.dtype,
    dtype: torch.dtype,
    parts: str,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    if name == "triton" and INTERPRETED and (dtype, velocity_dtype) == (torch.float64, torch.bfloat16):
        pytest.skip("the interpreter makes zeros of what it casts from float64 to bfloat16")
    given = arguments("x_next", velocity_dtype=velocity_dtype, dtype=dtype, sample_shape=(3, 345))
    # One whose standard deviation is zero has no gradient in the plain equation: 0 times infinity.
    given = given._replace(coefficients_B3=COEFFICIENTS[[0, 2, 2, 3, 4]])
    grad_mean, grad_log_prob_B, *rest = backward_arguments(given)
    assert grad_mean is not None and grad_log_prob_B is not None
    of_mean, of_log_prob = parts != "log_prob", parts != "mean"

    def gradient(given: Arguments) -> Tensor:
        velocity = given.velocity.detach().clone().requires_grad_()
        _, mean, log_prob_B = equation(given._replace(velocity=velocity))
        loss = of_mean * (grad_mean.to(mean.dtype) * mean).sum()
        loss = loss + of_log_prob * (grad_log_prob_B.to(mean.dtype) * log_prob_B).sum()
        return torch.autograd.grad(loss, velocity)[0]

    grads = (grad_mean if of_mean else None, grad_log_prob_B if of_log_prob else None)
    assert_as_exact_as_torch(
        implementation(name, "sde_step_backward")(*grads, *rest),
        exact=gradient(in_float64(given)),
        plain=gradient(given),
        implementation=name,
    )


@pytest.mark.parametrize("source", ["noise", "streams", "x_next"])
def test_opcheck(source: str, on_device: OnDevice) -> None:
    given = on_device(arguments(source))
    torch.library.opcheck(torch.ops.dgpo_fast.sde_step.default, given)
    learning = given._replace(velocity=given.velocity.clone().requires_grad_())
    torch.library.opcheck(torch.ops.dgpo_fast.sde_step.default, learning)
    torch.library.opcheck(torch.ops.dgpo_fast.sde_step.default, learning._replace(with_mean=False))


def test_opcheck_of_the_backward(on_device: OnDevice) -> None:
    backward = on_device(backward_arguments(arguments("x_next")))
    torch.library.opcheck(torch.ops.dgpo_fast.sde_step_backward.default, backward)
    torch.library.opcheck(torch.ops.dgpo_fast.sde_step_backward.default, (None, *backward[1:]))


def test_compiles_into_one_graph(on_device: OnDevice) -> None:
    given = on_device(arguments("x_next"))

    def loss(velocity: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        step = ops.sde_step(x, velocity * 2, coefficients_B3=given.coefficients_B3, x_next=x_next)
        return step.log_prob_B.exp().sum() + step.mean.square().sum()

    inputs = (given.velocity.clone().requires_grad_(), given.x, given.x_next)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(*inputs), inputs[:1])
    assert torch.equal(torch.autograd.grad(compiled(*inputs), inputs[:1])[0], expected)
