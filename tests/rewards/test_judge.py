"""The reward `judge`, against a server of the test's own that speaks HTTP and misbehaves when told to."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread, Timer
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import DeQAConfig, JudgeConfig, RewardConfig, RewardsConfig, UnifiedRewardConfig
from dgpo_fast.rewards import Scorer, load_reward
from dgpo_fast.rewards.judge import (
    KEY_VARIABLE,
    TEMPLATES,
    JudgeReward,
    NoScoreError,
    expected_level,
    match_score,
    read_answer,
)

PROMPTS = ["a red fox", 'a {green} "fox"', "ein blauer Füchsling", "a fox"]
IMAGES = torch.rand(4, 3, 6, 10, generator=torch.Generator().manual_seed(1))


class Reply(NamedTuple):
    status: int = 200
    content: bytes = b""
    delay_s: float = 0.0
    hangs_up: bool = False


class Asked(NamedTuple):
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def text(self) -> str:
        return str(self.body["messages"][0]["content"][1]["text"])

    @property
    def prompt(self) -> str:
        """Of PROMPTS."""
        (found,) = [prompt for prompt in PROMPTS[:3] if prompt in self.text] or ["a fox"]
        return found

    @property
    def pixels(self) -> NDArray[np.uint8]:
        kind, _, data = self.body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            assert picture.format == "PNG"
            return np.array(picture)


def says(answer: str, *, delay_s: float = 0.0) -> Reply:
    """A completion as the API has it."""
    message = {"role": "assistant", "content": answer}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return Reply(content=json.dumps({"object": "chat.completion", "choices": [choice]}).encode(), delay_s=delay_s)


class Server:
    """A server whose `reply` to a request may depend on how often its prompt came before."""

    def __init__(self, port: int = 0) -> None:
        self.reply: Callable[[Asked, int], Reply] = lambda asked, before: says("Final Score: 3")
        self.asked: list[Asked] = []
        self.num_working = self.most_working = 0
        self._lock = Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def times_asked(self) -> Counter[str]:
        return Counter(asked.prompt for asked in self.asked)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, dict(self.headers), body)
                with server._lock:
                    reply = server.reply(asked, server.times_asked()[asked.prompt])
                    server.asked.append(asked)
                    server.num_working += 1
                    server.most_working = max(server.most_working, server.num_working)
                time.sleep(reply.delay_s)
                with server._lock:
                    server.num_working -= 1
                if not reply.hangs_up:
                    self._send(reply)

            def _send(self, reply: Reply) -> None:
                try:
                    self.send_response(reply.status)
                    self.send_header("Content-Length", str(len(reply.content)))
                    self.end_headers()
                    self.wfile.write(reply.content)
                except OSError:  # who asked did not wait
                    pass

            def log_message(self, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def judge(url: str | None, **settings: Any) -> JudgeReward:
    config = JudgeConfig(**{"url": url, "model": "judge-7b", "backoff_s": 0.01, "timeout_s": 20, **settings})
    return JudgeReward(config, device=torch.device("cpu"))


def scores(reward: JudgeReward) -> list[float]:
    return list(reward(IMAGES, PROMPTS)["judge"])


# What is asked


def test_an_https_judge_is_asked_by_https(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TLS taken away, so that the test's server understands it: what asks in plain text may not be made."""
    plain, made = http.client.HTTPConnection, []

    def of_https(host: str, port: int | None, **options: Any) -> http.client.HTTPConnection:
        made.append(host)
        return plain(host, port, **options)

    monkeypatch.setattr(http.client, "HTTPSConnection", of_https)
    monkeypatch.setattr(http.client, "HTTPConnection", lambda *given, **options: pytest.fail("asked in plain text"))
    judge(server.url.replace("http:", "https:"))(IMAGES[:1], PROMPTS[:1])
    assert made == ["127.0.0.1"] and len(server.asked) == 1


def test_a_request_is_a_chat_completion_with_the_image(server: Server) -> None:
    judge(server.url, max_tokens=77, temperature=0.5)(IMAGES, PROMPTS)
    assert server.times_asked() == Counter(PROMPTS)
    for asked in server.asked:
        assert asked.path == "/v1/chat/completions"
        assert asked.headers["Content-Type"] == "application/json"
        assert "Authorization" not in asked.headers
        assert asked.body.keys() == {"model", "messages", "max_tokens", "temperature"}
        assert (asked.body["model"], asked.body["max_tokens"], asked.body["temperature"]) == ("judge-7b", 77, 0.5)
        (message,) = asked.body["messages"]
        assert message["role"] == "user"
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]
        assert f"Text Caption: [{asked.prompt}]" in asked.text
        image_CHW = IMAGES[PROMPTS.index(asked.prompt)]
        assert np.array_equal(asked.pixels, (image_CHW * 255).round().byte().permute(1, 2, 0).numpy())


def test_pixels_out_of_range_are_clipped(server: Server) -> None:
    judge(server.url)(torch.tensor([-1.0, 0.5, 2.0])[None, :, None, None].expand(1, 3, 2, 2), ["a fox"])
    assert server.asked[0].pixels[0, 0].tolist() == [0, 128, 255]


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    judge(server.url + "/")(IMAGES[:1], PROMPTS[:1])
    assert server.asked[0].headers["Authorization"] == "Bearer sk-secret"
    assert server.asked[0].path == "/v1/chat/completions"
    with pytest.raises(ValidationError, match="key"):  # a recipe is written to disk
        JudgeConfig(key="sk-secret")  # type: ignore[call-arg]


def test_requests_run_together_but_not_too_many(server: Server) -> None:
    server.reply = lambda asked, before: says("Final Score: 3", delay_s=0.2)
    images, prompts = IMAGES[:1].expand(9, -1, -1, -1), ["a fox"] * 9
    assert list(judge(server.url, concurrency=3)(images, prompts)["judge"]) == [0.5] * 9
    assert server.most_working == 3


def test_no_images(server: Server) -> None:
    assert judge(server.url)(IMAGES[:0], []) == {"judge": [], "answer": []}


# What is answered


def test_answers_become_scores_in_the_order_of_the_images(server: Server) -> None:
    """Whichever comes first."""
    numbers = dict(zip(PROMPTS, [1, 2.5, 4, 5], strict=True))
    server.reply = lambda asked, before: says(
        f"fox (animal): 1\nFinal Score: {numbers[asked.prompt]}", delay_s=0.1 * (3 - PROMPTS.index(asked.prompt))
    )
    found = judge(server.url)(IMAGES, PROMPTS)
    assert found == {"judge": [0, 0.375, 0.75, 1], "answer": [1, 2.5, 4, 5]}


def test_three_axes_have_a_mean(server: Server) -> None:
    server.reply = lambda asked, before: says(
        "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 1.5\n"
    )
    assert judge(server.url, template="unifiedreward-2")(IMAGES[:1], PROMPTS[:1])["answer"] == [3]


def test_levels_are_weighted_with_their_probabilities(server: Server) -> None:
    probabilities = {"Good": 0.4, "Fair": 0.1, " good": 0.2, "Ex": 0.1, "The": 0.2}
    alternatives = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in probabilities.items()]
    position = {"token": "Good", "logprob": math.log(0.4), "top_logprobs": alternatives}
    choice = {"message": {"content": "Good"}, "logprobs": {"content": [position]}}
    server.reply = lambda asked, before: Reply(content=json.dumps({"choices": [choice]}).encode())
    found = judge(server.url, template="deqa")(IMAGES[:1], PROMPTS[:1])
    mean = (0.6 * 4 + 0.1 * 3 + 0.1 * 5) / 0.8
    assert found["answer"] == pytest.approx([mean])
    assert found["judge"] == pytest.approx([(mean - 1) / 4])
    asked = server.asked[0].body
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 20, 1)


def test_levels_from_a_server_without_log_probabilities(server: Server) -> None:
    server.reply = lambda asked, before: says("good")
    with pytest.warns(UserWarning, match="4 of 4 images have no score.* log-probabilities of its first token"):
        assert np.isnan(scores(judge(server.url, template="deqa"))).all()


def test_a_template_of_ones_own(server: Server) -> None:
    server.reply = lambda asked, before: says('{"flaws": 7}')
    own = judge(server.url, template='{"asked": "{prompt}"}', pattern=r'"flaws": (\d+)', scale=(10, 0))
    assert list(own(IMAGES[:1], PROMPTS[1:2])["judge"]) == pytest.approx([0.3])
    assert server.asked[0].text == '{"asked": "a {green} "fox""}'


def test_a_pattern_and_a_scale_for_a_named_template(server: Server) -> None:
    server.reply = lambda asked, before: says("I say 40.")
    own = judge(server.url, template="deqa", pattern=r"(\d+)", scale=(0, 100))
    assert own(IMAGES[:1], PROMPTS[:1]) == {"judge": [0.4], "answer": [40]}
    assert "logprobs" not in server.asked[0].body


# What goes wrong


def timeout_s(reply: Reply) -> float:
    """Short only where the test waits for it: a busy machine may take its time with the other answers."""
    return 0.7 if reply.delay_s else 20


@pytest.mark.parametrize(
    "first",
    [
        Reply(500, b"CUDA out of memory"),
        Reply(503),
        Reply(429, b"slow down"),
        Reply(content=b'{"choices": [{"mess'),
        Reply(hangs_up=True),
        says("Final Score: 1", delay_s=1.5),
    ],
    ids=["500", "503", "429", "malformed", "hangs-up", "slow"],
)
def test_what_fails_once_is_asked_again(server: Server, first: Reply) -> None:
    server.reply = lambda asked, before: first if asked.prompt == "a red fox" and not before else says("Final Score: 4")
    assert scores(judge(server.url, timeout_s=timeout_s(first))) == [0.75] * 4
    assert server.times_asked() == Counter(PROMPTS) + Counter(["a red fox"])


@pytest.mark.parametrize(
    ("reply", "times", "reason"),
    [
        (Reply(500, b"out of\nmemory"), 3, "500 Internal Server Error: 'out of memory'"),
        (Reply(content=b"<html>"), 3, "expected JSON, got '<html>'"),
        (Reply(hangs_up=True), 3, "RemoteDisconnected"),
        (says("", delay_s=1.5), 3, "TimeoutError: timed out"),
        (Reply(400, b"prompt too long"), 1, "400 Bad Request: 'prompt too long'"),
        (Reply(302, b""), 1, "302 Found"),
        (Reply(content=b'{"error": "no"}'), 1, 'expected a completion with an answer, got \'{"error": "no"}\''),
        (Reply(content=b"[]"), 1, r"expected a completion with an answer, got '\[\]'"),
        (says("I cannot judge this."), 1, "a number where .* has its groups, got 'I cannot judge this.'"),
        (says("\ud800 " + 200 * "la"), 1, r"got '\\ud800 lala.*\.\.\.'"),
        (says("Final Score: 9"), 1, "expected a score between 1 and 5, got 9"),
    ],
    ids=["500", "malformed", "hangs-up", "silent", "400", "302", "error", "list", "garbage", "long", "off-scale"],
)
def test_an_image_without_a_score_costs_no_other_its_own(server: Server, reply: Reply, times: int, reason: str) -> None:
    server.reply = lambda asked, before: reply if asked.prompt == PROMPTS[1] else says("Final Score: 4")
    with pytest.warns(
        UserWarning, match=f"rewards.judge: 1 of 4 images have no score; the first: .*{reason}"
    ) as caught:
        found = judge(server.url, retries=2, timeout_s=timeout_s(reply))(IMAGES, PROMPTS)
    assert "\n" not in str(caught[0].message)
    assert list(found["judge"]) == pytest.approx([0.75, math.nan, 0.75, 0.75], nan_ok=True)
    assert list(found["answer"]) == pytest.approx([4, math.nan, 4, 4], nan_ok=True)
    assert server.times_asked() == Counter(PROMPTS) + Counter({PROMPTS[1]: times - 1})


def test_such_an_image_is_left_out_of_its_group(server: Server) -> None:
    server.reply = lambda asked, before: says("no" if asked.prompt == PROMPTS[2] else "Final Score: 5")
    settings = JudgeConfig(url=server.url, model="judge-7b")
    config = RewardsConfig(terms=(RewardConfig(name="judge"),), max_failed_share=0.5, judge=settings)
    with pytest.warns(UserWarning, match="1 of 4 images have no score"):
        scored = Scorer(config)(IMAGES, PROMPTS)
    assert scored.reward_B.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("drips", [False, True])
def test_a_silent_server_costs_its_images_and_ends_no_run(drips: bool) -> None:
    """All of them have one deadline, within what the reward may take, however many there are and however it hangs."""
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)
    peers: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                peers.append(silent.accept()[0])

    def drip() -> None:
        while silent.fileno() != -1:
            for peer in peers:
                with suppress(OSError):
                    peer.sendall(b"H" if drips else b"")
            time.sleep(0.02)

    for work in (accept, drip):
        Thread(target=work, daemon=True).start()
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
    settings = JudgeConfig(url=url, model="m", timeout_s=0.3, backoff_s=0.01, deadline_s=0.8, concurrency=2)
    config = RewardsConfig(terms=(RewardConfig(name="judge"),), timeout_s=20.0, judge=settings)
    start = time.monotonic()
    with pytest.warns(UserWarning, match="images have no score"), Scorer(config) as scorer:
        measured = scorer.measure(IMAGES, PROMPTS)
    assert measured.failed == {"judge": (4, "returned nan")}
    assert time.monotonic() - start < 20
    silent.close()
    for peer in peers:
        peer.close()


def test_a_judge_ends_before_it_is_given_up() -> None:
    with pytest.raises(ValidationError, match=r"rewards\.deqa\.deadline_s must be at most half .*, 200, got 300"):
        RewardsConfig(terms=(RewardConfig(name="deqa"),), timeout_s=400.0)
    RewardsConfig(terms=(RewardConfig(name="shapes"),), timeout_s=400.0)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_every_image_would_meet_ends_the_run(server: Server, status: int) -> None:
    server.reply = lambda asked, before: Reply(status, b'{"error":\n"model judge-7b?"}')
    with pytest.raises(UserError, match=rf"/v1/chat/completions answered {status} .*model judge-7b\?") as error:
        judge(server.url)(IMAGES, PROMPTS)
    assert "\n" not in str(error.value)
    assert max(server.times_asked().values()) == 1


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits before retries double, and a random part of up to a half is missing from each."""
    waits: list[float] = []
    sleep = time.sleep

    def wait(seconds: float) -> None:
        if seconds < 0.5:  # a thread of a test before this one, that was given up and still retries
            sleep(seconds)
        else:
            waits.append(seconds)

    monkeypatch.setattr("dgpo_fast.rewards.judge.time.sleep", wait)
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UserError, match=f"{url} takes no connection .*refused.* after 7 retries") as error:
        judge(url, backoff_s=1, retries=7)(IMAGES[:1], PROMPTS[:1])
    assert "\n" not in str(error.value)
    longest = [1, 2, 4, 8, 16, 30, 30]
    assert len(waits) == len(longest)
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, longest, strict=True))
    assert len({wait / bound for wait, bound in zip(waits, longest, strict=True)}) > 1


def test_a_server_that_was_lost_for_some_images_only(server: Server) -> None:
    """No connection is a failed image like any other where some were scored before."""
    reward = judge(server.url, retries=0, concurrency=1, deadline_s=0.6)

    def reply(asked: Asked, before: int) -> Reply:
        server._http.shutdown()
        server._http.server_close()  # takes no further connection
        return says("Final Score: 5")

    server.reply = reply
    with pytest.warns(UserWarning, match="3 of 4 images have no score; the first: no answer within 0.6 s .*Refused"):
        assert scores(reward) == pytest.approx([1, math.nan, math.nan, math.nan], nan_ok=True)


def answered_once(**settings: Any) -> tuple[JudgeReward, int]:
    """A reward whose server has answered, and is gone, and the port where it was."""
    port = free_port()
    reward, server = judge(f"http://127.0.0.1:{port}/v1", deadline_s=20, **settings), Server(port)
    assert scores(reward) == pytest.approx([0.5] * 4)
    server.close()
    return reward, port


def test_a_server_that_is_started_again() -> None:
    """Is asked until the deadline, however few retries there are; one that stays away costs its images, not the run."""
    reward, port = answered_once(retries=0, backoff_s=0.05)
    servers = list[Server]()
    timer = Timer(0.5, lambda: servers.append(Server(port)))
    timer.start()
    assert scores(reward) == pytest.approx([0.5] * 4)
    timer.join()
    servers[0].close()
    reward._settings = reward._settings.model_copy(update={"deadline_s": 0.5})
    with pytest.warns(UserWarning, match="4 of 4 images have no score; the first: no answer within 0.5 s .*Refused"):
        assert all(map(math.isnan, scores(reward)))


def test_a_server_that_is_started_again_may_need_a_moment() -> None:
    """Connections that it did not take are none of the retries, however many they were, and no wait is none."""
    reward, port = answered_once(retries=1, backoff_s=0)
    servers = list[Server]()

    def restart() -> None:
        servers.append(Server(port))
        servers[0].reply = lambda asked, before: says("Final Score: 3") if before else Reply(503, b"loading")

    timer = Timer(1.0, restart)
    timer.start()
    assert scores(reward) == pytest.approx([0.5] * 4)
    timer.join()
    servers[0].close()


def test_a_server_that_comes_late() -> None:
    late = Server()
    url = late.url
    port = late._http.server_port
    late.close()
    started: list[ThreadingHTTPServer] = []

    def start() -> None:
        started.append(ThreadingHTTPServer(("127.0.0.1", port), late._handler()))
        started[0].serve_forever(poll_interval=0.02)

    timer = Timer(0.2, start)
    timer.start()
    try:
        assert scores(judge(url, backoff_s=0.15, retries=6)) == [0.5] * 4
    finally:
        timer.join(0.5)
        started[0].shutdown()
        started[0].server_close()
        timer.join()


def test_a_hanging_server_does_not_keep_the_process_alive(server: Server) -> None:
    """Whose scoring thread is a daemon, as the trainer's is."""
    server.reply = lambda asked, before: says("Final Score: 1", delay_s=60)
    script = f"""
import threading, torch
from dgpo_fast.reward_config import JudgeConfig
from dgpo_fast.rewards.judge import JudgeReward
reward = JudgeReward(JudgeConfig(url={server.url!r}, model="m"), device=torch.device("cpu"))
threading.Thread(target=reward, args=(torch.rand(4, 3, 8, 8), ["a fox"] * 4), daemon=True).start()
input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True) as child:
        try:
            while len(server.asked) < 4:
                assert child.poll() is None
                time.sleep(0.02)
            child.communicate("\n", timeout=20)
        finally:
            child.kill()
    assert child.returncode == 0


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": None}, r"rewards\.judge\.url: not set; expected .* as http://localhost:8000/v1"),
        ({"url": "localhost:8000"}, r"rewards\.judge\.url: expected .*, got 'localhost:8000'"),
        ({"url": "http://host:port/v1"}, r"rewards\.judge\.url: expected .*, got 'http://host:port/v1'"),
        ({"url": "http://me:secret@host/v1"}, r"rewards\.judge\.url: expected"),
        ({"url": "http://:secret@host/v1"}, r"rewards\.judge\.url: expected"),
        ({"url": "http://host/v1?api-version=2"}, r"rewards\.judge\.url: expected"),
        ({"url": "http://host/v1#there"}, r"rewards\.judge\.url: expected"),
        ({"url": "http:///v1"}, r"rewards\.judge\.url: expected"),
        ({"model": None}, r"rewards\.judge\.model: not set"),
        ({"template": "unifiedreward2"}, r"no template 'unifiedreward2'; did you mean 'unifiedreward-2'\?"),
        ({"template": "How good?"}, r"rewards\.judge\.pattern: not set"),
        ({"template": "{prompt}", "pattern": "(.)"}, r"rewards\.judge\.scale: not set"),
        ({"pattern": "Score: ("}, r"rewards\.judge\.pattern: 'Score: \(' is no regular expression"),
        ({"pattern": "Score"}, r"rewards\.judge\.pattern: expected a group"),
        ({"scale": (1, 1)}, r"rewards\.judge\.scale: expected two different numbers, got \[1\.0, 1\.0\]"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        judge(**{"url": "http://localhost:8000/v1", **settings})
    assert "\n" not in str(error.value)


# How answers are read


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4", 4),
        ("**Final Score:** 4.25", 4.25),
        ("Final Score: [3]", 3),
        ("Final Score: 4/5", 4),
        ("At first, Final Score: 2? No.\nFinal Score: 3.", 3),
    ],
)
def test_final_scores(answer: str, score: float) -> None:
    assert TEMPLATES["unifiedreward"].pattern is not None
    assert match_score(answer, TEMPLATES["unifiedreward"].pattern) == score


@pytest.mark.parametrize(
    ("answer", "pattern"), [("four", "(four)"), ("4", "(4)|(5)"), ("", "(.+)"), (None, "(.*)"), ([{"a": 1}], "(.*)")]
)
def test_what_is_no_number(answer: object, pattern: str) -> None:
    with pytest.raises(NoScoreError, match="expected an answer with a number"):
        match_score(answer, pattern)


def test_two_axes_are_no_three() -> None:
    completion = {"choices": [{"message": {"content": "Alignment Score (1-5): 4\nStyle Score (1-5): 4"}}]}
    with pytest.raises(NoScoreError):
        read_answer(completion, TEMPLATES["unifiedreward-2"])


def test_no_level_among_the_likeliest_tokens() -> None:
    levels = TEMPLATES["deqa"].levels
    assert levels is not None
    assert expected_level({"BAD": -3.0, "\n": -0.1}, levels) == 1
    with pytest.raises(NoScoreError, match="expected one of excellent, good, fair, poor, bad, got 'The', 'goods'"):
        expected_level({"The": -0.1, "goods": -1.0}, levels)


def test_two_judges_of_one_recipe(server: Server) -> None:
    """Each has its own section, question and metric."""
    answers = {"deqa": says("Score 5"), "unifiedreward": says("Final Score: 4")}
    server.reply = lambda asked, before: answers[asked.body["model"]]
    terms = (RewardConfig(name="unifiedreward"), RewardConfig(name="deqa"))
    sections = {
        "unifiedreward": UnifiedRewardConfig(url=server.url, model="unifiedreward"),
        "deqa": DeQAConfig(url=server.url, model="deqa", pattern=r"Score (\d)"),
    }
    metrics = Scorer(RewardsConfig(terms=terms, **sections))(IMAGES[:1], PROMPTS[:1]).metrics
    assert {name: metrics[name].tolist() for name in sections} == {"unifiedreward": [0.75], "deqa": [1.0]}
    assert [asked.text.startswith("How good is the quality") for asked in server.asked] == [False, True]
    with pytest.raises(UserError, match=r"rewards\.deqa\.url: not set"):
        load_reward("deqa")
