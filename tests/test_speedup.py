"""The speedup benchmark: what is measured of images, the queue of runs, and what the tables make of results."""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import asdict, replace
from math import inf, isnan
from pathlib import Path
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from dgpo_fast.records import Rollout
    from dgpo_fast.rewards import Scores

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    claim_history,
    judge_noise,
    speedup,
    speedup_costs,
    speedup_report,
    speedup_results,
    speedup_runs,
    speedup_tables,
    speedup_words,
)
from benchmarks.ablated_samplers import ablate  # noqa: E402
from benchmarks.held_out import diversity, held_out, patch_distance  # noqa: E402
from benchmarks.pages import filled  # noqa: E402
from benchmarks.speedup_costs import Cost, add_costs, against_known, kind_of, read_costs  # noqa: E402
from benchmarks.speedup_results import Point, Result, queue, read, write  # noqa: E402
from benchmarks.speedup_runs import ABLATIONS, EULER, METHODS, Run, every_kind, short  # noqa: E402
from benchmarks.speedup_tables import Row  # noqa: E402
from dgpo_fast import Trainer  # noqa: E402
from dgpo_fast.config import differences, load_recipe  # noqa: E402
from dgpo_fast.errors import UserError  # noqa: E402
from dgpo_fast.records import ScoredGroups  # noqa: E402
from dgpo_fast.shapes.captions import parse_caption  # noqa: E402
from dgpo_fast.shapes.render import render  # noqa: E402

PROMPTS = ["two red circles", "a blue square left of a green triangle"]


def rendered(seed: int, per_prompt: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    captions = [parse_caption(prompt) for prompt in PROMPTS for _ in range(per_prompt)]
    return torch.from_numpy(np.stack([render(caption, generator) for caption in captions]))


def point(seconds: float, strict: float, **more: Any) -> Point:
    iteration = more.pop("iteration", int(seconds))
    values = {
        "seconds": seconds, "core_s": 1.5 * seconds, "wall_s": 2 * seconds, "step": iteration, "iteration": iteration,
        "images": 128 * iteration, "flops": 1e9 * iteration, "reward": 0.5, "strict": strict, "soft": strict,
        "distance": 0.01, "diversity": 0.2,
    }  # fmt: skip
    return Point(**{**values, **more})


def result(method: str, *points: Point) -> Result:
    return Result(run=Run(method=method, setting=("optimizer.lr=1e-3",), seed=0, budget_s=100.0), points=points)


def pretend(directory: Path, run: Run, *strict: float) -> None:
    """Writes a result of these scores, evenly over its budget."""
    between_s = run.budget_s / (len(strict) - 1)
    points = [point(number * between_s, score) for number, score in enumerate(strict)]
    write(directory / f"{run.name}.csv", points, {"commit": "abc"})


# What is measured of images


def test_rendered_images_are_right_and_near_each_other() -> None:
    images, others = rendered(1, 8), rendered(2, 8)
    found = held_out(images, PROMPTS, per_prompt=8)
    assert found.strict == found.soft == 1.0
    noisy = (others + 0.1 * torch.randn(others.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert patch_distance(images, images) == 0.0
    assert 3 * patch_distance(images, others) < patch_distance(images, noisy)


def test_the_distance_of_two_colours_is_that_of_their_projections() -> None:
    """Patches of one value each: a projected difference is the mean of |sum of a direction's values| times it."""
    low, high = torch.zeros(1, 3, 18, 18), torch.full((1, 3, 18, 18), 0.5)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3 * 81, 128, generator=generator)
    expected = 0.5 * (directions / directions.norm(dim=0)).sum(0).abs().mean()
    assert patch_distance(low, high) == pytest.approx(float(expected), rel=1e-5)


def test_diversity_is_the_mean_over_pairs_of_a_prompt() -> None:
    images = torch.zeros(2, 3, 3, 4, 4)
    images[0, 1], images[0, 2] = 0.3, 0.6  # distances 0.3, 0.6, 0.3; the other prompt's are 0
    assert diversity(images) == pytest.approx((0.4 + 0.0) / 2, rel=1e-5)


# The queue


RATES = {
    "dgpo": ("3e-3", "1e-3", "1e-2"), "flow-grpo": ("3e-3", "3e-4", "1e-2"), "flow-grpo-fast": ("1e-3", "3e-3", "2e-3"),
    "diffusion-nft": ("3e-4", "1e-3", "1e-4"), "awm": ("1e-3", "3e-4", "5e-4"),
    "diffusion-dpo": ("3e-4", "3e-3", "1e-4"),
}  # fmt: skip
"""By method the best of the first three learning rates, the second, and what is tried fourth."""


def test_the_fourth_learning_rate_lies_where_the_best_may_be(tmp_path: Path) -> None:
    """Beyond an end of those that were tried, or between the best two."""
    for run in queue(tmp_path).sweep:
        best, second, _ = RATES[run.method]
        rate = run.setting[0].partition("=")[2]
        pretend(tmp_path, run, 0.5, 0.9 if rate == best else 0.8 if rate == second else 0.7)
    added = queue(tmp_path).sweep[3 * len(METHODS) :]
    assert {run.method: run.setting for run in added} == {
        method: (f"optimizer.lr={fourth}",) for method, (_, _, fourth) in RATES.items()
    }


def test_methods_are_tuned_alike(tmp_path: Path) -> None:
    """Four learning rates, then four changes at the fastest, then three seeds that nothing was chosen by."""
    first = queue(tmp_path)
    assert len({run.name for run in first.runs}) == len(first.runs) == 3 * len(METHODS)
    assert [run.method for run in first.runs[: len(METHODS)]] == list(METHODS), "they take turns"
    for run in first.sweep:
        pretend(tmp_path, run, 0.5, 0.8 if run.setting == ("optimizer.lr=3e-3",) else 0.6)
    rates = queue(tmp_path)
    assert [run.setting for run in rates.sweep[len(first.sweep) :]] == [("optimizer.lr=1e-2",)] * len(METHODS)
    for run in rates.sweep[len(first.sweep) :]:
        pretend(tmp_path, run, 0.5, 0.6)
    second = queue(tmp_path)
    added = second.sweep[len(rates.sweep) :]
    assert second.finals == []
    assert sorted(run.method for run in added) == sorted([*METHODS] * 4)
    for name, method in METHODS.items():
        of_method = [run.setting for run in added if run.method == name]
        assert of_method == [("optimizer.lr=3e-3", *change.split()) for change in method.changes]
    for run in added:
        change = METHODS[run.method].changes.index(" ".join(run.setting[1:]))
        # The second is at 80 % and falls; the third gets there later, and stays; no other is there.
        pretend(tmp_path, run, 0.5, *{1: (0.9, 0.8, 0.6, 0.6), 2: (0.7, 0.9, 0.9, 0.9)}.get(change, (0.7,)))
    third = queue(tmp_path)
    for runs, change in ((third.finals, 1), (third.steady, 2)):
        assert {(run.method, " ".join(run.setting[1:])) for run in runs} == {
            (name, method.changes[change]) for name, method in METHODS.items()
        }
        assert sorted({run.seed for run in runs}) == [1, 2, 3]
        assert {run.budget_s for run in runs} == {2400.0}
    assert [run.ablation for run in third.runs[-len(third.ablations) :]] == [run.ablation for run in third.ablations]
    assert {run.setting for run in third.ablations} == {run.setting for run in third.finals if run.method == "dgpo"}


def test_a_setting_that_is_soonest_and_steadiest_runs_once(tmp_path: Path) -> None:
    for _ in range(3):
        for run in queue(tmp_path).sweep:
            pretend(tmp_path, run, 0.5, *((0.9, 0.9) if run.setting == ("optimizer.lr=3e-3",) else (0.6, 0.6)))
    found = queue(tmp_path)
    assert found.finals == found.steady and len(found.finals) == 3 * len(METHODS)
    assert len({run.name for run in found.runs}) == len(found.runs)


def test_ablations_change_one_thing_of_the_chosen_setting(tmp_path: Path) -> None:
    """They begin once DGPO's sweep is over, and leave out the beta that was chosen."""
    for _ in range(2):
        assert queue(tmp_path).ablations == []
        for run in queue(tmp_path).sweep:
            if run.method == "dgpo" and len(run.setting) == 1:
                pretend(tmp_path, run, 0.5, 0.6)
    assert queue(tmp_path).ablations == []
    for run in queue(tmp_path).sweep:
        if run.method == "dgpo" and len(run.setting) == 2:
            pretend(tmp_path, run, 0.5, 0.9 if "algorithm.beta=100" in run.setting else 0.7)
    found = queue(tmp_path).ablations
    assert sorted({run.ablation or "" for run in found}) == sorted(ABLATIONS.keys() - {"beta-100"})
    assert [run.seed for run in found if run.ablation == "sde"] == [1, 2, 3]
    assert len({run.name for run in found}) == len(found)
    chosen = load_recipe("tiny-dgpo", Run(method="dgpo", setting=found[0].setting, seed=1, budget_s=1.0).overrides)
    for run in found:
        assert (run.setting[-1], run.budget_s) == ("algorithm.beta=100", 600.0)
        differ = differences(chosen, load_recipe("tiny-dgpo", run.overrides)).keys() - {"seed"}
        changes = {change.partition("=")[0] for change in ABLATIONS[run.ablation or ""].changes}
        had = {"algorithm.beta", "algorithm.train_timesteps"} if run.ablation == "published" else set()
        assert differ == changes - had


def ablated(name: str) -> Run:
    return Run(method="dgpo", setting=(), seed=1, budget_s=1.0, ablation=name)


def drawn_after_an_iteration(trainer: Trainer) -> torch.Tensor:
    """The clean latents of the second iteration."""
    trainer.run_iteration()
    view, prompts = trainer.config.sampling_view(1), trainer._next_prompts()
    return trainer.algorithm.rollout(trainer.policy, view, prompts).x0_BCHW


def test_an_iteration_costs_what_the_fastest_round_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedup_costs, "_by_turns", lambda settings: {kind: [2.0, 1.0, 9.0] for kind in settings})
    (cost,) = speedup_costs.calibrate(every_kind()[:1])
    assert (cost.seconds, cost.median) == (1.0, 2.0)


@pytest.mark.parametrize(("seed", "noise"), [(0, 0), (1, 1), (3, 1)])
def test_final_runs_are_judged_by_another_noise(seed: int, noise: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge_of(given: int) -> Any:
        raise RuntimeError(f"noise {given}")

    monkeypatch.setattr(speedup, "judge_of", judge_of)
    with pytest.raises(RuntimeError, match=f"^noise {noise}$"):
        next(speedup.train(Run(method="dgpo", setting=("optimizer.lr=1e-3",), seed=seed, budget_s=5.0), 2.5))


def test_offline_samples_are_the_bases(tmp_path: Path, quick: tuple[str, ...]) -> None:
    """Also when the policy has learnt: those that a run of the same seed would draw without ever learning."""
    config = load_recipe("tiny-dgpo", [*quick, *EULER, "rollout.steps=3"])
    offline, policys, never = (Trainer(config, tmp_path / str(number)) for number in range(3))
    ablate(offline, ablated("offline"))
    never.learner.step = lambda *_, **__: {"grad_norm": 0.0, "lr": 0.0, "skipped_steps": 0}  # type: ignore[method-assign]
    assert torch.equal(found := drawn_after_an_iteration(offline), drawn_after_an_iteration(never))
    assert not torch.equal(found, drawn_after_an_iteration(policys))


def test_samples_of_the_sde_are_flow_grpos(tmp_path: Path, quick: tuple[str, ...]) -> None:
    """Of the same weights and streams, which the first group has in both; 0.7 is the noise level of its recipe."""
    common = [item for item in quick if not item.startswith("algorithm.")]
    common += [*EULER, "rollout.steps=3", "model.sampling=same", "optimizer.steps_per_iteration=1"]
    ours = Trainer(load_recipe("tiny-dgpo", [*common, "algorithm.trunc=2"]), tmp_path / "ours")
    flow_grpo = Trainer(load_recipe("tiny-flow-grpo", [*common, "algorithm.trained_steps=2"]), tmp_path / "theirs")
    ablate(ours, ablated("sde"))
    found, expected = (
        trainer.algorithm.rollout(trainer.policy, "policy", trainer._next_prompts()) for trainer in (ours, flow_grpo)
    )
    size = ours.config.groups.size
    torch.testing.assert_close(found.x0_BCHW[:size], expected.x0_BCHW[:size], rtol=0, atol=1e-5)


def test_ablated_groups(tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The best is compared with the worst; whose group is all alike teaches nothing."""
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick]), tmp_path)
    reward_B = torch.tensor([0.1, 0.9, 0.4, 0.5, 0.3, 0.3, 0.3, 0.3])
    scored = ScoredGroups(
        rollout=cast("Rollout", None), reward_B=reward_B, valid_B=reward_B > 0, num_valid=(8,), num_groups=(2,),
        num_advantaged=(0,), advantage_B=torch.zeros(8), group_size_G=torch.full((2,), 4.0),
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_score", lambda rollout, scores: (scored, {"reward_mean": 0.4}))
    ablate(trainer, ablated("pairs"))
    found, metrics = trainer._score(cast("Rollout", None), cast("Scores", None))
    expected = 2**0.5 * torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(found.advantage_B, expected)
    assert metrics == {"reward_mean": 0.4} and found.reward_B is reward_B


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_of_the_method_and_leave_groups_and_evaluation_alone(name: str) -> None:
    ours = load_recipe("tiny-dgpo", speedup_runs.COMMON)
    for run in [*speedup_runs.learning_rates(), *speedup_runs.changes({name: ("optimizer.lr=1e-3",)})]:
        if run.method == name:
            config = load_recipe(METHODS[name].recipe, run.overrides)
            differ = differences(ours, config)
            assert {key for key in differ if not key.startswith("algorithm.")} <= MAY_DIFFER
            assert (config.groups, config.rewards, config.adapter) == (ours.groups, ours.rewards, ours.adapter)
            assert (config.rollout.guidance, config.rollout.steps) == (ours.rollout.guidance, ours.rollout.steps)


MAY_DIFFER = {
    "name", "description", "algorithm",
    "model.sampling", "rollout.solver", "rollout.schedule", "rollout.switch_step", "rollout.images_per_forward",
    "advantages.std", "old_policy.max_decay", "old_policy.rate", "optimizer.lr", "optimizer.steps_per_iteration",
    "evaluation_ema.every", "evaluation_ema.warmup",
}  # fmt: skip
"""Besides the algorithm's own settings."""


@pytest.mark.parametrize("name", ["dgpo", "flow-grpo"])
def test_the_judged_average_looks_back_over_as_many_iterations(name: str) -> None:
    """However many optimizer steps these make: after each it keeps of itself what it keeps with one."""
    (run,) = (run for run in speedup_runs.learning_rates(["1e-3"]) if run.method == name)
    config = load_recipe(METHODS[name].recipe, run.overrides)
    average, steps = config.evaluation_ema, config.optimizer.steps_per_iteration
    applied = [step for step in range(100 * steps) if (step + 1) % average.every == 0]
    assert steps == (2 if name == "flow-grpo" else 1) and average.max_decay == 0.95
    assert [average.decay_at(step) for step in applied] == [
        pytest.approx(min(0.95, (1 + iteration) / (10 + iteration))) for iteration in range(100)
    ]


def test_the_queue_leaves_what_is_done_or_worked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, started = queue(tmp_path).runs, []

    def started_instead(command: list[str], **options: Any) -> None:
        started.append(command[4])
        pretend(tmp_path, next(run for run in runs if run.name == command[4]), 0.5, 0.6)

    monkeypatch.setattr(speedup.subprocess, "run", started_instead)
    pretend(tmp_path, runs[0], 0.5, 0.6)
    (tmp_path / f".{runs[1].name}.lock").write_text(str(os.getpid()))
    (tmp_path / f".{runs[2].name}.lock").write_text("999999999")  # of a process that is gone
    assert runs[1].method != runs[2].method
    speedup.work(tmp_path, most=1)
    assert started == [runs[2].name]
    speedup.work(tmp_path, most=2)
    assert started == [runs[2].name, runs[3].name, runs[4].name]
    assert [path.name for path in tmp_path.glob(".*.lock")] == [f".{runs[1].name}.lock"]


def test_a_run_that_fails_is_left_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = queue(tmp_path).runs

    def started_instead(command: list[str], **options: Any) -> None:
        if command[4] == runs[0].name:
            raise CalledProcessError(1, command)
        pretend(tmp_path, next(run for run in runs if run.name == command[4]), 0.5, 0.6)

    monkeypatch.setattr(speedup.subprocess, "run", started_instead)
    with pytest.raises(CalledProcessError):
        speedup.work(tmp_path, most=3)
    assert {path.stem for path in tmp_path.glob("*.csv")} == {runs[1].name, runs[2].name}


def price(directory: Path, run: Run, seconds: float) -> None:
    cost = Cost(kind=kind_of(run), seconds=seconds, median=seconds)
    add_costs(directory, [cost], {"commit": "abc"})


def test_results_of_a_gpu_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speedup_results.results_here() == speedup_results.RESULTS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert speedup_results.results_here().name == "speedup-nvidia-h100-80gb-hbm3"
    assert speedup.origin()["processor"] == "NVIDIA H100 80GB HBM3"


def test_a_run_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [point(0.0, 0.5), point(61.25, 0.75)]
    costs = list[float]()
    monkeypatch.setattr(speedup, "train", lambda run, cost_s: (costs.append(cost_s), iter(points))[1])
    run = queue(tmp_path).runs[0]
    price(tmp_path, run, 2.5)
    speedup.measure(run, tmp_path)
    assert read(tmp_path / f"{run.name}.csv") == points and costs == [2.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.csv", f"{run.name}.csv"]
    assert " ".join(run.overrides) in (tmp_path / f"{run.name}.csv").read_text()


def test_a_final_run_lasts_until_it_has_arrived_and_shown_what_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of Flow-GRPO's go on, so that later targets are known of it."""
    for method, seed, arrives, last in (
        ("dgpo", 0, 120, 2400), ("dgpo", 1, 120, 900), ("dgpo", 1, 1200, 1260), ("dgpo", 1, 3000, 2400),
        ("flow-grpo", 1, 120, 2400), ("flow-grpo", 3, 120, 900),
    ):  # fmt: skip
        curve = [(0, 0.5), *((second, 0.9 if second >= arrives else 0.6) for second in range(60, 2401, 60))]
        points = [point(*values) for values in curve]
        monkeypatch.setattr(speedup, "train", lambda run, cost_s, points=points: iter(points))
        run = Run(method=method, setting=(f"optimizer.lr={arrives}",), seed=seed, budget_s=2400.0)
        price(tmp_path, run, 2.5)
        speedup.measure(run, tmp_path)
        assert read(tmp_path / f"{run.name}.csv")[-1].seconds == last


def test_a_kind_of_run_is_what_decides_its_cost(tmp_path: Path) -> None:
    """Not its learning rate, beta or seed; but how often each image is trained on, and whether the old policy is asked.
    Of the ablations only that without a clip is a kind of its own; the published one trains at four noise levels."""
    kinds = {run.name: kind_of(run) for run in every_kind()}
    plain, *changed = (run for run in every_kind() if run.method == "dgpo" and run.ablation is None)
    assert kinds["dgpo__lr=1e-3_beta=3__seed0__600s"] == kinds[plain.name]
    assert kinds["dgpo__lr=1e-3_train_timesteps=2__seed0__600s"] != kinds[plain.name]
    for run in (plain, changed[0]):
        of_ablations = {each.ablation: kind_of(each) for each in speedup_runs.ablations(run.setting)}
        assert of_ablations.pop("no-clip").flops < kinds[run.name].flops
        assert of_ablations.pop("published") == kinds[plain.name]
        assert set(of_ablations.values()) == {kinds[run.name]}
    price(tmp_path, plain, 2.5)
    assert [(cost.kind, cost.seconds) for cost in read_costs(tmp_path).values()] == [(kind_of(plain), 2.5)]


def test_what_is_added_is_measured_on_the_clock_of_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is known of its method takes twice as long now, or twice and eight times, it would take half, or a
    quarter, of what it does; by other methods it is measured where nothing is known of its own."""
    kinds = {kind_of(run): run for run in reversed(every_kind())}.values()
    plain, added, another, *_ = (run for run in reversed(kinds) if run.method == "dgpo")
    other = next(run for run in kinds if run.method == "flow-grpo")
    now = {kind_of(run): seconds for run, seconds in ((plain, 4.0), (another, 16.0), (other, 6.0), (added, 10.0))}
    asked = list[Any]()

    def measured(runs: list[Run]) -> list[Cost]:
        asked[:] = runs
        return [Cost(kind=kind_of(run), seconds=now[kind_of(run)], median=5.0) for run in runs]

    def cost_of(added: Run, *known: Run) -> tuple[float, float]:
        costs = {kind_of(run): Cost(kind=kind_of(run), seconds=2.0, median=2.5) for run in known}
        (cost,) = against_known(costs, [*known, added])
        assert cost.kind == kind_of(added)
        return pytest.approx(cost.seconds), pytest.approx(cost.median)

    monkeypatch.setattr(speedup_costs, "calibrate", measured)
    assert cost_of(added, plain, other) == (5.0, 2.5)
    assert {run.name for run in asked} == {plain.name, added.name}
    assert cost_of(added, plain, another, other) == (2.5, 1.25)
    assert cost_of(added, other) == (10.0 / 3, 5.0 / 3)


def test_evaluations_are_dense_where_methods_are_fast() -> None:
    def times(seed: int, budget_s: float) -> list[float]:
        return list(speedup.evaluation_times(Run(method="dgpo", setting=(), seed=seed, budget_s=budget_s)))

    assert times(0, 600.0) == [30, 60, 90, 120, 150, 180, 240, 300, 360, 420, 480, 540, 600]
    assert times(0, 100.0)[-1] == 100
    final = times(1, 2400.0)
    assert final[:3] == [15, 30, 45] and {180, 600, 900, 960 + 60} <= {*final} and final[-1] == 2400
    assert {*times(0, 600.0)} < {*final}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations and evaluations of few images."""
    few = ("groups.per_iteration=2", "optimizer.images_per_micro_batch=16")
    monkeypatch.setattr(speedup_runs, "COMMON", (*speedup_runs.COMMON, *few))
    monkeypatch.setattr(speedup, "JUDGE", (*speedup.JUDGE, "evaluation.steps=4"))
    monkeypatch.setattr(speedup, "NUM_PROMPTS", 4)


@pytest.mark.usefixtures("small")
def test_a_run_trains() -> None:
    run = Run(method="dgpo", setting=("optimizer.lr=1e-3",), seed=0, budget_s=5.0)
    first, last = speedup.train(run, 2.5)
    assert (first.step, first.seconds) == (0, 0.0)
    assert last.step == last.iteration == 2 and last.seconds == 5.0
    assert last.core_s > 0
    assert last.flops > 0
    assert first.images == 0 and last.images == 2 * 2 * 8
    assert isnan(first.reward) and 0 <= last.reward <= 1.5


@pytest.mark.usefixtures("small")
def test_a_run_that_diverges_has_the_points_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    iterations = []

    def diverges(trainer: Trainer) -> Any:
        if len(iterations) == 2:
            trainer.learner.skipped_in_a_row = num_skipped
            raise UserError("three gradients were no numbers")
        iterations.append(trainer.step)
        return run_iteration(trainer)

    run_iteration = Trainer.run_iteration
    monkeypatch.setattr(Trainer, "run_iteration", diverges)
    run = Run(method="dgpo", setting=("optimizer.lr=1e-3",), seed=0, budget_s=600.0)
    num_skipped = 3
    assert [found.iteration for found in speedup.train(run, 30.0)] == [0, 1, 2]
    iterations.clear()
    num_skipped = 0
    with pytest.raises(UserError):
        list(speedup.train(run, 30.0))


# What tables make of results


def test_the_steadiest_setting_has_the_highest_mean_over_time() -> None:
    early = result("dgpo", point(0, 0.5), point(50, 0.9), point(100, 0.9))
    late = result("dgpo", point(0, 0.5), point(50, 0.5), point(100, 1.0))
    assert early.mean_strict == pytest.approx((0.7 + 0.9) / 2)
    assert late.mean_strict == pytest.approx((0.5 + 0.75) / 2)
    assert speedup_results.steadiest([late, early]) is early


def test_a_run_that_ended_stays_what_it_was() -> None:
    """Until its budget is spent: it never arrives, or it has, and its mean is over that time. One that was stopped once
    it had shown enough would have gone on: of what it had not reached nothing more is known."""
    run = Run(method="dgpo", setting=("optimizer.lr=1e-3",), seed=1, budget_s=2400.0)

    def over(*points: Point) -> Result:
        return speedup_results.finished(run, points)

    below, above = (over(point(0, 0.5), point(60, strict)) for strict in (0.7, 0.9))
    assert (below.arrival(0.8).bound, below.arrival(0.8).point.seconds) == (">", 2400.0)
    assert (above.arrival(0.8).bound, above.arrival(0.8).point.seconds) == ("<", 60.0)
    assert below.mean_strict == pytest.approx((60 * 0.6 + 2340 * 0.7) / 2400)
    begun = below.until(120.0)
    assert begun.points[-1].seconds == 120 and begun.mean_strict == pytest.approx((0.6 + 0.7) / 2)
    assert over(point(0, 0.5)).arrival(0.8).point.seconds == 2400.0
    enough = over(point(0, 0.5), point(60, 0.7), point(120, 0.82), point(840, 0.82), point(900, 0.82))
    assert (enough.arrival(0.85).bound, enough.arrival(0.85).point.seconds) == (">", 840.0)
    assert enough.points[-1].seconds == 900


def test_the_soonest_setting_is_first_at_the_target() -> None:
    """Whatever it does later; who is never there comes behind, by means over time."""
    falls = result("dgpo", point(0, 0.5), point(20, 0.6), point(40, 0.8), point(60, 0.8), point(80, 0.1))
    stays = result("dgpo", point(0, 0.5), point(20, 0.7), point(60, 0.8), point(80, 0.9))
    at_once = result("dgpo", point(0, 0.5), point(20, 0.8), point(60, 0.8))
    nearly, never = (result("dgpo", point(0, 0.5), point(100 * strict, strict)) for strict in (0.79, 0.6))
    assert speedup_results.by_arrival([never, nearly, stays, falls, at_once]) == [at_once, falls, stays, nearly, never]
    assert speedup_results.fastest([nearly, stays]) is stays


def test_one_evaluation_is_not_enough() -> None:
    """What the next one does not confirm is scatter."""
    scattered = result("dgpo", point(0, 0.5), point(20, 0.81), point(40, 0.79), point(60, 0.82), point(80, 0.8))
    found = scattered.arrival(0.8)
    assert found.is_reached and found.bound == ""
    assert found.point.seconds == pytest.approx(40 + 20 * (0.80 - 0.79) / (0.82 - 0.79))
    assert not result("dgpo", point(0, 0.5), point(20, 0.81)).arrival(0.8).is_reached


def test_a_target_is_reached_on_the_line_to_the_evaluation_that_shows_it() -> None:
    """All that is measured is of that moment."""
    run = result(
        "dgpo", point(0, 0.6, distance=0.03), point(40, 0.7, distance=0.02), point(60, 0.9, distance=0.01),
        point(80, 0.8, distance=0.5),
    )  # fmt: skip
    found = run.arrival(0.8).point
    assert (found.seconds, found.strict, found.iteration) == (pytest.approx(50), 0.8, pytest.approx(50))
    assert found.distance == pytest.approx(0.015)
    begun = run.arrival(0.6)
    assert begun.point.seconds == 0 and begun.bound == ""


def test_what_is_reached_before_anything_was_evaluated_is_sooner_than_is_known() -> None:
    at_once, later = (
        result("dgpo", point(0, 0.5), *between, point(60, 0.8), point(80, 0.8)) for between in ([], [point(50, 0.6)])
    )
    assert speedup_tables.way_to(0.8, [at_once], speedup_tables.seconds_of) == "< 60"
    assert speedup_tables.way_to(0.8, [later], speedup_tables.seconds_of) == "60"


def test_what_is_not_reached_is_longer_than_is_known() -> None:
    """That is up to the last evaluation that another could have confirmed. Medians and ranges count it so."""
    quick = result("dgpo", point(0, 0.5), point(20, 0.5), point(40, 0.8), point(60, 0.8))
    slow = result("dgpo", point(0, 0.5), point(20, 0.5), point(90, 0.8), point(100, 0.8))
    never = result("dgpo", point(0, 0.5), point(95, 0.7), point(100, 0.85))

    def way(*of_seeds: Result) -> str:
        return speedup_tables.way_to(0.8, of_seeds, speedup_tables.seconds_of)

    assert way(quick) == "40"
    assert way(quick, never, slow) == "90 (40 to > 95)"
    assert way(never, never, slow) == "> 95 (90 to > 95)"
    assert way(never, quick) == "40 (40 to > 95)"
    assert not never.arrival(0.8).is_reached
    assert not quick.arrival(inf).is_reached


def test_factors_multiply_to_the_time() -> None:
    """Also where the target lies within an iteration: after 7.5 of ours and 11.5 of theirs."""

    def at(seconds: float, strict: float, iteration: int, of_each: float) -> Point:
        return point(seconds, strict, iteration=iteration, flops=of_each * iteration)

    ours = result(
        "dgpo", point(0, 0.5), at(10, 0.7, 5, 1e9), at(20, 0.9, 10, 1e9), at(40, 0.8, 20, 1e9)
    )  # fmt: skip
    theirs = result("awm", point(0, 0.5), at(42, 0.7, 7, 2e9), at(96, 0.9, 16, 2e9), at(102, 0.8, 17, 2e9))
    rows = [Row("DGPO", [ours]), Row("AWM", [theirs])]
    table = speedup_tables.table_of_factors(rows, 0.8, known={}, again={})
    time, iterations, work, engine = (float(cell) for cell in table.splitlines()[-1].split("|")[2:6])
    assert (time, iterations, work, engine) == (4.6, 1.5, 2.0, 1.5)
    assert 11.5 / 7.5 * work * engine == pytest.approx(time)


def test_a_factor_of_a_run_that_was_stopped_is_a_bound() -> None:
    """So is one of a run that was there before anybody looked; two bounds may say nothing."""
    reached = [point(0, 0.5), point(10, 0.5), point(20, 0.8), point(40, 0.8)]
    stopped = [point(0, 0.5), point(100, 0.7), point(120, 0.7)]
    at_once = [point(0, 0.5), point(10, 0.8), point(40, 0.8)]

    def row(ours: list[Point], theirs: list[Point]) -> str:
        rows = [Row("DGPO", [result("dgpo", *ours)]), Row("AWM", [result("awm", *theirs)])]
        return speedup_tables.table_of_factors(rows, 0.8, known={}, again={}).splitlines()[-1]

    assert row(reached, stopped) == "| AWM | > 5.0 | > 5.0 | 1.00 | 1.00 | ? | > 5.0 |"
    assert row(stopped, reached) == "| AWM | < 0.2 | < 0.2 | 1.00 | 1.00 | ? | < 0.2 |"
    assert row(stopped, stopped) == "| AWM | ? | ? | 1.00 | 1.00 | ? | ? |"
    assert row(reached, reached) == "| AWM | 1.0 | 1.0 | 1.00 | 1.00 | ? | 1.0 |"
    assert row(at_once, reached) == "| AWM | > 2.0 | > 2.0 | 1.00 | 1.00 | ? | > 2.0 |"
    assert row(reached, at_once) == "| AWM | < 0.5 | < 0.5 | 1.00 | 1.00 | ? | < 0.5 |"
    assert row(at_once, stopped) == "| AWM | > 10.0 | > 10.0 | 1.00 | 1.00 | ? | > 10.0 |"
    assert row(at_once, at_once) == "| AWM | ? | ? | 1.00 | 1.00 | ? | ? |"


def test_the_time_by_costs_that_were_measured_again() -> None:
    ours, theirs = (
        result(name, point(0, 0.5), point(10, 0.5), point(seconds, 0.8), point(2 * seconds, 0.8))
        for name, seconds in (("dgpo", 20), ("awm", 100))
    )

    def of(*costs: float) -> dict[speedup_costs.Kind, Cost]:
        kinds = [kind_of(each.run) for each in (ours, theirs)]
        return {kind: Cost(kind=kind, seconds=cost, median=cost) for kind, cost in zip(kinds, costs, strict=True)}

    rows = [Row("DGPO", [ours]), Row("AWM", [theirs])]
    row = speedup_tables.table_of_factors(rows, 0.8, known=of(2.0, 3.0), again=of(4.0, 3.0)).splitlines()[-1]
    assert row == "| AWM | 5.0 | 5.0 | 1.00 | 1.00 | 2.5 | 5.0 |"


def test_the_beginning_of_a_run_is_a_shorter_run() -> None:
    """Its last evaluation may come an iteration after the budget."""
    whole = result("dgpo", point(0, 0.5), point(604, 0.8), point(720, 0.9))
    begun = whole.until(600.0)
    assert (begun.points, begun.run.budget_s) == ((point(0, 0.5), point(604, 0.8)), 100.0)
    longer = Result(run=replace(whole.run, budget_s=2400.0), points=whole.points)
    assert longer.until(600.0).run.budget_s == 600.0


def test_what_is_kept_is_shown_of_both_settings() -> None:
    """Over the same beginning, whoever's run was longer."""
    fast = Run(method="dgpo", setting=("optimizer.lr=3e-3",), seed=1, budget_s=2400.0)
    falls = Result(run=fast, points=[point(0, 0.5), point(450, 0.9), point(900, 0.9), point(1020, 0.2)])
    steady = Result(
        run=replace(fast, setting=("optimizer.lr=1e-3",)), points=[point(0, 0.5), point(450, 0.7), point(900, 0.8)]
    )
    found = speedup_tables.table_of_what_is_kept({"dgpo": [falls]}, {"dgpo": [steady]}).splitlines()[2:]
    assert found == [
        "| DGPO | `lr=3e-3` | 1 | 80.0% | 90.0% | 90.0% | 0.0100 | 0.200 |",
        "| DGPO | `lr=1e-3` | 1 | 67.5% | 80.0% | 80.0% | 0.0100 | 0.200 |",
    ]
    three, swept = [falls] * 3, replace(falls, run=replace(fast, seed=0))
    *_, row = speedup_tables.table_of_what_is_kept({"dgpo": three}, {"dgpo": [swept]}).splitlines()
    assert row.startswith("| DGPO | `lr=3e-3` | 3 |"), "its final runs, where those of the steadiest are to come"
    *_, row = speedup_tables.table_of_what_is_kept({"dgpo": [swept]}, {"dgpo": [swept]}).splitlines()
    assert row.startswith("| DGPO | `lr=3e-3` | 1, of the sweep |")
    assert len(speedup_tables.table_of_what_is_kept({"dgpo": [falls]}, {"dgpo": [falls]}).splitlines()) == 3


def test_ablations_are_shown_by_mean_and_range() -> None:
    seeds = [result("dgpo", point(0, 0.5), point(100, end)) for end in (0.7, 0.9)]
    row = speedup_tables.table_of_ablations({"as chosen": seeds, "to come": []}).splitlines()[2:]
    shown = "| as chosen | 2 | > 0 | 65.0% (60.0% to 70.0%) | 80.0% (70.0% to 90.0%) | "
    assert row == [f"{shown}0.01000 (0.01000 to 0.01000) | 0.2000 (0.2000 to 0.2000) |"]


def test_methods_are_compared_by_as_many_runs_of_each(tmp_path: Path) -> None:
    """What one of them has been tried with besides is not shown before the others have caught up."""
    rates = speedup_runs.learning_rates()
    of_rate = {rate: [run for run in rates if run.setting == (f"optimizer.lr={rate}",)] for rate in ("1e-3", "3e-3")}
    for run in of_rate["1e-3"]:
        pretend(tmp_path, run, 0.5, 0.6)
    first = speedup_report.tables(tmp_path)[speedup_report.PAGE]["kept"]
    assert first.count("60.0%") == 2 * len(METHODS)
    pretend(tmp_path, of_rate["3e-3"][0], 0.5, 0.9)
    assert speedup_report.tables(tmp_path)[speedup_report.PAGE]["kept"] == first
    for run in of_rate["3e-3"][1:]:
        pretend(tmp_path, run, 0.5, 0.7)
    assert "90.0%" in speedup_report.tables(tmp_path)[speedup_report.PAGE]["kept"]


def test_as_many_runs_are_shown_as_have_a_median() -> None:
    seeds = [result("dgpo", point(0, 0.5))] * 3
    for there, shown in ((0, 0), (1, 1), (2, 1), (3, 3)):
        alike = speedup_report._seeds({"dgpo": seeds[:there], "awm": seeds})
        assert {name: len(found) for name, found in alike.items()} == {"dgpo": shown, "awm": shown}


def test_quality_is_shown_of_those_that_are_known_at_the_target() -> None:
    reached = result("awm", point(0, 0.5), point(10, 0.5), point(90, 0.8, soft=0.75), point(100, 0.8))
    at_once = result("awm", point(0, 0.5), point(10, 0.8), point(40, 0.8))
    never = result("awm", point(0, 0.5), point(100, 0.7), point(120, 0.7))
    table = speedup_tables.table_of_quality([Row("AWM", [reached, at_once, never])], 0.8)
    assert table.splitlines()[3:] == ["| AWM | 1 of 3 | 0.750 | 0.01000 | 0.2000 |"]


def test_the_answer_has_a_row_of_each_method() -> None:
    """Where some of its runs arrive and others do not, it says of how many, and when, and is no factor."""
    points = {
        "quick": [point(0, 0.5), point(10, 0.5), point(20, 0.8), point(40, 0.8)],
        "slow": [point(0, 0.5), point(10, 0.5), point(90, 0.8), point(100, 0.8)],
        "never": [point(0, 0.5), point(100, 0.7), point(120, 0.7)],
    }

    def of(name: str, *curves: str, lr: str = "1e-3") -> list[Result]:
        run = Run(method=name, setting=(f"optimizer.lr={lr}",), seed=1, budget_s=2400.0)
        return [Result(run=run, points=points[curve]) for curve in curves]

    fast = {"dgpo": of("dgpo", "quick"), "awm": of("awm", "slow"), "flow-grpo": of("flow-grpo", "never", "slow")}
    steady = {**fast, "awm": of("awm", "quick", lr="3e-4"), "flow-grpo": of("flow-grpo", "never", lr="3e-4")}
    assert speedup_tables.table_of_answers(fast, steady, 0.8).splitlines()[2:] == [
        "| DGPO | 20 | 1 | the same |  | 80% |",
        "| AWM | 90 | 4.5 | 20 | 1.0 | 80% |",
        "| Flow-GRPO | 1 of 2 runs, after 90 |  | > 100 | > 5.0 | 70% |",
    ]


def test_times_are_of_medians_between_those_of_any_two_runs() -> None:
    def at(seconds: float) -> Result:
        return result("dgpo", point(0, 0.5), point(seconds / 2, 0.5), point(seconds, 0.8), point(2 * seconds, 0.8))

    ours, theirs = ([at(seconds) for seconds in of] for of in ((25, 20, 16), (100, 120, 80)))
    assert speedup_tables.times(theirs, ours, 0.8, speedup_tables.seconds_of) == "5.0 (3.2 to 7.5)"


def test_a_method_is_compared_at_both_settings() -> None:
    """What is no final run says so."""
    reached = result("dgpo", point(0, 0.5), point(10, 0.5), point(20, 0.8), point(40, 0.8))
    reached = replace(reached, run=replace(reached.run, seed=1))
    fast = replace(reached, run=replace(reached.run, method="awm"))
    other = replace(fast, run=replace(fast.run, setting=("optimizer.lr=3e-4",)))
    swept = replace(other, run=replace(other.run, seed=0))

    def titles(steady: Result) -> list[str]:
        both = ({"dgpo": [reached], "awm": [of_awm]} for of_awm in (fast, steady))
        return [row.title for row in speedup_tables.compared(*both)]

    assert titles(other) == ["DGPO", "AWM", "AWM at its steadiest setting"]
    assert titles(swept)[-1] == "AWM at its steadiest setting (of the sweep)"
    assert titles(fast) == ["DGPO", "AWM"]


def test_the_engines_share_multiplies_what_a_method_takes() -> None:
    """The median of rounds in which both took their turns, whatever slowed one round down."""
    ours = result("dgpo", point(0, 0.5), point(10, 0.5), point(20, 0.8), point(40, 0.8))
    theirs = result("awm", point(0, 0.5), point(10, 0.5), point(50, 0.8), point(100, 0.8))
    measured = {
        "dgpo": {"eager": [3.0, 6.0, 3.0], "fused": [2.0, 4.0, 1.0]},
        "awm": {"eager": [4.0, 8.0, 8.0], "fused": [2.0, 4.0, 8.0]},
    }
    rows = [Row("DGPO", [ours]), Row("AWM", [theirs]), Row("AWM at its steadiest setting", [theirs])]
    assert speedup_tables.table_of_engine(rows, 0.8, measured).splitlines()[2:] == [
        "| DGPO | 3.00 | 2.00 | 1.50 | 1.5 |", "| AWM | 8.00 | 4.00 | 2.00 | 5.0 |",
    ]  # fmt: skip
    assert len(speedup_tables.table_of_engine(rows, 0.8, {}).splitlines()) == 2


def test_engines_are_written_and_read(tmp_path: Path) -> None:
    costs = [
        speedup_costs.EngineCost("dgpo", engine, number, seconds)
        for engine, found in (("eager", (2.0, 3.0)), ("fused", (1.0, 1.5)))
        for number, seconds in enumerate(found)
    ]
    assert speedup_costs.read_engines(tmp_path) == {}
    speedup_costs.write_engines(tmp_path, costs, {"commit": "abc"})
    assert speedup_costs.read_engines(tmp_path) == {"dgpo": {"eager": [2.0, 3.0], "fused": [1.0, 1.5]}}


@pytest.mark.parametrize("name", METHODS)
def test_both_engines_run_the_same_iteration(name: str) -> None:
    """But for the precision of samples, which diffusers' code draws in that of training."""
    recipe = METHODS[name].recipe
    fused, eager = (load_recipe(recipe, speedup_costs.ENGINES[engine]) for engine in ("fused", "eager"))
    assert {*differences(fused, eager)} <= {"model.engine", "model.sampling"}
    assert (fused.model.engine, eager.model.engine) == ("fused", "eager")


@pytest.fixture
def two_methods() -> list[Row]:
    """DGPO after 20 s, Flow-GRPO after 90, of twice the FLOPs an iteration."""
    ours = result("dgpo", point(0, 0.5), point(10, 0.5), point(20, 0.8), point(40, 0.8))
    theirs = [point(0, 0.5), point(10, 0.5), point(90, 0.8), point(100, 0.8)]
    theirs = [replace(each, flops=2 * each.flops) for each in theirs]
    return [Row("DGPO", [ours]), Row("Flow-GRPO", [result("flow-grpo", *theirs)])]


def test_the_headline_is_of_the_runs(two_methods: list[Row]) -> None:
    said = "**On the embedded model DGPO reaches 80% exact images in 20 s of one core, Flow-GRPO in 90 s: 4.5 times as "
    said += "long, for 9.0 times the FLOPs. To 75% the latter takes 4.2 times as long.**"
    assert speedup_words.headline(two_methods, 0.8) == said
    assert speedup_words.headline(two_methods[:1], 0.8) == "To come."


def test_the_product_is_of_its_factors(two_methods: list[Row]) -> None:
    measured = {
        "dgpo": {"eager": [3.0, 3.0, 6.0], "fused": [2.0, 2.0, 2.0]},
        "flow-grpo": {"eager": [9.0, 12.0, 18.0], "fused": [6.0, 6.0, 6.0]},
    }
    said = speedup_words.product(two_methods, 0.8, measured)
    assert "**4.5 = 4.5 (iterations) x 2.00 (FLOPs of an iteration) x 0.50 (seconds of a FLOP)**" in said
    assert "the last is 1.50" in said, "the median of 3, 4 and 3 times, for twice the FLOPs"
    assert "takes 2.00 times as long" in said and "makes **9.0** beside" in said
    assert speedup_words.product(two_methods, 0.8, {}) == "To come."


def test_sentences_of_the_page(two_methods: list[Row]) -> None:
    assert "4.5 at 80%" in speedup_words.lead_by_target(two_methods)
    (flow_grpo,) = two_methods[1].of_seeds
    seeds = [replace(flow_grpo, run=replace(flow_grpo.run, seed=seed)) for seed in (1, 2, 3)]
    said = speedup_words.plateau([two_methods[0], Row("Flow-GRPO", seeds)])
    assert said.startswith("2 of Flow-GRPO's runs took all of their 2 minutes. They peak at 80% (80% to 80%), end")
    assert speedup_words.clock(two_methods, 0.8).endswith("DGPO 30, Flow-GRPO 135, 4.5 times as long.")
    half = [result("dgpo", point(0, 0.5), point(10, 0.5), point(45, 0.8), point(60, 0.85))]
    never = [result("dgpo", point(0, 0.5), point(50, 0.7), point(60, 0.7))]
    said = speedup_words.constants(two_methods, {"beta-100": half, "published": never}, 0.8)
    assert "DGPO takes 45 s, and Flow-GRPO 2.0 times as long" in said and "takes > 50 s, Flow-GRPO 90: no lead" in said
    assert speedup_words.constants(two_methods, {"beta-100": half, "published": []}, 0.8) == "To come."
    ends = {"awm": [result("awm", point(0, 0.5), point(9, end)) for end in (0.7, 0.9)], "dgpo": half}
    assert speedup_words.kept(ends).endswith("setting: DGPO at 85%, AWM at 80% (70% to 90%).")
    said = speedup_words.load(half, never, [])
    assert "by +50% to +50% in final runs, +50% to +50% in the sweep, to come in the ablations" in said


def test_the_claim_is_kept_by_day() -> None:
    """What a day ends with replaces what it said before; a day that says nothing new has no row."""

    def said(day: str, *theirs: float) -> list[claim_history.Claim]:
        def at(method: str, seconds: float) -> Result:
            curve = point(0, 0.5), point(10, 0.5), point(seconds, 0.8), point(2 * seconds, 0.8 if seconds < 90 else 0.7)
            return result(method, *curve)

        rows = [Row("DGPO", [at("dgpo", 20)]), Row("AWM", [at("awm", seconds) for seconds in theirs])]
        return claim_history.claims(rows, 0.8, date=day, commit="abc")

    first = said("2026-11-28", 90)
    assert [claim.says for claim in first] == [("DGPO", "1", "20", "1"), ("AWM", "0 of 1", "> 90", "> 4.5")]
    history = claim_history.added(first, said("2026-11-29", 90))
    assert history == first
    history = claim_history.added(history, said("2026-11-30", 80))
    history = claim_history.added(history, said("2026-11-30", 50, 60, 70))
    assert [(claim.date, claim.times) for claim in history if claim.title == "AWM"] == [
        ("2026-11-28", "> 4.5"), ("2026-11-30", "3.0 (2.5 to 3.5)"),
    ]  # fmt: skip
    assert claim_history.picture(history).count("<circle") == 3  # a bound is no point


def test_what_an_evaluation_scatters_by(tmp_path: Path) -> None:
    found = [judge_noise.Judged(1, 0.8, 0.03), judge_noise.Judged(2, 0.9, 0.05)]
    said = judge_noise.sentence(found)
    assert (
        "at 85.0% with a standard deviation of 7.1 points (80.0% to 90.0%; " in said and "would be 4.0 points" in said
    )
    assert judge_noise.read(tmp_path) == []


def test_settings_keep_their_names() -> None:
    """Also those whose value has a dot; no two runs share one."""
    runs = every_kind()
    assert len({run.name for run in runs}) == len(runs)
    assert any("kl_coef=0.1__" in run.name for run in runs)
    assert short("algorithm.beta=0.1") == "beta=0.1"


def test_every_result_is_of_the_settings_that_its_name_stands_for() -> None:
    for run in queue(speedup_results.RESULTS).runs:
        path = speedup_results.RESULTS / f"{run.name}.csv"
        if path.exists():
            with path.open(encoding="utf-8") as file:
                assert {row["overrides"] for row in csv.DictReader(file)} == {" ".join(run.overrides)}, run.name


def test_the_fields_of_a_point_are_read_as_they_are() -> None:
    assert list(speedup_results.NAMES) == [*asdict(point(0, 0))]


def test_the_page_is_made_of_the_committed_results() -> None:
    """python -m benchmarks.speedup_report --write"""
    for path, tables in speedup_report.tables().items():
        page = path.read_text(encoding="utf-8")
        assert filled(page, tables) == page
    for against, picture in speedup_report.pictures().items():
        assert (speedup_report.DOCS / f"speedup-{against}.svg").read_text(encoding="utf-8") == picture
    history = claim_history.read()
    said = speedup_report.claims(speedup_results.RESULTS, date="", commit="")
    assert [claim.says for claim in claim_history.newest(history)] == [claim.says for claim in said]
    assert claim_history.PICTURE.read_text(encoding="utf-8") == claim_history.picture(history)
