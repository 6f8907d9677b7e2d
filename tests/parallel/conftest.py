"""Several runs on several ranks, by one launch: starting processes takes longer than training the small model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.checkpoint import last_checkpoint, load_checkpoint

Run = Callable[..., str]
Train = Callable[..., None]
Tensors = Mapping[str, Tensor]


@pytest.fixture(scope="session")
def run_on_ranks(child_environment: dict[str, str]) -> Run:
    """`run_on_ranks(script, *arguments, num_ranks=2)` runs one of this directory, and returns what its ranks print.

    `environment` is added to that of the ranks.
    """

    def run(script: str, *arguments: Path, num_ranks: int = 2, environment: Mapping[str, str] | None = None) -> str:
        here = Path(__file__).parent
        starter = [here / "ranks.py", str(num_ranks)] if num_ranks > 1 else []
        process = subprocess.run(
            [sys.executable, *starter, here / script, *arguments],
            env={**child_environment, **(environment or {}), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        return process.stdout

    return run


@pytest.fixture(scope="session")
def train_on_ranks(run_on_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train_on_ranks(plans, num_ranks)` trains every plan of train_ranks.py; all by one launch."""

    def train(plans: Sequence[Mapping[str, Any]], num_ranks: int) -> None:
        file = tmp_path_factory.mktemp("plans") / "plans.json"
        file.write_text(json.dumps([{**plan, "out": str(plan["out"])} for plan in plans]))
        run_on_ranks("train_ranks.py", file, num_ranks=num_ranks)

    return train


@pytest.fixture(scope="session")
def saved() -> Callable[..., Tensors]:
    """`saved(run, kind)` is what a run saved last, or after the step that is given as well."""

    @cache
    def tensors(run: Path, kind: str, step: int | None = None) -> Tensors:
        directory = last_checkpoint(run) if step is None else run / "checkpoints" / f"step-{step:06d}"
        return load_checkpoint(directory).tensors(kind)

    return tensors


@pytest.fixture(scope="session")
def distance() -> Callable[[Tensors, Tensors], float]:
    """The relative distance of all of two runs' parameters."""

    def flat(tensors: Tensors) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()

    def relative(one: Tensors, other: Tensors) -> float:
        assert one.keys() == other.keys()
        return float((flat(one) - flat(other)).norm() / flat(other).norm())

    return relative
