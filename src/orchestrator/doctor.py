"""What does not fit, and how to put it right: settings, database, the application's tables, broker, peers.

Every check runs, whatever the others find, within a bounded time: those of the database one after the other,
the rest beside them. A finding never quotes a driver's own words about an address, which may hold a password.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
from amqp.exceptions import PreconditionFailed
from kombu import Queue
from kombu.utils.url import url_to_parts
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError

from orchestrator import bootstrap, migrations
from orchestrator.bootstrap import Services
from orchestrator.catalog import mismatch_explained
from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE, DEAD_QUEUE, app, exists_otherwise
from orchestrator.domain import ScheduleState
from orchestrator.errors import OrchestratorError
from orchestrator.insights import ALIVE_WITHIN, NodeStatus, NodeView
from orchestrator.schema import metadata
from orchestrator.settings import PREFIX, CrawlConfigsMapping, CrawlTasksMapping, Settings

PATIENCE: Final = 20.0
"""Seconds that all checks together may take."""

_CONNECT_TIMEOUT: Final = 3.0  # seconds
_LARGEST_SKEW: Final = 2.0  # seconds
_OLDEST, _NEWEST = 14, 18  # PostgreSQL's major versions that are supported
_SUGGESTIONS: Final = 3


class Status(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``remedy`` says what to do unless all is well."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def diagnose(services: Services) -> list[Finding]:
    """Run every check; join the embedded server first, where that is the database."""
    try:
        bootstrap.home.open()
    except OrchestratorError as error:
        return [*_settings(services), _failure("database", error)]
    checks = {
        "settings": _settings,
        "database": _database,
        "broker": _broker,
        "extraction": _extraction,
        "discovery": _discovery,
    }
    # Before the threads: half imported by one of them, it fails SQLAlchemy in another.
    import_module("sqlalchemy.orm")
    deadline = time.monotonic() + PATIENCE
    examinations = [_Examination(name, check, services) for name, check in checks.items()]
    return [finding for examination in examinations for finding in examination.findings(deadline)]


def beats(services: Services) -> Finding:
    """Tell whether a beat ticked lately, and could do its work, for health checks.

    Raises:
        DatabaseUnavailableError: nobody can know.
    """
    bootstrap.home.open()
    alive = [node for node in services.insights.nodes() if node.kind == "beat" and node.alive]
    if not alive:
        detail = f"no beat ticked within {ALIVE_WITHIN:.0f} s"
        return Finding("beat", Status.FAIL, detail, "start one: `orchestrator beat`")
    if all(node.problem for node in alive):
        return Finding("beat", Status.FAIL, f"no slot is claimed: {_problems(alive)}", _NODES_REMEDY)
    return Finding("beat", Status.OK, f"alive: {_some([node.name for node in alive])}")


_NODES_REMEDY: Final = "correct what it says; `orchestrator doctor` checks the rest"


def _problems(nodes: Sequence[NodeView]) -> str:
    return _some([f"{node.name}: {node.problem}" for node in nodes if node.problem], "; ")


class _Examination:
    """One line of checks in a thread of its own, for a peer that does not answer must not hold up the others."""

    def __init__(self, name: str, check: Callable[[Services], Iterator[Finding]], services: Services) -> None:
        self._name = name
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, args=(check, services), daemon=True, name=f"doctor-{name}")
        self._thread.start()

    def findings(self, deadline: float) -> list[Finding]:
        """Return what was found until the deadline."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        found = list(self._found)
        if self._thread.is_alive():
            remedy = "whoever is asked accepts connections and does not answer: see its own log"
            found.append(Finding(self._name, Status.FAIL, f"no answer within {PATIENCE:.0f} s", remedy))
        return found

    def _run(self, check: Callable[[Services], Iterator[Finding]], services: Services) -> None:
        try:
            for finding in check(services):
                self._found.append(finding)
        except Exception as error:  # noqa: BLE001 -- a check that fails is a finding, and the others go on
            self._found.append(_failure(self._name, error))


def _failure(name: str, error: Exception) -> Finding:
    if isinstance(error, OrchestratorError):
        return Finding(name, Status.FAIL, str(error), _REMEDIES.get(error.code, f"check {PREFIX}{name.upper()}_URL"))
    if isinstance(error, DBAPIError):
        # The server's words; the driver's own may quote the address.
        complaint = error.orig.diag.message_primary if isinstance(error.orig, psycopg.Error) else None
        detail = f"PostgreSQL: {complaint or type(error.orig).__name__}"
        return Finding(name, Status.FAIL, detail, f"check {PREFIX}DATABASE_URL and the rights of its role")
    return Finding(name, Status.FAIL, f"{type(error).__name__} while checking", f"check {PREFIX}{name.upper()}_URL")


_REMEDIES: Final = {
    "configuration": "correct the setting",
    "database_unavailable": f"start PostgreSQL, or correct {PREFIX}DATABASE_URL",
    "not_migrated": "run `orchestrator migrate`",
    "broker_unreachable": f"start the broker, or correct {PREFIX}BROKER_URL / {PREFIX}EXTRACTION_URL",
    "broker_blocked": "free memory or disk on the broker",
    "confirm_timeout": "see the broker's log: it accepts connections and does not answer",
    "queue_missing": "give the role or account the right to declare and write the queue or topic, or create it",
}


# --- Settings ------------------------------------------------------------------------------------------------


def _settings(services: Services) -> Iterator[Finding]:
    settings = services.settings
    extraction = _broker_address(settings.extraction_url or settings.broker_url)
    discovery = urlsplit(settings.discovery_url)
    facts = {
        "database": _database_address(settings),
        "broker": _broker_address(settings.broker_url),
        "extraction": f"{settings.extraction_queue} on {extraction}",
        "discovery": f"{discovery.scheme}://{discovery.netloc.rpartition('@')[2]}{discovery.path}",
        "time zone": settings.timezone,
    }
    yield Finding("settings", Status.OK, "; ".join(f"{name}: {fact}" for name, fact in facts.items()))


def _database_address(settings: Settings) -> str:
    if settings.database_url is None:
        return "embedded PostgreSQL"
    try:
        words = conninfo_to_dict(settings.database_url.get_secret_value())
    except psycopg.Error:
        return "malformed (percent-encode special characters)"
    return f"{words.get('user', '')}@{words.get('host', '')}:{words.get('port', 5432)}/{words.get('dbname', '')}"


def _broker_address(url: SecretStr) -> str:
    address = url.get_secret_value()
    if address.startswith("kafka"):
        scheme, _, rest = address.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"
    try:
        parts = url_to_parts(address)
    except ValueError:
        return "malformed (percent-encode special characters)"
    if parts.scheme == "pgmq":
        return "PostgreSQL (PGMQ)"
    return f"{parts.scheme}://{parts.username or 'guest'}@{parts.hostname}:{parts.port or 'default'}/{parts.path or ''}"


# --- Database, ledger and peers --------------------------------------------------------------------------------


def _database(services: Services) -> Iterator[Finding]:
    yield _server(services)
    for name, check in _DATABASE_CHECKS.items():
        try:
            yield from check(services)
        except (OrchestratorError, DBAPIError) as error:
            yield _failure(name, error)


def _server(services: Services) -> Finding:
    with services.database.transaction() as connection:
        version, user, name = connection.exec_driver_sql(
            "SELECT current_setting('server_version_num')::int / 10000, current_user, current_database()"
        ).one()
    detail = f"PostgreSQL {version}, database {name}, role {user}"
    if version < _OLDEST:
        return Finding("database", Status.FAIL, detail, f"upgrade: PostgreSQL {_OLDEST} to {_NEWEST} is supported")
    if version > _NEWEST:
        return Finding("database", Status.WARN, detail, f"PostgreSQL {_OLDEST} to {_NEWEST} is what was tested")
    return Finding("database", Status.OK, detail)


def _clock(services: Services) -> Iterator[Finding]:
    with services.database.transaction() as connection:
        before = datetime.now(UTC)
        there = connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
        here = before + (datetime.now(UTC) - before) / 2
    skew = abs((there - here).total_seconds())
    if skew > _LARGEST_SKEW:
        detail = f"this host and the database differ by {skew:.1f} s"
        yield Finding("clock", Status.WARN, detail, "synchronise both by NTP; times in logs and ledger differ")
    else:
        yield Finding("clock", Status.OK, "this host and the database agree")


def _ledger(services: Services) -> Iterator[Finding]:
    migrations.verify(services.database)
    yield Finding("ledger", Status.OK, f"schema {services.database.schema} is migrated")


_PGMQ: Final = """
SELECT count(*) > 0, coalesce(bool_and(has_schema_privilege(relnamespace, 'USAGE')), false)
FROM pg_class WHERE relname = 'meta' AND relnamespace = to_regnamespace('pgmq')
"""


def _queues(services: Services) -> Iterator[Finding]:
    settings = services.settings
    if "pgmq" not in {settings.broker_transport, settings.extraction_transport}:
        return
    with services.database.transaction() as connection:
        installed, usable = connection.exec_driver_sql(_PGMQ).one()
    if not installed:
        yield Finding("pgmq", Status.FAIL, "PGMQ is not installed in the database", "run `orchestrator migrate`")
    elif not usable:
        remedy = "GRANT ALL ON SCHEMA pgmq, and on all tables and sequences in it, to the role"
        yield Finding("pgmq", Status.FAIL, "the role may not use the schema pgmq", remedy)
    elif find_spec("pgmq") is None:
        remedy = "pip install 'task-orchestrator[embedded]'"
        yield Finding("pgmq", Status.FAIL, "the Python package pgmq is missing", remedy)
    else:
        yield Finding("pgmq", Status.OK, "PGMQ is installed")


_NEEDED: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")
_ROLE: Final = """
SELECT rolname, rolsuper, coalesce(has_schema_privilege(to_regnamespace(quote_ident(%(schema)s)), 'USAGE'), true)
FROM pg_roles WHERE rolname = current_user
"""
_LEDGER_RIGHTS: Final = """
SELECT wanted.name, needed.privilege
FROM unnest(%(tables)s::text[]) AS wanted (name), unnest(%(needed)s::text[]) AS needed (privilege),
     to_regclass(format('%%I.%%I', %(schema)s::text, wanted.name)) AS relation
WHERE relation IS NOT NULL AND NOT has_table_privilege(relation, needed.privilege)
"""


def _rights(services: Services) -> Iterator[Finding]:
    schema = services.database.schema
    with services.database.transaction() as connection:
        role, superuser, usage = connection.exec_driver_sql(_ROLE, {"schema": schema}).one()
        missing = (
            connection.exec_driver_sql(
                _LEDGER_RIGHTS,
                {"tables": [each.name for each in metadata.sorted_tables], "needed": list(_NEEDED), "schema": schema},
            ).all()
            if usage
            else [(f"schema {schema}", "USAGE")]
        )
    if missing:
        lacking = ", ".join(f"{privilege} on {name}" for name, privilege in missing[:_SUGGESTIONS])
        grants = f"GRANT USAGE ON SCHEMA {schema} TO {role}; "
        grants += f"GRANT {', '.join(_NEEDED)} ON ALL TABLES IN SCHEMA {schema} TO {role}"
        yield Finding("rights", Status.FAIL, f"role {role} lacks {lacking}", grants)
    elif superuser and services.settings.database_url is not None:
        remedy = "use a role that owns the ledger's schema and may only SELECT from the application's tables"
        yield Finding("rights", Status.WARN, f"role {role} is superuser", remedy)
    else:
        yield Finding("rights", Status.OK, f"role {role} may use the ledger")


def _nodes(services: Services) -> Iterator[Finding]:
    alive = [node for node in services.insights.nodes() if node.alive]
    for kind, consequence in (("worker", "runs wait until one comes"), ("beat", "schedules do not fire")):
        names = [node.name for node in alive if node.kind == kind]
        if names:
            yield Finding(f"{kind}s", Status.OK, f"alive: {_some(names)}")
        else:
            remedy = f"start one: `orchestrator {kind}`, or both: `orchestrator up`"
            yield Finding(f"{kind}s", Status.WARN, f"no {kind} is alive: {consequence}", remedy)
    for node in alive:
        if node.status is not NodeStatus.READY:
            detail = f"{node.name} is {node.status}: {node.because}"
            yield Finding(f"{node.kind}s", Status.WARN, detail, _NODES_REMEDY)
    consumed = {queue for node in alive for queue in node.queues}
    for queue in (ANALYSIS_QUEUE, CRAWL_QUEUE):
        if consumed and queue not in consumed:
            remedy = f"start one: `orchestrator worker -Q {queue}`"
            yield Finding("workers", Status.WARN, f"no living worker consumes {queue}", remedy)


def _schedules(services: Services) -> Iterator[Finding]:
    count = services.insights.invalid()
    if not count:
        yield Finding("schedules", Status.OK, "every schedule that was noticed can be read")
        return
    first = services.insights.page_schedules(limit=_SUGGESTIONS, state=ScheduleState.INVALID)
    sentences = "; ".join(f"crawl task {each.task_id}: {each.problem}" for each in first)
    which = f", the first {len(first)} of them" if count > len(first) else ""
    detail = f"{count} schedule{'' if count == 1 else 's'} cannot be read and will not fire{which}: {sentences}"
    remedy = "correct them; `orchestrator schedules --state invalid` lists all, `orchestrator schedule preview` tries"
    yield Finding("schedules", Status.WARN, detail, remedy)


def _some(words: Sequence[str], separator: str = ", ") -> str:
    rest = len(words) - _SUGGESTIONS
    return separator.join(words[:_SUGGESTIONS]) + (f" and {rest} more" if rest > 0 else "")


# --- The application's tables ------------------------------------------------------------------------------------

_INTEGERS: Final = frozenset({"smallint", "integer", "bigint"})
_LISTS: Final = frozenset({"smallint[]", "integer[]", "bigint[]", "json", "jsonb"})
_TEXTS: Final = frozenset({"text", "character varying", "character"})
_MOMENTS: Final = frozenset({"timestamp without time zone", "timestamp with time zone"})
_BOOLEANS: Final = frozenset({"boolean"})
_INDEXABLE: Final = frozenset({"r", "p", "m"})  # tables, partitioned ones, materialised views
_LARGE: Final = 100_000  # rows, above which a look for edits takes long without an index


@dataclass(frozen=True, slots=True)
class _Contract:
    """What a mapped table must have: the setting of each column, the types that fit, and which may be absent."""

    section: str
    types: dict[str, frozenset[str]]
    optional: frozenset[str] = frozenset()

    def variable(self, setting: str) -> str:
        return f"{PREFIX}CATALOG__{self.section.upper()}__{setting.upper()}"


_TASKS: Final = _Contract(
    "crawl_tasks",
    {
        "id": _INTEGERS,
        "data_source_ids": _LISTS,
        "schedule": _TEXTS,
        "is_active": _BOOLEANS,
        "updated_at": _MOMENTS,
        "name": _TEXTS,
        "timezone": _TEXTS,
        "misfire_policy": _TEXTS,
        "overlap_policy": _TEXTS,
    },
    frozenset({"updated_at", "name", "timezone", "misfire_policy", "overlap_policy"}),
)


def _configs_contract(mapping: CrawlConfigsMapping) -> _Contract:
    types = {"id": _INTEGERS, "data_source_id": _INTEGERS}
    # A condition or an order of one's own replaces the column.
    if mapping.active is None:
        types["status"] = _TEXTS
    if mapping.latest is None:
        types["created_at"] = _MOMENTS
    return _Contract("crawl_configs", types)


@dataclass(frozen=True, slots=True)
class _MappedTable:
    """A table of the application as it is; how many rows it has is PostgreSQL's guess."""

    oid: int
    relkind: str
    rows: float
    writable: bool
    columns: dict[str, tuple[str, bool]] = field(default_factory=dict)
    """Type and right to read, by name."""


_TABLE: Final = """
SELECT oid, relkind, reltuples, has_table_privilege(oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
       AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS writable
FROM pg_class
WHERE oid = to_regclass(CASE WHEN %(schema)s::text IS NULL THEN '' ELSE quote_ident(%(schema)s) || '.' END
                        || quote_ident(%(table)s::text))
"""
_COLUMNS: Final = """
SELECT attname, format_type(coalesce(nullif(typbasetype, 0), pg_type.oid), NULL) AS kind,
       has_column_privilege(attrelid, attnum, 'SELECT') AS readable
FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
WHERE attrelid = %(oid)s AND attnum > 0 AND NOT attisdropped
ORDER BY attnum
"""
_TABLES: Final = """
SELECT nspname, relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'v', 'm', 'p', 'f') AND nspname NOT IN ('pg_catalog', 'information_schema', 'pgmq', %(ledger)s)
LIMIT 5000
"""
_INDEXED: Final = """
SELECT EXISTS (
    SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
    WHERE indrelid = %(oid)s AND indisvalid AND indpred IS NULL AND attname = %(column)s
)
"""


def _catalog(services: Services) -> Iterator[Finding]:
    mappings = services.settings.catalog
    contracts: list[tuple[_Contract, CrawlTasksMapping | CrawlConfigsMapping]] = [
        (_TASKS, mappings.crawl_tasks),
        (_configs_contract(mappings.crawl_configs), mappings.crawl_configs),
    ]
    fits = True
    with services.database.transaction() as connection:
        for contract, mapping in contracts:
            for finding in _mapped_table(connection, contract, mapping, services):
                fits = fits and finding.status is not Status.FAIL
                yield finding
    if fits:
        yield _plan(services)


def _mapped_table(
    connection: Connection,
    contract: _Contract,
    mapping: CrawlTasksMapping | CrawlConfigsMapping,
    services: Services,
) -> Iterator[Finding]:
    table = _read_table(connection, mapping.schema_name, mapping.table)
    if table is None:
        yield _no_such_table(connection, contract, mapping, services.database.schema)
        return
    problems = [
        problem
        for setting, fitting in contract.types.items()
        if (problem := _column(contract, setting, fitting, getattr(mapping, setting), table)) is not None
    ]
    yield from problems
    if all(problem.status is not Status.FAIL for problem in problems):
        absent = sorted(name for each in contract.optional if (name := getattr(mapping, each)) not in table.columns)
        note = f"; optional columns absent: {', '.join(absent)}" if absent else ""
        yield Finding(contract.section, Status.OK, f"table {mapping.table} fits{note}")
    if table.writable and services.settings.database_url is not None:
        detail = f"the role could write to {mapping.table}; SELECT is all that is needed"
        yield Finding(contract.section, Status.WARN, detail, "use a role that may only SELECT from it")
    if isinstance(mapping, CrawlConfigsMapping):
        yield from _index(connection, mapping, table)
    else:
        yield from _noticing(connection, contract, mapping, table)


def _read_table(connection: Connection, schema: str | None, name: str) -> _MappedTable | None:
    row = connection.exec_driver_sql(_TABLE, {"schema": schema, "table": name}).one_or_none()
    if row is None:
        return None
    columns = connection.exec_driver_sql(_COLUMNS, {"oid": row.oid})
    return _MappedTable(
        row.oid,
        row.relkind,
        row.reltuples,
        row.writable,
        {each.attname: (each.kind, each.readable) for each in columns},
    )


def _no_such_table(
    connection: Connection, contract: _Contract, mapping: CrawlTasksMapping | CrawlConfigsMapping, ledger: str
) -> Finding:
    tables = connection.exec_driver_sql(_TABLES, {"ledger": ledger}).all()
    close = get_close_matches(mapping.table, {row.relname for row in tables}, _SUGGESTIONS, cutoff=0.5)
    candidates = [row for name in close for row in tables if row.relname == name]
    settings = [
        f"{contract.variable('schema')}={row.nspname} {contract.variable('table')}={row.relname}"
        for row in candidates[:_SUGGESTIONS]
    ]
    where = f"{mapping.schema_name}." if mapping.schema_name else ""
    detail = f"there is no table {where}{mapping.table} that this role can see in this database"
    remedy = f"set {' or '.join(settings)}" if settings else f"set {contract.variable('table')} to the table's name"
    return Finding(contract.section, Status.FAIL, detail, remedy)


def _column(
    contract: _Contract, setting: str, fitting: frozenset[str], name: str, table: _MappedTable
) -> Finding | None:
    """Return what is wrong with one mapped column, if anything."""
    optional = setting in contract.optional
    if name not in table.columns:
        return None if optional else _no_such_column(contract, setting, fitting, name, table)
    kind, readable = table.columns[name]
    if not readable:
        detail = f"the role may not read column {name}"
        return Finding(contract.section, Status.FAIL, detail, "GRANT SELECT on the table to it")
    if kind in fitting:
        return None
    status = Status.WARN if optional else Status.FAIL
    detail = f"column {name} is of type {kind}; what fits: {', '.join(sorted(fitting))}"
    if setting == "status":
        remedy = f"set {contract.variable('active')} to a condition of your own, such as: {name}::text = 'active'"
    else:
        remedy = f"set {contract.variable(setting)} to a column that fits, or map a view"
    return Finding(contract.section, status, detail, remedy)


def _no_such_column(
    contract: _Contract, setting: str, fitting: frozenset[str], name: str, table: _MappedTable
) -> Finding:
    alike = [column for column, (kind, _) in table.columns.items() if kind in fitting]
    # Nothing else in the contract has these types, so that a lone column of one of them is a good guess.
    close = get_close_matches(name, alike, _SUGGESTIONS, cutoff=0.4) or (alike if len(alike) == 1 else [])
    remedy = " or ".join(f"{contract.variable(setting)}={column}" for column in close)
    remedy = f"set {remedy}" if remedy else f"set {contract.variable(setting)} to the column's name"
    if setting == "status":
        remedy += f", or {contract.variable('active')} to a condition such as: is_enabled"
    if setting == "created_at":
        remedy += f", or {contract.variable('latest')} to an order such as: id DESC"
    detail = f"there is no column {name}; there are {', '.join(list(table.columns)[:30])}"
    return Finding(contract.section, Status.FAIL, detail, remedy)


def _index(connection: Connection, mapping: CrawlConfigsMapping, table: _MappedTable) -> Iterator[Finding]:
    column = mapping.data_source_id
    if table.relkind not in _INDEXABLE or column not in table.columns:
        return
    if not connection.exec_driver_sql(_INDEXED, {"oid": table.oid, "column": column}).scalar_one():
        detail = f"{mapping.table} has no index that begins with {column}: every run reads the whole table"
        remedy = f"CREATE INDEX CONCURRENTLY ON {mapping.table} ({column})"
        yield Finding("crawl_configs", Status.WARN, detail, remedy)


def _noticing(
    connection: Connection, contract: _Contract, mapping: CrawlTasksMapping, table: _MappedTable
) -> Iterator[Finding]:
    """Say what makes edits of schedules be noticed late."""
    column = mapping.updated_at
    if column not in table.columns:
        detail = (
            f"{mapping.table} has no column {column}: an edit of a schedule is noticed within a minute, not at once"
        )
        remedy = (
            f"set {contract.variable('updated_at')} to the column that says when a row was changed last, or add one"
        )
        yield Finding(contract.section, Status.WARN, detail, remedy)
    elif (
        table.relkind in _INDEXABLE
        and table.rows > _LARGE
        and not connection.exec_driver_sql(_INDEXED, {"oid": table.oid, "column": column}).scalar_one()
    ):
        detail = (
            f"{mapping.table} has about {table.rows:.0f} rows and no index on {column}: edits are noticed less often"
        )
        remedy = f"CREATE INDEX CONCURRENTLY ON {mapping.table} ({column})"
        yield Finding(contract.section, Status.WARN, detail, remedy)


def _plan(services: Services) -> Finding:
    """Have PostgreSQL parse and plan the statement of a run, with the settings' own SQL in it."""
    try:
        with services.database.transaction() as connection, mismatch_explained():
            event.listen(connection, "before_cursor_execute", _explain, retval=True)
            connection.execute(services.catalog.plan(0).rows).close()
    except (OrchestratorError, DBAPIError) as error:
        remedy = f"correct {PREFIX}CATALOG__CRAWL_CONFIGS__ACTIVE and {PREFIX}CATALOG__CRAWL_CONFIGS__LATEST"
        return Finding("plan", Status.FAIL, _failure("plan", error).detail, remedy)
    return Finding("plan", Status.OK, "PostgreSQL accepts the statement that plans a run")


def _explain(
    connection: Connection,  # noqa: ARG001 -- the signature of SQLAlchemy's event
    cursor: Any,  # noqa: ANN401, ARG001 -- the same
    statement: str,
    parameters: Any,  # noqa: ANN401 -- the same
    context: Any,  # noqa: ANN401, ARG001 -- the same
    executemany: bool,  # noqa: ARG001, FBT001 -- the same
) -> tuple[str, Any]:
    return f"EXPLAIN {statement}", parameters


_DATABASE_CHECKS: Final[dict[str, Callable[[Services], Iterator[Finding]]]] = {
    "clock": _clock,
    "ledger": _ledger,
    "pgmq": _queues,
    "rights": _rights,
    "catalog": _catalog,
    "nodes": _nodes,
    "schedules": _schedules,
}


# --- Broker, extraction and Discovery --------------------------------------------------------------------------


def _broker(services: Services) -> Iterator[Finding]:
    services.sender.check()
    services.sender.close()
    yield Finding("broker", Status.OK, f"{_broker_address(services.settings.broker_url)}: reachable, queues declared")
    yield from _task_queues()


def _task_queues() -> Iterator[Finding]:
    """Declare each queue as a plain client would, which RabbitMQ refuses if it exists with other arguments."""
    with app.connection_for_write(heartbeat=0) as connection:
        for name in (ANALYSIS_QUEUE, CRAWL_QUEUE, DEAD_QUEUE):
            try:
                with connection.channel() as channel:
                    declared: Any = Queue(name, durable=True).bind(channel).queue_declare()
            except PreconditionFailed as error:
                if not exists_otherwise(error):
                    yield Finding("broker", Status.FAIL, f"{name} cannot be declared: {error.reply_text}")
                    continue
                detail = f"{name} exists with other arguments, so that plain clients get a 406: {error.reply_text}"
                remedy = "delete the queue while it is empty and let a worker declare it; put limits into a policy"
                yield Finding("broker", Status.WARN, detail, remedy)
            else:
                if name == DEAD_QUEUE and (waiting := declared.message_count):
                    detail = f"{name} holds {waiting} messages that no task could take"
                    remedy = "look at their x-orchestrator-reason header, correct the sender, then purge the queue"
                    yield Finding("broker", Status.WARN, detail, remedy)


def _extraction(services: Services) -> Iterator[Finding]:
    try:
        yield Finding("extraction", Status.OK, services.publisher.check())
    finally:
        services.publisher.close()


def _discovery(services: Services) -> Iterator[Finding]:
    parts = urlsplit(services.settings.discovery_url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT):
            pass
    except OSError as error:
        # A set-up that only crawls leaves the default as it is.
        chosen = "discovery_url" in services.settings.model_fields_set
        detail = f"{host}:{port} cannot be reached ({error.strerror or type(error).__name__}): site analyses will wait"
        remedy = f"start the Discovery Service, or correct {PREFIX}DISCOVERY_URL"
        yield Finding("discovery", Status.FAIL if chosen else Status.WARN, detail, remedy)
    else:
        yield Finding("discovery", Status.OK, f"{host}:{port} accepts connections")
