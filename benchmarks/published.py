"""The training loop as its authors published it: what a competent user of diffusers and peft has without this package.

Follows scripts/train_sd3_dgpo.py of github.com/Luo-Yihong/DGPO (January 2026) with the pipeline, the averages and the
configuration beside it, stage by stage:

- the transformer in float32 under bfloat16 autocast, with peft's layers as `get_peft_model` injects them, and its
  output raised to float32, as accelerate does; TF32 allowed; diffusers' own attention
- text encoded for each image of a batch, in bfloat16; the empty prompt once for the whole run
- rollouts by diffusers' DPMSolverMultistepScheduler, with guidance as one batch of 2B; latents in the embeddings' dtype
- images decoded by the VAE in float32, scored in a thread while the next batch is sampled
- reference, old policy and policy one after another in each micro-step, batch by batch and sigma by sigma; the old
  weights are copied into the adapter and the policy's back from the host, tensor by tensor
- noise, x_t, errors, group scores and KL term in plain torch; AdamW and averages over several hundred tensors

On a CPU it is the same in float32, without autocast, and the policy's weights wait in a copy: `.cpu()`, which makes one
for a GPU, is none there.

Left out, which makes it faster: seven figures drawn at each step, logs, progress bars, the latents and their means that
are kept of every solver step, the communication between ranks.

Shape letters: B samples, M of a micro-batch, G groups, C H W latents, N text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dgpo_fast import rng
from dgpo_fast.algorithm_config import DGPOConfig
from dgpo_fast.config import Config
from dgpo_fast.models.projections import adapter_order
from dgpo_fast.models.sd3 import load_pipeline
from dgpo_fast.profiling import stage
from dgpo_fast.prompts import PromptSampler, load_prompts
from dgpo_fast.records import Conditioning
from dgpo_fast.rewards import Scorer, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What a micro-step learns from."""

    x0_MCHW: Tensor
    noise_MCHW: Tensor  # one for each group
    timestep: float  # 1000 sigma
    conditioning: Conditioning
    advantage_M: Tensor
    group_M: Tensor  # int64, numbered from 0


class Average:
    """A moving average of parameters, tensor by tensor; the published EMAModuleWrapper."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.tensors = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def step(self, decay: float) -> None:
        for average, parameter in zip(self.tensors, self._parameters, strict=True):
            average.add_((1 - decay) * (parameter - average))

    @contextmanager
    def in_place_of_the_policy(self) -> Iterator[None]:
        """The parameters are the average meanwhile; what they were waits on the host."""
        policy = [
            parameter.detach().clone() if parameter.device.type == "cpu" else parameter.detach().cpu()
            for parameter in self._parameters
        ]
        for average, parameter in zip(self.tensors, self._parameters, strict=True):
            parameter.data.copy_(average)
        yield
        for weights, parameter in zip(policy, self._parameters, strict=True):
            parameter.data.copy_(weights)


class PublishedLoop:
    """Iterations of the published script, with the numbers of a recipe.

    Needs a recipe that it can run: solver "dpm++2m" on schedule "dpm", guidance at all steps, whole groups in a
    micro-batch.
    """

    def __init__(self, config: Config, *, device: torch.device) -> None:
        rollout, optimizer = config.rollout, config.optimizer
        assert (rollout.solver, rollout.schedule, rollout.guidance_interval) == ("dpm++2m", "dpm", None)
        adapter, algorithm = config.adapter, config.algorithm
        assert optimizer.images_per_micro_batch % config.groups.size == 0
        assert adapter is not None and isinstance(algorithm, DGPOConfig)
        self.config, self.algorithm, self.device = config, algorithm, device
        self._on_gpu = device.type == "cuda"
        self.pipeline = load_pipeline(config.model.model_copy(update={"dtype": "float32"}), device=device)
        self.pipeline.scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=rollout.shift
        )
        if self._on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = True
            for encoder in (self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.text_encoder_3):
                encoder.to(torch.bfloat16)
        torch.manual_seed(config.seed)
        self.transformer: PeftModel = get_peft_model(
            self.pipeline.transformer,
            LoraConfig(
                r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian",
                target_modules=list(adapter.targets),
            ),
        )  # fmt: skip
        learning = {name: each for name, each in self.transformer.named_parameters() if each.requires_grad}
        self.parameters: list[nn.Parameter] = list(learning.values())
        self.adapters = [learning[name] for name in sorted(learning, key=_order)]
        """The same in the order of `Policy`'s flat tensors."""
        self.old, self.ema = Average(self.parameters), Average(self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay,
            eps=optimizer.eps,
        )  # fmt: skip
        prompts = load_prompts(config.prompts.train, key="prompts.train")
        self._prompts = PromptSampler(prompts, per_iteration=config.groups.per_iteration, seed=config.seed)
        self._scorer = Scorer(config.rewards)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._unconditional = self.encode([""])
        side = config.model.resolution // self.pipeline.vae_scale_factor
        self.latent_shape = (int(self.transformer.config.in_channels), side, side)
        self.step = 0

    def iteration(self) -> None:
        """Samples groups, scores them, and makes one optimizer step."""
        config, size = self.config, self.config.groups.size
        prompts = [prompt for prompt in self._prompts.draw(self.step) for _ in range(size)]
        batches: list[tuple[Tensor, Conditioning]] = []
        futures: list[Future[Scores]] = []
        for first in range(0, len(prompts), config.rollout.images_per_forward):
            batch = prompts[first : first + config.rollout.images_per_forward]
            conditioning = self.encode(batch)
            x0_BCHW = self.sample(conditioning)
            with stage("vae"):
                images_BCHW = self._decode(x0_BCHW)
            futures.append(self._thread.submit(self._scorer, images_BCHW, batch))
            batches.append((x0_BCHW, conditioning))
        with stage("reward"):
            reward_B = torch.cat([future.result().reward_B for future in futures])
        self._learn(
            torch.cat([x0_BCHW for x0_BCHW, _ in batches]),
            Conditioning(
                text_BND=torch.cat([conditioning.text_BND for _, conditioning in batches]),
                pooled_BD=torch.cat([conditioning.pooled_BD for _, conditioning in batches]),
            ),
            self._advantages(reward_B.view(-1, size)).flatten().to(self.device),
        )

    def velocity(self, x_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity, float32 [B, C, H, W]."""
        with self._autocast():
            velocity = self.transformer(
                hidden_states=x_BCHW,
                timestep=timestep_B,
                encoder_hidden_states=conditioning.text_BND,
                pooled_projections=conditioning.pooled_BD,
                return_dict=False,
            )[0]
        return velocity.float()  # type: ignore[no-any-return]

    def micro_step(self, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch, whose gradient is added to that of the parameters."""
        algorithm, sigma = self.algorithm, batch.timestep / 1000
        x_t = (1 - sigma) * batch.x0_MCHW + sigma * batch.noise_MCHW
        target = batch.noise_MCHW - batch.x0_MCHW
        timestep = torch.tensor(batch.timestep, device=self.device)
        inputs = x_t, timestep.expand(len(x_t)), batch.conditioning
        with torch.no_grad():
            with stage("reference"), self.transformer.disable_adapter():
                scale = algorithm.kl_cfg
                reference = (
                    self._guided(x_t, timestep, batch.conditioning, scale) if scale > 1 else self.velocity(*inputs)
                )
            with stage("old"), self.old.in_place_of_the_policy():
                old = self.velocity(*inputs)
        with stage("policy"):
            policy = self.velocity(*inputs)
        error_M, old_error_M = _mean_square(target - policy), _mean_square(target - old)
        if algorithm.clip is not None:
            ratio_M = torch.exp(old_error_M - error_M)
            clipped_M = torch.where(batch.advantage_M > 0, ratio_M > 1 + algorithm.clip, ratio_M < 1 - algorithm.clip)
            error_M = torch.where(clipped_M, error_M.detach(), error_M)
        anchor = old if algorithm.reference == "old" else reference
        with torch.no_grad():
            gain_M = batch.advantage_M * (_mean_square(target - policy) - _mean_square(target - anchor))
            sums_G = gain_M.new_zeros(int(batch.group_M.max()) + 1).scatter_add_(0, batch.group_M, gain_M)
            weight_G = torch.sigmoid(algorithm.beta / self.config.groups.size * sums_G)
        loss = (weight_G[batch.group_M] * batch.advantage_M * error_M).mean()
        loss = loss + algorithm.kl_coef * _mean_square(policy - reference).mean()
        with stage("backward"):
            (loss / self._micro_steps).backward()
        return loss.detach()

    def averages(self) -> Iterator[Tensor]:
        """What the averages take of the device's memory."""
        yield from self.old.tensors
        yield from self.ema.tensors

    @property
    def _micro_steps(self) -> int:
        """Of an iteration: what accelerate divides each loss by."""
        config = self.config
        return config.images_per_iteration // config.optimizer.images_per_micro_batch * self.algorithm.train_timesteps

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of `prompts`, each by itself although many are the same."""
        with stage("text"), torch.no_grad():
            text, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=list(prompts), prompt_2=None, prompt_3=None, device=self.device,
                do_classifier_free_guidance=False, max_sequence_length=self.config.model.text_length,
            )  # fmt: skip
        return Conditioning(text_BND=text, pooled_BD=pooled)

    @torch.no_grad()
    def sample(self, conditioning: Conditioning) -> Tensor:
        """Clean latents for each row, along the whole trajectory."""
        scheduler, dtype = self.pipeline.scheduler, conditioning.text_BND.dtype
        x_BCHW = torch.randn(len(conditioning.text_BND), *self.latent_shape, device=self.device, dtype=dtype)
        scheduler.set_timesteps(self.config.rollout.steps, device=self.device)
        for timestep in scheduler.timesteps:
            with stage("transformer"):
                velocity = self._rollout_velocity(x_BCHW, timestep, conditioning).to(dtype)
            with stage("solver"):
                x_BCHW = scheduler.step(velocity, timestep, x_BCHW, return_dict=False)[0]
        return x_BCHW

    @torch.no_grad()
    def _decode(self, x0_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = (x0_BCHW / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        images: Tensor = self.pipeline.image_processor.postprocess(
            vae.decode(latents, return_dict=False)[0], output_type="pt"
        )
        return images

    def _advantages(self, reward_GS: Tensor) -> Tensor:
        """Of rewards [G, samples of each]."""
        rule = self.config.advantages
        centred = reward_GS - reward_GS.mean(1, keepdim=True)
        spread = reward_GS.std(correction=0) if rule.std == "global" else reward_GS.std(1, correction=0, keepdim=True)
        return (centred / (spread + rule.epsilon)).clamp(-rule.clamp, rule.clamp)

    def _learn(self, x0_BCHW: Tensor, conditioning: Conditioning, advantage_B: Tensor) -> None:
        config, size = self.config, self.config.groups.size
        micro, algorithm = config.optimizer.images_per_micro_batch, self.algorithm
        name = rng.stream(config.seed, stage="timesteps", iteration=self.step)
        timesteps = self.pipeline.scheduler.timesteps.tolist()
        chosen = rng.choice(name, algorithm.trunc + 1, k=algorithm.train_timesteps)
        group_M = torch.arange(micro, device=self.device) // size
        for first in range(0, len(x0_BCHW), micro):
            rows = slice(first, first + micro)
            for index in chosen:
                noise_GCHW = torch.randn(micro // size, *self.latent_shape, device=self.device, dtype=x0_BCHW.dtype)
                self.micro_step(
                    MicroBatch(
                        x0_MCHW=x0_BCHW[rows], noise_MCHW=noise_GCHW[group_M], timestep=float(timesteps[index]),
                        conditioning=conditioning[rows], advantage_M=advantage_B[rows], group_M=group_M,
                    )
                )  # fmt: skip
        with stage("optimizer"):
            nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_grad_norm)
            self.optimizer.param_groups[0]["lr"] = config.optimizer.lr_at(self.step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.old.step(min(config.old_policy.max_decay, config.old_policy.rate * self.step))
            average = config.evaluation_ema
            if (self.step + 1) % average.every == 0:
                self.ema.step(average.decay_at(self.step))
        self.step += 1

    def _rollout_velocity(self, x_BCHW: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        scale = self.config.rollout.guidance
        if scale == 1:
            return self.velocity(x_BCHW, timestep.expand(len(x_BCHW)), conditioning)
        return self._guided(x_BCHW, timestep, conditioning, scale)

    def _guided(self, x_BCHW: Tensor, timestep: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
        num = len(x_BCHW)
        both = Conditioning(
            text_BND=torch.cat([self._unconditional.text_BND.expand(num, -1, -1), conditioning.text_BND]),
            pooled_BD=torch.cat([self._unconditional.pooled_BD.expand(num, -1), conditioning.pooled_BD]),
        )
        without, given = self.velocity(torch.cat([x_BCHW] * 2), timestep.expand(2 * num), both).chunk(2)
        return without + scale * (given - without)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self._on_gpu else nullcontext()


def _order(name: str) -> tuple[int, int, str, int]:
    return adapter_order(name[name.index("transformer_blocks") :])


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)
