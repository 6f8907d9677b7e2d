"""Checks of operators' arguments: each raises ValueError with the argument's name, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_fast import rng

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


def check_has_groups(name: str, source: Tensor, samples: Tensor) -> None:
    """`source`, [G, ...], has a group where `samples`, [B, ...], have a sample: on CUDA nobody looks at its number."""
    if source.shape[0] == 0 and samples.shape[0] > 0:
        raise ValueError(f"{name}: expected a group or more for {samples.shape[0]} samples, got {list(source.shape)}")


def check_noise(noise: Tensor | None, streams: Tensor | None, samples: Tensor, *, meaning: str) -> None:
    """What is given is noise, [G, ...], of samples like those that `meaning` names; or words it is drawn by, [G, 4]."""
    if noise is not None:
        check_dtype("noise", noise, samples.dtype)
        check_shape(
            "noise", noise, [*noise.shape[:1], *samples.shape[1:]], meaning=f"samples of the shape of {meaning}"
        )
        check_has_groups("noise", noise, samples)
    if streams is not None:
        check_dtype("streams", streams, torch.int64)
        check_shape("streams", streams, [*streams.shape[:1], 4], meaning="four words for each group")
        check_has_groups("streams", streams, samples)


def check_groups(name: str, group: Tensor, noise: Tensor | None, streams: Tensor | None) -> None:
    """`group`, int64, points into the one of both that is given, and words have 32 bits. As `check_indices` looks."""
    given = noise if noise is not None else streams
    assert given is not None
    check_indices(name, group, len(given))
    if streams is not None:
        check_indices("streams", streams, 2**32)


def check_no_gradient(name: str, *tensors: Tensor | None, reason: str) -> None:
    """None of `tensors` requires a gradient while gradients are on."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{name}: requires a gradient, but {reason}; use torch.no_grad()")


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Each element of `tensor` has memory of its own, so that it can be written."""
    if tensor.numel() == 0:
        return
    behind = 1  # the first stride that steps over all elements of the faster dimensions
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride < behind:
            raise ValueError(
                f"{name}: its elements share memory (an expanded tensor?), so it cannot be updated in place"
            )
        behind = max(behind, stride * size) if size > 1 else behind


def mark_written(*tensors: Tensor) -> None:
    """Tells autograd that a kernel has written `tensors`: what was saved of them for a gradient is no longer valid."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def batch_size(tensor: Tensor, name: str) -> int:
    """The size of dimension 0 of `tensor`, a batch."""
    if tensor.dim() < 1:
        raise ValueError(f"{name}: expected a batch, got a scalar")
    return tensor.shape[0]


def words_of(streams: Sequence[rng.Stream] | Tensor, *, device: torch.device) -> Tensor:
    """The words of streams, int64 [G, 4], on `device`."""
    if isinstance(streams, Tensor):
        check_dtype("streams", streams, torch.int64)
        return streams.to(device)
    return torch.tensor(streams, dtype=torch.int64, device=device).view(len(streams), 4)
