"""Runs a script on several ranks of this machine, as torchrun does.

    python ranks.py NUM_RANKS SCRIPT [ARGUMENT ...]

The ranks are copies of one process that has imported what takes seconds, where torchrun has each import it anew: two
ranks begin after half the work.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys

import deepspeed  # noqa: F401
from torch.multiprocessing import start_processes

import dgpo_fast.parallel.zero
import dgpo_fast.trainer  # noqa: F401
from dgpo_fast.parallel import failures


def run(local_rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(local_rank), LOCAL_RANK=str(local_rank))
    runpy.run_path(sys.argv[0], run_name="__main__")
    failures.part()  # a copy of a process does not do at its end what was registered with `atexit`


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


if __name__ == "__main__":
    num_ranks, sys.argv = int(sys.argv[1]), sys.argv[2:]
    size = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **size}
    start_processes(run, (environment,), nprocs=num_ranks, start_method="fork")
