"""How numbers of 64 bits reach Triton kernels, which take floats of 32, and how these divide.

On NVIDIA `/` and `rsqrt` of float32 are approximate; what is here is rounded to the nearest.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def two_parts(number: float) -> tuple[float, float]:
    """`number` as a float32, and what that leaves."""
    first: float = struct.unpack("f", struct.pack("f", number))[0]
    return first, number - first


@triton.jit
def whole(first, rest):
    """The number that came in two parts, float64."""
    return tl.full([], first, tl.float64) + tl.full([], rest, tl.float64)


@triton.jit
def quotient(number, count):
    """`number` / `count`, an integer."""
    divisor = tl.cast(count, number.dtype)
    return tl.div_rn(number, divisor) if number.dtype == tl.float32 else number / divisor


@triton.jit
def reciprocal(number):
    """1 / `number`."""
    return tl.div_rn(1.0, number) if number.dtype == tl.float32 else 1 / number


@triton.jit
def reciprocal_root(number):
    """1 / sqrt(`number`), of float32 with two roundings."""
    return tl.div_rn(1.0, tl.sqrt_rn(number)) if number.dtype == tl.float32 else tl.rsqrt(number)
