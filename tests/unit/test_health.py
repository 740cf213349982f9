"""What a node knows of its own health."""

import threading

import pytest

from orchestrator.errors import BrokerBlockedError
from orchestrator.health import Attendance, BrokerWatch
from tests.support.processes import eventually


class Office:
    """Whose attendance is watched by a clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.attendance = Attendance(limit=15, clock=lambda: self.now)

    def at(self, now: float) -> tuple[str | None, bool]:
        """Return the problem at a time, and whether it is stuck."""
        self.now = now
        return self.attendance.problem, self.attendance.stuck


ABSENT = "its consumer has not looked for messages for more than 15 s"


def test_a_consumer_is_present_as_long_as_it_looks_for_messages() -> None:
    office = Office()
    assert office.at(100) == ("it has not begun to consume", False)

    office.attendance.present()
    assert office.at(115) == (None, False)
    assert office.at(116) == (ABSENT, False)

    office.attendance.present()
    assert office.at(117) == (None, False)


def test_one_that_is_silent_for_long_is_stuck_but_not_one_that_says_why() -> None:
    office = Office()
    office.attendance.present()
    assert office.at(31) == (ABSENT, True)

    office.attendance.absent("it cannot connect")
    assert office.at(100) == ("it cannot connect", False)


def test_the_broker_is_asked_again_and_again_and_what_is_wrong_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.health.PROBE_EVERY", 0.01)
    answers = iter([None, BrokerBlockedError("low on memory"), RuntimeError("a bug"), None])
    anew: list[bool] = []
    going_on = threading.Semaphore(0)

    def ask(on_a_new_connection: bool) -> None:  # noqa: FBT001 -- a plain callback
        going_on.acquire()
        anew.append(on_a_new_connection)
        if answer := next(answers, None):
            raise answer

    watch = BrokerWatch(ask)
    watch.start()
    for degraded in (None, "low on memory", "RuntimeError; see its log", None):
        going_on.release()
        eventually(lambda: watch.degraded == degraded, within=10, what=f"degraded: {degraded}")  # noqa: B023 -- called at once
    eventually(lambda: len(anew) == 4, within=10, what="four questions")
    watch.stop()
    going_on.release()

    assert anew[:4] == [True, False, False, True]
