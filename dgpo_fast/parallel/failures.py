"""How a rank learns that another has failed, so that none waits in a collective for what will never come.

    rank 1 ──its reason──▶ rank 0 ──the same──▶ ranks 2, 3, ...        a rank that raises
    rank 1 ──end of the connection──▶ rank 0 ──"rank 1 was killed"──▶  a rank that is killed, or whose machine is gone

Rank 0 holds a TCP connection to each other rank, and a thread of each rank listens. A rank that dies cannot keep its
connections, whatever it or anybody else was busy with, so nothing has to beat like a heart, and no slow rank is taken
for dead; for a machine that is gone the kernel's keepalive answers within `SILENCE_S`. Collectives would not do: those
of NCCL wait on the device until their timeout, with nothing that Python could interrupt.

A rank that hears of a failure says so in one line, gives its main thread a moment to close its files, and exits with
status 1. That may be in the middle of anything: checkpoints are whole or not there at any time.
"""

from __future__ import annotations

import atexit
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from threading import Event, Lock, Thread, current_thread, main_thread
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

JOIN_TIMEOUT_S = 300.0
"""For all ranks to come to the start of a run: they may import torch from a slow disk."""
SILENCE_S = 30
"""After which the kernel gives up a machine that does not answer."""
NEWS_S = 3.0
"""Within which a collective that broke is explained by word of the rank that broke it."""
GRACE_S = 5.0
"""What the main thread gets to unwind, unless it is blocked."""
LAST_S = 2.0
"""Before the end, so that a launcher, which reports the rank that ended first, names the one that failed."""
MAX_REASON = 2000

_PARTED = "parted"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class RankLost(Exception):
    """Another rank has failed, so this one cannot go on; the message says which, and this rank has printed it."""


class Watch:
    """The connections of this rank to those that it must hear of, or tell; until the end of the process.

    Args:
        store: the process group's, by which the others learn where rank 0 listens.
        timeout_s: of the process group, `parallel.timeout_s`.
    """

    def __init__(self, rank: int, size: int, store: Store, *, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._peers = _accept(size, store) if rank == 0 else _connect(rank, store)
        self._lock, self._heard = Lock(), Event()
        self._is_over = False  # this rank has parted, failed, or heard of a failure: what the others do is all the same
        self._lost: RankLost | None = None
        self._usual_hook, sys.excepthook = sys.excepthook, self._on_uncaught
        if current_thread() is main_thread():
            self._usual_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        atexit.register(self.part)
        os.register_at_fork(after_in_child=self._forget)
        Thread(target=self._listen, name="watch of other ranks", daemon=True).start()

    def part(self) -> None:
        """Leaves in good order: the others go on, or do the same."""
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self._tell(_PARTED)

    def fail(self, reason: str) -> None:
        """Tells the others why this rank ends. Where it ends because of them, the process is over here."""
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self._tell(f"rank {self.rank} failed: {reason}")
        if self._lost is not None:
            _end_process()

    def check(self) -> None:
        """Raises `RankLost` once another rank has failed."""
        if self._lost is not None:
            raise self._lost

    def explain(self, error: RuntimeError) -> Exception:
        """What a collective's error means: `RankLost` where another rank broke it or never came, else the error."""
        if not self._heard.wait(NEWS_S) and "timed out" in str(error).lower():
            self._lose(f"rank {self.rank} waited {self.timeout_s:g} s (parallel.timeout_s) for the others")
        return self._lost or error

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in self._peers:
                selector.register(each, selectors.EVENT_READ, data=each)
            while selector.get_map():
                for key, _ in selector.select():
                    peer: socket.socket = key.data
                    word = _read(peer)
                    if word == _PARTED:
                        selector.unregister(peer)
                    elif self._lose(word or f"rank {self._peers[peer]} was killed, or its machine is gone"):
                        time.sleep(GRACE_S)
                        _end_process()
                    else:
                        return

    def _lose(self, cause: str) -> bool:
        """Whether this rank has to end for `cause`, which it then says, and passes on."""
        with self._lock:
            if self._is_over:
                return False
            going_on = "checkpoints are intact, train --resume goes on from the last"
            self._lost = RankLost(f"rank {self.rank} of {self.size} stops: {cause}; {going_on}")
            self._is_over = True
            self._tell(cause)
            print(f"error: {self._lost}", file=sys.__stderr__, flush=True)  # which no progress bar or hook has replaced
            self._heard.set()
        return True

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """The traceback of a rank that fails by itself; one that fails because of another has said its line."""
        if isinstance(error, Exception) and self._heard.wait(NEWS_S):
            _end_process()
        self.fail(f"{kind.__name__}: {error}")
        self._usual_hook(kind, error, trace)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """What SIGTERM does, but for the case that it is the launcher's, which terminates the others of a dead rank."""
        patience_ends = time.monotonic() + NEWS_S
        while not self._is_over and time.monotonic() < patience_ends:
            time.sleep(0.01)  # an Event could not be waited for: this may interrupt the main thread doing just that
        self.check()
        signal.signal(number, self._usual_handler)
        signal.raise_signal(number)

    def _tell(self, word: str) -> None:
        for peer in self._peers:
            _send(peer, word)

    def _forget(self) -> None:
        """In a process that a reward forks, say: it is no rank, and must not keep the connections of one that dies."""
        self._is_over = True
        for peer in self._peers:
            peer.close()


_watch: Watch | None = None


def watch(rank: int, size: int, store: Store, *, timeout_s: float) -> None:
    """Begins to hear of the other ranks' failures, and to tell them of this one's. All ranks must call it."""
    global _watch
    _watch = Watch(rank, size, store, timeout_s=timeout_s)


def part() -> None:
    """As `Watch.part`; nothing in a process alone. The end of the interpreter does it too, unless by an exception."""
    if _watch is not None:
        _watch.part()


def fail(reason: str) -> None:
    """As `Watch.fail`; nothing in a process alone. An exception that nobody catches does it too."""
    if _watch is not None:
        _watch.fail(reason)


def collective(exchange: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`exchange`, raising `RankLost` where another rank has failed: before it is waited for, or where it is missed."""

    @wraps(exchange)
    def checked(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        if _watch is None:
            return exchange(*arguments, **named)
        _watch.check()
        try:
            return exchange(*arguments, **named)
        except RuntimeError as error:
            raise _watch.explain(error) from None

    return checked


def _accept(size: int, store: Store) -> dict[socket.socket, int]:
    """Connections to all other ranks, and which they are."""
    peers: dict[socket.socket, int] = {}
    # Ranks of both protocols: the name of this machine may mean either to them.
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both) as server:
        password = secrets.token_hex(16)
        store.set("watch", f"{server.getsockname()[1]} {password}")
        server.settimeout(JOIN_TIMEOUT_S)
        while len(peers) < size - 1:
            peer, _ = server.accept()
            peer.settimeout(JOIN_TIMEOUT_S)
            given, _, rank = _read(peer).partition(" ")
            if given == password:
                peers[_kept_alive(peer)] = int(rank)
            else:
                peer.close()
    return peers


def _connect(rank: int, store: Store) -> dict[socket.socket, int]:
    """The connection to rank 0, on whose machine every launcher puts MASTER_ADDR."""
    port, password = store.get("watch").decode().split()
    peer = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=JOIN_TIMEOUT_S)
    _send(peer, f"{password} {rank}")
    return {_kept_alive(peer): 0}


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 2)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 6)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return peer


def _send(peer: socket.socket, word: str) -> None:
    """Sends a line; a rank that has ended meanwhile needs none."""
    with suppress(OSError):
        peer.sendall(" ".join(word.split())[:MAX_REASON].encode() + b"\n")


def _read(peer: socket.socket) -> str:
    """A line, or nothing where the connection ends."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            byte = peer.recv(1)
        except OSError:
            byte = b""
        if not byte:
            return ""
        line += byte
    return line.decode(errors="replace").strip()


def _end_process() -> None:
    """Tears nothing down: NCCL's communicators, for one, may wait for the rank that is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(LAST_S)
    os._exit(1)
