"""The scheduler that ``celery beat`` runs: no heap, no state file, any number of replicas.

Every tick is a round of the pulse. Celery's own schedule entries are not used: what is due stands in the
ledger.
"""

import os
import socket
import sys
from typing import Any, Final
from uuid import uuid4

from celery import signals
from celery.beat import Scheduler as CeleryScheduler

from orchestrator import bootstrap
from orchestrator.domain import Node
from orchestrator.errors import ConfigurationError
from orchestrator.pulse import Pulse
from orchestrator.settings import current
from orchestrator.telemetry import configure_logging

_LONGEST_SLEEP: Final = 1.0  # seconds, so that SIGTERM is heard in time


@signals.beat_init.connect
def _prepare(**_: object) -> None:
    configure_logging(current().log)


class Scheduler(CeleryScheduler):
    """Celery's scheduler interface over the pulse. Celery makes a second, lazy instance: no side effects here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pulse: Pulse | None = None
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """There are no entries to set up."""

    def tick(self, *_: object, **__: object) -> float:
        """Do a round; return how many seconds to sleep."""
        if self._pulse is None:
            try:
                bootstrap.await_migrated()
            except ConfigurationError as error:
                sys.stderr.write(f"orchestrator: {error}\n")
                raise SystemExit(2) from None
            name = f"beat@{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
            self._pulse = bootstrap.services().pulse(Node(name, "beat"))
        return min(self._pulse.once(), _LONGEST_SLEEP)

    def sync(self) -> None:
        """There is nothing to write: the ledger has it."""

    def close(self) -> None:
        """Sign off."""
        if self._pulse is not None:
            self._pulse.sign_off()
            bootstrap.home.close()
            self._pulse = None

    @property
    def info(self) -> str:
        """What beat's banner says of us."""
        return "    . schedules -> the ledger, in PostgreSQL"
