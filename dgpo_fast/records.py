"""The frozen records that pass between the rooms of one iteration, in order.

    PromptBatch -> Rollout -> ScoredGroups -> NoisedBatch | TrajectoryBatch -> LossOutput -> StepReport

Shapes: B samples of this rank, ordered by group; G groups; M samples of a micro-batch; C H W latents; N text
tokens, D their width. Example: 8 groups of 16 images at 512 px give B = 128 and latents [128, 16, 64, 64].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Prompt(str):
    """A prompt, and what is known of it besides: what a reward is to look for, or of what kind it is.

    A string in every respect, and equal to any other of the same text: what is not a reward need not know of more.
    """

    __slots__ = ("metadata",)
    metadata: Mapping[str, Any]  # as JSON has it

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = metadata or {}
        return prompt

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]
        return str(self), self.metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What the transformer knows of the text, in the model's dtype."""

    text_BND: Tensor
    pooled_BD: Tensor

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        return Conditioning(text_BND=self.text_BND[index], pooled_BD=self.pooled_BD[index])


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """What this rank draws in an iteration: samples of groups, each of which has one prompt.

    Samples and groups are numbered over all ranks, group after group: randomness is named by these numbers.
    """

    iteration: int
    samples: tuple[int, ...]  # [B], in the order in which this rank works on them
    group_size: int
    prompts: tuple[str, ...]  # [G], of the groups that the samples are of, in their order
    conditioning: Conditioning  # a row per group: [G, N, D], [G, D]
    unconditional: Conditioning | None  # the empty prompt: [1, N, D], [1, D]; None where no guidance needs it

    @property
    def group_ids(self) -> tuple[int, ...]:
        """The groups' numbers, [G]."""
        return tuple(sorted({sample // self.group_size for sample in self.samples}))

    # On the device once, since a copy to it would wait for all that it still has to do.

    @cached_property
    def group_B(self) -> Tensor:
        """Which row of the conditioning each sample has: int64 [B]."""
        return torch.tensor(self._rows, device=self.conditioning.text_BND.device)

    @cached_property
    def group_id_B(self) -> Tensor:
        """The number of each sample's group: int64 [B]."""
        return torch.tensor(self.samples, device=self.conditioning.text_BND.device) // self.group_size

    def numbers(self, some: slice = slice(None)) -> tuple[tuple[int, int], ...]:
        """Of all samples or of some, the group and the number within that: what their randomness is named by."""
        return tuple(divmod(sample, self.group_size) for sample in self.samples[some])

    @property
    def prompt_of_sample(self) -> tuple[str, ...]:
        """Each sample's prompt, [B]."""
        return tuple(self.prompts[row] for row in self._rows)

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def has_whole_groups(self) -> bool:
        """Whether no group lies on other ranks as well; it is so on every rank, or on none."""
        return len(self.group_ids) * self.group_size == self.num_samples

    @property
    def _rows(self) -> list[int]:
        row_of = {group: row for row, group in enumerate(self.group_ids)}
        return [row_of[sample // self.group_size] for sample in self.samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The steps of a stochastic rollout that are trained: S of them."""

    first_B: tuple[int, ...]  # step of the rollout that the first of these is, the same for a whole micro-batch
    x_SBCHW: Tensor  # float32, [S + 1, ...]: latents before each step, and behind the last
    log_prob_SB: Tensor  # float32: log-densities of what the steps drew

    @classmethod
    def of_parts(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """That of all samples, in the order of the parts."""
        return cls(
            first_B=sum((part.first_B for part in parts), ()),
            x_SBCHW=torch.cat([part.x_SBCHW for part in parts], dim=1),
            log_prob_SB=torch.cat([part.log_prob_SB for part in parts], dim=1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Sampled latents. Their images are scored as they come and not kept."""

    prompts: PromptBatch
    x0_BCHW: Tensor  # float32
    trajectory: Trajectory | None = None  # what nobody trains along is not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroups:
    """A rollout with its rewards and advantages."""

    rollout: Rollout
    reward_B: Tensor  # float32; NaN where not valid
    valid_B: Tensor  # bool; False keeps a sample's place in every batch, with weight zero: it failed, or too many did
    # Over all ranks, of each optimizer step:
    num_valid: tuple[int, ...]  # samples
    num_advantaged: tuple[int, ...]  # those with an advantage other than 0
    num_groups: tuple[int, ...]  # groups with valid samples; with 0, the step is not made
    group_size_G: Tensor  # float32, valid samples of every group of the iteration, on whatever ranks
    advantage_B: Tensor  # float32; 0 where not valid


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedBatch:
    """One micro-batch, with a training sigma for each sample that its group may share: whole groups, or pieces."""

    x_t_MCHW: Tensor  # float32
    x0_MCHW: Tensor  # float32; 0 where not valid
    streams_N4: Tensor  # int64, words of the stream of each noise: v* = noise - x_0 is made where it is used
    noise_M: Tensor  # int64, which of these noises each sample has
    timestep_M: Tensor  # float32, what the model is told: 1000 sigma
    conditioning: Conditioning  # a row per sample
    unconditional: Conditioning | None
    advantage_M: Tensor  # float32
    valid_M: Tensor  # bool
    group_M: Tensor  # int64, the group of each sample, numbered from 0 within the round of micro-batches
    group_size_G: Tensor  # float32, valid samples of each group of the round
    group_share: float  # weight of one group in the loss: 1 / (groups of the step that count x training sigmas)
    sample_share: float  # weight of one sample: 1 / (valid samples of the step, on all ranks, x training sigmas)

    @property
    def counts_G(self) -> Tensor:
        """Groups that are learnt from, bool [G]: of the others no sample is valid."""
        return self.group_size_G > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """One micro-batch at one step of a stochastic rollout."""

    x_MCHW: Tensor  # float32, before the step
    x_next_MCHW: Tensor  # float32, what it drew
    old_log_prob_M: Tensor  # float32, as it was drawn
    step: int  # of the rollout
    conditioning: Conditioning  # a row per sample
    unconditional: Conditioning | None
    advantage_M: Tensor  # float32
    counts_M: Tensor  # bool; of the others the advantage is 0, or they are not valid
    sample_share: float  # weight of one sample: 1 / (samples of the step that count, on all ranks, x trained steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's part of the iteration's loss, and its part of each metric: parts add up to the metric."""

    loss: Tensor  # float32 scalar, differentiable
    metrics: Mapping[str, Tensor]  # float32 scalars, detached; `loss` among them

    @classmethod
    def of(cls, loss: Tensor, **metrics: Tensor) -> LossOutput:
        """Its own metric included."""
        return cls(loss=loss, metrics={name: value.detach() for name, value in {"loss": loss, **metrics}.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One line of metrics.jsonl. Times in seconds.

    Images are decoded and scored while others are sampled: `rollout_s` is sampling alone, on a CPU with decoding, and
    `reward_s` what the iteration waited for the rewards after it. The three times are no longer than the iteration.
    """

    step: int
    iteration: int
    images_seen: int
    wall_s: float
    reward_mean: float
    reward_std: float
    zero_std_groups: int
    clamped_advantages: int
    failed_samples: int
    dropped_groups: int
    loss: float | None  # with `grad_norm` null of a step that was not made because there was nothing to learn from
    kl: float | None = None  # where the reference is not asked
    grad_norm: float | None
    lr: float
    skipped_steps: int
    rollout_s: float
    reward_s: float
    train_s: float
    images_per_s: float
    peak_memory_gb: float
    # What only some methods have; null in the others' lines.
    dgpo_loss: float | None = None
    surrogate_loss: float | None = None
    policy_loss: float | None = None
    clip_fraction: float | None = None
    group_weight_mean: float | None = None
    group_weight_saturation: float | None = None
    # What `step_metrics.py` measures of any method; null where no rank can.
    diversity: float | None = None
    adapter_norm: float | None = None
    rewards: Mapping[str, float]  # means of the single rewards, whose weighted sum is reward_mean
    extra: Mapping[str, float] = field(default_factory=dict)  # what only a method of the user's own has, by its names

    @classmethod
    def of(cls, **values: Any) -> StepReport:
        """A report with `values`; those of no field of its own are `extra`."""
        own = {each.name for each in fields(cls)}
        extra = {name: value for name, value in values.items() if name not in own}
        return cls(**{name: value for name, value in values.items() if name in own}, extra=extra)
