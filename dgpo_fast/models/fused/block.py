"""One block of Stable Diffusion 3's transformer (arXiv 2403.03206, fig. 2), forward and backward.

All is frozen but the adapters. A block begins and ends between a residual and the norm behind it, so that these two are
one operator: it takes and returns a stream as (hidden, normed), where `normed` is the modulated norm the next block
reads. Each part returns its output and its pullback, the function from the output's gradient to the input's. A pullback
keeps products and attention; norms and GELU are cheaper to compute again, unless `Checkpointing` says otherwise.

Shape letters: B samples, N tokens of a stream, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgpo_fast.models.fused.attention import Attention
from dgpo_fast.models.fused.projection import Adapters, Projection
from dgpo_fast.ops.bias_gelu import bias_gelu, bias_gelu_backward
from dgpo_fast.ops.gate_residual import gate_residual, gate_residual_backward
from dgpo_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate, gate_residual_norm_modulate_backward
from dgpo_fast.ops.joint_qk_norm import QKV, QKWeights, joint_qk_norm, joint_qk_norm_backward
from dgpo_fast.ops.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_backward
from dgpo_fast.profiling import span

Checkpointing = Literal["none", "selective", "full"]
"""What a block keeps for its backward pass: all that this reads; products and attention; or its input alone."""

EPS = 1e-6
"""Of every norm in SD3.5, as diffusers has it."""


class Stream(NamedTuple):
    """A stream between two blocks, [B, N, D] each."""

    hidden: Tensor
    normed: Tensor


class Gradient(NamedTuple):
    """That of a `Stream`."""

    hidden: Tensor | None  # None where only the norm goes on: before the last block's text, behind its image
    normed: Tensor


class Norm(NamedTuple):
    """Modulation of a norm, [B, D] each."""

    shift: Tensor
    scale: Tensor

    def of(self, hidden: Tensor) -> Tensor:
        return layer_norm_modulate(hidden, self.shift, scale_BD=self.scale, eps=EPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What timestep and pooled text do to one stream in one block, [B, D] each; None where it has no such part."""

    norm: Norm  # of the block's input, computed by the block before
    gate: Tensor | None = None
    second_norm: Norm | None = None  # of the image, before its second attention
    second_gate: Tensor | None = None
    mlp_norm: Norm | None = None
    mlp_gate: Tensor | None = None


class BlockConditions(NamedTuple):
    image: Conditions
    text: Conditions
    next_image: Norm
    next_text: Norm | None  # None behind the last block


T = TypeVar("T")


def for_backward(value: T, again: Callable[[], T], checkpointing: Checkpointing) -> Callable[[], T]:
    """`value` for a pullback: kept until then, or computed again."""
    return (lambda: value) if checkpointing == "none" else again


class Input(NamedTuple):
    """What an attention reads of a stream, [B, N, D], and how its pullback comes by it."""

    normed: Tensor
    kept: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """Attention of image tokens, and of text tokens where there are any, to each other."""

    kernel: Attention
    num_heads: int
    image_qkv: Projection
    image_out: Projection
    image_weights: QKWeights
    text_qkv: Projection | None = None
    text_out: Projection | None = None  # None in the last block, although there is text
    text_weights: QKWeights | None = None

    @property
    def projections(self) -> list[Projection]:
        own = (self.image_qkv, self.image_out, self.text_qkv, self.text_out)
        return [projection for projection in own if projection is not None]

    def changed(self, change: Callable[[Projection], Projection]) -> AttentionLayer:
        return replace(
            self,
            image_qkv=change(self.image_qkv),
            image_out=change(self.image_out),
            text_qkv=None if self.text_qkv is None else change(self.text_qkv),
            text_out=None if self.text_out is None else change(self.text_out),
        )

    def to(self, dtype: torch.dtype) -> AttentionLayer:
        return replace(
            self.changed(lambda projection: projection.to(dtype)),
            image_weights=QKWeights(*(weight.to(dtype) for weight in self.image_weights)),
            text_weights=self.text_weights and QKWeights(*(weight.to(dtype) for weight in self.text_weights)),
        )

    def learns(self, grad_adapters: Adapters) -> bool:
        """Whether gradients of its own adapters are asked for."""
        return any(projection.name in grad_adapters for projection in self.projections)

    def forward(
        self, image: Input, text: Input | None, adapters: Adapters, checkpointing: Checkpointing
    ) -> tuple[Tensor, Tensor | None, AttentionPullback]:
        """What the attention adds to image and text, [B, N, D] each."""
        image_qkv, image_inner = self.image_qkv.forward(image.normed, adapters)
        text_qkv = text_inner = None
        if text is not None and self.text_qkv is not None:
            text_qkv, text_inner = self.text_qkv.forward(text.normed, adapters)
        qkv = self._normalised(image_qkv, text_qkv)
        out, left = self.kernel.forward(*qkv)
        out = out.flatten(2)
        num_image = image.normed.shape[1]
        image_sum, image_out_inner = self.image_out.forward(out[:, :num_image], adapters)
        text_sum = text_out_inner = None
        if self.text_out is not None:
            text_sum, text_out_inner = self.text_out.forward(out[:, num_image:], adapters)

        image_kept, text_kept = image.kept, None if text is None else text.kept
        qkv_kept = for_backward(qkv, lambda: self._normalised(image_qkv, text_qkv), checkpointing)

        def pull(
            grad_image: Tensor, grad_text: Tensor | None, grad_adapters: Adapters, with_input: bool
        ) -> tuple[Tensor | None, Tensor | None]:
            into_image = self.image_out.backward(
                grad_image, lambda: out[:, :num_image], image_out_inner, adapters, grad_adapters
            )
            into_text: Tensor | None = torch.zeros_like(out[:, num_image:])
            if self.text_out is not None and grad_text is not None:
                into_text = self.text_out.backward(
                    grad_text, lambda: out[:, num_image:], text_out_inner, adapters, grad_adapters
                )
            assert into_image is not None and into_text is not None
            grad_out = torch.cat([into_image, into_text], dim=1)
            grad_image_qkv, grad_text_qkv = self._backward_to_qkv(grad_out, image_qkv, text_qkv, qkv_kept(), out, left)
            grad_image_normed = self.image_qkv.backward(
                grad_image_qkv, image_kept, image_inner, adapters, grad_adapters, with_input=with_input
            )
            if self.text_qkv is None or text_kept is None:
                return grad_image_normed, None
            return grad_image_normed, self.text_qkv.backward(
                grad_text_qkv, text_kept, text_inner, adapters, grad_adapters, with_input=with_input
            )

        return image_sum, text_sum, pull

    def _normalised(self, image_qkv: Tensor, text_qkv: Tensor | None) -> QKV:
        return joint_qk_norm(
            QKV(*image_qkv.chunk(3, -1)), None if text_qkv is None else QKV(*text_qkv.chunk(3, -1)),
            image_weights=self.image_weights, text_weights=self.text_weights, num_heads=self.num_heads, eps=EPS,
        )  # fmt: skip

    def _backward_to_qkv(
        self, grad: Tensor, image_qkv: Tensor, text_qkv: Tensor | None, qkv: QKV, out: Tensor, left: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the projections [B, N, 3 D]; that of an absent text has no element."""
        gradients = self.kernel.backward(grad.view_as(qkv.q), *qkv, out.view_as(qkv.q), left)
        q_image, k_image, _ = image_qkv.chunk(3, -1)
        q_text, k_text, _ = (None, None, None) if text_qkv is None else text_qkv.chunk(3, -1)
        of_image, of_text, *_ = joint_qk_norm_backward(
            *gradients, q_image, k_image, q_text, k_text, *self.image_weights, *(self.text_weights or (None, None)),
            self.num_heads, EPS, False,
        )  # fmt: skip
        return of_image, of_text


AttentionPullback = Callable[[Tensor, Tensor | None, Adapters, bool], tuple[Tensor | None, Tensor | None]]
"""(gradients of what is added to image and text, where those of adapters go, whether the norms' are asked for)
-> gradients of the norms."""


class Branch(NamedTuple):
    """What an attention or a feed-forward adds to a stream, [B, N, D], and its gate, [B, D]."""

    output: Tensor
    gate: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardLayer:
    """What follows the attention in one stream: its residual, the feed-forward, and the residual of that."""

    up: Projection  # without its bias, which GELU adds
    up_bias: Tensor
    down: Projection

    @property
    def projections(self) -> list[Projection]:
        return [self.up, self.down]

    def changed(self, change: Callable[[Projection], Projection]) -> FeedForwardLayer:
        return replace(self, up=change(self.up), down=change(self.down))

    def to(self, dtype: torch.dtype) -> FeedForwardLayer:
        return replace(self, up=self.up.to(dtype), up_bias=self.up_bias.to(dtype), down=self.down.to(dtype))

    def forward(
        self,
        hidden: Tensor,
        branches: Sequence[Branch],
        conditions: Conditions,
        next_norm: Norm,
        adapters: Adapters,
        checkpointing: Checkpointing,
    ) -> tuple[Stream, FeedForwardPullback]:
        """The stream behind the block, given what it was before the attention and what that adds."""
        norm, mlp_gate = conditions.mlp_norm, conditions.mlp_gate
        assert norm is not None and mlp_gate is not None
        *before, last = branches
        for branch in before:
            hidden = gate_residual(hidden, branch.output, gate_BD=branch.gate)
        middle, normed = _residual_and_norm(hidden, last, norm)
        up, up_inner = self.up.forward(normed, adapters)
        active = bias_gelu(up, self.up_bias)
        down, down_inner = self.down.forward(active, adapters)
        end = _residual_and_norm(middle, Branch(down, mlp_gate), next_norm)

        end_hidden = end.hidden.detach()  # autograd ties `end` to this pullback: neither would ever be freed
        gates = [branch.gate for branch in branches]
        normed_kept = for_backward(normed, lambda: norm.of(middle), checkpointing)
        active_kept = for_backward(active, lambda: bias_gelu(up, self.up_bias), checkpointing)

        def pull(grad: Gradient, grad_adapters: Adapters) -> tuple[Tensor, list[Tensor]]:
            grad_middle, grad_down = _residual_and_norm_backward(grad, end_hidden, mlp_gate, next_norm)
            grad_active = self.down.backward(grad_down, active_kept, down_inner, adapters, grad_adapters)
            grad_up, _ = bias_gelu_backward(grad_active, up, self.up_bias, False)
            grad_normed = self.up.backward(grad_up, normed_kept, up_inner, adapters, grad_adapters)
            assert grad_normed is not None
            grad_hidden, grad_last = _residual_and_norm_backward(
                Gradient(grad_middle, grad_normed), middle, gates[-1], norm
            )
            return grad_hidden, [*(gate_residual_backward(grad_hidden, None, g)[0] for g in gates[:-1]), grad_last]

        return end, pull


FeedForwardPullback = Callable[[Gradient, Adapters], tuple[Tensor, list[Tensor]]]
"""(gradient of the stream, where those of adapters go) -> gradients of the stream before, and of each branch."""


def _residual_and_norm(hidden: Tensor, branch: Branch, norm: Norm) -> Stream:
    return Stream(
        *gate_residual_norm_modulate(
            hidden, branch.output, gate_BD=branch.gate, shift_BD=norm.shift, scale_BD=norm.scale, eps=EPS
        )
    )


def _residual_and_norm_backward(grad: Gradient, hidden: Tensor, gate: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Gradients of the stream before the residual, and of the branch; `hidden` is the stream behind it."""
    grad_before, grad_branch, *_ = gate_residual_norm_modulate_backward(*grad, hidden, None, gate, norm.scale, EPS)
    return grad_before, grad_branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The frozen weights of a block, and what it computes with them."""

    joint: AttentionLayer
    second: AttentionLayer | None  # of the image alone
    image: FeedForwardLayer
    text: FeedForwardLayer | None  # None in the last block, whose text ends with the attention

    @property
    def name(self) -> str:
        """Its kind, as a profiler shows it."""
        if self.text is None:
            return "block last"
        return "block joint" if self.second is None else "block dual"

    @property
    def projections(self) -> list[Projection]:
        """In the order of their adapters in a flat tensor."""
        parts = (self.joint, self.second, self.image, self.text)
        return [projection for part in parts if part is not None for projection in part.projections]

    @property
    def num_adapter_values(self) -> int:
        return sum(sum(projection.adapter_sizes) for projection in self.projections)

    def changed(self, change: Callable[[Projection], Projection]) -> Block:
        """The block with each of its projections as `change` makes it."""
        return Block(
            joint=self.joint.changed(change),
            second=None if self.second is None else self.second.changed(change),
            image=self.image.changed(change),
            text=None if self.text is None else self.text.changed(change),
        )

    def to(self, dtype: torch.dtype) -> Block:
        """The block with its weights in `dtype`."""
        return Block(
            joint=self.joint.to(dtype),
            second=self.second and self.second.to(dtype),
            image=self.image.to(dtype),
            text=self.text and self.text.to(dtype),
        )

    def cut(self, flat: Tensor) -> Adapters:
        """The block's adapters in `flat`, their numbers end to end."""
        adapted = [projection for projection in self.projections if projection.adapted]
        pieces = flat.split([sum(projection.adapter_sizes) for projection in adapted])
        return {projection.name: projection.cut(piece) for projection, piece in zip(adapted, pieces, strict=True)}

    def forward(
        self,
        image: Stream,
        text: Stream,
        conditions: BlockConditions,
        adapters: Adapters,
        checkpointing: Checkpointing,
    ) -> tuple[Stream, Stream | None, BlockPullback]:
        """The streams behind the block; there is no text behind the last."""
        of_image, of_text, next_image, next_text = conditions
        image_hidden, text_hidden = image.hidden, text.hidden
        assert of_image.gate is not None
        image_sum, text_sum, pull_joint = self.joint.forward(
            Input(image.normed, for_backward(image.normed, lambda: of_image.norm.of(image_hidden), checkpointing)),
            Input(text.normed, for_backward(text.normed, lambda: of_text.norm.of(text_hidden), checkpointing)),
            adapters, checkpointing,
        )  # fmt: skip
        branches = [Branch(image_sum, of_image.gate)]
        second_norm, pull_second = of_image.second_norm, None
        if self.second is not None:
            assert second_norm is not None and of_image.second_gate is not None
            normed = second_norm.of(image_hidden)
            kept = for_backward(normed, lambda: second_norm.of(image_hidden), checkpointing)
            second_sum, _, pull_second = self.second.forward(Input(normed, kept), None, adapters, checkpointing)
            branches.append(Branch(second_sum, of_image.second_gate))
        image, pull_image = self.image.forward(image_hidden, branches, of_image, next_image, adapters, checkpointing)
        text_behind = pull_text = None
        if self.text is not None:
            assert text_sum is not None and of_text.gate is not None and next_text is not None
            text_behind, pull_text = self.text.forward(
                text_hidden, [Branch(text_sum, of_text.gate)], of_text, next_text, adapters, checkpointing
            )

        def pull(
            grad_image: Gradient, grad_text: Gradient | None, grad_adapters: Adapters, with_input: bool
        ) -> tuple[Gradient, Gradient] | None:
            grad_text_hidden = grad_text_sum = None
            if pull_text is not None and grad_text is not None:
                grad_text_hidden, (grad_text_sum,) = pull_text(grad_text, grad_adapters)
            grad_hidden, (grad_image_sum, *grad_second) = pull_image(grad_image, grad_adapters)
            image_normed = text_normed = second_normed = None
            if with_input or self.joint.learns(grad_adapters):
                image_normed, text_normed = pull_joint(grad_image_sum, grad_text_sum, grad_adapters, with_input)
            if (
                self.second is not None
                and pull_second is not None
                and (with_input or self.second.learns(grad_adapters))
            ):
                second_normed, _ = pull_second(grad_second[0], None, grad_adapters, with_input)
            if image_normed is None or text_normed is None:
                return None
            if second_normed is not None and second_norm is not None:
                grad_hidden += layer_norm_modulate_backward(second_normed, image_hidden, second_norm.scale, EPS, False)[
                    0
                ]
            return Gradient(grad_hidden, image_normed), Gradient(grad_text_hidden, text_normed)

        return image, text_behind, pull


BlockPullback = Callable[[Gradient, Gradient | None, Adapters, bool], tuple[Gradient, Gradient] | None]
"""(gradients of image and text, where those of adapters go, whether the input's are asked for) -> the input's."""


class BlockFunction(torch.autograd.Function):
    """A block as autograd sees it, with gradients of both streams and of the block's adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        block: Block,
        conditions: BlockConditions,
        adapters: Adapters,
        checkpointing: Checkpointing,
        flat: Tensor,
        *streams: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Hidden and normed of image and text behind the block, given those before it; `flat` holds the adapters."""
        inputs = Stream(*streams[:2]), Stream(*streams[2:])
        image, text, pull = block.forward(*inputs, conditions, adapters, checkpointing)

        def again() -> BlockPullback:
            with span(block.name, "block"):
                return block.forward(*inputs, conditions, adapters, "selective")[2]

        ctx.pull = again if checkpointing == "full" else (lambda: pull)
        ctx.block, ctx.num_values = block, len(flat)
        ctx.set_materialize_grads(False)
        return *image, *(text or (None, None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with span(f"{ctx.block.name} backward", "block"):
            pull, ctx.pull = ctx.pull(), None  # what it kept is freed when this returns
            with_flat, *with_streams = ctx.needs_input_grad[4:]
            image_hidden, image_normed, text_hidden, text_normed = grads
            assert image_normed is not None
            image = Gradient(image_hidden, image_normed)
            text = None if text_normed is None else Gradient(text_hidden, text_normed)
            grad_flat = image_normed.new_empty(ctx.num_values) if with_flat else None
            grad_adapters = {} if grad_flat is None else ctx.block.cut(grad_flat)
            before = pull(image, text, grad_adapters, any(with_streams))
            return None, None, None, None, grad_flat, *((None,) * 4 if before is None else (*before[0], *before[1]))
