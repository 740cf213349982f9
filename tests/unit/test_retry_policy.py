"""When to try again: delays, limits and Retry-After, for any input."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.discovery import RetryPolicy, retry_after_seconds

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
YEAR = 366 * 86_400.0

seconds = st.floats(min_value=0.001, max_value=86_400)
policies = st.builds(RetryPolicy, max_retries=st.integers(0, 100), base_delay=seconds, max_delay=seconds)
retry_numbers = st.integers(min_value=1, max_value=10**30)
requests_to_wait = st.none() | st.floats(min_value=0, max_value=YEAR)
randoms = st.floats(min_value=0, max_value=1, exclude_max=True)


@given(policies, retry_numbers, requests_to_wait, randoms)
def test_a_delay_is_never_zero_never_beyond_the_cap_and_never_before_retry_after(
    policy: RetryPolicy, retry_number: int, retry_after: float | None, random: float
) -> None:
    delay = policy.delay(retry_number, retry_after, random)

    assert 0 < delay <= policy.max_delay
    assert delay >= min(retry_after or 0, policy.max_delay)


@given(policies, st.integers(1, 60), randoms)
def test_a_delay_lies_between_half_and_one_and_a_half_of_its_nominal_length(
    policy: RetryPolicy, retry_number: int, random: float
) -> None:
    nominal = policy.base_delay * 2 ** (retry_number - 1)

    delay = policy.delay(retry_number, None, random)

    assert min(nominal * 0.5, policy.max_delay) <= delay <= min(nominal * 1.5, policy.max_delay)


@given(policies, retry_numbers, requests_to_wait, randoms)
def test_the_next_delay_is_no_shorter(
    policy: RetryPolicy, retry_number: int, retry_after: float | None, random: float
) -> None:
    assert policy.delay(retry_number, retry_after, random) <= policy.delay(retry_number + 1, retry_after, random)


def test_delays_double_from_the_base_and_differ_by_chance() -> None:
    policy = RetryPolicy(max_retries=3, base_delay=60, max_delay=3_600)

    assert [policy.delay(number, None, 0.5) for number in (1, 2, 3)] == [60, 120, 240]
    assert [policy.delay(1, None, random) for random in (0.0, 0.25, 0.75)] == [30, 45, 75]


def test_retries_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        RetryPolicy(3, 60, 3_600).delay(0, None, 0.5)


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_so_many_retries_mean_one_more_attempt(max_retries: int) -> None:
    policy = RetryPolicy(max_retries, 60, 3_600)
    attempts = 1
    while policy.may_retry(retries_done=attempts - 1):
        attempts += 1

    assert attempts == max_retries + 1


@given(st.text(), st.none() | st.text())
@example("9" * 5_000, None)
@example("-" + "9" * 5_000, None)
@example("٣", None)
@example("Sun, 06 Nov 1994 08:49:37 +9999999999", None)
@example("Sun, 06 Nov 1994 08:49:37 -2359", "Fri, 31 Dec 9999 23:59:59 GMT")
@example("Mon, 01 Jan 0001 00:00:00 +2359", None)
@example("Fri, 31 Dec 9999 23:59:59 -2359", None)
@example("Sun, 06 Nov 99999999999 08:49:37 GMT", None)
@example("Sun Nov", "Sun,")
@example(":::::", "-0000")
def test_no_text_makes_the_reader_fail(value: str, date: str | None) -> None:
    result = retry_after_seconds(value, date, NOW)

    assert result is None or 0 <= result <= YEAR


# Text made of the tokens of dates reaches deeper than any text.
@given(st.lists(st.sampled_from(["Sun", ",", " ", "06", "Nov", "-", "94", "1994", ":", "08:49:37", "+", "GMT", "0"])))
def test_no_nearly_date_makes_the_reader_fail(tokens: list[str]) -> None:
    result = retry_after_seconds("".join(tokens), "".join(reversed(tokens)), NOW)

    assert result is None or 0 <= result <= YEAR


@given(st.integers(min_value=0, max_value=10**6))
def test_seconds_are_taken_as_they_are(value: int) -> None:
    assert retry_after_seconds(str(value), None, NOW) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" 7 ", 7),
        ("1.5", 1.5),
        ("-3", 0),
        ("0", 0),
        ("9" * 5_000, YEAR),
        ("", None),
        ("soon", None),
        ("1e3", None),
        ("inf", None),
        ("nan", None),
        ("1, 2", None),
        ("+5", None),
        (None, None),
    ],
)
def test_what_is_read(value: str | None, expected: float | None) -> None:
    assert retry_after_seconds(value, None, NOW) == expected


@pytest.mark.parametrize(
    "value",
    [
        "Sun, 01 Mar 2026 12:01:30 GMT",  # IMF-fixdate
        "Sunday, 01-Mar-26 12:01:30 GMT",  # RFC 850
        "Sun Mar  1 12:01:30 2026",  # asctime
        "Sun, 01 Mar 2026 20:01:30 +0800",  # not HTTP, but seen
    ],
)
def test_every_format_of_a_date_is_read(value: str) -> None:
    assert retry_after_seconds(value, None, NOW) == 90


@given(st.timedeltas(min_value=timedelta(days=-3_000), max_value=timedelta(days=3_000)), st.integers(0, 10**6))
def test_a_wrong_clock_on_the_server_does_not_matter(skew: timedelta, wait: int) -> None:
    there = (NOW + skew).replace(microsecond=0)

    result = retry_after_seconds(
        format_datetime(there + timedelta(seconds=wait), usegmt=True), format_datetime(there, usegmt=True), NOW
    )

    assert result == wait


def test_an_unreadable_date_header_means_the_local_clock() -> None:
    assert retry_after_seconds("Sun, 01 Mar 2026 12:01:30 GMT", "yesterday", NOW) == 90


def test_the_past_is_now() -> None:
    assert retry_after_seconds("Sun, 06 Nov 1994 08:49:37 GMT", None, NOW) == 0
