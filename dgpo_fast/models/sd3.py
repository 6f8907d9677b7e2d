"""A frozen Stable Diffusion 3 as the trainer sees it: text in, velocities and images out.

Shape letters: P prompts, B samples, N text tokens, D their width, C H W latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from dgpo_fast.config import ModelConfig
from dgpo_fast.errors import UserError
from dgpo_fast.models.architectures import check_resolution
from dgpo_fast.models.prompt_cache import PromptCache, cache_directory, computed_by
from dgpo_fast.models.random_weights import random_pipeline
from dgpo_fast.models.sources import (
    ENCODERS,
    RANDOM_SEED,
    TOKENIZERS,
    ModelSource,
    find_model,
    hub_commit,
    text_identity,
)
from dgpo_fast.models.text import TextEncoders
from dgpo_fast.profiling import stage
from dgpo_fast.records import Conditioning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StableDiffusion3:
    """A frozen pipeline in diffusers' format: its transformer and its VAE on `device`, and its text encoders beside.

    Args:
        pipeline: what it holds of text encoders stays where it is.
    """

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, text: TextEncoders, config: ModelConfig, *, device: torch.device
    ) -> None:
        self.pipeline, self.text, self.config, self.device = pipeline, text, config, device
        self.dtype = DTYPES[config.dtype]
        for module in (pipeline.transformer, pipeline.vae):
            module.to(device).requires_grad_(False).eval()
        # Convolutions of tensor cores and of oneDNN want it; else they rearrange every tensor on its way in and out. On
        # CUDA they do all the same where torch's group norm does not keep it (pytorch#191945); not measured.
        pipeline.vae.to(memory_format=torch.channels_last)
        check_resolution(
            config.resolution, vae_factor=pipeline.vae_scale_factor, patch=pipeline.patch_size,
            pos_embed_max_size=self.transformer.config.pos_embed_max_size,
        )  # fmt: skip
        side = config.resolution // pipeline.vae_scale_factor
        self.latent_shape = (int(self.transformer.config.in_channels), side, side)

    @property
    def transformer(self) -> SD3Transformer2DModel:
        return self.pipeline.transformer

    def encode(self, prompts: Sequence[str], *, soon: Iterable[str] = ()) -> Conditioning:
        """Conditioning of `prompts`, a row each, in the model's dtype: text [P, N, D] and pooled [P, D].

        Each distinct prompt is encoded once; those of later calls may be named in `soon` (see `TextEncoders`).
        """
        with stage("text"):
            return self.text.encode(prompts, soon=soon)

    def velocity(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        conditioning: Conditioning,
        *,
        transformer: SD3Transformer2DModel | None = None,
    ) -> Tensor:
        """The velocity [B, C, H, W] in the model's dtype, of its transformer or of another in its place.

        Args:
            x_BCHW: noisy latents, float32; rounded to the model's dtype here.
            timestep_B: 1000 sigma, float32.
            conditioning: a row per sample.
        """
        return (transformer or self.transformer)(  # type: ignore[no-any-return]
            hidden_states=x_BCHW.to(self.dtype),
            encoder_hidden_states=conditioning.text_BND,
            pooled_projections=conditioning.pooled_BD,
            timestep=timestep_B,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, x0_BCHW: Tensor, *, images_per_forward: int) -> Tensor:
        """Images float32 [B, 3, pixels, pixels] in [0, 1] of clean latents, a few at a time."""
        vae = self.pipeline.vae
        with stage("vae"):
            latents = (x0_BCHW / vae.config.scaling_factor + vae.config.shift_factor).to(self.dtype)
            images = [vae.decode(chunk, return_dict=False)[0].float() for chunk in latents.split(images_per_forward)]
            # A reward may take the pixels of an image to be next to each other.
            return torch.cat(images).contiguous().div_(2).add_(0.5).clamp_(0, 1)


def load_model(config: ModelConfig, *, device: torch.device | str) -> StableDiffusion3:
    """The model that `config` names, frozen, on `device`; its text encoders are loaded when first they are needed.

    Raises:
        UserError: no such model, not a Stable Diffusion 3, gated without a token, or weights that cannot be read. Those
            of the text encoders are read by `encode`, which raises the same.
    """
    source, target, dtype = find_model(config.name, revision=config.version), torch.device(device), DTYPES[config.dtype]
    if source.kind == "random":
        pipeline = random_pipeline(source.location, dtype=dtype, device=target, seed=RANDOM_SEED)
    else:
        pipeline = _load_pipeline(source, dtype, dict.fromkeys((*ENCODERS, *TOKENIZERS)))
    if source.kind == "hub":  # from now on this commit, whatever is pushed meanwhile
        source = replace(source, revision=hub_commit(source))
        assert source.revision is not None, f"{source.location} is not in the cache"

    def with_encoders() -> StableDiffusion3Pipeline:
        if source.kind == "random":
            return pipeline
        parts = {"transformer": pipeline.transformer, "vae": pipeline.vae}
        return _load_pipeline(source, dtype, parts)

    cache = None
    if config.prompt_cache:
        model = text_identity(source)
        settings = {"model": model, "dtype": config.dtype, "text_length": config.text_length, **computed_by(target)}
        cache = PromptCache(cache_directory(), settings)
    text = TextEncoders(with_encoders, dtype=dtype, text_length=config.text_length, device=target, cache=cache)
    return StableDiffusion3(pipeline, text, config, device=target)


def load_pipeline(config: ModelConfig, *, device: torch.device | str) -> StableDiffusion3Pipeline:
    """The whole pipeline that `config` names, text encoders and all, frozen, on `device`.

    Raises:
        UserError: as `load_model` does.
    """
    source, dtype = find_model(config.name, revision=config.version), DTYPES[config.dtype]
    if source.kind == "random":
        pipeline = random_pipeline(source.location, dtype=dtype, device=device, seed=RANDOM_SEED)
    else:
        pipeline = _load_pipeline(source, dtype, {})
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline.to(device)


def _load_pipeline(source: ModelSource, dtype: torch.dtype, parts: Mapping[str, object]) -> StableDiffusion3Pipeline:
    """The pipeline on the CPU. What `parts` names is not loaded, but taken from there; None leaves it out."""
    from huggingface_hub.errors import HfHubHTTPError

    diffusers.utils.logging.disable_progress_bar()  # nine bars for nine parts; downloads still show theirs
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # what it logs as an error it raises, too
    try:
        return StableDiffusion3Pipeline.from_pretrained(
            source.location,
            revision=source.revision,
            dtype=dtype,
            local_files_only=source.kind != "hub",
            **parts,
        )
    except Exception as error:  # of the hub, of its client, of the network, of the disk, of weights: they do not come
        # Where the hub refuses, diffusers looks into the cache, and then says that this lacks the files.
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        raise UserError(f"model {source.location!r} {_why_not(source, cause)}") from error


def _why_not(source: ModelSource, error: BaseException) -> str:
    """What keeps a model from being loaded, and what helps."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"is gated: accept its licence at https://huggingface.co/{source.location} and log in with `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the hub, or private: check the name, or log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {source.revision!r}: check model.revision and model.commit"
    where = "" if Path(source.location).is_dir() else " (or give a local directory in diffusers' format)"
    return f"cannot be loaded{where}: {' '.join(str(error).split())}"
