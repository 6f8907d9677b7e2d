"""What a launcher says to a process: the variables that torchrun, DeepSpeed's launcher and SLURM set. Alone where none
did."""

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


def local_size() -> int:
    """How many of them share its machine."""
    if world_size() == 1:
        return 1
    # Of torchrun, DeepSpeed's launcher, and SLURM.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def sharing_cores(num_cores: int) -> int:
    """How many of them share the `num_cores` that this process may use."""
    is_slurm = not any(name in os.environ for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    if is_slurm and (own := os.environ.get("SLURM_CPUS_PER_TASK")):
        # SLURM gives a task cores of its own, one more than asked where these have two threads; or binds it to none.
        return min(local_size(), max(1, num_cores // int(own)))
    return local_size()


def is_first() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0
