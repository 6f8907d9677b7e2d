"""Stochastic sampling: an SDE whose marginals are those of the flow's ODE, or Coefficients-Preserving Sampling, and the
densities of what was drawn.

Shape letters: B samples, T steps of a schedule, S steps that are kept, C H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithm_config import SDEType
from dgpo_fast.config import RolloutConfig
from dgpo_fast.flow.rollout import model_timesteps
from dgpo_fast.flow.schedules import schedule_sigmas
from dgpo_fast.ops.sde_step import OF_VELOCITY, STD, SDEStep, cps_coefficients, sde_coefficients, sde_step
from dgpo_fast.profiling import span, stage
from dgpo_fast.records import Trajectory

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class SDESampler:
    """Flow-GRPO's sampler on a schedule: its SDE (arXiv 2505.05470, eq. 9) or CPS (arXiv 2509.05952)."""

    sigmas: NDArray[np.float64]  # [T + 1]
    timesteps: tuple[float, ...]  # [T], what the model is told at each step
    coefficients_T3: Tensor  # float64, on the CPU: of x, of the velocity, and the standard deviation of each step
    sde_type: SDEType = "sde"
    device: torch.device = CPU
    """Where steps are made: elsewhere each would wait for a copy of its coefficients."""

    @classmethod
    def from_config(
        cls, config: RolloutConfig, *, noise_level: float, sde_type: SDEType = "sde", device: torch.device = CPU
    ) -> SDESampler:
        """The sampler of a recipe."""
        sigmas = schedule_sigmas(config.schedule, config.steps, shift=config.shift)
        sigma = torch.from_numpy(sigmas)
        if sde_type == "cps":
            coefficients_T3 = cps_coefficients(sigma[:-1], sigma[1:], noise_level=noise_level)
        else:
            second = float(sigma[1]) if config.steps > 1 else 0.0
            coefficients_T3 = sde_coefficients(sigma[:-1], sigma[1:], noise_level=noise_level, sigma_max_next=second)
        timesteps = model_timesteps(sigmas[:-1], config.timesteps)
        return cls(
            sigmas=sigmas, timesteps=timesteps, coefficients_T3=coefficients_T3, sde_type=sde_type, device=device
        )

    def step(
        self,
        number: int,
        x_BCHW: Tensor,
        velocity_BCHW: Tensor,
        *,
        streams: Sequence[rng.Stream] | Tensor | None = None,
        x_next: Tensor | None = None,
        with_mean: bool = False,
    ) -> SDEStep:
        """Step `number`, drawn from streams of noise, or the density of the one that `x_next` was drawn by."""
        coefficients_B3 = self._stochastic_T3[number].to(x_BCHW.device).expand(len(x_BCHW), 3)
        return sde_step(
            x_BCHW, velocity_BCHW, coefficients_B3=coefficients_B3, streams=streams, x_next=x_next, with_mean=with_mean
        )

    def squared_noise(self, number: int) -> float:
        """What a step's KL term measures distances by: s^2, the rate of the SDE's variance, or the variance of CPS."""
        variance = float(self.coefficients_T3[number, STD]) ** 2
        return variance if self.sde_type == "cps" else variance / float(self.sigmas[number] - self.sigmas[number + 1])

    def density_scale(self, number: int) -> float:
        """How often a difference of a step's log-densities counts: of CPS the published code compares the squared
        distances from the mean alone, which are 2 std^2 times as far apart."""
        return 2 * float(self.coefficients_T3[number, STD]) ** 2 if self.sde_type == "cps" else 1.0

    def sensitivity(self, number: int) -> float:
        """How far a velocity that is off by 1 moves the logarithm of a step's ratio, in deviations of its noise."""
        of_velocity, std = map(float, self.coefficients_T3[number, [OF_VELOCITY, STD]])
        return self.density_scale(number) * abs(of_velocity) / std

    @torch.no_grad()
    def sample(
        self,
        velocity: Callable[[Tensor, int], Tensor],
        noise_BCHW: Tensor,
        streams_TB4: Tensor,
        *,
        kept: range,
        window: range | None = None,
    ) -> tuple[Tensor, Trajectory]:
        """Clean latents, float32 [B, C, H, W], and what the steps of `kept` drew.

        Args:
            velocity: at latents and the number of a step; guided where the recipe guides.
            noise_BCHW: float32, what to start from.
            streams_TB4: int64, the words of each step's noise, of a stream for each sample.
            window: steps outside of it follow the ODE, by Euler's method; None for none.
        """
        coefficients_T3 = self._stochastic_T3 if window is None else self._stochastic_within(window)
        coefficients_TB3 = coefficients_T3[:, None].to(noise_BCHW.device).expand(-1, len(noise_BCHW), -1)
        streams_TB4 = streams_TB4.to(noise_BCHW.device)  # at once: each copy would wait for the steps before
        x_BCHW, latents, log_probs = noise_BCHW, [], []
        for number in range(len(self.timesteps)):
            with span(f"step {number}", "solver step"):
                with stage("transformer"):
                    velocity_BCHW = velocity(x_BCHW, number)
                with stage("solver"):
                    taken = sde_step(
                        x_BCHW, velocity_BCHW, coefficients_B3=coefficients_TB3[number], streams=streams_TB4[number],
                        with_mean=False,
                    )  # fmt: skip
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

    # On the device once, since a copy to it would wait for all that it still has to do.

    @cached_property
    def _stochastic_T3(self) -> Tensor:
        return self.coefficients_T3.to(self.device, torch.float32)

    @cached_property
    def _euler_T3(self) -> Tensor:
        sigma = torch.from_numpy(self.sigmas)
        return sde_coefficients(sigma[:-1], sigma[1:], noise_level=0.0, sigma_max_next=0.0).to(
            self.device, torch.float32
        )

    def _stochastic_within(self, window: range) -> Tensor:
        number_T1 = torch.arange(len(self.timesteps), device=self.device)[:, None]
        return self._stochastic_T3.where((number_T1 >= window.start) & (number_T1 < window.stop), self._euler_T3)
