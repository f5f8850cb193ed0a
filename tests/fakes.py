"""In-memory fakes of everything the use cases need, on a clock that advances only when every task waits.

Each fake behaves like the adapter it replaces and has a few physical knobs: calls that fail, a script of
answers, a clock that is off, a slow network. Nothing here reads the real time or uses randomness.
"""

from __future__ import annotations

import asyncio
import gzip
import selectors
import sys
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, ParamSpec, TypeVar

from sluice.domain.capacity import REFILLED, Backlog, Consumer
from sluice.domain.errors import (
    Conflict,
    InvalidRequest,
    JobNotFound,
    KeyPoolBroken,
    Stale,
    StoreBusy,
)
from sluice.domain.jobs import DueFor, Job, Result, State, due, due_after_send
from sluice.domain.keys import KeyMark, UpstreamKey
from sluice.domain.limits import Dimension, Group, Observation, Seen, new_group, observe
from sluice.domain.models import KnownModels
from sluice.domain.pricing import LedgerRow, Price, PriceList, Spend, Usage
from sluice.domain.retries import Failure, RetryPolicy
from sluice.domain.shares import Note
from sluice.domain.turns import Shares
from sluice.domain.waits import USUAL, Waits
from sluice.ports.batches import DueRange
from sluice.ports.claude import Answer, Body, CallRequest, Headers, Refused
from sluice.ports.jobs import Due, Page, Params, Pointer, Received
from sluice.ports.limits import MOST_GROUPS
from sluice.ports.metrics import METRIC_NAMES
from sluice.upkeep.dead_letters import KeptLetter
from sluice.worker.queue_source import RunJobs
from sluice.worker.tools import Rules, Tools
from sluice.worker.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")
D = TypeVar("D", Due, DueRange)

NOON: Final = int(datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()) * 1000
"""When every story begins, in epoch milliseconds."""

SECOND: Final = 1_000
MINUTE: Final = 60_000

VISIBILITY_MS: Final = 5_400_000
"""The jobs queue's own, as in template.yaml."""


# Time ------------------------------------------------------------------------------------------------------


class TimeStandsStill(AssertionError):
    """All tasks wait for one another, or for longer than a story may last."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting it moves the clock to the moment the loop would have woken at."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:
            raise TimeStandsStill("nobody will ever wake: a wait without a timer")
        self._time.pass_seconds(timeout)
        return ready


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, time: VirtualTime) -> None:
        self._virtual = time
        super().__init__(_JumpingSelector(time))

    def time(self) -> float:
        return self._virtual.seconds


class VirtualTime:
    """An event loop on which minutes take milliseconds, in the same order every time. Close it after use."""

    def __init__(self, start: int = NOON, longest_story_ms: int = 24 * 60 * MINUTE) -> None:
        self.start = start
        self.seconds = 0.0
        self.longest_story_ms = longest_story_ms
        self._loop = _VirtualLoop(self)

    def now(self) -> int:
        """Epoch milliseconds."""
        return self.start + round(self.seconds * 1000)

    def pass_seconds(self, seconds: float) -> None:
        """Move the clock on."""
        self.seconds += seconds
        if self.seconds * 1000 > self.longest_story_ms:
            raise TimeStandsStill(f"not done after {self.seconds:,.0f} s of virtual time")

    def make_tasks_with(self, factory: Callable[..., asyncio.Task[Any]]) -> None:
        """Let tasks be made by a factory of one's own."""
        self._loop.set_task_factory(factory)

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; tasks left behind by it fail the story."""
        try:
            result = self._loop.run_until_complete(story)
        finally:
            left = asyncio.all_tasks(self._loop)
            if left:
                self._stop(left)
        if left:
            raise AssertionError(f"left running: {sorted(task.get_name() for task in left)}")
        return result

    def _stop(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Cancel tasks; what they do about it costs no time."""
        self.longest_story_ms = sys.maxsize
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    def close(self) -> None:
        """Close the loop."""
        self._loop.close()


class VirtualClock:
    """One worker's clock: virtual time, off by `skew_ms`."""

    def __init__(self, time: VirtualTime, skew_ms: int = 0) -> None:
        self.time = time
        self.skew_ms = skew_ms

    def now(self) -> int:
        return self.time.now() + self.skew_ms

    async def sleep(self, milliseconds: int) -> None:
        await asyncio.sleep(milliseconds / 1000)


class FrozenClock:
    """For use cases without an event loop: set `at` by hand."""

    def __init__(self, at: int = NOON) -> None:
        self.at = at

    def now(self) -> int:
        return self.at

    async def sleep(self, milliseconds: int) -> None:
        self.at += milliseconds


class DirectCalls:
    """`Blocking` without threads: the call is made after `latency_ms`, with at least one turn for others before it."""

    def __init__(self, latency_ms: int = 0) -> None:
        self.latency_ms = latency_ms

    async def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        await asyncio.sleep(self.latency_ms / 1000)
        return call(*args, **kwargs)


# Stores ----------------------------------------------------------------------------------------------------


class Fragile:
    """Something whose verbs can be made to fail. `journal` takes down every verb that succeeded, in order."""

    name: str = "the store"

    def __init__(self, journal: list[str] | None = None) -> None:
        self.journal = [] if journal is None else journal
        self._failures: dict[str, deque[Exception]] = defaultdict(deque)
        self._broken: dict[str, Exception] = {}
        self._later: dict[str, int] = {}

    def fail_next(self, verb: str, times: int = 1, error: Exception | None = None) -> None:
        """Make the next calls of a verb raise, by default StoreBusy; they write nothing."""
        self._failures[verb].extend([error or StoreBusy(self.name)] * times)

    def fail_after(self, verb: str, calls: int) -> None:
        """Make one call of a verb raise StoreBusy, after so many others."""
        self._later[verb] = calls

    def break_down(self, verb: str, error: Exception | None = None) -> None:
        """Make every call of a verb raise from now on."""
        self._broken[verb] = error or StoreBusy(self.name)

    def recover(self) -> None:
        """Make every call work again."""
        self._failures.clear()
        self._broken.clear()

    def _do(self, verb: str, about: str = "") -> None:
        if self._failures[verb]:
            raise self._failures[verb].popleft()
        if verb in self._later:
            self._later[verb] -= 1
            if not self._later[verb]:
                del self._later[verb]
                self.fail_next(verb)
        if verb in self._broken:
            raise self._broken[verb]
        self.journal.append(f"{self.name}: {verb} {about}".rstrip())


class MemoryJobs(Fragile):
    """The job records."""

    name = "the jobs table"

    def __init__(self, *jobs: Job, journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self.stored = {job.job_id: job for job in jobs}
        self.due_jobs: dict[str, tuple[DueFor, Due]] = {}
        """What the index of due jobs holds."""
        self.history: dict[str, list[Job]] = defaultdict(list)
        """Every version ever written."""
        for job in jobs:
            self._index(job)
        self.before_replace: list[Callable[[], None]] = []
        """Each is called once, just before a replace checks the record: another writer was quicker."""
        self.lost_replies = 0
        """This many replaces are done, but their caller gets StoreBusy."""

    def add(self, job: Job) -> None:
        self._do("add", job.job_id)
        if job.job_id in self.stored:
            raise Stale(self.stored[job.job_id])
        self._put(job)

    def add_new(self, jobs: Sequence[Job]) -> set[str]:
        self._do("add_new", " ".join(job.job_id for job in jobs))
        new = [job for job in jobs if job.job_id not in self.stored]
        for job in new:
            self._put(job)
        return {job.job_id for job in new}

    def get(self, job_id: str) -> Job | None:
        self._do("get", job_id)
        return self.stored.get(job_id)

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Job]:
        self._do("get_many")
        return {job_id: self.stored[job_id] for job_id in job_ids if job_id in self.stored}

    def replace(self, job: Job, expected_version: int) -> None:
        self._do("replace", f"{job.job_id} {job.state}")
        if self.before_replace:
            self.before_replace.pop(0)()
        current = self.stored.get(job.job_id)
        if current is None or current.version != expected_version:
            raise Stale(current)
        self._put(job)
        if self.lost_replies:
            self.lost_replies -= 1
            raise StoreBusy(self.name, may_be_done=True)

    def listing(self, tenant: str, state: State | None, limit: int, page: str | None) -> Page:
        self._do("listing")
        before = _read_page(page) if page else None
        found = sorted(
            (
                job
                for job in self.stored.values()
                if job.tenant == tenant and (state is None or job.state is state)
            ),
            key=_listing_key,
            reverse=True,
        )
        rest = [job for job in found if before is None or _listing_key(job) < before]
        next_page = _write_page(rest[limit - 1]) if len(rest) > limit else None
        return Page(tuple(rest[:limit]), next_page)

    def due(self, why: DueFor, now: int, share: int) -> Sequence[Due]:
        self._do("due")
        found = sorted(
            (
                each
                for reason, each in self.due_jobs.values()
                if reason is why and each.due_at <= now
            ),
            key=lambda each: (each.due_at, each.job_id),
        )
        return shared_out(found, share)

    def postpone(self, due: Due, until: int) -> Due | None:
        self._do("postpone", due.job_id)
        why, present = self.due_jobs.get(due.job_id, (None, None))
        if why is None or present != due:
            return None
        held = replace(due, due_at=until)
        self.due_jobs[due.job_id] = why, held
        return held

    def forget(self, due: Due) -> None:
        self._do("forget", due.job_id)
        if self.due_jobs.get(due.job_id, (None, None))[1] == due:
            del self.due_jobs[due.job_id]

    def watch(self, due: Due, until: int) -> None:
        self._do("watch", due.job_id)
        if self.due_jobs.get(due.job_id, (None, None))[1] == due:
            why, at = due_after_send(due.deadline, until)
            self.due_jobs[due.job_id] = why, replace(due, due_at=at)

    def delete(self, job_id: str) -> None:
        """As DynamoDB's TTL does."""
        del self.stored[job_id]
        self.due_jobs.pop(job_id, None)

    def _put(self, job: Job) -> None:
        self._index(job)
        self.stored[job.job_id] = job
        self.history[job.job_id].append(job)

    def _index(self, job: Job) -> None:
        self.due_jobs.pop(job.job_id, None)
        next_look = due(job)
        if next_look is not None:
            why, at = next_look
            entry = Due(job.job_id, job.tenant, job.current_model, at, job.deadline)
            self.due_jobs[job.job_id] = why, entry


def shared_out(due: Iterable[D], share: int) -> list[D]:
    """Return the first `share` of each tenant and model."""
    shares = Shares[D](lambda each: (each.tenant, each.model), share)
    for each in due:
        shares.add(each)
    return list(shares.items)


def _listing_key(job: Job) -> tuple[int, str]:
    return job.created_at, job.job_id


def _write_page(job: Job) -> str:
    return urlsafe_b64encode(f"{job.created_at}#{job.job_id}".encode()).decode()


def _read_page(page: str) -> tuple[int, str]:
    try:
        created, job_id = urlsafe_b64decode(page).decode().split("#")
        return int(created), job_id
    except ValueError as error:
        raise InvalidRequest(f"page: {page!r} is not a next_page of an earlier response") from error


class MemoryParams(Fragile):
    """The requests."""

    name = "the params table"

    def __init__(self, journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self.stored: dict[str, Params] = {}
        self.leftovers: set[str] = set()
        """Requests that were stored more than a day ago."""

    def add(self, params: Params, *, over_leftover: bool = False) -> None:
        self._do("add", params.job_id)
        if over_leftover and params.job_id in self.leftovers:
            self.stored[params.job_id] = params
        earlier = self.stored.setdefault(params.job_id, params)
        if earlier.request_hash != params.request_hash:
            raise Conflict(f"another request is stored for job {params.job_id}")

    def add_new(self, params: Sequence[Params]) -> set[str]:
        self._do("add_new", " ".join(each.job_id for each in params))
        new = {each.job_id: each for each in params if each.job_id not in self.stored}
        self.stored |= new
        return set(new)

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        self._do("get_many", " ".join(job_ids))
        return {job_id: self.stored[job_id] for job_id in job_ids if job_id in self.stored}


class MemoryResults(Fragile):
    """The answers, gzipped: inline up to `inline_bytes`, otherwise as objects."""

    name = "the data bucket"

    def __init__(self, journal: list[str] | None = None, inline_bytes: int = 8_000) -> None:
        super().__init__(journal)
        self.inline_bytes = inline_bytes
        self.objects: dict[str, bytes] = {}

    def put(self, name: str, message: str) -> Result:
        self._do("put", name)
        body = gzip.compress(message.encode(), mtime=0)
        if len(body) <= self.inline_bytes:
            return Result(inline=body)
        key = f"results/{name}.json.gz"
        self.objects[key] = body
        return Result(object_key=key)

    def probe(self) -> None:
        self._do("put", "probe")

    def get(self, result: Result) -> str:
        self._do("get")
        if result.inline is not None:
            return gzip.decompress(result.inline).decode()
        body = self.objects.get(result.object_key or "")
        if body is None:
            raise JobNotFound(result.object_key or "")
        return gzip.decompress(body).decode()


class MemoryGraveyard(Fragile):
    """The dead letters."""

    name = "the data bucket"

    def __init__(
        self, now: Callable[[], int] = lambda: NOON, journal: list[str] | None = None
    ) -> None:
        super().__init__(journal)
        self._now = now
        self.kept: dict[str, KeptLetter] = {}

    def keep(self, message: Received, reason: str) -> None:
        self._do("keep", message.message_id)
        self.kept[message.message_id] = KeptLetter(
            message.message_id,
            message.job_id,
            reason,
            message.receive_count,
            message.sent_at,
            message.body,
            self._now(),
        )

    def letters(self) -> Iterator[KeptLetter]:
        self._do("letters")
        return iter(self.kept.values())

    def letter(self, message_id: str) -> KeptLetter | None:
        self._do("letter", message_id)
        return self.kept.get(message_id)


class MemoryLimits(Fragile):
    """Limit groups and key marks, shared by all workers that hold the same one."""

    name = "the limits table"

    def __init__(self, *groups: Group, journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self.stored = {group.id: group for group in groups}
        self.known: dict[str, KeyMark] = {}
        self.known_models = KnownModels()
        self.canaries: dict[str, int] = {}
        self.writes = 0

    def load(self, group_ids: Iterable[str]) -> Mapping[str, Group]:
        self._do("load")
        return {name: self.stored[name] for name in group_ids if name in self.stored}

    def replace(self, group: Group, expected_version: int) -> None:
        self._do("replace", group.id)
        current = self.stored.get(group.id)
        if (current.version if current else 0) != expected_version:
            raise Stale(current)
        self.stored[group.id] = group
        self.writes += 1

    def groups(self) -> Sequence[Group]:
        self._do("groups")
        return sorted(self.stored.values(), key=lambda group: group.id)[:MOST_GROUPS]

    def marks(self, key_ids: Iterable[str]) -> Mapping[str, KeyMark]:
        self._do("marks")
        return {name: self.known[name] for name in key_ids if name in self.known}

    def mark(self, mark: KeyMark) -> None:
        self._do("mark", mark.key_id)
        self.known[mark.key_id] = mark

    def models(self) -> KnownModels:
        self._do("models")
        return self.known_models

    def replace_models(self, models: KnownModels, expected_version: int) -> None:
        self._do("replace_models")
        if self.known_models.version != expected_version:
            raise Stale(self.known_models)
        self.known_models = models

    def canary(self, canary_id: str, now: int) -> None:
        self._do("canary", canary_id)
        self.canaries[canary_id] = now


class MemoryLedger(Fragile):
    """One row per call, and sums."""

    name = "the ledger"

    def __init__(self, journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self.rows: dict[tuple[str, date, str], LedgerRow] = {}
        self.sums: dict[tuple[str, date, str, str], Spend] = {}

    def record(self, rows: Sequence[LedgerRow]) -> None:
        self._do("record", str(len(rows)))
        for row in rows:
            self.rows[row.tenant, row.day, row.call_id] = row

    def record_missing(self, rows: Sequence[LedgerRow]) -> Sequence[LedgerRow]:
        self._do("record_missing", str(len(rows)))
        missing = [row for row in rows if (row.tenant, row.day, row.call_id) not in self.rows]
        for row in missing:
            self.rows[row.tenant, row.day, row.call_id] = row
        return missing

    def calls_of(self, tenant: str, days: Sequence[date], job_id: str) -> Sequence[LedgerRow]:
        self._do("calls_of", job_id)
        return [
            row
            for (whose, day, _), row in self.rows.items()
            if whose == tenant and day in days and row.job_id == job_id
        ]

    def add_up(self, sums: Mapping[tuple[str, date, str, str], Spend]) -> None:
        self._do("add_up")
        for key, spend in sums.items():
            self.sums[key] = self.sums.get(key, Spend()) + spend

    def spent(self, tenant: str, first: date, last: date) -> Sequence[tuple[date, str, str, Spend]]:
        self._do("spent")
        return [
            (day, model, lane, spend)
            for (whose, day, model, lane), spend in sorted(self.sums.items())
            if whose == tenant and first <= day <= last
        ]

    def organizations(self, tenant: str, first: date, last: date) -> set[str]:
        self._do("organizations")
        return {
            row.organization
            for (whose, day, _), row in self.rows.items()
            if whose == tenant and first <= day <= last and row.organization
        }

    @property
    def outcomes(self) -> list[str]:
        """The outcome of each row, in the order of their calls."""
        return [row.outcome for row in self.rows.values()]


# The queue -------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Message:
    message_id: str
    body: str
    job_id: str | None
    canary: str | None
    sent_at: int
    visible_at: int
    receive_count: int = 0


def _receipt(message: _Message) -> str:
    return f"{message.message_id}/{message.receive_count}"


class MemoryQueue(Fragile):
    """The jobs queue from both sides, with its dead-letter queue.

    A receipt is good until the message is received again, as with SQS.
    """

    name = "the jobs queue"

    def __init__(self, now: Callable[[], int], journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self._now = now
        self._messages: dict[str, _Message] = {}
        self._sent = 0
        self.untaken: set[str] = set()
        """Job ids whose send is refused."""
        self.tenants: dict[str, str] = {}
        self.delays: list[tuple[str | None, int]] = []
        """Every put-back: job id and delay."""
        self.rejected: list[tuple[Received, str]] = []
        self.receives = 0

    def send(self, jobs: Sequence[Pointer]) -> list[str]:
        ids = [job.job_id for job in jobs]
        try:
            self._do("send", " ".join(ids))
        except StoreBusy:
            return ids
        for job in jobs:
            if job.job_id not in self.untaken:
                self.tenants[job.job_id] = job.tenant
                self.post(job_id=job.job_id)
        return [job_id for job_id in ids if job_id in self.untaken]

    def post(
        self, *, job_id: str | None = None, canary: str | None = None, body: str = "{}"
    ) -> str:
        """Put any message on the queue, ours or not; return its id."""
        self._sent += 1
        message_id = f"message-{self._sent}"
        now = self._now()
        self._messages[message_id] = _Message(message_id, body, job_id, canary, now, now)
        return message_id

    def depth(self) -> int:
        self._do("depth")
        return len(self._messages)

    def backlog(self) -> Backlog:
        self._do("backlog")
        now = self._now()
        visible = sum(each.visible_at <= now for each in self._messages.values())
        return Backlog(visible=visible, in_flight=len(self._messages) - visible)

    def receive(self, most: int, hidden_ms: int) -> list[Received]:
        """As a worker takes messages itself: ten at the most."""
        self._do("receive")
        return self.deliver(min(most, 10), hidden_ms)

    def delete(self, messages: Sequence[Received]) -> None:
        """Acknowledge. An old receipt deletes nothing."""
        self._do("delete", str(len(messages)))
        for message in messages:
            if self.is_held(message):
                del self._messages[message.message_id]

    def deliver(self, most: int = 50, hidden_ms: int = VISIBILITY_MS) -> list[Received]:
        """Receive as the event source mapping does: visible messages, oldest first; then hide them."""
        now = self._now()
        visible = sorted(
            (each for each in self._messages.values() if each.visible_at <= now), key=self._order
        )[:most]
        self.receives += len(visible)
        for each in visible:
            each.receive_count += 1
            each.visible_at = now + hidden_ms
        return [
            Received(
                message_id=each.message_id,
                receipt=_receipt(each),
                body=each.body,
                job_id=each.job_id,
                canary=each.canary,
                receive_count=each.receive_count,
                sent_at=each.sent_at,
            )
            for each in visible
        ]

    def _order(self, message: _Message) -> tuple[int, ...]:
        """Return what the messages that are visible are sorted by."""
        return message.visible_at, message.sent_at

    def next_visible(self) -> int | None:
        """Return when the next hidden or waiting message can be received, None when there is none."""
        return min((each.visible_at for each in self._messages.values()), default=None)

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        self._do("put_back", str(len(delays)))
        for message, delay_ms in delays:
            self.delays.append((message.job_id, delay_ms))
            self._hide(message, delay_ms)

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        self._do("keep_hidden", str(len(messages)))
        for message in messages:
            self._hide(message, milliseconds)

    def is_held(self, message: Received) -> bool:
        """Return whether the receipt is still the last one of its message."""
        waiting = self._messages.get(message.message_id)
        return waiting is not None and message.receipt == _receipt(waiting)

    def _hide(self, message: Received, milliseconds: int) -> None:
        if self.is_held(message):
            until = self._now() + -(-milliseconds // 1000) * 1000
            self._messages[message.message_id].visible_at = until

    def reject(self, message: Received, reason: str) -> None:
        self._do("reject", message.message_id)
        self.rejected.append((message, reason))


# The worker's mapping --------------------------------------------------------------------------------------


class MemoryMapping(Fragile):
    """A mapping from a queue to its workers; `busy` refuses the next changes, as Lambda does during an earlier one."""

    name = "the worker's mapping"

    def __init__(self, concurrency: int = 10, slots: int = 50, busy: float = REFILLED) -> None:
        super().__init__()
        self.stored = Consumer(concurrency, enabled=True, slots=slots, busy=busy)
        self.busy = 0

    def state(self) -> Consumer:
        self._do("state")
        return self.stored

    def set(self, maximum_concurrency: int, *, enabled: bool) -> bool:
        self._do("set", f"{maximum_concurrency} {'on' if enabled else 'off'}")
        if self.busy:
            self.busy -= 1
            return False
        self.stored = replace(self.stored, maximum_concurrency=maximum_concurrency, enabled=enabled)
        return True


class MemoryGovernorNotes(Fragile):
    """What the governor remembers of one mapping."""

    name = "the governor's notes"

    def __init__(self) -> None:
        super().__init__()
        self.note = Note()

    @property
    def at(self) -> int | None:
        """When it switched the mapping off."""
        return self.note.turned_off_at

    def read(self) -> Note:
        self._do("read")
        return self.note

    def write(self, note: Note) -> None:
        self._do("write")
        self.note = note


class AccountLimit(Fragile):
    """What the account allows."""

    name = "the account's limit"

    def __init__(self, executions: int = 1_000) -> None:
        super().__init__()
        self.executions = executions

    def at_once(self) -> int:
        self._do("at_once")
        return self.executions


class PoolWritten(Fragile):
    """A key pool of which only the time of its last change is known."""

    name = "Secrets Manager"

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at

    def changed_at(self) -> int | None:
        self._do("changed_at")
        return self.at


# Claude ----------------------------------------------------------------------------------------------------


MESSAGE: Final = '{"content":[{"type":"text","text":"Four."}],"stop_reason":"end_turn"}'
ROOMY: Final[Mapping[Dimension, Seen]] = {
    "requests": Seen(6_000, 1_000),
    "input_tokens": Seen(6_000_000, 1_000_000),
    "output_tokens": Seen(6_000_000, 1_000_000),
}
"""Limit headers of an organization whose limits no story reaches."""


def paced(rpm: int, burst: int) -> dict[Dimension, Seen]:
    """Return limit headers of an organization that limits only requests."""
    return {**ROOMY, "requests": Seen(rpm, burst)}


def answer(  # noqa: PLR0913 - the facts of one answer
    message: str = MESSAGE,
    *,
    usage: Usage = Usage(input_tokens=10, output_tokens=20),  # noqa: B008 - frozen
    stop_reason: str = "end_turn",
    request_id: str = "req_1",
    organization: str | None = None,
    workspace: str | None = None,
    seen: Mapping[Dimension, Seen] | None = None,
) -> Answer:
    """Return an answer of Claude's."""
    headers = Headers(organization, ROOMY if seen is None else seen, workspace)
    return Answer(message, usage, stop_reason, request_id, headers)


def refused(  # noqa: PLR0913 - the facts of one failure
    status: int | None,
    error_type: str = "api_error",
    *,
    message: str = "no",
    error_code: str | None = None,
    retry_after_ms: int | None = None,
    usage: Usage | None = None,
    may_be_billed: bool = False,
    had_full_window: bool = False,
    organization: str | None = None,
    workspace: str | None = None,
    seen: Mapping[Dimension, Seen] | None = None,
) -> Refused:
    """Return a failed call."""
    failure = Failure(
        error_type,
        message,
        status,
        error_code,
        retry_after_ms,
        "req_failed",
        usage,
        may_be_billed,
        had_full_window,
    )
    return Refused(failure, Headers(organization, seen or {}, workspace))


Reply = Answer | Refused | Exception


@dataclass(frozen=True, slots=True)
class Call:
    """One call as Claude saw it."""

    request: CallRequest
    at: int

    @property
    def body(self) -> bytes:
        return self.request.body.data

    @property
    def key_id(self) -> str:
        return self.request.key.id

    @property
    def model(self) -> str:
        return self.request.model


class ScriptedClaude:
    """Returns the answers of its script in order, then `otherwise`; each after `latency_ms`.

    `when` gets each call first: what it returns is the reply, None leaves it to the script. With `headers_after_ms`, a
    call that wants early headers gets those of its answer after that time.
    """

    def __init__(self, now: Callable[[], int], *script: Reply, latency_ms: int = 500) -> None:
        self._now = now
        self.script: deque[Reply] = deque(script)
        self.otherwise: Reply = answer()
        self.when: Callable[[CallRequest], Reply | None] = lambda _: None
        self.latency_ms = latency_ms
        self.upload_ms = 0
        """How long a request takes to be sent."""
        self.headers_after_ms: int | None = None
        self.calls: list[Call] = []
        self.answered: list[Call] = []
        self.stopped: list[Call] = []
        """Calls that their caller canceled before they ended."""
        self.in_flight = 0
        self.most_in_flight = 0

    async def send(self, request: CallRequest) -> Answer | Refused:
        # A copy of the body: the caller's is released when it is sent.
        call = Call(replace(request, body=Body(request.body.data)), self._now())
        self.calls.append(call)
        reply = self.when(request) or (self.script.popleft() if self.script else self.otherwise)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        rest_ms = self.latency_ms
        try:
            await asyncio.sleep(self.upload_ms / 1000)
            request.body.release()
            if request.early and self.headers_after_ms is not None and isinstance(reply, Answer):
                await asyncio.sleep(self.headers_after_ms / 1000)
                request.on_headers(reply.headers)
                rest_ms -= self.headers_after_ms
            await asyncio.sleep(rest_ms / 1000)
        except asyncio.CancelledError:
            self.stopped.append(call)
            raise
        finally:
            self.in_flight -= 1
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, Answer):
            self.answered.append(call)
        return reply


class StaticKeyPool:
    """Keys that change only when a story changes them."""

    def __init__(self, *keys: UpstreamKey) -> None:
        self.pool = list(keys)
        self.reads = 0
        self.reloads = 0
        self.groups: dict[str, str] = {}
        self.error: KeyPoolBroken | StoreBusy | None = None

    def keys(self) -> Sequence[UpstreamKey]:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return tuple(self.pool)

    def model_groups(self) -> Mapping[str, str]:
        return self.groups

    def reload(self) -> None:
        self.reloads += 1


def upstream_key(name: str = "main", **facts: Any) -> UpstreamKey:
    """Return a key of the pool, by default of the organization `org`."""
    return UpstreamKey(
        **{"id": name, "api_key": f"sk-ant-test-{name}", "organization": "org"} | facts
    )


# Telemetry -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RecordingEvents:
    """Keeps what is logged and counted. An undeclared metric is an error, as in the adapter."""

    metrics: Counter[str] = field(default_factory=Counter)
    by_group: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    problems: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    """The exceptions being handled when a problem was logged."""

    def count(self, metric: str, value: float = 1, model_group: str | None = None) -> None:
        if metric not in METRIC_NAMES:
            raise ValueError(f"metric {metric!r} is not in sluice/ports/metrics.py")
        # In millionths, so that sums of money and seconds are exact.
        scaled = int(Decimal(str(value)) * 1_000_000)
        if model_group is None:
            self.metrics[metric] += scaled
        else:
            self.by_group[metric, model_group] += scaled

    def note(self, event: str, **facts: object) -> None:
        self.notes.append((event, facts))

    def problem(self, event: str, **facts: object) -> None:
        self.problems.append((event, facts))
        error = sys.exc_info()[1]
        if error is not None:
            self.errors.append(error)

    def counted(self, metric: str) -> float:
        """Return the sum of a metric over all its dimensions."""
        grouped = sum(value for (name, _), value in self.by_group.items() if name == metric)
        return (self.metrics[metric] + grouped) / 1_000_000

    @property
    def problem_names(self) -> list[str]:
        return [event for event, _ in self.problems]


# A whole gateway -------------------------------------------------------------------------------------------


def a_job(job_id: str = "job_1", **facts: Any) -> Job:
    """Return a queued job."""
    defaults: dict[str, Any] = {
        "tenant": "acme",
        "model": "claude-a",
        "created_at": NOON,
        "request_hash": f"hash of {job_id}",
        "input_chars": 35,
        "max_tokens": 100,
        "anthropic_version": "2026-10-21",
    }
    return Job(job_id=job_id, **defaults | facts)


def price_list(**dollars_per_million_output: str) -> PriceList:
    """Return prices for models named with underscores: input at a tenth of the given output price."""
    return PriceList(
        tuple(
            Price(
                models=(model.replace("_", "-"),),
                starts=date(2026, 1, 1),
                input=Decimal(price) / 10,
                output=Decimal(price),
                cache_write_5m=Decimal(price) / 8,
                cache_write_1h=Decimal(price) / 5,
                cache_read=Decimal(price) / 100,
            )
            for model, price in dollars_per_million_output.items()
        )
    )


def known_group(
    organization: str = "org",
    model_group: str = "a",
    seen: Mapping[Dimension, Seen] = ROOMY,
    at: int = NOON,
) -> Group:
    """Return a limit group whose limits a first answer has just taught."""
    return observe(new_group(organization, model_group, at), Observation(at, seen), at)


class Gateway:
    """The worker's side of Sluice in memory: one queue, one set of stores, as many workers as a story needs."""

    def __init__(  # noqa: PLR0913 - what a story may set
        self,
        *jobs: Job,
        keys: Sequence[UpstreamKey] = (),
        script: Sequence[Reply] = (),
        max_attempts: int = 5,
        latency_ms: int = 500,
        jitter: float = 0.5,
        waits: Waits = USUAL,
    ) -> None:
        self.time = VirtualTime()
        self.journal: list[str] = []
        self.jobs = MemoryJobs(journal=self.journal)
        self.params = MemoryParams(self.journal)
        self.results = MemoryResults(self.journal)
        self.limits = MemoryLimits(journal=self.journal)
        self.ledger = MemoryLedger(self.journal)
        self.queue = MemoryQueue(self.time.now, self.journal)
        self.claude = ScriptedClaude(self.time.now, *script, latency_ms=latency_ms)
        self.pool = StaticKeyPool(*(keys or [upstream_key()]))
        self.events = RecordingEvents()
        self.blocking = DirectCalls()
        self.jitter = jitter
        self.rules = Rules(
            policy=RetryPolicy(max_attempts=max_attempts),
            prices=price_list(claude_a="10", claude_b="20", claude_c="30"),
            model_groups={"claude-a": "a", "claude-b": "b", "claude-c": "c"},
            waits=waits,
        )
        self._invocations = 0
        self.worker = self.new_worker()
        self.submit(*jobs)

    def new_worker(self, skew_ms: int = 0) -> Worker:
        """Return another worker on the same stores."""
        tools = Tools(
            jobs=self.jobs,
            params=self.params,
            results=self.results,
            limits=self.limits,
            keys=self.pool,
            claude=self.claude,
            ledger=self.ledger,
            clock=VirtualClock(self.time, skew_ms),
            jitter=lambda: self.jitter,
            blocking=self.blocking,
            events=self.events,
        )
        return Worker(tools, self.rules)

    def submit(self, *jobs: Job) -> None:
        """Store jobs and send their messages."""
        for job in jobs:
            body = f'{{"for":"{job.job_id}"}}'.encode()
            self.params.add(Params(job.job_id, body, job.request_hash))
            self.jobs.add(replace(job, request_bytes=job.request_bytes or len(body)))
        self.queue.send([Pointer(job.job_id, job.tenant, job.current_model) for job in jobs])

    def job(self, job_id: str = "job_1") -> Job:
        """Return the job as stored."""
        return self.jobs.stored[job_id]

    async def invoke(
        self,
        worker: Worker | None = None,
        messages: Sequence[Received] | None = None,
        minutes: float = 14,
    ) -> list[str]:
        """Run one invocation over what is on the queue; delete what is done, as Lambda does."""
        self._invocations += 1
        batch = self.queue.deliver() if messages is None else messages
        stop_at = self.time.now() + int(minutes * MINUTE)
        run_jobs = RunJobs(self.queue, self.jobs, worker or self.worker)
        not_done = await run_jobs(batch, stop_at, f"invocation-{self._invocations}")
        self.queue.delete([each for each in batch if each.message_id not in not_done])
        return not_done

    def once(self, minutes: float = 14) -> list[str]:
        """Run one invocation on its own."""
        return self.time.run(self.invoke(minutes=minutes))

    def drain(self, most: int = 50) -> int:
        """Run invocation after invocation until the queue is empty; return how many it took."""
        return self.time.run(self._drain(most))

    async def _drain(self, most: int) -> int:
        for count in range(most):
            due = self.queue.next_visible()
            if due is None:
                return count
            await asyncio.sleep(max(0, due - self.time.now()) / 1000)
            await self.invoke()
        raise AssertionError(f"still not empty after {most} invocations")

    def know(self, group: Group) -> None:
        """Store a limit group as if it had been learned."""
        self.limits.stored[group.id] = replace(group, version=group.version + 1)
