"""The policy: three views of one base without a copy, their averages, and adapters that act and travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from dgpo_fast.config import PUBLISHED_TARGETS, Config, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.flow.rollout import Sampler, sample_latents
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.engines import View
from dgpo_fast.models.policy import TRAINED
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.models.sources import EMBEDDED
from dgpo_fast.ops.group_preference import clipped_samples
from dgpo_fast.ops.velocity_errors import velocity_errors
from dgpo_fast.parallel.weights import Piece, Shapes
from dgpo_fast.records import Conditioning

MakePolicy = Callable[..., AdapterPolicy]

EPS = torch.finfo(torch.float32).eps
VIEWS: tuple[View, ...] = (*TRAINED, "ref")
PROMPTS = ["two red circles", "a blue square left of a green triangle", "a yellow circle"]


ONLY_EAGER = pytest.mark.parametrize("make_policy", ["eager"], indirect=True)


@pytest.fixture(params=["fused", "eager"])
def make_policy(make_policy: MakePolicy, request: pytest.FixtureRequest) -> MakePolicy:
    """Policies of each engine."""

    def make(config: Config, **named: float) -> AdapterPolicy:
        model = config.model.model_copy(update={"engine": request.param})
        return make_policy(config.model_copy(update={"model": model}), **named)

    return make


def tiny(*overrides: str) -> Config:
    return load_recipe("tiny-dgpo", ["adapter.rank=4", "adapter.alpha=8", *overrides])


def model_inputs(model: StableDiffusion3, *, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    """Noisy latents, timesteps and conditioning of three samples."""
    generator = torch.Generator().manual_seed(seed)
    x_BCHW = torch.randn(len(PROMPTS), *model.latent_shape, generator=generator)
    return x_BCHW, torch.tensor([999.0, 640.5, 12.0]), model.encode(PROMPTS)


def velocities(policy: AdapterPolicy) -> dict[View, Tensor]:
    inputs = model_inputs(policy.model)
    with torch.no_grad():
        return {view: policy.velocity(view, *inputs)[0] for view in VIEWS}


def adapter_parameters(policy: AdapterPolicy, view: View) -> dict[str, torch.nn.Parameter]:
    """Peft's, by the names that all views have in common."""
    named = policy.model.transformer.named_parameters()
    return {name.replace(f".{view}.", "."): parameter for name, parameter in named if f".{view}." in name}


def differing(before: dict[View, Tensor], after: dict[View, Tensor]) -> set[View]:
    return {view for view in VIEWS if not torch.equal(before[view], after[view])}


def test_adapters_of_a_view_are_slices_of_one_flat_tensor(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny())
    for view in TRAINED:
        adapter, parameters = policy.views[view], adapter_parameters(policy, view)
        assert set(adapter.shapes) == set(parameters)
        offset = adapter.compute.data_ptr()
        for parameter in (parameters[name] for name in adapter.shapes):
            assert parameter.data_ptr() == offset
            offset += parameter.numel() * parameter.element_size()
        assert offset == adapter.compute.data_ptr() + adapter.compute.numel() * adapter.compute.element_size()
    assert policy.trainable.data_ptr() == policy.views["policy"].compute.data_ptr()


def test_looking_through_a_view_moves_no_weight(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny(), spread=0.05)
    inputs = model_inputs(policy.model)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in policy.model.transformer.named_parameters()}
    for view in (*VIEWS, *reversed(VIEWS)):
        policy.velocity(view, *inputs)
        for name, parameter in policy.model.transformer.named_parameters():
            assert parameter.data_ptr() == before[name][0]
    for name, parameter in policy.model.transformer.named_parameters():
        assert torch.equal(parameter, before[name][1])


def test_gradients_reach_the_policy_only(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny(), spread=0.05)
    inputs = model_inputs(policy.model)
    for view in ("old", "ema", "ref"):
        assert not policy.velocity(view, *inputs)[0].requires_grad
    policy.velocity("policy", *inputs)[0].square().sum().backward()
    assert policy.trainable.grad is not None
    assert policy.trainable.grad.any()
    with_gradient = {id(p) for p in policy.model.transformer.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in adapter_parameters(policy, "policy").values()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_views_begin_as_the_base(make_policy: MakePolicy, dtype: str) -> None:
    """B is zero: to the bit."""
    found = velocities(make_policy(tiny(f"model.dtype={dtype}")))
    assert differing({view: found["ref"] for view in VIEWS}, found) == set()
    assert found["ref"].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_weights_give_a_ratio_of_exactly_one(make_policy: MakePolicy, dtype: str) -> None:
    """The policy runs with gradients on and the old policy without; their errors must not differ by a bit."""
    policy = make_policy(tiny(f"model.dtype={dtype}"), spread=0.05)
    policy.set_weights("old", policy.trainable.detach())
    inputs = model_inputs(policy.model)
    x0, noise = torch.randn(2, *inputs[0].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        old = policy.velocity("old", *inputs)[0]
    velocity = policy.velocity("policy", *inputs)[0]
    assert velocity.requires_grad
    errors = velocity_errors(velocity, x0=x0, noise=noise, old=old)
    error_M, old_error_M = errors.policy_M, errors.old_M
    assert torch.equal(torch.exp(old_error_M - error_M), torch.ones(len(PROMPTS)))
    assert not clipped_samples(error_M, old_error_M, torch.tensor([1.0, -1.0, 0.0]), 1e-30).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_changes_the_policy_alone(make_policy: MakePolicy, dtype: str) -> None:
    policy = make_policy(tiny(f"model.dtype={dtype}"), spread=0.05)
    before = velocities(policy)
    with torch.no_grad():
        policy.trainable += 0.01
    policy.refresh("policy")
    assert differing(before, velocities(policy)) == {"policy"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("view", "decay"), [("old", 0.3), ("old", 0.0), ("ema", 0.9)])
def test_averages_follow_the_formula(make_policy: MakePolicy, view: View, decay: float, dtype: str) -> None:
    policy = make_policy(tiny(f"model.dtype={dtype}"), spread=0.05)
    before, masters = velocities(policy), {name: policy.views[name].master.clone() for name in TRAINED}
    policy.average_into(view, decay=decay)
    expected = decay * masters[view].double() + (1 - decay) * masters["policy"].double()
    average = policy.views[view].master
    assert average.dtype == torch.float32
    # A product and a sum of numbers below max |w|: three roundings.
    rounding = 3 * EPS * masters[view].abs().max().item()
    torch.testing.assert_close(average.double(), expected, rtol=0, atol=rounding)
    assert differing(before, velocities(policy)) == {view}
    for other in set(TRAINED) - {view}:
        assert torch.equal(policy.views[other].master, masters[other])


def test_masters_stay_float32_beside_a_bfloat16_model(make_policy: MakePolicy) -> None:
    """An average that moves by less than bfloat16 shows is not lost."""
    policy = make_policy(tiny("model.dtype=bfloat16"))
    policy.set_weights("old", torch.ones_like(policy.trainable))
    with torch.no_grad():
        policy.trainable.fill_(1 + 2**-12)
    policy.refresh()
    for _ in range(2):
        policy.average_into("old", decay=0.5)
    old = policy.views["old"]
    assert torch.equal(old.master, torch.full_like(old.master, 1 + 0.75 * 2**-12))
    assert old.compute.dtype == torch.bfloat16
    assert torch.equal(old.compute, old.master.bfloat16())


def test_gradients_of_a_bfloat16_model_add_up_in_float32(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny("model.dtype=bfloat16"), spread=0.05)
    assert policy.trainable.grad is not None
    pieces = []
    for scale in (1.0, 2.0**-6):
        (scale * policy.velocity("policy", *model_inputs(policy.model))[0].float().square().sum()).backward()
        parameters = adapter_parameters(policy, "policy")
        pieces.append(torch.cat([parameters[name].grad.flatten().float() for name in policy.views["policy"].shapes]))
        policy.collect_gradient()
    assert torch.equal(policy.trainable.grad, pieces[0] + pieces[1])
    assert not torch.equal(policy.trainable.grad, policy.trainable.grad.bfloat16().float())
    for parameter in adapter_parameters(policy, "policy").values():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_gradients_of_a_float32_model_land_in_the_trainable_tensor(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny(), spread=0.05)
    assert policy.trainable.grad is not None

    def backward() -> Tensor:
        policy.velocity("policy", *model_inputs(policy.model))[0].square().sum().backward()
        policy.collect_gradient()
        return policy.trainable.grad.clone()

    once = backward()
    assert once.any()
    assert torch.equal(backward(), 2 * once)
    pieces = policy.views["policy"].slices(policy.trainable.grad)
    for name, parameter in adapter_parameters(policy, "policy").items():
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == pieces[name].data_ptr()


def test_an_optimizer_step_on_the_flat_tensor_descends(make_policy: MakePolicy) -> None:
    """The flat gradient belongs to the flat weights, element by element."""
    policy = make_policy(tiny(), spread=0.05)
    inputs = model_inputs(policy.model)
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD([policy.trainable], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (policy.velocity("policy", *inputs)[0] - target).square().mean()
        loss.backward()
        policy.collect_gradient()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        policy.refresh()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_guidance_batches_the_empty_prompt_beside_the_prompts(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny(), spread=0.05)
    x_BCHW, timestep_B, conditioning = model_inputs(policy.model)
    empty = policy.model.encode([""])
    empty_rows = empty[torch.zeros(len(PROMPTS), dtype=torch.int64)]
    with torch.no_grad():
        v_cond, v_uncond = policy.velocity("policy", x_BCHW, timestep_B, conditioning, empty)
        alone = [policy.velocity("policy", x_BCHW, timestep_B, text)[0] for text in (conditioning, empty_rows)]
    assert v_uncond is not None
    # Other batch sizes may take other kernels: a few dozen roundings through six blocks.
    for batched, single in zip((v_cond, v_uncond), alone, strict=True):
        torch.testing.assert_close(batched, single, rtol=0, atol=64 * EPS * single.abs().max().item())
    assert not torch.allclose(v_cond, v_uncond, atol=1e-3)


@pytest.mark.parametrize(("rank", "alpha", "init"), [(4, 8.0, "gaussian"), (16, 12.0, "gaussian"), (8, 8.0, "kaiming")])
def test_rank_alpha_and_initialisation_are_the_configured(
    make_policy: MakePolicy, rank: int, alpha: float, init: str
) -> None:
    policy = make_policy(tiny(f"adapter.rank={rank}", f"adapter.alpha={alpha}", f"adapter.init={init}"))
    layers = [module for module in policy.model.transformer.modules() if isinstance(module, LoraLinear)]
    assert {layer.scaling[view] for layer in layers for view in TRAINED} == {alpha / rank}
    width = policy.model.transformer.inner_dim
    a_values = []
    for name, parameter in adapter_parameters(policy, "policy").items():
        assert parameter.shape == ((rank, width) if "lora_A" in name else (width, rank))
        if "lora_A" in name:
            a_values.append(parameter.detach().flatten())
        else:
            assert not parameter.any()
    values = torch.cat(a_values)
    # Gaussian: deviation 1 / rank. Kaiming with a = sqrt(5): uniform within 1 / sqrt(width).
    deviation = 1 / rank if init == "gaussian" else (3 * width) ** -0.5
    sampling_error = len(values) ** -0.5
    assert values.std().item() == pytest.approx(deviation, rel=5 * sampling_error)
    assert (values.abs().max() <= width**-0.5) == (init == "kaiming")


def test_targets_choose_the_layers(make_policy: MakePolicy) -> None:
    """The published ones: eight in each block, but the last has no to_add_out; attn2 and the MLPs have none."""
    policy = make_policy(tiny())
    num_layers = policy.model.transformer.config.num_layers
    modules = {name.rpartition(".lora_")[0] for name in policy.views["policy"].shapes}
    expected = {
        f"transformer_blocks.{block}.{target}" for block in range(num_layers) for target in PUBLISHED_TARGETS
    } - {f"transformer_blocks.{num_layers - 1}.attn.to_add_out"}
    assert modules == expected
    mlp = make_policy(tiny("adapter.targets=[ff.net.2]"))
    assert {name.rpartition(".lora_")[0] for name in mlp.views["policy"].shapes} == {
        f"transformer_blocks.{block}.ff.net.2" for block in range(num_layers)
    }


def test_initial_weights_are_named_by_the_seed(make_model: Callable[[Config], StableDiffusion3]) -> None:
    config = tiny()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    same, again, other = (AdapterPolicy(make_model(config), config.adapter, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(4), expected), "the global generator was touched"
    assert torch.equal(same.trainable, again.trainable)
    assert not torch.equal(same.trainable, other.trainable)
    for view in ("old", "ema"):
        assert torch.equal(same.views[view].master, same.trainable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_passes_with_the_published_targets_and_leaves_no_trace(make_policy: MakePolicy, dtype: str) -> None:
    policy = make_policy(tiny(f"model.dtype={dtype}"), spread=0.05)
    before, weights = velocities(policy), policy.views["policy"].compute.clone()
    policy.check_trained()
    assert torch.equal(policy.views["policy"].compute, weights)
    assert differing(before, velocities(policy)) == set()
    assert policy.trainable.grad is not None
    assert not policy.trainable.grad.any()
    for parameter in adapter_parameters(policy, "policy").values():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@ONLY_EAGER
def test_the_check_finds_a_layer_that_ignores_its_adapter(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(tiny())
    layer = policy.model.transformer.transformer_blocks[2].attn.to_k
    assert isinstance(layer, LoraLinear)
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    with pytest.raises(UserError, match=r"adapter\.targets: 2 adapters do not .*transformer_blocks\.2\.attn\.to_k\."):
        policy.check_trained()


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_the_check_finds_gradients_that_are_not_finite(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """As of a kernel whose backward pass fails at some lengths: it sees as many tokens as training has."""
    policy = make_policy(tiny(f"model.engine={engine}"))
    velocity = policy.velocity

    def spoilt(view: View, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> tuple[Tensor, None]:
        assert conditioning.text_BND.shape[1] == policy.model.encode([""]).text_BND.shape[1]
        found = velocity(view, x, timestep, conditioning)[0]
        found.register_hook(lambda gradient: gradient * torch.nan)
        return found, None

    monkeypatch.setattr(policy, "velocity", spoilt)
    with pytest.raises(UserError, match=r"gradients of \d+ adapters are not finite, .*; model\.attention, or"):
        policy.check_trained()


@ONLY_EAGER
def test_the_check_finds_adapters_that_nothing_computes_with(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a fused layer replaces the ones that were adapted: the output does not depend on a single one."""
    policy = make_policy(tiny())
    for module in policy.model.transformer.modules():
        if isinstance(module, LoraLinear):
            monkeypatch.setattr(module, "forward", module.base_layer.forward)
    with pytest.raises(UserError, match=r"adapter\.targets"):
        policy.check_trained()


@pytest.mark.parametrize("targets", ["[attn.to_kk]", "[attn.to_q, attn.to_kk]"])
def test_targets_that_match_no_layer_are_refused(make_policy: MakePolicy, targets: str) -> None:
    """Each of them, also beside others that match."""
    with pytest.raises(UserError, match=r"adapter\.targets: no layer is called 'attn\.to_kk'; did you mean"):
        make_policy(tiny(f"adapter.targets={targets}"))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_diffusers_draws_from_a_saved_adapter_what_the_view_draws(
    make_policy: MakePolicy, tmp_path: Path, guidance: float
) -> None:
    """load_lora_weights and __call__, with alpha unlike the rank, against our own sampling from the same noise."""
    config = tiny(
        "adapter.alpha=10", "rollout.solver=euler", "rollout.schedule=flow_match", f"rollout.guidance={guidance}"
    )
    policy = make_policy(config, spread=0.12)
    noise_BCHW, _, conditioning = model_inputs(policy.model)
    unconditional = policy.model.encode([""]) if guidance > 1 else None

    def ours(view: View, noise: Tensor) -> Tensor:
        sampler = Sampler.from_config(config.rollout, steps=4)
        latents = sample_latents(policy, view, sampler, noise, conditioning, unconditional, images_per_forward=8)
        return policy.model.decode(latents, images_per_forward=8)

    policy.save_lora(tmp_path)
    fresh = StableDiffusion3Pipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path)
    theirs = fresh(
        PROMPTS, latents=noise_BCHW, num_inference_steps=4, guidance_scale=guidance, height=72, width=72,
        max_sequence_length=config.model.text_length, output_type="pt",
    ).images  # fmt: skip

    drawn = ours("ema", noise_BCHW)
    # The yardstick is what one rounding of the noise does to the image; each of four steps adds another.
    rounding = (ours("ema", noise_BCHW * (1 + EPS)) - drawn).abs().max().item()
    assert (drawn - theirs).abs().max().item() <= 4 * rounding
    assert (drawn - ours("ref", noise_BCHW)).abs().max().item() > 0.05


def test_the_saved_adapter_is_float32_also_of_a_bfloat16_model(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy(tiny("model.dtype=bfloat16"), spread=0.05)
    policy.save_lora(tmp_path, view="policy")
    saved = StableDiffusion3Pipeline.lora_state_dict(tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    masters = policy.views["policy"].slices(policy.views["policy"].master)
    assert len(saved) == len(masters)
    for name, master in masters.items():
        assert torch.equal(saved[f"transformer.{name}"], policy.scale * master if ".lora_B." in name else master)


def test_a_saved_average_is_read_by_the_adapters_names(make_policy: MakePolicy) -> None:
    policy = make_policy(tiny(), spread=0.05)
    before = {view: policy.views[view].master.clone() for view in TRAINED}

    def read(pieces: Sequence[Piece], shapes: Shapes) -> None:
        assert {piece.name: piece.values.numel() for piece in pieces} == {name: shapes[name].numel() for name in shapes}
        for piece in pieces:
            piece.values.fill_(len(piece.name))

    policy.take_ema(read)
    for name, values in policy.views["ema"].slices(policy.views["ema"].compute).items():
        assert (values == len(name)).all()
    assert all(torch.equal(policy.views[view].master, before[view]) for view in ("policy", "old"))
