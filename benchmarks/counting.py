"""What a GPU would run: kernels, bytes and FLOPs of any computation, counted on tensors without memory.

    with meta_gpu(), KernelCounter() as counter:
        velocity = transformer(...)  # all on the device "meta"
    totals(counter.kernels)

A kernel is an operator, of torch or of this project, that makes a tensor or writes into one: not a view, not an
allocation. Its bytes are those of the tensors that it reads and of those that it writes, what an expanded dimension
repeats counted once. FLOPs are those of torch.utils.flop_counter: what runs, so that the backward of attention computes
its scores again. Not seen: what a cache saves, and that some operators are several kernels (the backward of attention
or of a norm whose weights learn).

The device "meta" needs neither memory nor CUDA and counts alike on every machine. `meta_gpu` and `CudaAutocast` do what
torch does on CUDA only. (FakeTensorMode on "cuda" would choose kernels itself, but has no backward without a GPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import Node
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

GEMM, ATTENTION, RMS_NORM, OTHER = "gemm", "attention", "rms norm", "other"
PRODUCTS = (GEMM, ATTENTION)
"""The categories that compute; all others move bytes."""

_CATEGORIES: Mapping[str, str] = {
    "_to_copy": "cast",
    "mul": "mul",
    "add": "add",
    "native_layer_norm": "layer norm",
    "native_layer_norm_backward": "layer norm",
    "gelu": "gelu",
    "gelu_backward": "gelu",
    "cat": "cat",
    "clone": "copy",
    "copy": "copy",
    "slice_backward": "copy",
}
_OVERWRITING = ("copy", "fill", "zero")
"""Updates in place that do not read what they write."""


class Kernel(NamedTuple):
    """One launch.

    Attributes:
        operator: "aten.mul", "dgpo_fast.gate_residual_backward"; an update in place bears the name without "_".
        category: what it does: GEMM, ATTENTION, "cast", "add", ...; an operator of this project is its own. RMS_NORM is
            what is left of an RMSNorm without its casts, additions and multiplications.
        module: class of the innermost module that runs it, or whose gradient it computes; "" outside of modules.
        is_backward: launched by the backward pass.
        num_bytes: read and written.
        flops: of a product; 0 of what only moves bytes.
    """

    operator: str
    category: str
    module: str
    is_backward: bool
    num_bytes: int
    flops: int


class Totals(NamedTuple):
    """Sums over kernels."""

    kernels: int
    num_bytes: int
    flops: int


def totals(kernels: Iterable[Kernel]) -> Totals:
    """Sums over `kernels`."""
    each = list(kernels)
    return Totals(len(each), sum(kernel.num_bytes for kernel in each), sum(kernel.flops for kernel in each))


def totals_by(key: Callable[[Kernel], Any], kernels: Iterable[Kernel]) -> dict[Any, Totals]:
    """Sums over the kernels of each key, the most bytes first."""
    groups: dict[Any, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(key(kernel), []).append(kernel)
    sums = {name: totals(group) for name, group in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].num_bytes))


@contextmanager
def meta_gpu() -> Iterator[None]:
    """Tensors are made on "meta"; attention is one kernel there, with flash attention's layouts, as on a GPU."""
    with torch.device("meta"), _FlashAttention():
        yield


class KernelCounter(TorchDispatchMode):
    """Collects in `kernels` what runs within it, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self._modules: list[str] = []
        self._module_of_node: dict[int, str] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> KernelCounter:
        self._hooks.enter_context(register_module_forward_pre_hook(self._enter_module))
        self._hooks.enter_context(register_module_forward_hook(self._leave_module))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, operator: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        node = torch._C._current_autograd_node()
        module = self._module(node)
        result = operator(*args, **(kwargs or {}))
        is_backward = node is not None
        self.kernels += kernels_of_call(operator, args, kwargs or {}, result, module, is_backward=is_backward)
        return result

    def _enter_module(self, module: torch.nn.Module, _: Any) -> None:
        self._modules.append(type(module).__name__)

    def _leave_module(self, *_: Any) -> None:
        self._modules.pop()

    def _module(self, node: Node | None) -> str:
        # Autograd numbers its nodes, and makes one just before it dispatches the operator: the first operator to see a
        # number is the node's.
        if node is not None:
            return self._module_of_node.get(node._sequence_nr(), "")
        module = self._modules[-1] if self._modules else ""
        if torch.is_grad_enabled():
            self._module_of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
        return module


def kernels_of_call(
    operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, module: str, *, is_backward: bool
) -> Iterator[Kernel]:
    """What a call of an operator launches, given its arguments and what it returned."""
    return _Call(operator, args, kwargs, result).kernels(module, is_backward=is_backward)


class _Call:
    """An operator with what it was given and what came back."""

    def __init__(self, operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self._operator, self._args, self._kwargs, self._result = operator, args, kwargs, result
        name = operator._schema.name.partition("::")[2]
        self._name = name.removesuffix("_")
        self._packet = getattr(getattr(torch.ops, operator.namespace), self._name, operator.overloadpacket)
        self._read: list[Tensor] = []
        self._written: list[Tensor] = []
        given = {argument.name: value for argument, value in zip(operator._schema.arguments, args, strict=False)}
        for argument in operator._schema.arguments:
            tensors = _tensors({**given, **kwargs}.get(argument.name))
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes:
                self._written += tensors
            if not writes or not (argument.is_out or self._name in _OVERWRITING):
                self._read += tensors
        memory = {x.untyped_storage()._cdata for x in (*self._read, *self._written)}
        self._made = [x for x in _tensors(result) if x.untyped_storage()._cdata not in memory]

    def kernels(self, module: str, *, is_backward: bool) -> Iterator[Kernel]:
        """Its launches: none of a view or an allocation."""
        outputs = [*self._made, *self._written]
        if not any(x.numel() for x in outputs) or "empty" in self._name:
            return
        read, written = sum(map(_num_bytes, self._read)), sum(map(_num_bytes, outputs))
        kernel = Kernel(
            operator=f"{self._operator.namespace}.{self._name}",
            category=self._category(module),
            module=module,
            is_backward=is_backward,
            num_bytes=read + written,
            flops=self._flops(),
        )
        if self._name == "slice_backward":  # fills the whole with zeros, then copies what it was given
            yield kernel._replace(operator="aten.zeros", num_bytes=written)
            kernel = kernel._replace(num_bytes=2 * read)
        yield kernel

    def _category(self, module: str) -> str:
        if self._operator.namespace == "dgpo_fast":
            return self._name
        if "attention" in self._name or "flash_attn" in self._operator.namespace:
            return ATTENTION
        if self._packet in flop_registry:
            return GEMM
        return _CATEGORIES.get(self._name, RMS_NORM if module == "RMSNorm" else OTHER)

    def _flops(self) -> int:
        formula = flop_registry.get(self._packet)
        if formula is None:
            if self._category("") == ATTENTION:
                raise ValueError(f"{self._operator}: torch.utils.flop_counter has no formula, register one")
            return 0
        return int(formula(*self._args, **self._kwargs, out_val=self._result))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _num_bytes(x: Tensor) -> int:
    """Bytes of the elements of a view; those that an expanded dimension repeats count once."""
    return x.itemsize * prod(
        1 if stride == 0 < size else size for size, stride in zip(x.shape, x.stride(), strict=True)
    )


class _FlashAttention(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is scaled_dot_product_attention:
            function = _flash_attention
        return function(*args, **(kwargs or {}))


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    return attention(query, key, value, dropout_p, is_causal)[0]  # type: ignore[no-any-return]


class CudaAutocast(TorchFunctionMode):
    """The casts of torch.autocast("cuda", torch.bfloat16), for tensors of any device.

    The names are those of torch's lists for CUDA (docs, "Autocast Op Reference") that a transformer's forward needs.
    A weight is cast at each use, as autocast does with frozen ones; of those that learn it keeps the copy, which makes
    no difference where each is used once. Forward of SD3.5-M: kernel for kernel what autocast does on fake tensors of
    the device "cuda" (torch 2.13, 2026-11).
    """

    BFLOAT16 = frozenset(
        ("addmm", "baddbmm", "bmm", "conv2d", "linear", "matmul", "__matmul__", "mm", "scaled_dot_product_attention")
    )
    FLOAT32 = frozenset(("exp", "layer_norm", "log", "pow", "__pow__", "reciprocal", "rsqrt", "softmax"))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, given = getattr(function, "__name__", ""), kwargs or {}
        dtype = torch.bfloat16 if name in self.BFLOAT16 else torch.float32 if name in self.FLOAT32 else None
        if dtype is not None:
            args, given = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, given))
        return function(*args, **given)
