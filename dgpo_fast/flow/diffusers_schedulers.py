"""The scheduler with which diffusers' own pipeline draws as a recipe does. No torch until one is made."""

from __future__ import annotations

from typing import Any, NamedTuple

from dgpo_fast.config import RolloutConfig


class Scheduler(NamedTuple):
    """A class of diffusers, and what it is made with."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        """The expression that makes it."""
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"

    def make(self) -> Any:
        import diffusers

        return getattr(diffusers, self.name)(**self.arguments)


def find_scheduler(rollout: RolloutConfig) -> Scheduler | None:
    """The scheduler that takes the rollout's steps at its noise levels; None: diffusers has none.

    Those of multistep solvers tell the model its timestep in whole numbers, as `rollout.timesteps: integer` does.
    """
    multistep = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": rollout.shift}
    return {
        ("dpm++2m", "dpm"): Scheduler("DPMSolverMultistepScheduler", multistep),
        ("unipc", "unipc"): Scheduler("UniPCMultistepScheduler", multistep),
        ("euler", "flow_match"): Scheduler("FlowMatchEulerDiscreteScheduler", {"shift": rollout.shift}),
    }.get((rollout.solver, rollout.schedule))
