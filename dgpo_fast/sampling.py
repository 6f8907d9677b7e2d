"""Images drawn by diffusers' own StableDiffusion3Pipeline, with or without an adapter: what `dgpo-fast sample` does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusion3Pipeline
from pydantic import ValidationError
from safetensors import SafetensorError

from dgpo_fast.config import EvaluationConfig, ModelConfig, RolloutConfig, read_recipe_file
from dgpo_fast.errors import UserError
from dgpo_fast.export import CONFIG_FILE
from dgpo_fast.flow.diffusers_schedulers import Scheduler, find_scheduler
from dgpo_fast.model_card import DEFAULT_STEPS
from dgpo_fast.models.architectures import SD35_MEDIUM, check_resolution
from dgpo_fast.models.sd3 import load_pipeline
from dgpo_fast.models.sources import LORA_FILE, ModelSource, find_model, transformer_shape, vae_shape

DEFAULT_GUIDANCE = 4.5
DEFAULT_TEXT_LENGTH = 256
"""T5 tokens, where the tokenizer takes as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Everything that decides what is drawn for a prompt and a seed."""

    model: ModelConfig
    text_length: int | None
    """None: `DEFAULT_TEXT_LENGTH`, or what the tokenizer takes if that is less."""
    steps: int
    guidance: float
    lora: Path | None
    scheduler: Scheduler | None
    """None: the pipeline's own."""

    @classmethod
    def of(
        cls, name: str, *, lora: Path | None, steps: int | None, guidance: float | None, resolution: int | None
    ) -> SampleOptions:
        """The options of a model; what is None is as in evaluations of the run that made `lora`, or the model.

        Raises:
            UserError: no such model, no adapter in `lora`, or a resolution that the model has no positions for.
        """
        if lora is not None and not (lora / LORA_FILE).is_file():
            raise UserError(
                f"--lora {lora}: no {LORA_FILE} there; expected a checkpoint's lora/ directory, or an exported one"
            )
        source = find_model(name)
        run = _settings_of(lora, source)
        revision = run.model.version if run and run.model.name == name else None
        source = replace(source, revision=revision)
        shape, vae = transformer_shape(source) or SD35_MEDIUM, vae_shape(source)
        if resolution is not None:
            check_resolution(
                resolution, vae_factor=vae.factor, patch=shape.patch, pos_embed_max_size=shape.pos_embed_max_size
            )
        scheduler = find_scheduler(run.rollout) if run else None
        model = ModelConfig(
            name=name,
            revision=revision,
            dtype=run.model.dtype if run else ("bfloat16" if torch.cuda.is_available() else "float32"),
            resolution=resolution or (run.model.resolution if run else shape.sample_size * vae.factor),
        )
        return cls(
            model=model,
            text_length=run.model.text_length if run else None,
            steps=steps or (run.steps if run and scheduler else DEFAULT_STEPS),
            guidance=guidance or (run.rollout.guidance if run else DEFAULT_GUIDANCE),
            lora=lora,
            scheduler=scheduler,
        )


def draw(options: SampleOptions, prompt: str, *, out: Path, num: int, seed: int) -> Iterator[Path]:
    """Writes `num` images to `out`, yielding the path of each; image i starts from torch.Generator seed + i."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(options.model, device=device)
    pipeline.set_progress_bar_config(disable=True)
    if options.scheduler is not None:
        pipeline.scheduler = options.scheduler.make()
    if options.lora is not None:
        _load_lora(pipeline, options.lora)
    t5_tokenizer = pipeline.tokenizer_3  # none in a pipeline that was saved without T5
    longest = t5_tokenizer.model_max_length if t5_tokenizer else DEFAULT_TEXT_LENGTH
    text_length = options.text_length or min(DEFAULT_TEXT_LENGTH, longest)
    for index in range(num):
        image = pipeline(
            prompt,
            height=options.model.resolution,
            width=options.model.resolution,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            max_sequence_length=text_length,
            generator=torch.Generator("cpu").manual_seed(seed + index),
        ).images[0]
        path = out / f"{index:04d}.png"
        image.save(path)
        yield path


class _Settings(NamedTuple):
    """What of a run's configuration says how its images are drawn."""

    model: ModelConfig
    rollout: RolloutConfig
    steps: int
    """Of evaluations."""


def _settings_of(lora: Path | None, source: ModelSource) -> _Settings | None:
    """Those beside an exported LoRA or model, or of the run that holds `checkpoints/step-NNNNNN/lora`."""
    if lora is not None:
        lora = lora.resolve()
        files = [lora / CONFIG_FILE, *(parent / "config.yaml" for parent in lora.parents[2:3])]
    else:
        files = [Path(source.location) / CONFIG_FILE] if source.kind == "directory" else []
    return next((_read_settings(file) for file in files if file.is_file()), None)


def _read_settings(file: Path) -> _Settings:
    """From a configuration of whatever method and rewards, which need not be here, nor known to this version."""
    sections = {name: json.dumps(value) for name, value in read_recipe_file(file).items()}
    try:
        return _Settings(
            model=ModelConfig.model_validate_json(sections.get("model", "{}")),
            rollout=RolloutConfig.model_validate_json(sections.get("rollout", "{}")),
            steps=EvaluationConfig.model_validate_json(sections.get("evaluation", "{}")).steps,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: no configuration of a run that this version knows: {key}: {first['msg']}") from None


def _load_lora(pipeline: StableDiffusion3Pipeline, lora: Path) -> None:
    try:
        pipeline.load_lora_weights(lora)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:  # of another model, or damaged
        raise UserError(f"--lora {lora} does not load into this model: {' '.join(str(error).split())}") from error
    if not getattr(pipeline.transformer, "peft_config", None):  # diffusers only warns, and draws the base model
        raise UserError(f"--lora {lora} does not load into this model: it holds nothing for the transformer")
