"""Evaluation starts from noise that only seed, prompt and image number name, and counts what could be scored."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_fast import load_recipe
from dgpo_fast.config import Config, change_config, load_run_config
from dgpo_fast.errors import UserError
from dgpo_fast.evaluate import draw_images, evaluate_run, evaluate_view, score_view
from dgpo_fast.evaluation_config import evaluation_config
from dgpo_fast.held_out import deciding_metric, headline
from dgpo_fast.metrics import read_evaluations
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.parallel.world import World
from dgpo_fast.prompts import load_prompts
from dgpo_fast.rewards import Scorer, calling
from dgpo_fast.rewards.calling import Here

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
PROMPTS = load_prompts("shapes:test", key="prompts.test")[:3]


@pytest.fixture(scope="module")
def config(quick: tuple[str, ...]) -> Config:
    """One image per forward: kernels, and so bits, depend on the batch shape."""
    settings = ("rollout.images_per_forward=1", "evaluation.images_per_prompt=1", "rewards.max_failed_share=0.4")
    return load_recipe("tiny-dgpo", [*quick, *settings])


@pytest.fixture(scope="module")
def policy(config: Config) -> AdapterPolicy:
    return AdapterPolicy(load_model(config.model, device="cpu"), config.adapter, seed=0)


def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks without a process group, of which none hears of the others."""
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor)
    monkeypatch.setattr(World, "gather_objects", lambda self, value: [value])


def draw_one_by_one(policy: AdapterPolicy, config: Config) -> Tensor:
    """An image of each of PROMPTS, of the base, as an evaluation draws them where a forward holds one."""
    drawn = [
        draw_images(policy, "ref", [prompt], config, images_per_prompt=1, first_prompt=place)
        for place, prompt in enumerate(PROMPTS)
    ]
    return torch.cat(drawn)


def test_a_run_is_evaluated_as_it_evaluated_itself(straight_run: Path) -> None:
    last = read_evaluations(straight_run)[-1]
    result = evaluate_run(straight_run).as_json()
    compared = ("split", "num_prompts", "images_per_prompt", "step", "base", "tuned")
    assert {key: result[key] for key in compared} == {key: last[key] for key in compared}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_another_split_has_other_prompts(straight_run: Path) -> None:
    train, test = evaluate_run(straight_run, split="train").as_json(), read_evaluations(straight_run)[-1]
    assert (train["split"], train["num_prompts"]) == ("train", 2)
    assert train["base"] != test["base"]


@pytest.mark.parametrize(
    ("missing", "message"), [("config.yaml", "is no run directory"), ("checkpoints", "no checkpoint in")]
)
def test_what_is_no_run(missing: str, message: str, tmp_path: Path, straight_run: Path) -> None:
    if missing != "config.yaml":
        (tmp_path / "config.yaml").write_bytes((straight_run / "config.yaml").read_bytes())
    with pytest.raises(UserError, match=message):
        evaluate_run(tmp_path)


def test_the_same_noise_whichever_prompts_are_drawn_together(policy: AdapterPolicy, config: Config) -> None:
    """What ranks rely on: each draws its own prompts, and all images are those of one rank."""
    together = draw_images(policy, "ref", PROMPTS, config, images_per_prompt=2)
    apart = [
        draw_images(policy, "ref", [prompt], config, images_per_prompt=2, first_prompt=place)
        for place, prompt in enumerate(PROMPTS)
    ]
    assert together.shape == (6, 3, 72, 72)
    # The pooled text of a batch of prompts comes from one product, which rounds by their number (2e-7 of 1); solver and
    # decoder make up to a hundred times as much of it.
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-4)
    assert (together[:-1] - together[1:]).abs().amax((1, 2, 3)).min() > 0.1, "other noise gives another image"
    assert 0 <= together.min() < together.max() <= 1


def test_an_evaluation_has_its_own_number_of_steps(
    policy: AdapterPolicy, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, velocity = list[str](), policy.engine.velocity
    monkeypatch.setattr(policy.engine, "velocity", lambda *given: (views.append(given[0]), velocity(*given))[1])
    draw_images(policy, "ref", PROMPTS[:1], config, images_per_prompt=1)
    assert len(views) == config.evaluation.steps != config.rollout.steps


def test_another_seed_draws_other_images(policy: AdapterPolicy, config: Config) -> None:
    images = [
        draw_images(policy, "ref", PROMPTS[:1], config.model_copy(update={"seed": seed}), images_per_prompt=1)
        for seed in (0, 1)
    ]
    assert not torch.equal(*images)


def test_metrics_are_means_over_images(policy: AdapterPolicy, config: Config) -> None:
    metrics = evaluate_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), ALONE)
    images = draw_one_by_one(policy, config)
    scores = Scorer(config.rewards)(images, PROMPTS).metrics
    assert metrics == {name: values.double().mean().item() for name, values in scores.items()}


def test_an_evaluation_can_be_ended_between_forwards(policy: AdapterPolicy, config: Config) -> None:
    """A forward holds one prompt here: a signal is answered before the next one, not after all."""
    calls: list[None] = []
    scored: list[str] = []
    scorer = Scorer(config.rewards)

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise InterruptedError

    def score(images_BCHW: Tensor, prompts: list[str]) -> list[float]:
        scored.extend(prompts)
        return [0.0] * len(prompts)

    scorer.places = {name: Here(name, score) for name in scorer.places}
    with pytest.raises(InterruptedError):
        evaluate_view(policy, "ref", PROMPTS, config, scorer, ALONE, check=check)
    assert set(scored) <= set(PROMPTS[:1]), "nothing else was sampled"


def test_a_signal_during_the_last_reward_ends_an_evaluation(policy: AdapterPolicy, config: Config) -> None:
    """Its metrics are not recorded: the resumed run makes the evaluation again."""
    scorer, scored = Scorer(config.rewards), []

    def check() -> None:
        if len(scored) == len(PROMPTS) * len(config.rewards.terms):
            raise InterruptedError

    def score(images_BCHW: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        scored.extend(prompts)
        return {name: [0.0] * len(prompts) for name in ("brightness", "soft")}

    scorer.places = {name: Here(name, score) for name in scorer.places}
    with pytest.raises(InterruptedError):
        evaluate_view(policy, "ref", PROMPTS, config, scorer, ALONE, check=check)


def test_uneven_ranks_check_equally_often(
    policy: AdapterPolicy, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check is an all-reduce: the rank with fewer prompts must make as many."""
    unconnected(monkeypatch)
    counts = []
    for rank in range(2):
        calls: list[None] = []
        world = World(rank=rank, size=2, device=torch.device("cpu"))
        scorer = Scorer(config.rewards)
        evaluate_view(policy, "ref", PROMPTS, config, scorer, world, check=lambda calls=calls: calls.append(None))
        counts.append(len(calls))
    assert counts == [3, 3]


def test_a_rank_that_runs_out_of_prompts_draws_along(
    policy: AdapterPolicy, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many forwards on every rank, for weights that are gathered to be used; of a prompt that it has encoded."""
    unconnected(monkeypatch)
    prompts = load_prompts("shapes:test", key="prompts.test")[:4]
    encoded: list[list[str]] = []
    views: list[list[str]] = []
    scored: list[str] = []
    encode, velocity, scorer = policy.model.encode, policy.engine.velocity, Scorer(config.rewards)

    def score(images_BCHW: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        scored.extend(prompts)
        return {name: [0.0] * len(prompts) for name in ("brightness", "soft")}

    scorer.places = {name: Here(name, score) for name in scorer.places}
    monkeypatch.setattr(policy.model, "encode", lambda given: (encoded[-1].extend(given), encode(given))[1])
    monkeypatch.setattr(policy.engine, "velocity", lambda *given: (views[-1].append(given[0]), velocity(*given))[1])
    for rank in range(3):
        world = World(rank=rank, size=3, device=torch.device("cpu"))
        encoded.append([])
        views.append([])
        evaluate_view(policy, "ref", prompts, config, scorer, world)
        share = world.share(len(prompts))
        assert {*encoded[-1]} <= {*prompts[share.start : share.stop], ""}
    assert views[0] == views[1] == views[2]
    assert scored == [prompt for prompt in prompts for _ in scorer.places], "what was drawn along is not scored"


@pytest.mark.parametrize("how", ["nan", "inf", "-inf"])
def test_an_image_without_a_score_is_left_out(
    how: str, policy: AdapterPolicy, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_one_by_one(policy, config)
    others = Scorer(config.rewards)(images, PROMPTS).metrics["brightness"][1:]
    monkeypatch.setenv("MISBEHAVE", f"1-2:{how}")
    said: list[str] = []
    metrics = evaluate_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), ALONE, say=said.append)
    assert metrics["brightness"] == others.double().mean().item()
    failed = f"rewards: 'misbehaving:Brightness' failed for 1 of 3 images, last: returned {how}"
    assert said == [f"{failed}; they are left out of the evaluation"]
    strict = config.model_copy(update={"rewards": config.rewards.model_copy(update={"max_failed_share": 0.3})})
    with pytest.raises(UserError, match=rf"{failed}; 33\.3% of the images"):
        evaluate_view(policy, "ref", PROMPTS, strict, Scorer(strict.rewards), ALONE)


def test_a_rank_whose_images_all_failed_knows_the_metrics_from_another(
    policy: AdapterPolicy, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the reward has ever scored there: every rank must sum as many numbers."""
    names = {"misbehaving:Brightness": ["brightness", "contrast"], "shapes": ["soft", "strict"]}
    unconnected(monkeypatch)
    monkeypatch.setattr(World, "gather_objects", lambda self, value: [value, names])
    monkeypatch.setattr(calling, "BACKOFF_S", 0.0)
    monkeypatch.setenv("MISBEHAVE", "1-99:raise")
    sums: list[Tensor] = []
    monkeypatch.setattr(World, "sum", lambda self, tensor: (sums.append(tensor.clone()), tensor)[1])
    evaluations = []
    monkeypatch.setattr("dgpo_fast.evaluate._check_failures", lambda scores, *rest: evaluations.append(scores.failed))
    world = World(rank=0, size=3, device=torch.device("cpu"))
    metrics = evaluate_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), world)
    assert list(metrics) == ["brightness", "contrast", "soft", "strict"]
    assert sums[-1][1].tolist() == [0, 0, 1, 1]
    assert evaluations[0]["misbehaving:Brightness"].num_images == 1


def test_more_ranks_than_prompts_is_a_mistake_of_the_user(policy: AdapterPolicy, config: Config) -> None:
    last_of_four = World(rank=3, size=4, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"evaluation\.num_prompts: 3 held-out prompts for 4 ranks; .* at least one"):
        evaluate_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), last_of_four)


def test_every_image_has_its_scores_in_the_order_of_prompts(policy: AdapterPolicy, config: Config) -> None:
    scores = score_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), ALONE)
    expected = Scorer(config.rewards)(draw_one_by_one(policy, config), PROMPTS).metrics
    assert [*scores] == [*expected] and len(scores) == 4
    for name, values_PI in scores.items():
        np.testing.assert_array_equal(values_PI, expected[name].double().numpy()[:, None])
    means = evaluate_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), ALONE)
    assert {name: values_PI.mean() for name, values_PI in scores.items()} == pytest.approx(means, rel=1e-12)


def test_ranks_take_the_same_metric_first(
    policy: AdapterPolicy, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the first rank, where a reward has begun with another on each."""
    monkeypatch.setattr(World, "gather_objects", lambda self, share: [{"shapes": ["strict", "soft"]}, share])
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor)
    scorer = Scorer(config.rewards)
    evaluate_view(policy, "ref", PROMPTS, config, scorer, World(rank=1, size=2, device=torch.device("cpu")))
    assert scorer.metric_names["shapes"] == ["strict", "soft"]


class Asked(Exception):
    """A rank has come to where it hears of the others."""


def test_scores_of_images_know_nothing_of_ranks(
    policy: AdapterPolicy, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the shares of two ranks, one of one prompt and one of two, are what one rank finds."""
    config = change_config(config, {"evaluation": {"images_per_prompt": 2}}, source="test")
    alone = score_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), ALONE)
    shares: list[object] = []

    def are_scores(share: dict[str, object]) -> bool:  # else names of metrics, which both ranks know
        return all(isinstance(values, np.ndarray) for values in share.values())

    def ask(self: World, share: dict[str, object]) -> list[object]:
        if are_scores(share):
            shares.append(share)
            raise Asked
        return [share]

    worlds = [World(rank=rank, size=2, device=torch.device("cpu")) for rank in range(2)]
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor)
    monkeypatch.setattr(World, "gather_objects", ask)
    for world in worlds:
        with pytest.raises(Asked):
            score_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), world)
    monkeypatch.setattr(World, "gather_objects", lambda self, share: shares if are_scores(share) else [share])
    together = score_view(policy, "ref", PROMPTS, config, Scorer(config.rewards), worlds[1])
    assert [*together] == [*alone]
    for name, values_PI in alone.items():
        assert values_PI.shape == (3, 2)
        np.testing.assert_array_equal(together[name], values_PI)


@pytest.mark.parametrize("images_per_forward", [4, 6, 64])
def test_scores_of_images_know_nothing_of_batches(
    images_per_forward: int, policy: AdapterPolicy, config: Config
) -> None:
    """But for the rounding of kernels, which depends on a batch's shape: see the noise of prompts drawn together."""
    settings = {"evaluation": {"images_per_prompt": 2}, "rollout": {"images_per_forward": 1}}
    config = change_config(config, settings, source="test")
    other = change_config(config, {"rollout": {"images_per_forward": images_per_forward}}, source="test")
    one, some = (score_view(policy, "ref", PROMPTS, each, Scorer(each.rewards), ALONE) for each in (config, other))
    for name in ("brightness", "contrast"):
        np.testing.assert_allclose(some[name], one[name], rtol=0, atol=1e-4)
        assert np.ptp(one[name]) > 0.01


def test_two_ranks_write_what_one_writes(straight_run: Path, child_environment: dict[str, str], tmp_path: Path) -> None:
    """Of three prompts with two images, a forward each: the same bits in every score, page and picture."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = ["rollout.images_per_forward=2"]
    config = evaluation_config(
        straight_run, prompts=str(tmp_path / "prompts.txt"), num_prompts=3, images_per_prompt=2, overrides=settings
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = evaluate_run(straight_run, config=config, gallery=tmp_path / "one")
    torch.set_num_threads(threads)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dgpo_fast",
         "eval", straight_run, "--json", "--csv", tmp_path / "two.csv", "--gallery", tmp_path / "two",
         "--prompts", tmp_path / "prompts.txt", "--images-per-prompt=2", f"--set={settings[0]}",
         "--num-prompts=3"],
        env={**child_environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == one.as_json()
    assert one.as_json()["base"]["brightness"] != one.as_json()["tuned"]["brightness"]
    assert (tmp_path / "two.csv").read_text() == one.as_csv()
    first, second = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "two")
    )
    assert len(first) == 1 + 3 * 2 * 2
    assert first == second


@pytest.mark.parametrize("how", ["nan", "-inf"])
def test_a_pair_without_a_score_is_left_out(how: str, straight_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward fails twice for the first image that the base draws; its partner counts for nothing either."""
    whole = evaluate_run(straight_run)
    monkeypatch.setenv("MISBEHAVE", f"1-2:{how}")
    config = change_config(load_run_config(straight_run), {"rewards": {"max_failed_share": 0.5}}, source="test")
    found = evaluate_run(straight_run, config=config)
    assert [one.num_failed for one in found.comparisons.values()] == [1, 1, 0, 0]
    rest = {side: getattr(whole, side)["brightness"].ravel()[1:].mean() for side in ("base", "tuned")}
    result = found.as_json()
    assert {side: result[side]["brightness"] for side in rest} == pytest.approx(rest, rel=1e-12)
    assert result["difference"]["brightness"]["num_failed"] == 1
    assert "left out, since base or tuned has no score: 1 of brightness, 1 of contrast" in str(found.as_table().caption)


def test_the_headline_is_strict_or_the_trained_metric(config: Config, quick: tuple[str, ...]) -> None:
    chosen = load_recipe("tiny-dgpo", [*quick, "rewards.terms=[{name: shapes, metric: soft}]"])
    first = load_recipe("tiny-dgpo", [*quick, "rewards.terms=[{name: shapes}]"])
    assert headline({"soft": 0.1, "strict": 0.2}, chosen.rewards) == 0.2
    assert headline({"other": 0.3, "soft": 0.1}, chosen.rewards) == 0.1
    assert headline({"other": 0.3, "soft": 0.1}, first.rewards) == 0.3
    assert math.isnan(headline({"strict": math.nan}, first.rewards))
    assert deciding_metric(("soft", "strict"), chosen.rewards) == "strict"
    assert deciding_metric(("other", "soft"), chosen.rewards) == "soft"


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("[{name: clipscore}, {name: ocr, weight: 2}]", 0.3 + 2 * 0.5),
        ("[{name: clipscore, weight: -1}, {name: shapes, metric: strict}]", -0.3 + 0.4),
        ("[{name: clipscore, weight: -1}, {name: shapes}]", -0.3),  # nobody knows which of its metrics comes first
    ],
)
def test_the_headline_of_several_rewards_is_their_weighted_sum(
    terms: str, expected: float, quick: tuple[str, ...]
) -> None:
    metrics = {"clipscore": 0.3, "ocr": 0.5, "exact": 0.1, "soft": 0.8, "strict": 0.4}
    config = load_recipe("tiny-dgpo", [*quick, f"rewards.terms={terms}"])
    assert headline(metrics, config.rewards) == pytest.approx(expected)
    assert deciding_metric(metrics, config.rewards) == ("clipscore" if "shapes}" in terms else None)
    told = "shapes}" not in terms
    assert math.isnan(headline({**metrics, "ocr": math.nan, "strict": math.nan}, config.rewards)) == told
