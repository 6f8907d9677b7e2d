"""Prompts: sources, their mistakes, and which prompts an iteration draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import PromptSampler, digest_of, load_prompts
from dgpo_fast.records import Prompt
from dgpo_fast.shapes.captions import parse_caption


def drawn(sampler: PromptSampler, iterations: range) -> list[str]:
    return [prompt for iteration in iterations for prompt in sampler.draw(iteration)]


@given(num_prompts=st.integers(1, 12), per_iteration=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_every_prompt_is_drawn_once_an_epoch(num_prompts: int, per_iteration: int, seed: int) -> None:
    """Epochs follow each other without a gap, wherever iterations end."""
    prompts = [str(number) for number in range(num_prompts)]
    iterations = range(-(-3 * num_prompts // per_iteration))
    sequence = drawn(PromptSampler(prompts, per_iteration=per_iteration, seed=seed), iterations)
    for first in range(0, len(sequence) - num_prompts + 1, num_prompts):
        assert sorted(sequence[first : first + num_prompts], key=int) == prompts


def test_draws_depend_on_the_iteration_alone() -> None:
    """In any order, after any others, across the boundary of an epoch: a resumed run draws the same."""
    prompts = [str(number) for number in range(7)]
    sampler = PromptSampler(prompts, per_iteration=3, seed=5)
    straight = [sampler.draw(iteration) for iteration in range(10)]
    assert [PromptSampler(prompts, per_iteration=3, seed=5).draw(iteration) for iteration in range(10)] == straight
    assert [sampler.draw(iteration) for iteration in reversed(range(10))] == straight[::-1]


def test_another_seed_and_another_epoch_give_another_order() -> None:
    prompts = [str(number) for number in range(20)]
    first, second = (PromptSampler(prompts, per_iteration=20, seed=seed) for seed in (0, 1))
    assert len({first.draw(0), first.draw(1), second.draw(0), tuple(prompts)}) == 4


def test_upcoming_prompts_are_those_that_will_be_drawn() -> None:
    """Over the end of an epoch too, and without a change of what is drawn now."""
    sampler = PromptSampler([str(number) for number in range(7)], per_iteration=4, seed=0)
    drawn = [sampler.draw(iteration) for iteration in range(5)]
    soon = sampler.upcoming(1, 5, range(2, 4))
    assert next(soon) == drawn[1][2]
    assert sampler.draw(0) == drawn[0]
    assert [*soon] == [drawn[1][3], *(prompt for prompts in drawn[2:] for prompt in prompts[2:])]


def test_an_iteration_may_be_longer_than_an_epoch() -> None:
    drawn_once = PromptSampler(["a", "b"], per_iteration=5, seed=0).draw(0)
    assert sorted(Counter(drawn_once).values()) == [2, 3]


def test_a_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("  a red circle \n\n\tzwei blaue Würfel\r\n   \n", encoding="utf-8")
    assert load_prompts(str(file), key="prompts.train") == ["a red circle", "zwei blaue Würfel"]


def test_shapes_prompts_keep_to_their_split() -> None:
    train, test = (load_prompts(f"shapes:{split}", key="prompts.train") for split in ("train", "test"))
    assert not any(parse_caption(prompt).held_out for prompt in train)
    assert all(parse_caption(prompt).held_out for prompt in test)
    assert len(set(test)) == len(test) >= 64


def test_prompts_in_the_style_of_drawbench_are_eight_of_each_category() -> None:
    prompts = load_prompts("drawbench-style:test", key="prompts.test")
    assert len({*prompts}) == len(prompts) == 64
    categories = Counter(prompt.metadata["category"] for prompt in prompts if isinstance(prompt, Prompt))
    assert categories == dict.fromkeys(
        ("colours", "counting", "conflicting", "descriptions", "text", "positional", "rare words", "misspellings"), 8
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n\t\n", "holds no prompt"),
        (b"\xff\xfe\xfa", "cannot read"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"prompts\.test: .*{message}"):
        load_prompts(str(file), key="prompts.test")


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.json"])
def test_files_whose_lines_are_no_prompts_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('["a cat",\n"a dog"]')
    with pytest.raises(UserError, match=r"prompts\.train: .* expected text, \.jsonl or \.parquet"):
        load_prompts(str(tmp_path / name), key="prompts.train")


def test_a_prompt_of_a_text_file_has_no_metadata(tmp_path: Path) -> None:
    """But has the attribute, as a reward's author expects."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (prompt,) = load_prompts(str(tmp_path / "prompts.txt"), key="prompts.train")
    assert isinstance(prompt, Prompt) and prompt.metadata == {}


@pytest.mark.parametrize("source", [None, "no/such/file.txt", "shapes:tests", "."])
def test_sources_that_do_not_exist_are_refused(source: str | None) -> None:
    with pytest.raises(UserError, match=r"^prompts\.train: ") as error:
        load_prompts(source, key="prompts.train")
    assert source is None or repr(source) in str(error.value)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(name: str, tmp_path: Path) -> None:
    line = {"prompts.txt": "a cat", "prompts.jsonl": '{"prompt": "a cat"}'}[name]
    (tmp_path / name).write_text(f"{line}\n", encoding="utf-8-sig")
    assert load_prompts(str(tmp_path / name), key="prompts.train") == ["a cat"]


def test_prompts_are_known_by_their_digest() -> None:
    """Of text, metadata and order."""
    cat, dog = Prompt("a cat", {"tag": "x", "n": 1}), Prompt("a dog")
    assert digest_of([cat, dog]) == digest_of([Prompt("a cat", {"n": 1, "tag": "x"}), "a dog"])
    others = [[dog, cat], [cat], [Prompt("a cat", {"tag": "y", "n": 1}), dog], ["a cat", dog], ["a cata dog"]]
    assert len({digest_of(each) for each in ([cat, dog], *others)}) == 6
