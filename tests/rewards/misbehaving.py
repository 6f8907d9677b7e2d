"""A reward that does, when told to, what goes wrong in users' rewards and with the machines that they run on."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOURS_S = 10_000.0
SLOWLY_S = 1.0
"""Longer than who waits for scores goes without a look at whether somebody still wants them."""
FORK = multiprocessing.get_context("fork")


class Brightness:
    """A reward of every pixel and of the prompt: two runs that score the same have drawn the same.

    MISBEHAVE=CALL:HOW makes its call number CALL, counted from 1, go wrong, or those of a range FIRST-LAST. HOW: nan or
    inf (for the first image), short (a score too few), raise, hang, the name of a signal to this process,
    SIGTERM-slowly, after which it takes a second, or SIGKILL-in-checkpoint, when it next makes sure that a file of one
    is on the disk. Of several ranks, MISBEHAVING names the one that does. Of several processes, or of one that is
    started again, only one does, once, where MISBEHAVED names a file, which is there from then on.
    """

    def __init__(self) -> None:
        calls, _, self.how = os.environ.get("MISBEHAVE", "0:").partition(":")
        first, _, last = calls.partition("-")
        self.wrong_calls = range(int(first), int(last or first) + 1)
        self.num_calls = 0

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        self.num_calls += 1
        factor_B = torch.tensor([1 + len(prompt) / 100 for prompt in prompts])
        std_B, mean_B = torch.std_mean(images_BCHW, (1, 2, 3))
        scores = {"brightness": (mean_B * factor_B).tolist(), "contrast": (std_B * factor_B).tolist()}
        misbehaves = os.environ.get("RANK", "0") == os.environ.get("MISBEHAVING", "0")
        if misbehaves and self.num_calls in self.wrong_calls and self._is_first():
            self._misbehave(scores)
        return scores

    def _is_first(self) -> bool:
        return "MISBEHAVED" not in os.environ or is_made_now(os.environ["MISBEHAVED"])

    def _misbehave(self, scores: dict[str, list[float]]) -> None:
        if self.how == "SIGKILL-in-checkpoint":
            os.fsync = _killed_in_checkpoint
        elif self.how.startswith("SIG"):
            name, _, slowly = self.how.partition("-")
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(SLOWLY_S if slowly else 0)
        elif self.how == "hang":
            time.sleep(HOURS_S)
        elif self.how == "raise":
            raise RuntimeError("the reward's server is gone")
        else:
            for values in scores.values():
                values[:1] = [] if self.how == "short" else [float(self.how)]


def _killed_in_checkpoint(descriptor: int) -> None:
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.kill(os.getpid(), signal.SIGKILL)


class Obedient:
    """A reward that says of what it was given, and by whom, unless a prompt's metadata tell it to do something else.

    {"do": HOW}, as above, or "start": a process that does not end, and its number is the score; or "pool": it squares
    the score in another process. With {"once": FILE} only where FILE is not there yet, and makes it.
    """

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        scores = {
            "mean": images_BCHW.mean((1, 2, 3)).tolist(),
            "told": [float(told(prompt).get("told", 0)) for prompt in prompts],
            "process": [float(os.getpid())] * len(prompts),
            "images": [float(len(images_BCHW))] * len(prompts),
            "processes": [float(os.environ.get("DGPO_FAST_REWARD_PROCESSES", 0))] * len(prompts),
        }
        for place, prompt in enumerate(prompts):
            how, once = told(prompt).get("do"), told(prompt).get("once")
            if how is not None and (once is None or is_made_now(once)):
                obey(how, scores, place)
        return scores


def told(prompt: str) -> Mapping[str, Any]:
    return getattr(prompt, "metadata", {})


def obey(how: str, scores: dict[str, list[float]], place: int) -> None:
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "hang":
        time.sleep(HOURS_S)
    elif how == "raise":
        raise RuntimeError("told to")
    elif how == "short":
        scores["mean"].pop()
    elif how == "start":
        child = FORK.Process(target=time.sleep, args=(HOURS_S,))
        child.start()
        scores["mean"][place] = float(child.pid or 0)
    elif how == "pool":
        with FORK.Pool(2) as pool:
            scores["mean"][place] = pool.map(math.sqrt, [scores["mean"][place]])[0]
    else:
        scores["mean"][place] = float(how)


def is_made_now(path: str) -> bool:
    try:
        Path(path).open("x").close()
        return True
    except FileExistsError:
        return False


class Broken:
    """A reward that cannot be made."""

    def __init__(self) -> None:
        raise FileNotFoundError("weights.bin")
