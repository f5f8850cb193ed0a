"""The records of upstream batches in the table of batches, distinguished by their partition keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import job_records
from sluice.adapters.tables import Table
from sluice.domain.completions import CompletionTimes, Observation
from sluice.domain.errors import Stale, StoreBusy
from sluice.domain.turns import Shares
from sluice.domain.upstream_batches import Phase, Slice, UpstreamBatch
from sluice.ports.swap import MOST_TRIES
from sluice.ports.upstream_records import DueStep, Learned, Waiting
from sluice.ports.world import Clock

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from sluice.adapters.job_records import Item

PART: Final = "upstream"
DUE: Final = "upstream"
"""Their part of the index `by_due`, which the sweep of jobs and ranges does not read."""

_LEARNED: Final[Item] = {"batch_id": {"S": "completion times"}, "part": {"S": "learned"}}

LIST: Final = "collect"
"""The partition with the list of batches that wait for the collector, ordered by time."""


class DynamoUpstreamRecords:
    """The records of upstream batches."""

    def __init__(
        self, client: DynamoDBClient, table: str, retention_days: int, clock: Clock
    ) -> None:
        self._table = Table(client, table, "the batches table", "batch_id")
        self._retention_days = retention_days
        self._clock = clock

    def add(self, record: UpstreamBatch) -> None:
        """Store a new record; raises Stale with the stored one if its id is in use."""
        self.replace(record, 0)

    def get(self, upstream_id: str) -> UpstreamBatch | None:
        """Return the record as last written (a consistent read)."""
        item = self._table.get({"batch_id": {"S": upstream_id}, "part": {"S": PART}})
        return _record(item) if item else None

    def replace(self, record: UpstreamBatch, expected_version: int) -> None:
        """Write the record if its stored version is the expected one; otherwise raises Stale."""
        item: Item = {
            "batch_id": {"S": record.upstream_id},
            "part": {"S": PART},
            "version": {"N": str(record.version)},
            "record": {"S": json.dumps(asdict(record), separators=(",", ":"))},
            "expires_at": {"N": str(self._expires(record.expires_at))},
        }
        if record.due_at is not None:
            item |= {
                "due_shard": {"S": DUE},
                "due_at": {"N": str(record.due_at)},
                "due_tenant": {"S": record.tenant},
            }
        self._table.replace(item, expected_version, _record)

    def due(self, until: int, share: int) -> Sequence[DueStep]:
        """Return those whose next step is due until a time, longest due first: at most `share` of each tenant."""
        found = Shares[DueStep](lambda each: each.tenant, share)
        self._table.due(DUE, until, found, _due)
        return list(found.items)

    def learned(self) -> Learned:
        """Return what was learned from upstream batches."""
        return _learned(self._table.get(_LEARNED))

    def observe(self, seen: Observation, cancel_ms: int | None = None) -> None:
        """Learn from an upstream batch that ended, and how long its cancel took if it was canceled."""
        for _ in range(MOST_TRIES):
            item = self._table.get(_LEARNED)
            version = int(item["version"]["N"]) if item else 0
            known = _learned(item).observed(seen, cancel_ms)
            record = {"times": known.times.stored(), "cancels_ms": known.cancels_ms}
            text = json.dumps(record, separators=(",", ":"))
            written: Item = {**_LEARNED, "version": {"N": str(version + 1)}, "record": {"S": text}}
            try:
                self._table.replace(written, version, _same)
            except Stale:
                continue
            return
        what = "the completion times"
        raise StoreBusy(what)

    def wait(self, waiting: Waiting) -> None:
        """Add a batch to the list."""
        self._table.put({**_listed(waiting), "expires_at": {"N": str(self._expires())}})

    def waiting(self, most: int) -> Sequence[Waiting]:
        """Return the first batches of the list."""
        items = self._table.query(
            KeyConditionExpression="batch_id = :list",
            ExpressionAttributeValues={":list": {"S": LIST}},
            ConsistentRead=True,
            Limit=most,
        )["Items"]
        return [_waiting(item) for item in items]

    def collected(self, waiting: Waiting) -> None:
        """Remove a batch from the list, if it is there."""
        self._table.delete(_listed(waiting))

    def _expires(self, last_needed: int = 0) -> int:
        return job_records.expiry(self._clock.now(), last_needed, self._retention_days)


def _learned(item: Item | None) -> Learned:
    if not item:
        return Learned()
    record: dict[str, Any] = json.loads(item["record"]["S"])
    return Learned(CompletionTimes.read(record["times"]), tuple(record["cancels_ms"]))


def _same(item: Item) -> Item:
    return item


def _due(item: Item) -> DueStep:
    return DueStep(item["batch_id"]["S"], item["due_tenant"]["S"])


def _listed(waiting: Waiting) -> Item:
    part = f"{waiting.since:015d}#{waiting.tenant}#{waiting.batch_id}"
    return {"batch_id": {"S": LIST}, "part": {"S": part}}


def _waiting(item: Item) -> Waiting:
    since, tenant, batch_id = item["part"]["S"].split("#")
    return Waiting(tenant, batch_id, int(since))


def _record(item: Item) -> UpstreamBatch:
    record: dict[str, Any] = json.loads(item["record"]["S"])
    return job_records.made(
        UpstreamBatch,
        record
        | {
            "phase": Phase(record["phase"]),
            "slices": tuple(job_records.made(Slice, each) for each in record["slices"]),
            "cuts": tuple(record["cuts"]),
            "models": tuple(record["models"]),
        },
    )
