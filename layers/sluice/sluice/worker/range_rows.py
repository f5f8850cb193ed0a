"""The rows of one window of a range, in memory: their jobs, their requests, and the records of those that have ended.

The memory they take is bounded, whatever the rows are: the window bounds the requests, and `HELD_BYTES` the records. A
record beyond that is in a saved chunk only, and is read back when the window is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sluice.domain import jobs as life
from sluice.domain.batches import Options
from sluice.domain.errors import Stale
from sluice.domain.jobs import Job, JobError, Result, State
from sluice.domain.params import request_body
from sluice.domain.pricing import Spend
from sluice.domain.rows import Line, Row, job_record
from sluice.intake.requests import read_row
from sluice.ports.jobs import Params
from sluice.ports.world import Clock

HELD_BYTES: Final = 32 * 1024 * 1024
"""Records of saved rows kept in memory until their window is written."""

TOKEN_BYTES: Final = 4
MOST_EXPECTED_BYTES: Final = 1024 * 1024
"""The expected size of an answer is four bytes per token of `max_tokens`, up to this."""

SAVE_BYTES: Final = 8 * 1024 * 1024
SAVE_MS: Final = 2_000
"""Ended rows are saved at the latest when their records have this many bytes, or the first of them is this old."""


@dataclass(slots=True)
class Ended:
    """The record of a row that has ended: in memory, in a saved chunk, or both."""

    line: int
    size: int
    """Of the record's line, with its end."""
    text: bytes | None
    chunk: str | None = None
    """None: it is not saved yet."""
    first: int = 0
    """Its byte offset in its chunk."""


@dataclass(slots=True)
class Seat:
    """A row during the run of its window."""

    line: Line
    job: Job
    due_at: int = 0
    receive_count: int = 1
    """As of a message of the queue: grows with each wait."""
    ended: Ended | None = None
    message: str | None = None
    """Claude's answer, until the record is made from it."""
    lost: Spend = field(default_factory=Spend)
    """Its calls whose answers were lost with a worker: they count in the sums of the batch."""
    is_ending: bool = False
    """Its worker has written its end, and not yet passed the row of its last call to the ledger."""
    _billed_before: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._billed_before = _billed(self.job)

    @property
    def has_unsaved_calls(self) -> bool:
        """Return whether calls that may have been billed are in no chunk yet."""
        is_saved = self.ended is not None and self.ended.chunk is not None
        return not is_saved and _billed(self.job) != self._billed_before

    @property
    def expected_bytes(self) -> int:
        """The expected size of the answer."""
        return min(MOST_EXPECTED_BYTES, self.job.max_tokens * TOKEN_BYTES)

    @property
    def may_go_on_at(self) -> int:
        """When its next attempt may start."""
        return max(self.due_at, self.job.not_before or 0)

    @property
    def is_over_first(self) -> bool:
        """Return whether its deadline comes before that."""
        return self.job.deadline is not None and self.job.deadline < self.may_go_on_at

    @property
    def wakes_at(self) -> int:
        """When something can be done for it: its next attempt, or its end at its deadline."""
        return min(self.may_go_on_at, self.job.deadline or self.may_go_on_at)


def _billed(job: Job) -> tuple[int, ...]:
    return job.cost_micro_usd, job.unknown_costs, job.uncertain_calls


class WindowRows:
    """The rows of one window: a worker's job records, requests and answers, and what has ended and is not saved."""

    def __init__(self, clock: Clock, held_bytes: int | None = None) -> None:
        """`held_bytes` is the most that records of saved rows take; by default `HELD_BYTES`."""
        self._clock = clock
        self._most_held_bytes = held_bytes or HELD_BYTES
        self._lock = threading.Lock()
        self._seats: dict[str, Seat] = {}
        self._unsaved: list[Seat] = []
        self._unsaved_bytes = 0
        self._oldest_unsaved = 0
        self._held_bytes = 0
        self.is_closed = False
        """Another worker has the range."""
        self._starting: Callable[[Sequence[str]], None] = _nothing
        self._options = Options()

    def begin(self, options: Options) -> None:
        """Accept writes for the rows of another claim of a range."""
        self._options = options
        self.is_closed = False
        self.open(())

    def open(self, seats: Iterable[Seat]) -> None:
        """Replace the rows by those of another window."""
        self._seats = {seat.job.job_id: seat for seat in seats}
        self._unsaved, self._unsaved_bytes, self._held_bytes = [], 0, 0
        self._starting = _nothing
        for seat in self._seats.values():
            if seat.ended is not None:
                self._hold(seat.ended)

    @property
    def are_saved(self) -> bool:
        """Whether all ended rows are saved."""
        return all(seat.ended is None or seat.ended.chunk for seat in self._seats.values())

    def called(self) -> list[int]:
        """Return the byte offsets of the rows with calls that may have been billed, and are not saved."""
        return [seat.line.offset for seat in self._seats.values() if seat.has_unsaved_calls]

    def watch_starts(self, starting: Callable[[Sequence[str]], None]) -> None:
        """Call `starting`, in a thread, with the ids of rows before their requests are made."""
        self._starting = starting

    def close(self) -> None:
        """Refuse all writes from now on: another worker has the range."""
        with self._lock:
            self.is_closed = True

    def seats(self) -> list[Seat]:
        """Return all rows, in the order of their lines."""
        return list(self._seats.values())

    def unfinished(self) -> list[Seat]:
        """Return the rows that have not ended."""
        return [seat for seat in self._seats.values() if seat.ended is None]

    def seat(self, job_id: str) -> Seat:
        """Return a row."""
        return self._seats[job_id]

    def cancel(self) -> int:
        """Cancel all rows: waiting ones at once, those in flight by a flag; return how many ended."""
        with self._lock:
            now = self._clock.now()
            waiting = self.unfinished()
            for seat in waiting:
                self._set(seat, life.request_cancel(seat.job, now))
            return sum(seat.ended is not None for seat in waiting)

    def give_up(self, offsets: Collection[int], error: JobError) -> list[Job]:
        """End waiting rows as errored, and return their jobs."""
        with self._lock:
            now = self._clock.now()
            seats = [seat for seat in self.unfinished() if seat.line.offset in offsets]
            for seat in seats:
                self._set(seat, life.finish_waiting(seat.job, State.ERRORED, now, error))
            return [seat.job for seat in seats]

    # A worker's job records, requests and answers ---------------------------------------------------------------

    def get(self, job_id: str) -> Job | None:
        """Return the row's job; None when another worker has the range."""
        with self._lock:
            return None if self.is_closed else self._seats[job_id].job

    def replace(self, job: Job, expected_version: int) -> None:
        """Write the job; raises Stale."""
        with self._lock:
            if self.is_closed:
                raise Stale(None)
            seat = self._seats[job.job_id]
            if seat.job.version != expected_version:
                raise Stale(seat.job)
            seat.is_ending = job.state.is_final
            self._set(seat, job)

    def put(self, name: str, message: str) -> Result:
        """Keep the answer until its row has ended. The last answer counts: a range has one owner."""
        job_id, _, _ = name.rpartition("-")
        self._seats[job_id].message = message
        return Result()

    def probe(self) -> None:
        """Do nothing: a range tries the bucket before it runs its rows."""

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        """Return the requests of rows that are about to start, made from their lines anew: parsed, they are large."""
        self._starting(job_ids)
        if self.is_closed:
            return {}
        found = {}
        for job_id in job_ids:
            seat = self._seats[job_id]
            try:
                row = read_row(seat.line, self._options)
                if isinstance(row, Row):
                    body = request_body(row.params)
                    found[job_id] = Params(job_id, body, seat.job.request_hash)
            except Exception as error:  # noqa: BLE001 - it is the error of this row alone
                said = f"the request cannot be made: {type(error).__name__}"
                self.give_up({seat.line.offset}, JobError("invalid_request_error", said))
        return found

    # Ended rows that are not saved -----------------------------------------------------------------------------

    def released(self, job_id: str) -> None:
        """Note that the worker has done all it does for a row: the ledger has its calls, or will write them first."""
        self._seats[job_id].is_ending = False

    def all_released(self) -> None:
        """Note that no worker runs any more."""
        for job_id in self._seats:
            self.released(job_id)

    def worth_saving(self, most: int) -> bool:
        """Return whether `most` rows or many bytes are unsaved, or one of them for a while."""
        with self._lock:
            gathered = sum(not seat.is_ending for seat in self._unsaved)
            old = self._clock.now() - self._oldest_unsaved >= SAVE_MS
            is_much = gathered >= most or self._unsaved_bytes >= SAVE_BYTES
            return gathered > 0 and (is_much or old)

    def take_unsaved(self) -> list[Seat]:
        """Return the records to save next; the caller must call `saved` or `not_saved`.

        Without those whose calls are not collected for the ledger yet: a saved row is not run again, so nobody else
        would book them.
        """
        with self._lock:
            taken: list[Seat] = []
            left: list[Seat] = []
            size = 0
            for seat in self._unsaved:
                if seat.is_ending or size >= SAVE_BYTES:
                    left.append(seat)
                else:
                    taken.append(seat)
                    size += _record(seat).size
            self._unsaved = left
            self._unsaved_bytes -= size
            return taken

    def not_saved(self, seats: Sequence[Seat]) -> None:
        """Take back what could not be saved."""
        with self._lock:
            self._unsaved[:0] = seats
            self._unsaved_bytes += sum(_record(seat).size for seat in seats)

    def saved(self, seats: Sequence[Seat], chunk: str) -> None:
        """Note that rows were saved, in order, in a chunk."""
        first = 0
        for seat in seats:
            record = _record(seat)
            record.chunk, record.first = chunk, first
            first += record.size
            self._hold(record)

    def _hold(self, record: Ended) -> None:
        """Keep a saved record in memory if there is room for it."""
        if record.text is None:
            return
        if self._held_bytes + record.size > self._most_held_bytes:
            record.text = None
        else:
            self._held_bytes += record.size

    def _set(self, seat: Seat, job: Job) -> None:
        seat.job = job
        if not job.state.is_final:
            return
        line, text = seat.line, self._encoded(seat)
        seat.ended = Ended(line.number, len(text), text)
        # The memory of an ended row is free again.
        seat.message, seat.line = None, replace(line, text=b"")
        if not self._unsaved:
            self._oldest_unsaved = self._clock.now()
        self._unsaved.append(seat)
        self._unsaved_bytes += len(text)

    def _encoded(self, seat: Seat) -> bytes:
        """Return the record of a row that has ended; a result that cannot be written is an error of this row alone."""
        line = seat.line
        try:
            record = job_record(line.number, line.offset, seat.job, seat.message, seat.lost)
            return record.encoded()
        except Exception as error:  # noqa: BLE001 - the other rows must be saved
            said = f"the result cannot be written: {type(error).__name__}"
            reason = JobError("result_not_storable", said)
            seat.job = replace(seat.job, state=State.ERRORED, error=reason)
            record = job_record(line.number, line.offset, seat.job, None, seat.lost)
            return record.encoded()


def _nothing(job_ids: Sequence[str]) -> None:
    del job_ids


def _record(seat: Seat) -> Ended:
    assert seat.ended is not None
    return seat.ended
