"""A group that lies on several ranks, at one micro-step or over several, teaches what it teaches on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dgpo_fast.config import load_recipe
from dgpo_fast.metrics import read_metrics
from dgpo_fast.parallel.placement import placement_of

SIZE = 6
COMMON = (
    "steps=1", "evaluation.every=0", "evaluation.images_per_prompt=2", "evaluation.num_prompts=5",
    "rollout.images_per_forward=2", "model.resolution=24", f"groups.size={SIZE}",
    "algorithm.train_timesteps=2", "optimizer.eps=1e-3", "optimizer.lr=1e-3", "algorithm.beta=100",
    "rewards.max_failed_share=0.5", "rewards.terms=[{name: 'misbehaving:Brightness'}]",
)  # fmt: skip

# Ranks, images of a micro-batch, and the case. Of "cut", a round's groups close in different micro-steps; on four ranks
# a group lies on every rank at one micro-step and on some at the next.
CASES = {
    "1 rank, whole": (1, 6, "a"), "1 rank, cut": (1, 4, "c"),
    "2 ranks, whole": (2, 6, "a"), "2 ranks, side by side": (2, 3, "b"), "2 ranks, cut": (2, 2, "c"),
    "4 ranks, side by side": (4, 3, "b"), "4 ranks, cut": (4, 1, "c"),
}  # fmt: skip
FAILED = {"a sample": [1], "a group": [*range(SIZE, 2 * SIZE)]}
"""The samples of two groups that have no reward."""
UNSUMMED = ("2 ranks, side by side", "2 ranks, cut")
"""Also without the sums over ranks."""


def overrides_of(quick: tuple[str, ...], micro: int) -> list[str]:
    return [*quick, *COMMON, f"optimizer.images_per_micro_batch={micro}"]


def plans(root: Path, quick: tuple[str, ...], num_ranks: int) -> Iterator[dict[str, Any]]:
    for name, (ranks, micro, _) in CASES.items():
        for what, failed in FAILED.items():
            run = {"overrides": overrides_of(quick, micro), "failed": failed, "perturbed": True}
            if ranks == num_ranks:
                yield {"out": root / what / name, **run}
            if ranks == num_ranks and name in UNSUMMED and what == "a sample":
                yield {"out": root / what / f"{name}, unsummed", "unsummed": True, **run}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], train_on_ranks: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("groups")
    for num_ranks in (1, 2, 4):
        train_on_ranks([*plans(root, quick, num_ranks)], num_ranks)
    return root


@pytest.mark.parametrize("name", CASES)
def test_the_cases_are_what_they_say(name: str, quick: tuple[str, ...]) -> None:
    num_ranks, micro, case = CASES[name]
    assert placement_of(load_recipe("tiny-dgpo", overrides_of(quick, micro)), num_ranks).case == case


@pytest.mark.parametrize("what", FAILED)
@pytest.mark.parametrize("name", [name for name in CASES if name != "1 rank, whole"])
def test_they_learn_the_same(
    runs: Path, name: str, what: str, saved: Callable[..., Mapping[str, Tensor]], distance: Callable[..., float]
) -> None:
    one, other = runs / what / "1 rank, whole", runs / what / name
    for mine, theirs in zip(read_metrics(other), read_metrics(one), strict=True):
        assert mine["failed_samples"] == theirs["failed_samples"] == len(FAILED[what])
        assert mine["dropped_groups"] == theirs["dropped_groups"] == len(FAILED[what]) // SIZE
        assert mine["zero_std_groups"] == theirs["zero_std_groups"]
        for key in (
            "reward_mean",
            "reward_std",
            "loss",
            "dgpo_loss",
            "grad_norm",
            "group_weight_mean",
            "clip_fraction",
            "group_weight_saturation",
            "diversity",
            "adapter_norm",
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
    batches = 2 * 2 * SIZE // num_ranks // micro
    assert trained.count("old") == batches
    assert trained.count("policy") >= batches * (2 if case == "c" else 1)


@pytest.mark.parametrize("name", UNSUMMED)
def test_scores_that_stay_on_their_ranks_would_be_noticed(
    runs: Path, name: str, saved: Callable[..., Mapping[str, Tensor]], distance: Callable[..., float]
) -> None:
    """How far off the gradient is, that the test above holds to a hundredth of it."""
    whole, unsummed = (saved(runs / "a sample" / run, "exp_avg") for run in ("1 rank, whole", f"{name}, unsummed"))
    assert distance(unsummed, whole) > 1e-3
