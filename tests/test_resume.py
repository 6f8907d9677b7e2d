"""Runs that were killed or stopped end, to the bit, where the uninterrupted run of the same recipe ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import list_checkpoints
from dgpo_fast.checkpoint import load_checkpoint as load
from dgpo_fast.config import Config, change_config, dump_config
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_evaluations, read_metrics
from dgpo_fast.models.sources import EMBEDDED
from dgpo_fast.ops import describe_serving
from dgpo_fast.prompts import load_prompts
from dgpo_fast.run_directory import begun_with

STATE = {"policy", "old", "ema", "exp_avg", "exp_avg_sq"}
CLOCK_AND_MEMORY = {"wall_s", "rollout_s", "reward_s", "train_s", "images_per_s", "peak_memory_gb"}

# The reward's calls in order, two for an evaluation and two for a step, the first while others are sampled: 1-2
# evaluation of the base, 3-8 steps 1-3, 9-10 evaluation of step 3, 11-16 steps 4-6, 17-18 evaluation of step 6.
IN_BASE_EVALUATION, IN_FIRST_STEP, IN_SECOND_STEP, IN_EVALUATION, IN_FIFTH_STEP = 1, 3, 5, 9, 13


@pytest.fixture(scope="module")
def config(quick: tuple[str, ...]) -> Config:
    return load_recipe("tiny-dgpo", quick)


def numbers(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock and on the process."""
    return [{key: line[key] for key in line.keys() - CLOCK_AND_MEMORY} for line in read_metrics(run)]


def assert_same_state(run: Path, straight: Path) -> None:
    """What both last saved, to the bit."""
    mine, other = load(list_checkpoints(run)[-1]), load(list_checkpoints(straight)[-1])
    assert mine.step == other.step == 6
    assert mine.files.keys() == other.files.keys() == STATE
    assert mine.values["adam_steps"] == other.values["adam_steps"] == 6
    for kind in STATE:
        ours, theirs = mine.tensors(kind), other.tensors(kind)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def assert_ends_alike(run: Path, straight: Path) -> None:
    """Weights, averages, Adam's moments, metrics and evaluations, all to the bit."""
    assert_same_state(run, straight)
    assert (run / "checkpoints" / "best").readlink() == (straight / "checkpoints" / "best").readlink()
    assert numbers(run) == numbers(straight)
    assert read_evaluations(run) == read_evaluations(straight)


def stopped_run(config: Config, out: Path, *, in_call: int, by: str, resume: bool = False) -> int | str | None:
    """The exit status of a run that receives the signal `by` during call number `in_call` of its reward."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setenv("MISBEHAVE", f"{in_call}:{by}")
        Trainer(config, out, resume=resume).train()
    return exit_info.value.code


@pytest.fixture(scope="module")
def killed_run(
    tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], child_environment: dict[str, str]
) -> Path:
    """A run that SIGKILL ended in its fifth step, two steps after its only checkpoint."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process = subprocess.run(
        [sys.executable, "-m", "dgpo_fast", "train", "tiny-dgpo", "--out", out, *(f"--set={item}" for item in quick)],
        env={**child_environment, "MISBEHAVE": f"{IN_FIFTH_STEP}:SIGKILL"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    serving, engine, ratio, samples, *others = process.stderr.splitlines()
    assert (serving, engine) == (describe_serving("cpu"), "engine fused, attention cpu")
    assert ratio.startswith("the likelihood ratio ") and samples.startswith("samples are drawn with ")
    said = ("step ", "rewards.terms: which of the metrics ")
    assert [line for line in others if not line.startswith(said)] == [], "libraries are silent"
    return out


def test_a_killed_run_goes_on_from_its_last_checkpoint(killed_run: Path, straight_run: Path, config: Config) -> None:
    assert [path.name for path in list_checkpoints(killed_run)] == ["step-000003"]
    assert [line["step"] for line in read_metrics(killed_run)] == [1, 2, 3, 4]
    Trainer(config, killed_run, resume=True).train()
    assert_ends_alike(killed_run, straight_run)


def test_the_best_before_a_stop_stays_the_best(straight_run: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    out = shutil.copytree(straight_run, tmp_path / "run", symlinks=True)
    lines = read_evaluations(out)
    (of_third,) = [line for line in lines if line["step"] == 3]
    of_third["tuned"] = dict.fromkeys(of_third["tuned"], 9.0)
    (out / "evaluations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    Trainer(load_recipe("tiny-dgpo", [*quick, "steps=9", "checkpoints.keep_last=1"]), out, resume=True).train()
    assert (out / "checkpoints" / "best").resolve().name == "step-000003"
    assert [path.name for path in list_checkpoints(out)] == ["step-000003", "step-000009"]


@pytest.mark.parametrize(
    ("by", "status", "in_call", "saved"),
    [
        ("SIGTERM", 143, IN_FIFTH_STEP, ["step-000003", "step-000004"]),
        ("SIGTERM-slowly", 143, IN_FIFTH_STEP, ["step-000003", "step-000004"]),
        ("SIGTERM-slowly", 143, IN_EVALUATION, ["step-000003"]),
        ("SIGTERM", 143, IN_EVALUATION, ["step-000003"]),
        ("SIGINT", 130, IN_BASE_EVALUATION, ["step-000000"]),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(
    by: str, status: int, in_call: int, saved: list[str], tmp_path: Path, straight_run: Path, config: Config
) -> None:
    assert stopped_run(config, tmp_path, in_call=in_call, by=by) == status
    assert [path.name for path in list_checkpoints(tmp_path)] == saved
    assert (tmp_path / "report.html").is_file()
    Trainer(config, tmp_path, resume=True).train()
    assert_ends_alike(tmp_path, straight_run)


def test_a_run_stopped_twice_before_its_first_step(tmp_path: Path, straight_run: Path, config: Config) -> None:
    """First in the evaluation of the base, then in step 1: what was measured in between is still the base."""
    assert stopped_run(config, tmp_path, in_call=IN_BASE_EVALUATION, by="SIGINT") == 130
    assert read_evaluations(tmp_path) == []
    assert stopped_run(config, tmp_path, in_call=IN_FIRST_STEP, by="SIGINT", resume=True) == 130
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000"]
    Trainer(config, tmp_path, resume=True).train()
    assert_ends_alike(tmp_path, straight_run)


@pytest.mark.parametrize(
    ("in_call", "saves", "saved"),
    [
        pytest.param(IN_SECOND_STEP, True, ["step-000001"], id="from what was saved as it failed"),
        pytest.param(IN_SECOND_STEP, False, [], id="which could not be saved: from its beginning"),
        pytest.param(IN_EVALUATION, True, ["step-000003"], id="in an evaluation: it is made up for"),
    ],
)
def test_a_run_that_failed_goes_on(
    in_call: int, saves: bool, saved: list[str], tmp_path: Path, straight_run: Path, quick: tuple[str, ...]
) -> None:
    """Its curves too are those of one run: what TensorBoard had beyond the checkpoint is shown no more."""
    config = load_recipe("tiny-dgpo", [*quick, "logging.tensorboard=true"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError):
        patch.setenv("MISBEHAVE", f"{in_call}-99:raise")
        if not saves:
            patch.setattr(Trainer, "_save_what_was_learnt", lambda trainer, run: None)
        Trainer(config, tmp_path).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == saved
    Trainer(config, tmp_path, resume=True).train()
    assert_ends_alike(tmp_path, straight_run)
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in curves.Scalars("reward/reward_mean")] == [1, 2, 3, 4, 5, 6]


def test_what_may_change_on_resume_changes_nothing_else(tmp_path: Path, straight_run: Path, config: Config) -> None:
    """Stopped in an evaluation, then on with other intervals: the weights are those of six steps straight."""
    assert stopped_run(config.model_copy(update={"steps": 9}), tmp_path, in_call=IN_EVALUATION, by="SIGTERM") == 143
    elsewhere = (
        "rewards.running.shapes.images_per_call=4",
        "rewards.retries=3",
        "rewards.timeout_s=60",
        "rewards.max_failed_share=0.5",
    )
    changes = ("steps=6", "evaluation.every=2", "checkpoints.every=5", "checkpoints.keep_last=9", *elsewhere)
    second = load_recipe(tmp_path / "config.yaml", [*changes, "logging.samples_every=5"])
    Trainer(second, tmp_path, resume=True).train()
    assert_same_state(tmp_path, straight_run)
    assert numbers(tmp_path) == numbers(straight_run)
    assert [line["step"] for line in read_evaluations(tmp_path)] == [0, 4, 6]
    saved = [path.name for path in list_checkpoints(tmp_path)]
    assert saved == [f"step-{step:06d}" for step in (3, 4, 5, 6)], "what is evaluated is saved, or it could not be best"
    samples = sorted(path.stem for path in (tmp_path / "samples").iterdir())
    assert samples == ["step-000000", "step-000005", "step-000006"]
    assert load_recipe(tmp_path / "config.yaml") == second


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, straight_run: Path, config: Config) -> None:
    out = shutil.copytree(straight_run, tmp_path / "run", symlinks=True)
    Trainer(config, out, resume=True).train()
    assert_ends_alike(out, straight_run)


@pytest.mark.parametrize(
    "change",
    ["steps=7", "evaluation.every=1", "checkpoints.every=1", "checkpoints.keep_last=5", "logging.samples_every=2",
     "logging.num_samples=1", "logging.tensorboard=false", "parallel.backend=gloo",
     "parallel.zero_stage=1", "optimizer.max_skipped=9", "guard.action=stop", "guard.window=5",
     "model.checkpointing=full", "rollout.images_per_forward=8", "rollout.images_per_decode=2",
     "optimizer.images_per_micro_batch=8", "name=other", "description=other", "prompts.train=shapes:test"],
)  # fmt: skip
def test_resume_allows(change: str, straight_run: Path, quick: tuple[str, ...]) -> None:
    begun_with(straight_run, load_recipe("tiny-dgpo", [*quick, change]))


@pytest.mark.parametrize(
    "change",
    ["device=auto", "seed=1",
     "model.name=random:sd35-medium", "model.dtype=bfloat16", "model.resolution=32", "model.text_length=8",
     "adapter.rank=8", "adapter.alpha=4", "adapter.init=kaiming", "adapter.targets=[attn.to_q]",
     "rollout.solver=euler", "rollout.guidance=2", "rollout.switch_step=1",
     "groups.size=8", "groups.per_iteration=4", "advantages.std=global", "algorithm.beta=1", "algorithm.clip=null",
     "old_policy.rate=0.5", "evaluation_ema.every=1", "optimizer.lr=1.0", "optimizer.warmup_steps=0",
     "rewards.terms=[{name: shapes}]", "rewards.min_group_size=3",
     "evaluation.steps=4", "evaluation.num_prompts=1",
     "evaluation.images_per_prompt=2"],
)  # fmt: skip
def test_resume_refuses_and_names_the_key(change: str, straight_run: Path, quick: tuple[str, ...]) -> None:
    key = change.partition("=")[0]
    with pytest.raises(UserError, match=rf"--resume cannot change {key}: .* -> ") as error:
        begun_with(straight_run, load_recipe("tiny-dgpo", [*quick, change]))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"dgpo-fast train {straight_run / 'config.yaml'} --out {straight_run} --resume")


COMMIT, PUSHED = 40 * "1", 40 * "2"


def test_a_run_goes_on_with_the_commit_that_it_began_with(
    tmp_path: Path, quick: tuple[str, ...], child_environment: dict[str, str]
) -> None:
    """Of a branch of the hub to which another was pushed meanwhile; and so is it evaluated."""
    repository, out = tmp_path / "hub" / "models--some--model", tmp_path / "run"
    shutil.copytree(EMBEDDED, repository / "snapshots" / COMMIT)
    (repository / "snapshots" / PUSHED).mkdir()  # it holds nothing that could be loaded
    shutil.copy(EMBEDDED / "model_index.json", repository / "snapshots" / PUSHED)
    (repository / "refs").mkdir()
    main = repository / "refs" / "main"
    named = [f"--set={key}" for key in (*quick, "model.name=some/model", "model.revision=main")]

    def dgpo_fast(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "dgpo_fast", *arguments], check=True, capture_output=True,
            env={**child_environment, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    main.write_text(COMMIT)
    dgpo_fast("train", "tiny-dgpo", *named, "--steps=3", f"--out={out}")
    main.write_text(PUSHED)
    dgpo_fast("train", "tiny-dgpo", *named, "--steps=4", f"--out={out}", "--resume")
    assert load_recipe(out / "config.yaml").model.commit == COMMIT
    dgpo_fast("eval", str(out), "--json")


def test_a_run_does_not_go_on_with_another_commit(straight_run: Path, tmp_path: Path) -> None:
    config = load_recipe(straight_run / "config.yaml")
    (tmp_path / "config.yaml").write_text(dump_config(config.at_commit(COMMIT)))
    assert begun_with(tmp_path, config) == COMMIT
    with pytest.raises(UserError, match=f"--resume cannot change model.commit: '{COMMIT}' -> '{PUSHED}'"):
        begun_with(tmp_path, config.at_commit(PUSHED))
    other = change_config(config, {"model": {"revision": "experimental"}}, source="test")
    with pytest.raises(UserError, match=r"--resume cannot change model\.revision: None -> 'experimental'"):
        begun_with(tmp_path, other)


def test_ranks_with_different_commits_are_told(config: Config) -> None:
    class Ranks:
        def gather_objects(self, mine: str | None) -> list[str]:
            return [COMMIT, PUSHED]

    with pytest.raises(UserError, match=f"ranks have different commits of embedded, {COMMIT}, {PUSHED}: name one"):
        Trainer._commit(SimpleNamespace(world=Ranks()), config)  # type: ignore[arg-type]


def test_what_decides_nothing_may_change(tmp_path: Path) -> None:
    """Runs of earlier versions have it in their configuration."""
    saved = load_recipe("tiny-awm", ["rollout.switch_step=1000000"])
    (tmp_path / "config.yaml").write_text(dump_config(saved))
    begun_with(tmp_path, load_recipe("tiny-awm"))


def test_a_checkpoint_of_an_earlier_version_is_read(straight_run: Path, tmp_path: Path) -> None:
    """It names no constants."""
    now = straight_run / "checkpoints" / "step-000003"
    directory = shutil.copytree(now, tmp_path / now.name)
    state, manifest = directory / "state" / "state.json", directory / "manifest.json"
    values, files = json.loads(state.read_text()), json.loads(manifest.read_text())
    del values["constants"]
    state.write_text(json.dumps(values))
    files["state/state.json"] = [state.stat().st_size, hashlib.sha256(state.read_bytes()).hexdigest()]
    manifest.write_text(json.dumps(files))
    assert load(directory).tensors("ema").keys() == load(now).tensors("ema").keys()


def test_a_run_is_its_own_recipe(straight_run: Path) -> None:
    """As the refusal says."""
    begun_with(straight_run, load_recipe(straight_run / "config.yaml"))


def test_resume_names_every_key_at_once(straight_run: Path, quick: tuple[str, ...]) -> None:
    changes = ["seed=1", "optimizer.lr=1.0", "steps=7"]
    with pytest.raises(UserError, match=r"optimizer\.lr: .*; seed: 0 -> 1") as error:
        begun_with(straight_run, load_recipe("tiny-dgpo", [*quick, *changes]))
    assert "steps" not in str(error.value)


def test_resume_needs_a_run(tmp_path: Path, config: Config) -> None:
    with pytest.raises(UserError, match=r"nothing to resume in .*: it has no config\.yaml"):
        Trainer(config, tmp_path, resume=True)
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_begun_anew_asks_the_base_again(tmp_path: Path, straight_run: Path, config: Config) -> None:
    """One that failed before its first step may have been of another recipe."""
    shutil.copy(straight_run / "evaluations.jsonl", tmp_path)
    trainer = Trainer(config, tmp_path)
    assert trainer.base_metrics is None and trainer.scores == {}


def test_the_base_stays_the_base_where_its_evaluation_is_lost(
    tmp_path: Path, straight_run: Path, config: Config
) -> None:
    out = shutil.copytree(straight_run, tmp_path / "run", symlinks=True)
    base = read_evaluations(out)[0]["base"]
    (out / "evaluations.jsonl").unlink()
    trainer = Trainer(config, out, resume=True)
    assert trainer.base_metrics == base
    trainer.base_metrics = None  # as of a checkpoint of an earlier version
    trainer.train()
    (line,) = read_evaluations(out)
    assert line["step"] == 6 and line["base"] == base
    assert line["tuned"] == read_evaluations(straight_run)[-1]["tuned"] != base


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_run_goes_on_with_the_prompts_that_it_began_with(
    split: str, straight_run: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of them may have been edited since: base and tuned would be compared by different prompts."""

    def edited(source: str, *, key: str) -> list[str]:
        prompts = load_prompts(source, key=key)
        return prompts[::-1] if key == f"prompts.{split}" else prompts

    monkeypatch.setattr("dgpo_fast.trainer.load_prompts", edited)
    monkeypatch.setattr("dgpo_fast.trainer.Learner", None)  # said before a model is loaded, which may take minutes
    with pytest.raises(UserError, match=rf"^prompts\.{split}: these are other prompts than those that the run began"):
        Trainer(config, straight_run, resume=True)


def test_a_run_in_bfloat16_goes_on_to_the_bit(tmp_path: Path, quick: tuple[str, ...]) -> None:
    """There the model computes with copies of what a checkpoint holds, which have to be made anew: those of the policy,
    and of the old policy, which here draws the samples."""
    changes = ("model.dtype=bfloat16", "model.resolution=24", "rollout.switch_step=2", "evaluation.every=0")
    bfloat16 = load_recipe("tiny-dgpo", [*quick, *changes])
    Trainer(bfloat16, tmp_path / "straight").train()
    out = shutil.copytree(tmp_path / "straight", tmp_path / "run", symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    Trainer(bfloat16, out, resume=True).train()
    assert_same_state(out, tmp_path / "straight")


def test_a_run_goes_on_counting(tmp_path: Path, config: Config) -> None:
    """Steps that were left out, also those in a row, after which it ends; seconds, and those of every stage."""
    trainer = Trainer(config, tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    trainer.step, trainer.wall_s = 3, 5.5
    trainer.learner.skipped, trainer.learner.skipped_in_a_row = 4, 2
    trainer._save_checkpoint()
    again = Trainer(config, tmp_path, resume=True)
    assert (again.step, again.wall_s) == (3, 5.5)
    assert (again.learner.skipped, again.learner.skipped_in_a_row) == (4, 2)
    before, after = trainer.clock.by_name(), again.clock.by_name()
    assert before["loading"] < after["loading"] and before.keys() - after.keys() <= {"checkpoint"}
