"""Intervals and tests of scores: against scipy and closed forms, and how often intervals hold what they should."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from dgpo_fast.statistics import Estimate, Floats, clustered_mean, compare, prompt_means, win_rate

SCORES = arrays(
    np.float64,
    st.tuples(st.integers(2, 12), st.integers(1, 5)),
    elements=st.floats(-10, 10, width=32) | st.just(math.nan),
)


def scores(num_prompts: int, num_images: int, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Of a base and a tuned model: most of either is the prompt, and the change differs by prompt too."""
    rng = np.random.default_rng(seed)
    prompt, change = rng.normal(size=(num_prompts, 1)), rng.normal(0.1, 0.3, (num_prompts, 1))
    noise = 0.2 * rng.normal(size=(2, num_prompts, num_images))
    return prompt + noise[0], prompt + change + noise[1]


@pytest.mark.parametrize(("num_prompts", "num_images"), [(2, 1), (7, 4), (64, 4), (200, 1)])
def test_equally_many_images_give_the_paired_t_test_of_prompt_means(num_prompts: int, num_images: int) -> None:
    base, tuned = scores(num_prompts, num_images)
    found = compare(base, tuned)
    expected = stats.ttest_rel(tuned.mean(1), base.mean(1))
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.change.low, found.change.high) == pytest.approx(tuple(interval), rel=1e-9)
    for model, values in ((found.base, base), (found.tuned, tuned)):
        alone = stats.ttest_1samp(values.mean(1), 0).confidence_interval(0.95)
        assert model.mean == pytest.approx(values.mean(), rel=1e-12)
        assert (model.low, model.high) == pytest.approx(tuple(alone), rel=1e-9)
    assert (found.num_prompts, found.num_pairs, found.num_failed) == (num_prompts, num_prompts * num_images, 0)


def test_unequally_many_images_have_the_variance_of_a_regression_on_a_constant() -> None:
    """The sandwich of Liang and Zeger, written out: bread 1 / N, meat the squared sums of residuals of each prompt."""
    values, _ = scores(9, 4)
    values[0, 1:], values[3, 2], values[5] = np.nan, np.inf, -np.inf
    kept = [row[np.isfinite(row)] for row in values if np.isfinite(row).any()]
    every = np.concatenate(kept)
    meat = sum((row - every.mean()).sum() ** 2 for row in kept)
    error = math.sqrt(len(kept) / (len(kept) - 1) * meat) / len(every)
    found, half = clustered_mean(values), stats.t.ppf(0.975, len(kept) - 1) * error
    assert (len(kept), len(every)) == (8, 28)
    assert found.mean == pytest.approx(every.mean(), rel=1e-12)
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((half, half), rel=1e-9)


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (1, 9), (7, 12), (64, 64)])
def test_a_win_rate_has_wilsons_interval(wins: int, count: int) -> None:
    found = win_rate(np.array([0.5] * wins + [-1e-9] * (count - wins)))
    interval = stats.binomtest(wins, count).proportion_ci(method="wilson")
    assert found.mean == wins / count
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert found.low < found.high


def test_ties_count_half_and_missing_prompts_not_at_all() -> None:
    assert win_rate(np.array([1.0, 0.0, 0.0, -2.0, np.nan])).mean == 0.5
    assert win_rate(np.array([1.0, 0.0])).mean == 0.75
    assert math.isnan(win_rate(np.array([np.nan])).mean)


def test_a_pair_without_a_score_is_left_out_of_both() -> None:
    base, tuned = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 5.0]]), np.array([[2.0, np.inf], [5.0, 9.0], [4.0, 4.0]])
    found = compare(base, tuned)
    assert (found.num_prompts, found.num_pairs, found.num_failed) == (3, 4, 2)
    assert (found.base.mean, found.tuned.mean, found.change.mean) == (14 / 4, 15 / 4, 1 / 4)
    assert found.win_rate.mean == 2 / 3
    np.testing.assert_array_equal(prompt_means(tuned - base), [1.0, 2.0, -1.0])


def test_what_cannot_be_known_is_not_a_number() -> None:
    alone = compare(np.array([[0.25, 0.75]]), np.array([[0.5, 1.0]]))
    assert (alone.base.mean, alone.change.mean, alone.win_rate.mean) == (0.5, 0.25, 1.0)
    assert all(map(math.isnan, (alone.change.low, alone.change.high, alone.p)))
    nothing = compare(np.full((3, 2), np.nan), np.ones((3, 2)))
    assert all(map(math.isnan, (nothing.base.mean, nothing.tuned.mean, nothing.change.mean, nothing.win_rate.low)))
    assert (nothing.num_prompts, nothing.num_pairs, nothing.num_failed) == (0, 0, 6)


def test_models_that_score_the_same_do_not_differ() -> None:
    values, _ = scores(5, 3)
    found = compare(values, values)
    assert found.change == Estimate(mean=0.0, low=0.0, high=0.0)
    assert (found.p, found.win_rate.mean) == (1.0, 0.5)
    assert compare(np.zeros((5, 3)), np.ones((5, 3))).p == 0, "where all change by the same, nothing is left to chance"


@given(SCORES, st.randoms(use_true_random=False))
def test_neither_order_of_prompts_nor_of_images_matters(values: Floats, random: Random) -> None:
    rows, columns = ([*range(size)] for size in values.shape)
    random.shuffle(rows)
    random.shuffle(columns)
    before, after = clustered_mean(values), clustered_mean(values[rows][:, columns])
    for name in ("mean", "low", "high"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-9, abs=1e-9, nan_ok=True)


@given(SCORES)
def test_exchanging_the_models_turns_the_comparison_round(values: Floats) -> None:
    there, back = compare(values, values[::-1]), compare(values[::-1], values)
    assert back.change.mean == pytest.approx(-there.change.mean, abs=1e-12, nan_ok=True)
    assert back.change.low == pytest.approx(-there.change.high, abs=1e-9, nan_ok=True)
    assert back.win_rate.mean == pytest.approx(1 - there.win_rate.mean, abs=1e-12, nan_ok=True)
    assert (back.num_pairs, back.num_failed) == (there.num_pairs, there.num_failed)


@pytest.mark.parametrize("num_prompts", [8, 40])
def test_intervals_hold_the_true_change_as_often_as_they_say(num_prompts: int) -> None:
    """And those that take images for independent do not, which is why prompts are the unit."""
    repeats = 2000
    held = held_by_images = 0
    for seed in range(repeats):
        base, tuned = scores(num_prompts, 4, seed=seed)
        change = compare(base, tuned).change
        held += change.low <= 0.1 <= change.high
        low, high = stats.norm.interval(0.95, (tuned - base).mean(), (tuned - base).std(ddof=1) / math.sqrt(base.size))
        held_by_images += low <= 0.1 <= high
    # Four standard deviations of a binomial share of 0.95.
    assert held / repeats == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repeats))
    assert held_by_images / repeats < 0.85


def test_a_change_of_none_is_seldom_called_one() -> None:
    repeats = 2000
    ps = []
    for seed in range(repeats):
        base, tuned = scores(20, 4, seed=seed)
        ps.append(compare(base, tuned - 0.1).p)
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=4 * math.sqrt(0.95 * 0.05 / repeats))
