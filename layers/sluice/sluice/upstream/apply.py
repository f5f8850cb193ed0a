"""Gives a range the results of its rows, as if a worker had called Claude for them and died: the next one goes on.

What has no result, and what may go better next time, a worker of the live lane runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Final

from sluice.domain import jobs as life
from sluice.domain.batches import NO_WORKER, Batch, Phase, claim_range
from sluice.domain.errors import InputMissing, RangeBusy
from sluice.domain.jobs import AttemptOutcome, Job, JobError, State
from sluice.domain.pricing import BATCH_LANE, utc_day
from sluice.domain.retries import GiveUp, judge
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.notices.report import report_end
from sluice.ports.swap import swap
from sluice.ports.upstream import ResultRow, RowKind
from sluice.upstream.tools import UpstreamTools
from sluice.worker.range_claim import LEASE_MS, ClaimedRange, RangeWait
from sluice.worker.range_rows import Seat, WindowRows
from sluice.worker.range_windows import WINDOW_ROWS, Windows, job_of_row

NO_MORE: Final[tuple[int, ResultRow | None]] = (0, None)


class Given(Enum):
    """What became of a range."""

    GOES_ON = auto()
    """It has its results, and a worker must go on with it."""
    DONE = auto()
    """It had ended before."""
    BUSY = auto()
    """Another invocation has it: an earlier one of this function that died, or a worker if its batch is over."""


class ApplyResults:
    """Gives ranges of one upstream batch their results. Repeating it changes nothing."""

    def __init__(self, tools: UpstreamTools, state: UpstreamBatch, owner: str) -> None:
        self._tools = tools
        self._upstream = state
        self._owner = f"{NO_WORKER}{owner}"

    def __call__(
        self, batch: Batch, number: int, results: Iterator[tuple[int, ResultRow]] | None
    ) -> Given:
        """Save the results of a range, which come with rising byte offsets.

        They are read one by one and saved as soon as there are many: a range may have far more rows than planned.
        """
        if batch.phase is Phase.ENDED:
            return Given.DONE
        if results is None:
            return Given.GOES_ON
        state = self._tools.batches.range_state(batch, number)
        if state.done:
            return Given.DONE
        now = self._tools.clock.now()
        try:
            claimed = claim_range(state, self._owner, now, now + LEASE_MS)
        except RangeBusy:
            return Given.BUSY
        if swap(self._tools.batches.replace_range, claimed, state.version) != claimed:
            return Given.BUSY
        taken = ClaimedRange(self._tools, batch, claimed, self._owner)
        waiting = self._fill(taken, batch, results)
        chunks = taken.state.chunks
        if waiting:
            chunks = tuple(taken.saved_whole((), waiting, 0))
        taken.release(RangeWait(self._tools.clock.now()), chunks)
        return Given.GOES_ON

    def _fill(
        self, taken: ClaimedRange, batch: Batch, results: Iterator[tuple[int, ResultRow]]
    ) -> list[Seat]:
        """Save what has ended, window by window; return the rows that go on after a call."""
        rows = WindowRows(self._tools.clock)
        rows.begin(batch.options)
        windows = Windows(
            self._tools.objects,
            batch,
            taken.state,
            taken.restored(),
            partial(job_of_row, batch),
            taken.lost_calls,
            taken.note_reading,
            self._tools.events,
        )
        going_on: list[Seat] = []
        offset, result = next(results, NO_MORE)
        while True:
            try:
                window = windows.next()
            except InputMissing:
                # The worker that goes on reports it.
                return going_on
            rows.open(window.seats)
            self._tools.events.count("JobsAccepted", len(window.seats))
            for seat in window.seats:
                while result is not None and offset < seat.line.offset:
                    offset, result = next(results, NO_MORE)
                is_new = seat.ended is None and not seat.job.attempts
                if is_new and result is not None and offset == seat.line.offset:
                    self._end(rows, seat, result)
                if rows.worth_saving(WINDOW_ROWS):
                    _save(taken, rows)
            _save(taken, rows)
            going_on += [seat for seat in rows.unfinished() if seat.job.attempts]
            if window.is_last:
                return going_on

    def _end(self, rows: WindowRows, seat: Seat, result: ResultRow) -> None:
        """End a row by its result, unless it may go better next time."""
        job, now = seat.job, self._tools.clock.now()
        ends_at = self._upstream.ended_at or now
        began = replace(
            life.claim(
                job,
                self._owner,
                self._upstream.accepted_at or now,
                ends_at + LEASE_MS,
                organization=None,
                key_id=self._upstream.key_id or "",
            ),
            lane=BATCH_LANE,
        )
        after = self._after(began, result, ends_at)
        if after is None:
            return
        if not after.state.is_final:
            # Its next call is a live one.
            after = replace(after, lane=job.lane)
        if result.kind is RowKind.SUCCEEDED:
            seat.message = result.message.decode()
        rows.replace(after, job.version)
        # The ledger has all calls of the upstream batch already.
        rows.released(job.job_id)
        if after.state is State.SUCCEEDED:
            # A log line for each of so many rows would cost as much as all the rest.
            self._tools.events.count("JobsSucceeded")
        elif after.state.is_final:
            report_end(self._tools.events, after)

    def _after(self, job: Job, result: ResultRow, at: int) -> Job | None:
        """Return the job after its call in the upstream batch; None if it is as if there had been none."""
        failure = result.failure
        if result.kind is RowKind.SUCCEEDED:
            return self._answered(job, result, at)
        if failure is None:
            # Expired and canceled requests are not billed (Anthropic, batch processing).
            return None
        if failure.may_be_billed:
            again = life.retry(job, self._owner, at, error=failure.error)
            return replace(again, uncertain_calls=job.uncertain_calls + 1)
        verdict = judge(
            failure,
            now=at,
            attempts_used=job.attempts_used,
            snoozes=0,
            has_fallback=job.has_fallback,
            jitter=0.5,
            policy=self._tools.policy,
        )
        if isinstance(verdict.outcome, GiveUp):
            return life.give_up(job, self._owner, at, error=failure.error)
        return None

    def _answered(self, job: Job, result: ResultRow, at: int) -> Job:
        answer = result.answer()
        assert answer is not None
        cost = self._tools.prices.bill_micro_usd(
            job.current_model, answer.bill, utc_day(at), batch=True
        )
        may_try_again = job.attempts_used < self._tools.policy.max_attempts
        if result.stop_reason == "refusal" and job.has_fallback and may_try_again:
            error = JobError("refusal", f"{job.current_model} refused to answer")
            after = life.retry(
                job, self._owner, at, error=error, outcome=AttemptOutcome.FALLBACK,
                usage=answer.usage, cost_micro_usd=cost,
            )  # fmt: skip
        else:
            after = life.succeed(
                job, self._owner, at, result=life.Result(), usage=answer.usage,
                cost_micro_usd=cost, request_id=self._upstream.message_batch_id,
            )  # fmt: skip
        return replace(after, unknown_costs=job.unknown_costs + (cost is None))


def _save(taken: ClaimedRange, rows: WindowRows) -> None:
    """Save the rows that have ended, whose records then take no memory but what a worker's take."""
    while seats := rows.take_unsaved():
        rows.saved(seats, taken.save(seats))
