"""What is learned about the time of upstream batches: compared with samples whose distribution is known."""

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from math import exp, log
from statistics import NormalDist, fmean, quantiles

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.completions import (
    DAY_MS,
    EDGES_MS,
    HOUR_MS,
    PRIOR,
    CompletionTimes,
    Law,
    Observation,
)
from tests.fakes import MINUTE, NOON

NOTHING = CompletionTimes()
MIDNIGHT = NOON - 12 * HOUR_MS


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - no secret


def a_time(chance: random.Random, median_minutes: float, sigma: float) -> int:
    return max(MINUTE, int(median_minutes * MINUTE * exp(sigma * chance.gauss(0, 1))))


def after(times: CompletionTimes, taken: Iterable[int], at: int, every: int) -> CompletionTimes:
    """Batches that end one after the other, each after the time it took."""
    for number, each in enumerate(taken):
        ends = at + number * every
        times = times.observed(Observation(ends - each, ends, has_ended=True))
    return times


def drawn_from(law: Law, count: int = 4_000) -> list[float]:
    """Times as the distribution has them, by its quantiles; those that expire count as two days."""
    shares = [(number + 0.5) / count for number in range(count)]
    return [float(law.quantile(each) or 2 * DAY_MS) for each in shares]


# Before anything is learned


@pytest.mark.parametrize(
    ("hours", "normal", "slow"), [(1, 0.10, 0.32), (6, 0.01, 0.10), (24, 0.0007, 0.03)]
)
def test_the_prior_is_a_mixture_of_normal_and_slow_days(
    hours: int, normal: float, slow: float
) -> None:
    (share, _, _), (other, _, _) = PRIOR

    expected = share * normal + other * slow

    assert expected == pytest.approx(NOTHING.law(NOON).open_after(hours * HOUR_MS), abs=0.008)


def test_most_batches_are_expected_within_an_hour_and_half_within_minutes() -> None:
    law = NOTHING.law(NOON)
    median = law.quantile(0.5)

    assert 0.8 < law.chance(HOUR_MS) < 0.9
    assert median is not None
    assert 7 * MINUTE < median < 21 * MINUTE


# What is learned


def test_many_batches_outweigh_the_prior() -> None:
    chance = dice(1)
    taken = [a_time(chance, 40, 0.5) for _ in range(3_000)]

    law = after(NOTHING, taken, NOON, 4 * MINUTE).law(NOON + 3_000 * 4 * MINUTE)

    for share, expected in zip((0.25, 0.5, 0.75), quantiles(taken, n=4), strict=True):
        assert expected == pytest.approx(law.quantile(share), rel=0.2)


def test_batches_that_were_canceled_do_not_make_the_times_shorter() -> None:
    """Half of the batches are canceled after 20 minutes; the true median is 30 minutes, exponential."""
    chance, times = dice(2), NOTHING
    for number in range(4_000):
        taken, at = int(chance.expovariate(log(2) / (30 * MINUTE))) + 1, NOON + number * 4 * MINUTE
        canceled = number % 2 == 0 and taken > 20 * MINUTE
        ends = at + (20 * MINUTE if canceled else taken)
        times = times.observed(Observation(at, ends, has_ended=not canceled))

    law = times.law(NOON + 4_000 * 4 * MINUTE)

    for minutes in (15, 30, 60, 90):
        expected = 0.5 ** (minutes / 30)
        assert expected == pytest.approx(law.open_after(minutes * MINUTE), abs=0.06)


def a_normal_fortnight() -> tuple[CompletionTimes, int]:
    chance = dice(3)
    taken = [a_time(chance, 7, 1.68) for _ in range(14 * 24 * 4)]
    return after(NOTHING, taken, MIDNIGHT, 15 * MINUTE), MIDNIGHT + len(taken) * 15 * MINUTE


def test_a_slow_day_shows_within_hours_and_is_forgotten_within_a_day() -> None:
    chance, (times, now) = dice(4), a_normal_fortnight()
    before = times.law(now).open_after(HOUR_MS)
    # Three hours of a slow day: four batches an hour, seen when they end or while they are open.
    batches = [(now + n * 15 * MINUTE, a_time(chance, 60, 1.0)) for n in range(12)]
    now += 3 * HOUR_MS
    for created, taken in sorted(batches, key=sum):
        if created + taken <= now:
            times = times.observed(Observation(created, created + taken, has_ended=True))
    open_ones = [created for created, taken in batches if created + taken > now]
    slow = times.law(now, open_ones).open_after(HOUR_MS)
    times = after(times, [a_time(chance, 7, 1.68) for _ in range(96)], now, 15 * MINUTE)
    recovered = times.law(now + DAY_MS).open_after(HOUR_MS)

    # Of the last hours' few batches, which count most, one more or less may be beyond an hour.
    assert before == pytest.approx(0.10, abs=0.06)
    # The true share is one half.
    assert slow > 0.2
    assert recovered == pytest.approx(0.10, abs=0.06)


def test_batches_that_are_open_are_enough_to_see_a_slow_day() -> None:
    times, now = a_normal_fortnight()
    open_ones = [now + n * 15 * MINUTE for n in range(8)]
    now += 3 * HOUR_MS

    usual, slow = times.law(now), times.law(now, open_ones)

    assert slow.chance(HOUR_MS) < usual.chance(HOUR_MS) - 0.2


def test_the_open_batches_count_for_nothing_once_they_are_long_ago() -> None:
    times, now = a_normal_fortnight()
    for number in range(8):
        times = times.observed(Observation(now, now + HOUR_MS + number, has_ended=False))

    right_after = times.law(now + HOUR_MS).chance(HOUR_MS)
    next_day = times.law(now + DAY_MS).chance(HOUR_MS)

    assert right_after < 0.7
    assert next_day > 0.85


def test_hours_of_the_day_are_learned_apart() -> None:
    times = NOTHING
    for day in range(60):
        for minutes, hour in ((3, 2), (45, 14)):
            created = MIDNIGHT + day * DAY_MS + hour * HOUR_MS
            for _ in range(3):
                times = times.observed(
                    Observation(created, created + minutes * MINUTE, has_ended=True)
                )
    last = MIDNIGHT + 61 * DAY_MS

    at_two, at_fourteen = (times.law(last + hour * HOUR_MS).quantile(0.5) for hour in (2, 14))

    assert at_two is not None
    assert at_fourteen is not None
    assert at_two < 10 * MINUTE < 30 * MINUTE < at_fourteen


OBSERVATIONS = st.builds(
    lambda created, taken, has_ended: Observation(
        NOON + created, NOON + created + taken, has_ended=has_ended
    ),
    st.integers(0, 5 * DAY_MS),
    st.integers(0, DAY_MS),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OBSERVATIONS, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_observations_does_not_matter(
    seen: list[Observation], chance: random.Random
) -> None:
    shuffled = list(seen)
    chance.shuffle(shuffled)
    laws = []
    for order in (seen, shuffled):
        times = NOTHING
        for each in order:
            times = times.observed(each)
        laws.append(times.law(NOON + 7 * DAY_MS).hazards)

    assert laws[0] == pytest.approx(laws[1])


# The record


@settings(max_examples=40, deadline=None)
@given(st.lists(OBSERVATIONS, max_size=30))
def test_the_record_is_json_and_reads_as_it_was_written(seen: list[Observation]) -> None:
    times = NOTHING
    for each in seen:
        times = times.observed(each)

    read = CompletionTimes.read(json.loads(json.dumps(times.stored())))

    now = NOON + 6 * DAY_MS
    assert times.law(now).hazards == pytest.approx(read.law(now).hazards, abs=0.002)
    assert read.stored() == CompletionTimes.read(read.stored()).stored()


def test_the_record_stays_small_whatever_was_seen() -> None:
    times, _ = a_normal_fortnight()

    assert len(json.dumps(times.stored(), separators=(",", ":"))) < 8_000


def test_a_record_of_another_version_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"version 9 .*only version 1: delete the record"):
        CompletionTimes.read({**NOTHING.stored(), "v": 9})


def test_a_record_with_other_spans_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"3 and 2 counts .*only with 20: delete the record"):
        CompletionTimes.read({**NOTHING.stored(), "recent": [[1, 2, 3], [1, 2]]})


# The distribution


LAWS = st.lists(OBSERVATIONS, max_size=12).map(
    lambda seen: _learned(seen).law(NOON + 3 * HOUR_MS, [NOON, NOON + HOUR_MS])
)
AGES = st.integers(0, 30 * HOUR_MS)


def _learned(seen: list[Observation]) -> CompletionTimes:
    times = NOTHING
    for each in seen:
        times = times.observed(each)
    return times


@settings(max_examples=100, deadline=None)
@given(LAWS, AGES, AGES, AGES)
def test_chances_are_chances(law: Law, age: int, one: int, other: int) -> None:
    sooner, later = sorted((one, other))

    assert 0 <= law.chance(sooner, age) <= law.chance(later, age) <= 1
    assert 0 < law.open_after(later) <= law.open_after(sooner) <= 1
    assert 0 <= law.rows_done(sooner, age) <= 1


@settings(max_examples=100, deadline=None)
@given(LAWS, st.floats(0, 0.99), st.integers(0, 20 * HOUR_MS))
def test_until_its_quantile_that_share_of_the_batches_ends(
    law: Law, share: float, age: int
) -> None:
    until = law.quantile(share, age)

    if until is None:
        assert law.chance(EDGES_MS[-1], age) < share
    else:
        assert share == pytest.approx(law.chance(until, age), abs=0.001)


@pytest.mark.parametrize("age", [0, 30 * MINUTE, 5 * HOUR_MS])
@pytest.mark.parametrize("until", [10 * MINUTE, HOUR_MS, 6 * HOUR_MS, 23 * HOUR_MS])
def test_rows_finish_evenly_over_the_time_of_their_batch(age: int, until: int) -> None:
    law = NOTHING.law(NOON)
    times = [each for each in drawn_from(law, 20_000) if each > age]

    expected = fmean(min(1.0, max(until, age) / each) for each in times)

    assert expected == pytest.approx(law.rows_done(until, age), abs=0.01)


def test_the_longer_a_batch_is_open_the_longer_it_will_be() -> None:
    """So it is for times whose logarithm is normal: NormalDist is the reference."""
    law, normal = NOTHING.law(NOON), NormalDist()

    def still_open(minutes: float) -> float:
        return sum(
            weight * (1 - normal.cdf(log(minutes / median) / sigma))
            for weight, median, sigma in PRIOR
        )

    for age in (10, 60, 240):
        expected = 1 - still_open(2 * age) / still_open(age)
        assert expected == pytest.approx(law.chance(2 * age * MINUTE, age * MINUTE), abs=0.01)
    assert law.chance(20 * MINUTE, 10 * MINUTE) < law.chance(10 * MINUTE)


def test_nothing_is_known_about_the_time_after_a_day() -> None:
    law = replace(NOTHING).law(NOON)

    assert law.quantile(0.9999) is None
    assert law.open_after(EDGES_MS[-1]) == law.open_after(2 * DAY_MS)
