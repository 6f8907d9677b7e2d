"""DiffusionNFT on the embedded pipeline: its batches, its loss against the written equations, the old policy's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import ne

import pytest
import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithms.diffusion_nft import DiffusionNFT, weighted_error
from dgpo_fast.config import Config
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.records import NoisedBatch, ScoredGroups

MakePolicy = Callable[..., AdapterPolicy]
Tiny = Callable[..., Config]
ScoredNoise = Callable[..., ScoredGroups]
Learn = Callable[..., tuple[Tensor, dict[str, float]]]
GradientOf = Callable[[AdapterPolicy, Tensor], Tensor]

EPS = torch.finfo(torch.float32).eps
SPREAD = 0.2
TWO_SIGMAS = ("algorithm.trunc=2", "algorithm.train_timesteps=2")


def noise_of(batch: NoisedBatch) -> Tensor:
    """The noise of each sample, drawn by the definition of the streams."""
    return rng.normal(batch.streams_N4, batch.x0_MCHW.shape[1:])[batch.noise_M]


def optimality(advantage_M: Tensor, highest: float) -> Tensor:
    return torch.clamp(0.5 + advantage_M.double() / (2 * highest), 0, 1)


def written(policy: AdapterPolicy, config: Config, batch: NoisedBatch, *, share: float) -> dict[str, Tensor]:
    """A micro-batch's part of everything, in float64: errors of x_0, over their mean absolute values as constants."""
    inputs = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning)
    beta, highest = config.algorithm.beta, config.advantages.clamp
    with torch.no_grad():
        old, reference = (policy.velocity(view, *inputs)[0].double() for view in ("old", "ref"))
    velocity = policy.velocity("policy", *inputs)[0].double()
    sigma = batch.timestep_M.double()[:, None, None, None] / 1000
    x_t = (1 - sigma) * batch.x0_MCHW.double() + sigma * noise_of(batch).double()

    def error(implicit: Tensor) -> Tensor:
        off = x_t - sigma * implicit - batch.x0_MCHW.double()
        weight_M = off.detach().abs().mean((1, 2, 3)).clamp(min=1e-5)
        return off.square().mean((1, 2, 3)) / weight_M

    positive_M = error(beta * velocity + (1 - beta) * old)
    negative_M = error((1 + beta) * old - beta * velocity)
    r_M, kept = optimality(batch.advantage_M, highest), batch.valid_M
    policy_loss = share * (highest / beta * (r_M * positive_M + (1 - r_M) * negative_M))[kept].sum()
    kl = share * (velocity - reference).square().mean((1, 2, 3))[kept].sum()
    return {"loss": policy_loss + config.algorithm.kl_coef * kl, "policy_loss": policy_loss, "kl": kl}


@pytest.mark.parametrize("invalid", [(), (1, 6)])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_loss_and_its_gradient_are_the_written_ones(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn, gradient_of: GradientOf, beta: float,
    invalid: tuple[int, ...],
) -> None:  # fmt: skip
    """Advantages up to 1.7 with a clamp of 1: some r are 0 or 1, some in between."""
    overrides = (*TWO_SIGMAS, f"algorithm.beta={beta}", "algorithm.kl_coef=0.3", "advantages.clamp=1")
    config = tiny("tiny-diffusion-nft", *overrides, micro=8)
    policy = make_policy(config, spread=SPREAD)
    scored = scored_noise(policy, config, invalid=invalid)
    gradient, found = learn(policy, config, scored)
    batches = [batch for (batch,) in DiffusionNFT(config).batches(scored)]
    assert len(batches) == 2
    share = 1 / (2 * (8 - len(invalid)))
    parts = [written(policy, config, batch, share=share) for batch in batches]
    expected = {name: sum(part[name].item() for part in parts) for name in parts[0]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=32 * EPS), name
    written_gradient = gradient_of(policy, torch.stack([part["loss"] for part in parts]).sum())
    assert (gradient - written_gradient).norm() < 32 * EPS * written_gradient.norm()
    assert expected["kl"] > 0.01 and written_gradient.norm() > 0.01
    r_M = optimality(scored.advantage_B, 1.0)
    assert {0.0, 1.0} < set(r_M.tolist())


def test_without_a_kl_term_no_distance_is_reported(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn
) -> None:
    config = tiny("tiny-diffusion-nft", *TWO_SIGMAS, "algorithm.kl_coef=0", micro=8)
    policy = make_policy(config, spread=SPREAD)
    found = learn(policy, config, scored_noise(policy, config))[1]
    assert found.keys() == {"loss", "policy_loss"} and found["loss"] == found["policy_loss"]


def test_optimality_is_clamped(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the clamp an advantage says no more: it counts as +-1, wholly positive or wholly negative."""
    config = tiny("tiny-diffusion-nft", *TWO_SIGMAS, "advantages.clamp=2", "algorithm.kl_coef=0", groups=1)
    policy = make_policy(config, spread=SPREAD)
    scored = scored_noise(policy, config)
    at_the_clamp = replace(scored, advantage_B=torch.tensor([2.0, -2.0, 2.0, -2.0]))
    beyond = replace(scored, advantage_B=torch.tensor([2.5, -7.0, 300.0, -2.01]))
    inside = replace(scored, advantage_B=torch.tensor([1.99, -2.0, 2.0, -2.0]))
    expected, found, other = (learn(policy, config, each)[0] for each in (at_the_clamp, beyond, inside))
    assert torch.equal(found, expected) and not torch.equal(other, expected)


def test_a_policy_that_is_the_old_one_is_drawn_by_advantages_alone(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn
) -> None:
    """Both implicit policies are the old one: their errors are equal, and so the loss does not know r; beta drops out
    of the gradient, which is 2 r - 1 = A / A_max times the error's."""
    config = tiny("tiny-diffusion-nft", *TWO_SIGMAS, "algorithm.kl_coef=0", groups=1)
    policy = make_policy(config, spread=SPREAD)
    policy.set_weights("old", policy.trainable.detach())
    scored = scored_noise(policy, config)
    gradient, report = learn(policy, config, scored)
    flat, level = learn(policy, config, replace(scored, advantage_B=torch.zeros(4)))
    assert level["policy_loss"] == pytest.approx(report["policy_loss"], rel=8 * EPS)
    # What two equal gradients of opposite signs leave of each other.
    assert flat.norm() < 64 * EPS * learn(policy, config, replace(scored, advantage_B=torch.full((4,), 5.0)))[0].norm()
    for beta in (0.5, 2.0):
        changed = tiny("tiny-diffusion-nft", *TWO_SIGMAS, "algorithm.kl_coef=0", f"algorithm.beta={beta}", groups=1)
        other, _ = learn(policy, changed, scored)
        assert (other - gradient).norm() < 64 * EPS * gradient.norm() / min(beta, 1)


def test_each_sample_has_sigmas_and_noises_of_its_own(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise
) -> None:
    """Of the schedule, and none twice; the same for samples on other ranks."""
    config = tiny("tiny-diffusion-nft", *TWO_SIGMAS)
    policy, algorithm = make_policy(config), DiffusionNFT(config)
    scored, noises, told = scored_noise(policy, config), list[Tensor](), list[float]()
    for (batch,) in algorithm.batches(scored):
        sigma_MCHW = batch.timestep_M.double()[:, None, None, None] / 1000
        told.extend(batch.timestep_M.tolist())
        noises.extend(noise_of(batch))
        x_t = (1 - sigma_MCHW) * batch.x0_MCHW.double() + sigma_MCHW * noise_of(batch).double()
        torch.testing.assert_close(batch.x_t_MCHW.double(), x_t, rtol=0, atol=64 * EPS)
    assert len(noises) == 16 and len(set(told[:8])) > 1 and all(map(ne, told[:8], told[8:]))
    prompts = scored.rollout.prompts
    some = replace(prompts, samples=prompts.samples[2:6])
    assert torch.equal(algorithm.noised.points(some), algorithm.noised.points(prompts)[2:6])
    correlation = torch.corrcoef(torch.stack(noises).flatten(1)) - torch.eye(16)
    assert correlation.abs().max() < 5 / noises[0].numel() ** 0.5
    points = (1000 * DiffusionNFT(config).groups.sampler.sigmas[:3]).astype("float32").tolist()
    assert set(told) <= set(points)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.001), (7, 0.008), (498, 0.499), (499, 0.5), (5000, 0.5)])
def test_the_old_policy_follows_the_published_average(
    make_policy: MakePolicy, tiny: Tiny, step: int, decay: float
) -> None:
    config = tiny("tiny-diffusion-nft", *TWO_SIGMAS)
    assert (config.old_policy.rate, config.old_policy.max_decay) == (0.001, 0.5)
    policy = make_policy(config, spread=SPREAD)
    old, current = (policy.views[view].master.double() for view in ("old", "policy"))
    DiffusionNFT(config).after_iteration(policy, step)
    rounding = 3 * EPS * max(old.abs().max().item(), current.abs().max().item())
    average = policy.views["old"].master.double()
    torch.testing.assert_close(average, decay * old + (1 - decay) * current, rtol=0, atol=rounding)


def test_a_prediction_without_an_error_has_no_weight_without_bound() -> None:
    """The weight is the error's mean, but no less than is published; a gradient through a perfect one is 0."""
    error_MCHW = torch.zeros(2, 1, 2, 2, requires_grad=True)
    weighted_error(error_MCHW, torch.tensor([0.5, 1.0], dtype=torch.float64)).sum().backward()
    assert error_MCHW.grad is not None and error_MCHW.grad.eq(0).all()
    tiny_M = weighted_error(torch.full((1, 1, 2, 2), 1e-7), torch.ones(1, dtype=torch.float64))
    assert tiny_M.item() == pytest.approx(1e-14 / 1e-5)
