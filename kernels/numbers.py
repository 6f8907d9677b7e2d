"""How Triton kernels receive numbers of 64 bits."""

from __future__ import annotations

import struct


def two_parts(number: float) -> tuple[float, float]:
    """`number` as a float32 and what that leaves: Triton hands a kernel floats of 32 bits."""
    first: float = struct.unpack("f", struct.pack("f", number))[0]
    return first, number - first
