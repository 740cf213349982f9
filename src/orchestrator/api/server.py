"""Serves the application: one process, one port, logs like everybody else's."""

import asyncio
import gc
import signal
import socket
from contextlib import suppress
from typing import Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from orchestrator import bootstrap, tracing
from orchestrator.api.app import Protected, create_app
from orchestrator.errors import ConfigurationError, TransientError
from orchestrator.telemetry import Event, logger

_BACKLOG: Final = 512
_THREADS: Final = 40
"""Handlers that run at once, as anyio has it."""
_LONGEST_STATEMENT: Final = 10.0  # seconds
_GOODBYE: Final = 15  # seconds for requests that are being answered
_SLOWEST_HEAD: Final = 20.0  # seconds until a request has begun

_log = logger(__name__)


def serve(host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; requests that are being answered are finished.

    Raises:
        ConfigurationError: one cannot listen there.
    """
    listener = _listen(host, port)
    bootstrap.observe(None)
    services = bootstrap.services()
    services.database.serve(_THREADS, within=_LONGEST_STATEMENT)
    config = uvicorn.Config(
        Protected(create_app(services)),
        http=_Impatient,
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=list(services.settings.api.trusted_proxies),
        timeout_graceful_shutdown=_GOODBYE,
        limit_concurrency=1_000,
        h11_max_incomplete_event_size=65_536,
    )
    server = uvicorn.Server(config)
    # uvicorn has handlers of its own while it serves, and then has the signal delivered to whoever was there before it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    address = listener.getsockname()
    _log.info(Event.API_STARTED, host=address[0], port=address[1])
    with suppress(TransientError):
        if not services.ledger.keys.any():
            _log.warning(Event.API_WITHOUT_KEYS, remedy="orchestrator keys create NAME --role operator")
    # What there is by now stays: to go through all of it again and again would hold every request up, a tenth of a
    # second at a time.
    gc.collect()
    gc.freeze()
    try:
        server.run(sockets=[listener])
    finally:
        services.sender.close()
        tracing.flush()


class _Impatient(H11Protocol):
    """HTTP/1.1 on a connection that is closed when the head of a request is not there in time; uvicorn would wait."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_SLOWEST_HEAD, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # Connections inherit it. asyncio sets it only on sockets that tell their protocol, and these do not: the body of
    # every answer would wait 40 ms until its head is acknowledged.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
