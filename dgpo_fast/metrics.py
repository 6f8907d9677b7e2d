"""What a run writes down while it trains: metrics, evaluations and warnings, for TensorBoard and Weights & Biases too.

metrics.jsonl, evaluations.jsonl and warnings.jsonl are the record: a line each, in a fixed key order, on disk as soon
as it is written. The others are copies for looking at.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

from dgpo_fast.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dgpo_fast.guard import Finding
    from dgpo_fast.records import StepReport

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
WARNINGS = "warnings.jsonl"

RELEASED_S = 30.0
"""For a lock of a process that was killed to be gone: on a network's disk it takes a while."""

SINGLE_REWARD = "reward/"
SECTIONS = {
    "reward": (
        *("reward_mean", "reward_std", "zero_std_groups", "clamped_advantages"),
        *("failed_samples", "dropped_groups"),
    ),
    "loss": ("loss", "dgpo_loss", "surrogate_loss", "policy_loss", "kl", "clip_fraction", "group_weight_mean"),
    "health": ("diversity", "group_weight_saturation", "adapter_norm"),
    "optimizer": ("grad_norm", "lr", "skipped_steps"),
    "speed": ("images_seen", "wall_s", "rollout_s", "reward_s", "train_s", "images_per_s", "peak_memory_gb"),
}
"""Under which heading TensorBoard and Weights & Biases show a metric."""


class MetricsLog:
    """The logs of one run, open for writing. One process writes them: rank 0.

    A resumed run goes on after `resume_step`: what an earlier process wrote beyond that step, or left half written when
    it was killed, is cut off, so that metrics.jsonl ends equal to that of a run that was never interrupted.

    Args:
        run_dir: the run directory; it exists.
        config: the run's, as plain data, which Weights & Biases shows.
        tensorboard: also write events.out.* there.
        wandb: also write to Weights & Biases.
        resume_step: optimizer steps that the checkpoint to continue from has seen; None for a new run.

    Raises:
        UserError: another process writes them; wandb is not installed or refuses; a log to continue is no JSON.
    """

    def __init__(
        self, run_dir: Path, *, config: dict[str, Any], tensorboard: bool, wandb: bool, resume_step: int | None
    ) -> None:
        module = _import_wandb() if wandb else None
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        with ExitStack() as opened:
            self._metrics = opened.enter_context(_locked(run_dir / METRICS, resumed=resume_step is not None))
            for name in (METRICS, EVALUATIONS, WARNINGS):
                _cut(run_dir / name, -1 if resume_step is None else resume_step)
            self._evaluations = opened.enter_context((run_dir / EVALUATIONS).open("a", encoding="utf-8"))
            self._warnings = opened.enter_context((run_dir / WARNINGS).open("a+", encoding="utf-8"))
            if tensorboard:
                self._tensorboard = opened.enter_context(_summary_writer(run_dir, resume_step))
            if module is not None:
                self._wandb = _wandb_run(module, run_dir, config, resumed=resume_step is not None)
                opened.callback(self._wandb.finish)
            self._opened = opened.pop_all()

    def write(self, report: StepReport) -> None:
        """Adds one optimizer step."""
        values = as_line(report)
        _append(self._metrics, values)
        shown = {f"{name}/{key}": values[key] for name, keys in SECTIONS.items() for key in keys}
        shown |= {key: values[key] for key in values if key.startswith(SINGLE_REWARD)}
        shown |= {f"method/{key}": values[key] for key in report.extra}
        self._plot({tag: value for tag, value in shown.items() if value is not None}, report.step)

    def write_evaluation(
        self,
        step: int,
        *,
        num_prompts: int,
        images_per_prompt: int,
        base: Mapping[str, float],
        tuned: Mapping[str, float],
    ) -> None:
        """Adds one held-out evaluation: metrics of the base model and of the evaluation EMA after `step` steps."""
        line = {
            "step": step,
            "split": "test",
            "num_prompts": num_prompts,
            "images_per_prompt": images_per_prompt,
            "base": {name: json_number(value) for name, value in base.items()},
            "tuned": {name: json_number(value) for name, value in tuned.items()},
        }
        _append(self._evaluations, line)
        self._plot({f"evaluation/{name}": value for name, value in tuned.items()}, step)

    def write_finding(self, finding: Finding) -> None:
        """Adds what the guard found, unless it is there: a resumed run looks at its last evaluation again."""
        self._warnings.seek(0)
        if json.dumps(finding._asdict()) + "\n" in self._warnings:
            return
        _append(self._warnings, finding._asdict())
        if self._tensorboard is not None:
            self._tensorboard.add_text("guard", finding.line, finding.step)

    def write_samples(self, step: int, *, grid: Path) -> None:
        """Shows a sample grid, a PNG, in TensorBoard and Weights & Biases."""
        if self._tensorboard is not None:
            import numpy as np
            from PIL import Image

            with Image.open(grid) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._tensorboard.add_image("samples", pixels, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({"samples": importlib.import_module("wandb").Image(str(grid))}, step=step)

    def close(self) -> None:
        self._opened.close()

    def _plot(self, values: Mapping[str, float], step: int) -> None:
        if self._tensorboard is not None:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


def as_line(report: StepReport) -> dict[str, Any]:
    """A step as metrics.jsonl has it: flat, each reward by itself behind the rest, as `reward/NAME`, and what only a
    method of the user's own has.

    What is not finite, such as the gradient's norm of a skipped step, is None.
    """
    values = dataclasses.asdict(report)
    values |= {f"{SINGLE_REWARD}{title}": mean for title, mean in values.pop("rewards").items()}
    values |= values.pop("extra")
    return {key: json_number(value) if isinstance(value, float) else value for key, value in values.items()}


def json_number(value: float) -> float | None:
    """The number, or None where it is not finite, which JSON has no word for."""
    return float(value) if math.isfinite(value) else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first; empty where there is none. A half-written last line is left out.

    Raises:
        UserError: a line is no JSON.
    """
    return _read(run_dir / METRICS)


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl, as `read_metrics` reads those of metrics.jsonl; NaN where a metric has none."""
    lines = _read(run_dir / EVALUATIONS)
    for line in lines:
        for side in ("base", "tuned"):
            line[side] = {name: math.nan if value is None else value for name, value in line[side].items()}
    return lines


def read_warnings(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of warnings.jsonl, as `read_metrics` reads those of metrics.jsonl."""
    return _read(run_dir / WARNINGS)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # What follows the last line break is empty, or a line still being written.
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _append(file: TextIO, values: Mapping[str, Any]) -> None:
    """A line more, on the disk once this returns: a checkpoint that comes after it does not outlive it."""
    file.write(json.dumps(values, allow_nan=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _locked(path: Path, *, resumed: bool) -> TextIO:
    """A log to add to, which no other process adds to until it is closed. One that goes on waits a little for it.

    Raises:
        UserError: one does already.
    """
    file, end = path.open("a", encoding="utf-8"), time.monotonic() + (RELEASED_S if resumed else 0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(min(1.0, RELEASED_S / 10))
                continue
            file.close()
            way_out = "end it first" if resumed else "end it, or give another --out"
            raise UserError(f"{path.parent}: a run that is not over writes there; {way_out}") from None
        except OSError:
            pass  # of a file system that knows no locks
        return file


def _cut(path: Path, step: int) -> None:
    """Shortens a log to its whole lines up to `step`; -1 leaves none, whatever they are."""
    if not path.exists():
        return
    if step < 0:
        os.truncate(path, 0)
        return
    with path.open("r+b") as file:
        kept = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or _parse(line, f"{path}:{number}")["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError:
        raise UserError(f"{place}: no JSON: {line[:60]!r}; the file is damaged") from None
    return values


def _summary_writer(run_dir: Path, resume_step: int | None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard then drops what earlier event files hold from that step on.
    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(run_dir), purge_step=purge_step)


def _import_wandb() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "logging.wandb is true, but wandb is not installed: pip install wandb, or set logging.wandb=false"
        ) from None


def _wandb_run(wandb: ModuleType, run_dir: Path, config: dict[str, Any], *, resumed: bool) -> Any:
    """An open Weights & Biases run: a new one, or the one that `run_dir` began if `resumed`.

    Steps that a resumed run repeats reach Weights & Biases twice; it keeps the first, and both are equal.
    """
    id_file = run_dir / "wandb.id"
    if not (resumed and id_file.exists()):
        id_file.write_text(secrets.token_hex(4))
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dgpo-fast"),
            name=run_dir.resolve().name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run_dir),
            config=config,
        )
    except wandb.Error as error:
        raise UserError(f"wandb: {error} (or set logging.wandb=false)") from None
