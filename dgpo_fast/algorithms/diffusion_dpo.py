"""Diffusion-DPO (Wallace et al., arXiv 2311.12908), online: of every group the best sample against the worst.

    sample every group with an ODE solver, score it                                      rollout, the trainer
    of each group take the best and the worst; draw sigma and noise that the pair shares: x_t, v*     batches
    d = mean |v* - v_theta|^2,    s = beta / 2 ((d - d_ref) of the best - that of the worst)             loss
    minimise -log sigmoid(-s) = softplus(s)                                                              loss
    perhaps, now and then, the reference becomes the policy                                    after_iteration

That is DGPO's score of a group of two with advantages 1 and -1, and is computed by the same operators. Sigmas are drawn
from a logit-normal distribution and shifted as the rollout's are, each pair's for itself, as in the code that the
authors of Flow-GRPO published. It samples by an SDE, through the reference; here the policy draws, by the recipe's ODE
solver. It trains on pairs of equal rewards as they come; here they keep their place with weight zero.

Shape letters: M samples of a micro-batch, P pairs, C H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithm_config import DiffusionDPOConfig
from dgpo_fast.algorithms.base import nobody
from dgpo_fast.algorithms.group_sampler import Check, Deliver, GroupSampler
from dgpo_fast.algorithms.group_weights import is_saturated
from dgpo_fast.config import Config
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.ops.flow_interpolate import flow_interpolate
from dgpo_fast.ops.group_preference import group_preference
from dgpo_fast.ops.velocity_errors import velocity_errors
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.profiling import stage
from dgpo_fast.records import LossOutput, NoisedBatch, PromptBatch, Rollout, ScoredGroups


class DiffusionDPO:
    def __init__(self, config: Config, world: World = ALONE) -> None:
        assert isinstance(config.algorithm, DiffusionDPOConfig)
        self.config, self.settings = config, config.algorithm
        self.pairs_at_once = config.optimizer.images_per_micro_batch // 2
        self.groups = GroupSampler(config)

    def prepare(self, policy: Policy) -> str:
        """Makes sure that adapters act, and that samples are the policy's."""
        policy.check_trained()
        return policy.check_sampling()

    def rollout(
        self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver = nobody, check: Check = nobody
    ) -> Rollout:
        return self.groups.draw(policy, view, prompts, deliver=deliver, check=check)

    def batches(self, scored: ScoredGroups, *, update: int = 0) -> Iterator[list[NoisedBatch]]:
        """Micro-batches of pairs, the best sample before the worst, one to a round. None, where all groups are tied."""
        if scored.num_advantaged[update] == 0:
            return
        prompts, updates = scored.rollout.prompts, self.config.optimizer.steps_per_iteration
        chosen_P2, teaches_P = pairs(scored.reward_B.view(-1, prompts.group_size))
        share = 1 / (scored.num_groups[update] * self.settings.passes)
        chosen_P2 += torch.arange(len(chosen_P2), device=chosen_P2.device)[:, None] * prompts.group_size
        num_pairs = len(chosen_P2) // updates
        for number in range(self.settings.passes):
            for first in range(update * num_pairs, (update + 1) * num_pairs, self.pairs_at_once):
                here = slice(first, min(first + self.pairs_at_once, (update + 1) * num_pairs))
                groups = prompts.group_ids[here]
                yield [self._batch(scored, chosen_P2[here], teaches_P[here], groups, number, share)]

    def group_weights(self, policy: Policy, batches: object) -> None:
        """Nothing: a micro-batch has both of every pair."""

    def loss(self, policy: Policy, batch: NoisedBatch, weights: None) -> LossOutput:
        inputs, compared = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning), self.reference
        with stage("reference" if compared == "ref" else "old"), torch.no_grad():
            reference_MCHW = policy.velocity(compared, *inputs)[0]
        with stage("policy"):
            velocity_MCHW = policy.velocity("policy", *inputs)[0]
        errors = velocity_errors(
            velocity_MCHW, x0=batch.x0_MCHW, streams=batch.streams_N4, group_M=batch.noise_M, reference=reference_MCHW
        )
        assert errors.reference_M is not None and errors.distance_M is not None
        preference = group_preference(
            errors.policy_M, errors.reference_M, advantage_M=batch.advantage_M, group_M=batch.group_M,
            size_G=batch.group_size_G.clamp(min=1), beta=self.settings.beta,
        )  # fmt: skip
        # Pairs of groups that do not count have a score of zero, but no part in the mean.
        uncounted = math.log(2) / self.settings.beta * (~batch.counts_G).sum()
        loss = batch.group_share * self.settings.beta * (preference.objective - uncounted)
        metrics = {
            "policy_loss": loss, "kl": (batch.sample_share * batch.valid_M * errors.distance_M).sum(),
            "group_weight_mean": batch.group_share * (preference.weight_G * batch.counts_G).sum(),
            "group_weight_saturation": batch.group_share * (is_saturated(preference.weight_G) * batch.counts_G).sum(),
        }  # fmt: skip
        return LossOutput.of(loss, **metrics)

    def after_iteration(self, policy: Policy, step: int) -> None:
        """Every `refresh_every` steps, once their iteration is over, the reference becomes the policy."""
        every, updates = self.settings.refresh_every, self.config.optimizer.steps_per_iteration
        if every is not None and (step + 1) % every < updates:
            policy.average_into("old", decay=0.0)

    @property
    def reference(self) -> View:
        return "ref" if self.settings.refresh_every is None else "old"

    def _batch(
        self,
        scored: ScoredGroups,
        chosen_P2: Tensor,
        teaches_P: Tensor,
        groups: tuple[int, ...],
        number: int,
        share: float,
    ) -> NoisedBatch:
        config, prompts, device = self.config, scored.rollout.prompts, chosen_P2.device
        name = partial(rng.stream, config.seed, iteration=prompts.iteration, timestep=number)
        drawn_P = rng.normal([name(stage="timesteps", group=group) for group in groups], [], device=device)
        noise_level_P = 1 - drawn_P.double().sigmoid()
        sigma_P = config.rollout.shift * noise_level_P / (1 + (config.rollout.shift - 1) * noise_level_P)
        streams_P4 = torch.tensor([name(stage="training noise", group=group) for group in groups], device=device)
        pair_M, chosen_M = torch.arange(len(groups), device=device).repeat_interleave(2), chosen_P2.flatten()
        x0_MCHW = scored.rollout.x0_BCHW[chosen_M].where(teaches_P[pair_M][:, None, None, None], 0.0)
        noisy = flow_interpolate(x0_MCHW, sigma_P[pair_M], streams=streams_P4, group_B=pair_M, with_target=False)
        size_P = 2.0 * (scored.group_size_G[list(groups)] > 0)
        sign_M = torch.tensor([1.0, -1.0], device=device).repeat(len(groups))
        return NoisedBatch(
            x_t_MCHW=noisy.x_t, x0_MCHW=x0_MCHW, streams_N4=streams_P4, noise_M=pair_M,
            timestep_M=(1000 * sigma_P[pair_M]).float(),
            conditioning=prompts.conditioning[prompts.group_B[chosen_M]], unconditional=None,
            advantage_M=sign_M * teaches_P[pair_M], valid_M=teaches_P[pair_M], group_M=pair_M,
            group_size_G=size_P, group_share=share, sample_share=share / 2,
        )  # fmt: skip


def pairs(reward_PG: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst of each group, int64 [P, 2], and whether they differ, bool [P]; NaN is neither."""
    is_valid_PG = reward_PG.isfinite()
    best_P = reward_PG.where(is_valid_PG, -torch.inf).argmax(1)
    worst_P = reward_PG.where(is_valid_PG, torch.inf).argmin(1)
    chosen_P2 = torch.stack([best_P, worst_P], dim=1)
    of_pair_P2 = reward_PG.gather(1, chosen_P2)
    return chosen_P2, of_pair_P2[:, 0] > of_pair_P2[:, 1]
