"""What the demo submits, and how it reads the simulator's books."""

import json

import pytest

from scripts import demo


def call(
    group: str, at: float, seconds: float = 1.0, outcome: str = "answered"
) -> dict[str, object]:
    return {"model_group": group, "at": at, "ended_at": at + seconds, "outcome": outcome}


STATS = {
    "requests": 5,
    "answered": 3,
    "rate_limited": {"total": 2},
    "billed": 4,
    "duplicates": {"extra_calls": 1},
}


def test_no_two_jobs_are_alike() -> None:
    jobs = demo.demo_jobs()

    assert 200 == len({json.dumps(job["params"], sort_keys=True) for job in jobs})
    assert 200 == len({job["custom_id"] for job in jobs})


def test_the_jobs_are_of_many_kinds() -> None:
    params = [job["params"] for job in demo.demo_jobs()]

    assert 3 == len({each["model"] for each in params})
    assert 3 == len({each["max_tokens"] for each in params})
    assert 1 == sum("thinking" in each for each in params)
    assert {True, False} == {"system" in each for each in params}


def test_the_ideal_time_starts_each_call_when_the_limit_allows_it() -> None:
    calls = [call("haiku", float(second)) for second in range(30)]

    # Ten may start at once, the other twenty one a second.
    assert 21.0 == demo.ideal_seconds(calls, per_second=1.0, capacity=10.0)


def test_a_long_call_may_be_what_the_ideal_time_waits_for() -> None:
    calls = [call("haiku", 0.0, seconds=50.0), call("haiku", 1.0)]

    assert 50.0 == demo.ideal_seconds(calls, per_second=1.0, capacity=10.0)


def test_the_books_say_what_was_refused_and_what_was_paid_twice() -> None:
    upstream = demo.upstream_of(STATS, [call("haiku", 100.0)], began_at=100.0)

    assert (2, 5, 1) == (upstream.rate_limited, upstream.calls, upstream.billed_twice)


def test_limit_use_is_that_of_the_busiest_group_until_its_last_start() -> None:
    haiku = [call("haiku", 100.0 + number / 10) for number in range(101)]
    ledger = [*haiku, call("opus", 500.0), call("haiku", 900.0, outcome="rate_limited")]

    upstream = demo.upstream_of(STATS, ledger, began_at=100.0)

    # In ten seconds 600 a minute with a burst of 100 would have let 200 start.
    assert 101 / 200 == pytest.approx(upstream.limit_use)


def test_books_without_an_answer_can_be_read() -> None:
    upstream = demo.upstream_of(STATS, [], began_at=100.0)

    assert (0.0, 0.0) == (upstream.ideal_seconds, upstream.limit_use)
