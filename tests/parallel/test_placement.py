"""Where samples lie among ranks: each on one, groups closed by their rounds, and the same noise wherever they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.algorithms.noised import NoisedBatches
from dgpo_fast.config import load_recipe
from dgpo_fast.flow.rollout import Sampler
from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.parallel.placement import Placement, placement_of
from dgpo_fast.records import Conditioning, NoisedBatch, PromptBatch, Rollout, ScoredGroups


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, int]:
    """A placement, and a number of samples that it can hold."""
    placement = Placement(
        num_ranks=draw(st.integers(1, 9)), micro=draw(st.integers(1, 12)), group_size=draw(st.integers(2, 24))
    )
    step = placement.num_ranks * placement.micro
    groups = [n for n in range(1, 4 * step + 1) if n * placement.group_size % step == 0]
    return placement, placement.group_size * draw(st.sampled_from(groups))


def rounds(placement: Placement, total: int) -> list[range]:
    """The micro-steps of each round, from the definition: it ends as soon as no group is open."""
    step, found, first = placement.num_ranks * placement.micro, [], 0
    for j in range(total // step):
        if (j + 1) * step % placement.group_size == 0:
            found.append(range(first, j + 1))
            first = j + 1
    return found


@given(placements())
def test_every_sample_lies_on_one_rank(case: tuple[Placement, int]) -> None:
    placement, total = case
    of_ranks = [placement.samples(rank, total=total) for rank in range(placement.num_ranks)]
    assert {len(samples) for samples in of_ranks} == {total // placement.num_ranks}, "every rank works as much"
    assert sorted(sample for samples in of_ranks for sample in samples) == [*range(total)]


@given(placements())
def test_a_round_closes_its_groups(case: tuple[Placement, int]) -> None:
    placement, total = case
    micro, size = placement.micro, placement.group_size
    expected = rounds(placement, total)
    assert {len(steps) for steps in expected} == {placement.steps_per_round}
    for steps in expected:
        of_ranks = []
        for rank in range(placement.num_ranks):
            samples = placement.samples(rank, total=total)[steps.start * micro : steps.stop * micro]
            groups = placement.groups(steps, rank=rank)
            assert {sample // size for sample in samples} <= {*groups}
            of_ranks.append((samples, groups))
        together = sorted(sample for samples, _ in of_ranks for sample in samples)
        known = {group for _, groups in of_ranks for group in groups}
        assert together == sorted(group * size + i for group in known for i in range(size))


@given(placements())
def test_the_case_says_what_closes_a_group(case: tuple[Placement, int]) -> None:
    placement, total = case
    ranks_of, batches_of = dict[int, set[int]](), dict[int, set[tuple[int, int]]]()
    for rank in range(placement.num_ranks):
        for place, sample in enumerate(placement.samples(rank, total=total)):
            group = sample // placement.group_size
            ranks_of.setdefault(group, set()).add(rank)
            batches_of.setdefault(group, set()).add((rank, place // placement.micro))
    steps_of = {group: {step for _, step in batches} for group, batches in batches_of.items()}
    if placement.case == "a":
        assert all(len(batches) == 1 for batches in batches_of.values())
    elif placement.case == "b":
        assert all(len(steps) == 1 for steps in steps_of.values())
        assert any(len(ranks) > 1 for ranks in ranks_of.values())
    else:
        assert any(len(steps) > 1 for steps in steps_of.values())


@pytest.mark.parametrize(
    ("num_ranks", "micro", "case"),
    [(1, 16, "a"), (8, 16, "a"), (1, 4, "c"), (4, 4, "b"), (8, 4, "b"), (2, 4, "c"), (3, 16, "a"), (6, 8, "b")],
)
def test_of_the_published_groups_of_sixteen(num_ranks: int, micro: int, case: str) -> None:
    assert Placement(num_ranks=num_ranks, micro=micro, group_size=16).case == case


def batches_of_ranks(num_ranks: int, micro: int) -> dict[tuple[float, int], tuple[torch.Tensor, ...]]:
    """What each sample is trained on at each sigma, from the batches of every rank."""
    config = load_recipe(
        "tiny-dgpo",
        ["groups.size=4", "groups.per_iteration=4", f"optimizer.images_per_micro_batch={micro}"],
    )
    total, size = config.images_per_iteration, config.groups.size
    generator = torch.Generator().manual_seed(0)
    x0_BCHW, reward_B = (torch.randn(total, *shape, generator=generator) for shape in ((4, 2, 2), ()))
    reward_B[5] = torch.nan
    valid_B = reward_B.isfinite()
    advantages = group_advantages(reward_B, valid_B, group_size=size, std="group", epsilon=1e-4, clamp=5.0)
    found = {}
    for rank in range(num_ranks):
        placement, sampler = placement_of(config, num_ranks), Sampler.from_config(config.rollout)
        samples = placement.samples(rank, total=total)
        mine, groups = list(samples), sorted({sample // size for sample in samples})
        prompts = PromptBatch(
            iteration=3, samples=samples, group_size=size, prompts=tuple(map(str, groups)), unconditional=None,
            conditioning=Conditioning(
                text_BND=torch.tensor(groups).view(-1, 1, 1).float(), pooled_BD=torch.zeros(len(groups), 1)
            ),
        )  # fmt: skip
        scored = ScoredGroups(
            rollout=Rollout(prompts=prompts, x0_BCHW=x0_BCHW[mine]), reward_B=reward_B[mine],
            valid_B=valid_B[mine], num_valid=(int(valid_B.sum()),), num_advantaged=(int(valid_B.sum()),),
            advantage_B=advantages.advantage_B[mine],
            group_size_G=valid_B.view(-1, size).sum(1).float(), num_groups=(4,),
        )  # fmt: skip
        place = 0
        for batches in NoisedBatches(config, sampler, placement, rank=rank).rounds(scored):
            for batch in batches:
                for i in range(micro):
                    found[batch.timestep_M[i].item(), samples[place % len(samples)]] = seen(batch, i)
                    place += 1
        assert place == config.algorithm.train_timesteps * len(samples)
    return found


def seen(batch: NoisedBatch, i: int) -> tuple[torch.Tensor, ...]:
    group = batch.group_M[i]
    return (
        batch.x_t_MCHW[i], batch.x0_MCHW[i], batch.streams_N4[group], batch.group_size_G[group], batch.advantage_M[i],
        batch.valid_M[i], batch.conditioning.text_BND[i], torch.tensor([batch.group_share, batch.sample_share]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_ranks", "micro"), [(1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 4), (4, 2), (4, 1), (8, 2)]
)
def test_a_sample_is_trained_on_the_same_wherever_it_lies(num_ranks: int, micro: int) -> None:
    """Noise, sigmas, prompts, advantages and shares, to the bit; sample 5 has no reward."""
    alone, found = batches_of_ranks(1, 16), batches_of_ranks(num_ranks, micro)
    assert len(alone) == 16 * load_recipe("tiny-dgpo").algorithm.train_timesteps
    assert found.keys() == alone.keys()
    for key, values in alone.items():
        assert all(torch.equal(mine, other) for mine, other in zip(found[key], values, strict=True)), key


def test_the_words_of_a_sample_are_its_groups() -> None:
    prompts = PromptBatch(
        iteration=0, samples=(6, 7, 2, 3), group_size=4, prompts=("zero", "one"), unconditional=None,
        conditioning=Conditioning(text_BND=torch.zeros(2, 1, 1), pooled_BD=torch.zeros(2, 1)),
    )  # fmt: skip
    assert prompts.group_ids == (0, 1)
    assert prompts.prompt_of_sample == ("one", "one", "zero", "zero")
    assert prompts.group_B.tolist() == [1, 1, 0, 0]
    assert prompts.group_id_B.tolist() == [1, 1, 0, 0]
    assert prompts.group_B is prompts.group_B and prompts.group_id_B is prompts.group_id_B, "copied to a device once"
    fewer = replace(prompts, samples=(4, 5), prompts=("one",))
    assert fewer.prompt_of_sample == ("one", "one")
    assert (fewer.group_B.tolist(), fewer.group_id_B.tolist()) == ([0, 0], [1, 1])
