"""Solver tables against diffusers' schedulers, against exact solutions, and against their own contract."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_unipc_multistep,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.config import RolloutConfig
from dgpo_fast.flow.diffusers_schedulers import find_scheduler
from dgpo_fast.flow.schedules import Schedule, schedule_sigmas
from dgpo_fast.flow.solvers import Solver, SolverTable, solver_table

Velocity = Callable[[np.ndarray, float], np.ndarray]

SOLVERS: tuple[Solver, ...] = get_args(Solver)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
ADAMS_BASHFORTH: list[tuple[Solver, int]] = [("ab2", 2), ("ab3", 3), ("ab4", 4)]
NUM_STATES = {"euler": 1, "dpm++2m": 2, "ab2": 2, "ab3": 3, "ab4": 4, "unipc": 4, "heun": 2}

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS: dict[Solver, tuple[ModuleType, Callable]] = {
    "euler": (
        scheduling_flow_match_euler_discrete,
        lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    ),
    "heun": (
        scheduling_flow_match_heun_discrete,
        lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
    ),
    "dpm++2m": (
        scheduling_dpmsolver_multistep,
        lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
    ),
    "unipc": (
        scheduling_unipc_multistep,
        lambda shift: UniPCMultistepScheduler(flow_shift=shift, **FLOW),
    ),
}


def trajectory(table: SolverTable, x: np.ndarray, velocity: Velocity) -> list[np.ndarray]:
    """S[0] after every evaluation. What is not known, such as v_uncond, is NaN; coefficients of zero are skipped."""
    unknown = np.full_like(x, np.nan)
    states = [x] + [unknown] * (table.coefficients.shape[1] - 1)
    inputs = []
    for matrix, sigma in zip(table.coefficients, table.sigmas, strict=True):
        columns = [*states, velocity(states[0], sigma), unknown]
        states = [
            sum((c * column for c, column in zip(row, columns, strict=True) if c != 0), np.zeros_like(x))
            for row in matrix
        ]
        inputs.append(states[0])
    return inputs


def random_field(seed: int = 0, width: int = 8) -> tuple[np.ndarray, Velocity]:
    """A start [4, width] and a nonlinear velocity of (x, sigma): one hidden layer of tanh with random weights."""
    rng = np.random.default_rng(seed)
    w_in, w_out = rng.normal(size=(width, 2 * width)) / 2, rng.normal(size=(2 * width, width)) / 2
    bias, w_sigma = rng.normal(size=(2, 2 * width))
    return rng.normal(size=(4, width)), lambda x, sigma: np.tanh(x @ w_in + bias + sigma * w_sigma) @ w_out


class GaussianFlow:
    """The exact flow when the data are Gaussian: x keeps its place in a Gaussian that moves and widens with sigma."""

    mean, std = 1.5, 0.5

    def spread(self, sigma: float) -> float:
        return np.hypot((1 - sigma) * self.std, sigma)

    def velocity(self, x: np.ndarray, sigma: float) -> np.ndarray:
        growth = (sigma - (1 - sigma) * self.std**2) / self.spread(sigma) ** 2
        return growth * (x - (1 - sigma) * self.mean) - self.mean

    def solution(self, sigma: float) -> np.ndarray:
        quantiles = np.array([-2.0, -0.3, 0.7, 1.9])
        return (1 - sigma) * self.mean + self.spread(sigma) * quantiles


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def diffusers_trajectory(scheduler, x: np.ndarray, velocity: Velocity, sigmas: np.ndarray) -> list[np.ndarray]:
    scheduler.set_begin_index(0)  # several integer timesteps can be equal when the shift is large
    x_t, outputs = torch.from_numpy(x), []
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        x_t = scheduler.step(torch.from_numpy(velocity(x_t.numpy(), sigma)), timestep, x_t).prev_sample
        outputs.append(x_t.numpy())
    return outputs


def float64_sigmas(scheduler, solver: Solver) -> np.ndarray:
    """The scheduler's own sigmas, each once, which it is made to use in float64."""
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = scheduler.sigmas.numpy()
    return np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]]) if solver == "heun" else sigmas


# All of diffusers' schedulers but UniPC round x to float32 (6e-8) at every step, which was seen to add up to 5e-7 over
# 50 steps. Without that the two programs differ by float64 rounding, at most 2e-14 as seen.
@pytest.mark.parametrize(("float32_casts", "tolerance"), [(True, 1e-6), (False, 1e-12)])
@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [3, 4, 7, 10, 14, 15, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_every_step_equals_diffusers(
    solver: Solver,
    num_steps: int,
    shift: float,
    float32_casts: bool,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, make_scheduler = SCHEDULERS[solver]
    scheduler = make_scheduler(shift)
    scheduler.set_timesteps(num_steps)
    table = solver_table(solver, float64_sigmas(scheduler, solver))
    if not float32_casts:
        monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), "float32": torch.float64}))

    x, velocity = random_field()
    ours = trajectory(table, x, velocity)
    theirs = diffusers_trajectory(scheduler, x, velocity, table.sigmas)

    assert len(ours) == (2 * num_steps - 1 if solver == "heun" else num_steps)
    assert max(map(relative_error, ours, theirs)) < tolerance


@pytest.mark.parametrize(("solver", "schedule"), [("dpm++2m", "dpm"), ("unipc", "unipc"), ("euler", "flow_match")])
def test_the_pipelines_scheduler_is_the_one_that_is_compared_with(solver: Solver, schedule: Schedule) -> None:
    """Here, and in test_schedules.py; it is made by the expression that a model card shows, too."""
    found = find_scheduler(RolloutConfig(solver=solver, schedule=schedule, shift=2.5))
    assert found is not None
    expected = SCHEDULERS[solver][1](2.5)
    for scheduler in (found.make(), eval(str(found), vars(diffusers))):
        assert (type(scheduler), dict(scheduler.config)) == (type(expected), dict(expected.config))


def test_where_diffusers_draws_otherwise_it_has_no_scheduler() -> None:
    for solver, schedule in (("ab2", "dpm"), ("dpm++2m", "flow_match"), ("euler", "dpm"), ("heun", "flow_match")):
        assert find_scheduler(RolloutConfig(solver=solver, schedule=schedule)) is None


def test_dpm_equals_diffusers_from_sigma_one() -> None:
    scheduler = SCHEDULERS["dpm++2m"][1](3.0)
    scheduler.set_timesteps(10)
    scheduler.sigmas = torch.from_numpy(schedule_sigmas("flow_match", 10, shift=3.0))
    table = solver_table("dpm++2m", scheduler.sigmas.numpy())
    x, velocity = random_field()

    assert table.sigmas[0] == 1
    theirs = diffusers_trajectory(scheduler, x, velocity, table.sigmas)
    assert max(map(relative_error, trajectory(table, x, velocity), theirs)) < 1e-6


def test_unipc_equals_diffusers_from_sigma_one_while_that_is_finite() -> None:
    scheduler = SCHEDULERS["unipc"][1](3.0)
    scheduler.set_timesteps(10)
    scheduler.sigmas = torch.from_numpy(schedule_sigmas("flow_match", 10, shift=3.0))
    table = solver_table("unipc", scheduler.sigmas.numpy())
    x, velocity = random_field()

    theirs = diffusers_trajectory(scheduler, x, velocity, table.sigmas)[:2]
    assert max(map(relative_error, trajectory(table, x, velocity)[:2], theirs)) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_table_has_one_matrix_per_evaluation(solver: Solver, num_steps: int) -> None:
    table = solver_table(solver, schedule_sigmas("dpm", num_steps, shift=3.0))
    num_evaluations, num_states = 2 * num_steps - 1 if solver == "heun" else num_steps, NUM_STATES[solver]

    assert table.coefficients.shape == (num_evaluations, num_states, num_states + 2)
    assert table.sigmas.shape == (num_evaluations,)
    assert table.coefficients.dtype == table.sigmas.dtype == np.float64


def test_heun_visits_every_sigma_twice_but_the_ends() -> None:
    table = solver_table("heun", np.array([1.0, 0.6, 0.3, 0.0]))
    np.testing.assert_array_equal(table.sigmas, [1.0, 0.6, 0.6, 0.3, 0.3])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_no_unset_state_is_read(solver: Solver, schedule: Schedule, num_steps: int) -> None:
    table = solver_table(solver, schedule_sigmas(schedule, num_steps, shift=3.0))
    written = np.arange(NUM_STATES[solver]) == 0

    for matrix in table.coefficients:
        assert (matrix[:, :-2][:, ~written] == 0).all()
        written = (matrix != 0).any(axis=1)
        assert written[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guidance_combines_the_velocities(solver: Solver, schedule: Schedule) -> None:
    sigmas, guidance = schedule_sigmas(schedule, 10, shift=3.0), 4.5
    plain, guided = solver_table(solver, sigmas), solver_table(solver, sigmas, guidance=guidance)
    states_and_velocity = plain.coefficients[..., :-1]

    assert (plain.coefficients[..., -1] == 0).all()
    # Columns of v_cond and v_uncond: d v / d v_cond = guidance, d v / d v_uncond = 1 - guidance.
    combination = np.zeros((states_and_velocity.shape[-1], states_and_velocity.shape[-1] + 1))
    np.fill_diagonal(combination, 1.0)
    combination[-1, -2:] = [guidance, 1 - guidance]
    np.testing.assert_allclose(guided.coefficients, states_and_velocity @ combination, rtol=1e-14)


@settings(deadline=None, max_examples=50)
@given(
    solver=st.sampled_from(SOLVERS),
    points=st.lists(st.integers(1, 20), min_size=1, max_size=20, unique=True),
    velocity=st.floats(-3, 3),
)
def test_constant_velocity_is_exact_on_any_grid(solver: Solver, points: list[int], velocity: float) -> None:
    sigmas = np.append(np.sort(points)[::-1] / 20, 0.0)
    x = np.array([0.7])

    end = trajectory(solver_table(solver, sigmas), x, lambda x, sigma: np.full_like(x, velocity))[-1]
    np.testing.assert_allclose(end, x - sigmas[0] * velocity, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("solver", "order"), ADAMS_BASHFORTH)
def test_adams_bashforth_is_exact_for_velocities_of_lower_degree(solver: Solver, order: int) -> None:
    sigmas = schedule_sigmas("dpm", 10, shift=3.0)
    table = solver_table(solver, sigmas)
    # The slope of sigma^order, of degree order - 1, is integrated exactly once that many velocities are known.

    def slope(x: np.ndarray, sigma: float) -> np.ndarray:
        return np.full_like(x, order * sigma ** (order - 1))

    path = trajectory(table, np.array([sigmas[0] ** order]), slope)
    steps = np.diff(np.squeeze(path))[order - 2 :]
    np.testing.assert_allclose(steps, np.diff(sigmas[order - 1 :] ** order), rtol=1e-12)


@pytest.mark.parametrize(
    ("solver", "weights"),
    [
        ("ab2", [3 / 2, -1 / 2]),
        ("ab3", [23 / 12, -16 / 12, 5 / 12]),
        ("ab4", [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ],
)
def test_adams_bashforth_has_the_textbook_weights_on_equal_steps(solver: Solver, weights: list[float]) -> None:
    last = solver_table(solver, np.linspace(0.8, 0.0, 9)).coefficients[-1]
    num_states = len(weights)

    np.testing.assert_allclose(last[0, 0], 1.0)
    np.testing.assert_allclose(last[0, num_states] / -0.1, weights[0], rtol=1e-12)
    np.testing.assert_allclose(last[0, 1:num_states] / -0.1, weights[1:], rtol=1e-12)


@pytest.mark.parametrize(("solver", "order"), ADAMS_BASHFORTH)
def test_adams_bashforth_converges_with_its_order(solver: Solver, order: int) -> None:
    """On dx/dsigma = x, from exact starting velocities: the table's own start leaves an error of second order."""

    def error(num_steps: int) -> float:
        sigmas = schedule_sigmas("dpm", num_steps, shift=3.0)
        table = solver_table(solver, sigmas)
        states = np.exp(sigmas[:order][::-1])
        for matrix in table.coefficients[order - 1 :, :, :-1]:
            states = matrix @ [*states, states[0]]
        return abs(states[0] - 1)

    assert np.log2(error(200) / error(400)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_every_solver_converges_on_every_schedule(solver: Solver, schedule: Schedule, shift: float) -> None:
    flow = GaussianFlow()

    def error(num_steps: int) -> float:
        sigmas = schedule_sigmas(schedule, num_steps, shift=shift)
        end = trajectory(solver_table(solver, sigmas), flow.solution(sigmas[0]), flow.velocity)[-1]
        return relative_error(end, flow.solution(0.0))

    # First order or better: four times the steps leave a quarter of the error, a third while the steps are coarse.
    assert error(80) < min(0.03, error(20) / 3)
