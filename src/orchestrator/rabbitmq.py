"""Pipelined publisher confirms on one RabbitMQ connection: frames from templates, large writes.

py-amqp opens the connection (TLS, login, channel, queues). From then on this module owns the socket: a batch is
a few large non-blocking writes, and what the broker says meanwhile (ack, nack, return, blocked, close) is read
between and during them, so that neither side can wait for the other. Every wait ends in time (:class:`Patience`).

A message is confirmed when it was acked, not nacked and not returned: an unroutable message is returned *and*
acked. After anything but a complete success the connection is thrown away, for a late ack of the old batch
would confirm a message of the next one. Only one that the broker blocked is kept for a while, to listen on: a broker
short of memory keeps those that their clients drop, too, until it has recovered.
"""

import math
import os
import re
import select
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from time import monotonic
from typing import Any, Final, Self

import amqp
from amqp import method_framing
from amqp.exceptions import AMQPError, ChannelError
from kombu.transport import pyamqp
from kombu.utils.url import url_to_parts
from pamqp import commands
from pamqp.exceptions import PAMQPException
from pamqp.frame import FrameTypes, marshal, unmarshal
from pamqp.header import ContentHeader
from pydantic import SecretStr

from orchestrator.domain import APP_ID, QueueStanding
from orchestrator.errors import (
    BrokerBlockedError,
    BrokerUnreachableError,
    ConfigurationError,
    ConfirmTimeoutError,
    MessageRefusedError,
    PublishError,
    QueueMissingError,
)

MESSAGES_PER_WRITE: Final = 500
WINDOW: Final = 5_000
"""At most this many messages are unconfirmed at a time."""

UNREADABLE: Final = "x-orchestrator-unreadable-properties"
"""Header of a message whose properties and headers could not be decoded: those bytes, as Python writes them."""
_LONGEST_UNREADABLE: Final = 2_000

_CHANNEL: Final = 1
_BODY_LIMIT: Final = 4_096 - 8  # every AMQP peer accepts frames of 4,096 bytes
_READ_SIZE: Final = 65_536
_UNKNOWN, _ACKED, _NACKED = b"\0", b"\1", b"\2"
_FRAME_END: Final = b"\xce"
_HEADER_FRAME: Final = 2
_FRAME_HEAD: Final = struct.Struct(">BHI")
_ACK: Final = struct.pack(">HH", 60, 80)
_ACK_ARGUMENTS: Final = struct.Struct(">Q?")
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds.

    Attributes:
        connect: TCP connection, TLS and each answer of the handshake.
        answer: each answer while the channel and the queue are set up.
        open: all of that together.
        confirm: without any progress: nothing confirmed and nothing accepted for sending.
        blocked: the same once the broker has said that it is blocked, for what it read before.
        batch: one batch in all.
        recovery: how long a blocked connection is listened on for the alarm's end before another one is tried.
        goodbye: the answer when a good connection is closed.
        idle: a connection unused for longer is replaced. Heartbeats are off, for nobody would serve them between
            batches: a network that forgot the connection goes unnoticed until the next write.
    """

    connect: float = 5.0
    answer: float = 10.0
    open: float = 12.0
    confirm: float = 10.0
    blocked: float = 0.5
    batch: float = math.inf
    recovery: float = 300.0
    goodbye: float = 1.0
    idle: float = 20.0


class Line:
    """A connection for publishing, opened when it is needed. Used by one thread at a time.

    Args:
        url: ``amqp://`` or ``amqps://``, read as Celery reads it. ``amqps`` verifies the broker's certificate and
            name against the system's authorities (``SSL_CERT_FILE`` names others).
        set_up: makes sure of the queues, on every new connection.
        patience: how long to wait.

    Raises:
        ConfigurationError: the address cannot be read.
    """

    def __init__(
        self, url: SecretStr, set_up: Callable[[pyamqp.Connection], object], patience: Patience = Patience()
    ) -> None:
        self._address = _Address.parse(url)
        self._set_up = set_up
        self._patience = patience
        self._session: _Session | None = None
        self._blocked: _Session | None = None

    def __str__(self) -> str:
        return str(self._address)

    def open(self) -> None:
        """Connect, unless there is a good connection.

        Raises:
            PublishError: it cannot.
        """
        self._ready()

    def send(self, template: "FrameTemplate", messages: Iterable[tuple[bytes, ...]]) -> "Fate":
        """Publish messages and await their confirms, within :attr:`Patience.batch` and the time to connect.

        They are taken bit by bit, while the broker is busy with those before: making all first would cost a tenth
        of the rate.
        """
        try:
            session = self._ready()
        except PublishError as error:
            return Fate(error=error)
        # Whatever interrupts us (a Celery time limit is an exception from a signal handler) must not leave a
        # connection behind that owes acks or the rest of a frame.
        self._session = None
        fate: Fate | None = None
        try:
            fate = session.send(template, iter(messages))
        finally:
            if fate is not None and fate.error is None:
                self._session = session
            elif fate is not None and isinstance(fate.error, BrokerBlockedError):
                self._blocked = session
            else:
                session.reset()
        return fate

    def reopen(self) -> None:
        """Have the queues made sure of: on a new connection, unless the broker is known to be blocked.

        Raises:
            PublishError: it cannot.
        """
        if self._blocked is None:
            self.close()
        self._ready()

    def close(self) -> None:
        """Let go of the connection, within :attr:`Patience.goodbye`. Publishing again opens a new one."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close()
        self._forget_blocked()

    def _forget_blocked(self) -> None:
        if self._blocked is not None:
            session, self._blocked = self._blocked, None
            session.reset()

    def _ready(self) -> "_Session":
        if self._blocked is not None:
            self._blocked.require_unblocked()
            self._forget_blocked()
        if self._session is not None and not self._session.is_good():
            self.close()
        if self._session is None:
            self._session = _Session(self._address, self._set_up, self._patience)
        return self._session


class FrameTemplate:
    """The bytes of one kind of message to a queue, marshalled once: only placeholders and body vary.

    Args:
        queue: addressed through the default exchange; where it is missing, messages are returned.
        properties: with placeholders in them.
        placeholders: what to replace in the marshalled properties, wherever it occurs, by as many other bytes.
        mandatory: whether a message that no queue takes is an error, or confirmed and gone.
    """

    def __init__(
        self, queue: str, properties: commands.Basic.Properties, *placeholders: bytes, mandatory: bool = True
    ) -> None:
        self.queue = queue
        publish = commands.Basic.Publish(exchange="", routing_key=queue, mandatory=mandatory)
        self._method = marshal(publish, _CHANNEL)
        self._properties = properties
        self._placeholder = re.compile(b"|".join(map(re.escape, placeholders)))
        found = self._placeholder.findall(properties.marshal())
        self._pick = itemgetter(*map(placeholders.index, found), -1)
        self._layouts: dict[int, bytes] = {}  # by length of the body

    def fill(self, messages: Iterable[tuple[bytes, ...]]) -> bytes:
        """Return the frames of messages, each the placeholders' values and then a body, one after another.

        Raises:
            ValueError: a body is empty or too long for one frame.
        """
        layouts, pick = self._layouts, self._pick
        frames: list[bytes] = []
        for message in messages:
            layout = layouts.get(len(message[-1])) or self._learn(len(message[-1]))
            frames.append(layout % pick(message))
        return b"".join(frames)

    def _learn(self, size: int) -> bytes:
        if not 0 < size <= _BODY_LIMIT:
            raise ValueError(f"a body must have 1 to {_BODY_LIMIT} bytes, got {size}")
        header = _literal(marshal(ContentHeader(body_size=size, properties=self._properties), _CHANNEL))
        body_head = _literal(_FRAME_HEAD.pack(3, _CHANNEL, size))
        layout = _literal(self._method) + self._placeholder.sub(b"%b", header) + body_head + b"%b" + _FRAME_END
        self._layouts[size] = layout
        return layout


def _literal(data: bytes) -> bytes:
    return data.replace(b"%", b"%%")


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


class Fate:
    """What the broker has said of each message of one batch, by position."""

    def __init__(self, first_tag: int = 1, error: PublishError | None = None) -> None:
        self.error = error
        self._first_tag = first_tag
        self._marks = bytearray()
        self._settled = 0
        self._returned: set[bytes] = set()
        self._refused = False
        # All before this position are settled.
        self._low = 0

    @property
    def sent(self) -> int:
        """How many messages."""
        return len(self._marks)

    @property
    def unconfirmed(self) -> int:
        """Of how many nothing is known yet."""
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


class _Session:
    """One connection with one channel in confirm mode, set up.

    Raises:
        PublishError: from the constructor, it could not be opened.
    """

    def __init__(self, address: _Address, set_up: Callable[[pyamqp.Connection], object], patience: Patience) -> None:
        self._blocked: str | None = None
        self._address = address
        self._patience = patience
        self._process = os.getpid()
        self._socket = _open(address, set_up, patience)
        self._socket.settimeout(0)
        self._poll = select.poll()
        self._poll.register(self._socket)
        self._inbox = bytearray()
        self._outgoing = memoryview(b"")
        self._fate = Fate()
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

    def require_unblocked(self) -> None:
        """Take in what the broker said meanwhile; how this connection is besides does not matter.

        Raises:
            BrokerBlockedError: it is still in alarm, and has been for less than :attr:`Patience.recovery`.
        """
        if self._process != os.getpid() or monotonic() - self._used_at > self._patience.recovery:
            return
        with suppress(OSError, PAMQPException, BrokerUnreachableError):
            self._read()
            if self._blocked is not None:
                raise self._out_of_patience()

    def send(self, template: FrameTemplate, messages: Iterator[tuple[bytes, ...]]) -> Fate:
        """Publish messages and await their confirms."""
        fate = self._fate = Fate(self._next_tag)
        self._moved_at = monotonic()
        self._give_up_at = self._moved_at + self._patience.batch
        try:
            while chunk := list(islice(messages, MESSAGES_PER_WRITE)):
                self._outgoing = memoryview(template.fill(chunk))
                fate.expect(len(chunk))
                self._pump(WINDOW - MESSAGES_PER_WRITE)
                if fate.verdict(template.queue):
                    break
            self._pump(0)
            fate.error = fate.verdict(template.queue)
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


def _open(address: _Address, set_up: Callable[[pyamqp.Connection], object], patience: Patience) -> socket.socket:
    """Return a socket with a session on it, set up, with a channel in confirm mode, within :attr:`Patience.open`.

    py-amqp's connection object is let go: nothing in it runs when it is collected, and the socket stays open.

    Raises:
        PublishError: any of it failed.
    """
    connection = _connection(address, patience)
    with _broken_after(patience.open, connection):
        return _opened(connection, address, set_up, patience)


def survey(url: SecretStr, names: Sequence[str], patience: Patience = Patience()) -> list[QueueStanding]:
    """Ask a broker how its queues stand, on a connection for the moment; within :attr:`Patience.open`.

    Raises:
        ConfigurationError: the address cannot be read.
    """
    address = _Address.parse(url)
    connection = _connection(address, patience)
    try:
        with _broken_after(patience.open, connection):
            connection.connect()
            return [_standing(connection, name) for name in names]
    except _FOREIGN as error:
        problem = f"{address} cannot be reached: {_reason(error)}"
        return [QueueStanding(name, problem=problem) for name in names]
    finally:
        with suppress(*_FOREIGN):
            connection.collect()


def _standing(connection: pyamqp.Connection, name: str) -> QueueStanding:
    try:
        channel: Any = connection.channel()  # the stubs lack the answer
        with closing(channel):
            found = channel.queue_declare(name, passive=True)
    except ChannelError as error:
        return QueueStanding(name, problem=_reason(error))
    return QueueStanding(name, found.message_count, found.consumer_count)


def frame_handler(connection: object, callback: Callable[..., object]) -> Callable[[tuple[int, int, bytes]], object]:
    """Read frames as py-amqp does, and messages whose properties it cannot decode without them: see ``UNREADABLE``.

    Otherwise such a message (a time in milliseconds, text that is not UTF-8) would end the loop that consumes, and then
    that of every worker which the broker gives it to next.
    """
    handle: Callable[[tuple[int, int, bytes]], object] = method_framing.frame_handler(connection, callback)

    def on_frame(frame: tuple[int, int, bytes]) -> object:
        kind, channel, payload = frame
        return handle((kind, channel, _readable(payload)) if kind == _HEADER_FRAME else frame)

    return on_frame


def _readable(header: bytes) -> bytes:
    message: Any = amqp.Message()  # the stubs know nothing of reading
    try:
        message.inbound_header(header)
    except Exception:  # noqa: BLE001 -- whatever strange bytes make of a decoder
        raw = ascii(bytes(header[12 : 12 + _LONGEST_UNREADABLE]))  # after class, weight and size
        properties = commands.Basic.Properties(headers={UNREADABLE: raw})
        return ContentHeader(body_size=message.body_size, properties=properties).marshal()
    return header


def socket_of(connection: object) -> socket.socket | None:
    """Return the socket of a connection of py-amqp's, if it has one; its public names connect where nothing is yet."""
    sock: socket.socket | None = getattr(getattr(connection, "_transport", None), "sock", None)
    return sock


def break_off(connection: object) -> None:
    """Break a connection of py-amqp's, from another thread than the one that waits for it."""
    if (sock := socket_of(connection)) is not None:
        with suppress(OSError):
            # TLS has its own idea of shutdown, which waits for the other side.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


@contextmanager
def _broken_after(seconds: float, connection: pyamqp.Connection) -> Iterator[None]:
    """Break a connection that is not open in time: py-amqp's own time-outs begin anew with every byte that arrives."""
    timer = threading.Timer(seconds, break_off, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _opened(
    connection: pyamqp.Connection,
    address: _Address,
    set_up: Callable[[pyamqp.Connection], object],
    patience: Patience,
) -> socket.socket:
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
        connection.channel(_CHANNEL).confirm_select()
        set_up(connection)
    except ChannelError as error:
        _reset(sock)
        # The broker's words name the queue.
        raise QueueMissingError(f"a queue on {address} cannot be used: {_reason(error)}") from None
    except _FOREIGN as error:
        _reset(sock)
        raise BrokerUnreachableError(f"{address} cannot be reached: {_reason(error)}") from None
    return sock


def _connection(address: _Address, patience: Patience) -> pyamqp.Connection:
    return pyamqp.Connection(
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
