"""The one oracle: what must hold of a set-up after any fault, believed of nobody's word but the wire's and plain SQL's.

    oracle = Oracle(stack)
    … faults …
    verdict = oracle.assert_holds({run_id: range(1, 1_001)})

Ledger − wire = ∅, wire − ledger = ∅, one message id a (run, source) however many copies, bodies with the ledger's
ids, no duplicate row, every run over, counts add up. The wire is read by a consumer that shares no code with the
product, and message ids are worked out anew.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from uuid import UUID, uuid5

from tests.support.processes import eventually
from tests.support.stack import Stack

RESUMED: Final = 60.0
"""Seconds from the end of a fault in which work must have resumed."""
FEW: Final = 0.02
"""Of all messages on the wire: what duplicates must be less than."""
_IN_FLIGHT: Final = 10.0
"""Seconds in which what is on the wire is committed."""

_UNSETTLED: Final = """
SELECT id, kind, state, error_code, error_message, total, published, skipped FROM orchestrator.runs AS run
WHERE state NOT IN ('succeeded', 'failed', 'canceled')
   OR (SELECT count(*) FROM orchestrator.dispatches WHERE run_id = run.id AND state = 'pending') > 0
ORDER BY created_at LIMIT 10
"""
_MISSING: Final = """
SELECT id FROM unnest(%s::uuid[]) AS asked (id) WHERE id NOT IN (SELECT id FROM orchestrator.runs) LIMIT 5
"""
_MISCOUNTED: Final = """
SELECT run.id, run.total, run.published, run.skipped, rows.* FROM orchestrator.runs AS run CROSS JOIN LATERAL (
    SELECT count(*) AS rows, count(DISTINCT data_source_id) AS sources,
           count(*) FILTER (WHERE state = 'published') AS marked, count(*) FILTER (WHERE state = 'skipped') AS passed
    FROM orchestrator.dispatches WHERE run_id = run.id
) AS rows
WHERE run.materialized_at IS NOT NULL
  AND (rows, sources, marked, passed) IS DISTINCT FROM (run.total, run.total, run.published, run.skipped)
LIMIT 10
"""
_PUBLISHED: Final = """
SELECT run.id AS run_id, run.task_id, array_agg(sent.data_source_id) AS sources,
       array_agg(sent.crawl_config_id) AS configs
FROM orchestrator.dispatches AS sent JOIN orchestrator.runs AS run ON run.id = sent.run_id
WHERE sent.state = 'published' GROUP BY run.id
"""


class Ids(NamedTuple):
    """What a message says in its body, besides its run."""

    source: int
    config: int
    task: int


@dataclass(frozen=True)
class Verdict:
    """What the oracle saw.

    Attributes:
        messages: on the wire, copies included.
        duplicates: of these, how many were not the first of their (run, source).
    """

    messages: int
    duplicates: int


@dataclass
class Oracle:
    """Judges one set-up; reads its wire as it goes, so that queues need not grow."""

    stack: Stack
    _wire: defaultdict[UUID, Counter[Ids]] = field(default_factory=lambda: defaultdict(Counter))
    _wrong_ids: list[str] = field(default_factory=list)

    def read_wire(self) -> None:
        """Take in what stands in the extraction queue; messages of RabbitMQ and Kafka are consumed."""
        if self.stack.broker is None and self.stack.kafka is None:
            # A table is only read: all of it anew.
            self._wire.clear()
        for message in self.stack.extractions():
            run_id = UUID(message.body["run_id"])
            body = message.body
            self._wire[run_id][Ids(message.source, body["crawl_config_id"], body["task_id"])] += 1
            if message.message_id != str(uuid5(run_id, str(message.source))):
                self._wrong_ids.append(f"{message.message_id} of run {run_id}, data source {message.source}")

    def assert_holds(self, expected: Mapping[UUID, Collection[int]], *, within: float = RESUMED) -> Verdict:
        """Wait until every run is over, then check them all.

        Args:
            expected: the data sources whose messages must be on the wire, of each run that must have succeeded. Of
                other runs (canceled, failed) the wire must have what the ledger says, neither less nor more.
            within: seconds from now in which every run must be over.
        """
        eventually(
            lambda: not self.stack.query(_UNSETTLED) and not self._missing(expected),
            within=within,
            what="every run is over" + self._unsettled(expected),
        )
        # Runs may go on beginning, as those of beats do: the ledger as it was before the wire was read must be on the
        # wire, and what is there must be in the ledger as it is afterwards.
        owed = self._published()
        self.read_wire()
        assert not self._wrong_ids, f"{len(self._wrong_ids)} wrong message ids: {self._wrong_ids[:5]}"
        assert not (miscounted := self.stack.query(_MISCOUNTED)), f"counts do not add up: {miscounted}"
        for run_id, published in owed.items():
            lost = published - self._wire.get(run_id, Counter()).keys()
            assert not lost, f"LOST: {_some(lost)} published but not on the wire, of {self.stack.run(run_id)}"
        with suppress(AssertionError):
            eventually(lambda: not self._strangers(), within=_IN_FLIGHT, what="batches on the wire are committed")
        assert not (strangers := self._strangers()), f"UNEXPECTED, on the wire and not in the ledger: {strangers}"
        for run_id, wanted in expected.items():
            run = self.stack.run(run_id)
            assert run is not None, f"LOST: there is no run {run_id}"
            assert run["state"] == "succeeded", run
            assert {ids.source for ids in owed.get(run_id, set())} == set(wanted), (
                f"run {run_id} published other sources than its task has"
            )
        messages = sum(copies.total() for copies in self._wire.values())
        return Verdict(messages, messages - sum(map(len, self._wire.values())))

    def _missing(self, expected: Iterable[UUID]) -> list[UUID]:
        """Return the first runs that nobody knows of so far: what was asked for may still stand in a queue."""
        rows = self.stack.query(_MISSING, list(expected))
        return [row["id"] for row in rows]

    def _strangers(self) -> dict[UUID, str]:
        ledger = self._published()
        strange = {run_id: sent.keys() - ledger.get(run_id, set()) for run_id, sent in self._wire.items()}
        return {run_id: _some(ids) for run_id, ids in strange.items() if ids}

    def _published(self) -> dict[UUID, set[Ids]]:
        return {
            row["run_id"]: {Ids(*pair, row["task_id"]) for pair in zip(row["sources"], row["configs"], strict=True)}
            for row in self.stack.query(_PUBLISHED)
        }

    def _unsettled(self, expected: Iterable[UUID]) -> str:
        rows, missing = self.stack.query(_UNSETTLED), self._missing(expected)
        return f"; at first these were not: {rows}, {missing}" if rows or missing else ""


def _some(messages: Collection[Ids]) -> str:
    return f"{len(messages)} messages ({', '.join(map(str, sorted(messages)[:5]))} …)"
