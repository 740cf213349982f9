"""A private PostgreSQL server on a free loopback port, for tests that need one and for tests that hurt one.

It is the wheel's, as in the embedded set-up; ``TEST_POSTGRES=15`` chooses a Debian package's by its major version.
"""

import atexit
import os
import shutil
import signal
import subprocess
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
from psycopg.pq import PGconn, Ping

from orchestrator.embedded import SUPERUSER, EmbeddedPostgres, ServerConfig
from tests.support.installations import postgres_programs, system_with_postgres
from tests.support.processes import (
    Process,
    children_of,
    eventually,
    free_port,
    guard_group,
    process_exists,
    release_group,
)

# Kills of processes lose nothing without fsync: the pages are the kernel's by then. Only a crash of the whole
# machine would, which no test causes. synchronous_commit stays on: without it a kill loses commits.
_OPTIONS: Final = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
_LIMIT: Final = 30.0
_ACCOUNT: Final = "postgres"
_CLEAN: Final = {"LC_ALL": "C.UTF-8", "PATH": os.defpath}


class StopMode(Enum):
    """How PostgreSQL is asked to stop."""

    SMART = signal.SIGTERM
    FAST = signal.SIGINT
    IMMEDIATE = signal.SIGQUIT


class InstalledPostgres:
    """The server of a Debian package, as a child of ours; used like an :class:`EmbeddedPostgres` of one participant."""

    def __init__(self, config: ServerConfig, version: str) -> None:
        self.config = config
        self._system = system_with_postgres(version)
        self._programs = f"/{postgres_programs(version)}"
        self._account = _ACCOUNT if os.geteuid() == 0 else None
        self._process: Process | None = None

    def join(self) -> None:
        """Return when the server answers, having started it if need be."""
        if self.postmaster() is not None:
            return
        self.leave()
        data, log = self.config.home / "data", self.config.home / "server.log"
        if not data.exists():
            self._create_cluster(data)
        log.unlink(missing_ok=True)
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.config.port),
            "unix_socket_directories": str(self.config.home),
            "shared_buffers": "32MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            **self.config.options,
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self._process = Process(
            self._command("postgres", "-D", str(data), *words), output=log, env=_CLEAN, cwd=self.config.home
        )
        address = f"host=127.0.0.1 port={self.config.port} user={SUPERUSER} dbname=postgres connect_timeout=5".encode()
        self._process.await_ready(lambda: PGconn.ping(address) == Ping.OK, within=_LIMIT, what="PostgreSQL answers")

    def leave(self) -> None:
        """Kill what is left of it."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def postmaster(self) -> int | None:
        """Return the server's process id, or None if it does not run."""
        return self._process.pid if self._process is not None and self._process.running else None

    def _create_cluster(self, data: Path) -> None:
        data.parent.mkdir(mode=0o700)
        if self._account is not None:
            os.chown(data.parent, *self._system.user_and_group(self._account))
        # The same order of text as the wheel's: by code point.
        how = ["-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"]
        result = subprocess.run(
            self._command("initdb", "-D", str(data), *how),
            env=_CLEAN,
            cwd=data.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=2 * _LIMIT,
        )
        assert result.returncode == 0, f"initdb: {result.stdout}"

    def _command(self, program: str, *arguments: str) -> list[str]:
        return self._system.command(f"{self._programs}/{program}", *arguments, account=self._account)


class PostgresServer:
    """A running server with its data in a temporary directory. Every URL takes any password."""

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="orchestrator-postgres-"))
        if os.geteuid() == 0:
            self._directory.chmod(0o711)  # PostgreSQL runs as another account
        config = ServerConfig(self._directory, tcp_port=free_port(), options=_OPTIONS | dict(options or {}))
        version = os.environ.get("TEST_POSTGRES")
        self._server = InstalledPostgres(config, version) if version else EmbeddedPostgres(config)
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
        return self._server.config.port

    @property
    def pid(self) -> int:
        """The postmaster's process id, while it runs."""
        assert self._postmaster is not None
        return self._postmaster

    @property
    def version(self) -> str:
        """The version it says it has."""
        with psycopg.connect(self.url("postgres")) as connection:
            return connection.info.parameter_status("server_version") or ""

    @property
    def log(self) -> str:
        """What the server has logged since its last start."""
        return (self._server.config.home / "server.log").read_text(errors="replace")

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
        self._server.join()
        pid = self._server.postmaster()
        assert pid is not None
        if pid != self._postmaster:
            self._postmaster = pid
            guard_group(pid)

    def stop(self, mode: StopMode = StopMode.FAST) -> None:
        """Stop it and wait until it is gone."""
        if (pid := self._server.postmaster()) is not None:
            os.kill(pid, mode.value)
            self._await_end([pid])

    def kill(self) -> None:
        """Kill -9 the postmaster and every backend at once, as a power failure would."""
        if (pid := self._server.postmaster()) is not None:
            os.kill(pid, signal.SIGSTOP)  # so that it starts no more children meanwhile
            family = [pid, *children_of(pid)]
            for member in family:
                with suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            self._await_end(family)

    def freeze(self) -> None:
        """Stop the postmaster and every backend in their tracks (SIGSTOP), as a host that hangs would."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Have them go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop it and remove its data."""
        atexit.unregister(self.close)
        self.stop(StopMode.IMMEDIATE)
        self._server.leave()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        pid = self._server.postmaster()
        assert pid is not None, "it does not run"
        for member in [pid, *children_of(pid)]:
            with suppress(ProcessLookupError):
                os.kill(member, number)

    def _await_end(self, family: list[int]) -> None:
        eventually(lambda: not any(map(process_exists, family)), within=_LIMIT, what="PostgreSQL ends")
        if self._postmaster is not None:
            release_group(self._postmaster)
            self._postmaster = None
