"""Which prompts an iteration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dgpo_fast import rng


class PromptSampler:
    """Prompts without replacement within an epoch, in an order named by the seed; a pure function of the iteration."""

    def __init__(self, prompts: list[str], *, per_iteration: int, seed: int) -> None:
        self.prompts, self.per_iteration, self.seed = prompts, per_iteration, seed
        self._order: tuple[int, list[int]] | None = None

    def draw(self, iteration: int) -> tuple[str, ...]:
        """The prompts of an iteration's groups, over all ranks, in order."""
        first = iteration * self.per_iteration
        places = (divmod(place, len(self.prompts)) for place in range(first, first + self.per_iteration))
        return tuple(self.prompts[self._epoch(epoch)[place]] for epoch, place in places)

    def upcoming(self, first: int, last: int, groups: Sequence[int]) -> Iterator[str]:
        """The prompts of `groups` in the iterations from `first` up to, and without, `last`."""
        for iteration in range(first, last):
            drawn = self.draw(iteration)
            yield from (drawn[group] for group in groups)

    def _epoch(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            name = rng.stream(self.seed, stage="prompts", iteration=epoch)
            self._order = (epoch, rng.permutation(name, len(self.prompts)))
        return self._order[1]
