"""Booking the calls of ended jobs whose workers could not do it: they died, or did not reach the ledger."""

from __future__ import annotations

from collections.abc import Iterable

from sluice.domain.errors import NotStorable
from sluice.domain.pricing import LedgerRow, added_up
from sluice.ports.jobs import CallBooks
from sluice.ports.world import Events


def book(ledger: CallBooks, rows: Iterable[LedgerRow], events: Events) -> None:
    """Write those rows that the ledger does not have, and add them to the sums; raises StoreBusy."""
    for row in rows:
        try:
            written = ledger.record_missing([row])
        except NotStorable as error:
            events.problem("ledger row not storable", job_id=row.job_id, what=error.what)
            written = ledger.record_missing([row.bare()])
        if written:
            ledger.add_up(added_up(written))
