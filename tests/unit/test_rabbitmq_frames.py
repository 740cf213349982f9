"""The hand-built bytes equal what pamqp marshals, and the book-keeping of confirms equals a naive one."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import FrameTypes, marshal, unmarshal
from pamqp.header import ContentHeader
from pydantic import SecretStr

from orchestrator.celery_app import ANALYSIS_QUEUE, ANALYSIS_TASK, CRAWL_QUEUE, CRAWL_TASK, Sender, _Envelope
from orchestrator.domain import AnalysisArguments, CrawlArguments, WakeUp, traceparent_of
from orchestrator.errors import ConfigurationError
from orchestrator.queues.rabbitmq import RabbitMQPublisher, extraction_template
from orchestrator.rabbitmq import Fate, FrameTemplate

TRACEPARENT = "00-0b6f1c9e3f534d0e9a516a3d7d0c8e11-00f067aa0ba902b7-01"
IDS = st.uuids().map(lambda uuid: str(uuid).encode())
BODIES = st.binary(min_size=1, max_size=4_088)
BIGINTS = st.integers(1, 2**63 - 1)
THEMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=255).filter(str.strip)


def by_pamqp(queue: str, message_id: bytes, body: bytes) -> bytes:
    properties = commands.Basic.Properties(
        content_type="application/json",
        headers={"traceparent": TRACEPARENT},
        delivery_mode=2,
        message_id=message_id.decode(),
        message_type="extraction.requested",
        app_id="orchestrator",
    )
    publish = commands.Basic.Publish(exchange="", routing_key=queue, mandatory=True)
    frames = publish, ContentHeader(body_size=len(body), properties=properties), ContentBody(body)
    return b"".join(marshal(frame, 1) for frame in frames)


def frames_in(data: bytes) -> Iterator[FrameTypes]:
    while data:
        size, channel, frame = unmarshal(data)
        assert channel == 1
        yield frame
        data = data[size:]


@given(queue=st.text(min_size=1, max_size=60), messages=st.lists(st.tuples(IDS, BODIES), max_size=20))
@example(queue="%b", messages=[(b"%" * 36, b"%b" * 18)])
def test_template_writes_the_bytes_that_pamqp_marshals(queue: str, messages: list[tuple[bytes, bytes]]) -> None:
    written = extraction_template(queue, TRACEPARENT).fill(messages)
    assert written == b"".join(by_pamqp(queue, *message) for message in messages)


def test_a_queue_called_like_the_place_holder_changes_nothing() -> None:
    message = str(UUID(int=1)).encode(), b"{}"
    assert extraction_template("?" * 36, TRACEPARENT).fill([message]) == by_pamqp("?" * 36, *message)


def test_every_place_holder_is_replaced_wherever_it_occurs() -> None:
    def properties(one: str, other: str) -> commands.Basic.Properties:
        return commands.Basic.Properties(
            headers={"a": other, "b": one, "c%b": "100%"}, message_id=one, correlation_id=other, app_id=one
        )

    written = FrameTemplate("queue", properties("??", "!!!"), b"??", b"!!!").fill([(b"%s", b"\\1\n", b"body")])
    header = marshal(ContentHeader(body_size=4, properties=properties("%s", "\\1\n")), 1)
    assert header in written


@given(
    run_id=st.uuids(),
    arguments=st.builds(CrawlArguments, BIGINTS) | st.builds(AnalysisArguments, BIGINTS, THEMES),
    number=st.integers(0, 2**31 - 1),
    helps=st.booleans(),
)
@example(run_id=UUID(int=2**128 - 1), arguments=AnalysisArguments(2**63 - 1, "😀" * 255), number=2**31 - 1, helps=True)
@example(run_id=UUID(int=0), arguments=AnalysisArguments(1, '%b"\\\x01\u2028' * 20), number=0, helps=False)
def test_wake_ups_are_the_messages_that_celery_sends(
    run_id: UUID, arguments: CrawlArguments | AnalysisArguments, number: int, *, helps: bool
) -> None:
    wake_up = WakeUp(run_id, arguments, traceparent_of(run_id), number, helps)
    crawl = isinstance(arguments, CrawlArguments)
    queue, task = (CRAWL_QUEUE, CRAWL_TASK) if crawl else (ANALYSIS_QUEUE, ANALYSIS_TASK)
    celery = Celery(broker="memory://", task_routes={task: {"queue": queue}}, set_as_current=False)
    Sender(celery).wake([wake_up])
    with celery.connection_for_read() as connection:
        channel: Any = connection.channel()
        expected = channel.basic_get(queue, no_ack=True)
    assert expected is not None

    envelope = _Envelope(celery, task, queue, helps=helps)
    publish, header, body = frames_in(envelope.template.fill(envelope.messages([wake_up])))
    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key, publish.mandatory) == ("", queue, True)
    assert isinstance(body, ContentBody)
    assert body.value == expected.body
    assert isinstance(header, ContentHeader)
    assert header.body_size == len(expected.body)
    assert header.properties.headers == expected.headers | {"argsrepr": "(...)"}
    for name in ("content_type", "content_encoding"):
        assert getattr(header.properties, name) == getattr(expected, name)
    for name in ("correlation_id", "reply_to", "delivery_mode", "priority"):
        assert getattr(header.properties, name) == expected.properties[name]


@pytest.mark.parametrize("size", [0, 4_089])
def test_bodies_that_do_not_fit_one_frame_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 4088 bytes"):
        extraction_template("queue", TRACEPARENT).fill([(b"-" * 36, b"x" * size)])


@given(
    first=st.integers(1, 2**40),
    size=st.integers(1, 40),
    answers=st.lists(st.tuples(st.integers(-2, 42), st.booleans(), st.sampled_from([b"\1", b"\2"])), max_size=60),
    returned=st.sets(st.integers(0, 39)),
)
def test_confirms_are_counted_as_a_naive_reader_would(
    first: int, size: int, answers: list[tuple[int, bool, bytes]], returned: set[int]
) -> None:
    fate = Fate(first)
    fate.expect(size)
    for position in returned:
        fate.give_back(str(position))
    marks: dict[int, bytes] = {}
    for offset, multiple, mark in answers:
        fate.settle(first + offset, mark, multiple=multiple)
        for position in range(size):
            if position == offset or (multiple and position < offset):
                marks.setdefault(position, mark)
    acked = [marks.get(position) == b"\1" and position not in returned for position in range(size)]
    assert list(fate.confirmed(b"%d" % position for position in range(size))) == acked
    assert fate.unconfirmed == size - len(marks)


@pytest.mark.parametrize("url", ["amqp://user:canary@host:port/", "amqp://user:canary@host:70000/", "amqp://[canary/"])
def test_a_malformed_address_is_named_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RabbitMQPublisher(SecretStr(url), "queue")
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
