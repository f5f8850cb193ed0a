"""The worker's use case: run one batch of messages, all jobs side by side, each at the time the limiter gives it.

The order of events is the promise: claim before the call, answer stored before the message counts as done, one
ledger row per call. A message is either done or visible again after a delay; nothing else happens to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Final, Protocol, assert_never

from sluice.domain import jobs as life
from sluice.domain.errors import KeyPoolBroken, LeaseLost, Stale, StoreBusy
from sluice.domain.jobs import AttemptOutcome, Job, JobError, State, Step
from sluice.domain.keys import (
    KeyMark,
    UpstreamKey,
    organization_of,
    shared_organizations,
    stated_limits,
)
from sluice.domain.limits import Cost, group_id, model_group
from sluice.domain.pricing import LedgerRow, PriceList, Spend, Usage
from sluice.domain.retries import (
    Effect,
    Failure,
    FallBack,
    GiveUp,
    Retry,
    RetryPolicy,
    Snooze,
    Verdict,
    judge,
)
from sluice.limiter import Admission, Again, Claimant, Later, Limiter, TooLarge, claimant_for
from sluice.ports import (
    Answer,
    Answers,
    Blocking,
    CallBooks,
    CallRequest,
    Claude,
    Clock,
    Events,
    Headers,
    Jitter,
    JobRecords,
    KeyPool,
    LimitStore,
    Received,
    Refused,
    Requests,
    Returns,
)

LEASE_MS: Final = 120_000
"""Longer than any gap between renewals; a job whose worker died is free again after this time at the latest."""

RENEW_MS: Final = 45_000
CANCEL_CHECK_MS: Final = 15_000
HOLD_MS: Final = 60_000
"""How long a message may wait inside an invocation for its start; beyond that it waits better in the queue."""

LEAST_WINDOW_MS: Final = 60_000
SLOW_TOKENS_PER_SECOND: Final = 25
"""A pace almost every answer keeps: a call starts only if `max_tokens` at this pace would fit the time left."""

OTHER_MODELS: Final = "other"
"""The metrics' model group for models that are not in the price list."""

FLUSH_MS: Final = 1_000
LAST_FLUSHES: Final = 3
"""How often the end of an invocation tries to write what a busy store has not taken."""

LONGEST_DELAY_MS: Final = 900_000
"""A longer wait leaves the queue: the job is parked, and the sweep sends it again."""

NO_KEY_DELAY_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Done:
    """The message may be deleted."""


@dataclass(frozen=True, slots=True)
class PutBack:
    """The message comes back after a delay in milliseconds."""

    delay_ms: int
    grows: bool = False
    """Doubled with every receive: a fault that lasts must not use up the queue's 1,000 receives in an afternoon."""
    leaves: bool = False
    """This invocation has too little time left for it, however long it waits."""


Disposition = Done | PutBack
DONE: Final = Done()


class Room(Protocol):
    """Where an invocation that holds all its messages itself lets them in: the rows of a range."""

    longest_stay_ms: int
    """Messages put back for no longer wait in the invocation; the others leave it."""

    async def enter(self, message: Received) -> None:
        """Wait until the message may be worked on."""
        ...

    def leave(self, message: Received) -> None:
        """Note that nobody works on it any more: it is done, waits, or leaves."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """Everything the worker needs of the world."""

    jobs: JobRecords
    params: Requests
    results: Answers
    returns: Returns
    limits: LimitStore
    keys: KeyPool
    claude: Claude
    ledger: CallBooks
    clock: Clock
    jitter: Jitter
    blocking: Blocking
    events: Events


@dataclass(frozen=True, slots=True)
class Rules:
    """What is set for this deployment."""

    policy: RetryPolicy
    prices: PriceList
    model_groups: Mapping[str, str]


class Worker:
    """Runs batches one after the other on one event loop, and keeps its limiter and key marks between them."""

    def __init__(self, tools: Tools, rules: Rules) -> None:
        self._tools = tools
        self._rules = rules
        self._told: set[str] = set()
        self.limiter = Limiter(
            tools.limits, tools.blocking, tools.clock, tools.jitter, tools.events
        )

    async def run(
        self, messages: Sequence[Received], stop_at: int, owner: str, room: Room | None = None
    ) -> list[str]:
        """Run the batch; return the ids of the messages that are not done.

        No call lasts beyond `stop_at` (epoch milliseconds). `owner` names this invocation in the leases it takes.
        With a `room`, short waits are spent in it, not in a queue.
        """
        batch = _Batch(self._tools, self._rules, owner, self.limiter, stop_at, self._told, room)
        return await batch.run(messages)


class _Batch:
    """One invocation."""

    def __init__(  # noqa: PLR0913, PLR0917 - private
        self,
        tools: Tools,
        rules: Rules,
        owner: str,
        limiter: Limiter,
        stop_at: int,
        told_once: set[str],
        room: Room | None = None,
    ) -> None:
        self._room = room
        self.tools = tools
        self.rules = rules
        self.owner = owner
        self.limiter = limiter
        self.events = tools.events
        self.started = tools.clock.now()
        self.stop_at = stop_at
        self._told_once = told_once
        self._marks: dict[str, KeyMark] = {}
        self._refusals: dict[str, dict[str, JobError]] = {}
        """By job and key: a 403 is about the request as often as about the key."""
        self.rows: list[LedgerRow] = []
        self._to_put_back: list[tuple[Received, int]] = []
        self._flushing = asyncio.Lock()

    async def run(self, messages: Sequence[Received]) -> list[str]:
        ours = [message for message in messages if message.job_id is not None]
        writes = self.limiter.writes
        not_done = {message.message_id for message in messages}
        async with self.limiter:
            housekeeping = asyncio.create_task(self._housekeeping(), name="housekeeping")
            try:
                found = await self._read(ours)
                tasks = [
                    asyncio.create_task(self._settled(message, found), name=message.message_id)
                    for message in messages
                ]
                for message, done in zip(messages, await asyncio.gather(*tasks), strict=True):
                    if done:
                        not_done.discard(message.message_id)
            finally:
                # Never in the middle of a write: what it has taken in hand would be lost.
                async with self._flushing:
                    housekeeping.cancel()
                await asyncio.gather(housekeeping, return_exceptions=True)
                await self._flush_to_the_end()
        self.events.note(
            "batch done",
            messages=len(messages),
            put_back=len(not_done),
            seconds=(self.tools.clock.now() - self.started) / 1000,
            limiter_writes=self.limiter.writes - writes,
        )
        return [message.message_id for message in messages if message.message_id in not_done]

    async def _read(self, messages: Sequence[Received]) -> Mapping[str, Job]:
        """Read the jobs and what is known about the keys; on failure the jobs are read one by one later."""
        ids = [message.job_id for message in messages if message.job_id is not None]
        try:
            await self._read_marks()
            return await self.tools.blocking(self.tools.jobs.get_many, list(dict.fromkeys(ids)))
        except KeyPoolBroken as error:
            self.events.problem("key pool not readable", reason=str(error))
        except StoreBusy as error:
            self.events.problem("batch not readable", reason=str(error))
        except Exception:  # noqa: BLE001 - each job is read again on its own
            self.events.problem("batch not readable")
        return {}

    async def _read_marks(self) -> None:
        keys = await self.tools.blocking(self.tools.keys.keys)
        marks = await self.tools.blocking(self.tools.limits.marks, [key.id for key in keys])
        self._marks = dict(marks)
        for sentence in shared_organizations(keys, self._marks):
            if sentence not in self._told_once:
                self._told_once.add(sentence)
                self.events.note("keys share an organization", advice=sentence)

    async def _settled(self, message: Received, found: Mapping[str, Job]) -> bool:
        """Run one message to its disposition; whatever goes wrong, the message comes back."""
        while True:
            if self._room is not None:
                await self._room.enter(message)
            try:
                disposition = await self._tried(message, found)
            finally:
                if self._room is not None:
                    self._room.leave(message)
            if isinstance(disposition, Done):
                return True
            doublings = min(message.receive_count - 1, 10) if disposition.grows else 0
            delay = min(disposition.delay_ms << max(0, doublings), LONGEST_DELAY_MS)
            if disposition.leaves or not self._stays(delay):
                self._to_put_back.append((message, delay))
                return False
            await self.tools.clock.sleep(delay)
            message = replace(message, receive_count=message.receive_count + 1)
            found = {}

    def _stays(self, delay_ms: int) -> bool:
        if self._room is None or delay_ms > self._room.longest_stay_ms:
            return False
        return self.tools.clock.now() + delay_ms + LEAST_WINDOW_MS <= self.stop_at

    async def _tried(self, message: Received, found: Mapping[str, Job]) -> Disposition:
        try:
            return await self._message(message, found)
        except StoreBusy as error:
            self.events.problem("store busy", job_id=message.job_id, what=error.what)
            return PutBack(5_000 + self._spread(5_000), grows=True)
        except Exception:  # noqa: BLE001 - the message comes back, whatever it was
            self.events.problem("worker failed on a job", job_id=message.job_id)
            return PutBack(15_000 + self._spread(15_000), grows=True)

    async def _message(self, message: Received, found: Mapping[str, Job]) -> Disposition:
        if message.canary is not None:
            await self.tools.blocking(
                self.tools.limits.canary, message.canary, self.tools.clock.now()
            )
            return DONE
        if message.job_id is None:
            await self.tools.blocking(self.tools.returns.bury, message, "not a message of Sluice's")
            return DONE
        job = found.get(message.job_id)
        if job is None:
            job = await self.tools.blocking(self.tools.jobs.get, message.job_id)
        if job is None:
            await self.tools.blocking(self.tools.returns.bury, message, "no such job")
            return DONE
        return await self._job(job)

    async def _job(self, job: Job) -> Disposition:
        """Bring the job as far as it comes in this invocation."""
        while True:
            now = self.tools.clock.now()
            step = life.next_step(job, now, self.rules.policy.max_attempts)
            if step is not Step.RUN:
                outcome = await self._not_run(job, step, now)
            else:
                outcome = await self._run(job, now)
            if not isinstance(outcome, Job):
                return outcome
            job = outcome

    async def _not_run(self, job: Job, step: Step, now: int) -> Disposition | Job:
        """Do what a step other than RUN asks for; a Job means: look again, it has changed."""
        match step:
            case Step.DROP:
                return DONE
            case Step.BUSY:
                until = job.lease.until if job.lease else now
                return PutBack(until - now + self._spread(2_000))
            case Step.EARLY:
                return _wait((job.not_before or now) - now + self._spread(1_000))
            case Step.CANCEL:
                return await self._end(job, State.CANCELED, None)
            case Step.EXPIRE:
                error = JobError("deadline_exceeded", "the deadline passed before an answer came")
                return await self._end(job, State.EXPIRED, error)
            case Step.USED_UP:
                last = job.attempts[-1].error if job.attempts else None
                reason = f"; the last error: {last.type}: {last.message}" if last else ""
                error = JobError("attempts_used_up", f"{job.attempts_used} attempts failed{reason}")
                return await self._end(job, State.ERRORED, error)
            case Step.RUN:
                message = "RUN is not handled here"
                raise AssertionError(message)
            case _:
                assert_never(step)

    async def _run(  # noqa: C901, PLR0911, PLR0912 - one return per way it can go
        self, job: Job, now: int
    ) -> Disposition | Job:
        """Get a start time, wait for it, claim, call. A Job means: look again."""
        choice = await self._claimants(job)
        if isinstance(choice, JobError):
            return await self._end(job, State.ERRORED, choice)
        if not choice:
            return PutBack(NO_KEY_DELAY_MS + self._spread(10_000), grows=True)
        # Where messages come back to this very invocation, each holding begins anew.
        holds_from = self.started if self._room is None else now
        latest = min(self.stop_at - self._window_needed(job), holds_from + HOLD_MS)
        if latest < now:
            return PutBack(self._spread(1_000), leaves=True)
        admitted = await self.limiter.admit(
            [claimant for claimant, _ in choice], job.input_chars, job.max_tokens, latest
        )
        match admitted:
            case Again():
                return job
            case Later(at=at, reason=reason):
                delay = max(1_000, at - self.tools.clock.now()) + self._spread(2_000)
                if delay > LONGEST_DELAY_MS:
                    return await self._park(job, delay, reason)
                return PutBack(delay)
            case TooLarge(input_tokens=tokens, limit=limit):
                return await self._end(job, State.ERRORED, _too_large(job, tokens, limit))
            case Admission():
                pass
            case _:
                assert_never(admitted)
        key = next(key for claimant, key in choice if claimant == admitted.claimant)
        if not await self.limiter.wait_for_start(admitted):
            self.limiter.settle(admitted, None)
            return job
        now = self.tools.clock.now()
        if life.next_step(job, now, self.rules.policy.max_attempts) is not Step.RUN:
            # Its deadline passed while it waited: nobody wants an answer any more.
            self.limiter.settle(admitted, None)
            return job
        try:
            # Read before the claim: what fails here has used no attempt.
            params = await self.tools.blocking(self.tools.params.get, job.job_id)
            if params is None:
                self.limiter.settle(admitted, None)
                error = JobError("request_lost", "the stored request is gone; submit the job again")
                return await self._end(job, State.ERRORED, error)
            now = self.tools.clock.now()
            claimed = life.claim(job, self.owner, now, now + LEASE_MS)
            await self.tools.blocking(self.tools.jobs.replace, claimed, job.version)
        except Stale as stale:
            self.limiter.settle(admitted, None)
            current = stale.current
            return current if isinstance(current, Job) else DONE
        except BaseException:
            self.limiter.settle(admitted, None)
            raise
        if job.started_at is None:
            self.events.count("StartDelaySeconds", (now - job.created_at) / 1000)
        return await _Call(self, claimed, admitted, key).make(params.body)

    # Choosing a key --------------------------------------------------------------------------------------------

    async def _claimants(self, job: Job) -> list[tuple[Claimant, UpstreamKey]] | JobError:
        """Return one key for each limit group the job may use; empty while all are rejected."""
        try:
            keys = await self.tools.blocking(self.tools.keys.keys)
        except (KeyPoolBroken, StoreBusy) as error:
            self.events.problem("key pool not readable", reason=str(error))
            return []
        model = job.current_model
        allowed = [key for key in keys if key.allows(job.tenant, model)]
        if not allowed:
            if not keys:
                return []
            message = f"no key of the key pool may be used for model {model} by this tenant"
            return JobError("permission_error", message, 403)
        refusals = self._refusals.get(job.job_id, {})
        if refusals and all(key.id in refusals for key in allowed):
            # Every key was asked: it is the request that may not be made.
            return next(iter(refusals.values()))
        usable: dict[str, list[tuple[Claimant, UpstreamKey]]] = {}
        stated = stated_limits(keys, self._marks)
        name = model_group(model, self.rules.model_groups)
        for key in allowed:
            mark = self._marks.get(key.id)
            if key.id in refusals or (mark is not None and mark.rejects(key)):
                continue
            organization = organization_of(key, mark)
            moved_to = self.limiter.moved.get(group_id(organization, name), organization)
            claimant = claimant_for(moved_to, name, key.id, stated.get(organization))
            usable.setdefault(claimant.group, []).append((claimant, key))
        return [self._by_weight(choices) for choices in usable.values()]

    def _by_weight(
        self, choices: Sequence[tuple[Claimant, UpstreamKey]]
    ) -> tuple[Claimant, UpstreamKey]:
        point = self.tools.jitter() * sum(key.weight for _, key in choices)
        for choice in choices:
            point -= choice[1].weight
            if point < 0:
                return choice
        return choices[-1]

    def _window_needed(self, job: Job) -> int:
        """Return the milliseconds a call of this job should have before it, at most nine tenths of an invocation."""
        most = (self.stop_at - self.started) * 9 // 10
        if job.full_window:
            return most
        needed = LEAST_WINDOW_MS // 2 + job.max_tokens * 1000 // SLOW_TOKENS_PER_SECOND
        return min(most, max(LEAST_WINDOW_MS, needed))

    # Writing ---------------------------------------------------------------------------------------------------

    async def _end(self, job: Job, state: State, error: JobError | None) -> Disposition | Job:
        """End a job that nobody runs."""
        ended = life.finish_waiting(job, state, self.tools.clock.now(), error)
        try:
            await self.tools.blocking(self.tools.jobs.replace, ended, job.version)
        except Stale as stale:
            return stale.current if isinstance(stale.current, Job) else DONE
        self.told(ended)
        return DONE

    async def _park(self, job: Job, delay_ms: int, reason: str) -> Disposition | Job:
        """Take a waiting job out of the queue: parked messages would fill the in-flight ceiling for everybody."""
        now = self.tools.clock.now()
        not_before = now + min(delay_ms, life.LONGEST_PARK_MS)
        parked = life.park(job, now, reason=reason, not_before=not_before)
        try:
            await self.tools.blocking(self.tools.jobs.replace, parked, job.version)
        except Stale as stale:
            return stale.current if isinstance(stale.current, Job) else DONE
        return DONE

    def told(self, job: Job) -> None:
        """Tell of a job that has ended."""
        self.events.count(
            {
                State.SUCCEEDED: "JobsSucceeded",
                State.ERRORED: "JobsErrored",
                State.EXPIRED: "JobsExpired",
                State.CANCELED: "JobsCanceled",
            }[job.state]
        )
        self.events.note(
            f"job {job.state}",
            job_id=job.job_id,
            tenant=job.tenant,
            model=job.current_model,
            attempts_used=job.attempts_used,
            snoozes=job.snoozes,
            error_type=job.error.type if job.error else None,
        )

    def _spread(self, milliseconds: int) -> int:
        return int(self.tools.jitter() * milliseconds)

    # Housekeeping ----------------------------------------------------------------------------------------------

    async def _housekeeping(self) -> None:
        while True:
            await self.tools.clock.sleep(FLUSH_MS)
            try:
                await self._flush()
            except Exception:  # noqa: BLE001 - what comes later is still to be written
                self.events.problem("housekeeping failed")

    async def _flush(self, *, last: bool = False) -> None:
        """Write what has gathered: visibility changes, ledger rows and their sums."""
        async with self._flushing:
            await self._write_gathered(last=last)

    async def _flush_to_the_end(self) -> None:
        for left in reversed(range(LAST_FLUSHES)):
            try:
                await self._flush(last=left == 0)
            except Exception:  # noqa: BLE001 - the jobs' own records are written; the batch has its result
                self.events.problem("housekeeping failed")
            if not self.rows and not self._to_put_back:
                return
            await self.tools.clock.sleep(FLUSH_MS)

    async def _write_gathered(self, *, last: bool) -> None:
        rows, self.rows = self.rows, []
        if rows:
            try:
                await self.tools.blocking(self.tools.ledger.record, rows)
            except Exception:  # noqa: BLE001 - a row is never dropped for a reason nobody thought of
                if not last:
                    self.rows[:0] = rows
                else:
                    # The calls stand in their jobs' attempts; say so, for the ledger is short of them.
                    self.events.problem("ledger rows not written", rows=len(rows))
            else:
                await self._add_up(rows)
        put_back, self._to_put_back = self._to_put_back, []
        if put_back:
            try:
                await self.tools.blocking(self.tools.returns.put_back, put_back)
            except Exception:  # noqa: BLE001 - as above
                if not last:
                    self._to_put_back[:0] = put_back
                else:
                    # Not lost: it comes back when the queue's own visibility timeout ends.
                    self.events.problem("messages not put back", messages=len(put_back))

    async def _add_up(self, rows: Sequence[LedgerRow]) -> None:
        sums: dict[tuple[str, date, str, str], Spend] = {}
        for row in rows:
            key = (row.tenant, row.day, row.model, row.lane)
            sums[key] = sums.get(key, Spend()) + row.spend
        try:
            await self.tools.blocking(self.tools.ledger.add_up, sums)
        except StoreBusy:
            # An addition that may have been done is not done again; the rows can be summed anew.
            self.events.problem("usage sums not written", rows=len(rows))

    async def learn_organization(self, key: UpstreamKey, organization: str) -> None:
        """Keep whose key this is, for all workers."""
        mark = self._marks.get(key.id) or KeyMark(key.id)
        learned = replace(mark, organization=organization, learned_with=key.fingerprint)
        if learned != mark and await self._marked(learned):
            self._marks[key.id] = learned

    async def reject_key(self, key: UpstreamKey) -> None:
        """Take a key out of the rotation."""
        mark = replace(self._marks.get(key.id) or KeyMark(key.id), rejected=key.fingerprint)
        self._marks[key.id] = mark
        self.events.count("KeysRejected")
        self.events.problem("upstream key rejected", key_id=key.id)
        self.tools.keys.reload()
        await self._marked(mark)

    def refused(self, job: Job, key: UpstreamKey, error: JobError) -> None:
        """Remember that this key may not make this job's request, so that another one is asked."""
        self._refusals.setdefault(job.job_id, {})[key.id] = error
        self.events.problem(
            "request refused to a key", job_id=job.job_id, key_id=key.id, model=job.current_model
        )

    async def _marked(self, mark: KeyMark) -> bool:
        try:
            await self.tools.blocking(self.tools.limits.mark, mark)
        except StoreBusy:
            # Another answer will say it again; the one at hand must not be lost for it.
            self.events.problem("key mark not written", key_id=mark.key_id)
            return False
        return True


class _Call:
    """One claimed job and its upstream call."""

    def __init__(self, batch: _Batch, job: Job, admission: Admission, key: UpstreamKey) -> None:
        self._batch = batch
        self._job = job
        self._admission = admission
        self._key = key
        self._tools = batch.tools
        self._limiter = batch.limiter
        self._events = batch.events
        self._rules = batch.rules
        self._claim = job.version
        # A metric's dimension; names that anybody may invent would cost a series each.
        today = _day(self._tools.clock.now())
        priced = self._rules.prices.price(job.current_model, today) is not None
        self._group = admission.claimant.model_group if priced else OTHER_MODELS
        self._canceled = False
        self._settled = False

    async def make(self, params: str) -> Disposition | Job:
        """Make the call and write down what came of it."""
        try:
            return await self._outcome(await self._send(params))
        finally:
            self._settle(None)

    @property
    def _owner(self) -> str:
        return self._batch.owner

    async def _send(self, params: str) -> Answer | Refused:
        now = self._tools.clock.now()
        # The last seconds of the invocation belong to writing down what came.
        window = max(1_000, self._batch.stop_at - now)
        whole = self._batch.stop_at - self._batch.started
        request = CallRequest(
            key=self._key,
            model=self._job.current_model,
            params=params,
            anthropic_version=self._job.anthropic_version,
            anthropic_beta=self._job.anthropic_beta,
            max_tokens=self._job.max_tokens,
            window_ms=window,
            full_window=window * 10 >= whole * 9,
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
        seconds = (self._tools.clock.now() - now) / 1000
        self._events.count("UpstreamCalls")
        self._events.count("Calls", 1, self._group)
        self._events.count("CallSeconds", seconds, self._group)
        return answer

    async def _keep_lease(self) -> None:
        """Renew the lease while the call runs; return when the job was canceled or taken away."""
        renewed = self._tools.clock.now()
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
                if now - renewed >= RENEW_MS - CANCEL_CHECK_MS:
                    kept = life.renew(current, self._owner, now + LEASE_MS)
                    await self._tools.blocking(self._tools.jobs.replace, kept, current.version)
                    self._job, renewed = kept, now
            except Stale:
                continue
            except StoreBusy:
                if now - renewed >= LEASE_MS - CANCEL_CHECK_MS:
                    return

    async def _outcome(self, answer: Answer | Refused) -> Disposition | Job:
        if answer.headers.organization:
            await self._know_organization(answer.headers)
        self._limiter.heard(self._admission, answer.headers, served=isinstance(answer, Answer))
        if isinstance(answer, Answer):
            return await self._answered(answer)
        if self._canceled or answer.failure.type == "canceled":
            return await self._stopped()
        return await self._failed(answer.failure)

    async def _know_organization(self, headers: Headers) -> None:
        organization = headers.organization
        if organization is None or organization == self._admission.claimant.organization:
            return
        if self._key.organization is not None:
            self._events.problem(
                "key belongs to another organization than the pool says",
                key_id=self._key.id,
                stated=self._key.organization,
                organization=organization,
            )
            return
        await self._batch.learn_organization(self._key, organization)
        self._limiter.belongs(self._admission, organization, headers)

    async def _answered(self, answer: Answer) -> Disposition | Job:
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
        while True:
            try:
                return await self._tools.blocking(
                    self._tools.results.put, self._job.job_id, message
                )
            except StoreBusy:
                await self._rest(row)

    async def _rest(self, row: LedgerRow | None) -> None:
        """Wait a moment for a store that is busy; raises StoreBusy when there is no time left to wait.

        The call will be made again then, so the ledger has to name this one.
        """
        if self._tools.clock.now() >= self._batch.stop_at:
            self._account(row, "outcome not stored")
            what = "the store, until the end of the invocation,"
            raise StoreBusy(what)
        await self._tools.clock.sleep(1_000)

    async def _stopped(self) -> Disposition | Job:
        """The call was ended from outside. It may have been billed; what is known goes to the ledger."""
        self._settle(self._admission.reserved)
        row = self._row("canceled", Usage(), None, None, certain=False, note="stopped during call")
        if not self._canceled:
            self._batch.rows.append(row)
            self._events.problem("lease lost during a call", job_id=self._job.job_id)
            return PutBack(LEASE_MS)
        return await self._write(
            lambda job, now: life.cancel_running(job, self._owner, now), DONE, row
        )

    async def _failed(self, failure: Failure) -> Disposition | Job:
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
        await self._apply(verdict, failure)
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
                # With a rejected key the next one can be tried at once.
                again = verdict.effect in {Effect.REJECT_KEY, Effect.REFUSED_TO_KEY}
                return await self._write(
                    lambda job, at: life.snooze(
                        job,
                        self._owner,
                        at,
                        reason=reason,
                        not_before=_parked_until(at, after),
                        cost_micro_usd=cost,
                    ),
                    None if again else _wait(after),
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
                    _wait(after),
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

    async def _apply(self, verdict: Verdict, failure: Failure) -> None:
        """Let others know what this failure says about the group, the model or the key."""
        match verdict.effect:
            case Effect.NONE:
                self._events.count("UpstreamErrors")
            case Effect.BLOCK_GROUP | Effect.RAMP_GROUP:
                self._events.count("RateLimited")
                self._limiter.throttled(
                    self._admission,
                    verdict.until or 0,
                    "rate limited",
                    ramp=verdict.effect is Effect.RAMP_GROUP,
                )
            case Effect.PARK_GROUP:
                group = self._limiter.group(self._admission.claimant.group)
                if group is None or group.blocked_until <= self._tools.clock.now():
                    self._events.count("GroupsParked")
                    self._events.problem(
                        "limit group parked", limit_group=self._admission.claimant.group,
                        error_code=failure.error_code, until=verdict.until,
                    )  # fmt: skip
                self._limiter.throttled(self._admission, verdict.until or 0, "spend limit")
            case Effect.MODEL_OVERLOADED:
                self._events.count("Overloaded")
                self._limiter.overloaded(self._admission)
            case Effect.REJECT_KEY:
                await self._batch.reject_key(self._key)
            case Effect.REFUSED_TO_KEY:
                self._batch.refused(self._job, self._key, failure.error)
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
        day = _day(self._tools.clock.now())
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
            day=_day(self._tools.clock.now()),
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
            self._batch.rows.append(replace(row, note=note or row.note))

    async def _write(
        self,
        change: Callable[[Job, int], Job],
        disposition: Disposition | None,
        row: LedgerRow | None = None,
    ) -> Disposition | Job:
        """Write the job's new state, then let its message go. None as disposition: go on with the job at once."""
        while True:
            try:
                now = self._tools.clock.now()
                written = change(self._job, now)
                if written.state is State.QUEUED and written.cancel_requested:
                    ended = life.finish_waiting(written, State.CANCELED, now)
                    written = replace(ended, version=written.version)
                await self._tools.blocking(self._tools.jobs.replace, written, self._job.version)
            except Stale as stale:
                # A cancel may have set its flag meanwhile; the call's outcome still stands.
                if not isinstance(stale.current, Job):
                    self._account(row, "job record gone")
                    return DONE
                self._job = stale.current
            except LeaseLost:
                self._events.problem("lease lost", job_id=self._job.job_id)
                self._account(row, "lease lost")
                return PutBack(LEASE_MS)
            except StoreBusy:
                await self._rest(row)
            else:
                break
        self._account(row)
        if written.state.is_final:
            self._batch.told(written)
        if written.state.is_final:
            return DONE
        return written if disposition is None else disposition


def _wait(delay_ms: int) -> Disposition:
    """Say what becomes of the message of a job that waits: a long wait is spent outside the queue."""
    return DONE if delay_ms > LONGEST_DELAY_MS else PutBack(delay_ms)


def _parked_until(now: int, delay_ms: int) -> int | None:
    return now + min(delay_ms, life.LONGEST_PARK_MS) if delay_ms > LONGEST_DELAY_MS else None


def _too_large(job: Job, tokens: int, limit: int) -> JobError:
    return JobError(
        "invalid_request_error",
        f"the request has about {tokens:,} input tokens, more than the {limit:,} a minute that "
        f"the organisation's limit allows for {job.current_model}; it can never be admitted",
        400,
    )


def _day(now: int) -> date:
    return datetime.fromtimestamp(now / 1000, UTC).date()
