"""Moments as people write them on the command line."""

import re
from datetime import UTC, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from orchestrator.errors import InvalidArgumentsError

HOW_TO_WRITE: Final = (
    "2026-11-23T03:00+08:00; without an offset in the schedule's time zone; 03:00: the latest past one"
)

_CLOCK: Final = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?")
_FIRST_YEAR, _LAST_YEAR = 1970, 2199


def read_moment(text: str, zone: ZoneInfo, now: datetime) -> datetime:
    """Return the moment that somebody means, in UTC.

    Args:
        text: ISO 8601, or a time of day, which means the latest one that is past.
        zone: of a text that names no offset.
        now: what time it is.

    Raises:
        InvalidArgumentsError: it is neither, or the clock of the zone skipped it.
    """
    try:
        if clock := _CLOCK.fullmatch(text):
            return _latest(time(int(clock[1]), int(clock[2]), int(clock[3] or 0)), zone, now)
        moment = datetime.fromisoformat(text)
        instant = moment.astimezone(UTC) if moment.tzinfo else _instant(moment, zone)
    except (ValueError, OverflowError):
        raise InvalidArgumentsError(f"{text!r} is no time; write for instance {HOW_TO_WRITE}") from None
    if instant is None:
        raise InvalidArgumentsError(f"there is no {text} in {zone.key}: the clock skips it")
    if not _FIRST_YEAR <= instant.year <= _LAST_YEAR:
        raise InvalidArgumentsError(f"{text} is not between {_FIRST_YEAR} and {_LAST_YEAR}")
    return instant


def _latest(clock: time, zone: ZoneInfo, now: datetime) -> datetime:
    today = now.astimezone(zone).date()
    days = (today - timedelta(days=back) for back in range(3))  # one may skip it, and today's may be to come
    instants = (_instant(datetime.combine(day, clock), zone) for day in days)
    return next(instant for instant in instants if instant is not None and instant <= now)


def _instant(wall: datetime, zone: ZoneInfo) -> datetime | None:
    """Return when the clock of a zone shows a time first, as schedules go by it; none when it skips that."""
    instant = wall.replace(tzinfo=zone).astimezone(UTC)
    return instant if instant.astimezone(zone).replace(tzinfo=None) == wall else None
