"""Rollouts by the deterministic solver, for the methods that learn in the forward process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.flow.cuda_graphs import CudaGraphs
from dgpo_fast.flow.rollout import Sampler, initial_noise, sample_latents
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.records import PromptBatch, Rollout

Deliver = Callable[[Tensor, Sequence[str]], None]
Check = Callable[[], None]


class GroupSampler:
    """A group of samples per prompt, from a noise of its own each."""

    def __init__(self, config: Config) -> None:
        self.config, self.sampler = config, Sampler.from_config(config.rollout)
        self.graphs = CudaGraphs() if config.rollout.cuda_graphs else None

    def draw(self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver, check: Check) -> Rollout:
        """The groups of an iteration; `deliver` and `check` are those of `Algorithm.rollout`."""
        rollout = self.config.rollout
        x0_BCHW = sample_latents(
            policy, view, self.sampler, initial_noise(policy, prompts, seed=self.config.seed),
            prompts.conditioning[prompts.group_B], prompts.unconditional if rollout.guidance > 1 else None,
            images_per_forward=rollout.images_per_forward, engine=policy.sampling_engine, graphs=self.graphs,
            check=check, deliver=lambda x0_BCHW, samples: deliver(x0_BCHW, prompts.prompt_of_sample[samples]),
        )  # fmt: skip
        return Rollout(prompts=prompts, x0_BCHW=x0_BCHW)
