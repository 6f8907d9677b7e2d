"""Rewards behind HTTP: the scores of one here, every way in which a server can fail, and what one refuses."""

from __future__ import annotations

import datetime
import io
import json
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.records import Prompt
from dgpo_fast.reward_config import RewardConfig, RewardsConfig, RunningConfig
from dgpo_fast.rewards import Scorer, base, calling, remote, server, wire
from dgpo_fast.rewards.calling import Abandoned, Patience
from dgpo_fast.rewards.server import RewardServer

NAME = "mine"
IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(f"image {number} ä☃", {"told": number, "of": {"list": [1, None]}}) for number in range(5)]
TOKEN = "s3cret"
TOO_LONG_S = 60.0

Score = Callable[[Tensor, Sequence[str]], Any]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wire.TOKEN, raising=False)
    monkeypatch.setattr(base, "_FACTORIES", {})
    monkeypatch.setattr(calling, "BACKOFF_S", 0.01)
    monkeypatch.setattr(remote, "GREETING_S", 0.3)


def means(images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    return {"mean": images_BCHW.mean((1, 2, 3)), "images": [float(len(images_BCHW))] * len(prompts)}


@contextmanager
def serving(reward: Score = means, name: str = NAME, **settings: Any) -> Iterator[RewardServer]:
    base._FACTORIES[name] = lambda: reward
    own = RewardServer(
        name, RewardsConfig(terms=(RewardConfig(name=name),)), device=torch.device("cpu"), **settings
    )  # fmt: skip
    thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield own
    finally:
        own.shutdown()
        own.server_close()


def asking(*urls: str, images_per_call: int | None = None, **settings: Any) -> Scorer:
    """A scorer of the rewards `mine`, `mine1`, ... at these addresses."""
    names = [NAME, *(f"{NAME}{number}" for number in range(1, len(urls)))]
    running = {
        name: RunningConfig(url=url, images_per_call=images_per_call) for name, url in zip(names, urls, strict=True)
    }
    terms = tuple(RewardConfig(name=name) for name in names)
    chosen = {"max_failed_share": 0.5, "timeout_s": 20.0, **settings}
    return Scorer(RewardsConfig(terms=terms, running=running, **chosen))


# As here


def test_the_scores_are_those_of_this_process_to_the_bit() -> None:
    seen: list[tuple[Tensor, list[str]]] = []

    def reward(images_BCHW: Tensor, prompts: list[str]) -> dict[str, Any]:
        seen.append((images_BCHW, prompts))
        odd = [1 / 3, 1e-45, -0.0, 16777217.0, 3e38]
        return {"mean": images_BCHW.mean((1, 2, 3)), "odd": odd, "none": [float("nan"), float("inf"), 0, 1, 2]}

    with serving(reward) as own, asking(own.url) as scorer:
        found = scorer(IMAGES, PROMPTS)
        here = Scorer(RewardsConfig(terms=(RewardConfig(name=NAME),)))(IMAGES, PROMPTS)
    assert torch.equal(found.reward_B, here.reward_B)
    assert list(found.metrics) == list(here.metrics) == ["mean", "odd", "none"]
    for name in ("mean", "odd"):
        assert found.metrics[name].numpy().tobytes() == here.metrics[name].numpy().tobytes()
    assert found.metrics["none"].isfinite().tolist() == [False, False, True, True, True]
    (theirs, told), (mine, _) = seen
    assert torch.equal(theirs, mine) and theirs.dtype == torch.float32
    assert told == PROMPTS and [prompt.metadata for prompt in told] == [prompt.metadata for prompt in PROMPTS]


def test_one_connection_serves_many_batches() -> None:
    connections = []
    with serving() as own, asking(own.url) as scorer:
        accept = own.process_request
        own.process_request = lambda *of: (connections.append(of), accept(*of))[1]  # type: ignore[method-assign]
        scorer.places[NAME].close()
        for _ in range(3):
            scorer(IMAGES, PROMPTS)
    assert len(connections) == 1


def test_a_connection_that_the_server_has_ended_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READ_S", 0.1)
    monkeypatch.setattr(server._Handler, "timeout", 0.1)
    monkeypatch.setattr(calling, "BACKOFF_S", 1000.0)
    with serving() as own, asking(own.url) as scorer:
        for _ in range(2):
            assert scorer(IMAGES, PROMPTS).failed == {}
            time.sleep(0.3)


@pytest.mark.parametrize(
    ("limits", "images_per_call", "pieces"),
    [
        ({"max_images": 2}, None, [2, 2, 2, 2, 1]),
        ({"max_images": 4}, 3, [3, 3, 3, 2, 2]),
        ({"max_bytes": 3 * 8 * 8 * 4 * 3 + 800}, None, [3, 3, 3, 2, 2]),
    ],
)
def test_a_batch_comes_in_pieces_that_the_server_takes(
    limits: Mapping[str, int], images_per_call: int | None, pieces: list[int]
) -> None:
    with serving(**limits) as own, asking(own.url, images_per_call=images_per_call) as scorer:
        scores = scorer(IMAGES, PROMPTS)
    assert torch.equal(scores.reward_B, IMAGES.mean((1, 2, 3)))
    assert scores.metrics["images"].tolist() == pieces


def test_rewards_that_live_elsewhere_are_asked_at_the_same_time() -> None:
    """And this process's meanwhile: each of the three waits until all are at it."""
    together = threading.Barrier(3)

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        together.wait(TOO_LONG_S)
        return [1.0] * len(prompts)

    base._FACTORIES["here"] = lambda: reward
    with serving(reward) as one, serving(reward, f"{NAME}1") as two, asking(one.url, two.url) as scorer:
        terms = (*scorer.config.terms, RewardConfig(name="here"))
        with Scorer(scorer.config.model_copy(update={"terms": terms})) as all_three:
            assert all_three(IMAGES, PROMPTS).reward_B.tolist() == [3.0] * 5


def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    made = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *names]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving() as own:
        own.socket = context.wrap_socket(own.socket, server_side=True)
        url = own.url.replace("http://127.0.0.1", "https://localhost")
        monkeypatch.setattr(remote, "GREETING_S", 2.0)  # a busy machine takes a while for a handshake
        with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
            asking(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setattr(remote, "GREETING_S", 10.0)
        with asking(url) as scorer:
            assert torch.equal(scorer(IMAGES, PROMPTS).reward_B, IMAGES.mean((1, 2, 3)))


# Rewards and servers that fail


def test_a_reward_that_raises_is_asked_again(capfd: pytest.CaptureFixture[str]) -> None:
    calls = []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        calls.append(len(prompts))
        if len(calls) == 1 or PROMPTS[3] in prompts:
            raise RuntimeError("no face\nfound")
        return means(images_BCHW, prompts)

    with serving(reward) as own, asking(own.url) as scorer:
        scores = scorer(IMAGES, PROMPTS)
    assert calls == [5, 5, 1, 1, 1, 1, 1]
    assert scores.reward_B.isnan().tolist() == [False, False, False, True, False]
    assert scores.failed == {NAME: (1, "RuntimeError: no face found")}
    assert "mine: RuntimeError: no face" in capfd.readouterr().err


def test_a_score_that_is_not_finite_is_a_failure() -> None:
    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        return [float("inf") if prompt == PROMPTS[1] else 1.0 for prompt in prompts]

    with serving(reward) as own, asking(own.url) as scorer:
        assert scorer(IMAGES, PROMPTS).reward_B.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("output", [[1.0], {}, {"mean": [[1.0]] * 5}])
def test_the_wrong_number_of_scores_is_an_error(output: Any) -> None:
    refusal = pytest.raises(UserError, match=r"answered 422: rewards: 'mine' returned")
    with serving(lambda images, prompts: output) as own, asking(own.url) as scorer, refusal:
        scorer(IMAGES, PROMPTS)


def test_a_slow_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time after its share, and after `timeout_s` for good."""
    let_go, calls = threading.Event(), []

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        calls.append(prompts)
        assert let_go.wait(TOO_LONG_S)
        return [1.0] * len(prompts)

    with serving(reward) as own, asking(own.url, timeout_s=0.6) as scorer:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"'mine' failed for 5 of 5 images, last: no answer within 0\.3 s"):
            scorer(IMAGES, PROMPTS)
        assert 0.6 <= time.monotonic() - start < 5, "twice, and not for each image"
        assert len(calls) == 1, "what nobody waits for any more is not scored"
        let_go.set()


class Peer:
    """A server of one's own on a socket: gives every connection to `talk`, after one that answers /health."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.num_connections = 0
        self._talk = talk
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        health = json.dumps({"name": NAME, "metrics": None, "limits": {"images": 64, "bytes": 10**6}}).encode()
        while True:
            peer = self.socket.accept()[0]
            self.num_connections += 1
            if self.num_connections == 1:
                peer.recv(1 << 16)
                peer.sendall(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(health) + health
                )
                peer.close()
            else:
                threading.Thread(target=self._talk, args=(peer,), daemon=True).start()


def drip(peer: socket.socket) -> None:
    """Sends a byte of a header now and then, for ever: a timeout for each would never come."""
    try:
        while True:
            peer.sendall(b"H")
            time.sleep(0.02)
    except OSError:
        peer.close()


def answer(peer: socket.socket, body: bytes) -> None:
    received = b""
    while b"safetensors" not in received:
        received += peer.recv(1 << 16)
    peer.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    time.sleep(0.2)
    peer.close()


PEERS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "drips": (drip, r"no answer within 0\.5 s"),
    "is silent": (lambda peer: time.sleep(TOO_LONG_S), r"no answer within 0\.5 s"),
    "hangs up": (
        lambda peer: peer.close(),
        r"no answer within 0\.5 s \((Connection|BrokenPipe|RemoteDisconnected)",
    ),
    "speaks of something else": (lambda peer: answer(peer, b"<html>"), "answered what is no answer: not JSON"),
    "gives no numbers": (lambda peer: answer(peer, b'{"metrics": {"mean": ["1"]}}'), "expected numbers or null"),
    "is pickle": (lambda peer: answer(peer, pickle.dumps([1.0] * 5)), "answered what is no answer: not JSON"),
}


@pytest.mark.parametrize("how", PEERS)
def test_what_is_no_answer_is_a_failure(how: str) -> None:
    talk, reason = PEERS[how]
    with asking(Peer(talk).url, timeout_s=1.0) as scorer:
        start = time.monotonic()
        with pytest.raises(UserError, match=f"'mine' failed for 5 of 5 images, last: .*{reason}"):
            scorer(IMAGES, PROMPTS)
        assert time.monotonic() - start < 10


def test_all_pieces_of_a_batch_fail_for_the_reason_of_the_first() -> None:
    peer = Peer(lambda peer: peer.close())
    refusal = pytest.raises(
        UserError, match=r"5 of 5 images, last: no answer within 0\.3 s \((Conn|BrokenP|RemoteDisc)"
    )
    with asking(peer.url, timeout_s=0.3, images_per_call=2, retries=0) as scorer, refusal:
        scorer(IMAGES, PROMPTS)


def test_an_image_that_is_none_costs_no_other_its_score() -> None:
    """A server would refuse the request, which would end the run."""
    images = IMAGES.clone()
    images[1, 0, 0, 0] = torch.nan
    with serving() as own, asking(own.url) as scorer:
        scores = scorer(images, PROMPTS)
    assert scores.failed == {NAME: (1, "its pixels are not in [0, 1]")}
    assert scores.reward_B.isnan().tolist() == [False, True, False, False, False]


def test_metadata_that_cannot_be_sent_are_a_mistake_of_the_user() -> None:
    prompts = [*PROMPTS[:4], Prompt("when?", {"day": datetime.date(2020, 1, 1)})]
    refusal = pytest.raises(UserError, match=r"the metadata of the prompt 'when\?' cannot be sent .* date is not JSON")
    with serving() as own, asking(own.url) as scorer, refusal:
        scorer(IMAGES, prompts)


def test_a_number_that_no_float_holds_is_no_answer() -> None:
    with pytest.raises(wire.Malformed, match="beyond all floats"):
        wire.unpack_metrics(b'{"metrics": {"mean": [1%s]}}' % (b"0" * 400))
    assert wire.unpack_metrics(b'{"metrics": {"mean": [1%s]}}' % (b"0" * 25))["mean"].tolist() == [pytest.approx(1e25)]


def test_too_few_scores_in_an_answer_are_an_error() -> None:
    with (
        asking(Peer(lambda peer: answer(peer, b'{"metrics": {"mean": [1, 2]}}')).url) as scorer,
        pytest.raises(UserError, match=r"'mine' returned \[2\] scores \(mean\) for 5 images; expected one for each"),
    ):
        scorer(IMAGES, PROMPTS)


def test_nobody_waits_for_what_is_of_no_use() -> None:
    at_it = threading.Event()
    raised: list[BaseException] = []

    def ask(scorer: Scorer) -> None:
        try:
            scorer.measure(IMAGES, PROMPTS)
        except Abandoned as error:
            raised.append(error)

    with asking(Peer(lambda peer: (at_it.set(), time.sleep(TOO_LONG_S))[1]).url, timeout_s=1000.0) as scorer:
        thread = threading.Thread(target=ask, args=(scorer,), daemon=True)
        thread.start()
        assert at_it.wait(TOO_LONG_S)
        scorer.stop.set()
        thread.join(TOO_LONG_S)
    assert not thread.is_alive() and len(raised) == 1


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_the_wait_for_a_busy_server_grows(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pixels go over the network each time: many ranks must not send them every second, and all at once."""
    waits = list[float]()
    monkeypatch.setattr(remote, "backoff", lambda attempt: 2.0**attempt / 4)
    patience = Patience(TOO_LONG_S, threading.Event())
    monkeypatch.setattr(patience, "sleep", waits.append)
    with serving(lambda images_BCHW, prompts: [1.0] * len(prompts)) as own, asking(own.url) as scorer:
        (place,) = scorer.places.values()
        assert isinstance(place, remote.Remote)
        answers = iter([remote._Response(status, 1.0, b"")] * 5 + [remote._Response(200, None, b"")])
        monkeypatch.setattr(place, "_try", lambda exchange, patience: next(answers))
        assert place._send("POST", "/score", b"", patience).status == 200
    assert waits == [1.0, 1.0, 1.0, 2.0, 4.0]


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the answers of servers, as they are sent."""
    sent = list[int]()
    send = server._Handler._send

    def seen(handler: server._Handler, status: int, answer: bytes, *, is_last: bool) -> None:
        sent.append(status)
        send(handler, status, answer, is_last=is_last)

    monkeypatch.setattr(server._Handler, "_send", seen)
    return sent


def test_many_ranks_wait_for_a_place(statuses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is scored and none waits read: the others are held as they are, and nobody sends anything twice."""
    monkeypatch.setattr(server, "MAX_WAITING", 0)
    with serving(lambda images_BCHW, prompts: [1.0] * len(prompts)) as own, ExitStack() as stack:
        askers = [stack.enter_context(asking(own.url)) for _ in range(4)]
        statuses.clear()
        assert own.places.acquire(timeout=TOO_LONG_S)
        waiting, all_wait, acquire = [], threading.Event(), own.places.acquire

        def counted(**options: Any) -> bool:
            waiting.append(options)
            if len(waiting) == len(askers):
                all_wait.set()
            return acquire(**options)

        monkeypatch.setattr(own.places, "acquire", counted)
        threads = [threading.Thread(target=each, args=(IMAGES, PROMPTS)) for each in askers]
        for thread in threads:
            thread.start()
        assert all_wait.wait(TOO_LONG_S) and statuses == []
        own.places.release()
        for thread in threads:
            thread.join(TOO_LONG_S)
    assert statuses == [200] * 4


def test_a_busy_server_is_asked_again(statuses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is scored and none waits: the other is told to come again, and does."""
    monkeypatch.setattr(server, "MAX_WAITING", 0)
    monkeypatch.setattr(server, "HOLD_S", 0.0)

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        end = time.monotonic() + TOO_LONG_S
        while 503 not in statuses and time.monotonic() < end:
            time.sleep(0.01)
        return [1.0] * len(prompts)

    with serving(reward) as own, asking(own.url) as one, asking(own.url) as other:
        threads = [threading.Thread(target=each, args=(IMAGES, PROMPTS)) for each in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TOO_LONG_S)
    assert statuses.count(200) == 4 and statuses.count(503) >= 1


# What is seen before a run begins


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        UserError, match=r"rewards\.running\.mine\.url: no reward answers at .*ConnectionRefused"
    ) as error:
        asking(url)
    assert "start it with `dgpo-fast serve-reward mine`" in str(error.value) and "\n" not in str(error.value)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "does not answer yet (ConnectionRefusedError" in said


def test_a_server_of_another_reward() -> None:
    with serving(name="other") as own, pytest.raises(UserError, match="serves 'other', expected 'mine'"):
        asking(own.url)


@pytest.mark.parametrize("given", [None, "wrong", TOKEN.upper()])
def test_the_token_is_asked_for(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is not None:
        monkeypatch.setenv(wire.TOKEN, given)
    with serving(token=TOKEN) as own:
        with pytest.raises(UserError, match=rf"answered 401: expected the token of this server \({wire.TOKEN}\)"):
            asking(own.url)
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        assert request(own, body=body(), headers=headers)[0] == 401
        monkeypatch.setenv(wire.TOKEN, TOKEN)
        with asking(own.url) as scorer:
            assert scorer(IMAGES, PROMPTS).failed == {}


def test_a_token_that_cannot_stand_in_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.TOKEN, "a\r\nb")
    with pytest.raises(UserError, match=f"{wire.TOKEN}: expected letters"):
        asking("http://127.0.0.1:1")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "example.org"])
def test_no_other_machine_is_answered_without_a_token(host: str) -> None:
    with pytest.raises(UserError, match=f"can be reached from other machines: set {wire.TOKEN}"), serving(host=host):
        pass
    if host == "0.0.0.0":
        with serving(host=host, token=TOKEN) as own:
            assert own.server_address[0] == host


def test_with_a_token_a_server_has_any_name() -> None:
    with serving(token=TOKEN) as own:
        headers = {"Host": "gpu7.cluster:8000", "Authorization": f"Bearer {TOKEN}"}
        assert request(own, body=body(), headers=headers)[0] == 200


def test_an_address_in_use() -> None:
    refusal = pytest.raises(UserError, match=r"cannot listen at 127\.0\.0\.1:\d+: .*ddress already in use")
    with serving() as own, refusal, serving(port=own.server_port):
        pass


# What a server refuses


def body(images: Tensor = IMAGES, count: int = 5, **changes: Any) -> bytes:
    return framed({"prompts": [{"text": "a"}] * count, "images": "safetensors", **changes}, tensors(images=images))


def tensors(**named: Tensor) -> bytes:
    return safetensors.torch.save({name: images.contiguous() for name, images in named.items()})


def framed(header: Any, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(4, "little") + text + rest


def png(width: int = 4, height: int = 4, value: int = 51) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def pngs(*files: bytes, **changes: Any) -> bytes:
    lengths = [len(file) for file in files]
    header = {"prompts": [{"text": "a"}] * len(files), "images": "png", "bytes": lengths, **changes}
    return framed(header, b"".join(files))


def request(
    own: RewardServer, method: str = "POST", path: str = "/score", *, body: bytes = b"", headers: Mapping[str, str] = {}
) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", own.server_port, timeout=TOO_LONG_S)
    connection.request(method, path, body=body or None, headers={"Content-Type": wire.CONTENT_TYPE, **headers})
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


PROMPT = [{"text": "a"}]
BODIES = {
    "no header": (b"\x01", 400, "header"),
    "a header longer than the body": (b"\xff\xff\xff\x7f{}", 400, "expected a header of 2147483647 bytes, got 2"),
    "a header that is no JSON": (framed(b"{'a"), 400, "not JSON"),
    "a header that is no text": (framed(b"\xff\xfe\xfd"), 400, "not JSON"),
    "a header without end": (framed(b"[" * 100_000), 400, "not JSON"),
    "a header that is no object": (framed([1]), 400, "expected an object, got list"),
    "pickle": (framed(pickle.dumps({"prompts": PROMPT})), 400, "not JSON"),
    "pickled images": (framed({"prompts": PROMPT, "images": "pickle"}, pickle.dumps(1)), 400, "safetensors or png"),
    "no prompts": (body(prompts=[]), 400, "prompts: expected a list of one or more"),
    "prompts that are none": (body(prompts=["a"] * 5), 400, "prompts: expected an object with a text at place 0"),
    "metadata that are none": (body(prompts=[{"text": "a", "metadata": 3}] * 5), 400, "for the metadata at place 0"),
    "too many images": (body(torch.zeros(65, 3, 2, 2), 65), 413, "65 images at once; this server takes 64"),
    "another number of images": (body(count=4), 400, "5 images for 4 prompts"),
    "malformed safetensors": (framed({"prompts": PROMPT, "images": "safetensors"}, b"\xff" * 64), 400, "safetensors"),
    "torn safetensors": (body()[:-7], 400, "not safetensors"),
    "no safetensors": (framed({"prompts": PROMPT, "images": "safetensors"}), 400, "not safetensors"),
    "another tensor": (
        framed({"prompts": PROMPT, "images": "safetensors"}, tensors(image=IMAGES)), 400, "expected one tensor, images",
    ),
    "another shape": (body(IMAGES[:, :1]), 400, r"of shape [B, 3, H, W]"),
    "images of no pixels": (body(torch.zeros(5, 3, 0, 8)), 400, r"of shape [B, 3, H, W]"),
    "another dtype": (body(IMAGES.double()), 400, "expected float32 or uint8, got torch.float64"),
    "too large in float32": (body(torch.zeros(1, 3, 300, 300, dtype=torch.uint8), 1), 413, "bytes in float32"),
    "no PNG": (pngs(b"GIF89a"), 400, "not PNG"),
    "a torn PNG": (pngs(png(64, 64)[:60]), 400, "not PNG"),
    "a PNG of too many pixels": (pngs(png(2_000, 1_000)), 413, "2000 x 1000 pixels"),
    "lengths of PNGs that do not add up": (pngs(png(), bytes=[3]), 400, "bytes: 3 of PNG files"),
    "no PNG at all": (framed({"prompts": PROMPT, "images": "png", "bytes": []}), 400, "0 images for 1 prompts"),
    "lengths of PNGs for other prompts": (pngs(png(), png(), prompts=PROMPT), 400, "2 images for 1 prompts"),
    "pixels above 1": (body(IMAGES + 0.5), 400, "expected float32 in [0, 1]"),
    "pixels below 0": (body(IMAGES - 0.5), 400, "expected float32 in [0, 1]"),
    "pixels that are no numbers": (body(IMAGES * float("nan")), 400, "expected float32 in [0, 1]"),
    "lengths of PNGs that are none": (pngs(png(), bytes=[-1, True]), 400, "expected the length of each PNG file"),
    "PNGs of two sizes": (pngs(png(), png(5, 4)), 400, "PNG files of one size"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Iterator[RewardServer]:
    """A server of a megabyte, to which many tests talk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_FACTORIES", {})
        with serving(max_bytes=1_000_000) as own:
            yield own


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_is_refused(what: str, small: RewardServer) -> None:
    given, status, message = BODIES[what]
    found, error = request(small, body=given)
    assert (found, error.keys()) == (status, {"error"}) and message in error["error"], error
    assert request(small, body=body())[0] == 200, "the server is as it was"


REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "another path": ({"path": "/scores", "body": b"x"}, 404, "expected GET /health or POST /score"),
    "a path upwards": ({"method": "GET", "path": "/../../etc/passwd"}, 404, "expected GET /health"),
    "the other method": ({"method": "GET", "path": "/score"}, 404, "expected GET /health or POST /score"),
    "an unknown method": ({"method": "DELETE"}, 501, "Unsupported method"),
    "another type": ({"body": b"a=1", "headers": {"Content-Type": "text/plain"}}, 415, wire.CONTENT_TYPE),
    "no length": ({"headers": {}}, 411, "expected one Content-Length"),
    "a length that is no number": ({"headers": {"Content-Length": "+5"}}, 400, "expected a number of bytes"),
    "a length beyond all limits": ({"headers": {"Content-Length": "9" * 19}}, 413, "this server takes 1000000"),
    "a body in chunks": (
        {"headers": {"Transfer-Encoding": "chunked", "Content-Length": "5"}},
        411,
        "no Transfer-Encoding",
    ),
    "another host's name": ({"body": b"x", "headers": {"Host": "evil.example"}}, 403, "only this machine is answered"),
    "a host that is none": ({"body": b"x", "headers": {"Host": "["}}, 400, "Invalid IPv6"),
    "a path that is none": ({"method": "GET", "path": "ftp://["}, 400, "Invalid IPv6"),
    "far too much": ({"body": b"x" * 3_000_000}, 413, "3000000 bytes; this server takes 1000000"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_that_is_refused(what: str, small: RewardServer) -> None:
    given, status, message = REQUESTS[what]
    if given == {"headers": {}}:
        found, error = raw(
            small, b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\n\r\n" % wire.CONTENT_TYPE.encode()
        )
    else:
        found, error = request(small, **given)
    assert (found, error.keys()) == (status, {"error"}) and message in error["error"], error
    assert request(small, body=body())[0] == 200, "the server is as it was"


def raw(own: RewardServer, sent: bytes, *, end: bool = False) -> tuple[int, dict[str, Any]]:
    """The answer to these bytes; `end` says that no more will come."""
    with socket.create_connection(("127.0.0.1", own.server_port), timeout=TOO_LONG_S) as peer:
        peer.sendall(sent)
        if end:
            peer.shutdown(socket.SHUT_WR)
        received = b""
        while piece := peer.recv(1 << 16):
            received += piece
            head, _, rest = received.partition(b"\r\n\r\n")
            if rest.endswith(b"}"):
                return int(head.split()[1]), json.loads(rest)
    raise AssertionError(f"no answer, but {received!r}")


HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: 1000\r\n\r\nabc"


def test_a_body_that_ends_too_early(small: RewardServer) -> None:
    found = raw(small, HEAD % wire.CONTENT_TYPE.encode(), end=True)
    assert found == (400, {"error": "the body ended after 3 of 1000 bytes"})


def test_a_body_that_does_not_come(small: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READ_S", 0.2)
    found = raw(small, HEAD % wire.CONTENT_TYPE.encode())
    assert found == (408, {"error": "3 of 1000 bytes came in time"})


def test_headers_that_do_not_end(small: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is not enough."""
    monkeypatch.setattr(server, "READ_S", 0.3)
    with socket.create_connection(("127.0.0.1", small.server_port), timeout=TOO_LONG_S) as peer:
        end = time.monotonic() + TOO_LONG_S
        peer.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            while time.monotonic() < end:
                peer.sendall(b"X-A: b\r\n")
                time.sleep(0.05)


def test_health_and_images_of_other_clients(small: RewardServer) -> None:
    eighth = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    for given in (pngs(png(), png()), body(eighth, 2)):
        status, found = request(small, body=given)
        assert status == 200
        assert found["metrics"]["mean"] == pytest.approx([0.2, 0.2], rel=1e-6)
    status, health = request(small, "GET", "/health")
    assert (status, health["name"], health["metrics"]) == (200, NAME, ["mean", "images"])
    assert health["limits"] == {"images": 64, "bytes": 1_000_000}
    assert {"dgpo-fast", "torch", "python"} <= health["versions"].keys()


def test_connections_are_not_without_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    with serving() as own:
        held = [socket.create_connection(("127.0.0.1", own.server_port), timeout=TOO_LONG_S) for _ in range(3)]
        assert held[2].recv(1) == b"", "the third is ended at once"
        for peer in held:
            peer.close()
        end = time.monotonic() + TOO_LONG_S
        while own._connections._value < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert request(own, body=body())[0] == 200
