"""A reward behind HTTP, asked as `wire.py` says."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Event, Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from torch import Tensor

from dgpo_fast import launcher
from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import RewardsConfig
from dgpo_fast.rewards import wire
from dgpo_fast.rewards.calling import Answer, Failure, Metrics, Patience, backoff, rows

GREETING_S = 60.0
"""For a server to answer at the start of a run, with which it may have been started."""
MAX_ANSWER_BYTES = 64 << 20
MAX_RETRY_AFTER_S = 30.0
BUSY = (408, 429, 502, 503, 504)
"""What a server, or a proxy before it, answers that may be there again at any moment."""


Body = Sequence[bytes | memoryview]


class _Response(NamedTuple):
    status: int
    retry_after_s: float | None
    body: bytes


class _Unreached(Exception):
    """Nothing, or nothing of use, came in time; the message is the last reason."""


class Remote:
    """A reward of a server that answers when this is made.

    A server that is not there, or busy, is tried again as long as the batch may take; one whose reward raises is not,
    since whoever asks does that.

    Args:
        settings: whose `running` has the reward's url.
        stop: set where nobody waits any more.

    Raises:
        UserError: no server there, or it has another reward, or wants another token.
    """

    is_elsewhere = True

    def __init__(self, name: str, settings: RewardsConfig, *, stop: Event) -> None:
        running = settings.running[name]
        assert running.url is not None
        self._name, self._key, self._url = name, f"rewards.running.{name}.url", running.url
        self._parts = urlsplit(self._url)
        self._headers = {"Content-Type": wire.CONTENT_TYPE, **authorization()}
        self._connection: HTTPConnection | None = None
        limits = self._greet(Patience(GREETING_S, stop))
        self._max_bytes = int(limits["bytes"])
        self._at_once = min(running.images_per_call or limits["images"], limits["images"])

    def ask(self, images_BCHW: Tensor, prompts: Sequence[str], patience: Patience) -> list[Answer]:
        per_image = images_BCHW[0].numel() * 4
        # Less than all that fits: prompts and names need some room too.
        size = max(1, min(self._at_once, int(0.9 * self._max_bytes) // per_image))
        answers: list[Answer] = []
        for start in range(0, len(prompts), size):
            asked, before = prompts[start : start + size], answers[-1].failure if answers else None
            if before is not None and before.is_hang:  # which took all the time that there was
                answers.append(Answer(len(asked), None, before))
            else:
                answers.append(self._ask(images_BCHW[start : start + size], asked, patience))
        return answers

    def close(self) -> None:
        """Ends the connection; the next request makes another."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
        connection.close()

    def _ask(self, images_BCHW: Tensor, prompts: Sequence[str], patience: Patience) -> Answer:
        count = len(prompts)
        if not wire.are_pixels(images_BCHW).all():  # what a server refuses, and other images are sent without
            return Answer(count, None, Failure("its pixels are not in [0, 1]"))
        try:
            response = self._send("POST", "/score", wire.pack(images_BCHW, prompts), patience)
        except _Unreached as error:
            return Answer(count, None, Failure(str(error), is_hang=True))
        if response.status >= 500:
            return Answer(count, None, Failure(_error(response)))
        try:
            return Answer(count, self._metrics(response, count))
        except wire.Malformed as error:
            return Answer(count, None, Failure(f"{self._url} answered what is no answer: {error}"))

    def _metrics(self, response: _Response, count: int) -> list[Metrics]:
        if response.status != 200:
            raise UserError(f"{self._key}: {self._url} answered {response.status}: {_error(response)}")
        return rows(self._name, wire.unpack_metrics(response.body), count)

    def _greet(self, patience: Patience) -> Mapping[str, Any]:
        """The limits of the server."""
        start = f"start it with `dgpo-fast serve-reward {self._name}`"
        try:
            response = self._send("GET", "/health", [], patience, waits=self._say_that_it_waits)
        except _Unreached as error:
            raise UserError(f"{self._key}: no reward answers at {self._url}: {error}; {start}") from None
        if response.status != 200:
            raise UserError(f"{self._key}: {self._url} answered {response.status}: {_error(response)}")
        try:
            health = wire.unpack_object(response.body)
            limits = health["limits"]
            if not all(isinstance(limits[key], int) and limits[key] > 0 for key in ("images", "bytes")):
                raise wire.Malformed("its limits are no numbers")
        except (wire.Malformed, KeyError, TypeError) as error:
            raise UserError(f"{self._key}: {self._url} is no dgpo-fast serve-reward: {error}") from None
        if health.get("name") != self._name:
            raise UserError(f"{self._key}: {self._url} serves {health.get('name')!r}, expected {self._name!r}; {start}")
        return limits  # type: ignore[no-any-return]

    def _say_that_it_waits(self, reason: str) -> None:
        if launcher.is_first():  # one line, not one of every rank
            waiting = f"{self._key}: {self._url} does not answer yet{reason}; waiting up to {GREETING_S:g} s for it"
            print(waiting, file=sys.stderr, flush=True)

    def _send(
        self, method: str, path: str, body: Body, patience: Patience, *, waits: Callable[[str], None] | None = None
    ) -> _Response:
        """The first response that is not of a server too busy for one.

        Args:
            waits: told, in words, why the first attempt gave none.

        Raises:
            _Unreached: none came in time.
            Abandoned: nobody waits.
        """
        attempt, reason = 0, ""
        while not patience.is_over:
            was_open, wait = self._connection is not None, backoff(attempt)
            found = self._try(partial(self._exchange, method, path, body, patience), patience)
            if isinstance(found, _Response):
                if found.status not in BUSY:
                    return found
                reason, wait = f" (status {found.status}: {_error(found)})", max(found.retry_after_s or 0, wait)
            elif found is not None:
                reason = f" ({type(found).__name__}: {found})"
                if was_open and attempt == 0:
                    wait = 0  # a server ends connections that nobody used for a while
            if waits is not None and attempt == 0 and not patience.is_over:
                waits(reason)
            patience.sleep(wait)
            attempt += 1
        patience.check()
        raise _Unreached(f"no answer within {patience.seconds:g} s{reason}")

    def _try(self, exchange: Callable[[], _Response], patience: Patience) -> _Response | Exception | None:
        """What an exchange gives, or the network's error; None where patience was over first.

        In a thread: its own timeouts are for each piece that comes, and a server may send them one by one for ever.
        """
        found: list[_Response | Exception] = []

        def run() -> None:
            try:
                found.append(exchange())
            except Exception as error:
                found.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        in_time = patience.await_all([thread])
        if not in_time or isinstance(found[0], Exception):
            self.close()
        if in_time and isinstance(found[0], Exception) and not isinstance(found[0], OSError | HTTPException):
            raise found[0]
        return found[0] if in_time else None

    def _exchange(self, method: str, path: str, body: Body, patience: Patience) -> _Response:
        connection = self._connected(max(patience.left, 0.1))
        length = {"Content-Length": str(sum(len(part) for part in body))} if body else {}
        connection.request(method, self._parts.path + path, body=body or None, headers={**self._headers, **length})
        response = connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES)
        if response.will_close or not response.isclosed():
            self.close()
        return _Response(response.status, _seconds(response.getheader("Retry-After")), answer)

    def _connected(self, timeout_s: float) -> HTTPConnection:
        """The open connection, or a new one; either gives up a peer that is silent for so long."""
        if self._connection is None:
            kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
            assert self._parts.hostname is not None
            self._connection = kind(self._parts.hostname, self._parts.port, timeout=timeout_s)
        elif self._connection.sock is not None:
            self._connection.sock.settimeout(timeout_s)
        return self._connection


def authorization() -> dict[str, str]:
    """The header with the token, where the environment has one.

    Raises:
        UserError: it cannot stand in a header.
    """
    token = token_of_environment()
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_of_environment() -> str:
    """The token, or an empty string.

    Raises:
        UserError: it cannot stand in a header.
    """
    token = os.environ.get(wire.TOKEN, "")
    if not all("!" <= letter <= "~" for letter in token):
        raise UserError(f"{wire.TOKEN}: expected letters, digits and signs of ASCII without spaces")
    return token


def _error(response: _Response) -> str:
    """The line that an answer other than 200 carries."""
    try:
        return " ".join(str(wire.unpack_object(response.body)["error"]).split())
    except (wire.Malformed, KeyError):
        return response.body[:100].decode(errors="replace") or "nothing"


def _seconds(retry_after: str | None) -> float | None:
    if retry_after is None or not retry_after.isdecimal():
        return None
    return min(float(retry_after), MAX_RETRY_AFTER_S)
