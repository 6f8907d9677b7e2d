"""Methods of a user's own, as docs/extending.md has them, and what may be wrong with one."""

from __future__ import annotations

from collections.abc import Mapping

from dgpo_fast.algorithm_config import DGPOConfig, Method
from dgpo_fast.algorithms.dgpo import DGPO, GroupWeights
from dgpo_fast.models.policy import Policy
from dgpo_fast.records import LossOutput, NoisedBatch
from dgpo_fast.sections import Count


class HardResetConfig(DGPOConfig):
    reset_every: Count = 100


class HardReset(DGPO):
    settings_type = HardResetConfig
    settings: HardResetConfig

    def after_iteration(self, policy: Policy, step: int) -> None:
        if (step + 1) % self.settings.reset_every < self.config.optimizer.steps_per_iteration:
            policy.average_into("old", decay=0.0)

    def loss(self, policy: Policy, batch: NoisedBatch, weights: GroupWeights | None) -> LossOutput:
        found = super().loss(policy, batch, weights)
        positive = batch.sample_share * (batch.advantage_M > 0).sum()
        return LossOutput(loss=found.loss, metrics={**found.metrics, "positive_share": positive})


class BareConfig(Method):
    """Nothing but what is asked of every method."""

    @property
    def trained_points(self) -> range:
        return range(2)

    @property
    def passes(self) -> int:
        return 1

    def forwards(self, *, velocities: int, is_cut: bool, group_size: int) -> Mapping[str, float]:
        return {"policy": 1}


class Bare(DGPO):
    settings_type = BareConfig


class Unsettled(DGPO):
    """It does not say what its settings are."""
