"""Micro-batches of an iteration for methods that learn in the forward process: latents, noised at training sigmas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.config import Config
from dgpo_fast.flow.rollout import Sampler, model_timesteps
from dgpo_fast.ops.flow_interpolate import flow_interpolate
from dgpo_fast.parallel.placement import Placement
from dgpo_fast.records import NoisedBatch, PromptBatch, ScoredGroups


class NoisedBatches:
    """Draws sigmas and noise: the same sigmas for every group, and a noise for each group, or for each sample.

    Both are named by the iteration, the group, the sigma and perhaps the sample, so any number of ranks draws the same.

    Args:
        rank: this one.
        guides_reference: whether batches carry the empty prompt.
        noise: what has a noise of its own.
        points: which points of the schedule an iteration trains at; None for `train_timesteps` of `trained_points`,
            without replacement.
    """

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        placement: Placement,
        *,
        rank: int,
        guides_reference: bool = False,
        noise: Literal["group", "sample"] = "group",
        points: Callable[[int], list[int]] | None = None,
    ) -> None:
        self.config, self.sampler, self.placement, self.rank = config, sampler, placement, rank
        self._guides_reference, self._noise, self._points = guides_reference, noise, points or self._chosen_points

    def rounds(self, scored: ScoredGroups, *, update: int = 0) -> Iterator[list[NoisedBatch]]:
        """This rank's micro-batches of an optimizer step, in rounds that close their groups, sigma after sigma."""
        prompts, placement = scored.rollout.prompts, self.placement
        num_steps = prompts.num_samples // placement.micro // self.config.optimizer.steps_per_iteration
        for point in self._points(prompts.iteration):
            streams = self._noise_streams(prompts, point).to(scored.reward_B.device)
            for first in range(update * num_steps, (update + 1) * num_steps, placement.steps_per_round):
                steps = range(first, first + placement.steps_per_round)
                groups = placement.groups(steps, rank=self.rank)
                yield [self._batch(scored, update, point, step, groups, streams) for step in steps]

    def _batch(
        self, scored: ScoredGroups, update: int, point: int, step: int, groups: range, streams: Tensor
    ) -> NoisedBatch:
        """The micro-batch of a micro-step of this rank's, in the round of which these are the groups."""
        prompts, (sigma, timestep) = scored.rollout.prompts, self._training_sigma(point)
        config, micro, device = self.config, self.placement.micro, scored.reward_B.device
        mine = slice(step * micro, (step + 1) * micro)
        row_M, valid_M = prompts.group_B[mine], scored.valid_B[mine]
        if self._noise == "group":
            group_M = torch.tensor(prompts.group_ids, device=device)[row_M] - groups.start
            streams_G4 = streams[groups.start : groups.stop]
        else:
            group_M, streams_G4 = torch.arange(micro, device=device), streams[mine]
        # What could not be scored may not be finite either, and then a weight of zero would not keep it out.
        x0_MCHW = scored.rollout.x0_BCHW[mine].where(valid_M[:, None, None, None], 0.0)
        sigma_M = x0_MCHW.new_full(valid_M.shape, sigma, dtype=torch.float64)
        noisy = flow_interpolate(x0_MCHW, sigma_M, streams=streams_G4, group_B=group_M, with_target=False)
        return NoisedBatch(
            x_t_MCHW=noisy.x_t,
            x0_MCHW=x0_MCHW,
            streams_G4=streams_G4,
            timestep_M=x0_MCHW.new_full(valid_M.shape, timestep),
            conditioning=prompts.conditioning[row_M],
            unconditional=prompts.unconditional if self._guides_reference else None,
            advantage_M=scored.advantage_B[mine],
            valid_M=valid_M,
            group_M=group_M,
            group_size_G=scored.group_size_G[groups.start : groups.stop],
            group_share=1 / (scored.num_groups[update] * config.algorithm.passes),
            sample_share=1 / (scored.num_valid[update] * config.algorithm.passes),
        )

    def _chosen_points(self, iteration: int) -> list[int]:
        name = rng.stream(self.config.seed, stage="timesteps", iteration=iteration)
        points = self.config.algorithm.trained_points
        return [points[place] for place in rng.choice(name, len(points), k=self.config.algorithm.passes)]

    def _training_sigma(self, index: int) -> tuple[float, float]:
        """The training sigma and what the model is told, of a point of the schedule."""
        timesteps = model_timesteps(self.sampler.sigmas, self.config.rollout.timesteps)
        exact = self.config.rollout.timesteps == "float"
        return (float(self.sampler.sigmas[index]) if exact else timesteps[index] / 1000), timesteps[index]

    def _noise_streams(self, prompts: PromptBatch, point: int) -> Tensor:
        """The words of streams of training noise, int64 [..., 4]: operators draw it where they use it.

        Those of all groups of the iteration, or those of this rank's samples.
        """
        name = partial(
            rng.stream, self.config.seed, stage="training noise", iteration=prompts.iteration, timestep=point
        )
        if self._noise == "group":
            return torch.tensor([name(group=group) for group in range(self.config.groups.per_iteration)])
        numbers = (divmod(number, prompts.group_size) for number in prompts.samples)
        return torch.tensor([name(group=group, sample=sample) for group, sample in numbers])
