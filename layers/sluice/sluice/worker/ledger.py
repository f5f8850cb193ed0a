"""The ledger of a worker: one row per upstream call, collected and written every few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Final

from sluice.domain import jobs as life
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import AttemptOutcome, Job
from sluice.domain.pricing import LedgerRow, Spend, Usage, utc_day
from sluice.ports.jobs import CallBooks
from sluice.ports.world import Blocking, Events

MOST_ROWS: Final = 10_000
"""Rows a worker keeps while the ledger is unavailable: 10 MB."""


class Ledger:
    """The ledger of one worker. Rows that could not be written in one invocation are written in the next."""

    def __init__(self, books: CallBooks, blocking: Blocking, events: Events) -> None:
        self._books = books
        self._blocking = blocking
        self._events = events
        self._rows: list[LedgerRow] = []
        self._to_add_up: list[LedgerRow] = []
        """Rows that are written but not yet in the sums."""

    def account(self, row: LedgerRow) -> None:
        """Write a call's row together with the next ones."""
        self._rows.append(row)

    async def record_now(self, rows: Sequence[LedgerRow], news: Sequence[LedgerRow]) -> None:
        """Write rows at once; `news` are those not written before. After a failure they are written with the next."""
        try:
            await self._blocking(self._books.record, rows)
        except Exception:  # noqa: BLE001 - the job continues, and no row is dropped
            self._rows.extend(news)
        else:
            self._to_add_up.extend(news)

    async def account_for_lost(self, before: Job, after: Job) -> None:
        """Record the calls of workers that died, if `after` closed one more of them: they may be billed.

        At once, because whatever killed that worker may kill this one before it writes the other rows.
        """
        if life.open_attempt(before) is None:
            return
        # All of them, because the worker that found an earlier one may have died before it wrote the row.
        rows = [
            lost_row(after, attempt.at, attempt.model, f"lost-{attempt.number}", "the worker died during the call")
            for attempt in after.attempts
            if attempt.outcome is AttemptOutcome.LOST
        ]  # fmt: skip
        await self.record_now(rows, news=rows[-1:])

    async def keep(self, *, last: bool = False) -> bool:
        """Write the collected rows, and add them to the sums; return whether all are written."""
        if rows := list(self._rows):
            try:
                await self._blocking(self._books.record, rows)
            except Exception:  # noqa: BLE001 - no row is dropped because of an unexpected error
                if last:
                    # They wait for the next invocation. If there is none, the attempts in the job records remain.
                    self._events.problem("ledger rows not written", rows=len(rows))
                    del self._rows[: max(0, len(self._rows) - MOST_ROWS)]
            else:
                del self._rows[: len(rows)]
                self._to_add_up.extend(rows)
        if self._to_add_up:
            await self._add_up()
        return not self._rows and not self._to_add_up

    async def _add_up(self) -> None:
        rows, self._to_add_up = self._to_add_up, []
        sums: dict[tuple[str, date, str, str], Spend] = {}
        for row in rows:
            key = (row.tenant, row.day, row.model, row.lane)
            sums[key] = sums.get(key, Spend()) + row.spend
        try:
            await self._blocking(self._books.add_up, sums)
        except StoreBusy:
            # An addition that may have been made is not repeated; the sums can be recomputed from the rows.
            self._events.problem("usage sums not written", rows=len(rows))


def lost_row(job: Job, at: int, model: str, call: str, note: str) -> LedgerRow:
    """Return the row of a call whose worker died: it may have been billed."""
    return LedgerRow(
        tenant=job.tenant,
        day=utc_day(at),
        call_id=f"{job.job_id}#{call}",
        job_id=job.job_id,
        model=model,
        lane=job.lane,
        organization=None,
        key_id="",
        request_id=None,
        outcome="worker_lost",
        spend=Spend.of_call(Usage(), 0),
        certain=False,
        note=note,
    )
