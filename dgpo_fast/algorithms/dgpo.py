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
from typing import Literal, TypedDict

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithms.ratio import check_ratio
from dgpo_fast.config import Config
from dgpo_fast.flow.cuda_graphs import CudaGraphs
from dgpo_fast.flow.rollout import Sampler, initial_noise, model_timesteps, sample_latents
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.ops.flow_interpolate import flow_interpolate
from dgpo_fast.ops.group_preference import group_preference, group_scores
from dgpo_fast.ops.velocity_errors import VelocityErrors, velocity_errors
from dgpo_fast.profiling import stage
from dgpo_fast.records import DGPOBatch, LossOutput, PromptBatch, Rollout, ScoredGroups


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
    num_pieces: int
    anchors: Anchors
    policy_M: Tensor  # the policy's errors that made the score, without gradients


class _Groups(TypedDict):
    """A batch's groups, as the group operators take them."""

    advantage_M: Tensor
    group_M: Tensor
    size_G: Tensor
    beta: float


class DGPO:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings = config.algorithm
        self.sampler = Sampler.from_config(config.rollout)
        self.graphs = CudaGraphs() if config.rollout.cuda_graphs else None
        self.ratio_errors: Literal["training", "again"] = "training"

    def prepare(self, policy: Policy) -> str:
        """Makes sure that adapters act, that samples are the policy's, and that equal policies have a ratio of 1."""
        policy.check_trained()
        self.ratio_errors, line = check_ratio(policy, self.config)
        return f"{line}\n{policy.check_sampling()}"

    def rollout(
        self,
        policy: Policy,
        prompts: PromptBatch,
        *,
        deliver: Callable[[Tensor, Sequence[str]], None] = lambda x0_BCHW, prompts: None,
        check: Callable[[], None] = lambda: None,
    ) -> Rollout:
        """A group of samples per prompt, by the deterministic solver, from a noise of its own each."""
        view: View = "policy" if prompts.iteration < self.config.rollout.switch_step else "old"
        x0_BCHW = sample_latents(
            policy, view, self.sampler, initial_noise(policy, prompts, seed=self.config.seed),
            prompts.conditioning[prompts.group_B], prompts.unconditional if self.config.rollout.guidance > 1 else None,
            images_per_forward=self.config.rollout.images_per_forward, engine=policy.sampling_engine,
            graphs=self.graphs, check=check,
            deliver=lambda x0_BCHW, samples: deliver(x0_BCHW, prompts.prompt_of_sample[samples]),
        )  # fmt: skip
        return Rollout(prompts=prompts, x0_BCHW=x0_BCHW, sigmas=self.sampler.sigmas)

    def batches(self, scored: ScoredGroups) -> Iterator[list[DGPOBatch]]:
        """Rounds of micro-batches at each training sigma; samples are ordered by group, so at most one is open."""
        prompts, x0_BCHW = scored.rollout.prompts, scored.rollout.x0_BCHW
        micro, size = self.config.optimizer.images_per_micro_batch, prompts.group_size
        per_round = max(micro, size)
        for timestep_index in self._training_timesteps(prompts.iteration):
            sigma, timestep = self._training_sigma(timestep_index)
            streams_G4 = self._noise_streams(prompts, timestep_index).to(x0_BCHW.device)
            for first in range(0, prompts.num_samples, per_round):
                pieces = torch.arange(first, first + per_round, device=x0_BCHW.device).split(micro)
                yield [self._batch(scored, streams_G4, sigma, timestep, first, index_M) for index_M in pieces]

    @torch.no_grad()
    def group_weights(self, policy: Policy, batches: Sequence[DGPOBatch]) -> list[GroupWeights] | None:
        """s_G of groups that are cut over the round's micro-batches, from a first pass without gradients."""
        if len(batches) == 1 and self.ratio_errors == "training":
            return None
        anchors = [self._anchors(policy, batch) for batch in batches]
        scores, policy_errors = [], []
        for batch, anchor in zip(batches, anchors, strict=True):
            with stage("weights"):
                errors = self._errors(self._policy_velocity(policy, batch), anchor, batch)
            scores.append(group_scores(errors.policy_M, self._reference_error(errors), **self._groups(batch)))
            policy_errors.append(errors.policy_M)
        score_G = torch.stack(scores).sum(0)
        return [
            GroupWeights(score_G=score_G, num_pieces=len(batches), anchors=anchor, policy_M=policy_M)
            for anchor, policy_M in zip(anchors, policy_errors, strict=True)
        ]

    def loss(self, policy: Policy, batch: DGPOBatch, weights: GroupWeights | None) -> LossOutput:
        """softplus(s_G) / beta and the KL term; the gradient of a cut group is its surrogate's, which is the same."""
        anchors = self._anchors(policy, batch) if weights is None else weights.anchors
        with stage("policy"):
            velocity_MCHW = self._policy_velocity(policy, batch)
        errors = self._errors(velocity_MCHW, anchors, batch)
        old_M = errors.old_M
        if weights is not None and old_M is not None and self.ratio_errors == "again":
            # As far from these errors as from those without gradients: the ratio is theirs, and exact where it is 1.
            old_M = old_M + (errors.policy_M.detach() - weights.policy_M)
        preference = group_preference(
            errors.policy_M, self._reference_error(errors), **self._groups(batch),
            score_G=None if weights is None else weights.score_G, old_error_M=old_M, clip=self.settings.clip,
        )  # fmt: skip
        objective, surrogate = preference.objective, preference.surrogate.detach()
        if weights is not None:
            objective = objective.detach() / weights.num_pieces + (preference.surrogate - surrogate)
        dgpo_loss = batch.group_share * objective
        kl = batch.sample_share * self._kl(errors, batch)
        loss = dgpo_loss + self.settings.kl_coef * kl
        share_M = batch.sample_share * batch.valid_M
        metrics = {
            "loss": loss,
            "dgpo_loss": dgpo_loss,
            "surrogate_loss": batch.group_share * surrogate,
            "kl": kl,
            "clip_fraction": (share_M * preference.clipped_M).sum(),
            "group_weight_mean": (share_M * preference.weight_G[batch.group_M]).sum(),
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

    def _noise_streams(self, prompts: PromptBatch, timestep_index: int) -> Tensor:
        """The words of each group's stream of training noise, int64 [G, 4]: operators draw it where they use it."""
        seed, iteration = self.config.seed, prompts.iteration
        names = [
            rng.stream(seed, stage="training noise", iteration=iteration, group=group, timestep=timestep_index)
            for group in prompts.group_ids
        ]
        return torch.tensor(names)

    def _batch(
        self, scored: ScoredGroups, streams_G4: Tensor, sigma: float, timestep: float, first: int, index_M: Tensor
    ) -> DGPOBatch:
        prompts = scored.rollout.prompts
        prompt_M, first_group = index_M // prompts.group_size, first // prompts.group_size
        last_group = (first + max(len(index_M), prompts.group_size) - 1) // prompts.group_size
        mine, group_M = slice(first_group, last_group + 1), prompt_M - first_group
        valid_M = scored.valid_B[index_M]
        # What could not be scored may not be finite either, and then a weight of zero would not keep it out.
        x0_MCHW = scored.rollout.x0_BCHW[index_M].where(valid_M[:, None, None, None], 0.0)
        sizes_G = scored.valid_B.view(prompts.num_groups, -1).sum(1).clamp(min=1).float()
        num_timesteps = self.settings.train_timesteps
        sigma_M = x0_MCHW.new_full((len(index_M),), sigma, dtype=torch.float64)
        noisy = flow_interpolate(x0_MCHW, sigma_M, streams=streams_G4[mine], group_B=group_M, with_target=False)
        return DGPOBatch(
            x_t_MCHW=noisy.x_t,
            x0_MCHW=x0_MCHW,
            streams_G4=streams_G4[mine],
            timestep_M=x0_MCHW.new_full((len(index_M),), timestep),
            conditioning=prompts.conditioning[prompt_M],
            unconditional=prompts.unconditional if self.settings.kl_cfg > 1 else None,
            advantage_M=scored.advantage_B[index_M],
            valid_M=valid_M,
            group_M=group_M,
            group_size_G=sizes_G[mine],
            group_share=1 / (self.config.groups.per_iteration * num_timesteps),
            sample_share=1 / (scored.num_valid * num_timesteps),
        )

    def _policy_velocity(self, policy: Policy, batch: DGPOBatch) -> Tensor:
        return policy.velocity("policy", batch.x_t_MCHW, batch.timestep_M, batch.conditioning)[0]

    @torch.no_grad()
    def _anchors(self, policy: Policy, batch: DGPOBatch) -> Anchors:
        """Reference and old velocities, each in the policy's own batch shape: kernels, and so bits, depend on it."""
        of_old, old, reference, unconditional = self.settings.reference == "old", None, None, None
        inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning)
        if self.settings.kl_coef > 0 or not of_old:
            with stage("reference"):
                reference, unconditional = policy.velocity("ref", *inputs, batch.unconditional)
        if self.settings.clip is not None or of_old:
            with stage("old"):
                old = policy.velocity("old", *inputs)[0]
        return Anchors(old_MCHW=old, reference_MCHW=reference, unconditional_MCHW=unconditional)

    def _errors(self, velocity_MCHW: Tensor, anchors: Anchors, batch: DGPOBatch) -> VelocityErrors:
        return velocity_errors(
            velocity_MCHW, x0=batch.x0_MCHW, streams=batch.streams_G4, group_M=batch.group_M, old=anchors.old_MCHW,
            reference=anchors.reference_MCHW, unconditional=anchors.unconditional_MCHW, guidance=self.settings.kl_cfg,
        )  # fmt: skip

    def _reference_error(self, errors: VelocityErrors) -> Tensor:
        error_M = errors.old_M if self.settings.reference == "old" else errors.reference_M
        assert error_M is not None
        return error_M

    def _groups(self, batch: DGPOBatch) -> _Groups:
        return {
            "advantage_M": batch.advantage_M, "group_M": batch.group_M, "size_G": batch.group_size_G,
            "beta": self.settings.beta,
        }  # fmt: skip

    def _kl(self, errors: VelocityErrors, batch: DGPOBatch) -> Tensor:
        """Sum over valid samples of the mean squared distance to the reference's velocity."""
        if errors.distance_M is None:
            return errors.policy_M.new_zeros(())
        return (errors.distance_M * batch.valid_M).sum()
