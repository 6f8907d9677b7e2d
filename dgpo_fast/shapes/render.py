"""Images of captions: objects placed at random where the caption allows, drawn with smooth edges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dgpo_fast.shapes.captions import BACKGROUND, COLORS, COUNTS, RELATIONS, SHAPES, Caption

T = TypeVar("T")
Floats = npt.NDArray[np.floating[Any]]

IMAGE_SIZE = 64
"""Side of an image in pixels."""
RADIUS = (8.5, 11.5)
"""Range of half the side of an object's bounding box, in pixels."""
GAP = 3.0
"""Pixels of background between the bounding boxes of two objects, and between an object and the border, at least."""
RELATION_MARGIN = 6.0
"""Pixels by which the axis of a relation exceeds the other axis."""


@dataclass(frozen=True, slots=True)
class PlacedObject:
    """One object of a scene: half-size and centre in pixels, x to the right and y downwards."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


def excess(relation: str, dx: float, dy: float) -> float:
    """Pixels by which an object stands in `relation` to one at offset (dx, dy) from it; at most 0 where it does not.

    The axis of the relation must dominate: a circle left of a square is farther left of it than above or below it.
    """
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along - abs(across)


def place(caption: Caption, rng: np.random.Generator) -> list[PlacedObject]:
    """A random scene of `caption`: objects apart from each other and from the border, in the stated relation."""
    kinds = [item for item in caption.items for _ in range(item.count)]
    low, high = RADIUS
    while True:
        radii = rng.uniform(low, high, len(kinds))
        centres = rng.uniform(radii[:, None] + GAP, IMAGE_SIZE - radii[:, None] - GAP, (len(kinds), 2))
        offsets = np.abs(centres[:, None] - centres[None, :]).max(-1) - radii[:, None] - radii[None, :]
        np.fill_diagonal(offsets, np.inf)
        if offsets.min() < GAP:
            continue
        if caption.relation is not None:
            dx, dy = centres[1] - centres[0]
            if excess(caption.relation, dx, dy) < RELATION_MARGIN:
                continue
        return [
            PlacedObject(kind.color, kind.shape, float(x), float(y), float(radius))
            for kind, (x, y), radius in zip(kinds, centres, radii, strict=True)
        ]


def signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Signed distance, negative inside, to a shape whose bounding box is [-1, 1] x [-1, 1] (y downwards)."""
    distance: Floats
    match shape:
        case "circle":
            distance = np.hypot(x, y) - 1.0
        case "square":
            distance = np.maximum(np.abs(x), np.abs(y)) - 1.0
        case _:
            distance = np.maximum((2.0 * np.abs(x) - y - 1.0) / np.sqrt(5.0), y - 1.0)
    return distance


def draw(objects: list[PlacedObject]) -> npt.NDArray[np.float32]:
    """The image of a scene: float32 [3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1], edges one pixel wide."""
    axis = np.arange(IMAGE_SIZE) + 0.5
    image = np.broadcast_to(np.array(BACKGROUND, np.float64)[:, None, None], (3, IMAGE_SIZE, IMAGE_SIZE)).copy()
    for thing in objects:
        x, y = (axis[None, :] - thing.x) / thing.radius, (axis[:, None] - thing.y) / thing.radius
        opacity = np.clip(0.5 - signed_distance(thing.shape, x, y) * thing.radius, 0.0, 1.0)
        color = np.array(COLORS[thing.color], np.float64)[:, None, None]
        image += opacity * (color - image)
    return (image / 255.0).astype(np.float32)


def render(caption: Caption, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A random image that shows `caption`: float32 [3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1]."""
    return draw(place(caption, rng))


def corrupt(caption: Caption, rng: np.random.Generator) -> Caption:
    """`caption` with one word wrong: a colour or a shape, and where it has one, the count or the relation."""
    while True:
        wrong = _change_a_word(caption, rng)
        if len(set(wrong.items)) == len(wrong.items):  # two alike would be another family, "two red circles"
            return wrong


def _change_a_word(caption: Caption, rng: np.random.Generator) -> Caption:
    structure = {"count": ("count",), "pair": (), "relation": ("relation",)}[caption.family]
    position = int(rng.integers(len(caption.items)))
    item = caption.items[position]
    match str(rng.choice(("color", "shape", *structure))):
        case "color":
            item = dataclasses.replace(item, color=_other(tuple(COLORS), item.color, rng))
        case "shape":
            item = dataclasses.replace(item, shape=_other(SHAPES, item.shape, rng))
        case "count":
            item = dataclasses.replace(item, count=_other(tuple(COUNTS), item.count, rng))
        case _:
            assert caption.relation is not None
            return dataclasses.replace(caption, relation=_other(RELATIONS, caption.relation, rng))
    items = tuple(item if i == position else other for i, other in enumerate(caption.items))
    return dataclasses.replace(caption, items=items)


def _other(choices: tuple[T, ...], current: T, rng: np.random.Generator) -> T:
    remaining = [choice for choice in choices if choice != current]
    return remaining[int(rng.integers(len(remaining)))]
