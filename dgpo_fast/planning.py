"""What a run will do, before it does anything: images, model evaluations, FLOPs, memory, time. No weights are loaded.

Importing this needs no torch; a plan, which looks at rewards and prompts, does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from dgpo_fast import launcher
from dgpo_fast.config import Config, check_ranks
from dgpo_fast.errors import UserError
from dgpo_fast.flow.trajectory import trajectory_of
from dgpo_fast.memory import MARGIN, REMEDIES, Memory, predict_memory, trained_parameters
from dgpo_fast.models.architectures import (
    Flops,
    TransformerShape,
    VAEShape,
    check_resolution,
    check_targets,
    text_flops,
)
from dgpo_fast.models.projections import check_fusible
from dgpo_fast.models.sources import (
    ModelSource,
    clip_tokens,
    download_command,
    find_lora,
    find_model,
    hub_commit,
    missing_parts,
    transformer_shape,
    vae_shape,
)
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.reward_config import RunningConfig
from dgpo_fast.throughput import Throughput, expected_throughputs, gpu_memory_bytes, gpu_name

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of an iteration: model evaluations per image, and FLOPs of the iteration over all ranks."""

    name: str
    evaluations: float
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """How groups lie in micro-batches, the letter being that of CONTRIBUTING.md."""

    case: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What only the model's shape can tell."""

    parameters: int
    trained_parameters: int
    trained_tensors: int | None
    """Of adapters."""
    stages: tuple[Stage, ...]
    memory: Memory
    """Of each rank."""
    memory_by_zero_stage: tuple[Memory, ...]
    """The same, were the stage 0, 1, 2 or 3."""
    checkpoint_bytes: int
    """Of one on disk."""

    @property
    def flops(self) -> float:
        """FLOPs of one iteration."""
        return sum(stage.flops for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, foreseen."""

    config: Config
    num_ranks: int
    model: str
    placement: GroupPlan
    micro_batches: int
    """Backward passes of each rank per iteration."""
    sigmas: tuple[float, ...] | None
    """Those of the schedule that training draws from; None where it draws from none of it."""
    cost: Cost | None
    """None where the model's shape is not known before it is downloaded."""
    throughputs: tuple[Throughput, ...]
    warnings: tuple[str, ...]
    """What would keep the run from starting as things stand."""


def plan(config: Config, *, num_ranks: int | None = None) -> Plan:
    """The plan of a run of `config` on `num_ranks` ranks; None for as many as the launcher's environment says.

    Raises:
        UserError: the model, its size, the adapter, a reward or a prompt file cannot be what the recipe says, or an
            iteration does not divide among the ranks.
    """
    source = find_model(config.model.name, revision=config.model.version)
    num_ranks = num_ranks or launcher.world_size()
    check_ranks(config, num_ranks)
    shape = transformer_shape(source)
    vae = vae_shape(source)
    if shape is not None:
        check_resolution(
            config.model.resolution,
            vae_factor=vae.factor,
            patch=shape.patch,
            pos_embed_max_size=shape.pos_embed_max_size,
        )
        if config.adapter is not None:
            check_targets(config.adapter.targets, [linear.name for linear in shape.linears])
        if config.model.engine == "fused":
            targets = () if config.adapter is None else config.adapter.targets
            check_fusible(shape.qk_norm, (linear.name for linear in shape.linears if linear.is_target(targets)))
    if config.begins_with is not None:
        find_lora(config.begins_with)
    model, model_warnings = _describe_model(source)
    sigmas, _ = trajectory_of(config.rollout)
    points = config.algorithm.trained_points
    images_per_rank = config.images_per_iteration // num_ranks
    costs = None if shape is None else cost(config, source, shape, vae, num_ranks=num_ranks)
    too_much = () if costs is None else _lack_of_memory(config, costs.memory)
    return Plan(
        config=config,
        num_ranks=num_ranks,
        model=model,
        placement=placement(config, num_ranks),
        micro_batches=_micro_batches(config, images_per_rank),
        sigmas=None if points is None else tuple(float(sigmas[point]) for point in points),
        cost=costs,
        throughputs=tuple(expected_throughputs(config, num_ranks=num_ranks)),
        warnings=(*too_much, *model_warnings, *_missing_rewards(config), *_missing_prompts(config)),
    )


def placement(config: Config, num_ranks: int) -> GroupPlan:
    """Whether a group's samples meet in one micro-batch."""
    found = placement_of(config, num_ranks)
    place, work = {
        "a": (f"groups stay whole, {found.micro // found.group_size} in a micro-batch", "no extra work"),
        "b": ("groups lie over several ranks, at the same micro-step", "one small sum over the ranks at each"),
        "c": (f"groups are cut over {found.steps_per_round} micro-steps", "their errors first, once more forward"),
    }[found.case]
    if found.case != "a" and not config.algorithm.compares_groups:
        work = f"no extra work, {config.algorithm.name} needs no whole groups"
    return GroupPlan(case=found.case, why=f"{place}: {work}")


def evaluations(config: Config, num_ranks: int = 1) -> dict[str, float]:
    """Transformer forwards per image of each stage; a guided velocity takes two. A backward follows the policy's."""
    _, table = trajectory_of(config.rollout)
    trained = config.algorithm.forwards(
        velocities=2 if config.rollout.guidance > 1 else 1,
        is_cut=placement(config, num_ranks).case == "c",
        group_size=config.groups.size,
    )
    return {"rollout": len(table.is_guided) + int(table.is_guided.sum()), **trained}


def _micro_batches(config: Config, images: int) -> int:
    """Backward passes in an iteration on a rank that has so many images."""
    updates, micro = config.optimizer.steps_per_iteration, config.optimizer.images_per_micro_batch
    trained = config.algorithm.trained_images(images // updates, group_size=config.groups.size)
    return updates * -(-trained // micro) * config.algorithm.passes


def cost(config: Config, source: ModelSource, shape: TransformerShape, vae: VAEShape, *, num_ranks: int = 1) -> Cost:
    """Parameters, FLOPs and memory of a run with a model of this shape."""
    memory = partial(
        predict_memory,
        config,
        shape,
        vae,
        text_tokens=text_tokens(config, source),
        images=config.images_per_iteration // num_ranks,
        has_text_encoders=_has_real_text_encoders(source, shape),
        num_ranks=num_ranks,
    )
    return Cost(
        parameters=shape.parameters,
        trained_parameters=trained_parameters(config, shape),
        trained_tensors=None if config.adapter is None else 2 * len(shape.adapted(config.adapter.targets)),
        stages=tuple(_stages(config, source, shape, vae, num_ranks=num_ranks)),
        memory=memory(),
        memory_by_zero_stage=tuple(memory(zero_stage=stage) for stage in range(4)),
        checkpoint_bytes=_checkpoint_bytes(config, shape),
    )


def _checkpoint_bytes(config: Config, shape: TransformerShape) -> int:
    """Masters, Adam's two averages, the old policy and the evaluation's: with adapters the last as diffusers', too, of
    full fine-tuning with the model's positions."""
    trained = trained_parameters(config, shape)
    return 4 * (5 * trained + shape.position_values if config.adapter is None else 6 * trained)


def text_tokens(config: Config, source: ModelSource) -> int:
    """Tokens of a prompt: CLIP's, both encoders' side by side, and T5's."""
    return clip_tokens(source) + config.model.text_length


def _stages(
    config: Config, source: ModelSource, shape: TransformerShape, vae: VAEShape, *, num_ranks: int
) -> Iterator[Stage]:
    tokens = shape.tokens(config.model.resolution, text_tokens(config, source), vae_factor=vae.factor)
    base = shape.forward_flops(tokens)
    if config.adapter is None:
        adapted, backward = base, shape.full_backward_flops(tokens)
    else:
        targets, rank = config.adapter.targets, config.adapter.rank
        adapted = base + shape.adapter_flops(tokens, targets, rank=rank)
        backward = shape.backward_flops(tokens, targets, rank=rank)
    images = config.images_per_iteration
    for name, count in evaluations(config, num_ranks).items():
        each: Flops = {"reference": base, "policy": adapted + backward}.get(name, adapted)
        yield Stage(name=name, evaluations=count, flops=images * count * each.total)
    yield Stage(name="VAE", evaluations=0, flops=images * vae.decode_flops(config.model.resolution).total)
    if _has_real_text_encoders(source, shape):
        flops = config.groups.per_iteration * text_flops(config.model.text_length)
        yield Stage(name="text", evaluations=0, flops=flops)


def _has_real_text_encoders(source: ModelSource, shape: TransformerShape) -> bool:
    """Those of random and of small models are too small to count."""
    return source.kind != "random" and shape.joint_attention_dim == 4096


def _describe_model(source: ModelSource) -> tuple[str, list[str]]:
    """Where the weights come from, and what stands in the way of having them."""
    if source.kind == "embedded":
        return f"embedded, in {source.location}", []
    if source.kind == "random":
        return (
            f"random weights in the shape of {source.location}: nothing is downloaded, nothing it draws means anything",
            [],
        )
    if source.kind == "directory":
        return f"local directory {source.location}", []
    missing = missing_parts(source)
    if not missing:
        return f"{source.location}, in the local Hugging Face cache", []
    from huggingface_hub import get_token

    download = download_command(source)
    lacks = "is not" if hub_commit(source) is None else f"lacks {', '.join(missing)}"
    warning = f"{source.location} {lacks} in the local cache: `{download}` or the first run fetches it"
    if get_token() is None:
        warning += (
            "; no Hugging Face token found: if it is gated, accept its licence at "
            f"https://huggingface.co/{source.location} and run `hf auth login`"
        )
    return f"{source.location}, from the Hugging Face hub", [warning]


def _missing_rewards(config: Config) -> Iterator[str]:
    from dgpo_fast.rewards.base import absent_weights, check_metric, check_reward, has_weights

    for term in config.rewards.terms:
        check_metric(term)
    for name in config.rewards.names:
        if config.rewards.running.get(name, RunningConfig()).url is not None:
            continue  # what it needs is where it runs
        check_reward(name, config.rewards)
        if has_weights(name):
            yield from (f"reward {name!r}: {line}" for _, line in absent_weights(name, config.rewards))


def _missing_prompts(config: Config) -> Iterator[str]:
    from dgpo_fast.prompts import load_prompts
    from dgpo_fast.prompts.sources import missing_dataset
    from dgpo_fast.rewards.prompt_checks import check_prompts

    for key, source in (("prompts.train", config.prompts.train), ("prompts.test", config.prompts.test)):
        if source is None:
            yield f"{key} is not set: give --set {key}=FILE, a text file with a prompt on each line"
        elif (missing := missing_dataset(source)) is not None:
            yield f"{key}: {missing}"
        else:
            prompts = load_prompts(source, key=key)
            try:
                check_prompts(prompts, config.rewards, key=key)
            except UserError as error:
                yield str(error)


def _lack_of_memory(config: Config, memory: Memory) -> Iterator[str]:
    """A warning for each card, the recipe's and this machine's, that the run would not fit on."""
    for card, total in _cards(config).items():
        if memory.peak_bytes > (1 - MARGIN) * total:
            always = sum(memory.resident.values())
            remedy = REMEDIES[memory.largest_phase]
            if always > (1 - MARGIN) * total:
                remedy = (
                    f"{always / GB:.1f} GB are there all the time, which more ranks (--ranks N), a higher "
                    "parallel.zero_stage or parallel.offload_optimizer=cpu makes fewer"
                )
            yield (
                f"the peak of {memory.peak_bytes / GB:.1f} GB, in {memory.largest_phase}, leaves less than "
                f"{MARGIN:.0%} of the {total / GB:.1f} GB of {card}: {remedy}"
            )


def render(plan: Plan) -> RenderableType:
    """The plan for a terminal."""
    parts: list[RenderableType] = [_summary(plan)]
    if plan.cost is not None:
        parts += [_stage_table(plan.cost), _memory_table(plan.cost.memory), _zero_table(plan, plan.cost)]
    parts += [f"[yellow]warning:[/] {escape(warning)}" for warning in plan.warnings]
    return Group(*parts)


def _summary(plan: Plan) -> Table:
    table = Table(title=f"Plan of {plan.config.name}", title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(plan):
        table.add_row(name, value)
    return table


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    config, cost, evaluation = plan.config, plan.cost, plan.config.evaluation
    groups, images = config.groups, config.images_per_iteration
    ranks = "1 rank" if plan.num_ranks == 1 else f"{plan.num_ranks} ranks"
    yield "model", plan.model
    if config.begins_with is not None:
        yield "begins with", f"the LoRA in {config.begins_with}"
    yield "parameters", _parameters(cost) if cost else "known once the model is there; so are FLOPs, memory and time"
    yield "iteration", f"{groups.per_iteration} prompts x {groups.size} images = {images}, shared by {ranks}"
    yield "groups", f"case ({plan.placement.case}): {plan.placement.why}"
    yield "backwards", f"{plan.micro_batches} of {config.optimizer.images_per_micro_batch} images, on each rank"
    yield "scoring", _scoring(config, config.images_per_iteration // plan.num_ranks)
    drawn_from = "drawn anew" if plan.sigmas is None else f"out of {' '.join(f'{sigma:.4f}' for sigma in plan.sigmas)}"
    yield "sigmas", f"{config.algorithm.passes} trained in an iteration, {drawn_from}"
    when = f"every {evaluation.every} steps" if evaluation.every else "at start and end"
    drawn = f"{evaluation.num_prompts} x {evaluation.images_per_prompt} images of {evaluation.steps} solver steps"
    yield "evaluation", f"{drawn} {when}, not in the figures below"
    if cost is not None:
        gigabytes = cost.checkpoint_bytes / GB
        size = f"{gigabytes:,.0f}" if gigabytes > 10 else f"{gigabytes:.2g}"
        often = f"every {config.checkpoints.every} steps, {size} GB each"
        kept = config.checkpoints.keep_last + 2
        yield "checkpoints", f"{often}, up to {kept} on disk at once: the last, the best, and one in the making"
        for throughput in plan.throughputs:
            each = cost.flops / throughput.flops_per_s
            iterations = config.steps / config.optimizer.steps_per_iteration
            total = f"{_duration(iterations * each)} for {config.steps} steps"
            yield "time", f"{_duration(each)} an iteration, {total}: {throughput.source}"
        if not plan.throughputs:
            yield "time", "not estimated of float32 on a GPU: dgpo-fast profile measures it"


def _scoring(config: Config, share: int) -> str:
    """When a rank's `share` of the images is decoded and scored."""
    at_once = config.rollout.images_per_forward
    if share > at_once:
        return f"of {at_once} images while the next are drawn, on each rank"
    return f"after the rollout: a rank's {share} images are one forward (rollout.images_per_forward={at_once})"


def _parameters(cost: Cost) -> str:
    share = cost.trained_parameters / cost.parameters
    tensors = "" if cost.trained_tensors is None else f" in {cost.trained_tensors} tensors"
    trained = f"{_count(cost.trained_parameters)} trained{tensors} ({share:.1%})"
    return f"{_count(cost.parameters)} in the transformer, {trained}"


def _stage_table(cost: Cost) -> Table:
    table = Table(title="Work of one iteration", title_justify="left")
    for column in ("stage", "forwards per image", "FLOPs", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in cost.stages:
        if stage.flops:
            forwards = f"{stage.evaluations:g}" if stage.evaluations else ""
            table.add_row(stage.name, forwards, _scaled(stage.flops, "FLOP"), f"{stage.flops / cost.flops:.1%}")
    table.add_section()
    table.add_row("all (policy with backward)", "", _scaled(cost.flops, "FLOP"), "")
    return table


def _memory_table(memory: Memory) -> Table:
    table = Table(title="Memory of one rank (counted; without CUDA itself and rewards)", title_justify="left")
    table.add_column("for")
    table.add_column("GB", justify="right")
    for purpose, value in memory.resident.items():
        table.add_row(purpose, f"{value / GB:.2f}")
    table.add_section()
    for phase, value in memory.phases.items():
        table.add_row(f"{phase}, while it lasts", f"{value / GB:.2f}")
    table.add_section()
    table.add_row(f"peak, in {memory.largest_phase}", f"{memory.peak_bytes / GB:.2f}")
    return table


SHARDED_BY = ("nothing", "masters, AdamW, averages", "and gradients", "and trained weights")
"""What ZeRO shards, by stage; adapters' averages, gradients and weights stay whole."""


def _zero_table(plan: Plan, cost: Cost) -> Table:
    ranks = "1 rank" if plan.num_ranks == 1 else f"{plan.num_ranks} ranks"
    table = Table(title=f"The same by ZeRO stage, on {ranks}", title_justify="left")
    for column in ("stage", "sharded", "GB all the time", "GB at the peak", "GB of the host"):
        table.add_column(column, justify="left" if column == "sharded" else "right")
    cards = _cards(plan.config)
    for total in cards.values():
        table.add_column(f"fits {total / GB:.4g} GB")
    for stage, memory in enumerate(cost.memory_by_zero_stage):
        mark = " *" if stage == plan.config.parallel.zero_stage else ""
        sizes = (sum(memory.resident.values()), memory.peak_bytes, sum(memory.host.values()))
        fits = ("yes" if memory.peak_bytes <= (1 - MARGIN) * total else "no" for total in cards.values())
        table.add_row(f"{stage}{mark}", SHARDED_BY[stage], *(f"{size / GB:.2f}" for size in sizes), *fits)
    return table


def _cards(config: Config) -> dict[str, float]:
    """Memory of the cards that a run should fit on, the recipe's and this machine's, in bytes."""
    cards = {}
    if config.device_memory_gb is not None:
        cards["device_memory_gb"] = config.device_memory_gb * GB
    if config.device != "cpu" and (found := gpu_memory_bytes()) is not None:
        cards[f"this {gpu_name()}"] = float(found)
    return cards


def _count(number: float) -> str:
    return _scaled(number, "").replace("G", "B")


def _scaled(number: float, unit: str) -> str:
    """Three or four digits and a metric prefix."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {prefix}{unit}".rstrip()
    return f"{number:.0f} {unit}".rstrip()


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
