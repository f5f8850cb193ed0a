"""Jobs of the jobs queue: the messages of the invocation, and those it receives itself while its calls run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, TypeVar

from sluice.domain import waits
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Job
from sluice.ports.jobs import Inbox, JobStore, Received
from sluice.worker.source import Held, Taken
from sluice.worker.worker import Worker

T = TypeVar("T")

SLOTS: Final = 120
"""Maximum jobs a worker holds; more than the mapping delivers at once."""

WAITING: Final = 30
"""A worker receives more messages while fewer than this many jobs wait for their start."""

MOST_WAITING: Final = 80
AHEAD_MS: Final = 15_000
"""If the limits permit more than WAITING starts in this time, a worker holds that many jobs, up to MOST_WAITING.

The last jobs of a queue are then all held while there is still time to start the long ones among them. At slow rates
they would only delay other tenants' jobs, which a fair queue would deliver first.
"""

RECEIVE_AT_ONCE: Final = 10
"""Maximum that SQS delivers at once."""

REFILL_MS: Final = 300_000
"""How long an invocation receives messages; after that the mapping, and so the governor, decides again."""

REFILL_PAUSE_MS: Final = 1_000
"""Pause after the queue delivered less than requested."""

MOST_MISSES: Final = RECEIVE_AT_ONCE
"""After this many jobs in a row that could not start, more messages are received only every `SCOUT_MS`.

Those behind them in the queue are probably of the same blocked group. They need not be: a fair queue delivers others
first.
"""

FEW: Final = RECEIVE_AT_ONCE
"""A tenant with at most so many jobs in a full worker has few. If a scout brings one of them, a fair queue probably has
more of it, and they need not wait for the many of others: more are received at once."""

assert WAITING <= MOST_WAITING <= SLOTS - RECEIVE_AT_ONCE


class RunJobs:
    """The use case behind the jobs queue."""

    def __init__(self, inbox: Inbox, jobs: JobStore, worker: Worker) -> None:
        self._inbox = inbox
        self._jobs = jobs
        self.worker = worker

    async def __call__(self, messages: Sequence[Received], stop_at: int, owner: str) -> list[str]:
        """Run the messages of the invocation; return the ids of those that are not done.

        No call lasts beyond `stop_at` (epoch milliseconds). `owner` names this invocation.
        """
        source = QueueSource(self._inbox, self._jobs, self.worker, messages, stop_at)
        await self.worker.run(source, stop_at, owner)
        return [each.message_id for each in messages if each.message_id in source.not_done]


class QueueSource:
    """One invocation's messages of the jobs queue."""

    def __init__(
        self,
        inbox: Inbox,
        records: JobStore,
        worker: Worker,
        messages: Sequence[Received],
        stop_at: int,
    ) -> None:
        self._inbox = inbox
        self._records = records
        self._tools = worker.tools
        self._events = worker.tools.events
        self._limiter = worker.limiter
        self._batch = messages
        """Messages from Lambda that are not taken yet."""
        self.not_done = {message.message_id for message in messages}
        """Messages from Lambda that it must not delete."""
        self._batched = set(self.not_done)
        """Messages from Lambda that are held: Lambda deletes them, by its receipts, unless they were returned."""
        now = self._tools.clock.now()
        self._linger_until = now + worker.rules.waits.linger_ms
        self._refills_end = min(now + REFILL_MS, (now + stop_at) // 2)
        self._refill_at = now
        self._scout_at = now + waits.SCOUT_MS
        self._held: dict[str, Received] = {}
        """Messages that this worker holds until they are done, with the receipt of their last delivery."""
        self._hide_at = now
        self._jobs: dict[str, list[Received]] = {}
        """Held jobs, each with further messages that name it."""
        self._tenants: dict[str, str] = {}
        """The tenants of held jobs, by job."""
        self._expects_few = False
        """The last receive brought a job of a tenant that has few here."""
        self._strangers: list[tuple[Received, str]] = []
        """Messages that name no job, and why they are rejected."""
        self._to_put_back: list[tuple[Received, int]] = []
        """Each with the time at which it becomes visible."""
        self._to_delete: list[Received] = []
        self._acknowledged: list[Received] = []
        """Messages from Lambda that are done."""

    # Taking -----------------------------------------------------------------------------------------------------

    async def take(self, held: Held) -> Sequence[Taken]:
        """Return the messages of the invocation; then receive more, until the held jobs have ended."""
        batch, self._batch = self._batch, ()
        taken = await self._jobs_of(batch)
        while not taken and held.count:
            await held.change(self._next_receive(held))
            at = self._next_receive(held)
            if at is not None and at <= self._tools.clock.now():
                with held.taking():
                    taken = await self._receive(held)
        return taken

    def _next_receive(self, held: Held) -> int | None:
        """Return when to receive more messages; None while there is no free slot, or they could not start."""
        end = self._refills_end
        if held.suspects.refill_until is not None:
            end = min(end, held.suspects.refill_until)
        if not held.count or self._tools.clock.now() >= end:
            return None
        if self._expects_few and held.count < SLOTS:
            return self._refill_at
        if not self._has_enough(held):
            is_slow = held.misses >= MOST_MISSES
            return max(self._refill_at, self._scout_at) if is_slow else self._refill_at
        # One more than the slots, for a job that need not wait for the limits of the other jobs.
        return max(self._refill_at, self._scout_at) if held.count <= SLOTS else None

    def _has_enough(self, held: Held) -> bool:
        """Return whether more jobs would only wait here instead of in the queue."""
        if held.count + RECEIVE_AT_ONCE > SLOTS:
            return True
        waiting = held.waiting - self._limiter.held_back
        if waiting < WAITING:
            return False
        return waiting >= min(MOST_WAITING, self._limiter.starts_in(AHEAD_MS))

    async def _receive(self, held: Held) -> Sequence[Taken]:
        is_short = held.is_short and held.misses >= MOST_MISSES
        is_scout = is_short or (self._has_enough(held) and not self._expects_few)
        most = 1 if is_scout else RECEIVE_AT_ONCE
        self._scout_at = self._tools.clock.now() + waits.SCOUT_MS
        messages: Sequence[Received] = ()
        try:
            messages = await self._tools.blocking(self._inbox.receive, most, waits.LEASE_MS)
        except StoreBusy as busy:
            self._events.problem("store busy", what=busy.what)
        else:
            if not messages:
                self._limiter.drained()
        if len(messages) < most:
            self._refill_at = self._tools.clock.now() + REFILL_PAUSE_MS
        taken = await self._jobs_of(messages, is_scout=is_scout)
        self._expects_few = not is_short and any(self._has_few(each) for each in taken)
        return taken

    def _has_few(self, taken: Taken) -> bool:
        """Return whether the tenant of a job has few jobs here."""
        tenant = self._tenants.get(taken.job_id)
        return tenant is not None and Counter(self._tenants.values())[tenant] <= FEW

    async def _jobs_of(
        self, messages: Sequence[Received], *, is_scout: bool = False
    ) -> Sequence[Taken]:
        """Return the jobs that messages name and that are not held, with their records."""
        new = {job_id: each for each in messages if (job_id := self._new_job(each)) is not None}
        jobs: Mapping[str, Job] | None = {}
        try:
            if new:
                jobs = await self._tools.blocking(self._records.get_many, list(new))
        except Exception as error:  # noqa: BLE001 - the worker reads each job by itself
            self._events.problem("batch not readable", reason=str(error))
            jobs = None
        taken = []
        for job_id, message in new.items():
            if jobs is not None and job_id not in jobs:
                del self._jobs[job_id]
                self._strangers.append((message, "no such job"))
                continue
            job = None if jobs is None else jobs[job_id]
            if job is not None:
                self._tenants[job_id] = job.tenant
            linger_until = 0 if is_scout else self._linger_until
            taken.append(Taken(message, job_id, job, is_scout, linger_until))
        return taken

    def _new_job(self, message: Received) -> str | None:
        """Hold a message from now on; return the job to run for it, None if there is none.

        A job runs once at a time, because two runs under the same owner could not be distinguished. A message that is
        delivered again while its job runs here replaces the old one, with a new receipt.
        """
        is_new = message.message_id not in self._held
        self._held[message.message_id] = message
        if not is_new:
            return None
        if message.job_id is None:
            self._strangers.append((message, "not a message of Sluice's"))
            return None
        if message.job_id in self._jobs:
            self._jobs[message.job_id].append(message)
            return None
        self._jobs[message.job_id] = []
        return message.job_id

    # Acknowledge and return -------------------------------------------------------------------------------------

    def done(self, message: Received) -> None:
        """Acknowledge a message, and others that name the same job."""
        self._delete(message)
        self._delete_others(message)

    def give_back(self, message: Received, until: int) -> None:
        """Make the message visible again at a time; others that name the same job are not needed."""
        latest = self._held.pop(message.message_id, message)
        self._batched.discard(message.message_id)
        self._to_put_back.append((latest, until))
        self._delete_others(message)

    def _delete_others(self, message: Received) -> None:
        self._tenants.pop(message.job_id or "", None)
        for other in self._jobs.pop(message.job_id or "", ()):
            self._delete(other)

    def _delete(self, message: Received) -> None:
        if message.message_id in self._batched:
            # Lambda deletes it when the invocation ends; until then it stays hidden.
            self._batched.remove(message.message_id)
            self.not_done.remove(message.message_id)
            self._acknowledged.append(message)
        else:
            self._to_delete.append(self._held.pop(message.message_id, message))

    # Housekeeping -----------------------------------------------------------------------------------------------

    async def keep(self, unwritten: Collection[str], *, last: bool = False) -> bool:
        """Keep messages hidden; reject messages that name no job; return or delete messages."""
        await self._keep_hidden()
        await self._handle_strangers()
        await self._write("put back", self._put_back, self._to_put_back, last=last)
        kept = [each for each in self._to_delete if each.job_id in unwritten]
        self._to_delete = [each for each in self._to_delete if each.job_id not in unwritten]
        await self._write("deleted", self._inbox.delete, self._to_delete, last=last)
        self._to_delete += kept
        if last:
            # Lambda must not delete its own either.
            self.not_done.update(
                each.message_id for each in self._acknowledged if each.job_id in unwritten
            )
        return not self._to_put_back and not self._to_delete

    def _put_back(self, messages: Sequence[tuple[Received, int]]) -> None:
        now = self._tools.clock.now()
        self._inbox.put_back([(message, max(0, until - now)) for message, until in messages])

    async def _keep_hidden(self) -> None:
        """Hide the messages for the length of a lease, repeatedly: if this worker dies, they soon become visible.

        Otherwise they would stay hidden for the queue's own visibility timeout, six times the longest invocation.
        """
        now = self._tools.clock.now()
        if now >= self._hide_at:
            held = list(self._held.values())
            try:
                if held:
                    await self._tools.blocking(self._inbox.keep_hidden, held, waits.LEASE_MS)
            except Exception:  # noqa: BLE001 - tried again in the next round
                self._events.problem("messages not kept hidden", messages=len(held))
            else:
                self._hide_at = now + waits.RENEW_MS

    async def _handle_strangers(self) -> None:
        strangers, self._strangers = self._strangers, []
        for message, reason in strangers:
            now = self._tools.clock.now()
            try:
                if message.canary is not None:
                    await self._tools.blocking(self._tools.limits.canary, message.canary, now)
                else:
                    await self._tools.blocking(self._inbox.reject, message, reason)
            except Exception:  # noqa: BLE001 - tried again at its next delivery
                self._events.problem("message not rejected", job_id=message.job_id)
                self.give_back(
                    message, now + waits.grown(2 * waits.STORE_BUSY_MS, message.receive_count)
                )
            else:
                self.done(message)

    async def _write(
        self, what: str, call: Callable[[Sequence[T]], None], gathered: list[T], *, last: bool
    ) -> None:
        """Write the collected changes; after a failure they are kept for the next round."""
        some = list(gathered)
        gathered.clear()
        try:
            if some:
                await self._tools.blocking(call, some)
        except Exception:  # noqa: BLE001 - tried again in the next round
            if last:
                # Not lost: they become visible when the queue's own visibility timeout ends.
                self._events.problem(f"messages not {what}", messages=len(some))
            else:
                gathered[:0] = some
