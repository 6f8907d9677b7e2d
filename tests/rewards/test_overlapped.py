"""Scores found while others are sampled are those found afterwards, whatever the rewards do."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.config import Config, load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.profiling import StageClock, stage, use_clock, watched_by
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards import OverlappedScoring, Scorer, base, calling, overlapped

TINY = load_recipe("tiny-dgpo")
BATCHES = (3, 2, 3)
PROMPTS = [f"image {number}" for number in range(sum(BATCHES))]
TIMEOUT_S = 60.0
"""For what happens at once, or the test fails."""

Score = Callable[[Tensor, Sequence[str]], Any]


@pytest.fixture(scope="module")
def model(make_model: Callable[[Config], StableDiffusion3]) -> StableDiffusion3:
    return make_model(TINY)


@pytest.fixture(scope="module")
def batches(model: StableDiffusion3) -> list[tuple[Tensor, list[str]]]:
    latents = torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))
    starts = [sum(BATCHES[:place]) for place in range(len(BATCHES))]
    return list(
        zip(latents.split(BATCHES), [PROMPTS[s : s + n] for s, n in zip(starts, BATCHES, strict=True)], strict=True)
    )


@pytest.fixture(autouse=True)
def clock() -> Iterator[StageClock]:
    own = StageClock()
    use_clock(own)
    yield own
    use_clock(StageClock())


def scorer(reward: Score, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Scorer:
    monkeypatch.setattr(calling, "BACKOFF_S", 0.0)
    monkeypatch.setattr(base, "_FACTORIES", {"mine": lambda: reward})
    return Scorer(
        RewardsConfig(terms=(RewardConfig(name="mine"),), **{"max_failed_share": 0.0, "retries": 0, **settings})
    )


def brightness(images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"mean": images_BCHW.mean((1, 2, 3)), "std": images_BCHW.std((1, 2, 3))}


def overlapping(scorer: Scorer, model: StableDiffusion3, **settings: Any) -> OverlappedScoring:
    """As on a GPU, unless `settings` say otherwise: the thread decodes too."""
    return OverlappedScoring(
        scorer, model, **{"images_per_decode": 2, "thread_decodes": True, "num_images": len(PROMPTS), **settings}
    )


@pytest.mark.parametrize("thread_decodes", [True, False])
def test_the_same_bits_as_one_after_another(
    thread_decodes: bool, model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    judge = scorer(brightness, monkeypatch)
    with overlapping(judge, model, thread_decodes=thread_decodes) as scoring:
        for x0_BCHW, prompts in batches:
            scoring.add(x0_BCHW, prompts)
            torch.randn(200, 200) @ torch.randn(200, 200)  # as the sampler would go on computing
    found = scoring.scores()
    one_by_one = [judge.measure(model.decode(x0, images_per_forward=2), prompts) for x0, prompts in batches]
    expected = judge.combine(one_by_one)
    assert torch.equal(found.reward_B, expected.reward_B)
    assert found.metrics.keys() == expected.metrics.keys() == {"mean", "std"}
    assert all(torch.equal(found.metrics[name], expected.metrics[name]) for name in expected.metrics)
    assert len(found.reward_B.unique()) == len(PROMPTS)


def test_scoring_goes_on_while_the_next_batch_is_sampled(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch is scored before the next is added: only another thread can have done it. Calls come in order."""
    calls, scored = [], threading.Semaphore(0)

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append((len(images_BCHW), tuple(prompts), threading.current_thread()))
        scored.release()
        return [0.0] * len(prompts)

    with overlapping(scorer(reward, monkeypatch), model) as scoring:
        for x0_BCHW, prompts in batches:
            scoring.add(x0_BCHW, prompts)
            assert scored.acquire(timeout=TIMEOUT_S)
    assert [call[:2] for call in calls] == [(len(prompts), tuple(prompts)) for _, prompts in batches]
    assert len({call[2] for call in calls}) == 1
    assert threading.current_thread() not in {call[2] for call in calls}


def test_one_batch_of_images_is_alive(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the sampler is ahead."""
    images: list[weakref.ref[Tensor]] = []
    alive, all_added = [], threading.Event()

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        assert all_added.wait(TIMEOUT_S)
        images.append(weakref.ref(images_BCHW))
        alive.append(sum(image() is not None for image in images))
        return [0.0] * len(prompts)

    with overlapping(scorer(reward, monkeypatch), model) as scoring:
        for x0_BCHW, prompts in batches:
            scoring.add(x0_BCHW, prompts)
        all_added.set()
    assert alive == [1, 1, 1]
    assert [image() for image in images] == [None, None, None]


def test_as_many_batches_wait_as_may(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is in work and one waits: the third is only taken once the first is scored."""
    scored, may_go_on, started = [], threading.Event(), threading.Event()

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        started.set()
        assert may_go_on.wait(TIMEOUT_S)
        scored.append(len(prompts))
        return [0.0] * len(prompts)

    with overlapping(scorer(reward, monkeypatch), model, max_waiting=1) as scoring:
        scoring.add(*batches[0])
        assert started.wait(TIMEOUT_S)
        scoring.add(*batches[1])
        third = threading.Thread(target=scoring.add, args=batches[2])
        third.start()
        third.join(0.05)
        assert third.is_alive()
        assert scored == []
        may_go_on.set()
        third.join(TIMEOUT_S)
        assert not third.is_alive()
    assert scored == list(BATCHES)


# Rewards that fail


@pytest.mark.parametrize("failing", range(len(BATCHES)))
@pytest.mark.parametrize("max_waiting", [0, 1])
def test_the_first_failure_ends_it(
    failing: int, max_waiting: int, model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Later batches are not scored, and no `add` waits for ever."""
    calls = []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append(prompts)
        if len(calls) == failing + 1:
            raise RuntimeError(f"batch {failing}")
        return [0.0] * len(prompts)

    with pytest.raises(
        UserError,
        match=f"rewards: 'mine' failed for {BATCHES[failing]} of 8 images, last: RuntimeError: batch {failing}; ",
    ):
        with overlapping(scorer(reward, monkeypatch), model, max_waiting=max_waiting) as scoring:
            for x0_BCHW, prompts in batches:
                scoring.add(x0_BCHW, prompts)
        scoring.scores()
    assert len(calls) == failing + 1


def test_a_failure_ends_the_sampling_early(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batch that is added raises it: an evaluation of an hour does not go on in vain."""
    with overlapping(scorer(lambda images, prompts: [0.0], monkeypatch), model) as scoring:
        scoring.add(*batches[0])
        while scoring._error is None:
            pass
        with pytest.raises(UserError, match=r"'mine' returned \[1\] scores \(mine\) for 3 images"):
            scoring.add(*batches[1])


def test_failed_samples_are_left_out_over_all_batches(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole first batch fails, before the reward has ever named its metrics: it is as if it came later."""

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
        if any(prompt in PROMPTS[:3] for prompt in prompts):
            raise ConnectionError("no server")
        return {"number": [float(prompt.split()[1]) for prompt in prompts]}

    with overlapping(scorer(reward, monkeypatch, max_failed_share=0.5, retries=1), model) as scoring:
        for x0_BCHW, prompts in batches:
            scoring.add(x0_BCHW, prompts)
    torch.testing.assert_close(
        scoring.scores().reward_B, torch.tensor([torch.nan] * 3 + [3.0, 4.0, 5.0, 6.0, 7.0]), equal_nan=True
    )


def test_a_reward_that_fails_for_all_batches(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        raise ConnectionError("no server")

    with overlapping(scorer(reward, monkeypatch, max_failed_share=1.0), model) as scoring:
        for x0_BCHW, prompts in batches:
            scoring.add(x0_BCHW, prompts)
    with pytest.raises(UserError, match="'mine' failed for 8 of 8 images, last: ConnectionError: no server"):
        scoring.scores()


# What ends it


class Hanging:
    """A reward that hangs in its first call until it is let go."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.started, self.let_go, self.finished = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        self.calls.append(len(prompts))
        self.started.set()
        assert self.let_go.wait(TIMEOUT_S)
        self.finished.set()
        return [0.0] * len(prompts)


def scoring_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rewards"]


def test_one_thread_scores_for_one_iteration_after_another(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another takes over where a reward hangs in it. What is over is not kept."""
    threads = []

    def noted(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0] * len(prompts)

    for _ in range(2):
        with overlapping(scorer(noted, monkeypatch), model) as scoring:
            scoring.add(*batches[0])
    over = weakref.ref(scoring)
    del scoring
    reward = Hanging()
    with pytest.raises(KeyboardInterrupt), overlapping(scorer(reward, monkeypatch), model) as scoring:
        scoring.add(*batches[0])
        assert reward.started.wait(TIMEOUT_S)
        raise KeyboardInterrupt
    with overlapping(scorer(noted, monkeypatch), model) as scoring:
        scoring.add(*batches[0])
    reward.let_go.set()
    assert threads[0] is threads[1] is not threads[2]
    gc.collect()
    assert over() is None


def test_an_interruption_waits_for_the_batch_in_work_only(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Hanging()
    with pytest.raises(InterruptedError), overlapping(scorer(reward, monkeypatch), model) as scoring:
        for x0_BCHW, prompts in batches:
            scoring.add(x0_BCHW, prompts)
        assert reward.started.wait(TIMEOUT_S)
        threading.Timer(0.05, reward.let_go.set).start()
        raise InterruptedError
    assert reward.finished.is_set()
    assert reward.calls == [3]
    assert scoring._done.is_set()


def test_a_second_signal_does_not_wait_for_a_reward_that_hangs(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Hanging()
    with pytest.raises(KeyboardInterrupt), overlapping(scorer(reward, monkeypatch), model) as scoring:
        scoring.add(*batches[0])
        assert reward.started.wait(TIMEOUT_S)
        raise KeyboardInterrupt
    assert not reward.finished.is_set()
    assert not scoring._done.is_set() and all(thread.daemon for thread in scoring_threads()), (
        "nor does the process's end"
    )
    reward.let_go.set()


def test_the_wait_for_a_reward_that_hangs_can_be_interrupted(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Hanging()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without one
    try:
        with pytest.raises(KeyboardInterrupt), overlapping(scorer(reward, monkeypatch), model) as scoring:
            scoring.add(*batches[0])
            assert reward.started.wait(TIMEOUT_S)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not reward.finished.is_set()
    reward.let_go.set()


@pytest.mark.parametrize("max_waiting", [0, 1])
def test_nobody_waits_for_scores_that_are_not_wanted_any_more(
    max_waiting: int, model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a run that is asked to stop, which may soon be killed; no exception comes of it."""
    monkeypatch.setattr(overlapped, "LEAVE_S", 0.1)
    reward, is_over = Hanging(), threading.Event()
    judge = scorer(reward, monkeypatch)
    with overlapping(judge, model, max_waiting=max_waiting, is_over=is_over.is_set) as scoring:
        scoring.add(*batches[0])
        assert reward.started.wait(TIMEOUT_S)
        scoring.add(*batches[1])
        threading.Timer(0.05, is_over.set).start()
        scoring.add(*batches[2])  # waits, where one batch alone may
    assert judge.stop.is_set() and not reward.finished.is_set()
    reward.let_go.set()


def test_the_run_ends_where_a_reward_hangs(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for it gives it up, in good time, and so does whoever would hand over more."""
    reward = Hanging()
    line = r"'mine' has not answered within 0\.05 s \(rewards\.timeout_s\), .* rewards\.running\.mine\.processes=1"
    scoring = overlapping(scorer(reward, monkeypatch, timeout_s=0.05), model)
    with pytest.raises(UserError, match=line), scoring:
        scoring.add(*batches[0])
    full = overlapping(scorer(again := Hanging(), monkeypatch, timeout_s=0.05), model, max_waiting=1)
    with pytest.raises(UserError, match=line), full:
        for x0_BCHW, prompts in batches:
            full.add(x0_BCHW, prompts)
    assert not reward.finished.is_set() and not again.finished.is_set()
    assert all(thread.daemon for thread in scoring_threads()), "nor does the end of the process wait"
    reward.let_go.set()
    again.let_go.set()


@pytest.mark.parametrize("max_waiting", [0, 1])
def test_an_exception_does_not_wait_long_for_a_reward_that_hangs(
    max_waiting: int, model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlapped, "LEAVE_S", 0.1)
    reward = Hanging()
    scoring = overlapping(scorer(reward, monkeypatch), model, max_waiting=max_waiting)
    with pytest.raises(ZeroDivisionError), scoring:
        scoring.add(*batches[0])
        assert reward.started.wait(TIMEOUT_S)
        scoring.add(*batches[1])
        raise ZeroDivisionError
    assert not reward.finished.is_set()
    reward.let_go.set()


def test_an_exception_does_not_wait_for_batches_that_nobody_needs(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many wait as may; once the one in work is scored, the thread ends."""
    monkeypatch.setattr(overlapped, "LEAVE_S", TIMEOUT_S)
    begun, may_end = threading.Event(), threading.Event()

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        begun.set()
        assert may_end.wait(TIMEOUT_S)
        return [0.0] * len(prompts)

    with pytest.raises(ZeroDivisionError), overlapping(scorer(reward, monkeypatch), model, max_waiting=1) as scoring:
        scoring.add(*batches[0])
        assert begun.wait(TIMEOUT_S)
        scoring.add(*batches[1])
        threading.Timer(0.5, may_end.set).start()
        left = time.monotonic()
        raise ZeroDivisionError
    assert time.monotonic() - left < TIMEOUT_S / 2


def test_images_that_wait_are_few_and_latents_any_number(model: StableDiffusion3) -> None:
    """Where the thread decodes, what waits are latents, which the iteration keeps anyway."""
    judge = Scorer(RewardsConfig(terms=(RewardConfig(name="shapes"),)))
    assert overlapping(judge, model, thread_decodes=True)._queue.maxsize == 0
    assert overlapping(judge, model, thread_decodes=False)._queue.maxsize == overlapped.MAX_IMAGES_WAITING


# Where the time goes


def test_on_a_cpu_what_samples_decodes(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch, clock: StageClock
) -> None:
    with overlapping(scorer(brightness, monkeypatch), model, thread_decodes=None) as scoring, stage("rollout"):
        for x0_BCHW, prompts in batches:
            scoring.add(x0_BCHW, prompts)
    assert clock.calls["rollout", "vae"] == len(batches)
    assert ("background", "vae") not in clock.seconds


def test_stages_of_both_threads_are_told_apart(
    model: StableDiffusion3, batches: list[tuple[Tensor, list[str]]], monkeypatch: pytest.MonkeyPatch, clock: StageClock
) -> None:
    """The first reward is over before the rollout; the second outlasts it by what is waited for."""
    seconds = 0.05
    in_reward, is_waited_for = threading.Event(), threading.Event()

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        in_reward.set()
        assert is_waited_for.wait(TIMEOUT_S)
        threading.Event().wait(seconds)
        return [0.0] * len(prompts)

    def noted(name: str, category: str) -> AbstractContextManager[None]:
        if name == "reward" and threading.current_thread() is threading.main_thread():
            is_waited_for.set()
        return nullcontext()

    with watched_by(noted), overlapping(scorer(reward, monkeypatch), model) as scoring, stage("rollout"):
        scoring.add(*batches[0])
        with stage("transformer"):
            assert in_reward.wait(TIMEOUT_S)
    found = clock.seconds
    background = {("background",), ("background", "vae"), ("background", "reward")}
    assert found.keys() == {("rollout",), ("rollout", "transformer"), ("reward",)} | background
    assert seconds / 2 < found["reward",] <= found["background",]
    assert found["background", "vae"] + found["background", "reward"] <= found["background",]
    assert clock.calls["background",] == clock.calls["reward",] == 1


def test_rewards_may_be_used_without_diffusers() -> None:
    """`from dgpo_fast.rewards import Reward` is how a user's own reward begins."""
    code = "import sys, dgpo_fast.rewards; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
