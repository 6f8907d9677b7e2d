"""Times of competing implementations, taken in turn so that a change of clock or load meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Variants = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Microseconds of one call: the median and the 20 % and 80 % quantiles of the rounds."""

    median_us: float
    low_us: float
    high_us: float


def interleaved(variants: Variants, *, rounds: int = 30, device: str = "cpu") -> dict[str, Duration]:
    """The duration of each variant, from `rounds` rounds in which every variant has its turn.

    On the CPU a turn is about two milliseconds of calls, whose data stay in the caches that hold them. On CUDA it is
    one call on a warm clock and a cold L2, and its duration the device's alone: launches are hidden, as they are
    behind a large model.
    """
    samples = (_on_cuda if device == "cuda" else _on_cpu)(variants, rounds)
    return {name: _duration(times_us) for name, times_us in samples.items()}


def copy_of(num_bytes: int, *, device: str = "cpu") -> Callable[[], object]:
    """A copy whose reads and writes together move `num_bytes`."""
    source = torch.ones(max(num_bytes // 8, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Torch's own, while it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_cpu(variants: Variants, rounds: int) -> dict[str, list[float]]:
    calls = {name: _calls_in(0.002, call) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(_seconds_per_call(call, calls[name]) * 1e6)
    return samples


def _on_cuda(variants: Variants, rounds: int) -> dict[str, list[float]]:
    # Twice the cache, so that none of it survives whatever the replacement; it is left dirty, as a model leaves it.
    flush = torch.empty(2 * torch.cuda.get_device_properties("cuda").L2_cache_size, dtype=torch.uint8, device="cuda")
    waits = {name: _cycles_to_launch(call) for name, call in variants.items()}
    _warm_the_clock(variants)
    events = {name: [_timing_events() for _ in range(rounds)] for name in variants}
    for i in range(rounds):
        for name, call in variants.items():
            flush.zero_()
            torch.cuda._sleep(waits[name])
            start, end = events[name][i]
            start.record()
            call()
            end.record()
    torch.cuda.synchronize()
    return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _cycles_to_launch(call: Callable[[], object]) -> int:
    """Cycles in which the host has surely launched a call: twice what it takes, at 2 GHz."""
    call()
    torch.cuda.synchronize()
    return int(2 * _seconds_per_call(call, 3) * 2e9)


def _warm_the_clock(variants: Variants, seconds: float = 0.2) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call in variants.values():
            call()
        torch.cuda.synchronize()


def _timing_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _calls_in(seconds: float, call: Callable[[], object]) -> int:
    call()
    return max(1, int(seconds / _seconds_per_call(call, 3)))


def _seconds_per_call(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _duration(times_us: Sequence[float]) -> Duration:
    fifths = statistics.quantiles(times_us, n=5, method="inclusive")
    return Duration(median_us=statistics.median(times_us), low_us=fifths[0], high_us=fifths[-1])
