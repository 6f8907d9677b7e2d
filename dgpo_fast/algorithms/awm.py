"""Advantage Weighted Matching (Xue et al., arXiv 2509.25050): policy gradients of the negative denoising error.

    sample every group with an ODE solver                                                            rollout
    score them, normalise rewards to advantages A, at most 1                                   (the trainer)
    draw for each sample a sigma from each stretch of the schedule, and noise: x_t, v*               batches
    log p = -sigma (d^power - tiny^power) / power,    d = mean |v* - v_theta|^2 + tiny                   loss
    minimise -A p / p_before + kl_coef |v_theta - v_ref|^2 + old_coef |v_theta - v_old|^2                loss
    old <- average of old and policy                                                         after_iteration

Where an iteration makes one optimizer step, as the published recipes do, p_before is p and the ratio exactly 1: what is
clipped at 1 +- 1 there is never clipped. The published code samples with a multistep SDE solver, for PickScore without
noise, for GenEval with a noise of 0.4; here it is the deterministic solver of the recipe. It draws sigmas for each
micro-batch, here each sample has its own.

Shape letters: M samples of a micro-batch, C H W latents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithm_config import AWMConfig
from dgpo_fast.algorithms.base import nobody
from dgpo_fast.algorithms.forward import mean_square, target_of, velocity_of
from dgpo_fast.algorithms.group_sampler import Check, Deliver, GroupSampler
from dgpo_fast.algorithms.noised import NoisedBatches
from dgpo_fast.config import Config
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.records import LossOutput, NoisedBatch, PromptBatch, Rollout, ScoredGroups

TINY = 1e-10
"""Keeps the power's slope finite where there is no error, as published."""


class AWM:
    def __init__(self, config: Config, world: World = ALONE) -> None:
        assert isinstance(config.algorithm, AWMConfig)
        self.config, self.settings = config, config.algorithm
        self.groups = GroupSampler(config)
        self.noised = NoisedBatches(
            config, self.groups.sampler, placement_of(config, world.size), rank=world.rank, drawn="sample",
            points=self.points,
        )  # fmt: skip

    def prepare(self, policy: Policy) -> str:
        """Makes sure that adapters act, and that samples are the policy's."""
        policy.check_trained()
        return policy.check_sampling()

    def rollout(
        self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver = nobody, check: Check = nobody
    ) -> Rollout:
        return self.groups.draw(policy, view, prompts, deliver=deliver, check=check)

    def batches(self, scored: ScoredGroups, *, update: int = 0) -> Iterator[list[NoisedBatch]]:
        return self.noised.rounds(scored, update=update)

    def group_weights(self, policy: Policy, batches: object) -> None:
        """Nothing: a sample's loss needs its advantage alone."""

    def loss(self, policy: Policy, batch: NoisedBatch, weights: None) -> LossOutput:
        velocity_MCHW = velocity_of(policy, "policy", batch)
        error_M = mean_square(target_of(batch) - velocity_MCHW)
        log_likelihood_M = matching_likelihood(error_M, batch.timestep_M / 1000, power=self.settings.power)
        ratio_M = (log_likelihood_M - log_likelihood_M.detach()).exp()
        share_M, advantage_M = batch.sample_share * batch.valid_M, batch.advantage_M / self.config.advantages.clamp
        policy_loss = -(share_M * advantage_M * ratio_M).sum()
        coefficients: dict[View, float] = {"ref": self.settings.kl_coef, "old": self.settings.old_coef}
        distances = {
            view: (share_M * mean_square(velocity_MCHW - velocity_of(policy, view, batch))).sum()
            for view, coefficient in coefficients.items()
            if coefficient > 0
        }
        loss = policy_loss
        for view, distance in distances.items():
            loss = loss + coefficients[view] * distance
        measured = {"kl": distances["ref"]} if "ref" in distances else {}
        return LossOutput.of(loss, policy_loss=policy_loss, **measured)

    def after_iteration(self, policy: Policy, step: int) -> None:
        """old <- decay old + (1 - decay) policy, decay = min(max_decay, rate (step + 1))."""
        policy.average_into("old", decay=self.config.old_policy.decay_at(step + 1))

    def points(self, streams: list[rng.Stream]) -> Tensor:
        """For each stream a point of each stretch of the trained ones, of which there are T: int64 [streams, T]."""
        trained, number = self.settings.trained_points, self.settings.train_timesteps
        bound_T = torch.linspace(trained.start, trained.stop, number + 1, dtype=torch.float64).long()
        share_ST = rng.random_words(streams, number).double() / 2**32
        return bound_T[:-1] + (share_ST * bound_T.diff()).long()


def matching_likelihood(error_M: Tensor, sigma_M: Tensor, *, power: float) -> Tensor:
    """What stands for log p of each sample: -sigma ((d + tiny)^power - tiny^power) / power, float64."""
    least: float = TINY**power
    return -sigma_M.double() * ((error_M.double() + TINY).pow(power) - least) / power
