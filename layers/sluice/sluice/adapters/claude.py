"""The Messages API through the official SDK, without the SDK's retries: the queue is responsible for all waits.

The request is sent as received from the caller, and the answer is stored as received (`claude_bodies`).
"""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass
from typing import Any, Final

import anthropic
import httpx2
from anthropic import AsyncAnthropic, AsyncStream, DefaultAsyncHttpxClient, Omit

from sluice.adapters.claude_answers import (
    Partial,
    answer_of,
    broken_off,
    connection_lost,
    is_error,
    message_of,
    not_a_message,
    refusal,
    refusal_of,
    too_large,
)
from sluice.adapters.claude_bodies import (
    EXCHANGE,
    AnswerTooLarge,
    Exchange,
    on_request,
    on_response,
    parsed,
)
from sluice.adapters.claude_events import UNFIT
from sluice.domain.keys import UpstreamKey
from sluice.domain.retries import UNSENDABLE, Failure
from sluice.ports.claude import NO_HEADERS, Answer, CallRequest, Refused
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

SLOWEST_TOKENS_PER_SECOND: Final = 15
"""No answer is slower. One that is not streamed is silent until its end: after `SILENCE_SECONDS` and the time that
`max_tokens` take at this pace, its connection is dead."""

_HEADER_VALUE: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?")
"""Printable ASCII without spaces at its ends, which every HTTP library accepts."""


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
        problem = unsendable(request.key, request.anthropic_version, request.anthropic_beta)
        if problem is None:
            return await self._sent(request)
        request.body.release()
        return Refused(problem, NO_HEADERS)

    async def _sent(self, request: CallRequest) -> Answer | Refused:
        partial = Partial()
        client: _Client | None = None
        try:
            client = self._client(request.key.base_url)
            client.calls += 1
            async with asyncio.timeout(request.window_ms / 1000):
                if request.early or request.max_tokens >= STREAM_FROM_TOKENS:
                    return await self._stream(client.sdk, request, partial)
                return await self._ask(client.sdk, request, partial)
        except anthropic.APIStatusError as error:
            said = error.response
            return refusal_of(
                error.status_code, said.headers, said.content, partial, self._clock.now()
            )
        except (anthropic.APIConnectionError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            return connection_lost(error, partial)
        except AnswerTooLarge:
            return too_large(partial)
        except TimeoutError:
            return _out_of_time(request, partial)
        finally:
            EXCHANGE.set(None)
            request.body.release()
            if client is not None:
                client.calls -= 1

    @staticmethod
    async def _counted(request: CallRequest, partial: Partial) -> None:
        """Wait for memory for the Message so far; raises AnswerTooLarge."""
        if partial.message.size > BUDGET.most_answer:
            raise AnswerTooLarge
        await request.room(partial.message.size)

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

    async def _ask(
        self, client: AsyncAnthropic, request: CallRequest, partial: Partial
    ) -> Answer | Refused:
        call = client.messages.with_streaming_response.create(**arguments(request, stream=False))
        async with call as response:
            partial.take_headers(response.headers, self._clock.now())
            body = await response.read()
        return answer_of(body, partial)

    async def _stream(
        self, client: AsyncAnthropic, request: CallRequest, partial: Partial
    ) -> Answer | Refused:
        """Read the raw events, because the SDK's accumulated Message drops unknown fields."""
        call = client.messages.with_streaming_response.create(
            **arguments(request, stream=True), stream=True
        )
        async with call as response:
            partial.take_headers(response.headers, self._clock.now())
            request.on_headers(partial.headers)
            if "json" in response.headers.get("content-type", ""):
                # A relay that does not stream, or an error after a 200.
                return answer_of(await response.read(), partial)
            async for event in AsyncStream.raw_events(response.http_response):
                try:
                    document, _ = parsed(event.data) if event.data else ({}, True)
                    if is_error(document):
                        return refusal(document, 200, partial, {})
                    partial.message.take(document, len(event.data))
                except UNFIT:
                    return not_a_message(partial)
                await self._counted(request, partial)
        message = partial.message.document
        if message is None or message.get("stop_reason") is None:
            return broken_off(partial)
        return message_of(message, None, partial)


def version_headers(version: str, beta: str | None) -> dict[str, str]:
    """Return the headers that name the version of the API and the betas."""
    return {"anthropic-version": version} | ({"anthropic-beta": beta} if beta else {})


def arguments(request: CallRequest, *, stream: bool) -> dict[str, Any]:
    """Return what the SDK is called with."""
    headers: dict[str, str | Omit] = {
        "X-Api-Key": request.key.api_key,
        "Authorization": Omit(),
        **version_headers(request.anthropic_version, request.anthropic_beta),
    }
    seconds = request.window_ms / 1000
    silence = SILENCE_SECONDS
    if not stream:
        silence += request.max_tokens / SLOWEST_TOKENS_PER_SECOND
    read = min(silence, seconds)
    EXCHANGE.set(Exchange(request, stream=stream))
    # `on_request` replaces the body of the SDK with that of the request.
    return {
        "model": request.model,
        "max_tokens": request.max_tokens,
        "messages": [],
        "extra_headers": headers,
        "timeout": httpx2.Timeout(seconds, connect=5.0, read=read),
    }


def _out_of_time(request: CallRequest, partial: Partial) -> Refused:
    """Return the failure of a call that did not end within its window."""
    failure = Failure(
        "output_timeout",
        f"the answer did not end within {request.window_ms // 1000} s; "
        "lower max_tokens, or ask for less at once",
        request_id=partial.request_id,
        usage=partial.message.usage(),
        may_be_billed=True,
        # Silence is no sign of a long answer: only an answer that has started is known to need more time than there is.
        had_full_window=request.full_window and partial.message.document is not None,
    )
    return Refused(failure, partial.headers)


def unsendable(key: UpstreamKey, version: str, beta: str | None) -> Failure | None:
    """Return the failure of a call whose headers cannot be written to the wire, or None.

    They are validated when a job is accepted. One that passed all the same must not look like a broken endpoint.
    """
    for name, value in {"anthropic-version": version, "anthropic-beta": beta}.items():
        if value and not _HEADER_VALUE.fullmatch(value):
            return Failure(UNSENDABLE, f"{name}: the value cannot be sent as an HTTP header")
    if not _HEADER_VALUE.fullmatch(key.api_key):
        # As upstream would answer: the key is unusable, not the endpoint.
        reason = f"the upstream key {key.id} cannot be sent as an HTTP header"
        return Failure("authentication_error", reason, status=401)
    return None
