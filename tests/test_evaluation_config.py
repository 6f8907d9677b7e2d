"""What an evaluation may change of a run, and evaluation recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo_fast.config import Config, change_config, dump_config, load_recipe, load_run_config, recipe_names
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation_config import evaluation_config, evaluation_recipe_names, load_evaluation_recipe
from dgpo_fast.prompts import load_prompts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """All that a configuration needs of a run."""
    config = load_recipe(
        "tiny-dgpo", ["rewards.pickscore.path=/weights", "evaluation.steps=9", "prompts.train=mine.txt"]
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return tmp_path


def terms(config: Config) -> list[str]:
    return [term.name for term in config.rewards.terms]


def recipe(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_without_changes_it_is_the_runs(run: Path) -> None:
    assert evaluation_config(run) == load_recipe(run / "config.yaml")


def test_options_replace_what_the_run_says(run: Path) -> None:
    config = evaluation_config(
        run, rewards=["clipscore", "my.module:Reward"], prompts="3.5", num_prompts=7, images_per_prompt=2
    )
    assert terms(config) == ["clipscore", "my.module:Reward"]
    assert (config.prompts.test, config.prompts.train) == ("3.5", "mine.txt")
    assert (config.evaluation.num_prompts, config.evaluation.images_per_prompt, config.evaluation.steps) == (7, 2, 9)
    assert config.rewards.pickscore.path == "/weights"
    assert evaluation_config(run, split="train", prompts="other.txt").prompts.train == "other.txt"


def test_a_recipe_replaces_what_it_gives_and_options_that(run: Path) -> None:
    mine = recipe(
        run,
        "kind: evaluation\nrewards: {terms: [{name: hpsv2}]}\nprompts: {test: a.txt}\nevaluation: {num_prompts: 5}\n",
    )
    config = evaluation_config(run, recipe=mine, overrides=["evaluation.num_prompts=6", "rollout.guidance=2"])
    assert (terms(config), config.prompts.test, config.prompts.train) == (["hpsv2"], "a.txt", "mine.txt")
    assert (config.evaluation.num_prompts, config.evaluation.steps, config.rollout.guidance) == (6, 9, 2)
    assert config.rewards.pickscore.path == "/weights", "where weights are is the machine's, not the recipe's"
    config = evaluation_config(run, recipe=mine, overrides=["evaluation.num_prompts=6"], rewards=["x"], num_prompts=7)
    assert (terms(config), config.evaluation.num_prompts) == (["x"], 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: {terms: [{name: shapes}]}", "is no evaluation recipe, which says kind: evaluation"),
        ("kind: evaluation\nreward: {}", "unknown key 'reward'; did you mean 'rewards'?; an evaluation recipe has"),
        ("kind: evaluation\noptimizer: {lr: 1}", "unknown key 'optimizer'; an evaluation recipe has"),
        ("kind: evaluation\nprompts: {train: a.txt}", "prompts of an evaluation recipe are prompts.test alone"),
        ("kind: evaluation\nprompts: a.txt", "prompts of an evaluation recipe are prompts.test alone"),
        ("kind: evaluation\nevaluation: {num_prompt: 3}", "unknown key 'evaluation.num_prompt'; did you mean"),
        ("kind: evaluation\nrewards: [pickscore]", "rewards: .* got .*pickscore"),
        ("kind: evaluation\nrewards: null", "rewards: .* got None"),
        ("kind: evaluation\nrewards: {terms: [pickscore]}", "rewards.terms.0: .* got 'pickscore'"),
        ("kind: evaluation\nrewards: {terms: pickscore}", "rewards.terms: .* got 'pickscore'"),
        ("kind: evaluation\nrewards: {terms: 3}", "rewards.terms: .* got 3"),
        ("- kind", "a recipe is a mapping of sections, got list"),
        ("a: b: c", "not YAML"),
    ],
)
def test_a_bad_recipe_is_refused(text: str, message: str, run: Path) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        evaluation_config(run, recipe=recipe(run, text))


@pytest.mark.parametrize(
    "setting", ["optimizer.lr=1.0", "model.name=x", "steps=3", "rewardss.terms=[]", "adapter=null"]
)
def test_what_the_checkpoint_is_of_is_not_changed(setting: str, run: Path) -> None:
    with pytest.raises(UserError, match=r"^--set .*: eval takes settings of rewards, prompts, evaluation, rollout, "):
        evaluation_config(run, overrides=[setting])


def test_places_of_rewards_that_are_not_asked_are_forgotten(run: Path) -> None:
    """Those of the run; what an evaluation itself says of a reward that it has not is refused."""
    places = {"shapes": {"processes": 2}, "jpeg_compressibility": {"images_per_call": 4}}
    terms = [{"name": "shapes"}, {"name": "jpeg_compressibility"}]
    change = {"rewards": {"terms": terms, "running": places, "monitors": ["ocr"], "arguments": {"ocr": {"a": 1}}}}
    config = change_config(load_run_config(run), change, source="test")
    (run / "config.yaml").write_text(dump_config(config))
    assert [*evaluation_config(run, rewards=["shapes"]).rewards.running] == ["shapes"]
    assert evaluation_config(run, recipe="drawbench").rewards.running == {}
    alone, own = evaluation_config(run, rewards=["shapes"]).rewards, evaluation_config(run).rewards
    assert (alone.monitors, alone.arguments, own.monitors) == ((), {}, ("ocr",))
    assert [*evaluation_config(run).rewards.running] == ["shapes", "jpeg_compressibility"]
    other = "rewards.terms=[{name: jpeg_compressibility}]"
    assert [*evaluation_config(run, overrides=[other]).rewards.running] == ["jpeg_compressibility"]
    watched = evaluation_config(run, overrides=[other, "rewards.monitors=[shapes]"]).rewards
    assert [*watched.running] == ["shapes", "jpeg_compressibility"]
    with pytest.raises(UserError, match=r"no term has the reward 'shapes'; terms: pickscore"):
        evaluation_config(run, rewards=["pickscore"], overrides=["rewards.running.shapes.processes=1"])


@pytest.mark.parametrize("name", evaluation_recipe_names())
def test_recipes_of_the_package(name: str, run: Path) -> None:
    config = evaluation_config(run, recipe=name)
    assert load_evaluation_recipe(name)["description"]
    assert terms(config) and config.evaluation.steps == 9
    assert load_prompts(config.prompts.test, key="prompts.test")


def test_evaluation_recipes_are_these(run: Path) -> None:
    assert evaluation_recipe_names() == ["drawbench", "shapes"]
    assert not {*evaluation_recipe_names()} & {*recipe_names()}
    assert terms(evaluation_config(run, recipe="drawbench")) == [
        "aesthetic", "imagereward", "pickscore", "deqa", "unifiedreward",
    ]  # fmt: skip
    every = evaluation_config(run, recipe="shapes").evaluation.num_prompts
    assert every == len(load_prompts("shapes:test", key="prompts.test"))
