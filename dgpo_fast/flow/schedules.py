"""Sigma schedules: the noise levels that a rollout visits.

Sigma is the share of noise in x = (1 - sigma) x_0 + sigma eps; the model's timestep is 1000 sigma. The three schedules
agree in their limit and differ in their points: with 10 steps and shift 3 the last sigma before 0 is .2498 (dpm),
.2519 (unipc) or .0089 (flow_match).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Schedule = Literal["dpm", "unipc", "flow_match"]

NUM_TRAIN_TIMESTEPS = 1000
"""Training levels of Stable Diffusion 3; the smallest is sigma = 1 / 1000 before any shift."""

# diffusers' UniPC moves a first sigma of 1 down by this much, to keep log(1 - sigma) finite.
UNIPC_FIRST_SIGMA_GAP = 1e-6


def schedule_sigmas(schedule: Schedule, num_steps: int, *, shift: float) -> NDArray[np.float64]:
    """Noise levels of a rollout, float64 [num_steps + 1], strictly decreasing, the last one 0.

    Args:
        schedule: whose points to visit: those of diffusers' DPMSolverMultistepScheduler ("dpm") or
            UniPCMultistepScheduler ("unipc"), both with use_flow_sigmas, or of FlowMatchEulerDiscreteScheduler as
            StableDiffusion3Pipeline uses it ("flow_match").
        num_steps: solver steps, at least 1.
        shift: resolution shift, positive (`flow_shift` or `shift` in diffusers); 3 for Stable Diffusion 3.

    Source: diffusers 0.42, src/diffusers/schedulers. It rounds to float32 at the end, which is left to the caller here.
    """
    match schedule:
        case "dpm":
            sigmas = _dpm(num_steps, shift)
        case "unipc":
            sigmas = _unipc(num_steps, shift)
        case "flow_match":
            sigmas = _flow_match(num_steps, shift)
    return np.append(sigmas, 0.0)


def _dpm(num_steps: int, shift: float) -> NDArray[np.float64]:
    alphas = np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)
    return _shifted(1 - alphas, shift)[:0:-1]


def _unipc(num_steps: int, shift: float) -> NDArray[np.float64]:
    sigmas = _shifted(np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1], shift)
    sigmas[0] = 1 - UNIPC_FIRST_SIGMA_GAP
    return sigmas


def _flow_match(num_steps: int, shift: float) -> NDArray[np.float64]:
    # diffusers shifts twice: the range of the training levels first, then the points spread evenly over it. That is why
    # this schedule ends so close to 0.
    sigma_max, sigma_min = _shifted(np.array([1, 1 / NUM_TRAIN_TIMESTEPS]), shift)
    return _shifted(np.linspace(sigma_max, sigma_min, num_steps), shift)


def _shifted(sigmas: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    return shift * sigmas / (1 + (shift - 1) * sigmas)
