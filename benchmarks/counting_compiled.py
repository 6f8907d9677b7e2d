"""What torch.compile makes of SD3's blocks: counted on Inductor's own schedule, with nothing generated and nothing run.

A node of the schedule is a kernel, and its bytes are those of the buffers that it reads and writes, as Inductor counts
them for itself. Products and attention are counted on the graph before it, as those of any other computation.

Inductor schedules for a CPU here, since for a GPU it needs one. Both share the rules by which it fuses; a GPU's kernels
may be cut further, where a reduction is too long for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._functorch import config as aot_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.counting import PRODUCTS, Kernel, kernels_of_call
from dgpo_fast.models.architectures import Tokens, TransformerShape

FUSED = "compiled"
"""The category of what Inductor generates."""


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


for _operator, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _attention_flops),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward_flops),
):
    if _operator not in flop_registry:  # torch 2.13 knows those of a GPU only
        register_flop_formula(_operator)(_formula)


class BlockKind(NamedTuple):
    """What blocks have to share to be compiled into the same."""

    has_second_attention: bool
    is_last: bool
    gets_gradient: bool  # of its input: all but the first


class _Counted(Exception):
    """Ends Inductor's work once its schedule is there: no error."""


def count_blocks(
    shape: TransformerShape,
    make: Callable[[TransformerShape], nn.Module],
    samples: int,
    tokens: Tokens,
    *,
    learns: bool,
) -> list[Kernel]:
    """What all blocks of a transformer launch, forward and with `learns` backward, each compiled by itself.

    Args:
        make: gives the transformer of a shape, in bfloat16 on "meta", with the adapters that learn.
    """
    kinds = kinds_of_blocks(shape)
    with torch.device("meta"):
        transformer = make(_one_of_each_kind(shape, kinds))
    transformer.to_empty(device="cpu")
    kernels, blocks = list[Kernel](), transformer.transformer_blocks
    assert isinstance(blocks, nn.ModuleList)
    for block, (kind, num_blocks) in zip(blocks, kinds.items(), strict=True):
        kernels += num_blocks * _count_block(block, kind, shape.width, samples, tokens, learns=learns)
    return kernels


def kinds_of_blocks(shape: TransformerShape) -> Counter[BlockKind]:
    """How many blocks of each kind a transformer has, in the order of their first."""
    return Counter(
        BlockKind(index in shape.dual_attention_layers, index == shape.layers - 1, index > 0)
        for index in range(shape.layers)
    )


def _one_of_each_kind(shape: TransformerShape, kinds: Counter[BlockKind]) -> TransformerShape:
    dual = tuple(index for index, kind in enumerate(kinds) if kind.has_second_attention)
    return replace(shape, layers=len(kinds), dual_attention_layers=dual)


def _count_block(
    block: nn.Module, kind: BlockKind, width: int, samples: int, tokens: Tokens, *, learns: bool
) -> list[Kernel]:
    """Of a block on the CPU, whose memory is never touched."""
    image_BND, text_BND, embedded_BD = (
        torch.empty(*sizes, width, dtype=torch.bfloat16)
        for sizes in ((samples, tokens.image), (samples, tokens.text), (samples,))
    )
    for each in (image_BND, text_BND):
        each.requires_grad_(learns and kind.gets_gradient)
    kernels: list[Kernel] = []
    compiled = torch.compile(block, dynamic=False, backend=_counting_backend(type(block).__name__, kernels))
    with _without_caches(), torch.set_grad_enabled(learns):
        text_out, image_out = compiled(image_BND, text_BND, embedded_BD)
        if learns:
            ends = [image_out] if text_out is None else [image_out, text_out]
            torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
            learning = [parameter for parameter in block.parameters() if parameter.requires_grad]
            kernels += [Kernel("aten.add", "add", "", True, 3 * parameter.nbytes, 0) for parameter in learning]
    return kernels


def _counting_backend(module: str, kernels: list[Kernel]) -> Callable[[GraphModule, Sequence[Tensor]], Any]:
    """A backend for torch.compile that adds to `kernels`, and computes nothing."""

    def count(graph: GraphModule, inputs: Sequence[Tensor], **options: Any) -> Any:
        is_backward = bool(options.get("is_backward"))
        given_back = graph.graph.output_node().args[0]
        assert isinstance(given_back, Sequence)
        outputs = [node.meta["val"] if isinstance(node, Node) else node for node in given_back]
        kernels.extend(_products(graph, module, is_backward=is_backward))
        generated: list[Kernel] = []

        def read_schedule(lowering: GraphLowering) -> None:
            lowering.codegen()
            generated.extend(_generated(lowering, module, is_backward=is_backward))
            raise _Counted

        with patch.object(GraphLowering, "compile_to_module", read_schedule):
            try:
                compile_fx_inner(graph, inputs, **options)
            except Exception:  # Inductor wraps what is raised
                if not generated:
                    raise
        kernels.extend(generated)

        def compute_nothing(given: list[Any]) -> list[Any]:
            given.clear()
            return [_untouched(output) if isinstance(output, Tensor) else output for output in outputs]

        compute_nothing._boxed_call = True  # type: ignore[attr-defined]
        return compute_nothing

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=count)


def _products(graph: GraphModule, module: str, *, is_backward: bool) -> Iterator[Kernel]:
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = tree_map_only(Node, lambda each: each.meta["val"], (node.args, node.kwargs))
            made = kernels_of_call(node.target, args, kwargs, node.meta["val"], module, is_backward=is_backward)
            yield from (kernel for kernel in made if kernel.category in PRODUCTS)


def _generated(lowering: GraphLowering, module: str, *, is_backward: bool) -> Iterator[Kernel]:
    """All but products, attention and what only names another node's output."""
    for node in lowering.scheduler.nodes:
        if not isinstance(node, (ExternKernelSchedulerNode, NopKernelSchedulerNode)):
            num_bytes = int(node.get_read_write_buffers_sizes())
            yield Kernel("inductor", FUSED, module, is_backward, num_bytes, 0)


def _untouched(like: Tensor) -> Tensor:
    sizes, strides = ([int(each) for each in given] for given in (like.shape, like.stride()))
    return torch.empty_strided(sizes, strides, dtype=like.dtype)


@contextmanager
def _without_caches() -> Iterator[None]:
    """A graph that is known already would not be scheduled."""
    torch._dynamo.reset()
    with inductor_config.patch(fx_graph_cache=False), aot_config.patch(enable_autograd_cache=False):
        yield
