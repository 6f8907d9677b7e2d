"""LAION's aesthetic predictor: how beautiful an image is, whatever its prompt.

Source: github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py; the head
sac+logos+ava1-l14-linearMSE.pth, 3.7 MB, from there or from its copy on the hub, over the image embeddings of
openai/clip-vit-large-patch14, 1.71 GB. Licence: the head's is Apache 2.0; for CLIP, see clipscore.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import AestheticConfig
from dgpo_fast.rewards.clip import Clip, openai_clip
from dgpo_fast.rewards.linear_head import linear_head
from dgpo_fast.rewards.loading import read_state_dict
from dgpo_fast.rewards.pretrained import Pretrained

CHECKPOINT = "sac+logos+ava1-l14-linearMSE.pth"
HEAD = Pretrained(
    repo="camenduru/improved-aesthetic-predictor", key="rewards.aesthetic.path", files=(CHECKPOINT,), gigabytes=0.0037,
    licence="Apache 2.0",
)  # fmt: skip
CLIP = openai_clip(key="rewards.aesthetic.clip_path")


class Aesthetic:
    """The predicted mean rating on a scale from 1 to 10, of an image embedding of unit length; prompts are not read.

    The head is computed in float32. Images are prepared as transformers' CLIPProcessor does it, as in DDPO and
    Flow-GRPO; OpenAI's own preprocessing cuts images that are no squares one pixel later, in one of four sizes.
    """

    def __init__(self, settings: AestheticConfig, *, device: torch.device) -> None:
        file = HEAD.find(settings.path) / CHECKPOINT
        self._head = linear_head(read_state_dict(file, key=HEAD.key), "layers.", key=HEAD.key).to(device)
        self._clip = Clip.from_directory(CLIP.find(settings.clip_path), key=CLIP.key, device=device)
        if self._clip.width != self._head[0].in_features:
            raise UserError(
                f"{CLIP.key}: embeddings of {self._clip.width} numbers, where the head of {file} expects "
                f"{self._head[0].in_features}; expected the model {CLIP.repo}"
            )

    @staticmethod
    def weights(settings: AestheticConfig) -> list[tuple[Pretrained, str | None]]:
        """What it needs, and where the recipe says that it is."""
        return [(HEAD, settings.path), (CLIP, settings.clip_path)]

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [B], higher is better."""
        rating_B1: Tensor = self._head(self._clip.embed_images(images_BCHW))
        return rating_B1[:, 0]
