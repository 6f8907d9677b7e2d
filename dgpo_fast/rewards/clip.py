"""CLIP, which four rewards look through: embeddings of images and of texts.

Shapes: B images and prompts; P distinct prompts; D the embeddings' width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from dgpo_fast.rewards.loading import inference_dtype, load_model, load_tokenizer
from dgpo_fast.rewards.preprocessing import Preprocessing
from dgpo_fast.rewards.pretrained import Pretrained

CLIP_FILES = ("config.json", "model.safetensors", "tokenizer.json")
"""Of a directory in transformers' format, those that are read."""


def openai_clip(*, key: str) -> Pretrained:
    """OpenAI's CLIP ViT-L/14, which several rewards are made with; `key` names each one's directory."""
    return Pretrained(
        repo="openai/clip-vit-large-patch14", key=key, files=CLIP_FILES, gigabytes=1.71,
        licence="no licence named; the code's is MIT",
    )  # fmt: skip


IMAGES_PER_FORWARD = 16
"""4112 tokens of a ViT-H/14, whose products fill a GPU; while 16 images of 1024 px are resized they take 0.4 GB."""
PROMPTS_PER_FORWARD = 64
"""Of 77 tokens at most: about as many as the images'."""


class Clip:
    """The two encoders and the tokenizer. They compute in float16 on CUDA, in float32 elsewhere.

    `width` is the embeddings', `logit_scale` the factor that the model learned for cosines, exp of its parameter.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: Preprocessing, *, device: torch.device
    ) -> None:
        self.logit_scale: float = model.logit_scale.exp().item()  # before float16 has it to 3 parts in 10000
        self.width: int = model.config.projection_dim
        self._device, self._dtype = device, inference_dtype(device)
        self._model = model.to(device, self._dtype)
        self._tokenizer, self._preprocessing = tokenizer, preprocessing

    @classmethod
    def from_directory(cls, directory: Path, *, key: str, device: torch.device) -> Clip:
        """A model in transformers' format with its tokenizer; images are prepared as its own processor does.

        Raises:
            UserError: the directory, which the recipe's `key` names, has another model or a damaged one.
        """
        model = load_model(CLIPModel, directory, key=key)
        preprocessing = Preprocessing(size=model.config.vision_config.image_size)
        return cls(model, load_tokenizer(CLIPTokenizer, directory, key=key), preprocessing, device=device)

    def cosines(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine between each image and its prompt, float32 [B]."""
        return (self.embed_images(images_BCHW) * self.embed_texts(prompts)).sum(1)

    @torch.no_grad()
    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Embeddings of unit length, float32 [B, D], of images: float32 in [0, 1], on any device, B > 0."""
        return torch.cat([self._embed_images(some) for some in images_BCHW.split(IMAGES_PER_FORWARD)])

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of unit length, float32 [B, D]. A prompt that comes again is not encoded again."""
        rows: dict[str, int] = {}
        row_B = [rows.setdefault(str(prompt), len(rows)) for prompt in prompts]
        distinct = list(rows)
        starts = range(0, len(distinct), PROMPTS_PER_FORWARD)
        embedding_PD = torch.cat([self._embed_texts(distinct[at : at + PROMPTS_PER_FORWARD]) for at in starts])
        return embedding_PD[row_B]

    def _embed_images(self, images_BCHW: Tensor) -> Tensor:
        pixels = self._preprocessing(images_BCHW.to(self._device), dtype=self._dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        # Without a mask: attention is causal, and a text is read at its first end token, which precedes its padding.
        return _unit(self._model.get_text_features(input_ids=tokens.input_ids.to(self._device)).pooler_output)


def _unit(embedding_BD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embedding_BD.float(), dim=1)
