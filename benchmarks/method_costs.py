"""What an image costs each method: seconds and FLOPs of its iterations, with random weights, no target and no judge.

    python -m benchmarks.method_costs --out DIR [--methods NAME ...] [--iterations N] [--embedded]

SD3.5-Medium with the published recipes, in their batch shapes but with as few groups as these allow: groups follow one
another, so that seconds of an image are the same with more. With --embedded, the embedded pipeline and its recipes.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.speedup_runs import METHODS
from benchmarks.tables import stamp, write_rows
from dgpo_fast import Config, Trainer, load_recipe
from dgpo_fast.environment import device_name, package_versions
from dgpo_fast.planning import plan

PUBLISHED = {
    "dgpo": "sd35m-geneval",
    "flow-grpo": "sd35m-geneval-flow-grpo",
    "flow-grpo-fast": "sd35m-geneval-flow-grpo-fast",
    "diffusion-nft": "sd35m-geneval-nft",
    "awm": "sd35m-geneval-awm",
    "diffusion-dpo": "sd35m-geneval-dpo",
}
WITHOUT_WEIGHTS = (
    "model.name=random:sd35-medium", "rewards.terms=[{name: shapes}]", "prompts.train=shapes:train",
    "prompts.test=shapes:test", "evaluation.every=0", "logging.tensorboard=false",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    method: str
    recipe: str
    images_of_recipe: int
    """An iteration's."""
    images: int
    """That were measured, an iteration."""
    seconds_per_image: float
    tflop_per_image: float
    """Of the transformer and the VAE, as `dgpo-fast train RECIPE --dry-run` counts them."""
    tflops_per_s: float
    peak_memory_gb: float
    device: str
    torch: str
    commit: str
    date: str


def shortened(recipe: str, overrides: Sequence[str]) -> Config:
    """The recipe with the fewest groups that its micro-batches and optimizer steps can be made of."""
    config = load_recipe(recipe, overrides)
    size, optimizer = config.groups.size, config.optimizer
    groups = optimizer.steps_per_iteration * math.lcm(size, optimizer.images_per_micro_batch) // size
    return load_recipe(recipe, [*overrides, f"groups.per_iteration={groups}"])


def measure(method: str, recipe: str, overrides: Sequence[str], *, iterations: int) -> Cost:
    """The mean of so many iterations behind a first one, in which kernels are compiled and chosen."""
    config = shortened(recipe, overrides)
    work = plan(config, num_ranks=1).cost
    assert work is not None
    if torch.cuda.is_available():  # the peak is this method's
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(config, Path(out))
        trainer.run_iteration()
        start = time.perf_counter()
        reports = [trainer.run_iteration()[-1] for _ in range(iterations)]
        seconds = (time.perf_counter() - start) / iterations
    images = config.images_per_iteration
    return Cost(
        method=METHODS[method].title, recipe=recipe, images=images,
        images_of_recipe=load_recipe(recipe, overrides).images_per_iteration,
        seconds_per_image=seconds / images, tflop_per_image=work.flops / images / 1e12,
        tflops_per_s=work.flops / seconds / 1e12, peak_memory_gb=reports[-1].peak_memory_gb,
        device=device_name(trainer.world.device), torch=package_versions()["torch"], **stamp(),
    )  # fmt: skip


def write(costs: Iterable[Cost], path: Path) -> None:
    """A row for each, on disk as soon as it is measured."""
    write_rows(path, map(_row, costs))


def _row(cost: Cost) -> dict[str, object]:
    """Of the table, and a line for the person who waits for the others."""
    print(
        f"{cost.method}: {cost.seconds_per_image:.3g} s an image, {cost.tflop_per_image:.3g} TFLOP, "
        f"{cost.tflops_per_s:.3g} TFLOP/s",
        flush=True,
    )
    return {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in asdict(cost).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where method_costs.csv goes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--iterations", type=int, default=1, help="to measure, behind a first one (1)")
    parser.add_argument("--embedded", action="store_true", help="the embedded pipeline instead of SD3.5-Medium")
    options = parser.parse_args()
    recipes = {name: METHODS[name].recipe for name in METHODS} if options.embedded else PUBLISHED
    overrides = ("evaluation.every=0", "logging.tensorboard=false") if options.embedded else WITHOUT_WEIGHTS
    costs = (measure(name, recipes[name], overrides, iterations=options.iterations) for name in options.methods)
    write(costs, options.out / "method_costs.csv")


if __name__ == "__main__":
    main()
