"""The fan-out engine: one crawl run becomes one message for each data source that has an active config.

A delivery works on a run for one slice of time: fix the plan, then take a batch, publish it with confirms,
mark it, commit, again and again. Any number of deliveries may work on one run at once and share its rows;
each may die at any point. Of a big run whoever begins a slice invites others to help with it, a second at a time, so
that a small run hardly waits for them. Decides nothing about state: the ledger does, by compare-and-set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final
from uuid import UUID

from orchestrator.catalog import Catalog
from orchestrator.domain import TERMINAL, CrawlArguments, CrawlRun, DispatchState, ExtractionBatch, RunState, WakeUp
from orchestrator.errors import PublishError, RefusedError
from orchestrator.ledger import Ledger
from orchestrator.ledger.crawls import SHOWN_SKIPS
from orchestrator.measures import DISPATCHES
from orchestrator.queues import Publisher
from orchestrator.telemetry import Event, logger

_log = logger(__name__)
_FROM_THE_START: Final = 0  # data source ids are positive


@dataclass(frozen=True, slots=True)
class Help:
    """Who helps with big runs.

    Attributes:
        above: data sources left above which help is asked for.
        helpers: how many are asked each slice; none: nobody is.
        ask: sends wake-ups, or raises a PublishError; that one is lost costs nothing but speed.
        seconds: how long a helper works before it goes to the end of the queue.
    """

    above: int
    helpers: int
    ask: Callable[[Sequence[WakeUp]], None]
    seconds: float = 1.0


NO_HELP: Final = Help(0, 0, lambda _: None)


class FanOut:
    """Works on crawl runs, one slice a delivery.

    Args:
        ledger: where state lives.
        catalog: where plans come from.
        publisher: where messages go.
        batch_size: messages a transaction.
        slice_seconds: how long a delivery works before it hands over to its continuation.
        help_: who helps with big runs.
        stopping: whether this process is about to stop; a slice then ends after its batch.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        catalog: Catalog,
        publisher: Publisher,
        *,
        batch_size: int,
        slice_seconds: float,
        help_: Help = NO_HELP,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._ledger = ledger
        self._catalog = catalog
        self._publisher = publisher
        self._batch_size = batch_size
        self._slice_seconds = slice_seconds
        self._help = help_
        self._stopping = stopping
        self._clock = clock

    def deliver(self, run_id: UUID, wake_number: int | None = None) -> WakeUp | None:
        """Work on a run for at most one slice; return the continuation to send when there is more to do.

        Args:
            run_id: the run.
            wake_number: the number of the wake-up that was delivered; none for a caller's own message.

        Raises:
            DatabaseUnavailableError: the ledger is out of reach; deliver again later.
        """
        deadline = self._clock() + self._slice_seconds
        run = self._ledger.crawls.begin(run_id, wake_number)
        if run is None:
            return None
        try:
            left = self._materialize(run) if run.left is None else run.left
            if left > self._help.above:
                self._ask_for_help(run)
            unfinished = self._publish_until(deadline, run)
        except PublishError as error:
            self._ledger.crawls.postpone(run_id, error)
            return None
        except RefusedError as error:
            self._ledger.runs.fail(run_id, error)
            return None
        if unfinished:
            _log.info(Event.RUN_SLICE_ENDED)
            return self._ledger.crawls.hand_over(run_id)
        self._ledger.crawls.complete(run_id)
        return None

    def help(self, run_id: UUID, wake_number: int) -> WakeUp | None:
        """Help with a run for a moment, if the slice of those who asked for it has not ended.

        Args:
            run_id: the run.
            wake_number: the run's last wake-up when help was asked for.

        Returns:
            The same invitation, to be sent again, when there is more to do: behind whatever else waits by now.

        Raises:
            DatabaseUnavailableError: the ledger is out of reach; deliver again later.
        """
        deadline = self._clock() + min(self._help.seconds, self._slice_seconds)
        run = self._ledger.crawls.join(run_id, wake_number)
        if run is None:
            return None
        try:
            if self._publish_until(deadline, run):
                return _invitation(run)
        except (PublishError, RefusedError) as error:
            # Whoever asked meets it, too, and answers for the run; our rows are free again.
            _log.warning(Event.RUN_HELP_GIVEN_UP, code=error.code, error=str(error))
            return None
        # Whoever asked may have ended while we held the last rows.
        self._ledger.crawls.complete(run_id)
        return None

    def _ask_for_help(self, run: CrawlRun) -> None:
        try:
            self._help.ask([_invitation(run)] * self._help.helpers)
        except PublishError as error:
            _log.warning(Event.WAKE_UP_FAILED, code=error.code, error=str(error))
        else:
            _log.info(Event.RUN_HELP_ASKED, helpers=self._help.helpers)

    def _materialize(self, run: CrawlRun) -> int:
        """Fix the plan; return how many data sources are to be published, as far as this call knows."""
        started = self._clock()
        counts = self._ledger.crawls.materialize(run.run_id, run.task_id, self._catalog.plan(run.task_id))
        if counts is None:
            return 0
        total, skipped = counts
        DISPATCHES.add(DispatchState.SKIPPED, times=skipped)
        _log.info(Event.RUN_MATERIALIZED, total=total, skipped=skipped, seconds=round(self._clock() - started, 3))
        if skipped:
            self._warn_of_skips(run, skipped)
        return total - skipped

    def _warn_of_skips(self, run: CrawlRun, skipped: int) -> None:
        shown = self._ledger.crawls.skipped_sources(run.run_id, SHOWN_SKIPS)
        for data_source_id in shown:
            _log.warning(
                Event.DISPATCH_SKIPPED, task_id=run.task_id, data_source_id=data_source_id, reason="no_active_config"
            )
        _log.warning(Event.DISPATCH_SKIPPED_SUMMARY, task_id=run.task_id, skipped=skipped, shown=len(shown))

    def _publish_until(self, deadline: float, run: CrawlRun) -> bool:
        """Publish batches until the slice ends; return whether rows may be left for us to take."""
        after = _FROM_THE_START
        while self._clock() < deadline and not self._stopping():
            batch = self._publish_batch(run, after)
            if batch is not None:
                after, state = batch
                if state in TERMINAL:
                    return False
            elif after == _FROM_THE_START:
                # Nothing pending, or all of it taken by others: they will finish it, or the pulse wakes us.
                return False
            else:
                # A worker may have died behind us and freed the rows that it had taken.
                after = _FROM_THE_START
        return True

    def _publish_batch(self, run: CrawlRun, after: int) -> tuple[int, RunState] | None:
        """Publish and mark one batch; return its last data source and the run's state, none if no row was free.

        Raises:
            PublishError: not all of it was confirmed; what was is marked and committed.
        """
        # Before rows are locked: a broker that is slow to take a connection must not cost us the session.
        self._publisher.prepare()
        with self._ledger.crawls.pending_batch(run.run_id, limit=self._batch_size, after=after) as pending:
            if not pending.sources:
                return None
            batch = ExtractionBatch(run.run_id, run.task_id, run.traceparent, pending.sources)
            receipt = self._publisher.publish(batch, pending.transaction)
            state = pending.mark(receipt.confirmed)
        DISPATCHES.add(DispatchState.PUBLISHED, times=len(receipt.confirmed))
        _log.debug(Event.BATCH_PUBLISHED, taken=len(pending.sources), confirmed=len(receipt.confirmed))
        if receipt.error is not None:
            raise receipt.error
        return pending.sources[-1][0], state


def _invitation(run: CrawlRun) -> WakeUp:
    return WakeUp(run.run_id, CrawlArguments(run.task_id), run.traceparent, run.wake_number, helps=True)
