"""Flow-GRPO on the embedded pipeline: its loss against the written equations, ratios of exactly 1, noise by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.algorithms.flow_grpo import FlowGRPO
from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.flow.schedules import schedule_sigmas
from dgpo_fast.flow.sde import SDESampler
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.engines import View
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.records import PromptBatch, Rollout, ScoredGroups, TrajectoryBatch

MakePolicy = Callable[..., AdapterPolicy]
Tiny = Callable[..., Config]
PromptsOf = Callable[..., PromptBatch]
Score = Callable[..., ScoredGroups]
Learn = Callable[..., tuple[Tensor, dict[str, float]]]
GradientOf = Callable[[AdapterPolicy, Tensor], Tensor]

EPS = torch.finfo(torch.float32).eps
SPREAD = 0.2
LEVEL = 0.7
RECIPE = ("algorithm.trained_steps=3", f"algorithm.noise_level={LEVEL}")
WINDOW = ("algorithm.trained_steps=3", "algorithm.window=2")


def drawn(policy: AdapterPolicy, config: Config, prompts_of: PromptsOf, **named: Any) -> Rollout:
    return FlowGRPO(config).rollout(policy, "policy", prompts_of(policy, config, **named))


def moved(policy: AdapterPolicy) -> None:
    """The policy after some training, so to speak: its ratio to the one that drew is not 1."""
    weights = policy.trainable.detach()
    policy.set_weights("policy", weights + 0.05 * torch.randn(len(weights), generator=torch.Generator().manual_seed(2)))


def guided(
    policy: AdapterPolicy, config: Config, view: View, batch: TrajectoryBatch, *, detached: bool = True
) -> Tensor:
    timestep_M = torch.full((len(batch.x_MCHW),), 1000 * schedule(config)[batch.step])
    scale = config.rollout.guidance
    unconditional = batch.unconditional if scale > 1 else None
    v_cond, v_uncond = policy.velocity(view, batch.x_MCHW, timestep_M, batch.conditioning, unconditional)
    if v_uncond is None:
        return v_cond.double()
    v_uncond = v_uncond.detach().double() if detached else v_uncond.double()
    return v_uncond + scale * (v_cond.double() - v_uncond)


def schedule(config: Config) -> list[float]:
    return schedule_sigmas("flow_match", config.rollout.steps, shift=3.0).tolist()


def written(
    policy: AdapterPolicy, config: Config, batch: TrajectoryBatch, *, num_kept: int, detached: bool = True
) -> dict[str, Tensor]:
    """A micro-batch's part of everything, in float64, by section 5 of the paper's summary, or with CPS's step as its
    authors compute it; means over the samples that have an advantage."""
    sigmas, settings = schedule(config), config.algorithm
    sigma, sigma_next, is_cps = *sigmas[batch.step : batch.step + 2], settings.sde_type == "cps"
    dt, x = sigma_next - sigma, batch.x_MCHW.double()
    s = LEVEL * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
    if is_cps:
        s = sigma_next * math.sin(LEVEL * math.pi / 2)

    def mean_of(velocity: Tensor) -> Tensor:
        if is_cps:
            data, noise = x - sigma * velocity, x + (1 - sigma) * velocity
            return (1 - sigma_next) * data + math.sqrt(sigma_next**2 - s**2) * noise
        return (1 + s**2 * dt / (2 * sigma)) * x + (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt * velocity

    mean = mean_of(guided(policy, config, "policy", batch, detached=detached))
    with torch.no_grad():
        reference = mean_of(guided(policy, config, "ref", batch))
    std, kept = s if is_cps else s * math.sqrt(-dt), batch.advantage_M.abs() > 0
    log_prob_M = torch.distributions.Normal(mean, std).log_prob(batch.x_next_MCHW.double()).mean((1, 2, 3))
    ratio = torch.exp((2 * std**2 if is_cps else 1) * (log_prob_M - batch.old_log_prob_M.double()))[kept]
    advantage, clip = batch.advantage_M.double()[kept], settings.clip
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    distance = (mean - reference).square().mean((1, 2, 3))[kept] / (2 * s**2)
    share = 1 / (num_kept * 3)
    policy_loss, kl = share * surrogate.sum(), share * distance.sum()
    return {
        "loss": policy_loss + settings.kl_coef * kl, "policy_loss": policy_loss, "kl": kl,
        "clip_fraction": share * ((ratio - 1).abs() > clip).double().sum(),
    }  # fmt: skip


@pytest.mark.parametrize("invalid", [(), (1, 6)])
@pytest.mark.parametrize(("guidance", "sde_type"), [(1.0, "sde"), (3.0, "sde"), (1.0, "cps")])
def test_the_loss_and_its_gradient_are_the_written_ones(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, learn: Learn, gradient_of: GradientOf,
    guidance: float, sde_type: str, invalid: tuple[int, ...],
) -> None:  # fmt: skip
    overrides = (
        f"algorithm.clip={0.003 * guidance}", "algorithm.kl_coef=0.3", f"rollout.guidance={guidance}",
        f"algorithm.sde_type={sde_type}",
    )  # fmt: skip
    config = tiny("tiny-flow-grpo", *RECIPE, *overrides, micro=8)
    policy = make_policy(config, spread=SPREAD)
    scored = score(drawn(policy, config, prompts_of), config, invalid=invalid)
    moved(policy)
    gradient, found = learn(policy, config, scored)
    batches = [batch for (batch,) in FlowGRPO(config).batches(scored)]
    assert [batch.step for batch in batches] == [0, 1, 2]
    parts = [written(policy, config, batch, num_kept=8 - len(invalid)) for batch in batches]
    expected = {name: sum(part[name].item() for part in parts) for name in parts[0]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=64 * EPS, abs=16 * EPS), name
    assert 0.1 < expected["clip_fraction"] < 0.9, "some are outside the range, some inside"
    assert expected["kl"] > 0.001
    loss = torch.stack([part["loss"] for part in parts]).sum()
    written_gradient = gradient_of(policy, loss)
    assert (gradient - written_gradient).norm() < 64 * EPS * written_gradient.norm()
    if guidance > 1:
        through_both = torch.stack(
            [written(policy, config, batch, num_kept=8 - len(invalid), detached=False)["loss"] for batch in batches]
        ).sum()
        other = gradient_of(policy, through_both)
        assert (other - written_gradient).norm() > 0.1 * written_gradient.norm(), "a gradient there would be seen"


def test_samples_of_a_tied_group_are_no_part_of_either_term(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, learn: Learn, gradient_of: GradientOf
) -> None:
    """Nor is one that has its group's mean. Where all are tied nothing is learnt, not even to be like the base."""
    config = tiny("tiny-flow-grpo", *RECIPE, "algorithm.kl_coef=0.3", micro=8)
    policy = make_policy(config, spread=SPREAD)
    rollout = drawn(policy, config, prompts_of)
    scored = score(rollout, config, rewards=[1.0, 0.0, 0.5, 0.5, 0.7, 0.7, 0.7, 0.7])
    assert scored.num_valid == (8,) and scored.num_advantaged == (2,)
    moved(policy)
    gradient, found = learn(policy, config, scored)
    parts = [written(policy, config, batch, num_kept=2) for (batch,) in FlowGRPO(config).batches(scored)]
    for name in parts[0]:
        value = sum(part[name].item() for part in parts)
        assert found[name] == pytest.approx(value, rel=64 * EPS, abs=16 * EPS), name
    assert found["kl"] > 0.001
    expected = gradient_of(policy, torch.stack([part["loss"] for part in parts]).sum())
    assert (gradient - expected).norm() < 64 * EPS * expected.norm()
    assert [*FlowGRPO(config).batches(score(rollout, config, rewards=[0.7] * 8))] == [], "then no step is made"


def test_without_a_kl_term_no_distance_is_reported(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, learn: Learn
) -> None:
    config = tiny("tiny-flow-grpo", *RECIPE, "algorithm.kl_coef=0", micro=8)
    policy = make_policy(config, spread=SPREAD)
    found = learn(policy, config, score(drawn(policy, config, prompts_of), config))[1]
    assert found.keys() == {"loss", "policy_loss", "clip_fraction"} and found["loss"] == found["policy_loss"]


def test_what_could_not_be_scored_changes_no_gradient(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, learn: Learn
) -> None:
    """Whatever its trajectory holds, the step is the same to the bit."""
    config = tiny("tiny-flow-grpo", *RECIPE, groups=1)
    policy = make_policy(config, spread=SPREAD)
    rollout = drawn(policy, config, prompts_of)
    assert rollout.trajectory is not None
    expected, report = learn(policy, config, score(rollout, config, invalid=[1]))
    latents_SBCHW, log_prob_SB = rollout.trajectory.x_SBCHW.clone(), rollout.trajectory.log_prob_SB.clone()
    broken = replace(rollout.trajectory, x_SBCHW=latents_SBCHW, log_prob_SB=log_prob_SB)
    broken.x_SBCHW[:, 1], broken.log_prob_SB[:, 1] = math.inf, math.nan
    gradient, found = learn(policy, config, score(replace(rollout, trajectory=broken), config, invalid=[1]))
    assert torch.equal(gradient, expected) and gradient.any()
    assert found == report
    whole, _ = learn(policy, config, score(rollout, config))
    assert not torch.equal(whole, expected)


@pytest.mark.parametrize(("guidance", "dtype"), [(1.0, "float32"), (3.0, "float32"), (3.0, "bfloat16")])
@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_a_policy_that_has_not_changed_has_a_ratio_of_exactly_one(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, learn: Learn, engine: str,
    guidance: float, dtype: str,
) -> None:  # fmt: skip
    """Through a rollout, in the same batch shape: no range is too narrow, and the loss is minus the mean advantage."""
    overrides = (f"model.engine={engine}", f"model.dtype={dtype}", f"rollout.guidance={guidance}")
    exact = ("algorithm.clip=1e-30", "algorithm.kl_coef=0")
    config = tiny("tiny-flow-grpo", *RECIPE, *overrides, *exact, groups=1)
    policy = make_policy(config, spread=SPREAD)
    algorithm, scored = FlowGRPO(config), score(drawn(policy, config, prompts_of), config)
    for (batch,) in algorithm.batches(scored):
        taken = algorithm._step(policy, "policy", batch)
        assert taken.log_prob_B.requires_grad
        assert torch.equal(taken.log_prob_B.detach(), batch.old_log_prob_M)
        assert batch.old_log_prob_M.unique().numel() == 4
    gradient, found = learn(policy, config, scored)
    assert found["clip_fraction"] == 0
    assert found["policy_loss"] == pytest.approx(-scored.advantage_B.mean().item(), abs=8 * EPS)
    assert gradient.any()
    assert algorithm.drift(policy) == 0
    assert "is exactly 1" in algorithm.prepare(policy)


def test_a_drift_is_reported(make_policy: MakePolicy, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A velocity that moves where gradients are recorded, as kernels may."""
    config = tiny("tiny-flow-grpo", *RECIPE)
    policy, algorithm = make_policy(config, spread=SPREAD), FlowGRPO(config)
    weights, velocity = policy.trainable.detach().clone(), policy.engine.velocity

    def drifted(view: View, x_BCHW: Tensor, conditioned: object) -> Tensor:
        return velocity(view, x_BCHW, conditioned) * (1 + 1e-2 * torch.is_grad_enabled())

    monkeypatch.setattr(policy.engine, "velocity", drifted)
    drift = algorithm.drift(policy)
    assert 1e-6 < drift < 1
    for times, found in ((11, ""), (9, ": some samples are clipped too soon or too late"), (0.9, None)):
        algorithm = FlowGRPO(tiny("tiny-flow-grpo", *RECIPE, f"algorithm.clip={times * drift}"))
        if found is None:
            with pytest.raises(UserError, match=r"^model\.engine: with fused .* misses 1 by .* would clip at random"):
                algorithm.prepare(policy)
        else:
            assert algorithm.prepare(policy).endswith(f"where algorithm.clip is {times * drift:g}{found}")
    assert torch.equal(policy.trainable, weights)
    # Of CPS the ratio is of squared distances, not of densities: it is nearer to 1 by 2 std^2.
    preserving = FlowGRPO(tiny("tiny-flow-grpo", *RECIPE, "algorithm.sde_type=cps"))
    monkeypatch.setattr(SDESampler, "sensitivity", lambda self, number: float(number == 1))
    scale, drift = preserving.sampler.density_scale(1), preserving.drift(policy)
    preserving.sampler = replace(preserving.sampler, sde_type="sde")
    assert scale < 0.9 and math.log1p(drift) == pytest.approx(scale * math.log1p(preserving.drift(policy)), rel=0.05)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_a_drift_is_sought_where_it_tells_most(
    make_policy: MakePolicy, tiny: Tiny, sde_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no other trained step does a velocity that is off by a little move the ratio further."""
    config = tiny("tiny-flow-grpo", *RECIPE, f"algorithm.sde_type={sde_type}")
    policy, algorithm = make_policy(config, spread=SPREAD), FlowGRPO(config)
    velocity = policy.engine.velocity
    off = 1e-3 * torch.randn(4, *policy.model.latent_shape, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(policy.engine, "velocity", lambda *given: velocity(*given) + off * torch.is_grad_enabled())
    chosen, drifts = algorithm.drift(policy), list[float]()
    for step in range(3):
        monkeypatch.setattr(SDESampler, "sensitivity", lambda self, number, step=step: float(number == step))
        drifts.append(algorithm.drift(policy))
    assert chosen == max(drifts) > 1.2 * min(drifts)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_optimizer_steps_share_out_the_groups(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, updates: int
) -> None:
    """Whole groups, each to one step, at every trained step of the rollout; means over the step's own samples with an
    advantage: of the first group's only one has a score, and so none."""
    config = tiny("tiny-flow-grpo", *RECIPE, f"optimizer.steps_per_iteration={updates}", groups=4, micro=2)
    policy = make_policy(config, spread=SPREAD)
    rollout = drawn(policy, config, prompts_of)
    assert rollout.trajectory is not None
    scored, seen = score(rollout, config, invalid=[0, 1, 2]), list[Tensor]()
    for update in range(updates):
        batches = [batch for (batch,) in FlowGRPO(config).batches(scored, update=update)]
        num_kept = 16 // updates - (4 if update == 0 else 0)
        if num_kept == 0:
            assert batches == []
            seen.append(torch.zeros(4))
            continue
        assert len(batches) == 3 * 8 // updates
        assert {batch.sample_share for batch in batches} == {1 / (num_kept * 3)}
        share = sum(batch.sample_share * int(batch.counts_M.sum()) for batch in batches)
        assert share == pytest.approx(1)
        for step in range(3):
            old_M = torch.cat([batch.old_log_prob_M for batch in batches if batch.step == step])
            mine = slice(update * 16 // updates, (update + 1) * 16 // updates)
            assert torch.equal(old_M, rollout.trajectory.log_prob_SB[step, mine])
            x_MCHW = torch.cat([batch.x_next_MCHW for batch in batches if batch.step == step])
            counts_M = torch.cat([batch.counts_M for batch in batches if batch.step == step])
            assert torch.equal(counts_M, scored.advantage_B[mine] != 0)
            kept = scored.valid_B[mine]
            assert torch.equal(x_MCHW[kept], rollout.trajectory.x_SBCHW[step + 1, mine][kept])
        seen.append(torch.cat([batch.advantage_M for batch in batches if batch.step == 0]))
    assert torch.equal(torch.cat(seen), scored.advantage_B)


def test_splitting_a_step_into_micro_batches_changes_nothing(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, learn: Learn
) -> None:
    config = tiny("tiny-flow-grpo", *RECIPE, "rollout.guidance=3", micro=8)
    policy = make_policy(config, spread=SPREAD)
    scored = score(drawn(policy, config, prompts_of), config, invalid=[3])
    moved(policy)
    expected, report = learn(policy, config, scored)
    gradient, found = learn(policy, tiny("tiny-flow-grpo", *RECIPE, "rollout.guidance=3", micro=2), scored)
    assert (gradient - expected).norm() < 64 * EPS * expected.norm()
    assert found == {name: pytest.approx(value, rel=64 * EPS, abs=16 * EPS) for name, value in report.items()}


@pytest.mark.parametrize("recipe", [["tiny-flow-grpo"], ["tiny-flow-grpo-fast", "algorithm.window=2"]])
def test_any_number_of_ranks_draws_the_same(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, recipe: list[str]
) -> None:
    """Latents, noise of the steps and window, to the bit: they are named by iteration, group and sample."""
    config = tiny(*recipe, "algorithm.trained_steps=3", micro=2)
    policy = make_policy(config, spread=SPREAD)
    alone, later = (drawn(policy, config, prompts_of, iteration=iteration) for iteration in (4, 5))
    assert alone.trajectory is not None and later.trajectory is not None
    for rank in (0, 1):
        samples = list(placement_of(config, 2).samples(rank, total=8))
        assert len(samples) == 4 and samples != list(range(4 * rank, 4 * rank + 4))
        share = drawn(policy, config, prompts_of, iteration=4, samples=samples).trajectory
        assert share is not None and share.first_B == tuple(alone.trajectory.first_B[sample] for sample in samples)
        assert torch.equal(share.x_SBCHW, alone.trajectory.x_SBCHW[:, samples])
        assert torch.equal(share.log_prob_SB, alone.trajectory.log_prob_SB[:, samples])
    assert not torch.equal(alone.x0_BCHW, later.x0_BCHW)
    distance = torch.cdist(alone.x0_BCHW.flatten(1), alone.x0_BCHW.flatten(1)) + 1e9 * torch.eye(8)
    assert distance.min() > 0.1


def test_a_window_is_drawn_for_every_micro_batch(make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf) -> None:
    """Two of the first three steps; the others are those of the ODE, which has no density to train on.

    Forwards of half a micro-batch, or of one and a half: neither changes what is trained.
    """
    for per_forward in (2, 6):
        config = tiny("tiny-flow-grpo-fast", *WINDOW, f"rollout.images_per_forward={per_forward}")
        policy = make_policy(config, spread=SPREAD)
        firsts = list[tuple[int, int]]()
        for iteration in range(8):
            trajectory = drawn(policy, config, prompts_of, iteration=iteration).trajectory
            assert trajectory is not None
            assert trajectory.log_prob_SB.shape == (2, 8) and trajectory.x_SBCHW.shape[:2] == (3, 8)
            assert trajectory.log_prob_SB.ne(0).all()
            one, other = trajectory.first_B[0], trajectory.first_B[4]
            assert trajectory.first_B == (one,) * 4 + (other,) * 4
            firsts.append((one, other))
        assert {one for one, _ in firsts} == {other for _, other in firsts} == {0, 1}
        assert any(one != other for one, other in firsts)


def test_a_window_is_trained_where_it_was_drawn(
    make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf, score: Score, learn: Learn
) -> None:
    config = tiny("tiny-flow-grpo-fast", *WINDOW, "algorithm.clip=1e-30", "algorithm.kl_coef=0")
    policy = make_policy(config, spread=SPREAD)
    for iteration in (0, 1):
        rollout = drawn(policy, config, prompts_of, iteration=iteration)
        assert rollout.trajectory is not None
        scored, first_B = score(rollout, config), rollout.trajectory.first_B
        expected = [first_B[start] + place for start in (0, 4) for place in (0, 1)]
        assert [batch.step for (batch,) in FlowGRPO(config).batches(scored)] == expected
        assert learn(policy, config, scored)[1]["clip_fraction"] == 0, "only steps of one window have a density"


def test_a_rollout_delivers_what_it_draws(make_policy: MakePolicy, tiny: Tiny, prompts_of: PromptsOf) -> None:
    config = tiny("tiny-flow-grpo", *RECIPE)
    policy, prompts = make_policy(config), prompts_of(make_policy(config), config)
    delivered, asked, checks = list[Tensor](), list[str](), list[int]()
    rollout = FlowGRPO(config).rollout(
        policy, "policy", prompts, check=lambda: checks.append(1),
        deliver=lambda x0_BCHW, texts: (delivered.append(x0_BCHW), asked.extend(texts)),
    )  # fmt: skip
    assert [len(x0_BCHW) for x0_BCHW in delivered] == [4, 4] and len(checks) == 2
    assert torch.equal(torch.cat(delivered), rollout.x0_BCHW)
    assert asked == [prompts.prompts[0]] * 4 + [prompts.prompts[1]] * 4
