"""A Discovery Service to demonstrate with: sometimes slow, sometimes down (503), sometimes overrun (429).

Its moods are seeded: the same data source meets the same ones in every demo, and none fails three times in a row.
"""

import json
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any, Final, Self

_PATIENCE: Final = 2
"""Failures of one run in a row, at most."""


@dataclass(frozen=True, slots=True)
class Mood:
    """How one call is answered."""

    status: int
    seconds: float
    retry_after: int | None = None


_FINE: Final = Mood(202, 0.2)
_MOODS: Final = {
    _FINE: 35,
    Mood(200, 0.4): 10,
    Mood(202, 2.5): 10,
    Mood(503, 0.1): 25,
    Mood(429, 0.05, retry_after=1): 20,
}


def mood(data_source_id: int, call: int) -> Mood:
    """Return how the call of this number about a data source is answered."""
    if call > _PATIENCE:
        return _FINE
    dice = Random(f"discovery {data_source_id} {call}")  # noqa: S311 -- a play, no secret
    return dice.choices(list(_MOODS), list(_MOODS.values()))[0]


class DiscoveryStub:
    """Answers on a free port of the loopback inside the ``with`` block, from threads of this process."""

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def url(self) -> str:
        """Where to post to."""
        return f"http://127.0.0.1:{self._server.server_port}/discover"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: object) -> None:  # noqa: ANN401 -- the base says so
        """Let clients be killed in the middle of a call: the story does that."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def count(self, key: str) -> int:
        """Count one more call of a run; return its number."""
        with self._lock:
            self._calls[key] += 1
            return self._calls[key]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # Every attempt of a run carries the same key.
        answer = mood(request["data_source_id"], self.server.count(self.headers["Idempotency-Key"]))
        time.sleep(answer.seconds)
        self.send_response(answer.status)
        if answer.retry_after is not None:
            self.send_header("Retry-After", str(answer.retry_after))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base's signature
        """Keep silent: the ledger tells of the calls."""
