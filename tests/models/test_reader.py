"""What the text encoders of the embedded pipeline are taught: what a caption puts where, and how much of it."""

import math

import numpy as np
import pytest
import torch

from dgpo_fast.models.tiny.reader import (
    NOTHING,
    NUM_ANSWERS,
    SPOTS,
    SPOTS_OF,
    SpotReader,
    TotalReader,
    spots,
    totals,
)
from dgpo_fast.shapes.captions import COLORS, COUNTS, MIRRORED, RELATIONS, SHAPES, Caption, Item, parse_caption
from dgpo_fast.shapes.render import place

RED_CIRCLE, BLUE_SQUARE = (1, 0, 0), (1, 2, 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a red circle left of a blue square", {"left": RED_CIRCLE, "right": BLUE_SQUARE}),
        ("a red circle right of a blue square", {"left": BLUE_SQUARE, "right": RED_CIRCLE}),
        ("a red circle above a blue square", {"above": RED_CIRCLE, "below": BLUE_SQUARE}),
        ("a red circle below a blue square", {"above": BLUE_SQUARE, "below": RED_CIRCLE}),
        ("a red circle and a blue square", {"first": RED_CIRCLE, "second": BLUE_SQUARE}),
        ("three blue squares", {"first": (3, 2, 1)}),
    ],
)
def test_what_a_caption_puts_where(text: str, right: dict[str, tuple[int, int, int]]) -> None:
    assert spots([parse_caption(text)]).tolist() == [[list(right.get(spot, NOTHING)) for spot in SPOTS]]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("three blue squares", {"blue": 3, "square": 3}),
        ("a red circle and a blue square", {"red": 1, "blue": 1, "circle": 1, "square": 1}),
        ("a red circle left of a red square", {"red": 2, "circle": 1, "square": 1}),
        ("a red circle below a blue circle", {"red": 1, "blue": 1, "circle": 2}),
    ],
)
def test_how_much_there_is_of_each_colour_and_shape(text: str, right: dict[str, int]) -> None:
    assert totals([parse_caption(text)]).tolist() == [[right.get(word, 0) for word in (*COLORS, *SHAPES)]]


@pytest.mark.parametrize("relation", RELATIONS)
def test_sides_are_where_scenes_have_them(relation: str) -> None:
    """y points downwards: the object above has the smaller one."""
    caption = Caption((Item(1, "red", "circle"), Item(1, "blue", "square")), relation)
    first, second = place(caption, np.random.default_rng(0))
    first_side = SPOTS_OF[relation][0]
    assert SPOTS_OF[relation] == SPOTS_OF[MIRRORED[relation]][::-1]
    dx, dy = second.x - first.x, second.y - first.y
    assert {"left": dx > 0, "right": dx < 0, "above": dy > 0, "below": dy < 0}[first_side]


def test_readers_that_know_nothing() -> None:
    """The loss of uniform answers: the logarithms of how many there are."""
    captions = [parse_caption("a red circle left of a blue square"), parse_caption("two red circles")]
    spot_reader, total_reader = SpotReader(width=8), TotalReader(width=8)
    for reader in (spot_reader, total_reader):
        torch.nn.init.zeros_(reader.answer.weight)
        torch.nn.init.zeros_(reader.answer.bias)
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert [tuple(scores.shape) for scores in spot_reader(text)] == [(2, len(SPOTS), number) for number in NUM_ANSWERS]
    assert spot_reader.loss(text, spots(captions)).item() == pytest.approx(sum(map(math.log, NUM_ANSWERS)))
    num_words, num_totals = len(COLORS) + len(SHAPES), 1 + max(COUNTS)
    assert total_reader(text[:, 0]).shape == (2, num_words, num_totals)
    assert total_reader.loss(text[:, 0], totals(captions)).item() == pytest.approx(math.log(num_totals))
