"""A rank that counts the collectives of several runs, one after the other.

    python ranks.py 2 count_ranks.py PLANS.json DIR

PLANS.json gives overrides by name; DIR/rank-N.json gets, by name, what rank N took part in during the last of a few
iterations, and how many values it trains. Then `dgpo-fast profile` measures the plan adapters-1 and writes DIR/profile.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.cli import main
from dgpo_fast.parallel.traffic import CollectiveCounter
from dgpo_fast.parallel.world import World
from dgpo_fast.profiling import stage

TOO_DEEP = 70
"""More backward passes inside backward passes than autograd makes in one thread: 60 (MAX_DEPTH in its engine.h)."""


def count(overrides: list[str], out: Path) -> tuple[dict[str, Any], World]:
    trainer = Trainer(load_recipe("tiny-dgpo", overrides), out)
    # In stage 3 DeepSpeed learns in two iterations in which order layers ask for their weights.
    for _ in range(2 if trainer.config.parallel.zero_stage == 3 else 0):
        trainer.run_iteration()
    with CollectiveCounter() as counter:
        trainer.run_iteration()
    trained = sum(shape.numel() for shape in trainer.learner.engine.shapes.values())
    return {"trained": trained, "traffic": listed(counter)}, trainer.world


def listed(counter: CollectiveCounter) -> list[Any]:
    return [("/".join(each.stage), each.kind, each.number, each.num_bytes) for each in counter.traffic()]


class Deep(torch.autograd.Function):
    """Its backward pass makes another, and the last one a sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, world: World, threads: list[int]) -> Tensor:
        ctx.rest = depth - 1, world, threads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        depth, world, threads = ctx.rest
        if depth == 0:
            threads.append(threading.get_ident())
            world.sum(torch.ones(3))
        else:
            with torch.enable_grad():
                Deep.apply(torch.ones((), requires_grad=True), *ctx.rest).backward()
        return gradient, None, None, None


def count_in_another_thread(world: World) -> dict[str, Any]:
    """Autograd goes on in a thread of its own where it is nested too deeply, as it does on a GPU in any case."""
    threads: list[int] = []
    with CollectiveCounter() as counter, stage("backward"):
        Deep.apply(torch.ones((), requires_grad=True), TOO_DEEP, world, threads).backward()
    return {"is_another": threads != [threading.get_ident()], "traffic": listed(counter)}


if __name__ == "__main__":
    plans, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = {}
    for name, overrides in plans.items():
        found[name], world = count(overrides, directory / name)
    found["another thread"] = count_in_another_thread(world)
    (directory / f"rank-{world.rank}.json").write_text(json.dumps(found))
    settings = [f"--set={item}" for item in plans["adapters-1"]]
    profile = ["profile", "tiny-dgpo", "--out", str(directory / "profile"), "--iterations", "1", "--no-trace"]
    main([*profile, *settings])
