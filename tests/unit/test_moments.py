"""Moments as people write them."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from orchestrator.cli.moments import read_moment
from orchestrator.errors import InvalidArgumentsError

BERLIN = ZoneInfo("Europe/Berlin")
SHANGHAI = ZoneInfo("Asia/Shanghai")
NOW = datetime(2026, 11, 23, 2, 30, tzinfo=UTC)  # 10:30 in Shanghai


@pytest.mark.parametrize(
    ("text", "zone", "moment"),
    [
        ("2026-11-23T03:00+08:00", BERLIN, "2026-11-22 19:00"),
        ("2026-11-23T03:00Z", SHANGHAI, "2026-11-23 03:00"),
        ("2026-11-23 03:00", SHANGHAI, "2026-11-22 19:00"),
        ("2026-11-23 03:00:30", SHANGHAI, "2026-11-22 19:00:30"),
        ("2026-11-23", SHANGHAI, "2026-11-22 16:00"),
        ("03:00", SHANGHAI, "2026-11-22 19:00"),
        ("3:00", SHANGHAI, "2026-11-22 19:00"),
        ("10:30:00", SHANGHAI, "2026-11-23 02:30"),
        ("10:30:01", SHANGHAI, "2026-11-22 02:30:01"),
        ("23:59", SHANGHAI, "2026-11-22 15:59"),
        ("2026-10-25 02:30", BERLIN, "2026-10-25 00:30"),  # shown twice: the first pass, as schedules fire
    ],
)
def test_what_is_meant(text: str, zone: ZoneInfo, moment: str) -> None:
    assert read_moment(text, zone, NOW) == datetime.fromisoformat(moment).replace(tzinfo=UTC)


def test_the_latest_time_of_day_passes_over_a_day_that_skips_it() -> None:
    now = datetime(2026, 3, 29, 12, 0, tzinfo=UTC)

    assert read_moment("02:30", BERLIN, now) == datetime(2026, 3, 28, 1, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is no time; write for instance"),
        ("yesterday", "is no time"),
        ("25:00", "is no time"),
        ("2026-11-31", "is no time"),
        ("0001-01-01T00:00+14:00", "is no time"),
        ("1969-12-31T23:59Z", "is not between 1970 and 2199"),
        ("9999-12-31T00:00Z", "is not between 1970 and 2199"),
        ("2026-03-29 02:30", "there is no 2026-03-29 02:30 in Europe/Berlin: the clock skips it"),
    ],
)
def test_what_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgumentsError, match=complaint):
        read_moment(text, BERLIN, NOW)
