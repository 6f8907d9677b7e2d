"""Attention kernels by name, forward and backward, without autograd: the block's backward pass calls them itself.

Shape letters: B samples, N tokens, H heads, D elements of a head. Queries, keys and values are [B, N, H, D], the layout
that `joint_qk_norm` writes and that all of these kernels read where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.ops.arguments import arithmetic_dtype

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, tuple[Any, ...]]]
"""(q, k, v) -> (output [B, N, H, D], what the backward pass needs besides q, k, v and the output)."""
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Any, ...]], tuple[Tensor, Tensor, Tensor]]
"""(gradient of the output, q, k, v, output, what forward left) -> gradients of q, k, v, [B, N, H, D] each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """softmax(q k^T / sqrt(D)) v for each head, every token attending to every token."""

    name: str
    forward: Forward
    backward: Backward
    missing: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot run on a device in a dtype; None where it can."""


def find_attention(name: str, *, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention called `name`, or with "auto" the first of `ATTENTIONS` that runs on `device` in `dtype`.

    Raises:
        UserError: no such attention, or it cannot run here.
    """
    if name == "auto":
        return next(attention for attention in ATTENTIONS.values() if attention.missing(device, dtype) is None)
    if name not in ATTENTIONS:
        raise UserError(f"model.attention: no attention is called {name!r}{suggest(name, ATTENTIONS)}")
    if (missing := ATTENTIONS[name].missing(device, dtype)) is not None:
        runs_here = [each.name for each in ATTENTIONS.values() if each.missing(device, dtype) is None]
        raise UserError(f"model.attention: {name} {missing}; here runs {', '.join(runs_here)}, or auto")
    return ATTENTIONS[name]


def _by_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Between [B, N, H, D] and torch's [B, H, N, D]: views, in both directions."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _flash3_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    # By position, as the releases of 2025 have no defaults; what comes behind `causal` differs between releases.
    without = (None,) * 20  # caches, variable lengths, rotations, scales
    out, softmax_lse, *_ = import_module("flash_attn_interface")._flash_attn_forward(
        q, k, v, *without, 1 / math.sqrt(q.shape[-1]), False
    )
    return out, (softmax_lse,)


def _flash3_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, left: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    without = (None,) * 6  # variable lengths
    import_module("flash_attn_interface")._flash_attn_backward(
        grad, q, k, v, out, *left, *without, *gradients, 1 / math.sqrt(q.shape[-1]), False, deterministic=True
    )
    return gradients


def _flash2_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    out, softmax_lse, _, rng_state = import_module("flash_attn.flash_attn_interface")._flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=1 / math.sqrt(q.shape[-1]), causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, (softmax_lse, rng_state)


def _flash2_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, left: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    softmax_lse, rng_state = left
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    import_module("flash_attn.flash_attn_interface")._flash_attn_backward(
        grad, q, k, v, out, softmax_lse, *gradients, dropout_p=0.0, softmax_scale=1 / math.sqrt(q.shape[-1]),
        causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=True,
        rng_state=rng_state,
    )  # fmt: skip
    return gradients


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    out, *left, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(*_by_heads(q, k, v), None, True)
    return out.transpose(1, 2), tuple(left)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, left: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp, cum_q, cum_k, max_q, max_k, seed, offset = left
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *_by_heads(grad, q, k, v, out), logsumexp, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
    )
    return _by_heads(*gradients)  # type: ignore[return-value]


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    out, *left, _ = torch.ops.aten._scaled_dot_product_flash_attention(*_by_heads(q, k, v))
    return out.transpose(1, 2), tuple(left)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, left: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp, cum_q, cum_k, max_q, max_k, seed, offset = left
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *_by_heads(grad, q, k, v, out), logsumexp, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
    )
    return _by_heads(*gradients)  # type: ignore[return-value]


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    out, *left = torch.ops.aten._scaled_dot_product_efficient_attention(*_by_heads(q, k, v), None, True)
    return out.transpose(1, 2), tuple(left)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, left: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    *gradients, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *_by_heads(grad, q, k, v), None, out.transpose(1, 2), *left, 0.0, [True, True, True, False]
    )
    return _by_heads(*gradients)  # type: ignore[return-value]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_by_heads(q, k, v))
    return out.transpose(1, 2), (logsumexp,)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, left: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_by_heads(grad, q, k, v, out), *left, 0.0, False
    )
    return _by_heads(*gradients)  # type: ignore[return-value]


def _math_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    dtype = q.dtype
    q, k, v = _wide(*_by_heads(q, k, v))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).to(dtype).transpose(1, 2).contiguous(), (weights,)


def _math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, left: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    (weights,), dtype = left, q.dtype
    grad, q, k, v, out = _wide(*_by_heads(grad, q, k, v, out))
    grad_weights = grad @ v.mT - (grad * out).sum(-1, keepdim=True)
    grad_scores = weights * grad_weights / math.sqrt(q.shape[-1])
    gradients = (grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad)
    return _by_heads(*(gradient.to(dtype) for gradient in gradients))  # type: ignore[return-value]


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half precision as float32, in which the other kernels keep the weights as well."""
    return tuple(tensor.to(arithmetic_dtype(tensor)) for tensor in tensors)


def _needs(
    *,
    device: str,
    dtypes: tuple[torch.dtype, ...] = (),
    capability: tuple[int, int] = (0, 0),
    module: str | None = None,
) -> Callable[[torch.device, torch.dtype], str | None]:
    def missing(on: torch.device, dtype: torch.dtype) -> str | None:
        if on.type != device:
            return f"runs on {device}, and the model is on {on.type}"
        if dtypes and dtype not in dtypes:
            return f"has no {str(dtype).removeprefix('torch.')}"
        if module is not None and find_spec(module) is None:
            return f"is not installed (module {module})"
        if device == "cuda" and torch.cuda.get_device_capability(on) < capability:
            return f"needs compute capability {capability[0]}.{capability[1]}"
        return None

    return missing


_HALF = (torch.bfloat16, torch.float16)
_ON_AMPERE = _needs(device="cuda", dtypes=_HALF, capability=(8, 0))


def _cudnn_missing(on: torch.device, dtype: torch.dtype) -> str | None:
    if (missing := _ON_AMPERE(on, dtype)) is not None:
        return missing
    # Its operator, called by its name, asks for nothing of what scaled_dot_product_attention does before it chooses it.
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if cuda < (12, 9) or (torch.backends.cudnn.version() or 0) < 91501:
        return "needs CUDA 12.9 and cuDNN 9.15.1: its earlier kernels may read outside of their tensors"
    return None if torch.backends.cuda.cudnn_sdp_enabled() else "is switched off (torch.backends.cuda.enable_cudnn_sdp)"


ATTENTIONS = {
    attention.name: attention
    for attention in (  # the fastest first, in the figures published for head dimension 64 on an H100
        Attention(
            name="flash3",
            forward=_flash3_forward,
            backward=_flash3_backward,
            missing=_needs(device="cuda", dtypes=_HALF, capability=(9, 0), module="flash_attn_interface"),
        ),
        Attention(
            name="cudnn",
            forward=_cudnn_forward,
            backward=_cudnn_backward,
            missing=_cudnn_missing,
        ),
        Attention(
            name="flash",
            forward=_flash_forward,
            backward=_flash_backward,
            missing=_ON_AMPERE,
        ),
        Attention(
            name="flash2",
            forward=_flash2_forward,
            backward=_flash2_backward,
            missing=_needs(device="cuda", dtypes=_HALF, capability=(8, 0), module="flash_attn_2_cuda"),
        ),
        Attention(
            name="efficient",
            forward=_efficient_forward,
            backward=_efficient_backward,
            missing=_needs(device="cuda", dtypes=(*_HALF, torch.float32), capability=(8, 0)),
        ),
        Attention(name="cpu", forward=_cpu_forward, backward=_cpu_backward, missing=_needs(device="cpu")),
        Attention(name="math", forward=_math_forward, backward=_math_backward, missing=lambda device, dtype: None),
    )
}
