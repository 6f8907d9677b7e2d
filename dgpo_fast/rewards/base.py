"""The reward protocol and the registry of names that recipes use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.reward_config import RewardConfig, RewardsConfig


@runtime_checkable
class Reward(Protocol):
    """One method: scores for images. A class of your own needs no base class, and no arguments to be made."""

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Sequence[float] | Mapping[str, Sequence[float]]:
        """A score per image, higher is better; or several metrics by name, the first being the reward by default.

        Args:
            images_BCHW: float32 in [0, 1], on the reward's device: the policy's, unless `rewards.running` says another.
            prompts: what each image was asked to show.
        """
        ...


R = TypeVar("R", bound=Callable[[], Any])


class BuiltIn(NamedTuple):
    """A reward that comes with the package."""

    target: str
    """Its module and class. Where `rewards` has a section of its name, it is made of that and a device."""
    extra: str | None = None
    """Of pyproject.toml: installs what it imports beyond the package's own requirements."""


_FACTORIES: dict[str, Callable[[], Reward]] = {}
_BUILT_IN = {
    "aesthetic": BuiltIn("dgpo_fast.rewards.aesthetic:Aesthetic"),
    "clipscore": BuiltIn("dgpo_fast.rewards.clipscore:CLIPScore"),
    "deqa": BuiltIn("dgpo_fast.rewards.judge:JudgeReward"),
    "geneval": BuiltIn("dgpo_fast.rewards.geneval:GenEvalReward"),
    "hpsv2": BuiltIn("dgpo_fast.rewards.hpsv2:HPSv2"),
    "imagereward": BuiltIn("dgpo_fast.rewards.imagereward:ImageReward"),
    "jpeg_compressibility": BuiltIn("dgpo_fast.rewards.jpeg:JpegCompressibility"),
    "jpeg_incompressibility": BuiltIn("dgpo_fast.rewards.jpeg:JpegIncompressibility"),
    "judge": BuiltIn("dgpo_fast.rewards.judge:JudgeReward"),
    "ocr": BuiltIn("dgpo_fast.rewards.ocr:OcrReward", extra="ocr"),
    "pickscore": BuiltIn("dgpo_fast.rewards.pickscore:PickScore"),
    "shapes": BuiltIn("dgpo_fast.rewards.shapes:ShapesReward"),
    "unifiedreward": BuiltIn("dgpo_fast.rewards.judge:JudgeReward"),
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
    return sorted(_FACTORIES.keys() | _BUILT_IN.keys())


def load_reward(name: str, settings: RewardsConfig | None = None, *, device: torch.device | str = "cpu") -> Reward:
    """A new reward: a registered name, `package.module:Class`, or `package.module:function`.

    Args:
        settings: with the section of a reward that comes with the package; None for its defaults.
        device: of that reward's model.

    Raises:
        UserError: nothing of that name, it cannot be imported or made, or it is not callable.
    """
    if ":" not in name and name not in known_rewards():
        raise UserError(
            f"rewards: no reward {name!r}{suggest(name, known_rewards())} known: {', '.join(known_rewards())}; or your "
            "own, as package.module:Class"
        )
    try:
        reward = _make(name, settings or RewardsConfig(terms=(RewardConfig(name=name),)), torch.device(device))
    except UserError:
        raise
    except Exception as error:  # whatever a user's module raises while it is imported, or a user's class
        raise UserError(f"rewards: {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise UserError(f"rewards: {name!r} is not callable: a reward is called with images and prompts")
    return cast(Reward, reward)


def absent_weights(name: str, settings: RewardsConfig) -> Iterator[str]:
    """What a first run will download for a reward, a line each: nothing is loaded, and no network is asked.

    Raises:
        UserError: as `load_reward`, or the recipe names a directory that lacks a file.
    """
    for weights, path in _find(name).weights(getattr(settings, name)):
        absence = weights.absence(path)
        if absence is not None:
            yield f"reward {name!r}: {absence}"


def has_weights(name: str) -> bool:
    """Whether it is a reward of the package that is made of published weights, which its method `weights` lists."""
    return name in _BUILT_IN and name not in _FACTORIES and hasattr(_find(name), "weights")


def _make(name: str, settings: RewardsConfig, device: torch.device) -> Any:
    if name in _FACTORIES:
        return _FACTORIES[name]()
    found = _find(name)
    if name in _BUILT_IN and name in RewardsConfig.model_fields:
        return found(getattr(settings, name), device=device)
    return found() if isinstance(found, type) else found


def _find(name: str) -> Any:
    built_in = _BUILT_IN.get(name)
    try:
        return _import(built_in.target if built_in else name)
    except ModuleNotFoundError as error:
        if built_in is None or built_in.extra is None:
            raise
        raise UserError(
            f"rewards: {name!r} needs {error.name}, which is not installed: pip install 'dgpo-fast[{built_in.extra}]'"
        ) from None


def _import(target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module_name), attribute)
