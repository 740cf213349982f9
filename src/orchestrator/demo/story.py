"""The story that ``orchestrator demo`` tells, chapter by chapter, on real processes.

Work is asked for as any client would, by plain Celery messages; how it goes is read from the ledger; what arrived
is read from the Extractor's own tables. The last chapter compares the two.
"""

import json
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, LiteralString
from uuid import UUID

import celery
import psycopg
from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from orchestrator import __version__, bootstrap
from orchestrator.celery_app import ANALYSIS_QUEUE, ANALYSIS_TASK, CRAWL_QUEUE, CRAWL_TASK
from orchestrator.demo import sample
from orchestrator.demo.stage import Stage
from orchestrator.demo.wire import PgmqWire, Wire
from orchestrator.domain import TERMINAL, RunState
from orchestrator.errors import RunNotFoundError
from orchestrator.insights import AttemptView, FiringFilter, FiringView, RunView
from orchestrator.ledger.transitions import SILENCE
from orchestrator.telemetry import Event

ANALYSES: Final = 12
THEME: Final = "科技新闻"
BATCHES: Final = 150
"""Batches of the run that loses a worker: enough to be in the middle of them."""
RESENT: Final = 25

_WORKERS: Final = ("worker-1", "worker-2")
_PATIENCE: Final = 60.0  # seconds
_CALLS: Final = 50  # of one analysis that are told

_KAFKA: Final = """
extraction_url = {url}
extraction_queue = {topic}
"""
_SETTINGS: Final = """
discovery_url = '{discovery}'
discovery_retry_delay = 1

[dispatch]
batch_size = {batch}
"""

# What should be sent, worked out from the application's tables without a line of the orchestrator's.
_EXPECTED: Final[LiteralString] = """
SELECT runs.id, source, config.id
FROM orchestrator.runs
JOIN crawl_tasks ON crawl_tasks.id = runs.task_id
CROSS JOIN LATERAL (SELECT DISTINCT unnest(data_source_ids) AS source) AS sources
CROSS JOIN LATERAL (
    SELECT id FROM crawl_configs
    WHERE data_source_id = source AND status = 'active' ORDER BY created_at DESC, id DESC LIMIT 1
) AS config
WHERE runs.id = ANY(%s)
"""
_LEDGER: Final[LiteralString] = """
SELECT run_id, data_source_id, crawl_config_id FROM orchestrator.dispatches
WHERE state = 'published' AND run_id = ANY(%s)
"""
_INBOX: Final[LiteralString] = """
SELECT run_id, data_source_id, crawl_config_id FROM extractor_inbox WHERE run_id = ANY(%s)
"""
_STATUSES: Final[LiteralString] = """
SELECT data_source_id, string_agg(status, ', ' ORDER BY created_at) FROM crawl_configs
WHERE data_source_id = ANY(%s) GROUP BY data_source_id
"""
_RESCHEDULE: Final[LiteralString] = """
UPDATE crawl_tasks SET schedule = %s, updated_at = now() FROM (SELECT id, schedule FROM crawl_tasks) AS before
WHERE crawl_tasks.id = %s AND before.id = crawl_tasks.id RETURNING before.schedule
"""
_COUNTS: Final[LiteralString] = "SELECT (SELECT count(*) FROM crawl_tasks), (SELECT count(*) FROM crawl_configs)"
_LISTED: Final[LiteralString] = "SELECT cardinality(data_source_ids) FROM crawl_tasks WHERE id = %s"


class Story:
    """Tells the story once.

    Args:
        stage: where it takes place.
        discovery: address of the Discovery Service.
        sources: data sources in the sample.
        started_at: when the demo was started, on the clock of ``time.monotonic``.
        kafka: address of a Kafka for extraction messages; none: they go to PostgreSQL.

    Raises:
        ConfigurationError: the address cannot be used.
        PublishError: nor can what is there.
    """

    def __init__(self, stage: Stage, discovery: str, sources: int, started_at: float, kafka: str | None = None) -> None:
        self._stage = stage
        self._sources = sources
        self._voice = _Voice(started_at)
        topic = f"orchestrator-demo-{stage.directory.name.rpartition('-')[2]}"
        extraction = _KAFKA.format(url=json.dumps(kafka), topic=json.dumps(topic)) if kafka else ""
        stage.configure(extraction + _SETTINGS.format(discovery=discovery, batch=max(1, sources // BATCHES)))
        self._ours = bootstrap.services()
        self._wire: Wire = self._topic(kafka) if kafka else PgmqWire(self._rows)
        self._client = celery.Celery("backend", broker="pgmq://")
        self._client.conf.broker_transport_options = {
            "conn_string": self._ours.database.conninfo,
            "init_extension": False,
        }

    def _topic(self, kafka: str) -> Wire:
        """Create the topic; an address that is wrong is found before anything is started."""
        from orchestrator.demo.kafka_wire import KafkaWire  # noqa: PLC0415 -- an extra
        from orchestrator.queues.kafka import Cluster  # noqa: PLC0415 -- the same

        self._ours.publisher.check()
        self._ours.publisher.close()
        settings = self._ours.settings
        return KafkaWire(Cluster.of(SecretStr(kafka), settings.kafka).configuration, settings.extraction_queue)

    def close(self) -> None:
        """Take away what the end of the stage would leave."""
        self._wire.close()

    def tell(self) -> bool:
        """Tell all chapters; return whether the Extractor received exactly what it should have."""
        self._voice.begin("Everything starts")
        self._voice.say(f"settings, data and logs are in {self._stage.directory}")
        # Before the database: whoever comes first starts it, the others join.
        self._start_worker(_WORKERS[0])
        bootstrap.home.open()
        with self._client, psycopg.connect(self._ours.database.conninfo, autocommit=True) as self._connection:
            self._everything_starts()
            analyses = self._analyses_are_triggered()
            self._a_crawl_is_planned()
            small = self._a_crawl_runs()
            large, killed_at = self._a_worker_is_killed()
            self._a_run_fails_in_words()
            self._the_analyses_are_done(analyses)
            scheduled = self._a_schedule_fires()
            self._nothing_is_lost(large, killed_at)
            self._messages_come_twice()
            return self._ledger_and_extractor_agree([small, large, *scheduled])

    def invite(self) -> None:
        """Tell what to try from another terminal while everything is still up."""
        command = _command()
        self._voice.begin("Your turn")
        self._voice.say("All stays up until Ctrl-C, then it is gone without a trace. In another terminal:")
        self._voice.quote(
            *(f"unset {name}" for name in self._stage.hidden),
            f"export ORCHESTRATOR_CONFIG={self._stage.settings_file}",
            f"{command} run 3 --wait",
            f"{command} analyze 21 22 23 --theme news --wait",
            f"{command} plan {sample.NEWS}",
            f"{command} schedules",
            f"{command} schedule preview '每天 03:00' --zone Asia/Shanghai",
            f"{command} why {sample.PRICES} --at 03:00",
            f"{command} runs",
            f"{command} workers",
            f"{command} --help",
            f"tail -f {self._stage.directory}/*.log",
        )

    # --- The chapters ----------------------------------------------------------------------------------------------

    def _everything_starts(self) -> None:
        ((version,),) = self._rows("SHOW server_version")
        self._voice.say(
            f"Task Orchestrator {__version__}, Celery {celery.__version__}, Python {platform.python_version()}"
        )
        self._voice.say(f"PostgreSQL {version} carries the application's tables, the ledger and Celery's queues")
        self._voice.say(f"extraction messages go to {self._wire}")
        sample.create(self._connection, self._sources)
        ((tasks, configs),) = self._rows(_COUNTS)
        self._voice.say(f"sample: {tasks} crawl tasks, {self._sources:,} data sources, {configs:,} crawl configs")
        # -P: it stands alone, so it may not find by accident what lies beside it.
        places = self._wire.environment | {"DATABASE_URL": self._ours.database.conninfo}
        self._stage.start("extractor", "-P", str(self._wire.extractor), **places)
        self._stage.until(lambda: self._nodes("worker"), within=_PATIENCE, what="a worker is up")
        self._voice.say(f"{_WORKERS[0]}, the Extractor, and a Discovery Service that is slow and flaky are up")
        self._start_worker(_WORKERS[1])
        self._start_celery("beat", "beat")
        self._voice.say(f"{_WORKERS[1]} and a beat are on their way")

    def _analyses_are_triggered(self) -> list[UUID]:
        self._voice.begin(f"{ANALYSES} site analyses are triggered")
        runs = [self._send(ANALYSIS_TASK, ANALYSIS_QUEUE, source, THEME) for source in range(1, ANALYSES + 1)]
        self._voice.say("by plain Celery messages, as a web backend would send them; we look at them again later")
        return runs

    def _a_crawl_is_planned(self) -> None:
        self._voice.begin(f"What would crawl task {sample.NEWS} send?")
        with self._ours.database.transaction() as connection:
            plan = self._ours.catalog.read_plan(connection, sample.NEWS)
        skipped = [source for source, config in plan if config is None]
        ((listed,),) = self._rows(_LISTED, sample.NEWS)
        self._voice.say(
            f"its row lists {listed} ids, NULLs and repetitions among them: {len(plan)} data sources, "
            f"{len(plan) - len(skipped)} to dispatch, {len(skipped)} to skip"
        )
        statuses = dict(self._rows(_STATUSES, skipped))
        self._voice.table(
            ["data source", "skipped because", "its crawl configs are"],
            [(source, "no_active_config", statuses.get(source, "(none)")) for source in skipped],
        )

    def _a_crawl_runs(self) -> UUID:
        self._voice.begin(f"Crawl task {sample.NEWS} runs")
        run_id = self._send(CRAWL_TASK, CRAWL_QUEUE, sample.NEWS)
        self._watch(run_id)
        self._voice.say(f"first crawl dispatched {self._voice.age():.1f} s after start")
        return run_id

    def _a_worker_is_killed(self) -> tuple[UUID, float]:
        self._voice.begin(f"Crawl task {sample.EVERYTHING} runs, and a worker is killed in the middle")
        self._stage.until(
            lambda: len(self._nodes("worker")) == len(_WORKERS), within=_PATIENCE, what="both workers are up"
        )
        self._voice.say(f"{' and '.join(_WORKERS)} are up; one of the workers takes the run")
        run_id = self._send(CRAWL_TASK, CRAWL_QUEUE, sample.EVERYTHING)
        victim = self._stage.until(lambda: self._at_work(run_id), within=_PATIENCE, what="a worker is at the run")
        self._stage.until(
            lambda: self._ours.insights.run(run_id).published >= self._sources // 5,
            within=_PATIENCE,
            what="a fifth of the run is published",
        )
        # Frozen first, so that the picture holds still while we look at it.
        self._stage.freeze(victim)
        view = self._ours.insights.run(run_id)
        self._stage.kill(victim)
        self._voice.say(f"kill -9 {victim}, the whole process group, with a batch in its hands")
        self._voice.say(
            f"the ledger at that moment: {view.published:,} published, {view.pending:,} pending, "
            f"{view.skipped:,} skipped of {view.total:,}"
        )
        self._voice.say(
            f"nobody reports the death. The pulse of any worker or beat wakes a run that was silent for {SILENCE:.0f} s"
        )
        return run_id, time.monotonic()

    def _a_run_fails_in_words(self) -> None:
        self._voice.begin("Meanwhile: what a failure looks like")
        run_id = self._send(CRAWL_TASK, CRAWL_QUEUE, sample.UNKNOWN)
        view = self._stage.until(lambda: self._over(run_id), within=_PATIENCE, what="the run has failed")
        self._voice.say(f"run of crawl task {sample.UNKNOWN} {view.state}: {view.error_message} ({view.error_code})")

    def _the_analyses_are_done(self, run_ids: Sequence[UUID]) -> None:
        self._voice.begin("Meanwhile: how the site analyses went")
        with self._voice.progress() as progress:
            bar = progress.add_task("analyses", total=len(run_ids))

            def over() -> bool:
                done = [run_id for run_id in run_ids if self._over(run_id)]
                progress.update(bar, completed=len(done))
                return len(done) == len(run_ids)

            self._stage.until(over, within=_PATIENCE, what="all site analyses are over")
        views = [self._ours.insights.run(run_id) for run_id in run_ids]
        calls = [self._ours.insights.page_attempts(run_id, limit=_CALLS) for run_id in run_ids]
        self._voice.table(
            ["data source", "state", "calls", "what the ledger says of them"],
            [(run.data_source_id, run.state, len(made), _told(made)) for run, made in zip(views, calls, strict=True)],
        )
        succeeded = sum(view.state is RunState.SUCCEEDED for view in views)
        retried = sum(len(made) > 1 for made in calls)
        self._voice.say(
            f"{succeeded} of {len(views)} succeeded, {retried} after retries; a wait is a row, no worker sleeps"
        )

    def _a_schedule_fires(self) -> list[UUID]:
        self._voice.begin(f"Meanwhile: the schedule of crawl task {sample.PRICES} is edited, and fires")
        listed = self._stage.until(
            lambda: self._ours.insights.page_schedules(limit=10),
            within=_PATIENCE,
            what="the beat has read the schedules",
        )
        self._voice.table(
            ["crawl task", "schedule as written", "read as", "next fires (UTC)"],
            [(each.task_id, each.text or "", each.canonical or "", _moment(each.next_fire_at)) for each in listed],
        )
        ((before,),) = self._rows(_RESCHEDULE, "每3秒", sample.PRICES)
        self._voice.say("an administrator writes 每3秒 (every 3 seconds) into the application's table, nothing more")
        fired = self._stage.until(self._fired, within=_PATIENCE, what="the schedule has fired twice")
        self._rows(_RESCHEDULE, before, sample.PRICES)
        for firing in reversed(fired):
            late = (firing.claimed_at - firing.scheduled_for).total_seconds()
            self._voice.say(
                f"slot {firing.scheduled_for:%H:%M:%S}Z {firing.outcome}, claimed {1_000 * late:.0f} ms after it came"
            )
        runs = [run_id for firing in self._firings() if (run_id := firing.run_id) is not None]
        self._stage.until(lambda: all(map(self._over, runs)), within=_PATIENCE, what="the runs of its slots are over")
        self._voice.say(f"{before} is back, and {len(runs)} runs of slots are over; a slot's run has one possible id")
        return runs

    def _nothing_is_lost(self, run_id: UUID, killed_at: float) -> None:
        self._voice.begin("Back to the run that lost its worker")
        self._watch(run_id)
        self._voice.say(f"over {time.monotonic() - killed_at:.1f} s after the kill; the other worker did the rest")

    def _messages_come_twice(self) -> None:
        self._voice.begin(f"{RESENT} messages come twice")
        self._stage.until(self._wire.drained, within=_PATIENCE, what="the Extractor has taken all messages")
        self._wire.send_again(RESENT)
        self._voice.say("with the same message ids, as after a lost confirm; the Extractor's inbox knows them")

    def _ledger_and_extractor_agree(self, run_ids: list[UUID]) -> bool:
        self._voice.begin("The ledger, and what the Extractor really received")
        self._stage.until(self._wire.drained, within=_PATIENCE, what="the Extractor has taken all messages")
        expected, ledger, inbox = (Counter(self._rows(each, run_ids)) for each in (_EXPECTED, _LEDGER, _INBOX))
        received = Counter(run_id for run_id, *_ in inbox.elements())
        arrived = self._wire.arrived()
        rows = []
        for run_id in run_ids:
            view = self._ours.insights.run(run_id)
            counts = (view.total, view.skipped, view.published, arrived[run_id], received[run_id])
            rows.append((f"crawl task {view.task_id}", view.state, *(f"{count:,}" for count in counts)))
        self._voice.table(["run of", "state", "planned", "skipped", "published", "on the wire", "in the inbox"], rows)
        duplicates = sum(arrived[run_id] for run_id in run_ids) - inbox.total()
        agree = expected == ledger == inbox
        self._voice.say(
            f"{'OK' if agree else 'MISMATCH'}: {expected.total()} expected, {ledger.total()} in the ledger, "
            f"{inbox.total()} in the inbox, {(ledger - inbox).total()} lost, {(inbox - ledger).total()} unasked for; "
            f"{duplicates} duplicates on the wire{', all recognised' if agree else ''}",
            style="bold green" if agree else "bold red",
        )
        return agree

    # --- Acting and looking ----------------------------------------------------------------------------------------

    def _start_worker(self, name: str) -> None:
        self._start_celery(name, "worker", "-n", f"{name}@demo", "-c", "2")

    def _start_celery(self, name: str, *arguments: str) -> None:
        self._stage.start(name, "-m", "celery", "-A", "orchestrator.celery_app", *arguments)

    def _send(self, task: str, queue: str, *arguments: object) -> UUID:
        return UUID(self._client.send_task(task, args=arguments, queue=queue).id)

    def _rows(self, statement: LiteralString, *parameters: object) -> list[Any]:
        return self._connection.execute(statement, parameters or None).fetchall()

    def _nodes(self, kind: str) -> list[str]:
        return [node.name for node in self._ours.insights.nodes() if node.kind == kind]

    def _at_work(self, run_id: UUID) -> str | None:
        """Return the worker that made the run's plan, and so is the one at work on it."""
        for name in _WORKERS:
            lines = self._stage.log(name).read_text().splitlines()
            if any(str(run_id) in line and Event.RUN_MATERIALIZED in line for line in lines):
                return name
        return None

    def _seen(self, run_id: UUID) -> RunView | None:
        """Return a run; none while no worker has seen its message, for then it is not in the ledger."""
        try:
            return self._ours.insights.run(run_id)
        except RunNotFoundError:
            return None

    def _over(self, run_id: UUID) -> RunView | None:
        view = self._seen(run_id)
        return view if view is not None and view.state in TERMINAL else None

    def _firings(self) -> list[FiringView]:
        return self._ours.insights.page_firings(FiringFilter(sample.PRICES), limit=20)

    def _fired(self) -> list[FiringView] | None:
        started = [firing for firing in self._firings() if firing.run_id is not None]
        return started if len(started) > 1 else None

    def _watch(self, run_id: UUID) -> None:
        """Show how a crawl run goes until it is over."""
        with self._voice.progress() as progress:
            bar = progress.add_task("messages", total=None)

            def over() -> RunView | None:
                view = self._seen(run_id)
                if view is not None:
                    progress.update(bar, completed=view.published + view.skipped, total=view.total or None)
                return view if view is not None and view.state in TERMINAL else None

            view = self._stage.until(over, within=_PATIENCE, what=f"run {run_id} is over")
        self._voice.say(
            f"run {view.id} {view.state}: {view.published:,} published, {view.skipped:,} skipped of {view.total:,}"
        )


def _moment(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"


class _Voice:
    """Numbered chapters on the terminal, plain text elsewhere; each line with the seconds since the start."""

    _WIDTH: Final = 140  # where there is no terminal to ask

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._chapter = 0
        self._console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else self._WIDTH)

    def age(self) -> float:
        """Return how long ago the demo was started, in seconds."""
        return time.monotonic() - self._started_at

    def begin(self, title: str) -> None:
        """Begin a chapter."""
        self._chapter += 1
        self._console.print(f"\n{self._chapter}. {title}", style="bold")

    def say(self, sentence: str, style: str = "") -> None:
        """Say one sentence."""
        self._console.print(Text(f"{self.age():5.1f} s  ", "dim").append(sentence, style), soft_wrap=True)

    def quote(self, *lines: str) -> None:
        """Show commands, unbroken so that they can be copied."""
        for line in lines:
            self._console.print(f"    {line}", style="cyan", soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show a table."""
        table = Table(*columns, box=box.SIMPLE_HEAD, header_style="bold")
        for row in rows:
            table.add_row(*map(str, row))
        self._console.print(table)

    def progress(self) -> Progress:
        """Return a bar that vanishes when it is full, and is not there without a terminal."""
        return Progress(console=self._console, transient=True, disable=not self._console.is_terminal)


def _told(calls: Sequence[AttemptView]) -> str:
    """Put the attempts of a site analysis in words."""
    words = []
    for call in calls:
        word = str(call.status or {"lost": "lost with its worker"}.get(call.code or "", call.code))
        if call.seconds is not None:
            word += f" in {call.seconds:.1f} s"
        if call.retry_after is not None:
            word += f", Retry-After {call.retry_after:.0f}"
        if call.next_attempt_at is not None and call.finished_at is not None:
            word += f", waits {(call.next_attempt_at - call.finished_at).total_seconds():.1f} s"
        words.append(word)
    return " → ".join(words)


def _command() -> str:
    """Return how to call the command line from another terminal, wherever that is."""
    program = Path(sys.argv[0]).absolute()
    if program.name != "orchestrator":
        return f"{sys.executable} -m orchestrator"
    return program.name if shutil.which(program.name) == str(program) else str(program)
