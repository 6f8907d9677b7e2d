"""Advice is of settings that the recipe has, changes them, and can be taken."""

from __future__ import annotations

import pytest

from dgpo_fast.config import load_recipe, recipe_names
from dgpo_fast.guard.advice import advice
from dgpo_fast.guard.held_out import HELD_OUT_RULES
from dgpo_fast.guard.rules import RULES


@pytest.mark.parametrize("recipe", recipe_names())
def test_each_advice_can_be_taken_alone(recipe: str) -> None:
    config = load_recipe(recipe)
    for name in (*RULES, *HELD_OUT_RULES):
        lines = advice(name, config)
        assert lines, name
        for line in lines:
            if "=" in line:
                change, now = line.removesuffix(")").split(" (now ")
                section, setting = change.partition("=")[0].split(".")
                before = getattr(getattr(config, section), setting)
                assert now == ("null" if before is None else f"{before:.3g}"), line
                assert load_recipe(recipe, [change]) != config, line


@pytest.mark.parametrize(
    ("recipe", "overrides", "name", "expected"),
    [
        ("tiny-dgpo", [], "reward", ("optimizer.lr=0.001 (now 0.003)", "algorithm.kl_coef=0.3 (now 0.1)")),
        ("tiny-dgpo", ["algorithm.kl_coef=0", "algorithm.clip=null"], "kl",
         ("optimizer.lr=0.001 (now 0.003)", "algorithm.kl_coef=0.02 (now 0)", "algorithm.clip=0.01 (now null)")),
        ("tiny-dgpo", [], "saturation",
         ("algorithm.beta=33.3 (now 100)", "algorithm.kl_cfg=1 (now 3)", "optimizer.lr=0.001 (now 0.003)")),
        ("tiny-dgpo", [], "diversity",
         ("algorithm.kl_coef=0.3 (now 0.1)", "algorithm.trunc=4 (now 6)", "optimizer.lr=0.001 (now 0.003)")),
        ("tiny-flow-grpo", [], "clip",
         ("optimizer.lr=0.001 (now 0.003)", "algorithm.clip=0.0003 (now 0.0001)",
          "optimizer.steps_per_iteration=1 (now 2)")),
        ("tiny-flow-grpo", [], "zero_std",
         ("groups.size=16 (now 8)", "algorithm.noise_level=1 (now 0.7)",
          "a reward with finer steps, or prompts that are harder", "optimizer.lr=0.001 (now 0.003)")),
        ("tiny-diffusion-nft", ["algorithm.beta=0.1"], "overfit",
         ("algorithm.kl_coef=0.001 (now 0.0001)", "algorithm.beta=1 (now 0.1)", "algorithm.trunc=6 (now 9)",
          "optimizer.lr=0.001 (now 0.003)")),
        ("tiny-diffusion-dpo", [], "below_base",
         ("optimizer.lr=0.001 (now 0.003)", "algorithm.beta=300 (now 100)")),
    ],
)  # fmt: skip
def test_advice_is_the_methods(recipe: str, overrides: list[str], name: str, expected: tuple[str, ...]) -> None:
    assert advice(name, load_recipe(recipe, overrides)) == expected
