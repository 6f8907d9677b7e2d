"""The settings of each method of learning, and what it asks of the model. No torch: plans are made of this, too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, create_model

from dgpo_fast.errors import UserError
from dgpo_fast.plugins import imported
from dgpo_fast.sections import Count, Index, NonNegative, Positive, Section

if TYPE_CHECKING:
    from dgpo_fast.config import Config


class Method(Section):
    """What is asked of every method's settings."""

    @property
    @abstractmethod
    def trained_points(self) -> range | None:
        """The points of the rollout's schedule whose noise levels training draws from; None: these are none of it."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Backward passes of a sample in an iteration."""

    @abstractmethod
    def forwards(self, *, velocities: int, is_cut: bool, group_size: int) -> Mapping[str, float]:
        """Transformer forwards of an image in training, by stage.

        Args:
            velocities: that a guided velocity takes: 2, or 1 without guidance.
            is_cut: whether groups are cut over micro-steps.
        """

    def sampling_view(self, step: int, *, switch_step: int) -> Literal["policy", "old"]:
        """What samples before this optimizer step are drawn through; `switch_step` is the rollout's."""
        return "policy"

    @property
    def switches_views(self) -> bool:
        """Whether `rollout.switch_step` changes what samples are drawn through."""
        return self.sampling_view(1, switch_step=0) != self.sampling_view(1, switch_step=10**9)

    @property
    def kept_latents(self) -> int:
        """Of a sample, along its trajectory, besides where it began and ended."""
        return 0

    @property
    def depends_on_batches(self) -> bool:
        """Whether a run learns something else, by more than rounding, from other batches of the same samples."""
        return False

    @property
    def compares_groups(self) -> bool:
        """Whether the loss of a sample depends on the errors of all of its group."""
        return False

    def trained_images(self, images: int, *, group_size: int) -> int:
        """Of so many images in whole groups, those that gradients are computed on."""
        return images

    def velocities_at_once(self, *, is_guided: bool) -> tuple[int, int]:
        """Of a sample, in one forward of the policy and of the reference; `is_guided`: whether its rollout is."""
        return 1, 1

    def check_micro_batch(self, images: int, *, group_size: int, num_ranks: int) -> None:
        """Makes sure that a micro-batch of so many images holds what a loss needs.

        Raises:
            ValueError: it does not.
        """

    def check_points(self, steps: int) -> None:
        """Makes sure that a schedule of so many steps has the trained points.

        Raises:
            ValueError: it has not.
        """
        if self.trained_points is not None and self.trained_points.stop > steps:
            raise ValueError(
                f"algorithm.trunc must be below rollout.steps ({steps}), got {self.trained_points.stop - 1}: "
                "it indexes their sigmas"
            )

    def check(self, config: Config) -> None:
        """Makes sure that the other sections are as the method needs them.

        Raises:
            ValueError: they are not.
        """


class Noised(Method):
    """A method that learns in the forward process, at noise levels of the rollout's schedule."""

    trunc: Index = 4
    """Training sigmas are drawn from the first trunc + 1 points of the rollout's schedule."""
    train_timesteps: Count = 4
    """Sigmas drawn per iteration, without replacement: DGPO's the same for every group, others' for each sample."""

    @property
    def trained_points(self) -> range:
        return range(self.trunc + 1)

    @property
    def passes(self) -> int:
        return self.train_timesteps

    def check_points(self, steps: int) -> None:
        super().check_points(steps)
        points = self.trained_points
        if self.train_timesteps > len(points):
            number = "algorithm.trunc + 1" if points.start == 0 else "algorithm.trunc - algorithm.first + 1"
            raise ValueError(
                f"algorithm.train_timesteps must be at most {number} = {len(points)}, "
                f"got {self.train_timesteps}: they are drawn without replacement"
            )


class DGPOConfig(Noised):
    """Direct Group Preference Optimization (arXiv 2510.08425, eq. 17) with clipping and a KL term."""

    name: Literal["dgpo"] = "dgpo"
    beta: Positive = 100.0
    kl_coef: NonNegative = 0.02
    kl_cfg: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the reference's velocity, in the KL term and in the group score."""
    clip: Positive | None = 1e-2
    """Range of the likelihood ratio to the old policy outside which a sample gives no gradient; null does not clip."""
    reference: Literal["base", "old"] = "base"
    """Whose errors the group score compares with."""

    @property
    def compares_groups(self) -> bool:
        return True

    def velocities_at_once(self, *, is_guided: bool) -> tuple[int, int]:
        return 1, 2 if self.guides_reference else 1

    def sampling_view(self, step: int, *, switch_step: int) -> Literal["policy", "old"]:
        return "policy" if step < switch_step else "old"

    @property
    def guides_reference(self) -> bool:
        return self.kl_cfg > 1

    @property
    def asks_base(self) -> bool:
        """Whether anything is compared with the base's velocities."""
        return self.reference == "base" or self.kl_coef > 0

    @property
    def asks_old(self) -> bool:
        return self.reference == "old" or self.clip is not None

    def forwards(self, *, velocities: int, is_cut: bool, group_size: int) -> Mapping[str, float]:
        return {
            "reference": self.passes * (2 if self.guides_reference else 1) * self.asks_base,
            "old policy": self.passes * self.asks_old,
            "group weights": self.passes * is_cut,
            "policy": self.passes,
        }


SDEType = Literal["sde", "cps"]


class FlowGRPOConfig(Method):
    """Flow-GRPO (arXiv 2505.05470): policy gradients along the trajectory of a stochastic sampler."""

    name: Literal["flow_grpo"] = "flow_grpo"
    noise_level: Positive = 0.7
    sde_type: SDEType = "sde"
    """What a stochastic step is: of the SDE with the ODE's marginals, or of Coefficients-Preserving Sampling
    (arXiv 2509.05952), whose noise_level is at most 1."""
    clip: Positive = 1e-4
    """Range of the likelihood ratio to the policy that drew, outside which a sample gives no gradient."""
    kl_coef: NonNegative = 0.04
    trained_steps: Count = 9
    """Steps of the rollout that are trained, from the first on; with a window, from among which it is drawn."""
    window: Count | None = None
    """Flow-GRPO-Fast: steps that are stochastic and trained, one after the other, from a start that every micro-batch
    draws; the others follow the ODE. null makes every step stochastic and trains `trained_steps` of them."""

    @property
    def depends_on_batches(self) -> bool:
        return True  # a window is drawn for each; densities of other batches differ by roundings, against a narrow clip

    @property
    def trained_points(self) -> range:
        return range(self.trained_steps)

    @property
    def passes(self) -> int:
        return self.window or self.trained_steps

    @property
    def kept_latents(self) -> int:
        return self.passes + 1

    def velocities_at_once(self, *, is_guided: bool) -> tuple[int, int]:
        return (2, 2) if is_guided else (1, 1)

    def forwards(self, *, velocities: int, is_cut: bool, group_size: int) -> Mapping[str, float]:
        each = self.passes * velocities
        return {"reference": each * (self.kl_coef > 0), "policy": each}

    def check_points(self, steps: int) -> None:
        if self.sde_type == "cps" and self.noise_level > 1:
            raise ValueError(
                f"algorithm.noise_level must be at most 1 where algorithm.sde_type is cps, got {self.noise_level:g}"
            )
        if self.trained_steps > steps:
            raise ValueError(
                f"algorithm.trained_steps must be at most rollout.steps ({steps}), got {self.trained_steps}"
            )
        if self.sde_type == "cps" and self.trained_steps == steps:
            raise ValueError(
                f"algorithm.trained_steps must be at most rollout.steps - 1 ({steps - 1}) where algorithm.sde_type is "
                f"cps, whose last step has no noise, got {self.trained_steps}"
            )
        if self.window is not None and self.window > self.trained_steps:
            raise ValueError(
                f"algorithm.window must be at most algorithm.trained_steps ({self.trained_steps}), got {self.window}"
            )

    def check(self, config: Config) -> None:
        rollout, drawn_with = config.rollout, config.model.drawn_with
        if config.adapter is None and config.parallel.zero_stage == 3 and config.parallel.rollout == "replica":
            raise ValueError(
                "algorithm flow_grpo draws with the weights that it trains: parallel.rollout gathered with "
                "parallel.zero_stage 3, got replica"
            )
        if drawn_with != "same":
            raise ValueError(
                f"algorithm flow_grpo learns from densities of what it drew: model.sampling same, got {drawn_with}"
            )
        if rollout.guidance_interval is not None:
            raise ValueError(
                "algorithm flow_grpo guides at all noise levels or at none: rollout.guidance_interval null"
            )
        if rollout.cuda_graphs:
            raise ValueError(
                "algorithm flow_grpo: rollout.cuda_graphs must be false, since graphs replay the ODE alone"
            )
        if rollout.schedule != "flow_match":
            raise ValueError(
                "algorithm flow_grpo: rollout.schedule must be flow_match, which begins at sigma = 1 exactly, got "
                f"{rollout.schedule}: the noise of a first step just below 1 has no bound"
            )
        if rollout.solver != "euler":
            raise ValueError(
                "algorithm flow_grpo: rollout.solver must be euler, which its steps are without their noise, got "
                f"{rollout.solver}"
            )


class DiffusionNFTConfig(Noised):
    """DiffusionNFT (arXiv 2509.16117): a flow-matching loss of an implicit positive and an implicit negative policy."""

    name: Literal["diffusion_nft"] = "diffusion_nft"
    trunc: Index = 9
    train_timesteps: Count = 9
    beta: Positive = 1.0
    """How far the implicit policies are from the old one, in distances between policy and old policy."""
    kl_coef: NonNegative = 1e-4

    def sampling_view(self, step: int, *, switch_step: int) -> Literal["policy", "old"]:
        return "old"

    def forwards(self, *, velocities: int, is_cut: bool, group_size: int) -> Mapping[str, float]:
        return {"reference": self.passes * (self.kl_coef > 0), "old policy": self.passes, "policy": self.passes}


class AWMConfig(Noised):
    """Advantage Weighted Matching (arXiv 2509.25050): policy gradients of the negative denoising error."""

    name: Literal["awm"] = "awm"
    first: Index = 1
    """The first point of the rollout's schedule that training draws from; `trunc` is the last."""
    trunc: Index = 11
    train_timesteps: Count = 6
    """Sigmas of an iteration: one from each of as many stretches of the points, drawn for each sample."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of the denoising error, in what stands for a log-likelihood: -sigma error^power / power; 1 is the error alone."""
    kl_coef: NonNegative = 0.001
    old_coef: NonNegative = 1.0
    """Of the squared distance to the old policy's velocity."""

    @property
    def trained_points(self) -> range:
        return range(self.first, self.trunc + 1)

    def forwards(self, *, velocities: int, is_cut: bool, group_size: int) -> Mapping[str, float]:
        return {
            "reference": self.passes * (self.kl_coef > 0),
            "old policy": self.passes * (self.old_coef > 0),
            "policy": self.passes,
        }

    def check(self, config: Config) -> None:
        if (updates := config.optimizer.steps_per_iteration) > 1:
            raise ValueError(f"algorithm awm is on-policy: optimizer.steps_per_iteration must be 1, got {updates}")


class DiffusionDPOConfig(Method):
    """Diffusion-DPO (arXiv 2311.12908), online: of every group the best sample against the worst."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: Positive = 100.0
    train_timesteps: Count = 4
    """Passes of an iteration, in each of which every pair has a noise level of its own, drawn logit-normally."""
    refresh_every: Count | None = None
    """Steps after which the reference becomes the policy of that moment; null keeps the base."""

    @property
    def trained_points(self) -> None:
        return None

    @property
    def passes(self) -> int:
        return self.train_timesteps

    def trained_images(self, images: int, *, group_size: int) -> int:
        return images // group_size * 2

    def check_micro_batch(self, images: int, *, group_size: int, num_ranks: int) -> None:
        if num_ranks > 1 and images % group_size:
            raise ValueError(
                "algorithm diffusion_dpo pairs samples of a group: optimizer.images_per_micro_batch must hold whole "
                f"groups of {group_size} on several ranks, got {images}"
            )
        if images % 2:
            raise ValueError(f"optimizer.images_per_micro_batch must be even for pairs (diffusion_dpo), got {images}")

    def forwards(self, *, velocities: int, is_cut: bool, group_size: int) -> Mapping[str, float]:
        pairs = self.passes * 2 / group_size
        return {"reference": pairs, "policy": pairs}

    def check(self, config: Config) -> None:
        if (aggregation := config.advantages.aggregation) != "sum":
            raise ValueError(
                "algorithm diffusion_dpo picks the best and the worst by the sum of rewards: advantages.aggregation "
                f"sum, got {aggregation}"
            )


AlgorithmConfig = DGPOConfig | FlowGRPOConfig | DiffusionNFTConfig | AWMConfig | DiffusionDPOConfig
ALGORITHM_NAMES: tuple[str, ...] = tuple(each.model_fields["name"].default for each in get_args(AlgorithmConfig))


@cache
def own_settings(name: str) -> type[Method]:
    """The settings of a method of one's own, `package.module:Class`: those of its `settings_type`, under that name.

    Raises:
        UserError: it cannot be imported, or has no such type.
    """
    try:
        found = imported(name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise UserError(f"algorithm.name: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    settings = getattr(found, "settings_type", None)
    if not isinstance(settings, type) or not issubclass(settings, Method):
        raise UserError(
            f"algorithm.name: {name!r} has no settings_type, a subclass of dgpo_fast.algorithm_config.Method, got "
            f"{settings!r}"
        )
    named: Any = {"name": (Literal[name], name)}
    return create_model(settings.__name__, __base__=settings, __module__=settings.__module__, **named)
