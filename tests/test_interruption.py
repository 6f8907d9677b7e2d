"""The first signal is a request, the second has its usual effect."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from dgpo_fast.interruption import SAME_REQUEST_S, Interrupted, Interruption
from dgpo_fast.parallel.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Asked(BaseException):
    """What the handlers in use before the test's `Interruption` raise."""


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    def usual(number: int, frame: object) -> None:
        raise Asked(number)

    before = {number: signal.signal(number, usual) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), SIGNALS.items())
def test_the_first_signal_waits_for_a_check(number: signal.Signals, status: int) -> None:
    with Interruption(ALONE) as interruption:
        interruption.check()
        signal.raise_signal(number)
        with pytest.raises(Interrupted) as interrupted:
            interruption.check()
    assert interrupted.value.status == status


@pytest.fixture
def pass_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock that interruptions look at."""
    now = [0.0]
    monkeypatch.setattr("dgpo_fast.interruption.time", SimpleNamespace(monotonic=lambda: now[0]))

    def pass_them(seconds: float) -> None:
        now[0] += seconds

    return pass_them


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_of_a_signal_has_its_usual_effect(
    number: signal.Signals, pass_seconds: Callable[[float], None]
) -> None:
    with Interruption(ALONE):
        signal.raise_signal(number)
        pass_seconds(SAME_REQUEST_S)
        with pytest.raises(Asked):
            signal.raise_signal(number)


def test_the_second_ctrl_c_need_not_wait() -> None:
    with Interruption(ALONE):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Asked):
            signal.raise_signal(signal.SIGINT)


def test_a_sigterm_that_is_passed_on_is_no_second_one(pass_seconds: Callable[[float], None]) -> None:
    with Interruption(ALONE) as interruption:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            pass_seconds(0.3 * SAME_REQUEST_S)
        with pytest.raises(Interrupted):
            interruption.check()
        pass_seconds(0.2 * SAME_REQUEST_S)
        with pytest.raises(Asked):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("first", "second"), [SIGNALS, [*SIGNALS][::-1]])
def test_one_of_each_signal_is_one_request(
    first: signal.Signals, second: signal.Signals, pass_seconds: Callable[[float], None]
) -> None:
    with Interruption(ALONE) as interruption:
        signal.raise_signal(first)
        signal.raise_signal(second)
        with pytest.raises(Interrupted) as interrupted:
            interruption.check()
        assert interrupted.value.status == SIGNALS[first]
        pass_seconds(SAME_REQUEST_S)
        with pytest.raises(Asked):
            signal.raise_signal(second)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_have_their_usual_effect_afterwards(number: signal.Signals) -> None:
    with Interruption(ALONE):
        pass
    with pytest.raises(Asked):
        signal.raise_signal(number)


def test_a_signal_to_another_rank_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "highest", lambda self, value: max(value, signal.SIGTERM))
    with Interruption(ALONE) as interruption, pytest.raises(Interrupted) as interrupted:
        interruption.check()
    assert interrupted.value.status == 143
