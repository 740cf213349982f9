"""The command line as people and scripts meet it: a real process, a real database, a real broker."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from uuid import uuid4

import psycopg
import pytest

from orchestrator import __version__
from orchestrator.db import Database
from orchestrator.domain import Health, Node, slot_run_id
from orchestrator.ledger.nodes import NodeLedger
from orchestrator.schema import SCHEMA
from tests.support.application import Application, migrated
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, children_of, eventually, free_port, process_exists
from tests.support.scheduling import Rota, at

CANARY: Final = "canary-5ecret"
_LIMIT: Final = 60.0
_WELL: Final = Health()


@dataclass(frozen=True)
class Result:
    """What a command that ended has said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:  # noqa: ANN401 -- JSON
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Shell:
    """Runs ``python -m orchestrator`` in one environment."""

    directory: Path
    settings: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with these settings and no others."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
        ours = {f"ORCHESTRATOR_{name}": value for name, value in self.settings.items()}
        return inherited | ours | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}

    def but(self, **settings: str) -> "Shell":
        """The same with other settings."""
        return Shell(self.directory, {**self.settings, **settings})

    def __call__(self, *arguments: str) -> Result:
        """Run a command to its end; none may show a traceback."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert CANARY not in done.stdout + done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def succeed(self, *arguments: str) -> Result:
        """Run a command that must succeed."""
        result = self(*arguments)
        assert result.code == 0, result
        return result

    def start(self, *arguments: str) -> Process:
        """Start a command and leave it running."""
        output = self.directory / f"{uuid4().hex}.out"
        command = [sys.executable, "-m", "orchestrator", *arguments]
        return Process(command, output=output, env=self.environment, cwd=self.directory)


@pytest.fixture
def application(database_url: str) -> Application:
    """A migrated database with the application's tables: task 1 has three sources, one without a config."""
    application = Application(migrated(database_url))
    application.create_tables()
    application.add_task(1, [11, 12, 13])
    application.add_configs([(101, 11), (102, 12), (103, 13, "disabled")])
    return application


@pytest.fixture
def shell(application: Application, tmp_path: Path) -> Shell:
    """The set-up without RabbitMQ: queues live in the database."""
    return Shell(tmp_path, {"DATABASE_URL": application.url})


def _unreachable() -> str:
    return f"127.0.0.1:{free_port()}"


# --- Usage and configuration ---------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Shell:
    """No database at all: these must not need one."""
    return Shell(tmp_path, {"DATABASE_URL": f"postgresql://u:{CANARY}@{_unreachable()}/nowhere"})


def test_version_and_help(bare: Shell) -> None:
    assert bare.succeed("--version").out == f"orchestrator {__version__}\n"
    assert "orchestrator run 7 --wait" in bare.succeed("run", "--help").out


@pytest.mark.parametrize(
    ("redirection", "code", "complaint"),
    [
        (">/dev/full", 1, "orchestrator: the output cannot be read or written: No space left on device\n"),
        (">&-", 0, ""),
        ("2>/dev/full", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(
    bare: Shell, redirection: str, code: int, complaint: str
) -> None:
    script = f'exec "$0" -m orchestrator schedule preview daily {redirection}'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable], env=bare.environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, complaint)


def test_what_few_commands_need_delays_no_other() -> None:
    """Alembic, and the part of SQLAlchemy that maps objects, would be a third of a command's start."""
    few_need = {"alembic", "opentelemetry", "prometheus_client", "sqlalchemy.orm"}
    probe = f"import sys, orchestrator.__main__; print(sys.modules.keys() & {few_need})"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "No such command"),
        (["run", "seven"], "as an integer"),
        (["run", "0"], "task_id must be between 1 and"),
        (["plan", "0"], "task_id must be between 1 and"),
        (["run", "99999999999999999999"], "task_id must be between 1 and"),
        (["run", "1", "--id", "no-uuid"], "UUID"),
        (["analyze", "1", "--theme", " "], "theme_name must not be blank"),
        (["analyze", "--theme", "news"], "DATA_SOURCE_ID"),
        (["runs", "--state", "sleeping"], "sleeping"),
    ],
)
def test_wrong_usage_is_explained_and_exits_2(bare: Shell, arguments: list[str], complaint: str) -> None:
    result = bare(*arguments)
    assert (result.code, result.out) == (2, "")
    assert complaint in " ".join(result.err.replace("│", " ").split())


@pytest.mark.parametrize("command", [["runs"], ["run", "1"], ["worker"], ["beat"], ["up"], ["doctor"], ["migrate"]])
def test_a_malformed_setting_is_one_line_and_exits_2(bare: Shell, command: list[str]) -> None:
    result = bare.but(DISPATCH__BATCH_SIZE="many")(*command)
    assert result.code == 2
    assert result.err.startswith("orchestrator: ORCHESTRATOR_DISPATCH__BATCH_SIZE: ")
    assert result.err.count("\n") == 1


def test_an_unknown_setting_points_to_the_list_which_works_all_the_same(bare: Shell) -> None:
    shell = bare.but(DATABSE_URL="x")
    result = shell("runs")
    assert result.code == 2
    assert "ORCHESTRATOR_DATABSE_URL: no such setting; `orchestrator doctor --settings`" in result.err
    listed = {each["variable"]: each for each in shell.succeed("doctor", "--settings", "--json").document["settings"]}
    assert listed["ORCHESTRATOR_EXTRACTION_QUEUE"]["default"] == "extraction_queue"
    assert listed["ORCHESTRATOR_BROKER_URL"]["default"] == "pgmq://"
    assert "ORCHESTRATOR_CATALOG__CRAWL_CONFIGS__ACTIVE" in listed


# --- The database is not there, or not ready -----------------------------------------------------------------------


@pytest.mark.parametrize("command", [["runs"], ["run", "1"], ["plan", "1"], ["migrate"], ["doctor", "--beat"]])
def test_an_unreachable_database_is_one_sentence(bare: Shell, command: list[str]) -> None:
    result = bare(*command)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("orchestrator: PostgreSQL: ")
    assert result.err.count("\n") == 1


def test_a_database_that_is_not_migrated_says_what_to_run(database_url: str, tmp_path: Path) -> None:
    shell = Shell(tmp_path, {"DATABASE_URL": database_url})
    result = shell("runs")
    assert result.code == 1
    assert "run `orchestrator migrate`" in result.err
    assert shell.succeed("migrate").out == "the ledger is migrated\n"
    assert shell.succeed("migrate").out == "the ledger is up to date\n"
    assert shell.succeed("runs", "--json").document == {"runs": []}


def test_missing_rights_are_one_sentence(shell: Shell, postgres_server: PostgresServer) -> None:
    role = f"reader_{uuid4().hex[:8]}"
    postgres_server.create_role(role)
    try:
        name = shell.settings["DATABASE_URL"].rpartition("/")[2]
        result = shell.but(DATABASE_URL=postgres_server.url(name, user=role, password=CANARY))("runs")
    finally:
        postgres_server.drop_role(role)
    assert result.code == 1
    assert "permission denied" in result.err
    assert result.err.count("\n") == 1


# --- Accepting, planning, reading ----------------------------------------------------------------------------------


def test_a_run_is_recorded_and_enqueued(application: Application, broker_url: str, tmp_path: Path) -> None:
    shell = Shell(tmp_path, {"DATABASE_URL": application.url, "BROKER_URL": broker_url})
    run_id = str(uuid4())

    result = shell.succeed("run", "1", "--id", run_id)
    assert result.out == f"run {run_id} is enqueued: crawl task 1\n"
    assert "no living worker consumes orchestrator.crawl" in result.err

    again = shell.succeed("run", "1", "--id", run_id, "--json").document
    assert again["enqueued"]
    assert (again["run"]["id"], again["run"]["state"], again["run"]["trigger"]) == (run_id, "queued", "cli")
    other = shell("run", "2", "--id", run_id)
    assert other.code == 2
    assert "belongs to another run already: crawl task 1" in other.err
    [only] = shell.succeed("runs", "--json").document["runs"]
    assert only["id"] == run_id


def test_without_a_broker_a_run_is_recorded_for_the_pulse(shell: Shell) -> None:
    result = shell.but(BROKER_URL=f"amqp://u:{CANARY}@{_unreachable()}//").succeed("run", "1", "--json")
    assert not result.document["enqueued"]
    assert "the pulse of any worker or beat enqueues it" in result.err
    assert len(shell.succeed("runs", "--json").document["runs"]) == 1


def test_a_plan_tells_what_would_happen_and_does_nothing(application: Application, shell: Shell) -> None:
    assert shell.succeed("plan", "1", "--json").document == {
        "task_id": 1,
        "total": 3,
        "dispatched": 2,
        "skipped": 1,
        "limit": 20,
        "dispatches": [{"data_source_id": 11, "crawl_config_id": 101}, {"data_source_id": 12, "crawl_config_id": 102}],
        "skips": [{"data_source_id": 13, "reason": "no_active_config"}],
    }
    application.add_task(2, list(range(1, 5001)))
    large = shell.succeed("plan", "2", "--limit", "3").out
    assert "crawl task 2: 5000 data sources, 2 to dispatch, 4998 to skip" in large
    assert "4995 more" in large
    assert len(large.splitlines()) < 20
    assert shell.succeed("runs", "--json").document == {"runs": []}

    missing = shell("plan", "9")
    assert (missing.code, missing.out, missing.err) == (1, "", "orchestrator: there is no crawl task 9\n")


def test_runs_are_filtered_and_shown_by_a_prefix(shell: Shell) -> None:
    crawl = shell.succeed("run", "1", "--json").document["run"]["id"]
    analyses = shell.succeed("analyze", "5", "6", "5", "--theme", "news \x1b[31m", "--json").document["runs"]
    assert [(each["data_source_id"], each["theme_name"]) for each in analyses] == [
        (5, "news \x1b[31m"),
        (6, "news \x1b[31m"),
    ]
    listed = [each["id"] for each in shell.succeed("runs", "--json").document["runs"]]
    assert listed == [analyses[1]["id"], analyses[0]["id"], crawl]
    assert [each["id"] for each in shell.succeed("runs", "--task", "1", "--json").document["runs"]] == [crawl]
    assert len(shell.succeed("runs", "--kind", "site_analysis", "--limit", "1", "--json").document["runs"]) == 1
    assert shell.succeed("runs", "--state", "failed", "--json").document == {"runs": []}
    table = shell.succeed("runs").out
    assert crawl in table
    assert "\x1b" not in table

    shown = shell.succeed("show", crawl[:8], "--json").document
    assert shown["run"]["id"] == crawl
    assert shown["waits_for"].startswith("a worker to take it from orchestrator.crawl; no living worker")
    assert [event["event"] for event in shown["events"]] == ["run.accepted"]
    assert "a worker to take it from orchestrator.crawl" in shell.succeed("show", crawl).out


def test_a_run_id_must_be_meant(application: Application, shell: Shell) -> None:
    for last in "12":
        shell.succeed("run", "1", "--id", f"abcd0000-0000-4000-8000-00000000000{last}")
    for text, code, complaint in [
        ("abc", 2, "at least its first 4 hex digits"),
        ("xyzw", 2, "is no run id"),
        ("%%%%", 2, "is no run id"),
        ("abcd0000", 2, "several runs begin with"),
        (str(uuid4()), 1, "there is no run"),
    ]:
        result = shell("show", text)
        assert (result.code, result.out) == (code, ""), text
        assert complaint in result.err
    assert shell.succeed("show", "ABCD0000-0000-4000-8000-000000000002", "--json").document["run"]["task_id"] == 1
    assert application.url


# --- Schedules -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rota(application: Application) -> Iterator[Rota]:
    """Beats at 12:00:30 of a past day, who have noticed crawl task 7, which fires daily, and 8, each ten minutes."""
    bench = Workbench(application.url)
    application.execute("ALTER TABLE crawl_tasks ADD timezone text")
    rota = Rota(bench, at("12:00:30"))
    rota.add(7, "每天 03:00", timezone="Asia/Shanghai", data_source_ids=[11])
    rota.add(8, "every 10 minutes")
    rota.go()
    yield rota
    bench.close()


def test_a_preview_needs_nothing_at_all(bare: Shell, tmp_path: Path) -> None:
    after = ["--zone", "Asia/Shanghai", "--count", "2", "--after", "2026-07-01 10:20:30"]
    text = bare.succeed("schedule", "preview", "每天 03:00", *after).out
    assert text.startswith("“每天 03:00” means 0 3 * * *, in Asia/Shanghai\n")
    assert "Thu 2026-07-02 03:00:00 +0800   2026-07-01 19:00:00Z" in text

    unconfigured = Shell(tmp_path, {"STATE_DIR": str(tmp_path / "state")})
    assert unconfigured.succeed("schedule", "preview", "每天 03:00", *after, "--json").document == {
        "text": "每天 03:00",
        "canonical": "0 3 * * *",
        "zone": "Asia/Shanghai",
        "fires": [
            {"at": "2026-07-01T19:00:00+00:00", "local": "2026-07-02T03:00:00+08:00"},
            {"at": "2026-07-02T19:00:00+00:00", "local": "2026-07-03T03:00:00+08:00"},
        ],
    }
    assert len(unconfigured.succeed("schedule", "preview", "@hourly", "--json").document["fires"]) == 5
    assert not (tmp_path / "state").exists()
    spread = bare.but(SCHEDULER__SPREAD="600").succeed("schedule", "preview", "daily")
    assert "each crawl task moves it by some minutes of its own" in spread.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["schedule", "preview", "daily at 25:00"], 'cannot read "25:00" (character 10): hours go from 0 to 23'),
        (["schedule", "preview", "daily", "--zone", "GMT+8"], "'GMT+8' is no IANA time zone"),
        (["schedule", "preview", "daily", "--after", "tomorrow"], "'tomorrow' is no time; write for instance"),
        (["schedule", "pause", "0"], "task_id must be between 1 and"),
        (["schedules", "--task", "0"], "--task"),
        (["schedules", "--state", "odd"], "odd"),
        (["why", "7"], "--at"),
    ],
)
def test_wrong_usage_of_schedules_is_explained_and_exits_2(bare: Shell, arguments: list[str], complaint: str) -> None:
    result = bare(*arguments)
    assert (result.code, result.out) == (2, "")
    assert complaint in " ".join(result.err.replace("│", " ").split())


def test_schedules_are_paused_resumed_and_listed_with_their_last_slot(rota: Rota, shell: Shell) -> None:
    rota.go("19:00")
    assert shell.succeed("schedule", "pause", "7", "--reason", "site down").out == (
        "the schedule of crawl task 7 is paused\n"
    )
    again = shell("schedule", "pause", "7")
    assert (again.code, again.err) == (1, "orchestrator: the schedule of crawl task 7 is paused; allowed: resume\n")

    [view] = shell.succeed("schedules", "--state", "paused", "--json").document["schedules"]
    assert (view["task_id"], view["state"], view["canonical"], view["zone"]) == (
        7,
        "paused",
        "0 3 * * *",
        "Asia/Shanghai",
    )
    assert view["paused_by"].startswith("cli:")
    assert (view["last_firing"]["scheduled_for"], view["last_firing"]["outcome"]) == (
        "2026-07-01T19:00:00+00:00",
        "started",
    )
    table = shell.succeed("schedules").out
    assert "每天 03:00" in table
    assert "site down" in table

    assert "is resumed; it fires next at 2026-07-02 19:00:00Z" in shell.succeed("schedule", "resume", "7").out
    unknown = shell("schedule", "resume", "9")
    assert unknown.code == 1
    assert "the scheduler knows no crawl task 9" in unknown.err


def test_a_schedule_is_triggered_as_a_run(shell: Shell) -> None:
    run = shell.succeed("schedule", "trigger", "1", "--json").document["run"]
    assert (run["task_id"], run["trigger"], run["scheduled_for"]) == (1, "cli", None)


def test_a_scheduled_run_and_its_slot_are_explained(rota: Rota, shell: Shell) -> None:
    rota.go("19:00:01")
    run_id = str(slot_run_id(7, at("19:00")))

    assert re.search(r"slot +2026-07-01 19:00:00Z", shell.succeed("show", run_id).out)
    why = shell.succeed("why", "7", "--at", "2026-07-02 03:00", "--json").document
    assert (why["verdict"], why["run_id"], why["at"]) == ("started", run_id, "2026-07-01T19:00:00+00:00")
    assert why["firing"]["claimed_by"] == "beat@test"
    text = shell.succeed("why", "7", "--at", "2026-07-02T03:00+08:00").out
    assert "It ran: 2026-07-01 19:00:00Z (2026-07-02 03:00:00 in Asia/Shanghai) was claimed 1.0 s after it" in text
    assert f"Run {run_id} waits for a worker" in text
    assert shell.succeed("why", "9", "--at", "03:00", "--json").document["verdict"] == "unknown_task"

    firings = shell.succeed("firings", "--task", "8", "--outcome", "missed", "--until", "12:20", "--json").document
    assert firings["firings"][0]["reason"] == "superseded"
    assert firings["firings"][0]["scheduled_for"] == "2026-07-01T18:40:00+00:00"
    since = ["--since", "2026-07-01T19:00Z", "--until", "2026-07-01T19:00Z"]
    assert len(shell.succeed("firings", *since, "--json").document["firings"]) == 2
    assert run_id in shell.succeed("firings", "--task", "7").out


def test_a_backfill_lists_first_then_starts_what_has_no_run(rota: Rota, shell: Shell) -> None:
    rota.go("12:10")
    span = ["--from", "2026-07-01T12:00Z", "--to", "2026-07-01 12:30"]
    dry = shell.succeed("schedule", "backfill", "8", *span, "--json").document
    assert (dry["dry_run"], dry["to_start"]) == (True, 3)
    assert [(each["slot"][11:16], each["firing"] and each["firing"]["outcome"]) for each in dry["slots"]] == [
        ("12:00", None),
        ("12:10", "started"),
        ("12:20", None),
        ("12:30", None),
    ]
    text = shell.succeed("schedule", "backfill", "8", *span, "--limit", "1").out
    assert "3 of 4 slots would start a run; nothing happens without --yes" in text
    assert "3 more" in text
    assert len(shell.succeed("runs", "--task", "8", "--json").document["runs"]) == 1

    done = shell.succeed("schedule", "backfill", "8", *span, "--yes", "--reason", "late", "--json")
    assert done.document["enqueued"]
    assert set(done.document["runs"]) == {str(slot_run_id(8, at(each))) for each in ("12:00", "12:20", "12:30")}
    assert "no living worker consumes orchestrator.crawl" in done.err
    assert rota.rows("SELECT * FROM outbox") == []
    [audit] = rota.rows("SELECT * FROM audit_events")
    assert (audit["action"], audit["reason"]) == ("backfill", "late")
    again = shell.succeed("schedule", "backfill", "8", *span, "--yes").out
    assert again == "0 runs of crawl task 8 are enqueued, for 4 slots\n"


def test_a_backfill_without_a_broker_is_recorded_for_the_pulse(rota: Rota, shell: Shell) -> None:
    away = shell.but(BROKER_URL=f"amqp://u:{CANARY}@{_unreachable()}//")
    span = ["--from", "2026-07-01T12:00Z", "--to", "2026-07-01T12:30Z"]
    result = away.succeed("schedule", "backfill", "8", *span, "--yes")
    assert result.out == "4 runs of crawl task 8 are recorded, for 4 slots\n"
    assert "the pulse of any worker or beat enqueues it" in result.err
    assert len(rota.rows("SELECT * FROM outbox")) == 1


def test_a_backfill_that_cannot_be_meant_is_refused(rota: Rota, shell: Shell) -> None:
    rota.add(3, "whenever")
    rota.hands.move(5)
    rota.edit(3)
    rota.go()
    for task, first, last, code, complaint in [
        ("8", "2026-07-01", "2100-01-01", 2, "the end lies in the future"),
        ("8", "2026-07-02", "2026-07-01", 2, "the end lies before the beginning"),
        (
            "8",
            "2026-07-01 00:01",
            "2026-07-01 00:09",
            2,
            "has no slot in that time; the next one is 2026-07-01 00:10",
        ),
        ("8", "2026-07-01", "2026-07-08", 2, "has 1009 slots, and 1000 at most are made up for at once: narrow it"),
        ("8", "2020-07-01", "2026-07-08", 2, "has over 10000 slots"),
        ("3", "2026-07-01", "2026-07-02", 1, "the schedule of crawl task 3 cannot be read: cannot read"),
        ("9", "2026-07-01", "2026-07-02", 1, "the scheduler knows no crawl task 9"),
    ]:
        result = shell("schedule", "backfill", task, "--from", first, "--to", last, "--yes")
        assert (result.code, result.out) == (code, ""), result
        assert complaint in result.err


# --- Operating -----------------------------------------------------------------------------------------------------


def test_cancel_and_retry_say_what_is_allowed(shell: Shell) -> None:
    run_id = shell.succeed("run", "1", "--json").document["run"]["id"]
    early = shell("retry", run_id)
    assert early.code == 1
    assert "allowed: cancel" in early.err

    assert "is canceled: crawl task 1" in shell.succeed("cancel", run_id[:8], "--reason", "wrong task").out
    late = shell("cancel", run_id)
    assert late.code == 1
    assert "allowed: retry" in late.err
    shown = shell.succeed("show", run_id, "--json").document
    assert shown["waits_for"] == "nothing: it is over"
    assert "wrong task" in shown["run"]["error_message"]

    again = shell.succeed("retry", run_id, "--json").document["run"]
    assert (again["retry_of"], again["task_id"], again["state"]) == (run_id, 1, "queued")
    assert again["id"] != run_id
    assert "is canceled, which is final" in shell.succeed("retry", run_id).out


def test_a_failed_run_goes_back_into_the_queue_as_itself(application: Application, shell: Shell) -> None:
    run_id = shell.succeed("analyze", "5", "--theme", "news", "--json").document["runs"][0]["id"]
    with psycopg.connect(application.url) as connection:
        connection.execute(
            "UPDATE orchestrator.runs SET state = 'failed', error_code = 'http_404', error_message = 'not there',"
            " finished_at = now(), wake_at = NULL WHERE id = %s",
            [run_id],
        )
    assert "orchestrator retry" in shell.succeed("show", run_id, "--json").document["waits_for"]
    revived = shell.succeed("retry", run_id, "--reason", "it is now", "--json").document
    assert (revived["run"]["id"], revived["run"]["state"], revived["enqueued"]) == (run_id, "queued", True)
    with psycopg.connect(application.url) as connection:
        [(actor, reason)] = connection.execute("SELECT actor, reason FROM orchestrator.audit_events").fetchall()
    assert actor.startswith("cli:")
    assert reason == "it is now"


def test_nodes_are_listed_and_a_beat_is_a_health_check(application: Application, shell: Shell) -> None:
    assert shell("doctor", "--beat").code == 1
    database = Database(application.url, SCHEMA)
    NodeLedger(database).heartbeat(Node("beat@here", "beat"), "1.2.3")
    NodeLedger(database).heartbeat(Node("worker@here", "worker", ("orchestrator.crawl",), 4), "1.2.3")
    database.close()
    # Three commands on a busy machine take longer than the 15 s after which a node is silent.
    application.execute("UPDATE orchestrator.nodes SET seen_at = now() + interval '5 minutes'")
    nodes = {node["name"]: node for node in shell.succeed("workers", "--json").document["nodes"]}
    assert nodes["worker@here"]["alive"]
    assert nodes["worker@here"]["queues"] == ["orchestrator.crawl"]
    assert shell.succeed("doctor", "--beat", "--json").document["ok"]
    assert "warning" not in shell.succeed("run", "1").err


def test_beats_that_cannot_work_fail_the_health_check(application: Application, shell: Shell) -> None:
    database = Database(application.url, SCHEMA)
    nodes = NodeLedger(database)
    nodes.heartbeat(Node("beat@one", "beat"), "1.2.3", health=Health("there is no table crawl_tasks"))
    sick = shell("doctor", "--beat", "--json")
    assert sick.code == 1
    assert "beat@one: there is no table crawl_tasks" in sick.document["findings"][0]["detail"]
    assert "there is no table crawl_tasks" in shell.succeed("workers").out

    nodes.heartbeat(Node("beat@two", "beat"), "1.2.3")
    assert shell("doctor", "--beat").code == 0
    application.execute("UPDATE orchestrator.nodes SET seen_at = now() - interval '16 seconds'")
    stalled = shell("doctor", "--beat")
    assert stalled.code == 1
    assert "no beat ticked within 15 s" in stalled.out
    database.close()


@dataclass
class Nodes:
    """Nodes of this host, and whether they are ready."""

    shell: Shell
    application: Application
    ledger: NodeLedger

    def beat(self, name: str, kind: Literal["worker", "beat"], health: Health = _WELL, silent_for: int = 0) -> None:
        self.ledger.heartbeat(Node(name, kind, host=socket.gethostname()), "1.2.3", health=health)
        self.application.execute(
            "UPDATE orchestrator.nodes SET seen_at = now() - make_interval(secs => %s) WHERE name = %s",
            silent_for,
            name,
        )

    def ready(self, *arguments: str) -> tuple[int, str]:
        result = self.shell("ready", *arguments)
        return result.code, result.out + result.err


@pytest.fixture
def nodes(application: Application, shell: Shell) -> Iterator[Nodes]:
    """No nodes at first."""
    database = Database(application.url, SCHEMA)
    yield Nodes(shell, application, NodeLedger(database))
    database.close()


def test_a_host_is_ready_if_each_kind_of_node_on_it_is(nodes: Nodes) -> None:
    code, said = nodes.ready()
    assert (code, "no worker or beat of this host has shown life" in said) == (1, True)

    nodes.beat("w1@here:1", "worker")
    nodes.beat("beat@here:2", "beat")
    assert nodes.ready()[0] == 0

    nodes.beat("w1@here:1", "worker", silent_for=60)
    code, said = nodes.ready()
    assert (code, "w1@here:1: silent" in said) == (1, True), "a beat that lives does not speak for a worker"
    assert nodes.ready("beat")[0] == 0

    nodes.beat("w1@here:3", "worker")
    assert nodes.ready()[0] == 0, "it has a successor"
    assert nodes.ready("--node", "w1@here:1")[0] == 1

    nodes.beat("beat@here:2", "beat", silent_for=3_600)
    assert nodes.ready()[0] == 0, "the host has had no beat for an hour"


def test_readiness_says_why(nodes: Nodes) -> None:
    nodes.beat("w1@here:1", "worker", Health(degraded="low on memory"))
    assert nodes.ready() == (0, "w1@here:1: degraded: low on memory\n")

    nodes.beat("w1@here:1", "worker", Health("it cannot\x00connect" + "!" * 1_000))
    code, said = nodes.ready()
    assert code == 1
    assert "w1@here:1: not ready: it cannotconnect!" in said
    assert len(said) < 600


# --- Waiting, and processes ----------------------------------------------------------------------------------------


def test_waiting_ends_with_the_run(shell: Shell) -> None:
    with shell.start("run", "1", "--wait", "--json") as waiting:
        waiting.await_line("queued", within=_LIMIT)
        [run] = shell.succeed("runs", "--json").document["runs"]
        shell.succeed("cancel", run["id"])
        assert waiting.wait(within=10) == 1
        assert "canceled" in waiting.text()


def test_interrupting_the_wait_leaves_the_run(shell: Shell) -> None:
    with shell.start("run", "1", "--wait") as waiting:
        waiting.await_line("\nqueued\n", within=_LIMIT)
        waiting.send(signal.SIGINT)
        assert waiting.wait(within=10) == 130
        assert "left running; see how it goes: `orchestrator show" in waiting.text()
    [run] = shell.succeed("runs", "--json").document["runs"]
    assert run["state"] == "queued"


@contextmanager
def _up(shell: Shell) -> Iterator[Process]:
    with shell.start("up") as process:
        process.await_ready(lambda: len(_alive(shell)) == 2, within=_LIMIT, what="a worker and a beat are alive")
        yield process


def _alive(shell: Shell) -> list[str]:
    return [node["name"] for node in shell.succeed("workers", "--json").document["nodes"] if node["alive"]]


def test_up_works_heals_and_stops_in_good_order(application: Application, shell: Shell) -> None:
    with _up(shell) as process:
        done = shell.succeed("run", "1", "--wait", "--json").document["run"]
        assert (done["state"], done["published"], done["skipped"]) == ("succeeded", 2, 1)
        [beat] = [pid for pid in children_of(process.pid) if b"\0beat\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(beat, signal.SIGKILL)
        process.await_line("the beat ended with -9; it starts again in 1 s", within=10)
        eventually(lambda: len(children_of(process.pid)) == 2, within=10, what="the beat runs again")
        family = children_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert process.wait(within=30) == 0, process.text()
        assert "Warm shutdown" in process.text()
        assert "Cold shutdown" not in process.text()
        assert not any(map(process_exists, family))
    assert application.url


def test_the_second_interrupt_kills(application: Application, shell: Shell) -> None:
    with _up(shell) as process:
        family = [pid for child in children_of(process.pid) for pid in (child, *children_of(child))]
        for pid in family:
            os.kill(pid, signal.SIGSTOP)  # a child that does not listen
        process.send(signal.SIGINT)
        process.send(signal.SIGTERM)
        assert process.wait(within=10) == 1
        eventually(lambda: not any(map(process_exists, family)), within=10, what="all are dead")
    assert application.url


def test_worker_passes_its_arguments_to_celery(shell: Shell) -> None:
    with shell.start("worker", "-Q", "orchestrator.crawl", "-c", "1", "-n", "named@here") as process:
        name = f"named@here:{process.pid}"
        eventually(lambda: name in _alive(shell), within=_LIMIT, what="the worker shows signs of life")
        [node] = shell.succeed("workers", "--json").document["nodes"]
        assert (node["queues"], node["concurrency"]) == (["orchestrator.crawl"], 1)
        assert process.terminate(within=30) == 0
