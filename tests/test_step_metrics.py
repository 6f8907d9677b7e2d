"""Diversity and the norm of what was learnt, against their definitions; on any number of ranks what one measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.policy import Policy
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.parallel.placement import Placement
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.records import Conditioning, LossOutput, PromptBatch, Rollout, ScoredGroups
from dgpo_fast.step_metrics import step_metrics, variance_part

LATENT = (4, 3, 3)
GROUPS, SIZE = 4, 6

EPS = torch.finfo(torch.float32).eps


def groups(samples: tuple[int, ...], *, failed: tuple[int, ...] = (), updates: int = 1) -> ScoredGroups:
    """A rank's samples of an iteration: far from zero, so that a difference of large sums would be seen."""
    generator = torch.Generator().manual_seed(0)
    number = GROUPS * SIZE
    x_BCHW = 100 + torch.randn(number, *LATENT, generator=generator) * torch.arange(1, number + 1).view(-1, 1, 1, 1)
    valid_B = torch.tensor([sample not in failed for sample in range(number)])
    x_BCHW[list(failed)] = math.nan
    mine = list(samples)
    empty = Conditioning(text_BND=torch.empty(GROUPS, 1, 1), pooled_BD=torch.empty(GROUPS, 1))
    prompts = PromptBatch(
        iteration=0, samples=samples, group_size=SIZE, prompts=("",) * GROUPS, conditioning=empty, unconditional=None
    )
    zero_B = torch.zeros(len(mine))
    return ScoredGroups(
        rollout=Rollout(prompts=prompts, x0_BCHW=x_BCHW[mine]), reward_B=zero_B,
        valid_B=valid_B[mine], num_valid=tuple(valid_B.view(updates, -1).sum(1).tolist()),
        num_advantaged=(0,) * updates,
        num_groups=tuple(valid_B.view(updates, -1, SIZE).any(2).sum(1).tolist()),
        group_size_G=valid_B.view(-1, SIZE).sum(1).float(), advantage_B=zero_B,
    )  # fmt: skip


def written(scored: ScoredGroups, *, first_group: int = 0, stop_group: int = GROUPS) -> float:
    """From the distances of all pairs of a group, in float64: half their mean square, averaged over groups."""
    x_BD, found = scored.rollout.x0_BCHW.double().flatten(1), []
    for group in range(first_group, stop_group):
        kept = [x for x, valid in zip(x_BD, scored.valid_B, strict=True)][group * SIZE : (group + 1) * SIZE]
        kept = [x for x, valid in zip(kept, scored.valid_B[group * SIZE : (group + 1) * SIZE], strict=True) if valid]
        pairs = [float((one - other).square().mean()) / 2 for one, other in combinations(kept, 2)]
        if pairs:
            found.append(sum(pairs) / len(pairs))
    return sum(found) / len(found) if found else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated(World):
    """One rank of several: notes what it gives to a sum, or gets what the sum is known to be."""

    given: list[Tensor] = field(default_factory=list)
    known: list[Tensor] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> Tensor:
        self.given.append(tensor.clone())
        return self.known[len(self.given) - 1] if self.known else tensor


def on_ranks(num_ranks: int, micro: int, **named: tuple[int, ...]) -> tuple[float, list[Tensor]]:
    """The sum of all ranks' parts, and what they summed on the way."""
    placement = Placement(num_ranks=num_ranks, micro=micro, group_size=SIZE)
    of_ranks = [groups(samples, **named) for samples in placement.samples_of_ranks(total=GROUPS * SIZE)]
    worlds = [Simulated(rank=rank, size=num_ranks, device=torch.device("cpu")) for rank in range(num_ranks)]
    for world, scored in zip(worlds, of_ranks, strict=True):
        variance_part(scored, world, update=0)
    sums = [torch.stack(parts).sum(0) for parts in zip(*(world.given for world in worlds), strict=True)]
    parts = [
        variance_part(scored, replace(world, given=[], known=sums), update=0)
        for world, scored in zip(worlds, of_ranks, strict=True)
    ]
    return float(torch.stack(parts).sum()), sums


SHARES = [(ranks, micro) for ranks in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 6, 12) if 24 % (ranks * micro) == 0]


@pytest.mark.parametrize("failed", [(), (0, 7, 8, 23), (6, 7, 8, 9, 10), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize(("num_ranks", "micro"), SHARES)
def test_diversity_is_the_mean_square_distance_of_pairs_wherever_they_lie(
    num_ranks: int, micro: int, failed: tuple[int, ...]
) -> None:
    """Of samples with a reward, in groups with two of them at least."""
    expected = written(groups(tuple(range(GROUPS * SIZE)), failed=failed))
    found, sums = on_ranks(num_ranks, micro, failed=failed)
    assert found == pytest.approx(expected, rel=64 * EPS)
    assert len(sums) == (num_ranks > 1 and micro % SIZE != 0), "ranks exchange only what is cut"


def test_diversity_is_of_the_steps_own_groups() -> None:
    scored = groups(tuple(range(GROUPS * SIZE)), updates=2)
    for update in (0, 1):
        expected = written(scored, first_group=2 * update, stop_group=2 * update + 2)
        assert float(variance_part(scored, ALONE, update=update)) == pytest.approx(expected, rel=64 * EPS)


def test_diversity_that_nothing_tells_is_none() -> None:
    """Every group has one sample with a reward: it counts where `rewards.min_group_size` is 1."""
    alone = tuple(sample for sample in range(GROUPS * SIZE) if sample % SIZE)
    policy = cast(Policy, SimpleNamespace(change_norm=lambda: None))
    outputs = [LossOutput(loss=torch.tensor(0.5), metrics={"loss": torch.tensor(0.5)})]
    scored = groups(tuple(range(GROUPS * SIZE)), failed=alone)
    assert step_metrics(outputs, scored, policy, ALONE, update=0) == {"loss": 0.5, "diversity": None}


@pytest.mark.parametrize(
    "metrics",
    [({"loss", "kl"}, {"loss"}), ({"kl"}, {"kl"}), ({"loss", "lr"}, {"loss", "lr"}), ({"loss", "rewards"},) * 2],
    ids=["not in all", "no loss", "the trainer's", "the rewards'"],
)
def test_metrics_that_ranks_could_not_add_up_are_refused(metrics: tuple[set[str], set[str]]) -> None:
    """Those of a method of one's own, say: a sum of fewer numbers than other ranks' would not come."""
    outputs = [LossOutput(loss=torch.tensor(0.5), metrics=dict.fromkeys(names, torch.tensor(0.5))) for names in metrics]
    with pytest.raises(
        UserError, match=r"algorithm: a loss has the metrics .*; expected the same of all, `loss` among"
    ):
        step_metrics(outputs, groups(tuple(range(GROUPS * SIZE))), cast(Policy, None), ALONE, update=0)


def test_diversity_of_equal_images_is_nothing_and_of_single_ones_unknown() -> None:
    scored = groups(tuple(range(GROUPS * SIZE)))
    same = replace(scored.rollout, x0_BCHW=torch.full_like(scored.rollout.x0_BCHW, 0.1))
    # A mean of six equal values may be off by its rounding.
    assert 0 <= float(variance_part(replace(scored, rollout=same), ALONE, update=0)) <= (0.1 * 4 * EPS) ** 2
    alone = tuple(sample for sample in range(GROUPS * SIZE) if sample % SIZE)
    assert math.isnan(float(variance_part(groups(tuple(range(GROUPS * SIZE)), failed=alone), ALONE, update=0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_of_adapters_is_that_of_their_products(make_policy: Callable[..., AdapterPolicy], dtype: str) -> None:
    config = load_recipe(
        "tiny-dgpo", [f"model.dtype={dtype}", "adapter.rank=4", "adapter.alpha=6", "model.sampling=same"]
    )
    policy = make_policy(config)
    assert policy.change_norm().item() == 0, "B starts at zero"
    policy = make_policy(config, spread=0.3)
    weights = policy.trained.slices(policy.trainable.detach().double())
    square = sum(
        (6 / 4 * weights[name.replace("lora_A", "lora_B")] @ a).square().sum().item()
        for name, a in weights.items()
        if "lora_A" in name
    )
    assert policy.change_norm().item() == pytest.approx(math.sqrt(square), rel=64 * EPS)


def start_of(config: Config) -> dict[str, Tensor]:
    return dict(load_model(config.model, device="cpu").transformer.named_parameters())


def test_the_norm_of_full_fine_tuning_is_that_of_the_difference(tmp_path: Path, quick: tuple[str, ...]) -> None:
    config = load_recipe("tiny-dgpo", [*quick, "adapter=null", "model.engine=eager", "model.resolution=24"])
    trainer = Trainer(config, tmp_path)
    assert trainer.policy.change_norm() == 0
    (report,) = trainer.run_iteration()
    start = start_of(config)
    masters = {piece.name: piece.values for piece in trainer.learner.engine.masters().pieces}
    square = sum((values.double() - start[name].double().flatten()).square().sum() for name, values in masters.items())
    assert square > 0 and report.adapter_norm == pytest.approx(math.sqrt(square), rel=1e-5)


def test_a_step_reports_what_it_drew_and_where_it_went(
    tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_recipe("tiny-dgpo", quick), tmp_path)
    rollouts, draw = list[Rollout](), trainer.algorithm.rollout
    monkeypatch.setattr(
        trainer.algorithm, "rollout", lambda *args, **named: rollouts.append(draw(*args, **named)) or rollouts[-1]
    )
    (report,) = trainer.run_iteration()
    x_GSD = rollouts[0].x0_BCHW.double().view(2, 4, -1)
    assert report.diversity == pytest.approx(x_GSD.var(1).mean().sqrt().item(), rel=16 * EPS)
    norm = trainer.policy.change_norm()
    assert norm is not None and report.adapter_norm == norm.item() > 0
