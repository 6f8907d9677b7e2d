"""Algorithms: each turns scored groups of images into gradients, and knows nothing of the trainer around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dgpo_fast.algorithms.awm import AWM
from dgpo_fast.algorithms.base import Algorithm
from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.algorithms.diffusion_dpo import DiffusionDPO
from dgpo_fast.algorithms.diffusion_nft import DiffusionNFT
from dgpo_fast.algorithms.flow_grpo import FlowGRPO
from dgpo_fast.config import Config
from dgpo_fast.parallel.world import World
from dgpo_fast.plugins import imported

ALGORITHMS: Mapping[str, Callable[[Config, World], Algorithm[Any, Any]]] = {
    "dgpo": DGPO,
    "flow_grpo": FlowGRPO,
    "diffusion_nft": DiffusionNFT,
    "diffusion_dpo": DiffusionDPO,
    "awm": AWM,
}
"""By `algorithm.name`."""


def find_algorithm(config: Config, world: World) -> Algorithm[Any, Any]:
    """The algorithm that a recipe names: of the package, or `package.module:Class`."""
    name = config.algorithm.name
    found = ALGORITHMS.get(name) or imported(name)
    return found(config, world)
