"""The guard of speed: what it makes of a table of engines, of noise, and of a history."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import learning_check, speed_check  # noqa: E402
from benchmarks.bench_engines import Timing  # noqa: E402
from benchmarks.judge_noise import Judged  # noqa: E402
from benchmarks.speed_check import (  # noqa: E402
    HISTORY,
    Record,
    compare,
    has_lost,
    measures,
    picture,
    read,
    records,
    too_few,
    write,
)

NOW = Record(
    date="2026-12-01", commit="abc1234", device="a CPU, 2 threads", torch="2.13.0", model="embedded", variant="fused",
    work="iteration", speedup=1.5, error=0.02,
)  # fmt: skip


def row(variant: str, speedup: str, *, rounds: int = 16) -> dict[str, str]:
    return {
        "model": "embedded", "variant": variant, "work": "iteration", "rounds": str(rounds), "speedup": speedup,
        "speedup_error": "0.0100", "device": "a CPU", "torch": "2.13.0", "commit": "abc", "date": "2026-12-01",
    }  # fmt: skip


def test_a_table_gives_a_record_for_each_engine() -> None:
    matmul = row("matmul", "") | {"work": "768^3", "speedup_error": ""}
    rows = [row("published", "1.000"), row("fused", "2.000"), matmul]
    assert [(each.variant, each.speedup, each.error) for each in records(rows)] == [("fused", 2.0, 0.01)]
    assert too_few(rows) == []


def test_too_few_rounds_give_none() -> None:
    rows = [row("published", "1.000", rounds=7), row("fused", "2.000", rounds=7)]
    assert list(records(rows)) == []
    assert too_few(rows) == ["iteration: 7 rounds are too few to tell, of 8: give a longer --seconds"]


def test_what_moves_both_of_a_round_is_no_error() -> None:
    """Rounds that take from once to twice as long, of which a ratio scatters by a hundredth: of a normal one of that
    deviation, from its quantiles, and of the median of nine rounds 1.2533 / 3 of it."""
    pace = [1.0 + number / 8 for number in range(9)]
    ratios = [2 + 0.02 * NormalDist().inv_cdf((number + 1) / 10) for number in range(9)]
    published = Timing(seconds=[ratio * each for ratio, each in zip(ratios, pace, strict=True)])
    speedup, error = Timing(seconds=pace).speedup_over(published)
    assert speedup == pytest.approx(2, rel=1e-12)
    assert error == pytest.approx(1.2533 / 3 * 0.01, rel=1e-3)
    few = Timing(seconds=[1.0, 1.0])
    assert math.isnan(few.speedup_over(few)[1])


@pytest.mark.parametrize(("speedup", "is_loss"), [(1.5, False), (1.9, False), (1.36, False), (1.2, True)])
def test_a_loss_is_more_than_noise(speedup: float, is_loss: bool) -> None:
    """Three standard errors of two measurements, 3 x 2.83 %, and 3 %: 11.5 % of 1.5 is 1.33."""
    assert has_lost(replace(NOW, speedup=speedup), NOW) is is_loss


def test_the_same_device_counts_since_a_loss_was_accepted() -> None:
    older, other = replace(NOW, speedup=3.0, date="2026-11-01"), replace(NOW, speedup=3.0, device="another CPU")
    (line,), has_lost, is_known = compare([NOW], [older, NOW, other])
    assert not has_lost and is_known and "as fast" in line
    (line,), has_lost, is_known = compare([replace(NOW, speedup=1.0)], [older, NOW, other])
    assert has_lost and is_known and "SLOWER" in line
    (line,), has_lost, is_known = compare([replace(NOW, device="a third CPU")], [older, NOW, other])
    assert not has_lost and not is_known and "NOT COMPARED: nothing is recorded on a third CPU" in line


def test_losses_within_noise_do_not_add_up() -> None:
    """Of three by 6 % each, where 11.5 % are noise, the second is seen though the first was recorded."""
    history = [replace(NOW, speedup=1.5 * 0.94**number) for number in range(2)]
    assert not has_lost(history[1], history[0])
    again = replace(NOW, speedup=1.5 * 0.94**2)
    assert not has_lost(again, history[1]) and compare([again], history).has_lost
    faster = replace(NOW, speedup=1.6)
    assert [*measures([*history, faster, NOW]).values()] == [faster]


@pytest.mark.parametrize(
    ("given", "speedup", "rounds", "status", "recorded"),
    [
        ((), 1.5, 9, 0, 0), (("--record",), 1.5, 9, 0, 1), (("--record",), 1.0, 9, 1, 0),
        (("--record", "--accept"), 1.0, 9, 1, 1), ((), 1.5, 7, 1, 0),
    ],
)  # fmt: skip
def test_a_loss_is_not_recorded_unseen(
    given: tuple[str, ...], speedup: float, rounds: int, status: int, recorded: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Else the next loss would be compared with it."""
    history, table = tmp_path / "history.csv", tmp_path / "engines.csv"
    write(history, [replace(NOW, device="a CPU")])
    rows = [row("published", "1.000", rounds=rounds), row("fused", f"{speedup:.3f}", rounds=rounds)]
    with table.open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(speed_check, "HISTORY", history)
    monkeypatch.setattr(speed_check, "PICTURE", tmp_path / "history.svg")
    monkeypatch.setattr(sys, "argv", ["speed_check", "--from", str(table), *given])
    with pytest.raises(SystemExit) as exited:
        speed_check.main()
    assert int(exited.value.code or 0) == status
    assert len(read(history)) == 1 + recorded


def test_learning_is_compared_by_the_same_noises() -> None:
    """A score within what other seeds differ by is as good; what learns half as fast is seen."""

    def judged(*scores: float) -> list[Judged]:
        return [Judged(noise, score, 0.03) for noise, score in enumerate(scores, start=1)]

    line, is_fine = learning_check.verdict(judged(0.80, 0.76, 0.75), judged(0.86, 0.83, 0.78))
    assert is_fine and line.startswith("DGPO after 30 iterations: 77.0% exact, 82.3% recorded: as fast")
    line, is_fine = learning_check.verdict(judged(0.75, 0.73, 0.71), judged(0.86, 0.83, 0.78))
    assert not is_fine and "73.0% exact, 82.3% recorded: SLOWER" in line


def test_a_history_is_written_and_read(tmp_path: Path) -> None:
    assert read(tmp_path / "history.csv") == []
    write(tmp_path / "history.csv", [NOW, replace(NOW, date="2026-12-02")])
    assert read(tmp_path / "history.csv") == [NOW, replace(NOW, date="2026-12-02")]


def test_the_picture_is_of_the_committed_history() -> None:
    assert speed_check.PICTURE.read_text(encoding="utf-8") == picture(read(HISTORY))
