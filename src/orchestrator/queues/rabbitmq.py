"""Extraction messages to RabbitMQ: frames from a template, large writes, pipelined publisher confirms.

py-amqp opens the connection (TLS, login, channel, queue). From then on this module owns the socket: a batch is
a few large non-blocking writes, and what the broker says meanwhile (ack, nack, return, blocked, close) is read
between and during them, so that neither side can wait for the other. Every wait ends in time (:class:`Patience`).

A message is confirmed when it was acked, not nacked and not returned: an unroutable message is returned *and*
acked. After anything but a complete success the connection is thrown away, for a late ack of the old batch
would confirm a message of the next one.
"""

import os
import select
import socket
import ssl
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from itertools import compress, islice
from time import monotonic
from typing import Any, Final, Self

import amqp
from amqp.exceptions import AMQPError, ChannelError, NotFound
from kombu.utils.url import url_to_parts
from pamqp import commands
from pamqp.exceptions import PAMQPException
from pamqp.frame import FrameTypes, marshal, unmarshal
from pamqp.header import ContentHeader
from pydantic import SecretStr
from sqlalchemy import Connection

from orchestrator.domain import APP_ID, EXTRACTION_TYPE, ExtractionBatch
from orchestrator.errors import (
    BrokerBlockedError,
    BrokerUnreachableError,
    ConfigurationError,
    ConfirmTimeoutError,
    MessageRefusedError,
    PublishError,
    QueueMissingError,
)
from orchestrator.queues import Receipt

MESSAGES_PER_WRITE: Final = 500
WINDOW: Final = 5_000
"""At most this many messages are unconfirmed at a time."""

_READ_SIZE: Final = 65_536
_UNKNOWN, _ACKED, _NACKED = b"\0", b"\1", b"\2"
_FRAME_END: Final = b"\xce"
_FRAME_HEAD: Final = struct.Struct(">BHI")
_ACK: Final = struct.pack(">HH", 60, 80)
_ACK_ARGUMENTS: Final = struct.Struct(">Q?")
_ANY_MESSAGE_ID: Final = "?" * 36
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds.

    Attributes:
        connect: TCP connection, TLS and each answer of the handshake.
        answer: each answer while the channel and the queue are set up.
        confirm: without any progress: nothing confirmed and nothing accepted for sending.
        blocked: the same once the broker has said that it is blocked, for what it read before.
        batch: one batch in all; below the ledger's ``idle_in_transaction_session_timeout`` of 30 s.
        goodbye: the answer when a good connection is closed.
        idle: a connection unused for longer is replaced. Heartbeats are off, for nobody would serve them between
            batches: a network that forgot the connection goes unnoticed until the next write.
    """

    connect: float = 5.0
    answer: float = 10.0
    confirm: float = 10.0
    blocked: float = 0.5
    batch: float = 20.0
    goodbye: float = 1.0
    idle: float = 20.0


class RabbitMQPublisher:
    """Publishes extraction requests to one queue of RabbitMQ; see :class:`orchestrator.queues.Publisher`.

    Args:
        url: ``amqp://`` or ``amqps://``, read as Celery reads it. ``amqps`` verifies the broker's certificate and
            name against the system's authorities (``SSL_CERT_FILE`` names others).
        queue: used as it is; declared durable and without arguments where it is missing.
        patience: how long to wait.

    Raises:
        ConfigurationError: the address cannot be read.
    """

    def __init__(self, url: SecretStr, queue: str, *, patience: Patience = Patience()) -> None:
        self._address = _Address.parse(url)
        self._queue = queue
        self._patience = patience
        self._line: _Line | None = None

    def prepare(self) -> None:
        """Connect, unless there is a good connection.

        Raises:
            PublishError: it cannot.
        """
        self._ready_line()

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:  # noqa: ARG002 -- the port's signature
        """Publish a batch; return within :attr:`Patience.batch` and the time to connect."""
        sources = [source for source, _ in batch.sources]
        if not sources:
            return Receipt(())
        try:
            line = self._ready_line()
        except PublishError as error:
            return Receipt((), error)
        # Made while the broker is busy with those before; making all first would cost a tenth of the rate.
        messages = ((message_id.encode(), body) for _, message_id, body in batch.messages())
        fate = self._send(line, extraction_template(self._queue, batch.traceparent, line.channel), messages)
        if fate.error is None:
            return Receipt(sources)
        ids = (message_id.encode() for _, message_id, _ in batch.messages())
        return Receipt(list(compress(sources, fate.confirmed(ids))), fate.error)

    def check(self) -> str:
        """Connect anew, make sure of the queue, and return where it is, without credentials.

        A broker in alarm goes unnoticed: it tells a connection only when that publishes.

        Raises:
            PublishError: the queue cannot be used now.
        """
        self.close()
        self._line = _Line(self._address, self._queue, self._patience)
        return f"queue {self._queue} on {self._address}"

    def close(self) -> None:
        """Let go of the connection, within :attr:`Patience.goodbye`. Publishing again opens a new one."""
        if self._line is not None:
            line, self._line = self._line, None
            line.close()

    def _send(self, line: "_Line", template: "FrameTemplate", messages: Iterator[tuple[bytes, bytes]]) -> "_Fate":
        # Whatever interrupts us (a Celery time limit is an exception from a signal handler) must not leave a
        # connection behind that owes acks or the rest of a frame.
        self._line = None
        fate: _Fate | None = None
        try:
            fate = line.send(template, messages)
        finally:
            if fate is not None and fate.error is None:
                self._line = line
            else:
                line.reset()
        return fate

    def _ready_line(self) -> "_Line":
        if self._line is not None and not self._line.is_good():
            self.close()
        if self._line is None:
            self._line = _Line(self._address, self._queue, self._patience)
        return self._line


def extraction_template(queue: str, traceparent: str, channel: int) -> "FrameTemplate":
    """Return the frames of an extraction message, addressed to its queue and to be returned if that is missing."""
    return FrameTemplate(
        channel,
        commands.Basic.Publish(exchange="", routing_key=queue, mandatory=True),
        commands.Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            message_type=EXTRACTION_TYPE,
            app_id=APP_ID,
            headers={"traceparent": traceparent},
        ),
    )


class FrameTemplate:
    """The bytes of one kind of message, marshalled once: only message id and body vary.

    Args:
        channel: number of the AMQP channel.
        publish: exchange, routing key and flags.
        properties: all but the message id.
        body_limit: the longest body, in bytes; every AMQP peer accepts frames of 4,096 bytes.
    """

    def __init__(
        self,
        channel: int,
        publish: commands.Basic.Publish,
        properties: commands.Basic.Properties,
        *,
        body_limit: int = 4_096 - 8,
    ) -> None:
        self._channel = channel
        self._method = marshal(publish, channel)
        self._properties = copy(properties)
        self._properties.message_id = _ANY_MESSAGE_ID
        self._body_limit = body_limit
        # By length of the body: what stands before the message id, and what between it and the body.
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def fill(self, messages: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Return the frames of messages, each an ASCII id of 36 characters and a body, one after another.

        Raises:
            ValueError: a body is empty or longer than the limit.
        """
        around = self._around
        parts: list[bytes] = []
        for message_id, body in messages:
            before, between = around.get(len(body)) or self._learn(len(body))
            parts += (before, message_id, between, body, _FRAME_END)
        return b"".join(parts)

    def _learn(self, size: int) -> tuple[bytes, bytes]:
        if not 0 < size <= self._body_limit:
            raise ValueError(f"a body must have 1 to {self._body_limit} bytes, got {size}")
        header = marshal(ContentHeader(body_size=size, properties=self._properties), self._channel)
        before, _, after = header.rpartition(_ANY_MESSAGE_ID.encode())
        parts = self._method + before, after + _FRAME_HEAD.pack(3, self._channel, size)
        self._around[size] = parts
        return parts


@dataclass(frozen=True, slots=True)
class _Address:
    """A broker's address; as text it has no credentials."""

    host: str
    port: int
    vhost: str
    user: str
    password: SecretStr
    tls: bool

    @classmethod
    def parse(cls, url: SecretStr) -> Self:
        try:
            parts = url_to_parts(url.get_secret_value())
        except ValueError:
            # The original quotes pieces of the address, possibly of the password.
            raise ConfigurationError("the broker's address is not amqp://user:password@host:port/vhost") from None
        tls = parts.scheme == "amqps"
        return cls(
            host=parts.hostname or "localhost",
            port=parts.port or (5671 if tls else 5672),
            vhost=parts.path or "/",
            user=parts.username or "guest",
            password=SecretStr(parts.password or "guest"),
            tls=tls,
        )

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'amqps' if self.tls else 'amqp'}://{self.netloc}/{'' if self.vhost == '/' else self.vhost}"


class _Fate:
    """What the broker has said of each message of one batch, by position."""

    def __init__(self, first_tag: int) -> None:
        self.error: PublishError | None = None
        self._first_tag = first_tag
        self._marks = bytearray()
        self._settled = 0
        self._returned: set[bytes] = set()
        self._refused = False
        # All before this position are settled.
        self._low = 0

    @property
    def sent(self) -> int:
        return len(self._marks)

    @property
    def unconfirmed(self) -> int:
        return len(self._marks) - self._settled

    def expect(self, count: int) -> None:
        """Note that so many more messages are sent."""
        self._marks += _UNKNOWN * count

    def settle(self, tag: int, mark: bytes, *, multiple: bool) -> None:
        """Note an ack or a nack of one delivery tag, or of all up to it."""
        end = tag - self._first_tag + 1
        start = end - 1
        if multiple:
            start, end = self._low, min(end, self.sent)
            self._low = max(start, end)
        if 0 <= start < end <= self.sent:
            self._settled += self._marks.count(_UNKNOWN, start, end)
            self._marks[start:end] = self._marks[start:end].replace(_UNKNOWN, mark)
            self._refused |= mark == _NACKED

    def give_back(self, message_id: str | None) -> None:
        """Note that a message was returned as unroutable; its ack follows."""
        self._returned.add((message_id or "").encode())

    def verdict(self, queue: str) -> PublishError | None:
        """Return what the broker's answers say against the batch."""
        if self._returned:
            return QueueMissingError(f"the broker returned messages: there is no queue {queue}")
        if self._refused:
            return MessageRefusedError(f"the broker refused messages for queue {queue}; it may be full")
        return None

    def confirmed(self, message_ids: Iterable[bytes]) -> Iterator[bool]:
        """Yield of each message that was sent, given the ids of all, whether the broker took it."""
        acked = _ACKED[0]
        for mark, message_id in zip(self._marks, message_ids, strict=False):
            yield mark == acked and message_id not in self._returned


class _Line:
    """One connection with one channel in confirm mode; the queue exists when it opens.

    Raises:
        PublishError: from the constructor, it could not be opened.
    """

    def __init__(self, address: _Address, queue: str, patience: Patience) -> None:
        self._blocked: str | None = None
        self._address = address
        self._queue = queue
        self._patience = patience
        self._process = os.getpid()
        self._socket, self.channel = _open(address, queue, patience)
        self._socket.settimeout(0)
        self._poll = select.poll()
        self._poll.register(self._socket)
        self._inbox = bytearray()
        self._outgoing = memoryview(b"")
        self._fate = _Fate(first_tag=1)
        self._next_tag = 1
        self._moved_at = self._used_at = monotonic()
        self._give_up_at = 0.0

    def is_good(self) -> bool:
        """Whether it may be used again; takes in what the broker said meanwhile, without waiting."""
        if self._process != os.getpid() or monotonic() - self._used_at > self._patience.idle:
            return False
        try:
            self._read()
        except (OSError, PAMQPException, PublishError):
            return False
        return True

    def send(self, template: FrameTemplate, messages: Iterator[tuple[bytes, bytes]]) -> _Fate:
        """Publish messages, each an id and a body, and wait for their confirms."""
        fate = self._fate = _Fate(self._next_tag)
        self._moved_at = monotonic()
        self._give_up_at = self._moved_at + self._patience.batch
        try:
            while chunk := list(islice(messages, MESSAGES_PER_WRITE)):
                self._outgoing = memoryview(template.fill(chunk))
                fate.expect(len(chunk))
                self._pump(WINDOW - MESSAGES_PER_WRITE)
                if fate.verdict(self._queue):
                    break
            self._pump(0)
            fate.error = fate.verdict(self._queue)
        except PublishError as error:
            fate.error = error
        except (OSError, PAMQPException) as error:
            fate.error = BrokerUnreachableError(f"the connection to {self._address} broke: {_reason(error)}")
        self._next_tag += fate.sent
        self._used_at = monotonic()
        return fate

    def _pump(self, most: int) -> None:
        """Write all that is to be written, and read until at most ``most`` messages are unconfirmed."""
        while self._outgoing or self._fate.unconfirmed > most:
            patience = self._patience.confirm if self._blocked is None else self._patience.blocked
            remaining = min(self._moved_at + patience, self._give_up_at) - monotonic()
            if remaining <= 0:
                raise self._out_of_patience()
            writing = bool(self._outgoing) and self._blocked is None
            self._poll.modify(self._socket, select.POLLIN | select.POLLOUT if writing else select.POLLIN)
            for _, event in self._poll.poll(remaining * 1_000):
                if event & ~select.POLLOUT:
                    self._read()
                if writing and event & select.POLLOUT:
                    self._write()

    def _out_of_patience(self) -> PublishError:
        if self._blocked is not None:
            return BrokerBlockedError(f"{self._address} accepts no messages now: {self._blocked}")
        return ConfirmTimeoutError(f"{self._address} left {self._fate.unconfirmed} messages unconfirmed for too long")

    def _write(self) -> None:
        try:
            sent = self._socket.send(self._outgoing)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        self._outgoing = self._outgoing[sent:]
        self._moved_at = monotonic()

    def _read(self) -> None:
        """Take in all that has arrived, without waiting."""
        while True:
            try:
                data = self._socket.recv(_READ_SIZE)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            if not data:
                raise ConnectionResetError("the broker closed it")
            self._inbox += data
            self._take_frames()

    def _take_frames(self) -> None:
        inbox = self._inbox
        start = 0
        while len(inbox) - start > _FRAME_HEAD.size:
            _, _, size = _FRAME_HEAD.unpack_from(inbox, start)
            payload = start + _FRAME_HEAD.size
            end = payload + size + 1
            if end > len(inbox):
                break
            if inbox.startswith(_ACK, payload):
                tag, multiple = _ACK_ARGUMENTS.unpack_from(inbox, payload + len(_ACK))
                self._fate.settle(tag, _ACKED, multiple=multiple)
            else:
                self._take(unmarshal(bytes(inbox[start:end]))[2])
            start = end
        if start:
            del inbox[:start]
            self._moved_at = monotonic()

    def _take(self, frame: FrameTypes) -> None:
        match frame:
            case commands.Basic.Nack():
                self._fate.settle(frame.delivery_tag, _NACKED, multiple=frame.multiple)
            case ContentHeader():
                # Only a returned message has content: nothing is consumed on this channel.
                self._fate.give_back(frame.properties.message_id)
            case commands.Connection.Blocked():
                self._blocked = frame.reason or "resource alarm"
            case commands.Connection.Unblocked():
                self._blocked = None
            case commands.Channel.Close() | commands.Connection.Close():
                raise BrokerUnreachableError(f"{self._address} ended the session: {frame.reply_text}")

    def close(self) -> None:
        """Say goodbye; in a forked child just let go, for the parent goes on."""
        if self._process == os.getpid():
            with suppress(OSError):
                self._socket.settimeout(self._patience.goodbye)
                self._socket.sendall(marshal(commands.Connection.Close(200, "closed", 0, 0), 0))
                # Without waiting for the answer, the broker logs a client that left unexpectedly.
                self._socket.recv(_READ_SIZE)
        self._socket.close()

    def reset(self) -> None:
        """Drop the connection and what the kernel has not sent yet."""
        _reset(self._socket)


def _open(address: _Address, queue: str, patience: Patience) -> tuple[socket.socket, int]:
    """Return a socket with a session on it, and the number of its channel in confirm mode; the queue exists.

    py-amqp's connection object is let go: nothing in it runs when it is collected, and the socket stays open.

    Raises:
        PublishError: any of it failed.
    """
    connection = _connection(address, patience)
    try:
        connection.connect()
        sock: socket.socket = connection.transport.sock
    except _FOREIGN as error:
        if connection.connected:
            connection.collect()
        raise BrokerUnreachableError(f"{address} cannot be reached: {_reason(error)}") from None
    try:
        # py-amqp's own time-outs are forgotten in the middle of a frame; this one is not.
        sock.settimeout(patience.answer)
        return sock, _set_up(connection, queue)
    except ChannelError as error:
        _reset(sock)
        raise QueueMissingError(f"queue {queue} on {address} cannot be used: {_reason(error)}") from None
    except _FOREIGN as error:
        _reset(sock)
        raise BrokerUnreachableError(f"{address} cannot be reached: {_reason(error)}") from None


def _connection(address: _Address, patience: Patience) -> amqp.Connection:
    return amqp.Connection(
        host=address.netloc,
        userid=address.user,
        password=address.password.get_secret_value(),
        # Else a broker that offers EXTERNAL is answered with it, and without the password.
        login_method="PLAIN",
        virtual_host=address.vhost,
        client_properties={"connection_name": f"{APP_ID} publisher", "product": APP_ID},
        # With ssl=True py-amqp would check the chain but not the name.
        ssl={"server_hostname": address.host} if address.tls else False,
        connect_timeout=patience.connect,
        heartbeat=0,
        # py-amqp's default of 1 s ends the connection whenever a busy broker stops reading for a second.
        socket_settings=_socket_settings(patience),
    )


def _socket_settings(patience: Patience) -> dict[Any, int]:
    # The option's number is the key, whatever the type stubs say.
    return {socket.TCP_USER_TIMEOUT: round(patience.confirm * 1_000)} if sys.platform == "linux" else {}


def _set_up(connection: amqp.Connection, queue: str) -> int:
    channel = connection.channel()
    try:
        channel.queue_declare(queue, passive=True)
    except NotFound:
        # The broker closed the channel, and py-amqp has opened it again.
        channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.confirm_select()
    return int(channel.channel_id or 0)


def _reset(sock: socket.socket) -> None:
    # Not through py-amqp: its close waits for the broker, and so does its shutdown of TLS.
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    sock.close()


# A peer that does not speak AMQP makes py-amqp fail in any of these ways; ValueError is also a host name that is
# none.
_FOREIGN: Final = (OSError, AMQPError, LookupError, ValueError, struct.error)


def _reason(error: BaseException) -> str:
    if isinstance(error, AMQPError):
        return str(error.reply_text or error)
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
