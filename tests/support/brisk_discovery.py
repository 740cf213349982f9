"""A Discovery Service that is quick and keeps the time: what tests/bench/triggers.py measures against.

    with BriskDiscovery(directory) as server:
        worker posts to server.url(0.2), which answers after 0.2 s
        server.calls()

A process of its own, so that it takes no time of whoever measures; asyncio, so that it answers thousands a second and
keeps as many waiting as there are. For misbehaviour see discovery_server.py.
"""

import asyncio
import json
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.support.processes import Process, free_port

_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"


@dataclass(frozen=True)
class Call:
    """One call as the server saw it, by the machine's wall clock.

    Attributes:
        key: the header ``Idempotency-Key``, which the seed's task does not send.
        received_at: when its last byte was there.
        answered_at: when its answer was written.
    """

    key: str
    received_at: float
    answered_at: float


class BriskDiscovery:
    """The server's process, from entering to leaving the ``with`` block.

    Args:
        directory: where its output goes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.support.brisk_discovery", str(self._port)]
        self._process = Process(command, output=self._directory / "discovery.log", cwd=Path(__file__).parents[2])
        self._process.await_line("listening", within=30)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def url(self, latency: float) -> str:
        """Return where to post to for answers after so many seconds."""
        return f"http://127.0.0.1:{self._port}/discover/{latency}"

    def count(self) -> int:
        """Return how many calls were answered since they were last taken."""
        return int(self._get("count"))

    def calls(self) -> list[Call]:
        """Take the calls that were answered since the last time."""
        return [Call(*call) for call in self._get("calls")]

    def _get(self, what: str) -> Any:  # noqa: ANN401 -- JSON is anything
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/{what}", timeout=30) as response:
            return json.load(response)


class _Connection(asyncio.Protocol):
    """Answers one request after the other."""

    def __init__(self, calls: list[tuple[str, float, float]]) -> None:
        self._calls = calls
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, complete, body = self._received.partition(b"\r\n\r\n")
        if not complete:
            return
        line, *rest = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
        if len(body) < int(headers.get("content-length", 0)):
            return
        self._received = b""
        method, path, _ = line.split()
        if method == "POST":
            key, latency = headers.get("idempotency-key", ""), float(path.rpartition("/")[2])
            asyncio.get_running_loop().call_later(latency, self._answer, key, time.time())
        elif path == "/count":
            self._say(str(len(self._calls)).encode())
        else:
            self._say(json.dumps(self._calls).encode())
            self._calls.clear()

    def _answer(self, key: str, received_at: float) -> None:
        self._say(b"")
        self._calls.append((key, received_at, time.time()))

    def _say(self, body: bytes) -> None:
        self._transport.write(_OK % (len(body), body))


async def _serve(port: int) -> None:
    calls: list[tuple[str, float, float]] = []
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(calls), "127.0.0.1", port, backlog=1_024
    )
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
