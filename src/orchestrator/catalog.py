"""The main application's ``crawl_tasks`` and ``crawl_configs``: SELECT only, names as the settings map them.

Gives statements, not rows: the ledger inserts a plan straight from :meth:`Catalog.plan`, so a run costs the
same number of queries for one data source as for a million, and compares schedules where they stand. Knows nothing
of runs, nor of what a schedule's text means.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    Numeric,
    ScalarSelect,
    Select,
    Subquery,
    TableClause,
    Text,
    case,
    cast,
    column,
    exists,
    func,
    literal,
    literal_column,
    select,
    table,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP, aggregate_order_by, distinct_on
from sqlalchemy.exc import DBAPIError

from orchestrator.domain import MAX_BIGINT
from orchestrator.errors import CatalogMismatchError, CrawlTaskNotFoundError, InvalidDataSourceIdsError
from orchestrator.schedule import MAX_LENGTH
from orchestrator.settings import CatalogSettings

_EXAMPLES: Final = 3
# Classes of SQLSTATE: 42 no such table, column or operator, or no right to read; 22 a value of another type;
# P0, 2F, 38, 39 their views' functions raise.
_THEIR_FAULT: Final = frozenset({"42", "22", "P0", "2F", "38", "39"})
_SHOWN: Final = 50  # characters of an example
_LONGEST_NAME: Final = 100  # characters of a time zone or policy
_MOMENTS: Final = frozenset({1114, 1184, 1082})  # of pg_type: timestamp without and with time zone, date
_LONG: Final = 10_000  # elements
_BYTES: Final = 4  # of an element of a list as PostgreSQL keeps it, compressed: 3 to 12
_PROBES: Final = 10  # rows of a table that are read in the time in which one is looked up
_attributes: Final = table("pg_attribute", *map(column, ("attrelid", "attname", "atttypid", "attnum", "attisdropped")))
_classes: Final = table("pg_class", *map(column, ("oid", "reltuples", "relkind")), schema="pg_catalog")


@dataclass(frozen=True, slots=True)
class Plan:
    """The statement parts of one crawl task's plan.

    Attributes:
        rows: select of ``data_source_id`` and ``crawl_config_id`` (null without an active config), one row a
            distinct data source in ascending order; no row at all when any element is bad.
        found: whether the crawl task exists.
        bad: how many elements are no positive integers.
        examples: the first few of them as JSON text, shortened.
        advice: may be executed before, in the same transaction: speeds a long list up, and may fail.
    """

    rows: Select[tuple[int, int | None]]
    found: ScalarSelect[bool]
    bad: ScalarSelect[int]
    examples: ScalarSelect[list[str] | None]
    advice: Select[str, str]


@dataclass(frozen=True, slots=True)
class ScheduleSource:
    """The crawl tasks' schedules as one select, for a ledger to compare with its own.

    Attributes:
        rows: columns as the fields of ``domain.ScheduleRow``, and ``updated_at``, null where there is no such column.
        has_updated_at: whether edits can be told by it.
    """

    rows: Subquery
    has_updated_at: bool


@dataclass(frozen=True, slots=True)
class PlanSample:
    """What a run of a crawl task would do, in numbers and by example.

    Attributes:
        total: distinct data sources.
        dispatched: of these, how many have an active config.
        dispatches: the first ones, with their configs.
        skips: the first ones that have none.
    """

    total: int
    dispatched: int
    dispatches: Sequence[tuple[int, int]]
    skips: Sequence[int]


class Catalog:
    """Reads the application's tables by the names that the settings give them.

    Args:
        settings: the names.
        zone: the time zone of schedules that name none.
    """

    def __init__(self, settings: CatalogSettings, zone: str = "UTC") -> None:
        self._tasks = settings.crawl_tasks
        self._configs = settings.crawl_configs
        self._zone = zone

    def schedules(self, connection: Connection) -> ScheduleSource:
        """Look which optional columns there are today, and build the select of every crawl task's schedule.

        Raises:
            CatalogMismatchError: there is no such table.
        """
        names = self._tasks
        present: dict[str, int] = dict(
            connection.execute(
                select(_attributes.c.attname, _attributes.c.atttypid).where(
                    _attributes.c.attrelid == func.to_regclass(_named(names.schema_name, names.table)),
                    _attributes.c.attnum > 0,
                    ~_attributes.c.attisdropped,
                )
            ).all()
        )
        if not present:
            missing = names.table if names.schema_name is None else f"{names.schema_name}.{names.table}"
            raise CatalogMismatchError(f"there is no table {missing}; `orchestrator doctor` says how to map")
        optional = [names.timezone, names.misfire_policy, names.overlap_policy, names.updated_at]
        if present.get(names.updated_at) not in _MOMENTS:
            present.pop(names.updated_at, None)  # seconds since whenever, for instance
        found = [each for each in optional if each in present]
        tasks = _table(names.schema_name, names.table, names.id, names.schedule, names.is_active, *found)

        def text(name: str, limit: int) -> ColumnElement[str | None]:
            # Bounded, for anything may stand in a text column; one more than is accepted, to tell a cut from a fit.
            if name not in tasks.c:
                return cast(None, Text)
            return func.nullif(func.left(func.btrim(cast(tasks.c[name], Text)), limit + 1), "")

        updated_at = tasks.c[names.updated_at] if names.updated_at in found else cast(None, TIMESTAMP(timezone=True))
        number = tasks.c[names.id]
        rows = (
            select(
                type_coerce(number, BigInteger).label("task_id"),
                text(names.schedule, MAX_LENGTH).label("text"),
                func.coalesce(text(names.timezone, _LONGEST_NAME), self._zone).label("zone"),
                func.coalesce(cast(tasks.c[names.is_active], Boolean), False).label("active"),
                text(names.misfire_policy, _LONGEST_NAME).label("misfire_policy"),
                text(names.overlap_policy, _LONGEST_NAME).label("overlap_policy"),
                updated_at.label("updated_at"),
            )
            .where(number > 0)
            .subquery(_part("schedules"))
        )
        return ScheduleSource(rows, names.updated_at in found)

    def plan(self, task_id: int) -> Plan:
        """Build the plan of a crawl task: each of its data sources with its latest active config, if any."""
        task = self._task(task_id)
        elements = self._elements(task)
        is_bad = ~elements.c.good
        bad = select(func.count()).select_from(elements).where(is_bad).scalar_subquery()
        sources = (
            select(cast(cast(elements.c.value, Numeric), BigInteger).label("id"))
            .distinct()
            .where(elements.c.good, bad == 0)
            .cte(_part("sources"))
            .prefix_with("MATERIALIZED")
        )
        latest = self._latest(sources)
        rows = (
            select(sources.c.id.label("data_source_id"), latest.c.crawl_config_id)
            .select_from(sources.outerjoin(latest, latest.c.data_source_id == sources.c.id))
            .order_by(sources.c.id)
        )
        examples = (
            select(func.array_agg(aggregate_order_by(column("value"), column("position")), type_=ARRAY(Text)))
            .select_from(
                # As text, and cut here: a number of JSON may have more digits than Python agrees to read.
                select(func.left(cast(elements.c.value, Text), _SHOWN).label("value"), elements.c.position)
                .where(is_bad)
                .order_by(elements.c.position)
                .limit(_EXAMPLES)
                .subquery()
            )
            .scalar_subquery()
        )
        found = select(func.count() > 0).select_from(task).scalar_subquery()
        return Plan(rows, found, bad, examples, self._advice(task_id))

    def require(self, connection: Connection, task_id: int) -> None:
        """Make sure that there is a crawl task.

        Raises:
            CrawlTaskNotFoundError: there is none.
            CatalogMismatchError: the table does not fit the mapping.
        """
        names = self._tasks
        tasks = _table(names.schema_name, names.table, names.id)
        with mismatch_explained():
            found = connection.scalar(select(exists().where(tasks.c[names.id] == task_id)))
        if not found:
            raise CrawlTaskNotFoundError(f"there is no crawl task {task_id}")

    def sample_plan(self, connection: Connection, task_id: int, limit: int) -> PlanSample:
        """Return how many data sources a run would dispatch and skip, as it would plan it now, and the first ones.

        Raises:
            CrawlTaskNotFoundError: there is no such crawl task.
            InvalidDataSourceIdsError: an element of its list is no positive integer.
            CatalogMismatchError: the tables do not fit the mapping.
        """
        plan = self.plan(task_id)
        rows = plan.rows.cte(_part("planned")).prefix_with("MATERIALIZED")
        source, config = rows.c.data_source_id, rows.c.crawl_config_id
        sent = select(source, config).where(config.is_not(None)).order_by(source).limit(limit).subquery()
        skipped = select(source).where(config.is_(None)).order_by(source).limit(limit).subquery()

        def listed(value: ColumnElement[Any]) -> ScalarSelect[Any]:
            return select(func.array_agg(value, type_=ARRAY(BigInteger))).scalar_subquery()

        counted = select(func.count(), func.count(config)).select_from(rows).subquery()
        statement = select(
            plan.found,
            plan.bad,
            plan.examples,
            *counted.c,
            listed(sent.c.data_source_id),
            listed(sent.c.crawl_config_id),
            listed(skipped.c.data_source_id),
        ).select_from(counted)
        with mismatch_explained():
            *verdict, total, dispatched, sources, configs, skips = connection.execute(statement).one()
        refuse_unplannable(task_id, *verdict)
        return PlanSample(total, dispatched, list(zip(sources or (), configs or (), strict=True)), skips or [])

    def read_plan(self, connection: Connection, task_id: int) -> list[tuple[int, int | None]]:
        """Return (data source id, crawl config id or none) of each data source, as a run would plan it now.

        Raises:
            CrawlTaskNotFoundError: there is no such crawl task.
            InvalidDataSourceIdsError: an element of its list is no positive integer.
            CatalogMismatchError: the tables do not fit the mapping.
        """
        plan = self.plan(task_id)
        with mismatch_explained():
            verdict = connection.execute(select(plan.found, plan.bad, plan.examples)).one()
            refuse_unplannable(task_id, *verdict)
            return [(row.data_source_id, row.crawl_config_id) for row in connection.execute(plan.rows)]

    def _task(self, task_id: int) -> CTE:
        names = self._tasks
        tasks = _table(names.schema_name, names.table, names.id, names.data_source_ids)
        # jsonb for both forms: an integer array and a JSON array become the same thing here.
        ids = func.to_jsonb(tasks.c[names.data_source_ids], type_=JSONB)
        return (
            select(ids.label("ids"), func.jsonb_typeof(ids).label("kind"))
            .where(tasks.c[names.id] == task_id)
            .cte(_part("task"))
            .prefix_with("MATERIALIZED")
        )

    def _advice(self, task_id: int) -> Select[str, str]:
        """Return the statement that keeps PostgreSQL from looking up the configs of a long list one by one.

        It takes each list for 100 elements. For 100,000, with as many configs, looking up took a third of the time
        of a plan. Where configs are much more than that, or where nobody knows how many they are (of views and
        partitioned tables), it is left alone.
        """
        names = self._tasks
        tasks = _table(names.schema_name, names.table, names.id, names.data_source_ids)
        configs = func.pg_catalog.to_regclass(_named(self._configs.schema_name, self._configs.table))
        rows = (
            select(_classes.c.reltuples)
            .where(_classes.c.oid == configs, _classes.c.relkind.in_(["r", "m"]))
            .scalar_subquery()
        )
        elements = func.pg_catalog.pg_column_size(tasks.c[names.data_source_ids]) / _BYTES
        is_long = (elements > _LONG) & (rows >= 0) & (elements * _PROBES > rows)
        # Up to PostgreSQL 17, what cannot do without a nested loop (a list's elements) then seems to cost so much that
        # the statement would be compiled.
        off = [func.set_config(name, "off", literal(value=True)) for name in ("enable_nestloop", "jit")]
        return select(*off).where(tasks.c[names.id] == task_id, is_long)

    @staticmethod
    def _elements(task: CTE) -> CTE:
        kind = task.c.kind
        # Anything but an array (an object, a number, a text) is one bad element; JSON null is an empty list.
        array = case(
            (kind == "array", task.c.ids),
            (func.coalesce(kind, "null") == "null", literal([], JSONB)),
            else_=func.jsonb_build_array(task.c.ids),
        )
        element = (
            func.jsonb_array_elements(array, type_=JSONB).table_valued(
                column("value", JSONB), with_ordinality="position", name="element"
            )
        ).render_derived()
        number = cast(element.c.value, Numeric)
        # CASE, not AND: only its order of evaluation is guaranteed, and the cast fails on what is no number.
        good = case(
            (kind != "array", literal(value=False)),
            (func.jsonb_typeof(element.c.value) != "number", literal(value=False)),
            else_=(number == func.trunc(number)) & number.between(1, MAX_BIGINT),
        )
        return (
            select(element.c.value, element.c.position, good.label("good"))
            .select_from(task.join(element, true()))
            .where(func.jsonb_typeof(element.c.value) != "null")
            .cte(_part("elements"))
            .prefix_with("MATERIALIZED")
        )

    def _latest(self, sources: CTE) -> CTE:
        names = self._configs
        configs = _table(names.schema_name, names.table, names.id, names.data_source_id, names.status, names.created_at)
        source = configs.c[names.data_source_id]
        active: ColumnElement[bool] = (
            # A literal of no type yet, not a parameter: the column may be an enumeration as well as text.
            literal_column(f"({names.active})")
            if names.active
            else configs.c[names.status] == literal_column("'active'")
        )
        order: list[ColumnElement[object]] = (
            [literal_column(names.latest)]
            if names.latest
            else [configs.c[names.created_at].desc().nulls_last(), configs.c[names.id].desc()]
        )
        # Semi-join: crawl_configs stays the only table whose columns the settings' SQL can mean.
        return (
            select(source.label("data_source_id"), configs.c[names.id].label("crawl_config_id"))
            .ext(distinct_on(source))
            .where(source.in_(select(sources.c.id)), active)
            .order_by(source, *order)
            .cte(_part("latest"))
        )


def refuse_unplannable(task_id: int, found: bool, bad: int, examples: list[str] | None) -> None:  # noqa: FBT001 -- a row of the verdict, as PostgreSQL gives it
    """Raise what a plan's verdict calls for, if anything.

    Raises:
        CrawlTaskNotFoundError: there is no such crawl task.
        InvalidDataSourceIdsError: an element of its list is no positive integer.
    """
    if not found:
        raise CrawlTaskNotFoundError(f"there is no crawl task {task_id}")
    if bad:
        shown = ", ".join(examples or [])
        raise InvalidDataSourceIdsError(
            f"crawl task {task_id}: data_source_ids must hold positive integers only;"
            f" {bad} element{'s are' if bad > 1 else ' is'} not, for instance {shown}"
        )


@contextmanager
def mismatch_explained() -> Iterator[None]:
    """Turn PostgreSQL's complaint about a mapped table into a sentence that says what to do.

    Raises:
        CatalogMismatchError: a mapped table or column is missing, of another type, or may not be read.
    """
    try:
        yield
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error) and (error.orig.sqlstate or "")[:2] in _THEIR_FAULT:
            complaint = error.orig.diag.message_primary
            raise CatalogMismatchError(
                f"the application's tables do not fit the settings: {complaint}; `orchestrator doctor` says how to map"
            ) from error
        raise


def _named(schema: str | None, name: str) -> str:
    """Return a table's name as ``to_regclass`` reads it."""
    return ".".join(_quoted(part) for part in (schema, name) if part is not None)


def _quoted(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


def _part(name: str) -> str:
    """Name a part of a statement as no table of an application is called, for the part would hide it."""
    return f"orchestrator_{name}"


def _table(schema: str | None, name: str, *columns: str) -> TableClause:
    return table(name, *(column(each) for each in dict.fromkeys(columns)), schema=schema)
