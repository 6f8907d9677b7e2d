"""Where the time of an iteration goes, and what ranks exchange in it: what `dgpo-fast profile` does."""

from __future__ import annotations

import csv
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch.profiler import ProfilerActivity

from dgpo_fast.config import Config
from dgpo_fast.parallel.traffic import CollectiveCounter, Traffic
from dgpo_fast.profiling import BACKGROUND, DOMAIN, span, watched_by
from dgpo_fast.trainer import Trainer

WINDOW = "window"
"""NVTX range of the measured iterations."""

StagePath = tuple[str, ...]

SHARES: dict[str, tuple[StagePath, ...]] = {
    "transformer, sampling": (("rollout", "transformer"),),
    "transformer, training": tuple(("train", name) for name in ("reference", "old", "weights", "policy", "backward")),
    "VAE and rewards, waited for": (("rollout", "vae"), ("reward",)),
}
"""What an iteration is for. The rest is text encoding, solver, loss, optimizer, averages and Python."""
MEANWHILE: dict[str, StagePath] = {"VAE": (BACKGROUND, "vae"), "reward": (BACKGROUND, "reward")}
"""What a thread of its own does while the iteration samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured iterations."""

    iterations: int
    wall_s: float
    """Of all of them."""
    seconds: Mapping[StagePath, float]
    """Per path of stages, those inside included."""
    calls: Mapping[StagePath, int]
    num_ranks: int
    traffic: tuple[Traffic, ...]
    """Of one more iteration; empty where there is one rank."""
    stages: Path
    collectives: Path | None
    trace: Path | None

    @property
    def files(self) -> list[Path]:
        """All that was written."""
        return [path for path in (self.stages, self.collectives, self.trace) if path is not None]

    def shares(self) -> dict[str, float]:
        """Share of the wall time by purpose; the last, "everything else", makes them one."""
        shares = {
            purpose: sum(self.seconds.get(path, 0.0) for path in paths) / self.wall_s
            for purpose, paths in SHARES.items()
        }
        return {**shares, "everything else": 1 - sum(shares.values())}


def profile_run(config: Config, out: Path, *, iterations: int, warmup: int, trace: bool) -> Profile:
    """Runs `warmup` iterations, measures `iterations` more, and writes stages.csv to `out`.

    Every rank of a launch calls it; the first writes, and its times are the ones returned. With several ranks one more
    iteration is run whose collectives are counted, and collectives.csv written: counting slows it.
    With `trace`, one more runs under torch.profiler, apart since that slows it, and is written to trace.json.
    No checkpoints, evaluations or logs are written, and nothing of the training is kept.
    """
    trainer = Trainer(config, out)
    trainer.clock.exact = True
    # On CUDA autograd has a thread of its own for backward passes, whose blocks would lie beside the stage "backward".
    with trainer.scorer, torch.autograd.set_multithreading_enabled(False):
        return _profile(trainer, out, iterations=iterations, warmup=warmup, trace=trace)


def _profile(trainer: Trainer, out: Path, *, iterations: int, warmup: int, trace: bool) -> Profile:
    for _ in range(warmup):
        trainer.run_iteration()
    trainer.clock.reset()
    with span(WINDOW, "stage"):
        start = time.perf_counter()
        for _ in range(iterations):
            trainer.run_iteration()
        wall_s = time.perf_counter() - start
    seconds, calls = dict(trainer.clock.seconds), dict(trainer.clock.calls)
    world = trainer.world
    profile = Profile(
        iterations=iterations,
        wall_s=wall_s,
        seconds=seconds,
        calls=calls,
        num_ranks=world.size,
        traffic=_count(trainer) if world.size > 1 else (),
        stages=out / "stages.csv",
        collectives=out / "collectives.csv" if world.size > 1 else None,
        trace=out / "trace.json" if trace else None,
    )
    if world.is_first:
        _write_stages(profile)
        _write_collectives(profile)
    if profile.trace is not None and world.is_first:
        _trace(trainer, profile.trace)
    elif profile.trace is not None:
        trainer.run_iteration()
    world.wait()
    world.leave()
    return profile


def _count(trainer: Trainer) -> tuple[Traffic, ...]:
    with CollectiveCounter() as counter:
        trainer.run_iteration()
    return tuple(counter.traffic())


def _trace(trainer: Trainer, path: Path) -> None:
    on_cuda = trainer.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    annotations = watched_by(lambda name, category: torch.profiler.record_function(name))
    with torch.profiler.profile(activities=activities) as profiler, annotations:
        trainer.run_iteration()
    profiler.export_chrome_trace(str(path))


def _write_stages(profile: Profile) -> None:
    with profile.stages.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", "calls_per_iteration", "ms_per_iteration", "share"])
        for path, seconds in sorted(profile.seconds.items()):
            each_ms = 1000 * seconds / profile.iterations
            calls = profile.calls[path] / profile.iterations
            writer.writerow(["/".join(path), f"{calls:g}", f"{each_ms:.3f}", f"{seconds / profile.wall_s:.4f}"])


def _write_collectives(profile: Profile) -> None:
    if profile.collectives is None:
        return
    with profile.collectives.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", "collective", "number", "bytes", "bytes_sent_by_each_rank"])
        for each in profile.traffic:
            sent = round(each.sent_bytes(profile.num_ranks))
            writer.writerow(["/".join(each.stage), each.kind, each.number, each.num_bytes, sent])


def render(profile: Profile) -> RenderableType:
    """The profile for a terminal."""
    purposes = Table(title=f"Mean of {profile.iterations} iterations", title_justify="left")
    purposes.add_column("purpose")
    for column in ("ms", "share"):
        purposes.add_column(column, justify="right")
    each_ms = 1000 * profile.wall_s / profile.iterations
    for purpose, share in profile.shares().items():
        purposes.add_row(purpose, f"{share * each_ms:.1f}", f"{share:.1%}")
    purposes.add_section()
    purposes.add_row("iteration", f"{each_ms:.1f}", "")
    purposes.add_section()
    for purpose, path in MEANWHILE.items():
        if (seconds := profile.seconds.get(path)) is not None:
            each = f"{1000 * seconds / profile.iterations:.1f}", f"{seconds / profile.wall_s:.1%}"
            purposes.add_row(f"{purpose}, meanwhile", *each)

    stages = Table(title="Stages", title_justify="left")
    stages.add_column("stage")
    for column in ("calls", "ms", "share"):
        stages.add_column(column, justify="right")
    for path, seconds in sorted(profile.seconds.items()):
        stages.add_row(
            "  " * (len(path) - 1) + path[-1],
            f"{profile.calls[path] / profile.iterations:g}",
            f"{1000 * seconds / profile.iterations:.1f}",
            f"{seconds / profile.wall_s:.1%}",
        )
    return Group(purposes, stages, *([_render_traffic(profile)] if profile.traffic else []))


def _render_traffic(profile: Profile) -> Table:
    table = Table(title=f"Collectives of an iteration, {profile.num_ranks} ranks", title_justify="left")
    table.add_column("stage")
    table.add_column("collective")
    for column in ("number", "MB", "sent by each rank, MB"):
        table.add_column(column, justify="right")
    for each in profile.traffic:
        sent = each.sent_bytes(profile.num_ranks)
        name = "/".join(each.stage)
        table.add_row(name, each.kind, str(each.number), f"{each.num_bytes / 1e6:.3f}", f"{sent / 1e6:.3f}")
    table.add_section()
    number = sum(each.number for each in profile.traffic)
    sent = sum(each.sent_bytes(profile.num_ranks) for each in profile.traffic)
    table.add_row("iteration", "", str(number), "", f"{sent / 1e6:.3f}")
    return table


def nsight_commands(out: Path) -> list[str]:
    """Command lines for Nsight Systems (the measured iterations) and Nsight Compute (the policy's passes in them).

    Both begin with the window, and overwrite what an earlier run left. Without torch's trace: it and Nsight want the
    same hardware counters.
    """
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--trace", "--no-trace")]
    command = shlex.join(["python", "-m", "dgpo_fast", *arguments, "--no-trace"])
    # At its default, stop-shutdown, Nsight Systems kills the process behind the window, before anything is written.
    systems = (
        f"nsys profile --trace=cuda,nvtx --capture-range=nvtx --nvtx-capture={WINDOW}@{DOMAIN} "
        f"--capture-range-end=stop --force-overwrite=true --output={shlex.quote(str(out / 'nsys'))} {command}"
    )
    included = " ".join(f"--nvtx-include='{DOMAIN}@{WINDOW}/*/{name}'" for name in ("policy", "backward"))
    compute = (
        f"ncu --nvtx {included} --launch-count=500 --force-overwrite --export={shlex.quote(str(out / 'ncu'))} {command}"
    )
    return [systems, compute]
