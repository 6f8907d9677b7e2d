"""The reward protocol and the registry of names that recipes use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
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

REWARDS_TO_COME = ("geneval", "ocr", "pickscore")
"""Of the published recipes; not part of this version."""


class BuiltIn(NamedTuple):
    """A reward that comes with the package."""

    target: str
    """Its module and class. Where `rewards` has a section of its name, it is made of that and a device."""
    extra: str | None = None
    """Of pyproject.toml: installs what it imports beyond the package's own requirements."""


_FACTORIES: dict[str, Callable[[], Reward]] = {}
_BUILT_IN = {
    "shapes": BuiltIn("dgpo_fast.rewards.shapes:ShapesReward"),
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
        hint = (
            "; it is not part of this version, give your own as package.module:Class" if name in REWARDS_TO_COME else ""
        )
        raise UserError(
            f"rewards: no reward {name!r}{suggest(name, known_rewards())} known: {', '.join(known_rewards())}{hint}"
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


def _make(name: str, settings: RewardsConfig, device: torch.device) -> Any:
    if name in _FACTORIES:
        return _FACTORIES[name]()
    built_in = _BUILT_IN.get(name)
    try:
        found = _import(built_in.target if built_in else name)
    except ModuleNotFoundError as error:
        if built_in is None or built_in.extra is None:
            raise
        raise UserError(
            f"rewards: {name!r} needs {error.name}, which is not installed: pip install 'dgpo-fast[{built_in.extra}]'"
        ) from None
    if built_in is not None and name in RewardsConfig.model_fields:
        return found(getattr(settings, name), device=device)
    return found() if isinstance(found, type) else found


def _import(target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module_name), attribute)
