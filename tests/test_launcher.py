"""What launchers say: places and shares of a rank, whichever of them started it."""

from __future__ import annotations

import pytest

from dgpo_fast import cli, environment, launcher

VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK")


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),  # torchrun
        ({"WORLD_SIZE": "16", "LOCAL_SIZE": "8"}, 8),  # DeepSpeed's launcher
        ({"WORLD_SIZE": "16", "SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 1),  # one process in an allocation that has room for more
        ({"WORLD_SIZE": "2"}, 1),
    ],
)
def test_ranks_of_a_machine_share_its_cores(given: dict[str, str], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "num_cores", lambda: 96)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launcher.local_size() == size
    assert environment.share_of_cores() == 96 // size


@pytest.mark.parametrize(
    ("launched", "cores", "share"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}, 12, 12),  # bound to its own
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "11"}, 12, 12),  # which are whole cores of two threads
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}, 96, 12),  # bound to none
        (
            {"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "96"},
            96,
            12,
        ),  # torchrun in it
    ],
)
def test_a_task_of_slurm_may_have_cores_of_its_own(
    launched: dict[str, str], cores: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "num_cores", lambda: cores)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "64", **launched}.items():
        monkeypatch.setenv(name, value)
    assert environment.share_of_cores() == share


@pytest.mark.parametrize(("status", "told"), [(130, ["it was interrupted"]), (0, []), (None, [])])
def test_a_rank_that_is_interrupted_tells_the_others(
    status: int | None, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command line ends by is no exception that anybody else would hear of."""
    heard = list[str]()
    monkeypatch.setattr(cli, "app", lambda *arguments, **options: status)
    monkeypatch.setattr(cli.failures, "fail", heard.append)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == status and heard == told
