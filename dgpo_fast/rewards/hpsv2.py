"""HPS v2.1: which image people prefer.

Source: Wu et al., arXiv 2306.09341; github.com/tgxs002/HPSv2, hpsv2/img_score.py; weights xswu/HPSv2,
HPS_v2.1_compressed.pt, 3.94 GB, an open_clip ViT-H-14 trained further. Licence: Apache 2.0, code and weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import HPSv2Config
from dgpo_fast.rewards.clip import Clip
from dgpo_fast.rewards.loading import load_model, load_tokenizer, num_layers, read_state_dict
from dgpo_fast.rewards.preprocessing import Preprocessing
from dgpo_fast.rewards.pretrained import Pretrained

CHECKPOINT = "HPS_v2.1_compressed.pt"
WEIGHTS = Pretrained(
    repo="xswu/HPSv2", key="rewards.hpsv2.path", files=(CHECKPOINT,), gigabytes=3.94, licence="Apache 2.0"
)
TOKENIZER = Pretrained(
    repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", key="rewards.hpsv2.tokenizer_path", files=("tokenizer.json",),
    gigabytes=0.002, licence="MIT",
)  # fmt: skip

HEAD_WIDTH = {"vision": 80, "text": 64}
"""Of open_clip's ViT-H-14, the one thing that shapes of weights do not tell."""

NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"(layers\.\d+)\.ln_([12])\.", r"\1.layer_norm\2."),
    (r"(layers\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"(layers\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
    (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
)
"""Of open_clip's CLIP, and of transformers'."""
TRANSPOSED = ("visual.proj", "text_projection")
"""Factors from the right in open_clip, weights of a linear layer in transformers."""


class HPSv2:
    """The cosine of image and prompt, about 0.2 to 0.35: what `hpsv2.score(..., hps_version="v2.1")` returns.

    Images are resized as that does it, as float32 tensors, with torchvision >= 0.17, which filters before it shrinks.
    Texts are cut at 77 tokens. transformers' tokenizer has the vocabulary and the merges of open_clip's, but nothing
    like ftfy, which there straightens curly quotes and mends broken characters first: 19 of the 2048 prompts that
    Flow-GRPO evaluates PickScore on are other tokens.
    """

    def __init__(self, settings: HPSv2Config, *, device: torch.device) -> None:
        file = WEIGHTS.find(settings.path) / CHECKPOINT
        tokenizer = load_tokenizer(CLIPTokenizer, TOKENIZER.find(settings.tokenizer_path), key=TOKENIZER.key)
        published = read_state_dict(file, key=WEIGHTS.key)
        try:
            config, state = config_of(published), to_transformers(published)
        except KeyError as error:
            raise UserError(f"{WEIGHTS.key}: {file} is no open_clip ViT-H-14: {error} is missing or unknown") from None
        model = load_model(CLIPModel, file, key=WEIGHTS.key, config=config, state=state)
        preprocessing = Preprocessing(size=config.vision_config.image_size, resampling="torch", odd_margin="even")
        self._clip = Clip(model, tokenizer, preprocessing, device=device)

    @staticmethod
    def weights(settings: HPSv2Config) -> list[tuple[Pretrained, str | None]]:
        """What it needs, and where the recipe says that it is."""
        return [(WEIGHTS, settings.path), (TOKENIZER, settings.tokenizer_path)]

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [B], higher is better."""
        return self._clip.cosines(images_BCHW, prompts)


def config_of(state: Mapping[str, Tensor]) -> CLIPConfig:
    """The configuration in transformers of a checkpoint of open_clip, from the shapes of its weights.

    Raises:
        KeyError: it lacks a weight that tells.
    """
    width, _, patch, _ = state["visual.conv1.weight"].shape
    num_positions = state["visual.positional_embedding"].shape[0]
    vocabulary, text_width = state["token_embedding.weight"].shape
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": state["text_projection"].shape[1]}
    return CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        vision_config={
            "hidden_size": width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": num_layers(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "num_attention_heads": width // HEAD_WIDTH["vision"],
            "patch_size": patch,
            "image_size": patch * round((num_positions - 1) ** 0.5),
            **common,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": num_layers(state, r"transformer\.resblocks\.(\d+)\."),
            "num_attention_heads": text_width // HEAD_WIDTH["text"],
            "vocab_size": vocabulary,
            "max_position_embeddings": state["positional_embedding"].shape[0],
            # For transformers this number means: a text is read at its highest token, as open_clip reads it.
            "eos_token_id": 2,
            **common,
        },
    )


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's CLIP under the names of transformers', with q, k and v apart.

    Raises:
        KeyError: one has no counterpart: the checkpoint is of another architecture.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        new_name = name
        for pattern, replacement in NAMES:
            new_name = re.sub(pattern, replacement, new_name)
        if new_name == name and name != "logit_scale":
            raise KeyError(name)
        if ".in_proj_" in new_name:
            prefix, _, kind = new_name.partition("in_proj_")
            renamed |= {
                f"{prefix}{part}_proj.{kind}": piece for part, piece in zip("qkv", weight.chunk(3), strict=True)
            }
        else:
            renamed[new_name] = weight.T if name in TRANSPOSED else weight
    return renamed
