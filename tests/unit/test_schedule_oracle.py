"""Every schedule against an oracle that tries each minute: all IANA zones, 2020 to 2040, clock changes above all.

ORACLE_ROUNDS=100 repeats the random part a hundred times, with other random numbers.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

import pytest

from orchestrator.schedule import parse

ROUNDS: Final = int(os.environ.get("ORACLE_ROUNDS", "1"))
ZONES: Final = sorted(available_timezones() - {"localtime", "Factory"})
CHANGEFUL_ZONES: Final = (
    "Africa/Cairo",  # changes at midnight, since 2023
    "Africa/Casablanca",  # goes back for Ramadan
    "America/Havana",  # at midnight and at one
    "America/New_York",
    "America/Santiago",  # at midnight, from 24 to 23
    "Asia/Beirut",  # at midnight
    "Asia/Tehran",  # at midnight, until 2022
    "Australia/Lord_Howe",  # by half an hour
    "Europe/Berlin",
    "Pacific/Chatham",  # at 02:45
)
YEARS: Final = range(2020, 2041)

MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)


# --- the oracle: cron by trying each minute, and the rule for changes of the clock word by word ---


def values(field: str, low: int, high: int) -> set[int]:
    """The numbers that one field of cron stands for."""
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = (f"{low}-{high}" if span == "*" else span).partition("-")
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


@dataclass(frozen=True)
class Cron:
    """Five fields of numbers."""

    text: str
    sets: tuple[set[int], ...]
    both_days: bool
    by_elapsed_time: bool

    @classmethod
    def of(cls, text: str) -> "Cron":
        fields = text.split()
        limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
        sets = tuple(values(field, *limit) for field, limit in zip(fields, limits, strict=True))
        every_hour = fields[1][0] == "*" and not {"*", "*/1"}.isdisjoint(fields[1].split(","))
        return cls(text, sets, fields[2][0] == "*" or fields[4][0] == "*", every_hour)

    def matches(self, wall: datetime) -> bool:
        minutes, hours, days, months, weekdays = self.sets
        if wall.minute not in minutes or wall.hour not in hours or wall.month not in months:
            return False
        day, weekday = wall.day in days, not weekdays.isdisjoint({wall.isoweekday(), wall.isoweekday() % 7})
        return day and weekday if self.both_days else day or weekday


class Tick(NamedTuple):
    """One minute: what the clock shows, whether it showed that before, and what it skipped just now."""

    instant: datetime
    wall: datetime
    again: bool
    skipped: tuple[datetime, ...]


def ticks(zone: ZoneInfo, start: datetime, length: timedelta) -> list[Tick]:
    """All minutes with start < instant <= start + length."""
    found, before = [], start.astimezone(zone)
    for number in range(1, length // MINUTE + 1):
        instant = start + number * MINUTE
        local = instant.astimezone(zone)
        wall, expected = local.replace(tzinfo=None, fold=0), before.replace(tzinfo=None, fold=0) + MINUTE
        skipped = tuple(expected + minute * MINUTE for minute in range((wall - expected) // MINUTE))
        found.append(Tick(instant, wall, local.fold == 1, skipped))
        before = local
    return found


def expected_fires(cron: Cron, minutes: list[Tick]) -> list[datetime]:
    """By elapsed time: whenever the clock shows it. Else: at its first showing, or where it was skipped."""
    if cron.by_elapsed_time:
        return [tick.instant for tick in minutes if cron.matches(tick.wall)]
    return [
        tick.instant
        for tick in minutes
        if (not tick.again and cron.matches(tick.wall)) or any(map(cron.matches, tick.skipped))
    ]


def changes(zone: ZoneInfo, year: int) -> Iterator[datetime]:
    """The instants of a year, to the minute, at which the zone's UTC offset changes."""
    start = datetime(year, 1, 1, tzinfo=UTC)
    for day in range(366):
        left, right = start + day * DAY, start + (day + 1) * DAY
        if left.astimezone(zone).utcoffset() == right.astimezone(zone).utcoffset():
            continue
        while right - left > MINUTE:
            middle = left + (right - left) // (2 * MINUTE) * MINUTE
            same = middle.astimezone(zone).utcoffset() == left.astimezone(zone).utcoffset()
            left, right = (middle, right) if same else (left, middle)
        yield right


# --- what is compared ---


def random_field(random: Random, low: int, high: int, near: int) -> str:
    """A field that often holds the number ``near``, so that something fires."""
    first = random.choice((near, random.randint(low, high)))
    last = random.randint(first, high)
    form = random.choice(("*", "*", "*/n", "a", "a-b", "a-b/n", "list"))
    if form == "*/n":
        return f"*/{random.randint(1, (high - low) // 2 + 1)}"
    if form == "a":
        return f"{first}"
    if form == "a-b":
        return f"{first}-{last}"
    if form == "a-b/n":
        return f"{first}-{last}/{random.randint(1, last - first + 1)}"
    if form == "list":
        return ",".join(random_field(random, low, high, near) for _ in range(2))
    return "*"


def random_cron(random: Random, near: datetime) -> str:
    fields = (
        random_field(random, 0, 59, near.minute),
        random_field(random, 0, 23, near.hour),
        random_field(random, 1, 28, near.day if near.day <= 28 else 1),
        random_field(random, 1, 12, near.month),
        random_field(random, 0, 6, near.isoweekday() % 7),
    )
    return " ".join(fields)


def random_words(random: Random, near: datetime) -> tuple[str, str]:
    """Words, and the cron that they should come to."""
    hour, minute = near.hour, random.choice((0, 30, near.minute))
    at, weekday, cron = f"{hour:02}:{minute:02}", near.isoweekday() % 7, f"{minute} {hour}"
    name = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")[weekday]
    return random.choice(
        (
            (f"daily at {at}", f"{cron} * * *"),
            (f"每天 {at}", f"{cron} * * *"),
            (f"hourly at :{minute:02}", f"{minute} * * * *"),
            ("每小时", "0 * * * *"),
            ("every minute", "* * * * *"),
            (f"every {name} at {at}", f"{cron} * * {weekday}"),
            (f"每周{'日一二三四五六'[weekday]} {at}", f"{cron} * * {weekday}"),
            (f"weekdays at {at}", f"{cron} * * 1-5"),
            (f"monthly on {near.day} at {at}", f"{cron} {near.day} * *"),
            (f"每月{near.day}日{hour}点{minute}分", f"{cron} {near.day} * *"),
        )
    )


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_in_every_zone_it_fires_when_the_oracle_says(seed: int) -> None:
    for name in ZONES:
        zone, random = ZoneInfo(name), Random(f"{name} {seed}")
        year = random.choice(YEARS)
        moments = [*changes(zone, year), datetime(year, 1, 1, tzinfo=UTC) + random.randrange(525_600) * MINUTE]
        moment = random.choice(moments)
        start, length = moment - random.randrange(-120, 1_200) * MINUTE, 24 * HOUR
        minutes = ticks(zone, start, length)
        near = (moment + random.randint(-90, 90) * MINUTE).astimezone(zone)
        cases = [(text, text) for text in (random_cron(random, near) for _ in range(4))]
        for text, cron in [*cases, random_words(random, near)]:
            fires = list(parse(text).fires(start, start + length, zone))
            assert fires == expected_fires(Cron.of(cron), minutes), (text, name, start)


@pytest.mark.parametrize("name", CHANGEFUL_ZONES)
def test_at_every_change_of_the_clock_it_fires_when_the_oracle_says(name: str) -> None:
    zone = ZoneInfo(name)
    for change in (change for year in YEARS for change in changes(zone, year)):
        start, length = change - 3 * HOUR, 28 * HOUR
        minutes = ticks(zone, start, length)
        for cron in crons_at(change, zone):
            schedule, expected = parse(cron), expected_fires(Cron.of(cron), minutes)
            assert list(schedule.fires(start, start + length, zone)) == expected, (cron, change)
            # A beat may be started at any moment, also while the clock shows a time again.
            for after in (change + minute * MINUTE + timedelta(seconds=1) for minute in (-31, -1, 0, 14, 44)):
                following = [fire for fire in expected if fire > after]
                assert not following or schedule.next_after(after, zone) == following[0], (cron, after)


def crons_at(change: datetime, zone: ZoneInfo) -> list[str]:
    """Crons that meet a change: in the hours before and after it, on its day, on every minute."""
    walls = [(change + minutes * MINUTE).astimezone(zone) for minutes in (-60, -30, -1, 0, 20, 60)]
    today = walls[3]
    return [
        *(f"{wall.minute} {wall.hour} * * *" for wall in walls),
        *(f"{wall.minute} * * * *" for wall in walls),
        "* * * * *",
        "*/7 * * * *",
        "* 0-3,23 * * *",
        "*/20 */2 * * *",
        "0 0 * * *",
        "15,45 1-2 * * *",
        f"40 * {today.day} {today.month} *",
        f"5 * * * {today.isoweekday()}",
        f"10 0 {today.day} * {today.isoweekday()}",
        f"0-59/15 0-23/1 {today.day} {today.month} *",
    ]


@pytest.mark.parametrize("seed", range(15 * ROUNDS))
def test_over_weeks_it_fires_when_the_oracle_says(seed: int) -> None:
    random = Random(seed)
    name, year = random.choice(CHANGEFUL_ZONES), random.choice(YEARS)
    zone, length = ZoneInfo(name), 40 * DAY
    moment = random.choice([*changes(zone, year), datetime(year, 6, 1, tzinfo=UTC)])
    start = moment - random.randrange(30) * DAY - random.randrange(1_440) * MINUTE
    minutes = ticks(zone, start, length)
    near = (moment + random.randrange(120) * MINUTE).astimezone(zone)
    for days in (f"{near.day} {near.month} *", f"* * {near.isoweekday()}", f"{near.day} * 1", "*/9 * 1-5", "*/2 * 0"):
        for times in (f"{near.minute} *", "*/25 *", f"{near.minute} {near.hour}", "30 0-3"):
            cron = f"{times} {days}"
            fires = list(parse(cron).fires(start, start + length, zone))
            assert fires == expected_fires(Cron.of(cron), minutes), (cron, name, start)


@pytest.mark.parametrize("seed", range(50 * ROUNDS))
def test_an_interval_fires_at_the_multiples_of_its_length_since_1970(seed: int) -> None:
    random = Random(seed)
    start = random.randrange(1_577_836_800, 2_240_000_000)
    length, size = random.choice((("s", 1), ("minutes", 60), ("分钟", 60), ("h", 3_600)))
    number = random.randint(2, 90)
    schedule, zone = parse(f"every {number} {length}"), ZoneInfo(random.choice(ZONES))
    end = start + 3 * number * size

    fires = schedule.fires(datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC), zone)

    seconds = [second for second in range(start + 1, end + 1) if second % (number * size) == 0]
    assert [fire.timestamp() for fire in fires] == seconds
