"""What upstream sends, decoded, classified and cut to size before anything else sees it.

Upstream may be Claude, a relay, a load balancer or an error page. Whatever it sends, what leaves this module can be
stored, logged and shown: text is valid Unicode of a bounded length, numbers are counts, and names are printable ASCII.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import ceil
from typing import Any, Final

import httpx2

from sluice.adapters.claude_bodies import MOST_ERROR_BYTES, parsed
from sluice.adapters.claude_events import Growing
from sluice.domain.limits import DIMENSIONS, Dimension, Seen
from sluice.domain.pricing import Bill
from sluice.domain.retries import ANSWER_TOO_LARGE, Failure
from sluice.ports.claude import NO_HEADERS, Answer, Headers, Refused
from sluice.worker.memory import BUDGET

MOST_MESSAGE: Final = 2_000
"""Longest error message, in characters. A job keeps one for each attempt, in a record of 400 KB."""

MOST_NAME: Final = 128
"""Longest identifier: an error type or code, a request id, an organization."""

MOST_COUNT: Final = 10**12
"""A larger limit is a mistake of upstream, and would not be a number that every store takes."""

LONGEST_WAIT_MS: Final = 40 * 86_400_000
"""A longer `retry-after` is a mistake of upstream. Spend limits reset after a month."""

_HEADER_OF: Final[Mapping[Dimension, str]] = {
    "requests": "requests",
    "input_tokens": "input-tokens",
    "output_tokens": "output-tokens",
}

_STATUS_OF: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""The status of an error that follows a 200, by its type (Anthropic, errors)."""

_TYPE_OF: Final = {status: kind for kind, status in _STATUS_OF.items()} | {
    422: "invalid_request_error"
}
"""The type of an error whose body names none, by its status."""

_NAME: Final = re.compile(r"[!-~]+(?: [!-~]+)*")
_UNFIT: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, direction overrides, and halves of surrogate pairs, which no store and no terminal takes."""

_TAG: Final = re.compile(r"<[^<>]*>")
_SPACE: Final = re.compile(r"\s+")
_CUT_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?$")
_STRING_OR_BRACKET: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[{}\[\]]', re.DOTALL)

_REASONS: Final = (
    "message",
    "Message",
    "msg",
    "error",
    "errors",
    "detail",
    "error_description",
    "reason",
)
"""The members under which the APIs of Anthropic, AWS, Google, OpenAI and of common relays put the reason."""

_MOST_DEEP: Final = 5
_MOST_REASONS: Final = 3


@dataclass(slots=True)
class Partial:
    """What is known of a call before it ends."""

    message: Growing = field(default_factory=Growing)
    headers: Headers = NO_HEADERS
    request_id: str | None = None

    def take_headers(self, headers: Mapping[str, str], now: int) -> None:
        """Read the headers of the response; `now` is in epoch milliseconds."""
        self.headers = limit_headers(headers, now)
        self.request_id = identifier(headers.get("request-id"))


# Text ----------------------------------------------------------------------------------------------------------


def fit(text: str, most: int = MOST_MESSAGE) -> str:
    """Return text that every store, log and terminal takes, cut to `most` characters."""
    text = text.strip()
    cut = text[:most]
    fitting = _UNFIT.sub("\ufffd", cut)
    return fitting if cut == text else f"{fitting} ... ({len(text):,} characters in all)"


def identifier(value: object) -> str | None:
    """Return an identifier, or None for what cannot be one."""
    if isinstance(value, str) and len(value) <= MOST_NAME and _NAME.fullmatch(value):
        return value
    return None


# Answers -------------------------------------------------------------------------------------------------------


def answer_of(body: bytes, partial: Partial) -> Answer | Refused:
    """Return the answer in the body of a 200, or the error in it. Raises AnswerTooLarge."""
    text = body.decode("utf-8-sig", "replace")
    try:
        message, is_exact = parsed(text)
    except ValueError:
        return not_a_message(partial)
    return message_of(message, text if is_exact else None, partial)


def message_of(message: Any, text: str | None, partial: Partial) -> Answer | Refused:
    """Return the answer that a document is; `text` is its JSON as received, None if it must be written anew."""
    if is_error(message):
        return refusal(message, 200, partial, {})
    if not _is_message(message):
        return not_a_message(partial)
    if text is None:
        # As ASCII: a surrogate pair that was split between events is valid again only in JSON escapes.
        text = json.dumps(message, separators=(",", ":"))
    bill = Bill.of_message(message)
    return Answer(
        text,
        bill.usage if bill else None,
        identifier(message.get("stop_reason")),
        partial.request_id,
        partial.headers,
        bill,
    )


def _is_message(document: object) -> bool:
    """Return whether a document is a Message, with or without its usage."""
    if not isinstance(document, dict):
        return False
    blocks = document.get("content")
    return (
        (document.get("type") == "message" or document.get("role") == "assistant")
        and isinstance(blocks, list)
        and all(isinstance(block, dict) for block in blocks)
    )


def is_error(document: object) -> bool:
    """Return whether the body of a 200, or an event of a stream, is an error: the status was sent before it."""
    return (
        isinstance(document, dict)
        and "content" not in document
        and (document.get("type") == "error" or bool(document.get("error")))
    )


def not_a_message(partial: Partial) -> Refused:
    """Return the failure of a 200 that has neither an answer nor an error."""
    failure = Failure(
        "api_error", "upstream answered 200 with a body that is not a Message",
        status=502, request_id=partial.request_id, usage=partial.message.usage(),
        may_be_billed=True,
    )  # fmt: skip
    return Refused(failure, partial.headers)


def too_large(partial: Partial) -> Refused:
    """Return the failure of an answer above the limits."""
    failure = Failure(
        ANSWER_TOO_LARGE,
        f"the answer is too large: more than {BUDGET.most_answer:,} bytes, too many parts, or nested too deeply",
        request_id=partial.request_id,
        usage=partial.message.usage(),
        may_be_billed=True,
    )
    return Refused(failure, partial.headers)


# Errors --------------------------------------------------------------------------------------------------------


def refusal_of(
    status: int, headers: Mapping[str, str], body: bytes, partial: Partial, now: int
) -> Refused:
    """Return the failure of a response with an error status."""
    partial.take_headers(headers, now)
    text = body.decode("utf-8-sig", "replace")
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError):
        document = _completed(text) if len(body) >= MOST_ERROR_BYTES else None
    if document is None:
        document = _shown(text)
    return refusal(document, status, partial, headers, now)


def refusal(
    document: object, status: int, partial: Partial, headers: Mapping[str, str], now: int = 0
) -> Refused:
    """Return the failure that an error document names; inside a stream it follows a 200."""
    body: Any = document[0] if isinstance(document, list) and document else document
    body = body if isinstance(body, dict) else {}
    inner: Any = body.get("error") if isinstance(body.get("error"), dict) else body
    details: Any = inner.get("details") if isinstance(inner.get("details"), dict) else {}
    named = [identifier(inner.get(name)) for name in ("type", "__type", "status")]
    kind = next((each for each in named if each and each != "error"), None)
    if status < 400:  # noqa: PLR2004 - HTTP
        status = _STATUS_OF.get(kind or "api_error", 500)
    kind = kind or _TYPE_OF.get(status, "api_error")
    failure = Failure(
        type=kind,
        message=fit(_reason(document) or f"upstream answered {status}"),
        status=status,
        error_code=identifier(details.get("error_code")) or identifier(inner.get("code")),
        retry_after_ms=retry_after_ms(headers, now),
        should_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "").lower()),
        request_id=partial.request_id or identifier(body.get("request_id")),
        usage=partial.message.usage(),
        may_be_billed=partial.message.document is not None,
    )
    return Refused(failure, partial.headers)


def _reason(document: object, depth: int = 0) -> str | None:
    """Return the reason in an error document of any API."""
    if isinstance(document, str):
        return document.strip() or None
    if depth == _MOST_DEEP:
        return None
    if isinstance(document, list):
        reasons = [_reason(each, depth + 1) for each in document[:_MOST_REASONS]]
        return "; ".join(filter(None, reasons)) or None
    if not isinstance(document, dict):
        return None
    where = document.get("loc")
    found = (_reason(document.get(name), depth + 1) for name in _REASONS)
    reason = next(filter(None, found), None)
    if reason and isinstance(where, list):
        return f"{'.'.join(str(each)[:MOST_NAME] for each in where[:10])}: {reason}"
    return reason


def _shown(text: str) -> str:
    """Return what a person would read of an error page, or the text of a body that is no JSON."""
    text = text[: 4 * MOST_MESSAGE]
    return _SPACE.sub(" ", _TAG.sub(" ", text) if text.lstrip().startswith("<") else text)


def _completed(text: str) -> object:
    """Return the document of a JSON body of which only the beginning was read; None if it cannot be completed."""
    closing: list[str] = []
    is_open_string = False
    for token in _STRING_OR_BRACKET.finditer(text):
        mark = token.group()[0]
        if mark == '"':
            is_open_string = not token.group(1)
        elif mark in "{[":
            closing.append("}" if mark == "{" else "]")
        elif closing:
            closing.pop()
    if is_open_string:
        text = _CUT_ESCAPE.sub("", text) + '"'
    try:
        return json.loads(text + "".join(reversed(closing)))
    except (ValueError, RecursionError):
        return None


# Headers -------------------------------------------------------------------------------------------------------


def limit_headers(headers: Mapping[str, str], now: int) -> Headers:
    """Return the organization, workspace and limits in a response's headers (Anthropic, response headers).

    `now` is in epoch milliseconds; reset times in the past, or more than a day ahead, are ignored.
    """
    seen: dict[Dimension, Seen] = {}
    for dimension in DIMENSIONS:
        prefix = f"anthropic-ratelimit-{_HEADER_OF[dimension]}"
        limit = _whole(headers.get(f"{prefix}-limit"))
        remaining = _whole(headers.get(f"{prefix}-remaining"))
        if limit is not None and remaining is not None:
            seen[dimension] = Seen(
                limit, remaining, _full_in_ms(headers.get(f"{prefix}-reset"), now)
            )
    return Headers(
        identifier(headers.get("anthropic-organization-id")),
        seen,
        identifier(headers.get("anthropic-workspace-id")),
    )


def retry_after_ms(headers: Mapping[str, str], now: int) -> int | None:
    """Return how long a response asks to wait, in milliseconds; the longest if it names several times.

    `retry-after` is in seconds or an HTTP date; SDKs and relays also use `retry-after-ms`. What makes no sense is
    ignored.
    """
    text = headers.get("retry-after")
    waits = [
        _milliseconds(headers.get("retry-after-ms"), 1),
        _milliseconds(text, 1000),
        _until(text, headers.get("date"), now),
    ]
    return max((wait for wait in waits if wait is not None), default=None)


def _milliseconds(text: str | None, unit: int) -> int | None:
    try:
        number = float(text or "") * unit
    except ValueError:
        return None
    return ceil(number) if 0 < number < LONGEST_WAIT_MS else None


def _until(text: str | None, sent: str | None, now: int) -> int | None:
    """Return the time until an HTTP date: by our clock or by upstream's, whichever is later."""
    at = _epoch_ms(text)
    if at is None:
        return None
    wait = max(at - now, at - (_epoch_ms(sent) or now))
    return wait if 0 < wait < LONGEST_WAIT_MS else None


def _epoch_ms(date: str | None) -> int | None:
    try:
        at = parsedate_to_datetime(date or "")
        return ceil(at.replace(tzinfo=at.tzinfo or UTC).timestamp() * 1000)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _whole(text: str | None) -> int | None:
    try:
        number = int(text) if text is not None else -1
    except ValueError:
        return None
    return number if 0 <= number <= MOST_COUNT else None


def _full_in_ms(reset: str | None, now: int) -> int | None:
    try:
        at = datetime.fromisoformat(reset or "")
        full_in = int(at.timestamp() * 1000) - now if at.tzinfo else -1
    except (ValueError, OverflowError):
        return None
    return full_in if 0 <= full_in < 86_400_000 else None  # noqa: PLR2004 - a day


# Connections ---------------------------------------------------------------------------------------------------

_NEVER_SENT: Final = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.UnsupportedProtocol,
    httpx2.LocalProtocolError,
    httpx2.InvalidURL,
)


def connection_lost(error: Exception, partial: Partial) -> Refused:
    """Return the failure of a call whose connection was not made, broke, or fell silent."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx2.HTTPError | httpx2.InvalidURL):
        cause = cause.__cause__
    # Without a connection nothing was sent; otherwise the call may have been answered.
    never_sent = isinstance(cause, _NEVER_SENT)
    name = type(cause).__name__ if cause is not None else type(error).__name__
    failure = Failure(
        "connection_error",
        f"the connection to upstream failed ({name})",
        request_id=partial.request_id,
        usage=partial.message.usage(),
        may_be_billed=not never_sent,
    )
    return Refused(failure, partial.headers)


def broken_off(partial: Partial) -> Refused:
    """Return the failure of a stream that ended before its answer did."""
    failure = Failure(
        "connection_error", "the stream ended before the answer did",
        request_id=partial.request_id, usage=partial.message.usage(), may_be_billed=True,
    )  # fmt: skip
    return Refused(failure, partial.headers)
