"""A reward in processes of its own on this machine, which share a batch out and are started anew when they die or hang.

    Workers.ask ──pieces──▶ a thread for each process ──prompts, images──▶ process: the reward, made once
                                                      ◀─────Answer───────

Processes are spawned, not forked, which CUDA would not survive. They begin with what the main module imports, so a
script of one's own that trains does so under `if __name__ == "__main__":`.

A process ends with the one that started it, however that ended: a pipe between them closes, which a thread of the
process waits for. It leads a group of its own, so that what a reward has started ends with it, too. It does not answer
to SIGINT and SIGTERM, which a scheduler sends to all processes of a run: that run still wants the scores of its last
step.
"""

from __future__ import annotations

import atexit
import faulthandler
import math
import multiprocessing.util  # first: what it does at exit, wait for processes, must come after `_end_all`
import os
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from threading import Event, Thread
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgpo_fast.environment import WORKERS_VARIABLE, share_of_cores
from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import RewardsConfig
from dgpo_fast.rewards.base import Reward, load_reward, register_reward, registered
from dgpo_fast.rewards.calling import START_S, Answer, Failure, Patience, attempt, call

OWN_END_S = 30.0
"""Beyond its time, after which a process that hangs ends by itself, were the one that started it hanging too."""
BURIAL_S = 5.0
"""For the system to end a process that was killed."""

_SPAWN = multiprocessing.get_context("spawn")


class Workers:
    """A reward in worker processes, which have made it when this is made.

    Args:
        settings: whose `running` says how many processes the reward has.
        device: of the reward in each of them.
        stop: set where nobody waits any more.

    Raises:
        UserError: the reward cannot be made in a process of its own.
    """

    is_elsewhere = True

    def __init__(self, name: str, settings: RewardsConfig, *, device: torch.device, stop: Event) -> None:
        running = settings.running[name]
        assert running.processes is not None
        self._images_per_call = running.images_per_call
        order = _Order(
            name=name,
            factory=_for_others(name),
            settings=settings,
            device=str(device),
            num_processes=running.processes,
            limit_s=settings.timeout_s + OWN_END_S,
        )
        self._workers = [_Worker(order) for _ in range(running.processes)]
        weakref.finalize(self, _kill, self._workers).atexit = False
        missing = self._start(Patience(START_S, stop))
        if missing is not None:
            self.close()
            raise UserError(f"rewards.running.{name}.processes: {missing}")

    def ask(self, images_BCHW: Tensor, prompts: Sequence[str], patience: Patience) -> list[Answer]:
        with patience.starting():
            missing = self._start(patience.all_left_to_start)
        patience.check()
        errand = _Errand(images_BCHW, prompts, self._pieces(len(prompts)))
        ready = {worker: Thread(target=errand.serve, args=(worker,), daemon=True) for worker in self._workers}
        for thread in ready.values():
            thread.start()
        if not patience.await_all(ready.values()):
            errand.todo.clear()
            for worker, thread in ready.items():
                if thread.is_alive():
                    worker.kill(f"no answer within {patience.seconds:g} s, so its process was ended")
            for thread in ready.values():
                thread.join()
        patience.check()
        return errand.collect(missing or "its processes died")

    def close(self) -> None:
        _kill(self._workers)

    def _start(self, patience: Patience) -> str | None:
        """Starts what does not run, all at once; why one of them could not be."""
        starting = [worker for worker in self._workers if not worker.is_ready]
        for worker in starting:
            worker.start()
        found = [worker.await_reward(patience) for worker in starting]
        return next((reason for reason in found if reason is not None), None)

    def _pieces(self, count: int) -> list[slice]:
        size = min(math.ceil(count / len(self._workers)), self._images_per_call or count)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Errand:
    """A batch in pieces, which whoever is free takes."""

    def __init__(self, images_BCHW: Tensor, prompts: Sequence[str], pieces: Sequence[slice]) -> None:
        self._images, self._prompts, self._pieces = images_BCHW.float().contiguous().numpy(), prompts, pieces
        self.todo = deque(enumerate(pieces))
        self._answers: dict[int, Answer | UserError] = {}

    def serve(self, worker: _Worker) -> None:
        """Has `worker` answer for pieces until none is left, or it is gone."""
        while worker.is_ready:
            try:
                number, piece = self.todo.popleft()
            except IndexError:
                return
            try:
                self._answers[number] = worker.ask(self._images[piece], self._prompts[piece])
            except UserError as error:
                self._answers[number] = error

    def collect(self, otherwise: str) -> list[Answer]:
        """The answers in order; of pieces that nobody was left for, this reason."""
        answers = []
        for number, piece in enumerate(self._pieces):
            answer = self._answers.get(number) or Answer(piece.stop - piece.start, None, Failure(otherwise))
            if isinstance(answer, UserError):
                raise answer
            answers.append(answer)
        return answers


class _Order(NamedTuple):
    """What a process is to do."""

    name: str
    factory: Any  # what recipes name so where this process has registered it, else None
    settings: RewardsConfig
    device: str
    num_processes: int  # that do it
    limit_s: float


class _Worker:
    """A process that may be started again and again. One thread asks at a time."""

    def __init__(self, order: _Order) -> None:
        self._order = order
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._made = self._is_group_ended = False
        self._killed_for: Failure | None = None
        _all.add(self)

    @property
    def is_ready(self) -> bool:
        return self._made and self._process is not None and self._process.is_alive()

    def start(self) -> None:
        self.kill()
        self._killed_for, self._is_group_ended = None, False
        self._pipe, theirs = _SPAWN.Pipe()
        # A daemon might start no processes of its own, as a reward with a pool does.
        self._process = _SPAWN.Process(target=_work, args=(theirs, self._order), name="reward", daemon=False)
        self._process.start()
        theirs.close()  # or the pipe would not end with the process

    def await_reward(self, patience: Patience) -> str | None:
        """Waits until the reward is made; why it is not."""
        assert self._pipe is not None
        try:
            while not self._pipe.poll(min(0.1, patience.left)):
                if patience.is_over:
                    self.kill()
                    return f"not ready within {patience.seconds:g} s"
            reason: str | None = self._pipe.recv()
        except (EOFError, OSError):
            return f"{self._end().reason} before it had made the reward"
        self._made = reason is None
        return reason

    def ask(self, images: NDArray[np.float32], prompts: Sequence[str]) -> Answer:
        """The answer of the process, or that it is gone.

        Raises:
            UserError: as the reward.
        """
        assert self._pipe is not None
        try:
            self._pipe.send((images.shape, prompts))
            self._pipe.send_bytes(images.data.cast("B"))
            answer: Answer | UserError = self._pipe.recv()
        except (EOFError, OSError):
            return Answer(len(prompts), None, self._end())
        if isinstance(answer, UserError):
            raise answer
        return answer

    def kill(self, reason: str | None = None) -> None:
        """Ends the process; where somebody waits for its answer, for this reason."""
        self._made, self._killed_for = False, Failure(reason, is_hang=True) if reason else self._killed_for
        if self._process is not None:
            self._process.kill()
            self._end_group()
            self._process.join(BURIAL_S)

    def _end_group(self) -> None:
        """Ends what the reward has started, once: its number may be another's one day."""
        assert self._process is not None and self._process.pid is not None
        if not self._is_group_ended:
            with suppress(ProcessLookupError):  # it has not come to lead one, or nothing of it is left
                os.killpg(self._process.pid, signal.SIGKILL)
        self._is_group_ended = True

    def _end(self) -> Failure:
        """Why the process is gone."""
        assert self._process is not None
        self._end_group()
        self._process.join(BURIAL_S)
        self._made = False
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
        return self._killed_for or Failure(f"its process {how}")


_all: weakref.WeakSet[_Worker] = weakref.WeakSet()


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()


@atexit.register
def _end_all() -> None:
    _kill(list(_all))


def _for_others(name: str) -> Any:
    """What is registered under this name, if another process can have it."""
    factory = registered(name)
    try:
        pickle.dumps(factory)
    except Exception as error:  # pickle raises whatever it meets
        raise UserError(
            f"rewards.running.{name}.processes: what is registered under this name must be defined at the top of a "
            f"module, for other processes to import: {error}"
        ) from None
    return factory


# In the process


def _work(pipe: Connection[Any, Any], order: _Order) -> None:
    os.setpgid(0, 0)
    before = {number: signal.signal(number, _not_heard) for number in (signal.SIGINT, signal.SIGTERM)}
    # A pool ends its processes by SIGTERM: those that it forks hear it. Those that it spawns would inherit SIG_IGN.
    os.register_at_fork(after_in_child=lambda: [signal.signal(number, how) for number, how in before.items()])
    Thread(target=_end_with_parent, daemon=True).start()
    _take_share_of_cores(order.num_processes)
    device = torch.device(order.device)
    try:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # a reward of the user's own may say "cuda" and mean its rank's
        if order.factory is not None:
            register_reward(order.name)(order.factory)
        reward = load_reward(order.name, order.settings, device=device)
    except UserError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            shape, prompts = pipe.recv()
            images = np.empty(shape, np.float32)
            pipe.recv_bytes_into(images.reshape(-1))
        except EOFError:
            return
        # A thread of its own in C: it ends also a process that keeps Python's lock while it hangs.
        faulthandler.dump_traceback_later(order.limit_s, exit=True)
        answer = _answer(order.name, reward, torch.from_numpy(images).to(device), prompts)
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)


def _not_heard(number: int, frame: FrameType | None) -> None:
    """Nothing."""


def _take_share_of_cores(num_processes: int) -> None:
    os.environ[WORKERS_VARIABLE] = str(num_processes)
    torch.set_num_threads(share_of_cores())


def _answer(name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> Answer | UserError:
    try:
        return attempt(len(prompts), partial(call, name, reward, images_BCHW, prompts))
    except UserError as error:
        return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
