"""Runs the range of a message, and beside it ranges of new small batches.

An invocation holds its range until its rows have ended, which takes minutes at a slow rate. If all invocations hold
ranges of a large batch, a small new one must not wait for the first of them to end: each invocation regularly checks
for newcomers, and runs some beside its own range. The limiter then starts the rows of both in turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from sluice.domain.batches import Batch, Phase
from sluice.domain.waits import LEAST_WINDOW_MS
from sluice.ports.batches import Newcomer
from sluice.ports.jobs import Received
from sluice.worker.ranges import RangePointer, RunRange
from sluice.worker.timeouts import wait_at_most

LOOK_MS: Final = 1_000
"""Pause between two checks for newcomers."""

BESIDE: Final = 2
"""Maximum newcomers in one invocation beside its own range: each needs some 35 MB for its rows and records."""

MOST_BYTES: Final = 2 * 1024 * 1024
"""A larger range waits for an invocation of its own."""

BESIDE_HELD_BYTES: Final = 8 * 1024 * 1024
"""Records of a newcomer's saved rows kept in memory, as `HELD_BYTES`."""

MOST_SKIPPED: Final = 8
"""Newcomers that turn out to be none, checked at once."""

LEAST_LEFT_MS: Final = 3 * LEAST_WINDOW_MS
"""Least time an invocation must have left for a newcomer."""


MESSAGE: Final = Received("newcomer", "", "", None)
"""The message of a newcomer is still in the queue, and this invocation does not have it."""


class NoMessages:
    """The `Returns` of newcomers."""

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Do nothing."""

    def reject(self, message: Received, reason: str) -> None:
        """Do nothing."""


class RunRanges:
    """The use case behind the ranges queue."""

    def __init__(self, own: RunRange, beside: Callable[[], RunRange]) -> None:
        """`own` runs the range of the message; `beside` returns a runner with a worker and rows of its own.

        The latter must not return messages: its `Returns` is `NoMessages`.
        """
        self._own = own
        self._beside = beside
        self._idle: list[RunRange] = []
        """Runners for newcomers, kept for the next invocation."""
        self._turn = ""
        """The tenant of the last newcomer: the next one is another tenant's, if there is one."""
        self._tenants: set[str] = set()
        """Those of the newcomers that run: none starts another one, so that one tenant does not take all room."""

    async def __call__(self, pointer: RangePointer, stop_at: int, owner: str) -> bool:
        """Run a range as far as possible; return whether its message is done. See `RunRange`."""
        tools, over = self._own.tools, asyncio.Event()
        running = asyncio.create_task(self._own(pointer, stop_at, owner), name=f"{owner} own")
        running.add_done_callback(lambda _: over.set())
        beside: set[asyncio.Task[None]] = set()
        while not over.is_set():
            await wait_at_most(over, tools.clock, LOOK_MS)
            is_late = tools.clock.now() > stop_at - LEAST_LEFT_MS
            # After lost workers the search for a killer row needs an invocation with nothing else in it.
            if over.is_set() or is_late or self._own.is_search or len(beside) >= BESIDE:
                continue
            newcomer = await self._newcomer()
            if newcomer is not None:
                self._tenants.add(self._turn)
                task = asyncio.create_task(
                    self._run(newcomer, self._turn, stop_at, owner), name=f"{owner} new"
                )
                beside.add(task)
                task.add_done_callback(beside.discard)
        await asyncio.gather(*beside)
        return await running

    async def _run(self, newcomer: RangePointer, tenant: str, stop_at: int, owner: str) -> None:
        """Run a newcomer; if that fails, its message in the queue is still there."""
        runner = self._idle.pop() if self._idle else self._beside()
        try:
            await runner(newcomer, stop_at, owner)
        except Exception:  # noqa: BLE001 - the invocation's own range must not suffer
            self._own.tools.events.problem("newcomer not run", batch_id=newcomer.batch_id)
        self._idle.append(runner)
        self._tenants.discard(tenant)

    async def _newcomer(self) -> RangePointer | None:
        """Return a range that no worker has claimed, of the next tenant that has one."""
        tools, is_second_pass = self._own.tools, not self._turn
        try:
            for _ in range(MOST_SKIPPED):
                found = await tools.blocking(tools.batches.newcomer, self._turn)
                if found is None and is_second_pass:
                    return None
                is_second_pass = is_second_pass or found is None
                self._turn = found.tenant if found else ""
                if self._turn in self._tenants:
                    continue
                number = await self._unclaimed(found) if found else None
                if found and number is not None:
                    return RangePointer(MESSAGE, found.batch_id, number)
        except Exception:  # noqa: BLE001 - the next check is soon
            tools.events.problem("newcomers not read")
        return None

    async def _unclaimed(self, found: Newcomer) -> int | None:
        """Return the first range of a new batch that no worker has claimed; None if there is none."""
        tools = self._own.tools
        batch = await tools.blocking(tools.batches.get, found.batch_id)
        if batch is not None:
            for number in _ranges(batch):
                state = await tools.blocking(tools.batches.range_state, batch, number)
                if not state.version:
                    return number
        await tools.blocking(tools.batches.welcome, found)
        return None


def _ranges(batch: Batch) -> range:
    plan = batch.plan
    if plan is None or batch.phase is Phase.ENDED:
        return range(0)
    start, end = plan.bounds(0)
    return range(plan.ranges if end - start <= MOST_BYTES else 0)
