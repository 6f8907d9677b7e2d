"""A reward behind HTTP: `dgpo-fast serve-reward`. What it is sent and answers is in `wire.py`.

    connection ─▶ token, path, length ─▶ a place among those that wait ─▶ read, unpack ─▶ one at a time: score ─▶ answer
                  401, 404, 411, 413     503 with Retry-After             400, 408, 413   500: it raised
                                                                                          422: a mistake in it

It listens on the loopback interface; elsewhere only with a token, which it compares in constant time. Nothing that it
is sent is run or kept, its size is known before it is read, and a connection that sends too slowly is closed. Traffic
is not encrypted: for a network that others share, put a proxy with TLS before it.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import BoundedSemaphore, Lock, Thread, Timer
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

import torch

from dgpo_fast.environment import package_versions
from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import RewardsConfig
from dgpo_fast.rewards import wire
from dgpo_fast.rewards.base import load_reward
from dgpo_fast.rewards.calling import Metrics, call
from dgpo_fast.rewards.remote import token_of_environment

MAX_WAITING = 4
"""Requests besides the one that is scored, each with its images in memory; the next wait before they are read."""
HOLD_S = 60.0
"""So long; then they are told to come again."""
RETRY_AFTER_S = 1
MAX_CONNECTIONS = 256
"""Of as many ranks: each keeps one open, and waits there for its turn."""
READ_S = 30.0
"""For a request's first line and headers, for the next piece of its body, and for each 64 MB of that."""
LEAST_BYTES_PER_S = 64e6 / READ_S
LINGER_S = 2.0
"""In which the rest of a refused body is thrown away: a client that still sends would not see why."""
LEAVE_S = 5.0
"""For what is scored when the server is told to end."""


class _Refused(Exception):
    """A request that gets no scores, and the status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """A server of one reward, which it makes once it is bound to its address.

    `serve_forever` and `shutdown` are the standard library's.

    Args:
        device: of the reward, to which the images are moved.
        port: 0 for any that is free.
        token: that every request must bear; empty for none.
        max_bytes: of a request, and of its images in float32.

    Raises:
        UserError: an address that other machines reach without a token, or that cannot be bound; or as `load_reward`.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(
        self,
        name: str,
        settings: RewardsConfig,
        *,
        device: torch.device,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        max_images: int = 64,
        max_bytes: int = 256_000_000,
    ) -> None:
        if not token and not _is_loopback(host):
            raise UserError(
                f"--host {host} can be reached from other machines: set {wire.TOKEN} here and where the reward is used"
            )
        self.name, self.device, self.token = name, device, token
        self.max_images, self.max_bytes = max_images, max_bytes
        self.metrics: list[str] | None = None  # known once it has scored an image
        self.versions = package_versions()
        self.places, self.turn = BoundedSemaphore(1 + MAX_WAITING), Lock()
        self._connections = BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen at {host}:{port}: {error}") from None
        try:
            self.reward = load_reward(name, settings, device=device)
        except UserError:
            self.server_close()
            raise

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def score(self, body: bytes | bytearray) -> list[Metrics]:
        """The metrics of a request's images.

        Raises:
            _Refused: the request is malformed or too large, or the reward fails.
        """
        try:
            images_BCHW, prompts = wire.unpack(body, max_images=self.max_images, max_bytes=self.max_bytes)
        except wire.TooMuch as error:
            raise _Refused(413, str(error)) from None
        except wire.Malformed as error:
            raise _Refused(400, str(error)) from None
        try:
            metrics = call(self.name, self.reward, images_BCHW.to(self.device), prompts)
        except UserError as error:
            raise _Refused(422, str(error)) from None
        except Exception as error:  # whatever a user's reward raises
            raise _Refused(500, f"{type(error).__name__}: {error}") from None
        self.metrics = list(metrics[0])
        return metrics

    def health(self) -> dict[str, object]:
        limits = {"images": self.max_images, "bytes": self.max_bytes}
        return {"name": self.name, "metrics": self.metrics, "limits": limits, "versions": self.versions}

    def server_bind(self) -> None:
        """Binds, and does not ask DNS for this machine's name as the standard library does, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Takes a connection, unless there are too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"  # connections stay open
    server_version, sys_version = "dgpo-fast", ""
    timeout = READ_S
    wbufsize = 1 << 16  # one packet for headers and a short answer
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer({"/health": lambda: json.dumps(self.server.health()).encode()})

    def do_POST(self) -> None:
        self._answer({"/score": self._score})

    def handle_one_request(self) -> None:
        """Gives a client so long for a request up to its body; the socket's timeout is for each byte of it."""
        self._alarm = Timer(READ_S, self._hang_up)
        self._alarm.daemon = True
        self._alarm.start()
        try:
            super().handle_one_request()
        finally:
            self._alarm.cancel()

    def parse_request(self) -> bool:
        is_right = super().parse_request()
        self._alarm.cancel()
        return is_right

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, said as everything else is."""
        self._send(code, _error_body(message or "refused"), is_last=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps no log of requests."""

    def _answer(self, ways: dict[str, Callable[[], bytes]]) -> None:
        self._is_read = False
        try:
            self._check_sender()
            path = _split(self.path).path
            if path not in ways:
                raise _Refused(404, f"{self.command} {path}: expected GET /health or POST /score"[:200])
            self._send(200, ways[path](), is_last=False)
        except _Refused as refused:
            if refused.status in (422, 500):
                print(f"{self.server.name}: {refused}", file=sys.stderr, flush=True)
            has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
            is_last = has_body and not self._is_read
            self._send(refused.status, _error_body(str(refused)), is_last=is_last)
            if is_last:
                self._linger()

    def _check_sender(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(given.encode("latin-1", "replace"), f"Bearer {token}".encode()):
            raise _Refused(401, f"expected the token of this server ({wire.TOKEN})")
        # A web page whose own name has come to mean this machine would send that name.
        host = _split(f"//{self.headers.get('Host', '')}").hostname or ""
        if not token and not _is_loopback(host):
            raise _Refused(403, f"host {host!r}: without a token, only this machine is answered"[:200])

    def _score(self) -> bytes:
        length = self._length()
        if not self.server.places.acquire(timeout=HOLD_S):
            raise _Refused(503, f"{1 + MAX_WAITING} requests are waiting")
        try:
            body = self._body(length)
            self._await_turn()
            try:
                return wire.pack_metrics(self.server.score(body))
            finally:
                self.server.turn.release()
        finally:
            self.server.places.release()

    def _length(self) -> int:
        """Of the body, which is small enough to be read."""
        if self.headers.get_content_type() != wire.CONTENT_TYPE:
            raise _Refused(415, f"Content-Type: expected {wire.CONTENT_TYPE}")
        given = self.headers.get_all("Content-Length", [])
        if len(given) != 1 or "Transfer-Encoding" in self.headers:
            raise _Refused(411, "expected one Content-Length, and no Transfer-Encoding")
        if not (given[0].isascii() and given[0].isdecimal() and len(given[0]) < 20):
            raise _Refused(400, "Content-Length: expected a number of bytes")
        length = int(given[0])
        if length > self.server.max_bytes:
            raise _Refused(413, f"{length} bytes; this server takes {self.server.max_bytes}")
        return length

    def _body(self, length: int) -> bytearray:
        body, got = bytearray(length), 0
        end = time.monotonic() + READ_S + length / LEAST_BYTES_PER_S
        while got < length:
            left = end - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                self.connection.settimeout(min(READ_S, left))
                count = self.rfile.readinto1(memoryview(body)[got:])
            except TimeoutError:
                raise _Refused(408, f"{got} of {length} bytes came in time") from None
            if not count:
                raise _Refused(400, f"the body ended after {got} of {length} bytes")
            got += count
        self.connection.settimeout(READ_S)
        self._is_read = True
        return body

    def _await_turn(self) -> None:
        """Until nothing else is scored; a client that no longer waits for it is let go."""
        while not self.server.turn.acquire(timeout=1):
            if self._is_gone():
                raise ConnectionAbortedError
        if self._is_gone():
            self.server.turn.release()
            raise ConnectionAbortedError

    def _is_gone(self) -> bool:
        is_readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(is_readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send(self, status: int, body: bytes, *, is_last: bool) -> None:
        self.close_connection = self.close_connection or is_last
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", str(RETRY_AFTER_S))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _linger(self) -> None:
        end = time.monotonic() + LINGER_S
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    return

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError as error:  # brackets that hold no IPv6 address
        raise _Refused(400, f"{address!r}: {error}"[:200]) from None


def serve_reward(
    name: str,
    settings: RewardsConfig,
    *,
    device: torch.device,
    host: str,
    port: int,
    max_images: int,
    max_bytes: int,
) -> NoReturn:
    """Serves until SIGINT or SIGTERM, and raises SystemExit(130 or 143).

    Raises:
        UserError: as `RewardServer`, or the token of the environment cannot stand in a header.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    server = RewardServer(
        name, settings, device=device, host=host, port=port, token=token_of_environment(), max_images=max_images,
        max_bytes=max_bytes,
    )  # fmt: skip
    serving = Thread(target=server.serve_forever, daemon=True)
    serving.start()
    print(f"{name} on {device} answers at {server.url}", file=sys.stderr, flush=True)
    try:
        while True:
            serving.join()
    finally:
        server.shutdown()
        server.server_close()
        server.turn.acquire(timeout=LEAVE_S)


def parse_device(name: str) -> torch.device:
    """A device by name; `auto` is the GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:1, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(f"--device: no device {name!r} here")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda was asked for, but torch sees no CUDA device")
    return device


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _error_body(message: str) -> bytes:
    return json.dumps({"error": " ".join(message.split())}).encode()
