"""Prompts after GenEval: what they can ask for, how English says it, and which of it training never sees.

Six tasks over the 80 classes of COCO, each prompt with the metadata that the reward `geneval` reads: `tag`, `include`
and `exclude`, as in GenEval's own JSON lines. Everything is made here, in an order fixed by named random streams.

Sources: tasks, classes, colours and metadata are those of GenEval (arXiv 2310.11513; djghosh13/geneval,
prompts/create_prompts.py), the tasks' shares in training those of Flow-GRPO (arXiv 2505.05470; yifan123/flow_grpo,
dataset/merge_genevaltask.py). Departures: plurals and articles are English ("two knives", "a pair of scissors", where
GenEval has "two knifes" and "a scissors"); and no training prompt means what an official test prompt means, in whatever
order it says so, where Flow-GRPO leaves out equal texts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

from dgpo_fast import rng
from dgpo_fast.records import Prompt

CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's, in its order, by the names that GenEval gives them."""
COLORS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
MIRRORED: dict[str, str] = {"right of": "left of", "below": "above"}
COUNTS: dict[int, str] = {2: "two", 3: "three", 4: "four"}

IRREGULAR: dict[str, str] = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice"}
UNITS: dict[str, str] = {"skis": "pair", "scissors": "pair", "broccoli": "head"}
"""What those are counted in that have no singular or no plural."""
SPELLINGS: dict[str, str] = {"tv": "TV", "tv remote": "TV remote"}

TRAIN_PROMPTS = 50_000
TRAIN_SHARES: dict[str, int] = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
TEST_PROMPTS: dict[str, int] = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
}  # fmt: skip
"""As many of each task as GenEval has."""
OFFICIAL = "geneval-official.txt"
"""In assets/prompts/: a hash of what each of GenEval's own test prompts means."""


def geneval_prompts(split: Literal["train", "test"]) -> list[str]:
    """The prompts of a split, tasks mixed in an order fixed by a hash, each a `Prompt` with GenEval's metadata.

    "train": 50,000, by Flow-GRPO's shares of the tasks; a task with fewer prompts repeats them, all equally often. None
    means what a prompt of "test", or of GenEval's official 553, means.
    "test": 553 that are not the official ones: of each task as many as those have, and of none of their meanings. Only
    single objects are the same 80, since there are no others, and training has none of these.
    """
    tasks = TASKS if split == "test" else {tag: TASKS[tag] for tag in TRAIN_SHARES}
    prompts = [prompt for tag in tasks for prompt in _of_task(tag)[split]]
    return [prompts[place] for place in rng.permutation(_stream(split), len(prompts))]


def meaning(metadata: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, equal for metadata that ask for the same: "A left of B" and "B right of A", "A and B" and
    "B and A".
    """
    things = [(clause["class"], clause["count"], clause.get("color")) for clause in metadata["include"]]
    positions = [clause["position"][0] for clause in metadata["include"] if clause.get("position")]
    relation = positions[0] if positions else None
    if relation is None:
        things.sort(key=json.dumps)
    elif relation in MIRRORED:
        things, relation = things[::-1], MIRRORED[relation]
    return hashlib.blake2b(json.dumps([things, relation]).encode(), digest_size=8).hexdigest()


def phrase(name: str, *, count: int = 1, color: str | None = None) -> str:
    """So many objects of a class in English: "an apple", "four red buses", "a pair of blue skis"."""
    noun = SPELLINGS.get(name, name)
    described = noun if color is None else f"{color} {noun}"
    unit = UNITS.get(name)
    counted, rest = (described, "") if unit is None else (unit, f" of {described}")
    if count > 1:
        return f"{COUNTS[count]} {_plural(counted)}{rest}"
    return f"{'an' if counted[0] in 'aeiou' else 'a'} {counted}{rest}"


def _plural(noun: str) -> str:
    *before, last = noun.split(" ")
    ending = "es" if last.endswith(("s", "sh", "ch")) else "s"
    return " ".join([*before, IRREGULAR.get(last, last + ending)])


class _Task(NamedTuple):
    size: int
    make: Callable[[int], Prompt]
    """The prompt of a number below `size`."""


def _single_object(number: int) -> Prompt:
    name = CLASSES[number]
    return _prompt("single_object", phrase(name), {"class": name, "count": 1})


def _two_object(number: int) -> Prompt:
    first, second = _two_of(CLASSES, number)
    included = ({"class": name, "count": 1} for name in (first, second))
    return _prompt("two_object", f"{phrase(first)} and {phrase(second)}", *included)


def _counting(number: int) -> Prompt:
    of_class, of_count = divmod(number, len(COUNTS))
    name, count = CLASSES[of_class], [*COUNTS][of_count]
    more = [{"class": name, "count": count + 1}]
    return _prompt("counting", phrase(name, count=count), {"class": name, "count": count}, exclude=more)


COLORED: tuple[str, ...] = tuple(name for name in CLASSES if name != "person")
"""Nobody is asked to be purple."""


def _colors(number: int) -> Prompt:
    of_class, of_color = divmod(number, len(COLORS))
    name, color = COLORED[of_class], COLORS[of_color]
    return _prompt("colors", phrase(name, color=color), {"class": name, "count": 1, "color": color})


def _position(number: int) -> Prompt:
    pair, of_relation = divmod(number, len(RELATIONS))
    (name, target), relation = _two_of(CLASSES, pair), RELATIONS[of_relation]
    return _prompt(
        "position",
        f"{phrase(name)} {relation} {phrase(target)}",
        {"class": target, "count": 1},
        {"class": name, "count": 1, "position": [relation, 0]},
    )


def _color_attr(number: int) -> Prompt:
    names, colors = divmod(number, len(COLORS) * (len(COLORS) - 1))
    painted = list(zip(_two_of(COLORED, names), _two_of(COLORS, colors), strict=True))
    first, second = (phrase(name, color=color) for name, color in painted)
    included = ({"class": name, "count": 1, "color": color} for name, color in painted)
    return _prompt("color_attr", f"{first} and {second}", *included)


TASKS: dict[str, _Task] = {
    "single_object": _Task(len(CLASSES), _single_object),
    "two_object": _Task(len(CLASSES) * (len(CLASSES) - 1), _two_object),
    "counting": _Task(len(CLASSES) * len(COUNTS), _counting),
    "colors": _Task(len(COLORED) * len(COLORS), _colors),
    "position": _Task(len(CLASSES) * (len(CLASSES) - 1) * len(RELATIONS), _position),
    "color_attr": _Task(len(COLORED) * (len(COLORED) - 1) * len(COLORS) * (len(COLORS) - 1), _color_attr),
}


def _two_of(names: tuple[str, ...], number: int) -> tuple[str, str]:
    first, rest = divmod(number, len(names) - 1)
    return names[first], names[rest + (rest >= first)]


def _prompt(tag: str, what: str, *include: dict[str, Any], exclude: list[dict[str, Any]] | None = None) -> Prompt:
    excluded = {} if exclude is None else {"exclude": exclude}
    return Prompt(f"a photo of {what}", {"tag": tag, "include": [*include], **excluded})


@cache
def _of_task(tag: str) -> Mapping[Literal["train", "test"], list[Prompt]]:
    """The two splits' prompts of a task."""
    num_test, num_train = TEST_PROMPTS[tag], _train_counts().get(tag, 0)
    official = frozenset() if tag == "single_object" else official_meanings()
    test: dict[str, Prompt] = {}
    train: list[Prompt] = []
    for prompt in _shuffled(TASKS[tag], tag):
        if (means := meaning(prompt.metadata)) in official or means in test:
            continue
        if len(test) < num_test:
            test[means] = prompt
        elif len(train) < num_train:
            train.append(prompt)
        else:
            break
    return {"train": list(itertools.islice(itertools.cycle(train), num_train)), "test": [*test.values()]}


def _shuffled(task: _Task, tag: str) -> Iterator[Prompt]:
    return map(task.make, rng.permutation(_stream(tag), task.size))


def _stream(name: str) -> rng.Stream:
    return rng.stream(0, stage=f"geneval prompts: {name}")


def _train_counts() -> dict[str, int]:
    """Prompts of each task in training: its share, cut between whole prompts."""
    ends = itertools.accumulate(TRAIN_SHARES.values(), initial=0)
    cuts = [TRAIN_PROMPTS * end // sum(TRAIN_SHARES.values()) for end in ends]
    return {tag: last - first for tag, (first, last) in zip(TRAIN_SHARES, itertools.pairwise(cuts), strict=True)}


@cache
def official_meanings() -> frozenset[str]:
    """What GenEval's own 553 test prompts mean, each by its `meaning`."""
    lines = (
        resources.files("dgpo_fast").joinpath("assets", "prompts", OFFICIAL).read_text(encoding="utf-8").splitlines()
    )
    return frozenset(line for line in lines if not line.startswith("#"))
