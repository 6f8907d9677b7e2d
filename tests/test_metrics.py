"""The logs of a run: what they hold, when it is on disk, and that a resumed run's are those of an uninterrupted one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from threading import Timer

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgpo_fast.errors import UserError
from dgpo_fast.guard import Finding
from dgpo_fast.metrics import SECTIONS, MetricsLog, read_evaluations, read_metrics, read_warnings
from dgpo_fast.records import StepReport
from dgpo_fast.samples import save_grid

CONTRACT_KEYS = (
    "step", "iteration", "images_seen", "wall_s", "reward_mean", "reward_std", "zero_std_groups", "loss", "dgpo_loss",
    "kl", "clip_fraction", "group_weight_mean", "grad_norm", "lr", "rollout_s", "reward_s", "train_s", "images_per_s",
    "peak_memory_gb",
)  # fmt: skip


def report(step: int, *, loss: float = 0.1) -> StepReport:
    """A step with a value of its own in every field."""
    fields = [field for field in dataclasses.fields(StepReport) if "Mapping" not in str(field.type)]
    values = {field.name: (index + 1) / 3 + step for index, field in enumerate(fields) if "float" in str(field.type)}
    counts = {field.name: 10 * step + index for index, field in enumerate(fields) if field.type == "int"}
    rewards = {"pickscore": 21.5 + step, "shapes.soft": 0.5}
    return StepReport(**{**values, **counts, "step": step, "loss": loss, "rewards": rewards})  # type: ignore[arg-type]


def open_log(run_dir: Path, *, resume_step: int | None = None, tensorboard: bool = False) -> MetricsLog:
    return MetricsLog(run_dir, config={}, tensorboard=tensorboard, wandb=False, resume_step=resume_step)


def evaluate(log: MetricsLog, step: int) -> None:
    scores = {"strict": step / 7, "soft": step / 3}
    log.write_evaluation(step, num_prompts=64, images_per_prompt=4, base={"strict": 0.4}, tuned=scores)


def finding(step: int) -> Finding:
    return Finding(step, "reward", step - 1, "the reward fell", ("optimizer.lr=1e-4 (now 1e-3)",), "warn")


def write_steps(log: MetricsLog, steps: range) -> None:
    for step in steps:
        log.write(report(step))
        if step % 2 == 0:
            evaluate(log, step)
        if step % 3 == 0:
            log.write_finding(finding(step))


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_line_holds_the_step_in_the_order_of_the_record_and_is_on_disk_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(report(1))
    line = (tmp_path / "metrics.jsonl").read_text()
    single = {"reward/pickscore": 22.5, "reward/shapes.soft": 0.5}
    rest = {name: value for name, value in dataclasses.asdict(report(1)).items() if name not in ("rewards", "extra")}
    assert line == json.dumps(rest | single) + "\n"
    assert list(rest) == [field.name for field in dataclasses.fields(StepReport)][:-2]
    assert set(CONTRACT_KEYS) <= set(json.loads(line))
    evaluate(log, 1)
    assert read_evaluations(tmp_path) == [
        {
            "step": 1,
            "split": "test",
            "num_prompts": 64,
            "images_per_prompt": 4,
            "base": {"strict": 0.4},
            "tuned": {"strict": 1 / 7, "soft": 1 / 3},
        }
    ]
    log.close()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """No reader of JSON but Python's own takes NaN."""
    log = open_log(tmp_path)
    step = dataclasses.replace(report(1, loss=math.nan), grad_norm=math.inf, rewards={"one": -math.inf, "two": 2.0})
    log.write(step)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (line,) = read_metrics(tmp_path)
    assert line["loss"] is line["grad_norm"] is line["reward/one"] is None and line["reward/two"] == 2.0


def test_a_held_out_metric_that_nobody_knows_is_null_on_disk_and_nan_when_read(tmp_path: Path) -> None:
    with contextlib.closing(open_log(tmp_path)) as log:
        log.write_evaluation(
            1, num_prompts=2, images_per_prompt=1, base={"a": math.nan}, tuned={"a": math.inf, "b": 0.5}
        )
    line = json.loads((tmp_path / "evaluations.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["base"], line["tuned"]) == ({"a": None}, {"a": None, "b": 0.5})
    (read,) = read_evaluations(tmp_path)
    assert math.isnan(read["base"]["a"]) and math.isnan(read["tuned"]["a"]) and read["tuned"]["b"] == 0.5


def test_every_metric_is_plotted_once() -> None:
    plotted = [key for keys in SECTIONS.values() for key in keys]
    assert sorted([*plotted, "step", "iteration", "rewards", "extra"]) == sorted(
        field.name for field in dataclasses.fields(StepReport)
    )


def test_what_only_ones_own_method_has_is_told_and_plotted(tmp_path: Path) -> None:
    values = {**dataclasses.asdict(report(1)), "temperature": 0.5}
    step = StepReport.of(**{name: value for name, value in values.items() if name != "extra"})
    assert step == dataclasses.replace(report(1), extra={"temperature": 0.5})
    with contextlib.closing(open_log(tmp_path, tensorboard=True)) as log:
        log.write(step)
    assert read_metrics(tmp_path)[0]["temperature"] == 0.5
    assert scalars(tmp_path, "method/temperature") == [(1, 0.5)]


@pytest.mark.parametrize("torn", [0, 1, 20, -1], ids=lambda n: f"torn-{n}")
@pytest.mark.parametrize("resume_step", [0, 3, 4])
def test_a_resumed_log_ends_equal_to_an_uninterrupted_one(tmp_path: Path, torn: int, resume_step: int) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for run_dir, steps in ((straight, range(1, 9)), (killed, range(1, 6))):
        run_dir.mkdir()
        log = open_log(run_dir)
        write_steps(log, steps)
        log.close()
    for name in ("metrics.jsonl", "evaluations.jsonl", "warnings.jsonl"):
        last = (killed / name).read_bytes().splitlines(keepends=True)[-1]
        with (killed / name).open("ab") as file:
            file.write(last[:torn])
    log = open_log(killed, resume_step=resume_step)
    assert [line["step"] for line in read_metrics(killed)] == list(range(1, resume_step + 1))
    write_steps(log, range(resume_step + 1, 9))
    log.close()
    for name in ("metrics.jsonl", "evaluations.jsonl", "warnings.jsonl"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()


def test_tensorboard_forgets_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    log = open_log(tmp_path, tensorboard=True)
    for step in range(1, 6):
        log.write(report(step, loss=1.0))
    evaluate(log, 5)
    log.close()
    log = open_log(tmp_path, tensorboard=True, resume_step=3)
    for step in range(4, 7):
        log.write(report(step, loss=2.0))
    log.close()
    assert scalars(tmp_path, "loss/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert scalars(tmp_path, "evaluation/strict") == []
    assert scalars(tmp_path, "reward/pickscore")[-1] == (6, 27.5), "each reward by itself"


def test_a_finding_is_a_line_written_once(tmp_path: Path) -> None:
    """A resumed run may find it again at its first step; TensorBoard shows it as text."""
    log = open_log(tmp_path, tensorboard=True)
    log.write_finding(finding(3))
    log.write_finding(finding(4))
    log.close()
    log = open_log(tmp_path, resume_step=3)
    for step in (3, 3, 5):
        log.write_finding(finding(step))
    log.close()
    assert read_warnings(tmp_path) == [
        {"step": step, "name": "reward", "since": step - 1, "what": "the reward fell",
         "advice": ["optimizer.lr=1e-4 (now 1e-3)"], "action": "warn"}
        for step in (3, 5)
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path)).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("guard/text_summary")]
    assert texts == [finding(step).line for step in (3, 4)]


def test_tensorboard_shows_sample_grids(tmp_path: Path) -> None:
    save_grid(torch.rand(2, 3, 64, 64), ["a", "b"], tmp_path / "grid.png")
    log = open_log(tmp_path, tensorboard=True)
    log.write_samples(7, grid=tmp_path / "grid.png")
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("samples")
    assert image.step == 7 and image.width > 2 * 192


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: no JSON"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: no JSON"):
        open_log(tmp_path, resume_step=3)


def test_a_missing_wandb_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install wandb, or set logging\.wandb=false") as caught:
        MetricsLog(tmp_path, config={}, tensorboard=False, wandb=True, resume_step=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


class FakeWandb(types.ModuleType):
    """Weights & Biases as far as the log uses it: what was opened and logged."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, object]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: object) -> FakeWandb:
        if settings["config"] == {"name": "refused"}:
            raise self.Error("no API key")
        self.opened.append(settings)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_every_metric_and_a_resumed_run_continues_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for resume_step in (None, 1, None):
        log = MetricsLog(tmp_path, config={"name": "tiny"}, tensorboard=False, wandb=True, resume_step=resume_step)
        log.write(report((resume_step or 0) + 1))
        log.close()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    MetricsLog(tmp_path, config={"name": "tiny"}, tensorboard=False, wandb=True, resume_step=None).close()
    first, second, another, elsewhere = fake.opened
    assert first["project"] == "dgpo-fast" and elsewhere["project"] == "mine"
    assert first["id"] == second["id"] != another["id"]
    assert first["config"] == {"name": "tiny"} and fake.finished == 4
    (step, values), *_ = fake.logged
    assert step == 1 and values["loss/kl"] == report(1).kl and values["reward/shapes.soft"] == 0.5
    assert len(values) == len(dataclasses.fields(StepReport)) - 4 + len(report(1).rewards)


def test_a_refusing_wandb_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(UserError, match="wandb: no API key") as caught:
        MetricsLog(tmp_path, config={"name": "refused"}, tensorboard=False, wandb=True, resume_step=None)
    open_log(tmp_path).close()  # while the error is still at hand: it has let the directory go
    assert "\n" not in str(caught.value)


def test_one_that_goes_on_waits_until_the_lock_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's disk that of a process that was killed stays for a while."""
    monkeypatch.setattr("dgpo_fast.metrics.RELEASED_S", 20.0)
    log = open_log(tmp_path)
    timer = Timer(0.3, log.close)
    timer.start()
    open_log(tmp_path, resume_step=0).close()
    timer.join()


def test_a_log_is_written_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that resumes, or begins anew, while another still runs would cut lines away that it then writes behind."""
    monkeypatch.setattr("dgpo_fast.metrics.RELEASED_S", 0.05)
    log = open_log(tmp_path)
    log.write(report(1))
    for resume_step, way_out in ((None, "end it, or give another --out"), (0, "end it first")):
        with pytest.raises(UserError, match=f"^{tmp_path}: a run that is not over writes there; {way_out}$"):
            open_log(tmp_path, resume_step=resume_step)
    log.write(report(2))
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    open_log(tmp_path, resume_step=1).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    open_log(tmp_path).close()
    assert read_metrics(tmp_path) == []
