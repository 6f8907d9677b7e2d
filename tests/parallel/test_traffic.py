"""What two ranks exchange in an optimizer step, counted, is what the formulas say. One launch makes every count."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("adapters", "full")
STAGES = (0, 1, 2, 3)
MICRO_BATCHES = 2
ROLLOUT_FORWARDS = 3
"""A trajectory of rollout.steps, without guidance, of all images at once."""
GATHERED = ("gathered", "sharded")
"""Cases whose rollout gathers weights."""

COMMON = (
    "model.resolution=24", "evaluation.every=0", "algorithm.train_timesteps=2", "adapter.rank=16",
    "rewards.terms=[{name: 'misbehaving:Brightness'}]",
)  # fmt: skip
FULL = ("adapter=null", "model.engine=eager")
LOW = ("model.dtype=bfloat16", "algorithm.clip=null")
# Parameters that are whole on every rank because they are small are nearly all of the embedded model's.
PARTITION = "parallel.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"


class Case(NamedTuple):
    is_full: bool
    stage: int
    more: tuple[str, ...] = ()


CASES = {
    **{f"{kind}-{stage}": Case(kind == "full", stage) for kind in KINDS for stage in STAGES},
    **{f"low-{stage}": Case(True, stage, LOW) for stage in (1, 2, 3)},
    "gathered": Case(True, 3, ("parallel.rollout=gathered",)),
    "sharded": Case(True, 3, ("parallel.frozen=sharded",)),
    "groups over ranks": Case(False, 0, ("optimizer.images_per_micro_batch=2",)),
    "groups over rounds": Case(False, 0, ("optimizer.images_per_micro_batch=1",)),
}


def overrides_of(quick: tuple[str, ...], case: Case) -> list[str]:
    zero = (f"parallel.zero_stage={case.stage}", *([PARTITION] if case.stage == 3 else []))
    return [*quick, *COMMON, *(FULL if case.is_full else ()), *zero, *case.more]


class Counted(NamedTuple):
    trained: int
    traffic: list[tuple[str, str, int, int]]

    def num_bytes(self, within: str = "", kind: str | None = None) -> int:
        return sum(row[3] for row in self._rows(within, kind))

    def number(self, within: str = "", kind: str | None = None) -> int:
        return sum(row[2] for row in self._rows(within, kind))

    def _rows(self, within: str, kind: str | None) -> list[tuple[str, str, int, int]]:
        return [row for row in self.traffic if f"{row[0]}/".startswith(within) and kind in (None, row[1])]


class Results(NamedTuple):
    counts: dict[str, Any]
    printed: str
    """By `dgpo-fast profile`, on all ranks together."""
    profile: Path


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], run_on_ranks: Callable[..., str]
) -> Results:
    root = tmp_path_factory.mktemp("traffic")
    (root / "plans.json").write_text(json.dumps({name: overrides_of(quick, case) for name, case in CASES.items()}))
    printed = run_on_ranks("count_ranks.py", root / "plans.json", root)
    first, second = (json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "every rank takes part in the same collectives"
    return Results(first, printed, root / "profile")


@pytest.fixture
def counted(results: Results) -> Callable[[str], Counted]:
    counts = results.counts
    return lambda name: Counted(counts[name]["trained"], [tuple(row) for row in counts[name]["traffic"]])


@pytest.mark.parametrize("name", [name for name in CASES if name not in GATHERED])
def test_a_rollout_exchanges_nothing(counted: Callable[[str], Counted], name: str) -> None:
    assert counted(name).number("rollout/") == 0


@pytest.mark.parametrize("name", GATHERED)
def test_a_rollout_of_gathered_weights_exchanges_them_at_every_forward(
    counted: Callable[[str], Counted], name: str
) -> None:
    found = counted(name)
    assert found.num_bytes("rollout/", "all_gather") == ROLLOUT_FORWARDS * 4 * found.trained
    assert found.number("replica/") == 0


def test_a_base_and_an_old_policy_in_shards_are_gathered_at_every_forward(counted: Callable[[str], Counted]) -> None:
    found = counted("sharded")
    for view in ("reference", "old"):
        assert found.num_bytes(f"train/{view}/", "all_gather") == MICRO_BATCHES * 4 * found.trained


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_adapters_are_added_up_once(counted: Callable[[str], Counted], stage: int) -> None:
    found = counted(f"adapters-{stage}")
    kind = "reduce_scatter" if stage == 3 else "all_reduce"
    assert found.num_bytes("train/backward/") == 0
    assert found.num_bytes("train/optimizer/", kind) == pytest.approx(4 * found.trained, abs=8)
    # Beside it the norm, which whoever has all of the gradient need not ask for.
    assert found.number("train/optimizer/", kind) == (2 if stage in (1, 2) else 1)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("full", "low"))])
def test_gradients_of_all_weights_are_added_up_once_or_for_every_micro_batch(
    counted: Callable[[str], Counted], name: str
) -> None:
    found, stage = counted(name), CASES[name].stage
    gradients = 4 * found.trained
    if stage < 2:
        assert found.num_bytes("train/backward/") == 0
        assert found.num_bytes("train/optimizer/", "all_reduce") == pytest.approx(gradients, abs=8)
    else:
        summed = "all_reduce" if stage == 2 else "reduce_scatter"
        assert found.number("train/backward/", summed) == MICRO_BATCHES
        assert found.num_bytes("train/backward/", summed) == MICRO_BATCHES * gradients
        assert found.num_bytes("train/optimizer/", "all_reduce") <= 16, "the norm, and whether it is finite"


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("groups")])
def test_bytes_are_those_of_the_formula(
    counted: Callable[[str], Counted], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kind; but for stage 3, which may find weights still there in the backward pass."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.communication import Step, exchanges

    case, found = CASES[name], counted(name)
    step = Step(
        stage=case.stage, is_full=case.is_full, trained=found.trained, micro_batches=MICRO_BATCHES,
        value=2 if case.more == LOW else 4, gradient=4, has_old=case.more != LOW,
        gathered_forwards=ROLLOUT_FORWARDS if name in GATHERED else 0, is_frozen_sharded=name == "sharded",
    )  # fmt: skip
    expected: Counter[str] = Counter()
    for each in exchanges(step):
        expected[each.kind] += round(each.passes * each.num_bytes)
    small = 200
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce"):
        seen = found.num_bytes(kind=kind)
        if case.is_full and case.stage == 3 and kind == "all_gather":
            unneeded = MICRO_BATCHES * step.value * step.trained
            assert expected[kind] - unneeded <= seen <= expected[kind] + small
        else:
            assert expected[kind] <= seen <= expected[kind] + small, kind


def test_groups_are_added_up_where_they_span_ranks_or_rounds(counted: Callable[[str], Counted]) -> None:
    """Once for each group and sigma: two groups of the iteration at two sigmas."""
    assert counted("adapters-0").number("train/group sums/") == 0
    for name in ("groups over ranks", "groups over rounds"):
        assert counted(name).number("train/group sums/") == 4
        assert counted(name).num_bytes("train/group sums/") == 4 * 4


def test_what_is_left_is_a_handful(counted: Callable[[str], Counted]) -> None:
    """Rewards, metrics, the norm, and one look for signals after the rollout; another lies between iterations."""
    found = counted("adapters-0")
    assert found.number() == 1 + 1 + 1 + 1
    assert (found.number("reward/"), found.number("signals/"), found.number("train/signals/")) == (1, 1, 0)


def test_collectives_of_another_thread_of_the_backward_pass_count(results: Results) -> None:
    assert results.counts["another thread"] == {"is_another": True, "traffic": [["backward", "all_reduce", 1, 12]]}


def test_profile_on_two_ranks(results: Results, counted: Callable[[str], Counted]) -> None:
    """One page and one of each file, whatever the number of ranks."""
    assert results.printed.count("Collectives of an iteration, 2 ranks") == 1
    assert results.printed.count("everything else") == 1
    assert sorted(path.name for path in results.profile.iterdir()) == ["collectives.csv", "stages.csv"]
    rows = list(csv.DictReader((results.profile / "collectives.csv").open()))
    found = [(row["stage"], row["collective"], int(row["number"]), int(row["bytes"])) for row in rows]
    assert found == counted("adapters-1").traffic
    # In a ring of two a sum goes round once, and everything else by half.
    sent = [round(num_bytes * (1 if kind == "all_reduce" else 0.5)) for _, kind, _, num_bytes in found]
    assert [int(row["bytes_sent_by_each_rank"]) for row in rows] == sent


def test_the_page_has_the_tables_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.communication import PAGE, tables
    from benchmarks.pages import filled

    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, tables()) == page, "python -m benchmarks.communication --write"
    assert "| SD3.5-L, full | 8.057 B |" in page
