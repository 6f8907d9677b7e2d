"""Training time to a target score, of DGPO and of the methods it is compared with, on the embedded pipeline.

    python -m benchmarks.speedup calibrate            what an iteration of each costs; on a quiet machine, 10 minutes,
                                                      or less where costs.csv has some of them
    python -m benchmarks.speedup run [--most N]       the next runs of the queue that have no result
    python -m benchmarks.speedup status               what is done, and how far each run came
    python -m benchmarks.speedup engines              what an iteration of each would cost on diffusers' code

A run trains on one core. Its clock are its iterations, each of which lasts what `calibrate` measured while nothing else
ran: what else runs on the machine during hours of training does not count. Evaluations do not count either. Each result
is a file of its own under benchmarks/results/speedup-cpu; several processes may work on the queue.

On a machine with a CUDA GPU runs train there, an iteration lasts what the clock on the wall says, and results go to a
directory of that kind of GPU.
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
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speedup_costs import (
    add_costs,
    against_known,
    calibrate,
    flops_of,
    kind_of,
    read_costs,
    time_engines,
    write_engines,
)
from benchmarks.speedup_results import Point, Result, queue, read, results_here, write
from benchmarks.speedup_runs import HORIZON_S, METHODS, SWEEP_S, Run, every_kind
from benchmarks.tables import stamp

if TYPE_CHECKING:
    from dgpo_fast.config import Config

EVALUATIONS = ((180.0, 30.0), (SWEEP_S, 60.0))
FINAL_EVALUATIONS = ((120.0, 15.0), (300.0, 30.0), (HORIZON_S, 60.0), (float("inf"), 120.0))
"""(until, every) so many seconds of training: evaluations are dense where methods are fast."""
JUDGE = ("rollout.solver=euler", "rollout.schedule=flow_match", "evaluation.steps=28")
"""What images of every method are drawn with to be judged: as diffusers' pipeline does unless it is told otherwise, but
unguided, as all are trained."""
NUM_PROMPTS = 64


def train(run: Run, cost_s: float) -> Iterator[Point]:
    """The points of a run, the base's first; no more than it had if its gradients are no numbers any longer.

    Args:
        cost_s: seconds of an iteration.
    """
    import torch

    from benchmarks.ablated_samplers import ablate
    from benchmarks.held_out import held_out
    from dgpo_fast import Trainer, load_recipe
    from dgpo_fast.errors import UserError
    from dgpo_fast.evaluate import draw_images
    from dgpo_fast.models.engines import View

    torch.set_num_threads(1)
    config = load_recipe(METHODS[run.method].recipe, run.overrides)
    # Final runs are judged from another noise than settings were chosen by.
    judge, prompts = judge_of(int(run.is_final))
    per_prompt, flops = judge.evaluation.images_per_prompt, flops_of(config)
    core_s = wall_s = 0.0
    rewards: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(config, Path(out))
        ablate(trainer, run)

        def point() -> Point:
            view: View = "ema" if trainer.step else "ref"
            with torch.no_grad():
                images = draw_images(trainer.policy, view, prompts, judge, images_per_prompt=per_prompt)
            return Point(
                seconds=trainer.iteration * cost_s, core_s=core_s, wall_s=wall_s,
                step=trainer.step, iteration=trainer.iteration,
                images=trainer.iteration * config.images_per_iteration, flops=trainer.iteration * flops,
                reward=sum(rewards) / len(rewards) if rewards else float("nan"),
                **asdict(held_out(images, prompts, per_prompt=per_prompt)),
            )  # fmt: skip

        yield point()
        for due_s in evaluation_times(run):
            rewards.clear()
            try:
                while trainer.iteration * cost_s < due_s:
                    worked, passed = time.process_time(), time.perf_counter()
                    reports = trainer.run_iteration()
                    core_s += time.process_time() - worked
                    wall_s += time.perf_counter() - passed
                    rewards.append(reports[-1].reward_mean)
            except UserError as error:
                if trainer.learner.skipped_in_a_row <= config.optimizer.max_skipped:
                    raise
                print(f"{run.name} ends after {trainer.iteration} iterations: {error}", flush=True)
                return
            yield point()


def judge_of(noise: int) -> tuple[Config, list[str]]:
    """What images are drawn by to be judged, from that noise, and the prompts."""
    from dgpo_fast import load_recipe
    from dgpo_fast.prompts import load_prompts

    judge = load_recipe("tiny-dgpo", [*JUDGE, f"seed={noise}"])
    return judge, load_prompts(judge.prompts.test, key="prompts.test")[:NUM_PROMPTS]


def evaluation_times(run: Run) -> Iterator[float]:
    """Seconds of training at which a run is evaluated, the last of which is its budget."""
    now, grid = 0.0, FINAL_EVALUATIONS if run.is_final else EVALUATIONS
    while now < run.budget_s:
        every = next(every for until, every in grid if now < until)
        now = min(now + every, run.budget_s)
        yield now


def origin() -> dict[str, str]:
    """Where what is measured comes from."""
    import torch

    from dgpo_fast.environment import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"processor": device_name(device), "torch": torch.__version__, **stamp()}


def measure(run: Run, results: Path) -> None:
    """Trains, and writes each point as it comes; the file has the run's name once the run is over.

    Raises:
        KeyError: it is not known what its iterations cost.
    """
    cost_s = read_costs(results)[kind_of(run)].seconds
    about = {**origin(), "cost_s": f"{cost_s:.4g}", "overrides": " ".join(run.overrides)}
    points: list[Point] = []
    partial = results / f".{run.name}.partial"
    for point in train(run, cost_s):
        points.append(point)
        write(partial, points, about)
        print(f"{run.name}: {point.seconds:.0f} s, step {point.step}, strict {point.strict:.3f}", flush=True)
        if not run.takes_its_budget and Result(run=run, points=points).is_enough:
            break
    partial.rename(results / f"{run.name}.csv")


def measure_costs(results: Path) -> None:
    """Adds what an iteration of every kind of run costs that is not known yet."""
    results.mkdir(parents=True, exist_ok=True)
    known = read_costs(results)
    costs = against_known(known, every_kind()) if known else list(calibrate(every_kind()))
    add_costs(results, costs, origin())
    for cost in costs:
        print(f"{cost.kind}: {cost.seconds:.3f} s (median {cost.median:.3f})")


@contextmanager
def claimed(run: Run, results: Path) -> Iterator[bool]:
    """Whether this process may measure the run: nobody has, and nobody alive is at it."""
    lock = results / f".{run.name}.lock"
    if (results / f"{run.name}.csv").exists() or not _taken(lock):
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink()


def _taken(lock: Path) -> bool:
    """Whether this process has the lock now: nobody alive had it."""
    if lock.exists() and not _is_alive(int(lock.read_text() or os.getpid())):
        lock.unlink()
    try:
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def work(results: Path, *, most: int) -> None:
    """Measures runs of the queue that have no result, at most so many, each in a process of its own.

    Raises:
        CalledProcessError: some of these failed.
    """
    failed: dict[str, subprocess.CalledProcessError] = {}
    while most != 0 and _work_on_one(results, failed):
        most -= 1
    for error in failed.values():
        raise error


def _work_on_one(results: Path, failed: dict[str, subprocess.CalledProcessError]) -> bool:
    """Measures the first run that nobody has measured or is at; whether there was one. One that fails is left."""
    for run in queue(results).runs:
        if run.name in failed:
            continue
        with claimed(run, results) as is_mine:
            if is_mine:
                command = [sys.executable, "-m", "benchmarks.speedup", "one", run.name, "--out", str(results)]
                try:
                    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
                except subprocess.CalledProcessError as error:
                    failed[run.name] = error
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
            yield f"{run.name}: {went}, best {best.strict:.3f} at {best.seconds:.0f} s"
        else:
            yield f"{run.name}: to come"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("calibrate", "run", "status", "engines", "one"))
    parser.add_argument("name", nargs="?", help="of the run, for `one`")
    parser.add_argument("--most", type=int, default=-1, help="runs to measure before this process ends")
    parser.add_argument("--out", type=Path, help="where results lie (benchmarks/results/speedup-cpu; of a GPU apart)")
    options = parser.parse_args()
    options.out = options.out or results_here()  # which asks torch for a GPU
    if options.command == "one":
        measure(next(run for run in queue(options.out).runs if run.name == options.name), options.out)
    elif options.command == "calibrate":
        measure_costs(options.out)
    elif options.command == "engines":
        chosen = {run.method: run for run in queue(options.out).finals}
        write_engines(options.out, time_engines([*chosen.values()]), origin())
    elif options.command == "run":
        work(options.out, most=options.most)
    else:
        print("\n".join(status(options.out)))


if __name__ == "__main__":
    main()
