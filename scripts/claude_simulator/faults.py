"""Faults: every way a call can fail or answer oddly, by rate or by a marker in the request.

The marker is in `metadata.user_id` and ends at the first blank; what follows it is free text:

    marker  = "sim:" item { "," item }
    item    = failure [ "x" count ]      529x3: the first three calls fail so, then they succeed
            | kind                       thinking, redacted_thinking, refusal, tool_use
            | setting "=" number         slow=30

Failures are taken in their order, each `count` times (without a count: always). A call refused by a
rate limit uses none up, so the n-th call that reaches the model always meets the same fate.

    failure     400 401 402 403 404 409 413 429 500 503 504 529, and
                ramp           429 of a growth limit, with retry-after
                spend_cap      429 of the monthly cap, without retry-after
                contract_cap   the same of a contract
                self_limit     400 of a limit the organization set itself
                on_hold        400 of a disabled organization
                concurrency    429 of too many calls at once
                drop_before_billing, drop_after_billing   the connection dies
                sse_error      a 529 in the middle of a stream, a plain 529 without a stream
    setting     slow           seconds to the first token
                tps            output tokens per second, 0 for unlimited
                tokens         output tokens (still bounded by max_tokens)
                input          input tokens, and of these: cache_read, cache_creation
                retry_after    seconds named by a forced 429 or 529; 0 for no such header
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class Place(StrEnum):
    """Where a failure happens."""

    BEFORE = "before"  # answered at once: takes nothing from a bucket, is not billed
    DROP_BEFORE = "drop_before"  # the connection dies, nothing was done
    DROP_AFTER = "drop_after"  # the answer was produced and billed, then the connection dies
    IN_STREAM = "in_stream"  # half an answer; as an error event after a 200 when it was streamed


@dataclass(frozen=True, slots=True)
class Failure:
    """One way to fail, as the API would say it."""

    status: int
    type: str
    message: str
    error_code: str | None = None
    retry_after_seconds: int | None = None
    should_retry: bool | None = None
    place: Place = Place.BEFORE


FAILURES: Final[dict[str, Failure]] = {
    "400": Failure(
        400, "invalid_request_error", "The simulator rejected this request, as configured."
    ),
    "401": Failure(401, "authentication_error", "invalid x-api-key"),
    "402": Failure(402, "billing_error", "There is a problem with your payment information."),
    "403": Failure(
        403, "permission_error", "Your API key does not have permission to use this resource."
    ),
    "404": Failure(404, "not_found_error", "The requested resource was not found."),
    "409": Failure(409, "conflict_error", "The request conflicts with another one."),
    "413": Failure(
        413, "request_too_large", "Request exceeds the maximum allowed number of bytes."
    ),
    "429": Failure(
        429,
        "rate_limit_error",
        "This request would exceed your organization's rate limit.",
        retry_after_seconds=1,
        should_retry=True,
    ),
    "500": Failure(500, "api_error", "Internal server error"),
    "503": Failure(503, "api_error", "Service temporarily unavailable"),
    "504": Failure(504, "timeout_error", "The request timed out while processing."),
    "529": Failure(529, "overloaded_error", "Overloaded", should_retry=True),
    "ramp": Failure(
        429,
        "rate_limit_error",
        "Your usage is growing too fast; slow the growth of your requests.",
        error_code="ramp_limit_exceeded",
        retry_after_seconds=5,
        should_retry=True,
    ),
    "spend_cap": Failure(
        429,
        "rate_limit_error",
        "Your organization has reached its monthly API usage limit.",
        error_code="enforced_spend_limit_reached",
    ),
    "contract_cap": Failure(
        429,
        "rate_limit_error",
        "Your organization has reached its contract's API usage limit.",
        error_code="contract_spend_limit_reached",
    ),
    "self_limit": Failure(
        400,
        "invalid_request_error",
        "You have reached your specified API usage limits. You will regain access on the first of"
        " next month at 00:00 UTC.",
    ),
    "on_hold": Failure(
        400,
        "invalid_request_error",
        "This organization has been disabled.",
        error_code="organization_on_hold",
    ),
    "concurrency": Failure(
        429,
        "rate_limit_error",
        "Number of concurrent connections has exceeded your rate limit. Please try again later.",
        retry_after_seconds=1,
        should_retry=True,
    ),
    "drop_before_billing": Failure(0, "dropped", "", place=Place.DROP_BEFORE),
    "drop_after_billing": Failure(0, "dropped", "", place=Place.DROP_AFTER),
    "sse_error": Failure(529, "overloaded_error", "Overloaded", place=Place.IN_STREAM),
}


def error_body(failure: Failure, request_id: str | None) -> dict[str, Any]:
    """Return the error as the API writes it; a request of a batch has no id."""
    error: dict[str, Any] = {"type": failure.type, "message": failure.message}
    if failure.error_code is not None:
        error["details"] = {"error_code": failure.error_code}
    return {"type": "error", "error": error, "request_id": request_id}


KINDS: Final = ("thinking", "redacted_thinking", "refusal", "tool_use")
SETTINGS: Final = ("slow", "tps", "tokens", "input", "cache_read", "cache_creation", "retry_after")
MARKER: Final = "sim:"


class MarkerError(ValueError):
    """A marker the grammar does not know."""


@dataclass(frozen=True, slots=True)
class Script:
    """What a marker asks for."""

    failures: tuple[tuple[str, int | None], ...] = ()
    kind: str | None = None
    settings: dict[str, float] = field(default_factory=dict)

    def failure_of_call(self, nth: int) -> str | None:
        """Return the failure the nth call (from 0) of this content meets."""
        for name, count in self.failures:
            if count is None or nth < count:
                return name
            nth -= count
        return None


NO_SCRIPT: Final = Script()


def read_script(user_id: str | None) -> Script:
    """Read the marker of a `metadata.user_id`; an id without one asks for nothing."""
    if user_id is None or not user_id.startswith(MARKER):
        return NO_SCRIPT
    failures: list[tuple[str, int | None]] = []
    kind: str | None = None
    settings: dict[str, float] = {}
    for item in user_id[len(MARKER) :].split(maxsplit=1)[0:1] or [""]:
        for word in item.split(","):
            if word in KINDS:
                kind = word
            elif "=" in word:
                name, _, number = word.partition("=")
                settings[name] = _number(name, number)
            else:
                failures.append(_failure(word))
    return Script(tuple(failures), kind, settings)


def _failure(word: str) -> tuple[str, int | None]:
    if word in FAILURES:
        return word, None
    name, x, count = word.rpartition("x")
    if x and name in FAILURES and count.isascii() and count.isdigit():
        return name, int(count)
    known = ", ".join([*FAILURES, *KINDS, *(f"{setting}=N" for setting in SETTINGS)])
    message = f'unknown marker "{word}"; use one of {known}'
    raise MarkerError(message)


def _number(name: str, text: str) -> float:
    if name not in SETTINGS:
        message = f'unknown setting "{name}"; use one of {", ".join(SETTINGS)}'
        raise MarkerError(message)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:  # noqa: PLR2004
        message = f'"{name}={text}" is not a number of 0 or more'
        raise MarkerError(message)
    return number


def drawn(rates: dict[str, float], chance: float) -> str | None:
    """Return the fault that a draw from [0, 1) hits, laid out in the order of `rates`."""
    for name, rate in rates.items():
        if chance < rate:
            return name
        chance -= rate
    return None
