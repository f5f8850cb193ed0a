"""The worker's use case: run one batch of messages, all jobs side by side, each at the time the limiter gives it.

The order of events is the promise: claim before the call, answer stored before the message counts as done, one
ledger row per call. A message is either done or visible again after a delay; nothing else happens to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, assert_never

from sluice.domain import jobs as life
from sluice.domain.errors import Stale, StoreBusy
from sluice.domain.jobs import AttemptOutcome, Job, JobError, State, Step
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import LedgerRow, Spend, Usage, utc_day
from sluice.notices.report import report_end
from sluice.ports.claude import Body
from sluice.ports.jobs import Params, Received
from sluice.worker.call import (
    BUSY_MS,
    DONE,
    LEAST_WINDOW_MS,
    LONGEST_DELAY_MS,
    Call,
    Disposition,
    Done,
    Invocation,
    PutBack,
    Rest,
    wait_outside,
)
from sluice.worker.key_choice import KeyChoice
from sluice.worker.limiter import Admission, Again, Claimant, Later, Limiter, TooLarge, until
from sluice.worker.memory import BUDGET, Budget, Grant, Memory
from sluice.worker.outbox import Outbox
from sluice.worker.suspects import Suspects
from sluice.worker.tools import Rules, Tools

GROWS_EVERY: Final = 20
"""Receives after which the pause of a fault that lasts is doubled."""

SLOW_TOKENS_PER_SECOND: Final = 25
"""A pace almost every answer keeps: a call starts only if `max_tokens` at this pace would fit the time left."""

NO_KEY_DELAY_MS: Final = 60_000

HOLD_APART_MS: Final = 15_000
"""The same for a job that runs apart: others wait for it to be done."""

MEMORY_MS: Final = 30_000
"""How long a large request waits for memory in an invocation. It is free again as soon as another one is sent."""

START_WITH_MEMORY_MS: Final = 15_000
"""How long a job that has waited for memory may have it before its start; then it is given to the next one."""

SLOTS: Final = 120
"""Jobs a worker has in hand at once, more than the mapping's batch brings."""

WAITING: Final = 30
"""A worker takes more messages while fewer jobs than this wait for their start."""

MOST_WAITING: Final = 80
AHEAD_MS: Final = 15_000
"""Where the limits let in more than WAITING jobs in this time, a worker takes so many, up to MOST_WAITING.

So the last jobs of a queue are all in hand while there is still time to start the long ones among them. At slow rates
they would only stand before jobs of others that a fair queue would hand over first.
"""

RECEIVE_AT_ONCE: Final = 10
"""The most that SQS gives at once."""

SCOUT_MS: Final = 5_000
"""How often a worker whose jobs all wait looks whether the queue has something that need not.

What it finds in vain is soon visible again: hidden for longer it would be missing when the queue comes to its end.
"""

REFILL_MS: Final = 300_000
"""How long an invocation goes on taking messages: then the mapping, and so the governor, decides again."""

REFILL_PAUSE_MS: Final = 1_000
"""After the queue gave less than asked for."""


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
class _Claimed:
    """A job whose call can be made."""

    job: Job
    body: Body
    is_first: bool
    """Its first call."""


@dataclass(frozen=True, slots=True)
class _NoMemory:
    """There is none for the job's request now."""


class Worker:
    """Runs batches one after the other on one event loop, and keeps its limiter and key marks between them."""

    def __init__(self, tools: Tools, rules: Rules, budget: Budget = BUDGET) -> None:
        self._tools = tools
        self._rules = rules
        self._told: set[str] = set()
        self._rows: list[LedgerRow] = []
        self.memory = Memory(tools.clock, budget)
        self.limiter = Limiter(
            tools.limits, tools.blocking, tools.clock, tools.jitter, tools.events, rules.waits
        )

    async def run(
        self, messages: Sequence[Received], stop_at: int, owner: str, room: Room | None = None
    ) -> list[str]:
        """Run the batch; return the ids of the messages that are not done.

        No call lasts beyond `stop_at` (epoch milliseconds). `owner` names this invocation in the leases it takes.
        With a `room`, short waits are spent in it, not in a queue.
        """
        invocation = Invocation(
            tools=self._tools,
            rules=self._rules,
            limiter=self.limiter,
            keys=KeyChoice(self._tools, self.limiter, self._rules.model_groups, self._told),
            outbox=Outbox(self._tools, self._rows),
            memory=self.memory,
            owner=owner,
            started=self._tools.clock.now(),
            stop_at=stop_at,
        )
        return await _Batch(invocation, room).run(messages)


class _Batch:
    """The messages of one invocation, and the jobs they name."""

    def __init__(self, invocation: Invocation, room: Room | None) -> None:
        self._invocation = invocation
        self._tools = invocation.tools
        self._rules = invocation.rules
        self._limiter = invocation.limiter
        self._keys = invocation.keys
        self._outbox = invocation.outbox
        self._memory = invocation.memory
        self._events = invocation.tools.events
        self._room = room
        self._requests = _Requests(invocation.tools)
        self._under_way: dict[asyncio.Task[None], str | None] = {}
        """The tasks of messages, each with its job's id."""
        self._calls = 0
        self._memory_waits = 0
        self._is_taking = False
        """Messages are being received, or their jobs read."""
        self._suspects = Suspects(
            self._tools.clock.now, lambda: len(self._under_way) + self._is_taking
        )
        self._changed = asyncio.Event()
        self._refills = room is None
        self._refill_at = invocation.started
        self._scout_at = invocation.started + SCOUT_MS
        self._scouts: set[str | None] = set()
        """Jobs last taken to see whether they need not wait; if they have to, they go back at once."""

    async def run(self, messages: Sequence[Received]) -> list[str]:
        writes = self._limiter.writes
        not_done = {message.message_id for message in messages}
        received = len(messages)
        async with self._limiter, self._outbox:
            await self._take(messages, lambda message: not_done.discard(message.message_id))
            while self._under_way:
                await self._until_something_changes()
                received += await self._refill()
        self._events.note(
            "batch done",
            messages=received,
            put_back=self._outbox.messages_put_back,
            seconds=(self._tools.clock.now() - self._invocation.started) / 1000,
            limiter_writes=self._limiter.writes - writes,
            memory_waits=self._memory_waits,
        )
        return [message.message_id for message in messages if message.message_id in not_done]

    # Messages --------------------------------------------------------------------------------------------------

    async def _take(self, messages: Sequence[Received], done: Callable[[Received], object]) -> None:
        """Begin a task for each message; `done` is told of those that may be deleted."""
        first, spare = self._once_each(messages)
        found = await self._read([message for message in first if message.job_id is not None])
        for message in first:
            task = asyncio.create_task(self._settled(message, found, done), name=message.message_id)
            self._under_way[task] = message.job_id
            task.add_done_callback(self._ended)
        for message in spare:
            # When its task is over the job has ended, or the job's first message is still there.
            tasks = [task for task, name in self._under_way.items() if name == message.job_id]
            for task in tasks:
                task.add_done_callback(partial(_let_go, message, done))
            if not tasks:
                done(message)

    def _once_each(self, messages: Sequence[Received]) -> tuple[list[Received], list[Received]]:
        """Part messages into one for each job, with all that are not ours, and the spare ones of the same jobs.

        A job runs once at a time: under one owner's name nothing would keep its two messages apart. A message that
        was shown again while it is at work here is the same one still, under its new receipt.
        """
        first: list[Received] = []
        spare: list[Received] = []
        seen = {name for name in self._under_way.values() if name is not None}
        for message in messages:
            if not self._outbox.hold(message):
                continue
            (spare if message.job_id in seen else first).append(message)
            if message.job_id is not None:
                seen.add(message.job_id)
        return first, spare

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        self._suspects.look()
        self._changed.set()

    async def _until_something_changes(self) -> None:
        self._changed.clear()
        look_at = self._next_look()
        if look_at is None:
            await self._changed.wait()
        else:
            await until(self._changed, self._tools.clock, look_at - self._tools.clock.now())

    def _next_look(self) -> int | None:
        """Return when to look for more messages; None while there is no room, or no use."""
        room = SLOTS - len(self._under_way)
        end = min(
            self._invocation.started + REFILL_MS,
            (self._invocation.started + self._invocation.stop_at) // 2,
        )
        suspects_end = self._suspects.refill_until
        if suspects_end is not None:
            end = min(end, suspects_end)
        if not self._refills or not self._under_way or self._tools.clock.now() >= end:
            return None
        if self._has_enough():
            # One more than the slots, for a job that need not wait for the limits of the others.
            return max(self._refill_at, self._scout_at) if room >= 0 else None
        return self._refill_at

    def _has_enough(self) -> bool:
        """Tell whether more jobs would only wait here instead of in the queue."""
        if len(self._under_way) + RECEIVE_AT_ONCE > SLOTS:
            return True
        waiting = len(self._under_way) - self._calls - self._memory.waiting
        if waiting < WAITING:
            return False
        return waiting >= min(MOST_WAITING, self._limiter.starts_in(AHEAD_MS))

    async def _refill(self) -> int:
        """Take more messages from the queue if it is time to; return how many."""
        now, look_at = self._tools.clock.now(), self._next_look()
        if look_at is None or look_at > now:
            return 0
        self._is_taking = True
        try:
            return await self._taken_more(now)
        finally:
            self._is_taking = False
            self._suspects.look()

    async def _taken_more(self, now: int) -> int:
        is_scout = self._has_enough()
        most = 1 if is_scout else RECEIVE_AT_ONCE
        self._scout_at = now + SCOUT_MS
        try:
            messages = await self._tools.blocking(self._tools.inbox.receive, most, life.LEASE_MS)
        except StoreBusy as busy:
            self._events.problem("store busy", what=busy.what)
            self._refill_at = self._tools.clock.now() + REFILL_PAUSE_MS
            return 0
        if not messages:
            self._limiter.drained()
        if len(messages) < most:
            self._refill_at = self._tools.clock.now() + REFILL_PAUSE_MS
        if is_scout:
            self._scouts.update(message.job_id for message in messages)
        else:
            self._scouts.difference_update(message.job_id for message in messages)
        if messages:
            await self._take(messages, self._outbox.delete)
        return len(messages)

    async def _read(self, messages: Sequence[Received]) -> Mapping[str, Job]:
        """Read the jobs; on failure they are read one by one later."""
        ids = [message.job_id for message in messages if message.job_id is not None]
        try:
            return await self._tools.blocking(self._tools.jobs.get_many, list(dict.fromkeys(ids)))
        except StoreBusy as error:
            self._events.problem("batch not readable", reason=str(error))
        except Exception:  # noqa: BLE001 - each job is read again on its own
            self._events.problem("batch not readable")
        return {}

    async def _settled(
        self, message: Received, found: Mapping[str, Job], done: Callable[[Received], object]
    ) -> None:
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
                done(message)
                return
            doublings = message.receive_count // GROWS_EVERY if disposition.grows else 0
            delay = min(disposition.delay_ms << min(doublings, 10), LONGEST_DELAY_MS)
            if disposition.leaves or not self._stays(delay):
                self._outbox.put_back(message, delay)
                return
            await self._tools.clock.sleep(delay)
            message = replace(message, receive_count=message.receive_count + 1)
            found = {}

    def _stays(self, delay_ms: int) -> bool:
        if self._room is None or delay_ms > self._room.longest_stay_ms:
            return False
        return self._tools.clock.now() + delay_ms + LEAST_WINDOW_MS <= self._invocation.stop_at

    async def _tried(self, message: Received, found: Mapping[str, Job]) -> Disposition:
        try:
            return await self._message(message, found)
        except StoreBusy as error:
            self._events.problem("store busy", job_id=message.job_id, what=error.what)
            return PutBack(5_000 + self._spread(5_000), grows=True)
        except Exception:  # noqa: BLE001 - the message comes back, whatever it was
            self._events.problem("worker failed on a job", job_id=message.job_id)
            return PutBack(15_000 + self._spread(15_000), grows=True)

    async def _message(self, message: Received, found: Mapping[str, Job]) -> Disposition:
        if message.canary is not None:
            await self._tools.blocking(
                self._tools.limits.canary, message.canary, self._tools.clock.now()
            )
            return DONE
        if message.job_id is None:
            await self._tools.blocking(
                self._tools.inbox.reject, message, "not a message of Sluice's"
            )
            return DONE
        job = found.get(message.job_id)
        if job is None:
            job = await self._tools.blocking(self._tools.jobs.get, message.job_id)
        if job is None:
            await self._tools.blocking(self._tools.inbox.reject, message, "no such job")
            return DONE
        return await self._job(job)

    async def _job(self, job: Job) -> Disposition:
        """Bring the job as far as it comes in this invocation."""
        while True:
            now = self._tools.clock.now()
            step = life.next_step(job, now, self._rules.policy.max_attempts)
            outcome: Disposition | Rest | Job
            if step is not Step.RUN:
                outcome = await self._not_run(job, step, now)
            else:
                outcome = await self._run(job, now)
            if isinstance(outcome, Rest):
                await self._tools.clock.sleep(outcome.delay_ms)
                outcome = outcome.job
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
                return wait_outside((job.not_before or now) - now + self._spread(1_000))
            case Step.CANCEL:
                return await self._end(job, State.CANCELED, None)
            case Step.EXPIRE:
                error = JobError("deadline_exceeded", "the deadline passed before an answer came")
                return await self._end(job, State.EXPIRED, error)
            case Step.USED_UP | Step.KILLER:
                return await self._end(job, State.ERRORED, _why_over(job, step, now))
            case Step.RUN:
                message = "RUN is not handled here"
                raise AssertionError(message)
            case _:
                assert_never(step)

    async def _run(self, job: Job, now: int) -> Disposition | Rest | Job:
        """Run a job beside the others of this worker, or apart from them if it has lost too many workers."""
        most = life.most_in_flight(job)
        if most is None:
            return await self._run_with_memory(job, now, self._rules.waits.hold_ms)
        async with self._suspects.turn(most):
            return await self._run_with_memory(job, self._tools.clock.now(), HOLD_APART_MS)

    async def _run_with_memory(self, job: Job, now: int, hold_ms: int) -> Disposition | Rest | Job:
        """Run a job; one whose request is too large for the memory that is left waits, without a start time."""
        with self._memory.grant() as grant:
            outcome = await self._tried_to_start(job, now, hold_ms, grant)
            if not isinstance(outcome, _NoMemory):
                return outcome
            self._memory_waits += 1
            if not await grant.take(job.request_bytes, MEMORY_MS):
                return PutBack(1_000 + self._spread(4_000))
            # Those that wait for memory are not to wait for limits that are not theirs.
            outcome = await self._tried_to_start(
                job, self._tools.clock.now(), START_WITH_MEMORY_MS, grant
            )
            return job if isinstance(outcome, _NoMemory) else outcome

    async def _tried_to_start(  # noqa: PLR0911 - one return per way it can go
        self, job: Job, now: int, hold_ms: int, grant: Grant
    ) -> Disposition | Rest | Job | _NoMemory:
        """Get a start time, wait for it, claim, call. A Job means: look again."""
        choice = await self._keys.claimants(job)
        if isinstance(choice, JobError):
            return await self._end(job, State.ERRORED, choice)
        if not choice:
            self._refills = False
            return PutBack(NO_KEY_DELAY_MS + self._spread(10_000), grows=True)
        admitted = await self._admitted(job, [claimant for claimant, _ in choice], now, hold_ms)
        if not isinstance(admitted, Admission):
            return admitted
        key = next(key for claimant, key in choice if claimant == admitted.claimant)
        try:
            claimed = await self._claimed_in_time(job, admitted, key, grant)
        except Stale as stale:
            self._limiter.settle(admitted, None)
            return stale.current if isinstance(stale.current, Job) else DONE
        except BaseException:
            self._limiter.settle(admitted, None)
            raise
        if isinstance(claimed, _Claimed):
            return await self._called(claimed, admitted, key, grant)
        self._limiter.settle(admitted, None)
        if isinstance(claimed, JobError):
            return await self._end(job, State.ERRORED, claimed)
        return claimed

    async def _admitted(
        self, job: Job, claimants: Sequence[Claimant], now: int, hold_ms: int
    ) -> Admission | Disposition | Job:
        """Get a start time for a job; a Job means: look again."""
        is_scout = job.job_id in self._scouts
        hold_ms = min(SCOUT_MS, hold_ms) if is_scout else hold_ms
        latest = min(self._invocation.stop_at - self._window_needed(job), now + hold_ms)
        if latest < now:
            self._refills = False
            return PutBack(self._spread(1_000), leaves=True)
        admitted = await self._limiter.admit(claimants, job.input_chars, job.max_tokens, latest)
        match admitted:
            case Again():
                return job
            case Later():
                return await self._later(job, admitted, is_scout=is_scout)
            case TooLarge(input_tokens=tokens, limit=limit):
                return await self._end(job, State.ERRORED, _too_large(job, tokens, limit))
            case Admission():
                return admitted
            case _:
                assert_never(admitted)

    async def _called(
        self, claimed: _Claimed, admitted: Admission, key: UpstreamKey, grant: Grant
    ) -> Disposition | Rest | Job:
        if claimed.is_first:
            waited_ms = self._tools.clock.now() - claimed.job.created_at
            self._events.count("StartDelaySeconds", waited_ms / 1000)
        self._calls += 1
        self._changed.set()
        try:
            return await Call(self._invocation, claimed.job, admitted, key, grant).make(
                claimed.body
            )
        finally:
            self._calls -= 1

    async def _claimed_in_time(
        self, job: Job, admitted: Admission, key: UpstreamKey, grant: Grant
    ) -> _Claimed | JobError | Job | _NoMemory:
        """Wait for the start time, read the request, claim. A Job means: look again."""
        is_large = self._memory.wants(job.request_bytes) > 0
        # A small request is read while its job waits; the memory of a large one is not to wait with it.
        if is_large and not await self._may_start(admitted):
            return job
        if not grant.take_now(job.request_bytes):
            return _NoMemory()
        # Read before the claim: what fails here has used no attempt.
        body = await self._requests.get(job.job_id, grant)
        if body is None:
            return JobError("request_lost", "the stored request is gone; submit the job again")
        try:
            if not is_large and not await self._may_start(admitted):
                return job
            now = self._tools.clock.now()
            if life.next_step(
                job, now, self._rules.policy.max_attempts
            ) is not Step.RUN or self._keys.is_rejected(key):
                # Its deadline passed while it waited, or its key was rejected.
                return job
            return _Claimed(await self._claim(job, now), body, job.started_at is None)
        except BaseException:
            # An exception holds what was in hand where it was raised.
            body.release()
            raise

    async def _may_start(self, admitted: Admission) -> bool:
        """Wait for the start time; False when it was taken back."""
        if await self._limiter.wait_for_start(admitted):
            return True
        # Whatever took it back may have to do with the keys.
        self._keys.look_anew()
        return False

    async def _later(self, job: Job, later: Later, *, is_scout: bool) -> Disposition | Job:
        """Give a job back that cannot start soon: to the queue, or out of it."""
        if not is_scout and self._room is None:
            # What is behind it in the queue would not start sooner.
            self._refills = False
            await self._linger(later.at)
        delay = max(1_000, later.at - self._tools.clock.now())
        if delay > LONGEST_DELAY_MS:
            return await self._park(job, delay, later.reason)
        return PutBack(min(delay, SCOUT_MS) if is_scout else delay + self._spread(2_000))

    async def _linger(self, at: int) -> None:
        """Keep a job that cannot start soon for a moment before it goes back.

        A worker that gave its batch back at once would receive the next one at once, and so a whole backlog in
        minutes: paid receives, and messages that count as in flight while they wait. What can start is not kept
        waiting by it: a fair queue hands it over first, to the next batch at the latest.
        """
        latest = min(
            self._invocation.started + self._rules.waits.linger_ms,
            self._invocation.stop_at - LEAST_WINDOW_MS,
            at,
        )
        await self._tools.clock.sleep(max(0, latest - self._tools.clock.now()))

    async def _claim(self, job: Job, now: int) -> Job:
        """Take the lease; raises Stale when somebody else was quicker."""
        claimed = life.claim(
            job,
            self._invocation.owner,
            now,
            now + life.LEASE_MS,
            alone=life.most_in_flight(job) == 1,
        )
        for is_last in (False, True):
            try:
                await self._tools.blocking(self._tools.jobs.replace, claimed, job.version)
                break
            except Stale as stale:
                if is_last and stale.current == claimed:
                    # Ours already: only the reply of the first try was lost.
                    break
                raise
            except StoreBusy:
                # Perhaps it is written: given up now, the attempt would count though no call was made.
                if is_last:
                    raise
                await self._tools.clock.sleep(BUSY_MS)
        await self._account_for_lost(job, claimed)
        return claimed

    async def _account_for_lost(self, before: Job, after: Job) -> None:
        """Let the ledger name the calls of workers that died, if one more was found: they may be billed.

        At once and not with the other rows: whatever killed that worker may kill this one before it writes them.
        """
        if life.open_attempt(before) is None:
            return
        # All of them: the worker that found an earlier one may have died before it could tell.
        rows = [
            LedgerRow(
                tenant=after.tenant,
                day=utc_day(attempt.at),
                call_id=f"{after.job_id}#lost-{attempt.number}",
                job_id=after.job_id,
                model=attempt.model,
                lane=after.lane,
                organization=None,
                key_id="",
                request_id=None,
                outcome="worker_lost",
                spend=Spend.of_call(Usage(), 0),
                certain=False,
                note="the worker died during the call",
            )
            for attempt in after.attempts
            if attempt.outcome is AttemptOutcome.LOST
        ]
        await self._outbox.record_now(rows, news=rows[-1:])

    def _window_needed(self, job: Job) -> int:
        """Return the milliseconds a call of this job should have before it, at most nine tenths of an invocation."""
        most = (self._invocation.stop_at - self._invocation.started) * 9 // 10
        if job.full_window:
            return most
        needed = LEAST_WINDOW_MS // 2 + job.max_tokens * 1000 // SLOW_TOKENS_PER_SECOND
        return min(most, max(LEAST_WINDOW_MS, needed))

    # Writing ---------------------------------------------------------------------------------------------------

    async def _end(self, job: Job, state: State, error: JobError | None) -> Disposition | Job:
        """End a job that nobody runs."""
        ended = life.finish_waiting(job, state, self._tools.clock.now(), error)
        try:
            await self._tools.blocking(self._tools.jobs.replace, ended, job.version)
        except Stale as stale:
            return stale.current if isinstance(stale.current, Job) else DONE
        await self._account_for_lost(job, ended)
        report_end(self._events, ended)
        return DONE

    async def _park(self, job: Job, delay_ms: int, reason: str) -> Disposition | Job:
        """Take a waiting job out of the queue: parked messages would fill the in-flight ceiling for everybody."""
        now = self._tools.clock.now()
        not_before = now + min(delay_ms, life.LONGEST_PARK_MS)
        parked = life.park(job, now, reason=reason, not_before=not_before)
        try:
            await self._tools.blocking(self._tools.jobs.replace, parked, job.version)
        except Stale as stale:
            return stale.current if isinstance(stale.current, Job) else DONE
        await self._account_for_lost(job, parked)
        return DONE

    def _spread(self, milliseconds: int) -> int:
        return int(self._tools.jitter() * milliseconds)


class _Requests:
    """Reads the stored requests of jobs that may start in the same moment at once."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._wanted: dict[str, asyncio.Future[Params | None]] = {}

    async def get(self, job_id: str, grant: Grant) -> Body | None:
        """Return the request, None when it is gone. Its memory is given back when it is sent."""
        first = not self._wanted
        wanted = self._wanted.setdefault(job_id, asyncio.get_running_loop().create_future())
        if first:
            await self._tools.clock.sleep(0)
            await self._read()
        params = await wanted
        return None if params is None else Body(params.body, grant.sent)

    async def _read(self) -> None:
        wanted, self._wanted = self._wanted, {}
        try:
            found = await self._tools.blocking(self._tools.params.get_many, list(wanted))
        except Exception as error:  # noqa: BLE001 - told to each that waits
            for future in wanted.values():
                future.set_exception(error)
            return
        for job_id, future in wanted.items():
            future.set_result(found.get(job_id))


def _let_go(message: Received, done: Callable[[Received], object], _: object) -> None:
    done(message)


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
        f"the organisation's limit allows for {job.current_model}; it can never be admitted",
        400,
    )
