"""Names of models: what each resolves to, and what a wrong one is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.models import sources
from dgpo_fast.models.architectures import SD35_LARGE, SD35_MEDIUM, TransformerShape, VAEShape
from dgpo_fast.models.sources import ModelSource, cached_file, find_model, transformer_shape, vae_shape

SHAPE = TransformerShape(
    layers=2,
    heads=2,
    head_dim=8,
    dual_attention_layers=(0,),
    joint_attention_dim=24,
    pooled_dim=16,
    pos_embed_max_size=16,
    sample_size=8,
)
VAE = VAEShape(block_channels=(8, 16), layers_per_block=1, sample_size=16, norm_groups=4)


@pytest.fixture
def pipeline_dir(tmp_path: Path) -> Path:
    """The configuration files of a pipeline, without weights."""
    directory = tmp_path / "model"
    write_json(directory / "model_index.json", {"_class_name": "StableDiffusion3Pipeline"})
    write_json(directory / "transformer" / "config.json", SHAPE.to_config())
    write_json(directory / "vae" / "config.json", VAE.to_config())
    return directory


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def test_embedded_is_the_pipeline_of_the_package(pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "EMBEDDED", pipeline_dir)
    assert find_model("embedded") == ModelSource(kind="embedded", location=str(pipeline_dir))
    assert transformer_shape(find_model("embedded")) == SHAPE


@pytest.mark.parametrize(("name", "shape"), [("sd35-medium", SD35_MEDIUM), ("sd35-large", SD35_LARGE)])
def test_random_names_have_shapes(name: str, shape: TransformerShape) -> None:
    source = find_model(f"random:{name}")
    assert source == ModelSource(kind="random", location=name)
    assert transformer_shape(source) == shape
    assert vae_shape(source) == VAEShape()


def test_a_directory_is_read(pipeline_dir: Path) -> None:
    source = find_model(str(pipeline_dir))
    assert source.kind == "directory"
    assert transformer_shape(source) == SHAPE
    assert vae_shape(source) == VAE
    assert cached_file(source, "vae/config.json") == pipeline_dir / "vae" / "config.json"
    assert cached_file(source, "vae/weights") is None


@pytest.mark.parametrize("size", ["medium", "large"])
def test_known_hub_names_have_shapes_before_a_download(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: None)
    source = find_model(f"stabilityai/stable-diffusion-3.5-{size}")
    assert source.kind == "hub"
    assert transformer_shape(source) == {"medium": SD35_MEDIUM, "large": SD35_LARGE}[size]


def test_an_unknown_hub_name_has_a_shape_once_it_is_cached(pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: dict[str, str] = {}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repository, filename, revision: cache.get(filename)
    )
    source = find_model("someone/their-sd3")
    assert transformer_shape(source) is None
    assert vae_shape(source) == VAEShape()

    cache["transformer/config.json"] = str(pipeline_dir / "transformer" / "config.json")
    assert transformer_shape(source) == SHAPE


def test_a_cached_hub_model_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repository, filename, revision: str(tmp_path / filename)
    )
    with pytest.raises(UserError, match="is a FluxPipeline"):
        find_model("someone/their-flux")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embeded", "did you mean 'embedded'"),
        ("random:sd35-medum", "did you mean 'random:sd35-medium'"),
        ("random:flux", "random:sd35-medium, random:sd35-large"),
        ("no/such/directory", "expected embedded"),
        ("../elsewhere", "expected embedded"),
        (__file__, "is a file"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_model(name)


def test_a_directory_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        find_model(str(tmp_path))


def test_a_pipeline_of_another_class_is_named(pipeline_dir: Path) -> None:
    write_json(pipeline_dir / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
    with pytest.raises(UserError, match="is a StableDiffusionXLPipeline, expected a StableDiffusion3Pipeline"):
        find_model(str(pipeline_dir))


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_index_is_one_line(pipeline_dir: Path, text: str) -> None:
    (pipeline_dir / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=r"model_index\.json") as error:
        find_model(str(pipeline_dir))
    assert "\n" not in str(error.value)


def test_a_pipeline_without_a_transformer_is_refused(pipeline_dir: Path) -> None:
    (pipeline_dir / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"no transformer/config\.json"):
        find_model(str(pipeline_dir))
