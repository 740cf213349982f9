"""The harness itself, where it promises something that no other test would notice missing."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import amqp
import pytest

from tests.support.processes import Process, eventually, process_exists
from tests.support.rabbitmq import RabbitMQServer

_DOOMED_SESSION = """
import os, signal, sys
from pathlib import Path
from tests.support.processes import Process

child = Process(["sh", "-c", "sleep 600 & echo $!; wait"], output=Path(sys.argv[1]))
child.await_line("\\n", within=10)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_outlives_a_session_that_was_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}  # noqa: PTH109 -- text wanted
    grandchild = tmp_path / "grandchild.out"
    command = [sys.executable, "-c", _DOOMED_SESSION, os.fspath(grandchild)]
    with Process(command, output=tmp_path / "session.out", env=environment) as session:
        assert session.wait(within=20) == -signal.SIGKILL, session.text()
    pid = int(grandchild.read_text())
    eventually(lambda: not process_exists(pid), within=10, what="the guard kills the grandchild")


def test_a_process_that_ends_before_it_is_ready_says_what_it_said(tmp_path: Path) -> None:
    with (
        Process(["sh", "-c", "echo cannot; exit 3"], output=tmp_path / "out") as process,
        pytest.raises(AssertionError, match=r"(?s)ended with 3 before: .*never.*cannot"),
    ):
        process.await_line("never", within=20)


@pytest.mark.usefixtures("rabbitmq_installed")
def test_a_broker_is_killed_paused_and_stopped_and_listens_on_loopback_only() -> None:
    with RabbitMQServer() as broker:
        vhost = broker.fresh_vhost()
        assert vhost != broker.fresh_vhost()
        _declare(broker, vhost)
        addresses = {line.split()[1].split(":")[0] for line in _listeners(broker)}
        assert addresses == {"0100007F"}

        broker.settle()
        broker.kill()
        broker.start()
        _declare(broker, vhost, passive=True)

        broker.pause()
        with pytest.raises(TimeoutError):
            _declare(broker, vhost, timeout=0.5)
        broker.resume()
        _declare(broker, vhost, passive=True)

        broker.stop()
        with pytest.raises(ConnectionRefusedError):
            _declare(broker, vhost)


def _declare(broker: RabbitMQServer, vhost: str, *, passive: bool = False, timeout: float = 10) -> None:
    address = f"127.0.0.1:{broker.port}"
    with amqp.Connection(address, virtual_host=vhost, connect_timeout=timeout, read_timeout=timeout) as connection:
        connection.channel().queue_declare("kept", passive=passive, durable=True, auto_delete=False)


def _listeners(broker: RabbitMQServer) -> list[str]:
    """Return the lines of the kernel's tables for the TCP sockets on which the broker's node listens."""
    inodes = set()
    for link in Path(f"/proc/{broker.node_pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(link.readlink().name.removeprefix("socket:[").removesuffix("]"))
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line for table in tables for line in table.read_text().splitlines()[1:]]
    return [line for line in lines if line.split()[3] == "0A" and line.split()[9] in inodes]
