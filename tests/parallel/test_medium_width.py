"""The modules of SD3.5-Medium in their real width, sharded by ZeRO 3 over two ranks: a step, and what it saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open

from dgpo_fast.checkpoint import load_checkpoint

LR = 1.0  # with an eps of 1, far above the gradients, a step is the learning rate times the gradient


# What glibc would keep of freed memory is a fifth of two such ranks' 17 GB.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run_on_ranks: Callable[..., str]) -> Iterator[Path]:
    """7 GB, for as long as these tests take."""
    root = tmp_path_factory.mktemp("medium")
    run_on_ranks("medium_width.py", root, environment=GIVE_BACK)
    yield root
    shutil.rmtree(root)


def test_the_step_is_that_of_whole_weights(out: Path) -> None:
    """Of layers of every kind, with the gradients that autograd has of a transformer that nobody sharded."""
    policy = load_checkpoint(out / "checkpoints" / "step-000001").directory / "state" / "policy.safetensors"
    with safe_open(policy, framework="pt") as file:
        for name, (weight, gradient) in torch.load(out / "expected.pt").items():
            moved, expected = file.get_tensor(name) - weight.float(), -LR * gradient.float()
            assert moved.shape == weight.shape
            assert expected.norm() > 0, name
            # Masters are float32: what a small step adds to a weight is rounded at the weight's size. Of a bfloat16
            # gradient 2^-9 is rounded off at every product on its way, some percent in all, and DeepSpeed has products
            # of its own. A piece in a wrong place would be wrong by the whole of it.
            rounding = 2**-24 * weight.float().norm() + 0.1 * expected.norm()
            assert (moved - expected).norm() < rounding, name


def test_every_layer_is_cut_and_whole_again(out: Path) -> None:
    """No rank holds a large parameter alone, and the file is diffusers' transformer, shape for shape."""
    held = [dict(torch.load(out / f"pieces-{rank}.pt")) for rank in range(2)]
    transformer = out / "checkpoints" / "step-000001" / "transformer"
    with torch.device("meta"):
        module = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(transformer))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    with safe_open(transformer / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes  # noqa: SIM118
    assert held[0].keys() == held[1].keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert [pieces[name] for pieces in held] == [0, -(-parameter.numel() // 2)], name
