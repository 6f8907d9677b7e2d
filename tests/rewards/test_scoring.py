"""Scores: weights, choice of metric, and what happens to images that a reward fails on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards import Scorer, Scores, base
from dgpo_fast.rewards.shapes import ShapesReward
from dgpo_fast.shapes.captions import parse_caption
from dgpo_fast.shapes.render import render

Score = Callable[..., Scores]
PROMPTS = ["one", "two", "three"]
IMAGES = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 4, 4)


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Score:
    """score(reward, ...) scores IMAGES with functions, named a, b, ... in order; `terms` override their settings."""

    def run(
        *rewards: Callable[[Tensor, Sequence[str]], Any],
        terms: Sequence[Mapping[str, Any]] = (),
        on_failure: Literal["stop", "skip"] = "stop",
    ) -> Scores:
        named = dict(zip("abc", rewards, strict=False))
        monkeypatch.setattr(base, "_FACTORIES", {name: lambda reward=reward: reward for name, reward in named.items()})
        settings = terms or [{} for _ in named]
        configs = tuple(RewardConfig(name=name, **term) for name, term in zip(named, settings, strict=True))
        return Scorer(RewardsConfig(terms=configs, on_failure=on_failure))(IMAGES, PROMPTS)

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


@pytest.mark.parametrize("on_failure", ["stop", "skip"])
def test_metrics_that_differ_between_batches(
    on_failure: Literal["stop", "skip"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could be of no use: which image lacks which would decide what is averaged."""

    def reward(images: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
        return {name: [0.0] * len(prompts) for name in ("soft", *("strict" for _ in prompts[1:]))}

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),), on_failure=on_failure))
    batches = [scorer.measure(IMAGES[:2], PROMPTS[:2]), scorer.measure(IMAGES[2:], PROMPTS[2:])]
    with pytest.raises(UserError, match="'a' returned metrics soft, strict for some images and soft for others"):
        scorer.combine(batches)


def test_a_metric_that_is_not_there(score: Score) -> None:
    with pytest.raises(UserError, match="'a' has no metric 'softt'; did you mean 'soft'"):
        score(lambda images, prompts: {"soft": [0, 0, 0]}, terms=[{"metric": "softt"}])


@pytest.mark.parametrize("on_failure", ["stop", "skip"])
@pytest.mark.parametrize("output", [[1.0, 2.0], [1.0] * 4, [[1.0]] * 3, 1.0, []])
def test_the_wrong_number_of_scores_is_always_an_error(
    output: Any, on_failure: Literal["stop", "skip"], score: Score
) -> None:
    with pytest.raises(UserError, match=r"'a' returned \[.*\] scores \(a\) for 3 images; expected one for each"):
        score(lambda images, prompts: output, on_failure=on_failure)


def test_no_metric_at_all_is_an_error(score: Score) -> None:
    with pytest.raises(UserError, match="'a' returned no scores"):
        score(lambda images, prompts: {})


# Failures


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite(value: float, score: Score) -> None:
    with pytest.raises(UserError, match=rf"'a' returned {value} for 1 of 3 images; set rewards\.on_failure=skip"):
        score(constant(1, value, 3))
    scores = score(constant(1, value, 3), on_failure="skip")
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.reward_B[[0, 2]].tolist() == [1, 3]


def test_a_reward_that_raises(score: Score) -> None:
    reward = by_prompt({"one": 1, "two": RuntimeError("no face found"), "three": 3})
    with pytest.raises(UserError, match="'a' raised RuntimeError: no face found"):
        score(reward)
    scores = score(reward, on_failure="skip")
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.reward_B[[0, 2]].tolist() == [1, 3]


def test_a_reward_that_always_raises(score: Score) -> None:
    with pytest.raises(UserError, match="'a' raised for every one of 3 images"):
        score(by_prompt(dict.fromkeys(PROMPTS, RuntimeError("down"))), on_failure="skip")


def test_a_reward_that_raises_for_a_whole_batch_once_it_has_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is down for a moment: a batch without scores, under the names that it has given before."""
    answers = iter([{"good": [1, 2, 3], "bad": [0, 0, 0]}])

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionError("down") from None

    monkeypatch.setattr(base, "_FACTORIES", {"a": lambda: reward})
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name="a"),), on_failure="skip"))
    assert scorer(IMAGES, PROMPTS).reward_B.tolist() == [1, 2, 3]
    scores = scorer(IMAGES, PROMPTS)
    assert scores.reward_B.isnan().all()
    assert {name: values.isnan().all().item() for name, values in scores.metrics.items()} == {"good": True, "bad": True}


def test_one_failure_fails_the_sum(score: Score) -> None:
    scores = score(constant(1, 2, 3), constant(1, float("nan"), 1), on_failure="skip")
    assert scores.reward_B.isnan().tolist() == [False, True, False]
    assert scores.metrics["a"].tolist() == [1, 2, 3]


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
