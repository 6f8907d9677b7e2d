"""The solver step: the reference against the closed form in float64, the other implementations against that.

Under TRITON_INTERPRET=1 "triton" is one of the implementations; `test_interpreted_kernels.py` runs this file so.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dgpo_fast import ops
from dgpo_fast.ops.registry import NATIVE_LIBRARIES

OnDevice = Callable[[Any], Any]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "solver_step"
VELOCITY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    state_KBN: Tensor
    v_cond: Tensor
    v_uncond: Tensor | None
    table: Tensor
    row_B: Tensor


def arguments(
    *,
    num_states: int = 2,
    sample_shape: tuple[int, ...] = (3, 5, 7),
    num_samples: int = 3,
    guided: bool = True,
    dtype: torch.dtype = torch.float32,
    velocity_dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Random arguments, with a row of the table for each sample."""
    generator = torch.Generator().manual_seed(20)
    num_rows = 5

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Arguments(
        state_KBN=normal(num_states, num_samples, *sample_shape, dtype=dtype),
        v_cond=normal(num_samples, *sample_shape, dtype=velocity_dtype),
        v_uncond=normal(num_samples, *sample_shape, dtype=velocity_dtype) if guided else None,
        table=normal(num_rows, num_states, num_states + 2, dtype=table_dtype),
        row_B=torch.randint(num_rows, (num_samples,), generator=generator),
    )


def closed_form(given: Arguments) -> tuple[Tensor, Tensor]:
    """C_e [S; v_cond; v_uncond] as matrix products in float64, and the same with every term's absolute value."""
    inputs = [*given.state_KBN.double(), given.v_cond.double()]
    if given.v_uncond is not None:
        inputs.append(given.v_uncond.double())
    inputs_JBN = torch.stack(inputs)
    coefficients_BKJ = given.table.double()[given.row_B][..., : len(inputs)]
    return tuple(
        torch.einsum("bkj,jb...->kb...", c, x)
        for c, x in ((coefficients_BKJ, inputs_JBN), (coefficients_BKJ.abs(), inputs_JBN.abs()))
    )


def assert_close(new_state: Tensor, given: Arguments) -> None:
    """Each coefficient is rounded once, each of at most K + 2 products and sums once: K + 3 roundings a term."""
    expected, magnitude = closed_form(given)
    bound = (len(given.state_KBN) + 3) * torch.finfo(new_state.dtype).eps * magnitude
    excess = (new_state.double() - expected).abs() - bound
    assert new_state.dtype == given.state_KBN.dtype
    assert new_state.is_contiguous()
    assert (excess <= 0).all(), f"{excess.max():.3g} beyond the rounding bound"


def test_every_implementation_of_this_machine_is_tested() -> None:
    assert "reference" in ops.implementations(OPERATOR)
    assert ("native" in ops.implementations(OPERATOR)) == (
        NATIVE_LIBRARIES["cpu"].exists() and ops.serving("solver_step")[0].implementation == "native"
    )


@pytest.mark.parametrize("num_states", [1, 2, 3, 4])
def test_equals_the_closed_form(name: str, implementation: Implementation, num_states: int) -> None:
    for guided, dtype, velocity_dtype in product((True, False), (torch.float32, torch.float64), VELOCITY_DTYPES):
        given = arguments(num_states=num_states, guided=guided, dtype=dtype, velocity_dtype=velocity_dtype)
        assert_close(implementation(name)(*given), given)


@pytest.mark.parametrize(
    "sample_shape", [(), (1,), (2, 1, 1), (1025,), (3, 1, 683)], ids=lambda shape: "x".join(map(str, shape)) or "scalar"
)
def test_any_size_of_sample(name: str, implementation: Implementation, sample_shape: tuple[int, ...]) -> None:
    given = arguments(sample_shape=sample_shape)
    assert_close(implementation(name)(*given), given)


def test_a_float32_table_serves_as_well(name: str, implementation: Implementation) -> None:
    given = arguments(table_dtype=torch.float32)
    assert_close(implementation(name)(*given), given)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=["no sample", "empty samples"])
def test_an_empty_batch_stays_empty(name: str, implementation: Implementation, shape: tuple[int, int, int]) -> None:
    num_samples, *sample_shape = shape
    given = arguments(num_samples=num_samples, sample_shape=tuple(sample_shape))
    assert implementation(name)(*given).shape == (2, *shape)


def strided(given: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same values in other layouts: slices of larger tensors, transposed, channels last, and rows with a step."""
    padded = torch.nn.functional.pad(given.state_KBN, (1, 2))[..., 1:-2]
    yield "inner slice", given._replace(state_KBN=padded)
    batch_slice = torch.cat([given.state_KBN, given.state_KBN], dim=1)[:, : len(given.v_cond)]
    yield "slice of the batch", given._replace(state_KBN=batch_slice)
    assert given.v_uncond is not None
    v_cond, v_uncond = torch.cat([given.v_cond, given.v_uncond]).chunk(2)
    yield "two halves of one model output", given._replace(v_cond=v_cond, v_uncond=v_uncond)
    channels_last = given.v_cond.to(memory_format=torch.channels_last)
    yield "channels last", given._replace(v_cond=channels_last)
    yield "transposed", given._replace(v_uncond=given.v_uncond.mT.contiguous().mT)
    yield "every second row", given._replace(row_B=given.row_B.repeat_interleave(2)[::2])
    yield "transposed table", given._replace(table=given.table.mT.contiguous().mT)
    yield "every second element", given._replace(state_KBN=given.state_KBN.repeat_interleave(2, dim=-1)[..., ::2])


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_strides_do_not_change_a_bit(name: str, implementation: Implementation, layout: str) -> None:
    given = arguments()
    expected = implementation(name)(*given)
    laid_out = dict(strided(given))[layout]
    assert torch.equal(implementation(name)(*laid_out), expected)
    implementation(name, "solver_step_")(*laid_out)
    assert torch.equal(laid_out.state_KBN, expected)


def test_samples_beyond_two_billion_elements(
    name: str, implementation: Implementation, far_apart: Callable[[Tensor], Tensor]
) -> None:
    given = arguments(num_samples=2)
    apart = given._replace(v_cond=far_apart(given.v_cond))
    assert torch.equal(implementation(name)(*apart), implementation(name)(*given))


def test_a_state_of_overlapping_samples_is_read_as_it_is(name: str, implementation: Implementation) -> None:
    """Windows that slide over one row; the new state has memory of its own, contiguous."""
    windows = torch.arange(12.0).unfold(0, 8, 1)[:2].unsqueeze(1)
    nothing, identity = torch.zeros(1, 8), torch.eye(2, 4)[None].double()
    new_state = implementation(name)(windows, nothing, None, identity, torch.zeros(1, dtype=torch.int64))
    assert new_state.is_contiguous()
    assert torch.equal(new_state, windows)


def test_an_expanded_velocity_is_read_in_place(name: str, implementation: Implementation) -> None:
    given = arguments(num_samples=4)
    expanded = given._replace(v_cond=given.v_cond[:1].expand_as(given.v_cond))
    assert_close(implementation(name)(*expanded), expanded)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("num_states", [1, 2, 3, 4])
def test_in_place_gives_the_same_bits(name: str, implementation: Implementation, num_states: int, guided: bool) -> None:
    given = arguments(num_states=num_states, guided=guided, velocity_dtype=torch.bfloat16)
    expected = implementation(name)(*given)
    implementation(name, "solver_step_")(*given)
    assert torch.equal(given.state_KBN, expected)


def test_every_element_of_the_result_is_written(
    name: str, implementation: Implementation, poisoned_memory: None
) -> None:
    given = arguments(num_states=3, sample_shape=(1025,))
    assert_close(implementation(name)(*given), given)


def test_a_nan_stays_in_its_sample(name: str, implementation: Implementation) -> None:
    given = arguments()
    given.v_cond[1] = torch.nan
    new_state = implementation(name)(*given)
    assert new_state[:, 1].isnan().all()
    assert new_state[:, [0, 2]].isfinite().all()


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "no state dimension": ("state_KBN", lambda a: a._replace(state_KBN=a.state_KBN[0, 0, 0, 0])),
    "no state": ("state_KBN", lambda a: a._replace(state_KBN=a.state_KBN[:0])),
    "five states": ("state_KBN", lambda a: a._replace(state_KBN=a.state_KBN[[0, 0, 0, 0, 0]])),
    "bfloat16 state": ("state_KBN", lambda a: a._replace(state_KBN=a.state_KBN.bfloat16())),
    "velocity of another shape": ("v_cond", lambda a: a._replace(v_cond=a.v_cond[:, :-1])),
    "velocity of another rank": ("v_cond", lambda a: a._replace(v_cond=a.v_cond[..., None])),
    "integer velocity": ("v_cond", lambda a: a._replace(v_cond=a.v_cond.int())),
    "unguided velocity of another shape": ("v_uncond", lambda a: a._replace(v_uncond=a.v_cond[1:])),
    "unguided velocity of another dtype": ("v_uncond", lambda a: a._replace(v_uncond=a.v_cond.half())),
    "velocity on another device": ("v_cond", lambda a: a._replace(v_cond=a.v_cond.to("meta"))),
    "table of another K": ("table", lambda a: a._replace(table=a.table[..., :-1])),
    "table of one evaluation": ("table", lambda a: a._replace(table=a.table[0])),
    "integer table": ("table", lambda a: a._replace(table=a.table.long())),
    "too few rows": ("row_B", lambda a: a._replace(row_B=a.row_B[:-1])),
    "int32 rows": ("row_B", lambda a: a._replace(row_B=a.row_B.int())),
    "row after the last": ("row_B", lambda a: a._replace(row_B=torch.full_like(a.row_B, len(a.table)))),
    "negative row": ("row_B", lambda a: a._replace(row_B=torch.full_like(a.row_B, -1))),
}


OUT_OF_RANGE = ("row after the last", "negative row")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str, device: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    spoiled = spoil(arguments())
    if device == "cuda" and mistake in OUT_OF_RANGE:
        pytest.skip("to look would wait for the device")
    for operator in ("solver_step", "solver_step_"):
        with pytest.raises(ValueError, match=f"^{culprit}: "):
            implementation(name, operator)(*spoiled)


@pytest.mark.parametrize("mistake", OUT_OF_RANGE)
def test_a_row_outside_the_table_gives_nan_on_cuda(
    name: str, implementation: Implementation, mistake: str, device: str
) -> None:
    if device == "cpu" or name == "reference":
        pytest.skip("raises: ValueError on the CPU, torch's own error in eager torch on CUDA")
    assert implementation(name)(*MISTAKES[mistake][1](arguments())).isnan().all()


def test_a_state_that_shares_memory_is_not_updated_in_place(name: str, implementation: Implementation) -> None:
    given = arguments()
    for shared in (
        given.state_KBN[:1].expand_as(given.state_KBN),
        given.state_KBN.as_strided((2, 3, 3, 5, 7), (1,) * 5),
    ):
        with pytest.raises(ValueError, match=r"^state_KBN: .*in place"):
            implementation(name, "solver_step_")(*given._replace(state_KBN=shared))


@pytest.mark.parametrize("culprit", ["state_KBN", "v_cond", "v_uncond"])
@pytest.mark.parametrize("step", [ops.solver_step, ops.solver_step_])
def test_a_gradient_is_refused(step: Callable[..., Tensor], culprit: str) -> None:
    keywords = arguments()._asdict()
    keywords[culprit].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{culprit}: .*not differentiable"):
        step(**keywords)
    with torch.no_grad():
        assert not step(**keywords).requires_grad or culprit == "state_KBN"


@pytest.mark.parametrize("layout", [name for name, _ in strided(arguments())])
def test_opcheck_of_any_layout(layout: str, on_device: OnDevice) -> None:
    given = on_device(dict(strided(arguments()))[layout])
    permuted = given._replace(state_KBN=given.state_KBN.transpose(0, 1).contiguous().transpose(0, 1))
    for each in (given, permuted):
        torch.library.opcheck(torch.ops.dgpo_fast.solver_step.default, each, test_utils="test_faketensor")


def test_what_was_saved_of_a_state_is_void_once_it_is_advanced(on_device: OnDevice) -> None:
    given = on_device(arguments())
    learned = torch.ones_like(given.state_KBN, requires_grad=True)
    product = (learned * given.state_KBN).sum()
    with torch.no_grad():
        ops.solver_step_(**given._asdict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("operator", ["solver_step", "solver_step_"])
def test_opcheck(operator: str, guided: bool, on_device: OnDevice) -> None:
    torch.library.opcheck(getattr(torch.ops.dgpo_fast, operator).default, on_device(arguments(guided=guided)))


@pytest.mark.parametrize("step", [ops.solver_step, ops.solver_step_])
def test_compiles_into_one_graph(step: Callable[..., Tensor], on_device: OnDevice) -> None:
    def rollout(state: Tensor, v: Tensor, table: Tensor, row_B: Tensor) -> Tensor:
        return step(
            step(state * 2, v, v_uncond=None, table=table, row_B=row_B), v, v_uncond=v, table=table, row_B=row_B
        )

    given = on_device(arguments())
    inputs = (given.state_KBN, given.v_cond, given.table, given.row_B)
    compiled = torch.compile(rollout, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), rollout(*inputs))
