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

from sluice.domain.breakers import Breaker, failed, probed, served
from sluice.domain.pricing import base_model
from sluice.domain.waits import USUAL, Waits

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

IDLE_MS: Final = 60_000
"""A group without a start for so long begins slowly again: sharp growth is a limit of its own (acceleration limits)."""

RAMP_MS: Final = 20_000
"""From the limit's own pace at a slow start to BURST_PACE."""

GROWTH: Final = 60
GROWTH_AFTER_429: Final = 600
SHRINK_TO: Final = 70
"""Percent of a guessed limit that remain after a 429."""

SAME_EVENT_MS: Final = 500
"""A block that ends so little later than the present one is the same, seen by another worker."""

CORRECT_EVERY_MS: Final = 1_000
"""A correction needs this long to show in the headers; a second one before that would count it twice."""

FLOOR_MS: Final = 1_000
"""Making room for the margin never holds the group back by more than this time."""

OUTPUT_MARGIN: Final = 4
"""The part of the output bucket that stays in it while jobs wait: what calls under way will produce is only a guess."""

OUTPUT_MARGIN_MS: Final = 2_500
"""The refill of so long is enough of a margin, however large the bucket."""

OVERDRAFT_MS: Final = 30_000
"""Output that nobody waits behind may take a bucket so far below zero.

Who comes later waits for so long at most, and no longer than behind the same jobs in a line.
"""

LEAST_CHARS: Final = 500
"""Shorter requests do not teach how many characters make a token."""

MOST_CHARS_PER_TOKEN: Final = 8
"""No text has more: what is too large even so can never be admitted, whatever the estimate says."""

MOST_SAMPLES: Final = 500
"""The means follow the last calls, about so many: fewer would follow the short answers, which always come first."""

FIRST_GUESS: Final = 8

DRAINED_MS: Final = 3_000
"""How long an empty queue counts as empty."""

LAST_JOBS_MS: Final = 15_000
"""The last jobs start together when the bucket refills what they will produce in this time.

If there were more, those that start first would take it below zero before all have started, and the rest would have to
wait until that is paid for.
"""

WAITING_MS: Final = 30_000
"""How long it is believed what a worker said of the jobs it has waiting."""

MOST_WORKERS: Final = 32
"""Workers whose word is kept, those who spoke last: the record of a group stays small."""

Dimension = Literal["requests", "input_tokens", "output_tokens"]
DIMENSIONS: Final[tuple[Dimension, ...]] = ("requests", "input_tokens", "output_tokens")

TOKENS_PER_DAY: Final = "tokens_per_day"
"""A limit that only some organisations have: input and output together (Anthropic, Rate Limits API)."""

MINUTES_OF_A_DAY: Final = 1440

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
    circuits: tuple[str, ...] = ()
    """The breakers it depends on: its model's and its endpoint's."""

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
    minutes: int = 1
    """What `limit` is for; levels are scaled by so much more, so that a millisecond of refill stays a whole number."""

    @property
    def scale(self) -> int:
        """The level's unit."""
        return SCALE * self.minutes

    def advanced(self, now: int, rate_factor: int) -> Bucket:
        """Return the bucket with its refill up to `now`."""
        if now <= self.at:
            return self
        refilled = self.level + self.limit * rate_factor * (now - self.at)
        return replace(self, level=min(self.capacity * self.scale, refilled), at=now)

    def ready_at(self, units: int, rate_factor: int) -> int:
        """Return when `units` are there. More than the capacity counts as the capacity: it must start some day."""
        missing = min(units, self.capacity) * self.scale - self.level
        if missing <= 0:
            return self.at
        return self.at + -(-missing // (self.limit * rate_factor))

    def less(self, units: int) -> Bucket:
        """Return the bucket with `units` taken out; negative units are a refund, which never overfills."""
        return replace(self, level=min(self.capacity * self.scale, self.level - units * self.scale))


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
    blocked_by: str | None = None
    """The key, and the request id of the refusal."""
    rate_factor: int = FULL_RATE
    rate_at: int = 0
    last_start: int = 0
    circuits: Mapping[str, Breaker] = field(default_factory=dict)
    """By name; what works is not in it."""
    under_way: int = 0
    """Output tokens reserved by calls that have probably not produced them yet: it fades as a call does."""
    under_way_at: int = 0
    warm_since: int = 0
    """When the group was first used after it had been idle."""
    drained_at: int = 0
    """When a worker last found the queue empty: nobody waits behind the jobs in hand."""
    waiting: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """How many jobs in hand each worker had waiting for a start here, and when it said so."""
    observed_at: int = 0
    chars_per_1000_tokens: int = 3_500
    """Learned: how many characters of request make 1,000 input tokens."""
    output_mean: int = 300_000
    """Learned: the moving mean of output tokens per call, in thousandths."""
    input_mean: int = 1_000_000
    """Learned: the moving mean of limited input tokens per call, in thousandths."""
    call_ms: int = 10_000
    """Learned: the moving mean of a call's duration."""
    samples: int = FIRST_GUESS
    """How many calls the means stand on; the first guess counts as a few."""
    met_limit: bool = False
    """A 429 has come while limits were guessed."""
    stated: Mapping[str, int] = field(default_factory=dict)
    """Limits the key pool states, per dimension: they cap what is learned."""
    day: Bucket | None = None
    """Input and output tokens per day, where the key pool or the Rate Limits API names such a limit."""
    recent_writes: tuple[str, ...] = ()
    """Tokens of the last writes, the newest last: so a writer whose reply was lost finds out what became of it."""
    moved_to: str | None = None
    """The organisation this group turned out to belong to, when it was begun under the name of a key."""

    @property
    def id(self) -> str:
        """`<organization>/<model group>`."""
        return group_id(self.organization, self.model_group)

    @property
    def has_answers(self) -> bool:
        """Return whether any call in this group was answered: until then its rate is a guess."""
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
        under_way_at=now,
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
    per_day = stated.get(TOKENS_PER_DAY)
    if per_day != group.stated.get(TOKENS_PER_DAY):
        group = replace(group, day=None if per_day is None else _day(per_day, now))
    return replace(group, stated=dict(stated))


@dataclass(frozen=True, slots=True)
class KnownLimits:
    """What the Rate Limits API says of the models that share one limit group."""

    models: tuple[str, ...]
    limits: tuple[tuple[str, int], ...]
    """Per dimension and minute, and TOKENS_PER_DAY; each dimension once."""


def loaded(group: Group, limits: Iterable[tuple[str, int]], now: int) -> Group:
    """Take over limits from the Rate Limits API where nothing better is known: headers speak of this minute.

    Returns the same group when it changes nothing.
    """
    known = dict(limits)
    changed = group
    for dimension in DIMENSIONS:
        bucket = group.bucket(dimension)
        if bucket.learned or dimension not in known:
            continue
        limit = min(known[dimension], group.stated.get(dimension, known[dimension]))
        if bucket.limit == limit:
            continue
        # How much it can save up is not known: a second's worth, until an answer shows more.
        capacity = _least_capacity(dimension, limit)
        bucket = replace(bucket.advanced(now, group.rate_factor), limit=limit, capacity=capacity)
        level = min(capacity * SCALE, max(0, bucket.level))
        changed = replace(changed, **{dimension: replace(bucket, level=level)})  # type: ignore[arg-type]
    per_day = min(
        (each[TOKENS_PER_DAY] for each in (known, group.stated) if TOKENS_PER_DAY in each),
        default=None,
    )
    if per_day != (group.day and group.day.limit):
        changed = replace(changed, day=None if per_day is None else _day(per_day, now))
    return group if changed is group else replace(changed, version=group.version + 1)


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


def _day(limit: int, now: int) -> Bucket:
    """Return a day's bucket: it begins full, and refills continuously like the others."""
    bucket = Bucket(limit, capacity=limit, level=0, at=now, learned=True, minutes=MINUTES_OF_A_DAY)
    return bucket.less(-limit)


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
    return replace(
        group,
        requests=group.requests.advanced(now, group.rate_factor),
        input_tokens=group.input_tokens.advanced(now, group.rate_factor),
        output_tokens=group.output_tokens.advanced(now, group.rate_factor),
        day=group.day and group.day.advanced(now, FULL_RATE),
        rate_factor=min(FULL_RATE, group.rate_factor + rate_gain),
        # Whole gains only, so that frequent calls do not round the recovery away.
        rate_at=now if rate_gain or group.rate_factor == FULL_RATE else group.rate_at,
        under_way=_not_produced(group, now),
        under_way_at=max(now, group.under_way_at),
    )


def next_start(group: Group, cost: Cost, now: int) -> int:
    """Return when a call of this cost could start if it were reserved now (without reserving it)."""
    return start_on(advanced(group, now), cost, now)


def usual_gap(group: Group) -> int:
    """Return the milliseconds between two starts of ordinary calls at the full rate of the group."""
    return max(
        1,
        60_000 // group.requests.limit,
        60 * group.input_mean // group.input_tokens.limit,
        _output_gap(group),
    )


def is_bound_by_output(group: Group) -> bool:
    """Return whether ordinary calls wait for output tokens, and not for requests or input."""
    return _output_gap(group) >= usual_gap(group)


def _output_gap(group: Group) -> int:
    return 60 * group.output_mean // group.output_tokens.limit


def start_on(group: Group, cost: Cost, now: int) -> int:
    """Return `next_start` for a group that is advanced to `now` already."""
    requests, output = group.requests, group.output_tokens
    is_end = _is_drained(group, now)
    kept = 0
    if is_end:
        # The margin is for those who would wait for the end of a 429: nobody does.
        kept = _margin("requests", requests.capacity) if requests.learned else 0
        # Upstream asks for a level above zero, and nothing else; during a block the calls under way go on producing.
        left = _not_produced(group, max(now, group.blocked_until))
        there = output.ready_at(1 - left, group.rate_factor)
        debt = output.limit * OVERDRAFT_MS // 60_000
        output_at = max(there, output.ready_at(cost.output_tokens - debt, group.rate_factor))
    else:
        # While calls under way produce what is reserved for them, the bucket refills: so much need not be there now.
        credit = min(group.under_way, output.limit * group.call_ms // 60_000)
        few_seconds = output.limit * OUTPUT_MARGIN_MS // 60_000
        margin = min(output.capacity // OUTPUT_MARGIN, few_seconds)
        output_at = output.ready_at(cost.output_tokens + margin - credit, group.rate_factor)
    return max(
        now,
        group.blocked_until,
        group.last_start + _gap(group, cost, now, is_end=is_end),
        requests.ready_at(cost.requests - kept, group.rate_factor),
        group.input_tokens.ready_at(cost.input_tokens, group.rate_factor),
        output_at,
        group.day.ready_at(cost.input_tokens + cost.output_tokens, FULL_RATE) if group.day else now,
        *(group.circuits[name].open_until for name in cost.circuits if name in group.circuits),
    )


def _not_produced(group: Group, at: int) -> int:
    """Return what calls under way will have yet to produce by then."""
    passed = max(0, at - group.under_way_at)
    return group.under_way * group.call_ms // (group.call_ms + passed)


def _gap(group: Group, cost: Cost, now: int, *, is_end: bool) -> int:
    """Return the least time between the last start and one of this cost, at the pace of now."""
    warm = min(RAMP_MS, max(0, now - group.warm_since))
    pace = FULL_RATE * (RAMP_MS + (BURST_PACE - 1) * warm) // RAMP_MS
    minute = 60_000 * FULL_RATE * 1000
    dimensions = ("requests", "input_tokens") if is_end else DIMENSIONS
    return max(
        1,
        *(
            cost.of(name) * minute // (group.bucket(name).limit * group.rate_factor * pace)
            for name in dimensions
        ),
    )


def _is_drained(group: Group, now: int) -> bool:
    """Return whether the jobs that wait are the last, and few enough to start together."""
    if now - group.drained_at >= DRAINED_MS:
        return False
    jobs = sum(jobs for jobs, at in group.waiting.values() if now - at < WAITING_MS)
    return jobs * group.output_estimate * 60_000 <= group.output_tokens.limit * LAST_JOBS_MS


def reserve(
    group: Group,
    costs: Sequence[Cost],
    now: int,
    horizon_ms: int | Sequence[int],
    waits: Waits = USUAL,
) -> tuple[Group, list[int]]:
    """Reserve for the first of `costs` that can start within the horizon; return the group and their start times.

    Start times are in order. `horizon_ms` is one for all, or one for each.
    """
    group = advanced(group, now)
    if costs and now - group.last_start > IDLE_MS:
        group = replace(group, warm_since=now)
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
            day=group.day and group.day.less(cost.input_tokens + cost.output_tokens),
            last_start=start,
            under_way=group.under_way + cost.output_tokens,
        )
        starts.append(start)
        for name in cost.circuits:
            if name in group.circuits:
                breaker = probed(group.circuits[name], start, waits)
                group = replace(group, circuits={**group.circuits, name: breaker})
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

    A reservation of an older epoch moves no level of requests: the block that ended its epoch has reset that already.
    """
    group = advanced(group, now)
    for each in settlements:
        used, reserved = each.used, each.reserved
        if each.epoch == group.epoch:
            group = replace(group, requests=group.requests.less(used.requests - reserved.requests))
        group = replace(
            group,
            input_tokens=group.input_tokens.less(used.input_tokens - reserved.input_tokens),
            day=group.day
            and group.day.less(
                used.input_tokens
                + used.output_tokens
                - reserved.input_tokens
                - reserved.output_tokens
            ),
        )
        if used == UNUSED or not group.output_tokens.learned:
            # Where headers tell what is left, they have counted this output while it was produced.
            group = replace(
                group,
                output_tokens=group.output_tokens.less(used.output_tokens - reserved.output_tokens),
            )
        if used == UNUSED:
            # Its start time is free again; which of several it was does not matter to a pace.
            group = replace(
                group,
                under_way=max(0, group.under_way - reserved.output_tokens),
                last_start=min(group.last_start, max(now, group.blocked_until)),
            )
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
    input_mean = group.input_mean + (used.input_tokens * 1000 - group.input_mean) // samples
    call_ms = group.call_ms
    if settlement.call_ms:
        call_ms += (settlement.call_ms - call_ms) // samples
    return replace(
        group,
        chars_per_1000_tokens=ratio,
        output_mean=mean,
        input_mean=input_mean,
        call_ms=call_ms,
        samples=samples,
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """`limit` and `remaining` of one dimension, as one response's headers told them."""

    limit: int
    remaining: int
    full_in_ms: int | None = None
    """Until the bucket is full again: tells how far it is below zero, which `remaining` does not."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The limit headers of one response, and what this worker had given out but not started at that moment."""

    at: int
    seen: Mapping[Dimension, Seen]
    pending: Cost = Cost(requests=0)


def known(group: Group, dimension: Dimension, seen: Seen) -> bool:
    """Return whether a limit that headers name is the one that is kept to already."""
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
        there = seen.remaining
        if there == 0 and seen.full_in_ms is not None:
            full_in_ms = seen.full_in_ms
            there = min(0, bucket.capacity - bucket.limit * full_in_ms // 60_000)
        level = min(bucket.capacity, there - group.under_way) * SCALE
        return replace(bucket, level=level, corrected_at=now)
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
    """Return what is left alone at the bottom of the bucket: a 429 costs more than a fiftieth of a burst.

    None of the output here: while others wait a start asks for OUTPUT_MARGIN.
    """
    if dimension == "output_tokens":
        return 0
    return min(
        capacity // 2, max(1 if dimension == "requests" else TOKEN_ROUNDING // 2, capacity // 50)
    )


def _least_capacity(dimension: Dimension, limit: int) -> int:
    """A second's worth, and room for one call."""
    return max(1 if dimension == "requests" else TOKEN_ROUNDING, limit // 60)


def block(  # noqa: PLR0913 - the facts of one 429
    group: Group,
    until: int,
    reason: str,
    now: int,
    *,
    by: str | None = None,
    ramp: bool = False,
    overdrawn: bool = False,
) -> Group:
    """Stop everybody in the group until a time; afterwards start without saved-up requests, at a reduced rate.

    429s of calls that were in flight together are one event: only the first shrinks the rate. `overdrawn`: only the
    output of calls under way stands in the way, which is our own and known; the rate stays.
    """
    group = advanced(group, now)
    # Waits are whole seconds, so workers that see one event name times a little apart.
    if group.blocked_until > now and until <= group.blocked_until + SAME_EVENT_MS:
        return group
    if group.blocked_until <= now and not group.requests.learned:
        group = _shrunk(group)
    rate, requests = (
        group.rate_factor,
        replace(group.requests, level=0, at=max(until, group.requests.at)),
    )
    if overdrawn:
        requests = _voided(group.requests)
    elif group.blocked_until <= now:
        rate = max(MIN_RATE, rate * (RATE_AFTER_RAMP if ramp else RATE_AFTER_429) // FULL_RATE)
    return replace(
        group,
        blocked_until=until,
        blocked_reason=reason,
        blocked_by=by,
        rate_factor=rate,
        rate_at=until,
        epoch=group.epoch + 1,
        last_start=until,
        warm_since=until if ramp else group.warm_since,
        requests=requests,
    )


def drained(group: Group, at: int) -> Group:
    """Note that the queue was found empty at a time."""
    return group if at <= group.drained_at else replace(group, drained_at=at)


def lined_up(group: Group, worker: str, jobs: int, now: int) -> Group:
    """Note how many jobs a worker has waiting; what is too old to be believed goes."""
    others = {
        name: (count, at)
        for name, (count, at) in group.waiting.items()
        if name != worker and now - at < WAITING_MS
    }
    waiting = {**others, worker: (jobs, now)} if jobs else others
    while len(waiting) > MOST_WORKERS:
        del waiting[min(waiting, key=lambda name: waiting[name][1])]
    return replace(group, waiting=waiting)


def recalled(group: Group, now: int) -> Group:
    """Void all start times: whoever waits for one has to ask again."""
    return replace(group, epoch=group.epoch + 1, last_start=min(group.last_start, now))


def moved(group: Group, organization: str) -> Group:
    """Close a group begun under a key's name: the key's organisation is known now, and has a group of its own."""
    return replace(group, moved_to=organization, epoch=group.epoch + 1)


def circuit_failed(
    group: Group, now: int, name: str, *, was_probe: bool = False, waits: Waits = USUAL
) -> Group:
    """Count a failure of a model or an endpoint.

    Calls that were on their way when its breaker opened are the same event: only probes say more.
    """
    breaker = group.circuits.get(name, Breaker())
    if breaker.is_open and not was_probe:
        return group
    return replace(group, circuits={**group.circuits, name: failed(breaker, now, waits)})


def circuit_served(group: Group, now: int, name: str) -> Group:  # noqa: ARG001 - a change like any other
    """Note that a model or an endpoint has served a call."""
    if name not in group.circuits:
        return group
    breaker = served(group.circuits[name])
    others = {key: value for key, value in group.circuits.items() if key != name}
    return replace(group, circuits=others if breaker is None else {**others, name: breaker})


def _voided(bucket: Bucket) -> Bucket:
    """Forget what was given out for later: the epoch that ends now takes those start times back."""
    return replace(bucket, level=max(0, bucket.level))
