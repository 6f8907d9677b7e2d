"""How fast rewards are on a CPU, and how much of an iteration waits for them: tables of docs/rewards.md.

    python -m benchmarks.reward_speed run --out DIR [--rewards NAME ...] [--seconds N] [--images N]
    python -m benchmarks.reward_speed tables [--results DIR]
    python -m benchmarks.reward_speed write

A reward scores images of 512 px twice in each round: a batch with all cores, as this package does, and two images one
after another on one thread, as `reward_models.py` says; both must come to the same scores before anything is timed.
The first half of a batch has one prompt and the second another, as groups do. Other work on a machine takes its time,
but no seconds of the cores that a process is given: images per core-second are what a shared machine can tell.

NAME is a reward, or `waiting` for the second table (`reward_waiting.py`). A file of CSV for each: DIR/NAME.csv.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.pages import filled
from benchmarks.reward_models import SUBJECTS, Subject, first_metric, images_and_prompts, subject
from benchmarks.reward_waiting import Waiting, measure_waiting, table_of_waiting
from benchmarks.tables import read_rows, stamp, write_rows
from benchmarks.timing import num_threads
from dgpo_fast.environment import num_cores, package_versions, processor_name
from dgpo_fast.rewards.base import Values

RESULTS = Path(__file__).parent / "results" / "reward-speed-cpu"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"
WAITING = "waiting"
NAMES = (*SUBJECTS, WAITING)
ONE_BY_ONE = 2
"""Images of a round that are scored one at a time: of each prompt one."""
MIN_ROUNDS = 3
TOLERANCE = 1e-4
"""Of a score, and of 1: float32 rounds a logit near 100 to 1e-5, and a batch's products are added in another order."""

Way = Literal["batched", "one by one"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of a reward in one way: medians of the rounds, and their range."""

    reward: str
    model: str
    weights: str
    way: Way
    images: int
    """Of a call."""
    threads: int
    rounds: int
    per_s: float
    per_s_low: float
    per_s_high: float
    per_core_s: float
    per_core_s_low: float
    per_core_s_high: float


class Turn(NamedTuple):
    """Images per second, and per second of a core."""

    per_s: float
    per_core_s: float


def measure(name: str, found: Subject, *, images: int, seconds: float) -> list[Speed]:
    """Both ways, from rounds in which each has its turn, until `seconds` have passed and three rounds are over."""
    batch_BCHW, prompts = images_and_prompts(images)
    few = [(batch_BCHW[place], prompts[place]) for place in range(0, images, -(-images // ONE_BY_ONE))]

    def batched() -> Values:
        return first_metric(found.reward(batch_BCHW, prompts))

    def one_by_one() -> Sequence[float]:
        return [found.one(image_CHW, prompt) for image_CHW, prompt in few]

    check(name, found)
    ways: dict[Way, tuple[Callable[[], Values], int, int]] = {
        "batched": (batched, images, num_cores()), "one by one": (one_by_one, len(few), 1),
    }  # fmt: skip
    turns: dict[Way, list[Turn]] = {way: [] for way in ways}
    end = time.perf_counter() + seconds
    while len(turns["batched"]) < MIN_ROUNDS or time.perf_counter() < end:
        for way, (call, num, threads) in ways.items():
            turns[way].append(_turn(call, num, threads))
    return [
        _speed(name, found, way, turns[way], images=num if way == "batched" else 1, threads=threads)
        for way, (_, num, threads) in ways.items()
    ]


def check(name: str, found: Subject) -> None:
    """Both ways give the same scores, or it raises: nothing is timed that is wrong."""
    images_BCHW, prompts = images_and_prompts(ONE_BY_ONE)
    ours = torch.as_tensor(first_metric(found.reward(images_BCHW, prompts)), dtype=torch.float32)
    ones = torch.tensor([found.one(*of_image) for of_image in zip(images_BCHW, prompts, strict=True)])
    torch.testing.assert_close(ours, ones, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{name}: {text}")


def _turn(call: Callable[[], object], num_images: int, threads: int) -> Turn:
    with num_threads(threads):
        passed, worked = time.perf_counter(), time.process_time()
        call()
        passed, worked = time.perf_counter() - passed, time.process_time() - worked
    return Turn(num_images / passed, num_images / worked)


def _speed(name: str, found: Subject, way: Way, turns: Sequence[Turn], *, images: int, threads: int) -> Speed:
    per_s, per_core_s = ([getattr(turn, field) for turn in turns] for field in Turn._fields)
    return Speed(
        reward=name, model=found.model, weights=found.weights, way=way, images=images, threads=threads,
        rounds=len(turns), per_s=median(per_s), per_s_low=min(per_s), per_s_high=max(per_s),
        per_core_s=median(per_core_s), per_core_s_low=min(per_core_s), per_core_s_high=max(per_core_s),
    )  # fmt: skip


def origin() -> dict[str, object]:
    """Where and when: columns of every row. The load is the mean of the last minute: processes that want a core."""
    return {
        "load": f"{os.getloadavg()[0]:.2f}", "processor": processor_name(), "cores": num_cores(),
        "torch": package_versions()["torch"], **stamp(),
    }  # fmt: skip


def write(rows: Iterable[Speed] | Iterable[Waiting], path: Path) -> None:
    """A row each, with its origin."""
    of_rows = [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in asdict(row).items()} | origin()
        for row in rows
    ]
    write_rows(path, of_rows)


def run(names: Sequence[str], out: Path, *, seconds: float, images: int) -> None:
    """Measures what is named, one after another: a model is gone before the next is made."""
    with tempfile.TemporaryDirectory() as files:
        for name in names:
            if name == WAITING:
                rows: list[Any] = measure_waiting(seconds=seconds)
            else:
                rows = measure(name, subject(name, Path(files)), images=images, seconds=seconds)
            write(rows, out / f"{name}.csv")
            for row in rows:
                print(row, flush=True)


# Tables


def tables(directory: Path = RESULTS) -> dict[str, str]:
    """What the page shows, by name, of the files that are there."""
    files = {name: directory / f"{name}.csv" for name in NAMES}
    rows = {name: read_rows(path) for name, path in files.items() if path.exists()}
    waiting = rows.pop(WAITING, [])
    return {"reward-speed": table_of_speed(rows), "reward-waiting": _with_origin(table_of_waiting(waiting), waiting)}


def table_of_speed(rows: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """A line for each reward: what is batched, what is one by one, and how many times the latter the former is."""
    lines = [
        "| reward | model | a batch | images/s | one by one | times | images per core-second | one by one | times |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of_reward in rows.items():
        ways = {row["way"]: row for row in of_reward}
        ours, ones = ways["batched"], ways["one by one"]
        cells = [f"`{name}`", ours["model"], ours["images"]]
        for rate in ("per_s", "per_core_s"):
            times = float(ours[rate]) / float(ones[rate])
            cells += [_rate(ours, rate), _rate(ones, rate), f"{times:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return _with_origin("\n".join(lines), [row for of_reward in rows.values() for row in of_reward])


def _rate(row: Mapping[str, str], name: str) -> str:
    middle, low, high = (_two_digits(float(row[f"{name}{end}"])) for end in ("", "_low", "_high"))
    return f"{middle} ({low} to {high})"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:#.2g}"


def _with_origin(table: str, rows: Sequence[Mapping[str, str]]) -> str:
    """The table, and below it where its rows were measured, and how busy the machine was."""
    if not rows:
        return table
    places = sorted({f"{row['processor']}, {row['cores']} cores, torch {row['torch']}" for row in rows})
    loads, dates, commits = (sorted({row[name] for row in rows}) for name in ("load", "date", "commit"))
    load = " to ".join(dict.fromkeys((min(loads, key=float), max(loads, key=float))))
    when = f"{' and '.join(dates)} at {', '.join(commits)}"
    return f"{table}\n\n{'; '.join(places)}; {when}; load of the machine {load}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure, and write CSV")
    running.add_argument("--out", type=Path, required=True, metavar="DIR")
    running.add_argument("--rewards", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    running.add_argument("--seconds", type=float, default=60.0, help="of rounds, three at least, for each NAME (60)")
    running.add_argument("--images", type=int, default=16, help="of a batch (16); GenEval's take 1.6 GB each, up to 8")
    showing = commands.add_parser("tables", help="print what the page shows")
    showing.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    commands.add_parser("write", help="put the tables into docs/rewards.md")
    options = parser.parse_args()
    if options.command == "write":
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
        return
    if options.command == "run":
        run(options.rewards, options.out, seconds=options.seconds, images=options.images)
        return
    for name, table in tables(options.results).items():
        print(f"{name}\n{table}\n")


if __name__ == "__main__":
    main()
