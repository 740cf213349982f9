"""The hand-built bytes equal what pamqp marshals, and the book-keeping of confirms equals a naive one."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from pydantic import SecretStr

from orchestrator.errors import ConfigurationError
from orchestrator.queues.rabbitmq import RabbitMQPublisher, _Fate, extraction_template

TRACEPARENT = "00-0b6f1c9e3f534d0e9a516a3d7d0c8e11-00f067aa0ba902b7-01"
IDS = st.uuids().map(lambda uuid: str(uuid).encode())
BODIES = st.binary(min_size=1, max_size=4_088)


def by_pamqp(channel: int, queue: str, message_id: bytes, body: bytes) -> bytes:
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
    return b"".join(marshal(frame, channel) for frame in frames)


@given(
    channel=st.integers(1, 65_535),
    queue=st.text(min_size=1, max_size=60),
    messages=st.lists(st.tuples(IDS, BODIES), max_size=20),
)
def test_template_writes_the_bytes_that_pamqp_marshals(
    channel: int, queue: str, messages: list[tuple[bytes, bytes]]
) -> None:
    written = extraction_template(queue, TRACEPARENT, channel).fill(messages)
    assert written == b"".join(by_pamqp(channel, queue, *message) for message in messages)


def test_a_queue_called_like_the_place_holder_changes_nothing() -> None:
    message = str(UUID(int=1)).encode(), b"{}"
    assert extraction_template("?" * 36, TRACEPARENT, 1).fill([message]) == by_pamqp(1, "?" * 36, *message)


@pytest.mark.parametrize("size", [0, 4_089])
def test_bodies_that_do_not_fit_one_frame_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 4088 bytes"):
        extraction_template("queue", TRACEPARENT, 1).fill([(b"-" * 36, b"x" * size)])


@given(
    first=st.integers(1, 2**40),
    size=st.integers(1, 40),
    answers=st.lists(st.tuples(st.integers(-2, 42), st.booleans(), st.sampled_from([b"\1", b"\2"])), max_size=60),
    returned=st.sets(st.integers(0, 39)),
)
def test_confirms_are_counted_as_a_naive_reader_would(
    first: int, size: int, answers: list[tuple[int, bool, bytes]], returned: set[int]
) -> None:
    fate = _Fate(first)
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
