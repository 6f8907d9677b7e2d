"""The page of an evaluation: every prompt with the images of both models, scores beside them, the comparison on top.

index.html and a file for each image: in one file, as a run's report is, a page of 200 prompts with four images of 512
pixels from both models would have a hundred megabytes, while a browser fetches files only where the reader looks.
Images are WebP at a quality of 92, or lossless; scores are of the images before that. The page is
assets/gallery/gallery.html; without JavaScript it shows all there is.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from dgpo_fast.charts import histogram
from dgpo_fast.comparison import Evaluation, format_p
from dgpo_fast.files import write_atomically
from dgpo_fast.metrics import json_number
from dgpo_fast.report import ASSETS as REPORT_ASSETS
from dgpo_fast.report import format_signed, page_environment
from dgpo_fast.samples import to_pictures
from dgpo_fast.statistics import Comparison, Floats, prompt_means

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).parent / "assets" / "gallery"
IMAGES = "images"
"""Folder of the image files, beside the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A metric of both models, of one image or as means over a prompt's; NaN where it failed."""

    metric: str
    base: float
    tuned: float
    change: float
    """Over pairs of images that both have a score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An image of both models from the same noise: files relative to the page."""

    base: str
    tuned: str
    scores: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A prompt with its images."""

    number: int
    prompt: str
    category: str | None
    scores: list[Row]
    """Means over its images."""
    changes: str
    """By metric, as JSON for the page's script; null where there is none."""
    pairs: list[Pair]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a metric says of all prompts together."""

    name: str
    color: str
    comparison: Comparison
    better: int
    equal: int
    worse: int
    chart: Markup | None
    """None where no prompt has a change."""


def picture_keeper(
    folder: Path, side: str, *, first_image: int, images_per_prompt: int, lossless: bool = False
) -> Callable[[Tensor], None]:
    """A function that writes images of one model, [B, 3, H, W] in [0, 1], where the gallery in `folder` looks for them.

    Args:
        side: base or tuned.
        first_image: number of the first image that it is given, over all prompts; the others follow.
        lossless: for other programs to measure, at several times the size.

    Raises:
        OSError: when called: the folder cannot be written, or the disk is full.
    """
    numbers = itertools.count(first_image)

    def keep(images_BCHW: Tensor) -> None:
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for picture in to_pictures(images_BCHW):
            name = _image_file(*divmod(next(numbers), images_per_prompt), side)
            picture.save(folder / name, "WEBP", quality=92, method=4, lossless=lossless)

    return keep


def write_gallery(evaluation: Evaluation, folder: Path, *, pixels: int) -> Path:
    """Writes index.html to `folder`, where a `picture_keeper` of each model has written images; returns its path.

    Args:
        pixels: side of an image.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    page = page_environment(ASSETS, REPORT_ASSETS)
    page.filters["p"], page.tests["finite"] = format_p, math.isfinite
    html = page.get_template("gallery.html").render(
        evaluation=evaluation, metrics=metrics(evaluation), entries=entries(evaluation), pixels=pixels
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    write_atomically(path, html.encode())
    return path


def entries(evaluation: Evaluation) -> list[Entry]:
    """The prompts in their order."""
    base, tuned = evaluation.base, evaluation.tuned
    change = {name: tuned[name] - base_PI for name, base_PI in base.items()}
    means = [{name: prompt_means(values) for name, values in scores.items()} for scores in (base, tuned, change)]
    return [
        Entry(
            number=number,
            prompt=str(prompt),
            category=_category(prompt, evaluation.by or "category"),
            scores=_rows(*means, place=number),
            changes=json.dumps({name: json_number(change_P[number]) for name, change_P in means[2].items()}),
            pairs=[
                Pair(
                    base=_image_file(number, image, "base"),
                    tuned=_image_file(number, image, "tuned"),
                    scores=_rows(base, tuned, change, place=(number, image)),
                )
                for image in range(evaluation.images_per_prompt)
            ],
        )
        for number, prompt in enumerate(evaluation.prompts)
    ]


def _category(prompt: str, key: str) -> str | None:
    value = getattr(prompt, "metadata", {}).get(key)
    return None if value is None else str(value)


def metrics(evaluation: Evaluation) -> list[Metric]:
    """What the metrics say, in their order."""
    return [
        _metric(
            name, comparison, prompt_means(evaluation.tuned[name] - evaluation.base[name]), color=f"c{place % 6 + 1}"
        )
        for place, (name, comparison) in enumerate(evaluation.comparisons.items())
    ]


def _metric(name: str, comparison: Comparison, change_P: Floats, *, color: str) -> Metric:
    change_P = change_P[np.isfinite(change_P)]
    better, worse = int((change_P > 0).sum()), int((change_P < 0).sum())
    equal, change = len(change_P) - better - worse, comparison.change
    chart = None
    if len(change_P):
        title = (
            f"Histogram of the change of {name} by prompt: mean {format_signed(change.mean)}, from "
            f"{format_signed(float(change_P.min()))} to {format_signed(float(change_P.max()))}; {better} better, "
            f"{equal} equal, {worse} worse"
        )
        chart = histogram(change_P, title=title, color=color, mean=change.mean, band=(change.low, change.high))
    return Metric(name=name, color=color, comparison=comparison, better=better, equal=equal, worse=worse, chart=chart)


def _rows(
    base: Mapping[str, Floats],
    tuned: Mapping[str, Floats],
    change: Mapping[str, Floats],
    *,
    place: int | tuple[int, int],
) -> list[Row]:
    return [
        Row(metric=name, base=float(values[place]), tuned=float(tuned[name][place]), change=float(change[name][place]))
        for name, values in base.items()
    ]


def _image_file(number: int, image: int, side: str) -> str:
    return f"{IMAGES}/{number:04d}-{image}-{side}.webp"
