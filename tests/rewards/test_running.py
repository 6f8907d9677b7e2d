"""Runs whose rewards live elsewhere: they learn what a run learns whose rewards do not, whatever dies on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.cli import main
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_evaluations, read_metrics
from dgpo_fast.reward_config import RunningConfig
from dgpo_fast.rewards import places

NAME = "misbehaving:Brightness"
SETTINGS = (
    "steps=2", "evaluation.every=0", "evaluation.num_prompts=1", "evaluation.images_per_prompt=2",
    "checkpoints.every=2", f"rewards.terms=[{{name: '{NAME}'}}]",
)  # fmt: skip
IN_SECOND_STEP = 4
"""Call of the reward, where it is given whole batches: the evaluation of the base makes one, and a step two."""
TOO_LONG_S = 120.0
OF_THE_CLOCK = {"wall_s", "rollout_s", "reward_s", "train_s", "images_per_s", "peak_memory_gb"}

Learnt = tuple[list[Mapping[str, object]], list[Mapping[str, object]], Tensor]


def learnt(out: Path, quick: tuple[str, ...], **running: object) -> Learnt:
    """Metrics, evaluations and weights of a run."""
    where = [f"rewards.running={{'{NAME}': {{{', '.join(f'{key}: {value}' for key, value in running.items())}}}}}"]
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, *SETTINGS, *(where if running else [])]), out)
    trainer.train()
    lines = [{key: line[key] for key in line.keys() - OF_THE_CLOCK} for line in read_metrics(out)]
    return lines, read_evaluations(out), trainer.policy.trainable.detach().clone()  # type: ignore[attr-defined]


def assert_alike(found: Learnt, expected: Learnt) -> None:
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...]) -> Learnt:
    """Of a run whose reward is in its process, and never fails."""
    return learnt(tmp_path_factory.mktemp("here"), quick)


def serve(environment: Mapping[str, str], *arguments: str, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """A `dgpo-fast serve-reward` that answers, and its address."""
    command = [sys.executable, "-m", "dgpo_fast", "serve-reward", NAME, "--port", str(port), *arguments]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said = server.stderr.readline()
    assert said.startswith(f"{NAME} on cpu answers at http://127.0.0.1:"), said + server.stderr.read()
    return server, said.split()[-1]


def end(server: subprocess.Popen[str], by: signal.Signals) -> int:
    server.send_signal(by)
    with server:
        return server.wait(TOO_LONG_S)


def test_a_run_goes_on_where_a_server_crashes_and_comes_back(
    here: Learnt, quick: tuple[str, ...], child_environment: dict[str, str], tmp_path: Path
) -> None:
    """It is killed while it scores; no sample is lost, and the run ends as if nothing had been."""
    environment = {**child_environment, "DGPO_FAST_REWARD_TOKEN": "secret"}
    dying, url = serve({**environment, "MISBEHAVE": f"{IN_SECOND_STEP}:SIGKILL"}, "--device", "cpu")
    servers = []

    def start_again() -> None:
        assert dying.wait(TOO_LONG_S) == -signal.SIGKILL
        servers.append(serve(environment, port=int(url.rpartition(":")[2]))[0])

    again = threading.Thread(target=start_again)
    again.start()
    with dying, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGPO_FAST_REWARD_TOKEN", "secret")
        found = learnt(tmp_path, quick, url=url)
    again.join(TOO_LONG_S)
    assert end(servers[0], signal.SIGTERM) == 128 + signal.SIGTERM, "it leaves in good order"
    assert_alike(found, here)


def test_a_run_goes_on_where_a_worker_is_killed(
    here: Learnt, quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISBEHAVE", f"{IN_SECOND_STEP}:SIGKILL")
    monkeypatch.setenv("MISBEHAVED", str(tmp_path / "misbehaved"))
    found = learnt(tmp_path / "run", quick, processes=1)
    assert (tmp_path / "misbehaved").exists()
    assert_alike(found, here)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """What a server sets in this process is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The last line on stderr of a command that ends with status 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    out, err = capfd.readouterr()
    assert (exit_info.value.code, out) == (2, ""), err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_a_run_ends_where_a_reward_of_its_process_hangs(
    quick: tuple[str, ...], capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a line that says what; the thread that hangs keeps nothing from ending."""
    monkeypatch.setenv("MISBEHAVE", f"{IN_SECOND_STEP}:hang")
    settings = [f"--set={item}" for item in (*quick, *SETTINGS, "rewards.timeout_s=1")]
    line = refused(capfd, "train", "tiny-dgpo", "--out", tmp_path, *settings)
    assert line.startswith(f"error: rewards: '{NAME}' has not answered within 1 s (rewards.timeout_s), ")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert {thread.daemon for thread in threading.enumerate() if thread.name == "rewards"} == {True}


SERVING_MISTAKES = {
    ("shapes", "--host", "0.0.0.0"): "--host 0.0.0.0 can be reached from other machines: set DGPO_FAST_REWARD_TOKEN",
    ("shape",): "no reward 'shape'; did you mean 'shapes'?",
    ("shapes", "--set", "rewards.pickscor.path=x"): "unknown key 'rewards.pickscor'; did you mean 'pickscore'?",
    ("shapes", "--set", "steps=3"): "--set steps=3: without a recipe, only keys that begin with rewards. can be set",
    ("shapes", "--recipe", "tiny-dpgo"): "no recipe 'tiny-dpgo'; did you mean 'tiny-dgpo'?",
    ("shapes", "--device", "tpu"): "--device: expected auto, cpu, cuda or cuda:1, got 'tpu'",
    ("shapes", "--max-images", "0"): "invalid value for '--max-images'",
}


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize(("arguments", "message"), SERVING_MISTAKES.items())
def test_serving_is_refused(
    arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DGPO_FAST_REWARD_TOKEN", raising=False)
    line = refused(capfd, "serve-reward", "--port", "0", *arguments)
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("asked", "policys", "ranks_here", "found"),
    [
        ("auto", "cuda:1", 2, "cuda:1"),
        ("cuda", "cuda:1", 2, "cuda:1"),  # without a number it would be the first for all
        ("cuda:2", "cuda:1", 2, "cuda:2"),  # which no rank trains on
        ("cuda:0", "cuda:0", 1, "cuda:0"),
        ("cuda:0", "cpu", 2, "cuda:0"),
        ("cpu", "cuda:1", 2, "cpu"),
        ("cuda:0", "cuda:1", 2, None),
        ("cuda:1", "cuda:1", 2, None),
    ],
)
def test_no_gpu_gets_the_rewards_of_every_rank(
    asked: str, policys: str, ranks_here: int, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places.launcher, "local_size", lambda: ranks_here)
    running, device = RunningConfig(device=asked), torch.device(policys)
    if found is None:
        refused = rf"^rewards\.running\.shapes\.device: a rank trains on {asked}, .*; auto is each rank's own GPU$"
        with pytest.raises(UserError, match=refused):
            places._device_of("shapes", running, device)
    else:
        assert places._device_of("shapes", running, device) == torch.device(found)
