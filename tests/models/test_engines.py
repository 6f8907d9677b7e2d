"""The engines: the same velocities and gradients through every view, and what each refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dgpo_fast.config import Config, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.engines import CompiledEngine, EagerEngine, FusedEngine, View
from dgpo_fast.models.policy import TRAINED
from dgpo_fast.profiling import Category, watched_by
from dgpo_fast.records import Conditioning

MakePolicy = Callable[..., AdapterPolicy]

VIEWS: tuple[View, ...] = (*TRAINED, "ref")
ALL_TARGETS = (
    "[attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out,"
    "attn2.to_q,attn2.to_k,attn2.to_v,attn2.to_out.0,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2]"
)
RANDOM_VIEWS = 0.05


def tiny(engine: str, *overrides: str) -> Config:
    return load_recipe("tiny-dgpo", ["adapter.rank=4", "adapter.alpha=6", f"model.engine={engine}", *overrides])


def inputs_of(policy: AdapterPolicy, batch: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, timesteps and texts."""
    config, generator = policy.model.transformer.config, torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch, *policy.model.latent_shape, generator=generator)
    text_BND = torch.randn(batch, 9, config.joint_attention_dim, generator=generator)
    pooled_BD = torch.randn(batch, config.pooled_projection_dim, generator=generator)
    texts = Conditioning(text_BND=text_BND.to(policy.model.dtype), pooled_BD=pooled_BD.to(policy.model.dtype))
    return x_BCHW, torch.linspace(12, 990.5, batch), texts


def velocities(policy: AdapterPolicy, batch: int = 3) -> dict[View, Tensor]:
    with torch.no_grad():
        return {view: policy.velocity(view, *inputs_of(policy, batch))[0] for view in VIEWS}


def gradient(policy: AdapterPolicy) -> Tensor:
    """Of the policy's masters, of a weighted sum of its velocity."""
    velocity = policy.velocity("policy", *inputs_of(policy))[0]
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(1))
    (velocity.float() * weights).sum().backward()
    policy.collect_gradient()
    assert policy.trainable.grad is not None
    found = policy.trainable.grad.clone()
    policy.trainable.grad.zero_()
    return found


def relative(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.fixture
def compiler() -> Iterator[None]:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.mark.parametrize("targets", [(), (f"adapter.targets={ALL_TARGETS}",)], ids=["published", "all"])
def test_fused_is_eager_through_every_view(make_policy: MakePolicy, targets: tuple[str, ...]) -> None:
    eager, fused = (make_policy(tiny(engine, *targets), spread=RANDOM_VIEWS) for engine in ("eager", "fused"))
    assert type(eager.engine) is EagerEngine and type(fused.engine) is FusedEngine
    expected, found = velocities(eager), velocities(fused)
    for view in VIEWS:
        assert relative(found[view], expected[view]) < 1e-5, view
        assert all(relative(found[view], expected[other]) > 1e-3 for other in VIEWS if other != view)
    assert relative(gradient(fused), gradient(eager)) < 1e-5


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_profiler_sees_every_block(make_policy: MakePolicy, engine: str, checkpointing: str) -> None:
    """Forward, and where it is recomputed; of blocks that run by hand, backward too."""
    policy = make_policy(tiny(engine, f"model.checkpointing={checkpointing}"), spread=RANDOM_VIEWS)
    inputs = inputs_of(policy)
    seen: list[str] = []

    @contextmanager
    def watch(name: str, category: Category) -> Iterator[None]:
        seen.append(name)
        yield

    with watched_by(watch):
        velocity = policy.velocity("policy", *inputs)[0]
        forward = [name for name in seen if name.startswith("block")]
        seen.clear()
        velocity.float().square().sum().backward()
    kinds = ["block dual", "block dual", "block joint", "block last"]
    assert forward == kinds
    again = kinds[::-1] if checkpointing == "full" else []
    assert [name for name in seen if not name.endswith("backward")] == again
    assert sum(name.endswith("backward") for name in seen) == len(kinds) * (engine == "fused")
    with torch.no_grad():
        policy.velocity("policy", *inputs)
    assert len(seen) == len(again) + len(kinds) * (engine == "fused"), "every range has ended, and nobody watches"


def test_a_view_follows_its_weights(make_policy: MakePolicy) -> None:
    """The fused engine reads the flat tensors that averages and the optimizer write."""
    eager, fused = (make_policy(tiny(engine), spread=RANDOM_VIEWS) for engine in ("eager", "fused"))
    for policy in (eager, fused):
        with torch.no_grad():
            policy.trainable.mul_(1.25)
        policy.refresh()
        policy.average_into("old", decay=0.5)
        policy.set_weights("ema", torch.zeros_like(policy.trainable))
    expected, found = velocities(eager), velocities(fused)
    for view in VIEWS:
        assert relative(found[view], expected[view]) < 1e-5, view
    assert torch.equal(found["ema"], found["ref"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equal_weights_give_equal_velocities(make_policy: MakePolicy, batch: int, dtype: str) -> None:
    """To the bit, the policy with gradients and the old policy without."""
    policy = make_policy(tiny("fused", f"model.dtype={dtype}"), spread=RANDOM_VIEWS)
    policy.set_weights("old", policy.trainable.detach())
    inputs = inputs_of(policy, batch)
    with_gradient, without = (policy.velocity(view, *inputs)[0] for view in ("policy", "old"))
    assert with_gradient.requires_grad and not without.requires_grad
    assert torch.equal(with_gradient, without)


def test_evaluations_are_those_of_a_batch_of_both(make_policy: MakePolicy) -> None:
    """Guided steps and others, conditioned together, as one at a time."""
    for engine in ("eager", "fused"):
        policy = make_policy(tiny(engine), spread=RANDOM_VIEWS)
        x_BCHW, _, texts = inputs_of(policy)
        empty = Conditioning(text_BND=texts.text_BND[:1] * 0, pooled_BD=texts.pooled_BD[:1] * 0)
        timestep_EB, guided = torch.tensor([[900.0] * 3, [400.0] * 3, [20.0] * 3]), [False, True, False]
        with torch.no_grad():
            evaluations = policy.condition(timestep_EB, texts, empty, guided=guided)
            for timestep_B, is_guided, evaluation in zip(timestep_EB, guided, evaluations, strict=True):
                found = policy.velocity_at("policy", x_BCHW, evaluation)
                expected = policy.velocity("policy", x_BCHW, timestep_B, texts, empty if is_guided else None)
                assert evaluation.is_guided == is_guided == (found[1] is not None)
                for result, truth in zip(found, expected, strict=True):
                    assert (result is None) == (truth is None)
                    assert result is None or truth is None or relative(result, truth) < 1e-6


def test_full_checkpointing_is_eagers_as_well(make_policy: MakePolicy) -> None:
    kept, again = (make_policy(tiny("eager", f"model.checkpointing={how}"), spread=0.05) for how in ("none", "full"))
    assert again.model.transformer.is_gradient_checkpointing
    assert relative(gradient(again), gradient(kept)) < 1e-6


@pytest.mark.slow
def test_compiled_is_eager_through_every_view(make_policy: MakePolicy, compiler: None) -> None:
    eager, compiled = (make_policy(tiny(engine), spread=RANDOM_VIEWS) for engine in ("eager", "compile"))
    assert type(compiled.engine) is CompiledEngine
    expected, found = velocities(eager), velocities(compiled)
    for view in VIEWS:
        assert relative(found[view], expected[view]) < 1e-5, view
    assert relative(gradient(compiled), gradient(eager)) < 1e-5


@pytest.mark.parametrize("target", ["norm1.linear", "proj_out"])
def test_fused_refuses_adapters_outside_the_blocks_products(make_policy: MakePolicy, target: str) -> None:
    targets = f"adapter.targets=[attn.to_q,{target}]"
    with pytest.raises(UserError, match=rf"^model\.engine: fused .* adapter\.targets asks for .*{target}; use .*eager"):
        make_policy(tiny("fused", targets))
    policy = make_policy(tiny("eager", targets), spread=RANDOM_VIEWS)
    assert len({velocity.sum().item() for velocity in velocities(policy).values()}) == len(VIEWS)


def test_fused_refuses_an_attention_that_does_not_run_here(make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=r"^model\.attention: cudnn runs on cuda.*here runs cpu, math, or auto$"):
        make_policy(tiny("fused", "model.attention=cudnn"))
    with pytest.raises(UserError, match=r"model\.attention: input should be .*'math', got 'maths'$"):
        make_policy(tiny("fused", "model.attention=maths"))
    plain, chosen = (make_policy(tiny("fused", f"model.attention={name}"), spread=0.05) for name in ("auto", "math"))
    for view, velocity in velocities(plain).items():
        assert relative(velocities(chosen)[view], velocity) < 1e-5
