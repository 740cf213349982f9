"""Why a crawl task did, or did not, run at some moment, and what a run waits for: answered from the ledger, for people.

What the application's tables say today is not asked: what counts is what was read of them then. A reading decides on
the slots after the moment it was made, up to the moment that the next one was.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple
from uuid import UUID

from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE
from orchestrator.domain import FiringReason, RunKind, RunState
from orchestrator.errors import PublishError, RunNotFoundError, UnreadableScheduleError
from orchestrator.insights import FiringView, Insights, NodeView, ReadingView, RunView
from orchestrator.schedule import read_zone
from orchestrator.timetable import Timetable

_INSTANT: Final = timedelta(microseconds=1)


class Verdict(StrEnum):
    """The answer in a word. Where the slot has a record it is that one's reason, or ``started``."""

    STARTED = "started"
    CAUGHT_UP = "caught_up"
    BACKFILL = "backfill"
    SUPERSEDED = "superseded"
    TOO_LATE = "too_late"
    OUTSIDE_WINDOW = "outside_catch_up_window"
    OVERLAP = "overlap"
    PAUSED = "paused"
    EDITED = "edited"
    DISABLED = "disabled"
    INVALID = "invalid"
    """The schedule could not be read, then or when the slot was to be claimed."""
    DELETED = "deleted"
    """There was no such crawl task any more, then or when the slot was to be claimed."""
    UNKNOWN_TASK = "unknown_task"
    """No such crawl task was ever noticed."""
    NOT_YET_NOTICED = "not_yet_noticed"
    """The crawl task, or the edit by which the moment is a slot, was noticed only afterwards."""
    INACTIVE = "inactive"
    NO_SCHEDULE = "no_schedule"
    """The crawl task had no schedule's text."""
    NO_SLOT = "no_slot"
    """The schedule, as it was then, does not fire at that moment."""
    NOT_DUE_YET = "not_due_yet"
    NOT_CLAIMED_YET = "not_claimed_yet"
    NOT_RECORDED = "not_recorded"
    """It was a slot, or may have been one, and the ledger has no record of it (any more)."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a crawl task did, or did not, run at a moment.

    Attributes:
        task_id: the crawl task.
        at: the moment.
        verdict: the answer in a word.
        sentences: the answer in plain English.
        run_id: the run that the slot started.
        firing: the slot's record.
        before: the last slot before it, by the reading of then.
        after: the first slot after it, by the reading of then.
    """

    task_id: int
    at: datetime
    verdict: Verdict
    sentences: tuple[str, ...]
    run_id: UUID | None = None
    firing: FiringView | None = None
    before: datetime | None = None
    after: datetime | None = None


def why(insights: Insights, timetable: Timetable, task_id: int, at: datetime, *, max_queued: int) -> Explanation:
    """Explain what became of a moment.

    Args:
        insights: reads the ledger.
        timetable: knows what schedules mean.
        task_id: the crawl task.
        at: the moment.
        max_queued: runs that wait for a worker, above which no slot is claimed.
    """
    return _Inquiry(insights, timetable, task_id, at.astimezone(UTC), max_queued).explain()


class _Nearby(NamedTuple):
    """The slots of a reading around a moment, and whether that is one."""

    before: datetime | None = None
    is_slot: bool = False
    after: datetime | None = None


class _Inquiry:
    """What the ledger knows of one moment of one schedule, and the words for it."""

    def __init__(self, insights: Insights, timetable: Timetable, task_id: int, at: datetime, max_queued: int) -> None:
        self._insights = insights
        self._timetable = timetable
        self._task_id = task_id
        self._at = at
        self._max_queued = max_queued
        self._now = insights.now()
        # The record after the schedule: a claim moves both at once, so that a due slot cannot be missing from both.
        self._schedule = next(iter(insights.page_schedules(limit=1, task_id=task_id)), None)
        self._last, self._next = insights.readings_around(task_id, at)
        self._firing = insights.became_of(task_id, [at]).get(at)
        over = self._last is None or (self._last.until is not None and self._last.until < at)
        self._reading = None if over else self._last
        self._near = self._slots_of(self._reading) if self._reading else _Nearby()

    def explain(self) -> Explanation:
        """Put the answer together."""
        firing = self._firing
        if firing is not None and firing.through is not None and self._is_between_slots():
            firing = None
        verdict, sentences = self._unrecorded() if firing is None else self._recorded(firing)
        return Explanation(
            self._task_id,
            self._at,
            verdict,
            tuple(sentences),
            firing.run_id if firing else None,
            firing,
            self._near.before,
            self._near.after,
        )

    def _is_between_slots(self) -> bool:
        """Whether the moment is surely no slot: a range stands for slots only."""
        return self._reading is not None and self._reading.canonical is not None and not self._near.is_slot

    # --- Slots with a record ---------------------------------------------------------------------------------

    def _recorded(self, firing: FiringView) -> tuple[Verdict, Iterator[str]]:
        verdict = Verdict(firing.reason or firing.outcome)
        if firing.run_id is not None:
            return verdict, self._ran(firing, firing.run_id)
        if firing.reason in _WHY_MISSED:
            return verdict, self._missed(firing, _WHY_MISSED[firing.reason])
        return verdict, self._skipped(firing)

    def _ran(self, firing: FiringView, run_id: UUID) -> Iterator[str]:
        late = _span(firing.claimed_at - self._at)
        match firing.reason:
            case FiringReason.BACKFILL:
                yield (
                    f"It ran afterwards: {firing.claimed_by} asked for a backfill of {self._moment()} "
                    f"at {self._moment(firing.claimed_at)}."
                )
            case FiringReason.CAUGHT_UP:
                yield (
                    f"It ran late: {self._moment()} was missed, and caught up {late} after it, "
                    f"claimed by {firing.claimed_by}."
                )
            case _:
                yield f"It ran: {self._moment()} was claimed {late} after it, by {firing.claimed_by}."
        try:
            yield self._how_it_went(self._insights.run(run_id))
        except RunNotFoundError:
            yield f"Its run {run_id} is in the ledger no more."

    def _how_it_went(self, run: RunView) -> str:
        match run.state:
            case RunState.QUEUED:
                how = "waits for a worker"
            case RunState.RUNNING:
                how = "is under way"
            case RunState.RETRYING:
                how = "is to be tried again"
            case _:
                how = (
                    f"{'was ' if run.state is RunState.CANCELED else ''}{run.state} at {self._moment(run.finished_at)}"
                )
        counts = f"{run.published} published, {run.skipped} skipped of {run.total} data sources"
        error = f"; {run.error_message} ({run.error_code})" if run.error_code else ""
        return f"Run {run.id} {how}: {counts}{error}."

    def _missed(self, firing: FiringView, because: str) -> Iterator[str]:
        late = _span(firing.claimed_at - self._at)
        yield f"It did not run: {self._moment()} was missed, for nobody claimed it until {late} after it."
        yield because
        yield from self._range(firing)

    def _skipped(self, firing: FiringView) -> Iterator[str]:
        yield f"It did not run: {self._moment()} was skipped, for {self._obstacle(firing)}."
        yield from self._range(firing)

    def _obstacle(self, firing: FiringView) -> str:
        noticed = f"before it was claimed; that was noticed at {self._moment(firing.claimed_at)}"
        match firing.reason:
            case FiringReason.OVERLAP:
                run = self._insights.unfinished_at(self._task_id, firing.claimed_at)
                which = f": run {run.id}, now {run.state}" if run else ", or an earlier slot started just then"
                what = f"a run of the crawl task was unfinished (overlap policy skip){which}"
            case FiringReason.PAUSED:
                pause = self._insights.last_pause(self._task_id, firing.claimed_at)
                paused = f"{pause.actor} paused it at {self._moment(pause.at)}" if pause else "it was paused"
                what = f"{paused}, before the slot was claimed"
                what += f" ({pause.reason})" if pause and pause.reason else ""
            case FiringReason.DISABLED:
                what = f"is_active was set to false {noticed}"
            case FiringReason.DELETED:
                what = f"the crawl task was deleted {noticed}"
            case FiringReason.INVALID:
                problem = next((each.problem for each in (self._next, self._schedule) if each and each.problem), "")
                what = f"the schedule became unreadable {noticed}: {problem}"
            case _:
                edit = f" to {_spec(self._next)}" if self._next else ""
                what = f"the schedule was changed{edit} {noticed}"
        return what

    def _range(self, firing: FiringView) -> Iterator[str]:
        if firing.through is not None:
            first, last = self._moment(firing.scheduled_for), self._moment(firing.through)
            yield f"One record stands for all slots from {first} to {last}."

    # --- Moments without a record ------------------------------------------------------------------------------

    def _unrecorded(self) -> tuple[Verdict, Iterator[str]]:
        reading = self._reading
        if reading is None:
            return self._unread()
        idle = _why_idle(reading)
        if idle is not None:
            return idle[0], self._idle(reading, idle[1])
        if not self._near.is_slot:
            return self._not_a_slot(reading)
        if self._at > self._now:
            return Verdict.NOT_DUE_YET, self._ahead(reading)
        due = self._schedule and self._schedule.next_fire_at
        if reading.until is None and due and due <= self._at:
            return Verdict.NOT_CLAIMED_YET, self._due()
        return Verdict.NOT_RECORDED, self._lost(reading)

    def _unread(self) -> tuple[Verdict, Iterator[str]]:
        if self._last is not None:
            return Verdict.DELETED, self._deleted(self._last)
        if self._next is None:
            return Verdict.UNKNOWN_TASK, self._unknown()
        if self._schedule is not None and self._schedule.first_seen_at <= self._at:
            return Verdict.NOT_RECORDED, self._forgotten()
        first = (
            f"It did not run: crawl task {self._task_id} was first noticed at {self._moment(self._next.since)}, "
            f"and nothing fires for moments before that."
        )
        return Verdict.NOT_YET_NOTICED, iter([first])

    def _unknown(self) -> Iterator[str]:
        yield f"No crawl task {self._task_id} was ever noticed: there is no such row, or no beat has looked since."
        if not any(node.alive for node in self._insights.nodes() if node.kind == "beat"):
            yield from self._held_up()

    def _forgotten(self) -> Iterator[str]:
        yield (
            f"Nothing tells whether {self._moment()} was a slot, nor what became of it: the ledger does not reach back "
            f"so far any more."
        )

    def _deleted(self, last: ReadingView) -> Iterator[str]:
        yield f"It did not run: crawl task {self._task_id} had been deleted, noticed at {self._moment(last.until)}."
        if self._next is not None:
            yield f"One of that id was noticed again at {self._moment(self._next.since)}."

    def _idle(self, reading: ReadingView, state: str) -> Iterator[str]:
        verb, was = ("will", "is") if self._at > self._now else ("did", "was")
        yield f"It {verb} not run: as read at {self._moment(reading.since)}, the crawl task {was} {state}."
        yield from self._edit(reading)

    def _not_a_slot(self, reading: ReadingView) -> tuple[Verdict, Iterator[str]]:
        later = self._next
        if later is not None and self._slots_of(later).is_slot:
            return Verdict.NOT_YET_NOTICED, self._too_late_an_edit(reading, later)
        return Verdict.NO_SLOT, self._no_slot(reading)

    def _too_late_an_edit(self, reading: ReadingView, later: ReadingView) -> Iterator[str]:
        yield (
            f"It did not run: by {_spec(later)} {self._moment()} is a slot, but that was noticed only at "
            f"{self._moment(later.since)}, and an edit never fires for slots before it."
        )
        yield f"Until then the schedule was {_spec(reading)}."
        yield from self._neighbours()

    def _no_slot(self, reading: ReadingView) -> Iterator[str]:
        yield (
            f"{self._moment()} is no slot of {_spec(reading)}, which the schedule "
            f"{'is' if reading.until is None else 'was'}, as read at {self._moment(reading.since)}."
        )
        yield from self._neighbours()
        yield from self._edit(reading)

    def _neighbours(self) -> Iterator[str]:
        before, _, after = self._near
        if before is not None:
            record = self._insights.became_of(self._task_id, [before]).get(before)
            yield f"The slot before it: {self._moment(before)}, {_in_short(record)}."
        if after is not None:
            yield f"The slot after it: {self._moment(after)}."

    def _edit(self, reading: ReadingView) -> Iterator[str]:
        """Say how a reading ended."""
        if reading.until is not None and self._next is None:
            yield f"At {self._moment(reading.until)} it was noticed that the crawl task had been deleted."
        elif reading.until is not None and self._next is not None:
            noticed = f"At {self._moment(self._next.since)} an edit was noticed"
            yield f"{noticed}, which fires for later slots only: {_spec(self._next)}."

    def _ahead(self, reading: ReadingView) -> Iterator[str]:
        yield f"It is still to come: {self._moment()} is a slot of {_spec(reading)}, in {_span(self._at - self._now)}."
        yield from self._paused()

    def _due(self) -> Iterator[str]:
        yield f"It is due: {self._moment()} came {_span(self._now - self._at)} ago, and nobody has claimed it yet."
        yield from self._held_up()
        yield from self._paused()

    def _paused(self) -> Iterator[str]:
        schedule = self._schedule
        if schedule is not None and schedule.paused_at is not None:
            since = f"{schedule.paused_by} paused the schedule at {self._moment(schedule.paused_at)}"
            yield f"{since}: while it is, slots are recorded as skipped."

    def _held_up(self) -> Iterator[str]:
        """Say what keeps slots from being claimed."""
        beats = [node for node in self._insights.nodes() if node.kind == "beat"]
        alive = [node for node in beats if node.alive]
        if not alive:
            seen = f", the last one was seen at {self._moment(max(each.seen_at for each in beats))}" if beats else ""
            yield f"No beat is alive{seen}; start one: `orchestrator beat`."
            return
        for node in alive:
            if node.problem is not None:
                yield f"{node.name} reports a problem: {node.problem}."
        if self._insights.queued(self._max_queued) >= self._max_queued:
            yield f"{self._max_queued} runs or more wait for a worker; until they are fewer no slot is claimed."
        elif not all(node.problem for node in alive):
            yield "A beat is alive, and looks for what is due every second: ask again in a moment."

    def _lost(self, reading: ReadingView) -> Iterator[str]:
        yield (
            f"Nothing tells what became of {self._moment()}, a slot of {_spec(reading)}, as read at "
            f"{self._moment(reading.since)}: the ledger has no record of it."
        )
        yield from self._neighbours()

    # --- Slots and words ------------------------------------------------------------------------------------------

    def _slots_of(self, reading: ReadingView) -> _Nearby:
        """Find the slots of a reading around the moment: none before the reading was made."""
        canonical, zone = reading.canonical, reading.zone
        if canonical is None or _why_idle(reading) is not None:
            return _Nearby()
        first = self._timetable.next_after(canonical, zone, reading.since)
        before = None
        if first is not None and first < self._at:
            before = self._timetable.last_slot(canonical, zone, first, self._at - _INSTANT)
        is_slot = self._timetable.next_after(canonical, zone, self._at - _INSTANT) == self._at
        return _Nearby(before, is_slot, self._timetable.next_after(canonical, zone, self._at))

    def _moment(self, moment: datetime | None = None) -> str:
        """Write a moment, by default the one that was asked about, in UTC and in the schedule's zone."""
        moment = (moment or self._at).astimezone(UTC)
        text = f"{moment:%Y-%m-%d %H:%M:%S}Z"
        reading = self._reading or self._next or self._last
        try:
            local = moment.astimezone(read_zone(reading.zone)) if reading else moment
        except UnreadableScheduleError:
            return text
        if reading is None or not local.utcoffset():
            return text
        return f"{text} ({local:%Y-%m-%d %H:%M:%S} in {reading.zone})"


_WHY_MISSED: Final[dict[FiringReason | None, str]] = {
    FiringReason.SUPERSEDED: "A later slot was missed too, and fires for all of them (misfire policy fire_once).",
    FiringReason.TOO_LATE: "A slot that was missed is not to fire any more (misfire policy skip).",
    FiringReason.OUTSIDE_WINDOW: "That is longer than slots are caught up (the catch-up window).",
}


def _why_idle(reading: ReadingView) -> tuple[Verdict, str] | None:
    """Return what keeps a reading from having any slots, if anything does."""
    if not reading.active:
        return Verdict.INACTIVE, "inactive (is_active is false)"
    if (problem := _problem(reading)) is not None:
        return Verdict.INVALID, f"without a readable schedule: {problem}"
    if reading.canonical is None:
        return Verdict.NO_SCHEDULE, "without a schedule, to be run by hand"
    return None


def _problem(reading: ReadingView) -> str | None:
    """Return why a reading never fires though it has a text; a zone may be unknown now that was known then."""
    if reading.canonical is None:
        return reading.problem
    try:
        read_zone(reading.zone)
    except UnreadableScheduleError as error:
        return str(error)
    return None


def _spec(reading: ReadingView) -> str:
    if not reading.active:
        return "inactive (is_active is false)"
    if reading.text is None:
        return "no schedule"
    if reading.canonical is None:
        return f"“{reading.text}”, which cannot be read"
    meaning = "" if reading.canonical == reading.text else f"{reading.canonical}, "
    return f"“{reading.text}” ({meaning}{reading.zone})"


def _in_short(record: FiringView | None) -> str:
    if record is None:
        return "of which there is no record"
    if record.run_id is not None:
        return f"which started run {record.run_id}"
    return f"which was {record.outcome} ({record.reason})"


_SPANS: Final = ((172_800, 86_400, "days"), (7_200, 3_600, "h"), (120, 60, "min"))


def _span(time: timedelta) -> str:
    seconds = time.total_seconds()
    for least, unit, name in _SPANS:
        if seconds >= least:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.1f} s"


# --- What a run waits for ------------------------------------------------------------------------------------------


class WaitCode(StrEnum):
    """What a run waits for, in a word."""

    NOTHING = "nothing"
    """It is over for good."""
    OPERATOR = "operator"
    """It failed; whether it is tried again is up to people."""
    NEW_RUN = "new_run"
    """It failed for its arguments, so only another run can do better."""
    WORKER = "worker"
    """It is queued."""
    NO_WORKER = "no_worker"
    """The same, or under way, and no living worker consumes its queue."""
    ETA = "eta"
    """The time that its caller asked for."""
    FREE_CALL = "free_call"
    """As many calls to the Discovery Service are under way as may be."""
    ANSWER = "answer"
    """A call to the Discovery Service is under way."""
    NEXT_CALL = "next_call"
    """A call failed, and another one follows after a while."""
    RETRY_AFTER = "retry_after"
    """The same, and the Discovery Service said how long that is."""
    PLAN = "plan"
    """What is to be published is being found out."""
    PUBLISHING = "publishing"
    """Messages are being published."""
    NEXT_PUBLISH = "next_publish"
    """Publishing stopped, and is tried again after a while."""
    BROKER = "broker"
    """The same, for the broker was away or did not take messages."""


@dataclass(frozen=True, slots=True)
class Wait:
    """What has to happen next with a run.

    Attributes:
        code: in a word.
        sentence: in plain English, to be read after "waits for".
    """

    code: WaitCode
    sentence: str


def waits_for(insights: Insights, view: RunView) -> Wait:
    """Say what a run waits for."""
    over = _over(view)
    if over is not None:
        return over
    if view.awaits_slot is not None:
        wait = Wait(WaitCode.FREE_CALL, "a free call to the Discovery Service: as many as may be are under way")
    else:
        wait = _retrying(insights, view) if view.state is RunState.RETRYING else _under_way(view)
    queue = CRAWL_QUEUE if view.kind is RunKind.CRAWL else ANALYSIS_QUEUE
    if attended(insights.nodes(), queue):
        return wait
    code = WaitCode.NO_WORKER if wait.code in _A_WORKER_DOES else wait.code
    return Wait(code, f"{wait.sentence}; no living worker consumes {queue}: `orchestrator worker`")


def attended(nodes: Iterable[NodeView], queue: str) -> bool:
    """Tell whether a living worker consumes a queue."""
    return any(node.alive and queue in node.queues for node in nodes)


_A_WORKER_DOES: Final = frozenset({WaitCode.WORKER, WaitCode.ANSWER, WaitCode.PLAN, WaitCode.PUBLISHING})
_OF_THE_BROKER: Final = {PublishError.code, *(error.code for error in PublishError.__subclasses__())}


def _over(view: RunView) -> Wait | None:
    match view.state:
        case RunState.FAILED if view.arguments is None:
            return Wait(WaitCode.NEW_RUN, "nothing: its arguments were unusable; start a new run")
        case RunState.FAILED:
            return Wait(WaitCode.OPERATOR, f"you: `orchestrator retry {view.id}` puts it back in the queue")
        case RunState.SUCCEEDED | RunState.CANCELED:
            return Wait(WaitCode.NOTHING, "nothing: it is over")
        case _:
            return None


def _retrying(insights: Insights, view: RunView) -> Wait:
    at = _stamp(view.next_attempt_at)
    if view.kind is RunKind.CRAWL:
        why = f"; the last one failed: {view.error_message}" if view.error_message else ""
        code = WaitCode.BROKER if view.error_code in _OF_THE_BROKER else WaitCode.NEXT_PUBLISH
        return Wait(code, f"the next try to publish, at {at}{why}")
    call = f"call {view.attempts + 1} to the Discovery Service, at {at}"
    last = insights.last_attempt(view.id)
    if last is None or last.retry_after is None:
        return Wait(WaitCode.NEXT_CALL, call)
    return Wait(WaitCode.RETRY_AFTER, f"{call}; its answer to the last one was to wait {last.retry_after:.0f} s")


def _under_way(view: RunView) -> Wait:
    """Say what a run waits for that is queued or running."""
    crawl = view.kind is RunKind.CRAWL
    match view.state:
        case RunState.RUNNING if crawl and view.total:
            return Wait(WaitCode.PUBLISHING, f"{view.pending} messages to be published")
        case RunState.RUNNING if crawl:
            return Wait(WaitCode.PLAN, "its plan to be made")
        case RunState.RUNNING:
            return Wait(WaitCode.ANSWER, f"the answer of the Discovery Service to call {view.attempts}")
        case _ if view.next_attempt_at is not None:
            return Wait(WaitCode.ETA, f"the time that its caller asked for, {_stamp(view.next_attempt_at)}")
        case _:
            return Wait(WaitCode.WORKER, f"a worker to take it from {CRAWL_QUEUE if crawl else ANALYSIS_QUEUE}")


def _stamp(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
