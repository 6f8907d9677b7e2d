"""The forward process: the reference against float64, every implementation against that, and what noise is drawn."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops, rng

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "flow_interpolate"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STREAMS = torch.tensor([rng.stream(7, stage="training noise", group=group) for group in range(4)])


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x0: Tensor
    sigma_B: Tensor
    noise: Tensor | None
    streams: Tensor | None
    group_B: Tensor
    with_target: bool = True


def arguments(
    *, sample_shape: tuple[int, ...] = (3, 5, 7), dtype: torch.dtype = torch.float32, drawn: bool = False
) -> Arguments:
    """Five samples of four groups, one of which has none; sigma 0 and 1 among the noise levels."""
    generator = torch.Generator().manual_seed(4)
    x0, noise = (torch.randn(n, *sample_shape, generator=generator, dtype=torch.float64).to(dtype) for n in (5, 4))
    return Arguments(
        x0=x0,
        sigma_B=torch.tensor([0.0, 1.0, 0.3, 0.9639, 0.9997]),
        noise=None if drawn else noise,
        streams=STREAMS if drawn else None,
        group_B=torch.tensor([2, 2, 0, 3, 0]),
    )


def closed_form(given: Arguments) -> tuple[Tensor, Tensor]:
    """x_t and v* in float64, written out sample by sample."""
    assert given.noise is not None
    pairs = []
    for x0, sigma, group in zip(given.x0.double(), given.sigma_B.double(), given.group_B, strict=True):
        eps = given.noise[group].double()
        pairs.append(((1 - sigma) * x0 + sigma * eps, eps - x0))
    x_t, target = zip(*pairs, strict=True)
    return torch.stack(x_t), torch.stack(target)


def plain(given: Arguments) -> tuple[Tensor, Tensor]:
    """What a user would write, in the dtype of x0."""
    assert given.noise is not None
    sigma = given.sigma_B.to(given.x0.dtype).view(-1, *(1 for _ in given.x0.shape[1:]))
    eps = given.noise[given.group_B]
    return (1 - sigma) * given.x0 + sigma * eps, eps - given.x0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_closed_form(
    name: str, implementation: Implementation, dtype: torch.dtype, assert_as_exact_as_torch: AssertExact
) -> None:
    given = arguments(dtype=dtype)
    for result, exact, of_torch in zip(implementation(name)(*given), closed_form(given), plain(given), strict=True):
        assert result.is_contiguous()
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


def test_the_ends_are_the_sample_and_the_noise(name: str, implementation: Implementation) -> None:
    given = arguments()
    x_t, _ = implementation(name)(*given)
    assert given.noise is not None
    assert torch.equal(x_t[0], given.x0[0]), "sigma 0"
    assert torch.equal(x_t[1], given.noise[2]), "sigma 1"


@pytest.mark.parametrize(
    "sample_shape", [(), (1,), (2, 1, 1), (1025,), (3, 1, 683)], ids=lambda shape: "x".join(map(str, shape)) or "scalar"
)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_any_size_of_sample(
    name: str, implementation: Implementation, drawn: bool, sample_shape: tuple[int, ...]
) -> None:
    given = arguments(sample_shape=sample_shape, drawn=drawn)
    known = given if not drawn else given._replace(noise=rng.normal(STREAMS, sample_shape), streams=None)
    for result, exact in zip(implementation(name)(*given), closed_form(known), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=4e-6)  # 4 ulp of a noise of 6.8


def test_drawn_noise_is_that_of_the_named_streams(name: str, implementation: Implementation) -> None:
    """To 4 ulp, in blocks of any number; under the interpreter fewer."""
    numel = 20_001 if name == "triton" else 400_001
    noise = drawn_noise(implementation(name), numel)
    expected = rng.normal(STREAMS, (numel,))
    ulp = torch.nextafter(expected.abs(), torch.tensor(torch.inf)) - expected.abs()
    assert ((noise - expected).abs() <= 4 * ulp).all(), f"{((noise - expected).abs() / ulp).max():g} ulp"


def drawn_noise(flow_interpolate: Callable[..., Any], *sample_shape: int) -> Tensor:
    """The noise itself: at sigma 1 nothing is left of the sample."""
    x0, sigma_B = torch.zeros(4, *sample_shape), torch.ones(4)
    noise: Tensor = flow_interpolate(x0, sigma_B, None, STREAMS, torch.arange(4), False)[0]
    return noise


@pytest.mark.parametrize("sample_shape", [(3, 5, 7), (16, 8, 8)], ids=["105 elements", "1024 elements"])
def test_drawn_or_given_gives_the_same_bits(
    name: str, implementation: Implementation, sample_shape: tuple[int, ...]
) -> None:
    """Where 16 bytes are read at once, threads draw the elements that they read, and nothing lies between."""
    drawn = arguments(drawn=True, sample_shape=sample_shape)
    given = drawn._replace(noise=drawn_noise(implementation(name), *drawn.x0.shape[1:]), streams=None)
    for one, other in zip(implementation(name)(*drawn), implementation(name)(*given), strict=True):
        assert torch.equal(one, other)


def test_a_group_shares_its_noise_in_any_order_and_batch(name: str, implementation: Implementation) -> None:
    given = arguments(drawn=True)
    order = torch.tensor([3, 0, 4, 1, 2])
    x_t, target = implementation(name)(*given)
    permuted = given._replace(x0=given.x0[order], sigma_B=given.sigma_B[order], group_B=given.group_B[order])
    for one, other in zip(implementation(name)(*permuted), (x_t, target), strict=True):
        assert torch.equal(one, other[order])
    halves = [
        implementation(name)(*given._replace(x0=given.x0[s], sigma_B=given.sigma_B[s], group_B=given.group_B[s]))
        for s in (slice(0, 2), slice(2, None))
    ]
    assert torch.equal(torch.cat([half[0] for half in halves]), x_t)


def test_the_target_is_left_out_where_nobody_asks(name: str, implementation: Implementation) -> None:
    given = arguments()
    x_t, target = implementation(name)(*given._replace(with_target=False))
    assert target.shape == (0,)
    assert torch.equal(x_t, implementation(name)(*given)[0])


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=["no sample", "empty samples"])
def test_an_empty_batch_stays_empty(
    name: str, implementation: Implementation, shape: tuple[int, int, int], drawn: bool
) -> None:
    noise = None if drawn else torch.zeros(4, *shape[1:])
    empty = (torch.zeros(shape), torch.zeros(shape[0]), noise, STREAMS if drawn else None, torch.arange(shape[0]), True)
    assert [tuple(result.shape) for result in implementation(name)(*empty)] == [shape, shape]


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    assert given.noise is not None
    yield "inner slice", given._replace(x0=torch.nn.functional.pad(given.x0, (1, 2))[..., 1:-2])
    yield "slice of a larger noise", given._replace(noise=torch.cat([given.noise, given.noise], dim=1)[:, :3])
    yield "transposed", given._replace(x0=given.x0.mT.contiguous().mT, noise=given.noise.mT.contiguous().mT)
    yield "channels last", given._replace(x0=given.x0.to(memory_format=torch.channels_last))
    yield (
        "every second",
        given._replace(
            sigma_B=given.sigma_B.repeat_interleave(2)[::2], group_B=given.group_B.repeat_interleave(2)[::2]
        ),
    )


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    for one, other in zip(
        implementation(name)(*dict(strided(given))[layout]), implementation(name)(*given), strict=True
    ):
        assert torch.equal(one, other)


def test_expanded_arguments_are_read_in_place(
    name: str, implementation: Implementation, assert_as_exact_as_torch: AssertExact
) -> None:
    """One sigma and one sample for all: strides of zero."""
    given = arguments()
    one = given._replace(x0=given.x0[:1].expand_as(given.x0), sigma_B=given.sigma_B[2:3].expand(5))
    for result, exact, of_torch in zip(implementation(name)(*one), closed_form(one), plain(one), strict=True):
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments()
    apart = given._replace(x0=far_apart(given.x0), noise=far_apart(given.noise))
    for one, other in zip(implementation(name)(*apart), implementation(name)(*given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_every_element_is_written(
    name: str, implementation: Implementation, drawn: bool, poisoned_memory: None
) -> None:
    for result in implementation(name)(*arguments(sample_shape=(1027,), drawn=drawn)):
        assert result.isfinite().all()


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "scalar": ("x0", lambda a: a._replace(x0=a.x0[0, 0, 0, 0])),
    "integer samples": ("x0", lambda a: a._replace(x0=a.x0.int())),
    "a sigma too few": ("sigma_B", lambda a: a._replace(sigma_B=a.sigma_B[:-1])),
    "half-precision sigma": ("sigma_B", lambda a: a._replace(sigma_B=a.sigma_B.half())),
    "negative sigma": ("sigma_B", lambda a: a._replace(sigma_B=a.sigma_B - 0.1)),
    "sigma that is not a number": ("sigma_B", lambda a: a._replace(sigma_B=a.sigma_B / 0 * 0)),
    "noise of another shape": ("noise", lambda a: a._replace(noise=a.noise[..., :-1])),  # type: ignore[index]
    "noise of another dtype": ("noise", lambda a: a._replace(noise=a.noise.double())),  # type: ignore[union-attr]
    "noise on another device": ("noise", lambda a: a._replace(noise=a.noise.to("meta"))),  # type: ignore[union-attr]
    "no noise": ("noise", lambda a: a._replace(noise=a.noise[:0])),  # type: ignore[index]
    "no stream": ("streams", lambda a: a._replace(noise=None, streams=STREAMS[:0])),
    "three words": ("streams", lambda a: a._replace(noise=None, streams=STREAMS[:, :3])),
    "words of 33 bits": ("streams", lambda a: a._replace(noise=None, streams=STREAMS + 2**32)),
    "int32 words": ("streams", lambda a: a._replace(noise=None, streams=STREAMS.int())),
    "a group too few": ("group_B", lambda a: a._replace(group_B=a.group_B[:-1])),
    "int32 groups": ("group_B", lambda a: a._replace(group_B=a.group_B.int())),
    "group after the last": ("group_B", lambda a: a._replace(group_B=a.group_B + 1)),
    "negative group": ("group_B", lambda a: a._replace(group_B=a.group_B - 1)),
}


OUT_OF_RANGE = ("negative sigma", "sigma that is not a number", "group after the last", "negative group")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str, device: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    if device == "cuda" and mistake in (*OUT_OF_RANGE, "words of 33 bits"):
        pytest.skip("to look would wait for the device")
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoil(arguments()))


@pytest.mark.parametrize("mistake", OUT_OF_RANGE)
def test_what_cannot_be_interpolated_is_nan_on_cuda(
    name: str, implementation: Implementation, mistake: str, device: str
) -> None:
    if device == "cpu" or name == "reference":
        pytest.skip("raises: ValueError on the CPU, torch's own error in eager torch on CUDA")
    given = arguments()
    spoiled = MISTAKES[mistake][1](given)
    bad = (spoiled.group_B < 0) | (spoiled.group_B > 3) | ~(spoiled.sigma_B >= 0)
    assert bad.any()
    for result in implementation(name)(*spoiled):
        assert torch.equal(result.isnan().flatten(1).all(1), bad)


def test_noise_comes_from_one_place() -> None:
    given = arguments()
    for both in ({}, {"noise": given.noise, "streams": STREAMS}):
        with pytest.raises(ValueError, match=r"^noise: expected either noise or streams"):
            ops.flow_interpolate(given.x0, given.sigma_B, group_B=given.group_B, **both)


@pytest.mark.parametrize("culprit", ["noise", "sigma_B"])
def test_gradients_flow_to_the_samples_only(culprit: str) -> None:
    given = {"noise": torch.ones(5, 3), "sigma_B": torch.ones(5)}
    given[culprit].requires_grad_()
    with pytest.raises(ValueError, match=f"^{culprit}: requires a gradient"):
        ops.flow_interpolate(torch.ones(5, 3), **given)
    with torch.no_grad():
        ops.flow_interpolate(torch.ones(5, 3), **given)


@pytest.mark.parametrize("with_target", [True, False])
def test_gradcheck(with_target: bool) -> None:
    given = arguments(sample_shape=(3,), dtype=torch.float64)

    def of_samples(x0: Tensor) -> tuple[Tensor, ...]:
        result = ops.flow_interpolate(
            x0, given.sigma_B, noise=given.noise, group_B=given.group_B, with_target=with_target
        )
        return result[: 1 + with_target]

    assert torch.autograd.gradcheck(of_samples, given.x0.requires_grad_())


@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    dtype: torch.dtype,
    with_target: bool,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    generator = torch.Generator().manual_seed(5)
    grad_x_t, grad_target = torch.randn(2, 5, 3, 345, generator=generator, dtype=torch.float64).to(dtype)
    sigma_B = arguments().sigma_B

    def equation(*gradients: Tensor, sigma: Tensor) -> Tensor:
        of_x0 = (1 - sigma.view(-1, 1, 1)) * gradients[0]
        return of_x0 - gradients[1] if with_target else of_x0

    result = implementation(name, "flow_interpolate_backward")(grad_x_t, grad_target if with_target else None, sigma_B)
    assert_as_exact_as_torch(
        result,
        exact=equation(grad_x_t.double(), grad_target.double(), sigma=sigma_B.double()),
        plain=equation(grad_x_t, grad_target, sigma=sigma_B.to(dtype)),
        implementation=name,
    )


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_opcheck(drawn: bool, on_device: OnDevice) -> None:
    given = on_device(arguments(drawn=drawn))
    torch.library.opcheck(torch.ops.dgpo_fast.flow_interpolate.default, given)
    torch.library.opcheck(
        torch.ops.dgpo_fast.flow_interpolate.default, given._replace(x0=given.x0.clone().requires_grad_())
    )
    torch.library.opcheck(
        torch.ops.dgpo_fast.flow_interpolate_backward.default, (given.x0, given.x0.flip(0), given.sigma_B)
    )


def test_compiles_into_one_graph(on_device: OnDevice) -> None:
    given = on_device(arguments())

    def training_input(x0: Tensor, sigma_B: Tensor, noise: Tensor) -> Tensor:
        x_t, target = ops.flow_interpolate(x0 * 2, sigma_B, noise=noise, group_B=given.group_B)
        return x_t + target

    compiled = torch.compile(training_input, fullgraph=True, backend="aot_eager")
    inputs = (given.x0, given.sigma_B, given.noise)
    assert torch.equal(compiled(*inputs), training_input(*inputs))
