"""Promise 2 under fire: workers killed in the middle of a fan-out."""

from random import Random

from tests.faults.conftest import ALL, SOURCES, StackFactory, a_big_task, await_published, rounds


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
