"""Checks of operators' arguments: each raises ValueError with the argument's name, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """`tensor` has one of `dtypes`."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], *, meaning: str) -> None:
    """`tensor` has the shape `expected`; `meaning` says where that comes from."""
    if list(tensor.shape) != list(expected):
        raise ValueError(f"{name}: expected {meaning}, {list(expected)}, got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, like: Tensor, *, meaning: str) -> None:
    """`tensor` is where `like` is, the tensor that `meaning` names."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected the device of {meaning}, {like.device}, got {tensor.device}")


def check_tokens(name: str, tensor: Tensor) -> None:
    """`tensor` is a batch of sequences of tokens, [B, N, D], of a floating-point dtype."""
    if tensor.dim() != 3:
        raise ValueError(f"{name}: expected [B, N, D], got {list(tensor.shape)}")
    check_dtype(name, tensor, *FLOATING)


def check_alike(name: str, tensor: Tensor, like: Tensor, *, meaning: str) -> None:
    """`tensor` has the dtype, shape and device of `like`, the tensor that `meaning` names."""
    check_dtype(name, tensor, like.dtype)
    check_shape(name, tensor, like.shape, meaning=f"the shape of {meaning}")
    check_device(name, tensor, like, meaning=meaning)


def check_modulation(name: str, tensor: Tensor, tokens: Tensor, *, meaning: str) -> None:
    """`tensor` modulates `tokens`, the [B, N, D] that `meaning` names: [B, D], of their dtype and device."""
    check_dtype(name, tensor, tokens.dtype)
    check_shape(name, tensor, (tokens.shape[0], tokens.shape[2]), meaning=f"[B, D] of {meaning}")
    check_device(name, tensor, tokens, meaning=meaning)


def check_positive(name: str, number: float) -> None:
    """`number` is greater than zero."""
    if not number > 0:
        raise ValueError(f"{name}: expected a positive number, got {number}")


def check_indices(name: str, index: Tensor, bound: int) -> None:
    """`index`, int64, points into 0..bound-1. Looked at on the CPU alone: elsewhere it would wait for the device."""
    if index.device.type == "cpu" and index.numel() and not (0 <= int(index.min()) <= int(index.max()) < bound):
        raise ValueError(f"{name}: expected values in 0..{bound - 1}, got {index.tolist()}")


def check_no_gradient(name: str, tensor: Tensor | None, *, reason: str) -> None:
    """`tensor` requires no gradient while gradients are on."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, but {reason}; use torch.no_grad()")
