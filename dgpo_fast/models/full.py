"""A policy of which every weight is trained: full fine-tuning.

Three transformers compute: the trained one, the base it started from, and a replica that shows what is asked of it: the
old policy, the evaluation average, or, where the trained one is sharded, the policy that samples. The averages are
float32, in the pieces that the training engine holds the masters in; to show one is to put its pieces together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Protocol, get_args

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from dgpo_fast.config import ModelConfig
from dgpo_fast.models.block_ranges import announce_blocks
from dgpo_fast.models.engines import ReplicaEngine, View, compile_blocks
from dgpo_fast.models.policy import Average, Policy, ReadPieces
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.ops.ema_lerp import ema_lerp_
from dgpo_fast.parallel.assembly import Assembly
from dgpo_fast.parallel.engine import TrainingEngine
from dgpo_fast.parallel.weights import Held, Piece
from dgpo_fast.parallel.world import World
from dgpo_fast.profiling import stage


class Sharded(Protocol):
    """What an engine makes of a module whose weights it shards."""

    module: nn.Module
    """To be called as the module is."""

    def write(self, pieces: Sequence[Piece]) -> None:
        """Takes weights from the pieces of every rank."""


class Replica:
    """A transformer that shows the weights of one view at a time.

    Args:
        shard: has them lie in shards, which pieces are written to without any exchange.
    """

    def __init__(self, transformer: SD3Transformer2DModel, shard: Callable[[nn.Module], Sharded] | None = None) -> None:
        self.shown: View | None = None
        self._parameters = dict(transformer.named_parameters())
        self._sharded = None if shard is None else shard(transformer)
        self.transformer: nn.Module = transformer if self._sharded is None else self._sharded.module

    def show(self, view: View, pieces: Sequence[Piece], assembly: Assembly) -> None:
        """Becomes `view`, from its pieces."""
        with stage("replica"):
            if self._sharded is not None:
                self._sharded.write(pieces)
            else:
                assembly.write(pieces, self._parameters)
        self.shown = view

    def take(self, view: View, read: ReadPieces) -> None:
        """Becomes `view` as it was saved, a parameter at a time."""
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            values = torch.empty(parameter.numel())
            read([Piece(name, 0, values)], shapes)
            parameter.data.copy_(values.view(parameter.shape))
        self.shown = view

    def forget(self, *views: View) -> None:
        """To be called where the weights of `views` have changed."""
        if self.shown in views:
            self.shown = None


class FullPolicy(Policy):
    """A `StableDiffusion3` whose whole transformer is trained; to be used once `train_with` was called.

    Args:
        is_trained: False for one that only evaluates: it has the policy and the base in one.
        shard: shards the base and the replica. Each is copied and cut up before the next: the device may have no room
            for three whole transformers.
    """

    ema_file = "transformer/diffusion_pytorch_model.safetensors"

    def __init__(
        self,
        model: StableDiffusion3,
        *,
        is_trained: bool = True,
        shard: Callable[[nn.Module], Sharded] | None = None,
    ) -> None:
        assert model.config.engine != "fused"  # it computes no gradients of the weights
        self.trained = model.transformer
        self._reference: nn.Module = self.trained
        if is_trained:
            reference = _prepared(deepcopy(self.trained), model.config)
            self._reference = reference if shard is None else shard(reference).module
        self._replica = Replica(_prepared(deepcopy(self.trained), model.config), shard)
        _prepared(self.trained, model.config)
        # A released table of positions need not be the one that diffusers would compute.
        persistent = self.trained.state_dict().keys()
        self.ema_constants = {
            name: buffer.float() for name, buffer in self.trained.named_buffers() if name in persistent
        }
        self._module: nn.Module = self.trained
        self._samples_from_replica = False
        super().__init__(model, ReplicaEngine(model, self._errors_module), ReplicaEngine(model, self._sampling_module))

    def train_with(
        self,
        engine: TrainingEngine,
        world: World,
        *,
        module: nn.Module,
        samples_from_replica: bool,
    ) -> None:
        """Begins averages of the masters that `engine` holds.

        Args:
            module: what computes the policy: the trained transformer, or what the engine put around it.
            samples_from_replica: draw the policy's samples with the replica, not with `module`.
        """
        self._engine, self._module, self._samples_from_replica = engine, module, samples_from_replica
        masters = engine.masters()
        self._averages: dict[Average, Held] = {view: _copy(masters) for view in get_args(Average)}
        self._assembly = Assembly(masters, world)
        self._replica.forget("policy", "old", "ema")

    @torch.no_grad()
    def average_into(self, view: Average, *, decay: float) -> None:
        averages, masters = self._averages[view].pieces, self._engine.masters().pieces
        ema_lerp_([piece.values for piece in averages], [piece.values for piece in masters], decay=decay)
        self._replica.forget(view)

    def refresh(self, *views: View) -> None:
        """To be called once masters, or pieces of averages, have changed."""
        self._replica.forget(*views)

    def make_ready(self, view: View) -> None:
        self._sampling_module(view)

    def averages(self) -> dict[Average, Held]:
        return self._averages

    def take_ema(self, read: ReadPieces) -> None:
        self._replica.take("ema", read)

    @torch.no_grad()
    def change_norm(self) -> Tensor | None:
        """Of the masters' differences from the base; None where ZeRO shards them."""
        masters = self._engine.masters()
        if masters.is_sharded:
            return None
        base = {name: parameter.flatten() for name, parameter in self._reference.named_parameters()}
        squares = [
            (values - base[name][start : start + len(values)]).square().sum() for name, start, values in masters.pieces
        ]
        return torch.stack(squares).sum().sqrt()

    def save(self, directory: Path) -> None:
        self.trained.save_config(directory / "transformer")

    @contextmanager
    def equal_weights(self, *views: View) -> Iterator[None]:
        """Within, `old` is seen with the policy's weights."""
        assert set(views) <= {"policy", "old"}
        self._replica.show("old", self._engine.masters().pieces, self._assembly)
        try:
            yield
        finally:
            self._replica.forget("old")

    def check_trained(self) -> None:
        """Nothing: the weights are the output's own."""

    def _errors_module(self, view: View) -> nn.Module:
        if view in ("old", "ema"):
            return self._shown(view)
        module: nn.Module = self._module if view == "policy" else self._reference
        return module

    def _sampling_module(self, view: View) -> nn.Module:
        is_policy = view == "policy" and self._samples_from_replica
        return self._shown(view) if is_policy else self._errors_module(view)

    def _shown(self, view: View) -> nn.Module:
        if self._replica.shown != view:
            held = self._engine.masters() if view == "policy" else self._averages[view]  # type: ignore[index]
            self._replica.show(view, held.pieces, self._assembly)
        transformer: nn.Module = self._replica.transformer
        return transformer


def _prepared(transformer: SD3Transformer2DModel, config: ModelConfig) -> SD3Transformer2DModel:
    """The transformer as the engine runs it."""
    if config.checkpointing == "full":
        transformer.enable_gradient_checkpointing()
    if config.engine == "compile":
        compile_blocks(transformer)
    else:
        announce_blocks(transformer)
    # Of all views: torch chooses a product's kernel by whether its weight requires gradients, and does so where none
    # are recorded, too (`should_fold` in ATen's LinearAlgebra.cpp). Equal weights are to give equal bits.
    return transformer.requires_grad_(True)


def _copy(held: Held) -> Held:
    """The same pieces with values of their own, in one allocation."""
    if not held.pieces:
        return held
    flat = torch.cat([piece.values for piece in held.pieces])
    parts = flat.split([len(piece.values) for piece in held.pieces])
    return held._replace(pieces=[piece._replace(values=part) for piece, part in zip(held.pieces, parts, strict=True)])
