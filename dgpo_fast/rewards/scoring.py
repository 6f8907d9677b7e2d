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
        self.rewards = {term.name: load_reward(term.name) for term in config.terms}
        self._metric_names: dict[str, list[str]] = {}  # of each reward that has scored an image

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of `images_BCHW`, a prompt each.

        Raises:
            UserError: a reward returns the wrong number of scores or lacks the recipe's metric; it raises or returns
                what is not finite, and the recipe says `on_failure: stop`; or it raises for all and never scored one.
        """
        found = {name: self._score(name, reward, images_BCHW, prompts) for name, reward in self.rewards.items()}
        weighted = [term.weight * self._chosen(term, found[term.name]) for term in self.config.terms]
        metrics: dict[str, Tensor] = {}
        for reward_name, scores in found.items():
            clashing = scores.keys() & metrics.keys()
            metrics |= {f"{reward_name}.{name}" if name in clashing else name: score for name, score in scores.items()}
        return Scores(reward_B=torch.stack(weighted).sum(0), metrics=metrics)

    def _score(self, name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        try:
            return self._call(name, reward, images_BCHW, prompts)
        except UserError:
            raise
        except Exception as error:  # whatever a user's reward raises
            if self.config.on_failure == "stop":
                raise UserError(f"rewards: {name!r} raised {type(error).__name__}: {error}") from error
        return self._one_by_one(name, reward, images_BCHW, prompts)

    def _one_by_one(self, name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each image alone, so that one that the reward raises for costs no other its score.

        Raises:
            UserError: it raises for all of them and has never scored one.
        """
        rows: list[dict[str, Tensor] | None] = []
        for image_CHW, prompt in zip(images_BCHW, prompts, strict=True):
            try:
                rows.append(self._call(name, reward, image_CHW[None], [prompt]))
            except UserError:
                raise
            except Exception:  # counted by the trainer as a failed sample
                rows.append(None)
        scored = next((row for row in rows if row is not None), None)
        metrics = list(scored) if scored is not None else self._metric_names.get(name)
        if metrics is None:
            raise UserError(f"rewards: {name!r} raised for every one of {len(rows)} images")
        missing = torch.full((1,), torch.nan)
        return {metric: torch.cat([row[metric] if row else missing for row in rows]) for metric in metrics}

    def _call(self, name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():  # a graph of the reward's own model would reach the advantages
            output = reward(images_BCHW, prompts)
        named = output if isinstance(output, Mapping) else {name: output}
        if not named:
            raise UserError(f"rewards: {name!r} returned no scores")
        metrics = {
            metric: torch.as_tensor(score, dtype=torch.float32).detach().cpu() for metric, score in named.items()
        }
        for metric, values in metrics.items():
            if values.shape != (len(prompts),):
                raise UserError(
                    f"rewards: {name!r} returned {list(values.shape)} scores ({metric}) for {len(prompts)} images; "
                    "expected one for each"
                )
        self._metric_names[name] = list(metrics)
        return metrics

    def _chosen(self, term: RewardConfig, scores: Mapping[str, Tensor]) -> Tensor:
        """The metric that a term is of, float32 [B], NaN where it is not finite."""
        metric = term.metric or next(iter(scores))
        if metric not in scores:
            raise UserError(f"rewards: {term.name!r} has no metric {metric!r}{suggest(metric, scores)}")
        failed_B = ~scores[metric].isfinite()
        if self.config.on_failure == "stop" and failed_B.any():
            first = int(failed_B.nonzero()[0])
            raise UserError(
                f"rewards: {term.name!r} returned {scores[metric][first].item()} for {int(failed_B.sum())} of "
                f"{len(failed_B)} images; set rewards.on_failure=skip to leave such samples out"
            )
        return scores[metric].masked_fill(failed_B, torch.nan)
