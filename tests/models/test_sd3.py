"""The frozen model: what it encodes, predicts and decodes is what diffusers' pipeline does, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor

from dgpo_fast.config import Config, ModelConfig, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.models.sd3 import StableDiffusion3, load_model
from dgpo_fast.models.sources import EMBEDDED

MakeModel = Callable[[Config], StableDiffusion3]

EPS = torch.finfo(torch.float32).eps
TINY = load_recipe("tiny-dgpo")
PROMPTS = ["two red circles", "", "a blue square left of a green triangle"]


def model_config(name: str) -> ModelConfig:
    return TINY.model.model_copy(update={"name": name})


@pytest.fixture
def pipeline_dir(tmp_path: Path) -> Path:
    """A copy of the embedded pipeline that a test may damage."""
    return shutil.copytree(EMBEDDED, tmp_path / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_is_frozen_in_the_configured_precision(dtype: str) -> None:
    model = load_model(load_recipe("tiny-dgpo", [f"model.dtype={dtype}"]).model, device="cpu")
    modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert modules == [model.pipeline.vae, model.transformer], "the text encoders are not loaded yet"
    for module in modules:
        assert not module.training
        assert {parameter.dtype for parameter in module.parameters()} == {getattr(torch, dtype)}
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert model.latent_shape == (8, 9, 9)


def test_text_is_encoded_as_the_pipeline_does(
    make_model: MakeModel, embedded_pipeline: StableDiffusion3Pipeline
) -> None:
    found = make_model(TINY).encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        text, _, pooled, _ = embedded_pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=TINY.model.text_length
        )
        assert torch.equal(found.text_BND[[row]], text)
        assert torch.equal(found.pooled_BD[[row]], pooled)
    assert found.text_BND.shape == (3, 24, 96)
    assert not found.text_BND.requires_grad


def test_distinct_prompts_are_encoded_once(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = make_model(TINY), []
    encode_prompt = model.pipeline.encode_prompt
    monkeypatch.setattr(
        model.pipeline, "encode_prompt", lambda **options: encoded.append(options["prompt"]) or encode_prompt(**options)
    )
    conditioning = model.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert encoded == [[PROMPTS[0]], [PROMPTS[1]]]
    assert torch.equal(conditioning.text_BND[0], conditioning.text_BND[2])
    assert torch.equal(conditioning.pooled_BD[[0, 1]], model.encode(PROMPTS[:2]).pooled_BD)
    assert len(encoded) == 2


def test_conditioning_has_a_row_for_each_prompt_in_order(make_model: MakeModel) -> None:
    model = make_model(TINY)
    together = model.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = make_model(TINY).encode([prompt])
        assert torch.equal(together.text_BND[[row]], alone.text_BND)
        assert torch.equal(together.pooled_BD[[row]], alone.pooled_BD)
    picked = together[torch.tensor([2, 2, 0])]
    assert torch.equal(picked.text_BND, together.text_BND[[2, 2, 0]])
    assert torch.equal(picked.pooled_BD, together.pooled_BD[[2, 2, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_is_the_transformers_output_in_the_models_dtype(make_model: MakeModel, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    model = make_model(load_recipe("tiny-dgpo", [f"model.dtype={name}"]))
    x_BCHW = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    timestep_B, conditioning = torch.tensor([1000.0, 250.25, 3.0]), model.encode(PROMPTS)
    with torch.no_grad():
        found = model.velocity(x_BCHW, timestep_B, conditioning)
        expected = model.pipeline.transformer(
            x_BCHW.to(dtype), conditioning.text_BND, conditioning.pooled_BD, timestep_B
        ).sample
    assert found.dtype == conditioning.text_BND.dtype == conditioning.pooled_BD.dtype == dtype
    assert torch.equal(found, expected)


def test_images_are_those_of_the_pipeline(make_model: MakeModel, embedded_pipeline: StableDiffusion3Pipeline) -> None:
    """No further from float64 than twice as far as the pipeline itself: another layout has other convolutions."""
    model = make_model(TINY)
    latents = 1.5 * torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(1))

    def pipelines_images(vae: AutoencoderKL) -> Tensor:
        scaled = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        with torch.no_grad():
            return embedded_pipeline.image_processor.postprocess(vae.decode(scaled).sample, output_type="pt")

    images = model.decode(latents, images_per_forward=5)
    exact = pipelines_images(copy.deepcopy(embedded_pipeline.vae).double())
    assert images.dtype == torch.float32
    assert images.is_contiguous(), "a reward may take a view of the pixels"
    assert images.shape == (5, 3, 72, 72)
    assert images.min() >= 0
    assert images.max() <= 1
    error, theirs = (
        distance.abs().max() for distance in (images - exact, pipelines_images(embedded_pipeline.vae) - exact)
    )
    assert 0 < error <= 2 * theirs < 1e-4


@pytest.mark.parametrize("images_per_forward", [1, 2, 5, 64])
def test_decoding_a_few_at_a_time_gives_the_same_images(make_model: MakeModel, images_per_forward: int) -> None:
    model = make_model(TINY)
    latents = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    found, expected = (model.decode(latents, images_per_forward=n) for n in (images_per_forward, 5))
    # A decoder's convolutions sum some hundred products a time, in the order of whichever kernel the batch size takes.
    torch.testing.assert_close(found, expected, rtol=0, atol=128 * EPS)


def test_images_of_a_bfloat16_model_are_float32(make_model: MakeModel) -> None:
    model = make_model(load_recipe("tiny-dgpo", ["model.dtype=bfloat16"]))
    images = model.decode(torch.zeros(1, *model.latent_shape), images_per_forward=1)
    assert images.dtype == torch.float32


def test_images_too_large_for_the_position_table_are_refused(make_model: MakeModel) -> None:
    smaller = make_model(load_recipe("tiny-dgpo", ["model.resolution=48"]))
    assert smaller.latent_shape == (8, 6, 6)
    with pytest.raises(UserError, match=r"model\.resolution: expected a multiple of 24 up to 72 .*got 96"):
        make_model(load_recipe("tiny-dgpo", ["model.resolution=96"]))


def test_a_directory_loads_as_the_embedded_pipeline_does(
    pipeline_dir: Path, embedded_pipeline: StableDiffusion3Pipeline
) -> None:
    loaded = load_model(model_config(str(pipeline_dir)), device="cpu")
    for name, weight in embedded_pipeline.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], weight)


WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_3": "model.safetensors",
}


@pytest.mark.parametrize("module", WEIGHTS)
def test_missing_weights_are_one_clear_line(pipeline_dir: Path, module: str) -> None:
    (pipeline_dir / module / WEIGHTS[module]).unlink()
    with pytest.raises(UserError, match=r"^model .* cannot be loaded: .*") as error:
        load_model(model_config(str(pipeline_dir)), device="cpu").encode(["not in the cache"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", WEIGHTS)
def test_half_written_weights_are_one_clear_line(pipeline_dir: Path, module: str) -> None:
    file = pipeline_dir / module / WEIGHTS[module]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"^model .* cannot be loaded: .*") as error:
        load_model(model_config(str(pipeline_dir)), device="cpu").encode(["not in the cache"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "change"), [("transformer", "joint_attention_dim"), ("text_encoder", "hidden_size")]
)
def test_weights_of_another_shape_are_one_clear_line(pipeline_dir: Path, module: str, change: str) -> None:
    file = pipeline_dir / module / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {change: 64}))
    with pytest.raises(UserError, match=r"^model .* cannot be loaded: .*") as error:
        load_model(model_config(str(pipeline_dir)), device="cpu").encode(["not in the cache"])
    assert "\n" not in str(error.value)


def test_another_pipeline_is_refused(pipeline_dir: Path) -> None:
    index = pipeline_dir / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="is a FluxPipeline, expected a StableDiffusion3Pipeline"):
        load_model(model_config(str(pipeline_dir)), device="cpu")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (GatedRepoError, r"'some/model' is gated: accept its licence .* `hf auth login`"),
        (RepositoryNotFoundError, "'some/model' is not on the hub, or private"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception], message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise failure("403\nForbidden", response=Mock(headers={}))

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", refuse)
    with pytest.raises(UserError, match=message):
        load_model(model_config("some/model"), device="cpu")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RepositoryNotFoundError, "'some/model' is not on the hub, or private"),
        (RevisionNotFoundError, r"'some/model' has no revision 'v2': check model\.revision and model\.commit"),
        (HfHubHTTPError, r"'some/model' cannot be loaded .*: 403 Forbidden$"),
    ],
)
def test_what_diffusers_says_of_its_cache_hides_no_refusal(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception], message: str
) -> None:
    """It asks the hub of the model first, goes on without, and then has the failure only as a cause."""

    def refuse(*_: object, **__: object) -> None:
        raise failure("403\nForbidden", response=Mock(headers={}))

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils._resolve_revision", lambda *_, revision, **__: revision)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", refuse)
    with pytest.raises(UserError, match=message):
        load_model(model_config("some/model").model_copy(update={"revision": "v2"}), device="cpu")
