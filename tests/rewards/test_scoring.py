"""Scores: weights, choice of metric, and what happens to images that a reward fails on."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.reward_config import RewardConfig, RewardsConfig, RunningConfig
from dgpo_fast.rewards import Scorer, Scores, base, calling
from dgpo_fast.rewards.scoring import describe_retries
from dgpo_fast.rewards.shapes import ShapesReward
from dgpo_fast.shapes.captions import parse_caption
from dgpo_fast.shapes.render import render

Score = Callable[..., Scores]
PROMPTS = ["one", "two", "three"]
IMAGES = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 4, 4)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits before the next attempt."""
    monkeypatch.setattr(calling, "BACKOFF_S", 0.0)


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Score:
    """score(reward, ...) scores IMAGES with functions, named a, b, ... in order; `terms` override their settings."""

    def run(
        *rewards: Callable[[Tensor, Sequence[str]], Any],
        terms: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> Scores:
        named = dict(zip("abc", rewards, strict=False))
        monkeypatch.setattr(base, "_FACTORIES", {name: lambda reward=reward: reward for name, reward in named.items()})
        each = terms or [{} for _ in named]
        configs = tuple(RewardConfig(name=name, **term) for name, term in zip(named, each, strict=True))
        return Scorer(RewardsConfig(terms=configs, **settings))(IMAGES, PROMPTS)

    return run


def constant(*values: float) -> Callable[[Tensor, Sequence[str]], list[float]]:
    """A reward that gives these to IMAGES."""
    return lambda images_BCHW, prompts: list(values)


def test_scores_carry_no_gradient(score: Score) -> None:
    """Not even those of a reward that returns what its own model computed."""
    weight = torch.ones(3, requires_grad=True)
    scores = score(lambda images_BCHW, prompts: {"score": 2 * weight, "weight": weight})
    assert scores.reward_B.tolist() == [2, 2, 2]
    assert not scores.reward_B.requires_grad
    assert not any(values.requires_grad for values in scores.metrics.values())


def by_prompt(values: Mapping[str, float | Exception]) -> Callable[[Tensor, Sequence[str]], list[float]]:
    """A reward that gives each prompt its value, or raises it."""

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        found = [values[prompt] for prompt in prompts]
        for value in found:
            if isinstance(value, Exception):
                raise value
        return [float(value) for value in found if not isinstance(value, Exception)]

    return reward


def test_one_reward(score: Score) -> None:
    scores = score(lambda images, prompts: images.mean((1, 2, 3)))
    assert scores.reward_B.tolist() == [0.0, 0.5, 1.0]
    assert scores.reward_B.dtype == torch.float32
    assert {name: values.tolist() for name, values in scores.metrics.items()} == {"a": [0.0, 0.5, 1.0]}


@pytest.mark.parametrize(
    "output",
    [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1.0, 2.0, 3.0]), torch.tensor([1, 2, 3], dtype=torch.bfloat16)],
    ids=["integers", "tuple", "numpy", "bfloat16"],
)
def test_scores_may_come_as_any_sequence(output: Any, score: Score) -> None:
    assert score(lambda images, prompts: output).reward_B.tolist() == [1.0, 2.0, 3.0]


def test_weighted_sum(score: Score) -> None:
    scores = score(constant(1, 2, 3), constant(1, 0, 1), terms=[{"weight": 0.5}, {"weight": -2.0}])
    assert scores.reward_B.tolist() == [-1.5, 1.0, -0.5]
    assert list(scores.metrics) == ["a", "b"]


def test_the_first_metric_counts_unless_another_is_chosen(score: Score) -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
        return {"soft": [0.1, 0.2, 0.3], "strict": [0, 0, 1]}

    assert score(reward).reward_B.tolist() == pytest.approx([0.1, 0.2, 0.3], rel=2**-24)
    assert score(reward, terms=[{"metric": "strict"}]).reward_B.tolist() == [0, 0, 1]
    both = score(reward, reward, terms=[{"metric": "soft"}, {"metric": "strict"}])
    assert list(both.metrics) == ["soft", "strict", "b.soft", "b.strict"]


def test_the_first_metric_stays_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the reward gives them in later: it would change what is trained on."""
    batches = iter([{"good": [1, 2, 3], "bad": [9, 9, 9]}, {"bad": [9, 9, 9], "good": [4, 5, 6]}])
    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: lambda images, prompts: next(batches)})
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),)))
    assert scorer(IMAGES, PROMPTS).reward_B.tolist() == [1, 2, 3]
    scores = scorer(IMAGES, PROMPTS)
    assert scores.reward_B.tolist() == [4, 5, 6]
    assert list(scores.metrics) == ["good", "bad"]


def test_a_closed_scorer_scores_no_more() -> None:
    with Scorer(RewardsConfig(terms=(RewardConfig(name="shapes"),))) as scorer:
        pass
    for use in (scorer.resume, lambda: scorer(IMAGES, PROMPTS)):
        with pytest.raises(RuntimeError, match="this Scorer is closed"):
            use()
    assert scorer.stop.is_set()


def test_terms_of_one_reward_score_the_images_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def reward(images: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
        calls.append(len(prompts))
        return {"soft": [0.5, 0.25, 1], "strict": [0, 0, 1]}

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    terms = (RewardConfig(name="a", metric="soft"), RewardConfig(name="a", metric="strict", weight=2.0))
    scores = Scorer(RewardsConfig(terms=terms))(IMAGES, PROMPTS)
    assert calls == [3]
    assert scores.reward_B.tolist() == [0.5, 0.25, 3.0]
    assert list(scores.metrics) == ["soft", "strict"]


def test_batches_are_weighed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: lambda images, prompts: images.mean((1, 2, 3))})
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a", weight=3.0),)))
    batches = [scorer.measure(IMAGES[:2], PROMPTS[:2]), scorer.measure(IMAGES[2:], PROMPTS[2:])]
    assert scorer.combine(batches).reward_B.tolist() == scorer(IMAGES, PROMPTS).reward_B.tolist() == [0, 1.5, 3]


def test_a_reward_that_wants_to_exit_has_failed(score: Score) -> None:
    """As a library may that it calls; the run would end without a word."""
    with pytest.raises(UserError, match="'a' failed for 3 of 3 images, last: SystemExit: 3"):
        score(lambda images, prompts: sys.exit(3))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_metrics_that_differ_between_batches(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could be of no use: which image lacks which would decide what is averaged."""

    def reward(images: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
        return {name: [0.0] * len(prompts) for name in ("soft", *("strict" for _ in prompts[1:]))}

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),), max_failed_share=share))
    batches = [scorer.measure(IMAGES[:2], PROMPTS[:2]), scorer.measure(IMAGES[2:], PROMPTS[2:])]
    with pytest.raises(UserError, match="'a' returned metrics soft, strict for some images and soft for others"):
        scorer.combine(batches)


def test_a_metric_that_is_not_there(score: Score) -> None:
    with pytest.raises(UserError, match="'a' has no metric 'softt'; did you mean 'soft'"):
        score(lambda images, prompts: {"soft": [0, 0, 0]}, terms=[{"metric": "softt"}])


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("output", [[1.0, 2.0], [1.0] * 4, [[1.0]] * 3, 1.0, []])
def test_the_wrong_number_of_scores_is_always_an_error(output: Any, share: float, score: Score) -> None:
    """And at once: it would be wrong the next time, too."""
    calls = []
    with pytest.raises(UserError, match=r"'a' returned \[.*\] scores \(a\) for 3 images; expected one for each"):
        score(lambda images, prompts: (calls.append(prompts), output)[1], max_failed_share=share)
    assert len(calls) == 1


def test_no_metric_at_all_is_an_error(score: Score) -> None:
    with pytest.raises(UserError, match="'a' returned no scores"):
        score(lambda images, prompts: {})


# Failures


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite(value: float, score: Score) -> None:
    reward = by_prompt({"one": 1, "two": value, "three": 3})
    with pytest.raises(
        UserError, match=rf"'a' failed for 1 of 3 images, last: returned {value}; 33\.3% of .*share=0\.1"
    ):
        score(reward)
    scores = score(reward, max_failed_share=0.4)
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.reward_B[[0, 2]].tolist() == [1, 3]
    assert scores.failed == {"a": (1, f"returned {value}")}


def test_a_reward_that_raises(score: Score) -> None:
    reward = by_prompt({"one": 1, "two": RuntimeError("no face\n found"), "three": 3})
    with pytest.raises(UserError, match="'a' failed for 1 of 3 images, last: RuntimeError: no face found; 33"):
        score(reward)
    scores = score(reward, max_failed_share=0.4)
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.reward_B[[0, 2]].tolist() == [1, 3]


@pytest.mark.parametrize(("failed", "share"), [(1, 1 / 3), (2, 0.67), (2, 0.999)])
def test_a_share_may_fail(failed: int, share: float, score: Score) -> None:
    broken = dict.fromkeys(PROMPTS[:failed], RuntimeError("down"))
    reward = by_prompt({**dict.fromkeys(PROMPTS, 1), **broken})
    assert score(reward, max_failed_share=share).reward_B.isnan().sum() == failed
    with pytest.raises(UserError, match=rf"more than rewards\.max_failed_share={failed / 3 - 0.01:g}"):
        score(reward, max_failed_share=failed / 3 - 0.01)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_reward_that_always_raises(share: float, score: Score) -> None:
    with pytest.raises(UserError, match="'a' failed for 3 of 3 images, last: RuntimeError: down"):
        score(by_prompt(dict.fromkeys(PROMPTS, RuntimeError("down"))), max_failed_share=share)


def test_what_is_asked_again(score: Score) -> None:
    """The batch as often as the recipe says, then each image alone; of what scored, nothing."""
    calls: list[tuple[str, ...]] = []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append(tuple(prompts))
        if "two" in prompts:
            raise ConnectionError("down")
        return [float("nan") if prompt == "three" and calls.count(("three",)) < 2 else 1.0 for prompt in prompts]

    scores = score(reward, retries=2, max_failed_share=0.5)
    assert calls == [tuple(PROMPTS)] * 3 + [("one",), ("two",), ("three",), ("three",)]
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.failed["a"].num_images == 1


def test_nothing_is_asked_again_without_retries(score: Score) -> None:
    calls = []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append(prompts)
        return [1.0, float("nan"), 1.0]

    assert score(reward, retries=0, max_failed_share=0.5).reward_B.isnan().tolist() == [False, True, False]
    assert len(calls) == 1


def test_all_retries_share_the_time_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward of this process is not asked again where it would not answer in time: nothing could stop it."""
    calls, overdue = [], []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append(prompts)
        time.sleep(0.1)
        overdue.append(scorer.places["a"].is_overdue)  # type: ignore[attr-defined]
        raise RuntimeError("down")

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),), retries=50, timeout_s=1.0))
    assert scorer.measure(IMAGES, PROMPTS).failed == {"a": (3, "RuntimeError: down")}
    assert 1 < len(calls) < 10
    assert not any(overdue[:-1]), "the last may have met a busy machine"


class Away:
    """A place of a reward that hangs as long as it may, unless it `answers`."""

    is_elsewhere = True

    def __init__(self) -> None:
        self.given_s: list[float] = []
        self.answers = False

    def ask(self, images_BCHW: Tensor, prompts: Sequence[str], patience: calling.Patience) -> list[calling.Answer]:
        self.given_s.append(patience.left)
        if self.answers:
            return [calling.Answer(len(prompts), [{"score": 1.0}] * len(prompts))]
        patience.sleep(patience.left)
        return [calling.Answer(len(prompts), None, calling.Failure("no answer", is_hang=True))]

    def close(self) -> None:
        pass


def test_a_reward_elsewhere_has_an_equal_share_each_time() -> None:
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="shapes"),), retries=2, timeout_s=1.5))
    away = scorer.places["shapes"] = Away()
    assert scorer.measure(IMAGES, PROMPTS).failed == {"shapes": (3, "no answer")}
    assert len(away.given_s) == 3 and all(0 < given <= 0.5 for given in away.given_s)


def test_a_reward_that_hung_is_waited_for_less_until_it_answers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And asked once for a batch. Who watches is told, once for as long as it hangs."""
    monkeypatch.setattr(calling, "LATE_S", 0.1)
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="shapes"),), retries=1, timeout_s=0.8))
    away = scorer.places["shapes"] = Away()

    def given_s(*, answers: bool) -> list[float]:
        away.answers, away.given_s = answers, []
        assert scorer.measure(IMAGES, PROMPTS).failed == ({} if answers else {"shapes": (3, "no answer")})
        return away.given_s

    for hangs in (given_s(answers=False), given_s(answers=False)):
        assert len(hangs) == 2 and all(0.3 < given <= 0.4 for given in hangs), "it may only begin slowly"
    assert given_s(answers=True)[0] > 0.3
    first, again = given_s(answers=False)
    assert 0.3 < first <= 0.4 and 0.3 < again <= 0.4
    for _ in range(2):
        (once,) = given_s(answers=False)
        assert once <= 0.1
    (back,) = given_s(answers=True)
    assert back <= 0.1 and given_s(answers=True)[0] > 0.3
    said = "rewards: 'shapes' has not answered for 0 s; given up after 0 s more\n"
    assert capfd.readouterr().err == 2 * said


def test_an_answer_is_late_after_thrice_the_longest_so_far() -> None:
    pace = calling.Pace()
    assert pace.late_s == 60
    answer, hang = calling.Answer(1, [{"score": 1.0}]), calling.Answer(1, None, calling.Failure("no", is_hang=True))
    pace.answered([answer], 50.0)
    assert (pace.late_s, pace.has_hung) == (150.0, False)
    pace.answered([answer, hang], 300.0)
    assert (pace.late_s, pace.has_hung) == (150.0, False)
    pace.answered([hang, hang], 300.0)
    assert (pace.late_s, pace.has_hung) == (150.0, True)


def test_what_scores_only_when_it_is_asked_again_is_told(score: Score) -> None:
    """With what helps where it was too much at once."""
    calls: list[int] = []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [float("nan")] if len(calls) < 4 else [1.0]  # the first of them, which is asked for once more

    scores = score(reward, max_failed_share=0.5)
    assert scores.failed == {} and scores.reward_B.isfinite().all()
    assert scores.retried == {"a": (3, "OutOfMemoryError: CUDA out of memory")}
    assert describe_retries(scores.retried) == (
        "rewards were asked again, which takes longer: 'a' for 3 images, OutOfMemoryError: CUDA out of memory "
        "(rewards.running.a.images_per_call=N gives it fewer images at once)"
    )
    assert score(constant(1, 2, 3)).retried == {}


def test_monitors_are_measured_beside_and_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names begin with the reward's, unless they are the reward's."""
    failing: list[str] = []

    def monitor(name: str) -> Callable[[Tensor, Sequence[str]], Any]:
        def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
            if name in failing:
                raise RuntimeError("gone")
            return {name: [1.0] * 3, "strict": [0.0] * 3}

        return reward

    made = {"a": lambda: constant(1, 2, 3), "b": lambda: monitor("b"), "c": lambda: monitor("c")}
    monkeypatch.setattr(base, "_FACTORIES", made)
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),), monitors=("b", "c"), retries=0))
    assert list(scorer(IMAGES, PROMPTS).metrics) == ["a"]
    beside = scorer.with_monitors
    assert list(beside(IMAGES, PROMPTS).metrics) == ["a", "b", "b.strict", "c", "c.strict"]
    failing.append("c")
    scores = beside(IMAGES, PROMPTS)
    assert scores.reward_B.tolist() == [1, 2, 3] and scores.metrics["c"].isnan().all()
    assert scores.failed == {"c": (3, "RuntimeError: gone")}
    assert beside.measure(IMAGES, PROMPTS).num_failed == 0
    scorer.close()
    assert list(scorer.places) == ["a", "b", "c"]


@pytest.mark.parametrize("mistake", [[1.0], {"other": [1.0] * 3}], ids=["too few", "another metric"])
def test_a_mistake_in_a_monitor_is_a_failure(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a term it ends the run. A metric has the name of the term's, which stays the term's."""
    answers = iter([{"b": [1.0] * 3, "a": [5.0] * 3}, mistake])
    monitor = lambda images_BCHW, prompts: next(answers)  # noqa: E731
    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: constant(1, 2, 3), "b": lambda: monitor})
    config = RewardsConfig(terms=(RewardConfig(name="a"),), monitors=("b",), retries=0)
    beside = Scorer(config).with_monitors
    first = beside(IMAGES, PROMPTS)
    assert first.metrics.keys() == {"a", "b", "b.a"} and first.metrics["a"].tolist() == [1, 2, 3]
    scores = beside(IMAGES, PROMPTS)
    assert scores.reward_B.tolist() == [1, 2, 3] and scores.metrics["b"].isnan().all()
    assert scores.failed["b"].num_images == 3 and "returned" in scores.failed["b"].reason and scores.retried == {}


def test_starting_a_process_does_not_count_unless_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(calling, "time", SimpleNamespace(monotonic=lambda: now[0]))
    whole = calling.Patience(10.0, threading.Event(), start_s=100.0)
    part = whole.part(4.0)
    assert part.all_left_to_start.left == 110
    with part.starting():
        now[0] += 60
    assert (part.left, whole.left) == (4, 10)
    with part.starting():
        now[0] += 43
    assert (part.left, whole.left) == (1, 7), "40 were left of 100"
    assert whole.part(9.0).left == 7


def test_a_reward_that_raises_for_a_whole_batch_once_it_has_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is down for a moment: a batch without scores, under the names that it has given before."""
    answers = iter([{"good": [1, 2, 3], "bad": [0, 0, 0]}])

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionError("down") from None

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),)))
    assert scorer(IMAGES, PROMPTS).reward_B.tolist() == [1, 2, 3]
    scores = scorer.combine([scorer.measure(IMAGES, PROMPTS)])
    assert scores.reward_B.isnan().all()
    assert {name: values.isnan().all().item() for name, values in scores.metrics.items()} == {"good": True, "bad": True}


def test_one_failure_fails_the_sum(score: Score) -> None:
    failing = by_prompt({"one": 1, "two": float("nan"), "three": 1})
    scores = score(by_prompt({"one": 1, "two": 2, "three": 3}), failing, max_failed_share=0.5)
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.metrics["a"].tolist() == [1, 2, 3]


def test_images_that_several_rewards_fail_for_count_once(score: Score) -> None:
    first = by_prompt({"one": 1, "two": RuntimeError("dark"), "three": 3})
    second = by_prompt({"one": 1, "two": float("nan"), "three": 1})
    failed = score(first, second, max_failed_share=0.34).failed
    assert failed == {"a": (1, "RuntimeError: dark"), "b": (1, "returned nan")}


def test_images_are_given_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append(tuple(prompts))
        if "three" in prompts and len(calls) == 2:
            raise RuntimeError("out of memory")
        return images_BCHW.mean((1, 2, 3)).tolist()

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    running = {"a": RunningConfig(images_per_call=2)}
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),), running=running))
    assert scorer(IMAGES, PROMPTS).reward_B.tolist() == [0.0, 0.5, 1.0]
    assert calls == [("one", "two"), ("three",), ("three",)], "only the piece that failed again"


def test_images_are_moved_to_the_rewards_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        devices.append(images_BCHW.device.type)
        return [0.0] * len(prompts)

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    terms = (RewardConfig(name="a"),)
    Scorer(RewardsConfig(terms=terms, running={"a": RunningConfig(device="cpu")}), device=torch.device("meta"))(
        IMAGES, PROMPTS
    )
    Scorer(RewardsConfig(terms=terms), device=torch.device("meta"))(IMAGES, PROMPTS)
    assert devices == ["cpu", "meta"]


def test_the_backoff_grows_and_disturbs_no_random_numbers() -> None:
    state = random.getstate(), torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calling, "BACKOFF_S", 1.0)
        waits = [[calling.backoff(attempt) for _ in range(20)] for attempt in range(8)]
    for attempt, found in enumerate(waits):
        longest = 2 ** min(attempt, 6)
        assert longest / 2 <= min(found) < max(found) <= longest * 1.5
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_failed_sample_leaves_the_rest_as_they_would_be_without_it(std: Literal["group", "global"]) -> None:
    """Group 1 of two has a failure: its other advantages are those of a group of three, and group 0 has its own."""
    rule: dict[str, Any] = {"std": std, "epsilon": 1e-4, "clamp": 5.0}
    reward_B = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.3, float("nan"), 0.8, 0.6])
    found = group_advantages(reward_B, reward_B.isfinite(), group_size=4, **rule).advantage_B
    rest = [reward_B[:4].double(), reward_B[[4, 6, 7]].double()]
    deviation = [torch.cat(rest).std(correction=0) if std == "global" else group.std(correction=0) for group in rest]
    expected = [(group - group.mean()) / (s + 1e-4) for group, s in zip(rest, deviation, strict=True)]
    assert found[5] == 0
    # A few float32 roundings of numbers near 1.
    torch.testing.assert_close(found[:4].double(), expected[0], rtol=0, atol=8 * 2**-23)
    torch.testing.assert_close(found[[4, 6, 7]].double(), expected[1], rtol=0, atol=8 * 2**-23)


# The shapes world


def test_the_shapes_reward_looks_at_the_image() -> None:
    captions = [parse_caption("a red circle left of a blue square"), parse_caption("two green triangles")]
    rng = np.random.default_rng(0)
    images = torch.stack([torch.from_numpy(render(caption, rng)) for caption in captions])
    right = ShapesReward()(images, [str(caption) for caption in captions])
    wrong = ShapesReward()(images.flip(0), [str(caption) for caption in captions])
    assert list(right) == ["soft", "strict"]
    assert right["strict"] == [1.0, 1.0]
    assert wrong["strict"] == [0.0, 0.0]
    assert all(a > b for a, b in zip(right["soft"], wrong["soft"], strict=True))


def test_a_prompt_outside_the_world_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match="rewards: shapes: "):
        ShapesReward()(torch.zeros(1, 3, 72, 72), ["a portrait of a cat"])
