"""How Triton launchers see batches of samples, and the noise that kernels read or draw."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.alignment import row_at
from dgpo_fast.kernels.random_normal import draw_normals


@triton.jit
def load_noise(
    p_noise,
    noise_stride_g,
    i_g,
    i_block,
    o_n,
    m_n,
    DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    """Elements `o_n`, those of block `i_block`, of group `i_g`: read, or drawn from the four words that lie there.

    ALIGNED is for kernels that are told of alignment.
    """
    if DRAWN:
        b_noise = draw_normals(p_noise + i_g * noise_stride_g, i_block, BLOCK)
    else:
        b_noise = tl.load(row_at(p_noise, i_g * noise_stride_g, ALIGNED) + o_n, mask=m_n)
    return b_noise


def noise_source(noise: Tensor | None, streams: Tensor | None) -> tuple[Tensor, bool]:
    """What `load_noise` reads, and whether that is words to draw from."""
    if noise is not None:
        return flat_samples(noise), False
    assert streams is not None
    return streams.contiguous(), True


def flat_samples(tensor: Tensor, first_sample_dim: int = 1) -> Tensor:
    """`tensor` with its dimensions from `first_sample_dim` on merged into one of unit stride; a view if it can be."""
    flat = tensor.unsqueeze(-1).flatten(first_sample_dim)
    return flat if flat.stride(-1) == 1 else flat.contiguous()
