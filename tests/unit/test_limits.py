"""The limiter's arithmetic: laws that hold for every sequence, and stories that read like a log.

Nothing here knows the constants that are tuned (margins, horizons, recovery): only what must hold for any of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.limits import (
    DIMENSIONS,
    FULL_RATE,
    SCALE,
    UNUSED,
    Bucket,
    Cost,
    Dimension,
    Group,
    Observation,
    Seen,
    Settlement,
    advanced,
    answered,
    block,
    expected_start,
    group_id,
    grown,
    model_group,
    moved,
    new_group,
    next_start,
    observe,
    overloaded,
    reserve,
    restated,
    settle,
)
from tests.fakes import MINUTE, NOON, SECOND, known_group

# The same examples in every run: a gate must not fail by chance, nor because the machine is busy.
LAW = settings(max_examples=150, deadline=None, derandomize=True)

ONE = Cost(1, 1, 1)
LONG = 24 * 60 * MINUTE


def bucket(limit: int, capacity: int, at: int = NOON) -> Bucket:
    """A full bucket whose limit is known."""
    return Bucket(limit=limit, capacity=capacity, level=capacity * SCALE, at=at, learned=True)


def group(requests: int = 60, burst: int = 10) -> Group:
    """A group that is bound by requests only; tokens are there in plenty."""
    plenty = bucket(10**9, 10**9)
    return replace(
        new_group("org", "a", NOON),
        requests=bucket(requests, burst),
        input_tokens=plenty,
        output_tokens=plenty,
    )


def seen(requests: Seen, tokens: Seen | None = None) -> dict[Dimension, Seen]:
    tokens = tokens or Seen(10**6, 10**5)
    return {"requests": requests, "input_tokens": tokens, "output_tokens": tokens}


def levels(state: Group) -> tuple[int, ...]:
    return tuple(state.bucket(dimension).level for dimension in DIMENSIONS)


# Laws over any history -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    milliseconds: int


@dataclass(frozen=True)
class Ask:
    """Reserve for some jobs, as a worker does; those that are `dropped` are given back at once, unsent."""

    costs: tuple[Cost, ...]
    horizon_ms: int
    skew_ms: int
    dropped: int


@dataclass(frozen=True)
class Stop:
    """A 429."""

    milliseconds: int


LAW_LIMITS = (600, 60_000, 24_000)
LAW_BURSTS = (20, 2_000, 500)


def law_group() -> Group:
    return replace(
        new_group("org", "a", NOON),
        **{
            dimension: bucket(limit, burst)
            for dimension, limit, burst in zip(DIMENSIONS, LAW_LIMITS, LAW_BURSTS, strict=True)
        },  # type: ignore[arg-type]
    )


costs = st.builds(Cost, st.just(1), st.integers(0, LAW_BURSTS[1]), st.integers(0, LAW_BURSTS[2]))
waits = st.builds(Wait, st.integers(0, 20_000))
stops = st.builds(Stop, st.integers(1, 10_000))


def asks(horizons: st.SearchStrategy[int], skews: st.SearchStrategy[int]) -> st.SearchStrategy[Ask]:
    blocks = st.lists(costs, min_size=1, max_size=12).map(tuple)
    return st.builds(Ask, blocks, horizons, skews, st.integers(0, 3))


def play(steps: Sequence[Wait | Ask | Stop]) -> tuple[list[tuple[int, Cost]], Group]:
    """Play a history; return what was started, and the group as it is then."""
    state, now = law_group(), NOON
    started: list[tuple[int, int, Cost]] = []
    for step in steps:
        match step:
            case Wait(milliseconds):
                now += milliseconds
            case Stop(milliseconds):
                state = block(state, now + milliseconds, "rate limited", now)
                # What had not started by then is void.
                started = [each for each in started if each[1] <= now]
            case Ask(wanted, horizon_ms, skew_ms, dropped):
                epoch = state.epoch
                state, starts = reserve(state, wanted, now + skew_ms, horizon_ms)
                taken = list(zip(starts, wanted, strict=False))
                kept = max(0, len(taken) - dropped)
                started += [(now, start, cost) for start, cost in taken[:kept]]
                returned = [Settlement(epoch, cost, UNUSED) for _, cost in taken[kept:]]
                state = settle(state, returned, now + skew_ms)
    return [(start, cost) for _, start, cost in started], state


def assert_within_the_law(started: Sequence[tuple[int, Cost]], slack_ms: int) -> None:
    """In every window, no more than the capacity and what was refilled during the window (and the slack)."""
    calls = sorted(started, key=lambda each: each[0])
    for dimension, limit, burst in zip(DIMENSIONS, LAW_LIMITS, LAW_BURSTS, strict=True):
        for first, (begin, _) in enumerate(calls):
            total = 0
            for end, cost in calls[first:]:
                total += cost.of(dimension)
                allowed = burst * MINUTE + limit * (end - begin + slack_ms)
                assert total * MINUTE <= allowed, (dimension, begin - NOON, end - NOON, total)


@LAW
@given(st.lists(waits | asks(st.just(0), st.just(0)), max_size=25))
def test_what_starts_at_once_is_never_above_the_law(steps: list[Wait | Ask]) -> None:
    started, _ = play(steps)

    assert_within_the_law(started, slack_ms=1)


HORIZON = 2_000


@LAW
@given(st.lists(waits | stops | asks(st.just(HORIZON), st.just(0)), max_size=25))
def test_what_is_planned_ahead_is_above_the_law_by_no_more_than_the_plan_reaches(
    steps: list[Wait | Ask | Stop],
) -> None:
    """Capacity that is held for a later start is refilled meanwhile: at most the refill of one horizon."""
    started, _ = play(steps)

    assert_within_the_law(started, slack_ms=HORIZON)


@LAW
@given(st.lists(waits | asks(st.just(0), st.integers(-5_000, 5_000)), max_size=25))
def test_clocks_that_differ_by_seconds_do_no_more_than_those_seconds(
    steps: list[Wait | Ask],
) -> None:
    started, _ = play(steps)

    assert_within_the_law(started, slack_ms=2 * 5_000)


@LAW
@given(
    st.lists(waits | stops | asks(st.integers(0, 60_000), st.integers(-5_000, 5_000)), max_size=25),
    costs,
)
def test_nobody_starves(steps: list[Wait | Ask | Stop], cost: Cost) -> None:
    """Whatever happened before, a job that is asked for again and again starts."""
    _, state = play(steps)
    now = NOON + sum(step.milliseconds for step in steps if isinstance(step, Wait))

    for _ in range(20):
        start = next_start(state, cost, now)
        state, starts = reserve(state, [cost], now, LONG)
        assert [start] == starts
        assert now <= start < now + 60 * MINUTE
        now = start


@LAW
@given(st.lists(waits | stops | asks(st.integers(0, 60_000), st.just(0)), max_size=25))
def test_a_group_left_alone_is_full_again(steps: list[Wait | Ask | Stop]) -> None:
    _, state = play(steps)

    rested = advanced(state, NOON + LONG)

    assert tuple(burst * SCALE for burst in LAW_BURSTS) == levels(rested)
    assert FULL_RATE == advanced(rested, NOON + 2 * LONG).rate_factor


@LAW
@given(
    st.lists(waits | asks(st.integers(0, 60_000), st.just(0)), max_size=15),
    costs,
    st.integers(0, 100_000),
    st.integers(0, 100_000),
)
def test_time_only_helps(steps: list[Wait | Ask], cost: Cost, first: int, second: int) -> None:
    """Levels never fall by waiting, and at a steady rate asking later never brings an earlier start."""
    _, state = play(steps)
    now = NOON + sum(step.milliseconds for step in steps if isinstance(step, Wait))
    sooner, later = now + min(first, second), now + max(first, second)

    before, after = levels(advanced(state, sooner)), levels(advanced(state, later))

    assert all(less <= more for less, more in zip(before, after, strict=True))
    assert next_start(state, cost, sooner) <= next_start(state, cost, later)


@LAW
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 30_000))
def test_a_clock_that_is_behind_takes_nothing_away_and_adds_nothing(
    spent: int, behind: int, ahead: int
) -> None:
    state, _ = reserve(law_group(), [Cost(1, spent % 2_000, spent % 500)], NOON, 0)
    state = advanced(block(state, NOON + 100, "rate limited", NOON), NOON + ahead)

    looked_at = advanced(state, NOON + ahead - behind)

    assert (levels(state), state.rate_factor) == (levels(looked_at), looked_at.rate_factor)
    assert next_start(state, ONE, NOON + ahead) == next_start(looked_at, ONE, NOON + ahead)


@LAW
@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=50))
def test_many_short_steps_refill_as_much_as_one_long(steps: list[int]) -> None:
    """Exact integers: nothing is rounded away, however often a worker looks."""
    empty, _ = reserve(group(requests=7, burst=1), [ONE] * 2, NOON, LONG)
    total = NOON + sum(steps)

    walked, now = empty, NOON
    for step in steps:
        now += step
        walked = advanced(walked, now)

    assert advanced(empty, total).requests.level == walked.requests.level


@LAW
@given(st.lists(costs, min_size=1, max_size=20), st.integers(0, 10_000))
def test_what_was_not_used_is_given_back_to_the_last_unit(
    wanted: list[Cost], horizon_ms: int
) -> None:
    state = law_group()

    after, starts = reserve(state, wanted, NOON, horizon_ms)
    given_back = settle(
        after, [Settlement(after.epoch, cost, UNUSED) for cost in wanted[: len(starts)]], NOON
    )

    assert (levels(state), 0) == (levels(given_back), given_back.outstanding)


@LAW
@given(costs, costs)
def test_the_books_settle_to_what_was_really_used(reserved: Cost, used: Cost) -> None:
    after, (_,) = reserve(law_group(), [reserved], NOON, 0)

    settled = settle(after, [Settlement(after.epoch, reserved, used)], NOON)

    left = tuple(
        (burst - used.of(dimension)) * SCALE
        for dimension, burst in zip(DIMENSIONS, LAW_BURSTS, strict=True)
    )
    assert left == levels(settled)


# Stories ---------------------------------------------------------------------------------------------------


def test_sixty_a_minute_with_a_burst_of_ten() -> None:
    state = group(requests=60, burst=10)
    story = [
        # at s, asked for, horizon s, granted, all started by s
        (0, 4, 0, 1, 0),  # saved-up capacity is spent one by one, not in one millisecond
        (0, 20, 3, 9, 3),  # the rest of the burst is planned over the next seconds ...
        (3, 20, 0, 0, 0),  # ... and nobody jumps the queue
        (13, 1, 0, 1, 13),  # one comes back each second
        (600, 50, 2, 10, 602),  # ten minutes of rest save up one burst, no more
    ]
    for at, wanted, horizon, granted, by in story:
        now = NOON + at * SECOND
        state, starts = reserve(state, [ONE] * wanted, now, horizon * SECOND)
        assert granted <= len(starts) <= granted + (horizon and 3), (at, len(starts))
        assert all(now <= start <= NOON + by * SECOND for start in starts), (at, starts)
        assert sorted(starts) == starts


def test_a_steady_stream_runs_at_the_whole_limit() -> None:
    state, started, now = group(requests=600, burst=100), 0, NOON
    while now < NOON + 10 * MINUTE:
        state, starts = reserve(state, [ONE] * 50, now, 2 * SECOND)
        started += len(starts)
        now += 500

    assert 6_000 <= started <= 6_000 + 100 + 20


def test_output_tokens_bind_as_requests_do() -> None:
    state = replace(group(requests=60_000, burst=1_000), output_tokens=bucket(60_000, 5_000))
    state, starts = reserve(state, [Cost(1, 0, 1_000)] * 30, NOON, LONG)

    assert 30 == len(starts)
    # Five are saved up; the other 25 come at one a second.
    assert NOON + 25 * SECOND == starts[-1]


def test_a_request_larger_than_the_bucket_starts_when_it_is_full_and_the_debt_is_paid() -> None:
    state = replace(group(), input_tokens=bucket(60_000, 10_000))

    state, (large,) = reserve(state, [Cost(1, 30_000, 0)], NOON, 0)
    following = next_start(state, Cost(1, 1_000, 0), NOON)

    assert NOON == large
    assert NOON + 21 * SECOND == following


def test_the_first_job_that_does_not_fit_ends_the_block() -> None:
    """Start times are in order: a small job behind does not overtake for ever."""
    state = replace(group(), input_tokens=bucket(60_000, 10_000))
    wanted = [Cost(1, 10_000, 0), Cost(1, 9_000, 0), Cost(1, 0, 0)]

    _, starts = reserve(state, wanted, NOON, SECOND)

    assert 1 == len(starts)


def test_nothing_asked_for_changes_nothing() -> None:
    assert (group(), []) == reserve(group(), [], NOON, SECOND)


def test_looking_takes_nothing() -> None:
    state = group()
    before = levels(state)

    assert NOON == next_start(state, ONE, NOON)
    assert before == levels(state)


def test_a_group_nobody_knows_starts_with_one_call_and_then_slowly() -> None:
    state = new_group("org", "a", NOON)
    cost = state.estimate(input_chars=400, max_tokens=1_000)

    _, starts = reserve(state, [cost] * 100, NOON, MINUTE)

    assert NOON == starts[0]
    assert 1 < len(starts) <= 61
    assert not any(state.bucket(dimension).learned for dimension in DIMENSIONS)


# Estimates -------------------------------------------------------------------------------------------------


def test_max_tokens_bounds_the_estimate_and_is_never_reserved() -> None:
    state = new_group("org", "a", NOON)

    small, large = state.estimate(350, 1), state.estimate(350, 64_000)

    assert (1, 1) == (small.requests, small.output_tokens)
    assert large.output_tokens < 2_000
    assert 0 < large.input_tokens < 350


def test_estimates_follow_what_calls_use() -> None:
    state = group()
    for _ in range(300):
        reserved = state.estimate(10_000, 4_096)
        state = settle(
            state,
            [
                Settlement(
                    state.epoch, reserved, Cost(1, 5_000, 1_000), call_ms=800, input_chars=10_000
                )
            ],
            NOON,
        )

    learned = state.estimate(10_000, 4_096)

    assert 4_500 <= learned.input_tokens <= 5_500
    assert 900 <= learned.output_tokens <= 1_100


@pytest.mark.parametrize("used", [Cost(1, 0, 0), Cost(1, 1, 0), Cost(1, 10**9, 10**9)])
def test_odd_calls_leave_usable_estimates(used: Cost) -> None:
    state = group()
    for _ in range(300):
        taught = Settlement(state.epoch, ONE, used, call_ms=1, input_chars=10_000)
        state = settle(state, [taught], NOON)

    cost = state.estimate(1, 10)

    assert cost.input_tokens >= 1
    assert 1 <= cost.output_tokens <= 10


def test_a_cached_prompt_does_not_teach_how_many_tokens_a_character_is() -> None:
    state = group()

    settled = settle(state, [Settlement(state.epoch, ONE, Cost(1, 10, 50), call_ms=800)], NOON)

    assert state.estimate(10_000, 1).input_tokens == settled.estimate(10_000, 1).input_tokens


def test_a_call_whose_input_was_all_cached_still_teaches_its_output() -> None:
    state = group()
    for _ in range(300):
        taught = Settlement(state.epoch, ONE, Cost(1, 0, 900), call_ms=800, input_chars=10_000)
        state = settle(state, [taught], NOON)

    assert 850 <= state.estimate(10_000, 4_096).output_tokens <= 900
    assert group().estimate(10_000, 1).input_tokens == state.estimate(10_000, 1).input_tokens


def test_an_answer_whose_duration_is_unknown_teaches_tokens() -> None:
    state = group()

    settled = settle(
        state, [Settlement(state.epoch, ONE, Cost(1, 5_000, 900), input_chars=10_000)], NOON
    )

    assert state.estimate(10_000, 1).input_tokens < settled.estimate(10_000, 1).input_tokens


def test_calls_that_were_not_sent_teach_nothing() -> None:
    state = group()

    settled = settle(state, [Settlement(state.epoch, ONE, UNUSED)], NOON)

    assert state.estimate(10_000, 4_096) == settled.estimate(10_000, 4_096)


def test_what_a_dead_worker_held_fades_away() -> None:
    state, _ = reserve(group(), [Cost(1, 0, 1_000)] * 3, NOON, MINUTE)
    assert 3_000 == state.outstanding
    for minute in range(1, 240):
        state = advanced(state, NOON + minute * MINUTE)

    assert state.outstanding < 300


# Learning --------------------------------------------------------------------------------------------------


def test_the_first_answer_teaches_the_limits() -> None:
    learned = observe(
        new_group("org", "a", NOON),
        Observation(NOON, seen(Seen(600, 99), Seen(60_000, 9_000))),
        NOON,
    )

    assert (600, 60_000, 60_000) == tuple(learned.bucket(name).limit for name in DIMENSIONS)
    assert all(learned.bucket(name).learned for name in DIMENSIONS)
    assert 0 < levels(learned)[0] <= 99 * SCALE


def test_a_new_limit_starts_a_new_plan() -> None:
    """Start times were made for another rate: whoever has not started asks again."""
    state = known_group(seen=seen(Seen(600, 100)))

    halved = observe(state, Observation(NOON + SECOND, seen(Seen(300, 50))), NOON + SECOND)

    assert state.epoch + 1 == halved.epoch
    assert 300 == halved.requests.limit


def test_the_same_limits_again_start_no_new_plan() -> None:
    state = known_group(seen=seen(Seen(600, 100)))

    again = observe(state, Observation(NOON + SECOND, seen(Seen(600, 90))), NOON + SECOND)

    assert state.epoch == again.epoch


@pytest.mark.parametrize(
    "absurd",
    [Seen(0, 5), Seen(-600, 5), Seen(600, -1), Seen(600, 1_000_000), Seen(0, 0)],
)
def test_absurd_headers_are_ignored(absurd: Seen) -> None:
    state = known_group(seen=seen(Seen(600, 100)))

    after = observe(state, Observation(NOON, {"requests": absurd}), NOON)

    assert (state.requests, state.epoch) == (after.requests, after.epoch)


def test_one_absurd_dimension_does_not_spoil_the_others() -> None:
    headers = seen(Seen(-1, -1), Seen(60_000, 9_000))

    learned = observe(new_group("org", "a", NOON), Observation(NOON, headers), NOON)

    assert (False, True, True) == tuple(learned.bucket(name).learned for name in DIMENSIONS)


def test_an_answer_older_than_the_last_is_dropped() -> None:
    newer = observe(
        known_group(seen=seen(Seen(600, 100))),
        Observation(NOON + 2 * SECOND, seen(Seen(600, 60))),
        NOON + 2 * SECOND,
    )

    assert newer == observe(
        newer, Observation(NOON + SECOND, seen(Seen(600, 1))), NOON + 3 * SECOND
    )


def test_no_headers_change_no_level() -> None:
    state = known_group(seen=seen(Seen(600, 100)))

    after = observe(state, Observation(NOON, {}), NOON)

    assert (levels(state), state.epoch) == (levels(after), after.epoch)


def test_a_stranger_on_the_organization_is_noticed_at_once() -> None:
    state = known_group(seen=seen(Seen(600, 100)))

    lowered = observe(state, Observation(NOON + SECOND, seen(Seen(600, 3))), NOON + SECOND)

    assert levels(lowered)[0] <= 3 * SCALE
    assert next_start(lowered, Cost(5, 0, 0), NOON + SECOND) > NOON + SECOND


def test_room_that_upstream_shows_is_used_in_the_end() -> None:
    """The books forgot a refund somewhere; the headers bring the capacity back."""
    state = known_group(seen=seen(Seen(600, 100)))
    state = settle(state, [Settlement(state.epoch, Cost(0), Cost(90))], NOON)
    poor = levels(state)[0]

    now = NOON
    for _ in range(20):
        now += SECOND
        state = observe(state, Observation(now, seen(Seen(600, 100))), now)

    assert levels(state)[0] > poor
    assert levels(state)[0] > 80 * SCALE


@LAW
@given(
    st.lists(
        st.tuples(st.integers(-100, 3_000), st.integers(-100, 3_000), st.integers(-3, 3)),
        max_size=30,
    ),
    costs,
)
def test_no_headers_whatever_make_the_group_unusable(
    history: list[tuple[int, int, int]], cost: Cost
) -> None:
    state, now = new_group("org", "a", NOON), NOON
    for limit, remaining, seconds in history:
        now += 700
        at = now + seconds * SECOND
        headers = seen(Seen(limit, remaining), Seen(limit * 100, remaining * 100))
        state = observe(state, Observation(at, headers), now)

    _, starts = reserve(state, [cost], now, LONG)

    assert 1 == len(starts)
    for name in DIMENSIONS:
        assert state.bucket(name).limit > 0
        assert state.bucket(name).level <= state.bucket(name).capacity * SCALE


def test_short_requests_do_not_teach_how_long_a_token_is() -> None:
    """Nine tokens for "Hi" are overhead; a long prompt after many of them must not look four times as large."""
    state = known_group()
    for _ in range(100):
        reserved = state.estimate(2, 100)
        state = settle(state, [Settlement(state.epoch, reserved, Cost(1, 9, 5), 2, 500)], NOON)

    assert state.estimate(91_000, 100).input_tokens < 30_000


# Limits that are stated, or that nobody tells --------------------------------------------------------------


def test_stated_limits_hold_from_the_first_call_on() -> None:
    state = new_group("org", "a", NOON, {"requests": 600, "output_tokens": 60_000})

    assert (600, 60_000) == (state.requests.limit, state.output_tokens.limit)
    _, starts = reserve(state, [ONE] * 50, NOON, 6 * SECOND)
    assert 50 == len(starts)


def test_stated_limits_cap_what_headers_tell() -> None:
    state = new_group("org", "a", NOON, {"requests": 100})

    learned = observe(state, Observation(NOON, seen(Seen(600, 100), Seen(60_000, 9_000))), NOON)

    assert (100, 60_000) == (learned.requests.limit, learned.input_tokens.limit)
    again = observe(
        learned,
        Observation(NOON + SECOND, seen(Seen(600, 100), Seen(60_000, 9_000))),
        NOON + SECOND,
    )
    assert (100, learned.epoch) == (again.requests.limit, again.epoch)


def test_headers_below_the_stated_limit_are_believed() -> None:
    state = new_group("org", "a", NOON, {"requests": 1_000})

    assert 600 == observe(state, Observation(NOON, seen(Seen(600, 100))), NOON).requests.limit


def test_limits_stated_later_cap_what_was_learned_and_never_raise_it() -> None:
    learned = known_group(seen=seen(Seen(600, 100)))

    assert 60 == restated(learned, {"requests": 60}, NOON).requests.limit
    assert 600 == restated(learned, {"requests": 6_000}, NOON).requests.limit


def test_a_stated_limit_that_is_raised_or_taken_away_is_learned_anew() -> None:
    told = seen(Seen(600, 100))
    capped = observe(new_group("org", "a", NOON, {"requests": 100}), Observation(NOON, told), NOON)

    for stated, limit in (({"requests": 200}, 200), ({}, 600)):
        freed = restated(capped, stated, NOON)

        assert limit == observe(freed, Observation(NOON, told), NOON).requests.limit


def test_an_upstream_that_names_no_limits_is_explored_and_backed_away_from() -> None:
    """Additive increase while calls are served, multiplicative decrease at a 429."""
    state = new_group("org", "a", NOON)
    for _ in range(300):
        state = grown(state)
    explored = state.requests.limit

    backed_away = block(state, NOON + SECOND, "rate limited", NOON)

    assert explored > 60
    assert 1 <= backed_away.requests.limit < explored
    slowly = grown(backed_away).requests.limit - backed_away.requests.limit
    assert 0 < slowly <= grown(state).requests.limit - state.requests.limit


def test_limits_that_are_known_or_stated_are_not_explored() -> None:
    known = known_group(seen=seen(Seen(600, 100)))
    stated = new_group("org", "a", NOON, {"requests": 50})

    assert known.requests == grown(known).requests
    assert (50, 50) == (
        grown(stated).requests.limit,
        block(stated, NOON + SECOND, "rate limited", NOON).requests.limit,
    )


def test_exploring_never_stops_for_good() -> None:
    state, now = new_group("org", "a", NOON), NOON
    for _ in range(500):
        state = block(state, now + SECOND, "rate limited", now)
        now += 2 * SECOND

    assert state.requests.limit >= 1
    assert 1 == len(reserve(state, [Cost(1, 10, 10)], now, LONG)[1])


# Blocks ----------------------------------------------------------------------------------------------------


def test_a_block_stops_everybody_until_its_time_and_then_goes_on_more_slowly() -> None:
    state = group(requests=600, burst=100)
    until = NOON + 10 * SECOND

    blocked = block(state, until, "rate limited", NOON)

    _, starts = reserve(blocked, [ONE] * 20, NOON, MINUTE)
    assert 20 == len(starts)
    assert all(start >= until for start in starts)
    assert (until, "rate limited") == (blocked.blocked_until, blocked.blocked_reason)
    assert 0 < blocked.rate_factor < FULL_RATE
    # From an empty bucket: the nineteen after the first take at least as long as the limit says.
    assert starts[-1] - starts[0] >= 19 * 100


def test_a_block_voids_what_had_not_started() -> None:
    state, _ = reserve(group(), [ONE] * 30, NOON, MINUTE)

    blocked = block(state, NOON + SECOND, "rate limited", NOON)

    assert state.epoch + 1 == blocked.epoch
    assert NOON + 5 * SECOND > next_start(blocked, ONE, NOON)


def test_a_reservation_of_before_a_block_moves_no_level_after_it() -> None:
    state, _ = reserve(group(), [Cost(1, 100, 100)], NOON, 0)
    blocked = block(state, NOON + SECOND, "rate limited", NOON)

    for used in (UNUSED, Cost(1, 900, 900)):
        settled = settle(blocked, [Settlement(state.epoch, Cost(1, 100, 100), used)], NOON)
        assert (levels(blocked), 0) == (levels(settled), settled.outstanding)


def test_a_shorter_block_does_not_end_a_longer_one() -> None:
    blocked = block(group(), NOON + MINUTE, "spend limit", NOON)

    again = block(blocked, NOON + SECOND, "rate limited", NOON)

    assert (NOON + MINUTE, "spend limit") == (again.blocked_until, again.blocked_reason)


def test_429s_of_calls_in_flight_together_are_one_event() -> None:
    once = block(group(), NOON + SECOND, "rate limited", NOON)

    often = once
    for milliseconds in range(1, 20):
        often = block(often, NOON + SECOND + milliseconds, "rate limited", NOON + milliseconds)

    assert once.rate_factor == often.rate_factor
    assert NOON + SECOND + 19 == often.blocked_until


def test_a_ramp_limit_slows_down_more_than_a_429() -> None:
    plain = block(group(), NOON + SECOND, "rate limited", NOON)
    ramp = block(group(), NOON + SECOND, "rate limited", NOON, ramp=True)

    assert 0 < ramp.rate_factor < plain.rate_factor


def test_429s_without_end_never_stop_a_group_for_good() -> None:
    state, now = group(), NOON
    for _ in range(200):
        state = block(state, now + SECOND, "rate limited", now)
        now += 2 * SECOND

    assert state.rate_factor > 0
    assert next_start(state, ONE, now) < now + MINUTE


def test_the_rate_comes_back_step_by_step() -> None:
    state = block(group(), NOON + SECOND, "rate limited", NOON, ramp=True)

    factors = [advanced(state, NOON + second * SECOND).rate_factor for second in range(0, 600, 5)]

    assert sorted(factors) == factors
    assert (state.rate_factor, FULL_RATE) == (factors[0], factors[-1])


def test_looking_often_does_not_slow_the_recovery() -> None:
    state = block(group(), NOON + SECOND, "rate limited", NOON, ramp=True)

    walked = state
    for tick in range(0, 60_000, 7):
        walked = advanced(walked, NOON + tick)

    straight = advanced(state, NOON + 60_000)
    assert abs(straight.rate_factor - walked.rate_factor) <= 2


# Overload --------------------------------------------------------------------------------------------------


def overloads(count: int) -> Group:
    state = group()
    for number in range(count):
        state = overloaded(state, NOON + number * 10)
    return state


def test_a_single_overload_is_only_that_jobs_bad_luck() -> None:
    assert NOON + SECOND >= next_start(overloads(1), ONE, NOON)
    assert (0, FULL_RATE) == (overloads(1).blocked_until, overloads(1).rate_factor)


def test_overloads_in_a_row_open_the_breaker_and_leave_the_rate_alone() -> None:
    state = overloads(20)

    assert "overloaded" == state.blocked_reason
    assert NOON < state.blocked_until <= NOON + 5 * MINUTE
    assert FULL_RATE == state.rate_factor
    assert next_start(state, ONE, NOON) >= state.blocked_until


def test_an_open_breaker_lets_one_probe_through_at_a_time() -> None:
    state = overloads(20)

    state, starts = reserve(state, [ONE] * 10, NOON, 60 * MINUTE)

    assert 1 == len(starts)
    assert next_start(state, ONE, NOON) > starts[0]


def test_an_answer_closes_the_breaker() -> None:
    closed = answered(overloads(20))

    assert (0, None, 0) == (closed.blocked_until, closed.blocked_reason, closed.overload_streak)


def test_an_answer_to_a_quiet_group_changes_nothing() -> None:
    state = group()

    assert state is answered(state)


def test_an_answer_does_not_lift_a_429() -> None:
    blocked = block(overloads(1), NOON + MINUTE, "rate limited", NOON)

    assert NOON + MINUTE == answered(blocked).blocked_until


# Names and guesses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("claude-a-1", "claude-a.x"),
        ("claude-a-1-20260101", "claude-a.x"),
        ("claude-new", "claude-new"),
        ("claude-new-20260101", "claude-new"),
    ],
)
def test_models_share_a_group_and_unknown_ones_have_their_own(model: str, name: str) -> None:
    assert name == model_group(model, {"claude-a-1": "claude-a.x"})


def test_a_group_is_named_by_organization_and_models() -> None:
    assert "org/a" == group_id("org", "a") == group().id


def test_a_group_that_moved_says_where_and_voids_its_plan() -> None:
    gone = moved(group(), "org-7")

    assert ("org-7", 1) == (gone.moved_to, gone.epoch)


@pytest.mark.parametrize(
    ("groups", "backlog", "start"),
    [
        # Nobody knows: about one a second.
        ([], 0, NOON),
        ([], 60, NOON + MINUTE),
        # What is known counts, of this model group only, all organisations together.
        ([group(600)], 600, NOON + MINUTE),
        ([group(600), replace(group(600), organization="org-2")], 600, NOON + 30 * SECOND),
        ([replace(group(6_000), model_group="b")], 60, NOON + MINUTE),
        ([moved(group(6_000), "org-2")], 60, NOON + MINUTE),
        # A block is waited out first.
        ([block(group(600), NOON + MINUTE, "rate limited", NOON)], 600, NOON + 2 * MINUTE),
    ],
)
def test_a_rough_guess_of_the_start(groups: list[Group], backlog: int, start: int) -> None:
    assert start == expected_start(groups, "a", backlog, NOON)
