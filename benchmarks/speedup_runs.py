"""The runs of the speedup benchmark: methods, the settings that each is tuned over, and what a run is called.

Every method starts from its tiny recipe, which has the published settings where they make sense for so small a model,
and is tuned with the same effort: four learning rates, and at the best of these four changes, one at a time, one of
which trains at fewer noise levels or steps. All draw ten steps without guidance, groups of eight for sixteen prompts.
The learning rate is constant: a schedule would have to know when the target is reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

COMMON = ("optimizer.decay_steps=null", "steps=1000000", "evaluation.every=0", "logging.tensorboard=false")
"""Of every run: how long it goes is decided by the clock."""
LEARNING_RATES = ("1e-3", "3e-3", "3e-4", "1e-2")
SWEEP_S, FINAL_S = 600.0, 2400.0
"""Seconds of training on one core."""
SWEEP_SEED, FINAL_SEEDS = 0, (1, 2, 3)
"""Settings are not judged again by the seed, the prompts and the noise that they were chosen by."""
OURS = "dgpo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A recipe, and what is tried of it."""

    recipe: str
    title: str
    fixed: Sequence[str] = ()
    changes: tuple[str, str, str, str]
    """Overrides that are tried one at a time, at the best learning rate."""


METHODS = {
    "dgpo": Method(
        recipe="tiny-dgpo",
        title="DGPO",
        # The recipe's reference is guided, which teaches what guidance knows, whatever the reward.
        fixed=("algorithm.kl_cfg=1", "algorithm.kl_coef=0.02"),
        changes=("algorithm.train_timesteps=4", "algorithm.beta=30", "algorithm.beta=1000", "algorithm.kl_coef=0.1"),
    ),
    "flow-grpo": Method(
        recipe="tiny-flow-grpo",
        title="Flow-GRPO",
        changes=(
            "algorithm.trained_steps=4", "algorithm.clip=1e-2", "algorithm.kl_coef=0", "optimizer.steps_per_iteration=1"
        ),
    ),
    "flow-grpo-fast": Method(
        recipe="tiny-flow-grpo-fast",
        title="Flow-GRPO-Fast",
        changes=("algorithm.window=1", "algorithm.clip=1e-2", "algorithm.kl_coef=0", "optimizer.steps_per_iteration=1"),
    ),
    "diffusion-nft": Method(
        recipe="tiny-diffusion-nft",
        title="DiffusionNFT",
        changes=(
            "algorithm.train_timesteps=2", "algorithm.train_timesteps=9", "algorithm.beta=0.1", "old_policy.rate=0.01"
        ),
    ),
    "awm": Method(
        recipe="tiny-awm",
        title="AWM",
        changes=("algorithm.train_timesteps=2", "algorithm.power=1", "algorithm.old_coef=0", "algorithm.kl_coef=0.02"),
    ),
    "diffusion-dpo": Method(
        recipe="tiny-diffusion-dpo",
        title="Diffusion-DPO, online",
        changes=(
            "algorithm.train_timesteps=2", "algorithm.beta=10", "algorithm.beta=1000", "algorithm.refresh_every=40"
        ),
    ),
}  # fmt: skip


Draws = Literal["ode", "sde", "base"]
"""What samples are drawn by: the policy's ODE, Flow-GRPO's SDE, or the base's ODE, which makes learning offline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """DGPO at its best setting, but for one thing."""

    title: str
    changes: tuple[str, ...] = ()
    draws: Draws = "ode"


EULER = ("rollout.solver=euler", "rollout.schedule=flow_match")
"""What the SDE's steps are without their noise."""
ABLATIONS = {
    "euler": Ablation(title="ODE by Euler's method, on the SDE's schedule", changes=EULER),
    "sde": Ablation(title="SDE, noise level 0.7", changes=EULER, draws="sde"),
    "all-sigmas": Ablation(title="without the timestep clip", changes=("algorithm.trunc=9",)),
    "offline": Ablation(title="offline: the base draws all samples", draws="base"),
    "groups-of-4": Ablation(title="groups of 4, twice as many", changes=("groups.size=4", "groups.per_iteration=32")),
    "groups-of-16": Ablation(title="groups of 16, half as many", changes=("groups.size=16", "groups.per_iteration=8")),
    "beta-10": Ablation(title="beta 10", changes=("algorithm.beta=10",)),
    "beta-100": Ablation(title="beta 100", changes=("algorithm.beta=100",)),
    "beta-1000": Ablation(title="beta 1000", changes=("algorithm.beta=1000",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: a method's setting and a seed, for so many seconds of training on one core."""

    method: str
    setting: tuple[str, ...]
    seed: int
    budget_s: float
    ablation: str | None = None

    @property
    def name(self) -> str:
        """As a file's: the method, its setting, seed and budget."""
        setting = "_".join(item.rpartition(".")[2] for item in self.setting)
        method = self.method if self.ablation is None else f"{self.method}-{self.ablation}"
        return f"{method}__{setting}__seed{self.seed}__{self.budget_s:g}s"

    @property
    def overrides(self) -> list[str]:
        ablated = () if self.ablation is None else ABLATIONS[self.ablation].changes
        return [*COMMON, *METHODS[self.method].fixed, *self.setting, *ablated, f"seed={self.seed}"]

    @property
    def draws(self) -> Draws:
        return "ode" if self.ablation is None else ABLATIONS[self.ablation].draws

    @property
    def is_final(self) -> bool:
        return self.seed != SWEEP_SEED


def learning_rates() -> list[Run]:
    """Every method at every learning rate; methods take turns, so that an unfinished sweep is of all alike."""
    return [_swept(method, (f"optimizer.lr={lr}",)) for lr in LEARNING_RATES for method in METHODS]


def changes(best: Mapping[str, tuple[str, ...]]) -> list[Run]:
    """The changes of the methods whose best learning rate is known, by turns."""
    return [
        _swept(method, (*setting, METHODS[method].changes[number]))
        for number in range(4)
        for method, setting in best.items()
    ]


def finals(best: Mapping[str, tuple[str, ...]]) -> list[Run]:
    """The best settings of the methods whose sweep is over, from every seed, by turns."""
    return [
        Run(method=method, setting=setting, seed=seed, budget_s=FINAL_S)
        for seed in FINAL_SEEDS
        for method, setting in best.items()
    ]


def ablations(setting: tuple[str, ...]) -> list[Run]:
    """What changes one thing of DGPO's best setting, from every seed, by turns; what changes nothing is left out."""
    return [
        Run(method=OURS, setting=setting, seed=seed, budget_s=SWEEP_S, ablation=name)
        for seed in FINAL_SEEDS
        for name, ablation in ABLATIONS.items()
        if not _has_beta(ablation, setting)
    ]


def _has_beta(ablation: Ablation, setting: tuple[str, ...]) -> bool:
    """Whether a setting, or the recipe where it says nothing, already has the beta that an ablation gives it."""
    beta = next((item for item in setting if item.startswith("algorithm.beta=")), "algorithm.beta=100")
    return ablation.changes == (beta,)


def _swept(method: str, setting: tuple[str, ...]) -> Run:
    return Run(method=method, setting=setting, seed=SWEEP_SEED, budget_s=SWEEP_S)
