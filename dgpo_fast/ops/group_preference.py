"""The group-preference loss of DGPO: group scores, their weights, the clipping and the objective, in one launch.

Shape letters: M samples of a micro-batch, G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgpo_fast.ops.arguments import (
    check_device,
    check_dtype,
    check_indices,
    check_no_gradient,
    check_positive,
    check_shape,
)
from dgpo_fast.ops.registry import define, differentiate


class GroupPreference(NamedTuple):
    """Sums over the groups of a micro-batch (means are the caller's, who knows how many groups there are)."""

    objective: Tensor  # scalar; the true loss, its gradient is DGPO's
    surrogate: Tensor  # scalar; the published code's loss: another value, the same gradient
    weight_G: Tensor  # sigmoid(s_G), without gradient
    clipped_M: Tensor  # bool, samples that give no gradient


def group_scores(
    error_M: Tensor,
    reference_error_M: Tensor,
    *,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    beta: float,
) -> Tensor:
    """Scores [G], s_G = (beta / |G|) sum over the group of A (d - d_ref): positive where the bad half is preferred.

    Args:
        error_M: [M], float32 or float64; the policy's errors.
        reference_error_M: [M], dtype of error_M; the reference's errors at the same inputs.
        advantage_M: [M], dtype of error_M; zero for samples that do not count.
        group_M: [M], int64 in 0..G-1.
        size_G: [G], dtype of error_M; samples that count, over all pieces that the group is cut into.
        beta: positive; strength of the preference.

    The scores of a cut group's pieces add up, whether micro-batches or ranks hold them. Sums are made in a fixed order:
    the same bits on every run. No gradient: `group_preference` has it.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype, device or range. On CUDA a group outside 0..G-1 is in
            no score here, and makes `group_preference` give NaN.

    Source: DGPO, arXiv 2510.08425, eq. 17.
    """
    with torch.no_grad():
        return _group_scores(error_M, reference_error_M, advantage_M, group_M, size_G, beta)  # type: ignore[no-any-return]


def group_preference(
    error_M: Tensor,
    reference_error_M: Tensor,
    *,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    beta: float,
    score_G: Tensor | None = None,
    old_error_M: Tensor | None = None,
    clip: float | None = None,
) -> GroupPreference:
    """The loss of groups: sum over them of softplus(s_G) / beta, as a true objective.

        surrogate = sum over groups of sigmoid(s_G) (1 / |G|) sum over all samples of A d
        grad objective = grad surrogate = sum over groups of sigmoid(s_G) (1 / |G|) sum over the unclipped of A grad d

    Clipped are samples that the policy has already moved further than `clip` the right way: with ratio =
    exp(d_old - d), those of A > 0 with ratio > 1 + clip and those of A <= 0 with ratio < 1 - clip. They count in s_G.
    Where policy and old policy run through the same kernels with the same weights the ratio is exactly 1.

    Args:
        error_M, reference_error_M, advantage_M, group_M, size_G, beta: as for `group_scores`.
        score_G: [G], dtype of error_M; the scores of whole groups, where only pieces of them are here. The gradient is
            then the pieces' share of it; the objective is still that of the whole groups. None: computed here.
        old_error_M: [M], dtype of error_M; the old policy's errors at the same inputs. Unused without `clip`.
        clip: range of the ratio without clipping, not negative; None clips nothing.

    Gradients flow to `error_M`, from the objective and from the surrogate.

    Raises:
        ValueError: as `group_scores`; also clip without old_error_M, or an argument besides error_M that requires a
            gradient. On CUDA a group outside 0..G-1 makes objective, surrogate and its sample's gradient NaN.

    Source: DGPO, arXiv 2510.08425, eq. 17. Departures, as in the code its authors published: divided by beta; clipping,
    added after review, after PPO (arXiv 1707.06347).
    """
    if clip is not None and old_error_M is None:
        raise ValueError("old_error_M: expected the old policy's errors, since clip is given, got None")
    fixed = {
        "reference_error_M": reference_error_M, "advantage_M": advantage_M, "size_G": size_G, "score_G": score_G,
        "old_error_M": old_error_M,
    }  # fmt: skip
    for name, tensor in fixed.items():
        check_no_gradient(name, tensor, reason="gradients flow to error_M only")
    old_error_M = old_error_M if clip is not None else None
    return GroupPreference(
        *_group_preference(
            error_M, reference_error_M, advantage_M, group_M, size_G, score_G, old_error_M, beta, clip or 0.0
        )
    )


def clipped_samples(error_M: Tensor, old_error_M: Tensor, advantage_M: Tensor, clip: float) -> Tensor:
    """Which samples `group_preference` clips, bool [M]."""
    ratio_M = torch.exp(old_error_M - error_M)
    return torch.where(advantage_M > 0, ratio_M > 1 + clip, ratio_M < 1 - clip)


def _check_groups(error_M: Tensor, group_M: Tensor, size_G: Tensor, **per_sample: Tensor | None) -> None:
    if error_M.dim() != 1:
        raise ValueError(f"error_M: expected [M], got {list(error_M.shape)}")
    check_dtype("error_M", error_M, torch.float32, torch.float64)
    for name, tensor in per_sample.items():
        if tensor is not None:
            check_dtype(name, tensor, error_M.dtype)
            check_shape(name, tensor, error_M.shape, meaning="one number for each sample")
    check_dtype("group_M", group_M, torch.int64)
    check_shape("group_M", group_M, error_M.shape, meaning="one number for each sample")
    check_dtype("size_G", size_G, error_M.dtype)
    if size_G.dim() != 1:
        raise ValueError(f"size_G: expected [G], got {list(size_G.shape)}")
    for name, tensor in {**per_sample, "group_M": group_M, "size_G": size_G}.items():
        if tensor is not None:
            check_device(name, tensor, error_M, meaning="error_M")


def _check_scores_metadata(
    error_M: Tensor, reference_error_M: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, beta: float
) -> None:
    _check_groups(error_M, group_M, size_G, reference_error_M=reference_error_M, advantage_M=advantage_M)
    check_positive("beta", beta)


def _check_scores(
    error_M: Tensor, reference_error_M: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, beta: float
) -> None:
    _check_scores_metadata(error_M, reference_error_M, advantage_M, group_M, size_G, beta)
    check_indices("group_M", group_M, len(size_G))


def _check_metadata(
    error_M: Tensor,
    reference_error_M: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    score_G: Tensor | None,
    old_error_M: Tensor | None,
    beta: float,
    clip: float,
) -> None:
    of_samples = {"reference_error_M": reference_error_M, "advantage_M": advantage_M, "old_error_M": old_error_M}
    _check_groups(error_M, group_M, size_G, **of_samples)
    check_positive("beta", beta)
    if clip < 0:
        raise ValueError(f"clip: expected a number that is not negative, got {clip}")
    if score_G is not None:
        check_dtype("score_G", score_G, error_M.dtype)
        check_shape("score_G", score_G, size_G.shape, meaning="one number for each group")
        check_device("score_G", score_G, error_M, meaning="error_M")


def _check(
    error_M: Tensor,
    reference_error_M: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    score_G: Tensor | None,
    old_error_M: Tensor | None,
    beta: float,
    clip: float,
) -> None:
    _check_metadata(error_M, reference_error_M, advantage_M, group_M, size_G, score_G, old_error_M, beta, clip)
    check_indices("group_M", group_M, len(size_G))


def reference_scores(
    error_M: Tensor, reference_error_M: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, beta: float
) -> Tensor:
    """The equation of `group_scores` in eager torch, group by group: index_add has no fixed order on CUDA."""
    terms_M = advantage_M * (error_M - reference_error_M)
    sums = [terms_M[group_M == group].sum() for group in range(len(size_G))]
    return beta * torch.stack(sums) / size_G if sums else size_G.new_empty(0)


def reference(
    error_M: Tensor,
    reference_error_M: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    score_G: Tensor | None,
    old_error_M: Tensor | None,
    beta: float,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The equations of `group_preference` in eager torch."""
    if score_G is None:
        score_G = reference_scores(error_M, reference_error_M, advantage_M, group_M, size_G, beta)
    weight_G = torch.sigmoid(score_G)
    clipped_M = torch.zeros_like(group_M, dtype=torch.bool)
    if old_error_M is not None:
        clipped_M = clipped_samples(error_M, old_error_M, advantage_M, clip)
    surrogate = ((weight_G / size_G)[group_M] * advantage_M * error_M).sum()
    return F.softplus(score_G).sum() / beta, surrogate, weight_G, clipped_M


def reference_backward(
    grad: Tensor, weight_G: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, clipped_M: Tensor
) -> Tensor:
    """grad_error = grad sigmoid(s_G) A / |G|, and 0 of the clipped."""
    return torch.where(clipped_M, 0.0, grad * (weight_G / size_G)[group_M] * advantage_M)


def _fake_scores(
    error_M: Tensor, reference_error_M: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, beta: float
) -> Tensor:
    _check_scores_metadata(error_M, reference_error_M, advantage_M, group_M, size_G, beta)
    return size_G.new_empty(size_G.shape)


def _fake(
    error_M: Tensor,
    reference_error_M: Tensor,
    advantage_M: Tensor,
    group_M: Tensor,
    size_G: Tensor,
    score_G: Tensor | None,
    old_error_M: Tensor | None,
    beta: float,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_metadata(error_M, reference_error_M, advantage_M, group_M, size_G, score_G, old_error_M, beta, clip)
    scalar, clipped_M = error_M.new_empty(()), group_M.new_empty(group_M.shape, dtype=torch.bool)
    return scalar, torch.empty_like(scalar), size_G.new_empty(size_G.shape), clipped_M


def _check_backward_metadata(
    grad: Tensor, weight_G: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, clipped_M: Tensor
) -> None:
    _check_groups(advantage_M, group_M, size_G)
    check_shape("grad", grad, [], meaning="a scalar")
    check_dtype("grad", grad, advantage_M.dtype)
    check_dtype("weight_G", weight_G, advantage_M.dtype)
    check_shape("weight_G", weight_G, size_G.shape, meaning="one number for each group")
    check_dtype("clipped_M", clipped_M, torch.bool)
    check_shape("clipped_M", clipped_M, group_M.shape, meaning="one truth for each sample")
    for name, tensor in {"grad": grad, "weight_G": weight_G, "clipped_M": clipped_M}.items():
        check_device(name, tensor, advantage_M, meaning="advantage_M")


def _check_backward(
    grad: Tensor, weight_G: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, clipped_M: Tensor
) -> None:
    _check_backward_metadata(grad, weight_G, advantage_M, group_M, size_G, clipped_M)
    check_indices("group_M", group_M, len(size_G))


def _fake_backward(
    grad: Tensor, weight_G: Tensor, advantage_M: Tensor, group_M: Tensor, size_G: Tensor, clipped_M: Tensor
) -> Tensor:
    _check_backward_metadata(grad, weight_G, advantage_M, group_M, size_G, clipped_M)
    return advantage_M.new_empty(advantage_M.shape)


_group_scores = define(
    "group_scores(Tensor error_M, Tensor reference_error_M, Tensor advantage_M, Tensor group_M, Tensor size_G,"
    " float beta) -> Tensor",
    check=_check_scores,
    reference=reference_scores,
    fake=_fake_scores,
)
define(
    "group_preference(Tensor error_M, Tensor reference_error_M, Tensor advantage_M, Tensor group_M, Tensor size_G,"
    " Tensor? score_G, Tensor? old_error_M, float beta, float clip)"
    " -> (Tensor objective, Tensor surrogate, Tensor weight_G, Tensor clipped_M)",
    check=_check,
    reference=reference,
    fake=_fake,
)
_group_preference_backward = define(
    "group_preference_backward(Tensor grad, Tensor weight_G, Tensor advantage_M, Tensor group_M, Tensor size_G,"
    " Tensor clipped_M) -> Tensor",
    check=_check_backward,
    reference=reference_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, advantage_M, group_M, size_G, *_ = inputs
    _, _, weight_G, clipped_M = output
    ctx.mark_non_differentiable(weight_G, clipped_M)
    ctx.save_for_backward(weight_G, advantage_M, group_M, size_G, clipped_M)


def _backward(ctx: Any, grad_objective: Tensor, grad_surrogate: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_error_M = _group_preference_backward(grad_objective + grad_surrogate, *ctx.saved_tensors)
    return grad_error_M, *(None for _ in range(8))


_group_preference = differentiate("group_preference", setup_context=_save, backward=_backward)
