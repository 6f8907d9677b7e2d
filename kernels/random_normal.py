"""Normal numbers of named streams inside Triton kernels: csrc/common/philox.h and normal.h, step by step.

The numbers are those of dgpo_fast/rng.py to 4 ulp of float32; the integers behind them are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def draw_normals(p_words, i_block, BLOCK: tl.constexpr):
    """Elements i_block * BLOCK, ... of the stream whose four words lie at `p_words` (int64): float32 [BLOCK].

    A Philox block gives four neighbouring elements, so that a thread stores what it has drawn.
    """
    w0, w1 = tl.load(p_words), tl.load(p_words + 1)
    w2, w3 = tl.load(p_words + 2).to(tl.uint32), tl.load(p_words + 3).to(tl.uint32)
    o_philox = i_block.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    c0, c1 = o_philox.to(tl.uint32), (o_philox >> 32).to(tl.uint32)
    zeros = tl.zeros([BLOCK // 4], tl.uint32)
    b_w0, b_w1, b_w2, b_w3 = tl.philox(w0 | (w1 << 32), c0, c1, zeros + w2, zeros + w3)
    b_n0, b_n1 = box_muller(b_w0, b_w1)
    b_n2, b_n3 = box_muller(b_w2, b_w3)
    return tl.reshape(tl.join(tl.join(b_n0, b_n2), tl.join(b_n1, b_n3)), [BLOCK])


@triton.jit
def box_muller(b_a, b_b):
    """Two standard normal numbers from two words."""
    b_radius = tl.sqrt_rn(-2.0 * log_uniform(b_a))
    # The angle within an octant, exact in integers; there sin and cos are their Taylor series.
    b_quadrant = (b_b + 0x20000000) >> 30
    # The offset has more digits than a float, and so has pi: what x lacks of both is added at the end.
    b_offset = (b_b - (b_quadrant << 30)).to(tl.int32, bitcast=True)
    b_rounded = b_offset.to(tl.float32)
    b_lost = (b_offset - b_rounded.to(tl.int32)).to(tl.float32)
    b_x = b_rounded * 1.4629180792671596e-09
    b_x_lost = b_lost * 1.4629180792671596e-09 - b_rounded * 4.070940267922164e-17
    b_z = b_x * b_x
    b_sin = b_z * (1.0 / 362880) - 1.0 / 5040
    b_sin = b_sin * b_z + 1.0 / 120
    b_sin = b_sin * b_z - 1.0 / 6
    b_sin = b_x + (b_x * b_z * b_sin + b_x_lost)
    b_cos = b_z * (-1.0 / 3628800) + 1.0 / 40320
    b_cos = b_cos * b_z - 1.0 / 720
    b_cos = b_cos * b_z + 1.0 / 24
    b_cos = b_cos * b_z - 0.5
    b_cos = 1.0 + (b_z * b_cos - b_x * b_x_lost)
    swapped = (b_quadrant & 1) != 0
    b_first = b_radius * tl.where(swapped, b_sin, b_cos)
    b_second = b_radius * tl.where(swapped, b_cos, b_sin)
    # The sign comes last: a product would be fused into the caller's next sum, where noise that was given is not.
    b_first = tl.where(((b_quadrant + 1) & 2) != 0, -b_first, b_first)
    b_second = tl.where((b_quadrant & 2) != 0, -b_second, b_second)
    return b_first, b_second


@triton.jit
def log_uniform(b_word):
    """log((word + 1/2) / 2^32) as e ln 2 + log(1 + f), with the distance to 1 where the number is near 1."""
    near_one = b_word > 0x99999999  # 0.6
    b_distance = ((b_word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    b_shifted = (b_word.to(tl.float32) + 0.5).to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    b_mantissa = ((b_shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    b_e = tl.where(near_one, 0.0, ((b_shifted >> 23).to(tl.int32, bitcast=True) - (127 + 32)).to(tl.float32))
    b_f = tl.where(near_one, -b_distance, b_mantissa - 1.0)
    b_s = tl.div_rn(b_f, 2.0 + b_f)
    b_z = b_s * b_s
    b_series = b_z * (1.0 / 11) + 1.0 / 9
    b_series = b_series * b_z + 1.0 / 7
    b_series = b_series * b_z + 1.0 / 5
    b_series = b_series * b_z + 1.0 / 3
    b_half_square = 0.5 * b_f * b_f
    b_rest = b_s * (b_half_square + 2.0 * b_z * b_series)
    # ln 2 in two parts.
    return b_e * 0.693145751953125 + (b_f - (b_half_square - (b_rest + b_e * 1.428606765330187e-06)))
