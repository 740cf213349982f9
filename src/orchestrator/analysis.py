"""The site-analysis engine: one call to the Discovery Service a turn, with every wait in the ledger.

The attempt is recorded before the call and completed after it. A wait is a row, never a sleeping worker: the
pulse wakes the run when its time has come. Decides nothing about state: the ledger does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import random
from time import monotonic, sleep
from typing import Final

from orchestrator.discovery import Answer, DiscoveryClient, RetryPolicy
from orchestrator.domain import Attempt, AttemptOutcome, NewRun, NoAttempt, WakeUp
from orchestrator.errors import TransientError
from orchestrator.ledger.analyses import LEASE_MARGIN, AnalysisLedger
from orchestrator.measures import DISCOVERY_ATTEMPTS, DISCOVERY_DURATION
from orchestrator.telemetry import Event, bound, logger

_PAUSE: Final = 0.5  # seconds

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Caps:
    """Most calls under way at once: by all workers together, and by this node."""

    everywhere: int
    here: int


class SiteAnalyser:
    """Works on site-analysis runs.

    Args:
        ledger: where state lives.
        client: the Discovery Service.
        policy: when to call again.
        timeout: seconds one call may take.
        slice_seconds: how long a delivery goes on with runs that were waiting for a free call.
        stopping: whether this process is about to stop; a delivery then ends after its call.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        ledger: AnalysisLedger,
        client: DiscoveryClient,
        policy: RetryPolicy,
        *,
        timeout: float,
        slice_seconds: float,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._policy = policy
        self._lease = timeout + LEASE_MARGIN
        self._slice_seconds = slice_seconds
        self._stopping = stopping
        self._clock = clock

    def deliver(self, delivered: NewRun | WakeUp, *, node: str, caps: Caps) -> WakeUp | None:
        """Make the call that a run is due for, then those of runs that waited for a free call, for one slice.

        Args:
            delivered: a run to be accepted first, or one that has been.
            node: this worker's name.
            caps: how many calls may be under way.

        Returns:
            a run that is still waiting and should get the free call next, by a wake-up; none when no run is.

        Raises:
            DatabaseUnavailableError: the ledger is out of reach; deliver again later.
        """
        deadline = self._clock() + self._slice_seconds
        turn = delivered
        while True:
            with bound(run_id=str(turn.run_id), **asdict(turn.arguments)):
                someone_waits = self._work_on(turn, node, caps)
            waiting = self._ledger.next_waiting() if someone_waits else None
            if waiting is None or self._clock() > deadline or self._stopping():
                return waiting
            turn = waiting

    def _work_on(self, turn: NewRun | WakeUp, node: str, caps: Caps) -> bool:
        """Make a run's call if it is due; return whether a run may wait for a call that is free now."""
        attempt = self._ledger.begin_attempt(
            turn if isinstance(turn, NewRun) else turn.run_id,
            node=node,
            lease=self._lease,
            max_retries=self._policy.max_retries,
            cap=caps.everywhere,
            node_cap=caps.here,
        )
        if isinstance(attempt, Attempt):
            return self._call(attempt)
        # Whoever had the slot may have looked for somebody who waits before this run did.
        return attempt is not NoAttempt.NO_SLOT or self._ledger.is_slot_free(
            node=node, cap=caps.everywhere, node_cap=caps.here
        )

    def _call(self, attempt: Attempt) -> bool:
        _log.info(Event.ATTEMPT_STARTED, number=attempt.number, data_source_id=attempt.data_source_id)
        answer = self._client.call(
            run_id=attempt.run_id,
            data_source_id=attempt.data_source_id,
            theme_name=attempt.theme_name,
            traceparent=attempt.traceparent,
        )
        retry_in = None
        if answer.outcome is AttemptOutcome.RETRYABLE and self._policy.may_retry(attempt.retries_done):
            retry_in = self._policy.delay(attempt.retries_done + 1, answer.retry_after, random())  # noqa: S311 -- jitter, no secret
        DISCOVERY_DURATION.observe(answer.seconds)
        someone_waits = self._finish(attempt, answer, retry_in)
        DISCOVERY_ATTEMPTS.add(answer.outcome)
        _log.info(
            Event.ATTEMPT_FINISHED,
            number=attempt.number,
            outcome=answer.outcome,
            status=answer.status,
            milliseconds=round(answer.seconds * 1_000),
            error=None if answer.outcome is AttemptOutcome.SUCCEEDED else answer.message,
            retry_in=retry_in,
        )
        return someone_waits

    def _finish(self, attempt: Attempt, answer: Answer, retry_in: float | None) -> bool:
        """Record the answer, and while the database is away try again: a call that was made must not count as lost.

        Raises:
            DatabaseUnavailableError: it stayed away for as long as the lease.
        """
        give_up_at = self._clock() + self._lease
        while True:
            try:
                return self._ledger.finish_attempt(attempt, answer, retry_in)
            except TransientError:
                if self._clock() > give_up_at:
                    raise
                sleep(_PAUSE)
