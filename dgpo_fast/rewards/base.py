"""The reward protocol and the registry of names that recipes use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from dgpo_fast.errors import UserError, suggest


@runtime_checkable
class Reward(Protocol):
    """One method: scores for images. A class of your own needs no base class, and no arguments to be made."""

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Sequence[float] | Mapping[str, Sequence[float]]:
        """A score per image, higher is better; or several metrics by name, the first being the reward by default.

        Args:
            images_BCHW: float32 in [0, 1], on the model's device.
            prompts: what each image was asked to show.
        """
        ...


R = TypeVar("R", bound=Callable[[], Any])

REWARDS_TO_COME = ("geneval", "ocr", "pickscore")
"""Of the published recipes; not part of this version."""
_FACTORIES: dict[str, Callable[[], Reward]] = {}
_BUILT_IN = {"shapes": "dgpo_fast.rewards.shapes:ShapesReward"}


def register_reward(name: str) -> Callable[[R], R]:
    """A class decorator: recipes may name the class `name` from then on."""

    def register(factory: R) -> R:
        _FACTORIES[name] = factory
        return factory

    return register


def known_rewards() -> list[str]:
    """Names that `load_reward` takes."""
    return sorted(_FACTORIES.keys() | _BUILT_IN.keys())


def load_reward(name: str) -> Reward:
    """A new reward: a registered name, or `package.module:Class`.

    Raises:
        UserError: nothing of that name, it cannot be imported or made, or it is not callable.
    """
    module_name, colon, attribute = _BUILT_IN.get(name, name).partition(":")
    if not colon and name not in _FACTORIES:
        hint = (
            "; it is not part of this version, give your own as package.module:Class" if name in REWARDS_TO_COME else ""
        )
        raise UserError(
            f"rewards: no reward {name!r}{suggest(name, known_rewards())} known: {', '.join(known_rewards())}{hint}"
        )
    try:
        factory = _FACTORIES.get(name) or getattr(importlib.import_module(module_name), attribute)
        reward: Reward = factory()
    except Exception as error:  # whatever a user's module raises while it is imported, or a user's class
        raise UserError(f"rewards: {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise UserError(f"rewards: {name!r} is not callable: a reward is called with images and prompts")
    return reward
