"""What the tests of the baselines share: small recipes, groups with random rewards, a step's gradient and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.algorithms import find_algorithm
from dgpo_fast.algorithms.base import Algorithm
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.records import LossOutput, PromptBatch, Rollout, ScoredGroups

PROMPTS = ("two red circles", "a blue square left of a green triangle", "a yellow circle", "three green squares")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """A recipe made small: groups of four, one optimizer step for all of them."""

    def make(recipe: str, *overrides: str, groups: int = 2, micro: int = 4) -> Config:
        small = (
            "adapter.rank=4", "adapter.alpha=8", "groups.size=4", f"groups.per_iteration={groups}",
            f"optimizer.images_per_micro_batch={micro}", f"rollout.images_per_forward={micro}", "model.sampling=same",
            "optimizer.steps_per_iteration=1", "rollout.steps=4", "model.resolution=24",
        )  # fmt: skip
        return load_recipe(recipe, [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def prompts_of() -> Callable[..., PromptBatch]:
    """The prompts of an iteration, or those of the samples that a rank has."""

    def make(
        policy: AdapterPolicy, config: Config, *, iteration: int = 0, samples: Sequence[int] | None = None
    ) -> PromptBatch:
        mine = tuple(range(config.images_per_iteration) if samples is None else samples)
        texts = tuple(PROMPTS[group] for group in sorted({sample // config.groups.size for sample in mine}))
        return PromptBatch(
            iteration=iteration, samples=mine, group_size=config.groups.size, prompts=texts,
            conditioning=policy.model.encode(texts), unconditional=policy.model.encode([""]),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def score() -> Callable[..., ScoredGroups]:
    """Gives a rollout of all samples rewards, random where none are given; those of the samples `invalid` failed."""

    def make(
        rollout: Rollout, config: Config, *, rewards: Sequence[float] | None = None, invalid: Sequence[int] = ()
    ) -> ScoredGroups:
        reward_B = torch.rand(len(rollout.x0_BCHW), generator=torch.Generator().manual_seed(5))
        if rewards is not None:
            reward_B = torch.tensor(rewards)
        reward_B[list(invalid)] = torch.nan
        valid_B, size, updates = reward_B.isfinite(), config.groups.size, config.optimizer.steps_per_iteration
        rule = config.advantages
        advantages = group_advantages(
            reward_B, valid_B, group_size=size, std=rule.std, epsilon=rule.epsilon, clamp=rule.clamp
        )
        return ScoredGroups(
            rollout=rollout, reward_B=reward_B, valid_B=valid_B,
            num_valid=tuple(valid_B.view(updates, -1).sum(1).tolist()),
            num_advantaged=tuple((advantages.advantage_B != 0).view(updates, -1).sum(1).tolist()),
            advantage_B=advantages.advantage_B,
            group_size_G=valid_B.view(-1, size).sum(1).float(),
            num_groups=tuple(valid_B.view(updates, -1, size).any(2).sum(1).tolist()),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def scored_noise(prompts_of: Callable[..., PromptBatch], score: Callable[..., ScoredGroups]) -> Callable[..., Any]:
    """Random latents instead of a rollout's: methods that noise them again do not care where they come from."""

    def make(policy: AdapterPolicy, config: Config, **named: Any) -> ScoredGroups:
        prompts = prompts_of(policy, config)
        generator = torch.Generator().manual_seed(4)
        x0_BCHW = torch.randn(prompts.num_samples, *policy.model.latent_shape, generator=generator)
        return score(Rollout(prompts=prompts, x0_BCHW=x0_BCHW), config, **named)

    return make


@pytest.fixture(scope="session")
def learn() -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """The gradient and the metrics of an optimizer step on one rank, gathered as the trainer gathers them."""

    def make(
        policy: AdapterPolicy, config: Config, scored: ScoredGroups, *, update: int = 0, world: World = ALONE
    ) -> tuple[Tensor, dict[str, float]]:
        assert policy.trainable.grad is not None
        policy.trainable.grad.zero_()
        algorithm: Algorithm[Any, Any] = find_algorithm(config, world)
        outputs = list[LossOutput]()
        for batches in algorithm.batches(scored, update=update):
            assert algorithm.group_weights(policy, batches) is None
            for batch in batches:
                outputs.append(algorithm.loss(policy, batch, None))
                outputs[-1].loss.backward()  # type: ignore[no-untyped-call]
                policy.collect_gradient()
        metrics = {name: sum(output.metrics[name].item() for output in outputs) for name in outputs[0].metrics}
        return policy.trainable.grad.clone(), metrics

    return make


@pytest.fixture(scope="session")
def gradient_of() -> Callable[[AdapterPolicy, Tensor], Tensor]:
    """The gradient of a scalar, by autograd through the policy."""

    def make(policy: AdapterPolicy, value: Tensor) -> Tensor:
        assert policy.trainable.grad is not None
        policy.trainable.grad.zero_()
        value.backward()  # type: ignore[no-untyped-call]
        policy.collect_gradient()
        return policy.trainable.grad.clone()

    return make
