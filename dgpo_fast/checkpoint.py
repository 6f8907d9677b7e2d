"""Checkpoints: written whole or not at all, verified when read, rotated.

checkpoints/step-000020/lora/           the evaluation EMA in diffusers' LoRA format
checkpoints/step-000020/state/          tensors.safetensors and state.json: everything that resuming needs
checkpoints/step-000020/manifest.json   size and SHA-256 of every file
checkpoints/best                        a link to the one with the highest score
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_fast.errors import UserError

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What resuming needs: tensors by name, and plain values."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def save_checkpoint(run_dir: Path, state: State, *, save_lora: Callable[[Path], None]) -> Path:
    """Writes the checkpoint of `state.step` and returns its directory.

    It is written beside and renamed at the end: a process killed at any moment leaves a whole checkpoint or none.

    Raises:
        UserError: the disk is full or not writable; what was saved before is untouched.
    """
    target = run_dir / "checkpoints" / f"step-{state.step:06d}"
    if target.is_dir():
        return target  # the state after a step is always the same, and replacing a directory is not atomic
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
        save_lora(partial / "lora")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        save_file(tensors, partial / "state" / "tensors.safetensors")
        values = {"step": state.step, **state.values}
        (partial / "state" / "state.json").write_text(json.dumps(values, indent=2) + "\n")
        _write_manifest(partial)
        partial.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot save {target}: {reason}; earlier checkpoints are untouched") from error
    return target


def rotate(run_dir: Path, scores: Mapping[int, float], *, keep_last: int) -> None:
    """Makes `checkpoints/best` point to the best checkpoint and removes old others.

    Args:
        scores: held-out scores by step. The best is the one with the highest, of equal ones the newest; one without a
            score, or with NaN because no image had one, is below all others.
        keep_last: newest checkpoints to keep.

    Raises:
        UserError: the disk is full or not writable.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return

    def standing(path: Path) -> tuple[float, int]:
        score = scores.get(_step_of(path), nan)
        return (-inf if isnan(score) else score), _step_of(path)

    best, link = max(checkpoints, key=standing), run_dir / "checkpoints" / "best"
    fresh = link.with_name(".best.partial")
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(best.name)
        fresh.replace(link)
        for path in checkpoints[:-keep_last]:
            if path != best:
                shutil.rmtree(path)
    except OSError as error:
        raise UserError(f"cannot tidy {link.parent}: {error.strerror}; no checkpoint is damaged") from error


def load_checkpoint(directory: Path) -> State:
    """The verified state in a checkpoint's directory, tensors on the CPU.

    Raises:
        UserError: a file is missing, has another size or another content than when it was written.
    """
    _verify(directory)
    values = json.loads((directory / "state" / "state.json").read_text())
    tensors = load_file(directory / "state" / "tensors.safetensors")
    return State(step=values.pop("step"), tensors=tensors, values=values)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step_of)


def last_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(f"no checkpoint in {run_dir / 'checkpoints'}")
    return checkpoints[-1]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(directory)): [path.stat().st_size, _digest(path)] for path in files}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*files, directory / "manifest.json"]:
        _sync(path)


def _verify(directory: Path) -> None:
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        for name, (size, digest) in manifest.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
                raise UserError(_damaged(directory, name))
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_damaged(directory, "manifest.json")) from None


def _damaged(directory: Path, name: str) -> str:
    return f"checkpoint {directory} is damaged ({name}); remove it to go on from the one before"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
