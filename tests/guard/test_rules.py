"""Each rule at its threshold: what lies just behind it is a breach, what lies just before it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from dgpo_fast.guard.findings import Breach
from dgpo_fast.guard.held_out import Evaluated, below_base, overfit
from dgpo_fast.guard.rules import (
    RULES,
    Changes,
    History,
    Level,
    Reading,
    adapter_norm,
    clip,
    diversity,
    diversity_at_first,
    kl,
    reward,
    saturation,
    zero_std,
)
from dgpo_fast.guard_config import GuardConfig
from dgpo_fast.held_out import held_out_reward, untold_terms
from dgpo_fast.reward_config import RewardConfig, RewardsConfig

GUARD = GuardConfig(window=4)
HEALTHY = Reading(
    step=0, reward=1.0, reward_std=0.4, zero_std=0.1, clip=0.2, saturation=0.3, diversity=0.8, kl=0.1, adapter_norm=2.0
)
NUM_GROUPS = 100


def window(start: int, *values: float | None, key: str = "reward") -> list[Reading]:
    """Steps from `start` on, healthy but for the values of one signal."""
    return [HEALTHY._replace(step=start + place, **{key: value}) for place, value in enumerate(values)]


def history(
    first: Sequence[Reading], last: Sequence[Reading], *, before: Sequence[Reading] = (), best: Level | None = None,
    variance: float = 0.0, updates: int = 1, warmup: int = 0,
) -> History:  # fmt: skip
    return History(
        first=first, before=before, last=last, best=best, variance=variance, num_groups=NUM_GROUPS, updates=updates,
        warmup=warmup,
    )  # fmt: skip


def test_a_healthy_run_breaks_no_rule() -> None:
    same = [HEALTHY._replace(step=step) for step in range(1, 13)]
    past = history(same[:4], same[8:], before=same[4:8], best=Level.of(same[:4]))
    assert [name for name, rule in RULES.items() if rule(past, GUARD)] == []


@pytest.mark.parametrize(("fallen", "is_found"), [(0.2399, True), (0.2401, False)])
def test_diversity_below_30_percent_of_the_beginning(fallen: float, is_found: bool) -> None:
    """The median: one step of four may be an outlier."""
    past = history(window(1, *[0.8] * 4, key="diversity"), window(9, 9.0, fallen, fallen, fallen, key="diversity"))
    found = diversity(past, GUARD)
    assert (found is not None) == is_found
    if found is not None:
        assert found == Breach("the diversity within groups fell to 0.24, from 0.8 at the beginning", 9)


def test_the_beginning_of_diversity_is_the_first_step_where_it_fell_at_once() -> None:
    past = history(window(1, 0.8, 0.2, 0.2, 0.2, key="diversity"), window(2, *[0.2] * 4, key="diversity"))
    assert diversity(past, GUARD) is not None


@pytest.mark.parametrize(("rule", "key"), [(zero_std, "zero_std"), (clip, "clip")])
@pytest.mark.parametrize(("shares", "is_found"), [((1, 1, 1, 0.61), True), ((1, 1, 1, 0.59), False)])
def test_shares_of_90_percent(rule: object, key: str, shares: tuple[float, ...], is_found: bool) -> None:
    past = history(window(1, *[0.0] * 4, key=key), window(5, *shares, key=key))
    assert callable(rule)
    assert (rule(past, GUARD) is not None) == is_found


@pytest.mark.parametrize(("share", "rise", "is_found"), [(0.91, 1.99, True), (0.91, 2.01, False), (0.89, 0.0, False)])
def test_saturation_of_90_percent_while_the_reward_has_not_risen(share: float, rise: float, is_found: bool) -> None:
    """By two standard errors of a difference: a window of four has that of 0.2 / 2."""
    past = history(
        window(1, *[1.0] * 4),
        [reading._replace(saturation=share) for reading in window(5, *[1 + rise * math.sqrt(2) * 0.1] * 4)],
        variance=0.2**2,
    )
    assert (saturation(past, GUARD) is not None) == is_found


@pytest.mark.parametrize(("rule", "key"), [(kl, "kl"), (adapter_norm, "adapter_norm")])
@pytest.mark.parametrize(
    ("begin", "warmup", "growth", "is_found"),
    [(5, 0, 10.01, True), (5, 0, 9.99, False), (4, 0, 10.01, False), (8, 8, 10.01, False), (9, 8, 10.01, True)],
)
def test_ten_times_as_much_as_a_window_ago_but_for_the_beginning(
    rule: object, key: str, begin: int, warmup: int, growth: float, is_found: bool
) -> None:
    before = window(begin, *[0.5] * 4, key=key)
    last = window(begin + 4, 0.0, *[0.5 * growth] * 3, key=key)
    assert callable(rule)
    assert (rule(history(before, last, before=before, warmup=warmup), GUARD) is not None) == is_found


def test_weights_that_go_straight_ahead_are_no_explosion() -> None:
    """The norm grows with the step, the distance with its square: from the third window on by at most these factors."""
    for key, power, factor in (("adapter_norm", 1, 1.65), ("kl", 2, 2.71)):
        steps = [float(step**power) for step in range(1, 31)]
        first, before, last = (window(10 * place + 1, *steps[10 * place :][:10], key=key) for place in range(3))
        for growth, is_found in ((factor + 0.01, False), (factor - 0.01, True)):
            past = history(first, last, before=before)
            assert (RULES[key](past, GuardConfig(growth=growth)) is not None) == is_found


@pytest.mark.parametrize(("drop", "is_found"), [(0.2001, True), (0.1999, False)])
def test_the_reward_half_a_deviation_below_its_best(drop: float, is_found: bool) -> None:
    """Images differ by 0.4; the mean does not vary."""
    best = window(5, *[1.3] * 4)
    past = history(window(1, *[1.0] * 4), window(9, *[1.3 - drop] * 4), best=Level.of(best))
    found = reward(past, GUARD)
    assert (found is not None) == is_found
    if found is not None:
        assert found.what == "the reward fell to 1.1, from 1.3 in its best window, which ended with step 8"


@pytest.mark.parametrize(("updates", "errors", "is_found"), [(1, 6.01, True), (1, 5.99, False), (2, 6.01, False)])
def test_a_fall_has_to_exceed_the_noise(updates: int, errors: float, is_found: bool) -> None:
    """An iteration's reward varies by 0.2, a window's by 0.1, and by more where two steps share an iteration's."""
    last = window(9, *[1 - errors * math.sqrt(2) * 0.1] * 4)
    best = Level.of(window(5, *[1.0] * 4))
    past = history(window(1, *[-9.0] * 4), last, best=best, variance=0.2**2, updates=updates)
    assert (reward(past, GUARD) is not None) == is_found


def test_noise_is_half_the_mean_square_of_changes() -> None:
    changes = Changes()
    assert changes.variance == 0
    for before, after in ((1.0, 1.5), (1.5, None), (None, 1.0), (1.0, 0.9)):
        changes = changes.and_from(before, after)
    assert changes.variance == pytest.approx((0.25 + 0.01) / 4)


@pytest.mark.parametrize(
    ("variance", "drop", "is_found"),
    [(0.03**2, 0.2013, True), (0.03**2, 0.2012, False), (0.1**2, 0.3842, True), (0.1**2, 0.3841, False)],
)
def test_the_reward_below_the_first_step(variance: float, drop: float, is_found: bool) -> None:
    """What the base model drew, though all that followed is bad: its error is that of a step, or 0.4 / sqrt(100)."""
    low = window(2, *[1.0 - drop] * 4)
    past = history([*window(1, 1.0), *low[:3]], low, variance=variance)
    assert (reward(past, GUARD) is not None) == is_found


def test_a_threshold_of_null_is_never_reached() -> None:
    off = GuardConfig(
        window=4, diversity=None, zero_std=None, clip=None, saturation=None, growth=None, reward_drop=None
    )
    worst = HEALTHY._replace(
        reward=-9.0, zero_std=1.0, clip=1.0, saturation=1.0, diversity=0.0, kl=1e9, adapter_norm=1e9
    )
    past = history(
        [HEALTHY._replace(step=step) for step in range(1, 5)],
        [worst._replace(step=step) for step in range(9, 13)],
        before=[HEALTHY._replace(step=step) for step in range(5, 9)],
    )
    assert [name for name, rule in RULES.items() if rule(past, GUARD)] == list(RULES)
    assert [name for name, rule in RULES.items() if rule(past, off)] == []


@pytest.mark.parametrize("key", ["reward", "zero_std", "clip", "saturation", "diversity", "kl", "adapter_norm"])
def test_what_is_not_measured_is_not_judged(key: str) -> None:
    none = window(1, *[None] * 12, key=key)
    past = history(none[:4], none[8:], before=none[4:8])
    assert RULES[key](past, GUARD) is None


@pytest.mark.parametrize(("number", "is_judged"), [(2, True), (1, False)])
@pytest.mark.parametrize("key", ["zero_std", "clip", "diversity", "kl", "adapter_norm", "reward"])
def test_half_a_window_is_enough_to_judge_by(key: str, number: int, is_judged: bool) -> None:
    """Of four steps two."""
    bad = {"zero_std": 1.0, "clip": 1.0, "diversity": 0.1, "kl": 9.0, "adapter_norm": 99.0, "reward": -9.0}[key]
    last = window(9, *[bad] * number, *[None] * (4 - number), key=key)
    past = history(window(1, *[1.0] * 4), last, before=window(5, *[1.0] * 4))
    assert (RULES[key](past, GUARD) is not None) == is_judged


def test_an_error_is_of_the_steps_that_have_a_reward() -> None:
    past = history(window(1, *[1.0] * 4), window(5, 1.0, None, 1.0, None), variance=0.5)
    assert past.error2 == 0.5 / 2 and past.error2_of(past.first) == 0.5 / 4


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ((0.8, 0.4, 0.4), 0.8), ((0.3, 0.4, 0.6), 0.4), ((None, 0.4, 0.6), 0.5), ((math.nan, 0.4, 0.6), 0.5),
        ((0.8, None, None), None), ((), None),
    ],
)  # fmt: skip
def test_diversity_begins_at_the_first_step_or_the_first_window(
    first: tuple[float | None, ...], expected: float | None
) -> None:
    assert diversity_at_first(first) == expected


# Evaluations: images differ by 0.4, so that of 32 images the error of a difference is 0.1


def evaluated(step: int, tuned: float, training: float | None, *, base: float = 1.0) -> Evaluated:
    return Evaluated(step=step, base=base, tuned=tuned, training=training, num_images=32)


@pytest.mark.parametrize(("tuned", "is_found"), [(0.399, True), (0.401, False)])
def test_held_out_below_the_base(tuned: float, is_found: bool) -> None:
    evaluations = [evaluated(10, 1.1, 1.2), evaluated(20, 0.9, 1.2), evaluated(30, tuned, 1.2)]
    found = below_base(evaluations, 0.4, GUARD)
    assert (found is not None) == is_found
    if found is not None:
        assert found == Breach("the held-out reward fell to 0.399, below the base's 1", 11)


@pytest.mark.parametrize(
    ("held_out", "training", "is_found"),
    [
        ((1.8, 1.6, 1.199), (1.0, 1.1, 1.2), True),
        ((1.8, 1.6, 1.201), (1.0, 1.1, 1.2), False),
        ((1.8, 1.81, 0.9), (1.0, 1.1, 1.2), False),
        ((1.8, 0.9, 0.91), (1.0, 1.1, 1.2), False),
        ((1.8, 1.6, 0.9), (1.0, 1.1, 1.1), False),
        ((1.8, 1.6, 0.9), (1.1, 1.0, 1.2), False),
        ((1.8, 1.6, 0.9), (None, 1.0, 1.2), False),
    ],
)
def test_held_out_falls_twice_while_training_rises(
    held_out: tuple[float, ...], training: tuple[float | None, ...], is_found: bool
) -> None:
    evaluations = [
        evaluated(10 * place, tuned, reward)
        for place, (tuned, reward) in enumerate(zip(held_out, training, strict=True))
    ]
    assert (overfit(evaluations, 0.4, GUARD) is not None) == is_found
    assert overfit(evaluations[1:], 0.4, GUARD) is None


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([("shapes", "soft", 1.0), ("shapes", "strict", 0.5)], 0.8 + 0.25),
        ([("shapes", None, 2.0)], 1.6),
        ([("clip", None, 1.0), ("shapes", "strict", 1.0)], 0.3 + 0.5),
        ([("shapes", None, 1.0), ("clip", None, 1.0)], None),
        ([("other", "score", 1.0), ("shapes", "soft", 1.0)], 7.0 + 0.8),
        ([("shapes", "missing", 1.0)], None),
    ],
)
def test_the_held_out_reward_is_the_recipes(terms: list[tuple[str, str | None, float]], expected: float | None) -> None:
    """Metrics of one name from several rewards are told apart by the rewards' names."""
    rewards = RewardsConfig(
        terms=tuple(RewardConfig(name=name, metric=metric, weight=weight) for name, metric, weight in terms)
    )
    metrics = {"soft": 0.8, "strict": 0.5, "clip": 0.3, "other.score": 7.0}
    assert held_out_reward(metrics, rewards) == (None if expected is None else pytest.approx(expected))
    assert held_out_reward({name: math.nan for name in metrics}, rewards) is None
    assert bool(untold_terms(metrics, rewards)) == (expected is None)


@pytest.mark.parametrize(("std", "drop", "is_found"), [(0.1, 0.15, False), (0.8, 0.3, False), (0.8, 0.41, True)])
def test_a_fall_is_judged_by_the_larger_spread(std: float, drop: float, is_found: bool) -> None:
    """That of the beginning, 0.4, or of the best window."""
    best = Level.of([reading._replace(reward_std=std) for reading in window(5, *[1.3] * 4)])
    past = history(window(1, *[0.5] * 4), window(9, *[1.3 - drop] * 4), best=best)
    assert (reward(past, GUARD) is not None) == is_found


def test_a_rise_is_judged_by_the_errors_of_both_windows() -> None:
    """Of two readings in the first and four in the last: 2 sqrt(0.04 / 2 + 0.04 / 4) = 0.346, above a rise of 0.33."""
    first = window(1, 1.0, None, 1.0, None)
    last = [reading._replace(saturation=0.95) for reading in window(5, *[1.33] * 4)]
    assert saturation(history(first, last, variance=0.04), GUARD) is not None
