"""No time for a wrong result: what is timed must be as exact as plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_as_exact(name: str, results: Sequence[Tensor], *, exact: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """Each of `results` is at most twice as far from `exact`, float64, as `plain`, which PyTorch computed."""
    for i, (result, truth, of_torch) in enumerate(zip(results, exact, plain, strict=True)):
        error, bound = (float((tensor.double() - truth).abs().max()) for tensor in (result, of_torch))
        limit = 2 * bound + 4 * torch.finfo(torch.float64).eps * float(truth.abs().max())
        if not error <= limit:
            raise AssertionError(f"{name}, result {i}: off by {error:.3g}, plain PyTorch by {bound:.3g}")
