"""The ledger of a worker: every row that is written is in the sums."""

import asyncio
from collections.abc import Callable
from datetime import date
from typing import Any

from sluice.domain.pricing import LedgerRow, Spend
from sluice.worker.ledger import Ledger
from tests.fakes import MemoryLedger, RecordingEvents


def a_row(number: int) -> LedgerRow:
    return LedgerRow(
        tenant="acme",
        day=date(2026, 11, 20),
        call_id=f"job_{number}#1",
        job_id=f"job_{number}",
        model="claude-a",
        lane="live",
        organization="org",
        key_id="key",
        request_id=None,
        outcome="succeeded",
        spend=Spend(calls=1, cost_micro_usd=number),
        certain=True,
        note=None,
    )


def test_a_row_booked_while_others_are_added_up_is_in_the_sums() -> None:
    books = MemoryLedger()

    async def blocking(call: Callable[..., Any], *args: Any) -> Any:
        # Slower than all that the other task does.
        await asyncio.sleep(0.05 if call == books.record_missing else 0)
        return call(*args)

    ledger = Ledger(books, blocking, RecordingEvents())  # type: ignore[arg-type]

    async def story() -> None:
        booking = asyncio.create_task(ledger.book([a_row(1)]))
        await asyncio.sleep(0)
        ledger.account(a_row(20))
        await ledger.keep()
        assert await booking
        await ledger.keep()

    asyncio.run(story())

    (spend,) = books.sums.values()
    assert (2, 21) == (spend.calls, spend.cost_micro_usd)
