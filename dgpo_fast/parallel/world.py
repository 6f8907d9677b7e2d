"""The ranks of a run and what they exchange."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.errors import UserError

T = TypeVar("T")


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
            UserError: `device: cuda` without CUDA, or more ranks than GPUs.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda was asked for, but torch sees no CUDA device")
        on_cuda = config.device != "cpu" and torch.cuda.is_available()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if on_cuda and local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_rank + 1} or more ranks on this machine, but {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
        if (size > 1 or config.parallel.zero_stage > 0) and not dist.is_initialized():
            backend = config.parallel.backend
            name = ("nccl" if on_cuda else "gloo") if backend == "auto" else backend
            if "WORLD_SIZE" in os.environ:
                dist.init_process_group(name)
            else:  # DeepSpeed wants a group also of one
                dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        if on_cuda:
            torch.cuda.set_device(device)
        return cls(rank=rank, size=size, device=device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's part of `total` things that the ranks divide among themselves."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, value: int) -> int:
        """The largest of the ranks' values: a one-element all-reduce."""
        if self.size == 1:
            return value
        largest = torch.tensor([value], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of equal shape, concatenated in the order of ranks."""
        if self.size == 1:
            return tensor
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces)

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

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """To be called by every rank at the end of its work."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World(rank=0, size=1, device=torch.device("cpu"))
"""A process without peers, for what exchanges nothing with any."""
