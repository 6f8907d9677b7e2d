"""Replayed trajectories. Without a GPU a stand-in captures: it runs the function again, into the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.config import load_recipe
from dgpo_fast.flow import cuda_graphs
from dgpo_fast.flow.cuda_graphs import CudaGraphs
from dgpo_fast.flow.rollout import Sampler, sample_latents
from dgpo_fast.models.adapters import AdapterPolicy

MakePolicy = Callable[..., AdapterPolicy]


class Rerun:
    """A graph of a function whose inputs are read, and whose output is written, where they lay at the capture."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.function, self.inputs, self.output = function, inputs, function(*inputs)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.function(*self.inputs))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Rerun]:
    """What is captured from now on, on the CPU."""
    graphs: list[Rerun] = []

    def capture(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> cuda_graphs._Captured:
        static = [tensor.clone() for tensor in inputs]
        graphs.append(Rerun(function, static))
        return cuda_graphs._Captured(inputs=static, output=graphs[-1].output, graph=graphs[-1])

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    monkeypatch.setattr(cuda_graphs, "_can_capture", lambda tensor: True)
    return graphs


def test_a_key_is_captured_once_and_replayed_with_new_inputs(captured: list[Rerun]) -> None:
    graphs = CudaGraphs()
    first = graphs("sum", torch.add, torch.ones(3), torch.ones(3))
    second = graphs("sum", torch.add, torch.full((3,), 5.0), torch.ones(3))
    assert first.tolist() == [2.0] * 3, "a result is no view of what the next replay writes"
    assert second.tolist() == [6.0] * 3
    assert graphs("product", torch.mul, torch.full((2,), 3.0), torch.full((2,), 3.0)).tolist() == [9.0] * 2
    assert [graph.replays for graph in captured] == [2, 1]


def test_without_cuda_the_function_is_called() -> None:
    ones = torch.ones(3)
    assert CudaGraphs()("same", lambda x: x, ones) is ones


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_replayed_trajectories_follow_the_weights_and_the_prompts(
    make_policy: MakePolicy, captured: list[Rerun], guidance: float
) -> None:
    """Bit by bit the latents that are drawn without graphs, with new weights, prompts and noise in the old places."""
    config = load_recipe(
        "tiny-dgpo", ["adapter.rank=4", "algorithm.trunc=2", "rollout.steps=3", f"rollout.guidance={guidance}"]
    )
    policy = make_policy(config, spread=0.05)
    graphs, sampler = CudaGraphs(), Sampler.from_config(config.rollout)
    unconditional = policy.model.encode([""]) if guidance > 1 else None
    drawn = []
    for seed, prompts in enumerate((["a red circle"] * 5, ["two blue squares"] * 5, ["a green triangle"] * 5)):
        generator = torch.Generator().manual_seed(seed)
        noise_BCHW = torch.randn(5, *policy.model.latent_shape, generator=generator)
        policy.set_weights("policy", 0.05 * torch.randn(len(policy.trainable), generator=generator))
        given = (policy, "policy", sampler, noise_BCHW, policy.model.encode(prompts), unconditional)
        replayed = sample_latents(*given, images_per_forward=2, graphs=graphs)
        drawn.append(replayed)
        assert torch.equal(replayed, sample_latents(*given, images_per_forward=2))
    assert not torch.equal(drawn[0], drawn[1])
    assert [graph.replays for graph in captured] == [6, 3], "one graph for batches of two, one for the last of one"


def test_a_recipe_asks_for_them() -> None:
    assert DGPO(load_recipe("tiny-dgpo")).groups.graphs is None
    assert DGPO(load_recipe("tiny-dgpo", ["rollout.cuda_graphs=true"])).groups.graphs is not None
