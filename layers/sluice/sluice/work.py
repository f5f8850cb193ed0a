"""The worker's use case: run one batch of messages, all jobs side by side, each at the time the limiter gives it.

The order of events is the promise: claim before the call, answer stored before the message counts as done, one
ledger row per call. A message is either done or visible again after a delay; nothing else happens to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import partial
from typing import Any, Final, Protocol, TypeVar, assert_never

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
from sluice.limiter import (
    Admission,
    Again,
    Claimant,
    Later,
    Limiter,
    TooLarge,
    claimant_for,
    until,
)
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
    Inbox,
    Jitter,
    JobRecords,
    KeyPool,
    LimitStore,
    Params,
    Received,
    Refused,
    Requests,
)

T = TypeVar("T")

LEASE_MS: Final = 120_000
"""Longer than any gap between renewals; a job whose worker died is free again after this time at the latest."""

RENEW_MS: Final = 45_000
"""How often a worker says that it is alive: to the jobs it runs, and to the queue about the messages it holds."""

CANCEL_CHECK_MS: Final = 15_000
HOLD_MS: Final = 300_000
"""How long a message may wait inside an invocation for its start; beyond that it waits better in the queue.

An invocation that makes calls is paid anyway, so holding costs nothing more, while a return costs a receive. As long
as an invocation takes new messages: so the fewest workers there may be (2) hold what a limit of 20 a minute can start.
"""

LINGER_MS: Final = 15_000
"""An invocation that can start nothing lasts so long, and no longer."""

GROWS_EVERY: Final = 20
"""Receives after which the pause of a fault that lasts is doubled."""

LEAST_WINDOW_MS: Final = 60_000
SLOW_TOKENS_PER_SECOND: Final = 25
"""A pace almost every answer keeps: a call starts only if `max_tokens` at this pace would fit the time left."""

OTHER_MODELS: Final = "other"
"""The metrics' model group for models that are not in the price list."""

FLUSH_MS: Final = 3_000
MOST_ROWS: Final = 10_000
"""Ledger rows a worker keeps while the ledger is away: 10 MB."""

BUSY_MS: Final = 1_000
"""How long a store that is busy is left alone before a write that cannot wait is tried again."""

LAST_FLUSHES: Final = 3
"""How often the end of an invocation tries to write what a busy store has not taken."""

LONGEST_DELAY_MS: Final = 900_000
"""A longer wait leaves the queue: the job is parked, and the sweep sends it again."""

NO_KEY_DELAY_MS: Final = 60_000

REST_MS: Final = 10_000
"""A wait up to this long is spent inside the invocation."""

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

KEYS_MS: Final = 5_000
"""How old the key pool, and what others have learned about its keys, may be."""


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
class Rest:
    """The job waits for a short time where it is: a receive and a slot of the queue cost more than a sleep."""

    job: Job
    delay_ms: int


@dataclass(frozen=True, slots=True)
class Tools:
    """Everything the worker needs of the world."""

    jobs: JobRecords
    params: Requests
    results: Answers
    inbox: Inbox
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
        self._rows: list[LedgerRow] = []
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
        batch = _Batch(
            self._tools, self._rules, owner, self.limiter, stop_at, self._told, self._rows, room
        )
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
        rows: list[LedgerRow],
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
        self._keys: Sequence[UpstreamKey] | None = None
        self._keys_read_at = 0
        self._reading_keys = asyncio.Lock()
        self._groups: Mapping[str, str] = rules.model_groups
        self._marks: dict[str, KeyMark] = {}
        self._own_marks: dict[str, KeyMark] = {}
        self._refusals: dict[str, dict[str, JobError]] = {}
        """By job and key: a 403 is about the request as often as about the key."""
        self.rows = rows
        """Calls that the ledger does not have yet. Those it did not take in an earlier invocation come first."""
        self._to_add_up: list[LedgerRow] = []
        self._to_put_back: list[tuple[Received, int]] = []
        """Each with the time at which it shall be visible again."""
        self._to_delete: list[Received] = []
        self._held: dict[str, Received] = {}
        """Messages that are this worker's until it is done with them, with the receipt of their last delivery."""
        self._hidden_at: int | None = None
        self._flushing = asyncio.Lock()
        self._requests = _Requests(tools)
        self._under_way: dict[asyncio.Task[None], str | None] = {}
        """The tasks of messages, each with its job's id."""
        self._calls = 0
        self._changed = asyncio.Event()
        self._refills = room is None
        self._put_back = 0
        self._refill_at = self.started
        self._scout_at = self.started + SCOUT_MS
        self._scouts: set[str | None] = set()
        """Jobs last taken to see whether they need not wait; if they have to, they go back at once."""

    async def run(self, messages: Sequence[Received]) -> list[str]:
        writes = self.limiter.writes
        not_done = {message.message_id for message in messages}
        received = len(messages)
        async with self.limiter:
            housekeeping = asyncio.create_task(self._housekeeping(), name="housekeeping")
            try:
                await self._take(messages, lambda message: not_done.discard(message.message_id))
                while self._under_way:
                    await self._until_something_changes()
                    received += await self._refill()
            finally:
                # Never in the middle of a write: what it has taken in hand would be lost.
                async with self._flushing:
                    housekeeping.cancel()
                await asyncio.gather(housekeeping, return_exceptions=True)
                await self._flush_to_the_end()
        self.events.note(
            "batch done",
            messages=received,
            put_back=self._put_back,
            seconds=(self.tools.clock.now() - self.started) / 1000,
            limiter_writes=self.limiter.writes - writes,
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
            shown_again = message.message_id in self._held
            self._held[message.message_id] = message
            if shown_again:
                continue
            (spare if message.job_id in seen else first).append(message)
            if message.job_id is not None:
                seen.add(message.job_id)
        return first, spare

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        self._changed.set()

    async def _until_something_changes(self) -> None:
        self._changed.clear()
        look_at = self._next_look()
        if look_at is None:
            await self._changed.wait()
        else:
            await until(self._changed, self.tools.clock, look_at - self.tools.clock.now())

    def _next_look(self) -> int | None:
        """Return when to look for more messages; None while there is no room, or no use."""
        room = SLOTS - len(self._under_way)
        end = min(self.started + REFILL_MS, (self.started + self.stop_at) // 2)
        if not self._refills or not self._under_way or self.tools.clock.now() >= end:
            return None
        if self._has_enough():
            # One more than the slots, for a job that need not wait for the limits of the others.
            return max(self._refill_at, self._scout_at) if room >= 0 else None
        return self._refill_at

    def _has_enough(self) -> bool:
        """Tell whether more jobs would only wait here instead of in the queue."""
        if len(self._under_way) + RECEIVE_AT_ONCE > SLOTS:
            return True
        waiting = len(self._under_way) - self._calls
        if waiting < WAITING:
            return False
        return waiting >= min(MOST_WAITING, self.limiter.starts_in(AHEAD_MS))

    async def _refill(self) -> int:
        """Take more messages from the queue if it is time to; return how many."""
        now, look_at = self.tools.clock.now(), self._next_look()
        if look_at is None or look_at > now:
            return 0
        is_scout = self._has_enough()
        most = 1 if is_scout else RECEIVE_AT_ONCE
        self._scout_at = now + SCOUT_MS
        try:
            messages = await self.tools.blocking(self.tools.inbox.receive, most, LEASE_MS)
        except StoreBusy as busy:
            self.events.problem("store busy", what=busy.what)
            self._refill_at = self.tools.clock.now() + REFILL_PAUSE_MS
            return 0
        if not messages:
            self.limiter.drained()
        if len(messages) < most:
            self._refill_at = self.tools.clock.now() + REFILL_PAUSE_MS
        if is_scout:
            self._scouts.update(message.job_id for message in messages)
        else:
            self._scouts.difference_update(message.job_id for message in messages)
        if messages:
            await self._take(messages, self._delete)
        return len(messages)

    def _delete(self, message: Received) -> None:
        """Let a message go that this worker took itself."""
        self._to_delete.append(self._held.pop(message.message_id, message))

    async def _read(self, messages: Sequence[Received]) -> Mapping[str, Job]:
        """Read the jobs; on failure they are read one by one later."""
        ids = [message.job_id for message in messages if message.job_id is not None]
        try:
            return await self.tools.blocking(self.tools.jobs.get_many, list(dict.fromkeys(ids)))
        except StoreBusy as error:
            self.events.problem("batch not readable", reason=str(error))
        except Exception:  # noqa: BLE001 - each job is read again on its own
            self.events.problem("batch not readable")
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
                latest = self._held.pop(message.message_id, message)
                self._to_put_back.append((latest, self.tools.clock.now() + delay))
                self._put_back += 1
                return
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
            await self.tools.blocking(self.tools.inbox.bury, message, "not a message of Sluice's")
            return DONE
        job = found.get(message.job_id)
        if job is None:
            job = await self.tools.blocking(self.tools.jobs.get, message.job_id)
        if job is None:
            await self.tools.blocking(self.tools.inbox.bury, message, "no such job")
            return DONE
        return await self._job(job)

    async def _job(self, job: Job) -> Disposition:
        """Bring the job as far as it comes in this invocation."""
        while True:
            now = self.tools.clock.now()
            step = life.next_step(job, now, self.rules.policy.max_attempts)
            outcome: Disposition | Rest | Job
            if step is not Step.RUN:
                outcome = await self._not_run(job, step, now)
            else:
                outcome = await self._run(job, now)
            if isinstance(outcome, Rest):
                await self.tools.clock.sleep(outcome.delay_ms)
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
    ) -> Disposition | Rest | Job:
        """Get a start time, wait for it, claim, call. A Job means: look again."""
        choice = await self._claimants(job)
        if isinstance(choice, JobError):
            return await self._end(job, State.ERRORED, choice)
        if not choice:
            self._refills = False
            return PutBack(NO_KEY_DELAY_MS + self._spread(10_000), grows=True)
        is_scout = job.job_id in self._scouts
        hold_ms = SCOUT_MS if is_scout else HOLD_MS
        latest = min(self.stop_at - self._window_needed(job), now + hold_ms)
        if latest < now:
            self._refills = False
            return PutBack(self._spread(1_000), leaves=True)
        admitted = await self.limiter.admit(
            [claimant for claimant, _ in choice], job.input_chars, job.max_tokens, latest
        )
        match admitted:
            case Again():
                return job
            case Later():
                return await self._later(job, admitted, is_scout=is_scout)
            case TooLarge(input_tokens=tokens, limit=limit):
                return await self._end(job, State.ERRORED, _too_large(job, tokens, limit))
            case Admission():
                pass
            case _:
                assert_never(admitted)
        key = next(key for claimant, key in choice if claimant == admitted.claimant)
        try:
            # Read before the claim: what fails here has used no attempt.
            params = await self._requests.get(job.job_id)
            if params is None:
                self.limiter.settle(admitted, None)
                error = JobError("request_lost", "the stored request is gone; submit the job again")
                return await self._end(job, State.ERRORED, error)
            if not await self.limiter.wait_for_start(admitted):
                # Whatever took the start time back may have to do with the keys.
                self._keys_read_at = 0
                self.limiter.settle(admitted, None)
                return job
            now = self.tools.clock.now()
            if life.next_step(
                job, now, self.rules.policy.max_attempts
            ) is not Step.RUN or self._is_rejected(key):
                # Its deadline passed while it waited, or its key was rejected.
                self.limiter.settle(admitted, None)
                return job
            claimed = await self._claim(job, now)
        except Stale as stale:
            self.limiter.settle(admitted, None)
            current = stale.current
            return current if isinstance(current, Job) else DONE
        except BaseException:
            self.limiter.settle(admitted, None)
            raise
        if job.started_at is None:
            self.events.count("StartDelaySeconds", (now - job.created_at) / 1000)
        self._calls += 1
        self._changed.set()
        try:
            return await _Call(self, claimed, admitted, key).make(params.body)
        finally:
            self._calls -= 1

    async def _later(self, job: Job, later: Later, *, is_scout: bool) -> Disposition | Job:
        """Give a job back that cannot start soon: to the queue, or out of it."""
        if not is_scout and self._room is None:
            # What is behind it in the queue would not start sooner.
            self._refills = False
            await self._linger(later.at)
        delay = max(1_000, later.at - self.tools.clock.now())
        if delay > LONGEST_DELAY_MS:
            return await self._park(job, delay, later.reason)
        return PutBack(min(delay, SCOUT_MS) if is_scout else delay + self._spread(2_000))

    async def _linger(self, at: int) -> None:
        """Keep a job that cannot start soon for a moment before it goes back.

        A worker that gave its batch back at once would receive the next one at once, and so a whole backlog in
        minutes: paid receives, and messages that count as in flight while they wait. What can start is not kept
        waiting by it: a fair queue hands it over first, to the next batch at the latest.
        """
        latest = min(self.started + LINGER_MS, self.stop_at - LEAST_WINDOW_MS, at)
        await self.tools.clock.sleep(max(0, latest - self.tools.clock.now()))

    async def _claim(self, job: Job, now: int) -> Job:
        """Take the lease; raises Stale when somebody else was quicker."""
        claimed = life.claim(job, self.owner, now, now + LEASE_MS)
        for is_last in (False, True):
            try:
                await self.tools.blocking(self.tools.jobs.replace, claimed, job.version)
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
                await self.tools.clock.sleep(BUSY_MS)
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
                day=_day(attempt.at),
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
        await self.record_now(rows, news=rows[-1:])

    async def record_now(self, rows: list[LedgerRow], news: Sequence[LedgerRow]) -> None:
        """Write rows at once, those of `news` for the first time; if the ledger is busy, with the others."""
        try:
            await self.tools.blocking(self.tools.ledger.record, rows)
        except Exception:  # noqa: BLE001 - the job goes on, and the row is not dropped
            self.rows.extend(news)
        else:
            self._to_add_up.extend(news)

    # Choosing a key --------------------------------------------------------------------------------------------

    async def _claimants(self, job: Job) -> list[tuple[Claimant, UpstreamKey]] | JobError:
        """Return one key for each limit group the job may use; empty while all are rejected."""
        try:
            keys = await self._pool()
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
        name = model_group(model, self._groups)
        for key in allowed:
            if key.id in refusals or self._is_rejected(key):
                continue
            mark = self._marks.get(key.id)
            organization = organization_of(key, mark)
            moved_to = self.limiter.moved.get(group_id(organization, name), organization)
            circuits = (model_circuit(model), endpoint_circuit(key))
            claimant = claimant_for(moved_to, name, key.id, stated.get(organization), circuits)
            usable.setdefault(claimant.group, []).append((claimant, key))
        return [self._by_weight(self._working(choices)) for choices in usable.values()]

    async def _pool(self) -> Sequence[UpstreamKey]:
        """Return the keys, and know what others have learned about them, both a few seconds old at most."""
        async with self._reading_keys:
            now = self.tools.clock.now()
            if self._keys is None or now - self._keys_read_at >= KEYS_MS:
                keys = await self.tools.blocking(self.tools.keys.keys)
                marks = await self.tools.blocking(self.tools.limits.marks, [key.id for key in keys])
                if self._keys is None:
                    await self._read_groups()
                self._keys, self._keys_read_at = keys, now
                # What this worker has just learned may not be written yet.
                self._marks = {**marks, **self._own_marks}
                for sentence in shared_organizations(keys, self._marks):
                    if sentence not in self._told_once:
                        self._told_once.add(sentence)
                        self.events.note("keys share an organization", advice=sentence)
            return self._keys

    async def _read_groups(self) -> None:
        """Know which models share limits: our data, corrected by upstream, corrected by whoever wrote the pool."""
        learned = await self.tools.blocking(self.tools.limits.learned_groups)
        stated = await self.tools.blocking(self.tools.keys.model_groups)
        self._groups = {**self.rules.model_groups, **learned, **stated}

    def _is_rejected(self, key: UpstreamKey) -> bool:
        mark = self._marks.get(key.id)
        return mark is not None and mark.rejects(key)

    def _working(
        self, choices: Sequence[tuple[Claimant, UpstreamKey]]
    ) -> Sequence[tuple[Claimant, UpstreamKey]]:
        """Leave out endpoints that are set aside, unless there is no other."""
        working = [
            (claimant, key)
            for claimant, key in choices
            if not self.limiter.is_open(claimant.group, endpoint_circuit(key))
        ]
        return working or choices

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
        await self._account_for_lost(job, ended)
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
        await self._account_for_lost(job, parked)
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

    def wait(self, delay_ms: int) -> Disposition | int:
        """Say where a job that failed waits: with this worker, in the queue, or outside."""
        fits = self.tools.clock.now() + delay_ms + LEAST_WINDOW_MS < self.stop_at
        return delay_ms if delay_ms <= REST_MS and fits else _wait(delay_ms)

    def _spread(self, milliseconds: int) -> int:
        return int(self.tools.jitter() * milliseconds)

    # Housekeeping ----------------------------------------------------------------------------------------------

    async def _housekeeping(self) -> None:
        while True:
            for chore in (self._keep_hidden, self._flush):
                try:
                    await chore()
                except Exception:  # noqa: BLE001 - what comes later is still to be written
                    self.events.problem("housekeeping failed")
            await self.tools.clock.sleep(FLUSH_MS)

    async def _keep_hidden(self) -> None:
        """Hide the messages for as long as a lease holds, again and again: if this worker dies, they come back soon.

        Left alone they would stay hidden for the queue's own visibility timeout, six times the longest invocation.
        """
        now = self.tools.clock.now()
        if self._hidden_at is not None and now - self._hidden_at < RENEW_MS:
            return
        async with self._flushing:
            held = list(self._held.values())
            if held:
                await self.tools.blocking(self.tools.inbox.keep_hidden, held, LEASE_MS)
            self._hidden_at = now

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
            if not (self.rows or self._to_add_up or self._to_put_back or self._to_delete):
                return
            await self.tools.clock.sleep(FLUSH_MS)

    async def _write_gathered(self, *, last: bool) -> None:
        rows = list(self.rows)
        if rows:
            try:
                await self.tools.blocking(self.tools.ledger.record, rows)
            except Exception:  # noqa: BLE001 - a row is never dropped for a reason nobody thought of
                if last:
                    # They wait for the next invocation. If there is none, the calls stand in their jobs' attempts.
                    self.events.problem("ledger rows not written", rows=len(rows))
                    del self.rows[: max(0, len(self.rows) - MOST_ROWS)]
            else:
                del self.rows[: len(rows)]
                self._to_add_up.extend(rows)
        await self._add_up()
        now = self.tools.clock.now()
        delays = [(message, max(0, at - now)) for message, at in self._to_put_back]
        put_back, delete = self.tools.inbox.put_back, self.tools.inbox.delete
        await self._tell_queue("put back", put_back, delays, self._to_put_back, last=last)
        await self._tell_queue(
            "deleted", delete, tuple(self._to_delete), self._to_delete, last=last
        )

    async def _tell_queue(
        self,
        what: str,
        call: Callable[[Sequence[T]], None],
        told: Sequence[T],
        gathered: list[Any],
        *,
        last: bool,
    ) -> None:
        some = list(gathered)
        gathered.clear()
        if not some:
            return
        try:
            await self.tools.blocking(call, told)
        except Exception:  # noqa: BLE001 - as above
            if last:
                # Not lost: they come back when the queue's own visibility timeout ends.
                self.events.problem(f"messages not {what}", messages=len(some))
            else:
                gathered[:0] = some

    async def _add_up(self) -> None:
        rows, self._to_add_up = self._to_add_up, []
        if not rows:
            return
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
            self._marks[key.id] = self._own_marks[key.id] = learned

    async def reject_key(self, key: UpstreamKey) -> bool:
        """Take a key out of the rotation; False when it is out already."""
        known = self._marks.get(key.id) or KeyMark(key.id)
        if known.rejects(key):
            return False
        mark = replace(known, rejected=key.fingerprint)
        self._marks[key.id] = self._own_marks[key.id] = mark
        self.events.count("KeysRejected")
        self.events.problem("upstream key rejected", key_id=key.id)
        self.tools.keys.reload()
        await self._marked(mark)
        self._keys_read_at = 0
        return True

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


class _Requests:
    """Reads the stored requests of jobs that were admitted in the same moment at once."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._wanted: dict[str, asyncio.Future[Params | None]] = {}

    async def get(self, job_id: str) -> Params | None:
        """Return the request, None when it is gone."""
        first = not self._wanted
        wanted = self._wanted.setdefault(job_id, asyncio.get_running_loop().create_future())
        if first:
            await self._tools.clock.sleep(0)
            await self._read()
        return await wanted

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
        self._renewed_at = self._tools.clock.now()

    async def make(self, params: str) -> Disposition | Rest | Job:
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
            early=not self._limiter.knows(self._admission),
            heard=self._heard,
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
                if now - self._renewed_at >= LEASE_MS - CANCEL_CHECK_MS:
                    return

    async def _renew_if_due(self, now: int) -> None:
        if now - self._renewed_at >= RENEW_MS - CANCEL_CHECK_MS:
            kept = life.renew(self._job, self._owner, now + LEASE_MS)
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
        if isinstance(answer, Answer) or answer.failure.is_word_of_upstream:
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
        await self._batch.learn_organization(self._key, organization)
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
        if self._tools.clock.now() >= self._batch.stop_at:
            self._account(row, "outcome not stored")
            what = "the store, until the end of the invocation,"
            raise StoreBusy(what)
        await self._tools.clock.sleep(BUSY_MS)

    async def _stopped(self) -> Disposition | Rest | Job:
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
                    None if again else self._batch.wait(after),
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
                    self._batch.wait(after),
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
            case Effect.PARK_GROUP:
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
                if await self._batch.reject_key(self._key):
                    self._limiter.recall(self._admission)
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
            await self._batch.record_now([row], news=[row])
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
                return PutBack(LEASE_MS)
            except StoreBusy:
                await self._rest(row)
            else:
                break
        self._account(row)
        if written.state.is_final:
            self._batch.told(written)
            return DONE
        if isinstance(disposition, int):
            return Rest(written, disposition)
        return written if disposition is None else disposition


def _let_go(message: Received, done: Callable[[Received], object], _: object) -> None:
    done(message)


def model_circuit(model: str) -> str:
    """Return the name of a model's breaker: its overload is everybody's."""
    return f"model {model}"


def endpoint_circuit(key: UpstreamKey) -> str:
    """Return the name of an endpoint's breaker."""
    return f"endpoint {key.base_url}"


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
