"""What the other methods that learn in the forward process share: velocities of the views at a noised micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.ops.flow_interpolate import flow_interpolate
from dgpo_fast.profiling import stage
from dgpo_fast.records import NoisedBatch

STAGES = {"policy": "policy", "old": "old", "ref": "reference"}
"""Under which name a view's forward is timed."""


def velocity_of(policy: Policy, view: View, batch: NoisedBatch) -> Tensor:
    """The velocity through `view`, float32 [M, C, H, W]; gradients are recorded through `policy` alone."""
    with stage(STAGES[view]), torch.set_grad_enabled(view == "policy" and torch.is_grad_enabled()):
        return policy.velocity(view, batch.x_t_MCHW, batch.timestep_M, batch.conditioning)[0].float()


def target_of(batch: NoisedBatch) -> Tensor:
    """v* = noise - x_0, float32 [M, C, H, W]."""
    sigma_M = torch.zeros_like(batch.timestep_M, dtype=torch.float64)
    return flow_interpolate(batch.x0_MCHW, sigma_M, streams=batch.streams_N4, group_B=batch.noise_M).target


def mean_square(difference_MCHW: Tensor) -> Tensor:
    """Of each sample, float32 [M]."""
    return difference_MCHW.square().flatten(1).mean(1)
