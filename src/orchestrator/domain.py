"""The words of the design as types: kinds, states, legal transitions, and the ids derived from ids.

Pure: no clock, no input or output, no settings.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from hashlib import sha1
from typing import Final, Literal
from uuid import UUID, uuid5

from orchestrator.errors import InvalidArgumentsError

EXTRACTION_TYPE: Final = "extraction.requested"
APP_ID: Final = "orchestrator"
MAX_BIGINT: Final = 2**63 - 1
MAX_THEME_LENGTH: Final = 255
GRACE: Final = timedelta(seconds=60)
"""A slot that is claimed later than this was missed."""

_LONGEST_TEXT: Final = 500

# Namespace of run ids made from Celery ids that are no UUIDs; fixed forever, for it is part of identity.
_CELERY_ID_NAMESPACE: Final = UUID("6f1d7ad4-3a0b-5c52-9d3c-6a7b0f0c8e11")
# The same of runs that a schedule starts.
_SLOT_NAMESPACE: Final = UUID("b3f0c7a2-58d1-5e0c-8a41-2f9d6b7e4c35")
_SLOT_HASH: Final = sha1(_SLOT_NAMESPACE.bytes, usedforsecurity=False)
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class RunKind(StrEnum):
    """What a run does."""

    SITE_ANALYSIS = "site_analysis"
    CRAWL = "crawl"


class RunState(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


class DispatchState(StrEnum):
    """Where one data source of a crawl run stands."""

    PENDING = "pending"
    PUBLISHED = "published"
    SKIPPED = "skipped"


class SkipReason(StrEnum):
    """Why a dispatch was skipped."""

    NO_ACTIVE_CONFIG = "no_active_config"
    RUN_CANCELED = "run_canceled"


class AttemptOutcome(StrEnum):
    """How one call to the Discovery Service ended."""

    SUCCEEDED = "succeeded"
    RETRYABLE = "retryable"
    REFUSED = "refused"
    LOST = "lost"


class Trigger(StrEnum):
    """Who started a run."""

    CELERY = "celery"
    CLI = "cli"
    API = "api"
    SCHEDULE = "schedule"
    BACKFILL = "backfill"


class ScheduleState(StrEnum):
    """Why a schedule fires, or why it does not: the first of these that is true."""

    INVALID = "invalid"
    """It cannot be read; its problem says why."""
    INACTIVE = "inactive"
    """The application's ``is_active`` is false."""
    PAUSED = "paused"
    """An operator paused it: its slots are skipped."""
    MANUAL = "manual"
    """It has no text: the crawl task runs by hand only."""
    ACTIVE = "active"


class MisfirePolicy(StrEnum):
    """Which of the slots that were missed, being claimed over 60 s late, fire after all."""

    FIRE_ONCE = "fire_once"
    """The latest."""
    SKIP = "skip"
    """None."""
    ALL = "all"
    """All within the catch-up window."""


class Role(StrEnum):
    """What an API key may do; each role may do what those before it may."""

    VIEWER = "viewer"
    """Read."""
    OPERATOR = "operator"
    """Trigger, retry, cancel, pause, resume, backfill."""
    ADMIN = "admin"
    """Read the audit log."""

    def covers(self, wanted: "Role") -> bool:
        """Tell whether this role may do what another one may."""
        ranks = list(Role)
        return ranks.index(self) >= ranks.index(wanted)


class OnConflict(StrEnum):
    """What becomes of a wish to run a crawl task of which a run is unfinished."""

    ALLOW = "allow"
    """Another run starts."""
    REJECT = "reject"
    """It is refused."""
    RETURN_EXISTING = "return_existing"
    """The unfinished run is the answer; none starts."""


class OverlapPolicy(StrEnum):
    """What becomes of a slot while a run of the task is unfinished."""

    SKIP = "skip"
    ALLOW = "allow"


class FiringOutcome(StrEnum):
    """What became of a slot."""

    STARTED = "started"
    """A run exists."""
    MISSED = "missed"
    """It could not be claimed in time."""
    SKIPPED = "skipped"
    """It could, and something was against it."""


class FiringReason(StrEnum):
    """Why a slot did not start, or did later than it should."""

    CAUGHT_UP = "caught_up"
    """Started: claimed over 60 s late, and its policy says that it fires all the same."""
    BACKFILL = "backfill"
    """Started: an operator asked for it afterwards."""
    SUPERSEDED = "superseded"
    """Missed: a later slot was missed too, and that one fires for all of them."""
    TOO_LATE = "too_late"
    """Missed: the policy is to fire no slot that was missed."""
    OUTSIDE_WINDOW = "outside_catch_up_window"
    """Missed: for longer than slots are caught up."""
    OVERLAP = "overlap"
    """Skipped: a run of the task was unfinished."""
    PAUSED = "paused"
    """Skipped: an operator had paused the schedule."""
    EDITED = "edited"
    """Skipped: before it was claimed, the schedule was changed to another one."""
    DISABLED = "disabled"
    """Skipped: before it was claimed, ``is_active`` was set to false."""
    INVALID = "invalid"
    """Skipped: before it was claimed, the schedule was changed to one that cannot be read."""
    DELETED = "deleted"
    """Skipped: before it was claimed, the crawl task was deleted."""


TERMINAL: Final = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELED})
UNFINISHED: Final = frozenset(RunState) - TERMINAL

# from → to, the whole of promise 4; the ledger compares-and-sets along these edges and no others.
TRANSITIONS: Final[dict[RunState, frozenset[RunState]]] = {
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.CANCELED}),
    RunState.RUNNING: frozenset(
        {RunState.RETRYING, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELED},
    ),
    RunState.RETRYING: frozenset({RunState.RUNNING, RunState.CANCELED}),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.SUCCEEDED: frozenset(),
    RunState.CANCELED: frozenset(),
}


def sources_of(target: RunState) -> frozenset[RunState]:
    """Return the states from which ``target`` may be reached."""
    return frozenset(state for state, targets in TRANSITIONS.items() if target in targets)


@dataclass(frozen=True, slots=True)
class CrawlArguments:
    """The arguments of ``execute_crawl_task``."""

    task_id: int

    def __post_init__(self) -> None:
        _require_id("task_id", self.task_id)

    @property
    def what(self) -> str:
        """What a run with them does, in words."""
        return f"crawl task {self.task_id}"


@dataclass(frozen=True, slots=True)
class AnalysisArguments:
    """The arguments of ``trigger_site_analysis``."""

    data_source_id: int
    theme_name: str

    def __post_init__(self) -> None:
        _require_id("data_source_id", self.data_source_id)
        theme: object = self.theme_name
        if not isinstance(theme, str):
            raise InvalidArgumentsError(f"theme_name must be text, got {type(theme).__name__}")
        if not theme.strip():
            raise InvalidArgumentsError("theme_name must not be blank")
        if len(theme) > MAX_THEME_LENGTH:
            raise InvalidArgumentsError(
                f"theme_name must have at most {MAX_THEME_LENGTH} characters, got {len(theme)}",
            )
        if "\x00" in theme or any("\ud800" <= character <= "\udfff" for character in theme):
            raise InvalidArgumentsError("theme_name must not contain NUL characters or lone surrogates")

    @property
    def what(self) -> str:
        """What a run with them does, in words."""
        return f"analysis of data source {self.data_source_id}, theme {self.theme_name}"


Arguments = CrawlArguments | AnalysisArguments


def _require_id(name: str, value: object) -> None:
    # bool is a subclass of int, and True would silently mean row 1.
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentsError(f"{name} must be an integer, got {type(value).__name__}")
    if not 1 <= value <= MAX_BIGINT:
        raise InvalidArgumentsError(f"{name} must be between 1 and {MAX_BIGINT}, got {_shorten(value)}")


def _shorten(value: int) -> str:
    # Python refuses to print integers beyond 4,300 digits; nobody wants to read them either.
    return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"  # noqa: PLR2004 -- 128 bits are readable


@dataclass(frozen=True, slots=True)
class ExtractionBatch:
    """Some data sources of one crawl run, each with the config to crawl it by.

    Attributes:
        run_id: the run.
        task_id: its crawl task.
        traceparent: W3C trace context that goes along with every message.
        sources: pairs of (data source id, crawl config id).
    """

    run_id: UUID
    task_id: int
    traceparent: str
    sources: Sequence[tuple[int, int]]

    def messages(self) -> Iterator[tuple[int, str, bytes]]:
        """Yield (data source id, message id, JSON body) of each source, in order."""
        name_space = sha1(self.run_id.bytes, usedforsecurity=False)
        head = b'{"crawl_config_id":'
        tail = b',"task_id":%d,"run_id":"%s"}' % (self.task_id, str(self.run_id).encode())
        for data_source_id, crawl_config_id in self.sources:
            body = b'%s%d,"data_source_id":%d%s' % (head, crawl_config_id, data_source_id, tail)
            # uuid5 by its definition (RFC 9562, section 5.5): a tenth of a whole run went into uuid.uuid5.
            digest = name_space.copy()
            digest.update(b"%d" % data_source_id)
            octets = bytearray(digest.digest()[:16])
            octets[6], octets[8] = octets[6] & 0x0F | 0x50, octets[8] & 0x3F | 0x80
            text = octets.hex()
            yield data_source_id, f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}", body


def message_id(run_id: UUID, data_source_id: int) -> UUID:
    """Return the id that every resend of one dispatch carries: uuid5 of (run id, data source id)."""
    return uuid5(run_id, str(data_source_id))


def run_id_of(celery_id: str) -> tuple[UUID, str | None]:
    """Return the run id of a Celery task id, and the original where it is no UUID.

    The Celery id is the run id; an id that is no UUID maps by uuid5, so that a redelivery maps alike.
    """
    try:
        return UUID(celery_id), None
    except ValueError:
        # PostgreSQL text holds neither NUL nor lone surrogates; the id stays recognisable without them.
        printable = celery_id.encode("utf-8", "replace").decode().replace("\x00", "")
        return uuid5(_CELERY_ID_NAMESPACE, printable), printable


def storable(text: str) -> str:
    """Return foreign words as the ledger keeps them: at most 500 characters, without NUL, which PostgreSQL refuses."""
    return text.replace("\x00", "")[:_LONGEST_TEXT]


def slot_run_id(task_id: int, slot: datetime) -> UUID:
    """Return the id of the run that a slot starts: uuid5 of the crawl task and the slot in UTC.

    No generation of the schedule is part of it, so that no edit and no restart can make a second run of a slot.
    """
    # uuid5 by its definition, for it is asked for thousands at a time.
    digest = _SLOT_HASH.copy()
    digest.update(f"{task_id}@{_stamp(slot)}".encode())
    return UUID(bytes=digest.digest()[:16], version=5)


@lru_cache(maxsize=10_000)  # thousands of tasks share a slot, and formatting takes longer than all the rest
def _stamp(slot: datetime) -> str:
    return f"{slot.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def traceparent_of(run_id: UUID, inherited: object = None) -> str:
    """Return the caller's W3C traceparent where it is valid, else one whose trace id is the run id's hex."""
    if isinstance(inherited, str) and _TRACEPARENT.fullmatch(inherited):
        return inherited
    return f"00-{run_id.hex}-{run_id.hex[16:]}-01"


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run about to be committed to the ledger.

    Attributes:
        run_id: its id, and the Celery task id of every message about it.
        arguments: what to do.
        trigger: who asks.
        traceparent: W3C trace context of the caller, or our own.
        celery_id: the caller's id where it is no UUID.
        retry_of: the finished run that it repeats.
        not_before: the caller's ETA; the wait happens in the ledger.
    """

    run_id: UUID
    arguments: Arguments
    trigger: Trigger
    traceparent: str
    celery_id: str | None = None
    retry_of: UUID | None = None
    not_before: datetime | None = None

    @property
    def kind(self) -> RunKind:
        """What it does."""
        return RunKind.CRAWL if isinstance(self.arguments, CrawlArguments) else RunKind.SITE_ANALYSIS

    @property
    def wake_up(self) -> "WakeUp":
        """The message to send about it first."""
        return WakeUp(self.run_id, self.arguments, self.traceparent)


@dataclass(frozen=True, slots=True)
class WakeUp:
    """A Celery message that says "look at this run". Losing one costs latency, never data.

    Attributes:
        run_id: the run.
        arguments: its arguments, so that the message is one that any caller might have sent.
        traceparent: its W3C trace context.
        number: which of the run's wake-ups this is; a delivery tells by it that others came in between.
        helps: whether it only asks for help with what the delivery of that number works on.
    """

    run_id: UUID
    arguments: Arguments
    traceparent: str
    number: int = 0
    helps: bool = False


@dataclass(frozen=True, slots=True)
class CrawlRun:
    """What the fan-out engine needs to know of a run it works on.

    Attributes:
        run_id: the run.
        task_id: its crawl task.
        traceparent: its W3C trace context.
        wake_number: of its last wake-up.
        left: data sources that were neither published nor skipped; none while it has no plan.
    """

    run_id: UUID
    task_id: int
    traceparent: str
    wake_number: int
    left: int | None


class NoAttempt(StrEnum):
    """Why no call to the Discovery Service may be made for a run now."""

    NOT_DUE = "not_due"
    """It is over, waits, or a call is under way."""
    NO_SLOT = "no_slot"
    """As many calls are under way as may be; the run is set aside."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call to the Discovery Service that has been recorded and may now be made."""

    run_id: UUID
    number: int
    retries_done: int
    data_source_id: int
    theme_name: str
    traceparent: str


@dataclass(frozen=True, slots=True)
class Node:
    """A worker or a beat, as its heartbeat tells the ledger.

    Attributes:
        name: unique node name.
        kind: ``worker`` or ``beat``.
        queues: the Celery queues that it consumes.
        concurrency: its pool size, if it has a pool.
        host: the name of its machine, or of its container.
    """

    name: str
    kind: Literal["worker", "beat"]
    queues: tuple[str, ...] = ()
    concurrency: int | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """How a node is, by its own judgement.

    Attributes:
        problem: what keeps it from its work: it is not ready.
        degraded: what keeps its work from having its full effect.
    """

    problem: str | None = None
    degraded: str | None = None


@dataclass(frozen=True, slots=True)
class QueueStanding:
    """How a queue stands, as whoever carries it says.

    Attributes:
        name: the queue.
        messages: that wait in it, or that a Kafka topic keeps; none: it is not there, or cannot be asked.
        consumers: that take them; none: not known, as where PostgreSQL or Kafka carries it.
        problem: why it is not there, or cannot be asked.
    """

    name: str
    messages: int | None = None
    consumers: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """What the application's row of a crawl task says of its schedule.

    Attributes:
        task_id: the crawl task.
        text: the schedule as people wrote it, at most one character more than is accepted; none: it has none.
        zone: the name of its time zone, or of the default one.
        active: the application's ``is_active``.
        misfire_policy: as written; none: the default.
        overlap_policy: as written; none: the default.
    """

    task_id: int
    text: str | None
    zone: str
    active: bool
    misfire_policy: str | None
    overlap_policy: str | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What we make of a :class:`ScheduleRow`.

    Attributes:
        row: what was read.
        canonical: what its text means; none: it has none, or cannot be read.
        problem: why it cannot be read.
        next_fire_at: its first slot after the moment of reading.
    """

    row: ScheduleRow
    canonical: str | None = None
    problem: str | None = None
    next_fire_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class DueSchedule:
    """A schedule whose next slot has come, locked until the transaction ends.

    Attributes:
        task_id: the crawl task.
        canonical: what its text means.
        zone: the name of its time zone.
        misfire_policy: as written; none: the default.
        overlap_policy: as written; none: the default.
        next_fire_at: the first slot that nobody has claimed.
        paused: an operator paused it.
        resumed_at: when a pause ended last; slots before that do not fire.
    """

    task_id: int
    canonical: str
    zone: str
    misfire_policy: str | None
    overlap_policy: str | None
    next_fire_at: datetime
    paused: bool = False
    resumed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Firing:
    """What is to become of a slot, or of a range of slots.

    Attributes:
        task_id: the crawl task.
        scheduled_for: the slot, or where the range begins.
        outcome: whether a run starts.
        reason: why not, or why so late.
        through: the last slot of a range; none: it is one slot.
    """

    task_id: int
    scheduled_for: datetime
    outcome: FiringOutcome
    reason: FiringReason | None = None
    through: datetime | None = None
