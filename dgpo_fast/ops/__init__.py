"""Operators on plain tensors, on any device. Of the fused ones, `serving` says what serves them here."""

from dgpo_fast.ops.ema_lerp import ema_lerp_
from dgpo_fast.ops.flow_interpolate import NoisySamples, flow_interpolate
from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.ops.group_preference import group_preference
from dgpo_fast.ops.registry import Serving, describe_serving, implementations, serving
from dgpo_fast.ops.sde_step import SDEStep, sde_coefficients, sde_step
from dgpo_fast.ops.solver_step import solver_step, solver_step_
from dgpo_fast.ops.velocity_errors import VelocityErrors, velocity_errors

__all__ = [
    "NoisySamples",
    "SDEStep",
    "Serving",
    "VelocityErrors",
    "describe_serving",
    "ema_lerp_",
    "flow_interpolate",
    "group_advantages",
    "group_preference",
    "implementations",
    "sde_coefficients",
    "sde_step",
    "serving",
    "solver_step",
    "solver_step_",
    "velocity_errors",
]
