"""One evaluation of a linear-multistep solver: new_state = C_e [S; v_cond; v_uncond].

Shape letters: K states of the solver, B samples, E model evaluations, ... the latent dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgpo_fast.ops.arguments import (
    FLOATING,
    check_device,
    check_dtype,
    check_indices,
    check_no_gradient,
    check_own_memory,
    check_shape,
    mark_written,
)
from dgpo_fast.ops.registry import define

MAX_STATES = 4


def solver_step(state_KBN: Tensor, v_cond: Tensor, *, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> Tensor:
    """The solver's next state: guidance, the update of x and of the remembered terms, in one pass over the latents.

        new_state[k, b] = sum_j C[k, j] state[j, b] + C[k, K] v_cond[b] + C[k, K + 1] v_uncond[b],   C = table[row_B[b]]

    Every solver of the engine (Euler, DPM-Solver++ 2M, Adams-Bashforth, UniPC, Heun) is such a recurrence; the schedule
    and the guidance scale live in the table alone. new_state[0] is the next model input.

    Args:
        state_KBN: [K, B, ...], K in 1..4, float32 or float64. The arithmetic runs in this dtype.
        v_cond: [B, ...], the velocity with the prompt, any floating-point dtype.
        v_uncond: [B, ...], the velocity without it, in the dtype of v_cond. None leaves out the table's last column.
        table: [E, K, K + 2], float32 or float64.
        row_B: [B], int64 in 0..E-1, the table's row of each sample.

    Returns:
        The new state, [K, B, ...], contiguous, in the dtype of state_KBN.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype, device or range, or one that requires a gradient while
            gradients are on: a rollout is not differentiated. On CUDA a row outside the table is not looked for, since
            that would wait for the device; Triton returns NaN for its sample.

    Source: the multistep updates as diffusers' schedulers write them, folded into one matrix per evaluation.
    """
    _refuse_gradients(state_KBN, v_cond, v_uncond)
    return _solver_step(state_KBN, v_cond, v_uncond, table, row_B)  # type: ignore[no-any-return]


def solver_step_(state_KBN: Tensor, v_cond: Tensor, *, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> Tensor:
    """`state_KBN` itself, advanced in place. Arguments and errors are those of `solver_step`.

    Raises:
        ValueError: as `solver_step`; also where two elements of state_KBN share memory (an expanded tensor). A velocity
            that shares memory with the state is not looked for.
    """
    _refuse_gradients(state_KBN, v_cond, v_uncond)
    _solver_step_(state_KBN, v_cond, v_uncond, table, row_B)
    mark_written(state_KBN)
    return state_KBN


def _refuse_gradients(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None) -> None:
    # Here rather than as an Autograd kernel: that would add 4 us of Python to a call of 6 us, on every step.
    for name, tensor in (("state_KBN", state_KBN), ("v_cond", v_cond), ("v_uncond", v_uncond)):
        check_no_gradient(name, tensor, reason="a solver step is not differentiable")


def _check(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> None:
    _check_metadata(state_KBN, v_cond, v_uncond, table, row_B)
    check_indices("row_B", row_B, len(table))


def _check_metadata(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> None:
    num_states, *sample_shape = state_KBN.shape if state_KBN.dim() >= 2 else (0,)
    if not 1 <= num_states <= MAX_STATES:
        raise ValueError(f"state_KBN: expected [K, B, ...] with K in 1..{MAX_STATES}, got {list(state_KBN.shape)}")
    check_dtype("state_KBN", state_KBN, torch.float32, torch.float64)
    check_dtype("v_cond", v_cond, *FLOATING)
    check_shape("v_cond", v_cond, sample_shape, meaning="the shape of state_KBN[0]")
    if v_uncond is not None:
        check_dtype("v_uncond", v_uncond, v_cond.dtype)
        check_shape("v_uncond", v_uncond, sample_shape, meaning="the shape of state_KBN[0]")
    check_dtype("table", table, torch.float32, torch.float64)
    if table.dim() != 3 or list(table.shape[1:]) != [num_states, num_states + 2]:
        raise ValueError(f"table: expected [E, {num_states}, {num_states + 2}], got {list(table.shape)}")
    check_dtype("row_B", row_B, torch.int64)
    check_shape("row_B", row_B, sample_shape[:1], meaning="one row for each sample")
    for name, tensor in (("v_cond", v_cond), ("v_uncond", v_uncond), ("table", table), ("row_B", row_B)):
        if tensor is not None:
            check_device(name, tensor, state_KBN, meaning="state_KBN")


def _check_in_place(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> None:
    _check(state_KBN, v_cond, v_uncond, table, row_B)
    check_own_memory("state_KBN", state_KBN)


def reference(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> Tensor:
    """The equation of `solver_step` in eager torch, one column of the table at a time."""
    velocities = [v_cond] if v_uncond is None else [v_cond, v_uncond]
    coefficients_KJB = table[row_B].permute(1, 2, 0).to(state_KBN.dtype)
    per_sample = (*state_KBN.shape[:2], *(1 for _ in v_cond.shape[1:]))
    new_state = torch.zeros_like(state_KBN, memory_format=torch.contiguous_format)
    for j, x in enumerate([*state_KBN, *velocities]):
        new_state.addcmul_(coefficients_KJB[:, j].reshape(per_sample), x.to(state_KBN.dtype))
    return new_state


def reference_(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> None:
    """`reference`, written over its state."""
    state_KBN.copy_(reference(state_KBN, v_cond, v_uncond, table, row_B))


def _fake(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> Tensor:
    _check_metadata(state_KBN, v_cond, v_uncond, table, row_B)
    return torch.empty_like(state_KBN, memory_format=torch.contiguous_format)


_solver_step = define(
    "solver_step(Tensor state_KBN, Tensor v_cond, Tensor? v_uncond, Tensor table, Tensor row_B) -> Tensor",
    check=_check,
    reference=reference,
    fake=_fake,
)
_solver_step_ = define(
    "solver_step_(Tensor(a!) state_KBN, Tensor v_cond, Tensor? v_uncond, Tensor table, Tensor row_B) -> ()",
    check=_check_in_place,
    reference=reference_,
    fake=_check_metadata,
)
