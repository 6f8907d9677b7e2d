"""A group that lies on several ranks, at one micro-step or over several, teaches what it teaches on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dgpo_fast.config import load_recipe
from dgpo_fast.metrics import read_metrics
from dgpo_fast.parallel.placement import placement_of

COMMON = (
    "steps=1", "evaluation.every=0", "evaluation.images_per_prompt=4", "evaluation.num_prompts=5",
    "model.resolution=24",
    "algorithm.train_timesteps=2", "optimizer.eps=1e-3", "optimizer.lr=1e-3", "algorithm.beta=100",
    "rewards.on_failure=skip", "rewards.terms=[{name: 'misbehaving:Brightness'}]",
)  # fmt: skip

# Ranks, images of a micro-batch, and the case, of groups of four.
CASES = {
    "1 rank, whole": (1, 4, "a"), "1 rank, cut": (1, 2, "c"),
    "2 ranks, whole": (2, 4, "a"), "2 ranks, side by side": (2, 2, "b"), "2 ranks, cut": (2, 1, "c"),
    "4 ranks, side by side": (4, 2, "b"), "4 ranks, one by one": (4, 1, "b"),
}  # fmt: skip
FAILED = {"a sample": (2, [1]), "a group": (4, [4, 5, 6, 7])}
"""Groups, and the samples that have no reward."""


def overrides_of(quick: tuple[str, ...], micro: int, groups: int) -> list[str]:
    size = (f"optimizer.images_per_micro_batch={micro}", f"groups.per_iteration={groups}")
    return [*quick, *COMMON, *size]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], train_on_ranks: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("groups")
    for num_ranks in (1, 2, 4):
        plans: list[dict[str, Any]] = [
            {
                "out": root / what / name,
                "overrides": overrides_of(quick, micro, groups),
                "failed": failed,
                "perturbed": True,
            }
            for name, (ranks, micro, _) in CASES.items()
            for what, (groups, failed) in FAILED.items()
            if ranks == num_ranks
        ]
        train_on_ranks(plans, num_ranks)
    return root


@pytest.mark.parametrize("name", CASES)
def test_the_cases_are_what_they_say(name: str, quick: tuple[str, ...]) -> None:
    num_ranks, micro, case = CASES[name]
    assert placement_of(load_recipe("tiny-dgpo", overrides_of(quick, micro, 2)), num_ranks).case == case


@pytest.mark.parametrize("what", FAILED)
@pytest.mark.parametrize("name", [name for name in CASES if name != "1 rank, whole"])
def test_they_learn_the_same(
    runs: Path, name: str, what: str, saved: Callable[..., Mapping[str, Tensor]], distance: Callable[..., float]
) -> None:
    one, other = runs / what / "1 rank, whole", runs / what / name
    for mine, theirs in zip(read_metrics(other), read_metrics(one), strict=True):
        assert mine["failed_samples"] == theirs["failed_samples"] == len(FAILED[what][1])
        assert mine["zero_std_groups"] == theirs["zero_std_groups"]
        for key in (
            "reward_mean",
            "reward_std",
            "loss",
            "dgpo_loss",
            "grad_norm",
            "group_weight_mean",
            "clip_fraction",
        ):
            assert mine[key] == pytest.approx(theirs[key], rel=5e-5), key
    for kind in ("policy", "exp_avg"):
        assert distance(saved(other, kind), saved(one, kind)) < 1e-5, kind


@pytest.mark.parametrize("what", FAILED)
@pytest.mark.parametrize("name", [name for name, (ranks, _, _) in CASES.items() if ranks > 1])
def test_every_rank_runs_the_same_forwards(runs: Path, name: str, what: str) -> None:
    """Those of samples without a reward, too, and of ranks that have no prompt left to evaluate."""
    num_ranks, micro, case = CASES[name]
    of_ranks = {(runs / what / name / f"forwards-{rank}.txt").read_text() for rank in range(num_ranks)}
    assert len(of_ranks) == 1
    trained = of_ranks.pop().split()
    batches = 2 * FAILED[what][0] * 4 // num_ranks // micro
    assert trained.count("old") == batches
    assert trained.count("policy") >= batches * (2 if case == "c" else 1)


def test_scores_that_are_not_summed_over_ranks_would_be_noticed(runs: Path) -> None:
    """The groups' weights are far from what no score at all would give, and from each other."""
    weights = [read_metrics(runs / what / "1 rank, whole")[0]["group_weight_mean"] for what in FAILED]
    assert all(abs(weight - 0.5) > 5e-3 for weight in weights)
    assert abs(weights[0] - weights[1]) > 1e-2
