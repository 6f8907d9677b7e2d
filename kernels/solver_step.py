"""One solver step in Triton. Equation, arguments and checks: dgpo_fast/ops/solver_step.py.

Shape letters: K states, B samples, N elements of one sample, E rows of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.samples import flat_samples

# Four warps with eight elements a thread: two 16-byte loads of float32, or one of bfloat16, per thread and operand.
# Chosen from the machine code; not timed on a GPU yet.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def solver_step_kernel(
    p_state,  # [K, B, N]
    p_cond,  # [B, N]
    p_uncond,  # [B, N], not read unless GUIDED
    p_table,  # [E, K, K + 2]
    p_row,  # [B]
    p_new_state,  # [K, B, N], may be p_state
    state_stride_k,
    state_stride_b,
    cond_stride_b,
    uncond_stride_b,
    row_stride_b,
    new_stride_k,
    new_stride_b,
    num_rows,
    num_blocks,  # blocks of one sample
    N,
    K: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One grid axis: the others end at 65535. 64-bit before it meets a stride.
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_blocks
    o_n = (i_program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    dtype = p_new_state.dtype.element_ty

    # Everything is read before anything is written, so that the update may run in place.
    b_inputs = ()
    for k in tl.static_range(K):
        o_state = k * tl.cast(state_stride_k, tl.int64) + i_b * state_stride_b
        b_inputs += (tl.load(p_state + o_state + o_n, mask=m_n),)
    b_inputs += (tl.load(p_cond + i_b * cond_stride_b + o_n, mask=m_n).to(dtype),)
    if GUIDED:
        b_inputs += (tl.load(p_uncond + i_b * uncond_stride_b + o_n, mask=m_n).to(dtype),)

    i_row = tl.load(p_row + i_b * row_stride_b)
    in_table = (i_row >= 0) & (i_row < num_rows)
    p_coefficients = p_table + i_row * (K * (K + 2))
    for k in tl.static_range(K):
        b_new = tl.zeros([BLOCK], dtype)
        for j in tl.static_range(K + 1 + GUIDED):
            coefficient = tl.load(p_coefficients + k * (K + 2) + j, mask=in_table, other=float("nan"))
            b_new += coefficient.to(dtype) * b_inputs[j]
        o_new = k * tl.cast(new_stride_k, tl.int64) + i_b * new_stride_b
        tl.store(p_new_state + o_new + o_n, b_new, mask=m_n)


def solver_step(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> Tensor:
    """The new state, [K, B, ...]; the arguments are checked by the caller."""
    new_state = torch.empty_like(state_KBN, memory_format=torch.contiguous_format)
    _launch(state_KBN, v_cond, v_uncond, table, row_B, new_state)
    return new_state


def solver_step_(state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor) -> None:
    """Advances `state_KBN` in place; the arguments are checked by the caller."""
    if flat_samples(state_KBN, 2).data_ptr() == state_KBN.data_ptr():
        _launch(state_KBN, v_cond, v_uncond, table, row_B, state_KBN)
    else:
        state_KBN.copy_(solver_step(state_KBN, v_cond, v_uncond, table, row_B))


def _launch(
    state_KBN: Tensor, v_cond: Tensor, v_uncond: Tensor | None, table: Tensor, row_B: Tensor, new_state_KBN: Tensor
) -> None:
    state, new_state, cond = flat_samples(state_KBN, 2), flat_samples(new_state_KBN, 2), flat_samples(v_cond, 1)
    uncond = cond if v_uncond is None else flat_samples(v_uncond, 1)
    num_states, num_samples, numel = state.shape
    if state.numel() == 0:
        return
    num_blocks = triton.cdiv(numel, BLOCK)
    with torch.cuda.device_of(state):
        solver_step_kernel[(num_blocks * num_samples,)](
            state,
            cond,
            uncond,
            table.contiguous(),
            row_B,
            new_state,
            *state.stride()[:2],
            cond.stride(0),
            uncond.stride(0),
            row_B.stride(0),
            *new_state.stride()[:2],
            len(table),
            num_blocks,
            numel,
            K=num_states,
            GUIDED=v_uncond is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
