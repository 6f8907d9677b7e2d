"""Prompts with a text to be rendered."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from dgpo_fast.prompts import load_prompts
from dgpo_fast.records import Prompt

GOLDEN = [
    'A cinematic shot of the side of a delivery van that reads "Royal River Club", in warm colours',
    'A photo of a postcard on a fridge that says "Floor 54", in warm colours',
]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Prompt]]:
    return {split: load_prompts(f"ocr:{split}", key=f"prompts.{split}") for split in ("train", "test")}  # type: ignore[misc]


def test_the_text_is_what_stands_in_quotes(splits: dict[str, list[Prompt]]) -> None:
    for prompt in (*splits["train"], *splits["test"]):
        assert isinstance(prompt, Prompt)
        assert re.findall('"(.*?)"', prompt) == [prompt.metadata["text"]]
        assert re.fullmatch(r"(The )?[A-Z][a-zA-Z.]*( [A-Za-z0-9]+)*", prompt.metadata["text"])


def test_no_text_is_asked_for_twice(splits: dict[str, list[Prompt]]) -> None:
    """So none that is tested is trained."""
    assert {split: len(prompts) for split, prompts in splits.items()} == {"train": 20_000, "test": 1_000}
    texts = {prompt.metadata["text"] for prompts in splits.values() for prompt in prompts}
    assert len(texts) == 21_000


def test_both_splits_are_of_the_same_make_up(splits: dict[str, list[Prompt]]) -> None:
    """Lengths of the texts, in words: the test's share within four standard deviations of training's."""
    trained, tested = (
        Counter(len(prompt.metadata["text"].split()) for prompt in splits[split]) for split in ("train", "test")
    )
    assert trained.keys() == {1, 2, 3, 4}
    for length, count in trained.items():
        share = count / 20_000
        assert abs(tested[length] - 1_000 * share) < 4 * (1_000 * share * (1 - share)) ** 0.5


def test_they_are_made_once_for_all(splits: dict[str, list[Prompt]]) -> None:
    """A run goes on with the prompts it began with."""
    assert splits["train"][:2] == GOLDEN
