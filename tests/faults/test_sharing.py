"""Promise 2 with several deliveries on one run: shared, doubled, frozen, handed over, canceled."""

from typing import Any
from uuid import uuid4

from tests.faults.conftest import ALL, SOURCES, StackFactory, a_big_task, await_published
from tests.support.processes import Process, eventually


def published_by(process: Process) -> int:
    """Return how many batches a worker published, by its own log."""
    return process.text().count('"batch.published"')


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
    # Small batches, for the command line takes seconds to start.
    stack = make_stack(DISPATCH__BATCH_SIZE="5")
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
