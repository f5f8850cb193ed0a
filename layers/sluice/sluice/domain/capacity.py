"""How many workers the rate limits can keep busy: the arithmetic of the governor, with time as an argument.

Calls in flight are calls started per second x seconds per call (Little's law). Divided by the calls that one worker
keeps in flight, this is the number of workers that uses the whole limit; more would only wait in paid invocations.

Jobs and ranges each have an event source mapping and share the limits. Each mapping gets the workers for the whole
limit: with an empty queue it runs none, and how two backlogs share the limit is not planned. While both have a backlog,
there are up to twice as many workers as the limit needs. `shares.py` divides the account's Lambda limit, also for the
mappings that do not depend on Claude's limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from sluice.domain.limits import FULL_RATE, SAFE_START, Group, advanced

ROWS_AT_ONCE: Final = 120
"""Maximum rows of a range in memory and not yet saved, and so the maximum calls repeated if the worker dies.

As many as a worker of the jobs queue has, and more than a usual range has: all its rows queue at the limiter, so that
the last ones of a batch can start together.
"""

LEAST: Final = 2
MOST: Final = 1000
"""The maximum concurrency that Lambda accepts for an event source mapping of a queue."""

REFILLED: Final = 0.6
"""Share of slots with a call in flight if the worker refills them; the other jobs wait for their start times."""

UNREFILLED: Final = 0.22
"""The same share without refills, as for the rows of a range: towards the end most slots are empty. A hundred calls
with a median of 9 s and a maximum of 30 s use 26 of 120 slots on average."""

LONG_MS: Final = 60_000
"""A block up to this long is ignored: it ends before a change of the mapping takes effect."""

OFF_MS: Final = 300_000
"""The mapping is disabled if every group is blocked for longer than this and the queue is empty."""

FORGOTTEN_MS: Final = 3_600_000
"""A group without any answer that was not used for this long, for example of a mistyped model, is ignored."""

BACK_MS: Final = 60_000
"""The mapping is enabled again this long before the first block ends."""

assert LONG_MS <= BACK_MS < OFF_MS, "a mapping that was just disabled is not enabled again at once"

ACTIVE_MS: Final = 300_000
"""A group has work if one of its calls started or was answered within this time."""

NEW_POOL_MS: Final = 900_000
"""A key pool written this recently may have keys of groups that are not known yet."""

CROWDED: Final = 100_000
"""From this many messages in flight no workers are added: SQS allows 120,000, and each worker takes more."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """The approximate number of messages in a queue."""

    visible: int = 0
    """Waiting to be received."""
    in_flight: int = 0
    """Held by a worker, or snoozed."""
    delayed: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return self.visible + self.in_flight + self.delayed


@dataclass(frozen=True, slots=True)
class Consumer:
    """The current configuration of a queue's event source mapping."""

    maximum_concurrency: int | None
    """None: unlimited."""
    enabled: bool
    slots: int
    """Maximum calls in flight in one worker."""
    busy: float = REFILLED
    """The share of slots in use on average."""
    is_applied: bool = True
    """False while an earlier change is taking effect."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The configuration that a mapping should have, and why."""

    maximum_concurrency: int
    enabled: bool
    reason: str

    def changes(self, consumer: Consumer) -> bool:
        """Return whether the mapping differs from it. While disabled, its concurrency does not matter."""
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
    """Return the configuration that the mapping should have. Applying it and deciding again changes nothing.

    `turned_off`: the governor disabled the mapping. A mapping disabled by a person stays disabled.
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
        # SQS deletes messages after 14 days; workers must run to park their jobs.
        reason = f"{reason}; messages in the queue: {backlog.total:,}"
        return Decision(LEAST, enabled=True, reason=reason)
    busy = [group for group in serving if has_work(group, now)] or serving
    if busy and all(is_stalled(group, now) for group in busy):
        reason = "every limit group that has work is blocked or overloaded for more than a minute"
        return Decision(LEAST, enabled=True, reason=reason)
    open_groups = [group for group in busy if not is_stalled(group, now)]
    needed, reason = _needed(open_groups, consumer, now)
    present = consumer.maximum_concurrency or most
    if not all(group.has_answers for group in open_groups) or not open_groups:
        # Guessed limits are no reason to remove workers. Before any answer the ceiling applies.
        is_known = any(group.has_answers for group in serving)
        needed = max(present, needed) if is_known else most
        reason = "the limits are not known yet"
    if backlog.in_flight >= CROWDED:
        needed, reason = min(present, needed), f"{backlog.in_flight:,} messages are in flight"
    return Decision(min(most, max(LEAST, _steady(present, needed))), enabled=True, reason=reason)


def switched_off_by_hand(consumer: Consumer, ceiling: int) -> Decision:
    """Return the decision to leave a mapping disabled that a person disabled."""
    present = consumer.maximum_concurrency or ceiling
    return Decision(present, enabled=False, reason="the mapping was disabled by hand")


def has_work(group: Group, now: int) -> bool:
    """Return whether calls of the group started or were answered recently."""
    return max(group.last_start, group.observed_at) > now - ACTIVE_MS


def is_stalled(group: Group, now: int) -> bool:
    """Return whether the group cannot use a worker: blocked for over a minute, or partly, and without answers."""
    if group.blocked_until > now + LONG_MS:
        return True
    is_cut_off = any(breaker.is_open for breaker in group.circuits.values()) or any(
        workspace.blocked_until > now + LONG_MS for workspace in group.workspaces.values()
    )
    return is_cut_off and group.observed_at < now - LONG_MS


def is_new(pool_changed_at: int | None, now: int, within: int = NEW_POOL_MS) -> bool:
    """Return whether the key pool was written recently, so that it may have keys of groups that are not known yet."""
    return pool_changed_at is not None and now - pool_changed_at < within


def starts_per_second(group: Group, now: int) -> float:
    """Return how many average calls the group can start per second."""
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

    With a new key pool it is at least the safe rate: the pool may have keys of an unknown group for any model.
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
    # One more, so that a job is always ready to start.
    workers = ceil(calls / (consumer.slots * consumer.busy)) + 1
    reason = (
        f"{starts:.1f} starts a second keep {calls:.0f} calls in flight, "
        f"which is {workers} workers of {consumer.slots} slots"
    )
    return workers, reason


def _steady(present: int, needed: int) -> int:
    """Return the present number, unless the needed one is a quarter higher, or lower by a quarter and two workers."""
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
