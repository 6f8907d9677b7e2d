"""Foreseen memory against the live bytes of the computation itself, on tensors without memory, and on CUDA where it is.

Live bytes are those of every storage that an operator has made and nothing has let go of: what a GPU's allocator would
hold, rounding and workspaces of kernels aside.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.count_engines import adapted_transformer, run
from dgpo_fast.config import AdapterConfig, Config, ModelConfig, load_recipe
from dgpo_fast.memory import (
    decoding_bytes,
    forward_bytes,
    modulation_bytes,
    predict_memory,
    rollout_bytes,
    training_bytes,
)
from dgpo_fast.models.architectures import SD3_VAE, SD35_LARGE, SD35_MEDIUM, TransformerShape
from dgpo_fast.models.fused.attention import ATTENTIONS, find_attention
from dgpo_fast.models.fused.transformer import FusedTransformer
from dgpo_fast.planning import plan
from dgpo_fast.records import Conditioning
from dgpo_fast.trainer import Trainer

MEDIUM = dataclasses.replace(SD35_MEDIUM, layers=5, dual_attention_layers=(0, 1, 2))
LARGE = dataclasses.replace(SD35_LARGE, layers=4)
ADAPTER = AdapterConfig()
MODES = [("fused", "none"), ("fused", "selective"), ("fused", "full"), ("eager", "none"), ("eager", "full")]
SIZES = [(512, 205), (256, 333), (768, 205)]
"""Pixels a side, and tokens of text."""
TOLERANCE = 0.05
NUM_SAMPLES = 4


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators make within it: those alive now, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._know(storage, 0)  # it was made before
        result = operator(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._know(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _know(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += num_bytes
            weakref.finalize(storage, self._forget, storage._cdata, num_bytes)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.now -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", torch would take the attention that keeps every weight."""
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value)[0]
        return original(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def model_config(engine: str, checkpointing: str, dtype: str = "bfloat16", resolution: int = 512) -> ModelConfig:
    return ModelConfig(engine=engine, checkpointing=checkpointing, dtype=dtype, resolution=resolution)  # type: ignore[arg-type]


def velocity_of(shape: TransformerShape, model: ModelConfig, device: str) -> Callable[..., Tensor]:
    """(x_BCHW, timestep_B, text_BND, pooled_BD) -> velocity, of a transformer with adapters that learn."""
    dtype = getattr(torch, model.dtype)
    with torch.device(device):
        module = adapted_transformer(shape, dtype)
        if model.engine == "eager":
            if model.checkpointing == "full":
                module.enable_gradient_checkpointing()
            return lambda *inputs: run(module, *inputs)
        attention = (
            ATTENTIONS["flash"]
            if device == "meta"
            else find_attention("auto", device=torch.device(device), dtype=dtype)
        )
        fused = FusedTransformer(
            module, attention=attention, checkpointing=model.checkpointing, rank=ADAPTER.rank, scaling=1.0
        )
        flat = torch.zeros(sum(block.num_adapter_values for block in fused.blocks), dtype=dtype).requires_grad_()
        flat.grad = torch.zeros_like(flat)

    def velocity(x_BCHW: Tensor, timestep_B: Tensor, text_BND: Tensor, pooled_BD: Tensor) -> Tensor:
        conditioning = Conditioning(text_BND=text_BND, pooled_BD=pooled_BD)
        (conditioned,) = fused.condition(timestep_B[None], conditioning)
        return fused.velocity(x_BCHW, conditioned, adapted)

    adapted = fused.adapted(flat)
    return velocity


def inputs_of(shape: TransformerShape, model: ModelConfig, text_tokens: int, device: str) -> tuple[Tensor, ...]:
    side = model.resolution // 8
    with torch.device(device):
        x_BCHW = torch.zeros(NUM_SAMPLES, shape.channels, side, side)
        text_BND = torch.zeros(NUM_SAMPLES, text_tokens, shape.joint_attention_dim)
        pooled_BD = torch.zeros(NUM_SAMPLES, shape.pooled_dim)
        timestep_B = torch.zeros(NUM_SAMPLES)
    dtype = getattr(torch, model.dtype)
    return x_BCHW.to(dtype), timestep_B, text_BND.to(dtype), pooled_BD.to(dtype)


def live_training_bytes(shape: TransformerShape, model: ModelConfig, text_tokens: int) -> float:
    """Peak of a forward and backward, for each sample."""
    velocity, inputs = velocity_of(shape, model, "meta"), inputs_of(shape, model, text_tokens, "meta")
    with LiveBytes() as live:
        output = velocity(*inputs)
        output.backward(torch.empty_like(inputs[0]))
    assert live.now <= output.nbytes  # all is let go of
    return live.peak / NUM_SAMPLES


def test_live_bytes_are_those_of_storages() -> None:
    x = torch.empty(100, device="meta")
    with LiveBytes() as live:
        x.add_(1).view(10, 10)
        assert (live.now, live.peak) == (0, 0)
        y = x + 1
        z = (y + 1)[:50]
        assert (live.now, live.peak) == (800, 800)
        del y, z
        assert (live.now, live.peak) == (0, 800)


@pytest.mark.parametrize(("resolution", "text_tokens"), SIZES)
@pytest.mark.parametrize("shape", [MEDIUM, LARGE], ids=["medium", "large"])
@pytest.mark.parametrize(("engine", "checkpointing"), MODES)
def test_training(engine: str, checkpointing: str, shape: TransformerShape, resolution: int, text_tokens: int) -> None:
    model = model_config(engine, checkpointing, resolution=resolution)
    foreseen = training_bytes(shape, shape.tokens(resolution, text_tokens), model, ADAPTER)
    assert foreseen == pytest.approx(live_training_bytes(shape, model, text_tokens), rel=TOLERANCE)


@pytest.mark.parametrize(("engine", "checkpointing"), MODES)
def test_training_in_float32(engine: str, checkpointing: str) -> None:
    model = model_config(engine, checkpointing, dtype="float32")
    foreseen = training_bytes(MEDIUM, MEDIUM.tokens(512, 205), model, ADAPTER)
    assert foreseen == pytest.approx(live_training_bytes(MEDIUM, model, 205), rel=TOLERANCE)


@pytest.mark.parametrize("shape", [SD35_MEDIUM, SD35_LARGE], ids=["medium", "large"])
def test_training_of_the_real_models_within_one_percent(shape: TransformerShape) -> None:
    model = model_config("fused", "selective")
    foreseen = training_bytes(shape, shape.tokens(512, 205), model, ADAPTER)
    assert foreseen == pytest.approx(live_training_bytes(shape, model, 205), rel=0.01)


def test_gigabytes_of_an_image_are_those_of_the_readme() -> None:
    none, selective, full = (
        training_bytes(SD35_MEDIUM, SD35_MEDIUM.tokens(512, 205), model_config("fused", mode), ADAPTER) / 1e9
        for mode in ("none", "selective", "full")
    )
    assert [f"{gigabytes:.2f}" for gigabytes in (none, selective, full)] == ["2.11", "1.14", "0.27"]


@pytest.mark.parametrize(("resolution", "text_tokens"), SIZES)
@pytest.mark.parametrize("shape", [MEDIUM, LARGE], ids=["medium", "large"])
@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_forward(engine: str, shape: TransformerShape, resolution: int, text_tokens: int) -> None:
    model = model_config(engine, "selective", resolution=resolution)
    velocity, inputs = velocity_of(shape, model, "meta"), inputs_of(shape, model, text_tokens, "meta")
    with LiveBytes() as live, torch.no_grad():
        velocity(*inputs)
    foreseen = forward_bytes(shape, shape.tokens(resolution, text_tokens), model) + modulation_bytes(shape, model)
    assert foreseen == pytest.approx(live.peak / NUM_SAMPLES, rel=TOLERANCE)


def test_modulation_of_a_trajectory() -> None:
    model, num_evaluations = model_config("fused", "selective"), 10
    with torch.device("meta"):
        module = adapted_transformer(MEDIUM, torch.bfloat16)
        fused = FusedTransformer(
            module, attention=ATTENTIONS["flash"], checkpointing="selective", rank=ADAPTER.rank, scaling=1.0
        )
    _, timestep_B, text_BND, pooled_BD = inputs_of(MEDIUM, model, 205, "meta")
    conditioning = Conditioning(text_BND=text_BND, pooled_BD=pooled_BD)
    with LiveBytes() as live:
        conditioned = fused.condition(timestep_B.expand(num_evaluations, -1), conditioning)
    text_bytes = conditioned[0].text_BND.nbytes
    each = (live.now - text_bytes) / num_evaluations / NUM_SAMPLES
    assert modulation_bytes(MEDIUM, model) == each
    assert modulation_bytes(MEDIUM, model_config("eager", "none")) == 0


def test_decoding_at_512_pixels() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SD3_VAE.to_config()).bfloat16()
        latents = torch.empty(2, 16, 64, 64, dtype=torch.bfloat16)
    with LiveBytes() as live, torch.no_grad():
        vae.decode(latents, return_dict=False)
    assert decoding_bytes(SD3_VAE, ModelConfig()) == pytest.approx(live.peak / 2, rel=TOLERANCE)


# What a recipe makes of it


def recipe(*overrides: str) -> Config:
    return load_recipe("sd35m-geneval", overrides)


def resident(*overrides: str) -> dict[str, float]:
    return predict_memory(
        recipe(*overrides), SD35_MEDIUM, SD3_VAE, text_tokens=205, images=128, has_text_encoders=True
    ).resident


@pytest.mark.parametrize(
    ("overrides", "samples", "evaluations"),
    [
        ([], 32, 14),
        (["rollout.guidance=1"], 16, 14),
        (["evaluation.steps=4"], 32, 10),
        (["rollout.solver=heun", "rollout.images_per_forward=4"], 8, 27),
    ],
)
def test_a_rollout_is_a_forward_and_all_modulation(overrides: list[str], samples: int, evaluations: int) -> None:
    """The trajectory of evaluations counts where it has more steps than that of training."""
    config, tokens = recipe(*overrides), SD35_MEDIUM.tokens(512, 205)
    each = forward_bytes(SD35_MEDIUM, tokens, config.model) + evaluations * modulation_bytes(SD35_MEDIUM, config.model)
    assert rollout_bytes(config, SD35_MEDIUM, tokens) == pytest.approx(samples * each)


def test_what_samples_are_drawn_with_is_there_all_the_time() -> None:
    small = dataclasses.replace(
        SD35_MEDIUM, layers=2, heads=1, dual_attention_layers=(0,), joint_attention_dim=32, pooled_dim=32
    )
    small = dataclasses.replace(small, pos_embed_max_size=8, sample_size=8)
    module = adapted_transformer(small, torch.float32)
    fused = FusedTransformer(module, attention=ATTENTIONS["cpu"], checkpointing="none", rank=ADAPTER.rank, scaling=1.0)
    adapted = fused.adapted(torch.zeros(sum(block.num_adapter_values for block in fused.blocks)))
    own = {projection.weight.data_ptr() for block in fused.blocks for projection in block.projections}
    copies = {
        "fp8": sum(p.fp8.values_NK.nbytes for block in fused.quantised().blocks for p in block.projections if p.fp8),
        "merged": sum(
            projection.weight.nbytes
            for block in fused.merged(adapted, torch.float32).blocks
            for projection in block.projections
            if projection.weight.data_ptr() not in own
        ),
        "bfloat16": sum(
            projection.weight.nbytes
            for block in fused.merged(adapted, torch.bfloat16).blocks
            for projection in block.projections
        ),
    }
    for sampling, num_bytes in copies.items():
        config = recipe("model.dtype=float32", f"model.sampling={sampling}")
        memory = predict_memory(config, small, SD3_VAE, text_tokens=20, images=16, has_text_encoders=False)
        assert memory.resident[f"{sampling} copy of weights"] == num_bytes
    assert not any("copy" in purpose for purpose in resident())


def test_a_batch_is_decoded_while_the_next_is_drawn() -> None:
    alone, overlapped = (
        predict_memory(recipe(), SD35_MEDIUM, SD3_VAE, text_tokens=205, images=images, has_text_encoders=False).phases
        for images in (16, 32)
    )
    assert overlapped["rollout"] == pytest.approx(alone["rollout"] + alone["VAE decoding"])


@pytest.mark.parametrize(("switch_step", "graphs"), [(0, 1), (500, 2), (1000, 1)])
def test_cuda_graphs_keep_a_rollout_for_each_view(switch_step: int, graphs: int) -> None:
    """Methods that draw through one view alone have one."""
    overrides = ("steps=1000", f"rollout.switch_step={switch_step}")
    drawn = rollout_bytes(recipe(*overrides), SD35_MEDIUM, SD35_MEDIUM.tokens(512, 205))
    assert resident(*overrides, "rollout.cuda_graphs=true")["CUDA graphs"] == graphs * drawn
    assert "CUDA graphs" not in resident(*overrides)
    awm = load_recipe("sd35m-geneval-awm", [*overrides, "rollout.cuda_graphs=true"])
    of_awm = predict_memory(awm, SD35_MEDIUM, SD3_VAE, text_tokens=205, images=128, has_text_encoders=True).resident
    assert of_awm["CUDA graphs"] == rollout_bytes(awm, SD35_MEDIUM, SD35_MEDIUM.tokens(512, 205))


def test_trajectories_are_kept_until_they_are_trained_on(tmp_path: Path) -> None:
    """As many bytes as they have, in all that an iteration does from its rollout on; not where texts are encoded."""
    sizes = ("groups.size=2", "groups.per_iteration=2", "optimizer.images_per_micro_batch=2", "model.resolution=24")

    def recipe_of(trained: int) -> Config:
        steps = (f"algorithm.trained_steps={trained}", "rollout.images_per_forward=2")
        return load_recipe("tiny-flow-grpo", [*sizes, *steps])

    trainer = Trainer(recipe_of(3), tmp_path / "run")
    rollout = trainer.algorithm.rollout(trainer.policy, "policy", trainer._next_prompts())
    assert rollout.trajectory is not None
    of_a_step = rollout.trajectory.x_SBCHW.nbytes / 4
    three, one = (plan(recipe_of(trained)).cost for trained in (3, 1))
    assert three is not None and one is not None
    assert three.memory.resident == one.memory.resident
    for phase, num_bytes in three.memory.phases.items():
        more = 0 if phase == "text encoders" else 2 * of_a_step
        assert num_bytes - one.memory.phases[phase] == pytest.approx(more), phase


def test_compiled_counts_as_eager() -> None:
    tokens = SD35_MEDIUM.tokens(512, 205)
    compiled, eager = (
        training_bytes(SD35_MEDIUM, tokens, model_config(engine, "none"), ADAPTER) for engine in ("compile", "eager")
    )
    assert compiled == eager


# A whole iteration


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_an_iteration_of_the_embedded_pipeline(checkpointing: str, tmp_path: Path) -> None:
    """Phase by phase, without what is there before the iteration."""
    sizes = ("groups.per_iteration=4", "rollout.images_per_forward=32", "evaluation.steps=10")
    config = load_recipe("tiny-dgpo", ("model.sampling=merged", f"model.checkpointing={checkpointing}", *sizes))
    trainer = Trainer(config, tmp_path / "run")
    policy, algorithm, peaks = trainer.policy, trainer.algorithm, {}
    with LiveBytes() as live:
        rollout = algorithm.rollout(policy, config.sampling_view(0), trainer._next_prompts())
        peaks["drawn"], live.peak = live.peak, live.now
        images_BCHW = policy.model.decode(rollout.x0_BCHW, images_per_forward=config.rollout.decoded_at_once)
        peaks["decoded"] = live.peak
        scores = trainer.scorer.combine([trainer.scorer.measure(images_BCHW, rollout.prompts.prompt_of_sample[:])])
        del images_BCHW
        scored, _ = trainer._score(rollout, scores)
        live.peak = live.now
        (batch,) = next(iter(algorithm.batches(scored)))
        algorithm.loss(policy, batch, None).loss.backward()
        peaks["learnt"] = live.peak
    trainer.world.leave()
    cost = plan(config).cost
    assert cost is not None
    resident, phases = cost.memory.resident, cost.memory.phases
    always = resident["latents, texts"] + resident["merged copy of weights"]
    assert always + phases["training"] == pytest.approx(peaks["learnt"], rel=2 * TOLERANCE)
    assert always + phases["rollout"] == pytest.approx(peaks["drawn"], rel=2 * TOLERANCE)
    assert always + phases["VAE decoding"] == pytest.approx(peaks["decoded"], rel=2 * TOLERANCE)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "checkpointing"), MODES)
def test_measured_on_cuda(engine: str, checkpointing: str) -> None:
    """What the allocator held at most. Twice the tolerance, or 64 MB: workspaces of attention are not foreseen."""
    model = model_config(engine, checkpointing)
    velocity, inputs = velocity_of(MEDIUM, model, "cuda"), inputs_of(MEDIUM, model, 205, "cuda")
    for _ in range(2):  # the first makes what libraries keep
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        velocity(*inputs).backward(inputs[0])
    measured = (torch.cuda.max_memory_allocated() - before) / NUM_SAMPLES
    foreseen = training_bytes(MEDIUM, MEDIUM.tokens(512, 205), model, ADAPTER)
    assert foreseen == pytest.approx(measured, rel=2 * TOLERANCE, abs=64e6 / NUM_SAMPLES)
