"""What the trainer asks of an algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from dgpo_fast.algorithms.group_sampler import Check, Deliver
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.records import LossOutput, PromptBatch, Rollout, ScoredGroups

BatchT = TypeVar("BatchT")
WeightsT = TypeVar("WeightsT")


class Algorithm(Protocol[BatchT, WeightsT]):
    """`prepare` before the first iteration, then five methods, called in this order every iteration.

    Three of them are of each optimizer step, the first and the last of the iteration.
    """

    def prepare(self, policy: Policy) -> str:
        """Makes sure that the policy can be trained by this algorithm; lines for the person who watches.

        Raises:
            UserError: it cannot.
        """
        ...

    def rollout(
        self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver = ..., check: Check = ...
    ) -> Rollout:
        """Clean latents of every prompt's group.

        Args:
            view: what samples are drawn through: `Config.sampling_view` says which.
            deliver: given the latents, a batch at a time in the order of samples, each as soon as it is drawn, and what
                they were asked to show.
            check: called now and then, on every rank as often; may raise, to end the rollout.
        """
        ...

    def batches(self, scored: ScoredGroups, *, update: int = 0) -> Iterator[Sequence[BatchT]]:
        """This rank's micro-batches for one of the iteration's optimizer steps, in rounds: no group that has to be seen
        whole reaches beyond its round, on whatever ranks it lies. A step that no rank has any for is not made."""
        ...

    def group_weights(self, policy: Policy, batches: Sequence[BatchT]) -> Sequence[WeightsT] | None:
        """What a round's losses need to know of its whole groups; None where each loss sees all that it needs."""
        ...

    def loss(self, policy: Policy, batch: BatchT, weights: WeightsT | None) -> LossOutput:
        """The differentiable loss of a micro-batch."""
        ...

    def after_iteration(self, policy: Policy, step: int) -> None:
        """Follows the iteration's last optimizer step, number `step`, counted from 0, even where that was left out."""
        ...


def nobody(*arguments: object) -> None:
    """Takes what nobody asked for: the default of `deliver` and `check`."""
