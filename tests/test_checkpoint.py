"""Checkpoints are whole or absent, verified when read, and rotated without losing the best."""

from __future__ import annotations

import errno
import json
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Timer
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

from dgpo_fast import checkpoint
from dgpo_fast.checkpoint import (
    Checkpoint,
    State,
    last_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    remove_left_overs,
    rotate,
    save_checkpoint,
)
from dgpo_fast.errors import UserError
from dgpo_fast.parallel.weights import Held, Piece, cut
from dgpo_fast.parallel.world import World

FILES = ("lora/weights.bin", "state/policy.safetensors", "state/ema.safetensors", "state/state.json", "manifest.json")
SHAPES = {"first": torch.Size([30, 20]), "second": torch.Size([400])}
NUM_VALUES = sum(shape.numel() for shape in SHAPES.values())
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
SCORES: dict[Path, dict[int, float]] = defaultdict(dict)
"""By run directory and step."""

FilesUpTo = Callable[[int], AbstractContextManager[None]]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test may run after it, so none catches it."""


def state(step: int) -> State:
    """A state of which no value is special: random float32, nested values."""
    generator = torch.Generator().manual_seed(step)
    flats = {kind: torch.randn(NUM_VALUES, generator=generator) for kind in ("policy", "ema")}
    held = {kind: Held(cut(flat, 0, SHAPES), is_sharded=False) for kind, flat in flats.items()}
    return State(step=step, shapes=SHAPES, held=held, values={"wall_s": 0.1 * step, "base_metrics": {"strict": 0.5}})


def same_tensors(loaded: Checkpoint, saved: State) -> bool:
    return all(
        torch.equal(loaded.tensors(kind)[piece.name].flatten(), piece.values)
        for kind, held in saved.held.items()
        for piece in held.pieces
    )


def save_weights(directory: Path) -> None:
    (directory / "lora").mkdir()
    (directory / "lora" / "weights.bin").write_bytes(bytes(range(256)))


def save(run_dir: Path, step: int, score: float | None = None, *, keep_last: int = 2) -> Path:
    """Saves, scores and rotates, as a run does that evaluates at each checkpoint."""
    directory = save_checkpoint(run_dir, state(step), ALONE, save_weights=save_weights)
    if score is not None:
        SCORES[run_dir][step] = score
    rotate(run_dir, SCORES[run_dir], keep_last=keep_last)
    return directory


def names(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir)]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file in `directory`, by its path there."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    saved, loaded = state(7), load_checkpoint(save(tmp_path, 7, 0.25))
    assert loaded.step == 7
    assert loaded.values == saved.values
    assert loaded.files.keys() == saved.held.keys()
    for kind in loaded.files:
        tensors = loaded.tensors(kind)
        assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert same_tensors(loaded, saved)


def test_pieces_come_back_as_other_pieces(tmp_path: Path) -> None:
    """Three ranks read what one wrote: each the run of elements that it holds, across parameters."""
    loaded, flat = load_checkpoint(save(tmp_path, 7)), torch.full((NUM_VALUES,), math.nan)
    for first, stop in ((0, 1), (1, 700), (700, NUM_VALUES)):
        loaded.read("policy", cut(flat[first:stop], first, SHAPES), SHAPES)
    assert torch.equal(flat, torch.cat([piece.values for piece in state(7).held["policy"].pieces]))


@pytest.mark.parametrize(
    ("shapes", "first"),
    [
        (SHAPES | {"second": torch.Size([399])}, "second"),
        (SHAPES | {"first": torch.Size([20, 30])}, "first"),
        (SHAPES | {"third": torch.Size([1])}, "third"),
        ({"first": SHAPES["first"]}, "second"),
    ],
)
def test_other_parameters_are_refused(shapes: dict[str, torch.Size], first: str, tmp_path: Path) -> None:
    loaded, values = load_checkpoint(save(tmp_path, 7)), torch.zeros(10)
    with pytest.raises(UserError, match=rf"step-000007 does not fit: its policy and the run's differ in '{first}'; "):
        loaded.read("policy", [Piece("first", 0, values)], shapes)
    assert not values.any()


def test_saving_a_step_again_keeps_what_is_there(tmp_path: Path) -> None:
    before = contents(save(tmp_path, 3, 0.5))
    assert contents(save(tmp_path, 3)) == before


def test_steps_beyond_six_digits_stay_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert last_checkpoint(tmp_path).name == "step-1000000"


def test_without_a_checkpoint(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints"):
        last_checkpoint(tmp_path)


# Whole or absent


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("moment", ["create_file", "write_pieces", "_write_manifest", "_sync", "rename"])
def test_a_process_killed_while_saving_leaves_no_half_checkpoint(
    moment: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step the resumed run saves next, nothing is left of the half."""
    before = contents(save(tmp_path, 1))

    def die(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*((Path, "rename") if moment == "rename" else (checkpoint, moment)), die)
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]
    assert contents(tmp_path / "checkpoints" / "step-000001") == before
    assert same_tensors(load_checkpoint(save(tmp_path, step)), state(step))
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["best", "step-000001", f"step-00000{step}"]


def test_a_process_killed_while_rotating_leaves_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an old checkpoint may be left, under another name; the next rotation removes the rest of it."""
    for step in (1, 2):
        save(tmp_path, step, score=step / 10, keep_last=1)

    def die(path: Path, ignore_errors: bool = False) -> None:
        if (path / "manifest.json").exists():
            (path / "manifest.json").unlink()
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint.shutil, "rmtree", die)
        save(tmp_path, 3, score=0.3, keep_last=1)
    assert names(tmp_path) == ["step-000003"]
    assert load_checkpoint(last_checkpoint(tmp_path)).step == 3
    save(tmp_path, 4, score=0.4, keep_last=1)
    assert names(tmp_path) == ["step-000004"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000004"]


def test_an_old_checkpoint_that_somebody_reads_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's file system keeps files that are open, and so their directory; it goes with the next rotation."""
    save(tmp_path, 1, score=0.1, keep_last=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors: ignore_errors or pytest.fail("raises"))
    save(tmp_path, 2, score=0.2, keep_last=1)
    assert names(tmp_path) == ["step-000002"] and (tmp_path / "checkpoints" / ".step-000001.old").is_dir()
    monkeypatch.undo()
    save(tmp_path, 3, score=0.3, keep_last=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000003"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damage_is_found_and_named(name: str, damage: str, tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    path = directory / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) - 2 if damage == "truncate" else 0])
    # A manifest with a wrong digit can still be read, and accuses the file whose digest it is.
    accused = "|".join(FILES) if name == "manifest.json" else name
    with pytest.raises(UserError, match=rf"step-000001 is damaged \(({accused})\); remove it to go on from the one"):
        load_checkpoint(directory)


def test_a_damaged_checkpoint_can_be_removed_to_go_on_from_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000002").rename(tmp_path / "elsewhere")
    assert load_checkpoint(last_checkpoint(tmp_path)).step == 1


# Rotation


def test_rotation_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step, score in enumerate([0.1, 0.9, 0.3, None, 0.2], start=1):
        save(tmp_path, step, score)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    assert best(tmp_path) == "step-000002"


def test_the_best_is_among_the_last(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, score=step / 10)
    assert names(tmp_path) == ["step-000003", "step-000004"]
    assert best(tmp_path) == "step-000004"


def test_of_equal_scores_the_later_is_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, score=0.5, keep_last=3)
    assert best(tmp_path) == "step-000003"


@pytest.mark.parametrize("score", [None, float("nan")])
def test_a_checkpoint_without_a_score_is_never_the_best(score: float | None, tmp_path: Path) -> None:
    """NaN is the mean over an evaluation in which every image failed."""
    save(tmp_path, 1, score)
    assert best(tmp_path) == "step-000001", "the only one there is"
    save(tmp_path, 2, score=0.0)
    save(tmp_path, 3, score)
    assert best(tmp_path) == "step-000002"


def test_the_score_comes_after_the_checkpoint(tmp_path: Path) -> None:
    """An evaluation takes longer than a save: a process killed between the two has lost nothing."""
    save(tmp_path, 1, score=0.5)
    directory = save(tmp_path, 2)
    assert best(tmp_path) == "step-000001"
    before = contents(directory)
    rotate(tmp_path, {1: 0.5, 2: 0.75, 3: 1.0}, keep_last=2)
    assert best(tmp_path) == "step-000002", "of step 3 there is no checkpoint"
    assert contents(directory) == before


def test_without_checkpoints_there_is_no_best(tmp_path: Path) -> None:
    rotate(tmp_path, {1: 0.5}, keep_last=2)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    note = tmp_path / "checkpoints" / "step-notes"
    note.mkdir(parents=True)
    for step in range(1, 5):
        save(tmp_path, step, keep_last=1)
    assert names(tmp_path) == ["step-000004"]
    assert note.is_dir()


def best(run_dir: Path) -> str:
    link = run_dir / "checkpoints" / "best"
    assert link.is_symlink()
    assert not link.readlink().is_absolute(), "a run directory can be moved"
    return link.resolve().name


# A full disk


def test_a_file_that_cannot_be_written_is_a_clear_error(tmp_path: Path, files_up_to: FilesUpTo) -> None:
    before = contents(save(tmp_path, 1))
    refusal = r"cannot save .*step-000002: .*; earlier checkpoints are untouched"
    with pytest.raises(UserError, match=refusal) as error, files_up_to(4 * NUM_VALUES // 2):
        save(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "checkpoints" / "step-000001") == before
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000001"]


@pytest.mark.parametrize("moment", ["save_weights", "create_file", "write_pieces", "_write_manifest", "_sync"])
def test_a_full_disk_is_a_clear_error(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fill(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"step-000002: No space left on device; "):
        if moment != "save_weights":
            patch.setattr(checkpoint, moment, fill)
        writes = fill if moment == "save_weights" else save_weights
        save_checkpoint(tmp_path, state(2), ALONE, save_weights=writes)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000001"]
    assert load_checkpoint(save(tmp_path, 2)).step == 2, "with space again, the same step is saved"


def test_weights_that_find_the_disk_full_are_a_clear_error(tmp_path: Path, files_up_to: FilesUpTo) -> None:
    """safetensors has an error of its own for it, and its files are the first that are written."""
    save(tmp_path, 1)

    def fill(directory: Path) -> None:
        save_file({"weight": torch.zeros(100_000)}, directory / "weights.safetensors")

    with pytest.raises(UserError, match=r"step-000002: .*; earlier checkpoints are untouched"), files_up_to(10_000):
        save_checkpoint(tmp_path, state(2), ALONE, save_weights=fill)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000001"]


class Second:
    """Rank 1 of two, whose rank 0 goes on from the checkpoint `first`, and finds nothing wrong with its half of it."""

    rank, size, is_first = 1, 2, False

    def __init__(self, first: str | None) -> None:
        self.words = [first, None]  # rank 0's, one after the other

    def gather_objects(self, mine: object) -> list[object]:
        return [self.words.pop(0), mine]

    def highest(self, value: float) -> float:
        return value


def test_ranks_go_on_from_the_checkpoint_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another machine lists may be older, of a network's disk, or a disk of its own."""
    monkeypatch.setattr("dgpo_fast.checkpoint.SEEN_S", 0.0)
    for step in (1, 2, 3):
        save(tmp_path, step)
    for first in ("step-000002", None):
        found = load_newest(tmp_path, cast("World", Second(first)))
        assert (found.directory.name if found else None) == first
    with pytest.raises(UserError, match=r"step-000009 is not seen by every rank: .* has to lie where all of them"):
        load_newest(tmp_path, cast("World", Second("step-000009")))


def test_a_checkpoint_that_is_seen_late_is_waited_for(tmp_path: Path) -> None:
    hidden = save(tmp_path, 1).rename(tmp_path / "elsewhere")
    timer = Timer(0.3, lambda: hidden.rename(tmp_path / "checkpoints" / "step-000001"))
    timer.start()
    found = load_newest(tmp_path, cast("World", Second("step-000001")))
    timer.join()
    assert found is not None and found.step == 1


def test_what_a_killed_process_left_over_goes(tmp_path: Path) -> None:
    kept = save(tmp_path, 1)
    for name in (".step-000002.partial", ".step-000001.old"):
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
    remove_left_overs(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best", kept.name}
    remove_left_overs(tmp_path / "new")


def test_a_file_that_cannot_be_read_back_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    save(tmp_path, 1)
    monkeypatch.setattr("dgpo_fast.checkpoint._digest", unreadable)
    with pytest.raises(UserError, match=r"cannot save .*step-000002: Input/output error; earlier checkpoints are"):
        save(tmp_path, 2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best", "step-000001"}


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest.keys() | {"manifest.json"} == contents(directory).keys()
    assert {name: size for name, (size, _) in manifest.items()} == {
        name: len(content) for name, content in contents(directory).items() if name != "manifest.json"
    }
