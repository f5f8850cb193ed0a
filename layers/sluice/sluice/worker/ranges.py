"""One range of a batch: its rows are jobs, run by the same worker as those of the queue.

A range is run window by window, in the order of its lines: a window is as many rows as may be in memory at once. What
has ended is saved every few rows or seconds. A window that has ended is one object, and the range's part is put
together from those. The range is leased as a whole, by conditional writes. A worker that dies repeats at most the rows
it had started and not saved, and never has more than `AT_ONCE` of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Final, TypeVar

from sluice.domain import batches as life
from sluice.domain import jobs as jobs_life
from sluice.domain.batches import CLAIM_VERSIONS, Batch, RangeState, Tally, row_job_id
from sluice.domain.errors import InputMissing, LeaseLost, RangeBusy, Stale, StoreBusy
from sluice.domain.jobs import Job, JobError
from sluice.domain.params import NEWEST_VERSION, input_chars
from sluice.domain.rows import (
    BadRow,
    Encoded,
    Line,
    Record,
    Row,
    bad_row_records,
    error_line,
    lines,
    read_row,
    split,
)
from sluice.notices.report import report_end
from sluice.ports.batches import BatchesQueue, BatchStore, Objects
from sluice.ports.jobs import Received, Returns
from sluice.ports.world import Blocking, Clock, Events
from sluice.worker.call import LONGEST_DELAY_MS
from sluice.worker.desk import HELD_BYTES, Desk, Ended, Seat
from sluice.worker.work import Worker

T = TypeVar("T")

WINDOW_ROWS: Final = 512
WINDOW_BYTES: Final = 8 * 1024 * 1024
"""A window has so many rows and so many bytes of lines at most; one line always fits. A range as planned, of about a
hundred lines, is one window."""

WINDOW_BAD_BYTES: Final = 4 * 1024 * 1024
"""Of records about lines that cannot become rows: there may be millions of those in a range."""

REMEMBERED_IDS: Final = 100_000
"""A custom_id that an earlier row of the range has is found at once for so many rows. One beyond them is found when the
results are put together, as one of another range is."""

PIECE_BYTES: Final = 1024 * 1024
"""Read of the object at once."""

LEASE_MS: Final = 30_000
KEEP_MS: Final = 10_000
"""How often the owner renews its lease, hides its message anew, and looks whether the batch was canceled."""

HIDE_MS: Final = 40_000
"""A range whose worker died is visible again after this time at the latest, and its lease has run out then."""

NOT_READ_MS: Final = 15_000
"""A range that could not be read for a busy store is tried again after this time."""

TICK_MS: Final = 100
BUSY_MS: Final = 1_000

LAST_MS: Final = 10_000
"""Of the invocation, for writing down what came."""


@dataclass(frozen=True, slots=True)
class RangePointer:
    """What a message of the ranges queue names; None where it names nothing of ours."""

    message: Received
    batch_id: str | None
    number: int | None


@dataclass(frozen=True, slots=True)
class RangeTools:
    """Everything a range needs of the world, beside what its rows need."""

    batches: BatchStore
    objects: Objects
    queue: BatchesQueue
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
        named = await self._named(pointer)
        if isinstance(named, str):
            await self.tools.blocking(self.tools.returns.reject, pointer.message, named)
            return True
        batch, number = named
        if batch.phase is life.Phase.ENDED:
            return True
        state = await self.tools.blocking(self.tools.batches.range_state, batch, number)
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

    async def _named(self, pointer: RangePointer) -> tuple[Batch, int] | str:
        """Return the range that a message names, or why it names none."""
        number = pointer.number
        if pointer.batch_id is None or number is None:
            return "not a message of Sluice's"
        batch = await self.tools.blocking(self.tools.batches.get, pointer.batch_id)
        if batch is None or batch.plan is None or number >= batch.plan.ranges:
            return "no such range"
        return batch, number

    # For a run of it -------------------------------------------------------------------------------------------

    async def back(self, pointer: RangePointer, delay_ms: int) -> None:
        """Make the range's message visible again after a delay."""
        await self.tools.blocking(
            self.tools.returns.put_back, [(pointer.message, max(0, delay_ms))]
        )

    async def report(self, batch: Batch, number: int, tally: Tally | None = None) -> None:
        """Count the range as done; the one that completes its section has the results joined."""
        assert batch.plan is not None
        if tally is None:
            tally = await self.tools.blocking(self._stored_tally, batch.part_key(number))
        section = batch.plan.section_of(number)
        progress = await self.tools.blocking(
            self.tools.batches.mark, batch.batch_id, f"section#{section:06d}", number, tally
        )
        if progress.members == len(batch.plan.members(section)):
            await self.tools.blocking(self.tools.queue.send_join, batch.batch_id, section)

    def _stored_tally(self, part_key: str) -> Tally:
        """Return the sums of a part that is stored already."""
        sums = Sums()
        with suppress(InputMissing):
            for line in split(self.tools.objects.stream(part_key)):
                sums.add(line)
        return sums.tally


class Sums:
    """Adds up what records came to, one at a time: there may be millions."""

    def __init__(self, lines: int = 0) -> None:
        """Begin with lines that are counted already."""
        self._sums = Counter(lines=lines)

    @property
    def tally(self) -> Tally:
        """The sums so far."""
        return Tally(**self._sums)

    def add(self, line: bytes) -> bytes:
        """Add a record's line, and return it."""
        for name, number in Encoded.of(line).counts().items():
            self._sums[name] += number
        return line


@dataclass(slots=True)
class _Saved:
    """What earlier workers saved of rows whose windows have not ended."""

    records: dict[int, Ended] = field(default_factory=dict)
    """By the byte offset of their lines."""
    jobs: dict[str, Job] = field(default_factory=dict)
    reach: dict[str, int] = field(default_factory=dict)
    """The last byte offset of a record in each chunk."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Rows of a range that are in memory at once, and what is wrong with the lines between them."""

    seats: Sequence[Seat]
    bad: Sequence[Record]
    end_at: int
    """The byte offset at which the next window begins."""
    lines: int
    """Lines of the range up to its end."""
    is_last: bool
    others: Sequence[Ended] = ()
    """Records of rows whose lines cannot be read any more."""


class _Windows:
    """Reads a range line by line and splits it into windows. Every worker gets the same windows."""

    def __init__(
        self,
        objects: Objects,
        batch: Batch,
        state: RangeState,
        saved: _Saved,
        make_job: Callable[[str, Row], Job],
    ) -> None:
        self._objects = objects
        self._batch = batch
        self._state = state
        self._saved = saved
        self._make_job = make_job
        assert batch.plan is not None
        self._plan = batch.plan
        self._start, self._end = self._plan.bounds(state.number)
        self._lines = lines(self._pieces(), self._start, self._end, self._plan.first)
        self._next: Line | None = None
        self._count = 0
        self._offset_of: dict[str, int] = {}

    def next(self) -> _Window:
        """Read the next window; raises InputMissing."""
        seats: list[Seat] = []
        bad: list[Record] = []
        text_bytes = bad_bytes = 0
        while True:
            line = self._next or next(self._lines, None)
            self._next = None
            if line is None:
                return _Window(seats, bad, self._end, self._count, is_last=True)
            is_full = len(seats) >= WINDOW_ROWS or text_bytes + len(line.text) > WINDOW_BYTES
            if (is_full and seats) or bad_bytes > WINDOW_BAD_BYTES:
                self._next = line
                return _Window(seats, bad, line.offset, self._count, is_last=False)
            found = self._read(line)
            self._count = line.number + 1
            if line.offset < self._state.resume_at:
                # Of a window that has ended: only its custom_id is of interest still.
                continue
            if isinstance(found, Seat):
                seats.append(found)
                text_bytes += len(found.line.text)
            else:
                bad += found
                bad_bytes += sum(len(record.body) + _RECORD_BYTES for record in found)

    def gone(self, problem: str) -> _Window:
        """Return what is left to say when the object cannot be read any more: no saved answer is lost."""
        others = self._saved.records.values()
        count = max([self._state.resume_line, *(each.line + 1 for each in others)])
        error = error_line(self._start, problem)
        bad = Record("E", self._start, count, "", Tally(invalid=1), error)
        return _Window((), [bad], self._end, count, is_last=True, others=list(others))

    def _read(self, line: Line) -> Seat | list[Record]:
        row = read_row(line, self._batch.options)
        if row is None:
            return []
        if isinstance(row, BadRow):
            return bad_row_records(line, row)
        before = self._offset_of.get(row.custom_id)
        if before is not None:
            message = f"custom_id {row.custom_id!r} was already used by the row at byte {before}"
            error = error_line(line.offset, message, row.custom_id)
            return [Record("E", line.offset, line.number, "", Tally(invalid=1), error)]
        if len(self._offset_of) < REMEMBERED_IDS:
            self._offset_of[row.custom_id] = line.offset
        job_id = row_job_id(self._batch.batch_id, line.offset)
        job = self._saved.jobs.pop(job_id, None) or self._make_job(job_id, row)
        job = replace(
            job, version=self._state.claims * CLAIM_VERSIONS, request_bytes=len(line.text)
        )
        ended = self._saved.records.pop(line.offset, None)
        return Seat(replace(line, text=b"") if ended else line, job, ended=ended)

    def _pieces(self) -> Iterator[bytes]:
        """Read from the byte before the range to its end, and on as long as somebody asks."""
        at = max(self._plan.first, self._start - 1)
        beyond = life.SAMPLE_BYTES
        while at < self._plan.size:
            if at < self._end:
                size = min(PIECE_BYTES, self._end - at)
            else:
                size = min(beyond, self._plan.size - at)
                beyond = min(2 * beyond, PIECE_BYTES)
            piece = self._objects.read(self._batch.input_key, at, size, self._batch.input_etag)
            if not piece:
                return
            yield piece
            at += len(piece)


_RECORD_BYTES: Final = 200
"""About what a record takes in memory beside its body."""


class _NotRead(Exception):
    """The store was busy while a range was read; nothing that is in memory would be lost."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


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
        self._saved = _Saved()
        self._chunk = 0
        self._kept_at = self._tools.clock.now()
        self._saving = asyncio.Lock()
        self._changing = threading.Lock()
        self._rows_run = False
        self._is_lost = False
        self._tally: Tally | None = None
        """Of the whole range, once its part is stored."""

    async def go(self, *, again: bool) -> bool:
        """Run what is left of the range."""
        over = asyncio.Event()
        keeper = asyncio.create_task(self._keep(over), name="keeper")
        try:
            return await self._run(again=again)
        except _NotRead as error:
            self._tools.events.problem("range not read", what=error.what)
            return await self._written_down(self._give_back)
        finally:
            # Never in the middle of a write: it would not be known whether it was done.
            over.set()
            await keeper

    async def _run(self, *, again: bool) -> bool:
        self._saved = await self._read(self._restored)
        windows = _Windows(self._tools.objects, self._batch, self._state, self._saved, self._job_of)
        is_first = True
        rows = 0
        while True:
            try:
                window = await self._read(windows.next)
            except InputMissing as error:
                window = windows.gone(str(error))
            rows += await self._rows_of(window, again=again and is_first, is_first=is_first)
            waiting = self._desk.unfinished()
            if waiting:
                done = await self._written_down(partial(self._release, waiting))
                break
            if window.is_last:
                done = await self._written_down(partial(self._finish, window))
                break
            if not await self._written_down(partial(self._end_window, window)):
                return False
            self._desk.open((), self._batch.options)
            if self._tools.clock.now() >= self._stop_at:
                done = await self._written_down(partial(self._release, waiting))
                break
            is_first = False
        self._tools.events.note(
            "range run",
            batch_id=self._batch.batch_id,
            range=self._state.number,
            tenant=self._batch.tenant,
            rows=rows,
            left=len(waiting),
            claims=self._state.claims,
        )
        return done

    async def _rows_of(self, window: _Window, *, again: bool, is_first: bool) -> int:
        """Run the rows of a window as far as they come; return how many there were to run."""
        self._desk.open(
            window.seats,
            self._batch.options,
            again=again,
            state=self._state,
            note=self._note_running,
        )
        if self._is_lost:
            self._desk.close()
        if self._state.claims == 1 or not is_first:
            self._tools.events.count("JobsAccepted", len(window.seats))
        await self._give_up_killers()
        if self._batch.cancel_initiated_at is not None:
            self._cancel()
        messages = self._desk.messages()
        if messages and not self._is_lost:
            self._rows_run = True
            try:
                await self._worker.run(messages, self._stop_at, self._owner, self._desk)
            finally:
                self._rows_run = False
        return len(messages)

    async def _give_up_killers(self) -> None:
        """End rows that no worker survives."""
        killers = life.killers(self._state)
        if not killers:
            return
        # In a batch's results the type of an error is one of Anthropic's: the message names ours.
        reason = f"{life.MOST_LOST_ALONE} workers died while each ran nothing but this row"
        error = JobError("worker_lost", f"worker_lost: {reason}; it is not tried again")
        # Before they end: no later call of theirs will say that these may be billed.
        await self._read(partial(self._desk.account_for_lost, killers))
        for job in self._desk.give_up(killers, error):
            report_end(self._tools.events, job)

    # Reading ---------------------------------------------------------------------------------------------------

    async def _read(self, read: Callable[[], T]) -> T:
        try:
            return await self._tools.blocking(read)
        except StoreBusy as error:
            raise _NotRead(error.what) from error

    def _restored(self) -> _Saved:
        """Read what earlier workers saved, holding no more of it than a desk holds."""
        saved = _Saved()
        held = 0
        for chunk in self._state.chunks[self._state.windows :]:
            first = 0
            # A chunk that is missing has outlived its retention: its rows run again.
            with suppress(InputMissing):
                for line in split(self._tools.objects.stream(self._chunk_key(chunk))):
                    record, size = Encoded.of(line), len(line) + 1
                    saved.reach[chunk] = max(saved.reach.get(chunk, 0), record.offset)
                    if record.kind == "J":
                        job = self._tools.job_of_text(record.body.decode())
                        saved.jobs[job.job_id] = job
                    else:
                        held += size
                        text = line + b"\n" if held <= HELD_BYTES else None
                        ended = Ended(record.line, size, text, chunk, first)
                        saved.records[record.offset] = ended
                    first += size
        return saved

    def _job_of(self, job_id: str, row: Row) -> Job:
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

    # Keeping ---------------------------------------------------------------------------------------------------

    async def _keep(self, over: asyncio.Event) -> None:
        """Save what has ended, keep the lease and the message, and see a cancel, until all is over."""
        done = asyncio.ensure_future(over.wait())
        while not self._is_lost:
            tick = asyncio.ensure_future(self._tools.clock.sleep(TICK_MS))
            await asyncio.wait({tick, done}, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                tick.cancel()
                return
            try:
                if self._desk.worth_saving():
                    await self._save()
                if set(self._state.running) - set(self._desk.running()):
                    # Back from their calls alive: they are not to be blamed for what comes now.
                    await self._change(self._as_running)
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
        """Save what has ended, one chunk after the other, until nothing is left to save."""
        async with self._saving:
            while seats := self._desk.take_unsaved():
                name = self._new_name()
                try:
                    texts = (seat.ended.text for seat in seats if seat.ended)
                    body = b"".join(text for text in texts if text is not None)
                    await self._tools.blocking(self._tools.objects.put, self._chunk_key(name), body)
                    until = self._tools.clock.now() + LEASE_MS
                    rows = {seat.line.offset for seat in seats}
                    await self._change(
                        partial(
                            life.save_chunk,
                            owner=self._owner,
                            lease_until=until,
                            chunk=name,
                            rows=rows,
                        )
                    )
                except BaseException:
                    self._desk.not_saved(seats)
                    raise
                self._desk.saved(seats, name)

    async def _look_around(self) -> None:
        now = self._tools.clock.now()
        await self._change(partial(life.keep_range, owner=self._owner, lease_until=now + LEASE_MS))
        await self._runner.back(self._pointer, HIDE_MS)
        self._kept_at = now
        if self._batch.cancel_initiated_at is None:
            current = await self._tools.blocking(self._tools.batches.get, self._batch.batch_id)
            if current is not None and current.cancel_initiated_at is not None:
                self._batch = current
                if self._rows_run:
                    self._cancel()

    def _cancel(self) -> None:
        canceled = self._desk.cancel()
        if canceled:
            self._tools.events.count("JobsCanceled", canceled)

    async def _change(self, change: Callable[[RangeState], RangeState]) -> None:
        """Write the range's state anew."""
        await self._tools.blocking(self._change_now, change)

    def _change_now(self, change: Callable[[RangeState], RangeState]) -> None:
        """Write the range's state anew; one after the other, for each is a change of the one before."""
        with self._changing:
            changed = change(self._state)
            if changed is self._state:
                return
            self._tools.batches.replace_range(changed, self._state.version)
            self._state = changed

    def _as_running(self, state: RangeState) -> RangeState:
        return life.note_running(state, self._owner, self._desk.running())

    def _note_running(self) -> None:
        """Record which rows are in flight; raises Stale when the range is somebody else's."""
        if self._is_lost:
            raise Stale(None)
        try:
            self._change_now(self._as_running)
        except (Stale, LeaseLost):
            self._lose()
            raise Stale(None) from None

    def _new_name(self) -> str:
        self._chunk += 1
        return f"{self._state.claims}-{self._chunk}"

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

    async def _end_window(self, window: _Window) -> bool:
        """Store a window that has ended as one chunk, in order, in the place of those it was saved in."""
        await self._save()
        name = self._new_name()
        await self._tools.blocking(self._write, self._chunk_key(name), self._records(window))
        await self._change(
            partial(
                life.end_window,
                owner=self._owner,
                lease_until=self._tools.clock.now() + LEASE_MS,
                window=name,
                others=self._of_later_rows(window.end_at),
                resume_at=window.end_at,
                resume_line=window.lines,
            )
        )
        return True

    async def _finish(self, window: _Window) -> bool:
        """Store the range's part: the records of all windows, in order, and how many lines there are."""
        await self._save()
        sums = Sums(window.lines)
        if not self._state.done:
            key = self._batch.part_key(self._state.number)
            await self._tools.blocking(self._write, key, self._part(window, sums))
            await self._change(partial(life.finish_range, owner=self._owner))
            self._tally = sums.tally
        await self._runner.report(self._batch, self._state.number, self._tally)
        return True

    def _part(self, window: _Window, sums: Sums) -> Iterator[bytes]:
        for name in self._state.chunks[: self._state.windows]:
            for line in split(self._tools.objects.stream(self._chunk_key(name))):
                yield sums.add(line) + b"\n"
        for text in self._records(window):
            yield sums.add(text)
        # Last, because the count is known only now. Readers of a part accept it at any position.
        yield Record("H", 0, window.lines, "", Tally(lines=window.lines), "").encoded()

    def _records(self, window: _Window) -> Iterator[bytes]:
        """Yield a window's records in the order of their lines, a result behind the error of the same line."""
        ended = [*window.others, *(seat.ended for seat in self._desk.seats() if seat.ended)]
        found: list[tuple[int, str, Ended | Record]] = [
            *((each.line, "R", each) for each in ended),
            *((each.line, each.kind, each) for each in window.bad),
        ]
        for _, _, each in sorted(found, key=lambda one: one[:2]):
            yield each.encoded() if isinstance(each, Record) else self._text(each)

    def _text(self, ended: Ended) -> bytes:
        """Return a record, from its chunk if it was too much to hold."""
        if ended.text is not None:
            return ended.text
        key = self._chunk_key(ended.chunk or "")
        return self._tools.objects.read(key, ended.first, ended.size)

    def _write(self, key: str, texts: Iterable[bytes]) -> None:
        """Write an object piece by piece."""
        writer = self._tools.objects.writer(key)
        try:
            for text in texts:
                writer.write(text)
            writer.close()
        finally:
            writer.abort()

    def _of_later_rows(self, offset: int) -> list[str]:
        """Return the chunks that hold records of rows from an offset on."""
        chunks = self._state.chunks[self._state.windows :]
        return [chunk for chunk in chunks if self._saved.reach.get(chunk, 0) >= offset]

    async def _give_back(self) -> bool:
        """Give the range back as it is: a busy store is not the death of a worker, nor the fault of a row."""
        await self._change(
            partial(life.release_range, owner=self._owner, chunks=self._state.chunks)
        )
        await self._runner.back(self._pointer, NOT_READ_MS)
        return False

    async def _release(self, waiting: Sequence[Seat]) -> bool:
        """Give the range back to its queue, or out of it when all its rows wait for long."""
        now = self._tools.clock.now()
        first = min(waiting, key=_due, default=None)
        delay = max(0, _due(first) - now) if first else 0
        parks = first is not None and delay > LONGEST_DELAY_MS
        if self._state.owner is not None:
            await self._save()
            chunks = await self._saved_whole(waiting)
            await self._change(
                partial(
                    life.release_range,
                    owner=self._owner,
                    chunks=chunks,
                    not_before=now + min(delay, jobs_life.LONGEST_PARK_MS) if parks else None,
                    model=first.job.current_model if parks and first else None,
                )
            )
        if parks:
            return True
        await self._runner.back(self._pointer, delay)
        return False

    async def _saved_whole(self, waiting: Sequence[Seat]) -> tuple[str, ...]:
        """Save all that is known of the window in one chunk, so that the next worker has little to read."""
        ended = [seat.ended for seat in self._desk.seats() if seat.ended]
        jobs = [seat for seat in waiting if _has_history(seat.job)]
        end_at = max((seat.line.offset + 1 for seat in self._desk.seats()), default=0)
        kept = (*self._state.chunks[: self._state.windows], *self._of_later_rows(end_at))
        if not ended and not jobs:
            return kept
        name = self._new_name()
        texts = chain(map(self._text, ended), map(self._job_record, jobs))
        await self._tools.blocking(self._write, self._chunk_key(name), texts)
        return (*kept, name)

    def _job_record(self, seat: Seat) -> bytes:
        text = self._tools.text_of_job(seat.job)
        return Record("J", seat.line.offset, seat.line.number, "", Tally(), text).encoded()


def _due(seat: Seat) -> int:
    return max(seat.due_at, seat.job.not_before or 0)


def _has_history(job: Job) -> bool:
    return bool(job.attempts_used or job.snoozes or job.fallbacks_used or job.not_before)
