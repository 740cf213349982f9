"""The stock Celery application with a crash point before and after everything that reaches out of the process.

    celery -A tests.support.crashes worker
    python -m tests.support.crashes cancel RUN_ID  # any command of ours

Each transaction of the ledger has three points, named after the method that opens it (``CrawlLedger.begin: before``,
``: before commit``, ``: after commit``); a statement that is one by itself has two (``: before``, ``: after``), and so
has each call of publisher, sender and Discovery client. A new transaction has its points without a word here.
:class:`CrashPoints` is the test's end: it names a point, and whichever process comes by it next kills itself, -9. It
also makes trouble, once each time, for what is there for trouble only.
"""

import os
import signal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from orchestrator.errors import MessageRefusedError
from orchestrator.queues import Publisher, Receipt
from orchestrator.settings import Settings

__all__ = ["app"]  # what Celery's command line looks for

_VARIABLE: Final = "TEST_CRASH_POINTS"
_BATCH_REFUSED: Final = "batch-refused"
_WAKE_UP_REFUSED: Final = "wake-up-refused"
_BATCH_BROKEN: Final = "batch-broken"
_seen: Final[set[str]] = set()


class CrashPoints:
    """Which points there are, and which one kills next.

    Args:
        directory: for the files by which processes are told.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        (directory / "seen").touch()

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
        self._leave("armed", point)

    def refuse_batch(self) -> None:
        """Have the broker refuse the next batch of messages, as a full queue does."""
        self._leave(_BATCH_REFUSED)

    def refuse_wake_up(self, run_id: UUID) -> None:
        """Have the broker refuse the next wake-up of a run."""
        self._leave(_WAKE_UP_REFUSED, str(run_id))

    def break_batch(self) -> None:
        """Have the next batch of messages meet a fault of ours, which nothing foresees."""
        self._leave(_BATCH_BROKEN)

    def _leave(self, name: str, text: str = "") -> None:
        fresh = self._directory / "fresh"
        fresh.write_text(text)
        fresh.rename(self._directory / name)


def _reach(point: str) -> None:
    if point not in _seen:
        _seen.add(point)
        with (Path(os.environ[_VARIABLE]) / "seen").open("a") as seen:
            seen.write(f"{point}\n")
    if _take("armed", [point]):
        os.kill(os.getpid(), signal.SIGKILL)


def _take(name: str, texts: Collection[str] = ("",)) -> bool:
    """Take what the test has left under a name, if it is one of these texts; one process wins."""
    file = Path(os.environ[_VARIABLE]) / name
    try:
        if file.read_text() not in texts:
            return False
        file.unlink()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _around(call: str) -> Iterator[None]:
    _reach(f"{call}: before")
    yield
    _reach(f"{call}: after")


class _Database(Database):
    def transaction(self, within: Connection | None = None) -> _GeneratorContextManager[Connection]:
        if within is not None:
            return super().transaction(within)
        return self._crashing(sys._getframe(1).f_code.co_qualname)  # noqa: SLF001 -- the only way to name the caller

    def autocommit(self, within: Connection | None = None) -> _GeneratorContextManager[Connection]:
        if within is not None:
            return super().autocommit(within)
        return self._single(sys._getframe(1).f_code.co_qualname)  # noqa: SLF001 -- the same

    @contextmanager
    def _single(self, caller: str) -> Iterator[Connection]:
        with _around(caller), super().autocommit() as connection:
            yield connection

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
            if _take(_WAKE_UP_REFUSED, [str(wake_up.run_id) for wake_up in wake_ups]):
                raise MessageRefusedError("the broker refused a wake-up; is a task queue full?")
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
            if _take(_BATCH_REFUSED):
                return Receipt((), MessageRefusedError("the broker refused a message; is the extraction queue full?"))
            if _take(_BATCH_BROKEN):
                raise AssertionError("a fault of ours")
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

if __name__ == "__main__":
    from orchestrator.__main__ import main

    main()
