"""Attention kernels by name: numbers against float64, and the arguments that CUDA and flash-attn are called with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo_fast.errors import UserError
from dgpo_fast.models.fused.attention import ATTENTIONS, find_attention

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)
RUN_HERE = ("cpu", "math")


def random_qkvg(*, dtype: torch.dtype, num_tokens: int = 37, head_dim: int = 16) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, [B, N, H, D], of the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (2, num_tokens, 3, head_dim)
    return [torch.randn(shape, generator=generator).bfloat16().to(dtype) for _ in range(4)]


def run(name: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v."""
    attention = ATTENTIONS[name]
    out, left = attention.forward(q, k, v)
    return out, *attention.backward(grad, q, k, v, out, left)


def by_autograd(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """The same of `attend`, which takes torch's layout, [B, H, N, D]."""
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = attend(*(leaf.transpose(1, 2) for leaf in leaves)).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(37, 16), (1, 64), (130, 64)])
@pytest.mark.parametrize("name", RUN_HERE)
def test_it_is_as_exact_as_torchs_attention(name: str, num_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    check_exactness(name, random_qkvg(dtype=dtype, num_tokens=num_tokens, head_dim=head_dim))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1024, 1229])  # of 512 px alone, and with 205 of text
@pytest.mark.parametrize("name", ATTENTIONS)
def test_it_is_as_exact_on_cuda(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    if (missing := ATTENTIONS[name].missing(device, dtype)) is not None:
        pytest.skip(f"{name} {missing}")
    given = random_qkvg(dtype=dtype, num_tokens=num_tokens, head_dim=64)
    check_exactness(name, [argument.to(device) for argument in given])


def check_exactness(name: str, arguments: list[Tensor]) -> None:
    dtype = arguments[0].dtype
    exact = by_autograd(definition, *(argument.double() for argument in arguments))
    plain = by_autograd(functional.scaled_dot_product_attention, *arguments)
    for result, truth, torchs in zip(run(name, *arguments), exact, plain, strict=True):
        assert result.dtype == dtype and result.shape == truth.shape
        # Twice, as for every operator; what vanishes, the gradient of a lone token's query, is known to a rounding.
        allowed = 2 * (torchs - truth).norm() if truth.any() else torch.finfo(dtype).eps * arguments[3].norm()
        assert (result - truth).norm() <= allowed


def test_every_output_is_read_where_it_lies() -> None:
    """[B, N, H, D] with the heads of a token side by side: what is joined to a width next is a view."""
    q, k, v, _ = random_qkvg(dtype=torch.float32)
    for name in RUN_HERE:
        assert ATTENTIONS[name].forward(q, k, v)[0].is_contiguous(), name


class Calls(TorchDispatchMode):
    """The operators' calls: schema, arguments and results by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if "attention" in func.name():
            schema = func._schema
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
            returned = dict(zip((value.name for value in schema.returns), results, strict=True))
            self.by_name.append((func.name(), given, returned))
        return results


SAME = {"rng_state": "philox_seed", "unused": "philox_offset", "log_sumexp": "logsumexp", "output": "out"}
"""What the forward pass calls otherwise than the backward pass."""


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "cpu"])
def test_what_forward_leaves_comes_back_under_its_own_name(name: str) -> None:
    """By torch's schemas and shape functions, without a GPU: each tensor of the forward pass is the backward's of that
    name. Numbers are compared where the kernels run.
    """
    calls = Calls()
    with FakeTensorMode(), calls:
        q, k, v, grad = (torch.empty(2, 40, 3, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        results = run(name, q, k, v, grad)
    assert [result.shape for result in results] == [q.shape] * 4
    (_, given, left), (backward, returned, _) = calls.by_name
    assert backward.endswith("attention_backward") or name == "cpu"
    left = {SAME.get(key, key): value for key, value in left.items()}
    shared = {"logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"} & returned.keys()
    assert shared and shared <= left.keys()
    for key in shared:
        if isinstance(left[key], Tensor):
            assert returned[key] is left[key], key
        else:
            assert returned[key] == left[key] and type(returned[key]) is type(left[key]), key
    for key, tensor in {"query": q, "key": k, "value": v, "out": results[0]}.items():
        assert storage(returned[key]) == storage(tensor), key
        assert returned[key].shape == (2, 3, 40, 64), key
        assert key == "out" or storage(given[key]) == storage(tensor), key
    (grad_out,) = (value for key, value in returned.items() if key in ("grad_out", "grad_out_"))
    assert storage(grad_out) == storage(grad)
    assert returned["dropout_p"] == 0.0 and returned.get("is_causal", False) is False
    assert given.get("compute_log_sumexp", True) is True


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# As in flash-attention's repository: flash_attn/flash_attn_interface.py at v2.7.4 to v2.8.3, hopper/
# flash_attn_interface.py at v2.8.3 and after August 2025, when names and defaults changed.
FLASH2 = (
    "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes return_softmax",
    "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right softcap "
    "alibi_slopes deterministic rng_state=",
)
FLASH3_OF_2_8_3 = (
    "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k "
    "page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale "
    "softmax_scale causal window_size= attention_chunk= softcap= rotary_interleaved= scheduler_metadata= num_splits= "
    "pack_gqa= sm_margin=",
    "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv "
    "softmax_scale causal window_size= softcap= deterministic= sm_margin=",
)
FLASH3_OF_2026 = (
    "q k v k_new= v_new= qv= out_= cu_seqlens_q= cu_seqlens_k= cu_seqlens_k_new= seqused_q= seqused_k= max_seqlen_q= "
    "max_seqlen_k= page_table= kv_batch_idx= leftpad_k= rotary_cos= rotary_sin= seqlens_rotary= q_descale= k_descale= "
    "v_descale= softmax_scale= causal= window_size_left= window_size_right= attention_chunk= softcap= "
    "rotary_interleaved= scheduler_metadata= num_splits= pack_gqa= sm_margin=",
    "dout q k v out softmax_lse cu_seqlens_q= cu_seqlens_k= sequed_q= sequed_k= max_seqlen_q= max_seqlen_k= dq= dk= "
    "dv= softmax_scale= is_causal= window_size_left= window_size_right= softcap= deterministic= sm_margin=",
)
NEUTRAL = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "dropout_p": 0.0}


def with_signature(signature: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """A function of these parameters, those with "=" optional, which hands its arguments to `body` by name."""
    kind = Parameter.POSITIONAL_OR_KEYWORD
    bound = Signature(
        [
            Parameter(name.rstrip("="), kind, default=None if name.endswith("=") else Parameter.empty)
            for name in signature.split()
        ]
    )
    return lambda *args, **kwargs: body(**bound.bind(*args, **kwargs).arguments)


def stand_in(module: str, signatures: tuple[str, str], *, num_results: int) -> ModuleType:
    """A module with the functions of flash-attn that the package calls: their signatures, and arithmetic of our own."""

    def forward(*, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, **others: Any) -> Any:
        assert causal is False and softmax_scale == q.shape[-1] ** -0.5
        assert all(value is None or value == NEUTRAL.get(name, False) for name, value in others.items())
        out, left = ATTENTIONS["math"].forward(q, k, v)
        return out, *left, *[f"result {index}" for index in range(2, num_results)]

    def backward(
        *, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, softmax_scale: float, deterministic: bool, **others: Any,
    ) -> None:  # fmt: skip
        assert deterministic is True and softmax_scale == q.shape[-1] ** -0.5
        assert others.pop("rng_state", "result 3") == "result 3"
        assert others.pop("causal", False) is False and others.pop("is_causal", False) is False
        assert all(value is None or value == NEUTRAL[name] for name, value in others.items())
        gradients = ATTENTIONS["math"].backward(dout, q, k, v, out, (softmax_lse,))
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)

    made = ModuleType(module)
    made.__dict__.update(
        _flash_attn_forward=with_signature(signatures[0], forward),
        _flash_attn_backward=with_signature(signatures[1], backward),
    )
    return made


@pytest.mark.parametrize(
    ("name", "module", "signatures", "num_results"),
    [
        ("flash2", "flash_attn.flash_attn_interface", FLASH2, 4),
        ("flash3", "flash_attn_interface", FLASH3_OF_2_8_3, 2),
        ("flash3", "flash_attn_interface", FLASH3_OF_2026, 4),
    ],
    ids=["flash2", "flash3-of-2.8.3", "flash3-of-2026"],
)
def test_flash_attention_is_called_by_its_signature(
    name: str, module: str, signatures: tuple[str, str], num_results: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel of flash-attn runs here. A module with its signatures stands in, so that a wrong, missing or misplaced
    argument fails; that its kernels give these numbers is for a machine that has them.
    """
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, stand_in(module, signatures, num_results=num_results))
    arguments = random_qkvg(dtype=torch.float32)
    for result, expected in zip(run(name, *arguments), run("math", *arguments), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_auto_is_the_first_that_runs_here(dtype: torch.dtype) -> None:
    assert find_attention("auto", device=CPU, dtype=dtype).name == "cpu"


def test_auto_prefers_in_the_order_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of compute capability 9.0, with and without flash-attn, and for what half precision alone is for."""
    installed: set[str] = set()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dgpo_fast.models.fused.attention.find_spec", lambda module: module in installed or None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    cuda = torch.device("cuda")
    assert find_attention("auto", device=cuda, dtype=torch.bfloat16).name == "cudnn"
    installed.add("flash_attn_interface")
    assert find_attention("auto", device=cuda, dtype=torch.bfloat16).name == "flash3"
    assert find_attention("auto", device=cuda, dtype=torch.float32).name == "efficient"
    assert find_attention("auto", device=cuda, dtype=torch.float64).name == "math"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert find_attention("auto", device=cuda, dtype=torch.bfloat16).name == "cudnn"
    with pytest.raises(UserError, match=r"^model\.attention: flash3 needs compute capability 9\.0; here runs cudnn, "):
        find_attention("flash3", device=cuda, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"flash2 is not installed \(module flash_attn_2_cuda\); here runs "):
        find_attention("flash2", device=cuda, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"cudnn has no float32; here runs efficient, math, or auto$"):
        find_attention("cudnn", device=cuda, dtype=torch.float32)


@pytest.mark.parametrize(
    ("cuda", "cudnn", "is_enabled", "said"),
    [
        ("13.0", 91501, True, None),
        ("12.9", 92000, True, None),
        ("12.8", 91501, True, "needs CUDA 12.9 and cuDNN 9.15.1"),
        ("13.0", 91500, True, "needs CUDA 12.9 and cuDNN 9.15.1"),
        ("13.0", None, True, "needs CUDA 12.9 and cuDNN 9.15.1"),
        ("13.0", 91501, False, "is switched off"),
    ],
)
def test_cudnn_serves_where_torch_would_let_it(
    cuda: str, cudnn: int | None, is_enabled: bool, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: is_enabled)
    missing = ATTENTIONS["cudnn"].missing(torch.device("cuda"), torch.bfloat16)
    assert missing == said or (missing is not None and said is not None and missing.startswith(said))


def test_a_name_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^model\.attention: no attention is called 'flsh3'.*flash3"):
        find_attention("flsh3", device=CPU, dtype=torch.float32)


def test_one_that_cannot_run_here_is_refused_with_those_that_do() -> None:
    expected = r"^model\.attention: cudnn runs on cuda, and the model is on cpu; here runs cpu, math, or auto$"
    with pytest.raises(UserError, match=expected):
        find_attention("cudnn", device=CPU, dtype=torch.bfloat16)
    for name in RUN_HERE:
        assert find_attention(name, device=CPU, dtype=torch.bfloat16) is ATTENTIONS[name]
