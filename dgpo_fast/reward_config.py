"""The section `rewards`: which rewards score the images, and the settings of those that come with the package."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dgpo_fast.sections import Count, Index, NonNegative, Positive, Section


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


class GenEvalConfig(PretrainedConfig):
    """GenEval: `path` has the detector of objects, which leaves their colours to CLIP."""

    clip_path: str | None = None
    """A local directory with CLIP ViT-L/14; null likewise."""


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


class OcrConfig(Section):
    """The reward `ocr`: is the text that the prompt asks for in the image?"""

    threads: Count | None = None
    """Images read at a time, on a core each; null for this rank's share of the cores that the process may use."""


class JudgeConfig(Section):
    """The reward `judge`: a vision-language model behind an OpenAI-compatible server.

    Its key, where it asks for one, is the environment variable DGPO_FAST_JUDGE_KEY: a recipe is written to disk.
    """

    section: ClassVar[str] = "judge"

    url: str | None = None
    """Of the server's API, as `http://localhost:8000/v1`."""
    model: str | None = None
    """What the server calls its model."""
    template: str = "unifiedreward"
    """What is asked about an image: `unifiedreward`, `unifiedreward-2`, `deqa`, or a text of your own with {prompt}."""
    pattern: str | None = None
    """A regular expression: the answer's last match is the score, or the mean of its groups if it has several.

    Null is that of the template, which only those with a name have.
    """
    scale: tuple[float, float] | None = None
    """The worst and the best score, which become 0 and 1; null is that of the template. The worst may be the higher."""
    max_tokens: Count = 1024
    temperature: NonNegative = 0.0
    concurrency: Count = 16
    """Requests at a time."""
    timeout_s: Positive = 60.0
    """For how long the server may be silent before the request counts as failed."""
    retries: Index = 4
    """How often a request is sent again after a timeout, a lost connection or an error of the server."""
    backoff_s: NonNegative = 1.0
    """Wait before the first retry; it doubles with each one, and a random part of up to a half is taken off it."""

    @property
    def key(self) -> str:
        """Of the section, in errors."""
        return f"rewards.{self.section}"


class DeQAConfig(JudgeConfig):
    """The reward `deqa`: a judge of image quality by DeQA-Score's levels (arXiv 2501.11561), whatever was asked for."""

    section: ClassVar[str] = "deqa"
    template: str = "deqa"


class UnifiedRewardConfig(JudgeConfig):
    """The reward `unifiedreward`: a judge as UnifiedReward is asked (arXiv 2503.05236)."""

    section: ClassVar[str] = "unifiedreward"


class RewardsConfig(Section):
    """What the images are scored by: a weighted sum."""

    terms: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    on_failure: Literal["stop", "skip"] = "stop"
    """Where a reward raises or is not finite: end the run, or leave the sample out of its group and count it."""
    geneval: GenEvalConfig = GenEvalConfig()
    pickscore: PretrainedConfig = PretrainedConfig()
    ocr: OcrConfig = OcrConfig()
    judge: JudgeConfig = JudgeConfig()
    deqa: DeQAConfig = DeQAConfig()
    unifiedreward: UnifiedRewardConfig = UnifiedRewardConfig()
    clipscore: PretrainedConfig = PretrainedConfig()
    hpsv2: HPSv2Config = HPSv2Config()
    imagereward: ImageRewardConfig = ImageRewardConfig()
    aesthetic: AestheticConfig = AestheticConfig()
