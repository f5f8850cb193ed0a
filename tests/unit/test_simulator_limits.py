"""The simulator's buckets: true to the last unit, whatever the order of questions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.claude_simulator.limits import (
    SECOND,
    UNIT,
    Bucket,
    Charge,
    LimitGroup,
    Limits,
    Refusal,
    Rules,
    capacity_units,
    rfc3339,
)

START = 1_795_400_000 * SECOND
MINUTE = 60 * SECOND


def group(
    rpm: int | None = None, itpm: int | None = None, otpm: int | None = None, **rules: object
) -> LimitGroup:
    return LimitGroup(Limits(rpm, itpm, otpm), Rules(**rules), START)  # type: ignore[arg-type]


def charge(**changes: int | None) -> Charge:
    plain: dict[str, int | None] = {
        "estimated_input": 0,
        "input_tokens": 0,
        "output_tokens": 0,
        "max_tokens": 0,
        "first_token": START,
        "millitokens_per_second": None,
    }
    return Charge(**(plain | changes))  # type: ignore[arg-type]


def level(bucket: Bucket | None, now: int) -> Fraction:
    assert bucket is not None
    bucket.advance(now)
    return Fraction(bucket.level, UNIT)


gaps = st.lists(st.integers(0, 5 * SECOND), min_size=1, max_size=60)


@given(
    limit=st.integers(1, 6000), burst_ms=st.integers(1, 60_000), gaps=gaps, tries=st.integers(1, 4)
)
def test_no_window_ever_admits_more_than_the_burst_plus_the_refill(
    limit: int, burst_ms: int, gaps: list[int], tries: int
) -> None:
    burst = burst_ms * SECOND // 1000
    limits = group(rpm=limit, burst=burst)
    now, admitted = START, []
    for gap in gaps:
        now += gap
        admitted += [now for _ in range(tries) if limits.admit(now, 0, 1) is None]

    capacity = Fraction(capacity_units(limit, burst), UNIT)
    for first, begin in enumerate(admitted):
        for last, end in enumerate(admitted[first:], first):
            assert last - first + 1 <= capacity + Fraction(limit * (end - begin), MINUTE)


@given(limit=st.integers(1, 6000), gaps=gaps, sizes=st.data())
def test_input_tokens_admitted_never_exceed_the_burst_plus_the_refill(
    limit: int, gaps: list[int], sizes: st.DataObject
) -> None:
    limits = group(itpm=limit)
    now, taken = START, 0
    for gap in gaps:
        now += gap
        size = sizes.draw(st.integers(1, limit))
        if limits.admit(now, size, 1) is None:
            taken += size

    assert taken <= limit + Fraction(limit * (now - START), MINUTE)


@given(limit=st.integers(1, 6000), gaps=gaps)
def test_a_call_that_waits_for_retry_after_is_admitted(limit: int, gaps: list[int]) -> None:
    limits = group(rpm=limit, burst=SECOND)
    now = START
    for gap in gaps:
        now += gap
        refusal = limits.admit(now, 0, 1)
        if refusal is not None:
            now += refusal.retry_after_seconds * SECOND

            assert limits.admit(now, 0, 1) is None


@given(
    limit=st.integers(1, 100_000),
    answers=st.lists(
        st.tuples(
            st.integers(0, 90 * SECOND), st.integers(1, 5000), st.none() | st.integers(1, 10**6)
        ),
        max_size=12,
    ),
    questions=st.lists(st.integers(0, 200 * SECOND), max_size=20),
)
def test_the_level_does_not_depend_on_when_it_is_read(
    limit: int, answers: list[tuple[int, int, int | None]], questions: list[int]
) -> None:
    watched, alone = (Bucket(limit, capacity_units(limit, MINUTE), START) for _ in range(2))
    for start, tokens, speed in answers:
        watched.produce(START + start, tokens, speed)
        alone.produce(START + start, tokens, speed)
    for question in sorted(questions):
        watched.advance(START + question)

    end = START + 200 * SECOND
    assert level(watched, end) == level(alone, end)


@given(tokens=st.integers(1, 100_000), speed=st.integers(1, 10**6))
def test_an_answer_drains_exactly_its_tokens(tokens: int, speed: int) -> None:
    bucket = Bucket(1, capacity_units(1, MINUTE), START)
    bucket.level = -10 * UNIT
    bucket.produce(START, tokens, speed)
    end = START + 1000 * tokens * SECOND  # long after its end, far below the refill

    bucket.refill = 0  # so that only the answer moves the level
    assert level(bucket, end) == -10 - tokens


def test_output_is_charged_while_it_is_produced() -> None:
    limits = group(otpm=6000)  # refills 100 a second
    assert limits.admit(START, 0, 10_000) is None
    limits.run(START, charge(output_tokens=10_000, millitokens_per_second=1_100_000))

    # It falls by 1,100 - 100 a second from 6,000: above zero until the sixth second.
    assert level(limits.output_tokens, START + 5 * SECOND) == 1000
    assert limits.admit(START + 5 * SECOND, 0, 1) is None
    assert level(limits.output_tokens, START + 8 * SECOND) == -2000
    assert limits.admit(START + 8 * SECOND, 0, 1) == Refusal("output_tokens", 21)


def test_max_tokens_plays_no_part_in_the_output_limit() -> None:
    limits = group(otpm=100)

    assert limits.admit(START, 0, 128_000) is None


def test_the_old_rule_reserves_max_tokens_and_gives_the_rest_back() -> None:
    limits = group(otpm=6000, reserve_max_tokens=True)
    assert limits.admit(START, 0, 6000) is None
    limits.run(START, charge(output_tokens=100, max_tokens=6000, first_token=START + SECOND))

    assert limits.admit(START, 0, 1) == Refusal("output_tokens", 1)
    assert level(limits.output_tokens, START + SECOND) == 6000


def test_input_is_corrected_at_the_first_token_and_cache_reads_are_free() -> None:
    limits = group(itpm=60_000)
    assert limits.admit(START, 50_000, 1) is None
    limits.run(
        START, charge(estimated_input=50_000, input_tokens=20_000, first_token=START + 2 * SECOND)
    )

    assert level(limits.input_tokens, START + 2 * SECOND - 1) < 12_000
    assert level(limits.input_tokens, START + 2 * SECOND) == 42_000


def test_a_refused_call_takes_nothing() -> None:
    limits = group(rpm=60, itpm=1000, otpm=1000)
    assert limits.admit(START, 900, 1) is None
    for _ in range(5):
        assert limits.admit(START, 900, 1) == Refusal("input_tokens", 48)

    assert level(limits.requests, START) == 59
    assert level(limits.input_tokens, START) == 100


def test_retry_after_is_the_time_until_there_is_room_for_this_call() -> None:
    # As captured: 200,000 a minute, bucket below zero; about 53k tokens short gives 16 s.
    limits = group(itpm=200_000)
    assert limits.input_tokens is not None
    limits.input_tokens.level = -10_000 * UNIT

    assert limits.admit(START, 43_000, 1) == Refusal("input_tokens", 16)


def test_retry_after_may_name_the_full_bucket_instead() -> None:
    next_slot = group(rpm=60)
    full = group(rpm=60, retry_after="full")
    for limits in (next_slot, full):
        for _ in range(60):
            limits.admit(START, 0, 1)

    assert next_slot.admit(START, 0, 1) == Refusal("requests", 1)
    assert full.admit(START, 0, 1) == Refusal("requests", 60)


def test_sixty_a_minute_may_be_enforced_as_one_a_second() -> None:
    limits = group(rpm=60, request_burst=SECOND)

    assert limits.admit(START, 0, 1) is None
    assert limits.admit(START, 0, 1) == Refusal("burst", 1)
    assert limits.admit(START + SECOND, 0, 1) is None


def test_a_prompt_above_the_limit_of_a_minute_never_fits() -> None:
    limits = group(itpm=1000)

    assert limits.admit(START, 1001, 1) == Refusal("input_tokens", 1)
    assert limits.admit(START + 10 * MINUTE, 1001, 1) == Refusal("input_tokens", 1)


def test_a_prompt_above_a_short_burst_waits_for_the_full_bucket() -> None:
    limits = group(itpm=6000, burst=10 * SECOND)  # holds 1,000

    assert limits.admit(START, 3000, 1) is None
    assert level(limits.input_tokens, START) == -2000
    assert limits.admit(START, 3000, 1) == Refusal("input_tokens", 30)


def test_a_limit_of_none_is_no_limit() -> None:
    limits = group()

    assert all(limits.admit(START, 10**9, 10**9) is None for _ in range(100))
    assert limits.headers(START) == []


def test_headers_show_every_bucket_and_round_tokens_to_thousands() -> None:
    limits = group(rpm=4000, itpm=200_000, otpm=80_000)
    assert limits.admit(START, 1600, 1) is None
    limits.run(START, charge(output_tokens=500))
    headers = {name.decode(): value.decode() for name, value in limits.headers(START)}

    now, soon = rfc3339(START // SECOND).decode(), rfc3339(START // SECOND + 1).decode()
    assert headers == {
        "anthropic-ratelimit-requests-limit": "4000",
        "anthropic-ratelimit-requests-remaining": "3999",
        "anthropic-ratelimit-requests-reset": soon,
        "anthropic-ratelimit-input-tokens-limit": "200000",
        "anthropic-ratelimit-input-tokens-remaining": "198000",
        "anthropic-ratelimit-input-tokens-reset": soon,
        "anthropic-ratelimit-output-tokens-limit": "80000",
        "anthropic-ratelimit-output-tokens-remaining": "80000",
        "anthropic-ratelimit-output-tokens-reset": soon,
        "anthropic-ratelimit-tokens-limit": "280000",
        "anthropic-ratelimit-tokens-remaining": "278000",
        "anthropic-ratelimit-tokens-reset": soon,
    }
    assert now.endswith("Z")
    assert len(now) == len("2026-11-22T00:00:00Z")


def test_a_full_bucket_resets_now_and_an_overdrawn_one_shows_zero() -> None:
    limits = group(itpm=200_000, otpm=80_000)
    assert limits.input_tokens is not None
    limits.input_tokens.level = -10_000 * UNIT
    headers = dict(limits.headers(START))

    assert headers[b"anthropic-ratelimit-input-tokens-remaining"] == b"0"
    assert headers[b"anthropic-ratelimit-input-tokens-reset"] == rfc3339(START // SECOND + 63)
    assert headers[b"anthropic-ratelimit-output-tokens-reset"] == rfc3339(START // SECOND)


@pytest.mark.parametrize(("before", "after", "expected"), [(60, 600, 60), (600, 60, 60)])
def test_a_changed_limit_keeps_what_is_in_the_bucket_as_far_as_it_fits(
    before: int, after: int, expected: int
) -> None:
    limits = group(rpm=before)
    limits.relimit(Limits(after, None, None), Rules(), START)

    assert level(limits.requests, START) == expected
