"""A rank that trains several runs, one after the other.

    python ranks.py 2 train_ranks.py PLANS.json

PLANS.json is a list of
    {"out": directory, "overrides": [...],
     "resume": false,           go on from the last checkpoint
     "nan_in_step": null,       the step, counted from 0, in which the gradient of the last rank is not finite
     "failed": null,            a list: rewards are made of the samples' numbers, and these samples have none
     "perturbed": false,        begin with adapters that are not zero, the same on every rank
     "unsummed": false}         the algorithm hears of no other rank
Each rank writes how many forwards it has run to out/forwards-RANK.txt.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.parallel.world import ALONE
from dgpo_fast.records import Rollout
from dgpo_fast.rewards import Scores


def train(plan: dict[str, Any]) -> None:
    trainer = Trainer(load_recipe("tiny-dgpo", plan["overrides"]), Path(plan["out"]), resume=plan.get("resume", False))
    rank, backward, score = trainer.world.rank, trainer.learner.backward, trainer._score
    velocity, forwards = trainer.policy.engine.velocity, []

    def spoilt_backward(loss: Tensor) -> None:
        is_spoilt = rank == trainer.world.size - 1 and trainer.step == plan.get("nan_in_step")
        backward(loss * math.nan if is_spoilt else loss)

    def spoilt_score(rollout: Rollout, scores: Scores) -> Any:
        for place, sample in enumerate(rollout.prompts.samples if plan.get("failed") else ()):
            scores.reward_B[place] = math.nan if sample in plan["failed"] else sample * 7 % 5
        return score(rollout, scores)

    def counted_velocity(*arguments: Any) -> Tensor:
        forwards.append(arguments[0])
        return velocity(*arguments)

    if plan.get("perturbed"):
        perturb(trainer)
    if plan.get("unsummed"):
        trainer.algorithm.world = ALONE  # type: ignore[attr-defined]
    trainer.learner.backward = spoilt_backward  # type: ignore[method-assign]
    trainer._score = spoilt_score  # type: ignore[method-assign]
    trainer.policy.engine.velocity = counted_velocity  # type: ignore[method-assign]
    trainer.train()
    if trainer.config.parallel.zero_stage > 0:
        (Path(plan["out"]) / f"patience-{rank}.txt").write_text(str(patience_s()))
    (Path(plan["out"]) / f"forwards-{rank}.txt").write_text(" ".join(forwards))


def perturb(trainer: Trainer) -> None:
    """Far from the base, so that group scores are no sums of mere rounding."""
    trainable = trainer.policy.trainable.data  # type: ignore[attr-defined]
    trainable.add_(torch.randn(len(trainable), generator=torch.Generator().manual_seed(0)), alpha=0.05)
    trainer.policy.refresh("policy")


def patience_s() -> float:
    """For which the group that DeepSpeed made waits for a rank."""
    from deepspeed.utils import groups

    backend = groups._clone_world_group()._get_backend(torch.device("cpu"))
    return float(backend.options._timeout.total_seconds())


if __name__ == "__main__":
    for plan in json.loads(Path(sys.argv[1]).read_text()):
        train(plan)
