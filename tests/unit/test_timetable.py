"""What becomes of slots that have come, against the rules written down a second time and the schedule's own fires."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import timetable as timetable_module
from orchestrator.domain import (
    DueSchedule,
    Firing,
    FiringOutcome,
    FiringReason,
    MisfirePolicy,
    OverlapPolicy,
    ScheduleRow,
)
from orchestrator.errors import UnreadableScheduleError
from orchestrator.schedule import parse
from orchestrator.timetable import AT_ONCE, SINGLY, Timetable

SECOND: Final = timedelta(seconds=1)
INSTANT: Final = timedelta(microseconds=1)
LATE: Final = timedelta(seconds=60)
FOREVER: Final = timedelta(days=60 * 366)
MANY: Final = 600
"""Slots of one example at most, so that there are many examples."""
TASK: Final = 7

CRONS: Final = (
    "* * * * *",
    "*/7 * * * *",
    "0,30 * * * *",
    "15 * * * *",
    "*/10 8-18 * * 1-5",
    "30 2 * * *",
    "0 0 * * *",
    "0 3,15 * * *",
    "0 8 * * 1",
    "0 0 13 * 5",
    "0 2 1,15 * *",
    "0 0 29 2 *",
)
WORDS: Final = ("hourly", "daily", "每天凌晨三点半", "weekly on mon 08:00", "每月1日 02:00", "every minute", "每15分钟")
ZONES: Final = ("UTC", "Asia/Shanghai", "Europe/Berlin", "America/Havana", "Australia/Lord_Howe", "America/St_Johns")


class Fate(NamedTuple):
    """What becomes of one slot."""

    slot: datetime
    outcome: FiringOutcome
    reason: FiringReason | None


@dataclass(frozen=True)
class Case:
    """A schedule whose slots have come, and by which defaults."""

    due: DueSchedule
    now: datetime
    window: timedelta
    overlapping: bool
    misfire_default: MisfirePolicy = MisfirePolicy.FIRE_ONCE
    overlap_default: OverlapPolicy = OverlapPolicy.SKIP

    @property
    def misfires(self) -> str:
        return (self.due.misfire_policy or self.misfire_default).lower()

    @property
    def may_overlap(self) -> bool:
        return (self.due.overlap_policy or self.overlap_default).lower() == "allow"

    def timetable(self) -> Timetable:
        return Timetable(self.misfire_default, self.overlap_default, self.window)

    def is_paused(self, slot: datetime) -> bool:
        return self.due.paused or (self.due.resumed_at is not None and slot < self.due.resumed_at)


def fires(canonical: str, zone: str, first: datetime, until: datetime) -> list[datetime]:
    """The slots from the first one to a moment, by the schedule alone."""
    return list(parse(canonical).fires(first - INSTANT, until, ZoneInfo(zone)))


def first_after(canonical: str, zone: str, moment: datetime) -> datetime | None:
    """The first slot after a moment, by the schedule alone."""
    return next(parse(canonical).fires(moment, moment + FOREVER, ZoneInfo(zone)), None)


def fates(case: Case) -> list[Fate]:
    """The rule: a pause, the window, the misfire policy, the overlap policy, in this order."""
    slots = fires(case.due.canonical, case.due.zone, case.due.next_fire_at, case.now)
    late = [slot for slot in slots if case.now - slot > LATE]
    busy = case.overlapping
    decided = []
    for slot in slots:
        outcome, reason = FiringOutcome.MISSED, None
        if case.is_paused(slot):
            outcome, reason = FiringOutcome.SKIPPED, FiringReason.PAUSED
        elif case.now - slot > case.window:
            reason = FiringReason.OUTSIDE_WINDOW
        elif slot in late[:-1] and case.misfires == "fire_once":
            reason = FiringReason.SUPERSEDED
        elif slot in late and case.misfires == "skip":
            reason = FiringReason.TOO_LATE
        elif busy and not case.may_overlap:
            outcome, reason = FiringOutcome.SKIPPED, FiringReason.OVERLAP
        else:
            busy = True
            outcome, reason = FiringOutcome.STARTED, FiringReason.CAUGHT_UP if slot in late else None
        decided.append(Fate(slot, outcome, reason))
    return decided


def spelt_out(case: Case, settled: Sequence[Firing]) -> list[Fate]:
    """Each slot that firings cover, in their order; a slot that two cover comes twice."""
    covered: list[Fate] = []
    for firing in settled:
        assert firing.task_id == case.due.task_id
        slots = fires(case.due.canonical, case.due.zone, firing.scheduled_for, firing.through or firing.scheduled_for)
        assert slots[0] == firing.scheduled_for, "a record begins at a slot"
        assert slots[-1] == (firing.through or firing.scheduled_for), "and ends at one"
        assert firing.through is None or len(slots) > 1, "a range is more than one slot"
        assert firing.through is None or firing.outcome is not FiringOutcome.STARTED, "a range starts nothing"
        covered += [Fate(slot, firing.outcome, firing.reason) for slot in slots]
    return covered


def settled_to_the_end(case: Case) -> list[list[Firing]]:
    """Claim after claim at the same moment, until nothing is due; a run of an earlier one is unfinished."""
    timetable = case.timetable()
    claims: list[list[Firing]] = []
    due, overlapping = case.due, case.overlapping
    while due.next_fire_at <= case.now:
        settled, rest = timetable.settle(due, case.now, overlapping=overlapping)
        assert settled, "a claim gets on"
        claims.append(settled)
        last = settled[-1].through or settled[-1].scheduled_for
        assert rest == first_after(due.canonical, due.zone, last), "what is left begins after what was settled"
        if rest is None:
            break
        due = replace(due, next_fire_at=rest)
        overlapping = overlapping or any(each.outcome is FiringOutcome.STARTED for each in settled)
    return claims


# --- Cases of every kind ---


@st.composite
def canonicals(draw: st.DrawFn) -> str:
    number = draw(st.integers(1, 120))
    size = draw(st.sampled_from(["seconds", "minutes", "hours", "days"]))
    text: str = draw(st.one_of(st.just(f"every {number} {size}"), st.sampled_from(CRONS), st.sampled_from(WORDS)))
    return parse(text).canonical


@st.composite
def moments(draw: st.DrawFn) -> datetime:
    # In the minutes around changes of the clock as well as anywhere.
    near = draw(
        st.sampled_from(
            [
                datetime(2026, 3, 29, 1, tzinfo=UTC),
                datetime(2026, 10, 25, 1, tzinfo=UTC),
                datetime(2026, 4, 4, 15, tzinfo=UTC),
            ]
        )
    )
    anywhere = st.integers(0, 3 * 366 * 86_400).map(lambda seconds: datetime(2025, 1, 1, tzinfo=UTC) + seconds * SECOND)
    start = draw(st.one_of(st.just(near), anywhere))
    return start + timedelta(
        seconds=draw(st.integers(-7_200, 7_200)), microseconds=draw(st.sampled_from([0, 1, 500_000, 999_999]))
    )


def written(values: type[MisfirePolicy] | type[OverlapPolicy]) -> st.SearchStrategy[str | None]:
    texts = [each.value for each in values]
    return st.one_of(st.none(), st.sampled_from([*texts, *map(str.upper, texts)]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    canonical, zone, now = draw(canonicals()), draw(st.sampled_from(ZONES)), draw(moments())
    # So many slots ago, however far they are apart.
    count = draw(st.one_of(st.integers(1, 5), st.integers(90, 110), st.integers(1, MANY)))
    slots = _latest(canonical, zone, now, count)
    at_an_edge = [
        now - slot + draw(st.sampled_from([-SECOND, -INSTANT, INSTANT * 0, INSTANT, SECOND])) for slot in slots
    ]
    window = draw(
        st.one_of(st.sampled_from(at_an_edge), st.sampled_from([LATE + SECOND, timedelta(days=1), timedelta(days=7)]))
    )
    window = max(window, LATE + INSTANT)
    pause_ends = st.one_of(
        st.sampled_from(slots),
        st.sampled_from(slots).map(lambda slot: slot + INSTANT),
        st.just(slots[0] - timedelta(days=1)),
        st.just(now),
    )
    paused = draw(st.sampled_from([False, False, False, True]))
    due = DueSchedule(
        TASK,
        canonical,
        zone,
        draw(written(MisfirePolicy)),
        draw(written(OverlapPolicy)),
        slots[0],
        paused=paused,
        resumed_at=None if paused else draw(st.one_of(st.none(), pause_ends)),
    )
    return Case(
        due,
        now,
        window,
        draw(st.booleans()),
        draw(st.sampled_from(MisfirePolicy)),
        draw(st.sampled_from(OverlapPolicy)),
    )


def _latest(canonical: str, zone: str, now: datetime, count: int) -> list[datetime]:
    """The latest slots up to a moment: at most so many, at least one, without what is under test."""
    back = timedelta(hours=1)
    while True:
        slots = []
        for slot in parse(canonical).fires(now - back, now, ZoneInfo(zone)):
            slots.append(slot)
            if len(slots) > 4 * MANY:
                slots = slots[-MANY:]
        if len(slots) >= min(count, MANY) or (slots and back > timedelta(days=90)) or back > timedelta(days=3_000):
            return slots[-count:]
        back *= 2


def a_case(
    text: str,
    next_fire_at: str,
    now: str,
    misfires: str | None = None,
    overlap: str | None = None,
    *,
    window: float = 86_400,
    zone: str = "UTC",
    overlapping: bool = False,
    paused: bool = False,
    resumed_at: str | None = None,
) -> Case:
    ended = None if resumed_at is None else datetime.fromisoformat(resumed_at)
    first = datetime.fromisoformat(next_fire_at)
    due = DueSchedule(TASK, text, zone, misfires, overlap, first, paused=paused, resumed_at=ended)
    return Case(due, datetime.fromisoformat(now), timedelta(seconds=window), overlapping)


# Less than a second before the window, and nothing else before it.
AT_THE_HORIZON: Final = a_case("every 1 second", "2026-07-01 11:58:00Z", "2026-07-01 12:00:00.5Z", window=120)
# A pause that ended while nobody claimed, longer ago than slots are recorded one by one.
PAUSE_IN_A_RANGE: Final = a_case(
    "every 1 second", "2026-07-01 11:50:00Z", "2026-07-01 12:00:00Z", resumed_at="2026-07-01 11:55:00Z"
)
PAUSE_BEFORE_THE_WINDOW: Final = a_case(
    "* * * * *", "2026-07-01 10:00:00Z", "2026-07-01 12:00:00Z", window=1_800, resumed_at="2026-07-01 11:00:30Z"
)


@given(cases())
@settings(max_examples=400, deadline=None)
def test_every_slot_that_has_come_gets_the_fate_of_the_rule_and_one_record(case: Case) -> None:
    claims = settled_to_the_end(case)

    settled = [firing for claim in claims for firing in claim]
    assert spelt_out(case, settled) == fates(case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(AT_THE_HORIZON, id="less than a second before the window"),
        pytest.param(PAUSE_IN_A_RANGE, id="a pause that ended within a range"),
        pytest.param(PAUSE_BEFORE_THE_WINDOW, id="a pause that ended before the window"),
    ],
)
def test_slots_that_only_just_belong_together_get_their_own_fates(case: Case) -> None:
    settled = [firing for claim in settled_to_the_end(case) for firing in claim]

    assert spelt_out(case, settled) == fates(case)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_one_claim_is_bounded(case: Case) -> None:
    settled, rest = case.timetable().settle(case.due, case.now, overlapping=case.overlapping)

    ranges = [each for each in settled if each.through is not None]
    # Paused ones, those outside the window, those that were missed.
    assert len(ranges) <= 3
    alone = len(settled) - len(ranges)
    fires_all = case.misfires == "all" and not case.due.paused
    assert alone <= 2 * SINGLY + 2 + (AT_ONCE if fires_all else 62)
    assert rest is None or rest > case.now or alone >= AT_ONCE


# --- The rule, in numbers ---


@pytest.mark.parametrize(
    ("misfires", "started"),
    [
        ("fire_once", ["11:58", "11:59", "12:00"]),
        ("skip", ["11:59", "12:00"]),
        ("all", ["11:55", "11:56", "11:57", "11:58", "11:59", "12:00"]),
    ],
)
def test_late_is_over_60_seconds_and_each_misfire_policy_does_what_it_says(misfires: str, started: list[str]) -> None:
    case = a_case("* * * * *", "2026-07-01 11:55Z", "2026-07-01 12:00:00Z", misfires, "allow")

    ((settled),) = settled_to_the_end(case)

    assert [f"{each.scheduled_for:%H:%M}" for each in settled if each.outcome is FiringOutcome.STARTED] == started
    assert [f"{each.scheduled_for:%H:%M}" for each in settled if each.reason is FiringReason.CAUGHT_UP] == [
        slot for slot in started if slot < "11:59"
    ]


@pytest.mark.parametrize("overlapping", [False, True])
def test_only_one_slot_starts_where_runs_may_not_overlap(overlapping: bool) -> None:  # noqa: FBT001 -- a parameter
    case = a_case("* * * * *", "2026-07-01 11:55Z", "2026-07-01 12:00Z", "all", "skip", overlapping=overlapping)

    ((settled),) = settled_to_the_end(case)

    outcomes = [each.outcome for each in settled]
    assert outcomes.count(FiringOutcome.STARTED) == (0 if overlapping else 1)
    assert {each.reason for each in settled if each.outcome is FiringOutcome.SKIPPED} == {FiringReason.OVERLAP}
    assert overlapping or outcomes[0] is FiringOutcome.STARTED


def test_a_million_missed_slots_are_a_hundred_records_and_a_range() -> None:
    case = a_case("every 1 second", "2026-06-20 00:00Z", "2026-07-01 12:00Z", "skip", window=604_800)

    settled, rest = case.timetable().settle(case.due, case.now, overlapping=False)

    outside, before = settled[:2]
    assert (outside.reason, outside.scheduled_for, outside.through) == (
        FiringReason.OUTSIDE_WINDOW,
        case.due.next_fire_at,
        case.now - case.window - SECOND,
    )
    assert (before.reason, before.scheduled_for) == (FiringReason.TOO_LATE, case.now - case.window)
    # One by one: the latest hundred of those that were missed, and those that are on time.
    assert before.through == case.now - (60 + SINGLY + 1) * SECOND
    assert [each.scheduled_for for each in settled[2:]] == [
        case.now - back * SECOND for back in range(60 + SINGLY, -1, -1)
    ]
    assert rest == case.now + SECOND


def test_all_fires_so_many_at_once_and_the_rest_stays_due() -> None:
    case = a_case("every 1 second", "2026-07-01 11:00Z", "2026-07-01 11:45Z", "all", "allow")

    claims = settled_to_the_end(case)

    assert list(map(len, claims)) == [AT_ONCE, AT_ONCE, 2_701 - 2 * AT_ONCE]
    slots = [each.scheduled_for for claim in claims for each in claim]
    assert {later - earlier for earlier, later in pairwise(slots)} == {SECOND}
    assert {each.outcome for claim in claims for each in claim} == {FiringOutcome.STARTED}


def test_a_slot_longer_ago_than_the_window_never_fires_be_it_by_a_moment() -> None:
    exact = a_case("0 0 * * *", "2026-07-01 00:00Z", "2026-07-01 00:02Z", "all", window=120)
    over = replace(exact, now=exact.now + INSTANT)

    ((on_the_edge,),) = settled_to_the_end(exact)
    ((beyond_it,),) = settled_to_the_end(over)

    assert (on_the_edge.outcome, on_the_edge.reason) == (FiringOutcome.STARTED, FiringReason.CAUGHT_UP)
    assert (beyond_it.outcome, beyond_it.reason) == (FiringOutcome.MISSED, FiringReason.OUTSIDE_WINDOW)


# --- The chain of slots ---


@given(canonicals(), st.sampled_from(ZONES), moments(), st.integers(1, MANY))
@settings(max_examples=150, deadline=None)
def test_slots_and_the_last_of_them_are_the_schedules_fires(
    canonical: str, zone: str, until: datetime, count: int
) -> None:
    expected = _latest(canonical, zone, until, count)
    timetable = Timetable()

    assert list(timetable.slots(canonical, zone, expected[0], until)) == expected
    assert timetable.last_slot(canonical, zone, expected[0], until) == expected[-1]
    assert Timetable().last_slot(canonical, zone, expected[0], expected[0]) == expected[0]


@given(
    canonicals(),
    st.sampled_from(ZONES),
    moments(),
    st.lists(st.one_of(st.integers(-90_000, 90_000), st.integers(-30, 30)), min_size=5, max_size=60),
)
@settings(max_examples=150, deadline=None)
def test_what_is_remembered_answers_rightly_in_any_order(
    canonical: str, zone: str, around: datetime, steps: list[int]
) -> None:
    timetable = Timetable()
    schedule, place = parse(canonical), ZoneInfo(zone)
    for step in steps:
        moment = around + step * SECOND
        # Also at the answer itself, and just before it.
        for asked in (moment, schedule.next_after(moment, place) or moment):
            for each in (asked, asked - INSTANT):
                assert timetable.next_after(canonical, zone, each) == schedule.next_after(each, place)


@pytest.mark.parametrize("most", [3, 1_000])
def test_what_is_remembered_is_kept_apart_by_schedule_and_zone_and_bounded(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(timetable_module, "_REMEMBERED", most)
    timetable = Timetable()
    moment = datetime(2026, 7, 1, 10, 20, 30, tzinfo=UTC)
    for _ in range(2):
        for text in ("0 0 * * *", "30 2 * * *", "every 7 minutes"):
            for zone in ZONES:
                answer = timetable.next_after(text, zone, moment)
                assert answer == parse(text).next_after(moment, ZoneInfo(zone))
                assert len(timetable._answers) <= most  # noqa: SLF001 -- it must not grow without end


# --- Reading ---

NOW: Final = datetime(2026, 7, 1, 10, 20, 30, tzinfo=UTC)
DAILY: Final = ScheduleRow(TASK, "daily", "UTC", active=True, misfire_policy=None, overlap_policy=None)
ANY_TEXT: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=220)
ALMOST: Final = st.builds(
    lambda text, at, piece: text[: at % (len(text) + 1)] + piece + text[at % (len(text) + 1) :],
    st.sampled_from([*CRONS, *WORDS, "every 5 seconds", "@daily"]),
    st.integers(0, 40),
    st.text("0123456789 */-,:每周月日点分隔一二三十atmondyhu@#LW٣²Ⅷ\t\u3000", max_size=4),
)


@given(
    st.one_of(st.none(), ALMOST, ANY_TEXT),
    st.one_of(st.sampled_from([*ZONES, "localtime", "posix/UTC", "../etc/passwd", "", "utc", "GMT+8"]), ANY_TEXT),
    st.booleans(),
    st.one_of(written(MisfirePolicy), ANY_TEXT),
    st.one_of(written(OverlapPolicy), ANY_TEXT),
    st.sampled_from([0, 3_600, 86_400]),
)
@settings(max_examples=600, deadline=None)
def test_any_row_is_read_and_what_cannot_be_is_a_problem_that_never_fires(
    text: str | None,
    zone: str,
    active: bool,  # noqa: FBT001 -- made by Hypothesis
    misfires: str | None,
    overlap: str | None,
    spread: int,
) -> None:
    row = ScheduleRow(TASK, text, zone, active, misfires, overlap)

    reading = Timetable(spread=spread).read(row, NOW)

    assert reading.row is row
    if text is None or reading.problem is not None:
        assert (reading.canonical, reading.next_fire_at) == (None, None)
        assert reading.problem is None if text is None else reading.problem
    else:
        assert reading.canonical == parse(text).spread(TASK, spread).canonical
        expected = first_after(reading.canonical, zone, NOW) if active else None
        assert reading.next_fire_at == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (replace(DAILY, text="fortnightly"), "cannot read"),
        (replace(DAILY, text="x" * 201), "at most 200 characters"),
        (replace(DAILY, text="\t"), "empty"),
        (replace(DAILY, zone="Asia/Shangai"), "did you mean 'Asia/Shanghai'"),
        (replace(DAILY, misfire_policy="fire_twice"), "misfire_policy 'fire_twice' is none of fire_once, skip, all"),
        (replace(DAILY, overlap_policy="queue"), "overlap_policy 'queue' is none of skip, allow"),
    ],
)
def test_what_is_wrong_is_named(row: ScheduleRow, says: str) -> None:
    reading = Timetable().read(row, NOW)

    assert says in (reading.problem or "")
    assert (reading.canonical, reading.next_fire_at) == (None, None)


def test_a_schedule_whose_zone_has_gone_is_refused_and_not_guessed() -> None:
    case = a_case("0 0 * * *", "2026-07-01 00:00Z", "2026-07-01 00:00:01Z", zone="Mars/Olympus")

    with pytest.raises(UnreadableScheduleError, match="no IANA time zone"):
        case.timetable().settle(case.due, case.now, overlapping=False)


def test_rules_tell_readings_apart_that_may_differ() -> None:
    assert Timetable().rules == Timetable(MisfirePolicy.ALL, OverlapPolicy.ALLOW, timedelta(days=7)).rules
    assert Timetable().rules != Timetable(spread=60).rules
