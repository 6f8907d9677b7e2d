"""The section `rewards`: which rewards score the images, and the settings of those that come with the package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dgpo_fast.sections import Section


class RewardConfig(Section):
    """One reward: a registered name, or `package.module:Class` (or a function) of your own."""

    name: str
    metric: str | None = None
    """Which of its metrics is trained on; null takes the first."""
    weight: float = 1.0


class PretrainedConfig(Section):
    """A reward whose model is downloaded from the Hugging Face hub, unless it lies in a directory."""

    path: str | None = None
    """A local directory with the weights; null takes the Hugging Face cache, or downloads them."""


class HPSv2Config(PretrainedConfig):
    """HPS v2.1, whose checkpoint comes without the tokenizer of the model that it began from."""

    tokenizer_path: str | None = None
    """A local directory with CLIP's tokenizer.json; null likewise."""


class ImageRewardConfig(PretrainedConfig):
    """ImageReward, whose checkpoint comes without BERT's tokenizer."""

    tokenizer_path: str | None = None
    """A local directory with the tokenizer.json of bert-base-uncased; null likewise."""


class AestheticConfig(PretrainedConfig):
    """The aesthetic predictor: `path` has its head, which sees images through CLIP."""

    clip_path: str | None = None
    """A local directory with CLIP ViT-L/14; null likewise."""


class RewardsConfig(Section):
    """What the images are scored by: a weighted sum."""

    terms: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    on_failure: Literal["stop", "skip"] = "stop"
    """Where a reward raises or is not finite: end the run, or leave the sample out of its group and count it."""
    pickscore: PretrainedConfig = PretrainedConfig()
    clipscore: PretrainedConfig = PretrainedConfig()
    hpsv2: HPSv2Config = HPSv2Config()
    imagereward: ImageRewardConfig = ImageRewardConfig()
    aesthetic: AestheticConfig = AestheticConfig()
