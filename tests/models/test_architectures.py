"""Counted parameters and FLOPs against known totals of SD3.5, and against the real modules at small sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dgpo_fast.config import PUBLISHED_TARGETS
from dgpo_fast.models.architectures import (
    SD3_VAE,
    SD35_LARGE,
    SD35_MEDIUM,
    Flops,
    Tokens,
    TransformerShape,
    VAEShape,
    text_flops,
)

SMALL = TransformerShape(
    layers=3,
    heads=2,
    head_dim=8,
    dual_attention_layers=(0, 1),
    joint_attention_dim=24,
    pooled_dim=20,
    channels=4,
    pos_embed_max_size=8,
    sample_size=8,
)
SHAPES = [
    SMALL,
    dataclasses.replace(SMALL, dual_attention_layers=()),
    dataclasses.replace(SMALL, dual_attention_layers=(1,), qk_norm=None, layers=2),
    dataclasses.replace(SMALL, layers=1, dual_attention_layers=(0,)),
]
SMALL_VAE = VAEShape(
    block_channels=(8, 16, 24, 24), layers_per_block=2, latent_channels=4, sample_size=64, norm_groups=4
)
VAES = [SMALL_VAE, dataclasses.replace(SMALL_VAE, block_channels=(8, 8, 16), layers_per_block=1)]
RANK, RESOLUTION, TEXT_TOKENS = 4, 64, 5


# Totals of the published models; parameters as in their files, FLOPs as counted for this project.
@pytest.mark.parametrize(
    ("shape", "parameters", "adapters", "tensors"),
    [(SD35_MEDIUM, "2.243", "37.55", 382), (SD35_LARGE, "8.057", "94.32", 606)],
)
def test_sizes_of_sd35(shape: TransformerShape, parameters: str, adapters: str, tensors: int) -> None:
    assert f"{shape.parameters / 1e9:.3f}" == parameters
    assert f"{shape.adapter_parameters(PUBLISHED_TARGETS, rank=64) / 1e6:.2f}" == adapters
    assert 2 * len(shape.adapted(PUBLISHED_TARGETS)) == tensors


def test_flops_of_sd35_medium() -> None:
    tokens = SD35_MEDIUM.tokens(512, 77 + 128)
    assert tokens == (1024, 205)
    forward = SD35_MEDIUM.forward_flops(tokens)
    assert [f"{part / 1e12:.3f}" for part in (forward.total, *forward)] == ["2.224", "1.917", "0.306"]
    assert f"{lora_step(SD35_MEDIUM, tokens, rank=64).total / 1e12:.2f}" == "4.84"
    assert f"{(forward + SD35_MEDIUM.full_backward_flops(tokens)).total / 1e12:.2f}" == "6.67"
    assert f"{SD35_MEDIUM.forward_flops(SD35_MEDIUM.tokens(1024, 205)).total / 1e12:.1f}" == "10.9"


def test_flops_of_sd35_large() -> None:
    tokens = SD35_LARGE.tokens(512, 77 + 128)
    forward = SD35_LARGE.forward_flops(tokens)
    assert f"{forward.total / 1e12:.2f}" == "7.18"
    assert f"{lora_step(SD35_LARGE, tokens, rank=64).total / 1e12:.1f}" == "15.2"
    assert f"{(forward + SD35_LARGE.full_backward_flops(tokens)).total / 1e12:.1f}" == "21.5"
    assert f"{SD35_LARGE.forward_flops(SD35_LARGE.tokens(1024, 205)).total / 1e12:.1f}" == "30.0"


def test_vae_and_text_of_sd3() -> None:
    assert f"{SD3_VAE.parameters / 1e6:.0f}" == "84"
    assert f"{SD3_VAE.decode_flops(512).total / 1e12:.2f}" == "2.51"
    assert f"{text_flops(128) / 1e12:.2f}" == "1.30"


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_module(shape: TransformerShape) -> None:
    module = transformer(shape)
    named = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert shape.parameters == sum(named.values())
    assert shape.position_values == sum(buffer.numel() for buffer in module.buffers())
    for linear in shape.linears:
        assert linear.parameters == named[f"{linear.name}.weight"] + named[f"{linear.name}.bias"]
    assert TransformerShape.from_config(module.config) == shape


@pytest.mark.parametrize("targets", [PUBLISHED_TARGETS, ("to_q",), ("attn2.to_v", "ff.net.2"), ("linear_1",)])
def test_adapters_are_those_that_peft_adds(targets: tuple[str, ...]) -> None:
    added = [parameter for parameter in adapted(SMALL, targets).parameters() if parameter.requires_grad]
    assert SMALL.adapter_parameters(targets, rank=RANK) == sum(parameter.numel() for parameter in added)
    assert 2 * len(SMALL.adapted(targets)) == len(added)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_flops_are_those_that_torch_counts(shape: TransformerShape) -> None:
    tokens = shape.tokens(RESOLUTION, TEXT_TOKENS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(transformer(shape), shape)
    assert shape.forward_flops(tokens).total == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
def test_training_flops_are_those_that_torch_counts(shape: TransformerShape) -> None:
    tokens = shape.tokens(RESOLUTION, TEXT_TOKENS)
    with FlopCounterMode(display=False) as counter:
        run(adapted(shape, PUBLISHED_TARGETS), shape).sum().backward()
    assert lora_step(shape, tokens, rank=RANK).total == counter.get_total_flops()


@pytest.mark.parametrize("shape", VAES)
def test_vae_is_that_of_the_module(shape: VAEShape) -> None:
    with torch.device("meta"):
        module = AutoencoderKL(**shape.to_config())
    assert shape.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert VAEShape.from_config(module.config) == shape

    side = RESOLUTION // shape.factor
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module.decode(torch.empty(1, shape.latent_channels, side, side, device="meta"))
    assert shape.decode_flops(RESOLUTION).total == counter.get_total_flops()


def lora_step(shape: TransformerShape, tokens: Tokens, *, rank: int) -> Flops:
    return (
        shape.forward_flops(tokens)
        + shape.adapter_flops(tokens, PUBLISHED_TARGETS, rank=rank)
        + shape.backward_flops(tokens, PUBLISHED_TARGETS, rank=rank)
    )


def transformer(shape: TransformerShape) -> SD3Transformer2DModel:
    with torch.device("meta"):
        return SD3Transformer2DModel(**shape.to_config())


def adapted(shape: TransformerShape, targets: tuple[str, ...]) -> SD3Transformer2DModel:
    module = transformer(shape).requires_grad_(False)
    with torch.device("meta"):
        module.add_adapter(LoraConfig(r=RANK, target_modules=list(targets)))
    return module


def run(module: SD3Transformer2DModel, shape: TransformerShape) -> torch.Tensor:
    side = RESOLUTION // 8
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        latents = torch.empty(1, shape.channels, side, side)
        text, pooled = torch.empty(1, TEXT_TOKENS, shape.joint_attention_dim), torch.empty(1, shape.pooled_dim)
        return module(latents, text, pooled, torch.empty(1)).sample
