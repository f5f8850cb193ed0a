"""Other people's servers over HTTP, for webhooks: the address that was checked is the one that is called."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Final

import httpx2

from sluice.ports.world import Reply

SECONDS: Final = 15.0
"""For a whole delivery: the receiver should answer first and work afterwards (Standard Webhooks)."""


MOST_DIGITS: Final = 6
"""Of a `retry-after`."""


class HttpWeb:
    """HTTP/1.1 with a connection for each message. `trust` says whose certificates count; None: the system's."""

    def __init__(self, trust: ssl.SSLContext | None = None) -> None:
        # Made once: reading the authorities' certificates takes longer than a delivery.
        self._trust = trust or httpx2.create_ssl_context()

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses that a name leads to now; none if it leads nowhere, or nobody says in time."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SECONDS):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError, UnicodeError):
            return ()
        return [str(sockaddr[0]) for *_, sockaddr in found]

    async def post(self, url: str, address: str, headers: Mapping[str, str], body: str) -> Reply:
        """Send to this address, under the name in `url`, whose certificate it must have. Never raises."""
        try:
            named = httpx2.URL(url)
            # httpx writes the brackets of an IPv6 address itself.
            called = named.copy_with(host=address)
            request_headers = {**headers, "host": named.netloc.decode()}
            async with (
                asyncio.timeout(SECONDS),
                httpx2.AsyncClient(timeout=SECONDS, trust_env=False, verify=self._trust) as client,
                # What stands in the answer is not read.
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
    """Return a `retry-after` in seconds; one that is a date, or longer than any pause, is passed over."""
    is_number = text and text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    return int(text) if text and is_number else None
