"""What a run writes, what its first step must find, and how it meets samples and gradients that are not finite."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import list_checkpoints, load_checkpoint
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_evaluations, read_metrics
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import TRAINED
from dgpo_fast.records import Rollout, ScoredGroups, StepReport
from dgpo_fast.rewards import Scores, load_reward
from dgpo_fast.rewards.calling import Here
from dgpo_fast.run_directory import RunDirectory

CONTRACT = {
    "step", "iteration", "images_seen", "wall_s", "reward_mean", "reward_std", "zero_std_groups", "loss", "dgpo_loss",
    "kl", "clip_fraction", "group_weight_mean", "grad_norm", "lr", "rollout_s", "reward_s", "train_s", "images_per_s",
    "peak_memory_gb",
}  # fmt: skip
STAGES = {
    "rollout", "rollout/transformer", "rollout/solver", "rollout/text", "rollout/vae", "background",
    "background/reward", "reward", "train", "train/policy", "train/old", "train/reference", "train/backward",
    "train/optimizer", "evaluate", "checkpoint", "logging",
}  # fmt: skip


def test_the_run_directory_holds_what_users_rely_on(straight_run: Path, quick: tuple[str, ...]) -> None:
    config = load_recipe("tiny-dgpo", [*quick, "logging.tensorboard=true"])
    assert load_recipe(straight_run / "config.yaml") == config
    assert len(list(straight_run.glob("events.out.*"))) == 1
    assert sorted(path.name for path in (straight_run / "samples").iterdir()) == ["step-000000.png", "step-000006.png"]
    assert "<html" in (straight_run / "report.html").read_text().lower()
    assert {"versions", "machine", "command"} <= json.loads((straight_run / "environment.json").read_text()).keys()
    for checkpoint in list_checkpoints(straight_run):
        assert (checkpoint / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert [path.name for path in list_checkpoints(straight_run)] == ["step-000003", "step-000006"]


def test_a_line_of_metrics_per_step(straight_run: Path) -> None:
    lines = read_metrics(straight_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["images_seen"] for line in lines] == [8, 16, 24, 32, 40, 48]
    fields = {field.name for field in dataclasses.fields(StepReport)} - {"rewards", "extra"}
    single = {"reward/misbehaving:Brightness", "reward/shapes.soft"}
    assert all(line.keys() == fields | single for line in lines)
    assert fields >= CONTRACT
    for line in lines:
        weighted = line["reward/misbehaving:Brightness"] + 0.1 * line["reward/shapes.soft"]
        assert line["reward_mean"] == pytest.approx(weighted, rel=1e-6)
    assert all(line.pop("policy_loss") is None for line in lines), "what other methods minimise"
    assert all(math.isfinite(value) for line in lines for value in line.values())
    walls = [0.0, *(line["wall_s"] for line in lines)]
    for line, before, after in zip(lines, walls, walls[1:], strict=False):
        assert line["rollout_s"] + line["reward_s"] + line["train_s"] <= after - before
        assert line["images_per_s"] == pytest.approx(8 / (after - before))


def test_the_learning_rate_warms_up(straight_run: Path) -> None:
    """Over warmup_steps = 4, then constant at 3e-4."""
    rates = [line["lr"] for line in read_metrics(straight_run)]
    assert rates == pytest.approx([3e-4 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1)], rel=1e-12)


def test_the_first_step_starts_at_the_reference(straight_run: Path) -> None:
    """Adapters start at zero: no KL, nothing clipped, s_G = 0, so sigmoid = 1/2 and the loss is log(2) / beta."""
    first, second = read_metrics(straight_run)[:2]
    assert (first["kl"], first["clip_fraction"], first["group_weight_mean"]) == (0, 0, 0.5)
    assert first["dgpo_loss"] == first["loss"] == pytest.approx(math.log(2) / 100, rel=4 * 2**-24)
    assert first["grad_norm"] > 0
    assert second["kl"] > 0
    assert second["group_weight_mean"] != 0.5


def test_evaluations_compare_with_the_base(straight_run: Path) -> None:
    lines = read_evaluations(straight_run)
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert lines[0]["tuned"] == lines[0]["base"] == lines[1]["base"] == lines[2]["base"]
    assert lines[2]["tuned"] != lines[2]["base"]
    assert {(line["split"], line["num_prompts"], line["images_per_prompt"]) for line in lines} == {("test", 2, 4)}


def test_evaluations_have_what_monitors_measure(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The steps have not. One that fails for all images ends nothing."""
    terms = "rewards.terms=[{name: shapes, metric: soft}]"
    watched = "rewards.monitors=[jpeg_compressibility, 'misbehaving:Brightness']"
    monkeypatch.setenv("MISBEHAVE", "3-99:raise")  # twice it is asked for the base's images
    Trainer(load_recipe("tiny-dgpo", [*quick, terms, watched, "steps=3"]), tmp_path).train()
    first, last = read_evaluations(tmp_path)
    names = ["soft", "strict", "jpeg_compressibility"] + [
        f"misbehaving:Brightness.{metric}" for metric in ("brightness", "contrast")
    ]
    assert list(first["base"]) == list(last["tuned"]) == names
    assert math.isfinite(first["tuned"][names[-1]]) and math.isnan(last["tuned"][names[-1]])
    assert "monitors: rewards: 'misbehaving:Brightness' failed for 8 of 8 images" in capfd.readouterr().err
    assert not any("jpeg" in key or "Brightness" in key for line in read_metrics(tmp_path) for key in line)
    assert load_checkpoint(tmp_path / "checkpoints" / "best").step == 3
    assert "jpeg_compressibility" in (tmp_path / "report.html").read_text()


def test_a_monitor_that_came_later_is_shown_from_then_on(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails for all of the base's images, which are drawn once."""
    settings = ("rewards.terms=[{name: shapes, metric: soft}]", "rewards.monitors=['misbehaving:Brightness']")
    monkeypatch.setenv("MISBEHAVE", "1-2:raise")
    Trainer(load_recipe("tiny-dgpo", [*quick, *settings, "rewards.retries=0", "steps=3"]), tmp_path).train()
    first, last = read_evaluations(tmp_path)
    assert (list(first["base"]), list(last["base"])) == (["soft", "strict"], list(last["tuned"]))
    assert math.isnan(last["base"]["misbehaving:Brightness.contrast"])
    assert math.isfinite(last["tuned"]["misbehaving:Brightness.contrast"])
    assert (tmp_path / "report.html").exists()


def test_a_metric_that_cannot_be_told_is_said_once(
    tmp_path: Path, quick: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """One reward has two, and which of them is trained on its name does not tell."""
    said = (
        "brightness, contrast, soft, strict are those of misbehaving:Brightness cannot be told: name each by `metric`"
    )
    told = "rewards.terms=[{name: 'misbehaving:Brightness', metric: contrast}, {name: shapes, metric: soft}]"
    for number, changes in enumerate(([], [told])):
        Trainer(load_recipe("tiny-dgpo", [*quick, *changes, "steps=1"]), tmp_path / str(number)).train()
        assert capfd.readouterr().err.count(said) == 1 - number


def test_the_three_views_are_three(straight_run: Path) -> None:
    checkpoint = load_checkpoint(list_checkpoints(straight_run)[-1])
    policy, old, ema = (checkpoint.tensors(view) for view in ("policy", "old", "ema"))
    assert policy.keys() == old.keys() == ema.keys()
    for one, other in ((policy, old), (policy, ema), (old, ema)):
        assert not all(torch.equal(one[name], other[name]) for name in one)
    for kind in checkpoint.files:
        assert {tensor.dtype for tensor in checkpoint.tensors(kind).values()} == {torch.float32}


def test_what_others_read_of_a_checkpoint_is_the_evaluation_average(straight_run: Path) -> None:
    saved = load_checkpoint(list_checkpoints(straight_run)[-1])
    lora = load_file(saved.directory / "lora" / "pytorch_lora_weights.safetensors")
    average, policy = saved.tensors("ema"), saved.tensors("policy")
    assert lora.keys() == {f"transformer.{name}" for name in average}
    for name, value in average.items():  # alpha / rank is 8 / 4
        assert torch.equal(lora[f"transformer.{name}"], 2 * value if ".lora_B." in name else value)
    assert any(not torch.equal(policy[name], value) for name, value in average.items())


def test_samples_to_look_at_are_of_the_evaluation_average(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen = Trainer(load_recipe("tiny-dgpo", quick), tmp_path), list[str]()
    velocity = trainer.policy.engine.velocity

    def watched(view: View, x_BCHW: Tensor, conditioned: Any) -> Tensor:
        seen.append(view)
        return velocity(view, x_BCHW, conditioned)

    monkeypatch.setattr(trainer.policy.engine, "velocity", watched)
    trainer._save_samples(cast("RunDirectory", SimpleNamespace(save_samples=lambda step, images, prompts: None)))
    assert {*seen} == {"ema"}


def test_an_iteration_draws_its_own_prompts(tmp_path: Path, quick: tuple[str, ...]) -> None:
    trainer = Trainer(load_recipe("tiny-dgpo", quick), tmp_path)
    for trainer.step in (0, 1, 5):
        batch = trainer._next_prompts()
        assert batch.iteration == trainer.step and batch.prompts == tuple(trainer.prompts.draw(trainer.step))
    assert trainer.prompts.draw(0) != trainer.prompts.draw(1)


def test_steps_are_adamws_with_the_recipes_settings(tmp_path: Path, quick: tuple[str, ...]) -> None:
    settings = ("optimizer.weight_decay=0.3", "optimizer.betas=[0.7, 0.8]", "optimizer.max_grad_norm=1e9")
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, *settings]), tmp_path)
    weights = trainer.policy.trainable
    expected = torch.nn.Parameter(weights.detach().double().clone())
    eps = trainer.config.optimizer.eps
    written = torch.optim.AdamW([expected], lr=0.01, betas=(0.7, 0.8), weight_decay=0.3, eps=eps)
    for step in range(3):
        gradient = torch.randn(weights.shape, generator=torch.Generator().manual_seed(step))
        assert weights.grad is not None
        weights.grad.copy_(gradient)
        expected.grad = gradient.double()
        trainer.learner.engine.step(0.01)
        written.step()
    torch.testing.assert_close(weights.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_best_checkpoint_is_the_one_with_the_highest_score(straight_run: Path) -> None:
    scores = {line["step"]: (line["tuned"]["strict"], line["step"]) for line in read_evaluations(straight_run)[1:]}
    best = max(scores, key=lambda step: scores[step])
    assert (straight_run / "checkpoints" / "best").resolve().name == f"step-{best:06d}"


def test_stages_add_up(straight_run: Path) -> None:
    seconds = json.loads((straight_run / "stages.json").read_text())
    assert seconds.keys() >= STAGES
    for outer in ("rollout", "train"):
        inner = sum(value for name, value in seconds.items() if name.rpartition("/")[0] == outer)
        # Each is rounded to a millisecond.
        assert inner <= seconds[outer] + 1e-3 * len(seconds)


# Formulas that the trainer applies itself


def test_the_evaluation_average_is_the_written_one(tmp_path: Path, quick: tuple[str, ...]) -> None:
    """Every second step, decay = min(max_decay, (1 + step) / (10 + step)): 2/11, then 0.25 where 4/13 would be more."""
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, "evaluation_ema.max_decay=0.25"]), tmp_path)
    ema = trainer.policy.views["ema"].master
    expected, decays = ema.double(), {2: 2 / 11, 4: 0.25}
    for step in (1, 2, 3, 4):
        trainer.run_iteration()
        if step in decays:
            policy = trainer.policy.trainable.detach().double()
            expected = decays[step] * expected + (1 - decays[step]) * policy
        # The adapters' B start at zero and are 1e-4 here: atol is what float32 rounds off sums of such.
        torch.testing.assert_close(ema.double(), expected, rtol=2 * 2**-24, atol=1e-11)
    assert (ema - trainer.policy.trainable).abs().max() > 1e-5


def test_the_step_is_no_longer_than_the_clipped_gradient(tmp_path: Path, quick: tuple[str, ...]) -> None:
    """With an eps far above every gradient, Adam's first step is lr times the gradient."""
    plain = ("optimizer.lr=1", "optimizer.warmup_steps=0", "optimizer.eps=100", "optimizer.weight_decay=0")
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, *plain, "optimizer.max_grad_norm=1e-4"]), tmp_path)
    before = trainer.policy.trainable.detach().clone()
    (report,) = trainer.run_iteration()
    assert report.grad_norm > 1e-3, "before clipping"
    assert (trainer.policy.trainable - before).norm().item() == pytest.approx(1e-4 / 100, rel=1e-3)


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_are_those_of_the_recipe(std: str, tmp_path: Path, quick: tuple[str, ...]) -> None:
    rule = (f"advantages.std={std}", "advantages.epsilon=0.001", "advantages.clamp=0.5")
    scored, _ = Trainer(load_recipe("tiny-dgpo", [*quick, *rule]), tmp_path)._sample()
    reward_GS = scored.reward_B.double().numpy().reshape(2, 4)
    deviation = reward_GS.std(1, keepdims=True) if std == "group" else reward_GS.std()
    expected_GS = (reward_GS - reward_GS.mean(1, keepdims=True)) / (deviation + 0.001)
    assert np.abs(expected_GS).max() > 0.5
    np.testing.assert_allclose(scored.advantage_B.numpy(), expected_GS.clip(-0.5, 0.5).ravel(), rtol=1e-4, atol=1e-6)
    assert scored.num_advantaged == (8,)


# Samples and gradients that are not finite


def test_skipped_samples_are_counted(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reward fails for one image of the first step, and when it is asked again; the run says so and goes on."""
    monkeypatch.setenv("MISBEHAVE", "3-4:inf")
    Trainer(load_recipe("tiny-dgpo", [*quick, "steps=2", "rewards.max_failed_share=0.2"]), tmp_path).train()
    lines = read_metrics(tmp_path)
    assert [line["failed_samples"] for line in lines] == [1, 0]
    assert [line["dropped_groups"] for line in lines] == [0, 0]
    said = capfd.readouterr().err
    assert said.count("rewards: 'misbehaving:Brightness' failed for 1 of 8 images, last: returned inf\n") == 1
    assert all(line.pop("policy_loss") is None for line in lines), "what other methods minimise"
    assert all(math.isfinite(value) for line in lines for value in line.values())


@pytest.mark.parametrize("latent", [3.0, math.inf, math.nan])
def test_a_failed_sample_changes_no_gradient(
    latent: float, tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the image that no reward could be found for looks like, the step is the same to the bit."""
    config = load_recipe("tiny-dgpo", [*quick, "rewards.max_failed_share=0.2"])

    def gradient_norm(replacement: float | None) -> float:
        monkeypatch.setenv("MISBEHAVE", "1-2:nan")
        trainer = Trainer(config, tmp_path)
        draw = trainer.algorithm.rollout

        def with_another_first_image(*arguments: Any, **named: Any) -> Rollout:
            rollout = draw(*arguments, **named)
            if replacement is not None:
                rollout.x0_BCHW[0] = replacement
            return rollout

        monkeypatch.setattr(trainer.algorithm, "rollout", with_another_first_image)
        (report,) = trainer.run_iteration()
        assert report.failed_samples == 1
        return report.grad_norm

    assert gradient_norm(None) == gradient_norm(latent) > 0


def test_an_iteration_without_any_score_is_an_error(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, "rewards.max_failed_share=1"]), tmp_path)

    def nothing(images_BCHW: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        return {name: [math.nan] * len(prompts) for name in ("brightness", "soft")}

    trainer.scorer.places = {name: Here(name, nothing) for name in trainer.scorer.places}
    with pytest.raises(UserError, match="failed for 8 of 8 images, last: returned nan; no image has a valid reward"):
        trainer.run_iteration()


@pytest.mark.parametrize("algorithm", ["tiny-dgpo", "tiny-diffusion-dpo", "tiny-awm"])
def test_an_iteration_learns_from_the_other_groups_alone(
    algorithm: str, tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which too few samples are left, a group is as if it had not been drawn: gradient, losses, counts."""

    def learnt(out: str, number: int, failing: Sequence[int]) -> tuple[Tensor, StepReport]:
        """From `number` groups, the first of which are the same."""
        settings = [f"groups.per_iteration={number}", "rewards.min_group_size=3", "rewards.max_failed_share=0.5"]
        foreign = {"tiny-dgpo": (), "tiny-awm": ("algorithm.kl",)}.get(algorithm, ("algorithm.kl", "algorithm.trunc"))
        own = [key for key in quick if not key.startswith(foreign)]
        config = load_recipe(algorithm, [*own, *settings, "optimizer.max_grad_norm=1e9"])
        trainer = Trainer(config, tmp_path / out)
        gradients: list[Tensor] = []
        step, score = trainer.learner.step, trainer._score

        def failing_score(rollout: Rollout, scores: Scores) -> Any:
            scores.reward_B[list(failing)] = math.nan
            return score(rollout, scores)

        def seen_step(*arguments: Any, **named: Any) -> dict[str, Any]:
            gradients.append(trainer.policy.trainable.grad.clone())
            return step(*arguments, **named)

        monkeypatch.setattr(trainer, "_score", failing_score)
        monkeypatch.setattr(trainer.learner, "step", seen_step)
        with torch.no_grad():  # away from the base, where much is zero
            trainable = trainer.policy.trainable
            trainable.add_(torch.randn(len(trainable), generator=torch.Generator().manual_seed(0)), alpha=0.05)
            trainer.policy.refresh("policy")
        (report,) = trainer.run_iteration()
        return gradients[0], report

    alone, expected = learnt("alone", 1, [])
    gradient, report = learnt("both", 2, [4, 6])  # two of the second group's four are left, of at least three
    assert (report.failed_samples, report.dropped_groups) == (2, 1)
    assert (expected.failed_samples, expected.dropped_groups) == (0, 0)
    assert alone.norm() > 0
    assert (gradient - alone).norm() < 1e-5 * alone.norm()
    for name in ("loss", "dgpo_loss", "policy_loss", "kl", "group_weight_mean", "reward_mean", "reward_std"):
        if getattr(expected, name) is not None:
            assert getattr(report, name) == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-7), name
    assert report.zero_std_groups == expected.zero_std_groups == 0


def test_an_iteration_of_which_no_group_is_left_is_an_error(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though half of the images have a reward, and so many may fail."""
    settings = ("rewards.max_failed_share=0.5", "rewards.min_group_size=4")
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, *settings]), tmp_path)
    monkeypatch.setenv("MISBEHAVE", "1-99:nan")
    reward = load_reward("misbehaving:Brightness")  # which looks at how it is to misbehave
    trainer.scorer.places["misbehaving:Brightness"] = Here("misbehaving:Brightness", reward)
    with pytest.raises(UserError, match=r"2 of 2 groups were left out: none has rewards\.min_group_size=4 samples"):
        trainer.run_iteration()


@pytest.mark.parametrize("algorithm", ["tiny-dgpo", "tiny-flow-grpo"])
def test_a_step_of_which_no_group_is_left_is_not_made(
    algorithm: str, tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one that was made: with a gradient of zero Adam's momentum would move weights, and averages follow."""
    own = [key for key in quick if algorithm == "tiny-dgpo" or not key.startswith(("algorithm.", "model.sampling"))]
    own += ["algorithm.trained_steps=2"] if algorithm == "tiny-flow-grpo" else []
    settings = [
        "optimizer.steps_per_iteration=2", "evaluation_ema.every=1", "optimizer.weight_decay=0.1", "steps=4",
        "rewards.max_failed_share=0.5", "optimizer.max_skipped=0", "evaluation.every=0",
    ]  # fmt: skip
    trainer = Trainer(load_recipe(algorithm, [*own, *settings]), tmp_path)
    score, learn, moved = trainer._score, trainer._learn, list[bool]()

    def failing_score(rollout: Rollout, scores: Scores) -> Any:
        scores.reward_B[4:] = math.nan
        return score(rollout, scores)

    def state() -> dict[str, Tensor]:
        held = trainer.learner._held()
        return {f"{kind} {piece.name}": piece.values.clone() for kind in held for piece in held[kind].pieces}

    def watched_learn(scored: ScoredGroups, update: int) -> dict[str, Any]:
        before, made = state(), learn(scored, update)
        moved.append(any(not torch.equal(value, before[name]) for name, value in state().items()))
        return made

    monkeypatch.setattr(trainer, "_score", failing_score)
    monkeypatch.setattr(trainer, "_learn", watched_learn)
    trainer.train()
    assert moved == [True, False, True, False]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2]
    assert [line["dropped_groups"] for line in lines] == [1, 1, 1, 1]
    for key in ("loss", "grad_norm", "diversity"):
        assert [line[key] is None for line in lines] == [False, True, False, True], key
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "report.html").exists() and trainer.learner.engine.steps_made() == 2


@pytest.mark.parametrize("algorithm", ["tiny-flow-grpo", "tiny-diffusion-dpo"])
def test_a_step_that_has_nothing_to_learn_from_is_not_made(
    algorithm: str, tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All groups are tied, behind a step whose momentum would move weights."""
    own = [key for key in quick if not key.startswith(("algorithm.", "model.sampling"))]
    own += ["optimizer.steps_per_iteration=1", "optimizer.weight_decay=0.1"]
    own += ["algorithm.trained_steps=2"] if algorithm == "tiny-flow-grpo" else []
    trainer = Trainer(load_recipe(algorithm, own), tmp_path)
    (made,) = trainer.run_iteration()
    assert made.grad_norm > 0 and made.skipped_steps == 0
    score, before = trainer._score, trainer.policy.trainable.detach().clone()
    monkeypatch.setattr(trainer, "_score", lambda rollout, scores: score(rollout, tied(scores)))
    (left_out,) = trainer.run_iteration()
    assert (left_out.loss, left_out.grad_norm, left_out.skipped_steps) == (None, None, 1)
    assert left_out.zero_std_groups == trainer.config.groups.per_iteration
    assert torch.equal(trainer.policy.trainable, before) and trainer.learner.engine.steps_made() == 1


def tied(scores: Scores) -> Scores:
    scores.reward_B.fill_(0.5)
    return scores


def test_a_report_that_cannot_be_written_does_not_decide_how_a_run_ends(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A scheduler starts a run again by its exit status."""

    def full(run_dir: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dgpo_fast.run_directory.write_report", full)
    Trainer(load_recipe("tiny-dgpo", [*quick, "steps=1"]), tmp_path).train()
    assert f"{tmp_path}: the report was not written: OSError: [Errno 28] No space left" in capfd.readouterr().err
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, "steps=2"]), tmp_path, resume=True)
    trainer.interruption.received = signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143


@pytest.mark.parametrize("left_out", [False, True])
def test_an_old_policy_follows_an_iteration_and_not_its_steps(
    left_out: bool, tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of one iteration are compared with one policy, and an average that is due is not swallowed by a step
    that is not made."""
    own = [key for key in quick if not key.startswith("algorithm.")]
    own += ["algorithm.trunc=2", "algorithm.train_timesteps=2", "optimizer.steps_per_iteration=2"]
    trainer = Trainer(load_recipe("tiny-diffusion-nft", own), tmp_path)
    learn, averaged, seen = trainer._learn, trainer.policy.average_into, list[object]()

    def watched_learn(scored: ScoredGroups, update: int) -> dict[str, Any]:
        seen.append(update)
        without = dataclasses.replace(scored, num_groups=(scored.num_groups[0], 0)) if left_out else scored
        return learn(without, update)

    def watched_average(view: str, *, decay: float) -> None:
        if view == "old":
            seen.append(decay)
        averaged(view, decay=decay)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "_learn", watched_learn)
    monkeypatch.setattr(trainer.policy, "average_into", watched_average)
    assert len(trainer.run_iteration()) == len(trainer.run_iteration()) == 2
    rate = trainer.config.old_policy.rate
    assert seen == [0, 1, pytest.approx(2 * rate), 0, 1, pytest.approx(4 * rate)]


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path, quick: tuple[str, ...]) -> None:
    trainer = Trainer(load_recipe("tiny-dgpo", quick), tmp_path)
    before = trainer.policy.trainable.detach().clone()
    assert trainer.policy.trainable.grad is not None
    moments = {name: held.pieces[0].values for name, held in trainer.learner.engine.moments().items()}
    refusal = "the gradients of 3 steps in a row, the last of step 3, were not finite .*, checkpoints are intact"
    for skipped in (1, 2, 3):
        trainer.policy.trainable.grad[0] = math.inf
        if skipped == 3:  # one more than optimizer.max_skipped
            with pytest.raises(UserError, match=refusal):
                trainer.run_iteration()
        else:
            (report,) = trainer.run_iteration()
            assert (report.step, report.skipped_steps) == (skipped, skipped)
            assert not math.isfinite(report.grad_norm)
        assert all(torch.equal(trainer.policy.views[view].master, before) for view in TRAINED)
        assert not any(values.any() for values in moments.values())
        assert not trainer.policy.trainable.grad.any(), "the next step begins without it"


def test_a_step_that_is_made_begins_the_count_anew(tmp_path: Path, quick: tuple[str, ...]) -> None:
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, "optimizer.max_skipped=1"]), tmp_path)
    assert trainer.policy.trainable.grad is not None
    for step in range(1, 5):
        if step % 2:
            trainer.policy.trainable.grad[0] = math.nan
        (report,) = trainer.run_iteration()
        assert report.skipped_steps == (step + 1) // 2
    assert trainer.learner.engine.steps_made() == 2


def test_the_reference_operators_train_alike(
    straight_run: Path, quick: tuple[str, ...], child_environment: dict[str, str], tmp_path: Path
) -> None:
    """The golden run: what the fused operators compute is what their definitions in eager PyTorch compute."""
    command = [sys.executable, "-m", "dgpo_fast", "train", "tiny-dgpo", "--out", tmp_path / "run", "--steps", "2"]
    run = subprocess.run(
        [*command, *(part for override in quick if not override.startswith("steps=") for part in ("--set", override))],
        env={**child_environment, "DGPO_FAST_OPS": "reference"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "operators on cpu: " in run.stderr and "native" not in run.stderr
    fused, eager = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[:2]]
        for out in (straight_run, tmp_path / "run")
    )
    for one, other in zip(fused, eager, strict=True):
        for name in ("reward_mean", "loss", "dgpo_loss", "surrogate_loss", "kl", "group_weight_mean", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7), name
