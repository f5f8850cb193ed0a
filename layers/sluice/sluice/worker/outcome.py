"""What a call brought: given to the limits and the keys, written into the job's record and the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, assert_never

from sluice.domain import jobs as life
from sluice.domain import waits
from sluice.domain.breakers import STREAK
from sluice.domain.errors import LeaseLost, NotStorable, StoreBusy
from sluice.domain.jobs import AttemptOutcome, Job, JobError, State
from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import Cost
from sluice.domain.pricing import Bill, LedgerRow, Usage
from sluice.domain.refusals import SPEND_LIMIT
from sluice.domain.retries import (
    Effect,
    Failure,
    FallBack,
    GiveUp,
    Retry,
    Snooze,
    Verdict,
    judge,
    refused_alike,
)
from sluice.notices.report import report_end
from sluice.ports.claude import Answer, Headers, Refused
from sluice.ports.swap import MOST_TRIES, swap
from sluice.worker.call import Heartbeat
from sluice.worker.endings import DONE, Again, Ending
from sluice.worker.invocation import Invocation
from sluice.worker.keys import endpoint_circuit, model_circuit, refusals_circuit
from sluice.worker.ledger import CallEntry
from sluice.worker.limit_books import Admission

Change = Callable[[Job, int], Job]
Then = Callable[[Job], Ending]

AT_ONCE: Final = {
    Effect.REJECT_KEY,
    Effect.REFUSED_TO_KEY,
    Effect.BLOCK_GROUP,
    Effect.RAMP_GROUP,
}
"""After these a snoozed job looks again at once: another key may do, and the limiter knows how long a group waits."""


class Outcome:
    """What one call brought."""

    def __init__(
        self,
        invocation: Invocation,
        heartbeat: Heartbeat,
        admission: Admission,
        key: UpstreamKey,
        entry: CallEntry,
    ) -> None:
        self._invocation = invocation
        self._heartbeat = heartbeat
        self._admission = admission
        self._key = key
        self._entry = entry
        self._owner = invocation.owner
        self._tools = invocation.tools
        self._events = invocation.tools.events
        self._limiter = invocation.limiter
        self._keys = invocation.keys
        self._ledger = invocation.ledger
        self._unknown_costs = 0

    async def record(self, answer: Answer | Refused) -> Ending:
        """Use what the response said, and write what it means for the job."""
        await self._learn(answer)
        if isinstance(answer, Answer):
            return await self._answered(answer)
        if self._heartbeat.is_canceled or answer.failure.type == "canceled":
            return await self._stopped()
        return await self._failed(answer.failure, answer.headers)

    # What the response says about more than this job ------------------------------------------------------------

    async def _learn(self, answer: Answer | Refused) -> None:
        headers, admission = answer.headers, self._admission
        organization = self._keys.other_organization(self._key, admission.claimant, headers)
        if organization is not None:
            await self._keys.learn_organization(self._key, organization)
            self._limiter.belongs(admission, organization, headers)
        self._limiter.heard(admission, headers, served=isinstance(answer, Answer))
        if isinstance(answer, Answer):
            self._limiter.works(admission, model_circuit(self._heartbeat.job.current_model))
            self._limiter.works(admission, refusals_circuit(self._heartbeat.job.tenant))
        if isinstance(answer, Answer) or answer.failure.is_from_working_endpoint:
            self._limiter.works(admission, endpoint_circuit(self._key))

    async def _apply(self, verdict: Verdict, failure: Failure, headers: Headers) -> None:
        """Use what a failure says about the group, the model or the key."""
        match verdict.effect:
            case Effect.NONE:
                self._events.count("UpstreamErrors")
            case Effect.ENDPOINT_FAILED:
                self._events.count("UpstreamErrors")
                self._limiter.failed(self._admission, endpoint_circuit(self._key))
            case Effect.BLOCK_GROUP | Effect.RAMP_GROUP:
                self._events.count("RateLimited")
                self._limiter.throttled(
                    self._admission,
                    verdict.until or 0,
                    "rate limited",
                    ramp=verdict.effect is Effect.RAMP_GROUP,
                    headers=headers,
                    request_id=failure.request_id,
                )
            case Effect.PARK_GROUP:
                self._park_group(verdict, failure)
            case Effect.MODEL_OVERLOADED:
                self._events.count("Overloaded")
                model = self._heartbeat.job.current_model
                self._limiter.failed(self._admission, model_circuit(model))
            case Effect.REJECT_KEY:
                if await self._keys.reject(self._key):
                    self._limiter.recall(self._admission)
            case Effect.REFUSED_TO_KEY:
                self._keys.refused(self._heartbeat.job, self._key, failure.error)
            case _:
                assert_never(verdict.effect)

    def _park_group(self, verdict: Verdict, failure: Failure) -> None:
        reason = verdict.outcome.reason if isinstance(verdict.outcome, Snooze) else ""
        name = self._admission.claimant.group
        group = self._limiter.group(name)
        if group is None or group.blocked_until <= self._invocation.now():
            self._events.count("GroupsParked")
            self._events.problem(
                "spend limit reached" if reason == SPEND_LIMIT else "account refused by upstream",
                limit_group=name,
                reason=reason,
                error_code=failure.error_code,
                message=failure.message,
                until=verdict.until,
            )
        self._limiter.throttled(
            self._admission, verdict.until or 0, reason, request_id=failure.request_id
        )

    def _is_alike(self, failure: Failure) -> bool:
        """Count a refusal that no row of the table names; return whether several jobs in a row have met one."""
        job = self._heartbeat.job
        if self._keys.was_refused(job):
            # Another key refused it before: it is one job all the same.
            return False
        breaker = self._limiter.refused(self._admission, refusals_circuit(job.tenant))
        if breaker.is_open and (self._admission.is_probe or breaker.streak == STREAK):
            self._events.count("GroupsParked")
            self._events.problem(
                "unknown refusals in a row",
                limit_group=self._admission.claimant.group,
                tenant=job.tenant,
                status=failure.status,
                message=failure.message,
                request_id=failure.request_id,
            )
        return breaker.is_open

    # What it means for the job ----------------------------------------------------------------------------------

    async def _answered(self, answer: Answer) -> Ending:
        usage, job, owner = answer.usage or Usage(), self._heartbeat.job, self._owner
        if answer.usage is None:
            self._admission.settle(self._admission.reserved)
        else:
            self._admission.settle(
                Cost(1, usage.limited_input_tokens, usage.output_tokens),
                answered=True,
                cached=usage.cache_read_input_tokens > 0,
            )
        cost = self._cost(answer.usage, answer.bill)
        for metric, tokens in (
            ("InputTokens", usage.limited_input_tokens),
            ("CacheReadTokens", usage.cache_read_input_tokens),
            ("OutputTokens", usage.output_tokens),
        ):
            self._events.count(metric, tokens, self._entry.metric_group)
        may_try_again = job.attempts_used < self._invocation.rules.policy.max_attempts
        if answer.stop_reason == "refusal" and job.has_fallback and may_try_again:
            error = JobError("refusal", f"{job.current_model} refused to answer")
            row = self._entry.row("refusal", usage, cost, answer.request_id)
            return await self._write(
                lambda job, now: life.retry(
                    job,
                    owner,
                    now,
                    error=error,
                    outcome=AttemptOutcome.FALLBACK,
                    request_id=answer.request_id,
                    usage=answer.usage,
                    cost_micro_usd=cost,
                ),
                Again,
                row,
            )
        row = self._entry.row("succeeded", usage, cost, answer.request_id)
        try:
            result = await self._store(answer.message, row)
        except NotStorable as error:
            return await self._write(partial(self._lost, error, answer.usage, cost), _done, row)
        return await self._write(
            lambda job, now: life.succeed(
                job,
                owner,
                now,
                result=result,
                usage=answer.usage,
                cost_micro_usd=cost,
                request_id=answer.request_id,
            ),
            _done,
            row,
        )

    def _lost(
        self, error: NotStorable, usage: Usage | None, cost: int | None, job: Job, now: int
    ) -> Job:
        """Return the job ended without what no store takes: a repeat would be billed and fail again."""
        reason = JobError("result_not_storable", str(error))
        return life.give_up(job, self._owner, now, error=reason, usage=usage, cost_micro_usd=cost)

    async def _stopped(self) -> Ending:
        """End a call that was stopped from outside. It may have been billed, and the ledger says so."""
        self._admission.settle(self._admission.reserved)
        row = self._entry.row(
            "canceled", Usage(), None, None, certain=False, note="stopped during call"
        )
        if not self._heartbeat.is_canceled:
            self._ledger.account(row)
            self._events.problem("lease lost during a call", job_id=self._heartbeat.job.job_id)
            return self._invocation.in_queue(waits.LEASE_MS)
        return await self._write(
            lambda job, now: life.cancel_running(job, self._owner, now), _done, row
        )

    async def _failed(self, failure: Failure, headers: Headers) -> Ending:
        job = self._heartbeat.job
        verdict = judge(
            failure,
            now=self._invocation.now(),
            attempts_used=job.attempts_used,
            snoozes=job.snoozes,
            has_fallback=job.has_fallback,
            jitter=self._tools.jitter(),
            policy=self._invocation.rules.policy,
        )
        if not verdict.is_known and self._is_alike(failure):
            verdict = refused_alike(self._invocation.rules.policy)
        self._admission.settle(self._used(failure))
        await self._apply(verdict, failure, headers)
        cost = self._cost(failure.usage, None) if failure.usage else None
        row = None
        if failure.usage or failure.may_be_billed:
            certain = failure.usage is not None and not failure.may_be_billed
            row = self._entry.row(
                failure.type,
                failure.usage or Usage(),
                cost,
                failure.request_id,
                certain=certain,
                note=failure.type,
            )
        self._events.note(
            "call failed",
            job_id=job.job_id,
            limit_group=self._admission.claimant.group,
            key_id=self._key.id,
            status=failure.status,
            error_type=failure.type,
            error_code=failure.error_code,
            request_id=failure.request_id,
            outcome=type(verdict.outcome).__name__.lower(),
        )
        change, then = self._consequence(verdict, failure, cost)
        return await self._write(change, then, row)

    def _consequence(
        self, verdict: Verdict, failure: Failure, cost: int | None
    ) -> tuple[Change, Then]:
        """Return how the record changes after a failure, and what the job does then."""
        owner = self._owner
        match verdict.outcome:
            case Snooze(after_ms=after, reason=reason):
                then: Then = Again if verdict.effect in AT_ONCE else self._after(after)
                return lambda job, now: life.snooze(
                    job,
                    owner,
                    now,
                    reason=reason,
                    not_before=waits.parked_until(now, after),
                    cost_micro_usd=cost,
                ), then
            case FallBack(reason=reason):
                return lambda job, now: life.fall_back(
                    job, owner, now, reason=reason, cost_micro_usd=cost
                ), Again
            case Retry(after_ms=after, full_window=full_window):
                return lambda job, now: life.retry(
                    job,
                    owner,
                    now,
                    error=failure.error,
                    full_window=full_window,
                    not_before=waits.parked_until(now, after),
                    request_id=failure.request_id,
                    usage=failure.usage,
                    cost_micro_usd=cost,
                ), self._after(after)
            case GiveUp():
                return lambda job, now: life.give_up(
                    job,
                    owner,
                    now,
                    error=failure.error,
                    request_id=failure.request_id,
                    usage=failure.usage,
                    cost_micro_usd=cost,
                ), _done
            case _:
                assert_never(verdict.outcome)

    def _after(self, delay_ms: int) -> Then:
        return partial(self._invocation.after_call, delay_ms)

    def _used(self, failure: Failure) -> Cost | None:
        """Return what a failed call took from the buckets: nothing if it was rejected, the estimate if unknown."""
        if failure.usage is not None:
            return Cost(1, failure.usage.limited_input_tokens, failure.usage.output_tokens)
        return self._admission.reserved if failure.may_be_billed else None

    def _cost(self, usage: Usage | None, bill: Bill | None) -> int | None:
        cost = self._entry.cost(usage, bill)
        if cost is None:
            self._unknown_costs = 1
            self._events.count("UnknownCosts")
            self._events.problem(
                "upstream reports no usage" if usage is None else "model has no price",
                model=self._heartbeat.job.current_model,
                served_by=bill.served_by if bill else None,
            )
        else:
            self._events.count("SpendUsd", cost / 1_000_000)
        return cost

    # Writing ----------------------------------------------------------------------------------------------------

    async def _store(self, message: str, row: LedgerRow) -> life.Result:
        # A name for this call alone: a late answer must not replace that of another call.
        name = self._entry.answer_name
        while True:
            try:
                return await self._tools.blocking(self._tools.results.put, name, message)
            except StoreBusy:
                await self._pause(row)
            try:
                # Without its lease the job would be run again meanwhile.
                await self._heartbeat.renew_if_due()
            except (StoreBusy, LeaseLost):
                # The write of the outcome finds out what that means.
                continue

    async def _write(self, change: Change, then: Then, row: LedgerRow | None = None) -> Ending:
        """Write the job's new state, then its ledger row; `then` says how it goes on unless it has ended."""
        if row is not None and not row.certain:
            # What may be billed and is repeated must be in the ledger even if this worker dies right after.
            await self._ledger.record_now([row], news=[row])
            row = None
        try:
            written = await self._changed(change, row)
        except LeaseLost:
            self._events.problem("lease lost", job_id=self._heartbeat.job.job_id)
            self._account(row, "lease lost")
            return self._invocation.in_queue(waits.LEASE_MS)
        self._account(row, None if written else "job record gone")
        if written is not None and not written.state.is_final:
            return then(written)
        if written is not None:
            report_end(self._events, written)
        return DONE

    async def _changed(self, change: Change, row: LedgerRow | None) -> Job | None:
        """Write a change of the job; None when its record was deleted. Raises LeaseLost, or StoreBusy at the end."""
        tried: list[Job] = []
        conflicts = 0
        while conflicts < MOST_TRIES:
            job, now = self._heartbeat.job, self._invocation.now()
            wanted = change(job, now)
            wanted = replace(wanted, unknown_costs=wanted.unknown_costs + self._unknown_costs)
            if wanted.state is State.QUEUED and wanted.cancel_requested:
                ended = life.finish_waiting(wanted, State.CANCELED, now)
                wanted = replace(ended, version=wanted.version)
            tried.append(wanted)
            try:
                stored = await self._tools.blocking(
                    swap, self._tools.jobs.replace, wanted, job.version
                )
            except NotStorable as error:
                if tried[1:]:
                    raise
                cost = wanted.cost_micro_usd - job.cost_micro_usd
                change = partial(self._lost, error, wanted.usage, cost)
                continue
            except StoreBusy:
                await self._pause(row)
                continue
            # One of them is stored already if only the response to its write was lost.
            if stored is None or stored in tried:
                return stored
            # A cancel may have set its flag meanwhile; the call's outcome is still valid.
            self._heartbeat.job = stored
            conflicts += 1
        self._account(row, "outcome not stored")
        what = f"the job record, changed concurrently {MOST_TRIES} times,"
        raise StoreBusy(what)

    async def _pause(self, row: LedgerRow | None) -> None:
        """Wait a moment for a busy store; raises StoreBusy when the invocation has no time left.

        The call will be repeated then, so the ledger must have this one.
        """
        if self._invocation.left() <= 0:
            self._account(row, "outcome not stored")
            what = "the store, until the end of the invocation,"
            raise StoreBusy(what)
        await self._tools.clock.sleep(waits.REWRITE_MS)

    def _account(self, row: LedgerRow | None, note: str | None = None) -> None:
        """Have the call's row written; `note` says why the job's record does not show the call."""
        if row is not None:
            self._ledger.account(replace(row, note=note or row.note))


def _done(job: Job) -> Ending:
    del job
    return DONE
