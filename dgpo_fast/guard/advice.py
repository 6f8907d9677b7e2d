"""What helps against a finding: settings that the recipe does not have yet, by method and by what it has now."""

from __future__ import annotations

from collections.abc import Iterator

from dgpo_fast.algorithm_config import (
    AWMConfig,
    DGPOConfig,
    DiffusionDPOConfig,
    DiffusionNFTConfig,
    FlowGRPOConfig,
    Noised,
)
from dgpo_fast.config import Config

LR_STEP = 3.0
"""The learning rates that are worth trying lie this far apart."""


def advice(name: str, config: Config) -> tuple[str, ...]:
    """`key=value (now ...)` for the finding of the rule `name`, the most promising first; each is valid alone."""
    match name:
        case "zero_std":
            return tuple([*_more_spread(config), *_lower_lr(config)])
        case "clip":
            return tuple([*_lower_lr(config), *_wider_range(config)])
        case "saturation":
            return tuple([*_less_saturated(config), *_lower_lr(config)])
        case "diversity" | "overfit":
            return tuple([*_closer(config), *_earlier_points(config), *_lower_lr(config)])
        case _:
            return tuple([*_lower_lr(config), *_closer(config)])


def _lower_lr(config: Config) -> Iterator[str]:
    yield _change("optimizer.lr", config.optimizer.lr, config.optimizer.lr / LR_STEP)


def _closer(config: Config) -> Iterator[str]:
    """What keeps the policy near the reference, or near the policy before."""
    match config.algorithm:
        case DiffusionDPOConfig(beta=beta):
            yield _change("algorithm.beta", beta, beta * 3)
        case DiffusionNFTConfig(beta=beta, kl_coef=kl_coef):
            yield _change("algorithm.kl_coef", kl_coef, kl_coef * 10 or 1e-4)
            if beta < 1:
                yield _change("algorithm.beta", beta, 1.0)
        case AWMConfig(kl_coef=kl_coef, old_coef=old_coef):
            yield _change("algorithm.kl_coef", kl_coef, kl_coef * 10 or 1e-3)
            yield _change("algorithm.old_coef", old_coef, old_coef * 3 or 1.0)
        case DGPOConfig(kl_coef=kl_coef, clip=clip):
            yield _change("algorithm.kl_coef", kl_coef, kl_coef * 3 or 0.02)
            if clip is None:
                yield _change("algorithm.clip", clip, 0.01)
        case FlowGRPOConfig(kl_coef=kl_coef):
            yield _change("algorithm.kl_coef", kl_coef, kl_coef * 3 or 0.04)


def _earlier_points(config: Config) -> Iterator[str]:
    """Training at fewer of the late points, at which details are learnt and rewards are fooled."""
    algorithm = config.algorithm
    if isinstance(algorithm, FlowGRPOConfig):
        if algorithm.trained_steps > (algorithm.window or 1):
            fewer = max(algorithm.window or 1, algorithm.trained_steps * 2 // 3)
            yield _change("algorithm.trained_steps", algorithm.trained_steps, fewer)
    elif isinstance(algorithm, Noised) and (points := algorithm.trained_points) is not None:
        least = points.start + algorithm.train_timesteps - 1
        if algorithm.trunc > least:
            yield _change("algorithm.trunc", algorithm.trunc, max(least, algorithm.trunc * 2 // 3))


def _wider_range(config: Config) -> Iterator[str]:
    match config.algorithm:
        case DGPOConfig(clip=float(clip)) | FlowGRPOConfig(clip=clip):
            yield _change("algorithm.clip", clip, clip * 3)
    if config.optimizer.steps_per_iteration > 1:
        yield _change("optimizer.steps_per_iteration", config.optimizer.steps_per_iteration, 1)


def _less_saturated(config: Config) -> Iterator[str]:
    match config.algorithm:
        case DGPOConfig(beta=beta, kl_cfg=kl_cfg):
            yield _change("algorithm.beta", beta, beta / 3)
            if kl_cfg > 1:
                yield _change("algorithm.kl_cfg", kl_cfg, 1.0)
        case DiffusionDPOConfig(beta=beta):
            yield _change("algorithm.beta", beta, beta / 3)


def _more_spread(config: Config) -> Iterator[str]:
    """Larger groups, of which fewer are all equal, and images that differ more."""
    yield _change("groups.size", config.groups.size, config.groups.size * 2)
    match config.algorithm:
        case FlowGRPOConfig(noise_level=noise_level) if noise_level < 1:
            yield _change("algorithm.noise_level", noise_level, 1.0)
    yield "a reward with finer steps, or prompts that are harder"


def _change(key: str, now: float | None, then: float) -> str:
    return f"{key}={then:.3g} (now {'null' if now is None else f'{now:.3g}'})"
