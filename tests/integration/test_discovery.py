"""The Discovery client against a real HTTP server that misbehaves in every way the network allows."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from orchestrator import __version__
from orchestrator.discovery import Answer, AnswerCode, DiscoveryClient
from orchestrator.domain import AttemptOutcome
from tests.support.discovery_server import (
    Behaviour,
    DiscoveryServer,
    answer,
    close,
    dribble,
    endless,
    raw,
    reset,
    silence,
)

pytestmark = pytest.mark.timeout(45)

RUN_ID = UUID("0b6f1c9e-3f53-4d0e-9a51-6a3d7d0c8e11")
TRACEPARENT = "00-0b6f1c9e3f534d0e9a516a3d7d0c8e11-00f067aa0ba902b7-01"
SHORT = 0.5  # a time-out that is meant to pass
LONG = 30.0  # a time-out that must not pass: beyond it a test is on its way to its own limit

Serve = Callable[..., DiscoveryServer]
Connect = Callable[..., DiscoveryClient]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[DiscoveryServer] = []

    def start(*script: Behaviour, tls: ssl.SSLContext | None = None) -> DiscoveryServer:
        servers.append(DiscoveryServer(*script, tls=tls).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture
def connect() -> Iterator[Connect]:
    clients: list[DiscoveryClient] = []

    def start(url: str, timeout: float = LONG, **options: object) -> DiscoveryClient:
        clients.append(DiscoveryClient(url, timeout, **options))  # type: ignore[arg-type] # passed on
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    file = tmp_path / "server.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=discovery"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file, "-out", tmp_path / "c"],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + (tmp_path / "c").read_bytes())
    return file


def ask(client: DiscoveryClient, data_source_id: int = 7, theme_name: str = "新能源汽车") -> Answer:
    return client.call(run_id=RUN_ID, data_source_id=data_source_id, theme_name=theme_name, traceparent=TRACEPARENT)


def test_the_request_is_exactly_what_the_contract_says(serve: Serve, connect: Connect) -> None:
    server = serve(answer(202, b'{"job": 1}'))

    result = ask(connect(server.url))

    assert (result.outcome, result.status, result.code) == (AttemptOutcome.SUCCEEDED, 202, "ok")
    assert result.message == "Discovery Service answered 202 Accepted"
    assert result.retry_after is None
    assert 0 < result.seconds < LONG
    (request,) = server.requests
    assert request.line == "POST /discover HTTP/1.1"
    assert request.headers == {
        "host": f"127.0.0.1:{server.port}",
        "accept": "application/json",
        "accept-encoding": "identity",
        "connection": "keep-alive",
        "user-agent": f"task-orchestrator/{__version__}",
        "idempotency-key": str(RUN_ID),
        "traceparent": TRACEPARENT,
        "content-type": "application/json",
        "content-length": str(len(request.body)),
    }
    assert request.body == '{"data_source_id":7,"theme_name":"新能源汽车"}'.encode()
    assert request.json == {"data_source_id": 7, "theme_name": "新能源汽车"}


@pytest.mark.parametrize("theme", ["a", '"}\\', "🚗\u202e", "é" * 255, " x\n"])
def test_every_theme_arrives_unchanged(serve: Serve, connect: Connect, theme: str) -> None:
    server = serve(answer())

    assert ask(connect(server.url), 2**63 - 1, theme).outcome is AttemptOutcome.SUCCEEDED
    assert server.requests[0].json == {"data_source_id": 2**63 - 1, "theme_name": theme}


@pytest.mark.parametrize(
    ("status", "outcome", "code"),
    [
        *((status, AttemptOutcome.SUCCEEDED, AnswerCode.OK) for status in (200, 201, 204, 299)),
        *(
            (status, AttemptOutcome.RETRYABLE, AnswerCode.UNAVAILABLE)
            for status in (408, 425, 429, 500, 501, 502, 503, 504, 599, 600, 999)
        ),
        *(
            (status, AttemptOutcome.REFUSED, AnswerCode.REFUSED)
            for status in (300, 304, 400, 401, 403, 404, 409, 410, 422, 451, 499)
        ),
    ],
)
def test_what_a_status_means(
    serve: Serve, connect: Connect, status: int, outcome: AttemptOutcome, code: AnswerCode
) -> None:
    result = ask(connect(serve(answer(status)).url))

    assert (result.outcome, result.status, result.code) == (outcome, status, code)
    assert result.message.startswith(f"Discovery Service answered {status}")


def test_the_reason_is_shown_in_words_without_control_characters(serve: Serve, connect: Connect) -> None:
    body = "过载\x00\x1b[31m\u202e\r\n\n  try\tlater ".encode() + b"\xff" + b"!" * 10_000
    server = serve(answer(503, body))

    message = ask(connect(server.url)).message

    assert message.startswith("Discovery Service answered 503 Service Unavailable: 过载 [31m try later �!!!")
    assert message.isprintable()
    assert len(message) < 400


def test_a_compressed_body_is_neither_expanded_nor_shown(serve: Serve, connect: Connect) -> None:
    server = serve(answer(500, b"\x1f\x8b\x08 not even gzip", headers={"Content-Encoding": "gzip"}))

    assert ask(connect(server.url)).message == "Discovery Service answered 500 Internal Server Error"


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        (
            "https://user:secret@other.example:8443/discover/?token=secret#secret",
            "https://other.example:8443/discover/",
        ),
        ("/discover/?token=secret", "/discover/"),
        ("//[::1", "no valid address"),
        ("http://", "http:"),
        ("http://host:port/\xff", "http://host:port/ÿ"),
        ("", "nowhere"),
    ],
)
def test_a_redirect_is_refused_and_names_its_target_without_secrets(
    serve: Serve, connect: Connect, location: str, shown: str
) -> None:
    server = serve(answer(302, headers={"Location": location}))

    result = ask(connect(server.url))

    assert (result.outcome, result.status) == (AttemptOutcome.REFUSED, 302)
    assert shown in result.message
    assert "secret" not in result.message
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "9" * 5_000}, 366 * 86_400),
        ({"Retry-After": "-1"}, 0),
        ({"Retry-After": "\xff\x80"}, None),
        ({"Retry-After": "Sun, 06 Nov 1994 08:51:37 GMT", "Date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 120),
        ({}, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503, 500])
def test_retry_after_is_read_on_every_retryable_answer(
    serve: Serve, connect: Connect, status: int, headers: dict[str, str], expected: float | None
) -> None:
    result = ask(connect(serve(answer(status, headers=headers)).url))

    assert (result.outcome, result.status) == (AttemptOutcome.RETRYABLE, status)
    assert result.retry_after == expected


def test_a_retry_after_date_without_a_date_header_is_measured_from_now(serve: Serve, connect: Connect) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    server = serve(answer(503, headers={"Retry-After": format_datetime(until, usegmt=True)}))

    retry_after = ask(connect(server.url)).retry_after

    assert retry_after is not None
    assert 3_600 - LONG < retry_after <= 3_600


def test_retry_after_on_a_refusal_means_nothing(serve: Serve, connect: Connect) -> None:
    assert ask(connect(serve(answer(404, headers={"Retry-After": "1"})).url)).retry_after is None


@pytest.mark.parametrize(
    "behaviour",
    [
        silence(),
        answer(delay=LONG),
        dribble(b"", every=0.05),
        dribble(b"HTTP/1.1 200 OK\r\nX-Slow: ", every=0.05),
        dribble(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nX-Slow: ", every=0.05),
    ],
    ids=["silence", "late", "dribbled status line", "dribbled header", "dribbled header after 100"],
)
def test_the_time_out_is_for_the_whole_call(serve: Serve, connect: Connect, behaviour: Behaviour) -> None:
    server = serve(behaviour)

    result = ask(connect(server.url, SHORT))

    assert (result.outcome, result.status, result.code) == (AttemptOutcome.RETRYABLE, None, AnswerCode.TIMEOUT)
    assert result.message == "Discovery Service did not answer within 0.5 s"
    assert result.seconds >= SHORT
    assert server.client_left.wait(LONG)


@pytest.mark.parametrize(("status", "outcome"), [(200, AttemptOutcome.SUCCEEDED), (500, AttemptOutcome.RETRYABLE)])
class TestTheStatusStands:
    """Whatever happens to the body."""

    def test_when_the_body_is_dribbled(
        self, serve: Serve, connect: Connect, status: int, outcome: AttemptOutcome
    ) -> None:
        server = serve(dribble(b"HTTP/1.1 %d X\r\nContent-Length: 1000000\r\n\r\n" % status, every=0.05))

        result = ask(connect(server.url, SHORT))

        assert (result.outcome, result.status) == (outcome, status)
        assert server.client_left.wait(LONG)

    def test_when_the_body_is_endless(
        self, serve: Serve, connect: Connect, status: int, outcome: AttemptOutcome
    ) -> None:
        server = serve(endless(status))

        result = ask(connect(server.url))

        assert (result.outcome, result.status) == (outcome, status)
        assert result.seconds < LONG
        assert len(result.message) < 400
        assert server.client_left.wait(LONG)

    @pytest.mark.parametrize(
        "rest", [b"Content-Length: 100\r\n\r\ncut", b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n"]
    )
    def test_when_the_body_is_broken(
        self, serve: Serve, connect: Connect, status: int, outcome: AttemptOutcome, rest: bytes
    ) -> None:
        result = ask(connect(serve(raw(b"HTTP/1.1 %d X\r\n" % status + rest)).url))

        assert (result.outcome, result.status) == (outcome, status)


@pytest.mark.parametrize(
    "behaviour",
    [
        close(),
        reset(),
        raw(b"\x00\xff\x16\x03garbage\r\n\r\n"),
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nCont"),
        raw(b"HTTP/1.1 abc OK\r\n\r\n"),
        raw(b"HTTP/1.1 099 X\r\n\r\n"),
        raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\n bad folding\x00\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n"),
    ],
    ids=["close", "reset", "bytes", "ssh", "cut", "no number", "099", "101", "header", "length", "huge header"],
)
def test_what_is_no_http_answer_is_worth_another_try(serve: Serve, connect: Connect, behaviour: Behaviour) -> None:
    result = ask(connect(serve(behaviour).url))

    assert (result.outcome, result.status, result.code) == (AttemptOutcome.RETRYABLE, None, AnswerCode.NO_ANSWER)
    assert result.message.startswith("Discovery Service gave no HTTP answer: ")
    assert "Errno" not in result.message


def test_a_refused_connection_is_worth_another_try(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    result = ask(connect(f"http://user:secret@127.0.0.1:{port}/discover?token=secret"))

    assert (result.outcome, result.status, result.code) == (AttemptOutcome.RETRYABLE, None, AnswerCode.UNREACHABLE)
    assert result.message == f"Discovery Service could not be reached at 127.0.0.1:{port}: Connection refused"


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64])
def test_an_unknown_name_is_worth_another_try(connect: Connect, host: str) -> None:
    result = ask(connect(f"http://{host}/discover"))

    assert (result.outcome, result.code) == (AttemptOutcome.RETRYABLE, AnswerCode.UNREACHABLE)


def test_a_slow_name_look_up_counts_and_nothing_is_sent_after_it(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, look_up = serve(answer()), socket.getaddrinfo

    def slow(*args: object, **options: object) -> object:
        time.sleep(SHORT * 1.2)
        return look_up(*args, **options)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr(socket, "getaddrinfo", slow)

    assert ask(connect(server.url, SHORT)).code == AnswerCode.TIMEOUT
    assert server.requests == []


def test_a_dead_address_of_a_name_leaves_time_for_the_next(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, look_up = serve(answer()), socket.getaddrinfo
    # A listener that accepts nothing and whose queue is full swallows connections like a dead host.
    with socket.create_server(("127.0.0.2", server.port), backlog=0), socket.socket() as filler:
        filler.connect(("127.0.0.2", server.port))

        def both(host: str, *args: object, **options: object) -> object:
            names = ["127.0.0.2", "127.0.0.1"] if host == "discovery.test" else [host]
            return [found for name in names for found in look_up(name, *args, **options)]  # type: ignore[arg-type] # passed on

        monkeypatch.setattr(socket, "getaddrinfo", both)
        result = ask(connect(f"http://discovery.test:{server.port}/discover", 2))

    assert result.outcome is AttemptOutcome.SUCCEEDED


def test_ten_calls_in_a_row_share_one_connection(serve: Serve, connect: Connect) -> None:
    server = serve(answer(200, b"{}"), answer(503, b"busy"), answer(404, b"no"), answer(200, b"x" * 60_000))
    client = connect(server.url)

    for _ in range(10):
        ask(client)

    assert len(server.requests) == 10
    assert server.connections == 1


@pytest.mark.parametrize("first", [close(), endless(200), dribble(b"HTTP/1.1 200 OK\r\n\r\n", every=0.05)])
def test_a_spoilt_connection_is_not_used_again(serve: Serve, connect: Connect, first: Behaviour) -> None:
    server = serve(first, answer())
    client = connect(server.url, 2)
    ask(client)

    assert ask(client).outcome is AttemptOutcome.SUCCEEDED
    assert server.connections == 2


def test_a_connection_that_the_server_closed_meanwhile_costs_nothing(serve: Serve, connect: Connect) -> None:
    server = serve(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), answer())
    client = connect(server.url)
    ask(client)
    time.sleep(0.1)

    assert ask(client).outcome is AttemptOutcome.SUCCEEDED


def test_cookies_are_not_kept(serve: Serve, connect: Connect) -> None:
    server = serve(answer(headers={"Set-Cookie": "a=b"}))
    client = connect(server.url)
    ask(client)
    ask(client)

    assert "cookie" not in server.requests[1].headers


def test_a_closed_client_opens_again(serve: Serve, connect: Connect) -> None:
    server = serve(answer())
    client = connect(server.url)
    ask(client)
    client.close()
    client.close()

    assert ask(client).outcome is AttemptOutcome.SUCCEEDED
    assert server.connections == 2


def test_many_threads_share_a_client(serve: Serve, connect: Connect) -> None:
    server = serve(answer(200, b"{}"))
    client = connect(server.url)
    barrier = threading.Barrier(20)

    def work(thread: int) -> list[Answer]:
        barrier.wait()
        return [
            client.call(run_id=uuid4(), data_source_id=thread * 100 + n, theme_name="新", traceparent=TRACEPARENT)
            for n in range(1, 21)
        ]

    with ThreadPoolExecutor(20) as threads:
        answers = [each for done in threads.map(work, range(20)) for each in done]

    assert {each.outcome for each in answers} == {AttemptOutcome.SUCCEEDED}
    assert sorted(request.json["data_source_id"] for request in server.requests) == sorted(
        thread * 100 + n for thread in range(20) for n in range(1, 21)
    )
    assert server.connections <= 20


def test_the_calls_of_other_threads_do_not_put_off_a_deadline(serve: Serve, connect: Connect) -> None:
    server = serve(dribble(b"HTTP/1.1 200 OK\r\nX-Slow: ", every=0.05), answer())
    client = connect(server.url, SHORT)

    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(ask, client)
        while not server.requests:
            time.sleep(0.01)
        while not slow.done():
            assert ask(client).outcome is AttemptOutcome.SUCCEEDED

    assert slow.result().code == AnswerCode.TIMEOUT


def test_the_environment_neither_redirects_nor_signs_the_request(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    server = serve(answer())

    assert ask(connect(server.url)).outcome is AttemptOutcome.SUCCEEDED
    assert "authorization" not in server.requests[0].headers


def test_user_and_password_of_the_address_become_basic_authentication(serve: Serve, connect: Connect) -> None:
    server = serve(answer())

    ask(connect(server.url.replace("//", "//user:password@")))

    assert server.requests[0].headers["authorization"] == "Basic dXNlcjpwYXNzd29yZA=="


def test_a_mistake_of_ours_is_raised(serve: Serve, connect: Connect) -> None:
    client = connect(serve(answer()).url)

    with pytest.raises(Exception, match="Illegal header value"):
        client.call(run_id=RUN_ID, data_source_id=1, theme_name="x", traceparent="a\r\nInjected: b")
    assert ask(client).outcome is AttemptOutcome.SUCCEEDED


class TestTls:
    """HTTPS."""

    def test_an_unknown_authority_is_refused(self, serve: Serve, connect: Connect, certificate: Path) -> None:
        server = serve(answer(), tls=_server_context(certificate))

        result = ask(connect(server.url))

        assert (result.outcome, result.status, result.code) == (AttemptOutcome.REFUSED, None, AnswerCode.UNTRUSTED)
        assert result.message == "Discovery Service's certificate is not trusted: self-signed certificate"
        assert server.requests == []

    def test_a_companys_own_authority_is_trusted(
        self, serve: Serve, connect: Connect, certificate: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        server = serve(answer(), tls=_server_context(certificate))
        client = connect(server.url)

        assert [ask(client).outcome for _ in range(3)] == [AttemptOutcome.SUCCEEDED] * 3
        assert server.connections == 1

    def test_a_certificate_for_another_name_is_refused(self, serve: Serve, connect: Connect, certificate: Path) -> None:
        server = serve(answer(), tls=_server_context(certificate))
        trusting = ssl.create_default_context(cafile=certificate)

        result = ask(connect(server.url.replace("127.0.0.1", "localhost"), ssl_context=trusting))

        assert (result.outcome, result.code) == (AttemptOutcome.REFUSED, AnswerCode.UNTRUSTED)

    def test_a_server_without_tls_is_worth_another_try(self, connect: Connect) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=_say, args=(listener, b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True).start()

            result = ask(connect(f"https://127.0.0.1:{listener.getsockname()[1]}/discover"))

        assert (result.outcome, result.code) == (AttemptOutcome.RETRYABLE, AnswerCode.UNREACHABLE)

    def test_a_handshake_that_does_not_end_counts(self, connect: Connect) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            result = ask(connect(f"https://127.0.0.1:{listener.getsockname()[1]}/discover", SHORT))

        assert (result.outcome, result.code) == (AttemptOutcome.RETRYABLE, AnswerCode.TIMEOUT)

    def test_a_dribbled_answer_counts(self, serve: Serve, connect: Connect, certificate: Path) -> None:
        server = serve(dribble(b"HTTP/1.1 200 OK\r\nX-Slow: ", every=0.05), tls=_server_context(certificate))
        trusting = ssl.create_default_context(cafile=certificate)

        result = ask(connect(server.url, SHORT, ssl_context=trusting))

        assert result.code == AnswerCode.TIMEOUT
        assert server.client_left.wait(LONG)


def _server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def _say(listener: socket.socket, words: bytes) -> None:
    connected, _ = listener.accept()
    with connected:
        connected.recv(65_536)
        connected.sendall(words)
