"""The command line: exit statuses, what goes to stdout, and what is not imported. Its refusals are in test_mistakes."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from dgpo_fast import Trainer, cli, profile_run
from dgpo_fast.cli import main
from dgpo_fast.comparison import Evaluation
from dgpo_fast.config import load_recipe, recipe_names, resume_conflicts
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation_config import evaluation_recipe_names
from dgpo_fast.profile_run import Profile
from dgpo_fast.samples import read_grid
from dgpo_fast.sampling import SampleOptions


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


CommandLine = Callable[..., Result]


@pytest.fixture
def dgpo_fast(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs a command line in this process."""

    def run(*arguments: str | Path) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        code = exit_info.value.code or 0
        assert isinstance(code, int)
        return Result(code, *capfd.readouterr())

    return run


# Nothing heavy is imported


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["recipes"], 0),
        (["train", "tiny-dgpo", "--set", "groups.size=1"], 2),
        (["train", "drawbench"], 2),
        (["eval", "nowhere", "--recipe", "drawbench"], 2),
    ],
)
def test_it_answers_without_torch(arguments: list[str], status: int) -> None:
    program = (
        "import sys\n"
        "from dgpo_fast.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as exit:\n    status = exit.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy', 'PIL', 'huggingface_hub'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}') if heavy else sys.exit(status)"
    )
    process = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert process.returncode == status, process.stderr


def test_the_module_is_the_command() -> None:
    process = subprocess.run([sys.executable, "-m", "dgpo_fast", "recipes"], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    to_train, to_evaluate = process.stdout.split("\n\n")
    assert [line.split()[0] for line in to_train.splitlines()] == recipe_names()
    heading, *lines = to_evaluate.splitlines()
    assert heading == "For dgpo-fast eval RUN_DIR --recipe NAME:"
    assert [line.split()[0] for line in lines] == evaluation_recipe_names()


# Exit statuses


@pytest.mark.parametrize(
    ("error", "status", "stderr"),
    [
        (UserError("mend\nthis"), 2, "error: mend this\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), 2, "error: /full: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/theirs"), 2, "error: /theirs: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_what_ends_a_command_decides_the_status(
    error: BaseException, status: int, stderr: str, dgpo_fast: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_recipe", fail)
    assert dgpo_fast("train", "tiny-dgpo") == (status, "", stderr)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "a bug", "/nowhere")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_recipe", fail)
    with pytest.raises(type(error), match="a bug"):
        main(["train", "tiny-dgpo"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "trian"),
        (["train"], "RECIPE"),
        (["train", "tiny-dgpo", "--step", "3"], "--step"),
        (["train", "tiny-dgpo", "--steps", "many"], "--steps"),
        (["eval"], "RUN_DIR"),
        (["eval", "runs/x", "--split", "tset"], "tset"),
        (["sample", "embedded", "--out", "x"], "--prompt"),
        (["sample", "embedded", "--out", "x", "--prompt", "x", "--num", "0"], "--num"),
        (["profile", "tiny-dgpo"], "--out"),
        (["tiny", "build"], "--out"),
        (["tiny"], "command"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], said: str, dgpo_fast: CommandLine) -> None:
    status, stdout, stderr = dgpo_fast(*arguments)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(rf"error: [a-z].*{re.escape(said)}.*\n", stderr)


def test_nothing_is_a_request_for_help(dgpo_fast: CommandLine) -> None:
    assert dgpo_fast() == dgpo_fast("--help")
    assert dgpo_fast().status == 0
    assert "train" in dgpo_fast().stdout


# train


def test_dry_run_prints_a_plan_and_writes_nothing(
    dgpo_fast: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = dgpo_fast("train", "tiny-dgpo", "--dry-run", "--out", tmp_path / "run")
    assert (status, stderr) == (0, "")
    assert "Plan of tiny-dgpo" in stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_for_as_many_ranks_as_asked(dgpo_fast: CommandLine) -> None:
    for ranks, said in (("1", "shared by 1 rank "), ("2", "shared by 2 ranks ")):
        assert said in dgpo_fast("train", "tiny-dgpo", "--dry-run", "--ranks", ranks).stdout
    status, _, stderr = dgpo_fast("train", "tiny-dgpo", "--ranks", "2")
    assert status == 2 and "--ranks plans, with --dry-run" in stderr


class FakeTrainer:
    """Notes what it was made with and writes what the command line reads afterwards."""

    made: tuple[object, ...] = ()
    world = SimpleNamespace(leave=lambda: None)

    def __init__(self, config: object, out: Path, *, resume: bool) -> None:
        type(self).made = (config, out, resume)
        self.out = out

    def train(self) -> None:
        line = {"step": 6, "num_prompts": 2, "base": {"strict": 0.5}, "tuned": {"strict": 0.875}}
        first = {**line, "step": 0, "tuned": line["base"]}
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "evaluations.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(line) + "\n")


@pytest.fixture
def fake_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeTrainer]:
    monkeypatch.setattr("dgpo_fast.trainer.Trainer", FakeTrainer)
    monkeypatch.chdir(tmp_path)
    return FakeTrainer


def test_train_ends_with_base_and_tuned_scores(
    dgpo_fast: CommandLine, fake_trainer: type[FakeTrainer], tmp_path: Path
) -> None:
    status, stdout, stderr = dgpo_fast("train", "tiny-dgpo", "--out", "run")
    assert (status, stderr) == (0, "")
    assert re.search(r"strict\W+0\.500\W+0\.875\W+\+0\.375", stdout)
    assert "run/report.html" in stdout
    assert fake_trainer.made == (load_recipe("tiny-dgpo"), Path("run"), False)


def test_short_options_stand_for_settings(dgpo_fast: CommandLine, fake_trainer: type[FakeTrainer]) -> None:
    options = ["--steps", "7", "--seed", "3", "--save-every", "2", "--model", "1e5/x"]
    assert dgpo_fast("train", "tiny-dgpo", "--set", "steps=5", "--set", "optimizer.lr=1e-5", *options).status == 0
    settings = ["steps=7", "seed=3", "checkpoints.every=2", "model.name='1e5/x'", "optimizer.lr=1e-5"]
    assert fake_trainer.made[0] == load_recipe("tiny-dgpo", settings)


def test_without_out_a_run_names_itself(dgpo_fast: CommandLine, fake_trainer: type[FakeTrainer]) -> None:
    assert dgpo_fast("train", "tiny-dgpo").status == 0
    assert re.fullmatch(r"runs/tiny-dgpo-\d{8}-\d{6}", str(fake_trainer.made[1]))


def test_several_processes_need_a_name(
    dgpo_fast: CommandLine, fake_trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dgpo_fast("train", "tiny-dgpo") == (
        2, "", "error: several processes need --out RUN_DIR: each would pick a name of its own\n",
    )  # fmt: skip


def test_other_ranks_say_nothing(
    dgpo_fast: CommandLine, fake_trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The first rank may have written config.yaml by now.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert dgpo_fast("train", "tiny-dgpo", "--out", "run") == (0, "", "")


# Of a finished run


def test_eval_prints_one_json_object(dgpo_fast: CommandLine, straight_run: Path) -> None:
    status, stdout, stderr = dgpo_fast("eval", straight_run, "--json")
    assert (status, stderr) == (0, "")
    result = json.loads(stdout)
    assert result.keys() >= {"split", "num_prompts", "base", "tuned", "difference"}
    assert result["base"].keys() == result["tuned"].keys() == result["difference"].keys() >= {"strict", "soft"}


def test_eval_prints_a_table(dgpo_fast: CommandLine, straight_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten prompts, of which five go from 0 to 1, four are at 1, and one is at 0."""
    base, tuned = np.array([[0.0]] * 6 + [[1.0]] * 4), np.array([[1.0]] * 5 + [[0.0]] + [[1.0]] * 4)
    found = Evaluation(
        run="run", step=6, split="test", source="shapes:test", prompts=("a red circle",) * 10, images_per_prompt=1,
        base={"strict": base}, tuned={"strict": tuned},
    )  # fmt: skip
    monkeypatch.setattr("dgpo_fast.evaluate.evaluate_run", lambda run_dir, **options: found)
    status, stdout, stderr = dgpo_fast("eval", straight_run)
    assert (status, stderr) == (0, "")
    assert "10 prompts of shapes:test x 1 images, step 6" in stdout
    told = found.as_json()
    change, low, high, p = (told["difference"]["strict"][name] for name in ("mean", "low", "high", "p"))
    assert (change, low, high, p) == pytest.approx((0.5, 0.123, 0.877, 0.015), abs=1e-3)
    assert told["difference"]["strict"]["win_rate_interval"] == pytest.approx([0.44, 0.92], abs=5e-3)
    for side, mean in (("base", 0.4), ("tuned", 0.9)):
        low, high = told[f"{side}_interval"]["strict"]
        assert low < mean < high
    # 0.5 +- t_9 sqrt(0.25 / 9), and Wilson's interval of 7.5 wins in 10.
    assert re.search(r"strict\W+0\.400\W+0\.900\W+\+0\.500\W+\+0\.123 to \+0\.877\W+0\.015\W+75 % \(44-92\)", stdout)


KINDS = [{"prompt": prompt, "tag": tag} for prompt, tag in
         [("a red circle", "one"), ("two blue squares", "two"), ("a green square", "one")]]  # fmt: skip


def test_eval_by_kind_of_prompt(dgpo_fast: CommandLine, straight_run: Path, tmp_path: Path) -> None:
    """Each kind's scores are those of its prompts, and in their mean every kind counts alike, as in GenEval."""
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in KINDS))
    given = ("eval", straight_run, "--prompts", tmp_path / "prompts.jsonl", "--by", "tag", "--num-prompts", 3)
    reward = ("--reward", "misbehaving:Brightness")
    status, stdout, stderr = dgpo_fast(*given, *reward, "--json", "--csv", tmp_path / "scores.csv")
    assert (status, stderr) == (0, "")
    found = json.loads(stdout)["by"]
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert found["key"] == "tag" and [*found["kinds"]] == ["one", "two"]
    for side in ("base", "tuned"):
        means = []
        for kind, number in (("one", 2), ("two", 1)):
            scores = [float(row["contrast"]) for row in rows if (row["tag"], row["model"]) == (kind, side)]
            assert found["kinds"][kind]["num_prompts"] == number
            assert found["kinds"][kind][side]["contrast"] == pytest.approx(np.mean(scores), rel=1e-6)
            means.append(np.mean(scores))
        assert found["mean_of_kinds"][side]["contrast"] == pytest.approx(np.mean(means), rel=1e-6)
    assert found["kinds"]["one"]["difference"]["contrast"]["num_prompts"] == 2

    status, stdout, _ = dgpo_fast(*given, *reward, "--images-per-prompt", 1, "--gallery", tmp_path / "gallery")
    assert status == 0
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert lines.index("by tag") > lines.index(next(line for line in lines if "prompts of" in line))
    assert len([line for line in lines if re.match(r"mean of these \d\.\d+ \d\.\d+ [+-]0\.\d+$", line)]) == 2
    assert "<small>two</small>" in (tmp_path / "gallery" / "index.html").read_text()
    assert dgpo_fast(*given[:-4], "--by", "category", *reward) == (
        2, "", "error: --by category: the prompt 'a red circle' has none; its metadata have tag\n",
    )  # fmt: skip


def test_eval_scores_what_it_is_told_to(dgpo_fast: CommandLine, straight_run: Path, tmp_path: Path) -> None:
    """By other rewards, on other prompts, of an earlier checkpoint: as JSON, CSV and page."""
    (tmp_path / "prompts.txt").write_text("a blue circle\n<red>\nnever drawn\n")
    status, stdout, stderr = dgpo_fast(
        *("eval", straight_run, "--json", "--reward", "misbehaving:Brightness", "--prompts", tmp_path / "prompts.txt"),
        *("--num-prompts", 2, "--images-per-prompt", 3, "--step", 3, "--set", "rollout.images_per_forward=2"),
        *("--csv", tmp_path / "new" / "scores.csv", "--gallery", tmp_path / "gallery"),
    )
    assert (status, stderr) == (0, "")
    result = json.loads(stdout)
    assert (result["num_prompts"], result["images_per_prompt"], result["step"]) == (2, 3, 3)
    assert result["prompts"] == str(tmp_path / "prompts.txt")
    assert [*result["base"]] == ["brightness", "contrast"]
    with (tmp_path / "new" / "scores.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["number"], row["image"], row["model"]) for row in rows] == [
        (str(number), str(image), model) for number in range(2) for image in range(3) for model in ("base", "tuned")
    ]
    assert {row["prompt"] for row in rows} == {"a blue circle", "<red>"}
    for model in ("base", "tuned"):
        scores = [float(row["contrast"]) for row in rows if row["model"] == model]
        assert len({*scores}) == 6 and np.mean(scores) == pytest.approx(result[model]["contrast"], rel=1e-6)
    assert "&lt;red&gt;" in (tmp_path / "gallery" / "index.html").read_text()
    assert len([*(tmp_path / "gallery" / "images").iterdir()]) == 12


def test_the_best_checkpoint_has_a_name(dgpo_fast: CommandLine, straight_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(straight_run, tmp_path / "run", symlinks=True)
    best = run / "checkpoints" / "best"
    best.unlink()
    best.symlink_to("step-000003")
    status, stdout, _ = dgpo_fast("export", run, "--out", tmp_path / "lora", "--step", "best")
    assert (status, stdout) == (0, f"{tmp_path / 'lora'}\n")
    weights = "pytorch_lora_weights.safetensors"
    of_steps = [(run / "checkpoints" / f"step-00000{step}" / "lora" / weights).read_bytes() for step in (3, 6)]
    assert (tmp_path / "lora" / weights).read_bytes() == of_steps[0] != of_steps[1]
    best.unlink()
    status, _, stderr = dgpo_fast("export", run, "--out", tmp_path / "other", "--step", "best")
    assert (status, stderr) == (2, f"error: --step best: {best} points to no checkpoint\n")


def test_a_recipe_is_shown_as_a_recipe(dgpo_fast: CommandLine, tmp_path: Path) -> None:
    status, stdout, _ = dgpo_fast("recipes", "sd35m-geneval")
    assert status == 0
    (tmp_path / "mine.yaml").write_text(stdout)
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("sd35m-geneval")


def test_a_gpu_without_enough_memory_is_one_line_with_advice(
    dgpo_fast: CommandLine, quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(trainer: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB. Set X. Or Y.")

    monkeypatch.setattr(Trainer, "train", exhausted)
    status, _, stderr = dgpo_fast("train", "tiny-dgpo", "--out", tmp_path / "run", *(f"--set={one}" for one in quick))
    assert status == 2 and stderr.count("\n") == 1
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB. Less is needed with model.checkpointing"
    assert stderr.startswith(f"error: {said}")


@pytest.mark.parametrize("recipe", ["tiny-dgpo", "tiny-flow-grpo", "full"])
def test_what_is_advised_where_memory_lacks_may_change_on_resume(recipe: str) -> None:
    """And is not there already."""
    full = ["adapter=null", "model.engine=eager", "model.checkpointing=full"]
    saved = load_recipe("tiny-dgpo", full) if recipe == "full" else load_recipe(recipe)
    advised = cli._remedies(saved, True).partition("with which --resume goes on")[0]
    changes = {
        "model.checkpointing": "full", "optimizer.images_per_micro_batch": 2, "rollout.images_per_forward": 2,
        "rollout.images_per_decode": 2, "parallel.zero_stage": 1, "parallel.offload_optimizer": "cpu",
    }  # fmt: skip
    named = [f"{key}={value}" for key, value in changes.items() if key in advised]
    assert len(named) == {"tiny-dgpo": 4, "tiny-flow-grpo": 2, "full": 5}[recipe]
    assert ("model.checkpointing" in advised) == (recipe != "full")
    changed = load_recipe("tiny-dgpo", [*full, *named]) if recipe == "full" else load_recipe(recipe, named)
    assert resume_conflicts(saved, changed) == []


@pytest.mark.parametrize("recipe", ["tiny-dgpo", "tiny-flow-grpo"])
@pytest.mark.parametrize("engine", ["eager", "compile"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_advised_of_shards_is_taken(stage: int, engine: str, recipe: str) -> None:
    """One after the other, until there is no more."""
    gathered = ["parallel.rollout=gathered"] if (stage, recipe) == (3, "tiny-flow-grpo") else []
    own = ["adapter=null", f"model.engine={engine}", f"parallel.zero_stage={stage}", *gathered]
    if stage == 3 and engine == "compile":
        return  # there is none
    for _ in range(9):
        config = load_recipe(recipe, own)
        advised = re.findall(r"parallel\.[a-z_]+=\w+", cli._remedies(config, True))
        if not advised:
            break
        for one in advised if stage else advised[:1]:
            own = [*own, one]
            assert resume_conflicts(config, load_recipe(recipe, own)) == []
        stage = load_recipe(recipe, own).parallel.zero_stage
    else:
        pytest.fail("there is always more")
    assert config.parallel.offload_optimizer == "cpu"


def test_eval_says_where_its_files_are(dgpo_fast: CommandLine, straight_run: Path, tmp_path: Path) -> None:
    status, stdout, _ = dgpo_fast(
        *("eval", straight_run, "--csv", tmp_path / "a.csv", "--gallery", tmp_path / "b", "--images-per-prompt", 1)
    )
    assert status == 0
    assert stdout.splitlines()[-2:] == [str(tmp_path / "a.csv"), str(tmp_path / "b" / "index.html")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "5"], "--step 5: RUN has checkpoints of steps 3, 6"),
        (["--step", "0"], "--step takes the number of a step, or best; got '0'"),
        (["--step", "last"], "--step takes the number of a step, or best; got 'last'"),
        (["--reward", "shape"], "rewards: no reward 'shape'; did you mean 'shapes'?"),
        (["--lossless"], "--lossless is for the images of --gallery DIR"),
        (["--prompts", "nowhere.txt"], "prompts.test: no file 'nowhere.txt' (and it is none of shapes:train"),
        (["--recipe", "shape"], "--recipe: no evaluation recipe 'shape'; did you mean 'shapes'?"),
        (["--recipe", "nowhere.yaml"], "--recipe: no evaluation recipe 'nowhere.yaml'"),
        (["--set", "optimizer.lr=1"], "--set optimizer.lr=1: eval takes settings of rewards, prompts, evaluation"),
        (["--set", "rewards.pickscores.path=x"], "unknown key 'rewards.pickscores'; did you mean 'pickscore'?"),
        (["--gallery", "RUN"], "--gallery RUN holds something already; name a new directory"),
        (["--csv", "RUN"], "--csv RUN is a directory; expected a file such as RUN/eval.csv"),
    ],
)
def test_eval_refuses(arguments: list[str], message: str, dgpo_fast: CommandLine, straight_run: Path) -> None:
    given = [argument.replace("RUN", str(straight_run)) for argument in arguments]
    status, stdout, stderr = dgpo_fast("eval", straight_run, *given)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(rf"error: .*{re.escape(message.replace('RUN', str(straight_run)))}.*\n", stderr)


def test_train_refuses_an_evaluation_recipe(dgpo_fast: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: evaluation\nrewards: {terms: [{name: shapes}]}\n")
    for name in ("drawbench", "evaluation/drawbench", str(tmp_path / "mine.yaml")):
        assert dgpo_fast("train", name) == (
            2, "",
            f"error: {name!r} is an evaluation recipe, and trains nothing: dgpo-fast eval RUN_DIR --recipe {name}\n",
        )  # fmt: skip


def test_eval_saves_a_picture(dgpo_fast: CommandLine, straight_run: Path, tmp_path: Path) -> None:
    assert dgpo_fast("eval", straight_run, "--json", "--picture", tmp_path / "new" / "eval.png").status == 0
    tiles = read_grid(tmp_path / "new" / "eval.png")
    prompts = read_grid(straight_run / "samples" / "step-000000.png")
    assert [tile.prompt for tile in tiles] == [
        f"{prompt} ({side})" for side in ("base", "tuned") for prompt, _ in prompts
    ]
    assert [tile.image.tobytes() for tile in tiles[: len(prompts)]] == [image.tobytes() for _, image in prompts]


def test_eval_of_no_run(dgpo_fast: CommandLine, tmp_path: Path) -> None:
    assert dgpo_fast("eval", tmp_path) == (
        2, "", f"error: {tmp_path} is no run directory: it has no config.yaml\n",
    )  # fmt: skip


def test_report_is_written_again(dgpo_fast: CommandLine, straight_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(straight_run, tmp_path / "run", symlinks=True)
    (run / "report.html").unlink()
    assert dgpo_fast("report", run) == (0, f"{run / 'report.html'}\n", "")
    assert (run / "report.html").stat().st_size > 0


def test_report_of_no_run(dgpo_fast: CommandLine, tmp_path: Path) -> None:
    assert dgpo_fast("report", tmp_path).status == 2


# sample


def read(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_sample_draws_what_diffusers_draws(
    dgpo_fast: CommandLine, straight_run: Path, embedded_pipeline, tmp_path: Path
) -> None:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline

    from dgpo_fast.models.sources import EMBEDDED

    lora = straight_run / "checkpoints" / "step-000006" / "lora"
    status, stdout, stderr = dgpo_fast(
        "sample",
        "embedded",
        "--prompt",
        "two red circles",
        "--lora",
        lora,
        "--num",
        "2",
        "--seed",
        "5",
        "--out",
        tmp_path,
    )
    assert (status, stderr) == (0, "")
    assert stdout.splitlines() == [str(tmp_path / "0000.png"), str(tmp_path / "0001.png")]

    config = load_recipe(straight_run / "config.yaml")
    pipeline = StableDiffusion3Pipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora)
    pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=config.rollout.shift
    )
    for index in range(2):
        expected = pipeline(
            "two red circles",
            height=72,
            width=72,
            num_inference_steps=config.evaluation.steps,
            guidance_scale=config.rollout.guidance,
            max_sequence_length=config.model.text_length,
            generator=torch.Generator().manual_seed(5 + index),
        ).images[0]
        np.testing.assert_array_equal(read(tmp_path / f"{index:04d}.png"), np.asarray(expected))


def test_an_image_is_drawn_as_asked() -> None:
    asked = SampleOptions.of("embedded", lora=None, steps=3, guidance=1.5, resolution=48)
    assert (asked.steps, asked.guidance, asked.model.resolution) == (3, 1.5, 48)


def test_an_image_depends_on_its_seed_alone(dgpo_fast: CommandLine, tmp_path: Path) -> None:
    options = ["sample", "embedded", "--prompt", "a blue square", "--steps", "2", "--guidance", "1"]
    assert dgpo_fast(*options, "--num", "2", "--seed", "0", "--out", tmp_path / "both").status == 0
    assert dgpo_fast(*options, "--num", "1", "--seed", "1", "--out", tmp_path / "one").status == 0
    first, second = (read(tmp_path / "both" / f"{index:04d}.png") for index in range(2))
    assert first.shape == (72, 72, 3)
    assert (first != second).any()
    np.testing.assert_array_equal(second, read(tmp_path / "one" / "0000.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embeded"], "no model 'embeded'; did you mean 'embedded'?"),
        (["embedded", "--lora", "nowhere"], "--lora nowhere: no pytorch_lora_weights.safetensors there"),
        (
            ["embedded", "--resolution", "70"],
            "model.resolution: expected a multiple of 24 up to 72 for this model, got 70",
        ),
    ],
)
def test_sample_refuses(arguments: list[str], message: str, dgpo_fast: CommandLine, tmp_path: Path) -> None:
    status, stdout, stderr = dgpo_fast("sample", *arguments, "--prompt", "x", "--out", tmp_path / "images")
    assert (status, stdout) == (2, "")
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", stderr)


def test_sample_refuses_an_adapter_of_another_model(dgpo_fast: CommandLine, tmp_path: Path) -> None:
    """diffusers only warns of keys that fit nothing, and would draw the base model."""
    weights = {f"unet.down_blocks.0.to_q.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    status, stdout, stderr = dgpo_fast(
        "sample", "embedded", "--lora", tmp_path, "--prompt", "x", "--out", tmp_path / "images"
    )
    assert (status, stdout) == (2, "")
    assert re.fullmatch(
        r"error: --lora .* does not load into this model: it holds nothing for the transformer\n", stderr
    )
    assert not list(tmp_path.glob("images/*.png"))


def test_deepspeeds_launcher_names_the_rank_first(dgpo_fast: CommandLine) -> None:
    assert dgpo_fast("--local_rank=0", "recipes") == dgpo_fast("recipes")
    assert dgpo_fast("recipes", "--local_rank=0").status == 2, "nowhere else"


# doctor, profile, tiny build


def test_doctor_knows_the_operators(dgpo_fast: CommandLine) -> None:
    status, stdout, stderr = dgpo_fast("doctor", "--json")
    assert (status, stderr) == (0, "")
    findings = json.loads(stdout)
    assert {serving["operator"] for serving in findings["operators"]} >= {"solver_step_"}
    assert findings["versions"]["torch"]
    assert findings["parts"]["embedded model"]

    status, stdout, stderr = dgpo_fast("doctor")
    assert (status, stderr) == (0, "")
    assert "auto takes cpu; math runs here too" in " ".join(stdout.split())
    for word in ("machine", "torch", "flash-attn", "native library", "triton", "TRITON_INTERPRET", "on cpu"):
        assert word in stdout
    (row,) = (line.split() for line in stdout.splitlines() if "solver_step" in line)
    assert row[:3] == ["solver_step", "in", "place"]
    for reason in findings["because"]["cpu"]:
        assert f"on cpu: {reason}" in " ".join(stdout.split())


def test_doctor_says_which_form_of_an_operator_falls_back() -> None:
    from rich.console import Console

    from dgpo_fast.doctor import examine, render

    def served(operator: str, device: str, implementation: str, language: str) -> dict[str, str]:
        return {
            "operator": operator, "stem": "norm", "device": device, "implementation": implementation,
            "reason": "", "language": language,
        }  # fmt: skip

    operators = [
        served("norm", "cpu", "native", "C++"), served("norm", "cuda", "triton", "Triton"),
        served("norm_backward", "cpu", "reference", "PyTorch"), served("norm_backward", "cuda", "triton", "Triton"),
    ]  # fmt: skip
    attention = {"flash3": "is not installed", "cudnn": None, "math": None}
    found = {"cuda": "13.0", "attention": attention, "operators": operators}
    findings = {**examine(), **found, "because": {"cpu": ["first", "second"], "cuda": ["third"]}}
    page = io.StringIO()
    Console(file=page, width=120).print(render(findings))
    shown = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    assert "norm backward C++, backward: PyTorch Triton" in shown
    assert "attention auto takes cudnn; math runs here too (flash3 is not installed)" in shown
    assert shown[-3:] == ["on cpu: first", "on cpu: second", "on cuda: third"]


def test_profile_accounts_for_the_whole_iteration(
    dgpo_fast: CommandLine, quick: tuple[str, ...], tmp_path: Path
) -> None:
    settings = [f"--set={item}" for item in quick]
    status, stdout, stderr = dgpo_fast(
        "profile", "tiny-dgpo", "--out", tmp_path, "--iterations", "2", "--warmup", "1", *settings
    )
    assert status == 0, stderr
    for word in ("transformer, sampling", "VAE", "reward", "everything else", "nsys profile", "ncu ", "@dgpo_fast"):
        assert word in stdout
    stages = dict(line.split(",", 1) for line in (tmp_path / "stages.csv").read_text().splitlines())
    assert {
        "rollout",
        "rollout/transformer",
        "rollout/vae",
        "background/reward",
        "reward",
        "train/policy",
        "train/backward",
    } <= stages.keys()
    assert stages["rollout"].startswith("1,")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    annotations = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"rollout", "transformer", "step 0", "block dual", "block joint", "block last", "policy"} <= annotations
    assert {"backward", "block dual backward", "block joint backward", "block last backward"} <= annotations


def test_stages_of_a_profile_are_means_of_its_iterations(tmp_path: Path) -> None:
    paths = [("rollout", "transformer"), ("train", "backward"), ("train", "policy"), ("train", "loss")]
    found = Profile(
        iterations=2, wall_s=8.0, seconds=dict(zip(paths, (1.0, 2.0, 3.0, 0.5), strict=True)),
        calls=dict.fromkeys(paths, 4), num_ranks=1, traffic=(), stages=tmp_path / "stages.csv", collectives=None,
        trace=None,
    )  # fmt: skip
    profile_run._write_stages(found)
    assert found.stages.read_text().splitlines()[1:] == [
        "rollout/transformer,2,500.000,0.1250", "train/backward,2,1000.000,0.2500", "train/loss,2,250.000,0.0625",
        "train/policy,2,1500.000,0.3750",
    ]  # fmt: skip
    shares = found.shares()
    assert (shares["transformer, sampling"], shares["transformer, training"]) == (0.125, 0.625)
    assert sum(shares.values()) == pytest.approx(1)


def test_commands_for_nsight_begin_with_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgpo_fast.profile_run import nsight_commands

    monkeypatch.setattr(sys, "argv", ["dgpo-fast", "profile", "tiny-dgpo", "--out", "my runs", "--trace"])
    command = "python -m dgpo_fast profile tiny-dgpo --out 'my runs' --no-trace"
    assert nsight_commands(Path("my runs")) == [
        "nsys profile --trace=cuda,nvtx --capture-range=nvtx --nvtx-capture=window@dgpo_fast --capture-range-end=stop "
        f"--force-overwrite=true --output='my runs/nsys' {command}",
        "ncu --nvtx --nvtx-include='dgpo_fast@window/*/policy' --nvtx-include='dgpo_fast@window/*/backward' "
        f"--launch-count=500 --force-overwrite --export='my runs/ncu' {command}",
    ]


def test_profile_without_a_trace(dgpo_fast: CommandLine, quick: tuple[str, ...], tmp_path: Path) -> None:
    settings = [f"--set={item}" for item in quick]
    arguments = [
        "profile",
        "tiny-dgpo",
        "--out",
        tmp_path,
        "--iterations",
        "1",
        "--warmup",
        "0",
        "--no-trace",
        *settings,
    ]
    assert dgpo_fast(*arguments).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["stages.csv"]


def test_tiny_build_reports_and_saves(dgpo_fast: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgpo_fast.models.tiny import build

    steps = {"vae_steps": 1, "vae_batch": 2, "text_steps": 1, "text_batch": 2, "flow_steps": 1, "flow_batch": 2}
    monkeypatch.setattr(build, "BuildOptions", partial(build.BuildOptions, num_images=8, **steps))
    out = tmp_path / "model"
    status, stdout, stderr = dgpo_fast("tiny", "build", "--out", out, "--seed", "4")
    assert status == 0
    assert re.fullmatch(rf"{re.escape(str(out))}: trained in [\d.]+ s\n", stdout)
    for stage in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "flow"):
        assert f"{stage} loss" in stderr
    assert json.loads((out / "build.json").read_text())["options"]["seed"] == 4
