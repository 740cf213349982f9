"""The brake on guessing API keys."""

import pytest

from orchestrator.api.security import FAILURES, REFILL, FailureLimit
from orchestrator.errors import TooManyFailuresError


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """Return what time it is."""
        return self.now


def test_an_address_that_fails_too_often_has_to_wait_and_no_other() -> None:
    clock = Clock()
    limit = FailureLimit(clock)
    for _ in range(FAILURES):
        limit.note("10.0.0.1")
    for _ in range(3):
        with pytest.raises(TooManyFailuresError) as refused:
            limit.note("10.0.0.1")
        assert 0 < refused.value.seconds <= REFILL
    limit.note("10.0.0.2")

    clock.now += REFILL
    limit.note("10.0.0.1")
    with pytest.raises(TooManyFailuresError):
        limit.note("10.0.0.1")
    clock.now += FAILURES * REFILL
    for _ in range(FAILURES):
        limit.note("10.0.0.1")


def test_it_remembers_no_more_addresses_than_fit() -> None:
    limit = FailureLimit(Clock())
    for number in range(10_100):
        limit.note(str(number))
    assert len(limit._drained_at) == 10_000  # noqa: SLF001 -- its size is what it promises
