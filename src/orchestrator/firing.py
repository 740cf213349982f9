"""The scheduler's engine: notice edits of the application's schedules, and claim the slots that have come.

Nobody is leader: every beat runs one of these, and the ledger lets a slot be claimed once. Runs are committed before
their wake-ups are sent; one that gets lost is sent by the pulse.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from math import inf
from time import monotonic
from typing import Final

from orchestrator.domain import DueSchedule, Firing, FiringOutcome, WakeUp
from orchestrator.errors import OrchestratorError, PublishError, UnreadableScheduleError
from orchestrator.ledger import Ledger
from orchestrator.ledger.schedules import Claim, Unsent
from orchestrator.telemetry import Event, logger
from orchestrator.timetable import Timetable

LONGEST_SLEEP: Final = 1.0
"""Seconds between rounds at most: a schedule may be edited meanwhile, and SIGTERM is to be heard."""
LOOK: Final = 0.5
"""Seconds between looks for edits by ``updated_at``: rounds come about every second, and each is to look."""
SWEEP: Final = 60.0
"""Seconds between sweeps for other edits, at most."""
QUICKEST_SWEEP: Final = 5.0
"""The same at least."""
SHARE: Final = 0.05
"""Share of the time that looking may take, as long as that allows for a sweep a minute."""

_BUDGET: Final = 2.0  # seconds that claiming may take in one round
_SCHEDULES: Final = 2_000  # in one claim
_FIRINGS: Final = 5_000  # in one claim, and those of one schedule more
_COUNT_AGAIN: Final = 10_000  # runs that one counting of those that wait is good for: it costs as much as a claim
_OTHERS_TURN: Final = 0.05  # seconds, while other beats have taken all that is due
_LONGEST_PAUSE: Final = 10.0  # seconds between tries while something is down

_log = logger(__name__)


class FiringEngine:
    """Fires schedules.

    Args:
        ledger: where schedules, slots and runs are.
        timetable: what schedules mean.
        enqueue: sends wake-ups, each confirmed; raises PublishError.
        node: who claims.
        max_queued: runs that wait for a worker, above which no slot is claimed.
        stopping: tells that a round should end at the next opportunity.
    """

    def __init__(
        self,
        ledger: Ledger,
        timetable: Timetable,
        enqueue: Callable[[Sequence[WakeUp]], None],
        node: str,
        *,
        max_queued: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ledger = ledger
        self._timetable = timetable
        self._enqueue = enqueue
        self._node = node
        self._max_queued = max_queued
        self._stopping = stopping
        self._look_every = LOOK
        self._sweep_every = QUICKEST_SWEEP
        self._sweep_next = False
        self._failures = 0
        self._held_back = False
        self._broker_back_at = 0.0
        self.problem: str | None = None
        """What keeps schedules from firing, if anything does."""

    def once(self) -> float:
        """Do a round; return how many seconds to wait before the next. Never raises."""
        errors: list[Exception] = []
        waits: list[float] = []
        # Claiming does without looking: it reads each schedule again before it fires.
        for part in (self._look, self._claim):
            try:
                waits.append(part())
            except Exception as error:  # noqa: BLE001 -- one bad moment must not end every schedule
                errors.append(error)
        if errors:
            return self._failed(errors[0])
        self._failures = 0
        self.problem = None
        return min(waits)

    def _failed(self, error: Exception) -> float:
        self._failures += 1
        pause = min(0.5 * 2.0 ** min(self._failures - 1, 10), _LONGEST_PAUSE)
        if isinstance(error, OrchestratorError):
            self.problem = str(error)
            _log.warning(Event.FIRING_FAILED, code=error.code, error=self.problem, delay=pause)
        else:
            self.problem = f"{type(error).__name__}; see its log"
            _log.error(Event.FIRING_FAILED, code="internal_error", delay=pause, exc_info=error)
        return pause

    # --- Looking -------------------------------------------------------------------------------------------

    def _look(self) -> float:
        """Notice edits, a chunk of them; return how many seconds to wait."""
        began_at = monotonic()
        # In turns, so that a sweep gets on though every round is late enough for a look by ``updated_at``.
        every = inf if self._sweep_next else self._look_every
        look = self._ledger.schedules.look(self._timetable, every=every, sweep_every=self._sweep_every, by=self._node)
        self._sweep_next = look.kind == "updates" and look.more
        # Less often where it takes long: the table may be large, and have no index on ``updated_at``.
        if look.kind == "updates":
            self._look_every = min(max(LOOK, (monotonic() - began_at) / SHARE), SWEEP)
        if look.swept_in is not None:
            self._sweep_every = SWEEP if look.has_updates else min(max(look.swept_in / SHARE, QUICKEST_SWEEP), SWEEP)
        return 0.0 if look.more else LONGEST_SLEEP

    # --- Claiming ------------------------------------------------------------------------------------------

    def _claim(self) -> float:
        """Claim what is due, for a while; return how many seconds to wait."""
        give_up_at = monotonic() + _BUDGET
        room = 0
        while monotonic() < give_up_at and not self._stopping():
            due_in = self._ledger.schedules.next_due_in()
            if due_in is None or due_in > 0:
                return LONGEST_SLEEP if due_in is None else min(due_in, LONGEST_SLEEP)
            if room <= 0:
                room = min(self._room(), _COUNT_AGAIN)
            if room <= 0:
                return LONGEST_SLEEP
            on_time, late = self._claim_some(late=False), self._claim_some(late=True)
            if on_time is None and late is None:
                return _OTHERS_TURN
            room -= (on_time or 0) + (late or 0)
        return 0.0

    def _room(self) -> int:
        """Return how many more runs may wait for a worker."""
        queued = self._ledger.schedules.backlog(self._max_queued)
        held_back = queued >= self._max_queued
        if held_back and not self._held_back:
            _log.warning(Event.SLOTS_HELD_BACK, queued=queued)
        self._held_back = held_back
        return self._max_queued - queued

    def _claim_some(self, *, late: bool) -> int | None:
        """Claim a batch; return how many runs that made, none where others had taken all there was."""
        outcomes: list[FiringOutcome] = []
        with self._ledger.schedules.claim(self._timetable, late=late, limit=_SCHEDULES, by=self._node) as claim:
            for schedule in claim.due:
                outcomes += [slot.outcome for slot in self._settle(claim, schedule)]
                if len(outcomes) >= _FIRINGS:
                    break
        if outcomes:
            by_outcome = {outcome.value: count for outcome, count in Counter(outcomes).items()}
            latest = (claim.now - claim.due[0].next_fire_at).total_seconds()  # the longest due comes first
            _log.info(Event.SLOTS_CLAIMED, **by_outcome, latest=round(latest, 3))
        self._send(claim.unsent)
        return len(claim.unsent.wake_ups) if claim.due or claim.edited else None

    def _settle(self, claim: Claim, schedule: DueSchedule) -> Sequence[Firing]:
        """Decide on the slots of one schedule; whatever is wrong with it must not keep the others from firing."""
        try:
            overlapping = schedule.task_id in claim.overlapping
            slots, rest = self._timetable.settle(schedule, claim.now, overlapping=overlapping)
        except UnreadableScheduleError as error:
            claim.reject(schedule, str(error))
            return ()
        except Exception as error:  # noqa: BLE001 -- a fault of ours, with this one only
            _log.exception(Event.FIRING_FAILED, task_id=schedule.task_id, code="internal_error")
            problem = f"{type(error).__name__} while it was to be claimed; see the beat's log"
            claim.reject(schedule, problem, self._last_due(schedule, claim.now))
            return ()
        claim.settle(schedule, slots, rest)
        return slots

    def _last_due(self, schedule: DueSchedule, now: datetime) -> datetime | None:
        """Return the last slot that has come, if that can be told of a schedule with which something is wrong."""
        with suppress(Exception):
            last = self._timetable.last_slot(schedule.canonical, schedule.zone, schedule.next_fire_at, now)
            return last if last > schedule.next_fire_at else None
        return None

    def _send(self, unsent: Unsent) -> None:
        """Enqueue committed runs; where that fails the pulse will, so it is no reason to claim no more."""
        if unsent.batch is None or monotonic() < self._broker_back_at:
            return
        try:
            self._enqueue(unsent.wake_ups)
        except PublishError as error:
            _log.warning(Event.WAKE_UP_FAILED, code=error.code, error=str(error))
            self._broker_back_at = monotonic() + _LONGEST_PAUSE
        else:
            self._ledger.runs.mark_sent(unsent.batch)
