"""One claimed job and its upstream call: make it, keep the lease meanwhile, write down what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, assert_never

from sluice.domain import jobs as life
from sluice.domain.errors import LeaseLost, Stale, StoreBusy
from sluice.domain.jobs import AttemptOutcome, Job, JobError, State
from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import Cost
from sluice.domain.pricing import LedgerRow, Spend, Usage, utc_day
from sluice.domain.retries import Effect, Failure, FallBack, GiveUp, Retry, Snooze, Verdict, judge
from sluice.notices.report import report_end
from sluice.ports.claude import Answer, Body, CallRequest, Headers, Refused
from sluice.worker.key_choice import KeyChoice, endpoint_circuit, model_circuit
from sluice.worker.limiter import Admission, Limiter
from sluice.worker.memory import Grant, Memory
from sluice.worker.outbox import Outbox
from sluice.worker.tools import Rules, Tools

CANCEL_CHECK_MS: Final = 15_000
LEAST_WINDOW_MS: Final = 60_000
OTHER_MODELS: Final = "other"
"""The metrics' model group for models that are not in the price list."""

BUSY_MS: Final = 1_000
"""How long a store that is busy is left alone before a write that cannot wait is tried again."""

LONGEST_DELAY_MS: Final = 900_000
"""A longer wait leaves the queue: the job is parked, and the sweep sends it again."""


@dataclass(frozen=True, slots=True)
class Done:
    """The message may be deleted."""


@dataclass(frozen=True, slots=True)
class PutBack:
    """The message comes back after a delay in milliseconds."""

    delay_ms: int
    grows: bool = False
    """Doubled with every 20 receives: a fault that lasts must not use up the queue's 1,000 receives in an afternoon.

    Not sooner, because most receives were for other reasons: a job that was snoozed ten times and then met one refused
    read would wait for minutes.
    """
    leaves: bool = False
    """This invocation has too little time left for it, however long it waits."""


Disposition = Done | PutBack
DONE: Final = Done()


@dataclass(frozen=True, slots=True)
class Rest:
    """The job waits for a short time where it is: a receive and a slot of the queue cost more than a sleep."""

    job: Job
    delay_ms: int


@dataclass(frozen=True, slots=True)
class Invocation:
    """What everything that is done in one invocation shares."""

    tools: Tools
    rules: Rules
    limiter: Limiter
    keys: KeyChoice
    outbox: Outbox
    memory: Memory
    owner: str
    """In whose name leases are taken."""
    started: int
    """Epoch milliseconds."""
    stop_at: int
    """When calls must have ended, in epoch milliseconds."""

    def wait(self, delay_ms: int) -> Disposition | int:
        """Say where a job that failed waits: with this worker, in the queue, or outside."""
        fits = self.tools.clock.now() + delay_ms + LEAST_WINDOW_MS < self.stop_at
        rests = delay_ms <= self.rules.waits.rest_ms and fits
        return delay_ms if rests else wait_outside(delay_ms)


class Call:
    """One claimed job and its upstream call."""

    def __init__(
        self, invocation: Invocation, job: Job, admission: Admission, key: UpstreamKey, grant: Grant
    ) -> None:
        self._invocation = invocation
        self._grant = grant
        self._job = job
        self._admission = admission
        self._key = key
        self._tools = invocation.tools
        self._limiter = invocation.limiter
        self._events = invocation.tools.events
        self._rules = invocation.rules
        self._keys = invocation.keys
        self._outbox = invocation.outbox
        self._owner = invocation.owner
        self._claim = job.version
        # A metric's dimension; names that anybody may invent would cost a series each.
        today = utc_day(self._tools.clock.now())
        priced = self._rules.prices.price(job.current_model, today) is not None
        self._group = admission.claimant.model_group if priced else OTHER_MODELS
        self._canceled = False
        self._settled = False
        self._renewed_at = self._tools.clock.now()

    async def make(self, body: Body) -> Disposition | Rest | Job:
        """Make the call and write down what came of it."""
        try:
            return await self._outcome(await self._send(body))
        finally:
            self._settle(None)

    async def _send(self, body: Body) -> Answer | Refused:
        now = self._tools.clock.now()
        # The last seconds of the invocation belong to writing down what came.
        window = max(1_000, self._invocation.stop_at - now)
        whole = self._invocation.stop_at - self._invocation.started
        request = CallRequest(
            key=self._key,
            model=self._job.current_model,
            body=body,
            names_model=self._job.fallbacks_used == 0,
            anthropic_version=self._job.anthropic_version,
            anthropic_beta=self._job.anthropic_beta,
            max_tokens=self._job.max_tokens,
            window_ms=window,
            full_window=window * 10 >= whole * 9,
            early=not self._limiter.knows(self._admission),
            on_headers=self._heard,
            room=self._grant.grow,
        )
        call = asyncio.ensure_future(self._tools.claude.send(request))
        watch = asyncio.ensure_future(self._keep_lease())
        try:
            await asyncio.wait({call, watch}, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                answer = call.result()
            else:
                # Canceled by the caller, or the lease is lost: nobody waits for this answer any more.
                answer = Refused(Failure("canceled", "stopped during the call", may_be_billed=True))
        finally:
            for task in (call, watch):
                task.cancel()
            await asyncio.gather(call, watch, return_exceptions=True)
            body.release()
        seconds = (self._tools.clock.now() - now) / 1000
        self._events.count("UpstreamCalls")
        self._events.count("Calls", 1, self._group)
        self._events.count("CallSeconds", seconds, self._group)
        return answer

    async def _keep_lease(self) -> None:
        """Renew the lease while the call runs; return when the job was canceled or taken away."""
        while True:
            await self._tools.clock.sleep(CANCEL_CHECK_MS)
            now = self._tools.clock.now()
            try:
                current = await self._tools.blocking(self._tools.jobs.get, self._job.job_id)
                if current is None or current.lease is None or current.lease.owner != self._owner:
                    return
                self._job = current
                if current.cancel_requested:
                    self._canceled = True
                    return
                await self._renew_if_due(now)
            except Stale:
                continue
            except StoreBusy:
                if now - self._renewed_at >= life.LEASE_MS - CANCEL_CHECK_MS:
                    return

    async def _renew_if_due(self, now: int) -> None:
        if now - self._renewed_at >= life.RENEW_MS - CANCEL_CHECK_MS:
            kept = life.renew(self._job, self._owner, now + life.LEASE_MS)
            await self._tools.blocking(self._tools.jobs.replace, kept, self._job.version)
            self._job, self._renewed_at = kept, now

    def _heard(self, headers: Headers) -> None:
        """Take in headers that came before their answer."""
        self._limiter.heard(self._admission, headers, served=False)
        if self._is_of_another(headers.organization):
            self._limiter.belongs(self._admission, headers.organization or "", headers)

    async def _outcome(self, answer: Answer | Refused) -> Disposition | Rest | Job:
        if answer.headers.organization:
            await self._know_organization(answer.headers)
        self._limiter.heard(self._admission, answer.headers, served=isinstance(answer, Answer))
        if isinstance(answer, Answer):
            self._limiter.works(self._admission, model_circuit(self._job.current_model))
        if isinstance(answer, Answer) or answer.failure.is_from_working_endpoint:
            self._limiter.works(self._admission, endpoint_circuit(self._key))
        if isinstance(answer, Answer):
            return await self._answered(answer)
        if self._canceled or answer.failure.type == "canceled":
            return await self._stopped()
        return await self._failed(answer.failure, answer.headers)

    async def _know_organization(self, headers: Headers) -> None:
        organization = headers.organization
        if organization is None or not self._is_of_another(organization):
            return
        await self._keys.learn_organization(self._key, organization)
        self._limiter.belongs(self._admission, organization, headers)

    def _is_of_another(self, organization: str | None) -> bool:
        """Tell whether the key draws on another organisation's limits than it was admitted by."""
        if organization is None or organization == self._admission.claimant.organization:
            return False
        if self._key.organization is None:
            return True
        self._events.problem(
            "key belongs to another organization than the pool says",
            key_id=self._key.id,
            stated=self._key.organization,
            organization=organization,
        )
        return False

    async def _answered(self, answer: Answer) -> Disposition | Rest | Job:
        usage = answer.usage
        self._settle(
            Cost(1, usage.limited_input_tokens, usage.output_tokens),
            answered=True,
            cached=usage.cache_read_input_tokens > 0,
        )
        cost = self._price(usage)
        for metric, tokens in (
            ("InputTokens", usage.limited_input_tokens),
            ("CacheReadTokens", usage.cache_read_input_tokens),
            ("OutputTokens", usage.output_tokens),
        ):
            self._events.count(metric, tokens, self._group)
        may_try_again = self._job.attempts_used < self._rules.policy.max_attempts
        if answer.stop_reason == "refusal" and self._job.has_fallback and may_try_again:
            error = JobError("refusal", f"{self._job.current_model} refused to answer")
            return await self._write(
                lambda job, now: life.retry(
                    job,
                    self._owner,
                    now,
                    error=error,
                    outcome=AttemptOutcome.FALLBACK,
                    request_id=answer.request_id,
                    usage=usage,
                    cost_micro_usd=cost,
                ),
                None,
                self._row("refusal", usage, cost, answer.request_id),
            )
        row = self._row("succeeded", usage, cost, answer.request_id)
        result = await self._store(answer.message, row)
        return await self._write(
            lambda job, now: life.succeed(
                job,
                self._owner,
                now,
                result=result,
                usage=usage,
                cost_micro_usd=cost,
                request_id=answer.request_id,
            ),
            DONE,
            row,
        )

    async def _store(self, message: str, row: LedgerRow) -> life.Result:
        # A name for this call alone: one that comes late must not put its answer in the place of another's.
        name = f"{self._job.job_id}-{self._claim}"
        while True:
            try:
                return await self._tools.blocking(self._tools.results.put, name, message)
            except StoreBusy:
                await self._rest(row)
                await self._keep_on()

    async def _keep_on(self) -> None:
        """Keep the lease while the answer waits to be stored: else the job would be run again meanwhile."""
        try:
            await self._renew_if_due(self._tools.clock.now())
        except Stale as stale:
            if isinstance(stale.current, Job):
                self._job = stale.current
        except (StoreBusy, LeaseLost):
            # The write of the outcome will say what it means.
            return

    async def _rest(self, row: LedgerRow | None) -> None:
        """Wait a moment for a store that is busy; raises StoreBusy when there is no time left to wait.

        The call will be made again then, so the ledger has to name this one.
        """
        if self._tools.clock.now() >= self._invocation.stop_at:
            self._account(row, "outcome not stored")
            what = "the store, until the end of the invocation,"
            raise StoreBusy(what)
        await self._tools.clock.sleep(BUSY_MS)

    async def _stopped(self) -> Disposition | Rest | Job:
        """The call was ended from outside. It may have been billed; what is known goes to the ledger."""
        self._settle(self._admission.reserved)
        row = self._row("canceled", Usage(), None, None, certain=False, note="stopped during call")
        if not self._canceled:
            self._outbox.account(row)
            self._events.problem("lease lost during a call", job_id=self._job.job_id)
            return PutBack(life.LEASE_MS)
        return await self._write(
            lambda job, now: life.cancel_running(job, self._owner, now), DONE, row
        )

    async def _failed(self, failure: Failure, headers: Headers) -> Disposition | Rest | Job:
        now = self._tools.clock.now()
        verdict = judge(
            failure,
            now=now,
            attempts_used=self._job.attempts_used,
            snoozes=self._job.snoozes,
            has_fallback=self._job.has_fallback,
            jitter=self._tools.jitter(),
            policy=self._rules.policy,
        )
        self._settle(self._used(failure))
        await self._apply(verdict, failure, headers)
        cost = self._price(failure.usage) if failure.usage else None
        row = None
        if failure.usage or failure.may_be_billed:
            row = self._row(
                failure.type,
                failure.usage or Usage(),
                cost,
                failure.request_id,
                certain=failure.usage is not None and not failure.may_be_billed,
                note=failure.type,
            )
        self._events.note(
            "call failed",
            job_id=self._job.job_id,
            limit_group=self._admission.claimant.group,
            key_id=self._key.id,
            status=failure.status,
            error_type=failure.type,
            error_code=failure.error_code,
            request_id=failure.request_id,
            outcome=type(verdict.outcome).__name__.lower(),
        )
        match verdict.outcome:
            case Snooze(after_ms=after, reason=reason):
                # With a rejected key the next one can be tried at once; how long a group waits, the limiter knows.
                again = verdict.effect in {
                    Effect.REJECT_KEY,
                    Effect.REFUSED_TO_KEY,
                    Effect.BLOCK_GROUP,
                    Effect.RAMP_GROUP,
                }
                return await self._write(
                    lambda job, at: life.snooze(
                        job,
                        self._owner,
                        at,
                        reason=reason,
                        not_before=_parked_until(at, after),
                        cost_micro_usd=cost,
                    ),
                    None if again else self._invocation.wait(after),
                    row,
                )
            case FallBack(reason=reason):
                return await self._write(
                    lambda job, at: life.fall_back(
                        job, self._owner, at, reason=reason, cost_micro_usd=cost
                    ),
                    None,
                    row,
                )
            case Retry(after_ms=after, full_window=full_window):
                return await self._write(
                    lambda job, at: life.retry(
                        job,
                        self._owner,
                        at,
                        error=failure.error,
                        request_id=failure.request_id,
                        usage=failure.usage,
                        cost_micro_usd=cost,
                        full_window=full_window,
                        not_before=_parked_until(at, after),
                    ),
                    self._invocation.wait(after),
                    row,
                )
            case GiveUp():
                return await self._write(
                    lambda job, at: life.give_up(
                        job,
                        self._owner,
                        at,
                        error=failure.error,
                        request_id=failure.request_id,
                        usage=failure.usage,
                        cost_micro_usd=cost,
                    ),
                    DONE,
                    row,
                )
            case _:
                assert_never(verdict.outcome)

    async def _apply(self, verdict: Verdict, failure: Failure, headers: Headers) -> None:
        """Let others know what this failure says about the group, the model or the key."""
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
            case Effect.SPEND_LIMIT:
                group = self._limiter.group(self._admission.claimant.group)
                if group is None or group.blocked_until <= self._tools.clock.now():
                    self._events.count("GroupsParked")
                    self._events.problem(
                        "limit group parked", limit_group=self._admission.claimant.group,
                        error_code=failure.error_code, until=verdict.until,
                    )  # fmt: skip
                self._limiter.throttled(
                    self._admission,
                    verdict.until or 0,
                    "spend limit",
                    request_id=failure.request_id,
                )
            case Effect.MODEL_OVERLOADED:
                self._events.count("Overloaded")
                self._limiter.failed(self._admission, model_circuit(self._job.current_model))
            case Effect.REJECT_KEY:
                if await self._keys.reject(self._key):
                    self._limiter.recall(self._admission)
            case Effect.REFUSED_TO_KEY:
                self._keys.refused(self._job, self._key, failure.error)
            case _:
                assert_never(verdict.effect)

    def _used(self, failure: Failure) -> Cost | None:
        """What a failed call took from the buckets: nothing if it was turned away, the estimate if nobody knows."""
        if failure.usage is not None:
            return Cost(1, failure.usage.limited_input_tokens, failure.usage.output_tokens)
        if failure.may_be_billed:
            return self._admission.reserved
        return None

    def _settle(self, used: Cost | None, *, answered: bool = False, cached: bool = False) -> None:
        if not self._settled:
            self._settled = True
            self._limiter.settle(self._admission, used, answered=answered, cached=cached)

    def _price(self, usage: Usage) -> int | None:
        day = utc_day(self._tools.clock.now())
        cost = self._rules.prices.cost_micro_usd(self._job.current_model, usage, day)
        if cost is None:
            self._events.problem("model has no price", model=self._job.current_model)
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
        return LedgerRow(
            tenant=self._job.tenant,
            day=utc_day(self._tools.clock.now()),
            # The version at the claim is unique to this call: attempts given back repeat their number.
            call_id=f"{self._job.job_id}#{self._claim}",
            job_id=self._job.job_id,
            model=self._job.current_model,
            lane=self._job.lane,
            organization=self._admission.claimant.organization,
            key_id=self._key.id,
            request_id=request_id,
            outcome=outcome,
            spend=Spend.of_call(usage, cost or 0),
            certain=certain,
            note=note,
        )

    def _account(self, row: LedgerRow | None, note: str | None = None) -> None:
        """Let the call's row be written; `note` says why the job's record does not show the call."""
        if row is not None:
            self._outbox.account(replace(row, note=note or row.note))

    async def _write(  # noqa: C901 - one branch per way it can go
        self,
        change: Callable[[Job, int], Job],
        disposition: Disposition | int | None,
        row: LedgerRow | None = None,
    ) -> Disposition | Rest | Job:
        """Write the job's new state, then let its message go.

        None as disposition: go on with the job at once; a number: after so many milliseconds.
        """
        if row is not None and not row.certain:
            # What may be billed and is made again must be in the ledger even if this worker dies right after.
            await self._outbox.record_now([row], news=[row])
            row = None
        tried: list[Job] = []
        while True:
            try:
                now = self._tools.clock.now()
                written = change(self._job, now)
                if written.state is State.QUEUED and written.cancel_requested:
                    ended = life.finish_waiting(written, State.CANCELED, now)
                    written = replace(ended, version=written.version)
                tried.append(written)
                await self._tools.blocking(self._tools.jobs.replace, written, self._job.version)
            except Stale as stale:
                if stale.current in tried:
                    # Written already: only the reply was lost.
                    written = stale.current
                    break
                # A cancel may have set its flag meanwhile; the call's outcome still stands.
                if not isinstance(stale.current, Job):
                    self._account(row, "job record gone")
                    return DONE
                self._job = stale.current
            except LeaseLost:
                self._events.problem("lease lost", job_id=self._job.job_id)
                self._account(row, "lease lost")
                return PutBack(life.LEASE_MS)
            except StoreBusy:
                await self._rest(row)
            else:
                break
        self._account(row)
        if written.state.is_final:
            report_end(self._events, written)
            return DONE
        if isinstance(disposition, int):
            return Rest(written, disposition)
        return written if disposition is None else disposition


def wait_outside(delay_ms: int) -> Disposition:
    """Say what becomes of the message of a job that waits: a long wait is spent outside the queue."""
    return DONE if delay_ms > LONGEST_DELAY_MS else PutBack(delay_ms)


def _parked_until(now: int, delay_ms: int) -> int | None:
    return now + min(delay_ms, life.LONGEST_PARK_MS) if delay_ms > LONGEST_DELAY_MS else None
