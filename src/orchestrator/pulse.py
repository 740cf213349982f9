"""The pulse: about once a second, in every worker and every beat, wake what is due and show a sign of life.

Workers also skip what is left of canceled runs, and delete, about once a minute, what is over and old.

One maintenance loop, one file. One process at a time does the waking (an advisory lock in the ledger);
which one does not matter, so workers alone heal themselves. It asks for no proof of death: a spurious
wake-up only adds a helper.
"""

import threading
from collections.abc import Callable, Sequence
from random import uniform
from time import monotonic
from typing import Final

from orchestrator import __version__
from orchestrator.domain import Health, Node, WakeUp
from orchestrator.errors import TransientError
from orchestrator.ledger import Ledger
from orchestrator.telemetry import Event, logger

PERIOD: Final = 1.0  # seconds
HEARTBEAT: Final = 5.0  # seconds
BATCH: Final = 200
_ROUND: Final = 5.0  # seconds; a long list of due runs leaves room for the heartbeat
_SKIPPING: Final = 1.0  # seconds of a round that rows of canceled runs take; what is left is for the next one
_FORGETTING: Final = 60.0  # seconds between looks for what is old
_FORGETTING_ROUND: Final = 0.5  # seconds of a round that it takes; what is left is for the next one
_LONGEST_PAUSE: Final = 10.0  # seconds between tries while the database or the broker is down

_log = logger(__name__)


class Pulse:
    """Wakes due runs and writes one node's heartbeat.

    Args:
        ledger: where state lives.
        enqueue: sends wake-ups, each confirmed; raises PublishError.
        node: tells who beats; what it serves may change.
        health: tells how the node is; written with its heartbeat.
        heartbeat: seconds between heartbeats.
        stopping: tells that a round should end at the next opportunity.
        skip: skips a batch of canceled runs' rows, and tells whether there may be more; none: others do.
        forget: deletes a batch of what is old, and tells whether there is more; none: others do.
    """

    def __init__(
        self,
        ledger: Ledger,
        enqueue: Callable[[Sequence[WakeUp]], None],
        node: Callable[[], Node],
        *,
        health: Callable[[], Health] = Health,
        heartbeat: float = HEARTBEAT,
        stopping: Callable[[], bool] = lambda: False,
        skip: Callable[[], bool] | None = None,
        forget: Callable[[], bool] | None = None,
    ) -> None:
        self._ledger = ledger
        self._enqueue = enqueue
        self._node = node
        self._health = health
        self._heartbeat = heartbeat
        self._stopping = stopping
        self._skip = skip
        self._forget = forget
        self._forget_at = 0.0
        self._seen_at = 0.0
        self._told: Health | None = None
        self._wake_at = 0.0
        self._failures = 0

    def once(self) -> float:
        """Do one round; return how many seconds to wait before the next. Never raises."""
        try:
            # However long waking pauses: a node that waits for its broker is alive.
            self._show_life()
            if monotonic() >= self._wake_at:
                try:
                    self._wake()
                finally:
                    # A broker that is away is no reason to keep the rows of what was canceled for it.
                    self._skip_some()
                self._failures = 0
                self._forget_some()
        except TransientError as error:
            _log.warning(Event.PULSE_FAILED, code=error.code, error=str(error), delay=self._pause())
        except Exception:  # noqa: BLE001 -- it heals everything else, so nothing may end it
            _log.exception(Event.PULSE_FAILED, code="internal_error", delay=self._pause())
        # Uneven, so that many nodes do not ask for the lock at the same moment for ever.
        return PERIOD * uniform(0.8, 1.2)  # noqa: S311 -- spread, no secret

    def run(self, stop: threading.Event) -> None:
        """Do rounds until told to stop."""
        while not stop.wait(self.once()):
            pass

    def sign_off(self) -> None:
        """Tell the ledger that this node stopped in an orderly way, if it can hear it."""
        try:
            self._ledger.nodes.sign_off(self._node())
        except TransientError as error:
            _log.warning(Event.PULSE_FAILED, code=error.code, error=str(error))

    def _pause(self) -> float:
        self._failures += 1
        pause = min(PERIOD * self._failures, _LONGEST_PAUSE)
        self._wake_at = monotonic() + pause
        return pause

    def _show_life(self) -> None:
        health = self._health()
        # News at once: whoever waits for a worker to be ready waits for this.
        if health != self._told or monotonic() - self._seen_at >= self._heartbeat:
            self._ledger.nodes.heartbeat(self._node(), __version__, first=self._told is None, health=health)
            self._seen_at, self._told = monotonic(), health

    def _wake(self) -> None:
        deadline = monotonic() + _ROUND
        while count := self._ledger.runs.wake_due(self._enqueue, BATCH):
            _log.info(Event.PULSE_WOKE, count=count)
            if count < BATCH or monotonic() > deadline or self._stopping():
                return

    def _skip_some(self) -> None:
        """Skip rows of canceled runs for a moment, however many there are: the next round wakes and shows life."""
        if self._skip is not None:
            self._lasts_beyond(_SKIPPING, self._skip)

    def _forget_some(self) -> None:
        """Delete what is old for a moment: whoever waits to be woken must not wait for it."""
        if self._forget is None or monotonic() < self._forget_at:
            return
        self._forget_at = monotonic() + _FORGETTING
        try:
            if self._lasts_beyond(_FORGETTING_ROUND, self._forget):
                self._forget_at = 0.0
        except TransientError as error:
            _log.warning(Event.FORGETTING_FAILED, code=error.code, error=str(error))

    def _lasts_beyond(self, seconds: float, step: Callable[[], bool]) -> bool:
        """Take steps while there are more, for so long; return whether it was not long enough."""
        deadline = monotonic() + seconds
        while step() and not self._stopping():
            if monotonic() > deadline:
                return True
        return False
