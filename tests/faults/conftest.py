"""Set-ups for tests that break things: each test has its own, for it may be left in pieces."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Final
from uuid import UUID

import pytest

from tests.support.processes import eventually
from tests.support.stack import Stack

ROUNDS: Final = int(os.environ.get("FAULT_ROUNDS", "0"))
"""How often `make faults` repeats each fault; 0 in `make test`, where each test names a small number."""

StackFactory = Callable[..., Stack]

SOURCES = 20_000
ALL = range(1, SOURCES + 1)


def a_big_task(stack: Stack) -> int:
    stack.application.add_sources(SOURCES)
    stack.application.add_task(1, ALL)
    return 1


def await_published(stack: Stack, run_id: UUID, count: int) -> None:
    """Wait until a run has published so many, or is over."""

    def enough() -> bool:
        run = stack.run(run_id)
        return run is not None and (run["published"] >= count or run["finished_at"] is not None)

    eventually(enough, within=60, what=f"{count} published")


def rounds(few: int) -> range:
    """Return the rounds of a fault: a few in `make test`, many in `make faults`."""
    return range(ROUNDS or few)


@pytest.fixture
def random() -> Random:
    """Chance that can be repeated: the seed is printed, and FAULT_SEED sets it."""
    seed = int(os.environ.get("FAULT_SEED", "20261123"))
    print(f"FAULT_SEED={seed}")  # noqa: T201 -- pytest shows it with a failure
    return Random(seed)


@pytest.fixture
def make_rabbitmq(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[StackFactory]:
    """Make set-up 2 with given settings."""
    yield from _factory(lambda settings: Stack.on_rabbitmq(database_url, broker_url, tmp_path, **settings))


@pytest.fixture
def make_embedded(tmp_path: Path) -> Iterator[StackFactory]:
    """Make set-up 1 with given settings."""
    yield from _factory(lambda settings: Stack.embedded(tmp_path, **settings))


@pytest.fixture(params=["rabbitmq", "embedded"])
def make_stack(request: pytest.FixtureRequest) -> StackFactory:
    """Make each of the set-ups in turn."""
    factory: StackFactory = request.getfixturevalue(f"make_{request.param}")
    return factory


def _factory(make: Callable[[dict[str, str]], Stack]) -> Iterator[StackFactory]:
    made: list[Stack] = []

    def prepared(**settings: str) -> Stack:
        stack = make(settings)
        made.append(stack)
        stack.prepare()
        return stack

    yield prepared
    for stack in made:
        stack.close()
