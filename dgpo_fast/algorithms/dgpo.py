"""Direct Group Preference Optimization (Luo, Hu, Tang, arXiv 2510.08425, ICLR 2026), its Algorithm 1.

    for each prompt: sample a group of images with an ODE solver      rollout
    score them, normalise rewards to advantages A                     (the trainer)
    draw sigma and noise, shared by the group: x_t, v*                batches
    d = |v* - v_theta|^2,  s_G = beta mean A (d - d_ref)              loss
    minimise softplus(s_G) / beta + kl_coef |v_theta - v_ref|^2       loss
    old <- average of old and policy                                  after_step

Shape letters: B samples of this rank, M of a micro-batch, G groups, C H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.config import Config
from dgpo_fast.flow.rollout import Sampler, model_timesteps, sample_latents
from dgpo_fast.models.policy import Policy, View
from dgpo_fast.ops.group_preference import (
    clipped_samples,
    group_preference,
    group_scores,
    velocity_errors,
    weighted_errors,
)
from dgpo_fast.profiling import stage
from dgpo_fast.records import DGPOBatch, LossOutput, PromptBatch, Rollout, ScoredGroups


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """What a micro-batch is compared with, without gradients."""

    reference_velocity_MCHW: Tensor | None  # guided by kl_cfg; None where neither KL term nor group score uses it
    reference_error_M: Tensor  # float32
    old_error_M: Tensor | None  # float32; None where nothing uses it


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWeights:
    """The weights of a round's groups, and the anchors that went into them, so that they are computed once."""

    weight_G: Tensor  # sigmoid(s_G) of the whole groups
    objective: Tensor  # an equal share of their softplus(s_G) / beta for each micro-batch, so that the shares add up
    anchors: Anchors


class DGPO:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings = config.algorithm
        self.sampler = Sampler.from_config(config.rollout)

    def rollout(self, policy: Policy, prompts: PromptBatch, *, check: Callable[[], None] = lambda: None) -> Rollout:
        """A group of images per prompt, by the deterministic solver, from a noise of its own each."""
        per_forward = self.config.rollout.images_per_forward
        view: View = "policy" if prompts.iteration < self.config.rollout.switch_step else "old"
        x0_BCHW = sample_latents(
            policy, view, self.sampler, self._rollout_noise(policy, prompts), prompts.conditioning[prompts.group_B],
            prompts.unconditional if self.config.rollout.guidance > 1 else None, images_per_forward=per_forward,
            check=check,
        )  # fmt: skip
        images_BCHW = policy.model.decode(x0_BCHW, images_per_forward=per_forward)
        return Rollout(prompts=prompts, x0_BCHW=x0_BCHW, images_BCHW=images_BCHW, sigmas=self.sampler.sigmas)

    def batches(self, scored: ScoredGroups) -> Iterator[list[DGPOBatch]]:
        """Rounds of micro-batches at each training sigma; samples are ordered by group, so at most one is open."""
        prompts, x0_BCHW = scored.rollout.prompts, scored.rollout.x0_BCHW
        micro, size = self.config.optimizer.images_per_micro_batch, prompts.group_size
        per_round = max(micro, size)
        for timestep_index in self._training_timesteps(prompts.iteration):
            sigma, timestep = self._training_sigma(timestep_index)
            noise_GCHW = self._shared_noise(prompts, timestep_index, x0_BCHW)
            for first in range(0, prompts.num_samples, per_round):
                pieces = torch.arange(first, first + per_round, device=x0_BCHW.device).split(micro)
                yield [self._batch(scored, noise_GCHW, sigma, timestep, first, index_M) for index_M in pieces]

    @torch.no_grad()
    def group_weights(self, policy: Policy, batches: Sequence[DGPOBatch]) -> list[GroupWeights] | None:
        """sigmoid(s_G) of groups that are cut over the round's micro-batches, from a first pass without gradients."""
        if len(batches) == 1:
            return None
        anchors = [self._anchors(policy, batch) for batch in batches]
        scores = []
        for batch, anchor in zip(batches, anchors, strict=True):
            with stage("weights"):
                error_M = velocity_errors(self._policy_velocity(policy, batch), batch.target_MCHW)
            scores.append(
                group_scores(
                    error_M, anchor.reference_error_M, batch.advantage_M, batch.group_M, batch.group_size_G,
                    beta=self.settings.beta,
                )
            )  # fmt: skip
        score_G = torch.stack(scores).sum(0)
        weight_G, share = torch.sigmoid(score_G), F.softplus(score_G).sum() / self.settings.beta / len(batches)
        return [GroupWeights(weight_G=weight_G, objective=share, anchors=anchor) for anchor in anchors]

    def loss(self, policy: Policy, batch: DGPOBatch, weights: GroupWeights | None) -> LossOutput:
        """softplus(s_G) / beta and the KL term; the gradient of a cut group is its surrogate's, which is the same."""
        anchors = self._anchors(policy, batch) if weights is None else weights.anchors
        with stage("policy"):
            velocity_MCHW = self._policy_velocity(policy, batch)
        error_M = velocity_errors(velocity_MCHW, batch.target_MCHW)
        clipped_M = self._clipped(error_M, anchors, batch)
        groups = (batch.advantage_M, batch.group_M, batch.group_size_G)
        if weights is None:
            preference = group_preference(
                error_M, anchors.reference_error_M, *groups, beta=self.settings.beta, clipped_M=clipped_M
            )
            objective, surrogate, weight_G = preference.objective, preference.surrogate, preference.weight_G
        else:
            weight_G = weights.weight_G
            errors = weighted_errors(error_M, *groups, weight_G, clipped_M=clipped_M)
            surrogate = errors.detach()
            objective = weights.objective + (errors - surrogate)
        dgpo_loss = batch.group_share * objective
        kl = batch.sample_share * self._kl(velocity_MCHW, anchors, batch)
        loss = dgpo_loss + self.settings.kl_coef * kl
        share_M = batch.sample_share * batch.valid_M
        metrics = {
            "loss": loss,
            "dgpo_loss": dgpo_loss,
            "surrogate_loss": batch.group_share * surrogate,
            "kl": kl,
            "clip_fraction": (share_M * clipped_M).sum(),
            "group_weight_mean": (share_M * weight_G[batch.group_M]).sum(),
        }
        return LossOutput(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})

    def after_step(self, policy: Policy, step: int) -> None:
        """old <- decay old + (1 - decay) policy, decay = min(max_decay, rate step)."""
        average = self.config.old_policy
        policy.average_into("old", decay=min(average.max_decay, average.rate * step))

    def _training_timesteps(self, iteration: int) -> list[int]:
        name = rng.stream(self.config.seed, stage="timesteps", iteration=iteration)
        return rng.choice(name, self.settings.trunc + 1, k=self.settings.train_timesteps)

    def _training_sigma(self, index: int) -> tuple[float, float]:
        """The training sigma and what the model is told, of a point of the schedule."""
        timesteps = model_timesteps(self.sampler.sigmas, self.config.rollout.timesteps)
        exact = self.config.rollout.timesteps == "float"
        return (float(self.sampler.sigmas[index]) if exact else timesteps[index] / 1000), timesteps[index]

    def _rollout_noise(self, policy: Policy, prompts: PromptBatch) -> Tensor:
        names = [
            rng.stream(self.config.seed, stage="rollout", iteration=prompts.iteration, group=group, sample=sample)
            for group in prompts.group_ids
            for sample in range(prompts.group_size)
        ]
        return rng.normal(names, policy.model.latent_shape, device=policy.model.device)

    def _shared_noise(self, prompts: PromptBatch, timestep_index: int, like: Tensor) -> Tensor:
        names = [
            rng.stream(
                self.config.seed,
                stage="training noise",
                iteration=prompts.iteration,
                group=group,
                timestep=timestep_index,
            )
            for group in prompts.group_ids
        ]
        return rng.normal(names, like.shape[1:], device=like.device)

    def _batch(
        self, scored: ScoredGroups, noise_GCHW: Tensor, sigma: float, timestep: float, first: int, index_M: Tensor
    ) -> DGPOBatch:
        prompts = scored.rollout.prompts
        group_M, first_group = index_M // prompts.group_size, first // prompts.group_size
        last_group = (first + max(len(index_M), prompts.group_size) - 1) // prompts.group_size
        valid_M, noise_MCHW = scored.valid_B[index_M], noise_GCHW[group_M]
        # What could not be scored may not be finite either, and then a weight of zero would not keep it out.
        x0_MCHW = scored.rollout.x0_BCHW[index_M].where(valid_M[:, None, None, None], 0.0)
        sizes_G = scored.valid_B.view(prompts.num_groups, -1).sum(1).clamp(min=1).float()
        num_timesteps = self.settings.train_timesteps
        return DGPOBatch(
            x_t_MCHW=torch.lerp(x0_MCHW, noise_MCHW, sigma),
            target_MCHW=noise_MCHW - x0_MCHW,
            timestep_M=x0_MCHW.new_full((len(index_M),), timestep),
            conditioning=prompts.conditioning[group_M],
            unconditional=prompts.unconditional if self.settings.kl_cfg > 1 else None,
            advantage_M=scored.advantage_B[index_M],
            valid_M=valid_M,
            group_M=group_M - first_group,
            group_size_G=sizes_G[first_group : last_group + 1],
            group_share=1 / (self.config.groups.per_iteration * num_timesteps),
            sample_share=1 / (scored.num_valid * num_timesteps),
        )

    def _policy_velocity(self, policy: Policy, batch: DGPOBatch) -> Tensor:
        return policy.velocity("policy", batch.x_t_MCHW, batch.timestep_M, batch.conditioning)[0]

    @torch.no_grad()
    def _anchors(self, policy: Policy, batch: DGPOBatch) -> Anchors:
        """Reference and old errors, each in the policy's own batch shape: kernels, and so bits, depend on it."""
        of_old, settings = self.settings.reference == "old", self.settings
        reference_velocity = old_error_M = None
        if settings.kl_coef > 0 or not of_old:
            with stage("reference"):
                inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning, batch.unconditional)
                v_cond, v_uncond = policy.velocity("ref", *inputs)
                reference_velocity = (
                    v_cond if v_uncond is None else torch.lerp(v_uncond.float(), v_cond.float(), settings.kl_cfg)
                )
        if settings.clip is not None or of_old:
            with stage("old"):
                v_old = policy.velocity("old", batch.x_t_MCHW, batch.timestep_M, batch.conditioning)[0]
                old_error_M = velocity_errors(v_old, batch.target_MCHW)
        reference_error_M = (
            old_error_M if of_old else velocity_errors(reference_velocity, batch.target_MCHW)  # type: ignore[arg-type]
        )
        assert reference_error_M is not None
        return Anchors(
            reference_velocity_MCHW=reference_velocity, reference_error_M=reference_error_M, old_error_M=old_error_M
        )

    def _clipped(self, error_M: Tensor, anchors: Anchors, batch: DGPOBatch) -> Tensor:
        if self.settings.clip is None:
            return torch.zeros_like(batch.valid_M)
        assert anchors.old_error_M is not None
        return clipped_samples(error_M, anchors.old_error_M, batch.advantage_M, self.settings.clip)

    def _kl(self, velocity_MCHW: Tensor, anchors: Anchors, batch: DGPOBatch) -> Tensor:
        """Sum over valid samples of the mean squared distance to the reference's velocity."""
        if anchors.reference_velocity_MCHW is None:
            return velocity_MCHW.new_zeros((), dtype=torch.float32)
        return (velocity_errors(velocity_MCHW, anchors.reference_velocity_MCHW.float()) * batch.valid_M).sum()
