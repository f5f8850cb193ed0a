"""Clients that call Claude themselves, through the official SDK: `python -m bench.limits.direct`."""

from __future__ import annotations

import asyncio
from typing import Final

from anthropic import AsyncAnthropic, RateLimitError

from bench.limits.child import Call, Json, serve

SDK_RETRIES: Final = 10
TUTORIAL_TRIES: Final = 5


def sdk(work: Json) -> Call:
    """The SDK's own retries, ten of them; jobs are dealt out to the keys in turn."""
    clients = _clients(work, SDK_RETRIES)

    async def call(number: int, params: Json) -> None:
        await clients[number % len(clients)].messages.create(**params)

    return call


def tutorial(work: Json) -> Call:
    """The key pool of the tutorials: round robin, on 429 wait 1, 2, 4, 8 s, five tries in all."""
    clients = _clients(work, 0)
    turn = 0

    async def call(number: int, params: Json) -> None:
        nonlocal turn
        del number
        for again in range(TUTORIAL_TRIES):
            client = clients[turn % len(clients)]
            turn += 1
            try:
                await client.messages.create(**params)
            except RateLimitError:
                if again == TUTORIAL_TRIES - 1:
                    raise
                await asyncio.sleep(2.0**again)
            else:
                return

    return call


def _clients(work: Json, retries: int) -> list[AsyncAnthropic]:
    return [
        AsyncAnthropic(api_key=key, base_url=work["url"], max_retries=retries)
        for key in work["keys"]
    ]


def _prepare(work: Json) -> Call:
    return {"sdk": sdk, "tutorial": tutorial}[work["client"]](work)


if __name__ == "__main__":
    serve(_prepare)
