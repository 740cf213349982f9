"""Requests that may be repeated: what was answered is written in the transaction of what was done.

So a repeat can neither do it twice nor hear something else, whenever the first one's answer was lost. The caller's key
is its own: two callers with the same one do not meet. Keys are forgotten after a day.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select

from orchestrator.db import Database
from orchestrator.errors import RequestInProgressError, RequestReusedError
from orchestrator.ledger.transitions import lock_key
from orchestrator.schema import api_requests

KEPT: Final = timedelta(days=1)
"""For so long a repeat is recognised."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request that may come again.

    Attributes:
        actor: who asks.
        key: what its caller calls it.
        fingerprint: a digest of all of it.
    """

    actor: str
    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What was answered.

    Attributes:
        status: HTTP's.
        body: a JSON document.
        location: where what was made is.
        replayed: whether this is the answer to an earlier request.
    """

    status: int
    body: dict[str, Any]
    location: str | None = None
    replayed: bool = False


class RequestLedger:
    """Does a request's work once, however often it comes.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def once(self, request: Request | None, act: Callable[[Connection], Reply]) -> Reply:
        """Do the work and keep the answer, in one transaction; of a repeat, return what was kept.

        What ``act`` raises undoes all of it, and is kept by nobody: a repeat tries again.

        Args:
            request: what to recognise it by; none: it is not to be recognised.
            act: does the work within the transaction.

        Raises:
            RequestReusedError: the key came with another request before.
            RequestInProgressError: the same request is being worked on.
        """
        with self._database.transaction() as connection:
            if request is None:
                return act(connection)
            # Of what was answered long ago any number of repeats may come at once.
            if (kept := _kept(connection, request)) is not None:
                return kept
            purpose = f"request:{request.actor}:{request.key}"
            if not connection.scalar(select(func.pg_try_advisory_xact_lock(lock_key(self._database.schema, purpose)))):
                raise RequestInProgressError("a request with this Idempotency-Key is being answered; ask again soon")
            if (kept := _kept(connection, request)) is not None:
                return kept
            reply = act(connection)
            connection.execute(
                insert(api_requests).values(
                    actor=request.actor,
                    key=request.key,
                    fingerprint=request.fingerprint,
                    status=reply.status,
                    body=reply.body,
                    location=reply.location,
                )
            )
            return reply


def _kept(connection: Connection, request: Request) -> Reply | None:
    known = connection.execute(
        select(api_requests).where(api_requests.c.actor == request.actor, api_requests.c.key == request.key)
    ).one_or_none()
    if known is None:
        return None
    if known.fingerprint != request.fingerprint:
        raise RequestReusedError("this Idempotency-Key came with another request before; use a new one")
    return Reply(known.status, known.body, known.location, replayed=True)
