"""Whether prompts are what the rewards need: found before a run begins, not when one of them is drawn, days later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import RewardsConfig
from dgpo_fast.rewards.geneval_rules import asked_of
from dgpo_fast.rewards.ocr_target import target_text
from dgpo_fast.rewards.shapes import caption_of

CHECKS: Mapping[str, Callable[[str], object]] = {"geneval": asked_of, "ocr": target_text, "shapes": caption_of}
"""Of rewards that ask more of a prompt than to be text; they need nothing of what the rewards themselves run on."""


def check_prompts(prompts: Iterable[str], rewards: RewardsConfig, *, key: str) -> None:
    """Makes sure that every reward can judge by each of the prompts; monitors by those of evaluations.

    Raises:
        UserError: naming the recipe's `key`: one cannot.
    """
    names = rewards.names if key == "prompts.test" else rewards.trained
    checks = [CHECKS[name] for name in names if name in CHECKS]
    for prompt in prompts:
        for check in checks:
            try:
                check(prompt)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
