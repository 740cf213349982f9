"""Lists of runs: the newest ones that fit a filter, by the page, and how many there are.

Each shape of a search, whatever its values, has a statement that is made once: SQLAlchemy takes longer to make one than
PostgreSQL to answer it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from time import monotonic
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    bindparam,
    func,
    literal_column,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.sql.elements import BindParameter

from orchestrator.db import Database
from orchestrator.domain import RunKind, RunState, Trigger
from orchestrator.insights.runs import RUN_COLUMNS, RunView
from orchestrator.schema import dispatches, runs

MANY_RUNS: Final = 1_000
"""A data source with so many runs is a common one; of others all runs are looked at to find the newest ones."""
MOST_PROBED: Final = 1_000
"""Runs that are looked into for a common data source, for one page."""
_SHAPES: Final = 500
_KNOWN_FOR: Final = 60.0  # seconds
_MOST_KNOWN: Final = 10_000


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs are wanted: those that fit all that is given.

    Attributes:
        kind: of this kind.
        state: in this state.
        task_id: of this crawl task.
        data_source_id: analyses of this data source, and crawl runs whose plan has it.
        theme_name: analyses for this theme.
        trigger: started so.
        error_code: with this error.
        since: created at this moment or later.
        until: created before this moment.
    """

    kind: RunKind | None = None
    state: RunState | None = None
    task_id: int | None = None
    data_source_id: int | None = None
    theme_name: str | None = None
    trigger: Trigger | None = None
    error_code: str | None = None
    since: datetime | None = None
    until: datetime | None = None


Position = tuple[datetime, UUID]
"""Of a run in a list: its ``created_at`` and ``id``."""


@dataclass(frozen=True, slots=True)
class FoundRuns:
    """Runs that fit a filter.

    Attributes:
        runs: a page of them, newest first.
        following: after which the next page begins; none: there is none.
        counted: how many fit in all, or at least.
        exact: whether these are all.
    """

    runs: list[RunView]
    following: Position | None
    counted: int
    exact: bool


class RunSearches:
    """Finds runs.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[object, tuple[float, bool]] = {}

    def search_runs(self, wanted: RunFilter, *, limit: int, after: Position | None = None, most: int = 0) -> FoundRuns:
        """Find runs, newest first.

        For the runs of a common data source :data:`MOST_PROBED` are looked into, so that no page takes long: one may
        have few or none of them, and another one following all the same. Those beyond the page are not counted.

        Args:
            wanted: which.
            limit: at most so many on the page.
            after: go on after this one.
            most: count how many there are up to so many; 0: do not.
        """
        shape, values = _shape(wanted, after), _values(wanted, after)
        with self._database.autocommit() as connection:
            common = _in_plans(shape) and self._is_common(connection, values)
            if common:
                shape |= {_COMMON}
            # One more tells that there are more; that and the edge may come in either order.
            found, edge = _read(connection.execute(_newest(shape), values | {"limit": limit + 1 + common}))
            following = _position(found[limit - 1]) if len(found) > limit else edge
            counted, exact = len(found[:limit]), after is None and following is None
            if most and not common and not exact:
                counted = connection.scalar(_count(shape - {_CONTINUED}), values | {"limit": most + 1}) or 0
                exact = counted <= most
        return FoundRuns(found[:limit], following, min(counted, most) if most else counted, exact)

    def _is_common(self, connection: Connection, values: Mapping[str, object]) -> bool:
        """Whether the crawl runs of a data source are too many to be looked up one by one.

        That changes slowly, and either way finds the same runs, page by page: what was found holds for a while.
        """
        source = values["data_source_id"]
        good_until, common = self._known.get(source, (0.0, False))
        if monotonic() > good_until:
            common = connection.scalar(_IS_COMMON, values) is True
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[source] = monotonic() + _KNOWN_FOR, common
        return common


# --- Shapes --------------------------------------------------------------------------------------------------------


_Shape = frozenset[str]
"""The fields of a filter that are given, and what else makes a statement another one:"""

_NOT_SCHEDULED: Final = "of a trigger that is not the schedule"
_ANALYSES: Final = "of the kind site_analysis"
_CONTINUED: Final = "after a position"
_COMMON: Final = "of a common data source"


def _shape(wanted: RunFilter, after: Position | None) -> _Shape:
    shape = {name for name in RunFilter.__dataclass_fields__ if getattr(wanted, name) is not None}
    if wanted.trigger not in {None, Trigger.SCHEDULE}:
        shape.add(_NOT_SCHEDULED)
    if wanted.kind is RunKind.SITE_ANALYSIS:
        shape.add(_ANALYSES)
    if after is not None:
        shape.add(_CONTINUED)
    return frozenset(shape)


def _values(wanted: RunFilter, after: Position | None) -> dict[str, object]:
    values = {name: getattr(wanted, name) for name in RunFilter.__dataclass_fields__}
    values |= {"many": MANY_RUNS - 1, "probed": MOST_PROBED, "before_edge": MOST_PROBED - 1}
    return values if after is None else values | {"after_at": after[0], "after_id": after[1]}


def _in_plans(shape: _Shape) -> bool:
    """Whether plans of crawl runs have to be looked into."""
    return "data_source_id" in shape and not shape & {_ANALYSES, "theme_name"}


# --- Statements ----------------------------------------------------------------------------------------------------


_Conditions = list[ColumnElement[bool]]

_KEYS: Final = (runs.c.created_at, runs.c.id)
_NEWEST_FIRST: Final = tuple(key.desc() for key in _KEYS)
_EQUAL: Final = ("kind", "state", "task_id", "theme_name", "trigger", "error_code")
# The conditions of partial indexes, word for word: a prepared statement's plan does not know the values asked for.
_OF_INDEXES: Final = {
    _NOT_SCHEDULED: literal_column("trigger <> 'schedule'", type_=true().type),
    _ANALYSES: literal_column("kind = 'site_analysis'", type_=true().type),
}
_LIMIT: Final = bindparam("limit", type_=Integer)
_SOURCE: Final = bindparam("data_source_id", type_=runs.c.data_source_id.type)
# An index of its own has this sum; see the schema.
_source: Final[ColumnElement[int]] = dispatches.c.data_source_id + literal_column("0")


@lru_cache(_SHAPES)
def _newest(shape: _Shape) -> Select[Any]:
    """Select the newest runs that fit, and for each row whether it only tells where the search had to end."""
    if "data_source_id" not in shape:
        return _page(_conditions(shape), columns=RUN_COLUMNS)
    newest = _newest_of_source(shape).subquery()
    found = select(*RUN_COLUMNS, newest.c.edge).join_from(newest, runs, runs.c.id == newest.c.id)
    return found.order_by(*_NEWEST_FIRST)


def _read(rows: Iterable[Sequence[Any]]) -> tuple[list[RunView], Position | None]:
    """Return the runs up to the edge, if there is one, and the edge: what is beyond it is for the next page."""
    found, edge = [], None
    for *row, is_edge in rows:
        run = RunView.of(row)
        if is_edge:
            edge = _position(run)
        else:
            found.append(run)
    return [run for run in found if edge is None or _position(run) >= edge], edge


@lru_cache(_SHAPES)
def _count(shape: _Shape) -> Select[Any]:
    """Count the runs that fit, up to a limit; not for a common data source."""
    # In order, or else the planner takes a walk through the table. Without their ids, which some indexes do not have.
    some: Select[Any] = select(true()).select_from(runs).where(*_conditions(shape))
    some = some.order_by(runs.c.created_at.desc()).limit(_LIMIT)
    if "data_source_id" in shape:
        some = _newest_of_source(shape)
    return select(func.count()).select_from(some.subquery())


def _newest_of_source(shape: _Shape) -> Select[Any]:
    """Select the keys of the newest runs of a data source, which may be in runs of either kind."""
    pages = [_page([*_conditions(shape), runs.c.data_source_id == _SOURCE])]
    if _COMMON in shape:
        pages += _probed(shape)
    elif _in_plans(shape):
        pages.append(_page([*_conditions(shape), _IN_PLAN]))
    # Each is read off an index of its own, and no run is on two; an OR would be read off none.
    either = union_all(*(select(each.subquery()) for each in pages)).subquery()
    return select(either).order_by(either.c.created_at.desc(), either.c.id.desc()).limit(_LIMIT)


def _page(
    conditions: _Conditions, *, columns: Sequence[ColumnElement[Any]] = _KEYS, limit: BindParameter[int] = _LIMIT
) -> Select[Any]:
    found = select(*columns, literal_column("false").label("edge")).where(*conditions)
    return found.order_by(*_NEWEST_FIRST).limit(limit)


def _conditions(shape: _Shape) -> _Conditions:
    moment = runs.c.created_at.type
    conditions = [runs.c[name] == bindparam(name, type_=runs.c[name].type) for name in _EQUAL if name in shape]
    conditions += [condition for name, condition in _OF_INDEXES.items() if name in shape]
    if "since" in shape:
        conditions.append(runs.c.created_at >= bindparam("since", type_=moment))
    if "until" in shape:
        conditions.append(runs.c.created_at < bindparam("until", type_=moment))
    if _CONTINUED in shape:
        position = bindparam("after_at", type_=moment), bindparam("after_id", type_=runs.c.id.type)
        conditions.append(tuple_(*_KEYS) < tuple_(*position))
    return conditions


# --- Crawl runs by data source. The planner has to guess how many there are, and a wrong guess costs seconds: so there
# --- are two ways, and we say which. No other run has dispatches.

# A range in order, which an index has: with an equation all of its entries would be collected first.
_IS_COMMON: Final = (
    select(true())
    .select_from(dispatches)
    .where(_source.between(_SOURCE, _SOURCE))
    .order_by(_source)
    .offset(bindparam("many", type_=Integer))
    .limit(1)
)

_IN_PLAN: Final = runs.c.id == func.any(
    func.array(select(dispatches.c.run_id).where(_source == _SOURCE).scalar_subquery())
)
"""That a run has a dispatch for a rare data source: its runs are looked up first."""


def _probed(shape: _Shape) -> tuple[Select[Any], Select[Any]]:
    """Select those of the newest runs that have a dispatch for a common data source, by looking into one by one.

    And the last of them all, where there may be more. By one statement: what changes between two would let runs fall
    through.
    """
    newest = _page(_conditions(shape), limit=bindparam("probed", type_=Integer)).cte("newest")
    newest_first = (newest.c.created_at.desc(), newest.c.id.desc())
    of_run = (dispatches.c.run_id == newest.c.id) & (dispatches.c.data_source_id == _SOURCE)
    has_it = select(true()).where(of_run).limit(1).scalar_subquery()
    edge = select(newest.c.created_at, newest.c.id, literal_column("true").label("edge")).order_by(*newest_first)
    return (
        select(newest).where(has_it).order_by(*newest_first).limit(_LIMIT),
        edge.offset(bindparam("before_edge", type_=Integer)).limit(1),
    )


def _position(run: RunView) -> Position:
    return run.created_at, run.id
