"""The rows of one window of a range as a source: which of them may run now.

All rows of a usual range are in hand from the start and wait for the limiter, the longest first, so that the last rows
of a batch can start together. Few enough run at once that their answers fit into memory, and that little is repeated if
the worker dies: a row takes a place among those in flight when it starts, and keeps it until it is saved. After
lost workers even fewer do, in the end one: if the size of the rows kills the workers, they fit, and if it is one of
them, it is found. Rows that lost a worker while they ran alone come last, and alone again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from sluice.domain.batches import RangeState
from sluice.domain.limits import DRAINED_MS
from sluice.domain.waits import ROW_STAY_MS, Place, place_of, window_of
from sluice.ports.jobs import Received
from sluice.ports.world import Clock
from sluice.worker.range_rows import Seat, WindowRows
from sluice.worker.source import Held, Taken
from sluice.worker.timeouts import wait_at_most

AT_ONCE: Final = 64
"""Maximum rows started and not yet saved, and so the maximum calls that are repeated if the worker dies."""

ANSWERS_BYTES: Final = 24 * 1024 * 1024
"""Maximum expected size of the answers of all rows started and not yet saved; one row may always start."""

IN_HAND: Final = 128
"""Maximum rows in hand: in flight, or waiting for their start."""

LOOK_MS: Final = 1_000
"""Pause between two looks whether any range waits behind the rows in hand. Shorter than an empty queue is believed."""

assert AT_ONCE <= IN_HAND
assert LOOK_MS < DRAINED_MS

SAVE_ROWS: Final = 25
"""Ended rows are saved at the latest when there are so many."""


class RangeSource:
    """The rows of one window, for one run of a worker."""

    def __init__(  # noqa: PLR0913, PLR0917 - a window, its time, and what its range does for it
        self,
        rows: WindowRows,
        state: RangeState,
        clock: Clock,
        stop_at: int,
        note_running: Callable[[], None],
        note_drained: Callable[[], Awaitable[None]],
    ) -> None:
        """`note_running` is called in a thread, while a killer is searched, before a row starts.

        `note_drained` is called while rows wait and no other row of the range waits behind them.
        """
        self._rows = rows
        self._clock = clock
        self._started = clock.now()
        self._stop_at = stop_at
        self._note_running = note_running
        self._note_drained = note_drained
        self._look_at = 0
        self._lock = threading.Lock()
        self._held: Held | None = None
        self._losses = state.losses
        self._suspects = self._ids(state.suspects) if state.suspects else None
        """Rows that the search for a killer has to run. None: all of the window."""
        self._suspects_waiting: set[str] = set()
        """Those of them that wait for longer than this invocation: the search goes on without them, and is not over."""
        self._apart = self._ids(state.blamed)
        """Rows that run alone."""
        self._is_searching = bool(state.losses or state.blamed)
        """Rows take their places before anything is made of them."""
        self._ready = self._in_order()
        self._resting: list[Seat] = []
        self._running: dict[str, Seat] = {}
        """Rows in flight, and those that have ended and are not saved."""
        self._expected_bytes = 0
        self._is_apart = False
        """A row runs alone."""
        self._at_door = 0
        """Rows that wait for a place."""
        self._freed = asyncio.Event()
        self._noted: set[str] = set()
        """Rows whose requests may be in memory, or their answers, unsaved."""
        rows.watch_starts(self._starting)

    @property
    def count(self) -> int:
        """The number of rows to run."""
        return len(self._ready)

    @property
    def save_at(self) -> int:
        """The number of unsaved rows that must be saved: no row is to wait for the place of one that has ended."""
        return min(SAVE_ROWS, 1 if self._is_apart else self._at_once())

    # The worker's source ----------------------------------------------------------------------------------------

    async def take(self, held: Held) -> Sequence[Taken]:
        """Wait for rows that may run now."""
        self._held = held
        while True:
            if seats := self._next_rows(held.count):
                return [self._taken(seat) for seat in seats]
            due_at = min((seat.due_at for seat in self._resting), default=None)
            if not held.count and due_at is None and not self._waits_for_saving():
                return ()
            await held.change(await self._looked(held, due_at))

    async def _looked(self, held: Held, due_at: int | None) -> int | None:
        """Look whether a range waits behind the rows in hand, if it is time to; return when to go on at the latest."""
        if self._ready or not held.waiting:
            return due_at
        now = self._clock.now()
        if now >= self._look_at:
            self._look_at = now + LOOK_MS
            await self._note_drained()
        return self._look_at if due_at is None else min(due_at, self._look_at)

    def done(self, message: Received) -> None:
        """Keep the place of a row that has ended until it is saved."""
        seat = self._rows.seat(message.message_id)
        if seat.ended is None or seat.ended.chunk is not None:
            self._leave(seat)

    def give_back(self, message: Received, until: int) -> None:
        """Let a row rest in the invocation, or leave it for a later one."""
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

    async def keep(self, *, last: bool = False) -> bool:
        """Do nothing: a range saves its rows and keeps its lease also while no worker runs."""
        del last
        return True

    # The range --------------------------------------------------------------------------------------------------

    def saved(self, seats: Sequence[Seat]) -> None:
        """Free the places of rows that were saved."""
        for seat in seats:
            self._clear(seat.job.job_id)
            self._leave(seat)

    def running(self) -> tuple[int, ...]:
        """Return the byte offsets of the rows that were noted and are neither saved nor back from their calls."""
        with self._lock:
            seats = [self._rows.seat(job_id) for job_id in self._noted]
        return tuple(
            seat.line.offset
            for seat in sorted(seats, key=lambda seat: seat.line.offset)
            if seat.ended is None or seat.ended.chunk is None
        )

    def wake(self) -> None:
        """Have rows that wait, and `take`, see what has changed."""
        self._freed.set()
        if self._held is not None:
            self._held.changed.set()

    # Room -------------------------------------------------------------------------------------------------------

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
        return Taken(message, job.job_id, job, room=_Place(self, seat))

    def _ids(self, offsets: Collection[int]) -> set[str]:
        return {seat.job.job_id for seat in self._rows.unfinished() if seat.line.offset in offsets}

    def _in_order(self) -> deque[Seat]:
        """Return the rows to run: suspects first, those that run alone last, and longer answers before shorter ones."""
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

    def _next_rows(self, in_hand: int) -> list[Seat]:
        """Return the rows that may be in hand now; while a killer is searched, those that have a place."""
        if self._rows.is_closed:
            self._ready.clear()
            self._resting.clear()
        now = self._clock.now()
        due = sorted((seat for seat in self._resting if seat.due_at <= now), key=_due_at)
        self._resting = [seat for seat in self._resting if seat.due_at > now]
        for seat in due:
            self._line_up(seat)
        seats: list[Seat] = []
        while self._ready and in_hand + len(seats) < IN_HAND:
            if self._is_searching:
                if not self._has_room(self._ready[0]):
                    break
                self._occupy(self._ready[0])
            seats.append(self._ready.popleft())
        return seats

    def has_place(self, seat: Seat) -> bool:
        """Take a place for a row, unless it has one; False when none is free."""
        if seat.job.job_id in self._running:
            return True
        if self._at_door or not self._has_room(seat):
            return False
        self._occupy(seat)
        return True

    async def place(self, seat: Seat, until: int | None) -> bool:
        """Wait for a place until a time; all have one when another worker has the range, for they end at once."""
        self._at_door += 1
        try:
            while not self._rows.is_closed and not self._has_room(seat):
                self._freed.clear()
                if until is None:
                    await self._freed.wait()
                elif self._clock.now() >= until:
                    return False
                else:
                    await wait_at_most(self._freed, self._clock, until - self._clock.now())
            self._occupy(seat)
            return True
        finally:
            self._at_door -= 1

    def _occupy(self, seat: Seat) -> None:
        self._is_apart = seat.job.job_id in self._apart
        self._running[seat.job.job_id] = seat
        self._expected_bytes += seat.expected_bytes

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
            return AT_ONCE
        return max(1, AT_ONCE >> 2 * self._losses)

    def _waits_for_saving(self) -> bool:
        return bool(self._ready and self._running)

    def _leave(self, seat: Seat) -> None:
        """Free the place of a row."""
        with self._lock:
            self._noted.discard(seat.job.job_id)
        if self._running.pop(seat.job.job_id, None) is None:
            return
        self._is_apart = False
        self._expected_bytes -= seat.expected_bytes
        self.wake()

    # The search for rows that kill their workers ---------------------------------------------------------------

    def _starting(self, job_ids: Sequence[str]) -> None:
        """Have rows noted as running, before anything is made of them, if that may be what kills the worker."""
        if not (self._is_apart or self._losses):
            return
        with self._lock:
            self._noted.update(job_ids)
        self._note_running()

    def _clear(self, job_id: str) -> None:
        """Take a row that has ended out of the search; it is over with the last one."""
        if self._suspects is None:
            return
        self._suspects.discard(job_id)
        self._suspects_waiting.discard(job_id)
        if not self._suspects and not self._suspects_waiting:
            self._losses = 0


def _due_at(seat: Seat) -> int:
    return seat.due_at


class _Place:
    """The place of one row among those in flight."""

    def __init__(self, source: RangeSource, seat: Seat) -> None:
        self._source = source
        self._seat = seat
        self._lacks = False

    async def wait(self, until: int | None = None) -> bool:
        """Wait for a place, if the row found none when it could start."""
        if self._lacks:
            self._lacks = not await self._source.place(self._seat, until)
        return not self._lacks

    def take(self) -> bool:
        """Take a place, unless the row has one."""
        self._lacks = not self._source.has_place(self._seat)
        return not self._lacks
