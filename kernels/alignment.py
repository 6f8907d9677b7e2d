"""What a kernel knows of where its rows begin.

Triton looks at each pointer and stride by itself and shares elements among threads accordingly, so the order of sums
would change with where one operand lies. Kernels with sums are told instead, for all operands together: their sums have
one order where every row is aligned, and one where any is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def jit_told_alignment(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, but that Triton does not look at pointers, "p_...", and strides: ALIGNED tells of them."""
    names = [name for name in inspect.signature(kernel).parameters if name.startswith("p_") or "_stride_" in name]
    return triton.jit(kernel, do_not_specialize=names)


@triton.jit
def row_at(p_first, offset, ALIGNED: tl.constexpr):
    """Where the row `offset` elements behind `p_first` begins: at a multiple of 16 bytes where ALIGNED."""
    p_row = p_first + offset
    if ALIGNED:
        p_row = tl.multiple_of(p_row, 16)
    return p_row


def rows_are_aligned(*tensors: Tensor) -> bool:
    """Whether each row, the last dimension, of all `tensors` begins at a multiple of 16 bytes and has 16 n elements.

    Rows of new contiguous memory do so if they have the length.
    """
    return all(
        tensor.shape[-1] % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and all(
            size <= 1 or stride * tensor.element_size() % 16 == 0
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
        for tensor in tensors
    )
