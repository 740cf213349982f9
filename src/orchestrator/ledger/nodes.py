"""Which workers and beats there are, by their own signs of life."""

from datetime import timedelta
from typing import Final

from sqlalchemy import delete, func, literal, select
from sqlalchemy.dialects.postgresql import insert as upsert

from orchestrator.db import Database
from orchestrator.domain import Health, Node, storable
from orchestrator.ledger.transitions import clock
from orchestrator.schema import nodes

_WELL: Final = Health()


class NodeLedger:
    """Keeps the signs of life.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def heartbeat(self, node: Node, version: str, *, first: bool = False, health: Health = _WELL) -> None:
        """Write a node's sign of life, on the database's clock; its first one says since when it runs.

        Args:
            node: who lives.
            version: of its code.
            first: whether it has just started.
            health: how it is.
        """
        values: dict[str, object] = {
            "kind": node.kind,
            "version": version,
            "queues": list(node.queues),
            "concurrency": node.concurrency,
            "host": node.host,
            "problem": health.problem and storable(health.problem),
            "degraded": health.degraded and storable(health.degraded),
        }
        if first:
            values |= {"started_at": clock}
        with self._database.transaction() as connection:
            if first:
                # Names are unique, so those that were killed would be listed for ever.
                connection.execute(delete(nodes).where(nodes.c.seen_at < clock - timedelta(days=1)))
            # The next one follows soon: not worth waiting for the disk.
            connection.execute(select(func.set_config("synchronous_commit", "off", literal(value=True))))
            connection.execute(
                upsert(nodes)
                .values(name=node.name, **values)
                .on_conflict_do_update(index_elements=[nodes.c.name], set_=values | {"seen_at": clock})
            )

    def sign_off(self, node: Node) -> None:
        """Remove a node that stops in an orderly way."""
        with self._database.transaction() as connection:
            connection.execute(nodes.delete().where(nodes.c.name == node.name))
