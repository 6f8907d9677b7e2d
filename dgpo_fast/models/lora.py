"""Adapters to begin from: a LoRA as diffusers writes it, or as peft does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgpo_fast.config import AdapterConfig
from dgpo_fast.errors import UserError
from dgpo_fast.models.sources import LORA_FILE, find_lora
from dgpo_fast.parallel.weights import Shapes

UNEQUAL = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Settings of peft's with which an adapter is not alpha / rank * B A, the same in all layers."""


class _Saved(NamedTuple):
    weights: Mapping[str, Tensor]
    """Float32, by peft's names within the transformer."""
    config: Mapping[str, Any]
    """peft's; empty where the file does not say."""


def read_lora(path: Path, shapes: Shapes, adapter: AdapterConfig) -> dict[str, Tensor]:
    """The adapters in the directory `path`, float32 on the CPU, under the names of `shapes`.

    B is scaled where they were made with another alpha than `adapter.alpha`: what they add to the base stays. A file
    that does not name its alpha means its rank, as in diffusers.

    Raises:
        UserError: no LoRA is there, it cannot be read, or its rank, layers or shapes are others than those of `shapes`.
    """
    file = find_lora(path)
    try:
        saved = _read(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter.path {path} cannot be read: {' '.join(str(error).split())}") from None
    _check(saved, path, shapes, adapter)
    factor = saved.config.get("lora_alpha", adapter.rank) / adapter.alpha
    return {name: saved.weights[name] * (factor if ".lora_B." in name else 1) for name in shapes}


def _read(file: Path) -> _Saved:
    with safe_open(file, framework="pt") as opened:
        weights = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    if file.name == LORA_FILE:
        prefix, config = "transformer.", json.loads(metadata.get("lora_adapter_metadata", "{}"))
    else:
        prefix, config = "base_model.model.", json.loads((file.parent / "adapter_config.json").read_text())
    return _Saved(
        weights={name.removeprefix(prefix): weight for name, weight in weights.items()},
        config={key.removeprefix(prefix): value for key, value in config.items()},
    )


def _check(saved: _Saved, path: Path, shapes: Shapes, adapter: AdapterConfig) -> None:
    for key in UNEQUAL:
        if saved.config.get(key):
            raise UserError(f"adapter.path {path}: made with {key}, which adapters that are trained here do not have")
    for name, weight in saved.weights.items():
        if ".lora_A." in name and len(weight) != adapter.rank:
            raise UserError(f"adapter.path {path}: its rank is {len(weight)}, adapter.rank {adapter.rank}")
    if more := [name for name in saved.weights if name not in shapes]:
        raise UserError(f"adapter.path {path}: it has {more[0]!r}, which adapter.targets does not ask for")
    for name, shape in shapes.items():
        if name not in saved.weights:
            raise UserError(f"adapter.path {path}: it lacks {name!r}, which adapter.targets asks for")
        if (found := saved.weights[name].shape) != shape:
            raise UserError(f"adapter.path {path}: {name!r} is of {tuple(found)}, in this model of {tuple(shape)}")
