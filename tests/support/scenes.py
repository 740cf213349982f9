"""Set-ups that are used by one test after the other, for as long as each leaves them whole.

with scene.traffic as traffic:
    run_id = traffic.fan_out()
    … a fault, and its end …
scene.conclude(evidence)
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Generic, Self, TypeVar

import pytest

from tests.support.beats import database_clock
from tests.support.callers import Traffic, add_tasks, slots_owed
from tests.support.evidence import Evidence
from tests.support.oracle import FEW, RESUMED, Oracle, Verdict
from tests.support.postgres import PostgresServer
from tests.support.processes import Process
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack


def assert_all_run(processes: Collection[Process]) -> None:
    """Check that none of them has ended: nobody would start it again."""
    ended = [process for process in processes if not process.running]
    assert not ended, "\n".join(process.text()[-2000:] for process in ended)


class Scene:
    """A set-up with running workers, for one test after the other, as long as each leaves it whole.

    Args:
        stack: prepared, without tasks.
        sources: how many data sources the big task has.
        workers: how many workers to start.

    Attributes:
        traffic: its callers; what they are owed adds up from test to test.
        whole: whether the last test left it as it was.
    """

    def __init__(self, stack: Stack, *, sources: int, workers: int) -> None:
        assert stack.broker is not None
        add_tasks(stack, sources)
        self.stack = stack
        self.broker = stack.broker
        # As by an Extractor that was there first; else the first run would declare it, and a fault may come next.
        stack.declare_extraction_queue()
        self.workers = [stack.worker() for _ in range(workers)]
        self.oracle = Oracle(stack)
        self.traffic = Traffic(stack, workers=workers)
        self.whole = True
        self._beat: Process | None = None
        self._seen = Verdict(0, 0)

    def start_beat(self, settings: Mapping[str, str] | None = None) -> None:
        """Start a beat, until the test's end; slots between two tests are caught up."""
        self._beat = self.stack.start("celery", "-A", "orchestrator.celery_app", "beat", settings=settings)

    def replace_worker(self) -> None:
        """Have a worker end in good order, and start another, as an update does."""
        worker = self.workers.pop(0)
        assert worker.terminate(within=60) == 0, worker.text()[-2000:]
        self.workers.append(self.stack.worker())

    def await_resumed(self) -> None:
        """Wait until something asked for now is done, every worker consumes and the beat claims slots again."""
        ends_at = time.monotonic() + RESUMED
        self.traffic.await_resumed()
        if self._beat is not None:
            since = database_clock(self.stack)
            statement = "SELECT 1 FROM orchestrator.firings WHERE claimed_at > %s LIMIT 1"
            self._beat.await_ready(
                lambda: self.stack.query(statement, since),
                within=ends_at - time.monotonic(),
                what="a beat claims slots",
            )

    def conclude(self, evidence: Evidence) -> None:
        """Check what must hold once all is cured: nobody has ended, everybody works, nothing is lost."""
        self.await_resumed()
        assert_all_run([*self.workers, *([self._beat] if self._beat else [])])
        expected = dict(self.traffic.expected)
        if self._beat is not None:
            assert self._beat.terminate(within=30) == 0
            self._beat = None
            expected |= slots_owed(self.stack)
        verdict = self.oracle.assert_holds(expected)
        new = Verdict(verdict.messages - self._seen.messages, verdict.duplicates - self._seen.duplicates)
        self._seen = verdict
        evidence.saw(new)
        assert new.duplicates < FEW * new.messages, new
        self.whole = True


AnyScene = TypeVar("AnyScene", bound=Scene)


class Scenes(Generic[AnyScene]):
    """Hands out one scene again and again, and another once a test has failed.

    Args:
        postgres: where each has a database of its own.
        rabbitmq: where each has a vhost of its own.
        directories: where each has one for its processes.
        make: makes a scene of a set-up.
        set_up: makes a set-up of a database, a vhost and a directory: set-up 2 unless another is asked for.
        settings: of its processes.
    """

    def __init__(
        self,
        postgres: PostgresServer,
        rabbitmq: RabbitMQServer,
        directories: pytest.TempPathFactory,
        make: Callable[[Stack], AnyScene],
        set_up: Callable[..., Stack] = Stack.on_rabbitmq,
        **settings: str,
    ) -> None:
        self._servers = postgres, rabbitmq
        self._directories = directories
        self._make = make
        self._set_up = set_up
        self._settings = settings
        self._made: list[AnyScene] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for scene in self._made:
            scene.stack.close()

    def take(self) -> AnyScene:
        """Return a scene that is whole; :meth:`Scene.conclude` says that it still is."""
        if not self._made or not self._made[-1].whole:
            self._made.append(self._make(self._prepared()))
            self._servers[1].settle()
        scene = self._made[-1]
        scene.whole = False
        return scene

    def _prepared(self) -> Stack:
        postgres, rabbitmq = self._servers
        directory = self._directories.mktemp("scene")
        url = rabbitmq.vhost_url(rabbitmq.fresh_vhost())
        stack = self._set_up(postgres.create_database(directory.name), url, directory, **self._settings)
        stack.prepare()
        return stack
