"""Captions of the shapes world: their grammar, what they mean, and which of them training never sees.

Three families of captions, after the tasks of GenEval (arXiv 2310.11513): counting ("two red circles"), two different
objects with their attributes ("a red circle and a yellow square") and position ("a blue square left of a green
triangle").
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 44),
    "green": (52, 164, 72),
    "blue": (44, 92, 224),
    "yellow": (242, 190, 28),
}
BACKGROUND: tuple[int, int, int] = (247, 246, 242)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
COUNTS: dict[int, str] = {1: "a", 2: "two", 3: "three"}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
MIRRORED: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

HELD_OUT_SHARE = 5
"""One meaning in this many is held out of every training set."""


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """One kind of object in a caption: `count` objects of one colour and one shape."""

    count: int
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{COUNTS[self.count]} {self.color} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Caption:
    """What an image must show: one item, or two single objects that stand in a relation (or merely both appear)."""

    items: tuple[Item, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {self.relation or 'and'} ".join(str(item) for item in self.items)

    @property
    def family(self) -> Literal["count", "pair", "relation"]:
        if len(self.items) == 1:
            return "count"
        return "pair" if self.relation is None else "relation"

    @property
    def meaning(self) -> tuple[object, ...]:
        """A key equal for captions of the same scenes: "A left of B" and "B right of A", "A and B" and "B and A"."""
        if self.relation in ("right of", "below"):
            return (tuple(reversed(self.items)), MIRRORED[self.relation])
        if self.family == "pair":
            return (tuple(sorted(self.items)), None)
        return (self.items, self.relation)

    @property
    def held_out(self) -> bool:
        """Whether training never sees this meaning: decided by a hash of it, so the split needs no file."""
        return _digest(repr(self.meaning)) % HELD_OUT_SHARE == 0


def parse_caption(text: str) -> Caption:
    """The caption that `text` spells.

    Raises:
        ValueError: `text` is not of the grammar.
    """
    for relation in (*RELATIONS, "and"):
        first, found, second = text.partition(f" {relation} ")
        if found:
            items = (_parse_item(first, text), _parse_item(second, text))
            if items[0] == items[1] or max(item.count for item in items) > 1:
                raise _not_a_caption(text)
            return Caption(items, None if relation == "and" else relation)
    return Caption((_parse_item(text, text),))


def all_captions() -> Iterator[Caption]:
    """Every caption of the grammar, in a fixed order."""
    kinds = list(itertools.product(COLORS, SHAPES))
    for count, (color, shape) in itertools.product(COUNTS, kinds):
        yield Caption((Item(count, color, shape),))
    for first, second in itertools.permutations(kinds, 2):
        items = (Item(1, *first), Item(1, *second))
        yield Caption(items)
        for relation in RELATIONS:
            yield Caption(items, relation)


def split_captions(split: Literal["train", "test"]) -> list[Caption]:
    """The captions of a split, families taking turns, each in an order fixed by a hash.

    In "train" the smaller families repeat until the largest is used up, so that each is a third of the prompts; in
    "test" a family that is used up drops out, so that no caption is asked twice.
    """
    families: dict[str, list[Caption]] = {"count": [], "pair": [], "relation": []}
    for caption in all_captions():
        if caption.held_out == (split == "test"):
            families[caption.family].append(caption)
    for captions in families.values():
        captions.sort(key=lambda caption: _digest(str(caption)))
    if split == "train":
        longest = max(len(captions) for captions in families.values())
        turns = zip(*(itertools.islice(itertools.cycle(c), longest) for c in families.values()), strict=True)
        return [caption for turn in turns for caption in turn]
    ragged = itertools.zip_longest(*families.values())
    return [caption for turn in ragged for caption in turn if caption is not None]


def _parse_item(words: str, text: str) -> Item:
    count_of = {word: count for count, word in COUNTS.items()}
    match words.split(" "):
        case [number, color, noun] if number in count_of and color in COLORS:
            item = Item(count_of[number], color, noun.removesuffix("s") if count_of[number] > 1 else noun)
            if item.shape in SHAPES and str(item) == words:
                return item
    raise _not_a_caption(text)


def _not_a_caption(text: str) -> ValueError:
    return ValueError(
        f"not a caption of the shapes world: {text!r}; expected e.g. 'two red circles', 'a red circle and a yellow "
        f"square' or 'a blue square left of a green triangle' (colours: {', '.join(COLORS)}; "
        f"shapes: {', '.join(SHAPES)})"
    )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
