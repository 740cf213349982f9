"""A private RabbitMQ broker on free loopback ports, as ordinary processes of the test's own account.

It is the one that this machine has; ``TEST_RABBITMQ=4`` chooses another by the beginning of its version.
"""

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import amqp

from tests.support.installations import HERE, System, system_with_rabbitmq
from tests.support.processes import Process, children_of, eventually, free_port, process_exists

HOW_TO_INSTALL: Final = "RabbitMQ is not installed: apt-get install rabbitmq-server (the service need not run)"

_START_LIMIT: Final = 60.0
# Debian's wrapper in /usr/sbin changes the account; the script behind it does not.
_PLACES: Final = ("/usr/lib/rabbitmq/bin", os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")
_POOL: Final = 10
_ALARM: Final = "memory resource limit alarm set"
_CREATE_VHOSTS: Final = """
lists:foreach(fun(Name) ->
    ok = rabbit_vhost:add(Name, <<"tests">>),
    ok = rabbit_auth_backend_internal:set_permissions(
        <<"guest">>, Name, <<".*">>, <<".*">>, <<".*">>, <<"tests">>)
end, [{names}]).
"""


def find_program(name: str) -> str | None:
    """Return the path of a program of RabbitMQ, or None if it is not installed."""
    return _system().find(name, os.pathsep.join(_PLACES))


def _system() -> System:
    version = os.environ.get("TEST_RABBITMQ")
    return system_with_rabbitmq(version) if version else HERE


class RabbitMQServer:
    """A running broker. Nothing outside the loopback interface listens, not even for a moment."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="orchestrator-rabbitmq-"))
        self._port = free_port()
        self._system = _system()
        self._node = f"{self._directory.name}@localhost"
        self._environment = self._write_configuration()
        self._vhosts: list[str] = []
        self._vhosts_made = 0
        self._broker: Process | None = None
        self._epmd: Process | None = None
        atexit.register(self.close)
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The AMQP port on 127.0.0.1."""
        return self._port

    @property
    def url(self) -> str:
        """The URL of the default vhost."""
        return self.vhost_url("/")

    @property
    def version(self) -> str:
        """The version it says it has."""
        with self._connection() as connection:
            facts: dict[str, str] = connection.server_properties  # type: ignore[attr-defined] # the stubs omit it
            return facts["version"]

    @property
    def node_pid(self) -> int:
        """The process id of the Erlang node."""
        return int((self._directory / "node.pid").read_text())

    @property
    def log(self) -> str:
        """What the broker has logged."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self._directory.glob("log/*.log")))

    def vhost_url(self, name: str) -> str:
        """Return the URL of a vhost."""
        # amqp://…// is how Celery writes the vhost "/"; kombu and pika both read it.
        return f"amqp://guest:guest@127.0.0.1:{self._port}/{'/' if name == '/' else quote(name, safe='')}"

    def create_vhost(self, name: str) -> str:
        """Create a vhost by name and return its URL."""
        self._create_vhosts([name])
        return self.vhost_url(name)

    def fresh_vhost(self) -> str:
        """Return the name of a vhost that nobody has used; they are made by the dozen, for rabbitmqctl is slow."""
        if not self._vhosts:
            names = [f"test-{self._vhosts_made + number}" for number in range(_POOL)]
            self._create_vhosts(names)
            self._vhosts_made += _POOL
            self._vhosts = names[::-1]
        return self._vhosts.pop()

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl and return what it prints."""
        program = find_program("rabbitmqctl")
        assert program is not None, HOW_TO_INSTALL
        result = subprocess.run(
            self._system.command(program, "--quiet", *arguments),
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_LIMIT,
        )
        assert result.returncode == 0, f"rabbitmqctl {' '.join(arguments)}: {result.stdout}{result.stderr}"
        return result.stdout

    def start(self) -> None:
        """Start it and wait until it takes connections; running already, do nothing."""
        if self._broker is not None:
            return
        program, epmd = find_program("rabbitmq-server"), find_program("epmd")
        assert program is not None, HOW_TO_INSTALL
        assert epmd is not None, "epmd of Erlang is not in PATH"
        if self._epmd is None:
            # Our own port mapper in the foreground, or the first node would leave one running as a daemon.
            self._epmd = Process(self._system.command(epmd), output=self._directory / "epmd.out", env=self._environment)
        output = self._directory / "server.out"
        self._broker = Process(self._system.command(program), output=output, env=self._environment, cwd=self._directory)
        self._broker.await_ready(self._answers, within=_START_LIMIT, what="RabbitMQ takes connections")

    def stop(self) -> None:
        """Stop it in good order and wait until it is gone."""
        if self._broker is not None:
            os.kill(self.node_pid, signal.SIGTERM)  # the node's own; the script around it would call rabbitmqctl
            self._broker.wait(within=_START_LIMIT)
            self._end_broker()

    def settle(self) -> None:
        """Have it write down what was declared: killed within 3 s of a declaration it may have forgotten the queue.

        Its answer to a declaration does not wait for the disk. RabbitMQ 3.10.8, killed 0.3 s after a queue was
        declared, had forgotten it, with the confirmed messages in it, in 2 of 6 trials; after this in none.
        """
        self.ctl("eval", "ok = mnesia:sync_log().")

    def kill(self) -> None:
        """Kill -9 it; see :meth:`settle`."""
        self._end_broker()

    def pause(self) -> None:
        """SIGSTOP it: connections stay open and nobody answers."""
        os.kill(self.node_pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT it."""
        os.kill(self.node_pid, signal.SIGCONT)

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """Raise the memory alarm for a while: it accepts no messages."""
        alarms = self.log.count(_ALARM)
        self.ctl("set_vm_memory_high_watermark", "absolute", "1")
        try:
            eventually(lambda: self.log.count(_ALARM) > alarms, within=10, what="the alarm is raised")
            yield
        finally:
            self.ctl("set_vm_memory_high_watermark", "0.4")

    def close(self) -> None:
        """Kill everything and remove its data."""
        atexit.unregister(self.close)
        self._end_broker()
        if self._epmd is not None:
            self._epmd.close()
            self._epmd = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _end_broker(self) -> None:
        if self._broker is not None:
            family = [self._broker.pid, *children_of(self._broker.pid)]
            self._broker.close()
            self._broker = None
            eventually(lambda: not any(map(process_exists, family)), within=_START_LIMIT, what="RabbitMQ ends")

    def _answers(self) -> bool:
        try:
            with self._connection():
                return True
        except (OSError, amqp.AMQPError):
            return False

    def _connection(self) -> amqp.Connection:
        return amqp.Connection(f"127.0.0.1:{self._port}", connect_timeout=5, read_timeout=5, write_timeout=5)

    def _create_vhosts(self, names: list[str]) -> None:
        literals = ", ".join(f"<<{list(name.encode())}>>".replace("[", "").replace("]", "") for name in names)
        self.ctl("eval", _CREATE_VHOSTS.format(names=literals))

    def _write_configuration(self) -> dict[str, str]:
        directory = self._directory
        configuration = directory / "rabbitmq.conf"
        configuration.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self._port}\n"
            "disk_free_limit.absolute = 10MB\n"
            "log.console = false\n"
            "log.file.level = info\n"
        )
        plugins = directory / "enabled_plugins"
        plugins.write_text("[].\n")
        cookie = directory / ".erlang.cookie"
        cookie.write_text(os.urandom(16).hex())
        cookie.chmod(0o400)
        epmd_port, distribution_port = free_port(), free_port()
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "HOME": os.fspath(directory),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": os.fspath(configuration),
            "RABBITMQ_ENABLED_PLUGINS_FILE": os.fspath(plugins),
            "RABBITMQ_MNESIA_BASE": os.fspath(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": os.fspath(directory / "log"),
            "RABBITMQ_PID_FILE": os.fspath(directory / "node.pid"),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # One scheduler thread and no busy waiting would be gentler; tests measure, so the default stays.
        }
