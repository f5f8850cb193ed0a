"""The ledger of a worker: one row per upstream call, gathered and written every few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Final

from sluice.domain import jobs as life
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import AttemptOutcome, Job
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import (
    Bill,
    Charge,
    LedgerRow,
    PriceList,
    Spend,
    Usage,
    utc_day,
)
from sluice.ports.jobs import CallBooks
from sluice.ports.world import Blocking, Clock, Events
from sluice.worker.limit_books import Claimant

MOST_ROWS: Final = 10_000
"""Rows a worker keeps while the ledger is unavailable: 10 MB."""

OTHER_MODELS: Final = "other"
"""Model group, in metrics, of models without a price: a dimension must not grow with names that callers invent."""


class Ledger:
    """One worker's. Rows that could not be written in one invocation are written in the next."""

    def __init__(self, books: CallBooks, blocking: Blocking, events: Events) -> None:
        self._books = books
        self._blocking = blocking
        self._events = events
        self._rows: list[LedgerRow] = []
        self._to_add_up: list[LedgerRow] = []
        """Rows that are written, and not yet in the sums."""

    def account(self, row: LedgerRow) -> None:
        """Have a call's row written with the next ones."""
        self._rows.append(row)

    async def record_now(self, rows: Sequence[LedgerRow], news: Sequence[LedgerRow]) -> None:
        """Write rows at once; `news` are those not written before. On a busy ledger they are written with the next."""
        try:
            await self._blocking(self._books.record, rows)
        except Exception:  # noqa: BLE001 - the job goes on, and no row is dropped
            self._rows.extend(news)
        else:
            self._to_add_up.extend(news)

    async def account_for_lost(self, before: Job, after: Job) -> None:
        """Record the calls of workers that died, if `after` closed one more of them: they may be billed.

        At once and not with the other rows: whatever killed that worker may kill this one before it writes them.
        """
        if life.open_attempt(before) is None:
            return
        # All of them: the worker that found an earlier one may have died before it wrote the row.
        rows = [
            lost_row(after, attempt.at, attempt.model, f"lost-{attempt.number}", "the worker died during the call")
            for attempt in after.attempts
            if attempt.outcome is AttemptOutcome.LOST
        ]  # fmt: skip
        await self.record_now(rows, news=rows[-1:])

    async def keep(self, *, last: bool = False) -> bool:
        """Write what was gathered, and add it to the sums; return whether all of it is written."""
        rows = list(self._rows)
        if rows:
            try:
                await self._blocking(self._books.record, rows)
            except Exception:  # noqa: BLE001 - no row is dropped for an error nobody thought of
                if last:
                    # They wait for the next invocation. If there is none, the attempts in the job records remain.
                    self._events.problem("ledger rows not written", rows=len(rows))
                    del self._rows[: max(0, len(self._rows) - MOST_ROWS)]
            else:
                del self._rows[: len(rows)]
                self._to_add_up.extend(rows)
        await self._add_up()
        return not self._rows and not self._to_add_up

    async def _add_up(self) -> None:
        rows, self._to_add_up = self._to_add_up, []
        if not rows:
            return
        sums: dict[tuple[str, date, str, str], Spend] = {}
        for row in rows:
            key = (row.tenant, row.day, row.model, row.lane)
            sums[key] = sums.get(key, Spend()) + row.spend
        try:
            await self._blocking(self._books.add_up, sums)
        except StoreBusy:
            # An addition that may have been made is not repeated; the sums can be computed anew from the rows.
            self._events.problem("usage sums not written", rows=len(rows))


class CallEntry:
    """The ledger's and the metrics' view of one upstream call."""

    def __init__(
        self, job: Job, claimant: Claimant, key: UpstreamKey, prices: PriceList, clock: Clock
    ) -> None:
        """`job` as it was claimed."""
        self._job = job
        self._claimant = claimant
        self._key_id = key.id
        self._prices = prices
        self._clock = clock
        priced = prices.price(job.current_model, utc_day(clock.now())) is not None
        self.metric_group = claimant.model_group if priced else OTHER_MODELS

    @property
    def answer_name(self) -> str:
        """A name for the answer of this call and no other."""
        return f"{self._job.job_id}-{self._job.version}"

    def cost(self, usage: Usage | None, bill: Bill | None = None) -> int | None:
        """Return what the call cost in micro-dollars; None if its usage or a price is unknown.

        Without a bill all of the usage is the model's that was asked.
        """
        bill = bill or (None if usage is None else Bill(None, (Charge(None, usage),)))
        day = utc_day(self._clock.now())
        return self._prices.bill_micro_usd(self._job.current_model, bill, day)

    def row(  # noqa: PLR0913 - the facts of one call
        self,
        outcome: str,
        usage: Usage,
        cost: int | None,
        request_id: str | None,
        *,
        certain: bool = True,
        note: str | None = None,
    ) -> LedgerRow:
        """Return the call's row."""
        return LedgerRow(
            tenant=self._job.tenant,
            day=utc_day(self._clock.now()),
            # The version at the claim is unique to this call: attempts given back repeat their number.
            call_id=f"{self._job.job_id}#{self._job.version}",
            job_id=self._job.job_id,
            model=self._job.current_model,
            lane=self._job.lane,
            organization=self._claimant.organization,
            key_id=self._key_id,
            request_id=request_id,
            outcome=outcome,
            # What is not certain is not known to have been billed.
            spend=Spend.of_call(usage, cost if certain else cost or 0),
            certain=certain,
            note=note,
        )


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
