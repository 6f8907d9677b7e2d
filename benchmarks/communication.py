"""What an optimizer step exchanges, as a formula, and what that would take on 8 and on 64 GPUs: nothing here is timed.

python -m benchmarks.communication [--write]       prints the tables of docs/communication.md, or puts them there

The formula is compared with counts in tests/parallel/test_traffic.py, the page with these tables as well.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.pages import filled
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.parallel.state_bytes import REDUCE_BUCKET
from dgpo_fast.parallel.traffic import ring_share
from dgpo_fast.planning import plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "communication.md"

STAGES = (0, 1, 2, 3)
IMAGES_PER_GPU = 16
PEAK_FLOPS = 798e12
"""A product of two 8192 x 8192 bfloat16 matrices on one H100."""
OFFICIAL_SHARE = 0.24
"""Of it that the published loop is estimated to reach."""

PREFETCH = 5e7
"""Values that DeepSpeed gathers ahead in stage 3 (`stage3_prefetch_bucket_size`)."""


class Exchange(NamedTuple):
    """Collectives of one kind, made for one purpose in an optimizer step."""

    purpose: str
    kind: str
    passes: int
    """How often the whole of it is exchanged."""
    num_bytes: float
    """Of the whole, each time."""
    pieces: int
    """In how many collectives, each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What decides the large exchanges of an optimizer step."""

    stage: int
    """Of ZeRO."""
    is_full: bool
    trained: int
    micro_batches: int
    """Backward passes of each rank."""
    value: int
    """Bytes of a weight that layers compute with."""
    gradient: int
    """Bytes of a gradient, as ranks add it up."""
    has_old: bool = True
    """Whether errors of the old policy are asked for."""
    gathered_forwards: int = 0
    """Forwards of a rollout that gathers weights, as under `parallel.rollout: gathered`; 0 with a whole replica."""
    is_frozen_sharded: bool = False
    """Whether the base and the old policy are, too (`parallel.frozen: sharded`); a rollout's replica then is."""


def exchanges(step: Step) -> Iterator[Exchange]:
    """Every exchange of a size that grows with the number of trained weights."""
    yield from _full(step) if step.is_full else _adapters(step)


def _adapters(step: Step) -> Iterator[Exchange]:
    whole = 4.0 * step.trained  # masters and their gradient are float32
    kind = "reduce_scatter" if step.stage == 3 else "all_reduce"
    yield Exchange("gradient", kind, 1, whole, _pieces(step.trained, REDUCE_BUCKET))
    if step.stage in (1, 2):
        yield Exchange("weights", "all_gather", 1, whole, 1)
    if step.stage == 3:
        yield Exchange("weights", "all_gather", 2, whole, 1)  # in DeepSpeed's pass over them, and for our layers


def _full(step: Step) -> Iterator[Exchange]:
    weights, gradient = float(step.value * step.trained), float(step.gradient * step.trained)
    buckets = _pieces(step.trained, REDUCE_BUCKET)
    if step.stage == 0:
        yield Exchange("gradient", "all_reduce", 1, 4.0 * step.trained, 1)
        return
    if step.stage == 1:
        yield Exchange("gradient", "all_reduce", 1, gradient, buckets)
    if step.stage == 2:
        yield Exchange("gradient", "all_reduce", step.micro_batches, gradient, buckets)
    if step.stage in (1, 2):
        yield Exchange("weights", "all_gather", 1, weights, 1)
    if step.stage == 3:
        yield Exchange("gradient", "reduce_scatter", step.micro_batches, gradient, buckets)
        ahead = _pieces(step.trained, PREFETCH)
        yield Exchange("weights, forward", "all_gather", step.micro_batches, weights, ahead)
        yield Exchange("weights, backward", "all_gather", step.micro_batches, weights, ahead)
        if step.gathered_forwards:
            yield Exchange("weights, rollout", "all_gather", step.gathered_forwards, weights, ahead)
        else:
            yield Exchange("replica", "all_gather", 1, weights, 1)
        if step.is_frozen_sharded:
            yield Exchange("base, forward", "all_gather", step.micro_batches, weights, ahead)
    if step.has_old and step.is_frozen_sharded:
        yield Exchange("old policy, forward", "all_gather", step.micro_batches, weights, ahead)
    elif step.has_old:
        yield Exchange("old policy", "all_gather", 1, weights, 1)


def _pieces(values: float, bucket: float) -> int:
    return math.ceil(values / bucket)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Ranks, the bandwidth of each in a ring through all, and the latency of its hops, in NCCL's own estimate."""

    name: str
    num_ranks: int
    num_nodes: int
    bytes_per_s: float
    start_s: float = 8.4e-6
    hop_s: float = 3.4e-6
    node_hop_s: float = 9.6e-6

    def seconds(self, kind: str, num_bytes: float, pieces: int = 1) -> float:
        """What `pieces` collectives take one after another that are `num_bytes` together."""
        rounds = 2 if kind == "all_reduce" else 1
        between = rounds * (self.num_nodes - 1)
        within = rounds * (self.num_ranks - 1) - between
        latency = self.start_s + within * self.hop_s + between * self.node_hop_s
        return pieces * latency + ring_share(kind, self.num_ranks) * num_bytes / self.bytes_per_s


EFFICIENCY = 0.8
"""Of a link's rate that is assumed to be reached."""
NVLINK = EFFICIENCY * 450e9
INFINIBAND = EFFICIENCY * 50e9
NETWORKS = (
    Network(name="8, NVLink", num_ranks=8, num_nodes=1, bytes_per_s=NVLINK),
    # Eight rings cross from machine to machine, each through an adapter of its own.
    Network(name="64, 400 Gb/s a GPU", num_ranks=64, num_nodes=8, bytes_per_s=min(NVLINK, 8 * INFINIBAND)),
    Network(name="64, 400 Gb/s a node", num_ranks=64, num_nodes=8, bytes_per_s=INFINIBAND),
)

RUNS = {
    "SD3.5-M, LoRA": ("sd35m-geneval", "random:sd35-medium"),
    "SD3.5-L, LoRA": ("sd35m-geneval", "random:sd35-large"),
    "SD3.5-M, full": ("sd35m-geneval-full", "random:sd35-medium"),
    "SD3.5-L, full": ("sd35l-geneval-full", "random:sd35-large"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recipe on so many GPUs, each with `IMAGES_PER_GPU` images of an iteration."""

    config: Config
    num_ranks: int
    trained: int
    micro_batches: int
    floor_s: float
    """An iteration's FLOPs at `PEAK_FLOPS` on every GPU."""

    def step(self, stage: int) -> Step:
        is_low = self.config.model.dtype == "bfloat16"
        is_short = is_low and self.config.parallel.gradients == "bfloat16"
        has_old = getattr(self.config.algorithm, "clip", None) is not None
        return Step(
            stage=stage, is_full=self.config.adapter is None, trained=self.trained, micro_batches=self.micro_batches,
            value=2 if is_low else 4, gradient=2 if is_short else 4, has_old=has_old,
        )  # fmt: skip

    def small(self) -> int:
        """Collectives of a few values: rewards, metrics, the norm, signals twice, and scores of groups over ranks."""
        placed = placement_of(self.config, self.num_ranks)
        rounds = self.micro_batches // placed.steps_per_round
        return 5 + (0 if placed.case == "a" else rounds)

    def seconds(self, stage: int, network: Network) -> float:
        """Of all collectives of an optimizer step, none of them hidden behind computation."""
        large = sum(
            each.passes * network.seconds(each.kind, each.num_bytes, each.pieces)
            for each in exchanges(self.step(stage))
        )
        return large + network.seconds("all_reduce", 0, self.small())


@cache
def run_of(name: str, num_ranks: int) -> Run:
    """The run of RUNS, with as many groups as give every GPU its images."""
    recipe, model = RUNS[name]
    overrides = [f"model.name={model}", "rewards.terms=[{name: shapes}]"]
    size = load_recipe(recipe, overrides).groups.size
    config = load_recipe(recipe, [*overrides, f"groups.per_iteration={num_ranks * IMAGES_PER_GPU // size}"])
    planned = plan(config, num_ranks=num_ranks)
    assert planned.cost is not None
    return Run(
        config=config, num_ranks=num_ranks, trained=planned.cost.trained_parameters,
        micro_batches=planned.micro_batches, floor_s=planned.cost.flops / num_ranks / PEAK_FLOPS,
    )  # fmt: skip


def tables() -> dict[str, str]:
    """The tables of the page, by name."""
    return {"bytes": _bytes_table(), "seconds": _seconds_table(), "networks": _networks_table()}


def _bytes_table() -> str:
    lines = ["| | trained | M | stage 0 | 1 | 2 | 3 |", "|---|---|---|---|---|---|---|"]
    for name in RUNS:
        run = run_of(name, 8)
        sent = [
            sum(each.passes * ring_share(each.kind, 8) * each.num_bytes for each in exchanges(run.step(stage))) / 1e9
            for stage in STAGES
        ]
        cells = " | ".join(_figure(value) for value in sent)
        lines.append(f"| {name} | {_count(run.trained)} | {run.micro_batches} | {cells} |")
    return "\n".join(lines)


def _seconds_table() -> str:
    lines = [
        "| | GPUs | compute: floor, published loop | stage 0 | 1 | 2 | 3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        for network in NETWORKS:
            run = run_of(name, network.num_ranks)
            cells = []
            for stage in STAGES:
                seconds = run.seconds(stage, network)
                cells.append(f"{_figure(seconds)} ({seconds / run.floor_s:.0%})")
            compute = f"{run.floor_s:.2f}, {run.floor_s / OFFICIAL_SHARE:.1f}"
            lines.append(f"| {name} | {network.name} | {compute} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _networks_table() -> str:
    lines = ["| GPUs | GB/s of each in the ring | a sum of a few values |", "|---|---|---|"]
    for network in NETWORKS:
        small = 1e6 * network.seconds("all_reduce", 0)
        lines.append(f"| {network.name} | {network.bytes_per_s / 1e9:.0f} | {small:.0f} us |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _count(values: int) -> str:
    return f"{values / 1e9:.3f} B" if values >= 1e9 else f"{values / 1e6:.2f} M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/communication.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
        return
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
