"""Scores of a batch of images: a recipe's rewards, weighted, with every failure met as the recipe says.

A reward that raises for a batch is asked again for what it owes, `rewards.retries` times, then for each image alone.
One that did not answer at all is not asked for each: that would take as long each time. A score that is not finite is
asked for once more, alone. What then has no score is a failed image: NaN, and no error until they are too many.

All of that together takes no more than `rewards.timeout_s`, which a reward elsewhere has in equal shares for each time
that it is asked for the batch: one that hangs is given up in time for the next. Before that somebody is told. One that
has answered before is then asked once for each of the next batches, and waited for no longer than until somebody is
told, until it answers again.
What runs in this process cannot be given up, so it is asked again only as long as there is time for a call such as the
longest so far.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from math import isfinite
from threading import Event, Thread, Timer
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dgpo_fast import launcher
from dgpo_fast.errors import UserError, suggest
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards.base import check_metric
from dgpo_fast.rewards.calling import MAX_REASON, START_S, Here, Metrics, Pace, Patience, Place, backoff
from dgpo_fast.rewards.places import place_of


class Failed(NamedTuple):
    """What of a reward failed, or did at first."""

    num_images: int
    reason: str  # of the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the images scored."""

    reward_B: Tensor  # float32, on the CPU; the weighted sum, NaN where one of the rewards failed
    term_BT: Tensor  # float32, likewise; what is summed, without its weight, in the recipe's order
    metrics: Mapping[str, Tensor]  # float32 [B] each
    failed: Mapping[str, Failed]  # by reward, those that failed
    retried: Mapping[str, Failed]  # by reward, those that scored only when they were asked for again


class Measured(NamedTuple):
    """What the rewards gave for a batch."""

    metrics: Mapping[str, Sequence[Metrics | None]]  # by reward, of each image; None where it failed
    failed: Mapping[str, Failed]
    retried: Mapping[str, Failed]
    num_failed: int  # images that some reward of the terms failed for


class Scorer:
    """The rewards of a recipe, ready to score; to be closed, which ends what runs for them.

    Args:
        device: the policy's; None leaves images on whatever they are on, and has the package's own rewards on the CPU.

    Raises:
        UserError: a reward cannot be made where the recipe wants it.
    """

    def __init__(self, config: RewardsConfig, *, device: torch.device | None = None) -> None:
        self.config = config
        self.stop = Event()
        """Set where nobody waits for scores any more."""
        self.metric_names: dict[str, Sequence[str]] = {}
        """Of each reward that has scored an image, in the order in which they first came: the first is what a term
        without a metric is of, whatever order later ones come in."""
        self._is_closed = False
        self.asked: Sequence[str] = config.trained
        """Rewards that images are measured by: those of the terms."""
        self.places: dict[str, Place] = {}
        self.paces: defaultdict[str, Pace] = defaultdict(Pace)
        """By name; of those that run elsewhere something is known."""
        try:
            for term in config.terms:
                check_metric(term)
            for name in config.names:
                self.places[name] = place_of(name, config, device=device, stop=self.stop)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._is_closed = True
        self.stop.set()
        for place in self.places.values():
            place.close()

    @property
    def with_monitors(self) -> Self:
        """The same rewards, and the recipe's monitors beside them, whose failures are told and count for nothing."""
        beside = copy(self)
        beside.asked = self.config.names
        return beside

    def resume(self) -> None:
        """Has somebody wait for scores again, once nobody did.

        Raises:
            RuntimeError: it is closed.
        """
        self._refuse_closed()
        self.stop.clear()

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of `images_BCHW`, a prompt each.

        Raises:
            UserError: as `measure` and `combine`; or more of these images failed than the recipe allows.
        """
        scores = self.combine([self.measure(images_BCHW, prompts)])
        num_failed = int((~scores.reward_B.isfinite()).sum())
        refuse_failures(scores.failed, num_failed, total=len(prompts), config=self.config)
        return scores

    def measure(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Measured:
        """What the rewards give for a batch of images, a prompt each.

        Those that run elsewhere are asked at the same time, those of this process one after the other meanwhile.

        Raises:
            UserError: a reward returns the wrong number of scores or lacks the recipe's metric, or says so itself.
            Abandoned: nobody waits any more.
            RuntimeError: it is closed.
        """
        self._refuse_closed()
        is_away = {name: self.places[name].is_elsewhere for name in self.asked}
        on_cpu = images_BCHW.cpu() if any(is_away.values()) else images_BCHW
        inquiries = {
            name: _Inquiry(self, name, on_cpu if is_away[name] else images_BCHW, prompts) for name in self.asked
        }
        threads = {
            name: Thread(target=inquiry.carry_out, daemon=True) for name, inquiry in inquiries.items() if is_away[name]
        }
        for thread in threads.values():
            thread.start()
        for name, inquiry in inquiries.items():
            if not is_away[name]:
                inquiry.carry_out()
                inquiry.check()
        for name, thread in threads.items():
            thread.join()
            inquiries[name].check()
        lacking = {name: inquiry.lacking() for name, inquiry in inquiries.items()}
        return Measured(
            metrics={name: inquiry.found for name, inquiry in inquiries.items()},
            failed={name: Failed(len(rows), inquiries[name].reason) for name, rows in lacking.items() if rows},
            retried={name: inquiry.retried for name, inquiry in inquiries.items() if inquiry.retried.num_images > 0},
            num_failed=len({row for name in self.config.trained for row in lacking[name]}),
        )

    def combine(self, measured: Sequence[Measured]) -> Scores:
        """Scores of all the images that were measured, in their order.

        The metrics of a reward that has never scored an image are not there. A name that another reward's metric has
        already, and that of any metric of a monitor, begins with the reward's.

        Raises:
            UserError: a reward's metrics are not always the same.
        """
        rows = {name: [row for batch in measured for row in batch.metrics[name]] for name in self.asked}
        found = {name: self._join(name, rows[name]) for name in self.asked}
        chosen = [_chosen(term, found[term.name], len(rows[term.name])) for term in self.config.terms]
        weighted = [term.weight * score_B for term, score_B in zip(self.config.terms, chosen, strict=True)]
        metrics: dict[str, Tensor] = {}
        for name, scores in found.items():
            own = ({name} if name in self.config.monitors else scores.keys()) - metrics.keys()
            metrics |= {metric if metric in own else f"{name}.{metric}": score for metric, score in scores.items()}
        return Scores(
            reward_B=torch.stack(weighted).sum(0),
            term_BT=torch.stack(chosen, dim=1),
            metrics=metrics,
            failed=total_failures([batch.failed for batch in measured]),
            retried=total_failures([batch.retried for batch in measured]),
        )

    def check_hang(self) -> None:
        """Raises where a reward of this process has been at a batch for longer than it may.

        Raises:
            UserError: it has, and there is no other way to stop it than to end the run.
        """
        for name, place in self.places.items():
            if isinstance(place, Here) and place.is_overdue:
                raise UserError(
                    f"rewards: {name!r} has not answered within {self.config.timeout_s:g} s (rewards.timeout_s), and "
                    f"cannot be stopped in this process; one of its own can: rewards.running.{name}.processes=1"
                )

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise RuntimeError("rewards: this Scorer is closed, and what ran for it has ended; make another")

    def _join(self, name: str, rows: Sequence[Metrics | None]) -> dict[str, Tensor]:
        """The metrics of a reward for all images, NaN where it failed; none where it has never scored."""
        expected = self.metric_names.get(name, [])
        scored = [row for row in rows if row is not None]
        for row in scored:
            if row.keys() != set(expected):
                raise UserError(
                    f"rewards: {name!r} returned metrics {', '.join(expected)} for some images and {', '.join(row)} "
                    "for others; expected the same for all"
                )
        return {
            metric: torch.tensor([torch.nan if row is None else row[metric] for row in rows], dtype=torch.float32)
            for metric in expected
        }


class _Inquiry:
    """One reward asked for a batch of images until it has answered for all, or is given up.

    Args:
        images_BCHW: where its place wants them.
    """

    def __init__(self, scorer: Scorer, name: str, images_BCHW: Tensor, prompts: Sequence[str]) -> None:
        self.found: list[Metrics | None] = [None] * len(prompts)
        self.reason = ""
        """Of the last failure."""
        self._error: BaseException | None = None
        self._hung: set[int] = set()
        self._name, self._images_BCHW, self._prompts = name, images_BCHW, prompts
        self._place, self._config, self._stop = scorer.places[name], scorer.config, scorer.stop
        self._terms = [term for term in scorer.config.terms if term.name == name]
        self._metric_names = scorer.metric_names
        self._pace = scorer.paces[name]
        self._at_first = Failed(0, "")
        self._was_gone = False
        """Whether it answers no more, as far as the batch before has shown."""

    def carry_out(self) -> None:
        """Asks; what goes wrong beyond a failure is for `check` to raise, perhaps in another thread."""
        try:
            self._ask_for_all()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raises what went wrong; a mistake in a monitor is one more failure."""
        if isinstance(self._error, UserError) and not self._terms:
            self.reason, self.found = str(self._error), [None] * len(self.found)
        elif self._error is not None:
            raise self._error

    def lacking(self) -> list[int]:
        """Images without a score that can be trained on."""
        return [row for row in range(len(self.found)) if not self._is_finite(row)]

    @property
    def retried(self) -> Failed:
        """Those that have a score and had none when they were first asked for, and why they had none."""
        return self._at_first._replace(num_images=self._at_first.num_images - len(self.lacking()))

    def _ask_for_all(self) -> None:
        whole = Patience(self._config.timeout_s, self._stop, start_s=START_S)
        self._was_gone = self._pace.has_hung and self._pace.longest_s > 0
        self._ask(range(len(self._prompts)), self._share(whole))
        self._at_first = Failed(len(self.lacking()), self.reason)
        for attempt in range(self._config.retries):
            is_gone = self._was_gone and self._pace.has_hung
            if (unanswered := self._unanswered()) and whole.has_time_for_a_call and not is_gone:
                share = self._share(whole)
                share.sleep(backoff(attempt))
                self._ask(unanswered, share)
        if self._config.retries:
            unanswered = [row for row in self._unanswered() if row not in self._hung]
            self._ask_one_by_one(unanswered if len(unanswered) > 1 else [], whole)
            self._ask_one_by_one([row for row in self.lacking() if self.found[row] is not None], whole)

    def _ask_one_by_one(self, rows: Sequence[int], whole: Patience) -> None:
        """Each for which there is time."""
        for row in rows:
            if whole.has_time_for_a_call:
                self._ask([row], self._share(whole))
        whole.check()

    def _share(self, whole: Patience) -> Patience:
        """For one time that the reward is asked."""
        if not self._place.is_elsewhere:
            return whole
        share_s = self._config.timeout_s / (1 + self._config.retries)
        return whole.part(min(share_s, self._pace.late_s) if self._was_gone else share_s)

    def _ask(self, rows: Sequence[int], patience: Patience) -> None:
        patience.check()
        is_whole = len(rows) == len(self._prompts)
        images_BCHW = self._images_BCHW if is_whole else self._images_BCHW[list(rows)]
        prompts = [self._prompts[row] for row in rows]
        if self._place.is_elsewhere:
            began, started_s = time.monotonic(), patience.whole.started_s
            with self._said_where_late(patience):
                answers = self._place.ask(images_BCHW, prompts, patience)
            starts_s = patience.whole.started_s - started_s
            self._pace.answered(answers, time.monotonic() - began - starts_s)
        else:
            answers = self._place.ask(images_BCHW, prompts, patience)
        remaining = iter(rows)
        for answer in answers:
            mine = [next(remaining) for _ in range(answer.num_images)]
            if answer.failure is not None:
                self.reason = " ".join(answer.failure.reason.split())[:MAX_REASON]
                self._hung.update(mine if answer.failure.is_hang else [])
            for row, metrics in zip(mine, answer.metrics or [], strict=False):
                self._take(row, metrics)

    @contextmanager
    def _said_where_late(self, patience: Patience) -> Iterator[None]:
        """Tells who watches that an answer is late, once until one comes."""
        timer = Timer(self._pace.late_s, self._say_that_it_is_late, [patience])
        timer.daemon = True
        if not self._pace.is_said:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _say_that_it_is_late(self, patience: Patience) -> None:
        self._pace.is_said = True
        of_rank = f" (rank {launcher.rank()})" if launcher.world_size() > 1 else ""
        late = f"rewards: {self._name!r} has not answered for {self._pace.late_s:.0f} s{of_rank}"
        what = "its process is starting" if patience.whole.is_starting else f"given up after {patience.left:.0f} s more"
        print(f"{late}; {what}", file=sys.stderr, flush=True)

    def _take(self, row: int, metrics: Metrics) -> None:
        expected = self._metric_names.setdefault(self._name, list(metrics))
        if not self._terms and metrics.keys() != set(expected):  # of a monitor; of a term it ends the run
            self.reason = f"returned metrics {', '.join(metrics)}, expected {', '.join(expected)}"
            return
        self.found[row] = metrics
        for term in self._terms:
            metric = self._chosen(term)
            if metric not in metrics:
                raise UserError(f"rewards: {term.name!r} has no metric {metric!r}{suggest(metric, metrics)}")
            if not isfinite(metrics[metric]):
                self.reason = f"returned {metrics[metric]}"

    def _is_finite(self, row: int) -> bool:
        metrics = self.found[row]
        return metrics is not None and all(isfinite(metrics[self._chosen(term)]) for term in self._terms)

    def _chosen(self, term: RewardConfig) -> str:
        return term.metric or self._metric_names[self._name][0]

    def _unanswered(self) -> list[int]:
        return [row for row, metrics in enumerate(self.found) if metrics is None]


def total_failures(of_parts: Iterable[Mapping[str, Failed]]) -> dict[str, Failed]:
    """What failed of each reward over all parts, with the reason of the last."""
    total: dict[str, Failed] = {}
    for failed in of_parts:
        for name, part in failed.items():
            before = total[name].num_images if name in total else 0
            total[name] = Failed(before + part.num_images, part.reason)
    return total


def describe_failures(failed: Mapping[str, Failed], *, total: int) -> str:
    """Which rewards failed for how many of `total` images, and why last, in one line."""
    parts = [
        f"{name!r} failed for {part.num_images} of {total} images, last: {part.reason}" for name, part in failed.items()
    ]
    return f"rewards: {'; '.join(parts) or 'weighted sums are not finite'}"


def describe_retries(retried: Mapping[str, Failed]) -> str:
    """Which rewards had to be asked again for some images, and why last, in one line."""
    parts = [
        f"{name!r} for {part.num_images} images, {part.reason}{_fewer_at_once(name, part.reason)}"
        for name, part in retried.items()
    ]
    return f"rewards were asked again, which takes longer: {'; '.join(parts)}"


def _fewer_at_once(name: str, reason: str) -> str:
    fewer = f" (rewards.running.{name}.images_per_call=N gives it fewer images at once)"
    return fewer if reason.startswith("OutOfMemoryError") else ""


def refuse_failures(failed: Mapping[str, Failed], num_failed: int, *, total: int, config: RewardsConfig) -> None:
    """Makes sure that enough images have a reward.

    Args:
        failed: by reward, for the message.
        num_failed: images without a reward.
        total: images that there are, or will be.

    Raises:
        UserError: more failed than `rewards.max_failed_share`, or all.
    """
    line = describe_failures(failed, total=total)
    if num_failed > config.max_failed_share * total:
        share = f"{num_failed / total:.1%} of the images have no reward"
        raise UserError(f"{line}; {share}, more than rewards.max_failed_share={config.max_failed_share:g}")
    if num_failed == total:
        raise UserError(f"{line}; no image has a valid reward")


def _chosen(term: RewardConfig, scores: Mapping[str, Tensor], count: int) -> Tensor:
    """The metric that a term is of, float32 [B], NaN where it is not finite."""
    if not scores:
        return torch.full((count,), torch.nan)
    score_B = scores[term.metric or next(iter(scores))]
    return score_B.masked_fill(~score_B.isfinite(), torch.nan)
