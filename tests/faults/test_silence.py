"""Links that fall silent: nothing is refused and nothing comes, yet no call takes long, and work goes on afterwards."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import pytest

from tests.support.beats import database_clock
from tests.support.evidence import Evidence
from tests.support.network import LONGEST_CALL, READY, Network, open_network
from tests.support.oracle import Oracle
from tests.support.postgres import PostgresServer
from tests.support.processes import Process
from tests.support.proxy import Drop, Toward, Upon
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import LONG
from tests.support.stack import Stack

SILENCE: Final = 60.0 if LONG else LONGEST_CALL + 3
"""Seconds."""
IN_TIME: Final = 60.0
"""Seconds after the end of a silence in which every run must be over."""
ENDED_IN: Final = 30.0
"""Seconds that a worker has to end: Kubernetes kills it then."""
SOURCES: Final = 1_500


@dataclass
class Silence:
    """A worker in the middle of a fan-out, one of whose links falls silent.

    Attributes:
        begin: makes it silent.
        end: gives it its voice back; none where it stays silent, and only new connections work.
        leaves: the worker is told to end in the same moment, and another one finishes the run.
    """

    name: str
    network: Network
    begin: Callable[[], object]
    end: Callable[[], object] | None
    leaves: bool = False
    worker: Process = field(init=False)
    run_id: UUID = field(init=False)

    def __post_init__(self) -> None:
        self.worker = self.network.spawn_worker()

    def fall(self) -> None:
        """Fall silent in the middle of a fan-out."""
        self.run_id = self.network.begin_fan_out(SOURCES, published=SOURCES // 5)
        self.begin()
        if self.leaves:
            self.worker.send(signal.SIGTERM)
            self.network.spawn_worker()

    def lift(self) -> None:
        """End, where it ends."""
        if self.leaves:
            assert self.worker.wait(within=max(0, ENDED_IN - SILENCE)) == 0, self.name
        if self.end is not None:
            self.end()


@pytest.fixture
def networks(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Callable[[RabbitMQServer], Network]]:
    """Lay networks, each with a database and a vhost of its own."""
    name = f"silence_{uuid4().hex[:8]}"
    template = Stack.on_rabbitmq(postgres_server.create_database(name), "", tmp_path)
    template.prepare()
    template.application.add_sources(SOURCES)
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

        return Silence(name, network, begin, network.heal if upon is Upon.ALL else None, leaves)

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
    " broker (short version: 18 s)"
)
@pytest.mark.timeout(400)
def test_no_silence_holds_up_a_call_or_a_run_for_long(silences: list[Silence], evidence: Evidence) -> None:
    for each in silences:
        each.worker.await_line(READY, within=60)
    for each in silences:
        each.fall()
    began_at = database_clock(silences[0].network.stack)
    time.sleep(SILENCE)
    for each in silences:
        each.lift()
    ended_at = database_clock(silences[0].network.stack)

    for each in silences:
        run = each.network.stack.await_run(each.run_id, within=IN_TIME)
        recovery = run["finished_at"] - (began_at if each.end is None else ended_at)
        evidence.recoveries.append(recovery.total_seconds())
        assert evidence.recoveries[-1] <= IN_TIME, f"{each.name}: {recovery}"
        evidence.note(f"{each.name}: {evidence.recoveries[-1]:.0f} s")
        evidence.saw(Oracle(each.network.stack).assert_holds({each.run_id: range(1, SOURCES + 1)}))
        evidence.trials += 1
    calls = [call for each in silences for call in each.network.slow_calls()]
    longest = max(calls, key=lambda call: call["seconds"])
    evidence.note(f"the longest call: {longest['seconds']:.1f} s ({longest['call']})")
    for each in silences:
        each.network.assert_no_call_was_long()
        if not each.leaves:
            each.worker.send(signal.SIGTERM)
    for each in silences:
        assert each.worker.wait(within=ENDED_IN) == 0, each.name
