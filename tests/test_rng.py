"""Random streams against published answers, an independent Philox, and the distributions they claim."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dgpo_fast.rng import Stream, choice, normal, permutation, philox4x32_10, random_words, stream

words32 = st.integers(0, 2**32 - 1)

GOLDEN_STREAM = Stream(0x9F1D754E, 0x797EC1E2, 0x1F839907, 0x0F2DEB79)
GOLDEN_WORDS = [0x51D6A2D4, 0x82A2FE94]
GOLDEN_NORMALS = [-1.50709068775177, -0.0976666733622551]
GOLDEN_PERMUTATION = [3, 4, 2, 5, 6, 0, 7, 1]


def philox_reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def philox(counter: list[int], key: list[int]) -> list[int]:
    counter_words, key_words = (tuple(torch.tensor([word]) for word in words) for words in (counter, key))
    return [int(word) for word in philox4x32_10(counter_words, key_words)]


# Random123, tests/kat_vectors: zeros, ones, digits of pi.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox(counter, key) == philox_reference(counter, key) == expected


@settings(deadline=None)
@given(counter=st.tuples(*[words32] * 4), key=st.tuples(*[words32] * 2))
def test_philox_equals_unbounded_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert philox(list(counter), list(key)) == philox_reference(list(counter), list(key))


@settings(deadline=None, max_examples=20)
@given(streams=st.lists(st.builds(Stream, *[words32] * 4), max_size=3), count=st.integers(0, 13))
def test_words_are_laid_out_as_documented(streams: list[Stream], count: int) -> None:
    expected = [
        [philox_reference([i // 4, 0, name.w2, name.w3], [name.w0, name.w1])[i % 4] for i in range(count)]
        for name in streams
    ]
    words = random_words(streams, count)

    assert words.shape == (len(streams), count)
    assert words.dtype == torch.int64
    assert words.tolist() == expected


def test_a_stream_is_named_by_all_its_fields() -> None:
    names = itertools.product((0, 1), ("a", "b", "ab"), (0, 1), (0, 1), ("shared", 0, 1), (0, 1))
    streams = [
        stream(seed, stage=stage, iteration=iteration, group=group, sample=sample, timestep=timestep)
        for seed, stage, iteration, group, sample, timestep in names
    ]
    assert len(set(streams)) == len(streams) == 2 * 3 * 2 * 2 * 3 * 2
    assert len(set(streams[0])) == 4
    assert stream(1, stage='a",1,"') != stream(1, stage="a", iteration=1)


def test_streams_never_change() -> None:
    """Golden values on any machine, for any PYTHONHASHSEED: with others no run could be resumed or repeated."""
    name = stream(42, stage="rollout", iteration=7, group=3, sample=5, timestep=2)

    assert name == GOLDEN_STREAM
    assert random_words([name], 2).tolist() == [GOLDEN_WORDS]
    assert normal([name], (2,)).tolist() == [GOLDEN_NORMALS]
    assert permutation(name, 8) == GOLDEN_PERMUTATION


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (4, 33, 65)])
def test_a_draw_does_not_depend_on_batch_order_or_threads(num_threads: int, shape: tuple[int, ...]) -> None:
    streams = [stream(0, stage="test", sample=i) for i in range(7)]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together, reversed_order = normal(streams, shape), normal(streams[::-1], shape)
        alone = [normal([name], shape)[0] for name in streams]
    finally:
        torch.set_num_threads(before)

    assert together.shape == (7, *shape)
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together, reversed_order.flip(0))


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    name = stream(0, stage="test")
    longer = normal([name], (101,))
    for count in range(101):
        assert torch.equal(normal([name], (count,)), longer[:, :count])


def test_no_streams_give_an_empty_draw() -> None:
    assert random_words([], 5).shape == (0, 5)
    assert normal([], (2, 3)).shape == (0, 2, 3)


def test_normals_follow_the_documented_equations() -> None:
    name = stream(3, stage="test")
    a, b = random_words([name], 2)[0].tolist()
    radius, angle = math.sqrt(-2 * math.log((a + 0.5) / 2**32)), 2 * math.pi * b / 2**32

    expected = np.array([radius * math.cos(angle), radius * math.sin(angle)], dtype=np.float32)
    np.testing.assert_array_equal(normal([name], (2,))[0].numpy(), expected)


def test_normals_are_finite_at_the_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, 0, 2**32 - 1, 2**32 - 1]])
    monkeypatch.setattr("dgpo_fast.rng.random_words", lambda streams, count, device: extremes)
    numbers = normal([Stream(0, 0, 0, 0)], (4,))

    assert numbers[0, 0] == pytest.approx(math.sqrt(2 * 33 * math.log(2)))
    assert torch.isfinite(numbers).all()
    assert numbers.abs().max() < 6.77


def test_normals_are_normal_and_independent() -> None:
    # 2^20 numbers of fixed streams: each statistic lies within 4 of its standard errors, and always will.
    numbers = normal([stream(0, stage="test", sample=i) for i in range(64)], (2**14,)).double()
    n = numbers.numel()

    assert abs(numbers.mean()) < 4 * n**-0.5
    assert abs(numbers.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(numbers.pow(3).mean()) < 4 * (15 / n) ** 0.5
    assert abs(numbers.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 0.01
    for lag in (1, 2, 3, 4):
        assert abs((numbers[:, lag:] * numbers[:, :-lag]).mean()) < 4 * n**-0.5
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 4 * n**-0.5


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**63), n=st.integers(0, 50))
def test_a_permutation_has_every_number_once(seed: int, n: int) -> None:
    assert sorted(permutation(stream(seed, stage="test"), n)) == list(range(n))


def test_permutations_are_uniform() -> None:
    names = [stream(0, stage="test", sample=i) for i in range(1200)]
    counts = {order: 0 for order in itertools.permutations(range(4))}
    for name in names:
        counts[tuple(permutation(name, 4))] += 1

    assert stats.chisquare(list(counts.values())).pvalue > 0.01


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**63), n=st.integers(0, 30), data=st.data())
def test_a_choice_is_a_set_of_k(seed: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    chosen = choice(stream(seed, stage="test"), n, k=k)

    assert len(set(chosen)) == len(chosen) == k
    assert set(chosen) <= set(range(n))
