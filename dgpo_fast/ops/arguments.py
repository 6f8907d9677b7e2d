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


def check_indices(name: str, index: Tensor, bound: int) -> None:
    """`index`, int64, points into 0..bound-1. Looked at on the CPU alone: elsewhere it would wait for the device."""
    if index.device.type == "cpu" and index.numel() and not (0 <= int(index.min()) <= int(index.max()) < bound):
        raise ValueError(f"{name}: expected values in 0..{bound - 1}, got {index.tolist()}")


def check_no_gradient(name: str, tensor: Tensor | None, *, reason: str) -> None:
    """`tensor` requires no gradient while gradients are on."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, but {reason}; use torch.no_grad()")


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Each element of `tensor` has memory of its own, so that it can be written."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name}: its elements share memory (an expanded tensor?), so it cannot be updated in place")
