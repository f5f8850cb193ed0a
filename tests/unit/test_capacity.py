"""The governor's arithmetic: a table of situations, and laws that hold in all of them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.breakers import STREAK, Breaker
from sluice.domain.capacity import (
    BACK_MS,
    CROWDED,
    FORGOTTEN_MS,
    LEAST,
    LONG_MS,
    MOST,
    NEW_POOL_MS,
    OFF_MS,
    REFILLED,
    UNREFILLED,
    Backlog,
    Consumer,
    Decision,
    decide,
    has_work,
    is_stalled,
    startable,
    starts_per_second,
)
from sluice.domain.limits import (
    DIMENSIONS,
    Bucket,
    Dimension,
    Group,
    Observation,
    Seen,
    block,
    moved,
    new_group,
    observe,
)
from tests.fakes import MINUTE, NOON, SECOND

HOUR = 60 * MINUTE


def group(  # noqa: PLR0913 - what a situation is made of
    name: str = "a",
    rpm: int = 600,
    *,
    call_ms: int = 2_000,
    output: int = 100,
    otpm: int = 10**9,
    itpm: int = 10**9,
    busy: bool = True,
    blocked_ms: int = 0,
    **more: object,
) -> Group:
    """A group whose limits a first answer has taught, with calls of 1,000 input and 100 output tokens and 2 s."""
    reported: dict[Dimension, Seen] = {
        "requests": Seen(rpm, 1),
        "input_tokens": Seen(itpm, min(itpm, 1_000)),
        "output_tokens": Seen(otpm, min(otpm, 1_000)),
    }
    known = observe(
        new_group("org", name, NOON - HOUR), Observation(NOON - HOUR, reported), NOON - HOUR
    )
    known = replace(
        known,
        call_ms=call_ms,
        output_mean=output * 1000,
        last_start=NOON if busy else 0,
        observed_at=NOON if busy else 0,
    )
    if blocked_ms:
        known = replace(
            known, blocked_until=NOON + blocked_ms, blocked_reason="x", last_start=NOON + blocked_ms
        )
    return replace(known, **more)  # type: ignore[arg-type]


def cut_off(name: str = "a", answered_ms: int = LONG_MS + SECOND) -> Group:
    """A group one of whose breakers is open, and whose last answer came so long ago."""
    circuits = {"model claude-a": Breaker(STREAK, NOON + SECOND)}
    return group(name, call_ms=7_500, circuits=circuits, observed_at=NOON - answered_ms)


def unknown(name: str = "new", idle_ms: int = 0) -> Group:
    return replace(new_group("org", name, NOON), last_start=NOON - idle_ms)


ON_TEN = Consumer(10, enabled=True, slots=50)
OFF = Consumer(LEAST, enabled=False, slots=50)
EMPTY = Backlog()


def decided(
    *groups: Group,
    consumer: Consumer = ON_TEN,
    ceiling: int = 100,
    backlog: Backlog = Backlog(visible=1_000),  # noqa: B008 - frozen
    turned_off: bool = False,
    pool_changed_at: int | None = None,
) -> Decision:
    return decide(
        groups,
        backlog,
        consumer,
        ceiling=ceiling,
        now=NOON,
        turned_off=turned_off,
        pool_changed_at=pool_changed_at,
    )


def workers(*groups: Group, present: int = 10, ceiling: int = 100) -> int:
    decision = decided(
        *groups, consumer=replace(ON_TEN, maximum_concurrency=present), ceiling=ceiling
    )
    assert decision.enabled
    return decision.maximum_concurrency


# What the limits can keep busy -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # 10 a second x 7.5 s = 75 calls; of a worker's 50 slots 30 are in use: 3 workers, and one in reserve.
        ([group(rpm=600, call_ms=7_500)], 4),
        # 50 a minute need no second worker, but Lambda accepts no less than two.
        ([group(rpm=50)], 2),
        # 66.7 a second x 10 s = 667 calls in flight.
        ([group(rpm=4_000, call_ms=10_000)], 24),
        # Slow calls need more workers for the same rate.
        ([group(rpm=600, call_ms=60_000)], 21),
        # Output tokens bind: 60,000 a minute at 1,000 a call are 60 calls a minute, whatever the requests.
        ([group(rpm=4_000, otpm=60_000, output=1_000, call_ms=10_000)], 2),
        # So do input tokens.
        ([group(rpm=4_000, itpm=60_000, call_ms=90_000)], 4),
        # Groups add up.
        ([group("a", 600, call_ms=20_000), group("b", 600, call_ms=20_000)], 15),
        # The limits of an idle group need no worker.
        ([group("a", 50), group("b", 4_000, call_ms=10_000, busy=False)], 2),
        # When all are idle there is nothing to go by but all limits.
        ([group("a", 50, busy=False), group("b", 4_000, call_ms=10_000, busy=False)], 24),
        # A blocked group needs none, the other one its own.
        ([group("a", 4_000, call_ms=10_000, blocked_ms=HOUR), group("b", call_ms=7_500)], 4),
        # A short block is over before a change has taken hold.
        ([group("a", 4_000, call_ms=10_000, blocked_ms=20 * SECOND)], 24),
        # A group that turned out to be another one's is none.
        ([group("a", call_ms=7_500), moved(group("b", 4_000, call_ms=10_000), "other")], 4),
        # Half the rate after a ramp 429.
        ([group(rpm=4_000, call_ms=10_000, rate_factor=500, rate_at=NOON)], 13),
    ],
)
def test_as_many_workers_as_the_limits_keep_busy(groups: list[Group], expected: int) -> None:
    assert expected == workers(*groups)


@pytest.mark.parametrize(
    ("slots", "busy", "expected"),
    [
        # 667 calls in flight. A worker that refills its slots has 30 of 50 in use,
        (50, REFILLED, 24),
        # one that runs a range has 26 of 120,
        (120, UNREFILLED, 27),
        # and would have 72 if it did.
        (120, REFILLED, 11),
    ],
)
def test_the_workers_of_either_mapping_carry_the_whole_limit(
    slots: int, busy: float, expected: int
) -> None:
    consumer = Consumer(2, enabled=True, slots=slots, busy=busy)

    decision = decided(group(rpm=4_000, call_ms=10_000), consumer=consumer)

    assert expected == decision.maximum_concurrency
    assert f"of {slots} slots" in decision.reason


def test_never_more_than_the_ceiling() -> None:
    assert 20 == workers(group(rpm=4_000, call_ms=10_000), ceiling=20)


def test_a_lowered_ceiling_is_kept_at_once() -> None:
    assert 8 == workers(group(rpm=600, call_ms=20_000), present=9, ceiling=8)


def test_a_ceiling_below_what_lambda_accepts_is_two() -> None:
    assert LEAST == workers(group(), ceiling=1)


def test_an_unlimited_mapping_gets_a_limit() -> None:
    decision = decided(group(call_ms=7_500), consumer=Consumer(None, enabled=True, slots=50))

    assert 4 == decision.maximum_concurrency
    assert decision.changes(Consumer(None, enabled=True, slots=50))


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (2, 4),
        (3, 4),  # a third as many again: a quarter of the limit would lie idle
        (4, 4),
        (5, 5),  # one too many is left alone
        (6, 4),
        (100, 4),
    ],
)
def test_small_numbers_do_not_flap(present: int, expected: int) -> None:
    assert expected == workers(group(call_ms=7_500), present=present)


@pytest.mark.parametrize(("present", "expected"), [(19, 24), (20, 20), (32, 32), (33, 24)])
def test_a_quarter_more_or_less_is_left_alone(present: int, expected: int) -> None:
    assert expected == workers(group(rpm=4_000, call_ms=10_000), present=present)


def test_what_is_not_known_is_no_reason_for_fewer_workers() -> None:
    assert 10 == workers(unknown(), group(rpm=50))
    assert 24 == workers(unknown(), group(rpm=4_000, call_ms=10_000))


def test_before_any_answer_there_are_as_many_workers_as_there_may_be() -> None:
    """The template starts with the least, so that a deployment cannot use up a small account."""
    assert 100 == workers(present=LEAST)
    assert 100 == workers(unknown(), present=LEAST)
    assert 7 == workers(unknown(), present=LEAST, ceiling=7)


def test_near_the_ceiling_of_messages_in_flight_no_more_workers_take_some() -> None:
    decision = decided(
        group(rpm=4_000, call_ms=10_000), backlog=Backlog(visible=5_000, in_flight=CROWDED)
    )

    assert 10 == decision.maximum_concurrency
    assert "100,000 messages are in flight" == decision.reason


def test_the_reason_shows_the_arithmetic() -> None:
    assert decided(group(call_ms=7_500)).reason == (
        "10.0 starts a second keep 75 calls in flight, which is 4 workers of 50 slots"
    )


# Outages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [
        [group(blocked_ms=2 * MINUTE)],
        [group("a", blocked_ms=2 * MINUTE), group("b", blocked_ms=HOUR)],
        # Nothing waits for the other one.
        [group("a", blocked_ms=HOUR), group("b", busy=False)],
        # The breaker probes with one call a minute, and no answer has come for a while.
        [cut_off()],
        [group("a", blocked_ms=HOUR), cut_off("b")],
    ],
)
def test_a_long_outage_turns_the_mapping_down(groups: list[Group]) -> None:
    decision = decided(*groups)

    assert (LEAST, True) == (decision.maximum_concurrency, decision.enabled)
    assert "blocked or overloaded for more than a minute" in decision.reason


def test_three_workers_become_two_in_an_outage_though_that_is_little() -> None:
    assert LEAST == workers(group(blocked_ms=2 * MINUTE), present=3)


def test_while_answers_arrive_an_open_breaker_affects_only_one_model_or_endpoint() -> None:
    lively = cut_off(answered_ms=LONG_MS)

    assert not is_stalled(lively, NOON)
    assert 4 == workers(lively)


def test_a_breaker_that_only_counts_is_not_open() -> None:
    counting = replace(cut_off(), circuits={"model claude-a": Breaker(STREAK - 1)})

    assert not is_stalled(counting, NOON)


@pytest.mark.parametrize(
    ("groups", "on"),
    [
        ([group(blocked_ms=OFF_MS + SECOND)], False),
        ([group("a", blocked_ms=HOUR), group("b", blocked_ms=6 * MINUTE)], False),
        # Idle groups count too: otherwise their next job would have no worker.
        ([group("a", blocked_ms=HOUR), group("b", busy=False)], True),
        ([group("a", blocked_ms=HOUR), group("b", blocked_ms=OFF_MS)], True),
        ([group("a", blocked_ms=HOUR), replace(unknown(), blocked_until=NOON + HOUR)], True),
        ([group("a", blocked_ms=HOUR), unknown(idle_ms=FORGOTTEN_MS - 1)], True),
        # The group of a mistyped model is never blocked, and is not used again.
        ([group("a", blocked_ms=HOUR), unknown(idle_ms=FORGOTTEN_MS)], False),
        ([unknown(idle_ms=FORGOTTEN_MS)], True),
        # The open breaker never switches off: its pauses are short.
        ([cut_off()], True),
        ([], True),
        # A group that moved is none.
        ([group("a", blocked_ms=HOUR), moved(group("b"), "other")], False),
    ],
)
def test_off_only_when_every_group_is_blocked_for_more_than_five_minutes(
    groups: list[Group], *, on: bool
) -> None:
    assert on == decided(*groups, backlog=EMPTY).enabled


@pytest.mark.parametrize(
    "backlog", [Backlog(visible=1), Backlog(in_flight=1), Backlog(delayed=1)], ids=repr
)
@pytest.mark.parametrize(("consumer", "turned_off"), [(ON_TEN, False), (OFF, True)])
def test_two_workers_park_what_waits_in_the_queue_first(
    backlog: Backlog, consumer: Consumer, *, turned_off: bool
) -> None:
    """Its message would be deleted after 14 days, and a spend limit may last for longer."""
    blocked = group(blocked_ms=30 * 24 * HOUR)

    decision = decided(blocked, backlog=backlog, consumer=consumer, turned_off=turned_off)

    assert (LEAST, True) == (decision.maximum_concurrency, decision.enabled)
    assert decision.reason.endswith("messages in the queue: 1")


def test_a_recently_written_key_pool_may_have_a_working_key() -> None:
    blocked = group(blocked_ms=HOUR)

    def on(age_ms: int, consumer: Consumer = ON_TEN) -> bool:
        changed_at, off = NOON - age_ms, not consumer.enabled
        return decided(
            blocked, consumer=consumer, backlog=EMPTY, turned_off=off, pool_changed_at=changed_at
        ).enabled

    assert on(NEW_POOL_MS - 1)
    assert on(SECOND, OFF)
    assert not on(NEW_POOL_MS)


def test_on_again_a_minute_before_the_first_block_ends() -> None:
    def on(first_ms: int) -> bool:
        groups = [group("a", blocked_ms=first_ms), group("b", blocked_ms=HOUR)]
        return decided(*groups, consumer=OFF, backlog=EMPTY, turned_off=True).enabled

    assert not on(BACK_MS + 1)
    assert on(BACK_MS)
    assert on(0)


def test_switched_on_again_it_gets_what_the_limits_need() -> None:
    decision = decided(group(rpm=4_000, call_ms=10_000), consumer=OFF, turned_off=True)

    assert (24, True) == (decision.maximum_concurrency, decision.enabled)


def test_what_a_person_switched_off_stays_off() -> None:
    decision = decided(group(), consumer=Consumer(7, enabled=False, slots=50))

    assert Decision(7, enabled=False, reason="the mapping was disabled by hand") == decision
    assert not decision.changes(Consumer(7, enabled=False, slots=50))


@pytest.mark.parametrize(
    ("blocked_ms", "said"), [(HOUR, "another 60 min"), (30 * HOUR, "another 30 h")]
)
def test_the_reason_of_an_outage_says_how_long(blocked_ms: int, said: str) -> None:
    assert said in decided(group(blocked_ms=blocked_ms)).reason


# Laws ------------------------------------------------------------------------------------------------------

GROUPS = st.lists(
    st.builds(
        group,
        name=st.sampled_from("abcd"),
        rpm=st.integers(1, 20_000),
        call_ms=st.integers(1, 600_000),
        output=st.integers(1, 50_000),
        otpm=st.integers(1, 10**8),
        busy=st.booleans(),
        blocked_ms=st.sampled_from([0, 1, SECOND, LONG_MS, 2 * MINUTE, OFF_MS, OFF_MS + 1, HOUR]),
        itpm=st.integers(1, 10**8),
        circuits=st.sampled_from([{}, {"model claude-a": Breaker(STREAK)}]),
        rate_factor=st.integers(100, 1000),
        rate_at=st.just(NOON),
        moved_to=st.sampled_from([None, None, None, "other"]),
    )
    | st.sampled_from([unknown(), unknown(idle_ms=FORGOTTEN_MS)]),
    max_size=4,
)
CONSUMERS = st.builds(
    Consumer,
    maximum_concurrency=st.none() | st.integers(LEAST, MOST),
    enabled=st.booleans(),
    slots=st.integers(1, 10_000),
    busy=st.sampled_from([REFILLED, UNREFILLED]),
)
BACKLOGS = st.builds(
    Backlog,
    visible=st.integers(0, 10**6),
    in_flight=st.sampled_from([0, 100, CROWDED]),
    delayed=st.integers(0, 10),
) | st.just(EMPTY)
CEILINGS = st.integers(0, 2 * MOST)
POOL_AGES = st.sampled_from([None, 0, NEW_POOL_MS, HOUR])


def decide_so(  # noqa: PLR0913 - what varies
    groups: Sequence[Group],
    backlog: Backlog,
    consumer: Consumer,
    ceiling: int,
    *,
    turned_off: bool,
    pool_age: int | None = None,
) -> Decision:
    return decide(
        groups,
        backlog,
        consumer,
        ceiling=ceiling,
        now=NOON,
        turned_off=turned_off,
        pool_changed_at=None if pool_age is None else NOON - pool_age,
    )


@settings(max_examples=300)
@given(GROUPS, BACKLOGS, CONSUMERS, CEILINGS, POOL_AGES)
def test_what_is_set_is_always_within_bounds(
    groups: list[Group],
    backlog: Backlog,
    consumer: Consumer,
    ceiling: int,
    pool_age: int | None,
) -> None:
    decision = decide_so(groups, backlog, consumer, ceiling, turned_off=True, pool_age=pool_age)

    assert LEAST <= decision.maximum_concurrency <= min(MOST, max(LEAST, ceiling))


@settings(max_examples=300)
@given(GROUPS, BACKLOGS, CONSUMERS, POOL_AGES)
def test_off_means_that_every_group_is_blocked_and_nothing_waits(
    groups: list[Group], backlog: Backlog, consumer: Consumer, pool_age: int | None
) -> None:
    decision = decide_so(groups, backlog, consumer, 100, turned_off=True, pool_age=pool_age)

    if not decision.enabled:
        patience = OFF_MS if consumer.enabled else BACK_MS
        forgotten = unknown(idle_ms=FORGOTTEN_MS)
        awaited = [each for each in groups if each.moved_to is None and each != forgotten]
        assert awaited
        assert all(each.blocked_until - NOON > patience and each.has_answers for each in awaited)
        assert 0 == backlog.total


@settings(max_examples=300)
@given(GROUPS, BACKLOGS, CONSUMERS, CEILINGS, st.booleans(), POOL_AGES)
def test_deciding_again_changes_nothing(  # noqa: PLR0913, PLR0917 - what varies
    groups: list[Group],
    backlog: Backlog,
    consumer: Consumer,
    ceiling: int,
    by_us: bool,  # noqa: FBT001 - drawn
    pool_age: int | None,
) -> None:
    first = decide_so(groups, backlog, consumer, ceiling, turned_off=by_us, pool_age=pool_age)
    if first.changes(consumer):
        by_us = not first.enabled
        consumer = replace(
            consumer, maximum_concurrency=first.maximum_concurrency, enabled=first.enabled
        )

    again = decide_so(groups, backlog, consumer, ceiling, turned_off=by_us, pool_age=pool_age)

    assert not again.changes(consumer)


@settings(max_examples=300)
@given(GROUPS, BACKLOGS, CONSUMERS, st.integers(1, 20), st.integers(0, 3))
def test_higher_limits_never_mean_fewer_workers(
    groups: list[Group], backlog: Backlog, consumer: Consumer, factor: int, which: int
) -> None:
    def raised(bucket: Bucket) -> Bucket:
        return replace(bucket, limit=bucket.limit * factor)

    higher = [
        replace(each, **{name: raised(each.bucket(name)) for name in DIMENSIONS})  # type: ignore[arg-type]
        if position == which
        else each
        for position, each in enumerate(groups)
    ]

    less = decide_so(groups, backlog, consumer, 1000, turned_off=True)
    more = decide_so(higher, backlog, consumer, 1000, turned_off=True)

    assert (less.enabled, less.maximum_concurrency) <= (more.enabled, more.maximum_concurrency)


# What can start until then ---------------------------------------------------------------------------------


def test_the_starts_of_a_minute_are_the_limits() -> None:
    groups = [group("a", 600), replace(group("a", 60), organization="other"), group("b", 4_000)]

    assert 660 == startable(groups, "a", NOON, NOON + MINUTE)
    assert 10 == startable(groups[:1], "a", NOON, NOON + SECOND)


def test_while_a_group_is_blocked_nothing_starts() -> None:
    late = group("a", 600, blocked_ms=40 * SECOND)

    assert 200 == startable([late], "a", NOON, NOON + MINUTE)
    assert 0 == startable([block(late, NOON + HOUR, "x", NOON)], "a", NOON, NOON + MINUTE)


def test_an_unknown_group_has_the_safe_rate() -> None:
    assert 60 == startable([], "a", NOON, NOON + MINUTE)
    assert 60 == startable([moved(group("a"), "other")], "a", NOON, NOON + MINUTE)


def test_a_new_key_pool_may_serve_any_model_at_the_safe_rate() -> None:
    blocked = group("a", 600, blocked_ms=HOUR)

    assert 60 == startable([blocked], "a", NOON, NOON + MINUTE, new_pool=True)
    assert 600 == startable([group("a", 600)], "a", NOON, NOON + MINUTE, new_pool=True)


def test_even_the_slowest_group_starts_one() -> None:
    assert 1 == startable([group(rpm=1, otpm=1, output=50_000)], "a", NOON, NOON + SECOND)


def test_a_block_that_reaches_beyond_five_minutes_counts_as_work() -> None:
    assert has_work(group(blocked_ms=HOUR), NOON)
    assert not has_work(group(busy=False), NOON)


def test_a_reduced_rate_counts_as_such() -> None:
    assert starts_per_second(group(rate_factor=500, rate_at=NOON), NOON) == pytest.approx(5.0)


def test_a_backlog_adds_up() -> None:
    assert 6 == Backlog(visible=1, in_flight=2, delayed=3).total
