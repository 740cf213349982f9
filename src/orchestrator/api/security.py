"""Who may ask for what: API keys as bearer tokens, a role on every route, and a brake on guessing.

Closed by construction: routes are made by :class:`Routes`, which takes a role for each; there is no other way in.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from inspect import iscoroutinefunction
from time import monotonic
from typing import Annotated, Any, Final, TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

from orchestrator.api.limits import check_turn
from orchestrator.bootstrap import Services
from orchestrator.domain import Role
from orchestrator.errors import ForbiddenError, TooManyFailuresError, UnauthenticatedError
from orchestrator.ledger.keys import Principal

Handler = TypeVar("Handler", bound=Callable[..., Any])

FAILURES: Final = 20
"""API keys that are none, from one address, until it has to wait."""
REFILL: Final = 3.0
"""Seconds after which one of them is forgotten."""
_ADDRESSES: Final = 10_000
_LONGEST_ADDRESS: Final = 64

_bearer: Final = HTTPBearer(auto_error=False, description="an API key: `orchestrator keys create`")


class FailureLimit:
    """A brake on guessing: so many failures of one address, then one each few seconds. Thread-safe, bounded.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # When the bucket of an address is empty again: a whole queue of failures as one number.
        self._drained_at: OrderedDict[str, float] = OrderedDict()

    def note(self, address: str) -> None:
        """Note a failure of an address.

        Raises:
            TooManyFailuresError: it has failed too often, and has to wait.
        """
        with self._lock:
            now = self._clock()
            drained_at = max(now, self._drained_at.pop(address, now))
            excess = drained_at - now - (FAILURES - 1) * REFILL
            self._drained_at[address] = drained_at if excess > 0 else drained_at + REFILL
            while len(self._drained_at) > _ADDRESSES:
                self._drained_at.popitem(last=False)
        if excess > 0:
            raise TooManyFailuresError(excess)


async def services_of(request: Request) -> Services:
    """Return what the application works with."""
    services: Services = request.app.state.services
    return services


def principal(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Principal:
    """Return whose request it is.

    Raises:
        ApiBusyError: it has waited for too long.
        UnauthenticatedError: it has no valid API key.
        TooManyFailuresError: its address has sent too many that are not valid.
    """
    check_turn(request)
    if credentials is None:
        raise UnauthenticatedError("this needs an API key: Authorization: Bearer …")
    services: Services = request.app.state.services
    try:
        # First of all: behind a proxy all callers have one address, and who has a key must not wait for who has none.
        return services.ledger.keys.authenticate(credentials.credentials)
    except UnauthenticatedError:
        failures: FailureLimit = request.app.state.failures
        # A proxy passes on whatever its caller calls itself.
        failures.note(request.client.host[:_LONGEST_ADDRESS] if request.client else "unknown")
        raise


Ours = Annotated[Services, Depends(services_of)]


class Routes:
    """Makes routes, each for a role; a key of a lower one gets 403.

    Args:
        tag: under which the documentation lists them.
        prefix: what all their paths begin with.
    """

    def __init__(self, tag: str, prefix: str = "/v1") -> None:
        self._router = APIRouter(tags=[tag], prefix=prefix)

    def get(self, path: str, role: Role = Role.VIEWER, **options: Any) -> Callable[[Handler], Handler]:  # noqa: ANN401 -- FastAPI's
        """Return a decorator for what is read."""
        return self._route("GET", path, role, options)

    def post(self, path: str, role: Role, **options: Any) -> Callable[[Handler], Handler]:  # noqa: ANN401 -- the same
        """Return a decorator for what changes something."""
        return self._route("POST", path, role, options)

    def serve_in(self, app: FastAPI) -> None:
        """Have an application serve them."""
        app.include_router(self._router)

    def _route(self, method: str, path: str, role: Role, options: dict[str, Any]) -> Callable[[Handler], Handler]:
        async def allowed(request: Request, asks: Annotated[Principal, Depends(principal)]) -> Principal:
            if not asks.role.covers(role):
                raise ForbiddenError(f"this needs the role {role}; the API key has {asks.role}")
            _check_parameters(request)
            return asks

        extra = {"x-role": role.value}
        dependencies = [Depends(allowed)]
        route = self._router.api_route(
            path, methods=[method], dependencies=dependencies, openapi_extra=extra, **options
        )

        def register(handler: Handler) -> Handler:
            route(_answered(handler, options.get("status_code", HTTPStatus.OK)))
            return handler

        return register


def _answered(handler: Callable[..., Any], status: int) -> Callable[..., Response]:
    """Have a handler's thread write the answer: FastAPI would check it against its own model, in yet another thread."""
    if iscoroutinefunction(handler):
        raise TypeError(f"{handler} must not be async: it is called in a thread")

    @wraps(handler)
    def answering(*args: object, **kwargs: object) -> Response:
        answer = handler(*args, **kwargs)
        if isinstance(answer, BaseModel):
            return Response(answer.model_dump_json(), status, media_type="application/json")
        return cast("Response", answer)

    return answering


def _check_parameters(request: Request) -> None:
    """Refuse what would have no effect: a filter that does nothing is worse than none.

    Raises:
        RequestValidationError: a parameter of the query is unknown, or there twice.
    """
    known = request.app.state.parameters[request.method, request.scope["route"].path]
    names = [name for name, _ in request.query_params.multi_items()]
    wrong = {name: "there is no such parameter here" for name in names if name not in known} | {
        name: "may be given once" for name in known if names.count(name) > 1
    }
    if wrong:
        raise RequestValidationError(
            [{"loc": ("query", name[:50]), "msg": problem, "type": "parameter"} for name, problem in wrong.items()]
        )


Asks = Annotated[Principal, Depends(principal)]
"""Whose request it is; FastAPI asks once a request, however many want to know."""
