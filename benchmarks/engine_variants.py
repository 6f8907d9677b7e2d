"""Whole engines that compete on one recipe: how each is built, and the three pieces of work that it is timed with.

Shape letters: B samples of a rollout, M of a micro-batch, C H W latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from benchmarks.published import MicroBatch, PublishedLoop
from dgpo_fast import rng
from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.parallel.engine import ReplicatedEngine
from dgpo_fast.profiling import StageClock
from dgpo_fast.records import Conditioning, PromptBatch, Rollout, ScoredGroups
from dgpo_fast.trainer import Trainer

PROBED = 2
"""Samples whose velocities and gradients are compared with float64."""
ADAPTER_STD = 0.02


class Probe(NamedTuple):
    """What every variant is asked for before it is timed; all values are bfloat16 numbers, so that all get the same."""

    x_BCHW: Tensor
    timestep_B: Tensor
    conditioning: Conditioning
    direction_BCHW: Tensor  # the gradient is that of the velocity's product with it
    adapters: Tensor  # all of a view, end to end


class Answer(NamedTuple):
    """What a variant says to a `Probe`."""

    velocity_BCHW: Tensor  # that of its rollouts
    gradient: Tensor  # of the adapters, end to end


class Variant(Protocol):
    """An engine with a model of its own, ready to work."""

    clock: StageClock
    transformer: nn.Module

    def answer(self, probe: Probe) -> Answer: ...

    def rollout(self) -> object:
        """A trajectory, all solver steps, of as many images as the recipe samples at a time."""
        ...

    def micro_step(self) -> object:
        """One micro-batch at one sigma: noise, reference, old policy, policy, loss, backward."""
        ...

    def iteration(self) -> object:
        """Prompts nobody saw before, images, rewards, gradients, one optimizer step."""
        ...

    def resident(self) -> Iterator[Tensor]:
        """All that stays on the device between iterations."""
        ...


def num_sampled(config: Config) -> int:
    """Images of whole groups that a rollout samples at a time, those of one group at least."""
    size = config.groups.size
    return max(config.rollout.images_per_forward // size, 1) * size


class Engine:
    """One of this package's engines, in the trainer that runs it."""

    def __init__(self, config: Config, out: Path) -> None:
        # One step: a trainer that sees no later prompts encodes those of an iteration when it comes to them.
        self.trainer = Trainer(config, out)
        self.clock, policy, algorithm = self.trainer.clock, self.trainer.policy, self.trainer.algorithm
        assert isinstance(policy, AdapterPolicy) and isinstance(algorithm, DGPO)
        self.policy, self._algorithm = policy, algorithm
        self.transformer: nn.Module = self.policy.model.transformer
        self._config, self._device = config, self.policy.model.device
        self._prompt = self.policy.model.encode([""])

    def answer(self, probe: Probe) -> Answer:
        policy, dtype = self.policy, self.policy.model.dtype
        compute = policy.views["policy"].compute
        before = compute.clone()
        with torch.no_grad():
            compute.copy_(probe.adapters)
        x_BCHW, conditioning = probe.x_BCHW, _in(dtype, probe.conditioning)
        with torch.no_grad():
            (evaluation,) = policy.condition(probe.timestep_B[None], conditioning, engine=policy.sampling_engine)
            sampled = policy.velocity_at("policy", x_BCHW, evaluation)[0]
        trained = policy.velocity("policy", x_BCHW, probe.timestep_B, conditioning)[0]
        (trained.float() * probe.direction_BCHW).sum().backward()
        policy.collect_gradient()
        gradient = policy.trainable.grad
        assert gradient is not None
        found = gradient.clone()
        gradient.zero_()
        with torch.no_grad():
            compute.copy_(before)
        return Answer(sampled, found)

    def rollout(self) -> object:
        view, prompts = self._config.sampling_view(0), self._prompts(num_sampled(self._config))
        return self._algorithm.rollout(self.policy, view, prompts)

    def micro_step(self) -> Tensor:
        batches = next(iter(self._algorithm.batches(self._scored())))
        (weights,) = self._algorithm.group_weights(self.policy, batches) or (None,)
        loss = self._algorithm.loss(self.policy, batches[0], weights).loss
        loss.backward()
        self.policy.collect_gradient()
        return loss.detach()

    def iteration(self) -> object:
        return self.trainer.run_iteration()

    def resident(self) -> Iterator[Tensor]:
        model = self.policy.model
        for module in (model.transformer, model.pipeline.vae):
            yield from _tensors(module)
        for view in self.policy.views.values():
            yield from (view.master, view.compute)
        engine = self.trainer.learner.engine
        assert isinstance(engine, ReplicatedEngine)
        yield from _trained([self.policy.trainable], engine.optimizer)

    def _repeated(self, num: int) -> Conditioning:
        return self._prompt[torch.zeros(num, dtype=torch.int64, device=self._device)]

    def _prompts(self, num_samples: int) -> PromptBatch:
        """Groups of the empty prompt."""
        size = self._config.groups.size
        groups = num_samples // size
        return PromptBatch(
            iteration=0, samples=tuple(range(num_samples)), group_size=size, prompts=("",) * groups,
            conditioning=self._repeated(groups), unconditional=self.trainer.unconditional,
        )  # fmt: skip

    def _scored(self) -> ScoredGroups:
        """The micro-batch of whole groups that the recipe trains on at once."""
        micro = self._config.optimizer.images_per_micro_batch
        names = [rng.stream(0, stage="benchmark", sample=sample) for sample in range(micro)]
        x0_BCHW = rng.normal(names, self.policy.model.latent_shape, device=self._device)
        rollout = Rollout(prompts=self._prompts(micro), x0_BCHW=x0_BCHW)
        advantage_B = _alternating(micro, self._device)
        return ScoredGroups(
            rollout=rollout, reward_B=advantage_B, valid_B=torch.ones_like(advantage_B, dtype=torch.bool),
            num_valid=(self._config.images_per_iteration,), num_advantaged=(self._config.images_per_iteration,),
            advantage_B=advantage_B,
            group_size_G=advantage_B.new_full((self._config.groups.per_iteration,), self._config.groups.size),
            num_groups=(self._config.groups.per_iteration,),
        )  # fmt: skip


class Published:
    """The published loop."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.loop = PublishedLoop(config, device=device)
        self.clock = StageClock(synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None)
        self.transformer: nn.Module = self.loop.transformer
        self._config, self._device = config, device
        self._prompt = self.loop.encode([""])

    def answer(self, probe: Probe) -> Answer:
        loop, before = self.loop, [parameter.detach().clone() for parameter in self.loop.adapters]
        _write(loop.adapters, probe.adapters)
        with torch.no_grad():
            sampled = loop.velocity(*probe[:2], _in(self._prompt.text_BND.dtype, probe.conditioning))
        trained = loop.velocity(*probe[:2], _in(self._prompt.text_BND.dtype, probe.conditioning))
        gradients = torch.autograd.grad((trained * probe.direction_BCHW).sum(), loop.adapters)
        _write(loop.adapters, torch.cat([weights.flatten() for weights in before]))
        return Answer(sampled, torch.cat([gradient.flatten() for gradient in gradients]))

    def rollout(self) -> Tensor:
        return self.loop.sample(self._repeated(num_sampled(self._config)))

    def micro_step(self) -> Tensor:
        size, micro = self._config.groups.size, self._config.optimizer.images_per_micro_batch
        group_M, dtype = torch.arange(micro, device=self._device) // size, self._prompt.text_BND.dtype
        noise = torch.randn(micro // size, *self.loop.latent_shape, device=self._device, dtype=dtype)
        x0_MCHW = torch.randn(micro, *self.loop.latent_shape, device=self._device, dtype=dtype)
        batch = MicroBatch(
            x0_MCHW=x0_MCHW, noise_MCHW=noise[group_M], timestep=500.0, conditioning=self._repeated(micro),
            advantage_M=_alternating(micro, self._device), group_M=group_M,
        )  # fmt: skip
        return self.loop.micro_step(batch)

    def iteration(self) -> None:
        self.loop.iteration()

    def resident(self) -> Iterator[Tensor]:
        pipeline = self.loop.pipeline
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        for module in (self.transformer, pipeline.vae, *encoders):
            yield from _tensors(module)
        yield from self.loop.averages()
        yield from _trained(self.loop.parameters, self.loop.optimizer)

    def _repeated(self, num: int) -> Conditioning:
        return self._prompt[torch.zeros(num, dtype=torch.int64, device=self._device)]


class Truth:
    """diffusers' transformer with peft's layers in float64, on the weights of a `Published`."""

    def __init__(self, published: Published) -> None:
        self._transformer = copy.deepcopy(published.transformer).double()
        ordered = {id(mine): twin for mine, twin in zip(
            published.transformer.parameters(), self._transformer.parameters(), strict=True
        )}  # fmt: skip
        self._adapters = [ordered[id(parameter)] for parameter in published.loop.adapters]
        self.probe = self._probe(published)

    def answer(self) -> Answer:
        probe, conditioning = self.probe, _in(torch.float64, self.probe.conditioning)
        _write(self._adapters, probe.adapters)
        velocity = self._transformer(
            hidden_states=probe.x_BCHW.double(), timestep=probe.timestep_B,
            encoder_hidden_states=conditioning.text_BND, pooled_projections=conditioning.pooled_BD, return_dict=False,
        )[0]  # fmt: skip
        gradients = torch.autograd.grad((velocity * probe.direction_BCHW.double()).sum(), self._adapters)
        return Answer(velocity.detach(), torch.cat([gradient.flatten() for gradient in gradients]))

    def _probe(self, published: Published) -> Probe:
        generator, prompt = torch.Generator().manual_seed(0), published.loop.encode([""])
        device = prompt.text_BND.device

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).bfloat16().float().to(device)

        return Probe(
            x_BCHW=numbers(PROBED, *published.loop.latent_shape),
            timestep_B=torch.tensor([250.0, 750.0], device=device),
            conditioning=Conditioning(
                text_BND=numbers(PROBED, *prompt.text_BND.shape[1:]),
                pooled_BD=numbers(PROBED, *prompt.pooled_BD.shape[1:]),
            ),
            direction_BCHW=numbers(PROBED, *published.loop.latent_shape),
            adapters=(ADAPTER_STD * numbers(sum(each.numel() for each in self._adapters))).bfloat16().float(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A variant by name.

    Attributes:
        build: makes it from a recipe's name and changes, on a device, with a directory to write in.
        rounding: the largest relative error of one of its rollouts' products, where those are not in the model's dtype.
        by_default: the devices on which it competes without being asked for by name.
    """

    name: str
    build: Callable[[str, list[str], torch.device, Path], Variant]
    rounding: float | None = None
    by_default: tuple[str, ...] = ("cpu", "cuda")


def _published(recipe: str, changes: list[str], device: torch.device, out: Path) -> Variant:
    return Published(load_recipe(recipe, changes), device)


def _engine(engine: str, sampling: str = "auto") -> Callable[[str, list[str], torch.device, Path], Variant]:
    def build(recipe: str, changes: list[str], device: torch.device, out: Path) -> Variant:
        return Engine(load_recipe(recipe, [*changes, f"model.engine={engine}", f"model.sampling={sampling}"]), out)

    return build


BASELINE = "published"
SPECS: Mapping[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(name=BASELINE, build=_published),
        Spec(name="eager", build=_engine("eager")),
        # On a CPU its kernels take minutes to compile.
        Spec(name="compile", build=_engine("compile"), by_default=("cuda",)),
        Spec(name="fused", build=_engine("fused")),
        # A relative error of 2^-9 of both operands and of the product, at the worst place of a binade.
        Spec(
            name="fused + bfloat16",
            build=_engine("fused", "bfloat16"),
            rounding=2**-8,
            by_default=("cpu",),
        ),
        # A relative error of 2^-4 / sqrt(3) of both operands, at the worst place of a binade (see models/fp8.py).
        Spec(name="fused + fp8", build=_engine("fused", "fp8"), rounding=0.05, by_default=("cuda",)),
    )
}


def share_weights(variants: Iterable[Variant], source: Variant) -> None:
    """Frozen weights of transformers become those of `source`: the same tensors where the dtype is the same."""
    given = _frozen(source)
    for variant in variants:
        for name, parameter in _frozen(variant).items():
            weight = given[name].detach()
            parameter.data = weight if parameter.dtype == weight.dtype else weight.to(parameter.dtype)


def _frozen(variant: Variant) -> dict[str, nn.Parameter]:
    named = variant.transformer.named_parameters()
    return {name.removeprefix("base_model.model."): each for name, each in named if ".lora_" not in name}


def _in(dtype: torch.dtype, conditioning: Conditioning) -> Conditioning:
    return Conditioning(text_BND=conditioning.text_BND.to(dtype), pooled_BD=conditioning.pooled_BD.to(dtype))


@torch.no_grad()
def _write(parameters: list[nn.Parameter], flat: Tensor) -> None:
    for parameter, piece in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
        parameter.copy_(piece.view_as(parameter))


def _alternating(num: int, device: torch.device) -> Tensor:
    """Advantages 1, -1, 1, -1, ..."""
    return 1 - 2.0 * (torch.arange(num, device=device) % 2)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _trained(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Gradients and moments."""
    state: Mapping[Any, Mapping[str, Any]] = optimizer.state
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad
        yield from (value for value in state[parameter].values() if isinstance(value, Tensor))
