"""Reading the application's tables: plans against an oracle, mapped names, and sentences about what does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.types.json import Json, Jsonb
from sqlalchemy import Text, event, literal_column, select

from orchestrator.catalog import Catalog
from orchestrator.db import Database
from orchestrator.domain import MAX_BIGINT, CrawlArguments
from orchestrator.errors import CatalogMismatchError, CrawlTaskNotFoundError, InvalidDataSourceIdsError
from orchestrator.settings import CatalogSettings, CrawlConfigsMapping, CrawlTasksMapping
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.timeout(120)

Planned = list[tuple[int, int | None]]


def plan(bench: Workbench, task_id: int = 1, catalog: Catalog | None = None) -> Planned:
    with bench.database.transaction() as connection:
        return (catalog or bench.catalog).read_plan(connection, task_id)


def mapped(tasks: Mapping[str, str], configs: Mapping[str, str]) -> Catalog:
    """Make a catalog with other names."""
    return Catalog(
        CatalogSettings(
            crawl_tasks=CrawlTasksMapping.model_validate(tasks),
            crawl_configs=CrawlConfigsMapping.model_validate(configs),
        )
    )


# --- The oracle --------------------------------------------------------------------------------------------

MOMENTS: Final = [None, *(datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3))]
FORMS: Final[Sequence[LiteralString]] = ("int4[]", "int8[]", "json", "jsonb")
Config = tuple[int, str | None, datetime | None]  # data source, status, created_at

configs_lists = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from(["active", "active", "Active", "disabled", "", None]),
        st.sampled_from(MOMENTS),
    ),
    max_size=25,
)
id_lists = st.none() | st.just("JSON null") | st.lists(st.none() | st.integers(1, 8), max_size=15)


def expected_plan(listed: list[int | None] | str | None, configs: Mapping[int, Config]) -> Planned:
    """Say what the plan is, the slow way."""

    def latest(source: int) -> int | None:
        active = [
            (created_at is not None, created_at or datetime.min.replace(tzinfo=UTC), config_id)
            for config_id, (owner, status, created_at) in configs.items()
            if owner == source and status == "active"
        ]
        return max(active)[2] if active else None

    sources = listed if isinstance(listed, list) else []
    return [(source, latest(source)) for source in sorted({each for each in sources if each is not None})]


def test_a_plan_is_what_the_slow_way_says(bench: Workbench) -> None:
    bench.application.execute("DROP TABLE crawl_configs, crawl_tasks")
    bench.application.execute(
        "CREATE TABLE crawl_configs (id bigint PRIMARY KEY, data_source_id int, status text, created_at timestamptz)"
    )
    tasks = {}
    for form in FORMS:
        name = f"tasks_{form.removesuffix('[]')}"
        tasks[form] = name
        bench.application.execute(
            sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, data_source_ids {})").format(
                sql.Identifier(name), sql.SQL(form)
            )
        )

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(form=st.sampled_from(FORMS), listed=id_lists, configs=configs_lists, shuffle=st.randoms())
    def agree(form: str, listed: list[int | None] | str | None, configs: list[Config], shuffle: Any) -> None:  # noqa: ANN401 -- Hypothesis' Random
        ids = list(range(1, len(configs) + 1))
        shuffle.shuffle(ids)
        numbered = dict(zip(ids, configs, strict=True))
        value: object = listed
        if form.startswith("json"):
            wrap = Json if form == "json" else Jsonb
            value = None if listed is None else wrap(None if isinstance(listed, str) else listed)
        elif isinstance(listed, str):
            value = None
        with psycopg.connect(bench.url) as connection, connection.cursor() as cursor:
            table = sql.Identifier(tasks[form])
            cursor.execute(sql.SQL("TRUNCATE {}, crawl_configs").format(table))
            cursor.execute(sql.SQL("INSERT INTO {} VALUES (1, %s)").format(table), [value])
            cursor.executemany(
                "INSERT INTO crawl_configs VALUES (%s, %s, %s, %s)", [(id_, *each) for id_, each in numbered.items()]
            )
        catalog = mapped({"table": tasks[form]}, {})
        wanted = expected_plan(listed, numbered)

        assert plan(bench, catalog=catalog) == wanted

        run_id = bench.accept()
        missing = sum(config is None for _, config in wanted)
        assert bench.ledger.crawls.materialize(run_id, 1, catalog.plan(1)) == (len(wanted), missing)
        assert bench.plan(run_id) == [
            (source, config, "skipped" if config is None else "pending") for source, config in wanted
        ]

    agree()


# --- Elements that are no data source ----------------------------------------------------------------------


BAD: Final[list[tuple[LiteralString, str, str]]] = [
    ("int4[]", "{1,0}", "0"),
    ("int8[]", "{1,-1}", "-1"),
    ("int4[]", "{{1,2},{3,4}}", "[1, 2]"),
    ("jsonb", "[1, 0]", "0"),
    ("jsonb", "[1, -1]", "-1"),
    ("jsonb", "[1.5]", "1.5"),
    ("jsonb", '["7"]', '"7"'),
    ("jsonb", "[true]", "true"),
    ("jsonb", "[[1]]", "[1]"),
    ("jsonb", '[{"id": 1}]', '{"id": 1}'),
    ("jsonb", f"[{MAX_BIGINT + 1}]", str(MAX_BIGINT + 1)),
    ("jsonb", "[1e20]", "100000000000000000000"),
    ("jsonb", "[1e100000]", "1000000000"),
    ("jsonb", '{"1": 2}', '{"1": 2}'),
    ("jsonb", "7", "7"),
    ("jsonb", '"[1,2]"', '"[1,2]"'),
    ("json", '[1, "7"]', '"7"'),
    ("json", '{"ids": [1]}', '{"ids": [1]}'),
    ("text", "[1, 2]", '"[1, 2]"'),
    ("text[]", "{1,2}", '"1"'),
    ("int4", "7", "7"),
    ("numeric[]", "{NaN}", '"NaN"'),
]


@pytest.mark.parametrize(("form", "value", "shown"), BAD, ids=[f"{form} {value[:20]}" for form, value, _ in BAD])
def test_an_element_that_is_no_positive_integer_fails_the_run_before_anything_is_planned(
    bench: Workbench, form: LiteralString, value: str, shown: str
) -> None:
    bench.application.add_sources(10)
    bench.application.execute("ALTER TABLE crawl_tasks DROP data_source_ids")
    bench.application.execute(sql.SQL("ALTER TABLE crawl_tasks ADD data_source_ids {}").format(sql.SQL(form)))
    bench.application.execute(
        sql.SQL("INSERT INTO crawl_tasks (id, data_source_ids) VALUES (1, {}::{})").format(value, sql.SQL(form))
    )
    run_id = bench.accept()

    bench.fan_out().deliver(run_id)

    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["total"]) == ("failed", "invalid_data_source_ids", 0)
    assert shown in run["error_message"]
    assert len(run["error_message"]) < 300
    assert bench.plan(run_id) == []
    with pytest.raises(InvalidDataSourceIdsError, match="crawl task 1: data_source_ids must hold positive integers"):
        plan(bench)


def test_whole_numbers_may_be_written_in_any_way_and_be_as_large_as_a_bigint(bench: Workbench) -> None:
    bench.application.execute("DROP TABLE crawl_tasks, crawl_configs")
    bench.application.create_tables("jsonb")
    bench.application.execute(f"INSERT INTO crawl_tasks VALUES (1, '[3.0, 3, 2e1, {MAX_BIGINT}]')")

    assert plan(bench) == [(3, None), (20, None), (MAX_BIGINT, None)]


def test_the_first_bad_elements_are_shown_in_order_and_all_are_counted(bench: Workbench) -> None:
    bench.application.add_task(1, [5, -3, 0, 6, -1, -2])

    with pytest.raises(InvalidDataSourceIdsError, match=r"4 elements are not, for instance -3, 0, -1$"):
        plan(bench)


def test_a_crawl_task_that_is_not_there_is_named(bench: Workbench) -> None:
    bench.application.add_task(1, [1])

    with pytest.raises(CrawlTaskNotFoundError, match="there is no crawl task 2"):
        plan(bench, 2)


def test_ids_of_crawl_tasks_may_be_as_large_as_a_bigint(bench: Workbench) -> None:
    bench.application.add_task(MAX_BIGINT, [1])
    bench.application.add_sources(1)
    run_id = bench.accept(CrawlArguments(MAX_BIGINT))

    bench.fan_out().deliver(run_id)

    assert bench.state(run_id) == "succeeded"
    assert plan(bench, MAX_BIGINT) == [(1, 1)]


# --- Other names -------------------------------------------------------------------------------------------

AWKWARD: Final = 'the "select" 100% :id of user'


def test_every_name_may_be_another_one(bench: Workbench) -> None:
    schema, tasks, configs = AWKWARD, "order", "Crawl Configs; --"
    names = {
        "task_id": sql.Identifier("user"),
        "ids": sql.Identifier("%s"),
        "config_id": sql.Identifier("primary"),
        "source": sql.Identifier(AWKWARD),
        "status": sql.Identifier("Status"),
        "created": sql.Identifier("end"),
        "tasks": sql.Identifier(schema, tasks),
        "configs": sql.Identifier(schema, configs),
        "schema": sql.Identifier(schema),
    }
    bench.application.execute("DROP TABLE crawl_tasks, crawl_configs")
    for statement in (
        "CREATE SCHEMA {schema}",
        "CREATE TABLE {tasks} ({task_id} int, {ids} int[])",
        "CREATE TABLE {configs} ({config_id} int, {source} int, {status} text, {created} date)",
        "INSERT INTO {tasks} VALUES (1, '{{1,2}}')",
        "INSERT INTO {configs} VALUES (10, 1, 'active', '2026-01-02'), (11, 1, 'active', '2026-01-01')",
    ):
        bench.application.execute(sql.SQL(statement).format(**names))
    catalog = mapped(
        {"schema": schema, "table": tasks, "id": "user", "data_source_ids": "%s"},
        {
            "schema": schema,
            "table": configs,
            "id": "primary",
            "data_source_id": AWKWARD,
            "status": "Status",
            "created_at": "end",
        },
    )

    assert plan(bench, catalog=catalog) == [(1, 10), (2, None)]
    assert bench.ledger.crawls.materialize(bench.accept(), 1, catalog.plan(1)) == (2, 1)


@pytest.mark.parametrize("name", ["task", "elements", "sources", "latest", "plan", "inserted"])
def test_tables_may_be_called_what_our_statements_call_their_parts(bench: Workbench, name: str) -> None:
    bench.application.add_task(1, [1, 2])
    bench.application.add_configs([(10, 1), (11, 1)])
    for table, catalog in (
        ("crawl_configs", mapped({}, {"table": name})),
        ("crawl_tasks", mapped({"table": name}, {})),
    ):
        rename = sql.SQL("ALTER TABLE {} RENAME TO {}")
        bench.application.execute(rename.format(sql.Identifier(table), sql.Identifier(name)))

        assert plan(bench, catalog=catalog) == [(1, 11), (2, None)]
        assert bench.ledger.crawls.materialize(bench.accept(), 1, catalog.plan(1)) == (2, 1)

        bench.application.execute(rename.format(sql.Identifier(name), sql.Identifier(table)))


CONFIGS: Final = """
CREATE TYPE config_status AS ENUM ('draft', 'active', 'retired');
DROP TABLE crawl_configs;
CREATE TABLE crawl_configs (
    id int, data_source_id int, status config_status, is_enabled boolean, deleted_at date, version int, flags jsonb
);
INSERT INTO crawl_configs VALUES
    (10, 1, 'active', true, NULL, 1, '{"on": true}'),
    (11, 1, 'active', true, NULL, 3, '{"on": false}'),
    (12, 1, 'active', true, '2026-01-01', 4, '{"on": false}'),
    (13, 1, 'retired', false, NULL, 2, '{"on": true}'),
    (14, 2, 'draft', false, NULL, 9, '{"on": true}');
"""


@pytest.mark.parametrize(
    ("active", "latest", "expected"),
    [
        ("is_enabled AND deleted_at IS NULL", "version DESC", [(1, 11), (2, None)]),
        ("is_enabled AND deleted_at IS NULL", "version", [(1, 10), (2, None)]),
        ("NOT is_enabled OR id = 10", "version DESC, id", [(1, 13), (2, 14)]),
        ("status::text LIKE 'act%' AND (flags->>'on')::boolean", "version DESC", [(1, 10), (2, None)]),
        ("flags @> '{\"on\": true}'", "deleted_at DESC NULLS LAST, version DESC", [(1, 13), (2, 14)]),
        (None, "version DESC", [(1, 12), (2, None)]),
        ("status <> 'retired'", "id DESC", [(1, 12), (2, 14)]),
    ],
)
def test_what_is_active_and_what_is_latest_may_be_sql(
    bench: Workbench, active: str | None, latest: str, expected: Planned
) -> None:
    bench.application.add_task(1, [1, 2])
    bench.application.execute(CONFIGS)
    configs = {"active": active, "latest": latest}
    catalog = mapped({}, {name: value for name, value in configs.items() if value is not None})

    assert plan(bench, catalog=catalog) == expected
    assert bench.ledger.crawls.materialize(bench.accept(), 1, catalog.plan(1)) is not None


def test_optional_columns_may_be_absent(bench: Workbench) -> None:
    bench.application.execute("DROP TABLE crawl_tasks")
    bench.application.execute("CREATE TABLE crawl_tasks (id smallint, data_source_ids smallint[])")
    bench.application.execute("INSERT INTO crawl_tasks VALUES (1, '[5:7]={1,NULL,1}')")
    bench.application.add_sources(1)

    assert plan(bench) == [(1, 1)]


def test_views_do_as_well_as_tables(bench: Workbench) -> None:
    bench.application.add_sources(1)
    bench.application.add_task(1, [1, 2])
    bench.application.execute("ALTER TABLE crawl_tasks RENAME TO base")
    bench.application.execute(
        "CREATE VIEW crawl_tasks AS SELECT id, to_json(data_source_ids) AS data_source_ids FROM base"
    )

    assert plan(bench) == [(1, 1), (2, None)]


# --- What does not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("DROP TABLE crawl_tasks", 'relation "crawl_tasks" does not exist'),
        ("DROP TABLE crawl_configs", 'relation "crawl_configs" does not exist'),
        ("ALTER TABLE crawl_tasks DROP data_source_ids", "data_source_ids does not exist"),
        ("ALTER TABLE crawl_configs DROP created_at", "created_at does not exist"),
        ("ALTER TABLE crawl_configs ALTER data_source_id TYPE text", "operator does not exist: text = bigint"),
        ("ALTER TABLE crawl_configs ALTER status TYPE boolean USING true", "boolean"),
        (
            "ALTER TABLE crawl_tasks ALTER id DROP IDENTITY; ALTER TABLE crawl_tasks ALTER id TYPE text",
            "text = integer",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_a_sentence(bench: Workbench, change: LiteralString, complaint: str) -> None:
    bench.application.add_task(1, [1])
    bench.application.add_sources(1)
    bench.application.execute(change)
    run_id = bench.accept()

    bench.fan_out().deliver(run_id)

    run = bench.run(run_id)
    assert (run["state"], run["error_code"]) == ("failed", "catalog_mismatch")
    assert run["error_message"].startswith("the application's tables do not fit the settings: ")
    assert complaint in run["error_message"]
    assert run["error_message"].endswith("`orchestrator doctor` says how to map")
    assert bench.plan(run_id) == []


def test_config_ids_that_are_no_integers_do_not_fit(bench: Workbench) -> None:
    bench.application.add_task(1, [1])
    bench.application.add_sources(1)
    bench.application.execute("ALTER TABLE crawl_configs ALTER id TYPE uuid USING gen_random_uuid()")
    run_id = bench.accept()

    bench.fan_out().deliver(run_id)

    assert bench.run(run_id)["error_code"] == "catalog_mismatch"


@pytest.mark.parametrize("mistake", [{"active": "is_enabled AND"}, {"latest": "no_such_column DESC"}])
def test_wrong_sql_in_the_settings_does_not_fit(bench: Workbench, mistake: dict[str, str]) -> None:
    bench.application.add_task(1, [1])

    with pytest.raises(CatalogMismatchError, match="the application's tables do not fit the settings"):
        plan(bench, catalog=mapped({}, mistake))


def test_tables_that_may_not_be_read_do_not_fit(postgres_server: PostgresServer, bench: Workbench) -> None:
    bench.application.add_task(1, [1])
    role = f"stranger_{id(bench)}"
    postgres_server.create_role(role)
    address = psycopg.conninfo.make_conninfo(bench.url, user=role)
    stranger = Database(address, bench.schema)

    try:
        with (
            pytest.raises(CatalogMismatchError, match="permission denied for table crawl_tasks"),
            stranger.transaction() as connection,
        ):
            bench.catalog.read_plan(connection, 1)
    finally:
        stranger.close()
        postgres_server.drop_role(role)


# --- Cost --------------------------------------------------------------------------------------------------


def test_a_plan_costs_as_many_statements_for_100_000_sources_as_for_ten(bench: Workbench) -> None:
    bench.application.add_sources(90_000)
    for task_id, size in ((1, 10), (2, 100_000)):
        bench.application.execute(
            "INSERT INTO crawl_tasks (id, data_source_ids)"
            " SELECT %s, array_agg(source) FROM generate_series(1, %s) AS source",
            task_id,
            size,
        )
    statements: list[str] = []
    engine = bench.database._engine  # noqa: SLF001 -- to count what passes
    event.listen(engine, "before_cursor_execute", lambda *seen: statements.append(seen[2]))
    counts = {}
    for task_id in (1, 2):
        run_id = bench.accept(CrawlArguments(task_id))
        statements.clear()
        counts[bench.materialize(run_id, task_id)] = len(statements)

    assert list(counts) == [(10, 0), (100_000, 10_000)]
    assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("form", FORMS)
def test_configs_of_a_long_list_are_not_looked_up_one_by_one(bench: Workbench, form: LiteralString) -> None:
    bench.application.execute("DROP TABLE crawl_configs, crawl_tasks")
    bench.application.create_tables(form)
    for task_id, size in ((1, 10), (2, 50_000)):
        bench.application.add_task(task_id, range(1, size + 1))
    # As if there were so many, or nobody knew: this is what PostgreSQL believes.
    believe = "UPDATE pg_class SET reltuples = %s WHERE oid = 'crawl_configs'::regclass"

    def settings_of(task_id: int) -> set[str | None]:
        with bench.database.transaction() as connection:
            connection.execute(bench.catalog.plan(task_id).advice)
            return {connection.exec_driver_sql(f"SHOW {name}").scalar() for name in ("enable_nestloop", "jit")}

    for configs, expected in ((50_000, {"off"}), (10_000_000, {"on"}), (-1, {"on"})):
        bench.application.execute(believe, configs)
        assert settings_of(1) == {"on"}
        assert settings_of(2) == expected, configs
    bench.application.execute("ALTER TABLE crawl_configs RENAME TO kept; CREATE VIEW crawl_configs AS TABLE kept")
    assert settings_of(2) == settings_of(999) == {"on"}
    # Of a parent PostgreSQL knows what it was when somebody asked for it last.
    bench.application.execute(
        "DROP VIEW crawl_configs; CREATE TABLE crawl_configs (LIKE kept) PARTITION BY RANGE (id);"
        " CREATE TABLE part PARTITION OF crawl_configs DEFAULT; ANALYZE crawl_configs"
    )
    assert settings_of(2) == {"on"}


def test_advice_that_cannot_be_had_keeps_no_run_from_its_plan(bench: Workbench) -> None:
    bench.application.add_sources(3)
    bench.application.add_task(1, [1, 2, 3])
    run_id = bench.accept()
    plan = replace(
        bench.catalog.plan(1), advice=select(literal_column("(1 / 0)::text", Text), literal_column("''", Text))
    )

    assert bench.ledger.crawls.materialize(run_id, 1, plan) == (3, 0)


def test_a_long_plan_neither_looks_configs_up_one_by_one_nor_is_compiled(bench: Workbench) -> None:
    bench.application.add_sources(50_000)
    bench.application.add_task(1, range(1, 50_001))
    bench.application.execute("ANALYZE crawl_configs")
    plan = bench.catalog.plan(1)
    with bench.database.transaction() as connection:
        connection.execute(plan.advice)
        statement = plan.rows.compile(connection)
        rows = connection.exec_driver_sql(f"EXPLAIN (ANALYZE) {statement}", statement.params).scalars().all()

    explained = "\n".join(rows)
    assert "on crawl_configs" in explained
    assert "Seq Scan on crawl_configs" in explained
    assert "JIT" not in explained
