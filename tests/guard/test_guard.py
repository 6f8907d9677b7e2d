"""The guard over a run: it says a thing once, acts as it is told, goes on from its state; real runs played again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dgpo_fast.config import Config, dump_config, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.guard import Finding, Guard
from dgpo_fast.records import StepReport

RECORDED = Path(__file__).parent / "recorded"
SHORT = (
    "groups.per_iteration=8", "optimizer.decay_steps=null", "evaluation.num_prompts=16",
    "evaluation.images_per_prompt=4", "evaluation.every=10",
)  # fmt: skip

Report = Callable[..., StepReport]


def config(*overrides: str) -> Config:
    return load_recipe("tiny-dgpo", ["guard.window=3", *overrides])


def observe(guard: Guard, report: Report, steps: range, **changes: Any) -> list[Finding]:
    return [finding for step in steps for finding in guard.observe(report(step, **changes))]


def evaluate(guard: Guard, step: int, tuned: float) -> list[Finding]:
    base = {"soft": 0.8, "strict": 0.4}
    return guard.observe_evaluation(step, num_images=64, base=base, tuned={"soft": tuned, "strict": 0.4})


def test_a_finding_begins_once_and_again_after_a_window_without(report: Report) -> None:
    guard = Guard(config())
    assert observe(guard, report, range(1, 7)) == []
    (first,) = observe(guard, report, range(7, 20), clip_fraction=1.0)
    assert (first.step, first.name, first.since, first.action) == (9, "clip", 7, "warn")
    assert first.line == (
        "guard, step 9: 100% of the samples are clipped, so that they teach nothing, since step 7; what helps in a new "
        "run: optimizer.lr=0.001 (now 0.003), algorithm.clip=0.03 (now 0.01)"
    )
    assert observe(guard, report, range(20, 21)) == []
    assert observe(guard, report, range(21, 25), clip_fraction=1.0) == [], "one sound step in between"
    assert observe(guard, report, range(25, 29)) == []
    assert observe(guard, report, range(29, 32), clip_fraction=1.0)[0].since == 29, "last seen in step 24"


def test_the_first_window_is_not_judged(report: Report) -> None:
    guard = Guard(config())
    assert observe(guard, report, range(1, 4), clip_fraction=1.0) == []
    assert [finding.step for finding in observe(guard, report, range(4, 9), clip_fraction=1.0)] == [4]


def test_the_best_window_is_remembered(report: Report) -> None:
    """The reward rises, stays, and falls to what it was at first, long after."""
    guard = Guard(config())
    observe(guard, report, range(1, 4), reward_mean=0.5)
    assert observe(guard, report, range(4, 40), reward_mean=1.5) == []
    (found,) = observe(guard, report, range(40, 60), reward_mean=0.5)
    assert (found.name, found.what) == (
        "reward",
        "the reward fell to 0.5, from 1.5 in its best window, which ended with step 6",
    )


def test_values_that_are_not_finite_are_not_judged(report: Report) -> None:
    nothing = dict.fromkeys(("reward_mean", "diversity", "kl", "adapter_norm", "clip_fraction"), float("nan"))
    guard = Guard(config())
    observe(guard, report, range(1, 5))
    assert observe(guard, report, range(5, 20), **nothing) == []


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_one_missing_reading_in_the_first_window_blinds_no_rule(missing: int, report: Report) -> None:
    nothing = dict.fromkeys(("reward_mean", "diversity", "kl", "adapter_norm", "clip_fraction"), float("nan"))
    guard = Guard(config())
    for step in range(1, 11):
        assert guard.observe(report(step, **(nothing if step == missing else {}))) == []
    found = observe(guard, report, range(11, 20), clip_fraction=1.0, diversity=0.1, reward_mean=0.1, kl=9.0)
    assert {finding.name for finding in found} == {"clip", "diversity", "reward", "kl"}


def test_a_missing_reading_in_every_window_blinds_no_rule(report: Report) -> None:
    guard, findings = Guard(config("guard.window=5")), []
    for step in range(1, 60):
        fallen = float("nan") if step % 5 == 0 else 0.01
        findings += guard.observe(report(step, **({"diversity": fallen, "reward_mean": fallen} if step > 10 else {})))
    assert [finding.name for finding in findings] == ["diversity", "reward"]


def test_groups_that_were_left_out_are_none_without_spread(report: Report) -> None:
    """Of 16 groups 8 count, and none of these teaches; then all but 2 of 10."""
    for spread, is_found in ((0, True), (2, False)):
        guard = Guard(config("groups.per_iteration=16"))
        findings = observe(guard, report, range(1, 9), zero_std_groups=8 - spread, dropped_groups=8)
        assert [finding.name for finding in findings] == ["zero_std"] * is_found


@pytest.mark.parametrize(("before", "after"), [(5, 40), (40, 5)])
@pytest.mark.parametrize("saved_after", [3, 5, 39, 40, 60])
def test_the_first_window_is_what_it_was_when_it_was_whole(
    before: int, after: int, saved_after: int, report: Report
) -> None:
    """Later steps are not let in by a window that is longer on resume, and none is cut by one that is shorter."""
    guard = Guard(config(f"guard.window={before}"))
    observe(guard, report, range(1, saved_after + 1))
    resumed = Guard(config(f"guard.window={after}"))
    resumed.restore(json.loads(json.dumps(guard.state())))
    observe(resumed, report, range(saved_after + 1, 100))
    is_whole = saved_after >= before
    expected = before if is_whole else max(after, saved_after + 1)
    assert [reading.step for reading in resumed.state()["first"]] == [*range(1, expected + 1)]


def test_what_fell_is_found_with_a_longer_window_too(report: Report) -> None:
    """The beginning would else be a mixture of what was sound and what is not."""
    guard = Guard(config("guard.window=5"))
    observe(guard, report, range(1, 101))
    resumed = Guard(config("guard.window=40"))
    resumed.restore(json.loads(json.dumps(guard.state())))
    found = observe(resumed, report, range(101, 260), diversity=0.2)
    assert [finding.name for finding in found] == ["diversity"]
    assert "from 0.8 at the beginning" in found[0].what


def test_off_looks_at_nothing_and_later_knows_the_past(report: Report) -> None:
    off = Guard(config("guard.action=off"))
    assert observe(off, report, range(1, 9), clip_fraction=1.0) == [] and not off.stops
    assert evaluate(off, 8, 0.0) == []
    on = Guard(config())
    on.restore(json.loads(json.dumps(off.state())))
    assert [finding.name for finding in observe(on, report, range(9, 10), clip_fraction=1.0)] == ["clip"]


def test_off_is_a_word_in_yaml_too(tmp_path: Path) -> None:
    """YAML's off is false."""
    (tmp_path / "run.yaml").write_text("extends: tiny-dgpo\nguard:\n  action: off\n")
    off = load_recipe(tmp_path / "run.yaml")
    assert off.guard.action == "off"
    (tmp_path / "again.yaml").write_text(dump_config(off))
    assert load_recipe(tmp_path / "again.yaml") == off
    with pytest.raises(
        UserError, match=r"guard\.action: input should be 'warn', 'stop', 'lower_lr' or 'off', got True"
    ):
        load_recipe("tiny-dgpo", ["guard.action=on"])


def test_stop_holds_until_the_recipe_says_otherwise(report: Report) -> None:
    guard = Guard(config("guard.action=stop"))
    observe(guard, report, range(1, 7))
    assert not guard.stops
    observe(guard, report, range(7, 10), clip_fraction=1.0)
    assert guard.stops
    assert guard.way_on == "the guard found: clip; --resume --set guard.action=warn goes on"
    for action, stops in (("stop", True), ("warn", False)):
        resumed = Guard(config(f"guard.action={action}"))
        resumed.restore(json.loads(json.dumps(guard.state())))
        assert resumed.stops == stops


def test_lower_lr_halves_once_for_a_step_with_findings(report: Report) -> None:
    guard = Guard(config("guard.action=lower_lr"))
    observe(guard, report, range(1, 7))
    found = observe(guard, report, range(7, 20), clip_fraction=1.0, diversity=0.1)
    assert [(finding.name, finding.step, finding.action) for finding in found] == [
        ("diversity", 8, "lower_lr"), ("clip", 9, "lower_lr"),
    ]  # fmt: skip
    assert guard.lr_factor == 1 / 4
    observe(guard, report, range(20, 40))
    assert len(observe(guard, report, range(40, 43), clip_fraction=1.0, diversity=0.1)) == 2
    assert guard.lr_factor == 1 / 16


def test_an_evaluation_lowers_no_learning_rate(report: Report) -> None:
    """Its interval may change on resume, and no weight may depend on it."""
    guard = Guard(config("guard.action=lower_lr"))
    observe(guard, report, range(1, 7))
    (found,) = evaluate(guard, 6, 0.1)
    assert (found.name, found.action, guard.lr_factor) == ("below_base", "warn", 1.0)


def test_an_evaluation_is_judged_once(report: Report) -> None:
    """A resumed run gives those again that were made before; a finding ends with an evaluation that breaks no rule."""
    guard = Guard(config())
    assert evaluate(guard, 0, 0.8) == []
    observe(guard, report, range(1, 7))
    before = json.loads(json.dumps(guard.state()))
    (found,) = evaluate(guard, 6, 0.1)
    assert evaluate(guard, 6, 0.1) == evaluate(guard, 0, 0.1) == evaluate(guard, 9, 0.1) == []
    assert evaluate(guard, 12, 0.8) == []
    assert [finding.step for finding in evaluate(guard, 15, 0.1)] == [15]
    resumed = Guard(config())
    resumed.restore(before)
    assert evaluate(resumed, 0, 0.8) == [] and evaluate(resumed, 6, 0.1) == [found]


@pytest.mark.parametrize("saved_after", range(1, 31))
def test_a_restored_guard_decides_as_one_that_saw_it_all(saved_after: int, report: Report) -> None:
    """The state passes through JSON; the run falls apart in steps 12 to 16, recovers, and does so again."""

    def changes(step: int) -> dict[str, float]:
        share = 1 / 3 + step / 7
        is_bad = 12 <= step <= 16 or step >= 25
        return {"reward_mean": 0.1 * share if is_bad else share, "clip_fraction": 1.0 if is_bad else 0.1, "kl": share}

    straight, guard = Guard(config("guard.action=lower_lr")), Guard(config("guard.action=lower_lr"))
    expected, found = [], []
    for step in range(1, 31):
        expected += straight.observe(report(step, **changes(step)))
        found += guard.observe(report(step, **changes(step)))
        if step == saved_after:
            state = json.loads(json.dumps(guard.state()))
            guard = Guard(config("guard.action=lower_lr"))
            guard.restore(state)
    assert found == expected and len(expected) >= 3
    assert guard.state() == straight.state() and guard.lr_factor < 1


@pytest.mark.parametrize("num_groups", [4, 16])
def test_the_guard_is_quiet_where_there_is_nothing_but_noise(num_groups: int, report: Report) -> None:
    """As much as there can be: all images of a group alike, so that a step's reward varies by 0.4 / sqrt(groups)."""
    for seed in range(5):
        random = Random(seed)
        guard, findings = Guard(load_recipe("tiny-dgpo", [f"groups.per_iteration={num_groups}"])), []
        for step in range(1, 501):
            reward, kl = random.gauss(1.0, 0.4 / num_groups**0.5), abs(random.gauss(0.1, 0.05))
            diversity = random.gauss(0.8, 0.1)
            findings += guard.observe(report(step, reward_mean=reward, reward_std=0.4, kl=kl, diversity=diversity))
        assert findings == [], seed


def played_again(name: str, recipe: str, *overrides: str) -> list[Finding]:
    guard, findings = Guard(load_recipe(recipe, overrides)), []
    lines = [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]
    unseen = dict.fromkeys(StepReport.__dataclass_fields__, 0)
    for line in lines:
        if "tuned" in line:
            findings += guard.observe_evaluation(
                line["step"], num_images=line["num_images"], base=line["base"], tuned=line["tuned"]
            )
        else:
            findings += guard.observe(StepReport(**{**unseen, **line}))
    assert len(lines) > 30
    return findings


@pytest.mark.parametrize(
    ("name", "recipe", "overrides"),
    [
        ("tiny-dgpo", "tiny-dgpo", ()),
        ("tiny-dgpo-constant-lr", "tiny-dgpo", SHORT),
        ("tiny-flow-grpo", "tiny-flow-grpo", SHORT),
        ("tiny-diffusion-nft", "tiny-diffusion-nft", SHORT),
    ],
)
@pytest.mark.parametrize("window", [5, 10, 20])
def test_the_guard_is_quiet_on_runs_that_learnt(
    name: str, recipe: str, overrides: tuple[str, ...], window: int
) -> None:
    assert played_again(name, recipe, *overrides, f"guard.window={window}") == []


def test_the_guard_finds_the_run_that_collapsed() -> None:
    """At ten times the recipe's learning rate: the reward falls from step 4 on, from 1.13 to 0.01."""
    found = played_again("tiny-dgpo-lr-0.03", "tiny-dgpo", *SHORT, "optimizer.lr=0.03")
    assert [(finding.name, finding.step, finding.since) for finding in found] == [
        ("below_base", 10, 1), ("reward", 14, 5),
    ]  # fmt: skip
    assert found[1].advice[0] == "optimizer.lr=0.01 (now 0.03)"


def test_the_guard_needs_no_torch() -> None:
    """Of its own: the report of a run, which reads it, is to be quick."""
    program = "import sys, dgpo_fast.guard; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "False"), run.stderr


def test_rules_are_told_of_the_recipe(report: Report) -> None:
    """Flow-GRPO makes two steps of an iteration, whose reward is one reading: it changes between iterations alone."""
    recipe = ("guard.window=3", "optimizer.warmup_steps=7", "groups.per_iteration=8")
    guard = Guard(load_recipe("tiny-flow-grpo", [*recipe]))
    for step in range(1, 9):
        guard.observe(report(step, reward_mean=float((step - 1) // 2)))
    told = guard._history()
    assert told is not None and (told.num_groups, told.updates, told.warmup) == (8, 2, 7)
    assert guard.state()["changes"] == (3, 3.0)


def test_an_evaluation_is_judged_beside_the_training_of_its_window(report: Report) -> None:
    """By the reward's spread when training began, and by as many images as were drawn."""
    guard = Guard(load_recipe("tiny-dgpo", ["guard.window=3"]))
    for step in range(1, 7):
        guard.observe(report(step, reward_mean=float(step), reward_std=0.4 if step == 1 else 9.0))
    base, tuned = {"soft": 1.8, "strict": 0.4}, {"soft": 1.1, "strict": 0.4}
    found = guard.observe_evaluation(6, num_images=32, base=base, tuned=tuned)
    assert guard.state()["evaluations"][-1][3:] == (5.0, 32)
    assert [finding.name for finding in found] == ["below_base"]
