"""Counting in memory that forked processes share."""

import os
import signal
from collections.abc import Callable

import pytest

from orchestrator import measures
from orchestrator.measures import DEAD_LETTERS, DISCOVERY_DURATION


@pytest.fixture(autouse=True)
def counting() -> None:
    measures.begin()


def dead_letters() -> float:
    """Return how many dead letters were counted."""
    ((_, number),) = DEAD_LETTERS.read()
    return number


def in_a_child(work: Callable[[], object], *, then_die: bool) -> None:
    """Fork a child that works, and ends or is killed -9, and wait for it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            if then_die:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("then_die", [False, True])
def test_what_a_child_counted_stays_however_it_ended(*, then_die: bool) -> None:
    DEAD_LETTERS.add()
    before = dead_letters()

    for times in range(1, 6):
        in_a_child(lambda times=times: DEAD_LETTERS.add(times=times), then_die=then_die)  # type: ignore[misc] # mypy#17178

    assert dead_letters() == before + 15


def test_processes_that_count_at_once_do_not_overwrite_each_other() -> None:
    before = dead_letters()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            for _ in range(20_000):
                DEAD_LETTERS.add()
            os._exit(0)
        children.append(child)
    for _ in range(20_000):
        DEAD_LETTERS.add()
    for child in children:
        os.waitpid(child, 0)

    assert dead_letters() == before + 100_000


def test_successors_take_over_the_rows_of_the_dead() -> None:
    """Else a worker that replaces its children would run out of rows within a day."""
    before = dead_letters()

    for _ in range(measures.ROWS + 10):
        in_a_child(DEAD_LETTERS.add, then_die=False)

    memory = measures._memory  # noqa: SLF001 -- to see its rows
    assert memory is not None
    cells = len(memory._numbers) // measures.ROWS  # noqa: SLF001 -- the same
    rows = [memory._numbers[row * cells : (row + 1) * cells].tolist() for row in range(measures.ROWS)]  # noqa: SLF001
    assert sum(any(row) for row in rows) <= 10
    assert dead_letters() == before + measures.ROWS + 10


def test_a_time_that_went_backwards_is_none() -> None:
    ((_, counts, total),) = DISCOVERY_DURATION.read()

    DISCOVERY_DURATION.observe(-3.0)

    ((_, new_counts, new_total),) = DISCOVERY_DURATION.read()
    assert (new_counts[0], new_total) == (counts[0] + 1, total)


def test_labels_are_few_and_known_beforehand() -> None:
    for measure in measures.CATALOGUE:
        assert len(measure.read()) <= 20, measure.name  # type: ignore[attr-defined] # both kinds have it
        assert not {"run_id", "task_id", "url", "host", "node"} & set(measure.labels)
