"""The reward `ocr`, with the engine itself on texts that are drawn here."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.records import Prompt
from dgpo_fast.reward_config import OcrConfig, RewardConfig, RewardsConfig
from dgpo_fast.rewards import Scorer, load_reward
from dgpo_fast.rewards.ocr import OcrReward, similarity, target_text

SIDE = 256


def written(*lines: str, ink: str = "black", paper: str = "white") -> Tensor:
    """A picture of text, float32 [3, H, W]."""
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    draw = ImageDraw.Draw(picture)
    for place, line in enumerate(lines):
        draw.text((16, 24 + 72 * place), line, font=ImageFont.load_default(size=40), fill=ink)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def scores(reward: OcrReward, images: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in reward(torch.stack(list(images)), prompts).items()}


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward(OcrConfig(threads=2), device=torch.device("cpu"))


def test_what_is_written_is_read(reward: OcrReward) -> None:
    images = [written("Hello"), written("Spring", "Sale 2024"), written("OPEN", ink="white", paper="navy"), written()]
    assert reward.read(torch.stack(images)) == ["Hello", "SpringSale 2024", "OPEN", ""]


def test_scores_follow_the_letters(reward: OcrReward) -> None:
    """The text itself in any case and spacing; one letter of five wrong; one of five missing; more than asked; none."""
    images = [
        written("Spring", "Sale 2024"),
        written("Hallo"),
        written("Helo"),
        written("Hello", "World"),
        written(),
    ]
    prompts = ['A sign reading "SPRING SALE 2024" in a shop', *['The word "Hello" on a wall'] * 4]
    found = scores(reward, images, prompts)
    assert found["ocr"] == pytest.approx([1, 1 - 1 / 5, 1 - 1 / 5, 1, 0])
    assert found["exact"] == [1, 0, 0, 0, 0]


def test_a_score_does_not_depend_on_the_batch(reward: OcrReward) -> None:
    texts = ["Hello", "Hollow World", "Gate 13", "", "Sale", "Step Goal"]
    images = [written(*text.split(), ink=ink) for text, ink in zip(texts, ["black", "red", "blue"] * 2, strict=True)]
    prompts = ['"Hello world"'] * len(images)
    together = scores(reward, images, prompts)
    alone = [scores(reward, [image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
    assert len(set(together["ocr"])) > 3
    assert together == {name: [one[name][0] for one in alone] for name in ("ocr", "exact")}
    single = OcrReward(OcrConfig(threads=1), device=torch.device("cpu"))
    assert scores(single, images, prompts) == together


def test_no_images(reward: OcrReward) -> None:
    assert reward(torch.zeros(0, 3, SIDE, SIDE), []) == {"ocr": [], "exact": []}


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new engine loads its models and reads where no socket can be made."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    new = OcrReward(OcrConfig(), device=torch.device("cpu"))
    assert new.read(written("Hello")[None]) == ["Hello"]


def test_a_recipe_trains_on_the_soft_score() -> None:
    term = RewardConfig(name="ocr")
    scored = Scorer(RewardsConfig(terms=(term,), ocr=OcrConfig(threads=1)))(written("Hallo")[None], ['"Hello"'])
    assert scored.reward_B.tolist() == pytest.approx([0.8])
    assert list(scored.metrics) == ["ocr", "exact"]


def test_the_number_of_threads_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this rank's share of the cores, or a worker process's."""
    monkeypatch.setattr("dgpo_fast.environment.num_cores", lambda: 16)
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    given_threads = RewardsConfig(terms=(RewardConfig(name="ocr"),), ocr=OcrConfig(threads=7))
    rewards = [load_reward("ocr", given_threads), load_reward("ocr")]
    assert [reward._num_threads for reward in rewards if isinstance(reward, OcrReward)] == [7, 3]
    monkeypatch.setenv("DGPO_FAST_REWARD_PROCESSES", "2")
    assert OcrReward(OcrConfig(), device=torch.device("cpu"))._num_threads == 1
    monkeypatch.delenv("DGPO_FAST_REWARD_PROCESSES")
    monkeypatch.setenv("WORLD_SIZE", "32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert OcrReward(OcrConfig(), device=torch.device("cpu"))._num_threads == 1


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "dgpo_fast.rewards.ocr")
    with pytest.raises(
        UserError, match=r"'ocr' needs rapidocr, which is not installed: pip install 'dgpo-fast\[ocr\]'"
    ):
        load_reward("ocr")


# What is looked for


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('A cake that says "Happy Birthday" in icing', "Happy Birthday"),
        ('"One" and then "Two"', "One"),
        (Prompt("A sign", {"text": "Open late"}), "Open late"),
        (Prompt('A "sign"', {"text": "Open late"}), "Open late"),
        (Prompt('A "sign"', {"tag": "text"}), "sign"),
    ],
)
def test_the_target_is_the_metadatas_or_what_is_quoted(prompt: str, text: str) -> None:
    assert target_text(prompt) == text


@pytest.mark.parametrize(
    "prompt", ["A sign", 'A sign reading "Open', 'Nothing "" here', 'A " " blank', Prompt('"a"', {"text": 3})]
)
def test_a_prompt_without_a_target(reward: OcrReward, prompt: str) -> None:
    with pytest.raises(UserError, match=r"^rewards: ocr: expected a text to look for") as error:
        reward(written("Open")[None], [prompt])
    assert str(prompt) in str(error.value)
    assert "\n" not in str(error.value)


# The rule


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's, from its recursion."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@given(found=st.text("abc", max_size=8), target=st.text("abc", min_size=1, max_size=6))
def test_similarity_is_one_minus_the_capped_distance(found: str, target: str) -> None:
    distance = 0 if target in found else min(edit_distance(found, target), len(target))
    assert similarity(found, target) == pytest.approx(1 - distance / len(target))


def test_surplus_text_costs_no_more_than_all_letters() -> None:
    assert similarity("somethingelseentirely", "cat") == 0
    assert similarity("thecatsat", "cat") == 1
    assert similarity("", "cat") == 0
