"""The likelihood ratio of equal policies, asked before a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.algorithms.ratio import check_ratio
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.engines import View
from dgpo_fast.parallel.world import World

MakePolicy = Callable[..., AdapterPolicy]


def tiny(*overrides: str) -> Config:
    return load_recipe(
        "tiny-dgpo", ["adapter.rank=4", "groups.size=2", "groups.per_iteration=2", "rollout.images_per_forward=4",
                      "optimizer.images_per_micro_batch=4", "model.sampling=same", *overrides],
    )  # fmt: skip


def drifting(
    policy: AdapterPolicy, monkeypatch: pytest.MonkeyPatch, *, by: float, without_gradients: bool = False
) -> None:
    """The policy's velocity moves by a factor 1 + `by`, with gradients, or with and without."""
    velocity = policy.engine.velocity

    def drifted(view: View, x_BCHW: Tensor, conditioned: object) -> Tensor:
        moves = view == "policy" and (without_gradients or torch.is_grad_enabled())
        return velocity(view, x_BCHW, conditioned) * (1 + by * moves)

    monkeypatch.setattr(policy.engine, "velocity", drifted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_the_ratio_of_equal_policies_is_exactly_one(make_policy: MakePolicy, engine: str, dtype: str) -> None:
    config = tiny(f"model.engine={engine}", f"model.dtype={dtype}")
    found = check_ratio(make_policy(config, spread=0.05), config, scales={"algorithm.clip": 1e-9})
    assert found.errors == "training"
    assert found.line == "the likelihood ratio of equal policies is exactly 1"


def test_the_check_leaves_all_weights_as_they_were(make_policy: MakePolicy) -> None:
    config = tiny()
    policy = make_policy(config, spread=0.05)
    before = {view: (adapter.master.clone(), adapter.compute.clone()) for view, adapter in policy.views.items()}
    check_ratio(policy, config, scales={"algorithm.clip": 1e-2})
    for view, adapter in policy.views.items():
        assert torch.equal(adapter.master, before[view][0])
        assert torch.equal(adapter.compute, before[view][1])
    assert policy.trainable.grad is not None
    assert not policy.trainable.grad.any()


def test_a_drift_far_below_the_clip_is_let_pass(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    policy = make_policy(config)
    drifting(policy, monkeypatch, by=1e-4)
    found = check_ratio(policy, config, scales={"algorithm.clip": 0.5})
    assert found.errors == "training"
    assert "far below algorithm.clip" in found.line


def test_a_drift_with_gradients_alone_costs_one_more_forward(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    policy = make_policy(config)
    drifting(policy, monkeypatch, by=1e-3)
    found = check_ratio(policy, config, scales={"algorithm.clip": 1e-6})
    assert found.errors == "again"
    assert "at the cost of a forward for each micro-batch" in found.line


def test_a_drift_without_gradients_too_is_refused(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    policy = make_policy(config)
    drifting(policy, monkeypatch, by=1e-3, without_gradients=True)
    with pytest.raises(UserError, match=r"^model\.engine: with fused .* algorithm\.clip is 1e-06"):
        check_ratio(policy, config, scales={"algorithm.clip": 1e-6})


def test_without_a_clip_nothing_is_run(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    policy = make_policy(config)
    monkeypatch.setattr(policy.engine, "velocity", lambda *given: pytest.fail("the model has run"))
    assert check_ratio(policy, config, scales={}).errors == "training"


def test_the_narrowest_scale_decides(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    policy = make_policy(config)
    drifting(policy, monkeypatch, by=1e-3, without_gradients=True)
    with pytest.raises(UserError, match=r"1 / algorithm\.beta is 1e-06: .* or a 1 / algorithm\.beta above"):
        check_ratio(policy, config, scales={"algorithm.clip": 100.0, "1 / algorithm.beta": 1e-6})


def test_scores_that_compare_with_the_old_policy_are_checked_though_nothing_is_clipped(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("algorithm.clip=null", "algorithm.reference=old", "algorithm.beta=1e6")
    policy, algorithm = make_policy(config), DGPO(config)
    drifting(policy, monkeypatch, by=1e-3)
    assert "once more" in algorithm.prepare(policy) and algorithm.ratio_errors == "again"
    base = tiny("algorithm.clip=null", "algorithm.beta=1e6")
    assert "not asked for" in DGPO(base).prepare(policy)


def test_an_algorithm_is_prepared_by_the_check(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("algorithm.clip=1e-6")
    policy, algorithm = make_policy(config), DGPO(config)
    assert "exactly 1" in algorithm.prepare(policy)
    assert algorithm.ratio_errors == "training"
    drifting(policy, monkeypatch, by=1e-3)
    assert "once more" in algorithm.prepare(policy)
    assert algorithm.ratio_errors == "again"


@pytest.mark.parametrize("drift", [0.01, math.nan])
def test_ranks_run_the_policy_once_more_where_one_of_them_has_to(
    drift: float, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one does not, and finds so after as many forwards; where weights are gathered to be used, all would wait."""
    policy, algorithm = make_policy(tiny()), DGPO(tiny())
    of_another = iter([drift, 0.0])
    monkeypatch.setattr(World, "gather_objects", lambda self, mine: [mine, next(of_another)])
    algorithm.prepare(policy)
    assert algorithm.ratio_errors == "again"
    assert list(of_another) == []
