"""The runs of the speedup benchmark: methods, the settings that each is tuned over, and what a run is called.

Every method begins with the published settings where they make sense for so small a model, and is tuned with the same
effort: four learning rates, and at the best of these four changes, one at a time, one of which trains at fewer noise
levels or steps. All draw ten steps without guidance, groups of eight for sixteen prompts. The learning rate is
constant: a schedule would have to know when the target is reached.

Three published numbers depend on the size of latents, and are translated to the 648 values that they have here from
the 65,536 of 512 px, tenfold: errors and log-densities are means over these values, so what they scatter by goes as one
over the root of their number. They are the ranges of likelihood ratios, which are ten times as wide here, and the beta
of DGPO and of Diffusion-DPO, which is a tenth. As they were published they are among the changes and the ablations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dgpo_fast.config import load_recipe

COMMON = ("optimizer.decay_steps=null", "steps=1000000", "evaluation.every=0", "logging.tensorboard=false")
"""Of every run: how long it goes is decided by its budget."""
LEARNING_RATES = ("1e-3", "3e-3", "3e-4")
"""That every method is tried at; the fourth depends on which of these is best."""
FOURTH_RATES = {
    ("3e-3", "1e-3"): "1e-2", ("3e-3", "3e-4"): "1e-2", ("3e-4", "1e-3"): "1e-4", ("3e-4", "3e-3"): "1e-4",
    ("1e-3", "3e-3"): "2e-3", ("1e-3", "3e-4"): "5e-4",
}  # fmt: skip
"""By the best and the second: one further where the best lies at an end, else one between the two."""
SWEEP_S, FINAL_S = 600.0, 2400.0
"""Seconds of training on one core of a quiet machine."""
HORIZON_S = 900.0
"""A final run lasts at least so long, to show what it keeps, and ends then if it has reached `COMPARED`."""
TARGETS = (0.65, 0.70, 0.75, 0.80, 0.85)
"""Shares of exact images, decided before any run."""
COMPARED = 0.80
"""The target at which methods are compared, and by the time to which settings are chosen."""
SWEEP_SEED, FINAL_SEEDS = 0, (1, 2, 3)
"""Settings are not judged again by the seed and the noise that they were chosen by."""
OURS, BASELINE = "dgpo", "flow-grpo"
"""What is compared, and what papers compare it with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A recipe, and what is tried of it."""

    recipe: str
    title: str
    fixed: Sequence[str] = ()
    changes: tuple[str, str, str, str]
    """What is tried at the best learning rate, one at a time; a space stands between overrides that belong together."""


METHODS = {
    "dgpo": Method(
        recipe="tiny-dgpo",
        title="DGPO",
        # The recipe's reference is guided, which teaches what guidance knows, whatever the reward.
        fixed=(
            "algorithm.kl_cfg=1", "algorithm.kl_coef=0.02", "algorithm.train_timesteps=4", "algorithm.beta=10",
            "algorithm.clip=0.1",
        ),
        changes=("algorithm.train_timesteps=2", "algorithm.beta=3", "algorithm.beta=100", "algorithm.kl_coef=0.1"),
    ),
    "flow-grpo": Method(
        recipe="tiny-flow-grpo",
        title="Flow-GRPO",
        fixed=("algorithm.clip=1e-3",),
        changes=(
            "algorithm.trained_steps=4", "algorithm.clip=1e-4", "algorithm.kl_coef=0", "optimizer.steps_per_iteration=1"
        ),
    ),
    "flow-grpo-fast": Method(
        recipe="tiny-flow-grpo-fast",
        title="Flow-GRPO-Fast",
        fixed=("algorithm.clip=1e-4",),
        changes=(
            "algorithm.window=1", "algorithm.clip=1e-3", "algorithm.kl_coef=0.04", "optimizer.steps_per_iteration=1"
        ),
    ),
    "diffusion-nft": Method(
        recipe="tiny-diffusion-nft",
        title="DiffusionNFT",
        changes=(
            "algorithm.train_timesteps=2", "algorithm.beta=0.1", "algorithm.kl_coef=0.02",
            "old_policy.rate=0.0075 old_policy.max_decay=0.999",
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
        fixed=("algorithm.beta=10",),
        changes=(
            "algorithm.train_timesteps=2", "algorithm.beta=3", "algorithm.beta=100", "algorithm.refresh_every=40"
        ),
    ),
}  # fmt: skip


Draws = Literal["ode", "sde", "base"]
"""What samples are drawn by: the policy's ODE, Flow-GRPO's SDE, or the base's ODE, which makes learning offline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """DGPO at the setting with which it is fastest, but for one thing."""

    title: str
    changes: tuple[str, ...] = ()
    draws: Draws = "ode"
    pairs: bool = False
    """Whether of every group the best is compared with the worst alone."""


EULER = ("rollout.solver=euler", "rollout.schedule=flow_match")
"""What the SDE's steps are without their noise."""
ABLATIONS = {
    "euler": Ablation(title="ODE by Euler's method, on the SDE's schedule (and trained at its sigmas)", changes=EULER),
    "sde": Ablation(title="the same by the SDE, noise level 0.7", changes=EULER, draws="sde"),
    "all-sigmas": Ablation(
        title="without the timestep clip: at all ten sigmas of its schedule, down to 0.25",
        changes=("algorithm.trunc=9",),
    ),
    "offline": Ablation(title="offline: the base draws all samples", draws="base"),
    "pairs": Ablation(title="pairs: of a group the best and the worst", pairs=True),
    "groups-of-4": Ablation(title="groups of 4, twice as many", changes=("groups.size=4", "groups.per_iteration=32")),
    "groups-of-16": Ablation(title="groups of 16, half as many", changes=("groups.size=16", "groups.per_iteration=8")),
    "published": Ablation(
        title="as published for GenEval on large latents: beta 100, range 0.01, timestep clip 4, four noise levels",
        changes=("algorithm.beta=100", "algorithm.clip=0.01", "algorithm.trunc=4", "algorithm.train_timesteps=4"),
    ),
    "no-kl": Ablation(title="without the KL term", changes=("algorithm.kl_coef=0",)),
    "no-clip": Ablation(title="without clipping against the old policy", changes=("algorithm.clip=null",)),
    "global-std": Ablation(title="advantages over the deviation of all groups", changes=("advantages.std=global",)),
    "beta-1": Ablation(title="beta 1", changes=("algorithm.beta=1",)),
    "beta-10": Ablation(title="beta 10", changes=("algorithm.beta=10",)),
    "beta-100": Ablation(title="beta 100", changes=("algorithm.beta=100",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: a method's setting and a seed, for so many seconds of training on one core of a quiet machine."""

    method: str
    setting: tuple[str, ...]
    seed: int
    budget_s: float
    ablation: str | None = None

    @property
    def name(self) -> str:
        """As a file's: the method, its setting, seed and budget."""
        setting = "_".join(short(item) for item in self.setting)
        method = self.method if self.ablation is None else f"{self.method}-{self.ablation}"
        return f"{method}__{setting}__seed{self.seed}__{self.budget_s:g}s"

    @property
    def overrides(self) -> list[str]:
        ablated = () if self.ablation is None else ABLATIONS[self.ablation].changes
        changed = [*COMMON, *METHODS[self.method].fixed, *self.setting, *ablated]
        # The average that is judged looks back over as many iterations, however many steps these make.
        steps = load_recipe(METHODS[self.method].recipe, changed).optimizer.steps_per_iteration
        average = [] if steps == 1 else [f"evaluation_ema.warmup={9 * steps}"]
        return [*changed, f"evaluation_ema.every={steps}", *average, f"seed={self.seed}"]

    @property
    def draws(self) -> Draws:
        return "ode" if self.ablation is None else ABLATIONS[self.ablation].draws

    @property
    def compares_pairs(self) -> bool:
        return self.ablation is not None and ABLATIONS[self.ablation].pairs

    @property
    def is_final(self) -> bool:
        return self.seed != SWEEP_SEED

    @property
    def takes_its_budget(self) -> bool:
        """Whether it goes on once it has shown what final runs are for: two of the baseline's do, to show whether
        DGPO's lead grows with the target."""
        return self.method == BASELINE and self.seed in FINAL_SEEDS[:2]


def short(override: str) -> str:
    """An override by the last part of its key: `beta=0.1`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def learning_rates(rates: Sequence[str] = LEARNING_RATES) -> list[Run]:
    """Every method at every learning rate; methods take turns, so that an unfinished sweep is of all alike."""
    return [_swept(method, (f"optimizer.lr={rate}",)) for rate in rates for method in METHODS]


def fourth_rates(rates: Mapping[str, Sequence[str]]) -> list[Run]:
    """The last learning rate of the methods of which it is known which of the others is better, the best first."""
    return [
        _swept(method, (f"optimizer.lr={FOURTH_RATES[best, second]}",)) for method, (best, second, *_) in rates.items()
    ]


def changes(best: Mapping[str, tuple[str, ...]]) -> list[Run]:
    """The changes of the methods whose best learning rate is known, by turns."""
    return [
        _swept(method, (*setting, *METHODS[method].changes[number].split()))
        for number in range(4)
        for method, setting in best.items()
    ]


def finals(best: Mapping[str, tuple[str, ...]]) -> list[Run]:
    """The settings that were chosen of the methods whose sweep is over, from every seed, by turns."""
    return [
        Run(method=method, setting=setting, seed=seed, budget_s=FINAL_S)
        for seed in FINAL_SEEDS
        for method, setting in best.items()
    ]


def ablations(setting: tuple[str, ...]) -> list[Run]:
    """What changes one thing of DGPO's setting, from every seed, by turns; what changes nothing is left out."""
    return [
        Run(method=OURS, setting=setting, seed=seed, budget_s=SWEEP_S, ablation=name)
        for seed in FINAL_SEEDS
        for name, ablation in ABLATIONS.items()
        if not _has_beta(ablation, setting)
    ]


def every_kind() -> list[Run]:
    """A run of every setting that the queue may hold, but for the learning rates: what each costs is measured."""
    rate = ("optimizer.lr=1e-3",)
    settings = {method: [rate, *((*rate, *change.split()) for change in METHODS[method].changes)] for method in METHODS}
    swept = [_swept(method, setting) for method, tried in settings.items() for setting in tried]
    return [*swept, *(run for setting in settings[OURS] for run in ablations(setting))]


def _has_beta(ablation: Ablation, setting: tuple[str, ...]) -> bool:
    """Whether a setting, or the method where it says nothing, already has the beta that an ablation gives it."""
    of_setting = [item for item in (*METHODS[OURS].fixed, *setting) if item.startswith("algorithm.beta=")]
    return ablation.changes == (of_setting[-1],)


def _swept(method: str, setting: tuple[str, ...]) -> Run:
    return Run(method=method, setting=setting, seed=SWEEP_SEED, budget_s=SWEEP_S)
