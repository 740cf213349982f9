"""What networks do to connections: none of it loses a message, confirms one falsely, or holds up a process for long.

Every process reaches broker, extraction queue and database through proxies of the test's (see ``tests.support.proxy``);
the test itself reaches the servers directly.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final
from uuid import UUID

import pytest

from tests.support.beats import Beats, Intervals, Witness
from tests.support.evidence import Evidence
from tests.support.network import Network, open_network
from tests.support.oracle import RESUMED, Oracle
from tests.support.processes import eventually
from tests.support.proxy import (
    CutAfterCommit,
    CutAfterPublish,
    Delay,
    Dribble,
    Drop,
    Fault,
    HalfClose,
    Hold,
    LateAcks,
    Proxy,
    ResetAfter,
    Toward,
    Trap,
    Upon,
)
from tests.support.rounds import LONG, SEED

SOURCES: Final = 3_000 if LONG else 1_500
BOTH: Final = tuple(Toward)
"""Both directions."""


@pytest.fixture
def network(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Network]:
    """A network of the test's own."""
    with open_network(database_url, broker_url, tmp_path) as network:
        network.stack.prepare()
        network.stack.application.add_sources(SOURCES)
        yield network


# --- Schedules of faults ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One fault on one link, and how long it lasts before the next.

    Attributes:
        what: a fault, a trap, or the name of a method of the proxy.
    """

    link: str
    what: Fault | Trap | str
    seconds: float
    toward: tuple[Toward, ...] = BOTH
    upon: Upon = Upon.ALL

    def apply(self, proxy: Proxy) -> None:
        """Do it."""
        match self.what:
            case "reset":
                proxy.reset()
            case "refuse":
                proxy.refuse()
            case CutAfterCommit() | CutAfterPublish() | LateAcks() as trap:
                proxy.arm(trap)
            case str():
                raise AssertionError(self.what)
            case fault:
                proxy.impose(fault, toward=self.toward, upon=self.upon)


@dataclass(frozen=True)
class Schedule:
    """Faults in the middle of a fan-out, one after another; they add up until all are healed.

    Attributes:
        published: messages that are published before the first.
        silently: dead connections are not reset at the end.
    """

    published: int
    steps: Sequence[Step]
    silently: bool = False


# Bytes toward the broker must be lost in some: what was never there is what may be confirmed falsely.
_CHOSEN: Final = [
    Schedule(
        100,
        [
            Step("extraction", ResetAfter(5_000), 0.2, (Toward.SERVER,)),
            Step("database", "reset", 0.2),
            Step("broker", "reset", 0.2),
            Step("extraction", "refuse", 0.5),
        ],
    ),
    Schedule(
        300,
        [
            Step("database", CutAfterCommit(b"orchestrator.dispatches"), 0.3),
            Step("extraction", CutAfterPublish(150), 0.3),
            Step("broker", HalfClose(), 0.2, (Toward.CLIENT,)),
            Step("database", HalfClose(), 0.3, (Toward.SERVER,)),
        ],
    ),
    Schedule(
        200,
        [
            Step("extraction", LateAcks(3, 0.4), 0.6),
            Step("database", Dribble(40, 0.01), 0.5, (Toward.CLIENT,)),
            Step("extraction", Drop(), 1.0, (Toward.SERVER,)),
        ],
    ),
    Schedule(
        0,
        [
            Step("broker", Delay(0.3), 0.2),
            Step("database", Hold(), 1.0, (Toward.CLIENT,)),
            Step("extraction", Dribble(7, 0.02), 0.5, (Toward.SERVER,)),
            Step("broker", Drop(), 0.5, upon=Upon.NEW),
        ],
    ),
]


def drawn(number: int) -> Schedule:
    """Return a schedule that chance made, the same for the same seed."""
    random = Random(f"{SEED}-{number}")
    steps = [_drawn_step(random) for _ in range(random.randint(1, 4))]
    return Schedule(random.randrange(0, SOURCES // 2), steps, silently=random.random() < 0.25)


def _drawn_step(random: Random) -> Step:
    link = random.choice(["broker", "extraction", "extraction", "database", "database"])
    fault: list[Fault | Trap | str] = [
        "reset",
        "refuse",
        ResetAfter(random.randrange(5_000)),
        HalfClose(),
        Drop(),
        Hold(),
        Dribble(random.randint(1, 50), random.uniform(0.001, 0.2)),
        Delay(random.uniform(0.01, 2)),
    ]
    traps: dict[str, list[Fault | Trap | str]] = {
        "broker": [CutAfterPublish()],
        "extraction": [
            CutAfterPublish(random.randint(1, 500)),
            LateAcks(random.randint(1, 3), random.choice([0.5, 3, float("inf")])),
        ],
        "database": [CutAfterCommit(), CutAfterCommit(b"orchestrator.dispatches", random.randint(1, 3))],
    }
    what = random.choice([*fault, *traps[link]])
    toward = random.choice([BOTH, BOTH, (Toward.SERVER,), (Toward.CLIENT,)])
    return Step(link, what, random.uniform(0.02, 3), toward, random.choice(list(Upon)))


@pytest.mark.fault(
    "network: resets, half-closes, black holes, refusals, dribbles, delays, lost and late confirms, lost commit"
    " replies, on the links to broker, extraction queue and database, in the middle of a fan-out"
)
@pytest.mark.timeout(6_000 if LONG else 300)
def test_schedules_of_network_faults(network: Network, evidence: Evidence) -> None:
    workers = network.workers(2)
    oracle = Oracle(network.stack)
    expected: dict[UUID, range] = {}
    in_time = 0

    for number, schedule in enumerate([*_CHOSEN, *(drawn(number) for number in range(96 if LONG else 0))]):
        run_id = network.begin_fan_out(SOURCES, published=schedule.published)
        expected[run_id] = range(1, SOURCES + 1)
        for step in schedule.steps:
            step.apply(network.links[step.link])
            in_time += step is schedule.steps[0] and not is_over(network, run_id)
            time.sleep(step.seconds)
        network.heal(silently=schedule.silently)
        evidence.trials += 1
        try:
            with evidence.recovery():
                network.stack.await_run(run_id, within=RESUMED)
        except AssertionError as error:
            raise AssertionError(f"schedule {number}, {schedule}: {error}") from None
        oracle.read_wire()
        assert all(worker.running for worker in workers), f"a worker ended in schedule {number}, {schedule}"

    evidence.saw(oracle.assert_holds(expected))
    network.assert_no_call_was_long()
    assert in_time > evidence.trials / 2, "most runs were over before the first fault"
    done = network.done()
    for kind in _KINDS:
        assert done[kind], f"no schedule did this: {kind}; done was {done}"
    evidence.note(", ".join(f"{name.replace('_', ' ')}: {done[name]:,}" for name in ("connections", *_KINDS)))


def is_over(network: Network, run_id: UUID) -> bool:
    run = network.stack.run(run_id)
    return run is not None and run["finished_at"] is not None


_KINDS: Final = (
    "resets",
    "half_closes",
    "bytes_dropped",
    "bytes_held",
    "bytes_dribbled",
    "bytes_delayed",
    "commits_cut",
    "publishes_cut",
    "acks_late",
)


# --- Lost commit replies ------------------------------------------------------------------------------------------


@pytest.mark.fault("network: the reply to the commit that accepts a run is lost, on the command line")
def test_a_run_whose_commit_reply_was_lost_is_one_run(network: Network, evidence: Evidence) -> None:
    stack = network.stack
    stack.application.add_task(1, range(1, 11))
    network.database.arm(CutAfterCommit(b"INSERT INTO orchestrator.runs"))

    first = stack.start("orchestrator", "run", "1")
    code = first.wait(within=40)
    assert network.done()["commits_cut"] == 1
    named = re.search("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first.text())
    assert named, f"it does not say which run may have been recorded: {first.text()}"
    run_id = UUID(named[0])
    evidence.note(f"the command line ends with {code}")
    if code:
        # Then it says so in a sentence, and asking again by that id is no second run.
        assert "Traceback" not in first.text()
        assert stack.start("orchestrator", "run", "1", "--id", str(run_id)).wait(within=40) == 0

    assert [run["id"] for run in stack.query("SELECT id FROM orchestrator.runs")] == [run_id]
    network.workers(1)
    with evidence.recovery():
        evidence.saw(Oracle(stack).assert_holds({run_id: range(1, 11)}))
    evidence.trials += 1


@pytest.mark.fault("network: the reply to a commit is lost: accepting, planning, marking and completing, in a worker")
def test_commits_of_a_worker_whose_replies_were_lost(network: Network, evidence: Evidence) -> None:
    network.workers(1)
    expected: dict[UUID, range] = {}

    for number, statement in enumerate(_COMMITTED, 1):
        cut = network.done()["commits_cut"]
        network.database.arm(CutAfterCommit(statement))
        network.stack.application.add_task(number, range(1, 501))
        run_id = network.stack.crawl(number)
        with evidence.recovery():
            network.stack.await_run(run_id, within=RESUMED)
        assert network.done()["commits_cut"] > cut, f"no transaction with {statement!r} was committed"
        expected[run_id] = range(1, 501)
        evidence.trials += 1

    verdict = Oracle(network.stack).assert_holds(expected)
    evidence.saw(verdict)
    assert not verdict.duplicates, "what is committed is not sent again, whether we heard of it or not"


_COMMITTED: Final = (
    b"INSERT INTO orchestrator.runs",
    b"INSERT INTO orchestrator.dispatches",
    b"UPDATE orchestrator.dispatches",
    b"finished_at=clock_timestamp()",
)


@pytest.mark.fault("network: the reply to a beat's commit that claims slots is lost")
@pytest.mark.timeout(200)
def test_slots_whose_claim_was_committed_and_not_answered_start_once(network: Network, evidence: Evidence) -> None:
    stack = network.stack
    cuts = 20 if LONG else 3
    tasks = Intervals.add(stack, 200, [2, 3], range(1, 3))
    beats = Beats(stack)
    with Witness(stack) as witness:
        beats.start(2)
        tasks.await_read()
        network.database.arm(CutAfterCommit(b"orchestrator.firings", times=cuts))
        eventually(
            lambda: network.done()["commits_cut"] == cuts, within=RESUMED, what=f"{cuts} claims have lost their reply"
        )
        with evidence.recovery():
            tasks.await_fired(1)
        tasks.disable()
        tasks.assert_all_were_told(witness)
    beats.await_signs_of_life()
    evidence.trials += cuts
