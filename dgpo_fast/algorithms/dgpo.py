"""Direct Group Preference Optimization (Luo, Hu, Tang, arXiv 2510.08425, ICLR 2026), its Algorithm 1.

    for each prompt: sample a group of images with an ODE solver      rollout
    score them, normalise rewards to advantages A                     (the trainer)
    draw sigma and noise, shared by the group: x_t, v*                batches
    d = |v* - v_theta|^2,  s_G = beta mean A (d - d_ref)              loss
    minimise softplus(s_G) / beta + kl_coef |v_theta - v_ref|^2       loss
    old <- average of old and policy                                  after_iteration

Shape letters: B samples of this rank, M of a micro-batch, G groups of a round, C H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from dgpo_fast.algorithm_config import DGPOConfig
from dgpo_fast.algorithms.base import nobody
from dgpo_fast.algorithms.group_sampler import Check, Deliver, GroupSampler
from dgpo_fast.algorithms.group_weights import is_saturated
from dgpo_fast.algorithms.noised import NoisedBatches
from dgpo_fast.algorithms.ratio import check_ratio
from dgpo_fast.config import Config
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.ops.group_preference import group_preference, group_scores
from dgpo_fast.ops.velocity_errors import VelocityErrors, velocity_errors
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.profiling import stage
from dgpo_fast.records import LossOutput, NoisedBatch, PromptBatch, Rollout, ScoredGroups


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """Velocities that a micro-batch is compared with, without gradients; None where nothing uses them."""

    old_MCHW: Tensor | None
    reference_MCHW: Tensor | None
    unconditional_MCHW: Tensor | None  # the reference's without the prompt, where kl_cfg guides it


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWeights:
    """What a piece of a cut group knows of the whole, and the anchors that went into it, so that they run once."""

    score_G: Tensor  # s_G of the whole groups
    num_pieces: int  # micro-batches that the groups lie in together, on all ranks
    anchors: Anchors
    policy_M: Tensor  # the policy's errors that made the score, without gradients


class _Groups(TypedDict):
    """A batch's groups, as the group operators take them."""

    advantage_M: Tensor
    group_M: Tensor
    size_G: Tensor
    beta: float


class DGPO:
    def __init__(self, config: Config, world: World = ALONE) -> None:
        assert isinstance(config.algorithm, DGPOConfig)
        self.config, self.settings, self.world = config, config.algorithm, world
        self.placement = placement_of(config, world.size)
        self.groups = GroupSampler(config)
        self.noised = NoisedBatches(
            config,
            self.groups.sampler,
            self.placement,
            rank=world.rank,
            guides_reference=self.settings.guides_reference,
        )
        self.ratio_errors: Literal["training", "again"] = "training"

    def prepare(self, policy: Policy) -> str:
        """Makes sure that adapters act, that samples are the policy's, and that equal policies have a ratio of 1."""
        policy.check_trained()
        scales = {} if self.settings.clip is None else {"algorithm.clip": self.settings.clip}
        if self.settings.reference == "old":
            scales["1 / algorithm.beta"] = 1 / self.settings.beta
        self.ratio_errors, line = check_ratio(policy, self.config, scales=scales, world=self.world)
        return f"{line}\n{policy.check_sampling()}"

    def rollout(
        self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver = nobody, check: Check = nobody
    ) -> Rollout:
        """A group of samples per prompt, by the deterministic solver, from a noise of its own each."""
        return self.groups.draw(policy, view, prompts, deliver=deliver, check=check)

    def batches(self, scored: ScoredGroups, *, update: int = 0) -> Iterator[list[NoisedBatch]]:
        """Rounds of noised micro-batches at each training sigma, each of which closes its groups."""
        return self.noised.rounds(scored, update=update)

    @torch.no_grad()
    def group_weights(self, policy: Policy, batches: Sequence[NoisedBatch]) -> list[GroupWeights] | None:
        """s_G of groups that are cut over the round's micro-steps, from a first pass without gradients."""
        if len(batches) == 1 and self.ratio_errors == "training":
            return None
        anchors = [self._anchors(policy, batch) for batch in batches]
        scores, policy_errors = [], []
        for batch, anchor in zip(batches, anchors, strict=True):
            with stage("weights"):
                errors = self._errors(self._policy_velocity(policy, batch), anchor, batch)
            scores.append(group_scores(errors.policy_M, self._reference_error(errors), **self._groups(batch)))
            policy_errors.append(errors.policy_M)
        score_G, num_pieces = self._whole(torch.stack(scores).sum(0), num_pieces=len(batches))
        return [
            GroupWeights(score_G=score_G, num_pieces=num_pieces, anchors=anchor, policy_M=policy_M)
            for anchor, policy_M in zip(anchors, policy_errors, strict=True)
        ]

    def loss(self, policy: Policy, batch: NoisedBatch, weights: GroupWeights | None) -> LossOutput:
        """softplus(s_G) / beta and the KL term; the gradient of groups in pieces is the surrogate's: it is the same."""
        anchors = self._anchors(policy, batch) if weights is None else weights.anchors
        with stage("policy"):
            velocity_MCHW = self._policy_velocity(policy, batch)
        errors = self._errors(velocity_MCHW, anchors, batch)
        old_M = errors.old_M
        if weights is not None and old_M is not None and self.ratio_errors == "again":
            # As far from these errors as from those without gradients: the ratio is theirs, and exact where it is 1.
            old_M = old_M + (errors.policy_M.detach() - weights.policy_M)
        reference_M, groups, score_G, num_pieces = self._reference_error(errors), self._groups(batch), None, 1
        if weights is not None:
            score_G, num_pieces = weights.score_G, weights.num_pieces
        elif self.placement.case == "b":
            score_G, num_pieces = self._whole(group_scores(errors.policy_M, reference_M, **groups), num_pieces=1)
        preference = group_preference(
            errors.policy_M, reference_M, **groups, score_G=score_G, old_error_M=old_M, clip=self.settings.clip
        )
        # Groups that do not count have a score of zero, but no part in the mean.
        uncounted = math.log(2) / self.settings.beta * (~batch.counts_G).sum()
        objective, surrogate = preference.objective - uncounted, preference.surrogate.detach()
        if score_G is not None:
            objective = objective.detach() / num_pieces + (preference.surrogate - surrogate)
        dgpo_loss = batch.group_share * objective
        kl = batch.sample_share * self._kl(errors, batch)
        loss = dgpo_loss + self.settings.kl_coef * kl
        share_M = batch.sample_share * batch.valid_M
        metrics = {
            "dgpo_loss": dgpo_loss,
            "surrogate_loss": batch.group_share * surrogate,
            "clip_fraction": (share_M * preference.clipped_M).sum(),
            "group_weight_mean": (share_M * preference.weight_G[batch.group_M]).sum(),
            "group_weight_saturation": (share_M * is_saturated(preference.weight_G)[batch.group_M]).sum(),
        }
        if errors.distance_M is not None:
            metrics["kl"] = kl
        return LossOutput.of(loss, **metrics)

    def after_iteration(self, policy: Policy, step: int) -> None:
        """old <- decay old + (1 - decay) policy, decay = min(max_decay, rate step)."""
        policy.average_into("old", decay=self.config.old_policy.decay_at(step))

    def _whole(self, score_G: Tensor, *, num_pieces: int) -> tuple[Tensor, int]:
        """Scores of pieces summed over the ranks that a group may lie on, and how many pieces these have together."""
        if self.placement.case == "a":
            return score_G, num_pieces
        with stage("group sums"):
            return self.world.sum(score_G), num_pieces * self.world.size

    def _policy_velocity(self, policy: Policy, batch: NoisedBatch) -> Tensor:
        return policy.velocity("policy", batch.x_t_MCHW, batch.timestep_M, batch.conditioning)[0]

    @torch.no_grad()
    def _anchors(self, policy: Policy, batch: NoisedBatch) -> Anchors:
        """Reference and old velocities, each in the policy's own batch shape: kernels, and so bits, depend on it."""
        old, reference, unconditional = None, None, None
        inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning)
        if self.settings.asks_base:
            with stage("reference"):
                reference, unconditional = policy.velocity("ref", *inputs, batch.unconditional)
        if self.settings.asks_old:
            with stage("old"):
                old = policy.velocity("old", *inputs)[0]
        return Anchors(old_MCHW=old, reference_MCHW=reference, unconditional_MCHW=unconditional)

    def _errors(self, velocity_MCHW: Tensor, anchors: Anchors, batch: NoisedBatch) -> VelocityErrors:
        return velocity_errors(
            velocity_MCHW, x0=batch.x0_MCHW, streams=batch.streams_N4, group_M=batch.noise_M, old=anchors.old_MCHW,
            reference=anchors.reference_MCHW, unconditional=anchors.unconditional_MCHW, guidance=self.settings.kl_cfg,
        )  # fmt: skip

    def _reference_error(self, errors: VelocityErrors) -> Tensor:
        error_M = errors.old_M if self.settings.reference == "old" else errors.reference_M
        assert error_M is not None
        return error_M

    def _groups(self, batch: NoisedBatch) -> _Groups:
        return {
            "advantage_M": batch.advantage_M, "group_M": batch.group_M, "size_G": batch.group_size_G.clamp(min=1),
            "beta": self.settings.beta,
        }  # fmt: skip

    def _kl(self, errors: VelocityErrors, batch: NoisedBatch) -> Tensor:
        """Sum over valid samples of the mean squared distance to the reference's velocity."""
        if errors.distance_M is None:
            return errors.policy_M.new_zeros(())
        return (errors.distance_M * batch.valid_M).sum()
