"""Scores of a batch of images: a recipe's rewards, weighted, with every failure met as the recipe says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards.base import Reward, load_reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the images scored."""

    reward_B: Tensor  # float32, on the CPU; the weighted sum, NaN where one of the rewards failed
    metrics: Mapping[str, Tensor]  # float32 [B] each


Measured = Mapping[str, Sequence[tuple[int, Mapping[str, Tensor] | None]]]
"""What each reward gave: so many images with their metrics, float32 each; None where it raised for them."""


class Scorer:
    """The rewards of a recipe, ready to score."""

    def __init__(self, config: RewardsConfig, *, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.rewards = {term.name: load_reward(term.name, config, device=device) for term in config.terms}
        self._metric_names: dict[str, list[str]] = {}  # of each reward that has scored an image

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of `images_BCHW`, a prompt each.

        Raises:
            UserError: as `measure` and `combine`.
        """
        return self.combine([self.measure(images_BCHW, prompts)])

    def measure(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Measured:
        """What the rewards give for a batch of images, a prompt each.

        Raises:
            UserError: a reward returns the wrong number of scores or lacks the recipe's metric; or it raises or returns
                what is not finite, and the recipe says `on_failure: stop`.
        """
        found = {name: self._measure(name, reward, images_BCHW, prompts) for name, reward in self.rewards.items()}
        for term in self.config.terms:
            for _, metrics in found[term.name]:
                if metrics is not None:
                    self._check(term, metrics)
        return found

    def combine(self, measured: Sequence[Measured]) -> Scores:
        """Scores of all the images that were measured, in their order.

        Raises:
            UserError: a reward raised for all of them and never scored one, or its metrics are not always the same.
        """
        found = {
            name: self._join(name, [piece for batch in measured for piece in batch[name]]) for name in self.rewards
        }
        weighted = [term.weight * _chosen(term, found[term.name]) for term in self.config.terms]
        metrics: dict[str, Tensor] = {}
        for reward_name, scores in found.items():
            clashing = scores.keys() & metrics.keys()
            metrics |= {f"{reward_name}.{name}" if name in clashing else name: score for name, score in scores.items()}
        return Scores(reward_B=torch.stack(weighted).sum(0), metrics=metrics)

    def _measure(
        self, name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]
    ) -> list[tuple[int, dict[str, Tensor] | None]]:
        try:
            return [(len(prompts), self._call(name, reward, images_BCHW, prompts))]
        except UserError:
            raise
        except Exception as error:  # whatever a user's reward raises
            if self.config.on_failure == "stop":
                raise UserError(f"rewards: {name!r} raised {type(error).__name__}: {error}") from error
        # Each image alone, so that one that the reward raises for costs no other its score.
        return [
            (1, self._call_or_none(name, reward, image_CHW[None], [prompt]))
            for image_CHW, prompt in zip(images_BCHW, prompts, strict=True)
        ]

    def _call_or_none(
        self, name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]
    ) -> dict[str, Tensor] | None:
        try:
            return self._call(name, reward, images_BCHW, prompts)
        except UserError:
            raise
        except Exception:  # counted by the trainer as a failed sample
            return None

    def _join(self, name: str, pieces: Sequence[tuple[int, Mapping[str, Tensor] | None]]) -> dict[str, Tensor]:
        """The metrics of a reward for all images, NaN where it raised."""
        scored = [metrics for _, metrics in pieces if metrics is not None]
        expected = list(scored[0]) if scored else self._metric_names.get(name)
        if expected is None:
            raise UserError(f"rewards: {name!r} raised for every one of {sum(count for count, _ in pieces)} images")
        for metrics in scored:
            if metrics.keys() != set(expected):
                raise UserError(
                    f"rewards: {name!r} returned metrics {', '.join(expected)} for some images and "
                    f"{', '.join(metrics)} for others; expected the same for all"
                )
        return {
            metric: torch.cat(
                [metrics[metric] if metrics else torch.full((count,), torch.nan) for count, metrics in pieces]
            )
            for metric in expected
        }

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

    def _check(self, term: RewardConfig, metrics: Mapping[str, Tensor]) -> None:
        metric = term.metric or next(iter(metrics))
        if metric not in metrics:
            raise UserError(f"rewards: {term.name!r} has no metric {metric!r}{suggest(metric, metrics)}")
        failed_B = ~metrics[metric].isfinite()
        if self.config.on_failure == "stop" and failed_B.any():
            first = int(failed_B.nonzero()[0])
            raise UserError(
                f"rewards: {term.name!r} returned {metrics[metric][first].item()} for {int(failed_B.sum())} of "
                f"{len(failed_B)} images; set rewards.on_failure=skip to leave such samples out"
            )


def _chosen(term: RewardConfig, scores: Mapping[str, Tensor]) -> Tensor:
    """The metric that a term is of, float32 [B], NaN where it is not finite."""
    score_B = scores[term.metric or next(iter(scores))]
    return score_B.masked_fill(~score_B.isfinite(), torch.nan)
