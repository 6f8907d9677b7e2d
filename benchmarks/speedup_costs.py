"""What an iteration of each run costs on one core of a quiet machine: the clock of the speedup benchmark.

    python -m benchmarks.speedup calibrate

A run is as long as its iterations are dear. They are timed once for all, by turns in one process, while nothing else
runs: neighbours share caches and hyperthreads, and make each second of a core do up to half as much, so that seconds
counted during a run of hours would be those of the machine's other guests. Seconds are a core's, or, where there is a
CUDA GPU, those that pass until the iteration is reported, which waits for it.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from benchmarks.speedup_runs import METHODS, Run
from benchmarks.tables import read_rows, write_rows

if TYPE_CHECKING:
    from dgpo_fast.config import Config

ROUNDS = 7
FILE = "costs.csv"
ENGINES = {"eager": ("model.engine=eager", "model.sampling=same"), "fused": ()}
"""diffusers' code as it is, and the recipes' own engine."""
ENGINE_FILE = "engines.csv"
Key = TypeVar("Key")
AGAIN = "costs-again.csv"
"""What the same command measured on another day, by which nothing is timed: how far the clock can be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What decides how much work an iteration is, and by which code it is done.

    Most of DGPO's ablations draw and group the same images otherwise: within a twentieth they cost the same, and count
    so.
    """

    method: str
    flops: float
    """Of an iteration, as planned."""
    updates: int
    """Optimizer steps of an iteration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of an iteration: the fastest of the rounds, to which whatever disturbs can only add, and their median."""

    kind: Kind
    seconds: float
    median: float


def kind_of(run: Run) -> Kind:
    from dgpo_fast import load_recipe

    config = load_recipe(METHODS[run.method].recipe, run.overrides)
    flops, updates = float(f"{flops_of(config):.6g}"), config.optimizer.steps_per_iteration
    return Kind(method=run.method, flops=flops, updates=updates)


def flops_of(config: Config) -> float:
    """Of an iteration, as `--dry-run` plans it."""
    from dgpo_fast.models.sources import find_model, transformer_shape, vae_shape
    from dgpo_fast.planning import cost

    source = find_model(config.model.name, revision=config.model.version)
    shape = transformer_shape(source)
    assert shape is not None
    return cost(config, source, shape, vae_shape(source)).flops


def read_costs(results: Path, name: str = FILE) -> dict[Kind, Cost]:
    """What was measured; nothing where nothing was."""
    path = results / name
    if not path.exists():
        return {}
    types: dict[str, Any] = {"method": str, "flops": float, "updates": int}
    rows = read_rows(path)
    kinds = [Kind(**{name: kind(row[name]) for name, kind in types.items()}) for row in rows]
    return {
        kind: Cost(kind=kind, seconds=float(row["seconds"]), median=float(row["median"]))
        for kind, row in zip(kinds, rows, strict=True)
    }


def add_costs(results: Path, costs: Iterable[Cost], origin: dict[str, str]) -> None:
    """Behind those that are there; each row has its own origin."""
    path = results / FILE
    before = read_rows(path) if path.exists() else []
    added = [
        {**asdict(cost.kind), "seconds": f"{cost.seconds:.4g}", "median": f"{cost.median:.4g}", **origin}
        for cost in costs
    ]
    write_rows(path, [*before, *added])


def against_known(known: Mapping[Kind, Cost], runs: Sequence[Run]) -> list[Cost]:
    """The costs of the kinds that are not known, on the clock of those that are.

    What is known of the same methods, or of all where that is nothing, is measured again beside them, by turns: by as
    much as these take longer or shorter now, on the geometric mean, so do they.
    """
    of_kind = {kind_of(run): run for run in reversed(runs)}
    added = [kind for kind in of_kind if kind not in known]
    of_methods = [kind for kind in of_kind if kind in known and kind.method in {new.method for new in added}]
    yardsticks = of_methods or [kind for kind in of_kind if kind in known]
    measured = {cost.kind: cost for cost in calibrate([of_kind[kind] for kind in (*yardsticks, *added)])}
    factor = geometric_mean(known[kind].seconds / measured[kind].seconds for kind in yardsticks)
    return [
        replace(cost, seconds=factor * cost.seconds, median=factor * cost.median)
        for cost in (measured[kind] for kind in added)
    ]


def calibrate(runs: Sequence[Run]) -> Iterator[Cost]:
    """The cost of an iteration of every kind among the runs."""
    of_kind = {kind_of(run): (run, ()) for run in reversed(runs)}  # the first of each kind
    for kind, seconds in _by_turns(of_kind).items():
        yield Cost(kind=kind, seconds=min(seconds), median=median(seconds))


class EngineCost(NamedTuple):
    """Seconds of an iteration of a method by one of `ENGINES`, in a round in which all took their turns."""

    method: str
    engine: str
    round: int
    seconds: float


def time_engines(runs: Sequence[Run]) -> list[EngineCost]:
    """The iterations of every run by either engine."""
    settings = {(run.method, engine): (run, more) for run in runs for engine, more in ENGINES.items()}
    return [
        EngineCost(method, engine, number, seconds)
        for (method, engine), measured in _by_turns(settings).items()
        for number, seconds in enumerate(measured)
    ]


def write_engines(results: Path, costs: Iterable[EngineCost], origin: dict[str, str]) -> None:
    rows = ({**cost._asdict(), "seconds": f"{cost.seconds:.4g}", **origin} for cost in costs)
    write_rows(results / ENGINE_FILE, rows)


def read_engines(results: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by method and engine; nothing where nothing was measured."""
    found: dict[str, dict[str, list[float]]] = {}
    if (path := results / ENGINE_FILE).exists():
        for row in read_rows(path):
            found.setdefault(row["method"], {}).setdefault(row["engine"], []).append(float(row["seconds"]))
    return found


def _by_turns(settings: Mapping[Key, tuple[Run, Sequence[str]]]) -> dict[Key, list[float]]:
    """Seconds of an iteration of each run, with more overrides, once around each round; on one thread, or the GPU."""
    import torch

    from benchmarks.ablated_samplers import ablate
    from dgpo_fast import Trainer, load_recipe

    torch.set_num_threads(1)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with tempfile.TemporaryDirectory() as out:
        trainers = {}
        for number, (key, (run, more)) in enumerate(settings.items()):
            config = load_recipe(METHODS[run.method].recipe, [*run.overrides, *more])
            trainers[key] = Trainer(config, Path(out) / str(number))
            ablate(trainers[key], run)
            trainers[key].run_iteration()  # allocates, and compiles what is compiled
        gc.collect()
        seconds: dict[Key, list[float]] = {key: [] for key in settings}
        for _ in range(ROUNDS):
            for key, trainer in trainers.items():
                start = clock()
                trainer.run_iteration()
                seconds[key].append(clock() - start)
    return seconds
