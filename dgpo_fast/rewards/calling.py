"""What a reward is asked and what it answers, wherever it runs: scores, a failure, or a mistake in it.

A failure may be over the next time: the reward raised, its process or its server is gone, or it did not answer in time.
A mistake is not: the wrong number of scores, or what the reward itself calls a `UserError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from random import SystemRandom
from threading import Event, Thread
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.base import Reward

Metrics = Mapping[str, float]
"""Of one image, rounded to float32."""

BACKOFF_S = 0.5
"""Before the second attempt; doubled for each that follows, and made up to half longer or shorter by chance."""
START_S = 600.0
"""For a process to make its reward, whose model may have to be downloaded; and for all such starts of a batch."""
LATE_S = 60.0
"""After which an answer from elsewhere is late, where none has taken a third of that."""
POLL_S = 0.2
"""How often who waits looks whether it still should."""
MAX_REASON = 500


class Failure(NamedTuple):
    """Why images have no scores."""

    reason: str
    is_hang: bool = False
    """Whether nothing came at all for as long as it may take: one by one, images would take as long each."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(f"{type(error).__name__}: {error}")


class Answer(NamedTuple):
    """For the next `num_images` of those that were asked for: the metrics of each, or why there are none."""

    num_images: int
    metrics: Sequence[Metrics] | None
    failure: Failure | None = None


class Abandoned(Exception):
    """Nobody waits for the scores any more."""


class Patience:
    """How long somebody waits: until a time, and no longer than anybody wants to know.

    Args:
        start_s: beyond that, for processes to be started, all in all.
        whole: of which it is a part, which ends with it at the latest.
    """

    def __init__(self, seconds: float, stop: Event, *, start_s: float = 0.0, whole: Patience | None = None) -> None:
        self.seconds, self._stop, self._end = seconds, stop, time.monotonic() + seconds
        self._start_s, self._whole, self._longest_s = start_s, whole, 0.0
        self.started_s, self.is_starting = 0.0, False
        """How long starts have taken, and whether one goes on; of the whole, not of its parts."""
        if whole is not None:
            self._end = min(self._end, whole._end)

    def part(self, seconds: float) -> Patience:
        """Of that many seconds, from now on, or of all that is left."""
        return Patience(seconds, self._stop, whole=self)

    @property
    def whole(self) -> Patience:
        """What it is a part of, or itself."""
        return self._whole or self

    @property
    def all_left_to_start(self) -> Patience:
        """All that a start may take, what is left for answers included."""
        return Patience(self.whole._start_s + self.whole.left, self._stop)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While processes are started, which does not count, unless it takes too long."""
        whole, began = self.whole, time.monotonic()
        whole.is_starting = True
        yield
        whole.is_starting = False
        whole.started_s += time.monotonic() - began
        free_s = min(whole._start_s, time.monotonic() - began)
        whole._start_s -= free_s
        whole._end += free_s
        if whole is not self:
            self._end = min(self._end + free_s, whole._end)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """While something is called that nothing can stop."""
        began = time.monotonic()
        yield
        self._longest_s = max(self._longest_s, time.monotonic() - began)

    @property
    def has_time_for_a_call(self) -> bool:
        """Whether somebody waits for one that takes as long as the longest so far."""
        return self.left > self._longest_s and not self._stop.is_set()

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self._stop.is_set() or self.left == 0

    def await_all(self, threads: Iterable[Thread]) -> bool:
        """Whether the threads have ended in time."""
        for thread in threads:
            while thread.is_alive() and not self.is_over:
                thread.join(min(POLL_S, self.left))
        return not any(thread.is_alive() for thread in threads)

    def sleep(self, seconds: float) -> None:
        self._stop.wait(min(seconds, self.left))

    def check(self) -> None:
        """Raises `Abandoned` once nobody waits."""
        if self._stop.is_set():
            raise Abandoned


@dataclass(slots=True)
class Pace:
    """How a reward that runs elsewhere answers."""

    longest_s: float = 0.0
    """That an answer has taken."""
    has_hung: bool = False
    """Whether nothing came the last time that it was asked."""
    is_said: bool = False
    """Whether somebody was told of it since."""

    @property
    def late_s(self) -> float:
        return max(LATE_S, 3 * self.longest_s)

    def answered(self, answers: Sequence[Answer], seconds: float) -> None:
        """Takes what came for a batch, after so many seconds."""
        hung = [answer.failure is not None and answer.failure.is_hang for answer in answers]
        self.has_hung = all(hung)
        if not any(hung):
            self.longest_s, self.is_said = max(self.longest_s, seconds), False


class Place(Protocol):
    """Where a reward runs."""

    is_elsewhere: bool
    """Whether it is asked while other rewards are, too; its images then come on the CPU."""

    def ask(self, images_BCHW: Tensor, prompts: Sequence[str], patience: Patience) -> list[Answer]:
        """Answers for all images, in their order.

        Raises:
            UserError: a mistake in the reward, or in how it is reached.
            Abandoned: nobody waits.
        """
        ...

    def close(self) -> None:
        """Ends what runs for it."""
        ...


def backoff(attempt: int) -> float:
    """Seconds to wait before attempt number `attempt`, counted from 0, is made again."""
    # Not from a generator that anything else draws from: how a run learns must not depend on what failed.
    return BACKOFF_S * 2.0 ** min(attempt, 6) * SystemRandom().uniform(0.5, 1.5)


def call(name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> list[Metrics]:
    """The metrics of each image, from a reward in this process.

    Raises:
        UserError: the reward says so, or it returns anything but a score for each image.
        Exception: whatever else it raises.
    """
    # A graph of the reward's own model would reach the advantages; and to a reward "cuda" is where its images are.
    with torch.no_grad(), _current(images_BCHW.device):
        output = reward(images_BCHW, prompts)
    named = output if isinstance(output, Mapping) else {name: output}
    return rows(name, {metric: torch.as_tensor(score).detach() for metric, score in named.items()}, len(prompts))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Threads begin with the first GPU as the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rows(name: str, scores: Mapping[str, Tensor], count: int) -> list[Metrics]:
    """Metrics of each of `count` images from those of all, which may be of any dtype and on any device.

    Raises:
        UserError: there is no metric, or not a score for each image.
    """
    if not scores:
        raise UserError(f"rewards: {name!r} returned no scores")
    for metric, score_B in scores.items():
        if score_B.shape != (count,):
            raise UserError(
                f"rewards: {name!r} returned {list(score_B.shape)} scores ({metric}) for {count} images; "
                "expected one for each"
            )
    columns = {metric: score_B.to("cpu", torch.float32).tolist() for metric, score_B in scores.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def attempt(count: int, ask: Callable[[], Sequence[Metrics]]) -> Answer:
    """What `ask` gives for `count` images, or why it failed.

    Raises:
        UserError, Abandoned: as `ask`.
    """
    try:
        return Answer(count, ask())
    except (UserError, Abandoned):
        raise
    except (Exception, SystemExit) as error:  # whatever a user's reward raises, or a library that it calls
        return Answer(count, None, Failure.of(error))


class Here:
    """A reward in this process, which nothing can stop once it is called.

    Args:
        device: to which the images are moved; None leaves them where they are.
        images_per_call: None for all at once.
    """

    is_elsewhere = False

    def __init__(
        self, name: str, reward: Reward, *, device: torch.device | None = None, images_per_call: int | None = None
    ) -> None:
        self._name, self._reward, self._device, self._images_per_call = name, reward, device, images_per_call
        self._asked_until: Patience | None = None

    @property
    def is_overdue(self) -> bool:
        """Whether it has been at a batch for longer than it may."""
        patience = self._asked_until
        return patience is not None and patience.left == 0

    def ask(self, images_BCHW: Tensor, prompts: Sequence[str], patience: Patience) -> list[Answer]:
        answers, size = [], self._images_per_call or len(prompts)
        self._asked_until = patience
        try:
            for start in range(0, len(prompts), size):
                patience.check()
                piece_BCHW, asked = images_BCHW[start : start + size], prompts[start : start + size]
                if not patience.has_time_for_a_call:  # one that is overdue would end the run
                    reason = f"not asked: of {patience.seconds:g} s too little is left"
                    answers.append(Answer(len(asked), None, Failure(reason, is_hang=True)))
                    continue
                piece_BCHW = piece_BCHW if self._device is None else piece_BCHW.to(self._device)
                with patience.calling():
                    answers.append(attempt(len(asked), partial(call, self._name, self._reward, piece_BCHW, asked)))
        finally:
            self._asked_until = None
        return answers

    def close(self) -> None:
        """Nothing runs for it but the process."""
