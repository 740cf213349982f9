"""A private PostgreSQL server on a free loopback port, for tests that need one and for tests that hurt one."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.abc import QueryNoTemplate

from orchestrator.embedded import SUPERUSER, EmbeddedPostgres, ServerConfig
from tests.support.processes import children_of, eventually, free_port, guard_group, process_exists, release_group

# Kills of processes lose nothing without fsync: the pages are the kernel's by then. Only a crash of the whole
# machine would, which no test causes. synchronous_commit stays on: without it a kill loses commits.
_OPTIONS: Final = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
_LIMIT: Final = 30.0


class StopMode(Enum):
    """How PostgreSQL is asked to stop."""

    SMART = signal.SIGTERM
    FAST = signal.SIGINT
    IMMEDIATE = signal.SIGQUIT


class PostgresServer:
    """A running server with its data in a temporary directory. Every URL takes any password."""

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="orchestrator-postgres-"))
        if os.geteuid() == 0:
            self._directory.chmod(0o711)  # PostgreSQL runs as another account
        config = ServerConfig(self._directory, tcp_port=free_port(), options=_OPTIONS | dict(options or {}))
        self._embedded = EmbeddedPostgres(config)
        self._postmaster: int | None = None
        atexit.register(self.close)
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        return self._embedded.config.port

    @property
    def log(self) -> str:
        """What the server has logged since its last start."""
        return (self._embedded.config.home / "server.log").read_text(errors="replace")

    def url(self, database: str, *, user: str = SUPERUSER, password: str = "secret") -> str:
        """Return the URL of a database."""
        return f"postgresql://{quote(user)}:{quote(password)}@127.0.0.1:{self.port}/{quote(database)}"

    def create_database(self, name: str, *, template: str = "template1", owner: str = SUPERUSER) -> str:
        """Create a database and return its URL. Nobody may be connected to the template."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}")
        self.execute(statement.format(sql.Identifier(name), sql.Identifier(template), sql.Identifier(owner)))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it; one that does not exist is no error."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def create_role(self, name: str) -> None:
        """Create a role that may log in and nothing else; reach a database with it by ``url(…, user=name)``."""
        self.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))

    def drop_role(self, name: str) -> None:
        """Drop a role that owns nothing."""
        self.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))

    def execute(self, statement: QueryNoTemplate, database: str = "postgres") -> None:
        """Execute one statement as superuser, outside a transaction."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement)

    def start(self) -> None:
        """Start it, recovering if it was killed; running already, do nothing."""
        self._embedded.join()
        pid = self._embedded.postmaster()
        assert pid is not None
        if pid != self._postmaster:
            self._postmaster = pid
            guard_group(pid)

    def stop(self, mode: StopMode = StopMode.FAST) -> None:
        """Stop it and wait until it is gone."""
        if (pid := self._embedded.postmaster()) is not None:
            os.kill(pid, mode.value)
            self._await_end([pid])

    def kill(self) -> None:
        """Kill -9 the postmaster and every backend at once, as a power failure would."""
        if (pid := self._embedded.postmaster()) is not None:
            os.kill(pid, signal.SIGSTOP)  # so that it starts no more children meanwhile
            family = [pid, *children_of(pid)]
            for member in family:
                with suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            self._await_end(family)

    def close(self) -> None:
        """Stop it and remove its data."""
        atexit.unregister(self.close)
        self.stop(StopMode.IMMEDIATE)
        self._embedded.leave()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _await_end(self, family: list[int]) -> None:
        eventually(lambda: not any(map(process_exists, family)), within=_LIMIT, what="PostgreSQL ends")
        if self._postmaster is not None:
            release_group(self._postmaster)
            self._postmaster = None
