"""Processes on one ledger that stop, go on and die where a test says so, and an outside world without surprises.

The ledger, the engines and the Celery tasks are the real ones, on a real database. Each process is a thread, and only
one of them runs at a time: it stops before each of its transactions and on either side of whatever it does to the
outside world, and there the test decides who goes on, how far, and what becomes of the messages.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Final
from uuid import UUID

from sqlalchemy import Connection

from orchestrator.db import Database
from orchestrator.domain import AttemptOutcome, ExtractionBatch
from orchestrator.errors import (
    BrokerBlockedError,
    BrokerUnreachableError,
    ConfirmTimeoutError,
    DatabaseUnavailableError,
    MessageRefusedError,
    PublishError,
    QueueMissingError,
)

_STUCK: Final = 60.0
"""Seconds after which a process that neither stops nor ends waits for a lock that it may not wait for."""


class Crash(BaseException):
    """The process dies here, as by SIGKILL: what it had not committed is rolled back, and nothing else happens."""


class Luck(Enum):
    """What becomes of some messages, or of a call to the Discovery Service."""

    GOOD = "all arrive, all are confirmed"
    PARTLY = "some arrive and are confirmed, then the connection breaks"
    UNSURE = "all arrive, some are confirmed in time"
    NOTHING = "nobody listens"
    MISSING = "there is no such queue"
    REFUSED = "some are confirmed, the others refused"
    BLOCKED = "the broker takes nothing more"

    @property
    def error(self) -> PublishError | None:
        """What a publisher says about the messages that were not confirmed."""
        kind = _ERRORS.get(self)
        return None if kind is None else kind(self.value)

    def fate(self, count: int, mask: int) -> tuple[list[int], list[int]]:
        """Return which of so many messages arrive, and which of them are confirmed, as places; bits choose some."""
        everything = list(range(count))
        some = [place for place in everything if mask >> place & 1]
        match self:
            case Luck.GOOD:
                return everything, everything
            case Luck.PARTLY | Luck.REFUSED:
                return some, some
            case Luck.UNSURE:
                return everything, some
            case _:
                return [], []

    @property
    def outcome(self) -> AttemptOutcome:
        """How a call ends."""
        if self is Luck.GOOD:
            return AttemptOutcome.SUCCEEDED
        return AttemptOutcome.REFUSED if self is Luck.REFUSED else AttemptOutcome.RETRYABLE


_ERRORS: Final[dict[Luck, type[PublishError]]] = {
    Luck.PARTLY: BrokerUnreachableError,
    Luck.UNSURE: ConfirmTimeoutError,
    Luck.NOTHING: BrokerUnreachableError,
    Luck.MISSING: QueueMissingError,
    Luck.REFUSED: MessageRefusedError,
    Luck.BLOCKED: BrokerBlockedError,
}


class Mishap(Enum):
    """What happens to a process at one of its commits."""

    NONE = "nothing"
    DIES = "it dies before the commit"
    UNHEARD = "the commit happens, its reply is lost"


@dataclass(frozen=True)
class Stretch:
    """How far a process goes, and what it meets.

    Attributes:
        until: at which places it stands still; none: it goes to its end.
        past: how many such places it passes by before.
        luck: what becomes of what it sends and asks, one after the other; after that everything goes well.
        mask: which messages are the "some" of :class:`Luck`, bit by bit.
        mishap: what happens at a commit.
        commit: at which one, counted from 0.
    """

    until: tuple[str, ...] = ()
    past: int = 0
    luck: tuple[Luck, ...] = ()
    mask: int = 0
    mishap: Mishap = Mishap.NONE
    commit: int = 0


@dataclass
class HeldBatch:
    """Dispatches that a process has locked, and what became of their messages.

    Attributes:
        run_id: the run.
        sources: the data sources.
        session: the process id of the database session that has them locked.
        confirmed: the data sources whose messages were confirmed.
        arrived: those whose messages arrived.
        free: the session is gone, and so the locks.
    """

    run_id: UUID
    sources: list[int]
    session: int
    confirmed: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)
    free: bool = False


class Process:
    """A thread that goes on only while the test waits for it.

    Args:
        name: for messages.
        work: what it does; :class:`Crash` ends it at once.
        troupe: the processes among which only one goes on at a time.

    Attributes:
        place: where it stands.
        over: whether it has come to its end.
        crashed: whether it died before.
        flawless: nothing was lost, refused or unheard on its way so far.
        batch: what it has locked.
        settled: called with a batch once it is committed.
        dropped: called with a batch that was rolled back though nobody died.
    """

    def __init__(self, name: str, work: Callable[[], object], troupe: "Troupe") -> None:
        self.name = name
        self.place = "not begun"
        self.over = self.crashed = False
        self.flawless = True
        self.batch: HeldBatch | None = None
        self.settled: Callable[[HeldBatch], object] = lambda _: None
        self.dropped: Callable[[HeldBatch], object] = lambda _: None
        self._work = work
        self._troupe = troupe
        self._stretch = Stretch()
        self._passed = self._commits = self._calls = 0
        self._killed = self._in_one_go = self._unheard = False
        self._error: BaseException | None = None
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)

    # --- The test's side ---

    def go(self, stretch: Stretch) -> None:
        """Let it go on; return when it stands still or has come to its end.

        Raises:
            AssertionError: it did something that it may not, or got stuck.
        """
        assert not self.over, f"{self.name} has ended"
        self._stretch = stretch
        self._passed = self._commits = self._calls = 0
        self._troupe.on = self
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        came = self._stands.acquire(timeout=_STUCK)
        self._troupe.on = None
        assert came, f"{self.name} is stuck after {self.place!r}"
        if self._error is not None:
            raise self._error

    def kill(self) -> None:
        """End it where it stands."""
        self._killed = True
        self.go(Stretch())

    # --- Its own side ---

    def reach(self, place: str) -> None:
        """Stop here if it is time to."""
        self.place = place
        if self._in_one_go:
            return
        if not self._killed and place in self._stretch.until:
            self._passed += 1
            if self._passed > self._stretch.past:
                self._stands.release()
                self._go.acquire()
        if self._killed:
            raise Crash(place)

    @contextmanager
    def in_one_go(self) -> Iterator[None]:
        """Do not stop within the block, which is one transaction; if its reply is lost, then at its end."""
        self._in_one_go = True
        try:
            yield
        finally:
            self._in_one_go = False
        if self._unheard:
            self._lose_reply()

    def about_to_commit(self) -> None:
        """Die if it is to be at this commit."""
        if self._stretch.mishap is Mishap.DIES and self._commits == self._stretch.commit:
            raise Crash("about to commit")

    def committed(self) -> None:
        """Note what is safe now; the reply may be lost.

        Raises:
            DatabaseUnavailableError: it is.
        """
        held, self.batch = self.batch, None
        if held is not None:
            self.settled(held)
        self._unheard = self._stretch.mishap is Mishap.UNHEARD and self._commits == self._stretch.commit
        self._commits += 1
        if self._unheard and not self._in_one_go:
            self._lose_reply()

    def rolled_back(self, error: BaseException) -> None:
        """Note that nothing of a transaction is left."""
        held, self.batch = self.batch, None
        if held is not None and not isinstance(error, Crash):
            with self.checks():
                self.dropped(held)

    @property
    def luck(self) -> Luck:
        """What becomes of what it sends or asks next."""
        return self._stretch.luck[self._calls] if self._calls < len(self._stretch.luck) else Luck.GOOD

    def draw(self) -> tuple[Luck, int]:
        """Return what becomes of what it sends or asks now, and which messages are "some"."""
        drawn = self.luck
        self._calls += 1
        self.flawless = self.flawless and drawn is Luck.GOOD
        return drawn, self._stretch.mask

    @contextmanager
    def checks(self) -> Iterator[None]:
        """Tell the test of an assertion that fails in the block; no code in between may catch it."""
        try:
            yield
        except AssertionError as error:
            self._error = error
            raise Crash(str(error)) from error

    def _lose_reply(self) -> None:
        self._unheard = self.flawless = False
        raise DatabaseUnavailableError("the connection was lost at the commit")

    def _live(self) -> None:
        try:
            self.reach("begin")
            self._work()
        except Crash:
            self.crashed = True
        except BaseException as error:  # noqa: BLE001 -- whatever it is, the test has to see it
            self._error = error
        finally:
            self.batch = None
            self.over = True
            self._stands.release()


@dataclass
class Troupe:
    """Processes of which one goes on at a time.

    Attributes:
        on: that one.
    """

    on: Process | None = None

    @property
    def running(self) -> Process:
        """The process whose code this is called from."""
        assert self.on is not None, "nobody is at work"
        return self.on


class StagedDatabase(Database):
    """The real database, as processes of a troupe reach it.

    Args:
        conninfo: a libpq connection string.
        schema: the ledger's schema.
        troupe: the processes.
    """

    def __init__(self, conninfo: str, schema: str, troupe: Troupe) -> None:
        super().__init__(conninfo, schema)
        self._troupe = troupe

    @contextmanager
    def transaction(self, within: Connection | None = None) -> Iterator[Connection]:
        """See :class:`Database`; stops before it begins, and ends as the test says."""
        process = self._troupe.running
        process.reach("transaction")
        try:
            with super().transaction(within) as connection:
                yield connection
                process.about_to_commit()
        except BaseException as error:
            process.rolled_back(error)
            raise
        process.committed()

    @contextmanager
    def autocommit(self, within: Connection | None = None) -> Iterator[Connection]:
        """See :class:`Database`; stops before it begins, and ends as the test says, for it is one statement."""
        if within is not None:
            yield within
            return
        process = self._troupe.running
        process.reach("transaction")
        process.about_to_commit()
        with super().autocommit() as connection:
            yield connection
        process.committed()


@dataclass(frozen=True)
class Arrival:
    """A message on the extraction queue."""

    run_id: UUID
    source: int
    message_id: str
    body: bytes


def arrivals_of(batch: ExtractionBatch, places: Sequence[int]) -> list[Arrival]:
    """Return the messages at these places of a batch."""
    messages = list(batch.messages())
    return [Arrival(batch.run_id, *messages[place]) for place in places]


@contextmanager
def ends_unheard() -> Iterator[None]:
    """What a command or a pulse does when the database is away: it ends, and somebody else goes on."""
    with suppress(DatabaseUnavailableError):
        yield
