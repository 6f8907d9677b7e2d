"""Rewards at the size of their published models, and beside each the same score of one image, as its authors get it.

Weights are random, which speed does not feel, but for GenEval's: its detector then finds nothing, so that measuring
masks and reading colours, little beside the network, is not in its time. Weights are written in float16, half their
size, and come through the loading code of a recipe; PickScore's and HPS v2.1's, which are 4 GB, are put together in
memory instead. Tokenizers know the words of the prompts here, and have about as many tokens of them as the published.

One image is scored as Flow-GRPO's code has it (yifan123/flow_grpo: pickscore_scorer.py, imagereward_scorer.py,
aesthetic_scorer.py): a picture of Pillow's, transformers' processor, the model. HPS v2.1's package resizes tensors, as
is done here, and pads texts to 77 tokens; ImageReward's pads them to 35. GenEval, OCR and JPEG are this package's own,
called with one image. Flow-GRPO's PickScore and aesthetic predictor do take lists, which its ImageReward, OCR and JPEG
go through one by one: for the former two, one image at a time is what a loop would do, not what Flow-GRPO does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import (
    BertTokenizer,
    BlipTextModel,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dgpo_fast.models.tiny.tokenizers import train_clip_tokenizer
from dgpo_fast.records import Prompt
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards import Reward, aesthetic, hpsv2, imagereward, load_reward
from dgpo_fast.rewards.base import Values
from dgpo_fast.rewards.clip import Clip
from dgpo_fast.rewards.imagereward import ImageReward
from dgpo_fast.rewards.pickscore import PickScore
from dgpo_fast.rewards.preprocessing import Preprocessing

PROMPTS = (
    Prompt(
        'a photo of a red dog on a wooden bench beside a sign that says "Spring sale"',
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]},
    ),
    Prompt(
        'a photo of two cats in front of a shop whose window reads "Gate 13 closed"',
        {
            "tag": "two_object",
            "include": [{"class": "cat", "count": 1}, {"class": "bench", "count": 1}],
        },
    ),
)
TEXTS = ("Spring sale", "Gate 13 closed")
SIDE = 512

CLIP_L: Mapping[str, Any] = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 49408,
    },
}  # fmt: skip
CLIP_H: Mapping[str, Any] = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "vocab_size": 49408, "hidden_act": "gelu",
    },
}  # fmt: skip
BLIP: Mapping[str, int] = {"width": 1024, "layers": 24, "image_size": 224, "patch_size": 16}
"""Its vision transformer, ViT-L/16."""
MED: Mapping[str, Any] = {
    "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "pad_token_id": 0,
    "vocab_size": 30524,
}  # fmt: skip
"""Its text encoder, as med_config.json describes it."""
SWIN: Mapping[str, Any] = {
    "embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
MASK2FORMER: Mapping[str, Any] = {"num_labels": 80, "num_queries": 100}
"""The rest of the published configuration is transformers' default."""
HEAD = (1024, 128, 64, 16, 1)
"""Widths of the aesthetic predictor's layers, and of ImageReward's."""

LOADED, IN_MEMORY, NONE = "random, from files", "random, in memory", "none"
ENGINES = "of the rapidocr wheel"
One = Callable[[Tensor, str], float]
"""The score of one image, [C, H, W]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured."""

    reward: Reward
    one: One
    model: str
    weights: str


def subject(name: str, files: Path) -> Subject:
    """The reward of that name; what it loads is written under `files`, unless it lies there already."""
    transformers.utils.logging.disable_progress_bar()  # of writing; loading shows none either
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SUBJECTS[name](files)


def images_and_prompts(num: int) -> tuple[Tensor, list[str]]:
    """Two groups, each of a prompt whose text its images show over blots of all sizes: float32 [num, 3, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(0)
    blots = [
        interpolate(torch.rand(num, 3, side, side, generator=generator), (SIDE, SIDE), mode="bicubic").clamp(0, 1)
        for side in (3, 12, 60, 250)
    ]
    weights = torch.tensor([0.45, 0.3, 0.15, 0.1])
    images_BCHW = (torch.stack(blots) * weights[:, None, None, None, None]).sum(0)
    groups = [number * len(PROMPTS) // num for number in range(num)]
    written = [_written(image, TEXTS[group]) for image, group in zip(images_BCHW, groups, strict=True)]
    return torch.stack(written), [PROMPTS[group] for group in groups]


def _written(image_CHW: Tensor, text: str) -> Tensor:
    picture = _picture(image_CHW)
    ImageDraw.Draw(picture).text((40, 200), text, font=ImageFont.load_default(size=56), fill="white", stroke_width=1)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def _picture(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray((image_CHW * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


# Rewards that look through CLIP


def _clip_model(sizes: Mapping[str, Any], tokenizer: Any) -> CLIPModel:
    text = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPModel(CLIPConfig(**{**sizes, "text_config": {**sizes["text_config"], **text}})).eval()


def _clip_tokenizer() -> Any:
    tokenizer = train_clip_tokenizer(PROMPTS, pad_token="<|endoftext|>")
    tokenizer.model_max_length = 77
    return tokenizer


def _clip_files(files: Path) -> Path:
    directory = files / "clip"
    if not directory.exists():
        tokenizer = _clip_tokenizer()
        _clip_model(CLIP_L, tokenizer).half().save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


def _load(name: str, **paths: Path) -> Reward:
    """As a recipe loads it."""
    section = {key: str(path) for key, path in paths.items()}
    return load_reward(name, RewardsConfig.model_validate({"terms": [{"name": name}], name: section}))


def _clipscore(files: Path) -> Subject:
    reward: Any = _load("clipscore", path=_clip_files(files))
    one = _logit_of_one(reward._clip)
    return Subject(reward=reward, one=one, model="CLIP ViT-L/14", weights=LOADED)


def _aesthetic(files: Path) -> Subject:
    clip = _clip_files(files)
    head = _head(CLIP_L["projection_dim"], "layers.")
    torch.save(head, files / aesthetic.CHECKPOINT)
    reward: Any = _load("aesthetic", path=files, clip_path=clip)
    embed = _embedding_of_one(reward._clip)

    def one(image_CHW: Tensor, prompt: str) -> float:
        return float(reward._head(embed(image_CHW)))

    return Subject(reward=reward, one=one, model="CLIP ViT-L/14 and a head", weights=LOADED)


def _pickscore(files: Path) -> Subject:
    tokenizer = _clip_tokenizer()
    preprocessing = Preprocessing(size=CLIP_H["vision_config"]["image_size"])
    reward: Any = PickScore.__new__(PickScore)
    reward._clip = Clip(_clip_model(CLIP_H, tokenizer), tokenizer, preprocessing, device=torch.device("cpu"))
    return Subject(reward=reward, one=_logit_of_one(reward._clip), model="CLIP ViT-H/14", weights=IN_MEMORY)


def _hpsv2(files: Path) -> Subject:
    tokenizer = _clip_tokenizer()
    size = CLIP_H["vision_config"]["image_size"]
    preprocessing = Preprocessing(size=size, resampling="torch", odd_margin="even")
    reward: Any = hpsv2.HPSv2.__new__(hpsv2.HPSv2)
    clip = reward._clip = Clip(_clip_model(CLIP_H, tokenizer), tokenizer, preprocessing, device=torch.device("cpu"))

    @torch.no_grad()
    def one(image_CHW: Tensor, prompt: str) -> float:
        tensor = torch.from_numpy(np.array(_picture(image_CHW))).permute(2, 0, 1)[None] / 255
        pixels = preprocessing(tensor, dtype=torch.float32)
        image = normalize(clip._model.get_image_features(pixel_values=pixels).pooler_output)
        return float(image @ _text_of_one(clip, prompt, padding="max_length")[0])

    return Subject(reward=reward, one=one, model="CLIP ViT-H/14", weights=IN_MEMORY)


def _logit_of_one(clip: Any) -> One:
    embed = _embedding_of_one(clip)

    @torch.no_grad()
    def one(image_CHW: Tensor, prompt: str) -> float:
        text = _text_of_one(clip, prompt, padding=True)
        return float(clip._model.logit_scale.exp() * (embed(image_CHW) @ text[0]))

    return one


def _embedding_of_one(clip: Any) -> Callable[[Tensor], Tensor]:
    side = clip._model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.no_grad()
    def embed(image_CHW: Tensor) -> Tensor:
        pixels = processor(images=_picture(image_CHW), return_tensors="pt").pixel_values
        return normalize(clip._model.get_image_features(pixel_values=pixels).pooler_output)

    return embed


def _text_of_one(clip: Any, prompt: str, *, padding: bool | str) -> Tensor:
    tokens = clip._tokenizer([str(prompt)], padding=padding, truncation=True, max_length=77, return_tensors="pt")
    return normalize(clip._model.get_text_features(input_ids=tokens.input_ids).pooler_output)


def _head(width: int, prefix: str) -> dict[str, Tensor]:
    """The linear layers by their published numbers."""
    state = dict[str, Tensor]()
    for number, (wide, narrow) in zip((0, 2, 4, 6, 7), pairwise((width, *HEAD)), strict=True):
        layer = nn.Linear(wide, narrow)
        state |= {f"{prefix}{number}.{kind}": weight for kind, weight in layer.state_dict().items()}
    return state


# The others


def _imagereward(files: Path) -> Subject:
    torch.save(_imagereward_state(), files / imagereward.CHECKPOINT)
    (files / imagereward.MED_CONFIG).write_text(json.dumps(MED), encoding="utf-8")
    words = sorted({word for prompt in PROMPTS for word in prompt.replace('"', " ").lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", '"', *words]
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(files / "bert")
    reward: Any = _load("imagereward", path=files, tokenizer_path=files / "bert")
    side = BLIP["image_size"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.no_grad()
    def one(image_CHW: Tensor, prompt: str) -> float:
        pixels = processor(images=_picture(image_CHW), return_tensors="pt").pixel_values
        tokens = reward._tokenizer(
            [str(prompt)], padding="max_length", truncation=True, max_length=imagereward.MAX_TOKENS,
            return_tensors="pt",
        )  # fmt: skip
        seen = reward._text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
            encoder_hidden_states=reward._vision(pixel_values=pixels).last_hidden_state,
        )  # fmt: skip
        rating = float(reward._head(seen.last_hidden_state[:, 0]))
        return (rating - imagereward.MEAN) / imagereward.STD

    assert isinstance(reward, ImageReward)
    return Subject(reward=reward, one=one, model="BLIP ViT-L/16 and BERT-base", weights=LOADED)


def _imagereward_state() -> dict[str, Tensor]:
    """Weights by the names of the published checkpoint, in float16 but for the head."""
    config = imagereward.text_config_of(MED, vision_width=BLIP["width"])
    text = BlipTextModel(config, add_pooling_layer=False).state_dict()
    state = {f"{imagereward.TEXT}{name}": weight for name, weight in text.items()}
    width, patch = BLIP["width"], BLIP["patch_size"]
    positions = (BLIP["image_size"] // patch) ** 2 + 1
    vision = {
        "cls_token": torch.randn(1, 1, width), "pos_embed": 0.02 * torch.randn(1, positions, width),
        **_state(nn.Conv2d(3, width, patch), "patch_embed.proj."), **_state(nn.LayerNorm(width), "norm."),
    }  # fmt: skip
    for number in range(BLIP["layers"]):
        block = f"blocks.{number}."
        for part, layer in {
            "norm1": nn.LayerNorm(width), "attn.qkv": nn.Linear(width, 3 * width),
            "attn.proj": nn.Linear(width, width), "norm2": nn.LayerNorm(width),
            "mlp.fc1": nn.Linear(width, 4 * width), "mlp.fc2": nn.Linear(4 * width, width),
        }.items():  # fmt: skip
            vision |= _state(layer, f"{block}{part}.")
    state |= {f"{imagereward.VISION}{name}": weight for name, weight in vision.items()}
    half = {name: weight.half() if weight.is_floating_point() else weight for name, weight in state.items()}
    return half | _head(MED["hidden_size"], imagereward.HEAD)


def _state(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": weight for name, weight in layer.state_dict().items()}


def _geneval(files: Path) -> Subject:
    config = Mask2FormerConfig(backbone_config=SwinConfig(**SWIN), **MASK2FORMER)
    model = Mask2FormerForUniversalSegmentation(config)
    model.half().save_pretrained(files / "detector")
    reward = _load("geneval", path=files / "detector", clip_path=_clip_files(files))
    return Subject(reward=reward, one=_ours(reward), model="Mask2Former Swin-S and CLIP ViT-L/14", weights=LOADED)


def _ocr(files: Path) -> Subject:
    reward = _load("ocr")
    return Subject(reward=reward, one=_ours(reward), model="PP-OCRv6, small", weights=ENGINES)


def _jpeg(files: Path) -> Subject:
    reward = load_reward("jpeg_compressibility", RewardsConfig(terms=(RewardConfig(name="jpeg_compressibility"),)))
    return Subject(reward=reward, one=_ours(reward), model="none", weights=NONE)


def _ours(reward: Reward) -> One:
    return lambda image_CHW, prompt: float(first_metric(reward(image_CHW[None], [prompt]))[0])


def first_metric(scores: Values | Mapping[str, Values]) -> Values:
    """What is trained on where a recipe names no metric."""
    return next(iter(scores.values())) if isinstance(scores, Mapping) else scores


SUBJECTS: Mapping[str, Callable[[Path], Subject]] = {
    "pickscore": _pickscore,
    "clipscore": _clipscore,
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
    "geneval": _geneval,
    "ocr": _ocr,
    "jpeg_compressibility": _jpeg,
}
