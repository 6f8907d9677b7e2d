"""The guard of speed: what it makes of a table of engines, of noise, and of a history."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import speed_check  # noqa: E402
from benchmarks.speed_check import HISTORY, Record, compare, loss, picture, read, records, write  # noqa: E402

NOW = Record(
    date="2026-12-01", commit="abc1234", device="a CPU, 2 threads", torch="2.13.0", model="embedded", variant="fused",
    work="iteration", speedup=1.5, error=0.02,
)  # fmt: skip


def row(variant: str, speedup: str, *, low: str = "90", median: str = "100", high: str = "110") -> dict[str, str]:
    return {
        "model": "embedded", "variant": variant, "work": "iteration", "rounds": "16", "median_ms": median,
        "low_ms": low, "high_ms": high, "speedup": speedup, "device": "a CPU", "torch": "2.13.0", "commit": "abc",
        "date": "2026-12-01",
    }  # fmt: skip


def test_a_table_gives_a_record_for_each_engine() -> None:
    matmul = row("matmul", "") | {"work": "768^3"}
    found = list(records([row("published", "1.000"), row("fused", "2.000", low="45", median="50", high="55"), matmul]))
    assert [(each.variant, each.speedup) for each in found] == [("fused", 2.0)]
    # 20 % and 80 % lie 0.1 of the median on either side: a deviation of 0.1 / 0.8416, of 16 rounds' median a
    # 1.2533 / 4th of it, and twice that variance for the two.
    assert found[0].error == pytest.approx(2**0.5 * 1.2533 / 4 * 0.1 / 0.8416, rel=1e-3)


@pytest.mark.parametrize(("speedup", "is_loss"), [(1.5, False), (1.9, False), (1.36, False), (1.2, True)])
def test_a_loss_is_more_than_noise(speedup: float, is_loss: bool) -> None:
    """Three standard errors of two measurements, 3 x 2.83 %, and 3 %: 11.5 % of 1.5 is 1.33."""
    assert (loss(replace(NOW, speedup=speedup), NOW) > 0) is is_loss


def test_the_newest_record_of_the_same_device_counts() -> None:
    older, other = replace(NOW, speedup=3.0, date="2026-11-01"), replace(NOW, speedup=3.0, device="another CPU")
    lines, is_fine = compare([NOW], [older, NOW, other])
    assert is_fine
    assert "as fast" in lines[0]
    lines, is_fine = compare([replace(NOW, speedup=1.0)], [older, NOW, other])
    assert not is_fine
    assert "SLOWER" in lines[0]
    lines, is_fine = compare([replace(NOW, device="a third CPU")], [older, NOW, other])
    assert is_fine
    assert "nothing recorded on a third CPU" in lines[0]


def test_a_history_is_written_and_read(tmp_path: Path) -> None:
    assert read(tmp_path / "history.csv") == []
    write(tmp_path / "history.csv", [NOW, replace(NOW, date="2026-12-02")])
    assert read(tmp_path / "history.csv") == [NOW, replace(NOW, date="2026-12-02")]


def test_the_picture_is_of_the_committed_history() -> None:
    assert speed_check.PICTURE.read_text(encoding="utf-8") == picture(read(HISTORY))
