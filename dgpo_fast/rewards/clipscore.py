"""CLIPScore: how well an image fits its prompt, in the eyes of OpenAI's CLIP.

Source: Hessel et al., arXiv 2104.08718; weights openai/clip-vit-large-patch14, 1.71 GB. Licence: the code's is MIT
(github.com/openai/CLIP), the hub names none for the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_fast.reward_config import PretrainedConfig
from dgpo_fast.rewards.clip import Clip, openai_clip
from dgpo_fast.rewards.pretrained import Pretrained

WEIGHTS = openai_clip(key="rewards.clipscore.path")


class CLIPScore:
    """The model's logit, exp(logit_scale) x cosine of the image and the prompt as it stands: 100 x cosine.

    How others write the same:

    - the code of DGPO divides by 30 (flow_grpo/clip_scorer.py), and resizes linearly, in float32, where CLIP's own
      preprocessing, used here, is bicubic in 8 bits;
    - the paper gives max(2.5 cosine, 0), of a ViT-B/32 and a text that begins with "A photo depicts". Nothing is
      prepended here, since prompts are not captions, and nothing clipped: below zero there would be no order.

    A prompt is cut at 77 tokens.
    """

    def __init__(self, settings: PretrainedConfig, *, device: torch.device) -> None:
        self._clip = Clip.from_directory(WEIGHTS.find(settings.path), key=WEIGHTS.key, device=device)

    @staticmethod
    def weights(settings: PretrainedConfig) -> list[tuple[Pretrained, str | None]]:
        """What it needs, and where the recipe says that it is."""
        return [(WEIGHTS, settings.path)]

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [B], higher is better."""
        return self._clip.logit_scale * self._clip.cosines(images_BCHW, prompts)
