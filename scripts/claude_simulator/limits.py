"""The rate-limit arithmetic: continuous token buckets, exact to the last unit; the clock is given.

Every level is a whole number of *units*. One request or token is `UNIT` units, a number chosen so
that both motions of a bucket are whole units per nanosecond: refill at `limit / 60` tokens per
second, and an answer being produced at thousandths of a token per second. Nothing is rounded, so
nothing drifts, whatever the length of a run.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

SECOND = 1_000_000_000
UNIT = 60_000_000_000_000
REFILL_UNITS = UNIT // (60 * SECOND)  # per nanosecond, for a limit of one per minute
DRAIN_UNITS = UNIT // (1000 * SECOND)  # per nanosecond, for a thousandth of a token per second

RetryAfter = Literal["next_slot", "full", "none"]


def ceil_div(dividend: int, divisor: int) -> int:
    """Return the quotient, rounded up."""
    return -(-dividend // divisor)


class Bucket:
    """One limit: fills at `limit` per minute up to its capacity, and may go below zero.

    Besides what is taken at once, it carries charges that happen later: a correction when the first
    token appears, and answers that drain it while they are produced. `advance` applies them in
    their order in time.
    """

    __slots__ = ("_later", "_sequence", "at", "capacity", "draining", "level", "limit", "refill")

    def __init__(self, limit: int, capacity: int, at: int) -> None:
        """Start full. `limit` is per minute, `capacity` in units, `at` in nanoseconds."""
        self.limit = limit
        self.refill = limit * REFILL_UNITS
        self.capacity = capacity
        self.level = capacity
        self.at = at
        self.draining = 0
        self._later: list[tuple[int, int, int, int]] = []
        self._sequence = 0

    def advance(self, now: int) -> None:
        """Bring the level to `now`. A time already passed changes nothing."""
        later = self._later
        while later and later[0][0] <= now:
            at, _, lump, drain_change = heapq.heappop(later)
            self._flow(at)
            self.level = min(self.capacity, self.level - lump)
            self.draining += drain_change
        self._flow(now)

    def _flow(self, now: int) -> None:
        elapsed = now - self.at
        if elapsed > 0:
            self.level = min(self.capacity, self.level + (self.refill - self.draining) * elapsed)
            self.at = now

    def take(self, units: int) -> None:
        """Charge at once, below zero if need be."""
        self.level -= units

    def charge_at(self, at: int, units: int, drain_change: int = 0) -> None:
        """Charge `units` (negative: give back) when the clock reaches `at`."""
        self._sequence += 1
        heapq.heappush(self._later, (at, self._sequence, units, drain_change))

    def produce(self, start: int, tokens: int, millitokens_per_second: int | None) -> None:
        """Charge an answer as it is produced from `start` on; without a speed, all at `start`."""
        if tokens <= 0:
            return
        if millitokens_per_second is None:
            self.charge_at(start, tokens * UNIT)
            return
        drain = millitokens_per_second * DRAIN_UNITS
        duration = ceil_div(tokens * UNIT, drain)
        self.charge_at(start, 0, drain)
        # The last nanosecond drains more than the answer held; the end gives exactly that back.
        self.charge_at(start + duration, tokens * UNIT - drain * duration, -drain)

    def relimit(self, limit: int, capacity: int) -> None:
        """Change limit and capacity; what is in the bucket stays, as far as it fits."""
        self.limit = limit
        self.refill = limit * REFILL_UNITS
        self.capacity = capacity
        self.level = min(self.level, capacity)

    def seconds_until(self, wanted: int) -> int:
        """Return whole seconds, at least one, until the level is `wanted` if nobody else calls."""
        return max(1, ceil_div(wanted - self.level, self.refill * SECOND))

    def remaining(self) -> int:
        """Return the whole tokens or requests left, never below zero."""
        return max(0, self.level // UNIT)

    def full_at_second(self) -> int:
        """Return the epoch second at which the bucket is full; the present one if it is full."""
        missing = self.capacity - self.level
        if missing <= 0:
            return self.at // SECOND
        return ceil_div(self.at + ceil_div(missing, self.refill), SECOND)


def duration_of(tokens: int, millitokens_per_second: int | None) -> int:
    """Return the nanoseconds an answer takes to produce."""
    if millitokens_per_second is None or tokens <= 0:
        return 0
    return ceil_div(tokens * UNIT, millitokens_per_second * DRAIN_UNITS)


def capacity_units(limit: int, burst_nanoseconds: int) -> int:
    """Return what `limit` per minute brings in that time, in units, and never less than one."""
    return max(UNIT, limit * REFILL_UNITS * burst_nanoseconds)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one limit group allows per minute; None is no limit of that kind."""

    requests: int | None
    input_tokens: int | None
    output_tokens: int | None


@dataclass(frozen=True, slots=True)
class Rules:
    """How an organization's buckets behave.

    `burst` and `request_burst` are nanoseconds of refill: the capacity of every bucket, and that of
    the stricter second bucket for requests (60 a minute enforced as 1 a second), which no header
    shows.
    """

    burst: int = 60 * SECOND
    request_burst: int | None = None
    retry_after: RetryAfter = "next_slot"
    reserve_max_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call not admitted: the bucket that stopped it longest, and how long it asks to wait."""

    kind: str
    retry_after_seconds: int
    by_workspace: bool = False


@dataclass(frozen=True, slots=True)
class Charge:
    """What one call takes: known at its start, except `output_tokens`, which the answer decides.

    `estimated_input` is taken at once and corrected to `input_tokens` (input and cache writes, not
    cache reads) at `first_token`, when the answer of `output_tokens` begins to be produced.
    """

    estimated_input: int
    input_tokens: int
    output_tokens: int
    max_tokens: int
    first_token: int
    millitokens_per_second: int | None


class LimitGroup:
    """The buckets of one organization and model group, or what one of its workspaces may use of it.

    Where a workspace has limits `of_its_own`, a call must fit into both and is charged to both.
    """

    __slots__ = ("burst", "input_tokens", "limits", "output_tokens", "requests", "rules")

    def __init__(self, limits: Limits, rules: Rules, now: int) -> None:
        self.limits = limits
        self.rules = rules
        self.requests = _bucket(limits.requests, rules.burst, now)
        self.burst = (
            None
            if rules.request_burst is None
            else _bucket(limits.requests, rules.request_burst, now)
        )
        self.input_tokens = _bucket(limits.input_tokens, rules.burst, now)
        self.output_tokens = _bucket(limits.output_tokens, rules.burst, now)

    def advance(self, now: int) -> None:
        """Bring every bucket to `now`."""
        for bucket in (self.requests, self.burst, self.input_tokens, self.output_tokens):
            if bucket is not None:
                bucket.advance(now)

    def relimit(self, limits: Limits, rules: Rules, now: int) -> None:
        """Change limits and rules while calls are running."""
        self.advance(now)
        self.limits = limits
        self.rules = rules
        self.requests = _relimited(self.requests, limits.requests, rules.burst, now)
        self.burst = (
            None
            if rules.request_burst is None
            else _relimited(self.burst, limits.requests, rules.request_burst, now)
        )
        self.input_tokens = _relimited(self.input_tokens, limits.input_tokens, rules.burst, now)
        self.output_tokens = _relimited(self.output_tokens, limits.output_tokens, rules.burst, now)

    def admit(
        self,
        now: int,
        estimated_input: int,
        max_tokens: int,
        of_its_own: LimitGroup | None = None,
    ) -> Refusal | None:
        """Say whether a call may start at `now`; take its request and estimated input if it may.

        A refused call takes nothing. Output asks for a level above zero only, unless `max_tokens`
        is reserved.
        """
        refusals = self._refusals(now, estimated_input, max_tokens, by_workspace=False)
        if of_its_own is not None:
            refusals += of_its_own._refusals(now, estimated_input, max_tokens, by_workspace=True)  # noqa: SLF001
        if refusals:
            return max(refusals, key=lambda refusal: refusal.retry_after_seconds)
        for group in (self, of_its_own):
            if group is not None:
                group._take(estimated_input)  # noqa: SLF001
        return None

    def _refusals(
        self, now: int, estimated_input: int, max_tokens: int, *, by_workspace: bool
    ) -> list[Refusal]:
        """Return one refusal for each bucket that holds too little."""
        self.advance(now)
        reserved = self.rules.reserve_max_tokens
        needs = (
            ("requests", self.requests, UNIT),
            ("burst", self.burst, UNIT),
            ("input_tokens", self.input_tokens, _need(self.input_tokens, estimated_input)),
            (
                "output_tokens",
                self.output_tokens,
                _need(self.output_tokens, max_tokens) if reserved else 1,
            ),
        )
        to_full = self.rules.retry_after == "full"
        return [
            Refusal(
                kind,
                bucket.seconds_until(max(need, bucket.capacity) if to_full else need),
                by_workspace,
            )
            for kind, bucket, need in needs
            if bucket is not None and bucket.level < need
        ]

    def _take(self, estimated_input: int) -> None:
        for bucket in (self.requests, self.burst):
            if bucket is not None:
                bucket.take(UNIT)
        if self.input_tokens is not None:
            self.input_tokens.take(estimated_input * UNIT)

    def run(self, now: int, charge: Charge) -> None:
        """Write down what an admitted call will charge as its answer is produced."""
        if self.input_tokens is not None:
            correction = charge.input_tokens - charge.estimated_input
            if correction:
                self.input_tokens.charge_at(charge.first_token, correction * UNIT)
        if self.output_tokens is not None:
            if self.rules.reserve_max_tokens:
                self.output_tokens.take(charge.max_tokens * UNIT)
                end = charge.first_token + duration_of(
                    charge.output_tokens, charge.millitokens_per_second
                )
                self.output_tokens.charge_at(end, (charge.output_tokens - charge.max_tokens) * UNIT)
            else:
                self.output_tokens.produce(
                    charge.first_token, charge.output_tokens, charge.millitokens_per_second
                )
        self.advance(now)

    def headers(self, now: int, of_its_own: LimitGroup | None = None) -> list[tuple[bytes, bytes]]:
        """Return the `anthropic-ratelimit-*` headers as of `now`.

        Requests are exact, tokens rounded to the nearest thousand. `tokens-*` is the sum of input
        and output; its reset is the earlier of the two, as captured from the real API, and so no
        time to rely on. Of two buckets of a kind the one with less in it is shown.
        """
        shown = [self.requests, self.input_tokens, self.output_tokens]
        self.advance(now)
        if of_its_own is not None:
            of_its_own.advance(now)
            own = (of_its_own.requests, of_its_own.input_tokens, of_its_own.output_tokens)
            shown = [_lower(*pair) for pair in zip(shown, own, strict=True)]
        requests, input_tokens, output_tokens = shown
        headers: list[tuple[bytes, bytes]] = []
        if requests is not None:
            left = min(requests.remaining(), requests.limit)
            _add(headers, b"requests", requests.limit, left, requests.full_at_second())
        resets: list[int] = []
        limit = remaining = 0
        for name, bucket in ((b"input-tokens", input_tokens), (b"output-tokens", output_tokens)):
            if bucket is not None:
                left = bucket.remaining()
                reset = bucket.full_at_second()
                _add(headers, name, bucket.limit, _nearest_thousand(left), reset)
                limit += bucket.limit
                remaining += left
                resets.append(reset)
        if resets:
            _add(headers, b"tokens", limit, _nearest_thousand(remaining), min(resets))
        return headers


def _lower(one: Bucket | None, other: Bucket | None) -> Bucket | None:
    if one is None or other is None:
        return one or other
    return other if other.level < one.level else one


def _bucket(limit: int | None, burst: int, now: int) -> Bucket | None:
    return None if limit is None else Bucket(limit, capacity_units(limit, burst), now)


def _relimited(bucket: Bucket | None, limit: int | None, burst: int, now: int) -> Bucket | None:
    if bucket is None or limit is None:
        return _bucket(limit, burst, now)
    bucket.relimit(limit, capacity_units(limit, burst))
    return bucket


def _need(bucket: Bucket | None, tokens: int) -> int:
    """Return the level a call of that size waits for.

    A call above the limit per minute never fits. One that only exceeds a short burst's capacity
    waits for a full bucket and takes it below zero; otherwise it would wait forever because of a
    setting of ours.
    """
    if bucket is None or tokens > bucket.limit:
        return tokens * UNIT
    return min(tokens * UNIT, bucket.capacity)


def _nearest_thousand(tokens: int) -> int:
    return (tokens + 500) // 1000 * 1000


def _add(
    headers: list[tuple[bytes, bytes]], name: bytes, limit: int, remaining: int, reset: int
) -> None:
    prefix = b"anthropic-ratelimit-" + name
    headers.append((prefix + b"-limit", b"%d" % limit))
    headers.append((prefix + b"-remaining", b"%d" % remaining))
    headers.append((prefix + b"-reset", rfc3339(reset)))


@lru_cache(maxsize=8192)
def rfc3339(epoch_second: int) -> bytes:
    """Return the time as RFC 3339 in whole seconds, `Z` at the end."""
    return datetime.fromtimestamp(epoch_second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()
