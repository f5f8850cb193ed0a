"""The desk: the rows of one window of a range, in memory, behind the worker's own ports.

What is on it is bounded, whatever the rows are: the window bounds the requests, `ANSWERS_BYTES` the answers expected at
once, and `HELD_BYTES` the records of rows that have ended. A record beyond that is in a saved chunk only, and is read
back when the window is written.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Final

from sluice.domain import batches as life
from sluice.domain import jobs as jobs_life
from sluice.domain.batches import RangeState
from sluice.domain.errors import Stale
from sluice.domain.jobs import Job, JobError, Result, State
from sluice.domain.params import request_body
from sluice.domain.pricing import LedgerRow, PriceList, Spend, Usage, utc_day
from sluice.domain.rows import Line, Row, job_record, read_row
from sluice.ports.jobs import CallBooks, Params, Received
from sluice.ports.world import Clock

AT_ONCE: Final = 64
"""Maximum rows started and not yet saved, and so the maximum calls that are repeated if the worker dies."""

ANSWERS_BYTES: Final = 24 * 1024 * 1024
"""Maximum expected size of the answers of all rows started and not yet saved; one row may always start."""

TOKEN_BYTES: Final = 4
MOST_EXPECTED_BYTES: Final = 1024 * 1024
"""An answer is expected to have four bytes per token of `max_tokens`, and no more than this."""

HELD_BYTES: Final = 32 * 1024 * 1024
"""Records of saved rows kept in memory until their window is written."""

SAVE_ROWS: Final = 25
SAVE_BYTES: Final = 8 * 1024 * 1024
SAVE_MS: Final = 2_000
"""What has ended is saved when there are so many rows of it, so many bytes, or when the first of them is so old."""

STAY_MS: Final = 60_000
"""A row that waits for no longer waits in the invocation."""

AGAIN: Final = "the worker before died: an earlier call of this row may have been billed"


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
    """Where it begins in its chunk."""


@dataclass(slots=True)
class Seat:
    """A row while its window is run."""

    line: Line
    job: Job
    due_at: int = 0
    ended: Ended | None = None
    message: str | None = None
    """Claude's answer, until the record is made of it."""

    @property
    def expected_bytes(self) -> int:
        """About how large the answer may be."""
        return min(MOST_EXPECTED_BYTES, self.job.max_tokens * TOKEN_BYTES)


class Desk:
    """The rows of one window, as the worker's stores: job records, requests, answers, returns and ledger."""

    longest_stay_ms = STAY_MS

    def __init__(self, ledger: CallBooks, prices: PriceList, clock: Clock) -> None:
        self._ledger = ledger
        self._prices = prices
        self._clock = clock
        self._lock = threading.Lock()
        self._seats: dict[str, Seat] = {}
        self._unsaved: list[Seat] = []
        self._unsaved_bytes = 0
        self._oldest_unsaved = 0
        self._held_bytes = 0
        self._door = asyncio.Lock()
        """Rows begin one after the other, in their order."""
        self._at_door = 0
        self._room_made = asyncio.Event()
        self._begun = 0
        self._expected_bytes = 0
        self._losses = 0
        self._suspects: set[str] | None = None
        """Rows that the search for a killer has to run. None: all of the window."""
        self._suspects_waiting: set[str] = set()
        """Those of them that wait for longer than this invocation: the search is not over, but goes on without them."""
        self._apart: set[str] = set()
        """Rows that lost a worker while they ran alone. They run last, and alone again."""
        self._is_apart = False
        """One of those has the room."""
        self._started: set[str] = set()
        """Rows whose requests may be in memory, or their answers, unsaved."""
        self._note: Callable[[], None] | None = None
        self._kept: set[str] = set()
        """Rows that have ended and keep their place until they are saved."""
        self._again: set[str] = set()
        self._is_closed = False
        self.options = life.Options()

    def open(
        self,
        seats: Iterable[Seat],
        options: life.Options,
        *,
        again: bool = False,
        state: RangeState | None = None,
        note: Callable[[], None] | None = None,
    ) -> None:
        """Lay out the rows of a window; `again`: a worker died with them.

        If workers were lost by `state`, fewer rows run at once, in the end one: if it is their size that kills the
        workers, they fit, and if it is one of them, it is found. While that goes on, `note` is called, in a thread,
        before a row that was not `running` is.
        """
        self._seats = {seat.job.job_id: seat for seat in seats}
        self._unsaved, self._unsaved_bytes, self._held_bytes = [], 0, 0
        self._door, self._room_made = asyncio.Lock(), asyncio.Event()
        self._at_door = self._begun = self._expected_bytes = 0
        self._kept = set()
        self._started = set()
        self._is_apart = self._is_closed = False
        self.options = options
        for seat in self._seats.values():
            if seat.ended is not None:
                self._hold(seat.ended)
        self._again = {seat.job.job_id for seat in self.unfinished()} if again else set()
        self._note = note
        self._losses = state.losses if state else 0
        self._suspects = self._ids(state.suspects) if state and state.suspects else None
        self._suspects_waiting = set()
        self._apart = self._ids(state.blamed) if state else set()

    def _ids(self, offsets: Collection[int]) -> set[str]:
        return {seat.job.job_id for seat in self.unfinished() if seat.line.offset in offsets}

    def close(self) -> None:
        """Let nothing be written any more: the range is somebody else's."""
        with self._lock:
            self._is_closed = True

    def unfinished(self) -> list[Seat]:
        """Return the rows that have not ended."""
        return [seat for seat in self._seats.values() if seat.ended is None]

    def seats(self) -> list[Seat]:
        """Return all rows, in the order of their lines."""
        return list(self._seats.values())

    def seat(self, job_id: str) -> Seat:
        """Return a row."""
        return self._seats[job_id]

    def messages(self) -> list[Received]:
        """Return a message for each row that has not ended, as the worker takes them: suspects first, killers last."""
        suspects = self._suspects or set()
        in_order = sorted(
            self.unfinished(),
            key=lambda seat: (seat.job.job_id in self._apart, seat.job.job_id not in suspects),
        )
        return [
            Received(seat.job.job_id, "", "", seat.job.job_id, sent_at=seat.job.created_at)
            for seat in in_order
        ]

    def cancel(self) -> int:
        """Cancel all rows, those that wait at once, those at work by a flag; return how many ended."""
        with self._lock:
            now = self._clock.now()
            waiting = self.unfinished()
            for seat in waiting:
                self._set(seat, jobs_life.request_cancel(seat.job, now))
            return sum(seat.ended is not None for seat in waiting)

    def account_for_lost(self, offsets: Collection[int]) -> None:
        """Have the ledger name the calls of rows that are to be given up; again is the same."""
        day = utc_day(self._clock.now())
        self._ledger.record(
            [
                LedgerRow(
                    tenant=seat.job.tenant,
                    day=day,
                    call_id=f"{seat.job.job_id}#lost",
                    job_id=seat.job.job_id,
                    model=seat.job.current_model,
                    lane=seat.job.lane,
                    organization=None,
                    key_id="",
                    request_id=None,
                    outcome="worker_lost",
                    spend=Spend.of_call(Usage(), 0),
                    certain=False,
                    note="workers died during calls of this row",
                )
                for seat in self.unfinished()
                if seat.line.offset in offsets
            ]
        )

    def give_up(self, offsets: Collection[int], error: JobError) -> list[Job]:
        """End rows that nobody runs as errored, and return their jobs."""
        with self._lock:
            now = self._clock.now()
            seats = [seat for seat in self.unfinished() if seat.line.offset in offsets]
            for seat in seats:
                self._set(seat, jobs_life.finish_waiting(seat.job, State.ERRORED, now, error))
            return [seat.job for seat in seats]

    # What has ended and is not saved ---------------------------------------------------------------------------

    def worth_saving(self) -> bool:
        """Tell whether enough has gathered, or waited for long enough."""
        with self._lock:
            gathered = len(self._unsaved)
            old = self._clock.now() - self._oldest_unsaved >= SAVE_MS
            # Nobody is to wait for a place that is kept for a row that has ended.
            most = min(SAVE_ROWS, 1 if self._is_apart else self._at_once())
            is_much = gathered >= most or self._unsaved_bytes >= SAVE_BYTES
            return is_much or (gathered > 0 and old)

    def take_unsaved(self) -> list[Seat]:
        """Return what is to be saved next; it must come back by `saved` or `not_saved`."""
        with self._lock:
            taken = size = 0
            for seat in self._unsaved:
                size += _record(seat).size
                taken += 1
                if size >= SAVE_BYTES:
                    break
            unsaved, self._unsaved = self._unsaved[:taken], self._unsaved[taken:]
            self._unsaved_bytes -= size
            return unsaved

    def not_saved(self, seats: Sequence[Seat]) -> None:
        """Take back what could not be saved."""
        with self._lock:
            self._unsaved[:0] = seats
            self._unsaved_bytes += sum(_record(seat).size for seat in seats)

    def saved(self, seats: Sequence[Seat], chunk: str) -> None:
        """Make room for as many rows as were saved, one after the other, in a chunk."""
        first = 0
        for seat in seats:
            record = _record(seat)
            record.chunk, record.first = chunk, first
            first += record.size
            self._hold(record)
            self._clear(seat.job.job_id)
            if seat.job.job_id in self._kept:
                self._kept.remove(seat.job.job_id)
                self._make_room(seat)

    def _hold(self, record: Ended) -> None:
        """Keep a saved record in memory as far as there is room for it."""
        if record.text is None:
            return
        if self._held_bytes + record.size > HELD_BYTES:
            record.text = None
        else:
            self._held_bytes += record.size

    # The worker's room -----------------------------------------------------------------------------------------

    async def enter(self, message: Received) -> None:
        """Wait until the row may be worked on."""
        seat = self._seats[message.message_id]
        if message.message_id in self._apart:
            while self._begun or self._at_door:
                await self._something_leaves()
            self._is_apart = True
            self._take_room(seat)
            return
        self._at_door += 1
        try:
            async with self._door:
                while not self._has_room(seat):
                    await self._something_leaves()
                self._take_room(seat)
        finally:
            self._at_door -= 1
            self._room_made.set()

    def leave(self, message: Received) -> None:
        """Give the place back, unless the row has ended: then when it is saved."""
        seat = self._seats[message.message_id]
        if seat.ended is not None and seat.ended.chunk is None:
            self._kept.add(message.message_id)
        else:
            self._make_room(seat)

    async def _something_leaves(self) -> None:
        self._room_made.clear()
        await self._room_made.wait()

    def _at_once(self) -> int:
        """Return how many rows may be in flight: fewer during a search for a killer."""
        if self._suspects is not None and not self._suspects:
            return AT_ONCE
        return max(1, AT_ONCE >> 2 * self._losses)

    def _has_room(self, seat: Seat) -> bool:
        if self._is_apart or self._begun >= self._at_once():
            return False
        return not self._begun or self._expected_bytes + seat.expected_bytes <= ANSWERS_BYTES

    def _take_room(self, seat: Seat) -> None:
        self._begun += 1
        self._expected_bytes += seat.expected_bytes

    def _make_room(self, seat: Seat) -> None:
        with self._lock:
            self._started.discard(seat.job.job_id)
        self._is_apart = False
        self._begun -= 1
        self._expected_bytes -= seat.expected_bytes
        self._room_made.set()

    # The search for rows that kill their workers ---------------------------------------------------------------

    def starting(self, job_ids: Sequence[str]) -> None:
        """Have rows noted as running, before anything is made of them, if that may be what kills the worker."""
        if self._note is None or not (self._is_apart or self._losses):
            return
        with self._lock:
            self._started.update(job_ids)
        self._note()

    def running(self) -> tuple[int, ...]:
        """Return the byte offsets of the rows that were noted and are not saved, nor back from their calls."""
        with self._lock:
            seats = [seat for job_id, seat in self._seats.items() if job_id in self._started]
            return tuple(
                seat.line.offset for seat in seats if seat.ended is None or seat.ended.chunk is None
            )

    def _clear(self, job_id: str) -> None:
        """Take a row that has ended out of the search; it is over with the last one."""
        if self._suspects is None:
            return
        self._suspects.discard(job_id)
        self._suspects_waiting.discard(job_id)
        if not self._suspects and not self._suspects_waiting:
            self._losses = 0

    # The worker's stores ---------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job | None:
        """Return the row's job; None once the range is somebody else's."""
        with self._lock:
            return None if self._is_closed else self._seats[job_id].job

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Job]:
        """Return the rows' jobs."""
        return {job_id: job for job_id in job_ids if (job := self.get(job_id)) is not None}

    def replace(self, job: Job, expected_version: int) -> None:
        """Write the job; raises Stale."""
        with self._lock:
            if self._is_closed:
                raise Stale(None)
            seat = self._seats[job.job_id]
            if seat.job.version != expected_version:
                raise Stale(seat.job)
            self._set(seat, job)

    def put(self, name: str, message: str) -> Result:
        """Keep the answer until its row has ended. A range has one owner: the last call's answer is the row's."""
        job_id, _, _ = name.rpartition("-")
        self._seats[job_id].message = message
        return Result()

    def receive(self, most: int, hidden_ms: int) -> Sequence[Received]:
        """Give nothing: all rows are there from the start, and wait in the room."""
        del most, hidden_ms
        return ()

    def delete(self, messages: Sequence[Received]) -> None:
        """Do nothing: a row has no message but the range's."""

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        """Do nothing: the range's message is kept hidden with its lease."""

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Note when rows want to go on that do not wait here."""
        now = self._clock.now()
        for message, delay in delays:
            self._seats[message.message_id].due_at = now + delay
            if self._suspects and message.message_id in self._suspects:
                # Others need not wait for it.
                self._suspects.remove(message.message_id)
                self._suspects_waiting.add(message.message_id)

    def reject(self, message: Received, reason: str) -> None:
        """Never happens: all messages are our own rows."""
        raise AssertionError(f"{message.message_id}: {reason}")

    def record(self, rows: Sequence[LedgerRow]) -> None:
        """Write ledger rows, saying which calls may repeat one of a worker that died."""
        noted = [
            replace(row, note="; ".join(filter(None, (row.note, AGAIN))))
            if row.job_id in self._again
            else row
            for row in rows
        ]
        self._ledger.record(noted)
        self._again -= {row.job_id for row in rows}

    def add_up(self, sums: Mapping[tuple[str, date, str, str], Spend]) -> None:
        """Add to the sums."""
        self._ledger.add_up(sums)

    def _set(self, seat: Seat, job: Job) -> None:
        seat.job = job
        if not job.state.is_final:
            return
        line = seat.line
        record = job_record(line.number, line.offset, job, seat.message, self._other_lane(job))
        text = record.encoded()
        seat.ended = Ended(line.number, len(text), text)
        # What is done gives its memory back.
        seat.message, seat.line = None, replace(line, text=b"")
        if not self._unsaved:
            self._oldest_unsaved = self._clock.now()
        self._unsaved.append(seat)
        self._unsaved_bytes += len(text)

    def _other_lane(self, job: Job) -> int:
        if job.usage is None:
            return 0
        day = utc_day(job.finished_at or 0)
        cost = self._prices.cost_micro_usd(job.current_model, job.usage, day, batch=True)
        return cost or 0


class RowRequests:
    """The requests of the rows on a desk, made from their lines anew when they are sent: parsed, they are large."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        """Return the requests."""
        self._desk.starting(job_ids)
        found = {}
        for job_id in job_ids:
            seat = self._desk.seat(job_id)
            row = read_row(seat.line, self._desk.options)
            if isinstance(row, Row):
                found[job_id] = Params(job_id, request_body(row.params), seat.job.request_hash)
        return found


def _record(seat: Seat) -> Ended:
    assert seat.ended is not None
    return seat.ended
