"""Pipelines of random weights: real shapes, every part in place, values small, seeded and never all zero."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from dgpo_fast.models.architectures import SD35_MEDIUM, VAEShape
from dgpo_fast.models.random_weights import CLIP_TOKENS, STD, pipeline_of_shape, random_pipeline

# SD3.5-Medium but for the numbers: 2 blocks of width 64.
SHAPE = dataclasses.replace(
    SD35_MEDIUM,
    layers=2,
    heads=2,
    head_dim=32,
    dual_attention_layers=(0,),
    joint_attention_dim=48,
    pooled_dim=32,
    pos_embed_max_size=24,
    sample_size=16,
)
VAE = VAEShape(block_channels=(8, 8, 16, 16), layers_per_block=1, sample_size=64, norm_groups=4)


def small_pipeline(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> StableDiffusion3Pipeline:
    return pipeline_of_shape(SHAPE, VAE, dtype=dtype, device="cpu", seed=seed)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return small_pipeline()


def test_every_weight_is_gaussian_and_every_norm_is_one(pipeline: StableDiffusion3Pipeline) -> None:
    for module in (pipeline.transformer, pipeline.vae):
        for name, parameter in module.named_parameters():
            assert not parameter.is_meta, name
            if name.endswith("weight") and parameter.ndim == 1:
                assert torch.equal(parameter, torch.ones_like(parameter)), name
            else:
                # The deviation of n numbers is known to 1 / sqrt(2 n): five of those, for some hundred parameters.
                spread = STD * 5 / (2 * parameter.numel()) ** 0.5
                assert parameter.square().mean().sqrt().item() == pytest.approx(STD, abs=spread), name


def test_positions_are_those_of_an_ordinary_transformer(pipeline: StableDiffusion3Pipeline) -> None:
    ordinary = SD3Transformer2DModel(**SHAPE.to_config())
    buffers = dict(pipeline.transformer.named_buffers())
    assert buffers.keys() == dict(ordinary.named_buffers()).keys() == {"pos_embed.pos_embed"}
    assert torch.equal(buffers["pos_embed.pos_embed"], ordinary.pos_embed.pos_embed)


def test_weights_are_named_by_the_seed(pipeline: StableDiffusion3Pipeline) -> None:
    def weights(pipeline: StableDiffusion3Pipeline) -> list[torch.Tensor]:
        return [
            getattr(pipeline, part).get_parameter(name).detach()
            for part, name in (
                ("transformer", "proj_out.weight"),
                ("vae", "decoder.conv_out.weight"),
                ("text_encoder", "text_projection.weight"),
                ("text_encoder_2", "text_projection.weight"),
                ("text_encoder_3", "shared.weight"),
            )
        ]

    state = torch.random.get_rng_state()
    again, other = weights(small_pipeline()), weights(small_pipeline(seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for first, second, third in zip(weights(pipeline), again, other, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


def test_text_has_the_widths_of_the_real_encoders(pipeline: StableDiffusion3Pipeline) -> None:
    text, _, pooled, _ = pipeline.encode_prompt(
        "two red circles", None, None, do_classifier_free_guidance=False, max_sequence_length=128
    )
    assert text.shape == (1, CLIP_TOKENS + 128, SHAPE.joint_attention_dim)
    assert pooled.shape == (1, SHAPE.pooled_dim)
    assert pipeline.text_encoder.config.projection_dim == SHAPE.pooled_dim * 768 // 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_draws(dtype: torch.dtype) -> None:
    pipeline = small_pipeline(dtype=dtype)
    assert {p.dtype for p in (*pipeline.transformer.parameters(), *pipeline.vae.parameters())} == {dtype}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a blue square", height=64, width=64, num_inference_steps=2, max_sequence_length=16, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()
    assert images.std() > 0


@pytest.mark.slow
def test_sd35_medium_in_bfloat16() -> None:
    """The real thing, 5 GB, and one forward through it."""
    pipeline = random_pipeline("sd35-medium", dtype=torch.bfloat16, device="cpu")
    transformer = pipeline.transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) == SD35_MEDIUM.parameters
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    text, _, pooled, _ = pipeline.encode_prompt(
        "two red circles", None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert (text.shape[-1], pooled.shape[-1]) == (4096, 2048)
    with torch.no_grad():
        velocity = transformer(
            torch.randn(1, 16, 16, 16, dtype=torch.bfloat16), text.bfloat16(), pooled.bfloat16(), torch.tensor([500.0])
        ).sample
    assert velocity.shape == (1, 16, 16, 16)
    assert velocity.isfinite().all()
    assert velocity.std() > 0
