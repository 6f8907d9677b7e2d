"""What the tests of the guard share: reports of steps that a run might log."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from dgpo_fast.records import StepReport

HEALTHY = {
    "reward_mean": 1.0, "reward_std": 0.4, "zero_std_groups": 1, "clip_fraction": 0.2, "group_weight_saturation": 0.3,
    "diversity": 0.8, "kl": 0.1, "adapter_norm": 2.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def report() -> Callable[..., StepReport]:
    """A step of a healthy run, but for what is given."""
    others = {field.name: 0 for field in dataclasses.fields(StepReport) if field.default is dataclasses.MISSING}

    def make(step: int, **changes: Any) -> StepReport:
        return StepReport(**{**others, **HEALTHY, "step": step, **changes})

    return make
