"""The group-preference loss against its written equation, its gradient, and the published surrogate."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.ops.group_preference import (
    GroupPreference,
    clipped_samples,
    group_preference,
    group_scores,
    velocity_errors,
    weighted_errors,
)

SOFTPLUS_GAP = math.exp(-20)
"""torch's softplus takes s for softplus(s) where s > 20, and 1 for its slope: both are this close."""
ROUNDING = 1e-12
"""Of a few dozen float64 operations on numbers of order 1, generously."""
SMALLEST = 1e-300
"""Below it numbers are denormal, and sigmoid of -740 has no more than a digit or two."""


class Groups(NamedTuple):
    """Arguments of `group_preference`, float64."""

    error_M: Tensor
    reference_error_M: Tensor
    advantage_M: Tensor
    group_M: Tensor
    size_G: Tensor
    beta: float
    clipped_M: Tensor

    def preference(self, *, clip: bool = True) -> GroupPreference:
        clipped_M = self.clipped_M if clip else None
        return group_preference(*self[:5], beta=self.beta, clipped_M=clipped_M)

    def gradient(self, *, clip: bool = True) -> Tensor:
        """The gradient of the objective with respect to the errors."""
        error_M = self.error_M.clone().requires_grad_()
        return torch.autograd.grad(self._replace(error_M=error_M).preference(clip=clip).objective, error_M)[0]

    def take(self, index: Tensor) -> Groups:
        """These samples alone, of the same groups."""
        picked = (x[index] for x in (self.error_M, self.reference_error_M, self.advantage_M, self.group_M))
        return Groups(*picked, self.size_G, self.beta, self.clipped_M[index])


def make_groups(sizes: list[int], *, beta: float, seed: int, clipped_share: float = 0.0) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    num = sum(sizes)

    def uniform() -> Tensor:
        return torch.rand(num, generator=generator, dtype=torch.float64)

    return Groups(
        error_M=2 * uniform(),
        reference_error_M=2 * uniform(),
        advantage_M=torch.randn(num, generator=generator, dtype=torch.float64),
        group_M=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        size_G=torch.tensor(sizes, dtype=torch.float64),
        beta=beta,
        clipped_M=uniform() < clipped_share,
    )


random_groups = st.builds(
    make_groups,
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    beta=st.sampled_from([0.1, 1.0, 10.0, 100.0, 2000.0]),
    seed=st.integers(0, 2**32 - 1),
    clipped_share=st.sampled_from([0.0, 0.3, 1.0]),
)


def written_scores(groups: Groups) -> list[float]:
    """s_G = (beta / G) sum of A (d - d_ref), in plain Python."""
    error, reference, advantage, group = (x.tolist() for x in groups[:4])
    return [
        groups.beta
        / groups.group_M.tolist().count(number)
        * sum(a * (d - r) for a, d, r, g in zip(advantage, error, reference, group, strict=True) if g == number)
        for number in range(len(groups.size_G))
    ]


def written_softplus(s: float) -> float:
    return max(s, 0.0) + math.log1p(math.exp(-abs(s)))


def written_sigmoid(s: float) -> float:
    return math.exp(min(s, 0.0)) / (1 + math.exp(-abs(s)))


@given(groups=random_groups)
def test_objective_and_weights_are_the_written_equation(groups: Groups) -> None:
    scores = written_scores(groups)
    preference = groups.preference()
    assert math.isclose(
        preference.objective.item(),
        sum(written_softplus(s) / groups.beta for s in scores),
        rel_tol=ROUNDING,
        abs_tol=ROUNDING + len(scores) * SOFTPLUS_GAP / groups.beta,
    )
    # The error of s_G is beta times the rounding of the errors, and sigmoid's slope is at most 1/4.
    weights = torch.tensor([written_sigmoid(s) for s in scores], dtype=torch.float64)
    torch.testing.assert_close(preference.weight_G, weights, rtol=0, atol=groups.beta * 1e-14 + ROUNDING)


@given(groups=random_groups)
def test_gradient_is_the_written_one(groups: Groups) -> None:
    """sigmoid(s_G) A / |G| of each unclipped sample, exactly 0 of each clipped one."""
    weights = [written_sigmoid(s) for s in written_scores(groups)]
    written = [
        0.0 if clipped else weights[g] * a / groups.size_G[g].item()
        for a, g, clipped in zip(
            groups.advantage_M.tolist(), groups.group_M.tolist(), groups.clipped_M.tolist(), strict=True
        )
    ]
    gradient = groups.gradient()
    tolerance = groups.beta * 1e-14 + ROUNDING + SOFTPLUS_GAP
    torch.testing.assert_close(
        gradient, torch.tensor(written, dtype=torch.float64), rtol=tolerance, atol=4 * groups.beta * 1e-14
    )
    assert not gradient[groups.clipped_M].any()


@pytest.mark.parametrize("beta", [0.5, 10.0, 100.0])
def test_objective_passes_gradcheck(beta: float) -> None:
    groups = make_groups([1, 4, 3], beta=beta, seed=2)

    def objective(error_M: Tensor) -> Tensor:
        return groups._replace(error_M=error_M).preference(clip=False).objective

    assert gradcheck(objective, groups.error_M.requires_grad_())


def test_scores_and_surrogate_pass_gradcheck() -> None:
    groups = make_groups([2, 3], beta=10.0, seed=3)
    weight_G = torch.tensor([0.2, 0.9], dtype=torch.float64)
    inputs = groups.error_M.requires_grad_()
    assert gradcheck(lambda error: group_scores(error, *groups[1:5], beta=10.0), inputs)
    assert gradcheck(lambda error: weighted_errors(error, *groups[2:5], weight_G, clipped_M=groups.clipped_M), inputs)


@given(groups=random_groups)
def test_surrogate_has_the_gradient_of_the_objective(groups: Groups) -> None:
    preference = groups.preference()
    error_M = groups.error_M.clone().requires_grad_()
    surrogate = weighted_errors(error_M, *groups[2:5], preference.weight_G, clipped_M=groups.clipped_M)
    gradient = torch.autograd.grad(surrogate, error_M)[0]
    torch.testing.assert_close(groups.gradient(), gradient, rtol=ROUNDING + SOFTPLUS_GAP, atol=SMALLEST)
    assert preference.surrogate.item() == surrogate.item()
    assert not preference.surrogate.requires_grad
    assert not preference.weight_G.requires_grad


def test_a_policy_that_is_worse_on_good_samples_weighs_more_than_half() -> None:
    advantage_M = torch.tensor([1.0, -1.0])
    groups = (advantage_M, torch.zeros(2, dtype=torch.int64), torch.tensor([2.0]))
    reference_error_M = torch.tensor([1.0, 1.0])
    worse_on_good = group_preference(torch.tensor([1.5, 1.0]), reference_error_M, *groups, beta=10.0)
    better_on_good = group_preference(torch.tensor([0.5, 1.0]), reference_error_M, *groups, beta=10.0)
    # s = (10 / 2) (+1) (+-0.5)
    assert worse_on_good.weight_G.item() == pytest.approx(written_sigmoid(2.5))
    assert better_on_good.weight_G.item() == pytest.approx(written_sigmoid(-2.5))
    assert worse_on_good.weight_G > 0.5 > better_on_good.weight_G


def test_descent_lowers_errors_of_good_samples_and_raises_those_of_bad_ones() -> None:
    groups = make_groups([6], beta=10.0, seed=4)
    assert torch.equal(groups.gradient().sign(), groups.advantage_M.sign())


@given(groups=random_groups, num_pieces=st.integers(1, 4), seed=st.integers(0, 99))
def test_pieces_of_cut_groups_add_up(groups: Groups, num_pieces: int, seed: int) -> None:
    """Scores of the pieces give the weights; with these, gradients of the pieces are those of the whole."""
    piece_M = torch.randint(num_pieces, groups.group_M.shape, generator=torch.Generator().manual_seed(seed))
    pieces = [(piece_M == piece).nonzero().flatten() for piece in range(num_pieces)]
    scores = [group_scores(*groups.take(index)[:5], beta=groups.beta) for index in pieces]
    weight_G = torch.sigmoid(torch.stack(scores).sum(0))
    gradient = torch.full_like(groups.error_M, torch.nan)
    for index in pieces:
        part = groups.take(index)
        error_M = part.error_M.requires_grad_()
        surrogate = weighted_errors(error_M, *part[2:5], weight_G, clipped_M=part.clipped_M)
        gradient[index] = torch.autograd.grad(surrogate, error_M)[0]
    tolerance = groups.beta * 1e-14 + ROUNDING + SOFTPLUS_GAP
    torch.testing.assert_close(gradient, groups.gradient(), rtol=tolerance, atol=4 * groups.beta * 1e-14)


@given(groups=random_groups, seed=st.integers(0, 99))
def test_the_order_of_samples_does_not_matter(groups: Groups, seed: int) -> None:
    order = torch.randperm(len(groups.group_M), generator=torch.Generator().manual_seed(seed))
    permuted = groups.take(order)
    tolerance = {"rtol": groups.beta * 1e-14 + ROUNDING, "atol": 4 * groups.beta * 1e-14}
    torch.testing.assert_close(permuted.preference().objective, groups.preference().objective, **tolerance)
    torch.testing.assert_close(permuted.preference().weight_G, groups.preference().weight_G, **tolerance)
    torch.testing.assert_close(permuted.gradient(), groups.gradient()[order], **tolerance)


@given(groups=random_groups)
def test_groups_do_not_mix(groups: Groups) -> None:
    """The first group's weight and gradient are what they are alone."""
    first = groups.take((groups.group_M == 0).nonzero().flatten())._replace(size_G=groups.size_G[:1])
    assert torch.equal(first.preference().weight_G, groups.preference().weight_G[:1])
    assert torch.equal(first.gradient(), groups.gradient()[groups.group_M == 0])


@given(groups=random_groups)
def test_zero_advantage_gives_zero_gradient(groups: Groups) -> None:
    silent = groups._replace(advantage_M=torch.zeros_like(groups.advantage_M))
    preference = silent.preference()
    assert not silent.gradient().any()
    assert torch.equal(preference.weight_G, torch.full_like(groups.size_G, 0.5))
    assert preference.objective.item() == pytest.approx(len(groups.size_G) * math.log(2) / groups.beta)


def test_equal_rewards_teach_nothing() -> None:
    reward_B, valid_B = torch.full((6,), 0.1), torch.ones(6, dtype=torch.bool)
    advantages = group_advantages(reward_B, valid_B, group_size=3, std="group", epsilon=1e-4, clamp=5.0)
    groups = make_groups([3, 3], beta=100.0, seed=5)._replace(advantage_M=advantages.advantage_B.double())
    assert not groups.gradient().any()


def test_samples_that_do_not_count_leave_the_mean_to_the_others() -> None:
    """A masked sample has advantage 0 and is not counted in the size: the group is as if it had never been there."""
    whole = make_groups([4], beta=10.0, seed=6)
    mask_M = torch.tensor([True, False, True, True])
    masked = whole._replace(advantage_M=whole.advantage_M * mask_M, size_G=torch.tensor([3.0], dtype=torch.float64))
    without = masked.take(mask_M.nonzero().flatten())
    torch.testing.assert_close(masked.preference().weight_G, without.preference().weight_G, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(masked.gradient()[mask_M], without.gradient(), rtol=ROUNDING, atol=0)
    assert masked.gradient()[1] == 0


@given(groups=random_groups)
def test_clipped_samples_keep_their_value_and_give_no_gradient(groups: Groups) -> None:
    clipped, free = groups.preference(), groups.preference(clip=False)
    assert clipped.objective.item() == free.objective.item()
    assert clipped.surrogate.item() == free.surrogate.item()
    assert torch.equal(clipped.weight_G, free.weight_G)
    assert torch.equal(clipped.clipped_M, groups.clipped_M)
    assert not free.clipped_M.any()
    expected = torch.where(groups.clipped_M, 0.0, groups.gradient(clip=False))
    torch.testing.assert_close(groups.gradient(), expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [1e-2, 1e-5, 1e-30])
def test_nothing_is_clipped_at_equal_errors(clip: float, dtype: torch.dtype) -> None:
    """The ratio is exactly 1: also a range that rounds to nothing holds it."""
    error_M = torch.tensor([0.1, 1 / 3, 7.0, 1e-8], dtype=dtype)
    advantage_M = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=dtype)
    assert not clipped_samples(error_M, error_M.clone(), advantage_M, clip).any()


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped"),
    [
        (1.0, 1.02, True),
        (1.0, 1.005, False),
        (1.0, 0.9, False),
        (-1.0, 0.98, True),
        (-1.0, 0.995, False),
        (-1.0, 1.1, False),
        (0.0, 0.98, True),
        (0.0, 1.1, False),
    ],
)
def test_clipped_is_what_moved_too_far_the_right_way(advantage: float, ratio: float, clipped: bool) -> None:
    error_M, advantage_M = torch.tensor([0.7]), torch.tensor([advantage])
    assert clipped_samples(error_M, error_M + math.log(ratio), advantage_M, 0.01).tolist() == [clipped]


def test_huge_scores_stay_finite() -> None:
    groups = (torch.tensor([5.0, 5.0]), torch.tensor([0, 1]), torch.ones(2))
    error_M = torch.tensor([1e4, 0.0], requires_grad=True)
    preference = group_preference(error_M, torch.tensor([0.0, 1e4]), *groups, beta=5000.0)
    preference.objective.backward()
    assert preference.weight_G.tolist() == [1.0, 0.0]
    assert preference.objective.item() == 5e4
    assert error_M.grad is not None
    assert error_M.grad.tolist() == [5.0, 0.0]


def test_a_batch_without_samples_gives_zero() -> None:
    nothing = torch.zeros(0)
    preference = group_preference(nothing, nothing, nothing, torch.zeros(0, dtype=torch.int64), nothing, beta=1.0)
    assert preference.objective.item() == preference.surrogate.item() == 0.0
    assert preference.weight_G.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_velocity_errors_are_means_of_squares_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    velocity = torch.randn(3, 4, 5, 5, generator=generator).to(dtype)
    target = torch.randn(3, 4, 5, 5, generator=generator)
    error_M = velocity_errors(velocity, target)
    assert error_M.dtype == torch.float32
    exact = (target.double() - velocity.double()).square().mean((1, 2, 3))
    # Squares of differences carry three roundings, their sum a handful more.
    torch.testing.assert_close(error_M.double(), exact, rtol=16 * torch.finfo(torch.float32).eps, atol=0)


def test_velocity_errors_pass_gradcheck() -> None:
    generator = torch.Generator().manual_seed(8)
    velocity, target = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    assert gradcheck(lambda v: velocity_errors(v, target), velocity.requires_grad_())


def test_velocity_errors_read_strided_and_empty_batches() -> None:
    generator = torch.Generator().manual_seed(9)
    velocity, target = (torch.randn(6, 4, 4, 2, generator=generator) for _ in range(2))
    strided = velocity_errors(velocity.permute(0, 3, 1, 2)[::2], target.permute(0, 3, 1, 2)[::2])
    torch.testing.assert_close(strided, velocity_errors(velocity, target)[::2])
    assert velocity_errors(velocity[:0], target[:0]).shape == (0,)
    assert torch.equal(velocity_errors(velocity[:1], target[:1]), velocity_errors(velocity, target)[:1])
