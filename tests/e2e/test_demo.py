"""``orchestrator demo`` as its user runs it: the story ends well, and however it ends nothing is left."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

import pytest

from tests.support.kafka import KafkaServer
from tests.support.processes import Process, eventually, guard_group, release_group

DEMO: Final = [sys.executable, "-m", "orchestrator", "demo"]
WHOLE_STORY: Final = 200.0
BEGUN: Final = re.compile(r"settings, data and logs are in (\S+)")
OK: Final = re.compile(r"OK: (\d+) expected, (\d+) in the ledger, (\d+) in the inbox, 0 lost, 0 unasked for")
PENDING: Final = re.compile(r"the ledger at that moment: [\d,]+ published, ([\d,]+) pending")

pytestmark = pytest.mark.timeout(WHOLE_STORY + 60)


def environment(**more: str) -> dict[str, str]:
    """Return ours, with the package wherever the demo is started."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("ORCHESTRATOR_")}
    return ours | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"} | more


def directory_of(text: str) -> Path | None:
    """Return the directory that a demo says everything is in, once it has."""
    begun = BEGUN.search(text)
    return Path(begun[1]) if begun else None


def processes_in(directory: Path) -> list[str]:
    """Return the command lines of all processes that have to do with a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or it is another account's
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(directory) in command or str((process / "cwd").readlink()).startswith(str(directory)):
                found.append(command)
    return found


def assert_nothing_is_left(directory: Path) -> None:
    """Wait for the little that a demo which was killed leaves to its guard."""
    eventually(lambda: not processes_in(directory), within=15, what="no process of the demo is left")
    eventually(lambda: not directory.exists(), within=15, what="the directory is gone")


def test_the_story_ends_well_whatever_the_users_settings_are_and_leaves_nothing(tmp_path: Path) -> None:
    # Not below pytest's own folder: as root the server's account may not pass through that.
    temporary = Path(mkdtemp(prefix="demo-"))
    temporary.chmod(0o711)
    (tmp_path / "orchestrator.toml").write_text("database_url = 'postgresql://127.0.0.1:1/none'")
    env = environment(
        ORCHESTRATOR_DATABASE_URL="postgresql://127.0.0.1:1/none",
        ORCHESTRATOR_BROKER_URL="amqp://127.0.0.1:1",
        ORCHESTRATOR_NO_SUCH_SETTING="1",
        CELERY_BROKER_URL="amqp://127.0.0.1:1",
        PGSERVICE="none",
        TMPDIR=str(temporary),
    )

    with Process([*DEMO, "--once"], output=tmp_path / "demo.txt", env=env, cwd=tmp_path) as process:
        assert process.wait(within=WHOLE_STORY) == 0, process.text()

    told = process.text()
    summary, killed, directory = OK.search(told), PENDING.search(told), directory_of(told)
    assert summary is not None, told
    assert len(set(summary.groups())) == 1, told
    assert int(summary[1]) > 2_500
    assert killed is not None, told
    assert int(killed[1].replace(",", "")) > 0, "the worker was not in the middle"
    assert re.search(r"first crawl dispatched \d+\.\d s after start", told)
    assert "25 duplicates on the wire" in told
    assert directory is not None
    assert not processes_in(directory)
    temporary.rmdir()  # which only works where nothing was left


def test_the_story_on_a_given_kafka_ends_well_and_leaves_no_topic(kafka_server: KafkaServer, tmp_path: Path) -> None:
    before = kafka_server.topics()
    command = [*DEMO, "--once", "--sources", "400", "--extraction", kafka_server.secure_url("admin")]
    env = environment(ORCHESTRATOR_KAFKA__CA_FILE=str(kafka_server.certificate))

    with Process(command, output=tmp_path / "demo.txt", env=env, cwd=tmp_path) as process:
        process.await_line("are on their way", within=WHOLE_STORY)
        (topic,) = kafka_server.topics().keys() - before
        assert process.wait(within=WHOLE_STORY) == 0, process.text()

    told = process.text()
    summary = OK.search(told)
    assert summary is not None, told
    assert len(set(summary.groups())) == 1, told
    assert f"extraction messages go to topic {topic} on Kafka at localhost:" in told
    assert "all recognised" in told
    assert "admin-secret" not in told
    eventually(lambda: kafka_server.topics() == before, within=10, what="the topic is gone")


def test_a_kafka_that_is_away_is_one_clear_sentence(kafka_installed: None, tmp_path: Path) -> None:  # noqa: ARG001 -- it skips
    command = [*DEMO, "--once", "--extraction", "kafka://127.0.0.1:1"]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "kafka://127.0.0.1:1 cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "settings, data and logs are in"),
        (signal.SIGINT, "first crawl dispatched"),
        (signal.SIGTERM, "are on their way"),
        (signal.SIGKILL, "what a failure looks like"),
    ],
)
def test_nothing_is_left_of_a_demo_that_is_ended_in_the_middle(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    with Process([*DEMO, "--once"], output=tmp_path / "demo.txt", env=environment(), cwd=tmp_path) as process:
        process.await_line(moment, within=WHOLE_STORY)
        process.send(number)
        code = process.wait(within=30)

    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in process.text()
    directory = directory_of(process.text())
    assert directory is not None
    assert_nothing_is_left(directory)


def test_on_a_terminal_everything_stays_up_for_the_user_until_ctrl_c(tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    command = [*DEMO, "--sources", "400"]
    child = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, env=environment(TERM="xterm"), cwd=tmp_path, start_new_session=True
    )
    guard_group(child.pid)
    os.close(terminal)
    try:
        told = read_until(ours, lambda text: "tail -f" in text)
        config = re.search(r"ORCHESTRATOR_CONFIG=(\S+orchestrator\.toml)", told)
        assert config is not None, told
        env = environment(ORCHESTRATOR_CONFIG=config[1])
        run = [sys.executable, "-m", "orchestrator", "run", "3", "--wait"]
        assert subprocess.run(run, env=env, cwd=tmp_path, timeout=60, check=False).returncode == 0
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        release_group(child.pid)
        os.close(ours)
    assert_nothing_is_left(Path(config[1]).parent)


def read_until(terminal: int, complete: Callable[[str], bool]) -> str:
    """Return what was written to a terminal, without colours, as soon as it is complete."""
    text = ""
    while not complete(text):
        text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(terminal, 65_536).decode(errors="replace"))
    return text
