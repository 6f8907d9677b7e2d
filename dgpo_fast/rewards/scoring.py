"""Scores of a batch of images: a recipe's rewards, weighted, with every failure met as the recipe says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_fast.config import RewardConfig, RewardsConfig
from dgpo_fast.errors import UserError, suggest
from dgpo_fast.rewards.base import Reward, load_reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the images scored."""

    reward_B: Tensor  # float32, on the CPU; the weighted sum, NaN where one of the rewards failed
    metrics: Mapping[str, Tensor]  # float32 [B] each


class Scorer:
    """The rewards of a recipe, ready to score."""

    def __init__(self, config: RewardsConfig) -> None:
        self.config = config
        self.terms = [(term, load_reward(term.name)) for term in config.terms]
        self._metric_names: dict[str, list[str]] = {}  # of each reward that has scored an image

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of `images_BCHW`, a prompt each.

        Raises:
            UserError: a reward returns the wrong number of scores or lacks the recipe's metric; it raises or returns
                what is not finite, and the recipe says `on_failure: stop`; or it raises for all and never scored one.
        """
        total_B = torch.zeros(len(prompts))
        metrics: dict[str, Tensor] = {}
        for term, reward in self.terms:
            found = self._score(term, reward, images_BCHW, prompts)
            chosen = term.metric or next(iter(found))
            if chosen not in found:
                raise UserError(f"rewards: {term.name!r} has no metric {chosen!r}{suggest(chosen, found)}")
            total_B += term.weight * self._finite(term, found[chosen])
            clashing = found.keys() & metrics.keys()
            metrics |= {f"{term.name}.{name}" if name in clashing else name: value for name, value in found.items()}
        return Scores(reward_B=total_B, metrics=metrics)

    def _score(
        self, term: RewardConfig, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        try:
            return self._call(term, reward, images_BCHW, prompts)
        except UserError:
            raise
        except Exception as error:  # whatever a user's reward raises
            if self.config.on_failure == "stop":
                raise UserError(f"rewards: {term.name!r} raised {type(error).__name__}: {error}") from error
        return self._one_by_one(term, reward, images_BCHW, prompts)

    def _one_by_one(
        self, term: RewardConfig, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """Each image alone, so that one that the reward raises for costs no other its score.

        Raises:
            UserError: it raises for all of them and has never scored one.
        """
        rows: list[dict[str, Tensor] | None] = []
        for image_CHW, prompt in zip(images_BCHW, prompts, strict=True):
            try:
                rows.append(self._call(term, reward, image_CHW[None], [prompt]))
            except UserError:
                raise
            except Exception:  # counted by the trainer as a failed sample
                rows.append(None)
        scored = next((row for row in rows if row is not None), None)
        names = list(scored) if scored is not None else self._metric_names.get(term.name)
        if names is None:
            raise UserError(f"rewards: {term.name!r} raised for every one of {len(rows)} images")
        missing = torch.full((1,), torch.nan)
        return {name: torch.cat([row[name] if row else missing for row in rows]) for name in names}

    def _call(
        self, term: RewardConfig, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        with torch.no_grad():  # a graph of the reward's own model would reach the advantages
            output = reward(images_BCHW, prompts)
        named = output if isinstance(output, Mapping) else {term.name: output}
        if not named:
            raise UserError(f"rewards: {term.name!r} returned no scores")
        metrics = {name: torch.as_tensor(values, dtype=torch.float32).detach().cpu() for name, values in named.items()}
        for name, values in metrics.items():
            if values.shape != (len(prompts),):
                raise UserError(
                    f"rewards: {term.name!r} returned {list(values.shape)} scores ({name}) for {len(prompts)} images; "
                    "expected one for each"
                )
        self._metric_names[term.name] = list(metrics)
        return metrics

    def _finite(self, term: RewardConfig, values_B: Tensor) -> Tensor:
        failed_B = ~values_B.isfinite()
        if self.config.on_failure == "stop" and failed_B.any():
            first = int(failed_B.nonzero()[0])
            raise UserError(
                f"rewards: {term.name!r} returned {values_B[first].item()} for {int(failed_B.sum())} of {len(values_B)}"
                " images; set rewards.on_failure=skip to leave such samples out"
            )
        return values_B.masked_fill(failed_B, torch.nan)
