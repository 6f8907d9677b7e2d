"""What is measured of an optimizer step: the losses' metrics, how unlike a group's images are, how far weights went.

Parts of all ranks are added up at once, in the one sum that the metrics need anyway.

Shapes: B samples of this rank in a step, G groups of the step on all ranks, D values of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.models.policy import Policy
from dgpo_fast.parallel.world import World
from dgpo_fast.profiling import stage
from dgpo_fast.records import LossOutput, ScoredGroups, StepReport

OF_METHODS = {
    "loss", "kl", "dgpo_loss", "surrogate_loss", "policy_loss", "clip_fraction", "group_weight_mean",
    "group_weight_saturation",
}  # fmt: skip
RESERVED = {field.name for field in fields(StepReport)} - OF_METHODS
"""What the trainer, or this file, says of a step itself."""


def step_metrics(
    outputs: Sequence[LossOutput],
    scored: ScoredGroups,
    policy: Policy,
    world: World,
    *,
    update: int,
) -> dict[str, float | None]:
    """The metrics of a step that was just made, equal on every rank; what cannot be measured is None, or left out.

    Args:
        outputs: of this rank's micro-batches, each with the same metrics, `loss` among them.
        update: which of the iteration's steps it was.

    Raises:
        UserError: a metric lacks in some, or has the name of something else in a line of metrics.
    """
    names = sorted(outputs[0].metrics)  # ranks add them up in one order
    for output in outputs:
        if sorted(output.metrics) != names or "loss" not in names or RESERVED & {*names}:
            raise UserError(
                f"algorithm: a loss has the metrics {', '.join(sorted(output.metrics))}, another {', '.join(names)}; "
                f"expected the same of all, `loss` among them, and none of {', '.join(sorted(RESERVED))}"
            )
    parts = {name: torch.stack([output.metrics[name] for output in outputs]).sum() for name in names}
    parts["diversity"] = variance_part(scored, world, update=update).to(parts["loss"].dtype)
    change_norm = policy.change_norm()
    if change_norm is not None:
        # Every rank has it whole. Yet devices may round it unlike, and what the guard decides must be one decision.
        parts["adapter_norm"] = change_norm / world.size
    sums = dict(zip(parts, world.sum(torch.stack([*parts.values()])).tolist(), strict=True))
    variance = sums["diversity"]
    return {**sums, "diversity": math.sqrt(variance) if math.isfinite(variance) else None}


@torch.no_grad()
def variance_part(scored: ScoredGroups, world: World, *, update: int) -> Tensor:
    """This rank's part of the step's diversity, squared; over the ranks the parts add up. A float64 scalar.

        diversity^2 = 1/G sum_g 1/(n_g - 1) sum_i |x_i - mean_g|^2 / D

    over the clean latents x_i of the n_g samples of a group that have a reward: the variance within groups, half the
    mean square distance of two samples of a group. Groups with fewer than two such samples do not count; where there
    are no others, it is NaN. Where groups lie on several ranks, these exchange their sums, G x D values.
    """
    rollout, updates = scored.rollout, len(scored.num_valid)
    num_groups, num_samples = len(scored.group_size_G) // updates, len(scored.valid_B) // updates
    mine = slice(update * num_samples, (update + 1) * num_samples)
    size_G = scored.group_size_G[update * num_groups : (update + 1) * num_groups]
    valid_B, x_BCHW = scored.valid_B[mine], rollout.x0_BCHW[mine]
    x_BD = x_BCHW.where(valid_B[:, None, None, None], 0.0).flatten(1)
    group_B = rollout.prompts.group_id_B[mine] - update * num_groups
    # A product, not index_add: on CUDA that adds in the order in which threads come.
    is_member_GB = group_B == torch.arange(num_groups, device=x_BD.device)[:, None]
    mean_GD = is_member_GB.to(x_BD.dtype) @ x_BD / size_G.clamp(min=1)[:, None]
    if world.size > 1 and not rollout.prompts.has_whole_groups:
        with stage("diversity"):
            mean_GD = world.sum(mean_GD)
    deviation_B = (x_BD - mean_GD[group_B]).square().mean(1, dtype=torch.float64) * valid_B
    is_counted_G = size_G > 1
    share_G = is_counted_G / (size_G - 1).clamp(min=1).double() / is_counted_G.sum()
    return (deviation_B * share_G[group_B]).sum()
