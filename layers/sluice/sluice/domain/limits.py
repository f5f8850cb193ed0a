"""The rate-limit arithmetic: the same as Claude's, in exact integers, with time as an argument.

A *limit group* is an organization and the models that share one set of limits there. It has a bucket for requests, one
for input tokens (cache reads are free) and one for output tokens (as produced, never `max_tokens`). A bucket refills
continuously with `limit / 60` units a second up to its capacity (Anthropic, rate limits).

Workers make reservations for several jobs at once. A level may go below zero, which means that capacity was assigned
before it was refilled; each job gets the start time at which its share will be there. After the call its reservation is
settled to the actual usage. The headers of every response correct the levels: this is how limits are learned, and how
other users of the same organization are noticed.

Levels are kept in units x 60,000,000, so that a millisecond of refill at a rate factor of 1/1000 is a whole number.
Times are epoch milliseconds. Clocks of different workers may differ by seconds: a bucket's time never runs backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from sluice.domain.breakers import Breaker, failed, probed, served
from sluice.domain.models import is_unknown
from sluice.domain.turns import Owner, Portions, portions_after
from sluice.domain.waits import USUAL, Waits
from sluice.domain.workspaces import (
    EQUAL_RATE,
    SAME_EVENT_MS,
    Workspace,
    WorkspaceRefusal,
    answered,
    organization_until,
    refused,
    started,
)

SCALE: Final = 60_000_000
FULL_RATE: Final = 1000
"""The rate factor in thousandths: 1000 is the whole limit."""

MIN_RATE: Final = 100
RATE_AFTER_429: Final = 900
"""Thousandths of the rate factor that remain after a 429 (multiplicative decrease)."""

RATE_AFTER_RAMP: Final = 500

assert MIN_RATE <= RATE_AFTER_RAMP <= RATE_AFTER_429 < FULL_RATE, "a 429 lowers the rate"

RECOVERY_PER_SECOND: Final = 20
"""Thousandths that the rate factor gains each second (additive recovery)."""

BURST_PACE: Final = 5
"""Saved-up capacity is used at most this many times faster than the limit."""

LEAST_PACE: Final = FULL_RATE
PACE_KEPT_MS: Final = 1_800_000
"""60 RPM may be enforced as 1 per second (Anthropic, rate limits), which no header shows. After a 429 whose headers had
enough left, saved-up capacity is used half as fast, at the least at the pace of the limit, and twice as fast again
after this time."""

IDLE_MS: Final = 60_000
"""A group without a start for this long makes a slow start, because Anthropic limits sharp growth as well."""

RAMP_MS: Final = 20_000
"""Duration of a slow start: from the pace of the limit to BURST_PACE."""

GROWTH: Final = 60
GROWTH_AFTER_429: Final = 600

assert GROWTH < GROWTH_AFTER_429, "after a 429 guessed limits grow more slowly"

SHRINK_TO: Final = 70
"""Percent of a guessed limit that remains after a 429."""

CORRECT_EVERY_MS: Final = 1_000
"""Time until a correction shows in the headers; a second correction before that would count it twice."""

FLOOR_MS: Final = 1_000
"""Restoring the margin delays the group by at most this time."""

OUTPUT_MARGIN: Final = 4
"""Part of the output bucket kept as a margin while jobs wait: the output of calls in flight is only an estimate."""

OUTPUT_MARGIN_MS: Final = 2_500
"""The margin is at most the refill of this time, however large the bucket."""

OVERDRAFT_MS: Final = 30_000
"""The last jobs of a queue may take the output bucket below zero by the refill of this time.

A job that arrives later waits at most this long, and no longer than if the same jobs were ahead of it in a queue.
"""

LEAST_CHARS: Final = 500
"""Shorter requests do not change the learned ratio of characters to tokens."""

MOST_CHARS_PER_TOKEN: Final = 8
"""No text has more. A request that exceeds the limit even at this ratio can never be admitted."""

MOST_SAMPLES: Final = 500
"""The means cover about this many last calls; with fewer they would follow short answers, which arrive first."""

FIRST_GUESS: Final = 8

DRAINED_MS: Final = 3_000
"""For this long after a worker found the queue empty it counts as empty."""

LAST_JOBS_MS: Final = 15_000
"""The last jobs start together if the bucket refills their output within this time.

If there were more, the first ones would take the bucket below zero before all have started, and the others would have
to wait for the refill.
"""

WAITING_MS: Final = 30_000
"""How long a worker's report of its waiting jobs is valid."""

assert DRAINED_MS < LAST_JOBS_MS < WAITING_MS, (
    "reports outlive the decision that the waiting jobs are the last"
)

MOST_WORKERS: Final = 32
"""Workers whose reports are kept, the latest ones, so that the record of a group stays small."""

MOST_CIRCUITS: Final = 50
"""Circuit breakers of a group, the last ones to open, so that invented model names do not make its record grow."""

KEPT_MS: Final = 35 * 86_400_000
UNKNOWN_KEPT_MS: Final = 86_400_000
"""How long the record of a group is kept after its last use, and the same for a tenant's unknown models."""

Dimension = Literal["requests", "input_tokens", "output_tokens"]
DIMENSIONS: Final[tuple[Dimension, ...]] = ("requests", "input_tokens", "output_tokens")

TOKENS_PER_DAY: Final = "tokens_per_day"
"""A limit that only some organizations have: input and output together (Anthropic, Rate Limits API)."""

MINUTES_OF_A_DAY: Final = 1440

SAFE_START: Final[Mapping[Dimension, int]] = {
    "requests": 60,
    "input_tokens": 30_000,
    "output_tokens": 8_000,
}
"""Units per minute until the first response names the limits: the first call starts at once, then one a second."""

TOKEN_ROUNDING: Final = 1_000
"""Upstream rounds remaining tokens to the nearest thousand (Anthropic, response headers)."""


@dataclass(frozen=True, slots=True)
class Ties:
    """What a call depends on besides the buckets: others in its limit group do not."""

    circuits: tuple[str, ...] = ()
    """The names of its circuit breakers: those of its model, its endpoint, and its tenant's refusals."""
    workspace: str = ""
    model: str = ""
    tenant: str = ""


NO_TIES: Final = Ties()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call takes from the three buckets: estimated before the call, actual afterwards."""

    requests: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    ties: Ties = NO_TIES

    def of(self, dimension: Dimension) -> int:
        """Return the units of one dimension."""
        return int(getattr(self, dimension))


@dataclass(frozen=True, slots=True)
class Bucket:
    """One dimension of a limit group."""

    limit: int
    """Units per minute."""
    capacity: int
    """The maximum it can save up: the highest `remaining` seen, as no header names it."""
    level: int
    """Scaled by SCALE; below zero means assigned before it was refilled."""
    at: int
    """The time at which `level` applies."""
    learned: bool = False
    corrected_at: int = 0
    minutes: int = 1
    """The period of `limit`; levels are scaled by it too, so that a millisecond of refill stays a whole number."""

    @property
    def scale(self) -> int:
        """The unit of the level."""
        return SCALE * self.minutes

    def advanced(self, now: int, rate_factor: int) -> Bucket:
        """Return the bucket with its refill up to `now`."""
        if now <= self.at:
            return self
        refilled = self.level + self.limit * rate_factor * (now - self.at)
        return replace(self, level=min(self.capacity * self.scale, refilled), at=now)

    def ready_at(self, units: int, rate_factor: int) -> int:
        """Return when `units` are available, but at most the capacity, so that every call can start."""
        missing = min(units, self.capacity) * self.scale - self.level
        if missing <= 0:
            return self.at
        return self.at + -(-missing // (self.limit * rate_factor))

    def less(self, units: int) -> Bucket:
        """Return the bucket with `units` taken out; negative units are a refund, which never overfills."""
        return replace(self, level=min(self.capacity * self.scale, self.level - units * self.scale))


def starting_bucket(dimension: Dimension, now: int) -> Bucket:
    """Return the bucket of a group with unknown limits: small and safe, with capacity for the first call."""
    limit = SAFE_START[dimension]
    capacity = max(1, limit // 60)
    return Bucket(limit=limit, capacity=capacity, level=capacity * SCALE, at=now)


@dataclass(frozen=True, slots=True)
class Group:
    """The shared state of one limit group. Stored as one item under an optimistic lock on `version`."""

    organization: str
    model_group: str
    requests: Bucket
    input_tokens: Bucket
    output_tokens: Bucket
    version: int = 0
    """0: not stored yet."""
    epoch: int = 0
    """Increases when earlier start times become invalid."""
    blocked_until: int = 0
    blocked_reason: str | None = None
    blocked_by: str | None = None
    """The key and the request id of the response that caused the block."""
    rate_factor: int = FULL_RATE
    rate_at: int = 0
    last_start: int = 0
    circuits: Mapping[str, Breaker] = field(default_factory=dict)
    """By name; a circuit without failures is not in it."""
    workspaces: Mapping[str, Workspace] = field(default_factory=dict)
    """By name; those that were refused recently."""
    under_way: int = 0
    """In-flight output: tokens reserved by calls that have probably not produced them yet; decreases over a call."""
    under_way_at: int = 0
    warm_since: int = 0
    """When the group was first used after it had been idle."""
    drained_at: int = 0
    """When a worker last found the queue empty: no job waits behind those that workers hold."""
    waiting: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By worker: how many of the jobs it holds wait for a start time here, and when it reported that."""
    observed_at: int = 0
    chars_per_1000_tokens: int = 3_500
    """Learned: characters of a request per 1,000 input tokens."""
    output_mean: int = 300_000
    """Learned: the moving mean of output tokens per call, in thousandths."""
    input_mean: int = 1_000_000
    """Learned: the moving mean of limited input tokens per call, in thousandths."""
    call_ms: int = 10_000
    """Learned: the moving mean of a call's duration."""
    samples: int = FIRST_GUESS
    """How many calls the means are based on; the first guess counts as a few."""
    met_limit: bool = False
    """A 429 arrived while the limits were guessed."""
    stated: Mapping[str, int] = field(default_factory=dict)
    """Limits stated in the key pool, per dimension: upper bounds for the learned ones."""
    day: Bucket | None = None
    """Input and output tokens per day, if the key pool or the Rate Limits API has such a limit."""
    burst_pace: int = BURST_PACE * FULL_RATE
    """Learned: how fast saved-up capacity may be used, in thousandths of the limit's pace, as of `burst_pace_at`."""
    burst_pace_at: int = 0
    portions: Portions = ()
    """What each owner has recently taken, in milliseconds of refill, as of `portions_at`."""
    portions_at: int = 0
    recent_writes: tuple[str, ...] = ()
    """Tokens of the last writes, newest last: a writer whose response was lost finds out whether it was written."""
    moved_to: str | None = None
    """The organization to which the group belongs, if it was started under the name of a key."""

    @property
    def id(self) -> str:
        """`<organization>/<model group>`."""
        return group_id(self.organization, self.model_group)

    @property
    def has_answers(self) -> bool:
        """Return whether a call in this group was answered; until then its limits are guesses."""
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
        """Return what a call will probably use; `max_tokens` is only an upper bound of the learned mean."""
        return Cost(
            requests=1,
            input_tokens=-(-input_chars * 1000 // self.chars_per_1000_tokens),
            output_tokens=min(max_tokens, self.output_estimate),
        )


def new_group(
    organization: str, model_group: str, now: int, stated: Mapping[str, int] | None = None
) -> Group:
    """Return the state of an unused group."""
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
    """Apply the limits that the key pool states now; they are used until headers name lower ones.

    If a stated limit was raised or removed, the next response names the one that applies.
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
    """The limits of the models of one limit group, from the Rate Limits API."""

    models: tuple[str, ...]
    limits: tuple[tuple[str, int], ...]
    """Per dimension and minute, and TOKENS_PER_DAY; each dimension once."""


def loaded(group: Group, limits: Iterable[tuple[str, int]], now: int) -> Group:
    """Apply limits from the Rate Limits API where none was learned; headers are more recent and take precedence.

    Returns the same group if nothing changes.
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
        # The capacity is unknown: the refill of a second, until a response shows more.
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


def grown(group: Group, now: int, workspace: str = "") -> Group:
    """Raise guessed limits after a call to an upstream that sends no limit headers.

    By a sixtieth per call until the first 429, so that a minute at the limit doubles it; afterwards by a tenth of that.
    Answers of a workspace that is slower than its organization say nothing about the organization's limits.
    """
    if workspace in group.workspaces and group.workspaces[workspace].rate(now) < EQUAL_RATE:
        return group
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
    """Return a full bucket of a day; it refills continuously like the others."""
    bucket = Bucket(limit, capacity=limit, level=0, at=now, learned=True, minutes=MINUTES_OF_A_DAY)
    return bucket.less(-limit)


def _shrunk(group: Group) -> Group:
    """Lower guessed limits after a 429 of an upstream that sends no limit headers."""
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


def expires_at(group: Group) -> int:
    """Return when the record of an unused group may be deleted (epoch seconds); its limits are then learned again."""
    blocks = [group.blocked_until, *(each.blocked_until for each in group.workspaces.values())]
    used = max(group.requests.at, group.last_start, *blocks)
    return (used + (UNKNOWN_KEPT_MS if is_unknown(group.model_group) else KEPT_MS)) // 1000


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
        # Only whole gains, so that frequent calls do not lose the recovery to rounding.
        rate_at=now if rate_gain or group.rate_factor == FULL_RATE else group.rate_at,
        under_way=_not_produced(group, now),
        under_way_at=max(now, group.under_way_at),
    )


def next_start(group: Group, cost: Cost, now: int) -> int:
    """Return when a call of this cost could start if it were reserved now, without reserving it."""
    return start_on(advanced(group, now), cost, now)


def breakers_of(group: Group, ties: Ties) -> Mapping[str, Breaker]:
    """Return the open circuit breakers that concern a call."""
    if not group.circuits:
        return {}
    found = ((name, group.circuits.get(name)) for name in ties.circuits)
    return {
        name: breaker
        for name, breaker in found
        if breaker is not None and breaker.is_open and breaker.concerns(ties.model, ties.tenant)
    }


def free_at(group: Group, cost: Cost, now: int) -> int:
    """Return when the call may start by what it alone depends on: its circuit breakers and its workspace."""
    times = [breaker.open_until for breaker in breakers_of(group, cost.ties).values()]
    workspace = group.workspaces.get(cost.ties.workspace)
    if workspace is not None:
        times.append(workspace.next_start(_least_gap(group, cost), now))
    return max(times, default=0)


def is_held_back(group: Group, cost: Cost, now: int) -> bool:
    """Return whether the call waits for its own circuit breaker or workspace, and others need not."""
    workspace = group.workspaces.get(cost.ties.workspace)
    if workspace is not None and not workspace.is_slow(now):
        cost = replace(cost, ties=replace(cost.ties, workspace=""))
    return free_at(group, cost, now) > now


def blocked(group: Group, ties: Ties) -> tuple[int, str | None]:
    """Return until when a call is blocked, and why: by its organization's limits or its workspace's."""
    workspace = group.workspaces.get(ties.workspace)
    if workspace is not None and workspace.blocked_until > group.blocked_until:
        return workspace.blocked_until, workspace.blocked_reason
    return group.blocked_until, group.blocked_reason


def _least_gap(group: Group, cost: Cost) -> int:
    """Return the milliseconds in which the buckets refill what a call takes, at the group's present rate."""
    minute = 60_000 * FULL_RATE
    return max(
        cost.of(name) * minute // (group.bucket(name).limit * group.rate_factor)
        for name in DIMENSIONS
    )


def usual_gap(group: Group) -> int:
    """Return the milliseconds between two starts of average calls at the full rate of the group."""
    return max(
        1,
        60_000 // group.requests.limit,
        60 * group.input_mean // group.input_tokens.limit,
        _output_gap(group),
    )


def is_bound_by_output(group: Group) -> bool:
    """Return whether output tokens, not requests or input tokens, limit the rate of average calls."""
    return _output_gap(group) >= usual_gap(group)


def _output_gap(group: Group) -> int:
    return 60 * group.output_mean // group.output_tokens.limit


def start_on(group: Group, cost: Cost, now: int) -> int:
    """Return `next_start` for a group that is already advanced to `now`."""
    return max(shared_start(group, cost, now), free_at(group, cost, now))


def shared_start(group: Group, cost: Cost, now: int) -> int:
    """Return when the buckets and the pace of the group admit a call, whatever else it waits for."""
    requests, output = group.requests, group.output_tokens
    is_end = _is_drained(group, now)
    kept = 0
    if is_end:
        # The margin protects waiting jobs from the wait after a 429: there are none.
        kept = _margin("requests", requests.capacity) if requests.learned else 0
        # Upstream only requires a level above zero. During a block, calls in flight continue to produce output.
        left = _not_produced(group, max(now, group.blocked_until))
        there = output.ready_at(1 - left, group.rate_factor)
        debt = output.limit * OVERDRAFT_MS // 60_000
        output_at = max(there, output.ready_at(cost.output_tokens - debt, group.rate_factor))
    else:
        # The bucket refills while calls in flight produce their reserved output: that much is not needed now.
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
    )


def _not_produced(group: Group, at: int) -> int:
    """Return the output that calls in flight will not have produced by then."""
    passed = max(0, at - group.under_way_at)
    return group.under_way * group.call_ms // (group.call_ms + passed)


def _gap(group: Group, cost: Cost, now: int, *, is_end: bool) -> int:
    """Return the minimum time between the last start and one of this cost, at the current pace."""
    warm = min(RAMP_MS, max(0, now - group.warm_since))
    pace = FULL_RATE * (RAMP_MS + (BURST_PACE - 1) * warm) // RAMP_MS
    pace = min(pace, _burst_pace(group, now))
    minute = 60_000 * FULL_RATE * 1000
    dimensions = ("requests", "input_tokens") if is_end else DIMENSIONS
    return max(
        1,
        *(
            cost.of(name) * minute // (group.bucket(name).limit * group.rate_factor * pace)
            for name in dimensions
        ),
    )


def _burst_pace(group: Group, now: int) -> int:
    """Return how fast saved-up capacity may be used now, in thousandths of the limit's pace."""
    doublings = max(0, now - group.burst_pace_at) // PACE_KEPT_MS
    return min(BURST_PACE * FULL_RATE, group.burst_pace << min(doublings, BURST_PACE))


def _is_drained(group: Group, now: int) -> bool:
    """Return whether the queue is empty and the waiting jobs are few enough to start together."""
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

    `horizon_ms` is one value for all, or one for each. Start times are in ascending order, except those of calls that
    wait for their own circuit breaker or workspace: these start later, and the calls behind them do not.
    """
    group = advanced(group, now)
    if costs and now - group.last_start > IDLE_MS:
        group = replace(group, warm_since=now)
    starts: list[int] = []
    horizons = [horizon_ms] * len(costs) if isinstance(horizon_ms, int) else horizon_ms
    for cost, horizon in zip(costs, horizons, strict=True):
        shared = shared_start(group, cost, now)
        start = max(shared, free_at(group, cost, now))
        if start > now + horizon:
            break
        group = replace(
            group,
            requests=group.requests.less(cost.requests),
            input_tokens=group.input_tokens.less(cost.input_tokens),
            output_tokens=group.output_tokens.less(cost.output_tokens),
            day=group.day and group.day.less(cost.input_tokens + cost.output_tokens),
            last_start=shared,
            under_way=group.under_way + cost.output_tokens,
            circuits={
                **group.circuits,
                **{
                    name: probed(breaker, start, waits)
                    for name, breaker in breakers_of(group, cost.ties).items()
                },
            },
            workspaces=started(group.workspaces, cost.ties.workspace, start),
        )
        starts.append(start)
    return group, starts


def expected_start(groups: Iterable[Group], model_group: str, backlog: int, now: int) -> int:
    """Return a rough estimate of when a job behind `backlog` others starts, from blocks and requests per minute."""
    serving = [
        group for group in groups if group.model_group == model_group and group.moved_to is None
    ]
    per_minute = sum(group.requests.limit for group in serving) or SAFE_START["requests"]
    free_at = min((group.blocked_until for group in serving), default=now)
    return max(now, free_at) + backlog * 60_000 // per_minute


@dataclass(frozen=True, slots=True)
class Settlement:
    """The actual usage of one reservation. Every reservation is settled exactly once."""

    epoch: int
    reserved: Cost
    used: Cost
    """All zero if the call was not sent."""
    input_chars: int = 0
    """Characters of an answered request without cached input, to learn their ratio to tokens; 0: nothing to learn."""
    call_ms: int = 0
    """Duration of an answered call, to learn the means; 0: not answered."""


UNUSED: Final = Cost(requests=0)


def settle(group: Group, settlements: Iterable[Settlement], now: int) -> Group:
    """Replace reservations with the actual usage.

    A reservation of an older epoch does not change the level of requests: the block that ended the epoch has reset it.
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
            # If headers report `remaining`, they counted this output while it was produced.
            group = replace(
                group,
                output_tokens=group.output_tokens.less(used.output_tokens - reserved.output_tokens),
            )
        if used == UNUSED:
            group = replace(group, under_way=max(0, group.under_way - reserved.output_tokens))
            group = replace(group, last_start=_without(group, each, now))
        if each.call_ms or each.input_chars:
            group = _taught(group, each)
    return group


def _without(group: Group, unused: Settlement, now: int) -> int:
    """Return the last start without an unused one.

    The next call may start at once: the buckets keep it apart from the others that have their times. If upstream holds
    bursts to a pace, nothing else does: then the last start moves back by one gap, or not at all after a block, which
    has voided the time.
    """
    first = min(group.last_start, max(now, group.blocked_until))
    if _burst_pace(group, now) == BURST_PACE * FULL_RATE:
        return first
    gap = _least_gap(group, unused.reserved) if unused.epoch == group.epoch else 0
    return max(first, group.last_start - gap)


def _taught(group: Group, settlement: Settlement) -> Group:
    """Update the learned means with this call: a true mean at first, then a moving one."""
    used = settlement.used
    ratio = group.chars_per_1000_tokens
    if used.input_tokens and settlement.input_chars >= LEAST_CHARS:
        # Bounds limit the effect of one unusual request; short requests consist mostly of fixed overhead.
        seen = min(8_000, max(1_000, settlement.input_chars * 1000 // used.input_tokens))
        ratio += (seen - ratio) // 16
    samples = min(group.samples + 1, MOST_SAMPLES)
    # In thousandths, so that small steps are not lost to rounding.
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
    """`limit` and `remaining` of one dimension, from the headers of one response."""

    limit: int
    remaining: int
    full_in_ms: int | None = None
    """Time until the bucket is full; shows how far it is below zero, unlike `remaining`."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The limit headers of one response, and what this worker had reserved but not started at that time."""

    at: int
    seen: Mapping[Dimension, Seen]
    pending: Cost = Cost(requests=0)


def known(group: Group, dimension: Dimension, seen: Seen) -> bool:
    """Return whether the limit in a response's headers is the one in use."""
    bucket = group.bucket(dimension)
    return bucket.learned and bucket.limit == min(
        seen.limit, group.stated.get(dimension, seen.limit)
    )


def observe(group: Group, observation: Observation, now: int) -> Group:
    """Correct the levels by the headers of a response. Responses out of order are dropped: only newer ones count.

    A new or changed limit applies at once and starts a new epoch, because all start times were computed for another
    rate. Otherwise a level is lowered at once if upstream has less left than expected (another client uses the
    organization), and raised by half the difference if it has more.
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
            # With a stated limit below the real one, `remaining` says nothing about saved-up capacity.
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
        # Calls in flight will produce output that upstream has not counted yet; meanwhile the bucket refills.
        there = seen.remaining
        if there == 0 and seen.full_in_ms is not None:
            full_in_ms = seen.full_in_ms
            there = min(0, bucket.capacity - bucket.limit * full_in_ms // 60_000)
        level = min(bucket.capacity, there - group.under_way) * SCALE
        return replace(bucket, level=level, corrected_at=now)
    # What upstream should have left: a level below zero was reserved by calls that were not sent yet.
    expected = max(0, bucket.level + pending * SCALE)
    off = (seen.remaining - margin) * SCALE - expected
    if off < 0 and expected <= seen.remaining * SCALE:
        # Only the margin is missing: restore it step by step.
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
    """Return the part of the bucket that is never used: a 429 costs more than a fiftieth of a burst.

    Zero for output, whose margin is OUTPUT_MARGIN.
    """
    if dimension == "output_tokens":
        return 0
    return min(
        capacity // 2, max(1 if dimension == "requests" else TOKEN_ROUNDING // 2, capacity // 50)
    )


def _least_capacity(dimension: Dimension, limit: int) -> int:
    """Return the refill of a second, but at least one call."""
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
    hidden: bool = False,
) -> Group:
    """Block the group until a time; afterwards it starts without saved-up requests, at a reduced rate.

    429s of calls that were in flight together are one event: only the first reduces the rate. `overdrawn`: only
    in-flight output caused the 429; the rate is unchanged. `hidden`: there was enough left by the headers; the rate is
    unchanged, and saved-up capacity is used more slowly from now on.
    """
    group = advanced(group, now)
    # `retry-after` is in whole seconds, so workers compute slightly different times for one event.
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
    elif hidden:
        if group.blocked_until <= now:
            slower = max(LEAST_PACE, _burst_pace(group, now) // 2)
            group = replace(group, burst_pace=slower, burst_pace_at=now)
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


def refuse_workspace(group: Group, refusal: WorkspaceRefusal, now: int) -> Group:
    """Block a workspace; and its organization, if the refusal does not say whose limit it is and another was refused.

    A refusal that arrives while the organization is blocked anyway, and does not ask to wait longer, is the same event.
    """
    if not refusal.is_said and refusal.until <= group.blocked_until + SAME_EVENT_MS:
        return group
    until = organization_until(group.workspaces, refusal, now)
    group = replace(group, workspaces=refused(group.workspaces, refusal, now))
    if until is None:
        return group
    return block(group, until, refusal.reason, now, by=refusal.by)


def workspace_answered(group: Group, now: int, name: str) -> Group:  # noqa: ARG001 - the same signature as the other changes
    """Record that a call of a workspace was answered."""
    return replace(group, workspaces=answered(group.workspaces, name))


def drained(group: Group, at: int) -> Group:
    """Record that the queue was found empty at a time."""
    return group if at <= group.drained_at else replace(group, drained_at=at)


def lined_up(group: Group, worker: str, jobs: int, now: int) -> Group:
    """Record how many jobs of a worker wait for a start time; drop reports that are no longer valid."""
    others = {
        name: (count, at)
        for name, (count, at) in group.waiting.items()
        if name != worker and now - at < WAITING_MS
    }
    waiting = {**others, worker: (jobs, now)} if jobs else others
    while len(waiting) > MOST_WORKERS:
        del waiting[min(waiting, key=lambda name: waiting[name][1])]
    return replace(group, waiting=waiting)


def taken(group: Group, starts: Iterable[tuple[Owner, Cost]], now: int) -> Group:
    """Record whose calls were given start times."""
    by = [(owner, _least_gap(group, cost)) for owner, cost in starts]
    if not by:
        return group
    portions = portions_after(group.portions, now - group.portions_at, by)
    return replace(group, portions=portions, portions_at=max(now, group.portions_at))


def recalled(group: Group, now: int) -> Group:
    """Invalidate all start times: waiting jobs must reserve again."""
    return replace(group, epoch=group.epoch + 1, last_start=min(group.last_start, now))


def moved(group: Group, organization: str) -> Group:
    """Close a group that was started under a key's name: the key's organization is known now and has its own group."""
    return replace(group, moved_to=organization, epoch=group.epoch + 1)


def circuit_failed(  # noqa: PLR0913 - the facts of one failure
    group: Group,
    now: int,
    name: str,
    *,
    ties: Ties = NO_TIES,
    was_probe: bool = False,
    waits: Waits = USUAL,
) -> Group:
    """Count a failure of a model or an endpoint.

    Failures of calls that were in flight when the breaker opened are the same event: only probes count then.
    """
    breaker = group.circuits.get(name, Breaker())
    if breaker.is_open and breaker.concerns(ties.model, ties.tenant) and not was_probe:
        return group
    counted = failed(breaker, now, waits, model=ties.model, tenant=ties.tenant)
    circuits = {**group.circuits, name: counted}
    while len(circuits) > MOST_CIRCUITS:
        others = [each for each in circuits if each != name]
        del circuits[
            min(others, key=lambda each: (circuits[each].open_until, circuits[each].streak))
        ]
    return replace(group, circuits=circuits)


def circuit_served(group: Group, now: int, name: str, *, ties: Ties = NO_TIES) -> Group:  # noqa: ARG001 - the same signature as the other changes
    """Record that a model or an endpoint answered a call, unless its failures do not concern such calls."""
    known = group.circuits.get(name)
    if known is None:
        return group
    breaker = served(known, model=ties.model, tenant=ties.tenant)
    if breaker == known:
        return group
    others = {key: value for key, value in group.circuits.items() if key != name}
    return replace(group, circuits=others if breaker is None else {**others, name: breaker})


def _voided(bucket: Bucket) -> Bucket:
    """Return the bucket without reservations of later starts, which the new epoch invalidates."""
    return replace(bucket, level=max(0, bucket.level))
