"""The outcome of a call: applied to limits and keys, written to the job's record and the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, assert_never

from sluice.domain import jobs as life
from sluice.domain import waits
from sluice.domain.breakers import STREAK, endpoint_circuit, model_circuit, refusals_circuit
from sluice.domain.errors import LeaseLost, NotStorable, StoreBusy
from sluice.domain.jobs import AttemptOutcome, Job, JobError, State
from sluice.domain.limits import Cost
from sluice.domain.models import is_unknown
from sluice.domain.pricing import Bill, Charge, LedgerRow, Spend, Usage, utc_day
from sluice.domain.refusals import SPEND_LIMIT, Scope
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
from sluice.domain.workspaces import WorkspaceRefusal
from sluice.notices.report import report_end
from sluice.ports.claude import NO_HEADERS, Answer, Headers, Refused
from sluice.ports.swap import MOST_TRIES, swap
from sluice.worker.call import Call
from sluice.worker.invocation import DONE, Again, Ending

Change = Callable[[Job, int], Job]
Then = Callable[[Job], Ending]
Consequence = tuple[Change, Then, LedgerRow | None]
"""How the record of the job changes, how the job continues unless it has ended, and the call's ledger row."""

AT_ONCE: Final = {
    Effect.REJECT_KEY,
    Effect.REFUSED_TO_KEY,
    Effect.BLOCK_GROUP,
    Effect.RAMP_GROUP,
    Effect.PARK_GROUP,
}
"""After these a snoozed job tries again at once: another key may work, and the limiter knows all blocks."""


class Outcome:
    """The outcome of one call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._invocation = call.invocation
        self._tools = call.invocation.tools
        self._events = call.invocation.tools.events
        self._unknown_costs = 0
        self._uncertain_calls = 0
        self._unbooked: tuple[LedgerRow, ...] = ()

    async def record(self, answer: Answer | Refused) -> Ending:
        """Apply the response to limits and keys, and write the outcome of the job."""
        await self._learn(answer)
        if isinstance(answer, Answer):
            consequence = await self._answered(answer)
        elif self._call.is_canceled:
            consequence = self._canceled()
        elif answer.failure.type == "canceled":
            return await self._lost()
        else:
            consequence = await self._failed(answer.failure, answer.headers)
        return await self._write(*consequence)

    # Limits and keys ---------------------------------------------------------------------------------------------

    async def _learn(self, answer: Answer | Refused) -> None:
        headers, admission = answer.headers, self._call.admission
        organization = self._invocation.keys.other_organization(
            self._call.key, admission.claimant, headers
        )
        await self._invocation.keys.learn(self._call.key, organization, headers.workspace)
        if organization is not None:
            self._invocation.limiter.belongs(admission, organization, headers)
        if isinstance(answer, Answer) and is_unknown(admission.claimant.model_group):
            name = await self._invocation.keys.learn_model(self._call.job)
            if name is not None:
                owner = organization or admission.claimant.organization
                self._invocation.limiter.knows_model(owner, name, headers)
        self._invocation.limiter.heard(admission, headers, served=isinstance(answer, Answer))
        if isinstance(answer, Answer):
            self._invocation.limiter.works(admission, model_circuit(self._call.job.current_model))
            self._invocation.limiter.works(admission, refusals_circuit(self._call.job.tenant))
        if isinstance(answer, Answer) or answer.failure.is_from_working_endpoint:
            self._invocation.limiter.works(admission, endpoint_circuit(self._call.key.base_url))

    async def _apply(self, verdict: Verdict, failure: Failure, headers: Headers) -> None:
        """Apply a failure to the group, the model or the key."""
        match verdict.effect:
            case Effect.NONE:
                self._events.count("UpstreamErrors")
            case Effect.ENDPOINT_FAILED:
                self._events.count("UpstreamErrors")
                circuit = endpoint_circuit(self._call.key.base_url)
                self._invocation.limiter.failed(self._call.admission, circuit, is_sure=False)
            case Effect.BLOCK_GROUP | Effect.RAMP_GROUP:
                self._events.count("RateLimited")
                self._block(verdict, failure, headers)
            case Effect.PARK_GROUP:
                self._report_park(verdict, failure)
                self._block(verdict, failure, headers)
            case Effect.MODEL_OVERLOADED:
                self._events.count("Overloaded")
                model = self._call.job.current_model
                self._invocation.limiter.failed(self._call.admission, model_circuit(model))
            case Effect.REJECT_KEY:
                if await self._invocation.keys.reject(self._call.key):
                    self._invocation.limiter.recall(self._call.admission)
            case Effect.REFUSED_TO_KEY:
                self._invocation.keys.refused(self._call.job, self._call.key, failure.error)
            case _:
                assert_never(verdict.effect)

    def _block(self, verdict: Verdict, failure: Failure, headers: Headers) -> None:
        """Block the limit group of the call, or only its workspace there."""
        admission, limiter = self._call.admission, self._invocation.limiter
        reason = verdict.outcome.reason if isinstance(verdict.outcome, Snooze) else ""
        until, is_rate = verdict.until or 0, verdict.effect is not Effect.PARK_GROUP
        scope, workspace = verdict.scope, self._invocation.keys.workspace(self._call.key)
        if is_rate and any(seen.remaining == 0 for seen in headers.seen.values()):
            # These headers are those of the organization.
            scope = Scope.ORGANIZATION
        if scope is Scope.ORGANIZATION or workspace is None:
            limiter.throttled(
                admission,
                until,
                reason,
                ramp=verdict.effect is Effect.RAMP_GROUP,
                headers=headers if is_rate else NO_HEADERS,
                request_id=failure.request_id,
            )
            return
        limiter.refused_workspace(
            admission,
            WorkspaceRefusal(
                tuple(dict.fromkeys((workspace, admission.claimant.ties.workspace))),
                until,
                reason,
                f"{self._call.key.id} {failure.request_id or ''}".strip(),
                is_said=scope is Scope.WORKSPACE,
                is_rate=is_rate,
            ),
        )

    def _report_park(self, verdict: Verdict, failure: Failure) -> None:
        """Raise the alarm, once for each block."""
        reason = verdict.outcome.reason if isinstance(verdict.outcome, Snooze) else ""
        if not self._invocation.limiter.is_blocked(self._call.admission):
            self._events.count("GroupsParked")
            self._events.problem(
                "spend limit reached" if reason == SPEND_LIMIT else "account refused by upstream",
                limit_group=self._call.admission.claimant.group,
                key_id=self._call.key.id,
                reason=reason,
                error_code=failure.error_code,
                request_id=failure.request_id,
                until=verdict.until,
            )

    def _is_alike(self, failure: Failure) -> bool:
        """Count a refusal that no row of the table names; return whether several jobs in a row have met one."""
        job, admission = self._call.job, self._call.admission
        if self._invocation.keys.was_refused(job):
            # Another key refused it before: it is one job all the same.
            return False
        breaker = self._invocation.limiter.refused(admission, refusals_circuit(job.tenant))
        if breaker.is_open and (admission.is_probe or breaker.streak == STREAK):
            self._events.count("GroupsParked")
            self._events.problem(
                "unknown refusals in a row",
                limit_group=admission.claimant.group,
                tenant=job.tenant,
                status=failure.status,
                # Not the message, which may quote the request: ended jobs show it to their tenant.
                job_id=job.job_id,
                request_id=failure.request_id,
            )
        return breaker.is_open

    # The job ----------------------------------------------------------------------------------------------------

    async def _answered(self, answer: Answer) -> Consequence:
        usage, job, owner = answer.usage or Usage(), self._call.job, self._invocation.owner
        if answer.usage is None:
            self._call.admission.settle(self._call.admission.reserved)
        else:
            self._call.admission.settle(
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
            self._events.count(metric, tokens, self._call.metric_group)
        may_try_again = job.attempts_used < self._invocation.rules.policy.max_attempts
        if answer.stop_reason == "refusal" and job.has_fallback and may_try_again:
            error = JobError("refusal", f"{job.current_model} refused to answer")
            row = self._row("refusal", usage, cost, answer.request_id)
            return (
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
        row = self._row("succeeded", usage, cost, answer.request_id)
        try:
            result = await self._store(answer.message)
        except NotStorable as error:
            return partial(self._unstored, error, answer.usage, cost), _done, row
        except StoreBusy as busy:
            self._events.problem("answer not stored", job_id=job.job_id, what=busy.what)
            return (
                lambda job, now: life.snooze(
                    job, owner, now, reason=life.NOT_STORED, cost_micro_usd=cost
                ),
                self._after(waits.STORE_BUSY_MS),
                replace(row, note=life.NOT_STORED),
            )
        return (
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

    def _unstored(
        self, error: NotStorable, usage: Usage | None, cost: int | None, job: Job, now: int
    ) -> Job:
        """Return the job ended without what no store takes: a repeat would be billed and fail again."""
        owner, reason = self._invocation.owner, JobError("result_not_storable", str(error))
        return life.give_up(job, owner, now, error=reason, usage=usage, cost_micro_usd=cost)

    def _canceled(self) -> Consequence:
        owner = self._invocation.owner
        return lambda job, now: life.cancel_running(job, owner, now), _done, self._stopped()

    async def _lost(self) -> Ending:
        """Leave the job to the worker that has its lease, or to the next one."""
        await self._invocation.ledger.booked(self._call.job, self._stopped())
        self._events.problem("lease lost during a call", job_id=self._call.job.job_id)
        return self._invocation.in_queue(waits.LEASE_MS)

    def _stopped(self) -> LedgerRow:
        """Return the row of a call that was stopped by its caller: it may have been billed."""
        self._call.admission.settle(self._call.admission.reserved)
        return self._row("canceled", Usage(), None, None, certain=False, note="stopped during call")

    async def _failed(self, failure: Failure, headers: Headers) -> Consequence:
        job = self._call.job
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
        self._call.admission.settle(self._used(failure))
        await self._apply(verdict, failure, headers)
        cost = self._cost(failure.usage, None) if failure.usage else None
        row = None
        if failure.usage or failure.may_be_billed:
            certain = failure.usage is not None and not failure.may_be_billed
            row = self._row(
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
            limit_group=self._call.admission.claimant.group,
            key_id=self._call.key.id,
            status=failure.status,
            error_type=failure.type,
            error_code=failure.error_code,
            request_id=failure.request_id,
            outcome=type(verdict.outcome).__name__.lower(),
        )
        return *self._change(verdict, failure, cost), row

    def _change(self, verdict: Verdict, failure: Failure, cost: int | None) -> tuple[Change, Then]:
        """Return how the record changes after a failure, and what the job does then."""
        owner = self._invocation.owner
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
        return self._call.admission.reserved if failure.may_be_billed else None

    def _cost(self, usage: Usage | None, bill: Bill | None) -> int | None:
        """Return the cost of the call; None if unknown. Without a bill all usage is the model's that was asked."""
        model, day = self._call.claimed.current_model, utc_day(self._invocation.now())
        bill = bill or (None if usage is None else Bill(None, (Charge(None, usage),)))
        cost = self._invocation.rules.prices.bill_micro_usd(model, bill, day)
        if cost is None:
            self._unknown_costs = 1
            self._events.count("UnknownCosts")
            self._events.problem(
                "upstream reports no usage" if usage is None else "model has no price",
                model=model,
                served_by=bill.served_by if bill else None,
            )
        else:
            self._events.count("SpendUsd", cost / 1_000_000)
        return cost

    def _row(  # noqa: PLR0913 - the facts of one call
        self,
        outcome: str,
        usage: Usage,
        cost: int | None,
        request_id: str | None,
        *,
        certain: bool = True,
        note: str | None = None,
    ) -> LedgerRow:
        """Return the call's row in the ledger."""
        job = self._call.claimed
        return LedgerRow(
            tenant=job.tenant,
            day=utc_day(self._invocation.now()),
            # The version at the claim is unique to this call: the numbers of snoozed attempts repeat.
            call_id=f"{job.job_id}#{job.version}",
            job_id=job.job_id,
            model=job.current_model,
            lane=job.lane,
            organization=self._call.admission.claimant.organization,
            key_id=self._call.key.id,
            request_id=request_id,
            outcome=outcome,
            # What is not certain is not known to have been billed.
            spend=Spend.of_call(usage, cost if certain else cost or 0, certain=certain),
            certain=certain,
            note=note,
        )

    # Writing ----------------------------------------------------------------------------------------------------

    async def _store(self, message: str) -> life.Result:
        # A unique name: a late answer must not replace that of another call.
        name = f"{self._call.claimed.job_id}-{self._call.claimed.version}"
        while True:
            try:
                return await self._tools.blocking(self._tools.results.put, name, message)
            except StoreBusy:
                await self._pause(None)
            try:
                # Without its lease the job would be run again in the meantime.
                await self._call.renew_if_due()
            except (StoreBusy, LeaseLost):
                # The write of the outcome handles this.
                continue

    async def _write(self, change: Change, then: Then, row: LedgerRow | None) -> Ending:
        """Write the job's new state, then its ledger row; `then` says how it continues unless it has ended."""
        rows: tuple[LedgerRow, ...] = ()
        if row is not None and not (row.certain and then is _done):
            # The job may run again, or will show nothing of the call. So the call must be on record, in the ledger or
            # in the job, even if this worker dies now.
            rows, row = (row,), None
        self._uncertain_calls = sum(not each.certain for each in rows)
        self._unbooked = (await self._invocation.ledger.booked(self._call.job, *rows)).unbooked
        note = None
        ending: Ending = DONE
        try:
            written = await self._changed(change, row)
        except LeaseLost:
            self._events.problem("lease lost", job_id=self._call.job.job_id)
            note, ending = "lease lost", self._invocation.in_queue(waits.LEASE_MS)
        else:
            if written is None:
                note = "job record missing"
            elif written.state.is_final:
                report_end(self._events, written)
            else:
                ending = then(written)
        self._account(row, note)
        return ending

    async def _changed(self, change: Change, row: LedgerRow | None) -> Job | None:
        """Write a change of the job; None when its record was deleted. Raises LeaseLost, or StoreBusy at the end."""
        tried: list[Job] = []
        conflicts = 0
        while conflicts < MOST_TRIES:
            job, now = self._call.job, self._invocation.now()
            wanted = change(job, now)
            wanted = replace(
                wanted,
                unknown_costs=wanted.unknown_costs + self._unknown_costs,
                uncertain_calls=wanted.uncertain_calls + self._uncertain_calls,
                unbooked=self._unbooked,
            )
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
                change = partial(self._unstored, error, wanted.usage, cost)
                continue
            except StoreBusy:
                await self._pause(row)
                continue
            # One of them is stored already if only the response to its write was lost.
            if stored is None or stored in tried:
                return stored
            # A cancel may have set its flag meanwhile; the call's outcome is still valid.
            self._call.job = stored
            conflicts += 1
        self._account(row, "outcome not stored")
        what = f"the job record, changed concurrently {MOST_TRIES} times,"
        raise StoreBusy(what)

    async def _pause(self, row: LedgerRow | None) -> None:
        """Wait a moment for a busy store; raises StoreBusy if the invocation has no time left.

        The call will then be repeated, so the ledger must contain this one.
        """
        if self._invocation.left() <= 0:
            self._account(row, "outcome not stored")
            what = "the store, until the end of the invocation,"
            raise StoreBusy(what)
        await self._tools.clock.sleep(waits.REWRITE_MS)

    def _account(self, row: LedgerRow | None, note: str | None = None) -> None:
        """Add the call's row to the ledger; `note` says why the job's record does not show the call."""
        if row is not None:
            self._invocation.ledger.account(replace(row, note=note or row.note))


def _done(job: Job) -> Ending:
    del job
    return DONE
