"""SIGINT and SIGTERM as a request to save and leave, on which all ranks agree."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from dgpo_fast.parallel.world import World
from dgpo_fast.profiling import stage

FAILED = 1
"""What a rank that has failed says, below every signal that is remembered."""


SAME_REQUEST_S = 5.0
"""Within which a SIGTERM after another is the same request: a scheduler's, and that which a launcher passes on."""


class Interrupted(Exception):
    """Every rank was asked to stop; `status` is the exit status that tells why, of a signal 128 + its number."""

    def __init__(self, status: int, *, way_on: str = "--resume goes on") -> None:
        super().__init__(status)
        self.status, self.way_on = status, way_on


class Interruption:
    """While entered, the first SIGINT and the first SIGTERM are remembered; a second one has its usual effect at once,
    but for a SIGTERM within `SAME_REQUEST_S` of the first.

    A launcher that Ctrl-C interrupts, as it does the ranks, may then terminate them: the two together are one request.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.received: int | None = None
        self._usual: dict[int, object] = {}
        self._terminated_at: float | None = None

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._usual[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def is_requested(self) -> bool:
        """Whether this rank has received a signal, of which the others may not know yet."""
        return self.received is not None

    def check(self, *, failed: bool = False) -> bool:
        """Whether any rank has `failed`; all must call it at the same places.

        Raises:
            Interrupted: on every rank, once any has received a signal, whoever has failed.
        """
        with stage("signals"):
            code = self.world.highest(self.received or (FAILED if failed else 0))
        if code > FAILED:
            raise Interrupted(128 + code)
        return code == FAILED

    def check_alone(self) -> None:
        """As `check` in a process alone; among several, each of which would wait for the slowest, nothing."""
        if self.world.size == 1:
            self.check()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGTERM:
            now = time.monotonic()
            self._terminated_at = now if self._terminated_at is None else self._terminated_at
            if now - self._terminated_at < SAME_REQUEST_S:
                return
        signal.signal(number, self._usual[number])  # type: ignore[arg-type]
        if number == signal.SIGTERM:
            signal.raise_signal(number)
