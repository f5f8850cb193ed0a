"""How many workers the limits can keep busy: the governor's arithmetic, with time as an argument.

Little's law says how many calls are in flight: calls started per second x seconds per call. Divided by what one worker
keeps in flight, that is the number of workers that carries the whole limit; more would only wait inside paid
invocations.

Jobs and ranges have a mapping each and share the limits. Each mapping is given what the whole limit needs: one whose
queue is empty runs no worker, and which of two backlogs gets how much of the limit is nobody's plan. While both have
one, there are up to twice as many workers as the limit needs. How much of it the account's Lambda limit leaves is in
`shares.py`, with the mappings that do not depend on Claude's limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from sluice.domain.limits import FULL_RATE, SAFE_START, Group, advanced

LEAST: Final = 2
MOST: Final = 1000
"""What Lambda accepts as the maximum concurrency of a queue mapping."""

REFILLED: Final = 0.6
"""The share of slots with a call in flight where a worker refills them: the others hold jobs that wait to start."""

UNREFILLED: Final = 0.4
"""The share where it does not, as with the rows of a range: towards the end most slots are empty. A hundred calls whose
median is 9 s and whose slowest takes 30 keep 26 of 64 slots at work on average."""

LONG_MS: Final = 60_000
"""A block up to this long changes nothing: it is over before a change of the mapping has taken hold."""

OFF_MS: Final = 300_000
"""Every group must be blocked for longer than this before the mapping is switched off, with the queue empty."""

FORGOTTEN_MS: Final = 3_600_000
"""A group that never got an answer and was not used for this long is a mistyped model, or gone: nobody waits for it."""

BACK_MS: Final = 60_000
"""The mapping is switched on again this long before the first block ends."""

ACTIVE_MS: Final = 300_000
"""A group has work if a call of it started, or was answered, within this time."""

NEW_POOL_MS: Final = 900_000
"""A key pool written this recently may hold keys of groups that nobody knows yet."""

CROWDED: Final = 100_000
"""Messages in flight near the 120,000 that SQS allows: more workers would only take more of them."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """About how many messages a queue holds."""

    visible: int = 0
    """Waiting to be received."""
    in_flight: int = 0
    """With a worker, or snoozed."""
    delayed: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.visible + self.in_flight + self.delayed


@dataclass(frozen=True, slots=True)
class Consumer:
    """The mapping from a queue to its workers as it stands."""

    maximum_concurrency: int | None
    """None: unlimited."""
    enabled: bool
    slots: int
    """Calls that one worker can have in flight."""
    busy: float = REFILLED
    """The share of them that it has on average."""
    settled: bool = True
    """False while an earlier change is taking hold."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the mapping shall be, and why."""

    maximum_concurrency: int
    enabled: bool
    reason: str

    def changes(self, consumer: Consumer) -> bool:
        """Return whether the mapping is anything else now. While it is off, its number does not matter."""
        if not self.enabled and not consumer.enabled:
            return False
        return (self.maximum_concurrency, self.enabled) != (
            consumer.maximum_concurrency,
            consumer.enabled,
        )


def decide(  # noqa: PLR0913 - the facts of one moment
    groups: Iterable[Group],
    backlog: Backlog,
    consumer: Consumer,
    *,
    ceiling: int,
    now: int,
    turned_off: bool = False,
    pool_changed_at: int | None = None,
) -> Decision:
    """Return what the mapping shall be. Deciding again after following it changes nothing.

    `turned_off`: it was the governor who switched the mapping off; what a person switched off stays off.
    """
    most = min(MOST, max(LEAST, ceiling))
    if not consumer.enabled and not turned_off:
        return switched_off_by_hand(consumer, most)
    serving = [group for group in groups if group.moved_to is None]
    new_pool = is_new(pool_changed_at, now)
    patience = OFF_MS if consumer.enabled else BACK_MS
    awaited = [group for group in serving if not _is_forgotten(group, now)]
    if awaited and not new_pool and all(_closed(group, now, patience) for group in awaited):
        first = min(group.blocked_until for group in awaited) - now
        reason = f"every limit group is blocked, the first for another {_span(first)}"
        if not backlog.total:
            return Decision(LEAST, enabled=False, reason=reason)
        # A message is deleted after 14 days, a parked job is not: somebody must take every job out of the queue.
        reason = f"{reason}; messages in the queue: {backlog.total:,}"
        return Decision(LEAST, enabled=True, reason=reason)
    busy = [group for group in serving if has_work(group, now)] or serving
    if busy and all(is_stalled(group, now) for group in busy):
        reason = "every limit group that has work is blocked for longer, or overloaded"
        return Decision(LEAST, enabled=True, reason=reason)
    open_groups = [group for group in busy if not is_stalled(group, now)]
    needed, reason = _needed(open_groups, consumer, now)
    present = consumer.maximum_concurrency or most
    if not all(group.has_answers for group in open_groups) or not open_groups:
        # A guess is no reason to have fewer workers: the first answers will tell. Before any answer the number is
        # that of the deployment, which is the least.
        is_known = any(group.has_answers for group in serving)
        needed = max(present, needed) if is_known else most
        reason = "the limits are not known yet"
    if backlog.in_flight >= CROWDED:
        needed, reason = min(present, needed), f"{backlog.in_flight:,} messages are in flight"
    return Decision(min(most, max(LEAST, _steady(present, needed))), enabled=True, reason=reason)


def switched_off_by_hand(consumer: Consumer, ceiling: int) -> Decision:
    """Return that a mapping stays as a person left it."""
    present = consumer.maximum_concurrency or ceiling
    return Decision(present, enabled=False, reason="the mapping was switched off by hand")


def has_work(group: Group, now: int) -> bool:
    """Return whether jobs of the group were started or answered lately; a blocked group counts until its block ends."""
    return max(group.last_start, group.observed_at) > now - ACTIVE_MS


def is_stalled(group: Group, now: int) -> bool:
    """Return whether the group can use no worker for longer: blocked for over a minute, or set aside and silent."""
    if group.blocked_until > now + LONG_MS:
        return True
    is_cut_off = any(breaker.is_open for breaker in group.circuits.values())
    return is_cut_off and group.observed_at < now - LONG_MS


def is_new(pool_changed_at: int | None, now: int, within: int = NEW_POOL_MS) -> bool:
    """Return whether the key pool was written lately, so that it may hold keys of groups that nobody knows yet."""
    return pool_changed_at is not None and now - pool_changed_at < within


def starts_per_second(group: Group, now: int) -> float:
    """Return how many calls the group can start in a second, each using what calls have used on average."""
    per_minute = min(
        group.requests.limit,
        1000 * group.input_tokens.limit / max(1, group.input_mean),
        1000 * group.output_tokens.limit / max(1, group.output_mean),
    )
    return per_minute / 60 * advanced(group, now).rate_factor / FULL_RATE


def startable(
    groups: Iterable[Group], model_group: str, now: int, until: int, *, new_pool: bool = False
) -> int:
    """Return how many calls of a model group can start until a time, rounded up; an unknown group has the safe rate.

    A new key pool may hold a key of an unknown group for any model, so it is never less than that.
    """
    serving = [
        group for group in groups if group.model_group == model_group and group.moved_to is None
    ]
    safe = ceil(SAFE_START["requests"] / 60_000 * (until - now))
    if not serving:
        return safe
    known = ceil(
        sum(
            starts_per_second(group, now) * max(0, until - max(now, group.blocked_until)) / 1000
            for group in serving
        )
    )
    return max(safe, known) if new_pool else known


def _needed(groups: Sequence[Group], consumer: Consumer, now: int) -> tuple[int, str]:
    rates = [starts_per_second(group, now) for group in groups]
    starts = sum(rates)
    calls = sum(rate * group.call_ms / 1000 for rate, group in zip(rates, groups, strict=True))
    # One more than the arithmetic, so that somebody always has a job ready to start.
    workers = ceil(calls / (consumer.slots * consumer.busy)) + 1
    reason = (
        f"{starts:.1f} starts a second keep {calls:.0f} calls in flight, "
        f"which is {workers} workers of {consumer.slots} slots"
    )
    return workers, reason


def _steady(present: int, needed: int) -> int:
    """Return the present number unless the needed one is more than a quarter off; one worker too many is left alone."""
    if needed * 4 > present * 5:
        return needed
    if needed * 4 < present * 3 and present - needed >= LEAST:
        return needed
    return present


def _closed(group: Group, now: int, patience: int) -> bool:
    return group.has_answers and group.blocked_until > now + patience


def _is_forgotten(group: Group, now: int) -> bool:
    return not group.has_answers and max(group.last_start, group.observed_at) <= now - FORGOTTEN_MS


def _span(milliseconds: int) -> str:
    minutes = milliseconds // 60_000
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"  # noqa: PLR2004 - two hours
