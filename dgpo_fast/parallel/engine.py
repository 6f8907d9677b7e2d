"""What makes the optimizer's step: who holds which float32 masters, adds up gradients, and runs AdamW.

One interface, two implementations: here every rank holds everything and torch's AdamW steps it; in `parallel/zero.py`
DeepSpeed shards it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dgpo_fast.config import OptimizerConfig
from dgpo_fast.parallel.weights import Held, Shapes, TrainedWeights, cut
from dgpo_fast.parallel.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight, as torch names it."""


class StepOutcome(NamedTuple):
    """What came of an optimizer step."""

    grad_norm: float
    """Of all ranks' gradient, before clipping."""
    is_made: bool
    """False where the gradient was not finite: then nothing has changed, on any rank."""


class TrainingEngine(Protocol):
    """Float32 masters of the policy's weights, and AdamW. Every rank calls the same methods in the same order."""

    shapes: Shapes
    """Of the parameters."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's `loss` to that of the step; over ranks they add up, too."""

    def step(self, lr: float) -> StepOutcome:
        """Clips the gradient, makes a step, and forgets the gradient; the layers see the new weights."""

    def masters(self) -> Held:
        """What this rank holds of the masters. Who writes to them calls `refresh` afterwards."""

    def moments(self) -> dict[str, Held]:
        """Adam's averages by name (`MOMENTS`), in the same pieces."""

    def steps_made(self) -> int:
        """How many steps Adam has made: what it corrects the bias of its averages by."""

    def refresh(self, steps_made: int) -> None:
        """To be called once masters and moments were written: goes on from them as after `steps_made` steps."""


class ReplicatedEngine:
    """Everything on every rank: one flat tensor, gradients summed once per step, torch's fused AdamW."""

    def __init__(self, weights: TrainedWeights, config: OptimizerConfig, world: World) -> None:
        self._weights, self._config, self._world = weights, config, world
        self.shapes: Shapes = weights.shapes
        self.optimizer = adamw([weights.trainable], config)
        self._state = zero_state(self.optimizer, weights.trainable)
        self._gradients = [*weights.slices(weights.gradient).values()]

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._weights.collect_gradient()

    def step(self, lr: float) -> StepOutcome:
        self._world.sum(self._weights.gradient)
        # By parameter: of one long tensor torch's norm on a CPU is 3e-3 off at 4e7 values (torch 2.13).
        total = nn.utils.get_total_norm(self._gradients)
        norm = total.item()
        if is_made := norm < float("inf"):
            nn.utils.clip_grads_with_norm_([self._weights.trainable], self._config.max_grad_norm, total)
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            self._weights.refresh()
        self._weights.gradient.zero_()
        return StepOutcome(norm, is_made)

    def masters(self) -> Held:
        return self._held(self._weights.master)

    def moments(self) -> dict[str, Held]:
        return {name: self._held(self._state[name]) for name in MOMENTS}

    def steps_made(self) -> int:
        return int(self._state["step"].item())

    def refresh(self, steps_made: int) -> None:
        self._state["step"].fill_(steps_made)
        self._weights.refresh()

    def _held(self, flat: Tensor) -> Held:
        return Held(cut(flat, 0, self.shapes), is_sharded=False)


def adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW with a recipe's settings; its learning rate is set at each step."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, eps=config.eps, fused=True
    )


def zero_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """AdamW's state of `parameter` as it is before the first step, which then finds it there."""
    state: dict[str, Tensor] = {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
    # The count too: the fused AdamW reads it on the device.
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    optimizer.state[parameter] = state
    return state
