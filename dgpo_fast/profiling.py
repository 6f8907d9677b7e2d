"""Named stages of an iteration: NVTX ranges for Nsight, and wall-clock seconds for people.

Stages nest: "rollout" holds "transformer", "solver" and "vae", and its seconds hold theirs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import nvtx


@dataclass(slots=True)
class StageClock:
    """Seconds per path of stages, such as ("rollout", "transformer"), the time of inner stages included."""

    synchronize: Callable[[], None] = lambda: None
    """Waits for the device's work, at both ends of an outermost stage: the next would else be billed for it."""
    exact: bool = False
    """Whether inner stages wait too. They are then right one by one, and the device idles between them."""
    seconds: defaultdict[tuple[str, ...], float] = field(default_factory=lambda: defaultdict(float))
    calls: defaultdict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))
    path: tuple[str, ...] = ()

    def total(self, name: str) -> float:
        """Seconds spent in every stage of that name, wherever it stands."""
        return sum(seconds for path, seconds in self.seconds.items() if path[-1] == name)

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()


_clock = StageClock()


def use_clock(clock: StageClock) -> None:
    """Makes `clock` the one that `stage` counts on."""
    global _clock
    _clock = clock


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A named stretch of work: an NVTX range, counted on the clock in use."""
    clock, outer = _clock, _clock.path
    clock.path = (*outer, name)
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
            clock.seconds[clock.path] += time.perf_counter() - start
            clock.calls[clock.path] += 1
            clock.path = outer
