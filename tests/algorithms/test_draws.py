"""What every method draws has a name of its own, and what its optimizer steps learn from is shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo_fast import Trainer, load_recipe, rng
from dgpo_fast.errors import UserError
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.records import ScoredGroups

METHODS = {
    "tiny-dgpo": (),
    "tiny-flow-grpo": ("algorithm.trained_steps=2",),
    "tiny-flow-grpo-fast": ("algorithm.trained_steps=2", "algorithm.window=1"),
    "tiny-diffusion-nft": ("algorithm.trunc=2", "algorithm.train_timesteps=2"),
    "tiny-awm": ("algorithm.trunc=2", "algorithm.train_timesteps=2"),
    "tiny-diffusion-dpo": ("algorithm.train_timesteps=2",),
}
"""And what makes their iterations short."""


def trainer_of(recipe: str, out: Path, quick: tuple[str, ...], *overrides: str) -> Trainer:
    common = [item for item in quick if recipe == "tiny-dgpo" or not item.startswith(("algorithm.", "model.sampling"))]
    short = ("optimizer.steps_per_iteration=1", "evaluation_ema.every=1", "model.resolution=24")
    return Trainer(load_recipe(recipe, [*common, *METHODS[recipe], *short, *overrides]), out)


@pytest.mark.parametrize("recipe", METHODS)
def test_every_draw_is_named_by_seed_and_iteration(
    recipe: str, quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or noise would come back: that of a stochastic step by group, sample and step as well."""
    named: list[tuple[int, dict[str, Any]]] = []
    stream = rng.stream

    def noted(seed: int, **names: Any) -> rng.Stream:
        named.append((seed, names))
        return stream(seed, **names)

    trainer = trainer_of(recipe, tmp_path, quick, "seed=7")
    monkeypatch.setattr(rng, "stream", noted)
    for iteration in range(2):
        named.clear()
        trainer.run_iteration()
        drawn = [(seed, names) for seed, names in named if names["stage"] != "prompts"]  # which have epochs instead
        assert len({names["stage"] for _, names in drawn}) > 1
        assert {seed for seed, _ in drawn} == {7}
        assert {names.get("iteration", 0) for _, names in drawn} == {iteration}
        steps = [(names["group"], names["sample"], names["timestep"]) for _, names in drawn if names["stage"] == "sde"]
        expected = [(group, sample, step) for group in range(2) for sample in range(4) for step in range(3)]
        assert sorted(steps) == (expected if "flow-grpo" in recipe else [])


@pytest.mark.parametrize("recipe", ["tiny-dgpo", "tiny-diffusion-nft"])
def test_optimizer_steps_share_out_the_groups(recipe: str, quick: tuple[str, ...], tmp_path: Path) -> None:
    """Each learns from groups of its own, in means over what of these has a score."""
    trainer = trainer_of(
        recipe, tmp_path, quick, "groups.per_iteration=4", "optimizer.steps_per_iteration=2", "steps=2"
    )
    rollout = trainer.algorithm.rollout(trainer.policy, "policy", trainer._next_prompts())
    reward_B, valid_B = torch.arange(16.0), torch.ones(16, dtype=torch.bool)
    valid_B[0] = valid_B[4:8] = False
    num_valid, num_groups = (3, 8), (1, 2)
    scored = ScoredGroups(
        rollout=rollout, reward_B=reward_B, valid_B=valid_B, advantage_B=reward_B, num_valid=num_valid,
        num_advantaged=num_valid, num_groups=num_groups, group_size_G=valid_B.view(4, 4).sum(1).float(),
    )  # fmt: skip
    passes = trainer.config.algorithm.passes
    for update in range(2):
        batches = [batch for each in trainer.algorithm.batches(scored, update=update) for batch in each]
        mine = reward_B[8 * update : 8 * update + 8]
        assert torch.equal(torch.cat([batch.advantage_M for batch in batches]), mine.repeat(passes))
        assert {batch.sample_share for batch in batches} == {1 / (num_valid[update] * passes)}
        assert {batch.group_share for batch in batches} == {1 / (num_groups[update] * passes)}


@pytest.mark.parametrize("check", ["check_trained", "check_sampling"])
@pytest.mark.parametrize("recipe", METHODS)
def test_a_run_begins_with_its_checks(
    recipe: str, check: str, quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That adapters act, and, but for Flow-GRPO, which checks its ratio, that samples are what the policy draws."""

    def refuse(policy: AdapterPolicy) -> str:
        raise UserError("asked")

    monkeypatch.setattr(AdapterPolicy, check, refuse)
    if "flow-grpo" in recipe and check == "check_sampling":
        assert "likelihood ratio" in trainer_of(recipe, tmp_path, quick).readiness
        return
    with pytest.raises(UserError, match=r"^asked$"):
        trainer_of(recipe, tmp_path, quick)
