"""What keeps a node from its work, as far as the node itself can tell; its heartbeats carry it into the ledger.

Two judgements: a node with a *problem* does not do its work, and is not ready; one that is *degraded* does, and
something outside keeps it from having its full effect. A node that cannot even write is silent, which others see.
"""

import threading
from collections.abc import Callable
from time import monotonic
from typing import Final

from orchestrator.errors import PublishError
from orchestrator.telemetry import Event, logger

ABSENT_AFTER: Final = 15.0
"""Seconds without a look for messages after which a worker does not consume."""
PROBE_EVERY: Final = 10.0
"""Seconds between two questions to the broker: an alarm is known, and in the ledger, within 30."""
DECLARE_EVERY: Final = 3
"""Of so many questions one is asked on a new connection, which declares whatever was deleted meanwhile."""

_log = logger(__name__)


class Attendance:
    """Whether a worker looks for messages; told so by its consuming loop. Thread-safe.

    Args:
        limit: seconds without a look after which it is absent.
        clock: monotonic seconds.
    """

    def __init__(self, limit: float = ABSENT_AFTER, clock: Callable[[], float] = monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._last: tuple[float, str | None] = clock(), "it has not begun to consume"

    def present(self) -> None:
        """Note a look for messages."""
        self._last = self._clock(), None

    def absent(self, reason: str) -> None:
        """Note that there will be none for the time being."""
        self._last = self._clock(), reason

    @property
    def problem(self) -> str | None:
        """Why no messages are taken, if none are."""
        at, reason = self._last
        if reason is not None:
            return reason
        if self._clock() - at <= self.limit:
            return None
        # The same words each time: whatever changes is written to the ledger at once.
        return f"its consumer has not looked for messages for more than {self.limit:.0f} s"

    @property
    def stuck(self) -> bool:
        """Whether a consumer that was there has been silent for twice the limit: it will not come back by itself."""
        at, reason = self._last
        return reason is None and self._clock() - at > 2 * self.limit


class BrokerWatch:
    """Asks the broker every few seconds whether it takes messages, in a thread of its own: the question may hang.

    RabbitMQ in alarm tells only those who publish, so a node that has nothing to publish would not know.

    Args:
        ask: returns if the broker takes messages; is told whether to do so on a new connection; raises PublishError.
    """

    def __init__(self, ask: Callable[[bool], None]) -> None:
        self._ask = ask
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="broker watch", daemon=True)
        self.degraded: str | None = None
        """Why the broker takes no messages, if it takes none."""

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; does not wait for an answer."""
        self._stop.set()

    def _run(self) -> None:
        asked = 0
        while not self._stop.is_set():
            self._note(self._answer(anew=asked % DECLARE_EVERY == 0))
            asked += 1
            self._stop.wait(PROBE_EVERY)

    def _answer(self, *, anew: bool) -> str | None:
        try:
            self._ask(anew)
        except PublishError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 -- an answer too, and the next question may fare better
            what = f"{type(error).__name__}; see its log"
            if self.degraded != what:
                _log.exception(Event.BROKER_DEGRADED, code="internal_error")
            return what
        return None

    def _note(self, degraded: str | None) -> None:
        if degraded is not None and self.degraded is None:
            _log.warning(Event.BROKER_DEGRADED, error=degraded)
        elif degraded is None and self.degraded is not None:
            _log.info(Event.BROKER_RECOVERED)
        self.degraded = degraded
