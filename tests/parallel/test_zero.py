"""Training under ZeRO 1, 2 and 3 on two ranks is training on one. One launch makes nearly all runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import Checkpoint, last_checkpoint, list_checkpoints, load_checkpoint
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_evaluations, read_metrics
from dgpo_fast.parallel.zero import deepspeed_config

STEPS, SAVED = 5, 3
Saved = Callable[..., Mapping[str, Tensor]]
Distance = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]
KINDS = {"adapters": (), "full": ("adapter=null", "model.engine=eager")}
STAGES = (0, 1, 2, 3)
SAME_SAMPLING = "model.sampling=same"
PATIENCE_S = 1500

# Adam divides by the root of its second average: where a gradient is about zero, its rounding decides the sign of a
# whole step. An eps above such gradients keeps weights as close as gradients are.
COMMON = (
    f"steps={STEPS}", f"checkpoints.every={SAVED}", "checkpoints.keep_last=9", "evaluation.every=0",
    "algorithm.train_timesteps=2", "model.resolution=24", "evaluation.images_per_prompt=1",
    "optimizer.eps=1e-3", "optimizer.lr=1e-3",
    f"parallel.timeout_s={PATIENCE_S}", SAME_SAMPLING,
    "rewards.terms=[{name: 'misbehaving:Brightness'}]", "logging.samples_every=0",
)  # fmt: skip

# From what run, on how many ranks, under what stage another goes on.
RESUMED = {
    "adapters, same": ("adapters-2", 2, 2),
    "adapters, 3 to 1": ("adapters-3", 2, 1),
    "adapters, 1 to one rank": ("adapters-1", 1, 0),
    "full, same": ("full-3", 2, 3),
    "full, same 2": ("full-2", 2, 2),
    "full, 2 to 3": ("full-2", 2, 3),
    "full, 3 to 1": ("full-3", 2, 1),
    "full, 3 to one rank": ("full-3", 1, 3),
    "full, 0 to one rank": ("full-0", 1, 0),
}


@pytest.fixture(scope="module")
def overrides(quick: tuple[str, ...]) -> tuple[str, ...]:
    return (*quick, *COMMON)


def of_kind(overrides: tuple[str, ...], kind: str, stage: int, *more: str) -> list[str]:
    return [*overrides, *KINDS[kind], f"parallel.zero_stage={stage}", *more]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, overrides: tuple[str, ...], train_on_ranks: Callable[..., None]
) -> Path:
    """Runs by name: `adapters-2` is of adapters on two ranks under ZeRO 2, `adapters` on one rank, and so on."""
    root = tmp_path_factory.mktemp("zero")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in KINDS:
        Trainer(load_recipe("tiny-dgpo", of_kind(overrides, kind, 0)), root / kind).train()
    lora = f"adapter.path={last_checkpoint(root / 'adapters') / 'lora'}"
    Trainer(load_recipe("tiny-dgpo", of_kind(overrides, "adapters", 0, lora)), root / "lora").train()
    plans: list[dict[str, Any]] = [
        plan(root / f"{kind}-{stage}", of_kind(overrides, kind, stage)) for kind in KINDS for stage in STAGES
    ]
    plans += [plan(root / f"lora-{stage}", of_kind(overrides, "adapters", stage, lora)) for stage in (2, 3)]
    low = ("model.dtype=bfloat16", "steps=1", "algorithm.clip=null")
    plans += [plan(root / f"low-{stage}", of_kind(overrides, "full", stage, *low)) for stage in STAGES]
    for kind, stage in (("adapters", 1), ("full", 0), ("full", 2), ("full", 3)):
        plans.append(plan(root / f"nan-{kind}-{stage}", of_kind(overrides, kind, stage, "steps=3"), nan_in_step=1))
    for stage in (1, 2):
        spoilt = of_kind(overrides, "full", stage, *low, "steps=3", "parallel.offload_optimizer=cpu")
        plans.append(plan(root / f"nan-low-offloaded-{stage}", spoilt, nan_in_step=1))
    offloaded = ("parallel.offload_optimizer=cpu", "parallel.offload_weights=cpu")
    for stage in (1, 2, 3):
        changed = of_kind(overrides, "full", stage, *offloaded[: 2 if stage == 3 else 1])
        plans.append(plan(root / f"offloaded-{stage}", changed))
    spoilt = of_kind(overrides, "full", 1, *low, "steps=3")
    plans.append(plan(root / "nan-low-1", spoilt, nan_in_step=1))
    # No layer is so small that it stays whole, as in large models none is: blocks are computed again from shards.
    sharded = (
        "parallel.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        "model.checkpointing=full",
    )
    for rollout in ("gathered", "replica"):
        changed = of_kind(overrides, "full", 3, f"parallel.rollout={rollout}", *sharded)
        plans.append(plan(root / f"again-{rollout}", changed))
    plans.append(plan(root / "sharded", of_kind(overrides, "full", 3, "parallel.frozen=sharded")))
    train_on_ranks(plans, 2)

    continued: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (origin, num_ranks, stage) in RESUMED.items():
        shutil.copytree(root / origin, root / name, symlinks=True)
        shutil.rmtree(root / name / "checkpoints" / f"step-{STEPS:06d}")
        (root / name / "checkpoints" / "best").unlink()
        changed = of_kind(overrides, origin.partition("-")[0], stage)
        continued[num_ranks].append(plan(root / name, changed, resume=True))
    for num_ranks, plans in continued.items():
        train_on_ranks(plans, num_ranks)
    torch.set_num_threads(threads)
    return root


def plan(out: Path, overrides: list[str], **more: Any) -> dict[str, Any]:
    return {"out": out, "overrides": overrides, **more}


@cache
def checkpoint(run: Path, step: int = STEPS) -> Checkpoint:
    return load_checkpoint(run / "checkpoints" / f"step-{step:06d}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_two_ranks_are_those_of_one(
    runs: Path, saved: Saved, distance: Distance, kind: str, stage: int
) -> None:
    one, two = runs / kind, runs / f"{kind}-{stage}"
    start = saved(one, "policy", SAVED)
    assert distance(start, saved(one, "policy")) > 1e-4, "two steps apart they are further apart"
    for view in ("policy", "old", "ema"):
        assert distance(saved(two, view), saved(one, view)) < 1e-5, view


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_begin_with_the_same_lora(runs: Path, saved: Saved, distance: Distance, stage: int) -> None:
    assert distance(saved(runs / "lora", "policy"), saved(runs / "adapters", "policy")) > 1e-4
    for view in ("policy", "old", "ema"):
        assert distance(saved(runs / f"lora-{stage}", view), saved(runs / "lora", view)) < 1e-5, view


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_from_the_same(runs: Path, kind: str, stage: int) -> None:
    """Of equal weights, to rounding. Later 1e-5 may lie between them, and group scores are `beta`, a hundred, times
    differences of errors that are about one: 1e-3."""
    one, two = read_metrics(runs / kind), read_metrics(runs / f"{kind}-{stage}")
    assert len(one) == len(two) == STEPS
    for mine, other in zip(two, one, strict=True):
        rel = 1e-4 if mine["step"] == 1 else 1e-3
        for key in ("reward_mean", "reward_std", "loss", "dgpo_loss", "grad_norm", "group_weight_mean"):
            assert mine[key] == pytest.approx(other[key], rel=rel), (mine["step"], key)


@pytest.mark.parametrize("rollout", ["gathered", "replica"])
def test_layers_gathered_one_by_one_draw_and_learn_the_same(
    runs: Path, saved: Saved, distance: Distance, rollout: str
) -> None:
    """With a replica or none, and blocks that are computed again in the backward pass, from weights gathered again."""
    assert distance(saved(runs / f"again-{rollout}", "policy"), saved(runs / "full", "policy")) < 1e-5


def test_a_base_and_an_old_policy_in_shards_teach_the_same(runs: Path, saved: Saved, distance: Distance) -> None:
    """Evaluated, clipped and compared with, gathered at every use; the samples are the sharded old policy's, too."""
    for view in ("policy", "old", "ema"):
        assert distance(saved(runs / "sharded", view), saved(runs / "full", view)) < 1e-5
    evaluations = [read_evaluations(runs / name)[-1]["tuned"]["brightness"] for name in ("sharded", "full")]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_what_is_offloaded_to_the_host_steps_alike(runs: Path, saved: Saved, distance: Distance, stage: int) -> None:
    for view in ("policy", "old", "ema"):
        assert distance(saved(runs / f"offloaded-{stage}", view), saved(runs / "full", view)) < 1e-5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{zero_optimization: {stage: 2}}", "zero_optimization.stage: the recipe decides this by parallel.zero_stage"),
        ("{gradient_clipping: 5.0}", "gradient_clipping: the recipe decides this by optimizer.max_grad_norm"),
        ("{optimizer: {type: SGD}}", "optimizer: the recipe decides this by optimizer"),
        ("{fp16: {enabled: true}}", "fp16: the recipe decides this by model.dtype"),
        ("{zero_optimization: {offload_optimizer: {device: cpu}}}", "decides this by parallel.offload_optimizer"),
        ("{wall_clock_brakedown: true}", "unknown key 'wall_clock_brakedown'; did you mean 'wall_clock_breakdown'?"),
    ],
)  # fmt: skip
def test_what_the_recipe_decides_and_what_nobody_reads_is_refused(
    overrides: tuple[str, ...], given: str, said: str
) -> None:
    config = load_recipe("tiny-dgpo", of_kind(overrides, "full", 1, f"parallel.deepspeed={given}"))
    with pytest.raises(UserError, match=re.escape(said)):
        deepspeed_config(config, is_low=False, num_values=1000)


@pytest.mark.parametrize("name", ["adapters-1", "full-3", "sharded"])
def test_deepspeed_waits_as_long_as_we_do(runs: Path, name: str) -> None:
    assert [float((runs / name / f"patience-{rank}.txt").read_text()) for rank in (0, 1)] == [PATIENCE_S] * 2


def test_weights_go_where_the_recipe_says(overrides: tuple[str, ...]) -> None:
    nvme = ("parallel.offload_weights=nvme", "parallel.nvme_path=/disk", "parallel.deepspeed={aio: {queue_depth: 4}}")
    found = deepspeed_config(
        load_recipe("tiny-dgpo", of_kind(overrides, "full", 3, *nvme)), is_low=False, num_values=1000
    )
    where = {"device": "nvme", "nvme_path": "/disk", "pin_memory": torch.cuda.is_available()}
    assert found["zero_optimization"]["offload_param"] == where
    assert found["aio"] == {"queue_depth": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_clips_gradients_as_the_recipe_says(kind: str, overrides: tuple[str, ...]) -> None:
    config = load_recipe("tiny-dgpo", of_kind(overrides, kind, 1, "optimizer.max_grad_norm=0.25"))
    assert deepspeed_config(config, is_low=False, num_values=1000)["gradient_clipping"] == 0.25


def test_what_is_passed_through_reaches_deepspeed(overrides: tuple[str, ...]) -> None:
    given = "{wall_clock_breakdown: true, zero_optimization: {overlap_comm: true, reduce_bucket_size: 500}}"
    config = load_recipe("tiny-dgpo", of_kind(overrides, "full", 2, f"parallel.deepspeed={given}"))
    found = deepspeed_config(config, is_low=True, num_values=1000)
    assert found["wall_clock_breakdown"] is True
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 500}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    plain = load_recipe("tiny-dgpo", of_kind(overrides, "full", 2))
    assert deepspeed_config(plain, is_low=False, num_values=1000)["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.parametrize(
    ("given", "said"),
    [("allgather_bucket_size: many", "allgather_bucket_size"), ("round_robin_gradients: true", "in an order that")],
)
def test_a_bad_layout_ends_in_a_line(
    overrides: tuple[str, ...], child_environment: dict[str, str], tmp_path: Path, given: str, said: str
) -> None:
    """What DeepSpeed refuses, and what it would take but lay out as no checkpoint knows."""
    wrong = of_kind(overrides, "full", 1, f"parallel.deepspeed={{zero_optimization: {{{given}}}}}")
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dgpo_fast",
         "train", "tiny-dgpo", "--out", tmp_path / "run", *(f"--set={item}" for item in wrong)],
        env={**child_environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode != 0
    lines = [line for line in process.stderr.splitlines() if "error: parallel.deepspeed: " in line]
    assert lines and said in lines[0]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_under_another_stage_or_number_of_ranks(
    runs: Path, saved: Saved, distance: Distance, name: str
) -> None:
    origin, num_ranks, stage = RESUMED[name]
    is_same = num_ranks == 2 and origin.endswith(f"-{stage}")
    for kind in checkpoint(runs / origin).files:
        mine, straight = saved(runs / name, kind), saved(runs / origin, kind)
        if is_same:
            assert all(torch.equal(tensor, straight[key]) for key, tensor in mine.items())
        elif kind in ("policy", "old", "ema"):
            assert distance(mine, straight) < 1e-5
    assert checkpoint(runs / name).values["adam_steps"] == STEPS


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bfloat16_steps_are_those_of_replicas(
    runs: Path, saved: Saved, distance: Distance, stage: int, embedded_pipeline: StableDiffusion3Pipeline
) -> None:
    """One step, from equal weights: its direction differs by how bfloat16 gradients add up."""
    replicas, sharded = (saved(runs / f"low-{s}", "policy") for s in (0, stage))
    start = {name: p.bfloat16().float() for name, p in embedded_pipeline.transformer.named_parameters()}
    assert distance(sharded, replicas) < 0.05 * distance(start, replicas)
    norms = [read_metrics(runs / f"low-{s}")[0]["grad_norm"] for s in (0, stage)]
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)


@pytest.mark.parametrize(
    "name",
    ["nan-adapters-1", "nan-full-0", "nan-full-2", "nan-full-3", "nan-low-1", "nan-low-offloaded-1",
     "nan-low-offloaded-2"],
)  # fmt: skip
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(runs: Path, name: str) -> None:
    lines = read_metrics(runs / name)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    spoilt = checkpoint(runs / name, 3)
    if "low" not in name:
        assert lines[0]["grad_norm"] == read_metrics(runs / name.removeprefix("nan-"))[0]["grad_norm"]
    assert spoilt.values["adam_steps"] == 2
    assert all(tensor.isfinite().all() for kind in spoilt.files for tensor in spoilt.tensors(kind).values())


def test_every_file_is_read_by_its_format(runs: Path, saved: Saved) -> None:
    """The evaluation average of full fine-tuning is a transformer of diffusers, whoever wrote which piece."""
    from diffusers import SD3Transformer2DModel

    directory = list_checkpoints(runs / "full-3")[-1]
    transformer = SD3Transformer2DModel.from_pretrained(directory / "transformer")
    ema = saved(runs / "full-3", "ema")
    assert {name: parameter.shape for name, parameter in transformer.named_parameters()} == {
        name: tensor.shape for name, tensor in ema.items()
    }
    assert all(torch.equal(parameter, ema[name]) for name, parameter in transformer.named_parameters())
