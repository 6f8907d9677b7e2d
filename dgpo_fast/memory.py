"""How much of a device's memory a run needs, counted from what each engine keeps and for how long. No torch.

What is there all the time, and phases that come one at a time: the peak is that of the largest phase. Not in it: what
CUDA itself and the allocator take, workspaces of kernels, and the models of rewards; `MARGIN` is left for these.

Every count of this file is compared with the live bytes of the computation itself in tests/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dgpo_fast.config import AdapterConfig, Config, ModelConfig
from dgpo_fast.flow.trajectory import trajectory_of
from dgpo_fast.models.architectures import SD3_TEXT_ENCODERS, Tokens, TransformerShape, VAEShape
from dgpo_fast.parallel.state_bytes import ranks_of_frozen, state_bytes

MARGIN = 0.1
"""Share of a card's memory that a run should leave alone."""

Phase = Literal["training", "optimizer step", "rollout", "VAE decoding", "text encoders"]

REMEDIES: dict[Phase, str] = {
    "training": "model.checkpointing full, or a smaller optimizer.images_per_micro_batch, needs less",
    "optimizer step": "a higher parallel.zero_stage, or parallel.offload_optimizer cpu, needs less",
    "rollout": "a smaller rollout.images_per_forward needs less",
    "VAE decoding": "a smaller rollout.images_per_decode needs less",
    "text encoders": "prompts encoded before, on a larger card, are read from model.prompt_cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device, by purpose."""

    resident: dict[str, float]
    """What is there all the time."""
    phases: dict[Phase, float]
    """What comes and goes, one after the other."""
    host: dict[str, float]
    """What is offloaded to the host's memory."""

    @property
    def largest_phase(self) -> Phase:
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak_bytes(self) -> float:
        return sum(self.resident.values()) + self.phases[self.largest_phase]


class Widths(NamedTuple):
    """Values in widths of the model: per token of the image and of the text, and what a second attention adds."""

    image: float
    text: float
    second: float = 0.0
    """Per token of the image."""

    def values(self, shape: TransformerShape, tokens: Tokens, *, is_dual: bool) -> float:
        """Values of a sample, in a block with or without a second attention."""
        image = self.image + (self.second if is_dual else 0.0)
        return shape.width * (image * tokens.image + self.text * tokens.text)


class BlockWidths(NamedTuple):
    """What the blocks of a transformer hold at a moment."""

    usual: Widths
    last: Widths
    """The last block drops its text behind the attention."""

    def values(self, block: int, shape: TransformerShape, tokens: Tokens) -> float:
        """Values of a sample in this block."""
        widths = self.last if block == shape.layers - 1 else self.usual
        return widths.values(shape, tokens, is_dual=block in shape.dual_attention_layers)


def _largest(moments: Sequence[BlockWidths], block: int, shape: TransformerShape, tokens: Tokens) -> float:
    return max(moment.values(block, shape, tokens) for moment in moments)


FUSED_KEPT = {
    # The block's input: its hidden stream, and the norm of it.
    "full": BlockWidths(usual=Widths(2, 2), last=Widths(2, 2)),
    # Hidden stream 1, queries, keys and values 3, attention 1, hidden stream behind it 1, product before GELU 4; in the
    # last also the hidden stream that it ends with, elsewhere the next block's.
    "selective": BlockWidths(usual=Widths(10, 10, 4), last=Widths(11, 5, 4)),
    # And norm 1, normalised queries, keys and values 3, norm 1, GELU 4.
    "none": BlockWidths(usual=Widths(19, 19, 8), last=Widths(20, 9, 8)),
}
"""What the fused engine keeps of a block for its backward pass: what the pullbacks of models/fused/block.py hold."""

FUSED_AGAIN = BlockWidths(usual=Widths(9, 9, 4), last=Widths(9, 3, 4))
"""What "full" makes again of a block: what "selective" keeps, save the hidden stream; the norm before it has gone."""

FUSED_BACKWARD = {
    # Where queries, keys and values get their gradients: those of the block's output 2, of the residual 2, of the
    # attention in parts and as one 2, q, k and v normalised again 3, their gradients 3, those of the products 3.
    "selective": (BlockWidths(usual=Widths(15, 15, 1), last=Widths(14, 11, 1)),),
    # The same with nothing normalised again; and the image's feed-forward: gradients of the output 2, of the two
    # residuals 4, of GELU and of its product 8, of the norm 1.
    "none": (
        BlockWidths(usual=Widths(12, 12, 1), last=Widths(11, 8, 1)),
        BlockWidths(usual=Widths(15, 4, 1), last=Widths(14, 0, 1)),
    ),
}
"""What the backward pass of a block holds besides, at its peak: the largest of these moments."""

FUSED_FORWARD = (Widths(21, 8, 7), Widths(15, 21, 7))
"""What a forward without gradients holds at the end of a block's feed-forward of the image, and at that of the text.

A feed-forward's 13 are two streams 4, the product 4, GELU 4 and what it adds 1. Besides there are the transformer's
input 1, the block's 2, and of the attention what the pullbacks hold until the block is done.
"""

EAGER_KEPT = {
    "float32": BlockWidths(usual=Widths(14.2, 14.2, 6.1), last=Widths(14.2, 8.1, 6.1)),
    "bfloat16": BlockWidths(usual=Widths(18.2, 18.2, 10.1), last=Widths(18.2, 12.2, 10.1)),
}
"""What autograd keeps of diffusers' block with adapters of the published targets. bfloat16 keeps more because qk-norm
computes in float32."""
EAGER_INPUT = BlockWidths(usual=Widths(1, 1), last=Widths(1, 1))
"""What diffusers' checkpointing keeps of a block: its hidden streams."""
EAGER_BACKWARD = (
    BlockWidths(usual=Widths(8, 0), last=Widths(8, 0)),
    BlockWidths(usual=Widths(4, 7), last=Widths(4, 0)),
    BlockWidths(usual=Widths(0, 8), last=Widths(0, 0)),
)
"""At the image's GELU, between the two, and at the text's."""
EAGER_FORWARD = (Widths(13, 3, 1), Widths(9, 10, 1), Widths(6, 12, 1))
"""In a forward without gradients: at the image's GELU, in the attention, at the text's GELU.

All that is eager: differences of live bytes between transformers that differ by a block or a token (torch 2.13,
diffusers 0.42, peft 0.21, flash attention, 2026-11).
"""


def predict_memory(
    config: Config,
    shape: TransformerShape,
    vae: VAEShape,
    *,
    text_tokens: int,
    images: int,
    has_text_encoders: bool,
    num_ranks: int = 1,
    zero_stage: int | None = None,
) -> Memory:
    """The memory of a rank that draws `images` in an iteration, with prompts of `text_tokens`.

    Args:
        zero_stage: another than the recipe's.
    """
    model, rollout = config.model, config.rollout
    size, pixels = value_bytes(model), model.resolution**2
    tokens = shape.tokens(model.resolution, text_tokens, vae_factor=vae.factor)
    stage = config.parallel.zero_stage if zero_stage is None else zero_stage
    trained = float(trained_parameters(config, shape))
    state = state_bytes(config, trained=trained, value=size, stage=stage, num_ranks=num_ranks)
    pictures = 4.0 * 3 * pixels * min(images, rollout.images_per_forward)  # scored as they come, and not kept
    latents = 4.0 * shape.channels * (model.resolution // vae.factor) ** 2
    drawn = rollout_bytes(config, shape, tokens)
    views = {config.sampling_view(step) for step in (0, config.steps - 1)}
    graphs = rollout.cuda_graphs * len(views)
    holders = ranks_of_frozen(config, stage=stage, num_ranks=num_ranks)
    transformers = 1 if config.adapter is not None else 3  # each has its table of positions
    resident = {
        "base transformer": size * (shape.parameters / holders + transformers * shape.position_values),
        "VAE": float(size * vae.parameters),
        **state.resident,
        "latents, texts": images * (2 * latents + size * text_tokens * shape.joint_attention_dim),
    }
    if model.drawn_with != "same":
        resident[f"{model.drawn_with} copy of weights"] = _sampling_copy_bytes(config, shape)
    trajectories = images * config.algorithm.kept_latents * latents  # from the rollout to the iteration's end
    if graphs:  # one for each view that is drawn from
        resident["CUDA graphs"] = graphs * drawn
    decoding = decoding_bytes(vae, model) * rollout.decoded_at_once + pictures
    overlaps = images > rollout.images_per_forward  # a batch is decoded while the next is drawn
    phases: dict[Phase, float] = {
        "training": config.optimizer.images_per_micro_batch * _image_bytes(config, shape, tokens)
        + state.backward
        + trajectories,
        "optimizer step": state.step + trajectories,
        # At its end the trajectories of batches become one.
        "rollout": max(drawn, trajectories) + trajectories + overlaps * decoding,
        "VAE decoding": decoding + trajectories,
    }
    if has_text_encoders:
        phases["text encoders"] = size * sum(encoder.parameters for encoder in SD3_TEXT_ENCODERS.values())
    return Memory(resident=resident, phases=phases, host=state.host)


def trained_parameters(config: Config, shape: TransformerShape) -> int:
    """Parameters that a run of `config` trains."""
    if config.adapter is None:
        return shape.parameters
    return shape.adapter_parameters(config.adapter.targets, rank=config.adapter.rank)


def value_bytes(model: ModelConfig) -> int:
    """Bytes of a value in the model's dtype."""
    return 4 if model.dtype == "float32" else 2


def training_bytes(shape: TransformerShape, tokens: Tokens, model: ModelConfig, adapter: AdapterConfig | None) -> float:
    """Peak of a sample's forward and backward through the transformer, by `model.engine` and `model.checkpointing`."""
    kept = peak = 0.0
    for block in range(shape.layers):
        if model.engine == "fused":
            assert adapter is not None
            keeps, needs = _fused_block(block, shape, tokens, model, adapter)
        else:
            keeps, needs = _eager_block(block, shape, tokens, model)
        kept += keeps
        peak = max(peak, kept + needs)
    return peak + modulation_bytes(shape, model)


def _image_bytes(config: Config, shape: TransformerShape, tokens: Tokens) -> float:
    """Training on one image: the policy, or the reference before it, without gradients and perhaps guided."""
    model = config.model
    reference = forward_bytes(shape, tokens, model) + modulation_bytes(shape, model)
    trained, compared = config.algorithm.velocities_at_once(is_guided=config.rollout.guidance > 1)
    return max(trained * training_bytes(shape, tokens, model, config.adapter), compared * reference)


def forward_bytes(shape: TransformerShape, tokens: Tokens, model: ModelConfig) -> float:
    """Peak of one sample's forward without gradients, modulation aside."""
    moments, is_dual = FUSED_FORWARD if model.engine == "fused" else EAGER_FORWARD, bool(shape.dual_attention_layers)
    return value_bytes(model) * max(moment.values(shape, tokens, is_dual=is_dual) for moment in moments)


def modulation_bytes(shape: TransformerShape, model: ModelConfig) -> float:
    """What text and timestep do to one sample in all blocks, which the fused engine computes beforehand."""
    if model.engine != "fused":
        return 0.0
    outputs = sum(
        linear.outputs for linear in shape.linears if linear.stream == "once" and ".norm" in f".{linear.name}"
    )
    return float(value_bytes(model) * outputs)


def rollout_bytes(config: Config, shape: TransformerShape, tokens: Tokens) -> float:
    """Drawing `rollout.images_per_forward` images: a forward of them, and the modulation of every evaluation."""
    rollout = config.rollout
    samples = rollout.images_per_forward * (2 if rollout.guidance > 1 else 1)
    trajectories = [trajectory_of(rollout, steps=steps)[1] for steps in (rollout.steps, config.evaluation.steps)]
    evaluations = max(len(each.is_guided) for each in trajectories)
    forward = forward_bytes(shape, tokens, config.model)
    return samples * (forward + evaluations * modulation_bytes(shape, config.model))


def decoding_bytes(vae: VAEShape, model: ModelConfig) -> float:
    """Decoding one image: input, output and a copy of the widest convolution, which stands at full resolution."""
    channels = vae.block_channels[min(1, len(vae.block_channels) - 1)]
    return float(3 * value_bytes(model) * channels * model.resolution**2)


def _fused_block(
    block: int, shape: TransformerShape, tokens: Tokens, model: ModelConfig, adapter: AdapterConfig
) -> tuple[float, float]:
    """Bytes that a sample keeps of a block, and bytes more that its backward needs."""
    size, mode = value_bytes(model), model.checkpointing
    beside = _beside_products(block, shape, tokens, model, adapter)
    kept = size * FUSED_KEPT[mode].values(block, shape, tokens)
    if mode == "full":
        again = size * FUSED_AGAIN.values(block, shape, tokens) + beside
        return kept, again + size * _largest(FUSED_BACKWARD["selective"], block, shape, tokens)
    return kept + beside, size * _largest(FUSED_BACKWARD[mode], block, shape, tokens)


def _beside_products(
    block: int, shape: TransformerShape, tokens: Tokens, model: ModelConfig, adapter: AdapterConfig
) -> float:
    """What does not grow with the width: attention's float32 log-sum-exp, and x A^T of every adapter."""
    attentions = tokens.image + tokens.text + (tokens.image if block in shape.dual_attention_layers else 0)
    prefix = f"transformer_blocks.{block}."
    adapted = [linear for linear in shape.adapted(adapter.targets) if linear.name.startswith(prefix)]
    inner = adapter.rank * sum(tokens.of(linear.stream) for linear in adapted)
    return float(4 * shape.heads * attentions + value_bytes(model) * inner)


def _eager_block(block: int, shape: TransformerShape, tokens: Tokens, model: ModelConfig) -> tuple[float, float]:
    """Bytes that a sample keeps of a block, and bytes more that its backward needs; compiled, no more than that."""
    size = value_bytes(model)
    kept = EAGER_KEPT[model.dtype]
    if block == 0:  # no gradient reaches its second attention, which has no adapter
        kept = kept._replace(usual=kept.usual._replace(second=0.0))
    everything = size * kept.values(block, shape, tokens)
    gradients = size * _largest(EAGER_BACKWARD, block, shape, tokens)
    if model.checkpointing == "full":
        return size * EAGER_INPUT.values(block, shape, tokens), everything + gradients
    return everything, gradients


def _sampling_copy_bytes(config: Config, shape: TransformerShape) -> float:
    """The copy that `model.sampling` multiplies with: all products of the blocks, or the adapted ones merged."""
    products = [
        linear for linear in shape.linears if linear.name.startswith("transformer_blocks.") and linear.stream != "once"
    ]
    if config.model.drawn_with != "merged":
        size = 1 if config.model.drawn_with == "fp8" else 2
        return float(size * sum(linear.inputs * linear.outputs for linear in products))
    assert config.adapter is not None  # only the fused engine has such copies, and it trains adapters
    adapted = [linear for linear in products if linear.is_target(config.adapter.targets)]
    return float(value_bytes(config.model) * sum(linear.inputs * linear.outputs for linear in adapted))
