"""A TCP proxy in front of a real server that does to connections what networks do to them.

    with Proxy(("127.0.0.1", rabbitmq.port), speaks=Wire.AMQP) as proxy:
        stack = Stack.on_rabbitmq(database, rabbitmq.url, directory, BROKER_URL=proxy.url(rabbitmq.url))
        proxy.impose(Drop(), toward=[Toward.SERVER])
        ...
        proxy.heal()

One thread serves all connections. What it reads and cannot pass on yet is bounded: beyond that the sender's kernel
feels it, as on a real path. A call of a test returns when what it asked for has been done.
"""

import math
import selectors
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from time import monotonic
from typing import Final, Protocol, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

Answer = TypeVar("Answer")

_BOUND: Final = 256 * 1024
"""Bytes that are read ahead of what was passed on, in each direction of a connection."""
_READ_SIZE: Final = 65_536
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Toward(Enum):
    """A direction."""

    SERVER = "server"
    CLIENT = "client"


class Upon(Enum):
    """Which connections a fault is for."""

    ALL = "all"
    EXISTING = "existing"
    NEW = "new"


class Wire(Enum):
    """What is spoken; the traps need to know."""

    ANY = "any"
    AMQP = "amqp"
    POSTGRESQL = "postgresql"


@dataclass(frozen=True)
class Drop:
    """Take what is sent, acknowledged by TCP, and deliver none of it, ever; nor that a side has left."""


@dataclass(frozen=True)
class Hold:
    """The same, but deliver it once healed."""


@dataclass(frozen=True)
class Dribble:
    """Deliver ``size`` bytes every so many seconds."""

    size: int
    every: float


@dataclass(frozen=True)
class Delay:
    """Deliver everything so many seconds later."""

    seconds: float


@dataclass(frozen=True)
class ResetAfter:
    """Deliver so many bytes more, then reset the connection, both ways."""

    count: int


@dataclass(frozen=True)
class DropAfter:
    """Deliver so many bytes more, at least one, in the middle of whatever is said, then drop; see :class:`Drop`."""

    count: int


@dataclass(frozen=True)
class HalfClose:
    """Tell the receiver that nothing more will come (FIN); the other direction goes on."""


Fault = Drop | Hold | Dribble | Delay | ResetAfter | DropAfter | HalfClose


@dataclass(frozen=True)
class CutAfterCommit:
    """When PostgreSQL has executed a COMMIT, swallow its answer and reset the connection.

    Attributes:
        containing: only where a statement of the transaction contains this.
        times: how often.
    """

    containing: bytes = b""
    times: int = 1


@dataclass(frozen=True)
class CutAfterPublish:
    """When the broker confirms, swallow it and reset the connection.

    Attributes:
        messages: only after so many were published, on one connection, from now on.
        times: how often.
    """

    messages: int = 1
    times: int = 1


@dataclass(frozen=True)
class LateAcks:
    """Deliver every nth confirm of the broker late: others overtake it.

    Attributes:
        every: n.
        seconds: how late; infinite: never.
    """

    every: int
    seconds: float = math.inf


Trap = CutAfterCommit | CutAfterPublish | LateAcks


class Proxy:
    """Listens on a free port of the loopback from entering to leaving the ``with`` block.

    Args:
        server: host and port of the server behind it.
        speaks: what is spoken there.

    Attributes:
        counts: what was done so far: ``connections``, ``resets``, ``half_closes``, ``bytes_dropped``, ``bytes_held``,
            ``bytes_dribbled``, ``bytes_delayed``, ``commits_cut``, ``publishes_cut``, ``acks_late``.
    """

    def __init__(self, server: tuple[str, int], *, speaks: Wire = Wire.ANY) -> None:
        self._server = server
        self._speaks = speaks
        self.counts: Counter[str] = Counter()
        self._traps = _Traps(self.counts)
        self._links: set[_Link] = set()
        self._for_new: dict[Toward, Fault | None] = dict.fromkeys(Toward)
        self._selector = selectors.DefaultSelector()
        # Bound and never listening: it keeps the port ours while connections are refused.
        self._placeholder = _bound(0)
        self._listener: socket.socket | None = None
        self._orders: deque[Callable[[], None]] = deque()
        self._bell, self._ear = socket.socketpair()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"proxy of {server[1]}", daemon=True)

    def __enter__(self) -> Self:
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._listen()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close)
        self._thread.join()
        for each in (self._placeholder, self._bell, self._ear):
            each.close()
        self._selector.close()

    @property
    def port(self) -> int:
        """The port it listens on."""
        port: int = self._placeholder.getsockname()[1]
        return port

    @property
    def connected(self) -> int:
        """How many connections there are, half-open ones included."""
        return len(self._links)

    def url(self, server_url: str) -> str:
        """Return a URL of the server with this proxy's address in it."""
        parts = urlsplit(server_url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    # --- Faults -------------------------------------------------------------------------------------------------

    def impose(self, fault: Fault, *, toward: Collection[Toward] = tuple(Toward), upon: Upon = Upon.ALL) -> None:
        """Impose a fault on connections, in one direction or both, in place of the one before."""
        self._do(lambda: self._impose(fault, toward, upon))

    def arm(self, trap: Trap) -> None:
        """Set a trap, for all connections."""
        self._do(lambda: self._traps.set(trap))

    def reset(self) -> None:
        """Reset every connection."""
        self._do(self._reset_all)

    def refuse(self) -> None:
        """Refuse new connections."""
        self._do(self._stop_listening)

    def heal(self, *, silently: bool = False) -> None:
        """End all faults.

        Nothing mends a connection that lost bytes, or a side. It is reset, as by a host that does not know it any
        more; ``silently``: it stays dead for ever, as behind a firewall that forgot it, and nobody is told.
        """
        self._do(lambda: self._heal(silently=silently))

    def _impose(self, fault: Fault, toward: Collection[Toward], upon: Upon) -> None:
        for direction in toward:
            if upon is not Upon.EXISTING:
                self._for_new[direction] = fault
            if upon is not Upon.NEW:
                for link in tuple(self._links):
                    link.pipes[direction].suffer(fault)
                    self._settle(link)

    def _reset_all(self) -> None:
        for link in tuple(self._links):
            self._reset(link)

    def _heal(self, *, silently: bool) -> None:
        self._for_new = dict.fromkeys(Toward)
        self._traps.clear()
        if self._listener is None:
            self._listen()
        for link in tuple(self._links):
            if link.is_whole:
                for pipe in link.pipes.values():
                    pipe.suffer(None)
                self._settle(link)
            elif silently:
                for pipe in link.pipes.values():
                    pipe.suffer(Drop())
                self._settle(link)
            else:
                self._reset(link)

    # --- The loop -----------------------------------------------------------------------------------------------

    def _do(self, order: Callable[[], Answer]) -> Answer:
        """Have the proxy's thread do something; return its answer."""
        done: Future[Answer] = Future()

        def obey() -> None:
            try:
                done.set_result(order())
            except BaseException as error:  # noqa: BLE001 -- it is raised where it was asked for
                done.set_exception(error)

        self._orders.append(obey)
        self._bell.send(b"!")
        return done.result(timeout=20)

    def _run(self) -> None:
        while not self._closing:
            wake_at = min((link.wake_at for link in self._links), default=math.inf)
            wait = None if wake_at == math.inf else max(0.0, wake_at - monotonic())
            for key, events in self._selector.select(wait):
                if key.fileobj is self._ear:
                    self._ear.recv(_READ_SIZE)
                    while self._orders:
                        self._orders.popleft()()
                elif key.data is None:
                    self._accept()
                else:
                    link, side = key.data
                    # An event before it in this round may have ended it.
                    if link in self._links:
                        self._serve(link, side, events)
            for link in [link for link in self._links if link.wake_at <= monotonic()]:
                self._settle(link)

    def _listen(self) -> None:
        self._listener = _bound(self.port)
        self._listener.settimeout(0)
        self._listener.listen(256)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _close(self) -> None:
        self._stop_listening()
        self._reset_all()
        self._closing = True

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it has left already
        server = socket.socket()
        for each in (client, server):
            each.settimeout(0)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.connect_ex(self._server)
        self.counts["connections"] += 1
        link = _Link(client, server, self._tap(), self.counts)
        self._links.add(link)
        for direction, fault in self._for_new.items():
            link.pipes[direction].suffer(fault)
        self._settle(link)

    def _tap(self) -> "_Tap":
        match self._speaks:
            case Wire.AMQP:
                return _AmqpTap(self._traps)
            case Wire.POSTGRESQL:
                return _PostgresTap(self._traps)
            case Wire.ANY:
                return _NoTap()

    def _serve(self, link: "_Link", side: Toward, events: int) -> None:
        """Do what a side of a connection is ready for."""
        if side is Toward.SERVER and not link.connected:
            link.connected = not link.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not link.connected:
                self._reset(link)
                return
        if events & selectors.EVENT_WRITE:
            link.pipes[side].stuck = False
        if events & selectors.EVENT_READ:
            self._read(link, side)
        self._settle(link)

    def _read(self, link: "_Link", side: Toward) -> None:
        pipe = link.from_side(side)
        try:
            data = link.sockets[side].recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            link.lose(side)
            return
        if not data:
            pipe.ended = True
        elif pipe.drops:
            pipe.discard(len(data))
        else:
            passed, late = link.tap.sees(pipe.toward, data)
            pipe.put(passed)
            pipe.late += late

    def _settle(self, link: "_Link") -> None:
        """Deliver what can be delivered now, and await what comes next; end the connection when it is over."""
        now = monotonic()
        for pipe in link.pipes.values():
            link.flush(pipe, now)
        if link.tap.cut or link.is_broken:
            self._reset(link)
        elif link.is_over:
            self._forget(link)
        else:
            link.wake_at = min(pipe.due_at(now) for pipe in link.pipes.values())
            for side in Toward:
                self._watch(link, side)

    def _watch(self, link: "_Link", side: Toward) -> None:
        """Be told by the kernel of what can be done with one side, and of nothing else."""
        wanted = link.wants(side)
        if wanted == link.watched[side]:
            return
        if not wanted:
            self._selector.unregister(link.sockets[side])
        elif link.watched[side]:
            self._selector.modify(link.sockets[side], wanted, (link, side))
        else:
            self._selector.register(link.sockets[side], wanted, (link, side))
        link.watched[side] = wanted

    def _reset(self, link: "_Link") -> None:
        self.counts["resets"] += 1
        for each in link.sockets.values():
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._forget(link)

    def _forget(self, link: "_Link") -> None:
        for side in Toward:
            if link.watched[side]:
                self._selector.unregister(link.sockets[side])
            link.sockets[side].close()
        self._links.discard(link)


class _Link:
    """One client's connection, and ours to the server for it."""

    def __init__(self, client: socket.socket, server: socket.socket, tap: "_Tap", counts: Counter[str]) -> None:
        self.server = server
        self.sockets = {Toward.CLIENT: client, Toward.SERVER: server}
        self.pipes = {toward: _Pipe(toward, counts) for toward in Toward}
        self.tap = tap
        self.connected = False
        self.watched = dict.fromkeys(Toward, 0)
        self.wake_at = math.inf
        self._lost: set[Toward] = set()

    def from_side(self, side: Toward) -> "_Pipe":
        """Return the direction whose source is this side."""
        return self.pipes[Toward.CLIENT if side is Toward.SERVER else Toward.SERVER]

    @property
    def is_whole(self) -> bool:
        """Whether no bytes and no side of it are missing."""
        return not self._lost and not any(pipe.damaged for pipe in self.pipes.values())

    @property
    def is_broken(self) -> bool:
        """Whether it must be reset: a side has gone, and nothing keeps the other from hearing it."""
        gone = [not self.from_side(side).is_silent for side in self._lost]
        return any(gone) or len(gone) > 1 or any(pipe.exhausted for pipe in self.pipes.values())

    @property
    def is_over(self) -> bool:
        """Whether both sides have been told the other's end."""
        return all(pipe.closed for pipe in self.pipes.values())

    def lose(self, side: Toward) -> None:
        """Note that a side has gone without a farewell."""
        self._lost.add(side)
        self.from_side(side).ended = True
        self.pipes[side].stuck = False

    def wants(self, side: Toward) -> int:
        """Return what is awaited of a side, as a mask of the selector's events."""
        if side in self._lost:
            return 0
        if side is Toward.SERVER and not self.connected:
            return selectors.EVENT_WRITE
        reading = selectors.EVENT_READ if self.from_side(side).has_room else 0
        return reading | (selectors.EVENT_WRITE if self.pipes[side].stuck else 0)

    def flush(self, pipe: "_Pipe", now: float) -> None:
        """Deliver what may be delivered in one direction, as far as the receiver takes it."""
        if pipe.toward in self._lost:
            pipe.discard_all()
            return
        if pipe.toward is Toward.SERVER and not self.connected:
            return
        try:
            while not pipe.stuck and (piece := pipe.next_piece(now)):
                pipe.delivered(self.sockets[pipe.toward].send(piece), now)
            if pipe.is_to_close:
                pipe.closed = True
                self.sockets[pipe.toward].shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pipe.stuck = True
        except OSError:
            self.lose(pipe.toward)


class _Pipe:
    """One direction of a connection: what was read and is yet to be delivered, and the fault that it suffers."""

    def __init__(self, toward: Toward, counts: Counter[str]) -> None:
        self.toward = toward
        self.ended = False
        """The source will send no more."""
        self.closed = False
        """The receiver has been told so."""
        self.stuck = False
        """The receiver takes no more at the moment."""
        self.damaged = False
        """Something is missing in it."""
        self.late: list[tuple[float, bytes]] = []
        self._fault: Fault | None = None
        self._counts = counts
        self._queue: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._left = math.inf  # bytes until the reset, or until all is dropped
        self._cut_short = False  # whatever the source says is not for the receiver any more
        self._next_at = 0.0  # when the next drop of a dribble may fall

    def suffer(self, fault: Fault | None) -> None:
        """Replace the fault."""
        self._fault = fault
        self._left = fault.count if isinstance(fault, ResetAfter | DropAfter) else math.inf
        self._next_at = 0.0
        if not isinstance(fault, Delay):
            self._queue = deque((0.0, data) for _, data in self._queue)
        if isinstance(fault, Drop):
            self.discard_all()
        elif isinstance(fault, HalfClose):
            self.discard_all()
            self.damaged = self._cut_short = True
            self._counts["half_closes"] += 1
        if fault is None:
            self.late = [(0.0, data) for due_at, data in self.late if due_at < math.inf]

    @property
    def drops(self) -> bool:
        """Whether what is read has nowhere to go."""
        return isinstance(self._fault, Drop | HalfClose)

    @property
    def is_silent(self) -> bool:
        """Whether not even the source's end is told."""
        return isinstance(self._fault, Drop | Hold)

    @property
    def has_room(self) -> bool:
        """Whether more may be read."""
        return not self.ended and (self.drops or self._size < _BOUND)

    @property
    def exhausted(self) -> bool:
        """Whether the reset is due."""
        return self._left <= 0

    @property
    def is_to_close(self) -> bool:
        """Whether everything is delivered but the end."""
        told_all = not self._queue and not self.late and not self.is_silent
        return (self.ended or self._cut_short) and told_all and not self.closed

    def put(self, data: bytes) -> None:
        """Take in what was read."""
        if not data:
            return
        due_at = 0.0
        match self._fault:
            case Delay(seconds):
                due_at = monotonic() + seconds
                self._counts["bytes_delayed"] += len(data)
            case Hold():
                self._counts["bytes_held"] += len(data)
            case _:
                pass
        self._queue.append((due_at, data))
        self._size += len(data)

    def discard(self, count: int) -> None:
        """Note that so many bytes went nowhere."""
        self.damaged = True
        self._counts["bytes_dropped"] += count

    def discard_all(self) -> None:
        """Throw away what is waiting."""
        if self._queue:
            self.discard(self._size)
            self._queue.clear()
            self._size = 0

    def next_piece(self, now: float) -> bytes:
        """Return what may be delivered now, empty if nothing may."""
        while self.late and self.late[0][0] <= now:
            _, frame = self.late.pop(0)
            self._queue.append((0.0, frame))
            self._size += len(frame)
        if not self._queue or self.is_silent or self._queue[0][0] > now or self._left <= 0:
            return b""
        _, data = self._queue[0]
        match self._fault:
            case Dribble(size):
                return data[:size] if now >= self._next_at else b""
            case ResetAfter() | DropAfter():
                return data[: int(self._left)]
            case _:
                return data

    def delivered(self, count: int, now: float) -> None:
        """Note that so many bytes of the piece were taken."""
        due_at, data = self._queue.popleft()
        if count < len(data):
            self._queue.appendleft((due_at, data[count:]))
        self._size -= count
        self._left -= count
        if isinstance(self._fault, Dribble):
            self._next_at = now + self._fault.every
            self._counts["bytes_dribbled"] += count
        elif isinstance(self._fault, DropAfter) and self._left <= 0:
            self.suffer(Drop())

    def due_at(self, now: float) -> float:
        """Return when something may be delivered without anything being read, infinite if nothing."""
        if self.stuck or self.is_silent:
            return math.inf
        moments = [due_at for due_at, _ in self.late[:1]]
        if self._queue:
            moments.append(max(self._queue[0][0], self._next_at, now))
        return min(moments, default=math.inf)


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


# --- What is spoken ---------------------------------------------------------------------------------------------


class _Traps:
    """The traps that are set on a proxy."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.clear()

    def clear(self) -> None:
        """Remove them all."""
        self.commit: CutAfterCommit | None = None
        self.publish: CutAfterPublish | None = None
        self.acks: LateAcks | None = None
        self._left = {"commits_cut": 0, "publishes_cut": 0}

    def set(self, trap: Trap) -> None:
        """Set one, in place of another of its kind."""
        match trap:
            case CutAfterCommit():
                self.commit = trap
                self._left["commits_cut"] = trap.times
            case CutAfterPublish():
                self.publish = trap
                self._left["publishes_cut"] = trap.times
            case LateAcks():
                self.acks = trap

    def spring(self, name: str) -> bool:
        """Use a trap once; return whether it was still set."""
        if self._left[name] <= 0:
            return False
        self._left[name] -= 1
        return True


_Seen = tuple[bytes, list[tuple[float, bytes]]]
"""What goes on at once, and what later, each with its moment."""


class _Tap(Protocol):
    """Follows what is said on one connection, and does what the traps say."""

    cut: bool
    """The connection is to be reset."""

    def sees(self, toward: Toward, data: bytes) -> _Seen:
        """Take in what was read; return what of it goes on."""
        ...


class _NoTap:
    cut = False

    def sees(self, toward: Toward, data: bytes) -> _Seen:
        del toward
        return data, []


class _PostgresTap:
    """Follows PostgreSQL's protocol, version 3, as long as it is not encrypted."""

    _REQUESTS: Final = frozenset({80_877_103, 80_877_104})
    """Numbers of SSLRequest and GSSENCRequest, each answered by a single byte."""

    def __init__(self, traps: _Traps) -> None:
        self.cut = False
        self._traps = traps
        self._started = False
        self._opaque = False
        self._requests = 0
        self._inbox = {toward: bytearray() for toward in Toward}
        self._statements: dict[bytes, bytes] = {}
        self._transaction: list[bytes] = []
        self._swallowing = False

    def sees(self, toward: Toward, data: bytes) -> _Seen:
        if not self._opaque:
            self._inbox[toward] += data
            if toward is Toward.SERVER:
                self._asked()
            else:
                self._answered()
        return (b"" if self._swallowing and toward is Toward.CLIENT else data), []

    def _asked(self) -> None:
        inbox = self._inbox[Toward.SERVER]
        while not self._started and len(inbox) >= 8:
            size, number = struct.unpack_from(">II", inbox)
            if len(inbox) < size:
                return
            del inbox[:size]
            self._requests += number in self._REQUESTS
            self._started = number not in self._REQUESTS
        for kind, body in self._messages(inbox):
            match kind:
                case b"Q":
                    self._said(body.partition(b"\0")[0])
                case b"P":
                    name, statement, _ = body.split(b"\0", 2)
                    self._statements[name] = statement
                    self._said(statement)
                case b"B":
                    self._said(self._statements.get(body.split(b"\0", 2)[1], b""))
                case _:
                    pass

    def _said(self, statement: bytes) -> None:
        word = statement.strip()[:8].upper()
        if word.startswith(b"COMMIT"):
            trap = self._traps.commit
            fits = trap is not None and any(trap.containing in each for each in self._transaction)
            if fits and self._traps.spring("commits_cut"):
                self._swallowing = True
        if word.startswith((b"COMMIT", b"BEGIN", b"ROLLBACK")):
            self._transaction.clear()
        else:
            self._transaction.append(statement)

    def _answered(self) -> None:
        inbox = self._inbox[Toward.CLIENT]
        while self._requests and inbox:
            self._requests -= 1
            self._opaque |= inbox.pop(0) != ord("N")
        if self._opaque:
            return
        for kind, _ in self._messages(inbox):
            if kind == b"Z" and self._swallowing and not self.cut:
                self.cut = True
                self._traps.counts["commits_cut"] += 1

    @staticmethod
    def _messages(inbox: bytearray) -> Iterator[tuple[bytes, bytes]]:
        while len(inbox) >= 5:
            (size,) = struct.unpack_from(">I", inbox, 1)
            if len(inbox) < 1 + size:
                return
            kind, body = bytes(inbox[:1]), bytes(inbox[5 : 1 + size])
            del inbox[: 1 + size]
            yield kind, body


class _AmqpTap:
    """Follows AMQP 0-9-1. The broker's frames are passed on whole, so that others can be put between them."""

    _PUBLISH: Final = struct.pack(">HH", 60, 40)
    _ACK: Final = struct.pack(">HH", 60, 80)

    def __init__(self, traps: _Traps) -> None:
        self.cut = False
        self._traps = traps
        self._inbox = {toward: bytearray() for toward in Toward}
        self._header_left = 8
        self._published = 0
        self._acks = 0
        self._swallowing = False
        self._watching: CutAfterPublish | None = None

    def sees(self, toward: Toward, data: bytes) -> _Seen:
        if toward is Toward.CLIENT:
            return self._answered(data)
        body = data[self._header_left :]
        self._header_left -= len(data) - len(body)
        trap = self._traps.publish
        if trap is not self._watching:
            self._watching, self._published = trap, 0
        self._inbox[toward] += body
        for frame in self._frames(self._inbox[toward]):
            self._published += frame.startswith(self._PUBLISH, 7)
        return data, []

    def _answered(self, data: bytes) -> _Seen:
        inbox = self._inbox[Toward.CLIENT]
        inbox += data
        passed: list[bytes] = []
        late: list[tuple[float, bytes]] = []
        for frame in self._frames(inbox):
            is_ack = frame.startswith(self._ACK, 7)
            if is_ack and self._is_to_cut():
                self.cut = True
                self._traps.counts["publishes_cut"] += 1
            if self.cut:
                break
            acks = self._traps.acks
            self._acks += is_ack
            if is_ack and acks is not None and self._acks % acks.every == 0:
                self._traps.counts["acks_late"] += 1
                late.append((monotonic() + acks.seconds, frame))
            else:
                passed.append(frame)
        return b"".join(passed), late

    def _is_to_cut(self) -> bool:
        trap = self._traps.publish
        return trap is not None and self._published >= trap.messages and self._traps.spring("publishes_cut")

    @staticmethod
    def _frames(inbox: bytearray) -> Iterator[bytes]:
        while len(inbox) >= 7:
            (size,) = struct.unpack_from(">I", inbox, 3)
            if len(inbox) < size + 8:
                return
            frame = bytes(inbox[: size + 8])
            del inbox[: size + 8]
            yield frame
