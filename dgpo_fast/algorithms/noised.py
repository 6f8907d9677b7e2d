"""Micro-batches of an iteration for methods that learn in the forward process: latents, noised at training sigmas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.flow.rollout import Sampler, model_timesteps
from dgpo_fast.ops.flow_interpolate import flow_interpolate
from dgpo_fast.parallel.placement import Placement
from dgpo_fast.records import NoisedBatch, PromptBatch, ScoredGroups


class _Pass(NamedTuple):
    """What this rank's samples are noised by in one of an iteration's passes, on the device."""

    streams: Tensor  # int64 [..., 4], of the noise of all groups, or of each sample
    sigma_B: Tensor  # float64
    timestep_B: Tensor  # float32, what the model is told


class NoisedBatches:
    """Draws sigmas and noise: the same sigmas for all and a noise for each group, or both for each sample.

    They are named by the iteration, the group, the sigma and perhaps the sample, so any number of ranks draws the same.

    Args:
        rank: this one.
        guides_reference: whether batches carry the empty prompt.
        drawn: whether a group shares sigmas and noise, or each sample has its own.
        points: gives the points of the schedule that are trained at, [streams, passes], one row for each stream; None
            for `train_timesteps` of `trained_points`, without replacement.
    """

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        placement: Placement,
        *,
        rank: int,
        guides_reference: bool = False,
        drawn: Literal["group", "sample"] = "group",
        points: Callable[[list[rng.Stream]], Tensor] | None = None,
    ) -> None:
        if points is None and config.algorithm.trained_points is None:
            raise UserError(
                f"algorithm {config.algorithm.name}: its trained_points are None: NoisedBatches needs points"
            )
        self.config, self.placement, self.rank = config, placement, rank
        self._guides_reference, self._drawn, self._points = guides_reference, drawn, points or self._chosen_points
        # Of each point of the schedule.
        timestep_P = torch.tensor(model_timesteps(sampler.sigmas, config.rollout.timesteps), dtype=torch.float64)
        exact = config.rollout.timesteps == "float"
        self._sigma_P = torch.from_numpy(sampler.sigmas) if exact else timestep_P / 1000
        self._timestep_P = timestep_P.float()

    def rounds(self, scored: ScoredGroups, *, update: int = 0) -> Iterator[list[NoisedBatch]]:
        """This rank's micro-batches of an optimizer step, in rounds that close their groups, sigma after sigma."""
        prompts, placement = scored.rollout.prompts, self.placement
        num_steps = prompts.num_samples // placement.micro // self.config.optimizer.steps_per_iteration
        # All before the first: a copy to the device waits for what that still has to do.
        passes = [self._pass(prompts, each, device=scored.reward_B.device) for each in self.points(prompts).unbind(1)]
        for now in passes:
            for first in range(update * num_steps, (update + 1) * num_steps, placement.steps_per_round):
                steps = range(first, first + placement.steps_per_round)
                groups = placement.groups(steps, rank=self.rank)
                yield [self._batch(scored, update, now, step, groups) for step in steps]

    def points(self, prompts: PromptBatch) -> Tensor:
        """The points of the schedule that this rank's samples are trained at, a pass in each column: int64 [B, passes].

        Where groups share their sigmas, all samples of the iteration do.
        """
        name = partial(rng.stream, self.config.seed, stage="timesteps", iteration=prompts.iteration)
        if self._drawn == "group":
            return self._points([name()]).expand(prompts.num_samples, -1)
        return self._points([name(group=group, sample=sample) for group, sample in prompts.numbers()])

    def _pass(self, prompts: PromptBatch, point_B: Tensor, *, device: torch.device) -> _Pass:
        return _Pass(
            streams=self._noise_streams(prompts, point_B).to(device),
            sigma_B=self._sigma_P[point_B].to(device),
            timestep_B=self._timestep_P[point_B].to(device),
        )

    def _batch(self, scored: ScoredGroups, update: int, now: _Pass, step: int, groups: range) -> NoisedBatch:
        """The micro-batch of a micro-step of this rank's, in the round of which these are the groups."""
        config, prompts = self.config, scored.rollout.prompts
        micro, device = self.placement.micro, scored.reward_B.device
        mine = slice(step * micro, (step + 1) * micro)
        row_M, valid_M = prompts.group_B[mine], scored.valid_B[mine]
        group_M = prompts.group_id_B[mine] - groups.start
        if self._drawn == "group":
            noise_M, streams_N4 = group_M, now.streams[groups.start : groups.stop]
        else:
            noise_M, streams_N4 = torch.arange(micro, device=device), now.streams[mine]
        # What could not be scored may not be finite either, and then a weight of zero would not keep it out.
        x0_MCHW = scored.rollout.x0_BCHW[mine].where(valid_M[:, None, None, None], 0.0)
        noisy = flow_interpolate(x0_MCHW, now.sigma_B[mine], streams=streams_N4, group_B=noise_M, with_target=False)
        return NoisedBatch(
            x_t_MCHW=noisy.x_t,
            x0_MCHW=x0_MCHW,
            streams_N4=streams_N4,
            noise_M=noise_M,
            timestep_M=now.timestep_B[mine],
            conditioning=prompts.conditioning[row_M],
            unconditional=prompts.unconditional if self._guides_reference else None,
            advantage_M=scored.advantage_B[mine],
            valid_M=valid_M,
            group_M=group_M,
            group_size_G=scored.group_size_G[groups.start : groups.stop],
            group_share=1 / (scored.num_groups[update] * config.algorithm.passes),
            sample_share=1 / (scored.num_valid[update] * config.algorithm.passes),
        )

    def _chosen_points(self, streams: list[rng.Stream]) -> Tensor:
        points, passes = self.config.algorithm.trained_points, self.config.algorithm.passes
        assert points is not None
        return points.start + torch.tensor([rng.choice(stream, len(points), k=passes) for stream in streams])

    def _noise_streams(self, prompts: PromptBatch, point_B: Tensor) -> Tensor:
        """The words of streams of training noise, int64 [..., 4]: operators draw it where they use it.

        Those of all groups of the iteration, or those of this rank's samples.
        """
        name = partial(rng.stream, self.config.seed, stage="training noise", iteration=prompts.iteration)
        points = point_B.tolist()
        if self._drawn == "group":
            groups = range(self.config.groups.per_iteration)
            return torch.tensor([name(group=group, timestep=points[0]) for group in groups])
        of_samples = zip(prompts.numbers(), points, strict=True)
        return torch.tensor([name(group=group, sample=sample, timestep=point) for (group, sample), point in of_samples])
