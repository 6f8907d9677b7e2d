"""Several optimizer steps in an iteration: what is logged, saved and resumed, on a short run of Flow-GRPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import list_checkpoints
from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_evaluations, read_metrics

IN_SECOND_ITERATION = 5
"""The reward's call, of two for an evaluation and two for an iteration."""


@pytest.fixture(scope="module")
def config(quick: tuple[str, ...]) -> Config:
    """Six steps in three iterations of two groups, which are two steps each."""
    common = [override for override in quick if not override.startswith(("algorithm.", "model.sampling"))]
    return load_recipe(
        "tiny-flow-grpo",
        [*common, "algorithm.trained_steps=2", "optimizer.steps_per_iteration=2", "model.resolution=24",
         "evaluation.every=0", "checkpoints.every=2"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    out = tmp_path_factory.mktemp("runs") / "flow-grpo"
    Trainer(config, out).train()
    return out


def test_each_optimizer_step_has_a_line_of_its_own(straight: Path) -> None:
    lines = read_metrics(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert [line["images_seen"] for line in lines] == [4, 8, 12, 16, 20, 24]
    for line in lines:
        assert line["dgpo_loss"] is line["surrogate_loss"] is line["group_weight_mean"] is None
        assert math.isfinite(line["policy_loss"]) and math.isfinite(line["loss"]) and line["grad_norm"] > 0
    walls = [0.0, *(line["wall_s"] for line in lines)]
    assert walls == sorted(set(walls))
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        assert first["reward_mean"] == second["reward_mean"] and first["policy_loss"] != second["policy_loss"]
        assert second["wall_s"] - first["wall_s"] == pytest.approx(first["wall_s"] - walls[first["step"] - 1])
        assert first["rollout_s"] + first["reward_s"] + first["train_s"] <= second["wall_s"] - first["wall_s"] + 1e-6
    assert (lines[0]["kl"], lines[0]["clip_fraction"]) == (0, 0), "the first step begins at the reference"
    assert lines[1]["kl"] > 0, "the second is made after it, from the same rollout"


def test_checkpoints_and_evaluations_come_between_iterations(straight: Path) -> None:
    assert [path.name for path in list_checkpoints(straight)] == ["step-000004", "step-000006"]
    assert [line["step"] for line in read_evaluations(straight)] == [0, 6]


def test_a_stopped_run_ends_where_the_straight_one_does(
    straight: Path, config: Config, tmp_path: Path, assert_ends_alike: Callable[[Path, Path], None]
) -> None:
    """It is stopped while the second iteration is sampled, and goes on from its beginning, to the bit."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setenv("MISBEHAVE", f"{IN_SECOND_ITERATION}:SIGTERM")
        Trainer(config, tmp_path).train()
    assert stopped.value.code == 143
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    Trainer(config, tmp_path, resume=True).train()
    assert_ends_alike(tmp_path, straight)


def test_what_is_due_at_steps_inside_an_iteration_comes_behind_it(config: Config, tmp_path: Path) -> None:
    """Every third step, in iterations of two: behind steps 4 and 6."""
    changed = config.model_copy(
        update={
            "checkpoints": config.checkpoints.model_copy(update={"every": 3, "keep_last": 9}), "steps": 12,
        }
    )  # fmt: skip
    trainer, saved = Trainer(changed, tmp_path), list[int]()
    trainer._save_checkpoint = lambda: saved.append(trainer.step)  # type: ignore[method-assign]
    trainer._evaluate = trainer._save_samples = lambda run: None  # type: ignore[method-assign]
    for step in range(0, 13, 2):
        trainer.step = step
        trainer._look_up_from_work(None)  # type: ignore[arg-type]
    assert saved == [4, 6, 10, 12]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.steps_per_iteration=3"], "steps_per_iteration must divide groups.per_iteration, 16, got 3"),
        (["steps=7"], "steps must be a multiple of optimizer.steps_per_iteration, 2, got 7"),
        (["optimizer.images_per_micro_batch=128"], "must divide the 64 images of an optimizer step"),
    ],
)  # fmt: skip
def test_steps_that_do_not_divide_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("tiny-flow-grpo", overrides)
