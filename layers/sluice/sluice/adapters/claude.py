"""The Messages API through the official SDK, its own retries off: the queue owns every wait.

The request goes up as it was sent to us (`extra_body`), and the answer is kept as it came.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

import anthropic
import httpx2
from anthropic import AsyncAnthropic, Omit

from sluice.domain.limits import DIMENSIONS, Dimension, Seen
from sluice.domain.pricing import Usage
from sluice.domain.retries import Failure
from sluice.ports import Answer, CallRequest, Headers, Refused

STREAM_FROM_TOKENS: Final = 8_192
"""Longer outputs are streamed, so that no idle connection is cut on the way."""

SILENCE_SECONDS: Final = 120.0
"""A stream that says nothing for so long (it sends pings) is dead."""

CHARS_PER_TOKEN: Final = 3
"""For the part of an output that broke off before its usage came."""

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
"""An error inside a stream comes after a 200; its type tells what it would have been."""

_HEADER_OF: Final[Mapping[Dimension, str]] = {
    "requests": "requests",
    "input_tokens": "input-tokens",
    "output_tokens": "output-tokens",
}


class SdkClaude:
    """One SDK client per base URL, kept across invocations with its open connections."""

    def __init__(self) -> None:
        self._clients: dict[str, AsyncAnthropic] = {}

    async def send(self, request: CallRequest) -> Answer | Refused:
        """Make the call, once. Errors of upstream and of the network are values, not exceptions."""
        partial = _Partial()
        try:
            async with asyncio.timeout(request.window_ms / 1000):
                if request.max_tokens >= STREAM_FROM_TOKENS:
                    return await self._stream(request, partial)
                return await self._ask(request)
        except anthropic.APIStatusError as error:
            return _refused(error, partial)
        except anthropic.APIConnectionError as error:
            return Refused(_connection_lost(error, partial))
        except httpx2.HTTPError as error:
            return Refused(_connection_lost(error, partial))
        except TimeoutError:
            failure = Failure(
                "output_timeout",
                f"the answer did not end within {request.window_ms // 1000} s; "
                "lower max_tokens, or ask for less at once",
                usage=partial.usage(),
                may_be_billed=True,
                had_full_window=request.full_window,
            )
            return Refused(failure, partial.headers)

    def _client(self, base_url: str) -> AsyncAnthropic:
        if base_url not in self._clients:
            self._clients[base_url] = AsyncAnthropic(
                base_url=base_url,
                # Every call carries its own key; this one is never sent.
                api_key="set-per-call",
                max_retries=0,
            )
        return self._clients[base_url]

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
        body = json.loads(request.params)
        body["model"] = request.model
        body.pop("stream", None)
        return {
            "model": request.model,
            "max_tokens": request.max_tokens,
            "messages": [],
            "extra_headers": headers,
            "extra_body": body,
            "timeout": httpx2.Timeout(seconds, connect=5.0, read=read),
        }

    async def _ask(self, request: CallRequest) -> Answer | Refused:
        client = self._client(request.key.base_url)
        raw = await client.messages.with_raw_response.create(
            **self._arguments(request, stream=False)
        )
        text = raw.http_response.text
        headers = _headers(raw.headers)
        request_id = raw.headers.get("request-id")
        try:
            message = json.loads(text)
            usage = Usage.from_message(message["usage"])
        except (ValueError, KeyError, TypeError):
            failure = Failure(
                "api_error", "upstream answered 200 with something that is not a Message",
                status=502, request_id=request_id, may_be_billed=True,
            )  # fmt: skip
            return Refused(failure, headers)
        return Answer(text, usage, message.get("stop_reason"), request_id, headers)

    async def _stream(self, request: CallRequest, partial: _Partial) -> Answer | Refused:
        client = self._client(request.key.base_url)
        async with client.messages.stream(**self._arguments(request, stream=True)) as stream:
            partial.headers = _headers(stream.response.headers)
            partial.request_id = stream.response.headers.get("request-id")
            async for event in stream:
                partial.take(event)
            message = await stream.get_final_message() if partial.begun else None
        if message is None or message.stop_reason is None:
            failure = Failure(
                "connection_error", "the stream ended before the answer did",
                request_id=partial.request_id, usage=partial.usage(), may_be_billed=True,
            )  # fmt: skip
            return Refused(failure, partial.headers)
        document = message.to_dict(mode="json")
        usage = Usage.from_message(document["usage"])  # type: ignore[arg-type]
        return Answer(
            json.dumps(document, ensure_ascii=False, separators=(",", ":")),
            usage,
            message.stop_reason,
            partial.request_id,
            partial.headers,
        )


class _Partial:
    """What is known of an answer that has not ended yet."""

    def __init__(self) -> None:
        self.headers = Headers()
        self.request_id: str | None = None
        self.begun = False
        self._usage: dict[str, Any] = {}
        self._chars = 0

    def take(self, event: Any) -> None:
        """Note usage and the length of the output as it comes."""
        if event.type == "message_start":
            self.begun = True
            self._usage = event.message.usage.to_dict()
        elif event.type == "content_block_delta":
            delta = event.delta
            text = (
                getattr(delta, "text", None)
                or getattr(delta, "thinking", None)
                or getattr(delta, "partial_json", None)
                or ""
            )
            self._chars += len(text)
        elif event.type == "message_delta" and event.usage is not None:
            self._usage |= {
                name: value for name, value in event.usage.to_dict().items() if value is not None
            }

    def usage(self) -> Usage | None:
        """Return what was used so far, output tokens estimated from its length; None before the answer began."""
        if not self.begun:
            return None
        output = max(int(self._usage.get("output_tokens") or 0), self._chars // CHARS_PER_TOKEN)
        return Usage.from_message({**self._usage, "output_tokens": output})


def _refused(error: anthropic.APIStatusError, partial: _Partial) -> Refused:
    body: Any = error.body if isinstance(error.body, dict) else {}
    inner: Any = body.get("error") if isinstance(body.get("error"), dict) else {}
    kind = str(inner.get("type") or "api_error")
    details: Any = inner.get("details") if isinstance(inner.get("details"), dict) else {}
    status = error.status_code
    if status < 400:  # noqa: PLR2004 - an error event inside a stream
        status = _STATUS_OF_TYPE.get(kind, 500)
    headers = error.response.headers
    code = details.get("error_code")
    failure = Failure(
        type=kind,
        message=str(inner.get("message") or f"upstream answered {status}"),
        status=status,
        error_code=code if isinstance(code, str) else None,
        retry_after_ms=_retry_after_ms(headers),
        request_id=headers.get("request-id") or body.get("request_id"),
        usage=partial.usage(),
        may_be_billed=partial.begun,
    )
    return Refused(failure, _headers(headers))


def _connection_lost(error: Exception, partial: _Partial) -> Failure:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx2.HTTPError):
        cause = cause.__cause__
    # Where no connection was made, nothing was sent; in all other cases the call may have been served.
    never_sent = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
    name = type(cause).__name__ if cause is not None else type(error).__name__
    return Failure(
        "connection_error",
        f"the connection to upstream failed ({name})",
        request_id=partial.request_id,
        usage=partial.usage(),
        may_be_billed=not never_sent,
    )


def _headers(headers: httpx2.Headers) -> Headers:
    seen: dict[Dimension, Seen] = {}
    for dimension in DIMENSIONS:
        prefix = f"anthropic-ratelimit-{_HEADER_OF[dimension]}"
        limit = _whole(headers.get(f"{prefix}-limit"))
        remaining = _whole(headers.get(f"{prefix}-remaining"))
        if limit is not None and remaining is not None:
            seen[dimension] = Seen(limit, remaining)
    return Headers(headers.get("anthropic-organization-id"), seen)


def _whole(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def _retry_after_ms(headers: httpx2.Headers) -> int | None:
    """Read `retry-after` (seconds); anything else a relay may send is as good as nothing."""
    try:
        seconds = float(headers.get("retry-after") or "")
    except ValueError:
        return None
    return int(seconds * 1000) if 0 < seconds < 40 * 86_400 else None
