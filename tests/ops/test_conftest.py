"""What the tests of operators rest on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def test_a_moved_tensor_keeps_its_layout(moved: Callable[[Tensor, str], Tensor]) -> None:
    """On "meta", the one device besides the CPU that is always there."""
    whole = torch.arange(48.0).view(2, 4, 6)
    for tensor in (whole, whole[1:, ::2, 1:5], whole.mT, whole[:1].expand(3, 4, 6), torch.arange(5)[2:]):
        there = moved(tensor, "meta")
        assert there.device.type == "meta" and there.dtype == tensor.dtype
        assert (there.shape, there.stride()) == (tensor.shape, tensor.stride())
        assert there.storage_offset() == tensor.storage_offset()
        assert there.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    assert moved(whole.clone().requires_grad_(), "meta").requires_grad


def test_tests_of_distant_samples_can_be_left_out(
    far_apart: Callable[[Tensor], Tensor], request: pytest.FixtureRequest
) -> None:
    assert request.node.get_closest_marker("far")
