"""The run directory: everything a run writes besides its checkpoints. Rank 0 writes, the others are silent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from dgpo_fast.checkpoint import list_checkpoints, remove_left_overs, step_of
from dgpo_fast.config import Config, dump_config, load_recipe, resume_conflicts
from dgpo_fast.environment import describe_environment
from dgpo_fast.errors import UserError
from dgpo_fast.files import write_atomically
from dgpo_fast.guard import Finding, Guard
from dgpo_fast.metrics import MetricsLog
from dgpo_fast.profiling import StageClock, stage
from dgpo_fast.progress import TrainingProgress
from dgpo_fast.records import StepReport
from dgpo_fast.report import write_report
from dgpo_fast.samples import save_grid


class RunDirectory:
    """An open run directory; entered by the trainer, and left with an up-to-date report.html.

    What is logged passes the guard, on every rank.

    Args:
        out: created where it does not exist.
        config: written to config.yaml.
        guard: as the checkpoint left it that the run goes on from.
        clock: whose stages go to stages.json.
        start_step: steps made before this process.
        past: lines of evaluations.jsonl up to there, which the guard sees again.
        resumed: whether the run goes on: its logs are then cut back to `start_step`, which may be 0, not begun anew.
        is_first: whether this process is rank 0.

    Raises:
        UserError: `out` cannot be written.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        guard: Guard,
        *,
        clock: StageClock,
        start_step: int,
        past: Sequence[Mapping[str, Any]],
        resumed: bool,
        is_first: bool,
    ) -> None:
        self.out, self.config, self.guard, self.clock, self.is_first = out, config, guard, clock, is_first
        self._past = past  # a checkpoint does not know the last of them: it is saved before its step is evaluated
        self.progress = TrainingProgress(config.steps, start_step, enabled=is_first)
        if not is_first:
            return
        logging = config.logging
        try:
            with ExitStack() as opened:
                (out / "samples").mkdir(parents=True, exist_ok=True)
                # Before all else that is written: the logs are locked, and another run's directory is left alone.
                self._log = MetricsLog(
                    out, config=config.model_dump(mode="json"), tensorboard=logging.tensorboard, wandb=logging.wandb,
                    resume_step=start_step if resumed else None,
                )  # fmt: skip
                opened.callback(self._log.close)
                _refuse_newer(out, start_step)
                remove_left_overs(out)
                write_atomically(out / "config.yaml", dump_config(config).encode())  # without it no run can be resumed
                (out / "environment.json").write_text(json.dumps(describe_environment(), indent=2) + "\n")
                opened.pop_all()
        except OSError as error:
            raise UserError(f"cannot write the run directory {out}: {error.strerror}") from None

    def __enter__(self) -> RunDirectory:
        self.progress.__enter__()
        for line in self._past:
            self._watch_evaluation(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        if not self.is_first:
            return
        try:
            self._log.close()
        except Exception as failed:  # whatever Weights & Biases may raise
            self.say(f"{self.out}: a log was not closed: {type(failed).__name__}: {failed}")
        try:
            seconds = {"/".join(path): round(value, 3) for path, value in sorted(self.clock.seconds.items())}
            (self.out / "stages.json").write_text(json.dumps(seconds, indent=2) + "\n")
            write_report(self.out)
        except Exception as failed:  # all that was learnt is saved: the run ends as it would have, and says why it does
            if kind is None and not isinstance(failed, OSError | UserError):
                raise
            self.say(f"{self.out}: the report was not written: {type(failed).__name__}: {failed}")

    def log_step(self, report: StepReport) -> None:
        """A line of metrics.jsonl, the progress display, and what the guard says to it."""
        if self.is_first:
            with stage("logging"):
                with self._written():
                    self._log.write(report)
                self.progress.update(report)
            if report.grad_norm is not None and not math.isfinite(report.grad_norm):
                self.say(
                    f"step {report.step} was not made: its gradient is not finite; with more than "
                    f"{self.config.optimizer.max_skipped} such in a row (optimizer.max_skipped) the run ends"
                )
        self._warn(self.guard.observe(report))

    def log_evaluation(
        self, step: int, *, num_prompts: int, base: dict[str, float], tuned: dict[str, float], score: float
    ) -> None:
        """A line of evaluations.jsonl, `score` in the progress display, and what the guard says to it."""
        images_per_prompt = self.config.evaluation.images_per_prompt
        if self.is_first:
            with self._written():
                self._log.write_evaluation(
                    step, num_prompts=num_prompts, images_per_prompt=images_per_prompt,
                    base=base, tuned=tuned,
                )  # fmt: skip
            self.progress.evaluated(score)
        num_images = num_prompts * images_per_prompt
        self._warn(self.guard.observe_evaluation(step, num_images=num_images, base=base, tuned=tuned))

    def save_samples(self, step: int, images_BCHW: Tensor, prompts: list[str]) -> None:
        """samples/step-NNNNNN.png."""
        if self.is_first:
            with stage("logging"), self._written():
                path = self.out / "samples" / f"step-{step:06d}.png"
                save_grid(images_BCHW, prompts, path)
                self._log.write_samples(step, grid=path)

    def say(self, line: str) -> None:
        """A line, or some, for the person who watches."""
        if self.is_first:
            self.progress.print(line)

    def _watch_evaluation(self, line: Mapping[str, Any]) -> None:
        num_images = line["num_prompts"] * line["images_per_prompt"]
        self._warn(
            self.guard.observe_evaluation(line["step"], num_images=num_images, base=line["base"], tuned=line["tuned"])
        )

    def _warn(self, findings: Sequence[Finding]) -> None:
        """Lines of warnings.jsonl, and on stderr."""
        for finding in findings:
            self.say(finding.line)
            if self.is_first:
                with self._written():
                    self._log.write_finding(finding)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """What cannot be written, as on a full disk, ends the run with a line that says how it goes on."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.out}: {error.strerror or error}; checkpoints are intact, and "
                "--resume goes on from the last of them"
            ) from error


def _refuse_newer(out: Path, start_step: int) -> None:
    """Makes sure that nobody went on while this process loaded, and perhaps waited for the lock."""
    checkpoints = list_checkpoints(out)
    if checkpoints and step_of(checkpoints[-1]) > start_step:
        raise UserError(f"{out}: another process has saved {checkpoints[-1].name} meanwhile; start again")


def begun_with(out: Path, wanted: Config) -> str | None:
    """The commit of the model that the run in `out` began with, if its model has one, once it may go on as `wanted`.

    Raises:
        UserError: `out` is no run, or a setting differs that would make it another run; every such key is named.
    """
    if not (out / "config.yaml").is_file():
        raise UserError(f"nothing to resume in {out}: it has no config.yaml")
    saved, has_begun = load_recipe(out / "config.yaml"), bool(list_checkpoints(out))
    commit = saved.model.commit
    if wanted.model.commit is None:
        wanted = wanted.at_commit(commit)
    conflicts = resume_conflicts(saved, wanted, has_begun=has_begun)
    if conflicts:
        raise UserError(
            f"--resume cannot change {'; '.join(conflicts)}. Start a new run with another --out, or go on as it was: "
            f"dgpo-fast train {out / 'config.yaml'} --out {out} --resume"
        )
    return commit
