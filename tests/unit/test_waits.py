"""Where a job waits: one rule, and what must hold for every wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.domain.waits import (
    LEAST_WINDOW_MS,
    LONGEST_DELAY_MS,
    LONGEST_PARK_MS,
    USUAL,
    Place,
    grown,
    parked_until,
    place_of,
    window_of,
)

SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
NOON = 1_795_176_000_000

delays = st.integers(min_value=0, max_value=30 * 24 * HOUR)
stays = st.integers(min_value=0, max_value=5 * MINUTE)
lefts = st.integers(min_value=-MINUTE, max_value=15 * MINUTE)
windows = st.integers(min_value=0, max_value=15 * MINUTE)


@pytest.mark.parametrize(
    ("delay", "stay", "left", "place"),
    [
        # A short wait after a call, with most of the invocation ahead.
        (2 * SECOND, 10 * SECOND, 10 * MINUTE, Place.INVOCATION),
        # The longest one.
        (10 * SECOND, 10 * SECOND, 10 * MINUTE, Place.INVOCATION),
        # A receive is cheaper than a longer sleep.
        (10 * SECOND + 1, 10 * SECOND, 10 * MINUTE, Place.QUEUE),
        # Just enough time is left for another call, and not quite enough.
        (2 * SECOND, 10 * SECOND, 62 * SECOND, Place.INVOCATION),
        (2 * SECOND, 10 * SECOND, 62 * SECOND - 1, Place.QUEUE),
        # A job that was not called goes back at once.
        (2 * SECOND, 0, 10 * MINUTE, Place.QUEUE),
        # SQS would hide it for longer, but what waits there counts as in flight.
        (15 * MINUTE, 10 * SECOND, 10 * MINUTE, Place.QUEUE),
        (15 * MINUTE + 1, 10 * SECOND, 10 * MINUTE, Place.PARKED),
        (30 * 24 * HOUR, 10 * SECOND, 10 * MINUTE, Place.PARKED),
    ],
)
def test_where_a_job_waits(delay: int, stay: int, left: int, place: Place) -> None:
    assert place is place_of(delay, stay_ms=stay, left_ms=left)


@given(delays, stays, lefts, windows)
def test_a_call_still_fits_after_a_wait_in_the_invocation(
    delay: int, stay: int, left: int, window: int
) -> None:
    place = place_of(delay, stay_ms=stay, left_ms=left, window_ms=window)

    if place is Place.INVOCATION:
        assert delay <= stay
        assert left - delay >= max(window, LEAST_WINDOW_MS)


@given(delays, stays, lefts, windows)
def test_a_job_is_parked_exactly_if_its_wait_is_too_long_for_the_queue(
    delay: int, stay: int, left: int, window: int
) -> None:
    """Whatever its source: the record that is written and the place it waits in never disagree."""
    place = place_of(delay, stay_ms=stay, left_ms=left, window_ms=window)

    assert (place is Place.PARKED) == (delay > LONGEST_DELAY_MS)
    assert (place is Place.PARKED) == (parked_until(NOON, delay) is not None)


@given(delays, delays, stays, lefts)
def test_a_longer_wait_is_never_spent_nearer(one: int, other: int, stay: int, left: int) -> None:
    order = list(Place)
    shorter, longer = (
        order.index(place_of(delay, stay_ms=stay, left_ms=left)) for delay in sorted((one, other))
    )

    assert shorter <= longer


@given(delays)
def test_a_parked_job_is_checked_after_six_hours_at_the_latest(delay: int) -> None:
    until = parked_until(NOON, delay)

    if until is not None:
        assert NOON + LONGEST_DELAY_MS < until <= NOON + 6 * HOUR
        assert until == NOON + min(delay, LONGEST_PARK_MS)


@pytest.mark.parametrize(
    ("receives", "seconds"), [(1, 5), (19, 5), (20, 10), (39, 10), (40, 20), (60, 40), (999, 900)]
)
def test_the_wait_for_a_fault_doubles_every_20_receives(receives: int, seconds: int) -> None:
    assert seconds * SECOND == grown(5 * SECOND, receives)


@given(st.integers(0, LONGEST_DELAY_MS), st.integers(1, 1_000))
def test_the_wait_for_a_fault_is_spent_in_the_queue(delay: int, receives: int) -> None:
    assert delay <= grown(delay, receives)
    assert Place.QUEUE is place_of(grown(delay, receives))


@pytest.mark.parametrize(
    ("max_tokens", "full_window", "seconds"),
    [
        # Short answers have the least window, longer ones their tokens at 25 a second and half a minute.
        (100, False, 60),
        (750, False, 60),
        (10_000, False, 430),
        # No call needs more than nine tenths of an invocation: it would never start.
        (100_000, False, 810),
        (100, True, 810),
    ],
)
def test_the_time_a_call_should_have(max_tokens: int, seconds: int, *, full_window: bool) -> None:
    assert seconds * SECOND == window_of(max_tokens, 900 * SECOND, full_window=full_window)


@given(
    max_tokens=st.integers(0, 1_000_000),
    whole=st.integers(0, 15 * MINUTE),
    full_window=st.booleans(),
)
def test_any_call_may_start_at_the_start_of_an_invocation(
    max_tokens: int, whole: int, *, full_window: bool
) -> None:
    assert window_of(max_tokens, whole, full_window=full_window) <= whole


def test_no_default_is_longer_than_its_place_allows() -> None:
    assert Place.INVOCATION is place_of(USUAL.rest_ms, stay_ms=USUAL.rest_ms, left_ms=15 * MINUTE)
    assert Place.QUEUE is place_of(USUAL.hold_ms)
    assert Place.QUEUE is place_of(USUAL.overload_cap_ms)
