"""What a hub shows of an exported model, README.md: what it is, what it scores, and how diffusers draws with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dgpo_fast.config import Config
from dgpo_fast.flow.diffusers_schedulers import find_scheduler
from dgpo_fast.metrics import read_evaluations
from dgpo_fast.models.sources import ModelSource, find_model

DEFAULT_STEPS = 28
"""Of diffusers' pipeline, with the scheduler that a model comes with."""
HOME = "https://arxiv.org/abs/2510.08425"
TAGS = ("text-to-image", "diffusers", "stable-diffusion-3.5", "reinforcement-learning", "dgpo-fast")


def model_card(run_dir: Path, config: Config, *, step: int) -> str:
    """The card of the checkpoint after `step` steps, in Markdown, with the front matter that hubs read."""
    source = find_model(config.model.name, revision=config.model.revision)
    evaluations = {line["step"]: line for line in read_evaluations(run_dir)}
    parts = [
        f"---\n{_front_matter(source, is_lora=config.adapter is not None)}\n---",
        f"# {config.name}",
        _description(source, config, step=step),
        *([_scores(evaluations[step])] if step in evaluations else []),
        *([] if source.kind == "random" else ["## Use", f"```python\n{_usage(source, config)}\n```"]),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(source: ModelSource, *, is_lora: bool) -> str:
    return ModelCardData(
        base_model=source.location if source.kind == "hub" else None,  # a directory is nobody else's
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*(["lora"] if is_lora else []), *TAGS],
    ).to_yaml()


def _description(source: ModelSource, config: Config, *, step: int) -> str:
    made = f"`{config.algorithm.name}`" if config.algorithm.name != "dgpo" else f"[DGPO]({HOME})"
    what = "A LoRA" if config.adapter is not None else "All weights of the transformer"
    rewards = ", ".join(f"`{term.title}` (weight {term.weight:g})" for term in config.rewards.terms)
    return (
        f"{what} of `{config.model.name}`, fine-tuned by {made} for {step} optimizer steps of "
        f"{config.images_per_iteration // config.optimizer.steps_per_iteration} images with rewards {rewards}. "
        "These are the averaged weights, as evaluated. `dgpo-fast.yaml` has every setting."
    )


def _scores(line: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {metric} | {base:.3f} | {line['tuned'][metric]:.3f} |" for metric, base in line["base"].items()
    )
    drawn = f"{line['num_prompts']} held-out prompts, {line['images_per_prompt']} images of each"
    return f"| {drawn} | base | tuned |\n|---|---|---|\n{rows}"


def _usage(source: ModelSource, config: Config) -> str:
    """Lines that draw as evaluations did, where diffusers has their solver."""
    is_lora, scheduler = config.adapter is not None, find_scheduler(config.rollout)
    lines = [
        "import torch",
        f"from diffusers import {scheduler.name + ', ' if scheduler else ''}StableDiffusion3Pipeline",
        "",
        "pipeline = StableDiffusion3Pipeline.from_pretrained(",
        f'    "{source.location if is_lora else "."}", torch_dtype=torch.{config.model.dtype}',
        ').to("cuda")',
        *(['pipeline.load_lora_weights(".")  # this directory, or the name it is published under'] if is_lora else []),
        *([f"pipeline.scheduler = {scheduler}"] if scheduler else []),
        "image = pipeline(",
        *_arguments(config, steps=config.evaluation.steps if scheduler else DEFAULT_STEPS),
        ").images[0]",
    ]
    return "\n".join(lines)


def _arguments(config: Config, *, steps: int) -> Iterator[str]:
    model = config.model
    yield '    "a photo of two red apples and a blue cup",'
    yield f"    height={model.resolution}, width={model.resolution},"
    yield f"    num_inference_steps={steps}, guidance_scale={config.rollout.guidance:g},"
    yield f"    max_sequence_length={model.text_length},"
