"""The ledger of a worker: one row per upstream call, collected and written every few seconds.

A call whose job may run again is booked before its job's record is written. What the ledger does not accept stays in
the record (`Job.unbooked`), so that no row depends on the life of a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from sluice.domain.errors import NotStorable, StoreBusy
from sluice.domain.jobs import Job
from sluice.domain.pricing import LedgerRow, added_up
from sluice.ports.jobs import CallBooks
from sluice.ports.world import Blocking, Events

MOST_ROWS: Final = 10_000
"""Rows a worker keeps while the ledger is unavailable: 10 MB."""

Write = Callable[[Sequence[LedgerRow]], Sequence[LedgerRow]]


class Ledger:
    """The ledger of one worker. Rows that could not be written in one invocation are written in the next."""

    def __init__(self, books: CallBooks, blocking: Blocking, events: Events) -> None:
        self._books = books
        self._blocking = blocking
        self._events = events
        self._rows: list[LedgerRow] = []
        self._missed: list[LedgerRow] = []
        """Rows that could not be booked; others may book them too."""
        self._keeping = asyncio.Lock()
        self._to_add_up: list[LedgerRow] = []
        """Rows that are written but not yet in the sums."""

    @property
    def unwritten(self) -> set[str]:
        """The jobs with rows that are not written: their messages must not be deleted yet."""
        return {row.job_id for row in (*self._rows, *self._missed)}

    def account(self, row: LedgerRow) -> None:
        """Write a call's row together with the next ones."""
        self._rows.append(row)

    async def book(self, rows: Sequence[LedgerRow]) -> bool:
        """Write the rows that are missing, at once; return whether the ledger has all of them now."""
        try:
            if rows:
                written = await self._written(self._books.record_missing, rows)
                # Not in one line: the list may be replaced during the write.
                self._to_add_up.extend(written)
        except Exception:  # noqa: BLE001 - the job continues, and its record keeps the rows
            return False
        return True

    async def booked(self, job: Job, *rows: LedgerRow) -> Job:
        """Book what the record of a job owes, and more rows of its calls; return it with what it owes after that."""
        owed = (*job.unbooked, *rows)
        if await self.book(owed):
            owed = ()
        else:
            self._missed.extend(rows)
        return job if owed == job.unbooked else replace(job, unbooked=owed)

    async def keep(self, *, last: bool = False) -> bool:
        """Write the collected rows, and add them to the sums; return whether all are written."""
        async with self._keeping:
            return await self._keep(last=last)

    async def _keep(self, *, last: bool) -> bool:
        if (missed := list(self._missed)) and await self.book(missed):
            del self._missed[: len(missed)]
        if rows := list(self._rows):
            try:
                written = await self._written(self._recorded, rows)
            except Exception:  # noqa: BLE001 - no row is dropped because of an unexpected error
                if last:
                    # They wait for the next invocation. If there is none, the job records have what is needed.
                    self._events.problem("ledger rows not written", rows=len(rows))
                    del self._rows[: max(0, len(self._rows) - MOST_ROWS)]
            else:
                del self._rows[: len(rows)]
                self._to_add_up.extend(written)
        if last:
            del self._missed[: max(0, len(self._missed) - MOST_ROWS)]
        if self._to_add_up:
            await self._add_up()
        return not self._rows and not self._missed and not self._to_add_up

    async def _written(self, write: Write, rows: Sequence[LedgerRow]) -> Sequence[LedgerRow]:
        """Write rows; one that the ledger cannot take holds back no other, and is written without others' words."""
        try:
            return await self._blocking(write, rows)
        except NotStorable as error:
            if len(rows) > 1:
                return [each for row in rows for each in await self._written(write, [row])]
            (row,) = rows
            self._events.problem("ledger row not storable", job_id=row.job_id, what=error.what)
            return () if row == row.bare() else await self._written(write, [row.bare()])

    def _recorded(self, rows: Sequence[LedgerRow]) -> Sequence[LedgerRow]:
        self._books.record(rows)
        return rows

    async def _add_up(self) -> None:
        rows, self._to_add_up = self._to_add_up, []
        try:
            await self._blocking(self._books.add_up, added_up(rows))
        except (StoreBusy, NotStorable):
            # An addition that may have been made is not repeated; the sums can be recomputed from the rows.
            self._events.problem("usage sums not written", rows=len(rows))
