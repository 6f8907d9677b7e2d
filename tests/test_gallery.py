"""The gallery: its page as a browser reads it, the files it refers to, hostile prompts, and its histograms."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dgpo_fast.charts import histogram
from dgpo_fast.comparison import Evaluation
from dgpo_fast.gallery import picture_keeper, write_gallery
from dgpo_fast.records import Prompt
from dgpo_fast.report import format_number, format_signed
from dgpo_fast.samples import to_pictures
from dgpo_fast.statistics import Floats

PIXELS = 24
PROMPTS = ("a red circle", Prompt("two blue squares", {"category": "counting"}), "a green triangle above nothing")
BASE = {
    "strict": np.array([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]),
    "quality": np.array([[5.25, 5.5], [4.0, math.nan], [6.0, 6.0]]),
}
TUNED = {
    "strict": np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
    "quality": np.array([[5.5, 5.75], [math.nan, 4.5], [6.0, 6.0]]),
}


def evaluation(
    prompts: tuple[str, ...] = PROMPTS, base: dict[str, Floats] = BASE, tuned: dict[str, Floats] = TUNED
) -> Evaluation:
    return Evaluation(
        run="run", step=60, split="test", source="held-out.txt", prompts=prompts, images_per_prompt=2,
        base=base, tuned=tuned,
    )  # fmt: skip


def draw_all(folder: Path, *, num_prompts: int) -> torch.Tensor:
    """Writes images of both models, two of each prompt, in batches of any size; returns the tuned ones."""
    generator = torch.Generator().manual_seed(0)
    for side in ("base", "tuned"):
        images = torch.rand(2 * num_prompts, 3, 1, 1, generator=generator).expand(-1, -1, PIXELS, PIXELS)
        keep = picture_keeper(folder, side, first_image=0, images_per_prompt=2)
        keep(images[:3])
        keep(images[3:])
    return images


class Page(html.parser.HTMLParser):
    """Elements with their attributes, the text of each article, and what lies open; fails where tags do not close."""

    VOID = ("meta", "img", "line", "rect", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.articles: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "article":
            self.articles.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th", "small"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        self.text += data
        if "article" in self._open:
            self.articles[-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    draw_all(folder, num_prompts=len(PROMPTS))
    assert write_gallery(evaluation(), folder, pixels=PIXELS) == folder / "index.html"
    return folder


def words(text: str) -> str:
    return " ".join(text.split())


def test_every_prompt_stands_beside_its_images_and_scores(folder: Path) -> None:
    page = Page(folder / "index.html")
    articles = [words(text) for text in page.articles]
    assert len(articles) == 3
    assert "a red circle Mean Base Tuned Change strict 0.500 1 +0.500 quality 5.375 5.625 +0.250" in articles[0]
    assert "strict 0 → 1 · quality 5.250 → 5.500 strict 1 → 1 · quality 5.500 → 5.750" in articles[0]
    assert "two blue squares counting" in articles[1]
    assert "quality 4 4.500 n/a strict 0 → 0 · quality 4 → n/a strict 0 → 0 · quality n/a → 4.500" in articles[1]
    changes = [json.loads(article["data-changes"]) for article in page.all("article")]
    assert changes == [
        {"strict": 0.5, "quality": 0.25}, {"strict": 0.0, "quality": None}, {"strict": -0.5, "quality": 0.0},
    ]  # fmt: skip


def test_the_summary_is_the_comparison(folder: Path) -> None:
    page, found = words(Page(folder / "index.html").text), evaluation().comparisons
    for name, one in found.items():
        start = page.index(f" {name} ")
        row = page[start : start + 200]
        for shown in (
            *map(format_number, (one.base.mean, one.base.low, one.base.high, one.tuned.mean)),
            *map(format_signed, (one.change.mean, one.change.low, one.change.high)),
        ):
            assert shown in row
    assert found["quality"].num_failed == 2
    assert "1 better, 1 equal, 1 worse" in page and "1 better, 1 equal, 0 worse" in page


def test_all_that_it_refers_to_is_there_and_nothing_is_elsewhere(folder: Path) -> None:
    page = Page(folder / "index.html")
    files = {element[name] for _, element in page.elements for name in ("src", "href") if name in element}
    links = {file for file in files if file.startswith("#")}
    assert links == {f"#{article['id']}" for article in page.all("article")}
    assert {folder / file for file in files - links} == {*(folder / "images").iterdir()}
    assert len(files - links) == 3 * 2 * 2
    source = re.sub(r"^ *//.*$", "", (folder / "index.html").read_text(), flags=re.MULTILINE)  # without comments
    assert not re.search(r"https?:|//|url\(|@import|fetch\(|<link", source)


def test_images_are_those_that_were_given(tmp_path: Path) -> None:
    images = draw_all(tmp_path, num_prompts=3)
    for number in range(3):
        for image in range(2):
            with Image.open(tmp_path / "images" / f"{number:04d}-{image}-tuned.webp") as picture:
                shown = np.asarray(picture.convert("RGB"), dtype=np.float64)
            assert shown.shape == (PIXELS, PIXELS, 3)
            # WebP keeps colours in 8 bits of brightness and two differences: a few of 255 steps.
            np.testing.assert_allclose(shown.mean((0, 1)), 255 * images[2 * number + image, :, 0, 0], atol=5)


def test_images_for_other_programs_are_as_they_were_drawn(tmp_path: Path) -> None:
    images_BCHW = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    picture_keeper(tmp_path, "tuned", first_image=0, images_per_prompt=2, lossless=True)(images_BCHW)
    for number, drawn in enumerate(to_pictures(images_BCHW)):
        with Image.open(tmp_path / "images" / f"0000-{number}-tuned.webp") as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(drawn))


def test_ranks_number_their_images_from_their_first(tmp_path: Path) -> None:
    picture_keeper(tmp_path, "base", first_image=6, images_per_prompt=2)(torch.zeros(3, 3, 8, 8))
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["0003-0-base.webp", "0003-1-base.webp", "0004-0-base.webp"]


def test_it_can_be_heard_and_worked_by_keys(folder: Path) -> None:
    page = Page(folder / "index.html")
    images = page.all("img")
    assert [image["alt"] for image in images[:4]] == [
        "Base, image 1: a red circle", "Tuned, image 1: a red circle",
        "Base, image 2: a red circle", "Tuned, image 2: a red circle",
    ]  # fmt: skip
    assert all(int(image["width"]) == int(image["height"]) == PIXELS and image["loading"] == "lazy" for image in images)
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in page.all("svg"))
    assert [html["lang"] for html in page.all("html")] == ["en"]
    assert all("scope" in heading for heading in page.all("th"))
    # Native controls within their labels, in the document's order; what scrolls can be reached too.
    assert [len(page.all(tag)) for tag in ("label", "select", "input")] == [4, 3, 1]
    assert [attributes for _, attributes in page.elements if "tabindex" in attributes] == [
        {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Table of scores"}
    ]
    assert [output["aria-live"] for output in page.all("output")] == ["polite"]


def test_without_a_script_all_is_visible(folder: Path) -> None:
    """Only the controls wait for the script, which has no use without them."""
    hidden = [attributes.get("id") for _, attributes in Page(folder / "index.html").elements if "hidden" in attributes]
    assert hidden == ["controls"]


HOSTILE = "</script><script>alert('1')</script><img src=x onerror=\"alert(2)\">{{ 7 * 7 }}&amp;"


def test_everything_is_escaped(tmp_path: Path) -> None:
    scores = {HOSTILE: BASE["strict"][:1]}
    prompts = (Prompt(HOSTILE, {"category": HOSTILE}),)
    found = Evaluation(
        run=HOSTILE, step=1, split="test", source=HOSTILE, prompts=prompts, images_per_prompt=2, base=scores,
        tuned=scores,
    )  # fmt: skip
    page = Page(write_gallery(found, tmp_path, pixels=PIXELS))
    assert len(page.all("script")) == 1 and len(page.all("img")) == 4
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count(HOSTILE) >= 8
    assert page.all("img")[0]["alt"] == f"Base, image 1: {HOSTILE}"
    assert [*json.loads(page.all("article")[0]["data-changes"])] == [HOSTILE]


def test_a_metric_that_always_failed_has_a_row_and_no_chart(tmp_path: Path) -> None:
    nothing = {"strict": np.full((3, 2), math.nan)}
    page = Page(write_gallery(evaluation(base=nothing), tmp_path, pixels=PIXELS))
    assert len(page.all("svg")) == 0 and "nan" not in page.text.lower()
    assert "strict n/a n/a n/a - 6" in words(page.text)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the page's script")
def test_the_script_orders_and_filters(folder: Path) -> None:
    """On a stand-in for the document with just what the script asks of it."""
    page = Page(folder / "index.html")
    script = re.search(r"<script>(.*)</script>", (folder / "index.html").read_text(), re.DOTALL)
    assert script is not None
    entries = [
        {"changes": article["data-changes"], "text": words(text).partition(" Mean ")[0]}  # of its heading
        for article, text in zip(page.all("article"), page.articles, strict=True)
    ]
    program = """
const form = {listeners: {}, hidden: true, addEventListener(kind, act) { this.listeners[kind] = act; }};
const fields = {controls: form, metric: {value: "strict"}, order: {value: "given"}, show: {value: "all"},
  containing: {value: ""}, shown: {}};
let placed = [];
const children = ENTRIES.map((entry, number) => ({number, dataset: {changes: entry.changes}, hidden: false,
  querySelector: () => ({textContent: entry.text})}));
fields.entries = {children, append: element => placed.push(element)};
const document = {getElementById: id => fields[id]};
SCRIPT
const seen = [];
for (const [metric, order, show, containing] of CASES) {
  Object.assign(fields.metric, {value: metric}); fields.order.value = order;
  fields.show.value = show; fields.containing.value = containing;
  placed = [];
  form.listeners.input();
  seen.push([placed.filter(element => !element.hidden).map(element => element.number), fields.shown.textContent]);
}
console.log(JSON.stringify([form.hidden, seen]));
"""
    cases = {
        ("strict", "given", "all", ""): [0, 1, 2],
        ("strict", "improved", "all", ""): [0, 1, 2],
        ("strict", "worsened", "all", ""): [2, 1, 0],
        ("quality", "worsened", "all", ""): [2, 0, 1],
        ("quality", "improved", "all", ""): [0, 2, 1],
        ("strict", "given", "better", ""): [0],
        ("strict", "given", "equal", ""): [1],
        ("strict", "given", "worse", ""): [2],
        ("quality", "given", "failed", ""): [1],
        ("strict", "worsened", "all", " Re"): [2, 1, 0],
        ("strict", "worsened", "all", "A GR"): [2],
        ("strict", "given", "all", "COUNTING"): [1],
    }
    program = program.replace("SCRIPT", script[1]).replace("CASES", json.dumps([*cases]))
    program = program.replace("ENTRIES", json.dumps(entries))
    run = subprocess.run(["node", "-e", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    hidden, seen = json.loads(run.stdout)
    assert hidden is False
    expected = [[numbers, f"{len(numbers)} of 3 prompts"] for numbers in cases.values()]
    assert seen == expected


def bars(svg: str) -> list[tuple[float, float, float]]:
    """Left end, width and height of each bar, in percent."""
    found = re.findall(r'<rect class="bar c1" x="(.+?)%" y="(.+?)%" width="(.+?)%" height="(.+?)%"/>', svg)
    assert all(float(y) + float(height) == pytest.approx(100, abs=1e-2) for _, y, _, height in found)
    return [(float(x), float(width), float(height)) for x, _, width, height in found]


def test_a_histogram_counts_around_zero() -> None:
    """Ticks at multiples of 0.1 and four bars to a tick: 17 bars with their centres at multiples of 0.025."""
    values = np.array([-0.2, -0.2, 0.0, 0.0, 0.0, 0.0, 0.02, 0.05, 0.2])
    svg = histogram(values, title='"a" & <b>', color="c1", mean=values.mean(), band=(-0.1, 9.0))
    drawn = bars(svg)
    width = 100 / 17
    assert [round((x + width / 2) / width - 0.5) for x, _, _ in drawn] == [0, 8, 9, 10, 16]
    assert [height for _, _, height in drawn] == pytest.approx([50, 100, 25, 25, 25], abs=0.01)
    assert all(each == pytest.approx(width, abs=0.01) for _, each, _ in drawn)
    assert '<line class="zero" x1="50.0%"' in svg
    # The band ends where the axis does.
    band = re.search(r'class="band c1" x="(.+?)%" width="(.+?)%"', svg)
    assert band is not None and float(band[1]) + float(band[2]) == pytest.approx(100, abs=0.01)
    assert 'aria-label="&#34;a&#34; &amp; &lt;b&gt;"' in svg


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-7, 3e-7], [-1e6, 1e6], [-3.0], [0.25] * 5])
def test_every_value_is_in_a_bar(values: list[float]) -> None:
    svg = histogram(np.array(values), title="", color="c1", mean=float(np.mean(values)), band=(math.nan, math.nan))
    highest = max(np.unique(values, return_counts=True)[1])
    total = sum(height for _, _, height in bars(svg)) / 100 * highest
    assert total == pytest.approx(len(values), abs=0.01)
    assert "band" not in svg and "nan" not in svg


@pytest.mark.parametrize("width", [80, 100])
def test_a_table_is_readable_in_a_terminal(width: int) -> None:
    """As wide as numbers get, with every name of the drawbench recipe whole."""
    names = ("aesthetic", "imagereward", "pickscore", "deqa", "unifiedreward")
    rng = np.random.default_rng(0)
    base = {name: rng.normal(22, 1, (8, 2)) for name in names}
    tuned = {name: values - 0.3 for name, values in base.items()}
    tuned["deqa"][0, 0] = math.nan
    console = Console(width=width, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(evaluation(("a",) * 8, base, tuned).as_table())
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    for name in names:
        (row,) = (line for line in lines if line.strip().startswith(name))
        assert re.search(r"-0\.300 +-0\.300 to -0\.300 +< 0\.001 +0 % \(0-32\)", row), row
    assert "1 of deqa" in capture.get()


def test_long_names_of_metrics_leave_no_number_out() -> None:
    console, scores = Console(width=80, file=None), np.arange(8.0)[:, None].repeat(2, 1)
    base, tuned = {"jpeg_compressibility": scores}, {"jpeg_compressibility": scores - 0.3}
    with console.capture() as capture:
        console.print(evaluation(("a",) * 8, base, tuned).as_table())
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    assert all(part in words for part in ("jpeg_compress", "ibility", "-0.300000 to", "< 0.001", "0 %", "(0-32)")), (
        shown
    )
