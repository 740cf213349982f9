"""A Discovery Service that misbehaves by script: a real HTTP server on a free port of the loopback.

    with DiscoveryServer(answer(503), answer(200)) as server:
        client = DiscoveryClient(server.url, timeout=1)

Each request takes the next behaviour of the script; the last one stays. Behaviours write to the socket
themselves, so that anything can be said, at any speed, valid HTTP or not.
"""

import contextlib
import itertools
import json
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

_PATIENCE = 60.0

Behaviour = Callable[["Exchange"], bool]
"""Answers one request; returns whether the connection lives on."""


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    line: str
    headers: Mapping[str, str]
    body: bytes
    connection: int
    at: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> Any:  # noqa: ANN401 -- JSON is anything
        """The body, parsed."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Exchange:
    """What a behaviour works with."""

    socket: socket.socket
    request: Request
    client_left: threading.Event


def answer(
    status: int = 200,
    body: bytes = b"",
    *,
    headers: Mapping[str, str] | None = None,
    delay: float = 0.0,
) -> Behaviour:
    """Answer properly, after ``delay`` seconds; the connection stays open."""

    def behave(exchange: Exchange) -> bool:
        if delay and _client_leaves(exchange, delay):
            return False
        exchange.socket.sendall(_head(status, {"Content-Length": str(len(body)), **(headers or {})}) + body)
        return True

    return behave


def raw(data: bytes) -> Behaviour:
    """Send these bytes, then close."""

    def behave(exchange: Exchange) -> bool:
        exchange.socket.sendall(data)
        return False

    return behave


def silence() -> Behaviour:
    """Never answer."""

    def behave(exchange: Exchange) -> bool:
        _client_leaves(exchange, _PATIENCE)
        return False

    return behave


def dribble(head: bytes, *, every: float) -> Behaviour:
    """Send ``head`` at once, then for ever a letter now and then: header or body, as ``head`` has it."""

    def behave(exchange: Exchange) -> bool:
        exchange.socket.sendall(head)
        while not _client_leaves(exchange, every):
            exchange.socket.sendall(b"x")
        return False

    return behave


def endless(status: int) -> Behaviour:
    """Send a body that never ends, as fast as it is taken."""

    def behave(exchange: Exchange) -> bool:
        exchange.socket.sendall(_head(status, {}))
        until = time.monotonic() + _PATIENCE
        try:
            while time.monotonic() < until:
                exchange.socket.sendall(b"endless " * 1024)
        except OSError:
            exchange.client_left.set()
        return False

    return behave


def close() -> Behaviour:
    """Close without a word."""
    return raw(b"")


def reset() -> Behaviour:
    """Reset the connection (RST) without a word."""

    def behave(exchange: Exchange) -> bool:
        exchange.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.socket.close()
        return False

    return behave


class DiscoveryServer:
    """Serves a script from entering to leaving the ``with`` block.

    Attributes:
        requests: what arrived, in order.
        client_left: set when a client gave up before its answer was complete.
    """

    def __init__(self, *script: Behaviour, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.client_left = threading.Event()
        self._tls = tls
        self._lock = threading.Lock()
        self.play(*script)
        self._sockets: list[socket.socket] = []
        self._listener = _Listener(("127.0.0.1", 0), self._serve)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._listener.server_address[1])

    @property
    def url(self) -> str:
        """Where to post to."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/discover"

    @property
    def connections(self) -> int:
        """How many TCP connections carried a request."""
        return len({request.connection for request in self.requests})

    def play(self, *script: Behaviour) -> None:
        """Begin another script, and forget the requests of the one before."""
        with self._lock:
            self.requests.clear()
            self._script = itertools.chain(script, itertools.repeat(script[-1]))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _serve(self, connected: socket.socket) -> None:
        with self._lock:
            self._sockets.append(connected)
            number = len(self._sockets)
        # Whatever a client does to its connection is its own affair.
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain = self._tls.wrap_socket(connected, server_side=True) if self._tls else connected
            with plain, plain.makefile("rb") as stream:
                alive = True
                while alive and (line := stream.readline()):
                    headers = _headers(iter(stream.readline, b"\r\n"))
                    body = stream.read(int(headers["content-length"]))
                    alive = self._answer(plain, Request(line.decode().strip(), headers, body, number))

    def _answer(self, connected: socket.socket, request: Request) -> bool:
        with self._lock:
            self.requests.append(request)
            behave = next(self._script)
        return behave(Exchange(connected, request, self.client_left))


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        super().__init__(address, socketserver.BaseRequestHandler)

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 -- the base's signature
        self._serve(request)


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else "Unheard Of"
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _headers(lines: Any) -> dict[str, str]:  # noqa: ANN401 -- any iterable of bytes
    pairs = (line.decode("latin-1").rstrip("\r\n").partition(":") for line in lines)
    return {name.lower(): value.strip() for name, _, value in pairs}


def _client_leaves(exchange: Exchange, seconds: float) -> bool:
    # A client has nothing more to say after its request, so whatever arrives is its farewell.
    exchange.socket.settimeout(seconds)
    try:
        exchange.socket.recv(1)
    except TimeoutError:
        return False
    except OSError:
        pass
    finally:
        exchange.socket.settimeout(None)
    exchange.client_left.set()
    return True
