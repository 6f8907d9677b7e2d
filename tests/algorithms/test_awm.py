"""Advantage Weighted Matching on the embedded pipeline: its likelihood, its loss, the points that it trains at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithms.awm import AWM, matching_likelihood
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
TINY_ERROR = 1e-10
TWO_SIGMAS = ("algorithm.first=1", "algorithm.trunc=3", "algorithm.train_timesteps=2")


def noise_of(batch: NoisedBatch) -> Tensor:
    """The noise of each sample, drawn by the definition of the streams."""
    return rng.normal(batch.streams_N4, batch.x0_MCHW.shape[1:])[batch.noise_M]


def written(policy: AdapterPolicy, config: Config, batch: NoisedBatch, *, share: float) -> dict[str, Tensor]:
    """A micro-batch's part of everything, in float64; the gradient of the ratio is that of the likelihood, at 1."""
    inputs, settings = (batch.x_t_MCHW, batch.timestep_M, batch.conditioning), config.algorithm
    with torch.no_grad():
        old, reference = (policy.velocity(view, *inputs)[0].double() for view in ("old", "ref"))
    velocity = policy.velocity("policy", *inputs)[0].double()
    target = noise_of(batch).double() - batch.x0_MCHW.double()
    error_M = (target - velocity).square().mean((1, 2, 3)) + TINY_ERROR
    power, kept = settings.power, batch.valid_M
    log_p_M = -batch.timestep_M.double() / 1000 * (error_M**power - TINY_ERROR**power) / power
    ratio_M = 1 + log_p_M - log_p_M.detach()
    a_M = batch.advantage_M.double() / config.advantages.clamp
    policy_loss = -share * (a_M * ratio_M)[kept].sum()
    kl, distance = (share * (velocity - other).square().mean((1, 2, 3))[kept].sum() for other in (reference, old))
    loss = policy_loss + settings.kl_coef * kl + settings.old_coef * distance
    return {"loss": loss, "policy_loss": policy_loss, "kl": kl}


@pytest.mark.parametrize("invalid", [(), (1, 6)])
@pytest.mark.parametrize("power", [1.0, 0.25])
def test_the_loss_and_its_gradient_are_the_written_ones(
    make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn, gradient_of: GradientOf, power: float,
    invalid: tuple[int, ...],
) -> None:  # fmt: skip
    overrides = (*TWO_SIGMAS, f"algorithm.power={power}", "algorithm.kl_coef=0.1", "algorithm.old_coef=0.2")
    config = tiny("tiny-awm", *overrides, micro=8)
    policy = make_policy(config, spread=SPREAD)
    scored = scored_noise(policy, config, invalid=invalid)
    gradient, found = learn(policy, config, scored)
    batches = [batch for (batch,) in AWM(config).batches(scored)]
    assert len(batches) == 2
    for batch in batches:  # a noise for each sample, whose groups are those of prompts all the same
        assert batch.noise_M.tolist() == list(range(8)) and len(batch.streams_N4) == 8
        assert batch.group_M.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and len(batch.group_size_G) == 2
    share = 1 / (2 * (8 - len(invalid)))
    parts = [written(policy, config, batch, share=share) for batch in batches]
    expected = {name: sum(part[name].item() for part in parts) for name in parts[0]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=32 * EPS, abs=8 * EPS), name
    written_gradient = gradient_of(policy, torch.stack([part["loss"] for part in parts]).sum())
    assert (gradient - written_gradient).norm() < 32 * EPS * written_gradient.norm()
    assert expected["kl"] > 0.01
    # Each term is seen: without it the gradient is another.
    for name in ("kl_coef", "old_coef"):
        without = tiny("tiny-awm", *overrides, f"algorithm.{name}=0", micro=8)
        assert (learn(policy, without, scored)[0] - gradient).norm() > 1e-3 * gradient.norm(), name


def test_the_ratio_is_exactly_one(make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise, learn: Learn) -> None:
    """So the surrogate is minus the mean advantage, whatever the errors are, and still has a gradient."""
    alone = ("algorithm.kl_coef=0", "algorithm.old_coef=0", "advantages.clamp=4")
    config = tiny("tiny-awm", *TWO_SIGMAS, *alone, micro=8)
    policy = make_policy(config, spread=SPREAD)
    scored = replace(
        scored_noise(policy, config), advantage_B=torch.tensor([4.0, 2.0, -1.0, 3.0, 0.5, 0.25, -2.0, 1.25])
    )
    gradient, found = learn(policy, config, scored)
    assert found["loss"] == found["policy_loss"] == -1 / 4
    assert "kl" not in found and gradient.any()


@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_the_likelihood_is_the_written_one(power: float) -> None:
    """Its slope is -sigma d^(power - 1), finite where there is no error; power 1 is the error itself."""
    error_M = torch.tensor([0.0, 1e-12, 1e-3, 0.4, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    sigma_M = torch.tensor([0.5, 0.9, 0.25, 1.0, 0.1, 0.7], dtype=torch.float64)
    found = matching_likelihood(error_M, sigma_M, power=power)
    d = error_M.detach() + TINY_ERROR
    torch.testing.assert_close(
        found.detach(), -sigma_M * (d**power - TINY_ERROR**power) / power, rtol=1e-12, atol=1e-15
    )
    assert found[0] == 0
    (slope,) = torch.autograd.grad(found.sum(), error_M)
    torch.testing.assert_close(slope, -sigma_M * d ** (power - 1), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda e: matching_likelihood(e, sigma_M[2:], power=power), error_M[2:], eps=1e-7)


@pytest.mark.parametrize(
    ("first", "trunc", "number", "bounds"),
    [
        (1, 11, 6, [1, 2, 4, 6, 8, 10, 12]), (1, 8, 4, [1, 3, 5, 7, 9]), (0, 8, 9, list(range(10))),
        (2, 12, 1, [2, 13]),
    ],
)  # fmt: skip
def test_a_point_is_drawn_from_each_stretch(tiny: Tiny, first: int, trunc: int, number: int, bounds: list[int]) -> None:
    """All of a stretch's points, as often; together the trained points, each in one stretch."""
    points = (f"algorithm.first={first}", f"algorithm.trunc={trunc}", f"algorithm.train_timesteps={number}")
    algorithm, samples = AWM(tiny("tiny-awm", *points, "rollout.steps=14")), 600
    point_ST = algorithm.points([rng.stream(0, stage="timesteps", sample=sample) for sample in range(samples)])
    seen = [Counter(drawn) for drawn in point_ST.T.tolist()]
    assert [set(counts) for counts in seen] == [set(range(*pair)) for pair in pairwise(bounds)]
    assert set().union(*seen) == set(range(first, trunc + 1))
    for counts in seen:
        expected = samples / len(counts)
        # Five standard deviations of a binomial count.
        assert max(abs(count - expected) for count in counts.values()) <= 5 * expected**0.5


def test_every_stretch_has_a_point(tiny: Tiny) -> None:
    """However the points are cut: those of a sample are different, and in order."""
    for last, number in ((7, 7), (11, 10), (23, 7), (29, 28), (39, 38), (39, 13), (39, 39)):
        points = (f"algorithm.trunc={last}", f"algorithm.train_timesteps={number}", "rollout.steps=40")
        (drawn,) = AWM(tiny("tiny-awm", *points)).points([rng.stream(0, stage="timesteps", sample=last)]).tolist()
        assert len(drawn) == number and drawn == sorted(set(drawn)) and {*drawn} <= {*range(1, last + 1)}


def test_batches_are_noised_at_the_drawn_points(make_policy: MakePolicy, tiny: Tiny, scored_noise: ScoredNoise) -> None:
    """Each sample with sigmas and a noise of its own."""
    config = tiny("tiny-awm", *TWO_SIGMAS)
    policy, algorithm = make_policy(config), AWM(config)
    scored = scored_noise(policy, config)
    batches = [batch for (batch,) in algorithm.batches(scored)]
    point_TB = algorithm.noised.points(scored.rollout.prompts).T
    expected = 1000 * torch.from_numpy(algorithm.groups.sampler.sigmas)[point_TB]
    told = torch.cat([batch.timestep_M for batch in batches]).view(point_TB.shape)
    torch.testing.assert_close(told.double(), expected, rtol=EPS, atol=0)
    assert len(set(point_TB[1].tolist())) > 1
    noises = torch.cat([noise_of(batch) for batch in batches]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(16)).abs().max() < 5 / noises.shape[1] ** 0.5


@pytest.mark.parametrize(("step", "decay"), [(0, 0.001), (7, 0.008), (299, 0.3), (5000, 0.3)])
def test_the_old_policy_follows_the_published_average(
    make_policy: MakePolicy, tiny: Tiny, step: int, decay: float
) -> None:
    config = tiny("tiny-awm", *TWO_SIGMAS)
    policy = make_policy(config, spread=SPREAD)
    old, current = (policy.views[view].master.double() for view in ("old", "policy"))
    AWM(config).after_iteration(policy, step)
    rounding = 3 * EPS * max(old.abs().max().item(), current.abs().max().item())
    average = policy.views["old"].master.double()
    torch.testing.assert_close(average, decay * old + (1 - decay) * current, rtol=0, atol=rounding)
