"""Sample data: the main application's two tables, in the many states that real ones are in."""

from typing import Final, LiteralString

import psycopg

NEWS: Final = 1
"""A small crawl task with untidy data source ids."""
EVERYTHING: Final = 2
"""The crawl task of all data sources."""
PRICES: Final = 3
"""A small crawl task whose schedule is edited."""
SMALL: Final = 40
"""Data sources of the small ones."""
UNKNOWN: Final = 404
"""No crawl task has this id."""

_TABLES: Final[LiteralString] = """
CREATE TABLE crawl_tasks (
    id bigint PRIMARY KEY,
    name text NOT NULL,
    data_source_ids bigint[],
    schedule text,
    is_active boolean NOT NULL DEFAULT true,
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE crawl_tasks IS 'which data sources to crawl, and when';
COMMENT ON COLUMN crawl_tasks.data_source_ids IS 'NULL, empty, repeated ids and NULL elements all occur';
COMMENT ON COLUMN crawl_tasks.schedule IS 'as people write it: cron, English or Chinese';
COMMENT ON COLUMN crawl_tasks.is_active IS 'governs the schedule; running by hand is always allowed';

CREATE TABLE crawl_configs (
    id bigint PRIMARY KEY,
    data_source_id bigint NOT NULL,
    status text NOT NULL CHECK (status IN ('active', 'disabled', 'superseded')),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON crawl_configs (data_source_id);
COMMENT ON TABLE crawl_configs IS 'how to crawl a data source; the latest active one counts';
"""

# One data source in ten has nothing that is active: half of those a disabled config, half of them none at all.
_CONFIGS: Final[LiteralString] = """
WITH config (history, version, status) AS (VALUES
    ('one',            1, 'active'),
    ('edited',         1, 'superseded'),
    ('edited',         2, 'active'),
    ('two active',     1, 'active'),
    ('two active',     2, 'active'),
    ('edit withdrawn', 1, 'active'),
    ('edit withdrawn', 2, 'disabled'),
    ('disabled',       1, 'disabled')
)
INSERT INTO crawl_configs (id, data_source_id, status, created_at)
SELECT source * 10 + version, source, status, now() - interval '30 days' + version * interval '1 day'
FROM generate_series(1, %s) AS source
JOIN config ON history = CASE source %% 20
    WHEN 3 THEN 'edited'
    WHEN 6 THEN 'two active'
    WHEN 9 THEN 'edit withdrawn'
    WHEN 13 THEN 'disabled'
    WHEN 17 THEN 'none'
    ELSE 'one'
END
"""

_TASK: Final[LiteralString] = """
INSERT INTO crawl_tasks (id, name, schedule, is_active, data_source_ids)
VALUES (%s, %s, %s, %s, %s::bigint[])
"""


def create(connection: psycopg.Connection, sources: int) -> None:
    """Create the tables with data sources 1 to ``sources``."""
    some = list(range(1, SMALL + 1))
    untidy = [None, 7, 7, *some, sources + 1, None]
    tasks: list[tuple[int, str, str, bool, list[int | None] | list[int] | None]] = [
        (NEWS, "新闻首页 (news front pages)", "每日执行", True, untidy),
        (EVERYTHING, "all data sources", "every day at 03:00", True, list(range(1, sources + 1))),
        (PRICES, "价格监测 (price watch)", "每周一 08:00", True, some[10:30]),
        (4, "quarterly reports", "0 6 1 1,4,7,10 *", False, some[::2]),
        (5, "nothing yet", "每月1日 02:00", True, None),
    ]
    connection.execute(_TABLES)
    connection.execute(_CONFIGS, [sources])
    connection.cursor().executemany(_TASK, tasks)
