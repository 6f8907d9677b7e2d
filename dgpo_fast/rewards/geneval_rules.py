"""What GenEval makes of an image once its objects are known: no model, no pixels.

A prompt's metadata asks for objects by clauses; a detector has found boxes with scores, and where a clause names a
colour, somebody has named the colours of the boxes that `to_be_colored` lists. The rules say what that is worth:

    correct   the benchmark's own verdict: at least so many of each class are there, the most confident of them have the
              colour, and stand where they should; and none of what is excluded is there
    strict    exactly so many are there, have the colour, and stand where they should
    soft      the mean of what each clause is worth: 1 - |asked - found| / asked of its count, which is negative where
              there are many too many; the same of its colour; and a part for its position

Sources: GenEval, arXiv 2310.11513, djghosh13/geneval, evaluation/evaluate_images.py, for `correct` and every threshold;
yifan123/reward-server, reward_server/gen_eval.py, for `soft` and `strict`, which Flow-GRPO and DGPO train on and watch.
The latter's `soft` is kept as it is, flaw and all: an object at the wrong side of its target adds a 0 and then, as one
at the right side, a 1. So a right position is worth 1 and a wrong one, of two objects that are both there, 3/4.

A box is (left, top, right, bottom) in pixels, right and bottom behind its last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.prompts.geneval import CLASSES, COLORS, RELATIONS
from dgpo_fast.records import Prompt

CONFIDENCE = 0.3
"""What a detection's score has to exceed."""
COUNTING_CONFIDENCE = 0.9
"""The same where objects are counted."""
MAX_OBJECTS = 16
"""Of a class; the most confident are kept."""
POSITION_MARGIN = 0.1
"""Of the two objects' width (or height) together: what their distance on that axis has to exceed."""
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class Position(NamedTuple):
    """Where an object is to stand: in this relation to the objects of an earlier clause."""

    relation: str
    clause: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """So many objects of a class."""

    name: str
    count: int
    color: str | None = None
    position: Position | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a prompt asks for."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @property
    def confidence(self) -> float:
        """What the score of a detection has to exceed."""
        return COUNTING_CONFIDENCE if self.tag == "counting" else CONFIDENCE


class Thing(NamedTuple):
    """A detected object."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    place: int = 0
    """Its place among the image's detections, by which its mask is found."""


Found = Mapping[str, Sequence[Thing]]
"""The objects of each class, the most confident first."""


class Verdict(NamedTuple):
    soft: float
    strict: bool
    correct: bool


def asked_of(prompt: str) -> Asked:
    """What a prompt asks for, by its metadata.

    Raises:
        UserError: it does not come with what to look for, in GenEval's form.
    """
    if not (isinstance(prompt, Prompt) and prompt.metadata):
        raise UserError(
            f"rewards: geneval: the prompt {str(prompt)!r} does not say what to look for; expected prompts of "
            "geneval:train or geneval:test, or JSON lines with the keys prompt, tag and include, as GenEval's have"
        )
    try:
        return parse_asked(prompt.metadata)
    except ValueError as error:
        raise UserError(f"rewards: geneval: the metadata of the prompt {str(prompt)!r}: {error}") from None


def parse_asked(metadata: Mapping[str, Any]) -> Asked:
    """What the metadata of a prompt asks for, in the form of GenEval's JSON lines.

    Raises:
        ValueError: a key is missing, or a class, a colour, a relation, a count or a task is none that GenEval knows.
    """
    tag = metadata.get("tag")
    if tag not in TAGS:
        raise ValueError(f"expected a tag out of {', '.join(TAGS)}, got {tag!r}")
    include = tuple(_parse_clause(clause, place) for place, clause in enumerate(_clauses(metadata, "include")))
    if not include:
        raise ValueError("expected clauses in include, got none")
    exclude = tuple(_parse_clause(clause, 0) for clause in _clauses(metadata, "exclude"))
    return Asked(tag=tag, include=include, exclude=exclude)


def _clauses(metadata: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    clauses = metadata.get(key) or ()
    if not isinstance(clauses, Sequence) or not all(isinstance(clause, Mapping) for clause in clauses):
        raise ValueError(f"expected a list of clauses with a class and a count in {key}, got {clauses!r}")
    return clauses


def _parse_clause(clause: Mapping[str, Any], place: int) -> Clause:
    name, count, color, position = (clause.get(key) for key in ("class", "count", "color", "position"))
    if name not in CLASSES:
        raise ValueError(f"no class {name!r} of COCO{suggest(str(name), CLASSES)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"expected a count of 1 or more for {name!r}, got {count!r}")
    if color is not None and color not in COLORS:
        raise ValueError(f"no color {color!r} of {', '.join(COLORS)}")
    if position is None:
        return Clause(name=name, count=count, color=color)
    if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
        raise ValueError(f"expected a position of {name!r} as [relation, number of a clause], got {position!r}")
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"no position {relation!r} of {', '.join(RELATIONS)}")
    if not isinstance(target, int) or not 0 <= target < place:
        raise ValueError(f"the position of {name!r} is relative to clause {target!r}; expected one before it")
    return Clause(name=name, count=count, color=color, position=Position(relation, target))


def kept(things: Iterable[Thing], *, confidence: float) -> Found:
    """The objects that count: above `confidence`, at most 16 of a class, the most confident first.

    GenEval can drop boxes that overlap others of their class, but its default, which published scores have, is not to.
    """
    found: dict[str, list[Thing]] = {}
    for thing in sorted(things, key=lambda thing: -thing.score):
        of_class = found.setdefault(thing.name, [])
        if thing.score > confidence and len(of_class) < MAX_OBJECTS:
            of_class.append(thing)
    return found


def to_be_colored(asked: Asked, found: Found) -> dict[int, Sequence[Thing]]:
    """The objects whose colour `judge` wants to know, by the clause's number: the most confident, as many as asked.

    Of a clause for which fewer are there no colour matters.
    """
    return {
        number: found[clause.name][: clause.count]
        for number, clause in enumerate(asked.include)
        if clause.color is not None and len(found.get(clause.name, ())) >= clause.count
    }


def judge(asked: Asked, found: Found, colors: Mapping[int, Sequence[str]]) -> Verdict:
    """The verdict on an image in which `found` was found.

    Args:
        colors: of the objects that `to_be_colored` lists, in its order.
    """
    soft, strict = _graded(asked, found, colors)
    return Verdict(soft=soft, strict=strict, correct=_is_correct(asked, found, colors))


def _is_correct(asked: Asked, found: Found, colors: Mapping[int, Sequence[str]]) -> bool:
    groups: list[Sequence[Thing] | None] = []
    for number, clause in enumerate(asked.include):
        things = found.get(clause.name, ())[: clause.count]
        is_there = len(things) == clause.count
        if is_there and clause.color is not None:
            is_there = colors[number].count(clause.color) == clause.count
        if is_there and clause.position is not None:
            is_there = _stand(things, clause.position, groups)
        groups.append(things if is_there else None)
    is_excluded = any(len(found.get(clause.name, ())) >= clause.count for clause in asked.exclude)
    return None not in groups and not is_excluded


def _graded(asked: Asked, found: Found, colors: Mapping[int, Sequence[str]]) -> tuple[float, bool]:
    """The soft score and the strict verdict."""
    parts: list[float] = []
    groups: list[Sequence[Thing] | None] = []
    for number, clause in enumerate(asked.include):
        things = found.get(clause.name, ())
        is_there = len(things) == clause.count
        parts.append(_closeness(len(things), clause.count))
        if not is_there and (clause.color is not None or clause.position is not None):
            parts.append(0.0)
        if is_there and clause.color is not None:
            num_right = colors[number].count(clause.color)
            is_there = num_right == clause.count
            parts.append(_closeness(num_right, clause.count))
        if is_there and clause.position is not None:
            is_there = _stand(things, clause.position, groups)
            has_target = groups[clause.position.clause] is not None
            # The server's own arithmetic: see above.
            parts += [1.0] if is_there else [0.0, 1.0] if has_target else [0.0]
        groups.append(things if is_there else None)
    return sum(parts) / len(parts), None not in groups


def _closeness(found: int, asked: int) -> float:
    return 1 - abs(asked - found) / asked


def _stand(things: Sequence[Thing], position: Position, groups: Sequence[Sequence[Thing] | None]) -> bool:
    """Whether all of these stand in the relation to all of the other clause's; not where that clause has failed."""
    targets = groups[position.clause]
    if targets is None:
        return False
    return all(position.relation in relations(thing.box, target.box) for thing in things for target in targets)


def relations(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """How a box stands to another: by what the offset of its centre exceeds the margin, on each axis, as a share of the
    whole offset. Above 1/2 is a relation; so there are none of boxes that are near, and two of those on a diagonal.
    """
    offsets = [_centre(box, axis) - _centre(target, axis) for axis in (0, 1)]
    margins = [POSITION_MARGIN * (_length(box, axis) + _length(target, axis)) for axis in (0, 1)]
    beyond = [math.copysign(max(abs(by) - margin, 0.0), by) for by, margin in zip(offsets, margins, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    right, down = (by / math.hypot(*offsets) for by in beyond)
    told = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {relation for relation, share in told.items() if share > 0.5}


def _centre(box: Sequence[float], axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2


def _length(box: Sequence[float], axis: int) -> float:
    return abs(box[axis + 2] - box[axis])
