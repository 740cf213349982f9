"""Wake-ups on a real RabbitMQ: what any Celery client would have sent, confirmed, and clear words when it cannot be."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Connection

from orchestrator.celery_app import (
    ANALYSIS_QUEUE,
    ANALYSIS_TASK,
    CRAWL_QUEUE,
    CRAWL_TASK,
    DEAD_QUEUE,
    HELPS,
    WAKE_NUMBER,
    Sender,
)
from orchestrator.domain import AnalysisArguments, CrawlArguments, WakeUp, traceparent_of
from orchestrator.errors import (
    BrokerBlockedError,
    BrokerUnreachableError,
    ConfirmTimeoutError,
    MessageRefusedError,
    PublishError,
    QueueMissingError,
)
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer

pytestmark = pytest.mark.timeout(120)


def wake_up(number: int, theme: str | None = None) -> WakeUp:
    run_id = uuid4()
    arguments = CrawlArguments(number) if theme is None else AnalysisArguments(number, theme)
    return WakeUp(run_id, arguments, traceparent_of(run_id), number)


def wake_ups(count: int) -> list[WakeUp]:
    """Make wake-ups of both kinds."""
    return [wake_up(number, f"thème {number}" if number % 2 else None) for number in range(1, count + 1)]


class Broker:
    """A vhost, our sender to it, and a plain Celery client of its own."""

    def __init__(self, url: str) -> None:
        self.celery = Celery(broker=url, set_as_current=False)
        self.sender = Sender(self.celery)

    @contextmanager
    def channel(self) -> Iterator[Any]:
        connection: Connection = self.celery.connection_for_read()
        with connection, connection.channel() as channel:
            yield channel

    def count(self, queue: str) -> int:
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)

    def delete(self, queue: str) -> None:
        with self.channel() as channel:
            channel.queue_delete(queue)

    def is_awake(self) -> bool:
        try:
            self.sender.wake([wake_up(1)])
        except PublishError:
            return False
        return True

    def read(self) -> dict[str, dict[str, Any]]:
        """Return what a worker reads of every message, by task id."""
        received = {}
        with self.channel() as channel:
            for queue in (ANALYSIS_QUEUE, CRAWL_QUEUE):
                while (message := channel.basic_get(queue, no_ack=True)) is not None:
                    facts = {**message.properties, "body": message.body, "queue": queue}
                    received[facts["correlation_id"]] = facts
        return received

    def send_plainly(self, wake_up: WakeUp) -> None:
        crawl = isinstance(wake_up.arguments, CrawlArguments)
        self.celery.send_task(
            CRAWL_TASK if crawl else ANALYSIS_TASK,
            astuple(wake_up.arguments),
            task_id=str(wake_up.run_id),
            queue=CRAWL_QUEUE if crawl else ANALYSIS_QUEUE,
            headers={"traceparent": wake_up.traceparent, WAKE_NUMBER: wake_up.number, HELPS: wake_up.helps},
            ignore_result=True,
        )


@pytest.fixture
def broker(broker_url: str) -> Iterator[Broker]:
    broker = Broker(broker_url)
    yield broker
    broker.sender.close()
    broker.celery.close()


@pytest.fixture
def fragile(fragile_server: RabbitMQServer) -> Iterator[Broker]:
    broker = Broker(fragile_server.vhost_url(fragile_server.fresh_vhost()))
    yield broker
    fragile_server.start()
    broker.sender.close()


def test_thousands_arrive_and_no_worker_can_tell_them_from_plain_messages(broker: Broker) -> None:
    woken = wake_ups(2_000)
    broker.sender.wake(woken)
    ours = broker.read()
    for one in woken:
        broker.send_plainly(one)
    plain = broker.read()
    assert len(ours) == 2_000
    for facts in (*ours.values(), *plain.values()):
        del facts["application_headers"]["argsrepr"]
    assert ours == plain


def test_the_longest_theme_arrives(broker: Broker) -> None:
    themes = ["😀" * 255, '"\\\n' * 85, "采集 – Ünïcödé"]
    broker.sender.wake([wake_up(2**63 - 1, theme) for theme in themes])
    bodies = [json.loads(facts["body"]) for facts in broker.read().values()]
    assert [args for args, _, _ in bodies] == [[2**63 - 1, theme] for theme in themes]


def test_a_strange_traceparent_does_no_harm(broker: Broker) -> None:
    strange = WakeUp(uuid4(), CrawlArguments(1), "too short")
    broker.sender.wake([strange, *wake_ups(10)])
    received = broker.read()
    assert len(received) == 11
    assert received[str(strange.run_id)]["application_headers"]["traceparent"] == traceparent_of(strange.run_id)


def test_nothing_to_send_is_no_error(broker: Broker) -> None:
    broker.sender.wake([])


def test_check_declares_the_queues(broker: Broker) -> None:
    broker.sender.check()
    assert [broker.count(queue) for queue in (ANALYSIS_QUEUE, CRAWL_QUEUE, DEAD_QUEUE)] == [0, 0, 0]
    with broker.channel() as channel:
        channel.basic_publish(channel.prepare_message(b"{}"), "orchestrator", CRAWL_QUEUE)
        eventually(lambda: broker.count(CRAWL_QUEUE), within=10, what="the exchange routes to the queue")


def test_threads_share_a_sender(broker: Broker) -> None:
    batches = [wake_ups(500) for _ in range(4)]
    threads = [threading.Thread(target=broker.sender.wake, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert broker.read().keys() == {str(one.run_id) for batch in batches for one in batch}


def test_a_deleted_queue_is_reported_and_declared_by_the_next_call(broker: Broker) -> None:
    broker.sender.wake(wake_ups(10))
    broker.delete(CRAWL_QUEUE)
    with pytest.raises(QueueMissingError, match=CRAWL_QUEUE):
        broker.sender.wake([wake_up(1)])
    broker.sender.wake([wake_up(1)])
    assert (broker.count(CRAWL_QUEUE), broker.count(ANALYSIS_QUEUE)) == (1, 5)


def test_a_full_queue_does_not_hold_up_the_other(broker: Broker, rabbitmq_server: RabbitMQServer) -> None:
    broker.sender.check()
    definition = json.dumps({"max-length": 10, "overflow": "reject-publish"})
    vhost = broker.celery.connection_for_read().virtual_host
    rabbitmq_server.ctl("set_policy", "-p", vhost, "--apply-to", "queues", "small", f"^{ANALYSIS_QUEUE}$", definition)
    with pytest.raises(MessageRefusedError, match=ANALYSIS_QUEUE):
        broker.sender.wake(wake_ups(2_000))
    assert broker.count(CRAWL_QUEUE) == 1_000


def test_a_queue_of_other_arguments_is_used_as_it_is(broker: Broker) -> None:
    with broker.channel() as channel:
        channel.queue_declare(CRAWL_QUEUE, durable=True, auto_delete=False, arguments={"x-max-priority": 3})
    broker.sender.wake(wake_ups(10))
    assert broker.count(CRAWL_QUEUE) == 5


def test_a_broker_that_stops_answering_is_given_up_on(fragile: Broker, fragile_server: RabbitMQServer) -> None:
    fragile.sender.wake(wake_ups(10))
    fragile_server.pause()
    try:
        started = monotonic()
        with pytest.raises(ConfirmTimeoutError):
            fragile.sender.wake([wake_up(1)])
        assert monotonic() - started < 8
    finally:
        fragile_server.resume()
    more = wake_ups(1_000)
    fragile.sender.wake(more)
    assert {str(one.run_id) for one in more} <= fragile.read().keys()


def test_a_killed_broker_is_unreachable_until_it_is_back(fragile: Broker, fragile_server: RabbitMQServer) -> None:
    fragile.sender.wake(wake_ups(10))
    fragile_server.settle()
    fragile_server.kill()
    for _ in range(2):
        with pytest.raises(BrokerUnreachableError):
            fragile.sender.wake(wake_ups(10))
    fragile_server.start()
    fragile.sender.wake(wake_ups(10))
    assert len(fragile.read()) == 20


def test_an_alarm_is_reported_soon_and_passes(fragile: Broker, fragile_server: RabbitMQServer) -> None:
    fragile.sender.wake(wake_ups(10))
    with fragile_server.alarm():
        started = monotonic()
        with pytest.raises(BrokerBlockedError, match="memory"):
            fragile.sender.wake(wake_ups(10))
        assert monotonic() - started < 5
    eventually(fragile.is_awake, within=10, what="waking works again")
