"""How many bytes of a rank's memory learning takes, by stage of ZeRO: masters, gradients, averages, buffers. No torch.

Every count is compared with live memory on two ranks in tests/parallel/test_state_bytes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dgpo_fast.config import Config

REDUCE_BUCKET = 2**27
"""Values that DeepSpeed adds up over ranks at once, unless `parallel.deepspeed` says otherwise."""

SHARDED = 4 + 8 + 8
"""Of each trained value, in float32: the master, Adam's two averages, old policy and evaluation average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes by purpose."""

    resident: dict[str, float]
    """On the device, all the time."""
    backward: float
    """On the device besides, while gradients of micro-batches come."""
    step: float
    """On the device besides, in the optimizer's step."""
    host: dict[str, float] = field(default_factory=dict)
    """What is offloaded to the host."""


def state_bytes(config: Config, *, trained: float, value: int, stage: int, num_ranks: int) -> StateBytes:
    """What learning keeps on each of `num_ranks` ranks under ZeRO `stage`, beside a frozen transformer.

    Args:
        trained: values that are trained.
        value: bytes of one in the model's dtype.
    """
    of_kind = _adapters if config.adapter is not None else _full
    found = of_kind(config, trained, value, stage, num_ranks)
    resident, host = dict(found.resident), {}
    if config.parallel.offload_optimizer != "none" and stage > 0:
        host = {name: resident.pop(name) for name in (_STATES, _SHARDED_GRADIENTS) if name in resident}
        host[_SHARDED_GRADIENTS] = 4 * trained / num_ranks  # in float32 there, whatever they were added up in
    if config.parallel.offload_weights != "none" and _SHARDED_WEIGHTS in resident:
        weights = resident.pop(_SHARDED_WEIGHTS)
        if config.parallel.offload_weights == "cpu":
            host[_SHARDED_WEIGHTS] = weights
    return replace(found, resident=resident, host=host)


def ranks_of_frozen(config: Config, *, stage: int, num_ranks: int) -> int:
    """How many ranks hold the base, and the replica of full fine-tuning, together."""
    is_sharded = config.adapter is None and stage == 3 and config.parallel.frozen == "sharded"
    return num_ranks if is_sharded else 1


_STATES, _SHARDED_GRADIENTS = "masters, AdamW, averages", "this rank's gradients"
_SHARDED_WEIGHTS = "trained transformer, sharded"


def _adapters(config: Config, trained: float, value: int, stage: int, num_ranks: int) -> StateBytes:
    """Masters and averages of all three views are whole on every rank, and so is their gradient."""
    copies = 0 if value == 4 else 4 * value  # of the three views and of the gradient, in the model's dtype
    whole = (4 * 4 + copies) * trained
    if stage == 0:
        return StateBytes(resident={"adapters, averages, AdamW": whole + 8 * trained}, backward=0.0, step=0.0)
    resident = {"adapters, averages, gradient": whole, "AdamW and its masters": (4 + 8) * trained / num_ranks}
    bucket = 4 * min(REDUCE_BUCKET, trained)
    if stage < 3:
        resident["DeepSpeed's copy of the adapters"] = 4 * trained
    else:
        resident["DeepSpeed's copy, its gradient and bucket"] = 8 * trained / num_ranks + bucket
    # The gradient that is handed over, as it is and as it is summed; and the weights that are taken over.
    return StateBytes(resident=resident, backward=0.0, step=4 * trained + bucket + 4 * trained)


def _full(config: Config, trained: float, value: int, stage: int, num_ranks: int) -> StateBytes:
    """Beside the frozen transformer, the base, there are the trained one and a replica."""
    summed = 4 if value == 4 or config.parallel.gradients == "float32" else value
    bucket = min(REDUCE_BUCKET, trained)
    resident = {"replica": value * trained / ranks_of_frozen(config, stage=stage, num_ranks=num_ranks)}
    if stage == 0:
        low = 0 if value == 4 else value * trained
        resident |= {"trained transformer": 4 * trained + low, _STATES: 16 * trained, "gradients": 4 * trained + low}
        return StateBytes(resident=resident, backward=0.0, step=0.0)
    resident[_STATES] = SHARDED * trained / num_ranks
    if stage == 3:
        resident[_SHARDED_WEIGHTS] = value * trained / num_ranks
        resident[_SHARDED_GRADIENTS] = summed * trained / num_ranks
        resident["bucket of gradients"] = summed * bucket
        # What layers have gathered, and gradients of a bucket as they come and as they are summed.
        gathered = value * min(trained, 1e9)
        return StateBytes(resident=resident, backward=gathered + (value + 2 * summed) * bucket, step=0.0)
    resident["trained transformer"] = value * trained
    if stage == 1:
        if value < summed:  # DeepSpeed's optimizer for bfloat16, with sums of its own
            resident["gradients"] = summed * trained
            return StateBytes(resident=resident, backward=value * trained, step=summed * trained)
        return StateBytes(resident=resident, backward=value * trained + summed * bucket, step=0.0)
    mine = summed * trained / num_ranks
    coming = (1 if value == summed else 2) * mine
    return StateBytes(resident=resident, backward=(value + summed) * bucket + coming, step=0.0)
