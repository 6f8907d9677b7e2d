"""Prompt embeddings on disk: what names them, that they come back to the bit, and what damage does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dgpo_fast.models.prompt_cache import PromptCache, cache_directory, computed_by
from dgpo_fast.models.sources import EMBEDDED, END_BYTES, find_model, text_identity
from dgpo_fast.records import Conditioning

SETTINGS = {"model": {"random": "sd35-medium", "seed": 0}, "dtype": "bfloat16", "text_length": 128}
PROMPT = "two red circles"


def embedding(seed: int = 0, *, dtype: torch.dtype = torch.bfloat16) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        text_BND=torch.randn(1, 5, 8, generator=generator).to(dtype),
        pooled_BD=torch.randn(1, 4, generator=generator).to(dtype),
    )


def assert_same(found: Conditioning | None, expected: Conditioning) -> None:
    assert found is not None
    for one, other in ((found.text_BND, expected.text_BND), (found.pooled_BD, expected.pooled_BD)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [PROMPT, "", "zwei rote Würfel 🟥", "../a/b\n\0" + 1000 * "long "])
def test_another_process_reads_what_was_written(prompt: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert PromptCache(tmp_path, SETTINGS).read(prompt) is None
    assert prompt not in PromptCache(tmp_path, SETTINGS)
    PromptCache(tmp_path, SETTINGS).write(prompt, embedding(dtype=dtype))
    assert prompt in PromptCache(tmp_path, SETTINGS)
    assert_same(PromptCache(tmp_path, SETTINGS).read(prompt), embedding(dtype=dtype))


def test_a_file_is_safetensors_and_says_what_it_is(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, SETTINGS)
    cache.write(PROMPT, embedding())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.path(PROMPT)]
    assert load_file(cache.path(PROMPT)).keys() == {"text", "pooled"}
    assert json.dumps({**SETTINGS, "prompt": PROMPT}, sort_keys=True).encode() in cache.path(
        PROMPT
    ).read_bytes().replace(b'\\"', b'"')


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float32"}, {"text_length": 129}, {"model": {"random": "sd35-medium", "seed": 1}}, {"torch": "3"}],
)
def test_each_setting_is_part_of_the_key(change: dict[str, object], tmp_path: Path) -> None:
    cache, other = PromptCache(tmp_path, SETTINGS), PromptCache(tmp_path, {**SETTINGS, **change})
    cache.write(PROMPT, embedding())
    assert other.read(PROMPT) is None
    assert PROMPT not in other


def test_the_order_of_settings_is_not(tmp_path: Path) -> None:
    PromptCache(tmp_path, SETTINGS).write(PROMPT, embedding())
    assert_same(PromptCache(tmp_path, dict(reversed(SETTINGS.items()))).read(PROMPT), embedding())


@pytest.mark.parametrize("prompt", ["Two red circles", "two red circles ", "two  red circles", ""])
def test_each_letter_is_part_of_the_key(prompt: str, tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, SETTINGS)
    cache.write(PROMPT, embedding())
    assert cache.read(prompt) is None


# Where it lies


def test_where_embeddings_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGPO_FAST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("DGPO_FAST_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "dgpo-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_directory() == tmp_path / "home" / ".cache" / "dgpo-fast"


def test_processor_and_libraries_are_named() -> None:
    named = computed_by(torch.device("cpu"))
    assert named.keys() == {"processor", "torch", "diffusers", "transformers"}
    assert named["torch"] == torch.__version__
    assert all(named.values())


# Damage


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_bit_of_the_last_number(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def lose_the_end_of_the_data(content: bytes) -> bytes:
    """As a file may be after a crash: of the right length, its last block never written."""
    return content[:-40] + bytes(40)


@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: b"\xff" * 200, cut, flip_a_bit_of_the_last_number,
               lose_the_end_of_the_data],
)  # fmt: skip
def test_what_is_damaged_is_absent_and_replaced(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, SETTINGS)
    cache.write(PROMPT, embedding())
    cache.path(PROMPT).write_bytes(damage(cache.path(PROMPT).read_bytes()))
    assert cache.read(PROMPT) is None
    cache.write(PROMPT, embedding())
    assert_same(cache.read(PROMPT), embedding())


def test_a_file_of_another_prompt_is_not_taken_for_this_one(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, SETTINGS)
    cache.write("a blue square", embedding())
    shutil.copy(cache.path("a blue square"), cache.path(PROMPT))
    assert cache.read(PROMPT) is None


def test_a_file_of_others_is_not_taken_for_ours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cache = PromptCache(tmp_path, SETTINGS)
    cache.directory.mkdir(parents=True)
    save_file({"weights": torch.zeros(3)}, cache.path(PROMPT))
    assert cache.read(PROMPT) is None


# Disks that take nothing


def test_a_full_disk_is_one_warning(
    files_up_to: Callable[[int], AbstractContextManager[None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = PromptCache(tmp_path, SETTINGS)
    cache.write("before", embedding())
    with files_up_to(100):
        cache.write(PROMPT, embedding())
        cache.write("another", embedding())
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith(f"warning: prompt embeddings are not kept in {cache.directory} (File too large); point ")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.path("before")]
    assert_same(cache.read("before"), embedding())


@pytest.mark.parametrize("place", ["file", "file/below", "locked"])
def test_a_directory_that_takes_nothing_is_one_warning(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    if place == "locked":  # permissions do not stop root
        monkeypatch.setattr("dgpo_fast.models.prompt_cache.write_atomically", refuse)
    cache = PromptCache(tmp_path / place, SETTINGS)
    for prompt in (PROMPT, "another"):
        assert cache.read(prompt) is None
        cache.write(prompt, embedding())
    assert capsys.readouterr().err.count("warning: prompt embeddings are not kept in") == 1


# Several at once

WRITER = """
import sys, torch
from pathlib import Path
from dgpo_fast.models.prompt_cache import PromptCache
from dgpo_fast.records import Conditioning
cache = PromptCache(Path(sys.argv[1]), {})
row = Conditioning(text_BND=torch.full((1, 200, 512), 2.5), pooled_BD=torch.full((1, 64), 2.5))
print("ready", flush=True)
sys.stdin.readline()
torn = 0
for _ in range(100):
    cache.write("the same prompt", row)
    found = cache.read("the same prompt")
    torn += found is None or not torch.equal(found.text_BND, row.text_BND)
print(torn)
"""


def test_two_processes_write_the_same_prompt(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """A hundred times each, both at once: no one ever reads half a file, and nothing is left behind but the file."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], env=child_environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.communicate() for writer in writers] == [("0\n", ""), ("0\n", "")]
    cache = PromptCache(tmp_path, {})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.path("the same prompt")]


# The identity of a model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def test_a_directory_is_known_by_its_text_files(directory: Path) -> None:
    """Wherever it lies, and whatever its transformer is."""
    before = text_identity(find_model(str(directory)))
    moved = directory.rename(directory.with_name("moved"))
    (moved / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"another")
    assert text_identity(find_model(str(moved))) == before


def change_the_weights_only(directory: Path) -> None:
    """Same length, same times: what a fine-tuned encoder from an archive without times looks like."""
    weights = directory / "text_encoder_3" / "model.safetensors"
    assert weights.stat().st_size > 2 * END_BYTES
    times = weights.stat()
    weights.write_bytes(flip_a_bit_of_the_last_number(weights.read_bytes()))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        change_the_weights_only,
        lambda directory: (directory / "text_encoder_3" / "model.safetensors").touch(),
        lambda directory: (directory / "tokenizer_2" / "extra.json").write_text("{}"),
        lambda directory: shutil.rmtree(directory / "tokenizer_3"),
        lambda directory: (directory / "model_index.json").write_text(
            (directory / "model_index.json").read_text().replace("T5EncoderModel", "T5EncoderModem")
        ),
    ],
)
def test_any_change_of_a_text_file_makes_another_model(change: Callable[[Path], object], directory: Path) -> None:
    before = text_identity(find_model(str(directory)))
    change(directory)
    assert text_identity(find_model(str(directory))) != before


def test_a_random_model_is_known_by_name_and_seed() -> None:
    assert text_identity(find_model("random:sd35-large")) == {"random": "sd35-large", "seed": 0}


def test_a_hub_model_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "models--some--model" / "snapshots" / "0123abc" / "model_index.json"
    index.parent.mkdir(parents=True)
    shutil.copy(EMBEDDED / "model_index.json", index)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file, revision: asked.append((name, file, revision)) or str(index),
    )
    identity = text_identity(find_model("some/model", revision="v1"))
    assert identity == {"hub": "some/model", "commit": "0123abc"}
    assert set(asked) == {("some/model", "model_index.json", "v1")}
