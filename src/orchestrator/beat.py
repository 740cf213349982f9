"""The scheduler that ``celery beat`` runs: no heap, no state file, any number of replicas.

Every tick is a round of the firing engine and, about once a second, of the pulse. Celery's own schedule entries are
not used: what is due stands in the ledger.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final
from uuid import uuid4

from celery import signals
from celery.beat import Scheduler as CeleryScheduler

from orchestrator import bootstrap
from orchestrator.domain import Node
from orchestrator.errors import ConfigurationError
from orchestrator.firing import LONGEST_SLEEP, FiringEngine
from orchestrator.health import BrokerWatch
from orchestrator.pulse import Pulse
from orchestrator.settings import current
from orchestrator.telemetry import configure_logging


class _Termination:
    """SIGTERM and SIGINT, heeded between two rounds.

    Celery's own handler raises SystemExit wherever the process happens to be. In the middle of a statement that may be
    replaced by another exception, which a round survives; and signing off there may wait for a row that the
    interrupted transaction has locked. A round is short, and what it leaves undone is another beat's.
    """

    LATEST: Final = 1.5
    """Seconds after which the process ends all the same: its database or broker does not answer. Killing is safe."""

    def __init__(self) -> None:
        self._in_round = False

    def install(self) -> None:
        """Take the place of Celery's handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @contextmanager
    def round(self) -> Iterator[None]:
        """Hold off the end of the process until the end of the block."""
        self._in_round = True
        try:
            yield
        finally:
            self._in_round = False
        if bootstrap.stopping():
            raise SystemExit(0)

    def _on_signal(self, *_: object) -> None:
        bootstrap.stop_soon()
        backstop = threading.Timer(self.LATEST, os._exit, [0])
        backstop.daemon = True
        backstop.start()
        if not self._in_round:
            raise SystemExit(0)


_termination: Final = _Termination()


@signals.beat_init.connect
def _prepare(**_: object) -> None:
    configure_logging(current().log)
    bootstrap.observe(current().metrics.beat_port)
    _termination.install()


class Scheduler(CeleryScheduler):
    """Celery's scheduler interface over ours. Celery makes a second, lazy instance: no side effects here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parts: tuple[FiringEngine, Pulse, BrokerWatch] | None = None
        self._pulse_at = 0.0
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """There are no entries to set up."""

    def tick(self, *_: object, **__: object) -> float:
        """Do a round; return how many seconds to sleep."""
        if self._parts is None:
            self._parts = self._begin()
        firing, pulse, _watch = self._parts
        with _termination.round():
            wait = firing.once()
            # After the firing, so that the heartbeat tells how that went.
            if monotonic() >= self._pulse_at:
                self._pulse_at = monotonic() + pulse.once()
        return max(0.0, min(wait, self._pulse_at - monotonic(), LONGEST_SLEEP))

    @staticmethod
    def _begin() -> tuple[FiringEngine, Pulse, BrokerWatch]:
        try:
            bootstrap.await_migrated()
        except ConfigurationError as error:
            sys.stderr.write(f"orchestrator: {error}\n")
            raise SystemExit(2) from None
        # Unique: the beats of one host would otherwise share Celery's name for them.
        host = socket.gethostname()
        name = f"beat@{host}:{os.getpid()}:{uuid4().hex[:8]}"
        firing, pulse, watch = bootstrap.services().beat(Node(name, "beat", host=host))
        watch.start()
        return firing, pulse, watch

    def sync(self) -> None:
        """There is nothing to write: the ledger has it."""

    def close(self) -> None:
        """Sign off."""
        if self._parts is not None:
            _, pulse, watch = self._parts
            self._parts = None
            watch.stop()
            pulse.sign_off()
            bootstrap.home.close()

    @property
    def info(self) -> str:
        """What beat's banner says of us."""
        return "    . schedules -> the ledger, in PostgreSQL"
