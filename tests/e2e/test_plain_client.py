"""A plain Celery client, old or new, in an environment of its own, reaches both tasks in all four ways."""

import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.environments import CLIENTS, make_environment
from tests.support.stack import ANALYSIS_TASK, CRAWL_TASK, Stack


@pytest.fixture(scope="module", params=["celery-5.2", "celery-newest"])
def client_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that has this Celery, and nothing of ours."""
    python = make_environment(tmp_path_factory.mktemp(request.param), request.param)
    assert subprocess.run([python, "-I", "-c", "import orchestrator"], capture_output=True, check=False).returncode != 0
    return python


def send(python: Path, stack: Stack, way: str, task: str, arguments: str) -> UUID:
    assert stack.broker is not None
    command = [str(python), "-I", str(CLIENTS / "send.py"), stack.broker, way, task, arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={})
    assert done.returncode == 0, done.stderr
    return UUID(done.stdout.strip())


@pytest.mark.parametrize("way", ["queue", "object", "exchange", "routes"])
def test_both_tasks_by_name(client_python: Path, way: str, on_rabbitmq: Stack, discovery: DiscoveryServer) -> None:
    discovery.play(answer())
    on_rabbitmq.execute("INSERT INTO crawl_tasks (id, data_source_ids) VALUES (90001, '{}') ON CONFLICT DO NOTHING")

    crawl = send(client_python, on_rabbitmq, way, CRAWL_TASK, '{"task_id": 90001}')
    analysis = send(client_python, on_rabbitmq, way, ANALYSIS_TASK, '{"data_source_id": 5, "theme_name": "news"}')

    assert on_rabbitmq.await_run(crawl)["state"] == "succeeded"
    assert on_rabbitmq.await_run(analysis)["state"] == "succeeded"
