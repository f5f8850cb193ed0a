"""The batches of one tenant: create, read, cancel, delete, and fetch their results.

A batch is the same however it is submitted: the rows of a request are stored as an object, like those of a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Final

from sluice.bulk.assemble import owner_of
from sluice.domain.batches import (
    DAY_MS,
    LONGEST_MS,
    OUTPUTS,
    SUMMARY,
    AskedLane,
    Batch,
    Options,
    Phase,
    Progress,
    Source,
    Tally,
    cancel_batch,
    delete_batch,
    named_batch_id,
    planned,
    prefix_of_upload,
    random_batch_id,
    start_batch,
)
from sluice.domain.errors import BatchNotFound, Conflict, InvalidRequest, StoreBusy
from sluice.domain.pricing import LIVE_LANE
from sluice.intake.requests import BatchRequest, ListedJob, read_items
from sluice.ports.batches import BatchPage, BatchStore, Newcomer, Objects, Plans, RangesQueue
from sluice.ports.swap import Deleted, change, insert
from sluice.ports.world import Clock, Events, RandomBytes

EXPIRES_MS: Final = DAY_MS
"""Anthropic's batches expire after 24 hours."""

ARCHIVED_MS: Final = 29 * DAY_MS
"""Results can be fetched for this long after the creation, as at Anthropic."""

RETRY_MS: Final = 25 * 60_000
"""An SDK repeats a create request within this time: three tries of ten minutes each, without the last response."""

PLANNED_MS: Final = 2 * 60_000
"""A new batch whose message to the planner was lost is checked after this time."""

MOST_STARTED: Final = 50
"""Maximum ranges whose messages the API function sends: about 5,000 rows, five calls to SQS. The planner sends more."""

MOST_INLINE_BYTES: Final = 4_300_000
"""Maximum results in one response: Lambda returns 6 MB, in base64."""

LINK_SECONDS: Final = 900

ERASE_MS: Final = 15_000
"""Time for deletions in one request, of the function's 28 s."""

ERASED_AT_ONCE: Final = 1_000
"""S3's limit of DeleteObjects."""


@dataclass(frozen=True, slots=True)
class Create:
    """A create request."""

    items: Sequence[object]
    options: Options
    source: Source = Source.MESSAGES_BATCHES
    idempotency_key: str | None = None
    retries: int = 0
    """How often this request was sent before, as SDKs report it; they send no Idempotency-Key."""
    client: str = ""
    """Identifies the client by its headers, because two programs may send the same request at the same time."""


@dataclass(frozen=True, slots=True)
class Inline:
    """Results that fit into the response: gzipped, as stored."""

    packed: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """Results that must be fetched from the bucket."""

    url: str


class Batches:
    """One tenant's batches."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        tenant: str,
        batches: BatchStore,
        objects: Objects,
        queue: Plans,
        ranges: RangesQueue,
        clock: Clock,
        random_bytes: RandomBytes,
        events: Events,
        longest_ms: int = LONGEST_MS,
        default_lane: AskedLane = "live",
    ) -> None:
        """`longest_ms` is how long rows may wait, with a deadline of their own.

        `default_lane` is for requests that ask for none.
        """
        self._longest_ms = longest_ms
        self._default_lane = default_lane
        self._tenant = tenant
        self._batches = batches
        self._objects = objects
        self._queue = queue
        self._ranges = ranges
        self._clock = clock
        self._random_bytes = random_bytes
        self._events = events

    # Creating --------------------------------------------------------------------------------------------------

    def create(self, asked: Create) -> Batch:
        """Store the rows as an object and start its ranges; a repeated request returns the existing batch."""
        lane = asked.options.lane or self._default_lane
        body = _jsonl(asked.items, asked.source, lane)
        digest = sha256(body).hexdigest()
        now = self._clock.now()
        batch_id = self._id_for(asked, digest, now)
        # With the digest, so that a different request with the same Idempotency-Key overwrites nothing.
        key = f"batches/{batch_id}/input-{digest[:16]}.jsonl"
        etag = self._objects.put(key, body)
        deadline = asked.options.deadline
        if deadline is not None and deadline <= now:
            where = "sluice-deadline: " if asked.source is Source.MESSAGES_BATCHES else ""
            raise InvalidRequest(f"{where}deadline is in the past; send a later time")
        batch = Batch(
            batch_id=batch_id,
            tenant=self._tenant,
            name=batch_id,
            source=asked.source,
            created_at=now,
            expires_at=min(deadline or now + EXPIRES_MS, now + self._longest_ms),
            input_key=key,
            input_etag=etag,
            options=asked.options,
            rows=len(asked.items),
            plan=planned(len(body), body, lane=lane),
            due_at=now + PLANNED_MS,
            lane=lane,
        )
        stored = insert(self._batches.add, batch)
        if stored is None or stored.input_key != key:
            raise Conflict(
                "this Idempotency-Key was already used for a different batch; use a new one"
            )
        if stored.options.lane != asked.options.lane:
            # It would cost twice as much as asked for, or take longer.
            raise Conflict(
                f"this Idempotency-Key was already used with {_lane_asked(stored)} (now: {_lane_asked(batch)}); "
                "send the same lane, or a new key"
            )
        if stored is batch:
            self._events.note("batch created", batch_id=batch_id, tenant=self._tenant)
        if stored.phase is Phase.PLANNING:
            return self._start(stored)
        return stored

    def _start(self, batch: Batch) -> Batch:
        """Send the messages of a batch's ranges, or have the planner send them. Repeated messages are harmless."""
        plan = batch.plan
        if plan is None or plan.ranges > MOST_STARTED or batch.lane != LIVE_LANE:
            # The planner alone decides on lanes.
            self._have_planned(batch.batch_id)
            return batch
        if plan.is_small:
            self._announce(batch)
        if self._ranges.send_ranges(batch, range(plan.ranges)):
            self._have_planned(batch.batch_id)
            return batch
        try:
            started = self._changed(batch, lambda current: start_batch(current, self._clock.now()))
        except StoreBusy:
            # All messages were sent; the sweep will have them sent again.
            self._events.problem("batch started, but not marked as such", batch_id=batch.batch_id)
            return batch
        self._events.note(
            "batch planned", batch_id=batch.batch_id, tenant=batch.tenant, ranges=plan.ranges,
            bytes=plan.size,
        )  # fmt: skip
        return started

    def _announce(self, batch: Batch) -> None:
        try:
            self._batches.announce(Newcomer(batch.tenant, batch.batch_id))
        except StoreBusy:
            # It starts when an invocation is free.
            self._events.problem("newcomer not announced", batch_id=batch.batch_id)

    def _id_for(self, asked: Create, digest: str, now: int) -> str:
        if asked.idempotency_key is not None:
            return named_batch_id(self._tenant, asked.idempotency_key)
        facts = [asked.options.anthropic_version, asked.options.anthropic_beta]
        if asked.options.lane is not None:
            # Only if asked, so that a retry finds the batch that a release without lanes created.
            facts.append(asked.options.lane)
        options = json.dumps(facts)
        name = f"{digest}\x00{options}\x00{asked.client}"
        fresh = random_batch_id(self._random_bytes(16))
        return self._batches.name_create(
            self._tenant, name, fresh, now - RETRY_MS, fresh=asked.retries == 0
        )

    def _have_planned(self, batch_id: str) -> None:
        try:
            self._queue.send_plan(batch_id, self._tenant)
        except StoreBusy:
            # The batch is stored: the sweep finds it once it is overdue to be planned.
            self._events.problem("queue busy, batch waits for the sweep", batch_id=batch_id)

    # Reading ---------------------------------------------------------------------------------------------------

    def get(self, batch_id: str) -> Batch:
        """Return the batch; raises BatchNotFound for one that is not the tenant's."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.tenant != self._tenant or batch.deleted:
            raise BatchNotFound(batch_id)
        return batch

    def page(self, limit: int, after_id: str | None, before_id: str | None) -> BatchPage:
        """Return a page of the tenant's batches, newest first."""
        if after_id is not None and before_id is not None:
            raise InvalidRequest("after_id, before_id: use one of them, not both")
        after = self.get(after_id) if after_id is not None else None
        before = self.get(before_id) if before_id is not None else None
        return self._batches.listing(self._tenant, limit, after=after, before=before)

    def progress(self, batch: Batch) -> Tally:
        """Return the sums of all rows that have ended; for running ranges they are a few seconds old."""
        if batch.phase is Phase.ENDED:
            return batch.tally
        found = self._batches.groups(batch.batch_id, "section#")
        return _sum(found)

    # Ending ----------------------------------------------------------------------------------------------------

    def cancel(self, batch_id: str) -> Batch:
        """Cancel a batch, and have its parked ranges woken; canceling again changes nothing."""

        def canceled(batch: Batch) -> Batch:
            if batch.phase is Phase.ENDED:
                raise InvalidRequest(f"Message batch {batch_id} has ended and cannot be canceled.")
            return cancel_batch(batch, self._clock.now())

        batch = self._changed(self.get(batch_id), canceled)
        self._have_planned(batch_id)
        return batch

    def delete(self, batch_id: str) -> None:
        """Delete an ended batch."""
        batch = self.get(batch_id)
        if batch.phase is not Phase.ENDED:
            raise InvalidRequest(
                f"Message batch {batch_id} is {status(batch)}; it can be deleted once it has ended."
            )
        self._erase(batch)
        self._changed(batch, delete_batch)

    def _erase(self, batch: Batch) -> None:
        """Delete all objects with rows or answers of the batch; raises StoreBusy if there are too many for one request.

        Nothing is marked before the last object is deleted, so that a repeated request continues.
        """
        stop_at = self._clock.now() + ERASE_MS
        copies = [each for name in OUTPUTS if (each := self._copy_of(batch, name))]
        if copies:
            self._objects.delete(copies)
        upload = prefix_of_upload(batch.given_key or batch.input_key)
        for prefix in filter(None, (f"batches/{batch.batch_id}/", upload)):
            found = self._objects.listing(prefix)
            while some := [each.key for each in islice(found, ERASED_AT_ONCE)]:
                if self._clock.now() >= stop_at:
                    what = "the deletion of the batch's objects"
                    raise StoreBusy(what)
                self._objects.delete(some)

    def _copy_of(self, batch: Batch, name: str) -> str | None:
        """Return the key of a copy of the batch's output; None if it is that of another batch of its name."""
        key = f"{batch.named_folder}{name}"
        there = self._objects.head(key)
        if there is None:
            return None
        if there.rank:
            return key if there.rank == batch.rank else None
        # Older releases stored the results there, and only the summary says of which batch. It is deleted last.
        summary = self._objects.get(f"{batch.named_folder}{SUMMARY}")
        return key if owner_of(summary) == batch.batch_id else None

    def _changed(self, batch: Batch, rule: Callable[[Batch], Batch]) -> Batch:
        result = change(self._batches.replace, batch, rule, f"batch {batch.batch_id}")
        if isinstance(result, Deleted):
            raise BatchNotFound(batch.batch_id)
        return result.record

    def results(self, batch_id: str, *, may_follow: bool) -> Inline | Link:
        """Return the results, or a link to them.

        `may_follow`: the client does not forward its key when it follows a redirect to another host. Other clients get
        no link.
        """
        batch = self.get(batch_id)
        if batch.phase is not Phase.ENDED:
            raise InvalidRequest(f"Message batch {batch_id} is {status(batch)}; no results yet.")
        if is_archived(batch, self._clock.now()):
            raise BatchNotFound(batch_id)
        stored = self._objects.head(batch.packed_key)
        if stored is not None and stored.size <= MOST_INLINE_BYTES:
            packed = self._objects.get(batch.packed_key)
            if packed is not None:
                return Inline(packed)
        if not may_follow:
            raise InvalidRequest(
                f"the results have {batch.results_bytes:,} bytes, which exceeds the response limit, and a "
                "redirect would forward the x-api-key header to S3. Send the key as "
                "Authorization: Bearer (Anthropic's SDKs from version 2, TypeScript 1), run "
                f"`sluice batches results {batch_id}`, or read s3://<DataBucketName>/{batch.results_key}"
            )
        return Link(self._objects.link(batch.results_key, LINK_SECONDS))

    def links(self, batch_id: str) -> dict[str, str]:
        """Return presigned URLs of an ended batch's files, valid for 15 minutes."""
        batch = self.get(batch_id)
        if batch.phase is not Phase.ENDED:
            raise InvalidRequest(f"Message batch {batch_id} is {status(batch)}; no results yet.")
        keys = {
            "results": batch.results_key,
            "errors": batch.errors_key,
            "summary": batch.summary_key,
        }
        if batch.is_folder and self._objects.head(batch.documents_key) is not None:
            keys["documents"] = batch.documents_key
        return {name: self._objects.link(key, LINK_SECONDS) for name, key in keys.items()}


def status(batch: Batch) -> str:
    """Return the status of a batch in Anthropic's terms."""
    if batch.phase is Phase.ENDED:
        return "ended"
    return "in_progress" if batch.cancel_initiated_at is None else "canceling"


def is_archived(batch: Batch, now: int) -> bool:
    """Return whether the results can no longer be fetched."""
    return now >= batch.created_at + ARCHIVED_MS


def _lane_asked(batch: Batch) -> str:
    return "no lane" if batch.options.lane is None else f"lane {batch.options.lane!r}"


def _sum(groups: Mapping[str, Progress]) -> Tally:
    return sum((group.tally + group.running for group in groups.values()), Tally())


_KINDS: Final[Mapping[Source, tuple[type[BatchRequest], str]]] = {
    Source.MESSAGES_BATCHES: (BatchRequest, "requests"),
    Source.JOBS: (ListedJob, "jobs"),
}
"""The type of the items of a create request, and the field of the body that contains them."""


def _jsonl(items: Sequence[object], source: Source, lane: AskedLane) -> bytes:
    """Return the rows as lines; raises InvalidRequest for the first invalid one."""
    kind, place = _KINDS[source]
    first: dict[str, int] = {}
    for position, custom_id in enumerate(read_items(items, kind, place, lane)):
        if first.setdefault(custom_id, position) != position:
            raise InvalidRequest(
                f"{place}.{position}: duplicate custom_id {custom_id!r}; first used by item {first[custom_id]}"
            )
    lines = [json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items]
    return "\n".join(lines).encode() + b"\n"
