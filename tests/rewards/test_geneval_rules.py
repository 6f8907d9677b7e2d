"""GenEval's rules on constructed detections: every task, the thresholds' borders, too few and too many objects.

Expected numbers follow from yifan123/reward-server, reward_server/gen_eval.py, written out by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from dgpo_fast.prompts import load_prompts
from dgpo_fast.records import Prompt
from dgpo_fast.rewards.geneval_rules import (
    CONFIDENCE,
    COUNTING_CONFIDENCE,
    Found,
    Thing,
    Verdict,
    judge,
    kept,
    parse_asked,
    relations,
    to_be_colored,
)

BOX = (0.0, 0.0, 10.0, 10.0)


def found(*things: tuple[str, Sequence[float]]) -> Found:
    """Objects with their boxes, the first the most confident."""
    scored = [Thing(name, 0.99 - 0.01 * place, tuple(box), place) for place, (name, box) in enumerate(things)]  # type: ignore[arg-type]
    return kept(scored, confidence=0.3)


def verdict(metadata: dict[str, Any], there: Found, colors: dict[int, list[str]] | None = None) -> Verdict:
    asked = parse_asked(metadata)
    wanted = {clause: len(things) for clause, things in to_be_colored(asked, there).items()}
    assert wanted == {clause: len(names) for clause, names in (colors or {}).items()}
    return judge(asked, there, colors or {})


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


# One object, two objects


@pytest.mark.parametrize(
    ("dogs", "expected"),
    [
        (0, Verdict(0.0, False, False)),
        (1, Verdict(1.0, True, True)),
        (2, Verdict(0.0, False, True)),  # the benchmark minds no more than are asked for, training does
        (5, Verdict(-3.0, False, True)),
        (20, Verdict(-14.0, False, True)),  # 16 of a class are looked at
    ],
)
def test_a_single_object(dogs: int, expected: Verdict) -> None:
    there = found(*[("dog", BOX)] * dogs, ("cat", BOX))
    assert verdict({"tag": "single_object", "include": [clause("dog")]}, there) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], Verdict(0.0, False, False)),
        (["dog"], Verdict(0.5, False, False)),
        (["cat"], Verdict(0.5, False, False)),
        (["dog", "cat"], Verdict(1.0, True, True)),
        (["dog", "cat", "cat"], Verdict(0.5, False, True)),
    ],
)
def test_two_objects(names: list[str], expected: Verdict) -> None:
    asked = {"tag": "two_object", "include": [clause("dog"), clause("cat")]}
    assert verdict(asked, found(*((name, BOX) for name in names))) == expected


# Counting


@pytest.mark.parametrize(
    ("birds", "expected"),
    [
        (0, Verdict(0.0, False, False)),
        (1, Verdict(1 / 3, False, False)),
        (2, Verdict(2 / 3, False, False)),
        (3, Verdict(1.0, True, True)),
        (4, Verdict(2 / 3, False, False)),  # excluded
        (6, Verdict(0.0, False, False)),
        (9, Verdict(-1.0, False, False)),
    ],
)
def test_counting(birds: int, expected: Verdict) -> None:
    asked = {"tag": "counting", "include": [clause("bird", 3)], "exclude": [clause("bird", 4)]}
    result = verdict(asked, found(*[("bird", BOX)] * birds))
    assert result == pytest.approx(expected)


def test_what_is_excluded_may_be_of_another_class() -> None:
    """Only the benchmark looks at it: training's counts leave nothing to exclude."""
    asked = {"tag": "two_object", "include": [clause("dog")], "exclude": [clause("cat", 2), clause("bird")]}
    assert verdict(asked, found(("dog", BOX), ("cat", BOX))) == (1.0, True, True)
    assert verdict(asked, found(("dog", BOX), ("cat", BOX), ("cat", BOX))) == (1.0, True, False)
    assert verdict(asked, found(("dog", BOX), ("bird", BOX))) == (1.0, True, False)


# Colours


@pytest.mark.parametrize(
    ("cars", "color", "expected"),
    [
        (0, None, Verdict(0.0, False, False)),
        (1, "red", Verdict(1.0, True, True)),
        (1, "orange", Verdict(0.5, False, False)),
        (2, "red", Verdict(0.0, False, True)),  # the most confident is red
        (2, "blue", Verdict(0.0, False, False)),
    ],
)
def test_colors(cars: int, color: str | None, expected: Verdict) -> None:
    asked = {"tag": "colors", "include": [clause("car", color="red")]}
    assert verdict(asked, found(*[("car", BOX)] * cars), {0: [color]} if color else {}) == expected


@pytest.mark.parametrize(
    ("dog", "cat", "expected"),
    [
        ("red", "blue", Verdict(1.0, True, True)),
        ("blue", "red", Verdict(0.5, False, False)),  # attributes bound the wrong way round
        ("red", "red", Verdict(0.75, False, False)),
        (None, "blue", Verdict(0.5, False, False)),  # 0 and 0 for the dog that is not there, 1 and 1 for the cat
    ],
)
def test_color_attributes(dog: str | None, cat: str | None, expected: Verdict) -> None:
    asked = {"tag": "color_attr", "include": [clause("dog", color="red"), clause("cat", color="blue")]}
    there = found(*([("dog", BOX)] if dog else []), ("cat", BOX))
    colors = {number: [color] for number, color in enumerate((dog, cat)) if color}
    assert verdict(asked, there, colors) == expected


def test_colors_of_several_objects() -> None:
    asked = {"tag": "colors", "include": [clause("car", 3, color="red")]}
    there = found(*[("car", BOX)] * 3)
    assert verdict(asked, there, {0: ["red", "blue", "red"]}) == pytest.approx((5 / 6, False, False))
    assert verdict(asked, there, {0: ["red"] * 3}) == (1.0, True, True)


def test_only_the_colors_that_matter_are_asked_for() -> None:
    """Of the most confident, as many as a clause asks for, and none where fewer are there."""
    include = [clause("car", 2, color="red"), clause("dog"), clause("cat", color="red")]
    asked = parse_asked({"tag": "colors", "include": include})
    there = kept([Thing("car", score, BOX, place) for place, score in enumerate((0.4, 0.9, 0.6))], confidence=0.3)
    assert {number: [thing.place for thing in things] for number, things in to_be_colored(asked, there).items()} == {
        0: [1, 2]
    }


# Positions


def placed(x: float, y: float, size: float = 10.0) -> tuple[float, float, float, float]:
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ((100, 0), {"right of"}),
        ((-100, 0), {"left of"}),
        ((0, 100), {"below"}),  # y points down
        ((0, -100), {"above"}),
        ((100, 100), {"right of", "below"}),
        ((0, 0), set()),
        # Two boxes of 10 x 10: within 0.1 x (10 + 10) = 2 of each other there is no relation, nor a thousandth beyond.
        ((2.0, 0), set()),
        ((2.0009, 0), set()),
        ((2.1, 0), set()),  # 0.1 of an offset of 2.1 is no half of it
        ((3.99, 0), set()),
        ((4.01, 0), {"right of"}),  # what is beyond, 2.01, is more than half
        ((0, -4.01), {"above"}),
        ((100, 59), {"right of"}),  # 57 / 116.1 is less than half
        ((100, 62), {"right of", "below"}),  # 60 / 117.7 is more
    ],
)
def test_relations(at: tuple[float, float], expected: set[str]) -> None:
    assert relations(placed(*at), placed(0, 0)) == expected


def test_the_margin_grows_with_both_objects_and_axis_by_axis() -> None:
    """A dot of 2 x 2 beside a bar of 100 x 2: the margin is 10.2 along it, 0.4 across it, and a half is beyond twice
    as much.
    """
    bar = (-50.0, -1.0, 50.0, 1.0)
    expected = {(20.3, 0): set(), (20.5, 0): {"right of"}, (0, 0.79): set(), (0, 0.81): {"below"}, (0, 0): set()}
    assert {at: relations(placed(*at, 2), bar) for at in expected} == expected


POSITION = {"tag": "position", "include": [clause("cat"), clause("dog", position=["left of", 0])]}


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        ([("cat", placed(0, 0)), ("dog", placed(-50, 0))], Verdict(1.0, True, True)),
        # As the server has it: 1, 1, 0 and 1 for two objects that are there, one of them at the wrong side.
        ([("cat", placed(0, 0)), ("dog", placed(50, 0))], Verdict(0.75, False, False)),
        ([("cat", placed(0, 0)), ("dog", placed(0, 50))], Verdict(0.75, False, False)),
        ([("cat", placed(0, 0))], Verdict(1 / 3, False, False)),  # 1, 0, 0
        ([("dog", placed(-50, 0))], Verdict(1 / 3, False, False)),  # 0, 1, and 0 for a target that is not there
        ([], Verdict(0.0, False, False)),
        # Two dogs: 1, 0, 0. The benchmark looks at the first, and so takes either order apart.
        ([("cat", placed(0, 0)), ("dog", placed(-50, 0)), ("dog", placed(50, 0))], Verdict(1 / 3, False, True)),
        ([("cat", placed(0, 0)), ("dog", placed(50, 0)), ("dog", placed(-50, 0))], Verdict(1 / 3, False, False)),
        # Two cats: 0, 1, and 0, since the clause of cats has failed.
        ([("cat", placed(0, 0)), ("cat", placed(9, 9)), ("dog", placed(-50, 0))], Verdict(1 / 3, False, True)),
    ],
)
def test_position(things: list[tuple[str, tuple[float, ...]]], expected: Verdict) -> None:
    assert verdict(POSITION, found(*things)) == pytest.approx(expected)


@pytest.mark.parametrize("second", [-40, 40])
def test_every_object_stands_where_it_should(second: float) -> None:
    asked = {"tag": "position", "include": [clause("cat"), clause("dog", 2, position=["left of", 0])]}
    there = found(("cat", placed(0, 0)), ("dog", placed(-60, 0)), ("dog", placed(second, 0)))
    assert verdict(asked, there) == ((1.0, True, True) if second < 0 else (0.75, False, False))


def test_a_wrong_color_leaves_the_position_unseen() -> None:
    asked = {"tag": "position", "include": [clause("cat"), clause("dog", color="red", position=["left of", 0])]}
    there = found(("cat", placed(0, 0)), ("dog", placed(-60, 0)))
    assert verdict(asked, there, {1: ["red"]}) == (1.0, True, True)
    assert verdict(asked, there, {1: ["blue"]}) == pytest.approx((2 / 3, False, False))


# What counts


@pytest.mark.parametrize(("tag", "confidence"), [("counting", 0.9), ("position", 0.3), ("single_object", 0.3)])
def test_a_score_has_to_exceed_its_tasks_threshold(tag: str, confidence: float) -> None:
    asked = parse_asked({"tag": tag, "include": [clause("dog")]})
    assert asked.confidence == confidence
    things = [Thing("dog", score, BOX) for score in (confidence, confidence + 1e-6, confidence - 1e-6)]
    assert [thing.score for thing in kept(things, confidence=asked.confidence).get("dog", ())] == [confidence + 1e-6]


def test_the_most_confident_sixteen_of_a_class_are_kept() -> None:
    """And overlap as they may: the benchmark suppresses none."""
    things = [Thing(name, 0.31 + 0.01 * (place * 7 % 20), BOX, place) for place in range(20) for name in ("dog", "cat")]
    there = kept(things, confidence=CONFIDENCE)
    for name in ("dog", "cat"):
        scores = [thing.score for thing in there[name]]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([0.31 + 0.01 * place for place in range(19, 3, -1)])
    assert COUNTING_CONFIDENCE > CONFIDENCE


# What is asked


def test_every_generated_prompt_can_be_judged() -> None:
    """A picture that shows exactly what is asked for has all the points, whatever the prompt asks for."""
    prompts = {prompt: prompt for split in ("train", "test") for prompt in load_prompts(f"geneval:{split}", key="x")}
    tags = set()
    for prompt in itertools.islice(prompts.values(), 0, None, 7):
        assert isinstance(prompt, Prompt)
        asked = parse_asked(prompt.metadata)
        tags.add(asked.tag)
        steps = {"left of": (-90, 0), "right of": (90, 0), "above": (0, -90), "below": (0, 90), None: (0, 0)}
        there = found(
            *[
                (each.name, placed(*steps[each.position.relation if each.position else None]))
                for each in asked.include
                for _ in range(each.count)
            ]
        )
        colors = {number: [asked.include[number].color] for number in to_be_colored(asked, there)}
        assert judge(asked, there, colors) == (1.0, True, True), prompt  # type: ignore[arg-type]
    assert len(tags) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "shapes"}, "expected a tag out of single_object, .*, got 'shapes'"),
        ({"include": []}, "expected clauses in include, got none"),
        ({"include": None}, "expected clauses in include, got none"),
        ({"include": [clause("dgo")]}, r"no class 'dgo' of COCO; did you mean 'dog'\?"),
        ({"include": [clause("dog", 0)]}, "expected a count of 1 or more for 'dog', got 0"),
        ({"include": [clause("dog", color="mauve")]}, "no color 'mauve' of red, orange"),
        ({"include": [clause("dog"), clause("cat", position=["under", 0])]}, "no position 'under' of left of"),
        ({"include": [clause("dog", position=["above", 0])]}, "relative to clause 0; expected one before it"),
        ({"exclude": [clause("dgo")]}, "no class 'dgo'"),
        ({"include": "dog"}, "expected a list of clauses with a class and a count in include, got 'dog'"),
        ({"include": ["dog"]}, r"expected a list of clauses with a class and a count in include, got \['dog'\]"),
        ({"exclude": {"class": "dog"}}, "expected a list of clauses with a class and a count in exclude"),
        ({"include": [clause("dog", True)]}, "expected a count of 1 or more for 'dog', got True"),
        ({"include": [clause("dog"), clause("cat", position=3)]}, r"a position of 'cat' as \[relation, number of"),
        ({"include": [clause("dog"), clause("cat", position=["above", "0"])]}, "relative to clause '0'; expected one"),
    ],
)
def test_metadata_that_cannot_be_judged(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_asked({"tag": "single_object", "include": [clause("dog")], **change})


def test_tables_fill_in_what_a_clause_lacks() -> None:
    """Parquet has one structure for all clauses, with nulls."""
    full = {"tag": "colors", "include": [clause("dog", color=None, position=None)], "exclude": None}
    assert parse_asked(full) == parse_asked({"tag": "colors", "include": [clause("dog")]})
