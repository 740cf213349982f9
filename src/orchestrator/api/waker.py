"""Has workers woken for runs that were committed, off the path of requests, many at a time.

A request is answered once its run is in the ledger. What is lost here, because the broker is away or this process dies,
the pulse of any worker sends two seconds later.
"""

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from orchestrator.celery_app import Sender
from orchestrator.domain import WakeUp
from orchestrator.errors import OrchestratorError
from orchestrator.ledger import Ledger
from orchestrator.ledger.schedules import Unsent
from orchestrator.telemetry import Event, logger

_BATCH: Final = 500
_PAUSE: Final = 0.05  # seconds
_MOST: Final = 20_000
"""Wake-ups that wait here; what is beyond is left to the pulse."""

_log = logger(__name__)


class Waker:
    """Sends wake-ups in a thread of its own.

    Args:
        ledger: where it is noted that they were sent.
        sender: sends them.
    """

    def __init__(self, ledger: Ledger, sender: Sender) -> None:
        self._ledger = ledger
        self._sender = sender
        self._waiting: queue.Queue[WakeUp | Unsent | None] = queue.Queue(_MOST)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waker", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the batch that is being sent; what waits is left to the pulse."""
        self._stopping.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(timeout=10)

    def wake(self, wake_ups: Sequence[WakeUp]) -> None:
        """Have wake-ups of committed runs sent soon."""
        self._put(wake_ups)

    def wake_together(self, unsent: Unsent) -> None:
        """Have the wake-ups of runs that were committed together sent soon."""
        if unsent.batch is not None:
            self._put([unsent])

    def _put(self, items: Sequence[WakeUp | Unsent]) -> None:
        """Have items wait; of those that there is no room for one line tells, for a request may have a thousand."""
        left = 0
        for item in items:
            try:
                self._waiting.put_nowait(item)
            except queue.Full:
                left += 1 if isinstance(item, WakeUp) else len(item.wake_ups)
        if left:
            error = "too many runs wait to be enqueued here"
            _log.warning(Event.WAKE_UP_FAILED, code="waker_full", error=error, count=left)

    def _run(self) -> None:
        while not self._stopping.is_set():
            items = [self._waiting.get()]
            # Others come along: to send each by itself would cost the process as much as answering requests does.
            self._stopping.wait(_PAUSE)
            while len(items) < _BATCH and not self._waiting.empty():
                items.append(self._waiting.get())
            self._send([item for item in items if item is not None])

    def _send(self, items: Sequence[WakeUp | Unsent]) -> None:
        single = [item for item in items if isinstance(item, WakeUp)]
        together = [item for item in items if isinstance(item, Unsent)]
        try:
            self._sender.wake([*single, *(wake_up for each in together for wake_up in each.wake_ups)])
            if single:
                self._ledger.runs.mark_enqueued([wake_up.run_id for wake_up in single])
            for each in together:
                if each.batch is not None:
                    self._ledger.runs.mark_sent(each.batch)
        except OrchestratorError as error:
            _log.warning(Event.WAKE_UP_FAILED, code=error.code, error=str(error))
        except Exception:  # noqa: BLE001 -- the next ones are to be sent all the same
            _log.exception(Event.WAKE_UP_FAILED, code="internal_error")
