"""One attempt at a job: choose a key, get admitted, claim, call, record.

The order of events is the promise: claimed before the call, answer stored before the message is done, one ledger row
per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from sluice.domain import jobs as life
from sluice.domain import waits
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Job, JobError, State, Step
from sluice.domain.keys import UpstreamKey
from sluice.domain.waits import Place, place_of
from sluice.notices.report import report_end
from sluice.ports.claude import Body
from sluice.ports.swap import swap
from sluice.worker.call import Call, Heartbeat
from sluice.worker.endings import DONE, Again, Done, Ending, Wait
from sluice.worker.invocation import Invocation
from sluice.worker.ledger import CallEntry
from sluice.worker.limit_books import Admission, Claimant, Later, Moved, TooLarge
from sluice.worker.memory import Grant
from sluice.worker.outcome import Outcome
from sluice.worker.source import Taken


@dataclass(frozen=True, slots=True)
class _Claimed:
    """A job whose call can be made."""

    job: Job
    body: Body


@dataclass(frozen=True, slots=True)
class _NoMemory:
    """There is no memory for the job's request now."""


class Attempt:
    """One attempt at one job."""

    def __init__(self, invocation: Invocation, taken: Taken, job: Job) -> None:
        self._invocation = invocation
        self._taken = taken
        self._job = job
        self._tools = invocation.tools
        self._rules = invocation.rules
        self._limiter = invocation.limiter

    async def run(self) -> Ending:
        """Bring the job as far as one attempt goes; jobs that have lost many workers run apart from the others."""
        step = self._next_step()
        if step is not Step.RUN:
            return await self._without_call(step)
        most = life.most_in_flight(self._job)
        hold_ms = self._rules.waits.hold_ms if most is None else waits.HOLD_APART_MS
        async with self._invocation.held.suspects.turn(most):
            return await self._with_memory(hold_ms)

    async def _with_memory(self, hold_ms: int) -> Ending:
        """Run it; a request too large for the memory that is left waits in line for it, without a start time."""
        with self._invocation.memory.grant() as grant:
            ending = await self._once(grant, hold_ms)
            return await self._in_line(grant) if isinstance(ending, _NoMemory) else ending

    async def _in_line(self, grant: Grant) -> Ending:
        """Wait in line for memory, then try again."""
        self._invocation.held.memory_waits += 1
        if not await grant.take(self._job.request_bytes, waits.MEMORY_MS):
            return self._invocation.in_queue(1_000 + self._invocation.spread(4_000))
        # Jobs that wait for memory must not wait for limits that are not theirs.
        ending = await self._once(grant, waits.START_WITH_MEMORY_MS)
        return Again(self._job) if isinstance(ending, _NoMemory) else ending

    async def _once(self, grant: Grant, hold_ms: int) -> Ending | _NoMemory:
        """Choose, admit, claim, call, record."""
        latest = self._latest_start(hold_ms)
        choice = await self._invocation.keys.claimants(self._job)
        if isinstance(choice, JobError) or not choice or latest is None:
            return await self._not_chosen(choice)
        admission = await self._limiter.admit(
            [claimant for claimant, _ in choice],
            self._job.input_chars,
            self._job.max_tokens,
            latest,
        )
        if not isinstance(admission, Admission):
            return await self._not_admitted(admission)
        key = next(key for claimant, key in choice if claimant == admission.claimant)
        with admission:
            claimed = await self._claimed(admission, key, grant)
            if isinstance(claimed, _Claimed):
                return await self._called(claimed, admission, key, grant)
        return await self._end(State.ERRORED, claimed) if isinstance(claimed, JobError) else claimed

    # Choose -----------------------------------------------------------------------------------------------------

    def _next_step(self) -> Step:
        return life.next_step(self._job, self._invocation.now(), self._rules.policy.max_attempts)

    async def _without_call(self, step: Step) -> Ending:
        """Do what a step other than RUN asks for."""
        job, now, spread = self._job, self._invocation.now(), self._invocation.spread
        match step:
            case Step.DROP:
                return DONE
            case Step.BUSY:
                until = job.lease.until if job.lease else now
                return self._invocation.in_queue(until - now + spread(2_000))
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

    def _latest_start(self, hold_ms: int) -> int | None:
        """Return until when it may wait for its start here; None when no call fits into the invocation any more."""
        now = self._invocation.now()
        hold_ms = min(waits.SCOUT_MS, hold_ms) if self._taken.is_scout else hold_ms
        latest = min(self._invocation.stop_at - self._invocation.window(self._job), now + hold_ms)
        return None if latest < now else latest

    async def _not_chosen(
        self, choice: Sequence[tuple[Claimant, UpstreamKey]] | JobError
    ) -> Ending:
        """End a job that no key may be used for; else give it back: no key is usable now, or no time is left."""
        if isinstance(choice, JobError):
            return await self._end(State.ERRORED, choice)
        self._invocation.held.may_take = False
        spread = self._invocation.spread
        if choice:
            return self._invocation.in_queue(spread(1_000))
        delay = waits.NO_KEY_MS + spread(10_000)
        return self._invocation.in_queue(waits.grown(delay, self._taken.message.receive_count))

    # Admit ------------------------------------------------------------------------------------------------------

    async def _not_admitted(self, answer: Later | TooLarge | Moved) -> Ending:
        match answer:
            case Moved():
                return Again(self._job)
            case Later():
                return await self._later(answer)
            case TooLarge(input_tokens=tokens, limit=limit):
                return await self._end(State.ERRORED, _too_large(self._job, tokens, limit))
            case _:
                assert_never(answer)

    async def _later(self, later: Later) -> Ending:
        """Give a job back that cannot start soon: to the queue, or out of it."""
        is_scout = self._taken.is_scout
        if not is_scout:
            # What is behind it in the queue would not start sooner.
            self._invocation.held.may_take = False
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

    async def _claimed(
        self, admission: Admission, key: UpstreamKey, grant: Grant
    ) -> _Claimed | _NoMemory | JobError | Ending:
        """Wait for the start time, read the request, take the lease."""
        is_large = self._invocation.memory.wants(self._job.request_bytes) > 0
        # A small request is read while its job waits; the memory of a large one is not to wait with it.
        if is_large and not await self._may_start(admission):
            return Again(self._job)
        if not grant.take_now(self._job.request_bytes):
            return _NoMemory()
        # Read before the claim: what fails here has used no attempt.
        body = await self._invocation.requests.read(self._job.job_id, grant)
        if body is None:
            return JobError("request_lost", "the stored request is missing; submit the job again")
        try:
            if not is_large and not await self._may_start(admission):
                claim: Job | Ending = Again(self._job)
            else:
                claim = await self._claim(key)
        except BaseException:
            # The exception's traceback would keep the body in memory.
            body.release()
            raise
        if isinstance(claim, Job):
            return _Claimed(claim, body)
        body.release()
        return claim

    async def _may_start(self, admission: Admission) -> bool:
        """Wait for the start time; False when it was revoked."""
        if await self._limiter.wait_for_start(admission):
            return True
        # The reason may have to do with the keys.
        self._invocation.keys.look_anew()
        return False

    async def _claim(self, key: UpstreamKey) -> Job | Ending:
        """Take the lease, unless the job or its key changed while it waited, or another worker was quicker."""
        if self._next_step() is not Step.RUN or self._invocation.keys.is_rejected(key):
            return Again(self._job)
        job, now = self._job, self._invocation.now()
        alone = life.most_in_flight(job) == 1
        claimed = life.claim(job, self._invocation.owner, now, now + waits.LEASE_MS, alone=alone)
        try:
            stored = await self._swap(claimed)
        except StoreBusy:
            # Perhaps it is written: given up now, the attempt would count though no call was made.
            await self._tools.clock.sleep(waits.REWRITE_MS)
            stored = await self._swap(claimed)
        # Equal, but read back: only the response to the first try was lost.
        if stored != claimed:
            return _overtaken_by(stored)
        await self._invocation.ledger.account_for_lost(job, claimed)
        return claimed

    # Call and record --------------------------------------------------------------------------------------------

    async def _called(
        self, claimed: _Claimed, admission: Admission, key: UpstreamKey, grant: Grant
    ) -> Ending:
        invocation, events = self._invocation, self._tools.events
        before, job = self._job, claimed.job
        started = invocation.now()
        if before.started_at is None:
            events.count("StartDelaySeconds", (started - job.created_at) / 1000)
        entry = CallEntry(job, admission.claimant, key, self._rules.prices, self._tools.clock)
        heartbeat = Heartbeat(invocation, job)
        with invocation.held.calling():
            answer = await Call(invocation, heartbeat, admission, key).make(claimed.body, grant)
            events.count("UpstreamCalls")
            events.count("Calls", 1, entry.metric_group)
            seconds = (invocation.now() - started) / 1000
            events.count("CallSeconds", seconds, entry.metric_group)
            return await Outcome(invocation, heartbeat, admission, key, entry).record(answer)

    # Writing without a call ------------------------------------------------------------------------------------

    async def _end(self, state: State, error: JobError | None) -> Ending:
        """End a job that nobody runs."""
        ended = life.finish_waiting(self._job, state, self._invocation.now(), error)
        stored = await self._swap(ended)
        if stored is not ended:
            return _overtaken_by(stored)
        await self._invocation.ledger.account_for_lost(self._job, ended)
        report_end(self._tools.events, ended)
        return DONE

    async def _park(self, delay_ms: int, reason: str) -> Ending:
        """Take a waiting job out of the queue."""
        now = self._invocation.now()
        until = waits.parked_until(now, delay_ms) or now
        parked = life.park(self._job, now, reason=reason, not_before=until)
        stored = await self._swap(parked)
        if stored is not parked:
            return _overtaken_by(stored)
        await self._invocation.ledger.account_for_lost(self._job, parked)
        return Wait(until, Place.PARKED)

    async def _swap(self, wanted: Job) -> Job | None:
        replace = self._tools.jobs.replace
        return await self._tools.blocking(swap, replace, wanted, self._job.version)


def _overtaken_by(stored: Job | None) -> Again | Done:
    """Return how a job goes on that another writer changed; a deleted one is done."""
    return DONE if stored is None else Again(stored)


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
