"""Sampling: the Euler rollout is diffusers' own, however it is cut into forwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dgpo_fast.config import Config, load_recipe
from dgpo_fast.evaluate import draw_images
from dgpo_fast.flow.rollout import Sampler, model_timesteps, sample_latents
from dgpo_fast.flow.schedules import schedule_sigmas
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.engines import View
from dgpo_fast.models.sd3 import StableDiffusion3

MakePolicy = Callable[..., AdapterPolicy]

EPS = torch.finfo(torch.float32).eps
PROMPTS = ["two red circles", "a blue square left of a green triangle", "a yellow circle", "three green squares"]


def tiny(*overrides: str) -> Config:
    euler = ("rollout.solver=euler", "rollout.schedule=flow_match")
    one_sigma = ("algorithm.trunc=0", "algorithm.train_timesteps=1")  # allows any number of steps
    return load_recipe("tiny-dgpo", ["adapter.rank=4", *euler, *one_sigma, *overrides])


def make_noise(policy: AdapterPolicy) -> Tensor:
    return torch.randn(len(PROMPTS), *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))


def latents(policy: AdapterPolicy, config: Config, noise_BCHW: Tensor, *, images_per_forward: int = 16) -> Tensor:
    unconditional = policy.model.encode([""]) if config.rollout.guidance > 1 else None
    return sample_latents(
        policy, "policy", Sampler.from_config(config.rollout), noise_BCHW, policy.model.encode(PROMPTS), unconditional,
        images_per_forward=images_per_forward,
    )  # fmt: skip


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize(("steps", "shift"), [(3, 3.0), (10, 3.0), (5, 1.0)])
def test_euler_equals_the_pipelines_call(
    make_policy: MakePolicy, embedded_pipeline: StableDiffusion3Pipeline, steps: int, shift: float, guidance: float
) -> None:
    config = tiny(f"rollout.steps={steps}", f"rollout.shift={shift}", f"rollout.guidance={guidance}")
    policy = make_policy(config)
    noise_BCHW = make_noise(policy)
    scheduler = embedded_pipeline.scheduler
    pipeline = StableDiffusion3Pipeline(
        **{**embedded_pipeline.components, "scheduler": type(scheduler).from_config(scheduler.config, shift=shift)}
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=noise_BCHW, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        height=72, width=72, max_sequence_length=config.model.text_length,
    ).images  # fmt: skip

    ours = latents(policy, config, noise_BCHW)
    # The yardstick is what one rounding of the noise does to the result; each step adds another.
    rounding = largest(latents(policy, config, noise_BCHW * (1 + EPS)) - ours)
    assert largest(ours - theirs) <= steps * rounding
    assert steps * rounding < 1e-3 * largest(theirs)


def test_sampling_can_be_ended_between_forwards(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images, two at a time: ended before the second two, the model has run the two steps of the first."""
    config = tiny("rollout.steps=2")
    policy = make_policy(config)
    noise_BCHW, happened = make_noise(policy), []
    velocity = policy.velocity_at
    monkeypatch.setattr(
        policy, "velocity_at", lambda *given, **named: happened.append("run") or velocity(*given, **named)
    )

    def check() -> None:
        happened.append("check")
        if happened.count("check") == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample_latents(
            policy, "policy", Sampler.from_config(config.rollout), noise_BCHW, policy.model.encode(PROMPTS), None,
            images_per_forward=2, check=check,
        )  # fmt: skip
    assert happened == ["check", "run", "run", "check"]


@pytest.mark.parametrize("images_per_forward", [1, 2, 3])
def test_cutting_the_batch_changes_nothing_but_roundings(make_policy: MakePolicy, images_per_forward: int) -> None:
    config = tiny("rollout.steps=4", "rollout.guidance=4.5", "rollout.solver=dpm++2m", "rollout.schedule=dpm")
    policy = make_policy(config, spread=0.05)
    noise_BCHW = make_noise(policy)
    whole = latents(policy, config, noise_BCHW)
    cut = latents(policy, config, noise_BCHW, images_per_forward=images_per_forward)
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(2, noise_BCHW.shape, generator=generator) * 2 - 1 for _ in range(4)]
    rounding = max(largest(latents(policy, config, noise_BCHW * (1 + EPS * sign)) - whole) for sign in signs)
    assert largest(cut - whole) <= 4 * rounding  # one a step
    assert largest(whole[1:] - whole[:-1]) > 0.1


def test_prompts_are_encoded_once_each(
    make_policy: MakePolicy, make_model: Callable[[Config], StableDiffusion3], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once per image, nor once per forward."""
    config = tiny("rollout.guidance=2", "evaluation.steps=2", "rollout.images_per_forward=4")
    policy, fresh = make_policy(config), make_model(config)
    monkeypatch.setattr(policy.model, "text", fresh.text)
    encoded: list[str] = []
    encode_prompt = fresh.pipeline.encode_prompt

    def counting(*, prompt: list[str], **arguments: object) -> object:
        encoded.extend(prompt)
        return encode_prompt(prompt=prompt, **arguments)

    monkeypatch.setattr(fresh.pipeline, "encode_prompt", counting)
    images = draw_images(policy, "policy", PROMPTS[:2], config, images_per_prompt=3)
    assert len(images) == 6
    assert encoded == [*PROMPTS[:2], ""]


def test_the_noise_is_left_as_it_was(make_policy: MakePolicy) -> None:
    config = tiny("rollout.steps=2")
    policy = make_policy(config)
    noise_BCHW = make_noise(policy)
    before = noise_BCHW.clone()
    drawn = latents(policy, config, noise_BCHW)
    assert torch.equal(noise_BCHW, before)
    assert drawn.dtype == torch.float32
    assert not drawn.requires_grad


@pytest.mark.parametrize("solver", ["euler", "dpm++2m", "ab2", "ab3", "ab4", "unipc", "heun"])
def test_every_solver_finds_the_end_of_straight_paths(solver: str) -> None:
    """Where the velocity is noise - x0 the data prediction is exact, whatever the steps."""
    generator = torch.Generator().manual_seed(3)
    noise_BCHW, x0_BCHW = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    sampler = Sampler.from_config(tiny(f"rollout.solver={solver}", "rollout.schedule=dpm").rollout, steps=5)
    told: list[float] = []

    def velocity(x_BCHW: Tensor, evaluation: int) -> tuple[Tensor, None]:
        told.append(sampler.timesteps[evaluation])
        return noise_BCHW - x0_BCHW, None

    first = sampler.sigmas[0]
    start = ((1 - first) * x0_BCHW + first * noise_BCHW).float()
    found = sampler.sample(velocity, start)
    # Ten updates of numbers below 4 at most, weighted by extrapolations below 10.
    torch.testing.assert_close(found, x0_BCHW, rtol=0, atol=10 * 4 * 10 * EPS)
    assert told == pytest.approx(list(1000 * sampler.table.sigmas), rel=EPS)
    assert len(told) == (9 if solver == "heun" else 5)


def test_guidance_extrapolates_from_the_empty_prompt() -> None:
    sampler = Sampler.from_config(tiny("rollout.guidance=4.5").rollout, steps=1)
    v_cond, v_uncond, noise = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0), torch.zeros(1, 1, 1, 1)
    # One step from sigma = 1 to 0: x = -(1 + 4.5 (3 - 1)).
    assert sampler.sample(lambda x, t: (v_cond, v_uncond), noise).item() == pytest.approx(-10.0)


def test_integer_timesteps_are_truncated() -> None:
    sigmas = schedule_sigmas("dpm", 10, shift=3.0)
    published = (999, 963, 922, 874, 817, 749, 666, 562, 428, 249, 0)
    assert model_timesteps(sigmas, "integer") == published
    assert model_timesteps(sigmas, "float") == tuple(1000 * sigmas)
    sampler = Sampler.from_config(tiny("rollout.schedule=dpm", "rollout.timesteps=integer").rollout)
    assert sampler.timesteps == published[:-1]
    assert np.array_equal(sampler.sigmas, sigmas)


def test_guidance_keeps_to_its_interval(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guided evaluations run as a batch of twice the size; without any the result is that of guidance 1, to the bit."""
    config = tiny("rollout.steps=5", "rollout.guidance=4.5")
    policy = make_policy(config, spread=0.05)
    noise_BCHW = make_noise(policy)
    sigmas = Sampler.from_config(config.rollout).sigmas
    sizes: list[int] = []
    velocity = policy.engine.velocity

    def counting(view: View, x_BCHW: Tensor, conditioned: object) -> Tensor:
        sizes.append(len(x_BCHW))
        return velocity(view, x_BCHW, conditioned)

    monkeypatch.setattr(policy.engine, "velocity", counting)
    inner = f"rollout.guidance_interval=[{sigmas[3]}, {sigmas[1]}]"
    some = latents(policy, tiny("rollout.steps=5", "rollout.guidance=4.5", inner), noise_BCHW)
    assert sizes == [4, 8, 8, 8, 4]
    everywhere = latents(policy, config, noise_BCHW)
    none = latents(
        policy, tiny("rollout.steps=5", "rollout.guidance=4.5", "rollout.guidance_interval=[0, 0]"), noise_BCHW
    )
    alone = latents(policy, tiny("rollout.steps=5", "rollout.guidance=1"), noise_BCHW)
    assert torch.equal(none, alone)
    assert largest(some - alone) > 0.01
    assert largest(some - everywhere) > 0.01
