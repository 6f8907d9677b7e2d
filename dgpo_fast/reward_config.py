"""The section `rewards`: which rewards score the images, and the settings of those that come with the package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dgpo_fast.sections import Count, Section


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


class OcrConfig(Section):
    """The reward `ocr`: is the text that the prompt asks for in the image?"""

    threads: Count | None = None
    """Images read at a time, on a core each; null for this rank's share of the cores that the process may use."""


class RewardsConfig(Section):
    """What the images are scored by: a weighted sum."""

    terms: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    on_failure: Literal["stop", "skip"] = "stop"
    """Where a reward raises or is not finite: end the run, or leave the sample out of its group and count it."""
    pickscore: PretrainedConfig = PretrainedConfig()
    ocr: OcrConfig = OcrConfig()
