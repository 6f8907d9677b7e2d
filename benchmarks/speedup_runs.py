"""The runs of the speedup benchmark: methods, the settings that each is tuned over, and what a run is called.

Every method starts from its tiny recipe and is tuned with the same effort: eight settings, two learning rates among
them. All draw without guidance, in groups of eight for sixteen prompts, and are evaluated alike. The learning rate is
constant: a schedule would have to know when the target is reached.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COMMON = ("optimizer.decay_steps=null", "steps=1000000", "evaluation.every=0", "logging.tensorboard=false")
"""Of every run: how long it goes is decided by the clock."""
LEARNING_RATES = ("1e-3", "3e-3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A recipe, and what is tried of it."""

    recipe: str
    title: str
    fixed: Sequence[str] = ()
    tried: Mapping[str, Sequence[str]]
    """Values by key, besides `LEARNING_RATES`; every combination is a setting."""

    def settings(self) -> list[tuple[str, ...]]:
        """Overrides of each setting."""
        choices = {"optimizer.lr": LEARNING_RATES, **self.tried}
        combinations = itertools.product(*([f"{key}={value}" for value in values] for key, values in choices.items()))
        return list(combinations)


METHODS = {
    "dgpo": Method(
        recipe="tiny-dgpo",
        title="DGPO",
        fixed=("algorithm.kl_cfg=1",),
        tried={"algorithm.beta": ("30", "100"), "algorithm.kl_coef": ("0.02", "0.1")},
    ),
    "dgpo-guided": Method(
        recipe="tiny-dgpo",
        title="DGPO, against a guided reference",
        fixed=("algorithm.kl_cfg=3",),
        tried={"algorithm.beta": ("30", "100"), "algorithm.kl_coef": ("0.02", "0.1")},
    ),
    "flow-grpo": Method(
        recipe="tiny-flow-grpo",
        title="Flow-GRPO",
        tried={"algorithm.clip": ("1e-4", "1e-2"), "algorithm.kl_coef": ("0", "0.04")},
    ),
    "flow-grpo-fast": Method(
        recipe="tiny-flow-grpo-fast",
        title="Flow-GRPO-Fast",
        tried={"algorithm.clip": ("1e-4", "1e-2"), "algorithm.kl_coef": ("0", "0.04")},
    ),
    "diffusion-nft": Method(
        recipe="tiny-diffusion-nft",
        title="DiffusionNFT",
        tried={"algorithm.beta": ("0.1", "1"), "algorithm.train_timesteps": ("4", "9")},
    ),
    "awm": Method(
        recipe="tiny-awm",
        title="AWM",
        tried={"algorithm.power": ("0.25", "1"), "algorithm.old_coef": ("0", "1")},
    ),
    "diffusion-dpo": Method(
        recipe="tiny-diffusion-dpo",
        title="Diffusion-DPO, online",
        tried={"algorithm.beta": ("100", "1000"), "algorithm.refresh_every": ("null", "40")},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: a method's setting and a seed, for so many seconds of training on one core."""

    method: str
    setting: tuple[str, ...]
    seed: int
    budget_s: float

    @property
    def name(self) -> str:
        """As a file's: the method, the setting's values in their order, seed and budget."""
        values = "_".join(item.partition("=")[2] for item in self.setting)
        return f"{self.method}__{values}__seed{self.seed}__{self.budget_s:g}s"

    @property
    def overrides(self) -> list[str]:
        return [*COMMON, *METHODS[self.method].fixed, *self.setting, f"seed={self.seed}"]


def sweep(budget_s: float) -> list[Run]:
    """Every setting of every method, once: methods take turns, so that an unfinished sweep is of all alike."""
    of_methods = (
        [Run(method=name, setting=setting, seed=0, budget_s=budget_s) for setting in method.settings()]
        for name, method in METHODS.items()
    )
    return [run for turn in zip(*of_methods, strict=True) for run in turn]


def finals(settings: Mapping[str, tuple[str, ...]], budget_s: float, *, seeds: Sequence[int] = (0, 1, 2)) -> list[Run]:
    """Every method with the setting chosen for it, from every seed; methods take turns."""
    return [
        Run(method=name, setting=setting, seed=seed, budget_s=budget_s)
        for seed in seeds
        for name, setting in settings.items()
    ]
