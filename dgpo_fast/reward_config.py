"""The section `rewards`: which rewards score the images, and the settings of those that come with the package."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dgpo_fast.errors import suggest
from dgpo_fast.sections import Count, Index, NonNegative, Positive, Section


class RewardConfig(Section):
    """One reward: a registered name, or `package.module:Class` (or a function) of your own."""

    name: str
    metric: str | None = None
    """Which of its metrics is trained on; null takes the first."""
    weight: float = 1.0

    @property
    def title(self) -> str:
        """What it is logged as."""
        return self.name if self.metric is None else f"{self.name}.{self.metric}"


class PretrainedConfig(Section):
    """A reward whose model is downloaded from the Hugging Face hub, unless it lies in a directory."""

    path: str | None = None
    """A local directory with the weights; null takes the Hugging Face cache, or downloads them."""


class RunningConfig(Section):
    """Where a reward runs: in this process, in processes of its own, or behind HTTP."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Of its model, to which the images are moved; `auto` is the policy's."""
    processes: Count | None = None
    """Worker processes of this machine, for each rank, that share a batch out; null runs it in this process."""
    url: str | None = None
    """Of a `dgpo-fast serve-reward`, such as http://host:8000; its token is in $DGPO_FAST_REWARD_TOKEN."""
    images_per_call: Count | None = None
    """The most that it is given at once; null gives a batch as it comes, or what a process or a server takes of it."""

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not is_url(url):
            raise ValueError(f"rewards.running: expected a url such as http://host:8000, got {url!r}")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _is_in_one_place(self) -> RunningConfig:
        for key in ("processes", "device"):
            value = getattr(self, key)
            if self.url is not None and value != RunningConfig.model_fields[key].default:
                raise ValueError(f"rewards.running: {key} {value} is the server's own matter where a url is given")
        return self


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
    """Images read at a time, on a core each; null for this process's share of the cores."""


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
    """Requests at a time, of each rank."""
    timeout_s: Positive = 60.0
    """For how long the server may be silent before the request counts as failed."""
    deadline_s: Positive = 300.0
    """For all images of a batch together: those without an answer by then have no score. At most half of
    `rewards.timeout_s`, within which images without a score are asked about once more."""
    retries: Index = 4
    """How often a request is sent again after a timeout, a lost connection or an error of the server; one that has
    answered before and takes no connection is asked until `deadline_s`."""
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
    monitors: tuple[str, ...] = ()
    """Rewards that evaluations measure besides: nothing is trained on them, and no checkpoint is chosen by them. What
    falls among them while the trained ones rise is what training costs."""
    running: dict[str, RunningConfig] = Field(default_factory=dict)
    """Where rewards run, by name; those that are not here run in this process, on the policy's device."""
    arguments: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What a reward of your own takes, by its name: the arguments of its class, or keywords of its function."""
    retries: Index = 1
    """How often a reward is asked again for images that it raised for, before it is asked for each alone; with 0 it is
    not asked again at all."""
    timeout_s: Positive = 600.0
    """How long one reward may take for one batch, all retries included; processes that have to be started anew have
    another ten minutes. In worker processes or behind HTTP it has an equal share, timeout_s / (1 + retries), for each
    time that it is asked. In this process it cannot be stopped: the run ends. Below `parallel.timeout_s`, for which
    other ranks wait."""
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of an iteration's images, on all ranks, or of an evaluation's: how many may be left without a reward, and out of
    their groups, before the run ends; 0 ends it at the first."""
    min_group_size: Annotated[int, Field(ge=2)] = 2
    """A group of which fewer images have a reward is left out."""
    aesthetic: AestheticConfig = AestheticConfig()
    clipscore: PretrainedConfig = PretrainedConfig()
    deqa: DeQAConfig = DeQAConfig()
    geneval: GenEvalConfig = GenEvalConfig()
    hpsv2: HPSv2Config = HPSv2Config()
    imagereward: ImageRewardConfig = ImageRewardConfig()
    judge: JudgeConfig = JudgeConfig()
    ocr: OcrConfig = OcrConfig()
    pickscore: PretrainedConfig = PretrainedConfig()
    unifiedreward: UnifiedRewardConfig = UnifiedRewardConfig()

    @model_validator(mode="after")
    def _terms_differ(self) -> RewardsConfig:
        titles = [term.title for term in self.terms]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"rewards.terms: {title!r} is there twice; expected one term with the sum of weights")
        return self

    @model_validator(mode="after")
    def _judges_end_in_time(self) -> RewardsConfig:
        for name in self.names:
            judge = getattr(self, name, None) if name in type(self).model_fields else None
            if isinstance(judge, JudgeConfig) and judge.deadline_s > self.timeout_s / 2:
                raise ValueError(
                    f"{judge.key}.deadline_s must be at most half of rewards.timeout_s, {self.timeout_s / 2:g}, got "
                    f"{judge.deadline_s:g}"
                )
        return self

    @model_validator(mode="after")
    def _names_are_rewards(self) -> RewardsConfig:
        names = self.names
        for name in self.monitors:
            if names.count(name) > 1:
                raise ValueError(
                    f"rewards.monitors: {name!r} is there twice, or a term, which evaluations measure anyway"
                )
        for key in ("running", "arguments"):
            for name in getattr(self, key):
                if name not in names:
                    nearest = suggest(name, names) or ";"
                    known = ", ".join(names)
                    raise ValueError(f"rewards.{key}: no term has the reward {name!r}{nearest} terms: {known}")
        return self

    @property
    def trained(self) -> list[str]:
        """Names of the rewards of the terms."""
        return list(dict.fromkeys(term.name for term in self.terms))

    @property
    def names(self) -> list[str]:
        """Of all rewards: those of the terms, and the monitors."""
        return [*self.trained, *self.monitors]


def is_url(text: str) -> bool:
    """Whether it is the address of a server, without a password, a query and a fragment, which would go unused."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    has_rest = "@" in parts.netloc or "?" in text or "#" in text
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not has_rest
