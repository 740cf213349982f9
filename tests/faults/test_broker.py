"""RabbitMQ killed, restarted, frozen, in alarm: what was accepted is published, once in effect, soon after."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from uuid import UUID

import pytest

from tests.support.callers import BIG, SMALL, Caller, add_tasks, pending
from tests.support.evidence import Evidence
from tests.support.fleet import SHUTDOWN
from tests.support.operators import NOTICED, await_degraded, await_told, command
from tests.support.oracle import RESUMED, Oracle
from tests.support.postgres import PostgresServer, StopMode
from tests.support.processes import Process, eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import LONG, rounds
from tests.support.scenes import Scene, Scenes, assert_all_run
from tests.support.stack import Stack

SOURCES: Final = 4_000


@pytest.fixture(scope="module")
def scenes(
    postgres_server: PostgresServer, rabbitmq: RabbitMQServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scenes[Scene]]:
    """Scenes with two workers and small batches."""
    with Scenes(
        postgres_server,
        rabbitmq,
        tmp_path_factory,
        partial(Scene, sources=SOURCES, workers=2),
        DISPATCH__BATCH_SIZE="25",
    ) as scenes:
        yield scenes


@pytest.fixture
def scene(scenes: Scenes[Scene], rabbitmq: RabbitMQServer) -> Scene:
    """A scene that is whole, with a beat."""
    rabbitmq.start()
    scene = scenes.take()
    scene.start_beat()
    return scene


def restarted(rabbitmq: RabbitMQServer) -> None:
    rabbitmq.stop()
    rabbitmq.start()


def application_restarted(rabbitmq: RabbitMQServer) -> None:
    rabbitmq.ctl("stop_app")
    rabbitmq.ctl("start_app")


def killed(rabbitmq: RabbitMQServer) -> None:
    rabbitmq.kill()
    rabbitmq.start()


@pytest.mark.fault("RabbitMQ killed -9 and started again, restarted in good order, in the middle of fan-outs")
def test_restarts(scene: Scene, rabbitmq: RabbitMQServer, random: Random, evidence: Evidence) -> None:
    faults: list[Callable[[RabbitMQServer], None]] = [killed for _ in rounds(1, 20)]
    faults[1:1] = [restarted, application_restarted] if LONG else [restarted]
    in_the_middle = 0

    with scene.traffic as traffic:
        for fault in faults:
            run_id = traffic.fan_out()
            time.sleep(random.uniform(0, 0.5))
            fault(rabbitmq)
            evidence.trials += 1
            in_the_middle += pending(scene.stack) > 0
            with evidence.recovery():
                scene.await_resumed()
            scene.stack.await_run(run_id, "succeeded")
    scene.conclude(evidence)

    assert in_the_middle >= len(faults) / 2
    # The row is the promise: the command line takes work without a broker.
    assert not traffic.refusals, traffic.refusals
    evidence.note(f"{in_the_middle} times in mid-fan-out; clients had to ask {traffic.repeats} times again")


@contextmanager
def frozen(rabbitmq: RabbitMQServer) -> Iterator[None]:
    """SIGSTOP: connections stay open, and nobody answers."""
    rabbitmq.pause()
    try:
        yield
    finally:
        rabbitmq.resume()


@contextmanager
def out_of_memory(rabbitmq: RabbitMQServer) -> Iterator[None]:
    """The memory alarm."""
    with rabbitmq.alarm():
        yield


@contextmanager
def out_of_disk(rabbitmq: RabbitMQServer) -> Iterator[None]:
    """The disk alarm: more is to be free than there is."""
    rabbitmq.ctl("set_disk_free_limit", str(1 << 60))
    try:
        yield
    finally:
        rabbitmq.ctl("set_disk_free_limit", "10MB")


@pytest.mark.fault("RabbitMQ accepts nothing for a while: frozen (SIGSTOP), memory alarm, disk alarm")
@pytest.mark.parametrize(
    ("hurt", "codes", "seconds"),
    [
        (frozen, ("confirm_timeout", "broker_unreachable"), 60 if LONG else 20),
        (out_of_memory, ("broker_blocked",), 40 if LONG else 0),
        (out_of_disk, ("broker_blocked",), 40 if LONG else 0),
    ],
    ids=["frozen", "memory alarm", "disk alarm"],
)
def test_accepts_nothing(
    scene: Scene,
    rabbitmq: RabbitMQServer,
    evidence: Evidence,
    hurt: Callable[[RabbitMQServer], AbstractContextManager[None]],
    codes: tuple[str, ...],
    seconds: float,
) -> None:
    stack = scene.stack
    leaving = [stack.worker()] if hurt is frozen else []
    workers = [*scene.workers, *leaving]

    with scene.traffic as traffic:
        run_id = traffic.fan_out()
        # While an alarm is raised they would be done.
        for worker in workers:
            worker.freeze()
        with hurt(rabbitmq):
            for worker in workers:
                worker.thaw()
            evidence.trials += 1
            began_at = time.monotonic()
            sentence = await_told(stack, run_id, *codes)
            evidence.note(f"an operator was told after {time.monotonic() - began_at:.0f} s: “{sentence}”")
            promised = command(stack, "run", str(SMALL), "--json")
            assert (promised.code, promised.document["enqueued"]) == (0, False), promised
            assert "recorded, not enqueued yet" in promised.err
            traffic.owe(UUID(promised.document["run"]["id"]), SMALL)
            evidence.note(f"workers: “{await_degraded(stack, answers=hurt is not frozen)}”")
            if hurt is out_of_memory:
                # Messages can be taken from a broker that takes none, so workers come and go as ever.
                scene.replace_worker()
            for worker in leaving:
                asked_at = time.monotonic()
                assert worker.terminate(within=SHUTDOWN) == 0, worker.text()[-2000:]
                evidence.note(f"a worker ended {time.monotonic() - asked_at:.0f} s after SIGTERM")
            # How long the fault lasts.
            time.sleep(max(0.0, seconds - (time.monotonic() - began_at)))
            assert pending(stack) > 0
            assert all(node["alive"] for node in command(stack, "workers", "--json").document["nodes"])
        with evidence.recovery():
            scene.await_resumed()
            stack.await_run(run_id, "succeeded")
    scene.conclude(evidence)

    assert not traffic.refusals, traffic.refusals
    eventually(lambda: statuses(stack) == {"ready"}, within=NOTICED, what="every worker is ready, and no more", every=1)


@contextmanager
def password_changed(rabbitmq: RabbitMQServer, vhost: str) -> Iterator[None]:
    """Nobody is let in any more, and those who are in are sent away."""
    rabbitmq.ctl("change_password", "guest", "another")
    rabbitmq.ctl("close_all_connections", "--vhost", vhost, "password changed")
    try:
        yield
    finally:
        rabbitmq.ctl("change_password", "guest", "guest")


@contextmanager
def nothing_to_be_read(rabbitmq: RabbitMQServer, vhost: str) -> Iterator[None]:
    """The right to consume and to bind is gone; to publish is allowed."""
    rabbitmq.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", "^$")
    rabbitmq.ctl("close_all_connections", "--vhost", vhost, "rights changed")
    try:
        yield
    finally:
        rabbitmq.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")


@pytest.mark.fault("RabbitMQ refuses us for a while: another password, a right less")
@pytest.mark.parametrize("changed", [password_changed, nothing_to_be_read])
def test_refuses_us(
    scene: Scene,
    rabbitmq: RabbitMQServer,
    evidence: Evidence,
    changed: Callable[[RabbitMQServer, str], AbstractContextManager[None]],
) -> None:
    with scene.traffic as traffic:
        run_id = traffic.fan_out()
        with changed(rabbitmq, unquote(urlsplit(scene.broker).path[1:])):
            evidence.trials += 1
            eventually(
                lambda: statuses(scene.stack) == {"not ready"},
                within=NOTICED,
                what="an operator is told that no worker is ready",
                every=1,
            )
            (reason, *_) = {node["problem"] for node in nodes(scene.stack)}
            evidence.note(f"workers: “{reason}”")
            assert "ACCESS_REFUSED" in reason
        with evidence.recovery():
            scene.await_resumed()
            scene.stack.await_run(run_id, "succeeded")
    scene.conclude(evidence)

    assert not traffic.refusals, traffic.refusals


def nodes(stack: Stack) -> list[dict[str, Any]]:
    """Return the workers as an operator sees them."""
    document = command(stack, "workers", "--json").document
    return [node for node in document["nodes"] if node["kind"] == "worker"]


def statuses(stack: Stack) -> set[str]:
    """Return how the workers are, as an operator sees it."""
    return {node["status"] for node in nodes(stack)}


# --- Away from the start --------------------------------------------------------------------------------------------


def early_worker(stack: Stack) -> Process:
    return stack.start("celery", "-A", "orchestrator.celery_app", "worker", "-c", "1", "-n", "early@test")


@pytest.mark.fault("a worker started while PostgreSQL and RabbitMQ are both away")
def test_both_are_away_at_start(rabbitmq: RabbitMQServer, tmp_path: Path, evidence: Evidence) -> None:
    with PostgresServer() as postgres:
        url = rabbitmq.vhost_url(rabbitmq.fresh_vhost())
        stack = Stack.on_rabbitmq(postgres.create_database("outage"), url, tmp_path)
        stack.prepare()
        add_tasks(stack, SOURCES)
        oracle, caller = Oracle(stack), Caller(stack, workers=1)
        run_id = caller.ask(BIG)
        postgres.stop(StopMode.FAST)
        rabbitmq.stop()
        evidence.trials += 1

        worker = early_worker(stack)
        worker.await_line("database.waiting", within=30)
        postgres.start()
        worker.await_line("database.ready", within=30)
        worker.await_line("Cannot connect to amqp", within=30)
        rabbitmq.start()
        with evidence.recovery():
            stack.await_run(run_id, within=RESUMED)

        evidence.saw(oracle.assert_holds(caller.expected))
        assert_all_run([worker])
        stack.close()


@pytest.mark.fault("a worker started on a database that is not migrated yet")
def test_a_database_not_yet_migrated_is_waited_for(
    database_url: str, rabbitmq: RabbitMQServer, tmp_path: Path, evidence: Evidence
) -> None:
    stack = Stack.on_rabbitmq(database_url, rabbitmq.vhost_url(rabbitmq.fresh_vhost()), tmp_path)
    worker = early_worker(stack)
    worker.await_line("run `orchestrator migrate`", within=30)
    evidence.trials += 1

    stack.prepare()
    stack.application.add_task(1, [])

    with evidence.recovery():
        worker.await_line("early@test ready.", within=30)
        assert stack.await_run(stack.crawl(1))["state"] == "succeeded"
    stack.close()
