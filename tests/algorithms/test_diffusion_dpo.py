"""Online Diffusion-DPO on the embedded pipeline: its pairs, its loss against the written equation, its reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithms.diffusion_dpo import DiffusionDPO, pairs
from dgpo_fast.config import Config, check_ranks
from dgpo_fast.errors import UserError
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.engines import View
from dgpo_fast.parallel.world import World
from dgpo_fast.records import NoisedBatch, ScoredGroups

MakePolicy = Callable[..., AdapterPolicy]
Tiny = Callable[..., Config]
ScoredNoise = Callable[..., ScoredGroups]
Learn = Callable[..., tuple[Tensor, dict[str, float]]]
GradientOf = Callable[[AdapterPolicy, Tensor], Tensor]

EPS = torch.finfo(torch.float32).eps
SPREAD = 0.2
BETA = 10.0
SIGMAS = ("algorithm.train_timesteps=2", f"algorithm.beta={BETA}")
REWARDS = [0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.7, 0.6]  # best and worst: 1 and 0 of the first group, 2 and 1 of the second


def noise_of(batch: NoisedBatch) -> Tensor:
    """The noise of each sample, drawn by the definition of the streams."""
    return rng.normal(batch.streams_N4, batch.x0_MCHW.shape[1:])[batch.noise_M]


def written(policy: AdapterPolicy, batch: NoisedBatch, *, share: float, compared: View = "ref") -> dict[str, Tensor]:
    """Of pairs that teach, in float64: -log sigmoid(-beta / 2 ((d - d_ref) of the best - that of the worst))."""
    inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning)
    target = noise_of(batch).double() - batch.x0_MCHW.double()
    with torch.no_grad():
        reference = policy.velocity(compared, *inputs)[0].double()
    velocity = policy.velocity("policy", *inputs)[0].double()
    off_M = (target - velocity).square().mean((1, 2, 3)) - (target - reference).square().mean((1, 2, 3))
    inside_P = -BETA / 2 * (off_M[0::2] - off_M[1::2])
    loss = share * -torch.nn.functional.logsigmoid(inside_P).sum()
    weight_P = torch.sigmoid(-inside_P)
    return {
        "loss": loss, "policy_loss": loss, "group_weight_mean": share * weight_P.sum(),
        "group_weight_saturation": share * ((weight_P < 0.01) | (weight_P > 0.99)).double().sum(),
        "kl": share / 2 * (velocity - reference).square().mean((1, 2, 3)).sum(),
    }  # fmt: skip


@pytest.mark.parametrize("compared", ["ref", "old"])
def test_the_loss_and_its_gradient_are_the_written_ones(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn, gradient_of: GradientOf,
    compared: View,
) -> None:  # fmt: skip
    refresh = "null" if compared == "ref" else "3"
    config = tiny("tiny-diffusion-dpo", *SIGMAS, f"algorithm.refresh_every={refresh}")
    policy = make_policy(config, spread=SPREAD)
    scored = scored_noise(policy, config, rewards=REWARDS)
    gradient, found = learn(policy, config, scored)
    batches = [batch for (batch,) in DiffusionDPO(config).batches(scored)]
    assert len(batches) == 2, "of two pairs each"
    parts = [written(policy, batch, share=1 / 4, compared=compared) for batch in batches]
    expected = {name: sum(part[name].item() for part in parts) for name in parts[0]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=4 * EPS * BETA), name
    assert abs(expected["loss"] - math.log(2)) > 0.01
    written_gradient = gradient_of(policy, torch.stack([part["loss"] for part in parts]).sum())
    assert (gradient - written_gradient).norm() < 8 * EPS * BETA * written_gradient.norm()


def test_the_best_and_the_worst_are_paired() -> None:
    nan, inf = math.nan, math.inf
    rewards = torch.tensor(
        [
            [0.1, 0.9, 0.3, 0.2], [0.5, nan, 0.7, 0.6], [nan, nan, 0.7, 0.6], [-3.0, -1.0, inf, -2.0],
            [0.4, 0.4, 0.4, 0.4], [nan, 0.3, nan, nan], [nan] * 4,
        ]
    )  # fmt: skip
    chosen_P2, teaches_P = pairs(rewards)
    assert chosen_P2[:4].tolist() == [[1, 0], [2, 0], [2, 3], [1, 0]]
    assert teaches_P.tolist() == [True] * 4 + [False] * 3, "ties, one sample alone and none at all teach nothing"
    assert chosen_P2.min() >= 0 and chosen_P2.max() < 4


def test_a_pair_shares_noise_and_sigma(make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise) -> None:
    """The best comes first; another pair, or another draw of the same pair, has another noise and another sigma."""
    config = tiny("tiny-diffusion-dpo", *SIGMAS)
    policy = make_policy(config)
    scored = scored_noise(policy, config, rewards=REWARDS)
    sigmas, noises = list[float](), list[Tensor]()
    for (batch,) in DiffusionDPO(config).batches(scored):
        assert torch.equal(batch.x0_MCHW, scored.rollout.x0_BCHW[[1, 0, 6, 5]])
        assert batch.advantage_M.tolist() == [1.0, -1.0, 1.0, -1.0]
        assert batch.group_M.tolist() == [0, 0, 1, 1] and batch.group_size_G.tolist() == [2.0, 2.0]
        conditioning = scored.rollout.prompts.conditioning.text_BND[[0, 0, 1, 1]]
        assert torch.equal(batch.conditioning.text_BND, conditioning)
        told = batch.timestep_M.tolist()
        assert told[0] == told[1] and told[2] == told[3]
        noise = noise_of(batch)
        assert torch.equal(noise[0::2], noise[1::2])
        sigma_M = batch.timestep_M.double()[:, None, None, None] / 1000
        x_t = (1 - sigma_M) * batch.x0_MCHW.double() + sigma_M * noise.double()
        torch.testing.assert_close(batch.x_t_MCHW.double(), x_t, rtol=0, atol=64 * EPS)
        sigmas += told[0::2]
        noises += [*noise[0::2]]
    assert len(set(sigmas)) == 4
    assert (torch.cdist(*[torch.stack(noises).flatten(1)] * 2) + 1e9 * torch.eye(4)).min() > 1


def test_sigmas_are_logit_normal_and_shifted(make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise) -> None:
    """Undone the shift of 3, logits are standard normal: mean and deviation of 280, to five standard errors."""
    config = tiny("tiny-diffusion-dpo", "algorithm.train_timesteps=140", micro=4)
    policy = make_policy(config)
    batches = DiffusionDPO(config).batches(scored_noise(policy, config, rewards=REWARDS))
    sigma = torch.cat([batch.timestep_M[0::2] for (batch,) in batches]).double() / 1000
    assert len(sigma) == 280 and sigma.min() > 0 and sigma.max() < 1
    unshifted = sigma / (3 - 2 * sigma)
    logits = torch.logit(unshifted)
    assert logits.mean().item() == pytest.approx(0, abs=5 / 280**0.5)
    assert logits.std().item() == pytest.approx(1, abs=5 / 560**0.5)


def test_ties_and_failures_teach_nothing(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn
) -> None:
    """A group of equal rewards has no gradient, whatever its latents are; the others' is what it is without it. Where
    all are tied there is nothing to make a step of."""
    config = tiny("tiny-diffusion-dpo", *SIGMAS)
    policy = make_policy(config, spread=SPREAD)
    assert [*DiffusionDPO(config).batches(scored_noise(policy, config, rewards=[0.5] * 8))] == []
    scored = scored_noise(policy, config, rewards=REWARDS[:4] + [0.5] * 4)
    expected, _ = learn(policy, config, scored)
    assert expected.any()
    scored.rollout.x0_BCHW[4:] = math.nan
    gradient, _ = learn(policy, config, scored)
    assert torch.equal(gradient, expected)
    failed = scored_noise(policy, config, rewards=[*REWARDS[:4], math.nan, math.nan, 0.7, math.nan])
    failed.rollout.x0_BCHW[4:6] = math.inf
    assert torch.equal(learn(policy, config, failed)[0], expected)


def test_optimizer_steps_share_out_the_pairs(make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise) -> None:
    config = tiny("tiny-diffusion-dpo", *SIGMAS, "optimizer.steps_per_iteration=2")
    policy, algorithm = make_policy(config), DiffusionDPO(config)
    scored = scored_noise(policy, config, rewards=REWARDS)
    for update, samples in ((0, [1, 0]), (1, [6, 5])):
        batches = [batch for (batch,) in algorithm.batches(scored, update=update)]
        assert len(batches) == 2 and {batch.group_share for batch in batches} == {1 / 2}
        for batch in batches:
            assert torch.equal(batch.x0_MCHW, scored.rollout.x0_BCHW[samples])


def test_the_reference_becomes_the_policy_now_and_then(make_policy: MakePolicy, tiny: Tiny) -> None:
    config = tiny("tiny-diffusion-dpo", *SIGMAS, "algorithm.refresh_every=3")
    policy, algorithm = make_policy(config, spread=SPREAD), DiffusionDPO(config)
    assert algorithm.reference == "old" and DiffusionDPO(tiny("tiny-diffusion-dpo", *SIGMAS)).reference == "ref"
    for step in range(7):
        before = policy.views["old"].master.clone()
        policy.set_weights("policy", policy.trainable.detach() + 1)
        algorithm.after_iteration(policy, step)
        expected = policy.trainable.detach() if step in (2, 5) else before
        assert torch.equal(policy.views["old"].master, expected), step
    before = policy.views["old"].master.clone()
    for step in range(4):
        DiffusionDPO(tiny("tiny-diffusion-dpo", *SIGMAS)).after_iteration(policy, step)
    assert torch.equal(policy.views["old"].master, before)


@pytest.mark.parametrize(
    ("updates", "every", "refreshed"), [(2, 3, [3, 5, 9, 11]), (4, 5, [7, 11]), (2, 4, [3, 7, 11])]
)
def test_a_refresh_within_an_iteration_comes_behind_it(
    make_policy: MakePolicy, tiny: Tiny, updates: int, every: int, refreshed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is passed over because another step is the iteration's last."""
    overrides = (f"optimizer.steps_per_iteration={updates}", f"algorithm.refresh_every={every}")
    config = tiny("tiny-diffusion-dpo", *SIGMAS, *overrides, groups=4)
    policy, found = make_policy(config), list[int]()
    for step in range(updates - 1, 12, updates):
        monkeypatch.setattr(policy, "average_into", lambda view, *, decay, step=step: found.append(step))
        DiffusionDPO(config).after_iteration(policy, step)
    assert found == refreshed


def test_pairs_are_not_cut(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"images_per_micro_batch must be even for pairs \(diffusion_dpo\), got 1"):
        check_ranks(tiny("tiny-diffusion-dpo", *SIGMAS, micro=1), 1)
    with pytest.raises(UserError, match="must hold whole groups of 4 on several ranks, got 2"):
        check_ranks(tiny("tiny-diffusion-dpo", *SIGMAS, micro=2), 2)
    check_ranks(tiny("tiny-diffusion-dpo", *SIGMAS, micro=2), 1)
    check_ranks(tiny("tiny-diffusion-dpo", *SIGMAS, micro=4), 2)


def test_a_rank_names_pairs_by_their_groups(make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise) -> None:
    """Groups 1 and 3 of four are its own: what it makes of them is what a rank alone makes of them."""
    config = tiny("tiny-diffusion-dpo", *SIGMAS, groups=4)
    policy = make_policy(config)
    rewards = [0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.7, 0.6] * 2
    scored, mine = scored_noise(policy, config, rewards=rewards, invalid=range(4)), [*range(4, 8), *range(12, 16)]
    prompts = scored.rollout.prompts
    own = replace(
        prompts, samples=tuple(mine), prompts=(prompts.prompts[1], prompts.prompts[3]),
        conditioning=prompts.conditioning[torch.tensor([1, 3])],
    )  # fmt: skip
    rollout = replace(scored.rollout, x0_BCHW=scored.rollout.x0_BCHW[mine], prompts=own)
    share = replace(
        scored, rollout=rollout, reward_B=scored.reward_B[mine], valid_B=scored.valid_B[mine],
        advantage_B=scored.advantage_B[mine],
    )  # fmt: skip
    second = World(rank=1, size=2, device=torch.device("cpu"))
    alone = [batch for (batch,) in DiffusionDPO(config).batches(scored)]
    shared = [batch for (batch,) in DiffusionDPO(config, second).batches(share)]
    for name in ("x_t_MCHW", "streams_N4", "timestep_M", "advantage_M", "group_size_G"):
        of_all, of_mine = (torch.cat([getattr(batch, name) for batch in batches]) for batches in (alone, shared))
        of_group = of_all.unflatten(0, (config.algorithm.passes, 4, -1))
        assert torch.equal(of_group[:, [1, 3]].flatten(0, 2), of_mine), name
