"""The section `rewards`: which rewards score the images, and the settings of those that come with the package."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dgpo_fast.errors import suggest
from dgpo_fast.sections import Count, Index, Positive, Section


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
        if not _is_url(url):
            raise ValueError(f"rewards.running: expected a url such as http://host:8000, got {url!r}")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _is_in_one_place(self) -> RunningConfig:
        for key in ("processes", "device"):
            value = getattr(self, key)
            if self.url is not None and value != RunningConfig.model_fields[key].default:
                raise ValueError(f"rewards.running: {key} {value} is the server's own matter where a url is given")
        return self


class RewardsConfig(Section):
    """What the images are scored by: a weighted sum."""

    terms: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    running: dict[str, RunningConfig] = Field(default_factory=dict)
    """Where rewards run, by name; those that are not here run in this process, on the policy's device."""
    retries: Index = 1
    """How often a reward is asked again for images that it raised for, before it is asked for each alone; with 0 it is
    not asked again at all."""
    timeout_s: Positive = 600.0
    """How long one reward may take for one batch. In this process it cannot be stopped: the run ends."""
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of an iteration's images, on all ranks, or of an evaluation's: how many may be left without a reward, and out of
    their groups, before the run ends; 0 ends it at the first."""
    min_group_size: Annotated[int, Field(ge=2)] = 2
    """A group of which fewer images have a reward is left out."""
    pickscore: PretrainedConfig = PretrainedConfig()

    @model_validator(mode="after")
    def _only_rewards_run(self) -> RewardsConfig:
        names = list(dict.fromkeys(term.name for term in self.terms))
        for name in self.running:
            if name not in names:
                raise ValueError(
                    f"rewards.running: no term has the reward {name!r}{suggest(name, names)} terms: {', '.join(names)}"
                )
        return self


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    has_rest = parts.query or parts.fragment or parts.username
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not has_rest
