"""dgpo-fast: online reinforcement learning of Stable Diffusion 3.5 by Direct Group Preference Optimization."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgpo_fast.config import Config, load_recipe
    from dgpo_fast.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Config", "Trainer", "load_recipe"]

_HOMES = {"Config": "dgpo_fast.config", "load_recipe": "dgpo_fast.config", "Trainer": "dgpo_fast.trainer"}


def __getattr__(name: str) -> Any:
    # Lazily, so that `import dgpo_fast` and `dgpo-fast --help` do not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
