"""Before a run: policies with equal weights must have a likelihood ratio of exactly 1, in the shapes of the recipe.

The ratio decides what is clipped, and where the score of a group compares with the old policy its logarithm, times
beta, is that score. An engine whose kernels differ with and without gradients moves it away from 1 with no step made,
in bfloat16 by more than some recipes clip at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.policy import Policy
from dgpo_fast.ops.velocity_errors import velocity_errors
from dgpo_fast.parallel.world import ALONE, World

MARGIN = 10
"""How many times a drift has to fit into what it is measured by, such as the recipe's clip, to be let pass."""


class RatioCheck(NamedTuple):
    """What `check_ratio` found."""

    errors: Literal["training", "again"]
    """Whose errors of the policy the ratio takes: those of the training forward, or of one more without gradients."""
    line: str
    """For the person who watches."""


def check_ratio(policy: Policy, config: Config, *, scales: Mapping[str, float], world: World = ALONE) -> RatioCheck:
    """Runs one micro-batch through policy and old policy with equal weights.

    Args:
        scales: what the ratio's distance from 1 means something at, by the name of its setting: the range outside of
            which samples are clipped, 1 / beta where scores compare with the old policy. Empty where nothing uses it.
        world: whose ranks all find what the worst of them does, though devices may be unlike: they have to run the
            same forwards, here and later.

    Raises:
        UserError: their ratio differs from 1 by more than the smallest scale can bear, also without gradients.
    """
    if not scales:
        line = "nothing is compared with the old policy, so the likelihood ratio is not asked for"
        return RatioCheck(errors="training", line=line)
    name, scale = min(scales.items(), key=lambda item: item[1])

    def drift_of_ranks(*, with_gradients: bool) -> float:
        return float(np.max(world.gather_objects(_drift(policy, config, with_gradients=with_gradients))))

    drift = drift_of_ranks(with_gradients=True)
    ratio = "the likelihood ratio of equal policies"
    if drift == 0:
        return RatioCheck(errors="training", line=f"{ratio} is exactly 1")
    if scale > MARGIN * drift:
        return RatioCheck(errors="training", line=f"{ratio} misses 1 by {drift:.1e}, far below {name}")
    if drift_of_ranks(with_gradients=False) == 0:
        line = (
            f"with gradients the likelihood ratio of equal policies misses 1 by {drift:.1e}, so the "
            "policy runs once more without them, at the cost of a forward for each micro-batch"
        )
        return RatioCheck(errors="again", line=line)
    raise UserError(
        f"model.engine: with {config.model.engine} the likelihood ratio of equal policies misses 1 by {drift:.1e}, and "
        f"{name} is {scale:g}: what is learnt would be decided at random; use another engine, or a {name} above "
        f"{MARGIN * drift:.1e}"
    )


def describe_drift(drift: float, *, clip: float, engine: str) -> str:
    """A line for the person who watches, of the largest |ratio - 1| of a policy that has not changed since it drew.

    Raises:
        UserError: it is so large that all such samples might be clipped.
    """
    line = "the likelihood ratio of a policy that has not changed "
    if drift == 0:
        return line + "is exactly 1"
    line += f"misses 1 by {drift:.1e}, where algorithm.clip is {clip:g}"
    if drift >= clip:
        raise UserError(
            f"model.engine: with {engine} {line}: it would clip at random; use another engine, or a clip above "
            f"{MARGIN * drift:.1e}"
        )
    return line if clip > MARGIN * drift else f"{line}: some samples are clipped too soon or too late"


def _drift(policy: Policy, config: Config, *, with_gradients: bool) -> float:
    """The largest |ratio - 1| over the samples of a micro-batch."""
    images, model = config.optimizer.images_per_micro_batch, policy.model
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(images, *model.latent_shape, generator=generator).to(model.device)

    conditioning = model.encode([""])[torch.zeros(images, dtype=torch.int64, device=model.device)]
    inputs = noise(), torch.linspace(50, 950, images, device=model.device), conditioning
    with policy.equal_weights("policy", "old"):
        with torch.set_grad_enabled(with_gradients):
            velocity = policy.velocity("policy", *inputs)[0].detach()
        with torch.no_grad():
            old = policy.velocity("old", *inputs)[0]
    errors = velocity_errors(
        velocity, x0=noise(), noise=noise(), group_M=torch.arange(images, device=model.device), old=old
    )
    assert errors.old_M is not None
    return float((torch.exp(errors.old_M - errors.policy_M) - 1).abs().max())
