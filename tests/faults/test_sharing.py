"""Promise 2 with several deliveries on one run: shared, doubled, frozen, handed over, canceled."""

import time
from random import Random
from typing import Any, Final
from uuid import uuid4

import pytest

from tests.faults.conftest import SOURCES, StackFactory, a_big_task, await_published
from tests.support.beats import Beats, Intervals
from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.evidence import Evidence
from tests.support.fleet import SHUTDOWN, Fleet, Position
from tests.support.oracle import RESUMED, Oracle
from tests.support.processes import Process, eventually
from tests.support.rounds import LONG, rounds
from tests.support.stack import Stack, queue_depth

QUEUES: Final = ("orchestrator.crawl", "orchestrator.analysis")


def await_delivered(stack: Stack) -> None:
    """Wait until nothing waits for a worker."""

    def waiting() -> int:
        if stack.broker is not None:
            return sum(queue_depth(stack.broker, queue) for queue in QUEUES)
        # A message that a worker holds stands there, too.
        return sum(len(stack.query(f"SELECT FROM pgmq.q_{queue.replace('.', '_')} LIMIT 1")) for queue in QUEUES)

    eventually(lambda: not waiting(), within=60, what="every message has been delivered")


# --- Redelivery ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("one message delivered again and again, to many workers at once")
def test_a_storm_of_deliveries_is_one_run_and_shared(make_rabbitmq: StackFactory, evidence: Evidence) -> None:
    sources = range(1, 5_001)
    with DiscoveryServer(answer(delay=0.5)) as discovery:
        stack = make_rabbitmq(DISPATCH__BATCH_SIZE="20", LOG__LEVEL="DEBUG", DISCOVERY_URL=discovery.url)
        stack.application.add_sources(len(sources))
        stack.application.add_task(1, sources)
        crawl, analysis = uuid4(), str(uuid4())
        deliveries = rounds(10, 50)

        def storm(part: slice) -> None:
            for _ in deliveries[part]:
                stack.crawl(1, celery_id=str(crawl))
                stack.analyse(1, "news", task_id=analysis)
                evidence.trials += 1

        storm(slice(0, None, 2))
        with Fleet(stack, 8 if LONG else 2) as fleet:
            await_published(stack, crawl, 1)
            storm(slice(1, None, 2))
            stack.await_run(crawl)
            stack.await_run(analysis)
            await_delivered(stack)
            workers = list(fleet.members.values())
            fleet.stop()

        verdict = Oracle(stack).assert_holds({crawl: sources})
        evidence.saw(verdict)
        assert verdict.duplicates == 0
        sharing = sum('"batch.published"' in worker.text() for worker in workers)
        assert sharing > 1, "one worker did it alone: nothing was shared"
        assert len(discovery.requests) == 1
        assert [attempt["outcome"] for attempt in stack.attempts(analysis)] == ["succeeded"]
        evidence.note(f"one run, shared by {sharing} of {len(workers)} workers; one call to the Discovery Service")


@pytest.mark.fault("cancel in mid-fan-out, then wake-ups that come late")
def test_cancel_in_mid_fan_out_stops_it_whatever_comes_late(make_stack: StackFactory, evidence: Evidence) -> None:
    # Small batches, for the command line takes seconds to start.
    stack = make_stack(DISPATCH__BATCH_SIZE="5", LOG__LEVEL="DEBUG")
    task_id = a_big_task(stack)
    with Fleet(stack, 1) as fleet:
        run_id = stack.crawl(task_id)
        await_published(stack, run_id, 500)

        cancel = stack.start("orchestrator", "cancel", str(run_id), "--reason", "wrong list")
        assert cancel.wait(within=30) == 0, cancel.text()

        eventually(lambda: "pending" not in stack.dispatches(run_id), within=30, what="no dispatch is pending any more")
        for _ in rounds(5, 50):
            stack.crawl(task_id, celery_id=str(run_id))
            evidence.trials += 1
        await_delivered(stack)
        fleet.stop()

    verdict = Oracle(stack).assert_holds({})
    evidence.saw(verdict)
    run: dict[str, Any] = stack.run(run_id) or {}
    assert run["state"] == "canceled"
    assert "wrong list" in run["error_message"]
    assert 0 < run["published"] < SOURCES
    assert run["published"] + run["skipped"] == run["total"] == SOURCES
    assert (verdict.messages, verdict.duplicates) == (run["published"], 0)


# --- Help with big runs --------------------------------------------------------------------------------------------


@pytest.mark.fault("workers killed (SIGKILL) while they help with one big run")
def test_helpers_that_die(make_rabbitmq: StackFactory, evidence: Evidence) -> None:
    batch = 20
    stack = make_rabbitmq(
        DISPATCH__BATCH_SIZE=str(batch), DISPATCH__HELP_ABOVE="100", DISPATCH__SLICE_SECONDS="2", LOG__LEVEL="DEBUG"
    )
    task_id = a_big_task(stack)
    with Fleet(stack, 3) as fleet:
        run_id = stack.crawl(task_id)
        fleet.crawls.append(run_id)

        def sharing() -> list[Process]:
            found = [worker for worker in fleet.ready() if fleet.position(worker) is not None]
            return found if len(found) > 1 else []

        for _ in rounds(2, 20):
            if not fleet.unfinished():
                fleet.crawl()
            at_work = eventually(sharing, within=60, what="several are at one run")
            for worker in at_work[:-1]:
                fleet.kill(worker)
                evidence.trials += 1
            fleet.await_ready()
        with evidence.recovery():
            eventually(lambda: not fleet.unfinished(), within=RESUMED, what="every run is over")
        fleet.assert_well()

    verdict = Oracle(stack).assert_holds(dict.fromkeys(fleet.crawls, range(1, SOURCES + 1)))
    evidence.saw(verdict)
    assert verdict.duplicates <= batch * evidence.trials, "more than one batch for each killed worker came twice"


@pytest.mark.fault("small runs that come while more help with a big one is asked for than there are workers")
def test_small_runs_do_not_wait_for_the_slices_of_a_big_one(make_rabbitmq: StackFactory, evidence: Evidence) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE="2", DISPATCH__HELP_ABOVE="100", DISPATCH__HELPERS="8")
    task_id = a_big_task(stack)
    stack.application.add_task(2, range(1, 11))
    with Fleet(stack, 2) as fleet:
        big = stack.crawl(task_id)
        await_published(stack, big, 100)
        before = stack.run(big) or {}
        for _ in range(2):
            stack.await_run(stack.crawl(2))
            evidence.trials += 1
        after = stack.run(big) or {}
        fleet.stop()

    assert before["state"] == after["state"] == "running", "the big one was over first: the test proved nothing"
    # Each slice has a number of its own: they did not even wait for the end of the first.
    assert after["wake_number"] == before["wake_number"]


# --- Zombies -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("workers frozen (SIGSTOP) in mid-fan-out, others finish, then thawed (SIGCONT)")
def test_zombies(make_rabbitmq: StackFactory, random: Random, evidence: Evidence) -> None:
    batch, sources, zombies = 20, range(1, 2_001), 10 if LONG else 1
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE=str(batch), LOG__LEVEL="DEBUG")
    stack.application.add_sources(len(sources))
    stack.application.add_task(1, sources)

    def freeze_some(fleet: Fleet) -> dict[Process, Position]:
        frozen: dict[Process, Position] = {}

        def enough() -> bool:
            fleet.keep_busy(zombies)
            for worker in fleet.ready():
                if worker not in frozen and len(frozen) < zombies:
                    worker.freeze()
                    if (position := fleet.position(worker)) is not None:
                        frozen[worker] = position
                    else:
                        worker.thaw()
            return len(frozen) == zombies

        eventually(enough, within=60, what=f"{zombies} workers are frozen in mid-fan-out")
        return frozen

    # One more than there are to be frozen: it takes over.
    with Fleet(stack, zombies + 1) as fleet:
        workers = set(fleet.ready())
        in_a_batch = 0
        for _ in rounds(1, 5):
            frozen = freeze_some(fleet)
            in_a_batch += sum(position.in_batch for position in frozen.values())
            evidence.trials += len(frozen)
            for position in frozen.values():
                # Late redeliveries of some; of the others the pulse will notice that nothing moves.
                if not LONG or random.random() < 0.5:
                    stack.crawl(1, celery_id=str(position.run_id))
            thaw_at_last(fleet, frozen, random)
            with evidence.recovery():
                eventually(lambda: not fleet.unfinished(), within=RESUMED, what="every run is over")
            fleet.assert_well()
        assert set(fleet.ready()) == workers

    verdict = Oracle(stack).assert_holds(dict.fromkeys(fleet.crawls, sources))
    evidence.saw(verdict)
    evidence.note(f"{in_a_batch} frozen within a batch")
    assert verdict.duplicates <= batch * evidence.trials, "more than one batch for each frozen worker came twice"


def thaw_at_last(fleet: Fleet, frozen: dict[Process, Position], random: Random) -> None:
    """Thaw frozen workers: in seconds, with their locks, or a minute, when PostgreSQL has taken those away.

    Of one that sleeps for so long, everything has been published by others when it awakes.
    """
    began_at = time.monotonic()
    brief = [worker for worker in frozen if not LONG or random.random() < 0.3]
    for worker in brief:
        since = frozen[worker]
        if not LONG:
            eventually(lambda: fleet.gone_on(since), within=RESUMED, what="another worker goes on")  # noqa: B023 -- called at once
        time.sleep(random.uniform(0, 1))
        worker.thaw()
    for worker in frozen.keys() - set(brief):
        time.sleep(max(0.0, began_at + random.uniform(40, 50) - time.monotonic()))
        eventually(lambda: not fleet.unfinished(), within=RESUMED, what="every run is over, its worker still frozen")
        worker.thaw()


# --- Orderly stops -------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "rolling restart under load: workers and beats get SIGTERM one after the other, and are started again"
)
def test_a_rolling_restart_under_load(make_rabbitmq: StackFactory, random: Random, evidence: Evidence) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE="20", LOG__LEVEL="DEBUG")
    few, many = range(1, 6), range(1, 2_001)
    stack.application.add_sources(len(many))
    tasks = Intervals.add(stack, 30 if LONG else 20, [3 if LONG else 2], few)
    stack.execute("UPDATE crawl_tasks SET data_source_ids = %s WHERE id = 1", list(many))
    beats = Beats(stack)
    handed_over = 0

    with Fleet(stack, 3 if LONG else 2) as fleet:
        beats.start(2)
        tasks.await_read()
        for _ in rounds(1, 5):
            for worker in fleet.ready():

                def at_work(worker: Process = worker) -> Position | None:
                    fleet.keep_busy(fleet.size)
                    return fleet.position(worker)

                met = eventually(at_work, within=60, what="the worker is in mid-fan-out")
                assert met is not None
                time.sleep(random.uniform(0, 0.1))
                evidence.ends.append(fleet.roll(worker))
                evidence.trials += 1
                handed_over += worker.text().count('"run.slice_ended"')
                with evidence.recovery():
                    eventually(lambda: fleet.gone_on(met), within=RESUMED, what="its run goes on")  # noqa: B023 -- called at once
                fleet.await_ready()
            for beat in beats.running[: 2 if LONG else 1]:
                evidence.ends.append(beats.terminate(beat))
                beats.spawn()
                beats.await_sign_on(beats.running[-1])
                evidence.trials += 1
        tasks.await_fired(1)
        tasks.disable()
        eventually(lambda: not fleet.unfinished(), within=RESUMED, what="every run is over")
        fleet.stop()
    beats.await_signs_of_life()

    assert handed_over, "no worker ended in mid-fan-out: the test proved nothing"
    assert max(evidence.ends) < SHUTDOWN
    evidence.note(f"{handed_over} workers ended in mid-fan-out, each run was handed over")
    verdict = Oracle(stack).assert_holds(
        {
            run["id"]: many if run["task_id"] == 1 else few
            for run in stack.query("SELECT id, task_id FROM orchestrator.runs")
        }
    )
    evidence.saw(verdict)
    assert verdict.duplicates == 0, "an orderly stop sends nothing twice"
    # The oracle of slots wants the ledger to itself.
    stack.execute("DELETE FROM orchestrator.runs WHERE id = ANY(%s)", fleet.crawls)
    tasks.assert_each_slot_started_once()
