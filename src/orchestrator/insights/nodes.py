"""Workers and beats by their last sign of life."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from sqlalchemy import Connection, func, select

from orchestrator.db import Database
from orchestrator.schema import nodes

ALIVE_WITHIN: Final = 15.0
"""A node is alive when its heartbeat is at most this many seconds old."""


class NodeStatus(StrEnum):
    """How a node is, by its last sign of life."""

    READY = "ready"
    DEGRADED = "degraded"
    """It does its work; something outside keeps that from having its full effect."""
    NOT_READY = "not ready"
    """It lives, and says itself what keeps it from its work."""
    SILENT = "silent"
    """It ended without a word, froze, or cannot reach the database."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One worker or beat by its last sign of life."""

    name: str
    kind: str
    version: str
    queues: Sequence[str]
    concurrency: int | None
    host: str | None
    problem: str | None
    degraded: str | None
    started_at: datetime
    seen_at: datetime
    alive: bool

    @property
    def ready(self) -> bool:
        """Whether it does its work."""
        return self.status in {NodeStatus.READY, NodeStatus.DEGRADED}

    @property
    def status(self) -> NodeStatus:
        """All of it in a word."""
        if not self.alive:
            return NodeStatus.SILENT
        if self.problem is not None:
            return NodeStatus.NOT_READY
        return NodeStatus.READY if self.degraded is None else NodeStatus.DEGRADED

    @property
    def because(self) -> str | None:
        """Why it is not simply ready, as far as it said so itself."""
        return self.problem or self.degraded


class NodeInsights:
    """Reads signs of life.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def now(self, within: Connection | None = None) -> datetime:
        """Return what time it is in the ledger."""
        with self._database.autocommit(within) as connection:
            moment: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return moment

    def nodes(self) -> list[NodeView]:
        """Return workers and beats by their last sign of life."""
        age = func.extract("epoch", func.clock_timestamp() - nodes.c.seen_at)
        with self._database.autocommit() as connection:
            rows = connection.execute(select(nodes, (age <= ALIVE_WITHIN).label("alive")).order_by(nodes.c.name))
            return [NodeView(**row._mapping) for row in rows]  # noqa: SLF001 -- SQLAlchemy's documented name
