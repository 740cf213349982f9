"""Broker or database away, at start or in the middle: no crash loop, clear words, and work resumes by itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import ALL, ROUNDS, SOURCES, a_big_task, await_published
from tests.support.postgres import PostgresServer, StopMode
from tests.support.processes import Process
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own, to be stopped."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def rabbitmq(rabbitmq_installed: None) -> Iterator[RabbitMQServer]:  # noqa: ARG001 -- it skips
    """A RabbitMQ of the test's own, to be stopped."""
    with RabbitMQServer() as server:
        yield server


@pytest.fixture
def stack(postgres: PostgresServer, rabbitmq: RabbitMQServer, tmp_path: Path) -> Iterator[Stack]:
    """Set-up 2 on servers of the test's own."""
    stack = Stack.on_rabbitmq(postgres.create_database("outage"), rabbitmq.url, tmp_path, DISPATCH__BATCH_SIZE="25")
    stack.prepare()
    a_big_task(stack)
    yield stack
    rabbitmq.start()
    stack.close()


def outlast(worker: Process, word: str) -> None:
    """Let an outage last: until the worker said so, and in `make faults` for half a minute."""
    worker.await_line(word, within=40)
    if ROUNDS:
        seen = worker.text().count(word)
        worker.await_ready(lambda: worker.text().count(word) > seen + 3, within=90, what=f"more lines with {word}")


def test_the_database_goes_away_in_mid_fan_out(stack: Stack, postgres: PostgresServer) -> None:
    worker = stack.worker()
    run_id = stack.crawl(1)
    await_published(stack, run_id, 500)

    postgres.stop(StopMode.IMMEDIATE)
    outlast(worker, "database_unavailable")
    assert worker.running
    postgres.start()

    stack.await_run(run_id, within=90)
    stack.assert_exactly_once_in_effect(run_id, ALL)


def test_the_broker_goes_away_in_mid_fan_out(stack: Stack, rabbitmq: RabbitMQServer) -> None:
    worker = stack.worker()
    run_id = stack.crawl(1)
    await_published(stack, run_id, 500)

    rabbitmq.kill()
    outlast(worker, "broker_unreachable")
    waiting = stack.await_run(run_id, "retrying")
    assert (waiting["error_code"], worker.running) == ("broker_unreachable", True)
    rabbitmq.start()

    stack.await_run(run_id, within=120)
    stack.assert_exactly_once_in_effect(run_id, ALL)


def test_both_are_away_at_start(stack: Stack, postgres: PostgresServer, rabbitmq: RabbitMQServer) -> None:
    run_id = stack.crawl(1)
    postgres.stop(StopMode.FAST)
    rabbitmq.stop()

    worker = stack.start("celery", "-A", "orchestrator.celery_app", "worker", "-c", "1", "-n", "early@test")
    worker.await_line("database.waiting", within=30)
    postgres.start()
    worker.await_line("database.ready", within=30)
    worker.await_line("Cannot connect to amqp", within=30)
    assert worker.running
    rabbitmq.start()

    stack.await_run(run_id, within=120)
    stack.assert_exactly_once_in_effect(run_id, ALL)


def test_a_database_not_yet_migrated_is_waited_for(
    postgres: PostgresServer, rabbitmq: RabbitMQServer, tmp_path: Path
) -> None:
    stack = Stack.on_rabbitmq(postgres.create_database("bare"), rabbitmq.url, tmp_path)
    worker = stack.start("celery", "-A", "orchestrator.celery_app", "worker", "-c", "1", "-n", "early@test")
    worker.await_line("run `orchestrator migrate`", within=30)

    stack.prepare()
    stack.application.add_task(1, [])

    worker.await_line("early@test ready.", within=30)
    assert stack.await_run(stack.crawl(1))["state"] == "succeeded"
    stack.close()


def test_the_memory_alarm_makes_the_run_wait_and_lifts_by_itself(stack: Stack, rabbitmq: RabbitMQServer) -> None:
    worker = stack.worker()
    run_id = stack.crawl(1)
    await_published(stack, run_id, 100)

    rabbitmq.ctl("set_vm_memory_high_watermark", "0.000001")
    waiting = stack.await_run(run_id, "retrying", within=40)
    assert waiting["error_code"] == "broker_blocked"
    assert worker.running
    rabbitmq.ctl("set_vm_memory_high_watermark", "0.6")

    stack.await_run(run_id, within=120)
    stack.assert_exactly_once_in_effect(run_id, ALL)


def test_the_queue_is_deleted_in_mid_fan_out_and_declared_again(stack: Stack, rabbitmq: RabbitMQServer) -> None:
    stack.worker()
    run_id = stack.crawl(1)
    await_published(stack, run_id, 500)

    rabbitmq.ctl("delete_queue", "extraction_queue")

    run = stack.await_run(run_id, within=90)
    events = stack.query("SELECT code FROM orchestrator.run_events WHERE run_id = %s", run_id)
    assert (run["state"], run["published"]) == ("succeeded", SOURCES)
    assert "queue_missing" in {event["code"] for event in events}
    # What stood in the queue when it was deleted is gone with it; everything after is there.
    assert max(ALL) in {message.source for message in stack.extractions()}
