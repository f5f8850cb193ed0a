"""One HTTP request and its answer, whichever endpoint it is for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs

from scripts.claude_simulator.accounts import Headers, Refused
from scripts.claude_simulator.faults import Failure, error_body

JSON_TYPE: Final = (b"content-type", b"application/json")
encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(slots=True)
class Exchange:
    """One HTTP request and the means to answer it."""

    scope: dict[str, Any]
    send: Callable[[dict[str, Any]], Awaitable[None]]
    request_id: str
    body: bytes
    key: str | None
    version: str | None
    id: str = ""  # the value of {id} in the route

    def take_body(self) -> bytes:
        """Return the body and release it: one of a batch is large."""
        body, self.body = self.body, b""
        return body

    def header(self, name: bytes) -> str:
        """Return the last header of that name (in small letters), or an empty text."""
        found = [value for key, value in self.scope["headers"] if key == name]
        return found[-1].decode("latin-1") if found else ""

    @property
    def transport(self) -> asyncio.Transport:
        """The connection itself."""
        transport: asyncio.Transport = self.scope["state"]["transport"]
        return transport

    def query(self) -> dict[str, str]:
        """Return the query string's last value of each name."""
        return {
            name: values[-1]
            for name, values in parse_qs(self.scope["query_string"].decode()).items()
        }

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the answer."""
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"request-id", self.request_id.encode())],
            }
        )

    async def write(self, body: bytes, *, more: bool = False) -> None:
        """Send a part of the body."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def reply(self, status: int, data: object, headers: Headers) -> None:
        """Send a whole JSON answer."""
        body = encode(data).encode()
        await self.start(status, [*headers, JSON_TYPE, (b"content-length", b"%d" % len(body))])
        await self.write(body)

    async def refuse(self, refused: Refused) -> None:
        """Send an error in the API's shape, or drop the connection."""
        failure = refused.failure
        if failure.status == 0:
            self.transport.abort()
            return
        headers = list(refused.headers)
        if failure.retry_after_seconds is not None:
            headers.append((b"retry-after", b"%d" % failure.retry_after_seconds))
        if failure.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if failure.should_retry else b"false"))
        await self.reply(failure.status, error_body(failure, self.request_id), headers)


def not_found(path: str) -> Refused:
    """Return the answer to a path nobody serves."""
    return Refused(Failure(404, "not_found_error", f"Not found: {path}"), [])


Handler = Callable[[Exchange], Awaitable[None]]


def is_loopback(exchange: Exchange) -> bool:
    """Whether the caller sits on this machine, as who controls the simulator must."""
    client = exchange.scope.get("client")
    return client is not None and str(client[0]) in {"127.0.0.1", "::1"}
