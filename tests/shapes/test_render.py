"""Rendered scenes: objects where the caption puts them, drawn to the pixel."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dgpo_fast.shapes.captions import (
    BACKGROUND,
    COLORS,
    MIRRORED,
    RELATIONS,
    SHAPES,
    Caption,
    Item,
    all_captions,
    parse_caption,
)
from dgpo_fast.shapes.render import (
    IMAGE_SIZE,
    JITTER,
    PLACE_SIZE,
    PLACES,
    RADIUS,
    RELATION_CLEARANCE,
    PlacedObject,
    corrupt,
    draw,
    excess,
    place,
    render,
    signed_distance,
)

captions = st.sampled_from(list(all_captions()))
seeds = st.integers(0, 2**32 - 1)
offsets = st.floats(-64, 64)
points = arrays(np.float64, (2, 16), elements=st.floats(-3, 3))
background = np.array(BACKGROUND) / 255


@given(captions, seeds)
def test_placed_objects_are_the_captions_and_have_places_of_their_own(caption: Caption, seed: int) -> None:
    objects = place(caption, np.random.default_rng(seed))
    kinds = [(item.color, item.shape) for item in caption.items for _ in range(item.count)]
    assert [(thing.color, thing.shape) for thing in objects] == kinds
    for thing in objects:
        assert RADIUS[0] <= thing.radius <= RADIUS[1]
        assert all(abs(v % PLACE_SIZE - PLACE_SIZE / 2) <= JITTER for v in (thing.x, thing.y))
        assert all(0 < v < IMAGE_SIZE for v in (thing.x, thing.y))
    assert len({(thing.x // PLACE_SIZE, thing.y // PLACE_SIZE) for thing in objects}) == len(objects)
    if caption.relation is not None:
        first, second = objects
        dx, dy = second.x - first.x, second.y - first.y
        assert excess(caption.relation, dx, dy) >= RELATION_CLEARANCE
        along, across = ("x", "y") if caption.relation in ("left of", "right of") else ("y", "x")
        assert {getattr(thing, along) // PLACE_SIZE for thing in objects} == {0, PLACES - 1}
        assert len({getattr(thing, across) // PLACE_SIZE for thing in objects}) == 1


def test_every_place_is_used() -> None:
    rng = np.random.default_rng(0)
    seen = [place(parse_caption("two red circles"), rng) for _ in range(200)]
    assert len({(thing.x // PLACE_SIZE, thing.y // PLACE_SIZE) for things in seen for thing in things}) == 9


def test_objects_in_neighbouring_places_are_apart() -> None:
    """By more than the blur of a decoder, so that each is a connected component of its own."""
    assert PLACE_SIZE - 2 * (RADIUS[1] + JITTER) >= 3


@given(offsets, offsets)
def test_at_most_one_relation_holds(dx: float, dy: float) -> None:
    holding = [relation for relation in RELATIONS if excess(relation, dx, dy) > 0]
    assert len(holding) == (abs(dx) != abs(dy))


@given(st.sampled_from(RELATIONS), offsets, offsets)
def test_a_relation_is_its_mirror_seen_from_the_other_object(relation: str, dx: float, dy: float) -> None:
    assert excess(relation, dx, dy) == excess(MIRRORED[relation], -dx, -dy)


@pytest.mark.parametrize(
    ("relation", "dx", "dy"), [("left of", 9, 0), ("right of", -9, 0), ("above", 0, 9), ("below", 0, -9)]
)
def test_directions_of_relations(relation: str, dx: float, dy: float) -> None:
    assert excess(relation, dx, dy) == 9


@given(st.sampled_from(SHAPES), points, points)
def test_distance_changes_no_faster_than_the_point_moves(
    shape: str, start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]
) -> None:
    change = np.abs(signed_distance(shape, *start) - signed_distance(shape, *end))
    assert (change <= np.hypot(*(start - end)) + 1e-12).all()


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi), ("square", 4.0), ("triangle", 2.0)])
def test_area_and_bounding_box_of_shapes(shape: str, area: float) -> None:
    step = 0.01
    axis = np.arange(-1.5 + step / 2, 1.5, step)
    inside = signed_distance(shape, axis[None, :], axis[:, None]) <= 0
    # Only pixels within half a diagonal of the outline are miscounted; no outline here is longer than 8.
    assert inside.sum() * step**2 == pytest.approx(area, abs=8 * step)
    for along in (inside.any(axis=0), inside.any(axis=1)):
        covered = axis[along]
        assert (covered.min(), covered.max()) == pytest.approx((-1, 1), abs=2 * step)


def test_a_triangle_stands_on_its_base() -> None:
    corners = np.array([[0.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).T
    assert signed_distance("triangle", *corners) == pytest.approx(0, abs=1e-12)
    assert signed_distance("triangle", np.array(0.9), np.array(-0.9)) > 0


def test_an_empty_scene_is_background() -> None:
    image = draw([])
    assert image.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert image.dtype == np.float32
    assert image == pytest.approx(np.broadcast_to(background[:, None, None], image.shape), abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_a_drawn_object_has_its_color_area_and_place(shape: str, color: str) -> None:
    image = draw([PlacedObject(color, shape, x=20.3, y=40.6, radius=10.0)])
    paint = np.array(COLORS[color]) / 255
    assert image[:, 42, 20] == pytest.approx(paint, abs=1e-6)
    opacity = ((image - background[:, None, None]) * (paint - background)[:, None, None]).sum(0)
    opacity /= ((paint - background) ** 2).sum()
    expected = 100 * {"circle": np.pi, "square": 4.0, "triangle": 2.0}[shape]
    # A smooth edge keeps the area but at corners, where it errs by less than a pixel each.
    assert opacity.sum() == pytest.approx(expected, abs=3)
    rows, columns = np.indices(opacity.shape) + 0.5
    lower = 10 / 3 if shape == "triangle" else 0.0
    centroid = ((opacity * columns).sum() / opacity.sum(), (opacity * rows).sum() / opacity.sum())
    assert centroid == pytest.approx((20.3, 40.6 + lower), abs=0.1)


@given(captions, seeds)
def test_rendering_repeats_with_its_seed_and_stays_in_range(caption: Caption, seed: int) -> None:
    image = render(caption, np.random.default_rng(seed))
    assert (image == render(caption, np.random.default_rng(seed))).all()
    assert image.min() >= 0
    assert image.max() <= 1


@given(captions, seeds)
def test_a_corrupt_caption_differs_in_one_word(caption: Caption, seed: int) -> None:
    wrong = corrupt(caption, np.random.default_rng(seed))
    assert parse_caption(str(wrong)) == wrong
    changes = [wrong.relation != caption.relation]
    for item, other in zip(caption.items, wrong.items, strict=True):
        changes += [item.count != other.count, item.color != other.color, item.shape != other.shape]
    assert sum(changes) == 1


def test_corruption_reaches_every_word() -> None:
    rng = np.random.default_rng(0)
    caption = parse_caption("a red circle left of a blue square")
    seen = {corrupt(caption, rng) for _ in range(400)}
    colors, shapes, relations = len(COLORS) - 1, len(SHAPES) - 1, len(RELATIONS) - 1
    assert len(seen) == 2 * (colors + shapes) + relations
    counts = {corrupt(Caption((Item(2, "red", "circle"),)), rng).items[0].count for _ in range(100)}
    assert counts == {1, 2, 3}


@given(captions, seeds, seeds)
def test_seeds_make_different_scenes(caption: Caption, seed: int, other: int) -> None:
    assume(seed != other)
    assert place(caption, np.random.default_rng(seed)) != place(caption, np.random.default_rng(other))
