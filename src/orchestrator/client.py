"""A client of the HTTP API for Python programs: the standard library and httpx2, nothing else of this package.

    with Client("https://orchestrator.example", key) as client:
        accepted = client.run(7)
        run = client.wait(accepted.id)

What is asked for has an idempotency key, so requests are repeated safely when a connection breaks or the service is
busy: a run is started once, however often it has to be asked for. Thread-safe.
"""

import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID, uuid4

import httpx2

from orchestrator import __version__

OVER: Final = frozenset({"succeeded", "failed", "canceled"})
"""The states of a run that is over."""

_LONGEST_PAUSE: Final = 10.0
_AGAIN: Final = frozenset({429, 502, 503, 504})
_PLAIN: Final = re.compile(r"[\x21-\x7e]+")


class ApiError(Exception):
    """The API refused, or could not answer; ``str(error)`` is a sentence for people.

    Attributes:
        status: HTTP's; 0: there was no answer.
        code: stable, for programs, for instance ``run_not_found``.
        problem: the whole RFC 9457 document, as far as there was one.
    """

    def __init__(self, status: int, code: str, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{detail} ({code})")
        self.status = status
        self.code = code
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Accepted:
    """A run that was asked for: it is recorded, and will be worked on.

    Attributes:
        id: the run.
        kind: ``crawl`` or ``site_analysis``.
        created: false where there was such a run already.
    """

    id: UUID
    kind: str
    created: bool


@dataclass(frozen=True, slots=True)
class Run:
    """How a run stands. Moments are aware; ``document`` is all that the API says."""

    id: UUID
    kind: str
    state: str
    task_id: int | None
    data_source_id: int | None
    theme_name: str | None
    total: int
    published: int
    skipped: int
    pending: int
    error_code: str | None
    error_message: str | None
    created_at: datetime
    finished_at: datetime | None
    document: Mapping[str, Any]

    @property
    def is_over(self) -> bool:
        """Whether it has come to its end."""
        return self.state in OVER

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Read what the API says of a run; members that this version does not know stay in ``document``."""
        values = {field.name: document[field.name] for field in fields(cls) if field.name != "document"}
        return cls(
            **values
            | {
                "id": UUID(str(document["id"])),
                "created_at": datetime.fromisoformat(document["created_at"]),
                "finished_at": _moment(document["finished_at"]),
                "document": document,
            }
        )


class Client:
    """Asks the HTTP API.

    Args:
        url: where it is, for instance ``https://orchestrator.example``.
        key: an API key, as ``orchestrator keys create`` shows it.
        timeout: seconds for one request.
        tries: how often a request is sent, at most, while there is no answer or the service is busy.
        transport: httpx2's, to put something in between.

    Raises:
        ValueError: the URL, the key or the number of tries is none.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout: float = 10.0,
        tries: int = 4,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the URL must begin with http:// or https://, got {url!r}")
        if tries < 1:
            raise ValueError(f"tries must be at least 1, got {tries}")
        # Not in any sentence: who logs errors must not log keys.
        if not _PLAIN.fullmatch(key := key.strip()):
            raise ValueError("the API key must be printable ASCII, without spaces")
        headers = {"Authorization": f"Bearer {key}", "User-Agent": f"task-orchestrator-client/{__version__}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)
        self._tries = tries

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def run(
        self, task_id: int, *, on_conflict: str = "allow", reason: str | None = None, idempotency_key: str | None = None
    ) -> Accepted:
        """Run a crawl task now.

        Args:
            task_id: the crawl task.
            on_conflict: while a run of it is not over: ``allow`` another, ``reject``, or ``return_existing``.
            reason: why, for the audit log.
            idempotency_key: your own id of this wish, to be able to ask again after a crash of yours.

        Raises:
            ApiError: ``crawl_task_not_found``, ``run_in_progress``, …
        """
        wish = {"task_id": task_id, "on_conflict": on_conflict, "reason": reason}
        document = self._post("/v1/runs", wish, idempotency_key)
        with _understood():
            return _accepted(document["run"])

    def analyze(
        self,
        data_source_ids: Sequence[int],
        theme_name: str,
        *,
        reason: str | None = None,
        idempotency_key: str | None = None,
    ) -> list[Accepted]:
        """Have data sources analysed for a theme, at most 1,000 at once; each is a run of its own.

        Raises:
            ApiError: ``invalid_request``, …
        """
        wish = {"data_source_ids": list(data_source_ids), "theme_name": theme_name, "reason": reason}
        document = self._post("/v1/analyses", wish, idempotency_key)
        with _understood():
            return [_accepted(each) for each in document["runs"]]

    def get(self, run_id: UUID | str) -> Run:
        """Return how a run stands.

        Raises:
            ApiError: ``run_not_found``, …
            ValueError: the id is no UUID.
        """
        document = self._ask("GET", _path_of(run_id))
        with _understood():
            return Run.of(document["run"])

    def runs(self, **filters: object) -> Iterator[Run]:
        """Yield runs, newest first, page by page; filters are the API's, for instance ``state="failed"``.

        Raises:
            ApiError: ``invalid_request``, …
        """
        params = {name: str(value) for name, value in filters.items() if value is not None}
        while True:
            page = self._ask("GET", "/v1/runs", params=params)
            with _understood():
                items, following = list(map(Run.of, page["items"])), page["next_cursor"]
            yield from items
            if following is None:
                return
            params["cursor"] = following

    def retry(self, run_id: UUID | str, *, reason: str | None = None, idempotency_key: str | None = None) -> Accepted:
        """Put a failed run back in the queue, or repeat what succeeded or was canceled as a new run.

        Raises:
            ApiError: ``illegal_transition``, …
            ValueError: the id is no UUID.
        """
        document = self._post(f"{_path_of(run_id)}/retry", {"reason": reason}, idempotency_key)
        with _understood():
            return _accepted(document["run"])

    def cancel(self, run_id: UUID | str, *, reason: str | None = None, idempotency_key: str | None = None) -> None:
        """Cancel a run: what is not sent yet is skipped.

        Raises:
            ApiError: ``illegal_transition``, …
            ValueError: the id is no UUID.
        """
        self._post(f"{_path_of(run_id)}/cancel", {"reason": reason}, idempotency_key)

    def wait(self, run_id: UUID | str, *, within: float = 3_600.0, every: float = 1.0) -> Run:
        """Return a run once it is over.

        Args:
            run_id: the run.
            within: seconds to wait at most.
            every: seconds between two looks.

        Raises:
            TimeoutError: it is not over in time; it goes on.
            ApiError: ``run_not_found``, …
            ValueError: the id is no UUID.
        """
        give_up_at = time.monotonic() + within
        state = "unknown"
        while True:
            try:
                run = self.get(run_id)
            except ApiError as error:
                # A restart of the service, in the middle of an hour's wait, is no news of the run.
                if error.status and error.status not in _AGAIN:
                    raise
            else:
                if run.is_over:
                    return run
                state = run.state
            if time.monotonic() + every > give_up_at:
                raise TimeoutError(f"run {run_id} is {state} after {within:.0f} s; it goes on")
            time.sleep(every)

    def _post(self, path: str, wish: Mapping[str, object], key: str | None) -> dict[str, Any]:
        if key is not None and not _PLAIN.fullmatch(key):
            raise ValueError(f"an idempotency key must be printable ASCII, without spaces, got {key!r}")
        said = {name: value for name, value in wish.items() if value is not None}
        return self._ask("POST", path, json=said, headers={"Idempotency-Key": key or str(uuid4())})

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:  # noqa: ANN401 -- httpx2's
        for number in range(1, self._tries + 1):
            last = number == self._tries
            try:
                response = self._http.request(method, path, **options)
            except httpx2.TransportError as error:
                if last or isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
                    raise ApiError(0, "unreachable", f"no answer: {str(error) or type(error).__name__}", {}) from error
                _pause(number, None)
                continue
            if response.is_success:
                return _document(response)
            problem = _problem(response)
            if last or not (response.status_code in _AGAIN or problem.get("code") == "request_in_progress"):
                detail = problem.get("detail", response.reason_phrase)
                raise ApiError(response.status_code, problem.get("code", "http_error"), detail, problem)
            _pause(number, response.headers.get("Retry-After"))
        raise AssertionError("unreachable: the last try returns or raises")


def _path_of(run_id: UUID | str) -> str:
    # Whatever else it were would be a path of its own.
    return f"/v1/runs/{UUID(str(run_id))}"


def _document(response: httpx2.Response) -> dict[str, Any]:
    with _understood():
        document = response.json()
        if not isinstance(document, dict):
            raise TypeError(f"a {type(document).__name__} where an object was expected")
        return document


@contextmanager
def _understood() -> Iterator[None]:
    """Turn what is wrong with an answer into ApiError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        sentence = f"the answer is none of this API's: {type(error).__name__}: {error}"
        raise ApiError(HTTPStatus.OK, "not_understood", sentence, {}) from error


def _pause(number: int, asked: str | None) -> None:
    """Wait before the next try: longer each time, uneven, and as long as asked for, up to a limit."""
    pause = min(0.2 * 2**number, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311 -- spread, no secret
    time.sleep(max(pause, min(float(asked), _LONGEST_PAUSE)) if asked and asked.isdigit() else pause)


def _problem(response: httpx2.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:  # a proxy's page
        return {}
    return found if isinstance(found, dict) else {}


def _accepted(document: Mapping[str, Any]) -> Accepted:
    return Accepted(UUID(str(document["id"])), document["kind"], document["created"])


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
