"""Schedules against diffusers' schedulers, point by point."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from dgpo_fast.flow.schedules import Schedule, schedule_sigmas

FLOAT32_ROUNDING = 2.0**-24


def diffusers_sigmas(schedule: Schedule, num_steps: int, shift: float) -> np.ndarray:
    match schedule:
        case "dpm":
            scheduler = DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
            )
        case "unipc":
            scheduler = UniPCMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
            )
        case "flow_match":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas.double().numpy()


# diffusers rounds to float32 once, but flow_match's smallest level comes out of three more float32 operations.
@pytest.mark.parametrize(("schedule", "roundings"), [("dpm", 1), ("unipc", 1), ("flow_match", 4)])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 14, 50, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 3.0, 5.0])
def test_sigmas_equal_diffusers(schedule: Schedule, roundings: int, num_steps: int, shift: float) -> None:
    sigmas = schedule_sigmas(schedule, num_steps, shift=shift)

    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == np.float64
    np.testing.assert_allclose(
        sigmas, diffusers_sigmas(schedule, num_steps, shift), rtol=roundings * FLOAT32_ROUNDING, atol=0
    )


@pytest.mark.parametrize("schedule", ["dpm", "unipc", "flow_match"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_sigmas_decrease_from_at_most_one_to_zero(schedule: Schedule, num_steps: int, shift: float) -> None:
    sigmas = schedule_sigmas(schedule, num_steps, shift=shift)

    assert sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_dpm_gives_the_published_sigmas() -> None:
    published = [0.9997, 0.9639, 0.9227, 0.8746, 0.8178, 0.7496, 0.6663, 0.5621, 0.4283, 0.2498, 0]
    np.testing.assert_allclose(schedule_sigmas("dpm", 10, shift=3.0), published, rtol=0, atol=0.5e-4)


@pytest.mark.parametrize(("schedule", "last"), [("dpm", 0.2498), ("unipc", 0.2519), ("flow_match", 0.0089)])
def test_schedules_differ_in_their_last_sigma(schedule: Schedule, last: float) -> None:
    assert schedule_sigmas(schedule, 10, shift=3.0)[-2] == pytest.approx(last, abs=0.5e-4)


def test_schedules_and_solvers_do_not_import_torch() -> None:
    probe = "import sys, dgpo_fast.flow.schedules, dgpo_fast.flow.solvers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)
