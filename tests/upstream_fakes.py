"""In-memory fakes of the batch lane: records of upstream batches, and Message Batches as Anthropic documents them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sluice.adapters import job_records
from sluice.domain.batches import Batch, Options, Source
from sluice.domain.errors import ResultsInterrupted
from sluice.domain.pricing import Bill
from sluice.domain.retries import Failure, RetryPolicy
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.ports.claude import Refused
from sluice.ports.upstream import (
    Access,
    Counts,
    Created,
    Listed,
    NotFound,
    NotSent,
    ResultRow,
    RowKind,
    Rows,
    Seen,
    Unknown,
    Unreachable,
)
from sluice.upstream.advance import Advance
from sluice.upstream.collect import Collect
from sluice.upstream.tools import UpstreamTools
from tests.bulk_fakes import Bulk
from tests.fakes import MINUTE, NOON, Fragile, VirtualClock

HOUR = 60 * MINUTE
DAY = 24 * HOUR
CUSTOM_ID = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")


@dataclass(slots=True)
class Message:
    """A Message Batch at Anthropic."""

    id: str
    created_at: int
    ends_at: int
    requests: list[dict[str, Any]]
    workspace: str
    order: list[int]
    """In which order its requests finish."""
    canceled_at: int | None = None

    def is_ended(self, now: int) -> bool:
        """A cancel takes two minutes, and what is unfinished after a day expires."""
        canceled = (self.canceled_at or self.ends_at) + 2 * MINUTE
        return now >= min(self.ends_at, self.created_at + DAY, canceled)

    def finished(self) -> set[int]:
        """Return the requests that have an answer at the end: at uniform times."""
        stopped_at = min(self.ends_at, self.canceled_at or self.ends_at, self.created_at + DAY)
        share = (stopped_at - self.created_at) / (self.ends_at - self.created_at)
        return set(self.order[: int(share * len(self.order))])


@dataclass
class MemoryClaude:
    """Message Batches in memory, with times and faults to choose."""

    now: Callable[[], int]
    minutes: float = 10.0
    """How long a batch takes."""
    answer: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default_factory=lambda: answered)
    """Returns the result of a request."""
    batches: dict[str, Message] = field(default_factory=dict)
    creates: list[str] = field(default_factory=list)
    """Of each create that made a batch: its id."""
    script: list[str] = field(default_factory=list)
    """What befalls the next creates: `lost reply`, `not sent`, or the type of a refusal."""
    unreachable: int = 0
    """So many of the next other calls come to nothing."""
    missing_seconds: float = 0
    """A batch is not found for so long."""
    cancels_missing: int = 0
    """For so many of the next cancels the batch is not found."""
    interrupted: int = 0
    """So many of the next readings of results break in the middle."""
    short: int = 0
    """So many of them end in the middle as if that were all."""
    without_results: bool = False
    more_lines: list[ResultRow] = field(default_factory=list)
    forgets: int = 0
    """So many creates make no batch, although the request was sent."""
    omits: str | None = None
    """The request whose result is missing."""
    after_create: Callable[[], None] = lambda: None
    random: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311

    def create(
        self, access: Access, body: Iterable[bytes], length: int
    ) -> Created | Refused | NotSent | Unknown:
        fate = self.script.pop(0) if self.script else ""
        text = b"".join(body)
        assert len(text) == length
        if fate == "not sent":
            return NotSent(Failure("connection_lost", "not sent"))
        if fate and fate != "lost reply":
            return Refused(_REFUSALS[fate])
        if self.forgets:
            self.forgets -= 1
            return Unknown(Failure("connection_lost", "lost", may_be_billed=True))
        requests = json.loads(text)["requests"]
        ids = [each["custom_id"] for each in requests]
        assert 1 <= len(ids) == len(set(ids)) <= 100_000
        assert all(CUSTOM_ID.fullmatch(each) for each in ids)
        name = f"msgbatch_up{len(self.creates)}"
        order = list(range(len(requests)))
        self.random.shuffle(order)
        ends_at = self.now() + int(self.minutes * MINUTE)
        self.batches[name] = Message(name, self.now(), ends_at, requests, access.key.id, order)
        self.creates.append(name)
        self.after_create()
        if fate == "lost reply":
            return Unknown(Failure("connection_lost", "lost", may_be_billed=True))
        return Created(self._seen(self.batches[name]))

    def get(self, _access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        if self._is_unreachable():
            return Unreachable(Failure("api_error", "no", 503))
        batch = self.batches.get(batch_id)
        if batch is None or self.now() - batch.created_at < self.missing_seconds * 1000:
            return NotFound(Failure("not_found_error", "no", 404))
        return self._seen(batch)

    def cancel(self, _access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        if self._is_unreachable():
            return Unreachable(Failure("api_error", "no", 503))
        batch = self.batches[batch_id]
        if self.cancels_missing:
            self.cancels_missing -= 1
            return NotFound(Failure("not_found_error", "no", 404))
        if batch.is_ended(self.now()):
            return Refused(Failure("invalid_request_error", "it has ended", 400))
        batch.canceled_at = batch.canceled_at or self.now()
        return self._seen(batch)

    def since(self, _access: Access, moment: int) -> Listed | Refused | Unreachable:
        if self._is_unreachable():
            return Unreachable(Failure("api_error", "no", 503))
        found = [self._seen(each) for each in self.batches.values() if each.created_at >= moment]
        return Listed(tuple(reversed(found)))

    def results(self, _access: Access, batch_id: str) -> Rows | NotFound | Refused | Unreachable:
        if self._is_unreachable():
            return Unreachable(Failure("api_error", "no", 503))
        batch = self.batches[batch_id]
        if self.without_results or not batch.is_ended(self.now()):
            return NotFound(Failure("not_found_error", "no results", 404))
        return _Reading(self, batch)

    def rows_of(self, batch: Message) -> list[ResultRow]:
        """Return the results of a batch, in any order."""
        finished = batch.finished()
        fate = RowKind.CANCELED if batch.canceled_at is not None else RowKind.EXPIRED
        rows = [
            _row(each["custom_id"], self.answer(each["params"]))
            if number in finished
            else ResultRow(each["custom_id"], fate)
            for number, each in enumerate(batch.requests)
            if each["params"]["messages"][0]["content"] != self.omits
        ]
        self.random.shuffle(rows)
        return [*rows, *self.more_lines]

    def foreign(self, requests: int) -> None:
        """Make a batch of somebody else in the same workspace."""
        name = f"msgbatch_foreign{len(self.batches)}"
        params = {"model": "claude-a", "messages": [{"content": "foreign"}]}
        items = [{"custom_id": f"row-{number}", "params": params} for number in range(requests)]
        ends_at = self.now() + int(self.minutes * MINUTE)
        order = list(range(requests))
        self.batches[name] = Message(name, self.now(), ends_at, items, "main", order)

    def _seen(self, batch: Message) -> Seen:
        is_ended = batch.is_ended(self.now())
        status = "ended" if is_ended else "canceling" if batch.canceled_at else "in_progress"
        count = len(batch.requests)
        done = len(batch.finished())
        counts = Counts(succeeded=done, expired=count - done) if is_ended else Counts(count)
        return Seen(batch.id, status, count, counts, batch.created_at, has_results=is_ended)

    def _is_unreachable(self) -> bool:
        self.unreachable, was = max(0, self.unreachable - 1), self.unreachable
        return was > 0


class _Reading:
    def __init__(self, claude: MemoryClaude, batch: Message) -> None:
        self._rows = claude.rows_of(batch)
        self._breaks = claude.interrupted > 0
        claude.interrupted = max(0, claude.interrupted - 1)
        self._is_short = claude.short > 0
        claude.short = max(0, claude.short - 1)
        self._id = batch.id

    def __iter__(self) -> Iterator[ResultRow]:
        for number, row in enumerate(self._rows):
            if self._is_short and number >= len(self._rows) // 2:
                return
            if self._breaks and number >= len(self._rows) // 2:
                raise ResultsInterrupted(self._id, number, "lost")
            yield row

    def close(self) -> None:
        pass


_REFUSALS = {
    "spend": Failure("rate_limit_error", "spend", 429, error_code="enforced_spend_limit_reached"),
    "rate": Failure("rate_limit_error", "too many", 429, retry_after_ms=30_000),
    "key": Failure("authentication_error", "invalid x-api-key", 401),
    "invalid": Failure("invalid_request_error", "requests.0: 'my secret' is not valid", 400),
}


def answered(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a succeeded result that says what it was asked."""
    said = params["messages"][0]["content"]
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": params["model"],
        "content": [{"type": "text", "text": f"{said}!"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1000, "output_tokens": 100},
    }
    return {"type": "succeeded", "message": message}


def _row(custom_id: str, result: Mapping[str, Any]) -> ResultRow:
    kind = RowKind(result["type"])
    if kind is RowKind.SUCCEEDED:
        message = result["message"]
        return ResultRow(
            custom_id,
            kind,
            json.dumps(message, separators=(",", ":")).encode(),
            message["stop_reason"],
            Bill.of_message(message),
        )
    failure = result.get("failure")
    return ResultRow(custom_id, kind, failure=failure)


class HalfPrice:
    """The batch lane in memory, beside the live lane of `Bulk`."""

    def __init__(self, *script: Any, gather_minutes: float = 5, **facts: Any) -> None:
        self.bulk = Bulk(*script, **facts)
        self.time = self.bulk.time
        self.records = self.bulk.upstream
        self.upstream = MemoryClaude(self.time.now)
        clock = VirtualClock(self.time)
        self.collect = Collect(
            self.records, self.bulk.batches, int(gather_minutes * MINUTE), clock, self.bulk.events
        )
        self.tools = UpstreamTools(
            records=self.records,
            batches=self.bulk.batches,
            objects=self.bulk.objects,
            queue=self.bulk.queues,
            claude=self.upstream,
            keys=self.bulk.gateway.pool,
            limits=self.bulk.gateway.limits,
            ledger=self.bulk.ledger,
            prices=self.bulk.gateway.rules.prices,
            policy=RetryPolicy(),
            poll_ms=MINUTE,
            lanes=self.bulk.lanes,
            text_of_job=job_records.as_text,
            job_of_text=job_records.of_text,
            clock=clock,
            events=self.bulk.events,
        )
        self.advance = Advance(self.tools)
        self._invocations = 0

    def add(self, body: bytes, name: str = "msgbatch_1", **facts: Any) -> Batch:
        """Put a batch on the batch lane on record as the API does, and plan it."""
        key = f"batches/{name}/input.jsonl"
        etag = self.bulk.objects.put(key, body)
        batch = Batch(
            batch_id=name,
            tenant=facts.pop("tenant", "acme"),
            name=name,
            source=Source.MESSAGES_BATCHES,
            created_at=self.time.now(),
            expires_at=facts.pop("expires_at", self.time.now() + DAY),
            input_key=key,
            input_etag=etag,
            options=facts.pop("options", Options()),
            lane=facts.pop("lane", "batch"),
            **facts,
        )
        self.bulk.batches.add(batch)
        self.bulk.planner.plan(name)
        return self.bulk.batches.stored[name]

    def governed(self) -> None:
        """Do what the governor starts each minute."""
        now = self.time.now()
        for each in self.records.due(now, 20):
            self._invocations += 1
            self.advance(each.upstream_id, now + 14 * MINUTE, f"step-{self._invocations}")
        if self.records.waiting(1):
            self.collect(now + 14 * MINUTE)

    def pass_minutes(self, minutes: int) -> None:
        """Let time pass, and the governor run each minute; the ranges queue is worked off."""
        for _ in range(minutes):
            self.time.pass_seconds(60)
            self.governed()
            if self.bulk.queues.ranges:
                self.bulk.drain()

    def results(self, name: str = "msgbatch_1") -> list[dict[str, Any]]:
        """Return the results of a batch that has ended."""
        return self.bulk.results_of(name)

    @property
    def written(self) -> Counter[str]:
        """How often each verb of each store was called so far that changes something."""
        found: Counter[str] = Counter()
        for line in self.bulk.gateway.journal:
            store, _, rest = line.partition(": ")
            verb = rest.split(" ")[0]
            if (store, verb) in self._writes:
                found[f"{store}: {verb}"] += 1
        return found

    @property
    def _writes(self) -> dict[tuple[str, str], Fragile]:
        stores: list[Fragile] = [
            self.records, self.bulk.batches, self.bulk.objects, self.bulk.queues, self.bulk.ledger,
        ]  # fmt: skip
        verbs = (
            "add", "replace", "collected", "replace_range", "mark", "put", "send_ranges",
            "record_missing", "add_up",
        )  # fmt: skip
        return {(each.name, verb): each for each in stores for verb in verbs}

    def fail_once(self, write: str, nth: int) -> None:
        """Make the nth call of a write fail, counted from 0."""
        store, _, verb = write.partition(": ")
        fragile = self._writes[store, verb]
        if nth:
            fragile.fail_after(verb, nth)
        else:
            fragile.fail_next(verb)

    @property
    def record(self) -> UpstreamBatch:
        """The only upstream batch."""
        (record,) = self.records.stored.values()
        return record


__all__ = ["DAY", "HOUR", "NOON", "HalfPrice", "MemoryClaude", "answered"]
