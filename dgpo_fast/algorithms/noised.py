"""Micro-batches of an iteration for methods that learn in the forward process: latents, noised at training sigmas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.config import Config
from dgpo_fast.flow.rollout import Sampler, model_timesteps
from dgpo_fast.ops.flow_interpolate import flow_interpolate
from dgpo_fast.parallel.placement import Placement
from dgpo_fast.records import DGPOBatch, ScoredGroups


class NoisedBatches:
    """Draws sigmas and noise: the same sigmas for every group, and the same noise for the samples of one.

    Both are named by the iteration, the group and the sigma, so any number of ranks draws the same.
    """

    def __init__(self, config: Config, sampler: Sampler, placement: Placement, *, rank: int) -> None:
        self.config, self.sampler, self.placement, self.rank = config, sampler, placement, rank

    def rounds(self, scored: ScoredGroups) -> Iterator[list[DGPOBatch]]:
        """This rank's micro-batches, in rounds that close their groups, at one training sigma after the other."""
        prompts, placement, device = scored.rollout.prompts, self.placement, scored.rollout.x0_BCHW.device
        num_steps = prompts.num_samples // placement.micro
        row_B = prompts.group_B
        group_B = torch.tensor(prompts.group_ids, device=device)[row_B]
        for timestep_index in self._training_timesteps(prompts.iteration):
            streams_G4 = self._noise_streams(prompts.iteration, timestep_index).to(device)
            for first in range(0, num_steps, placement.steps_per_round):
                steps = range(first, first + placement.steps_per_round)
                groups = placement.groups(steps, rank=self.rank)
                yield [
                    self._batch(
                        scored, timestep_index, mine, row_M=row_B[mine], group_M=group_B[mine] - groups.start,
                        streams_G4=streams_G4[groups.start : groups.stop],
                        group_size_G=scored.group_size_G[groups.start : groups.stop],
                    )
                    for mine in (slice(step * placement.micro, (step + 1) * placement.micro) for step in steps)
                ]  # fmt: skip

    def _batch(
        self,
        scored: ScoredGroups,
        timestep_index: int,
        mine: slice,
        *,
        row_M: Tensor,
        group_M: Tensor,
        streams_G4: Tensor,
        group_size_G: Tensor,
    ) -> DGPOBatch:
        prompts, (sigma, timestep) = scored.rollout.prompts, self._training_sigma(timestep_index)
        algorithm, valid_M = self.config.algorithm, scored.valid_B[mine]
        # What could not be scored may not be finite either, and then a weight of zero would not keep it out.
        x0_MCHW = scored.rollout.x0_BCHW[mine].where(valid_M[:, None, None, None], 0.0)
        sigma_M = x0_MCHW.new_full(valid_M.shape, sigma, dtype=torch.float64)
        noisy = flow_interpolate(x0_MCHW, sigma_M, streams=streams_G4, group_B=group_M, with_target=False)
        return DGPOBatch(
            x_t_MCHW=noisy.x_t,
            x0_MCHW=x0_MCHW,
            streams_G4=streams_G4,
            timestep_M=x0_MCHW.new_full(valid_M.shape, timestep),
            conditioning=prompts.conditioning[row_M],
            unconditional=prompts.unconditional if algorithm.kl_cfg > 1 else None,
            advantage_M=scored.advantage_B[mine],
            valid_M=valid_M,
            group_M=group_M,
            group_size_G=group_size_G,
            group_share=1 / (self.config.groups.per_iteration * algorithm.train_timesteps),
            sample_share=1 / (scored.num_valid * algorithm.train_timesteps),
        )

    def _training_timesteps(self, iteration: int) -> list[int]:
        name = rng.stream(self.config.seed, stage="timesteps", iteration=iteration)
        return rng.choice(name, self.config.algorithm.trunc + 1, k=self.config.algorithm.train_timesteps)

    def _training_sigma(self, index: int) -> tuple[float, float]:
        """The training sigma and what the model is told, of a point of the schedule."""
        timesteps = model_timesteps(self.sampler.sigmas, self.config.rollout.timesteps)
        exact = self.config.rollout.timesteps == "float"
        return (float(self.sampler.sigmas[index]) if exact else timesteps[index] / 1000), timesteps[index]

    def _noise_streams(self, iteration: int, timestep_index: int) -> Tensor:
        """The words of each group's stream of training noise, int64 [G, 4]: operators draw it where they use it."""
        seed, num_groups = self.config.seed, self.config.groups.per_iteration
        names = [
            rng.stream(seed, stage="training noise", iteration=iteration, group=group, timestep=timestep_index)
            for group in range(num_groups)
        ]
        return torch.tensor(names)
