"""The embedded pipeline on a CUDA GPU: it learns as on a CPU, every method trains, captured rollouts draw the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.flow.cuda_graphs import CudaGraphs
from dgpo_fast.flow.rollout import Sampler, sample_latents
from dgpo_fast.metrics import read_metrics

pytestmark = pytest.mark.gpu

METHODS = ("dgpo", "flow-grpo", "flow-grpo-fast", "diffusion-nft", "awm", "diffusion-dpo")
# Where a gradient is about zero its rounding decides the sign of a whole step of Adam, but for an eps above it.
SAME = ("model.sampling=same", "optimizer.eps=1e-3", "evaluation.every=0", "logging.samples_every=0")


def trained(recipe: str, overrides: list[str], device: str, out: Path) -> list[dict[str, float]]:
    Trainer(load_recipe(recipe, [*overrides, f"device={device}"]), out / device).train()
    return read_metrics(out / device)  # type: ignore[return-value]


def test_dgpo_learns_what_it_learns_on_a_cpu(
    quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise, in float32, convolutions too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    overrides = [*quick, *SAME, "steps=3", "checkpoints.every=3"]
    on_cpu, on_gpu = (trained("tiny-dgpo", overrides, device, tmp_path) for device in ("cpu", "cuda"))
    assert len(on_cpu) == len(on_gpu) == 3
    for mine, other in zip(on_gpu, on_cpu, strict=True):
        for key in ("reward_mean", "reward_std", "loss", "grad_norm", "group_weight_mean"):
            assert mine[key] == pytest.approx(other[key], rel=1e-2), (mine["step"], key)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_steps(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And behind the first iteration no micro-batch and no loss waits for the device."""
    overrides = [
        "groups.per_iteration=4", "groups.size=4", "optimizer.images_per_micro_batch=4", "rollout.images_per_forward=8",
        "evaluation.every=0", "logging.tensorboard=false",
    ]  # fmt: skip
    if method in ("dgpo", "diffusion-nft", "awm"):
        overrides.append("algorithm.train_timesteps=1")  # each has noise levels and streams, which it copies
    trainer = Trainer(load_recipe(f"tiny-{method}", [*overrides, "device=cuda"]), tmp_path)
    before = trainer.policy.trainable.detach().clone()  # type: ignore[attr-defined]
    reports = trainer.run_iteration()
    algorithm = trainer.algorithm
    monkeypatch.setattr(algorithm, "loss", without_waiting(algorithm.loss))
    if method != "diffusion-dpo":  # which copies them for each batch
        monkeypatch.setattr(algorithm, "batches", all_but_the_first_without_waiting(algorithm.batches))
    reports += trainer.run_iteration()
    assert all(report.grad_norm > 0 and report.skipped_steps == 0 for report in reports)
    assert not torch.equal(before, trainer.policy.trainable)  # type: ignore[attr-defined]


def without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which what waits for the device is an error."""

    def watched(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


def all_but_the_first_without_waiting(batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The batches of a pass; with the first, what all of them share comes to the device."""

    def watched(*arguments: Any, **others: Any) -> Iterator[Any]:
        made = batches(*arguments, **others)
        yield next(made)
        ask = without_waiting(lambda: next(made, None))
        while (batch := ask()) is not None:
            yield batch

    return watched


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_captured_rollout_draws_the_same_images(guidance: float, tmp_path: Path) -> None:
    config = load_recipe(
        "tiny-dgpo", ["device=cuda", "rollout.steps=3", "algorithm.trunc=2", f"rollout.guidance={guidance}"]
    )
    trainer = Trainer(config, tmp_path)
    policy, sampler, graphs = trainer.policy, Sampler.from_config(config.rollout), CudaGraphs()
    unconditional = policy.model.encode([""]) if guidance > 1 else None
    for prompts in (["a red circle"] * 5, ["two blue squares"] * 5):
        noise_BCHW = torch.randn(5, *policy.model.latent_shape, device="cuda")
        given = (policy, "policy", sampler, noise_BCHW, policy.model.encode(prompts), unconditional)
        plain = sample_latents(*given, images_per_forward=2)
        assert torch.equal(sample_latents(*given, images_per_forward=2, graphs=graphs), plain)


def test_an_iteration_with_captured_rollouts(tmp_path: Path) -> None:
    overrides = ["device=cuda", "rollout.cuda_graphs=true", "groups.per_iteration=4", "evaluation.every=0"]
    trainer = Trainer(load_recipe("tiny-dgpo", overrides), tmp_path)
    assert isinstance(trainer.algorithm, DGPO)
    reports = [trainer.run_iteration()[-1] for _ in range(2)]
    assert all(report.images_seen > 0 and report.failed_samples == 0 for report in reports)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_alone_under_zero(stage: int, quick: tuple[str, ...], tmp_path: Path) -> None:
    """NCCL, and DeepSpeed's optimizer on the device, learn what is learnt without them."""
    pytest.importorskip("deepspeed")
    overrides = [*quick, *SAME, "steps=2", "checkpoints.every=2"]
    plain = trained("tiny-dgpo", overrides, "cuda", tmp_path / "plain")
    sharded = trained("tiny-dgpo", [*overrides, f"parallel.zero_stage={stage}"], "cuda", tmp_path / "sharded")
    for mine, other in zip(sharded, plain, strict=True):
        for key in ("reward_mean", "grad_norm", "group_weight_mean"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3), (mine["step"], key)


def test_the_fused_engine_learns_what_diffusers_code_does_in_bfloat16(quick: tuple[str, ...], tmp_path: Path) -> None:
    """Through its own attention, forward and backward; a swapped argument would not be a rounding."""
    overrides = [*quick, *SAME, "steps=1", "model.dtype=bfloat16", "algorithm.clip=null"]
    found = {
        engine: trained("tiny-dgpo", [*overrides, f"model.engine={engine}"], "cuda", tmp_path / engine)
        for engine in ("fused", "eager")
    }
    for mine, other in zip(*found.values(), strict=True):
        assert mine["reward_mean"] == pytest.approx(other["reward_mean"], abs=0.05)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)
