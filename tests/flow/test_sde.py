"""The stochastic sampler on data whose velocity is known in closed form: independent pixels of N(MEAN, STD^2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithm_config import SDEType
from dgpo_fast.config import RolloutConfig, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.flow.rollout import model_timesteps
from dgpo_fast.flow.schedules import schedule_sigmas
from dgpo_fast.flow.sde import SDESampler
from dgpo_fast.ops.sde_step import sde_coefficients
from dgpo_fast.records import Trajectory

EPS = torch.finfo(torch.float32).eps
MEAN, STD = 0.7, 0.4
LEVEL = 0.7
STEPS = 6
SHAPE = (4, 16, 16)
SAMPLES = 32
ROLLOUT = RolloutConfig(solver="euler", schedule="flow_match", steps=STEPS)
SIGMAS = schedule_sigmas("flow_match", STEPS, shift=3.0)


def line(sigma: float) -> tuple[float, float]:
    """E[eps - x_0 | x_t = x] = slope x + offset: the two are jointly Gaussian."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    slope = (sigma - (1 - sigma) * STD**2) / variance
    return slope, -MEAN - slope * (1 - sigma) * MEAN


def velocity(x_BCHW: Tensor, number: int) -> Tensor:
    slope, offset = line(float(SIGMAS[number]))
    return slope * x_BCHW + offset


def written_step(sigma: float, sigma_next: float, *, sigma_max_next: float) -> tuple[float, float, float]:
    """Of x, of the velocity, and the noise's deviation: equation 9 of the paper."""
    dt = sigma_next - sigma
    s = LEVEL * math.sqrt(sigma / (1 - (sigma_max_next if sigma == 1 else sigma)))
    return 1 + s**2 * dt / (2 * sigma), (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * math.sqrt(-dt)


def streams(number: int) -> list[rng.Stream]:
    return [rng.stream(3, stage="sde", sample=sample, timestep=number) for sample in range(SAMPLES)]


def start() -> Tensor:
    return rng.normal([rng.stream(3, stage="rollout", sample=sample) for sample in range(SAMPLES)], SHAPE)


def draw(sampler: SDESampler, kept: range, window: range | None = None) -> tuple[Tensor, Trajectory]:
    streams_TB4 = torch.tensor([streams(number) for number in range(STEPS)])
    return sampler.sample(velocity, start(), streams_TB4, kept=kept, window=window)


def test_each_step_is_the_written_one() -> None:
    """In float64, from the latents before it and the noise of its streams; the densities are torch's."""
    sampler = SDESampler.from_config(ROLLOUT, noise_level=LEVEL)
    x0_BCHW, trajectory = draw(sampler, range(STEPS))
    assert SIGMAS[0] == 1 and set(trajectory.first_B) == {0}
    assert trajectory.x_SBCHW.shape == (STEPS + 1, SAMPLES, *SHAPE)
    assert torch.equal(trajectory.x_SBCHW[0], start()) and torch.equal(trajectory.x_SBCHW[-1], x0_BCHW)
    for number in range(STEPS):
        sigma, sigma_next = SIGMAS[number : number + 2].tolist()
        of_x, of_velocity, std = written_step(sigma, sigma_next, sigma_max_next=SIGMAS[1])
        x, x_next = trajectory.x_SBCHW[number].double(), trajectory.x_SBCHW[number + 1].double()
        mean = of_x * x + of_velocity * velocity(x, number)
        largest = max(x.abs().max().item(), 1.0) * max(abs(of_x), 1.0)
        noise = rng.normal(streams(number), SHAPE).double()
        torch.testing.assert_close(x_next, mean + std * noise, rtol=0, atol=16 * EPS * largest)
        log_prob_B = torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2, 3))
        # (x_next - mean) / std loses what x_next rounds off: a relative error of EPS largest / std, averaged.
        rounding = 16 * EPS * largest / std
        torch.testing.assert_close(trajectory.log_prob_SB[number].double(), log_prob_B, rtol=0, atol=rounding)
        assert sampler.squared_noise(number) == pytest.approx(std**2 / (sigma - sigma_next), rel=1e-12)


def test_a_sampler_follows_the_recipes_schedule() -> None:
    """Its shift, and what the model is told of it: whole numbers, as diffusers tells it, where the recipe says so."""
    recipe = RolloutConfig(solver="euler", schedule="flow_match", steps=STEPS, shift=5.0, timesteps="integer")
    sampler = SDESampler.from_config(recipe, noise_level=LEVEL)
    sigmas = schedule_sigmas("flow_match", STEPS, shift=5.0)
    assert np.array_equal(sampler.sigmas, sigmas) and not np.array_equal(sigmas, SIGMAS)
    assert sampler.timesteps == model_timesteps(sigmas[:-1], "integer") != model_timesteps(sigmas[:-1], "float")


def test_preserving_steps_are_the_written_ones() -> None:
    """In float64; what the loss compares are squared distances from the mean, whatever the deviation."""
    sampler = SDESampler.from_config(ROLLOUT, noise_level=LEVEL, sde_type="cps")
    _, trajectory = draw(sampler, range(STEPS))
    for number in range(STEPS):
        sigma, sigma_next = SIGMAS[number : number + 2].tolist()
        x, x_next = trajectory.x_SBCHW[number].double(), trajectory.x_SBCHW[number + 1].double()
        std, v = sigma_next * math.sin(LEVEL * math.pi / 2), velocity(x, number)
        mean = (1 - sigma_next) * (x - sigma * v) + math.sqrt(sigma_next**2 - std**2) * (x + (1 - sigma) * v)
        noise, largest = rng.normal(streams(number), SHAPE).double(), max(x.abs().max().item(), 1.0)
        torch.testing.assert_close(x_next, mean + std * noise, rtol=0, atol=16 * EPS * largest)
        scaled_B = sampler.density_scale(number) * trajectory.log_prob_SB[number].double()
        distance_B = (x_next - mean).square().mean((1, 2, 3))
        constant = 0.0 if std == 0 else 2 * std**2 * (math.log(std) + 0.5 * math.log(2 * math.pi))
        torch.testing.assert_close(scaled_B, -distance_B * (std > 0) - constant, rtol=1e-4, atol=1e-6)
        assert sampler.squared_noise(number) == pytest.approx(std**2, rel=1e-12)


def written_preserving_step(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """CPS (arXiv 2509.05952): of the predicted image and of the predicted noise, part of which is drawn anew."""
    std = sigma_next * math.sin(LEVEL * math.pi / 2)
    of_image, of_noise = 1 - sigma_next, math.sqrt(sigma_next**2 - std**2)
    return of_image + of_noise, of_noise * (1 - sigma) - of_image * sigma, std


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_means_and_variances_follow_the_recursion(sde_type: SDEType) -> None:
    """Of 32768 pixels, to five of their standard errors: linear in x, the velocity keeps them Gaussian."""
    _, trajectory = draw(SDESampler.from_config(ROLLOUT, noise_level=LEVEL, sde_type=sde_type), range(STEPS))
    pixels, mean, variance = SAMPLES * math.prod(SHAPE), 0.0, 1.0
    for number in range(STEPS):
        sigma, sigma_next = SIGMAS[number : number + 2].tolist()
        of_x, of_velocity, std = (
            written_step(sigma, sigma_next, sigma_max_next=SIGMAS[1]) if sde_type == "sde"
            else written_preserving_step(sigma, sigma_next)
        )  # fmt: skip
        slope, offset = line(SIGMAS[number])
        mean = (of_x + of_velocity * slope) * mean + of_velocity * offset
        variance = (of_x + of_velocity * slope) ** 2 * variance + std**2
        found = trajectory.x_SBCHW[number + 1].double()
        assert found.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / pixels)), number
        assert found.var().item() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / pixels)), number


def final_marginal(sampler: SDESampler, *, mean: float, variance: float) -> tuple[float, float]:
    """The mean and deviation that the sampler's own coefficients end with, exactly."""
    for number, (of_x, of_velocity, std) in enumerate(sampler.coefficients_T3.tolist()):
        slope, offset = line(float(sampler.sigmas[number]))
        mean = (of_x + of_velocity * slope) * mean + of_velocity * offset
        variance = (of_x + of_velocity * slope) ** 2 * variance + std**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_the_marginals_are_those_of_the_flow(level: float) -> None:
    """Started from the exact marginal at sigma = 0.9, the data's mean and deviation are reached at first order."""
    errors = []
    for steps in (64, 128, 256):
        sigmas = np.linspace(0.9, 0, steps + 1)
        sampler = SDESampler(
            sigmas=sigmas, timesteps=tuple(1000 * sigmas[:-1]),
            coefficients_T3=sde_coefficients(
                torch.from_numpy(sigmas[:-1]), torch.from_numpy(sigmas[1:]), noise_level=level, sigma_max_next=0.9
            ),
        )  # fmt: skip
        mean, std = final_marginal(sampler, mean=0.1 * MEAN, variance=0.1**2 * STD**2 + 0.9**2)
        assert mean == pytest.approx(MEAN, rel=1e-12), "exact at any step: the mean's way is straight"
        errors.append(abs(std - STD))
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2, errors
    assert errors[2] < 0.01 * STD


def test_outside_a_window_steps_are_eulers() -> None:
    """Two of six steps are stochastic and kept, with their densities."""
    window = range(2, 4)
    sampler = SDESampler.from_config(ROLLOUT, noise_level=LEVEL)
    x0_BCHW, trajectory = draw(sampler, window, window)
    everything = draw(sampler, range(STEPS), window)[1]
    assert trajectory.first_B == (2,) * SAMPLES
    assert trajectory.log_prob_SB.shape == (2, SAMPLES) and trajectory.x_SBCHW.shape == (3, SAMPLES, *SHAPE)
    assert torch.equal(trajectory.x_SBCHW, everything.x_SBCHW[2:5])
    assert torch.equal(everything.x_SBCHW[-1], x0_BCHW)
    for number in range(STEPS):
        sigma, sigma_next = SIGMAS[number : number + 2].tolist()
        x, x_next = everything.x_SBCHW[number].double(), everything.x_SBCHW[number + 1].double()
        off = (x_next - (x + (sigma_next - sigma) * velocity(x, number))).abs().max().item()
        if number in window:
            assert off > 0.1 and everything.log_prob_SB[number].ne(0).all()
        else:
            assert off < 8 * EPS * x.abs().max().item() and everything.log_prob_SB[number].eq(0).all()


@pytest.mark.parametrize("window", [None, range(1, 3)])
def test_a_step_given_back_has_the_density_it_was_drawn_with(window: range | None) -> None:
    """To the bit, though training knows of no window."""
    kept, sampler = window or range(STEPS), SDESampler.from_config(ROLLOUT, noise_level=LEVEL)
    _, trajectory = draw(sampler, kept, window)
    for place, number in enumerate(kept):
        x, x_next = trajectory.x_SBCHW[place : place + 2]
        again = sampler.step(number, x, velocity(x, number), x_next=x_next)
        assert torch.equal(again.log_prob_B, trajectory.log_prob_SB[place])


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    sampler = SDESampler.from_config(ROLLOUT, noise_level=LEVEL)
    together, _ = draw(sampler, range(STEPS))

    streams_TB4 = torch.tensor([streams(number)[SAMPLES // 2 :] for number in range(STEPS)])
    alone, _ = sampler.sample(velocity, start()[SAMPLES // 2 :], streams_TB4, kept=range(STEPS))
    assert torch.equal(together[SAMPLES // 2 :], alone)


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.1, 2.3, 3.0, 4.7, 7.9])
def test_a_trajectory_from_pure_noise_begins_with_a_bounded_step(shift: float) -> None:
    """At sigma = 1 exactly the next sigma stands for it; any closer to 1 the noise's rate would be without bound."""
    config = RolloutConfig(solver="euler", schedule="flow_match", steps=10, shift=shift)
    sampler = SDESampler.from_config(config, noise_level=LEVEL)
    assert sampler.sigmas[0] == 1
    of_x, _, std = sampler.coefficients_T3[0].tolist()
    assert 0 < of_x < 1 and 0 < std < LEVEL * 1.01


@pytest.mark.parametrize("schedule", ["dpm", "unipc"])
def test_a_schedule_that_begins_just_below_one_is_refused(schedule: str) -> None:
    """Its first step would multiply the noise by ten or more."""
    sigmas = schedule_sigmas(schedule, 10, shift=3.0)  # type: ignore[arg-type]
    _, _, std = written_step(*sigmas[:2].tolist(), sigma_max_next=sigmas[1])
    assert std > 5
    with pytest.raises(UserError, match=f"rollout.schedule must be flow_match.*got {schedule}"):
        load_recipe("tiny-flow-grpo", [f"rollout.schedule={schedule}"])
