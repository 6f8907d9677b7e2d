"""A run's evaluation EMA as diffusers loads it: `dgpo-fast export`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from dgpo_fast.checkpoint import Checkpoint, Step, find_checkpoint, load_checkpoint
from dgpo_fast.config import Config, dump_config, load_run_config
from dgpo_fast.errors import UserError
from dgpo_fast.model_card import model_card
from dgpo_fast.models.sd3 import load_pipeline
from dgpo_fast.parallel.weights import Piece

CONFIG_FILE = "dgpo-fast.yaml"
"""The run's configuration, beside what was exported of it."""


def export_run(run_dir: Path, out: Path, *, step: Step | None = None) -> Path:
    """Writes what the run learnt to `out`, and returns it: adapters as diffusers' LoRA, else a whole pipeline.

    Beside it lie a model card, and the run's configuration: what `dgpo-fast sample` goes by.

    Of the checkpoint it reads the average alone, a parameter at a time: memory is needed for the pipeline, not for
    what training keeps beside it.

    Args:
        step: of the checkpoint, or "best"; None for the newest.

    Raises:
        UserError: `run_dir` is no run or has no such checkpoint, `out` holds something, or cannot be written.
    """
    config = load_run_config(run_dir)
    checkpoint = load_checkpoint(find_checkpoint(run_dir, step))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} holds something already; name a new directory")
    card = model_card(run_dir, config, step=checkpoint.step)
    try:
        if config.adapter is not None:
            shutil.copytree(checkpoint.directory / "lora", out, dirs_exist_ok=True)
        else:
            _export_pipeline(config, checkpoint, out)
        (out / CONFIG_FILE).write_text(dump_config(config))
        (out / "README.md").write_text(card)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
    return out


@torch.no_grad()
def _export_pipeline(config: Config, checkpoint: Checkpoint, out: Path) -> None:
    pipeline = load_pipeline(config.model, device="cpu")
    parameters = dict(pipeline.transformer.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        values = torch.empty(parameter.numel())
        checkpoint.read("ema", [Piece(name, 0, values)], shapes)
        parameter.copy_(values.view(parameter.shape))
    pipeline.save_pretrained(out)
