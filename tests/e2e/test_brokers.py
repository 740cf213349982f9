"""Brokers as operators and other people's clients leave them: quorum vhosts, odd declarations, odd messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import amqp
import pytest

from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE, WAKE_NUMBER
from tests.support.operators import command
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import CRAWL_TASK, Stack, amqp_connection

VHOST = "odd"


@pytest.fixture
def broker(rabbitmq_server: RabbitMQServer) -> Iterator[str]:
    """A vhost whose queues are quorum queues unless declared otherwise."""
    rabbitmq_server.ctl("add_vhost", VHOST, "--default-queue-type", "quorum")
    rabbitmq_server.ctl("set_permissions", "-p", VHOST, "guest", ".*", ".*", ".*")
    yield rabbitmq_server.vhost_url(VHOST)
    rabbitmq_server.ctl("delete_vhost", VHOST)


@pytest.fixture
def stack(broker: str, postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Stack]:
    """Set-up 2 on that vhost, without a worker."""
    stack = Stack.on_rabbitmq(postgres_server.create_database(VHOST), broker, tmp_path)
    stack.prepare()
    stack.application.add_sources(3)
    stack.application.add_task(1, [1, 2, 3])
    yield stack
    stack.close()
    postgres_server.drop_database(VHOST)


def test_a_vhost_of_quorum_queues_and_an_exchange_of_another_type(stack: Stack) -> None:
    assert stack.broker is not None
    with amqp_connection(stack.broker) as connection:
        connection.channel().exchange_declare("orchestrator", "direct", durable=True, auto_delete=False)
    worker = stack.worker()

    run_id = stack.crawl(1)

    stack.await_run(run_id)
    assert stack.assert_exactly_once_in_effect(run_id, [1, 2, 3]) == 0
    assert "the exchange orchestrator exists with another type" in worker.text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kwargs": {"self": 1, "task_id": 1}}, "self_"),
        ({"args": [1], "headers": {"eta": "9999-12-31T23:59:59-12:00"}}, "eta"),
        ({"args": [1], "headers": {"eta": "tomorrow"}}, "eta"),
        ({"args": [1], "headers": {"expires": "0001-01-01T00:00:00+08:00"}}, "expires"),
    ],
)
def test_what_cannot_be_understood_is_a_failed_run(on_rabbitmq: Stack, options: dict[str, Any], says: str) -> None:
    sent = on_rabbitmq.client().send_task(CRAWL_TASK, queue="orchestrator.crawl", **options)

    run = on_rabbitmq.await_run(sent.id)

    assert (run["state"], run["error_code"]) == ("failed", "invalid_arguments")
    assert says in run["error_message"]


def test_a_callback_of_the_caller_is_not_sent(on_rabbitmq: Stack) -> None:
    client = on_rabbitmq.client()
    assert on_rabbitmq.broker is not None
    with amqp_connection(on_rabbitmq.broker) as connection:
        connection.channel().queue_declare("bff", durable=True, auto_delete=False)

    sent = client.send_task(
        CRAWL_TASK, args=["x"], queue="orchestrator.crawl", link=client.signature("bff.next", queue="bff")
    )

    on_rabbitmq.await_run(sent.id)
    on_rabbitmq.await_run(on_rabbitmq.crawl(404_405))
    with amqp_connection(on_rabbitmq.broker) as connection:
        assert connection.channel().basic_get("bff") is None


def test_a_dead_letter_queue_that_refuses_is_tried_again_not_hammered(
    stack: Stack, rabbitmq_server: RabbitMQServer
) -> None:
    assert stack.broker is not None
    with amqp_connection(stack.broker) as connection:
        # Quorum queues take "full" loosely.
        classic = {"x-queue-type": "classic"}
        connection.channel().queue_declare("orchestrator.dead", durable=True, auto_delete=False, arguments=classic)
    limit = '{"max-length": 0, "overflow": "reject-publish"}'
    rabbitmq_server.ctl("set_policy", "-p", VHOST, "full", "^orchestrator.dead$", limit, "--apply-to", "queues")
    worker = stack.worker()

    with amqp_connection(stack.broker) as connection:
        connection.channel().basic_publish(amqp.Message(b"poison"), routing_key="orchestrator.crawl")

    worker.await_line("message.dead_letter_failed", within=30)
    assert stack.await_run(stack.crawl(1))["state"] == "succeeded"
    assert worker.text().count("message.dead_letter_failed") <= 3
    rabbitmq_server.ctl("clear_policy", "-p", VHOST, "full")
    eventually(lambda: "message.dead_lettered" in worker.text(), within=40, what="the poison is buried")


def controlled(stack: Stack, order: str, *arguments: object, **options: object) -> dict[str, Any]:
    """Give the one worker an order as `celery control` does; return its answer."""
    client = stack.client()
    # Not from kombu's pool: that has connections to earlier vhosts of this name.
    with client.connection_for_write() as connection:
        command: Any = getattr(client.control, order)
        (answers,) = command(*arguments, **options, reply=True, timeout=10, limit=1, connection=connection)
    (answer,) = answers.values()
    return dict(answer)


def test_remote_control_cannot_lose_a_run_and_shows_what_is_consumed(stack: Stack) -> None:
    worker = stack.worker()
    run_id = uuid4()

    assert "error" in controlled(stack, "revoke", str(run_id), terminate=True)
    assert "error" in controlled(stack, "terminate", str(run_id))
    assert "error" in controlled(stack, "rate_limit", CRAWL_TASK, "1/h")
    stack.crawl(1, celery_id=str(run_id))
    stack.await_run(run_id, "succeeded")

    controlled(stack, "cancel_consumer", CRAWL_QUEUE)

    def consumed() -> list[str]:
        (node,) = command(stack, "workers", "--json").document["nodes"]
        queues: list[str] = node["queues"]
        return queues

    eventually(lambda: consumed() == [ANALYSIS_QUEUE], within=20, what="an operator sees which queue is left", every=1)
    controlled(stack, "cancel_consumer", ANALYSIS_QUEUE)
    eventually(lambda: command(stack, "ready").code == 1, within=20, what="without queues it is not ready", every=1)
    assert worker.running


def test_a_wake_up_of_another_deployments_is_not_executed_here(stack: Stack) -> None:
    worker = stack.worker()

    foreign = stack.crawl(1, headers={WAKE_NUMBER: 1})
    ours = stack.crawl(1)

    stack.await_run(ours, "succeeded")
    worker.await_line("wake_up.foreign", within=20)
    assert stack.run(foreign) is None
    stack.assert_exactly_once_in_effect(ours, [1, 2, 3])
