"""The optimizer's step by DeepSpeed, which shards masters and Adam's averages, then gradients, then weights (ZeRO 1-3).

Of DeepSpeed's own state this file reads where each rank's pieces lie, and nothing else: checkpoints, averages and
exports are made from those (`parallel/weights.py`), so they do not know of stages.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from dgpo_fast.config import Config
from dgpo_fast.errors import UserError, suggest
from dgpo_fast.parallel.assembly import Assembly
from dgpo_fast.parallel.engine import MOMENTS, StepOutcome, adamw, zero_state
from dgpo_fast.parallel.state_bytes import REDUCE_BUCKET
from dgpo_fast.parallel.weights import Held, Piece, Shapes, TrainedWeights, cut
from dgpo_fast.parallel.world import World

DECIDED_BY = {
    "optimizer": "optimizer",
    "scheduler": "optimizer.decay_steps and optimizer.warmup_steps",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "parallel.gradients",
    "communication_data_type": "parallel.gradients",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.offload_weights",
    "zero_optimization.offload_param.nvme_path": "parallel.nvme_path",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "gradient_clipping": "optimizer.max_grad_norm",
    "train_batch_size": "optimizer.images_per_micro_batch",
    "train_micro_batch_size_per_gpu": "optimizer.images_per_micro_batch",
    "gradient_accumulation_steps": "optimizer.images_per_micro_batch",
    "managed_gradient_accumulation": "optimizer.images_per_micro_batch",
}
"""What of DeepSpeed's configuration the recipe decides, and by which of its keys."""

PASSED_ON = (
    "zero_optimization", "aio", "comms_logger", "compile", "csv_monitor", "comet", "disable_allgather",
    "disable_python_gc", "dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown",
    "prescale_gradients", "sparse_gradients", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown",
    "wandb",
)  # fmt: skip
"""Sections and values at the top of DeepSpeed's configuration that a step has a use for. It would take any other name
for nothing; what is inside of these it checks itself."""


class _Place(NamedTuple):
    """Where a piece of a parameter lies among the flat tensors that this rank's optimizer steps."""

    name: str
    start: int
    flat: int
    offset: int
    length: int


class ZeroEngine:
    """A module whose parameters DeepSpeed steps; gradients of micro-batches reach it as they are made."""

    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        """Takes the parameters of `module` that require gradients; in ZeRO 3 it shards all, and gathers them as used.

        Raises:
            UserError: DeepSpeed refuses `parallel.deepspeed`.
        """
        self._world, self._stage = world, config.parallel.zero_stage
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.shapes: Shapes = {name: parameter.shape for name, parameter in named.items()}
        is_low = next(iter(named.values())).dtype == torch.bfloat16
        num_values = sum(shape.numel() for shape in self.shapes.values())
        settings = deepspeed_config(config, is_low=is_low, num_values=num_values)
        deepspeed = _import_deepspeed(world)
        try:
            with redirect_stdout(StringIO()):  # one of its optimizers prints how much memory there is
                self._engine, _, _, _ = deepspeed.initialize(
                    model=module, optimizer=adamw(list(named.values()), config.optimizer), config=settings,
                    dist_init_required=False,
                )  # fmt: skip
        except (ValueError, AssertionError, TypeError, deepspeed.DeepSpeedConfigError) as error:
            raise UserError(f"parallel.deepspeed: {' '.join(str(error).split())}") from error
        _wait_as_long(config.parallel.timeout_s)
        self._optimizer = self._engine.optimizer
        self._flats: list[Tensor] = self._flat_masters()
        self._states = [zero_state(self._optimizer.optimizer, flat) for flat in self._flats]
        self._places = [*self._find_places(named)]
        self._check_places(named)

    @property
    def module(self) -> nn.Module:
        """What computes: DeepSpeed's engine around the module, to be called as the module is."""
        return self._engine  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over ranks.
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> StepOutcome:
        self._optimizer.param_groups[0]["lr"] = lr
        self._engine.step()
        is_made = bool(self._engine.was_step_applied())
        if not is_made and self._stage < 3:
            # Of a step that it skips, stages 1 and 2 keep the gradient where the optimizer is offloaded (0.19.8).
            kept = getattr(self._optimizer, "averaged_gradients", {})
            kept.update(dict.fromkeys(kept))
        return StepOutcome(float(self._engine.get_global_grad_norm()), is_made)

    def masters(self) -> Held:
        return self._held(self._flats)

    def moments(self) -> dict[str, Held]:
        return {name: self._held([state[name] for state in self._states]) for name in MOMENTS}

    def steps_made(self) -> int:
        return int(self._states[0]["step"].item())

    @torch.no_grad()
    def refresh(self, steps_made: int) -> None:
        for state in self._states:
            state["step"].fill_(steps_made)
        if self._stage < 3:
            self._optimizer.update_lp_params()
            return
        for group in range(len(self._flats)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if kept_whole := self._optimizer.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)
        self._world.wait_for_device()  # as `ShardedModule.write`

    def _held(self, flats: list[Tensor]) -> Held:
        pieces = [
            Piece(place.name, place.start, flats[place.flat].detach()[place.offset : place.offset + place.length])
            for place in self._places
        ]
        return Held(pieces, is_sharded=True)

    def _flat_masters(self) -> list[Tensor]:
        """The float32 tensors that this rank's optimizer steps, under the names of DeepSpeed's three optimizers."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        return next(list(getattr(self._optimizer, name)) for name in names if hasattr(self._optimizer, name))

    def _find_places(self, named: Mapping[str, nn.Parameter]) -> Iterator[_Place]:
        for name, parameter in named.items():
            if self._stage == 3:
                flat, offset, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                start = self._world.rank * length  # each parameter is cut evenly, and padded
                length = max(0, min(length, parameter.ds_numel - start))  # type: ignore[attr-defined]
                if length:
                    yield _Place(name, start, flat, offset, length)
            elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield _Place(name, whole.start, 0, inside.start, inside.numel)

    def _check_places(self, named: Mapping[str, nn.Parameter]) -> None:
        """Makes sure that pieces are found where DeepSpeed has them, whatever it was told.

        Raises:
            UserError: they hold other values than the parameters.
        """
        is_right = True
        for name, start, values in self.masters().pieces:
            if self._stage < 3:
                mine = named[name].detach().view(-1)[start : start + len(values)]
            elif (shard := named[name].ds_tensor).status.name == "AVAILABLE":  # type: ignore[attr-defined]
                mine = shard.detach()[: len(values)]
            else:
                continue  # on a disk
            is_right &= torch.equal(values.to(mine), mine)
        if not is_right:
            raise UserError(
                "parallel.deepspeed: it makes DeepSpeed keep weights in an order that checkpoints and averages do not "
                "know, as zero_optimization.round_robin_gradients does"
            )


class ShardedModule:
    """A module without gradients whose weights DeepSpeed shards, and gathers layer by layer as it computes."""

    def __init__(self, module: nn.Module, world: World) -> None:
        deepspeed = _import_deepspeed(world)
        self._world = world
        self._parameters = dict(module.requires_grad_(False).named_parameters())
        zero = {
            "stage": 3,
            # Nothing stays whole behind its use: what is written to the shards would not be seen.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        }
        low = {"bf16": {"enabled": True}} if next(iter(self._parameters.values())).dtype == torch.bfloat16 else {}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **low}
        self.module: nn.Module = deepspeed.initialize(model=module, config=settings, dist_init_required=False)[0]

    @torch.no_grad()
    def write(self, pieces: Sequence[Piece]) -> None:
        """Takes weights from pieces that lie as those of a `ZeroEngine` under stage 3: each rank has its own shards."""
        self.module.optimizer.partition_all_parameters()  # type: ignore[union-attr, operator]
        for name, _, values in pieces:
            self._parameters[name].ds_tensor.data[: len(values)].copy_(values)  # type: ignore[attr-defined]
        self._world.wait_for_device()  # DeepSpeed gathers on a stream of its own, which does not wait for ours


class _Whole(nn.Module):
    """One flat parameter, whose gradient is known."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()
        self.flat = nn.Parameter(flat.detach().clone())

    def forward(self, gradient: Tensor) -> Tensor:
        return torch.dot(self.flat, gradient)


class FlatZeroEngine:
    """Flat weights that every rank computes with whole, and whose masters and Adam's averages DeepSpeed shards.

    A step's gradients are added up here in float32 and handed over at once, so that ranks exchange them once per step
    in every stage.
    """

    def __init__(self, weights: TrainedWeights, config: Config, world: World) -> None:
        self._weights = weights
        self.shapes: Shapes = weights.shapes
        self._whole = _Whole(weights.master)
        self._zero = ZeroEngine(self._whole, config, world)
        # Else DeepSpeed's parameter is whole already, on every rank and in float32.
        self._assembly = Assembly(self._zero.masters(), world) if config.parallel.zero_stage == 3 else None

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._weights.collect_gradient()

    def step(self, lr: float) -> StepOutcome:
        self._zero.backward(self._zero.module(self._weights.gradient))
        outcome = self._zero.step(lr)
        self._weights.gradient.zero_()
        self._take_over()
        return outcome

    def masters(self) -> Held:
        return self._by_parameter(self._zero.masters())

    def moments(self) -> dict[str, Held]:
        return {name: self._by_parameter(held) for name, held in self._zero.moments().items()}

    def steps_made(self) -> int:
        return self._zero.steps_made()

    def refresh(self, steps_made: int) -> None:
        self._zero.refresh(steps_made)
        self._take_over()

    def _take_over(self) -> None:
        """The weights that are computed with become those that DeepSpeed holds."""
        if self._assembly is not None:
            self._assembly.write(self._zero.masters().pieces, {"flat": self._weights.master})
        else:
            self._weights.master.copy_(self._whole.flat.detach())
        self._weights.refresh()

    def _by_parameter(self, held: Held) -> Held:
        pieces = [part for piece in held.pieces for part in cut(piece.values, piece.start, self.shapes)]
        return held._replace(pieces=pieces)


def deepspeed_config(config: Config, *, is_low: bool, num_values: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: what the recipe decides, and `parallel.deepspeed` beside it.

    Args:
        is_low: whether what is trained computes in bfloat16.
        num_values: how many are trained.

    Raises:
        UserError: `parallel.deepspeed` contradicts the recipe.
    """
    parallel = config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": parallel.offload_optimizer, "pin_memory": torch.cuda.is_available()}
    if parallel.offload_weights != "none":
        zero["offload_param"] = {"device": parallel.offload_weights, "pin_memory": torch.cuda.is_available()}
        if parallel.offload_weights == "nvme":
            zero["offload_param"]["nvme_path"] = parallel.nvme_path
    ours: dict[str, Any] = {
        # One micro-batch in its counts, whatever ours are: `step` says when a step is made.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if is_low:
        ours["bf16"] = {"enabled": True, "check_grad_overflow": True}
        ours["data_types"] = {"grad_accum_dtype": {"float32": "fp32", "bfloat16": "bf16"}[parallel.gradients]}
        ours["communication_data_type"] = ours["data_types"]["grad_accum_dtype"]
    _refuse_decided(parallel.deepspeed)
    merged = _merged(ours, parallel.deepspeed)
    # Buffers of DeepSpeed's default, 5e8 values, are larger than some models.
    merged["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCE_BUCKET, num_values))
    return merged


def _refuse_decided(theirs: Mapping[str, Any], prefix: str = "") -> None:
    """Makes sure that nothing is given that the recipe decides, or that nobody would read."""
    for name, value in theirs.items():
        key = f"{prefix}{name}"
        if key in DECIDED_BY:
            raise UserError(f"parallel.deepspeed.{key}: the recipe decides this by {DECIDED_BY[key]}")
        if not prefix and name not in PASSED_ON:
            raise UserError(f"parallel.deepspeed: unknown key {name!r}{suggest(name, PASSED_ON)}")
        if isinstance(value, Mapping):
            _refuse_decided(value, f"{key}.")


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in theirs.items():
        is_section = isinstance(value, Mapping) and isinstance(ours.get(name), dict)
        merged[name] = _merged(ours[name], value) if is_section else value
    return merged


def _wait_as_long(seconds: float) -> None:
    """Gives DeepSpeed's group of all ranks, a copy of ours, the same patience; NCCL's own would be ten minutes."""
    from deepspeed.utils import groups

    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), groups._clone_world_group())


def _import_deepspeed(world: World) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # which it asks for where no launcher has set it
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"parallel.zero_stage: DeepSpeed cannot be imported ({error}): pip install deepspeed"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import has set another
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if world.device.type == "cpu":
        # Collectives are gloo's here. DeepSpeed's own through shared memory would be compiled first, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
