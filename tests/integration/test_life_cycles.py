"""Whatever happens to runs, in whatever order: a state machine over their lives against a simple model.

Clients, operators, workers and the pulse work on a few runs at once. Each is stopped between any two of its
transactions and in the middle of its messages; they go on in any order, and die. See tests.support.life_cycles.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any, Final
from uuid import UUID, uuid5

import pytest
import structlog
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from orchestrator import analysis, tasks
from orchestrator.analysis import Caps
from orchestrator.cli import runs as commands
from orchestrator.domain import (
    UNFINISHED,
    AnalysisArguments,
    Arguments,
    AttemptOutcome,
    CrawlArguments,
    Node,
    RunState,
)
from orchestrator.ledger import crawls, runs
from orchestrator.ledger.runs import LONGEST_SILENCE
from tests.support.ledgers import Workbench
from tests.support.life_cycles import (
    ABOUT,
    BATCH,
    CAPS,
    REFUSED,
    RETRIES,
    WORK,
    Actor,
    Letter,
    Story,
    World,
)
from tests.support.rounds import LONG, SEED
from tests.support.troupe import Luck, Mishap, Stretch

EXAMPLES: Final = 400 if LONG else 14
STEPS: Final = 60 if LONG else 40

STALLS: Final = 2
SKIPPED_AT_ONCE: Final = 3
RUNS: Final = 3
_MOST_RUNS: Final = 12
PROCESSES: Final = 5
ETA: Final = 30.0
_ROUNDS: Final = 8
_DELIVERIES: Final = 200

pytestmark = pytest.mark.timeout(0 if LONG else 600)


EDGES: Final = frozenset(
    {
        (RunState.QUEUED, RunState.RUNNING),
        (RunState.RUNNING, RunState.RETRYING),
        (RunState.RETRYING, RunState.RUNNING),
        (RunState.RUNNING, RunState.SUCCEEDED),
        (RunState.RUNNING, RunState.FAILED),
        (RunState.QUEUED, RunState.CANCELED),
        (RunState.RUNNING, RunState.CANCELED),
        (RunState.RETRYING, RunState.CANCELED),
        (RunState.FAILED, RunState.QUEUED),
    }
)
"""How a run may change, as ARCHITECTURE.md draws it; on purpose not the product's own table."""


# --- What must be true -------------------------------------------------------------------------------------------


class Judge:
    """Compares the ledger with the model, and with how it was before."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before, self._now = world.seen, world.look()

    def judge(self) -> None:
        """Check everything.

        Raises:
            AssertionError: something is not as it should be.
        """
        for run_id, run in self._now.runs.items():
            story = self._world.stories[run_id]
            self._accepted(run, story)
            self._states(run, self._now.events[run_id])
            self._grows(run)
            self._wakes(run)
            if run["kind"] == "crawl":
                self._plan(run, story)
                self._dispatches(run, story)
            else:
                self._attempts(run, story)
        self._calls_under_way()
        self._duplicates()
        self._promptness()
        self._world.seen, self._world.ended = self._now, None

    def _accepted(self, run: dict[str, Any], story: Story) -> None:
        crawl = run["kind"] == "crawl"
        said = CrawlArguments(run["task_id"]) if crawl else AnalysisArguments(run["data_source_id"], run["theme_name"])
        story.arguments = story.arguments or said
        story.promised = True
        assert story.arguments == said, "the first arguments stand"
        assert run["error_code"] != "internal_error", run["error_message"]
        if story.not_before is not None and run["started_at"] is not None:
            assert run["started_at"] >= story.not_before - self._world.gone - ABOUT, "before the caller's ETA"

    def _states(self, run: dict[str, Any], told: list[RunState]) -> None:
        assert told[0] is RunState.QUEUED
        assert all((before, after) in EDGES for before, after in pairwise(told)), told
        assert told[-1] == run["state"], "a change of state that was not recorded"

    def _before_it(self, run: dict[str, Any]) -> dict[str, Any]:
        """Return a run's row as it was at the last look, empty if there was none."""
        return self._before.runs.get(run["id"], {})

    def _grows(self, run: dict[str, Any]) -> None:
        before = self._before_it(run)
        for name in ("wake_number", "stale_below", "attempts", "published", "skipped", "total"):
            assert run[name] >= before.get(name, 0), f"{name} fell"
        for name in ("kind", "task_id", "data_source_id", "theme_name", "trigger", "traceparent"):
            assert run[name] == before.get(name, run[name]), f"{name} changed"

    def _wakes(self, run: dict[str, Any]) -> None:
        unfinished = run["state"] in UNFINISHED
        assert run["wake_at"] is not None or not unfinished, "nobody will wake it"
        if run["state"] == RunState.RETRYING and not run["wakes"] and not run["awaits_slot"]:
            ends = run["next_attempt_at"]
            assert run["wake_at"] <= max(ends + ABOUT, self._now.now), "its wait ends, and nobody wakes it"
            assert run["wake_at"] >= ends, "woken before its wait ends"
        if unfinished:
            assert run["wake_at"] <= self._now.now + timedelta(seconds=LONGEST_SILENCE) + ABOUT, "forgotten"

    def _plan(self, run: dict[str, Any], story: Story) -> None:
        rows = self._now.dispatches[run["id"]]
        if story.plan is None and run["materialized_at"] is not None:
            assert self._before_it(run).get("state") in {None, *UNFINISHED}, "planned after its end"
            # Just now, for the application edits nothing while a process is at work.
            story.plan, story.idle = self._world.application.plan(run["task_id"]), 0
        assert {row["data_source_id"]: row["crawl_config_id"] for row in rows} == (story.plan or {})
        if run["state"] == RunState.FAILED:
            expected = REFUSED.get(run["task_id"]) if story.plan is None else None
            assert run["error_code"] in {expected, "no_progress"}
            if run["error_code"] != expected and self._before_it(run).get("state") != RunState.FAILED:
                assert story.idle > STALLS, "given up too soon"

    def _dispatches(self, run: dict[str, Any], story: Story) -> None:
        rows = self._now.dispatches[run["id"]]
        of_state = {
            state: {row["data_source_id"] for row in rows if row["state"] == state}
            for state in ("pending", "published", "skipped")
        }
        counted = (len(of_state["published"]), len(of_state["skipped"]), len(rows))
        assert (run["published"], run["skipped"], run["total"]) == counted, "the counts do not add up"
        arrived = {arrival.source for arrival in self._world.wire if arrival.run_id == run["id"]}
        assert of_state["published"] <= arrived, "published, and never arrived"
        assert of_state["published"] == story.settled
        without = {source for source, config in (story.plan or {}).items() if config is None}
        canceled = run["state"] == RunState.CANCELED
        for row in rows:
            if row["state"] == "skipped":
                why = "no_active_config" if row["data_source_id"] in without else "run_canceled"
                assert row["reason"] == why
                assert canceled or why == "no_active_config"
        assert without <= of_state["skipped"]
        if of_state["pending"]:
            assert run["state"] != RunState.SUCCEEDED
            assert not canceled or run["wake_at"] is not None, "nobody will skip the rest"

    def _attempts(self, run: dict[str, Any], story: Story) -> None:
        attempts = self._now.attempts[run["id"]]
        assert [attempt["number"] for attempt in attempts] == list(range(1, run["attempts"] + 1))
        assert story.calls <= len(attempts), "a call without an attempt"
        if (self._before_it(run).get("state"), run["state"]) == (RunState.FAILED, RunState.QUEUED):
            story.forgiven = run["attempts"]
        tried = run["attempts"] - story.forgiven
        assert tried <= RETRIES + 1
        for attempt in attempts:
            if attempt["outcome"] == AttemptOutcome.LOST:
                assert attempt["finished_at"] >= attempt["lease_until"], "its lease was not over"
        open_ones = [attempt for attempt in attempts if attempt["finished_at"] is None]
        assert len(open_ones) <= 1
        ended = [attempt for attempt in self._before.attempts.get(run["id"], ()) if attempt["finished_at"] is not None]
        for before, after in zip(ended, attempts, strict=False):
            assert before == after, "an attempt that had ended changed"
        if run["state"] in {RunState.SUCCEEDED, RunState.FAILED}:
            last = attempts[-1]["outcome"]
            assert tried > 0, "it ended without an attempt"
            assert (run["state"] == RunState.SUCCEEDED) is (last == AttemptOutcome.SUCCEEDED)
            assert last in {AttemptOutcome.SUCCEEDED, AttemptOutcome.REFUSED} or tried > RETRIES, "given up too soon"

    def _calls_under_way(self) -> None:
        nodes = Counter(
            attempt["node"]
            for attempts in self._now.attempts.values()
            for attempt in attempts
            if attempt["finished_at"] is None and attempt["lease_until"] > self._now.now
        )
        assert nodes.total() <= self._world.caps.everywhere
        assert max(nodes.values(), default=0) <= self._world.caps.here

    def _duplicates(self) -> None:
        ids = {(arrival.run_id, arrival.source): arrival.message_id for arrival in self._world.wire}
        assert len(self._world.wire) - len(ids) <= BATCH * self._world.incidents
        for arrival in self._world.wire:
            assert arrival.message_id == str(uuid5(arrival.run_id, str(arrival.source)))
            story = self._world.stories[arrival.run_id]
            assert isinstance(story.arguments, CrawlArguments)
            assert story.plan is not None
            assert json.loads(arrival.body) == {
                "crawl_config_id": story.plan[arrival.source],
                "data_source_id": arrival.source,
                "task_id": story.arguments.task_id,
                "run_id": str(arrival.run_id),
            }

    def _promptness(self) -> None:
        """What just ended without a fault left nothing for the pulse to mend."""
        ended = self._world.ended
        if ended is None or ended.process.crashed:
            return
        if ended.woken is not None:
            self._given_back(ended, ended.woken)
        if ended.letter is None or not (ended.begun or ended.helps) or not ended.process.flawless or ended.handed_over:
            return
        run_id = ended.letter.run_id
        if ended.helps and any(row["state"] == "pending" for row in self._now.dispatches[run_id]):
            return  # what is left is up to who asked for help
        if any(other.letter is not None and other.letter.run_id == run_id for other in self._world.actors):
            return  # the last one to leave shuts the door
        run = self._now.runs[run_id]
        assert run["state"] != RunState.RUNNING, "the last worker left it running"

    def _given_back(self, pulse: Actor, woken: dict[UUID, int]) -> None:
        """What may not have been sent is due again at once, unless it moved meanwhile."""
        for run_id, events in woken.items():
            run = self._now.runs[run_id]
            if pulse.failed and run["wakes"] and len(self._now.events[run_id]) == events:
                assert run["wake_at"] <= self._now.now, "it was not sent, and waits"


# --- The machine -------------------------------------------------------------------------------------------------

_SENDING: Final = ("publish", "enqueue", "call")
_SENT: Final = ("published", "enqueued", "answered")
_TRANSACTION: Final = ("transaction",)
_PLANNING: Final = ("plan",)
_COMPLETING: Final = ("complete",)
_WHICH: Final = st.integers(0, 6)
_STRETCHES: Final = st.builds(
    Stretch,
    until=st.sampled_from([(), _TRANSACTION, _SENDING, _SENT, _PLANNING, _COMPLETING, _SENDING]),
    past=st.sampled_from([0, 0, 0, 1, 1, 2, 3]),
    luck=st.lists(st.sampled_from([Luck.GOOD, Luck.GOOD, Luck.GOOD, *Luck]), max_size=4).map(tuple),
    mask=st.integers(0, 7),
    mishap=st.sampled_from([Mishap.NONE, Mishap.NONE, Mishap.NONE, Mishap.DIES, Mishap.UNHEARD]),
    commit=st.integers(0, 5),
)
_TO_THE_END: Final = Stretch()
# Just over what the ledger waits for: unsent runs, calls and silence, postponed runs, retries; then anything.
_A_SILENCE: Final = 16
_WHILES: Final = st.sampled_from([0, 3, _A_SILENCE, 61, 301, LONGEST_SILENCE + 1])


class LifeCycles(RuleBasedStateMachine):
    """Runs of every kind, and all that happens to them.

    No rule has a precondition and no argument depends on the ledger: what is drawn must not depend on real time.
    """

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.forget()

    # --- Who asks for work ---

    @initialize(first=st.sampled_from(WORK[:5]), second=st.sampled_from(WORK), caps=st.sampled_from(CAPS))
    def it_begins(self, first: Arguments, second: Arguments, caps: Caps) -> None:
        """A client and an operator begin."""
        self.world.caps = caps
        self.client_sends(first, None, late=False)
        self.world.order(self.world.new_run(), second, _TO_THE_END)

    @rule(arguments=st.sampled_from(WORK), known=st.none() | _WHICH, late=st.booleans())
    def client_sends(self, arguments: Arguments, known: int | None, *, late: bool) -> None:
        """A plain Celery client sends a message; with an id that is known already, perhaps with other arguments."""
        run_id = self._any_run(known) if known is not None or self._enough() else None
        story = self.world.stories[run_id] if run_id else None
        not_before = self.world.now + timedelta(seconds=ETA) if late else None
        if run_id is None or story is None:
            run_id = self.world.new_run()
            story = self.world.stories[run_id]
            # Of several messages nobody knows which one comes first.
            story.not_before = not_before
        else:
            story.not_before = story.not_before if late else None
        story.promised = True
        self.world.letters.append(Letter(run_id, arguments, not_before=not_before))

    @rule(what=st.sampled_from(["order", "order", "retry", "cancel"]), which=_WHICH, stretch=_STRETCHES)
    def operator_does(self, what: str, which: int, stretch: Stretch) -> None:
        world = self.world
        if what == "order" and not self._enough():
            arguments = WORK[which % len(WORK)]
            world.order(world.new_run(), arguments, stretch)
        elif (run_id := self._any_run(which)) in world.seen.runs:
            (world.cancel if what == "cancel" else world.retry)(run_id, stretch)

    # --- Who works ---

    @rule(which=_WHICH, stretch=_STRETCHES)
    def worker_takes(self, which: int, stretch: Stretch) -> None:
        """A message is delivered, in any order."""
        self._deliver(self._a_letter(which), stretch)

    @rule(which=_WHICH, first=_STRETCHES, second=_STRETCHES, same=st.booleans())
    def two_workers_take(self, which: int, first: Stretch, second: Stretch, *, same: bool) -> None:
        """Two deliveries, perhaps of one message, of which the second comes before the first one's effect or after."""
        letter = self._a_letter(which)
        self._deliver(letter, first)
        self.all_is_as_it_should_be()
        self._deliver(letter if same else self._a_letter(which), second)

    @rule(
        where=st.sampled_from([_PLANNING, _SENDING, _SENT, _COMPLETING]),
        what=st.sampled_from(["cancel", "again"]),
        task_id=st.sampled_from([1, 2]),
        stretch=_STRETCHES,
    )
    def meanwhile(self, where: tuple[str, ...], what: str, task_id: int, stretch: Stretch) -> None:
        """While a worker stands in the middle of a new run, another one joins it, or the run is canceled."""
        if len(self.world.stories) >= _MOST_RUNS:
            return
        letter = Letter(self.world.new_run(), CrawlArguments(task_id))
        self.world.stories[letter.run_id].promised = True
        self._deliver(letter, Stretch(where))
        self.all_is_as_it_should_be()
        if what == "cancel":
            self.world.cancel(letter.run_id, stretch)
        else:
            self._deliver(letter, stretch)

    @rule(stretches=st.lists(_STRETCHES, min_size=2, max_size=3))
    def analyses_are_many(self, stretches: list[Stretch]) -> None:
        """More analyses come at once than calls may be under way."""
        for stretch in stretches:
            if len(self.world.stories) < _MOST_RUNS:
                letter = Letter(self.world.new_run(), AnalysisArguments(9, "news"))
                self.world.stories[letter.run_id].promised = True
                self._deliver(letter, replace(stretch, until=_SENDING, past=0))
                self.all_is_as_it_should_be()

    @rule(which=_WHICH, stretch=_STRETCHES)
    def somebody_goes_on(self, which: int, stretch: Stretch) -> None:
        if not self.world.actors:
            self._deliver(self._a_letter(which), stretch)
        else:
            self.world.go(self.world.actors[which % len(self.world.actors)], stretch)

    def _a_letter(self, which: int) -> Letter:
        """Take a message from the queue; where there is none, somebody sends one."""
        world = self.world
        if not world.letters:
            world.pass_time(_A_SILENCE)
            self._pulse(_TO_THE_END)
        if not world.letters:
            self.client_sends(WORK[which % len(WORK)], which if self._enough() else None, late=False)
        return world.letters.pop(which % len(world.letters))

    def _deliver(self, letter: Letter, stretch: Stretch) -> None:
        if len(self.world.actors) >= PROCESSES:
            # As many as a worker has; the oldest ends first.
            self.world.go(self.world.actors[0], _TO_THE_END)
            self.all_is_as_it_should_be()
        self.world.deliver(letter, stretch)

    @rule(seconds=_WHILES, stretch=_STRETCHES)
    def time_passes_and_the_pulse_wakes(self, seconds: int, stretch: Stretch) -> None:
        if seconds:
            self.world.pass_time(seconds)
        self._pulse(stretch)

    def _pulse(self, stretch: Stretch) -> None:
        """Have the pulse do a round."""
        self.world.pulse(stretch)
        self.all_is_as_it_should_be()
        self.world.skip(stretch)
        self.all_is_as_it_should_be()

    # --- What goes wrong ---

    @rule(what=st.sampled_from(["dies", "loses its session", "twice", "lost"]), which=_WHICH)
    def accident(self, what: str, which: int) -> None:
        world = self.world
        if what in {"dies", "loses its session"} and not world.actors:
            self._deliver(self._a_letter(which), Stretch(_SENDING if which % 2 else _SENT))
            self.all_is_as_it_should_be()
        held = [actor.process for actor in world.actors if actor.process.batch is not None]
        if what == "dies" and world.actors:
            world.kill(world.actors[which % len(world.actors)])
        elif what == "loses its session" and held:
            world.lose_session(held[which % len(held)])
        elif what == "twice" and world.letters:
            world.letters.append(world.letters[which % len(world.letters)])
        elif what == "lost" and world.letters:
            letter = world.letters[which % len(world.letters)]
            if letter.run_id in world.seen.runs:  # else nobody promised anything yet
                world.letters.remove(letter)

    @rule(what=st.sampled_from(["newer config", "config off", "listed", "unlisted"]), source=st.integers(1, 9))
    def application_edits(self, what: str, source: int) -> None:
        world, said = self.world, self.world.application
        if what == "newer config":
            said.next_config += 1
            said.configs.setdefault(source, []).append((said.next_config, True))
            world.rows(
                "INSERT INTO crawl_configs (id, data_source_id, status, created_at)"
                " VALUES (%s, %s, 'active', clock_timestamp())",
                said.next_config,
                source,
            )
        elif what == "config off" and said.configs.get(source):
            number, _ = said.configs[source][-1]
            said.configs[source][-1] = (number, False)
            world.rows("UPDATE crawl_configs SET status = 'disabled' WHERE id = %s", number)
        else:
            kept: list[int | None] = [each for each in said.tasks[1] if each != source]
            self._list(1, [*kept, source] if what == "listed" else kept)

    def _list(self, task_id: int, sources: list[int | None]) -> None:
        self.world.application.tasks[task_id] = sources
        self.world.rows(
            "INSERT INTO crawl_tasks (id, data_source_ids) VALUES (%s, %s)"
            " ON CONFLICT (id) DO UPDATE SET data_source_ids = excluded.data_source_ids",
            task_id,
            sources,
        )

    def _enough(self) -> bool:
        """Whether there are enough runs that are not over, or more than anybody can read."""
        alive = [run_id for run_id in self.world.stories if not self._over(run_id)]
        return len(alive) >= RUNS or len(self.world.stories) >= _MOST_RUNS

    def _over(self, run_id: UUID) -> bool:
        run = self.world.seen.runs.get(run_id)
        return run is not None and run["finished_at"] is not None

    def _any_run(self, which: int | None) -> UUID | None:
        known = list(self.world.stories)
        return known[(which or 0) % len(known)] if known else None

    # --- What holds ---

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        try:
            Judge(self.world).judge()
        except BaseException:
            self.world.broken = True
            raise

    def teardown(self) -> None:
        try:
            if not self.world.broken:
                self._heal()
        finally:
            for actor in list(self.world.actors):
                with suppress(AssertionError):
                    self.world.kill(actor)

    def _heal(self) -> None:
        """Nothing goes wrong any more: everything that was promised comes to its end."""
        world = self.world
        note("everything heals")
        for actor in list(world.actors):
            world.go(actor, _TO_THE_END)
            self.all_is_as_it_should_be()
        for task_id in REFUSED:
            self._list(task_id, [1, 8])
        self._come_to_rest()
        for run_id, run in world.seen.runs.items():
            if run["state"] == RunState.FAILED:
                world.retry(run_id, _TO_THE_END)
                self.all_is_as_it_should_be()
        self._come_to_rest()
        for run_id, story in world.stories.items():
            if story.promised:
                self._assert_whole(run_id, story)

    def _come_to_rest(self) -> None:
        """Do as the pulse and the workers do, until all is quiet."""
        world = self.world
        for _ in range(_ROUNDS):
            world.pass_time(LONGEST_SILENCE + 1)
            self._pulse(_TO_THE_END)
            deliveries = 0
            while world.letters:
                deliveries += 1
                assert deliveries < _DELIVERIES, "wake-ups breed"
                world.deliver(world.letters.pop(0), _TO_THE_END)
                self.all_is_as_it_should_be()
            if all(run["wake_at"] is None for run in world.seen.runs.values()):
                return
        raise AssertionError(f"not at rest: {world.seen.runs}")

    def _assert_whole(self, run_id: UUID, story: Story) -> None:
        world = self.world
        assert run_id in world.seen.runs, "accepted, and lost"
        run = world.seen.runs[run_id]
        assert run["state"] in {RunState.SUCCEEDED, RunState.CANCELED}
        assert not any(row["state"] == "pending" for row in world.seen.dispatches[run_id])
        if run["kind"] == "crawl" and run["state"] == RunState.SUCCEEDED:
            assert story.plan is not None
            wanted = {source for source, config in story.plan.items() if config is not None}
            assert {arrival.source for arrival in world.wire if arrival.run_id == run_id} == wanted == story.settled


@pytest.fixture
def world(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(bench)
    monkeypatch.setattr(tasks, "services", lambda: world.ours)
    monkeypatch.setattr(tasks, "this_node", lambda: Node(world.actor.node, "worker"))
    # Who waits for the database waits no real time.
    monkeypatch.setattr(tasks, "sleep", lambda _: None)
    monkeypatch.setattr(analysis, "sleep", lambda _: None)
    # Thousands of lines about what is meant to go wrong.
    monkeypatch.setattr(commands, "say", lambda _: None)
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet)
    # Small, so that there is more than one of everything.
    monkeypatch.setattr(crawls, "MAX_STALLS", STALLS)
    monkeypatch.setattr(runs, "SKIP_BATCH", SKIPPED_AT_ONCE)
    yield world
    structlog.reset_defaults()
    world.close()


def test_whatever_happens_to_runs_they_come_to_their_end_and_nothing_is_lost_or_made_up(world: World) -> None:
    machine = type("LifeCyclesHere", (LifeCycles,), {"world": world})
    if LONG:
        print(f"FAULT_SEED={SEED}")  # noqa: T201 -- pytest shows it with a failure
        machine = seed(SEED)(machine)

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=not LONG,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
