"""Sending webhooks over HTTP: the request goes to the address that was checked."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Final

import httpx2

from sluice.ports.world import Reply

SECONDS: Final = 15.0
"""Timeout of a delivery: the receiver should respond first and process afterwards (Standard Webhooks)."""


MOST_DIGITS: Final = 6
"""Maximum digits of a `retry-after`."""


class HttpWeb:
    """HTTP/1.1 with one connection per webhook. `trust` has the trusted certificates; None: those of the system."""

    def __init__(self, trust: ssl.SSLContext | None = None) -> None:
        # Created once, because reading the certificates takes longer than a delivery.
        self._trust = trust or httpx2.create_ssl_context()

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses of a host name; empty if it has none, or if the lookup fails or times out."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SECONDS):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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


def _seconds(text: str | None) -> int | None:
    """Return a `retry-after` in seconds; a date, or a value longer than any pause, is ignored."""
    is_number = text and text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    return int(text) if text and is_number else None
