"""Makes the next steps of an upstream batch, until it must wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

from sluice.domain import upstream_batches as rules
from sluice.domain.batches import Batch
from sluice.domain.completions import Observation
from sluice.domain.errors import (
    InputMissing,
    LeaseLost,
    ResultsInterrupted,
    StoreBusy,
    UpstreamBatchBusy,
)
from sluice.domain.pricing import BATCH_LANE, LedgerRow, Spend, Usage, added_up, utc_day
from sluice.domain.upstream_batches import Phase, UpstreamBatch
from sluice.ports.claude import Refused
from sluice.ports.swap import Deleted, change, swap
from sluice.ports.upstream import IN_PROGRESS, NotFound, ResultRow, RowKind, Rows, Seen, Unreachable
from sluice.upstream.apply import ApplyResults, Given
from sluice.upstream.prepare import write_body
from sluice.upstream.results import Results, Sorted, sort_results
from sluice.upstream.send import Keys, NeverSent, Send, Wait
from sluice.upstream.tools import UpstreamTools
from sluice.worker.range_claim import LEASE_MS as RANGE_LEASE_MS

KEEP_MS: Final = 15_000
"""How often the lease is renewed during a long step."""

SEND_ROUNDS: Final = 5

SENT_TOGETHER: Final = 50
"""Ranges that are given their results before their messages are sent."""

MOST_SHORT: Final = 3
"""So often results are read again that have fewer lines than there were requests: a connection may end early."""

MOST_UNREAD: Final = 10
"""So often in a row results are not to be had, before the batch counts as ended without any."""

NO_MORE: Final[tuple[tuple[int, int], Results]] = ((-1, -1), iter(()))

T = TypeVar("T")


class Advance:
    """The use case of the upstream function for one upstream batch."""

    def __init__(self, tools: UpstreamTools) -> None:
        self._tools = tools

    def __call__(self, upstream_id: str, stop_at: int, owner: str) -> None:
        """Make steps until the batch must wait, or until `stop_at`; what is not done is due again soon."""
        state = self._tools.records.get(upstream_id)
        if state is None or state.phase is Phase.DONE:
            return
        try:
            taken = rules.take(state, owner, self._tools.clock.now())
            if swap(self._tools.records.replace, taken, state.version) != taken:
                return
            _Steps(self._tools, taken, owner, stop_at).make()
        except UpstreamBatchBusy:
            return
        except LeaseLost:
            self._tools.events.problem("upstream batch lost", upstream_id=upstream_id)
        except StoreBusy as busy:
            # It is due again when the lease ends.
            self._tools.events.problem("store busy", what=busy.what, upstream_id=upstream_id)


class _Steps:
    """The steps of one invocation."""

    def __init__(
        self, tools: UpstreamTools, state: UpstreamBatch, owner: str, stop_at: int
    ) -> None:
        self._tools = tools
        self._state = state
        self._owner = owner
        self._stop_at = stop_at
        self._kept_at = tools.clock.now()

    def make(self) -> None:
        """Make steps until one must wait."""
        while self._state.phase is not Phase.DONE:
            if self._tools.clock.now() >= self._stop_at:
                self._give_back(self._tools.clock.now())
                return
            wait = self._step()
            if wait is not None:
                self._give_back(wait.until)
                return

    def _step(self) -> Wait | None:
        match self._state.phase:
            case Phase.PREPARING:
                return self._prepare()
            case Phase.READY:
                return self._send()
            case Phase.SENDING:
                return self._look_for()
            case Phase.OPEN:
                return self._poll()
            case _:
                return self._apply()

    # Record ------------------------------------------------------------------------------------------------------

    def _write(self, rule: Callable[[UpstreamBatch], UpstreamBatch]) -> UpstreamBatch:
        """Change the record, also after somebody else has changed it; raises LeaseLost."""

        def owned(current: UpstreamBatch) -> UpstreamBatch:
            if current.owner != self._owner:
                raise LeaseLost(current.upstream_id)
            return rule(current)

        replace = self._tools.records.replace
        result = change(replace, self._state, owned, self._state.upstream_id)
        if isinstance(result, Deleted):
            raise LeaseLost(self._state.upstream_id)
        self._state = result.record
        self._kept_at = self._tools.clock.now()
        return self._state

    def _keep(self, applied: int | None = None) -> None:
        """Renew the lease if it is time."""
        now = self._tools.clock.now()
        if now - self._kept_at >= KEEP_MS or applied is not None:
            self._write(lambda current: rules.keep(current, self._owner, now, applied))

    def _keeping(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            self._keep()
            yield item

    def _give_back(self, due_at: int) -> None:
        now = self._tools.clock.now()
        self._write(
            lambda current: rules.give_back(
                current, self._owner, now if rules.is_cancel_due(current) else due_at
            )
        )

    # Steps -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> Wait | None:
        state, now = self._state, self._tools.clock.now()
        try:
            body = write_body(self._tools.objects, self._tools.batches, state, now, self._keep)
        except InputMissing as missing:
            self._end(str(missing))
            return None
        self._write(
            lambda current: rules.prepared(
                current,
                self._owner,
                requests=body.requests,
                body_bytes=body.size,
                cuts=body.cuts,
                models=body.models,
                deadline=body.earliest,
            )
        )
        self._tools.events.note(
            "upstream batch prepared",
            upstream_id=state.upstream_id,
            tenant=state.tenant,
            requests=body.requests,
            bytes=body.size,
        )
        return None

    def _send(self) -> Wait | None:
        if self._state.wants_cancel is not None:
            self._end(None)
            return None
        if self._is_late():
            self._end("it could not be sent in time")
            return None
        sent = Send(self._tools, self._owner, self._write)(self._state)
        if isinstance(sent, NeverSent):
            self._end(sent.reason)
            return None
        if isinstance(sent, Wait):
            rescue_at = self._state.rescue_at
            return sent if rescue_at is None else Wait(min(sent.until, rescue_at), sent.reason)
        if sent.phase is Phase.SENDING:
            return Wait(rules.searched_until(sent), "its create had no reply")
        return Wait(rules.next_poll(sent, self._tools.clock.now(), self._tools.poll_ms), "open")

    def _look_for(self) -> Wait | None:
        if rules.is_lost(self._state, self._tools.clock.now()):
            self._end("its create had no reply, and its batch was not found")
            return None
        found = Send(self._tools, self._owner, self._write).look_for(self._state)
        return found if isinstance(found, Wait) else None

    def _poll(self) -> Wait | None:
        now, state = self._tools.clock.now(), self._state
        by = Keys(self._tools).of_batch(state)
        assert state.message_batch_id is not None
        if by is None:
            return self._unseen("no key of its workspace is in the pool")
        seen = self._tools.claude.get(by, state.message_batch_id)
        if not isinstance(seen, Seen):
            return self._unseen(seen.failure.type)
        if seen.is_ended:
            self._end(None)
            return None
        if rules.is_given_up(state, now):
            self._end("upstream did not end it")
            return None
        if state.canceled_at is not None and seen.status == IN_PROGRESS:
            # It was not found then: a new batch may be missing for some seconds.
            self._tools.claude.cancel(by, state.message_batch_id)
        self._cancel_if_late(now)
        return Wait(rules.next_poll(self._state, now, self._tools.poll_ms), "open")

    def _unseen(self, reason: str) -> Wait | None:
        """Go on after a poll without an answer: a batch may not be found for a while, and any call may fail."""
        now = self._tools.clock.now()
        self._tools.events.problem(
            "upstream batch not seen", upstream_id=self._state.upstream_id, reason=reason
        )
        if rules.is_given_up(self._state, now):
            self._end(f"upstream did not show it: {reason}")
            return None
        self._cancel_if_late(now)
        return Wait(now + self._tools.poll_ms, reason)

    def _cancel_if_late(self, now: int) -> None:
        """Cancel it if nobody wants it any more, or if its rows must be on the live lane now."""
        if self._state.canceled_at is None:
            reason = rules.must_be_canceled(self._state, now)
            if reason is not None or self._is_late():
                self._cancel(reason or self._state.reason)

    def _is_late(self) -> bool:
        """Return whether its rows must be on the live lane now, after a new plan of all upstream batches."""
        revision = self._tools.lanes.revise(self._state)
        if revision is None:
            return False
        self._write(
            lambda current: rules.revised(current, self._owner, revision.rescue_at, revision.reason)
        )
        return revision.rescue

    def _cancel(self, reason: str) -> None:
        by = Keys(self._tools).of_batch(self._state)
        assert self._state.message_batch_id is not None
        if by is not None:
            answer = self._tools.claude.cancel(by, self._state.message_batch_id)
            if isinstance(answer, Unreachable):
                return
        self._tools.events.note(
            "upstream batch canceled", upstream_id=self._state.upstream_id, reason=reason
        )
        now = self._tools.clock.now()
        self._write(lambda current: rules.canceled(current, self._owner, now, reason))

    def _end(self, problem: str | None) -> None:
        now = self._tools.clock.now()
        if self._state.phase is Phase.OPEN and self._state.accepted_at is not None:
            self._learn(self._state.accepted_at, now)
        self._write(lambda current: rules.ended(current, self._owner, now, problem=problem))
        self._tools.events.note(
            "upstream batch ended",
            upstream_id=self._state.upstream_id,
            tenant=self._state.tenant,
            problem=problem,
        )

    def _learn(self, created_at: int, now: int) -> None:
        """Learn how long it took; one that was canceled would have taken longer."""
        canceled_at = self._state.canceled_at
        try:
            self._tools.records.observe(
                Observation(created_at, canceled_at or now, has_ended=canceled_at is None),
                None if canceled_at is None else now - canceled_at,
            )
        except StoreBusy as busy:
            self._tools.events.problem("store busy", what=busy.what)

    # Results -----------------------------------------------------------------------------------------------------

    def _apply(self) -> Wait | None:
        results = self._results()
        if not isinstance(results, Sorted):
            return results
        wait = self._give(results)
        if wait is not None:
            return wait
        self._write(lambda current: rules.done(current, self._owner))
        self._tools.events.note(
            "upstream batch applied",
            upstream_id=self._state.upstream_id,
            tenant=self._state.tenant,
            requests=self._state.requests,
            results=results.rows,
            strange=results.strange,
            repeated=results.repeated,
            problem=self._state.problem,
        )
        # Last, because it is not repeated: what a busy bucket keeps is deleted with the other objects of its age.
        self._tools.objects.delete([self._state.body_key, *results.runs])
        return None

    def _give(self, results: Sorted) -> Wait | None:
        """Give each range its results, and send it to the live lane."""
        apply = ApplyResults(self._tools, self._state, self._owner)
        by_range = results.by_range(self._tools.objects)
        place, rows = next(by_range, NO_MORE)
        ids = {part.batch_id for part in self._state.slices}
        batches = {each: self._tools.batches.get(each) for each in ids}
        going_on: list[tuple[str, int]] = []
        position, applied, busy_from = 0, self._state.applied, None
        for member, part in enumerate(self._state.slices):
            batch = batches[part.batch_id]
            for number in part.numbers:
                position += 1
                has_results = place == (member, number)
                given = self._keeping(rows) if has_results else None
                is_next = position > applied
                if batch is not None and is_next:
                    outcome = apply(batch, number, given)
                    if outcome is Given.GOES_ON:
                        going_on.append((part.batch_id, number))
                    elif outcome is Given.BUSY:
                        busy_from = busy_from or position
                if has_results:
                    place, rows = next(by_range, NO_MORE)
                if len(going_on) >= SENT_TOGETHER:
                    self._sent(batches, going_on, position if busy_from is None else busy_from - 1)
                    if self._tools.clock.now() >= self._stop_at:
                        return Wait(self._tools.clock.now(), "goes on")
                self._keep()
        if busy_from is not None:
            # From the first of them on, results are given once more; those that have them keep what they have.
            self._sent(batches, going_on, busy_from - 1)
            return Wait(self._tools.clock.now() + RANGE_LEASE_MS, "a range is busy")
        self._sent(batches, going_on, position)
        return None

    def _sent(
        self, batches: dict[str, Batch | None], going_on: list[tuple[str, int]], applied: int
    ) -> None:
        """Send the ranges to the live lane; raises StoreBusy."""
        for batch_id in dict.fromkeys(each for each, _ in going_on):
            batch = batches[batch_id]
            assert batch is not None
            numbers = [number for each, number in going_on if each == batch_id]
            for _ in range(SEND_ROUNDS):
                if numbers:
                    numbers = self._tools.queue.send_ranges(batch, numbers)
            if numbers:
                what = "the ranges queue"
                raise StoreBusy(what)
        going_on.clear()
        self._keep(applied)

    def _results(self) -> Sorted | Wait | None:
        """Return the results in the order of the rows; their cost is on record then."""
        state = self._state
        rows = self._opened()
        bill = _Bill(self._tools, state)
        if rows is None:
            if state.message_batch_id is not None and state.tries < MOST_UNREAD:
                return self._again()
            if state.sends:
                bill.book_unread(state.requests)
            return Sorted()
        try:
            found = sort_results(self._tools.objects, state, self._keeping(rows), bill.count)
        except ResultsInterrupted:
            return self._again()
        finally:
            rows.close()
        if not state.is_confirmed and not found.rows and found.strange:
            self._write(partial(rules.not_ours, owner=self._owner))
            return None
        lines = found.rows + found.strange + found.repeated
        if lines < state.requests and state.tries < MOST_SHORT:
            # Rows without a result run live, and are billed again if they only were not read.
            return self._again()
        bill.book()
        bill.book_unread(state.requests - found.rows)
        return found

    def _opened(self) -> Rows | None:
        """Return the results from upstream; None if there are none, or not now."""
        by = Keys(self._tools).of_batch(self._state)
        if by is None or self._state.message_batch_id is None:
            return None
        rows = self._tools.claude.results(by, self._state.message_batch_id)
        return None if isinstance(rows, NotFound | Refused | Unreachable) else rows

    def _again(self) -> Wait:
        wait = rules.retry_ms(self._state.tries)
        self._write(lambda current: rules.tried(current, self._owner))
        return Wait(self._tools.clock.now() + wait, "the results cannot be read")


class _Bill:
    """What the requests of an upstream batch cost: a row of the ledger for each model."""

    def __init__(self, tools: UpstreamTools, state: UpstreamBatch) -> None:
        self._tools = tools
        self._state = state
        self._spends: dict[str, Spend] = {}
        self._day = utc_day(state.ended_at or state.created_at)

    def count(self, model: str, row: ResultRow) -> None:
        """Add a result; only answers are billed (Anthropic, batch processing), and what might be one."""
        certain = True
        if row.kind is RowKind.SUCCEEDED:
            cost = self._tools.prices.bill_micro_usd(model, row.bill, self._day, batch=True)
        elif row.failure is not None and row.failure.may_be_billed:
            cost, certain = 0, False
        else:
            return
        spend = Spend.of_call(row.usage or Usage(), cost, certain=certain)
        self._spends[model] = self._spends.get(model, Spend()) + spend

    def book(self) -> None:
        """Write the rows that the ledger does not have yet; raises StoreBusy."""
        self._write(
            [
                self._row(str(number), model, self._spends[model], "requests of an upstream batch")
                for number, model in enumerate(self._state.models)
                if model in self._spends
            ]
        )

    def book_unread(self, requests: int) -> None:
        """Record that requests may be billed whose results could not be read; raises StoreBusy."""
        if requests > 0:
            spend = Spend(calls=requests, uncertain_calls=requests)
            note = "requests of an upstream batch whose results could not be read"
            self._write([self._row("unread", self._state.models[0], spend, note)])

    def _row(self, name: str, model: str, spend: Spend, note: str) -> LedgerRow:
        state = self._state
        return LedgerRow(
            tenant=state.tenant,
            day=self._day,
            call_id=f"{state.upstream_id}#{name}",
            job_id=state.upstream_id,
            model=model,
            lane=BATCH_LANE,
            organization=None,
            key_id=state.key_id or "",
            request_id=state.message_batch_id,
            outcome="unread" if name == "unread" else "succeeded",
            spend=spend,
            certain=not spend.uncertain_calls,
            note=f"{spend.calls} {note}{f', after {state.problem}' if state.problem else ''}",
        )

    def _write(self, rows: Sequence[LedgerRow]) -> None:
        if written := self._tools.ledger.record_missing(rows):
            self._tools.ledger.add_up(added_up(written))
