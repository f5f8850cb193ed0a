"""What a worker gathers and writes together: ledger rows with their sums, and what the queue is to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, Final, Self, TypeVar

from sluice.domain import jobs as life
from sluice.domain.errors import StoreBusy
from sluice.domain.pricing import LedgerRow, Spend
from sluice.ports.jobs import Received
from sluice.worker.tools import Tools

T = TypeVar("T")

FLUSH_MS: Final = 3_000
MOST_ROWS: Final = 10_000
"""Ledger rows a worker keeps while the ledger is away: 10 MB."""

LAST_FLUSHES: Final = 3
"""How often the end of an invocation tries to write what a busy store has not taken."""


class Outbox:
    """One invocation's. As an async context manager it writes every few seconds, and to the end on leaving."""

    def __init__(self, tools: Tools, rows: list[LedgerRow]) -> None:
        self._tools = tools
        self._rows = rows
        """Calls that the ledger does not have yet. Those it did not take in an earlier invocation come first."""
        self._to_add_up: list[LedgerRow] = []
        self._to_put_back: list[tuple[Received, int]] = []
        """Each with the time at which it shall be visible again."""
        self._to_delete: list[Received] = []
        self._held: dict[str, Received] = {}
        """Messages that are this worker's until it is done with them, with the receipt of their last delivery."""
        self._hidden_at: int | None = None
        self._flushing = asyncio.Lock()
        self._housekeeper: asyncio.Task[None] | None = None
        self.messages_put_back = 0

    async def __aenter__(self) -> Self:
        self._housekeeper = asyncio.create_task(self._housekeeping(), name="housekeeping")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._housekeeper is not None:
            # Never in the middle of a write: what it has taken in hand would be lost.
            async with self._flushing:
                self._housekeeper.cancel()
            await asyncio.gather(self._housekeeper, return_exceptions=True)
        await self._flush_to_the_end()

    def hold(self, message: Received) -> bool:
        """Keep a message hidden from now on; False when it was held already and has only a new receipt."""
        is_new = message.message_id not in self._held
        self._held[message.message_id] = message
        return is_new

    def put_back(self, message: Received, delay_ms: int) -> None:
        """Let the message be seen again after a delay."""
        latest = self._held.pop(message.message_id, message)
        self._to_put_back.append((latest, self._tools.clock.now() + delay_ms))
        self.messages_put_back += 1

    def delete(self, message: Received) -> None:
        """Let a message go that this worker took itself."""
        self._to_delete.append(self._held.pop(message.message_id, message))

    def account(self, row: LedgerRow) -> None:
        """Let a call's row be written with the next ones."""
        self._rows.append(row)

    async def record_now(self, rows: list[LedgerRow], news: Sequence[LedgerRow]) -> None:
        """Write rows at once, those of `news` for the first time; if the ledger is busy, with the others."""
        try:
            await self._tools.blocking(self._tools.ledger.record, rows)
        except Exception:  # noqa: BLE001 - the job goes on, and the row is not dropped
            self._rows.extend(news)
        else:
            self._to_add_up.extend(news)

    async def _housekeeping(self) -> None:
        while True:
            for chore in (self._keep_hidden, self._flush):
                try:
                    await chore()
                except Exception:  # noqa: BLE001 - what comes later is still to be written
                    self._tools.events.problem("housekeeping failed")
            await self._tools.clock.sleep(FLUSH_MS)

    async def _keep_hidden(self) -> None:
        """Hide the messages for as long as a lease holds, again and again: if this worker dies, they come back soon.

        Left alone they would stay hidden for the queue's own visibility timeout, six times the longest invocation.
        """
        now = self._tools.clock.now()
        if self._hidden_at is not None and now - self._hidden_at < life.RENEW_MS:
            return
        async with self._flushing:
            held = list(self._held.values())
            if held:
                await self._tools.blocking(self._tools.inbox.keep_hidden, held, life.LEASE_MS)
            self._hidden_at = now

    async def _flush(self, *, last: bool = False) -> None:
        """Write what has gathered: visibility changes, ledger rows and their sums."""
        async with self._flushing:
            await self._write_gathered(last=last)

    async def _flush_to_the_end(self) -> None:
        for left in reversed(range(LAST_FLUSHES)):
            try:
                await self._flush(last=left == 0)
            except Exception:  # noqa: BLE001 - the jobs' own records are written; the batch has its result
                self._tools.events.problem("housekeeping failed")
            if not (self._rows or self._to_add_up or self._to_put_back or self._to_delete):
                return
            await self._tools.clock.sleep(FLUSH_MS)

    async def _write_gathered(self, *, last: bool) -> None:
        rows = list(self._rows)
        if rows:
            try:
                await self._tools.blocking(self._tools.ledger.record, rows)
            except Exception:  # noqa: BLE001 - a row is never dropped for a reason nobody thought of
                if last:
                    # They wait for the next invocation. If there is none, the calls stand in their jobs' attempts.
                    self._tools.events.problem("ledger rows not written", rows=len(rows))
                    del self._rows[: max(0, len(self._rows) - MOST_ROWS)]
            else:
                del self._rows[: len(rows)]
                self._to_add_up.extend(rows)
        await self._add_up()
        now = self._tools.clock.now()
        delays = [(message, max(0, at - now)) for message, at in self._to_put_back]
        put_back, delete = self._tools.inbox.put_back, self._tools.inbox.delete
        await self._tell_queue("put back", put_back, delays, self._to_put_back, last=last)
        await self._tell_queue(
            "deleted", delete, tuple(self._to_delete), self._to_delete, last=last
        )

    async def _tell_queue(
        self,
        what: str,
        call: Callable[[Sequence[T]], None],
        told: Sequence[T],
        gathered: list[Any],
        *,
        last: bool,
    ) -> None:
        some = list(gathered)
        gathered.clear()
        if not some:
            return
        try:
            await self._tools.blocking(call, told)
        except Exception:  # noqa: BLE001 - as above
            if last:
                # Not lost: they come back when the queue's own visibility timeout ends.
                self._tools.events.problem(f"messages not {what}", messages=len(some))
            else:
                gathered[:0] = some

    async def _add_up(self) -> None:
        rows, self._to_add_up = self._to_add_up, []
        if not rows:
            return
        sums: dict[tuple[str, date, str, str], Spend] = {}
        for row in rows:
            key = (row.tenant, row.day, row.model, row.lane)
            sums[key] = sums.get(key, Spend()) + row.spend
        try:
            await self._tools.blocking(self._tools.ledger.add_up, sums)
        except StoreBusy:
            # An addition that may have been done is not done again; the rows can be summed anew.
            self._tools.events.problem("usage sums not written", rows=len(rows))
