"""Shapes of Stable Diffusion 3's transformer and VAE, and their parameters and FLOPs: counted, not measured.

A transformer is the list of its linear layers and attentions; every number here is a sum over that list. A
multiplication and an addition are two FLOPs, as in torch.utils.flop_counter. No torch here: a plan is made without it.

Letters: D width, N tokens (image and text), r adapter rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from dgpo_fast.errors import UserError, suggest

TIME_CHANNELS = 256
"""Width of the sinusoidal time embedding."""

Stream = Literal["image", "text", "once"]
"""What a layer runs on: the tokens of the image, those of the text, or one vector per sample."""


class Flops(NamedTuple):
    """FLOPs of matrix products (and convolutions), and of attention."""

    gemm: float
    attention: float

    @property
    def total(self) -> float:
        return self.gemm + self.attention

    def __add__(self, other: object) -> Flops:
        assert isinstance(other, Flops)
        return Flops(self.gemm + other.gemm, self.attention + other.attention)


class Linear(NamedTuple):
    """A linear layer with bias, named as its module in diffusers."""

    name: str
    inputs: int
    outputs: int
    stream: Stream

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs + 1)

    def adapter_parameters(self, rank: int) -> int:
        return rank * (self.inputs + self.outputs)

    def is_target(self, targets: Sequence[str]) -> bool:
        """Whether peft would put an adapter on it."""
        return any(is_target(self.name, target) for target in targets)


def is_target(name: str, target: str) -> bool:
    """Whether peft counts module `name` to `target`: a target is a name, or the end of one after a dot."""
    return f".{name}".endswith(f".{target}")


def check_targets(targets: Sequence[str], names: Iterable[str]) -> None:
    """Makes sure that every target of an adapter is one of the modules `names`; peft is content with one of them.

    Raises:
        UserError: one is not; the nearest name is given.
    """
    modules = list(names)
    for target in targets:
        if not any(is_target(name, target) for name in modules):
            known = {name.split(".", 2)[-1] for name in modules if name.startswith("transformer_blocks.")}
            raise UserError(f"adapter.targets: no layer is called {target!r}{suggest(target, known)}")


def check_resolution(resolution: int, *, vae_factor: int, patch: int, pos_embed_max_size: int) -> None:
    """Makes sure that images of `resolution` pixels a side divide into tokens, for each of which there is a position.

    Raises:
        UserError: they do not.
    """
    step = vae_factor * patch
    if resolution % step or resolution > step * pos_embed_max_size:
        raise UserError(
            f"model.resolution: expected a multiple of {step} up to {step * pos_embed_max_size} for this model, "
            f"got {resolution}"
        )


class Tokens(NamedTuple):
    """Tokens of one sample."""

    image: int
    text: int

    def of(self, stream: Stream) -> int:
        return {"image": self.image, "text": self.text, "once": 1}[stream]


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """An MMDiT as Stable Diffusion 3 builds it (arXiv 2403.03206; diffusers' SD3Transformer2DModel).

    The last block ends the text's path: it has neither an output projection nor a feed-forward for the text.
    """

    layers: int
    heads: int
    head_dim: int
    dual_attention_layers: tuple[int, ...]
    joint_attention_dim: int
    pooled_dim: int
    patch: int = 2
    channels: int = 16
    pos_embed_max_size: int
    sample_size: int = 128
    qk_norm: str | None = "rms_norm"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerShape:
        """The shape that a `transformer/config.json` of diffusers describes."""
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            dual_attention_layers=tuple(config.get("dual_attention_layers") or ()),
            joint_attention_dim=config["joint_attention_dim"],
            pooled_dim=config["pooled_projection_dim"],
            patch=config["patch_size"],
            channels=config["in_channels"],
            pos_embed_max_size=config["pos_embed_max_size"],
            sample_size=config["sample_size"],
            qk_norm=config.get("qk_norm"),
        )

    def to_config(self) -> dict[str, Any]:
        """Arguments of SD3Transformer2DModel."""
        return {
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "caption_projection_dim": self.width,
            "dual_attention_layers": self.dual_attention_layers,
            "joint_attention_dim": self.joint_attention_dim,
            "pooled_projection_dim": self.pooled_dim,
            "patch_size": self.patch,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "pos_embed_max_size": self.pos_embed_max_size,
            "sample_size": self.sample_size,
            "qk_norm": self.qk_norm,
        }

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer, in order. The patch embedding is one too: a convolution whose windows do not overlap."""
        patch_values = self.channels * self.patch**2
        return (
            Linear("pos_embed.proj", patch_values, self.width, "image"),
            Linear("time_text_embed.timestep_embedder.linear_1", TIME_CHANNELS, self.width, "once"),
            Linear("time_text_embed.timestep_embedder.linear_2", self.width, self.width, "once"),
            Linear("time_text_embed.text_embedder.linear_1", self.pooled_dim, self.width, "once"),
            Linear("time_text_embed.text_embedder.linear_2", self.width, self.width, "once"),
            Linear("context_embedder", self.joint_attention_dim, self.width, "text"),
            *(linear for block in range(self.layers) for linear in self._block(block)),
            Linear("norm_out.linear", self.width, 2 * self.width, "once"),
            Linear("proj_out", self.width, patch_values, "image"),
        )

    def _block(self, block: int) -> Iterator[Linear]:
        dual, last = block in self.dual_attention_layers, block == self.layers - 1

        def linear(name: str, stream: Stream, *, inputs: int = 1, outputs: int = 1) -> Linear:
            return Linear(f"transformer_blocks.{block}.{name}", inputs * self.width, outputs * self.width, stream)

        yield linear("norm1.linear", "once", outputs=9 if dual else 6)
        yield linear("norm1_context.linear", "once", outputs=2 if last else 6)
        for name in ("to_q", "to_k", "to_v"):
            yield linear(f"attn.{name}", "image")
        for name in ("add_q_proj", "add_k_proj", "add_v_proj"):
            yield linear(f"attn.{name}", "text")
        yield linear("attn.to_out.0", "image")
        if not last:
            yield linear("attn.to_add_out", "text")
        if dual:
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                yield linear(f"attn2.{name}", "image")
        yield linear("ff.net.0.proj", "image", outputs=4)
        yield linear("ff.net.2", "image", inputs=4)
        if not last:
            yield linear("ff_context.net.0.proj", "text", outputs=4)
            yield linear("ff_context.net.2", "text", inputs=4)

    @property
    def parameters(self) -> int:
        """Parameters; the table of positions is a buffer and not counted."""
        norms = 2 * self.head_dim * (2 * self.layers + len(self.dual_attention_layers)) if self.qk_norm else 0
        return sum(linear.parameters for linear in self.linears) + norms

    @property
    def position_values(self) -> int:
        """Values in the table of positions, which lies in memory beside the parameters."""
        return self.pos_embed_max_size**2 * self.width

    def adapted(self, targets: Sequence[str]) -> tuple[Linear, ...]:
        """The layers that LoRA on `targets` adapts: two tensors each."""
        return tuple(linear for linear in self.linears if linear.is_target(targets))

    def adapter_parameters(self, targets: Sequence[str], *, rank: int) -> int:
        return sum(linear.adapter_parameters(rank) for linear in self.adapted(targets))

    def tokens(self, resolution: int, text_tokens: int, *, vae_factor: int = 8) -> Tokens:
        """Tokens of an image of `resolution` pixels a side, and of its text."""
        return Tokens((resolution // vae_factor // self.patch) ** 2, text_tokens)

    def forward_flops(self, tokens: Tokens) -> Flops:
        """One forward of one sample through the base, without adapters."""
        gemm = sum(2 * linear.inputs * linear.outputs * tokens.of(linear.stream) for linear in self.linears)
        joint, dual = self._attention_flops(tokens)
        return Flops(gemm, self.layers * joint + len(self.dual_attention_layers) * dual)

    def adapter_flops(self, tokens: Tokens, targets: Sequence[str], *, rank: int) -> Flops:
        """What the adapters add to one forward of one sample."""
        return Flops(sum(2 * t.adapter_parameters(rank) * tokens.of(t.stream) for t in self.adapted(targets)), 0.0)

    def backward_flops(self, tokens: Tokens, targets: Sequence[str], *, rank: int) -> Flops:
        """One backward of one sample to adapters on the published targets or others of the joint attention.

        The frozen base needs the gradient of its inputs only, half of a full backward. What lies before the first
        adapter needs none: the embeddings, the modulation, the first block's projections of queries, keys and values,
        and its second attention. Attention is counted without recomputing its scores: twice its forward.
        """
        adapted = self.adapted(targets)
        gemm: float = sum(2 * x.inputs * x.outputs * tokens.of(x.stream) for x in self.linears if _after_adapters(x))
        gemm += 2 * self.adapter_flops(tokens, targets, rank=rank).gemm
        gemm -= sum(2 * rank * x.inputs * tokens.of(x.stream) for x in adapted if not _after_adapters(x))
        joint, dual = self._attention_flops(tokens)
        num_dual = sum(1 for block in self.dual_attention_layers if block > 0)
        return Flops(gemm, 2 * (self.layers * joint + num_dual * dual))

    def full_backward_flops(self, tokens: Tokens) -> Flops:
        """One backward of one sample to every weight: twice the forward."""
        forward = self.forward_flops(tokens)
        return forward + forward

    def _attention_flops(self, tokens: Tokens) -> tuple[float, float]:
        """Scores and weighted values of one joint attention, and of one over the image alone."""
        return 4 * self.width * (tokens.image + tokens.text) ** 2, 4 * self.width * tokens.image**2


def _after_adapters(linear: Linear) -> bool:
    """Whether gradients pass through the layer on their way to the first adapter."""
    if linear.name == "proj_out":
        return True
    _, _, within = linear.name.partition("transformer_blocks.0.")
    if within:
        return within.startswith(("attn.to_out", "attn.to_add_out", "ff"))
    return linear.name.startswith("transformer_blocks.") and linear.stream != "once"


class Conv(NamedTuple):
    """A square convolution with bias, or a linear layer over pixels where kernel is 1."""

    inputs: int
    outputs: int
    kernel: int
    scale: int
    """Side of its output in units of the latents' side."""

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs * self.kernel**2 + 1)


@dataclass(frozen=True, kw_only=True)
class VAEShape:
    """Stable Diffusion 3's autoencoder (diffusers' AutoencoderKL with down and up blocks of residual blocks only)."""

    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    image_channels: int = 3
    sample_size: int = 1024
    norm_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VAEShape:
        """The shape that a `vae/config.json` of diffusers describes."""
        return cls(
            block_channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            latent_channels=config["latent_channels"],
            image_channels=config["out_channels"],
            sample_size=config["sample_size"],
            norm_groups=config["norm_num_groups"],
            scaling_factor=config["scaling_factor"],
            shift_factor=config["shift_factor"] or 0.0,
        )

    def to_config(self) -> dict[str, Any]:
        """Arguments of AutoencoderKL."""
        return {
            "block_out_channels": self.block_channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(self.block_channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(self.block_channels),
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "in_channels": self.image_channels,
            "out_channels": self.image_channels,
            "sample_size": self.sample_size,
            "norm_num_groups": self.norm_groups,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }

    @property
    def factor(self) -> int:
        """Pixels of the image to a side of one latent pixel."""
        return int(2 ** (len(self.block_channels) - 1))

    @property
    def parameters(self) -> int:
        convs = [*self._encoder(), *self._decoder()]
        return sum(conv.parameters for conv in convs) + 2 * sum(self._norm_channels())

    def decode_flops(self, resolution: int) -> Flops:
        """Decoding the latents of one image of `resolution` pixels a side."""
        pixels = (resolution // self.factor) ** 2
        gemm = sum(2 * c.inputs * c.outputs * c.kernel**2 * pixels * c.scale**2 for c in self._decoder())
        return Flops(gemm, 4 * self.block_channels[-1] * pixels**2)

    def _residual(self, inputs: int, outputs: int, scale: int) -> Iterator[Conv]:
        yield Conv(inputs, outputs, 3, scale)
        yield Conv(outputs, outputs, 3, scale)
        if inputs != outputs:
            yield Conv(inputs, outputs, 1, scale)

    def _middle(self) -> Iterator[Conv]:
        deepest = self.block_channels[-1]
        yield from self._residual(deepest, deepest, 1)
        yield from [Conv(deepest, deepest, 1, 1)] * 4
        yield from self._residual(deepest, deepest, 1)

    def _encoder(self) -> Iterator[Conv]:
        yield Conv(self.image_channels, self.block_channels[0], 3, self.factor)
        for inputs, outputs, scale in self._levels(self.block_channels, [self.factor // 2**i for i in self._depths]):
            for layer in range(self.layers_per_block):
                yield from self._residual(inputs if layer == 0 else outputs, outputs, scale)
            if scale > 1:
                yield Conv(outputs, outputs, 3, scale // 2)
        yield from self._middle()
        yield Conv(self.block_channels[-1], 2 * self.latent_channels, 3, 1)

    def _decoder(self) -> Iterator[Conv]:
        yield Conv(self.latent_channels, self.block_channels[-1], 3, 1)
        yield from self._middle()
        for inputs, outputs, scale in self._levels(self.block_channels[::-1], [2**i for i in self._depths]):
            for layer in range(self.layers_per_block + 1):
                yield from self._residual(inputs if layer == 0 else outputs, outputs, scale)
            if scale < self.factor:
                yield Conv(outputs, outputs, 3, 2 * scale)
        yield Conv(self.block_channels[0], self.image_channels, 3, self.factor)

    @property
    def _depths(self) -> range:
        return range(len(self.block_channels))

    @staticmethod
    def _levels(channels: Sequence[int], scales: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Channels before a level, channels in it, and its scale; the first level does not change channels."""
        return zip((channels[0], *channels), channels, scales, strict=False)

    def _norm_channels(self) -> Iterator[int]:
        """Channels of each group norm: before every convolution of a residual block, an attention, and either end."""
        deepest = self.block_channels[-1]
        for channels, layers in (
            (self.block_channels, self.layers_per_block),
            (self.block_channels[::-1], self.layers_per_block + 1),
        ):
            for inputs, outputs, _ in self._levels(channels, channels):
                yield from (inputs, outputs, *[outputs] * (2 * layers - 2))
            yield from [deepest] * 5
            yield channels[-1]


class TextEncoder(NamedTuple):
    """A frozen text encoder: its parameters, and those of them that multiply (the embedding table is looked up)."""

    parameters: float
    multiplying: float
    tokens: int | None
    """Tokens of a prompt; None where the recipe says how many."""


SD3_TEXT_ENCODERS: dict[str, TextEncoder] = {
    "CLIP-L": TextEncoder(0.124e9, 0.086e9, 77),
    "CLIP-G": TextEncoder(0.695e9, 0.632e9, 77),
    "T5-XXL": TextEncoder(4.762e9, 4.630e9, None),
}


def text_flops(t5_tokens: int) -> float:
    """Encoding one prompt with Stable Diffusion 3's encoders: two FLOPs a parameter and token, without attention."""
    return sum(2 * encoder.multiplying * (encoder.tokens or t5_tokens) for encoder in SD3_TEXT_ENCODERS.values())


SD35_MEDIUM = TransformerShape(
    layers=24,
    heads=24,
    head_dim=64,
    dual_attention_layers=tuple(range(13)),
    joint_attention_dim=4096,
    pooled_dim=2048,
    pos_embed_max_size=384,
)
SD35_LARGE = TransformerShape(
    layers=38,
    heads=38,
    head_dim=64,
    dual_attention_layers=(),
    joint_attention_dim=4096,
    pooled_dim=2048,
    pos_embed_max_size=192,
)
SD3_VAE = VAEShape()

SD35_SHAPES: dict[str, TransformerShape] = {"sd35-medium": SD35_MEDIUM, "sd35-large": SD35_LARGE}
