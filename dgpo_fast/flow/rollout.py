"""Sampling: from noise to clean latents along the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.config import RolloutConfig
from dgpo_fast.flow.cuda_graphs import CudaGraphs
from dgpo_fast.flow.solvers import SolverTable
from dgpo_fast.flow.trajectory import trajectory_of
from dgpo_fast.models.engines import Engine, View
from dgpo_fast.models.policy import Policy
from dgpo_fast.ops import solver_step_
from dgpo_fast.profiling import span, stage
from dgpo_fast.records import Conditioning, PromptBatch

Velocity = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""(x [B, C, H, W] float32, number of the evaluation) -> (velocity with the prompt, without it or None)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A solver on a schedule, ready to run: its table and its sigmas, computed once."""

    sigmas: NDArray[np.float64]  # [steps + 1]
    table: SolverTable
    timesteps: tuple[float, ...]  # what the model is told at each evaluation

    @classmethod
    def from_config(cls, config: RolloutConfig, *, steps: int | None = None) -> Sampler:
        """The sampler a recipe asks for, with another number of steps where `steps` is given."""
        sigmas, table = trajectory_of(config, steps=steps)
        return cls(sigmas=sigmas, table=table, timesteps=model_timesteps(table.sigmas, config.timesteps))

    def coefficients(self, device: torch.device) -> Tensor:
        """The solver's table, float32 [E, K, K + 2]."""
        return torch.from_numpy(self.table.coefficients).to(device, torch.float32)

    @torch.no_grad()
    def sample(self, velocity: Velocity, noise_BCHW: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Clean latents, float32 [B, C, H, W], from Gaussian noise of the same shape and dtype.

        `coefficients` are its own, where they are on the noise's device already.
        """
        if coefficients is None:
            coefficients = self.coefficients(noise_BCHW.device)
        state_KBCHW = noise_BCHW.new_zeros(coefficients.shape[1], *noise_BCHW.shape)
        state_KBCHW[0] = noise_BCHW
        rows_EB = torch.arange(len(coefficients), device=noise_BCHW.device)[:, None].expand(-1, len(noise_BCHW))
        for evaluation, row_B in enumerate(rows_EB):
            with span(f"step {evaluation}", "solver step"):
                with stage("transformer"):
                    v_cond, v_uncond = velocity(state_KBCHW[0], evaluation)
                with stage("solver"):
                    solver_step_(state_KBCHW, v_cond, v_uncond=v_uncond, table=coefficients, row_B=row_B)
        return state_KBCHW[0].clone()


def model_timesteps(sigmas: NDArray[np.float64], timesteps: str) -> tuple[float, ...]:
    """What the model is told at `sigmas`: 1000 sigma, truncated to whole numbers for parity with the published code."""
    exact = 1000 * sigmas
    return tuple(float(t) for t in (np.trunc(exact) if timesteps == "integer" else exact))


def initial_noise(policy: Policy, prompts: PromptBatch, *, seed: int) -> Tensor:
    """What each sample of a rollout starts from, float32 [B, C, H, W], named by iteration, group and sample."""
    names = [
        rng.stream(seed, stage="rollout", iteration=prompts.iteration, group=group, sample=sample)
        for group, sample in prompts.numbers()
    ]
    return rng.normal(names, policy.model.latent_shape, device=policy.model.device)


def sample_latents(
    policy: Policy,
    view: View,
    sampler: Sampler,
    noise_BCHW: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    *,
    images_per_forward: int,
    engine: Engine | None = None,
    graphs: CudaGraphs | None = None,
    deliver: Callable[[Tensor, slice], None] = lambda x0_BCHW, samples: None,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Clean latents, float32 [B, C, H, W], drawn through `view`, `images_per_forward` at a time.

    Args:
        conditioning: a row per sample.
        unconditional: one row; None where nothing is guided.
        engine: what it runs on; None for the policy's own.
        graphs: replays trajectories on CUDA. One object is for one policy, engine and sampler.
        deliver: given each `images_per_forward` as soon as they are drawn, in their order, and which they are.
        check: called before each `images_per_forward`; may raise, to end the sampling.
    """
    draw = partial(_draw, policy, view, sampler, engine)
    tables = sampler.coefficients(noise_BCHW.device), noise_BCHW.new_tensor(sampler.timesteps)
    empty = () if unconditional is None else (unconditional.text_BND, unconditional.pooled_BD)
    latents = []
    for first in range(0, len(noise_BCHW), images_per_forward):
        check()
        chunk = slice(first, first + images_per_forward)
        inputs = noise_BCHW[chunk], *tables, conditioning.text_BND[chunk], conditioning.pooled_BD[chunk], *empty
        if graphs is None:
            latents.append(draw(*inputs))
        else:
            with stage("transformer"):
                latents.append(graphs((view, *(tensor.shape for tensor in inputs)), draw, *inputs))
        deliver(latents[-1], chunk)
    return torch.cat(latents)


def _draw(
    policy: Policy,
    view: View,
    sampler: Sampler,
    engine: Engine | None,
    noise_BCHW: Tensor,
    coefficients: Tensor,
    timestep_E: Tensor,
    text_BND: Tensor,
    pooled_BD: Tensor,
    *empty: Tensor,
) -> Tensor:
    """One trajectory, as a function of tensors on the device alone: nothing here waits for it, or copies to it."""
    conditioning = Conditioning(text_BND=text_BND, pooled_BD=pooled_BD)
    unconditional = Conditioning(text_BND=empty[0], pooled_BD=empty[1]) if empty else None
    with stage("transformer"):
        evaluations = policy.condition(
            timestep_E[:, None].expand(-1, len(noise_BCHW)), conditioning, unconditional,
            guided=sampler.table.is_guided.tolist(), engine=engine,
        )  # fmt: skip
    return sampler.sample(lambda x, e: policy.velocity_at(view, x, evaluations[e]), noise_BCHW, coefficients)
