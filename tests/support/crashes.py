"""The stock Celery application with a crash point before and after everything that reaches out of the process.

    celery -A tests.support.crashes worker

Each transaction of the ledger has three points, named after the method that opens it (``CrawlLedger.begin: before``,
``: before commit``, ``: after commit``), each call of publisher, sender and Discovery client two. A new transaction has
its points without a word here. :class:`CrashPoints` is the test's end: it names a point, and whichever process comes by
it next kills itself, -9.
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import _GeneratorContextManager, contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection

from orchestrator import bootstrap
from orchestrator.celery_app import Sender, app, conninfo
from orchestrator.db import Database
from orchestrator.discovery import Answer, DiscoveryClient
from orchestrator.domain import ExtractionBatch, WakeUp
from orchestrator.queues import Publisher, Receipt
from orchestrator.settings import Settings

__all__ = ["app"]  # what Celery's command line looks for

_VARIABLE: Final = "TEST_CRASH_POINTS"
_seen: Final[set[str]] = set()


class CrashPoints:
    """Which points there are, and which one kills next.

    Args:
        directory: for the files by which processes are told.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()

    @property
    def env(self) -> Mapping[str, str]:
        """What the processes need in their environment."""
        return {_VARIABLE: os.fspath(self._directory)}

    @property
    def known(self) -> list[str]:
        """The points that processes have come by, in order of their names."""
        return sorted(set((self._directory / "seen").read_text().splitlines()))

    @property
    def armed(self) -> bool:
        """Whether the point that was named last has not killed yet."""
        return (self._directory / "armed").exists()

    def arm(self, point: str) -> None:
        """Have the next process that comes by a point kill itself."""
        fresh = self._directory / "fresh"
        fresh.write_text(point)
        fresh.rename(self._directory / "armed")

    def disarm(self) -> None:
        """Kill nobody."""
        (self._directory / "armed").unlink(missing_ok=True)


def _reach(point: str) -> None:
    directory = Path(os.environ[_VARIABLE])
    if point not in _seen:
        _seen.add(point)
        with (directory / "seen").open("a") as seen:
            seen.write(f"{point}\n")
    armed = directory / "armed"
    try:
        if armed.read_text() != point:
            return
        armed.unlink()  # one process wins
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _around(call: str) -> Iterator[None]:
    _reach(f"{call}: before")
    yield
    _reach(f"{call}: after")


class _Database(Database):
    def transaction(self) -> _GeneratorContextManager[Connection]:
        return self._crashing(sys._getframe(1).f_code.co_qualname)  # noqa: SLF001 -- the only way to name the caller

    @contextmanager
    def _crashing(self, caller: str) -> Iterator[Connection]:
        _reach(f"{caller}: before")
        with super().transaction() as connection:
            yield connection
            _reach(f"{caller}: before commit")
        _reach(f"{caller}: after commit")


class _Sender(Sender):
    def wake(self, wake_ups: Sequence[WakeUp]) -> None:
        with _around("Sender.wake"):
            super().wake(wake_ups)


class _Publisher:
    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.check = publisher.check
        self.close = publisher.close

    def prepare(self) -> None:
        with _around("Publisher.prepare"):
            self._publisher.prepare()

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
        with _around("Publisher.publish"):
            return self._publisher.publish(batch, transaction)


class _DiscoveryClient(DiscoveryClient):
    def call(self, *, run_id: UUID, **facts: Any) -> Answer:  # noqa: ANN401 -- the same as ever
        with _around("DiscoveryClient.call"):
            return super().call(run_id=run_id, **facts)


class _Links(bootstrap.Links):
    def database(self, settings: Settings) -> Database:
        return _Database(conninfo(settings), settings.schema_name)

    def sender(self) -> Sender:
        return _Sender()

    def publisher(self, settings: Settings, database: Database) -> Publisher:
        return _Publisher(super().publisher(settings, database))

    def discovery(self, settings: Settings) -> DiscoveryClient:
        return _DiscoveryClient(settings.discovery_url, settings.discovery_timeout)


if _VARIABLE in os.environ:
    bootstrap.use(_Links())
