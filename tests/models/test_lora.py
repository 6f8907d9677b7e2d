"""Adapters to begin from: whoever wrote them, the model draws what its writer's own loader draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import last_checkpoint, load_checkpoint
from dgpo_fast.config import AdapterConfig, Config
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_evaluations
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.lora import read_lora
from dgpo_fast.models.policy import TRAINED
from dgpo_fast.models.sources import EMBEDDED, LORA_FILE, PEFT_FILE
from dgpo_fast.planning import plan

RANK, ALPHA = 4, 6.0
MakePolicy = Callable[..., AdapterPolicy]


def recipe(quick: tuple[str, ...], *more: str) -> Config:
    return load_recipe("tiny-dgpo", [*quick, f"adapter.rank={RANK}", *more])


@pytest.fixture
def config(quick: tuple[str, ...]) -> Config:
    return recipe(quick, "model.sampling=same")


def transformer() -> nn.Module:
    loaded: nn.Module = StableDiffusion3Pipeline.from_pretrained(EMBEDDED, dtype=torch.float32).transformer
    return loaded


def lora_config(adapter: AdapterConfig) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(adapter.targets), init_lora_weights=False)


def random_weights(module: nn.Module) -> None:
    """Into the adapters of `module`."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def written_by_peft(directory: Path, adapter: AdapterConfig) -> nn.Module:
    """Writes an adapter with `save_pretrained`, as Flow-GRPO's authors do; the model that has it."""
    adapted = get_peft_model(transformer(), lora_config(adapter))
    random_weights(adapted)
    adapted.save_pretrained(directory)
    return adapted


def written_by_diffusers(directory: Path, adapter: AdapterConfig, *, with_config: bool) -> nn.Module:
    """Writes an adapter as diffusers' training scripts do; the model as diffusers loads it."""
    adapted = transformer()
    adapted.add_adapter(lora_config(adapter))  # type: ignore[operator]
    random_weights(adapted)
    about = {"transformer_lora_adapter_metadata": adapted.peft_config["default"].to_dict()} if with_config else {}
    StableDiffusion3Pipeline.save_lora_weights(
        directory, transformer_lora_layers=get_peft_model_state_dict(adapted), **about
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    pipeline.load_lora_weights(directory)
    loaded: nn.Module = pipeline.transformer
    return loaded


WRITERS: dict[str, Callable[[Path, AdapterConfig], nn.Module]] = {
    "peft": written_by_peft,
    "diffusers": partial(written_by_diffusers, with_config=True),
    "diffusers, alpha not named": partial(written_by_diffusers, with_config=False),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_it_computes_what_its_writer_loads(
    writer: str, config: Config, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Its alpha is not the recipe's, which is 8."""
    assert config.adapter is not None
    theirs = WRITERS[writer](tmp_path, config.adapter).eval()
    policy = make_policy(config)
    weights = read_lora(tmp_path, policy.trained.shapes, config.adapter)
    policy.set_weights("policy", torch.cat([weight.flatten() for weight in weights.values()]))
    x_BCHW = torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    timestep_B = torch.tensor([300.0, 800.0])
    conditioning = policy.model.encode(["a red circle", "a blue square"])

    def error(velocity: Tensor) -> float:
        return float((velocity - expected).norm() / expected.norm())

    with torch.no_grad():
        expected = theirs(
            hidden_states=x_BCHW, timestep=timestep_B, encoder_hidden_states=conditioning.text_BND,
            pooled_projections=conditioning.pooled_BD, return_dict=False,
        )[0]  # fmt: skip
        assert error(policy.velocity("policy", x_BCHW, timestep_B, conditioning)[0]) < 1e-5
        assert error(policy.velocity("ref", x_BCHW, timestep_B, conditioning)[0]) > 0.1


@pytest.fixture(scope="module")
def lora(straight_run: Path) -> Path:
    return last_checkpoint(straight_run) / "lora"


def test_a_run_begins_with_it_and_goes_on_without_it(
    lora: Path,
    straight_run: Path,
    quick: tuple[str, ...],
    tmp_path: Path,
    assert_ends_alike: Callable[[Path, Path], None],
) -> None:
    """Its three views are the LoRA, which scores as where it was made; the base is the base. Resuming needs no file."""
    begun = Path(shutil.copytree(lora, tmp_path / "lora"))
    config = recipe(quick, f"adapter.path={begun}")
    trainer = Trainer(config, tmp_path / "straight")
    learnt = load_checkpoint(lora.parent).tensors("ema")
    for view in TRAINED:
        weights = trainer.policy.views[view].slices(trainer.policy.views[view].master)  # type: ignore[attr-defined]
        assert all(torch.equal(weight, learnt[name]) for name, weight in weights.items()), view
    trainer.train()
    first, *_, last = read_evaluations(tmp_path / "straight")
    before = read_evaluations(straight_run)[-1]
    assert (first["step"], first["base"], first["tuned"]) == (0, before["base"], before["tuned"])
    assert first["tuned"] != first["base"] == last["base"]

    Trainer(config.model_copy(update={"steps": 3}), tmp_path / "resumed").train()
    shutil.rmtree(begun)
    Trainer(config, tmp_path / "resumed", resume=True).train()
    assert_ends_alike(tmp_path / "resumed", tmp_path / "straight")


def test_what_a_run_saves_needs_no_metadata(
    lora: Path, config: Config, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Its alpha is its rank, as others take it to be where they read of no alpha."""
    assert config.adapter is not None
    with safe_open(lora / LORA_FILE, framework="pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    settings = {key.removeprefix("transformer.") for key in said}
    assert settings == {"r", "lora_alpha", "target_modules"}, "that every peft knows: diffusers hands it all"
    save_file(load_file(lora / LORA_FILE), tmp_path / LORA_FILE)
    shapes = make_policy(config).trained.shapes
    bare, written = (read_lora(directory, shapes, config.adapter) for directory in (tmp_path, lora))
    assert all(torch.equal(bare[name], written[name]) for name in shapes)


def test_a_plan_knows_whether_it_is_there(lora: Path, quick: tuple[str, ...]) -> None:
    plan(recipe(quick, f"adapter.path={lora}"))
    with pytest.raises(UserError, match=rf"adapter.path {lora.parent}: there is no {LORA_FILE}.* {PEFT_FILE}"):
        plan(recipe(quick, f"adapter.path={lora.parent}"))


def renamed(file: Path) -> None:
    weights = load_file(file)
    first = next(iter(weights))
    save_file({**weights, "transformer.elsewhere.lora_A.weight": weights[first].clone()}, file)


def shortened(file: Path) -> None:
    weights = load_file(file)
    del weights["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"]
    save_file(weights, file)


def narrowed(file: Path) -> None:
    weights = load_file(file)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    save_file({**weights, name: weights[name][1:].clone()}, file)


def of_another_kind(file: Path) -> None:
    about = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.use_rslora": True})
    save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": about})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "it has 'elsewhere.lora_A.weight', which adapter.targets does not ask for"),
        (shortened, "it lacks 'transformer_blocks.0.attn.to_q.lora_B.weight', which adapter.targets asks for"),
        (narrowed, r"'transformer_blocks.0.attn.to_q.lora_B.weight' is of \(\d+, 4\), in this model of \(\d+, 4\)"),
        (of_another_kind, "made with use_rslora"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "cannot be read: "),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[Path], object], message: str, config: Config, lora: Path, make_policy: MakePolicy, tmp_path: Path
) -> None:
    assert config.adapter is not None
    file = Path(shutil.copytree(lora, tmp_path / "lora")) / LORA_FILE
    change(file)
    with pytest.raises(UserError, match=f"adapter.path {file.parent}.*{message}"):
        read_lora(file.parent, make_policy(config).trained.shapes, config.adapter)


def test_another_rank_is_refused(quick: tuple[str, ...], lora: Path, make_policy: MakePolicy) -> None:
    config = recipe(quick, "adapter.rank=8")
    assert config.adapter is not None
    with pytest.raises(UserError, match=r"its rank is 4, adapter\.rank 8"):
        read_lora(lora, make_policy(config).trained.shapes, config.adapter)
