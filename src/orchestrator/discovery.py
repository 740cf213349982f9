"""The Discovery Service: one HTTP call, what it means, and when to try again.

:class:`DiscoveryClient` makes exactly one request per call and turns whatever happens into an :class:`Answer`;
:class:`RetryPolicy` says how long to wait before the next one. Neither knows of runs' states, of the ledger or of
waiting: the caller records and waits.

What a status means (DESIGN 3.2): 2xx is success. 408, 425, 429 and every 5xx, 501 included, are worth another try,
and so are statuses beyond 599, which RFC 9110, section 15, wants treated like 5xx. All else is refused at once,
redirects too: the address comes from the configuration and from nowhere else.
"""

import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import httpcore2
import httpx2

from orchestrator import __version__
from orchestrator.domain import AttemptOutcome
from orchestrator.tracing import SpanKind, span

_RETRYABLE_BELOW_500: Final = frozenset({408, 425, 429})
_LONGEST_RETRY_AFTER: Final = 366 * 86_400.0
_LONGEST_EXCERPT: Final = 300

# Servers drop idle connections after as little as 2 s (gunicorn) or 5 s (uvicorn, Node.js). A request that meets
# the drop on its way fails and costs a whole retry delay, so ours are given up first; bursts reuse them all the same.
_KEEPALIVE_SECONDS: Final = 1.0

# The only headers that are read. The others never reach httpx2, which would keep cookies for later calls.
_HEADERS_READ: Final = frozenset({b"content-encoding", b"date", b"location", b"retry-after"})

_NETWORK_FAILURES: Final = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    # LocalProtocolError is absent: it says that we are wrong, not the network.
    httpcore2.RemoteProtocolError,
)


class AnswerCode(StrEnum):
    """Why a call ended as it did; stable, stored in the ledger."""

    OK = "ok"
    """2xx."""
    UNREACHABLE = "discovery_unreachable"
    """No connection: unknown name, refused, no route, TLS handshake broken off. Retryable."""
    TIMEOUT = "discovery_timeout"
    """No complete status line and headers within the time-out. Retryable."""
    NO_ANSWER = "discovery_no_answer"
    """Connected, but the connection broke or carried no HTTP before a status came. Retryable."""
    UNAVAILABLE = "discovery_unavailable"
    """408, 425, 429, 5xx and beyond. Retryable."""
    REFUSED = "discovery_refused"
    """Any other status: the same request would be answered the same way."""
    UNTRUSTED = "discovery_untrusted"
    """The server's certificate does not verify; trying again cannot help, only an administrator can."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one call.

    Attributes:
        outcome: succeeded, retryable or refused.
        status: the HTTP status, when one came.
        code: why, for machines.
        message: why, one sentence for people, free of control characters.
        retry_after: how many seconds the service wants to be left alone, when it said so; finite, not negative.
        seconds: how long the call took.
    """

    outcome: AttemptOutcome
    status: int | None
    code: AnswerCode
    message: str
    retry_after: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    Attributes:
        max_retries: retries after the first attempt: 3 mean at most 4 attempts.
        base_delay: seconds before the first retry, before jitter; doubles with each further one.
        max_delay: longest wait in seconds, ``Retry-After`` included.
    """

    max_retries: int
    base_delay: float
    max_delay: float

    def may_retry(self, retries_done: int) -> bool:
        """Tell whether another retry is allowed after so many."""
        return retries_done < self.max_retries

    def delay(self, retry_number: int, retry_after: float | None, random: float) -> float:
        """Return how many seconds to wait before a retry.

        The exponential delay is spread over [0.5, 1.5) of its nominal length and then capped, so it is never zero
        and has the nominal length on average. ``Retry-After``, capped too, is a floor: never earlier.

        Args:
            retry_number: which retry this is, counted from 1.
            retry_after: what the service asked for, see :attr:`Answer.retry_after`.
            random: evenly distributed over [0, 1).
        """
        if retry_number < 1:
            raise ValueError(f"retries are counted from 1, got {retry_number}")
        # 2**64 of the shortest sensible base exceeds any cap; a larger exponent only overflows.
        nominal = self.base_delay * 2.0 ** min(retry_number - 1, 64)
        return min(max(nominal * (0.5 + random), retry_after or 0.0), self.max_delay)


def retry_after_seconds(value: str | None, date: str | None, now: datetime) -> float | None:
    """Read a ``Retry-After`` header (RFC 9110, sections 10.2.3 and 5.6.7); what is no such thing is ignored.

    A point in time is measured from the answer's own ``Date`` where that can be read, so that a wrong clock on
    either side does not matter. Fractions of seconds are understood although the RFC has none; what lies in the
    past is 0, and nothing is longer than a year.

    Args:
        value: the header, none when it is absent.
        date: the ``Date`` header of the same answer.
        now: the local time, aware.
    """
    if value is None:
        return None
    if re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", value.strip()):
        # float, unlike int, takes any number of digits.
        seconds = float(value)
    else:
        until = _http_date(value)
        if until is None:
            return None
        seconds = (until - (_http_date(date or "") or now)).total_seconds()
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)


def _http_date(value: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    # The asctime format names no zone; RFC 9110 says it is UTC.
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


class DiscoveryClient:
    """Calls the Discovery Service; one for a process, safe for threads.

    It connects with the first call, so a worker forked before that shares no socket with its parent. Proxies and
    netrc of the environment are ignored, for they would send the request elsewhere than the configuration says.
    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are honoured: they are how a company's own certificate authority is
    made known, and change whom we trust but not whom we call.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        max_response_bytes: int = 64 * 1024,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Set up without connecting.

        Args:
            url: where to post to; a user and password in it become basic authentication.
            timeout: seconds for the whole call, from the name look-up to the last byte read.
            max_response_bytes: how much of a body is read at most, as it comes over the wire.
            ssl_context: whom to trust; unset: the system's authorities, see above.
        """
        self._url = httpx2.URL(url)
        self._timeout = timeout
        self._max_response_bytes = max_response_bytes
        self._ssl_context = ssl_context
        self._deadline = _Deadline()
        self._lock = threading.Lock()
        self._client: httpx2.Client | None = None

    def call(self, *, run_id: UUID, data_source_id: int, theme_name: str, traceparent: str) -> Answer:
        """Ask for the analysis of a data source; one request, whatever happens.

        Network and server never make this raise.

        Args:
            run_id: sent as ``Idempotency-Key``, the same on every attempt.
            data_source_id: what to analyse.
            theme_name: under which theme.
            traceparent: W3C trace context.
        """
        attributes = {"http.request.method": "POST", "server.address": self._url.host, "orchestrator.run": str(run_id)}
        with span("POST discover", SpanKind.CLIENT, traceparent, attributes) as calling:
            answer = self._post(run_id, data_source_id, theme_name, calling.traceparent)
            if answer.status is not None:
                calling.note({"http.response.status_code": answer.status})
            if answer.outcome is not AttemptOutcome.SUCCEEDED:
                calling.fail(answer.code)
        return answer

    def _post(self, run_id: UUID, data_source_id: int, theme_name: str, traceparent: str) -> Answer:
        started = time.monotonic()
        client = self._opened()
        self._deadline.at = started + self._timeout
        try:
            with client.stream(
                "POST",
                self._url,
                json={"data_source_id": data_source_id, "theme_name": theme_name},
                headers={"Idempotency-Key": str(run_id), "traceparent": traceparent},
            ) as response:
                outcome, code = _verdict(response.status_code)
                message = _describe(response, self._read(response))
        except _NETWORK_FAILURES as error:
            outcome, code, message = self._explain(error)
            return Answer(outcome, None, code, message, None, time.monotonic() - started)
        retry_after = None
        if outcome is AttemptOutcome.RETRYABLE:
            headers = response.headers
            retry_after = retry_after_seconds(headers.get("retry-after"), headers.get("date"), datetime.now(UTC))
        return Answer(outcome, response.status_code, code, message, retry_after, time.monotonic() - started)

    def close(self) -> None:
        """Drop all connections; not while calls are under way. Calling again opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _opened(self) -> httpx2.Client:
        with self._lock:
            if self._client is None:
                self._client = httpx2.Client(
                    transport=_Transport(self._deadline, self._ssl_context or httpcore2.default_ssl_context()),
                    headers={
                        "Accept": "application/json",
                        # Compressed bodies would have to be expanded before anyone knows how large they get.
                        "Accept-Encoding": "identity",
                        "User-Agent": f"task-orchestrator/{__version__}",
                    },
                    timeout=None,  # the transport keeps a stricter one
                    follow_redirects=False,
                    trust_env=False,
                )
            return self._client

    def _read(self, response: httpx2.Response) -> bytes:
        # The status is the answer, so nothing that happens to the body can change it. Successes are read too:
        # only a connection whose answer was read to its end can be used again.
        body = bytearray()
        try:
            for chunk in response.iter_raw():
                body += chunk
                if len(body) >= self._max_response_bytes:
                    break
        except _NETWORK_FAILURES:
            pass
        return bytes(body[: self._max_response_bytes])

    def _explain(self, error: Exception) -> tuple[AttemptOutcome, AnswerCode, str]:
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
        match error:
            case _UntrustedError():
                outcome, code = AttemptOutcome.REFUSED, AnswerCode.UNTRUSTED
                message = f"Discovery Service's certificate is not trusted: {reason}"
            case httpcore2.TimeoutException():
                outcome, code = AttemptOutcome.RETRYABLE, AnswerCode.TIMEOUT
                message = f"Discovery Service did not answer within {self._timeout:g} s"
            case httpcore2.ConnectError():
                outcome, code = AttemptOutcome.RETRYABLE, AnswerCode.UNREACHABLE
                message = f"Discovery Service could not be reached at {self._url.netloc.decode()}: {reason}"
            case _:
                outcome, code = AttemptOutcome.RETRYABLE, AnswerCode.NO_ANSWER
                message = f"Discovery Service gave no HTTP answer: {reason}"
        return outcome, code, _printable(message)


def _verdict(status: int) -> tuple[AttemptOutcome, AnswerCode]:
    if httpx2.codes.is_success(status):
        return AttemptOutcome.SUCCEEDED, AnswerCode.OK
    if status in _RETRYABLE_BELOW_500 or status >= httpx2.codes.INTERNAL_SERVER_ERROR:
        return AttemptOutcome.RETRYABLE, AnswerCode.UNAVAILABLE
    return AttemptOutcome.REFUSED, AnswerCode.REFUSED


def _describe(response: httpx2.Response, body: bytes) -> str:
    # The standard's phrase: the server's own may be any text of any length.
    phrase = httpx2.codes.get_reason_phrase(response.status_code)
    sentence = f"Discovery Service answered {response.status_code} {phrase}".rstrip()
    if response.is_success:
        return sentence
    if response.is_redirect:
        return f"{sentence}, which is not followed: it points to {_place(response.headers.get('location', ''))}"
    encoded = response.headers.get("content-encoding", "identity") != "identity"
    excerpt = "" if encoded else _printable(body.decode(errors="replace"))
    return f"{sentence}: {excerpt}" if excerpt else sentence


def _place(location: str) -> str:
    # User, password, query and fragment of an address may be secret.
    try:
        parts = urlsplit(location)
    except ValueError:
        return "no valid address"
    host = parts.netloc.rpartition("@")[2]
    return _printable(urlunsplit((parts.scheme, host, parts.path, "", ""))) or "nowhere"


def _printable(text: str) -> str:
    words = "".join(character if character.isprintable() else " " for character in text).split()
    sentence = " ".join(words)
    return sentence if len(sentence) <= _LONGEST_EXCERPT else f"{sentence[:_LONGEST_EXCERPT]}…"


# Below: how a deadline for a whole call is kept. httpx2 knows time-outs for single operations only, and a server
# that sends a byte now and then satisfies each of those for hours. So every operation gets what is left.


class _UntrustedError(httpcore2.ConnectError):
    """The server's certificate does not verify."""


class _Deadline(threading.local):
    """When the current thread's call has to be over, on the monotonic clock."""

    at: float = 0.0

    def left(self) -> float:
        """Return the seconds left, more than zero."""
        seconds = self.at - time.monotonic()
        if seconds <= 0:
            raise httpcore2.TimeoutException
        return seconds


class _Stream(httpcore2.NetworkStream):
    """A connection on which nothing takes longer than what is left."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 -- the base's signature
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 -- the base's signature
        # One send: a request is far smaller than a socket's buffer, which is empty when a request begins.
        self._stream.write(buffer, self._deadline.left())

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002 -- the base's signature
    ) -> httpcore2.NetworkStream:
        try:
            stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left())
        except httpcore2.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise _UntrustedError(error.__cause__.verify_message) from error
            raise
        return _Stream(stream, self._deadline)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


class _Backend(httpcore2.NetworkBackend):
    """Connects within what is left, and makes streams that keep to it."""

    def __init__(self, deadline: _Deadline) -> None:
        self._backend = httpcore2.SyncBackend()
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 -- the base's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = _resolve(host, port)
        failure: Exception = httpcore2.ConnectError("the name has no address")
        # A name may have several addresses, some of them dead: what is left is shared among the untried ones.
        # Looking a name up cannot be interrupted; when it took too long, nothing is sent any more.
        for untried, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            share = self._deadline.left() / untried
            try:
                stream = self._backend.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _Stream(stream, self._deadline)
        raise failure


def _resolve(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpcore2.ConnectError(error) from error
    return [str(address[0]) for *_, address in found]


class _Body(httpx2.SyncByteStream):
    """The body of an answer, as httpx2 wants it."""

    def __init__(self, answer: httpcore2.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        return self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


class _Transport(httpx2.BaseTransport):
    """A connection pool under a deadline. Failures leave it as httpcore2's own."""

    def __init__(self, deadline: _Deadline, ssl_context: ssl.SSLContext) -> None:
        self._pool = httpcore2.ConnectionPool(
            ssl_context=ssl_context,
            # The caller limits its concurrency; waiting here would be spent from the call's own time.
            max_connections=None,
            keepalive_expiry=_KEEPALIVE_SECONDS,
            network_backend=_Backend(deadline),
        )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        answer = self._pool.handle_request(
            httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
            )
        )
        headers = [(name, value) for name, value in answer.headers if name.lower() in _HEADERS_READ]
        return httpx2.Response(answer.status, headers=headers, stream=_Body(answer))

    def close(self) -> None:
        self._pool.close()
