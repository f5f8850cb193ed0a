"""The verdict on a failed call: retry, snooze or give up, and the effect on its key, model or limit group.

Sources: Anthropic's pages on errors and rate limits (API version 2026-10-21) and the error classes of its Python SDK.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from sluice.domain.jobs import JobError
from sluice.domain.pricing import Usage
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
    """For `output_timeout`: the call had the time of a whole invocation."""

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


class Effect(StrEnum):
    """The effect of a failure beyond its own job."""

    NONE = "none"
    BLOCK_GROUP = "block_group"
    """No calls in this limit group until the time that upstream named."""
    RAMP_GROUP = "ramp_group"
    """As BLOCK_GROUP, but usage grew too fast: a slow start follows."""
    SPEND_LIMIT = "spend_limit"
    """A spend limit: the group is blocked until it resets or is raised."""
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
    floor_ms: int = 500


_SPEND_CODES: Final = frozenset({"enforced_spend_limit_reached", "contract_spend_limit_reached"})
_OWN_SPEND_LIMIT: Final = (
    "You have reached your specified API usage limits",
    "You have reached your specified workspace API usage limits",
)
"""An organization's own spend limit is a 400 that differs only in its message (Anthropic, rate limits)."""

_TRANSIENT: Final = frozenset({408, 409, 425})
_TOO_MANY: Final = 429
_OVERLOADED: Final = 529
_SERVER_ERRORS: Final = 500


def judge(  # noqa: C901, PLR0911, PLR0913 - one return per kind of failure
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
    status = failure.status
    if failure.error_code in _SPEND_CODES or _is_own_spend_limit(failure):
        return _spend_limit(failure, now, policy)
    if status == 402 or failure.error_code == "organization_on_hold":  # noqa: PLR2004 - HTTP
        return _spend_limit(failure, now, policy)
    if status == _TOO_MANY:
        wait = failure.retry_after_ms or policy.default_retry_after_ms
        ramp = failure.error_code == "ramp_limit_exceeded"
        return Verdict(
            Snooze(wait + int(jitter * policy.throttle_spread_ms), "rate limited"),
            Effect.RAMP_GROUP if ramp else Effect.BLOCK_GROUP,
            now + wait,
        )
    if status == _OVERLOADED or failure.type == "overloaded_error":
        if has_fallback:
            return Verdict(FallBack("overloaded"), Effect.MODEL_OVERLOADED)
        return Verdict(
            Snooze(overload_backoff_ms(snoozes, failure, jitter, policy), "overloaded"),
            Effect.MODEL_OVERLOADED,
        )
    if status == 401:  # noqa: PLR2004 - HTTP
        return Verdict(Snooze(policy.key_wait_ms, "key rejected"), Effect.REJECT_KEY)
    if status == 403:  # noqa: PLR2004 - HTTP
        return Verdict(Snooze(policy.key_wait_ms, "key rejected"), Effect.REFUSED_TO_KEY)
    if failure.type in {ANSWER_TOO_LARGE, UNSENDABLE}:
        return Verdict(GiveUp())
    timed_out = failure.type == "output_timeout"
    if timed_out and failure.had_full_window:
        return Verdict(GiveUp())
    if status is None or status in _TRANSIENT or status >= _SERVER_ERRORS:
        # A timeout is due to the length of the answer, not to the endpoint.
        effect = (
            Effect.NONE if failure.is_from_working_endpoint or timed_out else Effect.ENDPOINT_FAILED
        )
        if attempts_used >= policy.max_attempts:
            return Verdict(GiveUp(), effect)
        wait = retry_backoff_ms(attempts_used, failure, jitter, policy)
        return Verdict(Retry(wait, full_window=timed_out), effect)
    return Verdict(GiveUp())


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


def _spend_limit(failure: Failure, now: int, policy: RetryPolicy) -> Verdict:
    # Only the limit of a tier has a known reset date; others are raised by a person at any time.
    until = (
        next_month(now)
        if failure.error_code == "enforced_spend_limit_reached"
        else now + policy.spend_recheck_ms
    )
    return Verdict(Snooze(policy.spend_recheck_ms, "spend limit"), Effect.SPEND_LIMIT, until)


def _is_own_spend_limit(failure: Failure) -> bool:
    return failure.status == 400 and failure.message.startswith(_OWN_SPEND_LIMIT)  # noqa: PLR2004
