"""The Messages API through the official SDK, without the SDK's retries: the queue is responsible for all waits.

The request is sent as received from the caller, and the answer is stored as received (`claude_bodies`).
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import anthropic
import httpx2
from anthropic import AsyncAnthropic, AsyncStream, DefaultAsyncHttpxClient, Omit

from sluice.adapters.claude_bodies import (
    EXCHANGE,
    AnswerTooLarge,
    Exchange,
    on_request,
    on_response,
    parsed,
)
from sluice.adapters.claude_events import Growing
from sluice.domain.limits import DIMENSIONS, Dimension, Seen
from sluice.domain.pricing import Usage
from sluice.domain.retries import ANSWER_TOO_LARGE, UNSENDABLE, Failure
from sluice.ports.claude import NO_HEADERS, Answer, CallRequest, Headers, Refused
from sluice.ports.world import Clock
from sluice.worker.memory import BUDGET

STREAM_FROM_TOKENS: Final = 8_192
"""Outputs from this `max_tokens` are streamed, because idle connections may be closed by the network."""

CALLS_PER_CLIENT: Final = 8
"""Maximum calls per client: each call checks all connections of its client, so small pools save CPU time."""

IDLE_SECONDS: Final = 30.0
"""How long an idle connection is kept. With httpx's default of 5 s every tenth call would open a new one."""

SILENCE_SECONDS: Final = 120.0
"""A stream without any event for this long, not even a ping, is dead."""

_STATUS_OF_TYPE: Final = {
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
"""The status of an error inside a stream, which follows a 200, by its type."""

_HEADER_OF: Final[Mapping[Dimension, str]] = {
    "requests": "requests",
    "input_tokens": "input-tokens",
    "output_tokens": "output-tokens",
}


_HEADER_VALUE: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?")
"""Printable ASCII without spaces at its ends, which every HTTP library accepts."""

_NEVER_SENT: Final = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.UnsupportedProtocol,
    httpx2.LocalProtocolError,
    httpx2.InvalidURL,
)


@dataclass(eq=False, slots=True)
class _Client:
    """One SDK client, and its calls in flight."""

    sdk: AsyncAnthropic
    calls: int = 0


class SdkClaude:
    """A few SDK clients per base URL, kept across invocations with their open connections."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._clients: dict[str, list[_Client]] = {}
        self._tls: ssl.SSLContext | None = None

    async def send(self, request: CallRequest) -> Answer | Refused:
        """Make one call, without retries. Errors of upstream and of the network are returned, not raised."""
        problem = _unsendable(request)
        if problem is None:
            return await self._sent(request)
        request.body.release()
        return Refused(Failure(UNSENDABLE, problem), NO_HEADERS)

    async def _sent(self, request: CallRequest) -> Answer | Refused:
        partial = _Partial(Growing())
        client: _Client | None = None
        try:
            client = self._client(request.key.base_url)
            client.calls += 1
            async with asyncio.timeout(request.window_ms / 1000):
                if request.early or request.max_tokens >= STREAM_FROM_TOKENS:
                    return await self._stream(client.sdk, request, partial)
                return await self._ask(client.sdk, request, partial)
        except anthropic.APIStatusError as error:
            return self._refused(error, partial)
        except (anthropic.APIConnectionError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            return Refused(_connection_lost(error, partial), partial.headers)
        except AnswerTooLarge:
            failure = Failure(
                ANSWER_TOO_LARGE,
                f"the answer is too large: more than {BUDGET.most_answer:,} bytes, or too many parts",
                request_id=partial.request_id,
                usage=partial.message.usage(),
                may_be_billed=True,
            )
            return Refused(failure, partial.headers)
        except TimeoutError:
            failure = Failure(
                "output_timeout",
                f"the answer did not end within {request.window_ms // 1000} s; "
                "lower max_tokens, or ask for less at once",
                request_id=partial.request_id,
                usage=partial.message.usage(),
                may_be_billed=True,
                had_full_window=request.full_window,
            )
            return Refused(failure, partial.headers)
        finally:
            EXCHANGE.set(None)
            request.body.release()
            if client is not None:
                client.calls -= 1

    @staticmethod
    async def _counted(request: CallRequest, partial: _Partial) -> None:
        """Wait for memory for the Message so far; raises AnswerTooLarge."""
        if partial.message.size > BUDGET.most_answer:
            raise AnswerTooLarge
        await request.room(partial.message.size)

    def _refused(self, error: anthropic.APIStatusError, partial: _Partial) -> Refused:
        headers = error.response.headers
        partial.headers = limit_headers(headers, self._clock.now())
        partial.request_id = headers.get("request-id")
        return _said(error.body, error.status_code, partial, headers.get("retry-after"))

    async def close(self) -> None:
        """Close the connections; workers never do, because Lambda ends their environments."""
        for clients in self._clients.values():
            for client in clients:
                await client.sdk.close()
        self._clients.clear()

    def _client(self, base_url: str) -> _Client:
        """Return the first client with a free call, so that few clients are used and their connections stay open."""
        clients = self._clients.setdefault(base_url, [])
        for client in clients:
            if client.calls < CALLS_PER_CLIENT:
                return client
        self._tls = self._tls or httpx2.create_ssl_context()
        sdk = AsyncAnthropic(
            base_url=base_url,
            # Every call has its own key; this one is never sent.
            api_key="set-per-call",
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(
                verify=self._tls,
                limits=httpx2.Limits(keepalive_expiry=IDLE_SECONDS),
                # Key and prompt must not go to another host, and the body is released once sent.
                follow_redirects=False,
                event_hooks={"request": [on_request], "response": [on_response]},
            ),
        )
        clients.append(_Client(sdk))
        return clients[-1]

    @staticmethod
    def _arguments(request: CallRequest, *, stream: bool) -> dict[str, Any]:
        headers: dict[str, str | Omit] = {
            "X-Api-Key": request.key.api_key,
            "Authorization": Omit(),
            "anthropic-version": request.anthropic_version,
        }
        if request.anthropic_beta:
            headers["anthropic-beta"] = request.anthropic_beta
        seconds = request.window_ms / 1000
        read = min(SILENCE_SECONDS, seconds) if stream else seconds
        EXCHANGE.set(Exchange(request, stream=stream))
        # `on_request` replaces the body of the SDK with that of the request.
        return {
            "model": request.model,
            "max_tokens": request.max_tokens,
            "messages": [],
            "extra_headers": headers,
            "timeout": httpx2.Timeout(seconds, connect=5.0, read=read),
        }

    async def _ask(
        self, client: AsyncAnthropic, request: CallRequest, partial: _Partial
    ) -> Answer | Refused:
        call = client.messages.with_streaming_response.create(
            **self._arguments(request, stream=False)
        )
        async with call as response:
            partial.headers = limit_headers(response.headers, self._clock.now())
            partial.request_id = response.headers.get("request-id")
            text = await response.text()
        try:
            message = parsed(text)
        except (ValueError, RecursionError):
            return _not_a_message(partial)
        return _answer(message, text, partial)

    async def _stream(
        self, client: AsyncAnthropic, request: CallRequest, partial: _Partial
    ) -> Answer | Refused:
        """Read the raw events, because the SDK's accumulated Message drops unknown fields."""
        call = client.messages.with_streaming_response.create(
            **self._arguments(request, stream=True), stream=True
        )
        async with call as response:
            partial.headers = limit_headers(response.headers, self._clock.now())
            partial.request_id = response.headers.get("request-id")
            request.on_headers(partial.headers)
            async for event in AsyncStream.raw_events(response.http_response):
                try:
                    document: Any = parsed(event.data) if event.data else {}
                    if document.get("type") == "error":
                        return _said(document, 200, partial)
                    partial.message.take(document, len(event.data))
                    await self._counted(request, partial)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    return _not_a_message(partial)
        message = partial.message.document
        if message is None or message.get("stop_reason") is None:
            failure = Failure(
                "connection_error", "the stream ended before the answer did",
                request_id=partial.request_id, usage=partial.message.usage(), may_be_billed=True,
            )  # fmt: skip
            return Refused(failure, partial.headers)
        # As ASCII: a surrogate pair that was split between events is valid again only in JSON escapes.
        return _answer(message, json.dumps(message, separators=(",", ":")), partial)


def _unsendable(request: CallRequest) -> str | None:
    """Return why the job's own headers cannot be written to the wire, or None.

    They are validated when a job is accepted. One that passed all the same must not look like a broken endpoint.
    """
    headers = {
        "anthropic-version": request.anthropic_version,
        "anthropic-beta": request.anthropic_beta,
    }
    for name, value in headers.items():
        if value and not _HEADER_VALUE.fullmatch(value):
            return f"{name}: the value cannot be sent as an HTTP header"
    return None


@dataclass(slots=True)
class _Partial:
    """What is known of a call before it ends."""

    message: Growing
    headers: Headers = NO_HEADERS
    request_id: str | None = None


def _answer(message: Any, text: str, partial: _Partial) -> Answer | Refused:
    try:
        usage = Usage.from_message(message["usage"])
        is_message = isinstance(message["content"], list)
    except (LookupError, TypeError, AttributeError):
        is_message = False
    if not is_message:
        return _not_a_message(partial)
    return Answer(text, usage, message.get("stop_reason"), partial.request_id, partial.headers)


def _not_a_message(partial: _Partial) -> Refused:
    failure = Failure(
        "api_error", "upstream answered 200 with a body that is not a Message",
        status=502, request_id=partial.request_id, usage=partial.message.usage(),
        may_be_billed=True,
    )  # fmt: skip
    return Refused(failure, partial.headers)


def _said(document: object, status: int, partial: _Partial, waits: str | None = None) -> Refused:
    """Read an error document; inside a stream it follows a 200. `waits` is the text of `retry-after`."""
    body: Any = document if isinstance(document, dict) else {}
    inner: Any = body.get("error") if isinstance(body.get("error"), dict) else {}
    kind = str(inner.get("type") or "api_error")
    details: Any = inner.get("details") if isinstance(inner.get("details"), dict) else {}
    if status < 400:  # noqa: PLR2004 - HTTP
        status = _STATUS_OF_TYPE.get(kind, 500)
    code = details.get("error_code")
    failure = Failure(
        type=kind,
        message=str(inner.get("message") or f"upstream answered {status}"),
        status=status,
        error_code=code if isinstance(code, str) else None,
        retry_after_ms=_retry_after_ms(waits),
        request_id=partial.request_id or body.get("request_id"),
        usage=partial.message.usage(),
        may_be_billed=partial.message.document is not None,
    )
    return Refused(failure, partial.headers)


def _connection_lost(error: Exception, partial: _Partial) -> Failure:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx2.HTTPError | httpx2.InvalidURL):
        cause = cause.__cause__
    # Without a connection nothing was sent; otherwise the call may have been answered.
    never_sent = isinstance(cause, _NEVER_SENT)
    name = type(cause).__name__ if cause is not None else type(error).__name__
    return Failure(
        "connection_error",
        f"the connection to upstream failed ({name})",
        request_id=partial.request_id,
        usage=partial.message.usage(),
        may_be_billed=not never_sent,
    )


def limit_headers(headers: Mapping[str, str], now: int) -> Headers:
    """Return the organization and the limits in a response's headers (Anthropic, response headers).

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
    return Headers(headers.get("anthropic-organization-id"), seen)


def _whole(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def _full_in_ms(reset: str | None, now: int) -> int | None:
    try:
        at = datetime.fromisoformat(reset or "")
    except ValueError:
        return None
    full_in = int(at.timestamp() * 1000) - now if at.tzinfo else -1
    return full_in if 0 <= full_in < 86_400_000 else None  # noqa: PLR2004 - a day


def _retry_after_ms(text: str | None) -> int | None:
    """Return `retry-after` (seconds) in milliseconds; anything else that a proxy may send is ignored."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return int(seconds * 1000) if 0 < seconds < 40 * 86_400 else None
