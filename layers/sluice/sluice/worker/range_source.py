"""The rows of one window of a range as a source: which of them may run now.

The number of rows that run at once is limited, so that their answers fit into memory and few calls are repeated if the
worker dies. After lost workers even fewer run, in the end one: then the rows fit if their size kills the workers, and
if one row kills them, it is found. Rows that lost a worker while they ran alone run last, and alone again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from sluice.domain.batches import RangeState
from sluice.domain.capacity import ROWS_AT_ONCE
from sluice.domain.limits import DRAINED_MS
from sluice.domain.waits import ROW_STAY_MS, Place, place_of, window_of
from sluice.ports.jobs import Received
from sluice.ports.world import Clock
from sluice.worker.range_rows import Seat, WindowRows
from sluice.worker.source import Held, Taken

LOOK_MS: Final = 1_000
"""Pause between two checks whether a range waits behind the rows in memory."""

assert LOOK_MS < DRAINED_MS

ANSWERS_BYTES: Final = 24 * 1024 * 1024
"""Maximum expected size of the answers of all rows started and not yet saved; one row may always start."""

SAVE_ROWS: Final = 25
"""Ended rows are saved at the latest when there are this many."""


class RangeSource:
    """The source with the rows of one window, for one run of a worker."""

    def __init__(  # noqa: PLR0913, PLR0917 - a window, its time, and what its range does for it
        self,
        rows: WindowRows,
        state: RangeState,
        clock: Clock,
        stop_at: int,
        check_lease: Callable[[], None],
        note_running: Callable[[], None],
        note_drained: Callable[[], Awaitable[None]],
    ) -> None:
        """Before rows start, `check_lease` may raise StoreBusy, and `note_running` is called, both in a thread."""
        self._rows = rows
        self._clock = clock
        self._started = clock.now()
        self._stop_at = stop_at
        self._check_lease = check_lease
        self._note_running = note_running
        self._note_drained = note_drained
        """Called while rows wait and no other row of the range waits behind them."""
        self._check_at = 0
        self._lock = threading.Lock()
        self._held: Held | None = None
        self._batch_id = state.batch_id
        self._losses = state.losses
        self._suspects = self._ids(state.suspects) if state.suspects else None
        """Rows that the search for a killer must run. None: all of the window."""
        self._suspects_waiting: set[str] = set()
        """Those of them that wait longer than this invocation; until they run, the search is not finished."""
        self._apart = self._ids(state.blamed)
        """Rows that run alone."""
        self._ready = self._in_order()
        self._resting: list[Seat] = []
        self._running: dict[str, Seat] = {}
        """Rows in flight, and ended rows that are not saved."""
        self._expected_bytes = 0
        self._is_apart = False
        """A row runs alone."""
        self._noted: set[str] = set()
        """Rows whose requests or unsaved answers may be in memory."""
        rows.watch_starts(self._starting)

    @property
    def count(self) -> int:
        """The number of rows to run."""
        return len(self._ready)

    @property
    def save_at(self) -> int:
        """The number of unsaved rows at which they must be saved, so that no row waits for the slot of an ended one."""
        return min(SAVE_ROWS, 1 if self._is_apart else self._at_once())

    # The worker's source ----------------------------------------------------------------------------------------

    async def take(self, held: Held) -> Sequence[Taken]:
        """Wait for rows that may run now."""
        self._held = held
        while True:
            if seats := self._next_rows():
                return [self._taken(seat) for seat in seats]
            due_at = min((seat.due_at for seat in self._resting), default=None)
            if not held.count and due_at is None and not self._waits_for_saving():
                return ()
            await held.change(await self._looked(held, due_at))

    async def _looked(self, held: Held, due_at: int | None) -> int | None:
        """Check whether a range waits behind these rows, if it is time; return when to continue at the latest."""
        if self._ready or not held.waiting:
            return due_at
        now = self._clock.now()
        if now >= self._check_at:
            self._check_at = now + LOOK_MS
            await self._note_drained()
        return self._check_at if due_at is None else min(due_at, self._check_at)

    def done(self, message: Received) -> None:
        """Keep the slot of an ended row until it is saved."""
        self._rows.released(message.message_id)
        seat = self._rows.seat(message.message_id)
        if seat.ended is None or seat.ended.chunk is not None:
            self._leave(seat)

    def give_back(self, message: Received, until: int) -> None:
        """Keep a row waiting in the invocation, or leave it to a later one."""
        self._rows.released(message.message_id)
        seat = self._rows.seat(message.message_id)
        seat.due_at = until
        seat.receive_count += 1
        now, job = self._clock.now(), seat.job
        whole_ms = self._stop_at - self._started
        place = place_of(
            until - now,
            stay_ms=ROW_STAY_MS,
            left_ms=self._stop_at - now,
            window_ms=window_of(job.max_tokens, whole_ms, full_window=job.full_window),
        )
        if place is Place.INVOCATION:
            self._resting.append(seat)
        elif self._suspects and job.job_id in self._suspects:
            # Others need not wait for it.
            self._suspects.remove(job.job_id)
            self._suspects_waiting.add(job.job_id)
        self._leave(seat)

    async def keep(self, unwritten: Collection[str], *, last: bool = False) -> bool:
        """Do nothing: a range saves its rows and keeps its lease also while no worker runs."""
        del unwritten, last
        return True

    # The range --------------------------------------------------------------------------------------------------

    def saved(self, seats: Sequence[Seat]) -> None:
        """Free the slots of saved rows."""
        for seat in seats:
            self._clear(seat.job.job_id)
            self._leave(seat)

    def running(self) -> tuple[int, ...]:
        """Return the byte offsets of the noted rows that are not saved and whose calls have not ended."""
        with self._lock:
            seats = [self._rows.seat(job_id) for job_id in self._noted]
        return tuple(
            seat.line.offset
            for seat in sorted(seats, key=lambda seat: seat.line.offset)
            if seat.ended is None or seat.ended.chunk is None
        )

    @property
    def is_searching(self) -> bool:
        """Whether the rows in flight must be known exactly, because one of them may kill the worker."""
        return self._is_apart or self._losses > 0

    def wake(self) -> None:
        """Report to `take` that another worker has the range."""
        if self._held is not None:
            self._held.changed.set()

    # Room -------------------------------------------------------------------------------------------------------

    def _ids(self, offsets: Collection[int]) -> set[str]:
        return {seat.job.job_id for seat in self._rows.unfinished() if seat.line.offset in offsets}

    def _in_order(self) -> deque[Seat]:
        """Return the rows to run: suspects first, those that run alone last."""
        suspects = self._suspects or set()
        return deque(
            sorted(
                self._rows.unfinished(),
                key=lambda seat: (
                    seat.job.job_id in self._apart,
                    seat.job.job_id not in suspects,
                    -seat.job.max_tokens,
                ),
            )
        )

    def _next_rows(self) -> list[Seat]:
        """Return the rows that may run now, and reserve their slots and memory."""
        if self._rows.is_closed:
            self._ready.clear()
            self._resting.clear()
        now = self._clock.now()
        due = sorted(
            (seat for seat in self._resting if seat.due_at <= now), key=lambda seat: seat.due_at
        )
        self._resting = [seat for seat in self._resting if seat.due_at > now]
        for seat in due:
            self._line_up(seat)
        seats = []
        while self._ready and self._has_room(self._ready[0]):
            seat = self._ready.popleft()
            self._is_apart = seat.job.job_id in self._apart
            self._running[seat.job.job_id] = seat
            self._expected_bytes += seat.expected_bytes
            seats.append(seat)
        return seats

    def _taken(self, seat: Seat) -> Taken:
        job = seat.job
        message = Received(
            job.job_id,
            "",
            "",
            job.job_id,
            receive_count=seat.receive_count,
            sent_at=job.created_at,
        )
        return Taken(message, job.job_id, job, batch_id=self._batch_id)

    def _line_up(self, seat: Seat) -> None:
        """Put a row behind all others, but before those that run alone."""
        at = len(self._ready)
        if seat.job.job_id not in self._apart:
            at -= sum(each.job.job_id in self._apart for each in self._ready)
        self._ready.insert(at, seat)

    def _has_room(self, seat: Seat) -> bool:
        if not self._running:
            return True
        if (
            seat.job.job_id in self._apart
            or self._is_apart
            or len(self._running) >= self._at_once()
        ):
            return False
        return self._expected_bytes + seat.expected_bytes <= ANSWERS_BYTES

    def _at_once(self) -> int:
        """Return how many rows may be in flight: fewer during a search for a killer."""
        if self._suspects is not None and not self._suspects:
            return ROWS_AT_ONCE
        return max(1, ROWS_AT_ONCE >> 2 * self._losses)

    def _waits_for_saving(self) -> bool:
        return bool(self._ready and self._running)

    def _leave(self, seat: Seat) -> None:
        """Free the slot of a row."""
        with self._lock:
            self._noted.discard(seat.job.job_id)
        if self._running.pop(seat.job.job_id, None) is None:
            return
        self._is_apart = False
        self._expected_bytes -= seat.expected_bytes
        self.wake()

    # The search for rows that kill their workers ---------------------------------------------------------------

    def _starting(self, job_ids: Sequence[str]) -> None:
        """Note rows as running before their requests are made, so that their calls are known if the worker dies."""
        self._check_lease()
        with self._lock:
            self._noted.update(job_ids)
        self._note_running()

    def _clear(self, job_id: str) -> None:
        """Remove an ended row from the search, which ends with the last one."""
        if self._suspects is None:
            return
        self._suspects.discard(job_id)
        self._suspects_waiting.discard(job_id)
        if not self._suspects and not self._suspects_waiting:
            self._losses = 0
