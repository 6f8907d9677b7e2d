"""The progress display on a terminal, elsewhere, and on ranks that show nothing."""

from __future__ import annotations

import dataclasses
import io
import itertools
import time

import pytest
from rich.console import Console

from dgpo_fast.progress import PLAIN_INTERVAL_S, TrainingProgress
from dgpo_fast.records import StepReport


def report(step: int) -> StepReport:
    """A step of which only what the display shows is set."""
    unseen = dict.fromkeys((field.name for field in dataclasses.fields(StepReport)), 0)
    return StepReport(**{**unseen, "step": step, "reward_mean": step / 128, "images_per_s": 24.06})  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def plain() -> Console:
    return Console(file=io.StringIO(), width=60)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_come_every_few_seconds_and_at_both_ends(clock: list[float]) -> None:
    console = plain()
    with TrainingProgress(20, 10, console=console) as progress:
        for step in range(11, 21):
            clock[0] += 2.0
            progress.update(report(step))
    steps = [int(line.split()[1].split("/")[0]) for line in shown(console).splitlines()]
    assert steps == [11, 14, 17, 20]
    assert all(after - before >= PLAIN_INTERVAL_S / 2.0 for before, after in itertools.pairwise(steps))


def test_a_line_says_reward_speed_last_score_and_time_left(clock: list[float]) -> None:
    console = plain()
    with TrainingProgress(100, 50, console=console) as progress:
        progress.evaluated(0.71)
        clock[0] += 2.5
        progress.update(report(51))
        progress.print("saved [bold]checkpoint")
    line = "step 51/100  reward 0.398  24.1 images/s  held-out 0.710  0:02:02 left"
    assert shown(console).splitlines() == [line, "saved [bold]checkpoint"]


def test_a_terminal_shows_one_live_line() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with TrainingProgress(3, 0, console=console) as progress:
        for step in (1, 2, 3):
            progress.update(report(step))
    assert "reward 0.023  24.1 images/s  0:00:00 left" in shown(console)
    assert shown(console).count("\n") == 1


def test_other_ranks_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(3, 0, enabled=False) as progress:
        progress.update(report(1))
        progress.print("message")
    assert capfd.readouterr() == ("", "")


def test_stdout_is_left_to_results(capfd: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(3, 0) as progress:
        progress.update(report(1))
    out, err = capfd.readouterr()
    assert out == "" and "step 1/3" in err
