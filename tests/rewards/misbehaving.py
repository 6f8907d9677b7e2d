"""A reward that does, when told to, what goes wrong in users' rewards and with the machines that they run on."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Brightness:
    """A reward of every pixel and of the prompt: two runs that score the same have drawn the same.

    MISBEHAVE=CALL:HOW makes its call number CALL, counted from 1, go wrong, or those of a range FIRST-LAST. HOW: nan or
    inf (for the first image), short (a score too few), raise, the name of a signal to this process, or
    SIGKILL-in-fsync, which comes when it next makes sure that a file is on the disk. Of several ranks, MISBEHAVING
    names the one that does.
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
        if misbehaves and self.num_calls in self.wrong_calls:
            self._misbehave(scores)
        return scores

    def _misbehave(self, scores: dict[str, list[float]]) -> None:
        if self.how == "SIGKILL-in-fsync":
            os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
        elif self.how.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.how])
        elif self.how == "raise":
            raise RuntimeError("the reward's server is gone")
        else:
            for values in scores.values():
                values[:1] = [] if self.how == "short" else [float(self.how)]


class Broken:
    """A reward that cannot be made."""

    def __init__(self) -> None:
        raise FileNotFoundError("weights.bin")
