"""The ideal time: the earliest by which the buckets can have admitted the work.

Full buckets at the start, continuous refill, every revocation and changed limit taken into account;
no latency, no waste. Work that several organizations share may go to any of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bench.limits.scenarios import Need, Scenario

Taken = Sequence[tuple[float, float]]
"""What other clients took: (seconds after the start, amount), in order of time."""


class NeverDone(ValueError):
    """The buckets can never let the work through."""


@dataclass(frozen=True, slots=True)
class Supply:
    """One bucket over time: what it holds at the start, and its refill from each moment on."""

    capacity: float
    refills: tuple[tuple[float, float], ...]
    """(from this second on, so much per second), in order of time, the first from 0."""

    def by(self, seconds: float) -> float:
        """Return the most the bucket can have let through until then."""
        ends = [start for start, _ in self.refills[1:]] + [seconds]
        return self.capacity + sum(
            rate * max(0.0, min(end, seconds) - start)
            for (start, rate), end in zip(self.refills, ends, strict=True)
        )


def earliest(amount: float, supplies: Sequence[Supply], taken: Taken = ()) -> float:
    """Return when the buckets together can have admitted `amount`, besides what others took."""
    times = [at for at, _ in taken]
    sums = [0.0, *accumulate(each for _, each in taken)]
    others = 0.0
    while True:
        # The more time passes, the more others took; so this climbs to the first time that fits.
        seconds = _earliest(amount + others, supplies)
        by_then = sums[bisect_right(times, seconds)]
        if by_then <= others:
            return seconds
        others = by_then


def _earliest(amount: float, supplies: Sequence[Supply]) -> float:
    turns = sorted({start for supply in supplies for start, _ in supply.refills} | {0.0})
    for start, end in zip(turns, [*turns[1:], None], strict=True):
        had = sum(supply.by(start) for supply in supplies)
        if had >= amount:
            return start
        rate = sum(supply.by(start + 1e6) - supply.by(start) for supply in supplies) / 1e6
        if end is not None:
            rate = sum(supply.by(end) - supply.by(start) for supply in supplies) / (end - start)
        if rate > 0 and (end is None or had + rate * (end - start) >= amount):
            return start + (amount - had) / rate
    raise NeverDone(f"the buckets never admit {amount:g}")


def supplies(scenario: Scenario, dimension: str) -> list[Supply]:
    """Return the bucket of every organization for `requests`, `input_tokens` or `output_tokens`."""
    seconds = scenario.burst_seconds
    if dimension == "requests" and scenario.request_burst_seconds is not None:
        seconds = scenario.request_burst_seconds
    return [
        Supply(
            capacity=max(1.0, limit / 60 * seconds),
            refills=_refills(scenario, organisation.id, limit, dimension),
        )
        for organisation in scenario.organisations
        for limit in [int(getattr(organisation, f"{dimension}_per_minute"))]
    ]


def _refills(
    scenario: Scenario, organisation: str, limit: int, dimension: str
) -> tuple[tuple[float, float], ...]:
    refills = {0.0: limit / 60}
    if dimension == "requests":
        for change in scenario.changes:
            if change.organisation == organisation:
                refills[change.after_seconds] = change.requests_per_minute / 60
    revoked_at = scenario.revoked_after_seconds.get(organisation)
    if revoked_at is not None:
        refills = {at: rate for at, rate in refills.items() if at < revoked_at}
        refills[revoked_at] = 0.0
    return tuple(sorted(refills.items()))


@dataclass(frozen=True, slots=True)
class Others:
    """What a stranger took from each bucket."""

    requests: Taken = ()
    input_tokens: Taken = ()
    output_tokens: Taken = ()


def ideal_seconds(scenario: Scenario, work: Need, others: Others | None = None) -> float:
    """Return the ideal time of the work: that of its slowest dimension.

    Claude lets output tokens go below zero, so a call may start before they are paid for. The ideal
    is the time at which all of the work is paid for; the debt at the end is not counted as speed.
    """
    others = others or Others()
    return max(
        earliest(work.requests, supplies(scenario, "requests"), others.requests),
        earliest(work.input_tokens, supplies(scenario, "input_tokens"), others.input_tokens),
        earliest(work.output_tokens, supplies(scenario, "output_tokens"), others.output_tokens),
    )
