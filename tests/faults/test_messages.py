"""Poison: nothing that stands in a queue ends a worker, holds up a good message, or is silently gone."""

import json
import struct
from functools import partial
from random import Random
from typing import Any, Final
from uuid import uuid4

import amqp
import pytest

from tests.faults.conftest import StackFactory
from tests.support.evidence import Evidence
from tests.support.processes import eventually
from tests.support.rounds import LONG
from tests.support.stack import ANALYSIS_TASK, CRAWL_TASK, Stack, amqp_connection, drain, queue_depth

MESSAGES: Final = 1_000 if LONG else 300
DEAD: Final = "orchestrator.dead"

ODD_VALUES: Final[list[Any]] = [
    *(None, True, False, 0, -1, 1.5, 2**63, 2**70, -(2**63)),
    *("", " ", "7", "x" * 300, "\u0000", "\ud800", "💥", "'; DROP TABLE crawl_tasks; --"),
    *([], {}, [1], {"task_id": 1}, [[[]]], {"$": {"$": {}}}),
]


def headers(task: object, celery_id: object) -> dict[str, Any]:
    return {"lang": "py", "task": task, "id": celery_id, "root_id": celery_id, "argsrepr": "()", "kwargsrepr": "{}"}


def wrong_arguments(random: Random) -> tuple[bytes, dict[str, Any]]:
    """A task message as a client would send it, with arguments of every wrong kind: becomes a failed run."""
    task = random.choice([CRAWL_TASK, ANALYSIS_TASK])
    args = [random.choice(ODD_VALUES) for _ in range(random.randrange(4))]
    kwargs = {name: random.choice(ODD_VALUES) for name in random.sample(["task_id", "theme_name", "zzz"], 1)}
    body = json.dumps([args, kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()
    return body, {
        "application_headers": headers(task, str(uuid4())),
        "content_type": "application/json",
        "content_encoding": "utf-8",
    }


def undeliverable(random: Random) -> tuple[bytes, dict[str, Any]]:
    """A message that no task can take: becomes a dead letter, as it came."""
    good = json.dumps([[1], {}, {}]).encode()
    json_type = {"content_type": "application/json", "content_encoding": "utf-8"}
    mine = headers(CRAWL_TASK, str(uuid4()))
    letters: list[tuple[bytes, dict[str, Any]]] = [
        (b"{not json", {**json_type, "application_headers": mine}),
        (b"\xff\xfe\x00", {**json_type, "application_headers": mine}),
        (b"", {**json_type, "application_headers": mine}),
        (good, {"application_headers": mine, "content_type": "application/x-python-serialize"}),
        (good, {"application_headers": mine, "content_type": "no/such", "content_encoding": "nonsense"}),
        (good, {**json_type, "application_headers": headers("orchestrator.tasks.nope", str(uuid4()))}),
        (good, {**json_type, "application_headers": headers("os.system", str(uuid4()))}),
        (good, {**json_type, "application_headers": headers(CRAWL_TASK, random.choice([None, 5, "", "x" * 600]))}),
        (good, {**json_type, "application_headers": headers(random.choice([None, 5, [], {}]), str(uuid4()))}),
        (good, json_type),
        (
            json.dumps(random.choice(ODD_VALUES)).encode(errors="replace"),
            {**json_type, "application_headers": mine},
        ),
        (json.dumps([[1], {}]).encode(), {**json_type, "application_headers": mine}),
        (f"[[{'[' * 900}{']' * 900}], {{}}, {{}}]".encode(), {**json_type, "application_headers": mine}),
        (json.dumps({"task": CRAWL_TASK}).encode(), json_type),
        (json.dumps({"task": CRAWL_TASK, "id": 3, "args": [1], "kwargs": {}}).encode(), json_type),
    ]
    return random.choice(letters)


class Raw(amqp.Message):
    """A message whose properties are these bytes, for py-amqp would not write them."""

    def __init__(self, body: bytes, properties: bytes) -> None:
        super().__init__(body)
        self._raw = properties

    def _serialize_properties(self) -> bytes:
        return self._raw


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(*items: tuple[bytes, bytes]) -> bytes:
    """Encode headers: names, and values with the letter of their type."""
    content = b"".join(short(name) + value for name, value in items)
    return struct.pack(">I", len(content)) + content


def nested(depth: int) -> bytes:
    value = b"F" + table()
    for _ in range(depth):
        value = b"F" + table((b"n", value))
    return value


CONTENT_TYPE, ENCODING, HEADERS, MESSAGE_ID, TIMESTAMP = (1 << bit for bit in (15, 14, 13, 7, 6))
OURS: Final = tuple(
    (name, b"S" + struct.pack(">I", len(value)) + value)
    for name, value in {b"task": CRAWL_TASK.encode(), b"id": b"of no use"}.items()
)
UNREADABLE: Final[dict[str, tuple[int, bytes]]] = {
    "a time in milliseconds": (HEADERS, table(*OURS, (b"sent", b"T" + struct.pack(">Q", 1_763_973_000_000)))),
    "a time of no calendar": (HEADERS, table(*OURS, (b"sent", b"T" + struct.pack(">Q", 2**63)))),
    "nested thousands of times": (HEADERS, table(*OURS, (b"n", nested(3_000)))),
    "nested hundreds of times": (HEADERS, table(*OURS[:1], (b"n", nested(600)))),
    "a name that is not UTF-8": (HEADERS, table(*OURS[:1], (b"\xff\xfe", b"V"))),
    "a content type that is not UTF-8": (CONTENT_TYPE | HEADERS, short(b"\xff\xfe") + table(*OURS)),
    "an encoding that is not UTF-8": (ENCODING | HEADERS, short(b"\xff\xfe") + table(*OURS)),
    "a message id that is not UTF-8": (HEADERS | MESSAGE_ID, table(*OURS) + short(b"\xff\xfe")),
}


def publish(stack: Stack, body: bytes, properties: dict[str, Any], queue: str) -> None:
    assert stack.broker is not None
    with amqp_connection(stack.broker) as connection:
        connection.channel().basic_publish(amqp.Message(body, **properties), routing_key=queue)


@pytest.mark.fault("generated bad messages on both task queues")
def test_generated_bad_messages(make_rabbitmq: StackFactory, random: Random, evidence: Evidence) -> None:
    evidence.trials = MESSAGES
    stack = make_rabbitmq()
    assert stack.broker is not None
    stack.application.add_task(1, [])
    worker = stack.worker()
    recorded = buried = 0

    for number in range(MESSAGES):
        dead = random.random() < 0.5
        body, properties = undeliverable(random) if dead else wrong_arguments(random)
        recorded, buried = recorded + (not dead), buried + dead
        publish(stack, body, properties, random.choice(["orchestrator.crawl", "orchestrator.analysis"]))
        if number % 50 == 0:
            assert stack.await_run(stack.crawl(1))["state"] == "succeeded"

    assert stack.await_run(stack.crawl(1))["state"] == "succeeded"

    def failed_runs() -> int:
        (row,) = stack.query("SELECT count(*) FROM orchestrator.runs WHERE error_code = 'invalid_arguments'")
        count: int = row["count"]
        return count

    broker = stack.broker
    eventually(
        lambda: (failed_runs(), queue_depth(broker, DEAD)) == (recorded, buried),
        within=30,
        what=f"{recorded} failed runs and {buried} dead letters; the ledger has {failed_runs()}",
    )
    evidence.note(f"{recorded} became failed runs with their reason, {buried} dead letters as they came")
    assert worker.running
    assert {queue: queue_depth(broker, queue) for queue in ("orchestrator.crawl", "orchestrator.analysis")} == {
        "orchestrator.crawl": 0,
        "orchestrator.analysis": 0,
    }


def holds(broker: str, letters: int) -> bool:
    return queue_depth(broker, DEAD) == letters


@pytest.mark.fault("messages whose properties and headers cannot be decoded")
def test_unreadable_properties(make_rabbitmq: StackFactory, evidence: Evidence) -> None:
    stack = make_rabbitmq()
    assert stack.broker is not None
    broker = stack.broker
    stack.application.add_task(1, [])
    worker = stack.worker()

    for number, (what, (flags, properties)) in enumerate(UNREADABLE.items(), start=1):
        with amqp_connection(broker) as connection:
            message = Raw(b"[[1], {}, {}]", struct.pack(">H", flags) + properties)
            connection.channel().basic_publish(message, routing_key="orchestrator.crawl")
        eventually(partial(holds, broker, number), within=20, what=f"a dead letter of {what}")
        evidence.trials += 1

    assert stack.await_run(stack.crawl(1))["state"] == "succeeded"
    assert worker.running
    assert "Unrecoverable" not in worker.text()
    for letter in drain(broker, DEAD):
        assert letter.raw == b"[[1], {}, {}]"
        assert letter.properties["application_headers"]["x-orchestrator-reason"], letter
        assert letter.properties["application_headers"]["x-original-headers"], letter


@pytest.mark.fault("a message with 10 MB of argument")
def test_ten_megabytes_of_argument_are_a_failed_run(make_rabbitmq: StackFactory) -> None:
    stack = make_rabbitmq()
    stack.worker()

    run = stack.await_run(stack.analyse(1, "x" * 10_000_000))

    assert (run["state"], run["error_code"]) == ("failed", "invalid_arguments")
    assert len(run["error_message"]) < 1_000


@pytest.mark.fault("a message of another application on our queue")
def test_a_dead_letter_is_as_it_came_and_says_why(make_rabbitmq: StackFactory) -> None:
    stack = make_rabbitmq()
    assert stack.broker is not None
    worker = stack.worker()
    broker = stack.broker

    publish(
        stack,
        b'[[1], {}, {"callbacks": null}]',
        {
            "application_headers": headers("shop.tasks.ship", "abc"),
            "content_type": "application/json",
            "content_encoding": "utf-8",
        },
        "orchestrator.crawl",
    )

    eventually(lambda: queue_depth(broker, DEAD) == 1, within=20, what="one dead letter")
    (letter,) = drain(broker, DEAD)
    assert letter.raw == b'[[1], {}, {"callbacks": null}]'
    facts = letter.properties["application_headers"]
    assert "shop.tasks.ship" in facts["x-orchestrator-reason"]
    assert json.loads(facts["x-original-headers"])["id"] == "abc"
    assert facts["x-orchestrator-queue"] == "orchestrator.crawl"
    assert worker.running
