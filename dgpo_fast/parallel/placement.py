"""Where the samples of an iteration lie: on which rank, in which micro-batch, and which of these close their groups.

Samples are numbered over all ranks, group after group. At a micro-step the ranks together work on consecutive ones, a
micro-batch each; so a group that does not fit into one lies on several ranks, side by side, and only one that does not
fit into a micro-step of all ranks is cut over several. No torch: plans are made of this, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

from dgpo_fast.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The samples of an iteration on `num_ranks` ranks, `micro` to a micro-batch, in groups of `group_size`."""

    num_ranks: int
    micro: int
    group_size: int

    @property
    def case(self) -> Literal["a", "b", "c"]:
        """What closes a group: a micro-batch, a micro-step of all ranks, or only several of these."""
        if self.micro % self.group_size == 0:
            return "a"
        return "b" if self.steps_per_round == 1 else "c"

    @property
    def steps_per_round(self) -> int:
        """Micro-steps that a round has: the fewest behind which no group is open."""
        return self.group_size // gcd(self.group_size, self._step)

    def samples(self, rank: int, *, total: int) -> tuple[int, ...]:
        """The numbers of the samples of `rank`, out of `total`, in the order in which it works on them."""
        assert total % self._step == 0
        first = rank * self.micro
        return tuple(start + first + i for start in range(0, total, self._step) for i in range(self.micro))

    def samples_of_ranks(self, *, total: int) -> list[tuple[int, ...]]:
        """Those of every rank."""
        return [self.samples(rank, total=total) for rank in range(self.num_ranks)]

    def groups(self, steps: range, *, rank: int) -> range:
        """The groups of a round, which has these micro-steps; in case (a) only those that are of `rank`."""
        first, stop = steps.start * self._step, steps.stop * self._step
        if self.case == "a":
            first += rank * self.micro
            stop = first + self.micro
        return range(first // self.group_size, -(-stop // self.group_size))

    @property
    def _step(self) -> int:
        """Samples of a micro-step of all ranks."""
        return self.num_ranks * self.micro


def placement_of(config: Config, num_ranks: int) -> Placement:
    """The placement of a recipe's iterations."""
    return Placement(num_ranks=num_ranks, micro=config.optimizer.images_per_micro_batch, group_size=config.groups.size)
