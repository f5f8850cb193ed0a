"""Splits a range into windows: as many rows as may be in memory at once, in the order of their lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sluice.domain.batches import (
    CLAIM_VERSIONS,
    MOST_LOST_READING,
    SAMPLE_BYTES,
    Batch,
    RangeState,
    Tally,
    row_job_id,
    unreadable,
)
from sluice.domain.jobs import Job
from sluice.domain.params import NEWEST_VERSION, input_chars
from sluice.domain.pricing import Spend
from sluice.domain.rows import (
    BadRow,
    Line,
    Record,
    Row,
    bad_row_records,
    error_line,
    lines,
)
from sluice.intake.requests import read_row
from sluice.ports.batches import Objects
from sluice.ports.world import Events
from sluice.worker.range_rows import Ended, Seat

WINDOW_ROWS: Final = 512
WINDOW_BYTES: Final = 8 * 1024 * 1024
"""Maximum rows and bytes of lines of a window; one line always fits. A range as planned, of about a hundred lines, is
one window."""

WINDOW_BAD_BYTES: Final = 4 * 1024 * 1024
"""Maximum bytes of records of bad rows: a range may have millions of them."""

PIECE_BYTES: Final = 1024 * 1024
"""Bytes of the object read at once."""

DEADLY: Final = f"{MOST_LOST_READING} workers died while they read this line; it is not read again"

_RECORD_BYTES: Final = 200
"""Approximate memory of a record besides its body."""


@dataclass(slots=True)
class Saved:
    """Saved results of rows whose windows have not ended, from earlier workers."""

    records: dict[int, Ended] = field(default_factory=dict)
    """By the byte offset of their lines."""
    jobs: dict[str, Job] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of a range that are in memory at once, and the errors of the lines between them."""

    seats: Sequence[Seat]
    bad: Sequence[Record]
    end_at: int
    """The byte offset at which the next window begins."""
    lines: int
    """Number of lines of the range up to its end."""
    is_last: bool
    others: Sequence[Ended] = ()
    """Records of rows whose lines can no longer be read."""


class Windows:
    """Reads a range line by line and splits it into windows. Every worker gets the same windows."""

    def __init__(  # noqa: PLR0913, PLR0917 - a range, what is known of it, and where it is
        self,
        objects: Objects,
        batch: Batch,
        state: RangeState,
        saved: Saved,
        make_job: Callable[[str, Row], Job],
        lost_calls: Callable[[Job, int], Spend],
        note_reading: Callable[[int | None], None],
        events: Events,
    ) -> None:
        """`lost_calls` returns the sums of a row's calls whose answers were lost, by its job and byte offset."""
        self._batch = batch
        self._state = state
        self._saved = saved
        self._make_job = make_job
        self._lost_calls = lost_calls
        self._note_reading = note_reading
        self._events = events
        self._unreadable = unreadable(state)
        assert batch.plan is not None
        self._start, self._end = batch.plan.bounds(state.number)
        self._lines = range_lines(objects, batch, state.number)
        self._next: Line | None = None
        self._count = 0

    def next(self) -> Window:
        """Read the next window; raises InputMissing."""
        window = self._next_window()
        self._note_reading(None)
        return window

    def _next_window(self) -> Window:
        seats: list[Seat] = []
        bad: list[Record] = []
        text_bytes = bad_bytes = 0
        while True:
            line = self._next or next(self._lines, None)
            self._next = None
            if line is None:
                return Window(seats, bad, self._end, self._count, is_last=True)
            is_full = len(seats) >= WINDOW_ROWS or text_bytes + len(line.text) > WINDOW_BYTES
            if (is_full and seats) or bad_bytes > WINDOW_BAD_BYTES:
                self._next = line
                return Window(seats, bad, line.offset, self._count, is_last=False)
            self._count = line.number + 1
            if line.offset < self._state.resume_at:
                # Of an ended window.
                continue
            self._note_reading(line.offset)
            found = self._found(line)
            if isinstance(found, Seat):
                seats.append(found)
                text_bytes += len(found.line.text)
            else:
                bad += found
                bad_bytes += sum(len(record.body) + _RECORD_BYTES for record in found)

    def unreadable(self, problem: str) -> Window:
        """Return the rest of the range if the object can no longer be read: no saved answer is lost."""
        others = self._saved.records.values()
        count = max([self._state.resume_line, *(each.line + 1 for each in others)])
        error = error_line(self._start, problem)
        bad = Record("E", self._start, count, "", Tally(invalid=1), error)
        return Window((), [bad], self._end, count, is_last=True, others=list(others))

    def _found(self, line: Line) -> Seat | list[Record]:
        """Return the row of a line; any exception is the error of this line alone."""
        if line.offset in self._unreadable:
            return bad_row_records(line, BadRow(DEADLY))
        try:
            found = self._read(line)
        except Exception as error:  # noqa: BLE001 - the other lines of the range must run
            self._events.problem("row not read", batch_id=self._batch.batch_id, offset=line.offset)
            return bad_row_records(line, BadRow(f"the line cannot be read: {type(error).__name__}"))
        if isinstance(found, Seat) and found.ended is None:
            # Not an error of the line if the ledger is busy.
            found.lost = self._lost_calls(found.job, line.offset)
        return found

    def _read(self, line: Line) -> Seat | list[Record]:
        row = read_row(line, self._batch.options)
        if row is None:
            return []
        if isinstance(row, BadRow):
            return bad_row_records(line, row)
        job_id = row_job_id(self._batch.batch_id, line.offset)
        job = self._saved.jobs.pop(job_id, None) or self._make_job(job_id, row)
        job = replace(
            job, version=self._state.claims * CLAIM_VERSIONS, request_bytes=len(line.text)
        )
        ended = self._saved.records.pop(line.offset, None)
        if ended is not None:
            return Seat(replace(line, text=b""), job, ended=ended)
        return Seat(line, job)


def job_of_row(batch: Batch, job_id: str, row: Row) -> Job:
    """Return the job of a row that was never called."""
    options = batch.options
    wanted = (row.deadline, options.deadline, batch.expires_at)
    return Job(
        job_id=job_id,
        tenant=batch.tenant,
        model=str(row.params["model"]),
        created_at=batch.created_at,
        request_hash="",
        input_chars=input_chars(row.params),
        max_tokens=int(row.params["max_tokens"]),
        anthropic_version=options.anthropic_version or NEWEST_VERSION,
        anthropic_beta=options.anthropic_beta,
        custom_id=row.custom_id,
        deadline=min(each for each in wanted if each is not None),
        fallback_models=row.fallback_models or options.fallback_models,
    )


def range_lines(
    objects: Objects, batch: Batch, number: int, last: int | None = None
) -> Iterator[Line]:
    """Yield the lines of a range, or of all to the last one; at most one is in memory. Raises InputMissing."""
    assert batch.plan is not None
    start, end = batch.plan.bounds(number)
    if last is not None:
        _, end = batch.plan.bounds(last)
    return lines(_pieces(objects, batch, start, end), start, end, batch.plan.first)


def _pieces(objects: Objects, batch: Batch, start: int, end: int) -> Iterator[bytes]:
    """Read from the byte before the range to its end, and further on demand."""
    assert batch.plan is not None
    at = max(batch.plan.first, start - 1)
    beyond = SAMPLE_BYTES
    while at < batch.plan.size:
        if at < end:
            size = min(PIECE_BYTES, end - at)
        else:
            size = min(beyond, batch.plan.size - at)
            beyond = min(2 * beyond, PIECE_BYTES)
        piece = objects.read(batch.input_key, at, size, batch.input_etag)
        if not piece:
            return
        yield piece
        at += len(piece)
