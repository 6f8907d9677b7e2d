"""Real runs of the embedded pipeline that collapse within a few steps: what the guard does, on resume as well."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import last_checkpoint, load_checkpoint
from dgpo_fast.config import Config
from dgpo_fast.metrics import read_evaluations, read_metrics, read_warnings

# At over thirty times the recipe's learning rate the images are noise after a few steps.
COLLAPSE = (
    "optimizer.lr=0.1", "optimizer.warmup_steps=0", "guard.window=2", "guard.noise=3", "groups.per_iteration=8",
    "optimizer.images_per_micro_batch=16", "rollout.images_per_forward=32", "evaluation.num_prompts=8",
    "rewards.terms=[{name: shapes, metric: soft}]", "checkpoints.keep_last=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def collapsing(quick: tuple[str, ...]) -> Callable[..., Config]:
    return lambda *overrides: load_recipe("tiny-dgpo", [*quick, *COLLAPSE, *overrides])


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory, collapsing: Callable[..., Config]) -> Path:
    """A run of six steps that nothing interrupted; the guard lowers its learning rate. Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("lowered") / "run"
    Trainer(collapsing("guard.action=lower_lr", "checkpoints.every=1"), out).train()
    return out


def rates(run: Path) -> list[float]:
    return [line["lr"] for line in read_metrics(run)]


def test_the_collapse_is_found(lowered: Path) -> None:
    """In training and held out, and told in warnings.jsonl and on the report's first page."""
    warnings = read_warnings(lowered)
    names = [line["name"] for line in warnings]
    assert {"reward", "below_base"} <= set(names)
    found = warnings[names.index("reward")]
    assert 3 <= found["step"] <= 5 and found["since"] <= found["step"]
    assert found["advice"][0] == "optimizer.lr=0.0333 (now 0.1)"
    rewards = [line["reward_mean"] for line in read_metrics(lowered)]
    assert rewards[0] > 0.6 and min(rewards) < 0.2
    page = (lowered / "report.html").read_text()
    assert "This run may have degenerated" in page and found["what"] in page
    assert 'class="mark"' in page


def test_the_learning_rate_is_halved_from_the_next_step_on(lowered: Path) -> None:
    """Once for each step at which something of the steps was found."""
    found = {line["step"] for line in read_warnings(lowered) if line["action"] == "lower_lr"}
    factor, expected = 1.0, []
    for step in range(1, 7):
        expected.append(0.1 * factor)
        factor /= 2 if step in found else 1
    assert rates(lowered) == pytest.approx(expected, rel=1e-12) and factor < 1


@pytest.mark.parametrize("later", [0, 1], ids=["from before it was lowered", "from after"])
def test_a_resumed_run_lowers_it_alike(
    later: int, lowered: Path, tmp_path: Path, assert_ends_alike: Callable[[Path, Path], None]
) -> None:
    """To the bit, from a checkpoint right before the first finding, and from one behind it."""
    first = min(line["step"] for line in read_warnings(lowered) if line["action"] == "lower_lr")
    run = shutil.copytree(lowered, tmp_path / "run", symlinks=True)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > first - 1 + later:
            shutil.rmtree(checkpoint)
    factor = load_checkpoint(last_checkpoint(run)).values["guard"]["lr_factor"]
    assert factor == (1.0 if later == 0 else 0.5)
    Trainer(load_recipe(run / "config.yaml"), run, resume=True).train()
    assert_ends_alike(run, lowered)
    assert (
        rates(run) == rates(lowered)
        and (run / "warnings.jsonl").read_text() == (lowered / "warnings.jsonl").read_text()
    )


def stopped(config: Config, out: Path, *, resume: bool = False) -> Any:
    with pytest.raises(SystemExit) as exit_info:
        Trainer(config, out, resume=resume).train()
    return exit_info.value.code


def test_stop_saves_and_holds_until_told_otherwise(
    collapsing: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line says why, and how to go on; what was found is not told twice."""
    config = collapsing("guard.action=stop", "evaluation.every=0", "checkpoints.every=99")
    assert stopped(config, tmp_path) == 1
    (found,) = read_warnings(tmp_path)
    step = found["step"]
    assert found["name"] == "reward" and found["action"] == "stop" and 3 <= step < 6
    assert load_checkpoint(last_checkpoint(tmp_path)).step == step == len(read_metrics(tmp_path))
    *_, told, last = capsys.readouterr().err.splitlines()
    assert told.startswith(f"guard, step {step}: the reward fell to ")
    assert last == (
        f"stopped after step {step} of 6, saved; the guard found: reward; --resume --set guard.action=warn goes on "
        "from here"
    )
    assert stopped(config, tmp_path, resume=True) == 1
    assert len(read_metrics(tmp_path)) == step and "guard, step" not in capsys.readouterr().err
    Trainer(collapsing("guard.action=warn", f"steps={step + 1}", "evaluation.every=0"), tmp_path, resume=True).train()
    assert len(read_metrics(tmp_path)) == step + 1


def test_a_finished_run_is_not_stopped(
    collapsing: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is found in its last step is told; with more steps to make, it stops there."""
    settings = ("guard.action=stop", "evaluation.every=0", "checkpoints.every=99")
    assert stopped(collapsing(*settings), tmp_path / "long") == 1
    step = read_warnings(tmp_path / "long")[0]["step"]
    capsys.readouterr()
    run = tmp_path / "run"
    Trainer(collapsing(*settings, f"steps={step}"), run).train()
    assert {line["step"] for line in read_warnings(run)} == {step} and len(read_metrics(run)) == step
    said = capsys.readouterr().err
    assert f"guard, step {step}: the reward fell to " in said and "stopped after" not in said
    Trainer(collapsing(*settings, f"steps={step}"), run, resume=True).train()
    assert stopped(collapsing(*settings, "steps=6"), run, resume=True) == 1
    assert len(read_metrics(run)) == step


def test_two_ranks_stop_together(quick: tuple[str, ...], child_environment: dict[str, str], tmp_path: Path) -> None:
    """After the same step, with one checkpoint of both and one line of what was found."""
    settings = [*quick, *COLLAPSE, "guard.action=stop", "evaluation.every=0", "checkpoints.every=99"]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "dgpo_fast", "train", "tiny-dgpo", "--out", tmp_path, *(f"--set={item}" for item in settings)],
        env={**child_environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    (found,) = read_warnings(tmp_path)
    assert run.stderr.count(f"guard, step {found['step']}: the reward fell to ") == 1
    assert run.stderr.count(f"stopped after step {found['step']} of 6, saved; the guard found: reward; ") == 1
    assert load_checkpoint(last_checkpoint(tmp_path)).step == found["step"] == len(read_metrics(tmp_path))


def test_an_evaluation_that_was_found_wanting_is_not_told_twice(lowered: Path, tmp_path: Path) -> None:
    """The checkpoint of its step does not know of it: the resumed run judges it again, and finds the line there."""
    (held_out,) = [line for line in read_warnings(lowered) if line["name"] == "below_base"]
    assert held_out["step"] in [line["step"] for line in read_evaluations(lowered)]
    run = shutil.copytree(lowered, tmp_path / "run", symlinks=True)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > held_out["step"]:
            shutil.rmtree(checkpoint)
    state = load_checkpoint(last_checkpoint(run)).values["guard"]
    assert state["evaluated_step"] < held_out["step"]
    before = (run / "warnings.jsonl").read_text()
    Trainer(load_recipe(run / "config.yaml"), run, resume=True).train()
    assert (run / "warnings.jsonl").read_text() == before
