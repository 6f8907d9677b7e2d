"""The layer norm of one row in Triton, forward and backward, and how programs share the rows of a batch.

Shape letters: B samples, N tokens, D width, C chunks of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.alignment import row_at
from dgpo_fast.kernels.numbers import quotient, reciprocal_root

# Eight elements a thread: 16 bytes of bfloat16, so that a row in registers leaves room for others, and for sums over
# rows. Chosen from the machine code; not timed on a GPU yet.
ELEMENTS_PER_THREAD = 8
MAX_WARPS = 16

# Rows that a program adds up before a second pass adds up programs: as many programs as multiprocessors from some 2000
# rows on, and partial sums that are small beside the rows: two of float32, written and read, are 16 bytes a column, and
# 16 rows of bfloat16, read twice and written once, are 96. A constant, so that sums depend on shapes alone. Not timed
# on a GPU yet.
ROWS_PER_SUM = 16


@triton.jit
def load_row(p_first, o_row, o_d, m_d, dtype: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The elements `o_d` of the row `o_row` elements behind `p_first`; zero where not `m_d`.

    ALIGNED is for kernels that are told of alignment.
    """
    return tl.load(row_at(p_first, o_row, ALIGNED) + o_d, mask=m_d, other=0).to(dtype)


@triton.jit
def standardise(b_x, m_d, D, EPS: tl.constexpr):
    """The row `b_x`, zero beyond its `D` elements, with mean 0 and variance 1, and what it was multiplied with."""
    mean = quotient(tl.sum(b_x, 0), D)
    b_centred = tl.where(m_d, b_x - mean, 0)
    rstd = reciprocal_root(quotient(tl.sum(b_centred * b_centred, 0), D) + EPS)
    return b_centred * rstd, rstd


@triton.jit
def standardise_backward(b_grad, b_standard, rstd, D):
    """The gradient of a row, given that of its standardised form: without what changes only mean or variance."""
    mean = quotient(tl.sum(b_grad, 0), D)
    along = quotient(tl.sum(b_grad * b_standard, 0), D)
    return rstd * (b_grad - mean - along * b_standard)


def row_block(width: int) -> dict[str, int]:
    """The block that holds a row, and the warps for it."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(MAX_WARPS, max(1, block // (32 * ELEMENTS_PER_THREAD)))}


def with_rows(tensor: Tensor) -> Tensor:
    """`tensor`, whose last dimension has unit stride; a copy where it had not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def chunks_of_rows(tokens_BND: Tensor, *, summed: bool) -> tuple[int, int]:
    """The rows of a program, neighbours of one sample, and how many such chunks make a sample."""
    rows = ROWS_PER_SUM if summed else 1
    return rows, triton.cdiv(tokens_BND.shape[1], rows)


def partial_sums(count: int, tokens_BND: Tensor, *, wanted: bool) -> Tensor:
    """Room for `count` sums over each chunk of rows, [count, B, C, D]; without an element unless they are wanted."""
    num_samples, _, width = tokens_BND.shape
    dtype = torch.promote_types(tokens_BND.dtype, torch.float32)
    shape = (num_samples, chunks_of_rows(tokens_BND, summed=True)[1], width) if wanted else (0, 1)
    return tokens_BND.new_empty((count, *shape), dtype=dtype)


def add_up(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of [B, C, D] over all chunks, in their order; [0] where it is not wanted."""
    return partial.sum(1).to(dtype)
