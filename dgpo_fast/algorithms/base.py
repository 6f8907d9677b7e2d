"""What the trainer asks of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.records import LossOutput, PromptBatch, Rollout, ScoredGroups

BatchT = TypeVar("BatchT")
WeightsT = TypeVar("WeightsT")


class Algorithm(Protocol[BatchT, WeightsT]):
    """`prepare` before the first iteration, then six methods, called in this order every iteration."""

    def prepare(self, policy: Policy) -> str:
        """Makes sure that the policy can be trained by this algorithm; lines for the person who watches.

        Raises:
            UserError: it cannot.
        """
        ...

    def sampling_view(self, iteration: int) -> View:
        """What an iteration's rollout draws through."""
        ...

    def rollout(
        self,
        policy: Policy,
        prompts: PromptBatch,
        *,
        deliver: Callable[[Tensor, Sequence[str]], None] = ...,
        check: Callable[[], None] = ...,
    ) -> Rollout:
        """Clean latents of every prompt's group.

        Args:
            deliver: given the latents, a batch at a time in the order of samples, each as soon as it is drawn, and what
                they were asked to show.
            check: called now and then, on every rank as often; may raise, to end the rollout.
        """
        ...

    def batches(self, scored: ScoredGroups) -> Iterator[Sequence[BatchT]]:
        """This rank's micro-batches, in rounds: no group reaches beyond its round, on whatever ranks it lies."""
        ...

    def group_weights(self, policy: Policy, batches: Sequence[BatchT]) -> Sequence[WeightsT] | None:
        """What a round's losses need to know of its whole groups; None where a micro-step of all ranks holds them."""
        ...

    def loss(self, policy: Policy, batch: BatchT, weights: WeightsT | None) -> LossOutput:
        """The differentiable loss of a micro-batch."""
        ...

    def after_step(self, policy: Policy, step: int) -> None:
        """Follows the optimizer's step number `step`, counted from 0."""
        ...
