"""Schedules: what people write in five cron fields or in English and Chinese words, and when that fires.

Pure: no clock, no input or output, no settings (``read_zone`` consults the time zone database).
docs/schedules.md describes the language, and its examples are tests.

cronsim only walks the naive wall clock here; what a change of the clock does to a slot is decided in this module.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from orchestrator.errors import UnreadableScheduleError

MAX_LENGTH: Final = 200
MAX_INTERVAL: Final = 366 * 86_400  # seconds

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)
# No clock was ever moved by more than the 24 hours of the date line, and none twice within this time.
_REACH: Final = timedelta(hours=25)
_UNIT_SECONDS: Final = {"week": 604_800, "day": 86_400, "hour": 3_600, "minute": 60, "second": 1}


@dataclass(frozen=True, slots=True)
class Schedule:
    """A readable schedule; ``parse`` makes it.

    Attributes:
        canonical: five cron fields, or "every N seconds|minutes|hours|days"; it parses to itself.
        timeless: made of words without a time of day, so that it may be spread.
    """

    canonical: str
    timeless: bool = False

    def next_after(self, moment: datetime, zone: ZoneInfo) -> datetime | None:
        """Return the first fire strictly after an aware moment: UTC, whole seconds; None if 50 years have none."""
        moment = moment.astimezone(UTC)
        if self.canonical.startswith("every"):
            return _next_multiple(self.canonical, moment)
        if self.canonical.split()[1] == "*":
            return _next_by_elapsed_time(self.canonical, moment, zone)
        return _next_by_wall_clock(self.canonical, moment, zone)

    def fires(self, after: datetime, until: datetime, zone: ZoneInfo) -> Iterator[datetime]:
        """Yield the fires with after < fire <= until, in order, each computed when asked for."""
        fire = self.next_after(after, zone)
        while fire is not None and fire <= until:
            yield fire
            fire = self.next_after(fire, zone)

    def spread(self, key: int, window: int) -> "Schedule":
        """Return a timeless schedule moved by whole minutes that ``key`` decides, less than ``window`` seconds.

        An hourly one stays within its hour and any other within its day; a schedule with a time stays as it is.
        """
        if not self.timeless or window <= 0:
            return self
        _, hour, days = self.canonical.split(maxsplit=2)
        room = _UNIT_SECONDS["hour" if hour == "*" else "day"]
        # Not hash(): every process and every release must come to the same minute.
        digest = blake2b(b"%d" % key, digest_size=8).digest()
        hours, minutes = divmod(int.from_bytes(digest) % min(window, room) // 60, 60)
        return Schedule(f"{minutes} {'*' if hour == '*' else hours} {days}")


@lru_cache(maxsize=4096)
def parse(text: str) -> Schedule:
    """Read a schedule.

    Raises:
        UnreadableScheduleError: one sentence with the piece that cannot be read, where it stands and what may.
    """
    if len(text) > MAX_LENGTH:
        raise UnreadableScheduleError(f"a schedule has at most {MAX_LENGTH} characters, this one has {len(text)}")
    read = _Reader(text)
    start = read.plain.lstrip()[:1]
    if not start:
        raise UnreadableScheduleError(f"the schedule is empty: {_WHAT_IT_IS}")
    if start == "@":
        return _read_nickname(read)
    return _read_cron(read) if start in "0123456789*,-/?#" else _read_words(read)


def read_zone(name: str) -> ZoneInfo:
    """Return the IANA time zone of that name.

    Raises:
        UnreadableScheduleError: there is none; the sentence proposes one that is spelt alike.
    """
    if name in _zone_names():
        return ZoneInfo(name)
    raise UnreadableScheduleError(_refusal_of_zone(name))


@lru_cache(maxsize=4096)
def _refusal_of_zone(name: str) -> str:
    """Return why a name is refused; remembered, for a table may have the same wrong one in every row."""
    close = get_close_matches(name[:MAX_LENGTH].lower(), _zone_spellings(), n=1, cutoff=0.8)
    proposal = f"; did you mean '{_zone_spellings()[close[0]]}'?" if close else ""
    return f"'{_printable(name)}' is no IANA time zone{proposal}"


@lru_cache(maxsize=1)
def _zone_spellings() -> dict[str, str]:
    # Nobody who writes "GMT+8" means "Etc/GMT+8", which is eight hours behind Greenwich.
    spellings = {zone.lower(): zone for zone in sorted(_zone_names()) if not re.search("[0-9]", zone)}
    return {spelling.rpartition("/")[2]: zone for spelling, zone in spellings.items()} | spellings


@lru_cache(maxsize=1)
def _zone_names() -> frozenset[str]:
    # These two are no places: the one is whatever this machine is set to, the other says that it is not set.
    return frozenset(available_timezones() - {"localtime", "Factory"})


# --- from a canonical form to its moments ---


def _next_multiple(interval: str, moment: datetime) -> datetime:
    """Intervals count from the Unix epoch, so that neither a restart nor a late start moves them."""
    _, number, unit = interval.split()
    step = timedelta(seconds=int(number) * _UNIT_SECONDS[unit.removesuffix("s")])
    return _EPOCH + ((moment - _EPOCH) // step + 1) * step


def _next_by_wall_clock(cron: str, moment: datetime, zone: ZoneInfo) -> datetime | None:
    """Fire once for each wall clock time: for a repeated one at its first pass, for a skipped one after the gap."""
    for wall in CronSim(cron, moment.astimezone(zone).replace(tzinfo=None)):
        fire = _first_instant(wall, zone)
        # In the second pass of a repeated hour the clock shows times that have fired already.
        if fire > moment:
            return fire
    return None


def _next_by_elapsed_time(cron: str, moment: datetime, zone: ZoneInfo) -> datetime | None:
    """Fire at every instant whose wall clock matches, whatever happens to the clock."""
    first = moment.replace(microsecond=0) + _SECOND
    while True:
        offset = _offset(first, zone)
        wall = next(CronSim(cron, (first + offset - _SECOND).replace(tzinfo=None)), None)
        if wall is None:
            return None
        fire = wall.replace(tzinfo=UTC) - offset  # provided that the clock is not moved before
        near = min(fire, first + _REACH)
        if _offset(near, zone) != offset:
            first = _change(first, near, zone)
        elif near == fire:
            return fire
        else:
            first = max(near, fire - _REACH)


def _first_instant(wall: datetime, zone: ZoneInfo) -> datetime:
    """Return the first instant at which the clock shows ``wall``, or that at which it skips it, in UTC."""
    instant = wall.replace(tzinfo=zone).astimezone(UTC)
    if instant.astimezone(zone).replace(tzinfo=None) == wall:
        return instant
    # Of a skipped time, fold=1 is reckoned as after the change, hence lies before it; fold=0 the other way round.
    return _change(wall.replace(tzinfo=zone, fold=1).astimezone(UTC), instant, zone)


def _change(before: datetime, after: datetime, zone: ZoneInfo) -> datetime:
    """Return the first second with another UTC offset than ``before``; ``after`` has another."""
    old = _offset(before, zone)
    seconds = range((after - before) // _SECOND)
    passed = bisect_left(seconds, True, key=lambda second: _offset(before + second * _SECOND, zone) != old)  # noqa: FBT003 -- what the key returns
    return before + passed * _SECOND


def _offset(instant: datetime, zone: ZoneInfo) -> timedelta:
    return instant.astimezone(zone).utcoffset() or timedelta()


# --- reading: the text ---

_WHAT_IT_IS: Final = (
    'a schedule is five cron fields, or words such as "daily at 03:00", "every 15 minutes", "每天 03:00"'
)

# One character for one, so that positions stay right.
_PLAIN: Final = (
    {code: chr(code - 0xFEE0).lower() for code in range(0xFF01, 0xFF5F)}
    | {code: chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}
    | {0x3000: " ", ord("、"): ",", ord("。"): " "}
)
_LONGEST_QUOTE: Final = 40


class _Reader:
    """Reads a text from left to right; what it refuses is quoted as it was written, with its place."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.plain = text.translate(_PLAIN)
        self._at = 0
        self._expected: list[str] = []

    def take(self, pattern: str, expected: str = "") -> re.Match[str] | None:
        """Read what matches, after blanks and at most one comma; else remember what was expected here."""
        rest = self.plain[self._at :].lstrip().removeprefix(",").lstrip()
        match = re.compile(pattern).match(self.plain, len(self.plain) - len(rest))
        if match:
            self._at = match.end()
            self._expected.clear()
        elif expected:
            self._expected.append(expected)
        return match

    def take_list(self, pattern: str, expected: str) -> list[re.Match[str]]:
        """Read any number of matches with commas between them."""
        found = []
        match = self.take(pattern, expected)
        while match:
            found.append(match)
            match = self.take(pattern, expected) if self.plain[self._at :].lstrip().startswith(",") else None
        return found

    def end(self) -> None:
        """Refuse anything that is left."""
        if self.plain[self._at :].strip():
            raise self.refuse_here()

    def refuse_here(self, why: str = "") -> UnreadableScheduleError:
        """Make an error of the next word; unless told why, for all that was expected there."""
        why = why or ("expected " + " or ".join(self._expected) if self._expected else "nothing may follow here")
        piece = re.compile(r"\s*(?:,\s*(?=\S))?(\S+)").match(self.plain, self._at)
        if piece:
            return self.refuse(*piece.span(1), why)
        return UnreadableScheduleError(f"the schedule ends too early (character {len(self.text) + 1}): {why}")

    def refuse(self, start: int, end: int, why: str) -> UnreadableScheduleError:
        """Make an error of the piece from ``start`` to ``end``."""
        return UnreadableScheduleError(
            f'cannot read "{_printable(self.text[start:end])}" (character {start + 1}): {why}'
        )


def _printable(text: str) -> str:
    shown = text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


# --- reading: cron, as Debian's ---


class _Field(NamedTuple):
    unit: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        names = f", or from {self.names[0]} to {self.names[-1]}" if self.names else ""
        return f"{self.unit} go from {self.low} to {self.high}{names}"


_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MINUTES: Final = _Field("minutes", 0, 59)
_HOURS: Final = _Field("hours", 0, 23)
_DAYS: Final = _Field("days", 1, 31)
_FIELDS: Final = (_MINUTES, _HOURS, _DAYS, _Field("months", 1, 12, _MONTHS), _Field("weekdays", 0, 7, _WEEKDAYS))
_SUNDAY: Final = 7

_PART: Final = re.compile(r"(?:(?P<star>\*)|(?P<first>[0-9a-z]+)(?:-(?P<last>[0-9a-z]+))?)(?:/(?P<step>[0-9]+))?")
_QUARTZ: Final = re.compile(r"[0-9]*(?:l|w|lw)|l-[0-9]+|.*[#?].*")

# What @hourly and its like stand for; Debian's @reboot names no time.
_NICKNAMES: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


def _read_nickname(read: _Reader) -> Schedule:
    word = read.take(rf"(?:{'|'.join(_NICKNAMES)})(?!\S)")
    if word is None:
        raise read.refuse_here(f"the nicknames are {', '.join(_NICKNAMES)}")
    read.end()
    # Midnight is a time of day, so that one stays where it is.
    return Schedule(_NICKNAMES[word[0]], timeless=word[0] != "@midnight")


def _read_cron(read: _Reader) -> Schedule:
    words = list(re.finditer(r"\S+", read.plain))
    if len(words) < len(_FIELDS):
        why = f'cron has five fields, not {len(words)}; an interval is written as "every 15 minutes"'
        raise read.refuse(words[0].start(), words[-1].end(), why)
    if len(words) > len(_FIELDS):
        raise read.refuse(*words[5].span(), 'cron has five fields and none for seconds; write "every 5 seconds"')
    cron = " ".join(_read_field(read, word, field) for word, field in zip(words, _FIELDS, strict=True))
    if len(cron) > MAX_LENGTH:
        raise read.refuse(words[0].start(), words[-1].end(), f"written out this has more than {MAX_LENGTH} characters")
    try:
        CronSim(cron, _EPOCH)
    except CronSimError:
        # The fields are right each for itself: it objects to days that none of the months has.
        raise read.refuse(words[2].start(), words[3].end(), "no such day in any of these months") from None
    return Schedule(cron)


def _read_field(read: _Reader, word: re.Match[str], field: _Field) -> str:
    """Return the canonical form of a field: numbers, sorted, each part once."""
    parts, start = set(), word.start()
    for text in word[0].split(","):
        if not text:
            raise read.refuse(*word.span(), "a comma stands between two values")
        parts.add(_read_part(read, start, text, field))
        start += len(text) + 1
    # A star in front decides how the two day fields combine, so there it stays, and further back it is written out.
    star = "*" if word[0].startswith("*") else f"{field.low}-{field.high}"
    if star == "*" and (field.low, field.high, 1) in parts:
        return star
    return ",".join(
        (str(low) if low == high else star if (low, high) == (field.low, field.high) else f"{low}-{high}")
        + (f"/{step}" if step > 1 else "")
        for low, high, step in sorted(parts, key=lambda part: (part[0], -part[1], part[2]))
    )


def _read_part(read: _Reader, start: int, text: str, field: _Field) -> tuple[int, int, int]:
    """Return the first value, the last and the step."""
    end = start + len(text)
    match = _PART.fullmatch(text)
    if _QUARTZ.fullmatch(text):
        raise read.refuse(start, end, f"L, W, # and ? are no part of cron here; {field.values}")
    if match is None:
        raise read.refuse(start, end, f"a part of a field is *, */n, a, a-b or a-b/n; {field.values}")
    low = _read_value(read, start, match["first"], field) if match["first"] else field.low
    high = _read_value(read, start + match.start("last"), match["last"], field) if match["last"] else low
    if match["star"]:
        high = field.high
    elif match["step"] and not match["last"]:
        raise read.refuse(start, end, f"a step needs a range: write {text.replace('/', f'-{field.high}/')}")
    if low > high:
        hint = "; at the end of a range Sunday is 7" if match["last"] == "sun" else ""
        raise read.refuse(start, end, f"the range runs backwards{hint}")
    step, values = int(match["step"] or 1), high - low + 1
    if not 1 <= step <= values:
        hint = f'; or write "every {step} {field.unit}"' if step and match["star"] and field in _FIELDS[:3] else ""
        raise read.refuse(start + match.start("step"), end, f"steps go from 1 to {values} here{hint}")
    return (0, 0, 1) if low == high == _SUNDAY and field is _FIELDS[4] else (low, high, step)


def _read_value(read: _Reader, start: int, text: str, field: _Field) -> int:
    value = int(text) if text.isdigit() else -1
    if text in field.names:
        value = field.names.index(text) + field.low
    if not field.low <= value <= field.high:
        raise read.refuse(start, start + len(text), field.values)
    return value


# --- reading: words, by one grammar for English and Chinese ---


def _any_of(words: Iterable[str]) -> str:
    """Return the pattern of one whole word; no blank need follow a Chinese one."""
    return f"(?:{'|'.join(sorted(words, key=len, reverse=True))})(?![a-z])"


_DIGITS: Final = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE: Final = "[二三四五六七八九]?十[一二三四五六七八九]?|[零〇]?[一二两三四五六七八九]|[零〇]"

_UNITS: Final = {
    "second": ("s", "sec", "secs", "second", "seconds", "秒", "秒钟"),
    "minute": ("m", "min", "mins", "minute", "minutes", "分钟"),
    "hour": ("h", "hr", "hrs", "hour", "hours", "小时"),
    "day": ("d", "day", "days", "天"),
    "week": ("w", "week", "weeks", "周", "星期", "礼拜"),
    "month": ("month", "months", "月"),
}
_UNIT_OF: Final = {word: unit for unit, words in _UNITS.items() for word in words}
_ADVERBS: Final = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month"}

_DAY_NUMBERS: Final = (
    {name: number for number, name in enumerate(_WEEKDAYS)}
    | {f"{name}day": _WEEKDAYS.index(name[:3]) for name in ("sun", "mon", "tues", "wednes", "thurs", "fri", "satur")}
    | {name: number for number, name in enumerate("日一二三四五六")}
    | {"天": 0}
)
_DAY_GROUPS: Final = {"weekday": "1-5", "weekdays": "1-5", "工作日": "1-5", "weekend": "0,6", "weekends": "0,6"}
# 每周一次 is once a week, not on Mondays.
_DAY: Final = f"(?:周|星期|礼拜)?({_any_of(_DAY_NUMBERS)})(?!次)"
_DAY_OF_WEEK: Final = rf"{_DAY}(?:\s*(?:-|至|到)\s*{_DAY})?"
_DAY_OF_MONTH: Final = rf"(?:the\s+)?([0-9]+|{_CHINESE})\s*(?:(?:st|nd|rd|th)(?![a-z])|日|号|(?![\w:]))"

# The hours that go with a time of day; those of _AFTERNOON may be written from 1 to 11.
_PERIODS: Final = {
    "凌晨": range(12),
    "早上": range(12),
    "上午": range(12),
    "中午": range(12, 13),
    "下午": range(13, 24),
    "晚上": range(17, 24),
}
_AFTERNOON: Final = ("下午", "晚上")
_TIME: Final = (
    rf"(?P<period>{'|'.join(_PERIODS)})?\s*(?P<hour>[0-9]{{1,2}}|{_CHINESE})"
    rf"(?::(?P<minute>[0-9]+)(?P<seconds>:[0-9]+)?|\s*点\s*(?:(?P<half>半)|(?P<spoken>[0-9]+|{_CHINESE})\s*分)?)"
)
_AT: Final = _any_of(["at"])


def _read_words(read: _Reader) -> Schedule:
    if adverb := read.take(_any_of(_ADVERBS)):
        schedule = _read_period(read, _ADVERBS[adverb[0]])
    elif group := read.take(_any_of(_DAY_GROUPS)):
        schedule = _read_times(read, f"* * {_DAY_GROUPS[group[0]]}")
    elif read.take(f"{_any_of(['every'])}|每"):
        schedule = _read_every(read)
    else:
        raise read.refuse_here(_WHAT_IT_IS)
    read.take("(?:执行|运行)(?:一次)?|一次")
    read.end()
    return schedule


def _read_every(read: _Reader) -> Schedule:
    if read.take(rf"half\s+{_any_of(['hour'])}|半个?小时"):
        return _interval(_UNIT_SECONDS["hour"] // 2)
    if read.take("日"):
        return _read_period(read, "day")
    count = read.take(rf"(隔)?\s*([0-9]+|{_CHINESE})", "a number")
    unit = read.take(f"个?({_any_of(_UNIT_OF)})", 'a unit such as "minutes" or "小时"')
    if unit:
        return _read_units(read, count, unit)
    if count:
        raise read.refuse_here()
    if group := read.take(f"个?({_any_of(_DAY_GROUPS)})"):
        return _read_times(read, f"* * {_DAY_GROUPS[group[1]]}")
    return _read_times(read, f"* * {_read_days_of_week(read, required=True)}")


def _read_units(read: _Reader, count: re.Match[str] | None, unit: re.Match[str]) -> Schedule:
    """Read on after "15 minutes": an interval, but one of 1 keeps step with the local clock."""
    number, name = _number(count[2]) if count else 1, _UNIT_OF[unit[1]]
    start, end = (count or unit).start(), unit.end()
    if count and name == "month":
        raise read.refuse(start, end, 'months differ in length; write cron such as "0 0 1 */2 *"')
    if count and count[1] and number == 1 and name in ("day", "week"):
        raise read.refuse(start, end, f"this can mean each or every second one; write 每{unit[1]} or 每2{unit[1]}")
    if number == 1 and name != "second":
        return _read_period(read, name)
    if not 1 <= number * _UNIT_SECONDS[name] <= MAX_INTERVAL:
        raise read.refuse(start, end, "intervals go from 1 second to 366 days")
    return _interval(number * _UNIT_SECONDS[name])


def _interval(seconds: int) -> Schedule:
    """Write an interval in the largest unit of which it has at least two: one of 1 would be read as cron."""
    for unit, size in _UNIT_SECONDS.items():
        if unit != "week" and seconds % size == 0 and seconds >= 2 * size:
            return Schedule(f"every {seconds // size} {unit}s")
    return Schedule("every 1 second")


def _read_period(read: _Reader, unit: str) -> Schedule:
    """Read on after "daily" or "every day" and the like."""
    if unit == "minute":
        return Schedule("* * * * *")
    if unit == "hour":
        return _read_minute(read)
    if unit == "day":
        return _read_times(read, "* * *")
    on = read.take(_any_of(["on"]))
    days = (_read_days_of_week if unit == "week" else _read_days_of_month)(read, required=bool(on))
    if days:
        return _read_times(read, f"* * {days}" if unit == "week" else f"{days} * *")
    return Schedule("0 0 * * 0" if unit == "week" else "0 0 1 * *", timeless=True)


def _read_minute(read: _Reader) -> Schedule:
    if not read.take(_AT, '"at :15"'):
        return Schedule("0 * * * *", timeless=True)
    minute = read.take(r":([0-9]{1,2})(?![\w:])", "a minute such as :15")
    if minute is None:
        raise read.refuse_here()
    return Schedule(f"{_checked(read, minute, _MINUTES)} * * * *")


def _read_days_of_week(read: _Reader, *, required: bool) -> str:
    """Read weekdays and ranges of them as a field of cron; empty if there are none."""
    found = read.take_list(_DAY_OF_WEEK, 'a weekday such as "mon" or "周一"')
    if required and not found:
        raise read.refuse_here()
    days = []
    for match in found:
        first = _DAY_NUMBERS[match[1]]
        last = (_DAY_NUMBERS[match[2]] or _SUNDAY) if match[2] else first
        if first > last:
            raise read.refuse(*match.span(), "the range runs backwards")
        days.append(f"{first}-{last}")
    return ",".join(days)


def _read_days_of_month(read: _Reader, *, required: bool) -> str:
    """Read days of the month as a field of cron; empty if there are none."""
    found = read.take_list(_DAY_OF_MONTH, 'a day such as "15" or "15日"')
    if required and not found:
        raise read.refuse_here()
    return ",".join(str(_checked(read, match, _DAYS)) for match in found)


def _read_times(read: _Reader, days: str) -> Schedule:
    """Read times of day, or none, and make cron of them and its three other fields."""
    at = read.take(_AT)
    found = read.take_list(_TIME, "a time such as 03:00")
    if at and not found:
        raise read.refuse_here()
    times = {_read_time(read, match) for match in found} or {(0, 0)}
    hours, minutes = ({time[field] for time in times} for field in (0, 1))
    if len(times) < len(hours) * len(minutes):
        why = "one schedule cannot have different minutes at different hours"
        raise read.refuse(found[0].start(), found[-1].end(), why)
    cron = f"{','.join(map(str, minutes))} {','.join(map(str, hours))} {days}"
    return Schedule(_read_cron(_Reader(cron)).canonical, timeless=not found)


def _read_time(read: _Reader, match: re.Match[str]) -> tuple[int, int]:
    """Return hour and minute of a match of _TIME."""
    period, hour = match["period"], _number(match["hour"])
    minute = 30 if match["half"] else _number(match["minute"] or match["spoken"] or "0")
    if period in _AFTERNOON and 1 <= hour < 12:  # noqa: PLR2004 -- twelve hours on a clock face
        hour += 12
    for wrong, why in (
        (hour == _HOURS.high + 1, "midnight is written 00:00"),
        (hour > _HOURS.high, _HOURS.values),
        (minute > _MINUTES.high, _MINUTES.values),
        (match["minute"] and len(match["minute"]) != 2, "minutes have two digits, as in 03:05"),  # noqa: PLR2004
        (match["seconds"] not in (None, ":00"), "a time of day has no seconds other than :00"),
        (period and hour not in _PERIODS[period], f"{period} and that hour do not go together; write it as in 03:00"),
    ):
        if wrong:
            raise read.refuse(*match.span(), why)
    return hour, minute


def _checked(read: _Reader, match: re.Match[str], field: _Field) -> int:
    value = _number(match[1])
    if not field.low <= value <= field.high:
        raise read.refuse(*match.span(1), field.values)
    return value


def _number(text: str) -> int:
    """Read Arabic digits, or Chinese ones up to 99."""
    if text.isascii():
        return int(text)
    tens, ten, ones = text.lstrip("零〇").rpartition("十")
    return (10 * _DIGITS.get(tens, 1) if ten else 0) + _DIGITS.get(ones, 0)
