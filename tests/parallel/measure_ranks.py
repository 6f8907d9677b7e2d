"""A rank that measures the memory of several runs, one after the other.

    python ranks.py 2 measure_ranks.py PLANS.json RESULTS.json

PLANS.json gives overrides by name; RESULTS.json gets, by name, the first rank's live bytes after an iteration, and the
most that lived during a later one.

The threads that exchange for the ranks let go of what they sent some time after, on a busy machine much later. So live
bytes are counted after a pause, and of several iterations the lowest peak is taken: what came late only adds to it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch

from dgpo_fast import Trainer, load_recipe

PAUSE_S = 0.5
ITERATIONS = 3
"""Of which one has the lowest peak."""


def live_storages() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process has, by its address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def most_added(trainer: Trainer) -> int:
    """The highest sum of what an iteration allocated and freed so far."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.run_iteration()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = highest = 0
    for _, num_bytes in changes:
        total += num_bytes
        highest = max(highest, total)
    return highest


def measure(overrides: list[str], out: Path) -> dict[str, int]:
    before = live_storages()
    trainer = Trainer(load_recipe("tiny-dgpo", overrides), out)
    trainer.run_iteration()
    time.sleep(PAUSE_S)
    now = live_storages()
    resident = sum(num_bytes for address, num_bytes in now.items() if address not in before)
    return {"resident": resident, "peak": resident + min(most_added(trainer) for _ in range(ITERATIONS))}


if __name__ == "__main__":
    plans, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    measure(next(iter(plans.values())), results.parent / "first")  # prompts are encoded: later runs have no encoders
    gc.collect()
    gc.freeze()  # a collection goes through millions of objects of imported modules, some forty times
    found = {name: measure(overrides, results.parent / name) for name, overrides in plans.items()}
    if torch.distributed.get_rank() == 0:
        results.write_text(json.dumps(found))
