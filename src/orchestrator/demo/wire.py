"""What stands between the orchestrator and the Extractor in the demo, looked at from outside.

Here the PGMQ queue of the demo's own database; ``kafka_wire`` has a topic of a Kafka that it is given.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, LiteralString, Protocol
from uuid import UUID

from orchestrator.demo import extractor_stub

# The Extractor archives what it took: what was on the wire, whatever the inbox made of it.
_ARRIVED: Final[LiteralString] = "SELECT (message ->> 'run_id')::uuid FROM pgmq.a_extraction_queue"
_WAITING: Final[LiteralString] = "SELECT count(*) FROM pgmq.q_extraction_queue"
_SEND_AGAIN: Final[LiteralString] = """
SELECT pgmq.send('extraction_queue', message, headers)
FROM (SELECT * FROM pgmq.a_extraction_queue ORDER BY msg_id LIMIT %s) AS sent
"""


class Wire(Protocol):
    """Where extraction messages go."""

    @property
    def extractor(self) -> Path:
        """The Extractor's script, which stands alone."""
        ...

    @property
    def environment(self) -> dict[str, str]:
        """What the script needs to know besides the database."""
        ...

    def __str__(self) -> str:
        """Say where it is."""
        ...

    def arrived(self) -> Counter[UUID]:
        """Return how many messages of each run were on the wire, copies included."""
        ...

    def drained(self) -> bool:
        """Tell whether the Extractor has taken all."""
        ...

    def send_again(self, count: int) -> None:
        """Send some messages once more, as after a lost confirm."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class PgmqWire:
    """The queue in the demo's own database.

    Args:
        rows: returns the rows of a statement with parameters in that database.
    """

    extractor = Path(extractor_stub.__file__)

    def __init__(self, rows: Callable[..., list[Any]]) -> None:
        self._rows = rows
        self.environment: dict[str, str] = {}

    def __str__(self) -> str:
        return "PostgreSQL too"

    def arrived(self) -> Counter[UUID]:
        """See :class:`Wire`."""
        return Counter(run_id for (run_id,) in self._rows(_ARRIVED))

    def drained(self) -> bool:
        """See :class:`Wire`."""
        return self._rows(_WAITING) == [(0,)]

    def send_again(self, count: int) -> None:
        """See :class:`Wire`."""
        self._rows(_SEND_AGAIN, count)

    def close(self) -> None:
        """Do nothing: it goes with its database."""
