"""What a failed call means: retry, snooze or give up, and what it says about the key, the model or the limit group.

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
    """A call that brought no usable answer, in the words of the API."""

    type: str
    message: str
    status: int | None = None
    """HTTP status; None when no response came."""
    error_code: str | None = None
    """`error.details.error_code`, which tells the kinds of 429 apart."""
    retry_after_ms: int | None = None
    request_id: str | None = None
    usage: Usage | None = None
    """What is known to be billed: the part of an answer that came before it broke."""
    may_be_billed: bool = False
    """The request had been sent when the connection was lost or the time ran out."""
    had_full_window: bool = False
    """For `output_timeout`: the call had as much time as an invocation can give."""

    @property
    def is_word_of_upstream(self) -> bool:
        """Return whether a working endpoint said so; a lost connection or a server error says that it does not work."""
        return self.status is not None and (
            self.status < _SERVER_ERRORS or self.status == _OVERLOADED
        )

    @property
    def error(self) -> JobError:
        """The failure as it is kept with the attempt."""
        return JobError(self.type, self.message, self.status)


ANSWER_TOO_LARGE: Final = "answer_too_large"
"""The type of a failure: upstream sent more than is read of an answer. It would again, and bill it again."""


class Effect(StrEnum):
    """What a failure says about more than this one job."""

    NONE = "none"
    BLOCK_GROUP = "block_group"
    """Nobody may call in this limit group until the time upstream named."""
    RAMP_GROUP = "ramp_group"
    """As BLOCK_GROUP, and the group's usage grew too fast: start again slowly."""
    PARK_GROUP = "park_group"
    """A spend cap: the group rests until its date, and somebody has to look."""
    REJECT_KEY = "reject_key"
    """The key is not accepted: out of the rotation until the secret changes."""
    REFUSED_TO_KEY = "refused_to_key"
    """This key may not make this request (its model, a beta, a file): another key may. Says nothing of other jobs."""
    MODEL_OVERLOADED = "model_overloaded"
    """Everybody's overload: buckets stay as they are."""
    ENDPOINT_FAILED = "endpoint_failed"
    """The connection was lost, or the server failed: an endpoint that goes on like that is set aside."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Later, one attempt used."""

    after_ms: int
    full_window: bool = False


@dataclass(frozen=True, slots=True)
class Snooze:
    """Later, no attempt used."""

    after_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class FallBack:
    """At once with the job's next fallback model, no attempt used."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Never again."""


Outcome = Retry | Snooze | FallBack | GiveUp


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for the job and the effect on what it shares with others."""

    outcome: Outcome
    effect: Effect = Effect.NONE
    until: int | None = None
    """For effects that hold for a time: epoch milliseconds."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient Sluice is. Durations in milliseconds.

    Retries wait a random time between 0.5 s and 2 s after the first failure, 4 s after the second, then 8, 16, ... up
    to 5 minutes (full jitter). Snoozes for 529 wait up to 1, 2, 4, ... 300 s by how often the job was snoozed.
    """

    max_attempts: int = 5
    retry_base_ms: int = 2 * SECOND
    retry_cap_ms: int = 5 * MINUTE
    overload_base_ms: int = USUAL.overload_base_ms
    overload_cap_ms: int = USUAL.overload_cap_ms
    throttle_spread_ms: int = 2 * SECOND
    """Full jitter on top of `retry-after`, so that returned jobs do not come back in one moment."""
    default_retry_after_ms: int = 5 * SECOND
    """For a 429 that names no time (a relay may drop the header)."""
    key_wait_ms: int = 5 * SECOND
    park_recheck_ms: int = 15 * MINUTE
    """How long a job of a parked group waits before it looks again."""
    floor_ms: int = 500


_SPEND_CODES: Final = frozenset({"enforced_spend_limit_reached", "contract_spend_limit_reached"})
_OWN_SPEND_LIMIT: Final = (
    "You have reached your specified API usage limits",
    "You have reached your specified workspace API usage limits",
)
"""A spend limit the organisation set itself is a 400 that only its message tells apart (Anthropic, rate limits)."""

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
    """Say what a failure means. `jitter` is uniform in [0, 1)."""
    status = failure.status
    if failure.error_code in _SPEND_CODES or _is_own_spend_limit(failure):
        return _parked(failure, now, policy)
    if status == 402 or failure.error_code == "organization_on_hold":  # noqa: PLR2004 - HTTP
        return _parked(failure, now, policy)
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
    if failure.type == ANSWER_TOO_LARGE:
        return Verdict(GiveUp())
    timed_out = failure.type == "output_timeout"
    if timed_out and failure.had_full_window:
        return Verdict(GiveUp())
    if status is None or status in _TRANSIENT or status >= _SERVER_ERRORS:
        # A time-out is the answer's length, not the endpoint's fault.
        effect = Effect.NONE if failure.is_word_of_upstream or timed_out else Effect.ENDPOINT_FAILED
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
    """Return 00:00 UTC on the first of next month: when a tier's spend cap resets (Anthropic, rate limits)."""
    today = datetime.fromtimestamp(now / SECOND, UTC)
    first = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return int(first.replace(hour=0, minute=0, second=0, microsecond=0).timestamp()) * SECOND


def _parked(failure: Failure, now: int, policy: RetryPolicy) -> Verdict:
    # Only the tier's own cap has a known date; money problems end when somebody acts, so look again.
    until = (
        next_month(now)
        if failure.error_code == "enforced_spend_limit_reached"
        else now + policy.park_recheck_ms
    )
    return Verdict(Snooze(policy.park_recheck_ms, "spend limit"), Effect.PARK_GROUP, until)


def _is_own_spend_limit(failure: Failure) -> bool:
    return failure.status == 400 and failure.message.startswith(_OWN_SPEND_LIMIT)  # noqa: PLR2004
