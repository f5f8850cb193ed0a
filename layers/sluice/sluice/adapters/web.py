"""Sending webhooks over HTTP: the request goes to the address that was checked."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import httpx2

from sluice.ports.world import Reply

SECONDS: Final = 15.0
"""Timeout of a delivery: the receiver should respond first and process afterwards (Standard Webhooks)."""

LOOKUP_SECONDS: Final = 5.0
"""Timeout of a DNS lookup. An invocation waits for its slowest one, so a name that hangs must not take longer."""

MOST_DIGITS: Final = 6
"""Maximum digits of a `retry-after`."""


class HttpWeb:
    """HTTP/1.1 with one connection per webhook. `trust` has the trusted certificates; None: those of the system."""

    def __init__(self, trust: ssl.SSLContext | None = None) -> None:
        # Created once, because reading the certificates takes longer than a delivery.
        self._trust = trust or httpx2.create_ssl_context()

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses of a host name; empty if it has none, or if the lookup fails or times out."""
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                found = await _looked_up(host, port)
        except (OSError, TimeoutError, UnicodeError):
            return ()
        return [str(sockaddr[0]) for *_, sockaddr in found]

    async def post(self, url: str, address: str, headers: Mapping[str, str], body: str) -> Reply:
        """Send to this address, with the host name of `url`, for which its certificate must be valid. Never raises."""
        try:
            named = httpx2.URL(url)
            # httpx adds the brackets of an IPv6 address.
            called = named.copy_with(host=address)
            request_headers = {**headers, "host": named.netloc.decode()}
            async with (
                asyncio.timeout(SECONDS),
                httpx2.AsyncClient(timeout=SECONDS, trust_env=False, verify=self._trust) as client,
                # The response body is not read.
                client.stream(
                    "POST",
                    called,
                    content=body.encode(),
                    headers=request_headers,
                    extensions={"sni_hostname": named.host},
                ) as answer,
            ):
                return Reply(answer.status_code, _seconds(answer.headers.get("retry-after")))
        except TimeoutError:
            return Reply(problem=f"no answer within {SECONDS:.0f} s")
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            return Reply(problem=type(error).__name__)


async def _looked_up(host: str, port: int) -> Sequence[Any]:
    """Look a name up in a thread of its own.

    asyncio has few threads, and a process waits for them when its event loop ends: names that hang would delay all
    other lookups, and the end of the invocation. Here nothing waits for a lookup that has timed out. Such threads are
    few: an invocation starts up to ten and then lasts for `LOOKUP_SECONDS`, and the resolver gives up soon after.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Sequence[Any]] = loop.create_future()

    def settle(addresses: Sequence[Any], error: Exception | None) -> None:
        if found.done():
            return
        if error is not None:
            found.set_exception(error)
        else:
            found.set_result(addresses)

    def look_up() -> None:
        addresses: Sequence[Any] = ()
        problem: Exception | None = None
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            problem = error
        with suppress(RuntimeError):  # the loop has ended: the lookup timed out long ago
            loop.call_soon_threadsafe(settle, addresses, problem)

    threading.Thread(target=look_up, daemon=True).start()
    return await found


def _seconds(text: str | None) -> int | None:
    """Return a `retry-after` in seconds; a date, or a value longer than any pause, is ignored."""
    is_number = text and text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    return int(text) if text and is_number else None
