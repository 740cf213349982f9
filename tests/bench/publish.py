"""How fast messages get onto a durable queue of RabbitMQ, each confirmed: our publisher and its alternatives.

    python -m tests.bench.publish [--rounds 5]

All ways run interleaved, five times each, on one broker: the one of ``BENCH_BROKER_URL``, else a private one.
Compare the ratios, which hold elsewhere too; the rates are this machine's.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from uuid import UUID, uuid4

import amqp
import kombu
from kombu.utils.url import url_to_parts
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from pydantic import SecretStr

from orchestrator.domain import APP_ID, EXTRACTION_TYPE, ExtractionBatch, traceparent_of
from orchestrator.queues.rabbitmq import RabbitMQPublisher
from tests.bench.schedules import host, say, table

ROUNDS = 5
MANY = 50_000
FEW = 3_000
PER_WRITE = 500
WINDOW = 5_000
QUEUE = "bench.publish"


def batch(run_id: UUID, start: int, size: int) -> ExtractionBatch:
    sources = [(number, number) for number in range(start, start + size)]
    return ExtractionBatch(run_id, 1, traceparent_of(run_id), sources)


def ours(url: str, batch_size: int) -> int:
    """Our publisher through the port, in batches of one size."""
    publisher = RabbitMQPublisher(SecretStr(url), QUEUE)
    run_id = uuid4()
    for start in range(1, MANY + 1, batch_size):
        receipt = publisher.publish(batch(run_id, start, batch_size), None)  # type: ignore[arg-type] # no ledger here
        if receipt.error is not None:
            raise receipt.error
    publisher.close()
    return MANY


def by_hand(url: str, many: int = MANY) -> int:
    """Frames marshalled one by one with pamqp, written by the 500; nothing is kept but a count of acks."""
    connection = connect(url)
    channel = connection.channel()
    channel.confirm_select()
    confirmed = 0

    def on_ack(tag: int, multiple: bool) -> None:  # noqa: FBT001 -- py-amqp's callback
        nonlocal confirmed
        confirmed = tag if multiple else confirmed + 1

    channel.events["basic_ack"].add(on_ack)  # type: ignore[attr-defined] # missing in the stubs
    whole = batch(uuid4(), 1, many)
    frames: list[bytes] = []
    sent = 0
    for _, message_id, body in whole.messages():
        frames.append(frames_of(str(message_id), body, whole.traceparent))
        if len(frames) == PER_WRITE or sent + len(frames) == many:
            connection.transport.write(b"".join(frames))
            sent += len(frames)
            frames.clear()
            while sent - confirmed > WINDOW - PER_WRITE:
                connection.drain_events(timeout=10)
    while confirmed < sent:
        connection.drain_events(timeout=10)
    connection.close()
    return many


def frames_of(message_id: str, body: bytes, traceparent: str) -> bytes:
    properties = commands.Basic.Properties(
        content_type="application/json",
        delivery_mode=2,
        message_type=EXTRACTION_TYPE,
        app_id=APP_ID,
        headers={"traceparent": traceparent},
        message_id=message_id,
    )
    publish = commands.Basic.Publish(exchange="", routing_key=QUEUE, mandatory=True)
    header = ContentHeader(body_size=len(body), properties=properties)
    return b"".join((marshal(publish, 1), marshal(header, 1), marshal(ContentBody(body), 1)))


def seed(url: str) -> int:
    """The seed's way: a kombu producer that awaits one confirm a message."""
    whole = batch(uuid4(), 1, FEW)
    with kombu.Connection(url, transport_options={"confirm_publish": True}) as connection:
        producer = connection.Producer()
        for _, message_id, body in whole.messages():
            producer.publish(
                body,
                routing_key=QUEUE,
                mandatory=True,
                content_type="application/json",
                content_encoding="utf-8",
                delivery_mode=2,
                message_id=str(message_id),
                type=EXTRACTION_TYPE,
                app_id=APP_ID,
                headers={"traceparent": whole.traceparent},
            )
    return FEW


def connect(url: str) -> amqp.Connection:
    parts = url_to_parts(url)
    connection = amqp.Connection(
        f"{parts.hostname}:{parts.port or 5672}",
        parts.username or "guest",
        parts.password or "guest",
        login_method="PLAIN",
        virtual_host=parts.path or "/",
    )
    connection.connect()
    return connection


@contextmanager
def broker() -> Iterator[str]:
    if url := os.environ.get("BENCH_BROKER_URL"):
        yield url
        return
    from tests.support.rabbitmq import RabbitMQServer  # noqa: PLC0415 -- only where no broker is given

    with RabbitMQServer() as server:
        yield server.url


def measure(url: str, way: Callable[[str], int]) -> float:
    with connect(url) as connection:
        channel = connection.channel()
        channel.queue_declare(QUEUE, durable=True, auto_delete=False)
        channel.queue_purge(QUEUE)
    started = perf_counter()
    count = way(url)
    rate = count / (perf_counter() - started)
    with connect(url) as connection:
        _, arrived, _ = connection.channel().queue_declare(QUEUE, passive=True) or (None, None, None)
    if arrived != count:
        raise AssertionError(f"{arrived} messages arrived, {count} were sent")
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.publish", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which rates are medians; default {ROUNDS}")
    rounds = parser.parse_args().rounds
    ways: dict[str, Callable[[str], int]] = {
        "ours, batches of 10,000": lambda url: ours(url, 10_000),
        "ours, batches of 1,000": lambda url: ours(url, 1_000),
        "frames built by hand (pamqp for each message)": by_hand,
        "the seed's way: kombu, a confirm each": seed,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with broker() as url:
        say(host())
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name].append(measure(url, way))
    medians = [statistics.median(values) for values in rates.values()]
    *_, limit, seeds = medians
    rows = [
        [
            name,
            f"{median:,.0f}",
            f"{min(values):,.0f} to {max(values):,.0f}",
            f"{median / limit:.2f}",
            f"{median / seeds:.1f}",
        ]
        for (name, values), median in zip(rates.items(), medians, strict=True)
    ]
    say(f"\nmedians of {rounds}, interleaved; target: ours at least 0.75 to frames by hand\n")
    say(table(("way", "messages/s", "range", "to frames by hand", "to the seed's"), rows))


if __name__ == "__main__":
    main()
