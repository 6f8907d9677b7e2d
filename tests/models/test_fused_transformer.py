"""The transformer by hand against diffusers and peft, float64 and finite differences; what it multiplies and keeps."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dgpo_fast.config import PUBLISHED_TARGETS
from dgpo_fast.errors import UserError
from dgpo_fast.models.architectures import TransformerShape
from dgpo_fast.models.fused import transformer as fused_transformer
from dgpo_fast.models.fused.attention import ATTENTIONS, Attention
from dgpo_fast.models.fused.block import BlockFunction
from dgpo_fast.models.fused.transformer import FusedTransformer
from dgpo_fast.models.projections import PROJECTIONS
from dgpo_fast.profiling import watched_by

Make = Callable[..., Any]

CHECKPOINTING = ("none", "selective", "full")
SECOND = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
ADAPTERS: dict[str, dict[str, Any]] = {
    "published": {},
    "all": {"targets": (*PUBLISHED_TARGETS, *FEED_FORWARD)},  # and the second attention's where there is one
    "to_k": {"targets": ("attn.to_k",), "rank": 1, "alpha": 0.5},
    "down": {"targets": ("ff.net.2",), "rank": 2, "alpha": 3.0},
    "second": {"targets": ("attn.to_add_out", "ff_context.net.2"), "rank": 3, "alpha": 1.0},
    "late": {"targets": ("transformer_blocks.1.attn.to_q", "transformer_blocks.2.ff.net.0.proj")},
}
INPUTS: dict[str, dict[str, int]] = {  # patches are of 2 x 2
    "odd": {"batch": 3, "text_length": 7, "height": 6, "width": 10},
    "one-text-token": {"batch": 2, "text_length": 1, "height": 2, "width": 6},
    "205": {"batch": 1, "text_length": 205, "height": 10, "width": 14},
    "333": {"batch": 1, "text_length": 333, "height": 14, "width": 6},
}


def adapters(name: str, kind: str) -> dict[str, Any]:
    chosen = dict(ADAPTERS[name])
    if name == "all" and kind == "medium":
        chosen["targets"] += SECOND
    return chosen


def relative(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What nothing refers to is freed at once; what is left then waits in a cycle of references."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("adapted", ADAPTERS)
@pytest.mark.parametrize("kind", ["medium", "large"])
def test_velocity_and_gradients_are_diffusers(
    make_transformer: Make, make_inputs: Make, kind: str, adapted: str, shape: str
) -> None:
    small, inputs = make_transformer(kind, **adapters(adapted, kind)), make_inputs(**INPUTS[shape])
    expected, found = small.eager(inputs), small.by_hand(inputs)
    assert relative(found.velocity, expected.velocity) < 1e-5
    assert relative(found.gradient, expected.gradient) < 1e-5
    sizes = [parameter.numel() for parameter in small.parameters]
    pairs = zip(small.names, found.gradient.split(sizes), expected.gradient.split(sizes), strict=True)
    for name, of_one, truth in pairs:
        # In each adapter, too; one text token has but one key to look at, or two, and gradients near zero.
        allowed = 1e-5 * max(truth.norm(), 1e-2 * expected.gradient.norm() * len(sizes) ** -0.5)
        assert (of_one - truth).norm() <= allowed, name


def test_adapters_of_every_layer_have_a_gradient_but_those_computed_for_nothing(
    make_transformer: Make, make_inputs: Make
) -> None:
    """The queries of the last block's text."""
    small = make_transformer(**adapters("all", "medium"))
    gradient = small.by_hand(make_inputs()).gradient
    sizes = [parameter.numel() for parameter in small.parameters]
    dead = {name for name, piece in zip(small.names, gradient.split(sizes), strict=True) if not piece.any()}
    assert dead == {f"transformer_blocks.2.attn.add_q_proj.lora_{side}.policy.weight" for side in "AB"}


@pytest.mark.parametrize("attention", ["cpu", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "adapted"), [("medium", "all"), ("medium", "down"), ("large", "published")])
def test_what_is_kept_changes_no_bit(
    make_transformer: Make, make_inputs: Make, kind: str, adapted: str, dtype: torch.dtype, attention: str
) -> None:
    small, inputs = make_transformer(kind, **adapters(adapted, kind), dtype=dtype), make_inputs(dtype=dtype)
    first, *others = (small.by_hand(inputs, checkpointing=kept, attention=attention) for kept in CHECKPOINTING)
    assert first.gradient.any() and first.gradient.isfinite().all()
    for other in others:
        assert torch.equal(other.velocity, first.velocity)
        assert torch.equal(other.gradient, first.gradient)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_profiler_sees_the_kind_of_each_block(make_transformer: Make, make_inputs: Make, checkpointing: str) -> None:
    seen, depth = [], 0

    @contextmanager
    def watch(name: str, category: str) -> Iterator[None]:
        nonlocal depth
        assert category == "block"
        seen.append("  " * depth + name)
        depth += 1
        yield
        depth -= 1

    small = make_transformer("medium", dual_attention_layers=(0,))
    with watched_by(watch):
        small.by_hand(make_inputs(), checkpointing=checkpointing)
    kinds = ["block dual", "block joint", "block last"]
    again = checkpointing == "full"
    backward = [[f"{kind} backward", *([f"  {kind}"] if again else [])] for kind in reversed(kinds)]
    assert seen == [*kinds, *(name for names in backward for name in names)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_equal_weights_give_equal_bits_with_and_without_gradients(
    make_transformer: Make, make_inputs: Make, checkpointing: str, batch: int, dtype: torch.dtype
) -> None:
    """The policy with its gradients, the old policy in its own memory without, and with B = 0 the base with neither."""
    small, inputs = make_transformer(dtype=dtype), make_inputs(batch, text_length=33, dtype=dtype)
    transformer = small.fused(checkpointing=checkpointing)
    (conditioned,) = transformer.condition(inputs.timestep[None], inputs.conditioning)

    def velocity(flat: Tensor | None) -> Tensor:
        view = None if flat is None else transformer.adapted(flat)
        return transformer.velocity(inputs.x, conditioned, view)

    policy = velocity(small.flat.clone().requires_grad_())
    old = velocity(small.flat.clone())
    assert policy.requires_grad and not old.requires_grad
    with torch.no_grad():
        without = velocity(small.flat.clone().requires_grad_())
    assert torch.equal(policy, old) and torch.equal(policy, without)

    b_is_zero = torch.cat(
        [p.detach().flatten() * (".lora_A." in name) for name, p in zip(small.names, small.parameters, strict=True)]
    )
    base = velocity(None)
    assert torch.equal(velocity(b_is_zero), base)
    assert torch.equal(velocity(b_is_zero.clone().requires_grad_()), base)
    assert not torch.equal(policy, base)


def test_evaluations_are_conditioned_together_as_alone(make_transformer: Make, make_inputs: Make) -> None:
    small, inputs = make_transformer(), make_inputs(3)
    transformer = small.fused()
    timestep_EB = torch.tensor([[999.0, 500.0, 1.0], [3.5, 700.0, 12.0]])
    for timestep_B, together in zip(timestep_EB, transformer.condition(timestep_EB, inputs.conditioning), strict=True):
        (alone,) = transformer.condition(timestep_B[None], inputs.conditioning)
        both = (transformer.velocity(inputs.x, each, None) for each in (together, alone))
        assert relative(*both) < 1e-6


def test_the_memory_layout_of_latents_changes_no_bit(make_transformer: Make, make_inputs: Make) -> None:
    small, inputs = make_transformer(), make_inputs(3)
    transformer = small.fused()
    (conditioned,) = transformer.condition(inputs.timestep[None], inputs.conditioning)
    view = transformer.adapted(small.flat)
    expected = transformer.velocity(inputs.x, conditioned, view)
    for x in (inputs.x.to(memory_format=torch.channels_last), inputs.x.mT.contiguous().mT):
        assert not x.is_contiguous()
        # The embedding's convolution may sum in another order.
        assert relative(transformer.velocity(x, conditioned, view), expected) < 1e-6


def test_float64_is_diffusers_up_to_its_float32_norms(make_transformer: Make, make_inputs: Make) -> None:
    """diffusers computes the mean square of queries and keys in float32 whatever their dtype."""
    for kind in ("medium", "large"):
        small, inputs = make_transformer(kind, dtype=torch.float64), make_inputs(dtype=torch.float64)
        expected, found = small.eager(inputs), small.by_hand(inputs)
        assert relative(found.velocity, expected.velocity) < 1e-7
        assert relative(found.gradient, expected.gradient) < 1e-7


@pytest.mark.parametrize("adapted", ["published", "all"])
@pytest.mark.parametrize("kind", ["medium", "large"])
def test_bfloat16_is_as_exact_as_diffusers(make_transformer: Make, make_inputs: Make, kind: str, adapted: str) -> None:
    """Against float64 with the same numbers: at most 1.2 times the error of diffusers' bfloat16.

    Of the root mean square over seeds, which chance moves less than the ratio of one seed, or than their median.
    """
    squares = {"velocity": torch.zeros(2), "gradient": torch.zeros(2)}
    for seed in range(8):
        how = {**adapters(adapted, kind), "seed": seed}
        inputs = make_inputs(2, text_length=40, height=8, width=10, seed=seed)
        exact = make_transformer(kind, **how, dtype=torch.float64).by_hand(inputs.to(torch.float64))
        half = make_transformer(kind, **how, dtype=torch.bfloat16)
        inputs = inputs.to(torch.bfloat16)
        results = half.by_hand(inputs), half.eager(inputs)
        for name, sums in squares.items():
            truth = getattr(exact, name)
            sums += torch.tensor([relative(getattr(result, name), truth) ** 2 for result in results])
    for name, sums in squares.items():
        ours, diffusers = (sums / 8).sqrt().tolist()
        assert ours <= 1.2 * diffusers, f"{name}: {ours:.3g}, diffusers {diffusers:.3g}"


class Repeatable(BlockFunction):
    """The same, for gradcheck, which goes back through one graph many times."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pull = ctx.pull
        gradients = BlockFunction.backward(ctx, *grads)
        ctx.pull = pull
        return gradients  # type: ignore[no-any-return]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(("kind", "index"), [("medium", 0), ("large", 1), ("medium", 2)])
def test_a_block_passes_gradcheck(
    make_transformer: Make, make_inputs: Make, kind: str, index: int, checkpointing: Any
) -> None:
    """With a second attention, without, and the last: by finite differences in adapters and both streams."""
    small = make_transformer(
        kind, **{**adapters("all", kind), "rank": 1, "alpha": 0.7}, dtype=torch.float64, num_attention_heads=2,
        attention_head_dim=2, caption_projection_dim=4,
    )  # fmt: skip
    inputs = make_inputs(1, text_length=2, height=2, width=6, dtype=torch.float64)
    transformer = small.fused()
    (conditioned,) = transformer.condition(inputs.timestep[None], inputs.conditioning)
    conditions = fused_transformer._conditions(conditioned, 4)[index]
    block = transformer.blocks[index]
    flat = transformer.adapted(small.flat.clone()).flats[index].clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.randn(1, tokens, 4, generator=generator, dtype=torch.float64).requires_grad_() for tokens in (3, 2)
    )

    def streams_behind(flat: Tensor, image: Tensor, text: Tensor) -> Tensor:
        outputs = Repeatable.apply(
            block, conditions, block.cut(flat.detach()), checkpointing, flat,
            image, conditions.image.norm.of(image), text, conditions.text.norm.of(text),
        )  # fmt: skip
        # As one: the block that reads them has gradients of all.
        return torch.cat([output.flatten() for output in outputs if output is not None])

    assert torch.autograd.gradcheck(
        streams_behind, (flat, image, text), atol=1e-6, rtol=1e-4, check_undefined_grad=False
    )


def shape_of(small: Any) -> TransformerShape:
    return TransformerShape.from_config(small.module.config)


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("kind", ["medium", "large"])
def test_it_multiplies_what_the_count_of_flops_says(
    make_transformer: Make, make_inputs: Make, products: Make, kind: str, checkpointing: str
) -> None:
    """Products run once: none again for the backward pass, none there for frozen weights, none below the first adapter,
    where lie the first block's queries, keys and values, and all of its second attention.
    """
    small, inputs = make_transformer(kind), make_inputs(2)
    transformer, flat = small.fused(checkpointing=checkpointing, attention="math"), small.flat.clone().requires_grad_()
    (conditioned,) = transformer.condition(inputs.timestep[None], inputs.conditioning)
    shape, batch = shape_of(small), len(inputs.x)
    num_image = inputs.x[0, 0].numel() // shape.patch**2
    tokens = shape.tokens(16, 1)._replace(image=num_image, text=inputs.conditioning.text_BND.shape[1])
    with products() as forward:
        velocity = transformer.velocity(inputs.x, conditioned, transformer.adapted(flat))
    expected = shape.forward_flops(tokens) + shape.adapter_flops(tokens, PUBLISHED_TARGETS, rank=small.rank)
    beforehand = sum(
        2 * linear.inputs * linear.outputs * tokens.of(linear.stream)
        for linear in shape.linears
        if linear.stream == "once" or linear.name.startswith(("pos_embed", "context_embedder"))
    )  # the embedding of patches is a convolution
    assert forward.gemm_flops == batch * (expected.gemm - beforehand)
    assert forward.attention_flops == batch * expected.attention
    with products() as backward:
        velocity.backward(inputs.grad)
    expected = shape.backward_flops(tokens, PUBLISHED_TARGETS, rank=small.rank)
    assert backward.gemm_flops == batch * expected.gemm
    assert backward.attention_flops == batch * expected.attention


def blocks_in_graph(velocity: Tensor) -> int:
    """How many blocks a backward pass goes through."""
    seen, ahead = set(), [velocity.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "BlockFunctionBackward" for node in seen)


def forward_in(memory: Any, small: Any, inputs: Any, **how: str) -> tuple[Tensor, int]:
    """The velocity with gradients, and the bytes that are kept for the backward pass; the velocity itself is not."""
    transformer, flat = small.fused(**how), small.flat.clone().requires_grad_()
    (conditioned,) = transformer.condition(inputs.timestep[None], inputs.conditioning)
    view = transformer.adapted(flat)
    with memory:
        velocity = transformer.velocity(inputs.x, conditioned, view)
    return velocity, memory.live_bytes - velocity.untyped_storage().nbytes()


def test_blocks_before_the_first_adapter_keep_nothing(
    make_transformer: Make, make_inputs: Make, memory: Make, products: Make
) -> None:
    inputs = make_inputs()
    third = make_transformer("large", targets=("transformer_blocks.2.attn.to_q",))
    alone = make_transformer("large", targets=("transformer_blocks.0.attn.to_q",), num_layers=1)
    velocity, kept = forward_in(memory(), third, inputs, attention="math")
    expected_velocity, expected = forward_in(memory(), alone, inputs, attention="math")
    assert blocks_in_graph(velocity) == blocks_in_graph(expected_velocity) == 1
    # The text before block 0 is the caller's, before block 2 it is what block 1 made.
    assert kept == expected + 2 * 7 * 32 * 4
    with products() as backward:
        velocity.backward(inputs.grad)
    with products() as expected_backward:
        expected_velocity.backward(inputs.grad)
    assert backward.found == expected_backward.found


@pytest.mark.parametrize(("targets", "attends"), [(("ff.net.2",), False), (("attn2.to_k",), True)])
def test_the_first_adapted_block_goes_back_to_its_first_adapter(
    make_transformer: Make, make_inputs: Make, memory: Make, products: Make, targets: tuple[str, ...], attends: bool
) -> None:
    """Through its attention only where that has adapters, and never through the joint one for the second's."""
    small = make_transformer(targets=targets, num_layers=2, dual_attention_layers=(0,))
    velocity, _ = forward_in(memory(), small, make_inputs(1), attention="math")
    with products() as backward:
        velocity.sum().backward()
    num_image, num_text, width = 15, 7, 32
    joint, second = 8 * width * (num_image + num_text) ** 2, 8 * width * num_image**2
    assert backward.attention_flops == joint + attends * second  # the joint one is the second block's


KEPT = {
    # widths of a token: input or stream behind, middle, qkv, attention's output, up; with GELU, norms and q, k, v
    ("large", "selective"): (10, 10),
    ("large", "none"): (19, 19),
    ("large", "full"): (2, 2),
    ("medium", "selective"): (14, 10),
    ("medium", "none"): (27, 19),
    ("medium", "full"): (2, 2),
}


@pytest.mark.parametrize(("kind", "checkpointing"), KEPT)
def test_a_block_keeps_what_it_says(
    make_transformer: Make, make_inputs: Make, memory: Make, kind: str, checkpointing: str
) -> None:
    """By the difference of one block: so many widths of each image and text token, the products with A, and what
    attention leaves of each row.
    """
    inputs, kept = make_inputs(2), []
    for num_layers in (3, 4):
        small = make_transformer(
            kind, num_layers=num_layers, dual_attention_layers=range(4) if kind == "medium" else ()
        )
        velocity, num_bytes = forward_in(memory(), small, inputs, checkpointing=checkpointing)
        kept.append(num_bytes)
        del velocity
    batch, num_image, num_text, width, heads = 2, 15, 7, 32, 2
    image, text = KEPT[kind, checkpointing]
    numbers = num_image * image * width + num_text * text * width
    if checkpointing != "full":
        low_rank, rows = 4 * small.rank * (num_image + num_text), heads * (num_image + num_text)
        rows += heads * num_image if kind == "medium" else 0
        numbers += low_rank + rows
    assert (kept[1] - kept[0]) / 4 / batch == numbers


@pytest.mark.parametrize("attention", ["cpu", "math"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["medium", "large"])
def test_nothing_waits_for_the_garbage_collector(
    make_transformer: Make, make_inputs: Make, memory: Make, kind: str, checkpointing: str, attention: str
) -> None:
    """Outputs know their pullbacks; no pullback knows its output. After the backward pass, and without one."""
    small, inputs = make_transformer(kind), make_inputs()
    with no_garbage_collection():
        for goes_back in (True, False):
            measured = memory()
            velocity, kept = forward_in(measured, small, inputs, checkpointing=checkpointing, attention=attention)
            assert kept > 0
            if goes_back:
                with measured:
                    velocity.backward(inputs.grad)
                # Before the graph itself is gone: the gradient of the adapters, and the velocity.
                assert measured.live_bytes == small.flat.nbytes + velocity.nbytes
            del velocity
            assert measured.live_bytes == 0


@pytest.mark.parametrize("kind", ["medium", "large"])
def test_without_gradients_a_block_leaves_nothing_to_the_next(
    make_transformer: Make, make_inputs: Make, memory: Make, kind: str
) -> None:
    """Every block begins its attention with the same memory in use."""
    small, inputs, measured, found = make_transformer(kind, num_layers=4), make_inputs(), memory(), []
    plain = ATTENTIONS["cpu"]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if q.shape[1] == 15 + 7:  # the joint one
            found.append(measured.live_bytes)
        return plain.forward(q, k, v)

    watching = Attention(name="watching", forward=forward, backward=plain.backward, missing=plain.missing)
    transformer = FusedTransformer(
        small.module, attention=watching, checkpointing="selective", rank=small.rank, scaling=small.scaling
    )
    (conditioned,) = transformer.condition(inputs.timestep[None], inputs.conditioning)
    with measured, torch.no_grad():
        transformer.velocity(inputs.x, conditioned, transformer.adapted(small.flat))
    # The text before the first block is the caller's.
    assert len(found) == 4
    assert found[1:] == [found[0] + 2 * 7 * 32 * 4] * 3


def test_there_is_no_second_copy(make_transformer: Make, make_inputs: Make) -> None:
    def storages(tensors: Sequence[Tensor]) -> dict[int, int]:
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    small, inputs = make_transformer(**adapters("all", "medium")), make_inputs()
    parameters = list(small.module.parameters())
    values, expected = [parameter.detach().clone() for parameter in parameters], small.eager(inputs)
    num_bytes = sum(storages(parameters).values())
    transformer = small.fused()
    of_products = [p for block in transformer.blocks for projection in block.projections for p in (
        projection.weight, projection.bias) if p is not None]  # fmt: skip
    after = storages(parameters)
    assert sum(after.values()) == num_bytes
    assert storages(of_products).keys() <= after.keys()
    assert not any(tensor.requires_grad for tensor in of_products)
    for parameter, value in zip(parameters, values, strict=True):
        assert torch.equal(parameter, value)
    again = small.eager(inputs)
    # Memory alignment may choose another kernel.
    assert relative(again.velocity, expected.velocity) < 1e-6
    assert relative(again.gradient, expected.gradient) < 1e-6
    # diffusers' module and the fused one read the same numbers.
    before = small.by_hand(inputs).velocity
    with torch.no_grad():
        small.module.transformer_blocks[1].attn.to_v.base_layer.weight.mul_(1.5)
    after_change = small.by_hand(inputs).velocity
    assert relative(after_change, before) > 1e-3
    assert relative(after_change, small.eager(inputs).velocity) < 1e-5


def test_projections_cover_every_linear_layer_of_a_block(make_transformer: Make) -> None:
    small = make_transformer()
    for index, module in enumerate(small.module.transformer_blocks):
        linear = {name for name, layer in module.named_modules() if type(layer).__name__ == "Linear"}
        linear = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}
        found = {layer for layers in PROJECTIONS.values() for layer in layers if layer in linear}
        assert found == {name for name in linear if not name.startswith("norm1")}, index


def test_the_stacked_module_is_saved_and_copied_as_before(make_transformer: Make, tmp_path: Path) -> None:
    small = make_transformer()
    expected = {name: tensor.clone() for name, tensor in small.module.state_dict().items()}
    transformer = small.fused()
    small.module.save_pretrained(tmp_path / "pretrained")
    torch.save(small.module.state_dict(), tmp_path / "state.pt")
    copied = copy.deepcopy(small.module)
    saved = load_file(tmp_path / "pretrained" / "diffusion_pytorch_model.safetensors")
    for found in (saved, torch.load(tmp_path / "state.pt"), copied.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    small.module.load_state_dict({name: tensor + 1 for name, tensor in expected.items()})
    stack = transformer.blocks[0].joint.image_qkv.weight
    weights = [expected[f"transformer_blocks.0.attn.to_{name}.base_layer.weight"] for name in "qkv"]
    assert torch.equal(stack, torch.cat(weights) + 1)


def test_frozen_weights_have_no_gradient(make_transformer: Make, make_inputs: Make, memory: Make) -> None:
    small, inputs = make_transformer(), make_inputs()
    small.module.requires_grad_(False)
    velocity, _ = forward_in(memory(), small, inputs)
    velocity.backward(inputs.grad)
    assert all(parameter.grad is None for parameter in small.module.parameters())


def test_a_model_without_qk_norm_is_refused(make_transformer: Make) -> None:
    with pytest.raises(UserError, match=r"^model\.engine: fused is for models with qk_norm rms_norm .*None.*eager"):
        make_transformer("large", qk_norm=None).fused()


@pytest.mark.parametrize("target", ["norm1.linear", "proj_out", "context_embedder"])
def test_an_adapter_outside_the_products_is_refused(make_transformer: Make, target: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.engine: fused has adapters on .*{target}; use model\.engine eager"):
        make_transformer(targets=("attn.to_q", target)).fused()


@pytest.mark.own_process
def test_it_runs_on_triton_in_its_interpreter(interpreter_environ: dict[str, str]) -> None:
    """The comparison with diffusers at the smallest shape, again in a process whose operators are Triton's."""
    chosen = f"{__file__}::test_velocity_and_gradients_are_diffusers[medium-all-one-text-token]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", chosen]
    run = subprocess.run(command, env=interpreter_environ, capture_output=True, text=True)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr
