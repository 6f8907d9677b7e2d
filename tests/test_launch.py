"""The scripts of docs/launch as they are: two machines, both of them this one, train what one launcher trains."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from dgpo_fast.checkpoint import list_checkpoints
from dgpo_fast.config import dump_config, load_recipe
from dgpo_fast.metrics import read_metrics

SCRIPTS = Path(__file__).resolve().parents[1] / "docs" / "launch"
TOO_LONG_S = 300

# What a cluster has and this machine need not: each runs here what it would run on node-0 and node-1.
COMMANDS = {
    "ssh": "exit 0",
    "pdsh": """
while [[ $1 == -* ]]; do [[ $1 == -S ]] || { [[ $1 == -w ]] && hosts=$2; shift; }; shift; done
for host in ${hosts//,/ }; do command="$*"; bash -c "${command//%n/${host#node-}}" & done
wait
""",
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" > "$SCONTROL"; fi',
    "srun": """
shift
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & ranks+=($!); done
for rank in "${ranks[@]}"; do wait "$rank" || status=$?; done
exit "${status:-0}"
""",
}


@pytest.fixture(scope="module")
def launch(
    tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], child_environment: Mapping[str, str]
) -> Callable[..., list[subprocess.Popen[str]]]:
    """`launch(out, commands, **variables)` starts the commands; the recipe of the scripts is that of a quick run."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "quick.yaml").write_text(dump_config(load_recipe("tiny-dgpo", quick)))
    for name, content in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{content}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**child_environment, "PATH": path, "OMP_NUM_THREADS": "1", "RECIPE": str(folder / "quick.yaml")}

    def start(out: Path, *commands: Sequence[str | Path], **variables: str) -> list[subprocess.Popen[str]]:
        with socket.create_server(("localhost", 0)) as server:
            port = str(server.getsockname()[1])
        own = {"OUT": str(out), "PORT": port, "FIRST": "localhost", **variables}
        return [
            subprocess.Popen(
                command, env={**environment, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for command in commands
        ]

    return start


def assert_succeed(processes: Sequence[subprocess.Popen[str]]) -> None:
    try:
        outputs = [process.communicate(timeout=TOO_LONG_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def steps(run: Path) -> list[dict[str, float]]:
    """What its steps drew and learned, but not how long they took."""
    keys = ("step", "reward_mean", "reward_std", "loss", "kl", "grad_norm", "lr")
    return [{key: line[key] for key in keys} for line in read_metrics(run)]


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_scripts_are_bash(script: str) -> None:
    checked = subprocess.run(["bash", "-n", SCRIPTS / script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_two_agents_of_torchrun_train_what_one_trains(
    launch: Callable[..., list[subprocess.Popen[str]]],
    straight_two_ranks: Path,
    assert_ends_alike: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    agents = launch(tmp_path / "run", *[[SCRIPTS / "torchrun.sh"]] * 2, NODES="2", GPUS="1", RUN_ID=str(tmp_path))
    assert_succeed(agents)
    assert_ends_alike(tmp_path / "run", straight_two_ranks)


def test_two_machines_of_deepspeeds_launcher(
    launch: Callable[..., list[subprocess.Popen[str]]], straight_two_ranks: Path, tmp_path: Path
) -> None:
    """Arguments with spaces too come through its remote shells."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text((SCRIPTS / "hostfile").read_text().replace("slots=8", "slots=1"))
    command = [SCRIPTS / "deepspeed.sh", "--steps=1", "--set", "evaluation.every=0", "--set", "description=two words"]
    assert_succeed(launch(tmp_path / "run", command, HOSTFILE=str(hostfile), DS_ACCELERATOR="cpu"))
    assert steps(tmp_path / "run") == steps(straight_two_ranks)[:1]
    assert load_recipe(tmp_path / "run" / "config.yaml").description == "two words"


def test_a_job_of_slurm_goes_on_with_its_run_and_is_queued_again_when_its_time_is_over(
    launch: Callable[..., list[subprocess.Popen[str]]], straight_two_ranks: Path, tmp_path: Path
) -> None:
    """From step 3; SIGTERM comes in step 5, the second that it makes."""
    out = shutil.copytree(straight_two_ranks, tmp_path / "run", symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    stopping = {"MISBEHAVE": "2:SIGTERM", "MISBEHAVING": "1", "SCONTROL": str(tmp_path / "scontrol")}
    assert_succeed(launch(out, [SCRIPTS / "slurm.sbatch"], **job, **stopping))
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert [path.name for path in list_checkpoints(out)] == ["step-000003", "step-000004"]
    assert steps(out) == steps(straight_two_ranks)[:4]
