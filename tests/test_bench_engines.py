"""The comparison of whole engines: the published loop does the same work, what is wrong gets no number, tables say all.

Times themselves are not looked at: they are the machine's.
"""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo_fast import rng
from dgpo_fast.algorithms.dgpo import DGPO
from dgpo_fast.config import load_recipe
from dgpo_fast.flow.rollout import sample_latents
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.records import PromptBatch, Rollout, ScoredGroups

ROOT = Path(__file__).resolve().parents[1]
HISTORY = ROOT / "benchmarks" / "results" / "history.csv"
SMALL = (
    "groups.size=2", "groups.per_iteration=2", "optimizer.images_per_micro_batch=4", "rollout.images_per_forward=4",
    "rollout.steps=3", "algorithm.trunc=2", "algorithm.train_timesteps=1", "adapter.rank=4", "adapter.alpha=8",
)  # fmt: skip
FIXED = ("steps=1", "model.prompt_cache=false", "device=cpu")


@pytest.fixture(autouse=True)
def from_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/ is no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Any]:
    """`bench(**changes)`: the script on the embedded pipeline, in small."""
    from benchmarks.bench_engines import Bench

    def make(**changes: Any) -> Any:
        given = {"model": "embedded", "device": "cpu", "out": tmp_path / "out", "seconds": 1, "only": ()}
        return Bench(**{**given, "changes": SMALL, **changes})

    return make


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def published_and_ours(*changes: str) -> tuple[Any, AdapterPolicy, DGPO]:
    """A published loop and a policy whose adapters are the same and not zero."""
    from benchmarks.engine_variants import _write
    from benchmarks.published import PublishedLoop

    config = load_recipe("tiny-dgpo", [*SMALL, *FIXED, "rollout.timesteps=integer", *changes])
    loop = PublishedLoop(config, device=torch.device("cpu"))
    policy = AdapterPolicy(load_model(config.model, device="cpu"), config.adapter, seed=0)
    generator = torch.Generator().manual_seed(0)
    weights = {view: 0.02 * torch.randn(len(policy.trainable), generator=generator) for view in ("policy", "old")}
    for view, flat in weights.items():
        policy.set_weights(view, flat)  # type: ignore[arg-type]
    _write(loop.adapters, weights["old"])
    loop.old.step(0.0)
    _write(loop.adapters, weights["policy"])
    return loop, policy, DGPO(config)


def test_the_published_loop_draws_the_same_images() -> None:
    loop, policy, algorithm = published_and_ours("rollout.guidance=3")
    conditioning, unconditional = policy.model.encode(["a red square", "two blue circles"]), policy.model.encode([""])
    torch.manual_seed(0)
    x0_BCHW = loop.sample(conditioning)
    torch.manual_seed(0)
    noise_BCHW = torch.randn(2, *policy.model.latent_shape)
    ours_BCHW = sample_latents(
        policy, "policy", algorithm.groups.sampler, noise_BCHW, conditioning, unconditional, images_per_forward=2
    )
    torch.testing.assert_close(x0_BCHW, ours_BCHW, rtol=1e-4, atol=1e-4)
    images_BCHW = policy.model.decode(ours_BCHW, images_per_forward=2)
    torch.testing.assert_close(loop._decode(x0_BCHW), images_BCHW, rtol=0, atol=1e-3)


@pytest.mark.parametrize("changes", [(), ("algorithm.clip=1e-6", "algorithm.kl_cfg=1"), ("algorithm.reference=old",)])
def test_the_published_loop_learns_the_same(changes: tuple[str, ...]) -> None:
    from benchmarks.published import MicroBatch

    loop, policy, algorithm = published_and_ours(*changes)
    conditioning = policy.model.encode(["a red square", "two blue circles"])
    prompts = PromptBatch(
        iteration=0, samples=(0, 1, 2, 3), group_size=2, prompts=("", ""), conditioning=conditioning,
        unconditional=policy.model.encode([""]),
    )  # fmt: skip
    x0_BCHW = torch.randn(4, *policy.model.latent_shape, generator=torch.Generator().manual_seed(1))
    advantage_B = torch.tensor([1.0, -0.5, -2.0, 1.5])
    scored = ScoredGroups(
        rollout=Rollout(prompts=prompts, x0_BCHW=x0_BCHW),
        reward_B=advantage_B, valid_B=torch.ones(4, dtype=torch.bool), num_valid=(4,),
        num_advantaged=(4,), advantage_B=advantage_B,
        group_size_G=torch.tensor([2.0, 2.0]), num_groups=(2,),
    )  # fmt: skip
    ((batch,),) = algorithm.batches(scored)
    algorithm.loss(policy, batch, None).loss.backward()  # type: ignore[no-untyped-call]

    noise_GCHW = rng.normal(batch.streams_N4, policy.model.latent_shape)
    before = [parameter.detach().clone() for parameter in loop.parameters]
    loop.micro_step(
        MicroBatch(
            x0_MCHW=x0_BCHW, noise_MCHW=noise_GCHW[prompts.group_B], timestep=float(batch.timestep_M[0]),
            conditioning=conditioning[prompts.group_B], advantage_M=advantage_B, group_M=prompts.group_B,
        )
    )  # fmt: skip
    published = torch.cat([parameter.grad.flatten() for parameter in loop.adapters])
    ours = policy.trainable.grad
    assert ours is not None and ours.norm() > 0
    assert (published - ours).norm() < 1e-4 * ours.norm()
    assert all(torch.equal(*pair) for pair in zip(before, loop.parameters, strict=True)), "old weights stayed behind"


@pytest.mark.parametrize("name", ["published", "fused"])
def test_what_is_resident_is_what_learns_and_what_it_learns_from(name: str, tmp_path: Path) -> None:
    """The transformer, and what Adam keeps of each value that it steps."""
    from benchmarks.engine_variants import SPECS, Engine, Published

    variant = SPECS[name].build("tiny-dgpo", [*SMALL, *FIXED], torch.device("cpu"), tmp_path)
    variant.iteration()
    found = {tensor.data_ptr() for tensor in variant.resident()}
    assert {parameter.data_ptr() for parameter in variant.transformer.parameters()} <= found
    if isinstance(variant, Engine):
        kept = [held for of_kind in variant.trainer.learner.engine.moments().values() for held in of_kind.pieces[:1]]
        assert {piece.values.data_ptr() for piece in kept} <= found and len(kept) == 2
    else:
        assert isinstance(variant, Published)
        states = variant.loop.optimizer.state.values()
        assert {state[moment].data_ptr() for state in states for moment in ("exp_avg", "exp_avg_sq")} <= found


def test_a_small_run_fills_its_tables(bench: Callable[..., Any], tmp_path: Path) -> None:
    assert bench().run() == 0
    out = tmp_path / "out"
    rows = read(out / "engines.csv")
    variants = {"published", "eager", "fused", "fused + bfloat16"}
    found = {(row["variant"], row["work"]) for row in rows}
    assert found == {(name, work) for name in variants for work in ("rollout", "micro_step", "iteration")} | {
        ("matmul", "1024^3")
    }
    for row in rows:
        assert float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert all(row[column] for column in ("device", "torch", "diffusers", "commit", "date"))
        if row["variant"] != "matmul":
            assert row["peak_memory_gb"] == "not measured"
            expected = float(row["images"]) / float(row["median_ms"]) * 1e3
            assert float(row["images_per_s"]) == pytest.approx(expected, rel=1e-2)
    assert all(float(row["speedup"]) == 1 for row in rows if row["variant"] == "published")

    stages = read(out / "engines_stages.csv")
    for name in variants:
        mine = [row for row in stages if row["variant"] == name]
        assert sum(float(row["share"]) for row in mine if row["stage"] != "background") == pytest.approx(1, abs=1e-2)
        assert {row["stage"] for row in mine if float(row["ms"]) > 0} >= {"text", "transformer", "backward"}
    assert {(row["variant"], row["work"]) for row in read(out / "engines_kernels.csv")} == {
        (name, work) for name in variants for work in ("rollout", "micro_step")
    }
    attentions = {row["attention"]: row for row in read(out / "engines_attention.csv")}
    assert attentions["cudnn"]["forward_ms"].startswith("not measured: runs on cuda")
    assert float(attentions["cpu"]["backward_ms"]) > 0

    from benchmarks.engine_chart import draw

    picture = ElementTree.fromstring(draw(rows, stages))
    texts = {element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert variants <= texts


def test_the_readme_has_the_measured_numbers() -> None:
    results = ROOT / "benchmarks" / "results" / "cpu-2-cores-2026-11-23" / "engines.csv"
    rows = {row["variant"]: row for row in read(results) if (row["model"], row["work"]) == ("embedded", "iteration")}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("> ", "").split())
    fused, low = (float(rows[name]["speedup"]) for name in ("fused", "fused + bfloat16"))
    assert f"1 / {fused:.2f} of the time of our rewrite of the published loop, 1 / {low:.2f} with" in readme
    on_xeon = [row for row in read(HISTORY) if "Xeon" in row["device"] and row["model"] == "embedded"]
    newest = {row["variant"]: float(row["speedup"]) for row in on_xeon if row["work"] == "iteration"}
    assert f"of an Intel Xeon 1 / {newest['fused']:.2f} and 1 / {newest['fused + bfloat16']:.2f} (" in readme
    ours, published = (float(rows[name]["median_ms"]) / 1000 for name in ("fused + bfloat16", "published"))
    assert (
        f"takes {ours:.1f} s with samples drawn in bfloat16" in readme and f"takes {published:.1f} (`python" in readme
    )


def test_what_is_wrong_gets_no_number(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from benchmarks.engine_variants import Answer, Engine

    answer = Engine.answer
    monkeypatch.setattr(
        Engine, "answer", lambda self, probe: Answer(1.00001 * answer(self, probe)[0], answer(self, probe)[1])
    )
    assert bench(only=("fused",)).run() == 1
    assert "fused: WRONG, gets no number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    def fails(self: Any, probe: Any) -> Any:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(Engine, "answer", fails)
    assert bench(only=("fused",)).run() == 1
    assert "fused: FAILED: RuntimeError: no such kernel" in capsys.readouterr().err


def test_what_cannot_run_is_named_and_left_out(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dgpo_fast.models import engines

    monkeypatch.setattr(engines, "why_unsupported", lambda device, dtype: "does not run here")
    assert bench(only=("fused + fp8", "eager")).run(only_check=True) == 0
    said = capsys.readouterr().err
    assert "fused + fp8: left out: model.sampling: fp8 does not run here" in said
    assert "eager: correct" in said
