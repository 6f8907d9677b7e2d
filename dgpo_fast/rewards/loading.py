"""Models of rewards from files, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dgpo_fast.errors import UserError


def inference_dtype(device: torch.device) -> torch.dtype:
    """What a reward's model computes in: float16 on CUDA, whose rounding is an eighth of bfloat16's, else float32."""
    return torch.float16 if device.type == "cuda" else torch.float32


def load_model(
    kind: Any, source: Path, *, key: str, config: Any = None, state: Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A model of transformers, `kind`, in float32, ready to infer.

    Args:
        source: a directory in transformers' format; with `config` and `state`, the file that these are of.
        key: of the recipe, that names the source.
        config: its configuration, where no directory has it.
        state: its weights by their names in transformers, likewise.
        options: of its constructor.

    Raises:
        UserError: it cannot be read, or lacks a weight, where transformers would draw one at random.
    """
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # a table of what the lines below raise
    try:
        model, report = kind.from_pretrained(
            source if state is None else None, config=config, state_dict=state, dtype=torch.float32,
            local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True, **(options or {}),
        )  # fmt: skip
    except Exception as error:  # of json, of safetensors, of the configuration: whatever is wrong with the files
        raise UserError(f"{key}: {source} cannot be read: {_one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    # Buffers are made anew where a file lacks them.
    missing = {*report["missing_keys"]} & {name for name, _ in model.named_parameters()}
    wrong = [*missing, *(name for name, *_ in report["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{key}: {source} is no {kind.__name__} of the published kind: {len(wrong)} weights are missing or of "
            f"another shape, among them {min(wrong)}"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(kind: Any, directory: Path, *, key: str) -> Any:
    """A tokenizer of transformers, `kind`, from the tokenizer.json of a directory.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # as above
        raise UserError(f"{key}: {directory} has no tokenizer that can be read: {_one_line(error)}") from error


def read_state_dict(file: Path, *, key: str) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, on the CPU. Nothing in it is executed.

    Args:
        file: a state_dict, or a checkpoint that has one under that name.
        key: of the recipe, that names the file's directory.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, of zip, of torch: whatever is wrong with the file
        raise UserError(f"{key}: {file} cannot be read: {_one_line(error)}") from error
    state = saved.get("state_dict", saved) if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{key}: {file} holds no state_dict; expected a checkpoint as it was published")
    return dict(state)


def num_layers(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the names of a state have where `pattern` has its group, in the number's place."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
