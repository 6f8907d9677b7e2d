"""What a launcher says to a process: the variables that torchrun and DeepSpeed's launcher set. Alone where none did."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place among them."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its place among those of its machine, and the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0
