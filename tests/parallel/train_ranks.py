"""A rank that trains several runs, one after the other: starting processes takes longer than training the small model.

    torchrun --nproc-per-node 2 train_ranks.py RUNS.json

RUNS.json is a list of {"out", "overrides", "resume", "nan_in_step"}; the last is the step, counted from 0, in which the
gradient of the last rank is not finite, or null.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo_fast import Trainer, load_recipe


def train(run: dict[str, Any]) -> None:
    trainer = Trainer(load_recipe("tiny-dgpo", run["overrides"]), Path(run["out"]), resume=run["resume"])
    backward, is_last = trainer.learner.backward, trainer.world.rank == trainer.world.size - 1

    def spoilt(loss: Tensor) -> None:
        backward(loss * math.nan if is_last and trainer.step == run["nan_in_step"] else loss)

    trainer.learner.backward = spoilt  # type: ignore[method-assign]
    trainer.train()


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text()):
        train(run)
