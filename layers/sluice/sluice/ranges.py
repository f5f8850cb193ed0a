"""One range of a batch: its rows are jobs, run by the same worker as those of the queue.

The rows stand in memory, behind the worker's own ports; what has ended is saved every few rows or seconds. The range is
leased as a whole, by conditional writes. A worker that dies repeats at most the rows it had begun and not saved, and
never has more than `AT_ONCE` of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Final

from sluice.call import LONGEST_DELAY_MS
from sluice.domain import batches as life
from sluice.domain import jobs as jobs_life
from sluice.domain.batches import CLAIM_VERSIONS, Batch, RangeState, Tally, row_job_id
from sluice.domain.errors import InputGone, LeaseLost, RangeBusy, Stale, StoreBusy
from sluice.domain.jobs import Job, JobError, Result, State
from sluice.domain.pricing import LedgerRow, PriceList, Spend, utc_day
from sluice.domain.rows import (
    BadRow,
    Line,
    Record,
    Row,
    bad_row_records,
    error_line,
    job_record,
    lines,
    missing_bytes,
    read_row,
)
from sluice.ports import (
    BatchQueues,
    BatchStore,
    Blocking,
    CallBooks,
    Clock,
    Events,
    Objects,
    Params,
    Received,
    Returns,
)
from sluice.submit import NEWEST_VERSION, input_chars, request_body
from sluice.work import Worker

AT_ONCE: Final = 64
"""Rows begun and not saved: the most that a worker that dies has called in vain."""

SAVE_ROWS: Final = 25
SAVE_MS: Final = 2_000
"""What has ended is saved when there are so many rows of it, or when the first of them is so old."""

STAY_MS: Final = 60_000
"""A row that waits for no longer waits in the invocation."""

LEASE_MS: Final = 30_000
KEEP_MS: Final = 10_000
"""How often the owner renews its lease, hides its message anew, and looks whether the batch was canceled."""

HIDE_MS: Final = 40_000
"""A range whose worker died is visible again after this time at the latest, and its lease has run out then."""

TICK_MS: Final = 100
BUSY_MS: Final = 1_000

LAST_MS: Final = 10_000
"""Of the invocation, for writing down what came."""

AGAIN: Final = "the worker before died: an earlier call of this row may have been billed"


@dataclass(slots=True)
class _Seat:
    """A row while its range is run."""

    line: Line
    row: Row
    job: Job
    due_at: int = 0
    record: Record | None = None
    is_saved: bool = False
    message: str | None = None
    """Claude's answer, until the record is made of it."""


class Desk:
    """The rows of one range, as the worker's stores: job records, requests, answers, returns and ledger."""

    longest_stay_ms = STAY_MS

    def __init__(self, ledger: CallBooks, prices: PriceList, clock: Clock) -> None:
        self._ledger = ledger
        self._prices = prices
        self._clock = clock
        self._lock = threading.Lock()
        self._seats: dict[str, _Seat] = {}
        self._unsaved: list[_Seat] = []
        self._oldest_unsaved = 0
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._kept: set[str] = set()
        """Rows that have ended and keep their slot until they are saved."""
        self._again: set[str] = set()
        self._options = life.Options()
        self._is_closed = False

    def open(self, seats: Iterable[_Seat], options: life.Options, *, again: bool) -> None:
        """Lay out the rows of a range; `again`: a worker died with them."""
        self._seats = {seat.job.job_id: seat for seat in seats}
        self._unsaved = []
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._kept = set()
        self._options = options
        self._is_closed = False
        self._again = {seat.job.job_id for seat in self.unfinished()} if again else set()

    def close(self) -> None:
        """Let nothing be written any more: the range is somebody else's."""
        with self._lock:
            self._is_closed = True

    def unfinished(self) -> list[_Seat]:
        """Return the rows that have not ended."""
        return [seat for seat in self._seats.values() if seat.record is None]

    def seats(self) -> list[_Seat]:
        """Return all rows."""
        return list(self._seats.values())

    def seat(self, job_id: str) -> _Seat:
        """Return a row."""
        return self._seats[job_id]

    def messages(self) -> list[Received]:
        """Return a message for each row that has not ended, as the worker takes them."""
        return [
            Received(seat.job.job_id, "", "", seat.job.job_id, sent_at=seat.job.created_at)
            for seat in self.unfinished()
        ]

    def cancel(self) -> int:
        """Cancel all rows, those that wait at once, those at work by a flag; return how many ended."""
        with self._lock:
            now = self._clock.now()
            waiting = self.unfinished()
            for seat in waiting:
                self._set(seat, jobs_life.request_cancel(seat.job, now))
            return sum(seat.record is not None for seat in waiting)

    def give_up(self, error: JobError) -> None:
        """End all rows that nobody runs as errored."""
        with self._lock:
            now = self._clock.now()
            for seat in self.unfinished():
                self._set(seat, jobs_life.finish_waiting(seat.job, State.ERRORED, now, error))

    # What has ended and is not saved ---------------------------------------------------------------------------

    def worth_saving(self) -> bool:
        """Tell whether enough has gathered, or waited for long enough."""
        with self._lock:
            gathered = len(self._unsaved)
            old = self._clock.now() - self._oldest_unsaved >= SAVE_MS
            return gathered >= SAVE_ROWS or (gathered > 0 and old)

    def take_unsaved(self) -> list[_Seat]:
        """Return what is to be saved; it must come back by `saved` or `not_saved`."""
        with self._lock:
            unsaved, self._unsaved = self._unsaved, []
            return unsaved

    def not_saved(self, seats: Sequence[_Seat]) -> None:
        """Take back what could not be saved."""
        with self._lock:
            self._unsaved[:0] = seats

    def saved(self, seats: Sequence[_Seat]) -> None:
        """Make room for as many rows as were saved."""
        for seat in seats:
            seat.is_saved = True
            if seat.job.job_id in self._kept:
                self._kept.remove(seat.job.job_id)
                self._slots.release()

    # The worker's room -----------------------------------------------------------------------------------------

    async def enter(self, message: Received) -> None:
        """Wait until the row may be worked on."""
        del message
        await self._slots.acquire()

    def leave(self, message: Received) -> None:
        """Give the slot back, unless the row has ended: then when it is saved."""
        seat = self._seats[message.message_id]
        if seat.record is not None and not seat.is_saved:
            self._kept.add(message.message_id)
        else:
            self._slots.release()

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

    def bury(self, message: Received, reason: str) -> None:
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

    def _set(self, seat: _Seat, job: Job) -> None:
        seat.job = job
        if not job.state.is_final:
            return
        seat.record = job_record(
            seat.line.number, seat.line.offset, job, seat.message, self._other_lane(job)
        )
        # A range is held whole: what is done gives its memory back.
        seat.message, seat.row, seat.line = None, Row("", {}), replace(seat.line, text=b"")
        if not self._unsaved:
            self._oldest_unsaved = self._clock.now()
        self._unsaved.append(seat)

    def _other_lane(self, job: Job) -> int:
        if job.usage is None:
            return 0
        day = utc_day(job.finished_at or 0)
        cost = self._prices.cost_micro_usd(job.current_model, job.usage, day, batch=True)
        return cost or 0


class RowRequests:
    """The requests of the rows on a desk, made from their lines anew when they are sent."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        """Return the requests."""
        seats = {job_id: self._desk.seat(job_id) for job_id in job_ids}
        return {
            job_id: Params(job_id, request_body(seat.row.params), seat.job.request_hash)
            for job_id, seat in seats.items()
        }


@dataclass(frozen=True, slots=True)
class RangePointer:
    """What a message of the ranges queue names."""

    message: Received
    batch_id: str
    number: int


@dataclass(frozen=True, slots=True)
class RangeTools:
    """Everything a range needs of the world, beside what its rows need."""

    batches: BatchStore
    objects: Objects
    queues: BatchQueues
    returns: Returns
    text_of_job: Callable[[Job], str]
    job_of_text: Callable[[str], Job]
    clock: Clock
    blocking: Blocking
    events: Events


class RunRange:
    """The use case behind the ranges queue."""

    def __init__(self, tools: RangeTools, worker: Worker, desk: Desk) -> None:
        """`worker` is one whose stores are the desk."""
        self.tools = tools
        self.worker = worker
        self.desk = desk

    async def __call__(self, pointer: RangePointer, stop_at: int, owner: str) -> bool:
        """Run a range as far as it comes; tell whether its message is done.

        No call lasts beyond `stop_at` (epoch milliseconds). `owner` names this invocation.
        """
        batch = await self.tools.blocking(self.tools.batches.get, pointer.batch_id)
        plan = batch.plan if batch else None
        if batch is None or plan is None or pointer.number >= plan.ranges:
            await self.tools.blocking(self.tools.returns.bury, pointer.message, "no such range")
            return True
        if batch.phase is life.Phase.ENDED:
            return True
        state = await self.tools.blocking(self.tools.batches.range_state, batch, pointer.number)
        if state.done:
            await self.report(batch, state.number)
            return True
        now = self.tools.clock.now()
        try:
            claimed = life.claim_range(state, owner, now, now + LEASE_MS)
            await self.tools.blocking(self.tools.batches.replace_range, claimed, state.version)
        except RangeBusy as busy:
            await self.back(pointer, busy.until - now + 1_000)
            return False
        except Stale:
            await self.back(pointer, 1_000)
            return False
        await self.back(pointer, HIDE_MS)
        was_lost = state.owner is not None
        if was_lost:
            self.tools.events.problem(
                "range taken over",
                batch_id=batch.batch_id,
                range=state.number,
                losses=claimed.losses,
            )
        run = _Run(self, batch, claimed, pointer, owner, stop_at - LAST_MS)
        return await run.go(again=was_lost)

    # For a run of it -------------------------------------------------------------------------------------------

    async def back(self, pointer: RangePointer, delay_ms: int) -> None:
        """Make the range's message visible again after a delay."""
        await self.tools.blocking(
            self.tools.returns.put_back, [(pointer.message, max(0, delay_ms))]
        )

    async def report(self, batch: Batch, number: int, tally: Tally | None = None) -> None:
        """Count the range as done; the one that completes its section has the results joined."""
        assert batch.plan is not None  # noqa: S101 - ranges are cut by it
        if tally is None:
            part = await self.tools.blocking(self.tools.objects.get, batch.part_key(number))
            tally = tally_of(part or b"")
        section = batch.plan.section_of(number)
        progress = await self.tools.blocking(
            self.tools.batches.mark, batch.batch_id, f"section#{section:06d}", number, tally
        )
        if progress.members == len(batch.plan.members(section)):
            await self.tools.blocking(self.tools.queues.send_join, batch.batch_id, section)


class _Run:
    """One invocation's time with one range."""

    def __init__(  # noqa: PLR0913, PLR0917 - private
        self,
        runner: RunRange,
        batch: Batch,
        state: RangeState,
        pointer: RangePointer,
        owner: str,
        stop_at: int,
    ) -> None:
        self._runner = runner
        self._tools = runner.tools
        self._worker = runner.worker
        self._desk = runner.desk
        self._batch = batch
        self._state = state
        self._pointer = pointer
        self._owner = owner
        self._stop_at = stop_at
        self._bad: list[Record] = []
        self._line_count = 0
        self._chunk = 0
        self._kept_at = self._tools.clock.now()
        self._is_lost = False

    async def go(self, *, again: bool) -> bool:
        """Run what is left of the range."""
        seats = await self._laid_out()
        self._desk.open(seats, self._batch.options, again=again)
        if self._state.claims == 1:
            self._tools.events.count("JobsAccepted", len(seats))
        if life.kills_its_workers(self._state):
            reason = f"{self._state.losses} workers in a row died with this row's range"
            self._desk.give_up(JobError("worker_lost", reason))
        if self._batch.cancel_initiated_at is not None:
            self._cancel()
        before = len(self._desk.unfinished())
        rows_done = asyncio.Event()
        keeper = asyncio.create_task(self._keep(rows_done), name="keeper")
        try:
            messages = self._desk.messages()
            if messages:
                await self._worker.run(messages, self._stop_at, self._owner, self._desk)
        finally:
            # Never in the middle of a write: it would not be known whether it was done.
            rows_done.set()
            await keeper
        waiting = self._desk.unfinished()
        done = await self._written_down(
            (lambda: self._release(waiting)) if waiting else self._finish
        )
        self._tools.events.note(
            "range run",
            batch_id=self._batch.batch_id,
            range=self._state.number,
            tenant=self._batch.tenant,
            rows=before,
            left=len(waiting),
            claims=self._state.claims,
        )
        return done

    # Reading ---------------------------------------------------------------------------------------------------

    async def _laid_out(self) -> list[_Seat]:
        """Read the lines and what was saved of them."""
        records, jobs = await self._restored()
        seats: list[_Seat] = []
        first_of: dict[str, int] = {}
        try:
            found = await self._tools.blocking(self._read_lines)
        except InputGone as gone:
            start, _ = self._plan.bounds(self._state.number)
            self._bad = [Record("E", start, 0, "", Tally(invalid=1), error_line(start, str(gone)))]
            return []
        for line in found:
            self._line_count = line.number + 1
            row = read_row(line, self._batch.options)
            if isinstance(row, Row) and row.custom_id in first_of:
                message = (
                    f"custom_id {row.custom_id!r} stands at byte {first_of[row.custom_id]} already"
                )
                error = error_line(line.offset, message, row.custom_id)
                self._bad.append(Record("E", line.offset, line.number, "", Tally(invalid=1), error))
            elif isinstance(row, Row):
                first_of[row.custom_id] = line.offset
                job_id = row_job_id(self._batch.batch_id, line.offset)
                job = jobs.get(job_id) or self._job(job_id, row)
                job = replace(
                    job,
                    version=self._state.claims * CLAIM_VERSIONS,
                    request_bytes=len(line.text),
                )
                saved = records.get(line.offset)
                seats.append(_Seat(line, row, job, record=saved, is_saved=saved is not None))
            elif isinstance(row, BadRow):
                self._bad.extend(bad_row_records(line, row))
        return seats

    def _read_lines(self) -> list[Line]:
        plan, batch = self._plan, self._batch
        start, end = plan.bounds(self._state.number)
        base = max(plan.first, start - 1)
        data = self._tools.objects.read(batch.input_key, base, end - base, batch.input_etag)
        while more := missing_bytes(data, start, end, plan.first, plan.size):
            step = min(more, max(life.SAMPLE_BYTES, len(data)))
            data += self._tools.objects.read(
                batch.input_key, base + len(data), step, batch.input_etag
            )
        return list(lines(data, start, end, plan.first))

    async def _restored(self) -> tuple[dict[int, Record], dict[str, Job]]:
        records: dict[int, Record] = {}
        jobs: dict[str, Job] = {}
        for chunk in self._state.chunks:
            key = self._batch.chunk_key(self._state.number, chunk)
            text = await self._tools.blocking(self._tools.objects.get, key)
            for line in (text or b"").splitlines():
                record = Record.decoded(line)
                if record.kind == "J":
                    job = self._tools.job_of_text(record.body)
                    jobs[job.job_id] = job
                else:
                    records[record.offset] = record
        return records, jobs

    def _job(self, job_id: str, row: Row) -> Job:
        batch, options = self._batch, self._batch.options
        wanted = (row.deadline, options.deadline, batch.expires_at)
        deadline = min(each for each in wanted if each is not None)
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
            deadline=deadline,
            fallback_models=row.fallback_models or options.fallback_models,
        )

    @property
    def _plan(self) -> life.Plan:
        assert self._batch.plan is not None  # noqa: S101 - ranges are cut by it
        return self._batch.plan

    # Keeping ---------------------------------------------------------------------------------------------------

    async def _keep(self, rows_done: asyncio.Event) -> None:
        """Save what has ended, keep the lease and the message, and see a cancel, until the rows are done."""
        done = asyncio.ensure_future(rows_done.wait())
        while not self._is_lost:
            tick = asyncio.ensure_future(self._tools.clock.sleep(TICK_MS))
            await asyncio.wait({tick, done}, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                tick.cancel()
                return
            try:
                if self._desk.worth_saving():
                    await self._save()
                if self._tools.clock.now() - self._kept_at >= KEEP_MS:
                    await self._look_around()
            except StoreBusy as error:
                self._tools.events.problem("range not saved", what=error.what)
                if self._tools.clock.now() >= self._state.lease_until:
                    self._lose()
            except (Stale, LeaseLost):
                self._lose()
        done.cancel()

    def _lose(self) -> None:
        self._tools.events.problem(
            "range lost", batch_id=self._batch.batch_id, range=self._state.number
        )
        self._is_lost = True
        self._desk.close()

    async def _save(self) -> None:
        seats = self._desk.take_unsaved()
        if not seats:
            return
        self._chunk += 1
        name = f"{self._state.claims}-{self._chunk}"
        records = b"".join(seat.record.encoded() for seat in seats if seat.record)
        try:
            await self._tools.blocking(self._tools.objects.put, self._chunk_key(name), records)
            until = self._tools.clock.now() + LEASE_MS
            await self._change(life.save_chunk(self._state, self._owner, until, name))
        except BaseException:
            self._desk.not_saved(seats)
            raise
        self._desk.saved(seats)

    async def _look_around(self) -> None:
        now = self._tools.clock.now()
        await self._change(life.keep_range(self._state, self._owner, now + LEASE_MS))
        await self._runner.back(self._pointer, HIDE_MS)
        self._kept_at = now
        if self._batch.cancel_initiated_at is None:
            current = await self._tools.blocking(self._tools.batches.get, self._batch.batch_id)
            if current is not None and current.cancel_initiated_at is not None:
                self._batch = current
                self._cancel()

    def _cancel(self) -> None:
        canceled = self._desk.cancel()
        if canceled:
            self._tools.events.count("JobsCanceled", canceled)

    async def _change(self, state: RangeState) -> None:
        await self._tools.blocking(self._tools.batches.replace_range, state, self._state.version)
        self._state = state

    def _chunk_key(self, name: str) -> str:
        return self._batch.chunk_key(self._state.number, name)

    # Ending ----------------------------------------------------------------------------------------------------

    async def _written_down(self, write: Callable[[], Awaitable[bool]]) -> bool:
        """Write how the invocation ended, as often as it takes; False when the range is not ours any more.

        A store that is busy to the end leaves the range to the next worker, as if this one had died.
        """
        while not self._is_lost:
            try:
                return await write()
            except (Stale, LeaseLost):
                self._lose()
            except StoreBusy as error:
                self._tools.events.problem("range not saved", what=error.what)
                if self._tools.clock.now() >= self._stop_at + LAST_MS:
                    break
                await self._tools.clock.sleep(BUSY_MS)
        return False

    async def _finish(self) -> bool:
        """Store the range's part: all its records, in order."""
        records = [*self._bad, *(seat.record for seat in self._desk.seats() if seat.record)]
        records.sort(key=lambda record: (record.line, record.kind))
        head = Record("H", 0, 0, "", Tally(lines=self._line_count), "")
        body = b"".join(record.encoded() for record in (head, *records))
        if not self._state.done:
            await self._tools.blocking(
                self._tools.objects.put, self._batch.part_key(self._state.number), body
            )
            await self._change(life.finish_range(self._state, self._owner))
        tally = sum((record.tally for record in records), head.tally)
        await self._runner.report(self._batch, self._state.number, tally)
        return True

    async def _release(self, waiting: Sequence[_Seat]) -> bool:
        """Give the range back to its queue, or out of it when all its rows wait for long."""
        now = self._tools.clock.now()
        first = min(waiting, key=_due)
        delay = max(0, _due(first) - now)
        parks = delay > LONGEST_DELAY_MS
        if self._state.owner is not None:
            chunks = await self._saved_whole(waiting)
            released = life.release_range(
                self._state,
                self._owner,
                chunks=chunks,
                not_before=now + min(delay, jobs_life.LONGEST_PARK_MS) if parks else None,
                model=first.job.current_model if parks else None,
            )
            await self._change(released)
        if parks:
            return True
        await self._runner.back(self._pointer, delay)
        return False

    async def _saved_whole(self, waiting: Sequence[_Seat]) -> tuple[str, ...]:
        """Save all that is known of the range in one chunk, so that the next worker has little to read."""
        saved = [seat.record for seat in self._desk.seats() if seat.record]
        saved += [
            Record(
                "J",
                seat.line.offset,
                seat.line.number,
                "",
                Tally(),
                self._tools.text_of_job(seat.job),
            )
            for seat in waiting
            if _has_history(seat.job)
        ]
        if not saved:
            return ()
        self._chunk += 1
        name = f"{self._state.claims}-{self._chunk}"
        body = b"".join(record.encoded() for record in saved)
        await self._tools.blocking(self._tools.objects.put, self._chunk_key(name), body)
        return (name,)


def tally_of(part: bytes) -> Tally:
    """Return the sums of a part."""
    return sum((Record.decoded(line).tally for line in part.splitlines()), Tally())


def _due(seat: _Seat) -> int:
    return max(seat.due_at, seat.job.not_before or 0)


def _has_history(job: Job) -> bool:
    return bool(job.attempts_used or job.snoozes or job.fallbacks_used or job.not_before)
