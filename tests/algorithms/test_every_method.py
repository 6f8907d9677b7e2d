"""What is true of every method: ranks together learn what one learns, and a step favours what had an advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.algorithms import find_algorithm
from dgpo_fast.algorithms.base import Algorithm
from dgpo_fast.algorithms.flow_grpo import FlowGRPO
from dgpo_fast.algorithms.forward import mean_square, target_of, velocity_of
from dgpo_fast.config import Config
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.records import PromptBatch, ScoredGroups, Trajectory

MakePolicy = Callable[..., AdapterPolicy]
Tiny = Callable[..., Config]
PromptsOf = Callable[..., PromptBatch]
Score = Callable[..., ScoredGroups]
Learn = Callable[..., tuple[Tensor, dict[str, float]]]

EPS = torch.finfo(torch.float32).eps
SPREAD = 0.2
METHODS = {
    "tiny-dgpo": ("algorithm.trunc=2", "algorithm.train_timesteps=2", "algorithm.kl_cfg=1", "algorithm.clip=null"),
    "tiny-flow-grpo": ("algorithm.trained_steps=2", "algorithm.clip=0.1"),
    "tiny-flow-grpo-fast": ("algorithm.trained_steps=3", "algorithm.window=2", "algorithm.clip=0.1"),
    "tiny-diffusion-nft": ("algorithm.trunc=2", "algorithm.train_timesteps=2"),
    "tiny-awm": ("algorithm.first=1", "algorithm.trunc=3", "algorithm.train_timesteps=2"),
    "tiny-diffusion-dpo": ("algorithm.train_timesteps=2",),
}


@pytest.fixture
def drawn(make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score) -> Callable[..., Any]:
    """A recipe made small, a policy of some training, and the scored groups that it drew."""

    def make(recipe: str, *overrides: str, groups: int = 4, **named: Any) -> tuple[Config, AdapterPolicy, ScoredGroups]:
        config = tiny(recipe, *METHODS[recipe], *overrides, groups=groups)
        policy = make_policy(config, spread=SPREAD)
        algorithm: Algorithm[Any, Any] = find_algorithm(config, ALONE)
        rollout = algorithm.rollout(policy, config.sampling_view(0), prompts_of(policy, config))
        return config, policy, score(rollout, config, **named)

    return make


def moved(policy: AdapterPolicy) -> None:
    """The policy after a step, so to speak."""
    weights = policy.trainable.detach()
    policy.set_weights("policy", weights + 0.02 * torch.randn(len(weights), generator=torch.Generator().manual_seed(2)))


def share(scored: ScoredGroups, samples: Sequence[int], prompts: PromptBatch) -> ScoredGroups:
    """What of groups lies on one rank."""
    mine, rollout, trajectory = list(samples), scored.rollout, scored.rollout.trajectory
    if trajectory is not None:
        trajectory = Trajectory(
            first_B=tuple(trajectory.first_B[sample] for sample in mine), x_SBCHW=trajectory.x_SBCHW[:, mine],
            log_prob_SB=trajectory.log_prob_SB[:, mine],
        )  # fmt: skip
    rollout = replace(rollout, prompts=prompts, x0_BCHW=rollout.x0_BCHW[mine], trajectory=trajectory)
    of_samples = {name: getattr(scored, name)[mine] for name in ("reward_B", "valid_B", "advantage_B")}
    return replace(scored, rollout=rollout, **of_samples)


@pytest.mark.parametrize("recipe", METHODS)
def test_ranks_together_have_the_gradient_of_one(
    recipe: str, drawn: Callable[..., Any], prompts_of: PromptsOf, learn: Learn
) -> None:
    """And its metrics: both are sums over the ranks. One sample failed, and a group is tied."""
    rewards = [0.1, 0.9, 0.4, 0.3, 0.5, 0.5, 0.5, 0.5, 0.7, 0.2, 0.1, 0.6, 0.8, 0.3, 0.2, 0.4]
    config, policy, scored = drawn(recipe, rewards=rewards, invalid=[9])
    moved(policy)
    expected, report = learn(policy, config, scored)
    assert expected.norm() > 0
    gradient, metrics = torch.zeros_like(expected), dict.fromkeys(report, 0.0)
    for rank in (0, 1):
        samples = placement_of(config, 2).samples(rank, total=16)
        mine = share(scored, samples, prompts_of(policy, config, samples=samples))
        found, of_rank = learn(policy, config, mine, world=World(rank=rank, size=2, device=torch.device("cpu")))
        gradient += found
        for name, value in of_rank.items():
            metrics[name] += value
    assert (gradient - expected).norm() < 64 * EPS * expected.norm()
    assert metrics == {name: pytest.approx(value, rel=64 * EPS, abs=16 * EPS) for name, value in report.items()}


@pytest.mark.parametrize("recipe", METHODS)
def test_a_step_favours_what_had_an_advantage(recipe: str, drawn: Callable[..., Any], learn: Learn) -> None:
    """Down the gradient: what was better becomes likelier than what was worse, or its noise is told more exactly."""
    without = ("algorithm.kl_coef=0",) if recipe != "tiny-diffusion-dpo" else ()
    without += ("algorithm.old_coef=0",) if recipe == "tiny-awm" else ()
    config, policy, scored = drawn(recipe, *without, groups=2)
    policy.set_weights("old", policy.trainable.detach())
    algorithm: Algorithm[Any, Any] = find_algorithm(config, ALONE)

    def preference() -> float:
        """Advantages times how near what they are of is to the policy."""
        total = 0.0
        with torch.no_grad():
            for (batch,) in algorithm.batches(scored):
                if isinstance(algorithm, FlowGRPO):
                    nearness_M = algorithm._step(policy, "policy", batch).log_prob_B
                else:
                    nearness_M = -mean_square(target_of(batch) - velocity_of(policy, "policy", batch))
                total += float((batch.advantage_M * nearness_M).sum())
        return total

    before, weights = preference(), policy.trainable.detach().clone()
    gradient, _ = learn(policy, config, scored)
    policy.set_weights("policy", weights - 0.01 * weights.norm() / gradient.norm() * gradient)
    assert preference() > before
    policy.set_weights("policy", weights + 0.01 * weights.norm() / gradient.norm() * gradient)
    assert preference() < before
