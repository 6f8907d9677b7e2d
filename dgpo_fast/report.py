"""report.html: a run on one page, in one file that needs nothing else.

Everything on it is read from the run directory; the page is assets/report/report.html, which only lays out what is
computed here.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dgpo_fast.charts import Floats, Series, line_chart, power_of_ten, smooth, value_axis
from dgpo_fast.config import Config, load_run_config
from dgpo_fast.errors import UserError
from dgpo_fast.files import write_atomically
from dgpo_fast.guard.rules import diversity_at_first
from dgpo_fast.held_out import deciding_metric, held_out_reward
from dgpo_fast.metrics import SINGLE_REWARD, read_evaluations, read_metrics, read_warnings
from dgpo_fast.profiling import BACKGROUND
from dgpo_fast.samples import Tile, read_grid

ASSETS = Path(__file__).parent / "assets" / "report"

SMOOTHING = 1 / 20
"""Share of the run that a smoothed curve averages over."""
MAX_PICTURE = 384
"""Side in pixels above which pictures are made smaller: twice what a wide page shows, for dense screens."""

DIAGNOSTICS = (
    ("loss", "Loss", "The minimised objective, with its KL term", False),
    ("grad_norm", "Gradient norm", "Before clipping", True),
    ("group_weight_mean", "Group weight", "Mean of sigmoid(s): how much a group still teaches; ½ at the start", False),
)
HEALTH = (
    ("diversity", "Diversity", "Standard deviation of the latents within a group", True),
    ("zero_std_groups", "Groups without spread", "All of a group's rewards equal, so that it teaches nothing", True),
    (
        "clip_fraction",
        "Clip fraction",
        "Samples outside the trust range around the policy before, without gradient",
        True,
    ),
    (
        "group_weight_saturation",
        "Saturated weights",
        "Share of group weights next to 0 or 1: groups that are learnt, or lost",
        True,
    ),
    ("kl", "KL term", "Squared distance of the velocity from the reference's", True),
    ("adapter_norm", "Change of the weights", "Frobenius norm of what training has added to them", True),
)
"""Key in metrics.jsonl, title, what it says, whether its axis starts at zero."""
RULE_OF = {"zero_std_groups": "zero_std", "clip_fraction": "clip", "group_weight_saturation": "saturation"}
"""The guard's rules on metrics that have another name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run directory holds, as far as the report shows it."""

    config: Config
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    stage_seconds: dict[str, float]
    environment: dict[str, Any]
    first_samples: tuple[int, list[Tile]] | None
    last_samples: tuple[int, list[Tile]] | None

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def column(self, key: str) -> Floats:
        """One metric, a value per step; NaN where a line has none."""
        return _numbers(line.get(key) for line in self.metrics)

    def reward_column(self, title: str) -> Floats:
        """One of the recipe's rewards, without its weight; NaN where a line has none."""
        return _numbers(line.get(f"{SINGLE_REWARD}{title}") for line in self.metrics)

    def has(self, key: str) -> bool:
        """Whether the run's method has this metric at all."""
        return any(line.get(key) is not None for line in self.metrics)

    def warned(self, *names: str) -> list[float]:
        """Steps at which the guard found one of these rules broken."""
        return [float(line["step"]) for line in self.warnings if line["name"] in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A held-out metric before and after; places in percent along its track."""

    name: str
    color: str
    base: float
    tuned: float
    low: float
    high: float
    base_place: float
    tuned_place: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of the run's time; `left` and `width` in percent of the whole."""

    name: str
    color: str
    depth: int
    seconds: float
    left: float
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn chart; its legend names `series`."""

    title: str
    note: str
    series: list[Series]
    svg: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAfter:
    """A picture before, and after where there is one, as data URLs."""

    prompt: str
    before: str
    after: str | None
    width: int
    """Of each picture, in pixels."""


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html and returns its path. A run that is still going, or was stopped, has one too.

    Raises:
        UserError: `run_dir` is no run directory, or one of its files is damaged.
    """
    page = page_environment(ASSETS).get_template("report.html").render(_context(read_run(run_dir)))
    path = run_dir / "report.html"
    write_atomically(path, page.encode())
    return path


def read_run(run_dir: Path) -> Run:
    """What `run_dir` holds.

    Raises:
        UserError: `run_dir` is no run directory, or one of its files is damaged.
    """
    by_step = {
        int(found[1]): path
        for path in (run_dir / "samples").glob("step-*.png")
        if (found := re.fullmatch(r"step-(\d+)\.png", path.name))
    }
    steps = sorted(by_step)
    samples = [(step, read_grid(by_step[step])) for step in (*steps[:1], *steps[1:][-1:])]
    return Run(
        config=load_run_config(run_dir),
        metrics=read_metrics(run_dir),
        evaluations=read_evaluations(run_dir),
        warnings=read_warnings(run_dir),
        stage_seconds=_read_json(run_dir / "stages.json"),
        environment=_read_json(run_dir / "environment.json"),
        first_samples=samples[0] if samples else None,
        last_samples=samples[1] if len(samples) > 1 else None,
    )


def scores(run: Run) -> list[Score]:
    """The finite metrics of the last evaluation, the one that decides which checkpoint is the best in front.

    A track spans 0 to 1 where it can, else the round values around both.
    """
    if not run.evaluations:
        return []
    base, tuned = run.evaluations[-1]["base"], run.evaluations[-1]["tuned"]
    return [
        _score(name, base[name], tuned[name], index)
        for index, name in enumerate(_metric_names(run))
        if math.isfinite(base[name]) and math.isfinite(tuned[name])
    ]


def stages(seconds: Mapping[str, float], *, total: float) -> list[Stage]:
    """Stages, longest first, each followed by those inside it; what is left of `total` comes last.

    Args:
        seconds: per path, such as "train/policy"; inner stages are part of outer ones.
        total: seconds of the whole run, at least the sum of the outer stages.
    """
    rows = list(_stages_under("", seconds, total=total, left=0.0, color=None))
    covered = sum(row.width for row in rows if row.depth == 0)
    rest = total * (1 - covered / 100)
    if covered < 99.5:
        rows.append(Stage(name="elsewhere", color="rest", depth=0, seconds=rest, left=covered, width=100 - covered))
    return rows


def comparisons(run: Run) -> list[BeforeAfter]:
    """The first sample of each prompt and noise beside the last."""
    if run.first_samples is None:
        return []
    before = run.first_samples[1]
    after = run.last_samples[1] if run.last_samples else []
    # The number of samples may change when a run is resumed, so the tiles agree only as far as their prompts do.
    matched = [after[i] if i < len(after) and after[i].prompt == tile.prompt else None for i, tile in enumerate(before)]
    return [
        BeforeAfter(
            prompt=tile.prompt,
            before=_data_url(tile),
            after=_data_url(match) if match else None,
            width=min(tile.image.width, MAX_PICTURE),
        )
        for tile, match in zip(before, matched, strict=True)
    ]


def reward_chart(run: Run) -> Chart:
    """The training reward with its spread over images, and the held-out metrics that share its scale."""
    series = _curve(run, "reward_mean", label="training reward", spread="reward_std")
    series += [one for one in _held_out_series(run) if _shares_scale(one, run)]
    return _chart(
        "Reward",
        "Mean over the images of a step; held out, the slow average of the weights that is saved",
        series,
        run,
        marks=run.warned("reward", "below_base", "overfit"),
    )


def single_reward_charts(run: Run) -> list[Chart]:
    """A chart for each reward, where the training reward is a sum of some."""
    terms = {term.title: term.weight for term in run.config.rewards.terms}
    if len(terms) < 2:
        return []
    return [
        _chart(
            title, f"In training; its weight in the reward is {weight:g}", _smoothed(run, run.reward_column(title)), run
        )
        for title, weight in terms.items()
    ]


def held_out_charts(run: Run) -> list[Chart]:
    """A chart for each held-out metric whose scale is not the training reward's."""
    apart = [one for one in _held_out_series(run) if not _shares_scale(one, run)]
    at_first = "the base model" if run.config.begins_with is None else "what the run began with"
    return [_chart(one.label.capitalize(), f"By the number of steps; {at_first} at 0", [one], run) for one in apart]


def metric_chart(
    run: Run,
    key: str,
    *,
    title: str,
    note: str,
    zero: bool,
    level: float | None = None,
    marks: Sequence[float] = (),
) -> Chart:
    """One metric over steps, raw and smoothed."""
    return _chart(title, note, _curve(run, key, label="smoothed"), run, zero=zero, level=level, marks=marks)


def health_charts(run: Run) -> list[Chart]:
    """What the guard watches, with the thresholds of the configuration and the steps of its findings."""
    charts = [
        metric_chart(
            run,
            key,
            title=title,
            note=note,
            zero=zero,
            level=threshold(run, key),
            marks=run.warned(RULE_OF.get(key, key)),
        )
        for key, title, note, zero in HEALTH
        if run.has(key)
    ]
    ahead = _ahead(run)
    return charts if ahead is None else [*charts, ahead]


def threshold(run: Run, key: str) -> float | None:
    """What the guard compares a metric with; None where that is no fixed value."""
    guard = run.config.guard
    match key:
        case "zero_std_groups" if guard.zero_std is not None:
            return guard.zero_std * _counted_groups(run)
        case "clip_fraction":
            return guard.clip
        case "group_weight_saturation":
            return guard.saturation
        case "diversity" if guard.diversity is not None:
            start = diversity_at_first(run.column(key)[: guard.window].tolist())
            return None if start is None else guard.diversity * start
    return None


def _counted_groups(run: Run) -> float:
    """How many groups of an iteration counted: the median, since the guard takes the share of each iteration's own."""
    dropped = [line.get("dropped_groups", 0) for line in run.metrics]
    return run.config.groups.per_iteration - float(np.median(dropped))


def _ahead(run: Run) -> Chart | None:
    """How much more the training reward has risen than the held-out one, by evaluation; None where none was made."""
    rewards = run.config.rewards
    held_out = [
        (line["step"], held_out_reward(line["tuned"], rewards), held_out_reward(line["base"], rewards))
        for line in run.evaluations
        if line["step"] > 0
    ]
    rises = [(step, tuned - base) for step, tuned, base in held_out if tuned is not None and base is not None]
    if not rises:
        return None
    step, reward, window = run.column("step"), run.column("reward_mean"), run.config.guard.window
    begin = np.nanmean(reward[:window])
    gaps = [np.nanmean(reward[step <= at][-window:]) - begin - rise for at, rise in rises]
    x, y = np.array([0.0, *(at for at, _ in rises)]), np.array([0.0, *gaps])
    note = "Rise of the training reward minus that of the held-out reward: what is learnt by heart, or fools the reward"
    series = [Series(label="gap", x=x, y=y, color="c1", mark="points")]
    return _chart("Overfit gap", note, series, run, zero=True, marks=run.warned("overfit", "below_base"))


def _curve(run: Run, key: str, *, label: str, spread: str | None = None) -> list[Series]:
    """One metric, with its spread."""
    return _smoothed(run, run.column(key), label=label, spread=None if spread is None else run.column(spread))


def _smoothed(run: Run, values: Floats, *, label: str = "smoothed", spread: Floats | None = None) -> list[Series]:
    """Single steps, and smoothed over them with the smoothed `spread`. A lone step is a point."""
    step = run.column("step")
    if len(step) == 1:
        return [Series(label=label, x=step, y=values, color="c1", mark="points")]
    width = max(2, round(len(step) * SMOOTHING))
    band = None if spread is None else smooth(spread, width)
    return [
        Series(label="single steps", x=step, y=values, color="c1", mark="thin"),
        Series(label=label, x=step, y=smooth(values, width), color="c1", spread=band),
    ]


def _chart(
    title: str,
    note: str,
    series: list[Series],
    run: Run,
    *,
    zero: bool = False,
    level: float | None = None,
    marks: Sequence[float] = (),
) -> Chart:
    x_end = max(run.step, 1)
    svg = line_chart(series, title=f"{title} over optimizer steps", x_end=x_end, zero=zero, level=level, marks=marks)
    return Chart(title=title, note=note, series=series, svg=svg)


def _context(run: Run) -> dict[str, Any]:
    """All that the page shows; before the first step there are no curves."""
    last = run.metrics[-1] if run.metrics else None
    context = {
        "run": run,
        "config": run.config,
        "settings": _settings(run.config),
        "scores": scores(run),
        "comparisons": comparisons(run),
        "last": last,
    }
    if last is None:
        return context
    background = {path: seconds for path, seconds in run.stage_seconds.items() if path.split("/")[0] == BACKGROUND}
    foreground = {path: seconds for path, seconds in run.stage_seconds.items() if path not in background}
    staged_seconds = sum(seconds for path, seconds in foreground.items() if "/" not in path)
    total_seconds = max(staged_seconds, last["wall_s"])
    speed_note = "Sampled, scored and trained on"
    return context | {
        "reward": reward_chart(run),
        "diagnostics": [
            metric_chart(run, key, title=title, note=note, zero=zero)
            for key, title, note, zero in DIAGNOSTICS
            if run.has(key)
        ],
        "health": health_charts(run),
        "single_rewards": single_reward_charts(run),
        "held_out": held_out_charts(run),
        "speed": metric_chart(run, "images_per_s", title="Images per second", note=speed_note, zero=True),
        "images_per_s": float(np.median(run.column("images_per_s"))),
        "stages": stages(foreground, total=total_seconds) if foreground else [],
        "meanwhile": {path.partition("/")[2]: value for path, value in background.items() if path.count("/") == 1},
        "total_seconds": total_seconds,
    }


def _numbers(values: Iterable[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _held_out_series(run: Run) -> list[Series]:
    """The held-out metrics over steps; at step 0 the base's, unless the run began with something else."""
    if not run.evaluations:
        return []
    base = run.evaluations[-1]["base"]
    tuned = {0: base} | {line["step"]: line["tuned"] for line in run.evaluations}
    steps = np.array([*tuned], dtype=np.float64)
    return [
        Series(
            label=f"held-out {name}",
            x=steps,
            y=np.array([values.get(name, math.nan) for values in tuned.values()], dtype=np.float64),
            color=_metric_color(index),
            mark="points",
        )
        for index, name in enumerate(_metric_names(run))
    ]


def _shares_scale(series: Series, run: Run) -> bool:
    """Whether values can stand on the reward's axis without flattening its curve: at most one range of it outside."""
    reward, spread = run.column("reward_mean"), run.column("reward_std")
    low, high = np.nanmin(reward - spread), np.nanmax(reward + spread)
    margin = high - low
    return bool(low - margin <= series.y.min() and series.y.max() <= high + margin)


def _score(name: str, base: float, tuned: float, index: int) -> Score:
    low, high = min(base, tuned), max(base, tuned)
    axis = value_axis(0.0, 1.0) if low >= 0 and high <= 1 else value_axis(low, high)
    return Score(
        name=name,
        color=_metric_color(index),
        base=base,
        tuned=tuned,
        low=axis.low,
        high=axis.high,
        base_place=axis.percent(base),
        tuned_place=axis.percent(tuned),
    )


def _stages_under(
    parent: str, seconds: Mapping[str, float], *, total: float, left: float, color: str | None
) -> Iterator[Stage]:
    depth = parent.count("/") + 1 if parent else 0
    prefix = f"{parent}/" if parent else ""
    inside = [path for path in seconds if path.startswith(prefix) and path.count("/") == depth]
    for index, path in enumerate(sorted(inside, key=lambda path: -seconds[path])):
        width = 100 * seconds[path] / total
        own_color = color or (f"c{index + 1}" if index < 6 else "rest")
        name = path.removeprefix(prefix)
        yield Stage(name=name, color=own_color, depth=depth, seconds=seconds[path], left=left, width=width)
        yield from _stages_under(path, seconds, total=total, left=left, color=own_color)
        left += width


def _metric_names(run: Run) -> list[str]:
    """The metrics of the last evaluation, the one that decides which checkpoint is the best in front."""
    metrics = run.evaluations[-1]["base"]
    decides = deciding_metric(metrics, run.config.rewards)
    return sorted(metrics, key=lambda name: name != decides)


def _metric_color(index: int) -> str:
    """The training reward is c1."""
    return f"c{index % 5 + 2}"


def _settings(config: Config) -> dict[str, dict[str, str]]:
    """The configuration by section, values as text; what stands outside any section comes first."""
    values = config.model_dump(mode="json")
    sections = {"run": {key: _text(value) for key, value in values.items() if not isinstance(value, dict)}}
    sections |= {
        name: {key: _text(setting) for key, setting in value.items()}
        for name, value in values.items()
        if isinstance(value, dict)
    }
    return sections


def _text(value: Any) -> str:
    match value:
        case list():
            return ", ".join(_text(item) for item in value)
        case dict():
            return " ".join(f"{key}={_text(item)}" for key, item in value.items() if item is not None)
        case str():
            return value
        case _:
            return json.dumps(value)


def _data_url(tile: Tile) -> str:
    picture = tile.image.copy()
    picture.thumbnail((MAX_PICTURE, MAX_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=92, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from None
    return values


def page_environment(*folders: Path) -> Environment:
    """What makes pages of the templates in `folders`: everything is escaped, numbers are written for people."""
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "signed": format_signed, "duration": format_duration}
    return environment


def format_number(value: float) -> str:
    """A number for people: about four digits, three where it is small, powers of ten where it is tiny."""
    magnitude = abs(value)
    if value == round(value, 0) or magnitude >= 1000:
        text = f"{value:,.0f}"
    elif magnitude >= 0.1:
        text = f"{value:.{3 if magnitude < 10 else 2 if magnitude < 100 else 1}f}"
    elif magnitude < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}·{power_of_ten(int(exponent))}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def format_signed(value: float) -> str:
    """A difference for people: as `format_number`, with its sign."""
    return f"+{format_number(value)}" if value > 0 else format_number(value)


def format_duration(seconds: float) -> str:
    """Seconds for people: `85 ms`, `12.3 s`, `4 min 05 s`, `2 h 07 min`, `3 d 4 h`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = timedelta(seconds=round(seconds))
    hours, rest = divmod(whole.seconds, 3600)
    if whole.days:
        return f"{whole.days} d {hours} h"
    if hours:
        return f"{hours} h {rest // 60:02d} min"
    return f"{rest // 60} min {rest % 60:02d} s"
