"""Named stretches of an iteration: ranges for a profiler, and wall-clock seconds for people.

Stages are timed and nest: "rollout" holds "transformer" and "solver", and its seconds hold theirs. Every thread has
stages of its own: those of one thread follow each other, those of two pass at the same time. Spans are not timed;
they say what is inside a stage, to a profiler alone.

Ranges go to NVTX, in a domain of their own, where a tool such as Nsight is attached to the process, and to whoever
`watched_by` names. Where nobody watches, a span is the look-up of an empty tuple.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import nvtx

BACKGROUND = "background"
"""The stage of a thread that works beside an iteration: its seconds pass while those of other stages do."""
DOMAIN = "dgpo_fast"
"""The NVTX domain of every range."""

Category = Literal["stage", "solver step", "block"]
Watcher = Callable[[str, Category], AbstractContextManager[object]]
"""(name, category) -> what is entered where the range begins, and left where it ends."""


class NvtxRange:
    """A range of the domain, with its attributes made once: each use is two calls into NVTX, and any thread's."""

    __slots__ = ("_attributes",)

    def __init__(self, name: str, category: Category) -> None:
        # The domain registers the string: Nsight Systems begins its capture at registered names only.
        self._attributes = _domain.get_event_attributes(message=name, category=category)

    def __enter__(self) -> None:
        _domain.push_range(self._attributes)

    def __exit__(self, *_: object) -> None:
        _domain.pop_range()


_domain = nvtx.get_domain(DOMAIN)
nvtx_range = cache(NvtxRange)
# A tool is attached when the process starts or never; without one nvtx gives out a domain of another class.
_watchers: tuple[Watcher, ...] = (nvtx_range,) if isinstance(_domain, nvtx.Domain) else ()
_NOTHING = nullcontext()


def span(name: str, category: Category) -> AbstractContextManager[object]:
    """A named stretch of work for whoever watches; it waits for nothing, so it may lie in a CUDA graph's capture."""
    return _watched(name, category) if _watchers else _NOTHING


def _watched(name: str, category: Category) -> AbstractContextManager[object]:
    return _watchers[0](name, category) if len(_watchers) == 1 else _by_all(name, category)


@contextmanager
def _by_all(name: str, category: Category) -> Iterator[None]:
    with ExitStack() as ranges:
        for watcher in _watchers:
            ranges.enter_context(watcher(name, category))
        yield


def is_watched() -> bool:
    """Whether ranges are told to anybody: a tool is attached, or a trace is recorded."""
    return bool(_watchers)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Has `watcher` told of the ranges of all threads while it lasts, as others are."""
    global _watchers
    before, _watchers = _watchers, (*_watchers, watcher)
    try:
        yield
    finally:
        _watchers = before


@dataclass(slots=True)
class StageClock:
    """Seconds per path of stages, such as ("rollout", "transformer"), the time of inner stages included."""

    synchronize: Callable[[], None] = lambda: None
    """Waits for the thread's work on the device, at both ends of an outermost stage: else the next is billed for it."""
    exact: bool = False
    """Whether inner stages wait too. They are then right one by one, and the device idles between them."""
    seconds: defaultdict[tuple[str, ...], float] = field(default_factory=lambda: defaultdict(float))
    calls: defaultdict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))

    def by_name(self) -> dict[str, float]:
        """Seconds per path, such as "rollout/transformer"."""
        return {"/".join(path): seconds for path, seconds in self.seconds.items()}

    def add(self, seconds_by_name: Mapping[str, float]) -> None:
        """Counts what `by_name` gave of an earlier process."""
        for name, seconds in seconds_by_name.items():
            self.seconds[tuple(name.split("/"))] += seconds

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
    """A named stretch of work: a span, counted on the clock in use."""
    clock, outer = _clock, _path.get()
    path = (*outer, name)
    before = _path.set(path)
    waits = clock.exact or not outer
    with span(name, "stage"):
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
