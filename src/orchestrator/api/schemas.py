"""What goes over the wire: the documents of the HTTP API. Times are RFC 3339 in UTC; unknown members are refused."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Generic, Literal, TypeVar
from uuid import UUID

from fastapi import Path
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from orchestrator.domain import (
    MAX_BIGINT,
    MAX_THEME_LENGTH,
    AttemptOutcome,
    DispatchState,
    FiringOutcome,
    FiringReason,
    OnConflict,
    RunKind,
    RunState,
    ScheduleState,
    SkipReason,
    Trigger,
)
from orchestrator.explain import Verdict, WaitCode

MOST_SOURCES: Final = 1_000
"""Data sources that one request has analysed at most."""
LARGEST_PAGE: Final = 200
FIRST_YEAR: Final = 1970
LAST_YEAR: Final = 2199

_LONGEST_REASON: Final = 500
_LONGEST_SCHEDULE: Final = 200


def _storable(text: str) -> str:
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not contain NUL characters or lone surrogates")
    return text


Id = Annotated[int, Field(ge=1, le=MAX_BIGINT, strict=True)]
PathId = Annotated[int, Path(ge=1, le=MAX_BIGINT)]
Text = Annotated[str, AfterValidator(_storable)]
Reason = Annotated[
    Annotated[Text, StringConstraints(max_length=_LONGEST_REASON)] | None, Field(description="why, for the audit log")
]
Theme = Annotated[
    Text, StringConstraints(min_length=1, max_length=MAX_THEME_LENGTH, pattern=r"\S"), Field(examples=["news"])
]
_Short = Annotated[Text, StringConstraints(max_length=100)]
ScheduleText = Annotated[Text, Field(min_length=1, max_length=_LONGEST_SCHEDULE, examples=["每天 03:00"])]


def _utc(moment: datetime) -> datetime:
    # With room on both sides for what is reckoned from it, in any zone.
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise ValueError(f"must be between the years {FIRST_YEAR} and {LAST_YEAR}")
    return moment.astimezone(UTC)


Moment = Annotated[AwareDatetime, AfterValidator(_utc)]


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Out(BaseModel):
    model_config = ConfigDict(from_attributes=True)


# --- Requests ----------------------------------------------------------------------------------------------------


class NewCrawlRun(_In):
    """A wish to run a crawl task now."""

    task_id: Id
    on_conflict: OnConflict = Field(OnConflict.ALLOW, description="when a run of the task is not over")
    reason: Reason = None


class NewAnalyses(_In):
    """A wish to have data sources analysed for a theme."""

    data_source_ids: Annotated[list[Id], Field(min_length=1, max_length=MOST_SOURCES, description="each counts once")]
    theme_name: Theme
    reason: Reason = None


class Change(_In):
    """Why something is changed."""

    reason: Reason = None


class TriggerWish(_In):
    """How a crawl task is to be run now."""

    on_conflict: OnConflict = Field(OnConflict.ALLOW, description="when a run of the task is not over")
    reason: Reason = None


class Backfill(_In):
    """Past slots to be made up for, both ends included."""

    since: Annotated[Moment, Field(description="the first slot")]
    until: Annotated[Moment, Field(description="the last slot; not in the future")]
    dry_run: bool = Field(default=False, description="only say which slots would start a run")
    reason: Reason = None


class PreviewRequest(_In):
    """A schedule to be tried out."""

    text: ScheduleText
    zone: Annotated[_Short | None, Field(description="IANA time zone; unset: the default one")] = None
    after: Moment | None = Field(None, description="show fires after this moment; unset: now")
    count: int = Field(5, ge=1, le=100)


# --- Queries -----------------------------------------------------------------------------------------------------


class PageQuery(_In):
    """Which part of a list is wanted. Unknown parameters are refused: a filter without effect is worse than none."""

    limit: int = Field(50, ge=1, le=LARGEST_PAGE, description="items of a page, at most")
    cursor: str | None = Field(None, max_length=400, description="`next_cursor` of the page before, same filters")

    @property
    def filters(self) -> dict[str, Any]:
        """What decides which items are in the list."""
        return self.model_dump(exclude={"limit", "cursor"})


_QueryId = Annotated[int | None, Field(ge=1, le=MAX_BIGINT)]
_Since = Annotated[Moment | None, Field(description="created then or later; unset: some days ago")]
_Until = Annotated[Moment | None, Field(description="created before")]


class RunQuery(PageQuery):
    """Which runs are wanted."""

    kind: RunKind | None = None
    state: RunState | None = None
    trigger: Trigger | None = None
    task_id: _QueryId = None
    data_source_id: Annotated[
        int | None, Field(ge=1, le=MAX_BIGINT, description="analyses of it, and crawl runs that have it in their plan")
    ] = None
    theme_name: Annotated[Text, StringConstraints(max_length=MAX_THEME_LENGTH)] | None = None
    error_code: _Short | None = None
    since: _Since = None
    until: _Until = None


class DispatchQuery(PageQuery):
    """Which dispatches are wanted."""

    state: DispatchState | None = None


class ScheduleQuery(PageQuery):
    """Which schedules are wanted."""

    state: ScheduleState | None = None


class FiringQuery(PageQuery):
    """Which slots are wanted."""

    task_id: _QueryId = None
    outcome: FiringOutcome | None = None
    since: Annotated[Moment | None, Field(description="the first slot; unset: some days ago")] = None
    until: Annotated[Moment | None, Field(description="the last slot")] = None


class AuditQuery(PageQuery):
    """Which events of the audit log are wanted."""

    actor: Annotated[Text, StringConstraints(max_length=200)] | None = None
    action: _Short | None = None
    run_id: UUID | None = None
    task_id: _QueryId = None
    since: Moment | None = None
    until: Moment | None = None


# --- Answers -----------------------------------------------------------------------------------------------------


class Accepted(_Out):
    """A run that was asked for. It is in the ledger: it will be worked on, whatever fails meanwhile."""

    id: UUID
    kind: RunKind
    created: bool = Field(description="false: there was such a run already")
    href: str = Field(description="where to see how it goes")


class AcceptedRun(_Out):
    """The answer to a wish for one run."""

    run: Accepted


class AcceptedRuns(_Out):
    """The answer to a wish for several runs."""

    runs: list[Accepted]


class Canceled(_Out):
    """A run that was canceled."""

    id: UUID
    state: RunState
    href: str


class Run(_Out):
    """One execution of a job."""

    id: UUID
    kind: RunKind
    state: RunState
    trigger: Trigger
    task_id: int | None = Field(description="crawl: the crawl task")
    data_source_id: int | None = Field(description="site_analysis: the data source")
    theme_name: str | None = Field(description="site_analysis: the theme")
    total: int = Field(description="crawl: data sources in the plan, once it is made")
    published: int
    skipped: int
    pending: int
    attempts: int = Field(description="site_analysis: calls to the Discovery Service")
    error_code: str | None
    error_message: str | None
    created_at: datetime
    enqueued_at: datetime | None
    started_at: datetime | None
    next_attempt_at: datetime | None = Field(description="the end of its wait, if it waits")
    finished_at: datetime | None
    retry_of: UUID | None
    scheduled_for: datetime | None = Field(description="the slot that started it")
    traceparent: str


class Wait(_Out):
    """What has to happen next."""

    code: WaitCode
    sentence: str


class Attempt(_Out):
    """One call to the Discovery Service."""

    number: int
    node: str
    started_at: datetime
    finished_at: datetime | None
    outcome: AttemptOutcome | None
    status: int | None = Field(description="HTTP's")
    code: str | None
    message: str | None
    seconds: float | None
    retry_after: float | None = Field(description="what the Discovery Service asked for, in seconds")
    next_attempt_at: datetime | None


class Event(_Out):
    """Something that happened to a run."""

    id: int
    at: datetime
    event: str
    state: RunState
    code: str | None
    message: str | None


class Dispatch(_Out):
    """One data source of a crawl run."""

    data_source_id: int
    crawl_config_id: int | None
    state: DispatchState
    reason: str | None
    published_at: datetime | None
    message_id: UUID = Field(description="of the extraction message, and of every copy of it")


class RunDetail(_Out):
    """All about a run but its data sources, which may be a million."""

    run: Run
    waits_for: Wait
    skip_reasons: dict[str, int]
    attempts: list[Attempt] = Field(description="the first ones")
    timeline: list[Event] = Field(description="the first ones")


class Firing(_Out):
    """What became of a slot, or of all slots from one to another."""

    task_id: int
    scheduled_for: datetime
    through: datetime | None
    outcome: FiringOutcome
    reason: FiringReason | None
    run_id: UUID | None
    claimed_at: datetime
    claimed_by: str


class Schedule(_Out):
    """The schedule of a crawl task, as it was last read."""

    task_id: int
    state: ScheduleState
    text: str | None
    canonical: str | None
    zone: str
    misfire_policy: str | None = Field(description="as written; null: the default")
    overlap_policy: str | None = Field(description="as written; null: the default")
    problem: str | None
    next_fire_at: datetime | None
    paused_at: datetime | None
    paused_by: str | None
    pause_reason: str | None
    first_seen_at: datetime
    read_at: datetime
    last_firing: Firing | None


class Paused(_Out):
    """Whether a schedule is paused now."""

    task_id: int
    paused: bool
    href: str


class FireTimes(_Out):
    """When a schedule fires, as things stand."""

    task_id: int
    canonical: str
    zone: str
    fires: list[datetime]
    truncated: bool = Field(description="there are more in that time")


class Preview(_Out):
    """What a schedule's text means."""

    text: str
    canonical: str
    zone: str
    fires: list[datetime]


class BackfillSlot(_Out):
    """A slot, and what became of it so far."""

    slot: datetime
    firing: Firing | None


class BackfillResult(_Out):
    """What a backfill started, or would start."""

    task_id: int
    dry_run: bool
    to_start: int
    slots: list[BackfillSlot] = Field(description="dry_run: the slots")
    runs: list[Accepted]


class Queue(_Out):
    """A queue, as whoever carries it says."""

    name: str
    messages: int | None = Field(
        description="that wait, or that a Kafka topic keeps; null: it is not there, or cannot be asked"
    )
    consumers: int | None = Field(description="null: not known, as where PostgreSQL or Kafka carries the queue")
    problem: str | None = Field(description="why it is not there, or cannot be asked")


class Queues(_Out):
    """All queues."""

    items: list[Queue]


class Node(_Out):
    """A worker or a beat, by its last sign of life."""

    name: str
    kind: Literal["worker", "beat"]
    status: Literal["ready", "degraded", "not ready", "silent"]
    because: str | None
    version: str
    queues: list[str]
    concurrency: int | None
    host: str | None
    started_at: datetime
    seen_at: datetime


class Nodes(_Out):
    """All workers and beats."""

    items: list[Node]


class Why(_Out):
    """Why a crawl task did, or did not, run at a moment."""

    task_id: int
    at: datetime
    verdict: Verdict
    sentences: list[str]
    run_id: UUID | None
    firing: Firing | None
    before: datetime | None = Field(description="the last slot before it, by the schedule of then")
    after: datetime | None = Field(description="the first slot after it")


class PlannedDispatch(_Out):
    """A data source that would be dispatched."""

    data_source_id: int
    crawl_config_id: int


class PlannedSkip(_Out):
    """A data source that would be skipped."""

    data_source_id: int
    reason: SkipReason


class Plan(_Out):
    """What a run of a crawl task would do now."""

    task_id: int
    total: int
    dispatched: int
    skipped: int
    dispatches: list[PlannedDispatch] = Field(description="the first ones")
    skips: list[PlannedSkip] = Field(description="the first ones")


class AuditEvent(_Out):
    """Something that somebody did."""

    id: int
    at: datetime
    actor: str
    action: str
    run_id: UUID | None
    task_id: int | None
    reason: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class Health(_Out):
    """How this process is."""

    status: Literal["ok", "degraded", "unavailable"]
    because: str | None = None
    version: str


# --- Lists -------------------------------------------------------------------------------------------------------

Item = TypeVar("Item")


class Page(_Out, Generic[Item]):
    """Part of a list."""

    items: list[Item]
    next_cursor: str | None = Field(description="where the list goes on, whatever is on this page; null: it ends here")


class Total(_Out):
    """How long a list is, counted up to a limit."""

    value: int
    relation: Literal["eq", "gte"] = Field(description="gte: at least so many")


class RunPage(Page[Run]):
    """Part of the list of runs."""

    total: Total
    since: datetime = Field(description="runs before are not listed: by default some days are shown")
