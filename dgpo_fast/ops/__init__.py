"""Operators on plain tensors, on any device. Of the fused ones, `serving` says what serves them here."""

from dgpo_fast.ops.bias_gelu import bias_gelu
from dgpo_fast.ops.ema_lerp import ema_lerp_
from dgpo_fast.ops.flow_interpolate import NoisySamples, flow_interpolate
from dgpo_fast.ops.gate_residual import gate_residual
from dgpo_fast.ops.gate_residual_norm_modulate import NormedResidual, gate_residual_norm_modulate
from dgpo_fast.ops.group_advantages import GroupAdvantages, group_advantages
from dgpo_fast.ops.group_preference import GroupPreference, group_preference, group_scores
from dgpo_fast.ops.joint_qk_norm import QKV, QKWeights, joint_qk_norm
from dgpo_fast.ops.layer_norm_modulate import layer_norm_modulate
from dgpo_fast.ops.quantise_rows import QuantisedRows, quantise_rows
from dgpo_fast.ops.registry import Serving, describe_serving, implementations, serving
from dgpo_fast.ops.sde_step import SDEStep, cps_coefficients, sde_coefficients, sde_step
from dgpo_fast.ops.solver_step import solver_step, solver_step_
from dgpo_fast.ops.velocity_errors import VelocityErrors, velocity_errors

__all__ = [
    "QKV",
    "GroupAdvantages",
    "GroupPreference",
    "NoisySamples",
    "NormedResidual",
    "QKWeights",
    "QuantisedRows",
    "SDEStep",
    "Serving",
    "VelocityErrors",
    "bias_gelu",
    "cps_coefficients",
    "describe_serving",
    "ema_lerp_",
    "flow_interpolate",
    "gate_residual",
    "gate_residual_norm_modulate",
    "group_advantages",
    "group_preference",
    "group_scores",
    "implementations",
    "joint_qk_norm",
    "layer_norm_modulate",
    "quantise_rows",
    "sde_coefficients",
    "sde_step",
    "serving",
    "solver_step",
    "solver_step_",
    "velocity_errors",
]
