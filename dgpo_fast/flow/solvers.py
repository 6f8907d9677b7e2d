"""ODE solvers of rectified flows, each as one table of linear recurrences.

A rollout integrates dx/dsigma = v(x, sigma) from the first sigma of a schedule to 0. For every model evaluation e

    S' = C_e [S; v_cond; v_uncond],     S[0] is the next model input,

with K state tensors S and a matrix C_e of shape [K, K + 2] that depends on the schedule and the guidance scale alone.
A rollout starts from S[0] = x; a state that was not written before only ever meets coefficients of zero.

In this file a tensor is its row of coefficients over [S; v]: `np.eye` names the inputs, a sum of rows is a sum of
tensors, and each solver reads as in its paper. x0 = x - sigma v is the data prediction.

Shapes: E evaluations, K states, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Solver = Literal["euler", "dpm++2m", "ab2", "ab3", "ab4", "unipc", "heun"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SolverTable:
    """A solver on a schedule at a guidance scale: everything a rollout needs to know about them."""

    coefficients: Array  # [E, K, K + 2]; columns: K states, v_cond, v_uncond
    sigmas: Array  # [E], the noise level of each model evaluation
    is_guided: NDArray[np.bool_]  # [E], whether v_uncond has a part in it


def solver_table(
    solver: Solver, sigmas: Array, *, guidance: float = 1.0, guided: tuple[float, float] | None = None
) -> SolverTable:
    """Coefficients of `solver` for every model evaluation on the way from sigmas[0] to 0, in float64.

    The velocity is v = v_uncond + guidance (v_cond - v_uncond), so guidance 1 leaves the column of v_uncond zero.

    Args:
        solver: "euler" (the same as DDIM here), "dpm++2m", "ab2" to "ab4" (Adams-Bashforth), "unipc" (order 2), "heun".
        sigmas: [N + 1], strictly decreasing, in [0, 1], the last one 0; see `schedule_sigmas`.
        guidance: classifier-free guidance scale.
        guided: noise levels, both ends included, outside of which the scale is 1. None for no such interval.

    Returns:
        A table of E = N evaluations (Heun: 2N - 1) and K states: Euler 1, DPM-Solver++ and Heun 2, Adams-Bashforth its
        order, UniPC 4.
    """
    rows, evaluated = _SOLVERS[solver](np.asarray(sigmas, dtype=np.float64))
    states, velocity = np.split(rows, [-1], axis=-1)
    low, high = guided or (0.0, 1.0)
    scale = np.where((low <= evaluated) & (evaluated <= high), guidance, 1.0)
    coefficients = np.concatenate(
        [states, scale[:, None, None] * velocity, (1 - scale)[:, None, None] * velocity], axis=-1
    )
    return SolverTable(coefficients=coefficients, sigmas=evaluated, is_guided=scale != 1)


def _euler(sigmas: Array) -> tuple[Array, Array]:
    x, v = np.eye(2)
    rows = [[x + dt * v] for dt in np.diff(sigmas)]
    return np.array(rows), sigmas[:-1]


def _heun(sigmas: Array) -> tuple[Array, Array]:
    """Improved Euler, its last step Euler, so that the model is never asked at sigma = 0.

    States: x, the first velocity of the step.
    """
    x, v_first, v = np.eye(3)
    rows = []
    for dt in np.diff(sigmas):
        rows.append([x + dt * v, v])
        # x is here the end of the Euler step: half of v_first is taken back and replaced by half of the new velocity.
        rows.append([x + dt / 2 * (v - v_first), np.zeros(3)])
    return np.array(rows[:-1]), np.repeat(sigmas, 2)[1:-2]


def _adams_bashforth(sigmas: Array, *, order: int) -> tuple[Array, Array]:
    """Adams-Bashforth: the polynomial through the last `order` velocities, integrated over the step (PLMS).

    States: x, the last order - 1 velocities, the newest first. The first steps use the velocities there are, so the
    very first is Euler: that start leaves an error of second order, whatever the order of the rest.
    """
    x, *history, v = np.eye(order + 1)
    rows = []
    for i, dt in enumerate(np.diff(sigmas)):
        known = [v, *history[:i]]
        weights = _interpolant_weights((sigmas[max(0, i - order + 1) : i + 1][::-1] - sigmas[i]) / dt)
        x_next = x + dt * np.dot(weights, known)
        unset = [np.zeros(order + 1)] * (order - 1)
        rows.append([x_next, *(known + unset)[: order - 1]])
    return np.array(rows), sigmas[:-1]


def _interpolant_weights(nodes: Array) -> NDArray[np.floating]:
    """Weights of the values at `nodes` in the integral over [0, 1] of their Lagrange interpolant.

    They are the ones that are right for each power u^k below the number of nodes, whose integral is 1 / (k + 1).
    """
    powers = np.vander(nodes, increasing=True).T
    return np.linalg.solve(powers, 1 / np.arange(1, len(nodes) + 1))


def _dpmpp_2m(sigmas: Array) -> tuple[Array, Array]:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), its first and its last step of first order.

    States: x, the last data prediction.
    """
    x, x0_last, v = np.eye(3)
    lambdas = _log_snr(sigmas)
    rows = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * v
        data = _extrapolated(x0, x0_last, lambdas, i)
        rows.append([_dpmpp_step(x, data, sigma, sigma_next), x0])
    return np.array(rows), sigmas[:-1]


def _unipc(sigmas: Array) -> tuple[Array, Array]:
    """UniPC-2 on data predictions with B(h) = exp(h) - 1 (arXiv 2302.04867; diffusers' solver_type "bh2").

    States: x, the last corrected x, the last two data predictions, the newest first. One evaluation serves the
    corrector of the step that led to it and the predictor of the next; the predictor is a step of DPM-Solver++ 2M.
    """
    x, corrected_last, x0_last, x0_before, v = np.eye(5)
    lambdas = _log_snr(sigmas)
    rows = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * v
        if i == 0:
            corrected, x0_kept = x, np.zeros(5)
        else:
            data = _interpolated(x0, x0_last, x0_before, lambdas, i)
            corrected, x0_kept = _dpmpp_step(corrected_last, data, sigmas[i - 1], sigma), x0_last
        data = _extrapolated(x0, x0_last, lambdas, i)
        rows.append([_dpmpp_step(corrected, data, sigma, sigma_next), corrected, x0, x0_kept])
    return np.array(rows), sigmas[:-1]


def _log_snr(sigmas: Array) -> Array:
    """lambda = log((1 - sigma) / sigma): plus infinity at sigma = 0, minus infinity at sigma = 1."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _dpmpp_step(x: Array, data: Array, sigma: float, sigma_next: float) -> Array:
    """x at sigma_next, for a data prediction that is constant over the step.

    The paper's (sigma' / sigma) x - alpha' (exp(-h) - 1) data, with alpha = 1 - sigma and h = lambda' - lambda put in,
    which leaves nothing infinite at either end of the schedule.
    """
    return data + sigma_next / sigma * (x - data)


def _extrapolated(x0: Array, x0_last: Array, lambdas: Array, i: int) -> Array:
    """Data prediction for step i: the line through the last two, half a step ahead in lambda.

    The first step has but one prediction, and the last one an infinite length: both take x0 as it is. A step that began
    at sigma = 1 was infinite too: the line through it is flat, and the second step first order, as in diffusers.
    """
    if i in (0, len(lambdas) - 2):
        return x0
    h_last, h = map(float, np.diff(lambdas[i - 1 : i + 2]))
    return x0 + h / h_last / 2 * (x0 - x0_last)


def _interpolated(x0: Array, x0_last: Array, x0_before: Array, lambdas: Array, i: int) -> Array:
    """Data prediction for step i - 1, once its end is known (UniC): the average of a polynomial through all three.

    With tau from 0 to 1 over the step, the average weighs tau by exp(h tau), as the exact solution does. In the first
    step, with two predictions, the paper takes their plain mean.
    """
    if i == 1:
        return (x0_last + x0) / 2
    h_before, h = map(float, np.diff(lambdas[i - 2 : i + 1]))
    tau_before = -h_before / h
    mean_tau = -1 / math.expm1(-h) - 1 / h
    mean_tau2 = -1 / math.expm1(-h) - 2 * mean_tau / h
    rho_before = (mean_tau - mean_tau2) / (1 - tau_before)
    rho = mean_tau - rho_before
    return x0_last + rho_before / tau_before * (x0_before - x0_last) + rho * (x0 - x0_last)


_SOLVERS: dict[Solver, Callable[[Array], tuple[Array, Array]]] = {
    "euler": _euler,
    "dpm++2m": _dpmpp_2m,
    "ab2": partial(_adams_bashforth, order=2),
    "ab3": partial(_adams_bashforth, order=3),
    "ab4": partial(_adams_bashforth, order=4),
    "unipc": _unipc,
    "heun": _heun,
}
