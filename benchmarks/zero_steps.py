"""Full fine-tuning of SD3.5 under every stage of ZeRO on this machine's GPUs: memory foreseen and measured, and time.

    python -m benchmarks.zero_steps --out DIR                          one GPU, SD3.5-Medium of random weights
    torchrun --nproc-per-node 8 -m benchmarks.zero_steps --out DIR     more of them

What does not fit by its plan with masters and averages on the card is run with them on the host. A stage is a process
of its own on one GPU, as memory that a stage leaves behind would be counted with the next.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.console import people
from dgpo_fast import launcher
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.environment import describe_environment
from dgpo_fast.memory import MARGIN
from dgpo_fast.planning import plan

COLUMNS = ("stage", "ranks", "offload", "foreseen_gb", "measured_gb", "first_s", "step_s", "images_per_s")


def config_of(options: argparse.Namespace, stage: int, offload: str) -> Config:
    """Groups of four, two per rank: the memory of weights does not ask how many there are."""
    ranks = launcher.world_size()
    return load_recipe(
        "sd35m-geneval-full",
        [
            f"model.name={options.model}", f"device={options.device}", f"parallel.zero_stage={stage}",
            f"parallel.offload_optimizer={offload}", "model.engine=eager", "groups.size=4",
           
            f"groups.per_iteration={2 * ranks}", "optimizer.images_per_micro_batch=4",
            f"rollout.steps={options.solver}",
            "rewards.terms=[{name: shapes}]", "prompts.train=shapes:train", "prompts.test=shapes:test",
            "evaluation.every=0", *options.overrides,
        ],
    )  # fmt: skip


def measure(options: argparse.Namespace, stage: int) -> None:
    """Appends a line about `stage` to the table."""
    from dgpo_fast import Trainer

    offload = "none"
    cost = plan(config_of(options, stage, offload)).cost
    assert cost is not None
    on_cuda = torch.cuda.is_available() and options.device != "cpu"
    if on_cuda and cost.memory.peak_bytes > (1 - MARGIN / 2) * torch.cuda.get_device_properties(0).total_memory:
        offload = "cpu" if stage else "does not fit"
    line: dict[str, object] = {"stage": stage, "ranks": launcher.world_size(), "offload": offload}
    if offload != "does not fit":
        config = config_of(options, stage, offload)
        cost = plan(config).cost
        assert cost is not None
        with tempfile.TemporaryDirectory() as out:
            trainer, seconds = Trainer(config, Path(out)), []
            for _ in range(options.steps):
                trainer.world.wait_for_device()
                start = time.perf_counter()
                *_, report = trainer.run_iteration()
                trainer.world.wait_for_device()
                seconds.append(time.perf_counter() - start)
            rest = sorted(seconds[1:])[len(seconds[1:]) // 2]
            line |= {
                "measured_gb": f"{report.peak_memory_gb:.2f}", "first_s": f"{seconds[0]:.2f}", "step_s": f"{rest:.2f}",
                "images_per_s": f"{config.images_per_iteration / rest:.2f}",
            }  # fmt: skip
    line["foreseen_gb"] = f"{cost.memory.peak_bytes / 1e9:.2f}"
    if launcher.is_first():
        path = options.out / "zero_steps.csv"
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            if is_new:
                file.write("".join(f"# {name}: {value}\n" for name, value in describe_environment().items()))
                csv.writer(file).writerow(COLUMNS)
            csv.DictWriter(file, COLUMNS, restval="").writerow(line)
        people().print(", ".join(f"{name} {line.get(name, '')}" for name in COLUMNS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="random:sd35-medium")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--solver", type=int, default=10, help="solver steps")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if len(options.stages) == 1 or "WORLD_SIZE" in os.environ:
        for stage in options.stages:
            measure(options, stage)
        return 0
    given = [f"--out={options.out}", f"--model={options.model}", f"--device={options.device}"]
    given += [
        f"--steps={options.steps}",
        f"--solver={options.solver}",
        *(f"--set={item}" for item in options.overrides),
    ]
    command = [sys.executable, "-m", "benchmarks.zero_steps", *given]
    return max(subprocess.run([*command, "--stages", str(stage)]).returncode for stage in options.stages)


if __name__ == "__main__":
    raise SystemExit(main())
