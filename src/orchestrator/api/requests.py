"""Requests that change something: recognised by ``Idempotency-Key``, done once, workers woken after the commit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import Connection

from orchestrator.api.security import Asks, Ours
from orchestrator.api.waker import Waker
from orchestrator.bootstrap import Services
from orchestrator.domain import WakeUp, traceparent_of
from orchestrator.ledger.keys import Principal
from orchestrator.ledger.requests import Reply
from orchestrator.ledger.requests import Request as Repeatable
from orchestrator.ledger.schedules import NOTHING_UNSENT, Unsent
from orchestrator.tracing import SpanKind, span

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="of the caller's choice, for instance a UUID: the same request with the same key is done once, and "
        "answered alike for a day",
    ),
]


class Outcome:
    """What a change has come to, before it is committed.

    Args:
        status: HTTP's.
        body: the answer.
        location: where what was made is.
        wake_ups: to be sent once it is committed.
        unsent: wake-ups that belong together, likewise.
    """

    def __init__(
        self,
        status: int,
        body: BaseModel,
        *,
        location: str | None = None,
        wake_ups: Sequence[WakeUp] = (),
        unsent: Unsent = NOTHING_UNSENT,
    ) -> None:
        self.reply = Reply(status, body.model_dump(mode="json"), location)
        self.wake_ups = wake_ups
        self.unsent = unsent


class Change:
    """Does what one request asks for, once.

    Attributes:
        ours: what the application works with.
        actor: who asks, for the audit log.
        traceparent: the trace context of the request's runs: the caller's, or none.
    """

    def __init__(self, request: Request, ours: Services, asks: Principal, idempotency_key: str | None) -> None:
        self.ours = ours
        self.actor = asks.actor
        self.traceparent = _continued(request.headers.get("traceparent"))
        self._request = request
        self._key = idempotency_key

    def once(self, body: BaseModel | None, act: Callable[[Connection], Outcome]) -> JSONResponse:
        """Do the work in one transaction with the record of its answer; wake workers after the commit."""
        outcomes: list[Outcome] = []

        def remembered(connection: Connection) -> Reply:
            outcomes.append(act(connection))
            return outcomes[-1].reply

        with self._traced():
            reply = self.ours.ledger.requests.once(self._repeatable(body), remembered)
        waker: Waker = self._request.app.state.waker
        for outcome in outcomes:
            waker.wake(outcome.wake_ups)
            waker.wake_together(outcome.unsent)
        return _response(reply)

    @contextmanager
    def _traced(self) -> Iterator[None]:
        if self.traceparent is None:  # each run begins a trace of its own
            yield
            return
        method, path = self._request.method, self._request.scope["route"].path
        attributes = {"http.request.method": method, "http.route": path}
        with span(f"{method} {path}", SpanKind.SERVER, self.traceparent, attributes) as answering:
            self.traceparent = answering.traceparent
            yield

    def _repeatable(self, body: BaseModel | None) -> Repeatable | None:
        if self._key is None:
            return None
        # Without what is as by default: a release that adds a member must recognise what came before it.
        said = "{}" if body is None else body.model_dump_json(exclude_defaults=True)
        digest = sha256(f"{self._request.method} {self._request.url.path}\n{said}".encode()).digest()
        return Repeatable(self.actor, self._key, digest)


# In the event loop: a class would be made in a thread.
async def _change(request: Request, ours: Ours, asks: Asks, idempotency_key: IdempotencyKey = None) -> Change:
    return Change(request, ours, asks, idempotency_key)


Once = Annotated[Change, Depends(_change)]


def _continued(traceparent: str | None) -> str | None:
    return traceparent if traceparent_of(UUID(int=0), traceparent) == traceparent else None


def _response(reply: Reply) -> JSONResponse:
    headers: dict[str, str] = {}
    if reply.location is not None:
        headers["Location"] = reply.location
    if reply.replayed:
        headers["Idempotency-Replayed"] = "true"
    return JSONResponse(reply.body, reply.status, headers)
