"""What an evaluation found: base and tuned model on the same prompts from the same noise, as JSON, table and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from dgpo_fast.errors import UserError
from dgpo_fast.metrics import json_number
from dgpo_fast.statistics import LEVEL, Comparison, Estimate, Floats, compare

INTERVAL = f"{LEVEL:.0%} interval".replace("%", " %")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of every image, by metric: float64 [P prompts, I images of each], NaN where a reward failed."""

    run: str
    """Name of the run's directory."""
    step: int
    """Of the checkpoint."""
    split: str
    source: str
    """Of the prompts."""
    prompts: tuple[str, ...]
    images_per_prompt: int
    base: Mapping[str, Floats]
    tuned: Mapping[str, Floats]
    by: str | None = None
    """A key of the prompts' metadata, which all of them have: kinds of prompts are also told apart."""

    @property
    def kinds(self) -> dict[str, Evaluation]:
        """The same of the prompts of each kind, by the value of the key, in the order in which kinds come first."""
        of_prompt = [kind_of(prompt, self.by) for prompt in self.prompts] if self.by is not None else []
        found = {}
        for kind in dict.fromkeys(of_prompt):
            rows = [number for number, other in enumerate(of_prompt) if other == kind]
            base, tuned = ({name: values[rows] for name, values in side.items()} for side in (self.base, self.tuned))
            prompts = tuple(self.prompts[row] for row in rows)
            found[kind] = replace(self, prompts=prompts, base=base, tuned=tuned, by=None)
        return found

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """What each metric says."""
        return {metric: compare(base_PI, self.tuned[metric]) for metric, base_PI in self.base.items()}

    def as_json(self) -> dict[str, Any]:
        """What `dgpo-fast eval --json` prints; null where there is no number.

        `base` and `tuned` are means over the images that have a score from both; without failures they are those of an
        evaluation during training.
        """
        found = self.comparisons
        by_kind = {} if self.by is None else {"by": self._kinds_as_json()}
        return {
            "split": self.split,
            "num_prompts": len(self.prompts),
            **_means(found),
            "base_interval": {metric: _ends(one.base) for metric, one in found.items()},
            "tuned_interval": {metric: _ends(one.tuned) for metric, one in found.items()},
            "difference": {metric: _difference(one) for metric, one in found.items()},
            "images_per_prompt": self.images_per_prompt,
            "prompts": self.source,
            "step": self.step,
            **by_kind,
        }

    def _kinds_as_json(self) -> dict[str, Any]:
        found = {kind: (len(of.prompts), of.comparisons) for kind, of in self.kinds.items()}
        means = _means_of_kinds([comparisons for _, comparisons in found.values()])
        return {
            "key": self.by,
            "kinds": {
                kind: {
                    "num_prompts": num_prompts,
                    **_means(comparisons),
                    "difference": {metric: _difference(each) for metric, each in comparisons.items()},
                }
                for kind, (num_prompts, comparisons) in found.items()
            },
            "mean_of_kinds": {
                side: {metric: json_number(of[place]) for metric, of in means.items()}
                for place, side in enumerate(("base", "tuned"))
            },
        }

    def as_csv(self) -> str:
        """A line for each image of each model; a metric is empty where it failed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        by = [] if self.by is None else [self.by]
        writer.writerow(["number", "image", "model", *self.base, *by, "prompt"])
        for number, prompt in enumerate(self.prompts):
            kind = [kind_of(prompt, key) for key in by]
            for image in range(self.images_per_prompt):
                for model, metrics in (("base", self.base), ("tuned", self.tuned)):
                    scores = [_cell(values_PI[number, image]) for values_PI in metrics.values()]
                    writer.writerow([number, image, model, *scores, *kind, prompt])
        return text.getvalue()

    def as_table(self) -> Table:
        """A row for each metric, for a terminal."""
        found, each = self.comparisons, self.images_per_prompt
        title = f"{len(self.prompts)} prompts of {self.source} x {each} images, step {self.step}"
        # Without lines between columns: seven of them, with intervals, then fit into 80 characters too.
        table = Table(
            title=escape(title), title_justify="left", caption=escape(_caption(found)), caption_justify="left",
            box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
        )  # fmt: skip
        table.add_column("metric", overflow="fold", min_width=len("unifiedreward"))
        for column in ("base", "tuned", "change", INTERVAL, "p"):
            table.add_column(column, justify="right", no_wrap=column != INTERVAL)
        table.add_column("win rate", justify="right", min_width=len("100 %"))
        for metric, one in found.items():
            table.add_row(escape(metric), *_cells(one, _decimals(one.change)))
        return table

    def as_table_by_kind(self) -> Table:
        """For each metric a row for each kind of prompts, and their mean."""
        table = Table(
            title=escape(f"by {self.by}"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        table.add_column("metric", overflow="fold")
        table.add_column(escape(str(self.by)), overflow="fold")
        for column in ("prompts", "base", "tuned", "change", INTERVAL):
            table.add_column(column, justify="right", no_wrap=column != INTERVAL)
        found = {kind: (len(of.prompts), of.comparisons) for kind, of in self.kinds.items()}
        of_all, means = self.comparisons, _means_of_kinds([comparisons for _, comparisons in found.values()])
        for metric, (base, tuned) in means.items():
            name, digits = escape(metric), _decimals(of_all[metric].change)
            for kind, (num_prompts, comparisons) in found.items():
                table.add_row(name, escape(kind), str(num_prompts), *_cells(comparisons[metric], digits)[:4])
                name = ""
            mean = (f"{base:.{digits}f}", f"{tuned:.{digits}f}", f"{tuned - base:+.{digits}f}", "")
            table.add_row("", "mean of these", "", *mean, style="bold", end_section=True)
        return table


def kind_of(prompt: str, key: str) -> str:
    """The prompt's kind: what its metadata say of `key`.

    Raises:
        UserError: nothing.
    """
    metadata: Mapping[str, Any] = getattr(prompt, "metadata", {})
    if key not in metadata:
        known = f"; its metadata have {', '.join(metadata)}" if metadata else ", and no metadata"
        raise UserError(f"--by {key}: the prompt {str(prompt)!r} has none{known}")
    return str(metadata[key])


def _means(found: Mapping[str, Comparison]) -> dict[str, dict[str, float | None]]:
    return {
        "base": {metric: json_number(one.base.mean) for metric, one in found.items()},
        "tuned": {metric: json_number(one.tuned.mean) for metric, one in found.items()},
    }


def _means_of_kinds(kinds: Sequence[Mapping[str, Comparison]]) -> dict[str, tuple[float, float]]:
    """Of each metric the mean of the kinds' means, base's and tuned: every kind counts alike, as in GenEval."""
    return {
        metric: (fmean(of[metric].base.mean for of in kinds), fmean(of[metric].tuned.mean for of in kinds))
        for metric in kinds[0]
    }


def format_p(p: float) -> str:
    """A p-value for people."""
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _cells(one: Comparison, digits: int) -> list[str]:
    known = not math.isnan(one.change.low)
    return [
        f"{one.base.mean:.{digits}f}",
        f"{one.tuned.mean:.{digits}f}",
        f"{one.change.mean:+.{digits}f}",
        f"{one.change.low:+.{digits}f} to {one.change.high:+.{digits}f}" if known else "-",
        format_p(one.p),
        _win_rate(one.win_rate),
    ]


def _win_rate(rate: Estimate) -> str:
    if math.isnan(rate.mean):
        return "-"
    return f"{100 * rate.mean:.0f} % ({100 * rate.low:.0f}-{100 * rate.high:.0f})"


def _decimals(change: Estimate) -> int:
    """Three, or as many more as half the interval has two digits with."""
    half = (change.high - change.low) / 2
    return min(6, max(3, 1 + math.ceil(-math.log10(half)))) if half > 0 else 3


def _caption(found: Mapping[str, Comparison]) -> str:
    caption = "same noise for both; intervals and p by prompts; win rate: prompts that are better when tuned"
    failed = {metric: one.num_failed for metric, one in found.items() if one.num_failed}
    if failed:
        counts = ", ".join(f"{count} of {metric}" for metric, count in failed.items())
        caption += f"\nleft out, since base or tuned has no score: {counts}"
    return caption


def _difference(one: Comparison) -> dict[str, Any]:
    return {
        "mean": json_number(one.change.mean),
        "low": json_number(one.change.low),
        "high": json_number(one.change.high),
        "p": json_number(one.p),
        "win_rate": json_number(one.win_rate.mean),
        "win_rate_interval": _ends(one.win_rate),
        "num_prompts": one.num_prompts,
        "num_pairs": one.num_pairs,
        "num_failed": one.num_failed,
    }


def _ends(estimate: Estimate) -> list[float | None]:
    return [json_number(estimate.low), json_number(estimate.high)]


def _cell(score: float) -> str:
    """The shortest text that is this float32 and no other."""
    return str(np.float32(score)) if math.isfinite(score) else ""
