"""Readiness, as a supervisor asks for it: false while a process does not do its work, true again once it does."""

import pytest

from tests.faults.conftest import StackFactory
from tests.support.evidence import Evidence
from tests.support.operators import NOTICED, command
from tests.support.processes import Process, eventually
from tests.support.stack import Stack


@pytest.mark.fault("a worker and a beat frozen (SIGSTOP): they are not ready, and ready again once thawed")
def test_who_is_frozen_is_not_ready(make_rabbitmq: StackFactory, evidence: Evidence) -> None:
    stack = make_rabbitmq()
    worker, beat = stack.worker(), stack.start("celery", "-A", "orchestrator.celery_app", "beat")
    await_ready(stack, worker, 0)
    await_ready(stack, beat, 0)

    for process in (worker, beat):
        process.freeze()
        evidence.trials += 1
    for process in (worker, beat):
        await_ready(stack, process, 1)
    assert command(stack, "ready").code == 1

    for process in (worker, beat):
        process.thaw()
    with evidence.recovery():
        for process in (worker, beat):
            await_ready(stack, process, 0)
    assert command(stack, "ready").code == 0


def await_ready(stack: Stack, process: Process, code: int) -> None:
    """Wait until the readiness probe of a process exits like this."""

    def answered() -> bool:
        found = stack.query("SELECT name FROM orchestrator.nodes WHERE name LIKE %s", f"%:{process.pid}%")
        return bool(found) and command(stack, "ready", "--node", found[0]["name"]).code == code

    eventually(answered, within=NOTICED, what=f"`orchestrator ready` of process {process.pid} exits {code}", every=1)
