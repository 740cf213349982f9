"""What crawl tasks' schedules mean, when they fire next, and what becomes of slots that have come.

Pure: the moment is always given. The rules are promise 3 of the design: a slot claimed over 60 s late was missed, and
its misfire policy says what becomes of it; a slot of a task whose run is unfinished is for its overlap policy; every
slot gets a record, long rows of missed ones a common one.
"""

from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import islice
from typing import Final, TypeVar

from orchestrator.domain import (
    GRACE,
    DueSchedule,
    Firing,
    FiringOutcome,
    FiringReason,
    MisfirePolicy,
    OverlapPolicy,
    Reading,
    ScheduleRow,
)
from orchestrator.errors import InvalidArgumentsError, UnreadableScheduleError
from orchestrator.schedule import Schedule, parse, read_zone

SINGLY: Final = 100
"""Missed slots that do not fire are recorded one by one up to so many a schedule; those before as one range."""
AT_ONCE: Final = 1_000
"""Slots of one schedule that fire in one claim at most; the rest stays due."""
LARGEST_BACKFILL: Final = 1_000
"""Past slots that are made up for at once, at most."""

Settlement = tuple[list[Firing], datetime | None]
"""What to record of a schedule's slots, in the order of time, and the first slot that is left."""

_COUNTED: Final = 10_000  # slots of a range that is too long
_VERSION: Final = "1"  # of the reading; raised when the same text comes to mean something else
_REMEMBERED: Final = 100_000
_TICK: Final = timedelta(microseconds=1)


class Timetable:
    """Reads schedules and settles slots by the settings' defaults.

    Args:
        misfire_policy: of tasks that name none.
        overlap_policy: of tasks that name none.
        catch_up_window: slots missed for longer never fire.
        spread: seconds over which words without a time are spread; 0: none.
    """

    def __init__(
        self,
        misfire_policy: MisfirePolicy = MisfirePolicy.FIRE_ONCE,
        overlap_policy: OverlapPolicy = OverlapPolicy.SKIP,
        catch_up_window: timedelta = timedelta(days=1),
        spread: int = 0,
    ) -> None:
        self._misfire_policy = misfire_policy
        self._overlap_policy = overlap_policy
        self._window = catch_up_window
        self._spread = spread
        # Of each (schedule, zone) the last answer: it holds for every moment from the one asked about up to itself.
        self._answers: dict[tuple[str, str], tuple[datetime, datetime | None]] = {}

    @property
    def rules(self) -> str:
        """Version and settings of the reading."""
        return f"{_VERSION} spread={self._spread}"

    def read(self, row: ScheduleRow, after: datetime) -> Reading:
        """Return what a row means, with its first slot after a moment; one that cannot be read never fires."""
        if row.text is None:
            return Reading(row)
        try:
            schedule = _read(row.text, row.zone, row.misfire_policy, row.overlap_policy)
            canonical = schedule.spread(row.task_id, self._spread).canonical
            first = self.next_after(canonical, row.zone, after) if row.active else None
        except UnreadableScheduleError as error:
            return Reading(row, problem=str(error))
        return Reading(row, canonical, None, first)

    def next_after(self, canonical: str, zone: str, moment: datetime) -> datetime | None:
        """Return the first slot after a moment; none when there is none within decades."""
        asked, answer = self._answers.get((canonical, zone), (None, None))
        if asked is not None and asked <= moment and (answer is None or moment < answer):
            return answer
        answer = parse(canonical).next_after(moment, read_zone(zone))
        if len(self._answers) >= _REMEMBERED:
            self._answers.clear()
        self._answers[canonical, zone] = (moment, answer)
        return answer

    def slots(self, canonical: str, zone: str, first: datetime, until: datetime) -> Iterator[datetime]:
        """Yield the slots from the first one to a moment, that included."""
        slot: datetime | None = first
        while slot is not None and slot <= until:
            yield slot
            slot = self.next_after(canonical, zone, slot)

    def past_slots(
        self, canonical: str, zone: str, first: datetime, last: datetime, *, now: datetime
    ) -> list[datetime]:
        """Return the slots from one moment to another, both included, to be made up for.

        Raises:
            InvalidArgumentsError: there are none, or over :data:`LARGEST_BACKFILL`, or some are to come.
        """
        if last < first:
            raise InvalidArgumentsError("the end lies before the beginning")
        if last > now:
            raise InvalidArgumentsError("the end lies in the future: slots that are to come fire by themselves")
        begin = self.next_after(canonical, zone, first - _TICK)
        coming = iter(()) if begin is None else self.slots(canonical, zone, begin, last)
        slots = list(islice(coming, _COUNTED + 1))
        if not slots:
            ahead = "" if begin is None else f"; the next one is {begin:%Y-%m-%d %H:%M:%S}Z"
            raise InvalidArgumentsError(f"“{canonical}” has no slot in that time{ahead}")
        if len(slots) > LARGEST_BACKFILL:
            count = f"over {_COUNTED}" if len(slots) > _COUNTED else str(len(slots))
            raise InvalidArgumentsError(
                f"that time has {count} slots, and {LARGEST_BACKFILL} at most are made up for at once: narrow it"
            )
        return slots

    def last_slot(self, canonical: str, zone: str, first: datetime, until: datetime) -> datetime:
        """Return the last of the slots from the first one, which has come, to a moment."""
        return self._latest(canonical, zone, first, until, 1)[-1]

    def settle(self, schedule: DueSchedule, now: datetime, *, overlapping: bool) -> Settlement:
        """Decide what becomes of the slots that have come.

        Args:
            schedule: its ``next_fire_at`` is not after ``now``.
            now: the moment of the claim.
            overlapping: a run of the task is unfinished.

        Returns:
            The slot that is left is after ``now``, or has come too where they are too many for one claim.
        """
        settled: list[Firing] = []
        first: datetime | None = schedule.next_fire_at
        for until, reason in self._not_to_fire(schedule, now):
            if first is not None and first <= until:
                settled += self._pass_over(schedule, first, until, reason)
                first = self.next_after(schedule.canonical, schedule.zone, until)
        if first is None or first > now:
            return settled, first
        may_overlap = _policy("overlap_policy", schedule.overlap_policy, self._overlap_policy) is OverlapPolicy.ALLOW
        slots = list(islice(self.slots(schedule.canonical, schedule.zone, first, now), AT_ONCE))
        for slot in slots:
            if overlapping and not may_overlap:
                settled.append(_passed(schedule, slot, FiringReason.OVERLAP))
            else:
                overlapping = True
                late = FiringReason.CAUGHT_UP if now - slot > GRACE else None
                settled.append(Firing(schedule.task_id, slot, FiringOutcome.STARTED, late))
        return settled, self.next_after(schedule.canonical, schedule.zone, slots[-1])

    def _not_to_fire(self, schedule: DueSchedule, now: datetime) -> Iterator[tuple[datetime, FiringReason]]:
        """Yield up to which moment slots do not fire, and why: the first reason that covers a slot is its own."""
        if schedule.paused:
            yield now, FiringReason.PAUSED
        elif schedule.resumed_at is not None:
            yield min(schedule.resumed_at - _TICK, now), FiringReason.PAUSED
        yield now - self._window - _TICK, FiringReason.OUTSIDE_WINDOW
        missed = now - GRACE - _TICK
        policy = _policy("misfire_policy", schedule.misfire_policy, self._misfire_policy)
        if policy is MisfirePolicy.SKIP:
            yield missed, FiringReason.TOO_LATE
        elif policy is MisfirePolicy.FIRE_ONCE and schedule.next_fire_at <= missed:
            latest = self.last_slot(schedule.canonical, schedule.zone, schedule.next_fire_at, missed)
            yield latest - _TICK, FiringReason.SUPERSEDED

    def _pass_over(
        self, schedule: DueSchedule, first: datetime, until: datetime, reason: FiringReason
    ) -> Iterator[Firing]:
        """Record the slots from the first one to a moment: the latest one by one, those before as a range."""
        canonical, zone = schedule.canonical, schedule.zone
        # What is out of reach for good is told in one row.
        lately = [] if reason is FiringReason.OUTSIDE_WINDOW else self._latest(canonical, zone, first, until, SINGLY)
        if not lately or first < lately[0]:
            last = self.last_slot(canonical, zone, first, lately[0] - _TICK if lately else until)
            yield _passed(schedule, first, reason, through=None if last == first else last)
        for slot in lately:
            yield _passed(schedule, slot, reason)

    def _latest(self, canonical: str, zone: str, first: datetime, until: datetime, most: int) -> list[datetime]:
        """Return the latest slots from the first one, which has come, to a moment: at most so many."""
        back = GRACE
        while True:
            start = until - back
            # Backwards in strides, for there may be a million slots from the first one on.
            begin = first if start <= first else self.next_after(canonical, zone, start)
            slots: deque[datetime] = deque(maxlen=most)
            if begin is not None:
                slots.extend(self.slots(canonical, zone, begin, until))
            if len(slots) == most or start <= first:
                return list(slots)
            back *= 2


@lru_cache(maxsize=10_000)  # a million rows have far fewer texts
def _read(text: str, zone: str, misfire_policy: str | None, overlap_policy: str | None) -> Schedule:
    """Read all that a row says.

    Raises:
        UnreadableScheduleError: any of it cannot be read.
    """
    schedule = parse(text)
    read_zone(zone)
    _policy("misfire_policy", misfire_policy, MisfirePolicy.FIRE_ONCE)
    _policy("overlap_policy", overlap_policy, OverlapPolicy.SKIP)
    return schedule


_SKIPPING: Final = frozenset({FiringReason.PAUSED, FiringReason.OVERLAP})
_P = TypeVar("_P", MisfirePolicy, OverlapPolicy)


def _policy(name: str, text: str | None, default: _P) -> _P:
    if text is None:
        return default
    policies = type(default)
    try:
        return policies(text.lower())
    except ValueError:
        known = ", ".join(each.value for each in policies)
        raise UnreadableScheduleError(f"{name} {text[:50]!r} is none of {known}") from None


def _passed(schedule: DueSchedule, slot: datetime, reason: FiringReason, through: datetime | None = None) -> Firing:
    outcome = FiringOutcome.SKIPPED if reason in _SKIPPING else FiringOutcome.MISSED
    return Firing(schedule.task_id, slot, outcome, reason, through)
