"""Named random streams: Philox4x32-10 words and what is drawn from them.

A stream is named by what it is for (seed, stage, iteration, group, sample, timestep), never by who draws it, and each
of its elements is a pure function of that name and the element's index. So a run draws the same noise, prompts and
timesteps on any number of ranks, in any order and any batches, and a kernel can make them where they are used.

    words w0 w1 w2 w3 = BLAKE2b-128(name), little-endian
    block i           = Philox4x32-10(key = (w0, w1), counter = (i mod 2^32, i div 2^32, w2, w3))
    element 4 i + j   = word j of block i

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011) and its Random123 library.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


class Stream(NamedTuple):
    """The hash of a stream's name: four words in [0, 2^32)."""

    w0: int
    w1: int
    w2: int
    w3: int


def stream(
    seed: int,
    *,
    stage: str,
    iteration: int = 0,
    group: int = 0,
    sample: int | Literal["shared"] = "shared",
    timestep: int = 0,
) -> Stream:
    """The stream of this name; another name gives another, independent stream.

    Args:
        seed: seed of the run.
        stage: what the numbers are for, such as "rollout" or "prompts".
        iteration: iteration of the trainer.
        group: group of samples, counted over all ranks.
        sample: sample within its group, or "shared" for what a group has in common.
        timestep: index of a training timestep.
    """
    # As JSON, since no two lists have the same text and numbers that are not plain integers are refused.
    name = json.dumps([seed, stage, iteration, group, sample, timestep], separators=(",", ":"))
    return Stream(*struct.unpack("<4I", hashlib.blake2b(name.encode(), digest_size=16).digest()))


def random_words(streams: Sequence[Stream] | Tensor, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The first `count` elements of each stream, uniform in [0, 2^32): int64 [len(streams), count] on `device`.

    `streams` may be their words, int64 [len(streams), 4]. Made of integer operations only, so equal to the bit on every
    device.
    """
    w0, w1, w2, w3 = torch.as_tensor(streams, dtype=torch.int64, device=device).view(len(streams), 4, 1).unbind(1)
    block = torch.arange(-(-count // 4), device=device)
    words = philox4x32_10((block & MASK32, block >> 32, w2, w3), (w0, w1))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of Philox4x32-10 at each counter, broadcast over counter and key; int64 tensors in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        round_k0 = (k0 + i * KEY_INCREMENTS[0]) & MASK32
        round_k1 = (k1 + i * KEY_INCREMENTS[1]) & MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ round_k0, low1, high0 ^ c3 ^ round_k1, low0
    return c0, c1, c2, c3


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    # The product overflows a signed 64-bit integer. (multiplier - 2^32) * word does not, as multiplier > 2^31, and has
    # the same low half.
    product = word * (multiplier - 2**32)
    return (product >> 32) + word, product & MASK32


def normal(streams: Sequence[Stream] | Tensor, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers of each stream: float32 [len(streams), *shape] on `device`.

    Box and Muller's transform of each pair of elements a = words[2 k], b = words[2 k + 1], in float64:

        radius = sqrt(-2 log((a + 1/2) / 2^32)),    angle = 2 pi b / 2^32
        normal[2 k] = radius cos(angle),            normal[2 k + 1] = radius sin(angle)

    so |normal| < 6.77. Float64 libraries were seen to differ in 1.4 % of these numbers, by an ulp (SLEEF against glibc,
    4 million numbers). Rounding to float32 hides that but for one number in 10^10: in practice the draw does not depend
    on vector width, number of threads or machine.
    """
    count = math.prod(shape)
    num_pairs = -(-count // 2)
    words = random_words(streams, 2 * num_pairs, device=device).view(len(streams), num_pairs, 2).double()
    radius = ((words[..., 0] + 0.5) / 2**32).log_().mul_(-2).sqrt_()
    angle = words[..., 1] * (2 * math.pi / 2**32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :count].float().view(len(streams), *shape)


def permutation(stream: Stream, n: int) -> list[int]:
    """The integers 0 to n - 1 in random order: stably sorted by 64-bit words, element 2 k the low half of word k."""
    low, high = random_words([stream], 2 * n).numpy().astype(np.uint64).reshape(n, 2).T
    order: list[int] = np.argsort(low | high << np.uint64(32), kind="stable").tolist()
    return order


def choice(stream: Stream, n: int, *, k: int) -> list[int]:
    """k different integers out of 0 to n - 1, in the order they were drawn."""
    assert k <= n, f"cannot choose {k} different integers out of {n}"
    return permutation(stream, n)[:k]
