"""Training time to a target score, of DGPO and of the methods it is compared with, on the embedded pipeline.

    python -m benchmarks.speedup run [--most N]       the next runs of the queue that have no result
    python -m benchmarks.speedup status               what is done, and how far each run came

A run trains on one core and is measured in the seconds that this core worked for it: what else runs on the machine does
not count, but for the caches that it shares, and neither do evaluations. Each result is a file of its own under
benchmarks/results/speedup-cpu, written when the run is over; several processes may work on the queue.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.speedup_results import RESULTS, Point, queue, read, write
from benchmarks.speedup_runs import METHODS, SWEEP_S, Run

EVALUATE_EVERY_S, LATER_EVERY_S = 60.0, 120.0
"""Seconds of training between evaluations: within the budget of a sweep's run, and after."""
JUDGE = ("rollout.solver=euler", "rollout.schedule=flow_match", "evaluation.steps=28")
"""What every method's images are drawn with to be judged: what diffusers' pipeline does unless it is told otherwise."""
NUM_PROMPTS = 64


def train(run: Run) -> Iterator[Point]:
    """The points of a run, the base's first."""
    import torch

    from benchmarks.ablated_samplers import ablate
    from benchmarks.held_out import held_out
    from dgpo_fast import Trainer, load_recipe
    from dgpo_fast.evaluate import draw_images
    from dgpo_fast.planning import plan
    from dgpo_fast.prompts import load_prompts

    torch.set_num_threads(1)
    config = load_recipe(METHODS[run.method].recipe, run.overrides)
    # Final runs are judged by other prompts, from other noise, than settings were chosen by.
    part = int(run.is_final)
    judge = load_recipe("tiny-dgpo", [*JUDGE, f"seed={part}"])
    prompts = load_prompts(judge.prompts.test, key="prompts.test")[part * NUM_PROMPTS : (part + 1) * NUM_PROMPTS]
    per_prompt, cost = judge.evaluation.images_per_prompt, plan(config, num_ranks=1).cost
    assert cost is not None
    core_s = wall_s = 0.0
    rewards: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(config, Path(out))
        ablate(trainer, run.draws)

        def point() -> Point:
            view = "ema" if trainer.step else "ref"
            with torch.no_grad():
                images = draw_images(trainer.policy, view, prompts, judge, images_per_prompt=per_prompt)
            return Point(
                core_s=core_s, wall_s=wall_s, step=trainer.step, iteration=trainer.iteration,
                images=trainer.iteration * config.images_per_iteration, flops=trainer.iteration * cost.flops,
                reward=sum(rewards) / len(rewards) if rewards else float("nan"),
                **asdict(held_out(images, prompts, per_prompt=per_prompt)),
            )  # fmt: skip

        yield point()
        due_s = EVALUATE_EVERY_S
        while core_s < run.budget_s:
            worked, passed = time.process_time(), time.perf_counter()
            reports = trainer.run_iteration()
            core_s += time.process_time() - worked
            wall_s += time.perf_counter() - passed
            rewards.append(reports[-1].reward_mean)
            if core_s >= min(due_s, run.budget_s):
                yield point()
                rewards.clear()
                due_s = core_s + (EVALUATE_EVERY_S if core_s < SWEEP_S else LATER_EVERY_S)


def measure(run: Run, results: Path) -> None:
    """Trains, and writes the result once the run is over."""
    from benchmarks.operator_table import commit
    from dgpo_fast.environment import package_versions, processor_name

    origin = {
        "processor": processor_name(), "torch": package_versions()["torch"], "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    points = []
    for point in train(run):
        points.append(point)
        print(f"{run.name}: {point.core_s:.0f} s, step {point.step}, strict {point.strict:.3f}", flush=True)
    partial = results / f".{run.name}.partial"
    write(partial, points, origin)
    partial.rename(results / f"{run.name}.csv")


@contextmanager
def claimed(run: Run, results: Path) -> Iterator[bool]:
    """Whether this process may measure the run: nobody has, and nobody alive is at it."""
    lock = results / f".{run.name}.lock"
    if (results / f"{run.name}.csv").exists() or (lock.exists() and _is_alive(int(lock.read_text()))):
        yield False
        return
    lock.write_text(str(os.getpid()))
    try:
        yield True
    finally:
        lock.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def work(results: Path, *, most: int) -> None:
    """Measures runs of the queue that have no result, at most so many, each in a process of its own."""
    results.mkdir(parents=True, exist_ok=True)
    while most != 0 and _work_on_one(results):
        most -= 1


def _work_on_one(results: Path) -> bool:
    """Measures the first run that nobody has measured or is at; whether there was one."""
    for run in queue(results).runs:
        with claimed(run, results) as is_mine:
            if is_mine:
                command = [sys.executable, "-m", "benchmarks.speedup", "one", run.name, "--out", str(results)]
                subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
                return True
    return False


def status(results: Path) -> Iterator[str]:
    """A line for each run of the queue."""
    for run in queue(results).runs:
        path = results / f"{run.name}.csv"
        if path.exists():
            points = read(path)
            best = max(points, key=lambda point: point.strict)
            went = f"{points[0].strict:.3f} -> {points[-1].strict:.3f}"
            yield f"{run.name}: {went}, best {best.strict:.3f} at {best.core_s:.0f} s"
        else:
            yield f"{run.name}: to come"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "status", "one"))
    parser.add_argument("name", nargs="?", help="of the run, for `one`")
    parser.add_argument("--most", type=int, default=-1, help="runs to measure before this process ends")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "one":
        measure(next(run for run in queue(options.out).runs if run.name == options.name), options.out)
    elif options.command == "run":
        work(options.out, most=options.most)
    else:
        print("\n".join(status(options.out)))


if __name__ == "__main__":
    main()
