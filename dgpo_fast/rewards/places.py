"""Where each reward of a recipe runs, as `rewards.running` says."""

from __future__ import annotations

from threading import Event

import torch

from dgpo_fast.reward_config import RewardsConfig, RunningConfig
from dgpo_fast.rewards.base import load_reward
from dgpo_fast.rewards.calling import Here, Place


def place_of(name: str, settings: RewardsConfig, *, device: torch.device | None, stop: Event) -> Place:
    """The reward of that name, ready to be asked.

    Args:
        device: the policy's; None where images are to be left on whatever they are on.
        stop: set where nobody waits any more.

    Raises:
        UserError: there is no such reward, it cannot be made, or not there.
    """
    running = settings.running.get(name, RunningConfig())
    if running.url is not None:
        from dgpo_fast.rewards.remote import Remote

        return Remote(name, settings, stop=stop)
    own = device if running.device == "auto" else torch.device(running.device)
    if running.processes is not None:
        from dgpo_fast.rewards.workers import Workers

        return Workers(name, settings, device=own or torch.device("cpu"), stop=stop)
    reward = load_reward(name, settings, device=own or torch.device("cpu"))
    return Here(name, reward, device=own, images_per_call=running.images_per_call)
