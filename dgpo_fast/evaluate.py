"""Held-out evaluation: base and fine-tuned on the same prompts from the same noise."""

from __future__ import annotations

import math
import sys
from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dgpo_fast import rng
from dgpo_fast.checkpoint import Step, load_chosen
from dgpo_fast.comparison import Evaluation, kind_of
from dgpo_fast.config import Config, load_run_config
from dgpo_fast.errors import UserError
from dgpo_fast.flow.rollout import Sampler, sample_latents
from dgpo_fast.gallery import picture_keeper, write_gallery
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import Policy
from dgpo_fast.models.training import load_policy
from dgpo_fast.parallel.world import World
from dgpo_fast.profiling import stage
from dgpo_fast.prompts import load_prompts
from dgpo_fast.rewards import OverlappedScoring, Scorer, Scores
from dgpo_fast.rewards.scoring import Measured, describe_failures, refuse_failures, total_failures
from dgpo_fast.samples import save_grid
from dgpo_fast.statistics import Floats

Metrics = dict[str, float]

SIDES: dict[str, View] = {"base": "ref", "tuned": "ema"}
"""What is compared, and which view of the policy it is."""
PICTURED_PROMPTS = 8
"""Prompts in the picture of an evaluation."""
MAX_WAITING = 2
"""Forwards' worth of latents that may wait for a slow reward: unlike a rollout's, nothing needs them afterwards."""


def draw_images(
    policy: Policy, view: View, prompts: list[str], config: Config, *, images_per_prompt: int, first_prompt: int = 0
) -> Tensor:
    """Images float32 [prompts x images_per_prompt, 3, pixels, pixels] in [0, 1] of what `draw_latents` draws."""
    x0_BCHW = draw_latents(
        policy, view, prompts, config, images_per_prompt=images_per_prompt, first_prompt=first_prompt
    )
    return policy.model.decode(x0_BCHW, images_per_forward=config.rollout.decoded_at_once)


def draw_latents(
    policy: Policy, view: View, prompts: list[str], config: Config, *, images_per_prompt: int, first_prompt: int
) -> Tensor:
    """Clean latents, float32 [prompts x images_per_prompt, C, H, W], drawn with the evaluation's steps.

    The noise of an image is named by the seed, the prompt's number (`first_prompt` + its place) and the image's: every
    view and every number of ranks starts from the same.
    """
    model = policy.model
    names = [
        rng.stream(config.seed, stage="evaluation", group=first_prompt + prompt, sample=sample)
        for prompt in range(len(prompts))
        for sample in range(images_per_prompt)
    ]
    conditioning = model.encode(prompts)
    of_prompt_B = torch.arange(len(prompts), device=model.device).repeat_interleave(images_per_prompt)
    return sample_latents(
        policy, view, Sampler.from_config(config.rollout, steps=config.evaluation.steps),
        rng.normal(names, model.latent_shape, device=model.device), conditioning[of_prompt_B],
        model.encode([""]) if config.rollout.guidance > 1 else None,
        images_per_forward=config.rollout.images_per_forward,
    )  # fmt: skip


def evaluate_view(
    policy: Policy,
    view: View,
    prompts: list[str],
    config: Config,
    scorer: Scorer,
    world: World,
    *,
    check: Callable[[], object] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Metrics:
    """Mean of every metric over the images of `prompts`, which the ranks share out among themselves.

    Args:
        check: called before each forward's worth of prompts and at the end, on every rank as often; may raise, to end
            the evaluation.
        is_over: whether it will, so that this rank need not wait for its scores.
        say: told, on every rank, in a line which images have no score and are left out of the means.

    Raises:
        UserError: fewer prompts than ranks, or more images have no score than the recipe allows.
    """
    with stage("evaluate"):
        scores = _score_share(policy, view, prompts, config, scorer, world, check=check, is_over=is_over, say=say)
        metrics = scores.metrics
        scored = [values[values.isfinite()] for values in metrics.values()]
        sums = [[values.double().sum().item() for values in scored], [float(len(values)) for values in scored]]
        totals = world.sum(torch.tensor(sums, dtype=torch.float64).to(world.device))
    return dict(zip(metrics, (totals[0] / totals[1]).tolist(), strict=True))


def score_view(
    policy: Policy,
    view: View,
    prompts: list[str],
    config: Config,
    scorer: Scorer,
    world: World,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Floats]:
    """Every metric of every image: float64 [prompts, images_per_prompt], on every rank; NaN where it failed.

    Raises:
        UserError: as `evaluate_view`.
    """
    with stage("evaluate"):
        metrics = _score_share(policy, view, prompts, config, scorer, world, say=say).metrics
        of_ranks = world.gather_objects({name: values.double().numpy() for name, values in metrics.items()})
    # A rank's prompts are consecutive, and ranks come in their order.
    whole = {name: np.concatenate([of[name] for of in of_ranks]) for name in metrics}
    return {
        name: np.where(np.isfinite(values), values, np.nan).reshape(len(prompts), -1) for name, values in whole.items()
    }


def _score_share(
    policy: Policy,
    view: View,
    prompts: list[str],
    config: Config,
    scorer: Scorer,
    world: World,
    *,
    check: Callable[[], object] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
    say: Callable[[str], None],
) -> Scores:
    """Of this rank's images, prompt after prompt."""
    if len(prompts) < world.size:
        raise UserError(
            f"evaluation.num_prompts: {len(prompts)} held-out prompts for {world.size} ranks; each needs at least one"
        )
    images_per_prompt = config.evaluation.images_per_prompt
    per_chunk = max(1, config.rollout.images_per_forward // images_per_prompt)
    mine = world.share(len(prompts))
    largest_share = math.ceil(len(prompts) / world.size)
    along = prompts[mine.start : mine.start + 1]  # of its own: another would bring the text encoders to the device
    scoring = OverlappedScoring(
        scorer, policy.model, images_per_decode=config.rollout.decoded_at_once, max_waiting=MAX_WAITING,
        num_images=len(prompts) * images_per_prompt, is_over=is_over,
    )  # fmt: skip
    with scoring:
        policy.model.encode(prompts[mine.start : mine.stop])  # at once: the encoders come to the device for it
        for start in range(mine.start, mine.start + largest_share, per_chunk):
            check()
            chunk = prompts[start : min(start + per_chunk, mine.stop)]
            # Ranks with nothing left draw along: where weights are gathered to be used, all must use them as often.
            x0_BCHW = draw_latents(
                policy, view, chunk or along, config, images_per_prompt=images_per_prompt, first_prompt=start
            )
            if chunk:
                scoring.add(x0_BCHW, [prompt for prompt in chunk for _ in range(images_per_prompt)])
    check()
    # In the order that the first rank has seen them, that all choose alike; it has none where a reward failed for all.
    of_ranks = world.gather_objects(scorer.metric_names)
    scorer.metric_names.update(ChainMap(*of_ranks))
    scores = scoring.scores()
    _check_failures(scores, len(prompts) * images_per_prompt, config, world, say)
    return scores


def _check_failures(scores: Scores, total: int, config: Config, world: World, say: Callable[[str], None]) -> None:
    """Says what failed; raises on every rank where it is too much."""
    num_failed = int(world.sum((~scores.reward_B.isfinite()).sum().to(world.device)))
    if num_failed:
        of_terms = {name: failed for name, failed in scores.failed.items() if name in config.rewards.trained}
        failed = total_failures(world.gather_objects(of_terms))
        refuse_failures(failed, num_failed, total=total, config=config.rewards)
        say(f"{describe_failures(failed, total=total)}; they are left out of the evaluation")
    monitors = [name for name in config.rewards.monitors if name in scores.failed]
    if monitors:  # of this rank: others need not agree on what nothing depends on
        failed = {name: scores.failed[name] for name in monitors}
        say(f"monitors: {describe_failures(failed, total=len(scores.reward_B))}; their metrics are of the others")


class _KeepingScorer(Scorer):
    """Scores images, once it has handed them on in their order."""

    keep: Callable[[Tensor], None] | None = None

    def measure(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Measured:
        if self.keep is not None:
            self.keep(images_BCHW)
        return super().measure(images_BCHW, prompts)


def evaluate_run(
    run_dir: Path,
    *,
    config: Config | None = None,
    split: Literal["train", "test"] = "test",
    step: Step | None = None,
    picture: Path | None = None,
    gallery: Path | None = None,
    lossless: bool = False,
    by: str | None = None,
) -> Evaluation:
    """Base and tuned model of a run, scored on the same prompts from the same noise: what `dgpo-fast eval` does.

    Several ranks share the prompts out among themselves; all return the same. With a `gallery` each writes the images
    that it draws, so that it must be the same directory on every machine.

    Args:
        config: the run's, as `evaluation_config` may have changed it; None for the run's own.
        split: whose prompts.
        step: of the checkpoint, or "best"; None for the newest.
        picture: where to save the first images of the base, and below them those of the tuned model.
        gallery: a directory for a page with every image, `write_gallery`.
        lossless: whether its images are as they were drawn, in eight bits.
        by: a key of the prompts' metadata by which kinds of prompts are told apart.

    Raises:
        UserError: `run_dir` is no run, has no such checkpoint, or has no prompts of that split, or one lacks the key.
    """
    config = config or load_run_config(run_dir)
    source = config.prompts.test if split == "test" else config.prompts.train
    prompts = load_prompts(source, key=f"prompts.{split}")[: config.evaluation.num_prompts]
    if by is not None:
        for prompt in prompts:
            kind_of(prompt, by)
    world = World.from_environment(config)
    checkpoint = load_chosen(run_dir, step, world)
    scorer = _KeepingScorer(config.rewards, device=world.device).with_monitors
    policy = load_policy(config, world, is_trained=False)
    policy.take_ema(partial(checkpoint.read, "ema"))
    policy.check_trained()
    scores = {}
    with scorer:
        for side, view in SIDES.items():
            if gallery is not None:
                first_image = world.share(len(prompts)).start * config.evaluation.images_per_prompt
                scorer.keep = picture_keeper(
                    gallery, side, first_image=first_image, images_per_prompt=config.evaluation.images_per_prompt,
                    lossless=lossless,
                )  # fmt: skip
            scores[side] = score_view(policy, view, prompts, config, scorer, world, say=_say_on(world))
    unknown = {name: np.full_like(values, np.nan) for side in scores.values() for name, values in side.items()}
    scores = {side: unknown | found for side, found in scores.items()}  # a monitor may have failed for all of one
    evaluation = Evaluation(
        run=run_dir.resolve().name, step=checkpoint.step, split=split, source=str(source), prompts=tuple(prompts),
        images_per_prompt=config.evaluation.images_per_prompt, base=scores["base"], tuned=scores["tuned"], by=by,
    )  # fmt: skip
    if world.is_first:
        if picture is not None:
            _save_picture(policy, prompts[:PICTURED_PROMPTS], config, picture)
        if gallery is not None:
            write_gallery(evaluation, gallery, pixels=config.model.resolution)
    world.leave()
    return evaluation


def _save_picture(policy: Policy, prompts: list[str], config: Config, path: Path) -> None:
    images = [draw_images(policy, view, prompts, config, images_per_prompt=1) for view in SIDES.values()]
    captions = [f"{prompt} ({side})" for side in SIDES for prompt in prompts]
    save_grid(torch.cat(images), captions, path, columns=len(prompts))


def _say_on(world: World) -> Callable[[str], None]:
    """Writes to stderr, on the first rank."""
    return lambda line: print(line, file=sys.stderr) if world.is_first else None
