"""Plans: counted work against the known totals of SD3.5, memory against cards, and honest warnings."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dgpo_fast import planning, throughput
from dgpo_fast.config import load_recipe, recipe_names
from dgpo_fast.errors import UserError
from dgpo_fast.models.architectures import SD35_LARGE, SD35_MEDIUM
from dgpo_fast.models.sources import EMBEDDED
from dgpo_fast.planning import Plan, evaluations, plan, render
from dgpo_fast.prompts import load_prompts
from dgpo_fast.records import Prompt

PROMPTS = ["prompts.train=shapes:train", "prompts.test=shapes:test"]
RANDOM_GENEVAL = ["model.name=random:sd35-medium", *PROMPTS]


@pytest.fixture(autouse=True)
def alone_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(throughput, "gpu_name", lambda: None)
    monkeypatch.setattr(planning, "gpu_memory_bytes", lambda: None)
    monkeypatch.setattr(throughput, "measured_gemm", lambda: 100e9)


def planned(recipe: str, *overrides: str) -> Plan:
    return plan(load_recipe(recipe, overrides))


def shown(plan: Plan) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render(plan))
    return console.export_text()


# Forwards per image: rollout (two with guidance), reference, old policy, another of the policy for cut groups, policy.
@pytest.mark.parametrize(
    ("recipe", "overrides", "counts"),
    [
        ("sd35m-geneval", [], (20, 4, 4, 0, 4)),
        ("sd35m-geneval-cfgfree", [], (10, 8, 4, 0, 4)),
        ("sd35m-geneval-cfgfree-emaref", [], (10, 4, 4, 0, 4)),
        ("sd35m-geneval-cfgfree-emaref", ["algorithm.kl_coef=0"], (10, 0, 4, 0, 4)),
        ("sd35m-geneval", ["algorithm.clip=null"], (20, 4, 0, 0, 4)),
        ("sd35m-geneval", ["optimizer.images_per_micro_batch=4"], (20, 4, 4, 4, 4)),
        ("sd35m-geneval", ["rollout.solver=heun"], (38, 4, 4, 0, 4)),
        ("sd35m-geneval", ["algorithm.train_timesteps=2"], (20, 2, 2, 0, 2)),
        ("sd35m-pickscore", [], (20, 4, 4, 4, 4)),
    ],
)
def test_forwards_per_image(recipe: str, overrides: list[str], counts: tuple[int, ...]) -> None:
    found = evaluations(load_recipe(recipe, overrides))
    assert tuple(found.values()) == counts
    assert list(found) == ["rollout", "reference", "old policy", "group weights", "policy"]


@pytest.mark.parametrize(
    ("name", "counts", "micro_batches"),
    [
        ("flow-grpo", {"rollout": 20, "reference": 18, "policy": 18}, 9 * 1152 // 9),
        ("flow-grpo-fast", {"rollout": 10, "reference": 0, "policy": 3}, 3 * 1152 // 9),
        ("nft", {"rollout": 10, "reference": 9, "old policy": 9, "policy": 9}, 9 * 1152 // 9),
        ("awm", {"rollout": 14, "reference": 6, "old policy": 6, "policy": 6}, 6 * 1728 // 6),
        ("dpo", {"rollout": 80, "reference": 3.25, "policy": 3.25}, 39 * 16 // 16),
    ],
)
def test_forwards_per_image_of_the_baselines(name: str, counts: dict[str, float], micro_batches: int) -> None:
    """Flow-GRPO guides what it trains, two forwards each; DPO trains on two of every 24 images."""
    assert evaluations(load_recipe(f"sd35m-geneval-{name}")) == counts
    found = planned(f"sd35m-geneval-{name}", *RANDOM_GENEVAL)
    assert found.micro_batches == micro_batches
    assert f"{micro_batches} of " in shown(found)


def test_work_of_the_published_geneval_iteration() -> None:
    """11.08 PFLOP with a text encoding per image; here each prompt is encoded once, and random models count none."""
    cost = planned("sd35m-geneval", *RANDOM_GENEVAL).cost
    assert cost is not None
    text_per_image = 128 * 1.30e12
    total = cost.flops + text_per_image
    assert f"{total / 1e15:.2f}" == "11.08"
    shares = {stage.name: f"{stage.flops / total:.1%}" for stage in cost.stages if stage.flops}
    assert shares == {"rollout": "52.5%", "reference": "10.3%", "old policy": "10.5%", "policy": "22.4%", "VAE": "2.9%"}


def test_parameters_of_the_published_recipe() -> None:
    cost = planned("sd35m-geneval", *RANDOM_GENEVAL).cost
    assert cost is not None
    assert (cost.parameters, cost.trained_parameters, cost.trained_tensors) == (2_243_171_520, 37_552_128, 382)


@pytest.mark.parametrize(
    ("recipe", "model", "said"),
    [
        ("sd35m-geneval", "medium", "0.9 GB"),
        ("sd35m-geneval-full", "medium", "46 GB"),
        ("sd35l-geneval-full", "large", "161 GB"),
    ],
)
def test_a_plan_says_how_large_checkpoints_are(recipe: str, model: str, said: str) -> None:
    """By the counts of parameters: 6 x 37.6 M floats; 5 x 2.24 billion, and 5 x 8.06, with a table of positions."""
    found = planned(recipe, *RANDOM_GENEVAL, f"model.name=random:sd35-{model}")
    assert re.search(rf"every 60 steps, {said} each, up to 4 on disk", " ".join(shown(found).split()))


@pytest.mark.parametrize(
    ("ranks", "more", "said"),
    [
        (4, (), "of 16 images while the next are drawn"),
        (8, (), "after the rollout: a rank's 16 images are one forward (rollout.images_per_forward=16)"),
        (8, ("rollout.images_per_forward=8",), "of 8 images while the next are drawn"),
    ],
)
def test_a_plan_says_when_images_are_scored(ranks: int, more: tuple[str, ...], said: str) -> None:
    found = plan(load_recipe("sd35m-geneval", ["model.name=random:sd35-medium", *more]), num_ranks=ranks)
    assert dict(planning._facts(found))["scoring"].startswith(said)


def test_trained_sigmas_are_the_first_of_the_schedule() -> None:
    assert [f"{sigma:.4f}" for sigma in planned("sd35m-geneval", *RANDOM_GENEVAL).sigmas] == [
        "0.9997", "0.9639", "0.9227", "0.8746", "0.8178",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_ranks", "micro", "case", "said"),
    [
        (1, 16, "a", "1 in a"), (1, 64, "a", "4 in a"), (4, 16, "a", "1 in a"), (1, 4, "c", "cut over 4 micro-steps"),
        (2, 4, "c", "cut over 2 micro-steps"), (4, 4, "b", "over several ranks"), (8, 8, "b", "over several ranks"),
    ],
)  # fmt: skip
def test_placement(num_ranks: int, micro: int, case: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ranks that the launcher started; only what is cut over micro-steps costs another forward."""
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    found = planned("sd35m-geneval", *RANDOM_GENEVAL, f"optimizer.images_per_micro_batch={micro}")
    assert found.placement.case == case
    assert said in found.placement.why
    assert f"case ({case}): {found.placement.why}" in shown(found)
    assert evaluations(found.config, found.num_ranks)["group weights"] == (4 if case == "c" else 0)
    assert found.micro_batches == 4 * 128 // (num_ranks * micro)


def test_what_looks_at_each_image_alone_needs_no_whole_groups() -> None:
    found = planned("sd35m-geneval-nft", *RANDOM_GENEVAL)
    assert found.placement.case == "c"
    assert (
        found.placement.why == "groups are cut over 8 micro-steps: no extra work, diffusion_nft needs no whole groups"
    )
    assert "group weights" not in evaluations(found.config)


def test_a_run_lasts_as_long_as_its_iterations() -> None:
    """Flow-GRPO makes two steps in each."""
    one, two = (
        planned("tiny-flow-grpo", "steps=100", f"optimizer.steps_per_iteration={steps}", "device=cpu")
        for steps in (1, 2)
    )
    lines = [next(line for line in shown(found).splitlines() if "for 100 steps" in line) for found in (one, two)]
    minutes = [float(re.search(r"([\d.]+) min for 100 steps", line)[1]) for line in lines]  # type: ignore[index]
    assert minutes[0] == pytest.approx(2 * minutes[1], rel=0.02)


def test_what_is_too_much_all_the_time_is_not_mended_by_smaller_phases() -> None:
    (warning,) = (
        warning
        for warning in planned("sd35l-geneval-full", *PROMPTS, "model.name=random:sd35-large").warnings
        if "leaves less" in warning
    )
    assert re.search(r"of device_memory_gb: 2\d\d\.\d GB are there all the time, which more ranks", warning)


def test_ranks_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = planned("sd35m-geneval", *RANDOM_GENEVAL)
    monkeypatch.setenv("WORLD_SIZE", "4")
    together = planned("sd35m-geneval", *RANDOM_GENEVAL)
    assert (alone.micro_batches, together.micro_batches) == (32, 8)
    assert alone.cost is not None
    assert together.cost is not None
    assert alone.cost.flops == together.cost.flops
    images = [found.cost.memory.resident["latents, texts"] for found in (alone, together)]
    assert images[0] == 4 * images[1]
    with pytest.raises(UserError, match=r"24 images on each of 4 ranks, got 16; nearest that does: 12"):
        planned("sd35m-geneval", *RANDOM_GENEVAL, "groups.per_iteration=6")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"8 groups of 16 images do not divide among 3 ranks; nearest that do: 9"):
        planned("sd35m-geneval", *RANDOM_GENEVAL)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bfloat16", 2), ("float32", 4)])
def test_memory_of_the_base_follows_its_dtype(dtype: str, bytes_each: int) -> None:
    cost = planned("sd35m-geneval", *RANDOM_GENEVAL, f"model.dtype={dtype}").cost
    assert cost is not None
    assert cost.memory.resident["base transformer"] == bytes_each * (SD35_MEDIUM.parameters + 384**2 * 1536)


def test_text_encoders_leave_before_activations_come() -> None:
    """The real model needs no more than one of random weights, which has no encoders worth counting."""
    real, random = (planned("sd35m-geneval", *overrides).cost for overrides in (PROMPTS, RANDOM_GENEVAL))
    assert real is not None
    assert random is not None
    assert real.memory.phases["text encoders"] == pytest.approx(2 * (124e6 + 695e6 + 4.76e9), rel=1e-2)
    assert "text encoders" not in random.memory.phases
    assert real.memory.largest_phase == "training"
    assert real.memory.peak_bytes == random.memory.peak_bytes
    small = ("optimizer.images_per_micro_batch=1", "rollout.images_per_forward=1")
    few = planned("sd35m-geneval", *PROMPTS, *small).cost
    assert few is not None
    assert few.memory.largest_phase == "text encoders"
    assert few.memory.peak_bytes == sum(few.memory.resident.values()) + few.memory.phases["text encoders"]


def card(monkeypatch: pytest.MonkeyPatch, *, memory_gb: float) -> None:
    monkeypatch.setattr(planning, "gpu_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(planning, "gpu_memory_bytes", lambda: memory_gb * 1e9)


def about_memory(plan: Plan) -> list[str]:
    return [warning for warning in plan.warnings if "the peak of" in warning]


CARDS = {24: "full", 40: "selective", 80: "none"}


ADAPTED = [name for name in recipe_names() if name.startswith("sd35m-") and load_recipe(name).adapter is not None]


@pytest.mark.parametrize(("name", "size"), [("sd35m-geneval-full", "medium"), ("sd35l-geneval-full", "large")])
def test_full_fine_tuning_fits_the_cards_it_is_for(name: str, size: str) -> None:
    found = plan(load_recipe(name, [*PROMPTS, f"model.name=random:sd35-{size}"]), num_ranks=8)
    assert about_memory(found) == []
    assert found.cost is not None
    # Of each product both gradients: three times the forward's FLOPs, where adapters take about two.
    forwards = {stage.name: stage.flops / stage.evaluations for stage in found.cost.stages if stage.evaluations}
    assert forwards["policy"] == pytest.approx(3 * forwards["old policy"])
    text = shown(found)
    assert "100.0%" in text
    assert "on 8 ranks" in text


@pytest.mark.parametrize(("memory_gb", "checkpointing"), CARDS.items())
def test_a_cards_recipe_leaves_a_tenth_of_it(memory_gb: int, checkpointing: str) -> None:
    found = planned(f"sd35m-geneval-{memory_gb}gb", *PROMPTS)
    assert found.cost is not None
    assert found.config.device_memory_gb == memory_gb
    assert found.config.model.checkpointing == checkpointing
    assert found.cost.memory.peak_bytes < 0.9 * memory_gb * 1e9
    assert about_memory(found) == []


@pytest.mark.parametrize(("memory_gb", "checkpointing"), CARDS.items())
@pytest.mark.parametrize("recipe", ADAPTED)
def test_what_a_cards_recipe_changes_fits_every_other(recipe: str, memory_gb: int, checkpointing: str) -> None:
    changes = (f"device_memory_gb={memory_gb}", f"model.checkpointing={checkpointing}")
    assert about_memory(planned(recipe, *PROMPTS, *changes)) == []


def test_peaks_are_those_of_the_readme() -> None:
    peaks = []
    for memory_gb in CARDS:
        cost = planned(f"sd35m-geneval-{memory_gb}gb", *PROMPTS).cost
        assert cost is not None
        peaks.append(f"{cost.memory.peak_bytes / 1e9:.1f}")
    assert peaks == ["17.8", "24.8", "40.3"]


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["optimizer.images_per_micro_batch=128"], "a smaller optimizer.images_per_micro_batch"),
        (["model.checkpointing=none"], "model.checkpointing full"),
        (["rollout.images_per_forward=64"], "a smaller rollout.images_per_forward"),
        (["device_memory_gb=16"], "encoded before, on a larger card"),
    ],
)
def test_what_does_not_fit_is_a_warning_with_a_way_out(overrides: list[str], remedy: str) -> None:
    found = planned("sd35m-geneval-24gb", *PROMPTS, *overrides)
    (warning,) = about_memory(found)
    assert remedy in warning
    assert f"{found.config.device_memory_gb:.1f} GB of device_memory_gb" in warning
    assert remedy in " ".join(shown(found).split())


def test_the_card_that_is_there_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, memory_gb=24)
    assert about_memory(planned("sd35m-geneval-24gb", *PROMPTS)) == []
    (warning,) = about_memory(planned("sd35m-geneval-40gb", *PROMPTS))
    assert "24.0 GB of this NVIDIA L4" in warning
    assert about_memory(planned("sd35m-geneval", *PROMPTS, "device=cpu")) == []


def test_memory_of_a_gpu_is_asked_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for answer, memory in (("23034", 23034 * 2**20), ("[N/A]", None)):
        smi.write_text(f"#!/bin/sh\necho '{answer}'\necho '999999'\n")
        smi.chmod(0o755)
        assert throughput.gpu_memory_bytes() == memory
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert throughput.gpu_memory_bytes() is None


# Time


def test_time_comes_from_this_machine_and_says_so() -> None:
    (found,) = planned("tiny-dgpo").throughputs
    assert found.flops_per_s == throughput.CPU_SHARE * 100e9
    assert "100 GFLOP/s just measured" in found.source


def test_a_bfloat16_recipe_is_also_timed_on_the_gpu_it_is_for() -> None:
    cpu, gpu = planned("sd35m-geneval", *RANDOM_GENEVAL).throughputs
    assert "CPU" in cpu.source
    assert "1 x H100" in gpu.source
    assert "estimated, not measured" in gpu.source


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 798e12), ("NVIDIA A100-SXM4-80GB", 312e12)])
def test_a_known_gpu_is_looked_up(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gpu_name", lambda: name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = planned("sd35m-geneval", *RANDOM_GENEVAL).throughputs
    assert found.flops_per_s == 2 * throughput.GPU_SHARE * peak
    assert planned("tiny-dgpo", "device=cpu").throughputs[0].source.startswith("this machine's CPU")


def test_an_unknown_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gpu_name", lambda: "GeForce 256")
    (found,) = planned("sd35m-geneval", *RANDOM_GENEVAL).throughputs
    assert found.source.startswith("1 x H100") and found.source.endswith("; GeForce 256 is not in the table")
    plan = planned("tiny-dgpo")
    assert plan.throughputs == () and re.search(r"time +not estimated of float32 on a GPU", shown(plan))


def test_a_matrix_product_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert throughput.measured_gemm(seconds=0.01, size=64) > 1e6


# What is missing


def test_the_embedded_recipe_is_ready_to_run() -> None:
    found = planned("tiny-dgpo")
    assert found.warnings == ()
    assert "warning" not in shown(found)
    assert "embedded" in found.model


def test_a_recipe_lacks_weights_and_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    weights, train, test = planned(
        "sd35m-pickscore", "prompts.train=null", "prompts.test=null", "rewards.terms=[{name: shapes}]"
    ).warnings
    assert "hf download stabilityai/stable-diffusion-3.5-medium" in weights
    assert "no Hugging Face token" in weights
    assert "--set prompts.train=FILE" in train
    assert "--set prompts.test=FILE" in test


@pytest.mark.parametrize("recipe", ["sd35m-geneval", "sd35l-geneval-full", "sd35m-ocr"])
def test_a_published_recipe_brings_its_prompts(recipe: str) -> None:
    """Nothing but models and rewards is missing: prompts are made, with what rewards look for."""
    assert not any("prompts" in warning for warning in planned(recipe, "model.name=random:sd35-medium").warnings)
    for split in ("train", "test"):
        prompts = load_prompts(getattr(load_recipe(recipe).prompts, split), key=f"prompts.{split}")
        assert len(prompts) >= 553
        assert all(isinstance(prompt, Prompt) and prompt.metadata for prompt in prompts)


def test_weights_of_a_reward_and_a_dataset_are_named_and_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    random = "model.name=random:sd35-medium"
    detector, clip = planned("sd35m-geneval", random).warnings
    assert "reward 'geneval': " in detector and "facebook/mask2former-swin-small-coco-instance" in detector
    assert "reward 'geneval': " in clip and "openai/clip-vit-large-patch14" in clip
    warnings = planned("sd35m-pickscore", random).warnings
    for key, name in (
        ("prompts.train", "CarperAI/pickapic_v1_no_images_training_sfw"),
        ("prompts.test", "yuvalkirstain/pickapic_v1_no_images"),
    ):
        assert any(warning.startswith(f"{key}: the dataset {name} is not in the local cache") for warning in warnings)


def test_a_token_silences_the_talk_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    (weights, *_) = planned("sd35m-ocr").warnings
    assert "token found" not in weights


def test_cached_weights_are_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    cached(EMBEDDED, monkeypatch)
    found = planned("tiny-dgpo", "model.name=some/model")
    assert "local Hugging Face cache" in found.model
    assert found.warnings == ()


def shards(folder: Path, *, there: int) -> None:
    """Puts an index of two in place of an encoder's weights, and so many of them."""
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names[:there]:
        (folder / name).touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))


@pytest.mark.parametrize(
    ("interrupt", "lacks"),
    [
        (lambda model: shutil.rmtree(model / "tokenizer_2"), "tokenizer_2"),
        (lambda model: (model / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae"),
        (lambda model: (model / "text_encoder" / "config.json").unlink(), "text_encoder"),
        (lambda model: shards(model / "text_encoder_3", there=1), "text_encoder_3"),
        (lambda model: shards(model / "text_encoder_3", there=2), None),
        (
            lambda model: (model / "text_encoder" / "model.safetensors").rename(
                model / "text_encoder" / "model.fp16.safetensors"
            ),
            "text_encoder",
        ),
    ],
)
def test_a_download_that_was_interrupted_is_named(
    interrupt: Callable[[Path], object], lacks: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    interrupt(model)
    cached(model, monkeypatch)
    warnings = planned("tiny-dgpo", "model.name=some/model").warnings
    assert (lacks is None) == (warnings == ())
    if lacks is not None:
        assert warnings[0].startswith(f"some/model lacks {lacks} in the local cache: `hf download some/model ")


def cached(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the hub's cache know the files of a directory, whichever model is asked for."""
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, filename, revision: str(model / filename) if (model / filename).is_file() else None,
    )


def test_what_the_fused_engine_refuses_is_known_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    cached(model, monkeypatch)
    with pytest.raises(UserError, match=r"fused has adapters on the blocks.* asks for proj_out; use model\.engine"):
        planned("tiny-dgpo", "model.name=some/model", "adapter.targets=[attn.to_q, proj_out]")
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "qk_norm": None}))
    with pytest.raises(UserError, match=r"fused is for models with qk_norm rms_norm \(SD3\.5\), this one has None"):
        planned("tiny-dgpo", "model.name=some/model")
    planned("tiny-dgpo", "model.name=some/model", "model.engine=eager")


def test_an_unknown_hub_model_has_no_cost_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: None)
    found = planned("sd35m-ocr", "model.name=someone/their-sd3")
    assert found.cost is None
    assert "known once the model is there" in shown(found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=embeded", "did you mean 'embedded'"),
        ("prompts.train=nowhere.txt", "prompts.train: no file 'nowhere.txt'"),
        ("prompts.test=nowhere.txt", "prompts.test: no file"),
        ("prompts.test=geneval:tset", "prompts.test: no file 'geneval:tset'; did you mean 'geneval:test'"),
        ("rewards.terms=[{name: shaps}]", "no reward 'shaps'; did you mean 'shapes'"),
        ("rewards.terms=[{name: 'nowhere:Reward'}]", "'nowhere:Reward' cannot be made"),
    ],
)
def test_a_mistake_of_the_user_is_an_error(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned("tiny-dgpo", override)


@pytest.mark.parametrize("overrides", [[], ["evaluation.every=0"], ["optimizer.images_per_micro_batch=4"]])
def test_everything_of_the_plan_is_shown(overrides: list[str]) -> None:
    config = load_recipe("tiny-dgpo", overrides)
    text = shown(plan(config))
    for part in ("Plan of tiny-dgpo", "16 prompts x 8 images = 128", "0.9997", "just measured", "Work of", "Memory of"):
        assert part in text
    assert ("every 20 steps" if config.evaluation.every else "at start and end") in text
    assert ("group weights" in text) == (config.optimizer.images_per_micro_batch < 8)


def test_what_is_offloaded_is_counted_where_it_goes() -> None:
    """Weights that stage 3 shards go to the host, or to a disk, and then need no memory of either."""
    large = ["model.name=random:sd35-large", *PROMPTS, "rewards.terms=[{name: shapes}]"]

    def needed(*overrides: str) -> tuple[float, float]:
        cost = plan(load_recipe("sd35l-geneval-full", [*large, *overrides]), num_ranks=8).cost
        assert cost is not None
        return sum(cost.memory.resident.values()), sum(cost.memory.host.values())

    here, at_host = needed()
    shard = 2 * SD35_LARGE.parameters / 8
    assert at_host == 0
    assert needed("parallel.offload_weights=cpu") == pytest.approx((here - shard, shard))
    assert needed("parallel.offload_weights=nvme", "parallel.nvme_path=/disk") == pytest.approx((here - shard, 0))
    # Masters, AdamW's two averages and the old and the evaluation's; and gradients in float32.
    states = (20 + 4) * SD35_LARGE.parameters / 8
    assert needed("parallel.offload_optimizer=cpu") == pytest.approx((here - states, states))
