"""The stock Celery application, with a stopwatch on every call that leaves the process.

    celery -A tests.support.stopwatch worker
    celery -A tests.support.stopwatch beat

With ``TEST_STOPWATCH`` naming a file, each call that took longer than a second leaves a line of JSON there, and so
does, again and again, each that has not ended: ``{"process": …, "call": …, "seconds": …, "ended": …}``. Before all of
them each process, a pool's child too, leaves ``{"process": …}``: silence then says that it had no long call.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg
from amqp.abstract_channel import AbstractChannel
from celery import signals
from kombu.transport.pyamqp import Transport
from sqlalchemy import Connection

from orchestrator import bootstrap, worker
from orchestrator.celery_app import Sender, app
from orchestrator.db import Database
from orchestrator.discovery import Answer, DiscoveryClient
from orchestrator.domain import ExtractionBatch, WakeUp
from orchestrator.queues import Publisher, Receipt
from orchestrator.settings import Settings

__all__ = ["app"]  # what Celery's command line looks for

VARIABLE: Final = "TEST_STOPWATCH"
WORTH_A_LINE: Final = 1.0
"""Seconds."""
_EVERY: Final = 5.0  # seconds between lines about a call that has not ended


class _Stopwatch:
    """Times the calls of one process; a forked child has its own."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._running: dict[int, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._write()
        threading.Thread(target=self._watch, name="stopwatch", daemon=True).start()

    @contextmanager
    def time(self, call: str) -> Iterator[None]:
        """Time the block."""
        began_at = time.monotonic()
        with self._lock:
            key = max(self._running, default=0) + 1
            self._running[key] = (call, began_at)
        try:
            yield
        finally:
            with self._lock:
                del self._running[key]
            self._note(call, time.monotonic() - began_at, ended=True)

    def _watch(self) -> None:
        while True:
            time.sleep(_EVERY)
            with self._lock:
                running = list(self._running.values())
            for call, began_at in running:
                self._note(call, time.monotonic() - began_at, ended=False)

    def _note(self, call: str, seconds: float, *, ended: bool) -> None:
        if seconds > WORTH_A_LINE:
            self._write(call=call, seconds=round(seconds, 2), ended=ended)

    def _write(self, **facts: object) -> None:
        with Path(os.environ[VARIABLE]).open("a") as file:
            file.write(json.dumps({"process": self._process, **facts}) + "\n")


_stopwatches: Final[dict[int, _Stopwatch]] = {}


def _own() -> _Stopwatch:
    stopwatch = _stopwatches.get(os.getpid())
    if stopwatch is None:
        stopwatch = _stopwatches[os.getpid()] = _Stopwatch()
    return stopwatch


def _timed(call: str) -> AbstractContextManager[None]:
    return _own().time(call)


class _Database(Database):
    """Times opening a connection, and each exchange with the server: a statement, a commit, a rollback."""

    def _connect(self) -> psycopg.Connection:
        with _timed("database: connect"):
            connection = super()._connect()
        wait = connection.wait

        def timed_wait(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- psycopg's
            with _timed("database: statement"):
                return wait(*args, **kwargs)

        connection.wait = timed_wait  # type: ignore[method-assign] # that is the point
        return connection


class _Publisher:
    """Times another publisher; see :class:`Publisher`."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    def prepare(self) -> None:
        with _timed("extraction: prepare"):
            self._publisher.prepare()

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
        with _timed("extraction: publish"):
            return self._publisher.publish(batch, transaction)

    def check(self) -> str:
        with _timed("extraction: check"):
            return self._publisher.check()

    def close(self) -> None:
        with _timed("extraction: close"):
            self._publisher.close()


class _Sender(Sender):
    """Times sending, including the wait for another thread that sends."""

    def wake(self, wake_ups: Sequence[WakeUp]) -> None:
        with _timed("broker: wake"):
            super().wake(wake_ups)

    def probe(self, anew: bool = False) -> None:  # noqa: FBT001, FBT002 -- the base's signature
        with _timed("broker: probe"):
            super().probe(anew)

    def check(self) -> None:
        with _timed("broker: check"):
            super().check()

    def close(self) -> None:
        with _timed("broker: close"):
            super().close()


class _Discovery(DiscoveryClient):
    """Times each call."""

    def call(self, *, run_id: UUID, data_source_id: int, theme_name: str, traceparent: str) -> Answer:
        with _timed("discovery: call"):
            return super().call(
                run_id=run_id, data_source_id=data_source_id, theme_name=theme_name, traceparent=traceparent
            )


class _Timed(bootstrap.Links):
    def database(self, settings: Settings) -> Database:
        plain = super().database(settings)
        return _Database(plain.conninfo, plain.schema)

    def sender(self) -> Sender:
        return _Sender()

    def publisher(self, settings: Settings, database: Database) -> Publisher:
        return _Publisher(super().publisher(settings, database))

    def discovery(self, settings: Settings) -> DiscoveryClient:
        return _Discovery(settings.discovery_url, settings.discovery_timeout)


def _time_method(owner: Any, name: str, call: str) -> None:  # noqa: ANN401 -- a class or a module
    """Time what no seam of ours leads to: Celery's own calls in a worker's main process."""
    plain = getattr(owner, name)

    @wraps(plain)
    def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever it takes
        with _timed(call):
            return plain(*args, **kwargs)

    setattr(owner, name, timed)


def _begin(**_: object) -> None:
    _own()


if VARIABLE in os.environ:
    _begin()
    signals.worker_process_init.connect(_begin)
    bootstrap.use(_Timed())
    _time_method(worker, "declare_topology", "broker: declare")
    _time_method(Transport, "establish_connection", "broker: connect")
    _time_method(AbstractChannel, "wait", "broker: an answer")
