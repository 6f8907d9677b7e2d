"""Where each reward of a recipe runs, as `rewards.running` says."""

from __future__ import annotations

from threading import Event

import torch

from dgpo_fast import launcher
from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import RewardsConfig, RunningConfig
from dgpo_fast.rewards.base import load_reward
from dgpo_fast.rewards.calling import Here, Place


def place_of(name: str, settings: RewardsConfig, *, device: torch.device | None, stop: Event) -> Place:
    """The reward of that name, ready to be asked.

    Args:
        device: the policy's; None where images are to be left on whatever they are on.
        stop: set where nobody waits any more.

    Raises:
        UserError: there is no such reward, it cannot be made, or not there; or every rank would put it on one's GPU.
    """
    running = settings.running.get(name, RunningConfig())
    if running.url is not None:
        from dgpo_fast.rewards.remote import Remote

        return Remote(name, settings, stop=stop)
    own = _device_of(name, running, device)
    if running.processes is not None:
        from dgpo_fast.rewards.workers import Workers

        return Workers(name, settings, device=own or torch.device("cpu"), stop=stop)
    reward = load_reward(name, settings, device=own or torch.device("cpu"))
    return Here(name, reward, device=own, images_per_call=running.images_per_call)


def _device_of(name: str, running: RunningConfig, device: torch.device | None) -> torch.device | None:
    """Of the reward beside a policy on `device`: `cuda` without a number is the policy's GPU, where it has one."""
    if running.device == "auto":
        return device
    wanted, on_gpu = torch.device(running.device), device is not None and device.type == "cuda"
    if on_gpu and wanted == torch.device("cuda"):
        return device
    if on_gpu and wanted.index is not None and 1 < launcher.local_size() > wanted.index:
        raise UserError(
            f"rewards.running.{name}.device: a rank trains on {wanted}, and every rank would put its reward there; "
            "auto is each rank's own GPU"
        )
    return wanted
