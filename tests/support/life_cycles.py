"""A world in which runs live: clients, operators, workers and the pulse, and a model that knows what should come of it.

The ledger, the engines, the Celery tasks and the database are the real ones. The wire, the task queue and the Discovery
Service are lists and dice in here. The model knows what the application's tables said when a plan was fixed, what
arrived on the wire and what was confirmed before a commit; it knows no SQL of the ledger's.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, LiteralString, NamedTuple, cast
from uuid import UUID

import psycopg
from hypothesis import note
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import Connection

from orchestrator import tasks
from orchestrator.analysis import Caps, SiteAnalyser
from orchestrator.bootstrap import Services
from orchestrator.catalog import Plan
from orchestrator.celery_app import HELPS, WAKE_NUMBER
from orchestrator.cli.runs import enqueue
from orchestrator.db import Database
from orchestrator.discovery import Answer, AnswerCode, DiscoveryClient, RetryPolicy
from orchestrator.dispatch import FanOut, Help
from orchestrator.domain import (
    TERMINAL,
    UNFINISHED,
    AnalysisArguments,
    Arguments,
    CrawlArguments,
    CrawlRun,
    ExtractionBatch,
    NewRun,
    Node,
    RunState,
    Trigger,
    WakeUp,
    traceparent_of,
)
from orchestrator.errors import BrokerBlockedError, IllegalTransitionError, PublishError
from orchestrator.ledger import Ledger
from orchestrator.ledger.crawls import CrawlLedger
from orchestrator.queues import Receipt
from orchestrator.settings import Settings
from orchestrator.worker import NOT_BEFORE
from tests.support.ledgers import Workbench
from tests.support.troupe import (
    Arrival,
    HeldBatch,
    Luck,
    Process,
    StagedDatabase,
    Stretch,
    Troupe,
    arrivals_of,
    ends_unheard,
)

BATCH: Final = 3
RETRIES: Final = 1
CAPS: Final = (Caps(everywhere=1, here=1), Caps(everywhere=2, here=1))
NODES: Final = ("w1@test", "w2@test")

CRAWLS: Final[dict[int, list[int | None]]] = {
    1: [1, 2, 3, 4, 5, 6, 7, 3, None, 8],  # twice one, and a NULL; 8 has no config
    2: [2, 5],
    3: [],
    4: [1, 0],  # cannot be planned
}
NO_TASK: Final = 5
WORK: Final[tuple[Arguments, ...]] = (
    CrawlArguments(1),
    CrawlArguments(2),
    AnalysisArguments(7, "news"),
    CrawlArguments(1),
    AnalysisArguments(8, "sport"),
    AnalysisArguments(9, "news"),
    CrawlArguments(3),
    CrawlArguments(4),
    CrawlArguments(NO_TASK),
)
REFUSED: Final = {4: "invalid_data_source_ids", NO_TASK: "crawl_task_not_found"}


# --- The model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Letter:
    """A Celery message: a caller's own, without a number, or one of our wake-ups.

    Attributes:
        not_before: the caller's ETA, by the world's clock.
        helps: it only asks for help with a slice.
    """

    run_id: UUID
    arguments: Arguments
    number: int | None = None
    not_before: datetime | None = None
    helps: bool = False


class Application:
    """What the main application's tables say, and what plan that makes."""

    def __init__(self) -> None:
        self.tasks = {task_id: list(sources) for task_id, sources in CRAWLS.items()}
        self.configs: dict[int, list[tuple[int, bool]]] = {source: [(source, True)] for source in range(1, 8)}
        self.next_config = 100

    def plan(self, task_id: int) -> dict[int, int | None]:
        """Return the latest active config of each data source of a crawl task, none where there is none."""
        sources = {source for source in self.tasks[task_id] if source is not None}
        active = {source: [number for number, on in self.configs.get(source, ()) if on] for source in sources}
        return {source: numbers[-1] if numbers else None for source, numbers in active.items()}


@dataclass
class Story:
    """What is known of a run without asking the ledger.

    Attributes:
        arguments: the ones that came first.
        promised: somebody was told that it is accepted, or the broker has a message about it.
        not_before: the caller's ETA, by the world's clock.
        plan: of each data source the config, fixed.
        settled: data sources whose message was confirmed before the batch's commit.
        begins: deliveries that began.
        begun_by: by which wake-up the last of them did.
        born: of each wake-up, how many deliveries had begun when it was made.
        idle: deliveries that began since there was progress.
        calls: of the Discovery Service.
        forgiven: attempts before the last retry by an operator.
    """

    arguments: Arguments | None = None
    promised: bool = False
    not_before: datetime | None = None
    plan: dict[int, int | None] | None = None
    settled: set[int] = field(default_factory=set)
    begins: int = 0
    begun_by: int | None = None
    born: dict[int, int] = field(default_factory=dict)
    idle: int = 0
    calls: int = 0
    forgiven: int = 0

    def fresh(self, number: int | None) -> bool:
        """Whether no delivery began since this wake-up was made, or it is the last one's own; a caller's always is."""
        return number is None or self.born[number] == self.begins or self.begun_by == number


@dataclass
class Actor:
    """What a process is up to.

    Attributes:
        process: the thread.
        letter: what it delivers.
        begun: it works on its run.
        helps: it helps with its run.
        handed_over: its slice is over.
        told: it was told that its run is over.
        woken: the runs that the pulse woke, and how many events they had then.
        failed: its wake-ups were not all confirmed.
    """

    process: Process
    node: str
    letter: Letter | None = None
    begun: bool = False
    helps: bool = False
    handed_over: bool = False
    told: bool = False
    woken: dict[UUID, int] | None = None
    failed: bool = False
    ticks: int = 0


class Seen(NamedTuple):
    """The ledger at one moment, each table by run."""

    runs: dict[UUID, dict[str, Any]]
    dispatches: dict[UUID, list[dict[str, Any]]]
    attempts: dict[UUID, list[dict[str, Any]]]
    events: dict[UUID, list[RunState]]
    now: datetime


NOTHING: Final = Seen({}, {}, {}, {}, datetime(1970, 1, 1, tzinfo=UTC))


# --- The world ---------------------------------------------------------------------------------------------------


class Crawls(CrawlLedger):
    """The real ledger; the model is told when a delivery begins, and when it hands over."""

    def __init__(self, database: Database, world: "World") -> None:
        super().__init__(database)
        self._world = world

    def begin(self, run_id: UUID, wake_number: int | None = None) -> CrawlRun | None:
        process = self._world.troupe.running
        process.reach("transaction")
        with process.in_one_go():
            before = self._world.row(run_id)
            run = super().begin(run_id, wake_number)
            with process.checks():
                self._world.began(before, wake_number, begun=run is not None)
        return run

    def join(self, run_id: UUID, wake_number: int) -> CrawlRun | None:
        process = self._world.troupe.running
        process.reach("transaction")
        with process.in_one_go():
            run = super().join(run_id, wake_number)
            self._world.actor.helps = run is not None
        return run

    def materialize(self, run_id: UUID, task_id: int, plan: Plan) -> tuple[int, int] | None:
        self._world.troupe.running.reach("plan")
        return super().materialize(run_id, task_id, plan)

    def complete(self, run_id: UUID) -> bool:
        self._world.troupe.running.reach("complete")
        return super().complete(run_id)

    def hand_over(self, run_id: UUID) -> WakeUp | None:
        process = self._world.troupe.running
        process.reach("transaction")
        with process.in_one_go():
            wake_up = super().hand_over(run_id)
            self._world.actor.handed_over = True
            story = self._world.stories[run_id]
            with process.checks():
                # Else each of them would bring forth a continuation, and each of those another.
                assert wake_up is None or story.begins not in story.born.values(), "two continuations on their way"
        return wake_up


@dataclass(frozen=True)
class Ours:
    """The services of a worker, as far as the tasks use them."""

    ledger: Ledger
    fan_out: FanOut
    analyser: SiteAnalyser
    sender: "TaskQueue"
    world: "World"
    settings: Settings = field(default_factory=Settings)

    def caps(self, _: Node) -> Caps:
        return self.world.caps


class World:
    """A database, its ledger, the processes on it, the broker and the Discovery Service."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.troupe = Troupe()
        options = f"-c search_path={bench.schema},public"
        self._observer = psycopg.connect(bench.url, autocommit=True, options=options, row_factory=dict_row)
        self._database = StagedDatabase(bench.url, bench.schema, self.troupe)
        self.ledger = Ledger(self._database, bench.catalog)
        self.ledger.crawls = Crawls(self._database, self)
        # One tick for each look at the clock: a slice ends after a batch or four.
        wire, client, queue = Wire(self), cast("DiscoveryClient", Discovery(self)), TaskQueue(self)
        help_ = Help(BATCH, 1, queue.wake, seconds=2)
        fan_out = FanOut(
            self.ledger, bench.catalog, wire, batch_size=BATCH, slice_seconds=5, help_=help_, clock=self._tick
        )
        policy = RetryPolicy(RETRIES, base_delay=60, max_delay=300)
        analyser = SiteAnalyser(self.ledger.analyses, client, policy, timeout=10, slice_seconds=9, clock=self._tick)
        self.ours = Ours(self.ledger, fan_out, analyser, queue, self)
        self._shifts = [self._shift(table) for table in ("runs", "attempts", "run_events")]
        self.forget()

    def close(self) -> None:
        self._observer.close()
        self._database.close()

    def forget(self) -> None:
        """Begin anew: empty tables, nobody at work."""
        self.application = Application()
        self.stories: dict[UUID, Story] = {}
        self.letters: list[Letter] = []
        self.actors: list[Actor] = []
        self.wire: list[Arrival] = []
        self.seen = NOTHING
        self.actor = Actor(Process("nobody", lambda: None, self.troupe), "")
        self.ended: Actor | None = None
        self.incidents = self.people = 0
        self.gone = timedelta()
        self.caps = CAPS[0]
        self.broken = False
        self.rows("TRUNCATE runs, dispatches, attempts, run_events, audit_events, crawl_tasks, crawl_configs")
        for task_id, sources in self.application.tasks.items():
            self.rows("INSERT INTO crawl_tasks (id, data_source_ids) VALUES (%s, %s)", task_id, sources)
        self.rows(
            "INSERT INTO crawl_configs (id, data_source_id, status, created_at)"
            " SELECT source, source, 'active', now() - interval '1 day' FROM generate_series(1, 7) AS source"
        )

    # --- Looking, with other eyes than the ledger's ---

    def rows(self, statement: LiteralString | sql.Composed, *parameters: object) -> list[dict[str, Any]]:
        cursor = self._observer.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []

    def row(self, run_id: UUID) -> dict[str, Any]:
        """Return a run's row, with the present moment."""
        (row,) = self.rows("SELECT *, clock_timestamp() AS now FROM runs WHERE id = %s", run_id)
        return row

    def look(self) -> Seen:
        """Read everything."""
        found: dict[str, dict[UUID, list[Any]]] = {}
        for table, statement in _EVERYTHING.items():
            of_run = found[table] = {run_id: [] for run_id in self.stories}
            for row in self.rows(statement):
                assert row["run_id"] in self.stories, f"{table} have an unknown run"
                of_run[row["run_id"]].append(row)
        runs = {run["run_id"]: run for rows in found["runs"].values() for run in rows}
        events = {run_id: [RunState(row["state"]) for row in rows] for run_id, rows in found["run_events"].items()}
        (clock,) = self.rows("SELECT clock_timestamp() AS now")
        return Seen(runs, found["dispatches"], found["attempts"], events, clock["now"])

    # --- Time ---

    def pass_time(self, seconds: float) -> None:
        """Let time pass, for the ledger: its moments move into the past."""
        gone = timedelta(seconds=seconds)
        for shift in self._shifts:
            self._observer.execute(shift, {"gone": gone})
        self.gone += gone
        self.seen = self.look()

    def _shift(self, table: LiteralString) -> sql.Composed:
        moments = self.rows(
            "SELECT column_name FROM information_schema.columns"
            " WHERE table_schema = %s AND table_name = %s AND data_type LIKE 'timestamp%%'",
            self.bench.schema,
            table,
        )
        names = [sql.Identifier(row["column_name"]) for row in moments]
        earlier = sql.SQL(", ").join(sql.SQL("{0} = {0} - %(gone)s").format(name) for name in names)
        return sql.SQL("UPDATE {} SET {}").format(sql.Identifier(table), earlier)

    def _tick(self) -> float:
        self.actor.ticks += 1
        return self.actor.ticks

    @property
    def now(self) -> datetime:
        """What time it is, with all that was let pass."""
        return datetime.now(UTC) + self.gone

    # --- People and processes ---

    def new_run(self) -> UUID:
        """Return an id that nobody knows yet."""
        run_id = UUID(int=len(self.stories) + 1)
        self.stories[run_id] = Story()
        return run_id

    def start(self, name: str, work: Callable[[], object], stretch: Stretch, letter: Letter | None = None) -> Actor:
        """Start a process and let it go a stretch."""
        self.people += 1
        process = Process(f"{name} {self.people}", work, self.troupe)
        actor = Actor(process, NODES[self.people % 2], letter)
        process.settled, process.dropped = self.settle, self.drop
        self.actors.append(actor)
        self.go(actor, stretch)
        return actor

    def go(self, actor: Actor, stretch: Stretch) -> None:
        """Let a process go a stretch; if it dies, the broker delivers its message again."""
        self.actor = actor
        try:
            actor.process.go(stretch)
        except BaseException:
            self.broken = True
            raise
        self._noted(actor)

    def kill(self, actor: Actor) -> None:
        self.actor = actor
        actor.process.kill()
        self._noted(actor)

    def _noted(self, actor: Actor) -> None:
        process = actor.process
        stands = "dead at" if process.crashed else "ended after" if process.over else "at"
        note(f"    {process.name}: {stands} {process.place}")
        if process.over:
            self.actors.remove(actor)
            self.ended = actor
            if process.crashed and actor.letter is not None:
                self.letters.append(actor.letter)

    def deliver(self, letter: Letter, stretch: Stretch) -> None:
        """Have a worker take a message, with the real task."""
        crawl = isinstance(letter.arguments, CrawlArguments)
        task = tasks.execute_crawl_task if crawl else tasks.trigger_site_analysis

        def work() -> None:
            facts: dict[str, Any] = {"id": str(letter.run_id), WAKE_NUMBER: letter.number, HELPS: letter.helps}
            if letter.not_before is not None:
                facts[NOT_BEFORE] = (letter.not_before - self.gone).isoformat()
            task.push_request(**facts)
            try:
                task.run(*astuple(letter.arguments))
            finally:
                task.pop_request()

        self.start("worker", work, stretch, letter)

    def pulse(self, stretch: Stretch) -> None:
        """Have the pulse wake what is due."""

        def work() -> None:
            with suppress(PublishError), ends_unheard():
                self.ledger.runs.wake_due(self.ours.sender.wake, 100)

        self.start("pulse", work, stretch)

    def skip(self, stretch: Stretch) -> None:
        """Have the pulse skip what is left of canceled runs; what it does before has no part in that."""

        def work() -> None:
            with ends_unheard():
                while self.ledger.runs.skip_canceled():
                    pass

        self.start("skip", work, stretch)

    def order(self, run_id: UUID, arguments: Arguments, stretch: Stretch) -> None:
        """Have the command line start a run."""
        story = self.stories[run_id]

        def work() -> None:
            with ends_unheard():
                new = NewRun(run_id, arguments, Trigger.CLI, traceparent_of(run_id))
                if not self.ledger.runs.accept(new, delivered=False) and story.arguments != arguments:
                    return  # the command says that the id is another run's
                story.promised = True
                enqueue(cast("Services", self.ours), [WakeUp(run_id, arguments, traceparent_of(run_id))])

        self.start("order", work, stretch)

    def cancel(self, run_id: UUID, stretch: Stretch) -> None:
        """Have the command line cancel a run."""

        def work() -> None:
            with ends_unheard(), suppress(IllegalTransitionError):
                self.ledger.runs.cancel(run_id, actor="machine")

        self.start("cancel", work, stretch)

    def retry(self, run_id: UUID, stretch: Stretch) -> None:
        """Have the command line retry a run."""

        def work() -> None:
            with ends_unheard(), suppress(IllegalTransitionError):
                enqueue(cast("Services", self.ours), [self.ledger.runs.revive(run_id, actor="machine")])

        self.start("retry", work, stretch)

    # --- Deliveries, as the model has them ---

    def began(self, before: dict[str, Any], number: int | None, *, begun: bool) -> None:
        """A delivery began to work on a crawl run, or did not: was that right?"""
        story, after = self.stories[before["id"]], self.row(before["id"])
        self.actor.begun = begun = begun or (after["error_code"] == "no_progress" and before["state"] in UNFINISHED)
        fresh, wait = story.fresh(number), before["next_attempt_at"]
        workable = before["kind"] == "crawl" and before["state"] in UNFINISHED
        if begun:
            assert workable, "it was over"
            assert fresh, "a stale wake-up began"
            assert wait is None or wait <= after["now"], "it began before its time"
            story.idle += 1
            story.begins, story.begun_by = story.begins + 1, story.begun_by if number is None else number
            self.actor.told = False
        else:
            assert not (workable and fresh and (wait is None or wait <= before["now"])), "it had to begin"

    def settle(self, held: HeldBatch) -> None:
        """A batch was committed."""
        story = self.stories[held.run_id]
        if set(held.arrived) <= set(held.confirmed):
            self.incidents -= 1
        story.settled.update(held.confirmed)
        if held.confirmed:
            story.idle = 0
        self.actor.told = self.row(held.run_id)["state"] in TERMINAL

    def drop(self, held: HeldBatch) -> None:
        """A batch was rolled back by a process that lives."""
        assert held.free or not held.confirmed, "what was confirmed must be marked"

    def lose_session(self, process: Process) -> None:
        """End the session of a process that has a batch, as the server's time-outs do; its locks are free."""
        held = process.batch
        assert held is not None
        process.flawless = False
        self.rows("SELECT pg_terminate_backend(%s, 5000)", held.session)
        held.free = True


class TaskQueue:
    """The broker as our own messages meet it; see Sender."""

    def __init__(self, world: World) -> None:
        self._world = world

    def wake(self, wake_ups: Sequence[WakeUp]) -> None:
        """Put wake-ups into the task queue; see Sender."""
        process = self._world.troupe.running
        with process.checks():
            for wake_up in wake_ups:
                self._born(wake_up)
        process.reach("enqueue")
        luck, mask = process.draw()
        arrived, confirmed = luck.fate(len(wake_ups), mask)
        for place in arrived:
            wake_up = wake_ups[place]
            self._world.letters.append(Letter(wake_up.run_id, wake_up.arguments, wake_up.number, helps=wake_up.helps))
        process.reach("enqueued")
        if len(confirmed) < len(wake_ups) and luck.error is not None:
            self._world.actor.failed = True
            raise luck.error

    def _born(self, wake_up: WakeUp) -> None:
        story, row = self._world.stories[wake_up.run_id], self._world.row(wake_up.run_id)
        assert wake_up.traceparent == traceparent_of(wake_up.run_id)
        assert story.arguments in {None, wake_up.arguments}
        if wake_up.helps:
            assert self._world.actor.begun or self._world.actor.helps, "who does not work on a run asks for help"
            return
        if row["kind"] == "crawl":  # nobody asks for those of analyses
            assert wake_up.number not in story.born, "two wake-ups of one number"
        if self._world.actor.process.name.startswith("pulse"):
            (told,) = self._world.rows("SELECT count(*) FROM run_events WHERE run_id = %s", wake_up.run_id)
            self._world.actor.woken = (self._world.actor.woken or {}) | {wake_up.run_id: told["count"]}
            assert row["state"] in UNFINISHED, "a run was woken that is over"
            assert row["wake_at"] > row["now"] + timedelta(seconds=10), "it will be woken again at once"
        story.born[wake_up.number] = story.begins


class Wire:
    """The extraction queue; see Publisher."""

    def __init__(self, world: World) -> None:
        self._world = world

    def prepare(self) -> None:
        """See Publisher."""
        process = self._world.troupe.running
        if process.luck is Luck.BLOCKED:
            process.draw()
            raise BrokerBlockedError(Luck.BLOCKED.value)

    def check(self) -> str:
        """See Publisher."""
        return "here"

    def close(self) -> None:
        """See Publisher."""

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
        """See Publisher."""
        process = self._world.troupe.running
        sources = [source for source, _ in batch.sources]
        session: Any = transaction.connection.driver_connection
        held = HeldBatch(batch.run_id, sources, session.info.backend_pid)
        with process.checks():
            self._check(batch, sources)
        process.batch = held
        process.reach("publish")
        luck, mask = process.draw()
        arrived, confirmed = luck.fate(len(sources), mask)
        held.arrived, held.confirmed = [sources[place] for place in arrived], [sources[place] for place in confirmed]
        self._world.wire += arrivals_of(batch, arrived)
        # Whatever comes, until it is committed: this much may be sent again.
        self._world.incidents += 1
        process.reach("published")
        return Receipt(held.confirmed, luck.error if len(confirmed) < len(sources) else None)

    def _check(self, batch: ExtractionBatch, sources: list[int]) -> None:
        story = self._world.stories[batch.run_id]
        assert story.arguments in {None, CrawlArguments(batch.task_id)}
        assert batch.traceparent == traceparent_of(batch.run_id)
        assert 0 < len(sources) <= BATCH
        # The plan may have been fixed a moment ago, after the last look.
        plan = story.plan if story.plan is not None else self._world.application.plan(batch.task_id)
        assert dict(batch.sources).items() <= plan.items(), "not what was planned"
        assert not story.settled.intersection(sources), "published although it was settled"
        for other in self._world.actors:
            held = other.process.batch
            if held is not None and held.run_id == batch.run_id and not held.free:
                assert not set(held.sources).intersection(sources), "two have the same rows"
        assert not self._world.actor.told, "published although it knew that the run is over"


class Discovery:
    """The Discovery Service; see DiscoveryClient."""

    def __init__(self, world: World) -> None:
        self._world = world

    def call(self, *, run_id: UUID, data_source_id: int, theme_name: str, traceparent: str) -> Answer:
        """Answer a call; see DiscoveryClient."""
        process = self._world.troupe.running
        story = self._world.stories[run_id]
        story.calls += 1
        with process.checks():
            assert story.arguments in {None, AnalysisArguments(data_source_id, theme_name)}
            assert traceparent == traceparent_of(run_id)
            *past, mine = self._world.rows("SELECT * FROM attempts WHERE run_id = %s ORDER BY number", run_id)
            assert mine["finished_at"] is None, "a call without an attempt"
            for attempt in past:
                assert (attempt["next_attempt_at"] or mine["started_at"]) <= mine["started_at"], "called early"
        process.reach("call")
        luck, _ = process.draw()
        process.reach("answered")
        ok = luck is Luck.GOOD
        code = AnswerCode.OK if ok else AnswerCode.REFUSED if luck is Luck.REFUSED else AnswerCode.UNAVAILABLE
        wants_rest = 120.0 if luck is Luck.BLOCKED else None
        return Answer(luck.outcome, 202 if ok else 503, code, luck.value, wants_rest, 0.1)


ABOUT: Final = timedelta(milliseconds=200)
"""Two looks at the clock within one statement are not the same."""
_EVERYTHING: Final[dict[str, LiteralString]] = {
    "runs": "SELECT *, id AS run_id FROM runs",
    "dispatches": "SELECT * FROM dispatches ORDER BY data_source_id",
    "attempts": "SELECT * FROM attempts ORDER BY number",
    "run_events": "SELECT run_id, state FROM run_events ORDER BY id",
}
