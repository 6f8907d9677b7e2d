"""Captions: what they spell, what they mean, and the split that keeps meanings out of training."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.shapes.captions import (
    COLORS,
    COUNTS,
    HELD_OUT_SHARE,
    MIRRORED,
    RELATIONS,
    SHAPES,
    Caption,
    Item,
    all_captions,
    parse_caption,
    split_captions,
)

ALL = list(all_captions())
captions = st.sampled_from(ALL)


def mirror(caption: Caption) -> Caption:
    """The caption that says the same from its other object."""
    relation = None if caption.relation is None else MIRRORED[caption.relation]
    return Caption(tuple(reversed(caption.items)), relation)


def test_every_caption_survives_spelling_and_parsing() -> None:
    assert [parse_caption(str(caption)) for caption in ALL] == ALL


def test_captions_are_distinct_and_complete() -> None:
    kinds = len(COLORS) * len(SHAPES)
    families = Counter(caption.family for caption in ALL)
    ordered_pairs = kinds * (kinds - 1)
    assert families == {
        "count": len(COUNTS) * kinds,
        "pair": ordered_pairs,
        "relation": len(RELATIONS) * ordered_pairs,
    }
    assert len({str(caption) for caption in ALL}) == len(ALL)


def test_spelling() -> None:
    circle, square = Item(1, "red", "circle"), Item(1, "yellow", "square")
    assert str(Caption((Item(2, "red", "circle"),))) == "two red circles"
    assert str(Caption((circle, square))) == "a red circle and a yellow square"
    assert str(Caption((circle, square), "left of")) == "a red circle left of a yellow square"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle",
        "a pink circle",
        "a red hexagon",
        "a red circles",
        "two red circle",
        "four red circles",
        "A red circle",
        "a red  circle",
        "a red circle and",
        "a red circle beside a blue square",
        "a red circle and a blue square and a green triangle",
    ],
)
def test_what_is_no_caption_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the shapes world") as refusal:
        parse_caption(text)
    message = str(refusal.value)
    assert "two red circles" in message
    assert all(word in message for word in (*COLORS, *SHAPES))


@given(captions.filter(lambda caption: caption.family != "count"))
def test_mirrored_captions_mean_the_same_and_share_a_split(caption: Caption) -> None:
    assert mirror(caption) != caption
    assert mirror(caption).meaning == caption.meaning
    assert mirror(caption).held_out == caption.held_out


@given(captions.filter(lambda caption: caption.family == "relation"))
def test_other_relations_mean_something_else(caption: Caption) -> None:
    others = [dataclasses.replace(caption, relation=other) for other in (None, *RELATIONS) if other != caption.relation]
    assert all(other.meaning != caption.meaning for other in others)


def test_splits_share_no_meaning_and_cover_everything() -> None:
    train, test = split_captions("train"), split_captions("test")
    assert {caption.meaning for caption in train}.isdisjoint(caption.meaning for caption in test)
    assert {*train, *test} == set(ALL)


def test_held_out_share_of_meanings() -> None:
    meanings = {caption.meaning: caption.held_out for caption in ALL}
    expected = len(meanings) / HELD_OUT_SHARE
    # A hash holds each meaning out with probability 1 / HELD_OUT_SHARE; four standard deviations of that binomial.
    assert abs(sum(meanings.values()) - expected) < 4 * (expected * (1 - 1 / HELD_OUT_SHARE)) ** 0.5


def test_families_are_balanced_all_along_the_training_captions() -> None:
    train = split_captions("train")
    for start in range(0, len(train), 3):
        assert {caption.family for caption in train[start : start + 3]} == {"count", "pair", "relation"}


def test_no_test_caption_is_asked_twice() -> None:
    test = split_captions("test")
    assert len(set(test)) == len(test)
    assert {caption.family for caption in test[:3]} == {"count", "pair", "relation"}
