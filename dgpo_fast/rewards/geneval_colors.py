"""The colours of objects, by CLIP: whichever of ten an object's crop is most like.

An object is cut out: what is not of its mask becomes the grey #999, and what is left its bounding box. CLIP's vision
encoder sees that as OpenAI's processing prepares it, enlarged by Pillow's bicubic resampling; its text encoder has read
three sentences for each colour. Embeddings are normalised, their mean over a colour's sentences normalised again.

Sources: djghosh13/geneval, evaluation/evaluate_images.py (sentences, colours, grey); LAION's CLIP_benchmark 1.4.0,
metrics/zeroshot_classification.py (the ensemble); open_clip 2.20 (preprocessing). Departures: the encoders compute in
float32, where CLIP_benchmark lets CUDA round to float16.
DGPO's own copy of the server loads OpenAI's weights into open_clip's ViT-L-14 without its QuickGELU, another activation
than they were trained with; this has the right one, as GenEval does.

Shapes: K crops, D the embeddings' width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from dgpo_fast.prompts.geneval import COLORS
from dgpo_fast.rewards.clip import openai_clip
from dgpo_fast.rewards.loading import load_model, load_tokenizer
from dgpo_fast.rewards.preprocessing import Preprocessing

WEIGHTS = openai_clip(key="rewards.geneval.clip_path")

SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99
CROPS_PER_FORWARD = 32


class Crop(NamedTuple):
    """An object to be looked at."""

    name: str  # of its class
    levels_CHW: Tensor  # the whole image: float32, whole numbers from 0 to 255
    mask_HW: Tensor  # bool
    box: tuple[int, int, int, int]


class ColorReader:
    """CLIP, and what it has read of each class's colours."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._size: int = model.config.vision_config.image_size
        self._embedding_of: dict[str, Tensor] = {}

    @classmethod
    def from_directory(cls, directory: Path, *, device: torch.device) -> ColorReader:
        """The model and the tokenizer in a directory in transformers' format.

        Raises:
            UserError: they cannot be read.
        """
        model = load_model(CLIPModel, directory, key=WEIGHTS.key)
        return cls(model.to(device), load_tokenizer(CLIPTokenizer, directory, key=WEIGHTS.key))

    @torch.no_grad()
    def __call__(self, crops: Sequence[Crop]) -> list[str]:
        """The colour of each crop."""
        places: list[int] = []
        for first in range(0, len(crops), CROPS_PER_FORWARD):
            some = crops[first : first + CROPS_PER_FORWARD]
            image_KD = self._embed_images(torch.stack([prepare(crop, size=self._size) for crop in some]))
            color_KND = torch.stack([self.embed_colors(crop.name) for crop in some])
            places += torch.einsum("kd,knd->kn", image_KD, color_KND).argmax(1).tolist()
        return [COLORS[place] for place in places]

    @torch.no_grad()
    def embed_colors(self, name: str) -> Tensor:
        """What each colour of a class is like, a row each: float32 [10, D], of unit length."""
        if name not in self._embedding_of:
            texts = [sentence.format(color=color, name=name) for color in COLORS for sentence in SENTENCES]
            embedding = self._embed_texts(texts).unflatten(0, (len(COLORS), len(SENTENCES)))
            self._embedding_of[name] = normalize(embedding.mean(1), dim=-1)
        return self._embedding_of[name]

    def _embed_images(self, pixels: Tensor) -> Tensor:
        features = self._model.get_image_features(pixel_values=pixels.to(self._model.device))
        return normalize(features.pooler_output, dim=-1)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._model.device)
        # Without a mask: attention is causal, and a text is read at its first end token, which precedes its padding.
        return normalize(self._model.get_text_features(input_ids=tokens.input_ids).pooler_output, dim=-1)


def prepare(crop: Crop, *, size: int) -> Tensor:
    """CLIP's input of a crop, float32 [3, size, size]: the shorter side made `size` pixels, the middle of it."""
    left, top, right, bottom = crop.box
    levels_CHW = crop.levels_CHW[:, top:bottom, left:right].where(crop.mask_HW[top:bottom, left:right], GREY)
    preprocessing = Preprocessing(size=size, odd_margin="even")
    return preprocessing(levels_CHW[None] / 255, dtype=torch.float32)[0]


def name_colors(reader: ColorReader, asked: Iterable[Sequence[Crop]]) -> list[list[str]]:
    """The colours of several lists of crops, read together."""
    lists = [*asked]
    colors = iter(reader([crop for crops in lists for crop in crops]))
    return [[next(colors) for _ in crops] for crops in lists]
