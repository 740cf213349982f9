"""Serves the application: one process, one port, logs like everybody else's."""

import signal
import socket
from typing import Final

import uvicorn

from orchestrator import bootstrap, tracing
from orchestrator.api.app import Protected, create_app
from orchestrator.errors import ConfigurationError
from orchestrator.telemetry import Event, logger

_BACKLOG: Final = 512
_THREADS: Final = 40
"""Handlers that run at once, as anyio has it."""
_LONGEST_STATEMENT: Final = 10.0  # seconds
_GOODBYE: Final = 15  # seconds for requests that are being answered

_log = logger(__name__)


def serve(host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; requests that are being answered are finished.

    Raises:
        ConfigurationError: one cannot listen there.
    """
    # uvicorn ends in good order, and then has the signal delivered to whoever was there before it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    listener = _listen(host, port)
    bootstrap.observe(None)
    services = bootstrap.services()
    services.database.serve(_THREADS, within=_LONGEST_STATEMENT)
    config = uvicorn.Config(
        Protected(create_app(services)),
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=list(services.settings.api.trusted_proxies),
        timeout_graceful_shutdown=_GOODBYE,
        limit_concurrency=1_000,
        h11_max_incomplete_event_size=65_536,
    )
    address = listener.getsockname()
    _log.info(Event.API_STARTED, host=address[0], port=address[1])
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        services.sender.close()
        tracing.flush()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
