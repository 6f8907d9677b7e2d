"""Full fine-tuning on one rank: what a run of it learns, saves, shows and exports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import list_checkpoints, load_checkpoint
from dgpo_fast.cli import main
from dgpo_fast.config import Config, change_config
from dgpo_fast.errors import UserError
from dgpo_fast.evaluate import evaluate_run
from dgpo_fast.export import export_run
from dgpo_fast.metrics import read_evaluations
from dgpo_fast.models.full import FullPolicy
from dgpo_fast.models.sources import EMBEDDED
from dgpo_fast.models.training import load_policy, train_policy
from dgpo_fast.parallel.world import ALONE
from dgpo_fast.profiling import Category, watched_by
from dgpo_fast.records import Conditioning

SETTINGS = (
    "adapter=null", "model.engine=eager", "steps=3", "optimizer.lr=1e-4", "evaluation.every=0", "model.resolution=48",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(quick: tuple[str, ...]) -> Config:
    return load_recipe("tiny-dgpo", [*quick, *SETTINGS])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    out = tmp_path_factory.mktemp("full") / "run"
    Trainer(config, out).train()
    return out


@pytest.fixture(scope="module")
def ema(run: Path) -> dict[str, Tensor]:
    return load_checkpoint(list_checkpoints(run)[-1]).tensors("ema")


def inputs(policy: FullPolicy) -> tuple[Tensor, Tensor, Conditioning]:
    x_BCHW = torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    return x_BCHW, torch.tensor([900.0, 300.0]), policy.model.encode(["a red circle", "two blue squares"])


def test_every_view_has_weights_of_its_own(config: Config) -> None:
    """All begin as the base; each sees its own change, and the replica shows whichever is asked for last."""
    policy = load_policy(config, ALONE)
    assert isinstance(policy, FullPolicy)
    engine = train_policy(policy, config, ALONE)
    given = inputs(policy)

    def velocities() -> dict[str, Tensor]:
        views = ("ema", "policy", "old", "ref", "ema")
        return {view: policy.velocity(view, *given)[0].detach() for view in views}  # type: ignore[arg-type]

    base = velocities()["ref"]
    assert all(torch.equal(velocity, base) for velocity in velocities().values())
    with torch.no_grad():
        for piece in engine.masters().pieces:
            piece.values.mul_(1.01)
    engine.refresh(0)
    moved = velocities()
    assert not torch.equal(moved["policy"], base)
    assert all(torch.equal(moved[view], base) for view in ("old", "ema", "ref"))
    policy.average_into("old", decay=0.0)
    policy.average_into("ema", decay=0.5)
    averaged = velocities()
    assert torch.equal(averaged["old"], moved["policy"])
    assert not torch.equal(averaged["ema"], base)
    assert not torch.equal(averaged["ema"], moved["policy"])
    assert torch.equal(averaged["ref"], base)


def test_a_profiler_sees_the_blocks_of_every_view(config: Config) -> None:
    policy = load_policy(config, ALONE)
    assert isinstance(policy, FullPolicy)
    train_policy(policy, config, ALONE)
    given, seen = inputs(policy), list[str]()

    @contextmanager
    def watch(name: str, category: Category) -> Iterator[None]:
        seen.extend([name] * (category == "block"))
        yield

    with watched_by(watch), torch.no_grad():
        for view in ("policy", "old", "ref"):
            policy.velocity(view, *given)  # type: ignore[arg-type]
    assert seen == 3 * ["block dual", "block dual", "block joint", "block last"]


def test_the_old_policy_lends_its_weights_and_has_them_back(config: Config) -> None:
    policy = load_policy(config, ALONE)
    assert isinstance(policy, FullPolicy)
    engine = train_policy(policy, config, ALONE)
    with torch.no_grad():
        for piece in engine.masters().pieces:
            piece.values.mul_(1.01)
    engine.refresh(0)
    given = inputs(policy)
    old, new = (policy.velocity(view, *given)[0].detach() for view in ("old", "policy"))
    with policy.equal_weights("policy", "old"):
        assert torch.equal(policy.velocity("old", *given)[0], new)
    assert torch.equal(policy.velocity("old", *given)[0], old)


def test_the_gradient_is_that_of_autograd(config: Config) -> None:
    policy = load_policy(config, ALONE)
    assert isinstance(policy, FullPolicy)
    given = inputs(policy)
    policy.model.transformer.requires_grad_(True)
    parameters = dict(policy.trained.named_parameters())
    loss = policy.velocity("policy", *given)[0].square().mean()
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    engine = train_policy(policy, config, ALONE)
    engine.backward(policy.velocity("policy", *given)[0].square().mean())
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient), name


def test_what_is_evaluated_is_what_was_saved(run: Path) -> None:
    last = read_evaluations(run)[-1]
    again = evaluate_run(run).as_json()
    assert again["base"] == last["base"]
    assert again["tuned"] == last["tuned"]
    assert last["tuned"] != last["base"]


def test_a_table_of_positions_that_is_not_the_usual_one_is_saved_too(tmp_path: Path, config: Config) -> None:
    """A model may come with another than diffusers computes; a run goes on from such a checkpoint."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    table = weights["pos_embed.pos_embed"] = weights["pos_embed.pos_embed"].flip(1).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    out = tmp_path / "run"
    shifted = change_config(config, {"model": {"name": str(tmp_path / "model")}, "steps": 1}, source="test")
    Trainer(shifted, out).train()
    checkpoint = list_checkpoints(out)[-1]
    loaded = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
    assert torch.equal(loaded.state_dict()["pos_embed.pos_embed"], table)
    saved = load_checkpoint(checkpoint)
    assert saved.tensors("ema").keys() == dict(loaded.named_parameters()).keys()
    Trainer(change_config(shifted, {"steps": 2}, source="test"), out, resume=True).train()
    assert math.isfinite(evaluate_run(out).as_json()["tuned"]["soft"])


def test_what_only_evaluates_has_the_base_once(config: Config) -> None:
    policy = load_policy(config, ALONE, is_trained=False)
    assert isinstance(policy, FullPolicy)
    assert policy._errors_module("ref") is policy.trained
    assert policy._replica.transformer is not policy.trained


def test_an_exported_pipeline_is_diffusers_own(run: Path, ema: dict[str, Tensor], tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(export_run(run, tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    saved = dict(pipeline.transformer.named_parameters())
    assert saved.keys() == ema.keys()
    assert all(torch.equal(parameter, ema[name]) for name, parameter in saved.items())
    image = pipeline("a red circle", height=48, width=48, num_inference_steps=2, output_type="pt").images[0]
    assert image.shape == (3, 48, 48)


def test_exported_adapters_are_the_checkpoints(straight_run: Path, tmp_path: Path) -> None:
    out = export_run(straight_run, tmp_path / "lora", step=3)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    lora = straight_run / "checkpoints" / "step-000003" / "lora"
    beside = {"README.md": files["README.md"], "dgpo-fast.yaml": (straight_run / "config.yaml").read_bytes()}
    assert files == {path.name: path.read_bytes() for path in lora.iterdir()} | beside


def test_an_export_overwrites_nothing(run: Path, straight_run: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        export_run(straight_run, tmp_path)
    with pytest.raises(UserError, match=r"--step 2: .* has checkpoints of steps 3"):
        export_run(run, tmp_path / "new", step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_the_command_prints_where(straight_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["export", str(straight_run), "--out", str(tmp_path / "lora")])
    assert not exit_info.value.code
    assert capsys.readouterr().out.strip() == str(tmp_path / "lora")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "model.engine=fused",
            "adapter: null trains every weight, which model.engine fused cannot: use compile or eager",
        ),
        ("parallel.offload_optimizer=cpu", "parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3, got 0"),
        ("parallel.offload_weights=cpu", "parallel.offload_weights needs parallel.zero_stage 3, got 0"),
        ("parallel.rollout=gathered", "parallel.rollout gathered needs parallel.zero_stage 3, got 0"),
        ("parallel.frozen=sharded", "parallel.frozen sharded needs parallel.zero_stage 3, got 0"),
        ("parallel.deepspeed={a: 1}", "parallel.deepspeed needs parallel.zero_stage 1, 2 or 3"),
    ],
)
def test_what_does_not_go_together(quick: tuple[str, ...], change: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("tiny-dgpo", [*quick, *SETTINGS, change])


@pytest.mark.parametrize("change", ["parallel.rollout=gathered", "parallel.frozen=sharded"])
def test_no_graph_gathers_layers(quick: tuple[str, ...], change: str) -> None:
    sharded = [*quick, *SETTINGS, "parallel.zero_stage=3", "rollout.cuda_graphs=true"]
    assert load_recipe("tiny-dgpo", sharded).rollout.cuda_graphs
    with pytest.raises(UserError, match="a graph gathers no layers"):
        load_recipe("tiny-dgpo", [*sharded, change])


@pytest.mark.parametrize("change", ["rollout=gathered", "frozen=sharded", "offload_weights=cpu"])
def test_adapters_stay_whole(quick: tuple[str, ...], change: str) -> None:
    with pytest.raises(UserError, match=f"parallel.{change.replace('=', ' ')} is for full fine-tuning"):
        load_recipe("tiny-dgpo", [*quick, "parallel.zero_stage=3", f"parallel.{change}"])


def test_what_a_run_keeps_of_it(run: Path) -> None:
    directory = list_checkpoints(run)[-1]
    manifest = json.loads((directory / "manifest.json").read_text())
    kinds = {f"state/{kind}.safetensors" for kind in ("policy", "old", "exp_avg", "exp_avg_sq")}
    transformer = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    assert manifest.keys() == kinds | transformer | {"state/state.json"}
