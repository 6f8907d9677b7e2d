"""The group-preference loss against its written equation, its gradient, and the published surrogate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
)

OnDevice = Callable[[Any], Any]
AssertExact = Callable[..., None]
Implementation = Callable[..., Callable[..., Any]]  # implementation(name, operator=OPERATOR), see conftest.py

OPERATOR = "group_preference"
CLIP = 0.01
SOFTPLUS_GAP = math.exp(-20)
"""torch's softplus takes s for softplus(s) where s > 20, and 1 for its slope: both are this close."""
ROUNDING = 1e-12
"""Of a few dozen float64 operations on numbers of order 1, generously."""
SMALLEST = 1e-300
"""Below it numbers are denormal, and sigmoid of -740 has no more than a digit or two."""


class Groups(NamedTuple):
    """Arguments of `group_preference`, and which samples its old errors clip."""

    error_M: Tensor
    reference_error_M: Tensor
    advantage_M: Tensor
    group_M: Tensor
    size_G: Tensor
    beta: float
    old_error_M: Tensor
    clipped_M: Tensor

    def named(self) -> dict[str, Any]:
        """The keyword arguments of both functions."""
        return {name: getattr(self, name) for name in ("advantage_M", "group_M", "size_G", "beta")}

    def preference(self, *, clip: bool = True, score_G: Tensor | None = None) -> GroupPreference:
        clipping = {"old_error_M": self.old_error_M, "clip": CLIP} if clip else {}
        return group_preference(self.error_M, self.reference_error_M, **self.named(), score_G=score_G, **clipping)

    def scores(self) -> Tensor:
        return group_scores(self.error_M, self.reference_error_M, **self.named())

    def gradient(self, *, clip: bool = True, score_G: Tensor | None = None) -> Tensor:
        """The gradient of the objective with respect to the errors."""
        error_M = self.error_M.clone().requires_grad_()
        objective = self._replace(error_M=error_M).preference(clip=clip, score_G=score_G).objective
        return torch.autograd.grad(objective, error_M)[0]

    def take(self, index: Tensor) -> Groups:
        """These samples alone, of the same groups."""
        per_sample = {name: getattr(self, name)[index] for name in self._fields if name.endswith("_M")}
        return self._replace(**per_sample)


def make_groups(sizes: list[int], *, beta: float, seed: int, clipped_share: float = 0.0) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    num = sum(sizes)

    def uniform() -> Tensor:
        return torch.rand(num, generator=generator, dtype=torch.float64)

    error_M, advantage_M = 2 * uniform(), torch.randn(num, generator=generator, dtype=torch.float64)
    reference_error_M, clipped_M = 2 * uniform(), uniform() < clipped_share
    # Clipped are those that moved by twice the range the right way; the others moved by half of it.
    moved_M = torch.where(clipped_M, 2.0, 0.5) * CLIP * torch.where(advantage_M > 0, 1.0, -1.0)
    return Groups(
        error_M=error_M,
        reference_error_M=reference_error_M,
        advantage_M=advantage_M,
        group_M=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        size_G=torch.tensor(sizes, dtype=torch.float64),
        beta=beta,
        old_error_M=error_M + torch.log1p(moved_M),
        clipped_M=clipped_M,
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


@given(groups=random_groups)
def test_surrogate_has_the_gradient_of_the_objective(groups: Groups) -> None:
    error_M = groups.error_M.clone().requires_grad_()
    preference = groups._replace(error_M=error_M).preference()
    gradient = torch.autograd.grad(preference.surrogate, error_M)[0]
    assert torch.equal(groups.gradient(), gradient)
    written = sum(
        weight / size * (groups.advantage_M * groups.error_M)[groups.group_M == g].sum()
        for g, (weight, size) in enumerate(zip(preference.weight_G, groups.size_G, strict=True))
    )
    torch.testing.assert_close(preference.surrogate.detach(), written, rtol=ROUNDING, atol=ROUNDING)
    assert not preference.weight_G.requires_grad


def test_a_policy_that_is_worse_on_good_samples_weighs_more_than_half() -> None:
    advantage_M = torch.tensor([1.0, -1.0])
    groups = {
        "advantage_M": advantage_M, "group_M": torch.zeros(2, dtype=torch.int64), "size_G": torch.tensor([2.0])
    }  # fmt: skip
    reference_error_M = torch.tensor([1.0, 1.0])
    worse_on_good = group_preference(torch.tensor([1.5, 1.0]), reference_error_M, **groups, beta=10.0)
    better_on_good = group_preference(torch.tensor([0.5, 1.0]), reference_error_M, **groups, beta=10.0)
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
    score_G = torch.stack([groups.take(index).scores() for index in pieces]).sum(0)
    gradient = torch.full_like(groups.error_M, torch.nan)
    for index in pieces:
        part = groups.take(index)
        gradient[index] = part.gradient(score_G=score_G)
        torch.testing.assert_close(
            part.preference(score_G=score_G).objective, groups.preference().objective, rtol=1e-9, atol=1e-9
        )
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
    groups = {"advantage_M": torch.full((2,), 5.0), "group_M": torch.tensor([0, 1]), "size_G": torch.ones(2)}
    error_M = torch.tensor([1e4, 0.0], requires_grad=True)
    preference = group_preference(error_M, torch.tensor([0.0, 1e4]), **groups, beta=5000.0)
    preference.objective.backward()
    assert preference.weight_G.tolist() == [1.0, 0.0]
    assert preference.objective.item() == 5e4
    assert error_M.grad is not None
    assert error_M.grad.tolist() == [5.0, 0.0]


# Every implementation, by the schema.


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    error_M: Tensor
    reference_error_M: Tensor
    advantage_M: Tensor
    group_M: Tensor
    size_G: Tensor
    score_G: Tensor | None
    old_error_M: Tensor | None
    beta: float
    clip: float


def arguments(
    sizes: list[int], dtype: torch.dtype = torch.float32, *, scored: bool = False, seed: int = 11
) -> Arguments:
    """Groups in no order, some of them clipped."""
    groups = make_groups(sizes, beta=20.0, seed=seed, clipped_share=0.4)
    groups = groups.take(torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(12)))
    scores = torch.linspace(-3, 3, len(sizes), dtype=dtype) + 0.01 * seed if scored else None
    numbers = (groups.error_M, groups.reference_error_M, groups.advantage_M)
    return Arguments(
        *(number.to(dtype) for number in numbers), groups.group_M, groups.size_G.to(dtype), scores,
        groups.old_error_M.to(dtype), groups.beta, CLIP,
    )  # fmt: skip


def plain(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Objective, surrogate and weights, as a user would write them."""
    terms_M = given.advantage_M * (given.error_M - given.reference_error_M)
    sums_G = torch.zeros_like(given.size_G).index_add(0, given.group_M, terms_M)
    score_G = given.beta * sums_G / given.size_G if given.score_G is None else given.score_G
    weight_G = torch.sigmoid(score_G)
    surrogate = ((weight_G / given.size_G)[given.group_M] * given.advantage_M * given.error_M).sum()
    return torch.nn.functional.softplus(score_G).sum() / given.beta, surrogate, weight_G


def in_float64(given: Arguments) -> Arguments:
    return Arguments(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))


@pytest.mark.parametrize("scored", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("sizes", [[1], [16], [3, 1, 130, 7]], ids=str)
def test_every_implementation_follows_the_equations(
    name: str,
    implementation: Implementation,
    sizes: list[int],
    scored: bool,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    """Over many groups, since a single number of plain PyTorch may happen to be exact."""
    cases = [arguments(sizes, scored=scored, seed=seed) for seed in range(24)]
    results, exact, of_torch = (
        [torch.stack(numbers) for numbers in zip(*(call(given)[:3] for given in cases), strict=True)]
        for call in (lambda g: implementation(name)(*g), lambda g: plain(in_float64(g)), plain)
    )
    for result, truth, of_user in zip(results, exact, of_torch, strict=True):
        assert_as_exact_as_torch(result, exact=truth, plain=of_user, implementation=name)


@pytest.mark.parametrize("sizes", [[1], [3, 1, 130, 7]], ids=str)
def test_every_implementation_in_float64(name: str, implementation: Implementation, sizes: list[int]) -> None:
    given = arguments(sizes, torch.float64)
    for result, expected in zip(implementation(name)(*given)[:3], plain(given), strict=True):
        torch.testing.assert_close(result, expected, rtol=ROUNDING, atol=ROUNDING)


def test_clipping_of_every_implementation(name: str, implementation: Implementation) -> None:
    given = arguments([16, 130])
    expected_M = clipped_samples(given.error_M, given.old_error_M, given.advantage_M, CLIP)
    assert 0 < expected_M.sum() < len(expected_M)
    assert torch.equal(implementation(name)(*given)[3], expected_M)
    assert not implementation(name)(*given._replace(old_error_M=None))[3].any()
    # Without an advantage a sample counts among the bad.
    neutral = given._replace(advantage_M=torch.zeros_like(given.advantage_M))
    expected_M = clipped_samples(neutral.error_M, neutral.old_error_M, neutral.advantage_M, CLIP)
    assert (neutral.old_error_M > neutral.error_M + CLIP).any()
    assert torch.equal(implementation(name)(*neutral)[3], expected_M)
    equal = given._replace(old_error_M=given.error_M, clip=1e-30)
    assert not implementation(name)(*equal)[3].any(), "the ratio is exactly 1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [[1], [3, 1, 130, 7], [24] * 3], ids=str)
def test_scores_and_backward_of_every_implementation(
    name: str,
    implementation: Implementation,
    sizes: list[int],
    dtype: torch.dtype,
    assert_as_exact_as_torch: AssertExact,
) -> None:
    def scores(given: Arguments) -> Tensor:
        terms_M = given.advantage_M * (given.error_M - given.reference_error_M)
        return given.beta * torch.zeros_like(given.size_G).index_add(0, given.group_M, terms_M) / given.size_G

    cases = [arguments(sizes, dtype, seed=seed) for seed in range(8)]
    result = torch.stack([implementation(name, "group_scores")(*given[:5], given.beta) for given in cases])
    exact = torch.stack([scores(in_float64(given)) for given in cases])
    if dtype == torch.float64:
        torch.testing.assert_close(result, exact, rtol=ROUNDING, atol=ROUNDING)
    else:
        of_torch = torch.stack([scores(given) for given in cases])
        assert_as_exact_as_torch(result, exact=exact, plain=of_torch, implementation=name)

    given = cases[0]
    grad, weight_G = torch.tensor(0.7, dtype=dtype), torch.linspace(0.1, 0.9, len(sizes), dtype=dtype)
    clipped_M = torch.arange(sum(sizes)) % 3 == 1

    def gradient(grad: Tensor, weight_G: Tensor, given: Arguments) -> Tensor:
        share_M = (weight_G / given.size_G)[given.group_M]
        return torch.where(clipped_M, 0.0, grad * share_M * given.advantage_M)

    result = implementation(name, "group_preference_backward")(
        grad, weight_G, given.advantage_M, given.group_M, given.size_G, clipped_M
    )
    exact = gradient(grad.double(), weight_G.double(), in_float64(given))
    assert_as_exact_as_torch(result, exact=exact, plain=gradient(grad, weight_G, given), implementation=name)


def test_a_group_does_not_see_the_others(name: str, implementation: Implementation) -> None:
    """To the bit: its score is what it is alone."""
    given = arguments([5, 9])
    mine = given.group_M == 0
    alone = [x[mine] for x in given[:4]]
    score_G = implementation(name, "group_scores")(*given[:5], given.beta)
    assert torch.equal(implementation(name, "group_scores")(*alone, given.size_G[:1], given.beta), score_G[:1])


def test_strides_do_not_change_a_bit(name: str, implementation: Implementation) -> None:
    given = arguments([3, 4], scored=True)
    apart = [x.repeat_interleave(2)[::2] if isinstance(x, Tensor) else x for x in given]
    for one, other in zip(implementation(name)(*apart), implementation(name)(*given), strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_samples_gives_zero(name: str, implementation: Implementation) -> None:
    nothing = torch.zeros(0)
    empty = (nothing, nothing, nothing, nothing.long(), nothing)
    objective, surrogate, weight_G, clipped_M = implementation(name)(*empty, None, nothing, 1.0, 0.1)
    assert objective.item() == surrogate.item() == 0.0
    assert weight_G.shape == clipped_M.shape == implementation(name, "group_scores")(*empty, 1.0).shape == (0,)
    backward = implementation(name, "group_preference_backward")
    assert backward(torch.tensor(1.0), nothing, nothing, nothing.long(), nothing, nothing.bool()).shape == (0,)


def test_every_number_is_written(name: str, implementation: Implementation, poisoned_memory: None) -> None:
    for result in implementation(name)(*arguments([3, 130])):
        assert result.isfinite().all()


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "errors of samples and sigmas": ("error_M", lambda a: a._replace(error_M=a.error_M[None])),
    "half-precision errors": ("error_M", lambda a: a._replace(error_M=a.error_M.half())),
    "a reference too few": ("reference_error_M", lambda a: a._replace(reference_error_M=a.reference_error_M[1:])),
    "advantages of another dtype": ("advantage_M", lambda a: a._replace(advantage_M=a.advantage_M.double())),
    "int32 groups": ("group_M", lambda a: a._replace(group_M=a.group_M.int())),
    "group after the last": ("group_M", lambda a: a._replace(group_M=a.group_M + 1)),
    "negative group": ("group_M", lambda a: a._replace(group_M=a.group_M - 1)),
    "integer sizes": ("size_G", lambda a: a._replace(size_G=a.size_G.long())),
    "sizes on another device": ("size_G", lambda a: a._replace(size_G=a.size_G.to("meta"))),
    "a score too many": ("score_G", lambda a: a._replace(score_G=torch.zeros(3))),
    "no strength": ("beta", lambda a: a._replace(beta=0.0)),
    "a negative range": ("clip", lambda a: a._replace(clip=-0.1)),
    "an old error too few": ("old_error_M", lambda a: a._replace(old_error_M=a.error_M[1:])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_argument_is_named(name: str, implementation: Implementation, mistake: str, device: str) -> None:
    culprit, spoil = MISTAKES[mistake]
    spoiled = spoil(arguments([3, 4]))
    if device == "cuda" and mistake in ("group after the last", "negative group"):
        if name == "reference":
            pytest.skip("torch's own error, after which the device is lost")
        objective, surrogate, _, _ = implementation(name)(*spoiled)
        assert objective.isnan() and surrogate.isnan(), "to raise would wait for the device"
        return
    with pytest.raises(ValueError, match=f"^{culprit}: "):
        implementation(name)(*spoiled)


def test_clipping_needs_the_old_errors() -> None:
    groups = make_groups([3], beta=1.0, seed=1)
    with pytest.raises(ValueError, match=r"^old_error_M: expected the old policy's errors"):
        group_preference(groups.error_M, groups.reference_error_M, **groups.named(), clip=0.1)


@pytest.mark.parametrize("culprit", ["reference_error_M", "advantage_M", "size_G", "old_error_M", "score_G"])
def test_gradients_flow_to_the_errors_only(culprit: str) -> None:
    groups = make_groups([3], beta=1.0, seed=1)
    score_G = groups.scores()
    (score_G if culprit == "score_G" else getattr(groups, culprit)).requires_grad_()
    with pytest.raises(ValueError, match=f"^{culprit}: requires a gradient"):
        groups.preference(score_G=score_G)


@pytest.mark.parametrize("scored", [False, True], ids=["computed", "given"])
def test_opcheck(scored: bool, on_device: OnDevice) -> None:
    given = on_device(arguments([3, 4], scored=scored))
    torch.library.opcheck(torch.ops.dgpo_fast.group_preference.default, given)
    learning = given._replace(error_M=given.error_M.clone().requires_grad_())
    torch.library.opcheck(torch.ops.dgpo_fast.group_preference.default, learning)
    torch.library.opcheck(torch.ops.dgpo_fast.group_scores.default, (*given[:5], 1.0))
    backward = (given.error_M.new_tensor(1.0), given.size_G, *given[2:5], given.error_M > 1)
    torch.library.opcheck(torch.ops.dgpo_fast.group_preference_backward.default, backward)


def test_compiles_into_one_graph(on_device: OnDevice) -> None:
    given = on_device(arguments([3, 4]))

    def loss(error_M: Tensor, reference_error_M: Tensor) -> Tensor:
        groups = {"advantage_M": given.advantage_M, "group_M": given.group_M, "size_G": given.size_G}
        preference = group_preference(error_M * 2, reference_error_M, **groups, beta=2.0)
        return preference.objective + preference.surrogate

    inputs = (given.error_M.clone().requires_grad_(), given.reference_error_M)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(*inputs), inputs[:1])
    assert torch.equal(torch.autograd.grad(compiled(*inputs), inputs[:1])[0], expected)
