"""The table of users' mistakes: each is one line on stderr and exit status 2, and costs nothing that was saved."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from dgpo_fast import Trainer, checkpoint, load_recipe, run_directory
from dgpo_fast.checkpoint import list_checkpoints
from dgpo_fast.cli import main
from dgpo_fast.config import Config, refuse_used
from dgpo_fast.errors import UserError
from dgpo_fast.guard import Guard
from dgpo_fast.metrics import MetricsLog, read_evaluations, read_metrics
from dgpo_fast.models.engines import View
from dgpo_fast.models.sources import EMBEDDED
from dgpo_fast.profiling import StageClock
from dgpo_fast.records import Rollout
from dgpo_fast.rewards import Scores
from dgpo_fast.run_directory import RunDirectory

Refusal = Callable[..., str]


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str], quick: tuple[str, ...]) -> Refusal:
    """The message that a short training with these further arguments is refused with."""

    def train(*arguments: str | Path) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(["train", "tiny-dgpo", *(f"--set={item}" for item in quick), *map(str, arguments)])
        out, err = capfd.readouterr()
        assert exit_info.value.code == 2, err
        assert out == ""
        assert "Traceback" not in err
        return only_error(err)

    return train


def only_error(stderr: str) -> str:
    """The one error line, which comes last; what a run said of its progress before is no error."""
    *before, last = stderr.splitlines()
    assert last.startswith("error: "), stderr
    assert not any(line.startswith("error: ") for line in before), stderr
    return last.removeprefix("error: ")


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file in a run's checkpoints."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (run / "checkpoints").rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty prompt file, a file, and models that cannot be used."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (folder / "file").write_text("")
    (folder / "no-pipeline").mkdir()
    (folder / "flux").mkdir()
    (folder / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    for name in ("no-weights", "torn-weights", "no-encoder"):
        shutil.copytree(EMBEDDED, folder / name, copy_function=os.symlink)
    (folder / "no-weights" / weights).unlink()
    (folder / "torn-weights" / weights).unlink()
    (folder / "torn-weights" / weights).write_bytes((EMBEDDED / weights).read_bytes()[:100_000])
    shutil.rmtree(folder / "no-encoder" / "text_encoder_3")
    return folder


# Seen before anything runs

RECIPE_MISTAKES = {
    "optimizer.lrr=1": "unknown key 'optimizer.lrr'; did you mean 'lr'?",
    "optimiser.lr=1": "unknown key 'optimiser'; did you mean 'optimizer'?",
    "rewards.terms=[{name: shapes, wieght: 2}]": "did you mean 'weight'?",
    "steps=many": "steps: input should be a valid integer, got 'many'",
    "steps=1.5": "steps: input should be a valid integer, got 1.5",
    "steps=true": "steps: input should be a valid integer, got True",
    "steps=0": "steps: input should be greater than or equal to 1, got 0",
    "rollout.solver=dpm": "rollout.solver: input should be 'euler', 'dpm++2m'",
    "optimizer.lr=-1.0": "optimizer.lr: input should be greater than 0, got -1.0",
    "optimizer=fast": "optimizer: ",
    "rewards.terms=[]": "rewards.terms: ",
    "groups.size=1": "groups.size: input should be greater than or equal to 2, got 1",
    "optimizer.images_per_micro_batch=3": "optimizer.images_per_micro_batch must divide the 8 images of an iteration "
    "(groups.size x groups.per_iteration), got 3; nearest that does: 2",
    "algorithm.trunc=3": "algorithm.trunc must be below rollout.steps (3), got 3",
    "algorithm.train_timesteps=4": "algorithm.train_timesteps must be at most algorithm.trunc + 1 = 3, got 4",
    "rewards.on_failure=skip": "unknown key 'rewards.on_failure', of an earlier version: rewards.max_failed_share=0",
    "rewards.terms=[{nam: shapes}]": "unknown key 'rewards.terms.0.nam'; did you mean 'name'?",
    "rewards.terms=[{name: shapes}, {name: shapes, weight: 2.0}]": "rewards.terms: 'shapes' is there twice; expected",
    "rewards.max_failed_share=1.5": "rewards.max_failed_share: input should be less than or equal to 1, got 1.5",
    "rewards.min_group_size=5": "rewards.min_group_size must be at most groups.size, 4, got 5",
    "rewards.running.shape.processes=2": "no term has the reward 'shape'; did you mean 'shapes'?",
    "rewards.running.shapes.proceses=2": "unknown key 'rewards.running.shapes.proceses'; did you mean 'processes'?",
    "rewards.running.shapes.device=gpu": "rewards.running.shapes.device: string should match pattern",
    "rewards.running.shapes.url=localhost:8000": "rewards.running: expected a url such as http://host:8000, got "
    "'localhost:8000'",
    "rewards.running.shapes.url=http://:pw@a:1": "rewards.running: expected a url such as http://host:8000, got ",
    "rewards.running.shapes={url: 'http://a:1', processes: 2}": "processes 2 is the server's own matter",
    "rewards.running.shapes={url: 'http://a:1', device: cpu}": "rewards.running: device cpu is the server's own matter",
    "steps": "--set takes key=value",
    "steps.many=3": "'steps' is a value, not a section",
}

SETTING_MISTAKES = {
    "model.name=embeded": "no model 'embeded'; did you mean 'embedded'?",
    "model.name=PLACES/nowhere": "no model 'PLACES/nowhere'",
    "model.name=random:sd35-huge": "no model 'random:sd35-huge'",
    "model.name=PLACES/file": "is a file; expected a directory in diffusers' format",
    "model.name=PLACES/no-pipeline": "is no diffusers pipeline: it has no model_index.json",
    "model.name=PLACES/flux": "is a FluxPipeline, expected a StableDiffusion3Pipeline",
    "model.name=PLACES/no-weights": "model 'PLACES/no-weights' cannot be loaded: ",
    "model.name=PLACES/torn-weights": "model 'PLACES/torn-weights' cannot be loaded: ",
    "model.name=PLACES/no-encoder": "model 'PLACES/no-encoder' cannot be loaded: ",
    "model.resolution=2048": "model.resolution: expected a multiple of ",
    "adapter.targets=[attn.to_qq]": "adapter.targets: ",
    "prompts.train=PLACES/empty.txt": "prompts.train: 'PLACES/empty.txt' holds no prompt",
    "prompts.test=PLACES/empty.txt": "prompts.test: 'PLACES/empty.txt' holds no prompt",
    "prompts.train=PLACES/nowhere.txt": "prompts.train: no file 'PLACES/nowhere.txt'",
    "prompts.train=PLACES/latin.txt": "prompts.train: cannot read 'PLACES/latin.txt'",
    "prompts.train=PLACES": "prompts.train: cannot read 'PLACES'",
    "prompts.test=null": "prompts.test: no prompts given",
    "rewards.terms=[{name: shape}]": "no reward 'shape'; did you mean 'shapes'?",
    "prompts.train=PLACES/bad.jsonl": "'PLACES/bad.jsonl', line 2: no key 'prompt'; did you mean 'promt'?",
    "rewards={terms: [{name: hpsv2}], hpsv2: {path: PLACES}}": "rewards.hpsv2.path: PLACES has no ",
    "rewards.terms=[{name: 'nowhere:Reward'}]": "'nowhere:Reward' cannot be made: ModuleNotFoundError",
    "rewards.terms=[{name: 'misbehaving:Broken'}]": "cannot be made: FileNotFoundError",
    "rewards.terms=[{name: shapes, metric: stricd}]": "'shapes' has no metric 'stricd'; did you mean 'strict'?",
}


@pytest.mark.parametrize(("setting", "message"), RECIPE_MISTAKES.items())
def test_recipe(setting: str, message: str, refusal: Refusal, tmp_path: Path) -> None:
    assert message in refusal("--out", tmp_path / "run", f"--set={setting}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("setting", "message"), SETTING_MISTAKES.items())
def test_setting(setting: str, message: str, refusal: Refusal, places: Path, tmp_path: Path) -> None:
    setting, message = (text.replace("PLACES", str(places)) for text in (setting, message))
    assert message in refusal("--out", tmp_path, f"--set={setting}")
    assert list_checkpoints(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(refusal: Refusal, tmp_path: Path) -> None:
    message = refusal("--out", tmp_path, "--set=device=cuda")
    assert message == "device: cuda was asked for, but torch sees no CUDA device"


def test_a_recipe_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "tiny-dpgo"])
    assert exit_info.value.code == 2
    assert "no recipe 'tiny-dpgo'; did you mean 'tiny-dgpo'?" in only_error(capfd.readouterr().err)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_output_that_cannot_be_written(out: str, refusal: Refusal, places: Path) -> None:
    assert f"cannot write to {places / out}: " in refusal("--out", places / out)


def test_an_output_that_takes_no_links(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As disks of some clouds: known before the first step, not at the first checkpoint."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    message = refusal("--out", tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'run'} takes no symbolic links (Operation not supported)")


def test_an_output_that_holds_a_run(refusal: Refusal, run: Path, straight_run: Path) -> None:
    assert f"{run} already holds a run: give --resume" in refusal("--out", run)
    assert digests(run) == digests(straight_run)


def test_a_run_that_failed_before_its_first_step_may_be_begun_anew(run: Path, tmp_path: Path) -> None:
    """Nothing is lost by it, and --resume would refuse what was wrong with it."""
    failed = tmp_path / "failed"
    failed.mkdir()
    for name in ("config.yaml", "evaluations.jsonl"):
        shutil.copy(run / name, failed)
    (failed / "metrics.jsonl").touch()
    refuse_used(failed)
    shutil.copy(run / "metrics.jsonl", failed)
    with pytest.raises(UserError, match="already holds a run"):
        refuse_used(failed)


# Seen on resume


@pytest.fixture
def run(straight_run: Path, tmp_path: Path) -> Path:
    """A finished run of six steps that the test may damage."""
    return shutil.copytree(straight_run, tmp_path / "run", symlinks=True)


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble"])
@pytest.mark.parametrize("name", ["state/policy.safetensors", "state/state.json", "manifest.json"])
def test_a_damaged_checkpoint(name: str, damage: str, refusal: Refusal, run: Path) -> None:
    directory = run / "checkpoints" / "step-000006"
    path = directory / name
    content = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[:-100] if damage == "truncate" else content[::-1])
    before = digests(run)
    message = refusal("--out", run, "--resume", "--steps=8")
    assert message == f"checkpoint {directory} is damaged ({name}); remove it to go on from the one before"
    assert digests(run) == before
    assert len(read_metrics(run)) == 6


def test_resume_with_a_forbidden_change(refusal: Refusal, run: Path, straight_run: Path) -> None:
    message = refusal("--out", run, "--resume", "--steps=8", "--set=optimizer.lr=1.0", "--seed=5")
    assert "--resume cannot change optimizer.lr: 0.0003 -> 1.0; seed: 0 -> 5" in message
    assert digests(run) == digests(straight_run)


def test_resume_without_a_run(refusal: Refusal, tmp_path: Path) -> None:
    assert f"nothing to resume in {tmp_path}" in refusal("--out", tmp_path, "--resume")
    assert "--resume needs --out" in refusal("--resume")


def test_eval_without_a_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(run)])
    assert f"no checkpoint in {run / 'checkpoints'}" in capfd.readouterr().err


# Seen while a run goes on: steps 7 and 8 of a run that saved six

MISBEHAVIOUR = {
    "nan": "'misbehaving:Brightness' failed for 1 of 8 images, last: returned nan; 12.5% of the images have no reward, "
    "more than rewards.max_failed_share=0.1",
    "inf": "'misbehaving:Brightness' failed for 1 of 8 images, last: returned inf; 12.5% of the images have no reward, "
    "more than rewards.max_failed_share=0.1",
    "short": "'misbehaving:Brightness' returned [3] scores (brightness) for 4 images; expected one for each",
    "raise": "'misbehaving:Brightness' failed for 4 of 8 images, last: RuntimeError: the reward's server is gone; "
    "50.0% of the images have no reward, more than rewards.max_failed_share=0.1",
}


@pytest.mark.parametrize(("how", "message"), MISBEHAVIOUR.items())
def test_a_reward_that_fails(
    how: str, message: str, refusal: Refusal, run: Path, straight_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.html").unlink()
    monkeypatch.setenv("MISBEHAVE", f"1-99:{how}")
    assert message in refusal("--out", run, "--resume", "--steps=8")
    assert_nothing_lost(run, straight_run)
    assert (run / "report.html").exists(), "how it went so far"


def test_what_was_learnt_before_a_reward_failed_is_saved(
    tmp_path: Path,
    straight_run: Path,
    assert_ends_alike: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its fifth step is the second after a checkpoint; of a run that has learnt nothing there is nothing to save."""
    config = load_recipe(straight_run / "config.yaml")
    trainer = Trainer(config, tmp_path / "run")
    monkeypatch.setattr(trainer, "_draw", failing_from(trainer, step=4))
    with pytest.raises(UserError, match="gone"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000003", "step-000004"]
    Trainer(config, tmp_path / "run", resume=True).train()
    assert_ends_alike(tmp_path / "run", straight_run)
    trainer = Trainer(config, tmp_path / "new")
    monkeypatch.setattr(trainer, "_draw", failing_from(trainer, step=0))
    with pytest.raises(UserError, match="gone"):
        trainer.train()
    assert list_checkpoints(tmp_path / "new") == []


def failing_from(trainer: Trainer, *, step: int) -> Callable[[View], tuple[Rollout, Scores]]:
    draw = trainer._draw

    def failing(view: View) -> tuple[Rollout, Scores]:
        if trainer.step >= step:
            raise UserError("the reward's server is gone")
        return draw(view)

    return failing


def test_a_report_that_fails_too_does_not_hide_why(
    refusal: Refusal, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISBEHAVE", "1-99:raise")
    monkeypatch.setattr(run_directory, "write_report", lambda out: 1 / 0)
    assert MISBEHAVIOUR["raise"] in refusal("--out", run, "--resume", "--steps=8")


def test_a_disk_that_is_full_while_saving(
    refusal: Refusal, run: Path, straight_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    message = refusal("--out", run, "--resume", "--steps=7")
    assert f"cannot save {run / 'checkpoints' / 'step-000007'}: No space left on device; earlier checkpoints" in message
    assert_nothing_lost(run, straight_run)


def test_a_disk_that_is_full_while_logging(
    refusal: Refusal, run: Path, straight_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(MetricsLog, "write", full)
    message = refusal("--out", run, "--resume", "--steps=7")
    assert message.startswith(f"cannot write to the run directory {run}: No space left on device; checkpoints are int")
    assert_nothing_lost(run, straight_run)


def test_a_disk_that_is_full_on_resume(
    run: Path, straight_run: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    """The system itself refuses to write a file as large as config.yaml; the old one stays."""
    config = load_recipe(run / "config.yaml")
    refusal = r"cannot write the run directory .*: File too large"
    with pytest.raises(UserError, match=refusal), files_up_to((run / "config.yaml").stat().st_size // 2):
        RunDirectory(run, config, Guard(config), clock=StageClock(), start_step=6, past=[], resumed=True, is_first=True)
    assert (run / "config.yaml").read_bytes() == (straight_run / "config.yaml").read_bytes()
    assert_nothing_lost(run, straight_run)


def test_a_run_that_is_not_over_keeps_its_directory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another that would go on there is refused before it has written a byte."""
    monkeypatch.setattr("dgpo_fast.metrics.RELEASED_S", 0.0)
    config = load_recipe(run / "config.yaml")
    shorter = load_recipe(run / "config.yaml", ["steps=3"])

    def enter(config: Config) -> RunDirectory:
        return RunDirectory(
            run, config, Guard(config), clock=StageClock(), start_step=6, past=[], resumed=True, is_first=True
        )

    with enter(config):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="a run that is not over writes there; end it first"):
            enter(shorter)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def assert_nothing_lost(run: Path, straight_run: Path) -> None:
    assert digests(run) == digests(straight_run)
    assert read_metrics(run)[:6] == read_metrics(straight_run)
    assert read_evaluations(run)[:3] == read_evaluations(straight_run)


# In a process of its own, as users see it


def test_stderr_is_one_line(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "dgpo_fast", "train", "tiny-dgpo", "--out", tmp_path / "run", "--set=groups.size=1"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    message = "error: tiny-dgpo: groups.size: input should be greater than or equal to 2, got 1\n"
    assert (process.returncode, process.stdout, process.stderr) == (2, "", message)
