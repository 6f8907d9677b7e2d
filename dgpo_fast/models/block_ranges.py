"""Ranges of diffusers' own blocks, as those that run by hand have them.

Not where blocks are compiled: a range within would break the graph of each in two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import nn

from dgpo_fast.profiling import span


def announce_blocks(transformer: SD3Transformer2DModel) -> None:
    """Has every forward of a block be a range of its kind, one that recomputes for the backward pass too."""
    for block in transformer.transformer_blocks:
        _announce(block, "block last" if block.context_pre_only else _joint_or_dual(block))


def _joint_or_dual(block: nn.Module) -> str:
    return "block dual" if block.use_dual_attention else "block joint"


def _announce(block: nn.Module, name: str) -> None:
    begun: list[AbstractContextManager[object]] = []

    def begin(*_: Any) -> None:
        begun.append(span(name, "block"))
        begun[-1].__enter__()

    def end(*_: Any) -> None:
        begun.pop().__exit__(None, None, None)

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end, always_call=True)  # also where it fails, or recomputing has gone far enough
