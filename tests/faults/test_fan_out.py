"""Promise 2 under fire: workers killed, frozen, doubled and stopped in the middle of a fan-out."""

from random import Random
from typing import Any
from uuid import UUID, uuid4

from tests.faults.conftest import StackFactory, rounds
from tests.support.processes import Process, eventually
from tests.support.stack import Stack

SOURCES = 20_000
ALL = range(1, SOURCES + 1)


def a_big_task(stack: Stack) -> int:
    stack.application.add_sources(SOURCES)
    stack.application.add_task(1, ALL)
    return 1


def await_published(stack: Stack, run_id: UUID, count: int) -> None:
    """Wait until a run has published so many, or is over."""

    def enough() -> bool:
        run = stack.run(run_id)
        return run is not None and (run["published"] >= count or run["finished_at"] is not None)

    eventually(enough, within=60, what=f"{count} published")


def published_by(process: Process) -> int:
    """Return how many batches a worker published, by its own log."""
    return process.text().count('"batch.published"')


def test_kill_9_of_the_only_worker_at_random_points(make_rabbitmq: StackFactory, random: Random) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE="500")
    task_id = a_big_task(stack)
    worker = stack.worker()
    killed_in_the_middle = duplicates = 0

    for _ in rounds(4):
        run_id = stack.crawl(task_id)
        await_published(stack, run_id, random.randrange(SOURCES))
        worker.close()
        killed_in_the_middle += (stack.run(run_id) or {})["state"] == "running"
        worker = stack.worker()

        stack.await_run(run_id)
        duplicates += stack.assert_exactly_once_in_effect(run_id, ALL)

    assert killed_in_the_middle, "no kill hit a run: the test proved nothing"
    # At most one batch for each kill and child.
    assert duplicates <= 2 * 500 * len(rounds(4))


def test_kill_9_on_the_embedded_set_up(make_embedded: StackFactory, random: Random) -> None:
    stack = make_embedded(DISPATCH__BATCH_SIZE="100")
    task_id = a_big_task(stack)

    for _ in rounds(1):
        worker = stack.worker()
        run_id = stack.crawl(task_id)
        await_published(stack, run_id, random.randrange(SOURCES // 2))
        worker.close()
        worker = stack.worker()

        stack.await_run(run_id, within=90)
        # Message and mark share a transaction: exactly once into the queue.
        assert stack.assert_exactly_once_in_effect(run_id, ALL) == 0
        worker.close()


def test_kill_9_of_a_pool_child(make_rabbitmq: StackFactory, random: Random) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE="200")
    task_id = a_big_task(stack)
    worker = stack.worker("--pool", "prefork", concurrency=1)

    for _ in rounds(2):
        run_id = stack.crawl(task_id)
        await_published(stack, run_id, random.randrange(SOURCES // 2))
        worker.kill_a_child()

        stack.await_run(run_id)
        stack.assert_exactly_once_in_effect(run_id, ALL)
        assert worker.running


def test_two_workers_share_one_run(make_rabbitmq: StackFactory) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE="100", LOG__LEVEL="DEBUG")
    task_id, run_id = a_big_task(stack), uuid4()
    workers = [stack.worker(concurrency=1) for _ in range(2)]

    for _ in workers:
        stack.crawl(task_id, celery_id=str(run_id))

    stack.await_run(run_id)
    assert stack.assert_exactly_once_in_effect(run_id, ALL) == 0
    assert all(published_by(worker) for worker in workers)


def test_a_storm_of_deliveries_is_one_run(make_rabbitmq: StackFactory) -> None:
    stack = make_rabbitmq()
    task_id, run_id = a_big_task(stack), uuid4()
    for _ in range(5):
        stack.crawl(task_id, celery_id=str(run_id))

    for _ in range(2):
        stack.worker()

    stack.await_run(run_id)
    assert stack.assert_exactly_once_in_effect(run_id, ALL) == 0


def test_the_rows_of_a_frozen_worker_are_published_by_another(make_rabbitmq: StackFactory) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE="200")
    task_id = a_big_task(stack)
    frozen, _ = stack.worker(concurrency=1), None
    run_id = stack.crawl(task_id)
    await_published(stack, run_id, 1_000)

    frozen.freeze()
    stack.worker(concurrency=1)

    # 15 s of silence, 30 s until PostgreSQL ends the frozen session, and the second wake-up after that.
    stack.await_run(run_id, within=75)
    frozen.thaw()
    stack.assert_exactly_once_in_effect(run_id, ALL)


def test_sigterm_in_mid_fan_out_hands_over(make_rabbitmq: StackFactory) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE="100")
    task_id = a_big_task(stack)
    first = stack.worker(concurrency=1)
    run_id = stack.crawl(task_id)
    await_published(stack, run_id, 500)

    assert first.terminate(within=15) == 0
    interrupted: dict[str, Any] = stack.run(run_id) or {}
    stack.worker(concurrency=1)

    assert (interrupted["state"], interrupted["published"] < SOURCES) == ("running", True)
    stack.await_run(run_id)
    assert stack.assert_exactly_once_in_effect(run_id, ALL) == 0


def test_cancel_in_mid_fan_out_stops_it_and_the_counts_add_up(make_stack: StackFactory) -> None:
    stack = make_stack(DISPATCH__BATCH_SIZE="50")
    task_id = a_big_task(stack)
    stack.worker(concurrency=1)
    run_id = stack.crawl(task_id)
    await_published(stack, run_id, 500)

    cancel = stack.start("orchestrator", "cancel", str(run_id), "--reason", "wrong list")
    assert cancel.wait(within=30) == 0, cancel.text()

    def settled() -> bool:
        return "pending" not in stack.dispatches(run_id)

    eventually(settled, within=30, what="no dispatch is pending any more")
    run: dict[str, Any] = stack.run(run_id) or {}
    counts = stack.dispatches(run_id)
    assert run["state"] == "canceled"
    assert "wrong list" in run["error_message"]
    assert 0 < counts["published"] < SOURCES
    assert (run["published"], run["skipped"]) == (counts["published"], counts["skipped"])
    assert run["published"] + run["skipped"] == run["total"] == SOURCES
    on_the_wire = {message.source for message in stack.extractions() if message.body["run_id"] == str(run_id)}
    assert len(on_the_wire) == run["published"]
