"""Operators on plain tensors, on any device. Of the fused ones, `serving` says what serves them here."""

from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.ops.group_preference import group_preference, velocity_errors
from dgpo_fast.ops.registry import Serving, describe_serving, implementations, serving
from dgpo_fast.ops.solver_step import solver_step, solver_step_

__all__ = [
    "Serving",
    "describe_serving",
    "group_advantages",
    "group_preference",
    "implementations",
    "serving",
    "solver_step",
    "solver_step_",
    "velocity_errors",
]
