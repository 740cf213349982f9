"""What the fault tests have to show for themselves, as a table: docs/reliability.md.

Each test notes its trials in an :class:`Evidence`; with ``FAULT_EVIDENCE`` naming a directory, every test has a file
there from the moment it is collected, and ``python -m tests.support.evidence DIRECTORY`` prints the page.
"""

import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

from tests.support.oracle import FEW, RESUMED, Verdict
from tests.support.rounds import LONG

DIRECTORY: Final = "FAULT_EVIDENCE"


@dataclass
class Evidence:
    """The record of one fault.

    Attributes:
        fault: what is done to the system, in words.
        test: its test's node id.
        seed: repeats the run.
        trials: how often it was done; a test that does not count did it once.
        messages: on the wire, copies included.
        duplicates: copies among them, each with the message id of the first.
        few: the share of duplicates that a long run must stay below; a test that provokes more says why.
        judged: whether the oracle was asked.
        recoveries: seconds from the end of each fault until work had resumed, or was done.
        ends: seconds from each SIGTERM until the process had ended.
        notes: whatever else was measured.
        outcome: passed, failed or skipped; empty of a test that did not come to its end. Lost and unexpected messages
            fail a test at once.
        seconds: how long all of it took.
    """

    fault: str
    test: str
    seed: int
    trials: int = 0
    messages: int = 0
    duplicates: int = 0
    few: float = FEW
    judged: bool = False
    recoveries: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outcome: str = ""
    seconds: float = 0.0

    @contextmanager
    def recovery(self) -> Iterator[None]:
        """Time the block as one recovery: enter it when the fault ends, leave it when work has resumed."""
        began_at = time.monotonic()
        yield
        self.recovered(time.monotonic() - began_at)

    def recovered(self, seconds: float) -> None:
        """Note a recovery; one that took longer than is promised fails the test."""
        self.recoveries.append(seconds)
        assert seconds <= RESUMED, f"work must resume within {RESUMED:.0f} s of a fault's end; it took {seconds:.1f} s"

    def saw(self, verdict: Verdict) -> None:
        """Note what the oracle saw; call it once for each oracle, at the end, for an oracle counts all its runs."""
        self.messages += verdict.messages
        self.duplicates += verdict.duplicates
        self.judged = True

    def assert_few_duplicates(self) -> None:
        """Check, at the test's end, their share in a long run; of few messages it would mean nothing."""
        if LONG and self.messages:
            assert self.duplicates < self.few * self.messages, (
                f"{self.duplicates} duplicates among {self.messages} messages, {self.few:.0%} or more"
            )

    def note(self, text: str) -> None:
        """Note a measured fact for the table's last column."""
        self.notes.append(text)
        print(text)  # noqa: T201 -- pytest shows it with a failure, and with -rP

    def announce(self) -> None:
        """Write it before the test runs: one whose process dies, or that never begins, would leave nothing."""
        if (path := self._path()) and not path.exists():
            self.save()

    def save(self) -> None:
        """Write it where :data:`DIRECTORY` says, if it says so."""
        if path := self._path():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self)))

    def _path(self) -> Path | None:
        directory = os.environ.get(DIRECTORY)
        return Path(directory) / f"{quote(self.test, safe='')}.json" if directory else None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote."""
        return cls(**json.loads(path.read_text()))

    def row(self) -> str:
        """Return its row of the table."""
        slowest = f"{max(self.recoveries):.1f} s" if self.recoveries else "–"
        share = f"{self.duplicates:,} ({self.duplicates / self.messages:.2%})" if self.messages else "–"
        lost = {"passed": "0" if self.judged else "–", "failed": "**FAILED**", "skipped": "**SKIPPED**"}
        ends = [f"slowest end on SIGTERM {max(self.ends):.1f} s"] if self.ends else []
        file, _, name = self.test.partition("::")
        messages = f"{self.messages:,}" if self.messages else "–"
        cells = [
            self.fault,
            f"{self.trials:,}",
            messages,
            lost.get(self.outcome, "**NOT RUN**"),
            share,
            slowest,
            "; ".join(self.notes + ends),
            f"`{Path(file).name}::{name}`",
        ]
        return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |"


_HEAD: Final = """\
# Reliability: every fault, and what it cost

Generated by `make faults` (do not edit): each row is a test in `tests/faults` that does something bad to real workers,
beats, brokers and databases and, where messages go out, ends in the same oracle. The oracle knows which messages each
run owes, reads `extraction_queue` by a consumer that shares no code with the product, and the ledger by plain SQL:

- **lost**: owed or marked as published, and not on the wire; or on the wire, and not in the ledger; or with other ids
  in its body than the ledger has; or a run that is not over in time, counts that do not add up, a process that ended.
  Any of these fails the test; the column says so. “–”: the test passed without this oracle, for it is about no messages
  to the Extractor but about slots, calls, or ends of processes, and checks those. **NOT RUN**: the test did not come to
  its end, say because its process died; that, and **SKIPPED**, proves nothing.
- **duplicates**: copies on the wire. The wire is at-least-once: a crash between confirm and commit sends up to one
  batch again. Every copy has the `message_id` of the first, uuid5 of (run, data source), or the test fails; so it does
  with {few:.0%} duplicates or more, unless it says why more are to be expected.
- **slowest recovery**: seconds from the end of the fault until work had resumed or, where a run is followed to its
  end, was done. More than {resumed:.0f} s fail the test.

Repeat one: `make faults ARGS='-k NAME'`, with the seed `FAULT_SEED={seed}`. `make test` runs a short version of each.

{when}: {machine}. {outcomes}, {trials:,} trials, {messages:,} messages, {duplicates:,} duplicates
({share:.2%}), {minutes:.0f} minutes of tests (several at a time).

| fault | trials | messages | lost | duplicates | slowest recovery | measured besides | test |
|---|---|---|---|---|---|---|---|
"""


def page(records: list[Evidence]) -> str:
    """Return docs/reliability.md."""
    messages = sum(record.messages for record in records)
    duplicates = sum(record.duplicates for record in records)
    counts = Counter(record.outcome or "not run" for record in records)
    others = [f"{counts[outcome]} {outcome}" for outcome in ("failed", "skipped", "not run") if counts[outcome]]
    head = _HEAD.format(
        few=FEW,
        resumed=RESUMED,
        seed=", ".join(sorted({str(record.seed) for record in records})),
        when=datetime.now(UTC).date().isoformat(),
        machine=f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        outcomes=", ".join([f"{counts['passed']} of {len(records)} tests passed", *others]),
        trials=sum(record.trials for record in records),
        messages=messages,
        duplicates=duplicates,
        share=duplicates / max(messages, 1),
        minutes=sum(record.seconds for record in records) / 60,
    )
    return head + "\n".join(record.row() for record in records) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page([Evidence.load(path) for path in sorted(Path(sys.argv[1]).glob("*.json"))]))
