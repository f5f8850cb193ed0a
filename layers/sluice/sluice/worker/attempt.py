"""One attempt at a job: choose a key, get admitted, claim, call, record.

The order is guaranteed: the claim before the call, the stored answer before the acknowledged message, one ledger row
per call.
"""

from __future__ import annotations

from typing import assert_never

from sluice.domain import jobs as life
from sluice.domain import waits
from sluice.domain.errors import NotStorable, StoreBusy
from sluice.domain.jobs import Job, JobError, State, Step
from sluice.domain.keys import UpstreamKey
from sluice.domain.refusals import OVERLOADED
from sluice.domain.turns import Owner
from sluice.domain.waits import Place, place_of
from sluice.notices.report import report_end
from sluice.ports.claude import Body
from sluice.ports.swap import swap
from sluice.worker.call import Call
from sluice.worker.invocation import DONE, Again, Done, Ending, Invocation, Wait
from sluice.worker.limit_books import NO_CAPACITY, Admission, Later, Moved, Overloaded, TooLarge
from sluice.worker.memory import Grant
from sluice.worker.outcome import Outcome
from sluice.worker.source import Taken


class NoCall(Exception):
    """The attempt ends before its call."""

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.ending = ending


class Attempt:
    """One attempt at one job."""

    def __init__(self, invocation: Invocation, taken: Taken, job: Job) -> None:
        self._invocation = invocation
        self._taken = taken
        self._job = job
        self._tools = invocation.tools

    async def run(self) -> Ending:
        """Make one attempt at the job; jobs that have lost many workers run apart from the others.

        Each step returns what the next one needs. If it turns out that no call can be made now, it raises NoCall.
        """
        step = self._next_step()
        most = life.most_in_flight(self._job)
        hold_ms = self._invocation.rules.waits.hold_ms if most is None else waits.HOLD_APART_MS
        try:
            if step is not Step.RUN:
                return await self._without_call(step)
            if (
                self._job.last_snooze is not None
                and self._job.last_snooze.reason == life.NOT_STORED
            ):
                # Its next answer must not be lost as well.
                await self._tools.blocking(self._tools.results.probe)
            async with self._invocation.held.suspects.turn(most):
                with self._invocation.memory.grant() as grant:
                    return await self._with_call(grant, hold_ms)
        except NoCall as no_call:
            return no_call.ending
        except NotStorable as error:
            if self._job.is_leased(self._invocation.now()):
                raise
            # Its own fault, and no busy store: it would be refused again at every delivery.
            return await self._end(
                State.ERRORED, JobError("record_not_storable", f"the job cannot run: {error}")
            )

    async def _with_call(self, grant: Grant, hold_ms: int) -> Ending:
        """Choose, admit, claim, call, record."""
        is_large = self._invocation.memory.wants(self._job.request_bytes) > 0
        while True:
            admission, key = await self._admit(hold_ms)
            with admission:
                # A small request is read while its job waits; a large one must not occupy memory during the wait.
                if is_large:
                    await self._wait_for_start(admission)
                if grant.take_now(self._job.request_bytes):
                    # Read before the claim: a failure here uses no attempt.
                    body = await self._request(grant)
                    try:
                        if not is_large:
                            await self._wait_for_start(admission)
                        job = await self._claim(key, admission.claimant.organization)
                    except BaseException:
                        # The exception's traceback would keep the body in memory.
                        body.release()
                        raise
                    return await self._call(job, body, admission, key, grant)
            await self._wait_for_memory(grant)
            # A job that waits for memory must not count as one that waits for limits.
            hold_ms = waits.START_WITH_MEMORY_MS

    # Without a call ---------------------------------------------------------------------------------------------

    def _next_step(self) -> Step:
        return life.next_step(
            self._job, self._invocation.now(), self._invocation.rules.policy.max_attempts
        )

    async def _without_call(self, step: Step) -> Ending:
        """Do what the next step requires, other than RUN."""
        job, now, spread = self._job, self._invocation.now(), self._invocation.spread
        match step:
            case Step.DROP:
                return await self._drop()
            case Step.BUSY:
                return await self._busy()
            case Step.EARLY:
                delay = (job.not_before or now) - now + spread(1_000)
                return Wait(now + delay, place_of(delay))
            case Step.CANCEL:
                return await self._end(State.CANCELED, None)
            case Step.EXPIRE:
                error = JobError("deadline_exceeded", "the deadline passed before an answer came")
                return await self._end(State.EXPIRED, error)
            case Step.USED_UP | Step.KILLER:
                return await self._end(State.ERRORED, _why_over(job, step, now))
            case Step.RUN:
                message = "RUN needs a call"
                raise AssertionError(message)
            case _:
                assert_never(step)

    # Choose and admit -------------------------------------------------------------------------------------------

    async def _admit(self, hold_ms: int) -> tuple[Admission, UpstreamKey]:
        """Choose a key and reserve a start time in its limit group."""
        latest = self._latest_start(hold_ms)
        choice = await self._invocation.keys.claimants(self._job)
        if isinstance(choice, JobError):
            raise NoCall(await self._end(State.ERRORED, choice))
        if not choice or latest is None:
            raise NoCall(self._until_key_or_time(has_key=bool(choice)))
        admission = await self._invocation.limiter.admit(
            [claimant for claimant, _ in choice],
            self._job.input_chars,
            self._job.max_tokens,
            latest,
            owner=Owner(self._job.tenant, self._taken.batch_id),
            may_fall_back=self._job.has_fallback,
        )
        match admission:
            case Admission():
                return admission, next(
                    key for claimant, key in choice if claimant == admission.claimant
                )
            case Moved():
                raise NoCall(Again(self._job))
            case Overloaded():
                now = self._invocation.now()
                raise NoCall(Again(life.skip_model(self._job, now, reason=OVERLOADED)))
            case Later():
                raise NoCall(await self._later(admission))
            case TooLarge(input_tokens=tokens, limit=limit):
                raise NoCall(await self._end(State.ERRORED, _too_large(self._job, tokens, limit)))
            case _:
                assert_never(admission)

    def _latest_start(self, hold_ms: int) -> int | None:
        """Return the latest start in this invocation; None if no call fits into it any more."""
        now = self._invocation.now()
        hold_ms = min(waits.SCOUT_MS, hold_ms) if self._taken.is_scout else hold_ms
        latest = min(self._invocation.stop_at - self._invocation.window(self._job), now + hold_ms)
        return None if latest < now else latest

    def _until_key_or_time(self, *, has_key: bool) -> Wait:
        """Return the job: no key is usable now, or no time is left."""
        self._invocation.held.misses += 1
        spread, receive_count = self._invocation.spread, self._taken.message.receive_count
        if has_key:
            return self._invocation.in_queue(waits.for_new_invocation(spread(1_000), receive_count))
        delay = waits.NO_KEY_MS + spread(10_000)
        return self._invocation.in_queue(waits.grown(delay, receive_count))

    async def _later(self, later: Later) -> Ending:
        """Return a job that cannot start soon to the queue, or park it."""
        is_scout = self._taken.is_scout
        if not is_scout:
            self._invocation.held.misses += 1
            self._invocation.held.is_short = later.reason == NO_CAPACITY
            with self._invocation.held.leaving():
                await self._linger(later.at)
        now = self._invocation.now()
        delay = max(1_000, later.at - now)
        if place_of(delay) is Place.PARKED:
            return await self._park(delay, later.reason)
        spread = self._invocation.spread
        return self._invocation.in_queue(
            min(delay, waits.SCOUT_MS) if is_scout else delay + spread(2_000)
        )

    async def _linger(self, start_at: int) -> None:
        """Keep a job that cannot start soon for a moment before it goes back.

        A worker that gave its batch back at once would receive the next one at once, and so a whole backlog in
        minutes: paid receives, and messages that count as in flight while they wait. What can start is not kept
        waiting by it: a fair queue delivers it first, to the next batch at the latest.
        """
        latest = self._invocation.stop_at - waits.LEAST_WINDOW_MS
        until = min(self._taken.linger_until, latest, start_at)
        await self._tools.clock.sleep(max(0, until - self._invocation.now()))

    # Claim ------------------------------------------------------------------------------------------------------

    async def _wait_for_start(self, admission: Admission) -> None:
        if not await self._invocation.limiter.wait_for_start(admission):
            # It was revoked. The reason may have to do with the keys.
            self._invocation.keys.look_anew()
            raise NoCall(Again(self._job))

    async def _wait_for_memory(self, grant: Grant) -> None:
        """Wait in line for the memory for the request, without a start time."""
        self._invocation.held.memory_waits += 1
        if not await grant.take(self._job.request_bytes, waits.MEMORY_MS):
            raise NoCall(self._invocation.in_queue(1_000 + self._invocation.spread(4_000)))

    async def _request(self, grant: Grant) -> Body:
        body = await self._invocation.requests.read(self._job.job_id, grant)
        if body is None:
            error = JobError("request_lost", "the stored request is missing; submit the job again")
            raise NoCall(await self._end(State.ERRORED, error))
        return body

    async def _claim(self, key: UpstreamKey, organization: str | None) -> Job:
        """Take the lease, unless the job or its key changed during the wait, or another worker was quicker."""
        if self._next_step() is not Step.RUN or self._invocation.keys.is_rejected(key):
            raise NoCall(Again(self._job))
        job, now = self._job, self._invocation.now()
        alone = life.most_in_flight(job) == 1
        claimed = life.claim(
            job,
            self._invocation.owner,
            now,
            now + waits.LEASE_MS,
            alone=alone,
            organization=organization,
            key_id=key.id,
        )
        claimed = await self._invocation.ledger.booked(claimed)
        try:
            stored = await self._swap(claimed)
        except StoreBusy:
            # It may be written: if it was abandoned now, the attempt would count although no call was made.
            await self._tools.clock.sleep(waits.REWRITE_MS)
            self._invocation.unconfirmed[job.job_id] = claimed.version
            stored = await self._swap(claimed)
            del self._invocation.unconfirmed[job.job_id]
        # Equal, but read back: only the response to the first try was lost.
        if stored != claimed:
            raise _overtaken_by(stored)
        return claimed

    # Call and record --------------------------------------------------------------------------------------------

    async def _call(
        self, job: Job, body: Body, admission: Admission, key: UpstreamKey, grant: Grant
    ) -> Ending:
        """Make the call for the claimed job, and record what it brought."""
        if self._job.started_at is None:
            delay_ms = self._invocation.now() - job.created_at
            self._tools.events.count("StartDelaySeconds", delay_ms / 1000)
        call = Call(self._invocation, job, admission, key)
        with self._invocation.held.calling():
            answer = await call.make(body, grant)
            return await Outcome(call).record(answer)

    # Writing without a call -------------------------------------------------------------------------------------

    async def _end(self, state: State, error: JobError | None) -> Done:
        """End a job that no worker runs."""
        ended = life.finish_waiting(self._job, state, self._invocation.now(), error)
        await self._write(ended)
        report_end(self._tools.events, ended)
        return DONE

    async def _busy(self) -> Ending:
        """Return a job to the queue until its lease ends; take back an own claim that the store did not confirm."""
        job, owner, now = self._job, self._invocation.owner, self._invocation.now()
        lease, version = job.lease, self._invocation.unconfirmed.pop(job.job_id, None)
        if lease is not None and lease.owner == owner and version == job.version:
            # No call was made for it.
            stored = await self._swap(life.snooze(job, owner, now, reason="store busy"))
            return DONE if stored is None else Again(stored)
        until = lease.until if lease else now
        return self._invocation.in_queue(until - now + self._invocation.spread(2_000))

    async def _drop(self) -> Ending:
        """Acknowledge the message of an ended job, once the ledger has its calls: their worker may have died with them.

        A job that has ended just now may be in the hands of its worker, which will write them. But the message may be
        its only one: it is returned, and deleted at its next delivery.
        """
        if delay := life.left_to_worker_ms(self._job, self._invocation.now()):
            return self._invocation.in_queue(delay)
        if await self._invocation.ledger.book(life.billed_rows(self._job)):
            return DONE
        return self._invocation.in_queue(waits.STORE_BUSY_MS)

    async def _park(self, delay_ms: int, reason: str) -> Wait:
        """Take a waiting job out of the queue."""
        now = self._invocation.now()
        until = waits.parked_until(now, delay_ms) or now
        await self._write(life.park(self._job, now, reason=reason, not_before=until))
        return Wait(until, Place.PARKED)

    async def _write(self, wanted: Job) -> None:
        """Write the record of a job that nobody runs."""
        booked = await self._invocation.ledger.booked(wanted)
        stored = await self._swap(booked)
        if stored is not booked:
            raise _overtaken_by(stored)

    async def _swap(self, wanted: Job) -> Job | None:
        replace = self._tools.jobs.replace
        return await self._tools.blocking(swap, replace, wanted, self._job.version)


def _overtaken_by(stored: Job | None) -> NoCall:
    """Return how a job continues that another writer changed; a deleted one is done."""
    return NoCall(DONE if stored is None else Again(stored))


def _why_over(job: Job, step: Step, now: int) -> JobError:
    if step is Step.KILLER:
        reason = f"{life.MOST_LOST_ALONE} workers died while each ran nothing but this job"
        return JobError("worker_lost", f"{reason}; it is not tried again")
    closed = life.without_loss(job, now)
    last = closed.attempts[-1].error if closed.attempts else None
    reason = f"; the last error: {last.type}: {last.message}" if last else ""
    return JobError("attempts_used_up", f"{closed.attempts_used} attempts failed{reason}")


def _too_large(job: Job, tokens: int, limit: int) -> JobError:
    return JobError(
        "invalid_request_error",
        f"the request has about {tokens:,} input tokens, more than the {limit:,} a minute that "
        f"the organization's limit allows for {job.current_model}; it can never be admitted",
        400,
    )
