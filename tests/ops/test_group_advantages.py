"""Advantages against numpy in float64, and where they must be exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dgpo_fast.ops.group_advantages import GroupAdvantages, group_advantages, reference

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "group_advantages"
EPSILON, CLAMP = 1e-4, 5.0

Std = Literal["group", "global"]
std_modes = st.sampled_from(["group", "global"])


def advantages(
    reward_B: Tensor, group_size: int, *, valid_B: Tensor | None = None, std: Std = "group"
) -> GroupAdvantages:
    valid_B = torch.ones_like(reward_B, dtype=torch.bool) if valid_B is None else valid_B
    return group_advantages(reward_B, valid_B, group_size=group_size, std=std, epsilon=EPSILON, clamp=CLAMP)


def in_float64(
    reward_GS: NDArray[np.float32], valid_GS: NDArray[np.bool_], std: Std
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unclamped advantages and the standard deviations they were divided by, [G, S] each."""
    raw, spread = np.zeros(reward_GS.shape), np.zeros(reward_GS.shape)
    rewards = reward_GS.astype(np.float64)
    for g, valid in enumerate(valid_GS):
        if valid.any():
            mine = rewards[g, valid]
            deviation = mine.std() if std == "group" else rewards[valid_GS].std()
            raw[g, valid] = (mine - mine.mean()) / (deviation + EPSILON)
            spread[g] = deviation
    return raw, spread


@given(data=st.data(), num_groups=st.integers(1, 4), group_size=st.integers(1, 8), std=std_modes)
def test_equal_to_numpy_in_float64(data: st.DataObject, num_groups: int, group_size: int, std: Std) -> None:
    count = num_groups * group_size
    rewards = data.draw(st.lists(st.floats(-10, 10, width=32), min_size=count, max_size=count))
    valid = data.draw(st.lists(st.sampled_from([True, True, True, False]), min_size=count, max_size=count))
    reward_B, valid_B = torch.tensor(rewards), torch.tensor(valid)
    found = advantages(reward_B, group_size, valid_B=valid_B, std=std)
    raw, spread = in_float64(
        reward_B.view(num_groups, group_size).numpy(), valid_B.view(num_groups, group_size).numpy(), std
    )
    # Mean and deviation of n numbers are off by some n roundings of the largest, which the division magnifies.
    rounding = (2 * count + 8) * np.finfo(np.float32).eps * np.abs(rewards).max()
    tolerance = rounding * (1 + np.abs(raw)) / (spread + EPSILON)
    error = np.abs(found.advantage_B.view(num_groups, group_size).numpy() - raw.clip(-CLAMP, CLAMP))
    assert (error <= tolerance + np.finfo(np.float32).eps * CLAMP).all()
    assert found.advantage_B.dtype == torch.float32


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4),
    group_size=st.sampled_from([2, 3, 7, 16, 24, 32]),
    std=std_modes,
)
def test_equal_rewards_give_exactly_zero(values: list[float], group_size: int, std: Std) -> None:
    """Each group has one value, which its rounded mean need not equal."""
    found = advantages(torch.tensor(values).repeat_interleave(group_size), group_size, std=std)
    assert not found.advantage_B.any()
    assert not found.std_G.any()
    assert not found.clamped_B.any()


@pytest.mark.parametrize(("size", "advantage", "clamped"), [(32, 5.5646, True), (24, 4.7934, False)])
def test_one_winner_is_clamped_among_32_and_not_among_24(size: int, advantage: float, clamped: bool) -> None:
    reward_B = torch.zeros(size)
    reward_B[3] = 1.0
    found = advantages(reward_B, size)
    assert (1 - 1 / size) / (np.sqrt(size - 1) / size + EPSILON) == pytest.approx(advantage, abs=1e-4)
    assert found.advantage_B[3].item() == pytest.approx(min(advantage, CLAMP), abs=1e-4)
    assert found.clamped_B.tolist() == [clamped and sample == 3 for sample in range(size)]


def test_negative_outliers_are_clamped_too() -> None:
    reward_B = torch.ones(32)
    reward_B[7] = 0.0
    found = advantages(reward_B, 32)
    assert found.advantage_B[7] == -CLAMP
    assert found.clamped_B.nonzero().tolist() == [[7]]


def test_global_std_is_that_of_all_rewards_about_their_own_mean() -> None:
    reward_B = torch.tensor([0.0, 1.0, 10.0, 13.0])
    found = advantages(reward_B, 2, std="global")
    spread = np.std([0.0, 1.0, 10.0, 13.0]) + EPSILON
    assert found.advantage_B.tolist() == pytest.approx([-0.5 / spread, 0.5 / spread, -1.5 / spread, 1.5 / spread])
    assert found.std_G.tolist() == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_invalid_samples_do_not_count(junk: float, std: Std) -> None:
    reward_B = torch.tensor([0.0, junk, 1.0, 3.0, 5.0, junk, junk, 6.0])
    valid_B = torch.tensor([True, False, True, True, True, False, False, True])
    found = advantages(reward_B, 4, valid_B=valid_B, std=std)
    raw, _ = in_float64(reward_B.view(2, 4).numpy(), valid_B.view(2, 4).numpy(), std)
    assert found.advantage_B.tolist() == pytest.approx(raw.flatten().tolist(), rel=1e-6)
    assert not found.advantage_B[~valid_B].any()
    assert not found.clamped_B[~valid_B].any()
    assert found.std_G.tolist() == pytest.approx([np.std([0.0, 1.0, 3.0]), np.std([5.0, 6.0])])


@pytest.mark.parametrize("std", ["group", "global"])
def test_groups_with_one_or_no_valid_sample_have_no_advantage(std: Std) -> None:
    nan = float("nan")
    reward_B = torch.tensor([nan, nan, 0.3, nan, 0.0, 1.0])
    found = advantages(reward_B, 2, valid_B=reward_B.isfinite(), std=std)
    assert not found.advantage_B[:4].any()
    assert found.std_G[:2].tolist() == [0.0, 0.0]
    assert found.advantage_B[4:].tolist() == pytest.approx(
        [-0.5 / (found.std_G[2].item() + EPSILON), 0.5 / (found.std_G[2].item() + EPSILON)]
        if std == "group"
        else [-0.5 / (np.std([0.3, 0.0, 1.0]) + EPSILON), 0.5 / (np.std([0.3, 0.0, 1.0]) + EPSILON)]
    )


@given(
    sixteenths=st.lists(st.integers(-64, 64), min_size=8, max_size=8),
    shift=st.integers(-100, 100),
    group_size=st.sampled_from([1, 2, 4, 8]),
    std=std_modes,
)
def test_a_shift_of_all_rewards_changes_nothing(sixteenths: list[int], shift: int, group_size: int, std: Std) -> None:
    """To the bit, where sums and means of the rewards are exact."""
    reward_B = torch.tensor(sixteenths) / 16
    before, after = (advantages(reward_B + by, group_size, std=std) for by in (0, shift))
    assert torch.equal(before.advantage_B, after.advantage_B)
    assert torch.equal(before.std_G, after.std_G)


@given(
    sixteenths=st.lists(st.integers(-64, 64), min_size=8, max_size=8),
    order=st.permutations(range(8)),
    std=std_modes,
)
def test_advantages_follow_their_samples(sixteenths: list[int], order: list[int], std: Std) -> None:
    """Permuting a group permutes its advantages; sums that are exact are so in any order."""
    reward_B = torch.tensor(sixteenths) / 16
    before, after = advantages(reward_B, 8, std=std), advantages(reward_B[order], 8, std=std)
    torch.testing.assert_close(before.advantage_B[order], after.advantage_B, rtol=4e-7, atol=0)


# Every implementation, by the schema.


def rewards(dtype: torch.dtype = torch.float32, *, group_size: int = 16) -> tuple[Tensor, Tensor]:
    """Five groups: ordinary ones, one winner among losers, equal rewards, and one that failed but for a sample."""
    generator = torch.Generator().manual_seed(3)
    reward_GS = torch.randn(5, group_size, generator=generator, dtype=torch.float64)
    reward_GS[1], reward_GS[2] = 0.0, 0.3
    reward_GS[1, 0] = 1.0
    valid_GS = torch.rand(5, group_size, generator=generator) < 0.8
    valid_GS[1], valid_GS[3] = True, False
    valid_GS[3, 1 % group_size] = True
    return torch.where(valid_GS, reward_GS, torch.nan).flatten().to(dtype), valid_GS.flatten()


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("group_size", [2, 32, 150])
def test_every_implementation_follows_the_equation(
    name: str,
    implementation: Implementation,
    group_size: int,
    dtype: torch.dtype,
    std: Std,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    reward_B, valid_B = rewards(dtype, group_size=group_size)
    settings = (group_size, std == "global", EPSILON, CLAMP)
    advantage_B, std_G, clamped_B = implementation(name)(reward_B, valid_B, *settings)
    raw, _ = in_float64(reward_B.view(5, -1).numpy(), valid_B.view(5, -1).numpy(), std)
    assert torch.equal(clamped_B, torch.tensor(abs(raw) > CLAMP).flatten())
    assert clamped_B.any() or group_size < 32 or std == "global"

    exact, plain = (reference(reward_B.to(t), valid_B, *settings) for t in (torch.float64, dtype))
    for result, truth, of_torch in zip((advantage_B, std_G), exact, plain, strict=False):
        if dtype == torch.float64:
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
        else:
            assert_as_exact_as_torch(result, exact=truth, plain=of_torch, implementation=name)
    equal = slice(2 * group_size, 3 * group_size)
    assert not advantage_B[equal].any() and std_G[2] == 0


def test_strides_do_not_change_a_bit(name: str, implementation: Implementation) -> None:
    reward_B, valid_B = rewards()
    apart = (x.repeat_interleave(2)[::2] for x in (reward_B, valid_B))
    settings = (16, False, EPSILON, CLAMP)
    for one, other in zip(
        implementation(name)(*apart, *settings), implementation(name)(reward_B, valid_B, *settings), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_valid_reward_that_is_not_finite_is_seen(name: str, implementation: Implementation, reward: float) -> None:
    """Its group is NaN, and never one of equal rewards without a signal."""
    reward_B, valid_B = torch.tensor([reward, 1.0, 1.0, 0.0, 1.0, 2.0]), torch.ones(6, dtype=torch.bool)
    advantage_B, std_G, _ = implementation(name)(reward_B, valid_B, 3, False, EPSILON, CLAMP)
    assert advantage_B[0].isnan() and std_G[0].isnan()
    assert advantage_B[3:].isfinite().all() and std_G[1].isfinite()


def test_no_rewards_no_advantages(name: str, implementation: Implementation) -> None:
    results = implementation(name)(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 4, True, EPSILON, CLAMP)
    assert [tuple(result.shape) for result in results] == [(0,)] * 3


def test_every_number_is_written(name: str, implementation: Implementation, poisoned_memory: None) -> None:
    for result in implementation(name)(*rewards(), 16, False, EPSILON, CLAMP):
        assert result.isfinite().all()


MISTAKES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "two dimensions": ("reward_B", (torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), 2)),
    "half precision": ("reward_B", (torch.zeros(4).half(), torch.ones(4, dtype=torch.bool), 2)),
    "a truth too few": ("valid_B", (torch.zeros(4), torch.ones(3, dtype=torch.bool), 2)),
    "numbers for truths": ("valid_B", (torch.zeros(4), torch.ones(4), 2)),
    "truths elsewhere": ("valid_B", (torch.zeros(4), torch.ones(4, dtype=torch.bool, device="meta"), 2)),
    "nothing added": ("epsilon", (torch.zeros(4), torch.ones(4, dtype=torch.bool), 2, False, 0.0, CLAMP)),
    "a clamp below zero": ("clamp", (torch.zeros(4), torch.ones(4, dtype=torch.bool), 2, False, EPSILON, -1.0)),
    "no divisor": ("group_size", (torch.zeros(4), torch.ones(4, dtype=torch.bool), 3)),
    "no group": ("group_size", (torch.zeros(4), torch.ones(4, dtype=torch.bool), 0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str) -> None:
    culprit, given = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*given, *(False, EPSILON, CLAMP)[len(given) - 3 :])


def test_an_unknown_std_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^std: expected 'group' or 'global', got 'local'"):
        advantages(torch.zeros(4), 2, std="local")  # type: ignore[arg-type]


@pytest.mark.parametrize("global_std", [False, True])
def test_opcheck(global_std: bool, on_device: OnDevice) -> None:
    torch.library.opcheck(
        torch.ops.dgpo_fast.group_advantages.default, (*on_device(rewards()), 16, global_std, EPSILON, CLAMP)
    )


def test_compiles_into_one_graph(on_device: OnDevice) -> None:
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    settings = {"group_size": 16, "std": "global", "epsilon": EPSILON, "clamp": CLAMP}
    given = on_device(rewards())
    for one, other in zip(compiled(*given, **settings), group_advantages(*given, **settings), strict=True):
        assert torch.equal(one, other)
