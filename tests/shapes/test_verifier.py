"""The verifier: right images pass, cheap imitations do not, and better images score higher."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

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
from dgpo_fast.shapes.render import IMAGE_SIZE, PlacedObject, corrupt, draw, render
from dgpo_fast.shapes.verifier import Verdict, verify

Image = npt.NDArray[np.float32]
Outline = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], npt.NDArray[np.float64]]

ALL = list(all_captions())
BLANK = draw([])
RED_CIRCLE = parse_caption("a red circle")
CIRCLE_LEFT_OF_SQUARE = parse_caption("a red circle left of a blue square")


def color(name: str) -> npt.NDArray[np.float32]:
    """A colour's RGB in [0, 1]: float32 [3, 1, 1]."""
    return np.array(COLORS[name], np.float32)[:, None, None] / 255


def scene(*objects: tuple[str, str, float, float]) -> Image:
    """The image of objects given as (colour, shape, x, y), all of radius 10."""
    return draw([PlacedObject(name, shape, x, y, 10.0) for name, shape, x, y in objects])


def paint(outline: Outline, name: str = "red", x: float = 32.0, y: float = 32.0, radius: float = 10.0) -> Image:
    """An image of an odd shape, where `outline` of box coordinates is negative."""
    axis = np.arange(IMAGE_SIZE) + 0.5
    distance = outline(*np.meshgrid((axis - x) / radius, (axis - y) / radius)) * radius
    opacity = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return BLANK + opacity * (color(name) - BLANK)


def degrade(
    image: Image, rng: np.random.Generator, *, blur: float = 0.0, noise: float = 0.0, shift: float = 0.0
) -> Image:
    """`image` blurred (pixels), noisy and shifted in colour (both in units of the full range)."""
    blurred = ndimage.gaussian_filter(image, (0, blur, blur))
    tinted = blurred + shift * rng.choice([-1, 1], (3, 1, 1)) + noise * rng.standard_normal(image.shape)
    return np.clip(tinted, 0, 1).astype(np.float32)


def random_captions(family: str, num: int, rng: np.random.Generator) -> list[Caption]:
    """`num` captions of a family, with repeats."""
    captions = [caption for caption in ALL if caption.family == family]
    return [captions[i] for i in rng.integers(len(captions), size=num)]


@pytest.mark.parametrize("family", ["count", "pair", "relation"])
def test_renderings_are_strict(family: str) -> None:
    rng = np.random.default_rng(1)
    verdicts = [verify(render(caption, rng), caption) for caption in random_captions(family, 400, rng)]
    assert np.mean([verdict.strict for verdict in verdicts]) >= 0.995
    assert np.mean([verdict.soft for verdict in verdicts]) > 0.99


@pytest.mark.parametrize("family", ["count", "pair", "relation"])
def test_renderings_of_corrupt_captions_are_not_strict(family: str) -> None:
    rng = np.random.default_rng(2)
    for caption in random_captions(family, 200, rng):
        wrong = corrupt(caption, rng)
        # An image of "A left of B" shows "A and B" too, and one of "A and B" may show "A left of B" by chance.
        if wrong.relation == caption.relation or None not in (wrong.relation, caption.relation):
            verdict = verify(render(wrong, rng), caption)
            assert not verdict.strict, (caption, wrong)
            assert verdict.soft < 0.9, (caption, wrong)


@pytest.mark.parametrize(
    ("flaw", "share"),
    [
        ({"blur": 0.7}, 0.99),
        ({"noise": 0.03}, 0.99),
        ({"shift": 0.05}, 0.99),
        ({"blur": 0.7, "noise": 0.03, "shift": 0.05}, 0.97),
        ({"blur": 1.2, "noise": 0.03, "shift": 0.05}, 0.9),
    ],
)
def test_flaws_of_a_decoder_are_forgiven(flaw: dict[str, float], share: float) -> None:
    rng = np.random.default_rng(3)
    captions = [caption for family in ("count", "pair", "relation") for caption in random_captions(family, 60, rng)]
    verdicts = [verify(degrade(render(caption, rng), rng, **flaw), caption) for caption in captions]
    assert np.mean([verdict.strict for verdict in verdicts]) >= share
    assert min(verdict.soft for verdict in verdicts if verdict.strict) > 0.9


@given(st.sampled_from(ALL), st.sampled_from(ALL), st.integers(0, 2**32 - 1), st.floats(0, 2), st.floats(0, 0.4))
def test_soft_is_a_share_and_strict_implies_it_is_high(
    shown: Caption, asked: Caption, seed: int, blur: float, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    verdict = verify(degrade(render(shown, rng), rng, blur=blur, noise=noise), asked)
    assert 0 <= verdict.soft <= 1
    assert verdict.soft > 0.58 or not verdict.strict


@given(st.sampled_from([caption for caption in ALL if caption.family != "count"]), st.integers(0, 2**32 - 1))
def test_captions_of_the_same_meaning_get_the_same_verdict(caption: Caption, seed: int) -> None:
    image = render(corrupt(caption, np.random.default_rng(seed)), np.random.default_rng(seed))
    mirrored = Caption(tuple(reversed(caption.items)), None if caption.relation is None else MIRRORED[caption.relation])
    verdict, other = verify(image, caption), verify(image, mirrored)
    assert verdict.strict == other.strict
    assert verdict.soft == pytest.approx(other.soft)


@pytest.mark.parametrize("asked", RELATIONS)
@pytest.mark.parametrize("shown", RELATIONS)
def test_exactly_the_shown_relation_is_strict(shown: str, asked: str) -> None:
    dx, dy = {"left of": (13, 3), "right of": (-13, 3), "above": (3, 13), "below": (3, -13)}[shown]
    image = scene(("red", "circle", 32 - dx, 32 - dy), ("blue", "square", 32 + dx, 32 + dy))
    items = CIRCLE_LEFT_OF_SQUARE.items
    verdict = verify(image, Caption(items, asked))
    assert verdict.strict == (asked == shown)
    assert verdict.soft == pytest.approx(1.0 if asked == shown else 0.5, abs=0.02)
    assert verify(image, Caption(items)).strict


@pytest.mark.parametrize(
    ("dy", "strict", "soft"),
    [(0, True, 1), (18, True, 1), (21, True, 7 / 8), (24, False, 3 / 4), (27, False, 5 / 8), (30, False, 1 / 2)],
)
def test_the_soft_score_falls_from_a_relation_to_the_next(dy: int, strict: bool, soft: float) -> None:
    """24 pixels apart across: with 21 down, the relation holds by half its margin, on the diagonal by none."""
    verdict = verify(scene(("red", "circle", 20, 20), ("blue", "square", 44, 20 + dy)), CIRCLE_LEFT_OF_SQUARE)
    assert verdict.strict == strict
    assert verdict.soft == pytest.approx(soft, abs=0.02)


@pytest.mark.parametrize("caption", ["a red circle", "two red circles", "a red circle left of a blue square"])
def test_a_blank_image_scores_nothing(caption: str) -> None:
    blank = np.broadcast_to(np.array(BACKGROUND, np.float32)[:, None, None] / 255, BLANK.shape)
    for image in (blank, np.ones_like(blank), degrade(blank, np.random.default_rng(4), noise=0.03)):
        assert verify(image, parse_caption(caption)) == Verdict(strict=False, soft=0.0)


def test_noise_scores_next_to_nothing() -> None:
    rng = np.random.default_rng(5)
    for caption in random_captions("count", 30, rng) + random_captions("relation", 30, rng):
        for contrast in (0.05, 0.3, 1.0):
            noise = rng.uniform(1 - contrast, 1, BLANK.shape).astype(np.float32)
            for image in (noise, ndimage.gaussian_filter(noise, (0, 2, 2))):
                verdict = verify(image, caption)
                assert not verdict.strict
                assert verdict.soft < 0.1


@pytest.mark.parametrize("name", COLORS)
def test_a_frame_filled_with_the_color_scores_next_to_nothing(name: str) -> None:
    for shape, count in itertools.product(SHAPES, (1, 2, 3)):
        filled = np.broadcast_to(color(name), BLANK.shape)
        assert verify(filled, Caption((Item(count, name, shape),))).soft < 0.05


def test_halves_of_the_frame_are_no_objects() -> None:
    image = BLANK.copy()
    image[:, :, :32], image[:, :, 32:] = color("red"), color("blue")
    assert verify(image, CIRCLE_LEFT_OF_SQUARE).soft < 0.05


IMITATIONS: dict[str, Outline] = {
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.25,
    "bar": lambda x, y: np.maximum(np.abs(x) - 1, np.abs(y) - 0.35),
    "L": lambda x, y: np.maximum(np.maximum(np.abs(x), np.abs(y)) - 1, np.minimum(x + 0.3, 0.3 - y)),
    "plus": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - 1, np.abs(y) - 0.35), np.maximum(np.abs(y) - 1, np.abs(x) - 0.35)
    ),
    "diamond": lambda x, y: (np.abs(x) + np.abs(y) - 1) / np.sqrt(2),
    "upside-down triangle": lambda x, y: np.maximum((2 * np.abs(x) + y - 1) / np.sqrt(5), -y - 1),
    "triangle on its side": lambda x, y: np.maximum((2 * np.abs(y) - x - 1) / np.sqrt(5), x - 1),
    "half a circle": lambda x, y: np.maximum(np.hypot(x, y) - 1, x),
    "half a square": lambda x, y: np.maximum(np.maximum(np.abs(x), np.abs(y)) - 1, x),
    "half a triangle": lambda x, y: np.maximum((2 * np.abs(x) - y - 1) / np.sqrt(5), np.maximum(y - 1, x)),
    "ellipse": lambda x, y: np.hypot(x / 0.6, y) - 1,
}


@pytest.mark.parametrize("imitation", IMITATIONS)
def test_the_color_without_the_shape_is_middling_and_never_strict(imitation: str) -> None:
    rng = np.random.default_rng(6)
    for radius, x, y in zip(rng.uniform(8.5, 11.5, 20), rng.uniform(20, 44, 20), rng.uniform(20, 44, 20), strict=True):
        image = paint(IMITATIONS[imitation], x=x, y=y, radius=radius)
        for shape in SHAPES:
            verdict = verify(image, Caption((Item(1, "red", shape),)))
            assert not verdict.strict
            # A diamond overlaps with a circle of its area by 0.83: nearly a circle, and half of the score is colour.
            assert 0.25 < verdict.soft < (0.95 if imitation == "diamond" else 0.75)


@pytest.mark.parametrize("radius", [3.5, 18.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_of_an_odd_size_is_not_strict(shape: str, radius: float) -> None:
    verdict = verify(draw([PlacedObject("red", shape, 32.0, 32.0, radius)]), Caption((Item(1, "red", shape),)))
    assert not verdict.strict
    assert verdict.soft < 0.6


def test_many_specks_ruin_a_right_image() -> None:
    rng = np.random.default_rng(7)
    softs = []
    for num_specks in (0, 1, 10, 40, 200):
        image = scene(("red", "circle", 32, 32))
        for x, y in rng.integers(0, IMAGE_SIZE - 2, (num_specks, 2)):
            image[:, y : y + 2, x : x + 2] = color("red")
        verdict = verify(image, RED_CIRCLE)
        assert verdict.strict == (num_specks <= 1)
        softs.append(verdict.soft)
    assert softs == sorted(softs, reverse=True)
    assert softs[-1] < 0.3


def test_specks_alone_score_nothing() -> None:
    image = BLANK.copy()
    for x, y in itertools.product(range(0, IMAGE_SIZE, 6), repeat=2):
        image[:, y : y + 4, x : x + 4] = color("red")
    assert verify(image, parse_caption("three red squares")).soft == 0


def test_a_ghost_beside_the_object_is_seen() -> None:
    ghost = scene(("blue", "square", 48, 48))
    image = scene(("red", "circle", 16, 16)) - 0.3 * (BLANK - ghost)
    assert not verify(image, RED_CIRCLE).strict


@pytest.mark.parametrize("gap", [0.0, -4.0])
@pytest.mark.parametrize("second", ["red", "blue"])
def test_objects_that_touch_are_not_strict(second: str, gap: float) -> None:
    image = scene(("red", "square", 22, 32), (second, "square", 42 + gap, 32))
    items = (Item(2, "red", "square"),) if second == "red" else (Item(1, "red", "square"), Item(1, second, "square"))
    verdict = verify(image, Caption(items))
    assert not verdict.strict
    assert verdict.soft < 0.5


def test_an_object_cut_by_the_border_is_not_strict() -> None:
    for shape in SHAPES:
        assert not verify(scene(("red", shape, 2, 32)), Caption((Item(1, "red", shape),))).strict


@pytest.mark.parametrize("washed_out", [0.4, 0.6])
def test_a_pale_or_patchy_color_is_not_strict(washed_out: float) -> None:
    image = scene(("red", "circle", 32, 32))
    pale = image + washed_out * (BLANK - image)
    assert not verify(pale, RED_CIRCLE).strict
    patchy = image.copy()
    patchy[:, 32:40, 26:38] = color("blue")
    assert 0.5 < verify(patchy, RED_CIRCLE).soft < verify(image, RED_CIRCLE).soft
    assert not verify(patchy, RED_CIRCLE).strict


@pytest.mark.parametrize("shape", SHAPES)
def test_better_images_of_one_object_score_higher(shape: str) -> None:
    other = SHAPES[SHAPES.index(shape) - 1]
    caption = Caption((Item(1, "red", shape),))
    right = verify(scene(("red", shape, 20, 20)), caption)
    extra = verify(scene(("red", shape, 20, 20), ("red", shape, 44, 44)), caption)
    wrong_color = verify(scene(("green", shape, 20, 20)), caption)
    wrong_shape = verify(scene(("red", other, 20, 20)), caption)
    wrong_color_and_extra = verify(scene(("green", shape, 20, 20), ("green", shape, 44, 44)), caption)
    everything_wrong = verify(scene(("green", other, 20, 20)), caption)
    assert [v.strict for v in (right, extra, wrong_color, wrong_shape, everything_wrong)] == [True] + [False] * 4
    assert right.soft > 0.98
    for middling in (extra, wrong_color, wrong_shape):
        assert middling.soft == pytest.approx(0.5, abs=0.02)
    assert wrong_color_and_extra.soft == pytest.approx(0.25, abs=0.02)
    assert everything_wrong.soft < 0.05


def test_better_images_of_two_objects_score_higher() -> None:
    circle, square = ("red", "circle", 16, 44), ("blue", "square", 48, 44)
    images = {
        "right": scene(circle, square),
        "wrong colour": scene(circle, ("green", *square[1:])),
        "extra object": scene(circle, square, ("blue", "square", 32, 16)),
        "wrong way round": scene(("red", "circle", 48, 44), ("blue", "square", 16, 44)),
        "missing": scene(circle),
        "blank": BLANK,
    }
    soft = {flaw: verify(image, CIRCLE_LEFT_OF_SQUARE).soft for flaw, image in images.items()}
    expected = {"right": 1, "wrong colour": 3 / 4, "extra object": 2 / 3, "wrong way round": 1 / 2, "missing": 1 / 4}
    assert soft == pytest.approx({**expected, "blank": 0}, abs=0.02)
    assert [f for f, image in images.items() if verify(image, CIRCLE_LEFT_OF_SQUARE).strict] == ["right"]


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_counting_is_exact(asked: int) -> None:
    places = [(16, 16), (48, 16), (32, 48)]
    for shown in (0, 1, 2, 3):
        image = scene(*(("yellow", "triangle", x, y) for x, y in places[:shown]))
        verdict = verify(image, Caption((Item(asked, "yellow", "triangle"),)))
        assert verdict.strict == (shown == asked)
        assert verdict.soft == pytest.approx(min(shown, asked) / max(shown, asked), abs=0.02)


def test_swapped_colors_are_not_the_pair() -> None:
    image = scene(("blue", "circle", 16, 32), ("red", "square", 48, 32))
    verdict = verify(image, parse_caption("a red circle and a blue square"))
    assert verdict == Verdict(strict=False, soft=pytest.approx(0.5, abs=0.02))
