#!/usr/bin/env python3
"""Both ends of the supported range: the acceptance suite and a short fault run on the oldest servers and on new ones.

    make compat

Servers that this machine does not have are put into .compat (scripts/debian.sh; once, as root), as is Kafka's oldest
client; tests fetch Kafka by themselves. Writes docs/compatibility.md; ends with 1 unless every test passed.
``make compat ARGS='--only 4/17'`` runs one combination, ``--only kafka`` all of Kafka's, and both write nothing.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self, TypeAlias
from xml.etree import ElementTree as ET

from tests.support.environments import make_environment
from tests.support.installations import FOLDERS, system_with_postgres, system_with_rabbitmq
from tests.support.kafka import KafkaServer
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer

ROOT: Final = Path(__file__).parents[1]
REPORT: Final = ROOT / "docs/compatibility.md"
EMBEDDED: Final = "embedded"
PINNED: Final = "pinned"

DEBIANS: Final = {
    "rabbitmq-server": {"3.10": "bookworm", "4": "trixie"},
    "postgresql": {"15": "bookworm", "17": "trixie"},
}
"""Where a version comes from if this machine does not have it."""


@dataclass(frozen=True, slots=True)
class Combination:
    """Versions to try together.

    Attributes:
        name: what ``--only`` calls it.
        environment: the variables by which tests find them.
        choice: which tests of suites that choose none, as an expression of pytest's.
    """

    name: str
    environment: Mapping[str, str]
    choice: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Combinations of the same parts.

    Attributes:
        parts: whose versions they are.
        suites: what runs on each combination: arguments of pytest.
        combinations: all of them.
        install: makes what this machine does not have of some.
        versions: says what the parts of the combination that is :func:`selected` say they are.
    """

    parts: Sequence[str]
    suites: Mapping[str, Sequence[str]]
    combinations: Sequence[Combination]
    install: Callable[[Sequence[Combination]], None]
    versions: Callable[[], Sequence[str]]


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


Result: TypeAlias = tuple[Sequence[str], Mapping[str, Outcome]]
"""What the parts of a combination say they are, and what became of each suite."""


# --- RabbitMQ and PostgreSQL -----------------------------------------------------------------------------------


def servers(rabbitmq: str, postgres: str) -> Combination:
    """RabbitMQ by its version's beginning; PostgreSQL by its major version, or ``embedded`` for the wheel's."""
    # The wheel's server is the same in each combination, and so is what runs on nothing else.
    version, choice = ("", "") if postgres == EMBEDDED else (postgres, "not embedded")
    return Combination(f"{rabbitmq}/{postgres}", {"TEST_RABBITMQ": rabbitmq, "TEST_POSTGRES": version}, choice)


def install_servers(combinations: Sequence[Combination]) -> None:
    """Make the folders with those servers that this machine does not have."""
    missing: defaultdict[str, set[str]] = defaultdict(set)
    for combination in combinations:
        rabbitmq, postgres = combination.environment["TEST_RABBITMQ"], combination.environment["TEST_POSTGRES"]
        try:
            system_with_rabbitmq(rabbitmq)
        except LookupError:
            missing[DEBIANS["rabbitmq-server"][rabbitmq]].add("rabbitmq-server")
        try:
            if postgres:
                system_with_postgres(postgres)
        except LookupError:
            missing[DEBIANS["postgresql"][postgres]].add(f"postgresql-{postgres}")
    for suite, packages in missing.items():
        command = [os.fspath(ROOT / "scripts/debian.sh"), suite, *sorted(packages)]
        if subprocess.run(command, check=False).returncode != 0:  # noqa: S603 -- our own script
            sys.exit(1)  # it has said why


def versions_of_servers() -> Sequence[str]:
    """Start both, and return what they say they are."""
    with RabbitMQServer() as rabbitmq, PostgresServer() as postgres:
        return rabbitmq.version, postgres.version


SERVERS: Final = Matrix(
    parts=("RabbitMQ", "PostgreSQL"),
    suites={
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
    },
    combinations=[servers("3.10", "15"), servers("3.10", EMBEDDED), servers("4", "15"), servers("4", "17")],
    install=install_servers,
    versions=versions_of_servers,
)


# --- Kafka and its client --------------------------------------------------------------------------------------

OLD: Final = "2.13"
"""The oldest confluent-kafka that pyproject.toml allows."""
OLD_CLIENT: Final = FOLDERS / f"confluent-kafka-{OLD}"
"""An environment that has it."""


def kafka(brokers: str, client: str) -> Combination:
    """Kafka and confluent-kafka by their versions, or ``pinned`` for the one that tests usually have."""
    environment = {"TEST_KAFKA": "" if brokers == PINNED else brokers}
    if client == OLD:
        # What stands there comes before what stands in our own environment.
        packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        environment["PYTHONPATH"] = os.fspath(OLD_CLIENT / packages)
    return Combination(f"kafka/{brokers}/{client}", environment)


def install_client(_: Sequence[Combination]) -> None:
    """Make the environment with the old client, anew; tests fetch the brokers by themselves."""
    shutil.rmtree(OLD_CLIENT, ignore_errors=True)
    make_environment(OLD_CLIENT, OLD_CLIENT.name)


def versions_of_kafka() -> Sequence[str]:
    """Start a broker, and return what it and the client say they are."""
    ask = "from confluent_kafka import libversion, version; print(version(), libversion()[0])"
    command = [sys.executable, "-c", ask]
    client = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603 -- ours
    with KafkaServer() as brokers:
        return brokers.version, *client


KAFKA: Final = Matrix(
    parts=("Kafka", "confluent-kafka", "librdkafka"),
    suites={
        "acceptance": ["tests/e2e", "--ignore=tests/e2e/test_demo.py", "-k", "kafka"],
        "publisher": ["tests/integration/test_kafka.py", "tests/integration/test_publishers.py", "-k", "kafka"],
        "faults": ["tests/faults/test_kafka.py", "tests/faults/test_kills.py", "-k", "kafka"],
    },
    combinations=[kafka("3.9.2", OLD), kafka("3.9.2", PINNED), kafka("4.0.2", PINNED), kafka(PINNED, OLD)],
    install=install_client,
    versions=versions_of_kafka,
)


# --- Running and reporting -------------------------------------------------------------------------------------


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


def run(combination: Combination, suite: Sequence[str]) -> Outcome:
    """Run a suite with pytest, which writes to our output."""
    # In CI a test that cannot run fails: here, too, skipping would prove nothing.
    environment = os.environ | combination.environment | {"CI": "true"}
    for ours in ("FAULTS", "FAULT_EVIDENCE"):  # the short version, and no page of it
        environment.pop(ours, None)
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", f"--junit-xml={report}", "-k", combination.choice, *suite]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode  # noqa: S603 -- pytest
        return Outcome.of(report, status)


def run_all(matrix: Matrix, combinations: Sequence[Combination]) -> list[Result]:
    """Run every suite on combinations; return, for each, the versions of its parts and what became of each suite."""
    matrix.install(combinations)
    results = []
    for combination in combinations:
        with selected(combination):
            versions = matrix.versions()
        outcomes = {}
        for name, suite in matrix.suites.items():
            say(f"== {named(matrix.parts, versions)}: {name}")
            outcomes[name] = run(combination, suite)
        results.append((versions, outcomes))
    return results


def _failure(case: ET.Element) -> str | None:
    if case.find("failure") is None and case.find("error") is None:
        return None
    return f"{case.get('classname', '')}.{case.get('name', '')}"


def document(parts: Sequence[str]) -> str:
    """Return the document."""
    lines = [
        "# Compatibility",
        "",
        "Written by `make compat`, which runs the tests below on both ends of the supported range. The servers are",
        "Debian's packages, except PostgreSQL 18, which is the wheel's, and Kafka, which is Maven's; the versions are",
        "what they say themselves.",
        "",
        *parts,
        "Each fault has its short version here; `make faults` repeats all of them on one set of servers. Tests of the",
        "embedded set-up, which needs no RabbitMQ and has one PostgreSQL, run once.",
        "",
    ]
    return "\n".join(lines)


def part_on(matrix: Matrix, results: Sequence[Result]) -> str:
    """Return the part of the document about a matrix."""
    failures = [
        f"- failed on {named(matrix.parts, versions)}: `{name}`"
        for versions, outcomes in results
        for outcome in outcomes.values()
        for name in outcome.failed
    ]
    lines = [
        f"## {matrix.parts[0]} and {matrix.parts[1]}",
        "",
        f"Last run: {datetime.now(UTC):%Y-%m-%d}, commit {_commit()}, Python {platform.python_version()}.",
        "",
        f"| {' | '.join([*matrix.parts, *matrix.suites])} |",
        f"|{'---|' * (len(matrix.parts) + len(matrix.suites))}",
        *(f"| {' | '.join([*versions, *map(str, outcomes.values())])} |" for versions, outcomes in results),
        "",
        *([*failures, ""] if failures else []),
        "| what | `pytest` |",
        "|---|---|",
        *(f"| {name} | `{' '.join(suite)}` |" for name, suite in matrix.suites.items()),
        "",
    ]
    return "\n".join(lines)


def named(parts: Sequence[str], versions: Sequence[str]) -> str:
    """Name a combination by its versions."""
    return ", ".join(f"{part} {version}" for part, version in zip(parts, versions, strict=True))


def main() -> None:
    """Read the command line, run, report."""
    parser = argparse.ArgumentParser(prog="make compat", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="combinations whose names begin so; no report")
    only = parser.parse_args().only
    chosen = [
        (matrix, combinations)
        for matrix in (SERVERS, KAFKA)
        if (combinations := [each for each in matrix.combinations if each.name.startswith(only)])
    ]
    if not chosen:
        parser.error(
            f"choose from {', '.join(each.name for matrix in (SERVERS, KAFKA) for each in matrix.combinations)}"
        )
    results = [(matrix, run_all(matrix, combinations)) for matrix, combinations in chosen]
    text = document([part_on(matrix, found) for matrix, found in results])
    if not only:
        REPORT.write_text(text)
    say(text)
    if any(outcome.failed for _, found in results for _, outcomes in found for outcome in outcomes.values()):
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
