"""PickScore: which image people would pick, of several that were made for a prompt.

Source: Kirstain et al., arXiv 2305.01569, section 3: s(x, y) = T E_txt(x) . E_img(y), of unit embeddings; weights
yuvalkirstain/PickScore_v1, 3.94 GB, a CLIP ViT-H/14 trained further. Licence: the code's is MIT
(github.com/yuvalkirstain/PickScore), the hub names none for the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_fast.reward_config import PretrainedConfig
from dgpo_fast.rewards.clip import CLIP_FILES, Clip
from dgpo_fast.rewards.pretrained import Pretrained

WEIGHTS = Pretrained(
    repo="yuvalkirstain/PickScore_v1", key="rewards.pickscore.path", files=CLIP_FILES, gigabytes=3.94,
    licence="no licence named; the code's is MIT",
)  # fmt: skip


class PickScore:
    """The model's logit, exp(logit_scale) x cosine: the scale of published tables, where 21.7 or 23.9 are typical.

    The code of Flow-GRPO and DGPO divides by 26 (flow_grpo/pickscore_scorer.py). Advantages are normalised, so only a
    recipe that adds rewards up feels that: give this one 1/26 of the published weight there.

    A prompt is cut at CLIP's 77 tokens. The tokenizer is the one that comes with the weights, whose vocabulary and
    merges are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which the authors name.
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
