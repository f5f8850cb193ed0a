"""The limiter's arithmetic: Claude's own, in exact integers, with time as an argument.

A *limit group* is an organisation and the models that share one bucket there. It has a bucket for requests, one for
input tokens (cache reads are free) and one for output tokens (as produced, never `max_tokens`). A bucket refills
continuously with `limit / 60` units a second up to its capacity (Anthropic, rate limits).

Workers reserve blocks of jobs: the level may go below zero, which means that capacity not yet refilled has been
given out, and each job gets the time at which its share will be there. What a call really used is settled
afterwards. Every response's headers correct the books: that is how limits are learned and how other users of the
same organisation are noticed.

Levels are kept in units x 60,000,000, so that a millisecond of refill at a rate factor of 1/1000 is a whole number.
Times are epoch milliseconds. Clocks of different workers may differ by seconds: a bucket's time never runs backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from sluice.domain.pricing import base_model

SCALE: Final = 60_000_000
FULL_RATE: Final = 1000
"""The rate factor in thousandths: 1000 is the whole limit."""

MIN_RATE: Final = 100
RATE_AFTER_429: Final = 900
"""Thousandths of the rate factor that remain after a 429 (multiplicative decrease)."""

RATE_AFTER_RAMP: Final = 500
RECOVERY_PER_SECOND: Final = 20
"""Thousandths of the rate factor that come back each second (additive recovery)."""

BURST_PACE: Final = 5
"""Saved-up capacity is spent at most this many times faster than the limit: 60 RPM may be enforced as 1 per second."""

GROWTH: Final = 60
GROWTH_AFTER_429: Final = 600
SHRINK_TO: Final = 70
"""Percent of a guessed limit that remain after a 429."""

OVERLOAD_STREAK: Final = 5
"""That many 529s in a row open the breaker; a single one is only that job's bad luck."""

OVERLOAD_PAUSE_MS: Final = 5_000
OVERLOAD_PAUSE_CAP_MS: Final = 60_000

CORRECT_EVERY_MS: Final = 1_000
"""A correction needs this long to show in the headers; a second one before that would count it twice."""

FLOOR_MS: Final = 1_000
"""Making room for the margin never holds the group back by more than this time."""

OUTSTANDING_SHARE: Final = 3
"""One part in so many of the output under way is held back, so that heavy tails do not run into a 429."""

OUTSTANDING_DECAY_MS: Final = 600_000
"""What a dead worker left outstanding fades away over this time."""

LEAST_CHARS: Final = 500
"""Shorter requests do not teach how many characters make a token."""

MOST_CHARS_PER_TOKEN: Final = 8
"""No text has more: what is too large even so can never be admitted, whatever the estimate says."""

MOST_SAMPLES: Final = 100
"""The output mean follows the last hundred calls or so."""

FIRST_GUESS: Final = 4

Dimension = Literal["requests", "input_tokens", "output_tokens"]
DIMENSIONS: Final[tuple[Dimension, ...]] = ("requests", "input_tokens", "output_tokens")

SAFE_START: Final[Mapping[Dimension, int]] = {
    "requests": 60,
    "input_tokens": 30_000,
    "output_tokens": 8_000,
}
"""Units per minute until the first answer tells the real limits: the first call starts at once, then one a second."""

TOKEN_ROUNDING: Final = 1_000
"""Upstream rounds remaining tokens to the nearest thousand (Anthropic, response headers)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call takes from the three buckets; estimated before, real afterwards."""

    requests: int = 1
    input_tokens: int = 0
    output_tokens: int = 0

    def of(self, dimension: Dimension) -> int:
        """Return the units of one dimension."""
        return int(getattr(self, dimension))


@dataclass(frozen=True, slots=True)
class Bucket:
    """One dimension of a limit group."""

    limit: int
    """Units per minute."""
    capacity: int
    """The most units it can save up: the highest `remaining` seen, for upstream does not tell."""
    level: int
    """Scaled by SCALE; below zero means given out before it has been refilled."""
    at: int
    """When `level` was true."""
    learned: bool = False
    corrected_at: int = 0

    def advanced(self, now: int, rate_factor: int) -> Bucket:
        """Return the bucket with its refill up to `now`."""
        if now <= self.at:
            return self
        refilled = self.level + self.limit * rate_factor * (now - self.at)
        return replace(self, level=min(self.capacity * SCALE, refilled), at=now)

    def ready_at(self, units: int, rate_factor: int) -> int:
        """Return when `units` are there. More than the capacity counts as the capacity: it must start some day."""
        missing = min(units, self.capacity) * SCALE - self.level
        if missing <= 0:
            return self.at
        return self.at + -(-missing // (self.limit * rate_factor))

    def less(self, units: int) -> Bucket:
        """Return the bucket with `units` taken out; negative units are a refund, which never overfills."""
        return replace(self, level=min(self.capacity * SCALE, self.level - units * SCALE))


def starting_bucket(dimension: Dimension, now: int) -> Bucket:
    """Return the bucket of a group nobody knows anything about: small and safe, with room for the first call."""
    limit = SAFE_START[dimension]
    capacity = max(1, limit // 60)
    return Bucket(limit=limit, capacity=capacity, level=capacity * SCALE, at=now)


@dataclass(frozen=True, slots=True)
class Group:
    """All that is shared about one limit group. Stored as one item; `version` guards every write."""

    organization: str
    model_group: str
    requests: Bucket
    input_tokens: Bucket
    output_tokens: Bucket
    version: int = 0
    """0: not stored yet."""
    epoch: int = 0
    """Rises when the plan changed under everybody's feet: start times of an older epoch are void."""
    blocked_until: int = 0
    blocked_reason: str | None = None
    rate_factor: int = FULL_RATE
    rate_at: int = 0
    last_start: int = 0
    overload_streak: int = 0
    outstanding: int = 0
    """Output tokens reserved by calls that are not settled yet."""
    outstanding_at: int = 0
    observed_at: int = 0
    chars_per_1000_tokens: int = 3_500
    """Learned: how many characters of request make 1,000 input tokens."""
    output_mean: int = 300_000
    """Learned: the moving mean of output tokens per call, in thousandths."""
    call_ms: int = 10_000
    """Learned: the moving mean of a call's duration."""
    samples: int = FIRST_GUESS
    """How many calls the means stand on; the first guess counts as a few."""
    met_limit: bool = False
    """A 429 has come while limits were guessed."""
    stated: Mapping[str, int] = field(default_factory=dict)
    """Limits the key pool states, per dimension: they cap what is learned."""
    moved_to: str | None = None
    """The organisation this group turned out to belong to, when it was begun under the name of a key."""

    @property
    def id(self) -> str:
        """`<organization>/<model group>`."""
        return group_id(self.organization, self.model_group)

    @property
    def has_answers(self) -> bool:
        """Tell whether any call in this group was answered: until then its rate is a guess."""
        return self.requests.learned or self.samples > FIRST_GUESS

    @property
    def output_estimate(self) -> int:
        """Output tokens a call will probably produce."""
        return max(1, self.output_mean // 1000)

    def bucket(self, dimension: Dimension) -> Bucket:
        """Return one of the three buckets."""
        bucket: Bucket = getattr(self, dimension)
        return bucket

    def estimate(self, input_chars: int, max_tokens: int) -> Cost:
        """Return what a call will probably use. `max_tokens` only bounds the learned mean: it is not reserved."""
        return Cost(
            requests=1,
            input_tokens=-(-input_chars * 1000 // self.chars_per_1000_tokens),
            output_tokens=min(max_tokens, self.output_estimate),
        )


def new_group(
    organization: str, model_group: str, now: int, stated: Mapping[str, int] | None = None
) -> Group:
    """Return the state of a group that has never been used."""
    group = Group(
        organization=organization,
        model_group=model_group,
        requests=starting_bucket("requests", now),
        input_tokens=starting_bucket("input_tokens", now),
        output_tokens=starting_bucket("output_tokens", now),
        rate_at=now,
        outstanding_at=now,
    )
    return restated(group, stated, now) if stated else group


def restated(group: Group, stated: Mapping[str, int], now: int) -> Group:
    """Take over the limits that the key pool states now: they hold until headers tell lower ones.

    Where a stated limit was raised or taken away, the next answer tells what holds instead.
    """
    group = advanced(group, now)
    for dimension in DIMENSIONS:
        limit = stated.get(dimension)
        bucket = group.bucket(dimension)
        if limit == group.stated.get(dimension):
            continue
        if limit is not None and (not bucket.learned or bucket.limit > limit):
            capacity = _least_capacity(dimension, limit)
            level = min(bucket.level, capacity * SCALE) if bucket.learned else capacity * SCALE
            bucket = replace(bucket, limit=limit, capacity=capacity, level=level)
        else:
            bucket = replace(bucket, learned=False)
        group = replace(group, **{dimension: bucket})  # type: ignore[arg-type]
    return replace(group, stated=dict(stated))


def grown(group: Group) -> Group:
    """Raise guessed limits a little, because a call was served by an upstream that names none.

    By a sixtieth per call until the first 429, so that a minute at the limit doubles it; by a tenth of that afterwards.
    """
    for dimension in DIMENSIONS:
        bucket = group.bucket(dimension)
        if bucket.learned or dimension in group.stated:
            continue
        share = GROWTH_AFTER_429 if group.met_limit else GROWTH
        limit = bucket.limit + max(1, bucket.limit // share)
        capacity = max(bucket.capacity, _least_capacity(dimension, limit))
        group = replace(group, **{dimension: replace(bucket, limit=limit, capacity=capacity)})  # type: ignore[arg-type]
    return group


def _shrunk(group: Group) -> Group:
    """Lower guessed limits after a 429 of an upstream that names none."""
    for dimension in DIMENSIONS:
        bucket = group.bucket(dimension)
        if bucket.learned or dimension in group.stated:
            continue
        limit = max(1, bucket.limit * SHRINK_TO // 100)
        group = replace(group, **{dimension: replace(bucket, limit=limit)})  # type: ignore[arg-type]
    return replace(group, met_limit=True)


def group_id(organization: str, model_group: str) -> str:
    """Return the id of a limit group."""
    return f"{organization}/{model_group}"


def model_group(model: str, groups: Mapping[str, str]) -> str:
    """Return the name of the group `model` shares its limits with; unknown models have one of their own."""
    name = base_model(model)
    return groups.get(name, name)


def advanced(group: Group, now: int) -> Group:
    """Return the group with all refill, recovery and decay up to `now`."""
    rate_gain = RECOVERY_PER_SECOND * max(0, now - group.rate_at) // 1000
    outstanding, outstanding_at = group.outstanding, group.outstanding_at
    if outstanding and now - outstanding_at >= OUTSTANDING_DECAY_MS // 10:
        elapsed = min(now - outstanding_at, OUTSTANDING_DECAY_MS)
        outstanding -= outstanding * elapsed // OUTSTANDING_DECAY_MS
        outstanding_at = now
    return replace(
        group,
        requests=group.requests.advanced(now, group.rate_factor),
        input_tokens=group.input_tokens.advanced(now, group.rate_factor),
        output_tokens=group.output_tokens.advanced(now, group.rate_factor),
        rate_factor=min(FULL_RATE, group.rate_factor + rate_gain),
        # Whole gains only, so that frequent calls do not round the recovery away.
        rate_at=now if rate_gain or group.rate_factor == FULL_RATE else group.rate_at,
        outstanding=outstanding,
        outstanding_at=outstanding_at,
    )


def next_start(group: Group, cost: Cost, now: int) -> int:
    """Return when a call of this cost could start if it were reserved now (without reserving it)."""
    return start_on(advanced(group, now), cost, now)


def usual_gap(group: Group) -> int:
    """Return the milliseconds between two starts of ordinary calls at the full rate of the group."""
    requests, output = group.requests, group.output_tokens
    return max(1, 60_000 // requests.limit, 60_000 * group.output_estimate // output.limit)


def start_on(group: Group, cost: Cost, now: int) -> int:
    """Return `next_start` for a group that is advanced to `now` already."""
    gap = max(1, 60_000 * FULL_RATE // (group.requests.limit * group.rate_factor * BURST_PACE))
    return max(
        now,
        group.blocked_until,
        group.last_start + gap,
        group.requests.ready_at(cost.requests, group.rate_factor),
        group.input_tokens.ready_at(cost.input_tokens, group.rate_factor),
        group.output_tokens.ready_at(cost.output_tokens, group.rate_factor),
    )


def reserve(
    group: Group, costs: Sequence[Cost], now: int, horizon_ms: int | Sequence[int]
) -> tuple[Group, list[int]]:
    """Reserve for the first of `costs` that can start within the horizon; return the group and their start times.

    Start times are in order. `horizon_ms` is one for all, or one for each. An open breaker lets one probe through per
    pause.
    """
    group = advanced(group, now)
    starts: list[int] = []
    horizons = [horizon_ms] * len(costs) if isinstance(horizon_ms, int) else horizon_ms
    for cost, horizon in zip(costs, horizons, strict=True):
        start = start_on(group, cost, now)
        if start > now + horizon:
            break
        group = replace(
            group,
            requests=group.requests.less(cost.requests),
            input_tokens=group.input_tokens.less(cost.input_tokens),
            output_tokens=group.output_tokens.less(cost.output_tokens),
            last_start=start,
            outstanding=group.outstanding + cost.output_tokens,
        )
        starts.append(start)
        if group.overload_streak >= OVERLOAD_STREAK:
            group = replace(
                group,
                blocked_until=start + _overload_pause(group.overload_streak),
                blocked_reason="overloaded",
            )
            break
    return group, starts


def expected_start(groups: Iterable[Group], model_group: str, backlog: int, now: int) -> int:
    """Return about when a job behind `backlog` others starts: blocks, then requests per minute. A rough guide."""
    serving = [
        group for group in groups if group.model_group == model_group and group.moved_to is None
    ]
    per_minute = sum(group.requests.limit for group in serving) or SAFE_START["requests"]
    free_at = min((group.blocked_until for group in serving), default=now)
    return max(now, free_at) + backlog * 60_000 // per_minute


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of one reservation. Every reservation is settled exactly once."""

    epoch: int
    reserved: Cost
    used: Cost
    """All zero when the call was never sent."""
    input_chars: int = 0
    """Characters of an answered request with no cached input: teaches their ratio to tokens. 0: teaches nothing."""
    call_ms: int = 0
    """How long an answered call took: teaches the means. 0: not answered."""


UNUSED: Final = Cost(requests=0)


def settle(group: Group, settlements: Iterable[Settlement], now: int) -> Group:
    """Replace estimates by what was used, and give back what was not.

    A reservation of an older epoch moves no level: the block that ended its epoch has reset the levels already.
    """
    group = advanced(group, now)
    for each in settlements:
        if each.epoch == group.epoch:
            group = replace(
                group,
                requests=group.requests.less(each.used.requests - each.reserved.requests),
                input_tokens=group.input_tokens.less(
                    each.used.input_tokens - each.reserved.input_tokens
                ),
                output_tokens=group.output_tokens.less(
                    each.used.output_tokens - each.reserved.output_tokens
                ),
            )
        group = replace(group, outstanding=max(0, group.outstanding - each.reserved.output_tokens))
        if each.call_ms or each.input_chars:
            group = _taught(group, each)
    return group


def _taught(group: Group, settlement: Settlement) -> Group:
    """Move the estimates towards what this call used: the mean at first, then slower and slower."""
    used = settlement.used
    ratio = group.chars_per_1000_tokens
    if used.input_tokens and settlement.input_chars >= LEAST_CHARS:
        # Bounds keep one odd request from spoiling the ratio; short ones tell only of their fixed overhead.
        seen = min(8_000, max(1_000, settlement.input_chars * 1000 // used.input_tokens))
        ratio += (seen - ratio) // 16
    samples = min(group.samples + 1, MOST_SAMPLES)
    # In thousandths, so that small steps are not rounded away.
    mean = group.output_mean + (used.output_tokens * 1000 - group.output_mean) // samples
    call_ms = group.call_ms
    if settlement.call_ms:
        call_ms += (settlement.call_ms - call_ms) // samples
    return replace(
        group, chars_per_1000_tokens=ratio, output_mean=mean, call_ms=call_ms, samples=samples
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """`limit` and `remaining` of one dimension, as one response's headers told them."""

    limit: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Observation:
    """The limit headers of one response, and what this worker had given out but not started at that moment."""

    at: int
    seen: Mapping[Dimension, Seen]
    pending: Cost = Cost(requests=0)


def known(group: Group, dimension: Dimension, seen: Seen) -> bool:
    """Tell whether a limit that headers name is the one that is kept to already."""
    bucket = group.bucket(dimension)
    return bucket.learned and bucket.limit == min(
        seen.limit, group.stated.get(dimension, seen.limit)
    )


def observe(group: Group, observation: Observation, now: int) -> Group:
    """Correct the books by what upstream says. Answers come back out of order: an older one than the last is dropped.

    A limit that is new or changed is believed at once, and starts a new epoch, for everybody's start times were made
    for another rate. Otherwise the level is lowered at once where upstream has less left than we thought (somebody
    else is using the organisation), and raised by halves where it has more.
    """
    if observation.at < group.observed_at:
        return group
    group = replace(advanced(group, now), observed_at=observation.at)
    relearned = False
    for dimension, seen in observation.seen.items():
        if seen.limit <= 0 or seen.remaining < 0 or seen.remaining > 2 * seen.limit:
            continue
        bucket = group.bucket(dimension)
        limit = min(seen.limit, group.stated.get(dimension, seen.limit))
        if not bucket.learned or bucket.limit != limit:
            relearned = True
            # A stated limit below the real one leaves no saved-up capacity to itself.
            room = seen.remaining if limit == seen.limit else min(seen.remaining, limit // 60)
            changed = Bucket(
                limit=limit,
                capacity=max(room, _least_capacity(dimension, limit)),
                level=(room - _margin(dimension, room)) * SCALE,
                at=max(now, bucket.at),
                learned=True,
                corrected_at=now,
            )
        elif limit == seen.limit:
            pending = observation.pending.of(dimension)
            changed = _corrected(group, dimension, bucket, seen, pending, now)
        else:
            continue
        group = replace(group, **{dimension: changed})  # type: ignore[arg-type]
    if relearned:
        group = replace(group, epoch=group.epoch + 1, last_start=min(group.last_start, now))
    return group


def _corrected(  # noqa: PLR0913, PLR0917 - one step of observe, split for reading
    group: Group, dimension: Dimension, bucket: Bucket, seen: Seen, pending: int, now: int
) -> Bucket:
    bucket = replace(bucket, capacity=max(bucket.capacity, seen.remaining))
    margin = _margin(dimension, bucket.capacity)
    tolerance = TOKEN_ROUNDING if dimension != "requests" else 1
    if dimension == "output_tokens":
        # Calls under way will produce what upstream has not seen yet, while refill comes in meanwhile.
        ahead = group.outstanding // OUTSTANDING_SHARE
        off = (seen.remaining - margin - ahead) * SCALE - bucket.level
    else:
        # What upstream should have left, if it sees what we have sent: a level below zero has been
        # given out, but not sent yet.
        expected = max(0, bucket.level + pending * SCALE)
        off = (seen.remaining - margin) * SCALE - expected
        if off < 0 and expected <= seen.remaining * SCALE:
            # Nothing is missing, only the margin: make room for it step by step.
            if now - bucket.corrected_at < CORRECT_EVERY_MS:
                return bucket
            floor = -pending * SCALE - bucket.limit * FULL_RATE * FLOOR_MS
            level = min(bucket.level, max(bucket.level + off, floor))
            return replace(bucket, level=level, corrected_at=now)
    if off < -tolerance * SCALE:
        return replace(bucket, level=bucket.level + off, corrected_at=now)
    if off > tolerance * SCALE and now - bucket.corrected_at >= CORRECT_EVERY_MS:
        raised = min(bucket.capacity * SCALE, bucket.level + off // 2)
        return replace(bucket, level=raised, corrected_at=now)
    return bucket


def _margin(dimension: Dimension, capacity: int) -> int:
    """Return what is left alone at the bottom of the bucket: a 429 costs more than a fiftieth of a burst."""
    least = 1 if dimension == "requests" else TOKEN_ROUNDING // 2
    return min(capacity // 2, max(least, capacity // 50))


def _least_capacity(dimension: Dimension, limit: int) -> int:
    """A second's worth, and room for one call."""
    return max(1 if dimension == "requests" else TOKEN_ROUNDING, limit // 60)


def block(group: Group, until: int, reason: str, now: int, *, ramp: bool = False) -> Group:
    """Stop everybody in the group until a time; afterwards start from empty buckets at a reduced rate.

    429s of calls that were in flight together are one event: only the first shrinks the rate.
    """
    group = advanced(group, now)
    if until <= group.blocked_until:
        return group
    if group.blocked_until <= now and not group.requests.learned:
        group = _shrunk(group)
    rate = group.rate_factor
    if group.blocked_until <= now:
        rate = max(MIN_RATE, rate * (RATE_AFTER_RAMP if ramp else RATE_AFTER_429) // FULL_RATE)
    return replace(
        group,
        blocked_until=until,
        blocked_reason=reason,
        rate_factor=rate,
        rate_at=until,
        epoch=group.epoch + 1,
        last_start=until,
        requests=replace(group.requests, level=0, at=max(until, group.requests.at)),
        input_tokens=_voided(group.input_tokens),
        output_tokens=_voided(group.output_tokens),
    )


def moved(group: Group, organization: str) -> Group:
    """Close a group begun under a key's name: the key's organisation is known now, and has a group of its own."""
    return replace(group, moved_to=organization, epoch=group.epoch + 1)


def overloaded(group: Group, now: int) -> Group:
    """Count a 529. From the fifth in a row on the group pauses, for 5 s to a minute, then probes with one call.

    Buckets and rate stay as they are: the overload is everybody's.
    """
    group = advanced(group, now)
    streak = group.overload_streak + 1
    group = replace(group, overload_streak=streak)
    until = now + _overload_pause(streak)
    if streak < OVERLOAD_STREAK or until <= group.blocked_until:
        return group
    return replace(
        group,
        blocked_until=until,
        blocked_reason="overloaded",
        epoch=group.epoch + 1,
        last_start=until,
        requests=_voided(group.requests),
        input_tokens=_voided(group.input_tokens),
        output_tokens=_voided(group.output_tokens),
    )


def answered(group: Group) -> Group:
    """Note a call that upstream served: the breaker closes."""
    if not group.overload_streak:
        return group
    closed = replace(group, overload_streak=0)
    if group.blocked_reason == "overloaded":
        closed = replace(closed, blocked_until=0, blocked_reason=None)
    return closed


def _overload_pause(streak: int) -> int:
    doublings = min(max(0, streak - OVERLOAD_STREAK), 10)
    return min(OVERLOAD_PAUSE_CAP_MS, OVERLOAD_PAUSE_MS << doublings)


def _voided(bucket: Bucket) -> Bucket:
    """Forget what was given out for later: the epoch that ends now takes those start times back."""
    return replace(bucket, level=max(0, bucket.level))
