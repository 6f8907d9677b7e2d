"""Optimizer steps that no group is left for: made on no rank, whoever holds the weights, and none waits for another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch import Tensor

from dgpo_fast.checkpoint import last_checkpoint, load_checkpoint
from dgpo_fast.metrics import read_metrics

FAILED = [4, 5, 6, 7]
"""The second group of two, which is the iteration's second step."""
COMMON = (
    "steps=4", "optimizer.steps_per_iteration=2", "optimizer.images_per_micro_batch=2", "evaluation.every=0",
    "rewards.max_failed_share=0.5", "optimizer.max_skipped=0", "model.resolution=24", "optimizer.eps=1e-3",
    "rewards.terms=[{name: 'misbehaving:Brightness'}]",
)  # fmt: skip
RUNS = {
    "adapters, 0": (),
    "adapters, 2": ("parallel.zero_stage=2",),
    "full, 3": ("parallel.zero_stage=3", "adapter=null", "model.engine=eager"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], train_on_ranks: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("dropped")
    for num_ranks in (1, 2):
        kinds = RUNS if num_ranks == 2 else {"adapters, 0": ()}
        train_on_ranks(
            [
                {"out": root / f"{name} on {num_ranks}", "overrides": [*quick, *COMMON, *more], "failed": FAILED}
                for name, more in kinds.items()
            ],
            num_ranks,
        )
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_no_group_is_left_for_is_made_on_no_rank(runs: Path, name: str) -> None:
    run = runs / f"{name} on 2"
    lines = read_metrics(run)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True]
    assert load_checkpoint(last_checkpoint(run)).values["adam_steps"] == 2


@pytest.mark.parametrize("name", ["adapters, 0", "adapters, 2"])
def test_two_ranks_end_as_one(
    runs: Path, name: str, saved: Callable[..., Mapping[str, Tensor]], distance: Callable[..., float]
) -> None:
    for view in ("policy", "old", "ema"):
        assert distance(saved(runs / f"{name} on 2", view), saved(runs / "adapters, 0 on 1", view)) < 1e-5, view
