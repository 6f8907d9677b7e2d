"""What training samples may be drawn with: the base in fp8, or merged weights; everything else stays exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.models import engines
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.sd3 import StableDiffusion3

MakePolicy = Callable[..., AdapterPolicy]


def tiny(*overrides: str) -> Config:
    return load_recipe("tiny-dgpo", ["adapter.rank=4", "model.dtype=bfloat16", *overrides])


def velocity(policy: AdapterPolicy, engine: engines.Engine, view: engines.View = "policy") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(4, *policy.model.latent_shape, generator=generator)
    conditioning = policy.model.encode(["a red circle", "two blue squares", "", "a green triangle"])
    timestep_EB = torch.tensor([[900.0, 600.0, 300.0, 30.0]])
    (evaluation,) = policy.condition(timestep_EB, conditioning, engine=engine)
    with torch.no_grad():
        return policy.velocity_at(view, x_BCHW, evaluation)[0].float()


def test_the_velocity_is_near_and_the_base_is_quantised_once(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny("model.sampling=fp8"), spread=0.05)
    exact = velocity(policy, policy.engine)
    found = velocity(policy, policy.sampling_engine)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.05, "the e4m3 of four blocks, of which each is 4 % off"
    assert torch.equal(found, velocity(policy, policy.sampling_engine))


def test_adapters_beside_the_quantised_base_are_those_of_the_view(make_policy: MakePolicy) -> None:
    """An update of the adapters moves the sampled velocity as it moves the exact one: it is not lost in fp8."""
    policy = make_policy(tiny("model.sampling=fp8"), spread=0.05)
    moves = [velocity(policy, e) - velocity(policy, e, "ref") for e in (policy.engine, policy.sampling_engine)]
    assert moves[0].norm() > 0
    assert torch.nn.functional.cosine_similarity(moves[0].flatten(), moves[1].flatten(), dim=0) > 0.9


def test_only_training_samples_are_drawn_with_it(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("model.sampling=fp8")
    policy = make_policy(config)
    assert policy.sampling_engine is not policy.engine
    used: list[object] = []
    monkeypatch.setattr(policy, "condition", lambda *given, engine=None, **named: used.append(engine) or [])
    with pytest.raises(IndexError):  # of the evaluations there are none
        DGPO(config).rollout(policy, "policy", _prompts(policy))
    assert used == [policy.sampling_engine]
    exact = make_policy(tiny())
    assert exact.sampling_engine is exact.engine


def _prompts(policy: AdapterPolicy) -> object:
    from dgpo_fast.records import PromptBatch

    return PromptBatch(
        iteration=0, samples=(0, 1), group_size=2, prompts=("a red circle",),
        conditioning=policy.model.encode(["a red circle"]), unconditional=None,
    )  # fmt: skip


def test_where_fp8_does_not_run_the_reason_is_said(
    make_model: Callable[[Config], StableDiffusion3], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("model.sampling=fp8")
    monkeypatch.setattr(
        engines, "why_unsupported", lambda device, dtype: f"in {dtype} needs compute capability 8.9, this is 8.0"
    )
    with pytest.raises(UserError, match=r"^model\.sampling: fp8 in torch\.bfloat16 needs compute capability 8\.9"):
        AdapterPolicy(make_model(config), config.adapter, seed=0)


def test_merged_weights_give_the_velocities_of_weights_with_adapters(make_policy: MakePolicy) -> None:
    """Of the weights as they are now, through every view; the base itself stays as it was."""
    policy = make_policy(tiny("model.sampling=merged", "model.dtype=float32"), spread=0.05)
    policy.check_sampling()
    base = velocity(policy, policy.engine, "ref")
    for scale in (1.0, -2.0):
        policy.set_weights("policy", scale * policy.views["old"].master)
        for view in ("policy", "old", "ref"):
            exact, merged = (velocity(policy, e, view) for e in (policy.engine, policy.sampling_engine))
            assert (merged - exact).norm() < 3e-6 * exact.norm()
    assert torch.equal(velocity(policy, policy.engine, "ref"), base)


def test_merging_into_bfloat16_is_refused(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny("model.sampling=merged"))
    with pytest.raises(UserError, match=r"^model\.sampling: merged changes velocities by .* in bfloat16"):
        policy.check_sampling()


def test_a_float32_model_samples_in_bfloat16(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far from float32 as a bfloat16 model, through each view; errors and gradients stay where they were."""
    monkeypatch.setattr(engines, "_has_bfloat16_products", lambda device: True)
    policy = make_policy(tiny("model.sampling=bfloat16", "model.dtype=float32"), spread=0.05)
    policy.check_sampling()
    rounded = make_policy(tiny("model.dtype=bfloat16"), spread=0.05)
    for view in ("policy", "old", "ref"):
        exact, drawn = (velocity(policy, engine, view) for engine in (policy.engine, policy.sampling_engine))
        of_bfloat16 = (velocity(rounded, rounded.engine, view).float() - exact).norm()
        assert 0 < (drawn - exact).norm() < 1.2 * of_bfloat16
    moves = [velocity(policy, e) - velocity(policy, e, "ref") for e in (policy.engine, policy.sampling_engine)]
    assert torch.nn.functional.cosine_similarity(moves[0].flatten(), moves[1].flatten(), dim=0) > 0.99


def test_a_processor_without_bfloat16_products_merges(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_has_bfloat16_products", lambda device: False)
    policy = make_policy(tiny("model.sampling=bfloat16", "model.dtype=float32"), spread=0.05)
    merging = engines.sampling_engine(policy.engine, policy.model.config)
    exact, merged = (velocity(policy, engine) for engine in (policy.engine, merging))
    assert 0 < (merged - exact).norm() < 3e-6 * exact.norm()


@pytest.mark.parametrize("sampling", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    ("dtype", "engine", "merges"),
    [("float32", "fused", True), ("bfloat16", "fused", False), ("float32", "eager", False)],
)
def test_unless_told_only_float32_is_merged(
    make_policy: MakePolicy, sampling: str, dtype: str, engine: str, merges: bool
) -> None:
    policy = make_policy(tiny(f"model.sampling={sampling}", f"model.dtype={dtype}", f"model.engine={engine}"))
    assert isinstance(policy.sampling_engine, engines.MergedEngine) == merges
    assert merges or policy.sampling_engine is policy.engine
