"""Images of captions: objects in random places of a grid where the caption allows, drawn with smooth edges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dgpo_fast.shapes.captions import BACKGROUND, COLORS, COUNTS, RELATIONS, SHAPES, Caption

T = TypeVar("T")
Floats = npt.NDArray[np.floating[Any]]

PLACES = 3
"""Places along each side of an image; an object stands in one of the PLACES x PLACES squares."""
PLACE_SIZE = 24
"""Side of a place in pixels."""
IMAGE_SIZE = PLACES * PLACE_SIZE
"""Side of an image in pixels."""
RADIUS = (8.5, 9.5)
"""Range of half the side of an object's bounding box, in pixels."""
JITTER = 0.5
"""Pixels by which an object may be off the centre of its place, along each axis."""
RELATION_CLEARANCE = 1.5 * PLACE_SIZE
"""Least `excess` of a rendered relation: its objects face each other from opposite sides of the image."""


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
    """A random scene of `caption`: objects in places of their own, in the stated relation."""
    kinds = [item for item in caption.items for _ in range(item.count)]
    while True:
        radii = rng.uniform(*RADIUS, len(kinds))
        places = rng.permutation(PLACES**2)[: len(kinds)]
        centres = (np.stack([places % PLACES, places // PLACES], axis=1) + 0.5) * PLACE_SIZE
        centres += rng.uniform(-JITTER, JITTER, centres.shape)
        if caption.relation and excess(caption.relation, *(centres[1] - centres[0])) < RELATION_CLEARANCE:
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
