"""Waiting for an event with a timeout."""

from __future__ import annotations

import asyncio

from sluice.ports.world import Clock


async def wait_at_most(event: asyncio.Event, clock: Clock, milliseconds: int) -> None:
    """Wait for the event, at most this many milliseconds."""
    if milliseconds <= 0 or event.is_set():
        return
    sleeping = asyncio.ensure_future(clock.sleep(milliseconds))
    happened = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({sleeping, happened}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        sleeping.cancel()
        happened.cancel()
