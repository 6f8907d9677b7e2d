"""Recipes: what they resolve to, and what a mistake in one is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.algorithm_config import AWMConfig, DGPOConfig, DiffusionDPOConfig, DiffusionNFTConfig, FlowGRPOConfig
from dgpo_fast.config import (
    Config,
    OptimizerConfig,
    check_ranks,
    differences,
    dump_config,
    load_recipe,
    parse_config,
    recipe_names,
    resume_conflicts,
)
from dgpo_fast.errors import UserError

MINIMAL = {"name": "test", "rewards": {"terms": [{"name": "shapes"}]}}

PUBLISHED = {
    # batch, G, guidance, beta, kl_coef, kl_cfg, clip, trunc, switch, std, reference: algorithm of the published recipes
    "geneval": (16, 16, 4.5, 100, 0.02, 1, 1e-2, 4, 500, "group", "base"),
    "ocr": (16, 16, 4.5, 100, 0.02, 1, 1e-2, 6, 200, "global", "base"),
    "pickscore": (12, 24, 4.5, 10, 0.001, 1, 5e-2, 6, 200, "global", "base"),
    "geneval-cfgfree": (16, 16, 1, 100, 0.02, 4.5, 1e-3, 4, 500, "group", "base"),
    "ocr-cfgfree": (16, 16, 1, 100, 0.02, 4.5, 1e-3, 6, 200, "global", "base"),
    "pickscore-cfgfree": (16, 16, 1, 100, 0.02, 4.5, 1e-3, 6, 200, "global", "base"),
    "geneval-cfgfree-emaref": (16, 16, 1, 2000, 0.001, 1, 1e-5, 4, 500, "group", "old"),
    "ocr-cfgfree-emaref": (16, 16, 1, 2000, 0.001, 1, 1e-5, 6, 200, "global", "old"),
    "pickscore-cfgfree-emaref": (16, 16, 1, 2000, 0.001, 1, 1e-5, 6, 200, "global", "old"),
}


BASELINES = {
    # steps, guidance, groups, LoRA rank and alpha, micro-batch, steps of an iteration, evaluation EMA, settings
    "flow-grpo": (10, 4.5, (24, 48), (32, 64), 9, 2, (0.9, 8), FlowGRPOConfig(
        noise_level=0.7, clip=1e-4, kl_coef=0.04, trained_steps=9, window=None)),
    "flow-grpo-fast": (10, 1, (24, 48), (32, 64), 9, 2, (0.9, 8), FlowGRPOConfig(
        sde_type="cps", noise_level=0.8, clip=1e-5, kl_coef=0, trained_steps=5, window=3)),
    "nft": (10, 1, (24, 48), (32, 64), 9, 1, (0.9, 1), DiffusionNFTConfig(
        beta=1, kl_coef=1e-4, trunc=9, train_timesteps=9)),
    "awm": (14, 1, (24, 72), (32, 64), 6, 1, (0.99, 1), AWMConfig(
        first=1, trunc=11, train_timesteps=6, power=0.25, kl_coef=0.001, old_coef=1)),
    "dpo": (40, 4.5, (24, 8), (32, 64), 24, 1, (0.9, 8), DiffusionDPOConfig(
        beta=100, train_timesteps=39, refresh_every=40)),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_values(name: str) -> None:
    config = load_recipe(f"sd35m-{name}")
    optimizer, algorithm, rollout = config.optimizer, config.algorithm, config.rollout
    values = (
        optimizer.images_per_micro_batch, config.groups.size, rollout.guidance, algorithm.beta,
        algorithm.kl_coef, algorithm.kl_cfg, algorithm.clip, algorithm.trunc, rollout.switch_step,
        config.advantages.std, algorithm.reference,
    )  # fmt: skip
    assert values == PUBLISHED[name]
    assert (config.groups.per_iteration, rollout.steps, algorithm.train_timesteps) == (8, 10, 4)
    assert (rollout.solver, rollout.schedule, rollout.shift) == ("dpm++2m", "dpm", 3.0)
    assert (config.evaluation.steps, config.evaluation.every) == (10 if "cfgfree" in name else 14, 60)
    assert [term.name for term in config.rewards.terms] == [name.partition("-")[0]]
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.init) == (64, 128, "gaussian")
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.eps) == (3e-4, (0.9, 0.999), 1e-4, 1e-8)
    assert (optimizer.max_grad_norm, config.model.resolution, config.model.text_length) == (1.0, 512, 128)
    assert (config.model.name, config.model.dtype) == ("stabilityai/stable-diffusion-3.5-medium", "bfloat16")


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_the_published_values(name: str) -> None:
    config = load_recipe(f"sd35m-geneval-{name}")
    groups, rollout, optimizer = config.groups, config.rollout, config.optimizer
    assert config.adapter is not None
    values = (
        rollout.steps, rollout.guidance, (groups.size, groups.per_iteration),
        (config.adapter.rank, config.adapter.alpha), optimizer.images_per_micro_batch, optimizer.steps_per_iteration,
        (config.evaluation_ema.max_decay, config.evaluation_ema.every), config.algorithm,
    )  # fmt: skip
    assert values == BASELINES[name]
    assert config.description.startswith("Baseline: ")
    assert (optimizer.lr, optimizer.betas, config.model.resolution) == (3e-4, (0.9, 0.999), 512)
    assert config.model.drawn_with == "same"


def test_baselines_sample_and_average_as_published() -> None:
    configs = {name: load_recipe(f"sd35m-geneval-{name}") for name in BASELINES}
    for name in ("flow-grpo", "flow-grpo-fast"):
        rollout, optimizer = configs[name].rollout, configs[name].optimizer
        assert (rollout.solver, rollout.schedule) == ("euler", "flow_match")
        assert rollout.images_per_forward == optimizer.images_per_micro_batch, "or its ratio is not exactly 1"
    assert {config.evaluation.steps for config in configs.values()} == {40}
    advantages = {name: (config.advantages.std, config.advantages.clamp) for name, config in configs.items()}
    assert advantages == {**dict.fromkeys(BASELINES, ("global", 5.0)), "dpo": ("group", 5.0)}
    nft, awm = configs["nft"], configs["awm"]
    assert (nft.rollout.solver, nft.old_policy.max_decay, nft.old_policy.rate) == ("dpm++2m", 0.5, 0.001)
    switching = {name: load_recipe(f"sd35m-geneval-{name}", ["rollout.switch_step=500"]) for name in BASELINES}
    drawn = {name: {config.sampling_view(step) for step in (0, 499, 500, 999)} for name, config in switching.items()}
    assert drawn == {name: {"old" if name == "nft" else "policy"} for name in BASELINES}
    assert (awm.old_policy.max_decay, awm.old_policy.rate) == (0.3, 0.001)


LARGE = "stabilityai/stable-diffusion-3.5-large"


@pytest.mark.parametrize(
    ("changes", "commit"),
    [
        ([], "abc"),
        (["seed=1"], "abc"),
        (["model.name=stabilityai/stable-diffusion-3.5-medium"], "abc"),
        ([f"model.name={LARGE}"], None),
        (["model.revision=v2"], None),
        (["model.commit=def", f"model.name={LARGE}"], "def"),
    ],
)
def test_another_model_is_not_asked_for_the_commit_of_a_run(
    changes: list[str], commit: str | None, tmp_path: Path
) -> None:
    """Neither by an option, nor by a recipe that goes by that of the run."""
    (tmp_path / "config.yaml").write_text(dump_config(load_recipe("sd35m-geneval").at_commit("abc")))
    assert load_recipe(tmp_path / "config.yaml", changes).model.commit == commit
    model = dict(change.removeprefix("model.").split("=") for change in changes if change.startswith("model."))
    child = {"extends": str(tmp_path / "config.yaml"), "model": model}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    assert load_recipe(tmp_path / "child.yaml").model.commit == commit


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", BASELINES)
def test_baselines_divide_among_ranks(name: str, num_ranks: int) -> None:
    check_ranks(load_recipe(f"sd35m-geneval-{name}"), num_ranks)


def test_recipes_of_the_package_are_these() -> None:
    cards = [f"sd35m-geneval-{memory_gb}gb" for memory_gb in (24, 40, 80)]
    full = ["sd35m-geneval-full", "sd35l-geneval-full"]
    baselines = [f"sd35m-geneval-{name}" for name in BASELINES]
    tiny = [f"tiny-{name}" for name in ("dgpo", "flow-grpo", "flow-grpo-fast", "diffusion-nft", "awm", "diffusion-dpo")]
    assert recipe_names() == sorted([*(f"sd35m-{name}" for name in PUBLISHED), *cards, *full, *baselines, *tiny])


@pytest.mark.parametrize("memory_gb", [24, 40, 80])
def test_a_cards_recipe_trains_as_published(memory_gb: int) -> None:
    """It changes what is kept, and nothing that a number of the run depends on."""
    published, card = load_recipe("sd35m-geneval"), load_recipe(f"sd35m-geneval-{memory_gb}gb")
    assert differences(published, card).keys() <= {"name", "description", "device_memory_gb", "model.checkpointing"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_being_written_and_read(name: str, folder: Path) -> None:
    config = load_recipe(name)
    Path("config.yaml").write_text(dump_config(config))
    assert load_recipe("config.yaml") == config
    assert config.name == name
    assert config.description


@given(
    lr=st.floats(min_value=1e-300, max_value=1e300),
    seed=st.integers(0, 2**63 - 1),
    clip=st.none() | st.floats(min_value=1e-12, max_value=1),
    text=st.text(),
)
def test_values_survive_being_written_and_read(lr: float, seed: int, clip: float | None, text: str) -> None:
    changes = {"seed": seed, "description": text, "optimizer": {"lr": lr}, "algorithm": {"clip": clip}}
    config = parse_config(MINIMAL | changes, source="test")
    assert parse_config(yaml.safe_load(dump_config(config)), source="test") == config
    assert (config.optimizer.lr, config.seed, config.algorithm.clip, config.description) == (lr, seed, clip, text)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1e3", 1000.0), ("2.5E+1", 25.0), (".5e-2", 0.005), ("1", 1.0), ("-0e0", None)]
)
def test_floats_may_be_written_without_a_point(text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(UserError, match="greater than 0"):
            load_recipe("tiny-dgpo", [f"optimizer.lr={text}"])
    else:
        assert load_recipe("tiny-dgpo", [f"optimizer.lr={text}"]).optimizer.lr == value


def test_a_recipe_extends_another(folder: Path) -> None:
    Path("mine.yaml").write_text("extends: sd35m-ocr\nalgorithm:\n  beta: 7\n")
    Path("mine-too.yaml").write_text("extends: mine.yaml\nname: other\nalgorithm:\n  trunc: 5\n")
    parent, child = load_recipe("sd35m-ocr"), load_recipe("mine-too.yaml")
    assert load_recipe("mine.yaml").name == "mine"
    assert child.name == "other"
    assert (child.algorithm.beta, child.algorithm.trunc) == (7.0, 5)
    assert child.algorithm.kl_coef == parent.algorithm.kl_coef
    assert child.advantages == parent.advantages


def test_a_recipe_extends_the_file_beside_it(folder: Path) -> None:
    Path("mine").mkdir()
    Path("mine/parent.yaml").write_text("extends: tiny-dgpo\nalgorithm:\n  beta: 7\n")
    Path("mine/child.yaml").write_text("extends: parent.yaml\n")
    assert load_recipe("mine/child.yaml").algorithm.beta == 7


def test_another_method_takes_none_of_its_parents_settings(folder: Path) -> None:
    """A recipe that extends one of another method names its own, and the others' keys are unknown to it."""
    Path("mine.yaml").write_text("extends: sd35m-geneval\nalgorithm: {name: diffusion_nft, kl_coef: 0.5}\n")
    Path("mine-too.yaml").write_text(
        "extends: mine.yaml\nalgorithm: {name: diffusion_nft, trunc: 7, train_timesteps: 8}\n"
    )
    mine, child = load_recipe("mine.yaml").algorithm, load_recipe("mine-too.yaml").algorithm
    assert mine == DiffusionNFTConfig(kl_coef=0.5)
    assert child == DiffusionNFTConfig(kl_coef=0.5, trunc=7, train_timesteps=8)
    assert load_recipe("sd35m-geneval", ["groups.size=24", "optimizer.images_per_micro_batch=24"]).algorithm.beta == 100


def test_a_date_is_a_string() -> None:
    assert load_recipe("tiny-dgpo", ["description=2024-01-01"]).description == "2024-01-01"


def test_a_list_is_replaced_and_not_merged(folder: Path) -> None:
    Path("mine.yaml").write_text("extends: tiny-dgpo\nrewards:\n  terms:\n    - name: other\n")
    assert [term.name for term in load_recipe("mine.yaml").rewards.terms] == ["other"]


def test_recipes_that_extend_each_other_are_refused(folder: Path) -> None:
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe("a.yaml")


def test_overrides_apply_in_order_and_reach_new_sections(folder: Path) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump(MINIMAL))
    config = load_recipe("mine.yaml", ["optimizer.lr=1e-4", "algorithm.clip=null", "optimizer.lr=2e-4", "steps=3"])
    assert (config.optimizer.lr, config.algorithm.clip, config.steps) == (2e-4, None, 3)


# A user's mistakes: what a recipe says, and what its one line of refusal must say.
MISTAKES = {
    "optimizer: {learning_rate: 1}": "unknown key 'optimizer.learning_rate'",
    "optimizer: {lrr: 1}": "did you mean 'lr'",
    "optimiser: {lr: 1}": "unknown key 'optimiser'; did you mean 'optimizer'",
    "rewards: {terms: [{name: shapes, wieght: 1}]}": "unknown key 'rewards.terms.0.wieght'; did you mean 'weight'",
    "steps: many": "steps: input should be a valid integer, got 'many'",
    "steps: '3'": "steps: input should be a valid integer, got '3'",
    "steps: 1.5": "steps: input should be a valid integer, got 1.5",
    "steps: 0": "greater than or equal to 1, got 0",
    "seed: -1": "seed: input should be greater than or equal to 0, got -1",
    "optimizer: {lr: true}": "optimizer.lr: input should be a valid number, got True",
    "optimizer: {betas: [0.9]}": "optimizer.betas.1",
    "optimizer: 3e-4": "optimizer:",
    "logging: {tensorboard: yes please}": "logging.tensorboard: input should be a valid boolean",
    "rollout: {solver: heunn}": "rollout.solver: input should be 'euler'",
    "rollout: {guidance: 0.5}": "rollout.guidance: input should be greater than or equal to 1, got 0.5",
    "optimizer: {lr: .inf}": "optimizer.lr: input should be a finite number, got inf",
    "model: {engine: eager, sampling: fp8}": "model.sampling fp8 is of model.engine fused alone, got eager",
    "model: {engine: compile, sampling: merged}": "model.sampling merged is of model.engine fused alone, got compile",
    "algorithm: {name: diffusion_dpo, trunc: 9}": "unknown key 'algorithm.trunc', of an earlier version",
    "algorithm: {name: flow_grpo, trunc: 9}": "unknown key 'algorithm.trunc'",
    "parallel: {gradients: bfloat16}": "parallel.gradients must be float32 with parallel.zero_stage 0, got bfloat16",
    "parallel: {gradients: bfloat16, zero_stage: 1}": "parallel.gradients bfloat16 is for full fine-tuning",
    "model: {engine: eager, dtype: float32}\nadapter: null\nparallel: {gradients: bfloat16, zero_stage: 1}": "parallel."
    "gradients bfloat16 needs model.dtype bfloat16, got float32",
    "model: {resolution: 100}": "model.resolution: input should be a multiple of 8, got 100",
    "adapter: {targets: []}": "adapter.targets:",
    "rewards: {terms: []}": "rewards.terms:",
    "rewards: {}": "rewards.terms is required",
    "groups: {size: 1}": "groups.size: input should be greater than or equal to 2, got 1",
    "groups: {size: 8}\noptimizer: {images_per_micro_batch: 12}": "got 12; nearest that does: 8",
    "groups: {size: 7}": "the 56 images of an iteration (groups.size x groups.per_iteration), got 16; nearest that "
    "does: 14",
    "rollout: {steps: 4}": "algorithm.trunc must be below rollout.steps (4), got 4",
    "algorithm: {trunc: 2}": "algorithm.train_timesteps must be at most algorithm.trunc + 1 = 3, got 4",
    "algorithm: {name: grpo}": "algorithm.name: input should be one of 'dgpo', 'flow_grpo', 'diffusion_nft', 'awm', "
    "'diffusion_dpo', got 'grpo'; did you mean 'dgpo'",
    "algorithm: {name: awm, beta: 1}": "unknown key 'algorithm.beta'",
    "algorithm: {name: awm, powr: 1}": "unknown key 'algorithm.powr'; did you mean 'power'",
    "algorithm: {name: awm, power: 2}": "algorithm.power: input should be less than or equal to 1, got 2",
    "algorithm: {name: awm, trunc: 9}\noptimizer: {steps_per_iteration: 2}": "algorithm awm is on-policy: "
    "optimizer.steps_per_iteration must be 1, got 2",
    "algorithm: {name: awm, first: 3, trunc: 4, train_timesteps: 3}": "algorithm.train_timesteps must be at "
    "most algorithm.trunc - algorithm.first + 1 = 2, got 3",
    "algorithm: {name: flow_grpo, sde_type: cps, trained_steps: 10}": "algorithm.trained_steps must be at most "
    "rollout.steps - 1 (9) where algorithm.sde_type is cps, whose last step has no noise, got 10",
    "algorithm: {name: flow_grpo, trained_steps: 11}": "algorithm.trained_steps must be at most rollout.steps (10), "
    "got 11",
    "algorithm: {name: flow_grpo, trained_steps: 2, window: 3}": "algorithm.window must be at most "
    "algorithm.trained_steps (2), got 3",
    "algorithm: {name: flow_grpo}": "rollout.schedule must be flow_match, which begins at sigma = 1 exactly, got dpm",
    "algorithm: {name: flow_grpo}\nmodel: {dtype: float32}": "model.sampling same, got merged",
    "algorithm: {name: flow_grpo}\nmodel: {engine: eager}\nadapter: null\nparallel: {zero_stage: 3}": "algorithm "
    "flow_grpo draws with the weights that it trains: parallel.rollout gathered with parallel.zero_stage 3, got "
    "replica",
    "algorithm: {name: flow_grpo}\nrollout: {guidance_interval: [0, 0.5]}": "rollout.guidance_interval null",
    "algorithm: {name: flow_grpo}\nrollout: {cuda_graphs: true}": "rollout.cuda_graphs must be false",
    "algorithm: {name: flow_grpo}\nrollout: {schedule: flow_match}": "rollout.solver must be euler, which its steps "
    "are without their noise, got dpm++2m",
    "optimizer: {steps_per_iteration: 3}": "optimizer.steps_per_iteration must divide groups.per_iteration, 8, got 3",
    "groups: {size: 4, per_iteration: 4}\noptimizer: {steps_per_iteration: 2}": "must divide the 8 images of an "
    "optimizer step (groups.size x groups.per_iteration / optimizer.steps_per_iteration), got 16; nearest that does: 8",
    "optimizer: {steps_per_iteration: 2}\nsteps: 3": "steps must be a multiple of "
    "optimizer.steps_per_iteration, 2, got 3",
}
FILE_MISTAKES = {
    "just text": "a recipe is a mapping of sections, got str",
    "[1, 2]": "a recipe is a mapping of sections, got list",
    "": "a recipe is a mapping of sections, got NoneType",
    "steps: [1": "not YAML",
    "extends: sd35m-genevall": "no recipe 'sd35m-genevall'; did you mean 'sd35m-geneval'",
    "extends: nowhere.yaml": "no recipe 'nowhere.yaml'",
    "steps: 3": "rewards is required",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items())
def test_a_wrong_setting_is_one_line_that_names_it(text: str, message: str, folder: Path) -> None:
    assert message in refusal(yaml.safe_dump(MINIMAL | yaml.safe_load(text)))


def test_another_method_leaves_the_settings_of_the_recipes() -> None:
    """As a recipe does that extends another."""
    overrides = ["algorithm.name=diffusion_nft", "algorithm.beta=0.1"]
    for ordered in (overrides, overrides[::-1]):
        assert load_recipe("sd35m-geneval", ordered).algorithm == DiffusionNFTConfig(beta=0.1)
    both = load_recipe("sd35m-geneval", ["algorithm.name=awm", "algorithm.first=2", "algorithm.name=dgpo"])
    assert both.algorithm == DGPOConfig(), "the last counts"
    whole = load_recipe("sd35m-geneval", ["algorithm.beta=1", "algorithm={name: dgpo, beta: 5}"])
    assert whole.algorithm == DGPOConfig(beta=5)
    assert load_recipe("sd35m-geneval", ["algorithm.name=dgpo"]) == load_recipe("sd35m-geneval")


@pytest.mark.parametrize(("text", "message"), FILE_MISTAKES.items())
def test_a_wrong_file_is_one_line_that_names_it(text: str, message: str, folder: Path) -> None:
    assert message in refusal(text)


def refusal(recipe: str) -> str:
    Path("mine.yaml").write_text(recipe)
    with pytest.raises(UserError) as error:
        load_recipe("mine.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "--set takes key=value"),
        ("=3", "--set takes key=value"),
        ("steps.x=3", "'steps' is a value, not a section"),
        ("steps=[1", "is not a YAML value"),
        ("step=3", "unknown key 'step'; did you mean 'steps'"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number, got 'fast'"),
    ],
)
def test_a_mistake_in_an_override_is_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("tiny-dgpo", [override])
    assert message in str(error.value)


OWN = "my_package.rewards:Mine"


@pytest.mark.parametrize("override", [f"rewards.running.{OWN}.processes=3", f"rewards.running.{OWN}={{processes: 3}}"])
def test_the_name_of_a_reward_of_ones_own_may_stand_in_a_key(override: str) -> None:
    """For all its dots."""
    recipe = load_recipe("tiny-dgpo", [f"rewards.terms=[{{name: '{OWN}'}}]", override])
    assert {name: running.processes for name, running in recipe.rewards.running.items()} == {OWN: 3}


def test_monitors_are_rewards_besides() -> None:
    recipe = load_recipe("tiny-dgpo", ["rewards.monitors=[aesthetic]", "rewards.running.aesthetic.device=cpu"])
    assert (recipe.rewards.trained, recipe.rewards.names) == (["shapes"], ["shapes", "aesthetic"])
    with pytest.raises(UserError, match=r"rewards\.deqa\.deadline_s must be at most half of rewards\.timeout_s"):
        load_recipe("tiny-dgpo", ["rewards.monitors=[deqa]", "rewards.timeout_s=100"])
    for twice in ("[shapes]", "[aesthetic, aesthetic]"):
        with pytest.raises(UserError, match=r"rewards\.monitors: '\w+' is there twice, or a term"):
            load_recipe("tiny-dgpo", [f"rewards.monitors={twice}"])


@pytest.mark.parametrize("override", [f"rewards.arguments.{OWN}.side=left", f"rewards.arguments.{OWN}={{side: left}}"])
def test_a_reward_of_ones_own_has_arguments(override: str) -> None:
    recipe = load_recipe("tiny-dgpo", [f"rewards.terms=[{{name: '{OWN}'}}]", override])
    assert recipe.rewards.arguments == {OWN: {"side": "left"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.arguments.my_package.rewards:Mime.side=left", f"; did you mean '{OWN}'?"),
        (f"rewards.running.{OWN}.proceses=3", f"unknown key 'rewards.running.{OWN}.proceses'; did you mean 'processes"),
        (f"rewards.running.{OWN}.=3", "--set takes key=value"),
        ("rewards.running.=3", "--set takes key=value"),
        ("rewards.running.my_package.rewards:Mime.processes=3", f"; did you mean '{OWN}'?"),
    ],
)
def test_a_mistake_in_such_a_key_is_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("tiny-dgpo", [f"rewards.terms=[{{name: '{OWN}'}}]", override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'tiny-dgpo'.*sd35m-geneval"):
        load_recipe("tiny-dpgo")


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not YAML"):
        load_recipe("binary.yaml")


@pytest.mark.parametrize(
    "change",
    ["steps=9", "evaluation.every=7", "checkpoints.every=2", "checkpoints.keep_last=5", "logging.wandb=true",
     "logging.samples_every=3", "parallel.backend=gloo", "model.prompt_cache=false",
     "rewards.judge.url=http://elsewhere:8000/v1", "rewards.deqa.deadline_s=100"],
)  # fmt: skip
def test_a_resumed_run_may_differ_in(change: str) -> None:
    assert resume_conflicts(load_recipe("tiny-dgpo"), load_recipe("tiny-dgpo", [change])) == []


@pytest.mark.parametrize(
    ("change", "conflict"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("device=cpu", "device: 'auto' -> 'cpu'"),
        ("optimizer.lr=1.0", "optimizer.lr: 0.0003 -> 1.0"),
        ("algorithm.clip=null", "algorithm.clip: 0.01 -> None"),
        ("model.name=other", "model.name: 'embedded' -> 'other'"),
        ("evaluation.steps=3", "evaluation.steps: 14 -> 3"),
        ("rollout.steps=9", "rollout.steps: 10 -> 9"),
        ("rewards.arguments.shapes.side=left", "rewards.arguments.shapes.side: None -> 'left'"),
        ("rewards.judge.template=deqa", "rewards.judge.template: 'unifiedreward' -> 'deqa'"),
    ],
)
def test_a_resumed_run_must_not_differ_in(change: str, conflict: str) -> None:
    base = ["optimizer.lr=3e-4", "algorithm.clip=1e-2", "evaluation.steps=14", "rollout.steps=10"]
    assert resume_conflicts(load_recipe("tiny-dgpo", base), load_recipe("tiny-dgpo", [*base, change])) == [conflict]


@pytest.mark.parametrize("key", ["optimizer.images_per_micro_batch", "rollout.images_per_forward"])
def test_batches_may_change_on_resume_where_nothing_else_depends_on_them(key: str) -> None:
    """Flow-GRPO-Fast draws a window for each."""
    for recipe, number in (("sd35m-geneval", 0), ("sd35m-geneval-flow-grpo-fast", 1)):
        conflicts = resume_conflicts(load_recipe(recipe), load_recipe(recipe, [f"{key}=4"]))
        assert [conflict.partition(":")[0] for conflict in conflicts] == [key] * number


def test_prompts_may_come_from_elsewhere_once_a_checkpoint_knows_them() -> None:
    saved, wanted = load_recipe("tiny-dgpo"), load_recipe("tiny-dgpo", ["prompts.test=mine.txt"])
    assert resume_conflicts(saved, wanted) == []
    assert resume_conflicts(saved, wanted, has_begun=False) == ["prompts.test: 'shapes:test' -> 'mine.txt'"]


def test_every_conflict_is_named() -> None:
    saved, wanted = load_recipe("sd35m-ocr"), load_recipe("sd35m-ocr-cfgfree")
    assert [conflict.partition(":")[0] for conflict in resume_conflicts(saved, wanted)] == [
        "algorithm.clip", "algorithm.kl_cfg", "evaluation.steps", "rollout.guidance",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 2}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"decay_steps": 4}, [1, 0.75, 0.5, 0.25, 0.1, 0.1]),
        ({"warmup_steps": 1, "decay_steps": 2}, [0.5, 0.5, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_the_learning_rate_rises_and_falls(settings: dict[str, int], shares: list[float]) -> None:
    optimizer = OptimizerConfig(lr=0.5, **settings)  # type: ignore[arg-type]
    assert [optimizer.lr_at(step) for step in range(6)] == pytest.approx([0.5 * share for share in shares], rel=1e-12)


def test_a_configuration_cannot_be_changed() -> None:
    config = load_recipe("tiny-dgpo")
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lr: 1e-5}\nseed: 1\noptimizer: {weight_decay: 0}\n", "optimizer is there twice .*line 3"),
        ("optimizer:\n  lr: 1e-5\n  lr: 2e-5\n", "lr is there twice .*line 3"),
        ("name: !!set {a, b}\n", "type set is not JSON"),
        ("model: {attention: flsh}\n", "model.attention: input should be .*'flash', .*got 'flsh'"),
    ],
)
def test_a_recipe_that_says_a_thing_twice_or_strangely_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """Where the last of two sections counted, the settings of the first would be the defaults, without a word."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"recipe.yaml: .*{message}") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_may_merge_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("extends: tiny-dgpo\noptimizer: {lr: 1e-5, eps: 1e-7}\nseed: 3\n")
    plain = load_recipe(path)
    path.write_text("extends: tiny-dgpo\noptimizer: {<<: &own {lr: 2e-5, eps: 1e-7}, lr: 1e-5}\nseed: 3\n")
    assert load_recipe(path) == plain
