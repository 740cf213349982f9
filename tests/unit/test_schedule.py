"""What schedules can be written, what they come to and when they fire. docs/schedules.md holds the examples."""

import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import UnreadableScheduleError
from orchestrator.schedule import Schedule, parse, read_zone

PAGE: Final = Path(__file__).parents[2] / "docs" / "schedules.md"
BERLIN: Final = ZoneInfo("Europe/Berlin")
SHANGHAI: Final = ZoneInfo("Asia/Shanghai")
FAR: Final = datetime(2100, 1, 1, tzinfo=UTC)

CASES: Final = (
    "* * * * *",
    "*/7 1-3 * * *",
    "30 2 * * *",
    "15 * * * *",
    "0 0 1,15 * 5",
    "0 12 29 2 *",
    "daily",
    "每周一、三 08:00",
    "every 5 seconds",
    "every 3 days",
)
moments = st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 -- bounds
# What the language is made of: texts of it have a chance to be read.
WORDS: Final = """
    every each daily weekly monthly hourly weekday day hour half on at the 1st mon monday sun-sat s m h d w month jan
    每 每隔 隔 个 周 一 日 天 月 工作日 二十 十五 两 半 小时 分钟 秒 点 凌晨 下午 晚上 执行 一次 至 ： ， 、 。
    3 15 03:00 24:00 0 7 60 99999999999999999999 * */5 5-1 1-5 : , / @ @daily L #
"""
almost_schedules = st.lists(st.sampled_from(WORDS.split()), max_size=8).flatmap(
    lambda words: st.sampled_from(("", " ")).map(lambda blank: blank.join(words))
)


# --- the page for administrators ---


def table_rows() -> Iterator[tuple[str, list[str]]]:
    """Head of the last column, and cells, of each row of the page's tables."""
    head = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else []
        if not cells:
            head = head if line.startswith("|") else ""
        elif not head:
            head = cells[-1]
        else:
            yield head, cells


def examples() -> Iterator[tuple[str, str, str, str]]:
    """Text, canonical form, head and fires of each example."""
    for head, cells in table_rows():
        if head.startswith("next fires"):
            texts, (canonical,) = (re.findall("`([^`]+)`", cell) for cell in cells[:2])
            yield from ((text, canonical, head, cells[2]) for text in texts)


def refusals() -> Iterator[tuple[str, str]]:
    """Text and sentence of each refusal."""
    for head, cells in table_rows():
        if head == "answer":
            text, answer = (cell.strip("`") for cell in cells)
            yield text, answer


def local_time(text: str, zone: ZoneInfo) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=zone)


@pytest.mark.parametrize(("text", "canonical", "head", "fires"), list(examples()))
def test_every_example_of_the_page_is_true(text: str, canonical: str, head: str, fires: str) -> None:
    _, place, after = re.split("next fires in | after ", head)
    zone = read_zone(place)
    expected = [local_time(fire, zone) for fire in fires.split(", ")]

    schedule = parse(text)
    found = list(islice(schedule.fires(local_time(after, zone), FAR, zone), len(expected)))

    assert schedule.canonical == canonical
    assert found == [fire.astimezone(UTC) for fire in expected]


@pytest.mark.parametrize(("text", "answer"), list(refusals()))
def test_every_refusal_of_the_page_reads_as_promised(text: str, answer: str) -> None:
    assert refusal(text) == answer


def test_the_page_has_its_tables() -> None:
    assert len(list(examples())) > 100
    assert len(list(refusals())) > 20


# --- reading ---


def refusal(text: str) -> str:
    with pytest.raises(UnreadableScheduleError) as caught:
        parse(text)
    return str(caught.value)


def read_or_refused(text: str) -> Schedule | str:
    try:
        return parse(text)
    except UnreadableScheduleError as error:
        return str(error)


@pytest.mark.parametrize("text", ["", "   ", "\t\n", "　", "。"])
def test_nothing_is_no_schedule(text: str) -> None:
    assert refusal(text).startswith("the schedule is empty")


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("  Daily   AT 3:61", '"3:61" (character 14): minutes'),
        ("　每日　２５：００", '"２５：００" (character 5): hours'),
        ("每天 03:00 左右", '"左右" (character 10): nothing'),
        ("0 0 * * mon-fir", '"fir" (character 13): weekdays'),
        ("0 0 * * 1,9", '"9" (character 11): weekdays'),
        ("0 0 15W * *", '"15W" (character 5)'),
        ("0 0 * * 5#2", '"5#2" (character 9)'),
        ("0 0 ? * *", '"?" (character 5)'),
        ("0 0 * * fri-mon", '"fri-mon" (character 9): the range'),
        ("0 0 31 4,6 *", '"31 4,6" (character 5)'),
        ("0 0 1-5/9 * *", '"9" (character 9): steps'),
        ("0-0/2 0 * * *", '"2" (character 5): steps'),
        ("* * * *", '"* * * *" (character 1)'),
        ("H * * * *", '"H" (character 1)'),
        ("daily at 03:00,", '"," (character 15): expected a time'),
        ("daily at 03:5", '"03:5" (character 10): minutes have two digits'),
        ("hourly at :60", '"60" (character 12): minutes'),
        ("hourly at 15", '"15" (character 11): expected a minute'),
        ("weekly on fri-mon", '"fri-mon" (character 11): the range'),
        ("monthly on 15:00", '"15:00" (character 12): expected a day'),
        ("every 367 days", '"367 days" (character 7): intervals'),
        ("every 1.5 hours", '".5" (character 8): expected a unit'),
        ("every five minutes", '"five" (character 7): expected a number'),
        ("每15日", '"日" (character 4): expected a unit'),
        ("每隔天", '"隔天" (character 2): expected a number'),
        ("每隔1个月", '"隔1个月" (character 2): months'),
        ("每天下午12点", '"下午12点" (character 3)'),
        ("每天晚上1点", '"晚上1点" (character 3)'),
        ("每天中午1点", '"中午1点" (character 3)'),
        ("每周五至周一", '"五至周一" (character 3): the range'),
        ("每月0日", '"0" (character 3): days'),
        ("a\x00\x1b[31m", r'"a\x00\x1b[31m" (character 1)'),
        ("\ud800", r'"\ud800" (character 1)'),
        ("x" * 200, f'"{"x" * 39}…" (character 1)'),
    ],
)
def test_a_refusal_quotes_the_piece_and_says_where_it_stands(text: str, piece: str) -> None:
    assert refusal(text).startswith(f"cannot read {piece}")


def test_a_long_text_is_refused_unquoted() -> None:
    assert refusal("0 0 * * *" + " " * 192) == "a schedule has at most 200 characters, this one has 201"
    steps = ",".join(f"*/{step}" for step in range(2, 39))
    assert refusal(f"0,{steps} * * * *").endswith("written out this has more than 200 characters")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("00 03 * * *", "0 3 * * *"),
        ("*/1 */1 1-1 * 0,7,0", "* * 1 * 0"),
        ("5-5 8-9/1 * * *", "5 8-9 * * *"),
        ("0 0 5,*/10 * 1", "0 0 1-31/10,5 * 1"),  # no star in front: either day
        ("0 0 */10,5 * 1", "0 0 */10,5 * 1"),  # a star in front: both
        ("0 0 */10,1 * 1", "0 0 */10,1 * 1"),
        ("0 5,* * * *", "0 0-23,5 * * *"),
        ("0 *,5 * * *", "0 * * * *"),
        ("0 0 * DEC,Jan-mar Sat,SUN", "0 0 * 1-3,12 0,6"),
        ("\t0 0\n1 * *。", "0 0 1 * *"),
        ("０　３　＊　＊　１，３、５", "0 3 * * 1,3,5"),
        ("Ｄａｉｌｙ　ａｔ　０３：００", "0 3 * * *"),
        ("每周一，08:00执行。", "0 8 * * 1"),
        ("每天 03:00, 03:30, 15:00, 15:30", "0,30 3,15 * * *"),
        ("weekly on sun, sat", "0 0 * * 0,6"),
        ("每周五至周日", "0 0 * * 5-7"),
        ("每周日至周四", "0 0 * * 0-4"),
        ("每月1日、15日2点", "0 2 1,15 * *"),
        ("每月三十一号二十三点零五分", "5 23 31 * *"),
        ("每天零点", "0 0 * * *"),
        ("每天下午3:05", "5 15 * * *"),
        ("每天三点一次", "0 3 * * *"),
        ("monthly on 22nd, the 3rd", "0 0 3,22 * *"),
        ("every 120 minutes", "every 2 hours"),
        ("every 60 minutes", "every 60 minutes"),  # by UTC, unlike every hour
        ("every 366 days", "every 366 days"),
        ("every 31622400 s", "every 366 days"),
        ("每 5 min", "every 5 minutes"),
    ],
)
def test_it_comes_to_one_form(text: str, canonical: str) -> None:
    assert parse(text).canonical == canonical


@given(st.text(max_size=250) | st.text("0123456789*/-,  @LW#?", max_size=30) | almost_schedules)
@example("İ" * 200)
@example("每隔")
@example("1-" + "9" * 190 + " * * * *")
@example("².5 * * * *")
@example("每周一到二、一到三")
def test_any_text_is_read_or_refused_and_what_is_read_stays_the_same(text: str) -> None:
    schedule = read_or_refused(text)

    if isinstance(schedule, str):
        assert schedule.isprintable()
    else:
        assert parse(schedule.canonical).canonical == schedule.canonical
        assert schedule.next_after(datetime(2026, 3, 28, 12, tzinfo=UTC), BERLIN)


# --- firing ---


@pytest.mark.parametrize("text", CASES)
@given(moment=moments, zone=st.sampled_from((BERLIN, SHANGHAI, ZoneInfo("Australia/Lord_Howe"))), data=st.data())
def test_a_restart_anywhere_gives_the_same_fires(
    text: str, moment: datetime, zone: ZoneInfo, data: st.DataObject
) -> None:
    schedule = parse(text)

    fires = list(islice(schedule.fires(moment, FAR, zone), 5))

    assert moment < fires[0]
    for earlier, later in pairwise(fires):
        assert earlier < later
        between = earlier + data.draw(st.floats(0, 0.999_999)) * (later - earlier)
        assert schedule.next_after(between, zone) == later
    assert all(fire.tzinfo is UTC and not fire.microsecond for fire in fires)


def test_fires_are_those_after_the_one_moment_up_to_the_other() -> None:
    day = datetime(2026, 7, 1, tzinfo=UTC)
    hours = [day + timedelta(hours=hour) for hour in range(5)]

    assert list(parse("hourly").fires(hours[0], hours[4], ZoneInfo("UTC"))) == hours[1:]
    assert list(parse("hourly").fires(hours[4], hours[0], ZoneInfo("UTC"))) == []


def test_fires_are_computed_when_they_are_asked_for() -> None:
    fires = parse("every second").fires(datetime(2026, 7, 1, tzinfo=UTC), FAR, SHANGHAI)

    assert next(fires) == datetime(2026, 7, 1, 0, 0, 1, tzinfo=UTC)


def test_the_moment_may_be_in_any_zone_and_between_two_seconds() -> None:
    moment = datetime(2026, 7, 1, 2, 59, 59, 999_999, tzinfo=SHANGHAI)

    assert parse("0 3 * * *").next_after(moment, SHANGHAI) == datetime(2026, 6, 30, 19, tzinfo=UTC)
    assert parse("0 * * * *").next_after(moment, SHANGHAI) == datetime(2026, 6, 30, 19, tzinfo=UTC)


def test_the_rarest_day_is_found() -> None:
    # A Sunday that is 29 February, over a century without a leap day.
    fire = parse("0 0 29 2 */7").next_after(datetime(2089, 1, 1, tzinfo=UTC), ZoneInfo("UTC"))

    assert fire == datetime(2128, 2, 29, tzinfo=UTC)


# --- spreading ---


@pytest.mark.parametrize(
    ("text", "room"), [("hourly", 60), ("daily", 1_440), ("每周一", 1_440), ("@monthly", 1_440), ("@yearly", 1_440)]
)
@pytest.mark.parametrize("window", [1, 600, 3_600, 86_400, 10_000_000])
def test_a_schedule_without_a_time_is_moved_within_the_window(text: str, room: int, window: int) -> None:
    schedule, start = parse(text), datetime(2026, 1, 1, tzinfo=UTC)
    plain = schedule.next_after(start, ZoneInfo("UTC"))
    assert plain

    shifts = []
    for key in range(500):
        spread = schedule.spread(key, window)
        fire = spread.next_after(plain - timedelta(seconds=1), ZoneInfo("UTC"))
        assert fire
        assert parse(spread.canonical) == spread == schedule.spread(key, window)
        shifts.append((fire - plain) // timedelta(minutes=1))

    minutes = min(window // 60, room)
    assert 0 == min(shifts) <= max(shifts) < max(minutes, 1) if minutes < 100 else max(shifts) > minutes * 0.9
    assert max(Counter(shifts).values()) < 3 * 500 / max(minutes, 1) + 10


def test_the_spread_never_changes_with_a_release() -> None:
    assert [parse("daily").spread(key, 86_400).canonical for key in (1, 2)] == ["11 3 * * *", "38 23 * * *"]


@pytest.mark.parametrize(
    "text", ["daily at 00:00", "0 0 * * *", "@midnight", "every 2 hours", "hourly at :00", "每天零点"]
)
def test_a_schedule_with_a_time_stays_where_it_is(text: str) -> None:
    schedule = parse(text)

    assert schedule.spread(7, 86_400) is schedule
    assert not schedule.timeless


def test_without_a_window_nothing_is_spread() -> None:
    schedule = parse("daily")

    assert schedule.spread(7, 0) is schedule
    assert schedule.timeless


# --- time zones ---


def test_a_time_zone_is_read_by_its_name() -> None:
    assert read_zone("Asia/Shanghai") == SHANGHAI
    assert read_zone("UTC") == ZoneInfo("UTC")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("Asia/Shanghia", "'Asia/Shanghia' is no IANA time zone; did you mean 'Asia/Shanghai'?"),
        ("asia/shanghai", "'asia/shanghai' is no IANA time zone; did you mean 'Asia/Shanghai'?"),
        ("Berlin", "'Berlin' is no IANA time zone; did you mean 'Europe/Berlin'?"),
        ("GMT+8", "'GMT+8' is no IANA time zone"),
        ("localtime", "'localtime' is no IANA time zone"),
        ("America", "'America' is no IANA time zone"),
        ("../passwd", "'../passwd' is no IANA time zone"),
        ("", "'' is no IANA time zone"),
        ("\x00\ud800", r"'\x00\ud800' is no IANA time zone"),
    ],
)
def test_another_name_is_refused_with_a_proposal(name: str, answer: str) -> None:
    with pytest.raises(UnreadableScheduleError) as caught:
        read_zone(name)

    assert str(caught.value) == answer


@given(st.text(max_size=300))
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(UnreadableScheduleError) as caught:
        read_zone(f"{name} ")

    assert str(caught.value).isprintable()
