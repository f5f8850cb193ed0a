"""Deliberate bugs in what is on record of a call when something dies, and in how soon the job goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from sluice.domain import jobs as life
from sluice.domain.batches import RangeState
from sluice.domain.jobs import DueFor, Job, Step
from sluice.domain.pricing import LedgerRow, Spend
from sluice.ports.jobs import Due
from sluice.worker.attempt import Attempt
from sluice.worker.invocation import DONE, Ending
from sluice.worker.ledger import Ledger
from sluice.worker.range_claim import ClaimedRange
from sluice.worker.range_source import RangeSource
from tests.fakes import MINUTE, MemoryJobs
from tests.simulation.bugs_of_limits import in_place_of
from tests.simulation.deliberate import Bug, instead


async def _collected(self: Ledger, job: Job, *rows: LedgerRow) -> Job:
    for row in (*job.unbooked, *rows):
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
def _honor_leases_of_the_dead() -> Iterator[None]:
    next_step = life.next_step

    def patient(job: Job, now: int, max_attempts: int) -> Step:
        lease = job.lease
        if lease is not None and lease.until <= now < lease.until + 5 * MINUTE:
            return Step.BUSY
        return next_step(job, now, max_attempts)

    with instead(life, "next_step", patient):
        yield


async def _believe(self: Attempt) -> Ending:
    del self
    return DONE


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
    "keep_uncertain_calls_in_memory": Bug(
        "calls that may be billed are in the memory of their worker only, until it writes the next rows",
        in_place_of(Ledger, "booked", _collected),
    ),
    "let_ended_jobs_owe": Bug(
        "nobody writes the ledger rows of jobs that ended without a worker", _let_ended_jobs_owe
    ),
    "believe_that_ended_jobs_are_booked": Bug(
        "the message of an ended job is acknowledged although the ledger may lack its calls",
        in_place_of(Attempt, "_drop", _believe),
    ),
    "honor_leases_of_the_dead": Bug(
        "the job of a dead worker waits until five minutes after its lease",
        _honor_leases_of_the_dead,
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
