"""PostgreSQL stopped, killed, its sessions ended at the worst moments, full, read-only, without a free connection."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Final
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from tests.support.callers import BIG, SMALL, Caller, Traffic, add_tasks, pending
from tests.support.evidence import Evidence
from tests.support.operators import Outcome, command
from tests.support.oracle import Oracle
from tests.support.postgres import PostgresServer, StopMode
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import rounds
from tests.support.scenes import Scene, Scenes, assert_all_run
from tests.support.sessions import AT_COMMIT, MARKED, PUBLISHING, PULSE, catch, commits_held, configure, terminate
from tests.support.stack import Stack

SOURCES: Final = 4_000
BEATS: Final = "usename = 'beats'"
RECORDING: Final = "usename = 'operators' AND query LIKE 'WITH created AS%INSERT INTO %runs%'"


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that tests may hurt; each leaves it whole."""
    with PostgresServer() as server:
        for role in ("beats", "operators"):
            server.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN").format(sql.Identifier(role)))
        yield server


@pytest.fixture(scope="module")
def scenes(
    postgres: PostgresServer, rabbitmq_server: RabbitMQServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scenes[Scene]]:
    """Scenes with two workers and small batches."""
    with Scenes(
        postgres,
        rabbitmq_server,
        tmp_path_factory,
        partial(Scene, sources=SOURCES, workers=2),
        DISPATCH__BATCH_SIZE="25",
    ) as scenes:
        yield scenes


@pytest.fixture
def scene(scenes: Scenes[Scene], postgres: PostgresServer) -> Scene:
    """A scene that is whole, with a beat that has a role of its own, to be told apart."""
    postgres.start()
    scene = scenes.take()
    scene.start_beat({"DATABASE_URL": as_role(scene.stack, "beats")})
    return scene


def as_role(stack: Stack, role: str) -> str:
    """Return the database's URL for another role."""
    return stack.database.replace("//orchestrator:", f"//{role}:")


def conclude(scene: Scene, traffic: Traffic, evidence: Evidence) -> None:
    """Check what must hold after any fault of PostgreSQL, and that the command line promised nothing meanwhile."""
    scene.conclude(evidence)
    for refusal in traffic.refusals:
        refusal.assert_refused()
    evidence.note(f"the command line refused {len(traffic.refusals)} runs, each with one sentence, and had them later")


# --- Sessions and servers that end ----------------------------------------------------------------------------------


@pytest.mark.fault("PostgreSQL stopped (immediate) or killed -9 as by a power failure, and started, in mid-fan-out")
def test_restarts(scene: Scene, postgres: PostgresServer, random: Random, evidence: Evidence) -> None:
    in_the_middle = 0
    faults: list[Callable[[], None]] = [partial(postgres.stop, StopMode.IMMEDIATE), postgres.kill]
    trials = [fault for _ in rounds(1, 10) for fault in faults]

    with scene.traffic as traffic:
        for fault in trials:
            run_id = traffic.fan_out()
            time.sleep(random.uniform(0, 0.3))
            fault()
            evidence.trials += 1
            # How long it is away.
            time.sleep(random.uniform(0, 3))
            postgres.start()
            in_the_middle += pending(scene.stack) > 0
            with evidence.recovery():
                scene.await_resumed()
            scene.stack.await_run(run_id, "succeeded")
    conclude(scene, traffic, evidence)

    assert in_the_middle >= len(trials) / 2
    evidence.note(f"{in_the_middle} times in mid-fan-out")


@pytest.mark.fault("PostgreSQL's sessions ended: all, beats', the pulse's, with a batch on the wire, at its commit")
def test_sessions_are_terminated(scene: Scene, postgres: PostgresServer, evidence: Evidence) -> None:
    stack = scene.stack
    moments: dict[str, Callable[[], int]] = {
        "all": partial(terminate, stack),
        "beats'": partial(catch, stack, BEATS),
        "the pulse's": partial(catch, stack, PULSE),
        "publishing": partial(catch, stack, PUBLISHING),
        "before the commit": partial(catch, stack, MARKED),
        "commit without an answer": partial(catch_at_commit, stack, postgres),
    }
    ended = dict.fromkeys(moments, 0)

    with scene.traffic as traffic:
        for _ in rounds(1, 6):
            for moment, end_sessions in moments.items():
                run_id = traffic.fan_out()
                ended[moment] += end_sessions()
                evidence.trials += 1
                with evidence.recovery():
                    scene.await_resumed()
                stack.await_run(run_id, "succeeded")
    conclude(scene, traffic, evidence)

    assert all(ended.values()), ended
    evidence.note(f"sessions ended: {ended}")


def catch_at_commit(stack: Stack, postgres: PostgresServer) -> int:
    """End sessions whose batch is committed, and whose worker does not know it."""
    with commits_held(postgres):
        return catch(stack, AT_COMMIT)


@pytest.mark.fault("the command line's sessions ended while it records a thousand runs, until it gives up")
def test_a_command_is_cut_off(scene: Scene, evidence: Evidence) -> None:
    stack, theme = scene.stack, "cut off"
    many = [str(source) for source in range(1, 20_001)]

    analyze = stack.start(
        "orchestrator", "analyze", *many, "--theme", theme, settings={"DATABASE_URL": as_role(stack, "operators")}
    )

    def given_up() -> bool:
        evidence.trials += terminate(stack, RECORDING)
        return not analyze.running

    eventually(given_up, within=60, what="a command gives up whose sessions end again and again")
    assert evidence.trials > 0
    assert analyze.wait(within=1) == 1, analyze.text()[-1000:]
    (found,) = stack.query("SELECT count(*) FROM orchestrator.runs WHERE theme_name = %s", theme)
    assert found["count"] == 0, f"{found['count']} of {len(many)} runs were started by a command that failed"
    scene.conclude(evidence)


# --- A server that refuses ------------------------------------------------------------------------------------------


@contextmanager
def read_only_server(stack: Stack, postgres: PostgresServer) -> Iterator[None]:
    """Every transaction of every session, from now on: a standby that was not promoted yet, or an operator's hand."""
    del stack  # it is one of many
    configure(postgres, "SET default_transaction_read_only = on")
    try:
        yield
    finally:
        configure(postgres, "RESET default_transaction_read_only")


@contextmanager
def read_only_database(stack: Stack, postgres: PostgresServer) -> Iterator[None]:
    """New sessions, for as long as they live; the old ones are ended."""
    name = sql.Identifier(stack.database.rpartition("/")[2])
    postgres.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
    try:
        terminate(stack)
        yield
    finally:
        postgres.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))


@contextmanager
def no_free_connection(stack: Stack, postgres: PostgresServer) -> Iterator[None]:
    """All of max_connections are others'."""
    others: list[psycopg.Connection] = []

    def all_taken() -> bool:
        # Superusers' too: the last few are kept for such.
        with suppress(psycopg.OperationalError):
            while True:
                others.append(psycopg.connect(stack.database, autocommit=True))
        return not others[0].execute(SESSIONS_ENDED).fetchall()

    try:
        eventually(all_taken, within=60, what="every connection is taken")
        yield
    finally:
        for other in others:
            other.close()
        eventually(lambda: connects(stack), within=30, what="their connections are free")
    del postgres


def connects(stack: Stack) -> bool:
    """Tell whether the server takes another connection."""
    with suppress(psycopg.OperationalError), psycopg.connect(stack.database):
        return True
    return False


SESSIONS_ENDED: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'task-orchestrator'"
)


@pytest.mark.fault("PostgreSQL refuses: read-only (the server, the database), every connection taken")
@pytest.mark.parametrize(
    "refusing",
    [read_only_server, read_only_database, no_free_connection],
    ids=["read-only server", "read-only database", "no free connection"],
)
def test_refuses(
    scene: Scene,
    postgres: PostgresServer,
    evidence: Evidence,
    refusing: Callable[[Stack, PostgresServer], AbstractContextManager[None]],
) -> None:
    stack, refused = scene.stack, uuid4()

    with scene.traffic as traffic:
        run_id = traffic.fan_out()
        with refusing(stack, postgres):
            evidence.trials += 1
            told = [
                command(stack, "run", str(SMALL), "--id", str(refused)),
                command(stack, "analyze", "1", "2", "--theme", "news"),
            ]
            kept = traffic.ask(SMALL)
        with evidence.recovery():
            scene.await_resumed()
            for each in (run_id, kept):
                stack.await_run(each, "succeeded")
    assert_told(told, evidence)
    assert stack.run(refused) is None
    assert not stack.query("SELECT id FROM orchestrator.runs WHERE theme_name IS NOT NULL")
    conclude(scene, traffic, evidence)


def assert_told(told: list[Outcome], evidence: Evidence) -> None:
    """Check that each was refused by one clear sentence."""
    for each in told:
        each.assert_refused()
    evidence.note(f"told: “{told[0].sentences[0]}”")


# --- A full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own, which a file can fill up."""
    directory = Path(tempfile.mkdtemp(prefix="orchestrator-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m,mode=0711", "tmpfs", directory],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        directory.rmdir()
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        # Whatever still has a file open there.
        subprocess.run(["umount", "--lazy", directory], check=True)
        directory.rmdir()


@contextmanager
def filled_up(disk: Path) -> Iterator[None]:
    """Not a byte is left on a file system."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    try:
        yield
    finally:
        ballast.unlink()


@pytest.mark.fault("PostgreSQL's disk is full, tables and write-ahead log, until there is room again")
def test_the_disk_is_full(
    small_disk: Path, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evidence: Evidence
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with PostgresServer() as postgres:
        monkeypatch.undo()
        stack = Stack.on_rabbitmq(postgres.create_database("full"), broker_url, tmp_path, DISPATCH__BATCH_SIZE="25")
        stack.prepare()
        add_tasks(stack, SOURCES)
        workers, oracle, caller = [stack.worker(), stack.worker()], Oracle(stack), Caller(stack, workers=2)
        owed = [caller.fan_out()]
        many = [str(source) for source in range(1, 1_001)]

        with filled_up(small_disk):
            evidence.trials += 1
            owed += [caller.ask(task_id) for task_id in (BIG, SMALL, BIG, SMALL)]
            eventually(lambda: "No space left" in postgres.log, within=30, what="PostgreSQL misses its disk")
            # Of one run there may be room in a page that a table has already; of so many there is not.
            told = [command(stack, "analyze", *many, "--theme", "x" * 200)]
        # It may have ended, for want of room in its log.
        postgres.start()
        with evidence.recovery():
            caller.await_resumed()
        for run_id in owed:
            stack.await_run(run_id, "succeeded")

        assert_told(told, evidence)
        assert not stack.query("SELECT id FROM orchestrator.runs WHERE theme_name IS NOT NULL")
        evidence.saw(oracle.assert_holds(caller.expected))
        assert_all_run(workers)
        stack.close()
