"""Stochastic sampling: an SDE whose marginals are those of the flow's ODE, and the densities of what it drew.

Shape letters: B samples, T steps of a schedule, S steps that are kept, C H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.config import RolloutConfig
from dgpo_fast.flow.rollout import model_timesteps
from dgpo_fast.flow.schedules import schedule_sigmas
from dgpo_fast.ops.sde_step import STD, SDEStep, sde_coefficients, sde_step
from dgpo_fast.profiling import span, stage
from dgpo_fast.records import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class SDESampler:
    """Flow-GRPO's sampler on a schedule (arXiv 2505.05470, eq. 9)."""

    sigmas: NDArray[np.float64]  # [T + 1]
    timesteps: tuple[float, ...]  # [T], what the model is told at each step
    coefficients_T3: Tensor  # float64: of x, of the velocity, and the standard deviation of each step

    @classmethod
    def from_config(cls, config: RolloutConfig, *, noise_level: float, window: range | None = None) -> SDESampler:
        """The sampler of a recipe; steps outside of `window` follow the ODE, by Euler's method."""
        sigmas = schedule_sigmas(config.schedule, config.steps, shift=config.shift)
        sigma = torch.from_numpy(sigmas)
        level_T = torch.full((config.steps,), noise_level, dtype=torch.float64)
        if window is not None:
            level_T[: window.start] = level_T[window.stop :] = 0
        return cls(
            sigmas=sigmas,
            timesteps=model_timesteps(sigmas[:-1], config.timesteps),
            coefficients_T3=sde_coefficients(
                sigma[:-1], sigma[1:], noise_level=level_T, sigma_max_next=float(sigma[1]) if config.steps > 1 else 0.0
            ),
        )

    def step(
        self,
        number: int,
        x_BCHW: Tensor,
        velocity_BCHW: Tensor,
        *,
        streams: Sequence[rng.Stream] | None = None,
        x_next: Tensor | None = None,
        with_mean: bool = False,
    ) -> SDEStep:
        """Step `number`, drawn from streams of noise, or the density of the one that `x_next` was drawn by."""
        coefficients_B3 = self.coefficients_T3[number].to(x_BCHW.device, torch.float32).expand(len(x_BCHW), 3)
        return sde_step(
            x_BCHW, velocity_BCHW, coefficients_B3=coefficients_B3, streams=streams, x_next=x_next, with_mean=with_mean
        )

    def squared_noise(self, number: int) -> float:
        """s^2 of a step, the rate of its variance: std^2 / -dt."""
        std = float(self.coefficients_T3[number, STD])
        return std**2 / float(self.sigmas[number] - self.sigmas[number + 1])

    @torch.no_grad()
    def sample(
        self,
        velocity: Callable[[Tensor, int], Tensor],
        noise_BCHW: Tensor,
        streams: Callable[[int], Sequence[rng.Stream]],
        *,
        kept: range,
    ) -> tuple[Tensor, Trajectory]:
        """Clean latents, float32 [B, C, H, W], and what the steps of `kept` drew.

        Args:
            velocity: at latents and the number of a step; guided where the recipe guides.
            noise_BCHW: float32, what to start from.
            streams: of a step's noise, one for each sample.
        """
        x_BCHW, latents, log_probs = noise_BCHW, [], []
        for number in range(len(self.timesteps)):
            with span(f"step {number}", "solver step"):
                with stage("transformer"):
                    velocity_BCHW = velocity(x_BCHW, number)
                with stage("solver"):
                    taken = self.step(number, x_BCHW, velocity_BCHW, streams=streams(number))
            if number in kept:
                latents.append(x_BCHW)
                log_probs.append(taken.log_prob_B)
            x_BCHW = taken.x_next
            if number == kept[-1]:
                latents.append(x_BCHW)
        trajectory = Trajectory(
            first_B=(kept.start,) * len(x_BCHW), x_SBCHW=torch.stack(latents), log_prob_SB=torch.stack(log_probs)
        )
        return x_BCHW, trajectory
