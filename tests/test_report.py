"""report.html of runs that are finished, long, just started, hostile or damaged; and the charts on it."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.charts import Series, extremes, line_chart, smooth, step_axis, thin, tick_labels, value_axis
from dgpo_fast.config import Config, dump_config, parse_config
from dgpo_fast.errors import UserError
from dgpo_fast.guard import Finding
from dgpo_fast.metrics import MetricsLog
from dgpo_fast.records import StepReport
from dgpo_fast.report import (
    format_duration,
    format_number,
    health_charts,
    read_run,
    scores,
    single_reward_charts,
    stages,
    threshold,
    write_report,
)
from dgpo_fast.samples import save_grid
from dgpo_fast.shapes.captions import parse_caption
from dgpo_fast.shapes.render import draw, place

PROMPTS = (
    "two red circles", "a blue square left of a green triangle", "a blue circle and a yellow square",
    "three yellow triangles", "a red square above a blue circle", "a green circle",
    "a yellow triangle below a blue square", "two blue squares",
)  # fmt: skip
STAGES = {
    "rollout": 0.52, "rollout/transformer": 0.41, "rollout/vae": 0.06, "rollout/solver": 0.01, "rollout/text": 0.005,
    "train": 0.31, "train/policy": 0.1, "train/backward": 0.12, "train/reference": 0.04, "train/old": 0.035,
    "train/optimizer": 0.005, "reward": 0.04, "evaluate": 0.1, "checkpoint": 0.012, "logging": 0.006,
}  # fmt: skip
SECONDS_PER_STEP = 1.9


def config(**changes: object) -> Config:
    reward = {"terms": [{"name": "shapes", "metric": "soft"}]}
    description = "The embedded pipeline on coloured shapes, scored by a verifier of pixels"
    data = {"name": "tiny-dgpo", "description": description, "model": {"name": "embedded"}, "rewards": reward}
    return parse_config({**data, **changes}, source="test")


def step_report(step: int, *, num_steps: int, rng: np.random.Generator) -> StepReport:
    """A step of a run that learns, as it might be: rewards rise and level off, noise everywhere."""
    learned = 1 - math.exp(-3.5 * step / num_steps)
    rollout_s, reward_s, train_s = SECONDS_PER_STEP * rng.normal([0.55, 0.04, 0.31], 0.01)
    return StepReport(
        step=step,
        iteration=step,
        images_seen=64 * step,
        wall_s=SECONDS_PER_STEP * step,
        reward_mean=0.58 + 0.32 * learned + float(rng.normal(0, 0.035)),
        reward_std=0.27 - 0.12 * learned + float(rng.normal(0, 0.015)),
        zero_std_groups=int(rng.poisson(2.5 * learned)),
        clamped_advantages=0,
        failed_samples=0,
        dropped_groups=0,
        rewards={"shapes.soft": 0.58 + 0.32 * learned, "jpeg_compressibility": -30.0 - learned},
        loss=0.00693 - 0.0004 * learned + float(rng.normal(0, 6e-5)),
        dgpo_loss=0.00693 - 0.0005 * learned,
        surrogate_loss=-0.002 * learned,
        kl=0.011 * learned + float(abs(rng.normal(0, 6e-4))),
        clip_fraction=0.22 * learned + float(abs(rng.normal(0, 0.02))),
        group_weight_mean=0.5 - 0.06 * learned + float(rng.normal(0, 0.006)),
        group_weight_saturation=0.1 * learned,
        diversity=0.8 - 0.1 * learned + float(rng.normal(0, 0.02)),
        adapter_norm=4 * learned,
        skipped_steps=0,
        grad_norm=0.02 + 0.05 * math.exp(-step / 20) + float(rng.gamma(2, 0.006)),
        lr=3e-4,
        rollout_s=float(rollout_s),
        reward_s=float(reward_s),
        train_s=float(train_s),
        images_per_s=64 / float(rollout_s + reward_s + train_s),
        peak_memory_gb=1.31,
    )


def scenes(*, mistakes: float) -> torch.Tensor:
    """Images of `PROMPTS`, from the same noise each time: an object's colour is wrong with probability `mistakes`."""
    images = []
    for seed, prompt in enumerate(PROMPTS):
        rng = np.random.default_rng(seed)
        objects = place(parse_caption(prompt), rng)
        color = str(rng.choice(["red", "green", "yellow"]))
        wrong = [dataclasses.replace(o, color=color) if rng.random() < mistakes else o for o in objects]
        images.append(torch.from_numpy(draw(wrong) + mistakes * rng.normal(0, 0.04, (3, 72, 72))))
    return torch.stack(images)


def write_run(run_dir: Path, *, num_steps: int, evaluations: int = 6, samples: bool = True, **changes: object) -> Path:
    """A run directory of `num_steps` steps, as the trainer leaves it; `changes` are the configuration's."""
    rng = np.random.default_rng(0)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(config(**{"steps": max(num_steps, 1), **changes})))
    log = MetricsLog(run_dir, config={}, tensorboard=False, wandb=False, resume_step=None)
    base = {"soft": 0.712, "strict": 0.473}
    for step in range(1, num_steps + 1):
        log.write(step_report(step, num_steps=num_steps, rng=rng))
        if evaluations and step % max(num_steps // evaluations, 1) == 0:
            learned = 1 - math.exp(-3.2 * step / num_steps)
            tuned = {"strict": round(0.473 + 0.44 * learned, 4), "soft": round(0.712 + 0.23 * learned, 4)}
            log.write_evaluation(step, num_prompts=64, images_per_prompt=4, base=base, tuned=tuned)
    log.close()
    total = num_steps * SECONDS_PER_STEP
    (run_dir / "stages.json").write_text(json.dumps({path: share * total for path, share in STAGES.items()}))
    if samples:
        (run_dir / "samples").mkdir()
        save_grid(scenes(mistakes=0.5), PROMPTS, run_dir / "samples" / "step-000000.png")
        save_grid(scenes(mistakes=0.0), PROMPTS, run_dir / "samples" / f"step-{num_steps:06d}.png")
    versions = {"dgpo-fast": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1", "python": "3.11.2"}
    environment = {
        "versions": versions,
        "machine": "x86_64, 2 CPU cores",
        "command": "dgpo-fast train tiny-dgpo --seed 0",
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    return run_dir


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page, as a browser takes them from it; fails where tags do not close."""

    VOID = ("meta", "img", "line", "path", "circle", "rect")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def lines(self, name: str) -> list[list[tuple[str, str]]]:
        """The attributes of every line of a class."""
        starts = [place for place, (key, value) in enumerate(self.attributes) if (key, value) == ("class", name)]
        return [self.attributes[place + 1 : place + 3] for place in starts]

    def classes(self, name: str) -> int:
        return sum(name in value.split() for key, value in self.attributes if key == "class")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("finished") / "run", num_steps=60)
    write_report(run_dir)
    return run_dir


def test_a_finished_run_shows_scores_curves_pictures_times_and_configuration(finished: Path) -> None:
    page = Page(finished / "report.html")
    last = read_run(finished).evaluations[-1]
    for shown in ("tiny-dgpo", "0.473", f"{last['tuned']['strict']:.3f}", "Before and after", "1 min 54 s", *PROMPTS):
        assert shown in page.text
    for stage in STAGES:
        assert stage.split("/")[-1] in page.text
    for setting in ("kl_coef", "0.02", "dgpo-fast train tiny-dgpo --seed 0", "2.13.0+cpu"):
        assert setting in page.text
    assert "strict score" in page.text and "soft score" not in page.text
    assert page.classes("plot") == 12
    assert sum(value.startswith("data:image/webp") for key, value in page.attributes if key == "src") == 2 * len(
        PROMPTS
    )


def test_each_of_several_rewards_has_a_chart_of_its_own(tmp_path: Path) -> None:
    terms = [{"name": "shapes", "metric": "soft"}, {"name": "jpeg_compressibility", "weight": 0.01}]
    run = read_run(write_run(tmp_path / "run", num_steps=8, samples=False, rewards={"terms": terms}))
    charts = single_reward_charts(run)
    assert [chart.title for chart in charts] == ["shapes.soft", "jpeg_compressibility"]
    assert "its weight in the reward is 0.01" in charts[1].note
    assert charts[1].series[0].y[-1] == -31 + math.exp(-3.5)
    alone = read_run(write_run(tmp_path / "alone", num_steps=8, samples=False))
    assert single_reward_charts(alone) == [], "the reward itself"


def test_the_report_asks_nothing_of_the_network(finished: Path) -> None:
    page = Page(finished / "report.html")
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert all(address.startswith("data:image/webp;base64,") for address in addresses)
    source = re.sub(r"data:image/webp;base64,[\w+/=]+", "", (finished / "report.html").read_text())
    assert not re.search(r"https?:|url\(|@import|fetch\(|<link", source)


def test_writing_again_gives_the_same_page_and_leaves_nothing_behind(finished: Path) -> None:
    before = (finished / "report.html").read_bytes()
    assert write_report(finished) == finished / "report.html"
    assert (finished / "report.html").read_bytes() == before
    assert not list(finished.glob(".*"))


def test_a_run_of_one_step_has_points_and_says_what_is_to_come(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=1, evaluations=0, samples=False, steps=300)
    page = Page(write_report(run_dir))
    assert "1 of 300" in page.text and "Not evaluated since training began" in page.text
    assert page.tags.count("circle") == 12  # a point in each of 11 charts, and one in the legend
    assert "Before and after" not in page.text


def test_before_the_first_step_the_base_model_stands_alone(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=0)
    log = MetricsLog(run_dir, config={}, tensorboard=False, wandb=False, resume_step=0)
    same = {"strict": 0.473}
    log.write_evaluation(0, num_prompts=64, images_per_prompt=4, base=same, tuned=same)
    log.close()
    page = Page(write_report(run_dir))
    assert "The base model on held-out prompts: strict 0.473. Not evaluated since" in page.text
    assert page.classes("track") == 0 and page.tags.count("img") == len(PROMPTS)


def test_a_run_without_a_step_has_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config()))
    page = Page(write_report(tmp_path))
    assert "Not evaluated since training began" in page.text and "kl_coef" in page.text
    assert page.classes("plot") == 0


def test_a_long_run_makes_no_long_page(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=5000, samples=False)
    page = Page(write_report(run_dir))
    assert (run_dir / "report.html").stat().st_size < 500_000
    paths = [value for name, value in page.attributes if name == "d"]
    assert max(path.count("L") + path.count("M") for path in paths) <= 2 * 800


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    hostile = "</script><script>alert('1')</script><img src=x onerror=\"alert(2)\">{{ 7 * 7 }}&amp;"
    run_dir = write_run(tmp_path / "run", num_steps=2, evaluations=0, samples=False, name=hostile, description=hostile)
    (run_dir / "samples").mkdir()
    save_grid(torch.zeros(1, 3, 64, 64), [hostile], run_dir / "samples" / "step-000000.png")
    (run_dir / "stages.json").write_text(json.dumps({hostile: 1.0}))
    environment = {"versions": {hostile: hostile}, "machine": hostile, "command": hostile}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    log = MetricsLog(run_dir, config={}, tensorboard=False, wandb=False, resume_step=2)
    log.write_evaluation(2, num_prompts=1, images_per_prompt=1, base={hostile: 0.1}, tuned={hostile: 0.2})
    log.close()
    page = Page(write_report(run_dir))
    assert page.tags.count("script") == 1 and page.tags.count("img") == 1
    assert not any(name == "onerror" for name, _ in page.attributes)
    assert page.text.count(hostile) >= 8
    assert sum(hostile in value for name, value in page.attributes if name == "alt") == 1


def test_curves_with_values_that_are_not_finite_are_drawn_around_them(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=60, samples=False)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines[20:]:
        line["loss"], line["grad_norm"] = math.nan, math.inf
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = [value for name, value in Page(write_report(run_dir)).attributes if name == "d"]
    assert not any("nan" in path or "inf" in path for path in paths)


def test_what_a_method_does_not_measure_has_no_chart(tmp_path: Path) -> None:
    """A baseline's lines say null for it; where some lines alone do, their steps are left out of the curve."""
    run_dir = write_run(tmp_path / "run", num_steps=60, samples=False)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["clip_fraction"] = None
    for line in lines[:20]:
        line["group_weight_mean"] = None
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, page = read_run(run_dir), Page(write_report(run_dir))
    assert page.classes("plot") == 11 and "Clip fraction" not in page.text and "Group weight" in page.text
    assert np.isnan(run.column("group_weight_mean")).tolist() == [True] * 20 + [False] * 40
    assert not any("nan" in value for name, value in page.attributes if name == "d")


def test_a_metric_of_another_scale_gets_a_chart_and_a_track_of_its_own(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=10, evaluations=0, samples=False)
    log = MetricsLog(run_dir, config={}, tensorboard=False, wandb=False, resume_step=10)
    base, tuned = {"soft": 0.7, "pickscore": 21.72}, {"soft": 0.9, "pickscore": 23.89}
    log.write_evaluation(10, num_prompts=64, images_per_prompt=4, base=base, tuned=tuned)
    log.close()
    page = Page(write_report(run_dir))
    assert page.classes("plot") == 13 and "Held-out pickscore" in page.text
    soft, pickscore = scores(read_run(run_dir))
    assert (soft.low, soft.high, soft.base_place, soft.tuned_place) == (0, 1, 70, 90)
    assert pickscore.low <= 21.72 and pickscore.high >= 23.89 and pickscore.high - pickscore.low <= 5
    assert "21.72" in page.text and "+2.170" in page.text


def test_a_degenerated_run_says_so_and_where(tmp_path: Path) -> None:
    """A box with every finding and its advice; lines across charts at thresholds, upright ones at findings."""
    run_dir = write_run(tmp_path / "run", num_steps=60, samples=False)
    healthy = Page(write_report(run_dir))
    assert "may have degenerated" not in healthy.text and healthy.classes("mark") == 0
    assert healthy.classes("level") == 4, "diversity, groups without spread, clip fraction, saturation"
    log = MetricsLog(run_dir, config={}, tensorboard=False, wandb=False, resume_step=60)
    advice = ("optimizer.lr=1e-4 (now 3e-4)", "<b>")
    log.write_finding(Finding(40, "diversity", 31, "the diversity fell to 0.1", advice, "lower_lr"))
    log.write_finding(Finding(60, "overfit", 41, "the held-out reward fell", (), "warn"))
    log.close()
    page = Page(write_report(run_dir))
    words = " ".join(page.text.split())
    assert "This run may have degenerated" in words and page.classes("warnings") == 1
    assert "Step 40 · the diversity fell to 0.1, since step 31. The learning rate was halved." in words
    assert "What helps in a new run: optimizer.lr=1e-4 (now 3e-4), <b>" in words
    assert "Step 60 · the held-out reward fell, since step 41." in words
    marks = [dict(attributes) for attributes in page.lines("mark")]
    assert sorted(mark["x1"] for mark in marks) == ["100.0%", "100.0%", "66.667%"], "reward and gap at 60"


def test_thresholds_are_the_configurations(tmp_path: Path) -> None:
    guard = {"diversity": 0.5, "zero_std": 0.75, "clip": None, "saturation": 0.8, "window": 3}
    run = read_run(write_run(tmp_path / "run", num_steps=9, samples=False, guard=guard))
    first = run.column("diversity")[:3]
    assert threshold(run, "diversity") == 0.5 * max(first[0], np.median(first))
    assert threshold(run, "zero_std_groups") == 0.75 * 8
    assert threshold(run, "clip_fraction") is None and threshold(run, "group_weight_saturation") == 0.8
    assert threshold(run, "kl") is None


def test_thresholds_know_of_steps_without_a_value_and_of_groups_that_were_left_out(tmp_path: Path) -> None:
    """As the guard does: by what the first window has, and of the groups that count."""
    guard = {"diversity": 0.5, "zero_std": 0.75, "window": 3}
    run_dir = write_run(tmp_path / "run", num_steps=9, samples=False, guard=guard)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line, diversity in zip(lines, (None, 0.6, 0.8, *[0.1] * 6), strict=True):
        line["diversity"], line["dropped_groups"] = diversity, 4
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(run_dir)
    assert threshold(run, "diversity") == 0.5 * 0.7
    assert threshold(run, "zero_std_groups") == 0.75 * 4


def test_the_gap_is_what_the_training_reward_gained_more(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=9, evaluations=0, samples=False, guard={"window": 3})
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line, reward in zip(lines, (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9), strict=True):
        line["reward_mean"] = reward
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = MetricsLog(run_dir, config={}, tensorboard=False, wandb=False, resume_step=9)
    for step, soft in ((0, 0.5), (6, 0.7), (9, 0.6)):
        log.write_evaluation(step, num_prompts=4, images_per_prompt=4, base={"soft": 0.5}, tuned={"soft": soft})
    log.close()
    gap = health_charts(read_run(run_dir))[-1]
    assert gap.title == "Overfit gap" and gap.series[0].x.tolist() == [0, 6, 9]
    assert gap.series[0].y.tolist() == pytest.approx([0, 0.3 - 0.2, 0.4 - 0.1])


def test_a_run_of_a_version_that_measured_less_has_a_report(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=9, samples=False)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["diversity"], line["adapter_norm"], line["group_weight_saturation"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "warnings.jsonl").unlink()
    assert Page(write_report(run_dir)).classes("plot") == 9


def test_tiles_are_compared_only_where_prompts_agree(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=10)
    fewer = [PROMPTS[0], "another prompt"]
    save_grid(torch.zeros(2, 3, 64, 64), fewer, run_dir / "samples" / "step-000010.png")
    page = Page(write_report(run_dir))
    assert page.tags.count("img") == len(PROMPTS) + 1


def test_other_pictures_among_the_samples_are_left_alone(tmp_path: Path) -> None:
    """Such as one that somebody put there; and a step of seven digits comes behind one of six."""
    run_dir = write_run(tmp_path / "run", num_steps=10)
    samples = run_dir / "samples"
    (samples / "step-best.png").write_bytes(b"no grid")
    (samples / "step-000010.png").rename(samples / "step-1000000.png")
    (samples / "step-999999.png").write_bytes(b"no grid")
    run = read_run(run_dir)
    assert run.first_samples is not None and run.last_samples is not None
    assert (run.first_samples[0], run.last_samples[0]) == (0, 1_000_000)


def test_what_is_no_run_directory_or_a_damaged_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run directory: it has no config\.yaml"):
        write_report(tmp_path)
    run_dir = write_run(tmp_path / "run", num_steps=2, samples=False)
    (run_dir / "stages.json").write_text('{"rollout": 1')
    with pytest.raises(UserError, match=r"stages\.json: no JSON"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_stages_nest_and_add_up_to_the_whole() -> None:
    seconds = {"train": 30.0, "train/policy": 20.0, "train/policy/transformer": 15.0, "rollout": 50.0}
    rows = stages(seconds, total=100.0)
    assert [(row.name, row.depth, row.left, row.width) for row in rows] == [
        ("rollout", 0, 0, 50),
        ("train", 0, 50, 30),
        ("policy", 1, 50, 20),
        ("transformer", 2, 50, 15),
        ("elsewhere", 0, 80, 20),
    ]
    assert len({row.color for row in rows if row.depth == 0}) == 3
    assert {row.color for row in rows[1:4]} == {rows[1].color}


def test_what_passed_meanwhile_is_no_part_of_the_whole(tmp_path: Path) -> None:
    """Decoding and rewards: said, but not added to the stages that they overlap with."""
    run_dir = write_run(tmp_path / "run", num_steps=3, samples=False)
    write_report(run_dir)
    before = Page(run_dir / "report.html")
    staged = json.loads((run_dir / "stages.json").read_text())
    background = {"background": 7.5, "background/vae": 5.5, "background/reward": 2.0}
    (run_dir / "stages.json").write_text(json.dumps(staged | background))
    write_report(run_dir)
    page = Page(run_dir / "report.html")
    assert "vae 5.5 s, reward 2.0 s" in " ".join(page.text.split())
    assert [style for key, style in page.attributes if key == "style"] == [
        style for key, style in before.attributes if key == "style"
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.8906, "0.891"), (0.9, "0.900"), (21.718, "21.72"), (128.25, "128.2"), (19200, "19,200"),
     (0.0065312, "0.00653"), (2.5e-7, "2.50·10⁻⁷"), (-0.25, "\N{MINUS SIGN}0.250"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float, shown: str) -> None:
    assert format_number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0214, "21 ms"), (0.9999, "1.0 s"), (12.34, "12.3 s"), (59.97, "1 min 00 s"), (3599.6, "1 h 00 min"),
     (245, "4 min 05 s"), (9500, "2 h 38 min"), (3 * 86400 + 4.5 * 3600, "3 d 4 h")],
)  # fmt: skip
def test_durations_are_written_for_people(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e6))
def test_a_value_axis_holds_its_values_between_few_round_ticks(low: float, span: float) -> None:
    axis = value_axis(low, low + span)
    step = axis.ticks[1] - axis.ticks[0]
    rounding = 4 * np.spacing(max(abs(low), abs(low + span)))  # of float64, where values are far from zero
    tolerance = 1e-6 * step + rounding
    assert axis.low <= low + tolerance and axis.high >= low + span - tolerance
    assert 2 <= len(axis.ticks) <= 6
    np.testing.assert_allclose(np.diff(axis.ticks), step, rtol=1e-4, atol=rounding)
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - factor) for factor in (1, 2, 5)) < 1e-4 + mantissa * rounding / step
    assert len(set(tick_labels(axis.ticks))) == len(axis.ticks)


def test_a_value_axis_of_one_value_has_room_around_it() -> None:
    assert value_axis(0.0, 0.0) == value_axis(0.0, 1.0)
    assert 0 < value_axis(3.0, 3.0).percent(3.0) < 100


@given(st.integers(1, 10**6))
def test_a_step_axis_ends_at_the_last_step_and_has_whole_ticks(end: int) -> None:
    axis = step_axis(end)
    assert axis.percent(end) == 100 and axis.ticks[0] == 0 and axis.ticks[-1] <= end
    assert 2 <= len(axis.ticks) <= 7
    assert all(tick == int(tick) for tick in axis.ticks)


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [((0.0, 0.5, 1.0), ["0.0", "0.5", "1.0"]), ((0.0, 1000.0), ["0", "1,000"]), ((0.0, 2e-5), ["0", "2·10⁻⁵"]),
     ((-2.5e-4, 0.0), ["\N{MINUS SIGN}2.5·10⁻⁴", "0"]), ((-0.0, 0.3), ["0.0", "0.3"])],
)  # fmt: skip
def test_ticks_have_no_more_decimals_than_they_need(ticks: tuple[float, ...], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


@pytest.mark.parametrize("width", [1, 2, 5, 100])
def test_smoothing_is_the_mean_of_the_finite_neighbours(width: int) -> None:
    values = np.random.default_rng(0).normal(size=30)
    values[[3, 11]] = np.nan, np.inf
    for index, smoothed in enumerate(smooth(values, width)):
        around = values[max(index - width // 2, 0) : index + width // 2 + 1]
        finite = around[np.isfinite(around)]
        expected = finite.mean() if len(finite) else np.nan
        # Differences of running sums of 30 values of size 1: some 30 roundings of 1e-16.
        np.testing.assert_allclose(smoothed, expected, atol=1e-14)


def test_downsampling_keeps_ends_and_peaks() -> None:
    assert thin(5000, 250)[[0, -1]].tolist() == [0, 4999] and len(thin(5000, 250)) == 250
    assert thin(3, 250).tolist() == [0, 1, 2]
    values = np.zeros(5000)
    values[[1234, 4321]] = 9.0, -9.0
    values[2000] = np.nan
    kept = extremes(values, 800)
    assert len(kept) <= 800 and {1234, 4321} <= set(kept.tolist())


def test_a_chart_places_values_and_leaves_gaps() -> None:
    x = np.array([0.0, 25.0, 50.0, 75.0, 100.0])
    curve = Series(label="<curve>", x=x, y=np.array([0.0, 1.0, np.nan, 4.0, 5.0]), color="c1")
    dots = Series(label="dots", x=x[[0, 4]], y=np.array([5.0, 2.5]), color="c2", mark="points")
    svg = line_chart([curve, dots], title='"a" & <b>', x_end=100)
    assert 'd="M0.0 1000.0h0L250.0 800.0M750.0 200.0h0L1000.0 0.0"' in svg
    assert 'cx="0.0%" cy="0.0%"' in svg and 'cx="100.0%" cy="50.0%"' in svg
    assert 'aria-label="&#34;a&#34; &amp; &lt;b&gt;"' in svg and "<curve>" not in svg


def test_a_band_reaches_one_spread_above_the_line_and_below() -> None:
    y, spread = np.array([4.0, 6.0]), np.array([2.0, 4.0])
    svg = line_chart([Series(label="a", x=np.array([0.0, 1.0]), y=y, color="c1", spread=spread)], title="", x_end=1)
    assert 'class="band c1" d="M0.0 500.0h0L1000.0 0.0L1000.0 1000.0L0.0 1000.0"' in svg
