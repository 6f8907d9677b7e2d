"""What a hub shows of an exported model, README.md: what it is, what it scores, and how diffusers draws with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from dgpo_fast.config import Config, ModelConfig
from dgpo_fast.flow.diffusers_schedulers import find_scheduler
from dgpo_fast.metrics import read_evaluations
from dgpo_fast.models.sources import KNOWN_HUB_NAMES, RANDOM_PREFIX

DEFAULT_STEPS = 28
"""Of diffusers' pipeline, with the scheduler that a model comes with."""
HOME = "https://arxiv.org/abs/2510.08425"
HERE = '"."'
"""In Python: the directory of the card."""
TAGS = ("text-to-image", "diffusers", "stable-diffusion-3.5", "reinforcement-learning", "dgpo-fast")


class _Base(NamedTuple):
    """The model that was trained, as a card names it: no path of this machine says anything elsewhere."""

    name: str
    is_hub: bool
    code: tuple[str, ...]
    """Lines that come before what loads it."""
    arguments: str
    """What `from_pretrained` takes to load it."""


def model_card(run_dir: Path, config: Config, *, step: int) -> str:
    """The card of the checkpoint after `step` steps, in Markdown, with the front matter that hubs read."""
    base, evaluations = _base_of(config.model), {line["step"]: line for line in read_evaluations(run_dir)}
    parts = [
        f"---\n{_front_matter(base, is_lora=config.adapter is not None)}\n---",
        f"# {config.name}",
        _description(base, config, step=step),
        *([_scores(evaluations[step])] if step in evaluations else []),
        *([] if config.model.name.startswith(RANDOM_PREFIX) else ["## Use", f"```python\n{_usage(base, config)}\n```"]),
        *([_INTERVAL] if config.rollout.guidance_interval is not None else []),
    ]
    return "\n\n".join(parts) + "\n"


_INTERVAL = (
    "Evaluations were guided between two noise levels alone (`rollout.guidance_interval`); these lines guide at all."
)


def _base_of(model: ModelConfig) -> _Base:
    """Whether or not it is there: a run may be exported elsewhere."""
    if model.name == "embedded":
        code = ("from dgpo_fast.models.sources import EMBEDDED",)
        return _Base("dgpo-fast's embedded pipeline", False, code, "EMBEDDED")
    if model.commit is not None or (model.name in KNOWN_HUB_NAMES and not Path(model.name).is_dir()):
        at = "" if model.version is None else f', revision="{model.version}"'
        return _Base(model.name, True, (), f'"{model.name}"{at}')
    what = "random weights" if model.name.startswith(RANDOM_PREFIX) else "a local model"
    return _Base(what, False, (), '"the model that this was trained on"')


def _front_matter(base: _Base, *, is_lora: bool) -> str:
    return ModelCardData(
        base_model=base.name if base.is_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*(["lora"] if is_lora else []), *TAGS],
    ).to_yaml()


def _description(base: _Base, config: Config, *, step: int) -> str:
    made = f"`{config.algorithm.name}`" if config.algorithm.name != "dgpo" else f"[DGPO]({HOME})"
    what = "A LoRA" if config.adapter is not None else "All weights of the transformer"
    rewards = ", ".join(f"`{term.title}` (weight {term.weight:g})" for term in config.rewards.terms)
    return (
        f"{what} of {base.name}, fine-tuned by {made} for {step} optimizer steps of "
        f"{config.images_per_iteration // config.optimizer.steps_per_iteration} images with rewards {rewards}. "
        "These are the averaged weights, as evaluated. `dgpo-fast.yaml` has every setting."
    )


def _scores(line: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {metric} | {base:.3f} | {line['tuned'][metric]:.3f} |" for metric, base in line["base"].items()
    )
    drawn = f"{line['num_prompts']} held-out prompts, {line['images_per_prompt']} images of each"
    return f"| {drawn} | base | tuned |\n|---|---|---|\n{rows}"


def _usage(base: _Base, config: Config) -> str:
    """Lines that draw with the solver, steps and guidance of evaluations, where diffusers has their solver."""
    is_lora, scheduler = config.adapter is not None, find_scheduler(config.rollout)
    lines = [
        "import torch",
        f"from diffusers import {scheduler.name + ', ' if scheduler else ''}StableDiffusion3Pipeline",
        *(base.code if is_lora else ()),
        "",
        "pipeline = StableDiffusion3Pipeline.from_pretrained(",
        f"    {base.arguments if is_lora else HERE}, torch_dtype=torch.{config.model.dtype}",
        ').to("cuda")',
        *([f"pipeline.load_lora_weights({HERE})  # or the name that this is published under"] if is_lora else []),
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
