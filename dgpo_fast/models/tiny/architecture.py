"""The modules of the embedded pipeline, untrained: Stable Diffusion 3's own classes at a thousandth of the size."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from dgpo_fast.models.tiny.tokenizers import MAX_TOKENS
from dgpo_fast.shapes.render import IMAGE_SIZE, PLACES

CLIP_WIDTHS = (32, 48)
T5_WIDTH = 96
LATENT_CHANNELS = 8
LATENT_SIZE = IMAGE_SIZE // 8
PATCH = LATENT_SIZE // PLACES


def make_transformer() -> SD3Transformer2DModel:
    """Four joint blocks of width 128 with qk-norm, the first two with dual attention as in SD3.5-Medium.

    A patch of latents is one place of the shapes world: no object is spread over tokens that would have to learn to
    agree on its colour, which is what takes a small model longest.
    """
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=LATENT_SIZE // PATCH,  # any larger, and the crop of it has positions that hardly differ
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def make_vae() -> AutoencoderKL:
    """Three halvings, as SD3's, and half of its latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,  # one group a channel would erase the colours of large flat areas
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def make_clip(tokenizer: PreTrainedTokenizerBase, width: int) -> CLIPTextModelWithProjection:
    """Two layers: SD3 takes the tokens of the last but one, and the pooled projection of the last."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """Two layers with relative positions and gated GELU, as T5 v1.1."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=24,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's scheduler with its shift."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)
