"""Checkpoints: written by all ranks, whole or not at all, verified when read, rotated.

checkpoints/step-000020/lora/           the evaluation EMA in diffusers' LoRA format, or, of full fine-tuning,
checkpoints/step-000020/transformer/    as diffusers' transformer, in float32
checkpoints/step-000020/state/          a file of each kind of tensors and state.json: everything that resuming needs
checkpoints/step-000020/manifest.json   size and SHA-256 of every file
checkpoints/best                        a link to the one with the highest score

A kind is one float32 tensor for each trained parameter: masters, averages, Adam's. The files hold whole parameters, and
do not know how many ranks wrote which pieces: any number of ranks reads them, under any stage of ZeRO.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.parallel.piece_files import create_file, read_pieces, write_pieces
from dgpo_fast.parallel.weights import Held, Piece, Shapes
from dgpo_fast.parallel.world import World

SEEN_S = 60.0
"""For a directory that one machine has written to be seen by the others: a network's disk remembers what it lacks."""
_NAME = re.compile(r"step-(\d{6,})")

Step = int | Literal["best"]
"""Names a checkpoint: the step after which it was saved, or the one that `checkpoints/best` points to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What resuming needs: kinds of tensors by name, all of the same parameters, and plain values."""

    step: int
    shapes: Shapes
    held: Mapping[str, Held]
    values: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    """Of kinds that lie elsewhere than in state/<kind>.safetensors, where others read them."""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """What these look for there besides, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    directory: Path
    step: int
    values: Mapping[str, Any]
    files: Mapping[str, str]
    """Of kinds, by name."""
    constants: Sequence[str] = ()
    """Names of tensors in `files` that are of no parameter."""

    def read(self, kind: str, pieces: Sequence[Piece], shapes: Shapes) -> None:
        """Fills the values of `pieces`, which are of parameters of these `shapes`.

        Raises:
            UserError: they are of other parameters than the checkpoint's.
        """
        try:
            read_pieces(self.directory / self.files[kind], pieces, shapes, besides=self.constants)
        except KeyError as error:
            raise UserError(
                f"{self.directory} does not fit: its {kind} and the run's differ in {error}; it is of another model, "
                "other adapters, or another version of peft or diffusers; its lora/ or transformer/ loads anywhere"
            ) from None

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All of a kind by parameter, float32, on the CPU."""
        loaded = load_file(self.directory / self.files[kind])
        return {name: tensor for name, tensor in loaded.items() if name not in self.constants}


def save_checkpoint(run_dir: Path, state: State, world: World, *, save_weights: Callable[[Path], None]) -> Path:
    """Writes the checkpoint of `state.step` and returns its directory; all ranks call it, and all write.

    It is written beside and renamed at the end: a process killed at any moment leaves a whole checkpoint or none.

    Args:
        save_weights: called by the first rank with the directory, to write what others than this package read.

    Raises:
        UserError: on every rank: the disk is full or not writable; what was saved before is untouched.
    """
    target = run_dir / "checkpoints" / f"step-{state.step:06d}"
    if world.highest(target.is_dir()):
        return target  # the state after a step is always the same, and replacing a directory is not atomic
    partial = target.with_name(f".{target.name}.partial")
    files = {kind: state.files.get(kind, f"state/{kind}.safetensors") for kind in state.held}
    constants = {name: tensor.shape for name, tensor in state.constants.items()}
    shapes = {kind: {**state.shapes, **(constants if kind in state.files else {})} for kind in state.held}

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
        save_weights(partial)
        constant_pieces = [Piece(name, 0, tensor.flatten()) for name, tensor in state.constants.items()]
        for kind, file in files.items():
            create_file(partial / file, shapes[kind])
            if kind in state.files:
                write_pieces(partial / file, constant_pieces, shapes[kind])
        values = {"step": state.step, "files": files, "constants": [*constants], **state.values}
        (partial / "state" / "state.json").write_text(json.dumps(values, indent=2) + "\n")

    def write() -> None:
        for kind, held in state.held.items():
            mine = held.pieces if held.is_sharded else held.pieces[world.rank :: world.size]
            write_pieces(partial / files[kind], mine, shapes[kind])
            _sync(partial / files[kind])

    def finish() -> None:
        _write_manifest(partial, digests)
        partial.rename(target)
        _sync(target.parent)

    def digest() -> None:
        files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        mine.update({name: _digest(partial / name) for name in files[world.rank :: world.size]})

    mine: dict[str, str] = {}
    try:
        _together(world, begin, only_first=True)
        _together(world, write)
        _together(world, digest)
        digests = {name: digest for of_rank in world.gather_objects(mine) for name, digest in of_rank.items()}
        _together(world, finish, only_first=True)
    except _Failed as failed:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot save {target}: {failed}; earlier checkpoints are untouched") from failed
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
        score = scores.get(step_of(path), nan)
        return (-inf if isnan(score) else score), step_of(path)

    best, link = max(checkpoints, key=standing), run_dir / "checkpoints" / "best"
    fresh = link.with_name(".best.partial")
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(best.name)
        fresh.replace(link)
        for path in checkpoints[:-keep_last]:
            if path != best:
                doomed = path.with_name(f".{path.name}.old")
                shutil.rmtree(doomed, ignore_errors=True)
                path.rename(doomed)
    except OSError as error:
        raise UserError(f"cannot tidy {link.parent}: {error.strerror}; no checkpoint is damaged") from error
    remove_left_overs(run_dir)


def remove_left_overs(run_dir: Path) -> None:
    """Removes what nothing refers to: checkpoints that are old, or that a process was killed over.

    To be called by the process whose run it is, while none is being written.
    """
    folder = run_dir / "checkpoints"
    for path in (*folder.glob(".step-*.old"), *folder.glob(".step-*.partial")):
        shutil.rmtree(path, ignore_errors=True)  # what somebody still reads, on a network's disk, goes next time


def load_newest(run_dir: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint that rank 0 sees, for all ranks; None where a run ended before its first.

    Raises:
        UserError: on every rank: some do not see it, or as `load_checkpoint`.
    """
    checkpoints = list_checkpoints(run_dir)
    name = world.gather_objects(checkpoints[-1].name if checkpoints else None)[0]
    if name is None:
        return None
    return _load_seen_by_all(run_dir, name, world)


def load_chosen(run_dir: Path, step: Step | None, world: World) -> Checkpoint:
    """The checkpoint that `step` names for rank 0, for all ranks: others may see later which is the newest.

    Raises:
        UserError: as `find_checkpoint`; or on every rank: some do not see it, or as `load_checkpoint`.
    """
    name = world.gather_objects(find_checkpoint(run_dir, step).name)[0]
    return _load_seen_by_all(run_dir, name, world)


def _load_seen_by_all(run_dir: Path, name: str, world: World) -> Checkpoint:
    directory = run_dir / "checkpoints" / name
    end = time.monotonic() + SEEN_S
    while world.highest(not directory.is_dir()):
        if world.highest(time.monotonic() > end):
            raise UserError(
                f"{directory} is not seen by every rank: {run_dir} has to lie where all of them read and write"
            )
        time.sleep(min(1.0, SEEN_S / 10))
    return load_checkpoint(directory, world)


def load_checkpoint(directory: Path, world: World | None = None) -> Checkpoint:
    """The checkpoint in a directory, once every file in it is seen to be as it was written; ranks share that work.

    Raises:
        UserError: on every rank: a file is missing, has another size or another content than when it was written.
    """
    _verify(directory, world)
    values = json.loads((directory / "state" / "state.json").read_text())
    step, files = values.pop("step"), values.pop("files")
    constants = values.pop("constants", [])  # of earlier versions there are none
    return Checkpoint(directory=directory, step=step, files=files, constants=constants, values=values)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def parse_step(text: str | None) -> Step | None:
    """The checkpoint that a text names; None where there is none.

    Raises:
        UserError: it is no number from 1, and not "best".
    """
    if text is None:
        return None
    if text == "best":
        return "best"
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"--step takes the number of a step, or best; got {text!r}")
    return int(text)


def last_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(f"no checkpoint in {run_dir / 'checkpoints'}")
    return checkpoints[-1]


def find_checkpoint(run_dir: Path, step: Step | None) -> Path:
    """The checkpoint that `step` names, or for None the newest.

    Raises:
        UserError: there is none.
    """
    if step is None:
        return last_checkpoint(run_dir)
    if step == "best":
        best = run_dir / "checkpoints" / "best"
        if not best.exists():
            raise UserError(f"--step best: {best} points to no checkpoint")
        return best.resolve()
    steps = {step_of(path): path for path in list_checkpoints(run_dir)}
    if step not in steps:
        raise UserError(f"--step {step}: {run_dir} has checkpoints of steps {', '.join(map(str, steps)) or 'none'}")
    return steps[step]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


class _Failed(Exception):
    """What went wrong on some rank."""


def _together(world: World, action: Callable[[], None], *, only_first: bool = False) -> None:
    """Runs `action` on every rank, or on the first, and waits for all.

    Raises:
        _Failed: on every rank, where a file could not be written on any.
    """
    reason = None
    try:
        if world.is_first or not only_first:
            action()
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:
        reason = str(error)
    if reasons := [reason for reason in world.gather_objects(reason) if reason is not None]:
        raise _Failed(reasons[0])


def _write_manifest(directory: Path, digests: Mapping[str, str]) -> None:
    manifest = {name: [(directory / name).stat().st_size, digest] for name, digest in sorted(digests.items())}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name in (*manifest, "manifest.json"):
        _sync(directory / name)


def _verify(directory: Path, world: World | None) -> None:
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    damaged = None
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        for name, (num_bytes, digest) in sorted(manifest.items())[rank::size]:
            path = directory / name
            if not path.is_file() or path.stat().st_size != num_bytes or _digest(path) != digest:
                damaged = name
    except (OSError, ValueError, AttributeError):
        damaged = "manifest.json"
    of_ranks = [damaged] if world is None else world.gather_objects(damaged)
    if found := [name for name in of_ranks if name is not None]:
        raise UserError(_damaged(directory, found[0]))


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
