"""Where weights are looked for, and what a user reads who has none: no test asks a network."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from rich.console import Console

from dgpo_fast import load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.planning import plan
from dgpo_fast.rewards import known_rewards, load_reward
from dgpo_fast.rewards.base import absent_weights
from dgpo_fast.rewards.listing import as_table, lacking
from dgpo_fast.rewards.pretrained import Pretrained

WEIGHTS = Pretrained(
    repo="somebody/model", key="rewards.some.path", files=("config.json", "model.safetensors"), gigabytes=3.5,
    licence="MIT",
)  # fmt: skip
COMMIT = 40 * "a"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network, as HF_HUB_OFFLINE=1 has it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is allowed, but nobody answers where the hub should be."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def write(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def cached(cache: Path, *names: str) -> Path:
    """A snapshot as the hub's client keeps it."""
    model = cache / "models--somebody--model"
    write(model / "refs")
    (model / "refs" / "main").write_text(COMMIT)
    return write(model / "snapshots" / COMMIT, *names)


# A directory


def test_a_directory_with_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the user's own."""
    directory = write(tmp_path / "weights", *WEIGHTS.files)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert WEIGHTS.find(str(directory)) == WEIGHTS.find("~/weights") == directory
    assert WEIGHTS.absence("~/weights") is None


def test_a_directory_that_lacks_a_file(tmp_path: Path) -> None:
    directory = write(tmp_path / "weights", "config.json")
    expected = (
        f"rewards.some.path: {directory} has no model.safetensors; expected the files of "
        "https://huggingface.co/somebody/model: config.json, model.safetensors"
    )
    assert refusal(lambda: WEIGHTS.find(str(directory))) == expected
    assert refusal(lambda: WEIGHTS.absence(str(directory))) == expected


def test_no_directory(tmp_path: Path) -> None:
    file = write(tmp_path, "model.safetensors") / "model.safetensors"
    assert refusal(lambda: WEIGHTS.find(str(file))).startswith(f"rewards.some.path: {file} is a file; expected a dir")
    nowhere = tmp_path / "nowhere"
    assert refusal(lambda: WEIGHTS.find(str(nowhere))).startswith(f"rewards.some.path: {nowhere} is not there; expec")


def test_patterns(tmp_path: Path) -> None:
    sharded = Pretrained(repo="a/b", key="k", files=("*.json", "model*.safetensors"), gigabytes=1, licence="MIT")
    directory = write(tmp_path / "weights", "config.json", "model-00001-of-00002.safetensors")
    assert sharded.find(str(directory)) == directory
    assert "`hf download a/b --include '*.json' --include 'model*.safetensors' --local-dir DIR`" in refusal(
        lambda: sharded.find(None)
    )


# The cache and the hub


@pytest.mark.parametrize("network", ["offline", "unreachable"])
def test_the_cache_serves_without_a_network(network: str, cache: Path, request: pytest.FixtureRequest) -> None:
    if network == "unreachable":
        request.getfixturevalue("unreachable")
    snapshot = cached(cache, *WEIGHTS.files)
    assert WEIGHTS.find(None) == snapshot
    assert WEIGHTS.absence(None) is None


def test_no_weights_and_no_network() -> None:
    message = refusal(lambda: WEIGHTS.find(None))
    assert message.startswith(
        "rewards.some.path: the weights somebody/model (3.5 GB, MIT) are not on this machine and cannot be downloaded: "
        "run `hf download somebody/model config.json model.safetensors --local-dir DIR` where there is a network, "
        "and set rewards.some.path=DIR (LocalEntryNotFoundError: "
    )


def test_no_weights_and_nobody_answers(unreachable: None) -> None:
    message = refusal(lambda: WEIGHTS.find(None))
    assert "set rewards.some.path=DIR (" in message
    assert "ConnectError" in message


def test_an_interrupted_download_is_not_taken_for_whole(cache: Path) -> None:
    """Where the client does not know what the snapshot should have, it gives what is there."""
    cached(cache, "config.json")
    assert "set rewards.some.path=DIR (model.safetensors did not come)" in refusal(lambda: WEIGHTS.find(None))
    assert WEIGHTS.absence(None) is not None


def test_what_a_plan_says() -> None:
    assert WEIGHTS.absence(None) == (
        "the weights somebody/model (3.5 GB, MIT) are not in the local cache: `hf download somebody/model config.json "
        "model.safetensors` or the first run fetches them"
    )


# The rewards of the package

REPOS = {
    "rewards.pickscore.path": "yuvalkirstain/PickScore_v1 (3.94 GB",
    "rewards.clipscore.path": "openai/clip-vit-large-patch14 (1.71 GB",
    "rewards.hpsv2.path": "xswu/HPSv2 (3.94 GB, Apache 2.0)",
    "rewards.hpsv2.tokenizer_path": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K (2 MB, MIT)",
    "rewards.imagereward.path": "THUDM/ImageReward (1.79 GB, Apache 2.0)",
    "rewards.imagereward.tokenizer_path": "google-bert/bert-base-uncased (0.5 MB, Apache 2.0)",
    "rewards.aesthetic.path": "camenduru/improved-aesthetic-predictor (3.7 MB, Apache 2.0)",
    "rewards.aesthetic.clip_path": "openai/clip-vit-large-patch14 (1.71 GB",
}


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic"])
def test_a_reward_without_its_weights(name: str) -> None:
    message = refusal(lambda: load_reward(name))
    assert message.startswith(f"rewards.{name}.path: the weights {REPOS[f'rewards.{name}.path']}")
    assert f"set rewards.{name}.path=DIR" in message


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic"])
def test_what_a_plan_says_of_a_reward(name: str) -> None:
    """One line for each place of weights, and nothing is loaded."""
    rewards = load_recipe("tiny-dgpo", [f"rewards.terms=[{{name: {name}}}]"]).rewards
    places = [repo for key, repo in REPOS.items() if key.startswith(f"rewards.{name}.")]
    absent = absent_weights(name, rewards)
    assert len(absent) == len(places)
    for (weights, line), place in zip(absent, places, strict=True):
        assert weights.about.startswith(place)
        assert line.startswith(f"the weights {weights.about} are not in the local cache: `hf download")


def test_a_plan_warns_of_weights_that_are_absent() -> None:
    overrides = ["model.name=random:sd35-medium", "prompts.train=shapes:train", "prompts.test=shapes:test"]
    warnings = plan(load_recipe("sd35m-pickscore", overrides)).warnings
    assert any(line.startswith("reward 'pickscore': the weights yuvalkirstain/PickScore_v1") for line in warnings)


def test_a_plan_refuses_a_directory_without_weights(tmp_path: Path) -> None:
    overrides = ["model.name=random:sd35-medium", f"rewards.pickscore.path={tmp_path}"]
    message = refusal(lambda: plan(load_recipe("sd35m-pickscore", overrides)))
    assert message.startswith(f"rewards.pickscore.path: {tmp_path} has no config.json")


# What `dgpo-fast rewards` says


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("jpeg_compressibility", []),
        ("pickscore", ["will download yuvalkirstain/PickScore_v1 (3.94 GB, no licence named; the code's is MIT)"]),
        ("deqa", ["needs rewards.deqa.url and .model: an OpenAI-compatible server"]),
    ],
)
def test_what_a_reward_lacks_here(name: str, lines: list[str]) -> None:
    assert list(lacking(name)) == lines


def test_a_reward_whose_extra_is_not_installed_says_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.delitem(sys.modules, "dgpo_fast.rewards.ocr", raising=False)
    (line,) = lacking("ocr")
    assert line == "'ocr' needs rapidocr, which is not installed: pip install 'dgpo-fast[ocr]'"
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(as_table())
    assert "pip install 'dgpo-fast[ocr]'" in console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_every_reward_is_listed(width: int) -> None:
    """And every repository in one piece, to be copied."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(as_table())
    shown = console.export_text()
    assert all(re.search(rf"^ *{name} ", shown, re.MULTILINE) for name in known_rewards())
    absent = [line.split()[2] for name in known_rewards() for line in lacking(name) if line.startswith("will download")]
    assert len(absent) > 6 and all(f"{repository} " in shown for repository in absent)
