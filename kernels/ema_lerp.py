"""Exponential moving averages in Triton. Equation, arguments and checks: dgpo_fast/ops/ema_lerp.py.

Shape letters: T tensors. A program works on CHUNKS blocks of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.numbers import two_parts

# Four warps with eight elements a thread: two 16-byte loads of float32, or one of bfloat16, per thread and operand.
# Chosen from the machine code; not timed on a GPU yet.
BLOCK = 1024
NUM_WARPS = 4
# Each program looks through the table, 8 bytes a tensor, for its own. With four blocks it moves 48 KiB besides.
CHUNKS = 4

ELEMENT_TYPES = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


@triton.jit
def ema_lerp_kernel(
    p_first_program,  # [T], of each tensor; an empty one has none, and shares its number with the next
    p_average,  # [T], addresses
    p_value,  # [T], addresses
    p_numel,  # [T]
    weight,
    weight_rest,
    num_tensors,
    AVERAGE: tl.constexpr,
    VALUE: tl.constexpr,
    NEAR_AVERAGE: tl.constexpr,  # weight < 1/2
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, TENSORS)
    m_begun = tl.load(p_first_program + o_t, mask=o_t < num_tensors, other=2**62) <= i_program
    i_t = tl.sum(m_begun.to(tl.int64), 0) - 1
    i_first = (i_program - tl.load(p_first_program + i_t)) * (CHUNKS * BLOCK)
    numel = tl.load(p_numel + i_t)
    p_a = tl.load(p_average + i_t).to(tl.pointer_type(AVERAGE))
    p_v = tl.load(p_value + i_t).to(tl.pointer_type(VALUE))
    if ALIGNED:
        p_a, p_v, numel = tl.multiple_of(p_a, 16), tl.multiple_of(p_v, 16), tl.multiple_of(numel, 16)

    # From the nearer end: the value itself at weight 1, the average itself at 0.
    w = tl.full([], weight, AVERAGE) + tl.full([], weight_rest, AVERAGE)
    from_end = w if NEAR_AVERAGE else w - 1
    for i_chunk in tl.static_range(CHUNKS):
        o_n = i_first + i_chunk * BLOCK + tl.arange(0, BLOCK)
        m_n = o_n < numel
        b_average = tl.load(p_a + o_n, mask=m_n)
        b_value = tl.load(p_v + o_n, mask=m_n).to(AVERAGE)
        b_end = b_average if NEAR_AVERAGE else b_value
        b_average = b_end + from_end * (b_value - b_average)
        tl.store(p_a + o_n, b_average, mask=m_n)


def ema_lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """Advances the averages in place; the arguments are checked by the caller."""
    if not averages:
        return
    dense, dense_values = ([tensor.contiguous() for tensor in tensors] for tensors in (averages, values))
    addresses, value_addresses = ([tensor.data_ptr() for tensor in tensors] for tensors in (dense, dense_values))
    numels = [tensor.numel() for tensor in dense]
    *first_programs, num_programs = accumulate((triton.cdiv(n, CHUNKS * BLOCK) for n in numels), initial=0)
    if num_programs == 0:
        return
    table = torch.tensor([first_programs, addresses, value_addresses, numels], device=averages[0].device)
    weight = 1 - decay
    with torch.cuda.device_of(averages[0]):
        ema_lerp_kernel[(num_programs,)](
            *table, *two_parts(weight), len(averages),
            AVERAGE=ELEMENT_TYPES[averages[0].dtype], VALUE=ELEMENT_TYPES[values[0].dtype], NEAR_AVERAGE=weight < 0.5,
            ALIGNED=all(number % 16 == 0 for number in (*addresses, *value_addresses, *numels)),
            TENSORS=triton.next_power_of_2(len(averages)), CHUNKS=CHUNKS, BLOCK=BLOCK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    for average, copy in zip(averages, dense, strict=True):
        if copy is not average:
            average.copy_(copy)
