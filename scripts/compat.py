#!/usr/bin/env python3
"""Both ends of the supported range: the acceptance suite and a short fault run on the oldest servers and on new ones.

    make compat

Servers that this machine does not have are put into .compat (scripts/debian.sh; once, as root). Writes
docs/compatibility.md; ends with 1 unless every test passed. ``make compat ARGS='--only 4/17'`` runs one combination
and writes nothing.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self
from xml.etree import ElementTree as ET

from tests.support.installations import system_with_postgres, system_with_rabbitmq
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer

ROOT: Final = Path(__file__).parents[1]
REPORT: Final = ROOT / "docs/compatibility.md"
EMBEDDED: Final = "embedded"

SUITES: Final[Mapping[str, Sequence[str]]] = {
    "acceptance": ["tests/e2e", "--ignore=tests/e2e/test_demo.py"],
    "ledger and queues": [
        f"tests/integration/test_{name}.py"
        for name in ("firing", "ledger", "migrations", "publishers", "query_plans", "rights", "wake_ups")
    ],
    "faults": [
        "tests/faults/test_broker.py::test_restarts",
        "tests/faults/test_broker.py::test_accepts_nothing",
        "tests/faults/test_kills.py",
        "tests/faults/test_messages.py",
        "tests/faults/test_postgresql.py::test_restarts",
        "tests/faults/test_postgresql.py::test_sessions_are_terminated",
        "tests/faults/test_queues.py",
    ],
}
"""What runs on each combination: arguments of pytest."""

DEBIANS: Final = {
    "rabbitmq-server": {"3.10": "bookworm", "4": "trixie"},
    "postgresql": {"15": "bookworm", "17": "trixie"},
}
"""Where a version comes from if this machine does not have it."""


@dataclass(frozen=True, slots=True)
class Combination:
    """Versions of the two servers: RabbitMQ's by its beginning, PostgreSQL's major or ``embedded`` for the wheel's."""

    rabbitmq: str
    postgres: str

    def __str__(self) -> str:
        return f"{self.rabbitmq}/{self.postgres}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which tests find these servers."""
        return {"TEST_RABBITMQ": self.rabbitmq, "TEST_POSTGRES": "" if self.postgres == EMBEDDED else self.postgres}


COMBINATIONS: Final = [
    Combination("3.10", "15"),
    Combination("3.10", EMBEDDED),
    Combination("4", "15"),
    Combination("4", "17"),
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one suite on one combination."""

    passed: int
    skipped: int
    failed: Sequence[str]
    seconds: float

    @classmethod
    def of(cls, report: Path, status: int) -> Self:
        """Read pytest's report and exit status; no report or no test at all counts as a failure."""
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []  # noqa: S314 -- pytest wrote it
        failed = [name for case in cases if (name := _failure(case))]
        skipped = sum(case.find("skipped") is not None for case in cases)
        if status != 0 and not failed:
            failed.append(f"pytest ended with {status}")
        seconds = sum(float(case.get("time", 0)) for case in cases)
        return cls(len(cases) - skipped - len(failed), skipped, failed, seconds)

    def __str__(self) -> str:
        counts = {"passed": self.passed, "skipped": self.skipped, "**failed**": len(self.failed)}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count) + f" ({self.seconds:.0f} s)"


def install(combinations: Sequence[Combination]) -> None:
    """Make the folders with those servers that this machine does not have."""
    missing: defaultdict[str, set[str]] = defaultdict(set)
    for combination in combinations:
        try:
            system_with_rabbitmq(combination.rabbitmq)
        except LookupError:
            missing[DEBIANS["rabbitmq-server"][combination.rabbitmq]].add("rabbitmq-server")
        try:
            if combination.postgres != EMBEDDED:
                system_with_postgres(combination.postgres)
        except LookupError:
            missing[DEBIANS["postgresql"][combination.postgres]].add(f"postgresql-{combination.postgres}")
    for suite, packages in missing.items():
        command = [os.fspath(ROOT / "scripts/debian.sh"), suite, *sorted(packages)]
        if subprocess.run(command, check=False).returncode != 0:  # noqa: S603 -- our own script
            sys.exit(1)  # it has said why


def versions(combination: Combination) -> tuple[str, str]:
    """Return what RabbitMQ and PostgreSQL say they are."""
    with selected(combination), RabbitMQServer() as rabbitmq, PostgresServer() as postgres:
        return rabbitmq.version, postgres.version


@contextmanager
def selected(combination: Combination) -> Iterator[None]:
    """Have servers that this process starts be of a combination."""
    before = dict(os.environ)
    os.environ.update(combination.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(combination: Combination, suite: str) -> Outcome:
    """Run a suite with pytest, which writes to our output."""
    # The wheel's server is the same in each combination, and so is what runs on nothing else.
    choice = [] if combination.postgres == EMBEDDED else ["-k", "not embedded"]
    # In CI a test that cannot run fails: here, too, skipping would prove nothing.
    environment = os.environ | combination.environment | {"CI": "true"}
    for ours in ("FAULTS", "FAULT_EVIDENCE"):  # the short version, and no page of it
        environment.pop(ours, None)
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", f"--junit-xml={report}", *SUITES[suite], *choice]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode  # noqa: S603 -- pytest
        return Outcome.of(report, status)


def _failure(case: ET.Element) -> str | None:
    if case.find("failure") is None and case.find("error") is None:
        return None
    return f"{case.get('classname', '')}.{case.get('name', '')}"


def report_on(results: Mapping[Combination, tuple[tuple[str, str], Mapping[str, Outcome]]]) -> str:
    """Return the document."""
    lines = [
        "# Compatibility",
        "",
        "Written by `make compat`, which runs the tests below on both ends of the supported range. The servers are",
        "Debian's packages, except PostgreSQL 18, which is the wheel's; the versions are what they say themselves.",
        f"Last run: {datetime.now(UTC):%Y-%m-%d}, commit {_commit()}, Python {platform.python_version()}.",
        "",
        f"| RabbitMQ | PostgreSQL | {' | '.join(SUITES)} |",
        f"|---|---|{'---|' * len(SUITES)}",
        *(f"| {' | '.join([*servers, *map(str, outcomes.values())])} |" for servers, outcomes in results.values()),
        "",
        "| what | `pytest` |",
        "|---|---|",
        *(f"| {suite} | `{' '.join(arguments)}` |" for suite, arguments in SUITES.items()),
        "",
        "Each fault has its short version here; `make faults` repeats all of them on one pair of servers. Tests of the",
        "embedded set-up, which needs no RabbitMQ and has one PostgreSQL, run once.",
    ]
    failures = [
        f"- RabbitMQ {rabbitmq}, PostgreSQL {postgres}: `{name}`"
        for (rabbitmq, postgres), outcomes in results.values()
        for outcome in outcomes.values()
        for name in outcome.failed
    ]
    return "\n".join([*lines, *(["", "## Failed", "", *failures] if failures else []), ""])


def main() -> None:
    """Read the command line, run, report."""
    parser = argparse.ArgumentParser(prog="make compat", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", choices=list(map(str, COMBINATIONS)), help="one combination of RabbitMQ and PostgreSQL; no report"
    )
    only = parser.parse_args().only
    chosen = [combination for combination in COMBINATIONS if only in {None, str(combination)}]
    install(chosen)
    results = {}
    for combination in chosen:
        servers = versions(combination)
        outcomes = {}
        for suite in SUITES:
            say(f"== RabbitMQ {servers[0]}, PostgreSQL {servers[1]}: {suite}")
            outcomes[suite] = run(combination, suite)
        results[combination] = servers, outcomes
    text = report_on(results)
    if only is None:
        REPORT.write_text(text)
    say(text)
    if any(outcome.failed for _, outcomes in results.values() for outcome in outcomes.values()):
        sys.exit(1)


def say(text: str) -> None:
    """Print, in order with what pytest prints."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _commit() -> str:
    git = ["git", "describe", "--always", "--dirty=, changed"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"  # noqa: S603 -- no input of anybody


if __name__ == "__main__":
    main()
