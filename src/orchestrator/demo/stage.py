"""The demo's own small world: a private directory, settings of its own, and processes that end with it.

Nothing of the user's is touched and nothing is left. A guard, a child that outlives us, reads from a pipe until
the kernel closes our end of it: on leaving, on Ctrl-C, on an exception, on kill -9 alike. Then it kills what was
started, PostgreSQL included, and removes the directory. It does so at once, for what a farewell would save is
thrown away anyway, and the story has shown by then that nothing depends on one.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, Self, TypeVar

import orchestrator
from orchestrator.embedded import EmbeddedPostgres, ServerConfig
from orchestrator.errors import OrchestratorError
from orchestrator.settings import CONFIG_VARIABLE, PREFIX

Answer = TypeVar("Answer")

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a demo in good order."""

_POLL: Final = 0.05
_LIMIT: Final = 10.0  # seconds
_TAIL: Final = 12  # lines
# What would point us, Celery or libpq at the user's real services.
_FOREIGN: Final = (PREFIX, "CELERY_", "PG")
# How to log in to the Kafka that a demo is given; of no effect for any other.
_GIVEN: Final = f"{PREFIX}KAFKA__"


class StageError(OrchestratorError):
    """Something that the story needs did not happen; the sentence says what."""

    code = "demo_failed"


class Stage:
    """Where the story takes place, from entering to leaving the ``with`` block.

    Attributes:
        directory: settings, logs and PostgreSQL's data; removed on leaving.
        hidden: names of the user's variables that would win over the settings in here.
    """

    def __init__(self) -> None:
        with _undisturbed():
            self.directory = Path(mkdtemp(prefix="orchestrator-demo-"))
            self._guard = _Guard(ServerConfig(self.directory))
        if os.geteuid() == 0:
            self.directory.chmod(0o711)  # PostgreSQL runs as another account
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        foreign = [name for name in os.environ if name.startswith(_FOREIGN) and not name.startswith(_GIVEN)]
        for name in foreign:
            del os.environ[name]
        self.hidden = [name for name in foreign if not name.startswith("PG") and name != CONFIG_VARIABLE]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for process in self._processes.values():
            process.wait()

    def close(self) -> None:
        """End everything now; return when nothing is left. From a signal handler too, and more than once."""
        self._guard.close()

    @property
    def settings_file(self) -> Path:
        """The one thing that another process needs to know to join in."""
        return self.directory / "orchestrator.toml"

    def configure(self, settings: str) -> None:
        """Write the settings, TOML, and have this process and those it starts read them."""
        self.settings_file.write_text(f"state_dir = '{self.directory}'\n{settings}")
        os.environ[CONFIG_VARIABLE] = str(self.settings_file)

    def start(self, name: str, *command: str, **environment: str) -> None:
        """Start a Python program in a process group of its own; what it says goes to a log of its name."""
        # The directory is where they run, so that everyone sees whose they are; our code is where it was.
        ours = str(Path(orchestrator.__file__).parents[1])
        theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [ours, *(str(Path(path).absolute()) for path in theirs if path)]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.directory)}
        with _undisturbed(), self.log(name).open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 -- our own programs, no shell
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={**os.environ, **environment},
                process_group=0,
            )
            self._guard.watch(process.pid)
            self._processes[name] = process

    def log(self, name: str) -> Path:
        """Return where a process writes to."""
        return self.directory / f"{name}.log"

    def pid(self, name: str) -> int:
        """Return a process's id, which is its group's too."""
        return self._processes[name].pid

    def freeze(self, name: str) -> None:
        """Stop a whole process group in the middle of whatever it does (SIGSTOP)."""
        os.killpg(self.pid(name), signal.SIGSTOP)

    def kill(self, name: str) -> None:
        """Kill -9 a whole process group."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._guard.forget(process.pid)

    def until(self, predicate: Callable[[], Answer | None], *, within: float, what: str) -> Answer:
        """Return the predicate's first true answer.

        Raises:
            StageError: there is none in time, or a process ended meanwhile.
        """
        deadline = time.monotonic() + within
        while not (answer := predicate()):
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise StageError(f"{name} ended with {process.returncode}")
            if time.monotonic() > deadline:
                raise StageError(f"not within {within:.0f} s: {what}")
            time.sleep(_POLL)
        return answer

    def last_words(self) -> str:
        """Return the last lines of every log."""
        logs = [*self.directory.glob("*.log"), *self.directory.glob("postgresql/*.log")]
        tails = (f"--- {log.name}\n" + "".join(_tail(log)) for log in sorted(logs))
        return "\n".join(tails)


def _tail(log: Path) -> list[str]:
    with log.open(errors="replace") as lines:
        return lines.readlines()[-_TAIL:]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold signals back inside the block. Not by a mask, for children would inherit that."""
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in held:
            signal.raise_signal(each)


class _Guard:
    """Ends what we started when we end, however that happens.

    Forked, and in a session of its own: neither Ctrl-C nor a signal to our process group reaches it. Whoever waits
    for our output to end waits for it too.
    """

    def __init__(self, config: ServerConfig) -> None:
        reading, writing = os.pipe()
        with _undisturbed():
            self._pid = os.fork()
            if self._pid == 0:
                # The handlers of the block stay, so that signals from now on mean nothing here.
                try:
                    os.setsid()
                    os.close(writing)
                    _outlive(reading, config)
                finally:
                    os._exit(0)
            self._pipe: int | None = writing
        os.close(reading)

    def watch(self, group: int) -> None:
        """Have a process group killed in the end."""
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        """Leave a process group alone: it is gone, and its number may be given to others."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Have everything ended now; return when it is done. A signal handler may call it amid another call."""
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            os.close(pipe)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _tell(self, line: str) -> None:
        if self._pipe is not None:
            os.write(self._pipe, line.encode())


def _outlive(pipe: int, config: ServerConfig) -> None:
    groups: set[int] = set()
    with os.fdopen(pipe) as lines:
        for line in lines:
            (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + _LIMIT
    server = EmbeddedPostgres(config)
    # The server would wait for its last participant, which may be a shell that the user opened to look around.
    while (pid := server.postmaster()) is not None and time.monotonic() < deadline:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
        time.sleep(_POLL)
    for directory in (config.state_dir, config.socket_dir):
        # A process that is just dying may still write its last line.
        while directory.exists() and time.monotonic() < deadline:
            shutil.rmtree(directory, ignore_errors=True)
