"""Child processes for tests: output in a file, readiness awaited, always reaped, never left behind.

A process ends with its group when the test closes it, when the interpreter exits, and, through a guard that
reads from a pipe of ours until the kernel closes it, even when the test session itself is killed.
"""

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, Self, TypeVar

Answer = TypeVar("Answer")

_GUARD: Final = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


def eventually(predicate: Callable[[], Answer], *, within: float, what: str, every: float = 0.02) -> Answer:
    """Return the predicate's first true answer; ask it again after ``every`` seconds.

    Raises:
        AssertionError: there is none in time; the message says what was awaited.
    """
    deadline = time.monotonic() + within
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what}")
        time.sleep(every)
    return answer


def free_port() -> int:
    """Return a loopback port that nobody uses.

    It is none of those that the system gives to outgoing connections: a server that is down for a while, as those of
    the fault tests are, would find its port taken.
    """
    while True:
        port = 10_000 + secrets.randbelow(_EPHEMERAL - 10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _first_ephemeral_port() -> int:
    linux = 32_768
    with suppress(OSError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        return first if first > 12_000 else linux
    return linux


_EPHEMERAL: Final = _first_ephemeral_port()


def peak_memory(pid: int | str = "self") -> float:
    """Return the peak of a process's memory in MiB."""
    # Not ru_maxrss: that one remembers the process which we were forked from.
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process and its living descendants have taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(child) for child in children_of(pid))


def local_ports(pid: int) -> set[int]:
    """Return the local TCP ports of a process."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            sockets.add(os.fspath(descriptor.readlink()))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].partition(":")[2], 16) for row in rows if f"socket:[{row[9]}]" in sockets}


def guard_group(group: int) -> None:
    """Have a process group killed should this process die."""
    _tell_guard(f"+{group}")


def release_group(group: int) -> None:
    """Forget a process group: it has ended, and its number may be given to others."""
    _tell_guard(f"-{group}")


def process_exists(pid: int) -> bool:
    """Tell whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's living children."""
    children = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((directory / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(directory.name))
    return children


class Process:
    """A child in a process group of its own; standard output and error go to one file."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        output: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.output = output
        self._closed = False
        self.name = Path(command[0]).name
        with output.open("ab") as sink:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env, cwd=cwd, process_group=0
            )
        guard_group(self.pid)
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id, and the id of its group."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._child.poll() is None

    def text(self) -> str:
        """Return what it has written so far."""
        return self.output.read_text(errors="replace")

    def await_ready(self, predicate: Callable[[], Answer], *, within: float, what: str) -> Answer:
        """Return the predicate's first true answer.

        Raises:
            AssertionError: there is none in time, or the process has ended; the message has its last output.
        """

        def answer_unless_ended() -> Answer | None:
            if answer := predicate():
                return answer
            if not self.running:
                raise AssertionError(f"{self.name} ended with {self._child.returncode} before: {what}")
            return None

        try:
            answer = eventually(answer_unless_ended, within=within, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._tail()}") from None
        assert answer is not None
        return answer

    def await_line(self, text: str, *, within: float) -> None:
        """Wait until its output contains a text."""
        self.await_ready(lambda: text in self.text(), within=within, what=f"{self.name} writes {text!r}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self._child.send_signal(number)

    def wait(self, *, within: float) -> int:
        """Return its exit code when it has ended.

        Raises:
            AssertionError: it goes on.
        """
        try:
            return self._child.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not within {within} s: {self.name} ends\n{self._tail()}") from None

    def terminate(self, *, within: float = 10) -> int:
        """Ask it to end and return its exit code."""
        self.send(signal.SIGTERM)
        return self.wait(within=within)

    def kill(self) -> None:
        """Kill -9 the process alone and reap it; its children stay."""
        self._child.kill()
        self._child.wait()

    def kill_a_child(self) -> None:
        """Kill -9 one of its children."""
        os.kill(children_of(self.pid)[0], signal.SIGKILL)

    def freeze(self) -> None:
        """Stop the whole group where it stands."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen group go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill -9 what is left of the whole group and reap the process."""
        if self._closed:
            return  # the group's number may be somebody else's by now
        self._closed = True
        atexit.unregister(self.close)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait()
        release_group(self.pid)

    def _tail(self) -> str:
        return "\n".join(self.text().splitlines()[-20:])


@cache
def _guard() -> subprocess.Popen[str]:
    # A session of its own, so that Ctrl-C in the terminal does not end the guard with the guarded.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True
    )


def _tell_guard(line: str) -> None:
    pipe = _guard().stdin
    assert pipe is not None
    print(line, file=pipe, flush=True)
