"""The verdict on a failed call: retry, snooze or give up, and the effect on its key, model or limit group.

`refusals` says what each failure means; this module says what that means for a job that has made so many attempts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from sluice.domain.jobs import JobError
from sluice.domain.pricing import Usage
from sluice.domain.refusals import (
    OVERLOADED,
    RAMP,
    TABLE,
    Consequence,
    Refusal,
    Scope,
    is_monthly,
)
from sluice.domain.waits import USUAL

SECOND: Final = 1000
"""Milliseconds."""

MINUTE: Final = 60 * SECOND


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a usable answer, with the error type and message of the API."""

    type: str
    message: str
    status: int | None = None
    """HTTP status; None if there was no response."""
    error_code: str | None = None
    """`error.details.error_code`, which distinguishes the kinds of 429."""
    retry_after_ms: int | None = None
    request_id: str | None = None
    usage: Usage | None = None
    """What is known to be billed: the part of an answer received before the connection broke."""
    may_be_billed: bool = False
    """The request was sent before the connection was lost or timed out."""
    had_full_window: bool = False
    """For `output_timeout`: an answer had started, and had the time of a whole invocation."""
    should_retry: bool | None = None
    """The header `x-should-retry`, which SDKs obey before the status; None: not sent."""

    @property
    def is_from_working_endpoint(self) -> bool:
        """Return whether the endpoint works: it does not after a lost connection or a server error."""
        return self.status is not None and (
            self.status < _SERVER_ERRORS or self.status == _OVERLOADED
        )

    @property
    def error(self) -> JobError:
        """The failure as stored with the attempt."""
        return JobError(self.type, self.message, self.status)


ANSWER_TOO_LARGE: Final = "answer_too_large"
"""The failure type of an answer above the maximum size; a retry would be billed and fail in the same way."""


UNSENDABLE: Final = "request_not_sendable"
"""The type of a failure: the request cannot be written to the wire. Nothing was sent, and nothing ever will be."""


INTERNAL: Final = "internal_error"
"""The type of a failure in the gateway itself during a call: neither upstream's fault nor that of the worker."""


class Effect(StrEnum):
    """The effect of a failure beyond its own job."""

    NONE = "none"
    BLOCK_GROUP = "block_group"
    """No calls of this limit group, or of a workspace in it, until the time that upstream named."""
    RAMP_GROUP = "ramp_group"
    """As BLOCK_GROUP, but usage grew too fast: a slow start follows."""
    PARK_GROUP = "park_group"
    """The same until the time given, with an alarm, for money or the account itself; then one call tries."""
    REJECT_KEY = "reject_key"
    """The key is rejected: unused until the secret changes."""
    REFUSED_TO_KEY = "refused_to_key"
    """The key lacks permission for this request (its model, a beta, a file). Another key may have it."""
    MODEL_OVERLOADED = "model_overloaded"
    """Overload of all organizations: buckets do not change."""
    ENDPOINT_FAILED = "endpoint_failed"
    """The connection was lost, or a server error: counts for the circuit breaker of the endpoint."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again later; one attempt is used."""

    after_ms: int
    full_window: bool = False


@dataclass(frozen=True, slots=True)
class Snooze:
    """Try again later; no attempt is used."""

    after_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class FallBack:
    """Try again at once with the next fallback model; no attempt is used."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not try again."""


Outcome = Retry | Snooze | FallBack | GiveUp


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for the job, and the effect on what it shares with other jobs."""

    outcome: Outcome
    effect: Effect = Effect.NONE
    until: int | None = None
    """End of a temporary effect (epoch milliseconds)."""
    is_known: bool = True
    """False: a guess from the status alone; several in a row are taken for trouble of the account."""
    scope: Scope = Scope.ORGANIZATION
    """Of a block: the organization, the workspace, or one of them."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts and waits. Durations are in milliseconds.

    Retries wait a random time between 0.5 s and 2 s after the first failure, 4 s after the second, then 8, 16, ... up
    to 5 minutes (full jitter). Snoozes for 529 wait up to 1, 2, 4, ... 300 s by how often the job was snoozed.
    """

    max_attempts: int = 5
    retry_base_ms: int = 2 * SECOND
    retry_cap_ms: int = 5 * MINUTE
    overload_base_ms: int = USUAL.overload_base_ms
    overload_cap_ms: int = USUAL.overload_cap_ms
    throttle_spread_ms: int = 2 * SECOND
    """Full jitter added to `retry-after`, so that jobs do not all retry at the same time."""
    default_retry_after_ms: int = 5 * SECOND
    """For a 429 without `retry-after` (a proxy may remove the header)."""
    key_wait_ms: int = 5 * SECOND
    spend_recheck_ms: int = 15 * MINUTE
    """Wait of a job after a spend limit was reached, before it is tried again."""
    alike_wait_ms: int = MINUTE
    """Wait of a job that was refused like several before it."""
    floor_ms: int = 500


_OVERLOADED: Final = 529
_SERVER_ERRORS: Final = 500

_NEVER: Final = frozenset({ANSWER_TOO_LARGE, UNSENDABLE})
"""Failures that a repeat would only bill again, or that were never sent and never will be."""


def meaning(failure: Failure) -> Refusal:
    """Return the row of the table of refusals that the failure fits."""
    return next(
        row
        for row in TABLE
        if row.fits(
            status=failure.status,
            kind=failure.type,
            code=failure.error_code,
            message=failure.message,
            should_retry=failure.should_retry,
            named_time=failure.retry_after_ms is not None,
        )
    )


def judge(  # noqa: PLR0911, PLR0913 - a return per row; the facts
    failure: Failure,
    *,
    now: int,
    attempts_used: int,
    snoozes: int,
    has_fallback: bool,
    jitter: float,
    policy: RetryPolicy,
) -> Verdict:
    """Return the verdict on a failure. `jitter` is uniform in [0, 1)."""
    if failure.type in _NEVER:
        return Verdict(GiveUp())
    row = meaning(failure)
    match row.consequence:
        case Consequence.PARK if row.scope is Scope.KEY:
            return Verdict(Snooze(policy.key_wait_ms, row.reason), Effect.REJECT_KEY)
        case Consequence.PARK:
            return _parked(failure, row, now, policy)
        case Consequence.WAIT if row.reason == OVERLOADED:
            if has_fallback:
                return Verdict(FallBack(row.reason), Effect.MODEL_OVERLOADED)
            wait = overload_backoff_ms(snoozes, failure, jitter, policy)
            return Verdict(Snooze(wait, row.reason), Effect.MODEL_OVERLOADED)
        case Consequence.WAIT:
            wait = failure.retry_after_ms or policy.default_retry_after_ms
            effect = Effect.RAMP_GROUP if row.reason == RAMP else Effect.BLOCK_GROUP
            spread = int(jitter * policy.throttle_spread_ms)
            snooze = Snooze(wait + spread, "rate limited")
            return Verdict(snooze, effect, now + wait, scope=row.scope)
        case Consequence.END if row.scope is Scope.KEY:
            snooze = Snooze(policy.key_wait_ms, "key rejected")
            return Verdict(snooze, Effect.REFUSED_TO_KEY, is_known=row.is_known)
        case Consequence.END:
            return Verdict(GiveUp(), is_known=row.is_known)
        case Consequence.RETRY:
            return _again(failure, row, attempts_used, jitter, policy)


def refused_alike(policy: RetryPolicy) -> Verdict:
    """Return the verdict on an unknown refusal that several jobs in a row have met: it is taken for the account's."""
    return Verdict(Snooze(policy.alike_wait_ms, "refused like other jobs"))


def _parked(failure: Failure, row: Refusal, now: int, policy: RetryPolicy) -> Verdict:
    # Only the limit of a tier has a known reset date; others are raised by a person at any time.
    until = now + max(policy.spend_recheck_ms, failure.retry_after_ms or 0)
    if is_monthly(failure.error_code):
        until = max(until, next_month(now))
    snooze = Snooze(policy.spend_recheck_ms, row.reason)
    return Verdict(snooze, Effect.PARK_GROUP, until, scope=row.scope)


def _again(
    failure: Failure, row: Refusal, attempts_used: int, jitter: float, policy: RetryPolicy
) -> Verdict:
    """Return the verdict on what may go better next time, as long as attempts remain."""
    timed_out = failure.type == "output_timeout"
    # A timeout is due to the length of the answer, an internal error to the gateway: neither to the endpoint.
    is_endpoints = row.scope is Scope.ENDPOINT and not timed_out and failure.type != INTERNAL
    effect = Effect.ENDPOINT_FAILED if is_endpoints else Effect.NONE
    if attempts_used >= policy.max_attempts or (timed_out and failure.had_full_window):
        return Verdict(GiveUp(), effect)
    wait = retry_backoff_ms(attempts_used, failure, jitter, policy)
    return Verdict(Retry(wait, full_window=timed_out), effect)


def retry_backoff_ms(
    attempts_used: int, failure: Failure, jitter: float, policy: RetryPolicy
) -> int:
    """Return the wait after the `attempts_used`-th attempt failed: full jitter, `retry-after` as a floor."""
    ceiling = min(policy.retry_cap_ms, policy.retry_base_ms * 2 ** (max(1, attempts_used) - 1))
    return max(failure.retry_after_ms or policy.floor_ms, int(jitter * ceiling))


def overload_backoff_ms(snoozes: int, failure: Failure, jitter: float, policy: RetryPolicy) -> int:
    """Return the wait after a 529: full jitter under a ceiling that doubles with every snooze."""
    ceiling = min(policy.overload_cap_ms, policy.overload_base_ms * 2 ** min(snoozes, 16))
    return max(failure.retry_after_ms or policy.floor_ms, int(jitter * ceiling))


def next_month(now: int) -> int:
    """Return 00:00 UTC on the first of next month, when the spend limit of a tier resets (Anthropic, rate limits)."""
    today = datetime.fromtimestamp(now / SECOND, UTC)
    first = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return int(first.replace(hour=0, minute=0, second=0, microsecond=0).timestamp()) * SECOND
