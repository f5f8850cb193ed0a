"""The choice of the lane: the cheapest one that meets the deadline, and when a late upstream batch is rescued.

The batch lane costs half. Nobody can hurry it, but it can be left: a canceled upstream batch ends within minutes, its
finished rows are used, and the others are not billed (https://platform.claude.com/docs/en/build-with-claude/
batch-processing). So work may wait on the batch lane until the last moment from which the live lane can still run
*all* of it. Until then each row that finishes has cost half, and no later choice is lost.

This requires that the live lane has room at that moment. `plan` therefore gives each upstream batch with a deadline an
interval of the live lane's time for all its rows: the latest one before its deadline, no two overlapping, in the order
of deadlines. Nothing is known about the rows of an open upstream batch, so none is assumed to be finished. The interval
of a batch that ends in time is released for others.

The live lane is assumed to start rows in the order in which they came. All of this is about one limit group: rows that
share the limit `rows_per_minute`. Rows of a rescue go to the live lane, never to another upstream batch: small batches
have no priority upstream, so a few rows would wait as long as many, with less time left.

Times are epoch milliseconds, money is integer micro-dollars. Nothing depends on the order of the arguments' items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil
from typing import Final

from sluice.domain.completions import HOUR_MS, MINUTE_MS, Law
from sluice.domain.times import rfc3339
from sluice.domain.upstream_batches import CANCEL_MS, MOST_REQUESTS

STEP_MS: Final = MINUTE_MS
"""Upstream batches are moved once in this time."""

RESULTS_MS: Final = MINUTE_MS
"""To read the results of 100,000 rows, save them, and send the unfinished rows to the live lane."""

READY_MS: Final = CANCEL_MS + STEP_MS + RESULTS_MS
"""From a cancel until the unfinished rows are on the live lane: the cancel, a step until its end is seen, results.
Longer if cancels take longer (`Situation.cancel_ms`)."""

SLACK_MS: Final = 30_000
"""A step starts some seconds after its time, on machines whose clocks differ."""

LEAD_MS: Final = STEP_MS + SLACK_MS + READY_MS
"""From the latest moment of a rescue to the start of its interval: the next step may come so much later."""

SEND_MS: Final = 2 * STEP_MS
"""From the choice until an upstream batch is created: its body is prepared in one step and sent in the next one."""

SEEN_MS: Final = STEP_MS + RESULTS_MS
"""From the end of an upstream batch until its results are saved."""

TAIL_MS: Final = MINUTE_MS
"""From the start of a live call until its answer is stored, with a retry."""

PACE_PERCENT: Final = 90
"""The share of the live limit that is planned. The rest is for retries, 429s and rows that nobody planned."""

WORTH_PERCENT: Final = 5
"""The batch lane is used if at least this share of the rows is expected to finish there."""

LEAST_PIECE: Final = 1_000
"""Work is not cut into smaller pieces: the live lane runs so many rows in one step or a few."""

PIECES_PER_DEADLINE: Final = 60
"""A piece needs at most about this part of the time to the deadline on the live lane, so that a rescue moves the work
piece by piece, and most pieces stay on the batch lane until shortly before their own intervals."""

MOST_PIECES: Final = 50
"""Of one work, unless they would be too large."""

UNLIMITED: Final = 1 << 62


class Lane(StrEnum):
    """Where rows run."""

    LIVE = "live"
    """The Messages API."""
    BATCH = "batch"
    """Anthropic's Message Batches API, at half price."""


class Asked(StrEnum):
    """Which lane the caller asks for."""

    LIVE = "live"
    BATCH = "batch"
    AUTO = "auto"
    """The cheapest one that meets the deadline."""


@dataclass(frozen=True, slots=True)
class LiveLane:
    """The live lane of one limit group at this moment."""

    rows_per_minute: int
    """What the limits permit for rows like these; 0: none."""
    ahead: int = 0
    """Rows that were sent to the live lane and have not started. Their deadlines do not matter: they start first."""
    blocked_until: int = 0


@dataclass(frozen=True, slots=True)
class UnfinishedBatch:
    """An upstream batch whose rows have no results yet: to be created, open, or canceled and not ended."""

    name: str
    """Unique among those of a situation."""
    rows: int
    due: int | None
    """The earliest deadline of its rows; None: none of them has one."""
    created_at: int | None = None
    """None: not created yet."""
    canceled_at: int | None = None
    is_assured: bool = True
    """False: accepted although the live lane had no room for all its rows. It never takes room from the others."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision depends on."""

    now: int
    live: LiveLane
    batches: tuple[UnfinishedBatch, ...]
    law: Law
    """The completion times of the organization, learned also from the batches above."""
    in_processing: int = 0
    """Requests in upstream's queue, of the whole organization."""
    most_in_processing: int = UNLIMITED
    """Their limit (https://platform.claude.com/docs/en/api/rate-limits: 200,000 to 500,000)."""
    cancel_ms: int = CANCEL_MS
    """How long a cancel takes: the longest one seen recently. Every promise depends on it."""


@dataclass(frozen=True, slots=True)
class Request:
    """Work that needs a lane: the rows of a batch of Sluice in one limit group."""

    rows: int
    due: int | None = None
    """When the last row must have its answer; None: no deadline."""
    live_micro_usd: int = 0
    """The estimated cost of all rows on the live lane."""
    asked: Asked = Asked.AUTO


@dataclass(frozen=True, slots=True)
class Interval:
    """The part of the live lane's time that is kept for an upstream batch."""

    start: int
    end: int
    rows: int
    """Those that fit before the deadline: all of them, unless too much was promised or the limits have fallen."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The lane of some work."""

    lane: Lane
    reason: str
    micro_usd: int
    """The expected cost."""
    half_price_percent: int = 0
    """The share of the rows that is expected to finish on the batch lane."""
    pieces: tuple[int, ...] = ()
    """Rows of each upstream batch into which the work is cut; empty on the live lane."""
    held: int = 0
    """Rows that exceed upstream's queue at this moment. They wait, and are rescued like those that were sent."""
    rescue_at: int | None = None
    """The latest moment of the first rescue, as planned now. `revise` follows the situation."""
    is_assured: bool = True
    """All rows meet the deadline as long as the live limits stay as they are."""


@dataclass(frozen=True, slots=True)
class Unmeetable:
    """No lane that the caller accepts can be relied on to meet the deadline."""

    best: Choice
    """What to do if the work is accepted nevertheless."""
    chance_percent: int
    """The share of the rows that is expected to meet the deadline then."""
    reason: str


@dataclass(frozen=True, slots=True)
class Revision:
    """What to do with an upstream batch now."""

    rescue: bool
    """Cancel it now (or do not create it any more): its unfinished rows go to the live lane. False: keep it."""
    rescue_at: int | None
    """The latest moment of its rescue, as planned now; None: it is not rescued."""
    reason: str


# The live lane's time


def plan(
    batches: Iterable[UnfinishedBatch], live: LiveLane, now: int, cancel_ms: int = CANCEL_MS
) -> dict[str, Interval]:
    """Return an interval of the live lane for each upstream batch with a deadline, by name. No two intervals overlap.

    Each interval starts as late as possible; in the order of deadlines. With too much work, intervals start as early as
    possible, and what does not fit before its deadline is left out.
    """
    works = [(each.due, each) for each in sorted(batches, key=_urgency) if each.due is not None]
    starts: list[int] = []
    latest = UNLIMITED
    for due, work in reversed(works):
        latest = min(latest, due - TAIL_MS) - _needs(work.rows, live)
        starts.append(latest)
    free = _free(live, now)
    intervals = {}
    for (due, work), start in zip(works, reversed(starts), strict=True):
        begin = max(start, free, _ready(work, now, cancel_ms))
        whole = begin + _needs(work.rows, live)
        end = max(begin, min(whole, due - TAIL_MS))
        intervals[work.name] = Interval(
            begin, end, work.rows if end == whole else _runs(end - begin, live)
        )
        if end > begin:
            free = end
    return intervals


def _ready(batch: UnfinishedBatch, now: int, cancel_ms: int) -> int:
    """Return when its rows can be on the live lane, if its rescue starts now."""
    if batch.created_at is None:
        return now
    canceled_at = now if batch.canceled_at is None else batch.canceled_at
    return canceled_at + READY_MS + _longer(cancel_ms)


def _longer(cancel_ms: int) -> int:
    """Return by how much cancels take longer than usual."""
    return max(0, cancel_ms - CANCEL_MS)


def _pace(live: LiveLane) -> int:
    """Return rows per 100 minutes."""
    return max(0, live.rows_per_minute) * PACE_PERCENT


def _needs(rows: int, live: LiveLane) -> int:
    """Return the milliseconds that rows take; a lane without a limit to use never ends them."""
    pace = _pace(live)
    return -(-rows * 100 * MINUTE_MS // pace) if pace else UNLIMITED


def _runs(milliseconds: int, live: LiveLane) -> int:
    return max(0, milliseconds) * _pace(live) // (100 * MINUTE_MS)


def _free(live: LiveLane, now: int) -> int:
    """Return when the live lane can start a row that comes now."""
    return max(now, live.blocked_until) + (_needs(live.ahead, live) if live.ahead else 0)


def _short(intervals: Mapping[str, Interval], batches: Iterable[UnfinishedBatch]) -> int:
    """Return how many rows have no room before their deadlines."""
    return sum(each.rows - intervals[each.name].rows for each in batches if each.name in intervals)


# The choice


def choose(request: Request, situation: Situation) -> Choice | Unmeetable:
    """Return the cheapest lane that meets the deadline, of those that were asked for.

    Work on the batch lane has an interval of the live lane for all its rows, which takes no room from earlier promises.
    Work without a deadline runs at half price unless `live` was asked for.
    """
    if request.due is None:
        return _without_deadline(request, situation)
    live = _live(request, request.due, situation)
    if request.asked is Asked.LIVE:
        return live
    batch = _batch(request, request.due, situation)
    return batch if request.asked is Asked.BATCH else _cheapest(live, batch)


def _cheapest(live: Choice | Unmeetable, batch: Choice | Unmeetable) -> Choice | Unmeetable:
    if isinstance(live, Unmeetable):
        if isinstance(batch, Choice):
            return batch
        return max(batch, live, key=lambda each: each.chance_percent)
    if isinstance(batch, Choice) and batch.half_price_percent >= WORTH_PERCENT:
        return batch
    return replace(live, reason=f"{live.reason}; not on the batch lane: {batch.reason}")


def _without_deadline(request: Request, situation: Situation) -> Choice:
    if request.asked is Asked.LIVE:
        return Choice(Lane.LIVE, "live: as requested", request.live_micro_usd)
    ends = situation.law.quantile(0.9)
    within = "24 h" if ends is None else _span(ends)
    return Choice(
        Lane.BATCH,
        f"batch: half price, no deadline; 90 % of upstream batches end within {within}",
        _cost(request, 1.0),
        100,
        _cut(request.rows, None, situation),
        _held(request.rows, situation),
    )


def _live(request: Request, due: int, situation: Situation) -> Choice | Unmeetable:
    now, live = situation.now, situation.live
    batches = [each for each in situation.batches if each.is_assured]
    before = plan(batches, live, now, situation.cancel_ms)
    # The rows start before all that comes later, also before rescues that are more urgent.
    ahead = replace(live, ahead=live.ahead + request.rows)
    after = plan(batches, ahead, now, situation.cancel_ms)
    end = _free(live, now) + _needs(request.rows, live)
    made = Choice(Lane.LIVE, f"live: done by about {_at(end)}", request.live_micro_usd)
    warned = replace(made, is_assured=False)
    taken = _short(after, batches) - _short(before, batches)
    if taken > 0 and request.asked is not Asked.LIVE:
        # No chance, because it must not be done.
        return Unmeetable(
            warned,
            0,
            f"the live lane is promised to earlier work: {taken:,} rows of it would be late",
        )
    if end > due - TAIL_MS:
        runs = _runs(due - TAIL_MS - _free(live, now), live)
        return Unmeetable(
            warned,
            100 * runs // request.rows,
            f"until the deadline the live lane has room for {runs:,} of {request.rows:,} rows"
            f" ({live.ahead:,} rows are ahead, {live.rows_per_minute:,} a minute)",
        )
    return made


def _batch(request: Request, due: int, situation: Situation) -> Choice | Unmeetable:
    now, live, law = situation.now, situation.live, situation.law
    batches = [each for each in situation.batches if each.is_assured]
    mine = UnfinishedBatch("", request.rows, due, created_at=now)
    intervals = plan([*batches, mine], live, now, situation.cancel_ms)
    without = plan(batches, live, now, situation.cancel_ms)
    rescue_at = intervals[""].start - LEAD_MS - _longer(situation.cancel_ms)
    is_assured = intervals[""].rows == request.rows and (
        _short(intervals, batches) <= _short(without, batches)
    )
    created_at, held = now + SEND_MS, _held(request.rows, situation)
    pieces = _cut(request.rows, due, situation)
    if is_assured and rescue_at > created_at:
        # The pieces are rescued one after the other: on average in the middle of the interval.
        middle = rescue_at + _needs(request.rows - pieces[0], live) // 2
        share = law.rows_done(middle - created_at) * (request.rows - held) / request.rows
        reason = (
            f"batch: {share:.0%} of the rows are expected at half price; what is not finished moves to"
            f" the live lane from {_at(rescue_at)}"
        )
        percent = int(100 * share)
        cost = _cost(request, share)
        return Choice(Lane.BATCH, reason, cost, percent, pieces, held, rescue_at)
    window = max(0, due - SEEN_MS - created_at)
    share = law.rows_done(window)
    best = Choice(
        Lane.BATCH,
        "batch: without room on the live lane for a rescue",
        _cost(request, share),
        int(100 * share),
        pieces,
        held,
        is_assured=False,
    )
    reason = (
        "the deadline is too soon to wait for an upstream batch and rescue it"
        if is_assured
        else f"the live lane has no room to rescue all {request.rows:,} rows before the deadline"
    )
    return Unmeetable(best, int(100 * law.chance(window)), reason)


def _cost(request: Request, share: float) -> int:
    """Return the expected cost if a share of the rows finishes on the batch lane, at half price."""
    return ceil(request.live_micro_usd * (1 - share / 2))


def _held(rows: int, situation: Situation) -> int:
    room = max(0, situation.most_in_processing - situation.in_processing)
    return max(0, rows - room)


def _cut(rows: int, due: int | None, situation: Situation) -> tuple[int, ...]:
    """Return the rows of each upstream batch: as even as possible, smaller near a deadline."""
    count = -(-rows // largest_piece(rows, due, situation))
    return tuple(rows // count + (piece < rows % count) for piece in range(count))


def largest_piece(rows: int, due: int | None, situation: Situation) -> int:
    """Return how many rows an upstream batch with some of this work may have, so that it can be rescued alone."""
    if due is None:
        return MOST_REQUESTS
    fitting = _runs((due - situation.now) // PIECES_PER_DEADLINE, situation.live)
    return min(MOST_REQUESTS, max(LEAST_PIECE, fitting, -(-rows // MOST_PIECES)))


# The revision


def revise(situation: Situation) -> dict[str, Revision]:
    """Return what to do now with each upstream batch that is not canceled, by name, in the order of deadlines.

    Call it once per step. Batches are rescued one after the other, so that each cancel ends when the live lane has
    room for its rows; a rescue keeps the interval of its rows until they are on the live lane (`LiveLane.ahead`).
    The plan holds if rows of rescues that are ready in the same step go to the live lane in the order of deadlines.
    """
    now, live = situation.now, situation.live
    expected = [_as_expected(each, situation) for each in situation.batches]
    assured = [each for each in expected if each.is_assured]
    intervals = plan(expected, live, now, situation.cancel_ms)
    alone = plan(assured, live, now, situation.cancel_ms)
    if _short(intervals, assured) > _short(alone, assured):
        intervals = alone
    return {
        each.name: _revised(each, intervals.get(each.name), situation)
        for each in sorted(situation.batches, key=_urgency)
        if each.canceled_at is None
    }


def _urgency(batch: UnfinishedBatch) -> tuple[int, str]:
    return UNLIMITED if batch.due is None else batch.due, batch.name


def _as_expected(batch: UnfinishedBatch, situation: Situation) -> UnfinishedBatch:
    """Return a batch that was accepted without room for all its rows with those that are expected to be unfinished."""
    if batch.is_assured or batch.due is None:
        return batch
    created_at = situation.now + SEND_MS if batch.created_at is None else batch.created_at
    age = max(0, situation.now - created_at)
    done = situation.law.rows_done(max(age, batch.due - SEEN_MS - created_at), age)
    return replace(batch, rows=ceil(batch.rows * (1 - done)))


def _revised(batch: UnfinishedBatch, interval: Interval | None, situation: Situation) -> Revision:
    if batch.due is None:
        return Revision(rescue=False, rescue_at=None, reason="no deadline")
    if interval is None or not interval.rows:
        return Revision(
            rescue=False,
            rescue_at=None,
            reason="the live lane has no room for its rows before the deadline",
        )
    # A batch that was not created needs no cancel.
    lead = STEP_MS if batch.created_at is None else LEAD_MS + _longer(situation.cancel_ms)
    rescue_at = interval.start - lead
    if rescue_at > situation.now:
        return Revision(rescue=False, rescue_at=rescue_at, reason=f"rescue from {_at(rescue_at)}")
    return Revision(
        rescue=True,
        rescue_at=rescue_at,
        reason=f"late: the live lane must start its rows at {_at(interval.start)} to finish by"
        f" {_at(batch.due)}",
    )


def _at(milliseconds: int) -> str:
    """Return a time for a person, without seconds."""
    return f"{str(rfc3339(milliseconds))[:16].replace('T', ' ')} UTC"


def _span(milliseconds: int) -> str:
    minutes = -(-milliseconds // MINUTE_MS)
    return f"{minutes} min" if minutes < 120 else f"{-(-milliseconds // HOUR_MS)} h"  # noqa: PLR2004 - two hours
