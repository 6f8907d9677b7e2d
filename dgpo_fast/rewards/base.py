"""The reward protocol and the registry of names that recipes use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.plugins import imported
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards.pretrained import Pretrained

Values = Sequence[float] | Tensor
"""A number for each image."""


@runtime_checkable
class Reward(Protocol):
    """One method: scores for images. A class of your own needs no base class; it is made with `rewards.arguments`."""

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Values | Mapping[str, Values]:
        """A score per image, higher is better; or several metrics by name, the first being the reward by default.

        Args:
            images_BCHW: float32 in [0, 1], on the reward's device: the policy's, unless `rewards.running` says another.
            prompts: what each image was asked to show.
        """
        ...


R = TypeVar("R", bound=Callable[..., Any])


class BuiltIn(NamedTuple):
    """A reward that comes with the package."""

    target: str
    """Its module and class. Where `rewards` has a section of its name, it is made of that and a device."""
    about: str
    """What it scores, in a few words."""
    metrics: tuple[str, ...] = ()
    """Their names, where it has several."""
    extra: str | None = None
    """Of pyproject.toml: installs what it imports beyond the package's own requirements."""


_FACTORIES: dict[str, Callable[..., Reward]] = {}
BUILT_IN = {
    "aesthetic": BuiltIn("dgpo_fast.rewards.aesthetic:Aesthetic", "how pleasing people would find it, from 1 to 10"),
    "clipscore": BuiltIn("dgpo_fast.rewards.clipscore:CLIPScore", "how near CLIP finds image and prompt, 100 x cosine"),
    "deqa": BuiltIn(
        "dgpo_fast.rewards.judge:JudgeReward", "quality, by the levels of DeQA-Score, from a model that looks",
        metrics=("deqa", "answer"),
    ),
    "geneval": BuiltIn(
        "dgpo_fast.rewards.geneval:GenEvalReward", "objects, their number, colours and places, detected",
        metrics=("soft", "strict", "correct"),
    ),
    "hpsv2": BuiltIn("dgpo_fast.rewards.hpsv2:HPSv2", "what people prefer, by HPS v2.1"),
    "imagereward": BuiltIn("dgpo_fast.rewards.imagereward:ImageReward", "what people prefer, by ImageReward"),
    "jpeg_compressibility": BuiltIn("dgpo_fast.rewards.jpeg:JpegCompressibility", "fewer kilobytes as a JPEG file"),
    "jpeg_incompressibility": BuiltIn("dgpo_fast.rewards.jpeg:JpegIncompressibility", "more kilobytes as a JPEG file"),
    "judge": BuiltIn(
        "dgpo_fast.rewards.judge:JudgeReward", "whatever you ask a model that looks", metrics=("judge", "answer")
    ),
    "ocr": BuiltIn(
        "dgpo_fast.rewards.ocr:OcrReward", "whether the text in the prompt's quotes can be read",
        metrics=("ocr", "exact"), extra="ocr",
    ),
    "pickscore": BuiltIn("dgpo_fast.rewards.pickscore:PickScore", "what people pick, by PickScore"),
    "shapes": BuiltIn(
        "dgpo_fast.rewards.shapes:ShapesReward", "the embedded pipeline's world: shapes, colours, places",
        metrics=("soft", "strict"),
    ),
    "unifiedreward": BuiltIn(
        "dgpo_fast.rewards.judge:JudgeReward",
        "alignment and quality, as UnifiedReward is asked, by a model that looks",
        metrics=("unifiedreward", "answer"),
    ),
}  # fmt: skip


def register_reward(name: str) -> Callable[[R], R]:
    """A class decorator: recipes may name the class `name` from then on."""

    def register(factory: R) -> R:
        _FACTORIES[name] = factory
        return factory

    return register


def registered(name: str) -> Callable[[], Reward] | None:
    """What `register_reward` was given under this name in this process."""
    return _FACTORIES.get(name)


def known_rewards() -> list[str]:
    """Names that `load_reward` takes."""
    return sorted(_FACTORIES.keys() | BUILT_IN.keys())


def check_reward(name: str, settings: RewardsConfig) -> None:
    """Makes sure that there is a reward of that name, which takes what `settings` have for it. One that is not the
    package's own is imported, and not made: its model may be large, or want a GPU.

    Raises:
        UserError: as `load_reward`.
    """
    if name in BUILT_IN and name not in _FACTORIES:
        _refuse_arguments(name, settings)
        if not has_weights(name):
            load_reward(name, settings)
        return
    found = _FACTORIES[name] if name in _FACTORIES else _checked(name, partial(_find, name))
    asked = () if name in _FACTORIES or isinstance(found, type) else ("images", "prompts")
    try:
        inspect.signature(found).bind(*asked, **settings.arguments.get(name, {}))
    except TypeError as error:
        raise UserError(f"rewards: {name!r} cannot be made: TypeError: {error} (rewards.arguments)") from None
    except ValueError:  # of what is not written in Python, nobody knows
        pass


def load_reward(name: str, settings: RewardsConfig | None = None, *, device: torch.device | str = "cpu") -> Reward:
    """A new reward: a registered name, `package.module:Class`, or `package.module:function`.

    Args:
        settings: with the section of a reward that comes with the package; None for its defaults.
        device: of that reward's model.

    Raises:
        UserError: nothing of that name, it cannot be imported or made, or it is not callable.
    """
    settings = settings or RewardsConfig(terms=(RewardConfig(name=name),))
    return cast(Reward, _checked(name, partial(_make, name, settings, torch.device(device))))


def _checked(name: str, get: Callable[[], Any]) -> Any:
    """What `get` gives for a reward of that name.

    Raises:
        UserError: as `load_reward`.
    """
    if ":" not in name and name not in known_rewards():
        known = ", ".join(known_rewards())
        raise UserError(
            f"rewards: no reward {name!r}{suggest(name, known_rewards()) or ';'} known: {known}; or your own, as "
            "package.module:Class"
        )
    try:
        reward = get()
    except UserError:
        raise
    except Exception as error:  # whatever a user's module raises while it is imported, or a user's class
        raise UserError(f"rewards: {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise UserError(f"rewards: {name!r} is not callable: a reward is called with images and prompts")
    return reward


def check_metric(term: RewardConfig) -> None:
    """Makes sure that a reward of the package has the metric that a term is of; of others it is not known yet.

    Raises:
        UserError: it has not.
    """
    built_in = None if term.name in _FACTORIES else BUILT_IN.get(term.name)
    metrics = () if built_in is None else built_in.metrics or (term.name,)
    if built_in is not None and term.metric is not None and term.metric not in metrics:
        nearest = suggest(term.metric, metrics) or f"; it has {', '.join(metrics)}"
        raise UserError(f"rewards: {term.name!r} has no metric {term.metric!r}{nearest}")


def absent_weights(name: str, settings: RewardsConfig) -> list[tuple[Pretrained, str]]:
    """What a first run will download for a reward, and a line that says so: nothing is loaded, no network is asked.

    Raises:
        UserError: as `load_reward`, or the recipe names a directory that lacks a file.
    """
    needed: list[tuple[Pretrained, str | None]] = _find(name).weights(getattr(settings, name))
    return [(weights, line) for weights, path in needed if (line := weights.absence(path)) is not None]


def has_weights(name: str) -> bool:
    """Whether it is a reward of the package that is made of published weights, which its method `weights` lists."""
    return name in BUILT_IN and name not in _FACTORIES and hasattr(_find(name), "weights")


def _make(name: str, settings: RewardsConfig, device: torch.device) -> Any:
    arguments = settings.arguments.get(name, {})
    if name in _FACTORIES:
        return _FACTORIES[name](**arguments)
    found = _find(name)
    if name in BUILT_IN:
        _refuse_arguments(name, settings)
    if name in BUILT_IN and name in RewardsConfig.model_fields:
        return found(getattr(settings, name), device=device)
    if isinstance(found, type):
        return found(**arguments)
    return partial(found, **arguments) if arguments else found


def _refuse_arguments(name: str, settings: RewardsConfig) -> None:
    if name in settings.arguments:
        raise UserError(f"rewards.arguments: {name!r} comes with the package, whose settings are rewards.{name}")


def _find(name: str) -> Any:
    built_in = BUILT_IN.get(name)
    try:
        return imported(built_in.target if built_in else name)
    except ModuleNotFoundError as error:
        if built_in is None or built_in.extra is None:
            raise
        raise UserError(
            f"rewards: {name!r} needs {error.name}, which is not installed: pip install 'dgpo-fast[{built_in.extra}]'"
        ) from None
