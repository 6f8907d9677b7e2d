"""The benchmark of rewards: models of the published classes, both ways in turn, waiting, and what tables make of it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import reward_models, reward_speed, reward_waiting  # noqa: E402
from benchmarks.pages import filled  # noqa: E402
from benchmarks.reward_speed import Speed, check, measure, tables, write  # noqa: E402
from benchmarks.reward_waiting import Iteration, Waiting, foreseen_s, measure_waiting  # noqa: E402
from dgpo_fast.environment import num_cores, processor_name  # noqa: E402
from dgpo_fast.rewards import known_rewards  # noqa: E402

TOWER = {"hidden_size": 160, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {
    "projection_dim": 32, "vision_config": {**TOWER, "image_size": 28, "patch_size": 14},
    "text_config": {**TOWER, "vocab_size": 1024},
}  # fmt: skip
SMALL: dict[str, Any] = {
    "CLIP_L": CLIP, "CLIP_H": CLIP, "BLIP": {"width": 64, "layers": 1, "image_size": 32, "patch_size": 16},
    "MED": {**reward_models.MED, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
            "num_hidden_layers": 1},
    "SWIN": {**reward_models.SWIN, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "MASK2FORMER": {
        **reward_models.MASK2FORMER, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
        "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2,
        "num_attention_heads": 2,
    },
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same models in a size that takes no time, and images of 64 px."""
    for name, sizes in SMALL.items():
        monkeypatch.setattr(reward_models, name, sizes)
    monkeypatch.setattr(reward_models, "SIDE", 64)


def speed(way: reward_speed.Way, **changes: Any) -> Speed:
    values = {
        "reward": "clipscore", "model": "CLIP", "weights": "random", "way": way, "images": 16, "threads": 2,
        "rounds": 3, "per_s": 3.0, "per_s_low": 2.0, "per_s_high": 40.0, "per_core_s": 1.5, "per_core_s_low": 1.25,
        "per_core_s_high": 1.75,
    }  # fmt: skip
    return Speed(**{**values, **changes})


def waiting(way: reward_waiting.Way, fraction: float, share: float) -> Waiting:
    return Waiting(
        fraction=fraction, measured_fraction=fraction, way=way, images=64, forwards=8, iterations=3, iteration_s=2.0,
        rollout_s=1.0, reward_s=2 * share, waiting=share, waiting_low=share / 2, waiting_high=2 * share, foreseen=share,
    )  # fmt: skip


# Rewards


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic", "geneval"])
def test_one_image_scores_as_in_a_batch(name: str, small: None, tmp_path: Path) -> None:
    """Through the code that published scorers have, and with scores that tell images and prompts apart."""
    found = reward_models.subject(name, tmp_path)
    check(name, found)
    if name != "geneval":  # whose detector finds nothing
        images, prompts = reward_models.images_and_prompts(2)
        ours = torch.as_tensor(reward_speed.first_metric(found.reward(images, prompts)))
        assert (ours[0] - ours[1]).abs() > 2 * reward_speed.TOLERANCE


def test_other_scores_are_refused(small: None, tmp_path: Path) -> None:
    found = reward_models.subject("clipscore", tmp_path)
    one = found.one
    wrong = reward_models.Subject(
        reward=found.reward, one=lambda image, prompt: one(image, prompt) + 1, model=found.model, weights=found.weights
    )
    with pytest.raises(AssertionError, match=r"^clipscore: "):
        measure("clipscore", wrong, images=2, seconds=0)


def test_both_ways_are_measured_in_turn_and_written(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = reward_models.subject("jpeg_compressibility", tmp_path)
    rows = measure("jpeg_compressibility", found, images=4, seconds=0)
    assert [(row.way, row.images, row.threads, row.rounds) for row in rows] == [
        ("batched", 4, num_cores(), 3), ("one by one", 1, 1, 3),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row.per_s_low <= row.per_s <= row.per_s_high
        assert 0 < row.per_core_s_low <= row.per_core_s <= row.per_core_s_high
    assert torch.get_num_threads() == threads
    write(rows, tmp_path / "new" / "jpeg_compressibility.csv")
    first, second = csv.DictReader((tmp_path / "new" / "jpeg_compressibility.csv").open())
    assert (first["reward"], first["weights"], second["way"]) == ("jpeg_compressibility", "none", "one by one")
    assert (first["processor"], first["cores"]) == (processor_name(), str(num_cores()))
    assert float(first["per_s"]) == pytest.approx(rows[0].per_s, rel=1e-3)
    assert all(first[name] for name in ("load", "torch", "commit", "date"))


def test_images_are_of_two_groups_and_no_two_are_alike() -> None:
    images, prompts = reward_models.images_and_prompts(4)
    assert images.shape == (4, 3, 512, 512)
    assert [prompts.index(prompt) for prompt in prompts] == [0, 0, 2, 2]
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_whatever_is_measured_is_a_reward() -> None:
    assert set(reward_models.SUBJECTS) <= set(known_rewards())


# Waiting


def test_overlapped_rewards_wait_less_than_those_scored_afterwards() -> None:
    """A small run of a reward that takes as long as the rollout, which afterwards is waited for in full."""
    overrides = (
        "groups.size=4", "groups.per_iteration=2", "rollout.images_per_forward=2", "rollout.steps=3", "adapter.rank=4",
        "optimizer.images_per_micro_batch=8", "model.sampling=auto", "algorithm.kl_cfg=1", "algorithm.trunc=2",
        "algorithm.train_timesteps=1",
    )  # fmt: skip
    ours, theirs = measure_waiting(seconds=0, fractions=(1.0,), overrides=overrides)
    assert (ours.way, theirs.way) == ("overlapped", "afterwards")
    assert (ours.images, ours.forwards, ours.iterations) == (8, 4, 3)
    assert 0 < ours.waiting < theirs.waiting <= theirs.waiting_high < 1
    assert theirs.waiting >= theirs.foreseen > ours.foreseen > 0


@pytest.mark.parametrize(
    ("fraction", "overlapped", "afterwards"), [(0.0, 0.0, 0.0), (0.5, 0.5, 4.0), (1.0, 1.0, 8.0), (1.5, 5.0, 12.0)]
)
def test_what_is_foreseen(fraction: float, overlapped: float, afterwards: float) -> None:
    """Eight forwards of a second, followed one by one: a forward's scores begin with its images, or with the last."""
    iteration = Iteration(seconds=20.0, rollout_s=8.0, reward_s=0.0, fraction=fraction)
    done = 0.0
    for forward in range(8):
        done = max(done, forward + 1.0) + fraction
    assert done - 8.0 == overlapped == foreseen_s(iteration, "overlapped", 8)
    assert foreseen_s(iteration, "afterwards", 8) == afterwards


# Tables


def test_tables_show_what_was_measured_and_where(tmp_path: Path) -> None:
    write([speed("batched"), speed("one by one", images=1, threads=1, per_s=1.0, per_core_s=1.0)],
          tmp_path / "clipscore.csv")  # fmt: skip
    write([waiting("overlapped", 0.5, 0.04), waiting("afterwards", 0.5, 0.25)], tmp_path / "waiting.csv")
    found = tables(tmp_path)
    assert found.keys() == {"reward-speed", "reward-waiting"}
    row, _, source = found["reward-speed"].splitlines()[2:]
    assert row == (
        "| `clipscore` | CLIP | 16 | 3.0 (2.0 to 40) | 1.0 (2.0 to 40) | 3.00 | 1.5 (1.2 to 1.8) | "
        "1.0 (1.2 to 1.8) | 1.50 |"
    )
    assert source.startswith(f"{processor_name()}, {num_cores()} cores, torch ")
    assert "load of the machine " in source
    row, _, source = found["reward-waiting"].splitlines()[2:]
    assert row == "| 0.5 | 4.0% (2.0% to 8.0%) | 4.0% | 25.0% (12.5% to 50.0%) | 2.00 s | 2.00 s |"
    assert "load of the machine " in source


def test_nothing_measured_is_an_empty_table(tmp_path: Path) -> None:
    for table in tables(tmp_path).values():
        assert len(table.splitlines()) == 2


def test_the_page_is_made_of_the_committed_results() -> None:
    """python -m benchmarks.reward_speed write"""
    page = reward_speed.PAGE.read_text(encoding="utf-8")
    assert filled(page, reward_speed.tables()) == page
