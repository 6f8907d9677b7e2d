"""An exported model's README.md: what hubs read of it, and the lines by which it is used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from dgpo_fast import load_recipe
from dgpo_fast.cli import main
from dgpo_fast.config import Config, dump_config
from dgpo_fast.export import CONFIG_FILE, export_run
from dgpo_fast.metrics import read_evaluations
from dgpo_fast.model_card import model_card


def with_model(run: Path, name: str) -> Config:
    config = load_recipe(run / "config.yaml")
    return config.model_copy(update={"model": config.model.model_copy(update={"name": name})})


def test_the_card_says_what_it_is_and_what_it_scores(straight_run: Path, tmp_path: Path) -> None:
    hub = "stabilityai/stable-diffusion-3.5-medium"
    (tmp_path / "README.md").write_text(model_card(straight_run, with_model(straight_run, hub), step=6))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.pipeline_tag) == (hub, "diffusers", "text-to-image")
    assert "lora" in card.data.tags
    assert f"A LoRA of {hub}, fine-tuned by [DGPO](" in card.text and "for 6 optimizer steps" in card.text
    last = read_evaluations(straight_run)[-1]
    for metric, tuned in last["tuned"].items():
        assert f"| {metric} | {last['base'][metric]:.3f} | {tuned:.3f} |" in card.text
    assert "optimizer steps" in model_card(straight_run, with_model(straight_run, "embedded"), step=5), "not evaluated"
    embedded = ModelCard(model_card(straight_run, with_model(straight_run, "embedded"), step=5))
    assert embedded.data.base_model is None and "held-out" not in embedded.text


def test_a_card_names_a_hubs_model_at_its_commit_and_no_path(straight_run: Path) -> None:
    """A directory may look like a name of the hub; only what has a commit is one."""
    local, pinned = (
        with_model(straight_run, "models/mine"),
        with_model(straight_run, "some/model").at_commit(40 * "1"),
    )
    card = model_card(straight_run, pinned, step=6)
    assert ModelCard(card).data.base_model == "some/model" and f'"some/model", revision="{40 * "1"}"' in card
    card = model_card(straight_run, local, step=6)
    assert ModelCard(card).data.base_model is None and "models/mine" not in card and "a local model" in card
    card = model_card(straight_run, with_model(straight_run, "random:sd35-medium"), step=6)
    assert "random weights" in card and "## Use" not in card


def test_a_run_is_exported_where_its_model_is_not_and_drawn_with_where_its_method_is_not(
    straight_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are a LoRA, which needs neither; what says how it is drawn does not name them."""
    run = shutil.copytree(straight_run, tmp_path / "run", symlinks=True)
    (run / "config.yaml").write_text(dump_config(with_model(run, "/gone/model")))
    lora = export_run(run, tmp_path / "lora")
    saved = lora / CONFIG_FILE
    there = saved.read_text()
    assert there.count("  name: dgpo\n") == 1
    saved.write_text(there.replace("  name: dgpo\n", "  name: gone:Method\n"))
    arguments = ["--prompt", "a red circle", "--lora", str(lora), "--out", str(tmp_path / "images")]
    with pytest.raises(SystemExit, match=r"^(None|0)$"):
        main(["sample", "embedded", *arguments])
    assert capsys.readouterr().out == f"{tmp_path / 'images' / '0000.png'}\n"


def test_its_lines_draw_what_sample_draws(straight_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `sample --lora` does with what the export knows of its run: it lies in none."""
    lora = export_run(straight_run, tmp_path / "lora")
    (code,) = re.findall(r"```python\n(.*?)```", (lora / "README.md").read_text(), re.DOTALL)
    (prompt,) = re.findall(r'"(a photo .*)"', code)
    drawn: dict[str, Any] = {}
    monkeypatch.chdir(lora)
    torch.manual_seed(7)
    exec(code.replace('.to("cuda")', ""), drawn)
    arguments = ["--prompt", prompt, "--lora", str(lora), "--seed", "7", "--out", str(tmp_path / "images")]
    with pytest.raises(SystemExit, match=r"^(None|0)$"):
        main(["sample", "embedded", *arguments])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / "0000.png")), np.asarray(drawn["image"]))
