"""How the transformer is run: by diffusers' own code, the same compiled, or by hand. All three look through views.

What text and timesteps do is computed before the transformer runs, for all evaluations of a trajectory at once, and
handed to each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Literal, Protocol

import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dgpo_fast.config import AdapterConfig, ModelConfig
from dgpo_fast.errors import UserError
from dgpo_fast.models.block_ranges import announce_blocks
from dgpo_fast.models.fp8 import why_unsupported
from dgpo_fast.models.fused.attention import find_attention
from dgpo_fast.models.fused.transformer import FusedTransformer
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.records import Conditioning

View = Literal["policy", "old", "ema", "ref"]

Conditioned = Any
"""What an engine's `condition` gives for one evaluation, and its `velocity` takes."""


class Engine(Protocol):
    """Velocities of a transformer with frozen weights, through views of its adapters; gradients reach `policy` only."""

    def condition(self, timestep_EB: Tensor, conditioning: Conditioning) -> Sequence[Conditioned]:
        """What timesteps (1000 sigma, float32) and text, a row per sample, do to each of E evaluations."""

    def velocity(self, view: View, x_BCHW: Tensor, conditioned: Conditioned) -> Tensor:
        """The velocity [B, C, H, W] in the model's dtype at latents, which are rounded to it."""


class EagerEngine:
    """diffusers' transformer with peft's layers, as they are."""

    def __init__(self, model: StableDiffusion3) -> None:
        if model.config.checkpointing == "full":
            model.transformer.enable_gradient_checkpointing()
        self._model = model
        self._layers = [module for module in model.transformer.modules() if isinstance(module, LoraLayer)]
        self._active: View | None = None

    def condition(self, timestep_EB: Tensor, conditioning: Conditioning) -> Sequence[Conditioned]:
        return [(timestep_B, conditioning) for timestep_B in timestep_EB]

    def velocity(self, view: View, x_BCHW: Tensor, conditioned: Conditioned) -> Tensor:
        self._look_through(view)
        return self._model.velocity(x_BCHW, *conditioned)

    def _look_through(self, view: View) -> None:
        if view == self._active:
            return
        for layer in self._layers:
            layer.set_adapter([] if view == "ref" else [view], inference_mode=view != "policy")
        self._active = view


class CompiledEngine(EagerEngine):
    """The same, each block through torch.compile: blocks of one kind share what is compiled for it."""

    def __init__(self, model: StableDiffusion3) -> None:
        super().__init__(model)
        compile_blocks(model.transformer)


class ReplicaEngine:
    """diffusers' transformer once for every view, as `module_of` finds it; gradients reach whatever is trained."""

    def __init__(self, model: StableDiffusion3, module_of: Callable[[View], SD3Transformer2DModel]) -> None:
        self._model, self._module_of = model, module_of

    def condition(self, timestep_EB: Tensor, conditioning: Conditioning) -> Sequence[Conditioned]:
        return [(timestep_B, conditioning) for timestep_B in timestep_EB]

    def velocity(self, view: View, x_BCHW: Tensor, conditioned: Conditioned) -> Tensor:
        return self._model.velocity(x_BCHW, *conditioned, transformer=self._module_of(view))


class FusedEngine:
    """Blocks by hand, forward and backward (`dgpo_fast.models.fused`), on the same weights."""

    def __init__(self, model: StableDiffusion3, adapter: AdapterConfig, flats: Mapping[View, Tensor]) -> None:
        """`flats` are the adapters of every view but `ref`, end to end."""
        self.dtype, self.device = model.dtype, model.device
        self._transformer = FusedTransformer(
            model.transformer,
            attention=find_attention(model.config.attention, device=model.device, dtype=model.dtype),
            checkpointing=model.config.checkpointing,
            rank=adapter.rank,
            scaling=adapter.alpha / adapter.rank,
        )
        self._views = {view: self._transformer.adapted(flat) for view, flat in flats.items()}

    def quantised(self) -> FusedEngine:
        """The same engine with the base in fp8 and the adapters beside it as they are; without gradients.

        Raises:
            UserError: fp8 does not run here, or not in the model's dtype.
        """
        if (reason := why_unsupported(self.device, self.dtype)) is not None:
            raise UserError(f"model.sampling: fp8 {reason}")
        fp8 = copy(self)
        fp8._transformer = self._transformer.quantised()
        return fp8

    def merged(self, view: View, dtype: torch.dtype) -> FusedEngine:
        """The same engine with the adapters of `view` in its weights, in `dtype`: what `ref` was is now that view."""
        merged = copy(self)
        merged._transformer = self._transformer.merged(self._views.get(view), dtype)
        return merged

    def condition(self, timestep_EB: Tensor, conditioning: Conditioning) -> Sequence[Conditioned]:
        return self._transformer.condition(timestep_EB, conditioning)

    def velocity(self, view: View, x_BCHW: Tensor, conditioned: Conditioned) -> Tensor:
        return self._transformer.velocity(x_BCHW.to(self.dtype), conditioned, self._views.get(view))


class MergedEngine:
    """A fused engine whose adapters are added into copies of the weights beside which they stand; without gradients.

    Args:
        dtype: of the copies, and of all that blocks compute.
    """

    def __init__(self, engine: FusedEngine, dtype: torch.dtype) -> None:
        self._engine, self.dtype = engine, dtype
        self._merged: dict[View, FusedEngine] = {}

    def condition(self, timestep_EB: Tensor, conditioning: Conditioning) -> Sequence[Conditioned]:
        self._merged.clear()  # a trajectory begins, and the adapters may have learnt since the last one
        return [given.to(self.dtype) for given in self._engine.condition(timestep_EB, conditioning)]

    def velocity(self, view: View, x_BCHW: Tensor, conditioned: Conditioned) -> Tensor:
        if view not in self._merged:
            self._merged[view] = self._engine.merged(view, self.dtype)
        return self._merged[view].velocity("ref", x_BCHW, conditioned)


def compile_blocks(transformer: SD3Transformer2DModel) -> None:
    """Has each block run through torch.compile."""
    # A block meets four views, with and without gradients, in the batches of rollout, training and evaluation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)


def make_engine(model: StableDiffusion3, adapter: AdapterConfig, flats: Mapping[View, Tensor]) -> Engine:
    """The engine that `model.engine` names.

    Raises:
        UserError: it cannot run this model, these adapters or here.
    """
    if model.config.engine == "fused":
        return FusedEngine(model, adapter, flats)
    if model.config.engine == "compile":
        return CompiledEngine(model)
    announce_blocks(model.transformer)
    return EagerEngine(model)


def describe_engine(model: StableDiffusion3) -> str:
    """What the transformer runs by, such as `engine fused, attention cudnn`."""
    config = model.config
    if config.engine != "fused":
        return f"engine {config.engine}"
    return f"engine fused, attention {find_attention(config.attention, device=model.device, dtype=model.dtype).name}"


def sampling_engine(engine: Engine, model: ModelConfig) -> Engine:
    """What training samples are drawn with, as `model.sampling` says: `engine`, or a form of it.

    Raises:
        UserError: it has no such form here.
    """
    if model.drawn_with == "same":
        return engine
    assert isinstance(engine, FusedEngine)  # the configuration knows that others have no such form
    if model.drawn_with == "fp8":
        return engine.quantised()
    low = model.drawn_with == "bfloat16" and _has_bfloat16_products(engine.device)
    return MergedEngine(engine, torch.bfloat16 if low else engine.dtype)


def _has_bfloat16_products(device: torch.device) -> bool:
    """Whether they are quick: a CPU without instructions for them takes many times as long as for float32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
