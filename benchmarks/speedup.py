"""Training time to a target score, of DGPO and of the methods it is compared with, on the embedded pipeline.

    python -m benchmarks.speedup run [--sweep-s 600] [--most N]       the next runs of the queue that have no result
    python -m benchmarks.speedup status                               what is done, and how far each run came

A run trains on one core and is measured in the seconds that this core worked for it: what else runs on the machine does
not count, and neither do evaluations. Each result is a file of its own under benchmarks/results/speedup-cpu, written
when the run is over; several processes may work on the queue.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.speedup_runs import METHODS, Run, sweep

RESULTS = Path(__file__).parent / "results" / "speedup-cpu"
EVALUATE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A moment of a run."""

    core_s: float
    """Seconds of training on one core."""
    wall_s: float
    """That they took on this machine, whatever else it did."""
    step: int
    iteration: int
    images: int
    flops: float
    reward: float
    """Mean training reward since the point before; NaN at the first."""
    strict: float
    soft: float
    distance: float
    diversity: float


KINDS: dict[str, Any] = {field.name: {"int": int, "float": float}[str(field.type)] for field in fields(Point)}


def train(run: Run) -> Iterator[Point]:
    """The points of a run, one about every `EVALUATE_EVERY_S`, the base's first."""
    import torch

    from benchmarks.held_out import held_out
    from dgpo_fast import Trainer, load_recipe
    from dgpo_fast.evaluate import draw_images
    from dgpo_fast.planning import plan

    torch.set_num_threads(1)
    config, judged = load_recipe(METHODS[run.method].recipe, run.overrides), load_recipe("tiny-dgpo")
    cost = plan(config, num_ranks=1).cost
    assert cost is not None
    core_s = wall_s = 0.0
    rewards: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(config, Path(out))

        def point() -> Point:
            per_prompt, prompts = judged.evaluation.images_per_prompt, trainer.test_prompts
            with torch.no_grad():  # all methods alike, by the solver of one and from the same noise
                images = draw_images(
                    trainer.policy, "ema" if trainer.step else "ref", prompts, judged, images_per_prompt=per_prompt
                )
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
                due_s = core_s + EVALUATE_EVERY_S


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
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*KINDS, *origin])
        writer.writeheader()
        for point in points:
            writer.writerow({name: f"{value:.6g}" for name, value in asdict(point).items()} | origin)
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


def work(runs: list[Run], results: Path, *, most: int) -> None:
    """Measures runs of the queue that have no result, at most so many, each in a process of its own."""
    results.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if most == 0:
            return
        with claimed(run, results) as is_mine:
            if is_mine:
                command = [sys.executable, "-m", "benchmarks.speedup", "one", run.name, "--out", str(results)]
                command += [f"--sweep-s={run.budget_s:g}"]
                subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
                most -= 1


def read(path: Path) -> list[Point]:
    """The points of a result."""
    with path.open(encoding="utf-8") as file:
        return [Point(**{name: kind(row[name]) for name, kind in KINDS.items()}) for row in csv.DictReader(file)]


def status(runs: list[Run], results: Path) -> Iterator[str]:
    """A line for each run of the queue."""
    for run in runs:
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
    parser.add_argument("--sweep-s", type=float, default=600.0, help="seconds of training of each setting")
    parser.add_argument("--most", type=int, default=-1, help="runs to measure before this process ends")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = sweep(arguments.sweep_s)
    if arguments.command == "one":
        measure(next(run for run in runs if run.name == arguments.name), arguments.out)
    elif arguments.command == "run":
        work(runs, arguments.out, most=arguments.most)
    else:
        print("\n".join(status(runs, arguments.out)))


if __name__ == "__main__":
    main()
