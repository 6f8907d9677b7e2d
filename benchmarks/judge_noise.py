"""How far an evaluation of the speedup benchmark scatters: one policy, drawn from several noises.

    python -m benchmarks.judge_noise        results/speedup-cpu/judge-noise.csv; some 5 minutes of one core

The policy is DGPO at its chosen setting, about where it comes to the target. Final runs are all judged by the same
prompts and noise: what scatters here is in none of their differences, but in all of their times.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.speedup import judge_of, origin
from benchmarks.speedup_results import RESULTS, queue
from benchmarks.speedup_runs import METHODS, OURS, Run
from benchmarks.tables import read_rows, write_rows

FILE = "judge-noise.csv"
ITERATIONS, NOISES = 30, 8


class Judged(NamedTuple):
    """An evaluation from one noise."""

    noise: int
    strict: float
    error: float
    """Standard error of it, were prompts drawn anew: of the means of prompts."""


def policy_run() -> Run:
    """DGPO at the setting that is chosen for it."""
    return next(run for run in queue(RESULTS).finals if run.method == OURS)


def judge(noises: int = NOISES) -> list[Judged]:
    """The policy, trained from the beginning, from so many noises, that of final runs first."""
    import torch

    from benchmarks.held_out import captions_of, verdicts
    from dgpo_fast import Trainer, load_recipe
    from dgpo_fast.evaluate import draw_images

    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(load_recipe(METHODS[OURS].recipe, policy_run().overrides), Path(out))
        for _ in range(ITERATIONS):
            trainer.run_iteration()
        for noise in range(1, 1 + noises):
            judge, prompts = judge_of(noise)
            each = judge.evaluation.images_per_prompt
            images = draw_images(trainer.policy, "ema", prompts, judge, images_per_prompt=each)
            found_in = verdicts(images, captions_of(prompts, per_prompt=each))
            exact = [verdict.strict for verdict in found_in]
            of_prompts = [mean(exact[first : first + each]) for first in range(0, len(exact), each)]
            found.append(Judged(noise, mean(exact), stdev(of_prompts) / len(of_prompts) ** 0.5))
    return found


def read(directory: Path = RESULTS, *, overrides: str | None = None) -> list[Judged]:
    """What was measured, of that setting where one is named; nothing where nothing was."""
    if not (directory / FILE).exists():
        return []
    rows = [row for row in read_rows(directory / FILE) if overrides in (None, row["overrides"])]
    return [Judged(int(row["noise"]), float(row["strict"]), float(row["error"])) for row in rows]


def sentence(found: list[Judged]) -> str:
    """What the page says of it."""
    if not found:
        return "How far an evaluation scatters is not measured."
    shares = [each.strict for each in found]
    return (
        f"DGPO after {ITERATIONS} iterations, drawn from {len(found)} noises, is at {mean(shares):.1%} with a standard "
        f"deviation of {100 * stdev(shares):.1f} points ({min(shares):.1%} to {max(shares):.1%}; from the noise of "
        f"final runs {found[0].strict:.1%}). Were prompts drawn anew as well, the standard error of an evaluation "
        f"would be {100 * mean(each.error for each in found):.1f} points."
    )


def main() -> None:
    about = {**origin(), "overrides": " ".join(policy_run().overrides)}
    write_rows(RESULTS / FILE, (each._asdict() | about for each in judge()))


if __name__ == "__main__":
    main()
