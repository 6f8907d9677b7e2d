"""What two ranks exchange in an optimizer step, counted, is what the formulas say. One launch makes every count."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("adapters", "full")
STAGES = (0, 1, 2, 3)
MICRO_BATCHES = 2

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


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], child_environment: dict[str, str]
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("traffic")
    (root / "plans.json").write_text(json.dumps({name: overrides_of(quick, case) for name, case in CASES.items()}))
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         Path(__file__).with_name("count_ranks.py"), root / "plans.json", root],
        env={**child_environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    first, second = (json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "every rank takes part in the same collectives"
    return first  # type: ignore[no-any-return]


@pytest.fixture
def counted(results: dict[str, Any]) -> Callable[[str], Counted]:
    return lambda name: Counted(results[name]["trained"], [tuple(row) for row in results[name]["traffic"]])


@pytest.mark.parametrize("name", [name for name in CASES if name != "gathered"])
def test_a_rollout_exchanges_nothing(counted: Callable[[str], Counted], name: str) -> None:
    assert counted(name).number("rollout/") == 0


def test_a_rollout_of_gathered_weights_exchanges_them_at_every_forward(
    counted: Callable[[str], Counted], quick: tuple[str, ...]
) -> None:
    found = counted("gathered")
    forwards = 3  # a trajectory of rollout.steps, without guidance, of all images at once
    assert found.num_bytes("rollout/", "all_gather") == forwards * 4 * found.trained
    assert found.number("replica/") == 0


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_adapters_are_added_up_once(counted: Callable[[str], Counted], stage: int) -> None:
    found = counted(f"adapters-{stage}")
    kind = "reduce_scatter" if stage == 3 else "all_reduce"
    assert found.num_bytes("train/backward/") == 0
    large = [row for row in found.traffic if row[3] > 1000 and row[1] != "all_gather"]
    assert large == [("train/optimizer", kind, 1, pytest.approx(4 * found.trained, abs=8))]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["full", "low"])
def test_gradients_of_all_weights_are_added_up_once_or_for_every_micro_batch(
    counted: Callable[[str], Counted], kind: str, stage: int
) -> None:
    if kind == "low" and stage == 0:
        return
    found = counted(f"{kind}-{stage}")
    once, often, gradients = found.num_bytes("train/optimizer/"), found.num_bytes("train/backward/"), 4 * found.trained
    if stage < 2:
        assert often == 0
        assert found.num_bytes("train/optimizer/", "all_reduce") == pytest.approx(gradients, abs=8)
    else:
        summed = "all_reduce" if stage == 2 else "reduce_scatter"
        assert found.number("train/backward/", summed) == MICRO_BATCHES
        assert found.num_bytes("train/backward/", summed) == MICRO_BATCHES * gradients
        assert found.num_bytes("train/optimizer/", "all_reduce") <= 16, "the norm, and whether it is finite"
    assert once <= 2 * gradients + 16


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
        gathered_forwards=3 if name == "gathered" else 0,
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
    """Rewards, metrics, and one signal check after the rollout and after every round."""
    found = counted("adapters-0")
    assert found.number() == 1 + 1 + 1 + MICRO_BATCHES + 1
    assert (found.number("reward/"), found.number("signals/"), found.number("train/signals/")) == (1, 1, MICRO_BATCHES)


def test_collectives_of_another_thread_of_the_backward_pass_count(results: dict[str, Any]) -> None:
    assert results["another thread"] == {"is_another": True, "traffic": [["backward", "all_reduce", 1, 12]]}


def test_profile_on_two_ranks(tmp_path: Path, quick: tuple[str, ...], child_environment: dict[str, str]) -> None:
    """One page and one of each file, whatever the number of ranks."""
    settings = [f"--set={item}" for item in overrides_of(quick, CASES["adapters-0"])]
    command = ["profile", "tiny-dgpo", "--out", tmp_path, "--iterations", "1", "--warmup", "0", "--no-trace", *settings]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dgpo_fast",
         *command], env={**child_environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.count("Collectives of an optimizer step, 2 ranks") == 1
    assert process.stdout.count("everything else") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collectives.csv", "stages.csv"]
    rows = list(csv.DictReader((tmp_path / "collectives.csv").open()))
    (gradients,) = (row for row in rows if row["stage"] == "train/optimizer")
    assert (gradients["collective"], gradients["number"]) == ("all_reduce", "1")
    assert gradients["bytes"] == gradients["bytes_sent_by_each_rank"] != "0"  # in a ring of two
    assert len({(row["stage"], row["collective"]) for row in rows}) == len(rows) > 3


def test_the_page_has_the_tables_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.communication import PAGE, filled

    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "python -m benchmarks.communication --write"
    assert "| SD3.5-L, full | 8.057 B |" in page
