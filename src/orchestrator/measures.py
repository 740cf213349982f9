"""What this service counts: the catalogue of measures, and the memory that they are kept in.

Counting works in a prefork worker, whose children come and go. A process that is to be scraped calls :func:`begin`
before it forks; from then on it and its children count into memory that they share, each into a row of its own.
A child that is killed leaves its row as it is, and its successor goes on in it, so that no count ever goes down and
the memory never grows. Elsewhere, as on the command line, counting does nothing.

Names and labels are part of the interface, and every label's values are known beforehand: what is bounded here cannot
be anything else in Prometheus. How measures are exposed is the business of :mod:`orchestrator.metrics`.
"""

import fcntl
import mmap
import os
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, count, product
from typing import Final

from orchestrator.domain import TERMINAL, AttemptOutcome, DispatchState, FiringOutcome, RunKind, RunState, Trigger

PREFIX: Final = "orchestrator_"
ROWS: Final = 1024
"""Processes that can count at once; those beyond share the last row, and may lose some of what they count."""
_BYTES: Final = 8  # of a number

_cells: Final = count()


class _Family:
    """A measure under all its labels.

    Args:
        name: without the prefix.
        meaning: one sentence.
        labels: each label's values.
    """

    def __init__(self, name: str, meaning: str, labels: Mapping[str, Iterable[str]] | None = None) -> None:
        self.name = PREFIX + name
        self.meaning = meaning
        self.labels: Sequence[str] = tuple(labels or {})
        self._keys: Sequence[tuple[str, ...]] = list(product(*(labels or {}).values()))
        CATALOGUE.append(self)


CATALOGUE: Final[list[_Family]] = []
"""Every measure."""


class Counter(_Family):
    """How often something happened."""

    def __init__(self, name: str, meaning: str, labels: Mapping[str, Iterable[str]] | None = None) -> None:
        super().__init__(name, meaning, labels)
        self._cells = {key: next(_cells) for key in self._keys}

    def add(self, *labels: str, times: int = 1) -> None:
        """Count; what a newer version wrote into the ledger, and we have no label for, is passed over."""
        if _memory is not None and times and (cell := self._cells.get(labels)) is not None:
            _memory.add((cell, times))

    def read(self) -> list[tuple[tuple[str, ...], float]]:
        """Return the count under each combination of labels."""
        return [(key, _total(cell)) for key, cell in self._cells.items()]


class Histogram(_Family):
    """How long something took, in seconds."""

    def __init__(
        self, name: str, meaning: str, buckets: Sequence[float], labels: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        super().__init__(name, meaning, labels)
        self.buckets = buckets
        # Of each: one cell a bucket, one for what is beyond, one for the sum.
        self._cells = {key: [next(_cells) for _ in range(len(buckets) + 2)] for key in self._keys}

    def observe(self, seconds: float, *labels: str, times: int = 1) -> None:
        """Note so many observations of the same length."""
        if _memory is not None and times and (cells := self._cells.get(labels)) is not None:
            seconds = max(seconds, 0.0)
            _memory.add((cells[bisect_left(self.buckets, seconds)], times), (cells[-1], seconds * times))

    def read(self) -> list[tuple[tuple[str, ...], list[float], float]]:
        """Return under each combination of labels how many fell into each bucket or below, and their sum."""
        return [
            (key, list(accumulate(_total(cell) for cell in cells[:-1])), _total(cells[-1]))
            for key, cells in self._cells.items()
        ]


_MOMENTS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
_DELAYS: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3_600.0)
_DURATIONS: Final = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0)

RUNS_CREATED: Final = Counter(
    "runs_created_total", "Runs that were committed to the ledger.", {"kind": RunKind, "trigger": Trigger}
)
RUNS_FINISHED: Final = Counter(
    "runs_finished_total", "Runs that ended.", {"kind": RunKind, "outcome": sorted(TERMINAL)}
)
RUN_DURATION: Final = Histogram(
    "run_duration_seconds", "From a run's first start to its end.", _DURATIONS, {"kind": RunKind}
)
RUN_START_DELAY: Final = Histogram(
    "run_start_delay_seconds", "From when a run could have started to its first start.", _DELAYS, {"kind": RunKind}
)
DISPATCHES: Final = Counter(
    "dispatches_total",
    "Data sources whose message was published, or that were skipped.",
    {"outcome": (DispatchState.PUBLISHED, DispatchState.SKIPPED)},
)
PUBLISH_DURATION: Final = Histogram(
    "publish_duration_seconds", "Publishing one batch of extraction messages, confirms included.", _MOMENTS
)
PUBLISH_RETURNED: Final = Counter(
    "publish_returned_total", "Extraction messages that had no queue to go to; they are published again later."
)
DISCOVERY_ATTEMPTS: Final = Counter(
    "discovery_attempts_total", "Calls to the Discovery Service that ended.", {"outcome": AttemptOutcome}
)
DISCOVERY_DURATION: Final = Histogram(
    "discovery_duration_seconds", "One call to the Discovery Service, whatever its outcome.", _MOMENTS
)
SCHEDULE_FIRES: Final = Counter(
    "schedule_fires_total", "Records of what became of slots: of a slot, or of a range.", {"outcome": FiringOutcome}
)
SCHEDULE_LAG: Final = Histogram("schedule_lag_seconds", "From a slot's time to its claim, of those started.", _DELAYS)
SWEEPER_CORRECTIONS: Final = Counter(
    "sweeper_corrections_total",
    "Runs that the pulse had to wake or to complete because whoever should have did not.",
    {
        "from": (RunState.QUEUED, RunState.RUNNING),
        "to": (RunState.QUEUED, RunState.RUNNING, RunState.SUCCEEDED),
    },
)
DEAD_LETTERS: Final = Counter(
    "dead_letters_total", "Messages that no task can take, which were moved to orchestrator.dead."
)


class _Memory:
    """A row of numbers for each process, shared by a process and its descendants.

    Who owns a row holds a lock on it, which the kernel takes back when that process dies, however it does.
    """

    def __init__(self, cells: int) -> None:
        self._cells = cells
        self._file = os.memfd_create("orchestrator-measures")
        os.ftruncate(self._file, ROWS * cells * _BYTES)
        self._numbers = memoryview(mmap.mmap(self._file, 0)).cast("d")
        self.forget()

    def forget(self) -> None:
        """Make the next count take a row: a forked child owns none, and another thread may have held its lock."""
        self._begin: int | None = None
        self._lock = threading.Lock()

    def add(self, *amounts: tuple[int, float]) -> None:
        """Add to cells of this process's row."""
        with self._lock:
            if self._begin is None:
                self._begin = self._own_row() * self._cells
            for cell, amount in amounts:
                self._numbers[self._begin + cell] += amount

    def total(self, cell: int) -> float:
        """Return the sum of a cell over all processes, those that are gone included."""
        return sum(self._numbers[cell :: self._cells].tolist())

    def _own_row(self) -> int:
        for row in range(ROWS):
            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row)
                return row
        return ROWS - 1


_memory: _Memory | None = None


def begin() -> None:
    """Count from now on, in this process and in those that it forks."""
    global _memory  # noqa: PLW0603 -- a process has one
    if _memory is None:
        _memory = _Memory(next(_cells))


def _total(cell: int) -> float:
    return 0.0 if _memory is None else _memory.total(cell)


def _after_fork() -> None:
    if _memory is not None:
        _memory.forget()


os.register_at_fork(after_in_child=_after_fork)
