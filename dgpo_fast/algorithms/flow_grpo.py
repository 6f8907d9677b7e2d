"""Flow-GRPO (Liu et al., arXiv 2505.05470) and, with a window, Flow-GRPO-Fast: policy gradients along a trajectory.

    sample every group with an SDE that has the ODE's marginals; keep x, x_next and log p of each step      rollout
    score them, normalise rewards to advantages A                                                       (the trainer)
    a micro-batch for each trained step                                                                      batches
    ratio = p_theta(x_next | x) / p_old(x_next | x)                                                             loss
    minimise max(-A ratio, -A clamp(ratio, 1 +- clip)) + kl_coef |mean_theta - mean_ref|^2 / (2 s^2)             loss

Both terms are means over the samples whose advantage is not 0, as in the code its authors published: samples of tied
groups are no part of the KL term either. With s the rate of the SDE's noise, that term is the divergence of two
Gaussians times the step in sigma.

The stochastic step is the paper's, or that of Coefficients-Preserving Sampling (arXiv 2509.05952), which its authors
recommend for the fast form; there, as in their code, the ratio is exp(|x_next - mean_old|^2 - |x_next - mean_theta|^2)
and s the noise's deviation. The first fast form of their code drew the ODE's steps before the window once for a group;
here, as in its later one, each sample has them of its own.

Departures from that code: it shuffles the samples before it shares them out to the optimizer steps of an iteration,
here each step has whole groups; it does not compute samples without an advantage, but for some that fill up a batch,
and its mean is over equal batches of each process; here they keep their place, with weight zero, and the mean is over
all ranks; it guides in the model's precision, here in float32. As there, the velocity without the prompt gets no
gradient.

Shape letters: B samples of this rank, M of a micro-batch, S trained steps, C H W latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.algorithm_config import FlowGRPOConfig
from dgpo_fast.algorithms.base import nobody
from dgpo_fast.algorithms.group_sampler import Check, Deliver
from dgpo_fast.algorithms.ratio import describe_drift
from dgpo_fast.config import Config
from dgpo_fast.flow.rollout import initial_noise
from dgpo_fast.flow.sde import SDESampler
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import ModelCall, Policy
from dgpo_fast.ops.sde_step import SDEStep
from dgpo_fast.parallel.world import ALONE, World
from dgpo_fast.profiling import stage
from dgpo_fast.records import Conditioning, LossOutput, PromptBatch, Rollout, ScoredGroups, Trajectory, TrajectoryBatch


class FlowGRPO:
    def __init__(self, config: Config, world: World = ALONE) -> None:
        assert isinstance(config.algorithm, FlowGRPOConfig)
        self.config, self.settings, self.world = config, config.algorithm, world
        self.sampler = SDESampler.from_config(
            config.rollout,
            noise_level=self.settings.noise_level,
            sde_type=self.settings.sde_type,
            device=world.device,
        )

    def prepare(self, policy: Policy) -> str:
        """Makes sure that adapters act, and that the ratio of a policy to itself is near 1, as algorithm.clip has it.

        Raises:
            UserError: it is so far from 1 that what has not changed would be clipped.
        """
        policy.check_trained()
        drift = max(self.world.gather_objects(self.drift(policy)))  # devices may be unlike
        return describe_drift(drift, clip=self.settings.clip, engine=self.config.model.engine)

    def rollout(
        self, policy: Policy, view: View, prompts: PromptBatch, *, deliver: Deliver = nobody, check: Check = nobody
    ) -> Rollout:
        """A group of samples per prompt by the stochastic sampler, and what its trained steps drew."""
        noise_BCHW, drawn, trajectories = initial_noise(policy, prompts, seed=self.config.seed), [], []
        for samples, trained in self._forwards(prompts):
            check()
            velocity = partial(self._velocity, policy, view, prompts, prompts.conditioning[prompts.group_B[samples]])
            x0_BCHW, trajectory = self.sampler.sample(
                velocity, noise_BCHW[samples], self._streams(prompts, samples), kept=trained,
                window=None if self.settings.window is None else trained,
            )  # fmt: skip
            drawn.append(x0_BCHW)
            trajectories.append(trajectory)
            deliver(x0_BCHW, prompts.prompt_of_sample[samples])
        return Rollout(prompts=prompts, x0_BCHW=torch.cat(drawn), trajectory=Trajectory.of_parts(trajectories))

    def batches(self, scored: ScoredGroups, *, update: int = 0) -> Iterator[list[TrajectoryBatch]]:
        """Micro-batches of one step each, one to a round: no loss asks for whole groups. None, where all are tied."""
        if scored.num_advantaged[update] == 0:
            return
        prompts, trajectory = scored.rollout.prompts, scored.rollout.trajectory
        assert trajectory is not None
        num_steps = len(trajectory.log_prob_SB)
        for mine in self._micro_batches(prompts.num_samples, update):
            valid_M, advantage_M = scored.valid_B[mine], scored.advantage_B[mine]
            # What could not be scored may not be finite either, and then a weight of zero would not keep it out.
            x_SMCHW = trajectory.x_SBCHW[:, mine].where(valid_M[:, None, None, None], 0.0)
            for place in range(num_steps):
                yield [TrajectoryBatch(
                    x_MCHW=x_SMCHW[place], x_next_MCHW=x_SMCHW[place + 1],
                    old_log_prob_M=trajectory.log_prob_SB[place, mine], step=trajectory.first_B[mine.start] + place,
                    conditioning=prompts.conditioning[prompts.group_B[mine]], unconditional=prompts.unconditional,
                    advantage_M=advantage_M, counts_M=advantage_M != 0,
                    sample_share=1 / (scored.num_advantaged[update] * num_steps),
                )]  # fmt: skip

    def group_weights(self, policy: Policy, batches: object) -> None:
        """Nothing: a sample's loss needs its advantage alone."""

    def loss(self, policy: Policy, batch: TrajectoryBatch, weights: None) -> LossOutput:
        """The clipped surrogate of the policy's gradient, and the KL term: of two Gaussians of equal variance."""
        with stage("policy"):
            taken = self._step(policy, "policy", batch)
        share_M, clip, advantage_M = batch.sample_share * batch.counts_M, self.settings.clip, batch.advantage_M
        # Not the ratio is made 1 but its logarithm 0: the gradient of what is masked would be NaN otherwise.
        log_ratio_M = self.sampler.density_scale(batch.step) * (taken.log_prob_B - batch.old_log_prob_M)
        ratio_M = log_ratio_M.where(batch.counts_M, 0.0).exp()
        surrogate_M = torch.maximum(-advantage_M * ratio_M, -advantage_M * ratio_M.clamp(1 - clip, 1 + clip))
        policy_loss = (share_M * surrogate_M).sum()
        loss, measured = policy_loss, {}
        if self.settings.kl_coef > 0:
            with stage("reference"), torch.no_grad():
                reference = self._step(policy, "ref", batch)
            distance_M = (taken.mean - reference.mean).square().flatten(1).mean(1)
            kl = (share_M * distance_M).sum() / (2 * self.sampler.squared_noise(batch.step))
            loss, measured = policy_loss + self.settings.kl_coef * kl, {"kl": kl}
        metrics = {
            "policy_loss": policy_loss, **measured,
            "clip_fraction": (share_M * ((ratio_M - 1).abs() > clip)).sum(),
        }  # fmt: skip
        return LossOutput.of(loss, **metrics)

    def after_iteration(self, policy: Policy, step: int) -> None:
        """Nothing: the next rollout is the policy's own."""

    def drift(self, policy: Policy) -> float:
        """The largest |ratio - 1| of a micro-batch drawn and trained on by the same weights, in the recipe's shapes.

        At the trained step whose density moves most with the velocity.
        """
        drawn_at_once, trained_at_once = (
            self.config.rollout.images_per_forward, self.config.optimizer.images_per_micro_batch
        )  # fmt: skip
        model, number = policy.model, max(self.settings.trained_points, key=self.sampler.sensitivity)
        generator = torch.Generator().manual_seed(0)
        x_BCHW = torch.randn(
            max(drawn_at_once, trained_at_once), *model.latent_shape, generator=generator
        ).to(model.device)  # fmt: skip
        streams = [rng.stream(0, stage="drift", sample=sample) for sample in range(len(x_BCHW))]
        empty, timestep = model.encode([""]), self.sampler.timesteps[number]

        def velocity(x: Tensor) -> Tensor:
            rows = empty[torch.zeros(len(x), dtype=torch.int64, device=model.device)]
            return self._guided(policy, "policy", x, self._condition(policy, timestep, rows, empty))

        with policy.equal_weights("policy"):
            x, kept = x_BCHW[:drawn_at_once], min(drawn_at_once, trained_at_once)
            with torch.no_grad():
                drawn = self.sampler.step(number, x, velocity(x), streams=streams[:drawn_at_once])
            x, x_next = (tensor[:kept] for tensor in (x, drawn.x_next))
            trained = self.sampler.step(number, x, velocity(x).detach(), x_next=x_next)
        log_ratio_B = self.sampler.density_scale(number) * (trained.log_prob_B - drawn.log_prob_B[:kept])
        return float((log_ratio_B.exp() - 1).abs().max())

    def _micro_batches(self, num_samples: int, update: int) -> list[slice]:
        """This rank's, for one of the iteration's optimizer steps."""
        optimizer = self.config.optimizer
        of_update, micro = num_samples // optimizer.steps_per_iteration, optimizer.images_per_micro_batch
        stop = (update + 1) * of_update
        return [slice(start, min(start + micro, stop)) for start in range(update * of_update, stop, micro)]

    def _forwards(self, prompts: PromptBatch) -> Iterator[tuple[slice, range]]:
        """The samples of each forward of the rollout, and the steps that they are trained at.

        With a window every micro-batch has one of its own, as every batch that is sampled has in the published code.
        """
        num_samples, per_forward = prompts.num_samples, self.config.rollout.images_per_forward
        parts = [(slice(0, num_samples), range(self.settings.trained_steps))]
        if self.settings.window is not None:
            updates = range(self.config.optimizer.steps_per_iteration)
            micro_batches = [mine for update in updates for mine in self._micro_batches(num_samples, update)]
            parts = [(mine, self._window(prompts.iteration, prompts.samples[mine.start])) for mine in micro_batches]
        for mine, trained in parts:
            for start in range(mine.start, mine.stop, per_forward):
                yield slice(start, min(start + per_forward, mine.stop)), trained

    def _window(self, iteration: int, sample: int) -> range:
        """Steps among the trained ones, from where the micro-batch that begins with this sample draws it."""
        window = self.settings.window
        assert window is not None
        name = rng.stream(self.config.seed, stage="window", iteration=iteration, sample=sample)
        (first,) = rng.choice(name, self.settings.trained_steps - window + 1, k=1)
        return range(first, first + window)

    def _streams(self, prompts: PromptBatch, samples: slice) -> Tensor:
        """The words that each step of each sample is drawn from, int64 [T, B, 4]: of its iteration, group and step."""
        name = partial(rng.stream, self.config.seed, stage="sde", iteration=prompts.iteration)
        numbers = prompts.numbers(samples)
        return torch.tensor([
            [name(group=group, sample=sample, timestep=number) for group, sample in numbers]
            for number in range(self.config.rollout.steps)
        ])  # fmt: skip

    def _velocity(
        self, policy: Policy, view: View, prompts: PromptBatch, conditioning: Conditioning, x_BCHW: Tensor, number: int
    ) -> Tensor:
        """The rollout's. Each step is conditioned alone, as training does it: bits depend on how many are at once."""
        timestep = self.sampler.timesteps[number]
        evaluation = self._condition(policy, timestep, conditioning, prompts.unconditional)
        return self._guided(policy, view, x_BCHW, evaluation)

    def _step(self, policy: Policy, view: View, batch: TrajectoryBatch) -> SDEStep:
        """The step that the batch drew, as `view` sees it."""
        timestep = self.sampler.timesteps[batch.step]
        evaluation = self._condition(policy, timestep, batch.conditioning, batch.unconditional)
        velocity_MCHW = self._guided(policy, view, batch.x_MCHW, evaluation)
        return self.sampler.step(batch.step, batch.x_MCHW, velocity_MCHW, x_next=batch.x_next_MCHW, with_mean=True)

    def _condition(
        self,
        policy: Policy,
        timestep: float,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
    ) -> ModelCall:
        timestep_1B = torch.full((1, len(conditioning.text_BND)), timestep, device=policy.model.device)
        (evaluation,) = policy.condition(timestep_1B, conditioning, unconditional if self._is_guided else None)
        return evaluation

    @property
    def _is_guided(self) -> bool:
        return self.config.rollout.guidance > 1

    def _guided(self, policy: Policy, view: View, x_BCHW: Tensor, evaluation: ModelCall) -> Tensor:
        """The velocity, float32, guided where the recipe guides."""
        v_cond, v_uncond = policy.velocity_at(view, x_BCHW, evaluation)
        if v_uncond is None:
            return v_cond.float()
        v_uncond = v_uncond.detach().float()
        return v_uncond + self.config.rollout.guidance * (v_cond.float() - v_uncond)
