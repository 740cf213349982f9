"""A rolling upgrade: code and schema of one revision are replaced by those of the next, under load."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Final

import pytest

from tests.support.beats import Beats, Intervals, database_clock
from tests.support.evidence import Evidence
from tests.support.fleet import SHUTDOWN, Fleet
from tests.support.oracle import RESUMED, Oracle
from tests.support.processes import eventually
from tests.support.rounds import LONG, rounds
from tests.support.stack import Stack

PREVIOUS: Final = "c1e6a82"
"""The last commit of the revision before: 0002, whose code knows nothing of 0003."""

_ROOT: Final = Path(__file__).parents[2]


@pytest.fixture
def previous_source(tmp_path: Path) -> Path:
    """The code of the revision before, from the history."""
    git = shutil.which("git") or pytest.skip("there is no git to get the previous code by")
    archive = subprocess.run([git, "archive", PREVIOUS, "src"], cwd=_ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this is no clone with commit {PREVIOUS}, the code to upgrade from (git fetch --unshallow)")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path / "previous", filter="data")
    return tmp_path / "previous" / "src"


@pytest.fixture
def stack(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Stack]:
    """Set-up 2, its database still empty."""
    stack = Stack.on_rabbitmq(database_url, broker_url, tmp_path, DISPATCH__BATCH_SIZE="50", LOG__LEVEL="DEBUG")
    yield stack
    stack.close()


def migrate(stack: Stack) -> str:
    """Migrate as operators do; return the revision."""
    command = stack.start("orchestrator", "migrate")
    assert command.wait(within=60) == 0, command.text()
    (row,) = stack.query("SELECT version_num FROM orchestrator.alembic_version")
    revision: str = row["version_num"]
    return revision


@dataclass
class Site:
    """All that runs on one ledger: workers, beats, schedules, and runs by hand besides."""

    fleet: Fleet
    beats: Beats
    tasks: Intervals
    evidence: Evidence

    def goes_on(self) -> None:
        """Wait until every schedule has fired once more, and a run that begins now is over."""
        with self.evidence.recovery():
            run_id = self.fleet.crawl()
            self.tasks.await_fired(1)
            self.fleet.stack.await_run(run_id, within=RESUMED)

    def claimers_since(self, moment: datetime) -> set[str]:
        """Return the process ids of the beats that have claimed slots since then."""
        rows = self.fleet.stack.query("SELECT claimed_by FROM orchestrator.firings WHERE claimed_at > %s", moment)
        return {row["claimed_by"].split(":")[1] for row in rows}

    def replace_one_by_one(self, env: Mapping[str, str]) -> None:
        """SIGTERM each worker and beat in turn, which must end well, and start another in this environment."""
        self.fleet.env = env
        for worker in self.fleet.ready():
            self.fleet.crawl()
            self.evidence.ends.append(self.fleet.roll(worker))
            self.evidence.trials += 1
            self.fleet.await_ready()
            if LONG:
                self.goes_on()
        for beat in list(self.beats.running):
            self.evidence.ends.append(self.beats.terminate(beat))
            self.beats.await_sign_on(self.beats.spawn(env))
            self.evidence.trials += 1
        assert max(self.evidence.ends) < SHUTDOWN
        self.goes_on()


@pytest.mark.fault("rolling upgrade from the previous code and schema, under load: migrate, then one process at a time")
def test_a_rolling_upgrade_under_load(stack: Stack, previous_source: Path, evidence: Evidence) -> None:
    new_env = stack.env
    old_path = os.pathsep.join([os.fspath(previous_source), new_env["PYTHONPATH"]])
    few, many = range(1, 6), range(1, 1_001)

    stack.env = new_env | {"PYTHONPATH": old_path}
    before = migrate(stack)
    stack.application.create_tables()
    stack.application.add_sources(len(many))
    tasks = Intervals.add(stack, 20 if LONG else 10, [2 if LONG else 1], few)
    stack.execute("UPDATE crawl_tasks SET data_source_ids = %s WHERE id = 1", list(many))
    with Fleet(stack, 3 if LONG else 2) as fleet:
        site = Site(fleet, Beats(stack), tasks, evidence)
        site.beats.start(2 if LONG else 1)
        tasks.await_read()
        fleet.crawl()

        # New code waits for its schema. This worker takes no crawl runs, so that old code has them all.
        stack.env = new_env
        command = ("celery", "-A", "orchestrator.celery_app", "worker")
        early = stack.start(*command, "-n", "early@test", "-Q", "orchestrator.analysis")
        early.await_line("run `orchestrator migrate`", within=60)

        # The schema first, under everybody's feet: old code goes on, new code begins.
        after = migrate(stack)
        assert after > before, "the previous code has the same schema: the test proved nothing"
        migrated_at = database_clock(stack)
        with evidence.recovery():
            early.await_line("early@test ready.", within=RESUMED)
        for _ in rounds(1, 5):
            site.goes_on()
        assert site.claimers_since(migrated_at) == {str(beat.pid) for beat in site.beats.running}

        # Then the code.
        site.replace_one_by_one(new_env)
        tasks.disable()
        eventually(lambda: not fleet.unfinished(), within=RESUMED, what="every run is over")
        fleet.stop()
    assert early.running
    site.beats.await_signs_of_life()

    evidence.note(f"from revision {before} to {after}")
    runs = stack.query("SELECT id, task_id FROM orchestrator.runs")
    verdict = Oracle(stack).assert_holds({run["id"]: many if run["task_id"] == 1 else few for run in runs})
    evidence.saw(verdict)
    assert verdict.duplicates == 0, "an orderly stop sends nothing twice"
    # The oracle of slots wants the ledger to itself.
    stack.execute("DELETE FROM orchestrator.runs WHERE id = ANY(%s)", fleet.crawls)
    tasks.assert_each_slot_started_once()
