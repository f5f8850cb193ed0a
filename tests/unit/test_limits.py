"""The limiter's arithmetic: laws that hold for every sequence, and stories that read like a log.

Nothing here knows the constants that are tuned (margins, horizons, recovery): only what must hold for any of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.batches import DAY_MS
from sluice.domain.breakers import PROBES, STREAK
from sluice.domain.limits import (
    DIMENSIONS,
    FULL_RATE,
    LAST_JOBS_MS,
    MOST_CIRCUITS,
    MOST_WORKERS,
    OUTPUT_MARGIN,
    OUTPUT_MARGIN_MS,
    OVERDRAFT_MS,
    PACE_KEPT_MS,
    RAMP_MS,
    SCALE,
    TOKENS_PER_DAY,
    UNUSED,
    WAITING_MS,
    Bucket,
    Cost,
    Dimension,
    Group,
    Observation,
    Seen,
    Settlement,
    Ties,
    advanced,
    block,
    blocked,
    circuit_failed,
    circuit_served,
    drained,
    expected_start,
    expires_at,
    group_id,
    grown,
    lined_up,
    loaded,
    moved,
    new_group,
    next_start,
    observe,
    recalled,
    refuse_workspace,
    reserve,
    restated,
    settle,
    workspace_answered,
)
from sluice.domain.waits import USUAL, Waits
from sluice.domain.workspaces import Workspace, WorkspaceRefusal
from tests.fakes import MINUTE, NOON, SECOND, known_group

# The same examples in every run: a gate must not fail by chance, nor because the machine is busy.
LAW = settings(max_examples=150, deadline=None, derandomize=True)

ONE = Cost(1, 1, 1)
HOUR = 60 * MINUTE
LONG = 24 * HOUR


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


def warm(state: Group) -> Group:
    """A group that has been in use for a while: its slow start is over."""
    return replace(state, warm_since=NOON - HOUR, last_start=NOON - SECOND)


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
class Hurry:
    """Start one job after the other, each in the first millisecond in which it may start."""

    costs: tuple[Cost, ...]
    skew_ms: int


@dataclass(frozen=True)
class Stop:
    """A 429."""

    milliseconds: int
    overdrawn: bool
    hidden: bool


@dataclass(frozen=True)
class Drained:
    """A worker finds the queue empty."""


Step = Wait | Ask | Hurry | Stop | Drained


@dataclass(frozen=True)
class Started:
    """One job that was let through."""

    epoch: int
    at: int
    cost: Cost
    left: int
    """Output that upstream has left at that moment by the books: what is reserved and not produced is still there."""


LAW_LIMITS = (600, 60_000, 24_000)
LAW_BURSTS = (20, 2_000, 500)


def law_group(*, learned: bool = True) -> Group:
    return warm(
        replace(
            new_group("org", "a", NOON),
            **{
                dimension: replace(bucket(limit, burst), learned=learned)
                for dimension, limit, burst in zip(DIMENSIONS, LAW_LIMITS, LAW_BURSTS, strict=True)
            },  # type: ignore[arg-type]
        )
    )


costs = st.builds(Cost, st.just(1), st.integers(0, LAW_BURSTS[1]), st.integers(1, LAW_BURSTS[2]))
blocks = st.lists(costs, min_size=1, max_size=12).map(tuple)
waits = st.builds(Wait, st.integers(0, 20_000) | st.integers(MINUTE, 2 * MINUTE))
stops = st.builds(Stop, st.integers(1, 10_000), st.booleans(), st.booleans())
empties = st.builds(Drained)
nobody_waits = st.just(0)
seconds_off = st.integers(-5_000, 5_000)


def asks(horizons: st.SearchStrategy[int], skews: st.SearchStrategy[int]) -> st.SearchStrategy[Ask]:
    return st.builds(Ask, blocks, horizons, skews, st.integers(0, 3))


def hurries(skews: st.SearchStrategy[int]) -> st.SearchStrategy[Hurry]:
    return st.builds(Hurry, blocks, skews)


def output_left(state: Group, at: int) -> int:
    state = advanced(state, at)
    return state.output_tokens.level + state.under_way * SCALE


def let_through(state: Group, cost: Cost, now: int, horizon_ms: int) -> tuple[Group, list[Started]]:
    after, starts = reserve(state, [cost], now, horizon_ms)
    return after, [Started(state.epoch, at, cost, output_left(state, at)) for at in starts]


def give_back(state: Group, unsent: Sequence[Started], now: int) -> Group:
    return settle(state, [Settlement(each.epoch, each.cost, UNUSED) for each in unsent], now)


def play(steps: Sequence[Step]) -> tuple[list[Started], Group, int]:
    """Play a history; return what was started, and the group and the time as they are then."""
    state, now = law_group(), NOON
    started: list[Started] = []
    for step in steps:
        match step:
            case Wait(milliseconds):
                now += milliseconds
            case Drained():
                state = drained(state, now)
            case Stop(milliseconds, overdrawn, hidden):
                state = block(
                    state,
                    now + milliseconds,
                    "rate limited",
                    now,
                    overdrawn=overdrawn,
                    hidden=hidden,
                )
                # Reservations that had not started by then are invalid, and released by their worker.
                unsent = [each for each in started if each.at > now and each.epoch < state.epoch]
                started = [each for each in started if each not in unsent]
                state = give_back(state, unsent, now)
            case Hurry(wanted, skew_ms):
                for cost in wanted:
                    now = max(now, next_start(state, cost, now + skew_ms) - skew_ms)
                    state, one = let_through(state, cost, now + skew_ms, 0)
                    started += one
            case Ask(wanted, horizon_ms, skew_ms, dropped):
                taken: list[Started] = []
                for cost in wanted:
                    state, one = let_through(state, cost, now + skew_ms, horizon_ms)
                    taken += one
                    if not one:
                        break
                kept = max(0, len(taken) - dropped)
                started += taken[:kept]
                state = give_back(state, taken[kept:], now + skew_ms)
    return started, state, now


def assert_within_the_law(started: Sequence[Started], slack_ms: int) -> None:
    """In every window, no more than the capacity and what was refilled during the window (and the slack).

    Output is reserved ahead of being produced: by as much as calls in flight have still to produce, or by the debt that
    is allowed when nobody waits.
    """
    calls = sorted(started, key=lambda each: each.at)
    for dimension, limit, burst in zip(DIMENSIONS, LAW_LIMITS, LAW_BURSTS, strict=True):
        ahead_ms = OVERDRAFT_MS if dimension == "output_tokens" else 0
        for first, begin in enumerate(calls):
            total = 0
            for end in calls[first:]:
                total += end.cost.of(dimension)
                allowed = burst * MINUTE + limit * (end.at - begin.at + slack_ms + ahead_ms)
                assert total * MINUTE <= allowed, (dimension, begin, end, total)


def assert_upstream_has_some_left(started: Sequence[Started], slack_ms: int) -> None:
    """Upstream lets a call in while its own output level is above zero (and the refill of the slack)."""
    for each in started:
        assert each.left > -LAW_LIMITS[2] * slack_ms * FULL_RATE, each


@LAW
@given(
    st.lists(
        waits | empties | asks(nobody_waits, nobody_waits) | hurries(nobody_waits), max_size=25
    )
)
def test_what_starts_at_once_is_never_above_the_law(steps: list[Step]) -> None:
    started, _, _ = play(steps)

    assert_within_the_law(started, slack_ms=1)
    assert_upstream_has_some_left(started, slack_ms=0)


HORIZON = 2_000


@LAW
@given(
    st.lists(
        waits | stops | empties | asks(st.just(HORIZON), nobody_waits) | hurries(nobody_waits),
        max_size=25,
    )
)
def test_what_is_planned_ahead_is_above_the_law_by_no_more_than_the_plan_reaches(
    steps: list[Step],
) -> None:
    """Capacity that is held for a later start is refilled meanwhile: at most the refill of one horizon."""
    started, _, _ = play(steps)

    assert_within_the_law(started, slack_ms=HORIZON)
    assert_upstream_has_some_left(started, slack_ms=HORIZON)


@LAW
@given(
    st.lists(waits | empties | asks(nobody_waits, seconds_off) | hurries(seconds_off), max_size=25)
)
def test_clocks_that_differ_by_seconds_do_no_more_than_those_seconds(steps: list[Step]) -> None:
    started, _, _ = play(steps)

    assert_within_the_law(started, slack_ms=2 * 5_000)
    assert_upstream_has_some_left(started, slack_ms=0)


@LAW
@given(
    st.lists(waits | stops | empties | asks(st.integers(0, 60_000), seconds_off), max_size=25),
    costs,
)
def test_no_job_starves(steps: list[Step], cost: Cost) -> None:
    """Whatever happened before, a job that is asked for again and again starts."""
    _, state, now = play(steps)

    for _ in range(20):
        start = next_start(state, cost, now)
        state, starts = reserve(state, [cost], now, LONG)
        assert [start] == starts
        assert now <= start < now + 60 * MINUTE
        now = start


@LAW
@given(st.lists(waits | stops | asks(st.integers(0, 60_000), nobody_waits), max_size=25))
def test_a_group_left_alone_is_full_again(steps: list[Step]) -> None:
    _, state, _ = play(steps)

    rested = advanced(state, NOON + LONG)

    assert tuple(burst * SCALE for burst in LAW_BURSTS) == levels(rested)
    assert FULL_RATE == advanced(rested, NOON + 2 * LONG).rate_factor


@LAW
@given(
    st.lists(waits | asks(st.integers(0, 60_000), nobody_waits), max_size=15),
    costs,
    st.integers(0, 100_000),
    st.integers(0, 100_000),
)
def test_time_only_helps(steps: list[Step], cost: Cost, first: int, second: int) -> None:
    """Levels never fall by waiting, those that wait have less to wait for, and waiting to ask brings nothing.

    At a steady pace, that is: the pace of a slow start rises while it is waited for.
    """
    _, state, now = play(steps)
    state = replace(state, warm_since=NOON - HOUR)
    sooner, later = now + min(first, second), now + max(first, second)

    before, after = levels(advanced(state, sooner)), levels(advanced(state, later))
    early, late = next_start(state, cost, sooner), next_start(state, cost, later)

    assert all(less <= more for less, more in zip(before, after, strict=True))
    assert early <= late
    assert late - later <= early - sooner


@LAW
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 30_000))
def test_a_clock_that_is_behind_takes_nothing_away_and_adds_nothing(
    spent: int, behind: int, ahead: int
) -> None:
    state, _ = reserve(law_group(), [Cost(1, spent % 2_000, spent % 500)], NOON, 0)
    state = advanced(block(state, NOON + 100, "rate limited", NOON), NOON + ahead)

    checked = advanced(state, NOON + ahead - behind)

    assert (levels(state), state.rate_factor) == (levels(checked), checked.rate_factor)
    assert next_start(state, ONE, NOON + ahead) == next_start(checked, ONE, NOON + ahead)


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
@given(
    wanted=st.lists(costs, min_size=1, max_size=20),
    horizon_ms=st.integers(0, 10_000),
    learned=st.booleans(),
)
def test_what_was_not_used_is_given_back_to_the_last_unit(
    wanted: list[Cost], horizon_ms: int, *, learned: bool
) -> None:
    state = law_group(learned=learned)

    after, starts = reserve(state, wanted, NOON, horizon_ms)
    given_back = settle(
        after, [Settlement(after.epoch, cost, UNUSED) for cost in wanted[: len(starts)]], NOON
    )

    assert (levels(state), 0) == (levels(given_back), given_back.under_way)


@LAW
@given(costs, costs)
def test_the_books_settle_to_what_was_really_used(reserved: Cost, used: Cost) -> None:
    after, (_,) = reserve(law_group(learned=False), [reserved], NOON, 0)

    settled = settle(after, [Settlement(after.epoch, reserved, used)], NOON)

    left = tuple(
        (burst - used.of(dimension)) * SCALE
        for dimension, burst in zip(DIMENSIONS, LAW_BURSTS, strict=True)
    )
    assert left == levels(settled)


@LAW
@given(costs, costs)
def test_where_headers_name_what_output_is_left_settling_does_not_count_it_again(
    reserved: Cost, used: Cost
) -> None:
    after, (_,) = reserve(law_group(), [reserved], NOON, 0)

    settled = settle(after, [Settlement(after.epoch, reserved, used)], NOON)

    assert (LAW_BURSTS[1] - used.input_tokens) * SCALE == settled.input_tokens.level
    assert after.output_tokens == settled.output_tokens


# Stories ---------------------------------------------------------------------------------------------------


def test_sixty_a_minute_with_a_burst_of_ten() -> None:
    state = group(requests=60, burst=10)
    story = [
        # at s, asked for, horizon s, granted, all started by s
        (0, 4, 0, 1, 0),  # a group that was idle begins slowly ...
        (0, 20, 3, 3, 3),  # ... at the limit's own pace, whatever is saved up
        (25, 4, 0, 1, 25),  # later saved-up capacity is spent faster, but not in one millisecond
        (25, 20, 3, 12, 28),  # the rest of the burst is planned over the next seconds ...
        (28, 20, 0, 0, 0),  # ... and no job jumps the queue
        (38, 1, 0, 1, 38),  # one is refilled each second
        (600, 50, 2, 3, 602),  # ten minutes of rest: slowly again
        (625, 50, 2, 11, 627),  # and one burst was saved up, no more
    ]
    for at, wanted, horizon, granted, by in story:
        now = NOON + at * SECOND
        state, starts = reserve(state, [ONE] * wanted, now, horizon * SECOND)
        assert granted == len(starts), (at, len(starts))
        assert all(now <= start <= NOON + by * SECOND for start in starts), (at, starts)
        assert sorted(starts) == starts


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_a_slow_start_quickens_step_by_step_in_each_dimension(dimension: Dimension) -> None:
    """Sharp growth is a limit of its own: a full bucket does not change that."""
    state = replace(group(), **{dimension: bucket(60_000, 10**6)})  # type: ignore[arg-type]
    cost = replace(Cost(0, 0, 0), **{dimension: 1_000})  # type: ignore[arg-type]

    gaps, now = [], NOON
    for _ in range(80):
        state, (start,) = reserve(state, [cost], now, MINUTE)
        gaps.append(start - now)
        now = start

    assert 0 == gaps[0]
    assert SECOND == gaps[1]
    assert sorted(gaps[1:], reverse=True) == gaps[1:]
    assert SECOND // 5 == gaps[-1]


def test_a_steady_stream_runs_at_the_whole_limit() -> None:
    state, started, now = group(requests=600, burst=100), 0, NOON
    while now < NOON + 10 * MINUTE:
        state, starts = reserve(state, [ONE] * 50, now, 2 * SECOND)
        started += len(starts)
        now += 500

    assert 6_000 <= started <= 6_000 + 100 + 20


def test_output_that_is_not_produced_yet_delays_no_call() -> None:
    """While calls in flight produce what is reserved for them, the bucket refills."""
    state = warm(replace(group(60_000, 1_000), output_tokens=bucket(60_000, 5_000)))
    held_back = replace(state, call_ms=1)

    _, starts = reserve(state, [Cost(1, 0, 1_000)] * 30, NOON, LONG)
    _, waits_for_all = reserve(held_back, [Cost(1, 0, 1_000)] * 30, NOON, LONG)

    # Five are saved up; the other 25 would come at one a second, but ten seconds of output are still to be produced.
    # A quarter of the bucket stays in it: that is the refill of another second and a quarter.
    margin_ms = 5_000 // OUTPUT_MARGIN
    assert NOON + 25 * SECOND + margin_ms - 1 == waits_for_all[-1]
    assert NOON + 15 * SECOND + margin_ms == starts[-1]


def test_a_bucket_far_above_its_level_delays_calls_only_briefly() -> None:
    """A quarter of it would take hours to refill (found by the simulation, seed 6)."""
    full = bucket(600_000, 10**9)
    state = warm(replace(group(60_000, 1_000), output_tokens=replace(full, level=10_000 * SCALE)))

    assert next_start(state, Cost(1, 0, 1_000), NOON) <= NOON + OUTPUT_MARGIN_MS


def test_a_steady_stream_of_output_runs_at_the_whole_limit() -> None:
    state = warm(replace(group(60_000, 1_000), output_tokens=bucket(60_000, 5_000)))
    reserved, now = 0, NOON
    while now < NOON + 10 * MINUTE:
        state, starts = reserve(state, [Cost(1, 0, 500)] * 50, now, 2 * SECOND)
        reserved += 500 * len(starts)
        now += 500

    debt = 60_000 * state.call_ms // MINUTE
    assert 600_000 <= reserved <= 600_000 + 5_000 + 2_000 + debt


def test_without_waiting_jobs_only_the_limit_of_upstream_applies() -> None:
    """The last jobs of a queue start while upstream has any output left: no other job waits behind them."""
    state = warm(replace(group(60_000, 1_000), output_tokens=bucket(60_000, 5_000)))
    cost = Cost(1, 0, 4_000)
    state, _ = reserve(state, [cost], NOON, 0)

    _, held_back = reserve(state, [cost] * 10, NOON, SECOND)
    _, started = reserve(drained(state, NOON), [cost] * 10, NOON, SECOND)

    assert len(held_back) == 1
    # Eight calls, less the thousand that are left and the thousand refilled, are 30 s of the limit.
    assert 8 * 4_000 - 2_000 == 60_000 * OVERDRAFT_MS // MINUTE
    assert 8 == len(started)
    # It is true for a few seconds only, and a worker's clock that is behind does not shorten that.
    late = NOON + 4 * SECOND
    assert len(reserve(drained(state, NOON), [cost] * 5, late, SECOND)[1]) == len(
        reserve(state, [cost] * 5, late, SECOND)[1]
    )
    assert drained(state, NOON) == drained(drained(state, NOON), NOON - SECOND)


def test_the_last_jobs_start_together_only_when_they_are_few() -> None:
    """Of more, some would have to wait until what the others produced is paid for, and then end late."""
    state = warm(replace(group(60_000, 1_000), output_tokens=bucket(60_000, 5_000)))
    state = drained(replace(state, output_mean=1_000_000), NOON)
    few = lined_up(lined_up(state, "one", 10, NOON), "two", 5, NOON)
    many = lined_up(lined_up(state, "one", 10, NOON), "two", 6, NOON)
    wanted = [Cost(1, 0, 1_000)] * 15

    assert 15 * 1_000 == 60_000 * LAST_JOBS_MS // MINUTE
    assert 15 == len(reserve(few, wanted, NOON, SECOND)[1])
    assert (
        reserve(many, wanted, NOON, SECOND)[1]
        == reserve(replace(many, drained_at=0), wanted, NOON, SECOND)[1]
    )
    # What was said long ago is not believed any more.
    late = NOON + WAITING_MS
    assert 15 == len(reserve(drained(many, late), wanted, late, SECOND)[1])


def test_the_last_jobs_may_have_the_requests_that_are_kept_back() -> None:
    """The margin exists because a 429 delays all waiting jobs; behind the last jobs there are none."""
    seen = Seen(limit=600, remaining=100)
    learned = observe(warm(group(600, 100)), Observation(NOON, {"requests": seen}), NOON)
    wanted = [ONE] * 300

    before = len(reserve(learned, wanted, NOON, 10 * SECOND)[1])
    last = len(reserve(drained(learned, NOON), wanted, NOON, 10 * SECOND)[1])

    assert 2 == last - before
    # Upstream has a hundred, and refills ten a second.
    assert 198 <= before < last <= 200
    guessed = warm(group(600, 100))
    assert len(reserve(drained(guessed, NOON), wanted, NOON, SECOND)[1]) == len(
        reserve(guessed, wanted, NOON, SECOND)[1]
    )


def test_what_a_worker_said_of_its_waiting_jobs_is_forgotten_with_time() -> None:
    state = lined_up(group(), "one", 3, NOON)

    assert {"one": (3, NOON)} == lined_up(state, "two", 0, NOON).waiting
    assert {} == lined_up(state, "one", 0, NOON).waiting
    late = NOON + WAITING_MS
    assert {"two": (1, late)} == lined_up(state, "two", 1, late).waiting
    for number in range(MOST_WORKERS + 5):
        state = lined_up(state, f"worker {number}", 1, NOON + 1 + number)
    assert [f"worker {number}" for number in range(5, MOST_WORKERS + 5)] == list(state.waiting)


def test_during_a_block_the_calls_in_flight_go_on_producing() -> None:
    state = warm(replace(group(60_000, 1_000), output_tokens=bucket(60_000, 5_000)))
    state = replace(state, under_way=20_000, call_ms=1_000)
    state = drained(
        replace(state, output_tokens=replace(state.output_tokens, level=-15_000 * SCALE)), NOON
    )
    blocked = replace(state, blocked_until=NOON + SECOND)

    assert next_start(state, ONE, NOON) <= NOON + 1
    # By the block's end they have written half of it: five seconds of refill are missing.
    assert NOON + 5 * SECOND < next_start(blocked, ONE, NOON) <= NOON + 5 * SECOND + 2


@LAW
@given(
    level=st.integers(-20_000, 500),
    under_way=st.integers(0, 20_000),
    call_ms=st.integers(1, 600_000),
    empty=st.booleans(),
    wait_ms=st.integers(0, 60_000),
    cost=costs,
)
def test_whatever_the_books_say_a_call_that_starts_finds_output_left(  # noqa: PLR0913 - the state
    level: int, under_way: int, call_ms: int, wait_ms: int, cost: Cost, *, empty: bool
) -> None:
    """However the level came about: by real usage above the estimate, or because upstream said so."""
    state = replace(law_group(), under_way=under_way, call_ms=call_ms)
    state = replace(state, output_tokens=replace(state.output_tokens, level=level * SCALE))
    now = NOON + wait_ms
    state = drained(state, now) if empty else state

    _, started = let_through(state, cost, now, 0)

    assert_upstream_has_some_left(started, slack_ms=0)


def test_a_start_time_that_was_given_back_is_free_again() -> None:
    state = group(requests=6, burst=5)
    state, (_,) = reserve(state, [ONE], NOON, 0)
    planned, (start,) = reserve(state, [ONE], NOON, MINUTE)

    freed = settle(planned, [Settlement(planned.epoch, ONE, UNUSED)], NOON)

    assert NOON + 10 * SECOND == start
    assert next_start(freed, ONE, NOON) <= start < next_start(planned, ONE, NOON)


def test_a_request_larger_than_the_bucket_starts_when_it_is_full_and_the_debt_is_paid() -> None:
    state = replace(group(), input_tokens=bucket(60_000, 10_000))

    state, (large,) = reserve(state, [Cost(1, 30_000, 0)], NOON, 0)
    following = next_start(state, Cost(1, 1_000, 0), NOON)

    assert NOON == large
    assert NOON + 21 * SECOND == following


def test_the_first_job_that_does_not_fit_ends_the_block() -> None:
    """Start times are in order: a small job behind does not overtake indefinitely."""
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


def test_an_unknown_group_starts_one_call_and_then_slowly_more() -> None:
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


def test_output_in_flight_fades_as_a_call_does() -> None:
    """It need not be reported when it was produced, so a worker that dies leaves nothing behind."""
    state, _ = reserve(group(), [Cost(1, 0, 1_000)] * 3, NOON, MINUTE)
    assert 3_000 == state.under_way

    fading = [advanced(state, NOON + n * state.call_ms).under_way for n in range(200)]

    assert 1_500 == fading[1]
    assert sorted(fading, reverse=True) == fading
    assert fading[-1] < 20


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
    """Start times were made for another rate: a call that has not started reserves again."""
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


def output(limit: int, remaining: int, full_in_ms: int | None = None) -> dict[Dimension, Seen]:
    return {"output_tokens": Seen(limit, remaining, full_in_ms)}


def test_of_the_output_that_upstream_has_left_calls_in_flight_still_take_theirs() -> None:
    state = known_group(seen=output(60_000, 20_000))
    state, _ = reserve(state, [Cost(1, 0, 2_000)], NOON, 0)
    now = NOON + SECOND

    reported = observe(state, Observation(now, output(60_000, 15_000)), now)

    left = reported.output_tokens.level // SCALE + reported.under_way
    assert 0 < reported.under_way < 2_000
    assert 15_000 == left


def test_how_far_output_is_below_zero_shows_in_the_time_until_it_is_full() -> None:
    """`remaining` says 0 and no more; a minute and a half to fill 20,000 at 60,000 a minute means 70,000 below."""
    state = known_group(seen=output(60_000, 20_000))
    now = NOON + SECOND

    reported = observe(state, Observation(now, output(60_000, 0, 90 * SECOND)), now)
    untold = observe(state, Observation(now, output(60_000, 0)), now)
    odd = observe(state, Observation(now, output(60_000, 0, SECOND)), now)

    assert -70_000 == reported.output_tokens.level // SCALE
    assert 0 == untold.output_tokens.level // SCALE == odd.output_tokens.level // SCALE


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


# Limits that are stated, or that nobody names --------------------------------------------------------------


def test_stated_limits_hold_from_the_first_call_on() -> None:
    state = new_group("org", "a", NOON, {"requests": 600, "output_tokens": 60_000})

    assert (600, 60_000) == (state.requests.limit, state.output_tokens.limit)
    _, starts = reserve(state, [ONE] * 50, NOON, 6 * SECOND)
    assert 50 == len(starts)


def test_stated_limits_cap_what_headers_name() -> None:
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


def test_a_stated_limit_that_is_raised_or_removed_is_learned_again() -> None:
    reported = seen(Seen(600, 100))
    capped = observe(
        new_group("org", "a", NOON, {"requests": 100}), Observation(NOON, reported), NOON
    )

    for stated, limit in (({"requests": 200}, 200), ({}, 600)):
        freed = restated(capped, stated, NOON)

        assert limit == observe(freed, Observation(NOON, reported), NOON).requests.limit


def test_an_upstream_that_names_no_limits_is_explored_and_backed_away_from() -> None:
    """Additive increase while calls are served, multiplicative decrease at a 429."""
    state = new_group("org", "a", NOON)
    for _ in range(300):
        state = grown(state, NOON)
    explored = state.requests.limit

    backed_away = block(state, NOON + SECOND, "rate limited", NOON)

    assert explored > 60
    assert 1 <= backed_away.requests.limit < explored
    slowly = grown(backed_away, NOON).requests.limit - backed_away.requests.limit
    assert 0 < slowly <= grown(state, NOON).requests.limit - state.requests.limit


def test_limits_that_are_known_or_stated_are_not_explored() -> None:
    known = known_group(seen=seen(Seen(600, 100)))
    stated = new_group("org", "a", NOON, {"requests": 50})

    assert known.requests == grown(known, NOON).requests
    assert (50, 50) == (
        grown(stated, NOON).requests.limit,
        block(stated, NOON + SECOND, "rate limited", NOON).requests.limit,
    )


def test_exploring_never_stops_for_good() -> None:
    state, now = new_group("org", "a", NOON), NOON
    for _ in range(500):
        state = block(state, now + SECOND, "rate limited", now)
        now += 2 * SECOND

    assert state.requests.limit >= 1
    assert 1 == len(reserve(state, [Cost(1, 10, 10)], now, LONG)[1])


# Limits that the Rate Limits API names ---------------------------------------------------------------------

NAMED = [("requests", 600), ("output_tokens", 60_000)]


def test_loaded_limits_replace_a_guess_and_nothing_else() -> None:
    guessed = new_group("org", "a", NOON)

    known = loaded(guessed, NAMED, NOON)

    assert (600, 60_000) == (known.requests.limit, known.output_tokens.limit)
    assert guessed.input_tokens == known.input_tokens
    assert not any(known.bucket(name).learned for name in DIMENSIONS)
    assert all(levels(known)[n] <= known.bucket(name).capacity * SCALE
               for n, name in enumerate(DIMENSIONS))  # fmt: skip
    assert known is loaded(known, NAMED, NOON + SECOND)


def test_what_headers_said_stays_when_limits_are_loaded() -> None:
    learned = known_group(seen=seen(Seen(50, 10)))

    assert learned is loaded(learned, NAMED, NOON)


def test_stated_limits_cap_what_is_loaded() -> None:
    group = new_group("org", "a", NOON, {"requests": 100, TOKENS_PER_DAY: 5_000})

    known = loaded(group, [*NAMED, (TOKENS_PER_DAY, 9_000)], NOON)

    assert (100, 60_000) == (known.requests.limit, known.output_tokens.limit)
    assert known.day is not None
    assert 5_000 == known.day.limit


def test_a_limit_per_day_is_loaded_lowered_and_forgotten() -> None:
    group = new_group("org", "a", NOON)
    limits = [
        loaded(group, [(TOKENS_PER_DAY, 9_000)], NOON),
        loaded(loaded(group, [(TOKENS_PER_DAY, 9_000)], NOON), [(TOKENS_PER_DAY, 7_000)], NOON),
        loaded(loaded(group, [(TOKENS_PER_DAY, 9_000)], NOON), [], NOON),
    ]

    assert [9_000, 7_000, None] == [each.day and each.day.limit for each in limits]


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


def test_a_burst_that_is_refused_although_the_headers_had_room_makes_the_next_one_slower() -> None:
    """60 requests per minute may be enforced as 1 per second (Anthropic, rate limits), which no header shows."""
    state, at = group(requests=600, burst=600), NOON + RAMP_MS
    state = replace(state, last_start=at, warm_since=NOON)
    gaps = []
    for _ in range(4):
        _, starts = reserve(state, [ONE] * 2, at, MINUTE)
        gaps.append(starts[1] - starts[0])
        state = block(state, at + SECOND, "rate limited", at, hidden=True)
        assert FULL_RATE == state.rate_factor
        at += MINUTE // 2
        state = replace(state, requests=bucket(600, 600))

    assert [20, 40, 80, 100] == gaps
    at += PACE_KEPT_MS
    _, starts = reserve(replace(state, last_start=at, warm_since=NOON), [ONE] * 2, at, MINUTE)
    assert 50 == starts[1] - starts[0], "it is tried again after half an hour"


def test_429s_of_one_burst_slow_the_next_one_once() -> None:
    state = block(group(requests=600), NOON + SECOND, "rate limited", NOON, hidden=True)

    for until in (NOON + SECOND, NOON + MINUTE):
        again = block(state, until, "rate limited", NOON, hidden=True)
        assert state.burst_pace == again.burst_pace < group(requests=600).burst_pace


def test_an_unused_start_leaves_the_others_their_times() -> None:
    """Saved-up requests for all, so that only the pace keeps the calls apart."""
    state = replace(
        group(requests=600, burst=600), last_start=NOON, burst_pace=FULL_RATE, burst_pace_at=NOON
    )
    state, starts = reserve(state, [ONE] * 20, NOON, MINUTE)
    state = settle(state, [Settlement(state.epoch, ONE, UNUSED)], NOON)

    assert next_start(state, ONE, NOON) == starts[-1]
    voided = block(state, NOON + SECOND, "rate limited", NOON)
    late = settle(voided, [Settlement(state.epoch, ONE, UNUSED)] * 19, NOON)
    assert next_start(voided, ONE, NOON) == next_start(late, ONE, NOON)


def test_a_block_voids_what_had_not_started() -> None:
    state, _ = reserve(group(), [ONE] * 30, NOON, MINUTE)

    blocked = block(state, NOON + SECOND, "rate limited", NOON)

    assert state.epoch + 1 == blocked.epoch
    assert NOON + 5 * SECOND > next_start(blocked, ONE, NOON)


@pytest.mark.parametrize("used", [UNUSED, Cost(1, 900, 900)])
def test_a_reservation_of_before_a_block_moves_no_level_of_requests_after_it(used: Cost) -> None:
    """The block emptied that bucket for good reason; tokens were and are what was really used."""
    reserved = Cost(1, 100, 100)
    state = replace(law_group(), input_tokens=bucket(60_000, 2_000))
    before, _ = reserve(state, [reserved], NOON, 0)
    blocked = block(before, NOON + SECOND, "rate limited", NOON)

    settled = settle(blocked, [Settlement(before.epoch, reserved, used)], NOON)

    assert blocked.requests == settled.requests
    assert (2_000 - used.input_tokens) * SCALE == settled.input_tokens.level


def test_what_is_given_back_during_a_block_frees_no_start_before_its_end() -> None:
    state, _ = reserve(group(), [ONE] * 3, NOON, MINUTE)
    blocked = block(state, NOON + MINUTE, "rate limited", NOON, overdrawn=True)

    freed = settle(blocked, [Settlement(state.epoch, ONE, UNUSED)], NOON)

    assert NOON + MINUTE < next_start(blocked, ONE, NOON) == next_start(freed, ONE, NOON)


def test_a_429_for_output_in_flight_does_not_reduce_the_rate() -> None:
    """Calls of our own are producing what upstream had left: that is known, and over when they end."""
    state = warm(group(requests=600, burst=100))

    blocked = block(state, NOON + SECOND, "rate limited", NOON, overdrawn=True)

    assert (FULL_RATE, NOON + SECOND) == (blocked.rate_factor, blocked.blocked_until)
    assert (state.epoch + 1, levels(state)) == (blocked.epoch, levels(blocked))


def test_a_shorter_block_does_not_end_a_longer_one() -> None:
    blocked = block(group(), NOON + MINUTE, "spend limit", NOON)

    again = block(blocked, NOON + SECOND, "rate limited", NOON)

    assert (NOON + MINUTE, "spend limit") == (again.blocked_until, again.blocked_reason)


def test_429s_of_calls_in_flight_together_are_one_event() -> None:
    """Waits are whole seconds, so those who hear of it a moment later name a moment later."""
    once = block(group(), NOON + SECOND, "rate limited", NOON)

    often = once
    for milliseconds in range(1, 400, 20):
        often = block(often, NOON + SECOND + milliseconds, "rate limited", NOON + milliseconds)

    assert once == replace(often, requests=once.requests, input_tokens=once.input_tokens,
                           output_tokens=once.output_tokens, under_way_at=NOON)  # fmt: skip


def test_a_longer_block_during_a_block_is_kept_to_at_the_same_rate() -> None:
    once = block(group(), NOON + SECOND, "rate limited", NOON)

    longer = block(once, NOON + 10 * SECOND, "rate limited", NOON + 10)

    assert (NOON + 10 * SECOND, once.rate_factor) == (longer.blocked_until, longer.rate_factor)


def test_a_ramp_limit_slows_down_more_than_a_429() -> None:
    plain = block(group(), NOON + SECOND, "rate limited", NOON)
    ramp = block(group(), NOON + SECOND, "rate limited", NOON, ramp=True)

    assert 0 < ramp.rate_factor < plain.rate_factor


def test_after_a_ramp_limit_a_group_starts_slowly() -> None:
    until = NOON + SECOND
    plain = block(warm(group()), until, "rate limited", NOON)
    ramp = block(warm(group()), until, "rate limited", NOON, ramp=True)

    def gap(state: Group) -> int:
        # With full buckets and at the whole rate, to see the pace alone.
        state = replace(state, requests=bucket(60, 10), rate_factor=FULL_RATE)
        _, (first, second) = reserve(state, [ONE] * 2, until, MINUTE)
        return second - first

    assert (SECOND // 5, SECOND) == (gap(plain), gap(ramp))


def test_429s_without_end_never_stop_a_group_for_good() -> None:
    state, now = group(), NOON
    for _ in range(200):
        state = block(state, now + SECOND, "rate limited", now)
        now += 2 * SECOND

    assert state.rate_factor > 0
    assert next_start(state, ONE, now) < now + MINUTE


def test_the_rate_recovers_step_by_step() -> None:
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


# Breakers --------------------------------------------------------------------------------------------------

MODEL = "model claude-a"
NEEDS_IT = replace(ONE, ties=Ties((MODEL, "endpoint")))
NEEDS_ANOTHER = replace(ONE, ties=Ties(("model claude-b", "endpoint")))


def failures(count: int) -> Group:
    state = warm(group(requests=600, burst=100))
    for number in range(count):
        # Those after the fifth are probes.
        state = circuit_failed(state, NOON + number * 10, MODEL, was_probe=number >= STREAK)
    return state


def test_a_single_overload_is_only_that_jobs_bad_luck() -> None:
    state = failures(STREAK - 1)

    assert next_start(group(600, 100), NEEDS_IT, NOON) == next_start(state, NEEDS_IT, NOON)
    assert FULL_RATE == state.rate_factor


def test_overloads_in_a_row_set_the_model_aside_and_leave_the_group_alone() -> None:
    state = failures(STREAK)

    assert NOON + SECOND < next_start(state, NEEDS_IT, NOON) < NOON + 10 * SECOND
    assert NOON == next_start(state, NEEDS_ANOTHER, NOON)
    assert (0, FULL_RATE, 0) == (state.blocked_until, state.rate_factor, state.epoch)


def test_what_fails_on_and_on_is_blocked_for_a_minute_at_most() -> None:
    pauses = [next_start(failures(n), NEEDS_IT, NOON) - NOON for n in range(STREAK, 40)]

    assert sorted(pauses) == pauses
    assert USUAL.breaker_pause_cap_ms <= pauses[-1] <= USUAL.breaker_pause_cap_ms + SECOND


def test_an_open_breaker_pauses_as_the_waits_say() -> None:
    short = Waits(breaker_pause_ms=100, breaker_pause_cap_ms=200)
    state = warm(group(requests=600, burst=100))
    for number in range(STREAK + 5):
        state = circuit_failed(state, NOON, MODEL, was_probe=number >= STREAK, waits=short)

    assert NOON + 200 == next_start(state, NEEDS_IT, NOON)
    probing, (start,) = reserve(state, [NEEDS_IT], NOON, SECOND, short)
    assert start + 200 == next_start(probing, NEEDS_IT, NOON)


def test_overloads_of_calls_in_flight_together_are_one_event() -> None:
    """A worker's fifty calls must not count as fifty failed probes."""
    state = failures(STREAK)

    assert state == circuit_failed(state, NOON + SECOND, MODEL)


def test_an_open_breaker_admits_one_probe_at_a_time() -> None:
    state, starts = reserve(failures(STREAK), [NEEDS_IT] * 10, NOON, 10 * SECOND)

    assert 1 == len(starts)
    assert next_start(state, NEEDS_IT, NOON) >= starts[0] + SECOND
    assert len(reserve(state, [NEEDS_ANOTHER] * 10, NOON, 10 * SECOND)[1]) == 10


def test_several_probes_in_a_row_must_be_served_before_everybody_calls_again() -> None:
    state = failures(STREAK)
    for _ in range(PROBES - 1):
        state = circuit_served(state, NOON, MODEL)
        # The next probe need not wait; there is still only one at a time.
        state, starts = reserve(state, [NEEDS_IT] * 10, NOON, SECOND)
        assert 1 == len(starts)

    assert {} == circuit_served(state, NOON, MODEL).circuits
    failed = circuit_failed(state, NOON, MODEL, was_probe=True)
    assert next_start(failed, NEEDS_IT, NOON) > NOON + SECOND


def test_a_call_that_is_served_ends_a_streak_that_opened_nothing() -> None:
    assert {} == circuit_served(failures(STREAK - 1), NOON, MODEL).circuits


def test_a_circuit_without_failures_is_not_recorded() -> None:
    state = group()

    assert state is circuit_served(state, NOON, MODEL)


# Ties ------------------------------------------------------------------------------------------------------

ENDPOINT = "endpoint https://api.example"


def tied(model: str = "a", tenant: str = "t", workspace: str = "w") -> Cost:
    return replace(ONE, ties=Ties((f"model {model}", ENDPOINT), workspace, model, tenant))


def broken(*calls: Cost) -> Group:
    state = warm(group(requests=600, burst=100))
    for call in calls:
        state = circuit_failed(state, NOON, ENDPOINT, ties=call.ties)
    return state


def are_late(state: Group, *calls: Cost) -> list[bool]:
    return [next_start(state, call, NOON) > NOON + SECOND for call in calls]


def test_failures_of_one_model_and_tenant_concern_only_their_calls() -> None:
    state = broken(*[tied()] * STREAK)

    others = tied(model="b"), tied(tenant="u"), tied(model="b", tenant="u")
    assert [True, False, False, False] == are_late(state, tied(), *others)
    # Answers of the others prove nothing about them.
    assert state == circuit_served(state, NOON, ENDPOINT, ties=others[0].ties)
    assert state != circuit_served(state, NOON, ENDPOINT, ties=tied().ties)


@pytest.mark.parametrize(
    ("second", "concerned"),
    [
        (tied(tenant="u"), [True, False]),
        (tied(model="b"), [False, True]),
        (tied(model="b", tenant="u"), [True, True]),
    ],
)
def test_failures_of_another_model_or_tenant_widen_the_breaker(
    second: Cost, concerned: list[bool]
) -> None:
    """However often the first failed: that is one piece of evidence. Until there is enough, its calls wait."""
    once = broken(*[tied()] * 20, second)
    often = broken(*[tied()] * 20, *[second] * (STREAK - 1))

    for state in (once, broken(*[tied()] * 20, *[second] * (STREAK - 2))):
        assert [True, False] == are_late(state, tied(), second)
    assert [True, *concerned] == are_late(
        often, tied(), tied(tenant="v"), tied(model="c", tenant="t")
    )


def test_failures_that_open_nothing_are_one_piece_of_evidence_for_a_wider_trouble() -> None:
    second = tied(model="b")
    state = broken(*[tied()] * (STREAK - 1), *[second] * (STREAK - 2))

    assert [False, False] == are_late(state, tied(), second)
    assert [True, True] == are_late(
        circuit_failed(state, NOON, ENDPOINT, ties=second.ties), tied(), second
    )


def test_only_failures_in_a_row_widen_the_breaker() -> None:
    """An answer of another model or tenant says that the trouble is not wider, and nothing of those that failed."""
    second, stranger = tied(model="b"), tied(model="b", tenant="u")
    almost = broken(*[tied()] * STREAK, *[second] * (STREAK - 2))

    answered = circuit_served(almost, NOON, ENDPOINT, ties=second.ties)
    assert broken(*[tied()] * STREAK) == answered
    again = circuit_failed(answered, NOON, ENDPOINT, ties=second.ties)
    assert [True, False] == are_late(again, tied(), second)
    # So does the probe of those that failed; an answer to a call that none of the failures concerns says nothing.
    probed = circuit_served(almost, NOON, ENDPOINT, ties=tied().ties)
    assert 0 == probed.circuits[ENDPOINT].others
    assert almost == circuit_served(almost, NOON, ENDPOINT, ties=stranger.ties)


def test_a_breaker_is_widened_twice_at_most() -> None:
    """By another model, then by another tenant: then it concerns all calls of the endpoint."""
    state = broken(*[tied()] * STREAK)
    for other in (tied(model="b"), tied(tenant="u")):
        for _ in range(STREAK - 1):
            assert [True, False] == are_late(state, tied(), other)
            state = circuit_failed(state, NOON, ENDPOINT, ties=other.ties)
        assert [True, True] == are_late(state, tied(), other)

    assert [True] == are_late(state, tied(model="c", tenant="v"))


def test_a_call_that_waits_for_its_own_breaker_or_workspace_delays_no_other() -> None:
    sick, well = tied(), tied(tenant="u", workspace="v")
    for state in (
        broken(*[sick] * STREAK),
        refuse_workspace(broken(), WorkspaceRefusal(("w",), NOON + 5 * SECOND, "x"), NOON),
    ):
        after, starts = reserve(state, [sick, well, well], NOON, 10 * SECOND)

        assert NOON + 5 * SECOND <= starts[0] < NOON + 6 * SECOND
        assert NOON < starts[1] < starts[2] < NOON + SECOND
        assert after.last_start == starts[2]


def test_a_call_is_blocked_with_its_organization_or_its_workspace() -> None:
    state = refuse_workspace(group(), WorkspaceRefusal(("w",), NOON + MINUTE, "spent"), NOON)

    assert (NOON + MINUTE, "spent") == blocked(state, tied().ties)
    assert (0, None) == blocked(state, tied(workspace="v").ties)
    longer = block(state, NOON + 2 * MINUTE, "rate limited", NOON)
    assert (NOON + 2 * MINUTE, "rate limited") == blocked(longer, tied().ties)


def test_a_refusal_that_does_not_say_whose_limit_it_is_blocks_the_organization_at_the_second() -> (
    None
):
    def unsaid(name: str) -> WorkspaceRefusal:
        return WorkspaceRefusal((name,), NOON + MINUTE, "rate limited", is_said=False)

    first = refuse_workspace(group(), unsaid("w"), NOON)
    second = refuse_workspace(first, unsaid("v"), NOON + SECOND)

    assert (0, FULL_RATE, 0) == (first.blocked_until, first.rate_factor, first.epoch)
    assert (NOON + MINUTE, 1) == (second.blocked_until, second.epoch)
    assert second.rate_factor < FULL_RATE
    # While the organization is blocked it is the same event.
    assert second == refuse_workspace(second, unsaid("u"), NOON + 2 * SECOND)


def test_an_answer_ends_the_trial_of_a_workspace() -> None:
    spent = WorkspaceRefusal(("w",), NOON + MINUTE, "spent", is_rate=False)
    state = refuse_workspace(group(), spent, NOON)

    assert state.workspaces["w"].is_probed
    assert not workspace_answered(state, NOON, "w").workspaces["w"].is_probed


def test_answers_of_a_slow_workspace_say_nothing_about_the_limits_of_its_organization() -> None:
    state = refuse_workspace(
        new_group("org", "a", NOON), WorkspaceRefusal(("w",), NOON + SECOND, "x"), NOON
    )

    assert state == grown(state, NOON + 2 * SECOND, "w")
    assert state != grown(state, NOON + 2 * SECOND, "v")
    assert state != grown(state, NOON + MINUTE, "w")


def test_start_times_can_be_taken_back_from_everybody() -> None:
    state, _ = reserve(group(), [ONE] * 5, NOON, MINUTE)

    voided = recalled(state, NOON)

    assert (state.epoch + 1, levels(state)) == (voided.epoch, levels(voided))
    assert NOON == voided.last_start


# A limit per day -------------------------------------------------------------------------------------------


def test_tokens_per_day_are_kept_to_and_refill_over_the_day() -> None:
    state = restated(warm(group(60_000, 10_000)), {TOKENS_PER_DAY: 1_440_000}, NOON)
    cost = Cost(1, 700_000, 20_000)

    state, starts = reserve(state, [cost] * 3, NOON, MINUTE)

    # A day's worth is there at first; then 1,000 are refilled each minute.
    assert 2 == len(starts)
    assert NOON + 720 * MINUTE <= next_start(state, cost, NOON) <= NOON + 721 * MINUTE


def test_a_day_is_settled_to_what_was_used() -> None:
    state = restated(group(), {TOKENS_PER_DAY: 1_000_000}, NOON)
    cost = Cost(1, 900_000, 50_000)
    after, _ = reserve(state, [cost], NOON, 0)

    used = settle(after, [Settlement(0, cost, Cost(1, 100_000, 100_000))], NOON)
    unused = settle(after, [Settlement(0, cost, UNUSED)], NOON)

    assert used.day is not None
    assert 800_000 == used.day.level // used.day.scale
    assert state.day == unused.day


def test_a_limit_per_day_that_is_no_longer_stated_is_forgotten() -> None:
    state = restated(group(), {TOKENS_PER_DAY: 1_000_000}, NOON)

    assert state.day == restated(state, {TOKENS_PER_DAY: 1_000_000}, NOON).day
    assert restated(state, {}, NOON).day is None


# Names and guesses -----------------------------------------------------------------------------------------


def test_the_record_of_an_unused_group_expires_after_its_block() -> None:
    blocked = block(group(), NOON + 40 * DAY_MS, "spend limit", NOON)

    assert (NOON + 35 * DAY_MS) // 1000 == expires_at(group())
    assert (NOON + 75 * DAY_MS) // 1000 == expires_at(blocked)
    assert (NOON + DAY_MS) // 1000 == expires_at(new_group("org", "unknown:acme", NOON))
    parked = replace(group(), workspaces={"w": Workspace(blocked_until=NOON + 20 * DAY_MS)})
    assert (NOON + 55 * DAY_MS) // 1000 == expires_at(parked)


def test_invented_models_do_not_grow_a_group() -> None:
    state = circuit_failed(group(), NOON, "endpoint")
    for _ in range(STREAK):
        state = circuit_failed(state, NOON, "endpoint")
    for number in range(10_000):
        state = circuit_failed(state, NOON, f"model {number}")

    assert MOST_CIRCUITS == len(state.circuits)
    assert "model 9999" in state.circuits
    assert state.circuits["endpoint"].is_open, "an open breaker stays"


def test_a_group_is_named_by_organization_and_models() -> None:
    assert "org/a" == group_id("org", "a") == group().id


def test_a_group_that_moved_says_where_and_voids_its_plan() -> None:
    missing = moved(group(), "org-7")

    assert ("org-7", 1) == (missing.moved_to, missing.epoch)


@pytest.mark.parametrize(
    ("groups", "backlog", "start"),
    [
        # Nobody knows: about one a second.
        ([], 0, NOON),
        ([], 60, NOON + MINUTE),
        # What is known counts, of this model group only, all organizations together.
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
