"""What a request must not be, whoever sends it: too long, too slow, in another format, or too late for its caller."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from time import monotonic
from typing import Any, Final

from fastapi import Request
from starlette.exceptions import HTTPException

from orchestrator.api import problems
from orchestrator.errors import ApiBusyError, UnauthenticatedError

SLOWEST_BODY: Final = 30.0
"""Seconds within which the body of a request has to be there."""
LONGEST_TURN: Final = 5.0
"""Seconds for which a request waits for its turn; callers give up sooner or later, and ask again."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


def check_turn(request: Request) -> None:
    """Make sure, at the beginning of the work on a request, that it is still wanted.

    While the database hangs each request takes many seconds: without this those behind it would wait for all of them.

    Raises:
        ApiBusyError: it has waited for too long.
    """
    if monotonic() - request.state.arrived_at > LONGEST_TURN:
        raise ApiBusyError("the API has more to do than it can, or its database hangs; ask again")


class Limits:
    """Refuses what is too much as soon as that is known: of bodies of nobody's not a byte is read.

    Args:
        app: the application.
        most: bytes of a body.
    """

    def __init__(self, app: Application, most: int) -> None:
        self._app = app
        self._most = most
        self._too_long = f"a request body has {most:,} bytes at most"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["arrived_at"] = monotonic()
        headers = dict(scope["headers"])
        request = Request(scope)
        if scope["method"] == "POST" and b"authorization" not in headers:
            error = UnauthenticatedError("this needs an API key: Authorization: Bearer …")
            await problems.of_error(request, error)(scope, receive, send)
        elif refusal := self._refusal(headers):
            status, sentence = refusal
            await problems.problem(request, status, problems.CODES[status], sentence)(scope, receive, send)
        else:
            await self._app(scope, self._limited(scope, receive), send)

    def _refusal(self, headers: dict[bytes, bytes]) -> tuple[HTTPStatus, str] | None:
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._most:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_long
        if int(announced) == 0 and b"transfer-encoding" not in headers:
            return None
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a request body has to be JSON: Content-Type: application/json"
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a request body must not be compressed"
        return None

    def _limited(self, scope: Message, receive: Receive) -> Receive:
        read = 0
        deadline: float | None = asyncio.get_running_loop().time() + SLOWEST_BODY

        async def limited() -> Message:
            nonlocal read, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                too_slow = f"a request body has to be there within {SLOWEST_BODY:g} seconds"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, too_slow) from error
            if not message.get("more_body"):
                deadline = None  # from then on this waits for the caller to hang up
                scope["state"]["arrived_at"] = monotonic()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_long)
            return message

        return limited
