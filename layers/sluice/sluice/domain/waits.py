"""Where a job waits, and for how long: the one rule that picks the place, and the durations of leases and backoffs.

The backoff of a retry is in `retries.RetryPolicy`.

All durations are milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final, Self

# Leases ------------------------------------------------------------------------------------------------------

LEASE_MS: Final = 120_000
"""Length of a job's lease and of its message's visibility timeout. The job of a dead worker is free after this time."""

RENEW_MS: Final = 45_000
"""Longest gap between two renewals of a lease, or of the visibility timeout of the messages a worker holds."""

CANCEL_CHECK_MS: Final = 15_000
"""How often a worker reads the record of a job during its call: for a cancel, a lost lease, and a due renewal."""

assert 2 * RENEW_MS < LEASE_MS, "one failed renewal must not cost the lease"
assert CANCEL_CHECK_MS < RENEW_MS, "renewals are due only when the record is read"

# Places ------------------------------------------------------------------------------------------------------

LEAST_WINDOW_MS: Final = 60_000
"""Least time an invocation must have left for a call."""

LONGEST_DELAY_MS: Final = 900_000
"""Longest wait in the queue. Hidden messages would use up SQS's in-flight quota, which all jobs share."""

LONGEST_PARK_MS: Final = 6 * 3_600_000
"""Longest wait outside the queue. A parked job is checked at least this often, in case the cause is fixed."""

ROW_STAY_MS: Final = 60_000
"""Longest wait of a row of a range in the invocation: its range must stay there anyway."""

SLOW_TOKENS_PER_SECOND: Final = 25
"""The output rate of almost every answer: a call starts only if `max_tokens` at this rate fits into the time left."""

# Holding -----------------------------------------------------------------------------------------------------

HOLD_APART_MS: Final = 15_000
"""As `hold_ms`, for a job that runs apart: others wait for it to finish."""

SCOUT_MS: Final = 5_000
"""As `hold_ms`, for a job taken to find out whether the queue has one that can start at once; also how often that is
tried. If it cannot start, it is soon visible again: hidden for longer it would be missing at the end of the queue."""

MEMORY_MS: Final = 30_000
"""How long a large request waits for memory in an invocation. Memory is free again as soon as another one is sent."""

START_WITH_MEMORY_MS: Final = 15_000
"""As `hold_ms`, for a job that has waited for memory; then the next job in line gets it."""

# Faults ------------------------------------------------------------------------------------------------------

NO_KEY_MS: Final = 60_000
"""Wait of a job for which there is no usable key now."""

STORE_BUSY_MS: Final = 5_000
"""Wait of a job that met a busy store, with as much jitter on top."""

STORE_STAY_MS: Final = 30_000
"""How long a job that meets busy stores tries again in the invocation, before it goes back to the queue."""

MOST_BUSY_MS: Final = LEASE_MS
"""Longest wait in the queue of a job that met a busy store."""

FAULT_MS: Final = 15_000
"""Wait of a job that met an unexpected error, with as much jitter on top."""

BOOKING_MS: Final = 30_000
"""A worker has booked the calls of an ended job by then, unless it died or the ledger is busy."""

REWRITE_MS: Final = 1_000
"""Pause before a write that must not be lost is tried again on a busy store."""

GROWS_EVERY: Final = 20
"""Receives of a message after which the wait for a fault doubles, so that a fault that lasts does not use up the
queue's 1,000 receives in an afternoon.

Not sooner, because most receives have other reasons: a job that was snoozed ten times and then met one failed read
would wait for minutes.
"""

assert LEAST_WINDOW_MS <= ROW_STAY_MS < LONGEST_DELAY_MS < LONGEST_PARK_MS
assert max(NO_KEY_MS, 2 * FAULT_MS, 2 * STORE_BUSY_MS) < LONGEST_DELAY_MS, (
    "faults wait in the queue"
)
RECEIVE_MS: Final = 20_000
"""Longest time from when a message becomes visible to when a worker reads its job, while a worker is free or may start:
the mapping's poll, its batching window of a second, and a cold start."""

RECOVERY_MS: Final = LEASE_MS + RECEIVE_MS + STORE_STAY_MS + 2 * STORE_BUSY_MS
"""The job of a worker that dies is taken over within this time. It starts again when the worker that has received the
job dies too or hangs, when the reply with its message is lost, and when a store has refused calls for longer than
`STORE_STAY_MS`."""

assert RECOVERY_MS == 180_000, "the bound that docs/reliability.md states"  # noqa: PLR2004
assert BOOKING_MS < LEASE_MS - RENEW_MS, "the message of a dead worker is visible later than that"
assert REWRITE_MS < CANCEL_CHECK_MS, "a lease is renewed between two tries of a write"


class Place(StrEnum):
    """Where a job waits."""

    INVOCATION = "invocation"
    """In its worker, which continues with it."""
    QUEUE = "queue"
    """As a message that becomes visible again."""
    PARKED = "parked"
    """Outside the queue: its record has a `not_before`, and the sweep sends a new message."""


def place_of(delay_ms: int, *, stay_ms: int = 0, left_ms: int = 0, window_ms: int = 0) -> Place:
    """Return where a job waits that can continue after `delay_ms`.

    `stay_ms` is the longest wait worth spending in the invocation: none by default. The job stays there only if its
    call, which needs `window_ms` and never less than `LEAST_WINDOW_MS`, still fits into the `left_ms` until the
    invocation's calls must have ended.
    """
    if delay_ms <= stay_ms and delay_ms + max(window_ms, LEAST_WINDOW_MS) <= left_ms:
        return Place.INVOCATION
    return Place.QUEUE if delay_ms <= LONGEST_DELAY_MS else Place.PARKED


def parked_until(now: int, delay_ms: int) -> int | None:
    """Return the `not_before` of a job that can continue after `delay_ms`; None unless it waits outside the queue."""
    if place_of(delay_ms) is not Place.PARKED:
        return None
    return now + min(delay_ms, LONGEST_PARK_MS)


def grown(delay_ms: int, receive_count: int, most_ms: int = LONGEST_DELAY_MS) -> int:
    """Return the wait after a fault: doubled every 20 receives of the message, up to a maximum."""
    return min(delay_ms << min(receive_count // GROWS_EVERY, 10), most_ms)


def for_new_invocation(delay_ms: int, receive_count: int) -> int:
    """Return the wait of a job that needs more time than any present invocation has left.

    Doubled with each receive, up to 64 times: a new invocation should get it soon, the present ones not repeatedly.
    """
    return delay_ms << min(receive_count, 6)


def window_of(max_tokens: int, whole_ms: int, *, full_window: bool) -> int:
    """Return the time a call should have before it: at most nine tenths of the `whole_ms` of an invocation."""
    most = whole_ms * 9 // 10
    if full_window:
        return most
    needed = LEAST_WINDOW_MS // 2 + max_tokens * 1000 // SLOW_TOKENS_PER_SECOND
    return min(most, max(LEAST_WINDOW_MS, needed))


@dataclass(frozen=True, slots=True)
class Waits:
    """The waits that a test or a benchmark may shorten, so that hours of an outage pass in minutes.

    No promise depends on their length: they only trade receives and calls for delay. A deployment keeps the defaults.
    """

    hold_ms: int = 300_000
    """How long a message may wait inside an invocation for its start; for longer it waits in the queue.

    An invocation that makes calls is paid anyway, so holding costs nothing more, while a return costs a receive. As
    long as an invocation takes new messages, so that two workers, the minimum, hold what a limit of 20 a minute starts.
    """
    linger_ms: int = 15_000
    """Maximum lifetime of an invocation that cannot start any job."""
    rest_ms: int = 10_000
    """Longest wait of a job of the queue in the invocation, after a call: a receive costs more than a sleep."""
    breaker_pause_ms: int = 5_000
    """The first pause of an open breaker; each further failure doubles it."""
    breaker_pause_cap_ms: int = 60_000
    overload_base_ms: int = 1_000
    """The ceiling of the first snooze after a 529; each further snooze doubles it."""
    overload_cap_ms: int = 300_000
    poll_ms: int = 60_000
    """The first pause between two polls of an upstream batch, and each one after its cancel."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `{"hold_ms": 1000, ...}`; raises ValueError. Waits that are not named keep their defaults.

        Values can only be shorter: visibility timeout, lease and invocation timeout were chosen for the defaults.
        """
        given = json.loads(text)
        if not isinstance(given, dict):
            message = "not a JSON object"
            raise ValueError(message)  # noqa: TRY004 - about the text, as all of these
        longest: dict[str, int] = asdict(cls())
        for name, value in given.items():
            if name not in longest:
                message = f"no wait is called {name!r}; there are {', '.join(longest)}"
                raise ValueError(message)
            if type(value) is not int or not 0 <= value <= longest[name]:
                message = f"{name} must be milliseconds from 0 to {longest[name]}, got {value!r}"
                raise ValueError(message)
        return cls(**given)


USUAL: Final = Waits()

assert USUAL.rest_ms <= ROW_STAY_MS, "a rest never outlasts a stay"
assert max(HOLD_APART_MS, SCOUT_MS, START_WITH_MEMORY_MS) < USUAL.hold_ms
assert USUAL.hold_ms < LONGEST_DELAY_MS, "what is not held may still wait in the queue"
assert USUAL.breaker_pause_ms <= USUAL.breaker_pause_cap_ms
assert USUAL.overload_base_ms <= USUAL.overload_cap_ms
