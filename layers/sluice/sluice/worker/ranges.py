"""One range of a batch: its rows are jobs, run by the same worker as those of the queue.

A range is run window by window, in the order of its lines: a window is as many rows as may be in memory at once. What
has ended is saved every few rows or seconds. A window that has ended is one object, and the range's part is put
together from those. The range is leased as a whole, by conditional writes. A worker that dies repeats at most the rows
it had started and not saved, and never has more than `ROWS_AT_ONCE` of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, ParamSpec

from sluice.domain import waits
from sluice.domain.batches import (
    SECTIONS,
    Batch,
    Phase,
    Progress,
    RangeState,
    Tally,
    claim_range,
    killers,
)
from sluice.domain.errors import InputMissing, LeaseLost, RangeBusy, StoreBusy
from sluice.domain.jobs import MOST_LOST_ALONE, Job, JobError
from sluice.notices.report import report_end
from sluice.ports.batches import Newcomer
from sluice.ports.jobs import Received
from sluice.ports.swap import swap
from sluice.worker.range_claim import (
    HIDE_MS,
    KEEP_MS,
    LEASE_MS,
    ClaimedRange,
    RangeTools,
    RangeWait,
    Sums,
    stored_tally,
)
from sluice.worker.range_rows import Ended, Seat, WindowRows
from sluice.worker.range_source import RangeSource
from sluice.worker.range_windows import Window, Windows, job_of_row
from sluice.worker.timeouts import wait_at_most
from sluice.worker.worker import Worker

P = ParamSpec("P")
Chore = Callable[[], Awaitable[None]]

NOT_READ_MS: Final = 15_000
"""A range that could not be read from a busy store is retried after this time; after many receives a little later."""

PROGRESS_MS: Final = 3_000
"""How often the progress of a running range is stored."""

TICK_MS: Final = 100
"""Pause between two rounds of housekeeping."""

LAST_MS: Final = 10_000
"""The end of the invocation, for writing the results of the calls."""


@dataclass(frozen=True, slots=True)
class RangePointer:
    """What a message of the ranges queue names; None for a foreign message."""

    message: Received
    batch_id: str | None
    number: int | None


def not_read_ms(pointer: RangePointer) -> int:
    """Return after which time to retry a range that could not be read: a busy store hides it no longer than a death."""
    return min(HIDE_MS, waits.grown(NOT_READ_MS, pointer.message.receive_count))


class RunRange:
    """The use case behind the ranges queue."""

    def __init__(self, tools: RangeTools, worker: Worker, rows: WindowRows) -> None:
        """`worker` is one whose job records, requests, answers and ledger are those of `rows`."""
        self.tools = tools
        self.worker = worker
        self.rows = rows
        self.is_search = False
        """The present range has lost workers."""

    async def __call__(self, pointer: RangePointer, stop_at: int, owner: str) -> bool:
        """Run a range as far as possible; return whether its message is done.

        No call lasts beyond `stop_at` (epoch milliseconds). `owner` names this invocation.
        """
        # Before anything is read: the queue's own visibility timeout is 90 minutes.
        await self.hide(pointer)
        try:
            return await self._claimed(pointer, stop_at, owner)
        except StoreBusy as error:
            self.tools.events.problem("range not started", what=error.what)
        except Exception:  # noqa: BLE001 - whatever it was, the range continues later
            self.tools.events.problem("range failed", batch_id=pointer.batch_id)
        await self.hide(pointer, not_read_ms(pointer))
        return False

    async def _claimed(self, pointer: RangePointer, stop_at: int, owner: str) -> bool:
        """Claim the range, and run it."""
        named = await self._named(pointer)
        if isinstance(named, str):
            await self.tools.blocking(self.tools.returns.reject, pointer.message, named)
            return True
        batch, number = named
        if batch.phase is Phase.ENDED:
            return True
        state = await self.tools.blocking(self.tools.batches.range_state, batch, number)
        if state.done:
            return await self._report_again(pointer, batch, state)
        now = self.tools.clock.now()
        try:
            claimed = claim_range(state, owner, now, now + LEASE_MS)
        except RangeBusy as busy:
            await self.back(pointer, busy.until - now + 1_000)
            return False
        replace = self.tools.batches.replace_range
        if await self.tools.blocking(swap, replace, claimed, state.version) != claimed:
            await self.back(pointer, 1_000)
            return False
        self.is_search = claimed.losses > 0
        await self._welcome(batch, claimed)
        was_lost = state.owner is not None
        if was_lost:
            self.tools.events.problem(
                "range taken over", batch_id=batch.batch_id, range=number, losses=claimed.losses
            )
        taken = ClaimedRange(self.tools, batch, claimed, owner)
        run = _Run(self, taken, batch, pointer, owner, stop_at - LAST_MS)
        return await run.go()

    async def _named(self, pointer: RangePointer) -> tuple[Batch, int] | str:
        """Return the range that a message names, or the reason if it names none."""
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

    async def _welcome(self, batch: Batch, state: RangeState) -> None:
        """Remove a small batch from the newcomers once its last range is claimed."""
        plan = batch.plan
        if plan and plan.is_small and state.claims == 1 and state.number == plan.ranges - 1:
            newcomer = Newcomer(batch.tenant, batch.batch_id)
            try:
                await self.tools.blocking(self.tools.batches.welcome, newcomer)
            except StoreBusy as error:
                # A worker that finds no range left to claim removes it.
                self.tools.events.problem("newcomer not removed", what=error.what)

    async def hide(self, pointer: RangePointer, delay_ms: int = HIDE_MS) -> None:
        """As `back`, if the queue is not busy: the message is then visible when it was to be before."""
        try:
            await self.back(pointer, delay_ms)
        except StoreBusy as error:
            self.tools.events.problem("range not hidden", what=error.what)

    async def report(self, batch: Batch, number: int, tally: Tally | None = None) -> None:
        """Count the range as done; the last one of a section causes the results to be joined."""
        assert batch.plan is not None
        section = batch.plan.section_of(number)
        progress = await self.tools.blocking(self._counted, batch, section, number, tally)
        if progress.members == len(batch.plan.members(section)):
            await self._send_on(batch, section)

    async def _report_again(self, pointer: RangePointer, batch: Batch, state: RangeState) -> bool:
        """Report a range that was done before, because its worker may have died before; return whether that is done.

        The range may have ended just now beside another one, and its worker be about to report it.
        """
        assert batch.plan is not None
        section, now = batch.plan.section_of(state.number), self.tools.clock.now()
        progress = await self.tools.blocking(self._counted, batch, section, state.number, None)
        is_last = progress.members == len(batch.plan.members(section))
        if not is_last or await self.tools.blocking(self._is_sent_on, batch, section):
            return True
        if now < state.lease_until:
            await self.back(pointer, state.lease_until - now)
            return False
        await self._send_on(batch, section)
        return True

    async def _send_on(self, batch: Batch, section: int) -> None:
        send = self.tools.queue.send_join
        await self.tools.blocking(send, batch.batch_id, section, batch.tenant)

    def _is_sent_on(self, batch: Batch, section: int) -> bool:
        """Return whether a section was joined by its own message, which is repeated until that is done.

        A second message would repeat the end of the whole batch. The only section of a batch may have been joined by a
        ranges worker, without a message; then this one must go on with the end if that worker died.
        """
        if batch.plan is None or batch.plan.sections == 1:
            return False
        joined = self.tools.batches.groups(batch.batch_id, SECTIONS).get(SECTIONS)
        return joined is not None and section in joined.done

    def _counted(self, batch: Batch, section: int, number: int, tally: Tally | None) -> Progress:
        """Count a range once; the sums of one that another worker has finished are read only if it is not counted."""
        batches, group = self.tools.batches, f"section#{section:06d}"
        if tally is None:
            progress = batches.groups(batch.batch_id, group).get(group)
            if progress is not None and number in progress.done:
                return progress
            tally = stored_tally(self.tools.objects, batch.part_key(number))
        return batches.mark(batch.batch_id, group, number, tally)


class _Run:
    """One invocation with one range."""

    def __init__(  # noqa: PLR0913, PLR0917 - a range, its message, and the time for it
        self,
        runner: RunRange,
        taken: ClaimedRange,
        batch: Batch,
        pointer: RangePointer,
        owner: str,
        stop_at: int,
    ) -> None:
        self._runner = runner
        self._tools = runner.tools
        self._rows = runner.rows
        self._range = taken
        self._batch = batch
        self._pointer = pointer
        self._owner = owner
        self._stop_at = stop_at
        self._source: RangeSource | None = None
        """The rows of this window."""
        self._rows_run = False
        self._kept_at = self._tools.clock.now()
        self._saving = asyncio.Lock()
        self._progress = Sums()
        """Of the rows saved in this invocation."""
        self._has_news = False
        self._reported_at = self._tools.clock.now()
        self._tally: Tally | None = None
        """Of the whole range, once its part is stored."""

    async def go(self) -> bool:
        """Run the rest of the range."""
        self._rows.begin(self._batch.options)
        async with self._keeping():
            try:
                return await self._run()
            except StoreBusy as error:
                self._tools.events.problem("range not read", what=error.what)
            except Exception:  # noqa: BLE001 - whatever it was, it is not the death of a worker
                self._tools.events.problem(
                    "range failed", batch_id=self._batch.batch_id, range=self._range.state.number
                )
            return await self._written_down(self._give_back)

    async def _run(self) -> bool:
        """Run window after window."""
        if self._range.state.dropped:
            await self._tools.blocking(self._range.probe)
        saved = await self._tools.blocking(self._range.restored)
        windows = Windows(
            self._tools.objects,
            self._batch,
            self._range.state,
            saved,
            partial(job_of_row, self._batch),
            self._range.lost_calls,
            self._range.note_reading,
            self._tools.events,
        )
        run_rows = 0
        is_first = True
        while True:
            try:
                window = await self._tools.blocking(windows.next)
            except InputMissing as error:
                window = windows.unreadable(str(error))
            run_rows += await self._run_window(window, is_first=is_first)
            waiting = self._rows.unfinished()
            if waiting:
                done = await self._written_down(self._release, waiting)
                break
            if window.is_last:
                done = await self._written_down(self._finish, window)
                break
            if not await self._written_down(self._end_window, window):
                return False
            self._source = None
            self._rows.open(())
            if self._tools.clock.now() >= self._stop_at:
                done = await self._written_down(self._release, waiting)
                break
            is_first = False
        self._tools.events.note(
            "range run",
            batch_id=self._batch.batch_id,
            range=self._range.state.number,
            tenant=self._batch.tenant,
            rows=run_rows,
            left=len(waiting),
            claims=self._range.state.claims,
        )
        return done

    async def _run_window(self, window: Window, *, is_first: bool) -> int:
        """Run the rows of a window as far as possible; return how many there were to run."""
        state, rows = self._range.state, self._rows
        rows.open(window.seats)
        if state.claims == 1 or not is_first:
            self._tools.events.count("JobsAccepted", len(window.seats))
        self._give_up_killers()
        if self._is_canceled:
            self._cancel()
        if rows.is_closed or not rows.unfinished():
            return 0
        self._source = source = RangeSource(
            rows,
            state,
            self._tools.clock,
            self._stop_at,
            self._check_lease,
            self._note_running,
            self._note_drained,
        )
        count = source.count
        self._rows_run = True
        try:
            await self._runner.worker.run(source, self._stop_at, self._owner)
        finally:
            self._rows_run = False
            rows.all_released()
        return count

    def _give_up_killers(self) -> None:
        """End rows that have killed too many workers."""
        guilty = killers(self._range.state)
        if not guilty:
            return
        # In a batch's results the type of an error is one of Anthropic's: the message names ours.
        reason = f"{MOST_LOST_ALONE} workers died while each ran nothing but this row"
        error = JobError("worker_lost", f"worker_lost: {reason}; it is not tried again")
        for job in self._rows.give_up(guilty, error):
            report_end(self._tools.events, job)

    # Housekeeping -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _keeping(self) -> AsyncIterator[None]:
        """Save ended rows, keep the lease and the message, and check for a cancel, until the block is left."""
        over = asyncio.Event()
        # The lease apart from the rest: a slow bucket must not cost it.
        keepers = [
            asyncio.create_task(self._keep(over, chores))
            for chores in (
                (self._keep_range,),
                (self._save_some, self._report_progress, self._clear),
            )
        ]
        try:
            yield
        finally:
            # Not during a write: it would be unknown whether it was done.
            over.set()
            await asyncio.gather(*keepers)

    async def _keep(self, over: asyncio.Event, chores: Sequence[Chore]) -> None:
        while not self._rows.is_closed:
            await wait_at_most(over, self._tools.clock, TICK_MS)
            if over.is_set():
                return
            for chore in chores:
                await self._round(chore)
        if self._source is not None:
            self._source.wake()

    async def _round(self, chore: Chore) -> None:
        if self._rows.is_closed:
            return
        try:
            await chore()
        except StoreBusy as error:
            self._tools.events.problem("range not saved", what=error.what)
        except LeaseLost:
            self._lose()
        except Exception:  # noqa: BLE001 - the other chores must still be done
            self._tools.events.problem("housekeeping failed")

    async def _save_some(self) -> None:
        if self._source is not None and self._rows.worth_saving(self._source.save_at):
            await self._save()

    async def _clear(self) -> None:
        """Note rows whose calls have ended: they are not the cause of a later death of the worker."""
        is_searching = self._source is not None and self._source.is_searching
        if is_searching and set(self._range.state.running) - set(self._running()):
            note = self._range.note_running
            await self._tools.blocking(note, self._running, self._rows.called)

    async def _report_progress(self) -> None:
        """Store the sums of the saved rows, every few seconds."""
        now, state, plan = self._tools.clock.now(), self._range.state, self._batch.plan
        if plan is None or not self._has_news or now - self._reported_at < PROGRESS_MS:
            return
        group = f"section#{plan.section_of(state.number):06d}"
        note = self._tools.batches.note_running
        await self._tools.blocking(
            note, self._batch.batch_id, group, state.number, self._progress.tally
        )
        self._reported_at, self._has_news = now, False

    async def _keep_range(self) -> None:
        """Hide the message, renew the lease, and check whether the batch was canceled, every few seconds."""
        now = self._tools.clock.now()
        if now - self._kept_at < KEEP_MS:
            return
        # Hidden also while the lease cannot be renewed: nobody else could take it, and this worker may renew it yet.
        await self._runner.hide(self._pointer)
        await self._tools.blocking(self._range.keep)
        self._kept_at = now
        if not self._is_canceled and await self._look_for_cancel() and self._rows_run:
            self._cancel()

    @property
    def _is_canceled(self) -> bool:
        return self._batch.cancel_initiated_at is not None

    async def _look_for_cancel(self) -> bool:
        """Return whether the batch was canceled meanwhile."""
        current = await self._tools.blocking(self._tools.batches.get, self._batch.batch_id)
        if current is not None and current.cancel_initiated_at is not None:
            self._batch = current
        return self._is_canceled

    def _check_lease(self) -> None:
        """Raise StoreBusy if the lease could not be renewed in time: another worker may have taken it.

        Calls in flight go on. If nobody took the range, their answers are saved as soon as the store is back.
        """
        if self._tools.clock.now() >= self._range.state.lease_until:
            what = "the lease of the range"
            raise StoreBusy(what)

    def _cancel(self) -> None:
        canceled = self._rows.cancel()
        if canceled:
            self._tools.events.count("JobsCanceled", canceled)

    def _lose(self) -> None:
        self._tools.events.problem(
            "range lost", batch_id=self._batch.batch_id, range=self._range.state.number
        )
        self._rows.close()

    async def _save(self) -> None:
        """Save ended rows, one chunk after another, until none is left."""
        async with self._saving:
            while seats := self._rows.take_unsaved():
                try:
                    # First the ledger: if this worker dies, the next one learns there what the calls have cost.
                    await self._runner.worker.book()
                    name = await self._tools.blocking(self._range.save, seats)
                except BaseException:
                    self._rows.not_saved(seats)
                    raise
                for seat in seats:
                    if seat.ended is not None and seat.ended.text is not None:
                        self._progress.add(seat.ended.text)
                self._has_news = True
                self._rows.saved(seats, name)
                if self._source is not None:
                    self._source.saved(seats)

    def _running(self) -> Sequence[int]:
        return self._source.running() if self._source is not None else ()

    def _note_running(self) -> None:
        """Record which rows are in flight, in a thread; they are not called if another worker has the range."""
        if self._rows.is_closed:
            return
        try:
            self._range.note_running(self._running, self._rows.called)
        except LeaseLost:
            self._lose()

    async def _note_drained(self) -> None:
        """Report to the limiter when the rows in memory are the last ones: they may start together."""
        try:
            backlog = await self._tools.blocking(self._tools.backlog)
        except StoreBusy:
            return
        if not backlog.visible:
            self._runner.worker.limiter.drained()

    # Ending -----------------------------------------------------------------------------------------------------

    async def _written_down(
        self, write: Callable[P, Awaitable[bool]], *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        """Write how the invocation ended, with retries to its end; return whether the range's message is done."""
        while not self._rows.is_closed:
            try:
                return await write(*args, **kwargs)
            except LeaseLost:
                self._lose()
            except StoreBusy as error:
                self._tools.events.problem("range not saved", what=error.what)
                if self._tools.clock.now() >= self._stop_at + LAST_MS:
                    await self._drop()
                    break
                await self._tools.clock.sleep(waits.REWRITE_MS)
        return False

    async def _drop(self) -> None:
        """Return the range without what no store has taken: it has lost no worker, and no row is to blame."""
        chunks, called = self._range.state.chunks, self._called()
        dropped = bool(called) or not self._rows.are_saved
        wait = RangeWait(self._tools.clock.now() + not_read_ms(self._pointer))
        release = self._range.release
        try:
            await self._tools.blocking(release, wait, chunks, dropped=dropped, called=called)
            await self._runner.back(self._pointer, not_read_ms(self._pointer))
        except (StoreBusy, LeaseLost):
            # Left to the next worker, as if this one had died.
            self._tools.events.problem("range not released", batch_id=self._batch.batch_id)

    def _called(self) -> list[int]:
        """Return the rows with unsaved calls, except those that ended in flight: their state has them as running."""
        running = self._range.state.running
        return [
            seat.line.offset
            for seat in self._rows.seats()
            if seat.has_unsaved_calls and not (seat.ended and seat.line.offset in running)
        ]

    async def _end_window(self, window: Window) -> bool:
        """Store an ended window as one chunk, which replaces those it was saved in."""
        await self._save()
        await self._tools.blocking(self._range.end_window, window, self._ended())
        return True

    async def _finish(self, window: Window) -> bool:
        """Store the range's part, and count the range as done."""
        await self._save()
        if not self._range.state.done:
            finish = self._range.finish
            self._tally = await self._tools.blocking(finish, window, self._ended())
        await self._runner.report(self._batch, self._range.state.number, self._tally)
        return True

    async def _give_back(self) -> bool:
        """Return the range unchanged: a busy store counts neither as a lost worker nor as the fault of a row."""
        delay, state = not_read_ms(self._pointer), self._range.state
        if state.owner is not None:
            await self._save()
            wait, dropped = RangeWait(self._tools.clock.now() + delay), state.dropped
            chunks, called, release = self._range.state.chunks, self._called(), self._range.release
            await self._tools.blocking(release, wait, chunks, dropped=dropped, called=called)
        await self._runner.back(self._pointer, delay)
        return False

    async def _release(self, waiting: Sequence[Seat]) -> bool:
        """Return the range to its queue, or park it if all its rows wait for long."""
        wait = await self._wait(waiting)
        if self._range.state.owner is not None:
            await self._save()
            jobs = [seat for seat in waiting if _has_history(seat.job)]
            end_at = max((seat.line.offset + 1 for seat in self._rows.seats()), default=0)
            save = self._range.saved_whole
            chunks = await self._tools.blocking(save, self._ended(), jobs, end_at)
            await self._tools.blocking(self._range.release, wait, chunks)
        if wait.is_parked:
            return True
        await self._runner.back(self._pointer, wait.until - self._tools.clock.now())
        return False

    async def _wait(self, waiting: Sequence[Seat]) -> RangeWait:
        """Return until when all rows of a range wait: for their next attempts or, if that is first, for their end."""
        now = self._tools.clock.now()
        first = min(waiting, key=lambda seat: seat.wakes_at, default=None)
        if first is None or first.wakes_at <= now or await self._look_for_cancel():
            return RangeWait(now)
        until = waits.parked_until(now, first.wakes_at - now)
        if until is None:
            return RangeWait(first.wakes_at)
        model = None if first.is_over_first else first.job.current_model
        return RangeWait(until, is_parked=True, model=model)

    def _ended(self) -> list[Ended]:
        return [seat.ended for seat in self._rows.seats() if seat.ended]


def _has_history(job: Job) -> bool:
    return bool(job.attempts_used or job.snoozes or job.fallbacks_used or job.not_before)
