"""What ranks exchange: a counter of collectives, ours and DeepSpeed's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo_fast.profiling import current_path

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "barrier": "barrier",
}
"""What the operators are called that torch.distributed hands to its dispatcher. Others count under their own name."""


class _Key(NamedTuple):
    stage: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Collectives of one kind that a rank took part in during one stage."""

    stage: tuple[str, ...]
    """The path of stages in which they were started; empty outside of all."""
    kind: str
    number: int
    num_bytes: int
    """Of what they are made of as a whole: what is summed, or what every rank has afterwards."""

    def sent_bytes(self, num_ranks: int) -> float:
        """What each of `num_ranks` ranks sends for it, if they pass it round in a ring."""
        return ring_share(self.kind, num_ranks) * self.num_bytes


def ring_share(kind: str, num_ranks: int) -> float:
    """What a rank sends in a ring, in sizes of the whole tensor: a sum goes round twice, as a scatter and a gather."""
    return (2 if kind == "all_reduce" else 1) * (num_ranks - 1) / num_ranks


class CollectiveCounter(TorchDispatchMode):
    """While entered, counts this rank's collectives, whoever starts them and in whichever thread of the backward pass.

    Every operator then passes through Python, which takes time: what is counted is not to be timed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._number: Counter[_Key] = Counter()
        self._bytes: Counter[_Key] = Counter()
        self._path: tuple[str, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A GPU's backward pass has a thread of its own, which knows of no stage: what it does is the last stage's that
        # the thread was in which waits for it.
        self._path = current_path() or self._path
        if func.namespace == "c10d":  # whatever Python called: also what DeepSpeed kept of torch.distributed
            name = func._schema.name.removeprefix("c10d::")
            key = _Key(self._path, KINDS.get(name, name))
            self._number[key] += 1
            if key.kind != "barrier":
                # Of pieces and their whole one is the operator's first argument, the other its second.
                self._bytes[key] += max(sum(map(_num_bytes, _tensors(argument))) for argument in args[:2])
        return func(*args, **(kwargs or {}))

    def traffic(self) -> list[Traffic]:
        """What was counted, in the order of stages."""
        return [
            Traffic(stage=key.stage, kind=key.kind, number=number, num_bytes=self._bytes[key])
            for key, number in sorted(self._number.items())
        ]


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for each in argument:
            yield from _tensors(each)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
