"""What `dgpo-fast eval` scores a run by, where that is not what the run itself says. No torch here.

An evaluation recipe is a YAML file that says `kind: evaluation` and has no other sections than `rewards`, `prompts`
(with `test` alone) and `evaluation`; what it gives replaces the run's. Those of the package are in recipes/evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from dgpo_fast.config import (
    EVALUATION_RECIPES,
    Config,
    apply_override,
    change_config,
    load_run_config,
    read_recipe_file,
)
from dgpo_fast.errors import UserError, suggest

SECTIONS = ("rewards", "prompts", "evaluation")
ABOUT = ("kind", "name", "description")
SETTABLE = (
    *SECTIONS,
    *("rollout", "seed", "device", "parallel", "model.engine", "model.attention", "model.prompt_cache"),
)
"""What `--set` may change of an evaluation: the rest is what the checkpoint is of, or is of no account."""


def evaluation_recipe_names() -> list[str]:
    """Names of the evaluation recipes that come with the package, sorted."""
    return sorted(path.stem for path in EVALUATION_RECIPES.glob("*.yaml"))


def load_evaluation_recipe(name_or_path: str) -> dict[str, Any]:
    """The sections of an evaluation recipe, by name or from a YAML file; their values are validated with a run's.

    Raises:
        UserError: no such recipe, not YAML, a recipe for training, or a section that an evaluation has not.
    """
    is_file = name_or_path.endswith((".yaml", ".yml"))
    path = Path(name_or_path) if is_file else EVALUATION_RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = evaluation_recipe_names()
        hint = "" if is_file else f"{suggest(name_or_path, known)} evaluation recipes: {', '.join(known)}"
        raise UserError(f"--recipe: no evaluation recipe {name_or_path!r}{hint}")
    data = read_recipe_file(path)
    if data.get("kind") != "evaluation":
        raise UserError(f"--recipe {name_or_path}: is no evaluation recipe, which says kind: evaluation")
    for key in data:
        if key not in (*ABOUT, *SECTIONS):
            raise UserError(
                f"--recipe {name_or_path}: unknown key {key!r}{suggest(str(key), SECTIONS)}; an evaluation recipe has "
                f"{', '.join(SECTIONS)}"
            )
    prompts = data.get("prompts", {})
    if not isinstance(prompts, Mapping) or prompts.keys() - {"test"}:
        raise UserError(f"--recipe {name_or_path}: prompts of an evaluation recipe are prompts.test alone")
    return data


def evaluation_config(
    run_dir: Path,
    *,
    split: Literal["train", "test"] = "test",
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    rewards: Sequence[str] = (),
    prompts: str | None = None,
    num_prompts: int | None = None,
    images_per_prompt: int | None = None,
) -> Config:
    """The configuration of a run, as it is to be evaluated: changed by the recipe, the overrides, the rest, in turn.

    Args:
        split: whose prompts `prompts` replaces.
        recipe: an evaluation recipe, by name or a YAML file.
        overrides: `a.b=value`, of what `SETTABLE` names.
        rewards: names that replace the terms.
        prompts: a source that `load_prompts` takes.

    Raises:
        UserError: `run_dir` is no run directory, or a mistake in what changes it.
    """
    for override in overrides:
        _refuse_unsettable(override)
    given: dict[str, Any] = {
        "rewards.terms": [{"name": name} for name in rewards] or None,
        f"prompts.{split}": prompts,
        "evaluation.num_prompts": num_prompts,
        "evaluation.images_per_prompt": images_per_prompt,
    }
    sections = load_evaluation_recipe(recipe) if recipe is not None else {}
    # Values as JSON, which is YAML too: a source such as "3.5" stays a string.
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    changes = {key: value for key, value in sections.items() if key in SECTIONS}
    return change_config(
        _without_idle_rewards(load_run_config(run_dir), _names(changes, [*overrides, *options])),
        changes,
        [*overrides, *options],
        source=f"--recipe {recipe}" if recipe is not None else str(run_dir),
    )


def _names(changes: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """The rewards that are to replace the run's, as far as what says so is well formed; none where nothing does."""
    asked = deepcopy(dict(changes))
    for override in overrides:
        apply_override(asked, override)
    rewards = asked.get("rewards")
    terms, monitors = (rewards.get(key) for key in ("terms", "monitors")) if isinstance(rewards, dict) else (None, None)
    named = [term["name"] for term in _list(terms) if isinstance(term, dict) and "name" in term]
    return [*named, *_list(monitors)] if named else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _without_idle_rewards(config: Config, names: Sequence[str]) -> Config:
    """The run's configuration without what it says of rewards that `names`, if any replace its own, have no more."""
    if not names:
        return config
    kept = {
        key: {name: value for name, value in getattr(config.rewards, key).items() if name in names}
        for key in ("running", "arguments")
    }
    rewards = config.rewards.model_copy(update={**kept, "monitors": ()})
    return config.model_copy(update={"rewards": rewards})


def _refuse_unsettable(override: str) -> None:
    key = override.partition("=")[0].strip()
    if not any(key == settable or key.startswith(f"{settable}.") for settable in SETTABLE):
        raise UserError(
            f"--set {override}: eval takes settings of {', '.join(SETTABLE)}; all others are the run's own"
            f"{suggest(key.partition('.')[0], SETTABLE)}"
        )
