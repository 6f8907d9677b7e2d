"""The configuration of a run: typed sections, strict validation, recipes.

A recipe is a YAML file. It may extend another by name; keys it does not set keep the defaults below, which are those of
the published SD3.5-Medium recipes (DGPO, arXiv 2510.08425, and the code its authors published). No torch here: a bad
recipe is refused before anything heavy is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from dgpo_fast.algorithm_config import ALGORITHM_NAMES, AlgorithmConfig, DGPOConfig, own_settings
from dgpo_fast.errors import UserError, suggest
from dgpo_fast.guard_config import GuardConfig
from dgpo_fast.reward_config import RewardsConfig
from dgpo_fast.sections import Count, NonNegative, Positive, Section, Sigma

RECIPES = Path(__file__).parent / "recipes"
EVALUATION_RECIPES = RECIPES / "evaluation"

PUBLISHED_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class ModelConfig(Section):
    """Which Stable Diffusion 3 to fine-tune, and in what precision and size."""

    name: str = "stabilityai/stable-diffusion-3.5-medium"
    """A hub name, a local directory in diffusers' format, `embedded`, or `random:sd35-medium` / `random:sd35-large`."""
    revision: str | None = None
    """Of a model of the hub: a branch, a tag or a commit; null means main."""
    commit: str | None = None
    """Of the hub, that it is loaded at: a run writes down the one it began with, whatever `revision` means later."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the frozen base and of the compute copy of the adapters; adapters themselves are float32."""
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    """Side of the square images, in pixels: a multiple of what one token covers, 16 in SD3."""
    text_length: Count = 128
    """Tokens of the T5 encoder; the 77 of CLIP come on top."""
    engine: Literal["fused", "compile", "eager"] = "fused"
    """How the transformer runs: by hand from the fused operators, by diffusers' code compiled in blocks or not."""
    attention: Literal["auto", "flash3", "cudnn", "flash", "flash2", "efficient", "cpu", "math"] = "auto"
    """The fused engine's: `auto` is the first that runs here of flash3, cudnn, flash, flash2, efficient, cpu, math.
    On CUDA flash3 and flash2 alone promise the same gradients, to the bit, of the same inputs."""
    sampling: Literal["auto", "same", "merged", "bfloat16", "fp8"] = "auto"
    """What the fused engine draws training samples with; errors, gradients and evaluations stay as they are.

    `auto`: merged in float32, else the same.
    `merged`: copies of the adapted weights with the adapters added in, for float32, where the sum loses nothing.
    `bfloat16`: of a float32 model such copies of all the blocks' weights, in bfloat16; on a CPU that lacks instructions
    for products of these, `merged`. Other models and engines draw the same.
    `fp8`: a copy of the blocks' weights in fp8, beside adapters as they are; H100 and newer, or a CPU.
    """
    checkpointing: Literal["none", "selective", "full"] = "selective"
    """What is kept for the backward pass: everything; products and attention, while norms and GELU run again; or only
    what each block reads. The engines eager and compile know `full`, and keep everything otherwise."""
    prompt_cache: bool = True
    """Keep prompt embeddings on disk, in $DGPO_FAST_CACHE or ~/.cache/dgpo-fast, for this run resumed and for others.

    1.7 MB for a prompt in SD3.5's bfloat16. No number of a run depends on it.
    """

    @property
    def version(self) -> str | None:
        """What the hub is asked for."""
        return self.commit or self.revision

    @model_validator(mode="after")
    def _copies_have_an_engine(self) -> ModelConfig:
        if self.sampling in ("merged", "fp8") and self.engine != "fused":
            raise ValueError(f"model.sampling {self.sampling} is of model.engine fused alone, got {self.engine}")
        return self

    @property
    def drawn_with(self) -> Literal["same", "merged", "bfloat16", "fp8"]:
        """`sampling`, decided."""
        has_copies = self.engine == "fused" and self.dtype == "float32"
        if self.sampling == "auto":
            return "merged" if has_copies else "same"
        return "same" if self.sampling == "bfloat16" and not has_copies else self.sampling


class AdapterConfig(Section):
    """LoRA (arXiv 2106.09685) on the transformer."""

    rank: Count = 64
    alpha: Positive = 128
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Distribution of A; B starts at zero."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = PUBLISHED_TARGETS
    """Ends of module names, as peft matches them."""
    path: str | None = None
    """A LoRA to begin from, of this rank and these targets: a directory that diffusers or peft wrote, such as another
    run's checkpoints/best/lora. The reference of the KL term stays the base without it. null begins with the base."""


class RolloutConfig(Section):
    """How images are sampled for training."""

    solver: Literal["euler", "dpm++2m", "ab2", "ab3", "ab4", "unipc", "heun"] = "dpm++2m"
    schedule: Literal["dpm", "unipc", "flow_match"] = "dpm"
    shift: Positive = 3.0
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    guidance: Annotated[float, Field(ge=1)] = 4.5
    """Classifier-free guidance scale; 1 means none, and half the work."""
    guidance_interval: tuple[Sigma, Sigma] | None = None
    """Noise levels, from the lower to the upper, at which sampling is guided (arXiv 2404.07724); null guides at all."""
    timesteps: Literal["float", "integer"] = "float"
    """`integer` truncates the model's timestep as the published code does."""
    switch_step: Annotated[int, Field(ge=0)] = 500
    """Of dgpo: optimizer steps that sample from the current policy; later ones sample from the old policy. Of the other
    methods diffusion_nft always samples from the old policy, the rest from the current one."""
    images_per_forward: Count = 16
    images_per_decode: Count | None = None
    """Of the VAE, whose memory grows with the pixels; null decodes as many at once as were sampled at once."""
    cuda_graphs: bool = False
    """On CUDA, replay the trajectory of each `images_per_forward` as one graph, captured at the first of its shape. It
    keeps as much memory as one forward takes. Not where layers are gathered as they compute."""

    @model_validator(mode="after")
    def _interval_has_a_direction(self) -> RolloutConfig:
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval: expected [lower, upper], got {list(self.guidance_interval)}")
        return self

    @property
    def decoded_at_once(self) -> int:
        return self.images_per_decode or self.images_per_forward


class GroupsConfig(Section):
    """How many images an iteration samples."""

    size: Annotated[int, Field(ge=2)] = 16
    """Images per prompt."""
    per_iteration: Count = 8
    """Prompts per iteration, over all ranks."""


class AdvantageConfig(Section):
    """How the rewards of a group become advantages."""

    aggregation: Literal["sum", "gdpo"] = "sum"
    """Of several rewards: `sum` normalises their weighted sum; `gdpo` (arXiv 2601.05242) each by itself, whatever its
    scale, and then their weighted sum by its deviation over the iteration."""
    std: Literal["group", "global"] = "group"
    """Divide by the standard deviation of the group, or of the whole iteration."""
    clamp: Positive = 5.0
    epsilon: Positive = 1e-4
    """Added to the standard deviation, which is 0 where all of a group score the same."""


class OldPolicyConfig(Section):
    """The moving average of the policy that clips, and later samples.

    Its decay is min(max_decay, rate * step): of steps that DGPO counts from 0, diffusion_nft and awm from 1.
    """

    max_decay: Annotated[float, Field(ge=0, lt=1)] = 0.3
    rate: NonNegative = 0.001

    def decay_at(self, step: int) -> float:
        """What the average keeps of itself."""
        return min(self.max_decay, self.rate * step)


class EvaluationEmaConfig(Section):
    """The slow moving average that is evaluated and saved: decay = min(max_decay, (1 + step) / (1 + warmup + step))."""

    max_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    warmup: NonNegative = 9.0
    every: Count = 8
    """Applied where (step + 1) is a multiple of this."""

    def decay_at(self, step: int) -> float:
        """What the average keeps of itself where it is applied after `step`, counted from 0."""
        return min(self.max_decay, (1 + step) / (1 + self.warmup + step))


class OptimizerConfig(Section):
    """AdamW."""

    lr: Positive = 3e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: NonNegative = 1e-4
    eps: Positive = 1e-8
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Count | None = None
    """Steps over which the learning rate falls linearly, to a tenth at the lowest; null keeps it."""
    max_grad_norm: Positive = 1.0
    max_skipped: Annotated[int, Field(ge=0)] = 2
    """Steps in a row that may be left out because their gradient is not finite; with one more, the run stops.
    Those that no group is left for are not among them."""
    images_per_micro_batch: Count = 16
    steps_per_iteration: Count = 1
    """Steps that an iteration's groups are shared out to, one after the other."""

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        risen = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = 1.0 if self.decay_steps is None else max(0.1, 1 - step / self.decay_steps)
        return self.lr * risen * left


class PromptsConfig(Section):
    """Where prompts come from: a generator of the package such as `geneval:train`, a file with a prompt on each line,
    JSON lines, Parquet, or a dataset, `hf:owner/name:split#column`. See prompts/sources.py.
    """

    train: str | None = None
    test: str | None = None


class EvaluationConfig(Section):
    """Held-out evaluation of the evaluation EMA against the base, from fixed noise."""

    every: Annotated[int, Field(ge=0)] = 60
    """In optimizer steps; 0 evaluates only the base at the start and the result at the end."""
    steps: Count = 14
    num_prompts: Count = 64
    images_per_prompt: Count = 4


class CheckpointsConfig(Section):
    every: Count = 60
    """In optimizer steps; the last step is always saved, and what is evaluated, so that the best is."""
    keep_last: Count = 2
    """The best one is kept besides."""


class LoggingConfig(Section):
    samples_every: Annotated[int, Field(ge=0)] = 60
    """Sample grids, in optimizer steps; 0 writes only the first and the last."""
    num_samples: Count = 8
    tensorboard: bool = True
    wandb: bool = False


class ParallelConfig(Section):
    """How ranks share the work's memory; every rank draws and trains on its share of the images in any case."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_s: Positive = 1800.0
    """How long a rank waits for the others before the run is given up: longer than what one does alone, such as the
    download of a model, an encoding of all prompts, or the first rank's checkpoints and reports. It is for ranks that
    hang; of one that fails or dies the others hear at once."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed (ZeRO, arXiv 1910.02054) shards among ranks: nothing; masters and optimizer states; gradients too;
    weights too. Adapters' weights and those they stand beside are whole on every rank in any stage."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Precision in which full fine-tuning in bfloat16 adds up and exchanges gradients; adapters' are float32."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where DeepSpeed keeps masters and optimizer states, and makes the step."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """Where DeepSpeed keeps the weights that stage 3 shards."""
    nvme_path: str | None = None
    rollout: Literal["replica", "gathered"] = "replica"
    """Under stage 3, draw with a replica of the policy, made anew each step, or gather weights layer by layer."""
    frozen: Literal["replicas", "sharded"] = "replicas"
    """Under stage 3, keep the base and the old policy of full fine-tuning whole on every rank, or shard them, too."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's configuration, as it documents it; what the recipe decides by another key is refused."""

    @property
    def gathers_as_it_draws(self) -> bool:
        """Whether ranks exchange weights while they draw samples."""
        return self.rollout == "gathered" or self.frozen == "sharded"

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> ParallelConfig:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3, got 0")
        if self.offload_weights != "none" and self.zero_stage != 3:
            raise ValueError(f"parallel.offload_weights needs parallel.zero_stage 3, got {self.zero_stage}")
        if self.frozen == "sharded" and self.zero_stage != 3:
            raise ValueError(f"parallel.frozen sharded needs parallel.zero_stage 3, got {self.zero_stage}")
        if self.rollout == "gathered" and self.zero_stage != 3:
            raise ValueError(f"parallel.rollout gathered needs parallel.zero_stage 3, got {self.zero_stage}")
        if self.offload_weights == "nvme" and self.nvme_path is None:
            raise ValueError("parallel.nvme_path, a directory, is required for parallel.offload_weights nvme")
        if self.gradients == "bfloat16" and self.zero_stage == 0:
            raise ValueError("parallel.gradients must be float32 with parallel.zero_stage 0, got bfloat16")
        if self.deepspeed and self.zero_stage == 0:
            raise ValueError("parallel.deepspeed needs parallel.zero_stage 1, 2 or 3: with 0, DeepSpeed is not used")
        return self


class Config(Section):
    """Everything a run needs to know. `load_recipe` reads one, `dgpo-fast train --set a.b=c` changes single values."""

    name: str
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Count = 1000
    """Optimizer steps; an iteration of sampling is followed by `optimizer.steps_per_iteration` of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_memory_gb: Positive | None = None
    """Memory of the card that the recipe is for, in GB: `--dry-run` warns where the run would not fit. It also does for
    the card that is there."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig | None = AdapterConfig()
    """null trains every weight of the transformer."""
    rollout: RolloutConfig = RolloutConfig()
    groups: GroupsConfig = GroupsConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    algorithm: Annotated[AlgorithmConfig, Field(discriminator="name")] = DGPOConfig()
    old_policy: OldPolicyConfig = OldPolicyConfig()
    evaluation_ema: EvaluationEmaConfig = EvaluationEmaConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rewards: RewardsConfig
    prompts: PromptsConfig = PromptsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    logging: LoggingConfig = LoggingConfig()
    guard: GuardConfig = GuardConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _full_fine_tuning_has_an_engine(self) -> Config:
        if self.adapter is None and self.model.engine == "fused":
            raise ValueError("adapter: null trains every weight, which model.engine fused cannot: use compile or eager")
        if self.adapter is None and self.parallel.zero_stage == 3 and self.model.engine != "eager":
            raise ValueError(f"parallel.zero_stage 3 shards the layers: model.engine eager, got {self.model.engine}")
        if self.parallel.gradients == "bfloat16" and self.model.dtype != "bfloat16":
            raise ValueError(f"parallel.gradients bfloat16 needs model.dtype bfloat16, got {self.model.dtype}")
        for key in ("rollout", "frozen", "offload_weights", "gradients"):
            value, default = getattr(self.parallel, key), ParallelConfig.model_fields[key].default
            if self.adapter is not None and value != default:
                raise ValueError(f"parallel.{key} {value} is for full fine-tuning (adapter: null): adapters stay whole")
        return self

    @model_validator(mode="after")
    def _graphs_have_all_weights(self) -> Config:
        if self.rollout.cuda_graphs and self.parallel.gathers_as_it_draws:
            raise ValueError(
                "rollout.cuda_graphs must be false with parallel.rollout gathered or parallel.frozen sharded: a graph "
                "gathers no layers"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        self.algorithm.check_points(self.rollout.steps)
        self.algorithm.check(self)
        if self.rewards.min_group_size > self.groups.size:
            raise ValueError(
                f"rewards.min_group_size must be at most groups.size, {self.groups.size}, got "
                f"{self.rewards.min_group_size}"
            )
        updates = self.optimizer.steps_per_iteration
        if self.groups.per_iteration % updates:
            raise ValueError(
                f"optimizer.steps_per_iteration must divide groups.per_iteration, {self.groups.per_iteration}, got "
                f"{updates}: each step learns from its own groups"
            )
        if self.steps % updates:
            raise ValueError(f"steps must be a multiple of optimizer.steps_per_iteration, {updates}, got {self.steps}")
        micro, images = self.optimizer.images_per_micro_batch, self.images_per_iteration // updates
        if images % micro:
            of_what, divisor = _learned_from(updates)
            raise ValueError(
                f"optimizer.images_per_micro_batch must divide the {images} images of {of_what} (groups.size x "
                f"groups.per_iteration{divisor}), got {micro}; nearest that does: {_nearest_divisor(images, micro)}"
            )
        return self

    @property
    def images_per_iteration(self) -> int:
        return self.groups.size * self.groups.per_iteration

    def sampling_view(self, step: int) -> Literal["policy", "old"]:
        """What samples before this optimizer step are drawn through."""
        return self.algorithm.sampling_view(step, switch_step=self.rollout.switch_step)

    def at_commit(self, commit: str | None) -> Config:
        """The same with the model at `commit`."""
        return self.model_copy(update={"model": self.model.model_copy(update={"commit": commit})})

    @property
    def begins_with(self) -> Path | None:
        """The LoRA that the policy is before the first step; None: it is the base."""
        return None if self.adapter is None or self.adapter.path is None else Path(self.adapter.path)


def check_ranks(config: Config, num_ranks: int) -> None:
    """Makes sure that an iteration divides among the ranks, and a rank's share of it into micro-batches.

    Raises:
        UserError: it does not; the nearest value that does is named. Or a micro-batch lacks what the method compares,
            there are fewer held-out prompts than ranks, or other ranks would not wait as long as a reward may take.
    """
    if num_ranks > 1 and config.rewards.timeout_s >= config.parallel.timeout_s:
        raise UserError(
            f"rewards.timeout_s must be below parallel.timeout_s, {config.parallel.timeout_s:g}, for which other ranks "
            f"wait; got {config.rewards.timeout_s:g}"
        )
    updates, size, micro = (
        config.optimizer.steps_per_iteration,
        config.groups.size,
        config.optimizer.images_per_micro_batch,
    )
    groups = config.groups.per_iteration // updates
    if groups * size % num_ranks:
        least = updates * num_ranks // math.gcd(num_ranks, size)  # groups whose images divide among the ranks
        raise UserError(
            f"groups.per_iteration: {groups} groups of {size} images do not divide among {num_ranks} ranks; "
            f"nearest that do: {max(1, round(config.groups.per_iteration / least)) * least}"
        )
    share = groups * size // num_ranks
    if share % micro:
        of_what, _ = _learned_from(updates)
        raise UserError(
            f"optimizer.images_per_micro_batch must divide a rank's share of {of_what}, {share} images on each of "
            f"{num_ranks} ranks, got {micro}; nearest that does: {_nearest_divisor(share, micro)}"
        )
    try:
        config.algorithm.check_micro_batch(micro, group_size=size, num_ranks=num_ranks)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.evaluation.num_prompts < num_ranks:
        raise UserError(
            f"evaluation.num_prompts must be at least the number of ranks, {num_ranks}, since each draws some; "
            f"got {config.evaluation.num_prompts}"
        )


def _learned_from(updates: int) -> tuple[str, str]:
    """What a gradient is of, where an iteration makes so many steps, and what its images are divided by."""
    return ("an iteration", "") if updates == 1 else ("an optimizer step", " / optimizer.steps_per_iteration")


def _nearest_divisor(number: int, wanted: int) -> int:
    """Of the divisors of `number` the one closest to `wanted`, of two the smaller."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


BATCHES = ("rollout.images_per_forward", "optimizer.images_per_micro_batch")
"""How many samples are computed at once: a matter of memory and of ranks, unless `depends_on_batches`."""
MAY_CHANGE_ON_RESUME = (
    "name",
    "description",
    "steps",
    "device_memory_gb",
    "model.prompt_cache",
    # What fits into memory, or divides among other ranks: the same numbers, to rounding.
    "model.checkpointing",
    "rollout.images_per_decode",
    *BATCHES,
    "evaluation.every",
    "optimizer.max_skipped",
    "checkpoints.",
    "logging.",
    "guard.",
    "parallel.",
    "prompts.",  # where they come from: the run refuses others
    "rewards.running.",
    "rewards.retries",
    "rewards.timeout_s",
    "rewards.max_failed_share",
    *(
        f"rewards.{judge}.{key}"
        for judge in ("judge", "deqa", "unifiedreward")
        for key in ("url", "concurrency", "timeout_s", "deadline_s", "retries", "backoff_s")
    ),
)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe, by name (see `recipe_names`) or from a YAML file, with `a.b=value` overrides.

    Raises:
        UserError: no such recipe, not YAML, an unknown key (the nearest is named), a wrong type, values that disagree.
    """
    data = _read_recipe(str(name_or_path))
    _apply(data, overrides)
    return parse_config(data, source=str(name_or_path))


def load_rewards(name: str, overrides: Sequence[str] = ()) -> RewardsConfig:
    """The section `rewards` of one reward without a recipe, with `rewards.a.b=value` overrides.

    Raises:
        UserError: an unknown key (the nearest is named), one of another section, a wrong type.
    """
    data: dict[str, Any] = {"name": name, "rewards": {"terms": [{"name": name}]}}
    for override in overrides:
        if not override.startswith("rewards."):
            raise UserError(f"--set {override}: without a recipe, only keys that begin with rewards. can be set")
        apply_override(data, override)
    return parse_config(data, source=name).rewards


def load_run_config(run_dir: Path) -> Config:
    """The configuration of a run, from its directory.

    Raises:
        UserError: `run_dir` is no run directory, or its configuration was changed into a bad one.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    return load_recipe(run_dir / "config.yaml")


def change_config(config: Config, changes: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> Config:
    """`config` with the values of `changes`, section by section, and then `a.b=value` overrides; `source` names it.

    Raises:
        UserError: as `load_recipe`.
    """
    data = _merge(config.model_dump(mode="json"), dict(changes))
    _apply(data, overrides)
    return parse_config(data, source=source)


def refuse_used(out: Path) -> None:
    """Makes sure that `out` holds no run with a step, or a checkpoint: one that failed before may be begun anew.

    Raises:
        UserError: it does, and a new one would overwrite it.
    """
    metrics = out / "metrics.jsonl"
    if (metrics.exists() and metrics.stat().st_size > 0) or any((out / "checkpoints").glob("*")):
        raise UserError(f"{out} already holds a run: give --resume to go on with it, or another --out")


def parse_config(data: Mapping[str, Any], *, source: str) -> Config:
    """The validated configuration of plain data; `source` names it in errors."""
    algorithm = data.get("algorithm", {})
    named = {"algorithm": {"name": DGPOConfig().name, **algorithm}} if isinstance(algorithm, Mapping) else {}
    model = _config_with(named.get("algorithm", {}).get("name"))
    try:
        # Strict JSON validation: "3" and 1.5 are no int, true is no float; but a list is a tuple and 1 is a float.
        return model.model_validate_json(json.dumps({**data, **named}), strict=True)
    except TypeError as error:  # of a YAML set, say
        raise UserError(f"{source}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, model)}") from None


def _config_with(algorithm: Any) -> type[Config]:
    """The configuration of runs by a method of that name, which may be of one's own."""
    return _own_config(algorithm) if isinstance(algorithm, str) and ":" in algorithm else Config


@cache
def _own_config(algorithm: str) -> type[Config]:
    own: Any = {"algorithm": (own_settings(algorithm), ...)}
    return create_model(Config.__name__, __base__=Config, __module__=__name__, **own)


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The sections in a YAML file, not validated.

    Raises:
        UserError: it is not YAML, or no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(data).__name__}")
    return data


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def resume_conflicts(saved: Config, wanted: Config, *, has_begun: bool = True) -> list[str]:
    """Keys in which `wanted` differs from `saved` and a resumed run must not: `key: saved -> wanted`.

    Args:
        has_begun: whether there is a checkpoint, which knows the run's prompts, wherever they come from.
    """
    batches = BATCHES if saved.algorithm.depends_on_batches else ()
    idle = () if saved.algorithm.switches_views else ("rollout.switch_step",)
    return [
        f"{key}: {before!r} -> {after!r}"
        for key, (before, after) in differences(saved, wanted).items()
        if key in batches or not (_may_change(key) or key in idle) or (key.startswith("prompts.") and not has_begun)
    ]


def _may_change(key: str) -> bool:
    return any(key == each or (each.endswith(".") and key.startswith(each)) for each in MAY_CHANGE_ON_RESUME)


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """What either says where they are not equal, by key; None where a key is not of its algorithm."""
    of_one, of_other = (dict(_leaves(config.model_dump(mode="json"))) for config in (one, other))
    both = {key: (of_one.get(key), of_other.get(key)) for key in sorted(of_one.keys() | of_other.keys())}
    return {key: (mine, theirs) for key, (mine, theirs) in both.items() if mine != theirs}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML takes 3e-4 for a string. A key that is there twice is an error, not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()  # as they are written, before `<<` merges what may be overridden
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# JSON, which validates, has no dates: 2024-01-01 is a string here.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


_FOR_EVAL = "{0!r} is an evaluation recipe, and trains nothing: dgpo-fast eval RUN_DIR --recipe {0}"


def _read_recipe(name_or_path: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    is_file = name_or_path.endswith((".yaml", ".yml"))
    path = Path(name_or_path) if is_file else RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = recipe_names()
        hint = "" if is_file else f"{suggest(name_or_path, known)} recipes: {', '.join(known)}"
        evaluates = (EVALUATION_RECIPES / path.name).is_file() and not is_file
        raise UserError(_FOR_EVAL.format(name_or_path) if evaluates else f"no recipe {name_or_path!r}{hint}")
    if name_or_path in extended_by:
        raise UserError(f"recipes extend each other in a circle: {' -> '.join((*extended_by, name_or_path))}")
    data = read_recipe_file(path)
    if data.get("kind") == "evaluation":
        raise UserError(_FOR_EVAL.format(name_or_path))
    data.setdefault("name", path.stem)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if is_file and str(parent).endswith((".yaml", ".yml")):
        parent = path.parent / parent
    return _merge(_read_recipe(str(parent), (*extended_by, name_or_path)), data)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        if both and key == "algorithm" and "name" in value:  # another method has other settings
            both = value["name"] == merged[key].get("name", DGPOConfig().name)
        merged[key] = _merge(merged[key], value) if both else value
        if both and key == "model" and _names_another(base[key], value):
            merged[key]["commit"] = value.get("commit")
    return merged


def _names_another(model: dict[str, Any], changes: dict[str, Any]) -> bool:
    """Whether changes of the section `model` name other weights: what a run has noted as its commit is not theirs."""
    defaults = ModelConfig()
    return any(
        key in changes and changes[key] != model.get(key, getattr(defaults, key)) for key in ("name", "revision")
    )


def _apply(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """All overrides in their order, once those are that name a method or a model: other settings depend on them."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    for first in ("algorithm.name", "model.name", "model.revision"):
        if keys.count(first) == 1 and first.partition(".")[0] not in keys:
            apply_override(data, overrides[keys.index(first)])
    for override in overrides:
        apply_override(data, override)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one value of plain data, as `a.b=value` says.

    Raises:
        UserError: it says something else, or what is no section has the value in it.
    """
    key, equals, text = override.partition("=")
    *sections, last = _path(key.strip())
    if not equals or not last:
        raise UserError(f"--set takes key=value, such as optimizer.lr=1e-4, got {override!r}")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override}: {section!r} is a value, not a section")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a YAML value") from None
    if [*sections, last] == ["algorithm", "name"] and value != data.get("name", DGPOConfig().name):
        data.clear()  # another method has other settings
    if sections == ["model"] and _names_another(data, {last: value}):
        data.pop("commit", None)
    data[last] = value


REMOVED = {
    "rewards.on_failure": ", of an earlier version: rewards.max_failed_share=0 ends a run at the first failure, as "
    "stop did, and a larger share leaves such samples out, as skip did",
    "algorithm.diffusion_dpo.trunc": ", of an earlier version, which diffusion_dpo made no use of: leave it out",
}
"""Keys of earlier versions, behind `algorithm` with the method's name, and what to write instead."""


def _path(key: str) -> list[str]:
    """The parts of a key. The name of a reward of one's own has dots, and a colon, which no key has."""
    of_reward = re.fullmatch(r"(rewards)\.(running|arguments)\.(.+?)(?:\.([^.:]*))?", key)
    return [part for part in of_reward.groups() if part is not None] if of_reward else key.split(".")


def _explain(error: ValidationError, model: type[Config]) -> str:
    """The first thing wrong with data that is no `model`, in one line."""
    errors = error.errors(include_url=False)
    # A mistyped key comes behind the one that is then missing, and says more.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    # Of an error in `algorithm` the second part is the method's name, which is no key.
    location = [str(part) for part in first["loc"]]
    key = ".".join(part for place, part in enumerate(location) if not _is_method(location, place))
    if first["type"] == "union_tag_invalid":
        given = str(first["ctx"]["tag"])
        names = ", ".join(map(repr, ALGORITHM_NAMES))
        return f"algorithm.name: input should be one of {names}, got {given!r}{suggest(given, ALGORITHM_NAMES)}"
    if first["type"] == "extra_forbidden":
        *sections, name = location
        return f"unknown key {key!r}{REMOVED.get('.'.join(location)) or suggest(name, _keys_of(sections, model))}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    if first["type"] == "missing":
        return f"{key} is required"
    return f"{key}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def _is_method(location: Sequence[str], place: int) -> bool:
    """Whether a part of a location is the name of the package's method whose settings the following are of."""
    return place == 1 and location[0] == "algorithm" and location[1] in ALGORITHM_NAMES


def _keys_of(sections: Sequence[str], model: type[BaseModel]) -> list[str]:
    for place, section in enumerate(sections):
        if _is_method(sections, place):
            model = next(each for each in get_args(AlgorithmConfig) if each.model_fields["name"].default == section)
            continue
        if section not in model.model_fields:  # an item's number, or its name
            continue
        annotation = model.model_fields[section].annotation
        candidates = (annotation, *get_args(annotation))  # a section, or one that may be null, or some of one kind
        model = next(each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel))
    return list(model.model_fields)


def _leaves(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, data
