"""A prompt that a reward cannot judge by is found before the run begins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dgpo_fast.config import load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.planning import plan
from dgpo_fast.prompts import load_prompts
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards.prompt_checks import CHECKS, check_prompts


def rewards(*names: str) -> RewardsConfig:
    return RewardsConfig(terms=tuple(RewardConfig(name=name) for name in names))


def test_the_packages_prompts_are_judged_by_the_rewards_that_they_are_for() -> None:
    for name in CHECKS:
        for split in ("train", "test"):
            check_prompts(load_prompts(f"{name}:{split}", key="prompts.train"), rewards(name), key="prompts.train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ocr", "ocr: expected a text to look for"),
        ("geneval", "geneval: the prompt 'a cat' does not say what to look for"),
        ("shapes", "shapes: "),
    ],
)
def test_another_prompt_among_them_is_named(name: str, message: str) -> None:
    prompts = [*load_prompts(f"{name}:test", key="prompts.test")[:3], "a cat"]
    with pytest.raises(UserError, match=rf"^prompts\.test: rewards: {re.escape(message)}"):
        check_prompts(prompts, rewards("jpeg", name), key="prompts.test")
    check_prompts(prompts, rewards("jpeg", "my_package.rewards:sharpness"), key="prompts.test")


def test_a_plan_finds_it(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ({"prompt": 'a sign that says "Hi"'}, {"prompt": "a cat"}))))
    config = load_recipe("sd35m-ocr", ["model.name=random:sd35-medium", f"prompts.train={prompts}"])
    (warning,) = (warning for warning in plan(config).warnings if warning.startswith("prompts.train: "))
    assert re.match("prompts.train: rewards: ocr: expected a text .* the prompt is 'a cat'", warning)
