"""ImageReward: how people would rate an image of a prompt.

Source: Xu et al., arXiv 2304.05977; github.com/THUDM/ImageReward, ImageReward/ImageReward.py; weights
THUDM/ImageReward, 1.79 GB: BLIP's ViT-L/16, its text encoder, which looks at the image in every layer, and a linear
head. Licence: Apache 2.0, code and weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import ImageRewardConfig
from dgpo_fast.rewards.linear_head import linear_head
from dgpo_fast.rewards.loading import inference_dtype, load_model, load_tokenizer, num_layers, read_state_dict
from dgpo_fast.rewards.preprocessing import Preprocessing
from dgpo_fast.rewards.pretrained import Pretrained

CHECKPOINT, MED_CONFIG = "ImageReward.pt", "med_config.json"
WEIGHTS = Pretrained(
    repo="THUDM/ImageReward", key="rewards.imagereward.path", files=(CHECKPOINT, MED_CONFIG), gigabytes=1.79,
    licence="Apache 2.0",
)  # fmt: skip
TOKENIZER = Pretrained(
    repo="google-bert/bert-base-uncased", key="rewards.imagereward.tokenizer_path", files=("tokenizer.json",),
    gigabytes=0.0005, licence="Apache 2.0",
)  # fmt: skip

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the authors' data; the score is in units of that deviation."""
MAX_TOKENS = 35
HEAD_WIDTH = 64
"""Of BLIP's vision transformers, base and large."""
IMAGES_PER_FORWARD = 16
"""3152 tokens of 16 x 16 pixels, and as many keys and values of each text layer; while 16 images of 1024 px are resized
they take 0.4 GB."""

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
"""Of BLIP's vision transformer, and of transformers'. Its text encoder has the same names in both."""


class ImageReward:
    """The authors' normalised score: about -2 for bad images to 2 for good ones.

    The two encoders compute in float16 on CUDA and in float32 elsewhere, the head in float32. A prompt is cut at 35
    tokens, as published. It is padded to the longest of its batch instead of to 35: what is padded is masked.
    """

    def __init__(self, settings: ImageRewardConfig, *, device: torch.device) -> None:
        directory = WEIGHTS.find(settings.path)
        tokenizer = TOKENIZER.find(settings.tokenizer_path)
        self._tokenizer = load_tokenizer(BertTokenizer, tokenizer, key=TOKENIZER.key)
        file = directory / CHECKPOINT
        state = read_state_dict(file, key=WEIGHTS.key)
        try:
            vision_config = vision_config_of(state)
            text_config = text_config_of(_read_json(directory / MED_CONFIG), vision_width=vision_config.hidden_size)
        except KeyError as error:
            raise UserError(f"{WEIGHTS.key}: {directory} has no ImageReward: {error} is missing") from None
        self._device, self._dtype = device, inference_dtype(device)
        vision = load_model(
            BlipVisionModel, file, key=WEIGHTS.key, config=vision_config, state=vision_to_transformers(state)
        )
        text = load_model(
            BlipTextModel, file, key=WEIGHTS.key, config=text_config, state=_part(state, TEXT),
            options={"add_pooling_layer": False},
        )  # fmt: skip
        self._vision, self._text = vision.to(device, self._dtype), text.to(device, self._dtype)
        self._head = linear_head(state, HEAD, key=WEIGHTS.key).to(device)
        self._preprocessing = Preprocessing(size=vision_config.image_size, odd_margin="even")

    @staticmethod
    def weights(settings: ImageRewardConfig) -> list[tuple[Pretrained, str | None]]:
        """What it needs, and where the recipe says that it is."""
        return [(WEIGHTS, settings.path), (TOKENIZER, settings.tokenizer_path)]

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [B], higher is better."""
        starts = range(0, len(prompts), IMAGES_PER_FORWARD)
        pieces = [slice(start, start + IMAGES_PER_FORWARD) for start in starts]
        return torch.cat([self._score(images_BCHW[piece], prompts[piece]) for piece in pieces])

    def _score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self._preprocessing(images_BCHW.to(self._device), dtype=self._dtype)
        tokens = self._tokenizer(
            [str(prompt) for prompt in prompts], padding=True, truncation=True, max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self._device)  # fmt: skip
        seen = self._text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
            encoder_hidden_states=self._vision(pixel_values=pixels).last_hidden_state,
        )  # fmt: skip
        rating_B: Tensor = self._head(seen.last_hidden_state[:, 0].float())[:, 0]
        return (rating_B - MEAN) / STD


def vision_config_of(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """The configuration in transformers of a checkpoint's vision transformer, from the shapes of its weights.

    Raises:
        KeyError: it lacks a weight that tells.
    """
    width, _, patch, _ = state[f"{VISION}patch_embed.proj.weight"].shape
    num_positions = state[f"{VISION}pos_embed"].shape[1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state[f"{VISION}blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=num_layers(state, rf"{re.escape(VISION)}blocks\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=patch * round((num_positions - 1) ** 0.5),
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # of the published ViT; transformers' own conversions of BLIP have 1e-5
    )


def text_config_of(med: Mapping[str, Any], *, vision_width: int) -> BlipTextConfig:
    """The configuration in transformers of BLIP's text encoder, which med_config.json describes.

    Raises:
        KeyError: it lacks a setting.
    """
    copied = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
    )
    # A decoder for transformers is what has cross-attention; it is called as an encoder, and masks nothing but padding.
    return BlipTextConfig(
        **{name: med[name] for name in copied}, encoder_hidden_size=vision_width, is_decoder=True, use_cache=False
    )


def vision_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of BLIP's vision transformer under the names of transformers'."""
    renamed: dict[str, Tensor] = {}
    for name, weight in _part(state, VISION).items():
        for pattern, replacement in VISION_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{WEIGHTS.key}: {file} cannot be read: {error}") from None
    return found
