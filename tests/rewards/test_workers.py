"""Rewards in processes of their own: the scores of one here, and every way in which such a process can fail."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo_fast import environment
from dgpo_fast.errors import UserError
from dgpo_fast.records import Prompt
from dgpo_fast.reward_config import RewardConfig, RewardsConfig, RunningConfig
from dgpo_fast.rewards import Scorer, base, calling, load_reward, register_reward, workers
from dgpo_fast.rewards.calling import Abandoned

NAME = "obedient"
IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TIMEOUT_S = 3.0
TOO_LONG_S = 60.0


def settings(name: str = NAME, processes: int = 2, **others: Any) -> RewardsConfig:
    running = {name: RunningConfig(processes=processes)}
    return RewardsConfig(terms=(RewardConfig(name=name),), running=running, timeout_s=TIMEOUT_S, **others)


def prompts(**told: Mapping[str, Any]) -> list[Prompt]:
    """Five, some of which have a reward do something: `p3={"do": ...}`."""
    return [Prompt(f"image {number} ä", {"told": number, **told.get(f"p{number}", {})}) for number in range(5)]


@pytest.fixture(scope="module")
def pool(quick: tuple[str, ...]) -> Iterator[Scorer]:
    """Two processes that several tests use; what one does to them must not matter to the next."""
    from misbehaving import Obedient  # type: ignore[import-not-found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_FACTORIES", {})
        patch.setattr(calling, "BACKOFF_S", 0.0)
        register_reward(NAME)(Obedient)
        with Scorer(settings(max_failed_share=0.5)) as scorer:
            yield scorer


def test_a_batch_is_shared_out_and_scored_as_here(pool: Scorer) -> None:
    """With what is known of the prompts, and of a class that only this process has registered."""
    scores = pool(IMAGES, prompts())
    assert torch.equal(scores.reward_B, IMAGES.mean((1, 2, 3)))
    assert scores.metrics["told"].tolist() == [0, 1, 2, 3, 4]
    assert scores.metrics["images"].tolist() == [3, 3, 3, 2, 2]
    assert scores.metrics["processes"].tolist() == [2] * 5
    processes = {*scores.metrics["process"].tolist()}
    assert os.getpid() not in processes and 1 <= len(processes) <= 2
    again = pool(IMAGES, prompts()).metrics["process"]
    workers = pool.places[NAME]._workers  # type: ignore[attr-defined]
    assert {*again.tolist()} <= {worker._process.pid for worker in workers}
    assert pool(IMAGES[:1], prompts()[:1]).reward_B.tolist() == scores.reward_B[:1].tolist()


def test_pieces_are_no_larger_than_asked(pool: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.places[NAME], "_images_per_call", 2)
    assert pool(IMAGES, prompts()).metrics["images"].tolist() == [2, 2, 2, 2, 1]


def test_a_process_that_raises_is_asked_again(pool: Scorer, tmp_path: Path) -> None:
    once = pool(IMAGES, prompts(p3={"do": "raise", "once": str(tmp_path / "done")}))
    assert torch.equal(once.reward_B, IMAGES.mean((1, 2, 3))) and once.failed == {}
    always = pool(IMAGES, prompts(p3={"do": "raise"}))
    assert always.reward_B.isnan().tolist() == [False, False, False, True, False]
    assert always.failed == {NAME: (1, "RuntimeError: told to")}


@pytest.mark.parametrize("how", ["nan", "-inf"])
def test_scores_that_are_not_finite_cross_over(how: str, pool: Scorer, tmp_path: Path) -> None:
    once = pool(IMAGES, prompts(p1={"do": how, "once": str(tmp_path / "done")}))
    assert torch.equal(once.reward_B, IMAGES.mean((1, 2, 3)))
    always = pool(IMAGES, prompts(p1={"do": how}))
    assert always.reward_B.isnan().tolist() == [False, True, False, False, False]
    assert always.failed == {NAME: (1, f"returned {how}")}


def test_the_wrong_number_of_scores_is_an_error(pool: Scorer) -> None:
    with pytest.raises(
        UserError, match=r"'obedient' returned \[1\] scores \(mean\) for 2 images; expected one for each"
    ):
        pool(IMAGES, prompts(p3={"do": "short"}))
    assert pool(IMAGES, prompts()).failed == {}


def test_a_process_that_is_killed_is_started_again(pool: Scorer, tmp_path: Path) -> None:
    """In the middle of a batch, and while nobody asks anything of it."""
    scores = pool(IMAGES, prompts(p0={"do": "SIGKILL", "once": str(tmp_path / "done")}))
    assert torch.equal(scores.reward_B, IMAGES.mean((1, 2, 3))) and scores.failed == {}
    os.kill(pool.places[NAME]._workers[0]._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    scores = pool(IMAGES, prompts())
    assert torch.equal(scores.reward_B, IMAGES.mean((1, 2, 3))) and scores.failed == {}


def test_a_process_that_hangs_is_ended(pool: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its piece is given up, if it may not be asked again; the other's is kept."""
    monkeypatch.setattr(pool, "config", pool.config.model_copy(update={"retries": 0}))
    start = time.monotonic()
    scores = pool(IMAGES, prompts(p4={"do": "hang"}))
    assert time.monotonic() - start < TIMEOUT_S + TOO_LONG_S
    assert scores.reward_B.isnan().tolist() == [False, False, False, True, True]
    assert scores.failed == {NAME: (2, "no answer within 3 s, so its process was ended")}


def test_a_reward_may_start_processes(pool: Scorer) -> None:
    scores = pool(IMAGES, prompts(p0={"do": "pool"}))
    expected = [math.sqrt(IMAGES[0].mean().item()), *IMAGES[1:].mean((1, 2, 3)).tolist()]
    assert scores.failed == {} and scores.reward_B.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("then", ["SIGKILL", "hang"])
def test_what_a_reward_has_started_ends_with_its_process(then: str, pool: Scorer, tmp_path: Path) -> None:
    started = int(pool(IMAGES[:1], prompts(p0={"do": "start"})[:1]).reward_B)
    assert is_running(started)
    told = {f"p{place}": {"do": then, "once": str(tmp_path / f"{place}")} for place in (0, 4)}  # both processes
    assert pool(IMAGES, prompts(**told)).failed == {}
    assert not is_running(started)


def test_a_process_that_hangs_is_asked_again(pool: Scorer, tmp_path: Path) -> None:
    scores = pool(IMAGES, prompts(p0={"do": "hang", "once": str(tmp_path / "done")}))
    assert torch.equal(scores.reward_B, IMAGES.mean((1, 2, 3))) and scores.failed == {}


def test_nobody_waits_for_what_is_of_no_use(pool: Scorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pool, "config", pool.config.model_copy(update={"timeout_s": 1000.0}))
    started, raised = tmp_path / "started", []

    def ask() -> None:
        try:
            pool.measure(IMAGES, prompts(p0={"do": "hang", "once": str(started)}))
        except Abandoned as error:
            raised.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not started.exists():
        time.sleep(0.01)
    pool.stop.set()
    thread.join(TOO_LONG_S)
    assert not thread.is_alive() and len(raised) == 1
    pool.stop.clear()


def test_cores_are_shared_out_among_ranks_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(environment, "num_cores", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv(environment.WORKERS_VARIABLE, "1")
    workers._take_share_of_cores(4)
    assert threads == [2] and environment.share_of_cores() == 2
    workers._take_share_of_cores(16)
    assert threads == [2, 1]


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_made_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'misbehaving:Broken' cannot be made: FileNotFoundError: weights\.bin"):
        Scorer(settings("misbehaving:Broken", processes=1))
    monkeypatch.setattr(base, "_FACTORIES", {"mine": lambda: load_reward("shapes")})
    with pytest.raises(
        UserError, match=r"rewards\.running\.mine\.processes: .* must be defined at the top of a module"
    ):
        Scorer(settings("mine"))


PARENT = """
import os, signal, sys, threading, time
import torch
from dgpo_fast.records import Prompt
from dgpo_fast.reward_config import RewardConfig, RewardsConfig, RunningConfig
from dgpo_fast.rewards import Scorer

if __name__ == "__main__":
    name, started = "misbehaving:Obedient", sys.argv[1]
    running = {name: RunningConfig(processes=1)}
    scorer = Scorer(RewardsConfig(terms=(RewardConfig(name=name),), running=running))
    child = scorer(torch.zeros(1, 3, 4, 4), [Prompt("", {"do": "start"})])
    hanging = [Prompt("", {"do": "hang", "once": started})]
    threading.Thread(target=scorer.measure, args=(torch.zeros(1, 3, 4, 4), hanging), daemon=True).start()
    while not os.path.exists(started):
        time.sleep(0.01)
    print(scorer.places[name]._workers[0]._process.pid, int(child.reward_B), flush=True)
    END
"""
ENDS = {
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "an exception": "raise ZeroDivisionError",
    "its last line": "pass",
}


def test_processes_end_with_the_one_that_started_them(child_environment: dict[str, str], tmp_path: Path) -> None:
    """Hanging in a reward that has started one of its own, they neither outlive it nor keep it from ending."""
    parents = {}
    for how, code in ENDS.items():
        script = tmp_path / f"{how}.py"
        script.write_text(PARENT.replace("END", code))
        parents[how] = subprocess.Popen(
            [sys.executable, script, tmp_path / f"{how}.started"], env=child_environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    for how, parent in parents.items():
        out, err = parent.communicate(timeout=TOO_LONG_S)  # which waits for the worker, too: it has the same stderr
        assert parent.returncode == {"SIGKILL": -signal.SIGKILL, "an exception": 1, "its last line": 0}[how], err
        assert not any(map(is_running, map(int, out.split())))


def is_running(process: int) -> bool:
    """Whether it is more than an entry that its new parent has not collected yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
