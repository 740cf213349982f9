"""Links that fall silent: nothing is refused and nothing comes, yet no call takes long, and work goes on afterwards."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, LiteralString
from uuid import UUID, uuid4

import pytest

from tests.support.beats import add_policies, database_clock
from tests.support.callers import EVERY, SCHEDULED, slots_owed
from tests.support.evidence import Evidence
from tests.support.network import LONGEST_CALL, READY, Network, open_network
from tests.support.oracle import RESUMED, Oracle
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, eventually
from tests.support.proxy import Drop, DropAfter, Proxy, Toward, Upon
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import LONG
from tests.support.stack import Stack

SILENCE: Final = 60.0 if LONG else LONGEST_CALL + 3
"""Seconds."""
ENDED_IN: Final = 30.0
"""Seconds that a worker has to end: Kubernetes kills it then."""
SOURCES: Final = 3_000


@dataclass
class Silence:
    """A worker in the middle of a fan-out and a beat that fires, some of whose links fall silent.

    Attributes:
        begin: makes them silent.
        end: gives them their voice back; none where they stay silent, and only new connections work.
        proxies: through which nothing goes meanwhile; none where the server itself is silent.
        leaves: the worker is told to end in the same moment, and another one finishes the run.
    """

    name: str
    network: Network
    begin: Callable[[], object]
    end: Callable[[], object] | None
    proxies: Sequence[Proxy] = ()
    leaves: bool = False
    worker: Process = field(init=False)
    beat: Process = field(init=False)
    run_id: UUID = field(init=False)
    _began_at: datetime = field(init=False)
    _lifted_at: datetime = field(init=False)
    _told_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.worker = self.network.spawn_worker()
        self.beat = self.network.spawn_beat()

    def await_ready(self) -> None:
        """Wait until the worker takes messages and the beat fires."""
        self.worker.await_line(READY, within=60)
        self._await_slots("true", within=60)

    def fall(self) -> None:
        """Fall silent in the middle of a fan-out."""
        self.run_id = self.network.begin_fan_out(SOURCES, published=SOURCES // 5)
        self.begin()
        self._began_at = database_clock(self.network.stack)
        if self.leaves:
            self.worker.send(signal.SIGTERM)
            self._told_at = time.monotonic()
            self.network.spawn_worker()
        run = self.network.stack.run(self.run_id)
        assert run is not None
        assert run["finished_at"] is None, f"{self.name}: the run was over before"

    def await_left(self) -> float:
        """Wait for a worker that was told to end, as long as Kubernetes would; return how many seconds that took."""
        assert self.worker.wait(within=max(0, self._told_at + ENDED_IN - time.monotonic())) == 0, self.name
        return time.monotonic() - self._told_at

    def lift(self) -> None:
        """End, where it ends."""
        # Who has nothing to say on one of several links loses nothing there.
        if self.proxies:
            assert any(proxy.counts["bytes_dropped"] for proxy in self.proxies), f"{self.name}: nothing was lost"
        if self.end is not None:
            self.end()
        self._lifted_at = database_clock(self.network.stack)

    def await_recovered(self) -> float:
        """Wait until the run is over and the beat fires again; return how many seconds the run took to recover."""
        stack = self.network.stack
        run = stack.await_run(self.run_id, within=RESUMED)
        since = self._began_at if self.end is None else self._lifted_at
        recovery: timedelta = run["finished_at"] - since
        assert recovery > timedelta(0), f"{self.name}: the run was over before"
        self._await_slots("claimed_at > %s", self._lifted_at, within=RESUMED)
        return recovery.total_seconds()

    def _await_slots(self, which: LiteralString, *parameters: object, within: float) -> None:
        statement = f"SELECT FROM orchestrator.firings WHERE {which} LIMIT 1"
        stack = self.network.stack
        self.beat.await_ready(
            lambda: stack.query(statement, *parameters), within=within, what=f"{self.name}: the beat claims slots"
        )


@pytest.fixture
def networks(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Callable[[RabbitMQServer], Network]]:
    """Lay networks, each with a database and a vhost of its own."""
    name = f"silence_{uuid4().hex[:8]}"
    template = Stack.on_rabbitmq(postgres_server.create_database(name), "", tmp_path)
    template.prepare()
    template.application.add_sources(SOURCES)
    add_policies(template)
    template.application.add_task(SCHEDULED, range(1, 6), f"every {EVERY} seconds")
    template.execute("UPDATE crawl_tasks SET misfire_policy = 'all', overlap_policy = 'allow'")
    with ExitStack() as opened:

        def lay(broker: RabbitMQServer) -> Network:
            directory = tmp_path / uuid4().hex[:8]
            directory.mkdir()
            copy = f"silence_{directory.name}"
            database = postgres_server.create_database(copy, template=name)
            opened.callback(postgres_server.drop_database, copy)
            return opened.enter_context(open_network(database, broker.vhost_url(broker.fresh_vhost()), directory))

        yield lay
    postgres_server.drop_database(name)


@pytest.fixture
def silences(
    networks: Callable[[RabbitMQServer], Network], rabbitmq_server: RabbitMQServer, request: pytest.FixtureRequest
) -> list[Silence]:
    """Every kind of silence, in `make test` some, each with a set-up of its own: all of them wait at the same time."""

    def hole(
        name: str, links: Sequence[str], toward: Sequence[Toward], upon: Upon = Upon.ALL, *, leaves: bool = False
    ) -> Silence:
        network = networks(rabbitmq_server)
        proxies = [network.links[link] for link in links]

        def begin() -> None:
            for proxy in proxies:
                proxy.impose(Drop(), toward=toward, upon=upon)

        return Silence(name, network, begin, network.heal if upon is Upon.ALL else None, proxies, leaves)

    broker, everything = ["broker", "extraction"], ["broker", "extraction", "database"]
    some = [
        hole("nothing comes from the broker", broker, [Toward.CLIENT]),
        hole("nothing reaches the database", ["database"], [Toward.SERVER]),
        hole("old connections are half-open", everything, tuple(Toward), Upon.EXISTING),
        hole("SIGTERM, and connections are half-open", everything, tuple(Toward), Upon.EXISTING, leaves=True),
    ]
    if not LONG:
        return some
    frozen: RabbitMQServer = request.getfixturevalue("rabbitmq")
    return [
        *some,
        hole("nothing reaches the broker", broker, [Toward.SERVER]),
        hole("nothing comes from the database", ["database"], [Toward.CLIENT]),
        Silence("the broker is frozen", networks(frozen), frozen.pause, frozen.resume),
    ]


@pytest.mark.fault(
    "network: 60 s of black hole, each way, to the broker and to the database; connections half-open for ever; a frozen"
    " broker (short version: 18 s), for workers and beats"
)
@pytest.mark.timeout(400)
def test_no_silence_holds_up_a_call_or_a_run_for_long(silences: list[Silence], evidence: Evidence) -> None:
    evidence.few = 0.05  # each silence leaves a batch of 100 messages, of some 3,000, confirmed and not marked
    for each in silences:
        each.await_ready()
    for each in silences:
        each.fall()
    fallen_at = time.monotonic()
    evidence.ends += [each.await_left() for each in silences if each.leaves]
    time.sleep(max(0, fallen_at + SILENCE - time.monotonic()))
    for each in silences:
        each.lift()

    for each in silences:
        evidence.recovered(each.await_recovered())
        evidence.note(f"{each.name}: {evidence.recoveries[-1]:.0f} s")
        evidence.trials += 1
    for each in silences:
        stack = each.network.stack
        assert each.beat.terminate() == 0, each.name
        evidence.saw(Oracle(stack).assert_holds({each.run_id: range(1, SOURCES + 1), **slots_owed(stack)}))
        held_up = {call["process"] for call in each.network.slow_calls()}
        assert each.beat.pid in held_up, f"{each.name}: the beat did not notice"
    calls = [call for each in silences for call in each.network.slow_calls()]
    longest = max(calls, key=lambda call: call["seconds"])
    evidence.note(f"the longest call: {longest['seconds']:.1f} s ({longest['call']})")
    for each in silences:
        each.network.assert_no_call_was_long()
        if not each.leaves:
            each.worker.send(signal.SIGTERM)
    for each in silences:
        assert each.worker.wait(within=ENDED_IN) == 0, each.name


@pytest.mark.fault("network: a message to a worker stalls in the middle of a frame, for ever")
def test_a_frame_that_stalls_half_way_does_not_stop_a_worker(
    networks: Callable[[RabbitMQServer], Network], rabbitmq_server: RabbitMQServer, evidence: Evidence
) -> None:
    network = networks(rabbitmq_server)
    stack, broker = network.stack, network.broker
    (worker,) = network.workers(1)
    stack.application.add_task(1, range(1, 11))

    # Only in its first moments does a worker's read time out in the middle of a frame, and Celery carries on.
    before = stack.crawl(1)
    stack.await_run(before)
    # Small things pass on every connection; of the one large frame a fifth does.
    broker.impose(DropAfter(20_000), toward=[Toward.CLIENT], upon=Upon.EXISTING)
    stalled = stack.crawl("x" * 100_000)
    eventually(lambda: broker.counts["bytes_dropped"] > 50_000, within=10, what="the rest of the frame is dropped")
    run_id = stack.crawl(1)
    with evidence.recovery():
        stack.await_run(run_id, within=RESUMED)
    stack.await_run(stalled, "failed", within=RESUMED)  # it is no task id

    evidence.saw(Oracle(stack).assert_holds({before: range(1, 11), run_id: range(1, 11)}))
    assert worker.terminate(within=ENDED_IN) == 0
