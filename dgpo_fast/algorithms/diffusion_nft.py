"""DiffusionNFT (Zheng et al., arXiv 2509.16117): a flow-matching loss of an implicit positive and negative policy.

    sample every group from the old policy with an ODE solver                                       rollout
    score them, normalise rewards to advantages A;  r = clamp(1/2 + A / (2 A_max), 0, 1)      (the trainer)
    draw sigmas and noise for each sample: x_t, v*                                                  batches
    v+ = beta v_theta + (1 - beta) v_old,    v- = (1 + beta) v_old - beta v_theta                      loss
    minimise A_max (r |x_0(v+) - x_0|^2 / w+ + (1 - r) |x_0(v-) - x_0|^2 / w-) / beta
             + kl_coef |v_theta - v_ref|^2,    w = mean |x_0(v) - x_0|                                  loss
    old <- average of old and policy                                                        after_iteration

With x_0(v) = x_t - sigma v, the error x_0(v) - x_0 is sigma (v* - v). Source of w, A_max and the averages: the code its
authors published.

Shape letters: M samples of a micro-batch, C H W latents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dgpo_fast.algorithm_config import DiffusionNFTConfig
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

MIN_WEIGHT = 1e-5
"""Of w, as published."""


class DiffusionNFT:
    def __init__(self, config: Config, world: World = ALONE) -> None:
        assert isinstance(config.algorithm, DiffusionNFTConfig)
        self.config, self.settings = config, config.algorithm
        self.groups = GroupSampler(config)
        self.noised = NoisedBatches(
            config, self.groups.sampler, placement_of(config, world.size), rank=world.rank, drawn="sample"
        )

    def prepare(self, policy: Policy) -> str:
        """Makes sure that adapters act, and that samples are the old policy's."""
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
        beta, highest = self.settings.beta, self.config.advantages.clamp
        target_MCHW, sigma_M = target_of(batch), batch.timestep_M / 1000
        old_MCHW = velocity_of(policy, "old", batch)
        velocity_MCHW = velocity_of(policy, "policy", batch)
        positive_M = weighted_error(target_MCHW - (beta * velocity_MCHW + (1 - beta) * old_MCHW), sigma_M)
        negative_M = weighted_error(target_MCHW - ((1 + beta) * old_MCHW - beta * velocity_MCHW), sigma_M)
        optimality_M = (batch.advantage_M / (2 * highest) + 0.5).clamp(0, 1)
        share_M = batch.sample_share * batch.valid_M
        policy_loss = highest / beta * (share_M * (optimality_M * positive_M + (1 - optimality_M) * negative_M)).sum()
        loss, measured = policy_loss, {}
        if self.settings.kl_coef > 0:
            kl = (share_M * mean_square(velocity_MCHW - velocity_of(policy, "ref", batch))).sum()
            loss, measured = policy_loss + self.settings.kl_coef * kl, {"kl": kl}
        return LossOutput.of(loss, policy_loss=policy_loss, **measured)

    def after_iteration(self, policy: Policy, step: int) -> None:
        """old <- decay old + (1 - decay) policy, decay = min(max_decay, rate (step + 1))."""
        policy.average_into("old", decay=self.config.old_policy.decay_at(step + 1))


def weighted_error(error_MCHW: Tensor, sigma_M: Tensor) -> Tensor:
    """The squared error of x_0 over its mean absolute error, which is a constant, from the velocity's error: [M]."""
    weight_M = (sigma_M * error_MCHW.detach().abs().flatten(1).mean(1, dtype=torch.float64)).clamp(min=MIN_WEIGHT)
    return (sigma_M.square() * mean_square(error_MCHW) / weight_M).float()
