"""A method of a user's own: named by a recipe, validated, trained, resumed and read back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import list_checkpoints, load_checkpoint
from dgpo_fast.config import Config, dump_config, resume_conflicts
from dgpo_fast.errors import UserError
from dgpo_fast.guard.advice import advice
from dgpo_fast.guard.held_out import HELD_OUT_RULES
from dgpo_fast.guard.rules import RULES
from dgpo_fast.metrics import read_metrics
from dgpo_fast.planning import plan

NAME = "own_methods:HardReset"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def recipe(quick: tuple[str, ...], *more: str) -> Config:
    kept = [item for item in quick if not item.startswith("algorithm.")]
    settings = "beta: 10, kl_coef: 0.02, trunc: 2, train_timesteps: 1, reset_every: 2"
    return load_recipe("tiny-dgpo", [*kept, f"algorithm={{name: '{NAME}', {settings}}}", *more])


def test_it_trains_and_goes_on(
    quick: tuple[str, ...], tmp_path: Path, assert_ends_alike: Callable[[Path, Path], None]
) -> None:
    """Its old policy is the policy after steps 2, 4 and 6, and what only it measures is in every line."""
    config = recipe(quick, "checkpoints.every=2", "checkpoints.keep_last=9", "logging.tensorboard=true")
    Trainer(config, tmp_path / "straight").train()
    lines = read_metrics(tmp_path / "straight")
    assert all(0 < line["positive_share"] < 1 for line in lines) and len(lines) == 6
    saved = {path.name: load_checkpoint(path) for path in list_checkpoints(tmp_path / "straight")}
    for name, is_reset in (("step-000002", True), ("step-000003", False), ("step-000004", True)):
        policy, old = saved[name].tensors("policy"), saved[name].tensors("old")
        assert all(torch.equal(policy[key], old[key]) for key in policy) == is_reset, name

    Trainer(config.model_copy(update={"steps": 3}), tmp_path / "resumed").train()
    Trainer(load_recipe(tmp_path / "resumed" / "config.yaml", ["steps=6"]), tmp_path / "resumed", resume=True).train()
    assert_ends_alike(tmp_path / "resumed", tmp_path / "straight")


def test_its_settings_are_settings(quick: tuple[str, ...], tmp_path: Path) -> None:
    config = recipe(quick)
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    assert load_recipe(tmp_path / "mine.yaml") == config
    assert load_recipe(tmp_path / "mine.yaml", ["algorithm.reset_every=7"]).algorithm.model_dump()["reset_every"] == 7
    conflicts = resume_conflicts(config, recipe(quick, "algorithm.reset_every=3"))
    assert conflicts == ["algorithm.reset_every: 2 -> 3"]
    assert {stage.name for stage in plan(config).cost.stages} >= {"reference", "old policy", "policy"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.reset_evry=2", r"unknown key 'algorithm\.reset_evry'; did you mean 'reset_every'\?"),
        ("algorithm.reset_every=0", r"algorithm\.reset_every: input should be greater than or equal to 1, got 0"),
        ("algorithm.beta=[]", r"algorithm\.beta: input should be a valid number, got \[\]"),
        ("algorithm.trunc=9", r"algorithm\.trunc must be below rollout\.steps \(3\), got 9"),
        ("groups.siz=9", r"unknown key 'groups\.siz'; did you mean 'size'\?"),
        ("algorithm.name=own_methods:Unsettled", "'own_methods:Unsettled' has no settings_type, .* got None"),
        ("algorithm.name=own_methods:Nothing", "cannot be imported: AttributeError: .*'Nothing'"),
        ("algorithm.name=nowhere:Nothing", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str, quick: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=message) as error:
        recipe(quick, override)
    assert "\n" not in str(error.value)


def test_the_guard_knows_nothing_of_settings_that_it_need_not_have(quick: tuple[str, ...]) -> None:
    """Nor does the plan."""
    kept = [item for item in quick if not item.startswith("algorithm.")]
    config = load_recipe("tiny-dgpo", [*kept, "algorithm={name: 'own_methods:Bare'}"])
    for name in (*RULES, *HELD_OUT_RULES):
        assert advice(name, config), name
    assert plan(config).cost is not None


def test_the_documentation_is_right(quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example is a method that trains."""
    text = DOCS.read_text(encoding="utf-8")
    python, yaml = (re.search(rf"```{language}\n(.*?)```", text, re.DOTALL) for language in ("python", "yaml"))
    assert python is not None and yaml is not None
    (tmp_path / "my_methods.py").write_text(python[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.yaml").write_text(yaml[1])
    assert load_recipe(tmp_path / "mine.yaml").algorithm.model_dump()["reset_every"] == 50
    named = "algorithm={name: 'my_methods:HardReset', trunc: 2, train_timesteps: 1}"
    config = recipe(quick, named, "steps=1", "evaluation.every=0")
    Trainer(config, tmp_path / "run").train()
    assert len(read_metrics(tmp_path / "run")) == 1
