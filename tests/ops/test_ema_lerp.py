"""Moving averages: torch.lerp to the bit where torch can be followed, float64 everywhere, any lists of tensors."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "ema_lerp_"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DECAYS = (0.0, 0.001, 0.3, 0.5, 0.9, 0.9999, 1.0)
# Of no element, one, an odd number, one block, and several programs; the shapes of an adapter among them.
SHAPES = ((3, 5), (0, 4), (), (64, 48), (1023,), (0,), (2, 1, 7), (9001,), (0,))


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    averages: list[Tensor]
    values: list[Tensor]
    decay: float = 0.9


def arguments(
    *, decay: float = 0.9, dtype: torch.dtype = torch.float32, value_dtype: torch.dtype = torch.float32
) -> Arguments:
    """Averages near their values, as those of weights are."""
    generator = torch.Generator().manual_seed(6)
    averages = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    values = [a + 0.1 * torch.randn(a.shape, generator=generator, dtype=torch.float64) for a in averages]
    return Arguments([a.to(dtype) for a in averages], [v.to(value_dtype) for v in values], decay)


def advanced(ema_lerp_: Callable[..., Any], given: Arguments) -> list[Tensor]:
    """The averages after the operator, in the layout they have; `given` keeps its own."""
    averages = [in_its_layout(average) for average in given.averages]
    assert ema_lerp_(averages, given.values, given.decay) is None
    return averages


def in_its_layout(tensor: Tensor) -> Tensor:
    """A copy of `tensor` with its strides, and of what lies between its elements."""
    memory = tensor.untyped_storage().clone()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_closed_form(
    name: str,
    implementation: Implementation,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    decay: float,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    if name == "native" and "DGPO_FAST_NATIVE_DIR" in os.environ:
        pytest.skip("a build with sanitizers lacks the fused multiply-add that torch has")
    given = arguments(decay=decay, dtype=dtype, value_dtype=value_dtype)
    for result, average, value in zip(advanced(implementation(name), given), *given[:2], strict=True):
        value_as_average = value.to(dtype)
        assert_as_exact_as_torch(
            result,
            exact=decay * average.double() + (1 - decay) * value_as_average.double(),
            plain=decay * average + (1 - decay) * value_as_average,
            implementation=name,
        )


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_lerp_to_the_bit(
    name: str, implementation: Implementation, device: str, dtype: torch.dtype, value_dtype: torch.dtype, decay: float
) -> None:
    if name == "triton" or device != "cpu":
        pytest.skip("the interpreter rounds the product too, where torch rounds the sum only; a GPU promises neither")
    if name == "native" and "DGPO_FAST_NATIVE_DIR" in os.environ:
        pytest.skip("a build with sanitizers lacks the fused multiply-add that torch has")
    given = arguments(decay=decay, dtype=dtype, value_dtype=value_dtype)
    for result, average, value in zip(advanced(implementation(name), given), *given[:2], strict=True):
        expected = average.lerp(value.to(dtype), 1 - decay)
        assert torch.equal(result, expected)


def test_the_ends_and_equal_tensors_are_exact(name: str, implementation: Implementation) -> None:
    given = arguments()
    for decay, ends in ((1.0, given.averages), (0.0, given.values)):
        for result, end in zip(advanced(implementation(name), given._replace(decay=decay)), ends, strict=True):
            assert torch.equal(result, end)
    for decay in DECAYS:
        same = Arguments(given.averages, given.averages, decay)
        for result, average in zip(advanced(implementation(name), same), given.averages, strict=True):
            assert torch.equal(result, average)


def test_a_tensor_does_not_see_its_list(name: str, implementation: Implementation) -> None:
    given = arguments()
    together = advanced(implementation(name), given)
    for i, (average, value) in enumerate(zip(*given[:2], strict=True)):
        (alone,) = advanced(implementation(name), Arguments([average], [value]))
        assert torch.equal(alone, together[i])


def test_hundreds_of_tensors(name: str, implementation: Implementation) -> None:
    """More than a launch of CUDA C++ takes, most of them empty, so that the interpreter has few programs to run."""
    averages = [torch.full((int(i % 64 == 0),), float(i)) for i in range(1500)]
    result = advanced(implementation(name), Arguments(averages, [torch.zeros_like(a) for a in averages], 0.5))
    assert torch.equal(torch.cat(result), torch.arange(0, 1500, 64) / 2)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_a_bit(name: str, implementation: Implementation, num_threads: int) -> None:
    averages = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (40_001, 3, 0, 60_000)]
    given = Arguments(averages, [average.flip(0) for average in averages], 0.7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = advanced(implementation(name), given)
        torch.set_num_threads(num_threads)
        result = advanced(implementation(name), given)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, result, expected))


def test_nothing_to_do(name: str, implementation: Implementation) -> None:
    assert implementation(name)([], [], 0.5) is None
    assert implementation(name)([torch.zeros(0)], [torch.zeros(0)], 0.5) is None


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts."""
    pad = torch.nn.functional.pad
    matrices = Arguments([given.averages[0], given.averages[3]], [given.values[0], given.values[3]])
    yield "inner slice of averages", matrices._replace(averages=[pad(a, (1, 2))[:, 1:-2] for a in matrices.averages])
    yield "inner slice of values", matrices._replace(values=[pad(v, (1, 2))[:, 1:-2] for v in matrices.values])
    yield "transposed averages", matrices._replace(averages=[a.mT.contiguous().mT for a in matrices.averages])
    yield "both transposed", Arguments(*([x.mT.contiguous().mT for x in side] for side in matrices[:2]))
    yield "one number for all", matrices._replace(values=[v[:1, :1].expand_as(v) for v in matrices.values])
    yield (
        "off a boundary of 16 bytes",
        Arguments(*([pad(x.flatten(), (1, 0))[1:] for x in side] for side in matrices[:2])),
    )


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = dict(strided(arguments()))[layout]
    dense = Arguments(*([x.contiguous() for x in side] for side in given[:2]))
    for one, other in zip(advanced(implementation(name), given), advanced(implementation(name), dense), strict=True):
        assert torch.equal(one, other)


def test_what_lies_between_the_elements_stays(name: str, implementation: Implementation) -> None:
    average = torch.arange(12.0).view(3, 4)
    implementation(name)([average[:, 1:3]], [torch.zeros(3, 2)], 0.5)
    expected = torch.arange(12.0).view(3, 4)
    expected[:, 1:3] /= 2
    assert torch.equal(average, expected)


def test_slices_of_one_tensor_are_its_averages(name: str, implementation: Implementation) -> None:
    """As the adapters of a view are."""
    flat, value = torch.randn(2, 4000, generator=torch.Generator().manual_seed(3))
    whole, pieces = flat.clone(), flat.clone()
    implementation(name)([whole], [value], 0.7)
    implementation(name)(list(pieces.split(1001)), list(value.split(1001)), 0.7)
    assert torch.equal(pieces, whole)


def test_elements_beyond_two_billion(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    """A value whose rows lie far apart."""
    average, value = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(3))
    expected = average.clone()
    implementation(name)([expected], [value], 0.7)
    implementation(name)([average], [far_apart(value)], 0.7)
    assert torch.equal(average, expected)


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "a value too few": ("values", lambda a: a._replace(values=a.values[:-1])),
    "no value": ("values", lambda a: a._replace(values=[])),
    "a shape": ("values", lambda a: a._replace(values=[a.values[0].mT, *a.values[1:]])),
    "a shape with as many elements": ("values", lambda a: a._replace(values=[a.values[0].flatten(), *a.values[1:]])),
    "a shape that broadcasts": ("values", lambda a: a._replace(values=[a.values[0][:1], *a.values[1:]])),
    "integer values": ("values", lambda a: a._replace(values=[v.int() for v in a.values])),
    "values of two dtypes": ("values", lambda a: a._replace(values=[*a.values[:-1], a.values[-1].double()])),
    "bfloat16 averages": ("averages", lambda a: a._replace(averages=[x.bfloat16() for x in a.averages])),
    "averages of two dtypes": ("averages", lambda a: a._replace(averages=[*a.averages[:-1], a.averages[-1].double()])),
    "a value elsewhere": ("values", lambda a: a._replace(values=[*a.values[:-1], a.values[-1].to("meta")])),
    "an average elsewhere": ("averages", lambda a: a._replace(averages=[*a.averages[:-1], a.averages[-1].to("meta")])),
    "shared memory": (
        "averages",
        lambda a: a._replace(averages=[a.averages[0][:1].expand_as(a.averages[0]), *a.averages[1:]]),
    ),
    "a negative decay": ("decay", lambda a: a._replace(decay=-0.1)),
    "a decay above one": ("decay", lambda a: a._replace(decay=1.0001)),
    "a decay that is no number": ("decay", lambda a: a._replace(decay=float("nan"))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named_and_nothing_written(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    given = arguments()
    before = [average.clone() for average in given.averages]
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoil(given))
    assert all(map(torch.equal, given.averages, before))


@pytest.mark.parametrize("culprit", ["averages", "values"])
def test_gradients_are_refused(culprit: str) -> None:
    lists = {"averages": [torch.zeros(2), torch.zeros(3)], "values": [torch.ones(2), torch.ones(3)]}
    lists[culprit][1].requires_grad_()
    with pytest.raises(ValueError, match=f"^{culprit}: requires a gradient"):
        ops.ema_lerp_(**lists, decay=0.5)
    with torch.no_grad():
        ops.ema_lerp_(**lists, decay=0.5)
    assert torch.equal(lists["averages"][1], torch.full((3,), 0.5))


def test_opcheck(on_device: OnDevice) -> None:
    torch.library.opcheck(torch.ops.dgpo_fast.ema_lerp_.default, on_device(arguments()))


def test_compiles_into_one_graph(on_device: OnDevice) -> None:
    given = on_device(arguments())

    def update(averages: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        averages = [average * 2 for average in averages]
        ops.ema_lerp_(averages, values, decay=0.7)
        return averages

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*given[:2]), update(*given[:2])))


def test_what_was_saved_of_an_average_is_void_once_it_is_advanced(on_device: OnDevice) -> None:
    average, learned = on_device(torch.ones(4)), on_device(torch.ones(4)).requires_grad_()
    product = (learned * average).sum()
    ops.ema_lerp_([average], [torch.full_like(average, 3.0)], decay=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
