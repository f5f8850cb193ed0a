"""In-memory fakes of what batches need, besides those of `tests.fakes`; and a gateway for stories of whole batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any

from sluice.adapters import job_records
from sluice.bulk.assemble import Assemble, JoinAtOnce
from sluice.bulk.lane_choice import LaneChoice
from sluice.bulk.plan import PlanBatch
from sluice.domain.batches import Batch, Options, Phase, Progress, RangeState, Source, Tally
from sluice.domain.capacity import Backlog
from sluice.domain.completions import Observation
from sluice.domain.errors import InputMissing, InvalidRequest, Stale, StoreBusy
from sluice.domain.turns import Shares
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.ports.batches import RANK, BatchPage, DueRange, Newcomer, SeenRange, Stored
from sluice.ports.claude import CallRequest
from sluice.ports.jobs import Params, Received
from sluice.ports.upstream_records import DueStep, Learned, Waiting
from sluice.ports.world import Notice
from sluice.worker.newcomers import NoMessages, RunRanges
from sluice.worker.range_claim import RangeTools
from sluice.worker.range_rows import WindowRows
from sluice.worker.ranges import RangePointer, RunRange
from sluice.worker.tools import Tools
from sluice.worker.worker import Worker
from tests.fakes import (
    MINUTE,
    NOON,
    VISIBILITY_MS,
    Fragile,
    Gateway,
    Reply,
    VirtualClock,
    shared_out,
)


class MemoryBatches(Fragile):
    """The records of batches and ranges."""

    name = "the batches table"

    def __init__(self, now: Callable[[], int], journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self._now = now
        self.stored: dict[str, Batch] = {}
        self.ranges: dict[tuple[str, int], RangeState] = {}
        self.marked: dict[tuple[str, str], dict[int, Tally]] = {}
        self.running: dict[tuple[str, str], dict[int, Tally]] = {}
        self.creates: dict[tuple[str, str], tuple[str, int]] = {}
        self.turns: dict[str, tuple[str, int]] = {}
        self.latest: dict[tuple[str, str], Batch] = {}
        self.held: dict[tuple[str, int | None], int | None] = {}
        """What the index of due things says instead of the record: held until, or released (None)."""
        self.announced: set[Newcomer] = set()

    def add(self, batch: Batch) -> None:
        self._do("add", batch.batch_id)
        if batch.batch_id in self.stored:
            raise Stale(self.stored[batch.batch_id])
        self._put(batch)

    def get(self, batch_id: str) -> Batch | None:
        self._do("get", batch_id)
        return self.stored.get(batch_id)

    def replace(self, batch: Batch, expected_version: int) -> None:
        self._do("replace", f"{batch.batch_id} {batch.phase}")
        current = self.stored.get(batch.batch_id)
        if current is None or current.version != expected_version:
            raise Stale(current)
        self._put(batch)

    def _put(self, batch: Batch) -> None:
        self.stored[batch.batch_id] = batch
        self.held.pop((batch.batch_id, None), None)

    def listing(
        self, tenant: str, limit: int, *, after: Batch | None = None, before: Batch | None = None
    ) -> BatchPage:
        self._do("listing", tenant)
        newest_first = sorted(
            (each for each in self.stored.values() if each.tenant == tenant and not each.deleted),
            key=_created,
            reverse=True,
        )
        if before is not None:
            newer = [each for each in newest_first if _created(each) > _created(before)]
            return BatchPage(tuple(newer[-limit:]), len(newer) > limit)
        if after is not None:
            newest_first = [each for each in newest_first if _created(each) < _created(after)]
        return BatchPage(tuple(newest_first[:limit]), len(newest_first) > limit)

    def range_state(self, batch: Batch, number: int) -> RangeState:
        self._do("range_state", str(number))
        fresh = RangeState(batch.batch_id, number, batch.tenant)
        return self.ranges.get((batch.batch_id, number), fresh)

    def seen_ranges(self, batch_id: str, numbers: range) -> Mapping[int, SeenRange]:
        self._do("seen_ranges", batch_id)
        return {
            number: SeenRange(state, self._due_at(batch_id, number, state.not_before) is not None)
            for number in numbers
            if (state := self.ranges.get((batch_id, number))) is not None
        }

    def replace_range(self, state: RangeState, expected_version: int) -> None:
        self._do("replace_range", str(state.number))
        name = (state.batch_id, state.number)
        current = self.ranges.get(name)
        if (current.version if current else 0) != expected_version:
            raise Stale(current)
        self.ranges[name] = state
        self.held.pop(name, None)

    def mark(self, batch_id: str, group: str, member: int, tally: Tally) -> Progress:
        self._do("mark", f"{group} {member}")
        done = self.marked.setdefault((batch_id, group), {})
        done.setdefault(member, tally)
        running = self.running.setdefault((batch_id, group), {})
        running.pop(member, None)
        return _progress(done, running)

    def note_running(self, batch_id: str, group: str, member: int, tally: Tally) -> None:
        self._do("note_running", f"{group} {member}")
        done = self.marked.setdefault((batch_id, group), {})
        if member not in done:
            self.running.setdefault((batch_id, group), {})[member] = tally

    def groups(self, batch_id: str, prefix: str) -> Mapping[str, Progress]:
        self._do("groups", prefix)
        return {
            group: _progress(done, self.running.get((owner, group), {}))
            for (owner, group), done in sorted(self.marked.items())
            if owner == batch_id and group.startswith(prefix)
        }

    def latest_of_name(self, batch: Batch) -> str:
        self._do("latest_of_name", batch.name)
        known = self.latest.get((batch.tenant, batch.name), batch)
        latest = max(known, batch, key=lambda each: each.rank)
        self.latest[batch.tenant, batch.name] = latest
        return latest.batch_id

    def name_create(self, tenant: str, name: str, batch_id: str, since: int, *, fresh: bool) -> str:
        self._do("name_create", name)
        made, at = self.creates.get((tenant, name), ("", -1))
        if not fresh and at >= since:
            return made
        self.creates[tenant, name] = (batch_id, self._now())
        return batch_id

    def take_turn(self, tenant: str, batch_id: str, now: int, until: int) -> bool:
        self._do("take_turn", batch_id)
        holder, end = self.turns.get(tenant, (batch_id, 0))
        if holder != batch_id and end > now:
            return False
        self.turns[tenant] = batch_id, until
        return True

    def end_turn(self, tenant: str, batch_id: str) -> None:
        self._do("end_turn", batch_id)
        if self.turns.get(tenant, ("", 0))[0] == batch_id:
            self.turns[tenant] = batch_id, 0

    def announce(self, newcomer: Newcomer) -> None:
        self._do("announce", newcomer.batch_id)
        self.announced.add(newcomer)

    def newcomer(self, after: str) -> Newcomer | None:
        self._do("newcomer", after)
        waiting = sorted((each.tenant, each.batch_id) for each in self.announced)
        return next((Newcomer(*each) for each in waiting if each[0] > after), None)

    def welcome(self, newcomer: Newcomer) -> None:
        self._do("welcome", newcomer.batch_id)
        self.announced.discard(newcomer)

    def due(self, now: int, share: int) -> Sequence[DueRange]:
        self._do("due")
        found = [
            DueRange(each.batch_id, None, each.tenant, at)
            for each in self.stored.values()
            if (at := self._due_at(each.batch_id, None, each.due_at)) is not None and at <= now
        ] + [
            DueRange(each.batch_id, each.number, each.tenant, at, each.model)
            for each in self.ranges.values()
            if (at := self._due_at(each.batch_id, each.number, each.not_before)) is not None
            and at <= now
        ]
        ordered = sorted(found, key=lambda due: (due.due_at, due.batch_id, due.number or -1))
        return shared_out(ordered, share)

    def postpone(self, due: DueRange, until: int) -> DueRange | None:
        self._do("postpone", due.batch_id)
        if self._now_due(due) != due.due_at:
            return None
        self.held[due.batch_id, due.number] = until
        return replace(due, due_at=until)

    def remove(self, due: DueRange) -> None:
        self._do("remove", due.batch_id)
        if self._now_due(due) == due.due_at:
            self.held[due.batch_id, due.number] = None

    def _now_due(self, due: DueRange) -> int | None:
        if due.number is None:
            return self._due_at(due.batch_id, None, self.stored[due.batch_id].due_at)
        state = self.ranges[due.batch_id, due.number]
        return self._due_at(due.batch_id, due.number, state.not_before)

    def _due_at(self, batch_id: str, number: int | None, recorded: int | None) -> int | None:
        return self.held.get((batch_id, number), recorded)


def _created(batch: Batch) -> tuple[int, str]:
    return batch.created_at, batch.batch_id


def _progress(done: Mapping[int, Tally], running: Mapping[int, Tally]) -> Progress:
    return Progress(frozenset(done), sum(done.values(), Tally()), sum(running.values(), Tally()))


class MemoryUpstreamRecords(Fragile):
    """The records of upstream batches, and the list of those that wait."""

    name = "the upstream records"

    def __init__(self, journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self.stored: dict[str, UpstreamBatch] = {}
        self.list: set[tuple[int, str, str]] = set()
        self.experience = Learned()

    def add(self, record: UpstreamBatch) -> None:
        self._do("add", record.upstream_id)
        if record.upstream_id in self.stored:
            raise Stale(self.stored[record.upstream_id])
        self.stored[record.upstream_id] = record

    def get(self, upstream_id: str) -> UpstreamBatch | None:
        self._do("get", upstream_id)
        return self.stored.get(upstream_id)

    def replace(self, record: UpstreamBatch, expected_version: int) -> None:
        self._do("replace", f"{record.upstream_id} {record.phase}")
        current = self.stored.get(record.upstream_id)
        if current is None or current.version != expected_version:
            raise Stale(current)
        self.stored[record.upstream_id] = record

    def learned(self) -> Learned:
        self._do("learned")
        return self.experience

    def observe(self, seen: Observation, cancel_ms: int | None = None) -> None:
        self._do("observe")
        self.experience = self.experience.observed(seen, cancel_ms)

    def due(self, until: int, share: int) -> Sequence[DueStep]:
        self._do("due")
        due = [
            (record.due_at, name, record.tenant)
            for name, record in self.stored.items()
            if record.due_at is not None and record.due_at <= until
        ]
        found = Shares[DueStep](lambda each: each.tenant, share)
        for _, name, tenant in sorted(due):
            found.add(DueStep(name, tenant))
        return list(found.items)

    def wait(self, waiting: Waiting) -> None:
        self._do("wait", waiting.batch_id)
        self.list.add((waiting.since, waiting.tenant, waiting.batch_id))

    def waiting(self, most: int) -> Sequence[Waiting]:
        self._do("waiting")
        return [Waiting(tenant, name, since) for since, tenant, name in sorted(self.list)[:most]]

    def collected(self, waiting: Waiting) -> None:
        self._do("collected", waiting.batch_id)
        self.list.discard((waiting.since, waiting.tenant, waiting.batch_id))


class MemoryWriter:
    """An object being written."""

    def __init__(self, objects: MemoryObjects, key: str) -> None:
        self._objects = objects
        self._key = key
        self._body = bytearray()

    def write(self, data: bytes) -> None:
        self._body += data

    def close(self) -> int:
        self._objects.put(self._key, bytes(self._body))
        return len(self._body)

    def abort(self) -> None:
        pass


class MemoryObjects(Fragile):
    """The data bucket."""

    name = "the data bucket"

    def __init__(self, journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self.stored: dict[str, bytes] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.before_put: Callable[[str, bytes], None] = lambda _key, _body: None
        """Runs before an object is written; nothing is written if it raises."""

    def put(self, key: str, body: bytes) -> str:
        self._do("put", key)
        self.before_put(key, body)
        self.stored[key] = body
        self.metadata.pop(key, None)
        return _etag(body)

    def link(self, key: str, seconds: int) -> str:
        return f"https://bucket.example/{key}?seconds={seconds}"

    def get(self, key: str) -> bytes | None:
        self._do("get", key)
        return self.stored.get(key)

    def head(self, key: str) -> Stored | None:
        self._do("head", key)
        if key not in self.stored:
            return None
        body = self.stored[key]
        return Stored(key, len(body), _etag(body), 0, self.metadata.get(key, {}))

    def read(self, key: str, first: int, size: int, etag: str | None = None) -> bytes:
        self._do("read", f"{key} {first} {size}")
        body = self.stored.get(key)
        if body is None or (etag is not None and _etag(body) != etag):
            raise InputMissing(key)
        return body[first : first + max(0, size)]

    def stream(self, key: str) -> Iterator[bytes]:
        body = self.read(key, 0, 10**9)
        for start in range(0, len(body), 1_000):
            yield body[start : start + 1_000]

    def delete(self, keys: Sequence[str]) -> None:
        self._do("delete", str(len(keys)))
        for key in keys:
            self.stored.pop(key, None)
            self.metadata.pop(key, None)

    def listing(self, prefix: str) -> Iterator[Stored]:
        self._do("listing", prefix)
        for key, body in sorted(self.stored.items()):
            if key.startswith(prefix):
                yield Stored(key, len(body), _etag(body), 0)

    def copy(self, source: Stored, key: str) -> str:
        self._do("copy", key)
        body = self.stored.get(source.key)
        if body is None or _etag(body) != source.etag:
            raise InputMissing(source.key)
        return self.put(key, body)

    def copy_latest(self, source: Stored, key: str, rank: str) -> bool:
        self._do("copy_latest", key)
        body = self.stored[source.key]
        if self.metadata.get(key, {}).get(RANK, "") > rank and key in self.stored:
            return False
        self.put(key, body)
        self.metadata[key] = {RANK: rank}
        return True

    def writer(self, key: str) -> MemoryWriter:
        return MemoryWriter(self, key)

    def assemble(self, key: str, sources: Mapping[int, str], sizes: Mapping[int, int]) -> int:
        body = b"".join(self.read(sources[each], 0, size) for each, size in sizes.items())
        self.put(key, body)
        return len(body)


def _etag(body: bytes) -> str:
    return sha256(body).hexdigest()[:32]


class MemoryLinks(Fragile):
    """Uploads by links: parts are put by the test itself."""

    name = "the data bucket"

    def __init__(self, objects: MemoryObjects) -> None:
        super().__init__()
        self._objects = objects
        self.going: dict[str, dict[int, bytes]] = {}

    def begin(self, key: str) -> str:
        self._do("begin", key)
        upload_id = f"upload-{len(self.going) + 1}"
        self.going[upload_id] = {}
        return upload_id

    def links(self, key: str, upload_id: str, sizes: Mapping[int, int]) -> Mapping[int, str]:
        return {
            part: f"https://bucket.example/{key}?{upload_id}&{part}&{size}"
            for part, size in sizes.items()
        }

    def complete(self, key: str, upload_id: str, etags: Mapping[int, str]) -> None:
        parts = self.going.pop(upload_id, None)
        if parts is None and key in self._objects.stored:
            return
        if parts is None or {n: _etag(body) for n, body in parts.items()} != etags:
            raise InvalidRequest("parts: S3 says InvalidPart")
        self._objects.put(key, b"".join(parts[number] for number in sorted(parts)))

    def abort(self, key: str, upload_id: str) -> None:
        del key
        self.going.pop(upload_id, None)

    def send(self, upload_id: str, part: int, body: bytes) -> str:
        """PUT a part to its link; return its ETag. S3's own id is the last part of the upload's."""
        (own_id,) = (each for each in self.going if upload_id.endswith(f"-{each}"))
        self.going[own_id][part] = body
        return _etag(body)


class MemoryNotices(Fragile):
    """Those who listen."""

    name = "the event bus"

    def __init__(self, journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self.told: list[Notice] = []

    def publish(self, notices: Sequence[Notice]) -> None:
        self._do("publish", ", ".join(each.kind for each in notices))
        self.told += notices


class MemoryBatchQueues(Fragile):
    """The queues of batches and of ranges, from both sides."""

    name = "the batches queue"

    def __init__(self, now: Callable[[], int], journal: list[str] | None = None) -> None:
        super().__init__(journal)
        self._now = now
        self.plans: list[str] = []
        self.joins: list[tuple[str, int]] = []
        self.untaken: list[int] = []
        """Range numbers whose next send is refused."""
        self.ranges: dict[str, tuple[Received, str, int, int]] = {}
        """By message id: message, batch, number, and when it is visible."""
        self.rejected: list[tuple[Received, str]] = []
        self.delays: list[int] = []
        self._sent = 0

    def send_ranges(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        try:
            self._do("send_ranges", str(len(numbers)))
        except StoreBusy:
            return list(numbers)
        refused = [number for number in numbers if number in self.untaken]
        self.untaken = [number for number in self.untaken if number not in refused]
        for number in numbers:
            if number not in refused:
                self._sent += 1
                message = Received(f"range-{self._sent}", "", "", None)
                self.ranges[message.message_id] = (message, batch.batch_id, number, self._now())
        return refused

    def send_plan(self, batch_id: str, tenant: str) -> None:
        self._do("send_plan", f"{batch_id} of {tenant}")
        self.plans.append(batch_id)

    def send_join(self, batch_id: str, section: int, tenant: str) -> None:
        self._do("send_join", f"{batch_id} {section} of {tenant}")
        self.joins.append((batch_id, section))

    def receive(self) -> RangePointer | None:
        """Return the next range that is visible, and hide it for the queue's visibility timeout."""
        now = self._now()
        for name, (message, batch_id, number, at) in self.ranges.items():
            if at <= now:
                self.ranges[name] = (message, batch_id, number, now + VISIBILITY_MS)
                return RangePointer(message, batch_id, number)
        return None

    def backlog(self) -> Backlog:
        visible = sum(at <= self._now() for *_, at in self.ranges.values())
        return Backlog(visible, len(self.ranges) - visible)

    def delete(self, message: Received) -> None:
        self.ranges.pop(message.message_id, None)

    def next_visible(self) -> int | None:
        return min((at for *_, at in self.ranges.values()), default=None)

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        self._do("put_back")
        for message, delay in delays:
            self.delays.append(delay)
            if message.message_id in self.ranges:
                _, batch_id, number, _ = self.ranges[message.message_id]
                at = self._now() + -(-delay // 1000) * 1000
                self.ranges[message.message_id] = (message, batch_id, number, at)

    def reject(self, message: Received, reason: str) -> None:
        self._do("reject", message.message_id)
        self.rejected.append((message, reason))


def a_row(number: int | str, **more: Any) -> dict[str, Any]:
    """Return one row; what it says is its number."""
    content = [{"role": "user", "content": f"Say {number}"}]
    params = {"model": "claude-a", "max_tokens": 100, "messages": content}
    return {"custom_id": f"row-{number}", "params": params | more}


def number_in(request: bytes) -> int:
    """Return the number of the row that a request is of."""
    content: str = json.loads(request)["messages"][0]["content"]
    return int(content.removeprefix("Say "))


def jsonl(*rows: Any) -> bytes:
    """Return rows as lines; text is used unchanged."""
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


class KillsAt(StrEnum):
    """When a killer row ends its worker."""

    REQUEST = "request"
    """When its request is made, before the call."""
    CALL = "call"
    SAVE = "save"
    """When its answer is saved."""


@dataclass(frozen=True, slots=True)
class Deaths:
    """Rows that no worker survives, and workers that die for another reason."""

    killers: Collection[int] = ()
    kills_at: KillsAt = KillsAt.CALL
    after_ms: int = 300
    """Between the killer's call, its request or its save, and the end of the worker; half a call at most."""
    ordinary: Mapping[int, float] = field(default_factory=dict)
    """By the number of the invocation, from 1: the seconds it lives, whatever it runs."""


class WatchedRequests:
    """The requests of a range's rows; `seen` is called with each that was read."""

    def __init__(self, rows: WindowRows, seen: Callable[[bytes], None]) -> None:
        self._rows = rows
        self._seen = seen

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        found = self._rows.get_many(job_ids)
        for params in found.values():
            self._seen(params.body)
        return found


class Bulk:
    """Batches in memory: the gateway of `tests.fakes` for what rows share with jobs, and what they have alone."""

    def __init__(self, *script: Reply, joins_at_once: bool = True, **facts: Any) -> None:
        """`joins_at_once`: small batches are joined by those who run their last range, as deployed."""
        self.joins_at_once = joins_at_once
        self.gateway = Gateway(script=script, **facts)
        self.time = self.gateway.time
        self.claude = self.gateway.claude
        self.ledger = self.gateway.ledger
        self.events = self.gateway.events
        self.batches = MemoryBatches(self.time.now, self.gateway.journal)
        self.objects = MemoryObjects(self.gateway.journal)
        self.queues = MemoryBatchQueues(self.time.now, self.gateway.journal)
        self.upstream = MemoryUpstreamRecords(self.gateway.journal)
        clock = VirtualClock(self.time)
        self.notices = MemoryNotices(self.gateway.journal)
        self.assemble = Assemble(self.batches, self.objects, self.notices, clock, self.events)
        self.lanes = LaneChoice(self.upstream, self.gateway.limits, self.queues, clock, self.events)
        self.planner = PlanBatch(
            self.batches,
            self.objects,
            self.queues,
            self.assemble,
            (),
            clock,
            self.events,
            self.upstream,
            self.lanes,
        )
        self._invocations = 0
        self.request_seen: Callable[[bytes], None] = lambda _: None

    def runners(self) -> RunRanges:
        """Return the ranges function as a fresh environment has it."""
        own = self.runner()
        return RunRanges(own, lambda: self.runner(own.worker))

    def runner(self, beside: Worker | None = None) -> RunRange:
        """Return what runs one range at a time in it."""
        clock = VirtualClock(self.time)
        rows = WindowRows(clock)
        tools = Tools(
            jobs=rows,
            params=WatchedRequests(rows, lambda body: self.request_seen(body)),  # noqa: PLW0108
            results=rows,
            limits=self.gateway.limits,
            keys=self.gateway.pool,
            claude=self.claude,
            ledger=self.ledger,
            clock=clock,
            jitter=lambda: self.gateway.jitter,
            blocking=self.gateway.blocking,
            events=self.events,
        )
        at_once = JoinAtOnce(lambda: self.assemble, self.queues, self.events)
        range_tools = RangeTools(
            batches=self.batches,
            objects=self.objects,
            queue=at_once if self.joins_at_once else self.queues,
            backlog=self.queues.backlog,
            returns=NoMessages() if beside else self.queues,
            ledger=self.ledger,
            text_of_job=job_records.as_text,
            job_of_text=job_records.of_text,
            clock=clock,
            blocking=self.gateway.blocking,
            events=self.events,
        )
        memory = beside.memory if beside else None
        return RunRange(range_tools, Worker(tools, self.gateway.rules, memory=memory), rows)

    def upload(self, body: bytes, name: str = "first.jsonl", **metadata: str) -> None:
        """Put a file into the bucket, and deliver the event of its arrival."""
        key = f"in/acme/{name}"
        self.objects.put(key, body)
        self.objects.metadata[key] = metadata
        self.planner.arrived(key)

    def add(self, body: bytes, **facts: Any) -> Batch:
        """Put a batch on record as the API does, and plan it."""
        key = "batches/msgbatch_1/input.jsonl"
        self.objects.put(key, body)
        batch = Batch(
            batch_id="msgbatch_1",
            tenant="acme",
            name="msgbatch_1",
            source=Source.MESSAGES_BATCHES,
            created_at=NOON,
            expires_at=facts.pop("expires_at", NOON + 24 * 60 * MINUTE),
            input_key=key,
            input_etag=_etag(body),
            options=facts.pop("options", Options()),
            **facts,
        )
        self.batches.add(batch)
        self.planner.plan(batch.batch_id)
        return self.batch

    @property
    def batch(self) -> Batch:
        """The only batch."""
        (batch,) = self.batches.stored.values()
        return batch

    async def invoke(
        self,
        runner: RunRange | RunRanges | None = None,
        pointer: RangePointer | None = None,
        minutes: float = 14,
    ) -> bool:
        """Run one range; delete its message when it is done, as Lambda does."""
        self._invocations += 1
        pointer = pointer or self.queues.receive()
        assert pointer is not None
        stop_at = self.time.now() + int(minutes * MINUTE)
        owner = f"invocation-{self._invocations}"
        done = await (runner or self.runner())(pointer, stop_at, owner)
        if done:
            self.queues.delete(pointer.message)
        return done

    def once(self, minutes: float = 14) -> bool:
        """Run one invocation."""
        return self.time.run(self.invoke(minutes=minutes))

    async def kill(self, task: asyncio.Task[bool]) -> None:
        """End a worker as a process ends: without a last word."""
        for each in asyncio.all_tasks() - {asyncio.current_task()}:
            each.cancel()
        # Nothing it writes while it is torn down may count: a dead process writes nothing.
        stores = (self.batches, self.objects, self.queues, self.ledger)
        for store in stores:
            for verb in ("replace_range", "put", "put_back", "record"):
                store.break_down(verb)
        with suppress(asyncio.CancelledError, StoreBusy):
            await task
        for store in stores:
            store.recover()

    def drain_with(self, deaths: Deaths) -> int:
        """Run ranges and join sections until nothing is left in the queues; return how many workers died."""
        return self.time.run(self._drain_with(deaths))

    async def _drain_with(self, deaths: Deaths) -> int:
        dying = asyncio.Event()
        self._arm(deaths, dying)
        died = 0
        for _ in range(1_000):
            while self.queues.joins:
                self.assemble.join(*self.queues.joins.pop(0))
            due = self.queues.next_visible()
            if due is None:
                return died
            await asyncio.sleep(max(0, due - self.time.now()) / 1000)
            died += await self._dies(dying, deaths.ordinary.get(self._invocations + 1))
        raise AssertionError("still not done after 1,000 invocations")

    def _arm(self, deaths: Deaths, dying: asyncio.Event) -> None:
        """Have the killers set `dying`."""
        loop = asyncio.get_running_loop()

        def strike() -> None:
            loop.call_later(min(deaths.after_ms, self.claude.latency_ms / 2) / 1000, dying.set)

        def look(request: bytes) -> None:
            if number_in(request) in deaths.killers:
                strike()

        before = self.claude.when

        def called(request: CallRequest) -> Reply | None:
            look(bytes(request.body.data))
            return before(request)

        def saved(_key: str, body: bytes) -> None:
            answers = [line for line in body.splitlines() if b'"succeeded"' in line]
            if any(b"\trow-%d\t" % each in line for each in deaths.killers for line in answers):
                strike()
                raise StoreBusy(self.objects.name)

        match deaths.kills_at:
            case KillsAt.CALL:
                self.claude.when = called
            case KillsAt.REQUEST:
                self.request_seen = look
            case KillsAt.SAVE:
                self.objects.before_put = saved

    async def _dies(self, dying: asyncio.Event, lives: float | None) -> bool:
        """Run an invocation until it ends, or dies after this many seconds."""
        dying.clear()
        task = asyncio.create_task(self.invoke())
        end = asyncio.create_task(dying.wait())
        await asyncio.wait({task, end}, timeout=lives, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            end.cancel()
            task.result()
            return False
        await self.kill(task)
        return True

    def drain(self) -> None:
        """Run ranges and join sections until nothing is left in the queues."""
        self.time.run(self._drain())

    async def _drain(self) -> None:
        for _ in range(500):
            while self.queues.joins:
                self.assemble.join(*self.queues.joins.pop(0))
            due = self.queues.next_visible()
            if due is None:
                return
            await asyncio.sleep(max(0, due - self.time.now()) / 1000)
            await self.invoke()
        raise AssertionError("still not done after 500 invocations")

    def results(self) -> list[dict[str, Any]]:
        """Return the results of the only batch, which has ended."""
        assert Phase.ENDED == self.batch.phase
        return self._jsonl(self.batch.results_key)

    def results_of(self, batch_id: str) -> list[dict[str, Any]]:
        """Return the results of a batch."""
        return self._jsonl(self.batches.stored[batch_id].results_key)

    def errors(self) -> list[dict[str, Any]]:
        """Return the errors of the only batch."""
        return self._jsonl(self.batch.errors_key)

    def summary(self) -> Any:
        """Return the summary of the only batch."""
        return json.loads(self.objects.stored[self.batch.summary_key])

    def _jsonl(self, key: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.objects.stored[key].splitlines()]

    def close(self) -> None:
        self.time.close()
