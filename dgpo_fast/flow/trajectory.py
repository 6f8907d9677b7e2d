"""The trajectory a recipe asks for. Numpy alone: a plan is made without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dgpo_fast.config import RolloutConfig
from dgpo_fast.flow.schedules import schedule_sigmas
from dgpo_fast.flow.solvers import SolverTable, solver_table


def trajectory_of(config: RolloutConfig, *, steps: int | None = None) -> tuple[NDArray[np.float64], SolverTable]:
    """Noise levels [steps + 1] and what the solver does at each; `steps` is another number than the recipe's."""
    sigmas = schedule_sigmas(config.schedule, steps or config.steps, shift=config.shift)
    return sigmas, solver_table(config.solver, sigmas, guidance=config.guidance, guided=config.guidance_interval)
