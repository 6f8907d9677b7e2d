"""The whole transformer, by hand, on the weights of diffusers' SD3Transformer2DModel.

Shape letters: B samples, C H W latents, N text tokens, D width, E evaluations of the model along a trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional

from dgpo_fast.models.fused.attention import Attention
from dgpo_fast.models.fused.block import (
    AttentionLayer,
    Block,
    BlockConditions,
    BlockFunction,
    Checkpointing,
    Conditions,
    FeedForwardLayer,
    Norm,
    Stream,
)
from dgpo_fast.models.fused.projection import Adapters, Projection
from dgpo_fast.models.projections import PROJECTIONS, check_fusible
from dgpo_fast.ops.joint_qk_norm import QKWeights
from dgpo_fast.profiling import span
from dgpo_fast.records import Conditioning


class Conditioned(NamedTuple):
    """All that text and timestep do to one evaluation of the transformer, whatever the latents and the adapters."""

    text_BND: Tensor
    of_image: tuple[Tensor, ...]  # [B, 6 D or 9 D] for each block
    of_text: tuple[Tensor, ...]  # [B, 6 D] for each block, [B, 2 D] for the last
    of_output: Tensor  # [B, 2 D]

    def to(self, dtype: torch.dtype) -> Conditioned:
        """The same for blocks in `dtype`."""
        of_image, of_text = (tuple(m.to(dtype) for m in modulations) for modulations in (self.of_image, self.of_text))
        return Conditioned(self.text_BND.to(dtype), of_image, of_text, self.of_output.to(dtype))


class Adapted:
    """The adapters of all blocks in one flat tensor, cut for each product."""

    def __init__(self, blocks: Sequence[Block], flat: Tensor) -> None:
        self._flat, self._sizes = flat, [block.num_adapter_values for block in blocks]
        pieces = flat.detach().split(self._sizes)
        self.adapters = tuple(block.cut(piece) for block, piece in zip(blocks, pieces, strict=True))

    @property
    def flats(self) -> Sequence[Tensor]:
        """The numbers of each block's adapters, as autograd knows them."""
        return self._flat.split(self._sizes)  # type: ignore[no-any-return]


class FusedTransformer:
    """SD3's transformer with frozen weights, those of `module`, and adapters that each call chooses."""

    def __init__(
        self,
        module: SD3Transformer2DModel,
        *,
        attention: Attention,
        checkpointing: Checkpointing,
        rank: int,
        scaling: float,
    ) -> None:
        adapted = (name for name, layer in module.named_modules() if isinstance(layer, LoraLayer))
        check_fusible(module.config.qk_norm, adapted)
        self.module = module
        self.checkpointing = checkpointing
        self.blocks = tuple(
            _block(f"transformer_blocks.{index}", block, attention=attention, rank=rank, scaling=scaling)
            for index, block in enumerate(module.transformer_blocks)
        )

    def quantised(self) -> FusedTransformer:
        """The same with the blocks' weights copied in fp8, for sampling: it has no gradients."""
        return self._with(block.changed(Projection.quantised) for block in self.blocks)

    @torch.no_grad()
    def merged(self, view: Adapted | None, dtype: torch.dtype) -> FusedTransformer:
        """The same with copies of the adapted weights into which the adapters of `view` are added, blocks in `dtype`.

        What stands before and behind the blocks stays as it is.
        """
        return self._with(
            block.changed(partial(Projection.merged, adapters=adapters)).to(dtype)
            for block, adapters in zip(self.blocks, self._adapters(view), strict=True)
        )

    def _with(self, blocks: Iterable[Block]) -> FusedTransformer:
        other = copy(self)
        other.blocks = tuple(blocks)
        return other

    def adapted(self, flat: Tensor) -> Adapted:
        """A view through the adapters in `flat`, end to end in the order of `projections.adapter_order`."""
        return Adapted(self.blocks, flat)

    @torch.no_grad()
    def condition(self, timestep_EB: Tensor, conditioning: Conditioning) -> list[Conditioned]:
        """What text and timesteps do to each of E evaluations, computed at once.

        Args:
            timestep_EB: 1000 sigma, float32.
            conditioning: a row per sample.
        """
        num_evaluations = len(timestep_EB)
        pooled = conditioning.pooled_BD.expand(num_evaluations, -1, -1).flatten(0, 1)
        embedded = functional.silu(self.module.time_text_embed(timestep_EB.flatten(), pooled))
        text_BND = self.module.context_embedder(conditioning.text_BND)

        def modulation(norm: Any) -> tuple[Tensor, ...]:
            return norm.linear(embedded).unflatten(0, timestep_EB.shape).unbind()  # type: ignore[no-any-return]

        of_image = [modulation(block.norm1) for block in self.module.transformer_blocks]
        of_text = [modulation(block.norm1_context) for block in self.module.transformer_blocks]
        of_output = modulation(self.module.norm_out)
        return [
            Conditioned(text_BND, tuple(m[e] for m in of_image), tuple(m[e] for m in of_text), of_output[e])
            for e in range(num_evaluations)
        ]

    def velocity(self, x_BCHW: Tensor, conditioned: Conditioned, view: Adapted | None) -> Tensor:
        """The velocity [B, C, H, W] at latents in the model's dtype, through `view`, or of the frozen weights alone.

        `conditioned` is in the dtype of the blocks.
        """
        conditions = _conditions(conditioned, self.module.inner_dim)
        with torch.no_grad():
            patches = self.module.pos_embed(x_BCHW).to(conditioned.text_BND.dtype)
            image = _entering(patches.contiguous(), conditions[0].image.norm)
            text: Stream | None = _entering(conditioned.text_BND, conditions[0].text.norm)
        flats = (None,) * len(self.blocks) if view is None else view.flats
        for block, of_block, adapters, flat in zip(self.blocks, conditions, self._adapters(view), flats, strict=True):
            assert text is not None
            with span(block.name, "block"):
                if image.normed.requires_grad or (torch.is_grad_enabled() and _learns(flat)):
                    *of_image, text_hidden, text_normed = BlockFunction.apply(  # type: ignore[no-untyped-call]
                        block, of_block, adapters, self.checkpointing, flat, *image, *text
                    )
                    image = Stream(*of_image)
                    text = None if text_hidden is None else Stream(text_hidden, text_normed)
                else:
                    image, text = block.forward(image, text, of_block, adapters, "selective")[:2]
        return self._unpatched(self.module.proj_out(image.normed.to(x_BCHW.dtype)), x_BCHW)

    def _adapters(self, view: Adapted | None) -> Sequence[Adapters]:
        return ({},) * len(self.blocks) if view is None else view.adapters

    def _unpatched(self, y: Tensor, like: Tensor) -> Tensor:
        """Patches [B, N, P P C] as latents."""
        patch, (height, width) = self.module.config.patch_size, like.shape[2:]
        y = y.view(len(y), height // patch, width // patch, patch, patch, self.module.out_channels)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(len(y), self.module.out_channels, height, width)


def _entering(hidden: Tensor, norm: Norm) -> Stream:
    return Stream(hidden, norm.of(hidden))


def _learns(flat: Tensor | None) -> bool:
    """Whether a block has adapters that a gradient is asked for."""
    return flat is not None and flat.requires_grad and len(flat) > 0


def _conditions(conditioned: Conditioned, width: int) -> list[BlockConditions]:
    """The vectors of each block, cut as diffusers cuts them; the norm behind a block is that before the next."""
    of_image = [_of_stream(*modulation.split(width, dim=1)) for modulation in conditioned.of_image]
    of_text = [_of_stream(*modulation.split(width, dim=1)) for modulation in conditioned.of_text[:-1]]
    of_text.append(Conditions(norm=_last_norm(conditioned.of_text[-1])))  # the text ends with the last attention
    image_norms = [*(conditions.norm for conditions in of_image[1:]), _last_norm(conditioned.of_output)]
    text_norms = [*(conditions.norm for conditions in of_text[1:]), None]
    return [BlockConditions(*each) for each in zip(of_image, of_text, image_norms, text_norms, strict=True)]


def _of_stream(
    shift: Tensor, scale: Tensor, gate: Tensor, mlp_shift: Tensor, mlp_scale: Tensor, mlp_gate: Tensor, *second: Tensor
) -> Conditions:
    second_norm = second_gate = None
    if second:
        second_shift, second_scale, second_gate = second
        second_norm = Norm(second_shift, second_scale)
    return Conditions(
        norm=Norm(shift, scale), gate=gate, second_norm=second_norm, second_gate=second_gate,
        mlp_norm=Norm(mlp_shift, mlp_scale), mlp_gate=mlp_gate,
    )  # fmt: skip


def _last_norm(modulation_B: Tensor) -> Norm:
    """Of diffusers' AdaLayerNormContinuous, which has the scale first."""
    scale, shift = modulation_B.chunk(2, dim=1)
    return Norm(shift, scale)


def _block(prefix: str, module: Any, *, attention: Attention, rank: int, scaling: float) -> Block:
    """The block whose weights are those of diffusers' JointTransformerBlock `module`."""

    def projection(name: str, *, with_bias: bool = True) -> Projection:
        layers = [module.get_submodule(layer) for layer in PROJECTIONS[name]]
        return Projection.over(f"{prefix}.{name}", layers, rank=rank, scaling=scaling, with_bias=with_bias)

    def weights(q: Any, k: Any) -> QKWeights:
        return QKWeights(q.weight.detach(), k.weight.detach())

    def feed_forward(stream: str, layers: Any) -> FeedForwardLayer:
        first = layers.net[0].proj
        return FeedForwardLayer(
            up=projection(f"{stream}_up", with_bias=False),
            up_bias=getattr(first, "base_layer", first).bias.detach(),
            down=projection(f"{stream}_down"),
        )

    joint, second, last = module.attn, module.attn2, module.context_pre_only
    return Block(
        joint=AttentionLayer(
            kernel=attention,
            num_heads=joint.heads,
            image_qkv=projection("image_qkv"),
            image_out=projection("image_out"),
            image_weights=weights(joint.norm_q, joint.norm_k),
            text_qkv=projection("text_qkv"),
            text_out=None if last else projection("text_out"),
            text_weights=weights(joint.norm_added_q, joint.norm_added_k),
        ),
        second=None
        if second is None
        else AttentionLayer(
            kernel=attention,
            num_heads=second.heads,
            image_qkv=projection("second_qkv"),
            image_out=projection("second_out"),
            image_weights=weights(second.norm_q, second.norm_k),
        ),
        image=feed_forward("image", module.ff),
        text=None if last else feed_forward("text", module.ff_context),
    )
