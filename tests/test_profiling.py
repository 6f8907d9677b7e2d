"""Ranges: how they nest, whom they are told to, and that nobody is asked anything where nobody watches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dgpo_fast import profiling
from dgpo_fast.profiling import Category, StageClock, span, stage, use_clock, watched_by

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc")


class Timeline:
    """A watcher that writes ranges down as a tree, a pair of blanks to each level."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    @contextmanager
    def __call__(self, name: str, category: Category) -> Iterator[None]:
        self.lines.append(f"{'  ' * self._depth}{name} [{category}]")
        self._depth += 1
        yield
        self._depth -= 1


def work() -> None:
    with stage("rollout"):
        for number in range(2):
            with span(f"step {number}", "solver step"):
                with stage("transformer"), span("block dual", "block"):
                    pass
                with stage("solver"):
                    pass


TREE = ["rollout [stage]"] + [
    line
    for number in range(2)
    for line in (
        f"  step {number} [solver step]", "    transformer [stage]", "      block dual [block]", "    solver [stage]",
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_clock() -> Iterator[StageClock]:
    clock = StageClock()
    use_clock(clock)
    yield clock
    use_clock(StageClock())


def test_ranges_nest_and_say_what_they_are(own_clock: StageClock) -> None:
    first, second = Timeline(), Timeline()
    with watched_by(first):
        work()
        with watched_by(second):
            work()
        work()
    work()
    assert first.lines == 3 * TREE
    assert second.lines == TREE
    assert own_clock.calls == {("rollout",): 4, ("rollout", "transformer"): 8, ("rollout", "solver"): 8}, "no spans"


def test_a_range_ends_where_its_work_fails() -> None:
    timeline = Timeline()

    @contextmanager
    def watch(name: str, category: Category) -> Iterator[None]:
        try:
            with timeline(name, category):
                yield
        except ZeroDivisionError:
            timeline.lines.append(f"{name} failed")
            raise

    with watched_by(watch), pytest.raises(ZeroDivisionError), span("step 0", "solver step"):
        _ = 1 / 0
    assert timeline.lines == ["step 0 [solver step]", "step 0 failed"]
    assert profiling._watchers == ()


class Untouched:
    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} was asked for")


def test_nothing_is_called_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_domain", Untouched())
    monkeypatch.setattr(profiling, "_watched", Untouched())
    assert profiling._watchers == ()
    work()
    assert span("step 0", "solver step") is span("block dual", "block"), "nothing is made"


def test_a_span_waits_for_nothing() -> None:
    """It may lie in the capture of a CUDA graph, where the device must not be waited for."""

    def wait() -> None:
        raise AssertionError("waited")

    use_clock(StageClock(synchronize=wait, exact=True))
    with watched_by(Timeline()), span("step 0", "solver step"), span("block dual", "block"):
        pass


@pytest.mark.own_process
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="the tool has to be compiled, for Linux")
def test_a_tool_that_is_attached_sees_every_range(tmp_path: Path) -> None:
    """Attached as Nsight is, by NVTX itself. Capture ranges want registered names."""
    tool = tmp_path / "tool.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", tool, ROOT / "tests" / "nvtx_recorder.c"], check=True)
    seen = subprocess.run(
        [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['work']()", __file__],
        env={**os.environ, "NVTX_INJECTION64_PATH": str(tool)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    lines, depth = [], 0
    for line in seen.splitlines():
        kind, domain, *rest = line.split(" ", 2)
        assert domain == "dgpo_fast"
        if kind == "pop":
            depth -= 1
            continue
        category, name = rest[0].split("] registered ")
        lines.append(f"{'  ' * depth}{name} {category}]")
        depth += 1
    assert (lines, depth) == (TREE, 0)
