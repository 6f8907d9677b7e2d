"""The policy of a recipe and the engine that trains it: adapters or all weights, on every rank whole or sharded."""

from __future__ import annotations

from functools import partial

from dgpo_fast.config import Config
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.full import FullPolicy
from dgpo_fast.models.policy import Policy
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.parallel.engine import ReplicatedEngine, TrainingEngine
from dgpo_fast.parallel.weights import TrainedWeights
from dgpo_fast.parallel.world import World


def load_policy(config: Config, world: World, *, is_trained: bool = True) -> Policy:
    """The policy of a recipe, not yet trained: every view is the base.

    Args:
        is_trained: False where it only evaluates, which takes less memory.

    Raises:
        UserError: the model cannot be loaded, or its adapters or engine cannot be what the recipe says.
    """
    model = load_model(config.model, device=world.device)
    if config.adapter is None:
        shard = None
        if is_trained and config.parallel.frozen == "sharded":
            from dgpo_fast.parallel.zero import ShardedModule

            shard = partial(ShardedModule, world=world)
        return FullPolicy(model, is_trained=is_trained, shard=shard)
    return AdapterPolicy(model, config.adapter, seed=config.seed)


def train_policy(policy: Policy, config: Config, world: World) -> TrainingEngine:
    """The engine that makes the optimizer's steps of `policy`.

    Raises:
        UserError: DeepSpeed is not there, or refuses `parallel.deepspeed`.
    """
    stage = config.parallel.zero_stage
    if isinstance(policy, AdapterPolicy):
        if stage == 0:
            return ReplicatedEngine(policy.trained, config.optimizer, world)
        from dgpo_fast.parallel.zero import FlatZeroEngine

        return FlatZeroEngine(policy.trained, config, world)
    assert isinstance(policy, FullPolicy)
    if stage == 0:
        engine = ReplicatedEngine(TrainedWeights(dict(policy.trained.named_parameters())), config.optimizer, world)
        policy.train_with(engine, world, module=policy.trained, samples_from_replica=False)
        return engine
    from dgpo_fast.parallel.zero import ZeroEngine

    zero = ZeroEngine(policy.trained, config, world)
    is_replica = stage == 3 and config.parallel.rollout == "replica"
    policy.train_with(zero, world, module=zero.module, samples_from_replica=is_replica)
    return zero
