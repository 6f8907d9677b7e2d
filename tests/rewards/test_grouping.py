"""Advantages of several rewards: of their sum, or each normalised by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from dgpo_fast.config import Config, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.parallel.world import World
from dgpo_fast.records import Rollout
from dgpo_fast.rewards import Scores
from dgpo_fast.rewards.grouping import Grouped, scored_groups

GROUPS, SIZE = 3, 4
WEIGHTS = (0.5, 2.0)
TERMS = "rewards.terms=[{name: pickscore, weight: 0.5}, {name: clipscore, weight: 2.0}]"


def recipe(*more: str) -> Config:
    sizes = (f"groups.size={SIZE}", f"groups.per_iteration={GROUPS}", "optimizer.images_per_micro_batch=4")
    return load_recipe("tiny-dgpo", [*sizes, TERMS, "rewards.max_failed_share=0.5", "device=cpu", *more])


def rewards() -> torch.Tensor:
    """[B, 2]: one of about 22, and one of about 0.3."""
    random = torch.randn(GROUPS * SIZE, 2, generator=torch.Generator().manual_seed(0))
    return random * torch.tensor([1.5, 0.02]) + torch.tensor([22.0, 0.3])


def grouped(term_BT: torch.Tensor, config: Config, *, samples_of_ranks: list[tuple[int, ...]] | None = None) -> Grouped:
    scores = Scores(
        reward_B=(term_BT * torch.tensor(WEIGHTS)).sum(1), term_BT=term_BT, metrics={}, failed={}, retried={}
    )
    rollout = cast("Rollout", SimpleNamespace(prompts=SimpleNamespace(group_size=SIZE)))
    world = World.from_environment(config)
    order = [tuple(range(GROUPS * SIZE))] if samples_of_ranks is None else samples_of_ranks
    return scored_groups(rollout, scores, config, world=world, samples_of_ranks=order)


def test_each_reward_is_normalised_by_itself() -> None:
    """Against the paper's equations in float64, without an epsilon; a sample that failed is left out of all."""
    term_BT = rewards()
    term_BT[5] = torch.nan
    found = grouped(term_BT, recipe("advantages.aggregation=gdpo", "advantages.epsilon=1e-12")).scored
    summed = np.zeros(GROUPS * SIZE)
    for term_B, weight in zip(term_BT.double().numpy().T, WEIGHTS, strict=True):
        for group in np.split(np.arange(GROUPS * SIZE), GROUPS):
            valid = group[np.isfinite(term_B[group])]
            summed[valid] += weight * (term_B[valid] - term_B[valid].mean()) / term_B[valid].std()
    valid = np.isfinite(term_BT[:, 0].numpy())
    expected = np.where(valid, summed / summed[valid].std(), 0.0)
    np.testing.assert_allclose(found.advantage_B.numpy(), expected, atol=2e-4)  # 22 + 1.5 r in float32, less its mean


@pytest.mark.parametrize(("aggregation", "is_same"), [("gdpo", True), ("sum", False)])
def test_a_rewards_scale_does_not_matter_where_it_is_normalised(aggregation: str, is_same: bool) -> None:
    """Powers of two, so that nothing is rounded otherwise; beside the epsilon."""
    config = recipe(f"advantages.aggregation={aggregation}", "advantages.epsilon=1e-12")
    before, after = (grouped(rewards() * torch.tensor([1.0, scale]), config).scored for scale in (1.0, 64.0))
    assert torch.equal(before.advantage_B, after.advantage_B) == is_same


def test_groups_without_spread_and_clamped_advantages_are_counted() -> None:
    term_BT = rewards()
    term_BT[:SIZE] = 1.0
    metrics = grouped(term_BT, recipe("advantages.clamp=0.5")).metrics
    assert metrics["zero_std_groups"] == 1
    unclamped = grouped(term_BT, recipe()).scored.advantage_B
    assert metrics["clamped_advantages"] == (unclamped.abs() > 0.5).sum()


def test_samples_are_counted_over_all_ranks_for_each_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of a group each: one whole, one tied, one of which a sample failed and one has the group's mean."""
    term_BT = torch.zeros(GROUPS * SIZE, 2)
    term_BT[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0, 1.0, 2.0, 3.0, torch.nan])
    of_ranks = [(0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)]
    monkeypatch.setattr(World, "gather", lambda self, mine: torch.cat([mine, theirs]))
    monkeypatch.setattr(World, "gather_objects", lambda self, mine: [mine])
    config = recipe("optimizer.steps_per_iteration=3", "optimizer.images_per_micro_batch=2", "steps=3")
    both = [term_BT[list(mine)] for mine in of_ranks]
    theirs = torch.cat([(both[1] * torch.tensor(WEIGHTS)).sum(1, keepdim=True), both[1]], dim=1)
    found = grouped(both[0], config, samples_of_ranks=of_ranks).scored
    assert (found.num_valid, found.num_advantaged, found.num_groups) == ((4, 4, 3), (4, 0, 2), (1, 1, 1))
    assert found.advantage_B.tolist() == pytest.approx([-1.34, -0.45, 0, 0, -1.22, 0], abs=0.01)


def test_pairs_are_picked_by_the_sum() -> None:
    with pytest.raises(UserError, match=r"diffusion_dpo picks .* advantages\.aggregation sum, got gdpo"):
        load_recipe("tiny-diffusion-dpo", ["advantages.aggregation=gdpo"])
