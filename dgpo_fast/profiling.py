"""Named stages of an iteration: NVTX ranges for Nsight, and wall-clock seconds for people.

Stages nest: "rollout" holds "transformer" and "solver", and its seconds hold theirs. Every thread has stages of its
own: those of one thread follow each other, those of two pass at the same time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import nvtx

BACKGROUND = "background"
"""The stage of a thread that works beside an iteration: its seconds pass while those of other stages do."""


@dataclass(slots=True)
class StageClock:
    """Seconds per path of stages, such as ("rollout", "transformer"), the time of inner stages included."""

    synchronize: Callable[[], None] = lambda: None
    """Waits for the thread's work on the device, at both ends of an outermost stage: else the next is billed for it."""
    exact: bool = False
    """Whether inner stages wait too. They are then right one by one, and the device idles between them."""
    seconds: defaultdict[tuple[str, ...], float] = field(default_factory=lambda: defaultdict(float))
    calls: defaultdict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))

    def total(self, name: str) -> float:
        """Seconds spent in every stage of that name, wherever it stands."""
        return sum(seconds for path, seconds in self.seconds.items() if path[-1] == name)

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()


_clock = StageClock()
_path: ContextVar[tuple[str, ...]] = ContextVar("path", default=())  # a new thread begins without


def use_clock(clock: StageClock) -> None:
    """Makes `clock` the one that `stage` counts on."""
    global _clock
    _clock = clock


def current_path() -> tuple[str, ...]:
    """The stages that this thread is in, the outermost first."""
    return _path.get()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A named stretch of work: an NVTX range, counted on the clock in use."""
    clock, outer = _clock, _path.get()
    path = (*outer, name)
    before = _path.set(path)
    waits = clock.exact or not outer
    with nvtx.annotate(name, domain="dgpo_fast"):
        if waits:
            clock.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            if waits:
                clock.synchronize()
            clock.seconds[path] += time.perf_counter() - start
            clock.calls[path] += 1
            _path.reset(before)
