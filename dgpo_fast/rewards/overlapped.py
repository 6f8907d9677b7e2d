"""Images decoded and scored by a thread of their own, on a stream of their own, while the next ones are sampled.

    sampling       sample 0   sample 1            sample 2            ...
    this thread               decode 0, score 0   decode 1, score 1   ...

Batches are taken one at a time and in their order: rewards see what they would see without the thread, and no more than
one batch of images is alive. Nothing here speaks to other ranks.

On a CPU sampling and decoding want the same cores and slow each other down: there `add` decodes, and the thread scores.

Who waits for the thread looks now and then whether a reward hangs, and then ends the run: no thread can be stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from queue import Full, Queue, SimpleQueue
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.profiling import BACKGROUND, stage
from dgpo_fast.rewards.calling import POLL_S
from dgpo_fast.rewards.scoring import Measured, Scorer, Scores, refuse_failures, total_failures

if TYPE_CHECKING:
    from dgpo_fast.models.sd3 import StableDiffusion3


MAX_IMAGES_WAITING = 4
"""Batches of images, where they are decoded before they wait: 50 MB for sixteen of 512 pixels. Whoever samples has to
wait for the scores in the end, so it loses nothing by waiting before."""
LEAVE_S = 30.0
"""For the batch in work, where what was sampled is of no use any more: those who stop a run soon kill it."""


class _Batch(NamedTuple):
    given_BCHW: Tensor  # latents where the thread decodes, else images
    prompts: Sequence[str]
    drawn: Any  # the device's Event, recorded once the latents are there


class OverlappedScoring:
    """Scores of the latents that are added while it is entered; leaving it waits for them.

    Left by an exception, it gives up what runs elsewhere, waits `LEAVE_S` for the batch in work in this process, and
    drops the others. Left by a KeyboardInterrupt, the second signal to a run, it does not wait at all.

    Args:
        model: whose images they are, decoded `images_per_decode` at a time.
        num_images: how many there will be, over all ranks, that a share of may fail.
        max_waiting: batches that may wait for the thread before `add` waits too; 0 for any number. None: any number of
            latents, which an iteration keeps anyway, and `MAX_IMAGES_WAITING` of images.
        thread_decodes: whether the thread decodes too; None: unless the model is on a CPU.
        is_over: whether nobody wants the scores any more: what waits for them then ends, as if left by an exception.
    """

    def __init__(
        self,
        scorer: Scorer,
        model: StableDiffusion3,
        *,
        images_per_decode: int,
        num_images: int,
        max_waiting: int | None = None,
        thread_decodes: bool | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_over = is_over
        self._scorer, self._model, self._images_per_decode = scorer, model, images_per_decode
        self._thread_decodes = model.device.type != "cpu" if thread_decodes is None else thread_decodes
        self._runtime = torch.get_device_module(model.device)  # torch.cuda, or torch.cpu, where all is done at once
        self._stream = _side_stream(model.device)
        if max_waiting is None:
            max_waiting = 0 if self._thread_decodes else MAX_IMAGES_WAITING
        self._num_images = num_images
        self._queue: Queue[_Batch | None] = Queue(max_waiting)
        self._measured: list[Measured] = []
        self._error: BaseException | None = None
        self._abandoned = False

    def __enter__(self) -> OverlappedScoring:
        self._scorer.resume()
        self._done = (_idle.pop() if _idle else _Thread()).begin(self._work)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._finish():
            return
        self._abandoned = True
        self._scorer.stop.set()
        if kind is None or issubclass(kind, Exception):
            with stage("reward"):
                self._leave()

    def add(self, x0_BCHW: Tensor, prompts: Sequence[str]) -> None:
        """Hands over clean latents, a prompt each; the device may still be drawing them.

        Raises:
            UserError: as `Scorer.measure` or `refuse_failures`, of an earlier batch; or a reward hangs.
        """
        self._raise_error()
        self._scorer.check_hang()
        given_BCHW = x0_BCHW if self._thread_decodes else self._decode(x0_BCHW)
        drawn = self._event()
        drawn.record()
        self._put(_Batch(given_BCHW, prompts, drawn))

    def scores(self) -> Scores:
        """Of all samples in the order in which they were added; to be asked for after leaving.

        Raises:
            UserError: as `Scorer.measure` and `Scorer.combine`.
        """
        self._raise_error()
        return self._scorer.combine(self._measured)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _finish(self) -> bool:
        """Waits for the thread to score all; whether it has, or somebody still wants it to."""
        with stage("reward"):
            self._put(None)
            while not self._done.wait(POLL_S):
                self._scorer.check_hang()
                if self._is_over():
                    return False
        return True

    def _put(self, batch: _Batch | None) -> None:
        """Hands a batch to the thread, or tells it that there are no more, as soon as fewer wait."""
        while not self._is_over():
            try:
                return self._queue.put(batch, timeout=POLL_S)
            except Full:
                self._scorer.check_hang()

    def _leave(self) -> None:
        """Has the thread end, and waits for that as long as it makes sense."""
        end = time.monotonic() + LEAVE_S
        with suppress(Full):  # where batches wait, the thread waits for none, and finds that it is abandoned
            self._queue.put_nowait(None)
        with suppress(UserError):  # why we leave is more to the point than that a reward hangs, too
            while not self._done.wait(POLL_S) and time.monotonic() < end:
                self._scorer.check_hang()

    def _work(self) -> None:
        if self._model.device.type == "cuda":
            # Threads begin on the first GPU, and going back to it would make every rank a context there.
            torch.cuda.set_device(self._stream.device)
        with self._runtime.stream(self._stream):  # on whose device the thread then is
            while not self._abandoned and (batch := self._queue.get()) is not None:
                if self._error is None and not self._abandoned:  # else only taken, that no `add` waits for ever
                    try:
                        self._measured.append(self._score(batch))
                        self._check_failures()
                    except BaseException as error:
                        self._error = error

    def _check_failures(self) -> None:
        """What has failed on this rank alone may be too much for all of them."""
        failed = total_failures([measured.failed for measured in self._measured])
        num_failed = sum(measured.num_failed for measured in self._measured)
        refuse_failures(failed, num_failed, total=self._num_images, config=self._scorer.config)

    def _score(self, batch: _Batch) -> Measured:
        batch.drawn.synchronize()  # before the stage: what samples is not this thread's work
        with stage(BACKGROUND):
            images_BCHW = self._decode(batch.given_BCHW) if self._thread_decodes else batch.given_BCHW
            with stage("reward"):
                measured = self._scorer.measure(images_BCHW, batch.prompts)
            # A reward need not look at its images: the latents' memory is free for others only once they are decoded.
            done = self._event()
            done.record()
            done.synchronize()
        return measured

    def _event(self) -> Any:
        # Who waits for CUDA is to sleep: it would take a core from the thread that launches.
        return self._runtime.Event(blocking=True) if self._model.device.type == "cuda" else self._runtime.Event()

    def _decode(self, x0_BCHW: Tensor) -> Tensor:
        return self._model.decode(x0_BCHW, images_per_forward=self._images_per_decode)


class _Thread:
    """A thread that does one thing after another: libraries plan convolutions anew for each thread that asks."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], None], Event]] = SimpleQueue()
        Thread(target=self._run, name="rewards", daemon=True).start()  # a hanging reward must not keep us alive

    def begin(self, job: Callable[[], None]) -> Event:
        """An event that is set when the job is done."""
        done = Event()
        self._jobs.put((job, done))
        return done

    def _run(self) -> None:
        while True:
            job, done = self._jobs.get()
            try:
                job()
                _idle.append(self)
            finally:
                done.set()
            del job  # and the images that it holds, until the next comes


_idle: list[_Thread] = []
"""Those of this process that have nothing to do: one, as a rule. One that a reward hangs in never comes back."""


@cache
def _side_stream(device: torch.device) -> Any:
    """One for the whole process: torch keeps the memory that was freed apart for every stream."""
    return torch.get_device_module(device).Stream()
