"""Deliberate bugs in files, and in what keeps one tenant's trouble from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from sluice.bulk import plan
from sluice.bulk.assemble import Assemble
from sluice.domain import batches as domain
from sluice.domain.batches import Batch, Plan, RangeState
from sluice.domain.breakers import Breaker
from sluice.domain.errors import InputMissing, StoreBusy
from sluice.domain.jobs import DueFor
from sluice.domain.keys import UpstreamKey
from sluice.domain.retries import UNSENDABLE, Failure
from sluice.intake.batches import Batches
from sluice.ports.batches import DueRange, Stored
from sluice.ports.jobs import Due
from sluice.upkeep.resume import Resume
from sluice.worker import range_rows, ranges
from sluice.worker.keys import KeyChoice
from sluice.worker.ledger import Ledger
from sluice.worker.newcomers import RunRanges
from sluice.worker.range_claim import ClaimedRange
from sluice.worker.range_rows import WindowRows
from sluice.worker.range_windows import Saved, Windows
from sluice.worker.ranges import RunRange
from tests.bulk_fakes import MemoryBatches, MemoryObjects
from tests.fakes import MemoryJobs
from tests.simulation.bugs_of_limits import in_place_of, judged, nothing
from tests.simulation.deliberate import Bug, instead


@contextmanager
def _claim_a_leased_range() -> Iterator[None]:
    good = domain.claim_range

    def claim(state: RangeState, owner: str, now: int, lease_until: int) -> RangeState:
        return good(replace(state, lease_until=0), owner, now, lease_until)

    with instead(ranges, "claim_range", claim):
        yield


async def _no_newcomer(self: RunRanges) -> None:
    del self


async def _never_reported(self: RunRange, *_: object) -> None:
    del self


def _restored_nothing(self: ClaimedRange) -> Saved:
    del self
    return Saved()


@contextmanager
def _join_again() -> Iterator[None]:
    good, report = MemoryObjects.head, RunRange.report

    def head(self: MemoryObjects, key: str) -> Stored | None:
        return None if key.endswith(".index") else good(self, key)

    async def twice(self: RunRange, *facts: Any) -> None:
        await report(self, *facts)
        await report(self, *facts)

    with instead(MemoryObjects, "head", head), instead(RunRange, "report", twice):
        yield


@contextmanager
def _mix_answers_up() -> Iterator[None]:
    good = WindowRows.put

    def put(self: WindowRows, name: str, message: str) -> Any:
        first = self.seats()[0].job.job_id
        return good(self, f"{first}-{name.rpartition('-')[2]}", message)

    with instead(WindowRows, "put", put):
        yield


@contextmanager
def _skip_a_row_at_a_border() -> Iterator[None]:
    good = Plan.bounds

    def bounds(self: Plan, number: int) -> tuple[int, int]:
        start, end = good(self, number)
        return start, end - 1 if number + 1 < self.ranges else end

    with instead(Plan, "bounds", bounds):
        yield


@contextmanager
def _run_a_row_at_a_border_twice() -> Iterator[None]:
    good = Plan.bounds

    def bounds(self: Plan, number: int) -> tuple[int, int]:
        start, end = good(self, number)
        return start, min(self.size, end + 20)

    with instead(Plan, "bounds", bounds):
        yield


def _found_for_anybody(self: Batches, batch_id: str) -> Batch:
    batch: Batch | None = self._batches.get(batch_id)
    assert batch is not None
    return batch


@contextmanager
def _record_no_cost() -> Iterator[None]:
    good: Callable[..., Any] = vars(range_rows)["job_record"]

    def record(line: int, offset: int, job: Any, *rest: Any) -> Any:
        return good(line, offset, replace(job, cost_micro_usd=0), *rest)

    with instead(range_rows, "job_record", record):
        yield


@contextmanager
def _take_busy_for_missing() -> Iterator[None]:
    good = Windows.next

    def next_one(self: Windows) -> Any:
        try:
            return good(self)
        except StoreBusy as busy:
            raise InputMissing(busy.what) from busy

    with instead(Windows, "next", next_one):
        yield


@contextmanager
def _read_the_oldest_only() -> Iterator[None]:
    good = MemoryJobs.due

    def due(self: MemoryJobs, why: DueFor, now: int, limit: int) -> Sequence[Due]:
        return good(self, why, now, 10_000)[:limit]

    with instead(MemoryJobs, "due", due):
        yield


@contextmanager
def _read_the_oldest_ranges_only() -> Iterator[None]:
    good = MemoryBatches.due

    def due(self: MemoryBatches, now: int, share: int) -> Sequence[DueRange]:
        return good(self, now, 10_000)[:share]

    with instead(MemoryBatches, "due", due):
        yield


def _as_a_lost_connection(failure: Failure, _: dict[str, Any]) -> Failure:
    is_local = failure.type == UNSENDABLE
    return replace(failure, type="connection_failed") if is_local else failure


@contextmanager
def _take_a_local_error_for_upstreams() -> Iterator[None]:
    # Breakers that concern only the tenant whose requests fail would make it harmless for the others.
    with judged(_as_a_lost_connection), instead(Breaker, "concerns", lambda *_: True):
        yield


@contextmanager
def _copy_what_ends_last() -> Iterator[None]:
    def latest(self: MemoryBatches, batch: Batch) -> str:
        del self
        return batch.batch_id

    def copy(self: MemoryObjects, source: Stored, key: str, rank: str) -> bool:
        del rank
        self.copy(source, key)
        return True

    with (
        instead(MemoryBatches, "latest_of_name", latest),
        instead(MemoryObjects, "copy_latest", copy),
    ):
        yield


def _rejected_with_another(self: KeyChoice, key: UpstreamKey) -> bool:
    del key
    return any(mark.rejected for mark in self._marks.values())


BUGS_OF_FILES: Final[Mapping[str, Bug]] = {
    "never_run_newcomers": Bug(
        "a small new batch waits for a free worker",
        in_place_of(RunRanges, "_newcomer", _no_newcomer),
    ),
    "claim_a_leased_range": Bug(
        "a range is claimed although another worker has its lease", _claim_a_leased_range
    ),
    "forget_to_keep_a_range": Bug(
        "the lease of a range is not renewed", in_place_of(ClaimedRange, "keep", nothing)
    ),
    "never_report_a_range": Bug(
        "a range that is done is not counted", in_place_of(RunRange, "report", _never_reported)
    ),
    "drop_saved_rows": Bug(
        "what earlier workers saved of a range is dropped",
        in_place_of(ClaimedRange, "restored", _restored_nothing),
    ),
    "join_again": Bug("a range is reported twice, and its section joined twice", _join_again),
    "tell_nobody_of_a_batch": Bug(
        "nobody is notified of the end of a batch", in_place_of(Assemble, "notify", nothing)
    ),
    "mix_answers_up": Bug("a row is given the answer of another row", _mix_answers_up),
    "skip_a_row_at_a_border": Bug(
        "a row that begins at the border of two ranges is in neither", _skip_a_row_at_a_border
    ),
    "run_a_row_at_a_border_twice": Bug(
        "a row that begins at the border of two ranges is in both", _run_a_row_at_a_border_twice
    ),
    "find_batches_for_anybody": Bug(
        "a tenant can read and cancel another's batch",
        in_place_of(Batches, "get", _found_for_anybody),
    ),
    "one_folder_for_a_name": Bug(
        "what a batch owns is stored under the file's name, not under the batch's id",
        in_place_of(Batch, "folder", property(lambda batch: f"batches/{batch.name}/")),
    ),
    "copy_what_ends_last": Bug(
        "under a file's name are the results of the batch that ended last", _copy_what_ends_last
    ),
    "copy_nothing": Bug(
        "results are not copied to their file's name", in_place_of(Assemble, "_copy_out", nothing)
    ),
    "ignore_the_cancel_of_a_batch": Bug(
        "a cancel does not end the rows of a range that runs",
        in_place_of(WindowRows, "cancel", lambda _: 0),
    ),
    "record_no_cost": Bug("the results of rows have no cost", _record_no_cost),
    "keep_no_books_of_rows": Bug(
        "the calls of rows are in no ledger",
        in_place_of(Ledger, "_recorded", lambda _, rows: rows),
    ),
    "never_resume_a_range": Bug(
        "parked ranges are not sent again", in_place_of(Resume, "_send", lambda *_: False)
    ),
    "never_check_a_batch": Bug(
        "batches whose messages were lost are not planned",
        in_place_of(Resume, "_check", lambda *_: False),
    ),
    "look_for_no_lost_range": Bug(
        "ranges whose messages were lost are not sent again",
        in_place_of(plan, "lost_ranges", lambda *_, **__: []),
    ),
    "let_parked_ranges_sleep": Bug(
        "parked ranges of a canceled or expired batch wait for limits",
        in_place_of(plan, "is_over", lambda *_: False),
    ),
    "take_busy_for_missing": Bug(
        "a bucket that is busy is taken for a file that was deleted", _take_busy_for_missing
    ),
    "read_the_oldest_only": Bug("due jobs are read oldest first only", _read_the_oldest_only),
    "read_the_oldest_ranges_only": Bug(
        "due ranges are read oldest first only", _read_the_oldest_ranges_only
    ),
    "take_a_local_error_for_upstreams": Bug(
        "a request that cannot be sent counts as a failure of the endpoint, for all tenants",
        _take_a_local_error_for_upstreams,
    ),
    "reject_all_keys": Bug(
        "a rejected key takes the others of the pool with it",
        in_place_of(KeyChoice, "is_rejected", _rejected_with_another),
    ),
}
