"""What learns: the policy, the engine that steps it, its averages; and what of them a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo_fast.checkpoint import Checkpoint, State, save_checkpoint
from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.policy import TRAINED, Policy
from dgpo_fast.models.training import load_policy, train_policy
from dgpo_fast.parallel.weights import Held, fingerprint
from dgpo_fast.parallel.world import World


class Learner:
    """A recipe's policy in training. Every rank calls the same methods in the same order.

    Raises:
        UserError: the model, its adapters or `parallel` cannot be what the recipe says.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.policy = load_policy(config, world)
        _refuse_other_weights(self.policy, world)
        self.engine = train_policy(self.policy, config, world)
        self.skipped, self.skipped_in_a_row = 0, 0
        """Steps that were not made: `skipped_in_a_row` are those whose gradient was not finite."""

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Sets the policy and its averages to `weights`, by name, before the first step."""
        for held in (self.engine.masters(), *self.policy.averages().values()):
            for name, start, values in held.pieces:
                values.copy_(weights[name].flatten()[start : start + len(values)])
        self.engine.refresh(steps_made=0)
        self.policy.refresh(*TRAINED)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's `loss` to the step's."""
        self.engine.backward(loss)

    def step(self, number: int, *, lr_factor: float = 1.0) -> dict[str, Any]:
        """Step `number`, counted from 0: clips, steps, updates the evaluation average; returns its metrics.

        A step whose gradient is not finite on some rank is made on none.

        Args:
            lr_factor: of the recipe's learning rate.

        Raises:
            UserError: more than `optimizer.max_skipped` steps in a row were not made.
        """
        settings, average = self.config.optimizer, self.config.evaluation_ema
        lr = self._lr(number, lr_factor)
        grad_norm, is_made = self.engine.step(lr)
        if is_made:
            self.policy.refresh("policy")
            if (number + 1) % average.every == 0:
                self.policy.average_into("ema", decay=average.decay_at(number))
        self.skipped += not is_made
        self.skipped_in_a_row = 0 if is_made else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > settings.max_skipped:
            is_lora = self.config.adapter is not None
            begins = "adapter.path=RUN_DIR/checkpoints/best/lora" if is_lora else "--model, of dgpo-fast export's"
            raise UserError(
                f"the gradients of {self.skipped_in_a_row} steps in a row, the last of step {number + 1}, were not "
                "finite (optimizer.max_skipped): no such step was made, checkpoints are intact. --resume makes the "
                "same steps again; a new run with a lower optimizer.lr may begin with what this one learnt, by "
                f"{begins}"
            )
        return {"grad_norm": grad_norm, "lr": lr, "skipped_steps": self.skipped}

    def leave_out(self, number: int, *, lr_factor: float = 1.0) -> dict[str, Any]:
        """The metrics of step `number` where no group is left to learn from; to be called instead of `step`.

        Weights and their evaluation average stay: by a gradient of zero Adam's momentum and weight decay would move
        them. It says nothing of the gradients before it, so `optimizer.max_skipped` counts on behind it.
        """
        self.skipped += 1
        return {"grad_norm": None, "lr": self._lr(number, lr_factor), "skipped_steps": self.skipped}

    def save(self, run_dir: Path, step: int, values: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, with plain `values` beside what learns."""
        counts = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        state = State(
            step=step,
            shapes=self.engine.shapes,
            held=self._held(),
            values={**values, **counts, "adam_steps": self.engine.steps_made()},
            files={"ema": self.policy.ema_file} if self.policy.ema_file else {},
            constants=self.policy.ema_constants,
        )
        save_checkpoint(run_dir, state, self.world, save_weights=self.policy.save)

    def restore(self, saved: Checkpoint) -> None:
        """Goes on from a checkpoint, whatever ranks and stage of ZeRO wrote it.

        Raises:
            UserError: it is of another model or other adapters.
        """
        for kind, held in self._held().items():
            saved.read(kind, held.pieces, self.engine.shapes)
        self.engine.refresh(saved.values["adam_steps"])
        self.policy.refresh(*TRAINED)
        self.skipped, self.skipped_in_a_row = saved.values["skipped"], saved.values["skipped_in_a_row"]

    def _lr(self, number: int, factor: float) -> float:
        return factor * self.config.optimizer.lr_at(number)

    def _held(self) -> dict[str, Held]:
        """What this rank holds of all that learns: the policy, Adam's averages, the policy's."""
        return {"policy": self.engine.masters(), **self.engine.moments(), **dict(self.policy.averages().items())}


def _refuse_other_weights(policy: Policy, world: World) -> None:
    """Makes sure that ranks, each of which loads the model for itself, have the same."""
    if world.size == 1:
        return
    pipeline = policy.model.pipeline
    parts = (pipeline.transformer, pipeline.vae)
    mine = fingerprint(parameter for part in parts for parameter in part.parameters())
    if len({*world.gather_objects(mine)}) > 1:
        raise UserError("model.name: ranks have loaded different weights; it must be the same model on every machine")
