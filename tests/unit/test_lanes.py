"""The choice of the lane: situations one by one, laws in any situation, and stories played minute by minute.

The stories are the reference: a live lane that starts rows in the order in which they came, and upstream batches that
never end. Whatever was assured must meet its deadline there.
"""

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sluice.domain.completions import DAY_MS, HOUR_MS, CompletionTimes
from sluice.domain.lanes import (
    LEAD_MS,
    LEAST_PIECE,
    MOST_PIECES,
    READY_MS,
    RESULTS_MS,
    SEND_MS,
    STEP_MS,
    TAIL_MS,
    Asked,
    Choice,
    Interval,
    Lane,
    LiveLane,
    Request,
    Situation,
    UnfinishedBatch,
    Unmeetable,
    choose,
    plan,
    revise,
)
from sluice.domain.upstream_batches import CANCEL_MS, MOST_REQUESTS
from tests.fakes import MINUTE, NOON

LAW = CompletionTimes().law(NOON)
LIVE = LiveLane(1_000)
"""Of which 900 rows a minute are planned."""


def situation(*batches: UnfinishedBatch, live: LiveLane = LIVE, **facts: int) -> Situation:
    return replace(Situation(NOON, live, batches, LAW), **facts)  # type: ignore[arg-type]


def an_open(name: str, rows: int, minutes: int, age: int = 30, **facts: object) -> UnfinishedBatch:
    """An upstream batch that is open, and due in some minutes."""
    made = UnfinishedBatch(name, rows, NOON + minutes * MINUTE, NOON - age * MINUTE)
    return replace(made, **facts)  # type: ignore[arg-type]


def asked(rows: int, minutes: int | None, lane: Asked = Asked.AUTO, cost: int = 0) -> Request:
    due = None if minutes is None else NOON + minutes * MINUTE
    return Request(rows, due, cost or rows * 10, lane)


def chosen(request: Request, at: Situation) -> Choice:
    answer = choose(request, at)
    assert isinstance(answer, Choice)
    return answer


def refused(request: Request, at: Situation) -> Unmeetable:
    answer = choose(request, at)
    assert isinstance(answer, Unmeetable)
    return answer


# Without a deadline


def test_work_without_a_deadline_costs_half() -> None:
    choice = chosen(asked(250_000, None, cost=1_000_001), situation())

    assert Lane.BATCH == choice.lane
    assert 500_001 == choice.micro_usd
    assert (83_334, 83_333, 83_333) == choice.pieces
    assert choice.rescue_at is None
    assert "no deadline; 90 % of upstream batches end within 104 min" in choice.reason


@pytest.mark.parametrize(("median", "text"), [(10, "min"), (70, "9 h"), (2_000, "24 h")])
def test_the_reason_names_the_time_in_which_upstream_batches_end(median: int, text: str) -> None:
    # The same chance in each span: a half, an eighth, or nearly none.
    law = replace(LAW, hazards=(10 / (10 + median),) * len(LAW.hazards))

    choice = chosen(asked(10, None), replace(situation(), law=law))

    assert text in choice.reason


def test_live_is_only_what_was_asked_for() -> None:
    choice = chosen(asked(10, None, Asked.LIVE), situation())

    assert (Lane.LIVE, 100, ()) == (choice.lane, choice.micro_usd, choice.pieces)


# With a deadline


def test_work_that_is_due_tomorrow_waits_on_the_batch_lane_until_the_last_moment() -> None:
    choice = chosen(asked(9_000, 24 * 60), situation())

    # 9,000 rows at 900 a minute, and a minute for the last answer.
    start = NOON + DAY_MS - 10 * MINUTE - TAIL_MS
    assert Lane.BATCH == choice.lane
    assert start - LEAD_MS == choice.rescue_at
    assert choice.half_price_percent > 95
    assert choice.micro_usd < 0.53 * 90_000
    assert "moves to the live lane from 2026-11-21 11:43 UTC" in choice.reason


def test_work_that_is_due_in_minutes_is_live() -> None:
    choice = chosen(asked(900, 7), situation())

    assert Lane.LIVE == choice.lane
    assert "live: done by about 2026-11-20 12:01 UTC; not on the batch lane:" in choice.reason
    assert "too soon" in choice.reason


def test_too_little_time_on_the_batch_lane_is_not_worth_it() -> None:
    minutes = (SEND_MS + LEAD_MS + TAIL_MS) // MINUTE + 2
    slow = replace(LAW, hazards=(0.01,) * len(LAW.hazards))

    choice = chosen(asked(90, minutes), replace(situation(), law=slow))

    assert Lane.LIVE == choice.lane
    assert "batch: 4% of the rows are expected at half price" in choice.reason


def test_little_time_on_the_batch_lane_is_used_if_the_live_lane_is_promised() -> None:
    """The live lane would run the new rows until 12:05:20, and an earlier batch needs it from 12:05 on."""
    slow = replace(LAW, hazards=(0.001,) * len(LAW.hazards))
    busy = situation(an_open("urgent", 5_400, 12))

    choice = chosen(asked(4_800, 18), replace(busy, law=slow))

    assert Lane.BATCH == choice.lane
    assert choice.half_price_percent < 5


def test_a_deadline_that_no_lane_can_meet_is_a_value_of_its_own() -> None:
    answer = refused(asked(9_000, 6), situation())

    # Five minutes are left for calls: 4,500 rows.
    assert 50 == answer.chance_percent
    assert Lane.LIVE == answer.best.lane
    assert not answer.best.is_assured
    assert "room for 4,500 of 9,000 rows (0 rows are ahead, 1,000 a minute)" in answer.reason


def test_work_that_the_live_lane_could_never_rescue_is_not_promised() -> None:
    answer = refused(asked(100_000, 90), situation())

    assert Lane.BATCH == answer.best.lane
    assert not answer.best.is_assured
    assert answer.best.rescue_at is None
    assert 80 <= answer.chance_percent <= 90
    assert "no room to rescue all 100,000 rows" in answer.reason


def test_live_work_does_not_take_what_is_promised() -> None:
    """A rescue of the earlier batch needs the live lane from 12:05 to 12:11. Before that, the lane is idle."""
    busy = situation(an_open("urgent", 5_400, 12))

    assert Lane.LIVE == chosen(asked(4_500, 8), busy).lane
    answer = refused(asked(5_400, 8), busy)
    assert Lane.BATCH == answer.best.lane
    assert not answer.best.is_assured
    assert "no room to rescue all 5,400 rows" in answer.reason


def test_live_work_takes_it_if_it_was_asked_for() -> None:
    busy = situation(an_open("urgent", 5_400, 12))

    assert Lane.LIVE == chosen(asked(5_400, 8, Asked.LIVE), busy).lane
    assert Lane.LIVE == refused(asked(8_100, 8, Asked.LIVE), busy).best.lane


def test_who_asks_for_the_batch_lane_gets_it_or_a_warning() -> None:
    assert Lane.BATCH == chosen(asked(10, 600, Asked.BATCH), situation()).lane
    answer = refused(asked(10, 7, Asked.BATCH), situation())
    assert Lane.BATCH == answer.best.lane
    assert "too soon to wait for an upstream batch" in answer.reason


def test_a_blocked_live_lane_is_no_rescue_before_it_is_free() -> None:
    blocked = situation(live=LiveLane(1_000, blocked_until=NOON + 55 * MINUTE))

    assert isinstance(choose(asked(9_000, 60), blocked), Unmeetable)
    assert isinstance(choose(asked(9_000, 70), blocked), Choice)


def test_a_live_lane_without_a_limit_promises_nothing() -> None:
    nothing = situation(live=LiveLane(0))

    answer = refused(asked(100, 60), nothing)

    assert Lane.BATCH == answer.best.lane
    assert 0 == refused(asked(100, 60, Asked.LIVE), nothing).chance_percent


def test_what_exceeds_upstreams_queue_is_held_and_expected_to_be_live() -> None:
    full = situation(in_processing=499_000, most_in_processing=500_000)

    choice = chosen(asked(4_000, 600), full)

    assert 3_000 == choice.held
    assert choice.half_price_percent <= 25
    assert 3_000 == chosen(asked(4_000, None), full).held
    assert Lane.LIVE == chosen(asked(4_000, 600), replace(full, in_processing=500_001)).lane


# Pieces


@pytest.mark.parametrize(
    ("rows", "minutes", "pieces"),
    [
        (100, 60, 1),
        # 900 rows a minute for a sixtieth of two hours.
        (18_000, 120, 10),
        (18_000, 20 * 60, 1),
        (100_001, None, 2),
    ],
)
def test_work_is_cut_smaller_near_its_deadline(rows: int, minutes: int | None, pieces: int) -> None:
    assert pieces == len(chosen(asked(rows, minutes), situation()).pieces)


@given(st.integers(1, 3_000_000), st.none() | st.integers(1, 24 * 60), st.integers(0, 10_000))
def test_pieces_are_all_rows_evenly_and_none_is_too_large(
    rows: int, minutes: int | None, pace: int
) -> None:
    answer = choose(asked(rows, minutes, Asked.BATCH), situation(live=LiveLane(pace)))
    pieces = (answer if isinstance(answer, Choice) else answer.best).pieces

    assert rows == sum(pieces)
    assert 1 <= max(pieces) <= MOST_REQUESTS
    assert max(pieces) - min(pieces) <= 1
    assert len(pieces) <= max(MOST_PIECES, -(-rows // MOST_REQUESTS))
    assert len(pieces) == 1 or min(pieces) > LEAST_PIECE // 2 - 1


# The plan


BATCHES = st.lists(
    st.tuples(
        st.integers(1, 60_000),
        st.none() | st.integers(-60, 26 * 60),
        st.sampled_from(["new", "open", "canceled"]),
        st.booleans(),
    ),
    max_size=8,
).map(
    lambda drawn: tuple(
        UnfinishedBatch(
            f"b{number}",
            rows,
            None if minutes is None else NOON + minutes * MINUTE,
            None if state == "new" else NOON - 10 * MINUTE,
            NOON - MINUTE if state == "canceled" else None,
            is_assured=is_assured,
        )
        for number, (rows, minutes, state, is_assured) in enumerate(drawn)
    )
)
LANES = st.builds(
    LiveLane,
    st.integers(0, 10_000),
    st.integers(0, 50_000),
    st.integers(NOON - HOUR_MS, NOON + HOUR_MS),
)


@given(BATCHES, LANES)
def test_the_time_of_the_live_lane_is_never_promised_twice(
    batches: tuple[UnfinishedBatch, ...], live: LiveLane
) -> None:
    planned = plan(batches, live, NOON)

    taken = sorted((each.start, each.end) for each in planned.values() if each.end > each.start)
    for (_, end), (start, _) in pairwise(taken):
        assert end <= start
    assert planned.keys() == {each.name for each in batches if each.due is not None}


@given(BATCHES, LANES)
def test_no_interval_has_more_rows_than_the_lane_can_run_before_the_deadline(
    batches: tuple[UnfinishedBatch, ...], live: LiveLane
) -> None:
    planned = plan(batches, live, NOON)

    for each in batches:
        if each.due is None:
            continue
        interval = planned[each.name]
        assert 0 <= interval.rows <= each.rows
        assert (
            interval.rows <= (interval.end - interval.start) / MINUTE * live.rows_per_minute * 0.9
        )
        if interval.rows:
            assert interval.end + TAIL_MS <= each.due
            assert interval.start >= max(NOON, live.blocked_until)
            assert interval.start - NOON >= live.ahead / live.rows_per_minute * MINUTE


def test_intervals_are_as_late_as_possible_in_the_order_of_deadlines() -> None:
    planned = plan([an_open("late", 9_000, 120), an_open("soon", 900, 111)], LIVE, NOON)

    # The later one needs ten minutes until a minute before its deadline.
    assert Interval(NOON + 109 * MINUTE, NOON + 119 * MINUTE, 9_000) == planned["late"]
    assert Interval(NOON + 108 * MINUTE, NOON + 109 * MINUTE, 900) == planned["soon"]


def test_with_too_much_work_the_earliest_deadlines_have_their_rows() -> None:
    planned = plan([an_open("later", 9_000, 15), an_open("soon", 4_500, 14)], LIVE, NOON)

    first = NOON + READY_MS
    assert Interval(first, first + 5 * MINUTE, 4_500) == planned["soon"]
    assert Interval(first + 5 * MINUTE, NOON + 14 * MINUTE, 4_500) == planned["later"]


# The revision


def test_a_batch_is_kept_until_its_rescue_is_due() -> None:
    batch = an_open("a", 9_000, 60)
    rescue_at = NOON + 60 * MINUTE - TAIL_MS - 10 * MINUTE - LEAD_MS

    before = revise(replace(situation(batch), now=rescue_at - 1))["a"]
    then = revise(replace(situation(batch), now=rescue_at))["a"]

    assert (False, rescue_at) == (before.rescue, before.rescue_at)
    assert "rescue from 2026-11-20 12:43 UTC" == before.reason
    assert (True, rescue_at) == (then.rescue, then.rescue_at)
    assert (
        "must start its rows at 2026-11-20 12:49 UTC to finish by 2026-11-20 13:00" in then.reason
    )


def test_a_rescue_starts_earlier_if_cancels_take_longer() -> None:
    usual = situation(an_open("a", 9_000, 60))
    slow = replace(usual, cancel_ms=CANCEL_MS + 7 * MINUTE)

    before, after = (revise(each)["a"].rescue_at for each in (usual, slow))
    assert before is not None
    assert before - 7 * MINUTE == after
    assert before == revise(replace(usual, cancel_ms=1))["a"].rescue_at
    before, after = (chosen(asked(900, 600), each).rescue_at for each in (usual, slow))
    assert before is not None
    assert before - 7 * MINUTE == after


def test_a_batch_that_was_not_created_is_rescued_without_a_cancel() -> None:
    held = an_open("a", 900, 60, created_at=None)
    start = NOON + 58 * MINUTE

    assert not revise(replace(situation(held), now=start - STEP_MS - 1))["a"].rescue
    assert revise(replace(situation(held), now=start - STEP_MS))["a"].rescue
    # Also late: it can still start at once.
    assert revise(replace(situation(held), now=start + MINUTE // 2))["a"].rescue


def test_a_batch_without_a_deadline_is_never_rescued() -> None:
    revision = revise(situation(an_open("a", 10, 0, due=None)))["a"]

    assert (False, None, "no deadline") == (
        revision.rescue,
        revision.rescue_at,
        revision.reason,
    )


def test_a_batch_that_the_live_lane_cannot_help_is_kept() -> None:
    revision = revise(situation(an_open("a", 10, 2)))["a"]

    assert (False, None) == (revision.rescue, revision.rescue_at)
    assert "no room for its rows before the deadline" in revision.reason


def test_a_canceled_batch_is_not_revised_again_and_keeps_its_interval() -> None:
    canceled = an_open("a", 9_000, 20, canceled_at=NOON - MINUTE)

    revisions = revise(situation(canceled, an_open("b", 900, 21)))

    # From 12:04 to 12:14 at the earliest the lane is busy with the first one.
    assert ["b"] == [*revisions]
    assert not revisions["b"].rescue


def test_rescues_follow_each_other_at_the_pace_of_the_live_lane() -> None:
    pieces = [an_open(f"{number}", 1_800, 40) for number in range(10)]

    due = [each.rescue_at for each in revise(situation(*pieces)).values()]

    # Two minutes for each, the last one ending a minute before the deadline.
    first = NOON + (40 - 1 - 20) * MINUTE - LEAD_MS
    assert [first + number * 2 * MINUTE for number in range(10)] == due


def test_what_was_not_assured_takes_nothing_from_what_was() -> None:
    assured = an_open("assured", 9_000, 40)
    other = an_open("other", 90_000, 39, is_assured=False)

    revisions = revise(situation(assured, other))

    assert NOON + 29 * MINUTE - LEAD_MS == revisions["assured"].rescue_at
    assert not revisions["other"].rescue
    assert "no room" in revisions["other"].reason


@pytest.mark.parametrize("is_created", [True, False])
def test_what_was_not_assured_is_rescued_for_the_rows_that_are_expected(is_created: bool) -> None:  # noqa: FBT001
    other = an_open("other", 90_000, 90, is_assured=False)
    if not is_created:
        other = replace(other, created_at=None)
    no_deadline = an_open("none", 5, 0, due=None, is_assured=False)

    revision = revise(situation(other, no_deadline))["other"]

    # All of its rows would need 100 minutes.
    assert not revision.rescue
    assert revision.rescue_at is not None
    assert NOON + 10 * MINUTE < revision.rescue_at < NOON + 88 * MINUTE


# Laws of the choice


REQUESTS = st.builds(
    asked,
    st.integers(1, 200_000),
    st.none() | st.integers(1, 26 * 60),
    st.sampled_from(list(Asked)),
)


@settings(deadline=None)
@given(REQUESTS, BATCHES, LANES, st.randoms(use_true_random=False))
def test_the_order_of_the_batches_does_not_matter(
    request: Request, batches: tuple[UnfinishedBatch, ...], live: LiveLane, chance: random.Random
) -> None:
    shuffled = list(batches)
    chance.shuffle(shuffled)

    one, other = situation(*batches, live=live), situation(*shuffled, live=live)

    assert choose(request, one) == choose(request, other)
    assert revise(one) == revise(other)
    assert plan(batches, live, NOON) == plan(shuffled, live, NOON)


EASY_LANES = st.builds(
    LiveLane,
    st.integers(1_000, 10_000),
    st.integers(0, 5_000),
    st.integers(NOON - HOUR_MS, NOON + 10 * MINUTE),
)
ALL_OPEN = st.lists(st.tuples(st.integers(1, 10_000), st.integers(30, 26 * 60)), max_size=5).map(
    lambda drawn: tuple(
        an_open(f"b{number}", rows, minutes) for number, (rows, minutes) in enumerate(drawn)
    )
)


@settings(deadline=None)
@given(REQUESTS, ALL_OPEN, EASY_LANES, st.integers(1, 600))
def test_with_more_time_the_batch_lane_stays_the_choice(
    request: Request, batches: tuple[UnfinishedBatch, ...], live: LiveLane, more: int
) -> None:
    at = situation(*batches, live=live)
    planned = plan(batches, live, NOON)
    # With too much promised already, less is lost with one deadline than with another one.
    assume(all(planned[each.name].rows == each.rows for each in batches))
    first = choose(request, at)
    if not isinstance(first, Choice) or first.rescue_at is None or request.due is None:
        return

    later = choose(replace(request, due=request.due + more * MINUTE), at)

    assert isinstance(later, Choice)
    assert Lane.BATCH == later.lane
    assert later.rescue_at is not None
    assert first.rescue_at <= later.rescue_at
    assert later.micro_usd <= first.micro_usd + 1


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, (SEND_MS + LEAD_MS + TAIL_MS) // MINUTE), LANES)
def test_a_deadline_within_the_time_of_a_rescue_is_never_met_by_a_batch(
    rows: int, minutes: int, live: LiveLane
) -> None:
    answer = choose(asked(rows, minutes), situation(live=live))

    assert isinstance(answer, Unmeetable) or Lane.LIVE == answer.lane


@settings(deadline=None)
@given(REQUESTS, ALL_OPEN, LANES)
def test_a_promise_leaves_every_earlier_promise_its_room(
    request: Request, batches: tuple[UnfinishedBatch, ...], live: LiveLane
) -> None:
    before = plan(batches, live, NOON)
    answer = choose(request, situation(*batches, live=live))
    if not isinstance(answer, Choice) or answer.rescue_at is None:
        return

    new = UnfinishedBatch("new", request.rows, request.due, NOON)
    after = plan([*batches, new], live, NOON)

    assert after["new"].rows == request.rows
    assert sum(each.rows for each in after.values()) >= request.rows + sum(
        each.rows for each in before.values()
    )


@settings(deadline=None)
@given(BATCHES, LANES)
def test_only_what_the_live_lane_can_start_is_rescued(
    batches: tuple[UnfinishedBatch, ...], live: LiveLane
) -> None:
    at = situation(*batches, live=live)

    rescued = {name for name, each in revise(at).items() if each.rescue}
    for each in batches:
        if each.name in rescued:
            assert each.due is not None
            assert NOON < each.due
            assert live.rows_per_minute > 0


# Stories


@dataclass
class Story:
    """A live lane in the order of arrival, and upstream batches that never end. The pace is the one that is planned."""

    per_minute: int
    cancel_ms: int = CANCEL_MS
    now: int = NOON
    queue: list[tuple[str, int]] = field(default_factory=list)
    batches: dict[str, UnfinishedBatch] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)
    late: int = 0
    refused: int = 0
    chosen: list[Lane] = field(default_factory=list)

    def situation(self) -> Situation:
        live = LiveLane(self.per_minute, sum(rows for _, rows in self.queue))
        batches = tuple(self.batches.values())
        return Situation(self.now, live, batches, LAW, cancel_ms=self.cancel_ms)

    def submit(self, rows: int, minutes: int) -> None:
        due, name = self.now + minutes * MINUTE, f"work {len(self.due)}"
        answer = choose(Request(rows, due), self.situation())
        if isinstance(answer, Unmeetable):
            self.refused += 1
            return
        self.due[name] = due
        self.chosen.append(answer.lane)
        if answer.lane is Lane.LIVE:
            self.queue.append((name, rows))
            return
        for number, piece in enumerate(answer.pieces):
            made = UnfinishedBatch(f"{name}.{number}", piece, due)
            self.batches[made.name] = made

    def minute(self) -> None:
        """A step, then a minute of the live lane."""
        for batch in sorted(self.batches.values(), key=lambda each: each.due or 0):
            canceled_at = batch.canceled_at
            if canceled_at is not None and canceled_at + self.cancel_ms + RESULTS_MS <= self.now:
                del self.batches[batch.name]
                self.queue.append((batch.name.partition(".")[0], batch.rows))
        for name, revision in revise(self.situation()).items():
            if revision.rescue:
                self.rescue(self.batches[name])
        for batch in self.batches.values():
            if batch.created_at is None:
                self.batches[batch.name] = replace(batch, created_at=self.now)
        left = self.per_minute * 9 // 10
        while left and self.queue:
            name, rows = self.queue.pop(0)
            run = min(left, rows)
            if run < rows:
                self.queue.insert(0, (name, rows - run))
            left -= run
            # The row started within this minute; its answer comes within TAIL_MS.
            started = self.now + MINUTE - left * MINUTE // (self.per_minute * 9 // 10)
            self.late += run if started + TAIL_MS > self.due[name] else 0
        self.now += MINUTE

    def rescue(self, batch: UnfinishedBatch) -> None:
        if batch.created_at is None:
            del self.batches[batch.name]
            self.queue.append((batch.name.partition(".")[0], batch.rows))
        else:
            self.batches[batch.name] = replace(batch, canceled_at=self.now)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40).map(lambda tens: tens * 100),
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 30_000), st.integers(5, 400)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([CANCEL_MS, 5 * MINUTE]),
)
def test_what_was_promised_meets_its_deadline_even_if_no_upstream_batch_ever_ends(
    per_minute: int, works: list[tuple[int, int, int]], cancel_ms: int
) -> None:
    story = Story(per_minute, cancel_ms)
    for wait, rows, minutes in works:
        for _ in range(wait):
            story.minute()
        story.submit(rows, minutes)
    while story.batches or story.queue:
        story.minute()
        assert story.now < NOON + 2 * DAY_MS

    assert 0 == story.late


def test_the_story_has_both_lanes_and_refusals() -> None:
    story = Story(1_000)
    for rows, minutes in ((900, 8), (20_000, 60), (50_000, 120), (50_000, 121)):
        story.submit(rows, minutes)

    assert [Lane.LIVE, Lane.BATCH, Lane.BATCH] == story.chosen
    assert 1 == story.refused
