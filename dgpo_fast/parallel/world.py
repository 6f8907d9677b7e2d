"""The ranks of a run and what they exchange."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dgpo_fast import launcher
from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.parallel import failures
from dgpo_fast.parallel.failures import collective

T = TypeVar("T")

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among its peers; alone where no launcher started it."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def from_environment(cls, config: Config) -> World:
        """Joins the process group that torchrun or DeepSpeed's launcher describes in the environment, if any.

        Raises:
            UserError: `device: cuda` without CUDA, more ranks than GPUs, or other ranks that do not come.
        """
        size, rank = launcher.world_size(), launcher.rank()
        timeout = timedelta(seconds=config.parallel.timeout_s)
        store: Store | None = None
        # Before anything that may fail on this rank alone, which the others would then not hear of.
        if not dist.is_initialized() and size > 1:
            store = _meet(rank, size, timeout)
        elif not dist.is_initialized() and config.parallel.zero_stage > 0:
            store = dist.HashStore()  # type: ignore[attr-defined]  # DeepSpeed wants a group also of one
        device, backend = _device(config), config.parallel.backend
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if store is not None:
            if backend == "auto":
                backend = "nccl" if device.type == "cuda" else "gloo"
            # So that NCCL begins now, not with whatever is exchanged first. (Of one rank alone it cannot be told.)
            eager = device if backend == "nccl" and device.type == "cuda" and size > 1 else None
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=eager
            )  # fmt: skip
        return cls(rank=rank, size=size, device=device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's part of `total` things that the ranks divide among themselves."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    @collective
    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @collective
    def highest(self, value: int) -> int:
        """The largest of the ranks' values: a one-element all-reduce."""
        if self.size == 1:
            return value
        largest = torch.full((1,), value, device=self.device)  # filled there: a copy would wait for the device
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    @collective
    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of equal shape, which is not that of a scalar, concatenated in the order of ranks."""
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        _all_gather(gathered, tensor.contiguous())
        return gathered

    @collective
    def gather_objects(self, value: T) -> list[T]:
        """What each rank gave, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def wait_for_device(self) -> None:
        """Until the device has done what this thread gave it; a CPU has, and in a graph's capture nothing is done."""
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).synchronize()

    @collective
    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """To be called by every rank at the end of its work."""
        if self.size > 1:
            failures.part()
            dist.destroy_process_group()


def _device(config: Config) -> torch.device:
    """This rank's."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no CUDA device")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = launcher.local_rank()
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} or more ranks on this machine, but {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", local_rank)


def _meet(rank: int, size: int, timeout: timedelta) -> Store:
    """The store of all ranks, which from now on hear of each other's failures; `timeout` is that of collectives."""
    try:
        start = timedelta(seconds=failures.JOIN_TIMEOUT_S)
        store: Store = next(rendezvous("env://", rank, size, timeout=start))[0]
        failures.watch(rank, size, store, timeout_s=timeout.total_seconds())
    except (dist.DistError, OSError, ValueError) as error:
        where = ":".join(os.environ.get(name, f"${name}") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(f"rank {rank} of {size} did not meet the others at {where}: {error}") from None
    store.set_timeout(timeout)
    return PrefixStore("dgpo-fast", store)


ALONE = World(rank=0, size=1, device=torch.device("cpu"))
"""A process without peers, for what exchanges nothing with any."""
