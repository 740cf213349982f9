#!/usr/bin/env python3
"""Write the next migration: what schema.py has that the migrations up to now do not make.

    make migration NAME=pauses

Compares on a PostgreSQL of its own that holds the ledger and nothing else, and throws it away.
"""

import sys
from pathlib import Path

from alembic import command
from sqlalchemy.schema import CreateSchema

from orchestrator import migrations
from orchestrator.db import Database
from orchestrator.migrations import _config, _known, upgrade
from orchestrator.schema import SCHEMA
from tests.support.postgres import PostgresServer


def write(name: str) -> None:
    """Write the script; Alembic says where."""
    number = 1 + int(max(_known(), default=0))
    with PostgresServer() as server:
        # The superuser is called what the schema is called. On its default search path Alembic would take the
        # schema for the default one and every table for a stranger.
        database = Database(server.url("postgres") + "?options=-csearch_path%3Dpublic", SCHEMA)
        upgrade(database, with_queues=False)
        with database.transaction() as connection:
            connection.execute(CreateSchema(SCHEMA, if_not_exists=True))  # there is none before the first revision
            command.revision(_config(connection, SCHEMA), name, autogenerate=True, rev_id=f"{number:04}")
        database.close()
    (path,) = Path(migrations.__file__).parent.glob(f"versions/{number:04}_*.py")
    path.write_text(path.read_text().replace(f"schema='{SCHEMA}'", "schema=schema"))


def main() -> None:
    """Read the name from the command line."""
    match sys.argv[1:]:
        case [name] if name.isidentifier():
            write(name)
            sys.stdout.write("Read it before you commit it: Alembic sees neither renames nor data.\n")
        case _:
            sys.exit("usage: make migration NAME=what_changes")


if __name__ == "__main__":
    main()
