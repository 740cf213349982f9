"""The fault-injecting proxy does what it says, on plain sockets, a real PostgreSQL and a real RabbitMQ."""

import hashlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

import amqp
import psycopg
import pytest

from tests.support.processes import eventually
from tests.support.proxy import (
    CutAfterCommit,
    CutAfterPublish,
    Delay,
    Dribble,
    Drop,
    HalfClose,
    Hold,
    LateAcks,
    Proxy,
    ResetAfter,
    Toward,
    Upon,
    Wire,
)
from tests.support.stack import amqp_connection


class _Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets; at the end of that, a farewell."""

    def handle(self) -> None:
        try:
            while data := self.request.recv(65_536):
                self.request.sendall(data)
            self.request.sendall(b"bye")
        except OSError:
            return


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy in front of an echo server."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with Proxy(("127.0.0.1", int(server.server_address[1]))) as proxy:
            yield proxy
        server.shutdown()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def send_all(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def receive(client: socket.socket, count: int) -> bytes:
    """Return so many bytes, or fewer where the stream ends."""
    data = bytearray()
    while len(data) < count and (piece := client.recv(count - len(data))):
        data += piece
    return bytes(data)


def assert_echoes(client: socket.socket, text: bytes = b"hello") -> None:
    client.sendall(text)
    assert receive(client, len(text)) == text


def assert_silent(client: socket.socket) -> None:
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(5)


def test_megabytes_pass_unchanged_and_a_slow_reader_is_felt_by_the_sender(proxy: Proxy) -> None:
    sent = os.urandom(1_000_000) * 80  # more than all the buffers of the kernel on the way
    with connect(proxy) as client:
        client.settimeout(20)
        writer = threading.Thread(target=send_all, args=(client, sent), daemon=True)
        writer.start()
        writer.join(0.5)
        assert writer.is_alive(), "80 MB went somewhere while nobody read the echo"
        used = time.process_time()
        writer.join(0.5)
        assert time.process_time() - used < 0.25, "it is busy though nothing moves"
        received = receive(client, len(sent) + 3)
    assert received[-3:] == b"bye"
    assert hashlib.sha256(received[:-3]).digest() == hashlib.sha256(sent).digest()
    eventually(lambda: not proxy.connected, within=5, what="the connection is over on both sides")


@pytest.mark.parametrize("fault", [Dribble(3, 0.001), Delay(0.2), Hold()])
def test_what_comes_slowly_or_late_comes_complete_and_in_order(proxy: Proxy, fault: Dribble | Delay | Hold) -> None:
    text = bytes(range(256)) * 2
    with connect(proxy) as client:
        assert_echoes(client)
        proxy.impose(fault, toward=[Toward.CLIENT])
        began_at = time.monotonic()
        client.sendall(text[:200])
        client.sendall(text[200:])
        if isinstance(fault, Hold):
            assert_silent(client)
            proxy.heal()
        assert receive(client, len(text)) == text
        assert time.monotonic() - began_at >= 0.15
        proxy.heal()
        assert_echoes(client)


def test_a_black_hole_tells_nobody_anything_and_new_connections_may_be_spared(proxy: Proxy) -> None:
    with connect(proxy) as old, connect(proxy) as leaver:
        for client in (old, leaver):
            assert_echoes(client)
        proxy.impose(Drop(), upon=Upon.EXISTING)
        old.sendall(b"lost")
        leaver.close()
        with connect(proxy) as new:
            assert_echoes(new)
            assert_silent(old)
            assert proxy.connected == 3

            proxy.heal(silently=True)
            assert_silent(old)
            assert_echoes(new)

            proxy.impose(Drop(), toward=[Toward.SERVER])
            new.sendall(b"lost too")
            assert_silent(new)
            proxy.heal()
            with pytest.raises(ConnectionResetError):
                new.recv(1)
        assert proxy.counts["bytes_dropped"] == len(b"lost") + len(b"lost too")


def test_resets_half_closes_and_refusals(proxy: Proxy) -> None:
    with connect(proxy) as client:
        proxy.impose(ResetAfter(3), toward=[Toward.CLIENT])
        client.sendall(b"hello")
        assert receive(client, 3) == b"hel"
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    proxy.heal()
    with connect(proxy) as client:
        assert_echoes(client)
        proxy.impose(HalfClose(), toward=[Toward.SERVER])
        assert receive(client, 4) == b"bye"
    proxy.heal()
    with connect(proxy) as client:
        assert_echoes(client)
        proxy.refuse()
        assert_echoes(client)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        proxy.heal()
        with connect(proxy) as other:
            assert_echoes(other)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert (proxy.counts["connections"], proxy.counts["half_closes"]) == (4, 1)
    assert proxy.counts["resets"] >= 2


def test_a_commit_is_executed_and_its_answer_lost(database_url: str) -> None:
    server = ("127.0.0.1", urlsplit(database_url).port or 0)
    with Proxy(server, speaks=Wire.POSTGRESQL) as proxy, psycopg.connect(database_url, autocommit=True) as direct:
        direct.execute("CREATE TABLE words (word text)")
        proxy.arm(CutAfterCommit(containing=b"words"))
        with psycopg.connect(proxy.url(database_url)) as client:
            client.execute("SELECT 1")
            client.commit()
            client.execute("INSERT INTO words VALUES (%s)", ["kept"])
            with pytest.raises(psycopg.OperationalError):
                client.commit()
        assert direct.execute("SELECT word FROM words").fetchall() == [("kept",)]
        with psycopg.connect(proxy.url(database_url)) as client:
            client.execute("INSERT INTO words VALUES ('once only')")
        assert proxy.counts["commits_cut"] == 1


def test_a_message_is_confirmed_and_the_confirm_lost_or_late(broker_url: str) -> None:
    server = ("127.0.0.1", urlsplit(broker_url).port or 0)
    with Proxy(server, speaks=Wire.AMQP) as proxy, amqp_connection(broker_url) as direct:
        direct.channel(1).queue_declare("letters", durable=True, auto_delete=False)

        proxy.arm(CutAfterPublish(messages=2))
        with Confirming(proxy.url(broker_url)) as client:
            client.publish()
            client.await_acks([1])
            client.publish()
            with pytest.raises((OSError, amqp.AMQPError)):
                client.await_acks([1, 2])
        declared = direct.channel(1).queue_declare("letters", passive=True)
        assert (proxy.counts["publishes_cut"], declared and declared[1]) == (1, 2)

        proxy.arm(LateAcks(every=2, seconds=0.3))
        with Confirming(proxy.url(broker_url)) as client:
            client.publish()
            client.await_acks([1])
            client.publish()
            eventually(lambda: proxy.counts["acks_late"] == 1, within=5, what="the second confirm is kept back")
            client.publish()
            client.await_acks([1, 3])
            client.await_acks([1, 3, 2])


class Confirming:
    """A connection whose channel 1 is in confirm mode, and what was confirmed on it."""

    def __init__(self, url: str) -> None:
        self.acks: list[int] = []
        self._connection = amqp_connection(url)
        self._connection.connect()
        self._channel = self._connection.channel(1)
        self._channel.confirm_select()
        events: Any = vars(self._channel)["events"]  # its stubs do not know them
        events["basic_ack"].add(lambda tag, multiple: self.acks.append(tag))  # noqa: ARG005 -- py-amqp's signature

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.collect()

    def publish(self) -> None:
        self._channel.basic_publish(amqp.Message("dear"), routing_key="letters")

    def await_acks(self, wanted: list[int]) -> None:
        deadline = time.monotonic() + 5
        while len(self.acks) < len(wanted):
            with suppress(TimeoutError):
                self._connection.drain_events(timeout=0.1)
            assert time.monotonic() < deadline, f"confirmed were {self.acks}, wanted {wanted}"
        assert self.acks == wanted
