"""How a training run looks while it runs: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from dgpo_fast.records import StepReport

PLAIN_INTERVAL_S = 5.0


class TrainingProgress:
    """Step, reward, images per second, last evaluation and time left, on stderr.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps already made before this process, by the run that it continues.
        enabled: False shows nothing: on ranks other than 0.
        console: where to show it; stderr if None.
    """

    def __init__(
        self, total_steps: int, start_step: int, *, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._total, self._start = total_steps, start_step
        self._console = console or Console(stderr=True, quiet=not enabled)
        self._evaluation = ""
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            columns = (
                TextColumn("step [bold]{task.completed:.0f}[/]/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def __enter__(self) -> TrainingProgress:
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, report: StepReport) -> None:
        """Shows a finished optimizer step."""
        parts = (f"reward {report.reward_mean:.3f}", f"{report.images_per_s:.1f} images/s", self._evaluation)
        description = "  ".join(part for part in (*parts, self._time_left(report.step)) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, description=description)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S or report.step in (self._start + 1, self._total):
            self._last_line = time.monotonic()
            self.print(f"step {report.step}/{self._total}  {description}")

    def evaluated(self, score: float) -> None:
        """Shows the held-out score, by which checkpoints are compared, from now on."""
        self._evaluation = f"held-out {score:.3f}"

    def print(self, message: str) -> None:
        """Shows a line of text, above the live line where there is one."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """`0:12:34 left`, from the mean duration of this process's steps: evaluations and checkpoints are in it."""
        seconds_per_step = (time.monotonic() - self._began) / (step - self._start)
        return f"{timedelta(seconds=round(seconds_per_step * (self._total - step)))} left"
