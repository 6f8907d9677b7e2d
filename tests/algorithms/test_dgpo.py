"""DGPO on the embedded pipeline: its batches, its loss against the written equations, and groups that are cut.

Ranks are simulated here, one after the other; tests/parallel has real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.algorithms.group_weights import is_saturated
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.flow.rollout import initial_noise
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.engines import View
from dgpo_fast.ops.group_advantages import group_advantages
from dgpo_fast.ops.group_preference import group_scores
from dgpo_fast.ops.velocity_errors import velocity_errors
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.records import LossOutput, NoisedBatch, PromptBatch, Rollout, ScoredGroups

MakePolicy = Callable[..., AdapterPolicy]

EPS = torch.finfo(torch.float32).eps
PROMPTS = ("two red circles", "a blue square left of a green triangle")
BETA = 10
ROUNDING = 4 * EPS * BETA
"""Of what a report says: errors d of order 1 carry a few roundings, and s_G is beta times their differences."""
SPREAD = 0.2
"""Deviation of the adapters' weights: they change the output as much as the base's own weights do."""


def tiny(*overrides: str, size: int = 4, micro: int = 8) -> Config:
    """Two groups of four at one training sigma, in one micro-batch."""
    return load_recipe(
        "tiny-dgpo",
        [
            "adapter.rank=4", "adapter.alpha=8", f"groups.size={size}", "groups.per_iteration=2", "model.sampling=same",
            f"optimizer.images_per_micro_batch={micro}", "rollout.steps=3", "rollout.images_per_forward=4",
            "algorithm.trunc=1", "algorithm.train_timesteps=1", f"algorithm.beta={BETA}",
            "algorithm.kl_cfg=1", "algorithm.kl_coef=0.02", "rollout.guidance=1", *overrides,
        ],
    )  # fmt: skip


def prompt_batch(policy: AdapterPolicy, config: Config, *, iteration: int = 0) -> PromptBatch:
    return PromptBatch(
        iteration=iteration,
        samples=tuple(range(config.images_per_iteration)),
        group_size=config.groups.size,
        prompts=PROMPTS,
        conditioning=policy.model.encode(PROMPTS),
        unconditional=policy.model.encode([""]),
    )


def second_alone(prompts: PromptBatch) -> PromptBatch:
    """The second group, as the second of two ranks has it."""
    conditioning, samples = prompts.conditioning[slice(1, 2)], prompts.samples[prompts.group_size :]
    return replace(prompts, prompts=PROMPTS[1:], samples=samples, conditioning=conditioning)


def score(rollout: Rollout, config: Config, *, invalid: Sequence[int] = ()) -> ScoredGroups:
    """Random rewards; those of the samples `invalid` failed."""
    reward_B = torch.rand(len(rollout.x0_BCHW), generator=torch.Generator().manual_seed(5))
    reward_B[list(invalid)] = torch.nan
    valid_B, size = reward_B.isfinite(), config.groups.size
    advantages = group_advantages(reward_B, valid_B, group_size=size, std="group", epsilon=1e-4, clamp=5.0)
    return ScoredGroups(
        rollout=rollout, reward_B=reward_B, valid_B=valid_B, num_valid=(int(valid_B.sum()),),
        num_advantaged=(int(valid_B.sum()),),
        advantage_B=advantages.advantage_B, group_size_G=valid_B.view(-1, size).sum(1).float(),
        num_groups=(int(valid_B.view(-1, size).any(1).sum()),),
    )  # fmt: skip


def scored_groups(policy: AdapterPolicy, config: Config, *, invalid: Sequence[int] = ()) -> ScoredGroups:
    """Random latents instead of a rollout's: the loss does not care where they come from."""
    prompts = prompt_batch(policy, config)
    generator = torch.Generator().manual_seed(4)
    x0_BCHW = torch.randn(prompts.num_samples, *policy.model.latent_shape, generator=generator)
    rollout = Rollout(prompts=prompts, x0_BCHW=x0_BCHW)
    return score(rollout, config, invalid=invalid)


def learn(
    policy: AdapterPolicy,
    config: Config,
    scored: ScoredGroups,
    *,
    world: World = ALONE,
    ratio_errors: Literal["training", "again"] = "training",
) -> tuple[Tensor, dict[str, float]]:
    """The gradient and the metrics of an iteration on one rank, gathered as the trainer gathers them."""
    assert policy.trainable.grad is not None
    policy.trainable.grad.zero_()
    algorithm, outputs = DGPO(config, world), list[LossOutput]()
    algorithm.ratio_errors = ratio_errors
    for batches in algorithm.batches(scored):
        weights = algorithm.group_weights(policy, batches) or [None] * len(batches)
        for batch, weight in zip(batches, weights, strict=True):
            outputs.append(algorithm.loss(policy, batch, weight))
            outputs[-1].loss.backward()
            policy.collect_gradient()
    metrics = {name: sum(output.metrics[name].item() for output in outputs) for name in outputs[0].metrics}
    return policy.trainable.grad.clone(), metrics


def single_batch(config: Config, scored: ScoredGroups) -> NoisedBatch:
    ((batch,),) = DGPO(config).batches(scored)
    return batch


def noise_of(batch: NoisedBatch) -> Tensor:
    """The noise of each sample, drawn by the definition of the streams."""
    return rng.normal(batch.streams_N4, batch.x0_MCHW.shape[1:])[batch.noise_M]


def mean_squares(velocity: Tensor, batch: NoisedBatch) -> Tensor:
    """Denoising errors, written out."""
    return (velocity.float() - (noise_of(batch) - batch.x0_MCHW)).square().mean((1, 2, 3))


def counted(policy: AdapterPolicy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The forwards from now on, as they happen: view, and number of samples with both halves of guidance."""
    forwards: list[tuple[str, int]] = []
    velocity = policy.engine.velocity

    def counting(view: View, x_BCHW: Tensor, conditioned: object) -> Tensor:
        forwards.append((view, len(x_BCHW)))
        return velocity(view, x_BCHW, conditioned)

    monkeypatch.setattr(policy.engine, "velocity", counting)
    return forwards


def test_noise_and_sigma_are_shared_by_a_group(make_policy: MakePolicy) -> None:
    config = tiny("rollout.steps=6", "algorithm.trunc=3", "algorithm.train_timesteps=3")
    policy = make_policy(config)
    scored = scored_groups(policy, config)
    x0_BCHW, noises = scored.rollout.x0_BCHW, []
    for (batch,) in DGPO(config).batches(scored):
        (timestep,) = set(batch.timestep_M.tolist())
        sigma = timestep / 1000
        noise_BCHW = noise_of(batch)
        noise_GCHW = noise_BCHW[::4]
        assert torch.equal(noise_BCHW, noise_GCHW.repeat_interleave(4, 0))
        largest = max(noise_BCHW.abs().max().item(), x0_BCHW.abs().max().item())
        assert torch.equal(batch.x0_MCHW, x0_BCHW)
        # x_t = x0 + sigma (noise - x0) in a few roundings, the noise to 4 ulp.
        expected = (1 - sigma) * x0_BCHW.double() + sigma * noise_BCHW.double()
        torch.testing.assert_close(batch.x_t_MCHW.double(), expected, rtol=0, atol=8 * EPS * largest)
        assert batch.x_t_MCHW.dtype == batch.timestep_M.dtype == torch.float32
        noises.extend(noise_GCHW)
    # Two groups at three sigmas: six different noises, each standard normal.
    assert len(noises) == 6
    correlation = torch.corrcoef(torch.stack(noises).flatten(1))
    # Of 1024 independent numbers, to five standard deviations.
    assert (correlation - torch.eye(6)).abs().max() < 5 / 1024**0.5
    assert torch.stack(noises).std().item() == pytest.approx(1, abs=5 / (2 * 6 * 1024) ** 0.5)


def test_training_sigmas_are_points_of_the_rollouts_schedule(make_policy: MakePolicy) -> None:
    """M of the first trunc + 1, without replacement, another choice each iteration, the same for every group."""
    config = tiny("rollout.steps=10", "algorithm.trunc=4", "algorithm.train_timesteps=3", micro=4)
    policy = make_policy(config)
    algorithm = DGPO(config)
    allowed = (1000 * algorithm.groups.sampler.sigmas[:5]).astype("float32").tolist()
    scored = scored_groups(policy, config)
    drawn = []
    for iteration in range(40):
        prompts = replace(scored.rollout.prompts, iteration=iteration)
        rounds = list(algorithm.batches(replace(scored, rollout=replace(scored.rollout, prompts=prompts))))
        told = [batch.timestep_M[0].item() for (batch,) in rounds]
        assert told[::2] == told[1::2], "each group trains at the same sigmas"
        assert len(set(told)) == 3
        assert set(told) <= set(allowed)
        drawn.append(tuple(told[::2]))
    assert {timestep for told in drawn for timestep in told} == set(allowed)
    assert len({frozenset(told) for told in drawn}) == math.comb(5, 3)


def test_integer_timesteps_truncate_sigma_too(make_policy: MakePolicy) -> None:
    overrides = ("rollout.steps=10", "algorithm.trunc=9", "algorithm.train_timesteps=10")
    config = tiny("rollout.timesteps=integer", *overrides)
    policy = make_policy(config)
    scored = scored_groups(policy, config)
    told = set()
    for (batch,) in DGPO(config).batches(scored):
        (timestep,) = set(batch.timestep_M.tolist())
        sigma = timestep / 1000
        x0_BCHW = scored.rollout.x0_BCHW
        expected = x0_BCHW.double() + sigma * (noise_of(batch) - x0_BCHW).double()
        torch.testing.assert_close(batch.x_t_MCHW.double(), expected, rtol=0, atol=8 * EPS * 6)
        told.add(timestep)
    assert told == {999, 963, 922, 874, 817, 749, 666, 562, 428, 249}
    exact = {batch.timestep_M[0].item() for (batch,) in DGPO(tiny(*overrides)).batches(scored)}
    assert exact == set((1000 * DGPO(config).groups.sampler.sigmas[:-1]).astype("float32").tolist())


def test_batches_of_a_group_do_not_depend_on_the_rank(make_policy: MakePolicy) -> None:
    """The second group alone is the second half of both."""
    config = tiny(micro=4)
    policy = make_policy(config)
    both = scored_groups(policy, config)
    alone = ScoredGroups(
        rollout=replace(both.rollout, prompts=second_alone(both.rollout.prompts), x0_BCHW=both.rollout.x0_BCHW[4:]),
        reward_B=both.reward_B[4:],
        valid_B=both.valid_B[4:],
        num_valid=both.num_valid,
        num_advantaged=both.num_advantaged,
        num_groups=both.num_groups,
        advantage_B=both.advantage_B[4:],
        group_size_G=both.group_size_G,
    )
    _, (second,) = DGPO(config).batches(both)
    ((only,),) = DGPO(config, World(rank=1, size=2, device=torch.device("cpu"))).batches(alone)
    for name in ("x_t_MCHW", "x0_MCHW", "streams_N4", "timestep_M", "advantage_M", "group_M", "group_size_G"):
        assert torch.equal(getattr(second, name), getattr(only, name)), name
    assert (second.group_share, second.sample_share) == (only.group_share, only.sample_share) == (1 / 2, 1 / 8)


@pytest.mark.parametrize(("micro", "rounds", "pieces", "groups"), [(2, 2, 2, 1), (4, 2, 1, 1), (8, 1, 1, 2)])
def test_a_round_holds_whole_groups(make_policy: MakePolicy, micro: int, rounds: int, pieces: int, groups: int) -> None:
    config = tiny(micro=micro)
    policy = make_policy(config)
    scored = scored_groups(policy, config, invalid=[5])
    found = list(DGPO(config).batches(scored))
    assert [len(batches) for batches in found] == [pieces] * rounds
    sizes = []
    for batches in found:
        for batch in batches:
            assert len(batch.x_t_MCHW) == micro
            assert batch.group_size_G.shape == (groups,)
            assert 0 <= batch.group_M.min() <= batch.group_M.max() < groups
        sizes.extend(batches[0].group_size_G.tolist())
    assert sizes == [4.0, 3.0]
    advantage_B = torch.cat([batch.advantage_M for batches in found for batch in batches])
    assert torch.equal(advantage_B, scored.advantage_B)


def written_loss(policy: AdapterPolicy, config: Config, batch: NoisedBatch) -> tuple[dict[str, float], list[float]]:
    """Algorithm 1 in float64, from the velocities of the views: the report, and the weight of each group."""
    settings = config.algorithm
    inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning)
    empty = batch.unconditional
    target = (noise_of(batch) - batch.x0_MCHW).double()

    def error(velocity: Tensor) -> Tensor:
        return (target - velocity.double()).square().mean((1, 2, 3))

    with torch.no_grad():
        velocity = policy.velocity("policy", *inputs)[0]
        v_cond, v_uncond = policy.velocity("ref", *inputs, empty)
        v_old = policy.velocity("old", *inputs)[0]
    v_ref = v_cond.double()
    if settings.kl_cfg > 1:
        assert v_uncond is not None
        v_ref = v_uncond.double() + settings.kl_cfg * (v_cond.double() - v_uncond.double())
    d, d_old = error(velocity), error(v_old)
    d_ref = d_old if settings.reference == "old" else error(v_ref)
    counts_M = batch.valid_M.double()
    losses, surrogates, weights, sizes, clipped = [], [], [], [], 0.0
    for group in (0, 1):
        mine = (batch.group_M == group) & batch.valid_M
        a, n = batch.advantage_M[mine].double(), mine.sum()
        s = settings.beta / n * (a * (d - d_ref)[mine]).sum()
        ratio = torch.exp((d_old - d)[mine])
        c = settings.clip or math.inf
        clipped += torch.where(a > 0, ratio > 1 + c, ratio < 1 - c).double().sum().item()
        losses.append(torch.log1p(torch.exp(s)) / settings.beta)
        surrogates.append(torch.sigmoid(s) * (a * d[mine]).sum() / n)
        weights.append(torch.sigmoid(s).item())
        sizes.append(n.item())
    kl = (counts_M * (velocity.double() - v_ref).square().mean((1, 2, 3))).sum() / counts_M.sum()
    dgpo_loss = torch.stack(losses).mean()
    report = {
        "loss": (dgpo_loss + settings.kl_coef * kl).item(),
        "dgpo_loss": dgpo_loss.item(),
        "surrogate_loss": torch.stack(surrogates).mean().item(),
        "kl": kl.item(),
        "clip_fraction": clipped / counts_M.sum().item(),
        "group_weight_mean": sum(w * n for w, n in zip(weights, sizes, strict=True)) / sum(sizes),
        "group_weight_saturation": sum(n for w, n in zip(weights, sizes, strict=True) if min(w, 1 - w) < 0.01)
        / sum(sizes),
    }
    return report, weights


@pytest.mark.parametrize("invalid", [(), (1, 6, 7)])
@pytest.mark.parametrize("reference", ["base", "old"])
@pytest.mark.parametrize("kl_cfg", [1.0, 4.5])
def test_the_report_is_the_written_loss(
    make_policy: MakePolicy, kl_cfg: float, reference: str, invalid: tuple[int, ...]
) -> None:
    """Samples that failed do not count; with kl_cfg the reference is guided; either reference."""
    clipped = ("algorithm.clip=0.001", "algorithm.kl_coef=0.3", "algorithm.beta=300")
    config = tiny(f"algorithm.kl_cfg={kl_cfg}", f"algorithm.reference={reference}", *clipped)
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config, invalid=invalid)
    written, weights = written_loss(policy, config, single_batch(config, scored))
    _, found = learn(policy, config, scored)
    assert found.keys() == written.keys()
    for name, value in written.items():
        assert found[name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name
    assert min(abs(weight - 0.5) for weight in weights) > 100 * ROUNDING, "the weights say something"
    assert 0 < written["clip_fraction"] < 1


@pytest.mark.parametrize(("beta", "share"), [(1.0, 0.0), (1e5, 1.0)])
def test_weights_saturate_where_the_scores_are_large(make_policy: MakePolicy, beta: float, share: float) -> None:
    config = tiny(f"algorithm.beta={beta}")
    policy = make_policy(config, spread=SPREAD)
    written, weights = written_loss(policy, config, single_batch(config, scored_groups(policy, config)))
    assert written["group_weight_saturation"] == share, weights
    assert learn(policy, config, scored_groups(policy, config))[1]["group_weight_saturation"] == pytest.approx(share)


def test_a_weight_is_saturated_within_a_hundredth_of_its_ends() -> None:
    weight_G = torch.tensor([0.0, 0.0099, 0.0101, 0.5, 0.9899, 0.9901, 1.0])
    assert is_saturated(weight_G).tolist() == [True, True, False, False, False, True, True]


def test_what_nobody_measures_is_not_reported(make_policy: MakePolicy) -> None:
    """The distance to a base that no term asks for; an old policy's is no distance to it."""
    for overrides, is_measured in (
        (("algorithm.reference=old", "algorithm.kl_coef=0"), False),
        (("algorithm.reference=old",), True),
        (("algorithm.kl_coef=0",), True),
    ):
        config = tiny(*overrides)
        policy = make_policy(config, spread=SPREAD)
        assert ("kl" in learn(policy, config, scored_groups(policy, config))[1]) == is_measured


def test_two_sigmas_are_averaged(make_policy: MakePolicy) -> None:
    config = tiny("algorithm.train_timesteps=2")
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config)
    written = [written_loss(policy, config, batch)[0] for (batch,) in DGPO(config).batches(scored)]
    _, found = learn(policy, config, scored)
    assert len(written) == 2
    for name, value in found.items():
        expected = (written[0][name] + written[1][name]) / 2
        assert value == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING), name


def test_the_gradient_is_that_of_the_surrogate_and_the_kl_term(make_policy: MakePolicy) -> None:
    """Against autograd on the formula of the published code, its weights computed apart."""
    config = tiny("algorithm.kl_coef=0.3", "algorithm.clip=0.001")
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config, invalid=[2])
    gradient, _ = learn(policy, config, scored)
    batch = single_batch(config, scored)
    inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning)
    with torch.no_grad():
        v_ref, v_old = (policy.velocity(view, *inputs)[0] for view in ("ref", "old"))
    d_ref, d_old = mean_squares(v_ref, batch), mean_squares(v_old, batch)
    velocity = policy.velocity("policy", *inputs)[0]
    d, a, kept = mean_squares(velocity, batch), batch.advantage_M, batch.valid_M
    weight_M = torch.cat(
        [torch.sigmoid(BETA * (a * (d - d_ref))[g][kept[g]].mean()).expand(4) for g in (slice(4), slice(4, 8))]
    ).detach()
    size_M = torch.cat([kept[g].sum().expand(4) for g in (slice(4), slice(4, 8))])
    ratio = torch.exp(d_old - d).detach()
    free = kept & ~torch.where(a > 0, ratio > 1.001, ratio < 0.999)
    assert 0 < free.sum() < kept.sum()
    kl = (kept * (velocity - v_ref).square().mean((1, 2, 3))).sum() / 7
    ((free * weight_M * a * d / size_M).sum() / 2 + 0.3 * kl).backward()
    assert policy.trainable.grad is not None
    expected = policy.trainable.grad - gradient
    error = (gradient - expected).norm() / expected.norm()
    assert error < 8 * EPS


@pytest.mark.parametrize("micro", [4, 8])
def test_where_gradients_change_the_kernels_the_ratio_is_that_without(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """Equal policies, and a forward that moves with gradients on: none is clipped, and the weights are exact."""
    config = tiny("algorithm.clip=1e-6", size=4, micro=micro)
    policy = make_policy(config, spread=SPREAD)
    policy.set_weights("old", policy.trainable.detach())
    scored = scored_groups(policy, config)
    exact, report = learn(policy, config, scored)
    assert report["clip_fraction"] == 0
    velocity = policy.engine.velocity

    def drifted(view: View, x_BCHW: Tensor, conditioned: object) -> Tensor:
        return velocity(view, x_BCHW, conditioned) * (1 + 1e-4 * (view == "policy" and torch.is_grad_enabled()))

    monkeypatch.setattr(policy.engine, "velocity", drifted)
    assert learn(policy, config, scored)[1]["clip_fraction"] > 0.2
    gradient, found = learn(policy, config, scored, ratio_errors="again")
    assert found["clip_fraction"] == 0
    assert found["group_weight_mean"] == report["group_weight_mean"]
    assert (gradient - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("kl_cfg", [1.0, 4.5])
def test_cutting_groups_changes_neither_gradient_nor_report(make_policy: MakePolicy, kl_cfg: float) -> None:
    """Groups of 16 in micro-batches of 4, 8 and 16, against both groups in one of 32."""
    overrides = ("algorithm.clip=0.001", f"algorithm.kl_cfg={kl_cfg}")
    undivided = tiny(*overrides, size=16, micro=32)
    policy = make_policy(undivided, spread=SPREAD)
    scored = scored_groups(policy, undivided, invalid=[3, 20])
    expected, report = learn(policy, undivided, scored)
    for micro in (4, 8, 16):
        gradient, found = learn(policy, tiny(*overrides, size=16, micro=micro), scored)
        # The gradients of 32 samples, summed in another order.
        assert (gradient - expected).norm() / expected.norm() < 32 * EPS
        for name, value in report.items():
            assert found[name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), (micro, name)


def test_pieces_taken_for_groups_would_be_noticed(make_policy: MakePolicy) -> None:
    """How far off the gradient is when each piece weighs itself: what the test above would see."""
    config = tiny("algorithm.clip=null", size=16, micro=32)
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config)
    expected, _ = learn(policy, config, scored)
    ((batch,),) = DGPO(config).batches(scored)
    pieces = replace(
        batch,
        group_M=torch.arange(32) // 4,
        noise_M=torch.arange(32) // 4,
        streams_N4=batch.streams_N4.repeat_interleave(4, 0),
        group_size_G=torch.full((8,), 4.0),
        group_share=batch.group_share / 4,
    )
    assert policy.trainable.grad is not None
    policy.trainable.grad.zero_()
    DGPO(config).loss(policy, pieces, None).loss.backward()
    assert (policy.trainable.grad - expected).norm() / expected.norm() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_the_first_pass_are_those_of_the_loss(make_policy: MakePolicy, dtype: str) -> None:
    """Without gradients and with them, in the same batch shape: equal to the bit."""
    config = tiny(f"model.dtype={dtype}", "algorithm.beta=1000", micro=2)
    policy = make_policy(config, spread=SPREAD)
    algorithm = DGPO(config)
    for batches in algorithm.batches(scored_groups(policy, config)):
        weights = algorithm.group_weights(policy, batches)
        assert weights is not None
        scores = []
        for batch, weight in zip(batches, weights, strict=True):
            velocity = policy.velocity("policy", batch.x_t_MCHW, batch.timestep_M, batch.conditioning)[0]
            assert velocity.requires_grad
            errors = velocity_errors(
                velocity, x0=batch.x0_MCHW, streams=batch.streams_N4, group_M=batch.noise_M,
                reference=weight.anchors.reference_MCHW, unconditional=weight.anchors.unconditional_MCHW,
            )  # fmt: skip
            groups = {"advantage_M": batch.advantage_M, "group_M": batch.group_M, "size_G": batch.group_size_G}
            scores.append(group_scores(errors.policy_M, errors.reference_M, **groups, beta=1000.0))
        for weight in weights:
            assert torch.equal(weight.score_G, torch.stack(scores).sum(0))


def test_no_first_pass_where_groups_are_whole(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(micro=4)
    policy = make_policy(config)
    scored = scored_groups(policy, config)
    forwards = counted(policy, monkeypatch)
    for batches in DGPO(config).batches(scored):
        assert DGPO(config).group_weights(policy, batches) is None
    assert forwards == []


@pytest.mark.parametrize("micro", [2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_clipped_while_old_equals_policy(make_policy: MakePolicy, dtype: str, micro: int) -> None:
    """The ratio is exactly 1, so no range is too narrow; with reference old the weights are exactly one half."""
    overrides = (f"model.dtype={dtype}", "algorithm.clip=1e-30", "algorithm.reference=old", "algorithm.kl_coef=0")
    config = tiny(*overrides, "algorithm.beta=5000", micro=micro)
    policy = make_policy(config, spread=SPREAD)
    policy.set_weights("old", policy.trainable.detach())
    gradient, found = learn(policy, config, scored_groups(policy, config))
    assert found["clip_fraction"] == 0
    assert found["group_weight_mean"] == 0.5
    assert gradient.any()


def test_everything_moved_too_far_gives_no_gradient(make_policy: MakePolicy) -> None:
    config = tiny("algorithm.clip=1e-7", "algorithm.kl_coef=0")
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config)
    with torch.no_grad():
        batch = single_batch(config, scored)
        inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning)
        d, d_old = (mean_squares(policy.velocity(v, *inputs)[0], batch) for v in ("policy", "old"))
    # Advantages that praise what improved and blame what did not.
    praised = replace(scored, advantage_B=(d_old - d).sign())
    gradient, found = learn(policy, config, praised)
    assert found["clip_fraction"] == 1
    assert not gradient.any()


@pytest.mark.parametrize("latent", [-3.0, math.inf, math.nan])
def test_failed_samples_give_no_gradient(make_policy: MakePolicy, latent: float) -> None:
    """Whatever their latents are."""
    config = tiny("algorithm.kl_coef=0.3")
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config, invalid=[1, 4, 5])
    before, report = learn(policy, config, scored)
    scored.rollout.x0_BCHW[[1, 4, 5]] = latent
    after, found = learn(policy, config, scored)
    assert before.any()
    assert torch.equal(before, after)
    assert report == found


def test_equal_rewards_leave_the_kl_term_alone(make_policy: MakePolicy) -> None:
    config = tiny("algorithm.kl_coef=0")
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config)
    flat = replace(scored, advantage_B=torch.zeros_like(scored.advantage_B))
    gradient, found = learn(policy, config, flat)
    assert not gradient.any()
    assert found["dgpo_loss"] == pytest.approx(math.log(2) / BETA)
    assert learn(policy, tiny("algorithm.kl_coef=0.1"), flat)[0].any()


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ((), [("ref", 8), ("old", 8), ("policy", 8)]),
        (("algorithm.kl_cfg=4.5",), [("ref", 16), ("old", 8), ("policy", 8)]),
        (("algorithm.clip=null",), [("ref", 8), ("policy", 8)]),
        (("algorithm.kl_coef=0",), [("ref", 8), ("old", 8), ("policy", 8)]),
        (("algorithm.reference=old",), [("ref", 8), ("old", 8), ("policy", 8)]),
        (("algorithm.reference=old", "algorithm.kl_coef=0"), [("old", 8), ("policy", 8)]),
        (("algorithm.reference=old", "algorithm.kl_coef=0", "algorithm.clip=null"), [("old", 8), ("policy", 8)]),
    ],
)
def test_no_forward_is_run_that_nothing_needs(
    make_policy: MakePolicy,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    needed: list[tuple[str, int]],
) -> None:
    config = tiny(*overrides)
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config)
    forwards = counted(policy, monkeypatch)
    learn(policy, config, scored)
    assert forwards == needed


def test_a_cut_group_costs_one_more_policy_forward(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference and old errors of the first pass serve the second."""
    config = tiny(micro=2)
    policy = make_policy(config, spread=SPREAD)
    scored = scored_groups(policy, config)
    forwards = counted(policy, monkeypatch)
    learn(policy, config, scored)
    assert {view: forwards.count((view, 2)) for view in ("ref", "old", "policy")} == {"ref": 4, "old": 4, "policy": 8}
    assert len(forwards) == 16


@pytest.mark.parametrize(("iteration", "view"), [(0, "policy"), (4, "policy"), (5, "old"), (6, "old")])
def test_later_rollouts_sample_from_the_old_policy(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, iteration: int, view: str
) -> None:
    config = tiny("rollout.switch_step=5")
    policy = make_policy(config, spread=SPREAD)
    forwards = counted(policy, monkeypatch)
    assert config.sampling_view(iteration) == view
    DGPO(config).rollout(policy, config.sampling_view(iteration), prompt_batch(policy, config, iteration=iteration))
    assert forwards == [(view, 4)] * 6  # two chunks of four images, three steps


@pytest.mark.parametrize(("guidance", "images"), [(1.0, 4), (4.5, 8)])
def test_a_rollout_is_guided_where_the_recipe_says(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, guidance: float, images: int
) -> None:
    config = tiny(f"rollout.guidance={guidance}")
    policy = make_policy(config, spread=SPREAD)
    forwards = counted(policy, monkeypatch)
    delivered: list[Tensor] = []
    asked: list[str] = []
    prompts = prompt_batch(policy, config)
    rollout = DGPO(config).rollout(
        policy, "policy", prompts, deliver=lambda x0_BCHW, batch: (delivered.append(x0_BCHW), asked.extend(batch))
    )
    assert {size for _, size in forwards} == {images}
    assert rollout.x0_BCHW.shape == (8, *policy.model.latent_shape)
    assert [len(x0_BCHW) for x0_BCHW in delivered] == [4, 4]
    assert torch.equal(torch.cat(delivered), rollout.x0_BCHW)
    assert asked == [prompts.prompts[0]] * 4 + [prompts.prompts[1]] * 4


def test_a_rollout_is_named_by_iteration_group_and_sample(make_policy: MakePolicy) -> None:
    """Every image starts from a noise of its own, whichever rank draws its group."""
    config = tiny()
    policy = make_policy(config, spread=SPREAD)
    algorithm = DGPO(config)
    prompts = prompt_batch(policy, config)
    both, alone, later = (
        algorithm.rollout(policy, "policy", batch).x0_BCHW
        for batch in (prompts, second_alone(prompts), replace(prompts, iteration=1))
    )
    assert torch.equal(both[4:], alone)
    everything = torch.cat([both, later]).flatten(1)
    distance = torch.cdist(everything, everything) + 1e9 * torch.eye(16)
    assert distance.min() > 1


@pytest.mark.parametrize(("step", "decay"), [(0, 0.0), (7, 0.007), (299, 0.299), (300, 0.3), (5000, 0.3)])
def test_the_old_policy_follows_the_published_average(make_policy: MakePolicy, step: int, decay: float) -> None:
    config = tiny()
    policy = make_policy(config, spread=SPREAD)
    old, current, ema = (policy.views[view].master.double() for view in ("old", "policy", "ema"))
    DGPO(config).after_iteration(policy, step)
    average = policy.views["old"].master.double()
    rounding = 3 * EPS * old.abs().max().item()
    torch.testing.assert_close(average, decay * old + (1 - decay) * current, rtol=0, atol=rounding)
    assert torch.equal(policy.views["policy"].master.double(), current)
    assert torch.equal(policy.views["ema"].master.double(), ema)


# Groups over ranks

SHARES = [(ranks, micro) for ranks in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 4, 6, 12) if 12 % (ranks * micro) == 0]
"""Every number of ranks, and of images in a micro-batch, that two groups of six divide among."""


def worlds(num_ranks: int) -> list[World]:
    return [World(rank=rank, size=num_ranks, device=torch.device("cpu")) for rank in range(num_ranks)]


def of_rank(prompts: PromptBatch, config: Config, world: World) -> PromptBatch:
    """What of an iteration lies on one rank."""
    samples = placement_of(config, world.size).samples(world.rank, total=prompts.num_samples)
    groups = sorted({sample // prompts.group_size for sample in samples})
    return replace(
        prompts, samples=samples, prompts=tuple(prompts.prompts[group] for group in groups),
        conditioning=prompts.conditioning[torch.tensor(groups)],
    )  # fmt: skip


def scored_of_rank(scored: ScoredGroups, config: Config, world: World) -> ScoredGroups:
    prompts = of_rank(scored.rollout.prompts, config, world)
    mine = list(prompts.samples)
    return replace(
        scored, rollout=replace(scored.rollout, prompts=prompts, x0_BCHW=scored.rollout.x0_BCHW[mine]),
        reward_B=scored.reward_B[mine], valid_B=scored.valid_B[mine], advantage_B=scored.advantage_B[mine],
    )  # fmt: skip


class Learnt(NamedTuple):
    """What ranks learn together."""

    gradient: Tensor
    metrics: dict[str, float]
    sums: list[Tensor]  # scores that were summed over the ranks, in order
    forwards: list[list[tuple[str, int]]]  # of each rank


def learn_on_ranks(
    policy: AdapterPolicy,
    config: Config,
    scored: ScoredGroups,
    num_ranks: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    ratio_errors: Literal["training", "again"] = "training",
) -> Learnt:
    """Rank after rank, twice: what each gives to a sum is noted, and known when they do it again."""
    given: dict[int, list[Tensor]] = {rank: [] for rank in range(num_ranks)}
    with monkeypatch.context() as patch:
        patch.setattr(World, "sum", lambda world, part: (given[world.rank].append(part), part)[1])
        for world in worlds(num_ranks):
            learn(policy, config, scored_of_rank(scored, config, world), world=world, ratio_errors=ratio_errors)
    sums = [torch.stack(parts).sum(0) for parts in zip(*given.values(), strict=True)]
    found, forwards = [], []
    for world in worlds(num_ranks):
        known = iter(sums)
        with monkeypatch.context() as patch:
            patch.setattr(World, "sum", lambda world, part, known=known: next(known))
            forwards.append(counted(policy, patch))
            mine = scored_of_rank(scored, config, world)
            found.append(learn(policy, config, mine, world=world, ratio_errors=ratio_errors))
        assert next(known, None) is None, "each rank sums as often"
    names = found[0][1]
    return Learnt(
        gradient=torch.stack([gradient for gradient, _ in found]).sum(0),
        metrics={name: sum(metrics[name] for _, metrics in found) for name in names},
        sums=sums,
        forwards=forwards,
    )


def assert_the_same(found: Learnt, gradient: Tensor, metrics: dict[str, float]) -> None:
    """To the rounding of float32: twelve gradients, summed in another order."""
    assert (found.gradient - gradient).norm() / gradient.norm() < 12 * EPS
    for name, value in metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name


@pytest.mark.parametrize(("num_ranks", "micro"), SHARES)
def test_ranks_learn_what_one_learns(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, num_ranks: int, micro: int
) -> None:
    """Whole groups, groups over ranks, over micro-steps, over both; two samples have no reward."""
    undivided, divided = (tiny("algorithm.clip=0.001", size=6, micro=m) for m in (12, micro))
    policy = make_policy(undivided, spread=SPREAD)
    scored = scored_groups(policy, undivided, invalid=[2, 9])
    gradient, metrics = learn(policy, undivided, scored)
    assert 0 < metrics["clip_fraction"] < 1
    found = learn_on_ranks(policy, divided, scored, num_ranks, monkeypatch)
    assert_the_same(found, gradient, metrics)

    placement = placement_of(divided, num_ranks)
    num_rounds = 12 // (num_ranks * micro) // placement.steps_per_round
    assert len(found.sums) == (0 if placement.case == "a" else num_rounds)
    assert all(found.forwards[0] == of_rank for of_rank in found.forwards)
    assert found.forwards[0].count(("policy", micro)) == 12 // (num_ranks * micro) * (1 + (placement.case == "c"))


@pytest.mark.parametrize(("num_ranks", "micro"), [(2, 6), (2, 3), (3, 4), (4, 1)])
def test_a_group_without_rewards_keeps_its_place_on_every_rank(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, num_ranks: int, micro: int
) -> None:
    """It teaches nothing, whatever its latents are, and no rank runs less for it."""
    undivided, divided = (tiny(size=6, micro=m) for m in (12, micro))
    policy = make_policy(undivided, spread=SPREAD)
    complete = scored_groups(policy, undivided)
    scored = score(complete.rollout, undivided, invalid=range(6))
    scored.rollout.x0_BCHW[:6] = torch.nan
    gradient, metrics = learn(policy, undivided, scored)
    found = learn_on_ranks(policy, divided, scored, num_ranks, monkeypatch)
    assert_the_same(found, gradient, metrics)
    assert gradient.any()
    assert all(forwards == found.forwards[0] for forwards in found.forwards)


@pytest.mark.parametrize(("num_ranks", "micro"), [(2, 6), (2, 3), (2, 2), (3, 4)])
def test_ranks_that_run_the_policy_once_more_learn_the_same(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, num_ranks: int, micro: int
) -> None:
    undivided, divided = (tiny("algorithm.clip=0.001", size=6, micro=m) for m in (12, micro))
    policy = make_policy(undivided, spread=SPREAD)
    scored = scored_groups(policy, undivided, invalid=[2, 9])
    found = learn_on_ranks(policy, divided, scored, num_ranks, monkeypatch, ratio_errors="again")
    assert_the_same(found, *learn(policy, undivided, scored))


@pytest.mark.parametrize(("num_ranks", "micro"), [(2, 3), (3, 4), (2, 2)])
def test_scores_that_stay_on_their_ranks_would_be_noticed(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, num_ranks: int, micro: int
) -> None:
    """How far off the gradient is when no rank hears of the others' pieces: what the tests above would see."""
    undivided, divided = (tiny("algorithm.clip=null", size=6, micro=m) for m in (12, micro))
    policy = make_policy(undivided, spread=SPREAD)
    scored = scored_groups(policy, undivided)
    expected, _ = learn(policy, undivided, scored)
    monkeypatch.setattr(World, "sum", lambda world, part: part)
    found = [learn(policy, divided, scored_of_rank(scored, divided, world), world=world) for world in worlds(num_ranks)]
    gradient = torch.stack([gradient for gradient, _ in found]).sum(0)
    assert (gradient - expected).norm() / expected.norm() > 1e-3


@pytest.mark.parametrize(("num_ranks", "micro"), [(2, 6), (3, 4), (4, 1)])
def test_rollouts_start_from_the_same_noise_on_any_rank(make_policy: MakePolicy, num_ranks: int, micro: int) -> None:
    """To the bit, and with the same words; different for every sample."""
    config = tiny(size=6, micro=micro)
    policy = make_policy(config)
    prompts = prompt_batch(policy, config)
    noise_BCHW = initial_noise(policy, prompts, seed=3)
    assert torch.cdist(*[noise_BCHW.flatten(1)] * 2).fill_diagonal_(math.inf).min() > 1
    for world in worlds(num_ranks):
        mine = of_rank(prompts, config, world)
        assert torch.equal(initial_noise(policy, mine, seed=3), noise_BCHW[list(mine.samples)])
        assert mine.prompt_of_sample == tuple(PROMPTS[sample // 6] for sample in mine.samples)
        text_BND = mine.conditioning[mine.group_B].text_BND
        assert torch.equal(text_BND, prompts.conditioning[prompts.group_B].text_BND[list(mine.samples)])
