"""Prompts: where they come from, and which of them an iteration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

from dgpo_fast import rng
from dgpo_fast.errors import UserError
from dgpo_fast.prompts.drawbench_style import DRAWBENCH_STYLE, drawbench_style_prompts

SHAPES_SOURCES = ("shapes:train", "shapes:test")
SOURCES = (*SHAPES_SOURCES, DRAWBENCH_STYLE)
"""That come with the package."""


def load_prompts(source: str | None, *, key: str) -> list[str]:
    """The prompts of a source: one of `SOURCES`, or a UTF-8 text file with a prompt on each line.

    Raises:
        UserError: naming the recipe's `key`: no source given, no such file, or no prompt in it.
    """
    if source is None:
        raise UserError(f"{key}: no prompts given; set it to a text file with a prompt on each line")
    if source in SHAPES_SOURCES:
        from dgpo_fast.shapes.captions import split_captions

        split = cast(Literal["train", "test"], source.partition(":")[2])
        return [str(caption) for caption in split_captions(split)]
    if source == DRAWBENCH_STYLE:
        return drawbench_style_prompts()
    try:
        text = Path(source).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{key}: no file {source!r} (and it is none of {', '.join(SOURCES)})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {source!r}: {error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{key}: {source!r} holds no prompt")
    return prompts


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
