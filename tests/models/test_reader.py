"""What the T5 encoder of the embedded pipeline is taught: which object a caption puts on which side."""

import math

import numpy as np
import pytest
import torch

from dgpo_fast.models.tiny.reader import NOTHING, SIDES, STANDS, SideReader, answers
from dgpo_fast.shapes.captions import COLORS, MIRRORED, RELATIONS, SHAPES, Caption, Item, parse_caption
from dgpo_fast.shapes.render import place

RED_CIRCLE, BLUE_SQUARE = (0, 0), (2, 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a red circle left of a blue square", {"left": RED_CIRCLE, "right": BLUE_SQUARE}),
        ("a red circle right of a blue square", {"left": BLUE_SQUARE, "right": RED_CIRCLE}),
        ("a red circle above a blue square", {"above": RED_CIRCLE, "below": BLUE_SQUARE}),
        ("a red circle below a blue square", {"above": BLUE_SQUARE, "below": RED_CIRCLE}),
        ("a red circle and a blue square", {}),
        ("two red circles", {}),
    ],
)
def test_the_right_answers(text: str, right: dict[str, tuple[int, int]]) -> None:
    assert answers([parse_caption(text)]).tolist() == [[list(right.get(side, NOTHING)) for side in SIDES]]


@pytest.mark.parametrize("relation", RELATIONS)
def test_sides_are_where_scenes_have_them(relation: str) -> None:
    """y points downwards: the object above has the smaller one."""
    caption = Caption((Item(1, "red", "circle"), Item(1, "blue", "square")), relation)
    first, second = place(caption, np.random.default_rng(0))
    first_side = STANDS[relation][0]
    assert STANDS[relation] == STANDS[MIRRORED[relation]][::-1]
    dx, dy = second.x - first.x, second.y - first.y
    assert {"left": dx > 0, "right": dx < 0, "above": dy > 0, "below": dy < 0}[first_side]


def test_a_reader_that_knows_nothing() -> None:
    """The loss of uniform answers: the logarithms of their numbers."""
    reader, right = SideReader(width=8), answers([parse_caption("a red circle left of a blue square")])
    torch.nn.init.zeros_(reader.answer.weight)
    torch.nn.init.zeros_(reader.answer.bias)
    text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    color, shape = reader(text)
    assert color.shape == (1, len(SIDES), len(COLORS) + 1)
    assert shape.shape == (1, len(SIDES), len(SHAPES) + 1)
    assert reader.loss(text, right).item() == pytest.approx(math.log(len(COLORS) + 1) + math.log(len(SHAPES) + 1))
