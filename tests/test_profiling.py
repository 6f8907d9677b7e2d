"""Ranges: how they nest, whom they are told to, and that nobody is asked anything where nobody watches."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

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


# Pictures and tables of profiles


@pytest.fixture
def from_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/ is no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def event(name: str, start_ms: float, end_ms: float, *, thread: int = 1, category: str = "user_annotation") -> object:
    return {"name": name, "ts": 1e3 * start_ms, "dur": 1e3 * (end_ms - start_ms), "tid": thread, "cat": category}


TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name"},
        event("train", 130, 200), event("rollout", 100, 125), event("step 0", 100, 112), event("step 1", 112, 125),
        event("block dual", 101, 103), event("reward", 100, 120, thread=2), event("policy", 130, 150),
        event("backward", 160, 190), event("block dual backward", 162, 180),
        event("aten::mm", 101, 102, category="cpu_op"), event("Optimizer.step#AdamW.step", 191, 192),
    ]
}  # fmt: skip


@pytest.mark.usefixtures("from_the_clone")
def test_a_picture_of_a_trace() -> None:
    from benchmarks.trace_chart import draw, find, read

    ranges = read(TRACE)
    assert [(each.name, each.start, each.end, each.depth) for each in ranges] == [
        ("rollout", 0, 25, 0), ("step 0", 0, 12, 1), ("block dual", 1, 3, 2), ("step 1", 12, 25, 1),
        ("train", 30, 100, 0), ("policy", 30, 50, 1), ("backward", 60, 90, 1), ("block dual backward", 62, 80, 2),
    ]  # fmt: skip
    assert find(ranges, "step 1")[1:] == (12, 25)
    assert find(ranges, "policy..backward")[1:] == (30, 90)
    with pytest.raises(SystemExit, match=r"no 'step 7', but .*'step 0'"):
        find(ranges, "step 7")
    picture = ElementTree.fromstring(draw(ranges, ["step 1", "policy..backward"]))
    titles = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert titles.count("step 1: 13.00 ms") == 2, "in the whole, and closer"
    assert titles.count("block dual backward: 18.00 ms") == 2


NCU = """\
==PROF== Connected to process 7 (python)
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",\
"sm__throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread"
"","","ns","byte","byte","%","register/thread"
"0","gemm","3,000","1,000","500","90","255"
"1","norm","500","2,000","2,000","10","32"
"2","gemm","1,000","1,000","500","50","255"
"3","copy","500","1","1","n/a","16"
"""


@pytest.mark.usefixtures("from_the_clone")
def test_the_hottest_kernels() -> None:
    from benchmarks.hottest_kernels import summary

    gemm, norm = summary(NCU.splitlines(), number=2)
    assert {key: gemm[key] for key in ("kernel", "launches", "ms", "share", "gbps")} == {
        "kernel": "gemm", "launches": "2", "ms": "0.004", "share": "0.8000", "gbps": "1",
    }  # fmt: skip
    assert (gemm["sm_percent"], gemm["registers"], gemm["dram_percent"]) == ("80.0", "255.0", "")
    assert (norm["kernel"], norm["share"], norm["gbps"]) == ("norm", "0.1000", "8")
    assert summary(NCU.splitlines(), number=5)[2]["sm_percent"] == ""
    with pytest.raises(SystemExit, match="did ncu find the kernels"):
        summary(["==WARNING== No kernels were profiled."], number=5)


def test_the_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "profiling.md").read_text()
    for path in re.findall(r"`((?:benchmarks|docs)/[\w./-]+)`|\]\((?!http)([\w./-]+)\)", page):
        assert any((folder / (path[0] or path[1])).exists() for folder in (ROOT, ROOT / "docs")), path
    for module in re.findall(r"python3? -m (benchmarks\.\w+)", page):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    (tree,) = re.findall(r"```text\n(window.*?)```", page, flags=re.DOTALL)
    named = {line.strip("│├└─ ").split("  ")[0] for line in tree.splitlines()}
    stages = {name for path in stages_of_the_page() for name in path.split("/")}
    blocks = {f"block {kind}{behind}" for kind in ("dual", "joint", "last") for behind in ("", " backward")}
    assert named >= stages - {"signals"}
    assert named - stages == blocks | {"window", "step 0"}


def stages_of_the_page() -> list[str]:
    with (ROOT / "benchmarks" / "results" / "cpu-2-cores-2026-11-29" / "profile_stages.csv").open() as file:
        return [row["stage"] for row in csv.DictReader(file)]
