"""Deliberate bugs in what is on record of a call when something dies, and in how soon the job goes on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from sluice.domain.batches import RangeState
from sluice.domain.jobs import DueFor, Job
from sluice.domain.pricing import LedgerRow, Spend
from sluice.ports.jobs import Due
from sluice.worker.ledger import Ledger
from sluice.worker.queue_source import QueueSource
from sluice.worker.range_claim import ClaimedRange
from sluice.worker.range_source import RangeSource
from tests.fakes import MemoryJobs
from tests.simulation.bugs_of_limits import in_place_of
from tests.simulation.deliberate import Bug, instead


async def _owes_nothing(self: Ledger, job: Job, *rows: LedgerRow) -> Job:
    """As before: what the ledger does not accept is in this worker's memory only."""
    if not await self.book((*job.unbooked, *rows)):
        for row in rows:
            self.account(row)
    return replace(job, unbooked=())


@contextmanager
def _let_ended_jobs_owe() -> Iterator[None]:
    due = MemoryJobs.due

    def others(store: MemoryJobs, why: DueFor, now: int, limit: int) -> Sequence[Due]:
        return [] if why is DueFor.BOOKS else due(store, why, now, limit)

    with instead(MemoryJobs, "due", others):
        yield


@contextmanager
def _delete_before_booking() -> Iterator[None]:
    keep = QueueSource.keep

    async def at_once(self: QueueSource, unwritten: Collection[str], *, last: bool = False) -> bool:
        del unwritten
        return await keep(self, (), last=last)

    with instead(QueueSource, "keep", at_once):
        yield


def _nothing_lost(self: ClaimedRange, job: Job, offset: int) -> Spend:
    del self, job, offset
    return Spend()


def _as_uncertain(self: ClaimedRange, job: Job, offset: int) -> Spend:
    """As if the ledger had none of the calls."""
    del job
    return Spend(calls=1, uncertain_calls=1) if _is_lost(self.state, offset) else Spend()


def _is_lost(state: RangeState, offset: int) -> bool:
    return any(row == offset for row, *_ in state.lost)


def _unnoted(self: RangeSource, job_ids: Sequence[str]) -> None:
    if self.is_searching:
        with self._lock:
            self._noted.update(job_ids)
        self._note_running()


BUGS_OF_THE_LEDGER: Final[Mapping[str, Bug]] = {
    "keep_owed_rows_in_memory": Bug(
        "what a busy ledger does not accept is only in the memory of the worker",
        in_place_of(Ledger, "booked", _owes_nothing),
    ),
    "let_ended_jobs_owe": Bug(
        "nobody writes the ledger rows of jobs that ended without a worker", _let_ended_jobs_owe
    ),
    "delete_before_booking": Bug(
        "messages are deleted although the ledger lacks their jobs' calls", _delete_before_booking
    ),
    "forget_the_rows_of_a_dead_worker": Bug(
        "the calls of rows whose worker died are in no sum",
        in_place_of(ClaimedRange, "lost_calls", _nothing_lost),
    ),
    "forget_what_was_booked": Bug(
        "calls that a dead worker had booked are taken for uncertain ones",
        in_place_of(ClaimedRange, "lost_calls", _as_uncertain),
    ),
    "start_rows_unnoted": Bug(
        "rows are called before their range's record names them",
        in_place_of(RangeSource, "_starting", _unnoted),
    ),
}
