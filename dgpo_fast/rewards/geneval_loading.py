"""The two models of the reward `geneval`, from files, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dgpo_fast.errors import UserError


def load_model(kind: Any, directory: Path, *, key: str) -> Any:
    """A model of transformers, `kind`, in float32, that only infers.

    Raises:
        UserError: naming the recipe's `key`: it cannot be read, or lacks a weight, where transformers would draw one at
            random.
    """
    try:
        model, report = kind.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of json, of safetensors, of the configuration: whatever is wrong with the files
        raise UserError(f"{key}: {directory} cannot be read: {_one_line(error)}") from error
    # Buffers are made anew where a file lacks them.
    missing = sorted({*report["missing_keys"]} & {name for name, _ in model.named_parameters()})
    if missing:
        raise UserError(
            f"{key}: {directory} is no {kind.__name__} of the published kind: it lacks {len(missing)} weights, among "
            f"them {missing[0]}"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(kind: Any, directory: Path, *, key: str) -> Any:
    """A tokenizer of transformers, `kind`.

    Raises:
        UserError: naming the recipe's `key`: it cannot be read.
    """
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # as above
        raise UserError(f"{key}: {directory} has no tokenizer that can be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
