"""Ranks that fail: the others say so and end, and a restart ends where an uninterrupted run ends, to the bit."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from dgpo_fast.checkpoint import list_checkpoints
from dgpo_fast.config import load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_metrics
from dgpo_fast.parallel import failures
from dgpo_fast.parallel.world import World

TOO_LONG_S = 60  # for a rank to end after another


class Ended(NamedTuple):
    status: int
    stdout: str
    stderr: str


def places(num_ranks: int) -> list[dict[str, str]]:
    """What each rank finds in its environment, where a cluster's scheduler starts them: it ends none for another."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    return [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def line_of(rank: int, size: int, cause: str) -> str:
    """What a rank says that ends because of another."""
    return (
        f"error: rank {rank} of {size} stops: {cause}; checkpoints are intact, train --resume goes on from the last\n"
    )


def own_lines(stderr: str) -> list[str]:
    """Lines on stderr without what a run says of its start and its progress."""
    start = ("operators on ", "engine ", "the likelihood ratio ", "samples are drawn ")
    said = (*start, "step ", "rewards.terms: which of the metrics ")
    return [line for line in stderr.splitlines(keepends=True) if not line.startswith(said)]


# Connections


def test_a_machine_that_is_gone_is_noticed_in_time() -> None:
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        kept = failures._kept_alive(peer).getsockopt
        assert kept(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        idle_s, between_s, number = (kept(socket.IPPROTO_TCP, option) for option in options)
        assert idle_s + number * between_s <= failures.SILENCE_S


# Ranks that do nothing but fail

RANK = """
import os, pathlib, signal, sys, threading, time
from dgpo_fast.parallel import failures

class Store:
    file = pathlib.Path(sys.argv[1])

    def set(self, key, value):
        self.file.with_suffix(".new").write_text(value)
        self.file.with_suffix(".new").rename(self.file)

    def get(self, key):
        while not self.file.exists():
            time.sleep(0.01)
        return self.file.read_bytes()

@failures.collective
def collective(error=None):
    time.sleep(0.1)
    if error:
        raise RuntimeError(error)

failures.watch(int(os.environ["RANK"]), 3, Store(), timeout_s=7)
"""
BLOCKED = "time.sleep(100)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
# Python 3.12 warns who forks beside threads; this one means to.
FORKS = f"""
import warnings
warnings.simplefilter("ignore")
if os.fork():
    {KILLED}
else:
    os.close(1); os.close(2); time.sleep(70)
"""
RAISES = "raise MemoryError('no \\n memory')"
REFUSES = "failures.fail('no such file'); sys.exit(2)"
GOES_ON = "try:\n    while True: collective()\nfinally: print('files closed')"
TERMINATED = "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
GONE = "was killed, or its machine is gone"

# What each of three ranks does, and what the others say of it.
STORIES = {
    "a rank is killed": ((GOES_ON, KILLED, BLOCKED), f"rank 1 {GONE}"),
    "the first rank is killed": ((KILLED, BLOCKED, GOES_ON), f"rank 0 {GONE}"),
    "a child of the killed rank lives on": ((GOES_ON, FORKS, BLOCKED), f"rank 1 {GONE}"),
    "a rank raises": ((GOES_ON, BLOCKED, RAISES), "rank 2 failed: MemoryError: no memory"),
    "the first rank meets a mistake of the user": ((REFUSES, GOES_ON, BLOCKED), "rank 0 failed: no such file"),
    "the others' collectives break first": (
        ("raise RuntimeError('reset by peer')", f"time.sleep(0.5); {KILLED}", "collective('reset by peer')"),
        f"rank 1 {GONE}",
    ),
    "a rank is terminated": ((GOES_ON, GOES_ON, TERMINATED + BLOCKED), f"rank 2 {GONE}"),
    "a launcher terminates the others first": (
        (TERMINATED + GOES_ON, f"time.sleep(1); {KILLED}", TERMINATED + GOES_ON),
        f"rank 1 {GONE}",
    ),
    "a rank hangs": (
        ("collective('Timed out waiting 7000ms for recv')", BLOCKED, GOES_ON),
        "rank 0 waited 7 s (parallel.timeout_s) for the others",
    ),
}


def launch(folder: Path, behaviours: Sequence[str], environment: Mapping[str, str]) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK + behaviour, folder / "store"],
            env={**environment, **place}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for behaviour, place in zip(behaviours, places(len(behaviours)), strict=True)
    ]  # fmt: skip


def ends(ranks: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """How each rank ended: in time, or the test fails."""
    try:
        outputs = [rank.communicate(timeout=TOO_LONG_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [Ended(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.fixture(scope="module")
def stories(
    tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]
) -> dict[str, list[subprocess.Popen[str]]]:
    """All of them at once: they mostly wait."""
    return {
        name: launch(tmp_path_factory.mktemp("story"), behaviours, child_environment)
        for name, (behaviours, _) in STORIES.items()
    }


@pytest.mark.parametrize("story", STORIES)
def test_the_others_say_a_line_and_end(story: str, stories: dict[str, list[subprocess.Popen[str]]]) -> None:
    behaviours, cause = STORIES[story]
    for rank, (behaviour, ended) in enumerate(zip(behaviours, ends(stories[story]), strict=True)):
        if behaviour in (KILLED, FORKS) or behaviour.endswith(KILLED):
            assert ended == (-signal.SIGKILL, "", "")
        elif behaviour == TERMINATED + BLOCKED:
            assert ended == (-signal.SIGTERM, "", "")
        elif behaviour == RAISES:
            assert ended.status == 1 and ended.stderr.startswith("Traceback")
        elif behaviour == REFUSES:
            assert ended == (2, "", "")
        else:
            assert ended == (1, "files closed\n" if GOES_ON in behaviour else "", line_of(rank, 3, cause))


def test_a_rank_may_leave_before_the_others(tmp_path: Path, child_environment: dict[str, str]) -> None:
    behaviours = ("time.sleep(1)", "failures.part(); os._exit(0)", "time.sleep(0.5)")
    assert ends(launch(tmp_path, behaviours, child_environment)) == [(0, "", "")] * 3


@pytest.mark.parametrize(
    ("place", "refusal"),
    [
        ({}, r"rank 0 of 2 did not meet the others at \$MASTER_ADDR:\$MASTER_PORT: .*MASTER_ADDR expected"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}, r"rank 0 of 2 did not meet the others at localhost:0: "),
    ],
)
def test_a_rank_that_no_other_joins(
    place: dict[str, str], refusal: str, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "JOIN_TIMEOUT_S", 1.0)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **place}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=refusal):
        World.from_environment(load_recipe("tiny-dgpo", quick))


# Whole runs on two ranks

# The reward's calls on each rank: the evaluation of the base, steps 1 to 3, the evaluation of step 3, steps 4 to 6. A
# run that goes on from step 3 begins with step 4.
IN_FIRST_STEP, IN_SIXTH_STEP, IN_FIFTH_STEP_RESUMED = 2, 8, 2


# Imports what a rank needs, which takes most of the time of a short run, and forks the ranks of one run after another.
FORKING = """
import json, os, signal, sys
import dgpo_fast.cli, dgpo_fast.trainer
for line in sys.stdin:
    ranks = []
    for rank in json.loads(line):
        if (process := os.fork()) == 0:
            signal.alarm(rank["seconds"])
            os.environ.update(rank["environment"])
            for descriptor, path in enumerate(rank["outputs"], start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            dgpo_fast.cli.main(rank["arguments"])
        ranks.append(process)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]), flush=True)
"""


class Ranks:
    """Runs the command line on two ranks that nothing but each other's end connects."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str | Path, misbehaving: Mapping[str, str] | None = None) -> list[Ended]:
        """How each of them ended; -SIGALRM where it was not in time."""
        files = [[self.folder / f"{rank}.{stream}" for stream in ("stdout", "stderr")] for rank in range(2)]
        for path in (path for paths in files for path in paths):
            path.unlink(missing_ok=True)
        ranks = [
            {"arguments": [*map(str, arguments)], "environment": {**place, **(misbehaving or {})},
             "outputs": [*map(str, paths)], "seconds": TOO_LONG_S}
            for place, paths in zip(places(2), files, strict=True)
        ]  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(ranks), file=self.process.stdin, flush=True)
        statuses = json.loads(self.process.stdout.readline())
        return [
            Ended(status, *(path.read_text() for path in paths)) for status, paths in zip(statuses, files, strict=True)
        ]


@pytest.fixture(scope="module")
def environment(child_environment: dict[str, str]) -> dict[str, str]:
    return {**child_environment, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("outputs"), environment)
    yield ranks
    ranks.process.kill()
    ranks.process.wait()


@pytest.fixture(scope="module")
def train(quick: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments of a quick run, but for --out."""
    return ("train", "tiny-dgpo", *(f"--set={item}" for item in quick))


def test_a_run_of_which_ranks_were_killed_and_failed_ends_like_one_of_which_none_did(
    train: tuple[str, ...],
    two_ranks: Ranks,
    environment: dict[str, str],
    straight_two_ranks: Path,
    assert_ends_alike: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    """The first in the middle of a checkpoint, under torchrun, which then terminates the other. The second by a reward
    that failed on one rank: what both had learnt by then is saved."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killed = subprocess.run(
        [*torchrun, "-m", "dgpo_fast", *train, "--out", tmp_path],
        env={**environment, "MISBEHAVE": f"{IN_SIXTH_STEP}:SIGKILL-in-checkpoint"},
        stderr=subprocess.PIPE, text=True, timeout=2 * TOO_LONG_S,
    )  # fmt: skip
    assert killed.returncode != 0
    errors = [line for line in killed.stderr.splitlines(keepends=True) if line.startswith(("error:", "[rank"))]
    assert errors == [line_of(1, 2, f"rank 0 {GONE}")]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003"]
    assert (tmp_path / "checkpoints" / ".step-000006.partial").is_dir()

    go_on = (*train, "--out", tmp_path, "--resume")
    raising = {"MISBEHAVE": f"{IN_FIFTH_STEP_RESUMED}-99:raise", "MISBEHAVING": "1"}
    first, second = two_ranks.run(*go_on, misbehaving=raising)
    reason = (
        "rewards: 'misbehaving:Brightness' failed for 4 of 8 images, last: RuntimeError: the reward's server is gone; "
        "50.0% of the images have no reward, more than rewards.max_failed_share=0.1"
    )
    assert "saved after step 4, from which --resume goes on\n" in own_lines(first.stderr)
    for rank in (first, second):  # the first of them to end says why, and the other too, or that it heard so
        assert rank.status in (1, 2) and reason in rank.stderr
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000004"]

    assert [rank.status for rank in two_ranks.run(*go_on)] == [0, 0]
    assert_ends_alike(tmp_path, straight_two_ranks)


def test_a_reward_that_fails_on_one_rank_leaves_out_its_samples(
    train: tuple[str, ...], two_ranks: Ranks, tmp_path: Path
) -> None:
    """It raises for the second rank's batch of four, twice, and then for the first two of them alone."""
    raising = {"MISBEHAVE": f"{IN_FIRST_STEP}-{IN_FIRST_STEP + 3}:raise", "MISBEHAVING": "1"}
    settings = ("--set=rewards.max_failed_share=0.25", "--set=evaluation.every=0", "--steps=2")
    first, second = two_ranks.run(*train, *settings, "--out", tmp_path, misbehaving=raising)
    said = (
        "rewards: 'misbehaving:Brightness' failed for 2 of 8 images, last: RuntimeError: the reward's server is gone\n"
    )
    assert (first.status, own_lines(first.stderr)) == (0, [said])
    assert second == (0, "", "")
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["images_seen"], line["failed_samples"]) for line in lines] == [(1, 8, 2), (2, 16, 0)]
    assert all(0 < line["reward_std"] < 1 and 0 < line["grad_norm"] < float("inf") for line in lines)
