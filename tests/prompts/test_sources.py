"""Sources that know more than texts: JSON lines, Parquet, datasets; and what is wrong with them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from datasets import config as datasets_config
from pyarrow import parquet
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.prompts import PromptSampler, load_prompts
from dgpo_fast.prompts.sources import missing_dataset
from dgpo_fast.records import Prompt
from dgpo_fast.rewards import base

ROWS: list[dict[str, Any]] = [
    {"prompt": "a photo of a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    {"prompt": "two dogs", "tag": "counting", "include": [{"class": "dog", "count": 2}]},
    {"prompt": "a photo of a bench", "tag": "another row of the same text", "include": []},
]
FIRST_ROWS = {row["prompt"]: {"tag": row["tag"], "include": row["include"]} for row in ROWS[:2]}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and caches that are empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    def write(*written: str) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(written), encoding="utf-8")
        return str(path)

    return write


def metadata_of(prompts: Sequence[str]) -> dict[str, Any]:
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    return {prompt: prompt.metadata for prompt in prompts}  # type: ignore[attr-defined]


# JSON lines


def test_json_lines_keep_every_line_and_all_that_is_known(lines: Callable[..., str]) -> None:
    """Repeated lines too: how often a prompt is there is how often it is drawn."""
    odd = {"prompt": " line\u2028separator ", "nested": {"a": [None, 1.5]}}
    prompts = load_prompts(lines(*map(json.dumps, ROWS), "", json.dumps(odd, ensure_ascii=False)), key="prompts.train")
    assert prompts == [*(row["prompt"] for row in ROWS), "line\u2028separator"]
    known = [{key: value for key, value in row.items() if key != "prompt"} for row in (*ROWS, odd)]
    assert [prompt.metadata for prompt in prompts] == known  # type: ignore[attr-defined]


def test_another_key_may_be_the_prompt(lines: Callable[..., str]) -> None:
    source = f"{lines(json.dumps({'caption': 'a cat', 'prompt': 'not this'}))}#caption"
    assert metadata_of(load_prompts(source, key="prompts.train")) == {"a cat": {"prompt": "not this"}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a cat"', r"not JSON: Expecting ',' delimiter at column \d+"),
        ('"a cat"', "expected an object with the key 'prompt', got \"a cat\""),
        ('{"promt": "a cat", "tag": "x"}', r"no key 'prompt'; did you mean 'promt'\?; there are: promt, tag"),
        ('{"text": "a cat"}', "no key 'prompt'; there are: text"),
        ('{"prompt": ["a cat"]}', r"'prompt' is no text: \['a cat'\]"),
        ('{"prompt": " "}', "'prompt' is no text: ' '"),
        (r'{"prompt": "a \ud83d cat"}', r"'prompt' holds half of a character, a lone surrogate: 'a \\ud83d cat'"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, message: str, lines: Callable[..., str]) -> None:
    source = lines(json.dumps(ROWS[0]), "", line)
    refused(source, rf"^prompts\.train: '{re.escape(source)}', line 3: {message}$")


def test_json_lines_without_a_prompt(lines: Callable[..., str]) -> None:
    refused(lines("", "  "), "holds no prompt$")


# Parquet


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    def write(columns: dict[str, Any]) -> str:
        path = tmp_path / "prompts.parquet"
        parquet.write_table(pa.table(columns), path)
        return str(path)

    return write


def test_a_table_names_each_text_once(table: Callable[..., str]) -> None:
    """With its first row's metadata, of which bytes and times are no part; rows without text are none."""
    rows = [*ROWS, {"prompt": None, "tag": "x", "include": []}, {"prompt": "  ", "tag": "x", "include": []}]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    images = [b"\x89PNG"] * len(rows)
    times = pa.array([0] * len(rows), pa.timestamp("s"))
    source = table({"jpg": images, **columns, "made": times, "image": [{"bytes": image} for image in images]})
    assert metadata_of(load_prompts(source, key="prompts.train")) == FIRST_ROWS


@pytest.mark.parametrize("name", ["caption", "prompt"])
def test_a_table_may_have_nothing_but_prompts(name: str, table: Callable[..., str]) -> None:
    source = table({name: ["one", "two", "one"]})
    prompts = load_prompts(source if name == "prompt" else f"{source}#{name}", key="prompts.train")
    assert metadata_of(prompts) == {"one": {}, "two": {}}


def test_a_table_without_such_a_column(table: Callable[..., str]) -> None:
    source = table({"captions": ["one"], "label": [1]})
    refused(source, rf"has no column 'prompt'; name one of its own as in {re.escape(source)}#captions \(there are: ")
    refused(f"{source}#caption", r"has no column 'caption'; did you mean 'captions'\?")
    refused(f"{source}#label", "the column 'label' of .* is of int64, expected text")


def test_parquet_that_is_none(tmp_path: Path, table: Callable[..., str]) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    refused(str(tmp_path / "torn.parquet"), "cannot read .*torn.parquet': ")
    refused(str(tmp_path / "nowhere.parquet"), "no file .*nowhere.parquet'")
    refused(table({"prompt": pa.array([], pa.string())}), "holds no prompt")


# Datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset as the library itself writes it: of two splits, of one, and as Parquet files."""
    dataset = datasets.Dataset.from_list(ROWS)
    other = datasets.Dataset.from_dict({"caption": ["three birds"]})
    datasets.DatasetDict({"train": dataset, "held_out": other}).save_to_disk(tmp_path / "splits")
    dataset.save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    dataset.to_parquet(tmp_path / "files" / "train.parquet")
    dataset.select([1]).to_parquet(tmp_path / "files" / "test.parquet")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "prompts.parquet").write_bytes(b"PAR1 and no more")
    return tmp_path


@pytest.mark.parametrize("place", ["splits", "splits:train", "one", "files", "files:train", "files:train#prompt"])
def test_a_dataset_gives_its_rows(place: str, saved: Path) -> None:
    assert metadata_of(load_prompts(f"hf:{saved}/{place}", key="prompts.train")) == FIRST_ROWS


def test_split_and_column_of_a_dataset(saved: Path) -> None:
    found = load_prompts(f"hf:{saved}/splits:held_out#caption", key="prompts.train")
    assert metadata_of(found) == {"three birds": {}}
    assert load_prompts(f"hf:{saved}/files:test", key="prompts.train") == ["two dogs"]
    assert load_prompts(f"hf:{saved}/files:train[:1]", key="prompts.train") == ["a photo of a bench"]
    assert load_prompts(f"hf:{saved}/files#tag", key="prompts.train") == [row["tag"] for row in ROWS]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "splits:held_outs",
            r"ValueError: no split 'held_outs'; did you mean 'held_out'\?; there are: train, held_out",
        ),
        ("files:tests", "Unknown split"),
        ("torn", "cannot load 'hf:.*/torn': ArrowInvalid: Parquet magic bytes not found"),
        (
            "splits:held_out",
            r"no column 'prompt'; name one of its own as in .*:held_out#caption \(there are: caption\)",
        ),
        ("nowhere", "cannot load 'hf:.*/nowhere': FileNotFoundError: "),
    ],
)
def test_datasets_that_do_not_have_it(place: str, message: str, saved: Path) -> None:
    refused(f"hf:{saved}/{place}", message)


def test_without_a_network() -> None:
    """One line, and a plan says beforehand what the run will want to download."""
    source = "hf:someone/their-prompts#caption"
    refused(source, r"cannot load 'hf:someone/their-prompts#caption': \w+: ")
    assert missing_dataset(source) == (
        "the dataset someone/their-prompts is not in the local cache: `python -c 'import datasets; "
        'datasets.load_dataset("someone/their-prompts")\'` or the first run downloads it'
    )
    refused("hf:", "names no dataset; expected hf:OWNER/NAME")


def test_what_is_there_is_not_missing(saved: Path) -> None:
    assert missing_dataset(f"hf:{saved}/one") is None
    assert missing_dataset("geneval:train") is None
    (saved / "cache" / "someone___their-prompts").mkdir(parents=True)
    assert missing_dataset("hf:Someone/their-prompts:test") is None


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [("hf:someone/theirs", "datasets", "datasets"), ("prompts.parquet#caption", "pyarrow", "parquet")],
)
def test_without_the_library(source: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(package), *sys.meta_path])
    needs = rf"{re.escape(repr(source))} needs {package}, which is not installed: pip install 'dgpo-fast\[{extra}\]'"
    refused(source, needs)
    if source.startswith("hf:"):
        assert re.search(needs, missing_dataset(source) or "")


class Absent:
    """Has the import system find no such package, as where it is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("source", ["geneval:trian", "genevel:train", "ocr:tests"])
def test_a_mistyped_generator_is_named(source: str) -> None:
    refused(source, rf"no file '{source}'; did you mean '(geneval|ocr):(train|test)'\?")


def refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^prompts\.train: ") as error:
        load_prompts(source, key="prompts.train")
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


# What becomes of them


def test_what_is_drawn_keeps_its_metadata(lines: Callable[..., str]) -> None:
    """And depends on the iteration alone: a resumed run asks for the same, and knows the same of it."""
    prompts = load_prompts(lines(*map(json.dumps, ROWS[:2])), key="prompts.train")
    straight = [PromptSampler(prompts, per_iteration=3, seed=1).draw(iteration) for iteration in range(4)]
    resumed = PromptSampler(
        load_prompts(lines(*map(json.dumps, ROWS[:2])), key="prompts.train"), per_iteration=3, seed=1
    )
    assert [resumed.draw(iteration) for iteration in range(2, 4)] == straight[2:]
    assert all(prompt.metadata == FIRST_ROWS[prompt] for drawn in straight for prompt in drawn)  # type: ignore[attr-defined]


def test_an_epoch_of_many_prompts_asks_for_each_once() -> None:
    """In which no prompt comes twice but where the source repeats it."""
    prompts = load_prompts("geneval:test", key="prompts.test")
    sampler = PromptSampler(prompts, per_iteration=7, seed=0)
    drawn = [prompt for iteration in range(79) for prompt in sampler.draw(iteration)]
    assert len(drawn) == len(prompts) == 553
    assert {prompt: prompt.metadata for prompt in drawn} == metadata_of(prompts)  # type: ignore[attr-defined]


def test_a_run_hands_its_rewards_what_is_known_of_prompts(
    quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the trainer's batches, the scoring thread and both evaluations."""
    tags: list[str] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> list[float]:
        tags.extend(prompt.metadata["tag"] for prompt in prompts)  # type: ignore[attr-defined]
        return [float(len(prompt)) for prompt in prompts]

    monkeypatch.setattr(base, "_FACTORIES", {"tags": lambda: reward})
    sources = ("prompts.train=geneval:train", "prompts.test=geneval:test")
    short = ("steps=1", "checkpoints.every=1", "evaluation.images_per_prompt=1", "rewards.terms=[{name: tags}]")
    Trainer(load_recipe("tiny-dgpo", [*quick, *sources, *short]), tmp_path / "run").train()
    drawn = PromptSampler(load_prompts("geneval:train", key="x"), per_iteration=2, seed=0).draw(0)
    tested = load_prompts("geneval:test", key="x")[:2]
    expected = [prompt.metadata["tag"] for prompt in (*tested, *(each for each in drawn for _ in range(4)), *tested)]  # type: ignore[attr-defined]
    assert tags == expected
