"""GenEval-style prompts: their English, their metadata, their mix, and what training never sees."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dgpo_fast.prompts import load_prompts
from dgpo_fast.prompts.geneval import (
    CLASSES,
    COLORS,
    RELATIONS,
    TRAIN_SHARES,
    meaning,
    official_meanings,
    phrase,
)
from dgpo_fast.records import Prompt

# Lines of GenEval's prompts/evaluation_metadata.jsonl (djghosh13/geneval, MIT), one for each task.
OFFICIAL: dict[str, dict[str, Any]] = {
    "a photo of a bench": {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    "a photo of a toaster and an oven": {
        "tag": "two_object", "include": [{"class": "toaster", "count": 1}, {"class": "oven", "count": 1}],
    },
    "a photo of four handbags": {
        "tag": "counting", "include": [{"class": "handbag", "count": 4}], "exclude": [{"class": "handbag", "count": 5}],
    },
    "a photo of a blue fire hydrant": {
        "tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}],
    },
    "a photo of a dog right of a teddy bear": {
        "tag": "position",
        "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    },
    "a photo of a green skis and a brown airplane": {
        "tag": "color_attr",
        "include": [
            {"class": "skis", "count": 1, "color": "green"}, {"class": "airplane", "count": 1, "color": "brown"},
        ],
    },
}  # fmt: skip

GOLDEN = (
    [
        "a photo of an oven left of a TV",
        "a photo of a bicycle left of a bus",
        "a photo of a brown handbag and a purple cup",
    ],
    ["a photo of a cell phone", "a photo of a blue refrigerator and a pink pizza"],
)


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return prompts_of("train")


@pytest.fixture(scope="module")
def test_split() -> list[Prompt]:
    return prompts_of("test")


def prompts_of(split: str) -> list[Prompt]:
    prompts = load_prompts(f"geneval:{split}", key=f"prompts.{split}")
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    return prompts  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (phrase("apple"), "an apple"),
        (phrase("umbrella", color="orange"), "an orange umbrella"),
        (phrase("apple", color="red"), "a red apple"),
        (phrase("knife", count=2), "two knives"),
        (phrase("wine glass", count=3), "three wine glasses"),
        (phrase("toothbrush", count=4), "four toothbrushes"),
        (phrase("couch", count=2), "two couches"),
        (phrase("person", count=2), "two people"),
        (phrase("sheep", count=4), "four sheep"),
        (phrase("computer mouse", count=2), "two computer mice"),
        (phrase("tv", count=2), "two TVs"),
        (phrase("skis"), "a pair of skis"),
        (phrase("scissors", color="orange"), "a pair of orange scissors"),
        (phrase("scissors", count=3), "three pairs of scissors"),
        (phrase("broccoli", count=2), "two heads of broccoli"),
    ],
)
def test_english(asked: str, words: str) -> None:
    assert asked == words


def test_sizes_and_shares(train: list[Prompt], test_split: list[Prompt]) -> None:
    """Of 50,000 for training by Flow-GRPO's shares, each to a prompt; of 553 for tests as GenEval's own."""
    assert len(train) == 50_000
    counts = Counter(prompt.metadata["tag"] for prompt in train)
    assert counts.keys() == TRAIN_SHARES.keys() == {"position", "counting", "color_attr", "colors", "two_object"}
    shares = dict(zip(("position", "counting", "color_attr", "colors", "two_object"), (7, 5, 3, 1, 1), strict=True))
    assert all(abs(counts[tag] - 50_000 * share / 17) < 1 for tag, share in shares.items())
    assert Counter(prompt.metadata["tag"] for prompt in test_split) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip


def test_a_small_task_repeats_all_its_prompts_alike(train: list[Prompt]) -> None:
    for tag, distinct in (("counting", 80), ("colors", 602)):
        times = Counter(prompt for prompt in train if prompt.metadata["tag"] == tag)
        assert len(times) == distinct
        assert max(times.values()) - min(times.values()) <= 1
    for tag in ("position", "color_attr", "two_object"):
        assert max(Counter(prompt for prompt in train if prompt.metadata["tag"] == tag).values()) == 1


def test_nothing_is_trained_that_is_tested(train: list[Prompt], test_split: list[Prompt]) -> None:
    """Nor does the test split hold an official prompt, but for the single objects, of which there are no others."""
    trained, tested = ({meaning(prompt.metadata) for prompt in split} for split in (train, test_split))
    assert len(official_meanings()) == 552, "of 553 prompts two ask for the same"
    assert not trained & official_meanings()
    assert not trained & tested
    official = [prompt for prompt in test_split if meaning(prompt.metadata) in official_meanings()]
    assert {prompt.metadata["tag"] for prompt in official} == {"single_object"}
    assert len(tested) == len(test_split)


@pytest.mark.parametrize("text", OFFICIAL)
def test_official_prompts_are_known_by_what_they_mean(text: str, train: list[Prompt]) -> None:
    known = OFFICIAL[text]
    assert meaning(known) in official_meanings()
    backwards = {**known, "include": known["include"][::-1]}
    if known["tag"] in ("two_object", "color_attr"):
        assert meaning(backwards) in official_meanings()
    assert text not in train
    others = {**known, "include": [{**clause, "count": clause["count"] + 9} for clause in known["include"]]}
    assert meaning(others) not in official_meanings()


def test_a_position_means_what_its_mirror_image_means() -> None:
    def position(name: str, relation: str, target: str) -> str:
        included = [{"class": target, "count": 1}, {"class": name, "count": 1, "position": [relation, 0]}]
        return meaning({"tag": "position", "include": included})

    assert position("dog", "right of", "cat") == position("cat", "left of", "dog")
    assert position("dog", "above", "cat") == position("cat", "below", "dog")
    assert len({position("dog", relation, "cat") for relation in RELATIONS}) == 4


def test_metadata_says_what_the_text_says(train: list[Prompt], test_split: list[Prompt]) -> None:
    """Every distinct prompt: its clauses, spelled out, are its text, and have GenEval's form."""
    for prompt in {prompt: prompt for prompt in (*train, *test_split)}.values():
        known = prompt.metadata
        assert known.keys() == {"tag", "include"} | ({"exclude"} if known["tag"] == "counting" else set())
        clauses = known["include"]
        assert all(clause["class"] in CLASSES and clause.get("color", "red") in COLORS for clause in clauses)
        things = [phrase(each["class"], count=each["count"], color=each.get("color")) for each in clauses]
        if known["tag"] == "position":
            relation, target = clauses[1]["position"]
            assert target == 0
            things = [f"{things[1]} {relation} {things[0]}"]
        assert prompt == f"a photo of {' and '.join(things)}"
        if known["tag"] == "counting":
            (clause,) = clauses
            assert known["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]


def test_the_first_prompts_are_of_all_tasks(train: list[Prompt], test_split: list[Prompt]) -> None:
    """An evaluation takes the first of them."""
    assert len({prompt.metadata["tag"] for prompt in test_split[:64]}) == 6
    assert len({prompt.metadata["tag"] for prompt in train[:64]}) == 5


def test_they_are_made_once_for_all(train: list[Prompt], test_split: list[Prompt]) -> None:
    """A run goes on with the prompts it began with, in any process, with any version of the libraries."""
    assert (train[:3], test_split[-2:]) == GOLDEN
