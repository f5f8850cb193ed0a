"""A claimed range: its record, and its objects: chunks with the records of saved rows, whole windows, and its part."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Final

from sluice.domain.batches import (
    CLAIM_VERSIONS,
    Batch,
    RangeState,
    Tally,
    claim_of,
    end_window,
    finish_range,
    keep_range,
    note_reading,
    note_running,
    release_range,
    save_chunk,
)
from sluice.domain.capacity import Backlog
from sluice.domain.errors import InputMissing, LeaseLost
from sluice.domain.jobs import Job, lost_row
from sluice.domain.pricing import LedgerRow, Spend, added_up, utc_day
from sluice.domain.rows import Encoded, Record, split
from sluice.ports.batches import BatchStore, Joins, Objects
from sluice.ports.jobs import CallBooks, Returns
from sluice.ports.swap import swap
from sluice.ports.world import Blocking, Clock, Events
from sluice.worker.range_rows import HELD_BYTES, Ended, Seat
from sluice.worker.range_windows import Saved, Window

LEASE_MS: Final = 30_000
KEEP_MS: Final = 10_000
"""How often the owner renews its lease, hides its message anew, and checks whether the batch was canceled."""

HIDE_MS: Final = 40_000
"""Visibility timeout of a range's message. The lease of a dead worker has run out when the message is visible again."""

assert 2 * KEEP_MS < LEASE_MS < HIDE_MS

INVOCATION_MS: Final = 900_000
"""The longest invocation: the calls of a worker are no older than this when its lease ends."""

LAST_CALLS: Final = frozenset({"succeeded", "canceled", "worker_lost"})
"""Outcomes in the ledger after which a worker made no other call for a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimTools:
    """The ports of a claimed range."""

    batches: BatchStore
    objects: Objects
    ledger: CallBooks
    text_of_job: Callable[[Job], str]
    job_of_text: Callable[[str], Job]
    clock: Clock
    events: Events


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeTools(ClaimTools):
    """The ports of a range, besides those of its rows."""

    queue: Joins
    backlog: Callable[[], Backlog]
    """Of the ranges queue."""
    returns: Returns
    blocking: Blocking


@dataclass(frozen=True, slots=True)
class RangeWait:
    """How a range waits that is returned."""

    until: int
    """When its message is visible again or, if it is parked, sent again (epoch milliseconds)."""
    is_parked: bool = False
    model: str | None = None
    """The model whose limits a parked range waits for; None: it goes on at once then."""


class Sums:
    """Adds up records, one at a time: there may be millions."""

    def __init__(self, lines: int = 0) -> None:
        """Start from lines that are counted already."""
        self._sums = Counter(lines=lines)

    @property
    def tally(self) -> Tally:
        """The sums so far."""
        return Tally.of(self._sums)

    def add(self, line: bytes) -> bytes:
        """Add a record's line, and return it."""
        for name, number in Encoded.of(line).counts().items():
            self._sums[name] += number
        return line


def stored_tally(objects: Objects, part_key: str) -> Tally:
    """Return the sums of a part that is stored already."""
    sums = Sums()
    with suppress(InputMissing):
        for line in split(objects.stream(part_key)):
            sums.add(line)
    return sums.tally


class ClaimedRange:
    """A range under the lease of one invocation. All methods block.

    The record is written on the condition that no other worker took the lease; otherwise a write raises LeaseLost.
    """

    def __init__(self, tools: ClaimTools, batch: Batch, state: RangeState, owner: str) -> None:
        self.state = state
        self._tools = tools
        self._objects = tools.objects
        self._batch = batch
        self._owner = owner
        self._changing = threading.Lock()
        self._written = 0
        self._reach: dict[str, int] = {}
        """The last byte offset of a record in each chunk."""

    # The lease --------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Renew it."""
        self._change(lambda state: keep_range(state, self._owner, self._until))

    def note_running(
        self, running: Callable[[], Sequence[int]], called: Callable[[], Sequence[int]]
    ) -> None:
        """Record which rows are in flight at the time of the write, and which wait with calls that are not saved."""

        def noted(state: RangeState) -> RangeState:
            in_flight = running()
            waiting = [row for row in called() if row not in in_flight]
            return note_running(state, self._owner, in_flight, waiting)

        self._change(noted)

    def note_reading(self, line: int | None) -> None:
        """Record which line is read next, if a line may have killed a worker."""
        if self.state.is_stuck:
            self._change(lambda state: note_reading(state, self._owner, line))

    def release(
        self,
        wait: RangeWait,
        chunks: Sequence[str],
        *,
        dropped: bool = False,
        called: Collection[int] = (),
    ) -> None:
        """Return the range with its saved chunks; `dropped`: answers could not be saved; `called`: nor waiting rows."""
        self._change(
            lambda state: release_range(
                state,
                self._owner,
                chunks=chunks,
                expected_at=wait.until,
                not_before=wait.until if wait.is_parked else None,
                model=wait.model,
                dropped=dropped,
                called=called,
            )
        )

    @property
    def _until(self) -> int:
        """When a lease that is renewed now runs out."""
        return self._tools.clock.now() + LEASE_MS

    def _change(self, rule: Callable[[RangeState], RangeState]) -> None:
        """Write changes one after the other, for each is a change of the one before."""
        with self._changing:
            changed = rule(self.state)
            if changed is self.state:
                return
            if swap(self._tools.batches.replace_range, changed, self.state.version) != changed:
                raise LeaseLost(f"{changed.batch_id}, range {changed.number}")
            self.state = changed

    def probe(self) -> None:
        """Raise StoreBusy if the bucket takes no writes."""
        self._write(self._key("probe"), ())

    # Rows that have ended ---------------------------------------------------------------------------------------

    def restored(self) -> Saved:
        """Read what earlier workers saved, keeping no more records in memory than a window does."""
        saved = Saved()
        held = 0
        for chunk in self.state.chunks[self.state.windows :]:
            first = 0
            # A chunk that is missing has outlived its retention: its rows run again.
            with suppress(InputMissing):
                for line in split(self._objects.stream(self._key(chunk))):
                    record, size = Encoded.of(line), len(line) + 1
                    self._reach[chunk] = max(self._reach.get(chunk, 0), record.offset)
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

    def lost_calls(self, job: Job, offset: int) -> Spend:
        """Return the sums of a row's calls under claims whose workers were lost; the ledger then has each of them.

        What a worker booked before it died is known. Unless that ended the row, or the row waited, one more call may
        have been in flight.
        """
        lost = {claim: at for row, claim, at in self.state.lost if row == offset}
        unsaved = {claim: at for row, claim, at in self.state.unsaved if row == offset}
        spent = Spend()
        for claim, at in (unsaved | lost).items():
            days = sorted({utc_day(at - INVOCATION_MS), utc_day(at)})
            calls = self._tools.ledger.calls_of(job.tenant, days, job.job_id)
            booked = [row for row in calls if claim_of(row.call_id) == claim]
            if claim in lost and not any(row.outcome in LAST_CALLS for row in booked):
                booked.append(self._lost_row(job, claim, at))
            spent = sum((row.spend for row in booked), spent)
        return spent

    def _lost_row(self, job: Job, claim: int, at: int) -> LedgerRow:
        """Book a call that may have been in flight when the worker of a claim died."""
        # Not the version of any call: the first one has the next.
        call = f"{claim * CLAIM_VERSIONS}"
        row = lost_row(
            job, call, job.current_model, at, "the worker died during the call, or before it"
        )
        if written := self._tools.ledger.record_missing([row]):
            self._tools.ledger.add_up(added_up(written))
        return row

    def save(self, seats: Sequence[Seat]) -> str:
        """Save the records of rows that have ended in another chunk; return its name."""
        texts = (seat.ended.text for seat in seats if seat.ended)
        name = self._write_chunk(text for text in texts if text is not None)
        rows = {seat.line.offset for seat in seats}
        self._change(
            lambda state: save_chunk(state, self._owner, self._until, chunk=name, rows=rows)
        )
        return name

    def end_window(self, window: Window, ended: Sequence[Ended]) -> None:
        """Save a window as one chunk, in order, which replaces those it was saved in."""
        name = self._write_chunk(self._records(window, ended))
        self._change(
            lambda state: end_window(
                state,
                self._owner,
                self._until,
                name,
                others=self._of_later_rows(window.end_at),
                resume_at=window.end_at,
                resume_line=window.lines,
            )
        )

    def finish(self, window: Window, ended: Sequence[Ended]) -> Tally:
        """Store the range's part: the records of all windows, in order, and how many lines there are."""
        sums = Sums(window.lines)
        self._write(self._batch.part_key(self.state.number), self._part(window, ended, sums))
        self._change(lambda state: finish_range(state, self._owner))
        return sums.tally

    def saved_whole(
        self, ended: Sequence[Ended], waiting: Sequence[Seat], end_at: int
    ) -> Sequence[str]:
        """Save the records of a window, and the jobs that wait, in one chunk; return all chunks that are needed now.

        So the next worker has little to read. The window ends at a byte offset.
        """
        kept = [*self.state.chunks[: self.state.windows], *self._of_later_rows(end_at)]
        if ended or waiting:
            texts = chain(map(self._text, ended), map(self._job_record, waiting))
            kept.append(self._write_chunk(texts))
        return kept

    # Objects ----------------------------------------------------------------------------------------------------

    def _of_later_rows(self, offset: int) -> list[str]:
        """Return the chunks that hold records of rows from an offset on."""
        chunks = self.state.chunks[self.state.windows :]
        return [chunk for chunk in chunks if self._reach.get(chunk, 0) >= offset]

    def _part(self, window: Window, ended: Sequence[Ended], sums: Sums) -> Iterator[bytes]:
        for name in self.state.chunks[: self.state.windows]:
            for line in split(self._objects.stream(self._key(name))):
                yield sums.add(line) + b"\n"
        for text in self._records(window, ended):
            yield sums.add(text)
        # Last, because the count is known only now. Readers of a part accept it at any position.
        yield Record("H", 0, window.lines, "", Tally(lines=window.lines), "").encoded()

    def _records(self, window: Window, ended: Sequence[Ended]) -> Iterator[bytes]:
        """Yield a window's records in the order of their lines, a result behind the error of the same line."""
        found: list[tuple[int, str, Ended | Record]] = [
            *((each.line, "R", each) for each in (*window.others, *ended)),
            *((each.line, each.kind, each) for each in window.bad),
        ]
        for _, _, each in sorted(found, key=lambda one: one[:2]):
            yield each.encoded() if isinstance(each, Record) else self._text(each)

    def _text(self, ended: Ended) -> bytes:
        """Return a record, from its chunk if it was too much to hold."""
        if ended.text is not None:
            return ended.text
        return self._objects.read(self._key(ended.chunk or ""), ended.first, ended.size)

    def _job_record(self, seat: Seat) -> bytes:
        text = self._tools.text_of_job(seat.job)
        return Record("J", seat.line.offset, seat.line.number, "", Tally(), text).encoded()

    def _write(self, key: str, texts: Iterable[bytes]) -> None:
        """Write an object piece by piece."""
        writer = self._objects.writer(key)
        try:
            for text in texts:
                writer.write(text)
            writer.close()
        finally:
            writer.abort()

    def _write_chunk(self, texts: Iterable[bytes]) -> str:
        self._written += 1
        name = f"{self.state.claims}-{self._written}"
        self._write(self._key(name), texts)
        return name

    def _key(self, name: str) -> str:
        return self._batch.chunk_key(self.state.number, name)
