"""What the paper compares DGPO with: samples of an SDE, samples of the base, and pairs in place of groups.

None is an option of the package; docs/benchmarks.md shows what each makes of it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speedup_runs import Run
from dgpo_fast import Trainer, rng
from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.algorithms.diffusion_dpo import pairs
from dgpo_fast.algorithms.group_sampler import Check, Deliver, GroupSampler
from dgpo_fast.config import Config
from dgpo_fast.flow.rollout import initial_noise
from dgpo_fast.flow.sde import SDESampler
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import ModelCall, Policy
from dgpo_fast.records import PromptBatch, Rollout, ScoredGroups
from dgpo_fast.rewards import Scores

NOISE_LEVEL = 0.7
"""Flow-GRPO's (arXiv 2505.05470)."""


def ablate(trainer: Trainer, run: Run) -> None:
    """Has a trainer of the run's recipe do what no setting says: draw DGPO's samples otherwise, or compare pairs."""
    if run.draws != "ode":
        assert isinstance(trainer.algorithm, DGPO)
        trainer.algorithm.groups = {"sde": StochasticGroups, "base": OfflineGroups}[run.draws](trainer.config)
    if run.compares_pairs:
        compare_pairs(trainer)


def compare_pairs(trainer: Trainer) -> None:
    """Gives advantages to the best and the worst of a group alone; their mean square is that of whole groups, 1."""
    score, size = trainer._score, trainer.config.groups.size

    def of_pairs(rollout: Rollout, scores: Scores) -> tuple[ScoredGroups, dict[str, Any]]:
        scored, metrics = score(rollout, scores)
        chosen_P2, teaches_P = pairs(scored.reward_B.view(-1, size))
        advantage_PG = torch.zeros(len(chosen_P2), size, device=chosen_P2.device)
        advantage_PG.scatter_(1, chosen_P2[:, :1], 1.0)
        advantage_PG.scatter_(1, chosen_P2[:, 1:], -1.0)
        advantage_PG *= (size / 2) ** 0.5 * teaches_P[:, None]
        return replace(scored, advantage_B=advantage_PG.flatten()), metrics

    trainer._score = of_pairs  # type: ignore[method-assign]


class OfflineGroups(GroupSampler):
    """Samples of the base: what is learnt from is known before learning begins."""

    def draw(self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver, check: Check) -> Rollout:
        return super().draw(policy, "ref", prompts, deliver=deliver, check=check)


class StochasticGroups(GroupSampler):
    """Samples of Flow-GRPO's SDE, whose marginals are the ODE's."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert (config.rollout.solver, config.rollout.guidance) == ("euler", 1)
        self.stochastic = SDESampler.from_config(config.rollout, noise_level=NOISE_LEVEL)

    def draw(self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver, check: Check) -> Rollout:
        noise_BCHW, drawn = initial_noise(policy, prompts, seed=self.config.seed), []
        for start in range(0, prompts.num_samples, self.config.rollout.images_per_forward):
            check()
            samples = slice(start, start + self.config.rollout.images_per_forward)
            velocity = partial(_velocity, view, policy, self._evaluations(policy, prompts, samples))
            x0_BCHW, _ = self.stochastic.sample(
                velocity, noise_BCHW[samples], self._streams(prompts, samples), kept=range(1)
            )
            drawn.append(x0_BCHW)
            deliver(x0_BCHW, prompts.prompt_of_sample[samples])
        return Rollout(prompts=prompts, x0_BCHW=torch.cat(drawn))

    @torch.no_grad()
    def _evaluations(self, policy: Policy, prompts: PromptBatch, samples: slice) -> list[ModelCall]:
        group_B = prompts.group_B[samples]
        timestep_TB = torch.tensor(self.stochastic.timesteps, device=policy.model.device)[:, None].expand(
            -1, len(group_B)
        )
        return policy.condition(timestep_TB, prompts.conditioning[group_B], engine=policy.sampling_engine)

    def _streams(self, prompts: PromptBatch, samples: slice) -> torch.Tensor:
        name = partial(rng.stream, self.config.seed, stage="sde", iteration=prompts.iteration)
        numbers = prompts.samples[samples]
        steps = range(self.config.rollout.steps)
        return torch.tensor([[name(sample=sample, timestep=step) for sample in numbers] for step in steps])


def _velocity(view: View, policy: Policy, evaluations: list[ModelCall], x_BCHW: Tensor, step: int) -> Tensor:
    return policy.velocity_at(view, x_BCHW, evaluations[step])[0]
